"""The networks that exp_scaling.py trains, and its figures, drawn from results.json alone."""
import dataclasses
import functools
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps

from model import build_model
from plumbing.cli import count_flops
from plumbing.data import load_data, model_sizes, write_once
from plumbing.files import checkpoint_path
from plumbing.results import BLUE, GREY, ORANGE, new_figure, paired_change, save_figure
from plumbing.stand_ins import SIDE, few_digits, leaves, pick_rows, small_digits

# The paper's E^sup and E^ext: SiT-S, B and L after 200K, 300K and 400K iterations, and SiT-XL. One SiT-B is hidden.
PAPER_SUP = (0.18843, 0.18789, 0.18750, 0.1866, 0.18567, 0.18494, 0.18432, 0.18374, 0.18340)
PAPER_EXT = (0.53337, 0.53374, 0.53395, 0.53441, 0.53475, 0.53489, 0.53512, 0.53540, 0.53590)

# ----------------------------------------------------------------------------------------------------------------------
# The networks

@dataclasses.dataclass(frozen=True)
class Job:
    data: str  # the folder of a data set
    model: str  # a name of model.py
    steps: int  # training iterations
    seed: int = 0  # of the training
    repa: float = 0.0  # weight of REPA's loss


def data_folder(cfg, folder, name, make):
    """Return the folder of a data set: --data, or one that make(), which returns (arrays, meta), draws on first use."""
    if cfg.data:
        return cfg.data
    path = folder / "data" / name
    write_once(path, make)
    return str(path)


def image_sets(cfg, folder):
    """Return {name: folder} of the data sets of Figure 3: leaves with less and less texture, then digits; or --data."""
    if cfg.data:
        return {Path(cfg.data).name: cfg.data}
    sets = {}
    for texture in cfg.textures:
        make = functools.partial(leaves, cfg.n_images, 16, texture, cfg.seed)
        sets[f"texture {texture:g}"] = data_folder(cfg, folder, f"leaves_{texture:g}_{cfg.n_images}_{cfg.seed}", make)
    return sets | dict(digits=data_folder(cfg, folder, "digits_16", small_digits))


def plan_fig3(cfg, folder):
    """Return [(name of a data set, jobs)], one for each seed. The first set is Figure 3's, its networks small to large.

    The sets that follow it have another rho: the smallest and shortest network, the largest and longest, of one seed.
    """
    kinds = list(itertools.product(cfg.lengths, cfg.models))
    plan = []
    for name, data in image_sets(cfg, folder).items():
        pick_rows(cfg, load_data(data))                      # too many points show here, before the training
        used, seeds = ([kinds[0], kinds[-1]], 1) if plan else (kinds, cfg.seeds)
        plan += [(name, [Job(data, model, steps, seed) for steps, model in used]) for seed in range(seeds)]
    return plan


def plan_fig7(cfg, folder, models, repa=0.0):
    """Return the networks of a recipe: all models of the first seed, then those of the next.

    They see a few digits, no labels. Their teacher saw more images, as DINOv2 did, and labels, as DINOv2 did not.
    """
    settings = (cfg.digits, SIDE, cfg.n_student, cfg.n_teacher, cfg.seed)
    data = data_folder(cfg, folder, "_".join(map(str, settings)), functools.partial(few_digits, *settings))
    steps = max(cfg.network7.keep)
    return [Job(data, model, steps, seed, repa) for seed, model in itertools.product(range(cfg.seeds7), models)]


def name_run(settings):
    """Return a name for the run of a train.Config: readable, and with a hash of all its fields."""
    text = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{Path(settings.data).name}_{settings.model.replace('/', '-')}_{settings.steps}_{digest}"


def measurement_key(cfg, data, *runs):
    """Return all that a measurement of these runs depends on, for `cached`."""
    files = [(str(run), checkpoint_path(run).stat().st_mtime) for run in runs]
    return dict(data=data["fingerprint"], runs=files, n=cfg.n_points, times=cfg.n_times, seed=cfg.seed, fast=cfg.fast)


# ----------------------------------------------------------------------------------------------------------------------
# What Figure 3 says of the networks

def stack(parts, dim=0):
    """Return {name: tensors of this name, stacked} of a list of dicts with the same names."""
    return {name: torch.stack([part[name] for part in parts], dim) for name in parts[0]}


