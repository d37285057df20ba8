"""exp_freedom.py: subsets, metric and targets against brute force; a tiny run, its contract, its cache, bad inputs."""
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import exp_freedom
import train
from empirical_score import EmpiricalScore
from exp_freedom import (
    Config,
    Net,
    above,
    calibrated_l2,
    faiss_posterior,
    interval,
    l2_to,
    make_target,
    real_images,
    subsets,
)

ROOT = Path(__file__).resolve().parents[1]
needs_faiss = pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")


def points(n=60, classes=3, shape=(1, 3, 3), seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=g) + 2, torch.arange(n) % classes          # centring matters


def brute_force(x, y, z, t, label):
    """x_* by direct differences in float64, one query at a time; label None: over all points."""
    out = torch.empty_like(z, dtype=torch.float64)
    for b in range(len(z)):
        of = x.double() if label is None else x[y == label[b]].double()
        w = torch.softmax(-(z[b].double() - (1 - t[b].double()) * of).flatten(1).square().sum(1) / (2 * t[b]**2), 0)
        out[b] = (w[:, None, None, None] * of).sum(0)
    return out


# ---- the subsets -----------------------------------------------------------------------------------------------------

def test_subsets_are_nested_and_balanced():
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (40, 50, 60, 70)))
    before = None
    for ratio in (1, 2, 3.5, 8):
        score, region = subsets(y, 5, ratio, seed=3)
        assert (np.bincount(y[score]) == 5).all() and (np.bincount(y[region]) == round(5 * ratio)).all()
        assert len(set(region)) == len(region) and set(score) <= set(region)
        if before is not None:
            assert set(score) == set(before[0]) and set(before[1]) < set(region)
        before = score, region
    assert set(subsets(y, 5, 1, seed=3)[1]) == set(score)                    # at ratio 1 they are the same
    assert set(subsets(y, 5, 1, seed=4)[0]) != set(score)                    # the seed decides


def test_subsets_refuse_more_than_there_is():
    y = np.repeat(np.arange(4), (40, 50, 60, 70))
    with pytest.raises(ValueError, match="ratio 9 with 5 images .* class 0 has 40"):
        subsets(y, 5, 9, seed=0)
    score, region = subsets(y, 5, 11, seed=0, balanced=False)                # all of D, as far as each class goes
    assert np.bincount(y[region]).tolist() == [40, 50, 55, 55] and set(score) <= set(region)
    with pytest.raises(ValueError, match="ratio 12"):
        subsets(y, 5, 12, seed=0, balanced=False)
    with pytest.raises(ValueError, match="ratio 1 with 41"):
        subsets(y, 41, 1, seed=0, balanced=False)


# ---- calibrated l2 ---------------------------------------------------------------------------------------------------

def test_calibrated_l2_against_brute_force():
    x, _ = points(80)
    q = torch.cat([points(10, seed=1)[0], x[:5] + 1e-3])
    d2 = (q.double()[:, None] - x.double()).flatten(2).square().sum(2).sort(dim=1).values        # (15, 80)
    want = d2[:, 0] / d2[:, :50].mean(1)
    assert (calibrated_l2(EmpiricalScore(x), q) - want).abs().max() < 1e-12


def test_calibrated_l2_of_copies_and_of_noise():
    x, _ = points(80)
    E = EmpiricalScore(x)
    assert (calibrated_l2(E, x[:9]) == 0).all()
    far = 1e4 * torch.randn(9, 1, 3, 3, generator=torch.Generator().manual_seed(2))
    assert (calibrated_l2(E, far) - 1).abs().max() < 0.01
    assert (calibrated_l2(E, far) <= 1).all()


