"""
Sampling: follow the ODE dz/dt = v_theta(z, t) from noise at t = 1 down to an image at t = 0.

    python sample.py --run out/laptop_mnist5k_SiT-tiny-4            # writes a grid of samples beside the checkpoint
    python sample.py --run out/laptop_mnist5k_SiT-tiny-4 --w 4      # with classifier-free guidance
    torchrun --nproc_per_node=4 -- sample.py --run SiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --n 50000 \
        --out samples.npz --fid VIRTUAL_imagenet256_labeled.npz     # official weights, decoded, for FID; resumes

The model is rebuilt from the checkpoint: there are no architecture flags. The paper's solver is dopri5 with absolute
tolerance 1e-6 and relative tolerance 1e-3 (C.1). It chooses its steps by an error norm over the *whole batch*, so that
a sample depends, a little, on what it is sampled with: keep --batch fixed to compare. Heun and Euler take equal steps.
(The -- after torchrun's own flags keeps it from taking --run and --n for abbreviations of its own.)

In reading order: the ODE; checkpoints and pictures; many images in one .npz; the Frechet distance; the command. The
third and the fourth are only for thousands of images; they make this file longer than sampling alone need be.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "torchdiffeq==0.2.5", "matplotlib==3.11.2", "tqdm==4.70.1",
#                 "tyro==1.0.17"]
# ///
import contextlib
import difflib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, is_dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torchdiffeq import odeint
from tqdm import tqdm

from model import build_model, check_weights, load_sit_checkpoint, read_weights

# ----------------------------------------------------------------------------------------------------------------------
# The ODE

T_MIN = 1e-3                                                 # where x-prediction stops dividing by t
NFE = 150                                                    # what --dry-run assumes of dopri5: twice the 74 seen here

def velocity(model, z, t, y, w=1.0):
    """v_theta(z, t) with guidance: v_c + (w - 1)(v_c - v_u), on all channels; w = 1 is none. The score's guidance
    (Example 3.1) is the same thing, since v is linear in s. y (B,) or None for the unconditional v_u. -> like z."""
    if w != 1 and y is not None:
        both = torch.cat([y, torch.full_like(y, model.num_classes)])
        v_c, v_u = velocity(model, torch.cat([z, z]), t, both).chunk(2)
        return v_c + (w - 1) * (v_c - v_u)
    # a few at once: activations stay in a CPU's caches, and those of large networks fit beside a GPU's data
    at_once = min(256, max(1, 2**16 // z[0].numel())) if z.device.type == "cpu" else 256
    pieces = z.split(at_once)
    labels = [None] * len(pieces) if y is None else y.split(at_once)
    out = torch.cat([model(zb, t, yb) for zb, yb in zip(pieces, labels, strict=True)])
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
    if len(t_grid) < 2 or not ((t_grid.diff() < 0).all() and t_grid[0] <= 1 and t_grid[-1] >= 0):    # nan is none
        raise ValueError("t_grid must hold at least two times that descend within [0, 1]")
    if solver not in ("dopri5", "heun", "euler"):
        raise ValueError(f"unknown solver {solver!r}: expected dopri5, heun or euler")
    last, grid = t_grid[-1].item(), t_grid
    if model.prediction == "x" and last < T_MIN:
        if t_grid[-2] <= T_MIN:
            raise ValueError(f"with x-prediction, t_grid may hold one time below {T_MIN}, the last")
        grid = torch.cat([t_grid[:-1], t_grid.new_tensor([T_MIN])])
    if solver == "dopri5":                                   # without step_t it steps past the end, to t < 0, and back
        clock = torch.float32 if z1.device.type == "mps" else torch.float64
        options = dict(method="dopri5", atol=atol, rtol=rtol, options=dict(step_t=grid[-1:], dtype=clock))
    else:                                                    # equal steps, and the grid's own times, each once
        uniform = torch.linspace(grid[0].item(), grid[-1].item(), steps + 1, device=z1.device)
        apart = (uniform[:, None] - grid).abs().amin(1) > 1e-6
        at = torch.cat([grid, uniform[apart]]).sort(descending=True)[0]
        options = dict(method=dict(heun="heun2", euler="euler")[solver], options=dict(grid_constructor=lambda *_: at))
    nfe, start, span = 0, grid[0].item(), (grid[0] - grid[-1]).item()
    with tqdm(total=100, desc="sampling", disable=None if progress else True, leave=False,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:

        def f(t, z):
            nonlocal nfe
            nfe += 1
            bar.set_postfix(nfe=nfe, refresh=False)
            if progress: bar.update(max(0.0, 100 * (start - float(t)) / span - bar.n))       # float(t) waits for a GPU
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
    if name.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = True         # as SiT's own code does; the empirical score goes without
    return torch.device(name)


def processes(device):
    """-> (rank, number of processes, device of this one). Under torchrun every process takes a GPU of its own, and they
    can wait for one another; sampling exchanges nothing else, so gloo does for GPUs as well."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        local = int(os.environ.get("LOCAL_RANK", rank))
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise ValueError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
            torch.cuda.set_device(device := torch.device("cuda", local))
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=7))       # hours may lie between two of them
    return rank, world, device


