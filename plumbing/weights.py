"""Weights from elsewhere: official SiT and REPA networks, and networks by their name on the Hugging Face hub.

SiT weights f come in two conventions. Both become a plain SiT of model.py, v(z, t).
    sit     time runs from noise (0) to data (1), and f predicts x - eps: v(z, t) = -f(z, 1 - t)
    repa    time and sign are those of this project: v(z, t) = f(z, t)
"""
import argparse
import hashlib
import importlib
import math
import re

import torch

from model import SIT_SIZES, SiT, sinusoid
from plumbing.files import load_state

OFFICIAL = ("S", "B", "L", "XL")


def unwrap(checkpoint, ema=True):
    """Return (state dict, training arguments) of a checkpoint: a bare state dict, or {"ema", "model", "args", ...}."""
    names = ("ema", "model") if ema else ("model", "ema")
    state = next((checkpoint[name] for name in names if name in checkpoint), checkpoint)
    # DistributedDataParallel and torch.compile put these before every name, in either order
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    args = checkpoint.get("args") or {}
    return state, vars(args) if isinstance(args, argparse.Namespace) else args


def build_sit(state, path):
    """Return a SiT with these weights, less what only training uses. Raise ValueError if no official SiT has them."""
    # REPA aligns features by projectors.
    state = {name: value for name, value in state.items() if not name.startswith("projectors.")}
    heads = {SIT_SIZES[name][:2]: SIT_SIZES[name][2] for name in OFFICIAL}
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        depth = sum(name.endswith(".attn.qkv.weight") for name in state)
        size = math.isqrt(state["pos_embed"].shape[1]) * patch
        # The last row of the table is the null label's.
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        model = SiT(depth, width, heads[depth, width], patch, size, channels, classes, prediction="v")
        # Weights trained with learn_sigma have twice the channels: (p q 2c, ...). The second half is not used.
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = state[name].unflatten(0, (patch * patch, -1))[:, :channels].flatten(0, 1)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not the weights of an official SiT ({error!r})") from None
    load_state(model, state, path)
    return model


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


def load_sit_weights(checkpoint, path, convention="auto", ema=True):
    """Return official SiT or REPA weights as a SiT in this project's time and sign.

    checkpoint  the dict in a .pt or .safetensors file; `path` is its name for messages
    convention  "sit", "repa", or "auto": "repa" if the training arguments or the names of weights say so, else "sit"
    Raise ValueError if the weights are no official SiT's, or if "auto" finds that they predict no velocity.
    """
    state, args = unwrap(checkpoint, ema)
    target = str(args.get("path_type", "linear")).lower(), args.get("prediction", "v")
    if target not in (("linear", "v"), ("linear", "velocity")):
        raise ValueError(f"{path}: its args say path {target[0]} and prediction {target[1]}, expected linear and v")
    model = build_sit(state, path)
    is_repa = args.get("prediction") == "v" or any(name.startswith("projectors.") for name in state)
    if convention == "sit" or (convention == "auto" and not is_repa):
        reverse_time_and_sign(model)
    if convention == "auto" and not correlation_at_noise(model) > 0.7:
        raise ValueError(f"{path}: these weights do not predict a velocity at pure noise: give --convention repa for "
                         "REPA's, or for a state dict of this project without its model_args")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Networks of optional packages


def optional_import(module, name, option):
    """Return `name` of an optional package. Raise ImportError with the command that installs it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        package = module.split(".")[0].replace("_", "-")
        # With its version named, pip leaves this torch as it is.
        torch_version = torch.__version__.split("+")[0]
        raise ImportError(f"{option} needs {package}: pip install {package} torch=={torch_version}; a torchvision of "
                          f"another torch breaks it, see docs/scale.md ({error})") from error


def pretrained(option, name, kind):
    """Return a network, from a folder or by its name on the hub. Raise ValueError if it does not load whole."""
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True)
    except Exception as error:
        # missing, offline or damaged: each library raises errors of its own
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"{option} {name}: cannot be loaded as {kind.__name__} ({reason})") from error
    if report["missing_keys"]:
        raise ValueError(f"{option} {name}: the file lacks weights of {kind.__name__}: {min(report['missing_keys'])}")
    return model.eval().requires_grad_(False)


def load_vae(name):
    """Return the autoencoder of a latent model, diffusers' AutoencoderKL, from a folder or by its name on the hub."""
    return pretrained("--vae", name, optional_import("diffusers", "AutoencoderKL", "--vae"))


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
