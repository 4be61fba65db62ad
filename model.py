"""The networks, and the denoiser that joins one to the Gaussian law of the data.

A compact space-time U-Net sees a noisy clip and its log-SNR, any number of frames on any grid. Frames are
folded into the batch, (B T) C H W in channels_last, so that convolutions in space are plain; time is mixed in
every block by 3 taps, and by attention at the lowest resolution. The last layer goes from patches back to
single cells, with the input of each and of its neighbours beside it: whether one is dry is seen there alone.
Written so that torch.compile(fullgraph=True) fuses the small functions.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

import diffusion

BINS = (-10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10)  # edges of the bins of log-SNR in which errors are looked at


@dataclass
class Config:
    in_channels: int = 1  # variables of the field
    cond_channels: int = 0  # further input channels, not denoised
    width: int = 64  # channels at the first level; a multiple of 16
    mults: tuple = (1, 2)  # channel multiple per level; each level halves the resolution
    blocks: int = 1  # residual blocks per level on the way down; one more on the way up
    patch: int = 2  # pixel-unshuffle at the input: few channels at high resolution are memory-bound
    time_patch: int = 1  # frames of a token of the transformer, of a latent of the autoencoder
    heads: int = 4  # attention heads
    latents: int = 4  # of the autoencoder, for a patch of a frame
    wrap_x: bool = False  # longitude is periodic: convolutions wrap around in x


# ------------------------------------------------------------------------------------------------------------
# blocks


def by_clip(layer, h, T):
    """A layer on whole clips: h (BT, C, H, W) as (B, C, T, H W), which in channels_last is a view."""
    # flattened first: of a single clip torch would else lose track of the order in memory, and copy
    x = layer(rearrange(h.flatten(2), "(b t) c s -> b c t s", t=T))
    return rearrange(x, "b c t (h w) -> (b t) c h w", h=h.shape[-2])


def modulate(h, scale_shift):
    """SiLU(h * (1 + scale) + shift). h (BT, C, H, W), scale_shift (BT, 2C, 1, 1)"""
    scale, shift = scale_shift.chunk(2, 1)
    return F.silu(h * (1 + scale) + shift)


def rotate(x, angle):
    """Rotary embedding: the pairs (x_i, x_{i + d/2}) of x (..., L, d) turned by angle (L, d / 2)."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def turns(length, pairs, device):
    """Angles of rotary positions, (length, pairs): attention then depends on differences of positions."""
    freqs = 100.0 ** (-torch.arange(pairs, device=device) / max(pairs, 1))  # radians a step
    return torch.arange(length, device=device)[:, None] * freqs


