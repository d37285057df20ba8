"""Results: intervals, rows with verdicts, results.json, the printed table, and the colours of all figures."""
import dataclasses
import json
import subprocess
import time
from pathlib import Path

import numpy as np
import scipy.stats
import torch

from plumbing.cli import count_processes, device_name, pick_device
from plumbing.files import ROOT, read_json, write_json, write_whole

# supervision, extrapolation, controls and real images have the same colour in every figure
BLUE, ORANGE, GREY, GREEN = "#0072B2", "#D55E00", "#777777", "#009E73"


def bootstrap_interval(values, statistic=np.median, n=400, seed=0):
    """Return (low, high) of statistic(values) by the percentile bootstrap over the first axis of values (N, ...)."""
    result = scipy.stats.bootstrap((np.arange(len(values)),), lambda rows: statistic(values[rows]), vectorized=False,
                                   method="percentile", n_resamples=n, rng=np.random.default_rng(seed))
    return tuple(map(float, result.confidence_interval))


def student_interval(values):
    """Return (low, high) of the mean of values (n,), by Student's t."""
    return tuple(map(float, scipy.stats.ttest_1samp(values, 0).confidence_interval()))


def pair_interval(values):
    """Return (low, high) of the mean of values (S,), each the mean over the pairs of one of S seeds with the others.

    Two of them share a pair, so we take the jackknife's values, as if each seed had left in turn.
    """
    S = len(values)
    return student_interval((2 * (S - 1) * values - S * values.mean()) / (S - 2))


def over_seeds(samples, statistic=np.median):
    """Return the mean of statistic(sample) over samples [(n, ...), ...], one a seed, and the range of all intervals.

    The interval of a fraction, the mean of what is true or false, is Wilson's, which has a width even if all are true.
    """
    intervals = []
    for sample in samples:
        if statistic is np.mean and sample.dtype == bool:
            intervals.append(scipy.stats.binomtest(int(sample.sum()), len(sample)).proportion_ci(method="wilson"))
        else:
            intervals.append(bootstrap_interval(sample, statistic))
    lows, highs = zip(*intervals, strict=True)
    return float(np.mean([statistic(sample) for sample in samples])), (min(lows), max(highs))


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
    half, mean = scipy.stats.t.ppf(0.975, freedom) * variance**0.5, per_image.mean()
    return float(mean), (float(mean - half), float(mean + half))


def claim(id, text, paper, ours, ci95, low=-np.inf, high=np.inf, gate=(True, "")):
    """Return a row: a statement of the paper, its number, ours with a 95% interval, and the verdict of the interval.

    low, high   the paper claims that the value lies between them
    gate        (passed, text): is this network in the regime of the statement? The text says what would pass it
    """
    passed, needed = gate
    if not passed:
        verdict, note = "other regime", needed
    elif ci95[1] < low or ci95[0] > high:
        verdict, note = "differs", ""
    elif low <= ci95[0] and ci95[1] <= high:
        verdict, note = "reproduces", ""
    else:
        verdict, note = "not resolved", f"an effect of {(ci95[1] - ci95[0]) / 2:.2g} could have been seen"
    return finding(id, text, ours, ci95) | dict(paper=paper, verdict=verdict, note=note)


def finding(id, text, ours, ci95):
    """Return a row of our own: a control that the paper does not show, with a value and an interval and no verdict."""
    return dict(id=id, text=text, paper="", ours=float(ours), ci95=[float(c) for c in ci95], verdict="finding", note="")


def results_folder(script, cfg):
    """Return out/<script>/<preset>, or --out."""
    return Path(cfg.out) if cfg.out else ROOT / "out" / script / cfg.preset


def run_experiment(script, cfg, measure, plot):
    """Measure, write results.json, draw the figures from that file alone, and print the rows. --redraw only draws.

    measure(cfg) -> (rows, arrays): a list of claims and findings, and a dict of numbers and arrays for the figures
    plot(results, folder) draws fig*.png from results.json; results["arrays"] holds lists
    """
    folder = results_folder(script, cfg)
    path = folder / "results.json"
    if path.exists() and read_json(path).get("script") != script:
        raise ValueError(f"{path} is not of {script}: give another --out")
    if not cfg.redraw:
        device, started = device_name(pick_device(cfg.device)), time.time()
        folder.mkdir(parents=True, exist_ok=True)
        rows, arrays = measure(cfg)
        if count_processes()[0]:
            return
        git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
        results = dict(script=script, device=device, seconds=time.time() - started, commit=git.stdout.strip(),
                       torch=torch.__version__, config=dataclasses.asdict(cfg), arrays=arrays)
        # NumPy's and torch's values become plain ones; four digits are enough to draw from
        text = json.dumps(results, default=lambda value: value.tolist())
        plain = json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))
        write_json(path, plain | dict(claims=rows))
    results = read_json(path)
    plot(results, folder)
    print(path, *sorted(folder.glob("*.png")), sep="\n")
    print(f"\n{'':76s} {'paper':>12s} {'ours':>9s} {'95% interval':>18s}  verdict")
    for row in results["claims"]:
        interval = "[{:.3g}, {:.3g}]".format(*row["ci95"])
        note = f" ({row['note']})" if row["note"] else ""
        print(f"{row['text']:76s} {row['paper']:>12s} {row['ours']:9.3g} {interval:>18s}  {row['verdict']}{note}")


def new_figure(height, columns=1, rows=1, **options):
    """Return (figure, axes) of a README's width: 8.3 inches, with text of 10 points."""
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "legend.frameon": False})
    return plt.subplots(rows, columns, figsize=(8.3, height), layout="constrained", **options)


def save_figure(fig, path):
    """Write a figure of matplotlib as a PNG of 150 dots per inch, and close it."""
    import matplotlib.pyplot as plt
    with write_whole(path) as f:
        fig.savefig(f, dpi=150, format=Path(path).suffix[1:])
    plt.close(fig)


def draw_pairs(ax, pairs, framed):
    """Draw pairs of images, uint8 (2, n, H, W, C), one above the other, with a blue frame where framed (n,) is true."""
    from matplotlib.patches import Rectangle
    # a white line around each image
    pairs = np.pad(pairs[..., :3], ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    ax.imshow(np.vstack([np.hstack(row) for row in pairs]), cmap="gray", vmin=0, vmax=255)
    H, W = pairs.shape[2:4]
    for i in np.flatnonzero(framed):
        ax.add_patch(Rectangle((i * W, 0), W - 1, 2 * H - 1, fill=False, color=BLUE, lw=3))
    ax.set(xticks=[], yticks=[H / 2, 1.5 * H], yticklabels=("sample", "nearest"))
    ax.spines[:].set_visible(False)
