"""A compact space-time U-Net. It sees a noisy clip and its log-SNR, and knows nothing else about diffusion.

Frames are folded into the batch, (B T) C H W in channels_last, so that every spatial convolution is a plain Conv2d;
time is mixed in every block by a 3-tap convolution on a view of the same memory, (B, C, T, H W). Attention over space
and over time acts at the lowest resolution. What a patch of cells has in common comes out of that; the last layer goes
back to single cells, with the input of each and of its neighbours beside it: whether one is dry is seen there alone.
Written so that torch.compile(fullgraph=True) fuses the small functions.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint


@dataclass
class Config:
    in_channels: int = 1  # variables of the field
    cond_channels: int = 0  # further input channels, not denoised (masks, static fields, known frames)
    width: int = 64  # channels at the first level; a multiple of 16
    mults: tuple = (1, 2)  # channel multiple per level; each level halves the resolution
    blocks: int = 2  # residual blocks per level, on the way down and on the way up
    patch: int = 2  # pixel-unshuffle at the input: few channels at high resolution are memory-bound
    heads: int = 4  # attention heads
    wrap_x: bool = False  # longitude is periodic: convolutions wrap around in x


def per_clip(norm, h, T, mix=None):
    """GroupNorm over the frames of a clip together: each by itself, a frame could not be wetter than the next. h (BT, C, H, W)

    Frames that have nothing to do with each other (mix 0) are normalised each by itself. In channels_last both are views.
    """
    together = rearrange(norm(rearrange(h, "(b t) c h w -> b c (t h) w", t=T)), "b c (t h) w -> (b t) c h w", t=T)
    return together if mix is None else torch.where(mix > 0, together, norm(h))


def norm_act(h, norm, T, mix=None, scale_shift=None):
    """SiLU(GroupNorm(h) * (1 + scale) + shift). h (BT, C, H, W), scale_shift (BT, 2C, 1, 1)"""
    h = per_clip(norm, h, T, mix)
    return F.silu(h) if scale_shift is None else modulate_act(h, scale_shift)


def modulate_act(h, scale_shift):
    """SiLU(h * (1 + scale) + shift). h (BT, C, H, W), scale_shift (BT, 2C, 1, 1)"""
    scale, shift = scale_shift.chunk(2, 1)
    return F.silu(h * (1 + scale) + shift)


def add(h, temporal, mix):
    """h plus what mixes frames, but only in clips whose mix is 1 (None: in all). h, temporal (BT, C, H, W), mix (BT, 1, 1, 1)"""
    return h + temporal if mix is None else torch.addcmul(h, temporal, mix)


def rotary(x):
    """Rotary embedding of the position along dim -2: attention then depends on time differences. x (..., T, d)"""
    T, d = x.shape[-2:]
    freqs = 100.0 ** (-torch.arange(0, d, 2, device=x.device) / d)  # (d/2,) radians per frame
    angle = torch.arange(T, device=x.device)[:, None] * freqs  # (T, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(q, k, v):
    """softmax(q k' / sqrt(d)) v, (n, heads, L, d): fused, but for short bfloat16 sequences on a CPU, where that is slower."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 128:
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Conv(nn.Conv2d):
    """Convolution that keeps the size; zeros beyond the edges, or around the globe in x if wrap_x."""

    def __init__(self, c_in, c_out, wrap_x, stride=1, size=3):
        super().__init__(c_in, c_out, size, stride, padding=(size // 2, 0) if wrap_x else size // 2)
        self.around = (size // 2, size // 2, 0, 0) if wrap_x else None

    def forward(self, h):
        return super().forward(h if self.around is None else F.pad(h, self.around, mode="circular"))


class TimeConv(nn.Conv2d):
    """h + a 3-tap convolution over neighbouring frames; a view in channels_last, no copy. h (BT, C, H, W)"""

    def __init__(self, c):
        super().__init__(c, c, (3, 1), padding=(1, 0))

    def forward(self, h, T, mix):
        H, W = h.shape[-2:]
        x = rearrange(h, "(b t) c h w -> b c t (h w)", t=T)
        return add(h, rearrange(super().forward(x), "b c t (h w) -> (b t) c h w", h=H, w=W), mix)


class Block(nn.Module):
    """Residual block: norm, 3x3 in space, 3 taps in time, norm modulated by the log-SNR, 3x3 in space (zero at start)."""

    def __init__(self, c_in, c_out, wrap_x):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c_in // 16, c_in), Conv(c_in, c_out, wrap_x)
        self.time = TimeConv(c_out)
        self.norm2, self.conv2 = nn.GroupNorm(c_out // 16, c_out), Conv(c_out, c_out, wrap_x)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, scale_shift, T, mix=None):
        h = self.conv1(norm_act(x, self.norm1, T, mix))
        h = self.time(h, T, mix)
        h = self.conv2(norm_act(h, self.norm2, T, mix, scale_shift))
        return self.skip(x) + h


class Attention(nn.Module):
    """Self-attention over space (within a frame) or over time (at a cell), residual, zero at start."""

    def __init__(self, c, heads, axis):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.norm, self.qkv, self.out = nn.GroupNorm(1, c), nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, T, mix=None):
        H, W = x.shape[-2:]
        tokens = {"space": "(b t) (h w)", "time": "(b h w) t"}[self.axis]
        qkv = self.qkv(rearrange(per_clip(self.norm, x, T, mix), f"(b t) c h w -> {tokens} c", t=T))
        q, k, v = rearrange(qkv, "n l (three heads d) -> three n heads l d", three=3, heads=self.heads)
        if self.axis == "time":
            q, k = rotary(q), rotary(k)
        y = rearrange(attend(q, k, v), "n heads l d -> n l (heads d)")
        y = rearrange(self.out(y), f"{tokens} c -> (b t) c h w", t=T, h=H, w=W)
        return add(x, y, mix if self.axis == "time" else None)


class Cell(nn.Module):
    """From what its patch says, its own input and that around it, 3x5x5, to the prediction for a cell; zero at start."""

    def __init__(self, features, c_in, hidden, c_out, wrap_x):
        super().__init__()
        self.near = Conv(3 * c_in, features, wrap_x, size=5)
        self.inner, self.out = nn.Conv2d(2 * features + c_in, hidden, 1), nn.Conv2d(hidden, c_out, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features, cells, scale_shift, T, mix=None):
        """(BT, K, H, W), (BT, C, H, W), (BT, 2 hidden, 1, 1) -> (BT, c_out, H, W)"""
        cells = cells.to(features.dtype)
        c = rearrange(cells, "(b t) c h w -> b t c h w", t=T)
        before_after = torch.cat([F.pad(c, (0, 0, 0, 0, 0, 0, 1, -1)), F.pad(c, (0, 0, 0, 0, 0, 0, -1, 1))], 2).flatten(0, 1)
        if mix is not None:
            before_after = mix * before_after
        near = self.near(torch.cat([cells, before_after], 1).contiguous(memory_format=torch.channels_last))
        h = torch.cat([features, near, cells], 1).contiguous(memory_format=torch.channels_last)
        return self.out(modulate_act(self.inner(h), scale_shift))


class UNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpoint_activations = False  # backward computes each block again instead of storing its activations
        widths = [c.width * m for m in c.mults]
        emb = 4 * c.width
        self.embed = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.stem = Conv((c.in_channels + c.cond_channels) * c.patch**2, widths[0], c.wrap_x)
        self.position = nn.Conv2d(8, widths[0], 1)

        self.down, self.downsample, self.up, self.upsample = (nn.ModuleList() for _ in range(4))
        skips, h = [widths[0]], widths[0]  # channels of the stored activations, of the current one
        for i, w in enumerate(widths):
            for _ in range(c.blocks):
                self.down.append(Block(h, w, c.wrap_x))
                skips.append(h := w)
            if i < len(widths) - 1:
                self.downsample.append(Conv(h, h, c.wrap_x, stride=2))
                skips.append(h)
        self.middle = nn.ModuleList([Block(h, h, c.wrap_x), Block(h, h, c.wrap_x)])
        self.attention = nn.ModuleList([Attention(h, c.heads, axis) for axis in ("space", "time")])
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(c.blocks + 1):
                self.up.append(Block(h + skips.pop(), w, c.wrap_x))
                h = w
            if i > 0:
                self.upsample.append(Conv(h, h, c.wrap_x))
        features, hidden = c.width // 8, c.width // 2
        self.norm, self.features = nn.GroupNorm(h // 16, h), Conv(h, features * c.patch**2, c.wrap_x)
        self.cell = Cell(features, c.in_channels + c.cond_channels, hidden, c.in_channels, c.wrap_x)
        self.film_sizes = [2 * b.conv2.out_channels for b in [*self.down, *self.middle, *self.up]] + [2 * hidden]
        self.film = nn.Linear(emb, sum(self.film_sizes))  # scale and shift of every block in one product
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        self.to(memory_format=torch.channels_last)

    def compile_blocks(self, backend="inductor"):
        """torch.compile block by block, in place: blocks of the same shape share one program, so the first step comes soon."""
        torch._dynamo.config.recompile_limit = 64  # one program per shape of a block, never one for any shape
        for module in [*self.down, *self.middle, *self.attention, *self.up, self.cell]:
            module.compile(fullgraph=True, dynamic=False, backend=backend)

    def conditioning(self, logsnr):
        """Scale and shift of every block, a list of (B, 2C). logsnr (B,)"""
        freqs = torch.logspace(-2, 0.3, 32, device=logsnr.device)  # periods from 600 down to 3 in log-SNR
        angle = logsnr.float()[:, None] * freqs  # (B, 32)
        return self.film(self.embed(torch.cat([angle.sin(), angle.cos()], 1))).split(self.film_sizes, 1)

    def position_features(self, H, W, device):
        """Where a cell is, so that the statistics may depend on place (orography, latitude). (1, 8, H, W)"""
        k = torch.arange(1, 5, device=device)[:, None]  # (4, 1)
        y = (torch.arange(H, device=device) + 0.5) / H  # (H,)
        x = (torch.arange(W, device=device) + 0.5) / W  # (W,)
        along_y = torch.cos(math.pi * k * y)  # (4, H)
        if self.config.wrap_x:
            along_x = torch.cat([torch.cos(2 * math.pi * k[:2] * x), torch.sin(2 * math.pi * k[:2] * x)])  # (4, W)
        else:
            along_x = torch.cos(math.pi * k * x)
        return torch.cat([along_y[:, :, None].expand(4, H, W), along_x[:, None, :].expand(4, H, W)])[None]

    def forward(self, z, logsnr, cond=None, mix=None):
        """z (B, C, T, H, W) noisy clips, logsnr (B,), cond (B, K, T, H, W) or None -> F, shaped like z.

        mix (B,) is 0 for clips whose frames have nothing to do with each other: nothing passes between them (Ho et al.
        2022, sec. 3.2). A single frame is such a clip.
        """
        c = self.config
        B, _, T, H, W = z.shape
        if T == 1:
            mix = z.new_zeros(B)
        if cond is not None:
            z = torch.cat([z, cond], 1)
        multiple = c.patch * 2 ** (len(c.mults) - 1)
        pad_y, pad_x = -H % multiple, -W % multiple
        h = rearrange(z, "b c t h w -> (b t) c h w")
        if pad_y:
            h = F.pad(h, (0, 0, 0, pad_y), mode="replicate")
        left = 0
        if pad_x and c.wrap_x:  # real neighbours on both sides; the seam lies in what is cropped
            pad_x += multiple
            left = pad_x // 2
            h = h[..., torch.arange(-left, W + pad_x - left, device=h.device) % W]
        elif pad_x:
            h = F.pad(h, (0, pad_x, 0, 0), mode="replicate")
        cells = h
        h = F.pixel_unshuffle(h, c.patch).contiguous(memory_format=torch.channels_last)
        h = self.stem(h) + self.position(self.position_features(*h.shape[-2:], h.device))
        if mix is not None:
            mix = mix.to(h.dtype).repeat_interleave(T)[:, None, None, None]  # (BT, 1, 1, 1)
        films = iter([f.repeat_interleave(T, 0)[:, :, None, None].to(h.dtype) for f in self.conditioning(logsnr)])

        run = lambda module, *inputs: module(*inputs)
        if self.checkpoint_activations and torch.is_grad_enabled():
            run = partial(checkpoint, use_reentrant=False)
        skips, down, up = [h], iter(self.down), iter(self.up)
        for i in range(len(c.mults)):
            for _ in range(c.blocks):
                h = run(next(down), h, next(films), T, mix)
                skips.append(h)
            if i < len(c.mults) - 1:
                h = self.downsample[i](h)
                skips.append(h)
        h = run(self.middle[0], h, next(films), T, mix)
        for attention in self.attention:
            h = run(attention, h, T, mix)
        h = run(self.middle[1], h, next(films), T, mix)
        for i in range(len(c.mults)):
            for _ in range(c.blocks + 1):
                h = run(next(up), torch.cat([h, skips.pop()], 1), next(films), T, mix)
            if i < len(c.mults) - 1:
                h = self.upsample[i](F.interpolate(h, scale_factor=2, mode="nearest"))
        h = F.pixel_shuffle(self.features(norm_act(h, self.norm, T, mix)), c.patch)
        h = run(self.cell, h, cells, next(films), T, mix)
        return rearrange(h[:, :, :H, left : left + W], "(b t) c h w -> b c t h w", t=T).contiguous()