def wait_for_all():
    """Until every process has come here; OSError as soon as one of them has died."""
    try:
        if dist.is_initialized(): dist.monitored_barrier(timeout=timedelta(days=7))      # the slowest may be far behind
    except RuntimeError as e:
        raise OSError("another process has ended: what it has said tells why") from e


def read_checkpoint(path):
    """A checkpoint of train.py -> its dict. ValueError if it is none, or damaged."""
    ckpt = read_weights(path)
    for key, kind in dict(ema=dict, model_args=dict, step=int, config=dict, device=str).items():
        if not isinstance(ckpt.get(key), kind):
            what = f"is a {type(ckpt[key]).__name__}, expected {kind.__name__}" if key in ckpt else "is missing"
            raise ValueError(f"{path} is not a checkpoint of train.py: {key} {what}")
    return ckpt


def rebuild(model_args, state):
    """The model of these arguments with these weights. Their shapes are compared before anything is allocated: a file
    may claim any size."""
    with torch.device("meta"):
        check_weights(state, build_model(**model_args).state_dict())
    model = build_model(**model_args)
    model.load_state_dict(state)
    return model


def load_run(run, device="cpu", ema=True):
    """out/<run>, a checkpoint of ours, or official SiT weights (.pt, .safetensors; see load_sit_checkpoint) -> (the
    model in eval mode, its EMA weights by default; the rest of our checkpoint, {} for official weights).
    FileNotFoundError if there is no such file, ValueError if it is neither."""
    path = Path(run) if Path(run).suffix in (".pt", ".safetensors") else Path(run) / "ckpt.pt"
    if not path.exists() and (before := path.with_name("ckpt.before.pt")).exists():      # killed between two renames
        path = before
    if not path.is_file():                                   # (reading a pipe would wait for ever)
        raise FileNotFoundError(f"no checkpoint at {path}: train one with python train.py, and name its folder")
    try:
        ckpt = read_weights(path)
        if {"model_args", "config", "optimizer"} & set(ckpt):            # ours: the names of its weights do not tell
            model = rebuild(ckpt["model_args"], ckpt.pop("ema" if ema else "model"))
        else:
            model, ckpt = load_sit_checkpoint(ckpt if ema else ckpt.get("model", ckpt)), {}
    except ImportError:
        raise
    except Exception as e:
        if no_memory(e): raise                               # that is no fault of the file's
        reason = f"{e} is missing" if isinstance(e, KeyError) else str(e).splitlines()[0].removeprefix(f"{path} ")
        raise ValueError(f"{path} is not a checkpoint of this project, nor official SiT weights: {reason}") from e
    return model.to(device).eval().requires_grad_(False), ckpt


def check_fit(model, path, shape, num_classes, data):
    """ValueError unless the model of file `path` is one for the images (C, H, W) and classes of the data set `data`."""
    has, wants = (model.in_channels, model.input_size, model.input_size), tuple(shape)
    if has != wants or model.num_classes != num_classes:
        raise ValueError(f"{path} is a model of images {has} in {model.num_classes} classes; the data set {data} has "
                         f"images {wants} in {num_classes} classes")


def pretrained(option, name, kind, **options):
    """A network, from a folder or by its name on the Hugging Face hub. ValueError in one line if it does not load."""
    if not os.path.isdir(name) and (name.count("/") != 1 or name[0] in "./~"):
        raise ValueError(f"{option} {name}: there is no such folder, and it is no name on the hub (owner/name)")
    try:
        return kind.from_pretrained(name, **options).eval().requires_grad_(False)
    except Exception as e:                                   # missing, offline, damaged: each library raises its own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"{option} {name}: cannot be loaded as {kind.__name__} ({reason})") from e


