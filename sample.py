"""
Sampling: follow the ODE dz/dt = v_theta(z, t) from noise at t = 1 down to an image at t = 0.

    python sample.py --run out/laptop_mnist5k_SiT-tiny-4            # writes a grid of samples beside the checkpoint
    python sample.py --run out/laptop_mnist5k_SiT-tiny-4 --w 4      # with classifier-free guidance

The model is rebuilt from the checkpoint: there are no architecture flags. The paper's solver is dopri5 with absolute
tolerance 1e-6 and relative tolerance 1e-3 (C.1). It chooses its steps by an error norm over the *whole batch*, so that
a sample depends, a little, on what it is sampled with: keep --batch fixed to compare. Heun and Euler take equal steps.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "torchdiffeq==0.2.5", "matplotlib==3.11.2", "tqdm==4.70.1", "tyro==1.0.17"]
# ///
import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torchdiffeq import odeint
from tqdm import tqdm

from model import build_model

# ----------------------------------------------------------------------------------------------------------------------
# The ODE

T_MIN = 1e-3                                                 # where x-prediction stops dividing by t

def velocity(model, z, t, y, w=1.0):
    """v_theta(z, t) with guidance: v_c + (w - 1)(v_c - v_u), on all channels; w = 1 is none. The score's guidance
    (Example 3.1) is the same thing, since v is linear in s. y (B,) or None for the unconditional v_u. -> like z."""
    if w != 1 and y is not None:
        both = torch.cat([y, torch.full_like(y, model.num_classes)])
        v_c, v_u = velocity(model, torch.cat([z, z]), t, both).chunk(2)
        return v_c + (w - 1) * (v_c - v_u)
    out = model(z, t, y)
    return out if model.prediction == "v" else (z - out) / t


@torch.no_grad()
def sample(model, z1, y, *, t_grid=None, w=1.0, solver="dopri5", steps=50, atol=1e-6, rtol=1e-3, progress=False,
           stats=None):
    """Integrate from z1 (B, *shape) at time t_grid[0] to t_grid[-1]; return z at every t of the grid, (T, B, *shape).

    t_grid   descending times in [0, 1]; default [1, 0], so that sample(...)[-1] are the images. It may start anywhere:
             a noisy image z_t continues from t. Adaptive steps are not changed by it (dense output).
    y        (B,) labels, or None for the unconditional model.        w   guidance; 1 is none.
    solver   "dopri5" (adaptive, atol, rtol), "heun" or "euler" (fixed: `steps` equal steps, and the grid's own times).
    stats    a dict to be filled with nfe, the number of function evaluations, and solver.
    With x-prediction, v = (z - x)/t is 0/0 at t = 0: the solver stops at t = .001, and one Euler step, which lands on
    the predicted x itself, does the rest. Raises ValueError for a solver or a grid that is none.
    """
    t_grid = torch.as_tensor([1.0, 0.0] if t_grid is None else t_grid, dtype=torch.float32, device=z1.device)
    if len(t_grid) < 2 or (t_grid.diff() >= 0).any() or t_grid[0] > 1 or t_grid[-1] < 0:
        raise ValueError("t_grid must hold at least two times that descend within [0, 1]")
    if solver not in ("dopri5", "heun", "euler"):
        raise ValueError(f"unknown solver {solver!r}: expected dopri5, heun or euler")
    last, grid = t_grid[-1].item(), t_grid
    if model.prediction == "x" and last < T_MIN:
        if t_grid[-2] <= T_MIN:
            raise ValueError(f"with x-prediction, t_grid may hold one time below {T_MIN}, the last")
        grid = torch.cat([t_grid[:-1], t_grid.new_tensor([T_MIN])])
    uniform = torch.linspace(grid[0].item(), grid[-1].item(), steps + 1, device=z1.device)
    apart = (uniform[:, None] - grid).abs().amin(1) > 1e-6   # the grid's own times are added to these, each once
    if solver == "dopri5":                                   # without step_t it steps past the end, to t < 0, and back
        clock = torch.float32 if z1.device.type == "mps" else torch.float64
        options = dict(method="dopri5", atol=atol, rtol=rtol, options=dict(step_t=grid[-1:], dtype=clock))
    else:
        options = dict(method={"heun": "heun2", "euler": "euler"}[solver], options=dict(
            grid_constructor=lambda f, z, t: torch.cat([t, uniform[apart]]).sort(descending=True)[0]))
    nfe, start, span = 0, grid[0].item(), (grid[0] - grid[-1]).item()
    with tqdm(total=100, desc="sampling", disable=None if progress else True, leave=False,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def f(t, z):
            nonlocal nfe
            nfe += 1
            bar.set_postfix(nfe=nfe, refresh=False)
            bar.update(max(0.0, 100 * (start - float(t)) / span - bar.n))
            return velocity(model, z, t, y, w)

        trajectory = odeint(f, z1, grid, **options)
        if grid is not t_grid:
            trajectory[-1] -= (T_MIN - last) * f(grid[-1], trajectory[-1])
    if stats is not None: stats.update(nfe=nfe * (2 if w != 1 and y is not None else 1), solver=solver)
    return trajectory


def noise(index, shape, seed=0):
    """Starting noise (B, *shape) of the images number `index`: one generator an image, so that image i is the same in
    any batch and on any number of processes. Drawn on the CPU, whose generator is the same everywhere."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(1_000_003 * seed + int(i)))
                        for i in index])


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, devices, pictures, the command line: what every script needs

