"""The networks, and the denoiser that joins one to the Gaussian law of the data.

A compact space-time U-Net sees a noisy clip and its log-SNR, any number of frames on any grid. Frames are
folded into the batch, (B T) C H W in channels_last, so that convolutions in space are plain; time is mixed in
every block by 3 taps, and by attention at the lowest resolution. The last layer goes from patches back to
single cells, with the input of each and of its neighbours beside it: whether one is dry is seen there alone.
Written so that torch.compile(fullgraph=True) fuses the small functions.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

import diffusion


@dataclass
class Config:
    in_channels: int = 1  # variables of the field
    cond_channels: int = 0  # further input channels, not denoised
    width: int = 64  # channels at the first level; a multiple of 16
    mults: tuple = (1, 2)  # channel multiple per level; each level halves the resolution
    blocks: int = 2  # residual blocks per level, on the way down and on the way up
    patch: int = 2  # pixel-unshuffle at the input: few channels at high resolution are memory-bound
    heads: int = 4  # attention heads
    wrap_x: bool = False  # longitude is periodic: convolutions wrap around in x


# ------------------------------------------------------------------------------------------------------------
# blocks


def by_clip(layer, h, T):
    """A layer on whole clips: h (BT, C, H, W) as (B, C, T, H W), which in channels_last is a view."""
    x = layer(rearrange(h, "(b t) c h w -> b c t (h w)", t=T))
    return rearrange(x, "b c t (h w) -> (b t) c h w", h=h.shape[-2])


def modulate(h, scale_shift):
    """SiLU(h * (1 + scale) + shift). h (BT, C, H, W), scale_shift (BT, 2C, 1, 1)"""
    scale, shift = scale_shift.chunk(2, 1)
    return F.silu(h * (1 + scale) + shift)


def rotary(x):
    """Rotary embedding along dim -2: attention then depends on time differences. x (..., T, d)"""
    T, d = x.shape[-2:]
    freqs = 100.0 ** (-torch.arange(0, d, 2, device=x.device) / d)  # (d/2,) radians per frame
    angle = torch.arange(T, device=x.device)[:, None] * freqs  # (T, d/2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Conv(nn.Conv2d):
    """Convolution that keeps the size; zeros beyond the edges, or around the globe in x if wrap_x."""

    def __init__(self, c_in, c_out, wrap_x, stride=1, size=3):
        super().__init__(c_in, c_out, size, stride, padding=(size // 2, 0) if wrap_x else size // 2)
        self.around = (size // 2, size // 2, 0, 0) if wrap_x else None

    def forward(self, h):
        return super().forward(h if self.around is None else F.pad(h, self.around, mode="circular"))


class Block(nn.Module):
    """Residual: norm, 3x3 in space, 3 taps in time, norm modulated by the log-SNR, 3x3 in space (0 at start).

    Norms are those of a clip: each frame by itself, none could be wetter than the next.
    """

    def __init__(self, c_in, c_out, wrap_x):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c_in // 16, c_in), Conv(c_in, c_out, wrap_x)
        self.time = nn.Conv2d(c_out, c_out, (3, 1), padding=(1, 0))
        self.norm2, self.conv2 = nn.GroupNorm(c_out // 16, c_out), Conv(c_out, c_out, wrap_x)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        zero(self.conv2)

    def forward(self, x, scale_shift, T):
        h = self.conv1(F.silu(by_clip(self.norm1, x, T)))
        h = h + by_clip(self.time, h, T)
        return self.skip(x) + self.conv2(modulate(by_clip(self.norm2, h, T), scale_shift))


class Attention(nn.Module):
    """Self-attention over space (within a frame) or over time (at a cell), residual, zero at start."""

    def __init__(self, c, heads, axis):
        super().__init__()
        self.heads, self.axis = heads, axis
        self.norm, self.qkv, self.out = nn.GroupNorm(1, c), nn.Linear(c, 3 * c, bias=False), nn.Linear(c, c)
        zero(self.out)

    def forward(self, x, T):
        tokens = {"space": "(b t) (h w)", "time": "(b h w) t"}[self.axis]
        qkv = self.qkv(rearrange(by_clip(self.norm, x, T), f"(b t) c h w -> {tokens} c", t=T))
        q, k, v = rearrange(qkv, "n l (three heads d) -> three n heads l d", three=3, heads=self.heads)
        if self.axis == "time":
            q, k = rotary(q), rotary(k)
        y = self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n heads l d -> n l (heads d)"))
        return x + rearrange(y, f"{tokens} c -> (b t) c h w", t=T, h=x.shape[-2], w=x.shape[-1])


class Cell(nn.Module):
    """From what its patch says and the input in and around it, 3x5x5, to the answer for it; 0 at start."""

    def __init__(self, features, c_in, hidden, c_out, wrap_x):
        super().__init__()
        self.near = Conv(3 * c_in, features, wrap_x, size=5)
        self.inner, self.out = nn.Conv2d(2 * features + c_in, hidden, 1), nn.Conv2d(hidden, c_out, 1)
        zero(self.out)

    def forward(self, features, cells, scale_shift, T):
        """(BT, K, H, W), (BT, C, H, W), (BT, 2 hidden, 1, 1) -> (BT, c_out, H, W)"""
        cells = cells.to(features.dtype)
        c = rearrange(cells, "(b t) c h w -> b t c h w", t=T)
        before, after = (F.pad(c, (0, 0) * 3 + ends).flatten(0, 1) for ends in ((1, -1), (-1, 1)))
        around = torch.cat([cells, before, after], 1).contiguous(memory_format=torch.channels_last)
        h = torch.cat([features, self.near(around), cells], 1).contiguous(memory_format=torch.channels_last)
        return self.out(modulate(self.inner(h), scale_shift))


def zero(layer):
    """Start a layer at zero, so that a network starts as the Gaussian answer."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# ------------------------------------------------------------------------------------------------------------
