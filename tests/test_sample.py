"""Sampling against ODEs that can be solved by hand; the starting noise; the command."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import build_model
from plumbing import images
from plumbing.files import load_run
from sample import Config, main, noise, predict_x, solve_ode, velocity

SOLVERS = ("dopri5", "heun", "euler")


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


def std(t):
    return math.sqrt((1 - t)**2 + t**2)


@pytest.mark.parametrize("solver, tolerance", [("dopri5", 2e-5), ("heun", 2e-3), ("euler", 3e-2)])
def test_gaussian_data_in_closed_form(solver, tolerance):
    """The flow of a Gaussian scales z by the standard deviation of p_t, at every time of the grid, from any start."""
    z = torch.randn(7, 1, 4, 4)
    for grid in ([1.0, 0.0], [1.0, 0.83, 0.5, 0.31, 0.0], [0.6, 0.2, 0.0], [0.9, 0.55]):
        path = solve_ode(Given(gaussian_velocity), z, None, grid, solver=solver, steps=100, rtol=1e-6)
        assert path.shape == (len(grid), *z.shape) and torch.equal(path[0], z)
        for t, z_t in zip(grid, path, strict=True):
            assert (z_t - z * std(t) / std(grid[0])).abs().max() < tolerance * z.abs().max()
    assert (solve_ode(Given(gaussian_velocity), z, None)[-1] - z).abs().max() < 0.02 * z.abs().max()   # rtol as used


def test_one_point_is_reached_with_v_and_x_prediction():
    """Data of one point x: v = (z - x)/t, and every path is the straight line to x."""
    x, z = torch.randn(1, 1, 4, 4), torch.randn(5, 1, 4, 4)
    by_x = Given(lambda z, t, y: x.expand_as(z), "x")
    v = solve_ode(Given(lambda z, t, y: (z - x) / t), z, None, [1.0, 0.5, 1e-4])
    for solver in SOLVERS:
        path = solve_ode(by_x, z, None, [1.0, 0.5, 0.0], solver=solver)
        assert (path[1] - (z + x) / 2).abs().max() < 1e-4 and (path[2] - x).abs().max() < 1e-4
        assert (v[1] - path[1]).abs().max() < 1e-4 and (v[2] - x).abs().max() < 2e-3
    assert torch.allclose(velocity(by_x, z, 0.25, None), (z - x) / 0.25)
    assert torch.allclose(predict_x(by_x, z, 0.25, None), x.expand_as(z), atol=1e-6)


def test_no_solver_leaves_the_interval():
    """dopri5 as it comes steps past t = 0, where no model was trained, and interpolates back."""
    for grid in ([1.0, 0.0], [0.7, 0.4, 0.05]):
        for solver in SOLVERS:
            times = []

            def f(z, t, y, times=times):
                times.append(float(t))
                return gaussian_velocity(z, t)
            solve_ode(Given(f), torch.randn(3, 1, 4, 4), None, grid, solver=solver)
            assert min(times) >= grid[-1] - 1e-7 and max(times) <= grid[0] + 1e-7


def test_orders_of_convergence_and_numbers_of_steps():
    """Half the step divides Euler's error by 2 and Heun's by 4. The grid's own times add no step that is there already.
    """
    z = torch.randn(3, 1, 4, 4, dtype=torch.float64)

    def error(solver, steps):
        f = Given(lambda z, t, y: torch.sin(3 * t) * z)
        exact = z * math.exp(-(1 - math.cos(3)) / 3)
        return (solve_ode(f, z, None, solver=solver, steps=steps)[-1] - exact).abs().max().item()
    assert 1.8 < error("euler", 20) / error("euler", 40) < 2.2
    assert 3.6 < error("heun", 20) / error("heun", 40) < 4.4
    for n in (10, 99, 100):
        calls = []
        f = Given(lambda z, t, y, calls=calls: calls.append(t) or z)
        solve_ode(f, z, None, torch.linspace(1, 0.01, n), solver="euler", steps=n - 1)
        assert len(calls) == n - 1


def test_guidance_on_all_channels():
    f = Given(lambda z, t, y: torch.ones_like(z) * (2 if y is None else 3))
    z, y = torch.zeros(4, 3, 2, 2), torch.arange(4)
    assert torch.equal(velocity(f, z, 0.5, y, w=4.0), torch.full_like(z, 3 + 3 * (3 - 2)))
    assert torch.equal(velocity(f, z, 0.5, None, w=4.0), torch.full_like(z, 2))
    assert torch.allclose(solve_ode(f, z, y, w=4.0, solver="heun", steps=5)[-1], torch.full_like(z, -6), atol=1e-5)


def test_pieces_make_the_whole():
    torch.manual_seed(0)
    model = build_model("SiT-nano/4", 32, 3, 10).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.1)
    z, y = torch.randn(50, 3, 32, 32), torch.arange(50) % 10
    assert torch.allclose(velocity(model, z, 0.3, y), model(z, 0.3, y), atol=1e-5)


def test_noise_belongs_to_the_image_not_to_the_batch():
    whole = noise(range(6), (1, 4, 4), seed=3)
    assert torch.equal(whole[2:4], noise([2, 3], (1, 4, 4), seed=3))
    assert not torch.equal(whole, noise(range(6), (1, 4, 4), seed=4))
    assert abs(noise(range(500), (100,)).std() - 1) < 0.02
    assert len(noise(range(500), (1,)).unique()) == 500


def write_run(folder, in_channels=1):
    """Write a run's folder whose raw weights and averaged weights differ. Return it."""
    args = dict(name="SiT-nano/4", input_size=8, in_channels=in_channels, num_classes=10, prediction="v")
    torch.manual_seed(0)
    raw, ema = build_model(**args), build_model(**args)
    with torch.no_grad():
        for p in [*raw.parameters(), *ema.parameters()]:
            if p.requires_grad:
                p.normal_(std=0.1)
    state = dict(model=raw.state_dict(), ema=ema.state_dict(), model_args=args, step=7, config={}, device="cpu")
    folder.mkdir()
    torch.save(state, folder / "ckpt.pt")
    return folder


