"""Training runs: the folder, checkpoints and log of one; sweeps of many, kept by what they depend on."""
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from model import build_model
from plumbing.cli import check_at_least, count_flops, device_name, setup_processes
from plumbing.files import ROOT, load_run, read_weights, save_checkpoint, write_whole
from plumbing.weights import load_state

# dense bfloat16 FLOP/s as NVIDIA states them; the first name that fits counts
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def check_training(cfg, world):
    """Raise ValueError for the first field of train.Config that is out of range."""
    check_at_least(cfg, steps=1, batch=1, accum=1, log_every=1, save_every=1, warmup=0, repa=0, repa_depth=1, seed=0)
    for name in ("ema", "decay", "label_dropout"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"{name} must lie in 0 .. 1, not {getattr(cfg, name)}")
    if cfg.batch % (world * cfg.accum):
        raise ValueError(f"batch {cfg.batch} is not divisible by processes x accum = {world} x {cfg.accum}")


def check_repa(cfg, data, model):
    """Return the dimension of a teacher's features. Raise ValueError if they, or the block to align, are missing."""
    depth = len(getattr(model, "blocks", ()))
    if depth < cfg.repa_depth:
        raise ValueError(f"REPA aligns block {cfg.repa_depth} of a SiT, but {cfg.model} has {depth}: change repa_depth")
    wanted, features = (len(data["x"]), model.pos_embed.shape[1]), data.get("features", np.zeros(0))
    if features.ndim != 3 or features.shape[:2] != wanted or features.dtype.kind != "f":
        raise ValueError(f"REPA needs features.npy beside x.npy of {cfg.data}: floating point of shape ({wanted[0]}, "
                         f"{wanted[1]}, dim), a teacher's for each image and token, not {features.dtype} "
                         f"{features.shape}")
    return features.shape[2]


def run_folder(cfg, preset, may_change):
    """Return cfg.out, or out/<preset>_<data>_<model>_<what differs from the preset, but for may_change>."""
    if cfg.out:
        return Path(cfg.out)
    parts = [cfg.preset, Path(cfg.data).name, cfg.model.replace("/", "-")]
    # data and model are in the name already; a run of other steps is a run of its own
    silent = {"data", "model", *may_change} - {"steps"}
    for name, value in dataclasses.asdict(cfg).items():
        if name not in silent and value != getattr(preset, name):
            parts.append(f"{name}={Path(value).name if name == 'init' else value}")
    return ROOT / "out" / "_".join(parts)


def restore(run, parts, identity, may_change):
    """Load the checkpoint of a run into {"model": module, ...} and return its step; 0 if there is none.

    Raise ValueError where it is of another config or other data, or damaged.
    """
    path = run / "ckpt.pt"
    if not path.exists():
        return 0
    checkpoint, config = read_weights(path), identity["config"]
    if checkpoint.get("fingerprint") != identity["fingerprint"]:
        raise ValueError(f"{path} was trained on other data of the same name: give another --out")
    for name, before in checkpoint["config"].items():
        now = config.get(name, before)
        # a rate that falls to 0 at the last step depends on how many steps there are
        fixed = name not in may_change or (name == "steps" and config["decay"])
        if fixed and now != before:
            raise ValueError(f"{path} was trained with {name} = {before}, not {now}: give another --out")
    if checkpoint["step"] > config["steps"]:
        raise ValueError(f"{path} is at step {checkpoint['step']}, past the {config['steps']} asked for: give another "
                         "--out")
    for name, part in parts.items():
        load_state(part, checkpoint.get(name), path)
    return checkpoint["step"]


def load_initial(source, model):
    """Load the weights that a run starts from. Raise ValueError if they are of another network or prediction."""
    start = load_run(source)
    if start.prediction != model.prediction:
        raise ValueError(f"{source} predicts {start.prediction}, this run {model.prediction}: change --prediction")
    load_state(model, start.state_dict(), source)


def save_run(run, parts, identity, step, keep):
    """Write ckpt.pt, from which the run goes on, and, to keep, ema_<step>.pt with the averaged weights alone."""
    about = identity | dict(step=step)
    if keep:
        save_checkpoint(run / f"ema_{step}.pt", about | dict(ema=parts["ema"].state_dict()))
    save_checkpoint(run / "ckpt.pt", about | {name: part.state_dict() for name, part in parts.items()})