def load_vae(name):
    """The autoencoder of a latent model, a folder or a name on the Hugging Face hub -> diffusers' AutoencoderKL."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as e:
        raise ImportError(f"--vae needs the package diffusers ({e}): pip install diffusers") from e
    return pretrained("--vae", name, AutoencoderKL, low_cpu_mem_usage=False)     # True needs one more package


def lock(folder, patience=0.0):
    """Hold a folder until the file that this returns is closed: a killed torchrun can leave its workers running.
    ValueError if another holds it, and goes on to for `patience` seconds."""
    try:
        import fcntl
    except ImportError:                                      # Windows
        return contextlib.nullcontext()
    f, until = open(folder / "lock", "w"), time.time() + patience
    while True:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return f
        except BlockingIOError as e:
            if time.time() > until: raise ValueError(f"{folder}: another process is at work here") from e
        except OSError: return f                             # a file system without locks
        time.sleep(0.1)


@contextlib.contextmanager
def replacing(path):
    """with replacing(path) as f: writes aside, flushes to the disk, and moves into place: never half a file, and what
    was there before stays until then."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:                     # torch.save makes the second out of the first
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError): raise
        raise OSError(f"{path} could not be written, and is as it was before: {cause.strerror or cause}") from e
    finally:
        tmp.unlink(missing_ok=True)


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


def check_folder(folder):
    """OSError unless a file can be written to this folder or, if it is not there yet, to the first above it that is: a
    script should know before hours of work, not after. -> the folder that is there."""
    folder = Path(folder).absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as e:
        raise OSError(f"{there} is no folder that can be written to: {e.strerror}") from e
    return there


def check_numbers(cfg, within=""):
    """ValueError that names the first number of a config, of those within it too, that is no size and no rate of
    anything here: nan, infinite, or beyond 1e9. What is too small, every script knows for itself."""
    for name, value in vars(cfg).items():
        if is_dataclass(value):
            check_numbers(value, f"{within}{name}.")
        for v in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(v, (int, float)) and not -1e9 <= v <= 1e9:
                raise ValueError(f"{within}{name} must be a number of at most 1e9, not {v}")


def parse(default, description, argv=None):
    """The config that the flags make of `default`. ValueError for what tyro would draw a box of several lines about."""
    def flags(cfg, within="--"):
        for name, v in vars(cfg).items():
            yield from flags(v, f"{within}{name}.") if is_dataclass(v) else [(within + name).replace("_", "-")]

    def refuse(event):
        full = {flag: flag for flag in flags(default)}       # or by the last part: --data, for --train.data
        known = {f"--{flag.rpartition('.')[2]}": flag for flag in reversed(full) if "." in flag} | full
        if tokens := getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", None):
            near = difflib.get_close_matches(flag := tokens[0].partition("=")[0], known, 1)
            hint = f"; did you mean {known[near[0]]}?" if near else ""
            raise ValueError(f"unrecognized option {flag}{hint} (--help lists all)")
        if missing := getattr(event, "missing_arguments", None):
            raise ValueError(f"{missing[0].arg.display_name()} is required (--help says what it is)")
        if argument := getattr(event, "argument", None):
            why = getattr(event, "message", "") or (f"{event.value!r} is none of {', '.join(event.choices)}" if
                                                    hasattr(event, "choices") else "its value is missing")
            if (given := re.search(r"'.*'", why)) and type(event).__name__ == "InstantiationFailure":
                why = f"{given[0]} is not of the form {argument.lowered.metavar}"
            raise ValueError(f"{argument.display_name()}: {why}")

    argv = sys.argv[1:] if argv is None else argv
    for flag, value in pairwise([*argv, "--"]):              # which tyro takes for a tuple of no paths
        if flag == "--model-path" and value.startswith("--"):
            raise ValueError(f"{flag}: its value is missing")
    # a hook that is not public: where there is none, tyro draws its box
    hook = getattr(getattr(tyro, "_errors", None), "on_parse_error", contextlib.nullcontext)
    with hook(refuse):
        return tyro.cli(type(default), default=default, args=argv,
                        description=f"{description or ''}\n\n--debug, with all others: show where an error came from.")


