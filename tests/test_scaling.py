"""exp_scaling.py: its estimators against closed forms, its distances, counts and losses by other means; a tiny run."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from test_model import official_state

import exp_scaling
import sample as sample_module
import train
from empirical_score import EmpiricalScore
from exp_scaling import Config, Job, Ladder, Wiener, evaluate, fields, fit, shift, slopes, spectrum
from model import build_model
from sample import frechet, gaussian, noise, sample

ROOT = Path(__file__).resolve().parents[1]


def at(x, y, n=64, n_times=6, classes=2):
    """What probe() gives, for points x (N, C, H, W) that are not on disk."""
    E, t = EmpiricalScore(x, y), [(k + 0.5) / n_times for k in range(n_times)]
    i = torch.arange(n) % len(x)
    z = torch.stack([(1 - tk) * x[i] + tk * noise(range(n), x.shape[1:], 1) for tk in t])
    few = -(-n // 4)
    return SimpleNamespace(E=E, t=t, z=z, y_sup=y[i], z1=noise(range(n), x.shape[1:], 2), few=few,
                           y_ext=torch.arange(n) % classes,
                           x_star=torch.stack([E.posterior_mean(zk, tk, y[i]) for zk, tk in zip(z, t, strict=True)]),
                           x_free=torch.stack([E.posterior_mean(zk[:few], tk) for zk, tk in zip(z, t, strict=True)]))


# ---- the estimators, against closed forms ----------------------------------------------------------------------------

def test_errors_on_one_point_are_exact():
    """With one point, x_* is that point wherever one asks; a network that always answers c errs by |c - x|^2 / d."""
    x, c = torch.full((1, 1, 4, 4), 2.0), torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    class Constant:
        num_classes, prediction = 1, "v"
        def __call__(self, z, t, y):
            return (z - c) / max(t, 1e-6)
    out = evaluate(Constant(), at(x, torch.zeros(1, dtype=torch.long), classes=1))
    want = (c - x).square().mean().item()
    for key in ("sup", "ext", "sup_free", "ext_free"):
        assert out[key].shape == (64 if "free" not in key else 16, 6)
        assert np.abs(out[key] - want).max() < 1e-4 * want, key


def test_errors_on_gaussian_data_are_its_posterior_variance():
    """Where the empirical score has collapsed on x, the error of the true posterior mean is the posterior variance,
    S sigma^2 / (alpha^2 S + sigma^2) in the mean over the modes."""
    x = torch.from_numpy(fields(2000, 16, np.random.default_rng(0))).float()
    p = at(x, torch.arange(2000) % 2, n=1000)
    sup = evaluate(Wiener(16), p)["sup"]
    S = spectrum(16)
    for k, t in enumerate(p.t[:4]):                          # up to t = .58
        want = (S * t**2 / ((1 - t)**2 * S + t**2)).mean()
        assert abs(sup[:, k].mean() - want) < 4 * sup[:, k].std() / 1000**0.5 + 1e-4 * want, t


def test_trajectories_are_heuns():
    torch.manual_seed(0)
    model = build_model("SiT-nano/2", 4, 1, 3)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    z1, y, t = noise(range(6), (1, 4, 4), 0), torch.arange(6) % 3, [0.1, 0.4, 0.8]
    path, x_theta, end = exp_scaling.trajectories(model, z1, y, t)
    want = sample(model, z1, y, t_grid=[1, 0.8, 0.4, 0.1, 0], solver="heun", steps=1)
    assert (path.flip(0) - want[1:4]).abs().max() < 1e-5 and (end - want[4]).abs().max() < 1e-5
    again = torch.stack([exp_scaling.data_prediction(model, z, tk, y) for z, tk in zip(path, t, strict=True)])
    assert (x_theta - again).abs().max() < 1e-5


# ---- the fields, and what is known of them ---------------------------------------------------------------------------

def test_wiener_filter_is_gaussian_conditioning():
    side = 6
    modes = np.fft.fft2(np.eye(side**2).reshape(-1, side, side), norm="ortho")                   # (D, side, side)
    C = np.einsum("aij,ij,bij->ab", modes, spectrum(side), modes.conj()).real                    # covariance of pixels
    assert abs(np.trace(C) / side**2 - 1) < 1e-12
    z = torch.randn(5, 1, side, side, generator=torch.Generator().manual_seed(0))
    for t in (0.0, 0.2, 0.7, 1.0):
        gain = np.linalg.inv((1 - t)**2 * C + t**2 * np.eye(side**2))
        x, eps = ((f @ gain @ z.view(5, -1).double().numpy().T).T for f in ((1 - t) * C, t * np.eye(side**2)))
        assert np.abs(Wiener(side)(z, t).view(5, -1).numpy() - (eps - x)).max() < 1e-4
    x = fields(40_000, side, np.random.default_rng(1)).reshape(40_000, -1)
    assert np.abs(x.T @ x / 40_000 - C).max() < 0.04


def test_the_dial_goes_from_digits_to_fields(tmp_path):
    cfg = replace(Config(), n_data=300, n_onset=100, out=str(tmp_path))
    sets = dict(dial0=10, dial1=10, digits8=10, onset=3, plateau=10) | {"dial0.5": 10}
    for name, classes in sets.items():
        data = train.load_data(exp_scaling.dataset(cfg, name))
        assert len(data["x"]) == (100 if name == "onset" else 300) and data["meta"]["num_classes"] == classes
        std = 0.5 if name == "plateau" else 1
        assert abs(data["x"].mean()) < 0.1
        assert abs(data["x"].std() - std) < (0.1 if name in ("dial1", "plateau") else 1e-3)
    assert np.allclose(train.load_data(exp_scaling.dataset(cfg, "plateau"))["x"], train.load_data(
        exp_scaling.dataset(cfg, "dial1"))["x"] / 2)
    ends = [train.load_data(exp_scaling.dataset(cfg, f"dial{a:g}"))["x"].reshape(300, -1) for a in (0, 0.5, 1)]
    middle = ends[1] - ends[1].mean()
    fit = np.linalg.lstsq(np.stack([np.ravel(ends[0] - ends[0].mean()), np.ravel(ends[2])], 1), np.ravel(middle))
    assert fit[1][0] < 1e-3 * np.square(middle).sum()        # a mixture of the two, image by image


# ---- Fréchet distance, FLOPs, REPA -----------------------------------------------------------------------------------

def test_frechet_distance():
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 4.0])                                 # analytic: commuting
    want = 3 * 4 + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert abs(frechet(np.zeros(3), np.diag(a), np.full(3, 2.0), np.diag(b)) - want) < 1e-12
    rng = np.random.default_rng(0)
    (m1, C1), (m2, C2) = (gaussian([rng.standard_normal((50, 8)) @ rng.standard_normal((8, 8)) + k])
                          for k in range(2))
    root = scipy.linalg.sqrtm(C1 @ C2)
    want = np.square(m1 - m2).sum() + np.trace(C1 + C2 - 2 * root.real)
    assert abs(frechet(m1, C1, m2, C2) - want) < 1e-8 * want and abs(frechet(m1, C1, m1, C1)) < 1e-8
    flat = np.outer(m1, m1)                                  # rank one: the root of a singular matrix
    assert abs(frechet(m1, flat, m1, flat)) < 1e-6


def test_flops_of_sit_xl_are_the_published_ones():
    flops = lambda name, size, channels, classes, batch: train.step_flops(tuple(dict(
        name=name, input_size=size, in_channels=channels, num_classes=classes).items()), batch)
    true, paper = flops("SiT-XL/2", 32, 4, 1000, 1)
    assert abs(paper / 2e9 / 118.6 - 1) < 0.03               # GMACs, forward
    assert 2.9 < true / paper < 3.1
    assert flops("UNet-pico", 8, 1, 10, 6)[0] == 3 * flops("UNet-pico", 8, 1, 10, 2)[0]


def test_teachers_tokens_lie_where_the_sits_do():
    """An image that changes in one patch changes the features of that token, and of its neighbours, but not beyond."""
    teacher, x = exp_scaling.Teacher(2, 10), torch.zeros(2, 1, 8, 8)
    x[1, :, 6:, 6:] = 3.0                                    # the last patch, row 3, column 3
    moved = (teacher.tokens(x)[1] - teacher.tokens(x)[0]).norm(dim=1).view(4, 4)
    assert moved.argmax() == 15 and (moved[:2] == 0).all() and (moved[:, :2] == 0).all()


# ---- slopes and shifts -----------------------------------------------------------------------------------------------

def test_slopes_are_least_squares_and_paired():
    rng = np.random.default_rng(0)
    compute = np.outer([1e9, 7e9, 3e10], [100, 200, 800.0])
    common = 5 * rng.standard_normal((1, 1, 400))            # what all networks share must not widen the interval
    E = 0.3 * np.log10(compute)[..., None] + common + 0.01 * rng.standard_normal((3, 3, 400))
    out = slopes(compute, E)
    want = np.polyfit(np.log10(compute).ravel(), E.mean(2).ravel(), 1)[0]
    assert abs(out["all"][0] - want) < 1e-9
    for value, low, high in out.values():
        assert low < 0.3 < high and high - low < 0.01 and low < value < high
    two = np.log10(compute)[..., None] * 0 + np.log10([1, 7, 30])[:, None, None] - 2 * np.log10([1, 2, 8])[:, None]
    out = slopes(compute, two + common)                      # +1 a decade of size, -2 a decade of length
    assert abs(out["size"][0] - 1) < 1e-9 and abs(out["length"][0] + 2) < 1e-9
    assert set(slopes(compute[:, :1], E[:, :1])) == {"all", "size"}


def test_shift_of_a_line_at_equal_loss():
    rng = np.random.default_rng(0)
    def recipe(L, offset, noise, seeds=1):
        L = L + np.zeros((seeds, 1))
        FD = 40 * L + offset + noise * rng.standard_normal(L.shape)
        L_draws = L + 1e-4 * rng.standard_normal((50, *L.shape))
        return L, FD, L_draws, FD + 0.01 * rng.standard_normal((50, *L.shape))
    one, two = recipe(np.linspace(0.7, 0.9, 6), -3.0, 0), recipe(np.linspace(0.8, 1.0, 6), 0.0, 0)
    value, low, high = shift(one, two)
    assert abs(value + 3) < 1e-9 and low < -3 < high and high - low < 0.2
    bent = (one[0], one[1] + 10 * (one[0] - 0.85), one[2], one[3])       # 50 instead of 40 a unit of L: by .05 and .1
    assert abs(shift(bent, two)[0] + 3) < 1e-9 and abs(shift(bent, two, 1)[0] + 2.5) < 1e-9
    widths = {}
    for seeds in (1, 4):                                     # the scatter of the points is in the interval
        ends = [shift(recipe(one[0], -3, 0.5, seeds), recipe(two[0], 0, 0.5, seeds))[1:] for _ in range(300)]
        assert np.mean([low <= -3 <= high for low, high in ends]) > 0.92
        widths[seeds] = np.diff(ends).mean()
    assert widths[4] < 0.9 * widths[1]                       # and more seeds make it narrower


def test_shift_covers_what_a_seed_changes_in_all_networks_alike():
    """Of which the scatter about a line shows nothing."""
    rng, L = np.random.default_rng(0), np.linspace(0.7, 0.9, 4) + np.zeros((3, 1))
    def recipe(offset):
        FD = 40 * L + offset + rng.standard_normal((3, 1))
        return L, FD, np.stack([L, L]), np.stack([FD, FD])
    for curve in (exp_scaling.line, exp_scaling.reached):
        ends = [shift(recipe(-3), recipe(0), curve=curve)[1:] for _ in range(300)]
        assert 0.92 < np.mean([low <= -3 <= high for low, high in ends]) < 0.99


def test_what_a_budget_buys():
    """The best network so far, interpolated, whatever the order of the networks."""
    C, L = np.array([2.0, 0, 3, 1]), np.array([6.0, 8, 1, 4])            # the one at 2 is worse than the one at 1
    assert exp_scaling.reached(C, L, np.array([-1, 0, 0.5, 1, 1.7, 2, 2.5, 3, 4])).tolist() == [8, 8, 6, 4, 4, 4, 2.5,
                                                                                               1, 1]
    value, low, high = shift((C[None], L[None], *[np.stack([v, v])[:, None] for v in (C, L)]),
                             (C[None], L[None] - 1, *[np.stack([v, v])[:, None] for v in (C, L - 1)]), 1,
                             exp_scaling.reached)
    assert value == low == high == 1                         # of one seed, with nothing drawn again


def test_the_same_networks_under_two_recipes():
    """Paired: what all networks of a seed share must not count; of one seed, the networks stand for seeds."""
    rng = np.random.default_rng(0)
    networks, d = np.array([30.0, 20, 10, 5]), rng.standard_normal((3, 1))
    y, drawn = networks + d - 2, np.zeros((5, 3, 4))
    got = exp_scaling.same_networks(y, np.tile(networks, (3, 1)), drawn, drawn)
    assert np.allclose(got, [d.mean() - 2, *scipy.stats.t.interval(0.95, 2, d.mean() - 2, scipy.stats.sem(d[:, 0]))])
    off, none = np.array([[1.0, 2, 4, 3]]), np.full((5, 1, 4), np.nan)
    got = exp_scaling.same_networks(networks + off, networks[None], none, none)
    assert np.allclose(got, [2.5, *scipy.stats.t.interval(0.95, 3, 2.5, scipy.stats.sem(off[0]))])


def test_the_slope_of_a_line_has_the_interval_of_a_regression():
    rng, x = np.random.default_rng(0), np.arange(5.0)
    ends = [exp_scaling.slope(np.tile(x, (2, 1)), 3 * x + rng.standard_normal((2, 5))) for _ in range(400)]
    assert 0.92 < np.mean([low <= 3 <= high for _, low, high in ends]) < 0.98
    assert np.allclose(exp_scaling.slope(x[None], 3 * x[None]), 3)


# ---- training --------------------------------------------------------------------------------------------------------

def test_an_interrupted_training_goes_on(tmp_path):
    """Two legs give the weights of one, with REPA's projector; and REPA's extra loss does change them."""
    cfg = replace(Config(), n_data=200, batch=16, out=str(tmp_path), workers=1)
    job = Job("digits8", "SiT-nano/2", (3, 6), 0.5)
    features = train.load_data(exp_scaling.dataset(cfg, "digits8"))["features"]
    assert features.shape == (200, 16, 48)
    fit(cfg, job._replace(lengths=(3,)), 3)
    two_legs = fit(cfg, job, 6).state_dict()
    other = replace(cfg, out=str(tmp_path / "again"))
    one_leg = fit(other, job, 6).state_dict()
    assert all(torch.equal(one_leg[k], two_legs[k]) for k in one_leg)
    plain = fit(other, job._replace(lam=0.0), 6).state_dict()
    assert (plain["blocks.0.attn.qkv.weight"] - one_leg["blocks.0.attn.qkv.weight"]).abs().max() > 1e-5
    early = fit(other, job._replace(lengths=(2, 6)), 2).state_dict()     # a length that the run has passed already
    assert not torch.equal(early["blocks.0.attn.qkv.weight"], one_leg["blocks.0.attn.qkv.weight"])
    again = fit(other, job, 6).state_dict()
    assert all(torch.equal(one_leg[k], again[k]) for k in one_leg)


def test_over_seeds_adds_students_interval_to_that_of_a_seeds_trajectories():
    """scipy's own t interval where the seeds differ; that of the trajectories alone where they happen to agree."""
    values = np.array([[[1.0, 0.9, 1.1], [5, 4, 6]], [[2, 1.9, 2.1], [5, 4, 6]], [[4, 3.9, 4.1], [5, 3, 7]]])
    got = exp_scaling.over_seeds([dict(slope=dict(size=v), mean=v[:, 0]) for v in values])
    low, high = scipy.stats.t.interval(0.95, 2, 0, scipy.stats.sem([1, 2, 4]))
    half = np.hypot(0.1, high)
    assert np.allclose(got["slope"]["size"], [[7 / 3, 7 / 3 - half, 7 / 3 + half], [5, 5 - 4 / 3, 5 + 4 / 3]])
    assert np.allclose(got["mean"], [7 / 3, 5])
    assert np.allclose(exp_scaling.over_seeds([values[0]]), values[0])