def test_load_run_takes_the_average_by_default(tmp_path):
    run = write_run(tmp_path / "run")
    state = torch.load(run / "ckpt.pt", weights_only=True)
    for ema, key in ((True, "ema"), (False, "model")):
        model = load_run(run, ema=ema)
        assert all(torch.equal(v, state[key][k]) for k, v in model.state_dict().items())
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_the_command_writes_an_npz_that_holds_what_sampling_gives(tmp_path):
    run, out = write_run(tmp_path / "run"), tmp_path / "a.npz"
    main(Config(run=str(run), n=5, solver="heun", steps=3, batch=2, device="cpu", out=str(out)))
    with np.load(out) as archive:
        found, labels, made = archive["arr_0"], archive["labels"], json.loads(str(archive["made"]))
    model = load_run(run)
    z1 = noise(range(5), (1, 8, 8))
    want = (127.5 * solve_ode(model, z1, torch.arange(5), solver="heun", steps=3)[-1] + 128).clamp(0, 255)
    assert found.shape == (5, 8, 8, 3) and labels.tolist() == [0, 1, 2, 3, 4] and made["n"] == 5
    assert np.abs(found[..., 0].astype(float) - want[:, 0].floor().numpy()).max() <= 1


def test_latents_are_decoded_and_belong_to_their_vae(tmp_path, monkeypatch):
    run, vae = write_run(tmp_path / "run"), torch.nn.ConvTranspose2d(1, 3, 2, 2).requires_grad_(False)
    vae.config = SimpleNamespace(scaling_factor=0.5, latent_channels=1)
    vae.decode = lambda z: SimpleNamespace(sample=vae(z))
    monkeypatch.setattr(images, "load_vae", {"a/b": vae}.get)
    cfg = Config(run=str(run), n=20, solver="euler", steps=2, device="cpu", vae="a/b", out=str(tmp_path / "a.npz"))
    main(cfg)
    latents = solve_ode(load_run(run), noise(range(20), (1, 8, 8)), torch.arange(20) % 10, solver="euler", steps=2)[-1]
    want = images.to_uint8(vae(2 * latents)).numpy().astype(int)
    assert want.shape == (20, 16, 16, 3) and np.abs(np.load(cfg.out)["arr_0"] - want).max() <= 1
    vae.bias += 0.1
    with pytest.raises(ValueError, match="a.npz holds images of other settings or weights"):
        main(cfg)
