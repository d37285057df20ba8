"""data/prepare.py writes what is in the files. No network.
data/imagenet.py: the right latents in the right rows, after a kill, and on any number of processes."""
import copy
import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import imagenet  # noqa: E402
import prepare  # noqa: E402

from plumbing import data  # noqa: E402
from plumbing.images import read_rgb  # noqa: E402

BINS = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
X, Y, XT, YT = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    """A temporary folder that holds data/. CIFAR-10's files have 3 records, shards 3 or 2 images. Small networks stand
    for the VAE and for DINOv2."""
    for module, name, value in (
            (data, "DATA", tmp_path / "data"), (prepare, "DATA", tmp_path / "data"), (prepare, "CIFAR_BYTES", 3 * 3073),
            (imagenet, "SHARD", 3), (imagenet, "SHARD_WITH_FEATURES", 2),
            (imagenet, "load_vae", lambda name: copy.deepcopy(VAE)),
            (imagenet, "load_dino", lambda name: copy.deepcopy(DINO))):
        monkeypatch.setattr(module, name, value)
    return tmp_path


def run(name, **options):
    prepare.main(prepare.Config(name, **options))


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def picture(width, height, seed=0):
    """Waves and noise: RGB, without any symmetry."""
    rng, (v, u) = np.random.default_rng(seed), np.mgrid[:height, :width]
    waves = [128 + 90 * np.sin(u / (7 + seed + c) + v / (23 - c)) for c in range(3)]
    return Image.fromarray(np.clip(np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype("uint8"))


IMAGES = {"n01/a.JPEG": picture(300, 400, 2).convert("L"), "n01/b.JPEG": picture(500, 375, 1),
          "n01/c.JPEG": picture(333, 260, 3).convert("CMYK"), "n02/palette.png": picture(260, 280, 4).quantize(16),
          "n02/tiny.png": picture(7, 5, 6)}
FILES = list(IMAGES)


@pytest.fixture
def images(tmp_path):
    for name, image in IMAGES.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "train" / name)
    return tmp_path / "train"


def mnist_files():
    """Return the four IDX files as {name: bytes}, and the arrays in them."""
    rng, files, arrays = np.random.default_rng(0), {}, []
    for images, labels, count in ((X, Y, 7), (XT, YT, 4)):
        x, y = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        x[0, 0, :2] = 0, 255                                 # both ends of the scale
        files[images] = struct.pack(">4I", 2051, count, 28, 28) + x.tobytes()
        files[labels] = struct.pack(">2I", 2049, count) + y.tobytes()
        arrays += [x[:, None], y]
    return files, arrays


def assert_written(folder, arrays):
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "x.npy", "x_heldout.npy", "y.npy", "y_heldout.npy"]
    meta = json.loads((folder / "meta.json").read_text())
    for name, want in zip(("x", "y", "x_heldout", "y_heldout"), arrays, strict=True):
        found = np.load(folder / f"{name}.npy")
        assert meta["sha256"][f"{name}.npy"] == hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
        assert found.dtype == (np.float32 if "x" in name else np.int64)
        assert np.abs(found - (want / 127.5 - 1 if "x" in name else want)).max() < 1e-6
    assert meta["shape"] == list(arrays[0].shape[1:]) and data.load_data(str(folder))["meta"]["classes"] == [*range(10)]


LAYOUTS = {"plain": "{0}", "dotted": "{1}", "gz": "{0}.gz", "dotted gz": "{1}.gz", "folders": "{0}/{1}"}


@pytest.mark.parametrize("forms", [*((form,) for form in LAYOUTS), ("dotted", "folders")])       # the last is Kaggle's
def test_mnist(box, forms):
    files, arrays = mnist_files()
    for form in forms:
        for name, content in files.items():
            content = gzip.compress(content) if "gz" in form else content
            write(box / "src", {LAYOUTS[form].format(name, name.replace("-idx", ".idx")): content})
    for _ in range(2):                                       # a rerun replaces it
        run("mnist", source=box / "src")
        assert_written(box / "data/mnist", arrays)
    assert sorted(p.name for p in box.iterdir()) == ["data", "src"]