def load_networks(train, cfg, data, device):
    """Return the networks that an experiment measures: the weights at cfg.model_path, or cfg.seeds trainings of
    cfg.network by train.train, which differ in their seed. Raise ValueError if one is not for these data."""
    if cfg.model_path:
        return [load_run(cfg.model_path, device, data=data)]
    networks = []
    for k in range(cfg.seeds):
        out = f"{cfg.network.out}_{k}" if cfg.network.out else ""
        network = dataclasses.replace(cfg.network, device=cfg.device, seed=cfg.network.seed + k, out=out)
        networks.append(load_run(train(network), device, data=data))
    return networks


def mean_over_processes(value, world):
    """Return the mean over all processes of a tensor (), as a number."""
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


class RunLog:
    """Print how a training goes, and write a line of log.jsonl per log step. A quiet one does neither."""

    def __init__(self, text, run, cfg, model_args, device, world, first_step, quiet):
        self.path, self.cfg, self.first_step, self.quiet = run / "log.jsonl", cfg, first_step, quiet
        self.last_step, self.last_time = first_step, time.time()
        if quiet:
            return
        print(f"{text}, {world} process(es) on {device} -> {run}, steps {first_step} to {cfg.steps}", flush=True)
        self.flops = count_flops(lambda: build_model(**model_args), 1)
        self.peak = world * next((flops for name, flops in PEAK_FLOPS.items() if name in device_name(device)), 0)
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            # drop lines from after the checkpoint, and one that a kill cut short
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first_step]
            with write_whole(self.path) as f:
                f.write("".join(kept).encode())

    def bar(self, batches):
        """Return the batches behind a progress bar."""
        return tqdm(batches, self.cfg.model, self.cfg.steps, initial=self.first_step, leave=False,
                    disable=True if self.quiet else None)

    def write(self, step, **values):
        """Print and keep the values of a step, with the speed since the last time."""
        if self.quiet:
            return
        now = time.time()
        speed = (step - self.last_step) * self.cfg.batch / max(now - self.last_time, 1e-9)
        self.last_step, self.last_time = step, now
        mfu = speed * self.flops / self.peak if self.peak else None
        values |= dict(images_per_second=speed, tflops=speed * self.flops / 1e12, mfu=mfu)
        record = dict(step=step) | {name: value for name, value in values.items() if value is not None}
        print("  ".join(f"{name} {value:.4g}" for name, value in record.items()), flush=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")


def cached(folder, key, compute):
    """Return the dict of numbers and arrays that compute() returns, as tensors; from a file, if it is there already.

    The file's name is a hash of `key`, a dict of everything that the result depends on, such as the data's fingerprint.
    """
    text = json.dumps(key, sort_keys=True, default=str)
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.pt"
    if path.exists():
        return read_weights(path)["result"]
    result = {name: torch.as_tensor(value).cpu() for name, value in compute().items()}
    save_checkpoint(path, dict(key=text, result=result))
    return result


def start_worker():
    """Give a worker one thread, so that results do not depend on how many there are, and end it with its parent."""
    def follow_parent():
        # where the parent was killed, a worker would wait for its next job for ever
        multiprocessing.parent_process().join()
        os._exit(1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, daemon=True).start()


def run_jobs(f, jobs, workers):
    """Return {job: f(job)}, in order; `workers` at once in processes of one thread each; 1: in this one, for a GPU.

    Under torchrun every process takes its share and gets all results: f returns them on the CPU. What f keeps on the
    disk (see `cached`) outlasts an interrupt. For workers > 1, f is a module's function or a functools.partial of one.
    """
    rank, world, _ = setup_processes(torch.device("cpu"))
    if world == 1 and workers != 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
            results = tqdm(pool.map(f, jobs), total=len(jobs), disable=None, leave=False)
            return dict(zip(jobs, results, strict=True))
    mine = {job: f(job) for job in tqdm(jobs[rank::world], disable=rank > 0 or None, leave=False)}
    parts = [mine] * world
    if world > 1:
        dist.all_gather_object(parts, mine)
    return {job: parts[i % world][job] for i, job in enumerate(jobs)}


def run_grid(f, settings, seeds, workers, folder, key):
    """Return {name: array (settings, seeds, ...)} of what f("setting/seed") returns, a dict of tensors.

    settings are texts, seeds are numbers. What f returns is kept in `folder` under `key`, all that it depends on.
    """
    jobs = [f"{setting}/{seed}" for setting in settings for seed in seeds]
    found = run_jobs(functools.partial(run_cached, f, folder, key), jobs, workers)
    arrays = {}
    for name in found[jobs[0]]:
        values = torch.stack([found[job][name].cpu() for job in jobs])
        arrays[name] = values.unflatten(0, (len(settings), len(seeds))).numpy()
    return arrays


def run_cached(f, folder, key, job):
    return cached(folder, key | dict(job=job), functools.partial(f, job))
