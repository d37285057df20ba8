"""
Figure 5 (C3, the paper's third claim; Experiment 4.3 and C.7): without the freedom to extrapolate, a model memorizes.

Two nested subsets of the data: D_score defines the target, its posterior mean x_*(z, t) = E[x | z_t = z], to which the
empirical score is equivalent; D_region defines where the network is asked for it,

    L = E |x_theta(z_t, t) - x_*(z_t, t)|^2,    z_t = (1 - t) x + t eps with x from D_region,    x_* over D_score.

A larger D_region leaves the target as it is, and says more about it: between the images of D_score, where the network
was free to make something up, it is now told what the empirical score does there, which is to collapse on D_score.

    python exp_freedom.py                        # trains 58 small networks; about 8 minutes on 2 CPU cores
    python exp_freedom.py --target sampled       # the paper's target, an image drawn from the posterior (also: faiss)

What counts as a copy? "Calibrated l2", the squared distance to the nearest image of D_score over the mean of those to
the nearest fifty, is small for a copy, but for many a real image too: below .25 lie 30% of the digits that are not in
D_score, so that samples would cross that line by becoming better. So the threshold is where 5% of these digits lie
below (.14): what a perfect sampler would score, too.

What you should see. At |D_region| = |D_score| there are fewer copies (a) than among real images; at 8 times that there
are more (b), for both architectures (c, blue). After the few hundred steps of these networks it is not resolved that
they are more than among real images (green); after 1,800 steps half of the samples are copies, and still hardly any at
ratio 1 (triangles). The paper's curves (grey) rise alike, by a threshold that it does not give. The control that it
leaves out is ordinary training on the same D_region ("plain DSM": the target is the image x itself; black). It does not
rise: more images alone do not make a network copy D_score, nor the rest of what it was trained on. (Plain DSM's samples
are worse, too, since even fewer are near to D_score than real images are: it is no control for their quality.)
The drawn targets have the same minimiser as the exact one, and lag behind it: after 1,800 steps they make up to a tenth
fewer copies, but move the network by a small part of what another seed does (printed, with what each costs).
Every finished network leaves its scores in out/exp_freedom/<preset>/runs/, and a long training a checkpoint; the same
command goes on after an interrupt.
It needs model.py, empirical_score.py, sample.py and train.py beside it. (With a training loop of its own, it is
longer than 300 lines.)

Try this after the first command, whose networks are found again; the answers are in the table, or in the figure. (2 and
3 overwrite both; the first command, given again, brings them back.)
1. python exp_freedom.py --redraw           Is there a threshold at which ratio 1 has more copies than real images have?
   See (d): hardly, the palest blue lies below green; the darkest above it, but for the left end, where few images are.
2. python exp_freedom.py --threshold .25    What does a lenient threshold do? See the first two rows: the rises are five
   times as large, and the rows "at ratio 8" hold. At .1, next to nothing is left of the two rises, but more than half
   of the one after 1,800 steps.
3. python exp_freedom.py --n-seeds 1        How sure is one network? See the interval of the first row: it gets
   narrower, since it is then of the images alone, and knows nothing of what another seed would do.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "torchdiffeq==0.2.5", "scipy==1.17.1", "matplotlib==3.11.2",
#                 "tqdm==4.70.1", "tyro==1.0.17", "mlxtend==0.25.0", "scikit-learn==1.9.1", "faiss-cpu==1.15.1"]
# ///
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.special import stdtrit
from tqdm import tqdm

import train
from empirical_score import EmpiricalScore
from model import build_model, read_weights
from sample import T_MIN, cli, noise, pick_device, processes, replacing, sample, to_uint8


@dataclass
class Net:
    model: str  # SiT-<size>/<patch>, UNet-<size>, UNet-<size>-conv: see model.py
    steps: int  # training iterations
    batch: int  # images a step
    lr: float  # of AdamW, constant after the warmup


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    data: str = "digits"  # a data set under data/, or a folder of the same layout
    # the first network of Fig. 5c, trained on every region
    transformer: Net = field(default_factory=lambda: Net("SiT-micro/4", 500, 64, 4e-3))
    # the second: is what the first does a matter of transformers?
    unet: Net = field(default_factory=lambda: Net("UNet-pico", 200, 64, 8e-3))
    # the network trained longer, at the ends: it compares the targets, whose draws make a noisier gradient
    compare: Net = field(default_factory=lambda: Net("SiT-micro/4", 1800, 64, 4e-3))
    target: str = "exact"  # exact: x_*; sampled: an image drawn from the posterior; faiss: drawn among k neighbours
    per_class: int = 19  # images of each class in D_score; the smallest class has 8 times as many
    ratios: tuple[float, ...] = (1, 2, 4, 8)  # |D_region| / |D_score|, ascending
    balanced: bool = True  # refuse ratios for which a class is too small; --no-balanced: it gives what it has
    k: int = 200  # neighbours that Faiss looks for: here more than D_score has (190), so that it leaves nothing out
    at_once: int = 256  # images that a network is trained on at once: of larger batches, gradients add up
    warmup: int = 50  # steps over which the learning rate rises
    ema: float = 0.999  # decay of the averaged weights, reached gradually
    label_dropout: float = 0.1  # fraction of labels replaced by the null label, that of no class
    n_seeds: int = 3  # networks of each kind: other weights, batches, noise, and the same subsets
    compare_seeds: int = 4  # networks of each target in the comparison of targets
    n_samples: int = 256  # images generated by each
    sample_steps: int = 20  # Heun steps
    n: int = 50  # neighbours in calibrated l2
    false_copies: float = 0.05  # the part of real images that count as copies though they are none: sets the threshold
    threshold: float | None = None  # of calibrated l2, below which an image is a copy; the paper does not give its own
    workers: int = 2  # networks trained at once, in processes of one thread each; 1: in this process, for a GPU
    seed: int = 0  # of the subsets; the networks have the seeds from here on
    device: str = "cpu"  # cpu, auto, cuda, mps; networks as small as the laptop preset's are at home on a CPU
    redraw: bool = False  # draw the figure again from results.json, and measure nothing
    dry_run: bool = False  # check data, memory and disk, say what would run and for how long, and stop
    out: str = ""  # folder of the results and of every network's scores; default out/exp_freedom/<preset>

PRESETS = {
    "laptop": Config(),
    # D_score = 2,000 of the 60,000 images of MNIST; first: python data/prepare.py mnist
    "gpu": Config("gpu", "mnist", Net("SiT-S/4", 4000, 256, 3e-4), Net("UNet-XS", 4000, 256, 3e-4),
                  Net("SiT-S/4", 8000, 256, 3e-4), per_class=200, ratios=(1, 2, 4, 8, 25), warmup=200,
                  workers=1, device="auto"),
    # C.7. At ratio 25.6, all of ImageNet and its flips, the classes cannot be of equal size
    "paper": Config("paper", "imagenet", Net("SiT-L/2", 400_000, 256, 1e-4), Net("UNet-B", 400_000, 256, 1e-4),
                    Net("SiT-L/2", 400_000, 256, 1e-4), per_class=100, ratios=(1, 2, 3, 4, 8, 25.6),
                    balanced=False, at_once=64, warmup=0, ema=0.9999, n_seeds=1, compare_seeds=1, sample_steps=50,
                    workers=1, device="auto"),
}

# ----------------------------------------------------------------------------------------------------------------------
# The two subsets, and the metric

def subsets(y, per_class, ratio, seed, balanced=True):
    """Labels y (N,) -> indices of D_score and of D_region, |D_region| = ratio |D_score|, the same number per class.

    A fixed order of each class, of which D_score is the beginning and D_region a longer one, so that the regions of all
    ratios are nested. ValueError where the data do not suffice."""
    rng, want = np.random.default_rng(seed), round(per_class * ratio)
    labels, counts = np.unique(y, return_counts=True)
    if (balanced and want > counts.min()) or want * len(labels) > len(y) or per_class > counts.min():
        raise ValueError(f"ratio {ratio:g} with {per_class} images per class in D_score needs {want} of each, but "
                         f"class {labels[counts.argmin()]} has {counts.min()}, all {len(labels)} classes {len(y)}")
    order = [rng.permutation(np.flatnonzero(y == label)) for label in labels]
    return tuple(np.sort(np.concatenate([o[:m] for o in order])) for m in (per_class, want))


def calibrated_l2(E, x, n=50):
    """C.7: |x - x_1|^2 over the mean of |x - x_i|^2, i = 1 .. n, x_i the i-th nearest in D_score. -> (B,): 0 for a
    copy, near 1 for an image that is no closer to one of them than to fifty."""
    d2, _ = E.nearest(x.cpu().double(), n)                   # (B, n), ascending
    return d2[:, 0] / d2.mean(1)


def l2_to(data, i, x, n, device):
    """Calibrated l2 of x (B, *shape) to the images i of a data set, D_score or D_region. -> (B,)."""
    points = data["x"] if len(i) == len(data["x"]) else data["x"][i]             # all is read in pieces, part is not
    return calibrated_l2(EmpiricalScore(points, device=device), x, n)


def real_images(data, inside, seed, most=2000):
    """Real images that are not `inside` (indices) a subset: of the rest of x, and of what is held out, `most` at most.
    They are no copies of it, so that what counts as a copy among them shows what a perfect sampler would score."""
    rng, outside = np.random.default_rng(seed), {"x": np.setdiff1d(np.arange(len(data["x"])), inside)}
    if "x_heldout" in data:
        outside["x_heldout"] = np.arange(len(data["x_heldout"]))
    return torch.cat([train.images_of(data, np.sort(rng.permutation(i)[:most]), "cpu", part)[0]
                      for part, i in outside.items()])

# ----------------------------------------------------------------------------------------------------------------------
# Three targets for x_theta(z, t), of mean x_*(z, t), so that the loss has the same minimiser (C.7). That of faiss
# leaves out what lies beyond k neighbours: near t = 1, where all weigh alike, its mean is off if there are more than k

TARGETS = ("exact", "sampled", "faiss")


@functools.cache
def faiss_resources():                                       # one for all indices: each would take 1.5 GB for itself
    import faiss
    return faiss.StandardGpuResources()


def faiss_posterior(x, k):
    """x (N, *shape) -> posterior(z, t), the softmax r_z of C.7 over the k points that weigh most, found by Faiss:
    weights (B, k) that sum to 1, and indices (B, k).

    The nearest points to z have the largest z.x_i - alpha |x_i|^2 / 2. Faiss searches by this, an inner product of
    (z, alpha) with (x_i, -|x_i|^2 / 2), since a search by l2 would need z / alpha, which overflows near t = 1."""
    try:
        import faiss  # here, since the other targets do not need it
    except ImportError:
        raise ImportError("target faiss needs the package faiss: pip install faiss-cpu, or faiss-gpu") from None
    x = x.flatten(1).to("cpu" if x.device.type == "mps" else x.device).double()                  # mps has no float64
    x, centre = x - x.mean(0), x.mean(0)
    index = faiss.IndexFlatIP(x.shape[1] + 1)
    if x.is_cuda and hasattr(faiss, "StandardGpuResources"):
        index = faiss.index_cpu_to_gpu(faiss_resources(), x.device.index or 0, index)
    index.add(torch.cat([x, -x.square().sum(1, keepdim=True) / 2], 1).float().cpu().numpy())

    def posterior(z, t):
        t = t.to(x.device).double()[:, None]
        z = z.flatten(1).to(x.device).double() - (1 - t) * centre                                # (B, D)
        query = torch.cat([z, 1 - t], 1).float().cpu().numpy()
        i = torch.from_numpy(index.search(query, min(k, len(x)))[1]).to(x.device)                # (B, k)
        d2 = (z[:, None] - (1 - t)[:, :, None] * x[i]).square().sum(2)                           # (B, k), float64
        return torch.softmax(-d2 / (2 * t**2), 1), i
    return posterior


def make_target(kind, x, y, k=100):
    """D_score x, y -> f(z, t, y, keep, generator) -> targets (B, *shape): over the points of class y where the label is
    kept (keep (B,)), over all of D_score where it is dropped. The draws depend on the generator, one of the CPU, alone.
    differs from the paper: it has one softmax, over all of D_score. By class, plain DSM's minimiser is that of ratio 1.
    """
    E = EmpiricalScore(x, y)
    if kind == "faiss":
        groups = {None: x, **{c: x[y == c] for c in y.unique().tolist()}}
        posterior = {c: faiss_posterior(points, k) for c, points in groups.items()}

    def target(z, t, y, keep, generator):
        out = torch.empty_like(z)
        for rows, label in ((keep, y[keep]), (~keep, None)):
            if not rows.any():
                continue
            if kind == "exact":                              # differs from the paper: Eq. (6) itself is affordable
                out[rows] = E.posterior_mean(z[rows], t[rows], label)
            elif kind == "sampled":                          # Eq. (7), an image drawn from r_z, none left out
                out[rows] = x[E.sample_posterior(z[rows], t[rows], label, generator)]
            else:                                            # Eq. (7) as the paper computes it
                for c in [None] if label is None else label.unique().tolist():
                    mine = rows if c is None else keep & (y == c)
                    w, i = posterior[c](z[mine], t[mine])
                    drawn = torch.multinomial(w.cpu(), 1, generator=generator)
                    out[mine] = groups[c][i.cpu().gather(1, drawn)[:, 0]]
        return out
    return target

# ----------------------------------------------------------------------------------------------------------------------
# One network: train it, generate images, score them

SAVE_EVERY = 600                                             # seconds, after which a training that is longer is saved


def fit(cfg, net, kind, ratio, seed, device, path):
    """Train; kind "dsm" is the control, whose target is x itself. -> EMA model, E of D_score, ms of (target, step).
    A long training goes on from its checkpoint `path`."""
    data = train.load_data(cfg.data)
    score, region = subsets(data["y"], cfg.per_class, ratio, cfg.seed, cfg.balanced)
    x_score, y_score = train.images_of(data, score, device)
    arrays = [train.resident(data[k], device) for k in "xy"]
    index = lambda step: region[train.step_indices(step, net.batch, len(region), seed)]
    shape, classes = tuple(x_score.shape[1:]), data["meta"]["num_classes"]
    target = None if kind == "dsm" else make_target(kind, x_score, y_score, cfg.k)
    torch.manual_seed(seed)
    model = build_model(net.model, shape[1], shape[0], classes, prediction="x").to(device)
    update = train.Update(model, net.lr, cfg.warmup, cfg.ema)
    compiled = train.compiled(model) if train.worth_compiling(device, net.steps) else model
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None        # or the clock would show nothing
    parts, first, saved = dict(model=model, average=update.average, optimizer=update.optimizer), 0, time.time()
    if path.exists():
        checkpoint = read_weights(path)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        first = checkpoint["step"]
    clock, steps = np.zeros((net.steps, 2)), range(first, net.steps)
    for step, (x, y) in tqdm(train.feed(arrays, steps, index, device), f"{net.model} {kind} x{ratio:g}", len(steps),
                             leave=False, disable=True if cfg.workers > 1 else None):
        start = time.perf_counter()
        t, eps, drop = train.step_noise(step, (net.batch, *shape), seed, device)
        t, keep = t.clamp(min=T_MIN), drop >= cfg.label_dropout          # T_MIN: where sampling by x-prediction ends
        z = torch.lerp(x, eps, t[:, None, None, None])       # (B, C, H, W), on D_region
        wait(); before = time.perf_counter()
        if target:
            g = torch.Generator().manual_seed(1_000_003 * (seed + 500) + step)   # another stream than step_noise's
            x = target(z, t, y, keep, g)
        wait(); clock[step, 0] = time.perf_counter() - before
        y, loss = torch.where(keep, y, classes), 0.0
        for k in range(0, net.batch, cfg.at_once):
            part = slice(k, k + cfg.at_once)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                out = compiled(z[part], t[part], y[part])
            # differs from the paper: unweighted in x; alpha^2/sigma^4, that of scores, would leave only small t
            share = (out.float() - x[part]).square().mean() * (len(out) / net.batch)
            share.backward()
            loss += share.detach()
        if not loss.isfinite():
            raise ValueError(f"{net.model} diverged: the loss is {loss.item()} at step {step + 1}, lr {net.lr:g}")
        update.step(step)
        wait(); clock[step, 1] = time.perf_counter() - start
        if time.time() - saved > SAVE_EVERY and step + 1 < net.steps:
            with replacing(path) as f:
                torch.save({name: part.state_dict() for name, part in parts.items()} | dict(step=step + 1), f)
            saved = time.time()
    return update.average, EmpiricalScore(x_score, y_score), 1000 * np.median(clock[first:], axis=0)


def run(cfg, spec):
    """Spec (arch, kind, ratio, seed) -> calibrated l2 to D_score of n_samples images of one network, and a few of them;
    of plain DSM also to D_region, its own training set. Cached by all that the result depends on, so that a sweep goes
    on where it was, and another ratio or threshold costs no more than what is new."""
    arch, kind, ratio, seed = spec
    net, device = getattr(cfg, arch), pick_device(cfg.device)
    names = ["data", "per_class", "balanced", "warmup", "ema", "label_dropout", "n_samples", "sample_steps", "n",
             "seed", *(["k"] if kind == "faiss" else [])]
    key = [dataclasses.asdict(net), kind, float(ratio), seed, {name: getattr(cfg, name) for name in names}]
    key += ["probe"] if arch == "compare" else []            # what these keep beside, see below
    key += ["own"] if kind == "dsm" else []
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
    path = train.results_path("exp_freedom", cfg).parent / "runs" / f"{arch}_{kind}_{ratio:g}_{seed}_{digest}.json"
    if path.exists():
        return json.loads(path.read_text()) | dict(found=True)
    started = time.time()
    path.parent.mkdir(parents=True, exist_ok=True)
    model, E, ms = fit(cfg, net, kind, ratio, seed, device, path.with_suffix(".pt"))
    z1 = noise(range(cfg.n_samples), E.shape, seed).to(device)           # the same for every network of this seed
    y = torch.arange(cfg.n_samples, device=device) % model.num_classes
    # differs from the paper: not dopri5, whose steps, chosen for a whole batch, would differ between networks
    x = sample(model, z1, y, solver="heun", steps=cfg.sample_steps)[-1]
    shown = x[:min(10, max(1, 20_000 // E.D))]               # results.json stays small
    copies = E.x.view(-1, *E.shape)[E.nearest(shown, 1)[1][:, 0]]
    images = [to_uint8(im[:, :3] if im.shape[1] >= 3 else im[:, :1]).tolist() for im in (shown, copies)]
    result = dict(key=key, score=calibrated_l2(E, x, cfg.n).tolist(), images=images, ms=ms.tolist())
    if kind == "dsm":                                        # are its images copies of what it was trained on itself?
        data = train.load_data(cfg.data)
        region = subsets(data["y"], cfg.per_class, ratio, cfg.seed, cfg.balanced)[1]
        result["own"] = l2_to(data, region, x, cfg.n, device).tolist()
    if arch == "compare":                                    # x_theta at fixed points: noisy images from D_score
        i = np.random.default_rng(cfg.seed).integers(E.N, size=256)
        t = (torch.arange(256, device=device) + 0.5)[:, None, None, None] / 256
        z = (1 - t) * E.x.view(-1, *E.shape)[i] + t * noise(range(256), E.shape, cfg.seed + 1).to(device)
        with torch.no_grad():
            result["probe"] = model(z, t.flatten(), torch.full_like(y[:1].expand(256), model.num_classes)).tolist()
    result["seconds"] = time.time() - started
    with replacing(path) as f:
        f.write(json.dumps(result).encode())
    path.with_suffix(".pt").unlink(missing_ok=True)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def interval(f, n):
    """95% interval of the mean over seeds of fractions of n images f (seeds,), or of a difference f (seeds, 2), second
    minus first, paired by seed: Student's t, but never narrower than the n * seeds images themselves allow (binomial),
    since three seeds can agree by chance. With one seed it is of the images alone."""
    f = np.asarray(f, dtype=float).reshape(len(f), -1)       # (seeds, 1 or 2)
    seeds, images, d = len(f), n * len(f), f[:, -1] - f[:, 0] if f.shape[1] == 2 else f[:, 0]
    p = (images * f.mean(0) + 2) / (images + 4)              # drawn towards 1/2: else no copies would mean no error
    half = 1.96 * np.sqrt((p * (1 - p)).sum() / images)
    if seeds > 1: half = max(half, stdtrit(seeds - 1, 0.975) * d.std(ddof=1) / seeds**0.5)
    return d.mean() - half, d.mean() + half


def above(f, n, real, n_real):
    """Fractions of n images f (seeds,) -> their mean minus the fraction `real` of n_real real images, and the 95%
    interval of it, for the sampling errors of both."""
    d, sides = np.mean(f) - real, (interval(f, n), interval([real], n_real))
    half = np.hypot(*((high - low) / 2 for low, high in sides))
    return d, (d - half, d + half)

PAPER = {"transformer": ((1, 2, 3, 4, 8, 25.6), (0.08, 0.41, 0.67, 0.76, 0.82, 0.85)),           # read off Fig. 5c
         "unet": ((1, 2, 4, 8, 25.6), (0, 0.01, 0.05, 0.59, 0.80))}


def paper_rise(arch, first, last):
    """What the paper's curve, a straight line between its points, rises by from one ratio to another."""
    return f"{np.diff(np.interp((first, last), *PAPER[arch]))[0]:+.2f}"


