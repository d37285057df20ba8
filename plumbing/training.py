"""A training run's housekeeping: its folder, its checkpoints, its log. The lesson is train.py."""
import dataclasses
import json
import math
import time
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from model import build_model
from plumbing.cli import count_flops, peak_flops
from plumbing.files import ROOT, check_fit, load_run, load_state, read_checkpoint, save_checkpoint, write_whole


def check_training(cfg, world):
    """Raise ValueError for the first field of train.Config that is out of range."""
    for name in ("steps", "batch", "accum", "log_every", "save_every"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(cfg, name)}")
    ranges = dict(lr=0 < cfg.lr < math.inf, ema=0 < cfg.ema < 1, label_dropout=0 <= cfg.label_dropout <= 1,
                  repa=0 <= cfg.repa < math.inf, warmup=cfg.warmup >= 0, decay=0 <= cfg.decay <= 1,
                  seed=0 <= cfg.seed <= 1e9)
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
    found, wanted = data.get("features"), (len(data["x"]), model.pos_embed.shape[1])
    if found is None or found.ndim != 3 or found.shape[:2] != wanted or found.dtype.kind != "f":
        what = "nothing" if found is None else f"{found.dtype} {found.shape}"
        raise ValueError(f"REPA needs a teacher's features beside x.npy of {cfg.data}: features.npy, floating point of "
                         f"shape ({wanted[0]}, {wanted[1]}, dim), not {what}")
    return found.shape[2]


def run_folder(cfg, preset, may_change):
    """Return cfg.out, or out/<preset>_<data>_<model>_<what differs from the preset>: no two configs share one."""
    if cfg.out:
        return Path(cfg.out)
    parts = [cfg.preset, Path(cfg.data).name, cfg.model.replace("/", "-")]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        counts = field.name in ("steps", "init") or field.name not in ("data", "model", *may_change)
        if counts and value != getattr(preset, field.name):
            parts.append(f"{field.name}={Path(value).name if field.name == 'init' else value}")
    return ROOT / "out" / "_".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def check_same(found, wanted, may_change, path):
    """Raise ValueError that names the first thing in which a checkpoint differs from the run that wants to go on."""
    if found["fingerprint"] != wanted["fingerprint"]:
        raise ValueError(f"{path} was trained on other data of the same name: give another --out")
    for name, before in found["config"].items():
        now = wanted["config"].get(name, before)
        if name not in may_change and before != now:
            raise ValueError(f"{path} was trained with {name} = {before}, not {now}: give another --out")
    if found["step"] > wanted["config"]["steps"]:
        raise ValueError(f"{path} is at step {found['step']}, past the {wanted['config']['steps']} asked for: give "
                         "another --out")


def restore(run, parts, identity, may_change):
    """Load the checkpoint of a run into {"model": module, ...} and return its step; 0 if there is none.

    Raise ValueError where it is of another config or other data, or damaged.
    """
    path = Path(run) / "ckpt.pt"
    if not path.exists():
        return 0
    checkpoint = read_checkpoint(path)
    config = identity["config"]
    # a rate that falls to 0 at the last step depends on how many steps there are
    if config["decay"]:
        may_change = [name for name in may_change if name != "steps"]
    check_same(checkpoint, identity, may_change, path)
    if checkpoint["device"] != identity["device"]:
        print(f"{run} was trained on {checkpoint['device']}: on {identity['device']} its noise can be another")
    for name, part in parts.items():
        if name not in checkpoint:
            raise ValueError(f"{path} is not a checkpoint to go on from: {name} is missing")
        load_state(part, checkpoint[name], path)
    return checkpoint["step"]


def load_initial(source, model):
    """Load the weights that a run starts from. Raise ValueError if they are of another network or prediction."""
    start, _ = load_run(source)
    if start.prediction != model.prediction:
        raise ValueError(f"{source} predicts {start.prediction}, this run {model.prediction}: give --prediction "
                         f"{start.prediction}")
    if getattr(start.t_embedder, "scale", None) != model.t_embedder.scale:
        raise ValueError(f"{source} takes another scale of time than this model")
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
        network = dataclasses.replace(cfg.network, device=cfg.device)
        paths = []
        for k in range(cfg.seeds):
            out = f"{network.out}_{k}" if network.out else ""
            paths.append(train(dataclasses.replace(network, seed=network.seed + k, out=out)))
    models = []
    for path in paths:
        model, _ = load_run(path, device)
        check_fit(model, path, data)
        models.append(model)
    return models


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
        self.path, self.cfg, self.device, self.quiet = run / "log.jsonl", cfg, device, quiet
        self.flops = count_flops(lambda: build_model(**model_args), 1) if not quiet else 0
        peak = peak_flops(device)
        self.peak = world * peak if peak else None
        self.started = self.timed = 0

    def start(self, text, first_step):
        """Say what begins, and drop lines of the log from after the checkpoint."""
        self.first_step = first_step
        self.restart_clock(first_step)
        if self.quiet:
            return
        print(f"{text}, steps {first_step} to {self.cfg.steps}", flush=True)
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            with write_whole(self.path) as f:
                f.write("".join(line + "\n" for line in kept).encode())

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
        seconds = max(time.time() - self.started, 1e-9)
        values |= dict(images_per_second=images / seconds, tflops=images * self.flops / seconds / 1e12)
        if self.peak:
            values["mfu"] = values["tflops"] * 1e12 / self.peak
        record = dict(step=step)
        for name, value in values.items():
            if value is not None:
                record[name] = float(f"{value:.6g}")
        print("  ".join(f"{name} {value:.4g}" for name, value in record.items()), flush=True)
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        self.restart_clock(step)
