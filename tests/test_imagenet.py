"""data/imagenet.py: the right latents in the right rows, after a kill, and on any number of processes."""
import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))
import imagenet  # noqa: E402
import prepare  # noqa: E402

from plumbing.data import load_data  # noqa: E402
from plumbing.images import center_crop, read_rgb  # noqa: E402


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


def stand_in(monkeypatch, shard=3):
    monkeypatch.setattr(imagenet, "load_vae", lambda name: copy.deepcopy(VAE))
    monkeypatch.setattr(imagenet, "load_dino", lambda name: copy.deepcopy(DINO))
    for name in ("SHARD", "SHARD_WITH_FEATURES"): monkeypatch.setattr(imagenet, name, shard)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    stand_in(monkeypatch)


def run(source, out, **options):
    prepare.main(prepare.Config("imagenet", source=source, out=out, batch=2, workers=0, **options))


def tree(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def tensor(path):
    """Return an image, cropped, as (1, 3, 256, 256) in 0 .. 255."""
    return torch.from_numpy(center_crop(read_rgb(path), 256)).permute(2, 0, 1)[None].float()


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
    off = (torch.from_numpy(center_crop(image, 256)) - x.permute(1, 2, 0)).abs()
    assert off.shape == (256, 256, 3) and off.max() <= 1 and off.mean() < 0.001


def test_modes(tmp_path):
    image = picture(60, 40)
    alpha, want = image.copy(), np.asarray(image)
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    for name, other, off in (("alpha.png", alpha, 0), ("palette.png", image.quantize(64), 64),
                             ("gray.png", image.convert("L"), 140), ("cmyk.tif", image.convert("CMYK"), 0)):
        other.save(tmp_path / name)
        found = np.asarray(read_rgb(tmp_path / name)).astype(int)
        assert found.shape == (40, 60, 3) and np.abs(found - want).max() <= off and found.std((0, 1)).min() > 20, name


def test_rows(images, tmp_path):
    shutil.copytree(images / "n02", tmp_path / "val/n02")                # not all classes need be there
    run(images, tmp_path / "o", heldout=tmp_path / "val", repa=True)
    data = load_data(str(tmp_path / "o"))
    assert data["x"].shape == (10, 4, 32, 32) and data["x"].dtype == data["features"].dtype == np.float16
    assert data["y"].tolist() == [0] * 6 + [1] * 4 and data["y_heldout"].tolist() == [1, 1]
    assert json.loads((tmp_path / "o/files.json").read_text()) == {"x": FILES, "x_heldout": FILES[3:]}
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for k, name in enumerate(FILES):
        plain, flipped = tensor(images / name), tensor(images / name).flip(-1)
        for row, x in ((2 * k, plain), (2 * k + 1, flipped)):
            assert np.abs(data["x"][row] - latent(x)).max() < 1e-3
            tokens = DINO((F.interpolate(x / 255, 224, mode="bicubic") - mean) / std)  # the two steps commute
            assert np.abs(data["features"][row] - tokens.last_hidden_state[0, 1:].detach().numpy()).max() < 0.005
        # flipping the latent would not do
        assert np.abs(latent(flipped) - latent(plain)[:, :, ::-1]).max() > 0.005
    assert np.array_equal(data["x_heldout"], data["x"][6::2])
    meta = data["meta"]
    assert meta["classes"] == ["n01", "n02"] and meta["shape"] == [4, 32, 32] and "0.18215" in meta["scaling"]
    assert sorted(meta["sha256"]) == ["x.npy", "x_heldout.npy", "y.npy", "y_heldout.npy"] and meta["skipped"] == []
    before = (tmp_path / "o/x.npy").stat().st_mtime_ns
    run(images, tmp_path / "o", heldout=tmp_path / "val", repa=True)
    assert (tmp_path / "o/x.npy").stat().st_mtime_ns == before           # it is there already
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "train", "val"]


def test_bad_images_are_listed_and_may_be_skipped(images, tmp_path, capsys):
    run(images, tmp_path / "good")
    (images / "n01/aa.JPEG").write_bytes((images / "n01/b.JPEG").read_bytes()[:9000])
    (images / "n02/text.JPEG").write_text("404 not found")
    with pytest.raises(ValueError, match="2 images cannot be read .*--skip-bad"):
        run(images, tmp_path / "o")
    out = capsys.readouterr().out
    assert f"{images}/n01/aa.JPEG cannot be read as an image: image file is truncated" in out and "text.JPEG" in out
    assert not (tmp_path / "o").exists()
    run(images, tmp_path / "o", skip_bad=True)
    for name in ("x.npy", "y.npy", "files.json"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "good" / name).read_bytes()