@pytest.mark.parametrize("which", [0, 1])                    # D_score, and D_region, eight times as dense
def test_a_calibrated_threshold_tells_copies_from_real_images(which):
    """Set by one half of the real digits, it lets 5% of the other half pass, and every copy with a little noise; .25,
    the same for both sets, lets pass a third of real digits for one, and no copy but these for the other."""
    data, cpu = train.load_data("digits"), torch.device("cpu")
    inside = subsets(data["y"], 19, 8, seed=0)[which]
    x = real_images(data, inside, seed=0)
    order = np.random.default_rng(0).permutation(len(x))
    real = l2_to(data, inside, x, 50, cpu).numpy()[order]
    half = len(real) // 2
    threshold = np.quantile(real[:half], 0.05)
    assert abs(np.mean(real[half:] < threshold) - 0.05) < 3.5 * (0.05 * 0.95 * 2 / half)**0.5
    noise = torch.randn(len(inside), *x.shape[1:], generator=torch.Generator().manual_seed(0))
    copies = torch.from_numpy(data["x"][inside]) + 0.1 * noise
    assert (l2_to(data, inside, copies, 50, cpu) < threshold).all()
    assert (np.mean(real < 0.25) > 0.28) == (which == 0)


@pytest.mark.parametrize("held", [True, False])
def test_real_images_are_outside_of_the_subset(held):
    x = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
    data = dict(x=x[:40], y=np.zeros(40, int))
    if held: data |= dict(x_heldout=x[40:], y_heldout=np.zeros(10, int))
    got = real_images(data, np.arange(0, 40, 2), seed=0).flatten().tolist()
    assert got == [*range(1, 40, 2), *(range(40, 50) if held else ())]
    few = real_images(data, np.arange(0, 40, 2), seed=0, most=4).flatten().tolist()
    assert len(few) == 4 * (1 + held) and set(few) <= set(got)


# ---- the three targets -----------------------------------------------------------------------------------------------

T = torch.tensor([1e-3, 0.05, 0.3, 0.6, 0.8, 0.95, 1.0])


@needs_faiss
def test_faiss_with_all_neighbours_is_the_exact_posterior():
    x, _ = points()
    z = torch.randn(len(T), 1, 3, 3, generator=torch.Generator().manual_seed(1)) + 1
    w, i = faiss_posterior(x, len(x))(z, T)
    assert w.shape == i.shape == (len(T), 60) and (w.sum(1) - 1).abs().max() < 1e-12
    mean = (w[..., None, None, None] * x[i].double()).sum(1)
    assert (mean - EmpiricalScore(x).posterior_mean(z.double(), T)).abs().max() < 1e-5
    assert (mean - brute_force(x, None, z, T, None)).abs().max() < 1e-5


@needs_faiss
def test_faiss_finds_the_points_that_weigh_most():
    x, _ = points()
    z = torch.randn(len(T), 1, 3, 3, generator=torch.Generator().manual_seed(1)) + 1
    _, i = faiss_posterior(x, 5)(z, T)
    a = (1 - T.double())[:, None, None, None, None]
    d2 = (z.double()[:, None] - a * x.double()).flatten(2).square().sum(2)                       # (B, N)
    for b in range(len(T) - 1):                              # at t = 1 all weigh alike, and any five will do
        assert set(i[b].tolist()) == set(d2[b].topk(5, largest=False).indices.tolist())


@pytest.mark.parametrize("kind", ["exact", "sampled", pytest.param("faiss", marks=needs_faiss)])
def test_targets_have_the_same_expectation(kind):
    """The mean of many draws against x_* by brute force, within 5 standard errors in every coordinate; kept labels over
    their class, dropped ones over all of D_score."""
    x, y = points()
    draws = 4000
    target = make_target(kind, x, y, k=len(x))
    for b, t in enumerate((0.05, 0.5, 0.8, 1.0)):
        z = ((1 - t) * x[b] + t * torch.randn(x[b].shape, generator=torch.Generator().manual_seed(b)))[None]
        for keep in (True, False):
            args = z.expand(draws, -1, -1, -1), torch.full((draws,), t), torch.full((draws,), 1)
            got = target(*args, torch.full((draws,), keep), torch.Generator().manual_seed(9)).double()
            want = brute_force(x, y, z, torch.tensor([t]), torch.tensor([1]) if keep else None)[0]
            error = 5 * got.std(0) / draws**0.5 + 1e-5
            assert ((got.mean(0) - want).abs() <= error).all()
            if kind == "exact":
                assert (got - want).abs().max() < 1e-5
            else:                                            # a draw is a point of D_score, of the class if it is known
                among = x[y == 1] if keep else x
                assert all((among == g.float()).flatten(1).all(1).any() for g in got[:50])


