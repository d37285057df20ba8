"""Figure 5: without the freedom to extrapolate, a model memorizes (claim C3; Experiment 4.3, Appendix C.7).

Two nested sets of images play two roles. D_score defines the target, the posterior mean x_* of its empirical score.
D_region defines where the network is asked for it, the supervision region:

    L = E |x_theta(z_t, t) - x_*(z_t, t)|^2,    z_t = (1 - t) x + t eps with x from D_region,    x_* over D_score

A larger D_region does not change the target, only where it is asked for: at noisy images that are not in D_score, too.
There x_* is still made of images of D_score alone, at small t nearly of one. A network that learns this copies them.

    python exp_freedom.py                       # 18 small networks, 4 minutes on 2 CPU cores
    python exp_freedom.py --target sampled      # the paper's own target (C.7); or faiss, its way to find it

What you should see. P(nearer): how often a sample's calibrated l2 to D_score is below a held-out real image's. A new
real image has .5. At ratio |D_region| / |D_score| = 1 P is below; at 8, above. Gate: a judge knows ratio 1's digits.

1. python exp_freedom.py --threshold .15    Figure 5c: ratio 1, then real images, then 2, 4, 8. Does this order hold?
2. python exp_freedom.py --target sampled --out out/sampled     Does an image drawn from the posterior do as well?
3. In fig5_mechanism.png, left: which of the two lines closes most of the gap? Can it explain the copies on the right?
"""
import copy
import functools
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from empirical_score import EmpiricalScore
from model import build_model
from plumbing import results
from plumbing.cli import check_at_least, pick_device, run_command, setup_processes
from plumbing.data import get_images, labels_in_turn, load_data, model_sizes
from plumbing.fast_score import FaissScore, FastEmpiricalScore
from plumbing.images import to_uint8
from plumbing.runs import run_grid
from sample import T_MIN, noise, solve_ode
from train import PRESETS as NETWORKS
from train import Config as NetworkConfig
from train import learning_rate, step_indices, step_noise, update_average

# Read off Fig. 5c: copies at these ratios, by a threshold that the paper does not give. Between them we interpolate.
PAPER_RATIOS = (1, 2, 4, 8, 25.6)
PAPER = {
    "sit": (0.08, 0.41, 0.76, 0.82, 0.85),
    "unet": (0, 0.01, 0.05, 0.59, 0.80)}
NEARER = "P(nearer than a real image)"
FINDINGS = {
    "dsm": f"plain training on the largest region (real images: .5): {NEARER}",
    "smallest": "smallest region: error to x_* at held-out images, over that at images of D_score",
    "largest": "largest region: the same ratio of errors",
    "agree": "largest region: samples whose nearest image two seeds share, from the same noise",
}


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    data: str = "digits"  # a data set under data/, or a folder of the same layout
    # of train.py's fields only these count: model, steps, batch, lr, warmup, decay, ema, and `keep`, when to measure
    sit: NetworkConfig = field(default_factory=lambda: NetworkConfig(
        model="SiT-micro/4", steps=1000, batch=64, lr=8e-3, warmup=50, decay=0.5, keep=(125, 250, 500)))
    unet: NetworkConfig = field(default_factory=lambda: NetworkConfig(
        model="UNet-pico", steps=400, batch=64, lr=8e-3, warmup=50, decay=0.5))
    target: Literal["exact", "sampled", "faiss"] = "exact"  # x_*, or an image drawn from its posterior
    per_class: int = 19  # images of each class in D_score, which needs 50 in all
    ratios: tuple[float, ...] = (1, 2, 4, 8)  # |D_region| / |D_score|, ascending from 1
    n_seeds: int = 2  # networks of each kind: other weights, batches and noise, the same images
    n_samples: int = 256  # images that each generates
    threshold: float = 0.25  # ours, for the picture alone: a sample is called a copy if its calibrated l2 is below
    workers: int = 2  # networks trained at once, one thread each; 1: in this process, for a GPU
    fast: bool = False  # the certified engine of plumbing/fast_score.py for the empirical score
    seed: int = 0  # of the choice of images; the networks have the seeds from here on
    device: str = "cpu"  # auto, cpu, cuda, mps; the laptop's networks are at home on a CPU
    redraw: bool = False  # draw results.json again as it was measured: no other field counts
    out: str = ""  # folder of the results and networks; default out/exp_freedom/<preset>


