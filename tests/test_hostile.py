"""Hostile and broken input: one line that names the file or the flag, exit status 1, nothing lost."""
import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from test_model import official_state
from test_train import config, data  # noqa: F401

import train
from empirical_score import EmpiricalScore
from sample import cli, load_run, sample

ROOT = Path(__file__).resolve().parents[1]
ONCE = "--out={f}/new --device=cpu"
TRAIN = f"train.py --data={{f}}/toy --model=SiT-nano/4 --steps=2 --batch=4 --warmup=0 --no-grid {ONCE}"
RESUME = TRAIN.replace("{f}/toy", "f/toy").replace("new", "run").replace("--batch=4", "--batch=12") + " --steps=4"
SAMPLE = "sample.py --run={f}/run --n=2 --solver=heun --steps=1 --device=cpu"
SHELLS = f"exp_shells.py --train.data={{f}}/toy --model-path={{f}}/run {ONCE}"
PARADOX = SHELLS.replace("exp_shells", "exp_cfg_paradox")
CIFAR = "data/prepare.py cifar10 --source={f}/c.tar.gz --out={f}/new"
HUGE = 10**12


@pytest.fixture(scope="module")
def good(data, tmp_path_factory):  # noqa: F811
    """A folder with a data set, toy, of 50 images of 8 x 8 in 4 classes, and a run, both as they should be."""
    folder = tmp_path_factory.mktemp("good") / "f"
    shutil.copytree(data, folder / "toy")
    with contextlib.chdir(folder.parent):                    # a run holds the name of its data: here one that stays
        train.train(config("f/toy", folder / "run", steps=2, grid=False))
    return folder


# ---- ways to break a file: each -> f(folder) -------------------------------------------------------------------------