def shift(exact, other):
    """How far another target moves the network, beside what another seed does: predictions (seeds, ...) of the networks
    of two targets -> (ratio - 1, interval). The ratio is of mean squared distances between networks of different
    seeds, of different targets over the same target: 1 if the targets give the same networks up to the noise of seeds.
    The interval is the jackknife's, over three seeds or more: each distance is of two seeds, so that those of one seed
    are not independent of those of the next."""
    every, (exact, other) = np.arange(len(exact)), (np.reshape(a, (len(a), -1)) for a in (exact, other))
    d = lambda a, b: np.mean((a[:, None] - b)**2, axis=2) * (every[:, None] != every)            # (seeds, seeds)
    across, within = d(exact, other) + d(other, exact), d(exact, exact) + d(other, other)
    ratio = lambda seeds: across[np.ix_(seeds, seeds)].sum() / within[np.ix_(seeds, seeds)].sum() - 1
    without = [ratio(np.delete(every, s)) for s in every]
    half = stdtrit(len(every) - 1, 0.975) * ((len(every) - 1) * np.var(without))**0.5
    return ratio(every), (ratio(every) - half, ratio(every) + half)


def check(cfg):
    """What can be wrong, before anything is trained or written. -> |D_score|, the |D_region| of all ratios."""
    for name in ("per_class", "n_seeds", "compare_seeds", "n_samples", "sample_steps", "n", "workers", "k",
                 "at_once"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(cfg, name)}")
    for net in (cfg.transformer, cfg.unet, cfg.compare):
        train.check_rates(net.lr, cfg.warmup, cfg.ema, cfg.label_dropout, cfg.seed)
    for name in ("false_copies", "threshold"):
        if (value := getattr(cfg, name)) is not None and not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value:g}")
    if cfg.target not in TARGETS:
        raise ValueError(f"unknown target {cfg.target!r}: expected {', '.join(TARGETS)}")
    if len(cfg.ratios) < 2 or cfg.ratios[0] < 1 or list(cfg.ratios) != sorted(set(cfg.ratios)):
        raise ValueError(f"ratios must be two or more, from 1 up, in ascending order, not {cfg.ratios}")
    data = train.load_data(cfg.data)
    for net in (cfg.transformer, cfg.unet, cfg.compare):
        if min(net.steps, net.batch) < 1:
            raise ValueError(f"steps and batch must be at least 1, not {net.steps} and {net.batch}")
        torch.empty(max(net.batch, cfg.n_samples), *data["x"].shape[1:])             # too many fail now, not later
        with torch.device("meta"):                           # the names and sizes fit, without building anything
            build_model(net.model, data["x"].shape[2], data["x"].shape[1], data["meta"]["num_classes"])
    if (size := cfg.per_class * len(np.unique(data["y"]))) < cfg.n:
        raise ValueError(f"D_score has {size} points, but calibrated l2 needs n = {cfg.n} neighbours: raise per_class")
    if cfg.target == "faiss":
        faiss_posterior(torch.zeros(1, 1), 1)               # ImportError if it is not there
    sizes = [len(subsets(data["y"], cfg.per_class, r, cfg.seed, cfg.balanced)[1]) for r in cfg.ratios]
    if (left := len(data["x"]) - sizes[-1] + len(data.get("x_heldout", ()))) < 1 / cfg.false_copies:
        raise ValueError(f"{left} real images outside of D_region are too few to tell the nearest "
                         f"{100 * cfg.false_copies:g}%: raise false_copies, or lower the last of the ratios")
    return size, sizes


