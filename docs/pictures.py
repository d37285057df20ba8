"""Draw the pictures of the README that belong to no experiment: python docs/pictures.py

assets/sketch.png   the idea: shells around the data, and a trajectory that leaves them (the paper's Figures 1a and 5a)
assets/shells.gif   trajectories leave the shells, beside the images that they become; needs the default model
assets/social.png   1200 x 630 pixels, for links to the project
"""
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.animation import FuncAnimation, PillowWriter  # noqa: E402

from empirical_score import EmpiricalScore  # noqa: E402
from plumbing.data import load_data  # noqa: E402
from plumbing.files import load_run  # noqa: E402
from plumbing.results import BLUE, GREY, ORANGE  # noqa: E402
from sample import noise, solve_ode  # noqa: E402
from train import Config, train  # noqa: E402

ASSETS = ROOT / "assets"
POINTS = np.array([[-1.6, 0.7], [-0.5, -0.9], [0.9, 0.9], [1.7, -0.6]])


def draw_shells(ax):
    """Draw data points with the shell of each, and a trajectory that starts inside one and ends between them."""
    angle = np.linspace(0, 2 * np.pi, 200)
    for x, y in POINTS:
        ax.fill(x + 0.92 * np.cos(angle), y + 0.92 * np.sin(angle), color=BLUE, alpha=0.22, lw=0)
        ax.fill(x + 0.78 * np.cos(angle), y + 0.78 * np.sin(angle), color="white", lw=0)
    ax.plot(*POINTS.T, "o", color="black", ms=6)
    t = np.linspace(0, 1, 100)[:, None]
    start, middle, end = np.array([[-2.22, 0.12]]), np.array([[-0.9, -0.1]]), np.array([[0.35, 0.0]])
    path = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    ax.plot(*path.T, color=ORANGE, lw=2.5)
    ax.plot(*end.T, "*", color=ORANGE, ms=14)
    ax.text(-2.9, 1.82, "supervision region: thin shells around noisy training points", color=BLUE)
    ax.text(-2.9, -2.0, "extrapolation region: the rest, where samples end", color=ORANGE)


def draw_regions(ax):
    """Draw D_score inside D_region: the target is made of the former, and asked for around the latter."""
    rng = np.random.default_rng(3)
    more = rng.uniform(-2.4, 2.4, (14, 2)) * [1, 0.62]
    angle = np.linspace(0, 2 * np.pi, 100)
    for points, colour, alpha in ((more, GREY, 0.13), (POINTS, BLUE, 0.22)):
        for x, y in points:
            ax.fill(x + 0.5 * np.cos(angle), y + 0.5 * np.sin(angle), color=colour, alpha=alpha, lw=0)
    ax.plot(*more.T, "o", color=GREY, ms=4)
    ax.plot(*POINTS.T, "o", color=BLUE, ms=7)
    ax.text(-2.9, 1.75, "$D_{score}$: what the score is made of", color=BLUE)
    ax.text(-2.9, -2.0, "$D_{region}$: where the network is asked for it", color=GREY)


def draw_sketch(path, size=(8.3, 3.6), dpi=150):
    plt.rcParams["font.size"] = 9
    fig, axes = plt.subplots(1, 2, figsize=size, layout="constrained")
    for ax, draw, title in ((axes[0], draw_shells, "Selective underfitting"),
                            (axes[1], draw_regions, "Freedom of extrapolation")):
        draw(ax)
        ax.set(xlim=(-3, 3), ylim=(-2.2, 2.1), xticks=[], yticks=[], aspect="equal")
        ax.set_title(title, fontsize=12)
    fig.savefig(path, dpi=dpi)
    plt.close(fig)


def follow_samples(n, times):
    """Return r_* (n, T) and images (T, n, H, W) along trajectories of the default model, r_* of training points."""
    cfg = Config()
    model = load_run(train(cfg))
    data = load_data(cfg.data)
    E = EmpiricalScore(data["x"], data["y"])
    path = solve_ode(model, noise(range(n), E.shape), torch.arange(n) % 10, times)
    x = torch.from_numpy(data["x"][:n].copy())
    eps = noise(range(n), E.shape, seed=1)
    inside = torch.stack([E.r_star((1 - t) * x + t * eps, t)[0] for t in times[:-1]], dim=1)
    outside = torch.stack([E.r_star(z, t)[0] for z, t in zip(path, times[:-1], strict=False)], dim=1)
    return outside, inside, path[:, :, 0]


def draw_gif(path):
    plt.rcParams["font.size"] = 11
    times = np.linspace(1, 0, 17)
    outside, inside, images = follow_samples(10, times)
    fig = plt.figure(figsize=(8.3, 3.4))
    left, right = fig.subfigures(1, 2, width_ratios=(1.3, 1))
    ax, grid = left.subplots(), right.subplots(2, 3)
    shown = [panel.imshow(images[0, k], cmap="gray", vmin=-1, vmax=1) for k, panel in enumerate(grid.flat)]
    for panel in grid.flat:
        panel.set_axis_off()

    def draw(frame):
        ax.clear()
        n = min(frame + 1, 16)
        ax.plot(times[:n], inside[:, :n].T, color=BLUE, lw=1)
        ax.plot(times[:n], outside[:, :n].T, color=ORANGE, lw=1)
        ax.set(xlim=(1, 0), ylim=(0.8, 5), xlabel="t", ylabel="distance to the nearest shell, $r_*$")
        ax.text(0.97, 4.6, "noisy training points", color=BLUE)
        ax.text(0.97, 4.2, "sampling", color=ORANGE)
        for k, image in enumerate(shown):
            image.set_data(images[min(frame, 16), k])

    FuncAnimation(fig, draw, frames=22).save(path, PillowWriter(fps=4), dpi=50)
    plt.close(fig)


if __name__ == "__main__":
    draw_sketch(ASSETS / "sketch.png")
    draw_sketch(ASSETS / "social.png", size=(12, 6.3), dpi=100)
    draw_gif(ASSETS / "shells.gif")
