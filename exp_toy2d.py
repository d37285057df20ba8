"""
Figure 9: perception-aligned training (PAT) on four points of the plane (C4, Section 5.2, Appendix C.9).

    D = (-1, 0), (-.2, 0), (.2, 0), (1, 0)           two points are perceptually close if their *angle* is close  (S1, S2)

A "bad" sample blends the two points that are close in the plane but not in angle, -.2 and .2. A "good" sample blends two
points of one angle, .2 and 1. "PAT, purely by improving extrapolation, enables generating dramatically better samples":
at one supervision loss L, models that are told of angles make good / (good + bad) larger. P1 tells them by diffusion in
polar space, P2 by kernel regression on polar features, P3 by a network with f(a z) = a f(z), and REPA by making a hidden
layer predict the angle. L = E_t E_{p_t} |x_theta - x_*|^2 / variance of D is 0 for a perfect fit.

    python exp_toy2d.py         # one minute on 2 CPU cores; this file needs no other of the project

You should see the orange-red samples vanish with P1, P2 and REPA, while L stays. The gate of a row: its baseline makes
more bad samples than points spread evenly from -1 to 1 would. P1 has no row at equal loss, since its two losses are of two
problems. P3 is our guess of "radial-equivariant", and no such f can fit: its L is at least .0082 (tests/test_toy2d.py).

Try this; the printed rows have the answers.
1. python exp_toy2d.py --bandwidth 2         Why does P2 leave its regime? What does a kernel this wide blend?
2. python exp_toy2d.py --steps 200           Is it extrapolation alone? See L under the pictures.
3. python exp_toy2d.py --lambdas 0 30 300    How strong may REPA's alignment be before supervision suffers?
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1", "matplotlib==3.11.2", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import scipy.stats
import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    nets: int = 4  # independent repetitions of every model: the intervals are over them
    samples: int = 2000  # samples of every model, over its repetitions together
    times: int = 40  # times between 1 and .001: steps of the sampler, and kernel regressions
    width: int = 512  # hidden units of the MLPs of P1 and P3
    steps: int = 2000  # training iterations of every MLP
    batch: int = 128  # noisy points per iteration
    lr: float = 1e-2  # Adam's, falling linearly to 0
    points: int = 400  # noisy points that each kernel regression is fitted to
    bandwidth: float = 0.5  # h of the kernel exp(-|a - b|^2 / 2 h^2); of .5, 1 and 2 the one that fits best
    ridge: float = 1e-6  # of P2's baseline; times `points`, it is added to the diagonal of the kernel matrix
    lambdas: tuple[float, ...] = (0.0, 0.3, 3.0, 30.0)  # REPA's weights of the alignment; the first is the baseline
    repa_width: int = 64  # hidden units of REPA's MLPs, in each of three layers
    margin: float = 0.1  # a sample this close to a training point is a copy; below .2
    seed: int = 0  # of the weights, the noise and the samples
    device: str = "auto"  # auto, cpu or cuda (mps has no float64)
    redraw: bool = False  # draw the figures again from results.json, and measure nothing
    out: str = ""  # folder of the results; default out/exp_toy2d/<preset>


# differs from the paper: it states no sizes, so that "paper" can only mean more of everything
PRESETS = {
    "laptop": Config(),
    "gpu": Config("gpu", nets=8, width=2048, steps=10_000, points=1000, times=80),
    "paper": Config("paper", nets=10, width=2048, steps=30_000, points=1000, times=80),
}

# ----------------------------------------------------------------------------------------------------------------------
# The data, what a perfect model predicts, and polar coordinates

D = torch.tensor([[-1, 0], [-0.2, 0], [0.2, 0], [1, 0]], dtype=torch.float64)


def posterior_mean(x, z, t, values=None):
    """Return x_*(z, t), or E[values | z], of points x (N, d) for z (..., d) and t (...)."""
    distance = (z[..., None, :] - (1 - t)[..., None, None] * x).square().sum(-1)
    w = torch.softmax(-distance / (2 * t[..., None]**2), dim=-1)                 # Eq. (2)
    return w @ (x if values is None else values)


def add_noise(x, t):
    """Return z_t = (1 - t) x + t eps (..., d), of a random row of x (N, d) for every t (...)."""
    i = torch.randint(len(x), t.shape)
    return (1 - t)[..., None] * x[i] + t[..., None] * torch.randn(*t.shape, x.shape[1], dtype=x.dtype)


def polar(x):
    """Map (x, y) to (r, cos theta, sin theta), where points of one angle are neighbours, and opposite ones are not."""
    r = x.norm(dim=-1, keepdim=True)
    return torch.cat([r, x / r.clamp_min(1e-12)], dim=-1)


def unpolar(p):
    """Map (r, cos theta, sin theta) back to (x, y), whatever the length of (cos, sin)."""
    return p[..., :1] * torch.nn.functional.normalize(p[..., 1:], dim=-1)


def time_grid(cfg):
    """Return the times of the sampler, from 1 down to .001, finer towards 0."""
    return torch.linspace(1, 1e-3**0.5, cfg.times, dtype=torch.float64)**2


# ----------------------------------------------------------------------------------------------------------------------
# Models. Each is a function x_theta(z, i) of K repetitions at once: z (K, M, d), at time grid[i] -> (K, M, d)

def mlp(layers, h):
    """Apply K stacks of layers W1, b1, W2, b2, ..., with ReLUs between them, to h (K, M, n)."""
    for i in range(0, len(layers), 2):
        h = torch.baddbmm(layers[i + 1], h if i == 0 else h.relu(), layers[i])
    return h


def network(kind, layers, z, t):
    """Return v_theta (K, M, d) and, if "aligned", what a linear probe reads off the second of three hidden layers."""
    if kind == "aligned":
        h = mlp(layers[:4], torch.cat([z, t[..., None]], dim=-1)).relu()
        return mlp(layers[4:8], h), mlp(layers[8:], h)
    # differs from the paper, perhaps: "radial-equivariant" is not defined. With the factor r, f(a z) = a f(z) whatever
    # the weights are. It is the same condition for v, x, eps and the score: they differ by scaling and multiples of z.
    r = z.norm(dim=-1, keepdim=True).clamp_min(1e-12) if kind == "equivariant" else 1.0
    return r * mlp(layers, torch.cat([z / r, t[..., None]], dim=-1)), None


def fit_mlp(cfg, x, kind="plain", lam=0.0, steps=None):
    """Train cfg.nets networks on the points x (N, d), aligned with weight lam -> x_theta. ValueError if they diverge."""
    torch.manual_seed(cfg.seed)
    grid, n, d = time_grid(cfg), cfg.width, x.shape[1]
    sizes = [(d + 1, n), (n, n), (n, n), (n, d), (n, 1)] if kind == "aligned" else [(d + 1, n), (n, d)]
    layers = []
    for n_in, n_out in sizes:
        for rows in (n_in, 1):
            uniform = 2 * torch.rand(cfg.nets, rows, n_out) - 1
            layers.append((uniform / n_in**0.5).requires_grad_())
    optimizer = torch.optim.Adam(layers, lr=cfg.lr, fused=True)
    for step in tqdm(range(cfg.steps), desc=f"{kind} MLP", disable=None, leave=False):
        # The data of 250 steps are drawn at once, since a call costs more than its arithmetic. Networks predict v, since
        # x_theta = z - t v_theta gets exact as t falls. differs from the paper: the target is v_* = (z - x_*)/t, the mean
        # of the noisy eps - x of Eq. (1), and REPA aligns with cos theta, by a squared error.
        k = step % 250
        if k == 0:
            t = grid[-1] + (1 - grid[-1]) * torch.rand(250, cfg.nets, cfg.batch, dtype=x.dtype)
            z = add_noise(x, t)
            v = ((z - posterior_mean(x, z, t)) / t[..., None]).float()
            angle = posterior_mean(x, z, t, polar(x)[:, 1:2]).float()            # E[cos theta | z]
            z, t = z.float(), t.float()
        v_theta, angle_theta = network(kind, layers, z[k], t[k])
        loss = (v_theta - v[k]).square().sum(-1).mean(1).sum()
        if kind == "aligned":
            loss = loss + lam * (angle_theta - angle[k]).square().sum(-1).mean(1).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - step / cfg.steps)
        optimizer.step()
    if not loss.isfinite():
        raise ValueError(f"the {kind} MLP of width {n} diverged: give a learning rate below {cfg.lr:g}")

    @torch.no_grad()
    def x_theta(z, i):
        t = grid[i].float().expand(z.shape[:2])
        return z - grid[i] * network(kind, layers, z.float(), t)[0].to(z.dtype)
    return x_theta


def kernel(a, b, h):
    """Return exp(-|a - b|^2 / 2 h^2) of all pairs: (..., m, p), (..., n, p) -> (..., m, n)."""
    return torch.exp(-torch.cdist(a, b).square() / (2 * h**2))


def fit_krr(cfg, x, features, ridge):
    """Fit x_* by kernel ridge regression on features(z_t), in closed form -> x_theta. ValueError if it is singular."""
    # differs from the paper, which does not say how t enters: here each time has a regression of its own
    torch.manual_seed(cfg.seed)
    models = []
    for t in time_grid(cfg):
        t = t.expand(cfg.nets, cfg.points)
        z = add_noise(x, t)
        target, a = posterior_mean(x, z, t), features(z)
        mean = target.mean(1, keepdim=True)                  # taken out, so that the ridge costs a constant nothing
        gram = kernel(a, a, cfg.bandwidth) + ridge * cfg.points * torch.eye(cfg.points, dtype=a.dtype)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed.any():
            raise ValueError(f"ridge {ridge:g} is too small for bandwidth {cfg.bandwidth:g}: raise it")
        models.append((a, torch.cholesky_solve(target - mean, factor), mean))
    return lambda z, i: kernel(features(z), models[i][0], cfg.bandwidth) @ models[i][1] + models[i][2]


# ----------------------------------------------------------------------------------------------------------------------
# Sampling, and what is measured

def sample(x_theta, z, grid):
    """Solve dz/dt = (z - x_theta)/t from t = 1 to 0 by Heun's method, in steps that are exact for a constant x_theta."""
    for i in range(len(grid) - 1):
        keep, x = grid[i + 1] / grid[i], x_theta(z, i)
        ahead = x_theta(keep * z + (1 - keep) * x, i + 1)
        z = keep * z + (1 - keep) * (x + ahead) / 2
    return x_theta(z, len(grid) - 1)