def work(cfg):
    """What --dry-run is to foretell, with nothing found from an earlier call."""
    size = check(cfg)[0]
    data, n = train.load_data(cfg.data), len(cfg.ratios)
    args = train.sizes(data) | dict(prediction="x")
    often = dict(transformer=2 * n * cfg.n_seeds, unet=(n + 2) * cfg.n_seeds,
                 compare=(len(TARGETS) + 1) * cfg.compare_seeds)
    world = max(int(os.environ.get("WORLD_SIZE", 1)), cfg.workers)
    nets = [getattr(cfg, arch) for arch, k in often.items() for _ in range(k)]
    # x_* over D_score for every image trained on: half of the transformers, all but two U-Nets, of the comparison's
    # targets the exact one, twice, and the sampled one twice
    exact = dict(transformer=n * cfg.n_seeds, unet=n * cfg.n_seeds, compare=4 * cfg.compare_seeds)
    queries = sum(getattr(cfg, arch).steps * getattr(cfg, arch).batch * k for arch, k in exact.items())
    # each process has a checkpoint of what it trains, and while it writes the next one, two: of weights, average and
    # two moments each
    nets = [(dict(name=net.model, **args), min(net.batch, cfg.at_once), net.batch, net.steps, 8 * (i < world))
            for i, net in enumerate(nets)]
    return dict(data=data, nets=nets, images=[(net[0], cfg.n_samples * 2 * cfg.sample_steps) for net in nets],
                processes=world, queries=queries, points=size,
                held=4 * size * data["x"][:1].size + data["x"].nbytes * train.fits(data["x"], pick_device(cfg.device)))


