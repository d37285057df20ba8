"""Every mistake ends in one line that names it, and no file is written or changed.

A row of MISTAKES holds a function that prepares a call in a folder and returns it, its arguments, and a regular
expression for the line. Mistakes that need a process of their own are tested beside the script.
"""
import argparse
import gzip
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_empirical_score import clusters, queries
from test_gaussian import SMALL as GAUSSIAN
from test_plumbing import X, write_set
from test_prepare import cifar_files, mnist_files, prepare, write, write_tar
from test_sample import Given, gaussian_velocity, write_run
from test_toy2d import SMALL as TOY
from test_train import config, write_toy
from test_weights import official_state

import exp_freedom
import exp_gaussian
import exp_scaling
import exp_shells
import exp_toy2d
import sample
import train
from empirical_score import EmpiricalScore
from model import build_model
from plumbing import stand_ins, weights
from plumbing.data import load_data
from plumbing.files import load_run


def the_score(folder, ask):
    """Ask the empirical score of 600 points, with 24 queries."""
    x, y = clusters()
    return partial(ask, EmpiricalScore(x, y), queries(x, 0.5))

def the_solver(folder, **changes):
    arguments = dict(model=Given(gaussian_velocity), z1=torch.zeros(1, 1, 4, 4), y=None)
    return partial(sample.solve_ode, **arguments | changes)

def a_data_set(folder, damage=None, then=load_data, **arrays):
    data = write_set(folder / "set", **arrays)
    if damage:
        damage(folder / "set")
    return partial(then, data)

def prepared(folder, name, damage):
    """Prepare a good source after `damage`, a function of its folder, in place of an older data set."""
    write(folder / "out", {"x.npy": b"older"})
    source = write(folder / "src", mnist_files()[0] if name == "mnist" else {})
    source.mkdir(exist_ok=True)
    if name == "cifar10":
        write_tar(source / "c.tar.gz", cifar_files())
    damage(source)
    source = source / "c.tar.gz" if name == "cifar10" else source
    return partial(prepare.main, prepare.Config(name, source=source, out=folder / "out"))

def training(folder, features=None, **changes):
    arrays = {} if features is None else dict(features=features)
    return partial(train.train, config(write_toy(folder / "toy", **arrays), folder / "run", **changes))

def trained(run):
    """Train for two steps on toy/, a data set beside the folder `run`."""
    return train.train(config(write_toy(run.with_name("toy")), run, steps=2, keep=(1,)))

def resumed(folder, damage=None, **changes):
    """Go on with a run after `damage`, a function of the folder of the data and the run."""
    run = trained(folder / "run")
    if damage:
        damage(folder)
    return partial(train.train, config(str(folder / "toy"), run, **changes))

def started_from_a_run(folder, **changes):
    init = str(trained(folder / "run"))
    return partial(train.train, config(str(folder / "toy"), folder / "new", init=init, **changes))

def a_checkpoint(folder, change):
    """Load a run whose checkpoint is what `change` returns for its state."""
    path = write_run(folder / "run") / "ckpt.pt"
    torch.save(change(torch.load(path)), path)
    return partial(load_run, path)

def official(folder, change):
    """Load weights under the official names."""
    torch.save(change(official_state()), folder / "w.pt")
    return partial(load_run, folder / "w.pt")

def the_sampler(folder, in_channels=1, **changes):
    fields = dict(run=str(write_run(folder / "run", in_channels)), device="cpu", solver="euler", steps=2)
    return partial(sample.main, sample.Config(**fields | changes))

def experiment(folder, script, **changes):
    defaults = script.PRESETS["laptop"]
    return partial(script.measure, replace(defaults, device="cpu", workers=1, out=str(folder / "out"), **changes))

def measured(folder, write_weights, **arrays):
    """Measure weights on a data set like toy/, in which some arrays are others."""
    network = train.Config(data=write_toy(folder / "other", **arrays))
    cfg = exp_shells.Config(network=network, model_path=str(write_weights(folder / "run")), device="cpu")
    return partial(exp_shells.measure, cfg)

def the_call(folder, call):
    return partial(call, folder)

CLASSES = np.arange(12) % 3
MNIST_X, MNIST_Y, _, TEST_Y = mnist_files()[0]