FULL = "out of memory|allocate memory|size calculation overflowed"       # torch's words, in errors that have no class


def memory_room():
    """Bytes of memory that there are: the machine's, or the container's, if it has less."""
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else float("inf")
    group = Path("/sys/fs/cgroup/memory.max")
    return min(room, int(most)) if group.exists() and (most := group.read_text().strip()).isdigit() else room


def limit_memory():
    """On Linux, and without a GPU: what does not fit into the memory fails when it is asked for, which can be told in
    one line. By itself, Linux grants it, and kills the process once it is used."""
    if sys.platform == "linux" and not torch.cuda.is_available():
        import resource
        if resource.getrlimit(resource.RLIMIT_DATA)[0] < 0:  # else there is a limit already
            resource.setrlimit(resource.RLIMIT_DATA, (memory_room(), -1))


def no_memory(e):
    return isinstance(e, MemoryError) or isinstance(e, RuntimeError) and bool(re.search(FULL, str(e)))


def one_line(e):
    """What is said of an exception that is the user's to mend: a wrong value or file (ValueError, OSError), an optional
    package that is missing, sizes for which the memory is too small; None for any other."""
    text = str(e).splitlines()[0] if str(e) else type(e).__name__
    if no_memory(e):
        return f"too little memory for {' '.join(sys.argv)}: {text.rpartition('Allocator: ')[2]}"
    return text if isinstance(e, (ValueError, OSError, ImportError)) else None


def cli(main, presets):
    """Run main(config) with a config from the command line: --preset picks one, every other flag overrides one field.
    What the user got wrong becomes one line (one_line) and exit status 1; --debug shows the traceback."""
    if debug := "--debug" in sys.argv: sys.argv.remove("--debug")
    name = (re.findall(r"(?:^| )--preset[= ](\S+)", " ".join(sys.argv)) or [next(iter(presets))])[-1]
    limit_memory()
    try:
        if name not in presets: raise ValueError(f"unknown preset {name!r}: expected {', '.join(presets)}")
        cfg = parse(presets[name], doc := sys.modules["__main__"].__doc__)
        check_numbers(cfg)
        if int(os.environ.get("RANK", 0)) == 0 and doc:      # what this will do, and, as it says there, for how long
            usual = name == "laptop" and cfg == presets[name]                        # else it takes another time
            took = re.search(r"^ +python \S+ +# (.*)", doc, re.M) if usual else None
            print(doc.strip().splitlines()[0] + (f"\n{name} preset: {took[1]}" if took else ""), flush=True)
        main(cfg)
    except SystemExit as e:                                  # 0 after --help; tyro's box ends with 2
        sys.exit(1 if e.code else 0)
    except KeyboardInterrupt as e:
        sys.exit(": ".join(["interrupted", *map(str, e.args)]))
    except Exception as e:
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)                                    # torchrun ends all with the first: a fault is told once
        if debug or not (text := one_line(e)): raise
        sys.exit(f"error: {text}")


# ----------------------------------------------------------------------------------------------------------------------
# Many images: drawn batch by batch on any number of processes, each batch a file, in the end one .npz

def checksum(module):
    """Of all weights, to tell whose images these are."""
    h = hashlib.sha256()
    for name, value in module.state_dict().items():
        h.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]


def pick_labels(n, num_classes, how="balanced", seed=0):
    """(n,) labels: all classes in turn, or random ones, each a function of the seed and of its image's index alone."""
    if how == "balanced":
        return torch.arange(n) % num_classes
    return torch.tensor([np.random.default_rng([seed, i]).integers(num_classes) for i in range(n)])


def check_made(was, made, where):
    """ValueError that names the first thing in which the images found at `where` differ from those asked for."""
    if differ := [k for k in made if was.get(k) != made[k]]:
        raise ValueError(f"{where} holds images of {differ[0]} = {was.get(differ[0])}, not {made[differ[0]]}: delete "
                         "it, or give another --out")


