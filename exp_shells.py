"""Figures 1b and 4: training only looks at thin shells around the data (C1), and sampling leaves them (C2).

A noisy training point z_t = (1 - t) x + t eps lies at distance t |eps|, about t sqrt(d), from (1 - t) x: on a thin
shell (Prop. 3.2). Equation (4) asks how far any z is from the nearest such shell:

    r_i = |z_t - (1 - t) x_i| / (t sqrt d),        r_* = the r_i closest to 1 over all training points i

    python exp_shells.py               # 4 minutes on 2 CPU cores, after the default model is trained twice (6 minutes)

What you should see. fig1b.png: r_* stays at 1 for training points and climbs along trajectories; half of these are
outside a little below the t where the shells of class 3 come apart, and half of new real images, noised, a little below
that. fig4.png: training images are noised to t and sampled back. Half return from t up to .73, by the exact score up
to .8, close to the best of any rule. fig1b_dimensions.png: the more dimensions, the earlier sampling leaves.

Exercises; the answers are in the table that is printed last.
1. python exp_shells.py --overlap-class 1 --out out/one      Do all classes come apart at the same t? See "come apart".
2. In measure and leave_shells, give make_score dict(x=data["x_heldout"], y=data["y_heldout"]) in place of data. Now
   training images are outside, and held-out ones inside. Does r_* say something about the network, or the data set?
3. python exp_shells.py --network.data digits --network.steps 500 --out out/64     In 64 dimensions, when do they leave?
"""
import dataclasses
from typing import Literal

import numpy as np
import scipy.stats
import torch

from plumbing import results
from plumbing.cli import check_at_least, pick_device, run_command, setup_processes
from plumbing.data import get_images, labels_in_turn, load_data
from plumbing.fast_score import make_score
from plumbing.files import load_run
from plumbing.images import to_uint8
from plumbing.runs import load_networks, run_jobs
from sample import noise, solve_ode
from train import PRESETS as NETWORKS
from train import Config as NetworkConfig
from train import train

SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
MEMO_TIMES = np.array([0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0])
DELTA = 0.01  # a noisy training point lies in its shell with probability 1 - delta


@dataclasses.dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)  # trained by train.py, or found in out/
    model_path: str = ""  # official SiT weights or a run's folder: measure it alone
    seeds: int = 2  # networks that differ in their training seed
    n: int = 100  # trajectories of each network, and as many noised images of each kind
    n_times: int = 50  # times t = 1/n_times, 2/n_times .. 1
    overlap_class: int = 3  # the class whose shells are compared pair by pair
    other_sets: tuple[str, ...] = ("digits", "photos")  # for other d: a small network is trained on each; or none
    fast: bool = False  # the certified engine of plumbing/fast_score.py for the empirical score
    seed: int = 0  # of the points, the noise and the trajectories
    device: str = "auto"  # auto, cpu, cuda, mps
    redraw: bool = False  # draw the figures again from results.json, and measure nothing
    out: str = ""  # folder of the results; default out/exp_shells/<preset>


PRESETS = {
    "laptop": Config(),  # differs from the paper: digits and a small network, half its times
    "gpu": Config("gpu", NETWORKS["gpu"], fast=True),
    "paper": Config("paper", NETWORKS["paper"], seeds=1, n_times=100, overlap_class=387, other_sets=(), fast=True),
}


# The maths: the shells, when they come apart, and when an image leaves them.
def shell_width(d):
    """Return the half-width, in units of r, of the shell that holds |eps|/sqrt(d) with probability >= 1 - DELTA."""
    # differs from the paper: Prop. 3.2's sqrt(d log 1/delta) is wider than the radius; this is the exact quantile
    return scipy.stats.chi.ppf(1 - DELTA / 2, d) / np.sqrt(d) - 1


def crossing(t, values, level):
    """Return the ascending t at which a falling curve (T,) passes the level; 0 if it is below it, t[-1] if above."""
    return np.interp(-level, np.maximum.accumulate(-values), t, left=0.0)


