"""data/imagenet.py: the right latents in the right rows, for any number of processes and after a kill at any point."""
import errno
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import imagenet  # noqa: E402
import prepare  # noqa: E402

import train  # noqa: E402


class Net(torch.nn.Module):
    """Stands for a VAE: one convolution, which no mirror image commutes with."""

    def __init__(self, channels=8):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(channels, 3, 8, 8, generator=g) / 14, requires_grad=False)
        self.config = SimpleNamespace(scaling_factor=0.18215)

    def encode(self, x):
        mean, logvar = torch.nn.functional.conv2d(x, self.w, stride=8).chunk(2, 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, std=(logvar / 2).exp()))


class Dino(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(5, 3, 14, 14, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        tokens = torch.nn.functional.conv2d(x, self.w, stride=14).flatten(2).mT
        return SimpleNamespace(last_hidden_state=torch.cat([tokens[:, :1] * 0 + 9, tokens], 1))  # 9: the class token


def picture(width, height, seed=0):
    """Waves and noise: RGB, without any symmetry."""
    rng, (v, u) = np.random.default_rng(seed), np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(u / (7 + seed + c) + v / (23 - c)) for c in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype("uint8"))


def write_images(root):
    """Three classes with all that is readable; 9 images."""
    for name in ("n02", "n01", "n03"): (root / name).mkdir(parents=True)
    picture(500, 375, 1).save(root / "n01/b.JPEG")
    picture(300, 400, 2).convert("L").save(root / "n01/a.JPEG")
    picture(333, 260, 3).convert("CMYK").save(root / "n01/c.JPEG")
    picture(260, 280, 4).quantize(16).save(root / "n01/d.png", transparency=bytes([0, 128, 255]))
    alpha = picture(270, 256, 5).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    alpha.save(root / "n02/alpha.png")
    picture(7, 5, 6).save(root / "n02/tiny.png")
    picture(1100, 1030, 7).save(root / "n02/large.JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by 90 degrees"
    picture(320, 270, 8).save(root / "n03/turned.JPEG", exif=exif)
    picture(256, 256, 9).save(root / "n03/a jpeg that is a png.JPEG", "PNG")
    (root / "n03/.DS_Store").write_bytes(b"not listed")
    (root / "README").write_text("not a class")


def write_bad(root):
    """-> what the list must say of each"""
    whole = io.BytesIO()
    picture(400, 400).save(whole, "JPEG")
    (root / "n01/truncated.JPEG").write_bytes(whole.getvalue()[:9000])
    (root / "n01/empty.JPEG").write_bytes(b"")
    (root / "n02/text.JPEG").write_text("404 not found")
    png = io.BytesIO()
    picture(300, 300).save(png, "PNG")
    (root / "n02/corrupt.png").write_bytes(png.getvalue()[:5000] + b"\0" * 500 + png.getvalue()[5500:])
    Image.new("1", (11_000, 9_000)).save(root / "n03/bomb.png")  # 99 million pixels in a few kilobytes
    Image.new("L", (1, 2_000)).save(root / "n03/strip.png")
    (root / "n03/nothing.png").symlink_to(root / "gone.png")
    return {"n01/truncated.JPEG": "truncated", "n01/empty.JPEG": "not an image", "n02/text.JPEG": "not an image",
            "n02/corrupt.png": "", "n03/bomb.png": "pixels", "n03/strip.png": "256 x 512000",
            "n03/nothing.png": "No such file"}


FILES = ["n01/a.JPEG", "n01/b.JPEG", "n01/c.JPEG", "n01/d.png", "n02/alpha.png", "n02/large.JPEG", "n02/tiny.png",
         "n03/a jpeg that is a png.JPEG", "n03/turned.JPEG"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root)
    return root


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    monkeypatch.setattr(imagenet, "load_vae", lambda name: Net())
    monkeypatch.setattr(imagenet, "load_dino", lambda name: Dino())


def run(*argv):
    return prepare.main(["imagenet", *map(str, argv), "--device", "cpu", "--workers", "2"])


def fails(capsys, argv, *expected):
    """Status 1, and one `error:` line with all of `expected` in it. -> what was printed beside it"""
    capsys.readouterr()
    assert run(*argv) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in expected: assert str(part) in err, (part, err)
    return out


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# One image


def resize(a, width, height, kernel, order):
    """Pillow's convolution written out: (H, W, 3) -> (height, width, 3), along two axes, each pass rounded to bytes."""
    for axis in order:
        size = (height, width)[axis]
        scale = a.shape[axis] / size
        stretch = max(scale, 1)  # the filter grows when it shrinks an image
        centre, pixel = (np.arange(size) + 0.5) * scale, np.arange(a.shape[axis]) + 0.5
        weight = kernel((pixel - centre[:, None]) / stretch)  # (size, pixels)
        weight = weight / weight.sum(1, keepdims=True)
        a = np.clip(np.floor(np.moveaxis(np.tensordot(weight, a.astype(float), (1, axis)), 0, axis) + 0.5), 0, 255)
    return a


def box(d):
    return (d > -0.5) & (d <= 0.5)


def cubic(d, a=-0.5):
    d = np.abs(d)
    return np.where(d < 1, ((a + 2) * d - (a + 3)) * d * d + 1, np.where(d < 2, (((d - 5) * d + 8) * d - 4) * a, 0))


@pytest.mark.parametrize("width, height", [(500, 375), (1100, 1030), (513, 1300), (512, 512), (256, 256), (7, 5),
                                           (260, 259), (511, 700)])
def test_the_crop_is_adms(width, height):
    image, off = picture(width, height), []
    for order in ((1, 0), (0, 1)):  # Pillow chooses by the shape; the other order rounds other pixels
        a, (w, h) = np.asarray(image), (width, height)
        while min(w, h) >= 512:
            w, h = w // 2, h // 2
            a = resize(a, w, h, box, order)
        w, h = round(w * 256 / min(w, h)), round(h * 256 / min(w, h))
        a = resize(a, w, h, cubic, order)
        a = a[(h - 256) // 2:, (w - 256) // 2:][:256, :256]
        off.append(np.abs(imagenet.center_crop(image) - a))
    off = min(off, key=np.mean)
    assert off.shape == (256, 256, 3) and off.max() <= 1 and off.mean() < 0.001  # Pillow rounds weights to 22 bits


def test_modes(images):
    gray = imagenet.read_image(images / "n01/a.JPEG")
    assert (gray == gray[:, :, :1]).all()
    cmyk = np.asarray(Image.open(images / "n01/c.JPEG")).astype(float)  # (260, 333, 4), inverted back by Pillow
    want = (255 - cmyk[:, :, :3]) * (255 - cmyk[:, :, 3:]) / 255
    small = imagenet.center_crop(Image.fromarray(np.rint(want).astype("uint8")))
    assert np.abs(imagenet.read_image(images / "n01/c.JPEG") - small.astype(int)).max() <= 3
    palette = imagenet.read_image(images / "n01/d.png").reshape(-1, 3)
    assert palette.std(0).min() > 20  # colours, not indices 0..15
    alpha = Image.open(images / "n02/alpha.png")
    opaque = Image.fromarray(np.asarray(alpha)[:, :, :3])
    assert (imagenet.read_image(images / "n02/alpha.png") == imagenet.center_crop(opaque)).all()
    turned = Image.open(images / "n03/turned.JPEG")
    assert ImageOps.exif_transpose(turned).size == (270, 320)
    assert (imagenet.read_image(images / "n03/turned.JPEG") == imagenet.center_crop(turned.convert("RGB"))).all()
    assert np.isclose(imagenet.read_image(images / "n02/tiny.png").mean(), np.asarray(picture(7, 5, 6)).mean(), atol=12)


# What is written


def expected_latent(path, flip=False, scale=0.18215):
    x = torch.from_numpy(imagenet.read_image(path)).permute(2, 0, 1)[None].double() / 127.5 - 1
    d = Net().double().encode(x.flip(-1) if flip else x).latent_dist
    return (d.mean * scale)[0].numpy(), (d.std * scale)[0].numpy()


def test_rows(images, tmp_path, capsys):
    held = tmp_path / "val"
    for name in ("n03", "n01"): shutil.copytree(images / name, held / name)  # not all classes need be there
    assert run("--source", images, "--heldout", held, "--out", tmp_path / "o", "--batch", 2) == 0
    out, err = capsys.readouterr()
    assert err == "" and str(tmp_path / "o") in out and "GB needed" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "val"]
    data = train.load_data(str(tmp_path / "o"))
    assert data["x"].shape == (18, 4, 32, 32) and data["x"].dtype == np.float16 and data["y"].dtype == np.int64
    assert data["y"].tolist() == [0] * 8 + [1] * 6 + [2] * 4
    assert json.loads((tmp_path / "o/files.json").read_text())["x"] == FILES
    for k, name in enumerate(FILES):
        plain, mirrored = (expected_latent(images / name, flip)[0] for flip in (False, True))
        assert np.abs(data["x"][2 * k] - plain).max() < 1e-3 and np.abs(data["x"][2 * k + 1] - mirrored).max() < 1e-3
        assert np.abs(mirrored - plain[:, :, ::-1]).max() > 0.005  # flipping the latent would not do
    assert data["y_heldout"].tolist() == [0] * 4 + [2] * 2
    for row, k in zip(data["x_heldout"], [0, 1, 2, 3, 7, 8], strict=True):
        assert np.abs(row - expected_latent(images / FILES[k])[0]).max() < 1e-3
    meta = data["meta"]
    assert (meta["num_classes"], meta["classes"], meta["shape"]) == (3, ["n01", "n02", "n03"], [4, 32, 32])
    assert meta["skipped"] == [] and "0.18215" in meta["scaling"] and meta["config"]["latent"] == "mean"
    assert meta["sha256"] == {f: hashlib.sha256((tmp_path / "o" / f).read_bytes()).hexdigest()
                              for f in ("x.npy", "y.npy", "x_heldout.npy", "y_heldout.npy", "files.json")}
    before = (tmp_path / "o/x.npy").stat().st_mtime_ns
    assert run("--source", images, "--heldout", held, "--out", tmp_path / "o", "--batch", 2) == 0
    assert (tmp_path / "o/x.npy").stat().st_mtime_ns == before  # it is there already


def test_it_can_be_trained_on(images, tmp_path):
    assert run("--source", images, "--heldout", images, "--out", tmp_path / "o", "--repa") == 0
    data = train.load_data(str(tmp_path / "o"))
    model = train.build_model("SiT-nano/4", input_size=32, in_channels=4, num_classes=data["meta"]["num_classes"])
    x = torch.from_numpy(data["x_heldout"].astype(np.float32))
    predicts_zero = train.noise(range(9), x.shape[1:], 1).sub(x).square().mean()  # as its last layer starts at zero
    assert train.heldout_loss(model, data, "cpu", "v") == pytest.approx(predicts_zero.item(), rel=1e-4)


def test_a_sampled_latent(images, tmp_path):
    """Whitened by the posterior that it was drawn from, it is standard normal, and another one for each row."""
    for batch in (2, 5):
        assert run("--source", images, "--out", tmp_path / f"{batch}", "--latent", "sample", "--batch", batch) == 0
    x = np.load(tmp_path / "2/x.npy").astype(float)
    assert np.abs(x - np.load(tmp_path / "5/x.npy")).max() < 2e-3  # the noise does not depend on the batch
    white = np.stack([(x[2 * k + flip] - mean) / std for k, name in enumerate(FILES) for flip in (0, 1)
                      for mean, std in [expected_latent(images / name, flip)]]).reshape(18, -1)
    assert np.abs(white.mean(1)).max() < 5 / 64 and np.abs(white.std(1) - 1).max() < 0.06
    assert np.abs(np.corrcoef(white) - np.eye(18)).max() < 6 / 64


def test_features(images, tmp_path, capsys):
    assert run("--source", images, "--out", tmp_path / "o", "--repa") == 0
    assert "features.npy" in capsys.readouterr().out
    got = train.load_data(str(tmp_path / "o"))["features"]
    assert got.shape == (18, 256, 5) and got.dtype == np.float16
    for row, flip in ((10, False), (11, True)):
        x = torch.from_numpy(imagenet.read_image(images / FILES[5])).permute(2, 0, 1)[None] / 255
        x = torch.nn.functional.interpolate(x.flip(-1) if flip else x, 224, mode="bicubic")  # the two steps commute
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        want = torch.einsum("nchpwq,kcpq->nhwk", x.reshape(1, 3, 16, 14, 16, 14), Dino().w).reshape(256, 5)
        assert np.abs(got[row] - want.detach().numpy()).max() < 0.05  # values up to 60, in steps of .03
    before, path = np.array(got), tmp_path / "o/features.npy"
    path.unlink()  # 1 TB that someone needed elsewhere: the same command makes it again
    assert run("--source", images, "--out", tmp_path / "o", "--repa") == 0
    assert (np.load(path) == before).all()


# Bad inputs


def test_bad_images(images, tmp_path, capsys):
    root = tmp_path / "train"
    shutil.copytree(images, root)
    bad = write_bad(root)
    out = fails(capsys, ["--source", root, "--out", tmp_path / "o"], "7 of 16 images", "--skip-bad")
    listed = {line.split(": ")[1]: line for line in out.splitlines() if line.startswith("unreadable")}
    assert sorted(listed) == sorted(str(root / name) for name in bad)
    for name, why in bad.items(): assert why in listed[str(root / name)], listed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train"]
    assert run("--source", root, "--out", tmp_path / "o", "--skip-bad") == 0
    assert run("--source", images, "--out", tmp_path / "good") == 0
    for name in ("x.npy", "y.npy", "files.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "good" / name).read_bytes()
    skipped = json.loads((tmp_path / "o/meta.json").read_text())["skipped"]
    assert [f for f, _ in skipped] == [str(root / name) for name in sorted(bad)]
    for name in FILES[-2:]: (root / name).unlink()
    fails(capsys, ["--source", root, "--out", tmp_path / "new", "--skip-bad"], root / "n03", "without a readable image")
    assert not (tmp_path / "new").exists()


def test_bad_folders(images, tmp_path, capsys):
    flat, empty, high = tmp_path / "flat", tmp_path / "empty", tmp_path / "high"
    flat.mkdir(), (empty / "n01").mkdir(parents=True), high.mkdir()
    picture(9, 9).save(flat / "a.png")
    (high / "train").symlink_to(images)
    target = ["--out", tmp_path / "o"]
    fails(capsys, target, "--source")
    fails(capsys, ["--source", tmp_path / "gone", *target], tmp_path / "gone", "not a folder")
    fails(capsys, ["--source", flat, *target], flat, "no class folders")
    fails(capsys, ["--source", empty, *target], empty / "n01", "without images")
    fails(capsys, ["--source", high, *target], high / "train", "too high")
    (high / "n09").symlink_to(images / "n01")
    (high / "train").unlink()
    fails(capsys, ["--source", images, "--heldout", high, *target], high / "n09", "no such class")
    fails(capsys, ["--source", images, "--batch", 0, *target], "--batch")
    (flat / "n01").symlink_to(images / "n01")
    assert prepare.main(["mnist", "--skip-bad"]) == 1 and "--skip-bad" in capsys.readouterr().err
    assert not any("o" in p.name.split(".") for p in tmp_path.iterdir())


def test_other_networks(images, tmp_path, capsys, monkeypatch):
    target = ["--source", images, "--out", tmp_path / "o"]
    monkeypatch.setattr(imagenet, "load_vae", lambda name: Net(32))
    fails(capsys, target, "--vae", "(16, 32, 32)", "(4, 32, 32)")
    broken = Net()
    broken.w.data[0, 0, 0, 0] = float("nan")
    monkeypatch.setattr(imagenet, "load_vae", lambda name: broken)
    fails(capsys, target, "not finite", "n01/a.JPEG")
    assert not (tmp_path / "o").exists()


def test_packages_that_are_missing(images, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # the real loaders
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(capsys, ["--source", images, "--out", tmp_path / "o"], "pip install diffusers")
    with pytest.raises(ImportError, match="pip install transformers"):
        imagenet.load_dino("x/y")


def test_the_disk(images, tmp_path, capsys, monkeypatch):
    target = ["--source", images, "--out", tmp_path / "new/o", "--batch", 2]
    with monkeypatch.context() as m:
        m.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        out = fails(capsys, target, tmp_path, "0.00 GB free")
        assert "GB needed" in out and not (tmp_path / "new").exists()
        m.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=170_000))  # enough, but not with features
        fails(capsys, [*target, "--repa"], tmp_path, "0.00 GB free")
    calls = []

    def full(self, first, rows):
        calls.append(first)
        if len(calls) == 3: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, first, rows)

    real = imagenet.Rows.write
    with monkeypatch.context() as m:
        m.setattr(imagenet.Rows, "write", full)
        m.setattr(imagenet, "SYNC", 0)
        fails(capsys, target, tmp_path / "new", "No space left", "goes on")
    assert [p.name for p in (tmp_path / "new").iterdir()] == [".o.partial"]
    assert run(*target) == 0 and "2 of 5 batches" in capsys.readouterr().out
    assert run("--source", images, "--out", tmp_path / "whole", "--batch", 2) == 0
    assert tree(tmp_path / "new/o") == tree(tmp_path / "whole")


def test_other_options_do_not_go_on(images, tmp_path, capsys, monkeypatch):
    root, calls = tmp_path / "train", []
    shutil.copytree(images, root)

    def stop(*args):
        calls.append(1)
        if len(calls) == 4: raise OSError(errno.EIO, "stop")  # the third batch; the first call was the probe's
        return real(*args)

    real, target = imagenet.encode, ["--source", root, "--out", tmp_path / "o", "--batch", 2]
    monkeypatch.setattr(imagenet, "SYNC", 0)
    with monkeypatch.context() as m:
        m.setattr(imagenet, "encode", stop)
        fails(capsys, target, "stop")
    before = tree(tmp_path)
    fails(capsys, [*target, "--latent", "sample"], tmp_path / ".o.partial", "latent mean", "2 of 5 batches", "delete")
    fails(capsys, [*target[:-1], 3], "batch 2")
    picture(300, 300, 3).save(root / "n02/tiny.png")
    fails(capsys, target, "images ")
    shutil.copy2(images / "n02/tiny.png", root / "n02/tiny.png")
    other = Net()
    other.w.data[:] *= 2
    with monkeypatch.context() as m:
        m.setattr(imagenet, "load_vae", lambda name: other)
        fails(capsys, target, "vae_sha256")
    with open(tmp_path / ".o.partial/data/x.npy", "r+b") as f: f.truncate(5000)
    fails(capsys, target, tmp_path / ".o.partial", "damaged", "delete")
    (tmp_path / ".o.partial/data/x.npy").write_bytes(before[".o.partial/data/x.npy"])
    assert tree(tmp_path) == before
    held = imagenet.lock(tmp_path / ".o.partial")
    fails(capsys, target, "another process")
    held.close()
    assert run(*target) == 0 and run("--source", images, "--out", tmp_path / "whole", "--batch", 2) == 0
    assert np.array_equal(np.load(tmp_path / "o/x.npy"), np.load(tmp_path / "whole/x.npy"))
    # a complete data set by other options is replaced, and stands until then
    assert run(*target, "--latent", "sample") == 0
    assert json.loads((tmp_path / "o/meta.json").read_text())["config"]["latent"] == "sample"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "train", "whole"]