PRESETS = {
    "laptop": Config(),
    # D_score is 2,000 of the 60,000 images of MNIST; first: python data/prepare.py mnist
    "gpu": Config("gpu", "mnist", replace(NETWORKS["gpu"], model="SiT-S/4", steps=4000, keep=(500, 1000, 2000)),
                  replace(NETWORKS["gpu"], model="UNet-XS", steps=4000), per_class=200, ratios=(1, 2, 4, 8, 25.6),
                  workers=1, fast=True, device="auto"),
    "paper": Config("paper", "imagenet", replace(NETWORKS["paper"], model="SiT-L/2", keep=(50_000, 100_000, 200_000)),
                    replace(NETWORKS["paper"], model="UNet-B", keep=()), per_class=100, ratios=(1, 2, 3, 4, 8, 25.6),
                    workers=1, fast=True, device="auto"),
}


def choose_subsets(y, per_class, ratio, seed):
    """Return rows of D_score and D_region: per_class and ratio * per_class images of each class of y (N,), or all."""
    rng = np.random.default_rng(seed)
    labels = np.unique(y)
    wanted = round(per_class * ratio)
    if wanted * len(labels) > len(y):
        raise ValueError(f"ratio {ratio:g} needs {wanted} images of each class, {len(y)} are too few: lower per_class")
    # both sets begin at the start of one random order of each class, so that regions are nested
    order = [rng.permutation(np.flatnonzero(y == label)) for label in labels]
    score = [rows[:per_class] for rows in order]
    region = [rows[:wanted] for rows in order]
    return np.concatenate(score), np.concatenate(region)


def load_images(cfg, device):
    """Return the data, and (images, labels) of D_score, of real images that are held out, and of a judge."""
    data = load_data(cfg.data)
    if "x_heldout" not in data:
        raise ValueError(f"{cfg.data} has no x_heldout.npy: we compare with real images that are held out")
    score, _ = choose_subsets(data["y"], cfg.per_class, cfg.ratios[-1], cfg.seed)
    held = np.arange(len(data["x_heldout"]))[:1000]
    # the judge knows no image of D_score, so that no copy is recognised merely as itself
    rest = np.setdiff1d(np.arange(len(data["x"])), score)
    judge = np.random.default_rng(cfg.seed).permutation(rest)[:20_000]
    return (data,
            get_images(data, score, device),
            get_images(data, held, device, "x_heldout"),
            get_images(data, judge, device))


def calibrated_l2(E, x):
    """Return |x - x_1|^2 / mean_i |x - x_i|^2 (B,), x_i the 50 nearest images, 0 for a copy; and the row of x_1. C.7"""
    d2, index = E.nearest(x, 50)                             # (B, 50), ascending
    return d2[:, 0] / d2.mean(1), index[:, 0]


def recognise(x, x_judge, y_judge):
    """Return the label for which the 5 nearest of the judge's images vote, (B,)."""
    _, index = EmpiricalScore(x_judge).nearest(x, 5)
    return y_judge[index].mode(1)[0]


@torch.no_grad()
def error_to_target(model, E, x, y):
    """Return |x_theta - x_*|^2 per dimension (B,), at images x (B, C, H, W) with noise, a mean over t from .2 to .7."""
    eps = noise(range(len(x)), x.shape[1:], seed=1).to(x.device)
    total = 0
    for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        z = torch.lerp(x, eps, t)
        total += (model(z, t, y) - E.posterior_mean(z, t, y)).square()
    return total.flatten(1).mean(1) / 6


def find_target(kind, E, x, z, t, y, generator):
    """Return the target of z: x_*, or an image drawn from its posterior (same minimiser); for dsm, the clean x.  C.7"""
    if kind == "dsm":
        return x
    if kind == "exact":
        # differs from the paper: Eq. (6) itself, which the paper calls infeasible
        return E.posterior_mean(z, t, y)
    return E.x[E.sample_posterior(z, t, y, generator)]       # Eq. (7)


