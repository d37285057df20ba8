"""Turn a public data set, or a folder of your own images, into the files that every script here opens.

    python data/prepare.py mnist                            # downloads 11 MB, or takes its IDX files: --source DIR
    python data/prepare.py cifar10                          # downloads 163 MB, or takes --source cifar-10-binary.tar.gz
    python data/prepare.py folder --source DIR --size 32    # any images, or a folder of images for each class
    torchrun --nproc_per_node=4 data/prepare.py imagenet --source ILSVRC/train --heldout ILSVRC/val    # see imagenet.py

data/<name>/, or --out, then holds
    x.npy, x_heldout.npy    (N, C, H, W) float32 in [-1, 1]; of imagenet (N, 4, 32, 32) float16 latents
    y.npy, y_heldout.npy    (N,) int64 labels
    meta.json               name, source, num_classes, classes, shape, scaling, and the sha256 of these files
MNIST and CIFAR-10 hold out their test images, a folder every tenth image, imagenet those of --heldout.
"""
import gzip
import io
import struct
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from mlxtend.data import loadlocal_mnist
from torch.hub import download_url_to_file

# the project's folder and this one, so that the script runs from any directory
sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
import imagenet  # noqa: E402

from plumbing.cli import check_at_least, run_command  # noqa: E402
from plumbing.data import DATA, EMBEDDED  # noqa: E402


@dataclass
class Config:
    name: tyro.conf.Positional[Literal["mnist", "cifar10", "folder", "imagenet"]]
    source: Path | None = None  # what you already have (default, of mnist and cifar10: download it)
    out: Path | None = None  # target folder (default: data/<name>; of folder: data/<name of --source>)
    size: int = 32  # folder: pixels a side, cropped from the middle
    heldout: Path | None = None  # imagenet: class folders of images that are held out
    vae: str = "stabilityai/sd-vae-ft-ema"  # imagenet: a diffusers AutoencoderKL, a folder or a name on the hub
    repa: bool = False  # imagenet: DINOv2's features too, for REPA
    dino: str = "facebook/dinov2-base"  # imagenet: a transformers Dinov2Model, a folder or a name on the hub
    batch: int = 32  # imagenet: images encoded at once, each with its flip
    workers: int = 4  # imagenet: processes that read images, for each GPU; 0: none


DOWNLOADS = {  # address, and the sha256 of each file as its authors published it
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/", {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"})}
CIFAR_BYTES = 10_000 * 3073  # of a file; a record is the label, then 3 x 32 x 32 bytes


def download(name):
    """Download the files of a data set that are not there yet, and return their folder."""
    folder, (address, sums) = DATA / ".download" / name, DOWNLOADS[name]
    folder.mkdir(parents=True, exist_ok=True)
    for file, sha256 in sums.items():
        if not (folder / file).exists():
            try:
                download_url_to_file(address + file, folder / file, sha256)
            except (RuntimeError, OSError) as error:
                raise ValueError(f"{address + file}: {error}: get it elsewhere, and pass --source") from None
    return folder


def unzip(path):
    """Return the bytes of a file, unzipped if it is a .gz."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except Exception as error:
        raise ValueError(f"{path}: cannot be read whole ({error})") from None


def read_mnist(source):
    """Return images (N, 1, 28, 28) and labels of training, then of test, in uint8."""
    # some put a dot before idx, and Kaggle a folder of the same name beside the file
    found = {p.name.replace(".idx", "-idx").removesuffix(".gz"): p for p in sorted(source.rglob("*")) if p.is_file()}
    arrays = []
    for split in ("train", "t10k"):
        names = [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"]
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in names]
            for file in files:
                if file.name not in found:
                    raise ValueError(f"{source / file.name}: missing, expected here or in a folder below, .gz or not")
                file.write_bytes(unzip(found[file.name]))
            try:
                x, y = loadlocal_mnist(*files)
            except (ValueError, struct.error) as error:
                raise ValueError(f"{source}: {' and '.join(names)} are damaged, or do not fit ({error})") from None
        arrays += [x.reshape(-1, 1, 28, 28), y]
    return arrays


def read_cifar10(source):
    """Return images (N, 3, 32, 32) and labels of training, then of test, in uint8."""
    path, arrays = source / "cifar-10-binary.tar.gz" if source.is_dir() else source, []
    try:
        with tarfile.open(fileobj=io.BytesIO(unzip(path)), mode="r:") as tar:
            files = {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.name.endswith(".bin")}
    except tarfile.TarError as error:
        raise ValueError(f"{path}: no tar file is in it ({error})") from None
    for names in ([f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]):
        sizes = [len(files.get(name, b"")) for name in names]
        if set(sizes) != {CIFAR_BYTES}:
            raise ValueError(f"{path}: {', '.join(names)} of {sizes} bytes, expected {CIFAR_BYTES} in each")
        records = np.frombuffer(b"".join(files[name] for name in names), np.uint8).reshape(-1, 3073)
        arrays += [records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]]
    return arrays


def main(cfg):
    """Prepare one data set."""
    check_at_least(cfg, size=1)
    if cfg.source is None and cfg.name not in DOWNLOADS:
        raise ValueError(f"{cfg.name}: expected --source DIR, your folder of images")
    source = cfg.source.resolve() if cfg.source else download(cfg.name)
    if not source.exists() or (cfg.name == "folder" and not source.is_dir()):
        raise ValueError(f"--source {source}: there is no such folder or file")
    name = source.name if cfg.name == "folder" else cfg.name
    if cfg.name == "folder" and name in (*EMBEDDED, *DOWNLOADS, "imagenet") and not cfg.out:
        raise ValueError(f"{name} is the name of another data set: pass --out")
    out = (cfg.out or DATA / name).resolve()
    # a new data set replaces the folder, so nothing else may lie there
    inside = list(out.iterdir()) if out.is_dir() else [out]
    if out.exists() and any(p.suffix not in (".npy", ".json") for p in inside):
        raise ValueError(f"{out}: holds other files than a data set, which would be lost: pass another --out")
    if cfg.name == "imagenet":
        imagenet.prepare(cfg, out)
    elif cfg.name == "folder":
        imagenet.save_pixels(out, source, *imagenet.read_folder(source, cfg.size))
    else:
        read = read_mnist if cfg.name == "mnist" else read_cifar10
        imagenet.save_pixels(out, source, read(source), list(range(10)))


if __name__ == "__main__":
    run_command(main, {"default": Config(tyro.MISSING)}, __doc__)
