"""Train a diffusion model by denoising score matching, Eq. (1): minimise the mean of |v_theta(z, t, y) - (eps - x)|^2.

    python train.py                                     # 4,500 real digits, about 3 minutes on 2 CPU cores
    torchrun --nproc_per_node=4 train.py                # the same update, each batch divided among 4 processes
    python train.py --preset gpu                        # MNIST on one GPU; first: python data/prepare.py mnist
    python train.py --model UNet-nano --steps 500       # any field of Config, below

Writes out/<run>/: ckpt.pt (the same command resumes from it), ema_<step>.pt (--keep), log.jsonl, samples.png.

Everything random about step k (which images, t, noise and dropped labels) is a function of (seed, k, batch, device),
drawn for the whole batch; every process takes its slice. So N processes make the update of one, up to rounding. On a
CPU, a run that was interrupted goes on as if nothing had happened, without saving the state of any random generator.
"""
import copy
import dataclasses
import functools
import math
from contextlib import nullcontext
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model import build_model
from plumbing import cli, runs
from plumbing.data import feed_steps, get_images, load_data, model_sizes
from plumbing.files import lock_folder
from plumbing.images import save_grid
from sample import noise, solve_ode


@dataclasses.dataclass
class Config:
    preset: Literal["laptop", "gpu", "paper"] = "laptop"  # where the defaults of all other fields come from
    data: str = "mnist5k"  # a data set under data/, or a folder of the same layout
    model: str = "UNet-tiny/2-conv"  # SiT-<size>/<patch> or UNet-<size>[/<patch>][-conv]: see model.py
    prediction: Literal["v", "x"] = "v"  # v = eps - x, or the clean image x, whose squared error is t^2 times v's
    steps: int = 1200  # training iterations
    batch: int = 32  # images per step, over all processes together
    accum: int = 1  # gradient accumulation: cut each process's part of the batch into so many micro-batches
    lr: float = 3e-3  # of AdamW, betas .9 and .999, without weight decay
    warmup: int = 100  # steps over which the learning rate rises to lr
    decay: float = 0.5  # part of the steps, at the end, over which the learning rate falls linearly to 0
    ema: float = 0.999  # decay of the averaged weights, at most: at step k it is (1 + k)/(10 + k), if that is less
    label_dropout: float = 0.1  # probability that a label becomes the null label, for the unconditional score
    repa: float = 0.0  # weight of REPA's loss: pull tokens towards a teacher's features, features.npy of the data
    repa_depth: int = 8  # number of the block, from 1, whose tokens REPA aligns; SiT only
    init: str = ""  # weights to start from: a run's folder, or official SiT weights (.pt, .safetensors)
    compile: bool = False  # torch.compile: takes a minute at the start, meant for GPUs
    seed: int = 0  # of the weights, the batches and the noise
    log_every: int = 100  # steps between log lines; each checkpoint gets one, too
    save_every: int = 400  # steps between checkpoints, held-out losses and sample grids
    keep: tuple[int, ...] = ()  # steps whose averaged weights stay, as ema_<step>.pt
    grid: bool = True  # draw samples with every checkpoint
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str = ""  # folder of the run; default out/<preset>_<data>_<model>_<what else changes its weights>


PRESETS = {
    "laptop": Config(),
    "gpu": Config("gpu", "mnist", "SiT-S/2", steps=20_000, batch=256, lr=3e-4, decay=0.0, ema=0.9995, compile=True,
                  log_every=200, save_every=5_000),
    # C.1 of the paper: SiT-XL/2 on SD-VAE latents of ImageNet 256, 400K iterations on 4 H100
    "paper": Config("paper", "imagenet", "SiT-XL/2", steps=400_000, batch=256, lr=1e-4, warmup=0, decay=0.0,
                    ema=0.9999, compile=True, log_every=500, save_every=10_000, keep=(200_000, 300_000, 400_000)),
}


# ----------------------------------------------------------------------------------------------------------------------
# One step: what it sees, and what it minimises

@functools.lru_cache(maxsize=2)
def epoch_order(epoch, n_images, seed):
    return np.random.default_rng([seed, epoch]).permutation(n_images)


