"""Figures 3, 6 and 7: selective underfitting, REPA, and the scaling law taken apart (Experiment 4.1, Section 5).

Both errors of Figure 3 are E_t |x_theta(z_t, t) - x_*(z_t, t)|^2 per dimension, with x_theta = z - t v_theta: E^sup on
noised training points, E^ext along the model's own trajectories. The paper: better models have a smaller E^sup and a
*larger* E^ext. How can that be? (C.5 writes v for x; in v E^ext would be infinite. See docs/differences.md.)

    |x_theta - x_*|^2 = |x_theta|^2 + |x_*|^2 - 2 <x_theta, x_*>

Suppose a network learns new detail. At the same z, |x_theta|^2 grows by A, <x_theta, x_*> by rho A, x_* stays: the
error changes by (1 - 2 rho) A. On training points the fit makes E <x_theta, x_*> = E |x_theta|^2: rho is near 1. On
trajectories x_* is made of training images. Ours are discs, "dead leaves"; a disc's noise is in no other image, so
rho < 1/2, the error rises. Digits share more. We measure rho at the last network's z; on other z, x_* changes as well.
REPA aligns features with a teacher's. Figure 6: where does it change a network? Figure 7: better samples at equal L?

    python exp_scaling.py --only fig3           # 8 minutes on 2 CPU cores; fig6 and fig7 together take 5 more

L = E |v_theta - v_*|^2 on noised training points. Gates (measure_fig3, 6, claim_lower) say if a claim can be judged.
1. python exp_scaling.py --only fig3 --textures 0      Does E^ext still rise, or fall? See rho.
2. python exp_scaling.py --only fig3 --lengths 100 200 What if E^sup is above that of the best linear denoiser?
3. python exp_scaling.py --only fig7 --n-student 4500  What is a teacher worth that saw the same images, and labels?
"""
import dataclasses
import functools
import itertools
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

import train
from model import build_model
from plumbing import results, scaling
from plumbing.cli import check_at_least, count_flops, pick_device, run_command, setup_processes
from plumbing.data import get_images, labels_in_turn, load_data, model_sizes
from plumbing.fast_score import make_score
from plumbing.files import load_run
from plumbing.results import bootstrap_interval, claim, finding, pair_interval, paired_change, student_interval
from plumbing.runs import cached, run_jobs
from plumbing.scaling import measurement_key, name_run, plan_fig3, plan_fig7
from plumbing.stand_ins import SIDE, Judge, draw_fields, pick_rows
from sample import noise, predict_x, solve_ode, velocity

TRAINING = functools.partial(train.Config, batch=64, label_dropout=0.0, grid=False, save_every=10**6)


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # gives all other fields their defaults
    only: Literal["all", "fig3", "fig6", "fig7"] = "all"  # one figure alone
    model_path: tuple[str, ...] = ()  # SiT weights or runs, small to large, of --data: Figure 3 of these
    data: str = ""  # a data set in place of those made here
    network: train.Config = field(default_factory=functools.partial(
        TRAINING, lr=8e-3, decay=1.0))  # Figure 3: its training; jobs set data, model, steps, seed and repa
    models: tuple[str, ...] = ("SiT-pico/4", "SiT-1x32/4", "SiT-nano/4", "SiT-mini/4")  # Figure 3: small to large
    lengths: tuple[int, ...] = (500, 2000)  # Figure 3: training iterations; each length is a training of its own
    seeds: int = 3  # Figure 3: trainings of every network
    textures: tuple[float, ...] = (1.0, 0.3, 0.0)  # strength of the leaves' texture; the first is Figure 3's
    n_images: int = 20_000  # leaves in a set
    n_points: int = 256  # noised training points, and as many trajectories
    n_times: int = 16  # times t = (k + 1/2) / n_times, which are also the steps of Heun's method
    network7: train.Config = field(default_factory=functools.partial(
        TRAINING, lr=3e-3, warmup=50, decay=0.0, repa_depth=2, keep=(150, 250, 400)))  # Figures 6 and 7: the same
    sits: tuple[str, ...] = ("SiT-micro/2",)  # Figures 6 and 7: SiTs, small to large
    unets: tuple[str, ...] = ("UNet-pico",)  # Figure 7c: U-Nets, each with attention and without
    lambdas: tuple[float, ...] = (0.0, 0.5, 2.0)  # weights of REPA; the first is none
    seeds7: int = 3  # trainings of every network of Figures 6 and 7
    digits: str = "mnist5k"  # 28 x 28 digits, averaged down to 8 x 8, of which the student sees a few
    n_student: int = 500  # images that the student sees
    n_teacher: int = 4500  # images that the teacher sees, the student's among them
    n_samples: int = 1024  # images for a Frechet distance
    workers: int = 2  # networks at once, one thread each; 1 for a GPU
    fast: bool = False  # the fast engine of the empirical score, for large data sets
    seed: int = 0  # of data, points and noise
    device: str = "cpu"  # cpu, auto, cuda, mps
    redraw: bool = False  # draw the figures again from results.json
    out: str = ""  # folder of the results; default out/exp_scaling/<preset>