def pick_device(name="auto"):
    """"auto" -> cuda, then mps, then cpu; ValueError if the one asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d, is_there in there.items() if is_there)
    if not there.get(name.split(":")[0], False):
        raise ValueError(f"device {name!r} is not available here: expected auto or {[*filter(there.get, there)]}")
    return torch.device(name)


def load_run(run, device="cpu", ema=True):
    """out/<run> -> (the model in eval mode, its EMA weights by default; the rest of the checkpoint).
    FileNotFoundError if there is no checkpoint, ValueError if the file is none."""
    path = Path(run) / "ckpt.pt" if Path(run).suffix != ".pt" else Path(run)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with python train.py, and name its folder")
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        model = build_model(**ckpt["model_args"])
        model.load_state_dict(ckpt.pop("ema" if ema else "model"))
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint of this project: {str(e).splitlines()[0]}") from e
    return model.to(device).eval().requires_grad_(False), ckpt


def to_uint8(x):
    """(..., C, H, W) in [-1, 1] -> uint8 (..., H, W, C), as FID evaluators want it: clamp(127.5 x + 128, 0, 255)."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu()


def save_grid(x, path, columns=8):
    """Images (B, C, H, W) in [-1, 1] -> one PNG, row by row. Of more than three channels (latents), the first three."""
    import matplotlib.image
    x = to_uint8(x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1))        # (B, H, W, 3)
    rows, (H, W, C) = -(-len(x) // columns), x.shape[1:]
    canvas = torch.zeros(rows * columns, H, W, C, dtype=torch.uint8)
    canvas[:len(x)] = x
    canvas = canvas.view(rows, columns, H, W, C).transpose(1, 2).reshape(rows * H, columns * W, C)
    canvas = canvas.repeat_interleave(k := max(1, 64 // H), 0).repeat_interleave(k, 1)   # small images: visible pixels
    tmp = Path(path).with_suffix(".tmp.png")
    matplotlib.image.imsave(tmp, canvas.numpy())
    os.replace(tmp, path)


def cli(main, presets):
    """Run main(config) with a config from the command line: --preset picks one, every other flag overrides one field.
    What the user got wrong (ValueError, OSError, an optional package that is missing) becomes one line and exit
    status 1; --debug shows the traceback."""
    if debug := "--debug" in sys.argv: sys.argv.remove("--debug")
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", default=next(iter(presets)))
    name = peek.parse_known_args()[0].preset
    try:
        if name not in presets: raise ValueError(f"unknown preset {name!r}: expected {', '.join(presets)}")
        main(tyro.cli(type(presets[name]), default=presets[name], description=sys.modules["__main__"].__doc__))
    except SystemExit as e:                                  # tyro exits with 2 for a wrong flag, 0 for --help
        sys.exit(1 if e.code else 0)
    except (ValueError, OSError, ImportError) as e:
        if debug: raise
        sys.exit(f"error: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


@dataclass
class Config:
    run: str = tyro.MISSING  # folder with a ckpt.pt, as train.py prints it
    n: int = 64  # how many images
    label: int | None = None  # one class; default: all of them in turn
    w: float = 1.0  # guidance; 1 is none
    solver: Literal["dopri5", "heun", "euler"] = "dopri5"  # see the top of this file
    steps: int = 50  # steps of heun and euler
    batch: int = 64  # images at a time; dopri5's steps depend on it
    seed: int = 0  # image i of a seed is always the same
    ema: bool = True  # the averaged weights; --no-ema takes the raw ones
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str = ""  # the PNG; default samples_*.png in the run's folder


def main(cfg):
    model, ckpt = load_run(cfg.run, device := pick_device(cfg.device), cfg.ema)
    if cfg.n < 1 or cfg.batch < 1 or cfg.steps < 1:
        raise ValueError("n, batch and steps must be at least 1")
    if cfg.label is not None and not 0 <= cfg.label < model.num_classes:
        raise ValueError(f"label {cfg.label} is none of this model's, 0 to {model.num_classes - 1}")
    shape = (model.in_channels, model.input_size, model.input_size)
    y = torch.arange(cfg.n) % model.num_classes if cfg.label is None else torch.full((cfg.n,), cfg.label)
    images, stats = [], {}
    for i in torch.arange(cfg.n).split(cfg.batch):
        z1 = noise(i, shape, cfg.seed).to(device)
        images.append(sample(model, z1, y[i].to(device), w=cfg.w, solver=cfg.solver, steps=cfg.steps, progress=True,
                             stats=stats)[-1])
        print(f"images {int(i[0])} to {int(i[-1])}: {stats['nfe']} function evaluations", flush=True)
    folder = Path(cfg.run) if Path(cfg.run).is_dir() else Path(cfg.run).parent
    out = Path(cfg.out) if cfg.out else folder / f"samples_w{cfg.w:g}_{cfg.solver}_seed{cfg.seed}.png"
    save_grid(torch.cat(images), out, columns=model.num_classes if cfg.label is None and model.num_classes <= 10 else 8)
    print(f"{cfg.n} samples of step {ckpt['step']} ({device}, {cfg.solver}, w = {cfg.w:g}): {out}")


if __name__ == "__main__":
    cli(main, {"laptop": Config()})
