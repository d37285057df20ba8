"""Sweeps of many small networks: several train at once, each is kept by what it depends on."""
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from plumbing.cli import count_processes, setup_processes
from plumbing.files import read_weights, save_checkpoint


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
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow_parent, daemon=True).start()


def follow_parent():
    # where the parent was killed, a worker would wait for its next job for ever
    multiprocessing.parent_process().join()
    os._exit(1)


def run_jobs(f, jobs, workers):
    """Return {job: f(job)}, `workers` at once in processes of one thread each; 1: in this process, for a GPU.

    f keeps its results on the disk (see `cached`), so that the same command goes on after an interrupt. Under torchrun
    every process takes its share. f is a function of a module, or a functools.partial of one; jobs are hashable.
    """
    jobs = list(jobs)
    rank, world = count_processes()
    if world > 1:
        setup_processes(torch.device("cpu"))
        parts = [None] * world
        dist.all_gather_object(parts, {job: f(job) for job in jobs[rank::world]})
        found = {job: result for part in parts for job, result in part.items()}
        return {job: found[job] for job in jobs}
    if workers == 1:
        return {job: f(job) for job in tqdm(jobs, disable=None, leave=False)}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        results = tqdm(pool.map(f, jobs), total=len(jobs), disable=None, leave=False)
        return dict(zip(jobs, results, strict=True))


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
