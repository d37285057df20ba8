"""Files: written whole or not at all, read with checks, by one writer; checkpoints and the models in them."""
import argparse
import contextlib
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from model import build_model

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def write_whole(path):
    """Open `path` to write bytes, which go aside and then into place: the file is whole, or as it was before."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} could not be written, and is as it was before: {cause.strerror or cause}") from error
    finally:
        temporary.unlink(missing_ok=True)


def lock_folder(folder):
    """Hold a folder until the lock that this returns is released or forgotten. Raise ValueError if another holds it."""
    check_writable(folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(Path(folder) / "lock", timeout=2).acquire()
    except Timeout:
        raise ValueError(f"{folder}: another process is at work here") from None


def check_writable(folder):
    """Raise OSError unless files can be written to this folder, or to the first one above it that exists.

    A script should know this before hours of work, not after.
    """
    folder = Path(folder).absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(f"{there} is not a folder that can be written to")


def read_json(path):
    """Return the dict in a .json file. Raise ValueError that names the file if it holds none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def write_json(path, value):
    """Write a dict to a .json file."""
    with write_whole(path) as f:
        f.write((json.dumps(value) + "\n").encode())


def read_weights(path):
    """Return the dict in a .pt or .safetensors file. Nothing in the file is run.

    Raise ValueError that names the file if it is missing, damaged, or holds code.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        # torch does not look at the checksums of a .pt, which is a zip archive
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        # official checkpoints of SiT hold their command line, an argparse.Namespace
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain values") from None
    except Exception as error:
        # torch, zipfile and safetensors raise a dozen kinds of errors for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as weights: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a dict of weights, not a {type(state).__name__}")
    return state


def save_checkpoint(path, state):
    """Write a checkpoint: tensors and plain values alone."""
    with write_whole(path) as f:
        torch.save(state, f)


def check_checkpoint(checkpoint, path):
    """Raise ValueError unless a dict is a checkpoint of train.py."""
    for key, kind in dict(ema=dict, model_args=dict, step=int, config=dict).items():
        if not isinstance(checkpoint.get(key), kind):
            raise ValueError(f"{path} is not a checkpoint of train.py: {key} is missing or no {kind.__name__}")


def load_state(module, state, path):
    """Load a state dict into a module. Raise ValueError with the first key that does not fit."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError, KeyError, ValueError) as error:
        # torch names the misfits from the second line on
        reason = (str(error).splitlines() + [""])[1].strip() or str(error)
        raise ValueError(f"{path} does not fit the model: {reason}") from None


def checkpoint_path(run):
    """Return the file of weights that `run` names: a run's folder, or a file."""
    path = Path(run)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: train one with python train.py, and name its folder")
    return path


def load_run(run, device="cpu", ema=True, convention="auto", data=None):
    """Return (model in eval mode, checkpoint) of a run's folder, a checkpoint, or official SiT weights.

    ema         the averaged weights, or the raw ones
    convention  of weights that are not a checkpoint of this project: see plumbing/weights.py
    data        a data set that the model must take, and must have been trained on if it is of this project
    The checkpoint is {} for weights from elsewhere. Raise FileNotFoundError or ValueError that names the file.
    """
    path = checkpoint_path(run)
    checkpoint = read_weights(path)
    if "model_args" not in checkpoint:
        from plumbing.weights import load_sit_weights
        model, checkpoint = load_sit_weights(checkpoint, path, convention, ema), {}
    else:
        check_checkpoint(checkpoint, path)
        try:
            model = build_model(**checkpoint["model_args"])
        except TypeError as error:
            raise ValueError(f"{path} is not a checkpoint of train.py: {error}") from None
        load_state(model, checkpoint.pop("ema" if ema else "model", None), path)
    if data is not None:
        check_fit(model, path, data)
        if checkpoint.get("fingerprint", data["fingerprint"]) != data["fingerprint"]:
            raise ValueError(f"{path} was trained on other data than the data set that it is measured on")
    return model.to(device).eval().requires_grad_(False), checkpoint


def check_fit(model, path, data):
    """Raise ValueError unless the model of file `path` takes the images and classes of a data set."""
    has = (model.in_channels, model.input_size, model.input_size)
    wants, classes = tuple(data["x"].shape[1:]), data["meta"]["num_classes"]
    if has != wants or model.num_classes != classes:
        raise ValueError(f"{path} is a model of images {has} in {model.num_classes} classes; the data set has images "
                         f"{wants} in {classes} classes: name the data that it was trained on")
