"""Encode ImageNet into the latents that the paper trains on. `python data/prepare.py imagenet` runs this file.

An image becomes RGB, is halved with a box filter while its short side is 512 or more, resized bicubically to a short
side of 256, and cropped in the middle, all as ADM does. The image *and its mirror image* go through the VAE, since the
mirror image of a latent is not the latent of the mirror image. Rows 2k and 2k + 1 of x.npy are image k and its flip.
Images are sorted by class, then by name. A latent is the posterior's mean times the VAE's scaling factor, in float16:
its values are of order 1, and x.npy takes 21 GB.

4,096 images at a time become a shard, a file in .<name>.shards beside the target, named by a hash of its images and of
the networks. So the same command, on any number of processes, goes on after a kill, and encodes again only what has
changed. At the end the first process puts the shards together; until then they take the disk a second time.
Tested with small networks on a CPU. It has not been run at ImageNet's size, nor on GPUs.
"""
import functools
import hashlib
import os
import shutil

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm

from plumbing.cli import pick_device, setup_processes, wait_for_all
from plumbing.data import check_labels, save_dataset
from plumbing.files import lock_folder, read_json, write_json, write_whole
from plumbing.images import center_crop, find_classes, find_images, read_rgb
from plumbing.weights import checksum, load_vae, optional_import, pretrained

SIZE = 256  # pixels a side
SHARD, SHARD_WITH_FEATURES = 4096, 512  # images; DINOv2's features are 48 times larger than latents
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by which DINOv2's input is normalised


class Images(list):
    """Paths, whose items are the cropped image and what is wrong with the file, "" if nothing is."""

    def __getitem__(self, i):
        try:
            return center_crop(read_rgb(super().__getitem__(i)), SIZE), ""
        except ValueError as error:
            return np.zeros((SIZE, SIZE, 3), np.uint8), str(error)


def load_dino(name):
    """Return DINOv2. Its table of positions is resampled to 16 x 16 patches, with antialiasing, as REPA does."""
    dino = pretrained("--dino", name, optional_import("transformers", "Dinov2Model", "--repa"))
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
    # 16 x 16 patches of 14 pixels: one for each token of SiT-*/2
    x = F.interpolate(x, (224, 224), mode="bicubic")
    # past the final norm; the first token is the class token
    return dino(x).last_hidden_state[:, 1:]


def fingerprint(paths, *more):
    """Return a hash of files, by name, size and time, and of `more`."""
    h = hashlib.sha256(repr(more).encode())
    for path in paths:
        stat = path.stat()
        h.update(repr((path.parent.name, path.name, stat.st_size, stat.st_mtime_ns)).encode())
    return h.hexdigest()[:16]


def encode_shard(file, paths, copies, encoders, cfg, device):
    """Write what each encoder makes of these images, or of each and its flip, and what is wrong with an image."""
    made, wrong = {name: [] for name in encoders}, []
    for images, reasons in DataLoader(Images(paths), batch_size=cfg.batch, num_workers=cfg.workers):
        images = images.to(device)
        if copies == 2:
            images = torch.stack([images, images.flip(2)], dim=1).flatten(0, 1)
        for name, encoder in encoders.items():
            made[name].append(encoder(images).half().cpu())
        wrong += reasons
    arrays = {name: torch.cat(batches).unflatten(0, (len(paths), copies)).numpy() for name, batches in made.items()}
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name} of {paths[0]} to {paths[-1]}: not finite in float16: is the network damaged?")
    with write_whole(file) as f:
        np.savez(f, wrong=np.array(wrong), **arrays)


def read_shards(shards, name):
    """Yield one array (images, copies, ...) of each shard."""
    for file, _ in shards:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays[name]


def merge(shards, name, keep, path):
    """Write array `name` of all shards as one .npy of float16, shard by shard, less the images that are not kept."""
    copies, *shape = next(read_shards(shards, name)).shape[1:]
    shape, start = (copies * int(keep.sum()), *shape), 0
    with write_whole(path) as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="<f2", fortran_order=False, shape=shape))
        for values in read_shards(shards, name):
            f.write(values[keep[start:start + len(values)]].tobytes())
            start += len(values)


def write_meta(folder, meta):
    """Write a data set's meta.json, with the shape of its images, and the sha256 of all files but features.npy."""
    sums, shape = {}, np.load(folder / "x.npy", mmap_mode="r").shape[1:]
    for path in sorted(folder.glob("[xy]*.npy")):
        with open(path, "rb") as f:
            sums[path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    write_json(folder / "meta.json", meta | dict(shape=shape, sha256=sums))


def finish(parts, new, meta, cfg):
    """Put the shards together in the folder `new`. Raise ValueError if an image cannot be read, unless --skip-bad."""
    wrong = {part: np.concatenate(list(read_shards(shards, "wrong"))) for part, (shards, _, _) in parts.items()}
    skipped = [str(text) for text in np.concatenate(list(wrong.values())) if text]
    if skipped and not cfg.skip_bad:
        print(*skipped, sep="\n", flush=True)
        raise ValueError(f"{len(skipped)} images cannot be read (listed above): mend or remove them, or leave them out "
                         "by --skip-bad; the same command goes on from here")
    shutil.rmtree(new, ignore_errors=True)
    files = {}
    for part, (shards, labels, copies) in parts.items():
        keep = wrong[part] == ""
        for name in ["x", "features"] if part == "x" and cfg.repa else ["x"]:
            merge(shards, name, keep, new / f"{part if name == 'x' else name}.npy")
        np.save(new / f"{part.replace('x', 'y', 1)}.npy", np.repeat(labels[keep], copies))
        names = [f"{path.parent.name}/{path.name}" for _, piece in shards for path in piece]
        files[part] = [names[k] for k in np.flatnonzero(keep)]
    write_json(new / "files.json", files)
    write_meta(new, meta | dict(skipped=skipped))


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
    for job in tqdm(todo, "encoding", unit="shard", disable=None if rank == 0 else True):
        encode_shard(*job, encoders, cfg, device)
    wait_for_all()
    if rank == 0:
        meta = dict(name="imagenet", source=str(cfg.source), num_classes=len(classes), classes=classes, made=made,
                    networks=networks, scaling=f"latent x {vae.config.scaling_factor}", vae=cfg.vae)
        with lock_folder(work):
            finish(parts, work / "new", meta, cfg)
            shutil.rmtree(out, ignore_errors=True)
            os.replace(work / "new", out)
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
    files = {}
    for part, images, labels in (("", *arrays[:2]), ("_heldout", *arrays[2:])):
        check_labels(f"y{part} of {source}", labels, len(images), len(classes))
        files |= {f"x{part}": images.astype(np.float32) / 127.5 - 1, f"y{part}": labels.astype(np.int64)}
    meta = dict(name=out.name, source=str(source), num_classes=len(classes), classes=classes,
                scaling="x = byte / 127.5 - 1, in [-1, 1]")
    save_dataset(out, files, meta)
    write_meta(out, meta)
    counts = f"{len(arrays[0])} images, {len(arrays[2])} held out, {len(classes)} classes"
    print(f"{out.name} ({counts}) lies in {out}")
