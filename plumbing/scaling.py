"""The statistics of exp_scaling.py, and its figures, drawn from results.json alone."""
import functools
import itertools
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from scipy.stats import t as student

from model import build_model
from plumbing.cli import count_flops
from plumbing.data import load_data, model_sizes
from plumbing.results import BLUE, GREY, ORANGE, bootstrap_interval, new_figure, save_figure

# The paper's E^sup and E^ext: SiT-S, B and L after 200K, 300K and 400K iterations, and SiT-XL. One SiT-B is hidden.
PAPER_SUP = (0.18843, 0.18789, 0.18750, 0.1866, 0.18567, 0.18494, 0.18432, 0.18374, 0.18340)
PAPER_EXT = (0.53337, 0.53374, 0.53395, 0.53441, 0.53475, 0.53489, 0.53512, 0.53540, 0.53590)

# ----------------------------------------------------------------------------------------------------------------------
# Statistics of Figure 3

def stack(parts, dim=0):
    """Return {name: tensors of this name, stacked} of a list of dicts with the same names."""
    return {name: torch.stack([part[name] for part in parts], dim) for name in parts[0]}


def gather_seeds(measured):
    """Return {data set: {term: (models, seeds, n)}} of {(data set, ...): {term: (models, n)}}, a case for each seed."""
    cases = {}
    for (name, *_), terms in measured.items():
        cases.setdefault(name, []).append(terms)
    return {name: {term: values.numpy() for term, values in stack(seeds, 1).items()} for name, seeds in cases.items()}


def paired_change(values, weights):
    """Return (mean, interval) of the weighted sum over networks of values (K networks, S seeds, n images).

    weights (K,), which sum to 0: +1 and -1 for the difference of two networks. All networks saw the same images and
    noise, so the sum is taken image by image. The 95% interval covers the images and the seeds. The spread between
    seeds is pooled over all networks, since two seeds alone say little.
    """
    values, weights = np.asarray(values), np.asarray(weights, dtype=float)
    K, S, n = values.shape
    per_image = np.einsum("k,ksn->n", weights, values) / S
    variance, freedom = per_image.var(ddof=1) / n, n - 1
    if S > 1:
        between = values.mean(2).var(1, ddof=1).mean()
        variance += (weights**2).sum() * between / S
        freedom = K * (S - 1)
    half, mean = student.ppf(0.975, freedom) * variance**0.5, per_image.mean()
    return float(mean), (float(mean - half), float(mean + half))


def compare_ends(found):
    """Return what changes from the first network to the last, with intervals: E^sup, E^ext, and rho on common points.

    rho is the share of the energy gained by x_theta that x_* has as well. found: the models after the linear denoiser.
    """
    weights = np.zeros(len(found["sup error"]) - 1)
    weights[0], weights[-1] = -1, 1
    gains = [np.mean(found[f"common {term}"][-1] - found[f"common {term}"][1], axis=0) for term in ("both", "theta")]
    gains = np.stack(gains, 1)                               # (n, 2)

    def share(gains):
        both, theta = gains.mean(0)
        return both / theta if theta else 0.0
    return dict(sup=paired_change(found["sup error"][1:], weights), ext=paired_change(found["ext error"][1:], weights),
                rho=(share(gains), bootstrap_interval(gains, share)))


def describe_networks(cfg, folder, found):
    """Return the networks' names and costs, the means of all terms, and E^sup and E^ext with paired intervals."""
    names, cost = [Path(path).name for path in cfg.model_path], [1 + k for k in range(len(cfg.model_path))]
    sizes = model_sizes(load_data(folder))
    for steps, model in itertools.product(cfg.lengths, cfg.models) if not cfg.model_path else ():
        names.append(f"{model}, {steps:,} steps")
        cost.append(steps * count_flops(functools.partial(build_model, model, **sizes), cfg.network.batch))
    table = {term: values.mean((1, 2)) for term, values in found.items()}
    arrays = dict(names=names, cost=cost, table=table | dict(calibration=table["sup both"] / table["sup theta"]))
    for region in ("sup", "ext"):
        errors = found[f"{region} error"][1:]
        level, arrays[region] = errors[0].mean(), []
        for weights in np.eye(len(errors)) - np.eye(len(errors))[0]:
            change, (low, high) = paired_change(errors, weights)
            arrays[region].append([level + change, level + low, level + high])
    return arrays


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of Figure 7

def fit_line(points):
    """Return slope and offset of the distance over L, Eq. (5). points (..., 3): FLOPs, L, distance."""
    _, L, distance = points.reshape(-1, 3).T
    return np.polyfit(L, distance, 1)