PRESETS = {
    "laptop": Config(),
    "gpu": Config("gpu", network=TRAINING(lr=1e-3, decay=1.0), lengths=(4000, 16_000),
                  models=("SiT-mini/4", "SiT-micro/4", "SiT-tiny/4", "SiT-S/4"),
                  n_points=500, n_samples=8192, workers=1, fast=True, device="auto"),
    # differs from the paper: a judge of latents, not Inception; for Figure 7c fewer networks
    "paper": Config("paper", data="imagenet", network=train.PRESETS["paper"], network7=train.PRESETS["paper"],
                    models=("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2"), lengths=(200_000, 300_000, 400_000), seeds=1,
                    n_points=1000, n_times=100, sits=("SiT-S/2", "SiT-B/2"), unets=("UNet-S", "UNet-B"),
                    lambdas=(0.0, 0.25, 0.5, 1.0), n_samples=50_000, workers=1, fast=True, device="auto"),
}


def train_network(network, folder, job):
    """Train, resume or find the network of a job (data, model, steps, seed, weight of REPA). Return its run."""
    settings = dataclasses.replace(network, **dataclasses.asdict(job))
    settings.out = str(folder / "runs" / name_run(settings))
    return str(train.train(settings, alone=True))


def times(cfg):
    # differs from the paper: it draws 100 random times (C.5); common ones make paired differences small
    return [(k + 0.5) / cfg.n_times for k in range(cfg.n_times)]


def noised_points(cfg, data, device):
    """Return noised training points z (T, n, C, H, W) and their labels (n,): every network sees the same ones."""
    rows = pick_rows(cfg, data)
    x, y = get_images(data, rows, device)
    eps = noise(range(cfg.n_points), x.shape[1:], cfg.seed + 1).to(device)
    return torch.stack([torch.lerp(x, eps, t) for t in times(cfg)]), y


def starting_noise(cfg, data, n, device):
    """Return noise (n, C, H, W) and labels (n,), from which every network draws its images."""
    z1 = noise(range(n), data["x"].shape[1:], cfg.seed + 2)
    return z1.to(device), labels_in_turn(data, n).to(device)


def trajectories(cfg, model, z1, y):
    """Return z at all times on the way from noise z1, (T, B, C, H, W), one step of Heun's apart, and the images."""
    # differs from the paper: not dopri5, whose steps depend on the network and on the batch
    path = solve_ode(model, z1, y, [1.0, *reversed(times(cfg)), 0.0], solver="heun", steps=1)
    return path[1:-1].flip(0), path[-1]                      # without z1 and the images; t ascends


@torch.no_grad()
def along(cfg, f, z, y):
    """Return f(z_t, t, y) at all times of z (T, B, C, H, W), stacked alike."""
    return torch.stack([f(z_t, t, y) for z_t, t in zip(z, times(cfg), strict=True)])


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3: the error to x_* on noised training points, E^sup, and along trajectories, E^ext (C.5)

class Wiener:
    """The best linear denoiser of data with second moments U diag(S) U^T, from the k largest S and their U:

        x_theta = U_k diag((1 - t) S / ((1 - t)^2 S + t^2)) U_k^T z
    """
    prediction = "x"

    def __init__(self, moments, k):
        S, U = torch.linalg.eigh(moments)                    # ascending; U (D, D)
        self.S, self.U = S[-k:].clamp(min=0), U[:, -k:]

    def __call__(self, z, t, y=None):
        gain = (1 - t) * self.S / ((1 - t)**2 * self.S + t**2)
        x = (z.flatten(1) @ self.U * gain) @ self.U.T
        return x.view(z.shape)


def terms(cfg, region, model, z, y, x_star):
    """Return the error |x_theta - x_*|^2 of every image and its three terms, means over t and pixels, (B,) each."""
    x_theta = along(cfg, functools.partial(predict_x, model), z, y)
    parts = dict(error=(x_theta - x_star)**2, theta=x_theta**2, star=x_star**2, both=x_theta * x_star)
    return {f"{region} {name}": part.flatten(2).double().mean((0, 2)).cpu() for name, part in parts.items()}


