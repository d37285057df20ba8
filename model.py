"""The two networks of the paper, written by hand: SiT, a transformer, and the ADM U-Net, with or without attention.

    model = build_model("SiT-S/2", input_size=32, in_channels=4, num_classes=1000)
    out = model(z, t, y)          # z (B, C, H, W), t () or (B,) in [0, 1], y (B,) int64 or None -> (B, C, H, W)
    z_t = (1 - t) x + t eps       # t = 0 is data, t = 1 is noise: the same in every file of this project
    v = dz_t/dt = eps - x         # what the networks predict by default

A label y = num_classes is the *null label*, which tells the network no class: it predicts the unconditional v.
By default, training replaces a tenth of the labels by it: one network knows both (classifier-free guidance).
Sources: SiT, Ma et al. 2024 (arXiv 2401.08740); DiT, Peebles & Xie 2023; ADM, Dhariwal & Nichol 2021.
"""
import math
import re
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(t, dim):
    """(B,) -> (B, dim): [cos | sin] of t times the dim/2 frequencies 10,000^(-k / (dim/2)), k = 0 .. dim/2 - 1."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[:, None] * freqs                               # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], 1)


class TimeEmbedding(nn.Module):
    """t (B,) -> (B, width) in float32: bfloat16 keeps two digits of t. `scale`: 1 in official SiTs, else 1000."""
    def __init__(self, freq_dim, width, scale):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(freq_dim, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        with torch.autocast("cpu" if t.is_meta else t.device.type, enabled=False):  # meta: shapes without numbers
            waves = sinusoid(t * self.scale, self.mlp[0].in_features)
            return self.mlp(waves.to(self.mlp[0].weight))


def named(**modules):
    """Return modules in sequence under names of our choice: in SiT the official ones, to load its weights."""
    return nn.Sequential(OrderedDict(modules))


def zero(module):
    """Return the module with weights and biases 0: a branch that ends here adds nothing at first."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Denoiser(nn.Module):
    """What both networks share. `prediction`, "v" or "x", changes nothing here: it tells what the output stands for."""
    def __init__(self, input_size, in_channels, num_classes, prediction, divisor):
        super().__init__()
        assert prediction in ("v", "x")
        if input_size % divisor:
            raise ValueError(f"this model needs an image size divisible by {divisor}, not {input_size}")
        self.input_size = input_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.prediction = prediction

    def check(self, z, t, y):
        """Broadcast t to (B,), fill in the null label for y = None, and refuse images of another shape."""
        want = (self.in_channels, self.input_size, self.input_size)
        if z.shape[1:] != want:
            raise ValueError(f"this model takes images of shape {want}, not {tuple(z.shape[1:])}")
        t = torch.as_tensor(t, dtype=torch.float32, device=z.device).expand(len(z))
        if y is None:
            y = torch.full((len(z),), self.num_classes, device=z.device)
        return t, y


def sincos_2d(width, side):
    """Return fixed positions (1, side^2, width): sin and cos of the column, then sin and cos of the row."""
    freqs = 1 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(side)[:, None] * freqs              # (side, width/4)
    waves = torch.cat([angle.sin(), angle.cos()], 1)         # (side, width/2)
    column, row = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)    # (side^2, width/2) each
    return torch.cat([column, row], dim=1).float()[None]


