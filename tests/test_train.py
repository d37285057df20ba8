"""The trainer: the loss, the same update on any number of processes, exact resume through kills, refusals."""
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sample import Given
from torch import nn

import train
from plumbing import data as sets
from plumbing.files import load_run, lock_folder

ROOT = Path(__file__).resolve().parents[1]


def write_toy(folder, **changes):
    """Write a small data set: 50 images of 8 x 8 in 4 classes, and a teacher's features. Return its folder."""
    rng = np.random.default_rng(0)
    y = np.arange(50) % 4
    x = np.clip(0.3 * rng.standard_normal((50, 1, 8, 8)) + (y / 2 - 0.75)[:, None, None, None], -1, 1)
    arrays = dict(x=x.astype(np.float32), y=y, x_heldout=x[:9].astype(np.float32), y_heldout=y[:9],
                  features=rng.standard_normal((50, 4, 5)).astype(np.float16))
    sets.save_dataset(folder, arrays | changes, dict(name="toy", num_classes=4))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("data") / "toy")


def config(folder, out, **changes):
    fields = dict(data=folder, model="SiT-nano/4", steps=6, batch=12, log_every=2, save_every=3, device="cpu", warmup=0,
                  decay=0.0, out=str(out), grid=False)
    return train.Config(**fields | changes)


def weights(run, key="ema"):
    state = torch.load(Path(run) / "ckpt.pt", weights_only=True)[key]
    return torch.cat([v.flatten().double() for v in state.values()])


def read_log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def torchrun(n, cfg):
    flags = []
    for name, value in dataclasses.asdict(cfg).items():
        if not isinstance(value, (bool, tuple)):
            flags.append(f"--{name.replace('_', '-')}={value}")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone",
               ROOT / "train.py", *flags, "--no-grid"]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


# ---- one step --------------------------------------------------------------------------------------------------------

def test_loss_of_a_perfect_and_of_a_zero_model():
    x, eps, t = torch.randn(400, 1, 8, 8), torch.randn(400, 1, 8, 8), torch.rand(400)
    x[:] = x[0]                                              # one data point: v = (z - x)/t is known

    def loss(f, prediction):
        return train.Objective(Given(f, prediction))(x, None, t, eps)[0]

    assert loss(lambda z, t, y: (z - x) / t[:, None, None, None], "v") < 1e-4
    assert loss(lambda z, t, y: x, "x") == 0
    assert torch.isclose(loss(lambda z, t, y: torch.zeros_like(z), "v"), (eps - x).square().mean())


def test_each_epoch_sees_every_image_once():
    seen = np.concatenate([train.step_indices(k, 7, 50, seed=0) for k in range(100)])       # 14 epochs of 50
    for epoch in seen.reshape(14, 50):
        assert sorted(epoch) == list(range(50))
    assert (seen[:50] != seen[50:100]).any()
    assert len(train.step_indices(0, 120, 50, seed=0)) == 120                               # a batch of several epochs


def test_noise_of_a_step_is_a_function_of_seed_and_step():
    cpu = torch.device("cpu")
    a, b, other = (train.step_noise(k, (8, 1, 2, 2), 1, cpu) for k in (5, 5, 6))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True)) and not torch.equal(a[1], other[1])
    t, eps, u = train.step_noise(0, (20_000, 1, 1, 1), seed=0, device=cpu)
    assert abs(t.mean() - 0.5) < 0.01 and abs(eps.std() - 1) < 0.02 and abs((u < 0.1).float().mean() - 0.1) < 0.01