def write_npz(path, draw, y, size, batch, made, rank=0, world=1):
    """Images 0 .. len(y) - 1 -> the .npz `path`: arr_0, uint8 (n, *size), which ADM's evaluator reads; labels; made.

    draw(indices (B,)) -> uint8 (B, *size), size = (H, W, 3). Images k batch .. (k+1) batch - 1 are always drawn
    together, whichever process does it, since dopri5's steps depend on the batch. A batch that is drawn becomes a file
    in <path>.parts: after a kill the same call goes on from there. `made` is a dict of all that decides on the images:
    what was made otherwise is refused (ValueError), and so is a disk that is too small (OSError).
    """
    parts, tasks = path.with_name(path.name + ".parts"), torch.arange(len(y)).split(batch)
    files, said = [parts / f"{k:06d}" for k in range(len(tasks))], parts / "made.json"
    if path.exists():
        was = read_npz(path, "made")
        check_made({} if was is None else json.loads(str(was)), made, path)
        if rank == 0: shutil.rmtree(parts, ignore_errors=True)           # killed when all was done but this
        return
    if rank == 0:
        parts.mkdir(parents=True, exist_ok=True)
        if said.exists():
            check_made(json.loads(said.read_text()), made, parts)
        for half in parts.glob(".*.tmp"):                    # what a kill interrupted
            half.unlink()
        todo = sum(len(i) for i, file in zip(tasks, files, strict=True) if not file.exists())
        need, free = (todo + len(y)) * int(np.prod(size)) + 10**6, shutil.disk_usage(parts).free
        if need > free:                                      # every image twice: in its batch's file, and merged
            raise OSError(f"{len(y)} images need {need / 1e9:.2f} GB more in {path.parent}: {free / 1e9:.2f} are free")
        with replacing(said) as f:
            f.write(json.dumps(made).encode())
    wait_for_all()                                           # nobody draws before rank 0 has agreed
    mine = [k for k in range(rank, len(tasks), world) if not files[k].exists()]
    for k in tqdm(mine, desc="batches", disable=None if rank == 0 else True, leave=False):
        images = draw(tasks[k]).numpy()
        with replacing(files[k]) as f:
            f.write(images.tobytes())
    wait_for_all()
    if rank == 0:
        with replacing(parts / "merged") as f:
            merge(f, files, (len(y), *size), dict(labels=y.numpy(), made=json.dumps(made)))
        os.replace(parts / "merged", path)
        shutil.rmtree(parts)


def merge(out, files, shape, more):
    """The bytes of `files`, streamed, as arr_0 of an .npz, and the arrays of `more`, into the open file `out`."""
    if (size := sum(f.stat().st_size for f in files)) != (want := int(np.prod(shape))):
        raise ValueError(f"{files[0].parent} holds {size} bytes of images, expected {want}: delete it, sample again")
    with zipfile.ZipFile(out, "w") as z:                     # ZipInfo: without it, the file would hold the time of day
        with z.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=shape))
            for file in tqdm(files, desc="merging", disable=None, leave=False):
                with open(file, "rb") as part:
                    shutil.copyfileobj(part, f, 2**20)
        for name, array in more.items():
            with z.open(zipfile.ZipInfo(f"{name}.npy"), "w") as f:
                np.lib.format.write_array(f, np.asarray(array), allow_pickle=False)


def read_npz(path, key):
    """One array of an .npz, or None if it has none of that name. ValueError if the file is no .npz."""
    try:
        with np.load(path, allow_pickle=False) as z:
            return z[key] if key in z.files else None
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} is not an .npz file: {str(e).splitlines()[0]}") from e


# ----------------------------------------------------------------------------------------------------------------------
# FID: the Frechet distance of two sets of images, in the features of an Inception network

def frechet(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), the squared Wasserstein distance of two Gaussians (FID)."""
    w, U = np.linalg.eigh(cov1)
    root = U * np.sqrt(w.clip(0)) @ U.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def gaussian(batches):
    """Features (b, dim), batch by batch -> mean (dim,), covariance (dim, dim), in float64; no batch is kept."""
    n = 0
    for f in batches:
        f = np.asarray(f, dtype=np.float64)
        if n == 0:
            origin, total, outer = f.mean(0), 0.0, 0.0       # near the mean: else the sums of squares would cancel
        n, total, outer = n + len(f), total + (f - origin).sum(0), outer + (f - origin).T @ (f - origin)
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {n}")
    return origin + total / n, (outer - np.outer(total, total) / n) / (n - 1)


def inception():
    """torch-fidelity's Inception-v3, the network of the original FID: f(uint8 (B, H, W, 3)) -> (B, 2048) numpy."""
    try:
        from torch_fidelity.utils import create_feature_extractor
    except (ImportError, RuntimeError) as e:                 # the second: a torchvision of another torch
        raise ImportError(f"an FID needs the package torch-fidelity ({e}): pip install torch-fidelity") from e
    where = "cuda" if torch.cuda.is_available() else "cpu"
    net = create_feature_extractor("inception-v3-compat", ["2048"], cuda=where == "cuda", verbose=False)
    return lambda images: net(torch.from_numpy(images).permute(0, 3, 1, 2).to(where))[0].cpu().numpy()


