"""The networks: parameter counts, an independent SiT with the official names, what conv-only means."""
import argparse
import math

import pytest
import torch
from torch import nn

from model import SIT_SIZES, SiT, build_model, count_parameters, load_sit_checkpoint, sincos_2d


@pytest.mark.parametrize("size, millions", [("S", "32.96"), ("B", "130.5"), ("L", "458.1"), ("XL", "675.1")])
def test_sit_parameter_counts(size, millions):
    with torch.device("meta"):                               # with learn_sigma, as the official code counts them
        n = count_parameters(SiT(*SIT_SIZES[size], 2, 32, 4, 1000, learn_sigma=True))
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
            return [m for m in build_model(name, 32, 4, 10).modules() if "Attention" in type(m).__name__]
    for size in ("XS", "S", "B", "L", "nano", "micro", "tiny"):
        assert len(attention(f"UNet-{size}")) > 0 and attention(f"UNet-{size}-conv") == []
    # at the resolutions 32, 16 and 8: two blocks each on the way down, one in the middle, three each on the way up
    assert len(attention("UNet-XS")) == 3 * 2 + 1 + 3 * 3


def test_conv_only_has_no_global_mixing_through_attention():
    """A change of one corner does not reach the far corner, but for GroupNorm, which is switched off here."""
    far = {}
    for name in ("UNet-nano", "UNet-nano-conv"):
        torch.manual_seed(0)
        model = build_model(name, 64, 1, 10).double()
        for m in model.modules():
            for p in m.parameters(recurse=False):
                if (p == 0).all():
                    nn.init.normal_(p, std=0.1)
        for module in [m for m in model.modules() if hasattr(m, "_modules")]:
            for key, child in list(module._modules.items()):
                if isinstance(child, nn.GroupNorm):
                    setattr(module, key, nn.Identity())
        z = torch.randn(1, 1, 64, 64, dtype=torch.float64)
        moved = z.clone()
        moved[..., 0, 0] += 1
        far[name] = (model(moved, 0.5) - model(z, 0.5))[..., -1, -1].abs().max().item()
    assert far["UNet-nano-conv"] < 1e-13 and far["UNet-nano"] > 1e-9, far


@pytest.mark.parametrize("name", ["SiT-nano/2", "SiT-tiny/4", "UNet-nano", "UNet-micro-conv", "UNet-tiny"])
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


def test_bad_names_and_shapes():
    for name in ("SiT-S", "SiT-Q/2", "SiT-S/0", "UNet-Q", "UNet-", "vit", ""):
        with pytest.raises(ValueError, match="unknown model"):
            build_model(name, 32, 4, 10)
    with pytest.raises(ValueError, match="patch size 3 does not divide"):
        build_model("SiT-nano/3", 32, 4, 10)
    with pytest.raises(ValueError, match="divisible by 4"):
        build_model("UNet-nano", 30, 4, 10)
    with pytest.raises(ValueError, match="images of shape"):
        build_model("SiT-nano/2", 8, 1, 10)(torch.zeros(1, 3, 8, 8), 0.5)
    with pytest.raises(ValueError, match="prediction"):
        build_model("SiT-nano/2", 8, 1, 10, prediction="eps")


def test_positions():
    """Row-major tokens; the first half of the channels depends on the column alone, the second on the row alone."""
    pos = sincos_2d(32, 5).view(5, 5, 32)
    assert torch.allclose(pos[0, :, :16], pos[3, :, :16]) and torch.allclose(pos[:, 0, 16:], pos[:, 3, 16:])
    assert torch.allclose(pos[0, 2, 1], torch.tensor(math.sin(2 / 10_000 ** (1 / 8))))


# ---- the official layout, written here once more in plain functions, straight from a state dict ----------------------

def official_state(depth=2, width=32, patch=2, channels=4, side=4, classes=10, learn_sigma=True):
    g = torch.Generator().manual_seed(0)
    out = channels * (2 if learn_sigma else 1)
    shapes = {"pos_embed": (1, side * side, width), "x_embedder.proj.weight": (width, channels, patch, patch),
              "x_embedder.proj.bias": (width,), "y_embedder.embedding_table.weight": (classes + 1, width),
              "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
              "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
              "final_layer.linear.weight": (patch * patch * out, width), "final_layer.linear.bias": (patch**2 * out,),
              "final_layer.adaLN_modulation.1.weight": (2 * width, width),
              "final_layer.adaLN_modulation.1.bias": (2 * width,)}
    for i in range(depth):
        for name, (o, n) in {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (4 * width, width),
                             "mlp.fc2": (width, 4 * width), "adaLN_modulation.1": (6 * width, width)}.items():
            shapes[f"blocks.{i}.{name}.weight"], shapes[f"blocks.{i}.{name}.bias"] = (o, n), (o,)
    return {k: torch.randn(s, generator=g, dtype=torch.float64) * 0.2 for k, s in shapes.items()}


