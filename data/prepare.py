"""Turn a public data set into the files that every script here opens: checked coming in, all or nothing going out.

    python data/prepare.py mnist                        # downloads 11 MB, seconds
    python data/prepare.py mnist --source DIR           # the four IDX files that you already have, .gz or not
    python data/prepare.py cifar10                      # downloads 163 MB
    python data/prepare.py cifar10 --source PATH        # cifar-10-binary.tar.gz, or the folder of its .bin files
    python data/prepare.py mnist5k                      # embedded in a package, no download (also: digits)
    torchrun --nproc_per_node=4 data/prepare.py imagenet --source ILSVRC/train --heldout ILSVRC/val
                                                        # SD-VAE latents (imagenet.py), by as many processes as GPUs

Afterwards data/<name>/ (or --out) holds
    x.npy, x_heldout.npy    (N, C, H, W) float32 in [-1, 1]: the official training and test images; or, of imagenet,
                            (N, 4, 32, 32) float16 latents, each training image followed by its flip
    y.npy, y_heldout.npy    (N,) int64
    meta.json               name, source, num_classes, shape, scaling, and the sha256 of every file read; of imagenet,
                            also the VAE, what was skipped, and the sha256 of every file written but features.npy
    files.json              imagenet: which image is which row
    features.npy            imagenet --repa: (N, 256, 768) float16, DINOv2-B's patch tokens, about 1 TB

ImageNet comes with an agreement, so you download it yourself. --source is a folder with a folder of images for each
class, and so is --heldout (ImageNet's validation images, sorted into class folders); labels are the places of the
folders' sorted names. Packages: pip install diffusers, for --repa transformers too. An unreadable image ends the run,
after all of them are listed, unless --skip-bad leaves them out; damage that a decoder passes over is not noticed.

data/.download/<name>/ keeps what was fetched. A download that broke off goes on there, and a killed imagenet in
data/.imagenet.partial: run the same command again, on as many processes as you like.
Every bad input ends in one line, `error: ...`, and exit status 1, with the target folder as it was before; --debug
shows the traceback.
"""
# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "torchdiffeq==0.2.5", "matplotlib==3.11.2", "tqdm==4.70.1",
#                 "tyro==1.0.17", "mlxtend==0.25.0", "scikit-learn==1.9.1"]
# ///
import gzip
import hashlib
import http.client
import math
import os
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

sys.path[:0] = [str(p) for p in Path(__file__).resolve().parents[:2]]  # so that this runs from any directory
import imagenet  # noqa: E402

from sample import limit_memory, one_line, parse  # noqa: E402
from train import DATA, load_data, save_dataset  # noqa: E402


@dataclass
class Config:
    name: tyro.conf.Positional[str]  # mnist, cifar10, mnist5k, digits or imagenet
    source: Path | None = None  # files that you already have: a folder, or CIFAR-10's .tar.gz (default: download them)
    out: Path | None = None  # target folder (default: data/<name>)
    # of imagenet alone:
    heldout: Path | None = None  # class folders of images that are held out, encoded without flips
    vae: str = "stabilityai/sd-vae-ft-ema"  # a diffusers AutoencoderKL: a folder, or a name on the Hugging Face hub
    latent: Literal["mean", "sample"] = "mean"  # of the VAE's posterior; either way one fixed latent for each image
    repa: bool = False  # DINOv2's features too, for REPA
    dino: str = "facebook/dinov2-base"  # a transformers Dinov2Model: a folder, or a name on the hub
    batch: int = 32  # images encoded at once, each with its flip; rounding may depend on it
    workers: int = 0  # threads of a process that read images; 0: as many as there are cores for it
    skip_bad: bool = False  # leave unreadable images out, and record them in meta.json
    device: str = "auto"  # auto, cpu, cuda, mps


SHA256 = {  # of the files as their authors published them; what a mirror sends must match
    "mnist": {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
}
MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/"],  # the author's own page
}
CIFAR_BINS = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
CIFAR_RECORDS = 10_000  # a file; a record is the label, then 3 x 32 x 32 bytes: all red, all green, all blue
CIFAR_TAR, CIFAR_FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"  # the second is the folder in the first
WRITTEN = {"x.npy", "y.npy", "x_heldout.npy", "y_heldout.npy", "meta.json", "features.npy", "files.json"}
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError)  # what a damaged archive raises, by where it is cut


