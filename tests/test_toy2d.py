"""The four points of the plane: models against independent solutions, the claims at a small size, the file alone."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import exp_toy2d as toy

SMALL = toy.Config(nets=2, steps=1200, width=256, lambdas=(0.0, 5.0), device="cpu")
TINY = ["--steps=20", "--short=5", "--nets=2", "--width=32", "--lambdas", "0", "1", "--device=cpu"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_posterior_mean_is_that_of_the_score():
    """x_* = (z + t^2 grad log p_t(z)) / (1 - t), by autograd of the density, in the plane and in polar space."""
    for x in (toy.D, toy.polar(toy.D)):
        t = torch.linspace(1e-3, 0.99, 200, dtype=torch.float64).view(2, 100, 1)
        z, w = toy.add_noise(x, t)
        distance = (z.requires_grad_()[:, :, None] - (1 - t)[:, :, None] * x).square().sum(-1)
        score, = torch.autograd.grad(torch.logsumexp(-distance / (2 * t**2), dim=-1).sum(), z)
        assert ((z + t**2 * score) / (1 - t) - w @ x).abs().max() < 1e-8


def test_polar_coordinates():
    angle, r = 6 * normal(50, 1), normal(50, 1, seed=1).abs()
    direction = torch.cat([angle.cos(), angle.sin()], dim=1)
    assert (toy.polar(r * direction) - torch.cat([r, direction], dim=1)).abs().max() < 1e-12
    nearest = [torch.cdist(x, x).fill_diagonal_(9).argmin(1).tolist() for x in (toy.D, toy.polar(toy.D))]
    assert nearest == [[1, 2, 1, 2], [1, 0, 3, 2]]


def test_networks():
    """P3's is homogeneous and the others are not; K layers at once are K ordinary ones."""
    z, t = normal(2, 64, 2).float(), torch.rand(2, 64, 1)
    for kind, homogeneous in (("equivariant", True), ("plain", False), ("deep", False)):
        net = toy.MLP(kind, 2, 2, 32)
        error = max((net(a * z, t)[0] / a - net(z, t)[0]).abs().max() for a in (0.01, 3.0, 100.0))
        assert (error < 1e-5) == homogeneous, (kind, error)
    layer = toy.Linear(2, 2, 5)
    assert (layer(z)[1] - (z[1] @ layer.weight[1] + layer.bias[1])).abs().max() < 1e-6


@pytest.mark.parametrize("features", [toy.polar, torch.clone])
def test_kernel_regression_against_numpy(features):
    cfg, query, t = toy.replace(SMALL, bandwidth=0.7), normal(2, 20, 2), toy.GRID[0]
    x_theta = toy.fit_krr(cfg, toy.D, features, 1e-3)
    torch.manual_seed(cfg.seed)
    z, w = toy.add_noise(toy.D, torch.full((2, 400, 1), t, dtype=torch.float64))
    a, b = features(z[1]).numpy(), features(query[1]).numpy()
    gram = np.exp(-((a[:, None] - a)**2).sum(-1) / (2 * 0.7**2)) + 0.4 * np.eye(400)
    want = np.exp(-((b[:, None] - a)**2).sum(-1) / (2 * 0.7**2)) @ np.linalg.solve(gram, (w[1] @ toy.D).numpy())
    assert np.abs(x_theta(query, t)[1].numpy() - want).max() < 1e-8


def test_sampler_on_flows_known_in_closed_form():
    z, x = normal(200, 2), normal(200, 2, seed=1)
    assert (toy.sample(lambda z, t: x, z) - x).abs().max() < 1e-12
    # Data N(0, 1): E[x | z] = (1 - t) z / ((1 - t)^2 + t^2), and the flow takes z back to itself.
    assert (toy.sample(lambda z, t: (1 - t) / ((1 - t)**2 + t**2) * z, z) / z - 1).abs().max() < 5e-3
    assert toy.kind_of(torch.tensor([[0.09, 0.1], [0.11, 0], [-0.6, 0], [0.6, 0.11]])).tolist() == [2, 0, 1, 0]


def test_verdicts():
    good, bad, even, rough, unsure = (dict(share=[s, s + d, s - d], L=[L] * 3) for s, d, L in (
        (0.8, 0.01, 0.001), (0.5, 0.02, 0.001), (0.9, 0.01, 0.001), (0.8, 0.01, 0.01), (0.6, 0.3, 0.001)))
    for baseline, pat, verdict in ((bad, good, "reproduces"), (good, bad, "differs"), (bad, unsure, "not resolved"),
                                   (even, good, "other regime"), (bad, rough, "other regime")):
        assert toy.compare("P2", baseline, pat)["verdict"] == verdict
    assert toy.compare("P1", bad, rough)["verdict"] == "reproduces"


def least_loss():
    """Return the least L of any f(a z) = a f(z): by angle, x_theta = r g, and least squares over the radius gives g."""
    angle, r = (np.arange(180) + 0.5) * np.pi / 180, (np.arange(200) + 0.5)[:, None] / 200
    total = 0.0
    for t, weight in zip(*np.polynomial.legendre.leggauss(16), strict=True):
        t = 0.02 + 0.49 * (t + 1)
        radius = r * (1 + 6 * t)
        z = radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        p = np.exp(-((z[..., None, :] - (1 - t) * toy.D.numpy())**2).sum(-1) / (2 * t**2)) + 1e-300
        x_star = p @ toy.D.numpy() / p.sum(-1, keepdims=True)
        p = radius * p.sum(-1) / (radius * p.sum(-1)).sum()
        explained = ((p * radius)[..., None] * x_star).sum(0)**2 / (p * radius**2).sum(0)[:, None]
        total += 0.49 * weight * ((p * (x_star**2).sum(-1)).sum() - explained.sum())
    return total / 0.52


def test_claims_at_a_small_size():
    """P1, P2 and REPA make a larger share of good samples; P3 cannot fit, as least squares says."""
    models = {name: toy.evaluate(SMALL, x_theta, x) for name, x_theta, x in toy.fit_all(SMALL)}
    p1, pat1, p2, pat2, _, pat3, repa, aligned = models.values()
    for baseline, pat, change in ((p1, pat1, 0.05), (p2, pat2, 0.4), (repa, aligned, 0.1)):
        assert np.mean(pat["share"]) > np.mean(baseline["share"]) + change
    assert abs(np.mean(pat2["L"]) / np.mean(p2["L"]) - 1) < 0.25 and np.mean(aligned["L"]) < 1.25 * np.mean(repa["L"])
    assert abs(least_loss() - 0.0082) < 1e-4 and min(pat3["L"]) > 0.95 * least_loss()


def command(*argv, script=toy.__file__):
    return subprocess.run([sys.executable, script, *TINY, *argv], capture_output=True, text=True, timeout=200)


def test_the_file_runs_alone_and_draws_from_its_results(tmp_path):
    done = command(f"--out={tmp_path}", script=shutil.copy(toy.__file__, tmp_path))
    assert done.returncode == 0 and "good / (good + bad)" in done.stdout, done.stderr[-2000:]
    made = [(tmp_path / name).read_bytes() for name in ("results.json", "fig9.png", "fig_repa2d.png")]
    assert len(json.loads(made[0])["claims"]) == 4 and command("--redraw", f"--out={tmp_path}").returncode == 0
    assert made == [(tmp_path / name).read_bytes() for name in ("results.json", "fig9.png", "fig_repa2d.png")]


def test_bad_input_is_one_line(tmp_path):
    done = command("--lr=0", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1 and done.stderr == "error: lr must be positive, not 0.0\n"
