"""Networks of several settings and seeds as arrays, and a picture of samples above their nearest images."""
import functools

import numpy as np
import torch
from matplotlib.patches import Rectangle

from plumbing.results import BLUE
from plumbing.sweep import cached, run_jobs


def run_grid(f, settings, seeds, workers, folder, key):
    """Return {name: array (settings, seeds, ...)} of what f("setting/seed") returns, a dict of tensors.

    settings are texts, seeds are numbers. f and workers are those of run_jobs; what f returns is kept in `folder` under
    `key`, which holds all that it depends on.
    """
    jobs = [f"{setting}/{seed}" for setting in settings for seed in seeds]
    found = run_jobs(functools.partial(run_cached, f, folder, key), jobs, workers)
    arrays = {}
    for name in found[jobs[0]]:
        values = torch.stack([found[job][name].cpu() for job in jobs])
        arrays[name] = values.unflatten(0, (len(settings), len(seeds))).numpy()
    return arrays


def run_cached(f, folder, key, job):
    return cached(folder, key | dict(job=job), functools.partial(f, job))


def draw_pairs(ax, pairs, framed, labels=("sample", "nearest")):
    """Draw pairs of images, uint8 (2, n, H, W, C), one above the other, with a blue frame where framed (n,) is true."""
    # a white line around each image
    margin = max(1, pairs.shape[2] // 16)
    around = ((0, 0), (0, 0), (margin, margin), (margin, margin), (0, 0))
    pairs = np.pad(pairs[..., :3], around, constant_values=255)
    ax.imshow(np.vstack([np.hstack(row) for row in pairs]), cmap="gray", vmin=0, vmax=255)
    H, W = pairs.shape[2:4]
    for i in np.flatnonzero(framed):
        ax.add_patch(Rectangle((i * W, 0), W - 1, 2 * H - 1, fill=False, color=BLUE, lw=3))
    ax.set(xticks=[], yticks=[H / 2, 1.5 * H], yticklabels=labels)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