def modulated_norm(x, shift, scale):
    """Return LayerNorm of tokens x (B, T, width), times 1 + scale, plus shift; both (B, width)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):                                    # (B, T, width)
        B, T, width = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                 # (B, heads, T, width/heads) each
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.transpose(1, 2).reshape(B, T, width)
        return self.proj(h)


class SiTBlock(nn.Module):
    """A transformer block. c, time plus label, sets shift and scale of both norms, and a gate for both branches."""
    def __init__(self, width, heads, gelu):
        super().__init__()
        self.attn = Attention(width, heads)
        fc1 = nn.Linear(width, 4 * width)
        fc2 = nn.Linear(4 * width, width)
        self.mlp = named(fc1=fc1, gelu=nn.GELU(approximate=gelu), fc2=fc2)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):                                 # x (B, T, width), c (B, width)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = self.attn(modulated_norm(x, shift1, scale1))
        x = x + gate1[:, None] * h
        h = self.mlp(modulated_norm(x, shift2, scale2))
        return x + gate2[:, None] * h


class SiT(Denoiser):
    """Scalable Interpolant Transformer: patches become T tokens. Names are the official code's, to load its weights."""
    def __init__(self, depth, width, heads, patch, input_size, in_channels, num_classes, prediction,
                 time_scale=1.0, gelu="tanh"):
        super().__init__(input_size, in_channels, num_classes, prediction, patch)
        self.patch = patch
        self.x_embedder = named(proj=nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch))
        self.t_embedder = TimeEmbedding(256, width, time_scale)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, width))
        self.pos_embed = nn.Parameter(sincos_2d(width, input_size // patch), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(width, heads, gelu) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        linear = nn.Linear(width, patch * patch * in_channels)
        self.final_layer = nn.ModuleDict(dict(linear=linear, adaLN_modulation=modulation))
        self.init_weights()

    def init_weights(self):
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))     # a view: this fills the weight itself
        nn.init.zeros_(self.x_embedder.proj.bias)
        for m in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(m.weight, std=0.02)
        # adaLN-Zero: all gates are 0, so every block starts as the identity, and the network as the constant 0
        for block in self.blocks:
            zero(block.adaLN_modulation[1])
        zero(self.final_layer.adaLN_modulation[1])
        zero(self.final_layer.linear)

    def forward(self, z, t, y=None, tokens_after=None):
        """Return the prediction (B, C, H, W); with tokens_after=k also the tokens (B, T, width) after block k."""
        t, y = self.check(z, t, y)
        x = self.x_embedder(z).flatten(2).transpose(1, 2)    # (B, T, width)
        x = x + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)          # (B, width)
        tokens = None
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number == tokens_after:
                tokens = x
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulated_norm(x, shift, scale))          # (B, T, p*p*C)
        p = self.patch
        side = self.input_size // p
        x = x.view(-1, side, side, p, p, self.in_channels)   # (B, row, column, row in patch, column in patch, C)
        out = x.permute(0, 5, 1, 3, 2, 4).reshape(z.shape)
        return out if tokens_after is None else (out, tokens)


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice; the embedding scales and shifts in between; may halve or double the resolution."""
    def __init__(self, c_in, c_out, emb_dim, groups, resample=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.resample = resample or nn.Identity()

    def forward(self, x, emb):                               # x (B, c_in, H, W), emb (B, emb_dim)
        h = F.silu(self.norm1(x))
        h = self.conv1(self.resample(h))
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(F.silu(h))
        return self.skip(self.resample(x)) + h


class AttentionBlock(nn.Module):
    def __init__(self, width, groups, head_dim):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width)
        self.attn = Attention(width, max(1, width // head_dim))
        zero(self.attn.proj)

    def forward(self, x, emb):                               # emb is not used: it is called like a ResBlock
        tokens = self.norm(x).flatten(2).transpose(1, 2)     # (B, H*W, C)
        h = self.attn(tokens).transpose(1, 2)
        return x + h.reshape(x.shape)


class UNet(Denoiser):
    """ADM's U-Net: blocks down, a middle, and blocks up, which also see what was made on the way down."""
    def __init__(self, channels, input_size, in_channels, num_classes, prediction, patch=1,
                 attention_at=(1, 2, 4), mult=(1, 2, 4), res_blocks=2, groups=32, head_dim=64):
        last = len(mult) - 1
        super().__init__(input_size, in_channels, num_classes, prediction, patch * 2**last)
        emb_dim = 4 * channels
        self.patch = patch
        self.t_embedder = TimeEmbedding(channels, emb_dim, 1000.0)
        self.y_embedder = named(embedding_table=nn.Embedding(num_classes + 1, emb_dim))

        def stage(c_in, c_out, level):
            """Return a residual block, then attention if attention_at holds 2**level, how much smaller images are."""
            blocks = nn.ModuleList([ResBlock(c_in, c_out, emb_dim, groups)])
            if 2**level in attention_at:
                blocks.append(AttentionBlock(c_out, groups, head_dim))
            return blocks

        self.stem = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        skips = [channels]                                   # channels of each skip connection, for the way up
        c = channels
        for level, m in enumerate(mult):
            for _ in range(res_blocks):
                self.down.append(stage(c, channels * m, level))
                c = channels * m
                skips.append(c)
            if level < last:
                self.down.append(nn.ModuleList([ResBlock(c, c, emb_dim, groups, nn.AvgPool2d(2))]))
                skips.append(c)
        middle = [AttentionBlock(c, groups, head_dim)] if attention_at else []
        self.middle = nn.ModuleList([ResBlock(c, c, emb_dim, groups), *middle, ResBlock(c, c, emb_dim, groups)])
        for level in range(last, -1, -1):
            for i in range(res_blocks + 1):
                blocks = stage(c + skips.pop(), channels * mult[level], level)
                c = channels * mult[level]
                if level > 0 and i == res_blocks:
                    blocks.append(ResBlock(c, c, emb_dim, groups, nn.Upsample(scale_factor=2)))
                self.up.append(blocks)
        out = zero(nn.Conv2d(c, in_channels * patch**2, 3, padding=1))
        self.head = nn.Sequential(nn.GroupNorm(groups, c), nn.SiLU(), out)
        # on a CPU, convolutions are faster where a pixel's channels lie side by side in memory
        self.to(memory_format=torch.channels_last)

    def forward(self, z, t, y=None):
        t, y = self.check(z, t, y)
        emb = self.t_embedder(t) + self.y_embedder(y)        # (B, 4 channels)
        h = self.stem(F.pixel_unshuffle(z, self.patch))
        skips = [h]
        for blocks in self.down:
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for blocks in self.up:
            h = torch.cat([h, skips.pop()], 1)
            for block in blocks:
                h = block(h, emb)
        return F.pixel_shuffle(self.head(h), self.patch)