def measure(cfg):
    """Train or find all networks; write fractions, scores, images and claims to results.json."""
    size, sizes = check(cfg)
    device, phase = processes(pick_device(cfg.device))[2], train.phases()        # under torchrun, a GPU of its own
    kinds = [k for k in TARGETS if k != "faiss" or importlib.util.find_spec("faiss")]
    if "faiss" not in kinds:
        print("faiss is not installed, so the comparison of targets goes without it: pip install faiss-cpu")
    seeds, first, last = range(cfg.seed, cfg.seed + cfg.n_seeds), cfg.ratios[0], cfg.ratios[-1]
    at = lambda arch, kind: (first, last) if (arch, kind) == ("unet", "dsm") else cfg.ratios     # ends only: it is slow
    specs = [(arch, kind, r, s) for s in seeds for arch in ("unet", "transformer") for kind in (cfg.target, "dsm")
             for r in at(arch, kind)]
    trials, done, found = range(cfg.seed, cfg.seed + cfg.compare_seeds), {}, []
    both = {"transformer and U-Net": specs,
            "longer, for the comparison of the targets": [("compare", kind, r, s) for s in trials for kind, r in
                                                          (("exact", first), *((k, last) for k in kinds))]}
    for what, part in both.items():
        done |= (new := train.run_jobs(functools.partial(run, cfg), part, cfg.workers))
        found += (earlier := [d["seconds"] for d in new.values() if d.get("found")])
        phase(f"{what}: {len(part)} networks, {len(earlier)} of them trained before, in {sum(earlier):.0f} s")

    scores = lambda arch, kind: np.array([[done[arch, kind, r, s]["score"] for s in seeds] for r in at(arch, kind)])
    curves = {arch: {kind: scores(arch, kind) for kind in (cfg.target, "dsm")} for arch in PAPER}
    each = lambda f: {arch: {kind: f(v) for kind, v in c.items()} for arch, c in curves.items()}  # v (ratios, seeds, n)
    # D_region is denser than D_score: another threshold there has the same part of real images below
    data = train.load_data(cfg.data)
    real, real_own = (l2_to(data, i, real_images(data, i, cfg.seed), cfg.n, device).numpy()
                      for i in subsets(data["y"], cfg.per_class, last, cfg.seed, cfg.balanced))
    threshold = cfg.threshold or np.quantile(real, cfg.false_copies)
    false = np.mean(real < threshold)
    own_threshold = np.quantile(real_own, false)
    fraction = each(lambda v: (v < threshold).mean(2))
    after = lambda kind, r: np.array([np.mean(np.array(done["compare", kind, r, s]["score"]) < threshold)
                                      for s in trials])      # (seeds,)
    targets = {kind: after(kind, last) for kind in kinds}
    longer = np.array([after("exact", first), targets["exact"]])                                 # (2, seeds)
    ms = {kind: np.mean([done["compare", kind, last, s]["ms"] for s in trials], axis=0) for kind in kinds}
    for kind, f in targets.items():
        low, high = interval(f, cfg.n_samples)
        print(f"target {kind:8s} ratio {last:g}, fraction of copies {f.mean():.3f} [{low:.3f}, {high:.3f}]; "
              f"{ms[kind][0]:.2f} ms of the {ms[kind][1]:.1f} ms of a step")

    def row(text, paper, pair, **bound):                     # pair (2, seeds): the second minus the first
        ci95 = interval(np.transpose(pair), cfg.n_samples)
        return train.claim(text, paper, np.mean(pair[1] - pair[0]), ci95, **bound)

    def beyond(text, i, f):                                  # fractions f (seeds,) at the first (i 0) or last (1) ratio
        sign, bound = (("<= 0", dict(high=0)), ("> 0", dict(low=0)))[i]
        return train.claim(f"{text}: copies minus those of real images: {sign}", sign,
                           *above(f, cfg.n_samples, false, len(real)), **bound)

    name = {arch: getattr(cfg, arch).model for arch in PAPER}
    grows = f"fraction of copies at ratio {last:g} minus at {first:g}"
    claims = [row(f"C3 {name[arch]}: {grows}: > 0", paper_rise(arch, first, last),
                  fraction[arch][cfg.target][[0, -1]], low=0) for arch in fraction]
    claims += [row(f"control, plain DSM, {name[arch]}: the same: < .05", "not shown",
                   fraction[arch]["dsm"][[0, -1]], high=0.05) for arch in fraction]
    claims += [beyond(f"C3 at ratio {r:g}, {name[arch]}", i, fraction[arch][cfg.target][[0, -1]][i])
               for i, r in enumerate((first, last)) for arch in fraction]
    own = {arch: np.array([np.mean(np.array(done[arch, "dsm", last, s]["own"]) < own_threshold) for s in seeds])
           for arch in fraction}                             # (seeds,)
    claims += [train.claim(f"control, plain DSM, {name[arch]}: copies from D_region minus real: <= 0",
                           "not shown", *above(f, cfg.n_samples, np.mean(real_own < own_threshold), len(real_own)),
                           high=0) for arch, f in own.items()]
    what = f"C3, {cfg.compare.steps:,} steps"
    claims += [row(f"{what}: {grows}: > 0", paper_rise("transformer", first, last), longer, low=0)]
    claims += [beyond(f"{what}, ratio {r:g}", i, longer[i]) for i, r in enumerate((first, last))]
    claims += [row(f"targets: fraction of copies with {kind} minus exact: within .1", "0",
                   (targets["exact"], targets[kind]), low=-0.1, high=0.1) for kind in kinds[1:]]
    if cfg.compare_seeds > 2:                                # two have one distance, and no interval
        probe = {kind: [np.array(done["compare", kind, last, s]["probe"]) for s in trials] for kind in kinds}
        claims += [train.claim(f"targets: {kind} moves x_theta by this part of what a seed does: < .2", "0",
                               *shift(probe["exact"], probe[kind]), high=0.2) for kind in kinds[1:]]
    thresholds = np.linspace(0, 1, 51)
    arrays = dict(ratio=np.array(sizes) / size, d_score=size, n_seeds=cfg.n_seeds, fraction=fraction, own=own,
                  targets=targets, ms=ms, thresholds=thresholds, threshold=threshold, own_threshold=own_threshold,
                  longer=longer, longer_interval=[interval(f, cfg.n_samples) for f in longer],
                  real=dict(n=len(real), n_own=len(real_own), fraction=false,
                            sweep=(real[:, None] < thresholds).mean(0)),
                  sweep=each(lambda v: (v[..., None] < thresholds).mean((1, 2))),
                  interval=each(lambda v: [interval(f, cfg.n_samples) for f in (v < threshold).mean(2)]),
                  images=[np.array(done["transformer", cfg.target, r, cfg.seed]["images"]) for r in (first, last)])
    started = phase.started - sum(found) / cfg.workers       # `seconds` is what all of it takes
    train.save_results("exp_freedom", cfg, device, started, arrays, claims)