def step_indices(step, batch, n_images, seed):
    """Return the rows (batch,) of a step: a permutation per epoch, end to end, so a batch may straddle two epochs."""
    rows = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, n_images)
        rows.append(epoch_order(epoch, n_images, seed)[place])
    return np.array(rows)


def step_noise(step, shape, seed, device):
    """Return t (B,), eps (B, C, H, W), and a uniform number per image that decides whether its label is dropped."""
    generator = torch.Generator(device).manual_seed(1_000_003 * seed + step)
    t = torch.rand(shape[0], generator=generator, device=device)
    eps = torch.randn(shape, generator=generator, device=device)
    drop = torch.rand(shape[0], generator=generator, device=device)
    return t, eps, drop


class Objective(nn.Module):
    """Denoising score matching, Eq. (1), and REPA's alignment of the tokens after a block with a teacher's features."""
    def __init__(self, model, repa_depth=None, feature_dim=None):
        super().__init__()
        self.model, self.repa_depth, self.projector = model, repa_depth, None
        if feature_dim:
            width = model.pos_embed.shape[-1]
            # 2048 in REPA's own code; narrower for the networks of a laptop
            hidden = 2048 if width >= 384 else 4 * width
            self.projector = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                                           nn.Linear(hidden, feature_dim))
            for layer in self.projector[::2]:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x, y, t, eps, features=None):
        """Return (squared error, -cosine), both to minimise; x, eps (B, C, H, W), y, t (B,), features (B, T, dim)."""
        t_ = t[:, None, None, None]
        z = (1 - t_) * x + t_ * eps                          # (B, C, H, W); t = 0 is clean, t = 1 pure noise
        target = eps - x if self.model.prediction == "v" else x
        if features is None:
            return (self.model(z, t, y).float() - target).square().mean(), 0.0
        out, tokens = self.model(z, t, y, tokens_after=self.repa_depth)
        cosine = F.cosine_similarity(self.projector(tokens).float(), features, dim=-1)       # (B, T)
        return (out.float() - target).square().mean(), -cosine.mean()


