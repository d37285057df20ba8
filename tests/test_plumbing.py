"""Plumbing: data sets, files, intervals, verdicts, results.json, sweeps, the command line."""
import dataclasses
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from plumbing import cli, files, results, runs
from plumbing import data as sets

ROOT = Path(__file__).resolve().parents[1]


def test_intervals():
    rng = np.random.default_rng(0)
    # of 200 samples of N(0, 1), 95% intervals hold the truth about 190 times
    for interval in (functools.partial(results.bootstrap_interval, statistic=np.mean, n=100), results.student_interval):
        held = sum(low <= 0 <= high for low, high in (interval(rng.standard_normal(40)) for _ in range(200)))
        assert 175 <= held <= 199
    values = rng.standard_normal((60, 3))
    of_column = results.bootstrap_interval(values, lambda v: v[:, 1].mean())
    assert of_column == results.bootstrap_interval(values[:, 1], np.mean)
    assert results.bootstrap_interval(np.ones(5)) == (1.0, 1.0)


def test_the_interval_over_pairs_is_the_jackknifes():
    v = np.random.default_rng(0).standard_normal(5)
    pairs = (v - v[:, None])**2
    rows = pairs.sum(1) / 4
    without = [np.delete(np.delete(pairs, s, 0), s, 1).sum() / 12 for s in range(5)]
    values = 5 * rows.mean() - 4 * np.array(without)
    assert np.allclose(results.pair_interval(rows), results.student_interval(values))


def test_the_interval_over_seeds_covers_that_of_each():
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal(50), 3 + rng.standard_normal(50)]
    mean, (low, high) = results.over_seeds(samples, np.mean)
    assert abs(mean - (samples[0].mean() + samples[1].mean()) / 2) < 1e-12
    for sample in samples:
        a, b = results.bootstrap_interval(sample, np.mean)
        assert low <= a < b <= high
    # of 50 that are all true, 1.92 may still be false by Wilson's interval, and no bootstrap would say so
    mean, (low, high) = results.over_seeds([np.ones(50, dtype=bool)], np.mean)
    assert mean == high == 1 and abs(low - 50 / (50 + 1.96**2)) < 1e-4


@pytest.mark.parametrize("ours, ci95, options, verdict", [
    (1.0, (0.5, 1.5), dict(low=0), "reproduces"),
    (-1.0, (-1.5, -0.5), dict(low=0), "differs"),
    (0.1, (-0.5, 0.7), dict(low=0), "not resolved"),
    (1.0, (0.9, 1.1), dict(low=0.8, high=1.2), "reproduces"),
    (1.0, (0.5, 1.5), dict(low=0, gate=(False, "the gate")), "other regime"),
    (1.0, (0.5, 1.5), dict(low=0, gate=(True, "the gate")), "reproduces")])
def test_verdicts(ours, ci95, options, verdict):
    row = results.claim("id", "text", "paper", ours, ci95, **options)
    assert row["verdict"] == verdict and row["id"] == "id"
    if verdict == "not resolved":
        assert "0.6" in row["note"]                          # half of the interval could have been seen
    if verdict == "other regime":
        assert row["note"] == "the gate"


@dataclasses.dataclass
class Config:
    preset: str = "laptop"
    seed: int = 0
    device: str = "cpu"
    redraw: bool = False
    out: str = ""


def measure(cfg):
    row = results.claim("a", "text", "> 0", 1 / 3, (0.1, 0.5), low=0)
    return [row], dict(curve=np.linspace(0, 1, 4), points=torch.ones(2), n=np.int64(3))


def plot(found, folder):
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    ax.plot(found["arrays"]["curve"])
    results.save_figure(fig, folder / "fig1.png")


def test_results_are_written_and_drawn_from_the_file_alone(tmp_path, capsys):
    cfg = Config(out=str(tmp_path / "out"))
    results.run_experiment("exp_x", cfg, measure, plot)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["claims"][0]["ours"] == 1 / 3 and found["arrays"]["curve"] == [0.0, 0.3333, 0.6667, 1.0]
    assert found["script"] == "exp_x" and found["config"]["seed"] == 0 and found["seconds"] >= 0
    assert "reproduces" in capsys.readouterr().out
    (tmp_path / "out" / "fig1.png").unlink()
    results.run_experiment("exp_x", dataclasses.replace(cfg, redraw=True), None, plot)
    assert (tmp_path / "out" / "fig1.png").exists()


