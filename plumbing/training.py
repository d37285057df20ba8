"""A training run's housekeeping: its folder, its checkpoints, its log. The lesson is train.py."""
import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from model import build_model
from plumbing.cli import check_at_least, count_flops, peak_flops
from plumbing.files import ROOT, check_checkpoint, load_run, load_state, read_weights, save_checkpoint, write_whole


def check_training(cfg, world):
    """Raise ValueError for the first field of train.Config that is out of range."""
    check_at_least(cfg, steps=1, batch=1, accum=1, log_every=1, save_every=1, warmup=0, repa=0, seed=0)
    ranges = dict(lr=0 < cfg.lr < math.inf, ema=0 < cfg.ema < 1, label_dropout=0 <= cfg.label_dropout <= 1,
                  decay=0 <= cfg.decay <= 1)
    for name, fits in ranges.items():
        if not fits:
            raise ValueError(f"{name} is out of range: {getattr(cfg, name)}")
    if cfg.batch % (world * cfg.accum):
        raise ValueError(f"batch {cfg.batch} does not divide by processes x accum = {world} x {cfg.accum}")


def check_repa(cfg, data, model):
    """Return the dimension of a teacher's features. Raise ValueError where they, or the block to align, are missing."""
    depth = len(getattr(model, "blocks", ()))
    if not 1 <= cfg.repa_depth <= depth:
        raise ValueError(f"repa_depth {cfg.repa_depth} is none of the {depth} blocks of {cfg.model}: REPA needs a SiT "
                         "at least so deep")
    n, tokens = len(data["x"]), model.pos_embed.shape[1]
    found = data.get("features", np.zeros(0))
    if found.shape[:2] != (n, tokens) or found.ndim != 3:
        raise ValueError(f"REPA needs a teacher's features beside x.npy of {cfg.data}: features.npy of shape "
                         f"({n}, {tokens}, dim), not {found.dtype} {found.shape}")
    return found.shape[2]


def run_folder(cfg, preset, may_change):
    """Return cfg.out, or out/<preset>_<data>_<model>_<what differs from the preset>: no two configs share one."""
    if cfg.out:
        return Path(cfg.out)
    parts = [cfg.preset, Path(cfg.data).name, cfg.model.replace("/", "-")]
    silent = {"data", "model", *may_change} - {"steps", "init"}
    for name, value in dataclasses.asdict(cfg).items():
        if name not in silent and value != getattr(preset, name):
            parts.append(f"{name}={Path(value).name if name == 'init' else value}")
    return ROOT / "out" / "_".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def restore(run, parts, identity, may_change):
    """Load the checkpoint of a run into {"model": module, ...} and return its step; 0 if there is none.

    Raise ValueError where it is of another config or other data, or damaged.
    """
    path = Path(run) / "ckpt.pt"
    if not path.exists():
        return 0
    checkpoint, config = read_weights(path), identity["config"]
    check_checkpoint(checkpoint, path)
    if checkpoint["fingerprint"] != identity["fingerprint"]:
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
    if checkpoint["device"] != identity["device"]:
        print(f"{run} was trained on {checkpoint['device']}: on {identity['device']} its noise can be another")
    for name, part in parts.items():
        load_state(part, checkpoint[name], path)
    return checkpoint["step"]


def load_initial(source, model):
    """Load the weights that a run starts from. Raise ValueError if they are of another network or prediction."""
    start, _ = load_run(source)
    if start.prediction != model.prediction:
        raise ValueError(f"{source} predicts {start.prediction}, this run {model.prediction}: give --prediction "
                         f"{start.prediction}")
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
    paths = [cfg.model_path]
    if not cfg.model_path:
        paths = []
        for k in range(cfg.seeds):
            out = f"{cfg.network.out}_{k}" if cfg.network.out else ""
            network = dataclasses.replace(cfg.network, device=cfg.device, seed=cfg.network.seed + k, out=out)
            paths.append(train(network))
    return [load_run(path, device, data=data)[0] for path in paths]


# ----------------------------------------------------------------------------------------------------------------------
# The log

def mean_over_processes(value, world):
    """Return the mean over all processes of a tensor (), as a number."""
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


class RunLog:
    """Print how a training goes, and write a line of log.jsonl per log step. A quiet one does neither."""

    def __init__(self, run, cfg, model_args, device, world, quiet):
        self.path, self.cfg, self.quiet = run / "log.jsonl", cfg, quiet
        self.flops = count_flops(lambda: build_model(**model_args), 1) if not quiet else 0
        self.peak = world * peak_flops(device)

    def start(self, text, first_step):
        """Say what begins, and drop lines of the log from after the checkpoint."""
        self.first_step = first_step
        self.restart_clock(first_step)
        if self.quiet:
            return
        print(f"{text}, steps {first_step} to {self.cfg.steps}", flush=True)
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            # a line that a kill cut short has no end
            kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first_step]
            with write_whole(self.path) as f:
                f.write("".join(kept).encode())

    def bar(self, batches):
        """Return the batches behind a progress bar."""
        return tqdm(batches, self.cfg.model, self.cfg.steps, initial=self.first_step, leave=False,
                    disable=True if self.quiet else None)

    def restart_clock(self, step):
        """Leave out of the speed what a checkpoint takes."""
        self.started, self.timed = time.time(), step

    def write(self, step, **values):
        """Print and keep the values of a step, with the speed since the last time."""
        if self.quiet:
            return
        images = (step - self.timed) * self.cfg.batch
        speed = images / max(time.time() - self.started, 1e-9)
        values |= dict(images_per_second=speed, tflops=speed * self.flops / 1e12)
        if self.peak:
            values["mfu"] = speed * self.flops / self.peak
        rounded = {name: float(f"{value:.6g}") for name, value in values.items() if value is not None}
        record = dict(step=step) | rounded
        print("  ".join(f"{name} {value:.4g}" for name, value in record.items()), flush=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        self.restart_clock(step)
