"""Weights from elsewhere: official SiT and REPA networks, and networks by their name on the Hugging Face hub.

SiT weights f come in two conventions. Both become a plain SiT of model.py, v(z, t).
    SiT     time runs from noise (0) to data (1), and f predicts x - eps: v(z, t) = -f(z, 1 - t)
    REPA    time and sign are those of this project: v(z, t) = f(z, t). Told by its projectors
"""
import argparse
import hashlib
import importlib
import math
import re

import torch

from model import SIT_SIZES, SiT, sinusoid


def load_state(module, state, path):
    """Load a state dict into a module. Raise ValueError that names a key that does not fit."""
    try:
        module.load_state_dict(state)
    except Exception as error:
        raise ValueError(f"{path} does not fit the model: {str(error).splitlines()[-1].strip()}") from None


def build_sit(state, path):
    """Return a SiT with these weights, less what only training uses. Raise ValueError if no official SiT has them."""
    state = {name: value for name, value in state.items() if not name.startswith("projectors.")}
    heads = {SIT_SIZES[name][:2]: SIT_SIZES[name][2] for name in ("S", "B", "L", "XL")}
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


def load_sit_weights(checkpoint, path, ema=True):
    """Return official SiT or REPA weights, the dict in the file `path`, as a SiT in this project's time and sign.

    Raise ValueError if the weights are no official SiT's, or if their arguments name another path or prediction.
    """
    # a bare state dict, or {"ema", "model", "args", ...}
    names = ("ema", "model") if ema else ("model", "ema")
    state = next((checkpoint[name] for name in names if name in checkpoint), checkpoint)
    # DistributedDataParallel and torch.compile put these before every name, in either order
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    args = checkpoint.get("args") or {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    target = str(args.get("path_type", "linear")).lower(), args.get("prediction", "v")
    if target not in (("linear", "v"), ("linear", "velocity")):
        raise ValueError(f"{path}: its args say path {target[0]} and prediction {target[1]}, expected linear and v")
    model = build_sit(state, path)
    is_repa = args.get("prediction") == "v" or any(name.startswith("projectors.") for name in state)
    if not is_repa:
        reverse_time_and_sign(model)
    return model


def optional_import(module, name, option):
    """Return `name` of an optional package. Raise ImportError that says how to install it."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        package = module.split(".")[0].replace("_", "-")
        # with its version named, pip leaves this torch as it is
        version = torch.__version__.split("+")[0]
        raise ImportError(f"{option} needs {package}: pip install {package} torch=={version}, see docs/scale.md "
                          f"({error})") from error


def pretrained(kind, name):
    """Return a network of an optional package, from a folder or by its name on the hub, ready to use."""
    try:
        model, report = kind.from_pretrained(name, output_loading_info=True)
    except Exception as error:
        # missing, offline or damaged: each library raises errors of its own
        raise ValueError(f"{name} cannot be loaded as {kind.__name__}: {error!r}") from error
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks weights of {kind.__name__}: {min(report['missing_keys'])}")
    return model.eval().requires_grad_(False)


def load_vae(name):
    """Return the autoencoder of a latent model, diffusers' AutoencoderKL, from a folder or by its name on the hub."""
    return pretrained(optional_import("diffusers", "AutoencoderKL", "--vae"), name)


def checksum(module):
    """Return a short hash of all weights of a network, to tell what was made with it."""
    h = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        h.update(f"{name} {tuple(value.shape)}".encode() + value.cpu().float().contiguous().numpy().tobytes())
    return h.hexdigest()[:16]
