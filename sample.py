"""Generate climate clips from a checkpoint, draw them, and compare their statistics with held-out data.

    python sample.py --steps=256
    python sample.py --task=forecast --known=2 --members=16
    python sample.py --exact=true                     # the exact denoiser of the built-in data in place of the network
    python sample.py --experiment=dissertation        # train and sample a table of recipes

Edit the settings below or override any of them as --key=value; --help lists them.
"""
import hashlib
import json
import math
import os
import shutil
import sys
import time
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
steps = 0  # sampler steps; 0 is 64, or those that a distilled student has
sampler = "auto"  # auto (dpmpp_sde; dpmpp where a part is given; modes for a student), ancestral, ddim, dpmpp, dpmpp_sde, modes, heun, sde, ode, pc, langevin
spacing = "auto"  # steps even in log-SNR where the data's modes emerge (auto); in time of the schedule trained on (time), in log-SNR over its range (logsnr), EDM's (rho)
eta = 0.0  # of ddim: 0 deterministic, 1 ancestral
noise_until = -1.0  # of dpmpp_sde: log-SNR up to which steps add noise; beyond it they are those of dpmpp
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
length = 0  # frames of the result; 0 is as trained (extend: eight times that, loop: until it closes)
frames = 0  # frames of a window, drawn together; 0 is as trained, of longer sequences up to four times that (but for a network trained with --condition=known)
reverse = False  # of extend: backwards in time
members = 1  # draws for each condition, an ensemble; num_samples / members conditions
method = "auto"  # trained (a checkpoint of train.py --condition=known), linear (moment matching with the covariance of the linear part), moment_matching, guidance (reconstruction), imputation; auto is the first possible
guidance_weight = 3.0  # of method guidance
cg_steps = 8  # of method moment_matching: conjugate gradients, each a backward pass through the network
obs_std = 0.0  # of methods linear and moment_matching: error of what is known, in standard deviations; 0 is met exactly
guidance_scale = 1.0  # what conditions that the network was trained with count: 0 nothing, 1 as they are, above 1 exaggerated
edit_logsnr = -2.0  # of edit: how far the fields are noised; lower keeps less
theory = False  # also draw theory.png: schedules, the forward process, x_hat step by step
seed = 0  # sample i depends on (seed, i) alone
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16 (autocast)
compile = "auto"  # torch.compile: auto (on CUDA), true, false
checkpoint_activations = False  # guidance computes activations again in the backward pass: less memory
verify = True  # compare with held-out clips: verify.json, verify.png
exact = False  # sample the built-in data with the exact denoiser of its latent field: what is left is the sampler's error
experiment = ""  # train, sample and compare a table of recipes under out_dir: dissertation, ablation; goes on where it stopped
train_args = ""  # of experiment: settings of train.py for every recipe, "--size=16 --width=32"
budget = 1800  # of experiment: training steps of every recipe
dry = 0.0  # a variable with a floor (rain) is dry up to this much above it, in its units; 0 is the power of ten nearest to a tenth of its mean
# ----------------------------------------------------------------------------------------------------------------------

FRAME_MASKS = {"forecast": "prefix", "hindcast": "suffix", "interpolate": "every", "bridge": "ends"}
GIVEN = (*FRAME_MASKS, "inpaint", "superres")  # tasks with known entries
METHODS = ("trained", "linear", "moment_matching", "guidance", "imputation")
CHOICES = {"experiment": ("", "dissertation", "ablation"), "task": ("generate", *GIVEN, "extend", "loop", "edit", "encode", "morph"), "method": ("auto", *METHODS), "sampler": ("auto", *diffusion.SAMPLERS), "spacing": ("auto", "time", "logsnr", "rho"), "clip": ("auto", "true", "false"), **{k: train.CHOICES[k] for k in ("dtype", "compile")}}


def check(c):
    for name in ("num_samples", "batch_size"):
        require(getattr(c, name) >= 1, f"--{name}={getattr(c, name)} must be at least 1")
    require(0 <= c.eta <= 1 and 0 <= c.variance <= 1, "--eta and --variance must lie in [0, 1]")
    require(c.churn >= 0 and c.corrections >= 0 and c.snr > 0 and c.seed >= 0, "--churn, --seed and --corrections must not be negative, --snr must be positive")
    require(c.task not in ("encode", "morph") or (c.sampler in ("ode", "ddim", "heun", "dpmpp", "modes") and c.eta == c.churn == 0), f"--task={c.task} needs a deterministic sampler: --sampler=ode (or heun, dpmpp, modes, ddim)")
    require(not c.input or c.task != "generate", "--input belongs to another --task than generate")
    require(c.task != "morph" or c.num_samples >= 2, "--task=morph needs --num_samples of at least 2")
    for name, default, key, owners in (
        ("eta", 0.0, "sampler", ("ddim",)), ("noise_until", -1.0, "sampler", ("auto", "dpmpp_sde")), ("variance", 0.0, "sampler", ("ancestral",)), ("churn", 0.0, "sampler", ("heun",)), ("corrections", 0, "sampler", ("pc", "langevin")),
        ("snr", 0.16, "sampler", ("pc", "langevin")), ("edit_logsnr", -2.0, "task", ("edit",)), ("every", 2, "task", ("interpolate",)), ("factor", 4, "task", ("superres",)),
        ("reverse", False, "task", ("extend",)), ("members", 1, "task", (*GIVEN, "extend", "loop")), ("guidance_weight", 3.0, "method", ("guidance",)), ("cg_steps", 8, "method", ("moment_matching",)),
        ("obs_std", 0.0, "method", ("auto", "linear", "moment_matching")), ("method", "auto", "task", (*GIVEN, "extend", "loop", "generate")), ("length", 0, "task", ("generate", *FRAME_MASKS, "inpaint", "extend", "loop")),
        ("frames", 0, "task", ("generate", *GIVEN, "extend", "loop")), ("known", 2, "task", ("generate", *FRAME_MASKS, "inpaint", "extend", "loop")),
    ):  # fmt: skip
        require(getattr(c, name) == default or getattr(c, key) in owners, f"--{name} belongs to --{key}={' or '.join(owners)}, not {getattr(c, key)}")
    require(c.noise_until == -1 or c.sampler == "dpmpp_sde" or c.task not in GIVEN, f"--noise_until means nothing for --task={c.task}, whose sampler adds no noise where a part is known: use --sampler=dpmpp_sde")
    for name, least in (("known", 1), ("every", 2), ("factor", 2), ("length", 0), ("frames", 0), ("steps", 0), ("members", 1), ("cg_steps", 1), ("obs_std", 0), ("dry", 0), ("guidance_weight", 0), ("guidance_scale", 0)):
        require(getattr(c, name) >= least, f"--{name}={getattr(c, name)} must be at least {least}")
    require(c.num_samples % c.members == 0, f"--num_samples={c.num_samples} must be a multiple of --members={c.members}")
    require(not c.exact or (c.task == "generate" and not c.length and not c.frames), "--exact belongs to --task=generate, with the length of the clips trained on")
    require(c.budget >= 1, f"--budget={c.budget} must be at least 1")
    require(not c.experiment or (c.verify and c.task == "generate"), "--experiment compares what --task=generate draws: leave --task and --verify alone")
    require(c.task not in ("encode", "morph") or c.steps != 1, f"--task={c.task} needs at least 2 --steps")
    require(not c.train_args or c.experiment, "--train_args belongs to --experiment")


