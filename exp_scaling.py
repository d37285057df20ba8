"""
Figures 3, 6 and 7: selective underfitting, REPA, and the scaling law taken apart; and when Figure 3 is true.

Fig. 3 (C.5): as compute grows, the error against the empirical score x_* falls on noised training points and *grows*
along the model's own trajectories. Both are E_t |x_theta(z_t, t) - x_*(z_t, t)|^2 / d, x_theta = z - t v_theta:

    E^sup   z_t = (1 - t) x + t eps, x from the training set        E^ext   z_t on the ODE's way from noise, w = 1

Fig. 6: REPA changes the learned score more along trajectories than on training points. Fig. 7 (Eq. 5): Frechet distance
= f_extrapolation(L), a straight line in the supervision loss L, lower for REPA and for convolutions.

    python exp_scaling.py                # trains everything; about 20 minutes on 2 CPU cores
    python exp_scaling.py --only fig3    # or fig6, fig7, dial, onset: the networks of one part; the rest if it is there
    torchrun --nproc_per_node=4 -- exp_scaling.py --preset paper     # ImageNet latents; every GPU trains its own
    python exp_scaling.py --preset paper --model-path SiT-S.pt SiT-XL.pt     # Figure 3 of given weights; or of one

Everything is trained here, by train.py, on four kinds of images: random 1/f fields (16 x 16; the true posterior mean is
a Wiener filter, the limit of both errors), digits, mixtures of the two (the *dial*), and crops of photographs of brick,
grass and gravel (the *onset* of memorization). In the paper E^sup changes by 2.7%, E^ext by half a percent: to see as
little, all networks get the same points, noise and starting noise, and intervals (95%) are of paired differences, over
768 points or trajectories. They cover the seed of the training on the plateau (below) and in Figures 6 and 7: elsewhere
one network of each kind is trained.

Where the paper leaves it open: Fig. 3 is taken to be x-space, and Fig. 7 v-space, |x_theta - x_*|^2 / t^2 (t_min .031,
half a step of the grid), as the ratio of their published levels, 3.8, suggests; the script measures that ratio. E^ext
in v-space, which t_min alone decides, is in the JSON only. So are the unconditional errors (of an eighth of the points;
the headline is class-conditional) and the paper's count of compute, 2 x MACs, forward only, beside the true FLOPs.

What you should see: results.png is what the paper shows, results_when.png asks when it is so. *Fig. 3:* the supervision
half holds, the extrapolation half is contradicted, on the fields, over size and over length. Their limit says why:
x_theta of the true density has an E^ext too, which all these networks reach from above; from there the only way is into
memorization, which lowers it. Fields of half the contrast hold the networks up on a *plateau* before they learn any
structure; E^ext changes over size by half a percent to two there. So small a change is what another seed does as well,
but over five networks of each kind it falls, too; for either length alone they do not tell.
*Fig. 6:* REPA changes the network more along trajectories than on training points, by a seventh, nearly all of it at
small t (not "greatly"); and so does a change of seed, by all but as much. *Fig. 7:* the distance grows with L along a
line; U-Nets have a far lower distance than transformers at equal L, as the paper says, and a higher L at equal compute;
both together, they are no worse here. REPA changes neither L nor, beyond what seeds do, the distance (it is one block
deep here, its teacher a small classifier, the runs short). *Dial:* E^ext falls with size at every a.
*Onset:* on 1,000 crops E^ext falls from the start, and fewer of the samples are copies than of new crops, which overlap
the old ones: no mark of memorization.

Networks and their measurements are kept in out/exp_scaling/<preset>/runs/, named by what they depend on: the same
command goes on after an interrupt, another length or trajectory count costs no more than what is new.
It needs model.py, empirical_score.py, sample.py and train.py beside it. (Three figures, six sweeps, their data and the
Frechet distance make this file longer than the others.)

Try this, after a first run, most of whose networks are found again; the answers are in the table that is printed last.
(Each overwrites the results and the pictures; the first command, given again, brings them back.)
1. python exp_scaling.py --only onset --threshold 0.5     How much does "memorized" depend on what is called a copy? See
   "copies, samples minus new crops": does it come nearer to 0?
2. python exp_scaling.py --only fig3 --n-times 8    What depends on the grid of t? Not "v-space over x-space": E^sup has
   a finite limit in v-space as t falls to 0. But see "why": twice the step, and the solver's error is in E^ext.
3. python exp_scaling.py --only dial --amounts 0 1 --dial.lengths 250    Is the dial a matter of the moment? See "digits
   alone" and "fields alone" for networks half as old: do both slopes keep their sign?
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "torchdiffeq==0.2.5", "scipy==1.17.1", "matplotlib==3.11.2",
#                 "tqdm==4.70.1", "tyro==1.0.17", "mlxtend==0.25.0", "scikit-learn==1.9.1", "scikit-image==0.26.0"]
# ///
import functools
import hashlib
import json
import os
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import stdtrit
from scipy.stats import linregress
from torch import nn

import sample
import train
from empirical_score import EmpiricalScore
from model import build_model
from sample import check_fit, cli, frechet, gaussian, load_run, noise, pick_device, processes, replacing, wait_for_all


@dataclass
class Ladder:
    models: tuple[str, ...]  # names of model.py, small to large
    lengths: tuple[int, ...]  # training iterations after which each is measured: checkpoints of one run


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    only: Literal["all", "fig3", "fig6", "fig7", "dial", "onset"] = "all"  # what to train for
    model_path: tuple[str, ...] = ()  # official SiT weights, or runs: Figure 3 of these, and nothing is trained
    # Figure 3, on 1/f fields
    fig3: Ladder = field(default_factory=lambda: Ladder(
        ("SiT-pico/4", "SiT-nano/4", "SiT-micro/4", "SiT-tiny/4"), (250, 500, 1000)))
    # the same on fields of half the contrast, of which networks so small learn hardly anything
    plateau: Ladder = field(default_factory=lambda: Ladder(("SiT-pico/4", "SiT-nano/4"), (250, 500)))
    plateau_seeds: int = 5  # networks of each model of the plateau: there, a seed changes as much as size does
    # Figures 6 and 7, on digits: SiTs, with every lambda
    fig7: Ladder = field(default_factory=lambda: Ladder(("SiT-nano/2", "SiT-micro/2"), (300, 600)))
    larger: tuple[str, ...] = ()  # SiTs of Figure 7c alone, without REPA, measured at fig7's lengths
    fig7_seeds: int = 3  # networks of each kind of Figure 7: the points are their means, the intervals over them, too
    # Figure 7c: each with attention, and without
    unets: Ladder = field(default_factory=lambda: Ladder(("UNet-pico", "UNet-nano"), (100, 200)))
    # for each of the amounts
    dial: Ladder = field(default_factory=lambda: Ladder(("SiT-pico/4", "SiT-nano/4", "SiT-micro/4"), (500,)))
    # on crops of photographs, n_onset of them
    onset: Ladder = field(default_factory=lambda: Ladder(("SiT-nano/4", "SiT-micro/4"), (250, 500, 1000, 2000)))
    amounts: tuple[float, ...] = (0, 0.5, 1)  # a of the dial's (1 - a) digit + a field: 0 is digits alone
    lambdas: tuple[float, ...] = (0, 0.25, 0.5, 1)  # of REPA; the first must be 0
    repa_depth: int = 1  # the block after which REPA looks at the tokens
    data: str = ""  # a data set under data/ for Figures 3, 6 and 7, in place of the sets made here
    contrast: float = 1  # standard deviation of the pixels of every set made here; 1 as in latents
    n_data: int = 20_000  # training images of each set
    n_onset: int = 1_000  # training images of the onset's: fewer, so that memorization comes early
    n_trajectories: int = 768  # and as many noised training images; Figure 6 takes twice as many
    n_times: int = 16  # times t = (k + 1/2)/n_times, which are also the steps of Heun's method
    batch: int = 128  # images a step
    accum: int = 1  # gradient accumulation, where they do not fit into memory at once
    lr: float = 1e-3  # of AdamW, constant after the warmup
    warmup: int = 50  # steps over which the learning rate rises
    ema: float = 0.999  # decay of the averaged weights, reached gradually
    label_dropout: float = 0.1  # fraction of labels replaced by the null label, that of no class
    n: int = 50  # neighbours in calibrated l2
    threshold: float = 0.25  # of calibrated l2, below which a sample is a copy
    reference: str = ""  # with --data: images, or ADM's statistics, for the FID of Figure 7
    vae: str = ""  # with --data: the autoencoder that decodes its latents, as in sample.py
    n_fid: int = 50_000  # with --data: samples for each FID
    workers: int = 2  # networks trained at once, in processes of one thread each; 1: in this process, for a GPU
    seed: int = 0  # of data, weights, batches and noise
    device: str = "cpu"  # cpu, auto, cuda, mps; networks as small as the laptop preset's are at home on a CPU
    redraw: bool = False  # draw the figure again from results.json, and measure nothing
    dry_run: bool = False  # check data, memory and disk, say what would run and for how long, and stop
    out: str = ""  # folder of the results; default out/exp_scaling/<preset>


FOUR, PAPER = ("SiT-tiny/4", "SiT-S/4", "SiT-B/4", "SiT-L/4"), (200_000, 300_000, 400_000)
PRESETS = {
    "laptop": Config(),
    # the same sets, with more images and networks from the paper's ladder
    "gpu": Config("gpu", fig3=Ladder(FOUR, (1000, 2000, 4000)), plateau=Ladder(FOUR[:2], (200, 400)),
                  fig7=Ladder(("SiT-tiny/2", "SiT-S/2", "SiT-B/2"), (1000, 2000, 4000)),
                  unets=Ladder(("UNet-tiny", "UNet-XS", "UNet-S"), (1000, 2000, 4000)),
                  dial=Ladder(FOUR[:3], (2000,)), onset=Ladder(FOUR[:3], (1000, 2000, 4000, 8000)), n_data=100_000,
                  n_onset=20_000, repa_depth=3, batch=256, lr=3e-4, warmup=200, workers=1, device="auto"),
    # C.1, C.5 and C.8 of the paper; under torchrun every GPU trains networks of its own
    "paper": Config("paper", fig3=Ladder(("SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2"), PAPER),
                    fig7=Ladder(("SiT-S/2", "SiT-B/2"), PAPER), fig7_seeds=1, larger=("SiT-L/2",),
                    unets=Ladder(("UNet-XS", "UNet-S", "UNet-B", "UNet-L"), PAPER), data="imagenet",
                    n_trajectories=1000, n_times=100, repa_depth=8, batch=256, accum=4, lr=1e-4, warmup=0, ema=0.9999,
                    workers=1, device="auto", vae="stabilityai/sd-vae-ft-ema"),
}

# ----------------------------------------------------------------------------------------------------------------------
# The data: images of 16 x 16, of mean 0 and one variance, and digits once more, 8 x 8, for the Fréchet distance

def spectrum(side):
    """(side, side) variance of the Fourier modes (orthonormal FFT) of the fields: 1/f amplitude, pixel variance 1."""
    f = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    S = 1 / np.maximum(f, 1 / side)**2                       # the mean of an image varies like its longest wave
    return S / S.mean()


def fields(n, side, rng):
    """(n, 1, side, side) Gaussian random fields of that spectrum."""
    white = np.fft.fft2(rng.standard_normal((n, 1, side, side)), norm="ortho")
    return np.fft.ifft2(white * np.sqrt(spectrum(side)), norm="ortho").real


def digits(n, side, rng, part="x"):
    """n digits of mnist5k, each shifted at random by up to two pixels, averaged down to side x side; and the labels."""
    data = train.load_data("mnist5k")
    N = len(data[part])
    i = rng.permutation(np.arange(-(-n // N) * N) % N)[:n]
    x, shift = np.full((n, 1, 32, 32), -1.0, dtype=np.float32), rng.integers(0, 5, (n, 2))
    for k in range(n):
        x[k, :, shift[k, 0]:shift[k, 0] + 28, shift[k, 1]:shift[k, 1] + 28] = data[part][i[k]]
    w = 32 // side
    return x.reshape(n, 1, side, w, side, w).mean((3, 5)), data[part.replace("x", "y")][i]


def crops(n, side, rng):
    """n crops from three photographs of scikit-image, in one of the 8 symmetries of the square; which of the three."""
    from skimage import data
    images = [getattr(data, name)() / 127.5 - 1 for name in ("brick", "grass", "gravel")]
    y, x = rng.integers(0, 3, n), np.empty((n, 1, side, side))
    for k in range(n):
        r, c = (rng.integers(0, s - side + 1) for s in images[y[k]].shape)
        crop = np.rot90(images[y[k]][r:r + side, c:c + side], rng.integers(4))
        x[k, 0] = crop.T if rng.integers(2) else crop
    return x, y


def dataset(cfg, name):
    """Folder of the set `name`, made if it is not there: "onset" (textures), "digits8" with the teacher's features, or
    "dial<a>": (1 - a) digit + a field. So dial0 is digits, and dial1 the fields, whose labels then mean nothing;
    "plateau" are fields of half the contrast. With --data there is but that one."""
    if cfg.data:
        return cfg.data
    n, patch = cfg.n_onset if name == "onset" else cfg.n_data, cfg.fig7.models[0].split("/")[1]
    kind = dict(digits8=f"digits8-{patch}", onset="crops").get(name, name)
    folder = train.results_path("exp_scaling", cfg).parent / "data" / f"{kind}_{n}_{cfg.contrast:g}_{cfg.seed}"
    if folder.exists():
        return str(folder)
    rng, held, contrast = np.random.default_rng([cfg.seed, 0]), {}, cfg.contrast * (0.5 if name == "plateau" else 1)
    a = 1.0 if name == "plateau" else float(name.removeprefix("dial")) if "dial" in name else 0.0
    if name == "onset":
        x, y = crops(n, 16, rng)
        held = dict(zip(("x_heldout", "y_heldout"), crops(2000, 16, rng), strict=True))
    else:
        x, y = digits(n, side := 8 if name == "digits8" else 16, rng)
        if name == "digits8":
            held = dict(zip(("x_heldout", "y_heldout"), digits(2000, 8, rng, "x_heldout"), strict=True))
        elif a:
            x = (1 - a) * x + a * fields(n, side, rng)
    mean, scale = (0, 1) if a == 1 else (x.mean(), x.std())  # fields have these, in the mean over all sets
    arrays = {k: v.astype(np.int64) if k[0] == "y" else (contrast * (v - mean) / scale).astype(np.float32)
              for k, v in (dict(x=x, y=y) | held).items()}
    meta = dict(name=name, num_classes=int(y.max()) + 1, shape=list(x.shape[1:]),
                scaling=f"mean 0, standard deviation {contrast:g}",
                source="scikit-image" if name == "onset" else "mnist5k, and random fields")
    if name == "digits8":
        teacher = classifier(arrays, cfg.seed, int(patch))
        meta["teacher_accuracy"] = teacher.accuracy
        with torch.no_grad():                                # (N, T, 48), where train.py looks for them
            arrays["features"] = teacher.tokens(torch.from_numpy(arrays["x"])).half().numpy()
    train.save_dataset(folder, arrays, meta)
    return str(folder)


class Wiener:
    """The velocity of the fields' true density N(0, S), S the spectrum times contrast^2, in Fourier space mode by mode.
    It is linear in z, and has the interface of a network: its errors are those of a perfect generalizer.

        E[x|z] = alpha S / (alpha^2 S + sigma^2) z,   E[eps|z] = sigma / (alpha^2 S + sigma^2) z,   v = E[eps - x|z]
    """
    prediction = "v"

    def __init__(self, side, contrast=1.0, num_classes=10):
        self.S, self.num_classes = torch.from_numpy(contrast**2 * spectrum(side)).float(), num_classes

    def __call__(self, z, t, y=None):
        t, S = torch.as_tensor(t, device=z.device).reshape(-1, 1, 1, 1), self.S.to(z.device)
        gain = (t - (1 - t) * S) / ((1 - t)**2 * S + t**2)
        return torch.fft.ifft2(torch.fft.fft2(z) * gain).real


# ----------------------------------------------------------------------------------------------------------------------
# REPA, and what measures a Fréchet distance: two networks that have as little as possible in common

class Teacher(nn.Module):
    """Convolutions; trained to tell the labels. Its features at the SiT's token grid are what REPA aligns to.

    It differs from Judge in architecture, input statistics and seed. Were they the same network, REPA would be trained
    towards the very features by which its samples are judged, and the distance could fall without better images."""
    def __init__(self, patch, classes, dim=48):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(32, dim, 3, padding=1, stride=patch), nn.SiLU())
        self.head = nn.Linear(dim, classes)

    def tokens(self, x):                                     # (B, 1, H, H) -> (B, T, dim), T in the SiT's order
        return self.body(x).flatten(2).transpose(1, 2)

    def forward(self, x):
        return self.head(self.tokens(x).mean(1))


class Judge(nn.Module):
    """A perceptron; trained to tell the labels. Its 64 features stand for Inception's 2048."""
    def __init__(self, pixels, classes, dim=64):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.SiLU(), nn.Linear(256, dim), nn.SiLU())
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        return self.head(self.body(x))


