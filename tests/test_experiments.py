"""Every experiment at a tiny size, the contract of its results, and the claims at a size where they hold."""
import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from test_model import official_state

import exp_cfg_paradox
import exp_shells
import train
from empirical_score import EmpiricalScore

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "exp_shells": ["--n-points=40", "--n-trajectories=12", "--n-lines=5", "--n-times=10", "--n-images=12", "--batch=12",
                   "--memo-times=3"],
    "exp_cfg_paradox": ["--n=12", "--n-times=10", "--batch=12"],
}
MODEL = ["--train.data=digits", "--train.model=SiT-nano/4", "--train.steps=30", "--train.batch=16", "--device=cpu"]


def command(script, *argv):
    return subprocess.run([sys.executable, ROOT / f"{script}.py", *argv], capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module", params=TINY)
def tiny(request, tmp_path_factory):
    """(script, where its results lie, what it printed) of one tiny run."""
    run, out = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("out")
    done = command(request.param, *TINY[request.param], *MODEL, f"--train.out={run}", f"--out={out}")
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, out, done.stdout


def test_results_follow_the_contract(tiny):
    script, out, printed = tiny
    results = json.loads((out / "results.json").read_text())
    assert results["script"] == script and results["preset"] == "laptop" and results["seconds"] > 0
    assert {"config", "seed", "versions", "device", "commit", "arrays", "claims"} <= set(results)
    assert results["config"]["train"]["model"] == "SiT-nano/4"
    for row in results["claims"]:
        assert set(row) == {"claim", "paper", "ours", "ci95", "verdict"}
        assert row["verdict"] in ("holds", "not resolved", "contradicted")
        assert row["claim"] in printed and len(row["claim"]) <= 74
        assert all(map(np.isfinite, (row["ours"], *row["ci95"])))
        assert row["ci95"][0] <= row["ci95"][1]
    assert str(out / "results.png") in printed and (out / "results.png").stat().st_size > 20_000


def test_a_figure_is_drawn_from_its_json_alone(tiny, tmp_path):
    script, out, _ = tiny
    (tmp_path / "results.json").write_bytes((out / "results.json").read_bytes())
    {"exp_shells": exp_shells, "exp_cfg_paradox": exp_cfg_paradox}[script].plot(tmp_path / "results.json")
    assert (tmp_path / "results.png").read_bytes() == (out / "results.png").read_bytes()


@pytest.mark.parametrize("script, argv, message", [
    ("exp_shells", ["--n-points=0"], "n_points must be at least 1"),
    ("exp_shells", ["--n-times=1"], "n_times must be at least 2"),
    ("exp_shells", ["--overlap-class=10"], "overlap_class 10 has 0 images"),
    ("exp_shells", ["--train.data=nowhere"], "no data set at"),
    ("exp_shells", ["--redraw", "--out={tmp}"], "nothing to redraw"),
    ("exp_cfg_paradox", ["--n=0"], "n must be at least 1"),
    ("exp_cfg_paradox", ["--preset=huge"], "unknown preset 'huge'"),
    ("exp_cfg_paradox", ["--redraw", "--out={tmp}"], "nothing to redraw"),
])
def test_bad_input_is_one_line(script, argv, message, tmp_path):
    done = command(script, *[a.replace("{tmp}", str(tmp_path)) for a in argv])
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A data set of latents, and official weights that fit it."""
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    arrays = {"x": (60, 4, 8, 8), "x_heldout": (20, 4, 8, 8)}
    arrays = {k: rng.standard_normal(v).astype(np.float32) for k, v in arrays.items()}
    arrays |= {k.replace("x", "y"): np.arange(len(v)) % 10 for k, v in arrays.items()}
    train.save_dataset(folder / "data", arrays, dict(num_classes=10))
    torch.save({"ema": {k: v.float() for k, v in official_state().items()}, "args": argparse.Namespace(lr=1)},
               folder / "SiT-small.pt")
    return folder


@pytest.mark.parametrize("script", TINY)
def test_official_weights_are_measured_without_training(script, latents, tmp_path, monkeypatch):
    def no_training(cfg): raise AssertionError("it trains")
    monkeypatch.setattr(train, "train", no_training)
    module = {"exp_shells": exp_shells, "exp_cfg_paradox": exp_cfg_paradox}[script]
    argv = [*TINY[script], f"--train.data={latents / 'data'}", "--device=cpu", f"--out={tmp_path}"]
    config = tyro.cli(module.Config, args=[*argv, f"--model-path={latents / 'SiT-small.pt'}"])
    module.measure(config)
    module.plot(tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arrays"]["d"] == 4 * 8 * 8 and results["config"]["model_path"].endswith("SiT-small.pt")
    assert (tmp_path / "results.png").stat().st_size > 20_000
    for data in ("digits", latents / "other"):               # of another shape; of another number of classes
        if data != "digits":
            train.save_dataset(data, dict(x=np.zeros((9, 4, 8, 8), np.float32), y=np.arange(9) % 4),
                               dict(num_classes=7))
        with pytest.raises(ValueError, match=r"SiT-small.pt is a model of images \(4, 8, 8\) in 10 classes; the data "
                                             rf"set {data} has images \(\d, 8, 8\) in \d+ classes"):
            module.measure(dataclasses.replace(config, train=train.Config(data=str(data)), out=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


# ---- the maths -------------------------------------------------------------------------------------------------------

def test_shell_widths_hold_the_mass_they_promise():
    for d in (20, 784, 4096):
        r = torch.randn(20_000, d, generator=torch.Generator().manual_seed(0)).norm(dim=1) / d**0.5
        paper, sharp = exp_shells.shell_width(d, 0.01)
        assert ((r - 1).abs() <= sharp).float().mean() > 0.99
        assert sharp < 3.5 / d**0.5 and paper > 2                            # the paper's covers every r from 0 to 3
    assert abs(exp_shells.shell_width(4096, 0.01)[0] * 64 - 137) < 1         # the figures of Prop. 3.2 at d = 4096
    assert abs(exp_shells.shell_width(4096, 0.01)[1] * 64 - 3.3) < 0.1


def test_the_median_leaves_the_shells_where_a_formula_says():
    """Noise orthogonal to x - x_i: r^2 = 1 + (alpha/sigma)^2 |x - x_i|^2 / d is (1 + width)^2 at a t in closed form."""
    t, width, far = np.linspace(0.02, 1, 50), 0.117, np.array([0.1, 0.45, 2.0])          # |x - x_i| / sqrt d
    r = np.sqrt(1 + ((1 - t) / t * far[:, None])**2)
    ratio = np.sqrt((1 + width)**2 - 1) / far                # (1 - t)/t where a point leaves
    for k, want in enumerate(1 / (1 + ratio)):
        assert abs(exp_shells.leaving(r[k:k + 1], t, width) - want) < 2e-3
    assert exp_shells.leaving(r, t, width) == exp_shells.leaving(r[1:2], t, width)       # of three, the median
    assert exp_shells.leaving(np.ones_like(r), t, width) == 0 and exp_shells.leaving(r + 1, t, width) == 1


def test_gaps_are_differences_of_scores():
    """Both gaps against the definition: the norm of a difference of two scores, each formed from its own velocity."""
    x, y = torch.randn(30, 1, 4, 4, dtype=torch.float64), torch.arange(30) % 3
    E, t = EmpiricalScore(x, y), 0.7
    z = torch.randn(8, 1, 4, 4, dtype=torch.float64)
    s_c = E.score(z, t, y[:8])
    gap, x_c = exp_cfg_paradox.empirical_gap(E, z, t, y[:8])[:2]
    assert torch.allclose(gap, (s_c - E.score(z, t)).flatten(1).norm(dim=1))
    model = train.build_model("SiT-nano/2", 4, 1, 3)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    torch.nn.init.normal_(model.final_layer.adaLN_modulation[1].weight)
    z = z.float()
    score = lambda label: -((1 - t) * model(z, t, label) + z) / t
    found = exp_cfg_paradox.learned_gap(model, z, t, y[:8], x_c)             # the gap, and the error
    for size, other in zip(found, (score(None), s_c), strict=True):
        want = (score(y[:8]) - other).flatten(1).norm(dim=1).double()
        assert want.min() > 0 and torch.allclose(size, want, rtol=1e-3)
    assert all((size == 0).all() for size in exp_cfg_paradox.learned_gap(model, z, 1.0, y[:8], x_c))     # alpha = 0


def test_pair_overlaps_match_the_worst_pair():
    x = torch.randn(40, 1, 4, 4)
    t = torch.linspace(0.1, 1, 5, dtype=torch.float64)
    want = EmpiricalScore(x).log_overlap(t).log_c
    assert torch.allclose(((1 - t) / t)**2 * exp_shells.pair_log_overlaps(x).max(), want)


def test_the_mirror_image_is_not_counted_as_the_image():
    """Rows 2k and 2k + 1 are an image and its flip: of eight samples, three are the image, four its flip, one other."""
    half = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.stack([half, half.flip(-1)], 1).flatten(0, 1)
    x[15] = x[14]                                            # a symmetric image: its flip is the image itself
    E, i = EmpiricalScore(x), torch.tensor([3, 0, 15, 2, 7, 8, 13, 4])
    out = x[torch.tensor([3, 0, 14, 3, 6, 9, 12, 19])] + 1e-3
    assert exp_shells.memorized(E, out, x[i], i, True) == (3, 4)
    assert exp_shells.memorized(E, out, x[i], i, False) == (3, 0)


def test_mirror_images_are_counted_where_the_data_have_them(latents, tmp_path):
    """Only meta.json knows; the row pairs are those of data/imagenet.py."""
    x = np.random.default_rng(1).standard_normal((30, 4, 8, 8)).astype(np.float32)
    arrays = dict(x=np.stack([x, x[..., ::-1]], 1).reshape(60, 4, 8, 8), y=np.repeat(np.arange(30) % 10, 2))
    for k, meta in enumerate((dict(num_classes=10), dict(num_classes=10, flips="row 2k + 1 is the mirror image"))):
        train.save_dataset(tmp_path / str(k), arrays, meta)
        config = tyro.cli(exp_shells.Config, args=[
            *TINY["exp_shells"], f"--train.data={tmp_path / str(k)}", "--device=cpu", f"--out={tmp_path / f'out{k}'}",
            f"--model-path={latents / 'SiT-small.pt'}"])
        exp_shells.measure(config)
        exp_shells.plot(tmp_path / f"out{k}" / "results.json")
        found = json.loads((tmp_path / f"out{k}" / "results.json").read_text())["arrays"]
        assert found["memorized"][0] == 1.0 and ("flipped" in found) == bool(k)
    both = np.array(found["memorized"]) + found["flipped"]
    assert found["flipped"][0] == 0.0 and len(both) == 4 and both.max() <= 1   # .75 is added


# ---- the claims, at a size where they are known to hold: 4,500 digits and a model trained for half a minute ----------

def test_claims_on_mnist5k(tmp_path):
    run = tmp_path / "run"
    model = ["--train.model=SiT-micro/4", "--train.steps=500", "--train.save-every=500", f"--train.out={run}",
             "--device=cpu"]
    sizes = {"exp_shells": ["--n-points=1000", "--n-trajectories=60", "--n-times=10", "--n-images=150",
                            "--memo-times=3"],
             "exp_cfg_paradox": ["--n=60", "--n-times=10"]}
    claims = {}
    for script, size in sizes.items():
        out = tmp_path / script
        done = command(script, *size, *model, f"--out={out}")
        assert done.returncode == 0, done.stderr[-2000:]
        claims |= {row["claim"]: row for row in json.loads((out / "results.json").read_text())["claims"]}
    find = lambda start: next(row for text, row in claims.items() if text.startswith(start))
    for start in ("C1 training points", "C1 a restricted", "C2 sampling", "Fig 4 memorization", "Fig 2 empirical",
                  "why: "):
        assert find(start)["verdict"] == "holds", find(start)
    assert find("Fig 2 empirical")["ci95"][1] < 1e-3 and 0.4 < find("C2 mostly")["ours"] < 0.6
    # the control: the learned gap is there on the training points too, where it is less than the error
    for start in ("Fig 2 learned", "control: learned gap, training points"):
        assert find(start)["verdict"] == "contradicted", find(start)
