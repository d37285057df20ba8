"""plumbing/images.py: pixels, many images in one .npz on any number of processes and after any stop, FID."""
import contextlib
import json
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
    """Sixteen bits of gray are scaled, not clipped; .bmp counts; what is no image is said."""
    ramp = np.tile(np.linspace(0, 65535, 256), (8, 1)).astype(np.uint16)
    for name in ("a.png", "b.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert (np.asarray(images.read_rgb(tmp_path / name)) == np.arange(256)[:, None]).all()
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "c.tiff")
    assert (np.asarray(images.read_rgb(tmp_path / "c.tiff")) == np.arange(256)[:, None]).all()
    Image.fromarray(np.zeros((8, 256, 3), np.uint8)).save(tmp_path / "d.BMP")
    (tmp_path / "notes.txt").write_text("no image")
    assert [len(batch) for batch in images.image_batches(tmp_path, 3)] == [3, 1]
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "e.tif")
    with pytest.raises(ValueError, match="e.tif cannot be read as an image: its pixels are floating point"):
        list(images.image_batches(tmp_path))


def draw(index):
    return (index.view(-1, 1, 1, 1) * 7 + torch.arange(12).view(2, 2, 3)).to(torch.uint8)


def write(path, drawn=None, rank=0, world=1, **made):
    def noted(index):
        if drawn is not None: drawn.append(int(index[0]))
        return draw(index)
    images.write_npz(path, noted, torch.arange(8) % 3, (2, 2, 3), 3, dict(w=1.0) | made, rank, world)


def test_npz(tmp_path):
    write(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as z, z.open("arr_0.npy") as f:          # as ADM's evaluator reads it
        assert np.lib.format.read_magic(f) == (1, 0)
        assert np.lib.format.read_array_header_1_0(f) == ((8, 2, 2, 3), False, np.dtype("u1"))
    saved = np.load(tmp_path / "a.npz")
    assert np.array_equal(saved["arr_0"], draw(torch.arange(8))) and saved["labels"].tolist() == [0, 1, 2] * 2 + [0, 1]
    for rank in (2, 1, 0):                                   # three processes, one after the other
        write(tmp_path / "b.npz", rank=rank, world=3)
    assert (tmp_path / "b.npz").read_bytes() == (tmp_path / "a.npz").read_bytes()
    drawn = []
    write(tmp_path / "a.npz", drawn)
    write(tmp_path / "c.npz", rank=1, world=2)
    write(tmp_path / "c.npz", drawn)
    assert drawn == [0, 6]                                   # what is there is not drawn again
    with pytest.raises(ValueError, match="a.npz holds images of w = 1.0, not 2.0"):
        write(tmp_path / "a.npz", w=2.0)
    (tmp_path / "d.npz.parts").mkdir()
    (tmp_path / "d.npz.parts/made.json").write_text(json.dumps(dict(w=3.0)))
    with pytest.raises(ValueError, match="d.npz.parts holds images of w = 3.0, not 1.0"):
        write(tmp_path / "d.npz")
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="x.npz is not an .npz file"):
        write(tmp_path / "x.npz")


class Kill(BaseException):
    pass


def test_stopped_at_any_moment_it_goes_on(tmp_path, monkeypatch):
    """Stop before call 0, 1, 2 ... of what touches the disk or draws; the next call ends the work."""
    left, moment = [0], 0

    def stopping(f):
        def g(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0: raise Kill
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


def test_moments_batch_by_batch():
    x = np.random.default_rng(0).standard_normal((50, 4)) + 1e6          # sums of squares alone would lose all digits
    mean, cov = images.gaussian(np.split(x, [1, 8, 30]))
    assert np.abs(mean - x.mean(0)).max() < 1e-9 and np.abs(cov - np.cov(x.T)).max() < 1e-8
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        images.gaussian([x[:1]])


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
    g = channel_means(draw(torch.arange(8)).numpy())
    want = images.frechet(g.mean(0), np.cov(g.T), f.mean(0), np.cov(f.T))
    for name in ("folder", "images.npz", "adm.npz"):
        assert want > 1 and abs(images.fid(tmp_path / "a.npz", tmp_path / name) / want - 1) < 1e-6
    assert images.fid(tmp_path / "a.npz", images.statistics(tmp_path / "a.npz")) < 1e-9


@pytest.mark.parametrize("name, arrays, message", [
    ("empty", None, "no images in this folder"), ("gone.npz", None, "gone.npz"),
    ("float.npz", dict(arr_0=np.zeros((2, 4, 4, 3))), "arr_0 is float64"),
    ("none.npz", dict(z=np.zeros(3)), "arr_0 is missing"),
    ("narrow.npz", dict(mu=np.zeros(7), sigma=np.eye(7)), r"mu \(7,\) and sigma \(7, 7\)"),
    ("half.npz", dict(mu=np.zeros(3)), r"sigma \(\)"), ("objects.npz", dict(mu=np.array([{}])), "cannot be read")])
def test_a_bad_reference(name, arrays, message, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "inception", lambda: channel_means)
    (tmp_path / "empty").mkdir()
    if arrays: np.savez(tmp_path / name, **arrays)
    with pytest.raises((ValueError, OSError), match=message):
        images.statistics(tmp_path / name)
    if name == "empty":
        (tmp_path / name / "a.png").write_bytes(b"junk")
        with pytest.raises(ValueError, match="a.png cannot be read as an image"):
            images.statistics(tmp_path / name)
