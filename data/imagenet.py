"""ImageNet as the latents that the paper trains on. Run by `python data/prepare.py imagenet`, whose docstring has the
commands; this file is what happens to an image, then how 2.6 million of them are encoded on several GPUs, killed, and
gone on with.

An image is opened by Pillow, converted to RGB (gray, CMYK and palettes are; an alpha channel is dropped; EXIF rotation
is not applied: all as ADM does), halved with a box filter while its short side is 512 or more, resized bicubically to a
short side of 256 (a tiny one is enlarged so) and cropped in the middle. The image *and its mirror image* go through the
VAE: a latent turned round is not the latent of the image turned round. Rows 2k and 2k + 1 of x.npy are image k and its
flip, and images are sorted by class, then by name, so that a class is one slice of the file.

Latents are float16: x.npy takes 21 GB, as float32 42. They are of order 1, so its range is ample, and it rounds a value
by 2^-11 of it at most; bfloat16, which .npy does not know, rounds 8 times as coarsely. The arithmetic is float32
throughout (no TF32). Tested with small networks on a CPU; at ImageNet's size and on GPUs not run yet.

The work goes on in .<name>.partial beside the target: data/, which becomes the target when it is whole; plan.json, what
is made of what; and progress, one byte a batch, set once the rows of the batch are on the disk (fsync). Batches are cut
from the list of images before they are dealt out, so that no number of processes, and no interruption, changes what is
encoded together with what: on a CPU, with the same threads a process, the files come out the same bit by bit.
"""
import contextlib
import datetime
import hashlib
import itertools
import json
import os
import shutil
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from sample import load_vae, lock, noise, pick_device, pretrained

SIZE = 256  # pixels a side
LATENT = (4, 32, 32)
SEEDS = {"x": 1000, "x_heldout": 2000}  # of --latent sample; far from those that images are sampled with
SYNC = 10.0  # seconds of work that a kill may cost, since an fsync costs too
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, by which DINOv2's input is normalised

# ----------------------------------------------------------------------------------------------------------------------
# One image


def center_crop(image, size=SIZE):
    """ADM's crop (guided_diffusion/image_datasets.py, also DiT's and SiT's). RGB image -> (size, size, 3) uint8"""
    while min(image.size) >= 2 * size:  # bicubic alone would alias when it shrinks much
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if width * height > Image.MAX_IMAGE_PIXELS:  # a strip of 1 x 10,000 pixels becomes a bomb when it is enlarged
        raise ValueError(f"so narrow that it would be enlarged to {width} x {height} pixels")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.array(image)[top:top + size, left:left + size]


def read_image(path):
    """-> (256, 256, 3) uint8. ValueError says what is wrong with the file, without its path."""
    try:
        with Image.open(path) as image:
            return center_crop(image.convert("RGB"))
    except UnidentifiedImageError as e:
        raise ValueError("not an image that Pillow knows") from e
    except Exception as e:  # given garbage, a decoder raises anything: OSError, SyntaxError, struct.error ...
        raise ValueError(f"{str(e).replace(str(path), 'the file') or type(e).__name__}".replace("\n", " ")) from e


@torch.no_grad()
def encode(vae, images, rows, latent, seed, device):
    """images (B, 256, 256, 3) uint8 -> latents (B, 4, 32, 32) float32. `rows` number the points: a sampled latent takes
    its noise from its own number, not from the batch or the process that it is in."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    posterior = vae.encode(x).latent_dist
    z = posterior.mean
    if latent == "sample": z = z + posterior.std * noise(rows, z.shape[1:], seed).to(z)
    return (z * vae.config.scaling_factor).cpu().numpy()


@torch.no_grad()
def features(dino, images, device):
    """images (B, 256, 256, 3) uint8 -> DINOv2's patch tokens (B, 256, D) float32, normalised and resized as in REPA."""
    x = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
    x = F.interpolate(x, (224, 224), mode="bicubic")  # 16 x 16 patches of 14 pixels: one for each token of SiT-*/2
    return dino(x).last_hidden_state[:, 1:].cpu().numpy()  # past the final norm; the first token is the class token


# ----------------------------------------------------------------------------------------------------------------------
# The two networks, both optional packages