# the space-time U-Net


class UNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpoint_activations = False  # backward computes each block again: less memory
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
        blocks = [*self.down, *self.middle, *self.up]
        self.film_sizes = [2 * b.conv2.out_channels for b in blocks] + [2 * hidden]
        self.film = nn.Linear(emb, sum(self.film_sizes))  # scale and shift of every block in one product
        zero(self.film)
        self.to(memory_format=torch.channels_last)

    def compile_blocks(self, backend="inductor"):
        """torch.compile block by block, in place: blocks of one shape share a program, compiled soon."""
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
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (H, W))
        along_y, along_x = torch.cos(math.pi * k * y), torch.cos(math.pi * k * x)  # (4, H), (4, W)
        if self.config.wrap_x:
            around = 2 * math.pi * k[:2] * x
            along_x = torch.cat([around.cos(), around.sin()])
        return torch.cat([along_y[:, :, None].expand(4, H, W), along_x[:, None, :].expand(4, H, W)])[None]

    def pad(self, h):
        """h (BT, C, H, W) padded to what the levels divide, and the number of columns added on the left."""
        multiple = self.config.patch * 2 ** (len(self.config.mults) - 1)
        H, W = h.shape[-2:]
        pad_y, pad_x = -H % multiple, -W % multiple
        if pad_y:
            h = F.pad(h, (0, 0, 0, pad_y), mode="replicate")
        if pad_x and self.config.wrap_x:  # real neighbours on both sides; the seam lies in what is cropped
            pad_x += multiple
            left = pad_x // 2
            return h[..., torch.arange(-left, W + pad_x - left, device=h.device) % W], left
        return F.pad(h, (0, pad_x, 0, 0), mode="replicate") if pad_x else h, 0

    def forward(self, z, logsnr, cond=None):
        """z (B, C, T, H, W) noisy clips, logsnr (B,), cond (B, K, T, H, W) or None -> F, shaped like z."""
        c = self.config
        T, H, W = z.shape[2:]
        h = z if cond is None else torch.cat([z, cond], 1)
        cells, left = self.pad(rearrange(h, "b c t h w -> (b t) c h w"))
        h = F.pixel_unshuffle(cells, c.patch).contiguous(memory_format=torch.channels_last)
        h = self.stem(h) + self.position(self.position_features(*h.shape[-2:], h.device))
        films = iter([f.repeat_interleave(T, 0)[:, :, None, None].to(h) for f in self.conditioning(logsnr)])

        def run(module, *inputs):
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(module, *inputs, use_reentrant=False)
            return module(*inputs)

        skips, down, up = [h], iter(self.down), iter(self.up)
        for i in range(len(c.mults)):
            for _ in range(c.blocks):
                h = run(next(down), h, next(films), T)
                skips.append(h)
            if i < len(c.mults) - 1:
                h = self.downsample[i](h)
                skips.append(h)
        h = run(self.middle[0], h, next(films), T)
        for attention in self.attention:
            h = run(attention, h, T)
        h = run(self.middle[1], h, next(films), T)
        for i in range(len(c.mults)):
            for _ in range(c.blocks + 1):
                h = run(next(up), torch.cat([h, skips.pop()], 1), next(films), T)
            if i < len(c.mults) - 1:
                h = self.upsample[i](F.interpolate(h, scale_factor=2, mode="nearest"))
        h = F.pixel_shuffle(self.features(F.silu(by_clip(self.norm, h, T))), c.patch)
        h = run(self.cell, h, cells, next(films), T)
        return rearrange(h[:, :, :H, left : left + W], "(b t) c h w -> b c t h w", t=T).contiguous()