def train_network(net, target, seed, data, region, E, device):
    """Yield the averaged network, always the same object, after each step of net.keep and at the end. E: of D_score."""
    torch.manual_seed(seed)
    model = build_model(net.model, **model_sizes(data), prediction="x").to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), net.lr, weight_decay=0, fused=True)
    for step in range(net.steps):
        rows = region[step_indices(step, net.batch, len(region), seed)]
        x, y = get_images(data, rows, device)
        t, eps, _ = step_noise(step, x.shape, seed, device)
        t = t.clamp(min=T_MIN)
        z = torch.lerp(x, eps, t[:, None, None, None])       # (B, C, H, W)
        # differs from the paper, whose x_* averages all of D_score. Ours averages the class of x alone: at ratio 1,
        # plain training with labels has the same minimiser as this loss. We drop no labels: we sample with labels.
        generator = torch.Generator().manual_seed(10**9 * (seed + 1) + step)
        wanted = find_target(target, E, x, z, t, y, generator)
        # differs from the paper: all t weigh the same. A loss on scores weighs by (1 - t)^2 / t^4: only small t count.
        loss = (model(z, t, y) - wanted).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(net, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step, net.ema)
        if step + 1 in (*net.keep, net.steps):
            yield average


def measure_network(cfg, job):
    """Train the network of a job, such as "sit/exact/8/0". Return arrays: what we measure of it, and of real images."""
    name, target, ratio, seed = job.split("/")
    _, _, device = setup_processes(pick_device(cfg.device))
    data, (x_score, y_score), (x_real, y_real), judge = load_images(cfg, device)
    _, region = choose_subsets(data["y"], cfg.per_class, float(ratio), cfg.seed)
    E = FastEmpiricalScore(x_score, y_score) if cfg.fast else EmpiricalScore(x_score, y_score)
    E_target = FaissScore(x_score, y_score) if target == "faiss" else E
    # all networks start from the same noise, so that we can compare them sample by sample
    z1 = noise(range(cfg.n_samples), E.shape, cfg.seed).to(device)
    y = labels_in_turn(data, cfg.n_samples).to(device)
    l2_of_steps = []
    for model in train_network(getattr(cfg, name), target, int(seed), data, region, E_target, device):
        # differs from the paper: not dopri5, whose steps depend on the whole batch and differ between networks
        x = solve_ode(model, z1, y, solver="heun", steps=20)[-1]
        l2, nearest = calibrated_l2(E, x)
        l2_of_steps.append(l2)
    real, _ = calibrated_l2(E, x_real)
    return dict(
        l2=torch.stack(l2_of_steps),                         # (steps, n); all that follows is of the last step
        nearer=(l2[:, None] < real).float().mean(1),         # the fraction of real images that are farther
        real=real,
        nearest=nearest,
        recognised=recognise(x, *judge) == y,
        known=recognise(x_real, *judge) == y_real,
        outside=error_to_target(model, E, x_real, y_real),
        inside=error_to_target(model, E, x_score, y_score),
        images=to_uint8(torch.stack([x[:8], x_score[nearest[:8]]])))


def make_claims(cfg, name, found):
    """Return both halves of C3: the network generalizes in the smallest region, and memorizes in the largest."""
    recognised = found["recognised"][0].mean()
    gate = (recognised > 0.9 * found["known"].mean(), f"only {recognised:.2f} of the samples at ratio 1 are recognised")
    rows = []
    for k, verb, bound in ((0, "generalizes", dict(high=0.5)), (-1, "memorizes", dict(low=0.5))):
        text = f"{getattr(cfg, name).model} {verb} at ratio {cfg.ratios[k]:g}: {NEARER}"
        paper = f"copies: {np.interp(cfg.ratios[k], PAPER_RATIOS, PAPER[name]):.2f}"
        nearer = results.over_seeds(found["nearer"][k], np.mean)
        rows.append(results.claim(
            f"fig5/{verb}/{name}", text, paper, *nearer, gate=gate, **bound))
    return rows


