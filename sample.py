"""Generate climate clips from a checkpoint, draw them, and compare their statistics with held-out data.

    python sample.py --steps=256
    python sample.py --task=forecast --known=2 --members=16

Edit the settings below or override any of them as --key=value; --help lists them.
"""
import hashlib
import json
import math
import shutil
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import diffusion
import train
from train import require

# ----------------------------------------------------------------------------------------------------------------------
out_dir = "out"  # where train.py left ckpt.pt; writes out_dir/samples/
num_samples = 128  # clips to draw in all, the members of an ensemble counted one by one
batch_size = 32  # clips at a time; does not change the result
steps = 64  # sampler steps
sampler = "dpmpp_sde"  # ancestral, ddim, dpmpp, dpmpp_sde, heun, sde, ode, pc, langevin
spacing = "auto"  # steps even in log-SNR where the data's modes emerge (auto); in time of the schedule trained on (time), in log-SNR over its range (logsnr), EDM's (rho)
eta = 0.0  # of ddim: 0 deterministic, 1 ancestral
variance = 0.0  # of ancestral: 0 lower, 1 upper bound, between them interpolated
churn = 0.0  # of heun: relative noise added before a step
corrections = 0  # of pc and langevin: Langevin steps per level; 0 is 1 for pc, 10 for langevin
snr = 0.16  # of pc and langevin: signal-to-noise ratio of a Langevin step
clip = "auto"  # clamp x_hat to the range of the training data: auto (for eps and score, which divide by alpha), true, false
# what is known: the task says which part y = A x of the field
task = "generate"  # generate; forecast, hindcast (the first, last frames are known); interpolate (every n-th); inpaint (what is not NaN); superres (block means); extend (go on and on); loop (the end meets the beginning); bridge (from one clip to the next); edit (noise fields to edit_logsnr and denoise: SDEdit); encode (to latents and back); morph (between two fields, through latents)
input = ""  # file with the fields that are given; empty takes held-out clips
known = 2  # frames known to forecast, hindcast and bridge, and handed from window to window of a long sequence
every = 2  # of interpolate: every n-th frame is known
factor = 4  # of superres: means over factor x factor cells are known
length = 0  # frames of the result; 0 is one window (extend: four, loop: until it closes)
frames = 0  # frames of a window, what the network sees at once; 0 is as trained
reverse = False  # of extend: backwards in time
members = 1  # draws for each condition, an ensemble; num_samples / members conditions
method = "auto"  # trained (a checkpoint of train.py --condition=known), moment_matching, guidance (reconstruction), imputation; auto is the first possible
guidance_weight = 3.0  # of method guidance
cg_steps = 8  # of method moment_matching: conjugate gradients, each a backward pass through the network
obs_std = 0.0  # of method moment_matching: error of what is known, in standard deviations; 0 is met exactly
guidance_scale = 1.0  # what conditions that the network was trained with count: 0 nothing, 1 as they are, above 1 exaggerated
edit_logsnr = -2.0  # of edit: how far the fields are noised; lower keeps less
theory = False  # also draw theory.png: schedules, the forward process, x_hat step by step
seed = 0  # sample i depends on (seed, i) alone
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16 (autocast)
compile = "auto"  # torch.compile: auto (on CUDA), true, false
checkpoint_activations = False  # guidance computes activations again in the backward pass: less memory
verify = True  # compare with held-out clips: verify.json, verify.png
dry = 0.01  # a variable with a floor (rain) is dry up to this much above it, in its units
# ----------------------------------------------------------------------------------------------------------------------

FRAME_MASKS = {"forecast": "prefix", "hindcast": "suffix", "interpolate": "every", "bridge": "ends"}
GIVEN = (*FRAME_MASKS, "inpaint", "superres")  # tasks with known entries
METHODS = ("trained", "moment_matching", "guidance", "imputation")
CHOICES = {"task": ("generate", *GIVEN, "extend", "loop", "edit", "encode", "morph"), "method": ("auto", *METHODS), "sampler": tuple(diffusion.SAMPLERS), "spacing": ("auto", "time", "logsnr", "rho"), "clip": ("auto", "true", "false"), **{k: train.CHOICES[k] for k in ("dtype", "compile")}}


def check(c):
    for name in ("num_samples", "batch_size", "steps"):
        require(getattr(c, name) >= 1, f"--{name}={getattr(c, name)} must be at least 1")
    require(0 <= c.eta <= 1 and 0 <= c.variance <= 1, "--eta and --variance must lie in [0, 1]")
    require(c.churn >= 0 and c.corrections >= 0 and c.snr > 0 and c.seed >= 0, "--churn, --seed and --corrections must not be negative, --snr must be positive")
    require(c.task not in ("encode", "morph") or (c.sampler in ("ode", "ddim", "heun", "dpmpp") and c.eta == c.churn == 0), f"--task={c.task} needs a deterministic sampler: --sampler=ode (or heun, dpmpp, ddim)")
    require(not c.input or c.task != "generate", "--input belongs to another --task than generate")
    require(c.task != "morph" or c.num_samples >= 2, "--task=morph needs --num_samples of at least 2")
    for name, default, key, owners in (
        ("eta", 0.0, "sampler", ("ddim",)), ("variance", 0.0, "sampler", ("ancestral",)), ("churn", 0.0, "sampler", ("heun",)), ("corrections", 0, "sampler", ("pc", "langevin")),
        ("snr", 0.16, "sampler", ("pc", "langevin")), ("edit_logsnr", -2.0, "task", ("edit",)), ("every", 2, "task", ("interpolate",)), ("factor", 4, "task", ("superres",)),
        ("reverse", False, "task", ("extend",)), ("members", 1, "task", (*GIVEN, "extend", "loop")), ("guidance_weight", 3.0, "method", ("guidance",)), ("cg_steps", 8, "method", ("auto", "moment_matching")),
        ("obs_std", 0.0, "method", ("auto", "moment_matching")), ("method", "auto", "task", (*GIVEN, "extend", "loop", "generate")), ("length", 0, "task", ("generate", *FRAME_MASKS, "inpaint", "extend", "loop")),
        ("frames", 0, "task", ("generate", *GIVEN, "extend", "loop")),
    ):  # fmt: skip
        require(getattr(c, name) == default or getattr(c, key) in owners, f"--{name} belongs to --{key}={' or '.join(owners)}, not {getattr(c, key)}")
    for name, least in (("known", 1), ("every", 2), ("factor", 2), ("length", 0), ("frames", 0), ("members", 1), ("cg_steps", 1), ("obs_std", 0), ("guidance_weight", 0), ("guidance_scale", 0)):
        require(getattr(c, name) >= least, f"--{name}={getattr(c, name)} must be at least {least}")
    require(c.num_samples % c.members == 0, f"--num_samples={c.num_samples} must be a multiple of --members={c.members}")