def test_draws_depend_on_the_generator_alone():
    x, y = points()
    z, t, keep = torch.randn(30, 1, 3, 3), torch.full((30,), 0.9), torch.arange(30) % 2 == 0
    draw = lambda seed: make_target("sampled", x, y)(z, t, y[:30], keep, torch.Generator().manual_seed(seed))
    assert (draw(1) == draw(1)).all() and (draw(1) != draw(2)).any()


def test_shift_is_zero_for_the_same_distribution_and_sees_another_mean():
    rng = np.random.default_rng(0)
    draw = lambda offset: [offset + rng.standard_normal(20_000) for _ in range(4)]
    same, (low, high) = exp_freedom.shift(draw(0), draw(0))
    assert low < same < high and abs(same) < 0.03
    moved, (low, high) = exp_freedom.shift(draw(0), draw(0.5))           # ((2 + .5^2) / 2) - 1 = .125
    assert abs(moved - 0.125) < 0.03 and low < moved < high


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_of_shift_covers(n):
    rng, hit = np.random.default_rng(1), 0
    for _ in range(400):
        low, high = exp_freedom.shift(rng.standard_normal((n, 100)), 0.45 + rng.standard_normal((n, 100)))[1]
        hit += low <= 0.45**2 / 2 <= high
    assert hit >= 0.93 * 400


# ---- intervals -------------------------------------------------------------------------------------------------------

def test_intervals_cover_and_never_collapse():
    low, high = interval(np.zeros((3, 2)), 256)              # three seeds that agree exactly prove nothing exactly
    assert low < 0 < high < 0.02
    rng, hit = np.random.default_rng(0), 0
    for _ in range(400):                                     # networks that differ (sd .05), 256 images each
        p = np.clip([0.3, 0.6] + 0.05 * rng.standard_normal((3, 2)), 0, 1)
        low, high = interval(rng.binomial(256, p) / 256, 256)
        hit += low <= 0.3 <= high
    assert hit >= 0.93 * 400


@pytest.mark.parametrize("spread", [0, 0.02])                # networks that agree, networks that do not
def test_the_interval_of_the_difference_to_real_images_covers(spread):
    """The threshold is where 5% of the real images at hand are below, so that the true part is what is off."""
    rng, hit = np.random.default_rng(2), 0
    for _ in range(400):
        real = rng.random(277)
        threshold = np.quantile(real, 0.05)                  # uniform: the true part of real images below it
        p = np.clip(2 * threshold + spread * rng.standard_normal(3), 0, 1)               # of networks, twice that
        low, high = above(rng.binomial(256, p) / 256, 256, np.mean(real < threshold), 277)[1]
        hit += low <= threshold <= high
    assert hit >= 0.93 * 400


# ---- the script ------------------------------------------------------------------------------------------------------

TINY = ["--transformer.steps=4", "--transformer.batch=8", "--unet.steps=2", "--unet.batch=4", "--per-class=5",
        "--compare.steps=4", "--compare.batch=8", "--ratios", "1", "4", "--n-seeds=2", "--compare-seeds=3",
        "--n-samples=10", "--sample-steps=2", "--device=cpu"]