def pose(c, settings, meta):
    """What is asked: the known part of each clip to draw, for R = num_samples / members conditions. A namespace of

    y, mask (R, C, L, H / factor, W / factor), standardised; factor; truth (R, C, L, H, W) physical, NaN where unknown, or
    None; windows, the clips to draw in turn (data.windows); told (R, K, L, H, W) or None; hours (R, L) of the calendar;
    reference, the frame that lead times count from.
    """
    trained, R, K, size, record = settings.frames, c.num_samples // c.members, c.known, tuple(meta["size"]), None
    L = c.length or {"extend": 8 * trained, "loop": 2 * ((c.frames or trained) - K)}.get(c.task, c.frames or trained)
    T = c.frames or (trained if meta["known"] else min(max(trained, L // 2 + K if c.task == "loop" else L), 4 * trained))
    require(K < min(T, L) or c.task not in ("forecast", "hindcast", "bridge", "extend", "loop"), f"--known={K} leaves nothing of {min(T, L)} frames to draw")
    require(K < T or L <= T, f"--known={K} frames handed from window to window of {T} leave nothing to draw")
    require(L >= T or c.task not in ("extend", "loop"), f"--length={L} is less than a window of {T} frames")
    require(c.task != "loop" or L >= 2 * (T - K), f"--length={L}: a loop of windows of {T} frames that share {K} has at least {2 * (T - K)}")
    require(c.task != "bridge" or L > 2 * K, f"--length={L} leaves nothing between {K} frames on either side")
    factor, shape = c.factor if c.task == "superres" else 1, (1 if c.task == "generate" else R, len(meta["names"]), L, *size)
    require(not any(n % factor for n in size), f"--factor={factor} does not divide the grid of {size[0]} x {size[1]}")
    clips, start, before = np.full(shape, np.nan, np.float32), np.zeros(R, int), 0  # before: frames ahead of those read
    if c.task in GIVEN or c.task in ("edit", "encode", "morph") or c.input or meta["conditions"]:
        record = data.open_climate(c.input, "" if c.input.endswith(".npy") else ",".join(meta["names"])) if c.input else train.open_trained(settings, meta)
        fine = list(record.size) == meta["size"] or (c.task == "superres" and [n * factor for n in record.size] == meta["size"])
        same = record.names == meta["names"] or (c.input.endswith(".npy") and len(record.names) == len(meta["names"]))  # .npy has no names
        require(same and fine, f"--input={c.input} has variables {record.names} on a grid {record.size}; the checkpoint needs {meta['names']} on {size}")
        if c.input:
            dated = record.calendar != "none"
            require(record.calendar == meta["calendar"] or not (dated or any("period" in f for f in meta["conditions"])), f"--input={c.input} has calendar {record.calendar}; the checkpoint needs {meta['calendar']}")
            if not dated and record.step_hours == 1:  # numbers of frames
                record.hours, record.step_hours = record.hours * meta["step_hours"], meta["step_hours"]
            require(len(record) < 2 or abs(record.step_hours / meta["step_hours"] - 1) < 0.1, f"--input={c.input} has a frame every {record.step_hours:g} hours; the checkpoint needs one every {meta['step_hours']:g}")
        if record.size != size and meta["conditions"]:
            record.extras |= {k: v for k, v in train.open_trained(settings, meta).extras.items() if v.ndim == 2}  # static fields on the fine grid
        n = {"extend": min(T, trained), "loop": min(T, trained), "bridge": K}.get(c.task, L)  # frames to read of every clip
        starts = data.runs(record, n) if c.input else data.split_windows(record, settings.frames, max(n, settings.frames))[1]
        if not len(starts) and c.task in ("forecast", "hindcast"):  # only the known frames: nothing to verify with
            n, starts = K, data.runs(record, K)
        require(len(starts), f"--input={c.input} has no {n} consecutive frames")
        if c.task == "inpaint" and c.input:  # clips with a gap
            gaps = np.cumsum([0, *((np.isnan(record.frames(i, i + 1)) & (meta["valid"].numpy() > 0)).any() for i in range(len(record)))])
            starts = starts[gaps[starts + n] > gaps[starts]]
            require(len(starts), f"--input={c.input} has no NaN: nothing is to be filled in")
        if c.task == "generate":  # what sample i is told depends on (seed, i) alone
            start = starts[[np.random.default_rng((c.seed, i)).integers(len(starts)) for i in range(R)]]
        else:
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
    if clips.shape[-2:] == size:  # means of the blocks without a gap
        blocks = diffusion.Observation(y, torch.ones(*shape[:3], size[0] // factor, size[1] // factor), factor)
        y, mask = blocks.A(y), (blocks.A(mask) > 0.999).float()
    hours = (np.arange(L) - before) * meta["step_hours"] + (record.hours[start][:, None] if record else np.zeros((R, 1)))
    told = data.condition_values(record, meta["conditions"], np.maximum(start[:, None] + np.arange(L) - before, 0), hours, size) if meta["conditions"] else None
    ahead = np.flatnonzero((mask.amax((1, 3, 4)) > 0).all(0))  # frames of which every clip is given something
    return SimpleNamespace(
        y=(y * mask).expand(R, *y.shape[1:]), mask=mask.expand(R, *y.shape[1:]), factor=factor, truth=clips if clips.shape == shape and np.isfinite(clips).any() else None, told=told, hours=hours,
        calendar=record.calendar if record else "none", windows=data.windows(L, T, K, ahead, c.task == "loop", c.reverse or c.task == "hindcast"), reference={"forecast": K - 1, "hindcast": L - K}.get(c.task, 0),
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
    if c.method == "linear":
        return diffusion.linear_matching(denoise, known, *run.modes(z.shape[2])[1:], c.obs_std)
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


def make_step(c, known=False, modes=None, order=2):
    """The sampler's step function with its options; auto is dpmpp for a window of which a part is given, else dpmpp_sde."""
    name = ("dpmpp" if known else "dpmpp_sde") if c.sampler == "auto" else c.sampler
    options = {"ancestral": {"variance": c.variance}, "ddim": {"eta": c.eta}, "dpmpp_sde": {"until": c.noise_until}, "heun": {"churn": c.churn}, "modes": {"modes": modes, "order": order}}
    options |= {name: {"snr": c.snr} | ({"num_corrections": c.corrections} if c.corrections else {}) for name in ("pc", "langevin")}
    return partial(diffusion.SAMPLERS[name], **options.get(name, {}))


def make_grid(c, settings, meta):
    """The log-SNRs to visit, (steps + 1,): by default those of train.default_grid."""
    trained, emerging = train.levels(settings, meta), train.sampling_range(settings, meta)
    ends = diffusion.logsnr_schedule([1.0, 0.0], *trained).tolist()  # linear and ddpm do not go as far as logsnr_min
    grid = diffusion.sampling_grid(c.steps, *{"auto": emerging, "time": trained, "logsnr": ("logsnr", *ends), "rho": ("rho", *emerging[1:])}[c.spacing])
    if c.task == "edit":
        require(grid[0] <= c.edit_logsnr <= grid[-2], f"--edit_logsnr={c.edit_logsnr} lies outside the grid of log-SNR from {grid[0]:.1f} to {grid[-2]:.1f}")
        grid = torch.cat([grid.new_tensor([c.edit_logsnr]), grid[grid > c.edit_logsnr]])
    if c.sampler in ("sde", "langevin"):  # explicit in log-SNR, or nothing but Langevin steps between levels
        widest = float(grid[:-1].diff().max()) if len(grid) > 2 else math.inf
        need = f"at least {math.floor(float(grid[-2] - grid[0]) / 2) + 3} --steps" if c.spacing in ("auto", "logsnr") else "--spacing=auto"
        require(widest < 2, f"--sampler={c.sampler} is unstable with steps over 2 in log-SNR (here {widest:.1f}): use {need}")
    return grid


def generators(seed, indices):
    """One CPU generator per sample and a noise(z) that draws from them: sample i is the same in any batch, on any device."""
    gens = [torch.Generator().manual_seed(int(np.random.SeedSequence((seed, i)).generate_state(1, np.uint64)[0] >> 1)) for i in indices]
    return lambda z: torch.stack([torch.randn(z.shape[1:], generator=g) for g in gens]).to(z)


def exact_denoiser(w, U):
    """E[x | z] of the built-in latent field on its whole periodic box, z (B, 1, T, M, M): Wiener's filter in its modes."""

    def denoise(z, logsnr):
        alpha, sigma = (diffusion.expand(a, z) for a in diffusion.alpha_sigma(logsnr.to(z)))
        Z = torch.einsum("yxts,bctyx->bcsyx", U.conj(), torch.fft.fft2(z, norm="ortho"))
        Z = diffusion.wiener(alpha, sigma, w)[0] * Z
        return torch.fft.ifft2(torch.einsum("yxts,bcsyx->bctyx", U, Z), norm="ortho").real

    w, U = w.float().permute(2, 0, 1), U.to(torch.complex64)  # (T, M, M), (M, M, T, T)
    return denoise


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
NO_DATA, INK, GREY, BAND, FIRST, SECOND, LAW = (190, 190, 190), (30, 30, 30), (215, 215, 215), (222, 226, 232), (20, 20, 20), (214, 69, 47), (46, 120, 190)


def font(size=12):
    return ImageFont.load_default(size)


def colours(x, low, high, palette, gamma=1.0):
    """Field -> RGB uint8 (..., 3); grey where there is no data; gamma < 1 spreads the low values."""
    u = np.clip((np.nan_to_num(x, nan=low) - low) / (high - low), 0, 1) ** gamma * (len(palette) - 1)
    rgb = np.stack([np.interp(u, range(len(palette)), channel) for channel in zip(*palette)], -1)
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
    known = (problem.mask[:count, 0].flatten(2).amin(-1) > 0).numpy() & (problem.factor == 1)  # (R, T)
    if not problem.mask.any():
        return [(f"clip {i}", x[i, channel], known[0]) for i in range(min(count, len(x)))]
    rows = []
    for r in range(min(2, len(known))):
        rows.append(("given", problem.lifted[r, channel], known[r]))
        if problem.unseen is not None:
            rows.append(("truth", problem.truth[r, channel], known[r]))
        rows += [(f"draw {m}" if members > 1 else "drawn", x[r * members + m, channel], known[r]) for m in range(min(members, 3))]
    return rows


def unit_of_time(meta):
    """(name, sign, hours) of the unit in which pictures tell time: the largest that a step of the data fills."""
    return next(u for u in (("days", "d", 24.0), ("hours", "h", 1.0), ("minutes", "min", 1 / 60)) if meta["step_hours"] >= u[2] or u[1] == "min")


def spectra_axes(meta):
    """(curve, what its frequencies, cycles per cell or step, are divided by, label) of the two spectra."""
    unit, _, hours = unit_of_time(meta)
    return ("spatial_power", 1, "cycles per cell"), ("temporal_power", meta["step_hours"] / hours, f"cycles per {unit[:-1]}")


def contact_sheet(path, rows, meta, channel, lead):
    """Rows of picture_rows down, at most 12 frames across, one colour scale; known frames are framed. lead (T,) hours."""
    attrs, floor, (_, sign, hours) = meta["attrs"][channel], meta["transform"][channel]["floor"], unit_of_time(meta)
    chosen = np.unique(np.linspace(0, len(lead) - 1, min(len(lead), 12)).astype(int))
    H, W = rows[0][1].shape[-2:]
    scale, factor = scale_of(np.stack([x for _, x, _ in rows]), floor), max(1, round(104 / max(H, W)))
    w, h, gap, left, top = W * factor, H * factor, 4, 64, 50
    image = Image.new("RGB", (left + len(chosen) * (w + gap) + 96, top + len(rows) * (h + gap) + 8), "white")
    draw = ImageDraw.Draw(image)
    draw.text((left, 6), f"{attrs.get('long_name', meta['names'][channel])}: generated clips" + (", framed where known" if any(k.any() for *_, k in rows) else ""), INK, font(14))
    for k, t in enumerate(chosen):
        draw.text((left + k * (w + gap) + w / 2, top - 6), f"{lead[t] / hours:+.3g} {sign}", INK, font(11), anchor="ms")
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


def plot(image, box, title, xlabel, series, logx=False, logy=False, band=None):
    """A line plot in box (x0, y0, x1, y1). series: (label, x, y, colour, marker?) each; band: (x, low, high) in grey."""
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
    if band:
        x, *ends = (np.clip(np.asarray(a, float), *limits) for a, limits in zip(band, ((xl, xh), (yl, yh), (yl, yh))))
        draw.polygon([*zip(px(x), py(ends[0])), *zip(px(x[::-1]), py(ends[1][::-1]))], fill=BAND)
    for n, (label, x, y, colour, marker) in enumerate(clean):
        points = list(zip(px(x), py(y)))
        if marker:
            for a, b in points:
                draw.ellipse((a - 3, b - 3, a + 3, b + 3), outline=colour, width=2)
        elif len(points) > 1:
            draw.line(points, fill=colour, width=2)
        at = (left + 8, "la") if len(clean[0][1]) and clean[0][2][-1] > clean[0][2][0] else (right - 8, "ra")  # beside what rises
        draw.text((at[0], top + 8 + 16 * n), label, colour, font(12), anchor=at[1])


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


def verification_picture(path, result, meta, channel):
    """The curves and maps of data.compare: histogram, quantiles, maxima, spectra, autocorrelation, mean and bias."""
    name, attrs, floor, curves = meta["names"][channel], meta["attrs"][channel], meta["transform"][channel]["floor"], result["curves"]
    units, law = attrs.get("units", "1"), "exact" in curves["quantiles"]
    image = Image.new("RGB", (1200, 1050), "white")
    box = lambda i: (i % 3 * 400, i // 3 * 335 + 40, i % 3 * 400 + 392, i // 3 * 335 + 365)
    text = f"{attrs.get('long_name', name)}: {result['samples']} samples (red) against {result['held_out_clips']} held-out clips (black){' and the exact law (blue)' if law else ''}; grey: where 95 % of perfect sample sets lie"
    ImageDraw.Draw(image).text((12, 8), text, INK, font(14))

    def panel(i, title, xlabel, x, c, logx=False, logy=False):
        series = [("held-out", x, c["held_out"], FIRST, False)] + ([("exact law", x, c["exact"], LAW, False)] if "exact" in c else [])
        series += [("samples", x, c["samples"], SECOND, len(x) < 60)]
        plot(image, box(i), title, xlabel, series, logx, logy, (x, *c["band"]) if "band" in c else None)

    h, q = curves["histogram"], curves["quantiles"]
    panel(0, "share of the cells, per bin", units, np.convolve(h["edges"], (0.5, 0.5), "valid"), h, logy=True)
    reference = np.array(q["exact" if law else "held_out"])
    panel(1, f"quantiles, {units}, 0 to 0.999998", f"{'exact law' if law else 'held-out'}, {units}", reference, q)
    panel(2, f"maximum of a clip, {units}", "return period, clips", np.array(curves["returns"]["clips"]), curves["returns"], logx=True)
    for i, (k, x, label) in enumerate(spectra_axes(meta)):
        panel(3 + i, f"{data.POWERS[k]}, {f'({units})' if ' ' in units else units}^2", label, np.array(curves[k]["frequency"]) / x, curves[k], True, True)
    unit, _, hours = unit_of_time(meta)
    panel(5, "autocorrelation", f"lag, {unit}", np.arange(len(curves["autocorrelation"]["samples"])) * meta["step_hours"] / hours, curves["autocorrelation"])
    field = lambda a: oriented(np.array(a, dtype=float), meta)
    maps, bias = [field(result["mean_map"][k]) for k in ("samples", "reference")], field(result["bias_map"])
    scale = (0.0, float(np.nanmax(maps)) or 1.0, RAIN, 1.0) if floor == 0 else scale_of(np.array(maps), floor)
    panel_map(image, box(6), "mean of the samples", maps[0], scale, units)
    panel_map(image, box(7), "mean by the exact law" if law else "mean of the held-out clips", maps[1], scale, units)
    reach = float(np.nanquantile(np.abs(bias), 0.99)) if np.isfinite(bias).any() else 1.0
    panel_map(image, box(8), "bias of the mean / mean" if floor == 0 else "bias of the mean / standard deviation", bias, (-(reach or 1.0), reach or 1.0, DIVERGING, 1.0), "fraction" if floor == 0 else "std")
    with data.replacing(path) as f:
        image.save(f, "PNG")


def ensemble_picture(path, r, curves, meta, channel):
    """Scores by frame and rank histogram of data.verify_ensemble, quantiles and spectra of the generated part by data.compare."""
    attrs, (unit, _, hours), one = meta["attrs"][channel], unit_of_time(meta), len(r["lead_hours"]) == 1
    lead, when = np.divide(r["lead_hours"], hours), f"lead time, {unit}"
    units = attrs.get("units", "1")
    image = Image.new("RGB", (1200, 715), "white")
    box = lambda i: (i % 3 * 400, i // 3 * 335 + 40, i % 3 * 400 + 392, i // 3 * 335 + 365)
    text = f"{attrs.get('long_name', meta['names'][channel])}: {r['members']} members, {r['conditions']} conditions; what was generated (red) and what then came (black)"
    ImageDraw.Draw(image).text((12, 8), text, INK, font(14))
    scores = [("ensemble", r["crps"])] + [(k[5:], v) for k, v in r.items() if k.startswith("crps_")]
    plot(image, box(0), f"CRPS, {units}", when, [(name, lead, v, colour, one) for (name, v), colour in zip(scores, (SECOND, LAW, FIRST))])
    if r["members"] > 1:
        plot(image, box(1), f"spread and error, {units}", when, [("spread", lead, r["spread"], SECOND, one), ("RMSE of the mean", lead, r["rmse"], FIRST, one)])
        share = np.array(r["rank_histogram"]) * (r["members"] + 1)
        flat = [("calibrated", np.arange(len(share)), 0 * share + 1, FIRST, False), ("", [0, 0], [0, 2], (255, 255, 255), False)]  # from 0 to 2 at least
        plot(image, box(2), "share of each rank, times members + 1", "rank of the truth", [*flat, ("", np.arange(len(share)), share, SECOND, True)])
    q = curves["quantiles"]
    plot(image, box(3), f"quantiles, {units}", f"truth, {units}", [("truth", q["held_out"], q["held_out"], FIRST, False), ("generated", q["held_out"], q["samples"], SECOND, True)])
    for i, (k, x, label) in enumerate(spectra_axes(meta)):
        f = np.array(curves[k]["frequency"]) / x
        plot(image, box(4 + i), data.POWERS[k], label, [("truth", f, curves[k]["held_out"], FIRST, False), ("generated", f, curves[k]["samples"], SECOND, True)], True, True)
    with data.replacing(path) as f:
        image.save(f, "PNG")


def print_ensemble(name, units, r):
    """The scores of an ensemble, a line per frame."""
    references = [k for k in r if k.startswith("crps_")]
    print(f"\n{name} [{units}]: {r['members']} members, {r['conditions']} conditions")
    for label, key in ((f"in {units}", "spread_skill"), ("transformed", "spread_skill_transformed")) if "spread" in r else ():
        print(f"  spread / error, {label:<14}{r[key][0]:.3f}" + (", 95 % interval {:.3f} .. {:.3f}".format(*r[key][1:]) if r[key][1:] else ""))
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


def shown(value, unit, plus="+"):
    """An error in its unit: fractions as per cent or points."""
    digits, factor = {"%": (".1%", 1), "pt": (".2f", 100), "dB": (".2f", 1), "std": (".3f", 1)}.get(unit, (".4f", 1))
    return f"{factor * value:{plus}{digits}}"


def print_table(name, units, r):
    """The verification table of one variable."""
    columns = ("samples", "held-out", "exact law") if len(r["rows"]["mean"]["values"]) > 2 else ("samples", "held-out")
    print(f"\n{name + ' [' + units + ']':<32}" + "".join(f"{k:>11}" for k in columns) + f"{'error':>11}    95 % interval of the error (~ holds 0)")
    for label, e in r["rows"].items():
        values = "".join(f"{v:>11.4f}" if v is not None else f"{'-':>11}" for v in e["values"])
        if e["error"] is None:
            interval = error = "-"
        else:
            error = shown(e["error"], e["unit"], "+" if e["values"] else "") + (f" {e['unit']}" if e["unit"] in ("pt", "dB", "std") else "")
            interval = "" if e["interval"] is None else " .. ".join(shown(v, e["unit"]) for v in e["interval"]) if e["values"] else "by sampling up to " + shown(e["interval"][1], e["unit"], "")
        print(f"  {label:<30}{values:<{11 * len(columns)}}{error:>11}  {'~' if e['within_sampling_error'] else ' '} {interval}")


# ----------------------------------------------------------------------------------------------------------------------
# the ruler: on `gaussian` data the best denoiser is known, so a network's distance from it is


def ruler(denoise, y, settings, meta, batch_size, device, draws=256):
    """Excess v-loss over the Bayes optimum per bin of log-SNR, and per band of eigenvalues of the exact covariance the
    network's gain where the band emerges (its x_hat against the best one's, by regression) and the samples' variance.

    y (N, 1, T, H, W) standardised samples. Both are in the eigenbasis, where the best denoiser is diagonal; the excess
    |v_hat - v_best|^2 / E|v - v_best|^2 is exact for a given z, since the rest of the error is not predictable.
    """
    f = meta["transform"][0]
    w, V = (a.flip(-1) for a in torch.linalg.eigh(data.gaussian_covariance(settings.frames, settings.size) / f["std"] ** 2))  # largest first
    D, mean, generator = len(w), -f["mean"] / f["std"], torch.Generator().manual_seed(0)
    edges = [0, 1, *(e for e in (5, 20, 80, 320, 1280) if e < D), D]
    bands = [slice(i, j) for i, j in zip(edges, edges[1:])]
    centres = [-float(w[b].log().mean()) for b in bands]
    project = lambda x: (x.double().flatten(1) - mean) @ V

    def trial(l):
        """Coefficients of the network's and of the best x_hat, (draws, D) each, and the variance left to the best (D,)."""
        logsnr = torch.full((draws,), l, dtype=torch.float64)
        noise = lambda: torch.randn(draws, D, generator=generator, dtype=torch.float64)
        x = mean + (w.sqrt() * noise()) @ V.T
        z = diffusion.diffuse(x, logsnr, noise())
        alpha, sigma = diffusion.alpha_sigma(logsnr[:1])
        gain, left = diffusion.wiener(alpha, sigma, w)
        best = gain * ((z - alpha * mean) @ V)
        z = z.float().view(-1, *y.shape[1:]).to(device)
        return project(torch.cat([denoise(a, b).cpu() for a, b in zip(z.split(batch_size), logsnr.to(device).split(batch_size))])), best, left

    out, scores = {"excess": {}, "bands": []}, project(y) ** 2 / w  # (N, D), 1 on average
    if denoise is not None:
        for lo in range(train.LOGSNR_BINS[0] - 2, train.LOGSNR_BINS[-1] + 2, 2):
            parts = []
            for l in (lo + 0.5, lo + 1.5):
                got, best, left = trial(l)
                parts.append(float((got - best).pow(2).mean() / left.mean()))
            out["excess"][f"{lo}..{lo + 2}"] = sum(parts) / 2
        print("\nexcess v-loss over the Bayes optimum, by log-SNR:\n  " + "  ".join(f"{k} {v:.1%}" for k, v in out["excess"].items()))
    print(f"{'modes':>12}{'eigenvalue':>13}{'log-SNR':>10}{'gain':>9}{'variance of the samples':>26}")
    for b, l in zip(bands, centres):
        got, best = (a[:, b] for a in trial(l)[:2]) if denoise is not None else (torch.ones(1, 1), torch.ones(1, 1))
        each = scores[:, b].mean(1)  # (N,)
        band = {"modes": [b.start + 1, b.stop], "eigenvalue": math.exp(-l), "gain": float((got * best).sum() / best.pow(2).sum()), "variance": float(each.mean()), "error": float(each.std() / math.sqrt(len(each)))}
        out["bands"].append(band)
        print(f"{b.start + 1:>6}-{b.stop:<5}{band['eigenvalue']:>13.4g}{l:>10.1f}{band['gain']:>9.3f}{band['variance']:>17.3f} +- {band['error']:.3f}")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# experiments: the same budget for every recipe, one table

SEED_RECIPE = "--schedule=cosine --linear_skip=false", "--sampler=ancestral --spacing=time --steps=256 --noise_until=-1"  # the dissertation's, with a quarter of its steps
EXPERIMENTS = {  # name: settings of train.py, of sample.py, share of the budget, what the dissertation reports
    "dissertation": {
        "transform none": ("--transform=none " + SEED_RECIPE[0], SEED_RECIPE[1], 1, "quantiles -25 %, |bias| 0.143"),
        "transform sqrt": ("--transform=sqrt " + SEED_RECIPE[0], SEED_RECIPE[1], 1, "power -50 %, |bias| 0.314"),
        "transform learnt": ("--transform=learnt " + SEED_RECIPE[0], SEED_RECIPE[1], 1, "power -45 %, |bias| 0.227"),
        "recommended": ("", "", 1, ""),
    },
    "ablation": {
        "recommended": ("", "", 1, ""),
        "exact denoiser: sampler alone": ("", "--exact=true", 1, ""),
        "a quarter of the training": ("", "", 0.25, ""),
        "no transform, no bias by it": ("--transform=none", "", 1, ""),
        "dry atom set apart": ("--transform=censored", "", 1, ""),
        "loss weighting of eps": ("--weighting=eps", "", 1, ""),
        "noise density of the cosine": ("--schedule=cosine", "", 1, ""),
        "no averaged weights": ("--ema_decay=0", "", 1, ""),
        "clipped": ("", "--clip=true", 1, ""),
        "float32": ("--dtype=float32", "--dtype=float32", 1, ""),
    },
}  # fmt: skip


def run_experiment(c):
    """Train and sample every recipe of a table that is not done yet, each in a folder of out_dir named by its settings."""
    folder = lambda *text: Path(c.out_dir) / f"run-{hashlib.sha256(' '.join(text).encode()).hexdigest()[:10]}"
    common = [f"--{k}={v}" for k, v in vars(c).items() if k not in ("experiment", "train_args", "budget", "out_dir")]
    lines = []
    for _, for_sample, *_ in EXPERIMENTS[c.experiment].values():  # nothing is trained in vain
        check(train.configure(__file__, [*common, *for_sample.split()], CHOICES))
    for name, (for_train, for_sample, share, seen) in EXPERIMENTS[c.experiment].items():
        settings = f"{c.train_args} {for_train} --max_iters={max(1, round(share * c.budget))}".split()
        trained, sampled = folder(*settings), folder(*settings, "|", *common, for_sample)
        started = (trained / "ckpt.pt").exists()
        with torch.enable_grad():
            train.main([f"--out_dir={trained}", *(["--init_from=resume"] if started else settings)])
        if not (sampled / "samples/verify.json").exists():
            sampled.mkdir(exist_ok=True)
            (sampled / "ckpt.pt").unlink(missing_ok=True)
            os.link(trained / "ckpt.pt", sampled / "ckpt.pt")
            main([*common, f"--out_dir={sampled}", *for_sample.split()])
        report = next(iter(json.loads((sampled / "samples/verify.json").read_text()).values()))
        rows, curves = report["rows"], report["curves"]
        power = [np.median(np.divide(curves[k]["samples"], curves[k]["held_out"])) - 1 if curves[k]["samples"] else math.nan for k in data.POWERS]
        errors = [rows[f"quantile {l}"]["error"] for l in data.SHOWN] + power + [rows[f"mean |bias| {k}"]["error"] for k in ("per cell", "beyond sampling")]
        lines.append(f"{name:<30}" + "".join(f"{e:>+9.1%}" for e in errors[:6]) + "".join(f"{math.nan if e is None else e:>9.3f}" for e in errors[6:]) + f"  {seen or ' '.join(filter(None, (for_train, for_sample, f'--max_iters={share:g} x budget' if share != 1 else '')))}")
    print(f"\n{c.budget} training steps each{' of train.py ' + c.train_args if c.train_args else ''}; errors of quantiles and power, |bias| per cell and beyond sampling error")
    print(f"{'':<30}" + "".join(f"{t:>9}" for t in (*data.SHOWN, "space", "time", "|bias|", "beyond")) + ("  the dissertation, on UKCP18 rain" if c.experiment == "dissertation" else "  settings"))
    print("\n".join(lines))


# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def main(argv=None):
    c = train.configure(__file__, argv, CHOICES)
    check(c)
    if c.experiment:
        return run_experiment(c)
    out = Path(c.out_dir)
    rank, world = train.start_ranks(c)
    device, amp, compiled = train.pick_device(c)
    checkpoint = train.load_checkpoint(out / "ckpt.pt")
    settings, meta = SimpleNamespace(**checkpoint["settings"]), checkpoint["data"]
    if settings.distill:
        own = int(settings.distill_steps)
        require(c.steps in (0, own) and c.sampler in ("auto", "modes") and c.noise_until == -1 and c.spacing == "auto" and c.task not in ("edit", "encode", "morph"),
                f"{out}/ckpt.pt is a student of {own} steps of sampler modes and knows no others: leave --steps, --sampler, --noise_until and --spacing alone, and --task=edit, encode and morph to its teacher")  # fmt: skip
    c.steps, c.sampler = c.steps or (own if settings.distill else 64), "modes" if settings.distill else c.sampler
    network = train.build(checkpoint, device)
    require(not c.exact or c.sampler != "modes", "--sampler=modes knows the modes of the data, not those of the latent field that --exact=true draws")
    require(not c.exact or settings.dataset in ("climate", "gaussian"), f"--exact=true knows the law of climate and gaussian alone, not of {settings.dataset}")
    network.checkpoint_activations = c.checkpoint_activations
    law = data.latent_modes(settings.frames, settings.size) if c.exact else None
    grid = make_grid(c, settings, meta | {"modes": law[0][law[0] > 0]} if c.exact else meta)
    problem = pose(c, settings, meta)
    if c.exact:  # the latent field on the box twice as wide, of which nothing is known
        problem.y = problem.mask = torch.zeros(1, 1, settings.frames, 2 * settings.size, 2 * settings.size).expand(c.num_samples, -1, -1, -1, -1)
        exact = exact_denoiser(*(a.to(device) for a in law))
    drawn_by = fingerprint(c, out / "ckpt.pt")
    if c.method == "auto":
        c.method = "trained" if meta["known"] else "linear"
    require(c.method != "trained" or meta["known"], "--method=trained needs a checkpoint of train.py --condition=known; use --method=linear")
    require(c.method != "trained" or problem.factor in (1, *diffusion.FACTORS), f"--factor={c.factor} is not one of {diffusion.FACTORS}, the block means that networks are trained with: use --method=linear")
    require(c.obs_std == 0 or c.method in ("linear", "moment_matching"), f"--obs_std belongs to --method=linear or moment_matching, not {c.method}")
    require(c.obs_std == 0 or len(problem.windows) == 1, f"--obs_std belongs to a single window of {len(problem.windows[0][0])} frames: what one window draws is exact to the next")
    require(c.guidance_scale == 1 or meta["conditions"] or c.method == "trained", "--guidance_scale needs a checkpoint of train.py with --condition")
    if compiled:
        network.compile_blocks()
    run = train.run_network(network, device, amp, settings, meta)
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
    valid = torch.ones(()) if c.exact else meta["valid"].to(device)
    step_over = lambda window: make_step(c, bool(problem.mask[:, :, window].any()), run.modes(len(window)), 1 if settings.distill else 2)
    if c.task == "morph":
        pair = guided(c, run, settings, meta, diffusion.Observation(*(a[[0, -1]].to(device) for a in (problem.y, problem.mask))), None)
        ends = encode(pair, given[[0, -1]], grid)
    with tqdm(total=len(mine) * (len(grid) - 1) * len(problem.windows), desc="sampling", unit="step", disable=rank > 0) as bar:
        for first in range(0, len(mine), c.batch_size):
            indices = mine[first : first + c.batch_size]
            rows, noise = [i // c.members for i in indices], generators(c.seed, indices)
            y, mask = problem.y[rows].to(device), problem.mask[rows].to(device)  # both fill up window by window
            for window, keep in problem.windows:
                known = diffusion.Observation(y[:, :, window], mask[:, :, window], problem.factor)
                denoise = exact if c.exact else guided(c, run, settings, meta, known, None if problem.told is None or c.task == "morph" else problem.told[rows][:, :, window].to(device))
                if c.task == "edit":
                    z = diffusion.diffuse(given[rows], grid[:1], noise(given[rows]))
                elif c.task == "encode":
                    z = encode(denoise, given[rows], grid)
                elif c.task == "morph":
                    z = torch.stack([diffusion.interpolate(*ends, i / (c.num_samples - 1)) for i in indices])
                else:  # at the first level the mean of the field, given what is known, shows already
                    z, level = torch.zeros_like(known.lift(known.y)), grid[:1].expand(len(rows))
                    z = diffusion.diffuse(denoise(z, level.to(device)), level, noise(z))
                for z, _ in diffusion.sample(denoise, z, grid, step_over(window), noise):
                    bar.update(len(indices))
                if not c.obs_std:
                    z = known.project(z)
                if problem.factor == 1:  # land stays unknown, as in training
                    y[:, :, window[keep]], mask[:, :, window[keep]] = z[:, :, keep] * valid, valid
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
    x, gap = None, 0.0  # (N, C, L, H, W) physical, on disk: thousands of clips need no memory
    for i in range(c.num_samples):
        y = torch.load(parts / f"{i:06d}.pt", weights_only=True)[None]
        if c.exact:  # of the latent field on the box, cut to the domain; every season is as likely
            y = y[..., : settings.size, : settings.size]
            clip = (data.rain(y, data.threshold(i)) if settings.dataset == "climate" else y).numpy()
        else:
            clip = data.denormalise(y, meta["transform"], meta["valid"])
        if x is None:
            x = np.lib.format.open_memmap(parts / "samples.npy", "w+", np.float32, (c.num_samples, *clip.shape[1:]))
        x[i] = clip[0]
        if c.task == "encode":
            gap += float((y - given[i : i + 1].cpu()).pow(2).mean()) / c.num_samples
    if c.task == "encode":
        print(f"round trip: RMS difference {math.sqrt(gap):.2e} standard deviations")
    problem.unseen = None  # the truth of what was drawn, where it is known to us
    if problem.mask.any():
        seen = diffusion.Observation(problem.y, problem.mask, problem.factor)
        problem.lifted = np.where(seen.lift(seen.mask) > 0, data.denormalise(seen.lift(seen.y), meta["transform"]), np.nan)
        if problem.truth is not None:
            unseen = np.where(np.isfinite(problem.lifted) & (problem.factor == 1), np.nan, problem.truth)
            problem.unseen = unseen if np.isfinite(unseen).any() else None
    lead = (np.arange(x.shape[2]) - problem.reference) * meta["step_hours"]

    command = " ".join(["sample.py", *(sys.argv[1:] if argv is None else argv)])
    history = f"{command}: sampler {c.sampler}, {c.steps} steps, {out}/ckpt.pt at step {checkpoint['step']}"
    ensemble = x.reshape(-1, c.members, *x.shape[1:])  # (R, M, C, L, H, W)
    given = bool(problem.mask.any())
    written = data.write_samples(folder, ensemble if given else x, meta | {"calendar": problem.calendar}, history, lead, problem.hours[:, problem.reference] if given else None)
    for i, name in enumerate(meta["names"]):
        suffix, rows = f"_{name}" if i else "", picture_rows(x, problem, c.members, i)
        contact_sheet(folder / f"samples{suffix}.png", rows, meta, i, lead)
        animation(folder / f"samples{suffix}.gif", rows, meta, i)
        written += [f"samples{suffix}.png", f"samples{suffix}.gif"]
    if missing:
        print(f"{len(missing)} clips in {seconds:.0f} s ({len(missing) / seconds:.2f} clips/s)")
    if c.theory:
        clip = pose(SimpleNamespace(**{**vars(c), "task": "edit", "num_samples": 1, "members": 1, "length": 0, "frames": 0, "input": ""}), settings, meta)
        blank = diffusion.Observation(clip.y.to(device), clip.mask.to(device))
        denoise, x_0 = guided(c, run, settings, meta, blank, None), data.normalise(clip.truth, meta["transform"])[0].to(device)
        theory_picture(folder / "theory.png", denoise, x_0, make_grid(SimpleNamespace(**{**vars(c), "task": "generate"}), settings, meta), make_step(c, False, run.modes(settings.frames), 1 if settings.distill else 2), generators(c.seed, [0]), meta)
        written.append("theory.png")
    if c.verify and c.task in ("generate", *GIVEN, "extend", "loop", "edit"):
        written += verify(c, settings, meta, problem, x, ensemble, lead, folder)
        if settings.dataset == "gaussian" and meta["transform"][0]["name"] == "none" and c.task == "generate" and x.shape[2] == settings.frames and x[0].size <= 4096:
            blank = lambda z: diffusion.Observation(torch.zeros_like(z), torch.zeros_like(z))
            denoise = None if c.exact else lambda z, logsnr: guided(c, run, settings, meta, blank(z), None)(z, logsnr)
            report = json.loads((folder / "verify.json").read_text()) | {"ruler": ruler(denoise, data.normalise(x, meta["transform"])[0], settings, meta, c.batch_size, device)}
            with data.replacing(folder / "verify.json") as f:
                f.write(json.dumps(report, indent=1).encode())
    del x, ensemble, problem
    for old in folder.glob("parts-*"):
        shutil.rmtree(old)
    print(f"\n{folder}/: {', '.join(written)}")


def verify(c, settings, meta, problem, x, ensemble, lead, folder):
    """Compare with held-out clips (of edits, with those they were made of), or where something was given with what then came.

    Tables, verify.json and verify.png.
    """
    T, L, groups, paired = settings.frames, x.shape[2], len(problem.y), c.task == "edit" or problem.unseen is not None
    climate = train.open_trained(settings, meta)
    train_starts, test = data.split_windows(climate, T)
    test = data.apart(test, T)
    area, report = data.latitude_weights(meta["coords"], meta["dims"]), {}
    if problem.unseen is None:  # nothing but the law of the data to compare with; long sequences in pieces
        n = min(T, L)
        truth = problem.truth if c.task == "edit" else data.clips(climate, data.thin(test, 4000), n)
        x, sequences = np.stack([x[:, :, t : t + n] for t in range(0, L - n + 1, n)], 1).reshape(-1, *x.shape[1:2], n, *x.shape[3:]) if L > n else x, x
        law = data.rain_law(settings.size, n, data.LEVELS, c.dry or meta["transform"][0]["drizzle"]) if settings.dataset == "climate" and c.task != "edit" else None
    else:
        generated = np.isfinite(problem.unseen).any((0, 1, 3, 4))  # frames
        x, truth, law = x[:, :, generated], problem.truth[:, :, generated], None
        drawn = data.clips(climate, data.thin(train_starts, 50), 1)  # (50, C, 1, H, W)
    for i, name in enumerate(meta["names"]):
        floor, dry, units, picture = 0.0 if meta["transform"][i]["floor"] == 0 else None, c.dry or meta["transform"][i]["drizzle"], meta["attrs"][i].get("units", "1"), folder / f"verify{f'_{name}' if i else ''}.png"
        report[name] = data.compare(x[:, i], truth[:, i], floor, dry, area, law, units, groups, paired)
        print_table(name, units, report[name])
        if problem.unseen is None:
            verification_picture(picture, report[name], meta, i)
            if L >= 2 * T and len(problem.windows) > 1:
                made_by = np.argmax([np.isin(np.arange(L), w[keep]) for w, keep in problem.windows], 0)  # the window that drew each frame
                part = max(T, L // 8)
                transformed = data.normalise(sequences, meta["transform"])[0][:, i].numpy()
                report[name]["drift"] = data.drift(sequences[:, i], np.where(np.isfinite(sequences[:, i]), transformed, np.nan), 1 + np.flatnonzero(np.diff(made_by)), part, floor, dry, area)
                print(f"  {f'from the first {part} frames to the last':<64}{'first':>10}{'last':>10}{'ratio':>8}  95 % interval")
                for label, (a, b, ratio, *interval) in report[name]["drift"].items():
                    print(f"  {label:<64}{a:>10.4f}{b:>10.4f}{ratio:>8.3f}  {' .. '.join(f'{v:.2f}' for v in interval)}")
            continue
        references = {}
        seen, there = np.isfinite(problem.lifted[0, i]), np.isfinite(problem.truth[0, i])
        whole = np.flatnonzero((seen >= there).all((-2, -1)) & seen.any((-2, -1)))  # frames wholly known
        if problem.factor > 1:
            references["block means"] = problem.lifted[None, :, i]
        elif len(whole):  # the nearest known frame
            references["persistence"] = problem.truth[None, :, i, whole[np.abs(np.arange(L)[:, None] - whole).argmin(1)]]
        references["climatology"] = drawn[:, None, i]  # (50, 1, 1, H, W)
        g = lambda a: np.where(np.isfinite(a), data.normalise(a[..., None, :, :, :], meta["transform"][i : i + 1])[0][..., 0, :, :, :].numpy(), np.nan)
        r = report[name]["ensemble"] = data.verify_ensemble(ensemble[:, :, i].swapaxes(0, 1), problem.unseen[:, i], references, lead, -math.inf if floor is None else floor + dry, g, area)
        print_ensemble(name, units, r)
        ensemble_picture(picture, r, report[name]["curves"], meta, i)
    if len(meta["names"]) > 1:
        report["correlation"] = data.cross_correlations(x, truth, meta["names"], area, groups, paired)
        for label, e in report["correlation"].items():
            print(f"correlation of {label:<28}{e['values'][0]:>10.3f}{e['values'][1]:>10.3f}{e['error']:>+10.3f}  {'~' if e['within_sampling_error'] else ''}")
    with data.replacing(folder / "verify.json") as f:
        f.write(json.dumps(report, indent=1).encode())
    return ["verify.json", "verify.png"]


if __name__ == "__main__":
    train.run_main(main)
