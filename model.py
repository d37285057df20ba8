"""
The two networks of the paper, written out by hand: SiT, a transformer, and the ADM U-Net, with and without attention.

    model = build_model("SiT-S/2", input_size=32, in_channels=4, num_classes=1000)
    out = model(z, t, y)          # z (B, C, H, W), t () or (B,) in [0, 1], y (B,) int64 or None -> (B, C, H, W)

Conventions, the same in every file of this project (Section 2 and C.1 of the paper):

    z_t = alpha_t x + sigma_t eps,   alpha_t = 1 - t,   sigma_t = t        t = 0 is data, t = 1 is noise
    v = dz_t/dt = eps - x                                                  what the networks predict by default

A label y = num_classes is the *null label*: the network's answer when it is told no class, which gives the
unconditional score. Training replaces a tenth of the labels by it, so that one network knows both (classifier-free
guidance).

Read in this order: what both networks share (time and label embedding), SiT, U-Net, the table of sizes, and last how
the official SiT weights become a model of this file, which makes it longer than two networks need be. Nothing here
imports anything else of the project.

References: SiT, Ma et al. 2024 (arXiv 2401.08740); DiT, Peebles & Xie 2023; ADM, Dhariwal & Nichol 2021.
"""
import argparse
import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------------------------------------------------
# What both share: the time and the label as vectors