class DataError(ValueError):
    """A bad input, in one line: the file, what was found, what was expected."""


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def transfer(url, part):
    """Append to the file `part` what it lacks of `url`. Raises urllib's errors, or ConnectionError when cut short."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as e:
        if e.code == 416 and have: return  # nothing lies beyond `have`: whole, or junk, and the checksum tells which
        raise
    with response:
        if response.status != 206: have = 0  # the server ignores ranges and sends the whole file: start over
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise ConnectionError(f"asked for bytes from {have}, got {response.headers.get('Content-Range')}")
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(total=total, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=None)
        with open(part, "ab" if have else "wb") as f, bar:
            while chunk := response.read(1 << 18):
                f.write(chunk)
                bar.update(len(chunk))
    if total is not None and (got := part.stat().st_size) < total:  # read(n) does not raise when the line drops
        raise ConnectionError(f"closed after {got} of {total} bytes")


def fetch(name):
    """Download the files of data set `name`, from the first mirror that has them, and return their folder."""
    folder = DATA / ".download" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, expected in SHA256[name].items():
        done, part, failures = folder / file, folder / f"{file}.part", []
        if done.exists() and sha256(done) == expected: continue
        for mirror in MIRRORS[name]:
            try:
                transfer(mirror + file, part)  # goes on with whatever the mirror before it managed to send
            except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as e:
                failures.append(f"{mirror}: {e}")
                continue
            if (found := sha256(part)) == expected:
                os.replace(part, done)
                break
            part.unlink()  # else every later try would resume from bad bytes
            failures.append(f"{mirror}: sha256 expected {expected}, found {found}, so it was removed")
        else:
            raise DataError(f"{done}: no mirror sent it ({'; '.join(failures)}); run the command again to go on, "
                            "or get the files by other means and pass --source PATH")
    return folder


def read_idx(path, magic, dims):
    """The (N, *dims) uint8 array in an IDX file: big-endian uint32 magic, N, *dims, then one byte per element."""
    size, body = 4 * (2 + len(dims)), bytearray()
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            head = f.read(size)
            if len(head) < size: raise DataError(f"{path}: truncated: {len(head)} bytes, expected a header of {size}")
            found, n, *shape = struct.unpack(f">{2 + len(dims)}I", head)
            if found != magic: raise DataError(f"{path}: magic number {found}, expected {magic}")
            if n == 0 or tuple(shape) != dims: raise DataError(f"{path}: shape {(n, *shape)}, expected (N, *{dims})")
            length = n * math.prod(dims)
            # In pieces, since f.read(length) allocates what the header claims; one byte too many shows trailing bytes,
            # and only reading to the end makes gzip compare its CRC.
            while len(body) <= length and (chunk := f.read(min(1 << 20, length + 1 - len(body)))): body += chunk
    except BROKEN as e:
        raise DataError(f"{path}: not a whole gzip file ({e})") from e
    if len(body) < length: raise DataError(f"{path}: truncated: {len(body)} bytes after the header, expected {length}")
    if len(body) > length: raise DataError(f"{path}: trailing bytes: more than the {length} after the header expected")
    return np.frombuffer(body, np.uint8).reshape(n, *dims)


def check_labels(path, y):
    if (bad := np.flatnonzero(y > 9)).size:
        raise DataError(f"{path}: label {y[bad[0]]} at index {bad[0]}, expected 0..9")
    return y


def read_mnist(source):
    """-> (x, y, x_heldout, y_heldout) in uint8, {file: sha256}"""
    if not source.is_dir(): raise DataError(f"{source}: not a folder, expected one with MNIST's four IDX files")
    arrays, hashes = [], {}
    for split in ("train", "t10k"):
        for kind, magic, dims in (("images-idx3", 2051, (28, 28)), ("labels-idx1", 2049, ())):
            stem = f"{split}-{kind}-ubyte"
            names = [s + gz for s in (stem, stem.replace("-idx", ".idx")) for gz in ("", ".gz")]
            path = next((source / s for s in names if (source / s).exists()), None)
            if path is None: raise DataError(f"{source / stem}: missing, expected one of {', '.join(names)}")
            arrays.append(read_idx(path, magic, dims))
            hashes[path.name] = sha256(path)
        x, y = arrays[-2], check_labels(path, arrays[-1])
        if len(y) != len(x): raise DataError(f"{path}: {len(y)} labels, expected {len(x)}, one for each image")
        arrays[-2] = x[:, None]  # (N, 1, 28, 28)
    return arrays, hashes


def read_cifar10(source):
    """-> (x, y, x_heldout, y_heldout) in uint8, {file: sha256}. The binary version: a pickle can run what it likes."""
    records, hashes, size = {}, {}, CIFAR_RECORDS * 3073

    def take(name, where, found, f):  # one .bin file; its size is checked before it is read
        if found != size: raise DataError(f"{where}: {found} bytes, expected {size} ({CIFAR_RECORDS} records of 3073)")
        records[name] = np.frombuffer(f.read(), np.uint8).reshape(-1, 3073)
        check_labels(where, records[name][:, 0])

    folder = next((d for d in (source, source / CIFAR_FOLDER) if any((d / s).exists() for s in CIFAR_BINS)), None)
    if folder:
        for path in (folder / s for s in CIFAR_BINS):
            with open(path, "rb") as f: take(path.name, path, os.fstat(f.fileno()).st_size, f)
            hashes[path.name] = sha256(path)
    else:
        path = source / CIFAR_TAR if source.is_dir() else source
        if not path.exists(): raise DataError(f"{path}: missing, expected {CIFAR_TAR} or a folder of its .bin files")
        members = {f"{CIFAR_FOLDER}/{s}": s for s in CIFAR_BINS}  # by exact name, and nothing is extracted to disk
        try:
            with gzip.open(path) as gz:
                with tarfile.open(fileobj=gz, mode="r|") as tar:  # a stream: one pass, in the archive's order
                    for m in tar:
                        if m.isreg() and m.name in members:
                            take(members.pop(m.name), f"{path}: {m.name}", m.size, tar.extractfile(m))
                while gz.read(1 << 20): pass  # tar stops before the end of the file, where gzip keeps its CRC
        except BROKEN as e:
            raise DataError(f"{path}: not a whole .tar.gz file ({e})") from e
        if members: raise DataError(f"{path}: holds no {', '.join(members)}; expected the binary version, {CIFAR_TAR}")
        hashes[path.name] = sha256(path)
    arrays = []
    for r in (np.concatenate([records[s] for s in CIFAR_BINS[:-1]]), records[CIFAR_BINS[-1]]):
        arrays += [r[:, 1:].reshape(-1, 3, 32, 32), r[:, 0]]
    return arrays, hashes


def scale(u8):
    x = u8.astype(np.float32)
    x /= 127.5; x -= 1  # in place: CIFAR-10 is 600 MB by now
    return x


def prepare(cfg):
    """Prepare one data set and return its folder. Raises DataError or OSError, and then leaves the folder as it was."""
    readers, embedded = {"mnist": read_mnist, "cifar10": read_cifar10}, ("mnist5k", "digits")
    known = (*readers, *embedded, "imagenet")
    for f in fields(cfg)[3:]:
        if cfg.name != "imagenet" and getattr(cfg, f.name) != f.default:
            raise DataError(f"{cfg.name}: --{f.name.replace('_', '-')} is an option of imagenet alone")
    if cfg.name in embedded:
        if cfg.source or cfg.out: raise DataError(f"{cfg.name}: is embedded, expected neither --source nor --out")
        try:
            load_data(cfg.name)
        except (ImportError, ValueError) as e:
            raise DataError(f"{cfg.name}: {e}") from e
        return DATA / cfg.name
    if cfg.name not in known: raise DataError(f"unknown data set {cfg.name!r}, expected one of {', '.join(known)}")
    out = Path(os.path.realpath(cfg.out or DATA / cfg.name))
    # save_dataset replaces the folder, so nothing may lie there but what this script once wrote: people keep the files
    # that --source names in data/<name> too.
    if out.exists() and not out.is_dir(): raise DataError(f"{out}: is a file, expected a folder or nothing there")
    if stray := sorted({p.name for p in out.iterdir()} - WRITTEN if out.exists() else ()):
        raise DataError(f"{out}: holds {stray[0]}, expected only a data set to replace; pass another --out")
    if cfg.name == "imagenet":
        if not cfg.source: raise DataError("imagenet: expected --source DIR, its folder of class folders")
        try:
            imagenet.prepare(cfg, out)
        except (ImportError, ValueError) as e:
            raise DataError(e) from e
        return out
    (x, y, x_heldout, y_heldout), hashes = readers[cfg.name](cfg.source or fetch(cfg.name))
    arrays = {"x": scale(x), "y": y.astype(np.int64)}
    arrays |= {"x_heldout": scale(x_heldout), "y_heldout": y_heldout.astype(np.int64)}
    meta = {"name": cfg.name, "source": str(cfg.source or MIRRORS[cfg.name][0]), "num_classes": 10,
            "shape": list(x.shape[1:]), "sha256": hashes, "scaling": "x = byte / 127.5 - 1, in [-1, 1]"}
    try:
        save_dataset(out, arrays, meta)
    except OSError as e:  # a full disk does not name the file
        raise DataError(f"{out}: could not be written ({e})") from e
    return out


def main(argv=None):
    argv, start = sys.argv[1:] if argv is None else [*argv], time.time()
    if debug := "--debug" in argv: argv.remove("--debug")
    limit_memory()
    try:
        cfg = parse(Config(tyro.MISSING), __doc__, argv)
        out = prepare(cfg)
    except SystemExit as e:  # after --help; or, of several processes, where another says what is wrong
        return e.code or 0
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 1
    except Exception as e:
        if debug or not (text := one_line(e)): raise
        print("error:", text, file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0": print(f"{cfg.name} lies in {out} ({time.time() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
