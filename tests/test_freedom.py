"""exp_freedom.py: the subsets, the metric and the targets against brute force; a tiny run, its rows, its cache."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from empirical_score import EmpiricalScore
from exp_freedom import Config, calibrated_l2, choose_subsets, error_to_target, find_target, load_images, recognise
from plumbing.fast_score import FaissScore

ROOT = Path(__file__).resolve().parents[1]
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
TIMES = torch.tensor([1e-3, 0.05, 0.3, 0.6, 0.8, 0.95, 1.0])


def points(n=60, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 3, 3, generator=g) + 2, torch.arange(n) % classes


def posterior_mean(x, z, t):
    """Return x_* of one query by direct differences in float64."""
    squared = (z.double() - (1 - t) * x.double()).flatten(1).square().sum(1)
    w = torch.softmax(-squared / (2 * t**2), 0)
    return (w[:, None, None, None] * x.double()).sum(0)


def test_subsets_are_nested_and_balanced():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (40, 50, 60, 70)))
    smaller, region = choose_subsets(y, 5, 1, seed=3)
    assert set(smaller) == set(region)
    for ratio in (2, 3.5, 8):
        score, larger = choose_subsets(y, 5, ratio, seed=3)
        assert set(score) == set(smaller) and set(region) < set(larger) and len(set(larger)) == len(larger)
        assert np.bincount(y[score]).tolist() == [5] * 4 and np.bincount(y[larger]).tolist() == [round(5 * ratio)] * 4
        region = larger
    assert set(choose_subsets(y, 5, 1, seed=4)[0]) != set(smaller)
    assert np.bincount(y[choose_subsets(y, 5, 11, seed=0)[1]]).tolist() == [40, 50, 55, 55]


def test_calibrated_l2_against_brute_force():
    x, _ = points(80)
    q = torch.cat([points(10, seed=1)[0], x[:5] + 1e-3])
    d2, index = (q.double()[:, None] - x.double()).flatten(2).square().sum(2).sort(dim=1)        # (15, 80)
    l2, nearest = calibrated_l2(EmpiricalScore(x), q)
    assert (l2 - d2[:, 0] / d2[:, :50].mean(1)).abs().max() < 1e-6 and (nearest == index[:, 0]).all()
    assert calibrated_l2(EmpiricalScore(x), x)[0].max() < 1e-12
    assert (calibrated_l2(EmpiricalScore(x), 1e4 * q)[0] - 1).abs().max() < 0.01


def test_the_judge_recognises_digits_and_not_noise():
    data, _, (x, y), judge = load_images(Config(), torch.device("cpu"))
    assert (recognise(x, *judge) == y).double().mean() > 0.95
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert (recognise(noise, *judge) == y).double().mean() < 0.3


@needs_faiss
def test_faiss_finds_the_points_that_weigh_most():
    x, _ = points()
    z = torch.randn(len(TIMES), 1, 3, 3, generator=torch.Generator().manual_seed(1)) + 1
    E = FaissScore(x, neighbours=5)
    near, distances = E.candidates(*E.queries(z, TIMES), torch.arange(60))
    a = (1 - TIMES.double())[:, None, None, None, None]
    every = (z.double()[:, None] - a * x.double()).flatten(2).norm(dim=2)                        # (B, N)
    assert (distances - every.gather(1, near)).abs().max() < 1e-12
    for row, wanted in zip(near[:-1], every[:-1].topk(5, largest=False).indices, strict=True):
        assert set(row.tolist()) == set(wanted.tolist())


@pytest.mark.parametrize("kind", ["exact", "sampled", pytest.param("faiss", marks=needs_faiss)])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.8, 1.0])
def test_targets_have_the_mean_x_star(kind, t):
    """The mean of many draws is x_* of the class by brute force, within 5 standard errors in every coordinate."""
    x, y = points()
    E = FaissScore(x, y) if kind == "faiss" else EmpiricalScore(x, y)
    z = (1 - t) * x[1:2] + t * torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    n = 4000
    queries = z.expand(n, -1, -1, -1), torch.full((n,), t), torch.full((n,), 1)
    got = find_target(kind, E, None, *queries, torch.Generator().manual_seed(9)).double()
    wanted = posterior_mean(x[y == 1], z, t)
    assert ((got.mean(0) - wanted).abs() <= 5 * got.std(0) / n**0.5 + 1e-5).all()
    assert kind == "exact" or all((x[y == 1] == g.float()).flatten(1).all(1).any() for g in got[:50])


def test_the_error_of_a_network_that_knows_the_target_is_zero():
    x, y = points()
    E = EmpiricalScore(x, y)
    assert error_to_target(E.posterior_mean, E, x, y).max() == 0
    assert (error_to_target(lambda z, t, y: E.posterior_mean(z, t, y) + 2, E, x, y) - 4).abs().max() < 1e-5


TINY = ["--sit.steps=6", "--sit.keep", "2", "4", "--sit.batch=8", "--unet.steps=2", "--unet.batch=4", "--per-class=5",
        "--ratios", "1", "4", "--n-samples=10", "--workers=1"]


def command(*argv):
    line = [sys.executable, ROOT / "exp_freedom.py", *TINY, *argv]
    return subprocess.run(line, capture_output=True, text=True, timeout=200)


def test_a_tiny_run_is_found_again(tmp_path):
    done = command(f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    first = json.loads((tmp_path / "results.json").read_text())
    assert len(first["claims"]) == 8 and {row["verdict"] for row in first["claims"][4:]} == {"finding"}
    # two steps make no digits: the gate is not passed
    assert {row["verdict"] for row in first["claims"][:4]} == {"other regime"}
    assert np.shape(first["arrays"]["sit"]["l2"]) == (2, 2, 3, 10)
    networks = {p: p.stat().st_mtime_ns for p in (tmp_path / "networks").iterdir()}
    assert len(networks) == 10
    (tmp_path / "fig5_mechanism.png").unlink()
    assert command(f"--out={tmp_path}", "--threshold=.5").returncode == 0
    assert networks == {p: p.stat().st_mtime_ns for p in (tmp_path / "networks").iterdir()}
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["claims"] == first["claims"] and (tmp_path / "fig5_mechanism.png").exists()