def sinusoid(t, dim):
    """(B,) -> (B, dim): [cos | sin] of t times dim/2 frequencies, spaced geometrically from 1 down to 1/10,000."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t.float()[:, None] * freqs                       # (B, dim/2), always fp32: bf16 has 3 digits of t
    return torch.cat([angle.cos(), angle.sin()], dim=1)      # (B, dim)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, width). `scale` is 1000 in ADM, which counted steps, and 1 in the official SiT."""
    def __init__(self, freq_dim, width, scale=1.0):
        super().__init__()
        self.freq_dim, self.scale = freq_dim, scale
        self.mlp = nn.Sequential(nn.Linear(freq_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):   # else it would round to bf16
            return self.mlp(sinusoid(t * self.scale, self.freq_dim).to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """y (B,) -> (B, width): one row a class, and one more, the last, for the null label."""
    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


def zero(module):
    """Zero-initialised: the branch that ends here adds nothing at first."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Denoiser(nn.Module):
    """What the rest of the project relies on: input_size, in_channels, num_classes, and `prediction`, "v" or "x"."""
    def __init__(self, input_size, in_channels, num_classes, prediction):
        super().__init__()
        if prediction not in ("v", "x"):
            raise ValueError(f"prediction must be 'v' or 'x', not {prediction!r}")
        for what, n in dict(input_size=input_size, in_channels=in_channels, num_classes=num_classes).items():
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"{what} must be a whole number from 1 up, not {n!r}")
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.prediction = prediction

    def check(self, z, t, y):
        """Broadcast t to (B,), fill in the null label for y = None, and refuse images of another shape."""
        want = (self.in_channels, self.input_size, self.input_size)
        if z.shape[1:] != want:
            raise ValueError(f"this model takes images of shape {want}, not {tuple(z.shape[1:])}")
        t = torch.as_tensor(t, dtype=torch.float32, device=z.device).expand(len(z))
        y = torch.full((len(z),), self.num_classes, device=z.device) if y is None else y
        return t, y


# ----------------------------------------------------------------------------------------------------------------------
# SiT: patches -> tokens -> blocks that the time and the label modulate -> patches

def sincos_2d(width, side):
    """(1, side^2, width) fixed positions: a quarter of the channels each for sin, cos of the column and of the row."""
    freqs = 1 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    row, col = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [p.reshape(-1, 1).double() * freqs for p in (col, row)]          # two of (side^2, width/4)
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1).float()[None]


def modulate(x, shift, scale):                               # x (B, T, width), shift and scale (B, width)
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):                                    # (B, T, width)
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, T, .)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, width))


class MLP(nn.Module):
    def __init__(self, width, gelu):
        super().__init__()
        self.fc1, self.fc2, self.gelu = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), gelu

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class SiTBlock(nn.Module):
    """A transformer block whose two LayerNorms take scale and shift, and whose two branches take a gate, from c."""
    def __init__(self, width, heads, gelu):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = MLP(width, gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):                                 # x (B, T, width), c (B, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PatchEmbedding(nn.Module):
    def __init__(self, patch, in_channels, width):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, z):                                    # (B, C, H, W) -> (B, T, width)
        return self.proj(z).flatten(2).transpose(1, 2)


class FinalLayer(nn.Module):
    def __init__(self, width, out_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(Denoiser):
    """Scalable Interpolant Transformer. Module names follow the official code, so that its weights load by name.

    `time_scale` multiplies t before it is embedded. The official SiT takes t as it is, which makes a slow start: all
    frequencies are below 1, so the embedding hardly changes over t in [0, 1].
    `gelu` is the official SiT's approximation of GELU, or "none", GELU itself, which a CPU computes four times as fast.
    `learn_sigma` doubles the output channels as the official checkpoints do; the second half is never used, so it is
    off by default and load_sit_checkpoint drops it.
    """
    def __init__(self, depth, width, heads, patch, input_size, in_channels, num_classes, prediction="v",
                 time_scale=1.0, gelu="tanh", learn_sigma=False):
        super().__init__(input_size, in_channels, num_classes, prediction)
        if input_size % patch:
            raise ValueError(f"patch size {patch} does not divide the image size {input_size}")
        self.patch, self.out_channels = patch, in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbedding(patch, in_channels, width)
        self.t_embedder = TimeEmbedding(256, width, time_scale)
        self.y_embedder = LabelEmbedding(num_classes, width)
        # fixed, but counted among the parameters by the official code, whose checkpoints hold it
        self.pos_embed = nn.Parameter(sincos_2d(width, input_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, gelu) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * self.out_channels)
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        for m in [*(b.adaLN_modulation[1] for b in self.blocks), self.final_layer.adaLN_modulation[1]]:
            zero(m)                                          # adaLN-Zero: every block starts as the identity,
        zero(self.final_layer.linear)                        # and the network as the constant 0

    def forward(self, z, t, y=None):
        t, y = self.check(z, t, y)
        x = self.x_embedder(z) + self.pos_embed              # (B, T, width)
        c = self.t_embedder(t) + self.y_embedder(y)          # (B, width)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c)                           # (B, T, p*p*C)
        side, p = self.input_size // self.patch, self.patch
        x = x.view(-1, side, side, p, p, self.out_channels)  # (B, row, col, p, q, c)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, side * p, side * p)
        return x[:, :self.in_channels]


# ----------------------------------------------------------------------------------------------------------------------
# The ADM U-Net: residual blocks down, a middle, residual blocks up, every one fed with what the way down left behind

class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice; the embedding scales and shifts in between; may halve or double the resolution."""
    def __init__(self, c_in, c_out, emb_dim, groups, resample=None):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out), zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]

    def forward(self, x, emb):                               # x (B, c_in, H, W), emb (B, emb_dim)
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over the H*W positions; in the 1x1 convolutions of the original, which are linear layers."""
    def __init__(self, width, groups, head_dim):
        super().__init__()
        self.heads = max(1, width // head_dim)
        self.norm, self.qkv = nn.GroupNorm(groups, width), nn.Conv1d(width, 3 * width, 1)
        self.proj = zero(nn.Conv1d(width, width, 1))

    def forward(self, x, emb=None):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x.reshape(B, C, H * W))).view(B, self.heads, 3, C // self.heads, H * W)
        # three of (B, heads, H*W, head_dim); no fast kernel takes them where the last is not the inner one in memory
        q, k, v = qkv.permute(2, 0, 1, 4, 3).contiguous()
        h = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H * W)
        return x + self.proj(h).view(B, C, H, W)


class UNet(Denoiser):
    """ADM's U-Net. `attention_at` lists the downsampling factors that get attention; empty means convolutions only,
    in the middle too."""
    def __init__(self, channels, input_size, in_channels, num_classes, prediction="v", *, attention_at=(1, 2, 4),
                 mult=(1, 2, 4), res_blocks=2, groups=32, head_dim=64):
        super().__init__(input_size, in_channels, num_classes, prediction)
        if input_size % 2 ** (len(mult) - 1):
            raise ValueError(f"a U-Net of {len(mult)} levels needs an image size divisible by {2 ** (len(mult) - 1)}, "
                             f"not {input_size}")
        emb_dim = 4 * channels
        self.t_embedder = TimeEmbedding(channels, emb_dim, scale=1000.0)
        self.y_embedder = LabelEmbedding(num_classes, emb_dim)

        def stage(c_in, c_out, factor, resample=None):       # a residual block, and attention where it is due
            attend = [AttentionBlock(c_out, groups, head_dim)] if factor in attention_at and resample is None else []
            return nn.ModuleList([ResBlock(c_in, c_out, emb_dim, groups, resample), *attend])

        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up, skips, c = nn.ModuleList(), nn.ModuleList(), [channels], channels
        for level, m in enumerate(mult):
            for _ in range(res_blocks):
                self.down.append(stage(c, channels * m, 2**level))
                skips.append(c := channels * m)
            if level < len(mult) - 1:
                self.down.append(stage(c, c, 2**level, "down"))
                skips.append(c)
        middle = [AttentionBlock(c, groups, head_dim)] if attention_at else []
        self.middle = nn.ModuleList([ResBlock(c, c, emb_dim, groups), *middle, ResBlock(c, c, emb_dim, groups)])
        for level, m in reversed(list(enumerate(mult))):
            for i in range(res_blocks + 1):
                blocks = stage(c + skips.pop(), channels * m, 2**level)
                c = channels * m
                if level and i == res_blocks:
                    blocks.append(ResBlock(c, c, emb_dim, groups, "up"))
                self.up.append(blocks)
        self.head = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), zero(nn.Conv2d(c, in_channels, 3, padding=1)))

    def forward(self, z, t, y=None):
        t, y = self.check(z, t, y)
        emb = self.t_embedder(t) + self.y_embedder(y)        # (B, 4 channels)
        h = self.stem(z)
        skips = [h]
        for blocks in self.down:
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for blocks in self.up:
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:
                h = block(h, emb)
        return self.head(h)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes

SIT_SIZES = {  # depth, width, heads: never change the heads of a name that weights were saved under, since no weight's
               # shape tells them
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),           # the paper's
    "pico": (1, 24, 2), "nano": (2, 32, 2), "micro": (3, 64, 4), "tiny": (3, 96, 3),            # for a laptop
}
UNET_SIZES = {  # channels; the small ones cannot be split in 32 groups, and attend only where the image is small
    "XS": dict(channels=64), "S": dict(channels=128), "B": dict(channels=192), "L": dict(channels=320),
    "pico": dict(channels=8, groups=8, head_dim=32, attention_at=(2, 4)),
    "nano": dict(channels=16, groups=8, head_dim=32, attention_at=(2, 4)),
    "micro": dict(channels=24, groups=8, head_dim=32, attention_at=(2, 4)),
    "tiny": dict(channels=32, groups=8, head_dim=32, attention_at=(2, 4)),
}


def build_model(name, input_size, in_channels, num_classes, prediction="v"):
    """"SiT-<size>/<patch>", "UNet-<size>" or "UNet-<size>-conv" -> a freshly initialised model.

    Raises ValueError for a name that is none of these, naming the sizes there are.
    """
    shape = (input_size, in_channels, num_classes, prediction)
    if (m := re.fullmatch(r"SiT-(\w+)/([1-9]\d*)", name)) and m[1] in SIT_SIZES:
        ours = {} if m[1] in ("S", "B", "L", "XL") else dict(time_scale=1000.0, gelu="none")
        return SiT(*SIT_SIZES[m[1]], int(m[2]), *shape, **ours)
    if (m := re.fullmatch(r"UNet-(\w+?)(-conv)?", name)) and m[1] in UNET_SIZES:
        return UNet(**UNET_SIZES[m[1]] | (dict(attention_at=()) if m[2] else {}) | dict(zip(
            ("input_size", "in_channels", "num_classes", "prediction"), shape, strict=True)))
    raise ValueError(f"unknown model {name!r}: expected SiT-<size>/<patch> with size {', '.join(SIT_SIZES)}, "
                     f"or UNet-<size> or UNet-<size>-conv with size {', '.join(UNET_SIZES)}")


def count_parameters(model):
    """Number of parameters, fixed position table included, as the official code counts them."""
    return sum(p.numel() for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# The official SiT weights

def read_weights(path):
    """A .pt or .safetensors file -> the dict in it. Nothing in the file is ever run, nothing in it can swell, and its
    checksums are looked at, which torch does not do. ValueError if it cannot be read that way, ImportError if it is
    .safetensors and that package is missing."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if not zipfile.is_zipfile(path):                     # torch's older format allocates what the file claims
            raise ValueError("it is no zip archive, as torch.save writes them")
        with zipfile.ZipFile(path) as z:
            if sum(part.file_size for part in z.infolist()) > Path(path).stat().st_size:
                raise ValueError("its parts are larger than the file")
            if damaged := z.testzip():
                raise ValueError(f"{damaged} is damaged")
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")                  # the error will do. Namespace: what official SiT's holds
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict): return state
        raise ValueError(f"it holds a {type(state).__name__}, expected a dict")
    except ImportError as e:
        raise ImportError(f"{path} needs the package safetensors: pip install safetensors") from e
    except Exception as e:                                   # torch and safetensors raise a dozen kinds
        if isinstance(e, MemoryError) or "allocate memory" in str(e): raise      # that is no fault of the file's
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        if isinstance(e, pickle.UnpicklingError):            # torch's own words advise to run what is in the file
            reason = "it is damaged, or holds more than tensors and plain values"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from None


