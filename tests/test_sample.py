"""Sampling against ODEs that can be solved by hand; official weights; the commands that write a picture or an .npz,
on any number of processes and through kills; the Frechet distance."""
import argparse
import json
import math
import os
import resource
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_model import official_state

import sample as script
from empirical_score import EmpiricalScore
from model import build_model, load_sit_checkpoint
from sample import Config, load_run, main, noise, sample, save_grid, to_uint8, velocity

ROOT = Path(__file__).resolve().parents[1]


class Given(torch.nn.Module):
    """A "model" whose output is a function given by the test."""
    def __init__(self, f, prediction="v"):
        super().__init__()
        self.f, self.prediction, self.num_classes = f, prediction, 10

    def forward(self, z, t, y=None):
        return self.f(z, torch.as_tensor(t), y)


def gaussian_velocity(z, t, y=None):
    """Data N(0, 1): p_t = N(0, (1-t)^2 + t^2), and E[eps - x | z] = (2t - 1) z / ((1-t)^2 + t^2)."""
    return (2 * t - 1) / ((1 - t)**2 + t**2) * z


@pytest.mark.parametrize("solver, tolerance", [("dopri5", 2e-5), ("heun", 2e-3), ("euler", 3e-2)])
def test_gaussian_data_in_closed_form(solver, tolerance):
    """The flow of a Gaussian scales z by the standard deviation of p_t, at every time of the grid, from any start."""
    std = lambda t: math.sqrt((1 - t)**2 + t**2)
    z = torch.randn(7, 1, 4, 4)
    for grid in ([1.0, 0.0], [1.0, 0.83, 0.5, 0.31, 0.0], [0.6, 0.2, 0.0], [0.9, 0.55]):
        path = sample(Given(gaussian_velocity), z, None, t_grid=grid, solver=solver, steps=100, rtol=1e-6)
        assert path.shape == (len(grid), *z.shape) and torch.equal(path[0], z)
        for t, at in zip(grid, path, strict=True):
            assert (at - z * std(t) / std(grid[0])).abs().max() < tolerance * z.abs().max()
    assert (sample(Given(gaussian_velocity), z, None)[-1] - z).abs().max() < 0.02 * z.abs().max()   # rtol 1e-3, as used


def test_one_point_is_reached_with_v_and_x_prediction():
    """Data of one point x: v = (z - x)/t, and every path is the straight line to x."""
    x, z = torch.randn(1, 1, 4, 4), torch.randn(5, 1, 4, 4)
    E = EmpiricalScore(x)
    v = sample(Given(lambda z, t, y: E.velocity(z, t)), z, None, t_grid=[1.0, 0.5, 1e-4])
    for solver in ("dopri5", "heun", "euler"):
        path = sample(Given(lambda z, t, y: x.expand_as(z), "x"), z, None, t_grid=[1.0, 0.5, 0.0], solver=solver)
        assert (path[1] - (z + x) / 2).abs().max() < 1e-4 and (path[2] - x).abs().max() < 1e-4
        assert (v[1] - path[1]).abs().max() < 1e-4 and (v[2] - x).abs().max() < 2e-3
    with pytest.raises(ValueError, match="one time below"):
        sample(Given(lambda z, t, y: x.expand_as(z), "x"), z, None, t_grid=[1.0, 5e-4, 0.0])


def test_no_solver_leaves_the_interval():
    """dopri5 as it comes steps past t = 0, where the model was never trained, and interpolates back."""
    for grid in ([1.0, 0.0], [0.7, 0.4, 0.05]):
        for solver in ("dopri5", "heun", "euler"):
            times = []

            def f(z, t, y, times=times):
                times.append(float(t))
                return gaussian_velocity(z, t)
            sample(Given(f), torch.randn(3, 1, 4, 4), None, t_grid=grid, solver=solver)
            assert min(times) >= grid[-1] - 1e-7 and max(times) <= grid[0] + 1e-7