MOMENTS = 30  # at least
# Processes and kills. Children come from a fork server that has imported everything: they start in milliseconds.


class Volatile(imagenet.Rows):
    """A file on a disk that forgets at a kill what was not synced."""

    def __init__(self, path):
        super().__init__(path)
        self.held = []

    def write(self, first, rows): self.held.append((first, rows))

    def sync(self):
        for first, rows in self.held: super().write(first, rows)
        self.held = []
        super().sync()


def child(log, argv, rank, world, port, kill_at=None, slow=0.0):
    """One process of a torchrun; kills itself at its kill_at-th step that touches the disk."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(f"{log}.{rank}", "w", buffering=1)
    imagenet.load_vae, imagenet.load_dino, imagenet.Rows, imagenet.SYNC = lambda n: Net(), lambda n: Dino(), Volatile, 0
    steps, encode = [0], imagenet.encode

    def slowly(*args):
        time.sleep(slow)
        return encode(*args)

    def counted(f):
        def g(*args, **kwargs):
            steps[0] += 1
            if steps[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)
        return g

    imagenet.encode, os.fsync = slowly, lambda fd: None  # Volatile's sync stands for it, and is faster
    if kill_at:
        for module, name in ((os, "fsync"), (os, "replace"), (Volatile, "write"), (np, "save"), (shutil, "rmtree"),
                             (json, "dump"), (np.lib.format, "open_memmap"), (hashlib, "file_digest")):
            setattr(module, name, counted(getattr(module, name)))
    sys.exit(run(*argv))


@pytest.fixture(scope="module")
def start():
    """start(log, argv, world, ...) -> the processes"""
    context, before = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["test_imagenet"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    started = []

    def start(log, argv, world=1, **options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        new = [context.Process(target=child, args=(str(log), [str(a) for a in argv], r, world, port),
                               kwargs=options) for r in range(world)]
        for p in new: p.start()
        started.extend(new)
        return new

    yield start
    for p in started:
        if p.is_alive(): p.kill()
        p.join()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def ended(processes):
    for p in processes: p.join(60)
    return [p.exitcode for p in processes]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Options for 7 small images and 3 held out: batches of 2, 2, 2, 1, and 2, 1."""
    root = tmp_path_factory.mktemp("few")
    for split, name, n in (("train", "n01", 4), ("train", "n02", 3), ("val", "n02", 3)):
        (root / split / name).mkdir(parents=True)
        for i in range(n): picture(40 + i, 30 + n, i).save(root / split / name / f"{i}.JPEG")
    return ["--source", root / "train", "--heldout", root / "val", "--batch", 2, "--out"]


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory, start):
    """What one uninterrupted process makes."""
    folder = tmp_path_factory.mktemp("whole")
    assert ended(start(folder / "log", [*few, folder / "o"])) == [0], (folder / "log.0").read_text()
    assert len(np.load(folder / "o/x.npy")) == 14 and len(np.load(folder / "o/x_heldout.npy")) == 3
    return tree(folder / "o")


