"""
Figures 9 and 11: perception-aligned training (PAT) on four points of the plane (C4, Section 5.2, Appendix C.9).

    D = (-1, 0), (-.2, 0), (.2, 0), (1, 0)            call two points perceptually close when their *angle* is close

A model that fits the empirical score around these points can still blend two of them. "Bad" samples lie between the two
that are close in the plane but not in angle (-.2 and .2), "good" ones between two of one angle (.2 and 1). The claim:
three ways to tell a model about angles turn the bad samples into good ones, and since all models are supervised almost
perfectly, by extrapolation alone. The three are P1, diffusion in polar space instead of the plane; P2, kernel ridge
regression on polar features instead of (x, y); P3, a radial-equivariant network, f(a z) = a f(z), instead of any other.

    python exp_toy2d.py                # a minute and a half on 2 CPU cores; needs empirical_score.py and nothing else
    python exp_toy2d.py --redraw --animate   # P2's samples on their way, as a GIF; after the command above, seconds

What you should see. Half of C4: with P1 and P2 the orange-red samples, between -.2 and .2, are gone. But there are
fewer green ones too: what was bad is now memorized. P2's loss is also lower, and C4 is about samples at equal loss;
with its ridge raised until the loss is the baseline's (stars) there are fewer bad samples with the narrower kernels,
and more with the widest; whether there are more good ones depends on the baseline's ridge (try --ridge 1e-4). P3 makes
many good ones, and cannot fit the four points: its loss is about the least that any such network can have. A baseline
trained so briefly that its loss is as high (star) makes about as many bad samples, but fewer good ones. The strips at
the bottom are the sweep over what the paper leaves open (widths, bandwidths, ridges, and how near a copy is).

L here is E_t E_{z ~ p_t} |x_theta - x_*|^2 over the variance of the data: 0 is a perfect fit, and predicting the mean
gets .44. P1's two L are of two problems, since in polar space both the noise and the gaps between points are others
(there the mean gets .51): hence no row compares them, and there is no equal L for P1. The file is longer than 300 lines
since it carries its own intervals, results file and command line: it works without train.py, sample.py and model.py.

Try this; the answers are in the table that is printed last, or in the figure.
1. python exp_toy2d.py --bandwidth 2        Does knowing the angle help whatever the kernel is? See P2's first row: its
   verdict turns round. A kernel this wide blends -.2 and .2 in any coordinates.
2. python exp_toy2d.py --steps 200          Is it extrapolation alone? See P1's "nearly perfect" row, which fails, and
   how little is left of "fewer bad samples": of models that fit badly, C4 says nothing.
3. python exp_toy2d.py --redraw             What counts as memorized is our choice. Which verdicts of P1 and P2 hang on
   it? See right of the dotted lines: none on fewer bad samples, but P1's "more good samples" is no longer resolved.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "matplotlib==3.11.2", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
import contextlib
import difflib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from empirical_score import EmpiricalScore

ROOT = Path(__file__).resolve().parent


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    nets: int = 4  # independent repetitions of every model, 2 to 10: the intervals are over them
    n: int = 2000  # samples of every model, over its repetitions together
    times: int = 40  # times between 1 and .001: steps of the sampler, and kernel regressions
    width: int = 512  # hidden units of the 2-layer MLP
    steps: int = 2000  # training iterations of the MLPs
    batch: int = 128  # z_t per iteration
    lr: float = 1e-2  # Adam's, falling linearly to 0
    points: int = 400  # z_t that each kernel regression is fitted to
    bandwidth: float = 1.0  # h of the Gaussian kernel exp(-|a - b|^2 / 2 h^2)
    ridge: float = 1e-6  # added, times `points`, to the diagonal of the kernel matrix
    widths: tuple[int, ...] = (32, 128)  # the sweep: also these widths,
    bandwidths: tuple[float, ...] = (0.5, 2.0)  # these bandwidths,
    ridges: tuple[float, ...] = (1e-8, 1e-4)  # and these ridges, with every bandwidth
    margin: float = 0.1  # a sample this close to a training point is memorized; below .2
    margins: tuple[float, ...] = (0.02, 0.05, 0.15)  # the sweep: also these, of the models that are drawn
    seed: int = 0  # of the weights, the noise and the samples
    device: str = "auto"  # auto, cpu, cuda (the regressions are float64, which mps does not have)
    redraw: bool = False  # draw the figure again from results.json, and measure nothing
    dry_run: bool = False  # check memory and disk, say what would run and for how long, and stop
    animate: bool = False  # also write results.gif: P2's samples on their way from noise, baseline beside PAT
    out: str = ""  # folder of the results; default out/exp_toy2d/<preset>

PRESETS = {  # differs from the paper: it states no sizes, so that "paper" can only mean more of everything
    "laptop": Config(),
    "gpu": Config("gpu", nets=8, width=2048, steps=10_000, points=1000, times=80, widths=(32, 128, 512)),
    "paper": Config("paper", nets=10, width=2048, steps=30_000, points=1000, times=80, widths=(32, 128, 512),
                    bandwidths=(0.3, 0.5, 2.0), ridges=(1e-8, 1e-4)),
}

# ----------------------------------------------------------------------------------------------------------------------
# The data, and polar coordinates: there, points of one angle are neighbours and points of opposite angles are not

D = torch.tensor([[-1, 0], [-0.2, 0], [0.2, 0], [1, 0]], dtype=torch.float64)    # (S1)


def polar(x):                                                # (..., 2) -> (..., 3): r, cos theta, sin theta
    r = x.norm(dim=-1, keepdim=True)
    return torch.cat([r, x / r.clamp_min(1e-12)], dim=-1)


def unpolar(p):                                              # (..., 3) -> (..., 2), whatever the length of (cos, sin)
    return p[..., :1] * torch.nn.functional.normalize(p[..., 1:], dim=-1)


def noisy(x, t, g):
    """z_t = alpha_t x + sigma_t eps of random points of x (N, d), one for every t (...). -> (..., d)"""
    i = torch.randint(len(x), t.shape, generator=g)
    return (1 - t)[..., None] * x[i] + t[..., None] * torch.randn(*t.shape, x.shape[1], generator=g, dtype=x.dtype)


def posterior_mean(x, z, t):
    """x_*(z, t) for z (..., d) and t (...): what a perfectly supervised model predicts."""
    return EmpiricalScore(x, chunk=len(x)).posterior_mean(z.flatten(0, -2), t.flatten()).view(z.shape)


def variance(x):                                             # E|x - E x|^2, the unit of the loss L
    return (x - x.mean(0)).square().sum(1).mean()


def time_grid(cfg):
    return torch.linspace(1, 1e-3**0.5, cfg.times, dtype=torch.float64)**2           # 1 to .001, finer towards 0

# ----------------------------------------------------------------------------------------------------------------------
# The models. Each is a function x_theta(z, i): z (K, M, d), of K repetitions, at time grid[i] -> (K, M, d)

def mlp(weights, z, t, equivariant=False):
    """K networks of two layers at once: z (K, M, d), t (K, M) -> (K, M, d).

    P3: r f(z/r, t) is homogeneous, f(a z) = a f(z) for every a > 0, whatever the weights are. It is the same condition
    for v, x, eps and the score, since one comes from another by scaling and by adding multiples of z."""
    W1, b1, W2, b2 = weights
    r = z.norm(dim=-1, keepdim=True).clamp_min(1e-12) if equivariant else 1.0
    h = torch.baddbmm(b1, torch.cat([z / r, t[..., None]], dim=-1), W1).relu()
    return r * torch.baddbmm(b2, h, W2)


def fit_mlp(cfg, x, width, equivariant, grid, device):
    """Train K networks to predict v. -> x_theta. They predict v, since x_theta = z - t v_theta then gets exact as t
    falls; x-prediction lands beside the training points."""
    # differs from the paper: the target is v_* = (z - x_*)/t, the mean of the noisy eps - x of denoising score matching
    # (Eq. 1), to come nearer to a perfect fit
    g, d = torch.Generator().manual_seed(cfg.seed), x.shape[1]
    uniform = lambda a, b, fan_in: (2 * torch.rand(cfg.nets, a, b, generator=g) - 1) / fan_in**0.5
    weights = [uniform(*shape).to(device).requires_grad_() for shape in (
        (d + 1, width, d + 1), (1, width, d + 1), (width, d, width), (1, d, width))]             # W1, b1, W2, b2
    optimizer = torch.optim.Adam(weights, lr=cfg.lr, fused=True)
    for step in range(cfg.steps):
        if (k := step % 250) == 0:                           # the data of the next 250 steps, in one go
            t = grid[-1] + (1 - grid[-1]) * torch.rand(250, cfg.nets, cfg.batch, generator=g, dtype=x.dtype)
            z = noisy(x, t, g)
            v = (z - posterior_mean(x, z, t)) / t[..., None]
            z, t, v = (a.float().to(device) for a in (z, t, v))
        loss = (mlp(weights, z[k], t[k], equivariant) - v[k]).square().sum(-1).mean(1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        optimizer.step()
    if not loss.isfinite():
        raise ValueError(f"the MLP of width {width} diverged: the loss is {loss.item()} at lr {cfg.lr:g}")

    @torch.no_grad()
    def x_theta(z, i):
        t = grid[i].float().to(device).expand(z.shape[:2])
        return z - grid[i] * mlp(weights, z.float().to(device), t, equivariant).to(z)
    return x_theta


def kernel(a, b, h):                                         # (..., m, p), (..., n, p) -> (..., m, n)
    a, b, half = a / h, b / h, lambda c: c.square().sum(-1, keepdim=True) / 2
    return (a @ b.mT).sub_(half(a)).sub_(half(b).mT).exp_()  # exp(-|a - b|^2 / 2 h^2), in place: 4 times as fast


def fit_krr(cfg, features, h, ridge, grid, device):
    """P2: x_theta by kernel ridge regression of x_* on features(z_t), in closed form. The mean of x_* is taken out
    first, so that the ridge costs a constant nothing."""
    # differs from the paper, which does not say how t enters: each t has its own regression, so that the one bandwidth
    # to choose is that in space
    g, models = torch.Generator().manual_seed(cfg.seed), []
    for t in grid:
        z = noisy(D, t.expand(cfg.nets, cfg.points), g)      # (K, n, 2)
        target, a = posterior_mean(D, z, t.expand(z.shape[:2])), features(z).to(device)
        mean = target.mean(1, keepdim=True)
        gram = kernel(a, a, h) + ridge * cfg.points * torch.eye(cfg.points, dtype=a.dtype, device=device)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.any():
            raise ValueError(f"ridge {ridge:g} is too small for bandwidth {h:g}: the kernel matrix is singular")
        models.append((a, torch.cholesky_solve((target - mean).to(device), factor), mean))
    return lambda z, i: (kernel(features(z).to(device), models[i][0], h) @ models[i][1]).to(z) + models[i][2]


def best_homogeneous(angles=180, radii=200, times=16):
    """The least L of any f(a z) = a f(z), by quadrature. Given the angle, x_theta = r g(angle, t), and least squares
    over the radius gives g = E[r x_*] / E[r^2], and E|x_*|^2 - |E[r x_*]|^2 / E[r^2] is left."""
    angle = (torch.arange(angles, dtype=torch.float64) + 0.5) * torch.pi / angles      # p_t is symmetric in y
    node, weight = np.polynomial.legendre.leggauss(times)
    total = 0.0
    for t, w in zip(0.02 + 0.49 * (node + 1), 0.49 * weight, strict=True):             # t < .02 adds less than 1e-5
        r = (torch.arange(radii, dtype=torch.float64) + 0.5) * (1 + 6 * t) / radii
        z = r[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)[:, None]      # (angles, radii, 2)
        p = torch.exp(-(z[..., None, :] - (1 - t) * D).square().sum(-1) / (2 * t**2)).sum(-1) * r
        p, x = p / p.sum(), posterior_mean(D, z, torch.full(z.shape[:2], t, dtype=torch.float64))
        rx, rr = ((p * r)[..., None] * x).sum(1), (p * r**2).sum(1).clamp_min(1e-300)
        total += w * ((p * x.square().sum(-1)).sum() - (rx.square().sum(-1) / rr).sum())
    return float(total / variance(D))

# ----------------------------------------------------------------------------------------------------------------------
# Sampling, and what is counted and measured

def sample(x_theta, z, grid, path=None):
    """dz/dt = (z - x_theta)/t from t = 1 to 0. Heun's method, in steps z_s = (s/t) z + (1 - s/t) x_theta that are exact
    while x_theta is constant; at the last time, x_theta is the sample. z (K, M, d) -> (K, M, d); a list `path` gets z
    at every time but the last."""
    for i in range(len(grid) - 1):
        if path is not None: path.append(z)
        keep, x = grid[i + 1] / grid[i], x_theta(z, i)
        ahead = x_theta(keep * z + (1 - keep) * x, i + 1)
        z = keep * z + (1 - keep) * (x + ahead) / 2
    return x_theta(z, len(grid) - 1)


def kind_of(p, margin):
    """Samples (..., 2) -> 0, 1, 2, 3. On the axis, that is |y| <= margin: bad, |x| < .2 - margin; good, .2 + margin <
    |x| < 1 - margin; memorized, |x| within the margin of .2 or 1. Elsewhere: off the axis, or |x| > 1 + margin."""
    x, axis = p[..., 0].abs(), p[..., 1].abs() <= margin
    kind = torch.where(axis & (x <= 1 + margin), 2, 3)
    kind[axis & (x > 0.2 + margin) & (x < 1 - margin)] = 1
    kind[axis & (x < 0.2 - margin)] = 0
    return kind


def fractions(p, margin):
    """Samples (K, M, 2) -> {kind: what fraction of them it is (K,)}, and the share of the good in good and bad."""
    kind = kind_of(p, margin)
    of = {name: (kind == k).double().mean(1).numpy() for k, name in enumerate(KINDS)}
    bad, good = (of[k] + 0.5 / p.shape[1] for k in KINDS[:2])            # half a sample more, so that there is a share
    return of | dict(share=good / (bad + good))


def supervision_loss(x_theta, x, grid, nets, seed, n=500):
    """L (K,): n fresh z_t at every time of the grid, the trapezoid rule over t."""
    g, error = torch.Generator().manual_seed(seed), []
    for i, t in enumerate(grid):
        z = noisy(x, t.expand(nets, n), g)
        error.append((x_theta(z, i) - posterior_mean(x, z, t.expand(nets, n))).square().sum(-1).mean(1))
    return -torch.trapezoid(torch.stack(error), grid, dim=0) / variance(x)

KINDS = ("bad", "good", "memorized", "elsewhere")
CLAIMS = {"bad": ("fewer bad samples: fraction, PAT minus baseline, < 0", dict(high=0.0)),
          "good": ("more good samples: fraction, PAT minus baseline, > 0", dict(low=0.0)),
          "share": ("good / (good + bad) is larger: PAT minus baseline, > 0", dict(low=0.0))}
XY, RSC = "kernel, (x, y)", "kernel, (r, sin, cos)"
# differs from the paper: it does not say what P3's baseline is ("2-layer MLP, except for the last instance")
PAIRS = {"P1": ("MLP", "MLP, polar space"), "P2": (XY, RSC), "P3": ("MLP", "equivariant MLP")}
FIELD = np.stack(np.meshgrid(np.linspace(-1.3, 1.3, 14), np.linspace(-0.6, 0.6, 5)), axis=-1)  # (5, 14, 2)
SHOWN = (0.5, 0.2, 0.05)                                     # the times of the fields
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)       # t_.975 with 1 .. 9 degrees of freedom


def evaluate(cfg, name, size, device):
    """Fit the model `name`, of a width or a (bandwidth, ridge), and measure all about it, by repetition where (K,)."""
    grid = time_grid(cfg)
    in_polar = name == "MLP, polar space"
    x, back = (polar(D), unpolar) if in_polar else (D, lambda p: p)
    if name in (XY, RSC):
        x_theta = fit_krr(cfg, polar if name == RSC else lambda z: z, *size, grid, device)
    else:
        x_theta = fit_mlp(cfg, x, size, name == "equivariant MLP", grid, device)
    g = torch.Generator().manual_seed(cfg.seed + 1)
    p = back(sample(x_theta, torch.randn(cfg.nets, cfg.n // cfg.nets, x.shape[1], generator=g, dtype=x.dtype), grid))
    fields, z = [], torch.from_numpy(FIELD).view(1, -1, 2).expand(cfg.nets, -1, -1)
    for i in ((grid - t).abs().argmin() for t in SHOWN):     # in polar space: a slice, that of noisy points without eps
        slice_ = torch.cat([polar(z)[..., :1], (1 - grid[i]) * polar(z)[..., 1:]], dim=-1) if in_polar else z
        fields.append(back(x_theta(slice_, i))[0])           # of the first repetition, mapped back to the plane
    return fractions(p, cfg.margin) | dict(samples=p, fields=torch.stack(fields), L=supervision_loss(
        x_theta, x, grid, cfg.nets, cfg.seed + 2).numpy())


def equal_loss(label, fit, L, better, worse, cfg):
    """The number between `better` and `worse`, by bisection of its logarithm, with which fit(number), an x_theta, has
    supervision loss L: C4 is about extrapolation *given* that loss. None, and a line, where none has, to 2%."""
    for _ in tqdm(range(12), desc=label, disable=None, leave=False):
        middle = (better * worse)**0.5
        loss = supervision_loss(fit(middle), D, time_grid(cfg), cfg.nets, cfg.seed + 2).mean()
        if abs(loss / L - 1) < 0.02: return middle
        better, worse = (middle, worse) if loss < L else (better, middle)
    print(f"{label} left out, since nothing tried has L = {L:.4f}")


def interval(values):
    """95% interval of the mean over repetitions (K,), Student's t -> (low, high)."""
    half = STUDENT[len(values) - 2] * values.std(ddof=1) / len(values)**0.5
    return values.mean() - half, values.mean() + half