def gather_seeds(measured):
    """Return {data set: {term: (models, seeds, n)}} of {(data set, ...): {term: (models, n)}}, a case for each seed."""
    cases = {}
    for (name, *_), terms in measured.items():
        cases.setdefault(name, []).append(terms)
    return {name: {term: values.numpy() for term, values in stack(seeds, 1).items()} for name, seeds in cases.items()}


def describe_networks(cfg, folder, found):
    """Return the networks' names and costs, the means of all terms, and E^sup and E^ext with paired intervals."""
    names, cost = [Path(path).name for path in cfg.model_path], [1 + k for k in range(len(cfg.model_path))]
    sizes = model_sizes(load_data(folder))
    for steps, model in itertools.product(cfg.lengths, cfg.models) if not cfg.model_path else ():
        names.append(f"{model}, {steps:,} steps")
        cost.append(steps * count_flops(functools.partial(build_model, model, **sizes), cfg.network.batch))
    arrays = dict(names=names, cost=cost, table={term: values.mean((1, 2)) for term, values in found.items()})
    for region in ("sup", "ext"):
        errors = found[f"{region} error"][1:]
        each = np.eye(len(errors))
        changes = [paired_change(errors, weights) for weights in each - each[0]]
        arrays[region] = [errors[0].mean() + np.array([change, *ends]) for change, ends in changes]
    return arrays


def plot(results, folder):
    """Draw the figures that results.json has numbers for."""
    draw = dict(fig3=draw_fig3, fig6=draw_fig6, fig7=draw_fig7)
    ours = {claim["id"]: claim["ours"] for claim in results["claims"]}
    for name, arrays in results["arrays"].items():
        draw[name](arrays, folder, ours)


def draw_fig3(arrays, folder, ours):
    """Draw the two panels of the paper, and E^ext over E^sup with the paper's own points as an inset."""
    fig, axes = new_figure(3.4, columns=3)
    for ax, region, place, colour in zip(axes, ("sup", "ext"), ("Training points", "Trajectories"), (BLUE, ORANGE),
                                         strict=False):
        draw_levels(ax, arrays, region, colour)
        change = ours[f"fig3/{region}"]
        ax.set(title=f"{place}: from first\nto last network {change:+.3f}", ylabel=rf"$E^{{\rm {region}}}$")
    draw_plane(axes[2], arrays)
    save_figure(fig, folder / "fig3.png")
    if len(arrays["ends"]) > 1:
        draw_mechanism(arrays, folder)


def draw_levels(ax, arrays, region, colour):
    """Draw an error against compute, one line for each length."""
    cost, levels = np.array(arrays["cost"]), np.array(arrays[region])
    lengths = np.array([name.partition(", ")[2] for name in arrays["names"]])
    kinds = list(dict.fromkeys(lengths))
    for k, length in enumerate(kinds):
        mine = lengths == length
        level, low, high = levels[mine].T
        ax.errorbar(cost[mine], level, [level - low, high - level], fmt="so"[k % 2] + "-", capsize=3, color=colour,
                    alpha=(k + 1) / len(kinds), label=length or "small to large")
    ax.set(xscale="log", xlabel="training compute (FLOPs)" if kinds != [""] else "network")
    ax.xaxis.set_minor_formatter("")
    # room for the legend above the error bars
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))
    ax.legend(loc="upper center")


def draw_plane(ax, arrays):
    """Draw E^ext over E^sup, and where networks would go if x_* had a share rho of what they learn."""
    sup, ext = np.array(arrays["sup"])[:, 0], np.array(arrays["ext"])[:, 0]
    gain = sup[0] - sup.min()
    for rho, style in ((0, ":"), (0.25, "--"), (0.5, "-")):
        end = ext[0] + (1 - 2 * rho) * gain
        ax.plot([sup[0], sup[0] - gain], [ext[0], end], style, color=GREY, lw=1.2)
        ax.annotate(rf"$\rho={rho:g}$", (sup[0] - gain, end), (4, -3), textcoords="offset points", color=GREY)
    ax.plot(sup, ext, "o", color="black")
    ax.invert_xaxis()
    ax.set(xlabel=r"$E^{\rm sup}$", ylabel=r"$E^{\rm ext}$", title="One error\nagainst the other")
    inset = ax.inset_axes([0.06, 0.62, 0.4, 0.28])
    inset.plot(PAPER_SUP, PAPER_EXT, "o", ms=3, color=GREY)
    inset.set(xticks=[], yticks=[])
    inset.set_title("the paper's", fontsize=10)
    inset.invert_xaxis()


