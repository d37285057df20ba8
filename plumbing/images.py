"""Images in files: reading them, a grid of samples, 50,000 samples in one .npz, and the Frechet distance (FID).

An .npz of samples holds arr_0, uint8 (n, H, W, 3), as ADM's evaluator reads it; labels; and made, all settings. FID
compares Inception features of two sets of images by their mean and covariance.
"""
import functools
import glob
import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from plumbing.cli import check_at_least, wait_for_all
from plumbing.files import checkpoint_path, write_whole
from plumbing.weights import checksum, load_vae, optional_import

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def find_images(folder):
    """Return the image files in a folder and below it, sorted. Hidden files and folders do not count."""
    paths = map(Path, glob.glob(f"{glob.escape(str(folder))}/**", recursive=True))
    images = sorted(path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())
    if not images:
        raise ValueError(f"{folder}: no images in this folder")
    return images


def read_rgb(path):
    """Return an image as 8-bit RGB (a Pillow image). Raise ValueError that names the file if it cannot be read."""
    try:
        with Image.open(path) as image:
            # Pillow would clip these values to 0 .. 255, not scale them.
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {image.mode}, expected 8 bits")
            return image.convert("RGB")
    except Exception as error:
        # Decoders raise many kinds of errors for damaged files: OSError, SyntaxError, struct.error.
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def to_uint8(x):
    """Return images (..., C, H, W) in [-1, 1] as uint8 (..., H, W, C), the way FID evaluators want: 127.5 x + 128."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).movedim(-3, -1).cpu()


def save_grid(x, path, columns=10):
    """Write images (B, C, H, W) in [-1, 1] as one PNG, row by row. Of latents, it shows the first three channels."""
    x = x[:, :3] if x.shape[1] > 2 else x[:, :1].expand(-1, 3, -1, -1)
    # Small images get pixels that one can see.
    images = to_uint8(F.interpolate(x, scale_factor=max(1, 64 // x.shape[2])))
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -len(x) % columns))
    images = images.unflatten(0, (-1, columns))              # (rows, columns, H, W, 3)
    canvas = images.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    with write_whole(path) as f:
        Image.fromarray(canvas.numpy()).save(f, "PNG")


def write_npz(path, draw, labels, batch, made, rank=0, world=1):
    """Draw images 0 .. len(labels) - 1 and write them to the .npz `path`. The same call goes on after a kill.

    draw     indices (B,) -> images (B, C, H, W) in [-1, 1], of 1 or 3 channels
    batch    these many are always drawn together, whichever process does it, since dopri5's steps depend on the batch
    made     a dict of all that decides on the images; raise ValueError if the .npz was made otherwise
    Each batch becomes a file in a folder of its own for each `made`; the first process puts them together at the end.
    """
    made = json.dumps(made)
    parts = path.with_name(f"{path.name}.{hashlib.sha256(made.encode()).hexdigest()[:8]}.parts")
    if not path.exists():
        batches = torch.arange(len(labels)).split(batch)
        files = [parts / f"{k:06d}.npy" for k in range(len(batches))]
        for k in tqdm(range(rank, len(batches), world), desc="batches", disable=rank > 0):
            if not files[k].exists():
                images = to_uint8(draw(batches[k]).expand(-1, 3, -1, -1))
                with write_whole(files[k]) as f:
                    np.save(f, images.numpy())
        wait_for_all()
        if rank == 0:
            images = np.concatenate([np.load(file) for file in files])
            with write_whole(path) as f:
                np.savez(f, arr_0=images, labels=labels.numpy(), made=made)
    elif str(read_npz(path, "made").get("made")) != made:
        raise ValueError(f"{path} holds images of other settings or weights: delete it, or give another --out")
    if rank == 0:
        shutil.rmtree(parts, ignore_errors=True)


def frechet(mean1, cov1, mean2, cov2):
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), the squared Wasserstein distance of Gaussians."""
    w, U = np.linalg.eigh(cov1)
    root = U * np.sqrt(w.clip(0)) @ U.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


