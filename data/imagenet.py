"""Encode ImageNet into the latents that the paper trains on. `python data/prepare.py imagenet` runs this file.

An image becomes RGB and 256 x 256 by ADM's crop. The image *and its mirror image* go through the VAE, since the mirror
image of a latent is not the latent of the mirror image. Rows 2k and 2k + 1 of x.npy are image k and its flip, sorted by
class, then by name. A latent is the posterior's mean times the VAE's scaling factor, in float16. x.npy takes 21 GB.

4,096 images at a time become a shard, named by a hash of its images and of the networks. So the same command, on any
number of processes, goes on after a kill. At the end the first process puts the shards together.
Tested with small networks on a CPU. It has not been run at ImageNet's size, nor on GPUs.
"""
import functools
import hashlib
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from plumbing.cli import pick_device, setup_processes, wait_for_all
from plumbing.data import check_labels, new_folder
from plumbing.files import lock_folder, read_json, write_json, write_whole
from plumbing.images import find_images, read_rgb
from plumbing.weights import checksum, load_vae, optional_import, pretrained

SIZE = 256  # pixels a side
SHARD, SHARD_WITH_FEATURES = 4096, 512  # images; DINOv2's features are 48 times larger than latents
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by which DINOv2's input is normalised


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
    paths = find_images(root)
    for path in paths:
        if path.parent.parent != root:
            raise ValueError(f"{path} does not lie in a class folder: expected {root}/CLASS/{path.name}")
    names = [path.parent.name for path in paths]
    found = set(names)
    empty = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in found]
    if empty:
        raise ValueError(f"{min(empty)}: no images in this folder")
    numbers = {name: k for k, name in enumerate(classes or sorted(found))}
    unknown = found - set(numbers)
    if unknown:
        raise ValueError(f"{root / min(unknown)}: --source has no class of this name")
    return list(numbers), paths, np.array([numbers[name] for name in names])


class Images(list):
    """Paths, whose items are the cropped image and what is wrong with the file, "" if nothing is."""

    def __getitem__(self, i):
        try:
            return center_crop(read_rgb(super().__getitem__(i)), SIZE), ""
        except ValueError as error:
            return np.zeros((SIZE, SIZE, 3), np.uint8), str(error)


def load_dino(name):
    """Return DINOv2. Its table of positions is resampled to 16 x 16 patches, with antialiasing, as REPA does."""
    dino = pretrained(optional_import("transformers", "Dinov2Model", "--repa"), name)
    table = dino.embeddings.position_embeddings.data  # (1, 1 + 37 * 37, D): it was trained on 518 x 518 pixels
    side = round((table.shape[1] - 1) ** 0.5)
    grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, 37, 37)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    table = torch.cat([table[:, :1], grid.flatten(2).mT], dim=1)  # (1, 1 + 256, D)
    dino.embeddings.position_embeddings = torch.nn.Parameter(table, requires_grad=False)
    return dino


@torch.no_grad()
def encode(vae, images):
    """Return the latents (B, 4, 32, 32) of images (B, 256, 256, 3) uint8."""
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return vae.encode(x).latent_dist.mean * vae.config.scaling_factor


@torch.no_grad()
def features(dino, images):
    """Return DINOv2's patch tokens (B, 256, D) of images (B, 256, 256, 3) uint8, normalised and resized as in REPA."""
    x = images.permute(0, 3, 1, 2).float() / 255
    x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
    x = F.interpolate(x, (224, 224), mode="bicubic")  # 16 x 16 patches of 14 pixels: one for each token of SiT-*/2
    # past the final norm; the first token is the class token
    return dino(x).last_hidden_state[:, 1:]