def write(name, content):
    def change(f):
        (f / name).parent.mkdir(exist_ok=True)
        (f / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def cut(name, keep=0.5):
    return lambda f: os.truncate(f / name, int(keep * (f / name).stat().st_size))


def flip(name, where=0.5):
    def change(f):
        raw = bytearray((f / name).read_bytes())
        raw[int(where * len(raw))] ^= 16
        (f / name).write_bytes(raw)
    return change


def gone(name):
    return lambda f: (f / name).unlink()


def array(name, change, **kwargs):
    """Replace toy/<name>.npy by change(what it holds)."""
    return lambda f: np.save(f / "toy" / f"{name}.npy", change(np.load(f / "toy" / f"{name}.npy")), **kwargs)


def header(text, version=1, size=None):
    """toy/x.npy with this header, and 64 bytes of numbers."""
    size = len(text) if size is None else size
    return write("toy/x.npy", b"\x93NUMPY" + bytes([version, 0]) + size.to_bytes(2 if version == 1 else 4, "little")
                 + text.encode() + bytes(64))


def claims(shape, descr="'<f4'"):
    return header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n")


def meta(value):
    return write("toy/meta.json", value if isinstance(value, str) else json.dumps(value))


def checkpoint(change, name="run/ckpt.pt"):
    """Replace the checkpoint by change(its dict)."""
    return lambda f: torch.save(change(torch.load(f / "run/ckpt.pt", weights_only=True)), f / name)


def ema(change):
    return checkpoint(lambda c: c | dict(ema=change(c["ema"])))


def args(**changes):
    return checkpoint(lambda c: c | dict(model_args=c["model_args"] | changes))


def official(change=lambda s: s):
    """In the run's place, official weights, of images of 4 channels."""
    return lambda f: torch.save(change({k: v.float() for k, v in official_state().items()}), f / "run/ckpt.pt")


def repack(change, compression=zipfile.ZIP_STORED):
    """The zip archive that a checkpoint is, written again, each part as change(name, bytes): its checksums fit."""
    def f_(f):
        with zipfile.ZipFile(f / "run/ckpt.pt") as old, zipfile.ZipFile(f / "new.zip", "w", compression) as new:
            for part in old.namelist():
                new.writestr(part, change(part, old.read(part)))
        os.replace(f / "new.zip", f / "run/ckpt.pt")
    return f_


def overlapping(f):
    """An archive a thousand of whose entries are one and the same megabyte."""
    torch.save({"ema": torch.zeros(2**18)}, f / "run/ckpt.pt")
    with zipfile.ZipFile(f / "run/ckpt.pt", "a") as z:
        part = max(z.infolist(), key=lambda i: i.file_size)
        z.filelist += [part] * 1000
        z._didModify = True


class Bomb:
    """Unpickled, it makes a folder."""
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (f"{self.folder}/was_run",)


def bomb(name):
    return lambda f: torch.save({"model_args": Bomb(f), "config": {}}, f / name)


def npy_bomb(f):
    np.save(f / "toy/x.npy", np.array([Bomb(f)], dtype=object), allow_pickle=True)


def instead(name, make):
    """Something else in a file's place."""
    return lambda f: ((f / name).unlink(), make(f / name))


def archive(*members):
    """c.tar.gz of these (name, what it links to)."""
    def change(f):
        with tarfile.open(f / "c.tar.gz", "w:gz") as tar:
            for name, to in members:
                member = tarfile.TarInfo(name)
                member.type, member.linkname = (tarfile.SYMTYPE, to) if to else (tarfile.REGTYPE, "")
                tar.addfile(member)
    return change


def damaged_results(script):
    """What becomes of results.json, and what the line must say: of no dict, half of one, another script's, with fewer
    arrays."""
    whole = json.loads((ROOT / "assets" / f"{script}.json").read_text())
    other = "exp_gaussian" if script != "exp_gaussian" else "exp_shells"
    cases = {"no JSON": "junk", "half": json.dumps(whole)[:5000], "a list": "[]", "empty": "",
             "another's": (ROOT / "assets" / f"{other}.json").read_text(),
             "no claims": json.dumps(whole | {"claims": 3}),
             "no arrays": json.dumps({k: v for k, v in whole.items() if k != "arrays"})}
    return {f"{script} --redraw, {what}": (f"{script}.py --redraw --out={{f}}/drawn", write("drawn/results.json", text),
                                           ["drawn/results.json"]) for what, text in cases.items()}


# ---- numbers: for each script, what may not be zero, what may not be negative (all of them), what is a rate ----------

NUMBERS = {
    TRAIN: ("steps batch accum log-every save-every lr ema keep", "warmup label-dropout repa seed",
            "lr ema label-dropout repa"),
    SAMPLE: ("n batch steps", "seed label", "w"),
    SHELLS: ("n-points n-trajectories n-lines n-times n-images memo-times batch delta", "seed image overlap-class",
             "delta"),
    PARADOX: ("n n-times batch", "seed", "w"),
    f"exp_freedom.py --data={{f}}/toy {ONCE}": (
        "per-class k ema n-seeds compare-seeds n-samples sample-steps n false-copies threshold workers "
        "transformer.steps unet.batch compare.lr", "warmup label-dropout seed",
        "ema label-dropout threshold transformer.lr"),
    f"exp_scaling.py {ONCE}": (
        "repa-depth contrast n-data n-onset n-trajectories n-times batch accum lr ema n threshold n-fid workers",
        "warmup label-dropout seed", "contrast lr ema label-dropout threshold"),
    f"exp_gaussian.py {ONCE}": ("seeds d depth width iterations lr batch slowdown eval-every n-eval", "seed",
                                "lr slowdown"),
    f"exp_toy2d.py {ONCE}": ("nets n times width steps batch lr points bandwidth ridge widths bandwidths ridges margin "
                             "margins",
                             "seed", "lr bandwidth ridge margin margins bandwidths"),
}


def numbers():
    for command, (positive, rest, rates) in NUMBERS.items():
        for flags, value in ((positive, 0), (positive + " " + rest, -1), (positive + " " + rest, HUGE), (rates, "nan"),
                             (rates, "inf")):
            for flag in flags.split():
                field = flag.replace("-", "_").split(".")[-1]
                yield f"{command.split()[0]} --{flag}={value}", (f"{command} --{flag}={value}", None, [field])


# ---- the command line ------------------------------------------------------------------------------------------------

SCRIPTS = (*NUMBERS, "data/prepare.py mnist --source={f}")
WRITERS = [c for c in NUMBERS if not c.startswith("sample.py")]
PROC = Path("/proc/self").exists()                           # where no file can be made, even by root


def typos(script):
    """(what, flag, words of the line): a flag that does not exist, with and without a flag that is near; no number."""
    name, flag = script.split()[0], "width" if "gauss" in script or "toy2d" in script else "batch"
    flag = "workers" if "freedom" in script else flag
    return ((f"{name}, a mistyped flag", f"--{flag[:-2]}{flag[:-3:-1]}=3",
             [f"unrecognized option --{flag[:-2]}{flag[:-3:-1]}; did you mean --{flag}?"]),
            (f"{name}, no flag at all", "--zzzzzz 3", ["unrecognized option --zzzzzz (--help lists all)"]),
            (f"{name}, no number", f"--{flag}=many", [f"--{flag}: ", "'many'"]))


# ---- the table: what is broken -> (the command, f(folder) that breaks it, what the line must say) --------------------

x, y, xh = "toy/x.npy", "toy/y.npy", "toy/x_heldout.npy"
CKPT = ["run/ckpt.pt"]
nan = lambda a: np.where(np.arange(a.size).reshape(a.shape) == 777 % a.size, np.nan, a).astype(a.dtype)
CASES = {
    # checkpoints
    "a pickle bomb": (SAMPLE, bomb("run/ckpt.pt"), CKPT + ["more than tensors"]),
    "a pickle bomb as .pt file": (SAMPLE.replace("/run ", "/a.pt "), bomb("a.pt"), ["a.pt", "more than tensors"]),
    "a pickle bomb to go on from": (RESUME, bomb("run/ckpt.pt"), CKPT + ["more than tensors"]),
    "a pickle bomb to measure": (SHELLS, bomb("run/ckpt.pt"), CKPT + ["more than tensors"]),
    "a pickle bomb to start from": (TRAIN + " --init={f}/run", bomb("run/ckpt.pt"), CKPT + ["more than tensors"]),
    "a bare pickle": (SAMPLE, write("run/ckpt.pt", b"cos\nsystem\n(S'touch was_run'\ntR."), CKPT + ["no zip archive"]),
    "a cut checkpoint": (SAMPLE, cut("run/ckpt.pt"), CKPT + ["zip"]),
    "a checkpoint without its end": (SAMPLE, cut("run/ckpt.pt", 0.999), CKPT + ["zip"]),
    "an empty checkpoint": (SAMPLE, cut("run/ckpt.pt", 0), CKPT + ["zip"]),
    "a bit flipped in the middle": (SAMPLE, flip("run/ckpt.pt"), CKPT + ["damaged"]),
    "a bit flipped in the pickle": (SAMPLE, flip("run/ckpt.pt", 0.003), CKPT),
    "a bit flipped, to measure": (PARADOX, flip("run/ckpt.pt", 0.7), CKPT + ["damaged"]),
    "a compressed checkpoint, 1000 times as large": (
        SAMPLE, lambda f: (ema(lambda e: e | {"pos_embed": torch.zeros(2**24)})(f),
                           repack(lambda n, b: b, zipfile.ZIP_DEFLATED)(f)), CKPT + ["larger than the file"]),
    "parts that overlap": (SAMPLE, overlapping, CKPT),
    "a checkpoint without weights": (SAMPLE, checkpoint(lambda c: {k: c[k] for k in c if k != "ema"}),
                                     CKPT + ["'ema' is missing"]),
    "a checkpoint without a model": (SAMPLE, checkpoint(lambda c: {k: c[k] for k in c if k != "model_args"}),
                                     CKPT + ["'model_args' is missing"]),
    "weights that are a number": (SAMPLE, ema(lambda e: 3), CKPT),
    "weights with a number among them": (SAMPLE, ema(lambda e: e | {"pos_embed": 3}), CKPT + ["pos_embed"]),
    "weights with one more": (SAMPLE, ema(lambda e: e | {"more": torch.zeros(1)}), CKPT + ["'more'"]),
    "weights with one less": (SAMPLE, ema(lambda e: {k: e[k] for k in e if k != "pos_embed"}), CKPT + ["pos_embed"]),
    "weights of another shape": (SAMPLE, ema(lambda e: e | {"pos_embed": torch.zeros(1, 4, 33)}),
                                 CKPT + ["(1, 4, 33)", "(1, 4, 32)"]),
    "weights on the meta device": (SAMPLE, ema(lambda e: {k: v.to("meta") for k, v in e.items()}),
                                   CKPT + ["fewer numbers"]),
    "weights of stride 0": (SAMPLE, ema(lambda e: e | {"pos_embed": torch.zeros(1, 1, 1).expand(1, 4, 32)}),
                            CKPT + ["pos_embed", "fewer numbers"]),
    "weights of integers": (SAMPLE, ema(lambda e: e | {"pos_embed": torch.zeros(1, 4, 32, dtype=torch.int8)}),
                            CKPT + ["pos_embed", "torch.int8"]),
    "sparse weights": (SAMPLE, ema(lambda e: e | {"pos_embed": torch.zeros(1, 4, 32).to_sparse()}), CKPT),
    "a model of a million classes, of stride 0": (SAMPLE, checkpoint(lambda c: c | dict(
        model_args=c["model_args"] | dict(num_classes=HUGE),
        ema=c["ema"] | {"y_embedder.embedding_table.weight": torch.zeros(1, 32).expand(HUGE + 1, 32)})),
        CKPT + ["y_embedder.embedding_table.weight", "fewer numbers"]),
    "a huge image": (SAMPLE, args(input_size=4 * 10**6), CKPT + ["pos_embed"]),
    "a huge number of classes": (SAMPLE, args(num_classes=HUGE), CKPT + ["y_embedder"]),
    "a huge number of channels": (SAMPLE, args(in_channels=HUGE), CKPT),
    "a huge model": (SAMPLE, args(name="SiT-XL/1"), CKPT),
    "a model that is not known": (SAMPLE, args(name="SiT-nano/4x"), CKPT + ["unknown model"]),
    "a model that is a number": (SAMPLE, args(name=7), CKPT),
    "no classes": (SAMPLE, args(num_classes=0), CKPT + ["num_classes", "from 1 up, not 0"]),
    "half a channel": (SAMPLE, args(in_channels=0.5), CKPT + ["in_channels", "whole number"]),
    "a negative size": (SAMPLE, args(input_size=-8), CKPT + ["input_size", "not -8"]),
    "an argument that no model has": (SAMPLE, args(depth=3), CKPT + ["depth"]),
    "arguments that are a list": (SAMPLE, checkpoint(lambda c: c | dict(model_args=[1])), CKPT),
    "a step that is a text, to go on from": (RESUME, checkpoint(lambda c: c | dict(step="2")),
                                             CKPT + ["step is a str, expected int"]),
    "a config that is a list, to go on from": (RESUME, checkpoint(lambda c: c | dict(config=[])),
                                               CKPT + ["config is a list, expected dict"]),
    "an optimizer of another model, to go on from": (
        RESUME, checkpoint(lambda c: c | dict(optimizer={"state": {}, "param_groups": []})), CKPT + ["to resume from"]),
    "no optimizer, to go on from": (
        RESUME, checkpoint(lambda c: {k: c[k] for k in c if k != "optimizer"}), CKPT + ["'optimizer' is missing"]),
    "another batch, to go on from": (RESUME.replace("=12", "=4"), None, CKPT + ["batch = 12, not 4"]),
    "a checkpoint for other images": (SHELLS, official(), ["run", "(4, 8, 8)", "(1, 8, 8)"]),
    "a checkpoint for other images to start from": (TRAIN + " --init={f}/run", official(),
                                                    ["run takes another scale of time"]),
    "a checkpoint of another size to start from": (TRAIN.replace("nano", "micro") + " --init={f}/run", None,
                                                   ["run does not fit SiT-micro/4"]),
    "official weights of stride 0": (
        SAMPLE, official(lambda s: s | {"pos_embed": torch.zeros(1, 1, 1).expand(1, 10**10, 32)}),
        CKPT + ["pos_embed"]),
    "official weights of 1e12 classes": (
        SAMPLE, official(lambda s: s | {"y_embedder.embedding_table.weight": torch.zeros(1, 1).expand(HUGE, 32)}),
        CKPT + ["y_embedder.embedding_table.weight", "fewer numbers"]),
    "official weights without a pixel": (
        SAMPLE, official(lambda s: s | {"x_embedder.proj.weight": torch.zeros(32, 4, 0, 0)}), CKPT + ["it is empty"]),
    "official weights of a depth of 1e9": (
        SAMPLE, official(lambda s: s | {f"blocks.{10**9}.a": torch.zeros(1)}), CKPT + ["of no known size"]),
    "a folder without a checkpoint": (SAMPLE.replace("/run ", "/toy "), None, ["toy/ckpt.pt", "no checkpoint"]),
    "a folder without a checkpoint to measure": (SHELLS.replace("/run ", "/toy "), None, ["toy/ckpt.pt"]),
    "a folder without a checkpoint to start from": (TRAIN + " --init={f}/toy", None, ["toy/ckpt.pt"]),
    "no such folder to measure": (PARADOX.replace("/run ", "/nowhere "), None, ["nowhere/ckpt.pt"]),
    "a text file as checkpoint": (SAMPLE, write("run/ckpt.pt", "once upon a time"), CKPT + ["zip"]),
    "a text file as .pt to measure": (SHELLS.replace("/run ", "/a.pt "), write("a.pt", "a time"), ["a.pt", "zip"]),
    "an image as checkpoint": (SAMPLE, lambda f: shutil.copy(ROOT / "assets/exp_shells.png", f / "run/ckpt.pt"),
                               CKPT + ["zip"]),
    "an image to start from": (TRAIN + " --init={f}/a.pt", lambda f: shutil.copy(ROOT / "assets/exp_shells.png",
                                                                                f / "a.pt"), ["a.pt", "zip"]),
    "a zip archive of something else": (SAMPLE, repack(lambda name, b: b"hello"), CKPT),
    "a pipe as checkpoint": (SAMPLE, instead("run/ckpt.pt", os.mkfifo), CKPT + ["no checkpoint"]),
    "a folder as checkpoint": (SAMPLE, instead("run/ckpt.pt", Path.mkdir), CKPT + ["no checkpoint"]),
    # data sets
    "a pickle bomb as .npy": (TRAIN, npy_bomb, [x]),
    "objects": (TRAIN, array("x", lambda a: a.astype(object), allow_pickle=True), [x]),
    "a bare pickle as .npy": (TRAIN, write(x, b"cos\nsystem\n(S'touch was_run'\ntR."), [x]),
    "an .npz as .npy": (TRAIN, lambda f: (np.savez(f / "a.npz", x=np.zeros(3)), os.replace(f / "a.npz", f / x)), [x]),
    "half of x.npy": (TRAIN, cut(x), [x, "cannot be read as an array"]),
    "half of a header": (TRAIN, cut(x, 0.003), [x]),
    "an empty file": (TRAIN, cut(x, 0), [x]),
    "a flipped bit in a header": (TRAIN, flip(x, 0.004), [x]),
    "a text file as .npy": (TRAIN, write(x, "1 2 3"), [x]),
    "a header that claims 16 TB": (TRAIN, claims((HUGE, 1, 2, 2)), [x]),
    "a header whose size overflows": (TRAIN, claims((2**32, 2**32, 2, 2)), [x]),
    "a header of a negative size": (TRAIN, claims((-4, 1, 2, 2)), [x]),
    "a header of fractions": (TRAIN, claims((4.5, 1, 2, 2)), [x]),
    "a header of another type": (TRAIN, claims((4, 1, 2, 2), "'<q9'"), [x]),
    "a header of records": (TRAIN, claims((1, 1, 2, 2), "[('a', '<f4', (4,))]"), [x]),
    "a header of code": (TRAIN, header("__import__('os').mkdir('was_run')\n"), [x]),
    "a header of brackets": (TRAIN, header("(" * 5000), [x]),
    "a header that is longer than the file": (TRAIN, header("{}", size=60000), [x]),
    "a header of 4 GB": (TRAIN, header("{}", version=2, size=2**32 - 1), [x]),
    "a header of a version that is none": (TRAIN, header("{}", version=9), [x]),
    "fewer labels than images": (TRAIN, array("y", lambda a: a[:-1]), [y, "50 integer labels"]),
    "more labels than images": (TRAIN, array("y", lambda a: np.append(a, 0)), [y, "50 integer labels"]),
    "a label too large": (TRAIN, array("y", lambda a: a + 1), [y, "0 .. 3"]),
    "a label of -1": (TRAIN, array("y", lambda a: a - 1), [y, "0 .. 3"]),
    "labels as fractions": (TRAIN, array("y", lambda a: a + 0.5), [y, "integer labels"]),
    "labels as a column": (TRAIN, array("y", lambda a: a[:, None]), [y, "integer labels"]),
    "labels of the wrong byte order": (TRAIN, array("y", lambda a: a.astype(">i8")), [y, "integer labels"]),
    "held-out labels too large": (TRAIN, array("y_heldout", lambda a: a + 4), ["toy/y_heldout.npy", "0 .. 3"]),
    "no labels": (TRAIN, gone(y), ["toy", "'y' is missing"]),
    "no images": (TRAIN, gone(x), ["toy", "'x' is missing"]),
    "no image in the file": (TRAIN, array("x", lambda a: a[:0]), [x, "(0, 1, 8, 8)"]),
    "no channel": (TRAIN, array("x", lambda a: a[:, :0]), [x, "(50, 0, 8, 8)"]),
    "no pixel": (TRAIN, array("x", lambda a: a[:, :, :0, :0]), [x, "(50, 1, 0, 0)"]),
    "nan among the images": (TRAIN, array("x", nan), [x, "nan or inf"]),
    "inf among the images": (TRAIN, array("x", lambda a: np.where(nan(a) == a, a, np.inf).astype(a.dtype)), [x, "inf"]),
    "nan among the images, to measure": (SHELLS, array("x", nan), [x, "nan or inf"]),
    "nan among held-out images": (TRAIN, array("x_heldout", nan), [xh, "nan or inf"]),
    "images that are no squares": (TRAIN, array("x", lambda a: a[..., :4]), [x, "(50, 1, 8, 4)"]),
    "images without channels": (TRAIN, array("x", lambda a: a[:, 0]), [x, "(50, 8, 8)"]),
    "images of whole numbers": (TRAIN, array("x", lambda a: a.astype(np.uint8)), [x, "uint8"]),
    "images of complex numbers": (TRAIN, array("x", lambda a: a.astype(complex)), [x, "complex128"]),
    "images of long doubles": (TRAIN, array("x", lambda a: a.astype(np.longdouble)), [x, "floating point"]),
    "images of the wrong byte order": (TRAIN, array("x", lambda a: a.astype(">f4")), [x, ">f4"]),
    "held-out images of another size": (TRAIN, array("x_heldout", lambda a: a[..., :4, :4]), [xh, "(9, 1, 4, 4)"]),
    "images that the model cannot cut in patches": (TRAIN + " --model=SiT-nano/3", None,
                                                    ["patch size 3", "image size 8"]),
    "images of another shape than the model's": (SHELLS, lambda f: [array(k, lambda a: a[..., :4, :4])(f)
                                                                    for k in ("x", "x_heldout")],
                                                 ["run", "(1, 8, 8)", "(1, 4, 4)"]),
    "another number of classes than the model's": (SHELLS, meta({"num_classes": 5}), ["run", "4 classes", "5 classes"]),
    "no meta.json": (TRAIN, gone("toy/meta.json"), ["toy/meta.json"]),
    "meta.json that is no JSON": (TRAIN, meta("{num_classes: 4"), ["toy/meta.json", "not JSON"]),
    "meta.json that is empty": (TRAIN, meta(""), ["toy/meta.json", "not JSON"]),
    "meta.json that is no text": (TRAIN, write("toy/meta.json", b"\xff\xfe\0"), ["toy/meta.json"]),
    "meta.json that is a list": (TRAIN, meta([4]), ["toy/meta.json", "a list"]),
    "meta.json of brackets": (TRAIN, meta("[" * 100_000), ["toy/meta.json"]),
    "meta.json without classes": (TRAIN, meta({}), ["toy", "'num_classes' is missing"]),
    **{f"num_classes = {value!r}": (TRAIN, meta({"num_classes": value}), ["toy", "num_classes", repr(value)[:40]])
       for value in (0, -4, 4.0, "4", True, None, [4], HUGE, 10**40, float("nan"), float("inf"))},
    "a stray array": (TRAIN, write("toy/notes.npy", "not an array"), ["toy/notes.npy"]),
    "a folder in an array's place": (TRAIN, instead(x, Path.mkdir), [x]),
    "a pipe in an array's place": (TRAIN, instead(x, os.mkfifo), [x]),
    "a link to nowhere": (TRAIN, instead(x, lambda p: p.symlink_to("nowhere")), [x]),
    "no features for REPA": (TRAIN + " --repa=1 --repa-depth=1", None, ["toy/x.npy", "features.npy"]),
    **{f"features for REPA, {what}": (TRAIN + " --repa=1 --repa-depth=1", write("toy/features.npy", b"") if a is None
                                      else lambda f, a=a: np.save(f / "toy/features.npy", a), ["features.npy"])
       for what, a in (("of fewer images", np.ones((49, 4, 3), np.float32)), ("empty", None),
                       ("of other tokens", np.ones((50, 16, 3), np.float32)), ("flat", np.ones((50, 4), np.float32)),
                       ("of nothing", np.ones((50, 4, 0), np.float32)), ("of integers", np.ones((50, 4, 3), int)),
                       ("of nan", np.full((50, 4, 3), np.nan, np.float32)))},
    # names
    "a data set that does not exist": (TRAIN.replace("/toy", "/nowhere"), None, ["nowhere", "no data set"]),
    "a data set to measure that does not exist": (SHELLS.replace("/toy", "/nowhere"), None, ["nowhere", "no data set"]),
    "a data set to prepare that is not known": ("data/prepare.py imagnet", None, ["'imagnet'", "mnist, cifar10"]),
    **{f"{s}, preset": (f"{s} --preset=huge", None, ["unknown preset 'huge'"]) for s in
       ("train.py", "sample.py", *(f"{p.stem}.py" for p in sorted(ROOT.glob("exp_*.py"))))},
    **{f"{c.split()[0]}, device": (c.replace("--device=cpu", "--device=tpu"), None, ["device 'tpu'"])
       for c in (TRAIN, SAMPLE, SHELLS, PARADOX, *[c for c in NUMBERS if "gauss" in c or "toy2d" in c])},
    "a model that does not exist": (TRAIN.replace("nano", "huge"), None, ["unknown model 'SiT-huge/4'", "pico"]),
    "a U-Net that does not exist": (TRAIN.replace("SiT-nano/4", "UNet"), None, ["unknown model 'UNet'"]),
    "a target that does not exist": ("exp_freedom.py --target=guess", None, ["unknown target 'guess'"]),
    "a FID reference without an .npz": (SAMPLE + " --fid={f}/a.npz", None, ["--out NAME.npz"]),
    "ratios that descend": ("exp_freedom.py --ratios 4 1", None, ["ratios", "ascending"]),
    "ratios with a comma": ("exp_freedom.py --ratios 1,2", None, ["--ratios", "'1,2'", "FLOAT"]),
    "train.py's flag": ("exp_shells.py --data digits", None, ["--data", "did you mean --train.data?"]),
    "a flag of several": ("exp_freedom.py --steps 3", None, ["--steps", "did you mean --transformer.steps?"]),
    "a batch that does not divide": (TRAIN + " --accum=3", None, ["batch 4", "accum = 1 x 3"]),
    # the command line
    **{f"{c}": (f"{script} {flag}", None, [*words]) for script in SCRIPTS for c, flag, words in typos(script)},
    "a missing flag": ("sample.py", None, ["--run is required"]),
    "a missing name": ("data/prepare.py", None, ["name is required"]),
    "a flag without a value": (TRAIN + " --batch", None, ["--batch: its value is missing"]),
    "a choice that is none": (TRAIN + " --prediction=z", None, ["--prediction: 'z' is none of v, x"]),
    "a flag of a part of a config": (SHELLS + " --train.stpes=3", None, ["--train.stpes; did you mean --train.steps?"]),
    # what cannot be written
    **{f"{c.split()[0]}, {what}": (c.replace(ONCE, "") + f" --out={out}", None, [*words]) for c in WRITERS
       for what, out, words in (("a file as folder", "{f}/toy/x.npy", ["toy/x.npy", "Not a directory"]),
                                ("a folder in a file", "{f}/toy/x.npy/a/b", ["toy/x.npy", "Not a directory"]),
                                *[("a folder that takes no files", "/proc/a/b", ["/proc", "No such file"])] * PROC)},
    "a file as the run's folder": (SHELLS.replace("--model-path={f}/run", "--train.out={f}/toy/x.npy"), None, [x]),
    "samples in a file's place": (SAMPLE + " --out={f}/toy/x.npy/a.png", None, [x, "Not a directory"]),
    "samples in a folder's place": (SAMPLE + " --out={f}/toy", None, ["toy is a folder", "--out"]),
    "samples for FID in a file's place": (SAMPLE + " --out={f}/toy/x.npy/a.npz", None, [x, "Not a directory"]),
    # t outside of [0, 1], which no command takes: through the same door
    **{f"t_grid = {grid}": (lambda grid=grid: sample(None, torch.zeros(1), None, t_grid=grid), None,
                            ["t_grid", "[0, 1]"])
       for grid in ([1.5, 0], [1, -0.5], [0, 1], [1], [1, 1], [float("nan"), 0], [1, float("nan")])},
    **{f"a score at t = {t}": (lambda t=t: EmpiricalScore(torch.zeros(3, 4)).score(torch.zeros(2, 4), t), None, ["t "])
       for t in (0, -0.1, 1.1, float("nan"), float("inf"))},
    "a solver that does not exist": (lambda: sample(None, torch.zeros(1), None, solver="rk4"), None,
                                     ["'rk4'", "dopri5, heun or euler"]),
    # archives: nothing is written but what has the right name, and is a file
    "an archive with members outside": (CIFAR, archive(("../was_run", ""), ("/tmp/was_run", "")), ["c.tar.gz"]),
    "an archive of links": (CIFAR, archive(("cifar-10-batches-bin/data_batch_1.bin", "/etc/passwd"),
                                           ("was_run", "/etc")), ["c.tar.gz", "data_batch_1.bin"]),
    **{k: v for p in sorted(ROOT.glob("exp_*.py")) for k, v in damaged_results(p.stem).items()},
    **dict(numbers()),
}

def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(command, f, monkeypatch, capsys):
    """Run a command line as __main__, in this process -> the line on stderr with which it ended, status 1."""
    with pytest.raises(SystemExit) as e:
        if callable(command):
            cli(lambda cfg: command(), {"laptop": train.Config()})
        script, *argv = shlex.split(command.replace("{f}", str(f)))
        monkeypatch.setattr(sys, "argv", [script, *argv])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    err = capsys.readouterr().err
    assert isinstance(e.value.code, str) or e.value.code == 1            # a text is printed, and the status is 1
    return err + (f"{e.value.code}\n" if isinstance(e.value.code, str) else "")


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_in_one_line(case, good, tmp_path, monkeypatch, capsys):
    command, change, words = CASES[case]
    monkeypatch.chdir(tmp_path)
    f = tmp_path / "f"
    shutil.copytree(good, f)
    if change: change(f)
    before = tree(f)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    err = refused(command, f, monkeypatch, capsys)
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert len(err) < 1000 + len(str(f)), len(err)
    for word in words:
        assert word in err, err
    assert tree(f) == before                                 # nothing written, nothing lost
    assert not list(tmp_path.rglob("was_run")) and not Path("/tmp/was_run").exists()


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="Linux alone, without a GPU")
@pytest.mark.parametrize("command", [
    TRAIN.replace("--batch=4", "--batch=400000000"), SAMPLE + " --n=800000000", SHELLS + " --n-trajectories=500000000",
    PARADOX + " --n=500000000", f"exp_freedom.py --data={{f}}/toy {ONCE} --per-class=5 --n=9 --n-samples=900000000",
    f"exp_scaling.py {ONCE} --n-trajectories=500000000", f"exp_gaussian.py {ONCE} --points 10 100000000",
    f"exp_gaussian.py {ONCE} --n-eval=1000000000 --seeds=1000000000", f"exp_toy2d.py {ONCE} --points=100000000",
    f"exp_toy2d.py {ONCE} --width=900000000"])