def pose(c, settings, meta):
    """What is asked: the known part of each clip to draw, for R = num_samples / members conditions. A namespace of

    y, mask (R, C, L, H / factor, W / factor), standardised; factor; truth (R, C, L, H, W) physical, NaN where unknown, or
    None; windows, the frame numbers of the clips to draw in turn; told (R, K, L, H, W) or None; hours (R, L) of the
    calendar; reference, the frame that lead times count from.
    """
    T, R, K, size, record = c.frames or settings.frames, c.num_samples // c.members, c.known, tuple(meta["size"]), None
    L = c.length or {"extend": 4 * T, "loop": 2 * (T - K)}.get(c.task, T)
    require(K < T or c.task not in (*FRAME_MASKS, "extend", "loop"), f"--known={K} leaves nothing of {T} frames to draw")
    require(L >= T or c.task not in ("extend", "loop"), f"--length={L} is less than a window of {T} frames")
    require(c.task != "loop" or L >= 2 * (T - K), f"--length={L}: a loop of windows of {T} frames that share {K} has at least {2 * (T - K)}")
    require(c.task != "bridge" or L > 2 * K, f"--length={L} leaves nothing between {K} frames on either side")
    factor, shape = c.factor if c.task == "superres" else 1, (R, len(meta["names"]), L, *size)
    require(not any(n % factor for n in size), f"--factor={factor} does not divide the grid of {size[0]} x {size[1]}")
    clips, start, before = np.full(shape, np.nan, np.float32), np.zeros(R, int), 0  # before: frames ahead of those read
    if c.task in GIVEN or c.task in ("edit", "encode", "morph") or c.input or meta["conditions"]:
        record = data.open_climate(c.input or settings.dataset, settings.variables, settings.size, settings.seed)
        fine = list(record.size) == meta["size"] or (c.task == "superres" and [n * factor for n in record.size] == meta["size"])
        same = record.names == meta["names"] or (c.input.endswith(".npy") and len(record.names) == len(meta["names"]))  # .npy has no names
        require(same and fine, f"--input={c.input} has variables {record.names} on a grid {record.size}; the checkpoint needs {meta['names']} on {size}")
        n = {"extend": T, "loop": T, "bridge": K}.get(c.task, L)  # frames to read of every clip
        starts = data.runs(record, n) if c.input else data.split_windows(record, max(n, settings.frames))[1]
        if not len(starts) and c.task in ("forecast", "hindcast"):  # only the known frames: nothing to verify with
            n, starts = K, data.runs(record, K)
        require(len(starts), f"--input={c.input} has no {n} consecutive frames")
        start = starts[np.linspace(0, len(starts) - 1, R + (c.task == "bridge")).astype(int)]
        read = data.clips(record, start, n)
        if c.task == "bridge":  # from the end of one clip to the beginning of the next
            clips[:, :, :K], clips[:, :, L - K :], start = read[:-1], read[1:], start[:-1]
        elif c.task not in ("generate", "extend", "loop") or c.input:
            before = L - n if c.task == "hindcast" or c.reverse else 0
            clips = clips if read.shape[-2:] == size else np.full((*shape[:3], *record.size), np.nan, np.float32)
            clips[:, :, before : before + n] = read
    y, mask = data.normalise(clips, meta["transform"])
    known = np.ones(L, bool)
    if c.task in FRAME_MASKS:
        known = data.KNOWN[FRAME_MASKS[c.task]](np.arange(L), L, c.every if c.task == "interpolate" else K)
    elif c.task in ("generate", "edit", "encode", "morph"):
        known[:] = False
    mask = mask * torch.from_numpy(known)[:, None, None]
    if c.task == "inpaint" and not c.input:  # for want of a hole, the middle is hidden
        mask[..., size[0] // 4 : -(-3 * size[0] // 4), size[1] // 4 : -(-3 * size[1] // 4)] = 0
    require(c.task != "inpaint" or bool((mask * meta["valid"] < meta["valid"]).any()), f"--input={c.input} has no NaN: nothing is to be filled in")
    if clips.shape[-2:] == size:  # means of the blocks without a gap
        blocks = diffusion.Observation(y, torch.ones(*shape[:3], size[0] // factor, size[1] // factor), factor)
        y, mask = blocks.A(y), (blocks.A(mask) > 0.999).float()
    hours = (np.arange(L) - before) * meta["step_hours"] + (record.hours[start][:, None] if record else np.zeros((R, 1)))
    told = data.condition_values(record, meta["conditions"], np.maximum(start[:, None] + np.arange(L) - before, 0), hours) if meta["conditions"] else None
    return SimpleNamespace(
        y=y * mask, mask=mask, factor=factor, truth=clips if clips.shape == shape and np.isfinite(clips).any() else None, told=told, hours=hours,
        windows=data.windows(L, T, K, c.task == "loop", c.reverse or c.task == "hindcast"), reference={"forecast": K - 1, "hindcast": L - K}.get(c.task, 0),
    )  # fmt: skip


def guided(c, run, settings, meta, known, told):
    """denoise(z, logsnr) -> x_hat for clips with this Observation, told these condition values (or None), by c.method."""
    z, valid = known.lift(known.y), meta["valid"].to(known.y)

    def plain(channels, told):
        cond = train.condition_channels(meta, z, valid, channels, told)
        denoise = diffusion.make_denoiser(lambda z, logsnr, _: run(z, logsnr, cond), settings.param)
        if settings.param in ("eps", "score") if c.clip == "auto" else c.clip == "true":
            denoise = diffusion.clip(denoise, min(f["low"] for f in meta["transform"]), max(f["high"] for f in meta["transform"]))
        return denoise

    denoise = plain(known.channels() if c.method == "trained" else None, told)
    if c.guidance_scale != 1:
        denoise = diffusion.classifier_free(denoise, plain(None, None), c.guidance_scale)
    if not known.mask.any():
        return denoise
    if c.method == "moment_matching":
        return diffusion.moment_matching(denoise, known, c.cg_steps, c.obs_std)
    if c.method == "guidance":
        return diffusion.reconstruction_guidance(denoise, known, c.guidance_weight)
    return diffusion.imputation(denoise, known)  # of a network trained with conditions, it makes them exact


def encode(denoise, x, grid):
    """The latents of fields x (B, ...): the probability-flow ODE run from data to noise through the grid. (B, ...)"""
    z = diffusion.diffuse(x, grid[-2:-1], torch.zeros_like(x))
    *_, (latent, _) = diffusion.sample(denoise, z, grid[:-1].flip(0), diffusion.ode)
    return latent


def make_step(c):
    """The sampler's step function with its options."""
    options = {"ancestral": {"variance": c.variance}, "ddim": {"eta": c.eta}, "heun": {"churn": c.churn}}
    options |= {name: {"snr": c.snr} | ({"num_corrections": c.corrections} if c.corrections else {}) for name in ("pc", "langevin")}
    return partial(diffusion.SAMPLERS[c.sampler], **options.get(c.sampler, {}))


def make_grid(c, settings, meta):
    """The log-SNRs to visit, (steps + 1,).

    Outside the range where modes emerge, widened by 5, a step changes nothing; a grid even in log-SNR inside it gives
    every mode the same number of steps, where one even in time of a +-30 cosine starves the mean of the field.
    """
    name, lo, hi, *rest = train.levels(settings, meta)
    if c.spacing in ("auto", "rho"):
        ends = diffusion.logsnr_schedule([1.0, 0.0], name, lo, hi, *rest) if name == "ddpm" or name == "linear" else (lo, hi)
        first, last = diffusion.spectrum_range(meta["modes"], margin=5.0)
        lo, hi = max(first, float(ends[0])), min(last, float(ends[1]))
    name, rest = {"auto": ("logsnr", []), "logsnr": ("logsnr", []), "rho": ("rho", []), "time": (name, rest)}[c.spacing]
    grid = diffusion.sampling_grid(c.steps, name, lo, hi, *rest)
    if c.task == "edit":
        require(grid[0] <= c.edit_logsnr <= grid[-2], f"--edit_logsnr={c.edit_logsnr} lies outside the grid of log-SNR from {grid[0]:.1f} to {grid[-2]:.1f}")
        grid = torch.cat([grid.new_tensor([c.edit_logsnr]), grid[grid > c.edit_logsnr]])
    if c.sampler in ("sde", "langevin"):  # explicit in log-SNR, or nothing but Langevin steps between levels
        widest = float(grid[:-1].diff().max()) if len(grid) > 2 else math.inf
        need = f"at least {math.floor((hi - lo) / 2) + 2} --steps" if c.spacing in ("auto", "logsnr") else "--spacing=auto"
        require(widest < 2, f"--sampler={c.sampler} is unstable with steps over 2 in log-SNR (here {widest:.1f}): use {need}")
    return grid


def generators(seed, indices):
    """One CPU generator per sample and a noise(z) that draws from them: sample i is the same in any batch, on any device."""
    gens = [torch.Generator().manual_seed(int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] >> 1)) for i in indices]
    return lambda z: torch.stack([torch.randn(z.shape[1:], generator=g) for g in gens]).to(z)


def fingerprint(c, path):
    """Names a set of samples by what they depend on: the checkpoint and the settings, not the batch size or the machine."""
    free = ("batch_size", "device", "compile", "checkpoint_activations", "verify", "theory", "dry", *(["num_samples"] if c.task == "generate" else []))
    stamp = [Path(c.input).stat().st_mtime_ns] if c.input else []
    text = json.dumps([{k: v for k, v in vars(c).items() if k not in free}, stamp], sort_keys=True)
    return hashlib.sha256(path.read_bytes() + text.encode()).hexdigest()[:12]


# ----------------------------------------------------------------------------------------------------------------------
# pictures

RAIN = ((255, 255, 255), (205, 229, 245), (124, 185, 226), (46, 120, 190), (49, 54, 149), (118, 42, 131), (231, 41, 138))
DIVERGING = ((33, 57, 132), (67, 130, 190), (160, 205, 226), (247, 247, 247), (246, 184, 150), (208, 84, 66), (128, 12, 38))
NO_DATA, INK, GREY, FIRST, SECOND = (190, 190, 190), (30, 30, 30), (215, 215, 215), (20, 20, 20), (214, 69, 47)


def font(size=12):
    return ImageFont.load_default(size)


def colours(x, low, high, palette, gamma=1.0):
    """Field -> RGB uint8 (..., 3); grey where there is no data; gamma < 1 spreads the low values."""
    u = np.clip((np.nan_to_num(x, nan=low) - low) / (high - low), 0, 1) ** gamma * (len(palette) - 1)
    i = np.minimum(u.astype(int), len(palette) - 2)
    p = np.asarray(palette, np.float32)
    rgb = p[i] + (u - i)[..., None] * (p[i + 1] - p[i])
    return np.where(np.isfinite(x)[..., None], rgb, NO_DATA).astype(np.uint8)


def scale_of(x, floor):
    """(low, high, palette, gamma) for a variable: sequential from a floor of 0 (rain), else diverging around the mean."""
    if floor == 0:
        return 0.0, float(np.nanquantile(x, 0.999)) or 1.0, RAIN, 0.5
    mean = float(np.nanmean(x))
    reach = float(np.nanquantile(np.abs(x - mean), 0.995)) or 1.0
    return mean - reach, mean + reach, DIVERGING, 1.0


def tile(x, scale, factor):
    """A picture of one field (H, W), every cell factor x factor pixels."""
    return Image.fromarray(colours(x, *scale)).resize((x.shape[1] * factor, x.shape[0] * factor), Image.NEAREST)


def colour_bar(draw, image, x, y, height, scale, label):
    """A vertical bar at (x, y) with five values, and its label above."""
    low, high, palette, gamma = scale
    bar = colours(np.linspace(1, 0, height)[:, None].repeat(14, 1), 0, 1, palette)
    image.paste(Image.fromarray(bar), (x, y))
    draw.rectangle((x, y, x + 13, y + height - 1), outline=INK)
    for u in np.linspace(0, 1, 5):
        value = low + u ** (1 / gamma) * (high - low)
        draw.text((x + 19, y + (height - 1) * (1 - u)), f"{value:.3g}", INK, font(11), anchor="lm")
    draw.text((x, y - 8), label, INK, font(12), anchor="ls")


def picture_rows(x, problem, members, channel, count=6):
    """What the pictures show: (label, fields (T, H, W), known (T,)) per row; of conditions what is given, the truth, draws."""
    known = (problem.mask[:, 0].flatten(2).amin(-1) > 0).numpy() & (problem.factor == 1)  # (R, T)
    if not problem.mask.any():
        return [(f"clip {i}", x[i, channel], known[0]) for i in range(min(count, len(x)))]
    rows = []
    for r in range(min(2, len(known))):
        rows.append(("given", problem.lifted[r, channel], known[r]))
        if problem.unseen is not None:
            rows.append(("truth", problem.truth[r, channel], known[r]))
        rows += [(f"draw {m}" if members > 1 else "drawn", x[r * members + m, channel], known[r]) for m in range(min(members, 3))]
    return rows


def contact_sheet(path, rows, meta, channel, lead):
    """Rows of picture_rows down, at most 12 frames across, one colour scale; known frames are framed. lead (T,) hours."""
    attrs, floor = meta["attrs"][channel], meta["transform"][channel]["floor"]
    chosen = np.unique(np.linspace(0, len(lead) - 1, min(len(lead), 12)).astype(int))
    H, W = rows[0][1].shape[-2:]
    scale, factor = scale_of(np.stack([x for _, x, _ in rows]), floor), max(1, round(104 / max(H, W)))
    w, h, gap, left, top = W * factor, H * factor, 4, 64, 50
    image = Image.new("RGB", (left + len(chosen) * (w + gap) + 96, top + len(rows) * (h + gap) + 8), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 6), f"{attrs.get('long_name', meta['names'][channel])}: generated clips" + (", framed where known" if any(k.any() for *_, k in rows) else ""), INK, font(14))
    for k, t in enumerate(chosen):
        draw.text((left + k * (w + gap) + w / 2, top - 6), f"{lead[t]:+g} h", INK, font(11), anchor="ms")
    for i, (label, x, known) in enumerate(rows):
        draw.text((left - 8, top + i * (h + gap) + h / 2), label, INK, font(11), anchor="rm")
        for k, t in enumerate(chosen):
            at = (left + k * (w + gap), top + i * (h + gap))
            image.paste(tile(oriented(x, meta)[t], scale, factor), at)
            draw.rectangle((at[0] - 1, at[1] - 1, at[0] + w, at[1] + h), outline=INK if known[t] else GREY, width=2 if known[t] else 1)
    colour_bar(draw, image, left + len(chosen) * (w + gap) + 12, top + 6, min(len(rows) * (h + gap), 260) - 10, scale, attrs.get("units", ""))
    with data.replacing(path) as f:
        image.save(f, "PNG")