def fingerprint(paths, *more):
    """Return a hash of files, by name, size and time, and of `more`."""
    files = [(path.parent.name, path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr((files, more)).encode()).hexdigest()[:16]


def encode_shard(file, paths, copies, encoders, cfg, device):
    """Write what each encoder makes of these images, or of each and its flip; or return what is wrong with them."""
    made, wrong = {name: [] for name in encoders}, []
    for images, reasons in DataLoader(Images(paths), batch_size=cfg.batch, num_workers=cfg.workers):
        images = images.to(device)
        if copies == 2:
            images = torch.stack([images, images.flip(2)], dim=1).flatten(0, 1)
        for name, encoder in encoders.items():
            made[name].append(encoder(images).half().cpu())
        wrong += [reason for reason in reasons if reason]
    arrays = {name: torch.cat(batches).numpy() for name, batches in made.items()}
    if not all(np.isfinite(values).all() for values in arrays.values()):
        wrong.append(f"{file.stem}: not finite in float16, with {paths[0]} to {paths[-1]}: is a network damaged?")
    if not wrong:
        with write_whole(file) as f:
            np.savez(f, **arrays)
    return wrong


def merge(shards, name, rows, path):
    """Write array `name` of all shards, so many rows, as one .npy, shard by shard."""
    with open(path, "wb") as f:
        shape = (rows, *np.load(shards[0][0])[name].shape[1:])
        np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
        for file, _ in shards:
            f.write(np.load(file)[name].tobytes())


def write_meta(folder, meta):
    """Write a data set's meta.json, with the shape of its images, and the sha256 of all files but features.npy."""
    sums, shape = {}, np.load(folder / "x.npy", mmap_mode="r").shape[1:]
    for path in sorted(folder.glob("[xy]*.npy")):
        with open(path, "rb") as f:
            sums[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    write_json(folder / "meta.json", meta | dict(shape=shape, sha256=sums))


def finish(parts, new, meta, cfg):
    """Put the shards together in the folder `new`."""
    for part, (shards, labels, copies) in parts.items():
        for name in ["x", "features"] if part == "x" and cfg.repa else ["x"]:
            merge(shards, name, len(labels) * copies, new / f"{part if name == 'x' else name}.npy")
        np.save(new / f"{part.replace('x', 'y', 1)}.npy", np.repeat(labels, copies))
    write_meta(new, meta)


def prepare(cfg, out):
    """Make the data set `out`, or find it made. Every process of a torchrun calls this. cfg: prepare.py's Config."""
    rank, world, device = setup_processes(pick_device())
    torch.backends.cudnn.allow_tf32 = False  # float32 throughout
    classes, paths, labels = find_classes(cfg.source)
    images = {"x": (paths, labels, 2)}  # 2: each image and its flip
    if cfg.heldout:
        images["x_heldout"] = (*find_classes(cfg.heldout, classes)[1:], 1)
    vae = load_vae(cfg.vae).to(device)
    encoders, networks = {"x": functools.partial(encode, vae)}, [checksum(vae)]
    if cfg.repa:
        dino = load_dino(cfg.dino).to(device)
        encoders["features"] = functools.partial(features, dino)
        networks.append(checksum(dino))
    made = [*networks, *(fingerprint(paths) for paths, _, _ in images.values())]
    if (out / "meta.json").exists() and read_json(out / "meta.json").get("made") == made:
        return
    work, size = out.with_name(f".{out.name}.shards"), SHARD_WITH_FEATURES if cfg.repa else SHARD
    parts, jobs = {}, []
    for part, (paths, labels, copies) in images.items():
        pieces = [paths[i:i + size] for i in range(0, len(paths), size)]
        shards = [(work / f"{fingerprint(piece, copies, networks)}.npz", piece) for piece in pieces]
        parts[part] = shards, labels, copies
        jobs += [(file, piece, copies) for file, piece in shards]
    todo = [job for job in jobs[rank::world] if not job[0].exists()]
    wrong = []
    for job in tqdm(todo, "encoding", unit="shard", disable=None if rank == 0 else True):
        wrong += encode_shard(*job, encoders, cfg, device)
    if wrong:
        print(*wrong, sep="\n", flush=True)
        raise ValueError(f"{len(wrong)} images cannot be read (listed above): mend or remove them, and start again")
    wait_for_all()
    if rank == 0:
        meta = dict(name="imagenet", source=str(cfg.source), num_classes=len(classes), classes=classes, made=made,
                    networks=networks, scaling=f"latent x {vae.config.scaling_factor}", vae=cfg.vae)
        with lock_folder(work), new_folder(out) as new:
            finish(parts, new, meta, cfg)
        shutil.rmtree(work)
        print(f"imagenet lies in {out}")


def read_folder(source, size):
    """Return images (N, 3, size, size) and labels of nine tenths, then of a tenth, in uint8; and the class names."""
    if any(p.is_dir() and not p.name.startswith(".") for p in source.iterdir()):
        classes, paths, labels = find_classes(source)
    else:
        classes, paths = [source.name], find_images(source)
        labels = np.zeros(len(paths), np.int64)
    # a camera stores a picture as its sensor lay, and says how to turn it
    images = [center_crop(ImageOps.exif_transpose(read_rgb(path)), size) for path in paths]
    x, held = np.stack(images).transpose(0, 3, 1, 2), np.arange(len(images)) % 10 == 5
    if not held.any():
        raise ValueError(f"{source}: {len(images)} images, expected at least 6, since every tenth is held out")
    return [x[~held], labels[~held], x[held], labels[held]], classes


def save_pixels(out, source, arrays, classes):
    """Write a data set of pixels, scaled to [-1, 1], after a check of the labels."""
    meta = dict(name=out.name, source=str(source), num_classes=len(classes), classes=classes,
                scaling="x = byte / 127.5 - 1, in [-1, 1]")
    with new_folder(out) as new:
        for part, images, labels in (("", *arrays[:2]), ("_heldout", *arrays[2:])):
            check_labels(f"y{part} of {source}", labels, len(images), len(classes))
            np.save(new / f"x{part}.npy", images.astype(np.float32) / 127.5 - 1)
            np.save(new / f"y{part}.npy", labels.astype(np.int64))
        write_meta(new, meta)
    print(f"{out.name} ({len(arrays[0])} images, {len(arrays[2])} held out, {len(classes)} classes) lies in {out}")