# ---- the script ------------------------------------------------------------------------------------------------------

TINY = ["--n-trajectories=48", "--n-times=4", "--n-data=300", "--n-onset=120", "--batch=16", "--workers=1",
        "--fig3.models", "SiT-nano/4", "SiT-micro/4", "--fig3.lengths", "2", "4",
        "--plateau.models", "SiT-pico/4", "SiT-nano/4", "--plateau.lengths", "2", "4", "--plateau-seeds=2",
        "--fig7.models", "SiT-nano/2", "--fig7.lengths", "2", "4", "6", "--lambdas", "0", "1", "--fig7-seeds=2",
        "--unets.models", "UNet-pico", "--unets.lengths", "1", "2", "3",
        "--dial.models", "SiT-nano/4", "SiT-micro/4", "--dial.lengths", "2", "--amounts", "0", "1",
        "--onset.models", "SiT-nano/4", "SiT-micro/4", "--onset.lengths", "2", "4"]


def command(*argv):
    return subprocess.run([sys.executable, ROOT / "exp_scaling.py", *argv], capture_output=True, text=True, timeout=200,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    first = command(*TINY, "--only=fig3", f"--out={out}")
    assert first.returncode == 0, first.stderr[-2000:]
    alone = json.loads((out / "results.json").read_text())
    kept = {p: p.stat().st_mtime_ns for p in (out / "runs").rglob("*.npz")}
    done = command(*TINY, f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert kept == {p: p.stat().st_mtime_ns for p in kept}   # what --only=fig3 trained is found again
    return out, done.stdout, alone


def test_results_follow_the_contract(tiny):
    out, printed, alone = tiny
    results = json.loads((out / "results.json").read_text())
    assert results["script"] == "exp_scaling" and results["preset"] == "laptop" and results["seconds"] > 0
    assert {"config", "seed", "versions", "device", "commit", "arrays", "claims"} <= set(results)
    assert set(results["arrays"]) == {"fig3", "fig6", "fig7", "dial", "onset", "seconds"}
    for row in results["claims"]:
        assert set(row) == {"claim", "paper", "ours", "ci95", "verdict"}
        assert row["verdict"] in ("holds", "not resolved", "contradicted")
        assert row["claim"] in printed and len(row["claim"]) <= 74, row["claim"]
        assert all(map(np.isfinite, (row["ours"], *row["ci95"]))) and row["ci95"][0] <= row["ci95"][1]
    assert set(alone["arrays"]) == {"fig3", "seconds"} and alone["claims"] == results["claims"][:len(alone["claims"])]
    fig3 = results["arrays"]["fig3"]
    assert np.shape(fig3["compute"]) == (2, 2) and fig3["compute"][1][1] == pytest.approx(2 * fig3["compute"][1][0])
    assert "the empirical score" in printed and "held-out accuracy" in printed
    for name in ("results.png", "results_when.png"):
        assert str(out / name) in printed and 20_000 < (out / name).stat().st_size < 300_000
    assert (out / "results.json").stat().st_size < 300_000


def test_several_processes_share_the_networks(tiny, tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--",
            ROOT / "exp_scaling.py", *TINY, "--only=fig3", f"--out={tmp_path}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["claims"] == tiny[2]["claims"] and done.stdout.count("verdict") == 1


def test_another_data_set_and_its_fid(tmp_path, monkeypatch, capsys):
    """The paper preset's way, on a set in its layout: three channels, a teacher's features, samples as .npz, Inception
    (here a stand-in of 5 features) and its distance to a reference."""
    rng, out = np.random.default_rng(0), str(tmp_path / "out")
    x, y = rng.standard_normal((60, 3, 8, 8)).astype(np.float16), np.arange(60) % 4
    train.save_dataset(tmp_path / "set", dict(x=x, y=y, features=rng.standard_normal((60, 4, 7)).astype(np.float16)),
                       dict(num_classes=4))
    W = rng.standard_normal((192, 5)) / 100
    monkeypatch.setattr(sample_module, "inception", lambda: lambda im: np.resize(im, (len(im), 192)) @ W)
    monkeypatch.setattr(train, "DATA", tmp_path)
    np.savez(tmp_path / "reference.npz", mu=np.zeros(5), sigma=np.eye(5))
    cfg = replace(exp_scaling.PRESETS["paper"], data=str(tmp_path / "set"),
                  fig3=Ladder(("SiT-nano/4", "SiT-micro/4"), (1, 2)), fig7=Ladder(("SiT-nano/4",), (1, 2, 3)),
                  larger=("SiT-micro/4",), unets=Ladder(("UNet-pico",), (1, 2, 3)),
                  n_trajectories=12, n_times=3, batch=8, accum=2, n=5,
                  repa_depth=1, n_fid=6, vae="", device="cpu", lambdas=(0, 1), out=out,
                  reference=str(tmp_path / "reference.npz"))
    exp_scaling.measure(cfg)
    exp_scaling.plot(tmp_path / "out" / "results.json")
    # what is kept of the networks takes what --dry-run foretold; a projector, and what torch.save adds, come on top
    w, taken = exp_scaling.work(cfg), sum(p.stat().st_size for p in (tmp_path / "out" / "runs").rglob("*.pt"))
    weights = [4 * sum(p.numel() for p in build_model(**net[0]).parameters()) for net in w["nets"]]
    foretold = sum(size * net[4] for size, net in zip(weights, w["nets"], strict=True))
    assert foretold < taken < 1.5 * foretold and w["files"] > max(weights)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["arrays"]) == {"fig3", "fig6", "fig7", "seconds"} and "limit" not in results["arrays"]["fig3"]
    row = results["arrays"]["fig7"]["table"][0]
    file = exp_scaling.samples_file(cfg, Job(cfg.data, row["model"], cfg.fig7.lengths), row["steps"])
    images = np.load(file)["arr_0"]
    assert images.shape == (6, 8, 8, 3)
    f = images.reshape(6, -1) @ W
    assert row["FD"] == pytest.approx(frechet(f.mean(0), np.cov(f.T), np.zeros(5), np.eye(5)), rel=1e-3)
    # Figure 7b is of the models with REPA alone, and so as if there were no larger ones
    said = lambda: {c["claim"]: c for c in exp_scaling.part_fig7(cfg)[1]}
    with_larger, cfg = said(), replace(cfg, larger=())
    without, cfg = said(), replace(cfg, larger=("SiT-micro/4",))
    same = [with_larger[k]["ours"] == without[k]["ours"] for k in without]
    alone = ("Fig 7b", "Fig 7a slope of FD over L, U-Net", "minus with attention")
    assert all(s == any(what in k for what in alone) for s, k in zip(same, without, strict=True))
    assert "Inception" in results["arrays"]["fig7"]["how"] and any("Fig 7c" in c["claim"] for c in results["claims"])
    exp_scaling.measure(replace(cfg, reference=""))          # all networks are found; and FID is for others to compute
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    left = [c["claim"] for c in results["claims"] if "Fig 7" in c["claim"]]
    of_L = ("7c L at equal compute", "7b L with REPA")
    assert "ADM's evaluator" in capsys.readouterr().out and all(any(k in c for k in of_L) for c in left) and left
    exp_scaling.plot(tmp_path / "out" / "results.json")
    with pytest.raises(ValueError, match="without --data"):
        exp_scaling.check(replace(cfg, only="dial"))
    assert {p.name for p in tmp_path.iterdir()} == {"set", "reference.npz", "out"}       # nothing beside the data
    with pytest.raises(FileNotFoundError, match="there is no reference"):
        exp_scaling.check(replace(cfg, reference="nosuch.npz"))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="--vae needs the package diffusers"):
        exp_scaling.check(replace(cfg, vae="vae"))


def test_given_weights_are_measured_without_training(tiny, tmp_path, monkeypatch, capsys):
    """Two networks by --model-path give what they gave where they were trained; official weights, one, on latents; what
    does not fit is refused before anything is written."""
    def no_training(*a, **k): raise AssertionError("it trains")
    monkeypatch.setattr(train, "train", no_training)
    runs, fig3 = tiny[0] / "runs", json.loads((tiny[0] / "results.json").read_text())["arrays"]["fig3"]
    made = [str(next(runs.glob(f"dial1_{m}-4_0_0_*")) / "ema_4.pt") for m in ("SiT-micro", "SiT-nano")]
    cfg = replace(Config(), n_trajectories=48, n_times=4, n_data=300, workers=1, model_path=(*made,), out=str(tmp_path))
    exp_scaling.measure(cfg)
    results = json.loads((tmp_path / "results.json").read_text())
    a = results["arrays"]["fig3"]
    assert a["models"] == ["SiT-nano/4", "SiT-micro/4"] and set(results["arrays"]) == {"fig3", "seconds"}
    for key in ("sup_x", "ext_x", "sup_v"):
        assert np.allclose(np.array(a[key]["mean"])[:, 0], np.array(fig3[key]["mean"])[:, 1], rtol=1e-3)
    assert np.allclose(a["ext_x"]["over_smallest"][1][0], fig3["ext_x"]["over_smallest"][1][1], rtol=1e-2, atol=1e-5)
    assert np.allclose(a["limit"]["ext"], fig3["limit"]["ext"], rtol=1e-3)
    names = [c["claim"] for c in results["claims"]]
    assert any("largest minus smallest" in n for n in names) and any("per decade of compute" in n for n in names)
    assert [p.name for p in exp_scaling.plot(tmp_path / "results.json")] == ["results.png"]
    assert "SiT-micro/4" in capsys.readouterr().out
    exp_scaling.train.forecast(**exp_scaling.work(cfg), folder=tmp_path, device=torch.device("cpu"))
    assert "train" not in capsys.readouterr().out.split("cpu", 1)[1].replace("for training", "")
    rng = np.random.default_rng(0)
    train.save_dataset(tmp_path / "latents", dict(x=rng.standard_normal((60, 4, 8, 8)).astype(np.float32),
                                                  y=np.arange(60) % 10), dict(num_classes=10))
    torch.save(official_state(), tmp_path / "official.pt")
    one = replace(cfg, data=str(tmp_path / "latents"), model_path=(str(tmp_path / "official.pt"),))
    exp_scaling.measure(replace(one, out=str(tmp_path / "one")))
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    mean, low, high = results["arrays"]["fig3"]["ext_x"]["ci"][0][0]
    assert low < mean < high and "limit" not in results["arrays"]["fig3"]
    assert {c["claim"].split(":")[0] for c in results["claims"]} == {"Fig 3 supervision, v-space over x-space, latents",
                                                                    "Fig 3 E^ext minus E^sup, SiT-nano/2"}
    exp_scaling.plot(tmp_path / "one" / "results.json")
    no = str(tmp_path / "no")
    for wrong, message in ((replace(one, model_path=(made[0],)), "is a model of images"),
                           (replace(one, only="fig6"), "goes without --model-path"),
                           (replace(one, model_path=(str(tmp_path / "nowhere"),)), "no checkpoint at")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            exp_scaling.measure(replace(wrong, out=no))
    assert not Path(no).exists()


def test_levels_beside_the_published_ones(monkeypatch, capsys):
    level = lambda v: dict(ci=[[[v, v - 1e-4, v + 1e-4]]])
    a = dict(models=["SiT-XL/2"], sup_x=level(0.19), ext_x=level(0.6), sup_v=level(1), ext_v=level(2))
    args = dict(name="SiT-XL/2", in_channels=4, input_size=32, num_classes=1000)
    monkeypatch.setattr(exp_scaling, "model_args", lambda cfg, data, model: args)
    levels = exp_scaling.published(Config(), "imagenet", "SiT-XL/2")
    assert levels == (0.1834, 0.5359)
    errors = dict(sup=np.full((5, 3), 0.19), ext=np.full((5, 3), 0.6) + np.arange(5)[:, None] / 1e4)
    claims = exp_scaling.given_claims(a, errors, levels)
    assert [(c["paper"], c["verdict"]) for c in claims] == [("> 0", "holds"), ("0.1834", "holds"),
                                                           ("0.5359", "contradicted")]
    args |= dict(num_classes=10)                             # of other data, the paper says nothing
    assert exp_scaling.published(Config(), "digits", "SiT-XL/2") is None
    assert len(exp_scaling.given_claims(a, errors, None)) == 1
    assert "0.19000 [0.18990, 0.19010]" in capsys.readouterr().out


def test_published_differences_stand_beside_networks_trained_as_long_as_the_papers(monkeypatch):
    one, errors = [0.0, -1.0, 1.0], lambda: dict(slope=dict(all=[0.0, -1.0, 1.0]), over_smallest=[[[0.0, -1.0, 1.0]]])
    monkeypatch.setattr(exp_scaling, "ladder", lambda *a: dict(sup_x=errors(), ext_x=errors(), v_over_x=one))
    monkeypatch.setattr(exp_scaling, "published", lambda cfg, data, m: dict(a=(0.2, 0.5), b=(0.19, 0.51))[m])
    for last, want in ((400_000, ["-0.0100", "+0.0100"]), (400, ["< 0", "> 0"])):
        cfg = Config(data="latents", fig3=exp_scaling.Ladder(("a", "b"), (200, last)))
        claims = {c["claim"]: c["paper"] for c in exp_scaling.part_fig3(cfg)[1]}
        assert [v for k, v in claims.items() if "largest minus smallest" in k] == want


def test_a_figure_is_drawn_from_its_json_alone(tiny, tmp_path):
    (tmp_path / "results.json").write_bytes((tiny[0] / "results.json").read_bytes())
    exp_scaling.plot(tmp_path / "results.json")
    for name in ("results.png", "results_when.png"):
        assert (tmp_path / name).read_bytes() == (tiny[0] / name).read_bytes()


def test_a_captions_words_are_its_claims():
    """Each claim turned round turns its words round."""
    names = ["Fig 3 supervision error: < 0", "Fig 3 extrapolation error: > 0", "Fig 6 change", "Fig 6 the same",
             "Fig 6 control", "Fig 7b FD at equal L, REPA", "Fig 7c U-Net",
             "Fig 7c L at equal compute, middle, U-Net, attention",
             "Fig 7c L at equal compute, most, U-Net, attention", "Fig 3 plateau, sup",
             "Fig 3 plateau, ext", "Fig 3 plateau after 5 steps",
             "dial", *["onset"] * 3]
    found = dict(arrays=dict(fig3=dict(plateau=dict(lengths=[5]))), config=dict(n_onset=9, plateau_seeds=2))
    def says(low, high, verdict):
        claims = [dict(claim=n, ours=(low + high) / 2, ci95=[low, high],         # the sentence is the control's
                       verdict="not resolved" if n == "Fig 6 the same" else verdict) for n in names]
        return "\n".join(exp_scaling.caption(dict(claims=claims, **found)).values())
    up, down, open_ = says(1, 2, "holds"), says(-2, -1, "contradicted"), says(-1, 1, "not resolved")
    assert "it rises after 5 steps." in up and "it falls after 5 steps." in down
    assert "rises on" in up and "falls" not in up.replace("(paper: falls, rises)", "").replace("falls with size", "")
    assert "falls on" in down and "less than another seed" in down and "more than another seed" in up
    assert "+1.5 in the middle (higher)" in up and "-1.5 at the most of it (lower)" in down
    assert "does not clearly change" in open_ and "not told apart" in open_ and "in 0 of 1 mixtures" in open_


@pytest.mark.parametrize("fields, message", [
    (dict(fig3=Ladder(("SiT-nano/4",), (1, 2))), "fig3 needs two models at least"),
    (dict(onset=Ladder(("SiT-nano/4", "SiT-micro/4"), (2, 1))), "onset.lengths must be positive and ascend"),
    (dict(dial=Ladder(("SiT-nano/4", "SiT-huge/4"), (1,))), "unknown model 'SiT-huge/4'"),
    (dict(fig7=Ladder(("UNet-nano",), (1, 2, 3))), "fig7.models are SiTs"),
    (dict(unets=Ladder(("SiT-nano/2",), (1, 2, 3))), "unets.models are U-Nets"),
    (dict(fig7=Ladder(("SiT-nano/2",), (1, 2))), "a line through the points of fig7 needs three"),
    (dict(fig7=Ladder(("SiT-nano/2", "SiT-nano/4"), (1, 2))), "one patch size"),
    (dict(larger=("UNet-nano",)), "fig7.models, with larger, are SiTs"),
    (dict(larger=("SiT-nano/2",)), "fig7.models, with larger, must differ"),
    (dict(repa_depth=3), "repa_depth 3 is more than the 2 blocks of SiT-nano/2"),
    (dict(lambdas=(0.25, 0.5)), "lambdas must ascend from 0"),
    (dict(amounts=(0, 2)), "amounts of field lie between 0 and 1"),
    (dict(contrast=0), "contrast must be positive"),
    (dict(n_trajectories=1), "n_trajectories must be at least 2"),
])
def test_bad_values(fields, message):
    with pytest.raises(ValueError) as error:
        exp_scaling.check(replace(Config(), **fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_input_is_one_line(tmp_path):
    done = command("--n-times=0", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr == "error: n_times must be at least 1, not 0\n"