def load_dino(name):
    """-> DINOv2, its table of positions resampled to 16 x 16 as REPA does it, with antialiasing."""
    try:
        from transformers import Dinov2Model
    except ImportError as e:
        raise ImportError(f"--repa needs transformers, for DINOv2 ({e}): pip install transformers") from e
    dino = pretrained("--dino", name, Dinov2Model)
    table = dino.embeddings.position_embeddings.data  # (1, 1 + 37 * 37, D): it was trained on 518 x 518 pixels
    side, D = round((table.shape[1] - 1) ** 0.5), table.shape[2]
    grid = table[:, 1:].reshape(1, side, side, D).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    table = torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 256, D)], 1)
    dino.embeddings.position_embeddings = torch.nn.Parameter(table, requires_grad=False)
    return dino


def checksum(model):
    """sha256 of a network's weights, whatever the file format that they came in"""
    h = hashlib.sha256()
    for name, w in sorted(model.state_dict().items()):
        h.update(f"{name} {tuple(w.shape)} ".encode() + w.cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The images, and which of them are readable


def find_images(root, classes=None):
    """-> (names of the class folders, [(folder/name, label)] by class and name, a digest of names, sizes and times).
    With `classes` given, the held-out images' labels are positions in it."""
    if not root.is_dir(): raise ValueError(f"{root}: not a folder, expected one with a folder of images for each class")
    found = sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    if not found: raise ValueError(f"{root}: holds no class folders, expected one folder of images for each class")
    files, digest = [], hashlib.sha256()
    for label, name in enumerate(found):
        if classes is not None:
            if name not in classes: raise ValueError(f"{root / name}: there is no such class in --source")
            label = classes.index(name)
        inside = sorted((e for e in os.scandir(root / name) if not e.name.startswith(".")), key=lambda e: e.name)
        if not inside: raise ValueError(f"{root / name}: a class folder without images")
        for e in inside:
            if e.is_dir(): raise ValueError(f"{e.path}: a folder in a class folder: is {root} one level too high?")
            files.append((f"{name}/{e.name}", label))
            stat = e.stat(follow_symlinks=e.is_file())  # a link to nothing is an unreadable image, listed later
            digest.update(repr((files[-1], stat.st_size, stat.st_mtime_ns)).encode())
    return found, files, digest.hexdigest()


def find_bad(root, files, threads):
    """Read this process's share of the images -> [(number, why it cannot be read)], of all processes, in order."""
    def problem(k):
        try:
            read_image(root / files[k][0])
            return None
        except ValueError as e:
            return k, str(e)

    rank, world = rank_and_world()
    mine, bad = range(rank, len(files), world), []
    with bar(len(mine), "checking images") as progress, ThreadPoolExecutor(threads) as pool:
        for i in range(0, len(mine), 1024):  # in pieces, since map() queues all that it is given
            bad += [b for b in pool.map(problem, mine[i:i + 1024]) if b]
            progress.update(len(mine[i:i + 1024]))
    return sorted(itertools.chain(*gather(bad)))


def refuse(bad, total):
    for name, why in bad: print(f"unreadable: {name}: {why}", flush=True)
    raise ValueError(f"{len(bad)} of {total:,} images cannot be read (each is listed above): mend or remove them, "
                     "or leave them out by --skip-bad")


# ----------------------------------------------------------------------------------------------------------------------
# Processes


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value):
    """Every process's value, in a list, on every process; also the point where they wait for each other."""
    values = [None] * rank_and_world()[1]
    if not dist.is_initialized(): return [value]
    dist.all_gather_object(values, value)
    return values


def once(f):
    """f() by the first process alone, its result on all. When it fails, that process says why and the others end."""
    if not dist.is_initialized(): return f()
    rank, box = dist.get_rank(), [False, None]
    try:
        if rank == 0: box = [True, f()]
    finally:
        dist.broadcast_object_list(box)
    if not box[0]:
        # The first of them to exit makes torchrun end the others, and that must be the one with the error to print.
        with contextlib.suppress(RuntimeError): dist.barrier()
        raise SystemExit(1)
    return box[1]


def bar(total, what):
    return tqdm(total=total, desc=what, unit="image", disable=True if rank_and_world()[0] else None)


# ----------------------------------------------------------------------------------------------------------------------
# Files


