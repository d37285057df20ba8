"""Sweeps of many small networks: several train at once, and each is kept by what it depends on."""
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.cli import count_processes, setup_processes, wait_for_all
from plumbing.files import read_weights, save_checkpoint


def to_tensors(value):
    """Return a result with its NumPy arrays as tensors, which a checkpoint can hold."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: to_tensors(part) for name, part in value.items()}
    return value


def cached(folder, key, compute):
    """Return compute(), a dict of tensors, arrays and plain values; from a file, if it was computed before.

    The file's name is a hash of `key`, a dict that JSON can hold: everything that the result depends on, the data's
    fingerprint included. Arrays come back as tensors.
    """
    text = json.dumps(key, sort_keys=True, default=str)
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.pt"
    if path.exists():
        return read_weights(path)["result"]
    result = to_tensors(compute())
    save_checkpoint(path, dict(key=text, result=result))
    return result


def start_worker():
    """Give a worker one thread, so that results do not depend on how many there are, and end it with its parent."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch_parent, daemon=True).start()


def watch_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def run_jobs(f, jobs, workers):
    """Return {job: f(job)}, `workers` at once in processes of one thread each; 1: in this process, for a GPU.

    f keeps its results on the disk (see `cached`), so that the same command goes on after an interrupt. Under torchrun
    every process takes its share. f is a function of a module, or a functools.partial of one; jobs are hashable.
    """
    jobs, results = list(jobs), {}
    rank, world = count_processes()
    if world > 1:
        setup_processes(torch.device("cpu"))
        for job in jobs[rank::world]:
            f(job)
        wait_for_all()
    with tqdm(total=len(jobs), desc="networks", disable=None, leave=False) as bar:
        if workers == 1 or world > 1:
            for job in jobs:
                results[job] = f(job)
                bar.update()
            return results
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
            futures = {pool.submit(f, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise OSError("a worker was killed, perhaps because memory ran out: use fewer --workers") from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return results