def test_orders_of_convergence():
    """Halving the step divides Euler's error by 2 and Heun's by 4."""
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    def error(solver, steps):
        f = Given(lambda z, t, y: torch.sin(3 * t) * z)
        exact = z * math.exp(-(1 - math.cos(3)) / 3)
        return (sample(f, z, None, solver=solver, steps=steps)[-1] - exact).abs().max().item()
    assert 1.8 < error("euler", 20) / error("euler", 40) < 2.2
    assert 3.6 < error("heun", 20) / error("heun", 40) < 4.4


def test_fixed_steps_are_as_many_as_asked_for():
    for n in (10, 99, 100):
        stats = {}
        sample(Given(gaussian_velocity), torch.randn(1, 1, 4, 4), None, t_grid=torch.linspace(1, 0.01, n),
               solver="euler", steps=n - 1, stats=stats)
        assert stats["nfe"] == n - 1


def test_guidance_on_all_channels_and_number_of_evaluations():
    seen = []

    def f(z, t, y):
        seen.append(len(z))
        return torch.ones_like(z) * (2.0 + (y != 10).view(-1, 1, 1, 1))    # 3 with a label, 2 with the null label
    z, y = torch.zeros(4, 3, 2, 2), torch.arange(4)
    assert torch.allclose(velocity(Given(f), z, 0.5, y, w=4.0), torch.full_like(z, 3 + 3 * (3 - 2)))
    for w, batch in ((1.0, 4), (4.0, 8)):
        seen.clear()
        stats = {}
        out = sample(Given(f), z, y, w=w, solver="heun", steps=5, stats=stats)[-1]
        assert torch.allclose(out, torch.full_like(z, -(3 + (w - 1))), atol=1e-5)
        assert stats["nfe"] == sum(seen) // 4 and set(seen) == {batch} and stats["solver"] == "heun"


def test_x_prediction_gives_the_velocity():
    z, x = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    assert torch.allclose(velocity(Given(lambda *a: x, "x"), z, 0.25, None), (z - x) / 0.25)


def test_noise_belongs_to_the_image_not_to_the_batch():
    whole = noise(range(6), (1, 4, 4), seed=3)
    assert torch.equal(whole[2:4], noise([2, 3], (1, 4, 4), seed=3))
    assert not torch.equal(whole, noise(range(6), (1, 4, 4), seed=4))
    assert abs(noise(range(500), (100,)).std() - 1) < 0.02
    assert len(noise(range(500), (1,)).unique()) == 500


def test_errors():
    z = torch.zeros(1, 1, 4, 4)
    for grid in ([0.0, 1.0], [1.0], [1.2, 0.0], [0.5, 0.5], [0.5, -0.1]):
        with pytest.raises(ValueError, match="descend"):
            sample(Given(gaussian_velocity), z, None, t_grid=grid)
    with pytest.raises(ValueError, match="unknown solver 'rk4'"):
        sample(Given(gaussian_velocity), z, None, solver="rk4")


def test_pixels(tmp_path):
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 9.0]).view(1, 1, 2, 2)).flatten().tolist() == [0, 128, 255, 255]
    save_grid(torch.zeros(5, 4, 8, 8), tmp_path / "grid.png", columns=3)    # latents: the first three channels
    import matplotlib.image
    assert matplotlib.image.imread(tmp_path / "grid.png").shape[:2] == (2 * 8 * 8, 3 * 8 * 8)


@pytest.fixture
def run(tmp_path):
    args = dict(name="SiT-nano/4", input_size=8, in_channels=1, num_classes=10, prediction="v")
    torch.manual_seed(0)
    raw, ema = build_model(**args), build_model(**args)
    torch.nn.init.normal_(ema.final_layer.linear.weight, std=0.1)
    torch.save(dict(model=raw.state_dict(), ema=ema.state_dict(), model_args=args, step=7), tmp_path / "ckpt.pt")
    return tmp_path


def test_load_run_takes_the_average_by_default(run):
    z, t, y = torch.randn(2, 1, 8, 8), 0.5, torch.tensor([1, 2])
    model, ckpt = load_run(run)
    assert model(z, t, y).abs().max() > 0 and ckpt["step"] == 7 and not model.training
    assert load_run(run, ema=False)[0](z, t, y).abs().max() == 0


