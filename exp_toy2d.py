"""Figure 9: perception-aligned training (PAT) on four points of the plane (C4, Section 5.2, Appendix C.9).

    D = (-1, 0), (-.2, 0), (.2, 0), (1, 0)           two points are perceptually close if their *angle* is close

A "bad" sample blends the two points that are close in the plane but not in angle: -.2 and .2. A "good" sample blends
two points of one angle: .2 and 1. "PAT, purely by improving extrapolation, enables generating dramatically better
samples": at one supervision loss L, a model that knows angles makes good / (good + bad) larger. It knows them by P1,
diffusion in polar space; P2, kernel regression on polar features; P3, f(a z) = a f(z), a > 0 (our guess); or REPA: a
hidden layer predicts cos theta. L = E |x_theta - x_*|^2 / variance of D; x_theta guesses x, x_* = E[x | z_t] is best.

    python exp_toy2d.py         # one minute; figures in out/exp_toy2d/laptop/, which the next run overwrites
You should see fewer orange-red dots on the right (P3: hardly), and with stronger REPA. A row counts if its baseline's
share is below that of evenly spread points, 6/7, and if both L are equal within 25% (P1's are of two problems).
1. python exp_toy2d.py --bandwidth 2      Why does P2's row leave its regime? What does a kernel this wide blend?
2. python exp_toy2d.py --steps 200 --short 60    Do angles help before a network fits? See P1's and REPA's L and shares.
3. python exp_toy2d.py --lambdas 0 5 10 30     At which weight of REPA's alignment does L rise by a quarter?
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0","numpy==2.4.6", "scipy==1.17.1", "matplotlib==3.11.2", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
import json
import os
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from scipy.stats import gaussian_kde, ttest_1samp
from torch.nn import Module, Parameter, ReLU, Sequential
from tqdm import tqdm


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    nets: int = 4  # K, independent repetitions of every model: the intervals are over them
    width: int = 512  # hidden units of the 2-layer MLPs of P1 and P3
    steps: int = 2000  # training iterations of every MLP
    short: int = 600  # those of P3's baseline: then its loss is P3's
    lr: float = 1e-2  # Adam's, falling linearly to 0; half of it for REPA's deeper MLPs
    bandwidth: float = 0.5  # h of the kernel exp(-|a - b|^2 / 2 h^2); of .5, 1 and 2 the one that fits best
    lambdas: tuple[float, ...] = (0.0, 0.3, 1.0, 5.0)  # REPA's weights of the alignment; the first is the baseline
    seed: int = 0  # of the weights, the noise and the samples
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # mps lacks P2's float64
    redraw: bool = False  # draw the figures again from results.json, and measure nothing
    out: str = ""  # folder of the results; default out/exp_toy2d/<preset>


# differs from the paper: it states no sizes, so that "paper" only means larger and longer. short: P3's L comes earlier
PRESETS = {
    "laptop": Config(),
    "gpu": Config("gpu", nets=8, width=2048, steps=10_000, short=440),
    "paper": Config("paper", nets=10, width=2048, steps=30_000, short=440),
}

# ----------------------------------------------------------------------------------------------------------------------
# The data, the times of the sampler (from 1 down to .001, finer towards 0), noise, and polar coordinates
D = torch.tensor([[-1, 0], [-0.2, 0], [0.2, 0], [1, 0]], dtype=torch.float64)
GRID = (np.linspace(1, 1e-3**0.5, 40)**2).tolist()


def add_noise(x, t):
    """Return z_t (..., d) of random rows of x (N, d), for t (..., 1), and weights w (..., N): x_*(z_t, t) is w @ x."""
    clean = x[torch.randint(len(x), t.shape[:-1])]
    z = (1 - t) * clean + t * torch.randn_like(clean)
    distance = (z[..., None, :] - (1 - t)[..., None] * x).square().sum(-1)
    return z, torch.softmax(-distance / (2 * t**2), dim=-1)                      # Eq. (2)


def polar(x):
    """Map (x, y) to (r, cos theta, sin theta), where points of one angle are neighbours, and opposite ones are not."""
    r = x.norm(dim=-1, keepdim=True)
    return torch.cat([r, x / r.clamp_min(1e-12)], dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# Models. A fitted one is a function x_theta(z, t): K repetitions at once, z (K, M, d), at one time t of the grid
class Linear(Module):
    """K linear layers, each with weights of its own: (K, M, n_in) -> (K, M, n_out)."""
    def __init__(self, K, n_in, n_out):
        super().__init__()
        bound = n_in**-0.5
        self.weight = Parameter(torch.empty(K, n_in, n_out).uniform_(-bound, bound))
        self.bias = Parameter(torch.empty(K, 1, n_out).uniform_(-bound, bound))

    def forward(self, h):
        return torch.baddbmm(self.bias, h, self.weight)


class MLP(Module):
    """K networks z (K, M, d), t (K, M, 1) -> v_theta (K, M, d), and what a probe reads off a hidden layer (K, M, 1)."""
    def __init__(self, kind, K, d, width):
        super().__init__()
        self.kind = kind
        self.encoder = Sequential(Linear(K, d + 1, width), ReLU())
        self.decoder = Linear(K, width, d)
        self.probe = Linear(K, width, 1)
        if kind == "deep":
            self.encoder.extend([Linear(K, width, width), ReLU()])
            self.decoder = Sequential(Linear(K, width, width), ReLU(), self.decoder)

    def forward(self, z, t):
        r = 1.0
        if self.kind == "equivariant":
            # differs from the paper, perhaps: it does not define "radial-equivariant". By this factor f(a z) = a f(z).
            # It is one condition for v, x, eps and the score, which differ by factors and multiples of z.
            r = z.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        h = self.encoder(torch.cat([z / r, t], dim=-1))
        return r * self.decoder(h), self.probe(h)


def fit_mlp(cfg, x, kind="plain", lam=0.0):
    """Train MLPs on the points x (N, d) -> x_theta. With weight lam, the probe learns E[cos theta of x | z_t]."""
    # differs from the paper: the target is v_* = (z - x_*)/t, the mean of Eq. (1)'s noisy eps - x, to come nearer to a
    # perfect fit; the alignment is a squared error. Networks predict v, so that x_theta = z - t v is exact at t = 0.
    torch.manual_seed(cfg.seed)
    net = MLP(kind, cfg.nets, x.shape[1], cfg.width).to(x)
    t = x.new_empty(cfg.steps, cfg.nets, 128, 1).uniform_(1e-3, 1)
    z, w = add_noise(x, t)
    v = (z - w @ x) / t
    angle = w @ polar(x)[:, 1:2]                             # E[cos theta | z_t]; in polar space meaningless, unused
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    for k in range(cfg.steps):
        v_theta, angle_theta = net(z[k], t[k])
        loss = (v_theta - v[k]).square().sum() + lam * (angle_theta - angle[k]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = cfg.lr * (1 - k / cfg.steps)
        optimizer.step()
    if not loss.isfinite():
        raise ValueError(f"the {kind} MLP diverged: give a learning rate below {cfg.lr}")

    @torch.no_grad()
    def x_theta(z, t):
        return z - t * net(z, torch.full_like(z[..., :1], t))[0]
    return x_theta


def fit_krr(cfg, x, features, ridge):
    """Fit x_* by kernel ridge regression on features(z_t) of 400 noisy points, in closed form -> x_theta."""
    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / (2 * cfg.bandwidth**2))

    def x_theta(z, t):
        a, coefficients = fits[t]
        return kernel(features(z), a) @ coefficients

    # differs from the paper, which does not say how t enters: here each time has a regression of its own
    torch.manual_seed(cfg.seed)
    fits = {}
    for t in GRID:
        z, w = add_noise(x, x.new_full((cfg.nets, 400, 1), t))
        a = features(z)
        fits[t] = a, torch.linalg.solve(kernel(a, a) + 400 * ridge * torch.eye(400).to(x), w @ x)
    return x_theta


def fit_all(cfg):
    """Yield (name, x_theta, x) of all models, one after the other: P1 to P3, then REPA."""
    x64 = D.to(cfg.device)
    x = x64.float()
    # C4 is about models of one loss: P2's second ridge, which is larger, and P3's fewer steps are chosen for that.
    yield "P1 baseline: MLP", fit_mlp(cfg, x), x
    yield "P1 PAT: MLP in polar space", fit_mlp(cfg, polar(x)), polar(x)
    yield "P2 baseline: kernel on (x, y)", fit_krr(cfg, x64, torch.clone, 1e-6), x64
    yield "P2 PAT: kernel on (r, cos, sin)", fit_krr(cfg, x64, polar, 1.8e-4), x64
    yield "P3 baseline: MLP, stopped early", fit_mlp(replace(cfg, steps=cfg.short), x), x
    yield "P3 PAT: equivariant MLP, cannot fit", fit_mlp(cfg, x, "equivariant"), x
    for lam in cfg.lambdas:
        yield f"REPA, lambda = {lam:g}", fit_mlp(replace(cfg, width=64, lr=cfg.lr / 2), x, "deep", lam), x


# ----------------------------------------------------------------------------------------------------------------------
# Sampling, what is measured, and the figures
def sample(x_theta, z):
    """Solve dz/dt = (z - x_theta)/t from t = 1 to 0 by Heun's method; a step is exact if x_theta is constant."""
    for t, s in pairwise(GRID):
        keep = s / t
        x = x_theta(z, t)
        ahead = x_theta(keep * z + (1 - keep) * x, s)
        z = keep * z + (1 - keep) * (x + ahead) / 2
    return x_theta(z, GRID[-1])


