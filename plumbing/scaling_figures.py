"""The figures of exp_scaling.py, drawn from results.json alone."""
import matplotlib.pyplot as plt
import numpy as np

from plumbing.results import BLUE, GREY, ORANGE, save_figure

# The paper's E^sup and E^ext: SiT-S, B and L after 200K, 300K and 400K iterations, and SiT-XL. One SiT-B is hidden.
PAPER_SUP = (0.18843, 0.18789, 0.18750, 0.1866, 0.18567, 0.18494, 0.18432, 0.18374, 0.18340)
PAPER_EXT = (0.53337, 0.53374, 0.53395, 0.53441, 0.53475, 0.53489, 0.53512, 0.53540, 0.53590)


def plot(results, folder):
    """Draw the figures that results.json has numbers for."""
    draw = dict(fig3=draw_fig3, fig6=draw_fig6, fig7=draw_fig7)
    with plt.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False}):
        for name, arrays in results["arrays"].items():
            draw[name](arrays, folder)


def tell_change(interval):
    """Return in words what a change with this interval does."""
    if interval[0] > 0:
        return "rises"
    return "falls" if interval[1] < 0 else "does not clearly change"


# ----------------------------------------------------------------------------------------------------------------------
# Figure 3

def draw_fig3(arrays, folder):
    """Draw the two panels of the paper, and E^ext over E^sup with the paper's own points as an inset."""
    fig, axes = plt.subplots(1, 3, figsize=(8.3, 3.3), layout="constrained")
    first, *others = arrays["ends"]
    places = dict(sup="training points", ext="trajectories")
    for ax, region, colour in zip(axes, places, (BLUE, ORANGE), strict=False):
        draw_levels(ax, arrays, region, colour)
        change = tell_change(arrays["ends"][first][region][1])
        ax.set_title(f"On {places[region]}\nthe error {change}")
        ax.set_ylabel(f"$E^{{{region}}}$ per dimension")
    draw_plane(axes[2], arrays)
    save_figure(fig, folder / "fig3.png")
    if others:
        draw_mechanism(arrays, folder)


def draw_levels(ax, arrays, region, colour):
    """Draw an error against compute, one line for each length."""
    cost, levels = np.array(arrays["cost"]), np.array(arrays[region])
    lengths = np.array([name.partition(", ")[2] for name in arrays["names"]])
    kinds = list(dict.fromkeys(lengths))
    for k, length in enumerate(kinds):
        mine = lengths == length
        level, low, high = levels[mine].T
        shade = (k + 1) / len(kinds)
        ax.errorbar(cost[mine], level, [level - low, high - level], fmt="o-", capsize=3, color=colour, alpha=shade,
                    label=length or None)
    ax.set(xscale="log", xlabel="training compute (FLOPs)" if kinds != [""] else "parameters")
    if kinds != [""]:
        ax.legend()


def draw_plane(ax, arrays):
    """Draw E^ext over E^sup, and where networks would go if x_* had a share rho of what they learn."""
    sup, ext = np.array(arrays["sup"])[:, 0], np.array(arrays["ext"])[:, 0]
    order = np.argsort(-sup)
    end = sup.min() - sup[0]
    for rho, style in ((0, ":"), (0.25, "--"), (0.5, "-")):
        ax.plot([sup[0], sup[0] + end], [ext[0], ext[0] - (1 - 2 * rho) * end], style, color=GREY, lw=1)
        ax.text(sup[0] + end, ext[0] - (1 - 2 * rho) * end, f" $\\rho$={rho:g}", color=GREY, va="center")
    ax.plot(sup[order], ext[order], "o-", color="black")
    ax.invert_xaxis()
    ax.set(xlabel="$E^{sup}$", ylabel="$E^{ext}$", title="They learn detail that\nno neighbour has")
    inset = ax.inset_axes([0.1, 0.7, 0.4, 0.28])
    inset.plot(PAPER_SUP, PAPER_EXT, "o-", ms=3, lw=1, color=GREY)
    inset.set(xticks=[], yticks=[], title="the paper")
    inset.invert_xaxis()


def draw_mechanism(arrays, folder):
    """Draw the ladder of perfect denoisers, and for each data set how E^ext changes at its rho."""
    fig, axes = plt.subplots(1, 2, figsize=(8.3, 3.5), layout="constrained")
    ladder = arrays["ladder"]
    for region, colour, place in (("ext", ORANGE, "trajectories"), ("sup", BLUE, "training points")):
        axes[0].plot(ladder["modes"], ladder[region], "o-", color=colour, label=f"on {place}")
    axes[0].set(xscale="log", xlabel="frequencies that it knows", ylabel="error per dimension",
                title="Perfect denoisers that know\nless or more detail")
    axes[0].legend()
    for name, ends in arrays["ends"].items():
        rho, (low, high) = ends["rho"]
        change, (bottom, top) = ends["ext"]
        axes[1].errorbar(rho, change, [[change - bottom], [top - change]], [[rho - low], [high - rho]], fmt="o",
                         color=ORANGE, capsize=3)
        axes[1].annotate(name, (rho, change), (6, 6), textcoords="offset points")
    axes[1].axhline(0, color=GREY, lw=1)
    axes[1].axvline(0.5, color=GREY, lw=1, ls="--")
    axes[1].set(xlabel=r"$\rho$, share of the new detail that $x_*$ has", ylabel="change of $E^{ext}$",
                title="The error rises where neighbours\nshare less than half")
    save_figure(fig, folder / "fig3_mechanism.png")


def draw_fig6(arrays, folder):
    raise NotImplementedError


def draw_fig7(arrays, folder):
    raise NotImplementedError