def command(*argv):
    return subprocess.run([sys.executable, ROOT / "sample.py", *map(str, argv)], capture_output=True, text=True)


def test_command_writes_a_grid(run):
    done = command("--run", run, "--n", 4, "--batch", 3, "--solver", "heun", "--steps", 2)
    assert done.returncode == 0, done.stderr
    picture = run / "samples_w1_heun_seed0.png"
    assert picture.exists() and str(picture) in done.stdout and "4 function evaluations" in done.stdout
    before = picture.read_bytes()                            # of other weights, and one class: under another name
    done = command("--run", run, "--n", 2, "--solver", "heun", "--steps", 2, "--label", 1, "--no-ema")
    assert done.returncode == 0 and picture.read_bytes() == before
    assert picture.with_stem("samples_w1_heun_seed0_label1_raw").exists()


@pytest.mark.parametrize("argv, message", [
    (["--run", "nowhere"], "no checkpoint at nowhere"),
    (["--run", "{run}", "--label", 10], "label 10 is none of this model's"),
    (["--run", "{run}", "--n", 0], "seed at least 0, not 0, 64, 50 and 0"),
    (["--run", "{run}", "--label", 1, "--labels", "random"], "goes without --labels random"),
    (["--run", "{run}", "--out", "x.jpg"], "x.jpg must end in .png or .npz"),
    (["--run", "{run}", "--device", "tpu"], "device 'tpu' is not available"),
    (["--run", "{run}/junk.pt"], "is not a checkpoint of this project"),
    (["--run", "{run}", "--fid", "reference.npz"], "give --out NAME.npz"),
])
def test_bad_input_is_one_line(run, argv, message):
    (run / "junk.pt").write_bytes(b"junk")
    done = command(*[str(a).replace("{run}", str(run)) for a in argv])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_flag_exits_with_1():
    assert command("--runn", "x").returncode == 1


# ---- official weights ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("kind", ["bare", "training", "safetensors"])
def test_official_weights(kind, learn_sigma, tmp_path):
    """Whatever they are wrapped in, they come out as load_sit_checkpoint makes them (which test_model.py checks)."""
    state = {k: v.float() for k, v in official_state(learn_sigma=learn_sigma).items()}
    raw = {k: v + 0.1 for k, v in state.items()}
    path = tmp_path / f"sit.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state if kind == "bare" else {"model": raw, "ema": state, "opt": {"state": {}, "param_groups": []},
                                                 "args": argparse.Namespace(lr=1e-4)}, path)
    z, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([0, 3, 10])
    model, rest = load_run(path)
    want = load_sit_checkpoint(state)(z, t, y)
    assert torch.equal(model(z, t, y), want) and want.std() > 0.1
    assert rest == {} and not model.training and model.prediction == "v"
    want = load_sit_checkpoint(raw if kind == "training" else state)(z, t, y)
    assert torch.equal(load_run(path, ema=False)[0](z, t, y), want)


class Code:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


