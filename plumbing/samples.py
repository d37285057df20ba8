"""What the command of sample.py does besides sampling: labels, an autoencoder, a PNG or an .npz, an FID."""
from pathlib import Path

import numpy as np
import torch

from plumbing.files import check_writable
from plumbing.images import fid, save_grid, statistics, to_uint8, write_npz
from plumbing.weights import checksum, decode, load_vae


def check_sampling(cfg, model, world):
    """Raise ValueError for the first field of sample.Config that is out of range, or does not fit the model."""
    for name, least in dict(n=1, batch=1, steps=1, seed=0).items():
        if getattr(cfg, name) < least:
            raise ValueError(f"{name} must be at least {least}, not {getattr(cfg, name)}")
    if cfg.label is not None and not 0 <= cfg.label < model.num_classes:
        raise ValueError(f"label {cfg.label} is none of this model's, 0 to {model.num_classes - 1}")
    if cfg.label is not None and cfg.labels != "balanced":
        raise ValueError(f"--label {cfg.label} is one class: it goes without --labels {cfg.labels}")
    if cfg.out and Path(cfg.out).suffix not in (".png", ".npz"):
        raise ValueError(f"--out {cfg.out} must end in .png or .npz")
    if Path(cfg.out or "x.png").is_dir():
        raise ValueError(f"--out {cfg.out} is a folder: give the name of a file, NAME.png or NAME.npz")
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


def load_decoder(name, model, device):
    """Return (vae or None, a function from what the model samples to images in about [-1, 1])."""
    if not name:
        return None, lambda x: x
    vae = load_vae(name).to(device)
    if vae.config.latent_channels != model.in_channels:
        raise ValueError(f"{name} decodes latents of {vae.config.latent_channels} channels, the model has "
                         f"{model.in_channels}")
    return vae, lambda x: decode(vae, x)


def default_path(cfg):
    """Return the file of a PNG that --out does not name: it says what is in it."""
    run = Path(cfg.run)
    folder = run if run.is_dir() else run.parent
    what = f"w{cfg.w:g}_{cfg.solver}_seed{cfg.seed}"
    if cfg.label is not None:
        what += f"_label{cfg.label}"
    if cfg.labels != "balanced":
        what += f"_{cfg.labels}"
    if not cfg.ema:
        what += "_raw"
    return folder / f"samples_{what}.png"


def save_samples(cfg, sample, model, device, rank, world):
    """Draw cfg.n images, decoded, and write them to a PNG, or to an .npz, with an FID to cfg.fid.

    sample(index (B,), y (B,)) -> what the model samples for these images, (B, C, H, W)
    """
    check_sampling(cfg, model, world)
    path = Path(cfg.out) if cfg.out else default_path(cfg)
    check_writable(path.parent)
    vae, to_images = load_decoder(cfg.vae, model, device)
    labels = pick_labels(cfg, model.num_classes)

    @torch.no_grad()
    def draw(index):
        images = to_images(sample(index, labels[index].to(device)))
        if not images.isfinite().all():
            raise ValueError(f"images {int(index[0])} to {int(index[-1])} are not finite: has the training diverged?")
        return images

    if path.suffix == ".npz":
        write_samples_npz(cfg, draw, labels, model, vae, path, rank, world)
    else:
        images = torch.cat([draw(index) for index in torch.arange(cfg.n).split(cfg.batch)])
        in_turn = cfg.label is None and model.num_classes <= 10
        save_grid(images, path, columns=model.num_classes if in_turn else 8)
    if rank == 0:
        print(f"{cfg.n} samples ({device}, {cfg.solver}, w = {cfg.w:g}): {path}", flush=True)


def write_samples_npz(cfg, draw, labels, model, vae, path, rank, world):
    """Write all images to an .npz, batch by batch on all processes, and print the FID if cfg.fid names a reference."""
    made = {name: getattr(cfg, name) for name in ("n", "label", "labels", "w", "solver", "steps", "batch", "seed")}
    made |= dict(device=next(model.parameters()).device.type, weights=checksum(model))
    made["vae"] = checksum(vae) if vae else ""
    # before hours of sampling: the reference may be no good
    reference = statistics(cfg.fid) if cfg.fid and rank == 0 else None
    height, width = draw(torch.arange(1)).shape[-2:]

    def draw_rgb(index):
        return to_uint8(draw(index).expand(-1, 3, -1, -1))

    write_npz(path, draw_rgb, labels, (height, width, 3), cfg.batch, made, rank, world)
    if reference is not None:
        print(f"FID {fid(path, reference):.4f} to {cfg.fid}")