def test_learning_rate():
    cfg = train.Config(lr=2.0, warmup=4, steps=100, decay=0.0)
    assert [train.learning_rate(cfg, k) for k in (0, 1, 3, 50, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cfg = dataclasses.replace(cfg, decay=1.0)
    assert train.learning_rate(cfg, 50) == 1.0 and 0 < train.learning_rate(cfg, 99) < 0.03
    cfg = dataclasses.replace(cfg, decay=0.5)
    assert train.learning_rate(cfg, 50) == 2.0 and train.learning_rate(cfg, 75) == 1.0


def test_repa_against_its_formula():
    torch.manual_seed(0)
    model = train.build_model("SiT-nano/4", 8, 1, 4)
    for p in model.parameters():                             # not the zeros that a fresh SiT has in its last layers
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    objective, features = train.Objective(model, 1, 5), torch.randn(3, 4, 5)
    x, eps, t, y = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 4])
    z = (1 - t.view(3, 1, 1, 1)) * x + t.view(3, 1, 1, 1) * eps
    dsm, alignment = objective(x, y, t, eps, features)
    assert torch.equal(dsm, train.Objective(model)(x, y, t, eps)[0])
    tokens = model(z, t, y, tokens_after=1)[1]
    out = objective.projector(tokens).detach().double().numpy()
    cosine = (out * features.numpy()).sum(2) / np.linalg.norm(out, axis=2) / np.linalg.norm(features.numpy(), axis=2)
    assert abs(alignment.item() + cosine.mean()) < 1e-6
    alignment.backward()
    assert model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0 and model.blocks[1].mlp.fc1.weight.grad is None


def test_the_projector_is_the_official_one():
    with torch.device("meta"):
        model = train.build_model("SiT-S/2", 32, 4, 1000)
    layers = train.Objective(model, 8, 768).projector[::2]
    assert [tuple(m.weight.shape) for m in layers] == [(2048, 384), (2048, 2048), (768, 2048)]
    assert all((m.bias == 0).all() for m in layers)


# ---- runs ------------------------------------------------------------------------------------------------------------

def test_the_update_is_adams(data, tmp_path):
    """Three steps by hand, without the trainer's loop: the same weights, bit for bit."""
    cfg = config(data, tmp_path / "a", steps=3, label_dropout=0.3)
    run = train.train(cfg)
    torch.manual_seed(cfg.seed)
    model = train.build_model("SiT-nano/4", 8, 1, 4)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, cfg.lr, weight_decay=0, fused=True)
    mean = torch.cat([v.flatten().double() for v in model.state_dict().values()])
    loaded = sets.load_data(data)
    for step in range(3):
        x, y = sets.get_images(loaded, train.step_indices(step, 12, 50, 0), "cpu")
        t, eps, drop = train.step_noise(step, x.shape, 0, torch.device("cpu"))
        y[drop < 0.3] = 4
        t_ = t.view(-1, 1, 1, 1)
        optimizer.zero_grad()
        (model((1 - t_) * x + t_ * eps, t, y) - (eps - x)).square().mean().backward()
        optimizer.step()
        now = torch.cat([v.flatten().double() for v in model.state_dict().values()])
        mean += (now - mean) * (1 - min(cfg.ema, (1 + step) / (10 + step)))
    assert torch.equal(weights(run, "model"), now)
    assert (weights(run) - mean).abs().max() < 1e-6


def test_resume_continues_exactly(data, tmp_path):
    for name, changes in dict(plain={}, repa=dict(repa=0.5, repa_depth=1)).items():
        whole = train.train(config(data, tmp_path / f"{name}_whole", **changes))
        part = train.train(config(data, tmp_path / f"{name}_part", steps=3, **changes))
        train.train(config(data, part, **changes))
        for key in ("model", "ema", *(["projector"] if changes else [])):
            assert torch.equal(weights(whole, key), weights(part, key))
        assert read_log(whole)[-1]["loss"] == read_log(part)[-1]["loss"]
        before = (part / "ckpt.pt").stat().st_mtime_ns
        train.train(config(data, part, **changes))           # nothing is left to do
        assert (part / "ckpt.pt").stat().st_mtime_ns == before


def test_accumulation_and_two_processes_make_the_update_of_one(data, tmp_path):
    changes = dict(steps=4, repa=0.5, repa_depth=1)
    one = train.train(config(data, tmp_path / "one", **changes))
    parts = train.train(config(data, tmp_path / "parts", accum=3, **changes))
    done = torchrun(2, config(data, tmp_path / "two", accum=2, **changes))
    assert done.returncode == 0, done.stderr[-2000:]
    for other in (parts, tmp_path / "two"):
        for key in ("model", "ema", "projector"):
            assert (weights(one, key) - weights(other, key)).abs().max() < 1e-5
        losses = [[r["loss"] for r in read_log(run)] for run in (one, other)]
        assert np.allclose(*losses, rtol=1e-4)               # the logged loss is that of the global batch
    assert "2 process(es)" in done.stdout and done.stdout.count("parameters") == 1


