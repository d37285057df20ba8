"""Everything on a device that is not there, see elsewhere.py: nothing mixes places, uses float64 on a Mac's GPU, or
comes out otherwise than on the CPU."""
import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from elsewhere import elsewhere
from test_experiments import TINY, run_script

import train
from empirical_score import EmpiricalScore
from plumbing.data import feed_steps, load_data, save_dataset
from plumbing.fast_score import FastEmpiricalScore


@pytest.fixture(params=["cuda", "mps"])
def kind(request):
    with elsewhere(request.param):
        yield request.param


def test_the_device_refuses_what_a_real_one_does(kind):
    a, b, linear = torch.ones(3, device=kind), torch.ones(3), torch.nn.Linear(3, 3).to(kind)
    there = (a, a + 1, a[0], a.new_zeros(2), a.view(3, 1), b.to(kind), b.to(a), linear(a))
    assert [x.device.type for x in there] == [kind] * 8
    assert [x.device.type for x in (b, a.cpu(), a.to("cpu"), torch.from_numpy(np.ones(2)))] == ["cpu"] * 4
    g = torch.Generator(kind).manual_seed(0)
    for f in (lambda: a + b, lambda: torch.cat([a, b]), lambda: linear(b), lambda: torch.rand(3, generator=g)):
        with pytest.raises(RuntimeError):
            f()
    with pytest.raises(TypeError):
        a.numpy()
    if kind == "mps":
        for f in (a.double, lambda: torch.zeros(1, dtype=torch.float64, device=kind)):
            with pytest.raises(TypeError, match="float64"):
                f()


@pytest.mark.parametrize("engine", [EmpiricalScore, FastEmpiricalScore])
def test_the_empirical_score(kind, engine):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 10
    x = 2 * torch.randn(10, 3, 4, 4, generator=g)[y] + torch.randn(600, 3, 4, 4, generator=g)
    truth = EmpiricalScore(x.double(), y)
    if kind == "mps":
        # float64 is refused on a Mac's GPU: the score computes on the CPU there
        there = engine(x, y, device="cpu")
    else:
        there = engine(x.to(kind), y.to(kind), device=kind)
    # The fast engine screens small questions, too.
    there.small = 0
    for t in (0.3, 0.95):
        z = (1 - t) * x[:20] + t * torch.randn(20, 3, 4, 4, generator=g)
        for label in (None, y[:20]):
            want = truth.score(z.double(), t, label)
            got = there.score(z.to(kind), t, None if label is None else label.to(kind))
            assert got.device.type == kind
            assert (got.cpu() - want).abs().max() < 2e-5 * max(1, want.abs().max())
        for name, more in dict(r_star=(t,), nearest=(3,)).items():
            want, got = getattr(truth, name)(z.double(), *more), getattr(there, name)(z.to(kind), *more)
            assert torch.equal(got[1].cpu(), want[1])


def test_training(kind, tmp_path):
    """The same weights as on the CPU, whose noise this device draws."""
    data = load_data("digits")
    features = np.random.default_rng(0).normal(size=(len(data["x"]), 4, 6)).astype(np.float16)
    arrays = {k: np.array(data[k]) for k in ("x", "y", "x_heldout", "y_heldout")} | dict(features=features)
    save_dataset(tmp_path / "toy", arrays, data["meta"])
    cfg = train.Config(data=str(tmp_path / "toy"), model="SiT-nano/4", steps=8, batch=16, accum=2, repa=0.5,
                       log_every=4, decay=0.0, repa_depth=1, save_every=4, keep=(4,), device=kind)

    def weights(out, **fields):
        run = train.train(dataclasses.replace(cfg, out=str(tmp_path / out), **fields))
        return torch.cat([w.flatten() for w in torch.load(run / "ckpt.pt")["model"].values()])
    cpu = weights("cpu", device="cpu")
    weights("there", steps=4)
    # a GPU computes in bfloat16
    assert (weights("there") - cpu).abs().max() < (0.02 if kind == "cuda" else 1e-5)


def test_data_that_do_not_fit_a_gpu():
    """Other processes read them, and a step gets the same rows as from data that lie on the GPU."""
    arrays = [np.random.default_rng(0).normal(size=(30, 2)), np.arange(30)]
    asked_here = []

    def rows_of_step(step):
        asked_here.append(step)
        return np.arange(3 * step, 3 * step + 4)

    def read():
        batches = list(feed_steps(arrays, rows_of_step, range(2, 9), torch.device("cuda")))
        assert all(a.device.type == "cuda" for _, batch in batches for a in batch)
        return [(step, x.cpu().tolist(), y.cpu().tolist()) for step, (x, y) in batches]

    with elsewhere("cuda"):
        on_gpu = read()
        assert asked_here == [step for step, _, _ in on_gpu] == list(range(2, 9))
        with mock.patch.object(torch.cuda, "mem_get_info", lambda device: (1000, 80 * 10**9)):
            assert read() == on_gpu and len(asked_here) == 7


@pytest.mark.parametrize("name", sorted(TINY))
def test_experiments(kind, name, tmp_path):
    if kind == "mps" and name in ("exp_toy2d", "exp_gaussian"):
        pytest.skip("it computes in float64")
    argv = [a for a in TINY[name](tmp_path) if "--device" not in a] + ["--seeds=1"] * (name == "exp_shells")
    run_script(f"{name}.py", *argv, f"--device={kind}", f"--out={tmp_path / 'out'}")
    assert (tmp_path / "out" / "results.json").exists()