def wilson(p, n):
    """95% interval of a fraction p of n (Wilson's score interval, sensible at 0 and 1 too) -> (low, high)."""
    centre, half = p + 1.96**2 / (2 * n), 1.96 * (p * (1 - p) / n + 1.96**2 / (4 * n**2))**0.5
    return (centre - half) / (1 + 1.96**2 / n), (centre + half) / (1 + 1.96**2 / n)


def bracket(f, n):
    """95% interval of a fraction f (K,) of n samples in all: the wider of Wilson's and the one over repetitions."""
    low, high = np.transpose([wilson(f.mean(), n), interval(f)])
    return max(0.0, low.min()), min(1.0, high.max())


def claim(text, paper, ours, ci95, low=-np.inf, high=np.inf):
    """A row of the table: claimed is that the true value lies in [low, high], and the interval decides."""
    inside, outside = low <= ci95[0] and ci95[1] <= high, ci95[1] < low or ci95[0] > high
    return dict(claim=text, paper=paper, ours=float(ours), ci95=[float(c) for c in ci95],
                verdict="holds" if inside else "contradicted" if outside else "not resolved")


def check(cfg):
    """-> the device; ValueError for what cannot be measured."""
    for name in "n steps batch lr points width widths bandwidth bandwidths ridge ridges".split():
        for v in np.atleast_1d(getattr(cfg, name)):
            if not 0 < v <= 1e9: raise ValueError(f"{name} must be positive, not {v:g}, and at most 1e9")
    if not 2 <= cfg.nets <= 10 or cfg.n % cfg.nets:
        raise ValueError(f"nets must be 2 to 10, and a divisor of n = {cfg.n}, not {cfg.nets}")
    if not 2 <= cfg.times <= 1e9: raise ValueError(f"times must be at least 2, at most 1e9, not {cfg.times}")
    if not 0 <= cfg.seed <= 1e9: raise ValueError(f"seed must be 0 to 1e9, not {cfg.seed}")
    for m in (cfg.margin, *cfg.margins):
        if not 0 < m < 0.2: raise ValueError(f"margins must lie between 0 and .2, not {m:g}")
    if cfg.device not in ("auto", "cpu", "cuda") or (cfg.device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {cfg.device!r} is not available here: expected auto, cpu or cuda")
    return torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")


def sweep_of(cfg):
    """-> {pair: all of its sizes}, {pair: the size that is drawn}, every (name, size) that has to be fitted, once."""
    kernels = sorted({(h, ridge) for h in (*cfg.bandwidths, cfg.bandwidth) for ridge in (*cfg.ridges, cfg.ridge)})
    sizes = {"P1": (widths := sorted({*cfg.widths, cfg.width})), "P2": kernels, "P3": widths}
    todo = dict.fromkeys((name, size) for pair in PAIRS for name in PAIRS[pair] for size in sizes[pair])
    return sizes, {"P1": cfg.width, "P2": (cfg.bandwidth, cfg.ridge), "P3": cfg.width}, list(todo)


def forecast(cfg, folder):
    """What --dry-run prints. The largest model of each kind is fitted for a few steps, or at two times, and the time is
    scaled up. ValueError if memory or disk is short."""
    device, (_, _, todo) = check(cfg), sweep_of(cfg)
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free, room = shutil.disk_usage(there).free, float("inf")
    if device.type == "cuda": room = torch.cuda.mem_get_info(device)[0]
    elif hasattr(os, "sysconf"): room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = 24 * cfg.nets * cfg.points**2                     # kernel matrices; of samples, kernels or hidden units
    need += 16 * max(cfg.n, 500 * cfg.nets) * max(cfg.points, *cfg.widths, cfg.width)
    disk = 2e6 + 100 * cfg.n                                 # results.json, .png and .gif
    bandwidths = len({*cfg.bandwidths, cfg.bandwidth})       # at each, and for P3, there is a model of equal L
    print(f"{len(todo) + bandwidths + 1} models, {cfg.nets} of each, on {device}: {need / 1e9:.2f} GB of memory (there "
          f"are {room / 1e9:.1f}), {disk / 1e6:.1f} MB on the disk of {there} (free: {free / 1e6:,.0f})", flush=True)
    if need > room: raise ValueError(f"{need / 1e9:.1f} GB of memory are needed, {room / 1e9:.1f} GB are there: fewer "
                                     "points or samples, or a smaller width, need less")
    if disk > free: raise ValueError(f"{disk / 1e6:.1f} MB are needed on the disk of {there}, {free / 1e6:.1f} free")
    few, seconds = replace(cfg, steps=min(cfg.steps, 250), times=2), 0.0
    evaluate(replace(few, steps=1), "MLP", 1, device)        # whatever comes first takes longer
    for name in tqdm({name: None for name, _ in todo}, desc="timing", disable=None, leave=False):
        sizes, clock = [size for other, size in todo if other == name], time.perf_counter()
        evaluate(few, name, max(sizes), device)
        often = len(sizes) + {RSC: 6 * bandwidths, "MLP": 3}.get(name, 0)              # what is tried to find those
        scale = cfg.times / 2 if name in (XY, RSC) else max(cfg.steps / few.steps, cfg.times / 2)
        seconds += (time.perf_counter() - clock) * scale * often
    print(f"at most about {max(0.01, seconds / 60):.2f} minutes, by a few steps of each kind here")


def measure(cfg):
    """Every model, at every setting of the sweep, and the claims -> what goes to results.json."""
    device, started, models, (sizes, main, todo) = check(cfg), time.time(), {}, sweep_of(cfg)
    torch.empty(cfg.nets, max(cfg.points**2, cfg.n, 250 * cfg.batch, cfg.width), 8)              # too many fail here
    for name, size in tqdm(todo, desc="models", disable=None, leave=False):
        models[name, size] = evaluate(cfg, name, size, device)
    print(f"{len(todo)} models, {cfg.nets} of each, fitted and sampled on {device}: {time.time() - started:.1f} s")

    rows = {pair: [(pair if size == main[pair] else "", size, models[baseline, size], models[pat, size])
                   for size in sizes[pair]] for pair, (baseline, pat) in PAIRS.items()}
    grid, least = time_grid(cfg), min(cfg.ridge, *cfg.ridges)
    for h in sorted({*cfg.bandwidths, cfg.bandwidth}):       # P2's PAT with another ridge than its baseline
        label, base = f"P2 equal L, h={h:g}:", models[XY, (h, cfg.ridge)]
        fit = lambda ridge, h=h: fit_krr(cfg, polar, h, ridge, grid, device)
        if ridge := equal_loss(label, fit, base["L"].mean(), least, 1.0, cfg):
            rows["P2"].append((label, (h, ridge), base, evaluate(cfg, RSC, (h, ridge), device)))
    label, pat = "P3 equal L:", models["equivariant MLP", cfg.width]                   # P3's baseline with fewer steps
    fewer = lambda steps: replace(cfg, steps=round(steps))
    fit = lambda steps: fit_mlp(fewer(steps), D, cfg.width, False, grid, device)
    if steps := equal_loss(label, fit, pat["L"].mean(), cfg.steps, 1, cfg):
        rows["P3"].append((label, (cfg.width, round(steps)), evaluate(fewer(steps), "MLP", cfg.width, device), pat))
    for pair, (baseline, pat) in PAIRS.items():              # the same samples, counted otherwise
        rows[pair] += [("margin", m, *(models[name, main[pair]] | fractions(models[name, main[pair]]["samples"], m)
                                       for name in (baseline, pat))) for m in sorted({*cfg.margins} - {cfg.margin})]
    claims, sweep, shown = [], [], {}
    for pair, (label, size, base, pat) in ((p, row) for p in PAIRS for row in rows[p]):
        entry = {k: [base[k].mean(), pat[k].mean(), *interval(pat[k] - base[k])] for k in ("L", *CLAIMS)}
        sweep.append(entry | dict(pair=pair, size=size, label=label))
        for k, (text, bound) in CLAIMS.items() if label.startswith(pair) else ():
            claims.append(claim(f"{label} {text}", text[-3:], entry[k][1] - entry[k][0], entry[k][2:], **bound))
        if label == pair:
            worse = np.maximum(base["L"], pat["L"])
            claims.append(claim(f"{pair} supervision is nearly perfect: L of the worse of both < .01", "0",
                                worse.mean(), interval(worse), high=0.01))
            over = pat["L"] / base["L"]
            if pair != "P1": claims.append(claim(f"{pair} supervision is as good: L, PAT over baseline, < 1.1", "1",
                                                 over.mean(), interval(over), high=1.1))
            for name, m in zip(PAIRS[pair], (base, pat), strict=True):
                shown[name] = dict(samples=m["samples"].flatten(0, 1), fields=m["fields"], L=m["L"].mean(), fraction={
                    k: [m[k].mean(), *bracket(m[k], cfg.n)] for k in KINDS})
    best = best_homogeneous()
    over = best / models[PAIRS["P3"][0], main["P3"]]["L"]
    claims.append(claim("P3 could fit as well: least L of any such f, over baseline, < 1.1", "1",
                        over.mean(), interval(over), high=1.1))
    mix = [np.stack([models[PAIRS[p][1], main[p]][k] for k in KINDS]) for p in PAIRS]          # of (4, K)
    apart = np.max([np.abs(a - b).sum(0) / 2 for a in mix for b in mix], axis=0)
    claims.append(claim("P1-P3 the three PATs' samples are alike: total variation of the kinds < .1", "0", apart.mean(),
                        interval(apart), high=0.1))
    arrays = json.loads(json.dumps(dict(models=shown, sweep=sweep, best_homogeneous=best, t=SHOWN),
                                   default=lambda a: a.tolist()), parse_float=lambda v: float(f"{float(v):.4g}"))
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)  # or empty
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    return dict(script="exp_toy2d", preset=cfg.preset, seed=cfg.seed, device=name, commit=git.stdout.strip(),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
                seconds=round(time.time() - started, 1), config=vars(cfg), claims=claims, arrays=arrays)