def edit(name, change):
    """Return a function of a folder that replaces the bytes of a file in it."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))

def remove(name):
    return lambda folder: (folder / name).unlink()

def half(content):
    return content[:len(content) // 2]

def flip(content):
    return half(content) + bytes([content[len(content) // 2] ^ 255]) + content[len(content) // 2 + 1:]

def with_nan(state):
    state["ema"]["final_layer.linear.weight"][0, 0] = torch.nan
    return state

def without(start):
    return lambda state: {name: value for name, value in state.items() if not name.startswith(start)}

def plus(name, *shape):
    return lambda state: state | {name: torch.zeros(shape)}


MISTAKES = [
    # the empirical score
    *((the_score, dict(ask=ask), message) for ask, message in [
        (lambda E, z: E.score(z, 0.0), r"t must be one number or 24 in \(0, 1\], not 0.0"),
        (lambda E, z: E.score(z, float("nan")), r"in \(0, 1\]"),
        (lambda E, z: E.score(z, torch.full((5,), 0.5)), "t must be one number or 24"),
        (lambda E, z: E.score(z * torch.nan, 0.5), "finite"),
        (lambda E, z: E.r_star(z.long(), 0.5), "z must hold"),
        (lambda E, z: E.score(z[:, :1], 0.5), r"of shape \(B, \*\(3, 4, 4\)\)"),
        (lambda E, z: E.score(z, 0.5, torch.full((24,), 99)), "no data point has label 99"),
        (lambda E, z: E.score(z, 0.5, torch.zeros(5)), "there are 24 queries, but 5 labels"),
        (lambda E, z: E.score(z.half(), 1e-3), r"too large for torch.float16: pass z.double\(\)"),
        (lambda E, z: EmpiricalScore(E.x * torch.nan).score(z, 0.5), "the answer is nan"),
        (lambda E, z: E.nearest(z, 601), "k must be at most 600"),
        (lambda E, z: EmpiricalScore(E.x[:0]), "N >= 1"),
        (lambda E, z: EmpiricalScore(E.x, E.y[:2]), "N labels or none, not 600 and 2")]),
    # networks and solvers
    *((the_call, dict(call=lambda folder, name=name: build_model(name, 30, 4, 10)), message) for name, message in [
        *((name, "unknown model") for name in ("SiT-S", "SiT-Q/2", "SiT-S/x", "SiT-S/0", "SiT-S/2-conv", "UNet-Q",
                                               "UNet-S-xx", "UNet-", "vit", "")),
        ("SiT-nano/4", "divisible by 4, not 30"), ("UNet-S", "divisible by 4")]),
    (the_call, dict(call=lambda folder: build_model("SiT-pico/2", 8, 1, 10)(torch.zeros(1, 3, 8, 8), 0.5)),
     "images of shape"),
    *((the_solver, dict(t_grid=grid), "descend") for grid in ([0.0, 1.0], [1.0], [1.2, 0.0], [0.5, 0.5], [0.5, -0.1])),
    (the_solver, dict(model=Given(gaussian_velocity, "x"), t_grid=[1.0, 5e-4, 0.0]), "no time of t_grid but the last"),
    (the_solver, dict(solver="rk4"), "unknown solver 'rk4'"),
    # data sets
    (a_data_set, dict(x=X.astype(np.uint8)), "x.npy must be floating point"),
    (a_data_set, dict(x=X[:, :, :, :3]), "x.npy must be floating point of shape"),
    (a_data_set, dict(x=X[:0], y=CLASSES[:0]), r"x.npy must be floating point of shape .* not float32 \(0, 1, 4, 4\)"),
    (a_data_set, dict(x=X + np.nan), "x.npy holds values from nan to nan"),
    (a_data_set, dict(x=np.linspace(0, 255, 192, dtype=np.float32).reshape(X.shape)), "from 0 to 255: scale"),
    (a_data_set, dict(y=CLASSES[:11]), "12 integer labels"),
    (a_data_set, dict(y=CLASSES / 1), "12 integer labels"),
    (a_data_set, dict(y=np.arange(12)), "labels in 0 .. 2, not 0 .. 11"),
    (a_data_set, dict(meta={}), "meta.json must hold num_classes"),
    (a_data_set, dict(x_heldout=X), "y_heldout.npy is missing"),
    (a_data_set, dict(x_heldout=X[:, :, :2, :2], y_heldout=CLASSES), "x_heldout.npy must be floating point of shape"),
    (a_data_set, dict(damage=edit("x.npy", half)), "x.npy cannot be read"),
    (a_data_set, dict(damage=remove("x.npy")), "x.npy or y.npy is missing"),
    (a_data_set, dict(damage=lambda to: np.save(to / "y.npy", [print], allow_pickle=True)), "y.npy cannot be read"),
    (a_data_set, dict(damage=edit("meta.json", lambda content: b"{")), "meta.json is not JSON"),
    (a_data_set, dict(damage=remove("meta.json")), "No such file.*meta.json"),
    (a_data_set, dict(then=lambda data: exp_freedom.load_images(exp_freedom.Config(data=data), "cpu")),
     "set has no x_heldout.npy"),
    # data/prepare.py
    *((prepared, dict(name=name, damage=damage), message) for name, damage, message in [
        ("mnist", remove(TEST_Y), f"{TEST_Y}: missing"),
        ("mnist", edit(MNIST_X, lambda content: content[:-1]), f"{MNIST_X} and {MNIST_Y} are damaged, or do not fit"),
        ("mnist", edit(MNIST_Y, lambda content: content[:-1] + b"\x0a"), "y of .* labels in 0 .. 9, not . .. 10"),
        ("mnist", lambda src: (src / MNIST_X).rename(src / f"{MNIST_X}.gz"), f"{MNIST_X}.gz: cannot be read whole"),
        ("cifar10", edit("c.tar.gz", half), "c.tar.gz: cannot be read whole"),
        ("cifar10", lambda src: write_tar(src / "c.tar.gz", {}), r"data_batch_5.bin of \[0, 0, 0, 0, 0\] bytes"),
        ("cifar10", edit("c.tar.gz", lambda content: gzip.compress(b"hello" * 999)), "c.tar.gz: no tar file is in it"),
        ("cifar10", remove("c.tar.gz"), "--source .*c.tar.gz: there is no such"),
        ("folder", lambda src: None, "src: no images in this folder"),
        ("folder", lambda src: write(src, {"a.png": b"junk"}), "a.png cannot be read as an image"),
        *(("folder", lambda src, mode=mode: Image.new(mode, (9, 9)).save(src / "a.tif"),
           "a.tif cannot be read as an image: its pixels are of mode") for mode in ("I", "I;16", "F")),
        ("folder", lambda src: Image.new("L", (9, 9)).save(src / "a.png"), "1 images, expected at least 6"),
        ("folder", lambda src: write(src, {"../out/notes.txt": b"mine"}), "holds other files than a data set"),
        ("imagenet", lambda src: write(src, {"n00/n01/a.png": b""}), "a.png does not lie in a class folder"),
        ("imagenet", lambda src: write(src, {"n00/a.png": b"", "n01/a.txt": b""}), "n01: no images in this folder")]),
    # training
    (training, dict(batch=10, accum=3), "is not divisible"),
    (training, dict(device="tpu"), "device 'tpu' is not available here: expected auto, cuda, mps or cpu"),
    (training, dict(steps=0), "steps must be at least 1"),
    (training, dict(ema=1.5), "ema must lie in 0 .. 1, not 1.5"),
    (training, dict(lr=float("nan")), "Invalid learning rate: nan"),
    (training, dict(repa=1.0, repa_depth=3), "block 3 of a SiT, but SiT-nano/4 has 2"),
    (training, dict(repa=1.0, repa_depth=1, model="UNet-nano-conv"), "a SiT, but UNet-nano-conv has 0"),
    (training, dict(repa=1.0, repa_depth=1, model="SiT-nano/2"), r"features.npy beside x.npy of .* \(50, 16, dim\)"),
    (training, dict(repa=1.0, repa_depth=1, features=np.ones((50, 4, 5), int)), "features.npy .* not int64"),
    (resumed, dict(lr=0.5), "with lr = 0.003, not 0.5"),
    (resumed, dict(steps=1), "at step 2, past the 1"),
    (resumed, dict(damage=edit("toy/x.npy", lambda content: content[:-4] + bytes(4))), "other data"),
    (resumed, dict(damage=edit("run/ckpt.pt", half)), "ckpt.pt is damaged"),
    (resumed, dict(damage=edit("run/ckpt.pt", flip)), "ckpt.pt is damaged"),
    (resumed, dict(damage=lambda folder: (folder / "run/ema_1.pt").replace(folder / "run/ckpt.pt")),
     "ckpt.pt does not fit the model"),
    (started_from_a_run, dict(model="SiT-micro/4"), "does not fit the model"),
    (started_from_a_run, dict(prediction="x"), "predicts v, this run x"),
    # weights
    (a_checkpoint, dict(change=lambda state: [state]), "ckpt.pt is damaged, or holds other things .* a list, no dict"),
    (a_checkpoint, dict(change=lambda state: dict(f=print)), "ckpt.pt is damaged, or holds other things than weights"),
    (a_checkpoint, dict(change=without("ema")), "ckpt.pt holds no weights of the name ema"),
    (a_checkpoint, dict(change=with_nan), "ckpt.pt holds weights that are not finite"),
    (official, dict(change=lambda state: dict(ema=state, args=argparse.Namespace(path_type="Linear", prediction="x"))),
     "w.pt: its args say path linear and prediction x, expected linear and v"),
    (official, dict(change=without("blocks.1")), r"w.pt: not the weights of an official SiT \(KeyError\(\(1, 32\)\)\)"),
    (official, dict(change=plus("blocks.0.q.weight", 1)), 'w.pt .* Unexpected key.*"blocks.0.q.weight"'),
    (official, dict(change=plus("x_embedder.proj.weight", 32, 16)), "w.pt: not the weights of"),
    # sampling
    (the_sampler, dict(n=0), "n must be at least 1"),
    (the_sampler, dict(label=10), "label 10 is none"),
    (the_sampler, dict(run="nowhere"), "no checkpoint"),
    (the_sampler, dict(out="a.jpg"), "--out a.jpg: expected NAME.npz"),
    (the_sampler, dict(in_channels=4, out="a.npz"), "samples latents of 4 channels: give their autoencoder, --vae"),
    # experiments
    (measured, dict(write_weights=trained, y=np.arange(50)[::-1] % 4), r"ckpt.pt was not trained on .* \(1, 8, 4\)"),
    (measured, dict(write_weights=write_run), r"ckpt.pt was not trained on .* \(1, 8, 10\)"),
    (measured, dict(write_weights=write_run, y=np.zeros(50, int)), "--overlap-class has fewer than two images"),
    (experiment, dict(script=exp_freedom, per_class=60), "ratio 8 needs 480 images of each class, 1617 are too few"),
    (experiment, dict(script=exp_scaling, model_path=("a.pt",)), "two networks or more, small to large"),
    (the_call, dict(call=lambda folder: stand_ins.pick_rows(exp_scaling.Config(n_points=1000), dict(x=X))),
     "n_points must lie between 2 and 12"),
    (the_call, dict(call=lambda folder: exp_gaussian.train(replace(GAUSSIAN, lr=1000), 8)), "try --lr 100$"),
    (the_call, dict(call=lambda folder: next(exp_toy2d.fit_all(replace(TOY, steps=20, lr=1e30)))), "MLP diverged"),
    (the_call, dict(call=lambda folder: exp_shells.main(exp_shells.Config(redraw=True, out=str(folder)))),
     "No such file.*results.json"),
]


def contents(folder):
    """Return the bytes of all files of a folder, but for locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("prepare_call, mistake, message", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(prepare_call, mistake, message, tmp_path, monkeypatch):
    # what `official` writes is smaller than SiT-S
    monkeypatch.setitem(weights.SIT_SIZES, "S", (2, 32, 2))
    call = prepare_call(tmp_path, **mistake)
    before = contents(tmp_path)
    with pytest.raises((ValueError, OSError, ImportError), match=message) as failure:
        call()
    assert "\n" not in str(failure.value) and contents(tmp_path) == before
