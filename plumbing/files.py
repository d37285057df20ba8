"""Files: written whole or not at all, by one writer; checkpoints and the models in them."""
import argparse
import contextlib
import json
import os
import zipfile
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file

from model import build_model
from plumbing.weights import load_sit_weights, load_state

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def write_whole(path):
    """Open `path` to write bytes. They go to a temporary file first: `path` is whole, or as it was before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:
        # torch.save makes a RuntimeError of a full disk
        raise OSError(f"{path} could not be written, and is as it was before: {error.__context__ or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder):
    """Hold a folder until the lock that this returns is released or forgotten. Raise OSError if another holds it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(folder) / "lock", timeout=2).acquire()


def read_json(path):
    """Return the value in a .json file. Raise ValueError or OSError that names the file if it cannot be read."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def write_json(path, value):
    """Write a dict to a .json file."""
    with write_whole(path) as f:
        f.write((json.dumps(value) + "\n").encode())


def read_weights(path):
    """Return the dict in a .pt or .safetensors file, without running code in it. Raise ValueError if it is damaged."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        # a .pt is a zip archive, whose checksums torch does not look at
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum is wrong")
        # official checkpoints of SiT hold their command line, an argparse.Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, no dict")
        return state
    except Exception as error:
        # torch, zipfile and safetensors raise a dozen kinds of errors
        raise ValueError(f"{path} is damaged, or holds other things than weights: {error!r}") from error


def save_checkpoint(path, state):
    """Write a checkpoint: tensors and plain values alone."""
    with write_whole(path) as f:
        torch.save(state, f)


def checkpoint_path(run):
    """Return the file of weights that `run` names: a run's folder, or a file."""
    path = Path(run, "ckpt.pt") if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with python train.py, and name its folder")
    return path


def load_run(run, device="cpu", ema=True, data=None):
    """Return the model, in eval mode, of a run's folder, a checkpoint, or official SiT weights.

    ema     the averaged weights, or the raw ones
    data    a data set; raise ValueError if the model was trained on another one
    Raise FileNotFoundError or ValueError that names the file.
    """
    path = checkpoint_path(run)
    checkpoint = read_weights(path)
    if "model_args" in checkpoint:
        name = "ema" if ema else "model"
        if name not in checkpoint:
            raise ValueError(f"{path} holds no weights of the name {name}")
        model = build_model(**checkpoint["model_args"])
        load_state(model, checkpoint[name], path)
    else:
        model = load_sit_weights(checkpoint, path, ema)
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{path} holds weights that are not finite")
    if data is not None:
        sizes = (model.in_channels, model.input_size, model.num_classes)
        fits = sizes == (*data["x"].shape[1:3], data["meta"]["num_classes"])
        if not fits or checkpoint.get("fingerprint", data["fingerprint"]) != data["fingerprint"]:
            raise ValueError(f"{path} was not trained on the data set that it is measured on; it has channels, pixels "
                             f"and classes {sizes}")
    return model.to(device).eval().requires_grad_(False)