# ----------------------------------------------------------------------------------------------------------------------
# Drawing, and the command as in all experiments

BLUE, RED, GREEN, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#555555", "#BBBBBB"     # L; bad, good, memorized, else


def caption(results):
    """What the figure says, in numbers and words that follow from the claims."""
    a, cfg = results["arrays"], results["config"]

    def say(what, labels):                                   # a word for each verdict, and the rows that have it
        words = {"holds": what.split()[0], "not resolved": "no difference resolved",
                 "contradicted": {"fewer bad": "more", "more good": "fewer"}[what]}
        rows = {p: next(c for c in results["claims"] if c["claim"].startswith(f"{p} {what}")) for p in labels}
        names = {v: [f"{re.sub(' equal L|[,:]', '', p)} ({c['ours']:+.2f})" for p, c in rows.items()
                     if c["verdict"] == v] for v in words}
        return "; ".join(f"{words[v]} with {', '.join(its)}" for v, its in names.items() if its) or "nothing found"

    equal = [s["label"] for s in a["sweep"] if "equal L" in s["label"]]
    sweep = [s for s in a["sweep"] if s["label"] in ("", *PAIRS)]
    count = lambda k, sign: sum(min(sign * s[k][2], sign * s[k][3]) > 0 for s in sweep)
    return textwrap.fill(
        f"PAT against baseline, where drawn (diamonds). Bad samples: {say('fewer bad', PAIRS)}. Good samples: "
        f"{say('more good', PAIRS)}. At equal L (stars; P1's two L are of two problems). Bad samples: "
        f"{say('fewer bad', equal)}. Good samples: {say('more good', equal)}. In the sweep: fewer "
        f"bad ones in {count('bad', -1)} of {len(sweep)} settings, more good ones in {count('good', 1)}, a larger "
        f"share of good ones in {count('share', 1)} (right of the dotted lines: the models drawn, other margins). P3's "
        f"L is {a['models']['equivariant MLP']['L']:.4f}; no equivariant model gets below {a['best_homogeneous']:.4f}. "
        f"Brackets: 95%, {cfg['n']:,} samples or {cfg['nets']} repetitions, the wider; bars: 95%, repetitions. Fields: "
        "arrows are $(x_\\theta{-}z)/3$; colour: $x_\\theta$ as a sample.", 156)