def measure_models(cfg, data, models, device):
    """Return the terms of several models, (models, n) each: on noised training points ("sup error", "sup theta", ...),
    on their own trajectories ("ext ..."), and on those of the last model, where all meet the same x_* ("common ...").
    "samples energy" is that of the images that they make.
    """
    x_star = make_score(data, device, cfg.fast).posterior_mean
    z, y = noised_points(cfg, data, device)
    z1, y1 = starting_noise(cfg, data, cfg.n_points, device)
    common, _ = trajectories(cfg, models[-1], z1, y1)
    star, common_star = along(cfg, x_star, z, y), along(cfg, x_star, common, y1)
    found = []
    for model in models:
        path, images = trajectories(cfg, model, z1, y1)
        parts = terms(cfg, "sup", model, z, y, star)
        parts |= terms(cfg, "ext", model, path, y1, along(cfg, x_star, path, y1))
        parts |= terms(cfg, "common", model, common, y1, common_star)
        found.append(parts | {"samples energy": images.flatten(1).double().square().mean(1).cpu()})
    return scaling.stack(found)


def measure_runs(cfg, folder, case):
    """Return what `measure_models` says of the best linear denoiser and of runs; case = (name, data set, runs)."""
    _, data, runs = case
    data, device = load_data(data), pick_device(cfg.device)

    def compute():
        x, _ = get_images(data, np.arange(min(20_000, len(data["x"]))), device)
        moments = x.flatten(1).T @ x.flatten(1) / len(x)
        models = [Wiener(moments, len(moments))]
        for run in runs:
            models.append(load_run(run, device, data=data))
        return measure_models(cfg, data, models, device)
    return cached(folder / "measured", measurement_key(cfg, data, *runs), compute)


def measure_ladder(cfg):
    """Return E^sup and E^ext of perfect denoisers of Gaussian 1/f fields, without training: each knows k waves."""
    data, moments, frequencies = draw_fields(2000, 16, cfg.seed)
    # each cut keeps or drops equal frequencies together
    modes = [int((frequencies <= cut).sum()) for cut in (0.07, 0.14, 0.2, 0.3, 0.45, 0.8)]
    models = [Wiener(moments, k) for k in modes]
    found = measure_models(cfg, data, models, "cpu")
    return dict(modes=modes, sup=found["sup error"].mean(1), ext=found["ext error"].mean(1))


def compare_ends(found):
    """Return what changes from the first network to the last, with intervals: E^sup, E^ext, and rho on common points.

    found {term: (models, seeds, n)}. rho, the gain of <x_theta, x_*> over that of |x_theta|^2, may be above 1.
    """
    networks = {term: values[1:] for term, values in found.items()}      # the first is the linear denoiser
    weights = np.zeros(len(networks["sup error"]))
    weights[0] = -1
    weights[-1] = 1

    def gain(term):
        values = networks[term]
        return (values[-1] - values[0]).mean(0)
    def slope(gains):
        both, theta = gains.mean(0)
        return both / theta
    gains = np.stack([gain("common both"), gain("common theta")], 1)     # (n, 2)
    return dict(
        sup=paired_change(networks["sup error"], weights),
        ext=paired_change(networks["ext error"], weights),
        rho=(slope(gains), bootstrap_interval(gains, slope)))


def measure_fig3(cfg, folder):
    if cfg.model_path:
        cases = [(cfg.data, cfg.data, cfg.model_path)]
    else:
        plan = plan_fig3(cfg, folder)
        jobs = [*itertools.chain(*(jobs for _, jobs in plan))][::-1]     # a short one last: a long one would be alone
        runs = run_jobs(functools.partial(train_network, cfg.network, folder), jobs, cfg.workers)
        cases = [(name, jobs[0].data, tuple(map(runs.get, jobs))) for name, jobs in plan]
    measured = run_jobs(functools.partial(measure_runs, cfg, folder), cases, cfg.workers)
    found = scaling.gather_seeds(measured)
    first = cases[0][0]
    arrays = scaling.describe_networks(cfg, cases[0][1], found[first]) | dict(ladder=measure_ladder(cfg))
    arrays["ends"] = {name: compare_ends(values) for name, values in found.items()}

    # A network that is worse than a linear denoiser has not learned the spectrum: there is no detail yet to speak of.
    linear, *errors = arrays["table"]["sup error"]
    gate = (max(errors) < linear, f"needs E^sup of all networks below {linear:.3f}, the best linear denoiser's")
    ends = arrays["ends"]
    what = "largest and longest minus smallest and shortest"
    rows = [
        claim("fig3/sup", f"Fig 3: E^sup, {what}", "-0.0050", *ends[first]["sup"], high=0, gate=gate),
        claim("fig3/ext", f"Fig 3: E^ext, {what}", "+0.0025", *ends[first]["ext"], low=0, gate=gate),
        finding("fig3/rho", "Fig 3: rho, gain of <x_theta, x_*> over gain of |x_theta|^2", *ends[first]["rho"]),
    ]
    if "digits" in ends:
        text = f"Fig 3 on digits, one seed, rho {ends['digits']['rho'][0]:.2f}: E^ext, the same difference"
        rows.append(finding("fig3/digits", text, *ends["digits"]["ext"]))
    return rows, arrays


