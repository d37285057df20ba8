"""exp_scaling.py: errors, terms and intervals against closed forms and brute force; tiny runs of the command."""
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sample import Given

import exp_scaling
from exp_scaling import PRESETS, Wiener, compare_at_equal_L, compare_ends, measure_models
from plumbing import scaling, stand_ins
from plumbing.data import load_data
from plumbing.files import load_run
from plumbing.images import frechet, gaussian
from plumbing.results import paired_change, student_interval
from plumbing.stand_ins import Judge, draw_leaves, few_digits, leaves, small_images
from sample import noise

ROOT = Path(__file__).resolve().parents[1]
SMALL = dataclasses.replace(PRESETS["laptop"], n_points=40, n_times=4, n_images=200, workers=1)


def constant(image):
    """Return a network that predicts the same image everywhere."""
    return Given(lambda z, t, y: image.expand(z.shape), "x")


def test_leaves_cover_the_image_and_differ_in_texture_alone():
    grey, texture = draw_leaves(300, 16, 0)
    assert (grey != 0).all() and np.abs(grey).max() < 1
    # every second disc has texture; a flat disc is one grey value
    assert 0.4 < (texture != 0).mean() < 0.6
    flat, rough = leaves(300, 16, 0.0, 0)[0]["x"], leaves(300, 16, 1.0, 0)[0]["x"]
    for x in (flat, rough):
        assert x.shape == (300, 1, 16, 16) and abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-5
    fitted = np.polyfit(flat[:, 0][texture == 0], rough[:, 0][texture == 0], 1)
    assert np.abs(np.polyval(fitted, flat[:, 0][texture == 0]) - rough[:, 0][texture == 0]).max() < 1e-5
    assert np.unique(flat[0]).size < 60 < np.unique(rough[0]).size


def test_error_to_a_single_point_is_exact():
    """With one training image, x_* is that image everywhere: a constant network errs by |c - x|^2 / d."""
    x, c = np.full((50, 1, 4, 4), 2.0, np.float32), torch.linspace(-1, 1, 16).view(1, 4, 4)
    found = measure_models(SMALL, dict(x=x, y=np.zeros(50, np.int64), meta=dict(num_classes=1)), [constant(c)], "cpu")
    for region in ("sup", "ext", "common"):
        assert np.abs(found[f"{region} error"] - (c - 2).square().mean()).max() < 1e-4
        assert np.abs(found[f"{region} star"] - 4).max() < 1e-4
    assert np.abs(found["samples energy"] - c.square().mean()).max() < 1e-4


def test_terms_are_those_of_brute_force():
    torch.manual_seed(0)
    x, y = torch.randn(60, 1, 2, 2), torch.arange(60) % 2
    model = Wiener(torch.eye(4), 3)
    data = dict(x=x.numpy(), y=y.numpy(), meta=dict(num_classes=2))
    found = measure_models(SMALL, data, [model, constant(x[0])], "cpu")
    z, labels = exp_scaling.noised_points(SMALL, data, "cpu")
    want = torch.zeros(40, dtype=torch.float64)
    for z_t, t in zip(z.double().flatten(2), exp_scaling.times(SMALL), strict=True):
        logits = -(z_t[:, None] - (1 - t) * x.double().flatten(1)).square().sum(2) / (2 * t**2)
        x_star = logits.masked_fill(labels[:, None] != y, -torch.inf).softmax(1) @ x.double().flatten(1)
        want += (model(z_t.float(), t).double() - x_star).square().mean(1) / 4
    assert (found["sup error"][0] - want).abs().max() < 1e-5
    for region in ("sup", "ext", "common"):
        error, theta, star, both = (found[f"{region} {name}"] for name in ("error", "theta", "star", "both"))
        assert (error - (theta + star - 2 * both)).abs().max() < 1e-5
    assert (found["common error"][1] - found["ext error"][1]).abs().max() < 1e-6


def test_wiener_filter_is_gaussian_conditioning_and_its_trajectories_are_known():
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    moments, z = root @ root.T, torch.randn(7, 5, dtype=torch.float64)
    for t in (0.2, 0.7, 1.0):
        want = (1 - t) * z @ torch.linalg.inv((1 - t)**2 * moments + t**2 * torch.eye(5)) @ moments
        assert (Wiener(moments, 5)(z, t) - want).abs().max() < 1e-7
    # in the basis of the moments, z_t = sqrt((1 - t)^2 S + t^2) z_1
    cfg, z1 = dataclasses.replace(SMALL, n_times=200), noise(range(6), (5, 1, 1))
    path, images = exp_scaling.trajectories(cfg, Wiener(moments.float(), 5), z1, None)
    S, U = torch.linalg.eigh(moments.float())
    want = ((z1.flatten(1) @ U) * S.clamp(min=0).sqrt()) @ U.T
    assert (images.flatten(1) - want).abs().max() < 0.02
    half = (z1.flatten(1) @ U * (0.5025**2 * S + 0.4975**2).sqrt()) @ U.T
    assert (path[99].flatten(1) - half).abs().max() < 0.02


