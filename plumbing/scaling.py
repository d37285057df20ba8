"""What exp_scaling.py needs and is no lesson: its images, the names of what it keeps, and its intervals."""
import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from model import build_model
from plumbing.cli import count_flops
from plumbing.data import load_data, model_sizes, write_once
from plumbing.files import checkpoint_path
from plumbing.results import bootstrap_interval
from plumbing.stand_ins import small_images

# ----------------------------------------------------------------------------------------------------------------------
# Dead leaves: images whose detail no other image shares


def draw_leaves(n, side, seed, r_min=1.5):
    """Return the grey and the texture of n images, each (n, side, side).

    Discs are laid front to back until they cover every pixel. Their radii have density ~ r^-3 on [r_min, side]. A disc
    has its own grey, uniform in [-1, 1]. Half of the discs have white noise too, each of its own exponential strength.
    """
    rng = np.random.default_rng(seed)
    grey = np.zeros((n, side, side), np.float32)
    texture = np.zeros_like(grey)
    covered = np.zeros(grey.shape, bool)
    y, x = np.mgrid[0:side, 0:side] + 0.5
    todo = np.arange(n)                                      # images with a pixel that no disc covers
    while len(todo):
        m = len(todo)
        u = rng.random(m)
        radius = 1 / np.sqrt(u / side**2 + (1 - u) / r_min**2)
        centre_x, centre_y = rng.uniform(-radius, side + radius, (2, m))
        d2 = (x - centre_x[:, None, None])**2 + (y - centre_y[:, None, None])**2
        visible = (d2 < radius[:, None, None]**2) & ~covered[todo]
        which, row, column = np.nonzero(visible)
        image = todo[which]
        strength = rng.exponential(1, m) * (rng.random(m) < 0.5)
        grey[image, row, column] = rng.uniform(-1, 1, m)[which]
        texture[image, row, column] = strength[which] * rng.standard_normal(len(which))
        covered[image, row, column] = True
        todo = todo[~covered[todo].all((1, 2))]
    return grey, texture


def leaves(n, side, texture, seed):
    """Return (arrays, meta) of a data set of dead leaves, without labels; mean 0, variance 1.

    texture  factor of every disc's texture; 0: all discs are flat. Sets of one seed differ in nothing else.
    """
    grey, detail = draw_leaves(n, side, seed)
    x = grey + texture * detail
    x = ((x - x.mean()) / x.std()).astype(np.float32)[:, None]
    return dict(x=x, y=np.zeros(n, np.int64)), dict(num_classes=1)


def draw_fields(n, side, seed):
    """Return n Gaussian fields with a 1/f spectrum as a data set, their second moments (D, D), and frequencies (D,).

    The moments are those of the density that the fields are drawn from, whose perfect denoiser is a Wiener filter.
    """
    f = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side)).flatten()
    power = f.clamp(min=1 / side)**-2
    waves = torch.fft.fft2(torch.eye(side**2).view(-1, side, side), norm="ortho").flatten(1)
    moments = (waves * (power / power.mean()) @ waves.mH).real
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(side**2, n, generator=generator)
    x = (torch.linalg.cholesky(moments) @ white).T.reshape(n, 1, side, side)
    return dict(x=x.numpy(), y=np.zeros(n, np.int64)), moments, f


def small_digits():
    """Return (arrays, meta) of digits of 16 x 16 with labels, with mean 0 and variance 1."""
    x, y = small_images("mnist5k", 16)
    return dict(x=x, y=y), dict(num_classes=10)


def data_folder(cfg, folder, name, make):
    """Return the folder of a data set: --data, or one that make(), which returns (arrays, meta), draws on first use."""
    if cfg.data:
        return cfg.data
    path = folder / "data" / name
    write_once(path, make)
    return str(path)


def image_sets(cfg, folder):
    """Return {name: folder} of the data sets of Figure 3: leaves with less and less texture, then digits; or --data."""
    if cfg.data:
        return {Path(cfg.data).name: cfg.data}
    sets = {}
    for texture in cfg.textures:
        make = functools.partial(leaves, cfg.n_images, 16, texture, cfg.seed)
        sets[f"texture {texture:g}"] = data_folder(cfg, folder, f"leaves_{texture:g}_{cfg.n_images}_{cfg.seed}", make)
    sets["digits"] = data_folder(cfg, folder, "digits_16", small_digits)
    # too many points should show before the training
    for data in sets.values():
        pick_rows(cfg, load_data(data))
    return sets


def pick_rows(cfg, data):
    """Return the rows of the training points on which all networks are measured."""
    if not 1 < cfg.n_points <= len(data["x"]):
        raise ValueError(f"n_points must lie between 2 and {len(data['x'])}, the number of images, not {cfg.n_points}")
    return np.random.default_rng([cfg.seed, 1]).permutation(len(data["x"]))[:cfg.n_points]