@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree(few, tmp_path, start, whole, world):
    assert ended(start(tmp_path / "log", [*few, tmp_path / "o"], world)) == [0] * world
    assert tree(tmp_path / "o") == whole and not (tmp_path / ".o.partial").exists()
    for out, processes in (("one", 1), ("more", world)):  # and of the features, and of sampled latents
        argv = [*few, tmp_path / out, "--repa", "--latent", "sample"]
        assert ended(start(tmp_path / "log", argv, processes)) == [0] * processes
    assert tree(tmp_path / "one") == tree(tmp_path / "more") and "features.npy" in tree(tmp_path / "one")


def test_killed_at_every_step(few, tmp_path, start, whole):
    for at in itertools.count(1):
        out = tmp_path / f"{at}"
        killed = ended(start(tmp_path / f"log{at}", [*few, out], kill_at=at)) == [-signal.SIGKILL]
        assert not out.exists() or tree(out) == whole  # the target is whole, or not there
        assert ended(start(tmp_path / f"again{at}", [*few, out])) == [0], (tmp_path / f"again{at}.0").read_text()
        assert tree(out) == whole and not (tmp_path / f".{at}.partial").exists(), at
        if not killed: break
    assert at > MOMENTS  # so many steps were there to be killed at


def test_killed_and_gone_on_with_by_another_number(few, tmp_path, start, whole):
    progress, counts = tmp_path / ".o.partial/progress", [0]
    for world, wanted in ((2, 1), (3, 3), (1, 4)):
        processes, deadline = start(tmp_path / f"log{world}", [*few, tmp_path / "o"], world, slow=0.2), time.time() + 60
        while time.time() < deadline and not (progress.exists() and sum(progress.read_bytes()) >= wanted):
            time.sleep(0.005)
        for p in processes: p.kill()
        assert set(ended(processes)) == {-signal.SIGKILL}
        counts.append(sum(progress.read_bytes()))
        assert not (tmp_path / "o").exists()
    assert counts[-1] >= 4
    assert ended(start(tmp_path / "last", [*few, tmp_path / "o"], 2)) == [0, 0]
    assert f"{counts[-1]} of 6 batches are done" in (tmp_path / "last.0").read_text()
    assert tree(tmp_path / "o") == whole


