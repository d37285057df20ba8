"""
Figure 2: the paradox of classifier-free guidance, with the two curves that the paper leaves out.

Guidance adds (w - 1)(s_theta^c - s_theta^0), the gap between conditional and unconditional score, at every step of
sampling (s^0: without a label). It works because that gap is large. Yet the network was trained towards two *empirical*
scores, with labels and without, and those hardly differ where training looks: next to a training image, the conditional
and the unconditional softmax have collapsed on that same image. Where does the learned gap come from (Example 3.1)?

    python exp_cfg_paradox.py           # trains the default model if need be (6 minutes), then a minute, on 2 CPU cores

What you should see. The paper compares the empirical gap on noisy training points (blue, solid: zero until t of about
.6) with the learned gap along sampling trajectories (orange-red, dashed: large at every t), and concludes that the gap
is made where the network extrapolates. These are two changes at once. The full square {empirical, learned} x
{supervision, extrapolation} tells them apart: the *learned* gap is large on the training points too (blue, dashed), and
the *empirical* one is large on some trajectories (orange-red, dotted), whose nearest image has another label. There is
a paradox only where a gap is larger than the network's error (blue, dotted). It is not: each of the two scores is off
by several times that much, in the shells too. The second panel shows why the empirical gap vanishes: one training point
has all the weight of the softmax, with the label or without it.
All this is of one trained network: the intervals are over points and trajectories, not over training seeds.

Try this; the answers are in the table that is printed last, or in the figure.
1. python exp_cfg_paradox.py --w 4          Does guidance lead to where there is more to guide? See the learned gap on
   trajectories over the error, which falls, and that on training points over that on trajectories, which rises.
   Guidance uses up what it feeds on.
2. In measure, take the images of i with train.images_of(data, i % 500, device, "x_heldout"). Is it the shells
   that make the empirical gap vanish? See the first row, which holds for images that nobody trained on, too: at small
   t the softmax collapses on one image wherever it is asked.
3. python exp_cfg_paradox.py --redraw       As t grows, where does a second image get a say first, on training points or
   on trajectories? See (b): orange-red leaves 1 at a smaller t than blue.
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
from empirical_score import EmpiricalScore, velocity_from_x
from sample import NFE, check_fit, cli, load_run, noise, pick_device, replacing, sample, velocity
from train import Config as Training


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    train: Training = field(default_factory=Training)  # the model: trained by train.py, or found in out/
    model_path: str = ""  # official SiT weights or a run's folder: measure it, and train nothing
    n: int = 200  # points, and trajectories, at each time
    n_times: int = 50  # times t = 1/n_times, 2/n_times .. 1
    w: float = 1.0  # guidance of the trajectories (C.2 does not say); 1 is none, 4 is usual
    batch: int = 200  # images per ODE solve; dopri5 shares its steps among them
    seed: int = 0  # of the points, the noise and the trajectories
    device: str = "auto"  # auto, cpu, cuda, mps
    redraw: bool = False  # draw the figure again from results.json, and measure nothing
    dry_run: bool = False  # check data, memory and disk, say what would run and for how long, and stop
    out: str = ""  # folder of the results; default out/exp_cfg_paradox/<preset>


PRESETS = {
    "laptop": Config(),  # differs from the paper: digits and a small network, half as many times: minutes
    "gpu": Config("gpu", train.PRESETS["gpu"], n_times=100),
    "paper": Config("paper", train.PRESETS["paper"], n_times=100),
}

# ----------------------------------------------------------------------------------------------------------------------
# The maths: |s^c - s^0| for the empirical and for the learned score

def norm(a):                                                 # (B, C, H, W) -> (B,)
    return a.flatten(1).cpu().double().norm(dim=1)


def empirical_gap(E, z, t, y):
    """|s_*^c - s_*^0| (B,), Eq. (2): alpha/sigma^2 |x_*^c - x_*^0|, the difference taken before anything is divided;
    x_*^c (B, C, H, W), and the effective numbers of points of the two softmaxes, (B,) each."""
    z = z.cpu().double()                                     # float64 out: the collapsed softmaxes differ by 1e-10
    (x_c, n_c), (x_0, n_0) = E.mean_and_size(z, t, y), E.mean_and_size(z, t)
    return (1 - t) / t**2 * norm(x_c - x_0), x_c, n_c, n_0


@torch.no_grad()
def learned_gap(model, z, t, y, x_c):
    """|s_theta^c - s_theta^0| and, given x_*^c, the error |s_theta^c - s_*^c|, (B,) each: s = -((1 - t) v + z)/t, so
    that they are (1 - t)/t times those of v, finite at t = 1."""
    v = velocity(model, z, t, y)
    others = velocity(model, z, t, None), velocity_from_x(x_c.to(z), z, t)
    return [(1 - t) / t * norm(v - other) for other in others]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def check(cfg):
    """What can be wrong, before anything is trained. -> the data set."""
    for name in ("n", "n_times", "batch", "seed"):
        if getattr(cfg, name) < (least := 0 if name == "seed" else 2 if name == "n_times" else 1):
            raise ValueError(f"{name} must be at least {least}, not {getattr(cfg, name)}")
    data = train.load_data(cfg.train.data)
    torch.empty(cfg.n_times, cfg.n, *data["x"].shape[1:])    # too many fail now, not after the training
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
    return dict(data=data, nets=nets, queries=4 * cfg.n * cfg.n_times,
                images=[(args, cfg.n * (NFE + 4 * cfg.n_times))])


def measure(cfg):
    """The four gaps and the effective numbers of points, each (n, T), and the claims, written to results.json."""
    data, device = check(cfg), pick_device(cfg.device)
    run = cfg.model_path or train.train(dataclasses.replace(cfg.train, device=cfg.device))
    phase = train.phases()
    model = load_run(run, device)[0]
    check_fit(model, run, data["x"].shape[1:], data["meta"]["num_classes"], cfg.train.data)
    E = EmpiricalScore(train.resident(data["x"], device), data["y"], device=device)
    t = np.linspace(1 / cfg.n_times, 1, cfg.n_times)

    i = np.random.default_rng(cfg.seed).choice(E.N, min(cfg.n, E.N), replace=False)
    x, y = train.images_of(data, i, device)
    labels = {"supervision": y, "extrapolation": torch.arange(cfg.n, device=device) % model.num_classes}
    eps = noise(range(len(x)), E.shape, cfg.seed + 1).to(device)         # C.2 does not say: the same points at all t
    path, stats = [], {}
    for i in torch.arange(cfg.n).split(cfg.batch):
        path.append(sample(model, noise(i, E.shape, cfg.seed).to(device), labels["extrapolation"][i.to(device)],
                           t_grid=t[::-1].copy(), w=cfg.w, progress=True, stats=stats))
    path = torch.cat(path, dim=1).flip(0)                    # (T, n, C, H, W), t ascending as in t
    phase("sampling")

    # differs from the paper, which has "empirical, supervision" and "learned, extrapolation" alone: two changes at once
    names = [f"{what}, {where}" for what in ("empirical", "learned", "error") for where in labels]
    gap = {k: [] for k in names}
    weight = {f"{what}, {where}": [] for what in ("conditional", "unconditional") for where in labels}
    for j, tj in enumerate(tqdm(t, desc="gaps", disable=None, leave=False)):
        for where, z in (("supervision", (1 - tj) * x + tj * eps), ("extrapolation", path[j])):
            empirical, x_c, n_c, n_0 = empirical_gap(E, z, tj, labels[where])
            parts = zip(*(a.split(cfg.batch) for a in (z, labels[where], x_c)), strict=True)
            learned, error = zip(*(learned_gap(model, zb, tj, yb, xb) for zb, yb, xb in parts), strict=True)
            sizes = empirical, torch.cat(learned), torch.cat(error)
            for what, size in zip(("empirical", "learned", "error"), sizes, strict=True):
                gap[f"{what}, {where}"].append(size)
            weight[f"conditional, {where}"].append(n_c)
            weight[f"unconditional, {where}"].append(n_0)
    gap, weight = ({k: torch.stack(v, dim=1).numpy() for k, v in d.items()} for d in (gap, weight))      # (n, T)
    phase("gaps")

    early = t <= 0.5 + 1e-9                                  # where the paper's curves differ most plainly
    largest = lambda v: np.median(v, axis=0).max()           # of the medians over the points, at the worst t
    pair = lambda a, b: np.stack([gap[k][:len(x), early] for k in (a, b)], axis=1)               # (n, 2, T)
    ratio = lambda v: np.median(np.median(v[:, 0], axis=0) / np.median(v[:, 1], axis=0))         # over t, of medians
    both = pair("learned, supervision", "learned, extrapolation")
    row = lambda text, paper, f, v, **bound: train.claim(text, paper, f(v), train.bootstrap(v, f), **bound)
    claims = [
        row("Fig 2 empirical gap on training points, largest median at t <= .5: < .001", "0", largest,
            gap["empirical, supervision"][:, early], high=1e-3),
        # two scores that are each wrong by so much may differ by as much: only a gap beyond that is a paradox
        row("Fig 2 learned gap on trajectories over error on training points: > 1", "meaningful", ratio,
            pair("learned, extrapolation", "error, supervision"), low=1.0),
        row("control: learned gap, training points over trajectories, t <= .5: < .5", "not shown", ratio, both,
            high=0.5),                                       # were most of it made by extrapolation, it would be
        row("control: learned gap is larger on trajectories: the same ratio < 1", "not shown", ratio, both, high=1.0),
        row("why: effective number of training points, unconditional, t <= .5: < 1.01", "1", largest,
            weight["unconditional, supervision"][:, early], high=1.01),
    ]
    summary = lambda d: {k: np.quantile(v, [0.1, 0.5, 0.9], axis=0) for k, v in d.items()}
    arrays = dict(t=t, gap=summary(gap), effective_size=summary(weight), nfe=stats["nfe"], n=cfg.n, N=E.N, d=E.D,
                  w=cfg.w, beyond=(gap["empirical, extrapolation"] > gap["learned, extrapolation"])[:, early].mean())
    train.save_results("exp_cfg_paradox", cfg, device, phase.started, arrays, claims)


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

BLUE, RED = "#0072B2", "#D55E00"                             # supervision, extrapolation: the same in every figure
FLOOR = 1e-4                                                 # of the logarithmic axis: what is smaller is drawn there


def plot(path):
    """results.json -> results.png beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = json.loads(Path(path).read_text())
    a, model = results["arrays"], results["config"]["train"]
    name = Path(results["config"].get("model_path", "")).name or model["model"]
    t = np.array(a["t"])
    fig, axes = plt.subplots(1, 2, figsize=(10, 6), width_ratios=(1.35, 1))
    fig.subplots_adjust(left=0.078, right=0.985, top=0.83, bottom=0.265, wspace=0.21)
    places = {"supervision": (BLUE, "noisy training points"), "extrapolation": (RED, "sampling trajectories")}

    def curve(ax, quantiles, colour, style, band=True, **more):
        low, median, high = np.maximum(np.array(quantiles), FLOOR)
        if band: ax.fill_between(t, low, high, color=colour, alpha=0.17, lw=0)
        ax.plot(t, median, ls=style, color=colour, **more)

    ax = axes[0]
    ax.set_title("(a) gap between conditional and unconditional score (Fig. 2)", fontsize=10.5)
    for what, paper in (("empirical", "supervision"), ("learned", "extrapolation")):
        for shift, (where, (colour, place)) in enumerate(places.items()):        # where two dashed lines coincide, both
            style = "-" if what == "empirical" else (3 * shift, (3, 3))          # are seen, in turn
            label = f"{what}, {place} ({'paper' if where == paper else 'control'})"
            curve(ax, a["gap"][f"{what}, {where}"], colour, style, (what, where) != ("empirical", "extrapolation"),
                  lw=2.4, label=label, zorder=4 - shift)
        if what == "empirical":                              # a band from nothing to here would cover all else
            ax.plot(t, np.maximum(a["gap"]["empirical, extrapolation"][2], FLOOR), ":", color=RED, lw=1.3,
                    label="the same, 90th percentile")
    ax.plot(t, np.maximum(a["gap"]["error, supervision"][1], FLOOR), ":", color=BLUE, lw=1.8,
            label="the network's error $\\|s_\\theta^c - s_*^c\\|$, noisy training points")
    ax.set(yscale="log", ylim=(FLOOR * 0.8, None), xlim=(0, 1), xlabel="t  (0 = data, 1 = noise)",
           ylabel="$\\|s^c - s^\\varnothing\\|$")
    ax.text(0.02, FLOOR * 1.5, f"below {FLOOR:g} drawn at {FLOOR:g}", fontsize=8.5)
    fig.legend(*ax.get_legend_handles_labels(), fontsize=9, loc="upper left", bbox_to_anchor=(0.06, 1), ncols=2,
               frameon=False, handlelength=2.6)

    ax = axes[1]
    ax.set_title("(b) how many training points share the softmax", fontsize=10.5)
    for where, (colour, _) in places.items():
        for what, style in (("conditional", "-"), ("unconditional", "--")):
            curve(ax, a["effective_size"][f"{what}, {where}"], colour, style, lw=2)
    ax.set(yscale="log", ylim=(0.8, None), xlim=(0, 1), xlabel="t",
           ylabel="effective number of points, $1\\,/\\,\\Sigma_i w_i^2$")
    ax.legend(handles=[plt.Line2D([], [], color="black", ls=ls, label=label) for ls, label in
                       (("-", "among those of the class"), ("--", "among all"))], fontsize=9, loc="upper left")

    (ratio,) = train.starting(results, "control: learned gap, training points over")
    (paradox,) = train.starting(results, "Fig 2 learned")
    number = lambda c: f"{c['ours']:.2f} [{c['ci95'][0]:.2f}, {c['ci95'][1]:.2f}]"
    caption = [f"For t <= .5 the learned gap on trajectories is {number(paradox)} times the network's own error on "
               "training points: " + {
                   "contradicted": "misfit can explain it.", "holds": "more than misfit explains.",
                   "not resolved": "whether misfit explains it is open."}[paradox["verdict"]],
               f"On training points it is {number(ratio)} times as large as on trajectories: " + {
                   "contradicted": "extrapolation alone does not explain it.",
                   "holds": "most of it is made by extrapolation, as the paper says.",
                   "not resolved": "whether extrapolation makes most of it is open."}[ratio["verdict"]],
               f"At {100 * a['beyond']:.0f}% of the trajectories' points the empirical gap is the larger one (dotted, "
               "orange-red): there, the nearest image of all is of another class.",
               f"Lines: median of {a['n']} points; bands: 10 to 90%; brackets: 95%. {name} on {a['N']:,} images of "
               f"{model['data']}, d = {a['d']}; trajectories with w = {a['w']:g}."]
    fig.text(0.02, 0.02, "\n".join(caption), fontsize=9, linespacing=1.4)
    with replacing(Path(path).with_suffix(".png")) as f:
        fig.savefig(f, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    cli(lambda cfg: train.experiment("exp_cfg_paradox", cfg, measure, plot, work), PRESETS)