def square(folder, job):
    def compute():
        with open(Path(folder) / "calls", "a") as f:
            f.write("x")
        return dict(square=np.array([job**2]), threads=torch.get_num_threads())
    return runs.cached(folder, dict(job=job), compute)


def die(job):
    os._exit(3)


def test_sweeps_compute_each_job_once(tmp_path):
    for workers in (2, 1):
        found = runs.run_jobs(functools.partial(square, str(tmp_path)), [1, 2, 3], workers)
        assert {job: int(r["square"]) for job, r in found.items()} == {1: 1, 2: 4, 3: 9}
        assert {int(r["threads"]) for r in found.values()} == {1}
    assert (tmp_path / "calls").read_text() == "xxx"
    square(str(tmp_path), 4)
    assert (tmp_path / "calls").read_text() == "xxxx"


def sweep_in_process(rank, folder):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(runs.run_jobs(functools.partial(square, folder), [1, 2, 3], 2), f"{folder}/found{rank}")


def test_processes_share_a_sweep_and_each_gets_all_results(tmp_path):
    torch.multiprocessing.start_processes(sweep_in_process, (str(tmp_path),), 2, start_method="fork")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}")
        assert [(job, int(r["square"])) for job, r in found.items()] == [(1, 1), (2, 4), (3, 9)]
    assert (tmp_path / "calls").read_text() == "xxx"


def test_a_worker_that_dies_ends_the_sweep():
    with pytest.raises(BrokenProcessPool):
        runs.run_jobs(die, [1, 2], 2)


def beat(folder, job):
    for _ in range(600):
        (Path(folder) / str(job)).write_text(str(time.time()))
        time.sleep(0.1)


def test_workers_end_with_a_killed_parent(tmp_path):
    """If they lived on, they would hold the locks of their runs against the next command."""
    job = functools.partial(beat, str(tmp_path))
    parent = multiprocessing.get_context("spawn").Process(target=runs.run_jobs, args=(job, [1, 2], 2))
    parent.start()
    while len(list(tmp_path.iterdir())) < 2 and parent.is_alive():
        time.sleep(0.1)
    parent.kill()
    parent.join()
    time.sleep(1)
    beats = [path.read_text() for path in sorted(tmp_path.iterdir())]
    time.sleep(1)
    assert len(beats) == 2 and beats == [path.read_text() for path in sorted(tmp_path.iterdir())]


def write_set(folder, **changes):
    y = np.arange(12) % 3
    arrays = dict(x=np.linspace(-1, 1, 12 * 16).reshape(12, 1, 4, 4).astype(np.float32), y=y) | changes
    meta = arrays.pop("meta", dict(num_classes=3))
    sets.save_dataset(folder, arrays, meta)
    return str(folder)


X = np.zeros((12, 1, 4, 4), np.float32)


def test_pixels_without_negative_values_are_named(tmp_path, capsys):
    sets.load_data(write_set(tmp_path / "unit", x=np.linspace(0, 1, 192, dtype=np.float32).reshape(X.shape)))
    assert "values from 0 to 1" in capsys.readouterr().err
    sets.load_data(write_set(tmp_path / "fine"))
    assert capsys.readouterr().err == ""


def test_the_fingerprint_tells_data_of_one_name_apart(tmp_path):
    one = sets.load_data(write_set(tmp_path / "a"))["fingerprint"]
    assert sets.load_data(write_set(tmp_path / "b"))["fingerprint"] == one
    assert sets.load_data(write_set(tmp_path / "c", x=X))["fingerprint"] != one
    assert sets.load_data(write_set(tmp_path / "d", y=np.arange(12) % 2))["fingerprint"] != one
    made = dict(num_classes=3, networks=["of features"])
    assert sets.load_data(write_set(tmp_path / "e", meta=made))["fingerprint"] != one