def test_sizes_beyond_the_memory_are_refused_in_one_line(command, good, tmp_path, monkeypatch, capsys):
    """Of a limit that stands for a small machine: the scripts keep one that is there already."""
    resource, f = pytest.importorskip("resource"), tmp_path / "f"
    shutil.copytree(good, f)
    before, (soft, hard) = tree(f), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, hard))
    try:
        err = refused(command, f, monkeypatch, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert re.fullmatch(r"error: too little memory for [^\n]+\n", err), err
    assert command.split()[-1] in err and tree(f) == before


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="Linux alone, without a GPU")
def test_the_memory_is_the_limit(tmp_path):
    """What the machine has, where nobody has set another; an allocation beyond it is told in one line."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "script.py").write_text(f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r})
import sample, torch, train
def main(cfg): print(resource.getrlimit(resource.RLIMIT_DATA)[0]); torch.empty({room})
sample.cli(main, train.PRESETS)""")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and re.fullmatch(r"error: too little memory [^\n]+\n", done.stderr), done.stderr
    assert 2**28 < int(done.stdout) < 2 * room


@pytest.mark.parametrize("case", ["a pickle bomb", "objects", "weights of stride 0", "exp_toy2d.py --n=-1"])
def test_as_a_user_runs_it(case, good, tmp_path):
    command, change, words = CASES[case]
    shutil.copytree(good, tmp_path / "f")
    if change: change(tmp_path / "f")
    script, *argv = shlex.split(command.replace("{f}", str(tmp_path / "f")))
    run = lambda *more: subprocess.run([sys.executable, ROOT / script, *argv, *more], capture_output=True, text=True,
                                       cwd=tmp_path, timeout=100)
    done = run()
    assert done.returncode == 1 and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert all(word in done.stderr for word in words) and not list(tmp_path.rglob("was_run"))
    if case in ("objects", "exp_toy2d.py --n=-1"):
        assert "Traceback" in run("--debug").stderr