def official_forward(s, x, t, y, heads, patch=2, channels=4):
    """f(x, t) as the published model computes it: its time runs from noise (0) to data (1), it predicts x - eps."""
    def linear(name, a): return a @ s[f"{name}.weight"].T + s[f"{name}.bias"]
    def norm(a): return (a - a.mean(-1, keepdim=True)) / (a.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    silu = lambda a: a * torch.sigmoid(a)
    gelu = lambda a: 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    B, side = len(x), x.shape[-1] // patch
    patches = x.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5).reshape(B, side * side, -1)
    h = patches @ s["x_embedder.proj.weight"].flatten(1).T + s["x_embedder.proj.bias"] + s["pos_embed"]
    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], 1))))
    c = c + s["y_embedder.embedding_table.weight"][y]
    width = h.shape[-1]
    for i in range(sum(k.endswith("qkv.bias") for k in s)):
        m = linear(f"blocks.{i}.adaLN_modulation.1", silu(c)).view(B, 6, 1, width)
        a = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + m[:, 1]) + m[:, 0]).view(B, -1, 3, heads, width // heads)
        q, k, v = a[:, :, 0], a[:, :, 1], a[:, :, 2]
        w = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // heads), -1)
        h = h + m[:, 2] * linear(f"blocks.{i}.attn.proj", torch.einsum("bhqk,bkhd->bqhd", w, v).reshape(B, -1, width))
        h = h + m[:, 5] * linear(f"blocks.{i}.mlp.fc2", gelu(linear(f"blocks.{i}.mlp.fc1",
                                                                   norm(h) * (1 + m[:, 4]) + m[:, 3])))
    m = linear("final_layer.adaLN_modulation.1", silu(c)).view(B, 2, 1, width)
    out = linear("final_layer.linear", norm(h) * (1 + m[:, 1]) + m[:, 0])
    image = torch.zeros(B, out.shape[-1] // patch**2, side * patch, side * patch, dtype=out.dtype)
    for row in range(side):                                  # tokens unpatchify in order (row, col, p, q, c)
        for col in range(side):
            for p in range(patch):
                for q in range(patch):
                    c_ = image.shape[1]
                    start = (p * patch + q) * c_
                    image[:, :, row * patch + p, col * patch + q] = out[:, row * side + col, start:start + c_]
    return image[:, :channels]


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_official_weights_give_the_velocity_of_the_paper(learn_sigma, tmp_path):
    """v(z, t) = -f(z, 1 - t), against an implementation that shares no code with model.py."""
    state = official_state(learn_sigma=learn_sigma)
    z, t, y = torch.randn(6, 4, 8, 8), torch.linspace(0, 1, 6), torch.tensor([0, 3, 9, 10, 10, 1])
    want = -official_forward(state, z.double(), 1 - t.double(), y, heads=2)
    assert want.std() > 0.1
    single = {k: v.float() for k, v in state.items()}
    torch.save({"ema": single, "model": {k: v + 1 for k, v in single.items()}, "opt": {},
                "args": argparse.Namespace(lr=1.0)},
               tmp_path / "sit.pt")
    for source in (single, tmp_path / "sit.pt", {f"module.{k}": v for k, v in single.items()}):
        model = load_sit_checkpoint(source)
        assert model.num_classes == 10 and model.input_size == 8 and model.in_channels == 4
        assert (model(z, t, y).double() - want).abs().max() < 1e-4 * want.abs().max()
    assert torch.equal(single["final_layer.linear.bias"], state["final_layer.linear.bias"].float())  # left as it was


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"junk")
    for path in (tmp_path / "a.pt", tmp_path / "missing.pt"):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_sit_checkpoint(path)


def test_bad_checkpoints_name_the_key():
    good = {k: v.float() for k, v in official_state().items()}
    cases = [
        ({k: v for k, v in good.items() if k != "blocks.1.mlp.fc1.bias"}, "'blocks.1.mlp.fc1.bias' is missing"),
        ({k: v for k, v in good.items() if k != "pos_embed"}, "'pos_embed' is missing"),
        (good | {"blocks.0.attn.extra": torch.zeros(1)}, "'blocks.0.attn.extra' of the checkpoint is none"),
        (good | {"blocks.0.attn.proj.weight": torch.zeros(32, 31)}, "'blocks.0.attn.proj.weight' has shape (32, 31)"),
        (good | {"blocks.0.attn.proj.weight": torch.zeros(32, 31)}, "expected (32, 32)"),
        ({k: v for k, v in good.items() if not k.startswith("blocks.1")}, "depth 1 and width 32"),
        ({"weight": torch.zeros(3)}, "not a SiT checkpoint"),
        (good | {"x_embedder.proj.weight": torch.zeros(32, 16)}, "'x_embedder.proj.weight' has shape (32, 16)"),
        (good | {"x_embedder.proj.weight": torch.zeros(31, 4, 2, 2)}, "'x_embedder.proj.weight' has shape (31, 4"),
    ]
    for state, message in cases:
        with pytest.raises(ValueError) as e:
            load_sit_checkpoint(state)
        assert message in str(e.value) and "\n" not in str(e.value)


def test_the_time_is_not_rounded_to_bf16():
    """Where networks train in bf16, two digits of t would be left, and another t than in the evaluation."""
    embed = build_model("SiT-nano/4", 8, 1, 4).t_embedder
    t = torch.linspace(0, 1, 50)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed(t)
    assert half.dtype == torch.float32 and torch.equal(half, embed(t))