def draw_mechanism(arrays, folder):
    """Draw the ladder of perfect denoisers, and for each data set how E^ext changes at its rho."""
    fig, axes = new_figure(3.6, columns=2)
    ladder = arrays["ladder"]
    for region, colour, place in (("ext", ORANGE, "on trajectories"), ("sup", BLUE, "on training points")):
        axes[0].plot(ladder["modes"], ladder[region], "o-", color=colour, label=place)
    axes[0].set(xscale="log", xlabel="number of waves that it knows", ylabel="error, per dimension",
                title="Perfect denoisers do it too: the\nmore detail one knows, the farther from $x_*$")
    axes[0].set_xticks(ladder["modes"], [str(k) for k in ladder["modes"]])
    axes[0].minorticks_off()
    axes[0].legend(loc="center right")
    for name, ends in arrays["ends"].items():
        rho, (left, right) = ends["rho"]
        change, (low, high) = ends["ext"]
        axes[1].errorbar(rho, change, [[change - low], [high - change]], [[rho - left], [right - rho]], fmt="o",
                         color=ORANGE, capsize=3)
        label = name.replace("texture", "leaves, texture")
        axes[1].annotate(label, (right, change), (6, -4), textcoords="offset points", backgroundcolor="white")
    axes[1].axhline(0, color=GREY, lw=1)
    axes[1].axvline(0.5, color=GREY, lw=1, ls="--")
    axes[1].set(xlabel=r"$\rho$, what $x_\theta x_*$ gains per $x_\theta^2$", ylabel=r"change of $E^{\rm ext}$",
                title="Theory: it rises left of the dashed line,\nand falls right of it")
    axes[1].margins(x=0.3)
    save_figure(fig, folder / "fig3_mechanism.png")


def draw_fig6(arrays, folder, ours):
    """Draw the levels of what changes, for REPA and for another seed, and a dot for each seed."""
    places = np.arange(3)
    fig, ax = new_figure(3.6)
    styles = (("of_points", -0.2, BLUE, "on training points"), ("of_path", 0.2, ORANGE, "on trajectories"))
    for name, shift, colour, label in styles:
        changes = 100 * np.array(arrays[name])               # (seeds, 3)
        ax.bar(places + shift, changes.mean(0), 0.38, color=colour, label=label)
        ax.plot(places + shift, changes.T, "k.")
    ax.set_xticks(places, ["by REPA", "by REPA, in common\nwith other seeds", "by another seed,\nwithout REPA"])
    ax.set(ylabel="change of the network, % of L", title=f"REPA changes the network {ours['fig6/ratio']:.2f} times as "
           f"much on trajectories as on\ntraining points, another seed {ours['fig6/seed']:.2f} times")
    ax.legend()
    save_figure(fig, folder / "fig6.png")


def draw_fig7(points, folder, ours):
    """Draw the distance over L for recipes with REPA, and for U-Nets; larger markers took more FLOPs."""
    points = {name: np.array(values) for name, values in points.items()}
    none, *repa, attention, convolutions = points
    purples = colormaps["Purples"](np.linspace(0.5, 0.9, len(repa)))
    colours = dict(zip(points, ["black", *purples, "#D9A400", "#7B3F00"], strict=True))
    panels = {"fig7b/repa": [none, *repa], "fig7c/convolutions": [none, attention, convolutions]}
    most_flops = max(values[..., 0].max() for values in points.values())
    fig, axes = new_figure(3.9, columns=2, sharex=True, sharey=True)
    for ax, (row, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            flops, L, distance = points[name].reshape(-1, 3).T
            ax.scatter(L, distance, 10 + 110 * flops / most_flops, color=colours[name], alpha=0.4, lw=0)
            ends = np.array([L.min(), L.max()])
            ax.plot(ends, np.polyval(np.polyfit(L, distance, 1), ends), color=colours[name], label=name)     # Eq. (5)
        ax.set_title(f"({row[4]}) {names[-1]}: {ours[row]:.2f} times\nthe distance at equal L")
        ax.set_xlabel("supervision loss L")
        ax.legend(loc="lower right")
    axes[0].set(ylabel="Fréchet distance", ylim=0)
    save_figure(fig, folder / "fig7.png")