def draw_model(axes, m, cfg, times):
    """One column: the fractions, the histogram of x, the samples, and the field x_theta at three times."""
    from matplotlib.colors import ListedColormap
    p, margin, grid = np.array(m["samples"]), cfg["margin"], FIELD.transpose(2, 0, 1)
    kind, colours = kind_of(torch.from_numpy(p), margin).numpy(), (RED, GREEN, GREY, PALE)
    percent = {k: [100 * v for v in m["fraction"][k]] for k in KINDS}
    lines = [(f"L = {m['L']:.4f}", BLUE), (f"memorized {percent['memorized'][0]:.0f}%", GREY)]
    lines += [("{} {:.0f}% [{:.0f}, {:.0f}]".format(k, *percent[k]), c) for k, c in (("bad", RED), ("good", GREEN))]
    for y, (text, colour) in enumerate(lines):
        axes[0].text(0, 0.88 - 0.25 * y, text, color=colour, fontsize=8.5, ha="center", va="center")
    axes[0].axis("off")
    axes[1].hist([p[kind == k, 0] for k in range(4)], np.linspace(-1.35, 1.35, 55), stacked=True, color=colours)
    axes[1].set(ylim=(0, 0.045 * cfg["n"]))                  # the peaks at the training points are far higher
    for k, colour in enumerate(colours):
        axes[2].plot(*p[kind == k].T, ".", ms=2, color=colour)
    axes[2].plot(*D[:2].T, "^", *D[2:].T, "s", ms=5, color="black", mfc="white")
    for ax, t, x in zip(axes[3:], times, np.array(m["fields"]), strict=True):
        x = x.reshape(FIELD.shape)                           # coloured by what it would be as a sample
        ax.pcolormesh(*grid, kind_of(torch.from_numpy(x), margin), cmap=ListedColormap(colours), vmin=0, vmax=3,
                      alpha=0.45, lw=0)
        arrows = (x - FIELD)[::2, 1::2].transpose(2, 0, 1)
        ax.quiver(*grid[:, ::2, 1::2], *arrows, angles="xy", scale_units="xy", scale=3, width=0.009)
        ax.plot(*((1 - t) * D).T, "o", ms=3.5, color="black", mfc="white")
    for ax in axes[1:]:
        ax.set(xlim=(-1.3, 1.3), yticks=[], xticks=(-1, 0, 1))
        ax.tick_params(labelbottom=ax is axes[-1], labelsize=8.5)
    for ax in axes[2:]:
        ax.set(ylim=(-0.6, 0.6))