def kind_of(p, margin):
    """Return the kinds of samples (..., 2): 0 bad, 1 good, 2 copy of a training point, 3 elsewhere."""
    x, axis = p[..., 0].abs(), p[..., 1].abs() <= margin
    kind = torch.where(axis & (x <= 1 + margin), 2, 3)
    kind[axis & (x > 0.2 + margin) & (x < 1 - margin)] = 1
    kind[axis & (x < 0.2 - margin)] = 0
    return kind


def supervision_loss(cfg, x_theta, x):
    """Return L (K,): the mean over 500 noisy points at every time, the trapezoid rule over t, over the variance."""
    torch.manual_seed(cfg.seed + 2)
    grid, errors = time_grid(cfg), []
    for i, t in enumerate(grid):
        t = t.expand(cfg.nets, 500)
        z = add_noise(x, t)
        errors.append((x_theta(z, i) - posterior_mean(x, z, t)).square().sum(-1).mean(1))
    return -torch.trapezoid(torch.stack(errors), grid, dim=0) / (x - x.mean(0)).square().sum(1).mean()


def evaluate(cfg, x_theta, x, to_plane=None):
    """Return the samples (K, M, 2), the fraction of each kind (K, 4), good / (good + bad) (K,), and L (K,)."""
    torch.manual_seed(cfg.seed + 1)
    M = cfg.samples // cfg.nets
    p = sample(x_theta, torch.randn(cfg.nets, M, x.shape[1], dtype=x.dtype), time_grid(cfg))
    p = to_plane(p).cpu() if to_plane else p.cpu()
    kinds = torch.nn.functional.one_hot(kind_of(p, cfg.margin), 4).double().mean(1).numpy()
    bad, good = (kinds[:, :2] + 0.5 / M).T                   # half a sample more, so that there always is a share
    L = supervision_loss(cfg, x_theta, x).cpu().numpy()
    return dict(samples=p.flatten(0, 1).numpy().round(3), kinds=kinds, share=good / (bad + good), L=L)


