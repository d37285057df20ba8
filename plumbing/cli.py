"""The command line: a dataclass becomes flags, a mistake becomes one line; devices and processes."""
import os
import re
import shutil
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import tyro
from torch.utils.flop_counter import FlopCounterMode

# Matplotlib fails to import where a notebook's shell hands its own backend down to a script that lacks it.
os.environ["MPLBACKEND"] = "Agg"


def run_command(main, presets, doc):
    """Run main(config) as a command: --preset picks the config, every other flag overrides one field of it.

    A ValueError, OSError or ImportError is the user's to mend: it becomes one line on stderr and exit status 1.
    --debug shows the traceback instead.
    """
    debug = "--debug" in sys.argv
    if debug:
        sys.argv.remove("--debug")
    names = [next(iter(presets)), *re.findall(r"--preset[= ](\S+)", " ".join(sys.argv))]
    # tyro explains in a box of its own what is wrong with a flag, an unknown preset included
    default = presets.get(names[-1], presets[names[0]])
    try:
        cfg = tyro.cli(type(default), default=default, description=doc)
        # on a GPU, float32 products of networks use its tensor cores, as SiT's own code does
        torch.set_float32_matmul_precision("high")
        main(cfg)
    except SystemExit as stop:
        sys.exit(1 if stop.code == 2 else stop.code)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint, if there is one")
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        # torchrun ends all processes with the first one that fails: the others wait, so that a fault is told once
        if int(os.environ.get("RANK", 0)):
            time.sleep(2)
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        sys.exit(f"error: {text}")
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(name="auto"):
    """Return the torch device of this name; "auto" takes cuda, then mps, then cpu. Raise ValueError if it is not there.
    """
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    here = [kind for kind, there in available.items() if there]
    if name == "auto":
        name = here[0]
    if name.split(":")[0] not in here:
        raise ValueError(f"device {name!r} is not available: expected auto or one of {', '.join(here)}")
    return torch.device(name)


def check_at_least(cfg, **least):
    """Raise ValueError for the first field of a config that is smaller than it may be."""
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise ValueError(f"{name} must be at least {value}, not {getattr(cfg, name)}")


def count_processes():
    """Return (rank, number of processes), as torchrun says; (0, 1) without torchrun."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank >= world:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE {world}: unset RANK, or start with torchrun, which sets both")
    return rank, world


def setup_processes(device, backend="gloo"):
    """Return (rank, number of processes, device of this process). Under torchrun, each process takes its own GPU."""
    rank, world = count_processes()
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # the slowest process may come hours after the fastest
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return rank, world, device


def wait_for_all():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


# dense bfloat16 FLOP/s by their maker; the first name that fits counts
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def device_name(device):
    """Return the name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device):
    """Return the FLOP/s of a known GPU in bfloat16, or 0."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name(device)), 0)


def count_flops(build, batch):
    """Return the FLOPs of a forward and backward pass of `batch` images through the network that build() returns."""
    with torch.device("meta"):
        net = build()
        z = torch.empty(batch, net.in_channels, net.input_size, net.input_size)
        t, y = torch.empty(batch), torch.zeros(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(z, t, y).sum().backward()
    return counter.get_total_flops()


def compile_module(module):
    """Return torch.compile(module). Raise ValueError where there is no compiler that it could use."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++", "clang++", "cl"))):
        raise ValueError("--compile needs a C++ compiler, and none is here: install g++, or go without --compile")
    return torch.compile(module)
