"""plumbing/weights.py: official weights give the paper's velocity, and weights of another kind are refused."""
import argparse
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from plumbing import weights
from plumbing.files import load_run
from plumbing.weights import load_sit_weights

z, t, y = torch.randn(6, 4, 8, 8), torch.linspace(0, 1, 6), torch.tensor([0, 3, 9, 10, 10, 1])


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make SiT-S a small network: two blocks of width 32."""
    monkeypatch.setitem(weights.SIT_SIZES, "S", (2, 32, 2))


def official_state(learn_sigma=True, width=32):
    """Return random weights under the official names: 2 blocks, patch 2, images (4, 8, 8), 10 classes."""
    linear = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width), "final_layer.linear": (
        32 if learn_sigma else 16, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for i in range(2):
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4),
                                    ("adaLN_modulation.1", 6, 1)):
            linear[f"blocks.{i}.{name}"] = (rows * width, columns * width)
    shapes = {"pos_embed": (1, 16, width), "x_embedder.proj.weight": (width, 4, 2, 2), "x_embedder.proj.bias": (width,),
              "y_embedder.embedding_table.weight": (11, width)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) * 0.2 for name, shape in shapes.items()}


def official_forward(state, x, t, y):
    """Return f(x, t) as the published code computes it, in float64, written once more without any code of model.py."""
    s = {name: value.double() for name, value in state.items()}

    def linear(name, a):
        return F.linear(a, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(a):
        return F.layer_norm(a, a.shape[-1:], eps=1e-6)
    patches = F.conv2d(x.double(), s["x_embedder.proj.weight"], s["x_embedder.proj.bias"], stride=2)
    h = patches.flatten(2).mT + s["pos_embed"]
    angle = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    time = linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))
    c = F.silu(linear("t_embedder.mlp.2", F.silu(time)) + s["y_embedder.embedding_table.weight"][y])
    for i in range(2):
        m = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].chunk(6, 2)
        qkv = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + m[1]) + m[0])
        q, k, v = qkv.unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        a = torch.softmax(q @ k.mT / 4, -1) @ v
        h = h + m[2] * linear(f"blocks.{i}.attn.proj", a.transpose(1, 2).flatten(2))
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + m[4]) + m[3]), approximate="tanh")
        h = h + m[5] * linear(f"blocks.{i}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, 2)
    out = linear("final_layer.linear", norm(h) * (1 + scale) + shift).unflatten(2, (2, 2, -1))     # (B, T, p, q, c)
    return F.fold(out.permute(0, 4, 2, 3, 1).flatten(1, 3), 8, 2, stride=2)[:, :4]


def assert_velocity(model, want):
    assert (model.num_classes, model.input_size, model.in_channels, model.prediction) == (10, 8, 4, "v")
    assert want.std() > 0.1 and (model(z, t, y).double() - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_official_weights_give_the_velocity_of_the_paper(learn_sigma, tmp_path):
    """v(z, t) = -f(z, 1 - t), whatever the weights are wrapped in."""
    state = official_state(learn_sigma)
    raw = {name: value * 1.1 for name, value in state.items()}
    whole = {"model": raw, "ema": state, "opt": {}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(whole, tmp_path / "sit.pt")
    save_file(state, tmp_path / "sit.safetensors")
    want = -official_forward(state, z, 1 - t, y)
    for file in ("sit.pt", "sit.safetensors"):
        assert_velocity(load_run(tmp_path / file), want)
    assert_velocity(load_sit_weights(whole, "", ema=False), -official_forward(raw, z, 1 - t, y))
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        named = {prefix + name: value for name, value in state.items()}
        assert_velocity(load_sit_weights(named, ""), want)


def test_repa_weights_have_our_time_and_sign():
    state = official_state(learn_sigma=False)
    args = argparse.Namespace(path_type="linear", prediction="v")
    for source in (state | {"projectors.0.0.weight": torch.zeros(3, 32)}, {"ema": state, "args": args}):
        assert_velocity(load_sit_weights(source, ""), official_forward(state, z, t, y))


class Hub(torch.nn.Linear):
    """A network as the hub's libraries give it, with a report of what was in the file."""
    missing = []

    @classmethod
    def from_pretrained(cls, name, output_loading_info):
        return cls(2, 2), dict(missing_keys=cls.missing, unexpected_keys=["old"])


def test_networks_of_the_hub(tmp_path, monkeypatch):
    """A network with random weights in it is refused; of a missing package, one line tells the cure."""
    assert not weights.pretrained(Hub, str(tmp_path)).training
    monkeypatch.setattr(Hub, "missing", {"mid.b", "mid.a"})
    with pytest.raises(ValueError, match="a/b lacks weights of Hub: mid.a"):
        weights.pretrained(Hub, "a/b")
    with pytest.raises(ValueError, match="a/b cannot be loaded as Linear: AttributeError"):
        weights.pretrained(torch.nn.Linear, "a/b")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="--vae needs diffusers: pip install diffusers torch=="):
        weights.load_vae("x/y")