def draw_sweep(axes, rows):
    """PAT minus baseline in every setting, a column each; the side that C4 claims is shaded. Last, both L."""
    x, style = np.arange(len(rows)), [("D", 6) if s["label"] == s["pair"] else ("*", 8) if "equal L" in s["label"] else
                                      ("o", 4) for s in rows]
    counted = x[[s["label"] == "margin" for s in rows]]      # the models that are drawn once more
    for ax, k, colour, sign in zip(axes, CLAIMS, (RED, GREEN, GREY), (-1, 1, 1), strict=False):
        base, pat, low, high = np.array([s[k] for s in rows]).T
        ax.axhspan(0, sign * 9, color="#E8E8E8", lw=0)
        ax.axhline(0, color="black", lw=0.8)
        if len(counted): ax.axvline(counted[0] - 0.5, color=GREY, lw=0.8, ls=":")
        change = pat - base
        bars = np.maximum([change - low, high - change], 0)  # of no width, their ends may be rounded past each other
        for i, (marker, size) in enumerate(style):
            ax.errorbar(i, change[i], bars[:, [i]], fmt=marker, color=colour, ms=size, capsize=2.5, lw=1.3)
    base, pat, _, _ = np.array([s["L"] for s in rows]).T
    axes[3].plot(x, base, "o", x, pat, "s", color=BLUE, ms=5)
    axes[3].get_lines()[0].set(mfc="white")
    tick = lambda s: (f"{s['size']:g}".lstrip("0") if s["label"] == "margin" else
                      f"{s['size'][0]:g}\n= L" if "equal L" in s["label"] else
                      f"{s['size']}" if s["pair"] != "P2" else
                      "{:g}\n{:.0f}".format(s["size"][0], np.log10(s["size"][1])))
    axes[3].set(yscale="log", xlim=(-0.6, len(rows) - 0.4))
    axes[3].set_xticks(x, [tick(s) for s in rows])


