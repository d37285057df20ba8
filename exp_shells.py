"""
Figures 1b and 4: training only ever looks at thin shells around the data, and sampling leaves them: when (C1, C2)?

A noisy training point z_t = alpha_t x + sigma_t eps lies at distance sigma_t |eps|, about sigma_t sqrt(d), from
alpha_t x: on a thin shell (Prop. 3.2). Equation (4) asks how far any z is from the nearest such shell:

    r_i = |z_t - alpha_t x_i| / (sigma_t sqrt d),        r_* = the r_i closest to 1 over all training points i

    python exp_shells.py               # trains the default model if need be (6 minutes), then 2 minutes, on 2 CPU cores
    python exp_shells.py --redraw --animate   # r_* along sampling, as a GIF; after the command above, seconds

What you should see. Left, Fig 1b: r_* stays at 1 for training points (blue) and climbs to 3 and more along sampling
trajectories (orange-red). The paper says that they leave the shells "early"; here, half of sampling is over by then
(vertical line). Black, two controls that the paper leaves out, noised afresh as training points are: new real images
(dashed) leave too, a little later, and the images that the trajectories lead to (dotted) at the same t as these.
So *any* image that is not in the training set is outside, and it takes no path to get there. It shows that the shells
are a small region (C1), and that what this model makes is farther from the training set than new real images are.
Right, Fig 4: from a noisy training image the model finds its way back to that image until t of about .6 (in the paper,
.8), roughly as long as the shells of a class do not overlap (C(t), Appendix B.2).
All this is of one trained network: the intervals are over points and trajectories, not over training seeds.
It needs model.py, empirical_score.py, sample.py and train.py beside it. (The animation makes it longer than 300 lines.)

Try this; the answers are in the table that is printed last.
1. python exp_shells.py --overlap-class 1       Are the shells of all classes apart until the same t? See "the closest
   shells of a class": the ones, which look most alike, touch at a much smaller t than the threes.
2. In measure, give EmpiricalScore data["x_heldout"] and data["y_heldout"], and nothing else. Of which does r_* speak,
   the network or the data set? The same network, but both "C1" change their verdicts.
3. python exp_shells.py --train.data digits --train.steps 500      A shell is thin only in many dimensions; here there
   are 64. See the blue band in (a), and "C2 mostly": it takes a trajectory about twice as long to leave it.
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
    "laptop": Config(),  # differs from the paper: digits and a small network, half its times and images: minutes
    "gpu": Config("gpu", train.PRESETS["gpu"], n_points=1000, n_times=100, n_images=200),
    # differs from the paper: 100 of each are drawn, as there, but more points measured, to make the intervals narrow
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


def leaving(r, t, width):
    """The t at which the median of r_* (n, T), at ascending times t (T,), leaves the shells: sampling runs from 1 to 0,
    and r_* rises on the way. Between two times it is read off a straight line; 0 where it never leaves."""
    return np.interp(-1 - width, -np.median(r, axis=0), t, left=0.0)


def times(first, n, *also):                                  # n times up to 1, and those that a claim speaks of
    return np.unique(np.round([*np.linspace(first, 1, n), *also], 6))


def noised(x, eps, t):                                       # z_t on the supervision region, x and eps (B, C, H, W)
    return (1 - t) * x + t * eps


def pair_log_overlaps(x):
    """-|x_i - x_j|^2 / 8 of all pairs (n (n - 1) / 2,): log C(t) of a pair is this times (alpha/sigma)^2 (B.2).
    differs from the paper: B.2 has the covariance sigma I where z_t has sigma^2 I, a slip that its C(t) does not share.
    """
    return -torch.pdist(x.flatten(1).double()).square() / 8


def memorized(E, out, x, i, flips):
    """Images sampled back from noisy training images x, rows i of the data: how many ended nearest to the one they came
    from; and, where rows 2k and 2k + 1 are an image and its mirror image (flips), how many to the mirror image instead.
    By plain l2, which C.4 defines, not "calibrated l2", which it cites. out, x (B, C, H, W), i (B,) -> (int, int)"""
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
    points = 2 * (cfg.n_points + cfg.n_trajectories) * cfg.n_times + cfg.n_images * cfg.memo_times
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

    # C1, C2: r_* along inference, and of three kinds of images that are noised in the same way (Fig 1b)
    t = times(1 / cfg.n_times, cfg.n_times, 0.1)
    y = torch.arange(cfg.n_trajectories, device=device) % model.num_classes
    path, stats = [], {}
    for i in torch.arange(cfg.n_trajectories).split(cfg.batch):
        path.append(sample(model, noise(i, shape, cfg.seed).to(device), y[i.to(device)], t_grid=[*t[::-1], 0.0],
                           progress=True, stats=stats))
    made, *path = torch.cat(path, dim=1).flip(0)             # (n, C, H, W) each: images, then t ascending as in t
    # differs from the paper, which has training points and trajectories alone: these differ in the image they lead to,
    # and in how. Held-out images and those at the trajectories' ends, noised as training points are, differ in it alone
    regions = {"training": pick("x", cfg.n_points)[0]}
    if "x_heldout" in data:
        regions["heldout"] = pick("x_heldout", cfg.n_points)[0]
    regions["generated"] = made
    eps = {k: noise(range(len(x)), shape, cfg.seed + 1 + j).to(device) for j, (k, x) in enumerate(regions.items())}
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

    # B.2: how far the shells of one class overlap. differs from the paper: identical pairs, each of which would make
    # C(t) = 1, are left out, and quantiles over all pairs stand beside the worst, as one pair says little of a class
    overlap = E.log_overlap(t, cfg.overlap_class)
    members = torch.from_numpy(data["x"][E.members[cfg.overlap_class].numpy()])
    pairs = np.quantile(pair_log_overlaps(members).numpy(), [0.5, 0.99])
    phase("overlap of the shells")

    at = lambda v: int(np.abs(t - v).argmin())               # index of the time closest to v
    widths = shell_width(d, cfg.delta)
    low, high = train.wilson(np.array(hits), len(x))
    apart = overlap.distance / (overlap.distance + np.sqrt(8 * np.log(100)))        # where C(t) = .01, solved for t
    outside = {k: np.abs(v - 1) > widths[1] for k, v in r.items()}                  # of all sharp shells, (n, T)
    leave = lambda v: leaving(v, t, widths[1])
    share = lambda text, paper, v, **bound: train.claim(text, paper, v.mean(), train.wilson(v.sum(), len(v)), **bound)
    earlier = lambda text, k, **bound: train.claim(text, "not shown", leave(r["inference"]) - leave(r[k]),
                                                   train.bootstrap(r["inference"], leave, minus=r[k]), **bound)
    claims = [
        # checks the arithmetic: Prop. 3.2 holds for any data and network, r_* is no farther from 1 than |eps|/sqrt d
        share(f"C1 training points lie in a sharp shell: fraction at the worst t, >= {1 - cfg.delta:g}", "1",
              ~outside["training"][:, outside["training"].sum(0).argmax()], low=1 - cfg.delta),
        share("C2 sampling leaves the shells: fraction outside at t = .1, > .9", "1",
              outside["inference"][:, at(0.1)], low=0.9),
        # the paper says "early", "after just a few denoising steps", too, without a t: "mostly" asks for less
        train.claim("C2 mostly outside of them: the median trajectory leaves at t, > .5", "mostly",
                    leave(r["inference"]), train.bootstrap(r["inference"], leave), low=0.5),
        *[train.claim(f"Fig 4 memorization ratio at t = {tj:.3g} is at least .9", "1.0", hits[k] / len(x),
                      (low[k], high[k]), low=0.9) for k, tj in enumerate(t_memo) if tj in (0.5, 0.75)],
        train.claim("Fig 4 the closest shells of a class are apart (C < .01) until t = .8", ".8",
                    apart, (apart, apart), low=0.8),
        earlier("control: trajectories leave where their own images, noised, do: +-.02", "generated", low=-0.02,
                high=0.02)]                                  # a step from one t to the next; new images are farther off
    if "heldout" in r:                                       # C1's content, which can fail: is there space outside?
        claims.insert(1, share("C1 a restricted region: fraction of new images outside at t = .1, > .9", "restricted",
                               outside["heldout"][:, at(0.1)], low=0.9))
        claims.append(earlier("control: trajectories leave before new real images, noised: by > 0", "heldout", low=0.0))
    arrays = dict(
        t=t, lines={k: r[k][:cfg.n_lines] for k in ("training", "inference")},
        median={k: np.median(v, axis=0) for k, v in r.items()}, leaves={k: leave(v) for k, v in r.items()},
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
    name = Path(results["config"].get("model_path", "")).name or model["model"]
    (out,), (path,) = (train.starting(results, k) for k in ("C2 mostly", "control: trajectories leave where"))
    at = {k: f"t = {v:.2f}" for k, v in a["leaves"].items()}
    return (f"{name} on {a['N']:,} images of {model['data']}, d = {a['d']}. The median trajectory leaves the shells at "
            f"{at['inference']} [{out['ci95'][0]:.2f}, {out['ci95'][1]:.2f}] (95%);\nnoised afresh, generated images "
            f"leave at {at['generated']}{', new real images at ' + at['heldout'] if 'heldout' in at else ''}.\n" + {
             "holds": "So any image that is not in the training set leaves; the path to it does not matter.",
             "contradicted": "So it is not only where a path leads to that matters, but the path, too.",
             "not resolved": "Whether the path to an image matters, beside the image, is not resolved."}[
                 path["verdict"]])


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

    whole, zoom = grid[:, 0].subgridspec(2, 1, hspace=0.06, height_ratios=(1, 1.25)).subplots(sharex=True)
    whole.set_title("(a) distance to the nearest shell (Fig. 1b)", fontsize=11)
    paper, sharp = a["widths"]
    whole.axhspan(1 - paper, 1 + paper, color=GREY, alpha=0.08, lw=0, label="a shell as wide as Prop. 3.2 says")
    for ax in (whole, zoom):
        ax.axhspan(1 - sharp, 1 + sharp, color=BLUE, alpha=0.25, lw=0, label="a shell's width, sharp")
        for k, colour, style, label in (("inference", RED, "-", "sampling trajectories"),
                                        ("training", BLUE, "-", "noisy training points"),
                                        ("generated", "black", ":", "generated images, noised (median)"),
                                        ("heldout", "black", "--", "new real images, noised (median)")):
            if k in a["lines"]: ax.plot(t, np.array(a["lines"][k]).T, color=colour, lw=0.4, alpha=0.35)
            if k in a["median"]: ax.plot(t, a["median"][k], style, color=colour, lw=1.8, label=label)
        ax.axvline(a["leaves"]["inference"], color=RED, lw=1)
    whole.set(xlim=(0, 1), ylim=(0.5, 5), ylabel="distance $r_*$, in radii")
    whole.legend(loc="upper right", fontsize=9, framealpha=1)
    zoom.set(ylim=(1 - 1.2 * sharp, 1 + 3 * sharp), xlabel="t  (0 = data, 1 = noise; sampling runs to the left)",
             ylabel="the same, enlarged")
    zoom.annotate(f"the median trajectory\nleaves at t = {a['leaves']['inference']:.2f}",
                  (a["leaves"]["inference"], 1 + sharp), (0.6, 1 + 1.9 * sharp), color=RED, fontsize=9,
                  arrowprops=dict(arrowstyle="->", color=RED))

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
        fig.savefig(f, dpi=98)
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