def write_json(path, value):
    """All of it or nothing, and on the disk before anything is that relies on it."""
    with open(path.with_suffix(".tmp"), "w") as f:
        json.dump(value, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path.with_suffix(".tmp"), path)


class Rows:
    """Writes rows into a .npy file that open_memmap has made. By write(), and not through the memory map: on a disk
    that has filled up the first raises an error, the second kills the process (SIGBUS)."""

    def __init__(self, path):
        rows = np.load(path, mmap_mode="r")
        self.offset, self.size = rows.offset, rows[:1].nbytes
        self.file = open(path, "r+b", buffering=0)

    def write(self, first, rows):
        self.file.seek(self.offset + first * self.size)
        rest = memoryview(rows.tobytes())
        while rest: rest = rest[self.file.write(rest):]  # it may take a part, the more so as the disk fills up

    def sync(self):
        os.fsync(self.file.fileno())


def partial(out):
    return out.with_name(f".{out.name}.partial")


def check_disk(out, shapes):
    """Print the disk that the files take, and raise when less is free. What an interrupted run has written counts."""
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    written = [p for name in sizes if (p := partial(out) / "data" / f"{name}.npy").exists()]
    have = sum(512 * p.stat().st_blocks for p in written)  # blocks: the holes of a sparse file take no disk
    there = next(p for p in (out, *out.parents) if p.exists())
    need, free = sum(sizes.values()) - have, shutil.disk_usage(there).free
    need += 200 * sum(shape[0] for name, shape in shapes.items() if name != "features")  # labels, names, meta.json
    print(f"disk: {need / 1e9:,.2f} GB needed ({', '.join(f'{k}.npy {v / 1e9:,.2f}' for k, v in sizes.items())}), "
          f"{free / 1e9:,.2f} GB free at {there}", flush=True)
    if need > free: raise ValueError(f"{there}: {free / 1e9:,.2f} GB free, expected {need / 1e9:,.2f} GB")


# ----------------------------------------------------------------------------------------------------------------------
# The whole


def find_plan(work, config):
    """The plan of an interrupted run with this config, or None when there is none. ValueError if its config is another
    and its work would be lost."""
    if not (work / "plan.json").exists() or not (work / "data").exists(): return None  # killed before, or at the end
    plan, progress = json.loads((work / "plan.json").read_text()), (work / "progress").read_bytes()
    done, total = sum(progress), plan["batches"]
    try:
        for path in (work / "data").glob("*.npy"): np.load(path, mmap_mode="r")
        if len(progress) != total: raise ValueError(f"progress has {len(progress)} bytes, expected {total}")
    except (ValueError, EOFError) as e:
        raise ValueError(f"{work} is damaged ({e}): delete it to start anew") from e
    if plan["config"] == config:
        print(f"going on in {work}: {done} of {total} batches are done", flush=True)
        return plan
    if not done: return None
    was = [f"{k} {str(v)[:16]}" for k, v in plan["config"].items() if v != config.get(k)]
    raise ValueError(f"{work} holds {done} of {total} batches made with other options or images ({', '.join(was)}): "
                     "give these again to go on, or delete the folder to start anew")