@pytest.mark.parametrize("content, message", [
    (b"", "no zip archive"), (b"junk", "cannot be read as a checkpoint"), ("half", "cannot be read as a checkpoint"),
    (Code(), "holds more than tensors and plain values"), ([1], "it holds a list"),
    ({"weight": torch.zeros(3)}, "not a SiT"), ({"ema": 3}, "'x_embedder.proj.weight' is missing"),
    (lambda s: {k: v for k, v in s.items() if k != "blocks.1.mlp.fc1.bias"}, "'blocks.1.mlp.fc1.bias' is missing"),
    (lambda s: s | {"blocks.0.attn.proj.weight": torch.zeros(32, 31)}, "has shape (32, 31), expected (32, 32)"),
    (lambda s: s | {"pos_embed": 7}, "'pos_embed' is missing"),
    (lambda s: {"ema": s, "config": {}}, "'model_args' is missing"),       # ours, whose weights have the same names
])
def test_a_file_that_is_neither(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, path = {k: v.float() for k, v in official_state().items()}, tmp_path / "weights.pt"
    torch.save(state if content == "half" else content(state) if callable(content) else content, path)
    if content == "half":
        path.write_bytes(path.read_bytes()[:40_000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(ValueError) as e:
        load_run(path)
    text = str(e.value)
    assert text.startswith(f"{path} is not a checkpoint of this project, nor official SiT weights")
    assert message in text and text.count("weights.pt") == 1 and "\n" not in text and "weights_only" not in text
    assert not (tmp_path / "was_run").exists()


def test_safetensors_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"junk")
    with pytest.raises(ImportError, match="pip install safetensors"):
        load_run(tmp_path / "a.safetensors")


# ---- many images in one .npz -----------------------------------------------------------------------------------------

def test_labels():
    assert script.pick_labels(23, 10).tolist() == [i % 10 for i in range(23)]
    drawn = script.pick_labels(2000, 10, "random", seed=3)
    assert torch.equal(drawn[:50], script.pick_labels(50, 10, "random", seed=3))
    assert not torch.equal(drawn, script.pick_labels(2000, 10, "random", seed=4))
    assert (drawn.bincount(minlength=10) - 200).abs().max() < 5 * math.sqrt(2000 * 0.1 * 0.9)


def export(run, out, **changes):
    main(Config(**dict(run=str(run), n=11, batch=3, solver="heun", steps=2, device="cpu", out=str(out)) | changes))


def test_npz(run, tmp_path, capsys):
    """What ADM's evaluator reads, from the same images as `sample` gives; a second call finds it done."""
    out = tmp_path / "a.npz"
    export(run, out, w=2.0)
    with zipfile.ZipFile(out) as z, z.open("arr_0.npy") as f:            # as its streaming reader goes about it
        assert np.lib.format.read_magic(f) == (1, 0)
        assert np.lib.format.read_array_header_1_0(f) == ((11, 8, 8, 3), False, np.dtype("u1"))
    images = np.load(out)["arr_0"]
    y, model = torch.arange(11) % 10, load_run(run)[0]
    want = torch.cat([sample(model, noise(i, (1, 8, 8)), y[i], w=2.0, solver="heun", steps=2)[-1]
                      for i in torch.arange(11).split(3)])
    assert np.array_equal(images, to_uint8(want).expand(-1, -1, -1, 3).numpy()) and images.std() > 1
    assert np.array_equal(np.load(out)["labels"], y) and not list(tmp_path.glob("*.parts"))
    before = out.stat().st_mtime_ns
    export(run, out, w=2.0)
    assert out.stat().st_mtime_ns == before and str(out) in capsys.readouterr().out


@pytest.fixture
def rough(run):
    """A network so rough that dopri5's steps, and with them the pixels, depend on which images share a batch."""
    ckpt = torch.load(run / "ckpt.pt", weights_only=True)
    g = torch.Generator().manual_seed(0)
    ema = {k: torch.randn(v.shape, generator=g) * 0.08 if v.ndim > 1 and k != "pos_embed" else v
           for k, v in ckpt["ema"].items()}
    torch.save(ckpt | {"ema": ema}, run / "ckpt.pt")
    return run


# Forks are cheap, imports are not: one process that has imported everything becomes each of the ranks in turn.
RANKS = """
import os, socket, sys
import sample
run, folder = sys.argv[1:]
sample.main(sample.Config(run=run, n=20, batch=4, device="cpu", out=f"{folder}/four.npz"))
for world in (1, 2, 3):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = []
    for rank in range(world):
        if not (pid := os.fork()):
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sample.main(sample.Config(run=run, n=20, batch=3, device="cpu", out=f"{folder}/{world}.npz"))
            os._exit(0)
        ranks.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in ranks), world
"""


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_any_number_of_processes_makes_the_same_file(rough, tmp_path, one_thread):
    """With dopri5, whose steps depend on the batch: here one can see that they do."""
    run = rough
    done = subprocess.run([sys.executable, "-c", RANKS, run, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    done = subprocess.run([*torchrun, ROOT / "sample.py", "--run", run, "--n", "20", "--batch", "3", "--device", "cpu",
                           "--out", tmp_path / "torchrun.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one = (tmp_path / "1.npz").read_bytes()
    assert [(tmp_path / f"{k}.npz").read_bytes() == one for k in (2, 3, "torchrun")] == [True] * 3
    three, four = (np.load(tmp_path / f"{k}.npz")["arr_0"] for k in (1, "four"))
    assert not np.array_equal(three, four)


MOMENTS = 15                                                 # at least
# Kills before call number 0, 1, 2 .. of any function that touches the disk, or that draws, until none is left to kill.
KILLS = """
import os, pathlib, shutil, signal, sys
import torch
import sample
folder = pathlib.Path(sys.argv[1])
def draw(i):
    return (i.view(-1, 1, 1, 1) * 7 + torch.arange(12).view(2, 2, 3)).to(torch.uint8)
def write(name):
    sample.write_npz(folder / name, draw, torch.arange(8), (2, 2, 3), 3, dict(seed=1))
def killing(f):
    def g(*args, **kwargs):
        global left
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return f(*args, **kwargs)
    return g
write("whole.npz")
moment, killed = 0, True
while killed:
    if not (pid := os.fork()):
        left, draw = moment, killing(draw)
        os.replace, os.fsync, os.unlink = killing(os.replace), killing(os.fsync), killing(os.unlink)
        shutil.rmtree, shutil.copyfileobj = killing(shutil.rmtree), killing(shutil.copyfileobj)
        pathlib.Path.mkdir = killing(pathlib.Path.mkdir)
        write(f"{moment}.npz")
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    write(f"{moment}.npz")
    moment += 1
print(moment)
"""


def test_killed_at_any_moment_it_goes_on(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLS, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (moments := int(done.stdout)) > MOMENTS
    want = (tmp_path / "whole.npz").read_bytes()
    assert all((tmp_path / f"{k}.npz").read_bytes() == want for k in range(moments))
    assert len(list(tmp_path.iterdir())) == moments + 1      # and nothing else is left behind
    assert np.load(tmp_path / "whole.npz")["arr_0"][5, 0, 0, 1] == 5 * 7 + 1


def fake(path, n=4, size=(16, 16, 3), **made):
    drawn = []
    script.write_npz(path, lambda i: drawn.append(int(i[0])) or torch.ones(len(i), *size, dtype=torch.uint8),
                     torch.arange(n), size, 2, dict(w=1.0) | made)
    return drawn


def test_what_was_drawn_is_not_drawn_again(tmp_path):
    def draw(i):
        if i[0] == 2: raise ValueError("stopped")
        return torch.ones(len(i), 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="stopped"):
        script.write_npz(tmp_path / "a.npz", draw, torch.arange(4), (16, 16, 3), 2, dict(w=1.0))
    assert fake(tmp_path / "a.npz") == [2] and fake(tmp_path / "a.npz") == []


def test_a_full_disk(tmp_path, monkeypatch):
    """Found before anything is drawn, or while it is: what was drawn stays, and the same call goes on from there."""
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    with pytest.raises(OSError, match="4 images need 0.03 GB more in .*: 0.00 are free"):
        fake(tmp_path / "a.npz", size=(1024, 1024, 3))
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:                                                     # a batch fits, all of them together do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError, match="merged could not be written"):
            fake(tmp_path / "b.npz")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError, match="000000 could not be written"):
            fake(tmp_path / "c.npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.npz"))
    assert fake(tmp_path / "b.npz") == [] and fake(tmp_path / "c.npz") == [0, 2]


def test_images_made_otherwise_are_refused(run, tmp_path):
    out = tmp_path / "a.npz"
    export(run, out)
    before = out.read_bytes()
    for changes, message in ((dict(w=2.0), "w = 1.0, not 2.0"), (dict(seed=1), "seed = 0, not 1"),
                             (dict(batch=4), "batch = 3, not 4"), (dict(solver="euler"), "solver = heun, not euler"),
                             (dict(n=12), "n = 11, not 12"), (dict(ema=False), "weights = "),
                             (dict(labels="random"), "labels = balanced, not random")):
        with pytest.raises(ValueError, match=message):
            export(run, out, **changes)
    assert out.read_bytes() == before
    (tmp_path / "b.npz.parts").mkdir()                       # the same of parts
    (tmp_path / "b.npz.parts" / "made.json").write_text(json.dumps(json.loads(str(np.load(out)["made"])) | {"w": 3.0}))
    with pytest.raises(ValueError, match="b.npz.parts holds images of w = 3.0, not 1.0"):
        export(run, tmp_path / "b.npz")
    np.savez(tmp_path / "theirs.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="theirs.npz holds images of n = None"):
        export(run, tmp_path / "theirs.npz")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.npz is not an .npz file"):
        export(run, tmp_path / "junk.npz")
    assert fake(tmp_path / "d.npz") == [0, 2]
    (tmp_path / "e.npz.parts").mkdir()
    (tmp_path / "e.npz.parts" / "000001").write_bytes(b"short")
    with pytest.raises(ValueError, match="expected 3072"):
        fake(tmp_path / "e.npz")


def test_bad_settings(run, tmp_path, monkeypatch):
    for changes, message in ((dict(n=0), "at least 1"), (dict(seed=-1), "seed at least 0")):
        with pytest.raises(ValueError, match=message):
            export(run, tmp_path / "a.npz", **changes)
    ckpt = torch.load(run / "ckpt.pt", weights_only=True)
    torch.save(ckpt | {"ema": {k: v * math.nan for k, v in ckpt["ema"].items()}}, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match="images 0 to 2 are not finite"):
        export(tmp_path / "nan.pt", tmp_path / "nan.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="several processes, are for an .npz"):
        main(Config(run=str(run), device="cpu"))


# ---- latents ---------------------------------------------------------------------------------------------------------

class StandIn(torch.nn.Module):
    """Decodes as an autoencoder does: four channels to three, twice the size."""
    config = types.SimpleNamespace(latent_channels=4, scaling_factor=0.5)

    def decode(self, z):
        return types.SimpleNamespace(sample=z[:, 1:].repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_latents_are_decoded(run, tmp_path, monkeypatch):
    path, out = tmp_path / "sit.pt", tmp_path / "a.npz"
    torch.save({k: v.float() for k, v in official_state().items()}, path)
    with pytest.raises(ValueError, match="latents of 4 channels: give their autoencoder, --vae"):
        export(path, out)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="pip install diffusers"):
        export(path, out, vae="somewhere")
    monkeypatch.setattr(script, "load_vae", lambda path: StandIn())
    with pytest.raises(ValueError, match="decodes latents of 4 channels, .* has 1"):
        export(run, out, vae="somewhere")
    export(path, out, vae="somewhere", n=3)
    z = sample(load_run(path)[0], noise(range(3), (4, 8, 8)), torch.arange(3), solver="heun", steps=2)[-1]
    want = to_uint8(2 * z[:, 1:])                            # divided by the scaling factor, .5
    images = np.load(out)["arr_0"]
    assert images.shape == (3, 16, 16, 3) and 0 < images.mean() < 255
    assert np.array_equal(images[:, ::2, 1::2], want.numpy())


# ---- the Frechet distance --------------------------------------------------------------------------------------------

def test_frechet_in_closed_form():
    """Commuting covariances U diag(a) U^T and U diag(b) U^T: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, singular or not."""
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b = np.array([0, 0, 0.1, 1, 2, 50]), np.array([0, 3, 0.2, 0, 2, 40])
    m1, m2 = rng.standard_normal((2, 6))
    want = np.square(m1 - m2).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert abs(script.frechet(m1, U * a @ U.T, m2, U * b @ U.T) - want) < 1e-6
    A, B = (x @ x.T for x in rng.standard_normal((2, 6, 9)))             # others: tr (AB)^1/2 from its eigenvalues
    want = np.trace(A) + np.trace(B) - 2 * np.sqrt(np.linalg.eigvals(A @ B).real).sum()
    assert abs(script.frechet(m1, A, m1, B) - want) < 1e-9


def test_moments_batch_by_batch():
    x = np.random.default_rng(0).standard_normal((50, 4)) + 1e6          # sums of squares alone would lose all digits
    mean, cov = script.gaussian(np.split(x, [1, 8, 30]))
    assert np.abs(mean - x.mean(0)).max() < 1e-9 and np.abs(cov - np.cov(x.T)).max() < 1e-8
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        script.gaussian([x[:1]])


def features(images):
    """In place of Inception: the mean of each channel, from uint8 (B, H, W, 3)."""
    assert images.dtype == np.uint8 and images.shape[3] == 3
    return images.astype(np.float64).mean((1, 2))


def test_fid(run, tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (70, 5, 5, 3), dtype=np.uint8)     # more than one batch of 64
    (tmp_path / "folder" / "class").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / "class" / f"{i:03d}.png")
    np.savez_compressed(tmp_path / "images.npz", arr_0=images)
    f = features(images)
    np.savez(tmp_path / "adm.npz", mu=f.mean(0), sigma=np.cov(f.T), mu_s=0, sigma_s=0, arr_0=images[:2])
    monkeypatch.setattr(script, "inception", lambda: features)
    printed = []
    for reference in ("folder", "images.npz", "adm.npz"):
        export(run, tmp_path / "a.npz", fid=str(tmp_path / reference))
        printed.append(float(capsys.readouterr().out.split("FID ")[1].split()[0]))
    g = features(np.load(tmp_path / "a.npz")["arr_0"])
    want = script.frechet(g.mean(0), np.cov(g.T), f.mean(0), np.cov(f.T))
    assert want > 1 and np.abs(np.array(printed) - want).max() < 1e-3
    export(run, tmp_path / "a.npz", fid=str(tmp_path / "a.npz"))
    assert "FID 0.0000 to" in capsys.readouterr().out


def test_a_bad_reference_is_found_before_sampling(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match="an FID needs the package torch-fidelity"):
        export(run, tmp_path / "a.npz", fid="reference.npz")
    monkeypatch.setattr(script, "inception", lambda: features)
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"junk")
    (tmp_path / "junk.npz").write_bytes(b"junk")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "none.npz", other=np.zeros(3))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    for reference, message in (("empty", "empty cannot be .* no .png"), ("broken", "a.png cannot be read as images"),
                               ("junk.npz", "junk.npz is not an .npz"), ("float.npz", "arr_0 is float64"),
                               ("none.npz", "none.npz cannot be read"), ("narrow.npz", r"mu \(7,\) and sigma \(7, 7\)"),
                               ("half.npz", "sigma"), ("missing.npz", "No such file")):
        with pytest.raises((ValueError, OSError), match=message):
            export(run, tmp_path / "a.npz", fid=str(tmp_path / reference))
    assert not list(tmp_path.glob("a.npz*"))                 # not a batch was drawn


def test_velocity_is_of_a_few_images_at_once():
    """Whatever their number, each with its label, in order."""
    seen = []

    class Label:                                             # v is the label
        prediction, num_classes = "v", 700

        def __call__(self, z, t, y):
            seen.append(len(z))
            return z * 0 + (torch.full((len(z),), 700) if y is None else y).view(-1, 1, 1, 1)
    z, y = torch.randn(600, 1, 4, 4), torch.arange(600)
    assert (velocity(Label(), z, 0.5, y)[:, 0, 0, 0] == y).all() and seen == [256, 256, 88]
    assert (velocity(Label(), z, 0.5, None) == 700).all()
    guided = velocity(Label(), z, 0.5, y, w=3)             # y + 2 (y - 700)
    assert (guided[:, 0, 0, 0] == 3 * y - 1400).all() and max(seen) == 256