def animation(path, rows, meta, channel):
    """A looping GIF of the rows of picture_rows, or of a square of clips."""
    side = math.isqrt(len(rows)) if len({label.split()[0] for label, *_ in rows}) == 1 else len(rows)
    rows = rows[: side * side]
    x = np.stack([oriented(x, meta) for _, x, _ in rows])  # (N, T, H, W)
    scale, factor = scale_of(x, meta["transform"][channel]["floor"]), max(1, round(128 / max(x.shape[-2:])))
    h, w, frames = x.shape[-2] * factor + 4, x.shape[-1] * factor + 4, []
    for t in range(x.shape[1]):
        frame = Image.new("RGB", (side * w, -(-len(x) // side) * h), "white")
        for i in range(len(x)):
            frame.paste(tile(x[i, t], scale, factor), (i % side * w + 2, i // side * h + 2))
        frames.append(frame.quantize(96))
    with data.replacing(path) as f:
        frames[0].save(f, "GIF", save_all=True, append_images=frames[1:], duration=250, loop=0)


def oriented(x, meta):
    """North up: rows flipped for the picture alone if the y coordinate increases."""
    c = meta["coords"].get(meta["dims"][0])
    y = None if c is None else np.asarray(c["values"])
    return x[..., ::-1, :] if y is not None and y.ndim == 1 and len(y) > 1 and y[-1] > y[0] else x


def ticks(low, high, log):
    """Up to about six round values in [low, high]."""
    if log:
        decades = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        values = decades if len(decades) > 4 else [m * d for d in decades for m in (1, 2, 5)]
        return [v for v in values if low <= v <= high]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def plot(image, box, title, xlabel, series, logx=False, logy=False):
    """A line plot in box (x0, y0, x1, y1). series: (label, x, y, colour, marker?) each."""
    draw, (x0, y0, x1, y1) = ImageDraw.Draw(image), box
    left, right, top, bottom = x0 + 58, x1 - 12, y0 + 30, y1 - 40
    clean = []
    for label, x, y, colour, marker in series:
        x, y = np.asarray(x, float), np.asarray(y, float)
        keep = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not logx)) & ((y > 0) | (not logy))
        clean.append((label, x[keep], y[keep], colour, marker))
    draw.text(((left + right) / 2, y0 + 12), title, INK, font(14), anchor="mm")
    draw.text(((left + right) / 2, y1 - 8), xlabel, INK, font(12), anchor="mm")
    draw.rectangle((left, top, right, bottom), outline=INK)
    if not any(len(s[1]) for s in clean):
        return
    reach = lambda k, log: span(np.concatenate([s[k] for s in clean]), log)
    (xl, xh), (yl, yh) = reach(1, logx), reach(2, logy)
    unit = lambda v, lo, hi, log: (np.log(v / lo) / math.log(hi / lo)) if log else (np.asarray(v) - lo) / (hi - lo)
    px = lambda v: left + unit(v, xl, xh, logx) * (right - left)
    py = lambda v: bottom - unit(v, yl, yh, logy) * (bottom - top)
    for v in ticks(xl, xh, logx):
        draw.line((px(v), top, px(v), bottom), fill=GREY)
        draw.text((px(v), bottom + 4), f"{v:.3g}", INK, font(11), anchor="ma")
    for v in ticks(yl, yh, logy):
        draw.line((left, py(v), right, py(v)), fill=GREY)
        draw.text((left - 5, py(v)), f"{v:.3g}", INK, font(11), anchor="rm")
    for n, (label, x, y, colour, marker) in enumerate(clean):
        points = list(zip(px(x), py(y)))
        if marker:
            for a, b in points:
                draw.ellipse((a - 3, b - 3, a + 3, b + 3), outline=colour, width=2)
        elif len(points) > 1:
            draw.line(points, fill=colour, width=2)
        draw.text((right - 8, top + 8 + 16 * n), label, colour, font(12), anchor="ra")


def span(v, log):
    """Axis limits with a small margin."""
    low, high = float(v.min()), float(v.max())
    if log:
        return low / 1.3, high * 1.3
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def panel_map(image, box, title, x, scale, label):
    """A map with its colour bar in box."""
    draw, (x0, y0, x1, y1) = ImageDraw.Draw(image), box
    factor = max(1, min((x1 - x0 - 110) // x.shape[1], (y1 - y0 - 60) // x.shape[0]))
    picture = tile(x, scale, factor)
    if picture.width > x1 - x0 - 110 or picture.height > y1 - y0 - 60:
        picture.thumbnail((x1 - x0 - 110, y1 - y0 - 60))
    at = (x0 + 20, y0 + 40)
    draw.text(((x0 + x1) / 2, y0 + 12), title, INK, font(14), anchor="mm")
    image.paste(picture, at)
    draw.rectangle((at[0] - 1, at[1] - 1, at[0] + picture.width, at[1] + picture.height), outline=INK)
    colour_bar(draw, image, at[0] + picture.width + 14, at[1] + 6, max(picture.height - 8, 60), scale, label)


def verification_picture(path, result, samples, truth, meta, channel):
    """Quantiles, spectra, autocorrelation and mean maps of one variable, (N, T, H, W) each."""
    name, attrs, floor = meta["names"][channel], meta["attrs"][channel], meta["transform"][channel]["floor"]
    units = attrs.get("units", "1")
    image = Image.new("RGB", (1080, 720), "white")
    box = lambda i: (i % 3 * 360, i // 3 * 350 + 20, i % 3 * 360 + 360, i // 3 * 350 + 370)
    ImageDraw.Draw(image).text((12, 4), f"{attrs.get('long_name', name)}: {result['samples']} samples (red) against {result['held_out_clips']} held-out clips (black)", INK, font(13))
    levels = [1 - 10.0**-n + k * 10.0 ** -(n + 1) for n in range(6) for k in range(9)]  # the dissertation's 54
    q, p = (np.nanquantile(a, levels) for a in (samples, truth))
    plot(image, box(0), "quantiles", f"held-out, {units}", [("samples", p, q, SECOND, True), ("", p, p, FIRST, False)])
    for i, (key, label) in enumerate((("spatial_power", "cycles per cell"), ("temporal_power", "cycles per time step"))):
        if key in result:
            r = result[key]
            plot(image, box(1 + i), key.replace("_", " "), label, [("held-out", r["frequency"], r["held_out"], FIRST, False), ("samples", r["frequency"], r["samples"], SECOND, True)], True, True)
    a, b = result["autocorrelation"]
    lags = np.arange(len(a)) * meta["step_hours"]
    plot(image, box(3), "autocorrelation", "lag, hours", [("held-out", lags, b, FIRST, False), ("samples", lags, a, SECOND, True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # cells without any data
        mean, both = oriented(np.nanmean(samples, (0, 1)), meta), np.stack([np.nanmean(a, (0, 1)) for a in (samples, truth)])
    scale = (0.0, float(np.nanmax(both)) or 1.0, RAIN, 1.0) if floor == 0 else scale_of(both, floor)
    panel_map(image, box(4), "mean of the samples", mean, scale, units)
    bias = oriented(np.array(result["bias_map"], dtype=float), meta)
    reach = float(np.nanquantile(np.abs(bias), 0.99)) if np.isfinite(bias).any() else 1.0
    reach = reach or 1.0
    panel_map(image, box(5), "relative bias of the mean" if floor == 0 else "bias of the mean / std", bias, (-reach, reach, DIVERGING, 1.0), "")
    with data.replacing(path) as f:
        image.save(f, "PNG")


def ensemble_picture(path, r, marginal, samples, truth, meta, channel):
    """Scores by frame, rank histogram, quantiles and spectra of an ensemble. samples, truth (N, T, H, W) of the generated part."""
    attrs, lead = meta["attrs"][channel], r["lead_hours"]
    units, colours = attrs.get("units", "1"), ((214, 69, 47), (46, 120, 190), (120, 120, 120))
    image = Image.new("RGB", (1080, 720), "white")
    box = lambda i: (i % 3 * 360, i // 3 * 350 + 20, i % 3 * 360 + 360, i // 3 * 350 + 370)
    ImageDraw.Draw(image).text((12, 4), f"{attrs.get('long_name', meta['names'][channel])}: {r['members']} members, {r['conditions']} conditions, the generated part (red) against the truth (black)", INK, font(13))
    curves = [("ensemble", r["crps"])] + [(k[5:], v) for k, v in r.items() if k.startswith("crps_")]
    plot(image, box(0), f"CRPS, {units}", "lead time, hours", [(name, lead, v, colour, len(lead) == 1) for (name, v), colour in zip(curves, colours)])
    if r["members"] > 1:
        plot(image, box(1), f"spread and error, {units}", "lead time, hours", [("spread", lead, r["spread"], SECOND, len(lead) == 1), ("RMSE of the mean", lead, r["rmse"], FIRST, len(lead) == 1)])
        share = np.array(r["rank_histogram"]) * (r["members"] + 1)
        plot(image, box(2), "rank of the truth among the members", "rank", [("1 is calibrated", np.arange(len(share)), 0 * share + 1, FIRST, False), ("0", [0], [0], (255, 255, 255), False), ("", np.arange(len(share)), share, SECOND, True)])
    levels = [1 - 10.0**-n + k * 10.0 ** -(n + 1) for n in range(5) for k in range(9)]
    q, p = (np.nanquantile(a, levels) for a in (samples, truth))
    plot(image, box(3), "quantiles", f"truth, {units}", [("samples", p, q, SECOND, True), ("", p, p, FIRST, False)])
    for i, (key, label) in enumerate((("spatial_power", "cycles per cell"), ("temporal_power", "cycles per time step"))):
        if key in marginal:
            m = marginal[key]
            plot(image, box(4 + i), key.replace("_", " "), label, [("truth", m["frequency"], m["held_out"], FIRST, False), ("samples", m["frequency"], m["samples"], SECOND, True)], True, True)
    with data.replacing(path) as f:
        image.save(f, "PNG")


def print_ensemble(name, units, r):
    """The scores of an ensemble, a line per frame."""
    references = [k for k in r if k.startswith("crps_")]
    print(f"\n{name} [{units}]: {r['members']} members, {r['conditions']} conditions" + (f", spread / error {r['spread_skill']:.3f}" if "spread" in r else ""))
    print(f"  {'lead h':>8}{'CRPS':>12}" + "".join(f"{k[5:]:>14}" for k in references) + f"{'energy score':>14}" + (f"{'spread':>10}{'RMSE':>10}" if "spread" in r else ""))
    for i, lead in enumerate(r["lead_hours"]):
        print(f"  {lead:>8.4g}{r['crps'][i]:>12.4f}" + "".join(f"{r[k][i]:>14.4f}" for k in references) + f"{r['energy_score'][i]:>14.4f}" + (f"{r['spread'][i]:>10.4f}{r['rmse'][i]:>10.4f}" if "spread" in r else ""))
    if "spread" in r:
        print("  ranks, times members + 1:  " + " ".join(f"{v * (r['members'] + 1):.2f}" for v in r["rank_histogram"]))


def theory_picture(path, denoise, x, grid, step, noise, meta):
    """Schedules, the forward process of one field x (1, C, T, H, W), and the denoised estimate along one sampling run."""
    image = Image.new("RGB", (1120, 860), "white")
    draw = ImageDraw.Draw(image)
    t = torch.linspace(0.002, 0.998, 250, dtype=torch.float64)
    palette = ((20, 20, 20), (214, 69, 47), (46, 120, 190), (64, 140, 70), (150, 80, 170), (200, 140, 20), (120, 120, 120))
    curves = {name: diffusion.logsnr_schedule(t, name, -20.0, 20.0) for name in diffusion.SCHEDULES}
    for i, (title, f) in enumerate((("log-SNR, log(alpha^2 / sigma^2)", lambda l: l), ("alpha", lambda l: diffusion.alpha_sigma(l)[0]), ("sigma", lambda l: diffusion.alpha_sigma(l)[1]))):
        series = [(name if i == 0 else "", t, f(l), colour, False) for (name, l), colour in zip(curves.items(), palette)]
        plot(image, (i * 372, 8, i * 372 + 372, 330), title, "t: 0 data, 1 noise", series)
    still = lambda a: oriented(a[0, 0, 0].detach().float().cpu().numpy(), meta)  # first frame of the first variable
    run = [(grid[0], noise(x), None)]
    for l, (z, x_hat) in zip(grid[1:], diffusion.sample(denoise, run[0][1], grid, step, noise)):
        run.append((l, z, x_hat))
    shown = [run[i] for i in np.linspace(1, len(run) - 1, 8).astype(int)]
    levels = diffusion.logsnr_schedule(torch.linspace(0, 1, 8, dtype=torch.float64), "logsnr", -8.0, 10.0)
    eps = noise(x)
    rows = [("forward: z = alpha x + sigma eps", [(f"log-SNR {l:.1f}", diffusion.diffuse(x, l[None], eps)) for l in levels]),
            ("sampling: z", [(f"log-SNR {l:.1f}", z) for l, z, _ in shown]), ("sampling: x_hat", [("", x_hat) for *_, x_hat in shown])]  # fmt: skip
    for r, (title, fields) in enumerate(rows):
        top = 370 + r * 165
        draw.text((12, top - 24), title, INK, font(13))
        for k, (label, field) in enumerate(fields):
            picture = tile(still(field), (-3.0, 3.0, DIVERGING, 1.0), max(1, 128 // max(field.shape[-2:])))
            picture.thumbnail((130, 120))
            image.paste(picture, (12 + k * 138, top + 12))
            draw.text((12 + k * 138, top + 10), label, INK, font(11), anchor="ls")
    with data.replacing(path) as f:
        image.save(f, "PNG")


def print_table(name, units, r):
    """The verification table of one variable."""
    print(f"\n{name} [{units}]{'samples':>22}{'held-out':>12}{'error':>10}")
    row = lambda label, a, b, error: print(f"  {label:<26}{a:>12.4f}{b:>12.4f}{error:>10}")
    row("mean", *r["mean"], f"{r['mean'][0] - r['mean'][1]:+.3f}")
    row("standard deviation", *r["std"], f"{r['std'][0] / r['std'][1] - 1:+.1%}")
    if "dry_fraction" in r:
        a, b = r["dry_fraction"]
        row("dry fraction", a, b, f"{100 * (a - b):+.1f} pt")
    for level, (a, b, e) in r["quantiles"].items():
        row(f"quantile {level}", a, b, f"{e:+.1%}")
    for lag in (1, 3, 6):
        if lag < len(r["autocorrelation"][0]):
            a, b = (v[lag] for v in r["autocorrelation"])
            row(f"autocorrelation, lag {lag}", a, b, f"{a - b:+.3f}")
    for key in ("spatial_power", "temporal_power"):
        if key in r:
            print(f"  {key.replace('_', ' ') + ', error':<26}{'median':>12}{r[key]['median_error']:>12.1%}{'worst':>8}{r[key]['worst_error']:>8.1%}")
    if r["mean_abs_bias"] is not None:
        print(f"  {'mean |bias| per cell':<26}{r['mean_abs_bias']:>12.3f}")


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def main(argv=None):
    c = train.configure(__file__, argv, CHOICES)
    check(c)
    out = Path(c.out_dir)
    rank, world = train.start_ranks(c)
    device, amp, compiled = train.pick_device(c)
    checkpoint = train.load_checkpoint(out / "ckpt.pt")
    settings, meta = SimpleNamespace(**checkpoint["settings"]), checkpoint["data"]
    network = train.build(checkpoint, device)
    network.checkpoint_activations = c.checkpoint_activations
    grid, step, problem = make_grid(c, settings, meta), make_step(c), pose(c, settings, meta)
    drawn_by = fingerprint(c, out / "ckpt.pt")
    if c.method == "auto":
        c.method = "trained" if meta["known"] else "moment_matching"
    require(c.method != "trained" or meta["known"], "--method=trained needs a checkpoint of train.py --condition=known; use --method=moment_matching")
    require(c.guidance_scale == 1 or meta["conditions"] or c.method == "trained", "--guidance_scale needs a checkpoint of train.py with --condition")
    run = train.run_network(torch.compile(network) if compiled else network, device, amp, settings, meta)
    folder = out / "samples"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise data.InputError(f"--out_dir={c.out_dir} cannot be written: {e.strerror}")

    # every finished sample is a part on disk: an interrupted run goes on where it stopped, ranks of torchrun share the rest
    parts = folder / f"parts-{drawn_by}"
    parts.mkdir(exist_ok=True)
    missing = [i for i in range(c.num_samples) if not (parts / f"{i:06d}.pt").exists()]
    if world > 1:
        torch.distributed.barrier()
    if len(missing) < c.num_samples and rank == 0:
        print(f"{c.num_samples - len(missing)} of {c.num_samples} samples are done already")
    mine = missing[rank::world]
    start = time.perf_counter()
    given = None if problem.truth is None else data.normalise(problem.truth, meta["transform"])[0].to(device)
    if c.task == "morph":
        pair = guided(c, run, settings, meta, diffusion.Observation(*(a[[0, -1]].to(device) for a in (problem.y, problem.mask))), None)
        ends = encode(pair, given[[0, -1]], grid)
    with tqdm(total=len(mine) * (len(grid) - 1) * len(problem.windows), desc="sampling", unit="step", disable=rank > 0) as bar:
        for first in range(0, len(mine), c.batch_size):
            indices = mine[first : first + c.batch_size]
            rows, noise = [i // c.members for i in indices], generators(c.seed, indices)
            y, mask = problem.y[rows].to(device), problem.mask[rows].to(device)  # both fill up window by window
            for window in problem.windows:
                known = diffusion.Observation(y[:, :, window], mask[:, :, window], problem.factor)
                denoise = guided(c, run, settings, meta, known, None if problem.told is None else problem.told[rows][:, :, window].to(device))
                if c.task == "edit":
                    z = diffusion.diffuse(given[rows], grid[:1], noise(given[rows]))
                elif c.task == "encode":
                    z = encode(denoise, given[rows], grid)
                elif c.task == "morph":
                    z = torch.stack([diffusion.interpolate(*ends, i / (c.num_samples - 1)) for i in indices])
                else:  # at the first level the mean of the field, given what is known, shows already
                    z, level = torch.zeros_like(known.lift(known.y)), grid[:1].expand(len(rows))
                    z = diffusion.diffuse(denoise(z, level.to(device)), level, noise(z))
                for z, _ in diffusion.sample(denoise, z, grid, step, noise):
                    bar.update(len(indices))
                if not c.obs_std:
                    z = known.project(z)
                if problem.factor == 1:
                    y[:, :, window], mask[:, :, window] = z, 1.0
            result = y if problem.factor == 1 else z
            if not result.isfinite().all():
                raise RuntimeError("the samples are not finite: use more --steps, --clip=true or another --sampler")
            for i, x in zip(indices, result.cpu()):
                with data.replacing(parts / f"{i:06d}.pt") as f:
                    torch.save(x.clone(), f)  # np.save would not notice a full disk
    seconds = time.perf_counter() - start
    if world > 1:
        torch.distributed.barrier()
        if rank > 0:
            return
    y = torch.stack([torch.load(parts / f"{i:06d}.pt", weights_only=True) for i in range(c.num_samples)])
    if c.task == "encode":
        print(f"round trip: RMS difference {(y - given.cpu()).pow(2).mean().sqrt():.2e} standard deviations")
    x = data.denormalise(y, meta["transform"], meta["valid"])  # (N, C, L, H, W)
    seen = diffusion.Observation(problem.y, problem.mask, problem.factor)
    problem.lifted = np.where(seen.lift(seen.mask) > 0, data.denormalise(seen.lift(seen.y), meta["transform"]), np.nan)
    problem.unseen = None if problem.truth is None else np.where(np.isfinite(problem.lifted) & (problem.factor == 1), np.nan, problem.truth)
    if problem.unseen is not None and not np.isfinite(problem.unseen).any():
        problem.unseen = None  # the truth of what was drawn, where it is known to us
    lead = (np.arange(x.shape[2]) - problem.reference) * meta["step_hours"]

    command = " ".join(["sample.py", *(sys.argv[1:] if argv is None else argv)])
    history = f"{command}: {c.sampler}, {c.steps} steps, {out}/ckpt.pt at step {checkpoint['step']}"
    ensemble = x.reshape(-1, c.members, *x.shape[1:])  # (R, M, C, L, H, W)
    given = bool(problem.mask.any())
    written = data.write_samples(folder, ensemble if given else x, meta, history, lead, problem.hours[:, problem.reference] if given else None)
    for i, name in enumerate(meta["names"]):
        suffix, rows = f"_{name}" if i else "", picture_rows(x, problem, c.members, i)
        contact_sheet(folder / f"samples{suffix}.png", rows, meta, i, lead)
        animation(folder / f"samples{suffix}.gif", rows, meta, i)
        written += [f"samples{suffix}.png", f"samples{suffix}.gif"]
    for old in folder.glob("parts-*"):
        shutil.rmtree(old)
    if missing:
        print(f"{len(missing)} clips in {seconds:.0f} s ({len(missing) / seconds:.2f} clips/s)")
    if c.theory:
        clip = pose(SimpleNamespace(**{**vars(c), "task": "edit", "num_samples": 1, "members": 1, "length": 0, "frames": 0, "input": ""}), settings, meta)
        blank = diffusion.Observation(clip.y.to(device), clip.mask.to(device))
        denoise, x_0 = guided(c, run, settings, meta, blank, None), data.normalise(clip.truth, meta["transform"])[0].to(device)
        theory_picture(folder / "theory.png", denoise, x_0, make_grid(SimpleNamespace(**{**vars(c), "task": "generate"}), settings, meta), step, generators(c.seed, [0]), meta)
        written.append("theory.png")
    if c.verify and c.task in ("generate", *GIVEN, "extend", "loop"):
        written += verify(c, settings, meta, problem, x, ensemble, lead, folder)
    print(f"\n{folder}/: {', '.join(written)}")


def verify(c, settings, meta, problem, x, ensemble, lead, folder):
    """Compare with held-out clips, or where something was given with what then came; tables, verify.json and verify.png."""
    T = settings.frames
    climate = data.open_climate(settings.dataset, settings.variables, settings.size, settings.seed)
    train_starts, test = data.split_windows(climate, T)
    test = data.apart(test, T)
    held_out = data.clips(climate, test[:: max(1, len(test) // 2000)], T)  # at most about 4000
    drawn = data.clips(climate, train_starts[np.linspace(0, len(train_starts) - 1, 50).astype(int)], 1)  # (50, C, 1, H, W)
    report = {}
    for i, name in enumerate(meta["names"]):
        floor, units, suffix = 0.0 if meta["transform"][i]["floor"] == 0 else None, meta["attrs"][i].get("units", "1"), f"_{name}" if i else ""
        if problem.unseen is None:  # nothing but the law of the data to compare with
            n = min(T, x.shape[2])
            pieces = np.concatenate([x[:, i, t : t + n] for t in range(0, x.shape[2] - n + 1, n)])
            report[name] = data.compare(pieces, held_out[:, i, :n], floor, c.dry)
            verification_picture(folder / f"verify{suffix}.png", report[name], pieces, held_out[:, i, :n], meta, i)
            print_table(name, units, report[name])
            if len(problem.windows) > 1 and x.shape[2] >= 2 * T:
                made_by = np.argmax([np.isin(np.arange(x.shape[2]), w) for w in problem.windows], 0)  # the first window with each frame
                joins = 1 + np.flatnonzero(np.diff(made_by))
                report[name]["drift"] = data.drift(x[:, i], joins, T, floor, c.dry)
                print(f"  {'from beginning to end':<52}{'first':>10}{'last':>10}{'ratio':>8}")
                for label, (a, b, ratio) in report[name]["drift"].items():
                    print(f"  {label:<52}{a:>10.4f}{b:>10.4f}{ratio:>8.3f}")
            continue
        references, unseen = {}, problem.unseen[:, i]
        when = np.flatnonzero((np.isfinite(problem.lifted[0, i]) >= np.isfinite(problem.truth[0, i])).all((-2, -1)))  # frames that are wholly known
        if problem.factor == 1 and len(when):
            nearest = when[np.abs(np.arange(x.shape[2])[:, None] - when).argmin(1)]
            references["persistence"] = problem.truth[None, :, i, nearest]
        elif problem.factor > 1:
            references["block means"] = problem.lifted[None, :, i]
        references["climatology"] = drawn[:, None, i]  # (50, 1, 1, H, W)
        r = data.verify_ensemble(ensemble[:, :, i].swapaxes(0, 1), unseen, references, lead)
        frames = np.isfinite(unseen).any((0, 2, 3))
        samples, truth = x[:, i, frames], problem.truth[:, i, frames]
        report[name] = data.compare(samples, truth, floor, c.dry) | {"ensemble": r}
        ensemble_picture(folder / f"verify{suffix}.png", r, report[name], samples, truth, meta, i)
        print_table(name, units, report[name])
        print_ensemble(name, units, r)
    with data.replacing(folder / "verify.json") as f:
        f.write(json.dumps(report, indent=1).encode())
    return ["verify.json", "verify.png"]


if __name__ == "__main__":
    train.run_main(main)
