"""exp_gaussian.py: the closed forms, what one step sees, the intervals, and the claims at a size where they hold."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import exp_gaussian as g
from empirical_score import EmpiricalScore, score_from_x, x_from_score

ROOT = Path(g.__file__).parent
SMALL = g.Config(points=(3, 8), seeds=2, d=4, depth=3, width=16, iterations=20, batch=6, n_eval=40, eval_every=10)
gen = lambda seed: torch.Generator().manual_seed(seed)


def worst(a, b):
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()


# ---- the maths -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_truth_is_the_score_of_noisy_gaussian_data(t):
    z = torch.randn(50, 20, dtype=torch.float64, generator=gen(0)).requires_grad_()
    cov = torch.eye(20, dtype=torch.float64) * ((1 - t)**2 + t**2)               # of (1 - t) x + t eps, both N(0, I)
    log_p = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=torch.float64), cov).log_prob(z)
    z, s = z.detach(), torch.autograd.grad(log_p.sum(), z)[0]
    assert worst(g.ground_truth_score(z, t), s) < 1e-12
    assert worst(g.ground_truth_x(z, t), x_from_score(s, z, t)) < 1e-11


def test_truth_is_what_a_great_many_points_would_teach():
    """In one dimension 200,000 points are dense: there the empirical score is the true one, up to sampling noise."""
    E = EmpiricalScore(torch.randn(200_000, 1, generator=gen(1)).double())
    z = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    for t in (0.3, 0.6, 0.95):
        assert worst(E.score(z, t), g.ground_truth_score(z, t)) < 0.06
        assert worst(E.posterior_mean(z, t), g.ground_truth_x(z, t)) < 0.02


def test_weighted_error_is_one_of_scores():
    """|x_theta - x_*|^2 is lambda(t) |s_theta - s_*|^2 with lambda = t^4/(1 - t)^2 and s_theta = -((1 - t) v + z)/t."""
    x, z = torch.randn(2, 30, 5, dtype=torch.float64, generator=gen(2))
    v, E = torch.randn(30, 5, dtype=torch.float64, generator=gen(3)), EmpiricalScore(x)
    for t in (0.05, 0.4, 0.9):
        s = -((1 - t) * v + z) / t
        for star, s_star in ((E.posterior_mean(z, t), E.score(z, t)),
                             (g.ground_truth_x(z, t), g.ground_truth_score(z, t))):
            mine = (z - t * v - star).square().sum(1)
            assert worst(mine, t**4 / (1 - t)**2 * (s - s_star).square().sum(1)) < 1e-9
        assert worst(s, score_from_x(z - t * v, z, t)) < 1e-9


def test_networks_side_by_side_are_networks():
    """Each of M against a plain torch.nn.Sequential, and no gradient passes between them."""
    cfg = replace(SMALL, depth=4)
    layers = [[p.double().requires_grad_() for p in layer] for layer in g.initial_layers(cfg, gen(0))]
    with torch.no_grad():
        for p in [b for _, b in layers] + [layers[-1][0]]: p.copy_(torch.randn(p.shape, generator=gen(4)))
    z = torch.randn(4, 7, cfg.d, dtype=torch.float64, generator=gen(5))
    t = torch.rand(4, 7, 1, dtype=torch.float64, generator=gen(6))
    out = g.velocity(layers, z, t)
    assert out.shape == z.shape and len(layers) == 4
    for m in range(4):
        waves = [f(k * np.pi * t[m]) for f in (torch.cos, torch.sin) for k in (1, 2, 3, 4)]
        features = torch.cat([z[m], t[m], *waves], 1)
        modules = []
        for W, b in layers:
            linear = torch.nn.Linear(*W.shape[1:], dtype=torch.float64)
            linear.weight.data, linear.bias.data = W[m].T, b[m, 0]
            modules += [linear, torch.nn.SiLU()]
        assert worst(torch.nn.Sequential(*modules[:-1])(features), out[m]) < 1e-12
    x, eps = torch.randn(2, 4, 7, cfg.d, dtype=torch.float64, generator=gen(7))
    loss = g.dsm_loss(layers, x, t, eps)
    v = g.velocity(layers, (1 - t) * x + t * eps, t)
    assert worst(loss, ((v - (eps - x))**2).sum((1, 2)) / (7 * cfg.d)) < 1e-12
    grad = torch.autograd.grad(loss[1], layers[0][0])[0]
    assert grad[1].abs().max() > 1e-4 and (grad[[0, 2, 3]] == 0).all()


def test_start_is_he_s_and_the_same_for_every_n():
    cfg = g.Config(points=(10, 20), seeds=3)
    layers = g.initial_layers(cfg, gen(0))
    for (W, b), (a, c) in zip(layers, [(29, 128), (128, 128), (128, 128), (128, 20)], strict=True):
        assert W.shape == (6, a, c) and b.shape == (6, 1, c) and (b == 0).all() and (W[:3] == W[3:]).all()
    for W, _ in layers[:-1]:
        assert abs(W.std().item() * (W.shape[1] / 2)**0.5 - 1) < 0.03 and not (W[0] == W[1]).any()
    assert (layers[-1][0] == 0).all()                                            # so that v_theta = 0 at the start


# ---- what one step sees, and where is compared ----------------------------------------------------------------------

def test_a_step_is_fresh_and_covers_the_points_evenly():
    cfg, N = replace(SMALL, points=(4, 8, 1000), batch=8), torch.tensor([4, 4, 8, 8, 1000, 1000])
    i, t, eps = map(torch.stack, zip(*[g.step_noise(k, cfg, N) for k in range(3000)], strict=True))
    assert (i[:, :2].sort(-1)[0] == torch.arange(8) // 2).all()                  # N = B/2: every point twice
    assert (i[:, 2:4] == torch.arange(8)).all()                                  # N = B: every point once
    assert (i[:, 4:] // 125 == torch.arange(8)).all()                            # N > B: one of each eighth
    hist = torch.bincount(i[:, 4:].flatten(), minlength=1000)                    # 48 each, a deviation of 7
    assert len(hist) == 1000 and hist.min() > 15 and hist.max() < 90
    assert (t[:, :2] == t[:, 2:4]).all() and (eps[:, :2] == eps[:, 4:]).all()    # one seed, any N: the same
    assert not (t[:, 0] == t[:, 1]).any() and not (t[1:] == t[:-1]).any()        # and seeds and steps in all
    u = t[:, :2].flatten().sort()[0]                                             # Kolmogorov-Smirnov, 48,000 numbers
    assert worst(u, (torch.arange(len(u)) + 0.5) / len(u)) < 1.95 / len(u)**0.5 and 0 <= u[0] and u[-1] < 1
    assert abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01


def test_regions_have_the_moments_they_should():
    n, d = 4000, 20
    z, t = g.regions(torch.full((1, d), 7.0), n, gen(0))
    assert z.shape == (3 * n, d) and t.shape == (3 * n, 1)
    assert worst(t[:n, 0], (np.arange(n) + 0.5) / n) < 1e-6 and (t.view(3, n) == t[:n, 0]).all()
    sup, true, normal = z.double().split(n)
    t = t[:n].double()
    for unit in ((sup - (1 - t) * 7) / t, true / ((1 - t)**2 + t**2).sqrt(), normal):        # each is N(0, I)
        assert unit.mean().abs() < 0.02 and abs(unit.std() - 1) < 0.01
        for part in unit.split(n // 4):                                          # at every t
            assert abs(part.std() - 1) < 0.02


def test_errors_at_the_start_are_those_of_a_network_that_knows_nothing():
    """With v_theta = 0, x_theta = z: over the true p_t the error to s_gt is (2t - 1)^2 t^2/S, S = (1 - t)^2 + t^2."""
    cfg = replace(SMALL, points=(50, 100), d=20, width=64, n_eval=4000, iterations=1)
    _, errors, loss = g.train(cfg, torch.device("cpu"))
    t = (np.arange(4000) + 0.5) / 4000
    S = (1 - t)**2 + t**2
    want = ((2 * t - 1)**2 * t**2 / S).reshape(g.BINS, -1).mean(1)
    assert errors.shape == (2, 2, 2, 2, 3, g.BINS)
    assert np.abs(errors[:, :, 0, 1, 1] - want).max() < 0.05 * want.max()
    normal = ((1 - (1 - t) / S)**2).reshape(g.BINS, -1).mean(1)                  # over N(0, I), of variance 1, not S
    assert np.abs(errors[:, :, 0, 1, 2] - normal).max() < 0.05 * normal.max()
    assert np.abs(loss[..., 0] - 2).max() < 0.3 and np.abs(loss[..., 1] / loss[..., 0] - 1).max() < 0.3


def test_one_point_is_learned():
    """N = 1: s_* is that of a single Gaussian, x_* = x wherever one looks, and the network finds it everywhere."""
    cfg = replace(SMALL, points=(1, 2), batch=64, width=64, iterations=300, lr=5e-3, eval_every=300, n_eval=200)
    _, errors, _ = g.train(cfg, torch.device("cpu"))
    e = errors[0].mean(-1)                                                       # (S, E, 2, 3)
    assert (e[:, -1, 0, 0] < 0.02).all() and (e[:, -1, 0, 1] < 0.3 * e[:, 0, 0, 1]).all()
    assert (e[:, -1, 1, 0] > 0.1).all()


def test_training_depends_on_the_seed_alone_and_slowdown_divides_the_rate():
    cpu = torch.device("cpu")
    at, errors, loss = g.train(SMALL, cpu)
    assert at == [0, 10, 20] and loss.shape == (2, 2, 3) and np.isfinite(errors).all()
    assert (g.train(SMALL, cpu)[1] == errors).all() and not (g.train(replace(SMALL, seed=1), cpu)[1] == errors).any()
    moved = np.abs(errors[:, :, -1] - errors[:, :, 0]).max()
    e = g.train(replace(SMALL, slowdown=1e6), cpu)[1]
    assert 0 < np.abs(e[:, :, -1] - e[:, :, 0]).max() < 1e-3 * moved
    assert (g.train(replace(SMALL, lr=1.0, slowdown=1 / SMALL.lr), cpu)[1] == errors).all()


# ---- intervals, claims -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, quantile", [(2, 12.7062), (3, 4.3027), (5, 2.7764), (10, 2.2622), (31, 2.0423)])
def test_interval_is_students_t_of_the_logarithm(n, quantile):
    values = np.exp(np.random.default_rng(n).normal(size=(n, 3)))
    logs = np.log(values)
    half = quantile * logs.std(0, ddof=1) / n**0.5
    want = np.exp([logs.mean(0) - half, logs.mean(0), logs.mean(0) + half])
    assert np.abs(g.interval(values) / want - 1).max() < 2e-3


def test_verdicts_follow_from_intervals():
    v = np.exp([0.1, 0.12, 0.14])                                                # an interval of about 1.07 to 1.19
    verdict = lambda **bound: g.claim("", "", v, **bound)["verdict"]
    assert verdict(low=1) == verdict(high=1.3) == "holds"
    assert verdict(high=1) == verdict(low=1.3) == "contradicted"
    assert verdict(low=1.12) == verdict(high=1.12) == "not resolved"


def test_since_minimum_is_not_biased_by_noise():
    noise = np.exp(0.1 * np.random.default_rng(0).normal(size=(4000, 5, 40)))    # flat curves: nothing grew
    found = np.array([np.log(g.since_minimum(c)).mean() for c in noise])
    assert abs(found.mean()) < 0.005                                             # own minima would give .22
    curve = np.array([[3.0, 1, 2], [6, 2, 4], [9, 3, 7.5]])
    assert np.allclose(g.since_minimum(curve), [2, 2, 2.5])


# ---- the script ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of a copy of the script beside empirical_score.py, and nothing else, at a size where the claims hold."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("exp_gaussian.py", "empirical_score.py"):
        shutil.copy(ROOT / name, folder)
    argv = ["--points", "100", "2000", "--seeds=3", "--iterations=1500", "--n-eval=200", "--device=cpu"]
    done = subprocess.run([sys.executable, "exp_gaussian.py", *argv], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "out" / "exp_gaussian" / "laptop", done.stdout


def test_results_follow_the_contract(tiny):
    out, printed = tiny
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"script", "preset", "seed", "device", "seconds", "commit", "versions", "config", "claims",
                            "arrays"}
    assert results["script"] == "exp_gaussian" and results["preset"] == "laptop" and results["seconds"] > 0
    for row in results["claims"]:
        assert set(row) == {"claim", "paper", "ours", "ci95", "verdict"} and len(row["claim"]) <= 74
        assert row["verdict"] in ("holds", "not resolved", "contradicted") and row["claim"] in printed
        assert np.isfinite([row["ours"], *row["ci95"]]).all()
        assert row["ci95"][0] <= row["ours"] * (1 + 1e-9) and row["ours"] <= row["ci95"][1] * (1 + 1e-9)
    assert np.array(results["arrays"]["training"]["supervision, s_*"]).shape == (2, 3, 16)
    assert np.array(results["arrays"]["over_t"]["true p_t, s_gt"]).shape == (3, g.BINS)
    assert str(out / "results.png") in printed and 20_000 < (out / "results.png").stat().st_size < 300_000
    assert (out / "results.json").stat().st_size < 300_000


def test_figure_is_drawn_from_its_json_alone(tiny, tmp_path):
    (tmp_path / "results.json").write_bytes((tiny[0] / "results.json").read_bytes())
    g.plot(tmp_path / "results.json")
    assert (tmp_path / "results.png").read_bytes() == (tiny[0] / "results.png").read_bytes()


def test_claims(tiny):
    """Selective at N = 100, after 1,500 iterations; nothing to select at N = 2,000. Margins, not bare verdicts."""
    rows = json.loads((tiny[0] / "results.json").read_text())["claims"]
    find = lambda start: next(r for r in rows if r["claim"].startswith(start))
    assert find("Fig 10 N = 100, supervision")["ci95"][1] < 0.95
    assert find("Fig 10 N = 100, true p_t")["ci95"][0] > 1.3
    assert find("N = 2,000, supervision")["ci95"][0] > 2
    assert find("control: true p_t")["ci95"][1] < 0.97                           # falls, after half-way too


def test_divergence_is_one_line_and_writes_nothing(tmp_path):
    argv = ["--points", "3", "8", "--seeds=2", "--iterations=20", "--n-eval=20", "--lr=30", f"--out={tmp_path / 'o'}"]
    done = subprocess.run([sys.executable, ROOT / "exp_gaussian.py", *argv], capture_output=True, text=True)
    assert done.returncode == 1 and "diverged at lr 30: try --slowdown 10" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and not (tmp_path / "o").exists()


def test_a_seed_that_diverged_is_left_out_and_counted(monkeypatch):
    cfg = replace(SMALL, seeds=3, iterations=300, lr=1e-2, batch=32)
    at, errors, loss = g.train(cfg, torch.device("cpu"))
    errors[1, 0], loss[1, 0, -1] = np.nan, np.nan
    monkeypatch.setattr(g, "train", lambda *a: (at, errors, loss))
    results = g.measure(cfg)
    assert results["arrays"]["diverged"] == 1 and results["arrays"]["networks"] == 6
    others = errors[0, 1:, -1, :, 0].mean(-1)                                    # (S, 2)
    assert abs(results["claims"][0]["ours"] - np.exp(np.log(others[:, 0] / others[:, 1]).mean())) < 1e-9
    loss[0, 1, -1] = 2 * loss[0, 1, 0]
    with pytest.raises(ValueError, match="2 of 6 networks diverged"):
        g.measure(cfg)


def test_a_plateau_is_not_read_off_one_evaluation():
    """Where only the start and the end were evaluated, half-way is not the end, whose ratio to itself is 1."""
    results = g.measure(replace(SMALL, iterations=300, eval_every=300, lr=1e-2, batch=32, device="cpu"))
    row = next(c for c in results["claims"] if "plateaus" in c["claim"])
    assert len(results["arrays"]["iterations"]) == 2 and row["ci95"][0] < row["ci95"][1] and row["verdict"] != "holds"


def test_a_dry_run_foretells_and_writes_nothing(tmp_path, monkeypatch, capsys):
    argv = ["--points", "20", "40", "--seeds=2", "--iterations=200", "--n-eval=20", "--device=cpu", "--dry-run"]
    done = subprocess.run([sys.executable, ROOT / "exp_gaussian.py", *argv, f"--out={tmp_path / 'out'}"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 networks of 0.05M parameters, 200 iterations on cpu" in done.stdout and not any(tmp_path.iterdir())
    assert 0 < float(re.search(r"about ([\d.]+) minutes", done.stdout)[1]) < 3       # it takes seconds
    with pytest.raises(ValueError, match="GB of memory are needed"):
        g.forecast(replace(SMALL, width=10_000_000), tmp_path / "out")
    monkeypatch.setattr(g.shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(ValueError, match="MB are needed on the disk of"):
        g.forecast(SMALL, tmp_path / "out")
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        g.forecast(replace(SMALL, seeds=1), tmp_path / "out")


@pytest.mark.parametrize("change, message", [
    (dict(seeds=1), "seeds must be at least 2, at most 1e9, not 1"),
    (dict(points=(100,)), "points must be two sizes or more, ascending"),
    (dict(points=(100, 10)), "points must be two sizes or more, ascending"),
    (dict(points=(0, 10)), "points must be two sizes or more, ascending"),
    (dict(depth=1), "depth must be at least 2"),
    (dict(lr=float("nan")), "lr must be at least 1e-09, at most 1e9, not nan"),
    (dict(slowdown=0.0), "slowdown must be at least"),
    (dict(n_eval=30), "n_eval must be a multiple of 20, not 30"),
    (dict(batch=0), "batch must be at least 1"),
    (dict(device="abacus"), "device 'abacus' is not available"),
])
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        g.measure(replace(SMALL, **change))


@pytest.mark.parametrize("argv, message", [
    (["--preset=huge"], "unknown preset 'huge': expected laptop, gpu, paper"),
    (["--redraw", "--out=nowhere"], "nothing to redraw"),
])
def test_bad_input_is_one_line(argv, message):
    done = subprocess.run([sys.executable, ROOT / "exp_gaussian.py", *argv], capture_output=True, text=True)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_paper_preset_is_the_papers():
    p = g.PRESETS["paper"]
    assert (p.d, p.points[0], p.depth, p.width, p.lr) == (20, 100, 10, 1000, 4e-3)
    assert (p.iterations, p.eval_every) == (20_000, 100)
