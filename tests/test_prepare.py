"""data/prepare.py writes what is in the files; a bad input ends in one line and changes nothing. No network."""
import functools
import gzip
import hashlib
import http.server
import io
import json
import struct
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import prepare  # noqa: E402

from plumbing import data  # noqa: E402

BINS = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
X, Y, XT, YT = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    """A temporary folder that holds data/. Files of CIFAR-10 have 3 records. Downloads find nothing."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    monkeypatch.setattr(data, "DATA", tmp_path / "data")
    monkeypatch.setattr(prepare, "CIFAR_BYTES", 3 * 3073)
    monkeypatch.setattr(prepare, "DOWNLOADS", {"mnist": ("http://127.0.0.1:9/", {}), "cifar10": ("", {})})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def run(name, **options):
    prepare.main(prepare.Config(name, **options))


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


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


def edit(name, change):
    return lambda src: (src / name).write_bytes(change((src / name).read_bytes()))


def header(*numbers):
    return lambda b: struct.pack(f">{len(numbers)}I", *numbers) + b[4 * len(numbers):]


BAD = [  # a data set, what to do to a good folder, what the line must say
    ("mnist", lambda src: (src / YT).unlink(), f"{YT}: missing"),
    ("mnist", edit(X, header(2049)), rf"{X}: header \[2049, 7, 28, 28\].*\[2051, 'N', 28"),
    ("mnist", edit(XT, header(2051, 4, 32, 32)), rf"{XT}: header \[2051, 4, 32, 32\]"),
    ("mnist", edit(X, lambda b: b[:-1]), f"{X}: .* 5487 bytes.* 5488"),
    ("mnist", edit(X, lambda b: b""), f"{X}: header"),
    ("mnist", edit(Y, lambda b: header(2049, 6)(b)[:-1]), "y of .* must be 7 integer labels"),
    ("mnist", edit(Y, lambda b: b[:-1] + b"\x0a"), "y of .* labels in 0 .. 9, not . .. 10"),
    ("mnist", lambda src: (src / X).rename(src / f"{X}.gz"), f"{X}.gz: cannot be read whole"),
    ("cifar10", edit("c.tar.gz", lambda b: b[:len(b) // 2]), "c.tar.gz: cannot be read whole"),
    ("cifar10", edit("c.tar.gz", lambda b: b[:-8] + bytes(4) + b[-4:]), "c.tar.gz: cannot be read whole .*CRC"),
    ("cifar10", edit("c.tar.gz", lambda b: gzip.compress(b"hello " * 1000)), "no tar file is in it"),
    ("cifar10", lambda src: write_tar(src / "c.tar.gz", {}), r"data_batch_5.bin of \[0, 0, 0, 0, 0\] bytes"),
    ("cifar10", lambda src: (src / "c.tar.gz").unlink(), "--source .*c.tar.gz: there is no such"),
    ("folder", lambda src: None, "src: no images in this folder"),
    ("folder", lambda src: write(src, {"a.png": b"junk"}), "a.png cannot be read as an image"),
    ("folder", lambda src: Image.new("L", (9, 9)).save(src / "a.png"), "1 images, expected at least 6")]


@pytest.mark.parametrize("name, change, message", BAD)
def test_bad_input(box, name, change, message):
    src = write(box / "src", mnist_files()[0] if name == "mnist" else {})
    src.mkdir(exist_ok=True)
    write_tar(src / "c.tar.gz", cifar_files()) if name == "cifar10" else None
    change(src)
    older = write(box / "t/out", {"x.npy": b"older"})
    with pytest.raises((ValueError, OSError), match=message):
        run(name, source=src / "c.tar.gz" if name == "cifar10" else src, out=older)
    assert [p.name for p in (box / "t").rglob("*") if p.is_file()] == ["x.npy"]


def test_a_target_that_is_no_data_set_is_never_replaced(box):
    src = write(box / "data/mnist", mnist_files()[0])
    for name, options, message in (
            ("mnist", dict(source=src), "holds other files than a data set"),
            ("mnist", dict(source=src, out=src / X), "holds other files than a data set"),
            ("folder", dict(source=write(box / "digits", {"a.png": b""})), "the name of another data set: pass --out"),
            ("folder", {}, "folder: expected --source DIR")):
        with pytest.raises(ValueError, match=message):
            run(name, **options)


def test_download(box, monkeypatch):
    """What comes whole is kept; what is cut short or changed is refused, and nothing of it stays."""
    files, arrays = mnist_files()
    packed = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    served = write(box / "served", packed | {f"{YT}.gz": b"log in first"})
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), dict(log_message=lambda *args: None))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=served))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in packed.items()}
    monkeypatch.setitem(prepare.DOWNLOADS, "mnist", (f"http://127.0.0.1:{server.server_port}/", sums))
    with pytest.raises(ValueError, match=f"{YT}.gz: not of sha256 .* pass --source"):
        run("mnist")
    assert sorted(p.name for p in (box / "data/.download/mnist").iterdir()) == sorted({*packed} - {f"{YT}.gz"})
    write(served, packed)
    run("mnist")
    server.shutdown()
    server.server_close()
    run("mnist")                                             # from what was kept
    assert_written(box / "data/mnist", arrays)


def test_the_command(tmp_path):
    command = [sys.executable, prepare.__file__, "mnist", "--source", write(tmp_path / "src", mnist_files()[0])]
    for error in ("", f"error: {tmp_path / 'src' / YT}: missing, expected it here or in a folder below, .gz or not\n"):
        done = subprocess.run([*command, "--out", "out"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == bool(error) and done.stderr == error and (tmp_path / "out/x.npy").exists()
        (tmp_path / "src" / YT).unlink(missing_ok=True)