def test_ladder_falls_on_training_points_and_rises_on_trajectories():
    ladder = exp_scaling.measure_ladder(dataclasses.replace(SMALL, n_points=200, n_times=16))
    assert (np.diff(ladder["sup"]) < 0).all() and (np.diff(ladder["ext"]) > 0).all()
    assert ladder["modes"] == [5, 21, 37, 69, 161, 256]


def test_paired_change_ignores_what_networks_have_in_common():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 2, 500)) + rng.standard_normal(500) * 100 + np.arange(3)[:, None, None]
    mean, (low, high) = paired_change(values, [-1, 0, 1])
    assert abs(mean - (values[2] - values[0]).mean()) < 1e-12 and low < 2 < high and high - low < 0.6
    # one seed: the interval of a mean
    change = values[2, :1] - values[0, :1]
    mean, (low, high) = paired_change(values[:, :1], [-1, 0, 1])
    assert np.allclose((low, high), student_interval(change[0]), atol=1e-12)
    # seeds that differ widen it
    apart = values + np.array([0, 5.0])[None, :, None] * np.array([0, 0, 1.0])[:, None, None]
    assert np.diff(paired_change(apart, [-1, 0, 1])[1]) > 5


def test_error_changes_by_one_minus_two_rho_on_common_points():
    x = leaves(200, 16, 1.0, 0)[0]["x"]
    data = dict(x=x, y=np.zeros(200, np.int64), meta=dict(num_classes=1))
    moments = torch.from_numpy(x).flatten(1).T.cov()
    found = measure_models(SMALL, data, [Wiener(moments, k) for k in (256, 20, 256)], "cpu")
    parts = {name: values[:, None].numpy() for name, values in found.items()}
    rho, _ = compare_ends(parts)["rho"]
    gain = (found["common theta"][2] - found["common theta"][1]).mean()
    change = (found["common error"][2] - found["common error"][1]).mean()
    assert gain > 0.01 and abs(change - (1 - 2 * rho) * gain) < 1e-6


NETWORK7 = dataclasses.replace(PRESETS["laptop"].network7, batch=8, repa_depth=1, keep=(2, 4))
TINY7 = dataclasses.replace(SMALL, network7=NETWORK7, sits=("SiT-pico/2",), n_student=40, n_teacher=200, n_points=20,
                            n_samples=40)


def test_lines_are_compared_where_both_have_been():
    L_one, L_two = np.array([0.3, 0.4, 0.5]), np.array([0.4, 0.5, 0.6])
    one = np.stack([[1 + 0 * L_one, L_one, s * (20 * L_one - 2)] for s in (1, 2, 3)]).transpose(0, 2, 1)
    two = np.stack([[1 + 0 * L_two, L_two, s * 40 * L_two] for s in (1, 2, 3)]).transpose(0, 2, 1)
    ratios, common = compare_at_equal_L(one, two)
    assert np.abs(ratios - 7 / 18).max() < 1e-12             # at L = .45
    assert abs(common - 0.1) < 1e-12
    assert compare_at_equal_L(one - [0, 0.2, 0], two)[1] < 0


def test_what_repa_changes_in_common_is_free_of_chance():
    base, aligned = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    change, pairs = aligned - base, list(itertools.permutations(range(4), 2))
    products = [(change[s] * change[other]).mean().item() for s, other in pairs]
    apart = [(base[s] - base[other]).square().mean().item() for s, other in pairs]
    want = [change.square().mean().item(), np.mean(products), np.mean(apart)]
    assert np.abs(exp_scaling.split_change(base, aligned).mean(0) - want).max() < 1e-12


@pytest.fixture
def hasty(monkeypatch):
    """Teacher and judge train for a few steps, where what they have learned does not matter."""
    monkeypatch.setattr(stand_ins, "train_classifier", functools.partial(stand_ins.train_classifier, steps=20))


def test_the_teacher_sees_places_and_whole_images(hasty):
    arrays, _ = few_digits("mnist5k", 8, 40, 200, 0)
    features, norms = arrays["features"], np.linalg.norm(arrays["features"], axis=2)
    assert features.shape == (40, 16, 96) and np.abs(norms - 2**0.5).max() < 1e-5
    # the second half is the same for all tokens of an image, the first is not
    assert np.ptp(features[:, :, 48:], axis=1).max() < 1e-6 < np.ptp(features[:, :, :48], axis=1).min(0).max()
    x, _ = small_images("mnist5k", 8)
    middle = load_data("mnist5k")["x"][:, 0, 14:18, 14:18].mean((1, 2))      # a block of pixels is one pixel
    assert np.corrcoef(middle, x[:, 0, 4, 4])[0, 1] > 1 - 1e-9