def cifar_files():
    """Return six .bin files of three records; record j of file i has the label (i + j) % 10."""
    rng = np.random.default_rng(1)
    return {name: b"".join(bytes([(i + j) % 10]) + rng.bytes(3072) for j in range(3)) for i, name in enumerate(BINS)}


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo("cifar-10-batches-bin/" + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_cifar10(box):
    files = cifar_files()
    path = write_tar(box / "cifar-10-binary.tar.gz", {"readme.html": b"hello", **dict(reversed(files.items()))})
    for source in (path, box):
        run("cifar10", source=source, out=box / "o")
    x, y = np.load(box / "o/x.npy"), np.load(box / "o/y.npy")
    assert x.shape == (15, 3, 32, 32) and y.tolist() == [(i + j) % 10 for i in range(5) for j in range(3)]
    # record 1 of batch 3, channel 2 (blue), row 30, column 4, by its place in the file
    byte = files["data_batch_3.bin"][3073 + 1 + 2 * 1024 + 30 * 32 + 4]
    assert abs(x[7, 2, 30, 4] - (byte / 127.5 - 1)) < 1e-6 and np.load(box / "o/y_heldout.npy").tolist() == [5, 6, 7]


def test_folder(box):
    """Flat, or of class folders; every tenth held out; a photograph is turned as its camera says."""
    turn = Image.Exif()
    turn[0x0112] = 6
    for i in range(20):
        picture = np.full((40, 60, 3), i * 10, np.uint8)
        picture[:20] = 255
        for path in (box / f"flat/{i:02d}.png", box / f"classes/{'ab'[i % 2]}/{i:02d}.bmp"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, **dict(exif=turn) if path.suffix == ".png" else {})
    run("folder", source=box / "flat", size=8)
    x, held = np.load(box / "data/flat/x.npy"), np.load(box / "data/flat/x_heldout.npy")
    assert x.shape == (18, 3, 8, 8) and held.shape == (2, 3, 8, 8)
    assert np.allclose(held[:, 0, 4, 0], [50 / 127.5 - 1, 150 / 127.5 - 1]) and (held[:, :, :, 7] > 0.9).all()
    run("folder", source=box / "classes", size=16, out=box / "o")
    loaded = data.load_data(str(box / "o"))
    assert loaded["meta"]["classes"] == ["a", "b"] and loaded["y"].tolist() == [0] * 9 + [1] * 9
    kept = [i for i in [*range(0, 20, 2), *range(1, 20, 2)] if i not in (10, 11)]
    assert np.allclose(loaded["x"][:, 0, 12, 0] * 127.5 + 127.5, np.multiply(kept, 10), atol=1e-3)


def test_the_download(box, monkeypatch):
    files, arrays = mnist_files()
    sums = {}
    write(box / "web", {f"{name}.gz": gzip.compress(content) for name, content in files.items()})
    for path in (box / "web").iterdir():
        sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(prepare.DOWNLOADS, "mnist", ((box / "web").as_uri() + "/", sums))
    run("mnist")
    assert_written(box / "data/mnist", arrays)
    shutil.rmtree(box / "data")
    sums[f"{X}.gz"] = "0" * 64
    with pytest.raises(ValueError, match="invalid hash .* pass --source"):
        run("mnist")


def test_the_command(tmp_path):
    source = write(tmp_path / "src", {X: b""})
    command = [sys.executable, prepare.__file__, "mnist", "--source", source, "--out", tmp_path / "o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {source / Y}: missing")
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# ImageNet

class Vae(torch.nn.Conv2d):
    """Stand for a VAE: one convolution, which no mirror image commutes with."""
    config = SimpleNamespace(scaling_factor=0.18215)

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=self(x)))


class Dino(torch.nn.Conv2d):
    """Stand for DINOv2: one convolution. The first token is the class token."""

    def forward(self, x):
        tokens = super().forward(x).flatten(2).mT
        return SimpleNamespace(last_hidden_state=torch.cat([tokens[:, :1] * 0 + 9, tokens], 1))


torch.manual_seed(0)
VAE, DINO = Vae(3, 4, 8, 8), Dino(3, 5, 14, 14)


def encode(source, out, **options):
    run("imagenet", source=source, out=out, batch=2, workers=0, **options)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def tensor(path):
    """Return an image, cropped, as (1, 3, 256, 256) in 0 .. 255."""
    return torch.from_numpy(imagenet.center_crop(read_rgb(path), 256)).permute(2, 0, 1)[None].float()


def latent(x):
    return VAE(x / 127.5 - 1)[0].detach().numpy() * 0.18215