# ------------------------------------------------------------------------------------------------------------
# the denoiser


class Denoiser(nn.Module):
    """A network added to the exact answer of the data's Gaussian law.

        F = a x_hat + b eps_hat of the Gaussian  +  envelope(logsnr) * network, mode by mode

    EDM's preconditioning with a mean per cell and a variance per mode: a network of zeros is the best linear
    denoiser. Of a clip longer than those trained on the Gaussian sees the whole, the network pieces as long
    as those, and what it adds fades from one to the next over the half they share.

    param: what F is, a key of diffusion.PARAMS; frames: the longest clips trained on; low (C, 1, 1, 1): the
    lowest value of each variable; linear_skip False: the network alone; dtype: of autocast; valid (C, 1, H,
    W): 0 where a cell never has data, where nothing is added.
    """

    def __init__(
        self, network, gaussian, param, frames, low, linear_skip=True, dtype=torch.float32, valid=None
    ):
        super().__init__()
        self.network, self.gaussian, self.param, self.frames = network, gaussian, param, frames
        self.linear_skip, self.dtype = linear_skip, dtype
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("valid", torch.ones(()) if valid is None else valid, persistent=False)

    def _apply(self, fn, recurse=True):  # .to(device) takes the Gaussian along
        self.gaussian = self.gaussian.map(fn)
        return super()._apply(fn, recurse)

    def autocast(self, z):
        return torch.autocast(z.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def parts(self, z, logsnr, cond):
        """F of the Gaussian and what the network adds, both float32. z of at most `frames` frames.

        The network sees the linear estimates of x and eps, in place of z where the finest scales are faint
        beside the weather as a whole, and how far z is above the lowest value in units of the noise: in a dry
        cell that is the noise itself.
        """
        law = self.gaussian.frames(z.shape[2])
        alpha, sigma = diffusion.scales(logsnr, z)
        a, b = diffusion.PARAMS[self.param](alpha, sigma)
        x_hat, eps_hat = law.estimates(z, logsnr)
        above = torch.asinh((z - alpha * self.low) / sigma)
        seen = [(x_hat - law.mean) / law.spread(logsnr), above] + ([] if cond is None else [cond])
        with self.autocast(z):
            added = self.valid * self.network(eps_hat, logsnr, torch.cat(seen, 1)).float()
        return a * x_hat + b * eps_hat, law.scaled(added, law.envelope(logsnr))

    def forward(self, z, logsnr, cond=None):
        """F of z (B, C, T, H, W), logsnr (B,), cond (B, K, T, H, W) or None; like z, float32."""
        if not self.linear_skip:
            with self.autocast(z):
                return self.network(z, logsnr, cond).float()
        T, n = z.shape[2], self.frames
        if T <= n:
            return sum(self.parts(z, logsnr, cond))
        a, b = diffusion.PARAMS[self.param](*diffusion.scales(logsnr, z))
        x_hat, eps_hat = self.gaussian.frames(T).estimates(z, logsnr)
        added, weight = torch.zeros_like(z), z.new_zeros(T, 1, 1)
        t = torch.arange(n, device=z.device)
        share = (2.0 * torch.minimum(t, n - 1 - t) + 1)[:, None, None]  # (n, 1, 1)
        for start in [*range(0, T - n, max(n // 2, 1)), T - n]:
            piece = slice(start, start + n)
            told = None if cond is None else cond[:, :, piece]
            added[:, :, piece] += share * self.parts(z[:, :, piece], logsnr, told)[1]
            weight[piece] += share
        return a * x_hat + b * eps_hat + added / weight

    def denoise(self, z, logsnr, cond=None):
        """x_hat, the estimate of E[x | z], in z's dtype."""
        logsnr = logsnr.to(z)
        return diffusion.to_x(self(z, logsnr, cond).to(z), z, logsnr, self.param)