def time_of_leaving(r, t, d):
    """Return the t at which half of the r_* (n, T) lie outside the shells."""
    return crossing(t, np.median(np.abs(r - 1), axis=0), shell_width(d))


def time_apart(gap):
    """Return the t at which the overlap C(t) = exp(-((1 - t)/t)^2 gap^2 / 8) is .01; gap = |x_i - x_j| (B.2)."""
    # differs from the paper: B.2 writes the covariance sigma I for z_t, which has sigma^2 I
    return gap / (gap + np.sqrt(8 * np.log(100)))


def overlap(apart, t):
    """Return C(t) of two shells that come apart at time `apart`."""
    return 0.01 ** (((1 - t) / t * apart / (1 - apart)) ** 2)


def law(distance, d):
    """Return the t at which an image at distance * sqrt(d) from the nearest training one leaves the shells, noised."""
    # z - (1 - t) x_i = (1 - t)(x - x_i) + t eps, two nearly orthogonal parts: r^2 = 1 + ((1 - t)/t)^2 distance^2
    return 1 / (1 + np.sqrt((1 + shell_width(d)) ** 2 - 1) / distance)


def noised(x, t, seed):
    """Return images x (n, C, H, W) at all times (T, n, C, H, W), with the same noise at each."""
    eps = noise(range(len(x)), x.shape[1:], seed).to(x.device)
    return torch.stack([(1 - tj) * x + tj * eps for tj in t.tolist()])


def r_star_of(E, path, t):
    """Return r_* (n, T) of path[k] (n, C, H, W) at times t[k], k < T. Processes of torchrun share the times."""
    def at_time(k):
        r, _ = E.r_star(path[k], t[k])
        return r.cpu().double()
    found = run_jobs(at_time, range(len(t)), workers=1)
    return torch.stack([*found.values()], dim=1).numpy()


def leave_shells(cfg, data, model, label, n, t, device):
    """Return r_* (n, T) along trajectories, their images, D, times of leaving and coming apart, distance (see law)."""
    E = make_score(data, device, cfg.fast)
    y = labels_in_turn(data, n).to(device)
    start = noise(range(n), E.shape, cfg.seed).to(device)
    path = solve_ode(model, start, y, [*t[::-1], 0.0])
    images, *noisy = path.flip(0)                            # (n, C, H, W) each
    r = r_star_of(E, noisy, t)
    is_member = data["y"] == label
    members = torch.from_numpy(data["x"][is_member])
    pairs = torch.pdist(members.flatten(1).double())
    apart = time_apart(pairs[pairs > 0].min().item())
    d2, _ = E.nearest(images)
    median = d2.sqrt().median().item()
    distance = median / np.sqrt(E.D)
    return dict(r=r, images=images, d=E.D, leave=time_of_leaving(r, t, E.D), apart=apart, distance=distance)


def memorization(E, model, x, y, seed):
    """Noise images x (n, C, H, W) of classes y to the T MEMO_TIMES, and sample back. Return whether x is the training
    image nearest to the result (C.4), (n, T), and the first image, noisy and sampled, (T, 2, C, H, W)."""
    path = noised(x, MEMO_TIMES, seed)
    def at_time(k):
        _, out = solve_ode(model, path[k], y, [MEMO_TIMES[k], 0.0], solver="heun", steps=15)
        back = (out - x).flatten(1).square().sum(dim=1)
        nearest, _ = E.nearest(out)
        is_hit = back <= nearest[:, 0] * (1 + 1e-4)          # both squared; `back` is in float32
        pair = torch.stack([path[k, 0], out[0]])
        return is_hit.cpu(), pair.cpu()
    found = run_jobs(at_time, range(len(MEMO_TIMES)), workers=1)
    hits, pictures = zip(*found.values(), strict=True)
    return torch.stack(hits, dim=1).double().numpy(), torch.stack(pictures)


