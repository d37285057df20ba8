"""The command line: a dataclass becomes flags, a mistake becomes one line; devices and processes."""
import os
import re
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
    `python -X dev` shows the traceback instead.
    """
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
        if sys.flags.dev_mode:
            raise
        # torchrun ends all processes with the first one that fails: the others wait, so that a fault is told once
        if count_processes()[0]:
            time.sleep(5)
        sys.exit(f"error: {error}".splitlines()[0])
    if dist.is_initialized():
        dist.destroy_process_group()


def check_at_least(cfg, **least):
    """Raise ValueError for the first field of a config that is smaller than it may be."""
    for name, value in least.items():
        if getattr(cfg, name) < value:
            raise ValueError(f"{name} must be at least {value}, not {getattr(cfg, name)}")


def pick_device(name="auto"):
    """Return the torch device of this name; "auto" takes cuda, then mps, then cpu. Raise ValueError if it is not there.
    """
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    for kind, is_here in available.items():
        if is_here and name.split(":")[0] in ("auto", kind):
            return torch.device(kind if name == "auto" else name)
    raise ValueError(f"device {name!r} is not available here: expected auto, cuda, mps or cpu")


def device_name(device):
    """Return the name of a GPU, or the kind of another device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def count_processes():
    """Return (rank, number of processes), as torchrun says; (0, 1) without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world > 1 else 0
    return rank, world


def setup_processes(device):
    """Return (rank, number of processes, device of this process). Under torchrun, each process takes its own GPU."""
    rank, world = count_processes()
    if world > 1 and device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank))
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # the slowest process may come hours after the fastest
        with_nccl = device.type == "cuda" and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if with_nccl else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    return rank, world, device


def wait_for_all():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def count_flops(build, batch):
    """Return the FLOPs of a forward and backward pass of `batch` images through the network that build() returns."""
    with torch.device("meta"):
        net = build()
        z = torch.empty(batch, net.in_channels, net.input_size, net.input_size)
        t, y = torch.empty(batch), torch.zeros(batch, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        net(z, t, y).sum().backward()
    return counter.get_total_flops()