# ----------------------------------------------------------------------------------------------------------------------
# What is kept, and under which name

def name_run(settings):
    """Return a name for the run of a train.Config: readable, and with a hash of all its fields."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{Path(settings.data).name}_{settings.model.replace('/', '-')}_{settings.steps}_{digest}"


def measurement_key(cfg, data, *runs):
    """Return all that a measurement of these runs depends on, for `cached`."""
    files = [(str(run), checkpoint_path(run).stat().st_mtime) for run in runs]
    return dict(data=data["fingerprint"], runs=files, n=cfg.n_points, times=cfg.n_times, seed=cfg.seed, fast=cfg.fast)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of Figure 3

def stack(parts, dim=0):
    """Return {name: tensors of this name, stacked} of a list of dicts with the same names."""
    return {name: torch.stack([part[name] for part in parts], dim) for name in parts[0]}


def gather_seeds(measured):
    """Return {data set: {term: (models, seeds, n)}} of {(data set, ...): {term: (models, n)}}, a case for each seed."""
    cases = {}
    for (name, *_), terms in measured.items():
        cases.setdefault(name, []).append(terms)
    return {name: {term: values.numpy() for term, values in stack(seeds, 1).items()} for name, seeds in cases.items()}


def paired_change(values, weights):
    """Return (mean, interval) of the weighted sum over networks of values (K networks, S seeds, n images).

    weights (K,), which sum to 0: +1 and -1 for the difference of two networks. All networks saw the same images and
    noise, so the sum is taken image by image. The 95% interval covers the images and the seeds. The spread between
    seeds is pooled over all networks, since two seeds alone say little.
    """
    values, weights = np.asarray(values), np.asarray(weights, dtype=float)
    K, S, n = values.shape
    per_image = np.einsum("k,ksn->n", weights, values) / S
    variance, quantile = per_image.var(ddof=1) / n, 1.96
    if S > 1:
        between = values.mean(2).var(1, ddof=1).mean()
        variance += (weights**2).sum() * between / S
        quantile = student.ppf(0.975, K * (S - 1))
    half, mean = quantile * variance**0.5, per_image.mean()
    return float(mean), (float(mean - half), float(mean + half))


def compare_ends(found):
    """Return what changes from the first network to the last, with intervals: E^sup, E^ext, and rho on common points.

    rho is the share of the energy gained by x_theta that x_* has as well. found: the models after the linear denoiser.
    """
    weights = np.zeros(len(found["sup error"]) - 1)
    weights[0], weights[-1] = -1, 1
    gains = [np.mean(found[f"common {term}"][-1] - found[f"common {term}"][1], axis=0) for term in ("both", "theta")]
    gains = np.stack(gains, 1)                               # (n, 2)

    def share(gains):
        both, theta = gains.mean(0)
        return both / theta if theta else 0.0
    return dict(sup=paired_change(found["sup error"][1:], weights), ext=paired_change(found["ext error"][1:], weights),
                rho=(share(gains), bootstrap_interval(gains, share)))


def describe_networks(cfg, folder, found):
    """Return the networks' names and costs, the means of all terms, and E^sup and E^ext with paired intervals."""
    names, cost = [Path(path).name for path in cfg.model_path], [1 + k for k in range(len(cfg.model_path))]
    sizes = model_sizes(load_data(folder))
    for steps, model in itertools.product(cfg.lengths, cfg.models) if not cfg.model_path else ():
        names.append(f"{model}, {steps:,} steps")
        cost.append(steps * count_flops(functools.partial(build_model, model, **sizes), cfg.network.batch))
    table = {term: values.mean((1, 2)) for term, values in found.items()}
    arrays = dict(names=names, cost=cost, table=table | dict(calibration=table["sup both"] / table["sup theta"]))
    for region in ("sup", "ext"):
        errors = found[f"{region} error"][1:]
        level, arrays[region] = errors[0].mean(), []
        for weights in np.eye(len(errors)) - np.eye(len(errors))[0]:
            change, (low, high) = paired_change(errors, weights)
            arrays[region].append([level + change, level + low, level + high])
    return arrays


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of Figure 7

def fit_line(points):
    """Return slope and offset of the distance over L, Eq. (5). points (..., 3): FLOPs, L, distance."""
    _, L, distance = points.reshape(-1, 3).T
    return np.polyfit(L, distance, 1)


def compare_at_equal_L(one, two):
    """Return the distance of recipe one over that of recipe two at equal L, for each seed; and the range of common L.

    one, two: (seeds, networks, 3). We compare the lines of each seed in the middle of the range.
    """
    L_one, L_two = one[..., 1].mean(0), two[..., 1].mean(0)
    low, high = max(L_one.min(), L_two.min()), min(L_one.max(), L_two.max())
    distances = []
    for recipe in (one, two):
        distances.append([np.polyval(fit_line(seed), (low + high) / 2) for seed in recipe])
    return np.divide(*distances), high - low
