"""Count what the presets gpu and paper take, and write assets/costs.json: python docs/scale.py

Nothing is run. Networks have shapes and no numbers, and data sets are two lines of a table.
"""
import functools
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import exp_cfg_paradox  # noqa: E402
import exp_freedom  # noqa: E402
import exp_shells  # noqa: E402
import train  # noqa: E402
from model import build_model  # noqa: E402
from plumbing.cli import count_flops  # noqa: E402
from plumbing.files import write_json  # noqa: E402

PEAK, SHARE, GPU_MEMORY = 989e12, 0.4, 80e9
ASSUMED = (f"Counted, not run: the FLOPs of forward and backward passes, at {SHARE:.0%} of the {PEAK / 1e12:.0f} TFLOP/s "
           "of an H100 in bfloat16, without sampling and the empirical score. Memory is what training takes on one GPU: "
           "weights, their average, gradients, Adam's moments, the data if they fill less than a third of 80 GB, and "
           "what the backward pass keeps of the images of a step, without --compile. The disk is for checkpoints. With "
           "torchrun, four GPUs share a batch. exp_shells.py and exp_cfg_paradox.py find each other's networks.")
# shape of an image, classes, and the bytes of all images
SETS = {"mnist": (dict(input_size=28, in_channels=1, num_classes=10), 60_000 * 28 * 28 * 4),
        "imagenet": (dict(input_size=32, in_channels=4, num_classes=1000), 2_562_334 * 4 * 32 * 32 * 2)}


def list_networks(script, cfg):
    """Return (the train.Config of every network that a command trains, whether processes share a batch)."""
    if script == "train":
        return [cfg], True
    if script == "exp_freedom":
        # plain training on the largest region comes on top
        networks = [cfg.sit, cfg.unet] * len(cfg.ratios) + [cfg.sit]
        return networks * cfg.n_seeds, False
    return [cfg.network] * cfg.seeds, True


def kept_bytes(model, batch):
    """Return the bytes that the backward pass of a batch needs, in bfloat16 where autocast says so."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape, requires_grad=True) for name, shape in shapes.items()}
        z = torch.empty(batch, model.in_channels, model.input_size, model.input_size)
        y = torch.zeros(batch, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16):
            torch.func.functional_call(model, state, (z, torch.empty(batch), y))
        own = {value.untyped_storage()._cdata for value in state.values()}
    return sum(size for storage, size in kept.items() if storage not in own)


@functools.cache
def count(name, data):
    """Return FLOPs of an image, bytes of the weights in float32, and bytes that the backward pass keeps of an image."""
    shape, _ = SETS[data]

    def build():
        return build_model(name, **shape)

    with torch.device("meta"):
        model = build()
    one, three = kept_bytes(model, 1), kept_bytes(model, 3)
    return count_flops(build, 1), 4 * sum(p.numel() for p in model.parameters()), (three - one) / 2


def cost(script, preset):
    """Return one row of the table."""
    networks, shared = list_networks(script, sys.modules[script].PRESETS[preset])
    processes = 4 if shared and preset == "paper" else 1
    launcher = "torchrun --nproc_per_node=4" if processes == 4 else "python"
    flops, disk, memory = 0, 0, 0
    for cfg in networks:
        per_image, weights, kept = count(cfg.model, cfg.data)
        flops += per_image * cfg.batch * cfg.steps
        # the weights, their average and two moments, and the average once more for each step of cfg.keep
        if script != "exp_freedom":
            disk += weights * (4 + len(cfg.keep))
        _, images = SETS[cfg.data]
        images = images if images < GPU_MEMORY / 3 else 0
        # gradients as well, and a copy of the weights in bfloat16
        memory = max(memory, 5.5 * weights + kept * cfg.batch / (processes * cfg.accum) + images)
    return dict(command=f"{launcher} {script}.py --preset {preset}", networks=len(networks),
                hours=flops / (SHARE * PEAK * 3600), memory=memory / 1e9, disk=disk / 1e9)


if __name__ == "__main__":
    rows = [cost(script, preset) for preset in ("gpu", "paper")
            for script in ("train", "exp_shells", "exp_cfg_paradox", "exp_freedom")]
    for row in rows:
        print(*row.values(), sep="  ")
    write_json(ROOT / "assets" / "costs.json", dict(assumed=ASSUMED, rows=rows))
