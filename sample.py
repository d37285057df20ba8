"""Sampling: follow the ODE dz/dt = v_theta(z, t) from noise at t = 1 down to an image at t = 0.
Between an image x and noise eps, z = (1 - t) x + t eps. From z, t and y the network predicts eps - x or x.

    python sample.py --run out/laptop_mnist5k_UNet-tiny-2-conv       # writes a grid of samples beside the checkpoint
    python sample.py --run out/laptop_mnist5k_UNet-tiny-2-conv --w 4      # with classifier-free guidance
    torchrun --nproc_per_node=4 -- sample.py --run SiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --n 50000 \
        --out samples.npz --fid VIRTUAL_imagenet256_labeled.npz     # official weights; the same command goes on
"""
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import tyro
from torchdiffeq import odeint

from plumbing.cli import pick_device, run_command, setup_processes
from plumbing.files import load_run
from plumbing.images import save_samples

T_MIN = 1e-3  # with x-prediction, v = (z - x)/t: where the solver stops, before it divides by 0


def velocity(model, z, t, y, w=1.0):
    """Return v_theta(z, t) (B, C, H, W) at one time t; y (B,) labels, or None for the unconditional v_u.

    w != 1 guides: v_c + (w - 1)(v_c - v_u), v_c with y. So it guides the score (Example 3.1), of which v is affine.
    """
    if w != 1 and y is not None:
        v_c = velocity(model, z, t, y)
        v_u = velocity(model, z, t, None)
        return v_c + (w - 1) * (v_c - v_u)
    # in pieces, so that activations fit a CPU's caches, or a GPU's memory
    at_once = 256 if z.device.type != "cpu" else min(256, max(1, 2**16 // z[0].numel()))
    pieces = z.split(at_once)
    labels = [None] * len(pieces) if y is None else y.split(at_once)
    out = torch.cat([model(z_piece, t, y_piece) for z_piece, y_piece in zip(pieces, labels, strict=True)])
    return out if model.prediction == "v" else (z - out) / t


def predict_x(model, z, t, y):
    """Return the clean image that the model predicts, x_theta = z - t v_theta."""
    return z - t * velocity(model, z, t, y)


# ----------------------------------------------------------------------------------------------------------------------
# Three solvers of dz/dt = f(t, z): z at every time of a descending grid, (T, B, C, H, W)

def euler(f, z, times):
    """Take one step along the velocity from each time to the next. Twice as many steps about halve the error.

    f(t, z) returns the velocity at z (B, C, H, W). The path starts from z at times[0]; times (T,) descend.
    """
    path = [z]
    for t, t_next in pairwise(times):
        z = z + (t_next - t) * f(t, z)
        path.append(z)
    return torch.stack(path)


def heun(f, z, times):
    """Take each step with the mean of the velocities at its start and at its end, so f is called twice a step.
    Twice as many steps make the error about four times smaller."""
    path = [z]
    for t, t_next in pairwise(times):
        v = f(t, z)
        v_next = f(t_next, z + (t_next - t) * v)
        z = z + (t_next - t) * (v + v_next) / 2
        path.append(z)
    return torch.stack(path)


def dopri5(f, z, times, atol, rtol):
    """Take steps of order 5 by Dormand and Prince, and interpolate between them to the times of the grid.

    The paper's solver (C.1). It tries a step again, shorter, if two formulas differ by more than atol + rtol |z|, in
    root mean square over the whole batch. So a sample depends a little on its batch: keep --batch fixed to compare.
    """
    clock = torch.float32 if z.device.type == "mps" else torch.float64   # MPS has no float64
    # without step_t the solver steps past the end, to t < 0, and interpolates back
    options = dict(step_t=times[-1:], dtype=clock)
    return odeint(f, z, times, method="dopri5", atol=atol, rtol=rtol, options=options)


def add_equal_steps(t_grid, steps):
    """Return the times of `steps` equal steps and those of the grid, each once, descending."""
    equal = torch.linspace(t_grid[0].item(), t_grid[-1].item(), steps + 1, device=t_grid.device)
    is_new = (equal[:, None] - t_grid).abs().amin(dim=1) > 1e-6
    return torch.cat([t_grid, equal[is_new]]).sort(descending=True)[0]


@torch.no_grad()
def solve_ode(model, z1, y, t_grid=None, w=1.0, solver="dopri5", steps=50, atol=1e-6, rtol=1e-3):
    """Return z at every time of the grid, (T, B, C, H, W), from z1 (B, C, H, W) at time t_grid[0].

    t_grid  descending times in [0, 1], by default [1, 0], so that solve_ode(...)[-1] are images. It may start anywhere.
    solver  "euler" or "heun" with `steps` equal steps and the grid's own times, or "dopri5" with atol and rtol
    Raise ValueError for another solver or grid. y and w are those of `velocity`.
    """
    t_grid = torch.as_tensor([1.0, 0.0] if t_grid is None else t_grid, dtype=torch.float32, device=z1.device)
    if len(t_grid) < 2 or not (t_grid.diff() < 0).all() or not 0 <= t_grid[-1] < t_grid[0] <= 1:
        raise ValueError("t_grid must hold at least two times that descend within [0, 1]")

    def f(t, z):
        return velocity(model, z, t, y, w)

    # with x-prediction, v = (z - x)/t is 0/0 at t = 0: stop at T_MIN, and let one Euler step go to the end, at 0 to x
    stops_early = model.prediction == "x" and t_grid[-1] < T_MIN
    end = t_grid[-1].item()
    if stops_early:
        if t_grid[-2] <= T_MIN:
            raise ValueError(f"with x-prediction, no time of t_grid but the last may be {T_MIN} or less")
        t_grid = torch.cat([t_grid[:-1], t_grid.new_tensor([T_MIN])])
    if solver == "dopri5":
        path = dopri5(f, z1, t_grid, atol, rtol)
    elif solver in ("euler", "heun"):
        times = add_equal_steps(t_grid, steps)
        take_steps = euler if solver == "euler" else heun
        path = take_steps(f, z1, times)[torch.isin(times, t_grid)]
    else:
        raise ValueError(f"unknown solver {solver!r}: expected dopri5, heun or euler")
    if stops_early:
        path[-1] = path[-1] - (T_MIN - end) * f(t_grid[-1], path[-1])
    return path


def noise(index, shape, seed=0):
    """Return the starting noise (B, *shape) of the images number `index`.

    Each image has a generator of its own, so that its noise is the same in any batch and on any number of processes.
    """
    draws = []
    for i in index:
        generator = torch.Generator().manual_seed(1_000_003 * seed + int(i))
        draws.append(torch.randn(shape, generator=generator))
    return torch.stack(draws)


@dataclass
class Config:
    run: str = tyro.MISSING  # a run's folder as train.py prints it, or a file of official SiT weights
    n: int = 64  # how many images
    label: int | None = None  # one class; default: all in turn
    w: float = 1.0  # guidance; 1 is none
    solver: Literal["dopri5", "heun", "euler"] = "dopri5"  # see above, in this file
    steps: int = 50  # steps of heun and euler
    batch: int = 64  # images at a time; dopri5's steps depend on it
    seed: int = 0  # of the starting noise, which is always the same for image i
    ema: bool = True  # the averaged weights; --no-ema takes the raw ones
    device: str = "auto"  # auto, cpu, cuda, mps
    vae: str = ""  # autoencoder that turns latents into images: a folder, or a name on the Hugging Face hub
    out: str = ""  # NAME.npz: all images for FID; else a PNG, by default samples_*.png in the run's folder
    fid: str = ""  # print the FID of the .npz to this: a folder of images, or an .npz of images or of mu and sigma


def main(cfg):
    rank, world, device = setup_processes(pick_device(cfg.device))
    model = load_run(cfg.run, device, cfg.ema)

    def sample(index, y):
        """Return the images number `index` (B,) of classes y (B,)."""
        z1 = noise(index, (model.in_channels, model.input_size, model.input_size), cfg.seed).to(device)
        return solve_ode(model, z1, y, w=cfg.w, solver=cfg.solver, steps=cfg.steps)[-1]

    save_samples(cfg, sample, model, device, rank, world)


if __name__ == "__main__":
    run_command(main, {"laptop": Config()}, __doc__)
