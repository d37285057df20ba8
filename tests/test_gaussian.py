"""exp_gaussian.py: the scores, the networks, the errors, the verdicts, and the claims at a size where they hold."""
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import exp_gaussian as g

SMALL = g.Config(points=(3, 8), seeds=2, d=4, depth=3, width=16, iterations=20, batch=8, n_eval=40, device="cpu")

def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

def worst(a, b):
    return (torch.as_tensor(a) - torch.as_tensor(b)).abs().max().item()

def call(cwd, *argv):
    shutil.copy(g.__file__, cwd)
    return subprocess.run([sys.executable, "exp_gaussian.py", *argv], cwd=cwd, capture_output=True, text=True)

@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.99])
def test_both_means_are_those_of_the_scores(t):
    """A score is the gradient of log p_t, by autograd; its mean is (z + t^2 s) / (1 - t)."""
    x, z = draw(30, 5, seed=1), draw(20, 5, seed=2).requires_grad_()
    mixture = (-(z[:, None] - (1 - t) * x).square().sum(2) / (2 * t**2)).logsumexp(1)
    normal = -z.square().sum(1) / (2 * ((1 - t)**2 + t**2))
    for log_p, mean in ((mixture, g.empirical_mean(z, t, x)), (normal, g.true_mean(z, t))):
        s = torch.autograd.grad(log_p.sum(), z)[0]
        assert worst(mean.detach(), (z.detach() + t**2 * s) / (1 - t)) < 1e-9
    assert worst(s, -z.detach() / ((1 - t)**2 + t**2)) < 1e-12                   # the closed form of s_gt

def test_empirical_mean_is_the_brute_force_one():
    x, z, t = draw(7, 3, seed=1), draw(5, 3, seed=2), torch.tensor([0.01, 0.2, 0.5, 0.8, 1.0]).double()[:, None]
    for b, mean in enumerate(g.empirical_mean(z, t, x)):
        logits = -((z[b] - (1 - t[b]) * x)**2).sum(1) / (2 * t[b]**2)
        w = (logits - logits.max()).exp()
        assert worst(mean, w @ x / w.sum()) < 1e-9

def test_error_of_the_mean_is_a_weighted_error_of_the_score():
    """z - t v is the mean of a velocity v, whose score is -((1 - t) v + z) / t; lambda is t^4 / (1 - t)^2."""
    x, z, v = draw(9, 5, seed=1), draw(6, 5, seed=2), draw(6, 5, seed=3)
    for t in (0.1, 0.5, 0.9):
        mean = g.empirical_mean(z, t, x)
        s_theta, s_star = -((1 - t) * v + z) / t, ((1 - t) * mean - z) / t**2
        assert worst((z - t * v - mean).square(), t**4 / (1 - t)**2 * (s_theta - s_star).square()) < 1e-10

def test_networks_side_by_side_are_networks():
    layers = [draw(*p.shape, seed=k) for k, p in enumerate(g.initial_layers(SMALL, torch.Generator()))]
    z, t = draw(2, 7, 4, seed=8), draw(2, 7, 1, seed=9).abs()
    for m, out in enumerate(g.velocity(layers, z, t)):
        h = torch.cat([z[m], t[m], *[f(k * torch.pi * t[m]) for f in (torch.cos, torch.sin) for k in (1, 2, 3, 4)]], 1)
        for k in (0, 2, 4):
            h = torch.nn.functional.linear(h / (1 + (-h).exp()) if k else h, layers[k][m].T, layers[k + 1][m, 0])
        assert worst(h, out) < 1e-10 * h.abs().max()

def test_a_step_is_fresh_and_sees_each_point_equally_often():
    x = draw(2, 8, 4).float()
    z, t, v = g.noisy_batch(5, SMALL, x)
    assert worst(z - t * v, x) < 1e-5                        # z - t (eps - x) = x: each point once, in order
    assert torch.equal(v, g.noisy_batch(5, SMALL, x)[2]) and not (g.noisy_batch(6, SMALL, x)[2] == v).any()

def test_errors_at_the_start_are_those_of_a_network_that_knows_nothing():
    """v_theta = 0 means x_theta = z: on fresh points, the error to s_gt is the mean over t of (2t - 1)^2 t^2 / S."""
    errors = g.train(replace(SMALL, d=20, n_eval=4000), 8)
    t = (np.arange(4000) + 0.5) / 4000
    want = ((2 * t - 1)**2 * t**2 / ((1 - t)**2 + t**2)).mean()
    assert errors.shape == (2, 2, 2, 2) and np.abs(errors[:, 1, 1, 0] / want - 1).max() < 0.03

def test_training_depends_on_the_seed_alone():
    errors = g.train(SMALL, 8)
    assert (g.train(SMALL, 8) == errors).all() and not (g.train(replace(SMALL, seed=1), 8) == errors).any()

def test_intervals_and_verdicts():
    logs = np.random.default_rng(0).normal(size=(5, 3))
    ci = stats.ttest_1samp(logs, 0).confidence_interval()
    assert worst(np.log(g.interval(np.exp(logs))), np.stack([ci.low, logs.mean(0), ci.high], 1)) < 1e-12
    for band, paper, verdict in (((0.8, 0.9, 1.0), "<= 1", "reproduces"), ((1.1, 1.2, 1.3), "<= 1", "differs"),
                                 ((1.1, 1.2, 1.3), ">= 1", "reproduces"), ((0.7, 0.8, 0.9), ">= 1", "differs"),
                                 ((0.9, 1.1, 1.3), ">= 1", "not resolved"), ((0.9, 1.1, 1.3), "", "finding")):
        assert g.row("", "", band, paper)["verdict"] == verdict
        assert g.row("", "", band, ">= 1", gate=False)["verdict"] == "other regime"

def test_claims_hold_where_they_should():
    """After 1,000 iterations, N = 60 is selective and N = 300 is not; s_gt is approached, then left."""
    cfg = g.Config(points=(60, 300), seeds=3, iterations=1000, n_eval=200, device="cpu")
    training, fresh, approach, nearest, _, sweep = g.measure(cfg)[0]
    assert training["ci95"][1] < 0.9 and fresh["ci95"][0] > 1.2 and sweep["ci95"][0] > 2
    assert approach["verdict"] == "differs" and approach["ci95"][0] > 1.3 and 100 < nearest["ours"] < 400

def test_a_copy_alone_runs_redraws_and_asks_for_more_iterations(tmp_path):
    done = call(tmp_path, "--points", "10", "20", "--seeds=2", "--iterations=40", "--width=16", "--device=cpu")
    folder = tmp_path / "out/exp_gaussian/laptop"
    rows = json.loads((folder / "results.json").read_text())["claims"]
    assert done.returncode == 0 and all(row["text"] in done.stdout for row in rows), done.stderr
    assert all(row["verdict"] == "other regime" and "more --iterations" in row["note"] for row in rows if row["paper"])
    picture = (folder / "fig10.png").rename(tmp_path / "before.png").read_bytes()
    done = call(tmp_path, "--redraw")
    assert done.returncode == 0 and (folder / "fig10.png").read_bytes() == picture, done.stderr

def test_bad_input_is_one_line(tmp_path):
    done = call(tmp_path, "--seeds=1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "error: expected at least 2 seeds" in done.stderr