def compare_at_equal_L(one, two):
    """Return the distance of recipe one over that of recipe two at equal L, for each seed; and the range of common L.

    one, two: (seeds, networks, 3). We compare the lines of each seed in the middle of the range.
    """
    L_one, L_two = one[..., 1].mean(0), two[..., 1].mean(0)
    low, high = max(L_one.min(), L_two.min()), min(L_one.max(), L_two.max())
    distances = []
    for recipe in (one, two):
        distances.append([np.polyval(fit_line(seed), (low + high) / 2) for seed in recipe])
    return np.divide(*distances), high - low


# ----------------------------------------------------------------------------------------------------------------------
# The figures

def plot(results, folder):
    """Draw the figures that results.json has numbers for."""
    draw = dict(fig3=draw_fig3, fig6=draw_fig6, fig7=draw_fig7)
    for name, arrays in results["arrays"].items():
        draw[name](arrays, folder)


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3

def draw_fig3(arrays, folder):
    """Draw the two panels of the paper, and E^ext over E^sup with the paper's own points as an inset."""
    fig, axes = new_figure(3.4, columns=3)
    ends = next(iter(arrays["ends"].values()))
    for ax, region, place, colour in zip(axes, ("sup", "ext"), ("Training points", "Trajectories"), (BLUE, ORANGE),
                                         strict=False):
        draw_levels(ax, arrays, region, colour)
        ax.set(title=f"{place}: from first\nto last network {ends[region][0]:+.3f}", ylabel=rf"$E^{{\rm {region}}}$")
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
    axes[1].set(xlabel=r"$\rho$, the share of new detail that $x_*$ has too", ylabel=r"change of $E^{\rm ext}$",
                title="Theory: it rises left of the dashed line,\nand falls right of it")
    axes[1].margins(x=0.3)
    save_figure(fig, folder / "fig3_mechanism.png")


# ----------------------------------------------------------------------------------------------------------------------
# Figures 6 and 7

def draw_fig6(arrays, folder):
    """Draw the levels of what changes, for REPA and for another seed."""
    places = np.arange(3)
    fig, ax = new_figure(3.6)
    styles = (("of_points", -0.2, BLUE, "on training points"), ("of_path", 0.2, ORANGE, "on trajectories"))
    for name, shift, colour, label in styles:
        changes = 100 * np.array(arrays[name])               # (seeds, 3)
        ax.bar(places + shift, changes.mean(0), 0.38, color=colour, label=label)
        # a dot for each seed
        ax.plot(places + shift, changes.T, "k.")
    ax.set_xticks(places, ["by REPA", "by REPA, in common\nwith other seeds", "by another seed,\nwithout REPA"])
    ax.set_ylabel("change of the network, % of L")
    repa, _, seed = np.mean(np.array(arrays["of_path"]) / np.array(arrays["of_points"]), axis=0)
    ax.set_title(f"REPA changes the network {repa:.2f} times as much on trajectories as on\n"
                 f"training points, another seed {seed:.2f} times")
    ax.legend()
    save_figure(fig, folder / "fig6.png")


def draw_fig7(points, folder):
    """Draw the distance over L for recipes with REPA, and for U-Nets; larger markers took more FLOPs."""
    points = {name: np.array(values) for name, values in points.items()}
    none, *repa, attention, convolutions = points
    purples = colormaps["Purples"](np.linspace(0.5, 0.9, len(repa)))
    colours = dict(zip(points, ["black", *purples, "#D9A400", "#7B3F00"], strict=True))
    panels = {"(b) REPA": [none, *repa], "(c) Convolutions": [none, attention, convolutions]}
    most_flops = max(values[..., 0].max() for values in points.values())
    fig, axes = new_figure(3.9, columns=2, sharex=True, sharey=True)
    for ax, title in zip(axes, panels, strict=True):
        for name in panels[title]:
            flops, L, distance = points[name].reshape(-1, 3).T
            area = 10 + 110 * flops / most_flops
            ax.scatter(L, distance, area, color=colours[name], alpha=0.4, lw=0)
            ends = np.array([L.min(), L.max()])
            line = np.polyval(fit_line(points[name]), ends)
            ax.plot(ends, line, color=colours[name], label=name)
        last = panels[title][-1]
        ratios, _ = compare_at_equal_L(points[last], points[none])
        ax.set_title(f"{title[:3]} {last}: {ratios.mean():.2f} times\nthe distance at equal L")
        ax.set_xlabel("supervision loss L")
        ax.legend(loc="lower right")
    axes[0].set(ylabel="Fréchet distance", ylim=0)
    save_figure(fig, folder / "fig7.png")