# ----------------------------------------------------------------------------------------------------------------------
# Drawing

BLUE, SKY = "#0072B2", "#56B4E9"                             # supervision is blue: here there is more and more of it
GREY, GREEN = "#555555", "#009E73"
STYLE = {"transformer": ("-", BLUE, "o"), "unet": ("--", SKY, "s")}


def caption(results):
    """What the figure says, in words and numbers that follow from the claims."""
    a, c, cfg = results["arrays"], results["claims"], results["config"]
    real, first, last = a["real"], a["ratio"][0], a["ratio"][-1]
    number = lambda c: f"{c['ours']:+.2f} [{c['ci95'][0]:+.2f}, {c['ci95'][1]:+.2f}]"
    rises = {"holds": "more copies", "contradicted": "fewer copies", "not resolved": "not resolved"}
    other = rises | {"holds": "no more", "contradicted": "more copies"}
    agree = {"holds": "agree", "contradicted": "differ", "not resolved": "agree or not: unresolved"}
    lines = [f"A copy is nearer than {100 - 100 * real['fraction']:.0f}% of {real['n']:,} real images outside of "
             f"$D_{{score}}$ are: calibrated $\\ell_2$ < {a['threshold']:.3g}."]
    for arch, rise, control, few, many in zip(STYLE, c[:2], c[2:4], c[4:6], c[6:8], strict=True):
        lines += [f"{cfg[arch]['model']} in the largest region against the smallest: {rises[rise['verdict']]}, "
                  f"{number(rise)}; by plain DSM {other[control['verdict']]}, {number(control)}.",
                  f"    Against real images: at ratio {first:.3g} {other[few['verdict']]}, {number(few)}; at "
                  f"{last:.3g} {rises[many['verdict']]}, {number(many)}."]
    lines.append(f"Plain DSM at ratio {last:.3g}, copies of any image that it was trained on, against real images: " +
                 "; ".join(f"{other[own['verdict']]}, {number(own)}" for own in c[8:10]) + ".")
    lines.append(f"{cfg['compare']['model']} after {cfg['compare']['steps']:,} steps: {rises[c[10]['verdict']]}, "
                 f"{number(c[10])}.\n    Against real images: at ratio {first:.3g} {other[c[11]['verdict']]}, "
                 f"{number(c[11])}; at {last:.3g} {rises[c[12]['verdict']]}, {number(c[12])}.")
    same = "; ".join(f"exact and {k} {agree[row['verdict']]}" for k in a["targets"]
                     for row in train.starting(results, f"targets: fraction of copies with {k} "))
    copies = ", ".join(f"{k} {np.mean(f):.2f}" for k, f in a["targets"].items())
    lines += [f"There, copies by target: {copies} ({same})." if same else "",
              f"{cfg['data']}, $|D_{{score}}|$ = {a['d_score']:,}, {a['n_seeds']} seed(s), {cfg['n_samples']} images "
              "each; bands, brackets: 95%. Grey: the paper."]
    return "\n".join(line for line in lines if line)


