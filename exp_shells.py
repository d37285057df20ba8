"""
Figures 1b and 4: training only ever looks at thin shells around the data, and sampling leaves them at once (C1, C2).

A noisy training point z_t = alpha_t x + sigma_t eps lies at distance sigma_t |eps|, about sigma_t sqrt(d), from
alpha_t x: on a thin shell (Prop. 3.2). Equation (4) asks how far any z is from the nearest such shell:

    r_i = |z_t - alpha_t x_i| / (sigma_t sqrt d),        r_* = the r_i closest to 1 over all training points i

    python exp_shells.py               # trains the default model if need be (6 minutes), then 2 minutes, on 2 CPU cores
    python exp_shells.py --redraw --animate   # r_* along sampling, as a GIF; after the command above, seconds

What you should see. Left, Fig 1b: r_* stays at 1 for training points (blue) and climbs to 3 and more along sampling
trajectories (orange-red). The dashed line is the control that the paper leaves out: real images that no model was
trained on, noised afresh. They leave the shells at the same t, and at t = .3 are two thirds as far: leaving the shells
is what *any* image does that is not in the training set. Only what a trajectory is farther out is the model's own.
Right, Fig 4: from a noisy training image the model finds its way back to that image until t of about .6 (in the paper,
.8), roughly as long as the shells of a class do not overlap (C(t), Appendix B.2).
It needs model.py, empirical_score.py, sample.py and train.py beside it. (The animation makes it longer than 300 lines.)

Try this; the answers are in the table that is printed last.
1. python exp_shells.py --overlap-class 1       Are the shells of all classes apart until the same t? See "the closest
   shells of a class": the ones, which look most alike, touch at a much smaller t than the threes.
2. In measure, give EmpiricalScore data["x_heldout"] and data["y_heldout"], and nothing else. Of which does r_* speak,
   the network or the data set? The same network, but "C1" and "control: new real images" change their verdicts.
3. python exp_shells.py --train.data digits --train.steps 500      A shell is thin only in many dimensions; here there
   are 64. See the blue band in (a), and the control's row: real images are now within a shell's width.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "torchdiffeq==0.2.5", "matplotlib==3.11.2", "tqdm==4.70.1",
#                 "tyro==1.0.17", "mlxtend==0.25.0", "scikit-learn==1.9.1"]
# ///
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import train
from empirical_score import EmpiricalScore
from sample import NFE, check_fit, cli, load_run, noise, pick_device, replacing, sample, to_uint8
from train import Config as Training

SHOWN = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)                       # the times of Fig 4 left


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    train: Training = field(default_factory=Training)  # the model: trained by train.py, or found in out/
    model_path: str = ""  # official SiT weights or a run's folder: measure it, and train nothing
    # behind the medians of r_*, and at most as many held-out ones; from 381 up, all inside shows that 99% are
    n_points: int = 500  # training points
    n_trajectories: int = 200  # sampling trajectories
    n_lines: int = 100  # how many of each are drawn
    n_times: int = 50  # times t = 1/n_times, 2/n_times .. 1
    n_images: int = 100  # training images that are noised and denoised again
    memo_times: int = 21  # at so many times, from 0 to 1
    image: int = 0  # which of the n_images is shown
    overlap_class: int = 3  # the class whose shells are compared pair by pair
    delta: float = 0.01  # a noisy training point lies in the shell with probability 1 - delta
    batch: int = 200  # images per ODE solve; dopri5 shares its steps among them
    seed: int = 0  # of the points, the noise and the trajectories
    device: str = "auto"  # auto, cpu, cuda, mps
    redraw: bool = False  # draw the figure again from results.json, and measure nothing
    dry_run: bool = False  # check data, memory and disk, say what would run and for how long, and stop
    animate: bool = False  # also write results.gif: trajectories leaving the shells, beside their images
    out: str = ""  # folder of the results; default out/exp_shells/<preset>


PRESETS = {
    "laptop": Config(),
    "gpu": Config("gpu", train.PRESETS["gpu"], n_points=1000, n_times=100, n_images=200),
    # n_lines = 100 of each are drawn, as in the paper; more points make the intervals narrow
    "paper": Config("paper", train.PRESETS["paper"], n_points=1000, n_times=100, n_images=200, overlap_class=387),
}

# ----------------------------------------------------------------------------------------------------------------------
# The maths

def shell_width(d, delta):
    """Half-widths, in units of r, of the shell that holds a fraction 1 - delta of the noise: Prop. 3.2's, a sharp one.

    The proposition's sqrt(d log 1/delta) is larger than the radius itself. |eps| is a 1-Lipschitz function of a
    Gaussian: it lies within sqrt(2 log(2/delta)) of its mean, and the mean within 1/(2 sqrt d) of sqrt d.
    """
    paper = np.sqrt(d * np.log(1 / delta))
    sharp = np.sqrt(2 * np.log(2 / delta)) + 1 / (2 * np.sqrt(d))  # differs from the paper: its bound is vacuous
    return paper / np.sqrt(d), sharp / np.sqrt(d)


def times(first, n, *also):                                  # n times up to 1, and those that a claim speaks of
    return np.unique(np.round([*np.linspace(first, 1, n), *also], 6))


def noised(x, eps, t):                                       # z_t on the supervision region, x and eps (B, C, H, W)
    return (1 - t) * x + t * eps


def pair_log_overlaps(x):
    """-|x_i - x_j|^2 / 8 of all pairs (n (n - 1) / 2,): log C(t) of a pair is this times (alpha/sigma)^2 (B.2)."""
    return -torch.pdist(x.flatten(1).double()).square() / 8


def memorized(E, out, x, i, flips):
    """Images sampled back from noisy training images x, rows i of the data: how many ended nearest to the one they came
    from; and, where rows 2k and 2k + 1 are an image and its mirror image (flips), how many to the mirror image instead.
    out, x (B, C, H, W), i (B,) -> (int, int)"""
    (d2, nearest), back = E.nearest(out, 1), (out - x).flatten(1).cpu().double().square().sum(1)
    exact = back <= d2[:, 0].cpu() * (1 + 1e-5)              # an identical twin of x counts as x
    return int(exact.sum()), int((~exact & (nearest[:, 0].cpu() == i ^ 1)).sum()) if flips else 0


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def check(cfg):
    """What can be wrong, before anything is trained. -> the data set."""
    for name in ("n_points", "n_trajectories", "n_lines", "n_times", "n_images", "memo_times", "batch", "seed"):
        if getattr(cfg, name) < (least := 0 if name == "seed" else 2 if "times" in name else 1):
            raise ValueError(f"{name} must be at least {least}, not {getattr(cfg, name)}")
    if not 0 <= cfg.image < cfg.n_images:
        raise ValueError(f"image must be 0 to {cfg.n_images - 1}, one of the n_images, not {cfg.image}")
    if not 0 < cfg.delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {cfg.delta:g}")
    data = train.load_data(cfg.train.data)
    if (members := int((np.asarray(data["y"]) == cfg.overlap_class).sum())) < 2:
        raise ValueError(f"overlap_class {cfg.overlap_class} has {members} images: pairs of them are compared")
    torch.empty(cfg.n_times, cfg.n_trajectories, *data["x"].shape[1:])   # too many fail now, not after the training
    return data


def work(cfg):
    """What --dry-run is to foretell."""
    data = check(cfg)
    nets = [] if cfg.model_path else train.training_of(dataclasses.replace(cfg.train, device=cfg.device))
    args = dict(name=cfg.train.model, **train.sizes(data))
    if cfg.model_path:
        model, ckpt = load_run(cfg.model_path)
        check_fit(model, cfg.model_path, data["x"].shape[1:], args["num_classes"], cfg.train.data)
        args = train.args_of(model, ckpt)
    points = (2 * cfg.n_points + cfg.n_trajectories) * cfg.n_times + cfg.n_images * cfg.memo_times
    return dict(data=data, nets=nets, queries=points,
                images=[(args, NFE * (cfg.n_trajectories + cfg.n_images * (cfg.memo_times - 1)))])


def measure(cfg):
    """Everything that the figure shows, as a dict of arrays, and the claims, written to results.json."""
    data, device = check(cfg), pick_device(cfg.device)
    run = cfg.model_path or train.train(dataclasses.replace(cfg.train, device=cfg.device))
    phase = train.phases()
    model = load_run(run, device)[0]
    check_fit(model, run, data["x"].shape[1:], data["meta"]["num_classes"], cfg.train.data)
    E = EmpiricalScore(train.resident(data["x"], device), data["y"], device=device)
    rng, shape, d = np.random.default_rng(cfg.seed), E.shape, E.D

    def pick(name, n):                                       # n random images with labels, and their rows
        i = rng.choice(len(data[name]), min(n, len(data[name])), replace=False)
        return *train.images_of(data, i, device, name), torch.from_numpy(i)

    # C1, C2: r_* of training points, of held-out images noised in the same way, and along inference (Fig 1b)
    t = times(1 / cfg.n_times, cfg.n_times, 0.3)
    regions = {"training": pick("x", cfg.n_points)[0]}
    if "x_heldout" in data:
        regions["heldout"] = pick("x_heldout", cfg.n_points)[0]
    eps = {k: noise(range(len(x)), shape, cfg.seed + 1 + j).to(device) for j, (k, x) in enumerate(regions.items())}
    y = torch.arange(cfg.n_trajectories, device=device) % model.num_classes
    path, stats = [], {}
    for i in torch.arange(cfg.n_trajectories).split(cfg.batch):
        path.append(sample(model, noise(i, shape, cfg.seed).to(device), y[i.to(device)], t_grid=t[::-1].copy(),
                           progress=True, stats=stats))
    path = torch.cat(path, dim=1).flip(0)                    # (T, n, C, H, W), t ascending as in t
    r = {k: [] for k in (*regions, "inference")}
    for j, tj in enumerate(tqdm(t, desc="r_*", disable=None, leave=False)):
        for k, x in regions.items():
            r[k].append(E.r_star(noised(x, eps[k], tj), tj)[0].cpu())
        r["inference"].append(E.r_star(path[j], tj)[0].cpu())
    r = {k: torch.stack(v, dim=1).double().numpy() for k, v in r.items()}           # (n, T)
    phase("r_* of points and trajectories")

    # Fig 4: from z_t back to t = 0; does the nearest training image equal the one we came from?
    x, labels, rows = pick("x", cfg.n_images)
    e = noise(range(len(x)), shape, cfg.seed + 9).to(device)
    t_memo = times(0, cfg.memo_times, 0.5, 0.75)
    hits, flipped, shown = [], [], {}
    for tj in tqdm(t_memo, desc="denoising", disable=None, leave=False):
        z = noised(x, e, tj)
        out = z if tj == 0 else torch.cat([sample(model, zb, yb, t_grid=[tj, 0.0])[-1] for zb, yb in
                                           zip(z.split(cfg.batch), labels.split(cfg.batch), strict=True)])
        exact, mirror = memorized(E, out, x, rows, "flips" in data["meta"])
        hits.append(exact); flipped.append(mirror)           # differs from the paper, which does not tell the two apart
        if tj > 0 and (np.isclose(tj, SHOWN).any() or cfg.memo_times < 21):
            shown[f"{tj:.3g}"] = torch.stack([z[cfg.image % len(x)], out[cfg.image % len(x)]])
    phase("memorization ratio")

    # B.2: how far the shells of one class overlap; the worst pair, and quantiles over all its pairs
    overlap = E.log_overlap(t, cfg.overlap_class)
    members = torch.from_numpy(data["x"][E.members[cfg.overlap_class].numpy()])
    pairs = np.quantile(pair_log_overlaps(members).numpy(), [0.5, 0.99])
    phase("overlap of the shells")

    at = lambda v: int(np.abs(t - v).argmin())               # index of the time closest to v
    widths = shell_width(d, cfg.delta)
    low, high = train.wilson(np.array(hits), len(x))
    off = lambda v: np.abs(np.median(v, axis=0) - 1).max()   # the median of r_* at the worst t
    apart = overlap.distance / (overlap.distance + np.sqrt(8 * np.log(100)))        # where C(t) = .01, solved for t
    inside = (np.abs(r["training"] - 1) < widths[1]).sum(0).min()                   # in a sharp shell, at the worst t
    claims = [
        train.claim("C1 training points lie on a shell: worst |median r_* - 1| is below .01", "0",
                    off(r["training"]), train.bootstrap(r["training"], off), high=0.01),
        train.claim(f"C1 training points in a sharp shell: fraction at the worst t, >= {1 - cfg.delta:g}", "1",
                    inside / (n := len(r["training"])), train.wilson(inside, n), low=1 - cfg.delta),
        train.claim("C2 sampling leaves the shells: median r_* at t = .3 is above 1.3", "> 1",
                    np.median(r["inference"][:, at(0.3)]), train.bootstrap(r["inference"][:, at(0.3)]), low=1.3),
        *[train.claim(f"Fig 4 memorization ratio at t = {tj:.3g} is at least .9", "1.0", hits[k] / len(x),
                      (low[k], high[k]), low=0.9) for k, tj in enumerate(t_memo) if tj in (0.5, 0.75)],
        train.claim("Fig 4 the closest shells of a class are apart (C < .01) until t = .8", ".8",
                    apart, (apart, apart), low=0.8),
    ]
    if "heldout" in r:                                       # what r_* = 1 would have to mean, if it marked real images
        held = r["heldout"][:, at(0.3)]
        claims.append(train.claim(
            f"control: new real images stay in the shells: r_* at t = .3, < {1 + widths[1]:.2f}", "not shown",
            np.median(held), train.bootstrap(held), high=1 + widths[1]))
        made = r["inference"][:, at(0.3)]
        claims.append(train.claim("control: trajectories are farther out than new images, at t = .3 by",
                                  "not shown", np.median(made) - np.median(held),
                                  train.bootstrap(made, minus=held), low=0.0))
    arrays = dict(
        t=t, lines={k: r[k][:cfg.n_lines] for k in ("training", "inference")},
        median={k: np.median(v, axis=0) for k, v in r.items()},
        n={k: len(v) for k, v in r.items()}, nfe=stats["nfe"], widths=widths, t_memo=t_memo,
        memorized=np.array(hits) / len(x), memorized_low=low, memorized_high=high, n_images=len(x),
        images={k: to_uint8(v) for k, v in shown.items()}, image=to_uint8(x[cfg.image % len(x)]),
        log_overlap={"closest pair": overlap.log_c, "1% closest pairs": ((1 - t) / t)**2 * pairs[1],
                     "median pair": ((1 - t) / t)**2 * pairs[0]},
        overlap_class=cfg.overlap_class, duplicates=overlap.duplicates, d=d, N=E.N)
    if "flips" in data["meta"]: arrays["flipped"] = np.array(flipped) / len(x)
    train.save_results("exp_shells", cfg, device, phase.started, arrays, claims)


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

BLUE, RED, GREY = "#0072B2", "#D55E00", "#555555"            # supervision, extrapolation: the same in every figure


def mosaic(image, pictures):
    """x and two rows {t: (noisy, sampled)}, images (H, W, C), as one picture; -> it, and the places of its ticks."""
    rgb = lambda im: np.broadcast_to(np.array(im, np.uint8)[..., :3], (*np.shape(im)[:2], 3))
    rows = [[rgb(image)] + [rgb(p[k]) for p in pictures.values()] for k in (0, 1)]
    H, W, _ = rows[0][0].shape
    step = W + max(1, W // 10)
    canvas = np.full((2 * step, step * len(rows[0]), 3), 255, np.uint8)
    for k, row in enumerate(rows):
        for j, im in enumerate(row):
            if (k, j) != (1, 0):                             # x stands in the first row alone
                canvas[k * step:k * step + H, j * step:j * step + W] = im
    return canvas, np.arange(len(rows[0])) * step + W / 2, np.array([H / 2, step + H / 2])


def caption(results):
    """What the figure says, in words and numbers that follow from the claims."""
    a, model = results["arrays"], results["config"]["train"]
    name, (out,) = Path(results["config"].get("model_path", "")).name or model["model"], train.starting(results, "C2")
    lines = [f"{name} on {a['N']:,} images of {model['data']}, d = {a['d']}. At t = .3 the median of $r_*$ is "
             f"{out['ours']:.2f} along sampling trajectories (paper: above 1)."]
    if controls := train.starting(results, "control"):
        stay, more = controls
        lines += [f"Control: new real images, noised afresh, are at {stay['ours']:.2f} [{stay['ci95'][0]:.2f}, "
                  f"{stay['ci95'][1]:.2f}], trajectories {more['ours']:+.2f} from that [{more['ci95'][0]:+.2f}, "
                  f"{more['ci95'][1]:+.2f}] (brackets: 95%).",
                  {"contradicted": f"So {100 * (stay['ours'] - 1) / (out['ours'] - 1):.0f}% of the way out of the "
                                   "shells at that t is what any image goes that is not in the training set, real or "
                                   "generated.",
                   "holds": "New real images stay in the shells" + (
                       ": r_* tells generated images from real ones." if more["verdict"] == "holds" else "."),
                   "not resolved": "Whether new real images stay in the shells is not resolved."}[stay["verdict"]]]
    return "\n".join(lines)


def plot(path):
    """results.json -> results.png beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = json.loads(Path(path).read_text())
    a = results["arrays"]
    t, t_memo = np.array(a["t"]), np.array(a["t_memo"])
    fig = plt.figure(figsize=(10, 7.2))
    grid = fig.add_gridspec(3, 2, height_ratios=(1.35, 1.7, 1.4), hspace=0.42, wspace=0.2,
                            left=0.06, right=0.985, top=0.95, bottom=0.185)

    ax = fig.add_subplot(grid[:, 0])
    ax.set_title("(a) distance to the nearest shell (Fig. 1b)", fontsize=11)
    paper, sharp = a["widths"]
    ax.axhspan(1 - paper, 1 + paper, color=GREY, alpha=0.08, lw=0, label="a shell as wide as Prop. 3.2 says")
    ax.axhspan(1 - sharp, 1 + sharp, color=BLUE, alpha=0.25, lw=0, label="a shell's width, sharp")
    for k, colour, label in (("inference", RED, "sampling trajectories"), ("training", BLUE, "noisy training points")):
        ax.plot(t, np.array(a["lines"][k]).T, color=colour, lw=0.4, alpha=0.35)
        ax.plot([], [], color=colour, lw=2, label=label)
    if "heldout" in a["median"]:
        ax.plot(t, a["median"]["heldout"], "--", color="black", lw=1.8, label="new real images, noised (median)")
    ax.set(xlim=(0, 1), ylim=(0.5, 5), xlabel="t  (0 = data, 1 = noise; sampling runs to the left)")
    ax.set_ylabel("$r_*$, distance in radii of the nearest shell", labelpad=1)
    ax.legend(loc="upper right", fontsize=9, framealpha=1)

    ax = fig.add_subplot(grid[0, 1])
    ax.set_title("(b) an image, noised and sampled back (Fig. 4 left)", fontsize=11)
    canvas, columns, rows = mosaic(a["image"], a["images"])
    ax.imshow(canvas, aspect="equal")
    ax.set_xticks(columns, ["x", *(f"t = {tj}" for tj in a["images"])], fontsize=8.5)
    ax.set_yticks(rows, ["$z_t$", "sampled"], fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)

    ax = fig.add_subplot(grid[1, 1])
    ax.set_title("(c) sampled back: is it the same image? (Fig. 4 right)", fontsize=11)
    ax.fill_between(t_memo, a["memorized_low"], a["memorized_high"], color=BLUE, alpha=0.25, lw=0)
    ax.plot(t_memo, a["memorized"], "o-", ms=3.5, color=BLUE,
            label=f"memorization ratio\n(of {a['n_images']}, band: 95%)")
    if "flipped" in a: ax.plot(t_memo, a["flipped"], "s:", ms=3.5, color=BLUE, label="its mirror image instead")
    ax.plot(t, np.exp(a["log_overlap"]["closest pair"]), color=GREY,
            label=f"overlap C(t) of the two\nclosest shells, class {a['overlap_class']}")
    ax.set(ylim=(-0.03, 1.05), xlim=(0, 1), ylabel="ratio, C(t)")
    ax.tick_params(labelbottom=False, labelsize=9)
    ax.legend(loc="center left", fontsize=9)
    below = fig.add_subplot(grid[2, 1], sharex=ax)
    for (name, line), style in zip(a["log_overlap"].items(), ("-", "--", ":"), strict=True):
        below.plot(t, np.array(line) / np.log(10), style, color=GREY, label=name)
    below.axhline(-2, color="black", lw=0.6)
    below.text(0.01, -1.9, "C = .01", fontsize=9, va="bottom")
    below.set(ylim=(-15, 0.5), xlabel="t", ylabel="$\\log_{10}$ C(t)")
    below.tick_params(labelsize=9)
    below.legend(loc="lower right", fontsize=9, handlelength=1.6, title_fontsize=9,
                 title=f"{a['duplicates']} identical pairs left out" if a["duplicates"] else None)

    fig.text(0.02, 0.02, caption(results), fontsize=9, linespacing=1.4)
    with replacing(Path(path).with_suffix(".png")) as f:
        fig.savefig(f, dpi=105)
    plt.close(fig)