def test_nan_that_is_first_seen_while_training(good, tmp_path, monkeypatch):
    """Of data too large to look at all of them at the start, the batch whose loss is nan is named."""
    shutil.copytree(good / "toy", tmp_path / "toy")
    array("x", nan)(tmp_path)
    monkeypatch.setattr(train, "check_finite", lambda path, x: None)
    with pytest.raises(ValueError, match=r"toy: the images or features of step \d+ hold nan or inf"):
        train.train(config(str(tmp_path / "toy"), tmp_path / "a", steps=20, grid=False))
    assert load_run(good / "run")[0](torch.zeros(1, 1, 8, 8), 0.5).isfinite().all()


def test_large_data_are_looked_at_in_places(tmp_path):
    """Of more than a gigabyte, a thousand rows: a sparse file, so that none of it is there."""
    big = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float16, (10**6, 1, 24, 24))
    train.check_finite("x.npy", big)
    big[5000] = np.inf                                       # one of the rows that are looked at
    with pytest.raises(ValueError, match="x.npy holds nan or inf"):
        train.check_finite("x.npy", big)


@pytest.mark.parametrize("script", ["exp_toy2d.py", "exp_gaussian.py"])
def test_scripts_of_one_process_refuse_torchrun(script, tmp_path):
    """All of torchrun's processes would write the same files."""
    done = subprocess.run([sys.executable, ROOT / script, f"--out={tmp_path}"], capture_output=True, text=True,
                          timeout=100, env=os.environ | dict(WORLD_SIZE="2", RANK="1"))
    assert done.returncode == 1 and re.fullmatch(r"error: this runs in one process: python exp_\w+\.py, without "
                                                 r"torchrun\n", done.stderr)
    assert not list(tmp_path.iterdir())