def gaussian(batches):
    """Return mean (dim,) and covariance (dim, dim) of features that come in batches (b, dim), in float64."""
    features = np.concatenate([np.asarray(batch, dtype=np.float64) for batch in batches])
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


def read_npz(path, *names):
    """Return {name: array} of these names, as far as an .npz holds them. Raise ValueError if the file is damaged."""
    try:
        archive = np.load(path)
        return {name: archive[name] for name in names if name in archive.files}
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error


def statistics(source, batch=64):
    """Return mean and covariance of the features of a folder of images, all of one size, or of an .npz.

    An .npz may hold them itself, as ADM's references do, by this same network: mu and sigma.
    """
    features = inception()
    if Path(source).is_dir():
        paths = find_images(source)
        return gaussian(features(np.stack([*map(read_rgb, paths[k:k + batch])])) for k in range(0, len(paths), batch))
    moments = read_npz(source, "mu", "sigma")
    if len(moments) == 2:
        return moments["mu"].astype(np.float64), moments["sigma"].astype(np.float64)
    images = read_npz(source, "arr_0").get("arr_0", np.zeros(0))
    if images.dtype != np.uint8 or len(images) < 2:
        raise ValueError(f"{source}: expected two images or more, uint8 (n, H, W, 3), as arr_0")
    return gaussian(features(images[start:start + batch]) for start in range(0, len(images), batch))


@torch.no_grad()
def save_samples(cfg, sample, model, device, rank, world):
    """Draw cfg.n images, decoded, and write them to a PNG, or to an .npz, whose FID to cfg.fid is printed.

    sample(index (B,), y (B,)) -> what the model samples for these images, (B, C, H, W)
    """
    check_at_least(cfg, n=1, batch=1, steps=1)
    label = "" if cfg.label is None else f"_label{cfg.label}"
    run = checkpoint_path(cfg.run)
    name = f"samples_{run.stem}_w{cfg.w:g}_{cfg.solver}_seed{cfg.seed}{label}{'' if cfg.ema else '_raw'}.png"
    path = Path(cfg.out) if cfg.out else run.with_name(name)
    if cfg.label is not None and not 0 <= cfg.label < model.num_classes:
        raise ValueError(f"label {cfg.label} is none of this model's, 0 to {model.num_classes - 1}")
    if path.suffix != ".npz" and (path.suffix != ".png" or cfg.fid or world > 1):
        raise ValueError(f"--out {path}: expected NAME.npz, for FID or several processes, or else NAME.png")
    if path.suffix == ".npz" and not cfg.vae and model.in_channels not in (1, 3):
        raise ValueError(f"{cfg.run} samples latents of {model.in_channels} channels: give their autoencoder, --vae")
    # A wrong reference or a missing package shows here, before hours of sampling.
    reference = statistics(cfg.fid) if cfg.fid and rank == 0 else None
    vae = load_vae(cfg.vae).to(device) if cfg.vae else None
    if vae and vae.config.latent_channels != model.in_channels:
        raise ValueError(f"{cfg.vae} decodes {vae.config.latent_channels} channels, the model has {model.in_channels}")
    labels = torch.arange(cfg.n) % model.num_classes if cfg.label is None else torch.full((cfg.n,), cfg.label)

    def draw(index):
        x = sample(index, labels[index].to(device))
        # a few at a time, since a decoder's activations are large
        return torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in x.split(16)]) if vae else x

    if path.suffix == ".png":
        save_grid(torch.cat([draw(index) for index in torch.arange(cfg.n).split(cfg.batch)]), path)
    else:
        # All that decides on the images: a command goes on with none but its own.
        weights = dict(weights=checksum(model), vae=checksum(vae) if vae else "")
        made = vars(cfg) | weights | dict(run="", out="", fid="", device=device.type)
        write_npz(path, draw, labels, cfg.batch, made, rank, world)
    if rank == 0:
        print(f"{cfg.n} samples ({device}, {cfg.solver}, w = {cfg.w:g}): {path}", flush=True)
    if reference:
        print(f"FID {frechet(*statistics(path), *reference):.4f} to {cfg.fid}")