def plot(path):
    """results.json -> results.png beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib needs it, too
    results = json.loads(Path(path).read_text())
    a, m = results["arrays"], results["config"]["margin"]
    fig = plt.figure(figsize=(10, 10))
    place = dict(left=0.1, right=0.99)
    for x, text, colour in ((0.1, f"bad: |x| < {0.2 - m:.3g}", RED),
                            (0.235, f"good: {0.2 + m:.3g} < |x| < {1 - m:.3g}", GREEN),
                            (0.42, f"memorized: {m:g} or less from a point", GREY), (0.715, "elsewhere", "#999999"),
                            (0.83, "L: supervision loss", BLUE)):
        fig.text(x, 0.98, f"\u25a0 {text}", color=colour, fontsize=9.5)
    outer = fig.add_gridspec(1, 3, top=0.928, bottom=0.5, wspace=0.045, **place)
    labels = "", "histogram\nof x", "samples", *(f"t = {t:g}" for t in a["t"])
    for j, (pair, names) in enumerate(PAIRS.items()):
        inner = outer[j].subgridspec(6, 2, height_ratios=(1.5, 1.6, 0.7, 1, 1, 1), hspace=0.09, wspace=0.04)
        axes = inner.subplots(sharex="col")                  # (6, 2)
        for i, name in enumerate(names):
            draw_model(axes[:, i], a["models"][name], results["config"], a["t"])
            axes[0, i].set_title(f"{pair} {('baseline', 'PAT')[i]}\n{name}", fontsize=9, pad=2)
        for ax, label in zip(axes[:, 0] if j == 0 else (), labels, strict=False):
            ax.set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        if j == 0:
            fig.text(0.02, 0.587, "field $x_\\theta(z, t)$", fontsize=9, rotation=90, va="center")
    tables = {pair: [s for s in a["sweep"] if s["pair"] == pair] for pair in PAIRS}
    axes = fig.add_gridspec(4, 3, top=0.443, bottom=0.18, wspace=0.03, hspace=0.12, **place, width_ratios=[
        len(rows) + 0.5 for rows in tables.values()]).subplots(sharex="col", sharey="row")       # (4, 3)
    for column, pair in zip(axes.T, PAIRS, strict=True):
        draw_sweep(column, tables[pair])
        column[0].set_title(f"{pair}: PAT minus baseline", fontsize=10)
    for row, k, label in zip(axes, (*CLAIMS, "L"), ("bad", "good", "good /\n(good\n+ bad)", "L"), strict=True):
        row[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        if k != "L":
            ends = [v for s in a["sweep"] for v in s[k][2:]]
            row[0].set_ylim(min(-0.1, *ends) - 0.05, max(0.1, *ends) + 0.05)
        for ax in row:
            ax.tick_params(labelsize=8.5, left=ax is row[0])
    axes[0, 2].text(0.99, 0.08, "shaded: what C4 claims", fontsize=8.5, ha="right", transform=axes[0, 2].transAxes)
    axes[3, 1].text(0.99, 0.75, "circle: baseline, square: PAT", fontsize=8.5, ha="right", color=BLUE,
                    transform=axes[3, 1].transAxes)
    for ax, label in zip(axes[3], ("width; margin", "bandwidth h, log10 of the ridge (= L: that of equal L); margin",
                                   "width; margin"), strict=True):
        ax.set_xlabel(label, fontsize=9)
    fig.text(0.02, 0.008, caption(results), fontsize=9, linespacing=1.35)
    fig.savefig(tmp := Path(path).with_suffix(".tmp.png"), dpi=130)
    plt.close(fig)
    with Image.open(tmp) as picture:                         # 256 colours: a third of the size
        picture.convert("RGB").quantize(256).save(tmp, optimize=True)
    tmp.replace(Path(path).with_suffix(".png"))              # never half a file


def animate(cfg, path):
    """results.gif: the same noise under both regressions of P2. They have a closed form, and are fitted again here.
    (P1 would not do: its PAT diffuses in another space, from other noise.)"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
    grid, paths, g = time_grid(cfg), [], torch.Generator().manual_seed(cfg.seed + 1)
    start = torch.randn(cfg.nets, -(-300 // cfg.nets), 2, generator=g, dtype=D.dtype)
    for features in (lambda z: z, polar):
        x_theta = fit_krr(cfg, features, cfg.bandwidth, cfg.ridge, grid, check(cfg))
        paths.append(seen := [])
        seen.append(sample(x_theta, start, grid, seen))
    fig, axes = plt.subplots(1, 2, figsize=(8.2, 3.6), dpi=76)
    fig.subplots_adjust(left=0.01, right=0.99, top=0.82, bottom=0.16, wspace=0.03)
    for x, colour, text in ((0.02, BLUE, "circles: shells of noisy training points"), (0.39, RED, "will be bad"),
                            (0.53, GREEN, "will be good"), (0.68, GREY, "will be memorized or elsewhere")):
        fig.text(x, 0.05, text, color=colour, fontsize=10)
    frames = []
    shown = [i for i, t in enumerate(grid) if i % 2 == 0 or t < 0.2 or i == len(grid) - 1]         # the end is slow
    for i in tqdm(shown, desc="animation", disable=None, leave=False):
        t = grid[i].item() if i < len(grid) - 1 else 0.0     # the last is the sample itself
        for ax, z, name in zip(axes, paths, ("baseline, on (x, y)", "PAT, told the angle"), strict=True):
            kind, half = kind_of(z[-1], cfg.margin), 1.2 + 1.8 * t               # the view closes in as the cloud does
            ax.clear()
            for x in D:
                ax.add_patch(plt.Circle((1 - t) * x, 2**0.5 * t, fill=False, color=BLUE, lw=1.5))
            for k, colour in ((2, "#AAAAAA"), (3, "#AAAAAA"), (1, GREEN), (0, RED)):
                ax.plot(*z[i][kind == k].T, ".", ms=5, color=colour)
            ax.plot(*(1 - t) * D.T, "o", ms=7, color="black", mfc="white")
            ax.set(xlim=(-half, half), ylim=(-0.58 * half, 0.58 * half), xticks=[], yticks=[], aspect="equal")
            bad, good = (100 * (kind == k).double().mean() for k in (0, 1))
            ax.set_title(f"{name}: {bad:.0f}% bad, {good:.0f}% good", fontsize=11)
        fig.suptitle(f"t = {t:.2f}", y=0.99, fontsize=12)
        fig.canvas.draw()
        picture = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
        frames.append(picture.quantize(palette=frames[0], dither=0) if frames else picture.quantize(24, method=1))
    plt.close(fig)
    wait = [1000] + [90] * (len(frames) - 2) + [3000]        # milliseconds
    tmp, gif = path.with_suffix(".tmp.gif"), path.with_suffix(".gif")
    frames[0].save(tmp, save_all=True, append_images=frames[1:], duration=wait, loop=0)
    print(tmp.replace(gif), flush=True)


def main(cfg):
    """Measure, or not (--redraw); draw from the file; print the claims."""
    path = (Path(cfg.out) if cfg.out else ROOT / "out" / "exp_toy2d" / cfg.preset) / "results.json"
    there = next(p for p in path.absolute().parents if os.path.lexists(p))
    tempfile.TemporaryFile(dir=there).close()                # OSError now rather than after the work, if none can be
    if cfg.dry_run: return forecast(cfg, path.parent)
    if cfg.redraw and not path.exists(): raise FileNotFoundError(f"nothing to redraw: there is no {path}")
    if not cfg.redraw:
        text = json.dumps(measure(cfg))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(text)            # never half a file
        path.with_suffix(".tmp").replace(path)
    try:
        plot(path)
    except Exception as e:
        if not cfg.redraw: raise                             # then it is no fault of the file's
        raise ValueError(f"{path} is damaged, or none of this script: {type(e).__name__} {e}") from e
    print(f"{path}\n{path.with_suffix('.png')}", flush=True)
    if cfg.animate: animate(cfg, path)
    print(f"\n{'claim':74s} {'paper':>10s} {'ours':>9s} {'95% interval':>18s}  verdict")
    for c in json.loads(path.read_text())["claims"]:
        print(f"{c['claim']:74s} {c['paper']:>10s} {c['ours']:9.3g} {'[{:.3g}, {:.3g}]'.format(*c['ci95']):>18s}  "
              f"{c['verdict']}")


def refuse(event):                                           # in one line, what tyro would draw a box of many about
    e, flags = vars(event), ["--" + name.replace("_", "-") for name in vars(PRESETS["laptop"])]
    if "tokens" not in e:
        if not e.get("argument"): return
        raise ValueError(f"{e['argument'].display_name()}: {e.get('message', 'its value is missing')}")
    near = difflib.get_close_matches(flag := e["tokens"][0].partition("=")[0], flags, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"unrecognized option {flag}{hint} (--help lists all)")


if __name__ == "__main__":                                   # a bad value is one line on stderr, and exit status 1
    if debug := "--debug" in sys.argv: sys.argv.remove("--debug")
    preset = (re.findall(r"(?:^| )--preset[= ](\S+)", " ".join(sys.argv)) or ["laptop"])[-1]
    if sys.platform == "linux" and not torch.cuda.is_available():
        import resource  # what is too large fails when it is asked for: else Linux grants it, and kills who uses it
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if resource.getrlimit(resource.RLIMIT_DATA)[0] < 0: resource.setrlimit(resource.RLIMIT_DATA, (room, -1))
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:         # all would write the same files
            raise ValueError(f"this runs in one process: python {Path(__file__).name}, without torchrun")
        if preset not in PRESETS: raise ValueError(f"unknown preset {preset!r}: expected {', '.join(PRESETS)}")
        # a hook that is not public: where there is none, tyro draws its box
        with getattr(getattr(tyro, "_errors", None), "on_parse_error", contextlib.nullcontext)(refuse):
            cfg = tyro.cli(Config, default=PRESETS[preset], description=__doc__)
        print(__doc__.splitlines()[1])                       # what this will do, and, as the docstring has it, how long
        if preset == "laptop" and not cfg.redraw and not cfg.dry_run:
            print("laptop preset:", re.search(r"\.py +# (.*)", __doc__)[1], flush=True)
        main(cfg)
    except SystemExit as e:                                  # 0 after --help; tyro's box ends with 2
        sys.exit(1 if e.code else 0)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        full = isinstance(e, MemoryError) or re.search("out of memory|allocate memory|calculation overflowed", str(e))
        if debug or isinstance(e, RuntimeError) and not full: raise
        text = (str(e) or type(e).__name__).splitlines()[0].rpartition("Allocator: ")[2]
        sys.exit(f"error: {'too little memory for ' + ' '.join(sys.argv) + ': ' if full else ''}{text}")
