"""Images in files: reading them, a grid of samples, 50,000 samples in one .npz, and the Frechet distance (FID).

An .npz of samples holds arr_0, uint8 (n, H, W, 3), which ADM's evaluator reads too; labels; and made, what they were
made with. FID compares Inception features of two sets of images by their mean and covariance.
"""
import functools
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from plumbing.cli import check_at_least, wait_for_all
from plumbing.files import read_json, write_json, write_whole
from plumbing.weights import checksum, decode, load_vae, optional_import

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
                gray = np.asarray(image).clip(0, 65535) // 257
                image = Image.fromarray(gray.astype(np.uint8))
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
    loose = [p for p in root.iterdir() if p.suffix.lower() in SUFFIXES]
    if loose:
        raise ValueError(f"{loose[0]} lies beside the class folders: move it into one")
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
    rows = math.ceil(len(x) / columns)
    absent = rows * columns - len(x)
    images = F.pad(to_uint8(x), (0, 0, 0, 0, 0, 0, 0, absent))
    images = images.unflatten(0, (rows, columns))
    canvas = images.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    # small images get visible pixels
    k = max(1, 64 // x.shape[2])
    canvas = canvas.repeat_interleave(k, 0).repeat_interleave(k, 1)
    with write_whole(path) as f:
        Image.fromarray(canvas.numpy()).save(f, "PNG")


def write_npz(path, draw, labels, batch, made, rank=0, world=1):
    """Draw images 0 .. len(labels) - 1 and write them to the .npz `path`. The same call goes on after a kill.

    draw     indices (B,) -> uint8 (B, H, W, 3)
    batch    these many are always drawn together, whichever process does it, since dopri5's steps depend on the batch
    made     a dict of all that decides on the images; raise ValueError if what is there was made otherwise
    Each batch becomes a file in <path>.parts; the first process puts them together at the end.
    """
    parts = path.with_name(path.name + ".parts")
    found, where = made, path
    if path.exists():
        found = json.loads(str(read_npz(path, "made", "{}")))
    elif (parts / "made.json").exists():
        found, where = read_json(parts / "made.json"), parts
    for key, value in made.items():
        if found.get(key) != value:
            raise ValueError(f"{where} holds images of {key} = {found.get(key)}, not {value}: delete it, or give "
                             "another --out")
    if not path.exists():
        if rank == 0:
            write_json(parts / "made.json", made)
        batches = torch.arange(len(labels)).split(batch)
        files = [parts / f"{k:06d}.npy" for k in range(len(batches))]
        mine = [k for k in range(rank, len(batches), world) if not files[k].exists()]
        for k in tqdm(mine, desc="batches", disable=None if rank == 0 else True, leave=False):
            images = draw(batches[k]).numpy()
            with write_whole(files[k]) as f:
                np.save(f, images)
        wait_for_all()
        if rank == 0:
            images = np.concatenate([np.load(file) for file in files])
            with write_whole(path) as f:
                np.savez(f, arr_0=images, labels=labels.numpy(), made=json.dumps(made))
    if rank == 0:
        shutil.rmtree(parts, ignore_errors=True)


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
    features = np.concatenate([np.asarray(batch, dtype=np.float64) for batch in batches])
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
    return features.mean(0), np.cov(features.T)


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
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[key] if key in archive.files else default
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        # a single array, of an .npy file, makes a TypeError here
        raise ValueError(f"{path} cannot be read as an .npz file, as np.savez writes one: {error}") from error


def image_batches(source, batch=64):
    """Yield the images of a folder, all of one size, or of an .npz: uint8 (B, H, W, 3), batch by batch."""
    if Path(source).is_dir():
        paths = find_images(source)
        size = read_rgb(paths[0]).size
        for start in range(0, len(paths), batch):
            images = []
            for path in paths[start:start + batch]:
                images.append(read_rgb(path))
                if images[-1].size != size:
                    raise ValueError(f"{path} is of size {images[-1].size}, expected {size}, that of the first image")
            yield np.stack([np.asarray(image) for image in images])
    else:
        images = read_npz(source, "arr_0", np.zeros(0))
        if images.dtype != np.uint8 or images.shape[3:] != (3,):
            raise ValueError(f"{source}: arr_0 is {images.dtype} {images.shape}, expected uint8 (n, H, W, 3)")
        for start in range(0, len(images), batch):
            yield images[start:start + batch]


def statistics(source):
    """Return mean and covariance of the features of a folder or an .npz.

    An .npz that holds its own, mu and sigma, is believed, as ADM's references do, of this same network.
    """
    features = inception()
    if not Path(source).is_dir():
        mu, sigma = read_npz(source, "mu"), read_npz(source, "sigma")
        if mu is not None:
            return mu.astype(np.float64), sigma.astype(np.float64)
    return gaussian(map(features, image_batches(source)))


# ----------------------------------------------------------------------------------------------------------------------
# What the command of sample.py does besides sampling


def check_sampling(cfg, model, world):
    """Raise ValueError for the first field of sample.Config that is out of range, or does not fit the model."""
    check_at_least(cfg, n=1, batch=1, steps=1, seed=0)
    if cfg.label is not None and not 0 <= cfg.label < model.num_classes:
        raise ValueError(f"label {cfg.label} is none of this model's, 0 to {model.num_classes - 1}")
    if cfg.out and Path(cfg.out).suffix not in (".png", ".npz"):
        raise ValueError(f"--out {cfg.out} must end in .png or .npz")
    is_npz = cfg.out.endswith(".npz")
    if not is_npz and (cfg.fid or world > 1):
        raise ValueError("FID, and several processes, are for an .npz: give --out NAME.npz")
    if is_npz and not cfg.vae and model.in_channels not in (1, 3):
        raise ValueError(f"{cfg.run} samples latents of {model.in_channels} channels: give their autoencoder, --vae")


def pick_labels(cfg, num_classes):
    """Return labels (n,): one class, all in turn, or random ones, each a function of the seed and its image's number.
    """
    if cfg.label is not None:
        return torch.full((cfg.n,), cfg.label)
    if cfg.labels == "balanced":
        return torch.arange(cfg.n) % num_classes
    draws = [np.random.default_rng([cfg.seed, i]).integers(num_classes) for i in range(cfg.n)]
    return torch.tensor(draws)


@torch.no_grad()
def save_samples(cfg, sample, model, device, rank, world):
    """Draw cfg.n images, decoded, and write them to a PNG, or to an .npz, whose FID to cfg.fid is printed.

    sample(index (B,), y (B,)) -> what the model samples for these images, (B, C, H, W)
    """
    check_sampling(cfg, model, world)
    run = Path(cfg.run)
    label = "" if cfg.label is None else f"_label{cfg.label}"
    name = f"samples_w{cfg.w:g}_{cfg.solver}_seed{cfg.seed}{label}.png"
    path = Path(cfg.out or (run if run.is_dir() else run.parent) / name)
    path.parent.mkdir(parents=True, exist_ok=True)
    vae = load_vae(cfg.vae).to(device) if cfg.vae else None
    if vae and vae.config.latent_channels != model.in_channels:
        raise ValueError(f"{cfg.vae} decodes {vae.config.latent_channels} channels, the model has {model.in_channels}")
    labels = pick_labels(cfg, model.num_classes)

    def draw(index):
        x = sample(index, labels[index].to(device))
        return decode(vae, x) if vae else x

    if path.suffix == ".png":
        images = torch.cat([draw(index) for index in torch.arange(cfg.n).split(cfg.batch)])
        in_turn = cfg.label is None and model.num_classes <= 10
        save_grid(images, path, columns=model.num_classes if in_turn else 8)
    else:
        # before hours of sampling: the reference, or the package, may be no good
        reference = statistics(cfg.fid) if cfg.fid and rank == 0 else None
        names = ("n", "label", "labels", "w", "solver", "steps", "batch", "seed")
        made = {name: getattr(cfg, name) for name in names}
        made |= dict(device=device.type, weights=checksum(model))
        made["vae"] = checksum(vae) if vae else ""

        def draw_rgb(index):
            return to_uint8(draw(index).expand(-1, 3, -1, -1))

        write_npz(path, draw_rgb, labels, cfg.batch, made, rank, world)
        if reference:
            distance = frechet(*statistics(path), *reference)
            # never below 0, but for rounding
            print(f"FID {max(0.0, distance):.4f} to {cfg.fid}")
    if rank == 0:
        print(f"{cfg.n} samples ({device}, {cfg.solver}, w = {cfg.w:g}): {path}", flush=True)
