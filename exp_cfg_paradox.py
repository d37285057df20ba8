"""Figure 2: the paradox of classifier-free guidance, and the two curves that the paper does not show (Example 3.1).

Guidance adds (w - 1)(s_theta^c - s_theta^0), the gap between the scores with a label and without, at every step. It
works because that gap is large. Yet both scores were trained towards *empirical* ones, whose x_* is a softmax average
of images. Next to a training image, that image has all the weight, with a label and without: there the gap is 0.

    python exp_cfg_paradox.py           # 2 minutes on 2 CPU cores, after the default model is trained twice (6 minutes)

What you should see. Left, as in the paper: the median empirical gap on noisy training points is 0 until t of about .7,
and the learned gap on sampling trajectories is not. Above .8 all gaps are alike, and 0 at t = 1. The paper concludes
that the network makes the gap where it extrapolates. Right, the same two scores in the other region: the *learned* gap
is nearly as large on training points. The gaps of two training seeds have a cosine of a third: not 0, so it is not all
random misfit, nor 1. The paper's explanation: s^c is trained near images of class c only, s^0 near all images. To test
that alone, one would take s^c from a network that was trained on class c alone.

Exercises; the answers are in the table that is printed last, or in the figure.
1. python exp_cfg_paradox.py --w 4 --out out/w4     Does guidance lead to where there is less to guide? See the learned
   gap on training points over that on trajectories, at t <= .5. Is the change larger than its interval?
2. In measure, write x, y = get_images(data, rows % 500, device, "x_heldout"), and add --out out/heldout. Is it nearness
   to training images that makes the empirical gap vanish? See its row: 0 for images that nobody trained on, too.
3. python exp_cfg_paradox.py --redraw   Where is the empirical gap larger? Compare the bands of the two solid lines. On
   trajectories, the image nearest to a sample is sometimes one of another class.
"""
import dataclasses
from typing import Literal

import numpy as np
import torch

from plumbing import results
from plumbing.cli import check_at_least, pick_device, run_command, setup_processes
from plumbing.data import get_images, labels_in_turn, load_data
from plumbing.fast_score import make_score
from plumbing.runs import load_networks, run_jobs
from sample import noise, solve_ode, velocity
from train import PRESETS as NETWORKS
from train import Config as NetworkConfig
from train import train

REGIONS = ("supervision", "extrapolation")
NAMES = {"supervision": "noisy training points", "extrapolation": "sampling trajectories"}


@dataclasses.dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)  # trained by train.py, or found in out/
    model_path: str = ""  # official SiT weights or a run's folder: measure it alone, and train nothing
    seeds: int = 2  # networks that differ in their training seed
    n: int = 100  # points, and trajectories, at each time; the paper has 200
    n_times: int = 50  # times t = 1/n_times, 2/n_times .. 1
    w: float = 1.0  # guidance of the trajectories; 1 is none, 4 is usual
    fast: bool = False  # the certified engine of plumbing/fast_score.py for the empirical score
    seed: int = 0  # of the points, the noise and the trajectories
    device: str = "auto"  # auto, cpu, cuda, mps
    redraw: bool = False  # draw the figure again from results.json, and measure nothing
    out: str = ""  # folder of the results; default out/exp_cfg_paradox/<preset>


PRESETS = {
    "laptop": Config(),
    "gpu": Config("gpu", NETWORKS["gpu"], n=200, n_times=100, fast=True),
    "paper": Config("paper", NETWORKS["paper"], seeds=1, n=200, n_times=100, fast=True),
}


# ----------------------------------------------------------------------------------------------------------------------
# The maths: the gap s^c - s^0 of the empirical and of the learned score

def empirical_gap(E, z, t, y):
    """Return s_*^c - s_*^0 = (1 - t)/t^2 (x_*^c - x_*^0), (B, D) in float64."""
    # in float64: the collapsed softmaxes differ by less than float32 can tell
    z = z.cpu().double()
    difference = E.posterior_mean(z, t, y) - E.posterior_mean(z, t)
    return ((1 - t) / t**2 * difference).flatten(1)


@torch.no_grad()
def learned_gap(model, z, t, y):
    """Return s_theta^c - s_theta^0, (B, D) in float64: s = -((1 - t) v + z)/t, so it is -(1 - t)/t times that of v."""
    difference = velocity(model, z, t, y) - velocity(model, z, t, None)
    return (-(1 - t) / t * difference).flatten(1).cpu().double()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def measure_gaps(E, models, points, t):
    """Return the sizes of both gaps in both regions, {"empirical, supervision": (seeds, n, T), ...}, and the cosine
    between the learned gaps of the first and the last network at the first's points, {region: (n, T)}.

    points[region] holds (z (T, n, C, H, W), y (n,)) for each network. Processes of torchrun share the times.
    """
    def measure_at(job):
        region, k = job
        at_t = [(z[k], y) for z, y in points[region]]
        empirical = [empirical_gap(E, z, t[k], y).norm(dim=1) for z, y in at_t]
        gaps = [learned_gap(model, z, t[k], y) for model, (z, y) in zip(models, at_t, strict=True)]
        learned = [gap.norm(dim=1) for gap in gaps]
        z, y = at_t[0]
        last = learned_gap(models[-1], z, t[k], y)
        cosine = torch.cosine_similarity(gaps[0], last, dim=1)
        return torch.stack(empirical), torch.stack(learned), cosine                         # (seeds, n) twice, (n,)

    sizes, cosines = {}, {}
    for region in REGIONS:
        found = run_jobs(measure_at, [(region, k) for k in range(len(t))], workers=1)
        by_kind = zip(*found.values(), strict=True)
        empirical, learned, cosine = [torch.stack(values, dim=-1).numpy() for values in by_kind]
        sizes[f"empirical, {region}"] = empirical                                           # (seeds, n, T)
        sizes[f"learned, {region}"] = learned
        cosines[region] = cosine                                                            # (n, T)
    return sizes, cosines