def image_batches(source, batch=64):
    """A folder of images of one size, or arr_0 of an .npz, uint8 (n, H, W, 3), streamed -> uint8 (B, H, W, 3), batch by
    batch. ValueError that names the file if it is none."""
    at = source
    try:
        if Path(source).is_dir():
            from PIL import Image
            paths = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
            if not paths: raise ValueError("no .png, .jpg or .webp in this folder")
            for i in range(0, len(paths), batch):
                images = []
                for at in paths[i:i + batch]:                # noqa: B020 (what the error below names)
                    images.append(np.asarray(Image.open(at).convert("RGB")))
                yield np.stack(images)
            return
        with zipfile.ZipFile(source) as z, z.open("arr_0.npy") as f:
            np.lib.format.read_magic(f)
            (n, *size), fortran, dtype = np.lib.format.read_array_header_1_0(f)
            if fortran or dtype != np.uint8 or len(size) != 3 or size[2] != 3:
                raise ValueError(f"arr_0 is {dtype} {(n, *size)}, expected uint8 (n, H, W, 3)")
            for i in range(0, n, batch):
                b = min(batch, n - i)
                yield np.frombuffer(bytearray(f.read(b * int(np.prod(size)))), np.uint8).reshape(b, *size)
    except (ValueError, KeyError, OSError, EOFError, SyntaxError, zipfile.BadZipFile) as e:      # SyntaxError: Pillow's
        raise ValueError(f"{at} cannot be read as images: {str(e).splitlines()[0]}") from e


def statistics(source, features):
    """Mean and covariance of the features of `source`: its own mu and sigma (ADM's references hold them, of this same
    network), or those of its images."""
    mu, sigma = (None if Path(source).is_dir() else read_npz(source, k) for k in ("mu", "sigma"))
    if mu is None:
        return gaussian(map(features, image_batches(source)))
    d = features(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]
    if mu.shape != (d,) or np.shape(sigma) != (d, d):
        raise ValueError(f"{source} has mu {mu.shape} and sigma {np.shape(sigma)}, expected ({d},) and ({d}, {d})")
    return mu.astype(np.float64), sigma.astype(np.float64)


# ----------------------------------------------------------------------------------------------------------------------
# The command

@dataclass
class Config:
    run: str = tyro.MISSING  # folder with a ckpt.pt, as train.py prints it; or a file with official SiT weights
    n: int = 64  # how many images
    label: int | None = None  # one class; default: see labels
    labels: Literal["balanced", "random"] = "balanced"  # all classes in turn, or random ones
    w: float = 1.0  # guidance; 1 is none
    solver: Literal["dopri5", "heun", "euler"] = "dopri5"  # see the top of this file
    steps: int = 50  # steps of heun and euler
    batch: int = 64  # images at a time; dopri5's steps depend on it
    seed: int = 0  # image i of a seed is always the same
    ema: bool = True  # the averaged weights; --no-ema takes the raw ones
    device: str = "auto"  # auto, cpu, cuda, mps
    vae: str = ""  # autoencoder that turns latents into images: a folder, or a name on the Hugging Face hub
    out: str = ""  # NAME.npz: all images, as FID evaluators read them; else the PNG, default samples_*.png in the run
    fid: str = ""  # of the .npz, to this reference: a folder of images, or an .npz with images or with mu and sigma