def equal_loss(cfg, x, L, fit, better, worse):
    """Return fit(number) whose loss is L, to 2%, by bisection of the logarithm of a number between better and worse."""
    for _ in range(12):
        number = (better * worse)**0.5
        x_theta = fit(number)
        loss = supervision_loss(cfg, x_theta, x).mean()
        if abs(loss / L - 1) < 0.02:
            break
        better, worse = (number, worse) if loss < L else (better, number)
    return x_theta


def interval(values):
    """Return Student's 95% interval of the mean of values (K,)."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return values.mean() - half, values.mean() + half


def row(id, text, values, gates=None):
    """Return a row of the table: the mean of values (K,), and whether its interval lies above 0, as the paper claims.

    gates: [(passed, what is wrong if not)]. A row without gates is a finding of our own, which has no verdict.
    """
    low, high = interval(values)
    wrong = [reason for passed, reason in gates or [] if not passed]
    verdict = "reproduces" if low > 0 else "differs" if high < 0 else "not resolved"
    if gates is None or wrong:
        verdict = "other regime" if wrong else "finding"
    return dict(id=id, text=text, paper="" if gates is None else "> 0", ours=values.mean(), ci95=[low, high],
                verdict=verdict, note="; ".join(wrong))


def measure(cfg):
    """Fit all models -> the rows of the table, and the arrays of the figures."""
    x, rows = D.to(torch.get_default_device()), []
    plain = evaluate(cfg, fit_mlp(cfg, x), x)
    pat1 = evaluate(cfg, fit_mlp(cfg, polar(x)), polar(x), unpolar)
    krr = evaluate(cfg, fit_krr(cfg, x, torch.clone, cfg.ridge), x)
    # C4 is about samples at one loss: P2's ridge and the length of the training of P3's baseline are found for that.
    fit = partial(fit_krr, cfg, x, polar)
    pat2 = evaluate(cfg, equal_loss(cfg, x, krr["L"].mean(), fit, cfg.ridge, 1.0), x)
    pat3 = evaluate(cfg, fit_mlp(cfg, x, "equivariant"), x)
    fit = partial(fit_mlp, cfg, x, "plain", 0.0)
    short = evaluate(cfg, equal_loss(cfg, x, pat3["L"].mean(), fit, cfg.steps, 1), x)
    deep = replace(cfg, width=cfg.repa_width, lr=cfg.lr / 3)
    repa = [evaluate(deep, fit_mlp(deep, x, "aligned", lam), x) for lam in cfg.lambdas]

    def ratio(pat, base):
        return pat["L"].mean() / base["L"].mean()

    k = max(k for k in range(len(repa)) if abs(ratio(repa[k], repa[0]) - 1) < 0.1)
    even = (0.8 - 2 * cfg.margin) / (1 - 3 * cfg.margin)
    for name, base, pat in (("P1", plain, pat1), ("P2", krr, pat2), ("P3", short, pat3), ("REPA", repa[0], repa[k])):
        gates = [(interval(base["share"])[1] < even, "its baseline makes no more bad samples than evenly spread points")]
        if name != "P1":
            gates.append((abs(ratio(pat, base) - 1) < 0.1, f"its L is {ratio(pat, base):.1f} times its baseline's"))
        if name == "P3":
            gates.append((ratio(pat, plain) < 1.1, f"it cannot fit: its L is {ratio(pat, plain):.1f} times the MLP's"))
        text = f"{name}: good / (good + bad), PAT minus baseline" + ", at equal loss" * (name != "P1")
        rows.append(row(f"{name.lower()}/share", text, pat["share"] - base["share"], gates))
    apart = np.abs(pat1["kinds"] - pat2["kinds"]).sum(1) / 2
    largest = np.max([m["L"] for m in (plain, pat1, krr, pat2)], axis=0)
    rows += [row("p1p2/loss", "P1 and P2: largest of their four L, which the paper calls nearly 0", largest),
             row("p1p2/alike", "R2, similar samples: kinds of P1's and P2's, total variation", apart),
             row("p3/loss", "P3: L over that of the MLP trained in full", pat3["L"] / plain["L"]),
             row("repa/loss", f"REPA: L at lambda = {cfg.lambdas[-1]:g} over the baseline's", repa[-1]["L"] / repa[0]["L"])]
    models = {"P1 baseline: MLP": plain, "P1 PAT: MLP in polar space": pat1, "P2 baseline: kernel on (x, y)": krr,
              "P2 PAT: kernel on (r, sin, cos)": pat2, "P3 baseline: MLP, stopped early": short,
              "P3 PAT: radial-equivariant MLP": pat3}
    return rows, dict(models=models, repa=[dict(m, samples=[]) for m in repa], lam=cfg.lambdas[k])


# ----------------------------------------------------------------------------------------------------------------------
# Drawing, and the command

BLUE, RED, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"


def plot(results, folder):
    """Draw fig9.png and fig_repa2d.png from the results alone."""
    margin, lambdas, arrays = results["config"]["margin"], results["config"]["lambdas"], results["arrays"]
    jitter = np.random.default_rng(0)
    fig = Figure((8.3, 6.4), layout="constrained")
    axes = fig.subplots(3, 2, sharex=True, sharey=True)
    for ax, (name, m) in zip(axes.flat, arrays["models"].items(), strict=True):
        p = np.array(m["samples"])
        kind = kind_of(torch.from_numpy(p), margin).numpy()
        # Samples lie on the axis: they are spread in y, the further the more of them share one x.
        counts, edges = np.histogram(p[:, 0], 60, (-1.4, 1.4))
        count = counts[np.digitize(p[:, 0], edges[1:-1])]
        y = p[:, 1] + jitter.uniform(-0.3, 0.3, len(p)) * np.minimum(1, count / (0.04 * len(p)))
        for k, colour, label in ((3, GREY, ""), (2, GREY, "copy, or elsewhere"), (1, GREEN, "good"), (0, RED, "bad")):
            ax.plot(p[kind == k, 0], y[kind == k], ".", ms=3, color=colour, label=label)
        ax.plot(*D[:2].T, "^", *D[2:].T, "s", ms=9, color="black", mfc="white", mew=1.5)
        ax.set_title(name, fontsize=11)
        ax.set_xlabel(f"L = {np.mean(m['L']):.4f},  good / (good + bad) = {np.mean(m['share']):.2f}", fontsize=10)
        ax.set(xlim=(-1.4, 1.4), ylim=(-0.5, 0.5), yticks=[])
    fig.savefig(folder / "fig9.png", dpi=150)