def median_difference(pairs):
    """Return the mean over t of the medians of pairs[:, 1] less those of pairs[:, 0]; pairs (n, 2, T)."""
    first, second = np.median(pairs, axis=0)
    return (second - first).mean()


def median_ratio(pairs):
    """Return the median over t of the ratio of medians, pairs[:, 0] over pairs[:, 1]; pairs (n, 2, T)."""
    first, second = np.median(pairs, axis=0)
    return np.median(first / second)


def make_rows(sizes, cosines, t):
    """Return the claim of Figure 2, and our own findings, all for t <= .5, where the paper's curves differ most."""
    early = t <= 0.5 + 1e-9
    size = {name: values[:, :, early] for name, values in sizes.items()}
    on_paths = size["learned, extrapolation"]

    def against(name):
        """Return pairs (n, 2, T) of a gap and the learned gap on trajectories, for each seed, of unlike images."""
        return np.stack([size[name], on_paths], axis=2)

    difference = results.over_seeds(against("empirical, supervision"), median_difference)
    rows = [
        results.claim("fig2/gap", "Fig 2 learned gap on trajectories minus empirical gap on training points",
                      "> 0", *difference, low=0.0),
        results.finding("fig2/empirical", "empirical gap on training points over learned gap on trajectories",
                        *results.over_seeds(against("empirical, supervision"), median_ratio)),
        results.finding("fig2/inside", "learned gap on training points over learned gap on trajectories",
                        *results.over_seeds(against("learned, supervision"), median_ratio))]
    if len(on_paths) > 1:
        for region, values in cosines.items():
            at_early = values[:, early]
            rows.append(results.finding(f"fig2/cosine/{region}", f"cosine of the gaps of two seeds, {NAMES[region]}",
                                        np.median(at_early), results.bootstrap_interval(at_early)))
    return rows


def measure(cfg):
    """Return rows and arrays: both gaps in both regions, at all times."""
    check_at_least(cfg, n=2, n_times=2, seeds=1)
    data = load_data(cfg.network.data)
    _, _, device = setup_processes(pick_device(cfg.device))
    models = load_networks(train, cfg, data, device)
    E = make_score(data, device, cfg.fast)
    t = np.linspace(1 / cfg.n_times, 1, cfg.n_times)

    # the supervision region: training points, noised; the same points and noise at all times
    rng = np.random.default_rng(cfg.seed)
    rows = rng.choice(E.N, min(cfg.n, E.N), replace=False)
    x, y = get_images(data, rows, device)
    eps = noise(range(len(x)), E.shape, cfg.seed + 1).to(device)
    noisy = torch.stack([(1 - tj) * x + tj * eps for tj in t.tolist()])                     # (T, n, C, H, W)

    # the extrapolation region: each network's own trajectories from the same starting noise
    start = noise(range(len(x)), E.shape, cfg.seed).to(device)
    y_path = labels_in_turn(data, len(x)).to(device)
    times = t[::-1].copy()                                   # torch takes no negative strides
    paths = [solve_ode(model, start, y_path, times, w=cfg.w).flip(0) for model in models]
    points = dict(supervision=[(noisy, y)] * len(models), extrapolation=[(path, y_path) for path in paths])
    sizes, cosines = measure_gaps(E, models, points, t)
    quantiles = {}
    for name, values in sizes.items():
        quantiles[name] = np.quantile(values.reshape(-1, len(t)), [0.1, 0.5, 0.9], axis=0)    # over seeds and points
    arrays = dict(t=t, quantiles=quantiles, n=len(x), seeds=len(models), w=cfg.w)
    return make_rows(sizes, cosines, t), arrays


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

def plot(found, folder):
    """Draw fig2.png: the paper's panel, and the same two scores in the other region."""
    a = found["arrays"]
    t = np.array(a["t"])
    colours = dict(supervision=results.BLUE, extrapolation=results.ORANGE)
    fig, axes = results.new_figure(3.9, columns=2, sharey=True)
    panels = [("The paper's: only the learned gap is large", "supervision", "extrapolation"),
              ("Ours: it is large on training points, too", "extrapolation", "supervision")]
    for ax, (title, empirical, learned) in zip(axes, panels, strict=True):
        for score, region, style in (("empirical", empirical, "-"), ("learned", learned, "--")):
            low, median, high = np.array(a["quantiles"][f"{score}, {region}"])
            ax.fill_between(t, low, high, color=colours[region], alpha=0.18, lw=0)
            ax.plot(t, median, style, color=colours[region], lw=2, label=f"{score}, {NAMES[region]}")
        ax.set(xlabel="t   (0 is data, 1 is noise)", xlim=(0, 1), title=title)
        ax.legend(loc="upper right", title="median, 10% to 90%")
    # the factor (1 - t)/t makes every learned gap infinite at t = 0
    shown = t >= 0.12
    highs = [np.array(a["quantiles"][f"learned, {region}"])[2] for region in REGIONS]
    top = max(high[shown].max() for high in highs)
    axes[0].set(ylabel=r"$\|s^c - s^\varnothing\|$", ylim=(-0.02 * top, 1.05 * top))
    results.save_figure(fig, folder / "fig2.png")


def main(cfg):
    results.run_experiment("exp_cfg_paradox", cfg, measure, plot)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
