"""What exp_scaling.py needs and is no lesson: its images, the names of what it keeps, and its intervals."""
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from empirical_score import EmpiricalScore
from plumbing.data import save_dataset
from plumbing.fast_score import FastEmpiricalScore
from plumbing.files import checkpoint_path

# ----------------------------------------------------------------------------------------------------------------------
# Dead leaves: images whose detail no other image shares


def draw_leaves(n, side, seed, r_min=1.5):
    """Return the grey and the texture of n images, each (n, side, side).

    Discs are laid front to back until they cover every pixel. Their radii have density ~ r^-3 on [r_min, side]. A disc
    has its own grey, uniform in [-1, 1]. Every second disc has white texture too, of its own exponential strength.
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
    """Return (arrays, meta) of a data set of dead leaves without labels, with mean 0 and variance 1.

    texture  factor of every disc's texture; 0: all discs are flat. Sets of one seed differ in nothing else.
    """
    grey, detail = draw_leaves(n, side, seed)
    x = grey + texture * detail
    x = ((x - x.mean()) / x.std()).astype(np.float32)[:, None]
    meta = dict(name=f"leaves, texture {texture:g}", num_classes=1, source="drawn by plumbing/scaling.py",
                shape=list(x.shape[1:]), scaling="mean 0, variance 1 over the set")
    return dict(x=x, y=np.zeros(n, np.int64)), meta


def data_folder(cfg, folder, name, make):
    """Return the folder of a data set: --data, or one that make(), which returns (arrays, meta), draws on first use."""
    if cfg.data:
        return cfg.data
    path = folder / "data" / name
    if not path.exists():
        save_dataset(path, *make())
    return str(path)


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


def make_score(data, device, fast):
    """Return the empirical score of a data set."""
    engine = FastEmpiricalScore if fast else EmpiricalScore
    return engine(data["x"], data["y"], device=device)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals

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