def test_several_processes_refuse_in_one_line(data, tmp_path):
    done = torchrun(2, config(data, tmp_path / "run", steps=-4))
    assert done.returncode == 1 and done.stderr.count("error: steps must be at least 1, not -4") == 1, done.stderr


def train_quietly(cfg):
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    train.train(cfg)


def test_killed_at_random_moments_it_ends_the_same(data, tmp_path):
    """SIGKILL. A checkpoint is written at every third step, so that writes are killed too."""
    server = multiprocessing.get_context("forkserver")       # it imports torch once, so that a child starts in no time
    server.set_forkserver_preload(["train", "torch._dynamo"])
    cfg = config(data, tmp_path / "whole", steps=120, log_every=4, save_every=3)
    train.train(cfg)
    kills, rng = 0, random.Random(0)
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "killed"))
    while True:
        child = server.Process(target=train_quietly, args=(cfg,))
        child.start()
        child.join(rng.uniform(0.05, 0.6) if kills < 8 else None)
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        child.kill()
        child.join()
        kills += 1
    assert kills >= 5, "it was too quick to be killed so often"
    for key in ("model", "ema"):
        assert torch.equal(weights(tmp_path / "whole", key), weights(tmp_path / "killed", key))
    whole, killed = map(read_log, (tmp_path / "whole", tmp_path / "killed"))
    assert [(r["step"], r["loss"]) for r in killed] == [(r["step"], r["loss"]) for r in whole]
    assert not list((tmp_path / "killed").glob(".*.tmp.*"))


def test_weights_to_start_from_and_weights_that_are_kept(data, tmp_path):
    one = train.train(config(data, tmp_path / "one", keep=(2, 4)))
    two = train.train(config(data, tmp_path / "two", init=str(one), lr=1e-30, steps=1))
    assert (weights(two) - weights(one)).abs().max() < 1e-6
    short = train.train(config(data, tmp_path / "short", steps=2))
    kept = torch.cat([v.flatten().double() for v in load_run(one / "ema_2.pt").state_dict().values()])
    assert torch.equal(kept, weights(short)) and (one / "ema_4.pt").exists() and not (one / "ema_6.pt").exists()
    # to go on, the weights that a run started from are not needed again
    shutil.rmtree(one)
    train.train(config(data, two, init=str(one), lr=1e-30, steps=2))


def test_folders_of_runs(data, tmp_path):
    from plumbing.runs import run_folder

    def name(cfg):
        return run_folder(cfg, train.PRESETS[cfg.preset], train.MAY_CHANGE).name

    default = train.Config()
    assert name(default) == f"laptop_mnist5k_{default.model.replace('/', '-')}"
    assert name(train.Config(lr=0.1, device="cpu", steps=7)) == name(default) + "_steps=7_lr=0.1"
    # a folder whose name ends in .pt is a run's folder all the same
    run = train.train(config(data, tmp_path / "run_init=a.pt", steps=2))
    load_run(run)


# ---- refusals --------------------------------------------------------------------------------------------------------

def test_diverged_training_keeps_the_last_checkpoint(data, tmp_path):
    run = train.train(config(data, tmp_path / "a", steps=4))
    kept = weights(run)
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    checkpoint["config"]["lr"] = 1e30
    torch.save(checkpoint, run / "ckpt.pt")
    with pytest.raises(ValueError, match="the loss is (nan|inf) at step .*: it diverged"):
        train.train(config(data, run, steps=60, lr=1e30, log_every=30, save_every=2))
    assert torch.equal(weights(run), kept)


def test_one_run_has_one_writer(data, tmp_path):
    lock = lock_folder(tmp_path / "a")
    with pytest.raises(OSError, match="could not be acquired"):
        train.train(config(data, tmp_path / "a"))
    del lock
    train.train(config(data, tmp_path / "a"))