def attend(q, k, v):
    """softmax(q k' / sqrt(d)) v, (n, heads, L, d): fused, but on a CPU not if they are short."""
    if q.device.type == "cpu" and q.shape[-2] <= 128:
        return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Conv(nn.Conv2d):
    """Convolution that keeps the size; zeros beyond the edges, or around the globe in x if wrap_x."""

    def __init__(self, c_in, c_out, wrap_x, stride=1, size=3):
        super().__init__(c_in, c_out, size, stride, padding=(size // 2, 0) if wrap_x else size // 2)
        self.around = (size // 2, size // 2, 0, 0) if wrap_x else None

    def forward(self, h):
        return super().forward(h if self.around is None else F.pad(h, self.around, mode="circular"))


class Block(nn.Module):
    """Residual: norm, 3x3 in space, 3 taps in time, norm modulated by the log-SNR, 3x3 in space (0 at start).

    Norms are taken over whole clips: taken frame by frame they would hide that one is wetter than the next.
    Beyond the ends of a clip its first and last frame go on: zeros there made samples wetter at their ends.
    """

    def __init__(self, c_in, c_out, wrap_x):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(c_in // 16, c_in), Conv(c_in, c_out, wrap_x)
        self.time = nn.Conv2d(c_out, c_out, (3, 1), padding=(1, 0), padding_mode="replicate")
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
        h = rearrange(by_clip(self.norm, x, T), f"(b t) c h w -> {tokens} c", t=T)
        qkv = self.qkv(h.contiguous())  # else, of a single clip, torch copies the weights for every cell
        q, k, v = rearrange(qkv, "n l (three heads d) -> three n heads l d", three=3, heads=self.heads)
        if self.axis == "time":
            angle = turns(T, q.shape[-1] // 2, q.device)
            q, k = rotate(q, angle), rotate(k, angle)
        y = self.out(rearrange(attend(q, k, v), "n heads l d -> n l (heads d)"))
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
        before, after = torch.cat([c[:, :1], c[:, :-1]], 1), torch.cat([c[:, 1:], c[:, -1:]], 1)
        around = torch.cat([c, before, after], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        h = torch.cat([features, self.near(around), cells], 1).contiguous(memory_format=torch.channels_last)
        return self.out(modulate(self.inner(h), scale_shift))


def zero(layer):
    """Start a layer at zero, so that a network starts as the Gaussian answer."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------------------------
# the space-time U-Net


class Network(nn.Module):
    """What the networks share: the embedding of the log-SNR, positions, edges, the layer of single cells."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.checkpoint_activations = False  # backward computes each block again: less memory
        emb = 4 * c.width
        self.embed = nn.Sequential(nn.Linear(64, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        channels = c.in_channels + c.cond_channels
        self.cell = Cell(c.width // 8, channels, c.width // 2, c.in_channels, c.wrap_x)

    def embedding(self, logsnr):
        """logsnr (B,) -> (B, 4 width)"""
        freqs = torch.logspace(-2, 0.3, 32, device=logsnr.device)  # periods from 600 down to 3 in log-SNR
        angle = logsnr.float()[:, None] * freqs  # (B, 32)
        return self.embed(torch.cat([angle.sin(), angle.cos()], 1))

    def position_features(self, H, W, device):
        """Where a cell is, so that the statistics may depend on place (orography, latitude). (1, 8, H, W)"""
        k = torch.arange(1, 5, device=device)[:, None]  # (4, 1)
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (H, W))
        along_y, along_x = torch.cos(math.pi * k * y), torch.cos(math.pi * k * x)  # (4, H), (4, W)
        if self.config.wrap_x:
            around = 2 * math.pi * k[:2] * x
            along_x = torch.cat([around.cos(), around.sin()])
        return torch.cat([along_y[:, :, None].expand(4, H, W), along_x[:, None, :].expand(4, H, W)])[None]

    def pad(self, h, multiple):
        """h (BT, C, H, W) padded to a multiple, and the number of columns added on the left."""
        H, W = h.shape[-2:]
        pad_y, pad_x = -H % multiple, -W % multiple
        if pad_y:
            h = F.pad(h, (0, 0, 0, pad_y), mode="replicate")
        if pad_x and self.config.wrap_x:  # real neighbours on both sides; the seam lies in what is cropped
            pad_x += multiple
            left = pad_x // 2
            return h[..., torch.arange(-left, W + pad_x - left, device=h.device) % W], left
        return F.pad(h, (0, pad_x, 0, 0), mode="replicate") if pad_x else h, 0

    def run(self, module, *inputs):
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def compile_blocks(self, backend="inductor"):
        """torch.compile block by block, in place: blocks of one shape share a program, compiled soon."""
        torch._dynamo.config.recompile_limit = 64  # one program per shape of a block, never one for any shape
        for module in self.modules():
            if isinstance(module, (Block, Attention, Layer, Cell)):
                module.compile(fullgraph=True, dynamic=False, backend=backend)


class UNet(Network):
    def __init__(self, config):
        super().__init__(config)
        c = config
        widths = [c.width * m for m in c.mults]
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
        self.norm, self.features = nn.GroupNorm(h // 16, h), Conv(h, c.width // 8 * c.patch**2, c.wrap_x)
        blocks = [*self.down, *self.middle, *self.up]
        self.film_sizes = [2 * b.conv2.out_channels for b in blocks] + [c.width]
        self.film = zero(nn.Linear(4 * c.width, sum(self.film_sizes)))  # scale and shift of all blocks
        self.to(memory_format=torch.channels_last)

    def forward(self, z, logsnr, cond=None):
        """z (B, C, T, H, W) noisy clips, logsnr (B,), cond (B, K, T, H, W) or None -> F, shaped like z."""
        c = self.config
        T, H, W = z.shape[2:]
        h = z if cond is None else torch.cat([z, cond], 1)
        cells, left = self.pad(rearrange(h, "b c t h w -> (b t) c h w"), c.patch * 2 ** (len(c.mults) - 1))
        h = F.pixel_unshuffle(cells, c.patch).contiguous(memory_format=torch.channels_last)
        h = self.stem(h) + self.position(self.position_features(*h.shape[-2:], h.device))
        films = self.film(self.embedding(logsnr)).repeat_interleave(T, 0)[:, :, None, None].to(h)
        films = iter(films.split(self.film_sizes, 1))
        skips, down, up = [h], iter(self.down), iter(self.up)
        for i in range(len(c.mults)):
            for _ in range(c.blocks):
                h = self.run(next(down), h, next(films), T)
                skips.append(h)
            if i < len(c.mults) - 1:
                h = self.downsample[i](h)
                skips.append(h)
        h = self.run(self.middle[0], h, next(films), T)
        for attention in self.attention:
            h = self.run(attention, h, T)
        h = self.run(self.middle[1], h, next(films), T)
        for i in range(len(c.mults)):
            for _ in range(c.blocks + 1):
                h = self.run(next(up), torch.cat([h, skips.pop()], 1), next(films), T)
            if i < len(c.mults) - 1:
                h = self.upsample[i](F.interpolate(h, scale_factor=2, mode="nearest"))
        h = F.pixel_shuffle(self.features(F.silu(by_clip(self.norm, h, T))), c.patch)
        h = self.run(self.cell, h, cells, next(films), T)
        return rearrange(h[:, :, :H, left : left + W], "(b t) c h w -> b c t h w", t=T).contiguous()


# ------------------------------------------------------------------------------------------------------------
# the diffusion transformer


class Layer(nn.Module):
    """Attention between all tokens and a two-layer network, both modulated by the log-SNR and 0 at the start
    (adaLN-zero, Peebles and Xie 2023)."""

    def __init__(self, width, heads, emb):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.film = zero(nn.Linear(emb, 6 * width))

    def forward(self, x, emb, angle):
        """x (B, L, width), emb (B, emb), angle (L, d / 2) of the rotary positions"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.film(emb)[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm(x) * (1 + scale1) + shift1)
        q, k, v = rearrange(qkv, "b l (three heads d) -> three b heads l d", three=3, heads=self.heads)
        y = attend(rotate(q, angle), rotate(k, angle), v)
        x = x + gate1 * self.out(rearrange(y, "b heads l d -> b l (heads d)"))
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiT(Network):
    """A diffusion transformer on space-time patches: as many layers as the U-Net of the same settings has
    blocks, as wide as its lowest level. Same call, same last layer of single cells; any T, H, W."""

    def __init__(self, config):
        super().__init__(config)
        c, channels = config, config.in_channels + config.cond_channels
        width, depth = c.width * c.mults[-1], len(c.mults) * (2 * c.blocks + 1) + 2
        cells = c.time_patch * c.patch**2
        self.stem, self.position = nn.Linear(channels * cells, width), nn.Linear(8, width)
        self.layers = nn.ModuleList([Layer(width, c.heads, 4 * c.width) for _ in range(depth)])
        self.norm, self.features = nn.LayerNorm(width), nn.Linear(width, c.width // 8 * cells)
        self.film = zero(nn.Linear(4 * c.width, c.width))  # of the last layer

    def angles(self, t, h, w, d, device):
        """Angles of rotary positions in t, y and x, (t h w, d / 2)."""
        pairs = max(1, d // 6), (d // 2 - max(1, d // 6)) // 2  # that turn with time, with y; the rest with x
        along_t, along_y = turns(t, pairs[0], device), turns(h, pairs[1], device)
        along_x = turns(w, d // 2 - sum(pairs), device)
        if self.config.wrap_x:  # whole turns around the globe
            k = torch.arange(1, along_x.shape[1] + 1, device=device)
            along_x = 2 * math.pi / w * torch.arange(w, device=device)[:, None] * k
        along = along_t[:, None, None], along_y[None, :, None], along_x[None, None]
        return torch.cat([a.expand(t, h, w, -1) for a in along], -1).flatten(0, 2)

    def forward(self, z, logsnr, cond=None):
        """z (B, C, T, H, W) noisy clips, logsnr (B,), cond (B, K, T, H, W) or None -> F, shaped like z."""
        c, (T, H, W) = self.config, z.shape[2:]
        h = z if cond is None else torch.cat([z, cond], 1)
        cells, left = self.pad(rearrange(h, "b c t h w -> (b t) c h w"), c.patch)
        x = rearrange(cells, "(b t) c h w -> b c t h w", t=T)
        x = F.pad(x, (0, 0, 0, 0, 0, -T % c.time_patch))
        sizes = {"p": c.time_patch, "q": c.patch, "r": c.patch}
        t, h, w = (x.shape[2] // c.time_patch, x.shape[3] // c.patch, x.shape[4] // c.patch)
        x = self.stem(rearrange(x, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", **sizes))
        where = rearrange(self.position_features(h, w, z.device), "1 k h w -> (h w) k")
        x = x + self.position(where.to(x.dtype)).repeat(t, 1)
        emb = self.embedding(logsnr)
        angle = self.angles(t, h, w, x.shape[-1] // c.heads, z.device)
        for layer in self.layers:
            x = self.run(layer, x, emb, angle)
        x = self.features(self.norm(x))
        x = rearrange(x, "b (t h w) (c p q r) -> b (t p) c (h q) (w r)", t=t, h=h, **sizes)
        x = x[:, :T].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        film = self.film(emb).repeat_interleave(T, 0)[:, :, None, None].to(x)
        h = self.run(self.cell, x, cells, film, T)
        return rearrange(h[:, :, :H, left : left + W], "(b t) c h w -> b c t h w", t=T).contiguous()


# ------------------------------------------------------------------------------------------------------------
# compressed video: the autoencoder of latent models


class VAE(nn.Module):
    """A variational autoencoder of clips (Kingma and Welling 2014): n x n cells of p frames become K latents.

    n = patch, p = time_patch. Each p frames are encoded by themselves: where they are known, so are their
    latents, whatever the others are. blocks = 0 is linear, on Gaussian data probabilistic PCA of the patches
    (Tipping and Bishop 1999).
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        cells = c.in_channels * c.time_patch * c.patch**2
        self.encoder, self.decoder = self.layers(cells, 2 * c.latents), self.layers(c.latents, cells)
        self.log_variance = nn.Parameter(torch.zeros(c.in_channels))  # of the decoder, per variable
        self.to(memory_format=torch.channels_last)

    def layers(self, c_in, c_out):
        c, blocks = self.config, []
        for _ in range(2 * c.blocks):
            blocks += [nn.GroupNorm(c.width // 16, c.width), nn.SiLU(), Conv(c.width, c.width, c.wrap_x)]
        if not blocks:
            return nn.Conv2d(c_in, c_out, 1)
        return nn.Sequential(
            Conv(c_in, c.width, c.wrap_x), *blocks, nn.SiLU(), Conv(c.width, c_out, c.wrap_x)
        )

    def patches(self, x, mode="replicate"):
        """x (B, C, T, H, W), padded to whole patches -> (B T / p, C p n n, H / n, W / n)."""
        p, n, (T, H, W) = self.config.time_patch, self.config.patch, x.shape[2:]
        x = F.pad(x, (0, -W % n, 0, -H % n, 0, -T % p), mode=mode)
        return rearrange(x, "b c (t p) (h q) (w r) -> (b t) (c p q r) h w", p=p, q=n, r=n)

    def encode(self, x):
        """Mean and log variance of q(latents | x), each (B, K, T / p, H / n, W / n). x (B, C, T, H, W)"""
        h = self.encoder(self.patches(x)).float()
        return rearrange(h, "(b t) k h w -> b k t h w", b=len(x)).chunk(2, 1)

    def decode(self, latents, size):
        """Mean of p(x | latents), (B, C, p T, *size). latents (B, K, T, h, w)"""
        p, n = self.config.time_patch, self.config.patch
        h = self.decoder(rearrange(latents, "b k t h w -> (b t) k h w")).float()
        x = rearrange(h, "(b t) (c p q r) h w -> b c (t p) (h q) (w r)", b=len(latents), p=p, q=n, r=n)
        return x[..., : size[0], : size[1]]

    def forward(self, x, noise):
        """The two parts of -ELBO in nats: reconstruction, like x, and KL of every latent.

        noise: standard normal, shaped like x; the first K values of a patch are that of its latents.
        """
        mean, log_var = self.encode(x)
        noise = self.patches(noise, "circular")[:, : mean.shape[1]]
        noise = rearrange(noise, "(b t) k h w -> b k t h w", b=len(x))
        drawn = self.decode(mean + (0.5 * log_var).exp() * noise, x.shape[-2:])
        error = x - drawn[:, :, : x.shape[2]]
        log_variance = self.log_variance.view(-1, 1, 1, 1)
        reconstruction = 0.5 * (error**2 / log_variance.exp() + log_variance + math.log(2 * math.pi))
        return reconstruction, 0.5 * (mean**2 + log_var.exp() - log_var - 1)


class LatentCodec:
    """A data.Codec and then an autoencoder: physical clips <-> standardised latents. It takes a codec's
    place: what is trained and sampled through it is a model of latents.

    span: frames of a latent. Clips of other than a multiple of it have no latents.
    """

    def __init__(self, codec, vae, size, mean=0.0, std=1.0, low=None):
        self.codec, self.vae, self.size = codec, vae.eval().requires_grad_(False), size
        self.mean, self.std, self.low = mean, std, low  # (K, 1, 1, 1) each
        self.span = vae.config.time_patch
        self.variables, self.valid = codec.variables, torch.ones(1, 1, 1, 1)

    def fit(self, batches):
        """Standardise by the latents of batches of physical clips."""
        latents = torch.cat([self.encode(x).transpose(0, 1).flatten(1) for x in batches], 1)  # (K, n)
        latents = latents[:, latents.isfinite().all(0)]
        shape = -1, 1, 1, 1
        self.mean, self.std = latents.mean(1).view(shape), latents.std(1).view(shape)
        self.low = (latents.amin(1).view(shape) - self.mean) / self.std
        return self

    def encode(self, x):
        """Physical (B, C, T, H, W) -> latents (B, K, T / span, h, w), NaN where a frame has no data."""
        y = self.codec.encode(x)
        seen = y.isfinite().any((1, 3, 4)).unflatten(1, (-1, self.span)).all(2)
        seen = seen[:, None, :, None, None]  # cells that are missing are at the mean
        latents = (self.vae.encode(y.nan_to_num())[0] - self.mean) / self.std
        return latents.where(seen, torch.nan)

    def decode(self, y, valid=False):
        """The inverse, but for what the autoencoder loses; valid: NaN in cells that never have data."""
        return self.codec.decode(self.vae.decode(y.cpu() * self.std + self.mean, self.size), valid)

    def limits(self):
        return -math.inf, math.inf

    def log_slope(self, x):
        """None: an autoencoder that loses something has no density of fields."""

    def state(self):
        """The codec's, and "latents": tensors and plain values."""
        values = {"mean": self.mean, "std": self.std, "low": self.low, "size": list(self.size)}
        values |= {"config": asdict(self.vae.config), "weights": self.vae.state_dict()}
        return self.codec.state() | {"latents": values}

    @classmethod
    def load(cls, codec, state):
        s = state["latents"]
        vae = VAE(Config(**s["config"]))
        vae.load_state_dict(s["weights"])
        return cls(codec, vae, tuple(s["size"]), s["mean"], s["std"], s["low"])


# ------------------------------------------------------------------------------------------------------------
# the denoiser


class Denoiser(nn.Module):
    """A network added to the exact answer of the data's Gaussian law.

        F = a x_hat + b eps_hat of the Gaussian  +  envelope(logsnr) * network, mode by mode

    EDM's preconditioning with a mean per cell and a variance per mode: a network of zeros is the best linear
    denoiser. What a network is told may show modes that the noise still hides: then there is no envelope. Of
    a clip longer than those trained on, the Gaussian sees the whole and the network pieces of that length;
    what it adds fades from one piece to the next over the half they share.

    param: what F is, a key of diffusion.PARAMS; frames: the longest clips trained on; low (C, 1, 1, 1): the
    lowest value of each variable; linear_skip False: the network alone; dtype: of autocast; valid (C, 1, H,
    W): 0 where a cell never has data, where nothing is added. trust: by bin of log-SNR, 0 where held-out
    clips were estimated better without the network.
    """

    def __init__(
        self, network, gaussian, param, frames, low, linear_skip=True, dtype=torch.float32, valid=None
    ):
        super().__init__()
        self.network, self.gaussian, self.param, self.frames = network, gaussian, param, frames
        self.linear_skip, self.dtype = linear_skip, dtype
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("valid", torch.ones(()) if valid is None else valid, persistent=False)
        self.register_buffer("trust", torch.ones(len(BINS) + 1), persistent=False)
        self.register_buffer("edges", torch.tensor(BINS, dtype=torch.float32), persistent=False)

    def _apply(self, fn, recurse=True):  # .to(device) takes the Gaussian along
        self.gaussian = self.gaussian.map(fn)
        return super()._apply(fn, recurse)

    def autocast(self, z):
        return torch.autocast(z.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def linear(self, z, logsnr, cond=None):
        """F of the Gaussian law alone, like z; cond is not used."""
        a, b = diffusion.PARAMS[self.param](*diffusion.scales(logsnr, z))
        x_hat, eps_hat = self.gaussian.frames(z.shape[2]).estimates(z, logsnr)
        return a * x_hat + b * eps_hat

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
        added = law.scaled(added, law.envelope(logsnr)) if cond is None else added
        trust = self.trust[torch.bucketize(logsnr, self.edges)]  # (B,)
        return a * x_hat + b * eps_hat, diffusion.expand(trust, z) * added

    def forward(self, z, logsnr, cond=None):
        """F of z (B, C, T, H, W), logsnr (B,), cond (B, K, T, H, W) or None; like z, float32."""
        if not self.linear_skip:
            with self.autocast(z):
                return self.network(z, logsnr, cond).float()
        T, n = z.shape[2], self.frames
        if T <= n:
            return sum(self.parts(z, logsnr, cond))
        added, weight = torch.zeros_like(z), z.new_zeros(T, 1, 1)
        t = torch.arange(n, device=z.device)
        share = (2.0 * torch.minimum(t, n - 1 - t) + 1)[:, None, None]  # (n, 1, 1)
        for start in [*range(0, T - n, max(n // 2, 1)), T - n]:
            piece = slice(start, start + n)
            told = None if cond is None else cond[:, :, piece]
            added[:, :, piece] += share * self.parts(z[:, :, piece], logsnr, told)[1]
            weight[piece] += share
        return self.linear(z, logsnr) + added / weight

    def denoise(self, z, logsnr, cond=None):
        """x_hat, the estimate of E[x | z], in z's dtype."""
        logsnr = diffusion.like(logsnr, z)
        return diffusion.to_x(self(z, logsnr, cond).to(z), z, logsnr, self.param)