def animate(cfg, shown=5, farthest=4.2):
    """results.gif: r_* as the distance from the middle, at angles that mean nothing, so that the nearest shell of every
    point is the same ring. r_* is that of results.json; of the images, a few are sampled again."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib needs it, too
    path = train.results_path("exp_shells", cfg)
    a, device = json.loads(path.read_text())["arrays"], pick_device(cfg.device)
    t, data = np.array(a["t"]), train.load_data(cfg.train.data)["x"]
    model = load_run(cfg.model_path or train.run_folder(cfg.train), device)[0]
    x, z1 = torch.from_numpy(data[::-(-len(data) // shown)].copy()), noise(range(shown), data.shape[1:], cfg.seed)
    sampled = sample(model, z1.to(device), torch.arange(shown, device=device) % model.num_classes,
                     t_grid=t[::-1].copy(), progress=True).flip(0).cpu()                         # (T, shown, C, H, W)
    fig, frames = plt.figure(figsize=(8.2, 4.2), dpi=76), []
    ax, *rows = (fig.add_axes(box) for box in ((0, 0.06, 0.5, 0.86), (0.53, 0.53, 0.46, 0.25), (0.53, 0.1, 0.46, 0.25)))
    for x0, y0, colour, text in ((0.25, 0.94, "black", "distance, in radii of the nearest shell: $r_*$"),
                                 (0.76, 0.8, BLUE, "noisy training points: what training sees"),
                                 (0.76, 0.37, RED, "sampling: what the model makes up"),
                                 (0.25, 0.02, "black", "dashed: new real images, noised (median)")):
        fig.text(x0, y0, text, color=colour, ha="center", fontsize=11)
    clock = fig.text(0.76, 0.94, "", ha="center", fontsize=12)
    at = {int(np.abs(t - u**1.5).argmin()): None for u in np.linspace(1, 0, 32)}               # slower towards t = 0
    for i in tqdm(at, desc="animation", disable=None, leave=False):
        ax.clear()
        ax.set(xlim=(-4.4, 4.4), ylim=(-4.4, 4.4), aspect="equal")
        ax.axis("off")
        ax.add_patch(plt.Circle((0, 0), 1, fill=False, color=BLUE, alpha=0.25, lw=9))
        for radius, text in ((2, "2"), (3, "3"), (farthest, "beyond")):
            ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="0.85", lw=0.8, zorder=0))
            ax.text(0, radius, text, fontsize=9, color=GREY, ha="center", va="center", backgroundcolor="white")
        for k, colour in (("training", BLUE), ("inference", RED)):
            r = np.array(a["lines"][k])[:, i].clip(max=farthest)
            angle = 2.4 * np.arange(len(r))                  # the golden angle spreads them
            ax.plot(r * np.cos(angle), r * np.sin(angle), ".", ms=6, color=colour)
        ax.text(0, 0, "$r_* = 1$", fontsize=10, color=BLUE, ha="center", va="center")
        if "heldout" in a["median"]:
            real = min(a["median"]["heldout"][i], farthest)
            ax.add_patch(plt.Circle((0, 0), real, fill=False, color="black", ls="--", lw=1.2))
        for row, images in zip(rows, (noised(x, z1[:len(x)], t[i]), sampled[i]), strict=True):
            row.clear()                                      # (shown, H, W, 1 or 3), side by side
            row.imshow(np.concatenate([*to_uint8(images)[..., :3].numpy()], 1), cmap="gray", vmin=0, vmax=255)
            row.axis("off")
        clock.set_text(f"t = {t[i]:.2f}")
        fig.canvas.draw()
        picture = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3])
        frames.append(picture.quantize(palette=frames[0], dither=0) if frames else picture.quantize(24, method=1))
    plt.close(fig)
    tmp, wait = path.with_suffix(".tmp.gif"), [1000] + [90] * (len(frames) - 2) + [3000]         # milliseconds
    frames[0].save(tmp, save_all=True, append_images=frames[1:], duration=wait, loop=0)
    print(tmp.replace(path.with_suffix(".gif")), flush=True)


if __name__ == "__main__":
    cli(lambda cfg: train.experiment("exp_shells", cfg, measure, plot, work, animate if cfg.animate else None), PRESETS)
