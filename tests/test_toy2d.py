"""The 2D toy: its models against independent solutions, a tiny run, and the claims at a size where they are known."""
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.kernel_ridge import KernelRidge

import exp_toy2d as toy
import train

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--steps=20", "--n=200", "--nets=2", "--points=40", "--width=32", "--widths=8", "--bandwidths=0.5",
        "--ridges=1e-4", "--times=10", "--device=cpu"]
SMALL = dataclasses.replace(toy.Config(), nets=2, n=1000, steps=800, width=256, points=200, device="cpu")
CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the maths -------------------------------------------------------------------------------------------------------

def test_polar_coordinates():
    x = normal(50, 2)
    assert (toy.unpolar(toy.polar(x)) - x).abs().max() < 1e-12
    p = toy.polar(x) * torch.tensor([1.0, 3.0, 3.0])                         # the length of (cos, sin) does not matter
    assert (toy.unpolar(p) - x).abs().max() < 1e-12
    want = torch.tensor([[1.0, -1, 0], [0.2, -1, 0], [0.2, 1, 0], [1, 1, 0]]).double()
    assert (toy.polar(toy.D) - want).abs().max() < 1e-7
    assert toy.polar(torch.zeros(1, 2)).isfinite().all()
    near = lambda x: (x[:, None] - x).norm(dim=-1).fill_diagonal_(9).argmin(1).tolist()
    assert near(toy.D) == [1, 2, 1, 2] and near(toy.polar(toy.D)) == [1, 0, 3, 2]    # -.2 and .2 are close in one only


def test_posterior_mean_is_the_softmax_over_the_four_points():
    z, t = normal(3, 40, 2), torch.linspace(1e-3, 1, 120, dtype=torch.float64).view(3, 40)
    for x, at in ((toy.D, z), (toy.polar(toy.D), toy.polar(z))):
        logits = -(at[..., None, :] - (1 - t)[..., None, None] * x).square().sum(-1) / (2 * t[..., None]**2)
        assert (toy.posterior_mean(x, at, t) - logits.softmax(-1) @ x).abs().max() < 1e-9


def test_noisy_points_have_the_moments_of_p_t():
    t = torch.full((200_000,), 0.3, dtype=torch.float64)
    z = toy.noisy(toy.D, t, torch.Generator().manual_seed(0))
    want = 0.7**2 * torch.tensor([0.52, 0.0]) + 0.3**2                       # E x^2 of D is .52
    assert z.mean(0).abs().max() < 0.01 and (z.square().mean(0) - want).abs().max() < 0.01


def test_radial_equivariance():
    """P3: f(a z) = a f(z) to 1e-5, for the network as initialised, and for x_theta as trained; not so the plain MLP."""
    cfg, grid = dataclasses.replace(SMALL, steps=30), toy.time_grid(SMALL)
    z = normal(2, 64, 2)
    for name, equivariant in (("equivariant MLP", True), ("MLP", False)):
        x_theta = toy.fit_mlp(cfg, toy.D, 64, equivariant, grid, CPU)
        error = max(((x_theta(a * z, i) / a - x_theta(z, i)).abs().max() / x_theta(z, i).abs().max()).item()
                    for a in (0.01, 0.5, 3.0, 100.0) for i in (0, 20, 39))
        assert error < 1e-5 if equivariant else error > 0.1, (name, error)
    weights = [normal(2, *shape).float() for shape in ((3, 16), (1, 16), (16, 2), (1, 2))]
    t = torch.rand(2, 64)
    f = lambda z: toy.mlp(weights, z.float(), t, equivariant=True)
    assert (f(7 * z) / 7 - f(z)).abs().max() < 1e-5 * f(z).abs().max()


def test_batched_networks_are_the_ordinary_ones():
    weights = [normal(3, *shape) for shape in ((3, 16), (1, 16), (16, 2), (1, 2))]
    z, t = normal(3, 5, 2), normal(3, 5).abs()
    for k in range(3):
        W1, b1, W2, b2 = (w[k] for w in weights)
        want = (torch.cat([z[k], t[k, :, None]], 1) @ W1 + b1).clamp_min(0) @ W2 + b2
        assert (toy.mlp(weights, z, t)[k] - want).abs().max() < 1e-12