def plot(path):
    """results.json -> results.png beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = json.loads(Path(path).read_text())
    a, cfg = results["arrays"], results["config"]
    kind, ratios = cfg["target"], np.array(a["ratio"])
    fig = plt.figure(figsize=(10, 8.8))
    place = lambda top, bottom, widths, wspace: fig.add_gridspec(1, 2, left=0.09, right=0.985, top=top, bottom=bottom,
                                                                 wspace=wspace, width_ratios=widths).subplots()
    for ax, letter, which in zip(place(0.96, 0.85, (1, 1), 0.16), "ab", (0, -1), strict=True):
        images = np.array(a["images"][which], np.uint8)      # (2, shown, H, W, 1 or 3), and a white line between them:
        images = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
        _, n, H, W, C = images.shape
        ax.imshow(images.transpose(0, 2, 1, 3, 4).reshape(2 * H, n * W, C), cmap="gray", vmin=0, vmax=255)
        copies = f"{100 * np.mean(a['fraction']['transformer'][kind][which]):.0f}% are copies"
        ax.set_title(f"({letter}) $|D_{{region}}| = {ratios[which]:.3g}\\,|D_{{score}}|$: {copies}", fontsize=11)
        ax.set_yticks([H / 2, 1.5 * H], ["generated", "nearest in\n$D_{score}$"] if letter == "a" else [], fontsize=9)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)

    ax, sweep = place(0.795, 0.41, (1.3, 1), 0.24)
    shades = plt.get_cmap("Blues")(np.linspace(0.35, 1, len(ratios)))
    # heights of different thresholds do not compare: the paper's curves have a scale of their own
    top = 1.05 * max(np.max(part) for part in (a["longer_interval"], *(a["interval"][arch][kind] for arch in STYLE)))
    right = ax.secondary_yaxis("right", functions=(lambda f: f / top, lambda f: f * top))
    right.set_ylabel("the paper's fraction (threshold not given)", color="0.5", fontsize=9)
    right.tick_params(labelcolor="0.5")
    ax.axhline(a["real"]["fraction"], color=GREEN, lw=2, ls=":")
    ax.text(25.6, a["real"]["fraction"] + 0.01 * top, "real images", color=GREEN, fontsize=10, ha="right", va="bottom")
    sweep.plot(a["thresholds"], a["real"]["sweep"], color=GREEN, lw=2, ls=":", label="real images")
    ax.plot(ratios[[0, -1]], np.mean(a["longer"], axis=1), "-.", color=BLUE, lw=2.2, marker="^", ms=6,
            label=f"{cfg['compare']['model']}, target $x_*$, {cfg['compare']['steps']:,} steps")
    ax.fill_between(ratios[[0, -1]], *np.clip(a["longer_interval"], 0, 1).T, color=BLUE, alpha=0.15, lw=0)
    for arch, (line, colour, marker) in STYLE.items():
        for which, c, label in ((kind, colour, "target $x_*$"), ("dsm", "black", "plain DSM")):
            mean = np.mean(a["fraction"][arch][which], axis=1)
            r = ratios if len(mean) == len(ratios) else ratios[[0, -1]]
            ax.plot(r, mean, line, color=c, lw=2.2, marker=marker, ms=5, label=f"{cfg[arch]['model']}, {label}")
            ax.fill_between(r, *np.clip(a["interval"][arch][which], 0, 1).T, color=c, alpha=0.15, lw=0)
        ax.plot(PAPER[arch][0], top * np.array(PAPER[arch][1]), line, color="0.7", lw=1.5, marker=".", zorder=1,
                label=f"paper: {'SiT-L/2' if arch == 'transformer' else 'UNet-B'} (scale on the right)")
        for ratio, shade, fractions in zip(ratios, shades, a["sweep"][arch][kind], strict=True):
            sweep.plot(a["thresholds"], fractions, line, color=shade, lw=1.8,
                       label=f"ratio {ratio:.3g}" if line == "-" else None)
        sweep.plot(a["thresholds"], a["sweep"][arch]["dsm"][-1], line, color="black", lw=1.5,
                   label=f"plain DSM, {ratios[-1]:.3g}" if line == "-" else None)
    ax.set_title("(c) one target, asked for in larger regions (Fig. 5c)", fontsize=11)
    ax.set(xscale="log", xlabel="$|D_{region}|\\ /\\ |D_{score}|$", ylim=(-0.03 * top, 1.03 * top),
           ylabel=f"fraction of copies (calibrated $\\ell_2$ < {a['threshold']:.3g})")
    ax.set_xticks(ticks := sorted({*cfg["ratios"], 25.6}), [f"{r:g}" for r in ticks])
    ax.minorticks_off()
    ax.legend(fontsize=9, loc="upper left", bbox_to_anchor=(-0.1, -0.16), ncols=2, frameon=False, handlelength=2.4,
              columnspacing=1.2)
    sweep.set_title("(d) fraction below any threshold", fontsize=11)
    sweep.axvline(a["threshold"], color=GREY, lw=1, ls=":")
    sweep.text(a["threshold"] - 0.01, 1, "as in (c)", fontsize=9, rotation=90, ha="right", va="top", color=GREY)
    sweep.set(xlim=(0, 1), ylim=(-0.03, 1.03), xlabel="threshold of calibrated $\\ell_2$")
    sweep.legend(fontsize=9, loc="lower right", framealpha=0.9, handlelength=1.4)
    fig.text(0.02, 0.012, caption(results), fontsize=9, linespacing=1.4)
    with replacing(Path(path).with_suffix(".png")) as f:
        fig.savefig(f, dpi=110)
    plt.close(fig)

if __name__ == "__main__":
    cli(lambda cfg: train.experiment("exp_freedom", cfg, measure, plot, work), PRESETS)