def check_weights(state, want):
    """ValueError that names the first tensor of a state dict that is missing, extra, of another shape than in `want`,
    a model's on the meta device, or of fewer numbers than it claims: with a stride of 0, a few bytes are any size."""
    for key in sorted({*want, *state}, key=str):
        if key not in want:
            raise ValueError(f"key {key!r} of the checkpoint is none of the model's")
        if not torch.is_tensor(v := state.get(key)):
            raise ValueError(f"key {key!r} is missing from the checkpoint")
        if v.shape != want[key].shape:
            raise ValueError(f"key {key!r} has shape {tuple(v.shape)}, expected {tuple(want[key].shape)}")
        if not v.is_floating_point():
            raise ValueError(f"key {key!r} holds {v.dtype}, expected floating point")
        if v.layout != torch.strided or v.is_meta or v.untyped_storage().nbytes() < v.numel() * v.element_size():
            raise ValueError(f"key {key!r} holds fewer numbers than it claims")


def load_sit_checkpoint(checkpoint):
    """Official SiT weights -> a SiT of this file, in the paper's time direction and sign.

    `checkpoint`: a path to a .pt or .safetensors file, or a state dict, bare or inside {"ema": ...}.
    The official model f runs time from noise (0) to data (1) and predicts x - eps, so v(z, t) = -f(z, 1 - t). Both
    turns are put into the weights, so that what comes back is a plain SiT:
      - time enters by cos(k t), sin(k t); those of k (1 - t) are linear in them, hence a change of t_embedder.mlp.0;
      - the sign and the unused half of the channels (learn_sigma) are in final_layer.linear.

    Raises ValueError that names the first missing, extra or misshapen key, or the size that is not known.
    """
    state = checkpoint if isinstance(checkpoint, dict) else read_weights(checkpoint)
    state = state.get("ema", state.get("model", state))  # training checkpoints hold both: the EMA is what was published
    if isinstance(state, dict) and state and all(str(k).startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}         # saved from within DDP
    for key, ndim in {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2,
                      "final_layer.linear.weight": 2}.items():             # the keys that tell the sizes
        if not isinstance(state, dict) or not torch.is_tensor(state.get(key)):
            raise ValueError(f"not a SiT checkpoint: key {key!r} is missing")
        if state[key].ndim != ndim:
            raise ValueError(f"key {key!r} has shape {tuple(state[key].shape)}, expected {ndim} dimensions")
        if 0 in state[key].shape:
            raise ValueError(f"key {key!r} has shape {tuple(state[key].shape)}: it is empty")
    _, in_channels, patch, _ = state["x_embedder.proj.weight"].shape
    (_, tokens, width), rows = state["pos_embed"].shape, state["y_embedder.embedding_table.weight"].shape[0]
    out_channels = state["final_layer.linear.weight"].shape[0] // patch**2
    depth = 1 + max((int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)), default=-1)
    heads = {(d, w): h for d, w, h in SIT_SIZES.values()}.get((depth, width))  # no weight's shape tells them
    if heads is None:
        known = ", ".join(f"{n} {d}/{w}" for n, (d, w, _) in SIT_SIZES.items())
        raise ValueError(f"a SiT of depth {depth} and width {width} is of no known size (depth/width: {known})")

    sizes = (depth, width, heads, patch, math.isqrt(tokens) * patch, in_channels, rows - 1)
    learn_sigma = out_channels == 2 * in_channels
    with torch.device("meta"):                               # nothing is allocated before the file is known to hold it
        check_weights(state, SiT(*sizes, learn_sigma=learn_sigma).state_dict())
    model = SiT(*sizes, learn_sigma=learn_sigma)
    state = {k: v.float() for k, v in state.items()}         # a new dict: the caller's stays as it was

    # cos(k(1-t)) = cos k cos kt + sin k sin kt,   sin(k(1-t)) = sin k cos kt - cos k sin kt
    w_cos, w_sin = state["t_embedder.mlp.0.weight"].double().chunk(2, dim=1)                    # (width, 128) each
    cos_k, sin_k = sinusoid(torch.ones(1), 256)[0].double().chunk(2)
    w = torch.cat([w_cos * cos_k + w_sin * sin_k, w_cos * sin_k - w_sin * cos_k], 1)
    state["t_embedder.mlp.0.weight"] = w.float()

    model.out_channels = in_channels
    model.final_layer.linear = nn.Linear(width, patch**2 * in_channels)
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[key].view(patch**2, out_channels, -1)[:, :in_channels]                     # rows are (p, q, c)
        state[key] = -rows.reshape(model.final_layer.linear.get_parameter(key.split(".")[-1]).shape)
    model.load_state_dict(state)
    return model
