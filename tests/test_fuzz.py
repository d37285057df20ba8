"""The loaders on inputs that hypothesis makes up: what is no data, or no checkpoint, is refused by an exception of the
kinds that a command turns into one line, soon, and without taking the memory that the file claims.

A few hundred here, always the same; FUZZ=10000 python -m pytest tests/test_fuzz.py tries as many, others every time.
"""
import contextlib
import gzip
import json
import os
import resource
import signal
import struct
import sys
import tracemalloc
import zipfile

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_data import prepare

import train
from model import build_model
from sample import load_run

INPUTS, MANY = 600, 10_000                                   # whenever the tests run; to be tried now and then
NOW = int(os.environ.get("FUZZ", INPUTS))
SHARE = dict(checkpoints=NOW // 3, data=NOW // 3, idx=NOW - 2 * (NOW // 3))
KINDS = (ValueError, OSError, prepare.DataError)             # FileNotFoundError is an OSError
ODD = [0, 1, -1, 127, 128, 255, 2**15, 2**31 - 1, 2**32, 2**63 - 1, 2**64, -2**63, 10**12]


def fuzz(what):
    return settings(max_examples=SHARE[what], deadline=None, derandomize="FUZZ" not in os.environ, database=None,
                    suppress_health_check=list(HealthCheck))


# ---- what is done to good bytes --------------------------------------------------------------------------------------

edits = st.lists(st.tuples(
    st.sampled_from(["flip", "set", "cut", "drop", "repeat", "insert", "number"]), st.floats(0, 1, exclude_max=True),
    st.integers(0, 255), st.integers(1, 64)), min_size=1, max_size=6)


def mutate(raw, todo):
    """bytes -> other bytes: at a place each, a bit, a byte, all that follows, or a stretch of them."""
    raw = bytearray(raw)
    for how, place, value, n in todo:
        at = int(place * (len(raw) + 1))
        if how == "flip" and at < len(raw): raw[at] ^= 1 << value % 8
        if how == "set" and at < len(raw): raw[at] = value
        if how == "cut": del raw[at:]
        if how == "drop": del raw[at:at + n]
        if how == "repeat": raw[at:at] = raw[at:at + n] * (1 + value % 8)
        if how == "insert": raw[at:at] = bytes([value]) * n
        if how == "number": raw[at:at + 4] = struct.pack("<I", ODD[value % len(ODD)] % 2**32)
    return bytes(raw)


@contextlib.contextmanager
def limits(seconds, megabytes):
    """What goes on for longer fails; and so does an allocation beyond so much more than there is: it raises what may be
    turned into a refusal, so that its words are looked at, too. (Linux knows what there is.)"""
    def late(*args): raise AssertionError(f"it took more than {seconds} s")
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    if sys.platform == "linux":
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def loads(f, *args, seconds=20, megabytes=256):
    """f(*args), or None if it refuses them as it may."""
    with limits(seconds, megabytes):
        try:
            return f(*args)
        except KINDS as e:
            text = str(e)
    assert text and not any(word in text.lower() for word in ("allocat", "memoryerror", "out of memory")), text


# ---- checkpoints -----------------------------------------------------------------------------------------------------

ARGS = dict(name="SiT-pico/4", input_size=8, in_channels=1, num_classes=4, prediction="v")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole checkpoint of train.py, small, and a folder to write others to."""
    torch.manual_seed(0)
    model, folder = build_model(**ARGS), tmp_path_factory.mktemp("fuzz")
    optimizer = torch.optim.AdamW(model.parameters())
    state = dict(ema=model.state_dict(), model=model.state_dict(), optimizer=optimizer.state_dict(), model_args=ARGS,
                 step=3, config=dict(steps=3), device="cpu", carried=0.0, last=3)
    torch.save(state, folder / "ckpt.pt")
    assert load_run(folder)[1]["step"] == 3
    return folder


def claiming(size):
    return torch.zeros([1] * len(size)).expand(size)


VALUES = st.one_of(
    st.none(), st.booleans(), st.sampled_from(ODD), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.sampled_from(["SiT-XL/1", "SiT-pico/4", "UNet-L", "UNet-L-conv", "SiT-pico/" + "9" * 30, "x"]),
    st.lists(st.integers(0, 40), max_size=4).map(torch.zeros),
    st.lists(st.sampled_from([0, 1, 8, 24, 2**20, 10**9]), max_size=2).map(claiming),
    st.sampled_from([torch.zeros(1, 4, 24).to_sparse(), torch.zeros(5, 24, device="meta"), torch.ones(4).bool(),
                     torch.zeros(1, 4, 24, dtype=torch.complex64), torch.zeros(5, 24, dtype=torch.int8)]))
KEYS = st.sampled_from([("ema", k) for k in build_model(**ARGS).state_dict()] + [("model_args", k) for k in ARGS]
                       + [("ema",), ("model_args",), ("step",), ("config",), ("device",), ("ema", "new"), (3,)])


def replaced(state, changes):
    """A checkpoint's dict with other values at some of its keys."""
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in state.items()}
    for (first, *rest), value in changes:
        if not rest: state[first] = value
        elif isinstance(state.get(first), dict): state[first][rest[0]] = value
    return state


@given(todo=st.one_of(st.tuples(st.just("bytes"), edits), st.tuples(st.just("pickle"), edits),
                      st.tuples(st.just("values"), st.lists(st.tuples(KEYS, VALUES), min_size=1, max_size=4))))
