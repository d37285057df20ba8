"""Count what the presets gpu and paper take, without running them, and write assets/costs.json: python docs/scale.py"""
import dataclasses
import functools
import importlib
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import build_model  # noqa: E402
from plumbing import scaling  # noqa: E402
from plumbing.cli import count_flops  # noqa: E402
from plumbing.files import write_json  # noqa: E402

PEAK, SHARE, GPU_MEMORY = 989e12, 0.4, 80e9
SCRIPTS = ("train", "exp_shells", "exp_cfg_paradox", "exp_freedom", "exp_scaling")
ASSUMED = (
    f"Counted, not run: FLOPs of forward and backward passes at {SHARE:.0%} of the {PEAK / 1e12:.0f} TFLOP/s of an "
    "H100 in bfloat16, or of half as many where a script computes in TF32; without sampling and the empirical score. "
    "Memory is what training takes on one GPU: weights, their average, gradients, Adam's moments, the data if they "
    "fill less than a third of 80 GB, and what the backward pass keeps of the images of a step, without --compile. "
    "The disk is for checkpoints. With torchrun, four GPUs share a batch. exp_shells.py and exp_cfg_paradox.py share "
    "networks.")
# size, channels and classes of a data set's images, and how many there are; in float16 latents, in float32 pixels
SETS = {"mnist5k_8": (8, 1, 1, 500), "digits_16": (16, 1, 10, 4500), "leaves": (16, 1, 1, 20_000),
        "mnist": (28, 1, 10, 60_000), "imagenet": (32, 4, 1000, 2_562_334)}


def list_networks(script, cfg):
    """Return the train.Config of every network that a command trains."""
    if script == "train":
        return [cfg]
    if script == "exp_freedom":
        # plain training on the largest region comes on top
        return ([cfg.sit, cfg.unet] * len(cfg.ratios) + [cfg.sit]) * cfg.n_seeds
    if script != "exp_scaling":
        return [cfg.network] * cfg.seeds
    # the networks of Figure 6 are among those of Figure 7; names stand for data sets that nobody draws
    scaling.load_data = scaling.pick_rows = lambda *_: None
    scaling.data_folder = lambda cfg, folder, name, make: cfg.data or name
    jobs = [(cfg.network, job) for _, jobs in scaling.plan_fig3(cfg, None) for job in jobs]
    recipes = [(cfg.sits, repa) for repa in cfg.lambdas]
    recipes += [(cfg.unets, 0.0), ([f"{model}-conv" for model in cfg.unets], 0.0)]
    jobs += [(cfg.network7, job) for recipe in recipes for job in scaling.plan_fig7(cfg, None, *recipe)]
    return [dataclasses.replace(network, **dataclasses.asdict(job)) for network, job in jobs]


def kept_bytes(model, batch, half):
    """Return the bytes that the backward pass of a batch needs; half: under autocast to bfloat16."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    shapes = {name: value.shape for name, value in model.state_dict().items()}
    with FakeTensorMode():
        state = {name: torch.empty(shape, requires_grad=True) for name, shape in shapes.items()}
        z = torch.empty(batch, model.in_channels, model.input_size, model.input_size)
        t, y = torch.empty(batch), torch.zeros(batch, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16, enabled=half):
            torch.func.functional_call(model, state, (z, t, y))
        own = {value.untyped_storage()._cdata for value in state.values()}
    return sum(size for storage, size in kept.items() if storage not in own)


@functools.cache
def count(name, shape, half):
    """Return FLOPs of an image, bytes of the weights in float32, and bytes that the backward pass keeps of an image."""
    build = functools.partial(build_model, name, *shape)
    with torch.device("meta"):
        model = build()
    one, three = kept_bytes(model, 1, half), kept_bytes(model, 3, half)
    return count_flops(build, 1), 4 * sum(p.numel() for p in model.parameters()), (three - one) / 2


def cost(script, preset):
    """Return one row of the table."""
    networks = list_networks(script, importlib.import_module(script).PRESETS[preset])
    # exp_freedom.py has a loop of its own: in float32, without checkpoints, and the data are not on the GPU
    by_train = script != "exp_freedom"
    processes = 4 if preset == "paper" and script in SCRIPTS[:3] else 1
    launcher = "torchrun --nproc_per_node=4" if processes == 4 else "python"
    flops, disk, memory, rate = 0, 0, [], SHARE * PEAK * (1 if by_train else 0.5)
    for cfg in networks:
        *shape, n = next(values for name, values in SETS.items() if cfg.data.startswith(name))
        per_image, weights, kept = count(cfg.model, tuple(shape), by_train)
        flops += per_image * cfg.batch * cfg.steps
        memory.append(5 * weights + kept * cfg.batch / (processes * cfg.accum))
        if by_train:
            # the weights, their average and two moments, and the average once more for each step of cfg.keep
            disk += weights * (4 + sum(step <= cfg.steps for step in cfg.keep))
            images = n * shape[0]**2 * shape[1] * (2 if cfg.data == "imagenet" else 4)
            # autocast copies the weights to bfloat16
            memory[-1] += weights / 2 + (images if images < GPU_MEMORY / 3 else 0)
    counts = dict(flops=flops, hours=flops / rate / 3600, memory=max(memory) / 1e9, disk=disk / 1e9)
    return dict(command=f"{launcher} {script}.py --preset {preset}", networks=len(networks)) | {
        name: float(f"{value:.3g}") for name, value in counts.items()}


if __name__ == "__main__":
    rows = [cost(script, preset) for preset in ("gpu", "paper") for script in SCRIPTS]
    for row in rows:
        print(*row.values(), sep="  ")
    write_json(ROOT / "assets" / "costs.json", dict(assumed=ASSUMED, rows=rows))