def test_one_process_says_what_is_wrong(images, tmp_path, start):
    root = tmp_path / "train"
    shutil.copytree(images, root)
    bad = write_bad(root)
    for case, argv in {"gone": ["--source", tmp_path / "gone"], "bad": ["--source", root]}.items():
        assert ended(start(tmp_path / case, [*argv, "--out", tmp_path / "o"], 3)) == [1, 1, 1]
        texts = [(tmp_path / f"{case}.{rank}").read_text() for rank in range(3)]
        assert "".join(texts).count("error:") == 1 and texts[1] == texts[2] == "", texts
        assert texts[0].count("unreadable:") == (len(bad) if case == "bad" else 0)
    assert not (tmp_path / "o").exists()


# With the real packages, where they are installed


def test_with_diffusers(images, tmp_path, capsys, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.undo()
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    argv = ["--source", images, "--out", tmp_path / "o", "--batch", 4]
    assert run(*argv, "--vae", tmp_path / "vae") == 0
    x = np.load(tmp_path / "o/x.npy")
    for k, name in enumerate(FILES):
        image = torch.from_numpy(imagenet.read_image(images / name)).permute(2, 0, 1)[None] / 127.5 - 1
        for flip in (0, 1):
            with torch.no_grad(): z = vae.encode(image.flip(-1) if flip else image).latent_dist.mode() * 0.18215
            assert np.abs(x[2 * k + flip] - z[0].numpy()).max() < 1e-3 * z.abs().max(), name
    assert json.loads((tmp_path / "o/meta.json").read_text())["config"]["vae_sha256"] == imagenet.checksum(vae)
    before = tree(tmp_path / "o")
    fails(capsys, [*argv, "--vae", tmp_path / "gone"], tmp_path / "gone", "no such folder")
    weights = next((tmp_path / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    fails(capsys, [*argv, "--vae", tmp_path / "vae"], "--vae", "cannot be loaded as AutoencoderKL")
    (tmp_path / "vae/config.json").unlink()
    fails(capsys, [*argv, "--vae", tmp_path / "vae"], "--vae", "config.json")
    assert tree(tmp_path / "o") == before


def test_with_transformers(images, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    real = monkeypatch.undo() or imagenet.load_dino
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    dino = transformers.Dinov2Model(config).eval()
    dino.save_pretrained(tmp_path / "dino")
    loaded = real(str(tmp_path / "dino"))
    table = loaded.embeddings.position_embeddings
    assert table.shape == (1, 257, 24)
    # a table that is linear in the row stays so: away from the border, 16 rows sample the 37 evenly
    ramp = torch.arange(37.0).repeat_interleave(37)[None, :, None].expand(1, 1369, 24)
    dino.embeddings.position_embeddings.data = torch.cat([torch.full((1, 1, 24), 5.0), ramp], 1)
    dino.save_pretrained(tmp_path / "ramp")
    table = real(str(tmp_path / "ramp")).embeddings.position_embeddings
    rows = table[0, 1:, 0].reshape(16, 16)
    assert (table[0, 0] == 5).all()
    assert torch.allclose(rows[3:-3], ((torch.arange(16) + 0.5) * 37 / 16 - 0.5)[3:-3, None].expand(10, 16), atol=0.02)
    image = imagenet.read_image(images / FILES[0])[None]
    got = imagenet.features(loaded, image, torch.device("cpu"))
    assert got.shape == (1, 256, 24)
    assert np.abs(got.mean(-1)).max() < 1e-4 and np.abs(got.std(-1) - 1).max() < 0.01  # past the last LayerNorm
    with pytest.raises(ValueError, match="--dino .*gone"): real(str(tmp_path / "gone"))