def classifier(data, seed, patch=None):
    """The Teacher (given the SiT's patch), or else the Judge, trained on x and y of `data`; with its held-out accuracy
    as .accuracy."""
    x, y, x_held, y_held = (torch.from_numpy(np.array(data[k])) for k in ("x", "y", "x_heldout", "y_heldout"))
    torch.manual_seed(seed + (2000 if patch else 1000))
    net = Teacher(patch, int(y.max()) + 1) if patch else Judge(x[0].numel(), int(y.max()) + 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    for step in range(800):
        i = train.step_indices(step, min(256, len(x)), len(x), seed + 3)
        F.cross_entropy(net(x[i]), y[i]).backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval().requires_grad_(False)
    net.accuracy = (net(x_held).argmax(1) == y_held).double().mean().item()
    return net


# ----------------------------------------------------------------------------------------------------------------------
# One network: train it; measure it at each of its lengths

class Job(NamedTuple):
    data: str  # a name that dataset() knows; with --data there is but one
    model: str
    lengths: tuple
    lam: float = 0.0  # of REPA
    seed: int = 0  # added to cfg.seed

    def name(self): return f"{self.data}_{self.model.replace('/', '-')}_{self.lam:g}_{self.seed}"


FREE = 8                                                     # unconditional errors are of this part of the points


def digest(*what):
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


def paths(cfg, job):
    """The folder of the run, and one file of measurements for each length; named by all that they depend on."""
    runs = train.results_path("exp_scaling", cfg).parent / "runs"
    measuring = [cfg.n_trajectories, cfg.n_times, cfg.n, FREE]
    if job.model in cfg.model_path:                          # which file it is tells its size and its time
        file = Path(job.model) if Path(job.model).is_file() else Path(job.model) / "ckpt.pt"
        stamp = [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns, job.data, cfg.n_data, cfg.contrast]
        folder = runs / f"{file.stem}_{digest(stamp)}"
        return folder, [folder / f"measured_{digest(measuring, cfg.seed)}.npz"]
    training = [cfg.n_onset if job.data == "onset" else cfg.n_data, cfg.batch, cfg.lr, cfg.warmup, cfg.ema,
                cfg.contrast, cfg.label_dropout, cfg.seed, cfg.repa_depth if job.lam else 0]
    training = [*map(float, training), cfg.data]             # 1 and 1.0 are the same
    folder = runs / f"{Path(job.name()).name}_{digest(job.name(), training)}"        # --data may be a whole path
    return folder, [folder / f"measured_{k}_{digest(measuring)}.npz" for k in job.lengths]


def times(cfg):                                              # (T,): the middles of the steps of Heun's method
    # differs from the paper: it draws times at random; common ones make the paired differences small
    return (np.arange(cfg.n_times) + 0.5) / cfg.n_times


def fit(cfg, job, steps):
    """Train, or find, or go on with the network of a job. -> its averaged weights after so many `steps`, a model."""
    folder = paths(cfg, job)[0]
    missing = [k for k in {*job.lengths, steps} if not (folder / f"ema_{k}.pt").exists()]
    if missing:
        found = train.newest_checkpoint(folder)
        if found and found["step"] >= min(missing):          # it ran past a length that was not asked for then
            for p in folder.glob("ckpt*.pt"):
                p.unlink()
        train.train(train.Config(
            data=dataset(cfg, job.data), model=job.model, steps=max(missing), batch=cfg.batch, accum=cfg.accum,
            lr=cfg.lr, warmup=cfg.warmup, ema=cfg.ema, label_dropout=cfg.label_dropout, repa=job.lam,
            repa_depth=cfg.repa_depth, seed=cfg.seed + job.seed, log_every=500, save_every=10_000,
            compile=train.worth_compiling(pick_device(cfg.device), max(missing)),
            keep=tuple(missing), grid=False, device=cfg.device, out=str(folder)), alone=True)
        (folder / "ckpt.before.pt").unlink(missing_ok=True)  # of one that is done, a third of the disk that it takes
    return load_run(folder / f"ema_{steps}.pt", pick_device(cfg.device))[0]


@functools.cache
def given(path):                                             # build_model's arguments for a network of --model-path
    return train.args_of(*load_run(path))


def along(f, z, t, *args):                                   # f at every time of z (T, B, C, H, W), stacked alike
    return torch.stack([f(zk, tk, *args) for zk, tk in zip(z, t, strict=True)])


@functools.lru_cache(8)
def probe(folder, n, n_times, seed, device):
    """Common random numbers: what every network of one data set is asked, the same for all. The empirical score at the
    noised training points does not depend on the network, and is computed once."""
    data, started = train.load_data(folder), time.time()
    E = EmpiricalScore(train.resident(data["x"], device), data["y"], device=device)
    i = np.random.default_rng([seed, 1]).permutation(np.arange(-(-n // E.N) * E.N) % E.N)[:n]
    x, y_sup = train.images_of(data, i, device)
    t = ((np.arange(n_times) + 0.5) / n_times).tolist()
    eps, z1 = noise(range(n), E.shape, seed + 1).to(device), noise(range(n), E.shape, seed + 2).to(device)
    z = torch.stack([torch.lerp(x, eps, tk) for tk in t])    # (T, n, C, H, W): the same eps at all t
    y_ext, few = torch.arange(n, device=device) % data["meta"]["num_classes"], -(-n // FREE)
    x_star, x_free = along(E.posterior_mean, z, t, y_sup), along(E.posterior_mean, z[:, :few], t)
    return SimpleNamespace(E=E, t=t, z=z, y_sup=y_sup, z1=z1, y_ext=y_ext, x_star=x_star, x_free=x_free, few=few,
                           seconds=time.time() - started)


@torch.no_grad()
def data_prediction(model, z, t, y):                         # x_theta = z - t v_theta, (B, C, H, W); y None: no label
    return z - t * sample.velocity(model, z, t, y)


@torch.no_grad()
def trajectories(model, z1, y, t):
    """Heun's method from z1 at 1 over the times t (ascending) down to 0, w = 1. -> z and x_theta at these times, both
    (T, B, C, H, W), t ascending, and the samples. sample.sample would evaluate the network twice at every z."""
    # differs from the paper: dopri5, whose steps would depend on the network, and on the batch
    z, path, mean = z1, [], []
    for a, b in pairwise([1.0, *t[::-1], 0.0]):
        v = sample.velocity(model, z, a, y)
        path.append(z)
        mean.append(z - a * v)
        z = z + (b - a) / 2 * (v + sample.velocity(model, z + (b - a) * v, b, y))
    return torch.stack(path[:0:-1]), torch.stack(mean[:0:-1]), z         # without t = 1, of which nobody asks


def per_dim(a):                                              # |a|^2 / d: (T, B, C, H, W) -> (B, T), float64, numpy
    return a.flatten(2).cpu().double().square().mean(2).T.numpy()        # (MPS has no float64)


def neighbours(E, x, n):                                     # squared distances to the n nearest (B, n), calibrated l2
    d2 = E.nearest(x.cpu().double(), min(n, E.N))[0].numpy()                                     # ascending
    return d2, d2[:, 0] / d2.mean(1)


def evaluate(model, p, n=50, both=True):
    """E^sup and E^ext of one model, (n_trajectories, T), x-space, per dimension; `_free`: the same without labels, the
    null label against x_* over all of D, on the first eighth. Samples, their neighbours, and the seconds spent on
    the empirical score and altogether. Not `both`: E^sup and samples alone, for Figure 7."""
    started, out, x_theta = time.time(), {}, functools.partial(data_prediction, model)
    path, on_path, samples = trajectories(model, p.z1, p.y_ext, p.t)
    out |= dict(sup=per_dim(along(x_theta, p.z, p.t, p.y_sup) - p.x_star), samples=samples.half().cpu().numpy())
    empirical = 0.0
    if both:
        out["sup_free"] = per_dim(along(x_theta, p.z[:, :p.few], p.t, None) - p.x_free)
        free, before = along(x_theta, path[:, :p.few], p.t, None), time.time()
        out["ext"] = per_dim(on_path - along(p.E.posterior_mean, path, p.t, p.y_ext))
        out["ext_free"] = per_dim(free - along(p.E.posterior_mean, path[:, :p.few], p.t))
        empirical = time.time() - before
        d2, calibrated = neighbours(p.E, samples, n)
        out |= dict(calibrated=calibrated, distance=np.sqrt(d2[:, 0] / p.E.D))
    return out | dict(seconds=np.array([empirical, time.time() - started, 0]))


def run(cfg, job):
    """Train and measure one network, or find it done."""
    device = pick_device(cfg.device)
    for steps, path in zip(job.lengths, paths(cfg, job)[1], strict=True):
        if not path.exists():
            started = time.time()
            model = Wiener(16, cfg.contrast * (0.5 if job.data == "plateau" else 1)) if job.model == "Wiener" else \
                load_run(job.model, device)[0] if job.model in cfg.model_path else fit(cfg, job, steps)
            p = probe(dataset(cfg, job.data), cfg.n_trajectories, cfg.n_times, cfg.seed, device)
            result = evaluate(model, p, cfg.n, job.data != "digits8")
            result["seconds"] += [p.seconds, p.seconds, 0]   # of the probe, which counts once
            result["seconds"][2] = time.time() - started
            p.seconds = 0
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as f:
                np.savez(f, **result)


def parts_of(cfg):                                           # the parts of the figure that there can be
    return ("fig3", "fig6", "fig7", "dial", "onset")[:1 if cfg.model_path else 3 if cfg.data else 5]


def jobs(cfg, part):
    """The networks that a part of the figure needs."""
    every = lambda data, rungs: [Job(data, m, rungs.lengths) for m in rungs.models]
    if part in ("fig6", "fig7"):
        models = cfg.fig7.models[-1:] if part == "fig6" else cfg.fig7.models
        out = [job._replace(lam=lam) for job in every("digits8", Ladder(models, cfg.fig7.lengths))
               for lam in cfg.lambdas]
        if part == "fig7":
            out += every("digits8", Ladder(cfg.larger, cfg.fig7.lengths))
            out += [job._replace(model=job.model + kind) for job in every("digits8", cfg.unets)
                    for kind in ("", "-conv")]
        out = [job._replace(seed=s) for s in range(cfg.fig7_seeds) for job in out]
        if part == "fig6" and cfg.fig7_seeds == 1:           # the control: what changes from seed to seed
            out.append(Job("digits8", models[0], cfg.fig7.lengths[-1:], seed=1))
    elif part == "dial":
        out = [job for a in cfg.amounts for job in every(f"dial{a:g}", cfg.dial)]
    elif part == "onset":
        out = every("onset", cfg.onset)
    else:
        out = every("dial1", Ladder(cfg.model_path, (1,)) if cfg.model_path else cfg.fig3)
        if not cfg.data:                                     # of which the true density is known
            out.append(Job("dial1", "Wiener", (0,)))
        if not cfg.data and not cfg.model_path:
            out += [job._replace(seed=s) for s in range(cfg.plateau_seeds) for job in every("plateau", cfg.plateau)]
            out.append(Job("plateau", "Wiener", (0,)))
    return [job._replace(data=cfg.data or job.data) for job in out]


def model_args(cfg, data, model):                            # of build_model
    if model in cfg.model_path:
        return given(model)
    return dict(name=model, **train.sizes(train.load_data(dataset(cfg, data))))


def step_flops(cfg, data, model):
    """FLOPs of a training step, true and in the paper's count: see train.py. Of given weights: of a forward pass."""
    step, forward = train.step_flops(tuple(model_args(cfg, data, model).items()), 1)
    return [forward] * 2 if model in cfg.model_path else [cfg.batch * step, cfg.batch * forward]


def merged(todo):
    """Jobs, with all lengths of one network, wherever they are asked for, in one of them."""
    lengths = {}
    for job in todo:
        lengths.setdefault(job._replace(lengths=()), set()).update(job.lengths)
    return [job._replace(lengths=tuple(sorted(steps))) for job, steps in lengths.items()]


def cost(cfg, job):                                          # FLOPs of its training
    return job.model != "Wiener" and step_flops(cfg, job.data, job.model)[0] * job.lengths[-1]


def run_all(cfg, todo):
    """Run these jobs, several at once, the longest first."""
    rank = processes(torch.device("cpu"))[0]
    todo = [job for job in merged(todo) if not all(path.exists() for path in paths(cfg, job)[1])]
    if rank == 0:
        for name in {job.data for job in todo}:              # here, or two processes would write the same file
            dataset(cfg, name)
    wait_for_all()
    todo.sort(key=functools.partial(cost, cfg), reverse=True)            # or the last would run alone
    train.run_jobs(functools.partial(run, cfg), todo, cfg.workers)


# ----------------------------------------------------------------------------------------------------------------------
# From errors to claims

def mean_ci(v):                                              # (n,) -> mean and its 95% interval, (3,)
    half = 1.96 * v.std(ddof=1) / len(v)**0.5
    return np.array([v.mean(), v.mean() - half, v.mean() + half])


def slopes(compute, E):
    """compute (S, L), E (S, L, n) with common random numbers -> {which: slope of E per decade of compute, (3,) with its
    95% interval}: of one line through all, over size at equal length, over length at equal size.

    A slope is linear in E, so each trajectory has one, and their spread is that of the paired differences."""
    x, out = np.log10(compute), {}
    for which, axis in (("all", None), ("size", 0), ("length", 1)):
        c = x - x.mean(axis, keepdims=True)
        if (c**2).sum() > 1e-12:                             # else there is but one length
            out[which] = mean_ci(np.einsum("sl,sln->n", c / (c**2).sum(), E))
    return out


def ladder(cfg, data, models, lengths, seed=0):
    """All that is said about one ladder: levels, paired differences and slopes, in x- and v-space, with labels and
    without ("_free"), and along t."""
    runs = [[np.load(p) for p in paths(cfg, Job(data, m, lengths, seed=seed))[1]] for m in models]
    t = times(cfg)
    per_step = np.array([step_flops(cfg, data, m) for m in models], dtype=float)                 # (S, 2)
    compute = per_step[:, :1] * np.array(lengths)                                                # (S, L)
    out = dict(models=models, lengths=lengths, compute=compute, compute_paper=per_step[:, 1:] * np.array(lengths), t=t,
               d=int(np.prod(runs[0][0]["samples"].shape[1:])),
               memorized=[[(r["calibrated"] < cfg.threshold).mean() for r in row] for row in runs],
               distance=[[r["distance"].mean() for r in row] for row in runs])
    for key in ("sup", "ext", "sup_free", "ext_free"):
        E_t = np.array([[r[key] for r in row] for row in runs])                                  # (S, L, n, T)
        for space, E in (("x", E_t.mean(3)), ("v", (E_t / t**2).mean(3))):
            over = lambda base, E=E: np.apply_along_axis(mean_ci, 2, E - base)                   # paired, (S, L, 3)
            out[f"{key}_{space}"] = dict(mean=E.mean(2), ci=over(0), slope=slopes(compute, E),
                                         over_smallest=over(E[:1]), over_first=over(E[:1, :1]))
        change = E_t[-1, -1] - (E_t[0, -1] if len(models) > 1 else 0)    # of one network, its errors themselves
        out[f"{key}_x"]["along_t"] = np.apply_along_axis(mean_ci, 0, change).T                   # (T, 3)
    sup = np.array(runs[-1][-1]["sup"])                      # the largest network's: is Fig 7 to Fig 3 as v to x?
    ratio = lambda v: (v / t**2).mean() / v.mean()
    out["v_over_x"] = [ratio(sup), *train.bootstrap(sup, ratio)]
    return out


def over_seeds(each):
    """What is said of several seeds, alike -> the same of all: values (..., 3), with intervals, become their mean over
    the seeds. Its interval has Student's t over the seeds and, since all were asked about the same points and
    trajectories, the whole of a seed's own: the root of the sum of their squares."""
    if isinstance(each[0], dict):
        return {k: np.mean([e[k] for e in each], 0) if k == "mean" else over_seeds([e[k] for e in each])
                for k in each[0]}
    v = np.array(each)                                       # (seeds, ..., 3)
    mean, half = v[..., 0].mean(0), (v[..., 2] - v[..., 1]).mean(0) / 2
    if len(v) > 1:
        half = np.hypot(half, stdtrit(len(v) - 1, 0.975) * v[..., 0].std(0, ddof=1) / len(v)**0.5)
    return np.stack([mean, mean - half, mean + half], -1)


def row(text, paper, value, **bounds):                       # value (3,): what came out, and its 95% interval
    return train.claim(text, paper, value[0], tuple(value[1:]), **bounds)


def falls(text, value, paper="< 0"): return row(f"{text}: < 0", paper, value, high=0.0)
def grows(text, value, paper="> 0"): return row(f"{text}: > 0", paper, value, low=0.0)


def with_limit(cfg, a, data):
    """A ladder, and beside it the errors of the fields' true density; `room`: its E^ext minus the largest network's,
    paired by the starting noise."""
    limit = np.load(paths(cfg, Job(data, "Wiener", (0,)))[1][0])
    best = np.load(paths(cfg, Job(data, a["models"][-1], a["lengths"]))[1][-1])
    return a | dict(limit={k: mean_ci(limit[k].mean(1)) for k in ("sup", "ext")} |
                    dict(room=mean_ci((limit["ext"] - best["ext"]).mean(1))))


# Fig. 3 at 400K iterations: E^sup, E^ext. With all lengths the paper's span 2.7% and .5%; 5% leaves room for weights
# that were trained for longer, and for another autoencoder
PUBLISHED = dict(S=(0.18750, 0.53395), B=(0.18567, 0.53475), L=(0.18374, 0.53540), XL=(0.18340, 0.53590))


def published(cfg, data, model):                             # of a network of the paper's, on latents like the paper's
    args = model_args(cfg, data, model)
    alike = (args["in_channels"], args["input_size"], args["num_classes"]) == (4, 32, 1000)
    return PUBLISHED.get(args["name"].removeprefix("SiT-").removesuffix("/2")) if alike else None


def in_v(what, a):                                           # is Fig. 7's L to Fig. 3's error as v to x?
    return row(f"Fig 3 supervision, v-space over x-space, {what}: 2.5 to 5.7", "3.8", a["v_over_x"], low=3.8 / 1.5,
               high=3.8 * 1.5)


def part_fig3(cfg):
    data, what = cfg.data or "dial1", Path(cfg.data).name or "1/f fields"
    models = sorted(cfg.model_path, key=lambda m: step_flops(cfg, data, m)) or cfg.fig3.models
    a = ladder(cfg, data, models, (1,) if cfg.model_path else cfg.fig3.lengths)
    sup, ext, slope, claims = a["sup_x"], a["ext_x"], a["ext_x"]["slope"], []
    if "all" in slope:                                       # else all are of one size
        alone = (("size", "length"), ("length", "size")) if "length" in slope else ()        # else size is all
        ends = [published(cfg, data, models[k]) for k in (-1, 0)]        # after 400K iterations
        known = all(ends) and (cfg.model_path or cfg.fig3.lengths[-1] == 400_000)
        said = [f"{large - small:+.4f}" for large, small in zip(*ends, strict=True)] if known else ("< 0", "> 0")
        claims = [falls(f"Fig 3 supervision error per decade of compute, {what}", sup["slope"]["all"]),
                  grows(f"Fig 3 extrapolation error per decade of compute, {what}", slope["all"]),
                  *[grows(f"Fig 3 the same over {k} alone, at equal {other}", slope[k])
                    for k, other in alone if k in slope],
                  falls("Fig 3 supervision error, largest minus smallest", sup["over_smallest"][-1][-1], said[0]),
                  grows("Fig 3 extrapolation error, largest minus smallest", ext["over_smallest"][-1][-1], said[1])]
    claims.append(in_v(what, a))
    if not cfg.data:
        a = with_limit(cfg, a, data)
        claims.append(grows("Fig 3 why: extrapolation error, true density minus largest network", a["limit"]["room"],
                            "not shown"))
    if cfg.model_path:
        a |= dict(axis="forward pass (FLOPs)", models=[given(m)["name"] for m in models])
        largest = np.load(paths(cfg, Job(data, models[-1], (1,)))[1][0])
        claims += given_claims(a, largest, published(cfg, data, models[-1]))
    if cfg.data or cfg.model_path:
        return a, claims
    # the errors are over the seeds; copies, and the limit's room above a network, are of the first
    seeds = [ladder(cfg, "plateau", cfg.plateau.models, cfg.plateau.lengths, s) for s in range(cfg.plateau_seeds)]
    errors = {key: over_seeds([one[key] for one in seeds]) for key in seeds[0] if key[:4] in ("sup_", "ext_")}
    a["plateau"] = p = with_limit(cfg, seeds[0] | errors, "plateau")
    return a, [*claims,
               falls("Fig 3 plateau, half the contrast: supervision error over size", p["sup_x"]["slope"]["size"]),
               grows("Fig 3 plateau, half the contrast: extrapolation error over size", p["ext_x"]["slope"]["size"]),
               *[grows(f"Fig 3 plateau after {n:,} steps: the same, largest minus smallest", difference)
                 for n, difference in zip(p["lengths"], p["ext_x"]["over_smallest"][-1], strict=True)]]


def given_claims(a, largest, levels):
    """What can be said of given weights: their levels, beside the paper's where the data are the paper's."""
    print(f"{'x_theta - x_*, squared, per dimension':40s}" + "".join(
        f"{f'E^{key}, {space}-space':>30s}" for space in "xv" for key in ("sup", "ext")))
    for k, name in enumerate(a["models"]):
        print(f"{name:40s}" + "".join("{:>12.5f} [{:.5f}, {:.5f}]".format(*a[f"{key}_{space}"]["ci"][k][0])
                                      for space in "xv" for key in ("sup", "ext")))
    name = a["models"][-1]
    return [grows(f"Fig 3 E^ext minus E^sup, {name}", mean_ci(largest["ext"].mean(1) - largest["sup"].mean(1))),
            *[row(f"Fig 3 E^{key}, {name}: within 5% of {value:.4f}", f"{value:.4f}", a[f"{key}_x"]["ci"][-1][-1],
                  low=0.95 * value, high=1.05 * value)
              for key, value in zip(("sup", "ext"), levels or (), strict=False)]]


def part_dial(cfg):
    out, claims = dict(amounts=cfg.amounts, ladders=[]), []
    for a in cfg.amounts:
        out["ladders"].append(one := ladder(cfg, f"dial{a:g}", cfg.dial.models, cfg.dial.lengths))
        what = {0: "digits alone", 1: "fields alone"}.get(a, f"{1 - a:g} digit + {a:g} field")
        claims.append(grows(f"dial, {what}: extrapolation error over size", one["ext_x"]["slope"]["size"]))
        if a < 1:                                            # else as in Figure 3
            claims.append(in_v(what, one))
    return out, claims


def part_onset(cfg):
    a, lengths = ladder(cfg, "onset", cfg.onset.models, cfg.onset.lengths), cfg.onset.lengths
    name, path = cfg.onset.models[-1], paths(cfg, Job("onset", cfg.onset.models[-1], lengths))[1]
    first, last = np.load(path[0]), np.load(path[-1])
    moved = lambda f: mean_ci(f(last) - f(first))            # paired by the starting noise
    # Crops of the same photographs overlap: of new ones, which nothing has copied, some are near an old one, too
    data = train.load_data(dataset(cfg, "onset"))
    new = torch.from_numpy(np.array(data["x_heldout"][:cfg.n_trajectories]))
    of_new = neighbours(EmpiricalScore(data["x"]), new, cfg.n)[1]
    # one more each way, or an interval of copies that are all there, or none, would have no width
    copies, others = (mean_ci(np.append(c < cfg.threshold, [True, False])) for c in (last["calibrated"], of_new))
    more = copies[0] - others[0] + np.hypot(copies[2] - copies[0], others[2] - others[0]) * np.array([0, -1, 1])
    return a | dict(new=others[0]), [
        grows(f"onset, textures: extrapolation error over size after {lengths[0]} steps",
              a["ext_x"]["over_smallest"][-1][0]),
        falls(f"onset, {name}: extrapolation error, step {lengths[-1]} minus {lengths[0]}",
              moved(lambda r: r["ext"].mean(1)), "not shown"),
        grows(f"onset, {name}: fraction of copies, samples minus new crops", more, "not shown"),
        in_v("textures", a)]


def part_fig6(cfg):
    """|v_theta' - v_theta|^2 / d of networks with REPA and without, of one seed; and of two seeds, without."""
    # differs from the paper: it compares scores, at times it does not give. Those differ by alpha/sigma times this,
    # and the smallest t would outweigh all others; v is what the networks are trained on
    t, upto, n, found = times(cfg), cfg.fig7.lengths[-1], 2 * cfg.n_trajectories, {}
    base = Job(cfg.data or "digits8", cfg.fig7.models[-1], cfg.fig7.lengths)
    probe.cache_clear()                                      # another number of points: the old ones take memory
    for seed in range(cfg.fig7_seeds):
        one, another = base._replace(seed=seed), (seed + 1) % max(2, cfg.fig7_seeds)
        others = {f"REPA {lam:g}": one._replace(lam=lam) for lam in cfg.lambdas[1:]}
        others["another seed"] = base._replace(seed=another, lengths=base.lengths[-1:])

        @functools.cache
        def baseline(one=one):                               # points, trajectories, and x_theta on both, without REPA
            p = probe(dataset(cfg, base.data), n, cfg.n_times, cfg.seed, pick_device(cfg.device))
            path, x_ext, _ = trajectories(net := fit(cfg, one, upto), p.z1, p.y_ext, p.t)
            return p, path, along(functools.partial(data_prediction, net), p.z, p.t, p.y_sup), x_ext
        for name, job in others.items():
            file = paths(cfg, job)[0] / f"change_{upto}_{digest(n, cfg.n_times, seed)}.npz"
            if not file.exists():
                p, path, x_sup, x_ext = baseline()
                two = functools.partial(data_prediction, fit(cfg, job, upto))
                with replacing(file) as f:
                    np.savez(f, sup=per_dim(along(two, p.z, p.t, p.y_sup) - x_sup),
                             ext=per_dim(along(two, path, p.t, p.y_ext) - x_ext))
            r = np.load(file)
            found.setdefault(name, []).append(np.stack([r["ext"], r["sup"]], 1))                 # (n, 2, T)
    # supervision points and trajectories are independent draws, each resampled with the other, which does no harm
    ratio = lambda v: v[:, 0].mean() / v[:, 1].mean()
    of = lambda f, *seeds: over_seeds([[f(v), *train.bootstrap(v, f)] for v in (np.concatenate(s, 1) for s in seeds)])
    weighted = {k: [(v / t**2).mean(2) for v in by_seed] for k, by_seed in found.items()}        # v-space, (n, 2)
    strong, control = (weighted[k] for k in (f"REPA {cfg.lambdas[-1]:g}", "another seed"))
    ratios = {k: of(ratio, *([v] for v in by_seed)) for k, by_seed in weighted.items()}
    excess = of(lambda v: ratio(v[:, :2]) / ratio(v[:, 2:]), *zip(strong, control, strict=True))
    barely = of(lambda v: v[:, 1].mean() / v[:, 3].mean(), *zip(strong, control, strict=True))
    in_x = of(ratio, *([v.mean(2)] for v in found[f"REPA {cfg.lambdas[-1]:g}"]))
    arrays = dict(t=t, ratio=ratios, model=base.model, steps=upto,
                  along_t={k: [of(ratio, *([v[..., j]] for v in by_seed)) for j in range(len(t))]
                           for k, by_seed in found.items()},
                  change={k: np.mean([v.mean(0) for v in by_seed], 0) for k, by_seed in weighted.items()})
    said = f"change by REPA ({cfg.lambdas[-1]:g}), trajectories over training points"
    greatest = ratios[f"REPA {cfg.lambdas[-1]:g}"]
    return arrays, [
        row(f"Fig 6 {said}: > 1", "> 1", greatest, low=1.0),
        row("Fig 6 the same ratio, \"greatly\" read as: > 1.5", "greatly", greatest, low=1.5),
        row("Fig 6 the same ratio of errors of x, not v: > 1", "not shown", in_x, low=1.0),
        row("Fig 6 control: that ratio over the ratio of a change of seed: > 1", "not shown", excess, low=1.0),
        row("Fig 6 on training points, \"barely\": by REPA over by a seed: < 1", "barely", barely, high=1.0)]


def line(x, y, at):                                          # the straight line through the points: Eq. (5)
    return np.polyval(np.polyfit(x, y, 1), at)


def reached(x, y, at):                                       # the least y that x up to `at` buys, interpolated
    order = x.argsort()
    return np.interp(at, x[order], np.minimum.accumulate(y[order]))


def shift(one, two, at=0.5, curve=line):
    """Vertical distance, curve of recipe `one` minus that of `two`, at equal x. Each (x (S, m), y (S, m), x (R, S, m),
    y (R, S, m)): m networks of S seeds, as measured, and resampled R times. -> (3,), at the middle (.5) or the end (1)
    of where both ranges of x overlap (or of the gap between).

    The interval has the error of the samples (bootstrap, the same samples for all), the spread of the seeds, and the
    scatter of the networks about straight lines; Student's t, with Welch's and Satterthwaite's degrees of freedom."""
    means = [(x.mean(0), y.mean(0)) for x, y, *_ in (one, two)]
    low, high = (f([g(x) for x, _ in means]) for f, g in ((max, np.min), (min, np.max)))
    at = low + at * (high - low)
    apart = lambda *xy: np.array([curve(*p[:2], at) - curve(*p[2:], at) for p in zip(*xy, strict=True)])      # (S,)
    seeds = apart(*one[:2], *two[:2])
    spread = np.std([apart(*draw).mean() for draw in zip(*one[2:], *two[2:], strict=True)], ddof=1)
    parts = [(0.0 if np.isnan(spread) else spread**2, np.inf)]           # nan: the samples were not drawn again
    if len(seeds) > 1: parts.append((seeds.var(ddof=1) / len(seeds), len(seeds) - 1))
    for x, y in means if curve is line else ():
        rest, free = ((y - line(x, y, x))**2).sum(), max(1, len(x) - 2)
        parts.append((rest / free * (1 / len(x) + (at - x.mean())**2 / ((x - x.mean())**2).sum()), free))
    variance, free = np.array(parts).T
    free = max(1, variance.sum()**2 / max(1e-300, (variance**2 / free).sum()))
    half = stdtrit(free, 0.975) * variance.sum()**0.5
    return np.array([seeds.mean(), seeds.mean() - half, seeds.mean() + half])


def slope(x, y):                                             # of the line through means (S, m) over seeds, (3,)
    fit = linregress(x.mean(0), y.mean(0))
    return fit.slope + stdtrit(max(1, x.shape[1] - 2), 0.975) * fit.stderr * np.array([0, -1, 1])


def same_networks(y, other, more, others):
    """Mean of y - other (S, m), of the same m networks under two recipes, (3,); more, others (R, S, m): resampled."""
    each = (y - other).mean(1) if len(y) > 1 else (y - other)[0]         # a seed; of one seed, a network
    spread = np.std((more - others).mean((1, 2)))
    half = np.hypot(stdtrit(max(1, len(each) - 1), 0.975) * each.std(ddof=1) / len(each)**0.5,
                    0 if np.isnan(spread) else 1.96 * spread)
    return each.mean() + half * np.array([0, -1, 1])


def samples_file(cfg, job, steps):
    return paths(cfg, job)[0] / f"samples_{steps}_{cfg.n_fid}.npz"


def draw_samples(cfg):
    """With --data: the images for the FID of every network of Figure 7, by all processes together, as .npz files."""
    for job in jobs(cfg, "fig7"):
        for steps in job.lengths:
            sample.main(sample.Config(run=str(paths(cfg, job)[0] / f"ema_{steps}.pt"), n=cfg.n_fid, vae=cfg.vae,
                                      batch=min(250, cfg.n_fid), device=cfg.device,
                                      out=str(samples_file(cfg, job, steps))))


def judge(cfg, draws):
    """-> (f, how). f(job, steps, samples) are the Fréchet distances of a network to the data: of all its samples, of
    half of them, and of `draws` of them, (resamples, n) indices; nan if nothing can tell."""
    if cfg.data and cfg.reference:                           # images are many, and their features large: no resampling
        at = sample.statistics(cfg.reference, network := sample.inception())
        distance = lambda job, steps, _: frechet(*sample.statistics(samples_file(cfg, job, steps), network), *at)
        return (lambda *a: (distance(*a), np.nan, [np.nan] * len(draws))), dict(
            how=f"FID (Inception) of {cfg.n_fid} samples, dopri5, w = 1, EMA {cfg.ema}, reference: {cfg.reference}")
    if cfg.data:
        return (lambda *a: (np.nan, np.nan, [np.nan] * len(draws))), dict(
            how="no --reference was given: FID is left to ADM's evaluator, on the samples_*.npz beside the networks")
    data = train.load_data(dataset(cfg, "digits8"))
    net = classifier(data, cfg.seed)
    features = lambda x: net.body(torch.from_numpy(np.array(x, dtype=np.float32))).double().numpy()
    reference, n = gaussian([features(data["x"])]), cfg.n_trajectories
    distance = lambda f: frechet(*gaussian([f]), *reference)

    def f(job, steps, samples):
        f = features(samples)
        return distance(f), distance(f[:n // 2]), [distance(f[i]) for i in draws]
    return f, dict(how=f"FD: squared Frechet distance of {len(reference[0])} features, n = {n} samples, Heun, NFE "
                   f"{2 * cfg.n_times + 2}, w = 1, EMA {cfg.ema}, reference: the {len(data['x'])} training images; "
                   f"held-out accuracy {net.accuracy:.3f} of the network that judges, "
                   f"{data['meta']['teacher_accuracy']:.3f} of REPA's teacher")


def part_fig7(cfg, resamples=100):
    """Fréchet distance against supervision loss for every recipe."""
    n, t, table, lines = cfg.n_trajectories, times(cfg), [], {}
    draws = np.random.default_rng(cfg.seed).integers(n, size=(resamples, n))                     # the same for all
    distance, arrays = judge(cfg, draws)
    models = lambda lam: cfg.fig7.models if lam else cfg.fig7.models + cfg.larger
    recipes = {f"SiT, REPA {lam:g}": [Job("digits8", m, cfg.fig7.lengths, lam) for m in models(lam)]
               for lam in cfg.lambdas}
    for kind, name in (("", "U-Net, attention"), ("-conv", "U-Net, conv only")):
        recipes[name] = [Job("digits8", m + kind, cfg.unets.lengths) for m in cfg.unets.models]
    for name, group in recipes.items():
        points = []                                          # (networks and lengths, seeds, 4 and twice `resamples`)
        for job in [job._replace(data=cfg.data or job.data) for job in group]:
            true, paper = step_flops(cfg, job.data, job.model)
            for k, steps in enumerate(job.lengths):
                points.append([])
                for one in [job._replace(seed=s) for s in range(cfg.fig7_seeds)]:
                    r = np.load(paths(cfg, one)[1][k])
                    L, (FD, half, spread) = (r["sup"] / t**2).mean(1), distance(one, steps, r["samples"])
                    points[-1].append([L.mean(), FD, half, np.std(spread), *[L[i].mean() for i in draws], *spread])
                (L, FD, half, sd), by_seed = np.mean(points[-1], 0)[:4], np.array(points[-1]).T
                table.append(dict(recipe=name, model=job.model, steps=steps, compute=true * steps, L=L, FD=FD,
                                  compute_paper=paper * steps, FD_half=half, FD_sd=sd, seeds=by_seed[:2]))
        L, FD, _, _, *more = np.array(points).transpose(2, 1, 0)         # each (S, m)
        more_L, more_FD = np.split(np.array(more), 2)                    # (R, S, m)
        C = np.log10([r["compute"] for r in table if r["recipe"] == name]) + 0 * L
        C_too = C + 0 * more_L                               # compute has no error
        lines[name] = dict(FD_of_L=(L, FD, more_L, more_FD), L_of_C=(C, L, C_too, more_L),
                           FD_of_C=(C, FD, C_too, more_FD))
    plain, attention, conv = f"SiT, REPA {cfg.lambdas[0]:g}", "U-Net, attention", "U-Net, conv only"
    # Figure 7b has not the larger SiTs of 7c
    few = len(cfg.fig7.models) * len(cfg.fig7.lengths)
    lines["SiT, 7b"] = dict(FD_of_L=[v[..., :few] for v in lines[plain]["FD_of_L"]])
    fit_to = lambda L, FD, *_: np.polyfit(L.mean(0), FD.mean(0), 1)
    arrays |= dict(table=table, fits={name: fit_to(*of["FD_of_L"]) for name, of in lines.items()})
    # L and FD are no straight lines over compute; but of one seed, the scatter about them is all one knows of its error
    over_compute = reached if cfg.fig7_seeds > 1 else line
    minus = lambda one, two, what="FD_of_L", at=0.5, curve=line: shift(lines[one][what], lines[two][what], at, curve)
    claims = [grows(f"Fig 7a slope of FD over L, {name}", slope(*lines[name]["FD_of_L"][:2]))
              for name in (plain, attention, conv)]
    claims += [falls(f"Fig 7b FD at equal L, REPA {lam:g} minus none", minus(f"SiT, REPA {lam:g}", "SiT, 7b"))
              for lam in cfg.lambdas[1:]]
    # Section 5: with REPA, FID improves much where the supervision loss hardly changes
    (L, FD, *more), (L_0, FD_0, *more_0) = (lines[k]["FD_of_L"] for k in (f"SiT, REPA {cfg.lambdas[-1]:g}", "SiT, 7b"))
    over = np.exp(same_networks(*map(np.log, (L, L_0, more[0], more_0[0]))))
    claims += [row(f"Fig 7b L with REPA {cfg.lambdas[-1]:g} over L without, same networks: .98 to 1.02", "minor", over,
                   low=0.98, high=1.02),
               falls(f"Fig 7b FD, REPA {cfg.lambdas[-1]:g} minus none, same networks",
                     same_networks(FD, FD_0, more[1], more_0[1]))]
    claims += [falls(f"Fig 7c FD at equal L, {name} minus SiT", minus(name, plain)) for name in (attention, conv)]
    claims.append(falls("Fig 7c FD at equal L, U-Net conv only minus with attention", minus(conv, attention)))
    # Section 5.1: by L, and taking both together, SiTs make more of their compute, in the middle and at the most of it
    claims += [grows(f"Fig 7c {what} at equal compute, {where}, {name} minus SiT",
                     minus(name, plain, f"{what}_of_C", at, over_compute))
               for what in ("L", "FD") for where, at in (("middle", 0.5), ("most", 1)) for name in (attention, conv)]
    return arrays, [c for c in claims if not np.isnan(c["ours"])]        # without FD, those of L alone


def check(cfg):
    """What can be wrong, before anything is trained or written."""
    for name in ("n_data", "n_onset", "n_trajectories", "n_times", "batch", "accum", "workers", "n", "repa_depth",
                 "n_fid", "plateau_seeds", "fig7_seeds"):
        if getattr(cfg, name) < (least := 2 if name in ("n_trajectories", "n_data", "n_onset", "n_fid") else 1):
            raise ValueError(f"{name} must be at least {least}, not {getattr(cfg, name)}")
    torch.empty(cfg.n_times, cfg.n_trajectories, 16, 16)     # too many fail now, not after the training
    train.check_rates(cfg.lr, cfg.warmup, cfg.ema, cfg.label_dropout, cfg.seed)
    for name in ("contrast", "threshold"):
        if not 0 < getattr(cfg, name) < np.inf:
            raise ValueError(f"{name} must be positive, not {getattr(cfg, name):g}")
    shapes = dict(fig3=(16, 1, 10), plateau=(16, 1, 10), dial=(16, 1, 10), onset=(16, 1, 3), fig7=(8, 1, 10),
                  unets=(8, 1, 10))
    if cfg.data:
        if cfg.only in ("dial", "onset"):
            raise ValueError(f"--only {cfg.only} is of sets that are made here: it goes without --data")
        C, H, _ = (data := train.load_data(cfg.data))["x"].shape[1:]
        shapes = {k: (H, C, data["meta"]["num_classes"]) for k in ("fig3", "fig7", "unets")}
        if cfg.only in ("all", "fig7") and not cfg.model_path:           # what is missing should be known before
            if cfg.reference:
                if not Path(cfg.reference).exists():
                    raise FileNotFoundError(f"there is no reference {cfg.reference}")
                sample.inception()
                if Path(cfg.reference).is_dir() or sample.read_npz(cfg.reference, "mu") is None:
                    next(sample.image_batches(cfg.reference))
            if cfg.vae: sample.load_vae(cfg.vae)
    for path in cfg.model_path:
        if cfg.only not in ("all", "fig3"):
            raise ValueError(f"--only {cfg.only} is of networks that are trained here: it goes without --model-path")
        H, C, classes = shapes["fig3"]
        check_fit(net := load_run(path)[0], path, (C, H, H), classes, cfg.data or "made here")
        if net.prediction != "v":
            raise ValueError(f"{path} predicts {net.prediction}: Figure 3 is of networks that predict v")
    for name, shape in shapes.items() if not cfg.model_path else ():
        models, lengths = (rungs := getattr(cfg, name)).models, rungs.lengths
        where = f"{name}.models"
        if name == "fig7" and cfg.larger: models, where = models + cfg.larger, f"{where}, with larger,"
        if len(models) < 2 and name not in ("fig7", "unets") or not models or not lengths:
            raise ValueError(f"{name} needs two models at least, and a length")
        if len(set(models)) < len(models):
            raise ValueError(f"{where} must differ, not {models}")
        if min(lengths) < 1 or list(lengths) != sorted(set(lengths)):
            raise ValueError(f"{name}.lengths must be positive and ascend, not {lengths}")
        if len(rungs.models) * len(lengths) < 3 and name in ("fig7", "unets"):
            raise ValueError(f"a line through the points of {name} needs three, models x lengths, not fewer")
        for model in models:
            if "SiT" not in model and name == "fig7":
                raise ValueError(f"{where} are SiTs, which have the tokens that REPA aligns, not {model}")
            if "UNet" not in model and name == "unets":
                raise ValueError(f"unets.models are U-Nets, not {model}")
            with torch.device("meta"):
                net = build_model(model, *shape)
            if name == "fig7" and cfg.repa_depth > len(net.blocks):
                raise ValueError(f"repa_depth {cfg.repa_depth} is more than the {len(net.blocks)} blocks of {model}")
            if name == "fig7" and model.split("/")[1] != models[0].split("/")[1]:
                raise ValueError(f"{where} must have one patch size, that of the teacher's tokens, not {models}")
            if name == "fig7" and cfg.data and cfg.only in ("all", "fig6", "fig7"):
                train.check_repa(SimpleNamespace(repa_depth=cfg.repa_depth, model=model, data=cfg.data), data, net)
    if len(cfg.lambdas) < 2 or cfg.lambdas[0] != 0 or list(cfg.lambdas) != sorted(set(cfg.lambdas)):
        raise ValueError(f"lambdas must ascend from 0, and be two at least, not {cfg.lambdas}")
    if not cfg.amounts or min(cfg.amounts) < 0 or max(cfg.amounts) > 1:
        raise ValueError(f"amounts of field lie between 0 and 1, not {cfg.amounts}")


def work(cfg):
    """What --dry-run is to foretell, with nothing found from an earlier call; networks of a process each."""
    check(cfg)
    parts = parts_of(cfg) if cfg.only == "all" else (cfg.only,)
    todo = merged(job for part in parts for job in jobs(cfg, part) if job.model != "Wiener")
    nets, images = [], []
    for job in sorted(todo, key=functools.partial(cost, cfg)):
        data, args = train.load_data(dataset(cfg, job.data)), model_args(cfg, job.data, job.model)
        if not cfg.model_path:
            # of each are kept a checkpoint, of weights, average and two moments, and the averages
            nets.append((args, cfg.batch // cfg.accum, cfg.batch, job.lengths[-1], 4 + len(job.lengths)))
        fid = sample.NFE * cfg.n_fid if cfg.data and not cfg.model_path else 0
        each = cfg.n_trajectories * cfg.n_times * 3.5 + fid
        images.append((args, int(each) * len(job.lengths)))
    count = sum(len(job.lengths) for job in todo)
    world, later, writing = max(int(os.environ.get("WORLD_SIZE", 1)), cfg.workers), 0, 0
    for net in nets:             # the last to be trained come first; one in training takes 8 copies more (train.py)
        size = train.weight_bytes(net[0])
        writing, later = max(writing, 8 * world * size - later), later + net[4] * size
    return dict(data=data, nets=nets, images=images, processes=world,
                files=writing + 2 * 4 * count * cfg.n_trajectories * 400,
                queries=int((1 / FREE + 1 / args["num_classes"]) * (count + 1) * cfg.n_trajectories * cfg.n_times))


def measure(cfg):
    """Train or find the networks of the parts asked for; write what they say, with claims, to results.json. Parts that
    were not asked for, but whose networks are all there, are written along."""
    check(cfg)
    rank, phase = processes(pick_device(cfg.device))[0], train.phases()
    analyse = dict(fig3=part_fig3, fig6=part_fig6, fig7=part_fig7, dial=part_dial, onset=part_onset)
    files = {part: {p for job in jobs(cfg, part) for p in paths(cfg, job)[1]} for part in parts_of(cfg)}
    before = {p for its in files.values() for p in its if p.exists()}
    wanted = files if cfg.only == "all" else (cfg.only,)
    run_all(cfg, [job for part in wanted for job in jobs(cfg, part)])
    if cfg.data and "fig7" in wanted:
        draw_samples(cfg)
    if rank:                                                 # the rest is for one process
        return
    phase("networks")
    arrays, claims = {}, []
    for part, its in files.items():
        if part in wanted or all(p.exists() for p in its):
            arrays[part], more = analyse[part](cfg)
            claims += more
            phase(part)
    used = set().union(*(files[part] for part in arrays))
    seconds = {p: np.load(p)["seconds"] for p in used}       # of the empirical score, of measuring, of all
    total = np.sum([*seconds.values()], axis=0)
    earlier = sum(s[2] for p, s in seconds.items() if p in before)
    print(f"{len(used)} checkpoints, {len(used & before)} of them found: {total[2]:.0f} s of one worker, of which "
          f"{100 * total[1] / total[2]:.0f}% measuring, in it {100 * total[0] / total[2]:.0f}% the empirical score")
    if "fig7" in arrays:
        print_table(arrays["fig7"])
    arrays["seconds"] = dict(empirical=total[0], measuring=total[1], all=total[2])
    started = phase.started - earlier / cfg.workers          # `seconds` is what all of it takes
    train.save_results("exp_scaling", cfg, pick_device(cfg.device), started, arrays, claims)


def print_table(a):
    """The decomposition: compute -> L for supervision, L -> FD for extrapolation."""
    print(f"\n{a['how']}\n{'recipe':18s} {'model':16s} {'steps':>6s} {'FLOPs':>9s} "
          f"{'L':>7s} {'FD':>8s} {'(sd)':>7s} {'at n/2':>8s}")
    for r in a["table"]:
        print(f"{r['recipe']:18s} {r['model']:16s} {r['steps']:6d} {r['compute']:9.2e} {r['L']:7.4f} {r['FD']:8.3f} "
              f"{r['FD_sd']:7.3f} {r['FD_half']:8.3f}")
    for recipe, (slope, offset) in a["fits"].items():
        print(f"{recipe:18s} FD = {slope:.3g} L {offset:+.3g}")


# ----------------------------------------------------------------------------------------------------------------------
# Drawing

BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"            # supervision, extrapolation: the same in every figure
COLOUR, SYMBOL = dict(sup=BLUE, ext=RED), dict(sup="$E^{sup}$", ext="$E^{ext}$")


def paper_says(ax, what, up, at=(0.91, 0.86)):
    """A grey arrow in a corner: which way the paper says that this goes."""
    (x, y), h = at, 0.1 if up else -0.1
    ax.annotate("", (x, y + h), (x, y - h), "axes fraction", arrowprops=dict(arrowstyle="-|>", color=GREY, lw=2))
    ax.text(x - 0.03, y, f"paper:\n{what}", transform=ax.transAxes, color=GREY, ha="right", va="center")


def interval(axis, x, v, **style):                           # v (n, 3): values, and the ends of their intervals
    v = np.array(v)
    return axis.errorbar(x, v[:, 0], np.abs(v[:, 1:] - v[:, :1]).T, capsize=3, **style)


def room_above(ax, share=0.55):                              # for the words
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + share * (high - low))


def draw_ladder(ax, a, key, title, over="all"):
    """One error of every network against compute, a line a length, as in the paper's figure."""
    x, e = np.array(a["compute"]), a[f"{key}_x"]             # (S, L); levels from paired differences: more digits
    y, paired = e["mean"][0][0] + np.array(e["over_first"])[..., 0], np.array(e["over_smallest"])
    for j, k in enumerate(a["lengths"]):
        v = y[:, j, None] + paired[:, j] - paired[:, j, :1]  # (S, 3): with the interval of that to the smallest
        if len(v) == 1: v = np.array(e["ci"])[:, j]          # or, of one alone, its own
        interval(ax, x[:, j], v, fmt="o-", color=COLOUR[key], alpha=(j + 1) / len(a["lengths"]), ms=4,
                 label=f"{k} steps" if k > 1 else None)
    if "limit" in a:
        limit, far = a["limit"][key][0], abs(a["limit"][key][0] - y.mean()) > 1.5 * np.ptp(y)
        line = ax.plot([], [], " ") if far else [ax.axhline(limit, color="black", ls=":")]       # far: no room for it
        line[0].set_label(f"true density: {limit:.3f}" + ("\n(off scale)" if far else ""))
    room_above(ax, 0.75)
    if "size" in e["slope"]:
        title += "\n{:+.2g} [{:+.2g}, {:+.2g}] a decade of ".format(*e["slope"][over])
        title += "compute" if over == "all" else over
        ax.legend(loc="upper left")
        paper_says(ax, *(("falls", False) if key == "sup" else ("rises", True)))
    ax.set(xscale="log", xlabel=a.get("axis", "training compute (FLOPs)"), title=title,
           ylabel=f"{SYMBOL[key]} per dimension")
    ax.xaxis.set_minor_formatter("")


def draw_along_t(ax, a):
    """Where in time the largest differs from the smallest; of one network, its errors themselves."""
    single = len(a["models"]) == 1
    for key in ("sup", "ext"):
        mean, low, high = np.array(a[f"{key}_x"]["along_t"]).T
        ax.plot(a["t"], mean, color=COLOUR[key], label=SYMBOL[key])
        ax.fill_between(a["t"], low, high, color=COLOUR[key], alpha=0.2, lw=0)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.set(xlabel="t        (0 = data, 1 = noise)", ylabel="error" if single else "change of the error",
           title="(c) Fig. 3: along t" if single else "(c) Fig. 3: largest minus smallest")
    ax.legend()


def draw_fig3(axes, a, name="Fig. 3", over="all"):
    draw_ladder(axes[0], a, "sup", f"(a) {name}: on training points", over)
    draw_ladder(axes[1], a, "ext", f"(b) {name}: along trajectories", over)
    if len(axes) > 2:                                        # of given weights, for which there is nothing else
        draw_along_t(axes[2], a)


def draw_fig6(axes, a):
    ax, t = axes[0], a["t"]
    for k, (name, ratio) in enumerate(a["ratio"].items()):
        control, (mean, low, high) = name == "another seed", np.array(a["along_t"][name]).T
        style = dict(color="black" if control else RED, alpha=1 if control else (k + 1) / (len(a["ratio"]) - 1))
        ax.plot(t, mean, "D-" if control else "s-", ms=3, lw=1.2, label="{}: {:.2f} [{:.2f}, {:.2f}]".format(
            name, *ratio), **style)
        if control or k == len(a["ratio"]) - 2:
            ax.fill_between(t, low, high, color=style["color"], alpha=0.15, lw=0)
    ax.axhline(1, color=BLUE, lw=1.2)
    room_above(ax, 0.5)
    ax.text(0.02, 0.99, "the same on both", transform=ax.get_yaxis_transform(), color=BLUE, va="top")
    paper_says(ax, "above 1", True, (0.95, 0.36))
    ax.legend(title="at all t together, in v-space", title_fontsize=7.5, loc="upper right")
    ax.set(xlabel="t        (0 = data, 1 = noise)", ylabel="change on trajectories / points",
           title="(c) Fig. 6: what REPA changes, and a seed")


def draw_fig7(axes, a):
    recipes = [name for name in a["fits"] if name != "SiT, 7b"]
    repa, colours = [r for r in recipes if "REPA" in r], {recipes[0]: "black"}
    colours |= {r: (0.8, 0.75 - 0.6 * k / len(repa), 0.7) for k, r in enumerate(repa[1:])}
    aligned = {r["model"] for r in a["table"] if r["recipe"] == repa[-1]}        # Figure 7b has no others
    colours |= dict(zip(recipes[-2:], ("#009E73", "#999933"), strict=True))
    panels = ((repa, "(d) Fig. 7b: REPA"), ([recipes[0], *recipes[-2:]], "(e) Fig. 7c: architectures"),
              (recipes, "(f) L against compute (colours: d, e)"))
    for ax, (names, title) in zip(axes, panels, strict=True):
        for name in names:
            rows = [r for r in a["table"] if r["recipe"] == name]
            if ax is axes[0]: rows = [r for r in rows if r["model"] in aligned]
            C, L, FD = np.array([[r[k] for k in ("compute", "L", "FD")] for r in rows]).T
            if ax is axes[2]:
                ax.plot(*np.array([C, L])[:, np.argsort(C)], "o-", color=colours[name], ms=4, lw=1)
                continue
            error = [1.96 * np.hypot(r["FD_sd"], np.std(r["seeds"][1], ddof=1) / len(r["seeds"][1])**0.5)
                     if len(r["seeds"][1]) > 1 else 1.96 * r["FD_sd"] for r in rows]             # samples, and seeds
            ax.errorbar(L, FD, error, fmt="none", color=colours[name], lw=0.8, alpha=0.6)
            ax.scatter(L, FD, 12 + 25 * (np.log10(C) - 10).clip(0), color=[colours[name]], alpha=0.8, label=name)
            ends = np.array([L.min(), L.max()])
            of = "SiT, 7b" if ax is axes[0] and name == recipes[0] else name
            ax.plot(ends, np.polyval(a["fits"][of], ends), color=colours[name], lw=1.3)
        ax.set(xlabel="supervision loss L (v-space)", ylabel="Fréchet distance", title=title)
    for ax, what in zip(axes, ("REPA lower", "U-Nets lower"), strict=False):
        room_above(ax, 0.6)
        ax.legend(loc="upper left")
        paper_says(ax, what, False, (0.95, 0.12))
    axes[2].set(xscale="log", xlabel="training compute (FLOPs)", ylabel="L")
    paper_says(axes[2], "U-Nets higher", True)
    axes[2].xaxis.set_minor_formatter("")


def draw_plateau(axes, a):
    draw_fig3(axes[:2], a["plateau"], "Plateau", "size")
    draw_along_t(axes[2], a)


def draw_dial(axes, a):
    ax = axes[0]
    for key in ("sup", "ext"):
        interval(ax, a["amounts"], [la[f"{key}_x"]["slope"]["size"] for la in a["ladders"]], color=COLOUR[key],
                 fmt="o-", ms=4, label=SYMBOL[key])
    ax.axhline(0, color=GREY, lw=0.8)
    room_above(ax, 0.4)
    paper_says(ax, f"{SYMBOL['ext']} above 0", True)
    ax.set(xlabel="a of (1 - a) digit + a field", ylabel="slope over size, per decade", title="(d) Dial: which data?")
    ax.legend(loc="upper left")


def draw_onset(axes, a):
    shade = lambda k: dict(alpha=(k + 1) / len(a["models"]), marker="o", ms=4)
    for k, model in enumerate(a["models"]):
        axes[0].plot(a["lengths"], a["ext_x"]["mean"][k], color=RED, label=model, **shade(k))
        axes[1].plot(a["lengths"], 100 * np.array(a["memorized"][k]), color="black", label=model, **shade(k))
    axes[1].axhline(100 * a["new"], color=GREY, ls=":", label="new crops, copied by nothing")
    axes[0].set(ylabel=f"{SYMBOL['ext']} per dimension", title="(e) Onset: error while training")
    axes[1].set(ylabel="% of the samples", title="(f) Onset: copies among the samples")
    for ax in axes:
        ax.set(xscale="log", xlabel="training steps")
        ax.set_xticks(a["lengths"], [str(k) for k in a["lengths"]])
        ax.minorticks_off()
        ax.legend()


PICTURES = dict(                                             # part, who draws it, on how many axes; a suffix a picture
    results=(("fig3", draw_fig3, 2), ("fig6", draw_fig6, 1), ("fig7", draw_fig7, 3)),
    results_when=(("fig3", draw_plateau, 3), ("dial", draw_dial, 1), ("onset", draw_onset, 2)))


def caption(results):
    """{picture: what it says}, in words and numbers that follow from the claims."""
    out, n_onset = {name: [] for name in PICTURES}, results["config"]["n_onset"]
    starting = functools.partial(train.starting, results)
    go = lambda c: "falls" if c["ci95"][1] < 0 else "rises" if c["ci95"][0] > 0 else "does not clearly change"
    both = lambda what, c, d: f"{what} the error {go(c)} on training points, and {go(d)} along trajectories"
    if results["config"].get("model_path"):
        a = results["arrays"]["fig3"]
        out["results"].append("{}: $E^{{sup}}$ = {:.4f} [{:.4f}, {:.4f}], $E^{{ext}}$ = {:.4f} [{:.4f}, {:.4f}] (95%), "
                              "x-space, per dimension.".format(a["models"][-1], *a["sup_x"]["ci"][-1][-1],
                                                               *a["ext_x"]["ci"][-1][-1]))
    if c := starting("Fig 3 supervision error"):
        out["results"].append(f"Fig. 3: {both('with compute', c[0], starting('Fig 3 extrapolation error')[0])} "
                              "(paper: falls, rises).")
    if c := starting("Fig 6"):
        end = {"holds": "more than", "contradicted": "less than", "not resolved": "not told apart from what"}
        (control,) = starting("Fig 6 control")
        out["results"].append(f"Fig. 6: REPA changes the network {c[0]['ours']:.2f} times as much along trajectories "
                              f"as on training points (paper: greatly): {end[control['verdict']]} another seed does.")
    if repa := starting("Fig 7b FD at equal L"):
        unet, by = starting("Fig 7c")[0], [c["ours"] for c in repa]
        sure = [sum(c["verdict"] == v for c in repa) for v in ("holds", "contradicted")]
        out["results"].append(f"Fig. 7: at equal L the distance of U-Nets (attention) minus that of SiTs is "
                              f"{unet['ours']:+.2g} ({unet['verdict']}; paper: below 0), with REPA {min(by):+.2g} to "
                              f"{max(by):+.2g} (of {len(by)}, for sure below 0: {sure[0]}, above: {sure[1]}).")
    if c := starting("Fig 7c L at equal compute"):
        end = {"holds": "higher", "contradicted": "lower", "not resolved": "not told apart"}
        middle, most = (starting(f"Fig 7c L at equal compute, {where}, U-Net, attention")[0] for where in
                        ("middle", "most"))
        out["results"].append("L of U-Nets (attention) minus that of SiTs at equal compute (paper: higher): "
                              f"{middle['ours']:+.2g} in the middle ({end[middle['verdict']]}), {most['ours']:+.2g} at "
                              f"the most of it ({end[most['verdict']]}).")
    if c := starting("Fig 3 plateau"):
        plateau, seeds = results["arrays"]["fig3"]["plateau"], results["config"]["plateau_seeds"]
        out["results_when"].append(f"Plateau (half the contrast, {seeds} of each network): "
                                   f"{both('from small to large', *c[:2])}.")
        by_length = [f"it {go(k)} after {n:,} steps" for k, n in zip(c[2:], plateau["lengths"], strict=True)]
        out["results_when"].append(f"One length at a time, along trajectories: {', '.join(by_length)}.")
    if c := starting("dial"):
        which = [go(k) for k in c]
        out["results_when"].append(f"Dial: along trajectories the error falls with size in {which.count('falls')} of "
                                   f"{len(c)} mixtures, and rises in {which.count('rises')}.")
    if c := starting("onset"):
        out["results_when"].append(f"Onset ({n_onset:,} textures): it {go(c[1])} while the largest network trains; "
                                   f"copies among its samples minus those among new crops: {100 * c[2]['ours']:+.0f}%.")
    return {k: "\n".join(v) for k, v in out.items()}


def plot(path):
    """results.json -> results.png, and, of the sets made here, results_when.png beside it. -> the files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = json.loads(Path(path).read_text())
    a, said, files = results["arrays"], caption(results), []
    given, made = results["config"].get("model_path"), {"plateau", "dial", "onset"} & {*a, *a.get("fig3", ())}
    for name, panels in PICTURES.items() if not given else [("results", [("fig3", draw_fig3, 3)])]:
        if name == "results_when" and not made:
            Path(path).with_name("results_when.png").unlink(missing_ok=True)     # of other results
            continue
        rows = 1 if given else 2
        with plt.rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 7.5, "legend.framealpha": 0.7}):
            fig, axes = plt.subplots(rows, 3, figsize=(9.4, 0.7 + 2.85 * rows), dpi=130, layout="constrained")
            room = (0.04 + 0.14 * (1 + said[name].count("\n"))) / fig.get_figheight()            # for the words below
            fig.get_layout_engine().set(rect=(0, room, 1, 1 - room))
            rest = list(axes.ravel())
            for part, draw, n in panels:
                mine, rest = rest[:n], rest[n:]
                if part in a:
                    draw(mine, a[part])
                for ax in () if part in a else mine:
                    ax.text(0.5, 0.5, f"not measured: --only {part}", ha="center", color=GREY)
                    ax.set_axis_off()
            fig.text(0.01, 0.008, said[name], va="bottom")
            files.append(Path(path).with_name(f"{name}.png"))
            with replacing(files[-1]) as f:
                fig.savefig(f, facecolor="white")
            plt.close(fig)
    return files


if __name__ == "__main__":
    cli(lambda cfg: train.experiment("exp_scaling", cfg, measure, plot, work), PRESETS)