def test_it_goes_on_and_encodes_only_what_is_missing(images, tmp_path, monkeypatch):
    run(images, tmp_path / "whole")
    encoded, real = [], imagenet.encode

    def encode(vae, batch):
        encoded.append(len(batch))
        if len(encoded) == 3: raise KeyboardInterrupt
        return real(vae, batch)
    monkeypatch.setattr(imagenet, "encode", encode)
    with pytest.raises(KeyboardInterrupt):                   # in the second of two shards of 3 and 2 images
        run(images, tmp_path / "o")
    IMAGES[FILES[1]].rotate(180).save(images / FILES[3])     # a change of this shard makes nothing of the other anew
    run(images, tmp_path / "o")
    assert encoded == [4, 2, 4, 4]
    x, before = np.load(tmp_path / "o/x.npy"), np.load(tmp_path / "whole/x.npy")
    assert np.array_equal(x[:6], before[:6]) and np.array_equal(x[8:], before[8:]) and not np.allclose(x[6], before[6])


def test_bad_folders(images, tmp_path):
    for change, options, message in (
            (lambda: None, dict(heldout=tmp_path), "train: there is no such class in --source"),
            (lambda: (images / "n03").mkdir(), {}, "n03: no images in this folder"),
            (lambda: (images / "n00").mkdir() or (images / "n01").rename(images / "n00/n01"), {}, "one level too high"),
            (lambda: shutil.rmtree(images) or images.mkdir(), {}, "train: holds no class folders")):
        change()
        with pytest.raises(ValueError, match=message):
            run(images, tmp_path / "o", **options)
        assert not (tmp_path / "o").exists()


RANKS = """
import os, sys, pytest, test_imagenet as t
source, out, port = sys.argv[1:]
t.stand_in(pytest.MonkeyPatch(), 2)
for rank in range(3):
    if os.fork() == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        t.run(t.Path(source), t.Path(out), repa=True)
        os._exit(0)
assert [os.wait()[1] for _ in range(3)] == [0, 0, 0]
"""


def test_processes_make_the_file_of_one(images, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | dict(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", RANKS, images, tmp_path / "o", port], env=env, text=True,
                          capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    run(images, tmp_path / "one", repa=True)
    assert tree(tmp_path / "o") == tree(tmp_path / "one")


def test_with_diffusers(images, tmp_path, monkeypatch):
    diffusers, file = pytest.importorskip("diffusers"), tmp_path / "vae/diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file
    monkeypatch.undo()
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    run(images, tmp_path / "o", vae=str(tmp_path / "vae"))
    with torch.no_grad():
        z = vae.encode(tensor(images / FILES[1]).flip(-1) / 127.5 - 1).latent_dist.mode() * 0.18215
    assert np.abs(np.load(tmp_path / "o/x.npy")[3] - z[0].numpy()).max() < 1e-3 * z.abs().max()
    save_file({key: value for key, value in load_file(file).items() if "mid_block" not in key}, file)
    with pytest.raises(ValueError, match="weights of AutoencoderKL are missing or misshapen, such as decoder.mid_bl"):
        run(images, tmp_path / "o", vae=str(tmp_path / "vae"))


def test_with_transformers(tmp_path, monkeypatch):
    """A table of positions that is linear in the row stays so: away from the border, 16 rows sample the 37 evenly."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.undo()
    config = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=518)
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**config))
    ramp = torch.arange(-1, 37.0).repeat_interleave(37)[36:, None].expand(1370, 24)    # -1 of the class token
    dino.embeddings.position_embeddings.data = ramp[None].clone()
    dino.save_pretrained(tmp_path / "dino")
    loaded = imagenet.load_dino(str(tmp_path / "dino"))
    table = loaded.embeddings.position_embeddings[0]
    want = ((torch.arange(16) + 0.5) * 37 / 16 - 0.5).repeat_interleave(16)[:, None].expand(256, 24)
    assert (table[0] == -1).all() and torch.allclose(table[1:][48:-48], want[48:-48], atol=0.02)
    got = imagenet.features(loaded, torch.zeros(1, 256, 256, 3, dtype=torch.uint8))
    assert got.shape == (1, 256, 24) and got.mean(-1).abs().max() < 1e-4               # past the last norm
