"""plumbing/images.py: pixels, many images in one .npz on any number of processes and after any stop, FID."""
import contextlib
import os
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing import images


def test_pixels(tmp_path):
    x = torch.tensor([-2, -1, -0.5, 0, 0.5, 1, 2]).view(7, 1, 1, 1)
    assert images.to_uint8(x).flatten().tolist() == [0, 0, 64, 128, 191, 255, 255]
    x = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 2, 3) / 4
    images.save_grid(x, tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 64, 2 * 96, 3) and [p.name for p in tmp_path.iterdir()] == ["grid.png"]
    assert grid[::64, ::96, 0].tolist() == [[128, 159], [191, 223], [255, 0]]


def test_reading(tmp_path):
    """Images of eight bits become RGB. Hidden files do not count."""
    u, v = np.mgrid[:8, :256]
    colours = Image.fromarray(np.stack([40 + 20 * u, v, 255 - v], -1).astype(np.uint8))
    clear = colours.copy()
    clear.putalpha(Image.linear_gradient("L").resize(colours.size))
    for name, image, off in (("a.png", clear, 0), ("b.tif", colours.convert("CMYK"), 0),
                             ("c.png", colours.quantize(64), 64), ("d.BMP", colours, 0)):
        image.save(tmp_path / name)
        found = np.asarray(images.read_rgb(tmp_path / name)).astype(int)
        assert np.abs(found - np.asarray(colours)).max() <= off, name
    for name in ("notes.txt", ".hidden.png", ".hidden/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    assert [path.name for path in images.find_images(tmp_path)] == ["a.png", "b.tif", "c.png", "d.BMP"]


def draw(index):
    """Return images (B, 3, 2, 2) whose pixels are known."""
    return (pixels(index).movedim(-1, 1) - 127.5) / 127.5


def pixels(index):
    return (index.view(-1, 1, 1, 1) * 7 + torch.arange(12).view(2, 2, 3)).to(torch.uint8)


def write(path, rank=0, world=1, **made):
    """Write 8 images in batches of 3, and return the number of the first image of each batch that had to be drawn."""
    drawn = []
    images.write_npz(path, lambda index: drawn.append(int(index[0])) or draw(index), torch.arange(8) % 3, 3,
                     dict(w=1.0) | made, rank, world)
    return drawn


def test_npz(tmp_path):
    assert write(tmp_path / "a.npz") == [0, 3, 6] and write(tmp_path / "a.npz") == []
    with zipfile.ZipFile(tmp_path / "a.npz") as z, z.open("arr_0.npy") as f:          # as ADM's evaluator reads it
        assert np.lib.format.read_magic(f) == (1, 0)
        assert np.lib.format.read_array_header_1_0(f) == ((8, 2, 2, 3), False, np.dtype("u1"))
    saved = np.load(tmp_path / "a.npz")
    assert np.array_equal(saved["arr_0"], pixels(torch.arange(8)))
    assert saved["labels"].tolist() == [0, 1, 2] * 2 + [0, 1]
    # three processes, one after the other
    assert [write(tmp_path / "b.npz", rank, 3) for rank in (2, 1, 0)] == [[6], [3], [0]]
    # another number of processes goes on, and takes no batch of other settings
    assert write(tmp_path / "c.npz", 1, 2) == [3] and write(tmp_path / "c.npz", 2, 3, w=2.0) == [6]
    assert write(tmp_path / "c.npz") == [0, 6]
    for name in ("b.npz", "c.npz"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "a.npz").read_bytes()
    with pytest.raises(ValueError, match="a.npz holds images of other settings"):
        write(tmp_path / "a.npz", w=2.0)


class Kill(BaseException):
    pass


def test_stopped_at_any_moment_it_goes_on(tmp_path, monkeypatch):
    """Stop before call 0, 1, 2 ... of what touches the disk or draws; the next call ends the work."""
    left, moment = [0], 0

    def stopping(f):
        def g(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Kill
            return f(*args, **kwargs)
        return g
    write(tmp_path / "whole.npz")
    while left[0] <= 0:
        left[0] = moment
        with monkeypatch.context() as m:
            for owner, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (sys.modules[__name__], "draw")):
                m.setattr(owner, name, stopping(getattr(owner, name)))
            with contextlib.suppress(Kill):
                write(tmp_path / f"{moment}.npz")
        write(tmp_path / f"{moment}.npz")
        assert (tmp_path / f"{moment}.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
        moment += 1
    assert moment > 12 and len(list(tmp_path.iterdir())) == moment + 1


def test_frechet_in_closed_form():
    """Of commuting covariances U diag(a) U^T, U diag(b) U^T it is |m1 - m2|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(0)
    U, m1, m2 = np.linalg.qr(rng.standard_normal((6, 6)))[0], *rng.standard_normal((2, 6))
    a, b = np.array([0, 0, 0.1, 1, 2, 50]), np.array([0, 3, 0.2, 0, 2, 40])
    want = np.square(m1 - m2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert abs(images.frechet(m1, U * a @ U.T, m2, U * b @ U.T) - want) < 1e-6
    A, B = (x @ x.T for x in rng.standard_normal((2, 6, 9)))
    want = np.trace(A) + np.trace(B) - 2 * np.sqrt(np.linalg.eigvals(A @ B).real).sum()
    assert abs(images.frechet(m1, A, m1, B) - want) < 1e-9
    x = rng.standard_normal((50, 4)) + 1e6                   # sums of squares alone would lose all digits
    mean, cov = images.gaussian(np.split(x, [1, 8, 30]))
    assert np.abs(mean - x.mean(0)).max() < 1e-9 and np.abs(cov - np.cov(x.T)).max() < 1e-8


def channel_means(batch):
    """Stand for Inception: uint8 (B, H, W, 3) -> (B, 3)."""
    return batch.astype(np.float64).mean((1, 2))


def test_fid(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "inception", lambda: channel_means)
    pictures = np.random.default_rng(0).integers(0, 256, (70, 5, 5, 3), dtype=np.uint8)       # more than a batch of 64
    (tmp_path / "folder/class").mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"folder/class/{i:03d}.png")
    np.savez_compressed(tmp_path / "images.npz", arr_0=pictures)
    f = channel_means(pictures)
    np.savez(tmp_path / "adm.npz", mu=f.mean(0), sigma=np.cov(f.T), mu_s=0, sigma_s=0, arr_0=pictures[:2])
    write(tmp_path / "a.npz")
    g = channel_means(pixels(torch.arange(8)).numpy())
    want = images.frechet(g.mean(0), np.cov(g.T), f.mean(0), np.cov(f.T))
    ours = images.statistics(tmp_path / "a.npz")
    for name in ("folder", "images.npz", "adm.npz"):
        assert want > 1 and abs(images.frechet(*ours, *images.statistics(tmp_path / name)) / want - 1) < 1e-6
    assert images.frechet(*ours, *ours) < 1e-9
    whole = (tmp_path / "adm.npz").read_bytes()
    for damaged in (whole[:500], b"404 not found"):
        (tmp_path / "adm.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="adm.npz cannot be read as an .npz file"):
            images.statistics(tmp_path / "adm.npz")
