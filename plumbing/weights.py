"""Weights from elsewhere: official SiT and REPA networks, and networks by their name on the Hugging Face hub.

SiT weights f come in two conventions. Both become a plain SiT of model.py, v(z, t).
    sit     time runs from noise (0) to data (1), and f predicts x - eps: v(z, t) = -f(z, 1 - t)
    repa    time and sign are those of this project: v(z, t) = f(z, t)
"""
import argparse
import hashlib
import importlib
import math
import os
import re

import torch

from model import SIT_SIZES, SiT, sinusoid
from plumbing.files import load_state

OFFICIAL = ("S", "B", "L", "XL")


def unwrap(checkpoint, ema=True):
    """Return (state dict, training arguments) of a checkpoint: a bare state dict, or {"ema", "model", "args", ...}."""
    names = ("ema", "model") if ema else ("model", "ema")
    state = next((checkpoint[name] for name in names if name in checkpoint), checkpoint)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected a dict of weights")
    # DistributedDataParallel and torch.compile put these before every name, in either order
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(key)): value for key, value in state.items()}
    args = checkpoint.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    return state, args if isinstance(args, dict) else {}


def find_convention(state, args):
    """Return "sit" or "repa" if the arguments or the names of the weights tell, else None.

    Raise ValueError for another network than a SiT, and for another prediction or path than a linear velocity.
    """
    if not str(args.get("model") or "SiT").startswith("SiT"):
        raise ValueError(f"its args name the model {args['model']}, expected a SiT")
    target = args.get("path_type"), args.get("prediction")
    conventions = {("Linear", "velocity"): "sit", ("linear", "v"): "repa", (None, None): None}
    if target not in conventions:
        raise ValueError(f"its args say path_type {target[0]} and prediction {target[1]}, expected Linear and velocity "
                         "(SiT), or linear and v (REPA)")
    if any(key.startswith("projectors.") for key in state):
        return "repa"
    return conventions[target]


def read_sizes(state, args):
    """Return the arguments of SiT that these weights fit. Raise ValueError if no official SiT has these sizes."""
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        rows = state["y_embedder.embedding_table.weight"].shape[0]
    except (KeyError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"not the weights of a SiT, by its patches, positions and label table ({error})") from None
    depth = sum(key.startswith("blocks.") and key.endswith(".attn.qkv.weight") for key in state)
    name = next((name for name in OFFICIAL if SIT_SIZES[name][:2] == (depth, width)), None)
    if name is None:
        raise ValueError(f"no official SiT has depth {depth} and width {width}; of a network of this project, name the "
                         "run's folder")
    # the last row is the null label's; where nothing tells the number of classes, a table of 1000 is ImageNet's
    classes = args.get("num_classes", 1000 if rows == 1000 else rows - 1)
    if rows != classes + 1:
        raise ValueError(f"its label table has {rows} rows for {classes} classes, expected one more, the null label's")
    return dict(depth=depth, width=width, heads=SIT_SIZES[name][2], patch=patch, input_size=math.isqrt(tokens) * patch,
                in_channels=channels, num_classes=classes, prediction="v")


def drop_unused(state, patch, channels):
    """Return the weights less what only training uses: the output channels of `learn_sigma`, REPA's projectors."""
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state.get(name)
        if torch.is_tensor(rows) and len(rows) == 2 * patch * patch * channels:
            state[name] = rows.unflatten(0, (patch * patch, -1))[:, :channels].flatten(0, 1)       # (p q c, ...)
    return state


@torch.no_grad()
def reverse_time_and_sign(model):
    """Change the weights of f into those of v(z, t) = -f(z, 1 - t).

    Time enters by cos(k t) and sin(k t). Those of k (1 - t) are linear in them:
        cos(k (1 - t)) = cos k cos kt + sin k sin kt,      sin(k (1 - t)) = sin k cos kt - cos k sin kt
    """
    first = model.t_embedder.mlp[0].weight
    w_cos, w_sin = first.double().chunk(2, dim=1)                        # (width, 128) each
    cos_k, sin_k = sinusoid(torch.ones(1), 256)[0].double().chunk(2)
    first.copy_(torch.cat([w_cos * cos_k + w_sin * sin_k, w_cos * sin_k - w_sin * cos_k], dim=1))
    for parameter in model.final_layer.linear.parameters():
        parameter.neg_()