# ----------------------------------------------------------------------------------------------------------------------
# Figure 6: what REPA changes, on training points and on trajectories; networks that see few digits

def supervision(cfg, data, device):
    """Return noised training points z (T, n, C, H, W), their labels (n,), and v_* there."""
    z, y = noised_points(cfg, data, device)
    return z, y, along(cfg, make_score(data, device, cfg.fast).velocity, z, y)


def velocities(cfg, model, z, y):
    """Return v_theta at z (T, n, C, H, W)."""
    return along(cfg, functools.partial(velocity, model), z, y)


def split_change(base, aligned):
    """Return by seed, (seeds, 3): the size of REPA's change, of what REPA does alone, and of another seed's change.

    base, aligned: v_theta without and with REPA, (seeds, ...). The change of a seed, r + a, is what REPA does, plus
    chance. Chance is independent between seeds: the mean product of two seeds' changes, (r + a)(r + b), is that of r^2.
    """
    change = aligned - base
    rows = []
    for s in range(len(base)):
        others = np.arange(len(base)) != s
        total = change[s].square()
        by_repa = change[s] * change[others]
        by_seed = (base[s] - base[others]).square()
        rows.append([part.mean().item() for part in (total, by_repa, by_seed)])
    return np.array(rows)


def measure_fig6(cfg, folder):
    device = pick_device(cfg.device)
    largest = cfg.sits[-1:]
    jobs = plan_fig7(cfg, folder, largest) + plan_fig7(cfg, folder, largest, cfg.lambdas[-1])
    train_job = functools.partial(train_network, cfg.network7, folder)
    runs = run_jobs(train_job, jobs, cfg.workers)
    models = [load_run(runs[job], device) for job in jobs]
    data = load_data(jobs[0].data)
    z, y, v_star = supervision(cfg, data, device)
    z1, labels = starting_noise(cfg, data, cfg.n_points, device)
    path, _ = trajectories(cfg, models[0], z1, labels)
    # differs from the paper: one network's path for all, and velocities, on which we train. Scores differ by
    # (1 - t) / t times as much, and the smallest t would outweigh all others.
    on_points = torch.stack([velocities(cfg, model, z, y) for model in models])
    on_path = torch.stack([velocities(cfg, model, path, labels) for model in models])
    base, aligned = on_points.chunk(2)                       # without REPA, with REPA: (seeds, T, n, C, H, W)
    L = (base - v_star).square().mean().item()
    of_points = split_change(base, aligned) / L
    base, aligned = on_path.chunk(2)
    of_path = split_change(base, aligned) / L
    ratios = of_path / of_points                             # (seeds, 3)
    repa_ratio, _, seed_ratio = ratios.T
    resolved = pair_interval(of_path[:, 1])[0] > 0
    gate = resolved, "the changes of the seeds have nothing in common: train longer, or raise lambdas"
    text = "Fig 6: change by REPA, trajectories over training points"
    ci95 = student_interval(repa_ratio)
    row = claim("fig6/ratio", text, "> 1", repa_ratio.mean(), ci95, low=1, gate=gate)
    # If this is as large, the ratio above says where networks differ, and nothing of REPA.
    control = finding("fig6/seed", "Fig 6: the same ratio of what another seed changes", seed_ratio.mean(),
                      pair_interval(seed_ratio))
    return [row, control], dict(of_points=of_points, of_path=of_path)


# ----------------------------------------------------------------------------------------------------------------------
# Figure 7: the Frechet distance as a function of L