def kind_of(p):
    """Return the kinds of samples p (..., 2): 0 a copy (within .1 of a training point) or elsewhere, 1 good, 2 bad."""
    x, on_axis = p[..., 0].abs(), p[..., 1].abs() <= 0.1
    good = on_axis & (x > 0.3) & (x < 0.9)
    bad = on_axis & (x < 0.1)
    return good + 2 * bad


def evaluate(cfg, x_theta, x):
    """Return a dict of samples in the plane (500 K, 2), good / (good + bad) (K,), and the supervision loss L (K,)."""
    torch.manual_seed(cfg.seed + 1)
    p = sample(x_theta, x.new_empty(cfg.nets, 2000, x.shape[1]).normal_())
    if x.shape[1] == 3:
        p = p[..., :1] * torch.nn.functional.normalize(p[..., 1:], dim=-1)
    # Half a sample more of each kind, so that there is a share where all are copies.
    good = (kind_of(p) == 1).sum(1) + 0.5
    bad = (kind_of(p) == 2).sum(1) + 0.5
    errors = []
    for t in GRID:
        z, w = add_noise(x, x.new_full((cfg.nets, 500, 1), t))
        errors.append((x_theta(z, t) - w @ x).square().sum(-1).mean(1).tolist())
    L = -np.trapezoid(errors, GRID, axis=0) / x.var(0, correction=0).sum().item()
    p = p[:, :500].flatten(0, 1).double().round(decimals=3)
    return dict(samples=p.tolist(), share=(good / (good + bad)).tolist(), L=L.tolist())


