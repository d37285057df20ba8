"""Images in files: reading them, a grid of samples, 50,000 samples in one .npz, and the Frechet distance (FID).

An .npz of samples holds arr_0, uint8 (n, H, W, 3), which ADM's evaluator reads too; labels; and made, what they were
made with. FID compares Inception features of two sets of images by their mean and covariance.
"""
import functools
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from plumbing.cli import wait_for_all
from plumbing.files import read_json, write_json, write_whole
from plumbing.weights import optional_import

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

# ----------------------------------------------------------------------------------------------------------------------
# Reading images


def find_images(folder):
    """Return the image files in a folder and below it, sorted. Print what is left out for its suffix."""
    images, others = [], []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            kind = images if path.suffix.lower() in SUFFIXES else others
            kind.append(path)
    if not images:
        raise ValueError(f"{folder}: no images in this folder, expected {', '.join(SUFFIXES)}")
    if others:
        print(f"{folder}: {len(others)} files that are no images are left out, such as {others[0].name}", flush=True)
    return images


def read_rgb(path):
    """Return an image as 8-bit RGB (a Pillow image). An alpha channel is dropped, 16 bits of gray become 8.

    Raise ValueError that names the file if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating point, expected 8 or 16 bits")
            if image.mode.startswith("I"):
                # Pillow would clip 65535 to 255, not scale it
                image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:
        # given garbage, a decoder raises anything: OSError, SyntaxError, struct.error
        reason = (str(error) or type(error).__name__).splitlines()[0].replace(str(path), "the file")
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def center_crop(image, size):
    """Return the middle of an RGB image as uint8 (size, size, 3): ADM's crop, which DiT and SiT use too."""
    width, height = image.size
    # bicubic alone would alias where it shrinks an image much
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top = (height - size) // 2
    left = (width - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def find_classes(root, classes=None):
    """Return (class names, image paths, labels) of a folder of class folders. A label is a position in `classes`."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{root}: holds no class folders, expected one folder of images for each class")
    classes = classes or names
    paths, labels = [], []
    for name in names:
        if name not in classes:
            raise ValueError(f"{root / name}: there is no such class in --source")
        inside = find_images(root / name)
        if inside[0].parent != root / name:
            raise ValueError(f"{inside[0].parent}: a folder in a class folder: is {root} one level too high?")
        paths += inside
        labels += [classes.index(name)] * len(inside)
    return classes, paths, np.array(labels)


# ----------------------------------------------------------------------------------------------------------------------
# Writing images


def to_uint8(x):
    """Return images (..., C, H, W) in [-1, 1] as uint8 (..., H, W, C), the way FID evaluators want: 127.5 x + 128."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu()


def save_grid(x, path, columns=8):
    """Write images (B, C, H, W) in [-1, 1] as one PNG, row by row. Of four or more channels, the first three are shown.
    """
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    B, _, H, W = x.shape
    rows = math.ceil(B / columns)
    canvas = torch.zeros(rows * columns, H, W, 3, dtype=torch.uint8)
    canvas[:B] = to_uint8(x)
    canvas = canvas.view(rows, columns, H, W, 3).transpose(1, 2).reshape(rows * H, columns * W, 3)
    # small images get visible pixels
    k = max(1, 64 // H)
    canvas = canvas.repeat_interleave(k, 0).repeat_interleave(k, 1)
    with write_whole(path) as f:
        Image.fromarray(canvas.numpy()).save(f, "PNG")


def check_made(found, made, where):
    """Raise ValueError with the first thing in which the images found at `where` differ from those asked for."""
    for key, value in made.items():
        if found.get(key) != value:
            raise ValueError(f"{where} holds images of {key} = {found.get(key)}, not {value}: delete it, or give "
                             "another --out")


def write_npz(path, draw, labels, size, batch, made, rank=0, world=1):
    """Draw images 0 .. len(labels) - 1 and write them to the .npz `path`. The same call goes on after a kill.

    draw     indices (B,) -> uint8 (B, *size), size = (H, W, 3)
    batch    these many are always drawn together, whichever process does it, since dopri5's steps depend on the batch
    made     a dict of all that decides on the images; raise ValueError if what is there was made otherwise
    Each batch becomes a file in <path>.parts; the first process puts them together at the end.
    """
    path = Path(path)
    parts = path.with_name(path.name + ".parts")
    batches = torch.arange(len(labels)).split(batch)
    files = [parts / f"{k:06d}" for k in range(len(batches))]
    if path.exists():
        check_made(json.loads(str(read_npz(path, "made", "{}"))), made, path)
        if rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
        return
    if rank == 0:
        if (parts / "made.json").exists():
            check_made(read_json(parts / "made.json"), made, parts)
        write_json(parts / "made.json", made)
    # nobody draws before the first process has agreed
    wait_for_all()
    mine = [k for k in range(rank, len(batches), world) if not files[k].exists()]
    for k in tqdm(mine, desc="batches", disable=None if rank == 0 else True, leave=False):
        images = draw(batches[k]).numpy()
        with write_whole(files[k]) as f:
            f.write(images.tobytes())
    wait_for_all()
    if rank == 0:
        merge(parts / "merged", files, (len(labels), *size), dict(labels=labels.numpy(), made=json.dumps(made)))
        os.replace(parts / "merged", path)
        shutil.rmtree(parts)


def merge(path, files, shape, more):
    """Write the bytes of `files` as arr_0 of the .npz `path`, file by file, and the arrays of the dict `more`."""
    found, expected = sum(f.stat().st_size for f in files), math.prod(shape)
    if found != expected:
        raise ValueError(f"{files[0].parent} holds {found} bytes of images, expected {expected}: delete it")
    with write_whole(path) as out, zipfile.ZipFile(out, "w") as archive:
        # a bare ZipInfo leaves out the time of day, so that the same images make the same file
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=shape))
            for file in files:
                f.write(file.read_bytes())
        for name, array in more.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as f:
                np.lib.format.write_array(f, np.asarray(array), allow_pickle=False)