@pytest.mark.parametrize("width, height", [(500, 375), (1100, 1040), (1300, 514), (256, 256), (7, 5), (511, 700)])
def test_the_crop_is_adms(width, height):
    """torch's antialiased bicubic has Pillow's kernel; Pillow rounds to whole numbers after each axis."""
    image = picture(width, height)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()

    def resize(x, h, w, **how):
        for size in ((x.shape[2], w), (h, w)):
            x = F.interpolate(x, size, **how).add(0.5).floor().clamp(0, 255)
        return x
    while min(x.shape[2:]) >= 512:
        x = resize(x, x.shape[2] // 2, x.shape[3] // 2, mode="area")
    h, w = (round(side * 256 / min(x.shape[2:])) for side in x.shape[2:])
    x = resize(x, h, w, mode="bicubic", antialias=True)[0, :, (h - 256) // 2:, (w - 256) // 2:][:, :256, :256]
    off = (torch.from_numpy(imagenet.center_crop(image, 256)) - x.permute(1, 2, 0)).abs()
    assert off.shape == (256, 256, 3) and off.max() <= 1 and off.mean() < 0.001


def test_rows(images, tmp_path):
    shutil.copytree(images / "n02", tmp_path / "val/n02")                # not all classes need be there
    encode(images, tmp_path / "o", heldout=tmp_path / "val", repa=True)
    before = contents(tmp_path / "o"), (tmp_path / "o/x.npy").stat().st_mtime_ns
    found = data.load_data(str(tmp_path / "o"))
    assert found["x"].shape == (10, 4, 32, 32) and found["x"].dtype == found["features"].dtype == np.float16
    assert found["y"].tolist() == [0] * 6 + [1] * 4 and found["y_heldout"].tolist() == [1, 1]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for k, name in enumerate(FILES):
        plain, flipped = tensor(images / name), tensor(images / name).flip(-1)
        for row, x in ((2 * k, plain), (2 * k + 1, flipped)):
            assert np.abs(found["x"][row] - latent(x)).max() < 1e-3
            tokens = DINO((F.interpolate(x / 255, 224, mode="bicubic") - mean) / std)  # the two steps commute
            assert np.abs(found["features"][row] - tokens.last_hidden_state[0, 1:].detach().numpy()).max() < 0.005
        # flipping the latent would not do
        assert np.abs(latent(flipped) - latent(plain)[:, :, ::-1]).max() > 0.005
    assert np.array_equal(found["x_heldout"], found["x"][6::2])
    meta = found["meta"]
    assert meta["classes"] == ["n01", "n02"] and meta["shape"] == [4, 32, 32] and "0.18215" in meta["scaling"]
    assert sorted(meta["sha256"]) == ["x.npy", "x_heldout.npy", "y.npy", "y_heldout.npy"]
    encode(images, tmp_path / "o", heldout=tmp_path / "val", repa=True)     # it is there already
    assert before == (contents(tmp_path / "o"), (tmp_path / "o/x.npy").stat().st_mtime_ns)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "train", "val"]


def test_bad_images_are_listed(images, tmp_path, capsys):
    encode(images, tmp_path / "good")
    (images / "n01/aa.JPEG").write_bytes((images / "n01/b.JPEG").read_bytes()[:9000])
    (images / "n02/text.JPEG").write_text("404 not found")
    with pytest.raises(ValueError, match="2 images cannot be read .*start again"):
        encode(images, tmp_path / "o")
    out = capsys.readouterr().out
    assert f"{images}/n01/aa.JPEG cannot be read as an image: image file is truncated" in out and "text.JPEG" in out
    assert not (tmp_path / "o").exists()
    (images / "n01/aa.JPEG").unlink()
    (images / "n02/text.JPEG").unlink()
    encode(images, tmp_path / "o")
    for name in ("x.npy", "y.npy"):
        assert contents(tmp_path / "o")[name] == contents(tmp_path / "good")[name]


def test_it_goes_on_and_encodes_only_what_is_missing(images, tmp_path, monkeypatch):
    encode(images, tmp_path / "whole")
    encoded, real = [], imagenet.encode

    def counted(vae, batch):
        encoded.append(len(batch))
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return real(vae, batch)
    monkeypatch.setattr(imagenet, "encode", counted)
    with pytest.raises(KeyboardInterrupt):                   # in the second of two shards of 3 and 2 images
        encode(images, tmp_path / "o")
    IMAGES[FILES[1]].rotate(180).save(images / FILES[3])     # a change of this shard makes nothing of the other anew
    encode(images, tmp_path / "o")
    assert encoded == [4, 2, 4, 4]
    x, before = np.load(tmp_path / "o/x.npy"), np.load(tmp_path / "whole/x.npy")
    assert np.array_equal(x[:6], before[:6]) and np.array_equal(x[8:], before[8:]) and not np.allclose(x[6], before[6])


def test_processes_make_the_file_of_one(images, tmp_path, monkeypatch):
    """Three processes, one after the other: each encodes its share, and the first puts the shards together."""
    encode(images, tmp_path / "one", repa=True)
    encoded = []
    encode_shard = imagenet.encode_shard
    monkeypatch.setattr(imagenet, "encode_shard", lambda *job: encoded.append(rank) or encode_shard(*job))
    for rank in (2, 1, 0):
        monkeypatch.setattr(imagenet, "setup_processes", lambda device, rank=rank: (rank, 3, device))
        encode(images, tmp_path / "o", repa=True)
    assert encoded == [2, 1, 0] and contents(tmp_path / "o") == contents(tmp_path / "one")
