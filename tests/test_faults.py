"""What a run survives: kills at any moment, signals, damaged and missing checkpoints, a process that dies."""
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_scaling import TINY
from test_train import config, data, weights  # noqa: F401
from test_tutorial import untimed

import exp_scaling
import sample
import train

ROOT = Path(__file__).resolve().parents[1]
SERVER = multiprocessing.get_context("forkserver")           # it imports torch once, so that a child starts in no time
SERVER.set_forkserver_preload(["exp_scaling", "torch._dynamo"])
KILLS, SWEEP_KILLS = 10, 10                                  # at least, of one training, and of a sweep of trainings


def wait_for(child, *texts):
    """Read on until a line has each of these texts, in this order; a child that ends before fails."""
    for text in texts:
        assert any(text in line for line in iter(child.stdout.readline, "")), f"it ended without a word of {text!r}"


def state(run):
    """All that training is to end with, the times in the log left out."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return torch.load(run / "ckpt.pt", weights_only=True), [
        {k: r.get(k) for k in ("step", "loss", "grad_norm", "lr", "heldout_loss")} for r in log]


def assert_same(a, b):
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            if k != "out":
                assert_same(a[k], b[k])
    else:
        assert a == b


def work(cfg):
    sys.stdout = open(os.devnull, "w")
    torch.set_num_threads(1)
    train.train(cfg)


def test_killed_at_any_moment_and_started_again_it_ends_the_same(data, tmp_path):  # noqa: F811
    """SIGKILL at random moments. A checkpoint is written at every third step, which is most of what the time goes to,
    so that writes are killed too."""
    cfg = config(data, tmp_path / "whole", steps=150, log_every=4, save_every=3, grid=False)
    child = SERVER.Process(target=work, args=(cfg,))
    child.start()
    child.join()
    assert child.exitcode == 0
    kills, rng = 0, random.Random(0)
    cfg = dataclasses.replace(cfg, out=str(tmp_path / "killed"))
    while True:
        child = SERVER.Process(target=work, args=(cfg,))
        child.start()
        child.join(rng.uniform(0.05, 0.6) if kills < KILLS + 2 else None)
        if child.exitcode is not None:
            assert child.exitcode == 0
            break
        child.kill()
        child.join()
        kills += 1
    assert kills >= KILLS, "it was too quick to be killed so often"
    for a, b in zip(state(tmp_path / "whole"), state(tmp_path / "killed"), strict=True):
        assert_same(a, b)


def sweep(out):
    """exp_scaling.py's Figure 3, at a tiny size, two networks at once, in workers that are forked: they need not import
    torch again."""
    fork = multiprocessing.get_context("fork")
    sys.stdout, multiprocessing.get_context = open(os.devnull, "w"), lambda how: fork
    torch.set_num_threads(1)
    cfg = sample.parse(exp_scaling.PRESETS["laptop"], "", [*TINY, "--only=fig3", "--workers=2", f"--out={out}"])
    exp_scaling.measure(cfg)


def written(out):
    return [p for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]


def workers(pid):
    try:
        return [int(p) for f in Path(f"/proc/{pid}/task").glob("*/children") for p in f.read_text().split()]
    except FileNotFoundError:                                # a thread, or all of it, has just ended
        return []


def wait_for_the_end_of(processes):
    late = time.time() + 30
    for p in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):         # Z: ended, but not yet waited for
            while Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.time() < late, "a worker outlives the process that started it"
                time.sleep(0.05)


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="workers are found there")
def test_a_sweep_killed_at_any_moment_and_started_again_ends_the_same(tmp_path):
    """SIGKILL to the process that was started, at random moments from the first file to the last: the networks that it
    trains in others end with it, and what they have finished is not done again."""
    whole, killed, rng, kills = tmp_path / "whole", tmp_path / "killed", random.Random(0), 1
    argv = [sys.executable, ROOT / "exp_scaling.py", *TINY, "--only=fig3", "--workers=2", f"--out={killed}"]
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)         # as a user starts it:
    while len(started := workers(child.pid)) < 3:            # Python's tracker of resources, and two that are spawned
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    child.kill()
    child.wait()
    wait_for_the_end_of(started)

    def start(out):
        child = SERVER.Process(target=sweep, args=(out,))
        child.start()
        return child
    (child := start(whole)).join()
    assert child.exitcode == 0
    for after in sorted(rng.sample(range(len(written(whole)) - 1), SWEEP_KILLS)):
        child = start(killed)
        while len(written(killed)) < after and child.is_alive():
            time.sleep(0.002)
        child.join(rng.uniform(0, 0.2))
        started = workers(child.pid)
        child.kill()
        child.join()
        wait_for_the_end_of(started)                         # or two would write the same files
        kills += child.exitcode == -signal.SIGKILL
    (child := start(killed)).join()
    assert child.exitcode == 0 and kills >= SWEEP_KILLS, "it was too quick to be killed so often"
    names = [sorted(p.relative_to(out) for what in ("ema_*.pt", "measured_*.npz") for p in out.rglob(what))
             for out in (whole, killed)]
    assert names[0] == names[1] and len(names[0]) == 26      # 12 checkpoints, each measured, and two true densities
    for name in names[0]:
        if name.suffix == ".pt":
            assert_same(*(torch.load(out / name, weights_only=True)["ema"] for out in (whole, killed)))
            continue
        with np.load(whole / name) as a, np.load(killed / name) as b:
            assert set(a) == set(b) and all(np.array_equal(a[k], b[k]) for k in a if k != "seconds")
    one, two = (untimed(json.loads((out / "results.json").read_text())) for out in (whole, killed))
    assert one["config"].pop("out") != two["config"].pop("out") and one == two


def test_a_worker_that_dies_is_told_in_one_line():
    """As when the system kills one for lack of memory."""
    with pytest.raises(OSError, match="a worker was killed: .* --workers. The same command goes on"):
        train.run_jobs(os._exit, [9, 9], 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(data, tmp_path, number):  # noqa: F811
    argv = [sys.executable, ROOT / "train.py", "--data", data, "--model=SiT-nano/4", "--steps=10000000", "--batch=12",
            "--log-every=2", "--save-every=1000000", "--warmup=0", "--no-grid", "--device=cpu", "--out", tmp_path / "a"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(child, "training:", "step 2")
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 1 and err.strip().splitlines()[-1].startswith("interrupted: saved at step"), err
    done = torch.load(tmp_path / "a" / "ckpt.pt", weights_only=True)["step"]
    whole = train.train(config(data, tmp_path / "whole", steps=done + 3, grid=False))
    again = train.train(config(data, tmp_path / "a", steps=done + 3, grid=False))
    assert torch.equal(weights(whole, "model"), weights(again, "model")) and f"step {done}" in err


def test_a_damaged_checkpoint_falls_back_to_the_one_before(data, tmp_path, capsys):  # noqa: F811
    whole = train.train(config(data, tmp_path / "whole", steps=9))
    good = (train.train(config(data, tmp_path / "a")) / "ckpt.pt").read_bytes()
    at = len(good) // 2
    for k, bad in enumerate((good[:at], good[:at] + bytes([good[at] ^ 1]) + good[at + 1:], b"")):
        run = train.train(config(data, tmp_path / str(k)))
        (run / "ckpt.pt").write_bytes(bad)
        capsys.readouterr()
        train.train(config(data, run, steps=9))
        assert "going back" in capsys.readouterr().out and torch.equal(weights(whole), weights(run))
    (run / "ckpt.pt").unlink()                               # killed between the two renames
    train.train(config(data, run, steps=9))
    assert torch.equal(weights(whole), weights(run))
    for name in ("ckpt.pt", "ckpt.before.pt"):
        (run / name).write_bytes(good[:at])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        train.train(config(data, run, steps=9))
    assert (run / "ckpt.pt").read_bytes() == good[:at]       # what may yet be rescued is not written over


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path):  # noqa: F811
    """The limit on the size of files stands for a full disk."""
    run = train.train(config(data, tmp_path / "a", steps=3, grid=False))
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(config(data, run)).items()
            if not isinstance(v, (bool, tuple))]
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.argv = sys.argv[1:];"
            "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')")
    before = (run / "ckpt.pt").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, ROOT / "train.py", *argv], capture_output=True, text=True,
                          timeout=100)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert (run / "ckpt.pt").read_bytes() == before and not [p for p in run.iterdir() if "tmp" in p.name]
    whole = train.train(config(data, tmp_path / "whole"))
    assert torch.equal(weights(whole), weights(train.train(config(data, run))))


def test_one_process_that_dies_takes_the_others_along(data, tmp_path):  # noqa: F811
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(config(data, tmp_path / "a", steps=10**7)
                                                                        ).items() if not isinstance(v, (bool, tuple))]
    child = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                              ROOT / "train.py", *argv, "--no-grid", "--save-every=1000"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    wait_for(child, "2 processes", "step 2")
    ranks = [int(p) for p in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()] \
        if Path("/proc").exists() else pytest.skip("it finds the processes under /proc")
    started = time.time()
    os.kill(ranks[1], signal.SIGKILL)
    out, err = child.communicate(timeout=60)
    assert child.returncode != 0 and time.time() - started < 30
    assert "rank" in err and "Signal 9 (SIGKILL)" in err, err[-2000:]
    assert not any(Path(f"/proc/{p}").exists() for p in ranks)


def test_averages_are_the_same_on_every_process(data, tmp_path):  # noqa: F811
    """Each process averages its own copy of the weights; were one to drift, only that of rank 0 would be seen."""
    code = f"""
import sys, torch, torch.distributed as dist; sys.path.insert(0, {str(ROOT)!r})
import train
average, made = [], train.Update.__init__
def keep(self, *args): made(self, *args); average.append(self.average)
train.Update.__init__ = keep
train.train(train.Config(data={data!r}, model="SiT-nano/4", steps=5, batch=12, log_every=5, save_every=5, device="cpu",
                         out={str(tmp_path / 'a')!r}))
mine = torch.cat([p.flatten() for p in average[0].parameters()])
torch.save(mine, {str(tmp_path)!r} + f"/{{dist.get_rank()}}.pt")         # through files: a process that leaves right
dist.destroy_process_group()                                             # after a collective can abort its peers
"""
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=3", "--standalone",
                           tmp_path / "script.py"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *others = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3))
    assert len(first) > 1000 and first.isfinite().all() and all(torch.equal(first, other) for other in others)