def test_embedded_sets(monkeypatch, tmp_path):
    monkeypatch.setattr(sets, "DATA", tmp_path)
    for name, shape, n, held in (("mnist5k", (1, 28, 28), 4500, 500), ("digits", (1, 8, 8), 1617, 180),
                                 ("photos", (3, 32, 32), 1755, 195)):
        data = sets.load_data(name)
        assert data["x"].shape == (n, *shape) and data["x_heldout"].shape == (held, *shape)
        assert data["x"].min() == -1 and data["x"].max() == 1
        both = np.concatenate([data["x"], data["x_heldout"]]).reshape(n + held, -1)
        assert len(np.unique(both, axis=0)) >= 0.99 * len(both)
    # a folder in the working directory is taken only where it is named as a path
    write_set(tmp_path / "elsewhere" / "digits")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert [len(sets.load_data(name)["x"]) for name in ("digits", "./digits", "digits/")] == [1617, 12, 12]


def test_a_data_set_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, save = tmp_path / "d", np.save
    sets.save_dataset(folder, dict(y=np.arange(5)), {})

    def fails_at_the_second(path, array, **options):
        if path.stem == "y":
            raise OSError("no space left")
        save(path, array, **options)
    replace = os.replace

    def fails_at_the_last(source, target):
        if Path(source).name == "new":
            raise OSError("no space left")
        replace(source, target)
    for module, name, fails in ((np, "save", fails_at_the_second), (os, "replace", fails_at_the_last)):
        (tmp_path / ".d.new").mkdir()
        folder.rename(tmp_path / ".d.new" / "old")           # as a kill leaves it
        with monkeypatch.context() as m:
            m.setattr(module, name, fails)
            with pytest.raises(OSError, match="no space left"):
                sets.save_dataset(folder, dict(x=np.ones(5), y=np.arange(5) + 1), {})
        assert np.load(folder / "y.npy").tolist() == [0, 1, 2, 3, 4] and os.listdir(tmp_path) == ["d"]
    sets.save_dataset(folder, dict(x=np.ones(5)), {})
    assert sorted(os.listdir(folder)) == ["meta.json", "x.npy"] and os.listdir(tmp_path) == ["d"]


def test_labels_in_turn_are_those_that_have_images(tmp_path):
    data = sets.load_data(write_set(tmp_path / "set", y=np.array([0, 5] * 6), meta=dict(num_classes=9)))
    assert sets.labels_in_turn(data, 5).tolist() == [0, 5, 0, 5, 0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(OSError, match="no space"):
        with files.write_whole(path) as f:
            f.write(b"half")
            raise OSError("no space")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["a"]


def run(*argv, **env):
    return subprocess.run([sys.executable, ROOT / "train.py", *argv], capture_output=True, text=True,
                          env=os.environ | env)


def test_the_command_line(tmp_path, monkeypatch, capsys):
    done = run("--help")
    assert done.returncode == 0 and "training iterations" in done.stdout
    for argv, message in ((["--stepz", "3"], "--stepz"), (["--preset", "huge"], "huge"),
                          (["--steps", "many"], "many"), (["--data", "nowhere"], "error: no data set at")):
        monkeypatch.setattr(sys, "argv", ["train.py", *argv, "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as stop:
            cli.run_command(train.train, train.PRESETS, train.__doc__)
        assert stop.value.code and message in f"{stop.value.code} {capsys.readouterr().err}"
    done = run("--data", "nowhere", PYTHONDEVMODE="1")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_notebooks_backend_does_not_stop_a_script(tmp_path):
    done = run("--data", "digits", "--model", "SiT-pico/4", "--steps", "2", "--device", "cpu", "--out",
               str(tmp_path / "r"), MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr


def test_flops_against_a_count_by_hand():
    """A linear map of n tokens from a to b takes 2 n a b, forward; backward takes twice that."""
    class Net(torch.nn.Module):
        in_channels, input_size = 1, 4

        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(16, 5)

        def forward(self, z, t, y):
            return self.map(z.flatten(1).requires_grad_())
    assert cli.count_flops(Net, 3) == 3 * (2 * 3 * 16 * 5)