def make_plan(work, config, sets, bad, dim):
    """Write the empty files and then, last, the plan that says they are there."""
    shutil.rmtree(work / "data", ignore_errors=True)
    (work / "plan.json").unlink(missing_ok=True)
    (work / "data").mkdir()
    good, skipped = {}, []
    for key, (root, files, copies) in sets.items():
        out = dict(bad[key])
        good[key] = [f for k, f in enumerate(files) if k not in out]
        for name in sorted({files[k][0].split("/")[0] for k in out} - {f[0].split("/")[0] for f in good[key]}):
            raise ValueError(f"{root / name}: a class folder without a readable image")
        skipped += [[str(root / files[k][0]), why] for k, why in bad[key]]
        shapes = {key: (copies * len(good[key]), *LATENT)}
        if dim and key == "x": shapes["features"] = (copies * len(good[key]), *dim)
        for name, shape in shapes.items():
            np.lib.format.open_memmap(work / "data" / f"{name}.npy", "w+", np.float16, shape)
        np.save(work / "data" / f"{key.replace('x', 'y', 1)}.npy", np.repeat([y for _, y in good[key]], copies))
    batches = sum(-(-len(g) // config["batch"]) for g in good.values())
    (work / "progress").write_bytes(bytes(batches))
    write_json(work / "data/files.json", {key: [name for name, _ in g] for key, g in good.items()})
    plan = {"config": config, "batches": batches, "skipped": skipped}
    write_json(work / "plan.json", plan)
    return plan


def encode_all(work, sets, cfg, vae, dino, device, threads):
    """This process's part of the batches that are not done: read, encode, write, sync, mark as done, in this order."""
    names = once(lambda: json.loads((work / "data/files.json").read_text()))
    step = cfg.batch
    cuts = [(key, i, min(i + step, len(g))) for key, g in names.items() for i in range(0, len(g), step)]
    rank, world = rank_and_world()
    # read by one process, before any other marks what it has done: all must deal out the same list
    todo = once(lambda: [b for b, done in enumerate((work / "progress").read_bytes()) if not done])[rank::world]
    files = {key: Rows(work / "data" / f"{key}.npy") for key in [*names, *["features"] * bool(dino)]}
    pending, synced = [], time.time()

    def read(key, name):
        try: return read_image(sets[key][0] / name)
        except ValueError as e: raise ValueError(f"{sets[key][0] / name}: was readable before, now: {e}") from e

    with open(work / "progress", "r+b", buffering=0) as progress, ThreadPoolExecutor(threads) as pool, \
            bar(sum(cuts[b][2] - cuts[b][1] for b in todo), "encoding") as images_done:
        ahead, following = deque(), iter(todo)
        try:
            while True:
                for b in itertools.islice(following, 3 - len(ahead)):  # threads read two batches ahead
                    key, first, last = cuts[b]
                    ahead.append((b, [pool.submit(read, key, name) for name in names[key][first:last]]))
                if not ahead: break
                b, futures = ahead.popleft()
                (key, first, last), images = cuts[b], np.stack([f.result() for f in futures])
                copies = sets[key][2]
                if copies == 2: images = np.stack([images, images[:, :, ::-1]], 1).reshape(-1, SIZE, SIZE, 3)
                rows = range(copies * first, copies * last)
                made = {key: encode(vae, images, rows, cfg.latent, SEEDS[key], device)}
                if dino and key == "x": made["features"] = features(dino, images, device)
                for name, value in made.items():
                    value = value.astype(np.float16)
                    if not np.isfinite(value).all():
                        raise ValueError(f"{name}.npy: a value that is not finite in float16, of one of the images "
                                         f"{names[key][first]} to {names[key][last - 1]}: is the network damaged?")
                    files[name].write(rows.start, value)
                pending.append(b)
                if time.time() - synced >= SYNC or b == todo[-1]:
                    for f in files.values(): f.sync()
                    for done in pending: progress.seek(done), progress.write(b"\1")  # after, never before
                    pending, synced = [], time.time()
                images_done.update(last - first)
        finally:
            pool.shutdown(cancel_futures=True)


def finish(work, out, meta):
    """Checksums and meta.json, and the folder appears; a kill in between leaves what the next run can end."""
    data = work / "data"
    if not all((work / "progress").read_bytes()): raise ValueError(f"{work}: not all batches are done")
    for path in [*sorted(data.glob("[xy]*.npy")), data / "files.json"]:  # not features.npy: an hour more for its 1 TB
        with open(path, "rb") as f: meta["sha256"][path.name] = hashlib.file_digest(f, "sha256").hexdigest()
    write_json(data / "meta.json", meta)
    if out.exists():
        shutil.rmtree(work / "old", ignore_errors=True)
        os.replace(out, work / "old")
    os.replace(data, out)
    shutil.rmtree(work)


def is_complete(out, config):
    try:
        meta = json.loads((out / "meta.json").read_text())
        names = [*meta["sha256"], *["features.npy"] * bool(meta["dino"])]
        return meta["config"] == config and all((out / name).exists() for name in names)
    except (OSError, ValueError, KeyError):
        return False


def prepare(cfg, out):
    """Make the data set `out`, or find it made; called on every process of a torchrun. cfg: prepare.py's Config.
    ValueError, ImportError or OSError in one process, whose line is the one to print; SystemExit in the others."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if world > 1 and not dist.is_initialized():  # gloo on GPUs too: nothing but lists of names goes between them
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))  # who is done early waits for the others
    if cfg.batch < 1 or cfg.workers < 0: raise ValueError("--batch must be at least 1, --workers at least 0")
    device = pick_device(cfg.device)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} has no GPU: expected --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    threads = cfg.workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # Pillow warns from 89 million pixels on and refuses from twice as many: here the first is a reason to list the file
    warnings.filterwarnings("ignore", module="PIL")  # of odd EXIF fields and palettes, about many a file
    warnings.simplefilter("error", Image.DecompressionBombWarning)

    def look():
        classes, files, digest = find_images(cfg.source)
        sets, digests = {"x": (cfg.source, files, 2)}, {"images": digest, "heldout": None}  # 2: and its flip
        if cfg.heldout:
            _, files, digests["heldout"] = find_images(cfg.heldout, classes)
            sets["x_heldout"] = (cfg.heldout, files, 1)
        return classes, sets, digests

    classes, sets, digests = once(look)
    nets = {}
    fetch = lambda: nets.update(vae=load_vae(cfg.vae), dino=load_dino(cfg.dino) if cfg.repa else None)
    once(fetch)  # one process downloads,
    if not nets: fetch()  # the others find it in the cache
    sums = {f"{name}_sha256": checksum(net) if net else None for name, net in nets.items()}
    vae, dino = (net.to(device) if net else None for net in nets.values())
    probe = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    if (found := encode(vae, probe, [0], "mean", 0, device).shape[1:]) != LATENT:
        raise ValueError(f"--vae {cfg.vae}: its latents are {found}, expected {LATENT}")
    dim = features(dino, probe, device).shape[1:] if dino else None
    if dim and dim[0] != 256: raise ValueError(f"--dino {cfg.dino}: {dim[0]} patch tokens, expected 256")
    config = {**digests, **sums, "latent": cfg.latent, "batch": cfg.batch}
    work, held = partial(out), []

    def begin():
        if is_complete(out, config):
            if work.exists(): held.append(lock(work)), shutil.rmtree(work)  # left by a kill after the last step but one
            return "complete"
        shapes = {key: (copies * len(files), *LATENT) for key, (_, files, copies) in sets.items()}
        check_disk(out, {**shapes, "features": (shapes["x"][0], *dim)} if dim else shapes)
        work.mkdir(parents=True, exist_ok=True)
        held.append(lock(work))
        return find_plan(work, config)

    def plan_it(bad):
        try:
            listed = [(sets[key][0] / sets[key][1][k][0], why) for key in sets for k, why in bad[key]]
            if listed and not cfg.skip_bad: refuse(listed, sum(len(files) for _, files, _ in sets.values()))
            return make_plan(work, config, sets, bad, dim)
        except (ValueError, OSError):
            if not (work / "plan.json").exists(): shutil.rmtree(work, ignore_errors=True)
            raise

    if (plan := once(begin)) == "complete": return
    if plan is None:
        bad = {key: find_bad(root, files, threads) for key, (root, files, _) in sets.items()}
        plan = once(lambda: plan_it(bad))
    elif plan["skipped"] and not cfg.skip_bad:
        once(lambda: refuse(plan["skipped"], sum(len(files) for _, files, _ in sets.values())))
    try:
        encode_all(work, sets, cfg, vae, dino, device, threads)
    except torch.OutOfMemoryError as e:
        raise ValueError(f"{device} is out of memory: give a smaller --batch than {cfg.batch}") from e
    except OSError as e:  # a full disk does not name the file
        raise ValueError(f"{work}: could not be written ({e}); the same command goes on from here") from e
    gather(None)  # all are done
    meta = {"name": cfg.name, "num_classes": len(classes), "shape": list(LATENT), "source": str(cfg.source),
            "scaling": f"latent x {vae.config.scaling_factor}", "vae": cfg.vae, "dino": cfg.dino if cfg.repa else None,
            "pillow": PIL.__version__,  # in versions apart, the crop differs by the last bit of some pixels
            "flips": "row 2k + 1 is the encoded mirror image of the image in row 2k; none are held out",
            "files": "files.json: line k is the image of rows 2k and 2k + 1", "config": config, "sha256": {},
            "skipped": plan["skipped"], "classes": classes}
    once(lambda: finish(work, out, meta))
    if dist.is_initialized(): dist.destroy_process_group()
