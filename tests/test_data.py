"""data/prepare.py: what it writes is right, and a bad input ends in one line and changes nothing. No network."""
import errno
import gzip
import hashlib
import http.server
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = sys.modules["prepare"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

STEMS = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
BINS = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def mnist_bytes(n=7, heldout=4):
    """The four IDX files as {stem: bytes}, and the arrays in them."""
    rng, files, arrays = np.random.default_rng(0), {}, []
    for split, count in (("train", n), ("t10k", heldout)):
        x, y = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        x[0, 0, :2] = 0, 255  # both ends of the scale
        files[f"{split}-images-idx3-ubyte"] = struct.pack(">4I", 2051, count, 28, 28) + x.tobytes()
        files[f"{split}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, count) + y.tobytes()
        arrays += [x, y]
    return files, arrays


def write_mnist(folder, gz=True):
    folder.mkdir()
    files, arrays = mnist_bytes()
    for stem, data in files.items():
        (folder / (stem + ".gz" * gz)).write_bytes(gzip.compress(data) if gz else data)
    return arrays


def cifar_bytes():
    """Six .bin files of three records; record j of file i has the label (i + j) % 10."""
    rng = np.random.default_rng(1)
    return {name: b"".join(bytes([(i + j) % 10]) + rng.bytes(3072) for j in range(3)) for i, name in enumerate(BINS)}


def write_tar(path, files, folder="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def load(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "meta.json", "x.npy", "x_heldout.npy", "y.npy", "y_heldout.npy"]
    arrays = [np.load(folder / f"{s}.npy", allow_pickle=False) for s in ("x", "y", "x_heldout", "y_heldout")]
    return *arrays, json.loads((folder / "meta.json").read_text())


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def sha(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def box(tmp_path, monkeypatch):
    """A temporary folder that stands for data/; CIFAR-10 files hold 3 records."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    monkeypatch.setattr(prepare, "CIFAR_RECORDS", 3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "MIRRORS", {"mnist": [], "cifar10": []})  # a test that forgets --source goes nowhere
    return tmp_path


def fails(capsys, argv, *expected):
    """Run the command in this process: status 1, and a single `error:` line with all of `expected` in it."""
    capsys.readouterr()
    assert prepare.main([str(a) for a in argv]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for part in expected: assert str(part) in err, (part, err)


# What is written


@pytest.mark.parametrize("form", ["gz", "plain", "dotted", "dotted gz"])
def test_mnist_from_source(box, form, capsys):
    want = write_mnist(box / "src", gz="gz" in form)
    if "dotted" in form:
        for p in list((box / "src").iterdir()): p.rename(p.with_name(p.name.replace("-idx", ".idx")))
    assert prepare.main(["mnist", "--source", str(box / "src")]) == 0
    out, err = capsys.readouterr()
    assert str(box / "data/mnist") in out and err == ""
    *got, meta = load(box / "data/mnist")
    for x, u8 in zip(got[::2], want[::2], strict=True):
        assert x.dtype == np.float32 and x.shape == (len(u8), 1, 28, 28) and (x.min(), x.max()) == (-1, 1)
        assert np.abs(x[:, 0] - (u8.astype(np.float64) / 127.5 - 1)).max() < 1e-7
    for y, u8 in zip(got[1::2], want[1::2], strict=True):
        assert y.dtype == np.int64 and y.tolist() == u8.tolist()
    assert (meta["name"], meta["num_classes"], meta["shape"]) == ("mnist", 10, [1, 28, 28])
    assert meta["source"] == str(box / "src") and "127.5" in meta["scaling"]
    assert meta["sha256"] == {p.name: sha(p.read_bytes()) for p in (box / "src").iterdir()} and len(meta["sha256"]) == 4


@pytest.mark.parametrize("form", ["tar", "folder of tar", "bins", "folder of bins"])
def test_cifar10_from_source(box, form):
    files, src = cifar_bytes(), box / "src"
    src.mkdir()
    if "tar" in form:
        source = src / "cifar-10-binary.tar.gz"
        write_tar(source, {"readme.html": b"hello", **dict(reversed(files.items()))})  # in any order
        hashes = {source.name: sha(source.read_bytes())}
        if form == "folder of tar": source = src
    else:
        source = src / "cifar-10-batches-bin" if form == "folder of bins" else src
        source.mkdir(exist_ok=True)
        for name, data in files.items(): (source / name).write_bytes(data)
        source, hashes = src, {name: sha(data) for name, data in files.items()}
    assert prepare.main(["cifar10", "--source", str(source), "--out", str(box / "o")]) == 0
    x, y, x_heldout, y_heldout, meta = load(box / "o")
    assert x.shape == (15, 3, 32, 32) and x_heldout.shape == (3, 3, 32, 32) and x.dtype == x_heldout.dtype == np.float32
    assert y.tolist() == [(i + j) % 10 for i in range(5) for j in range(3)] and y_heldout.tolist() == [5, 6, 7]
    # Record 1 of batch 3, channel 2 (blue), row 30, column 4, by its offset in the file
    byte = files["data_batch_3.bin"][3073 + 1 + 2 * 1024 + 30 * 32 + 4]
    assert abs(x[7, 2, 30, 4] - (byte / 127.5 - 1)) < 1e-7
    assert abs(x_heldout[2, 0, 1, 0] - (files["test_batch.bin"][2 * 3073 + 1 + 32] / 127.5 - 1)) < 1e-7
    assert meta["sha256"] == hashes and meta["num_classes"] == 10 and meta["shape"] == [3, 32, 32]


def test_embedded(box, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(prepare, "load_data", asked.append)
    assert prepare.main(["mnist5k"]) == 0 and asked == ["mnist5k"]
    assert str(box / "data/mnist5k") in capsys.readouterr().out
    fails(capsys, ["digits", "--out", box / "o"], "digits", "--out")
    assert asked == ["mnist5k"]


# Bad inputs: (what to do to a good folder, what the line must say)


def put(name, data, gz=True):
    def change(src): (src / name).write_bytes(gzip.compress(data) if gz else data)
    return change


def edit(name, change):
    """Replace the decompressed bytes of src/name by change(bytes)."""
    return lambda src: (src / name).write_bytes(gzip.compress(change(gzip.decompress((src / name).read_bytes()))))


def edit_gz(name, change):
    return lambda src: (src / name).write_bytes(change((src / name).read_bytes()))


X, Y, XT, YT = (s + ".gz" for s in STEMS)
BAD_MNIST = {
    "missing file": (lambda src: (src / YT).unlink(), [STEMS[3], "missing", "t10k-labels.idx1-ubyte.gz"]),
    "labels where images belong": (edit(X, lambda b: struct.pack(">I", 2049) + b[4:]), [X, "2049", "2051"]),
    "little endian magic": (edit(Y, lambda b: struct.pack("<I", 2049) + b[4:]), [Y, "17301504", "2049"]),
    "other image size": (edit(XT, lambda b: struct.pack(">4I", 2051, 4, 32, 32) + b[16:]), [XT, "32, 32", "28, 28"]),
    "no images": (edit(XT, lambda b: struct.pack(">4I", 2051, 0, 28, 28)), [XT, "(0, 28, 28)"]),
    "truncated header": (put(YT, b"\0\0\x08\x01\0"), [YT, "truncated", "5 bytes", "header of 8"]),
    "empty file": (put(X, b""), [X, "truncated", "0 bytes", "16"]),
    "truncated images": (edit(X, lambda b: b[:-1]), [X, "truncated", "5487 ", "5488"]),
    "trailing byte": (edit(X, lambda b: b + b"\0"), [X, "trailing", "5488"]),
    "trailing label": (edit(YT, lambda b: b + b"\1"), [YT, "trailing", "4"]),
    "count past the end": (edit(X, lambda b: struct.pack(">4I", 2051, 2**32 - 1, 28, 28) + b[16:]), [X, "truncated"]),
    "fewer labels than images": (put(Y, struct.pack(">2I", 2049, 6) + bytes(6)), [Y, "6 labels", "expected 7"]),
    "label 10": (edit(Y, lambda b: b[:-2] + b"\x0a\0"), [Y, "label 10", "index 5", "0..9"]),
    "gz cut short": (edit_gz(X, lambda b: b[:-100]), [X, "gzip"]),
    "gz without its CRC": (edit_gz(Y, lambda b: b[:-8]), [Y, "gzip"]),
    "gz with a wrong CRC": (edit_gz(X, lambda b: b[:-8] + bytes(4) + b[-4:]), [X, "gzip", "CRC"]),
    "gz with a damaged body": (edit_gz(X, lambda b: b[:10] + b"\xff" * 20 + b[30:]), [X, "gzip"]),
    "not gz": (put(X, b"<html>404</html>", gz=False), [X, "gzip"]),
    "a folder in a file's place": (lambda src: ((src / Y).unlink(), (src / Y).mkdir()), [Y, "directory"]),
    "no such folder": (lambda src: src.rename(src.with_name("gone")), ["src", "not a folder"]),
}


def assert_untouched(box, capsys, argv, expected):
    """The command fails with the target absent and with an older data set there, and both stay so."""
    fails(capsys, [*argv, "--out", box / "t" / "out"], *expected)
    assert not (box / "t").exists() or not any((box / "t").iterdir())
    prepare.save_dataset(box / "t" / "out", {"x": np.arange(3)}, {"name": "older"})
    before = tree(box / "t")
    fails(capsys, [*argv, "--out", box / "t" / "out"], *expected)
    assert tree(box / "t") == before and len(before) == 2


@pytest.mark.parametrize("case", BAD_MNIST)
def test_bad_mnist(box, capsys, case):
    change, expected = BAD_MNIST[case]
    write_mnist(box / "src")
    change(box / "src")
    assert_untouched(box, capsys, ["mnist", "--source", box / "src"], expected)


def cifar_case(box, case):
    """-> (source, what the line must say)"""
    files, path = cifar_bytes(), box / "c.tar.gz"
    if case.startswith("bins"):
        source = box / "src"
        source.mkdir()
        if case == "bins truncated": files["data_batch_4.bin"] = files["data_batch_4.bin"][:-3073]
        if case == "bins missing one": del files["data_batch_2.bin"]
        if case == "bins label": files["test_batch.bin"] = b"\xff" + files["test_batch.bin"][1:]
        for name, data in files.items(): (source / name).write_bytes(data)
        return source, {"bins truncated": ["data_batch_4.bin", "6146 ", "9219"],
                        "bins missing one": ["data_batch_2.bin"],
                        "bins label": ["test_batch.bin", "255", "0..9"]}[case]
    if case == "member too long": files["data_batch_5.bin"] += b"\0"
    if case == "member missing": del files["test_batch.bin"]
    write_tar(path, files, "../cifar-10-batches-bin/" if case == "member elsewhere" else "cifar-10-batches-bin/")
    data = path.read_bytes()
    if case == "cut": path.write_bytes(data[: len(data) // 2])
    if case == "wrong CRC": path.write_bytes(data[:-8] + bytes(4) + data[-4:])
    if case == "not gz": path.write_bytes(b"PK\x03\x04" + bytes(600))
    if case == "gz of something else": path.write_bytes(gzip.compress(b"hello " * 1000))
    if case == "missing": path.unlink()
    return path, ["c.tar.gz", *{
        "member too long": ["data_batch_5.bin", "9220", "9219"], "member missing": ["test_batch.bin", "binary version"],
        "member elsewhere": ["data_batch_1.bin", "binary version"], "cut": ["not a whole"], "wrong CRC": ["CRC"],
        "not gz": ["gzip"], "gz of something else": ["not a whole"], "missing": ["missing", "binary.tar.gz"]}[case]]


BAD_CIFAR10 = ["bins truncated", "bins missing one", "bins label", "member too long", "member missing",
               "member elsewhere", "cut", "wrong CRC", "not gz", "gz of something else", "missing"]


@pytest.mark.parametrize("case", BAD_CIFAR10)
def test_bad_cifar10(box, capsys, case):
    source, expected = cifar_case(box, case)
    assert_untouched(box, capsys, ["cifar10", "--source", source], expected)


def test_unknown_names(box, capsys):
    assert_untouched(box, capsys, ["imagnet"], ["imagnet", "mnist, cifar10, mnist5k, digits"])
    assert prepare.main(["mnist", "--sorce", "x"]) == 1 and prepare.main([]) == 1
    capsys.readouterr()
    with pytest.raises(prepare.DataError, match="imagnet"): prepare.main(["imagnet", "--debug"])
    assert prepare.main(["--help"]) == 0 and "target folder" in capsys.readouterr().out


@pytest.mark.parametrize("gz", [True, False])
def test_a_lying_header_costs_no_memory(box, gz):
    write_mnist(box / "src", gz)
    path = box / "src" / (STEMS[0] + ".gz" * gz)
    data = struct.pack(">4I", 2051, 2**20, 28, 28) + bytes(5000)  # claims 822 MB
    path.write_bytes(gzip.compress(data) if gz else data)
    tracemalloc.start()
    try:
        with pytest.raises(prepare.DataError, match="truncated"): prepare.read_idx(path, 2051, (28, 28))
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_target_that_is_no_data_set_is_never_replaced(box, capsys):
    write_mnist(box / "data")
    (box / "data").rename(box / "raw")
    (box / "data").mkdir()
    (box / "raw").rename(box / "data/mnist")  # the downloaded files lie where the result would go
    before = tree(box)
    fails(capsys, ["mnist", "--source", box / "data/mnist"], box / "data/mnist", "--out")
    (box / "file").write_text("precious")
    fails(capsys, ["mnist", "--source", box / "data/mnist", "--out", box / "file"], box / "file", "is a file")
    fails(capsys, ["mnist", "--source", box / "data/mnist", "--out", box / "file/under"], box / "file/under")
    assert tree(box) == {**before, "file": b"precious"}


def test_a_full_disk(box, monkeypatch, capsys):
    def save(path, *args, **kwargs):
        if "heldout" in str(path): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *args, **kwargs)

    write_mnist(box / "src")
    prepare.save_dataset(box / "out", {"x": np.arange(3)}, {})
    before, real = tree(box), np.save
    monkeypatch.setattr(np, "save", save)
    fails(capsys, ["mnist", "--source", box / "src", "--out", box / "out"], box / "out", "No space left")
    assert tree(box) == before


def test_a_rerun_replaces_the_data_set(box):
    write_mnist(box / "src")
    prepare.save_dataset(box / "out", {"x": np.arange(3)}, {})
    for _ in range(2): assert prepare.main(["mnist", "--source", str(box / "src"), "--out", str(box / "out")]) == 0
    assert load(box / "out")[0].shape == (7, 1, 28, 28)


# Downloads, from a server in a thread


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files, ranges=True, cut=None):
        self.files, self.ranges, self.cut, self.log = files, ranges, cut, []  # log: (file, Range header, bytes sent)
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args): pass

    def do_GET(self):
        server, name, wanted = self.server, self.path[1:], self.headers.get("Range")
        data = server.files.get(name)
        if data is None:
            server.log.append((name, wanted, 0))
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(data):
            server.log.append((name, wanted, 0))
            return self.send_error(416)
        body = data[start:]
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: server.cut]  # the line drops here
        server.log.append((name, wanted, len(body)))
        self.wfile.write(body)


@pytest.fixture
def net(box, monkeypatch):
    """start(files, ...) -> a running server; the four MNIST files and their checksums are those of mnist_bytes()."""
    servers, packed = [], {f"{stem}.gz": gzip.compress(data) for stem, data in mnist_bytes()[0].items()}
    monkeypatch.setattr(prepare, "SHA256", {"mnist": {name: sha(data) for name, data in packed.items()}})

    def start(files=packed, **options):
        servers.append(Server(files, **options))
        prepare.MIRRORS["mnist"].append(servers[-1].url)
        return servers[-1]

    start.packed, start.folder = packed, box / "data/.download/mnist"
    yield start
    for s in servers: s.shutdown(), s.server_close()


def test_download(box, net, capsys):
    server = net()
    assert prepare.main(["mnist"]) == 0
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal
    assert [(name, wanted) for name, wanted, _ in server.log] == [(name, None) for name in net.packed]
    assert tree(net.folder) == net.packed  # and no .part left
    x, y, *_, meta = load(box / "data/mnist")
    assert x.shape == (7, 1, 28, 28) and y.tolist() == mnist_bytes()[1][1].tolist()
    assert meta["source"] == server.url and meta["sha256"] == {name: sha(data) for name, data in net.packed.items()}
    server.log.clear()
    assert prepare.main(["mnist"]) == 0 and server.log == []  # kept
    (net.folder / X).write_bytes(b"damaged since")
    assert prepare.main(["mnist"]) == 0 and [name for name, *_ in server.log] == [X] and tree(net.folder) == net.packed


def leave_part(net, data):
    net.folder.mkdir(parents=True)
    (net.folder / f"{X}.part").write_bytes(data)


def test_resume_asks_only_for_the_rest(net):
    server = net()
    leave_part(net, net.packed[X][:1000])
    assert prepare.main(["mnist"]) == 0
    assert server.log[0] == (X, "bytes=1000-", len(net.packed[X]) - 1000) and tree(net.folder) == net.packed


def test_a_whole_part_is_not_sent_again(net):
    server = net()
    leave_part(net, net.packed[X])
    assert prepare.main(["mnist"]) == 0
    assert server.log[0] == (X, f"bytes={len(net.packed[X])}-", 0) and tree(net.folder) == net.packed


def test_a_server_that_ignores_ranges(net):
    server = net(ranges=False)
    leave_part(net, b"junk" * 100)
    assert prepare.main(["mnist"]) == 0
    assert server.log[0] == (X, "bytes=400-", len(net.packed[X])) and tree(net.folder) == net.packed


def test_a_dropped_line_is_resumed(box, net, capsys):
    server = net(cut=2000)
    fails(capsys, ["mnist"], X, f"closed after 2000 of {len(net.packed[X])}", "--source")
    assert tree(box) == {f"data/.download/mnist/{X}.part": net.packed[X][:2000]}
    server.cut = None
    assert prepare.main(["mnist"]) == 0
    assert server.log[1] == (X, "bytes=2000-", len(net.packed[X]) - 2000) and tree(net.folder) == net.packed


def test_wrong_checksum(box, net, capsys):
    server = net({**net.packed, Y: b"<html>log in first</html>"})
    fails(capsys, ["mnist"], Y, sha(net.packed[Y]), sha(b"<html>log in first</html>"), "--source")
    assert tree(box) == {f"data/.download/mnist/{X}": net.packed[X]}  # the good one stays, the bad one is gone
    server.files = net.packed
    server.log.clear()
    assert prepare.main(["mnist"]) == 0
    assert [(name, wanted) for name, wanted, _ in server.log] == [(name, None) for name in net.packed if name != X]


def test_a_bad_part_does_not_stay(box, net, capsys):
    net()
    leave_part(net, b"junk" * 100)
    fails(capsys, ["mnist"], X, "sha256")
    assert tree(box) == {}
    assert prepare.main(["mnist"]) == 0 and tree(net.folder) == net.packed


def test_the_next_mirror_steps_in(net):
    dead, empty = net(), net({})
    dead.shutdown(), dead.server_close()  # refuses connections
    wrong, cut, good = net({name: b"no" for name in net.packed}), net(cut=50), net()
    assert prepare.main(["mnist"]) == 0 and tree(net.folder) == net.packed
    assert empty.log[0] == (X, None, 0) and wrong.log[0] == (X, None, 2)
    assert cut.log[0] == (X, None, 50) and good.log[0] == (X, "bytes=50-", len(net.packed[X]) - 50)


def test_every_mirror_fails(box, net, capsys):
    one, two = net({}), net({})
    fails(capsys, ["mnist"], X, one.url, two.url, "404", "--source")
    assert tree(box) == {}


# As a user runs it


def command(cwd, *argv):
    return subprocess.run([sys.executable, SCRIPT, *argv], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_the_command(tmp_path):
    write_mnist(tmp_path / "src")
    run = command(tmp_path, "mnist", "--source", "src", "--out", "out")
    assert (run.returncode, run.stderr) == (0, "") and str(tmp_path / "out") in run.stdout
    assert load(tmp_path / "out")[0].shape == (7, 1, 28, 28)
    (tmp_path / "src" / YT).write_bytes(b"not gzip")
    run = command(tmp_path, "mnist", "--source", "src", "--out", "new")
    assert run.returncode == 1 and run.stdout == "" and run.stderr.startswith(f"error: src/{YT}: ")
    assert run.stderr.count("\n") == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]