@pytest.mark.parametrize("features", [toy.polar, lambda z: z])
def test_kernel_regression_against_scikit_learn(features):
    cfg, h, ridge = dataclasses.replace(SMALL, points=50), 0.7, 1e-3
    grid = torch.tensor([0.9, 0.3, 0.05], dtype=torch.float64)
    x_theta, query = toy.fit_krr(cfg, features, h, ridge, grid, CPU), normal(2, 30, 2, seed=1)
    g = torch.Generator().manual_seed(cfg.seed)
    for i, t in enumerate(grid):
        z = toy.noisy(toy.D, t.expand(2, 50), g)
        y, got = toy.posterior_mean(toy.D, z, t.expand(2, 50)).numpy(), x_theta(query, i).numpy()
        for k in range(2):
            model = KernelRidge(alpha=ridge * 50, kernel="rbf", gamma=1 / (2 * h**2))
            model.fit(features(z[k]).numpy(), y[k] - y[k].mean(0))
            assert np.abs(model.predict(features(query[k]).numpy()) + y[k].mean(0) - got[k]).max() < 1e-9


def test_sampler_on_flows_known_in_closed_form():
    grid = toy.time_grid(toy.Config())
    z, x = normal(1, 200, 2), normal(1, 200, 2, seed=1)
    assert (toy.sample(lambda z, i: x, z, grid) - x).abs().max() < 1e-12     # one data point each
    # data N(0, 1): E[x | z] = alpha z / (alpha^2 + t^2), and the flow scales z by the standard deviation of p_t, 1 -> 1
    gaussian = lambda grid: lambda z, i: (1 - grid[i]) / ((1 - grid[i])**2 + grid[i]**2) * z
    error = [(toy.sample(gaussian(g), z, g) / z - 1).abs().max().item()
             for g in (grid, toy.time_grid(dataclasses.replace(toy.Config(), times=80)))]
    assert error[0] < 5e-3 and error[1] < error[0] / 2
    star = lambda z, i: toy.posterior_mean(toy.D, z, grid[i].expand(z.shape[:2]))    # the perfect model memorizes
    assert (toy.kind_of(toy.sample(star, normal(1, 500, 2), grid), 0.1) == 2).float().mean() > 0.99
    assert toy.supervision_loss(star, toy.D, grid, 1, 0).abs().max() < 1e-20
    mean = toy.supervision_loss(lambda z, i: 0 * z, toy.D, grid, 1, 0)       # E|x_*|^2 / .52: 1 at t = 0, 0 at 1
    assert 0.3 < mean.item() < 0.6


