"""Sampling against ODEs that can be solved by hand, and the command that writes a picture."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from empirical_score import EmpiricalScore
from model import build_model
from sample import load_run, noise, sample, save_grid, to_uint8, velocity

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


@pytest.mark.parametrize("argv, message", [
    (["--run", "nowhere"], "no checkpoint at nowhere"),
    (["--run", "{run}", "--label", 10], "label 10 is none of this model's"),
    (["--run", "{run}", "--n", 0], "at least 1"),
    (["--run", "{run}", "--device", "tpu"], "device 'tpu' is not available"),
    (["--run", "{run}/junk.pt"], "is not a checkpoint of this project"),
])
def test_bad_input_is_one_line(run, argv, message):
    (run / "junk.pt").write_bytes(b"junk")
    done = command(*[str(a).replace("{run}", str(run)) for a in argv])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_wrong_flag_exits_with_1():
    assert command("--runn", "x").returncode == 1