def measure(cfg):
    """Return the rows, and what we measured of all networks, arrays (ratios, seeds, ...)."""
    check_at_least(cfg, n_seeds=2)
    def find_networks(net, target, ratios):
        key = dict(net=getattr(cfg, net), data=load_data(cfg.data)["fingerprint"],
                   numbers=(cfg.per_class, cfg.n_samples, cfg.seed))
        jobs = [f"{net}/{target}/{ratio:g}" for ratio in ratios]
        seeds = range(cfg.seed, cfg.seed + cfg.n_seeds)
        folder = results.results_folder("exp_freedom", cfg) / "networks"
        return run_grid(functools.partial(measure_network, cfg), jobs, seeds, cfg.workers, folder, key)

    sit = find_networks("sit", cfg.target, cfg.ratios)
    dsm = find_networks("sit", "dsm", cfg.ratios[-1:])
    unet = find_networks("unet", cfg.target, cfg.ratios)
    gap = sit["outside"] / sit["inside"].mean(axis=2, keepdims=True)                        # (ratios, seeds, images)
    agree = sit["nearest"][-1, :1] == sit["nearest"][-1, 1:]
    ours = dict(dsm=dsm["nearer"][0], smallest=gap[0], largest=gap[-1], agree=agree)
    rows = make_claims(cfg, "sit", sit) + make_claims(cfg, "unet", unet)
    for name, text in FINDINGS.items():
        rows.append(results.finding(f"fig5/{name}", text, *results.over_seeds(ours[name], np.mean)))
    return rows, dict(sit=sit, dsm=dsm, unet=unet)


def plot(found, folder):
    """Draw fig5.png, whose error bars are the range over seeds, and fig5_mechanism.png."""
    arrays, cfg = found["arrays"], found["config"]
    blue = results.BLUE
    ratios, threshold = cfg["ratios"], cfg["threshold"]
    is_copy = {kind: np.array(arrays[kind]["l2"]) < threshold for kind in arrays}           # (ratios, seeds, steps, n)
    real = np.mean(np.array(arrays["sit"]["real"]) < threshold)
    fig, axes = results.new_figure(4.8, columns=2, rows=2, height_ratios=(1, 2))
    for ax, k, letter in zip(axes[0], (0, -1), "ab", strict=True):
        images = np.array(arrays["sit"]["images"][k][0])
        results.draw_pairs(ax, images, is_copy["sit"][k, 0, -1, :8])
        ax.set_title(f"({letter}) $|D_{{region}}| = {ratios[k]:g}\\,|D_{{score}}|$")
    ours, paper = axes[1]
    for net, style in (("sit", "o-"), ("unet", "s--")):
        copies = is_copy[net][:, :, -1].mean(2)              # (ratios, seeds)
        ours.errorbar(
            ratios, copies.mean(1), np.ptp(copies, 1) / 2, fmt=style, color=blue,
            label=cfg[net]["model"])
        paper.plot(PAPER_RATIOS, PAPER[net], style, color=blue)
    ours.plot(ratios[-1], is_copy["dsm"][:, :, -1].mean(), "D", color=results.GREY, label="plain training")
    ours.axhline(real, color=results.GREEN, ls=":", label="held-out real images")
    ours.legend()
    ours.set(title="(c) Copies against the region", ylabel="fraction of copies")
    paper.set_title("The paper's SiT-L/2 and UNet-B")
    for ax, ticks in ((ours, ratios), (paper, PAPER_RATIOS)):
        ax.set(xscale="log", ylim=(-0.02, 1), xlabel="$|D_{region}|\\,/\\,|D_{score}|$")
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    results.save_figure(fig, folder / "fig5.png")

    fig, (left, right) = results.new_figure(3.4, columns=2)
    for region, colour, label in (("outside", results.ORANGE, "held-out images"), ("inside", blue, "$D_{score}$")):
        error = np.mean(arrays["sit"][region], axis=(1, 2))
        left.plot(ratios, error, "o-", color=colour, label=label)
    left.set(title="Error to $x_*$: the two regions become alike", ylim=0,
             xlabel="$|D_{region}|\\,/\\,|D_{score}|$")
    n_kept = is_copy["sit"].shape[2]
    network = cfg["sit"]
    steps = sorted({*network["keep"], network["steps"]})[:n_kept]
    for k, ratio in enumerate(ratios):
        copies = is_copy["sit"][k].mean((0, 2))             # (steps,)
        shade = (k + 1) / len(ratios)
        right.plot(steps, copies, "o-", color=blue, alpha=shade, label=f"ratio {ratio:g}")
    right.set(title="Copies against training", xlabel="steps", ylabel="fraction of copies", ylim=(0, 1))
    left.legend()
    right.legend()
    results.save_figure(fig, folder / "fig5_mechanism.png")


if __name__ == "__main__":
    experiment = functools.partial(results.run_experiment, "exp_freedom", measure=measure, plot=plot)
    run_command(experiment, PRESETS, __doc__)