def measure_student(cfg, folder, judge, job):
    """Train a network. Return its FLOPs, L and Frechet distance after each of its lengths, (lengths, 3)."""
    run = train_network(cfg.network7, folder, job)
    data = load_data(job.data)
    device = pick_device(cfg.device)
    key = measurement_key(cfg, data, run) | dict(what="distance", samples=cfg.n_samples, lengths=cfg.network7.keep)

    def compute():
        z, y, v_star = supervision(cfg, data, device)
        z1, labels = starting_noise(cfg, data, cfg.n_samples, device)
        build = functools.partial(build_model, job.model, **model_sizes(data))
        flops = count_flops(build, cfg.network7.batch)
        points = []
        for steps in cfg.network7.keep:
            model = load_run(f"{run}/ema_{steps}.pt", device)
            error = velocities(cfg, model, z, y) - v_star
            # differs from the paper: Heun, not dopri5; the features of our judge, not Inception's
            images = solve_ode(model, z1, labels, solver="heun", steps=8)[-1]
            L = error.square().mean().item()
            points.append([flops * steps, L, judge.distance(images)])
        return dict(points=np.array(points))

    found = cached(folder / "measured", key, compute)
    return found["points"].numpy()


def compare_at_equal_L(one, two):
    """Return the distance of recipe one over that of recipe two at equal L, for each seed; and how much L they share.

    one, two: (seeds, checkpoints, 3). Eq. (5): distance = f(L). We fit f, a line for each seed, and compare mid-range.
    """
    L_one, L_two = one[..., 1].mean(0), two[..., 1].mean(0)
    low = max(L_one.min(), L_two.min())
    high = min(L_one.max(), L_two.max())

    def distance(points):
        _, L, distances = points.T
        line = np.polyfit(L, distances, 1)
        return np.polyval(line, (low + high) / 2)
    ratios = [distance(a) / distance(b) for a, b in zip(one, two, strict=True)]
    return np.array(ratios), high - low


def claim_lower(id, text, one, two):
    """Return a row: at equal L, recipe one has a lower distance than recipe two."""
    ratios, overlap = compare_at_equal_L(one, two)
    gate = (overlap > 0, "no L in common: choose other lengths")
    ci95 = student_interval(ratios)
    return claim(id, text, "< 1", ratios.mean(), ci95, high=1, gate=gate)


def measure_fig7(cfg, folder):
    recipes = {}
    for repa in cfg.lambdas:
        recipes[f"SiT, REPA {repa:g}"] = plan_fig7(cfg, folder, cfg.sits, repa)
    without_attention = [f"{model}-conv" for model in cfg.unets]
    recipes["U-Net, attention"] = plan_fig7(cfg, folder, cfg.unets)
    recipes["U-Net, convolutions"] = plan_fig7(cfg, folder, without_attention)
    judge = Judge(cfg.data or cfg.digits, SIDE, cfg.seed)
    measure_job = functools.partial(measure_student, cfg, folder, judge)
    jobs = sum(recipes.values(), [])
    measured = run_jobs(measure_job, jobs, cfg.workers)
    points = {}
    for name, jobs in recipes.items():
        found = [measured[job] for job in jobs]
        points[name] = np.reshape(found, (cfg.seeds7, -1, 3))

    no_repa, *_, most_repa, _attention, convolutions = points
    rows = [
        claim_lower("fig7b/repa", f"Fig 7b: distance at equal L, {most_repa} over none", points[most_repa],
                    points[no_repa]),
        claim_lower("fig7c/convolutions", f"Fig 7c: distance at equal L, {convolutions} over SiT",
                    points[convolutions], points[no_repa]),
    ]
    return rows, points


def measure(cfg):
    """Measure the figures asked for. Return their rows, and {"fig3": arrays, ...}."""
    if cfg.model_path and not (cfg.only == "fig3" and cfg.data and len(cfg.model_path) > 1):
        raise ValueError("--model-path takes two networks or more, small to large, with their --data and --only fig3")
    check_at_least(cfg, seeds=1, seeds7=3)
    folder = results.results_folder("exp_scaling", cfg)
    cfg.network.device = cfg.network7.device = cfg.device
    setup_processes(pick_device(cfg.device))
    figures = dict(fig3=measure_fig3, fig6=measure_fig6, fig7=measure_fig7)
    rows, arrays = [], {}
    for name, measure_figure in figures.items():
        if cfg.only in ("all", name):
            more, arrays[name] = measure_figure(cfg, folder)
            rows += more
    return rows, arrays


if __name__ == "__main__":
    main = functools.partial(results.run_experiment, "exp_scaling", measure=measure, plot=scaling.plot)
    run_command(main, PRESETS, __doc__)