# ----------------------------------------------------------------------------------------------------------------------
# The Frechet distance


def frechet(mean1, cov1, mean2, cov2):
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), the squared Wasserstein distance of two Gaussians.
    """
    w, U = np.linalg.eigh(cov1)
    root = U * np.sqrt(w.clip(0)) @ U.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def gaussian(batches):
    """Return mean (dim,) and covariance (dim, dim) of features that come in batches (b, dim), in float64."""
    n, origin = 0, None
    total, outer = 0.0, 0.0
    for features in batches:
        features = np.asarray(features, dtype=np.float64)
        if origin is None:
            # a point near the mean, without which the sums of squares would cancel
            origin = features.mean(0)
        centred = features - origin
        n += len(features)
        total = total + centred.sum(0)
        outer = outer + centred.T @ centred
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {n}")
    return origin + total / n, (outer - np.outer(total, total) / n) / (n - 1)


@functools.cache
def inception():
    """Return the network of the original FID, of torch-fidelity: uint8 (B, H, W, 3) -> features (B, 2048), numpy."""
    create = optional_import("torch_fidelity.utils", "create_feature_extractor", "--fid")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = create("inception-v3-compat", ["2048"], cuda=device == "cuda", verbose=False)

    def features(images):
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).to(device))[0].cpu().numpy()
    return features


def read_npz(path, key, default=None):
    """Return one array of an .npz, or `default` if it has none of that name. Raise ValueError if it is no .npz."""
    if not zipfile.is_zipfile(path):
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no file {path}")
        raise ValueError(f"{path} is not an .npz file (a single .npy array, perhaps): np.savez writes one")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key] if key in archive.files else default
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {str(error).splitlines()[0]}") from error


def npz_batches(path, batch):
    """Yield arr_0 of an .npz, uint8 (n, H, W, 3), batch by batch. It is never in memory as a whole."""
    with zipfile.ZipFile(path) as archive:
        if "arr_0.npy" not in archive.namelist():
            raise ValueError(f"{path} holds no images: arr_0 is missing")
        with archive.open("arr_0.npy") as f:
            np.lib.format.read_magic(f)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
            if fortran or dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
                raise ValueError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (n, H, W, 3)")
            for start in range(0, shape[0], batch):
                size = (min(batch, shape[0] - start), *shape[1:])
                yield np.frombuffer(bytearray(f.read(math.prod(size))), np.uint8).reshape(size)


def image_batches(source, batch=64):
    """Yield the images of a folder, all of one size, or of an .npz: uint8 (B, H, W, 3), batch by batch."""
    if not Path(source).is_dir():
        yield from npz_batches(source, batch)
        return
    paths = find_images(source)
    size = read_rgb(paths[0]).size
    for start in range(0, len(paths), batch):
        images = [read_rgb(path) for path in paths[start:start + batch]]
        for path, image in zip(paths[start:], images, strict=False):
            if image.size != size:
                raise ValueError(f"{path} is of size {image.size}, expected {size}, that of the first image")
        yield np.stack([np.asarray(image) for image in images])


def statistics(source):
    """Return mean and covariance of the features of a folder or an .npz.

    An .npz that holds its own, mu and sigma, is believed, as ADM's references do, of this same network.
    """
    features = inception()
    mu, sigma = None, None
    if not Path(source).is_dir():
        mu, sigma = read_npz(source, "mu"), read_npz(source, "sigma")
    if mu is None:
        return gaussian(map(features, image_batches(source)))
    dim = features(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]
    if mu.shape != (dim,) or np.shape(sigma) != (dim, dim):
        raise ValueError(f"{source}: mu {mu.shape} and sigma {np.shape(sigma)}, expected ({dim},) and ({dim}, {dim})")
    return mu.astype(np.float64), sigma.astype(np.float64)


def fid(npz, reference):
    """Return the FID of an .npz of samples to a reference: a folder, an .npz, or what `statistics` returned for one.

    Call statistics(reference) before hours of sampling: it finds a reference or a package that is no good.
    """
    if not isinstance(reference, tuple):
        reference = statistics(reference)
    # never below 0, but for rounding
    return max(0.0, frechet(*statistics(npz), *reference))