def command(*argv, **env):
    return subprocess.run([sys.executable, ROOT / "exp_freedom.py", *argv], capture_output=True, text=True, timeout=200,
                          env=os.environ | env)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("freedom")
    done = command(*TINY, "--workers=2", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    # no bars in a file, of workers too
    assert not any(sign in done.stdout + done.stderr for sign in ("\r", "it/s", "%|"))
    return out, done.stdout


def test_results_follow_the_contract(tiny):
    out, printed = tiny
    results = json.loads((out / "results.json").read_text())
    assert results["script"] == "exp_freedom" and results["preset"] == "laptop" and results["seconds"] > 0
    assert {"config", "seed", "versions", "device", "commit", "arrays", "claims"} <= set(results)
    for row in results["claims"]:
        assert set(row) == {"claim", "paper", "ours", "ci95", "verdict"}
        assert row["verdict"] in ("holds", "not resolved", "contradicted")
        assert row["claim"] in printed and len(row["claim"]) <= 74
        assert all(map(np.isfinite, (row["ours"], *row["ci95"]))) and row["ci95"][0] <= row["ci95"][1]
    assert len(results["claims"]) == 13 + 2 * (1 + (importlib.util.find_spec("faiss") is not None))
    for p in (out / "runs").glob("*_dsm_*.json"):            # D_region is D_score at ratio 1, more at ratio 4
        got = json.loads(p.read_text())
        if "_dsm_1_" in p.name: assert got["own"] == pytest.approx(got["score"], rel=1e-6)
        else: assert np.all(np.array(got["own"]) != got["score"])
    real = results["arrays"]["real"]
    assert 0.05 <= real["fraction"] < 0.05 + 1 / real["n"] and real["n"] == 1797 - 50 and real["n_own"] == 1797 - 200
    assert results["arrays"]["ratio"] == [1, 4] and results["arrays"]["d_score"] == 50
    assert all(f"target {kind}" in printed for kind in results["arrays"]["targets"])
    assert str(out / "results.png") in printed and (out / "results.png").stat().st_size > 20_000
    assert (out / "results.json").stat().st_size < 300_000


def test_a_figure_is_drawn_from_its_json_alone(tiny, tmp_path):
    (tmp_path / "results.json").write_bytes((tiny[0] / "results.json").read_bytes())
    exp_freedom.plot(tmp_path / "results.json")
    assert (tmp_path / "results.png").read_bytes() == (tiny[0] / "results.png").read_bytes()


def test_the_caption_says_what_the_verdicts_say(tiny):
    results = json.loads((tiny[0] / "results.json").read_text())
    results["claims"][4]["verdict"], results["claims"][6]["verdict"] = "holds", "contradicted"
    assert exp_freedom.caption(results).splitlines()[2].startswith("    Against real images: at ratio 1 no more, ")
    assert "; at 4 fewer copies, " in exp_freedom.caption(results).splitlines()[2]
    for rise, control, first, second in (("contradicted", "holds", "fewer copies", "no more"),
                                         ("contradicted", "contradicted", "fewer copies", "more copies"),
                                         ("holds", "contradicted", "more copies", "more copies"),
                                         ("not resolved", "holds", "not resolved", "no more")):
        results["claims"][0]["verdict"], results["claims"][2]["verdict"] = rise, control
        line = exp_freedom.caption(results).splitlines()[1]
        assert line.startswith(f"SiT-micro/4 in the largest region against the smallest: {first}, "), (rise, control)
        assert f"; by plain DSM {second}, " in line, (rise, control)


def test_the_papers_rise_is_that_of_the_same_ratios(tiny):
    """Not that from 1 to 25.6, whatever the ratios here."""
    assert [exp_freedom.paper_rise(arch, 1, 25.6) for arch in ("transformer", "unet")] == ["+0.77", "+0.80"]
    rows = json.loads((tiny[0] / "results.json").read_text())["claims"]                          # ratios 1 and 4
    assert [r["paper"] for r in rows[:2]] == ["+0.68", "+0.05"]


def test_a_training_cut_short_goes_on_where_its_checkpoint_is(tmp_path, monkeypatch):
    """Bit for bit, and without the steps that were done."""
    cfg, net = exp_freedom.Config(per_class=5), exp_freedom.Net("SiT-nano/4", 9, 16, 4e-3)
    fit = lambda name: exp_freedom.fit(cfg, net, "exact", 2, 0, torch.device("cpu"), tmp_path / name)[0].state_dict()
    step_noise, seen = train.step_noise, []

    def watched(step, *args):
        seen.append(step)
        if len(seen) == 6:                                   # steps 0 to 4 are done
            raise KeyboardInterrupt
        return step_noise(step, *args)
    whole = fit("whole.pt")
    assert not any(tmp_path.iterdir())                       # so short a training leaves no checkpoint
    monkeypatch.setattr(exp_freedom, "SAVE_EVERY", -1)
    monkeypatch.setattr(train, "step_noise", watched)
    with pytest.raises(KeyboardInterrupt):
        fit("cut.pt")
    again = fit("cut.pt")
    assert seen == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_an_interrupted_sweep_goes_on(tiny):
    """A lost run is trained again, here without worker processes, to the same scores; the others are only read."""
    out, _ = tiny
    runs = sorted((out / "runs").iterdir())
    assert {p.suffix for p in runs} == {".json"}
    lost, kept = runs[0], {p: p.stat().st_mtime_ns for p in runs[1:]}
    before = json.loads(lost.read_text())
    lost.unlink()
    net = json.loads((out / "results.json").read_text())["config"]
    cfg = dataclasses.replace(Config(), **{k: net[k] for k in
                                             ("per_class", "n_seeds", "compare_seeds", "n_samples", "sample_steps")},
                              ratios=(1.0, 4.0), transformer=Net(**net["transformer"]), unet=Net(**net["unet"]),
                              compare=Net(**net["compare"]),
                              workers=1, device="cpu", threshold=0.5, out=str(out))
    exp_freedom.measure(cfg)
    assert kept == {p: p.stat().st_mtime_ns for p in kept} and sorted((out / "runs").iterdir()) == runs
    assert np.abs(np.subtract(before["score"], json.loads(lost.read_text())["score"])).max() < 1e-3
    a = json.loads((out / "results.json").read_text())["arrays"]         # a threshold that is given stays
    assert a["threshold"] == 0.5 and a["real"]["fraction"] == pytest.approx(a["real"]["sweep"][25], abs=1e-3)


@pytest.mark.parametrize("fields, message", [
    (dict(ratios=(1, 9)), "ratio 9 with 19 images per class in D_score needs 171 of each, but class"),
    (dict(threshold=0), "threshold must lie between 0 and 1, not 0"),
    (dict(threshold=np.nan), "threshold must lie between 0 and 1, not nan"),
    (dict(false_copies=1), "false_copies must lie between 0 and 1, not 1"),
    (dict(false_copies=1e-3), "277 real images outside of D_region are too few to tell the nearest 0.1%"),
    (dict(per_class=4), "D_score has 40 points, but calibrated l2 needs n = 50 neighbours"),
    (dict(target="nearest"), "unknown target 'nearest': expected exact, sampled, faiss"),
    (dict(ratios=(2, 1)), "ratios must be two or more, from 1 up, in ascending order"),
    (dict(ratios=(0.5, 1)), "ratios must be two or more, from 1 up"),
    (dict(n_samples=0), "n_samples must be at least 1"),
    (dict(unet=Net("UNet-huge", 1, 1, 1e-3)), "unknown model 'UNet-huge'"),
    (dict(transformer=Net("SiT-nano/3", 1, 1, 1e-3)), "patch size 3 does not divide"),
    (dict(unet=Net("UNet-nano", 0, 1, 1e-3)), "steps and batch must be at least 1"),
])
def test_bad_values(fields, message):
    with pytest.raises(ValueError) as error:
        exp_freedom.check(dataclasses.replace(Config(), **fields))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_bad_value_is_one_line_and_names_the_package(tmp_path):
    (tmp_path / "faiss.py").write_text("raise ImportError('not here')")                 # as if it were not installed
    done = command("--target=faiss", f"--out={tmp_path / 'out'}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    assert done.stderr == "error: target faiss needs the package faiss: pip install faiss-cpu, or faiss-gpu\n"


def test_faiss_is_imported_only_when_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)          # an import of it fails
    x, y = points()
    make_target("exact", x, y), make_target("sampled", x, y)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        make_target("faiss", x, y)


def test_a_batch_in_parts_gives_the_same(tmp_path):
    net, made = exp_freedom.Net("SiT-nano/4", 6, 16, 4e-3), []
    for at_once in (256, 5):                                 # of 16: parts of 5, 5, 5 and 1
        cfg = Config(per_class=5, at_once=at_once)
        model = exp_freedom.fit(cfg, net, "exact", 2, 0, torch.device("cpu"), tmp_path / "ckpt")[0]
        made.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert 0 < (made[0] - made[1]).abs().max() < 1e-5


def test_divergence_ends_a_training_at_once(tmp_path):
    net = exp_freedom.Net("SiT-nano/4", 10**6, 16, 1e9)
    with pytest.raises(ValueError, match="SiT-nano/4 diverged: the loss is .* at step"):
        exp_freedom.fit(Config(per_class=5, warmup=0), net, "dsm", 1, 0, torch.device("cpu"), tmp_path / "ckpt")
