"""The networks: parameter counts, shapes, labels, tokens, what conv-only means."""
import math

import pytest
import torch
from torch import nn

from model import SIT_SIZES, build_model, sincos_2d


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size, millions", [("S", "32.96"), ("B", "130.5"), ("L", "458.1"), ("XL", "675.1")])
def test_sit_parameter_counts(size, millions):
    with torch.device("meta"):
        n = count_parameters(build_model(f"SiT-{size}/2", 32, 4, 1000))
    # the official code also predicts a variance (learn_sigma): as many outputs again
    n += (SIT_SIZES[size][1] + 1) * 2 * 2 * 4
    assert f"{n / 1e6:.{len(millions.split('.')[1])}f}" == millions


@pytest.mark.parametrize("name, millions", [
    ("XS", "18.33"), ("S", "72.69"), ("B", "163.1"), ("L", "452.0"),
    ("XS-conv", "16.33"), ("S-conv", "64.73"), ("B-conv", "145.2"), ("L-conv", "402.4")])
def test_unet_parameter_counts(name, millions):
    with torch.device("meta"):                               # a label table of 1001 rows
        n = count_parameters(build_model(f"UNet-{name}", 32, 4, 1000))
    assert f"{n / 1e6:.{len(millions.split('.')[1])}f}" == millions


def test_conv_only_holds_no_attention_anywhere():
    def attention(name):
        with torch.device("meta"):
            return [m for m in build_model(name, 32, 4, 10).modules() if type(m).__name__ == "AttentionBlock"]
    for size in ("XS", "S", "B", "L", "nano", "tiny"):
        assert len(attention(f"UNet-{size}")) > 0 and attention(f"UNet-{size}-conv") == []
    # at the resolutions 32, 16 and 8: two blocks each on the way down, one in the middle, three each on the way up
    assert len(attention("UNet-XS")) == 3 * 2 + 1 + 3 * 3


@pytest.mark.parametrize("name", ["SiT-nano/2", "SiT-tiny/4", "UNet-nano", "UNet-nano-conv",
                                  "UNet-pico", "UNet-tiny/2-conv"])
def test_shapes_labels_and_gradients(name):
    model = build_model(name, 16, 3, 10)
    z, t, y = torch.randn(5, 3, 16, 16), torch.rand(5), torch.arange(5)
    assert model(z, t, y).shape == z.shape
    assert (model(z, t, y) == 0).all()                       # every network starts as the constant 0
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, 1e-2)
    for _ in range(3):                                       # zero-initialised layers let gradients through one by one
        optimizer.zero_grad()
        (model(z, t, y) - z).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable if p.numel() > 500)
    assert torch.equal(model(z, t), model(z, t, torch.full((5,), 10)))      # no label is the null label
    assert not torch.allclose(model(z, t), model(z, t, y))
    assert torch.allclose(model(z, 0.3, y), model(z, torch.full((5,), 0.3), y))


def test_tokens_after_a_block():
    """They are what the blocks up to that one make of the patches, and the prediction stays the same."""
    model = build_model("SiT-micro/4", 8, 1, 10)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    z, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 3, 10])
    x = model.x_embedder(z).flatten(2).transpose(1, 2) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    want = model.blocks[1](model.blocks[0](x, c), c)
    out, tokens = model(z, t, y, tokens_after=2)
    assert torch.equal(tokens, want) and torch.equal(out, model(z, t, y))


def test_positions():
    """Row-major tokens; the first half of the channels depends on the column alone, the second on the row alone."""
    pos = sincos_2d(32, 5).view(5, 5, 32)
    assert torch.allclose(pos[0, :, :16], pos[3, :, :16]) and torch.allclose(pos[:, 0, 16:], pos[:, 3, 16:])
    assert torch.allclose(pos[0, 2, 1], torch.tensor(math.sin(2 / 10_000 ** (1 / 8))))


def test_the_time_is_not_rounded_to_bf16():
    """Where networks train in bf16, two digits of t would be left, and another t than in the evaluation."""
    embed = build_model("SiT-nano/4", 8, 1, 4).t_embedder
    t = torch.linspace(0, 1, 50)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(t)
    assert half.dtype == torch.float32 and torch.equal(half, embed(t))