@torch.no_grad()
def update_average(average, model, step, decay):
    """Move the average towards the model. At step k it spans k/9 steps, until decay is less: it forgets the start."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


def learning_rate(cfg, step):
    """Return the rate of a step: it rises over cfg.warmup steps, is constant, and may fall to 0 at the end."""
    rate = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup))
    return rate * min(1.0, (1 - step / cfg.steps) / cfg.decay) if cfg.decay else rate


@torch.no_grad()
def heldout_loss(model, data, device):
    """Return the loss on held-out images, no label dropped, with the same noise each time; None without such images."""
    if "x_heldout" not in data:
        return None
    n = min(512, len(data["x_heldout"]))
    x, y = get_images(data, np.arange(n), device, "x_heldout")
    eps = noise(range(n), x.shape[1:], seed=1).to(device)
    t = torch.from_numpy((np.random.default_rng(0).permutation(n) + 0.5) / n).float().to(device)
    return Objective(model)(x, y, t, eps)[0].item()


# ----------------------------------------------------------------------------------------------------------------------
# The run

# fields in which a resumed run may differ from its checkpoint: steps only if decay = 0; another device, other noise
MAY_CHANGE = ("preset", "out", "device", "compile", "log_every", "save_every", "steps", "keep", "grid", "accum")


def train(cfg, alone=False):  # noqa: C901 (the loop is told in one piece)
    """Train, or resume, or find the run finished; return its folder. Raise ValueError for a bad config or divergence.

    Under torchrun every process calls this. alone: ignore torchrun, and print and log nothing, for sweeps.
    """
    device = cli.pick_device(cfg.device)
    rank, world, device = (0, 1, device) if alone else cli.setup_processes(device)
    runs.check_training(cfg, world)
    data, run = load_data(cfg.data), runs.run_folder(cfg, PRESETS[cfg.preset], MAY_CHANGE)
    lock = lock_folder(run) if rank == 0 else None                       # one writer, until `lock` is forgotten

    # Build the network, what it minimises, the average of its weights, and the optimizer.
    torch.manual_seed(cfg.seed)
    model_args = dict(name=cfg.model, **model_sizes(data), prediction=cfg.prediction)
    model = build_model(**model_args).to(device)
    feature_dim = runs.check_repa(cfg, data, model) if cfg.repa else None
    objective = Objective(model, cfg.repa_depth, feature_dim).to(device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, cfg.lr, weight_decay=0, fused=device.type != "mps")

    # Go on from the last checkpoint, or start from given weights.
    parts = dict(model=model, ema=average, optimizer=optimizer)
    if cfg.repa:
        parts["projector"] = objective.projector
    identity = dict(config=dataclasses.asdict(cfg), model_args=model_args, fingerprint=data["fingerprint"])
    first_step = runs.restore(run, parts, identity, MAY_CHANGE)
    if cfg.init and first_step == 0:
        runs.load_initial(cfg.init, model)
        average.load_state_dict(model.state_dict())
    millions = sum(p.numel() for p in trainable) / 1e6
    about = f"{cfg.model}, {millions:.2f}M parameters, {len(data['x']):,} images of {cfg.data}"
    log = runs.RunLog(about, run, cfg, model_args, device, world, first_step, quiet=alone or rank > 0)

    # Several processes average their gradients. CUDA multiplies in bfloat16; weights, loss and Adam stay in float32.
    loss_fn = torch.compile(objective) if cfg.compile else objective
    if world > 1:
        loss_fn = DistributedDataParallel(loss_fn, [device.index] if device.type == "cuda" else None)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    shape, num_classes = data["x"].shape[1:], data["meta"]["num_classes"]
    per_process = cfg.batch // world
    micro = per_process // cfg.accum
    mine = slice(rank * per_process, (rank + 1) * per_process)           # this process's part of the global batch

    def rows_of_step(step):
        return step_indices(step, cfg.batch, len(data["x"]), cfg.seed)[mine]

    arrays = [data[name] for name in (("x", "y", "features") if cfg.repa else ("x", "y"))]
    batches = feed_steps(arrays, rows_of_step, range(first_step, cfg.steps), device)
    running, last_log = 0.0, first_step                      # sum of squared errors since the last log line; its step
    for step, (x, y, *features) in log.bar(batches):
        t, eps, drop = (a[mine] for a in step_noise(step, (cfg.batch, *shape), cfg.seed, device))
        y = torch.where(drop < cfg.label_dropout, num_classes, y)        # num_classes is the null label

        # Go forward and backward, a micro-batch at a time. Processes exchange gradients in the last backward pass.
        for start in range(0, per_process, micro):
            part = slice(start, start + micro)
            exchange = world == 1 or start + micro == per_process
            with nullcontext() if exchange else loss_fn.no_sync():
                with autocast:
                    dsm, alignment = loss_fn(*(a[part] for a in (x, y, t, eps, *features)))
                ((dsm + cfg.repa * alignment) / cfg.accum).backward()
            running = running + dsm.detach() / cfg.accum

        # Update the weights, and the average of them.
        optimizer.param_groups[0]["lr"] = learning_rate(cfg, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step, cfg.ema)

        # At some steps, log the loss, save a checkpoint, and draw samples.
        done = step + 1
        is_kept = done in cfg.keep
        saves = is_kept or done == cfg.steps or done % cfg.save_every == 0
        if not (saves or done % cfg.log_every == 0):
            continue
        loss = runs.mean_over_processes(running / (done - last_log), world)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {done}, lr {learning_rate(cfg, step):g}: it diverged. Try a "
                             "smaller --lr: that is a new run, which may start by --init from an earlier checkpoint")
        tested = heldout_loss(average, data, device) if saves and rank == 0 else None
        log.write(step=done, loss=loss, heldout_loss=tested, lr=learning_rate(cfg, step))
        running, last_log = 0.0, done
        if saves and rank == 0:
            runs.save_run(run, parts, identity, done, keep=is_kept)
            if cfg.grid:
                draw_samples(average, shape, num_classes, device, run / "samples.png")
    if world > 1:
        cli.wait_for_all()                                   # until the first process has written the last checkpoint
    del lock
    return run


def draw_samples(model, shape, num_classes, device, path):
    """Draw 40 samples, the first ten classes in turn, always from the same noise."""
    z1, y = noise(range(40), shape).to(device), torch.arange(40, device=device) % min(10, num_classes)
    save_grid(solve_ode(model, z1, y, solver="heun", steps=25)[-1], path)


if __name__ == "__main__":
    cli.run_command(train, PRESETS, __doc__)