def compare(id, baseline, pat):
    """Return the row "PAT makes good / (good + bad) larger". After two gates, its interval decides the verdict."""
    change = np.subtract(pat["share"], baseline["share"])
    low, high = ttest_1samp(change, 0).confidence_interval()
    ratio = np.mean(pat["L"]) / np.mean(baseline["L"])
    note = ""
    # Of evenly spread points 1.2 / (1.2 + .2) are good. Losses that differ by less than a quarter are called equal.
    if ttest_1samp(baseline["share"], 0).confidence_interval().high > 6 / 7:
        verdict, note = "other regime", "its baseline may make no more bad samples than evenly spread points"
    elif id != "P1" and not 0.75 < ratio < 1.25:
        verdict, note = "other regime", f"the losses are not equal: PAT's is {ratio:.2f} times the baseline's"
    elif low > 0:
        verdict = "reproduces"
    elif high < 0:
        verdict = "differs"
    else:
        verdict, note = "not resolved", f"a change of {(high - low) / 2:.2f} could have been seen"
    return dict(
        id=f"fig9/{id}",
        text=f"{id}: good / (good + bad) samples, perception-aligned (PAT) minus baseline",
        paper="> 0", ours=change.mean(), ci95=[low, high],
        verdict=verdict, note=note)


def draw(models, path):
    """Draw the samples of every model, two models a row. Ignore a notebook's own backend."""
    os.environ["MPLBACKEND"] = "agg"
    from matplotlib.figure import Figure
    fig = Figure((8.3, len(models)), layout="constrained")
    axes = fig.subplots((len(models) + 1) // 2, 2, sharex=True, sharey=True)
    for ax, (name, model) in zip(axes.flat, models, strict=False):
        x, y = np.transpose(model["samples"])
        kind = kind_of(torch.tensor(model["samples"])).numpy()
        # Samples lie close to the axis: they are spread in y, the further the more of them share one x.
        crowd = np.minimum(1.5, gaussian_kde(x, 0.03)(x))
        y = y + crowd * np.random.default_rng(0).uniform(-0.2, 0.2, len(y))
        for k, colour in enumerate(("#BBBBBB", "#009E73", "#D55E00")):
            ax.plot(x[kind == k], y[kind == k], ".", ms=3, color=colour)
        ax.plot(*D[:2].T, "^", *D[2:].T, "s", ms=9, color="black", mfc="white")
        label = f"L = {np.mean(model['L']):.4f}    good / (good + bad) = {np.mean(model['share']):.2f}"
        ax.set(title=name, xlabel=label, xlim=(-1.3, 1.3), ylim=(-0.5, 0.5), yticks=[])
    fig.suptitle("C4: models that know angles make fewer bad samples (orange-red) for each good one (green)\n"
                 "triangles and squares: the training points; grey: all other samples; height only spreads the dots")
    fig.savefig(path, dpi=150)


def main(cfg):
    """Measure, or not (--redraw), write results.json, draw from that file, and print the rows."""
    for name in ("width", "steps", "short", "lr", "bandwidth"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"{name} must be positive, not {getattr(cfg, name)}")
    if min(cfg.nets, len(set(cfg.lambdas))) < 2:
        raise ValueError("nets and lambdas: two or more are needed")
    torch.set_num_threads(1)                                 # a second thread costs small networks more than it brings
    path = Path(cfg.out or f"out/exp_toy2d/{cfg.preset}") / "results.json"
    if path.exists() and "exp_toy2d" not in path.read_text():
        raise ValueError(f"{path} is of another experiment: give another --out")
    if not cfg.redraw:
        models = {}
        for name, x_theta, x in tqdm(fit_all(cfg), disable=None):
            models[name] = evaluate(cfg, x_theta, x)
        mlp, mlp_pat, krr, krr_pat, stopped, equivariant, plain, *_, repa = models.values()
        rows = [
            compare("P1", mlp, mlp_pat),
            compare("P2", krr, krr_pat),
            compare("P3", stopped, equivariant),
            compare("REPA", plain, repa)]
        results = dict(script="exp_toy2d", config=vars(cfg), claims=rows, arrays=models)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")                       # a kill must not cost the results of before
        new.write_text(json.dumps(results))
        new.replace(path)
    results = json.loads(path.read_text())
    models = list(results["arrays"].items())
    draw(models[:6], path.with_name("fig9.png"))
    draw(models[6:], path.with_name("fig_repa2d.png"))
    for r in results["claims"]:
        print("{text:75s} {paper:>4s} {ours:7.3f} [{ci95[0]:.3f}, {ci95[1]:.3f}]  {verdict}  {note}".format(**r))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, default=PRESETS[tyro.cli(Config).preset], description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