# depth, width, heads: the paper's sizes, and small ones. Keep a name's heads: no shape in a checkpoint tells them.
SIT_SIZES = {
    "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "1x32": (1, 32, 2),
    "pico": (1, 24, 2), "nano": (2, 32, 2), "mini": (2, 48, 3), "micro": (3, 64, 4), "tiny": (3, 96, 3),
}
UNET_CHANNELS = {"XS": 64, "S": 128, "B": 192, "L": 320, "pico": 8, "nano": 16, "tiny": 32}
PAPER = ("XS", "S", "B", "L", "XL")


def build_model(name, input_size, in_channels, num_classes, prediction="v"):
    """Return a new "SiT-<size>/<patch>" or "UNet-<size>[/<patch>][-conv]"; raise ValueError for other names."""
    found = re.fullmatch(r"(SiT|UNet)-(\w+)(?:/([1-9]\d*))?(-conv)?", name)
    kind, size, patch, conv = found.groups() if found else [None] * 4
    shape = (input_size, in_channels, num_classes, prediction)
    options = {}
    if kind == "SiT" and size in SIT_SIZES and patch and not conv:
        # a short training learns time slowly at the official scale; a CPU computes the tanh GELU slowly
        if size not in PAPER:
            options = dict(time_scale=1000.0, gelu="none")
        return SiT(*SIT_SIZES[size], int(patch), *shape, **options)
    if kind == "UNet" and size in UNET_CHANNELS:
        if size not in PAPER:
            options = dict(attention_at=(2,), mult=(1, 2), res_blocks=1, groups=8, head_dim=32)
        if conv:
            options["attention_at"] = ()
        return UNet(UNET_CHANNELS[size], *shape, int(patch or 1), **options)
    raise ValueError(f"unknown model {name!r}: expected SiT-<size>/<patch> or UNet-<size>[/<patch>][-conv], with a "
                     "size of the tables in model.py, such as SiT-tiny/4 or UNet-S")