def make_rows(r, paths, t, d, apart, hits, exact):
    """Return the rows, of r_* (n, T) of noised images and of each seed's paths, and of hits (n, MEMO_TIMES)."""
    def leave(r_star):
        return time_of_leaving(r_star, t, d)
    def longer(hit):
        return crossing(MEMO_TIMES, hit.mean(axis=0), 0.5) - apart
    claim, finding, over_seeds = results.claim, results.finding, results.over_seeds
    width, middle = shell_width(d), np.abs(t - 0.5).argmin()
    outside = [np.abs(path[:, middle] - 1) > width for path in paths]
    inside = np.abs(r["training"][:, 0] - 1) <= width
    gained = [(hit - exact)[:, MEMO_TIMES >= 0.6].mean(axis=1) for hit in hits]
    return [
        claim("fig1b/outside", "C2 fraction of trajectories outside the shells at t = .5", "most",
              *over_seeds(outside, np.mean), low=0.5),
        claim("fig4/memorizes", "Fig 4 half of the images come back up to t, less the t where shells come apart", "> 0",
              *over_seeds(hits, longer), low=0.0),
        finding("fig1b/inside", "training points inside at the least t (delta = .01)", *over_seeds([inside], np.mean)),
        finding("fig1b/leave", "t at which half of the trajectories are outside", *over_seeds(paths, leave)),
        finding("fig1b/apart", "t at which the shells of the class come apart (C = .01)", apart, (apart, apart)),
        finding("fig1b/heldout", "t at which half of new real images are outside", *over_seeds([r["heldout"]], leave)),
        finding("fig1b/generated", "t at which half of the generated images, noised afresh, are outside",
                *over_seeds([r["generated"]], leave)),
        finding("fig4/ceiling", "images that come back, network minus exact score, mean over t >= .6",
                *over_seeds(gained, np.mean))]


def measure(cfg):
    """Return rows and arrays."""
    check_at_least(cfg, n=2, n_times=2, seeds=1)
    data = load_data(cfg.network.data)
    _, _, device = setup_processes(pick_device(cfg.device))
    if np.sum(data["y"] == cfg.overlap_class) < 2:
        raise ValueError("the class of --overlap-class has fewer than two images")
    if "x_heldout" not in data:
        raise ValueError("--network.data has no x_heldout.npy: we compare with real images that are held out")
    models = load_networks(train, cfg, data, device)
    E = make_score(data, device, cfg.fast)
    t = np.linspace(1 / cfg.n_times, 1, cfg.n_times)
    rng = np.random.default_rng(cfg.seed)
    def pick(part):
        rows = rng.permutation(len(data[part]))[:cfg.n]
        return get_images(data, rows, device, part)
    # Fig 1b: along trajectories, and of three kinds of images that are noised in the same way
    runs = [leave_shells(cfg, data, model, cfg.overlap_class, cfg.n, t, device) for model in models]
    paths, apart = [run["r"] for run in runs], runs[0]["apart"]
    # differs from the paper, which shows training points alone beside trajectories: these controls take no path
    kinds = dict(training=pick("x")[0], heldout=pick("x_heldout")[0], generated=runs[0]["images"])
    r = {name: r_star_of(E, noised(x, t, cfg.seed + 1), t) for name, x in kinds.items()}
    # Fig 4: from z_t back to t = 0, by the networks and by the exact score
    x, y = pick("x")
    def exact_x(z, t, y):
        return E.posterior_mean(z, t, y)
    exact_x.prediction = "x"                                 # all that solve_ode asks of a network
    found = [memorization(E, model, x, y, cfg.seed) for model in (*models, exact_x)]
    *hits, exact = [hit for hit, _ in found]
    rows = make_rows(r, paths, t, E.D, apart, hits, exact)
    for name in cfg.other_sets:
        network = NetworkConfig(data=name, model="SiT-micro/4", steps=300, ema=0.99, grid=False, device=cfg.device)
        small = load_run(train(network), device)
        runs.append(leave_shells(cfg, load_data(name), small, 0, cfg.n, t, device))   # class 0
    _, pictures = found[0]                                   # (T, 2, C, H, W)
    arrays = dict(
        t=t, training=r["training"], inference=paths[0], heldout=np.median(r["heldout"], axis=0),
        network=np.mean(hits, axis=(0, 1)), exact=exact.mean(axis=0), overlap=overlap(apart, t),
        pictures=to_uint8(pictures[np.isin(MEMO_TIMES, SHOWN)]))
    for key in ("d", "leave", "apart", "distance"):
        arrays[key] = [run[key] for run in runs]
    return rows, arrays