def test_the_judge_finds_no_distance_to_its_own_images():
    judge = Judge("mnist5k", 8, 0)
    x = torch.from_numpy(small_images("mnist5k", 8)[0])
    assert frechet(*gaussian(judge.features(x)), *judge.moments) < 1e-6
    assert judge.distance(x[::2]) < 1 < judge.distance(-x)


def test_L_is_the_error_to_the_empirical_velocity(tmp_path, hasty):
    job = exp_scaling.plan_fig7(TINY7, tmp_path, TINY7.sits, 0.5)[0]
    points = exp_scaling.measure_student(TINY7, tmp_path, Judge("mnist5k", 8, 0), job)
    assert points.shape == (2, 3) and points[1, 0] == 2 * points[0, 0]
    data = load_data(job.data)
    z, _ = exp_scaling.noised_points(TINY7, data, "cpu")
    model = load_run(exp_scaling.train_network(NETWORK7, tmp_path, job))
    x, errors = torch.from_numpy(np.array(data["x"])).double().flatten(1), []
    for z_t, t in zip(z, exp_scaling.times(TINY7), strict=True):
        flat = z_t.double().flatten(1)
        w = (-(flat[:, None] - (1 - t) * x).square().sum(2) / (2 * t * t)).softmax(1)
        v = model(z_t, torch.tensor(t), torch.zeros(20, dtype=torch.long)).flatten(1)
        errors.append((v - (flat - w @ x) / t).square().mean().item())
    assert abs(points[1, 1] / np.mean(errors) - 1) < 1e-4


def test_figures_6_and_7_are_measured_by_several_workers(tmp_path, hasty):
    for measure, name, n, ids in ((exp_scaling.measure_fig6, "fig6", 3, ["fig6/ratio", "fig6/seed"]),
                                  (exp_scaling.measure_fig7, "fig7", 2, ["fig7b/repa", "fig7c/convolutions"])):
        rows, arrays = measure(dataclasses.replace(TINY7, workers=2, seeds7=n), tmp_path)
        assert [row["id"] for row in rows] == ids
        scaling.plot(dict(arrays={name: arrays}, claims=rows), tmp_path)
        assert (tmp_path / f"{name}.png").stat().st_size > 1e4


def test_figure_7_is_drawn_for_any_number_of_weights(tmp_path):
    points = np.random.default_rng(0).random((6, 2, 3, 3))
    recipes = ("no REPA", "REPA 1", "REPA 2", "REPA 3", "attention", "convolutions")
    ours = {"fig7b/repa": 0.8, "fig7c/convolutions": 0.5}
    scaling.draw_fig7(dict(zip(recipes, points.tolist(), strict=True)), tmp_path, ours)
    assert (tmp_path / "fig7.png").stat().st_size > 1e4
    # recipes may have other numbers of networks
    assert compare_at_equal_L(points[0], points[1][:, :2])[0].shape == (2,)


@pytest.mark.parametrize("cfg", PRESETS.values())
def test_presets_ask_for_no_more_points_than_there_are(cfg):
    # Figure 3's ladder has 2,000 fields, Figures 6 and 7 the student's images
    assert cfg.data or cfg.n_points <= min(2000, cfg.n_student, cfg.n_images)


def run(*args):
    return subprocess.run([sys.executable, "exp_scaling.py", *args], cwd=ROOT, capture_output=True, text=True)


TINY = ("--only", "fig3", "--seeds", "2", "--n-images", "60", "--n-points", "20", "--n-times", "3", "--workers", "1")


def test_figure_3_trains_measures_and_draws_then_takes_given_weights(tmp_path):
    folder = tmp_path / "first"
    sizes = ("--models", "SiT-pico/4", "SiT-nano/4", "--lengths", "2", "3", "--textures", "1")
    first = run(*TINY, *sizes, "--out", str(folder))
    assert first.returncode == 0, first.stderr
    results = json.loads((folder / "results.json").read_text())
    assert [row["id"] for row in results["claims"]] == ["fig3/sup", "fig3/ext", "fig3/rho", "fig3/digits"]
    assert (folder / "fig3.png").stat().st_size > 1e4 and (folder / "fig3_mechanism.png").stat().st_size > 1e4
    before = sorted((folder / "runs").iterdir())
    assert len(before) == 2 * 2 * 2 + 2                      # two seeds on the leaves, two networks on digits
    weights = [str(path) for path in before if "leaves" in path.name][:2]
    data = str(folder / "data" / "leaves_1_60_0")
    given = run(*TINY, "--model-path", *weights, "--data", data, "--out", str(folder))
    assert given.returncode == 0, given.stderr
    assert sorted((folder / "runs").iterdir()) == before
    results = json.loads((folder / "results.json").read_text())
    assert len(results["claims"]) == 3 and len(results["arrays"]["fig3"]["sup"]) == 2