def main(cfg):
    npz = cfg.out.endswith(".npz")
    if not npz and (cfg.fid or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise ValueError("FID, and several processes, are for an .npz: give --out NAME.npz")
    rank, world, device = processes(pick_device(cfg.device))
    model, ckpt = load_run(cfg.run, device, cfg.ema)
    if cfg.n < 1 or cfg.batch < 1 or cfg.steps < 1 or cfg.seed < 0:
        raise ValueError("n, batch and steps must be at least 1, seed at least 0, not "
                         f"{cfg.n}, {cfg.batch}, {cfg.steps} and {cfg.seed}")
    if cfg.label is not None and cfg.labels != "balanced":
        raise ValueError(f"--label {cfg.label} is one class: it goes without --labels {cfg.labels}")
    if cfg.label is not None and not 0 <= cfg.label < model.num_classes:
        raise ValueError(f"label {cfg.label} is none of this model's, 0 to {model.num_classes - 1}")
    shape = (model.in_channels, model.input_size, model.input_size)
    y = torch.full((cfg.n,), cfg.label) if cfg.label is not None else pick_labels(cfg.n, model.num_classes, cfg.labels,
                                                                                 cfg.seed)
    vae = load_vae(cfg.vae).to(device) if cfg.vae else None
    if vae and vae.config.latent_channels != model.in_channels:
        raise ValueError(f"{cfg.vae} decodes latents of {vae.config.latent_channels} channels, {cfg.run} has "
                         f"{model.in_channels}")
    if npz and not vae and model.in_channels not in (1, 3):
        raise ValueError(f"{cfg.run} samples latents of {model.in_channels} channels: give their autoencoder, --vae")
    folder, stats = Path(cfg.run) if Path(cfg.run).is_dir() else Path(cfg.run).parent, {}
    what = f"_{cfg.labels}" * (cfg.labels != "balanced") if cfg.label is None else f"_label{cfg.label}"
    what += "_raw" * (not cfg.ema)
    out = Path(cfg.out) if cfg.out else folder / f"samples_w{cfg.w:g}_{cfg.solver}_seed{cfg.seed}{what}.png"
    check_folder(out.parent)
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: give --out the name of a file, NAME.png or NAME.npz")
    if out.suffix not in (".png", ".npz"):
        raise ValueError(f"--out {out} must end in .png or .npz")

    @torch.no_grad()
    def decode(x):                                           # a few at a time: a decoder's activations are large
        return x if not vae else torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in x.split(16)])

    def draw(i):                                             # indices (B,) -> images (B, C, H, W) in [-1, 1]
        x = decode(sample(model, noise(i, shape, cfg.seed).to(device), y[i].to(device), w=cfg.w, solver=cfg.solver,
                          steps=cfg.steps, progress=not npz, stats=stats)[-1])
        if not x.isfinite().all():
            raise ValueError(f"images {int(i[0])} to {int(i[-1])} are not finite: has the training diverged?")
        return x

    of = f"step {ckpt['step']}" if ckpt else "official weights"
    if npz:
        made = {k: getattr(cfg, k) for k in ("n", "label", "labels", "w", "solver", "steps", "batch", "seed")}
        made |= dict(device=device.type, weights=checksum(model), vae=checksum(vae) if vae else "")
        features = inception() if cfg.fid and rank == 0 else None
        reference = statistics(cfg.fid, features) if features else None  # before hours of sampling: it may be no good
        size = decode(torch.zeros(1, *shape, device=device)).shape[-2:]
        rgb = lambda i: to_uint8(draw(i).expand(-1, 3, -1, -1))
        write_npz(out, rgb, y, (*size, 3), cfg.batch, made, rank, world)
        if rank == 0: print(f"{cfg.n} samples of {of} ({device}, {cfg.solver}, w = {cfg.w:g}): {cfg.out}", flush=True)
        if features:                                         # never below 0, but for rounding
            print(f"FID {max(0.0, frechet(*statistics(cfg.out, features), *reference)):.4f} to {cfg.fid}")
        return
    torch.empty(cfg.n, *shape)                               # all of them: too many fail here
    images = []
    for i in torch.arange(cfg.n).split(cfg.batch):
        images.append(draw(i))
        print(f"images {int(i[0])} to {int(i[-1])}: {stats['nfe']} function evaluations", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_grid(torch.cat(images), out, columns=model.num_classes if cfg.label is None and model.num_classes <= 10 else 8)
    print(f"{cfg.n} samples of {of} ({device}, {cfg.solver}, w = {cfg.w:g}): {out}")


if __name__ == "__main__":
    cli(main, {"laptop": Config()})
    if dist.is_initialized():
        dist.destroy_process_group()
