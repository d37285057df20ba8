"""What holds for every experiment: a tiny run writes what it says, twice the same, drawn from the file alone."""
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NETWORK = ["--network.data=digits", "--network.model=SiT-pico/4", "--network.steps=20", "--network.no-grid"]
VERDICTS = {"reproduces", "not resolved", "other regime", "differs", "finding"}


def shells(folder):
    return [*NETWORK, f"--network.out={folder / 'net'}", "--n=12", "--n-times=6", "--other-sets"]


def cfg_paradox(folder):
    return [*NETWORK, f"--network.out={folder / 'net'}", "--n=12", "--n-times=4"]


def freedom(folder):
    nets = [f"--{net}.{field}" for net in ("sit", "unet") for field in ("steps=2", "batch=8")]
    return [*nets, "--sit.keep=1", "--unet.model=SiT-pico/4", "--per-class=5", "--ratios", "1", "2", "--n-samples=10",
            "--workers=1"]


# the arguments of a tiny run, given a folder for its networks
TINY = dict(exp_shells=shells, exp_cfg_paradox=cfg_paradox, exp_freedom=freedom)
PICTURES = dict(exp_shells={"fig1b.png", "fig4.png", "fig1b_dimensions.png"}, exp_cfg_paradox={"fig2.png"},
                exp_freedom={"fig5.png", "fig5_mechanism.png"})


def run(script, *argv, launcher=(), cwd=ROOT, **env):
    command = [sys.executable, *launcher, Path(cwd) / f"{script}.py", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd,
                          env=os.environ | dict(OMP_NUM_THREADS="1") | env)


def run_script(script, *argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            assert not error.code, error.code


@pytest.fixture(scope="module", params=sorted(TINY))
def tiny(request, tmp_path_factory):
    """The script, its arguments, and the folder of its results."""
    folder = tmp_path_factory.mktemp(request.param)
    argv = [*TINY[request.param](folder), "--device=cpu"]
    done = run(request.param, *argv, f"--out={folder / 'out'}")
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, argv, folder / "out"


def untimed(path):
    found = json.loads(path.read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "commit", "config")}


def test_results_follow_the_contract(tiny):
    script, _, out = tiny
    found = json.loads((out / "results.json").read_text())
    assert found["script"] == script
    ids = [row["id"] for row in found["claims"]]
    assert len(set(ids)) == len(ids) and 0 < sum(row["verdict"] != "finding" for row in found["claims"]) <= 8
    for row in found["claims"]:
        assert row["verdict"] in VERDICTS and row["text"] and len(row["ci95"]) == 2
        assert row["ci95"][0] <= row["ci95"][1]
    assert {p.name for p in out.glob("*.png")} == PICTURES[script]


def test_a_figure_is_drawn_from_its_json_alone(tiny, tmp_path):
    script, argv, out = tiny
    shutil.copy(out / "results.json", tmp_path)
    run_script(f"{script}.py", *argv, "--redraw", f"--out={tmp_path}")
    assert {p.name for p in tmp_path.glob("*.png")} == PICTURES[script]


def test_run_twice_it_is_the_same(tiny, tmp_path):
    script, _, out = tiny
    argv = [*TINY[script](tmp_path), "--device=cpu"]
    done = run(script, *argv, f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert untimed(tmp_path / "out" / "results.json") == untimed(out / "results.json")


def test_two_processes_find_what_one_does(tiny, tmp_path):
    script, argv, out = tiny
    if script == "exp_freedom":
        pytest.skip("it shares a sweep, see test_plumbing.py")
    launcher = "-m torch.distributed.run --nproc_per_node=2 --standalone --".split()
    done = run(script, *argv, f"--out={tmp_path}", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert untimed(tmp_path / "results.json") == untimed(out / "results.json")