def test_kinds_of_samples():
    x = [0, 0.05, -0.09, 0.11, -0.25, 0.29, 0.31, -0.6, 0.89, 0.91, -1.0, 1.09, 1.2, 0.6, 0.0]
    y = [0, 0.05, 0.0, 0, 0, 0, 0, 0.09, 0, 0, 0, 0, 0, 0.11, -0.5]
    want = [0, 0, 0, 2, 2, 2, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert toy.kind_of(torch.tensor([x, y]).T, 0.1).tolist() == want
    assert toy.kind_of(toy.D, 1e-3).tolist() == [2, 2, 2, 2]


def test_least_loss_of_a_homogeneous_function():
    """Quadrature against itself, and against least squares within narrow sectors of many noisy points."""
    best = toy.best_homogeneous()
    assert abs(toy.best_homogeneous(360, 300, 20) - best) < 1e-5
    g, total, times = torch.Generator().manual_seed(0), 0.0, 24
    for j in range(times):
        t = torch.full((100_000,), (j + 0.5) / times, dtype=torch.float64)
        z = toy.noisy(toy.D, t, g)
        x, r = toy.posterior_mean(toy.D, z, t), z.norm(dim=1)
        order = torch.atan2(z[:, 1].abs(), z[:, 0]).argsort()                # sectors of 200 points
        y = z[:, 1:].sign()
        x, r = (x * torch.cat([torch.ones_like(y), y], 1))[order].view(-1, 200, 2), r[order].view(-1, 200, 1)
        rest = x - r * ((x * r).sum(1, keepdim=True) / (r * r).sum(1, keepdim=True))
        total += rest.square().sum(-1).mean().item() * 200 / 199 / times     # two coordinates, one coefficient each
    assert abs(total / 0.52 / best - 1) < 0.03, (total / 0.52, best)


def test_intervals_and_verdicts():
    values = normal(6).numpy()
    want = scipy.stats.t.interval(0.95, 5, values.mean(), scipy.stats.sem(values))
    assert np.abs(np.subtract(toy.interval(values), want)).max() < 1e-3
    assert np.abs(np.subtract(toy.STUDENT, scipy.stats.t.ppf(0.975, range(1, 10)))).max() < 5e-3
    for hits in (0, 3, 10):
        assert np.abs(np.subtract(toy.wilson(hits / 10, 10), train.wilson(hits, 10))).max() < 1e-12
    for ci in ((1, 2), (-1, 2), (-2, -1)):
        for bound in (dict(low=0.0), dict(high=0.0), dict(low=-1.5, high=2.0)):
            assert toy.claim("c", "0", 1, ci, **bound) == train.claim("c", "0", 1, ci, **bound)


def test_equal_loss_of_a_known_curve(monkeypatch, capsys):
    """What it finds gives the loss asked for, to 2%, with a number that makes L rise or fall; else there is none."""
    monkeypatch.setattr(toy, "supervision_loss", lambda loss, *_: torch.tensor(loss))
    for better, worse, loss in ((1e-8, 1.0, lambda ridge: ridge**0.3), (2000, 1, lambda steps: 5 / steps)):
        found = toy.equal_loss("", loss, 0.03, better, worse, SMALL)
        assert abs(loss(found) / 0.03 - 1) < 0.02 and not capsys.readouterr().out
        for L in (0.9 * loss(better), 1.1 * loss(worse)):
            assert toy.equal_loss("P9:", loss, L, better, worse, SMALL) is None
            assert capsys.readouterr().out.startswith("P9: left out")


def test_ridge_and_steps_at_equal_loss():
    cfg, grid = dataclasses.replace(SMALL, points=100, times=10), toy.time_grid(dataclasses.replace(SMALL, times=10))
    ridge = lambda ridge: toy.fit_krr(cfg, toy.polar, 1.0, ridge, grid, CPU)
    steps = lambda steps: toy.fit_mlp(dataclasses.replace(cfg, steps=round(steps)), toy.D, 64, False, grid, CPU)
    for fit, better, worse, at in ((ridge, 1e-6, 1.0, 1e-3), (steps, 300, 1, 100)):
        loss = lambda number, fit=fit: toy.supervision_loss(fit(number), toy.D, grid, 2, cfg.seed + 2).mean()
        assert abs(loss(toy.equal_loss("", fit, loss(at), better, worse, cfg)) / loss(at) - 1) < 0.02


def test_brackets_are_the_wider_interval():
    alike, apart = np.array([0.1, 0.101, 0.1, 0.099]), np.array([0.1, 0.2, 0.1, 0.3])
    assert toy.bracket(alike, 2000) == toy.wilson(alike.mean(), 2000)
    assert toy.bracket(apart, 2000) == toy.interval(apart)
    assert toy.bracket(np.zeros(4), 2000) == (0.0, toy.wilson(0.0, 2000)[1])         # none below 0


# ---- a tiny run, beside empirical_score.py alone --------------------------------------------------------------------

def command(*argv, script=ROOT / "exp_toy2d.py"):
    return subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder of the results, what was printed) of one run in a folder that holds only the two files it needs."""
    alone = tmp_path_factory.mktemp("alone")
    for name in ("exp_toy2d.py", "empirical_score.py"):
        shutil.copy(ROOT / name, alone)
    done = command(*TINY, script=alone / "exp_toy2d.py")
    assert done.returncode == 0, done.stderr[-2000:]
    return alone / "out" / "exp_toy2d" / "laptop", done.stdout


def test_results_follow_the_contract(tiny):
    out, printed = tiny
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"script", "preset", "seed", "device", "seconds", "commit", "versions", "config", "claims",
                            "arrays"}
    assert results["script"] == "exp_toy2d" and results["preset"] == "laptop" and results["config"]["width"] == 32
    equal = [s for s in results["arrays"]["sweep"] if "equal L" in s["label"]]
    assert equal and all(abs(s["L"][1] / s["L"][0] - 1) < 0.03 for s in equal)       # 2%, and rounded
    assert len(results["claims"]) == 16 + 3 * len(equal)
    assert not any("as good" in row["claim"] for row in results["claims"] if row["claim"].startswith("P1"))
    for row in results["claims"]:
        assert set(row) == {"claim", "paper", "ours", "ci95", "verdict"}
        assert row["verdict"] in ("holds", "not resolved", "contradicted")
        assert row["claim"] in printed and len(row["claim"]) <= 74
        assert all(map(np.isfinite, (row["ours"], *row["ci95"]))) and row["ci95"][0] <= row["ci95"][1]
    for model in results["arrays"]["models"].values():
        assert len(model["samples"]) == 200 and abs(sum(f[0] for f in model["fraction"].values()) - 1) < 1e-3
        kinds = toy.kind_of(torch.tensor(model["samples"], dtype=torch.float64), 0.1).bincount(minlength=4) / 200
        assert (kinds - torch.tensor([f[0] for f in model["fraction"].values()])).abs().max() < 0.011   # rounded x
    for entry in (e for e in results["arrays"]["sweep"] if e["label"] == "margin"):      # the drawn samples, recounted
        for name, bad in zip(toy.PAIRS[entry["pair"]], entry["bad"], strict=False):
            samples = torch.tensor(results["arrays"]["models"][name]["samples"], dtype=torch.float64)
            assert abs((toy.kind_of(samples, entry["size"]) == 0).double().mean() - bad) < 0.011
    assert str(out / "results.png") in printed and (out / "results.png").stat().st_size > 20_000
    assert all((out / f"results.{kind}").stat().st_size < 300_000 for kind in ("json", "png"))


def test_a_figure_is_drawn_from_its_json_alone(tiny, tmp_path):
    out, _ = tiny
    shutil.copy(out / "results.json", tmp_path)
    done = command("--redraw", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.png").read_bytes() == (out / "results.png").read_bytes()


@pytest.mark.parametrize("argv, message", [
    (["--n=2001"], "a divisor of n = 2001"),
    (["--preset=huge"], "unknown preset 'huge'"),
    (["--redraw"], "nothing to redraw"),
])
def test_bad_input_is_one_line(argv, message, tmp_path):
    done = command(*argv, f"--out={tmp_path / 'out'}")
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("field, message", [
    (dict(n=0), "n must be positive, not 0"),
    (dict(ridges=(1e-6, 0.0)), "ridges must be positive, not 0"),
    (dict(lr=float("nan")), "lr must be positive, not nan"),
    (dict(nets=1), "nets must be 2 to 10"),
    (dict(margin=0.2), "margins must lie between 0 and .2"),
    (dict(margins=(0.02, 0.3)), "margins must lie between 0 and .2"),
    (dict(times=1), "times must be at least 2"),
    (dict(device="tpu"), "device 'tpu' is not available here"),
])
def test_bad_values_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        toy.check(dataclasses.replace(toy.Config(), **field))


def test_a_dry_run_foretells_and_writes_nothing(tmp_path, monkeypatch):
    done = command(*TINY, "--dry-run", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "17 models, 2 of each, on cpu: 0.00 GB of memory" in done.stdout and not any(tmp_path.iterdir())
    assert 0 < float(re.search(r"about ([\d.]+) minutes", done.stdout)[1]) < 3       # it takes seconds
    short = command(*TINY, "--dry-run", "--points=1000000", f"--out={tmp_path / 'out'}")
    assert short.returncode == 1 and short.stderr.startswith("error: ") and short.stderr.count("\n") == 1
    assert "GB of memory are needed" in short.stderr
    monkeypatch.setattr(toy.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match="MB are needed on the disk of"):
        toy.forecast(SMALL, tmp_path / "out")
    with pytest.raises(ValueError, match="nets must be 2 to 10"):
        toy.forecast(dataclasses.replace(SMALL, nets=1), tmp_path / "out")


def test_the_sweep_fits_every_model_once():
    sizes, main, todo = toy.sweep_of(toy.Config())
    assert sizes["P1"] == sizes["P3"] == [32, 128, 512] and len(sizes["P2"]) == 9 and len(set(todo)) == len(todo) == 27
    assert all(main[pair] in sizes[pair] for pair in toy.PAIRS)
    assert ("MLP", 512) in todo and (toy.RSC, (1.0, 1e-6)) in todo


def test_a_diverged_network_is_refused():
    with pytest.raises(ValueError, match="width 8 diverged: the loss is"):
        toy.fit_mlp(dataclasses.replace(SMALL, steps=5, lr=1e30), toy.D, 8, False, toy.time_grid(SMALL), CPU)


def test_singular_kernels_are_refused():
    with pytest.raises(ValueError, match="too small for bandwidth"):
        toy.fit_krr(SMALL, lambda z: z, 5.0, 1e-30, toy.time_grid(SMALL), CPU)


# ---- the claims, at a size where they are known to come out ----------------------------------------------------------

def test_what_comes_out_of_c4_and_what_does_not():
    P2 = (1.0, 1e-6)
    plain, polar, equivariant = (toy.evaluate(SMALL, name, 256, CPU) for name in (*toy.PAIRS["P1"], "equivariant MLP"))
    xy, rsc = (toy.evaluate(SMALL, name, P2, CPU) for name in toy.PAIRS["P2"])
    for baseline, pat in ((plain, polar), (xy, rsc)):
        assert baseline["bad"].mean() > 0.08                                 # the bad samples go away ...
        assert pat["bad"].mean() < 0.75 * baseline["bad"].mean()
    assert (rsc["bad"] < 0.02).all()
    assert (rsc["good"] < xy["good"]).all()                                  # ... but they do not turn into good ones
    assert (equivariant["good"] > plain["good"] + 0.1).all()
    assert all((m["L"] < 0.02).all() for m in (plain, polar, equivariant, xy, rsc))
    assert (equivariant["L"] > 0.95 * toy.best_homogeneous()).all()          # 5%: L is measured on 20,000 points