@fuzz("checkpoints")
def test_checkpoints(checkpoint, todo):
    """Of changed bytes, which the archive's checksums show; of a changed pickle in an archive whose checksums fit; of
    other values in the dict."""
    good, other = checkpoint / "ckpt.pt", checkpoint / "other.pt"
    how, changes = todo
    if how == "bytes":
        other.write_bytes(mutate(good.read_bytes(), changes))
    elif how == "pickle":
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(other, "w") as new:
            for part in old.namelist():
                raw = old.read(part)
                new.writestr(part, mutate(raw, changes) if part.endswith("data.pkl") else raw)
    else:
        torch.save(replaced(torch.load(good, weights_only=True), changes), other)
    if (got := loads(load_run, other)) is not None:
        assert sum(p.numel() for p in got[0].parameters()) < 10**6
    loads(train.read_checkpoint, other)


# ---- data sets -------------------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.sampled_from(ODD) | st.floats() | st.text(max_size=8)
JSON = st.one_of(PLAIN, st.lists(PLAIN, max_size=3), st.dictionaries(st.sampled_from(["num_classes", "a"]), st.one_of(
    PLAIN, st.lists(PLAIN, max_size=3))))
SIZES = st.lists(st.sampled_from([0, 1, 2, 4, 6, 8, -1, 2.5, None, "4", True, *ODD]), max_size=5).map(tuple)
HEADERS = st.fixed_dictionaries(dict(
    descr=st.sampled_from(["<f4", "<f8", ">f4", "<f2", "<i8", "|O", "|V0", "<U0", "<c8", "|b1", "<M8[s]", "<f16", "x",
                           3, None, [("a", "<f4")], [("a", "|O")], ("<f4", (2,)), [["a", "<f4"]]]),
    fortran_order=st.sampled_from([False, True, 0, None]), shape=SIZES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 6 images of 4 x 4, the bytes of its files as they should be."""
    path, rng = tmp_path_factory.mktemp("fuzz") / "toy", np.random.default_rng(0)
    x, y = rng.standard_normal((6, 1, 4, 4)).astype(np.float32), np.arange(6) % 3
    train.save_dataset(path, dict(x=x, y=y, x_heldout=x[:2], y_heldout=y[:2]), dict(num_classes=3))
    assert len(train.load_data(str(path))["x"]) == 6
    return path, {p.name: p.read_bytes() for p in path.iterdir()}


def npy(header, body):
    text = (header if isinstance(header, str) else repr(header)).encode("latin1", "replace")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) % 2**16) + text + body


@given(name=st.sampled_from(["x.npy", "y.npy", "x_heldout.npy", "y_heldout.npy"]), data=st.one_of(
    st.tuples(st.just("bytes"), edits), st.tuples(st.just("start"), edits), st.tuples(st.just("header"), HEADERS),
    st.tuples(st.just("text"), st.text(max_size=60)), st.tuples(st.just("meta bytes"), edits),
    st.tuples(st.just("meta"), JSON)))
@fuzz("data")
def test_data_sets(folder, name, data):
    """Of changed bytes anywhere in an array, or in its header; of headers and of meta.json made up from the start."""
    path, good = folder
    for k, raw in good.items():
        (path / k).write_bytes(raw)
    how, change = data
    if how == "bytes": (path / name).write_bytes(mutate(good[name], change))
    if how == "start": (path / name).write_bytes(mutate(good[name][:128], change) + good[name][128:])
    if how in ("header", "text"): (path / name).write_bytes(npy(change, good[name][128:]))
    if how == "meta bytes": (path / "meta.json").write_bytes(mutate(good["meta.json"], change))
    if how == "meta": (path / "meta.json").write_text(json.dumps(change))
    tracemalloc.start()
    try:
        got = loads(train.load_data, str(path))
        assert tracemalloc.get_traced_memory()[1] < 2e6      # the files hold a kilobyte
    finally:
        tracemalloc.stop()
    if got is not None:                                      # what is let through can be trained on
        x, y = got["x"], got["y"]
        assert x.ndim == 4 and len(x) == len(y) > 0 and np.isfinite(x).all()
        assert 0 <= y.min() <= y.max() < got["meta"]["num_classes"]
        assert torch.from_numpy(np.array(x)).isfinite().all() and torch.from_numpy(y.astype(np.int64)).min() >= 0


# ---- the files of MNIST ----------------------------------------------------------------------------------------------

IDX = struct.pack(">4I", 2051, 3, 28, 28) + np.random.default_rng(0).integers(0, 256, 3 * 784, dtype=np.uint8).tobytes()


@given(todo=st.one_of(st.tuples(st.just("bytes"), edits), st.tuples(st.just("inside"), edits),
                      st.tuples(st.just("header"), st.lists(st.sampled_from([2051, 2049, 28, 3, *ODD]), max_size=6))),
       packed=st.booleans())
@fuzz("idx")
def test_idx_files(checkpoint, todo, packed):
    """Of changed bytes, of those inside of a whole gzip file, and of headers made up from the start."""
    path = checkpoint / ("images.gz" if packed else "images")
    pack = (lambda raw: gzip.compress(raw, 1, mtime=0)) if packed else bytes
    how, change = todo
    if how == "bytes": raw = mutate(pack(IDX), change)
    if how == "inside": raw = pack(mutate(IDX, change))
    if how == "header": raw = pack(b"".join(struct.pack(">I", v % 2**32) for v in change) + IDX[16:])
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        got = loads(prepare.read_idx, path, 2051, (28, 28))
        assert tracemalloc.get_traced_memory()[1] < 20e6     # a piece is read at a time
    finally:
        tracemalloc.stop()
    if got is not None:
        assert got.dtype == np.uint8 and got.shape[1:] == (28, 28) and len(got) > 0