@torch.no_grad()
def correlation_at_noise(model):
    """Return the correlation of v(z, 1) - v(z', 1) with z - z', for pure noise z and z'.

    It is 1 for the exact velocity, z - E[x]. A network of digits had .997, and .32 with time and sign reversed.
    """
    shape = (model.in_channels, model.input_size, model.input_size)
    z = torch.randn(2, max(1, 4096 // math.prod(shape)), *shape, generator=torch.Generator().manual_seed(0))
    v = model(z.flatten(0, 1), 1.0).view_as(z)
    return float(torch.corrcoef(torch.stack([(v[0] - v[1]).flatten(), (z[0] - z[1]).flatten()]))[0, 1])


def convert(checkpoint, convention, ema):
    """Return (model, the convention that was found and why)."""
    if convention not in ("auto", "sit", "repa"):
        raise ValueError(f"unknown convention {convention!r}: expected auto, sit or repa")
    state, args = unwrap(checkpoint, ema)
    found, sizes = find_convention(state, args), read_sizes(state, args)
    if found and convention not in ("auto", found):
        raise ValueError(f"it says itself that its convention is {found}, not {convention}")
    model = SiT(**sizes)
    load_state(model, drop_unused(state, sizes["patch"], sizes["in_channels"]), "it")
    if "repa" not in (found, convention):
        reverse_time_and_sign(model)
    if found or convention != "auto":
        return model, f"{found}, as the file says" if found else f"{convention}, as asked for"
    correlation = correlation_at_noise(model)
    if not correlation > 0.7:
        raise ValueError(f"nothing says what these weights predict, and as official SiT weights they give v(z, 1) a "
                         f"correlation of {correlation:.2f} with z, expected 1. --convention repa reads REPA's, or an "
                         "average of this project saved bare; DiT's, or of another prediction or path, are not read")
    return model, f"sit, since v(z, 1) has a correlation of {correlation:.2f} with z"


def load_sit_weights(checkpoint, path, convention="auto", ema=True):
    """Return official SiT or REPA weights as a SiT in this project's time and sign, and print the convention found.

    checkpoint  the dict in a .pt or .safetensors file; `path` is its name for messages
    convention  "sit", "repa", or "auto": what the file says, else what v(z, 1) of noise z says
    Raise ValueError that names the file if it holds other weights.
    """
    try:
        model, why = convert(checkpoint, convention, ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{path}: weights of convention {why}", flush=True)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Networks of optional packages


def optional_import(module, name, option):
    """Return `name` of an optional package. Raise ImportError with the command that installs or mends it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError, OSError) as error:
        cause = error
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        # with its version named, pip leaves this torch as it is
        package = cause.name.split(".")[0].replace("_", "-")
        raise ImportError(f"{option} needs the package {package}: pip install {package} "
                          f"torch=={torch.__version__.split('+')[0]}")
    # pip takes a torchvision for CUDA beside a torch for CPUs, and its import fails; transformers hides that
    reason = str(cause.__cause__ or cause).strip().splitlines()[-1]
    build = "cpu" if torch.version.cuda is None else "cu" + torch.version.cuda.replace(".", "")
    minor = int(torch.__version__.split(".")[1]) + 15
    raise ImportError(f"{option}: {module} cannot be imported ({reason}); most often torchvision is not that of this "
                      f"torch: pip install --force-reinstall --no-deps 'torchvision==0.{minor}.*' --index-url "
                      f"https://download.pytorch.org/whl/{build}")


def pretrained(option, name, kind, **options):
    """Return a network, from a folder or by its name on the hub. Raise ValueError if it does not load whole."""
    if not os.path.isdir(name) and (name.count("/") != 1 or name[0] in "./~"):
        raise ValueError(f"{option} {name}: there is no such folder, and it is no name on the hub (owner/name)")
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:
        # missing, offline or damaged: each library raises errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option} {name}: cannot be loaded as {kind.__name__} ({reason})") from error
    absent = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    if absent:
        raise ValueError(f"{option} {name}: {len(absent)} weights of {kind.__name__} are missing or misshapen, such as "
                         f"{min(absent)}: random ones would stand in for them")
    return model.eval().requires_grad_(False)


def load_vae(name):
    """Return the autoencoder of a latent model, diffusers' AutoencoderKL, from a folder or by its name on the hub."""
    kind = optional_import("diffusers", "AutoencoderKL", "--vae")
    # low_cpu_mem_usage=True would need one more package
    return pretrained("--vae", name, kind, low_cpu_mem_usage=False)


@torch.no_grad()
def decode(vae, z):
    """Return the images (B, 3, H, W) of latents (B, C, h, w)."""
    # a few at a time, since a decoder's activations are large
    return torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in z.split(16)])


def checksum(module):
    """Return a short hash of all weights of a network, to tell what was made with it."""
    h = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        h.update(f"{name} {tuple(value.shape)}".encode() + value.cpu().float().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