def plot_shells(a, path):
    """Draw Figure 1b: r_* of training points and along trajectories; sampling runs to the right."""
    fig, ax = results.new_figure(4.2)
    for name, colour, label in (("training", results.BLUE, "noisy training points"),
                                ("inference", results.ORANGE, "sampling trajectories")):
        ax.plot(a["t"], np.array(a[name]).T, color=colour, lw=0.4, alpha=0.5)
        ax.plot([], [], color=colour, label=label)
    ax.plot(a["t"], a["heldout"], "--", color=results.GREEN, label="new real images, noised (median)")
    leave = a["leave"][0]
    ax.annotate(f"half are outside at t = {leave:.2f}", (leave, 1.05), (0.8, 2.2),
                arrowprops=dict(arrowstyle="->"))
    ax.set(xlim=(1, 0), ylim=(0.9, 6), xlabel="t   (sampling runs from 1 to 0)", ylabel="$r_*$",
           title="Sampling leaves the shells that training looks at")
    ax.legend(loc="upper left")
    results.save_figure(fig, path)


def plot_memorization(a, path):
    """Draw Figure 4: noisy images and what is sampled from them; how many come back, and the overlap of the shells."""
    fig, (left, right) = results.new_figure(3.3, columns=2, width_ratios=(1.7, 1))
    columns = [np.vstack(pair) for pair in np.array(a["pictures"])]      # (2 H, W, C) each
    size = columns[0].shape[1]
    left.imshow(np.hstack(columns), cmap="gray")
    left.set_xticks(size * (np.arange(6) + 0.5), [f"t = {tj:g}" for tj in SHOWN])
    left.set_yticks([0.5 * size, 1.5 * size], ["noisy", "sampled"])
    left.set_title("Noisy images find their way back")
    right.plot(MEMO_TIMES, a["network"], "o-", color=results.BLUE, label="network")
    right.plot(MEMO_TIMES, a["exact"], color=results.GREY, label="exact score")
    right.plot(a["t"], a["overlap"], "--", color="black", label="overlap of shells")
    right.set(xlabel="t", title="fraction that comes back")
    right.legend()
    results.save_figure(fig, path)


def plot_dimensions(a, path):
    fig, ax = results.new_figure(3.4)
    ax.plot(a["d"], a["leave"], "o", color=results.ORANGE, label="half of the trajectories are outside")
    ax.plot(a["d"], a["apart"], "s", color=results.BLUE, mfc="none", label="shells come apart")
    grid = np.geomspace(50, 5000, 100)
    ax.plot(grid, law(np.median(a["distance"]), grid), color="black", label="law, for one distance")
    ax.set(xscale="log", xlabel="dimension d   (the paper's: 4,096)", ylabel="t", ylim=(0, 1),
           title="The more dimensions, the earlier sampling leaves")
    ax.legend()
    results.save_figure(fig, path)


def plot(found, folder):
    arrays = found["arrays"]
    plot_shells(arrays, folder / "fig1b.png")
    plot_memorization(arrays, folder / "fig4.png")
    plot_dimensions(arrays, folder / "fig1b_dimensions.png")


def main(cfg):
    results.run_experiment("exp_shells", cfg, measure, plot)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
