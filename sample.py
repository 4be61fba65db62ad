"""Generate climate clips from a checkpoint, draw them, and compare their statistics with held-out data.

    python sample.py --steps=256
    python sample.py --task=forecast --known=2 --members=16
    python sample.py --exact=true             # the exact denoiser in place of the network

Edit the settings below or override any of them as --key=value; --help lists them. What stands in brackets is
what a setting may be, and which task, sampler or method it belongs to.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

if __name__ == "__main__":  # torch takes seconds to import: until run_main, Ctrl-C ends without a traceback

    def interrupted(*_):
        print("sample.py: interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from tqdm import tqdm

import data
import diffusion
import train
from data import require

# ------------------------------------------------------------------------------------------------------------
out_dir = "out"  # where train.py left ckpt.pt; replaces out_dir/samples/
num_samples = 128  # clips to draw in all, the members of an ensemble counted one by one [>= 1]
batch_size = 32  # clips at a time; does not change the result [>= 1]
steps = 64  # sampler steps [>= 1, <= 1000000]
sampler = "auto"  # of diffusion.SAMPLERS; auto: dpmpp_mixed, dpmpp where a part is given, ode to encode
spacing = "auto"  # of steps: even in log-SNR where modes emerge; in training time; EDM's [auto | time | rho]
eta = 0.0  # 0 deterministic, 1 ancestral [>= 0, <= 1, sampler=ddim]
variance = 0.0  # of a step: 0 lower, 1 upper bound, between them interpolated [>= 0, <= 1, sampler=ancestral]
churn = 0.0  # relative noise added before a step [>= 0, sampler=heun]
corrections = 0  # Langevin steps per level; 0: 1 of pc, 10 of langevin [>= 0, <= 1000, sampler=pc langevin]
snr = 0.16  # signal-to-noise ratio of a Langevin step [> 0, sampler=pc langevin]
clip = "auto"  # clamp x_hat to the range of the training data; auto: for eps and score [auto | true | false]
# what is asked: the task says which part y = A x of the field is known
task = "generate"  # generate, forecast, hindcast, interpolate, inpaint, superres, extend, edit, encode, morph
input = ""  # file with what is given, of generate with what the model is told; empty: held-out clips
select = ""  # part of --input, as of train.py's --dataset
known = 2  # frames that are known, or handed from window to window [>= 1]
every = 2  # every n-th frame is known [>= 2, task=interpolate]
factor = 4  # means over factor x factor cells are known [>= 2, task=superres]
length = 0  # frames of the result; 0 is as trained, of extend eight times that [>= 0]
frames = 0  # frames drawn together; 0 is as trained, of longer sequences up to four times that [>= 0]
members = 1  # draws for each condition, an ensemble; num_samples / members conditions [>= 1]
method = "linear"  # how what is known moves x_hat [linear | guidance | imputation]
guidance_weight = 3.0  # of reconstruction guidance [>= 0, method=guidance]
obs_std = 0.0  # error of what is known, in standard deviations; 0: met exactly [>= 0, method=linear]
augment_logsnr = 6.0  # of the block means that an upsampler (--condition=coarse) is told [>= -2, <= 10]
guidance_scale = 1.0  # weight of what the network is told; 0 nothing, above 1 exaggerated [>= 0]
edit_logsnr = -2.0  # how far the fields are noised; lower keeps less [task=edit]
# machine and output
seed = 0  # sample i depends on (seed, i) alone [>= 0, <= 4294967295]
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of the network's autocast [auto | float32 | bfloat16]
compile = "auto"  # torch.compile; auto: on CUDA [auto | true | false]
checkpoint_activations = False  # guidance computes activations again in the backward pass: less memory
verify = True  # compare with held-out clips: verify.json, verify.png
exact = False  # the exact denoiser of the built-in latent field: what is left is the sampler's error
dry = 0.0  # cells up to this above a floor are dry, in its units; 0: a tenth of the mean, rounded [>= 0]
# ------------------------------------------------------------------------------------------------------------


# ------------------------------------------------------------------------------------------------------------
# tasks


@dataclass(frozen=True)
class Task:
    """What a task is given of each clip, and where sampling starts."""

    known: Callable | None = None  # known(t, length, settings) -> which frames are known; None: nothing is
    reads: bool = True  # clips of --input or of the held-out part
    start: str = "noise"  # noise, or the given clips: edit (noised), encode and morph (encoded)
    reverse: bool = False  # windows go from the end to the beginning


TASKS = {
    "generate": Task(reads=False),
    "forecast": Task(lambda t, length, c: t < c.known),
    "hindcast": Task(lambda t, length, c: t >= length - c.known, reverse=True),
    "interpolate": Task(lambda t, length, c: t % c.every == 0),
    "inpaint": Task(lambda t, length, c: t >= 0),
    "superres": Task(lambda t, length, c: t >= 0),
    "extend": Task(lambda t, length, c: t >= 0, reads=False),
    "edit": Task(start="edit"),
    "encode": Task(start="encode"),
    "morph": Task(start="morph"),
}


def check(c):
    """Refuse settings that cannot work together."""
    train.one_of(c, "task", TASKS)
    train.one_of(c, "sampler", ("auto", *diffusion.SAMPLERS))
    latent, count = c.task in ("encode", "morph"), f"--num_samples={c.num_samples}"
    smooth = c.sampler in ("auto", *diffusion.DETERMINISTIC) or (c.sampler == "ddim" and c.eta == 0)
    ordered = not latent or (smooth and c.churn == 0)
    require(ordered, f"--task={c.task} needs a deterministic sampler: --sampler=ode")
    require(not latent or c.steps != 1, f"--task={c.task} needs at least 2 --steps")
    require(c.task != "morph" or c.num_samples >= 2, "--task=morph needs --num_samples of at least 2")
    require(c.num_samples % c.members == 0, f"{count} must be a multiple of --members={c.members}")
    whole = c.task == "generate" and not c.length and not c.frames
    require(not c.exact or whole, "--exact belongs to --task=generate, with clips as long as trained on")


# ------------------------------------------------------------------------------------------------------------
# the problem: what is known of the clips to draw


@dataclass
class Problem:
    """What a run of the sampler is asked for, R = num_samples / members conditions.

    y, mask (R, C, L, H / factor, W / factor) standardised; truth (R, C, L, H, W) physical, NaN where unknown,
    or None; told (R, K, L, H, W) or None; hours (R, L) of the calendar; reference: the frame that lead times
    count from; windows: the clips to draw in turn (data.windows); imposed: whether the draws agree with y, of
    which an upsampler is only told. Of latents y, mask, told and windows have L / span frames.
    """

    y: torch.Tensor
    mask: torch.Tensor
    factor: int
    truth: np.ndarray | None
    told: torch.Tensor | None
    hours: np.ndarray
    calendar: str
    reference: int
    windows: list
    imposed: bool

    def given(self, codec):
        """What is known as fields, (R, C, L, H, W) physical, NaN where nothing is."""
        seen = diffusion.Observation(self.y, self.mask, self.factor)
        fields, mask = codec.decode(seen.lift(seen.y)), seen.lift(seen.mask)
        if mask.shape != fields.shape:  # of latents, that are known by frames
            mask = mask.amax((1, 3, 4), keepdim=True).repeat_interleave(codec.span, 2)
        return np.where(mask > 0, fields, np.nan)

    def unseen(self, codec):
        """The truth of what is drawn, NaN where it was known; None where nothing is known, or no truth."""
        if self.truth is None or not self.mask.any():
            return None
        unseen = np.where(np.isfinite(self.given(codec)) & (self.factor == 1), np.nan, self.truth)
        return unseen if np.isfinite(unseen).any() else None


def lengths(c, model):
    """(frames of the result, frames drawn together), checked."""
    trained, span = model.settings.frames, model.codec.span
    length = c.length or (8 * trained if c.task == "extend" else c.frames or trained)
    window = c.frames or min(max(trained, length), 4 * trained)
    handed = c.task in ("forecast", "hindcast", "extend")
    least = min(window, length) if handed else window if length > window else math.inf
    require(c.known < least, f"--known={c.known} leaves nothing of {least} frames to draw")
    whole = length % span == 0 == window % span and (c.known % span == 0 or least == math.inf)
    require(whole, f"a latent is {span} frames: --length, --frames and --known must be multiples of {span}")
    single = c.task in ("superres", "encode", "morph") or c.obs_std > 0
    what = "superres, encode, morph and --obs_std belong to a single window of frames"
    require(not single or window >= length, f"{what}: use --frames={length} or a shorter --length")
    return length, window


def check_room(c, model, length):
    """Refuse what is far too large for the disk or the memory here, roughly."""
    size = len(model.layout.names) * length * math.prod(model.layout.size) * 4  # bytes of a clip
    free, memory = shutil.disk_usage(c.out_dir).free, train.memory_size()
    text = f"{c.num_samples} samples of {length} frames need about"
    needed = 4 * c.num_samples * size  # parts, samples.npy, .npz and .nc
    require(needed < free, f"{text} {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free")
    conditions = 0 if c.task == "generate" else c.num_samples // c.members
    needed = 8 * size * (conditions + min(c.batch_size, c.num_samples))
    require(needed < memory, f"{text} {needed / 1e9:.0f} GB of memory, and there are {memory / 1e9:.0f}")


def open_input(c, model):
    """The record that clips are read from: --input, its rows and columns in the model's order, or its own.
    With --task=generate it holds what the model is told, with interpolate perhaps the known frames alone."""
    if not c.input:
        return model.record
    what, layout = f"--input={c.input}", model.layout
    if c.task == "generate":
        record = data.open_record(c.input, select=c.select).fit_to(layout, what, told=True)
    else:
        names = ",".join(layout.names) if layout.named else ""
        record = data.open_record(c.input, names, select=c.select)
        layout = replace(layout, step_hours=stride(c, model, record) * layout.step_hours)
        record = record.fit_to(layout, what, c.factor if c.task == "superres" else 1)
    size = tuple(model.layout.size)
    extras = {k: v for k, v in record.extras.items() if v.ndim == 1 or tuple(v.shape[-2:]) == size}
    if any("period" not in f and f["name"] not in extras for f in model.conditions.fitted):
        extras = {k: v for k, v in model.record.extras.items() if v.ndim == 2} | extras
    return replace(record, extras=extras)


def stride(c, model, record):
    """Frames from one of the record to the next: --every of a file with the known frames alone, else 1."""
    if c.task != "interpolate" or "frames" in (record.layout.calendar, model.layout.calendar):
        return 1
    step = c.every * model.layout.step_hours
    return c.every if abs(record.layout.step_hours - step) <= data.step_tolerance(step) else 1


def choose_starts(c, model, record, frames, count):
    """Where the clips that are read begin, (count,), and how many frames there are of each."""
    trained = model.settings.frames
    if c.input:
        starts = data.runs(record, frames)
    else:
        starts = data.split_windows(record, trained, max(frames, trained))[1]
    if not len(starts) and c.task in ("forecast", "hindcast"):  # no truth to verify with
        frames, starts = c.known, data.runs(record, c.known)
    require(len(starts), f"--input={c.input} has no {frames} consecutive frames")
    if c.task == "inpaint" and c.input:  # clips with a gap
        valid = model.codec.valid.numpy() > 0
        holes = [(np.isnan(record.frames(i, i + 1)) & valid).any() for i in range(len(record))]
        before = np.cumsum([0, *holes])
        starts = starts[before[starts + frames] > before[starts]]
        require(len(starts), f"--input={c.input} has no NaN: nothing is to be filled in")
    alone = c.input and len(np.unique(record.member[starts])) == len(starts) > 1
    if alone:  # clips that are records of their own, as the samples of a base model
        what = f"--input={c.input} has {len(starts)} clips"
        require(count <= len(starts), f"{what}: --num_samples is at most {len(starts)} x --members")
        chosen = np.arange(count)
    elif c.task == "generate" and not c.input:  # what sample i is told depends on (seed, i) alone
        chosen = [np.random.default_rng((c.seed, i)).integers(len(starts)) for i in range(count)]
    else:
        chosen = np.linspace(0, len(starts) - 1, count).astype(int)
    return starts[chosen], frames


def known_cells(c, clips, known, model):
    """(y, mask, factor) of an Observation: what clips (R, C, L, H, W) with NaN have in known frames (L,)."""
    (H, W), factor = model.layout.size, c.factor if c.task == "superres" else 1
    require(H % factor == 0 == W % factor, f"--factor={factor} does not divide the grid of {H} x {W}")
    y = model.codec.encode(clips)
    frames = known.reshape(-1, model.codec.span).all(1)
    whole = f"--task={c.task} knows single frames; a latent of this model is {model.codec.span} of them"
    require(frames.any() or not known.any(), whole)
    mask = y.isfinite().float() * torch.from_numpy(frames)[:, None, None]
    if c.task == "inpaint" and not c.input:  # for want of a hole, the middle is hidden
        mask[..., H // 4 : -(-3 * H // 4), W // 4 : -(-3 * W // 4)] = 0
    y = y.nan_to_num() * mask
    if factor > 1 and clips.shape[-2:] == (H, W):  # means of the blocks without a gap
        means = diffusion.Observation(y, torch.ones(()), factor).A
        y, mask = means(y), (means(mask) > 0.999).float()
    return y * mask, mask, factor


def pose(c, model):
    """The Problem that the settings ask for."""
    task, layout = TASKS[c.task], model.layout
    (length, window), span = lengths(c, model), model.codec.span
    count, t = c.num_samples // c.members, np.arange(length)
    start, before, record, told = np.zeros(count, int), 0, None, None  # before: frames ahead of those read
    every = 1  # frames from one that is read to the next
    clips = np.full((1, len(layout.names), length, *layout.size), np.nan, np.float32)
    reads = task.reads or (c.task == "extend" and bool(c.input)) or model.told_block > 0
    if reads or model.conditions.channels:
        record = open_input(c, model)
        wanted = min(window, model.settings.frames) if c.task == "extend" else length
        every = stride(c, model, record)
        start, n = choose_starts(c, model, record, -(-wanted // every), count)
    if reads:
        before = length - n if c.task == "hindcast" else 0
        clips = np.full((count, *clips.shape[1:3], *record.layout.size), np.nan, np.float32)
        clips[:, :, before : before + n * every : every] = data.read_clips(record, start, n)
    known = task.known(t, length, c) if task.known else t < 0
    y, mask, factor = known_cells(c, clips, known, model)
    first = record.hours[start] if record else np.zeros(count)
    hours = first[:, None] + (t - before) * layout.step_hours
    if model.conditions.channels:
        ends = np.append(np.flatnonzero(record.gaps()), len(record) - 1)  # of stretches without a gap
        index = (start[:, None] + (t - before) // every).clip(0, ends[np.searchsorted(ends, start)][:, None])
        if every > 1 and any("period" not in f for f in model.conditions.fitted):
            print(f"told      what a frame of --input has is kept for the {every - 1} that follow it")
        told = model.conditions.values(record, index[:, ::span], hours[:, ::span], model.grid)
    if model.told_block:
        noised = torch.full((count,), c.augment_logsnr), torch.Generator().manual_seed(c.seed)
        means = model.tell_coarse(clips, *noised)
        told = means if told is None else torch.cat([told, means], 1)
    require(factor > 1 or not mask.flatten(1).all(1).any(), f"--task={c.task} leaves nothing to draw")
    ahead = np.flatnonzero((mask.amax((1, 3, 4)) > 0).all(0))  # frames of which every clip is given something
    fine = np.isfinite(clips).any() and clips.shape[-2:] == layout.size
    return Problem(
        y=y.expand(count, *y.shape[1:]),
        mask=mask.expand(count, *y.shape[1:]),
        factor=factor,
        truth=clips if fine else None,
        told=told,
        hours=hours,
        calendar=record.layout.calendar if record else "none",
        reference=int(max(known.argmin() - 1, 0) if known[0] else known.argmax()),
        windows=data.windows(length // span, window // span, c.known // span, ahead, task.reverse),
        imposed=not model.told_block or c.task != "superres",
    )


# ------------------------------------------------------------------------------------------------------------
# drawing


class BoxLaw(diffusion.Gaussian):
    """The exact law of the built-in latent field on its periodic box, by Fourier mode; axes (M, M, T, T)."""

    @classmethod
    def of(cls, frames, size):
        w, U = data.latent_modes(frames, size)
        w, U = w.float().permute(2, 0, 1)[None], U.to(torch.complex64)  # (1, T, M, M), (M, M, T, T)
        return cls(torch.zeros(1, 1, 1, 1), w, U)

    def modes(self, x):
        return torch.einsum("yxts,...tyx->...syx", self.axes.conj(), torch.fft.fft2(x, norm="ortho"))

    def field(self, modes):
        return torch.fft.ifft2(torch.einsum("yxts,...syx->...tyx", self.axes, modes), norm="ortho").real

    def map(self, f):
        return BoxLaw(f(self.mean), f(self.variances), f(self.axes))


def make_denoiser(c, model, known, told):
    """denoise(z, logsnr) -> x_hat of clips with this Observation, told these condition values (or None)."""
    plain = partial(model.denoiser.denoise, cond=told)
    if c.guidance_scale != 1:
        untold = partial(model.denoiser.denoise, cond=torch.zeros_like(told))
        plain = diffusion.classifier_free(plain, untold, c.guidance_scale)
    if model.settings.param in ("eps", "score") if c.clip == "auto" else c.clip == "true":
        plain = diffusion.clip(plain, *model.codec.limits())
    if not known.mask.any():
        return plain
    if c.method == "linear":
        law = model.denoiser.gaussian.frames(known.mask.shape[2])
        return diffusion.linear_matching(plain, known, law, c.obs_std)
    if c.method == "guidance":
        return diffusion.reconstruction_guidance(plain, known, c.guidance_weight)
    return diffusion.imputation(plain, known)


def sampler_of(c, known):
    """The name of the sampler; known: whether a part of the clips is."""
    if c.sampler != "auto":
        return c.sampler
    return "ode" if c.task in ("encode", "morph") else "dpmpp" if known else "dpmpp_mixed"


def make_step(c, law, known):
    """The sampler's step with its options; known as in `sampler_of`."""
    name = sampler_of(c, known)
    options = {
        "ancestral": {"variance": c.variance},
        "ddim": {"eta": c.eta},
        "dpmpp_mixed": {"until": sum(law.emergence()) / 2},
        "heun": {"churn": c.churn},
        "modes": {"law": law},
        "pc": {"snr": c.snr, "num_corrections": c.corrections or 1},
        "langevin": {"snr": c.snr, "num_corrections": c.corrections or 10},
    }
    return partial(diffusion.SAMPLERS[name], **options.get(name, {}))


def make_grid(c, trained, emerging):
    """The log-SNRs to visit, (steps + 1,), from the Levels trained on and those where the modes emerge."""
    rho = diffusion.Levels("rho", emerging.lo, emerging.hi)
    grid = {"auto": emerging, "time": trained, "rho": rho}[c.spacing].grid(c.steps)
    if c.task == "edit":
        first, last = float(grid[0]), float(grid[-2])
        wrong = f"--edit_logsnr={c.edit_logsnr} lies outside the grid, from {first:.1f} to {last:.1f}"
        require(first <= c.edit_logsnr <= last, wrong)
        grid = torch.cat([grid.new_tensor([c.edit_logsnr]), grid[grid > c.edit_logsnr]])
    if c.sampler in ("sde", "langevin"):  # explicit in log-SNR, or nothing but Langevin steps between levels
        widest = float(grid[:-1].diff().max()) if len(grid) > 2 else math.inf
        enough = math.floor((emerging.hi - emerging.lo) / 2) + 3
        wrong = f"--sampler={c.sampler} is unstable with steps over 2 in log-SNR (here {widest:.1f})"
        require(widest < 2, f"{wrong}: use --spacing=auto with at least {enough} --steps")
    return grid


def encode(denoise, x, grid):
    """Latents of fields x (B, ...): the probability-flow ODE run from data to noise through the grid."""
    z = diffusion.diffuse(x, grid[-2:-1], torch.zeros_like(x))
    for z, _ in diffusion.sample(denoise, z, grid[:-1].flip(0), diffusion.ode):
        pass
    return z


class Sampler:
    """What draws the clips of a problem; law: that of --exact, or None."""

    def __init__(self, c, model, problem, grid, law):
        self.c, self.model, self.problem, self.grid, self.law = c, model, problem, grid, law
        self.device = model.denoiser.gaussian.mean.device
        self.x = None  # the clips that chains start from
        if TASKS[c.task].start != "noise":
            self.x = model.codec.encode(problem.truth).nan_to_num()
        if c.task == "morph":
            ends = self.x[[0, -1]].to(self.device)
            told = None if problem.told is None else problem.told[[0, -1]].to(self.device)
            self.ends = encode(partial(model.denoiser.denoise, cond=told), ends, grid)

    def start(self, denoise, like, indices, rows, window, noise):
        """z (B, C, T, H, W) at the first level of samples `indices` of conditions `rows`."""
        start, level = TASKS[self.c.task].start, self.grid[:1].expand(len(rows))
        if start == "morph":
            last = self.c.num_samples - 1
            return torch.stack([diffusion.interpolate(*self.ends, i / last) for i in indices])
        if start == "noise":  # at a finite level z has the mean of what is known, not 0
            x = denoise(torch.zeros_like(like), level)
        else:
            x = self.x[rows][:, :, window].to(like)
        return encode(denoise, x, self.grid) if start == "encode" else diffusion.diffuse(x, level, noise(x))

    def draw(self, indices, advance):
        """Standardised clips (B, C, L, H, W), window by window; advance(B) is called after every step."""
        problem, device, rows = self.problem, self.device, [i // self.c.members for i in indices]
        streams = [torch.Generator().manual_seed(train.torch_seed((self.c.seed, i))) for i in indices]

        def noise(z):  # on the CPU, one stream for each sample: the same in any batch, on any device
            return torch.stack([torch.randn(z.shape[1:], generator=g) for g in streams]).to(z)

        valid = 1 if self.law else self.model.codec.valid.to(device)
        y, mask = problem.y[rows].to(device), problem.mask[rows].to(device)  # both fill up window by window
        for window, keep in problem.windows:
            seen = mask[:, :, window] * problem.imposed
            known = diffusion.Observation(y[:, :, window], seen, problem.factor)
            told = None if problem.told is None else problem.told[rows][:, :, window].to(device)
            law = self.law or self.model.denoiser.gaussian.frames(len(window))
            denoise = law.denoise if self.law else make_denoiser(self.c, self.model, known, told)
            z = self.start(denoise, known.lift(known.y), indices, rows, window, noise)
            step = make_step(self.c, law, bool(seen.any()))
            for z, _ in diffusion.sample(denoise, z, self.grid, step, noise):
                advance(len(indices))
            if problem.factor > 1:
                return z
            y[:, :, window[keep]], mask[:, :, window[keep]] = z[:, :, keep] * valid, valid
        return y

    def decode(self, parts):
        """All clips in physical units, (N, C, L, H, W) float32 on disk: thousands of them need no memory."""
        c, codec, layout, gap = self.c, self.model.codec, self.model.layout, 0.0
        shape = c.num_samples, len(layout.names), self.problem.hours.shape[1], *layout.size
        x = data.reserved(parts / "samples.npy", shape, np.float32)
        for i in range(c.num_samples):
            y = torch.load(parts / f"{i:06d}.pt", weights_only=True)[None]
            if self.law:  # of the latent field on the box, cut to the domain; every season is as likely
                y = y[..., : layout.size[0], : layout.size[1]]
                rain = self.model.settings.dataset == "climate"
                x[i] = (data.rain(y, data.threshold(i)) if rain else y)[0]
            else:
                x[i] = codec.decode(y, valid=True)[0]
            if c.task == "encode":
                given = codec.encode(self.problem.truth[[i // c.members]])
                gap += float((y - given).pow(2).nanmean()) / c.num_samples
        if c.task == "encode":
            print(f"round trip: RMS difference {math.sqrt(gap):.2e} standard deviations")
        return x


def fingerprint(c, digest):
    """Names a set of samples by what they depend on, the code too: not the batch size or the machine."""
    free = {"out_dir", "batch_size", "device", "compile", "checkpoint_activations", "verify", "dry"}
    free |= {"num_samples"} if c.task == "generate" and not c.input else set()
    source = Path(c.input)
    while c.input and not source.exists():  # a group of a file
        source = source.parent
    files = (source, *source.rglob("[!.]*")) if c.input else ()
    files = [f for f in files if f.is_file() and not f.parent.name.startswith("parts-")]
    stamp = sorted((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
    settings = {k: v for k, v in vars(c).items() if k not in free}
    scripts = __file__, *(sys.modules[name].__file__ for name in ("data", "diffusion", "model", "train"))
    code = b"".join(Path(script).read_bytes() for script in scripts)
    text = json.dumps([digest, settings, stamp], sort_keys=True)
    return hashlib.sha256(code + text.encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------
# verification: pure functions of physical clips of one variable, (N, T, H, W), NaN where there is no data

LEVELS = [1 - 10.0**-n + k * 10.0 ** -(n + 1) for n in range(6) for k in range(9)]  # 0 .. 0.9 .. 0.999998
RETURNS = (2, 10, 50)  # return periods of the maximum of a clip, in clips
RESAMPLES, FEWEST_BLOCKS = 400, 5  # of a bootstrap, and below which it says nothing
CURVES = ("quantiles", "returns", "autocorrelation", "spatial_power", "temporal_power")
NATURAL = "natural"  # % for a variable with floor 0 (rain), else standard deviations: no per cent of kelvins
BIAS = "mean |bias| per cell"


def quantile(s, p):
    return np.interp(p, LEVELS, s["quantiles"])


def rms(d, weights):
    return np.sqrt(np.mean(d**2))


STATISTICS = [  # (label, unit of the error, what `statistics` returns -> number; an empty array: no such row)
    ("mean", NATURAL, lambda s: s["mean"]),
    ("standard deviation", "%", lambda s: s["std"]),
    ("dry fraction", "pt", lambda s: s["dry"]),  # pt: percentage points
    ("quantile 0.9", NATURAL, lambda s: quantile(s, 0.9)),
    ("quantile 0.99", NATURAL, lambda s: quantile(s, 0.99)),
    ("quantile 0.999", NATURAL, lambda s: quantile(s, 0.999)),
    ("quantile 0.9999", NATURAL, lambda s: quantile(s, 0.9999)),
    ("clip maximum, 1 in 2", NATURAL, lambda s: s["returns"][0]),
    ("clip maximum, 1 in 10", NATURAL, lambda s: s["returns"][1]),
    ("clip maximum, 1 in 50", NATURAL, lambda s: s["returns"][2]),
    ("autocorrelation, lag 1", "", lambda s: s["autocorrelation"][1:2]),
    ("autocorrelation, lag 3", "", lambda s: s["autocorrelation"][3:4]),
    ("autocorrelation, lag 6", "", lambda s: s["autocorrelation"][6:7]),
]
DISTANCES = [  # (label, unit, what `statistics` returns -> array, sizes of differences and weights -> error)
    ("spatial power, distance", "dB", lambda s: 10 * np.log10(s["spatial_power"]), rms),
    ("temporal power, distance", "dB", lambda s: 10 * np.log10(s["temporal_power"]), rms),
    ("mean |bias| per frame", NATURAL, lambda s: s["frames"], lambda d, w: area_mean(d, None)),
    (BIAS, NATURAL, lambda s: s["map"], lambda d, w: area_mean(d, None, w)),
]


def area_mean(a, axis, area=None):
    """Mean of a (..., H, W) over axis where it is not NaN, rows weighted by area (H,) if given."""
    there = np.isfinite(a)
    w = there if area is None else area[:, None] * there
    with np.errstate(invalid="ignore"):
        return np.sum(a * w, axis, np.float64, where=there) / np.sum(w, axis)


def spatial_spectrum(x):
    """Radially averaged power of single frames by wavenumber in cycles per cell: two (K,) arrays."""
    return data.rings((np.abs(np.fft.fft2(x)) ** 2).mean((0, 1)) / (x.shape[-2] * x.shape[-1]))


def temporal_spectrum(x):
    """Power of a cell's series, averaged over cells, by cycles per frame: two (K,) arrays."""
    T = x.shape[1]
    power = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean((0, 2, 3)) / T
    return np.arange(1, T // 2 + 1) / T, power[1:]


def tally(x, edges, wet, weights, centre):
    """Everything the statistics need of clips x (n, T, H, W), as sums: those of blocks of clips add up.

    edges: values at which to count; wet: above it a cell is not dry; weights (H,) of rows; no data counts as
    `centre` in spectra and nowhere else.
    """
    n, T = x.shape[:2]
    valid = np.isfinite(x)
    w, a = valid * weights[:, None], np.where(valid, x - centre, 0.0)
    maxima = np.where(valid, x, -np.inf).max((1, 2, 3))
    maxima = np.searchsorted(edges, maxima[maxima > -np.inf])
    lags = []
    for lag in range(T):
        both, first, second = w[:, : T - lag] * valid[:, lag:], a[:, : T - lag], a[:, lag:]
        lags.append([both.sum(), (both * first).sum(), (both * second).sum(), (both * first * second).sum()])
    return {
        "clips": n,
        "count": w.sum(),
        "sum": (w * a).sum(),
        "square": (w * a**2).sum(),
        "dry": (w * (x <= wet)).sum(),
        "frame": (w * a).sum((0, 2, 3)),  # (T,)
        "frame_count": w.sum((0, 2, 3)),
        "cell": a.sum((0, 1)),  # (H, W)
        "cell_count": valid.sum((0, 1)),
        "at": np.bincount(np.searchsorted(edges, x[valid]), w[valid], len(edges)),
        "maxima": np.bincount(maxima, minlength=len(edges)),
        "lags": np.transpose(lags),  # (4, T)
        "space": n * spatial_spectrum(a)[1],
        "time": n * temporal_spectrum(a)[1],
    }


def statistics(S, edges, wet, weights, centre):
    """What sums S of `tally` say of the clips, {name: number or array}; names as in data.rain_law."""
    m = S["sum"] / S["count"]
    variance = np.maximum(S["square"] / S["count"] - m**2, 0.0)
    count, first, second, product = S["lags"]
    return {
        "mean": m + centre,
        "std": np.sqrt(variance),
        "dry": np.full(int(np.isfinite(wet)), S["dry"] / S["count"]),  # empty for a variable without a floor
        "frames": S["frame"] / S["frame_count"] + centre,  # (T,)
        "map": S["cell"] / S["cell_count"] + centre,  # (H, W)
        "quantiles": np.interp(LEVELS, S["at"].cumsum() / S["count"], edges),
        "returns": np.interp(1 - 1 / np.array(RETURNS), S["maxima"].cumsum() / S["maxima"].sum(), edges),
        "autocorrelation": ((product - m * (first + second)) / count + m**2) / variance,
        "spatial_power": S["space"] / S["clips"],
        "temporal_power": S["time"] / S["clips"],
    }


def few(n):
    """Blocks of n clips of one record, which depend on each other: about sqrt(n) clips long, 10 to 100."""
    return min(n, max(round(math.sqrt(n)), 10), 100)


def bootstrap(samples, truth, sums, groups=None, paired=False):
    """Yields [sums over samples (N, ...), over true clips (M, ...)]: of all, then of RESAMPLES resamples, by
    blocks drawn with replacement; none of fewer than FEWEST_BLOCKS blocks.

    sums: clips -> {name: sum}. Samples are independent, or `groups` runs of them are: a sequence cut in
    pieces, the members of one condition. Held-out clips are not: see `few`. paired: of the truth, too, there
    are `groups` runs; group i was made of, or for, the i-th, and the two are drawn together. Of n blocks
    n - 1 are drawn, which gives means their variance (Rao and Wu 1988).
    """
    groups = groups or len(samples)
    counts = [few(groups)] * 2 if paired else [min(groups, 100), few(len(truth))]
    blocks = []
    for x, n, units in zip((samples, truth), counts, (groups, groups if paired else len(truth))):
        at = np.linspace(0, units, n + 1).astype(int) * (len(x) // units)
        parts = [sums(x[i:j]) for i, j in zip(at, at[1:])]
        blocks.append({k: np.array([p[k] for p in parts], np.float64) for k in parts[0]})  # (n, ...)
    rng = np.random.default_rng(0)
    for i in range(1 + RESAMPLES * (min(counts) >= FEWEST_BLOCKS)):
        times = [rng.multinomial(n - 1, np.full(n, 1 / n)) if i else np.ones(n) for n in counts]
        times = [times[0], times[0]] if paired else times
        yield [{k: np.tensordot(t, v, 1) for k, v in b.items()} for t, b in zip(times, blocks)]


def plain(value):
    """Numbers, arrays, lists and dicts as JSON takes them: None where a number is not finite."""
    text = json.dumps(value, default=lambda a: a.tolist())
    return json.loads(text, parse_constant=lambda name: None)


def table_row(unit, error, drawn, values):
    """A row of the table as plain values. The 95 % interval of an error is that of the resampled errors.

    values: of samples, held-out clips and, where known, the exact law. A distance has none: drawn is what
    chance alone makes of it, its interval 0 to the 95 % quantile of that.
    """
    interval, within = None, False
    if len(drawn) and np.isfinite([*drawn, error]).all():
        interval = np.quantile(drawn, (0.025, 0.975)) if values else np.array([0.0, np.quantile(drawn, 0.95)])
        within = bool(interval[0] <= (0.0 if values else error) <= interval[1])
    row = {"values": values, "error": error, "unit": unit, "interval": interval}
    return plain(row | {"within_sampling_error": within})


def values_of(of, samples, held_out, exact):
    """A statistic of samples, of held-out clips and, where it is known, of the exact law."""
    try:
        return [of(samples), of(held_out), of(exact)]
    except KeyError:
        return [of(samples), of(held_out)]


def unit_and_scale(unit, value, std, floor):
    """(unit of an error, what a difference is divided by for it: NaN where that means nothing).

    value, std: the statistic and the standard deviation of the reference.
    """
    if unit == NATURAL:
        unit = "%" if floor == 0 else "std"
    size = np.abs(value)
    least = 0.1 * np.nanmean(size) if size.ndim == 2 else 0.0  # no ratio to cells where it hardly ever rains
    return unit, {"%": np.where(size > least, size, np.nan), "std": std or np.nan}.get(unit, 1.0)


def compare_rows(draws, table, exact, floor=None, weights=None):
    """(rows, {curve: its values and band}, {row: differences}) of a table of statistics.

    draws: [statistics of samples, of held-out clips], of all, then of every resample; the reference is what
    the exact law says, else the held-out clips.
    """
    s, t = next(draws)
    reference = t | exact
    table = [row for row in table if np.size(row[2](s))]
    scales = [unit_and_scale(unit, of(reference), reference["std"], floor) for _, unit, of, *_ in table]
    found = [(of(s) - of(reference)) / scale for (_, _, of, *_), (_, scale) in zip(table, scales)]
    drawn, offsets = [[] for _ in table], {k: [] for k in CURVES if k in s}
    for a, b in draws:
        b = b | exact
        for (_, _, of, *size), (_, scale), whole, errors in zip(table, scales, found, drawn):
            d = (of(a) - of(b)) / scale
            errors.append(size[0](np.abs(d - whole), weights) if size else d.item())
        for k, draw in offsets.items():
            draw.append(a[k] - b[k])
    rows, curves = {}, {}
    for (label, _, of, *size), (unit, _), error, errors in zip(table, scales, found, drawn):
        error = size[0](np.abs(error), weights) if size else error.item()
        values = [] if size else [np.asarray(v).item() for v in values_of(of, s, t, exact)]
        rows[label] = table_row(unit, error, errors, values)
        if label == BIAS:  # independent errors add in squares
            beyond = np.sqrt(np.maximum(error**2 - np.mean(errors or np.nan) ** 2, 0.0))
            rows["mean |bias| beyond sampling"] = table_row(unit, beyond, [], [])
    for k, draw in offsets.items():
        curves[k] = dict(zip(("samples", "held_out", "exact"), values_of(itemgetter(k), s, t, exact)))
        if draw:  # where 95 % of perfect sample sets lie
            low_high = np.quantile(draw, (0.025, 0.975), axis=0)
            curves[k]["band"] = reference[k] + low_high - (s[k] - reference[k])
    return rows, curves, dict(zip((row[0] for row in table), found))


def values_to_count(samples, truth):
    """Values at which the distribution functions are counted: the quantiles asked for, and between them."""
    between = torch.special.ndtr(torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)).numpy()
    edges = [np.linspace(min(map(np.nanmin, (samples, truth))), max(map(np.nanmax, (samples, truth))), 241)]
    for x in (samples, truth):
        maxima = np.where(np.isfinite(x), x, -np.inf).max((1, 2, 3))
        edges.append(np.quantile(x[np.isfinite(x)], [*LEVELS, *between]))
        edges.append(np.quantile(maxima[maxima > -np.inf], 1 - 1 / np.array(RETURNS)))
    return np.unique(np.concatenate(edges).astype(np.result_type(samples, truth)))


def compare(samples, truth, floor=None, dry=0.01, weights=None, exact=None, groups=None, paired=False):
    """Statistics of sampled against true clips (N, T, H, W), a dict of plain values for verify.json.

    Errors are against the exact law where it says a statistic, else against the held-out clips. weights: (H,)
    area of rows. groups, paired: see `bootstrap`. Raises data.InputError if the samples or the held-out clips
    have no value at all.
    """
    for what, x in (("samples", samples), ("held-out clips", truth)):
        require(np.isfinite(x).any(), f"nothing to compare: all of the {what} is missing; try --verify=false")
    wet, note, exact = math.inf if floor is None else floor + dry, "", exact or {}
    if floor is not None and not (truth > wet).any():
        note = "The held-out clips are all dry: an error relative to them means nothing and is left out (-)."
        truth = np.where(np.isfinite(truth), floor, truth)  # rounding errors have no spectrum
    centre = float(np.nanmean(truth, dtype=np.float64))
    weights = np.ones(truth.shape[2]) if weights is None else weights
    how = {"edges": values_to_count(samples, truth), "wet": wet, "weights": weights, "centre": centre}
    draws = bootstrap(samples, truth, partial(tally, **how), groups, paired)
    draws = ([statistics(S, **how) for S in draw] for draw in draws)
    with np.errstate(all="ignore"):  # what has no value is null in the result
        rows, curves, differences = compare_rows(draws, STATISTICS + DISTANCES, exact, floor, weights)
    T, H, W = samples.shape[1:]
    curves["quantiles"]["levels"], curves["returns"]["clips"] = LEVELS, RETURNS
    curves["spatial_power"]["frequency"] = spatial_spectrum(np.zeros((1, 1, H, W)))[0]
    curves["temporal_power"]["frequency"] = temporal_spectrum(np.zeros((1, T, 1, 1)))[0]
    bias = np.vectorize("{:.4g}".format)(differences[BIAS]).astype(float)
    out = {"samples": len(samples), "held_out_clips": len(truth), "note": note, "rows": rows}
    return plain(out | {"curves": curves, "bias_map": bias})


def cross_correlations(samples, truth, names, weights=None, groups=None, paired=False):
    """Rows as in `compare`: correlation of pairs of variables in a cell and frame. (N, C, T, H, W) both"""
    weights = np.ones(samples.shape[3]) if weights is None else weights
    centre = np.nanmean(truth, (0, 2, 3, 4), keepdims=True, dtype=np.float64)[0]

    def products(x):
        valid = np.isfinite(x).all(1, keepdims=True)
        a, w = np.where(valid, x - centre, 0.0), valid * weights[:, None]
        product = np.einsum("nithw,njthw->ij", w * a, a)
        return {"count": w.sum(), "sum": (w * a).sum((0, 2, 3, 4)), "product": product}

    def correlation(S):
        m = S["sum"] / S["count"]
        C = S["product"] / S["count"] - np.outer(m, m)
        std = np.sqrt(np.diag(C))
        return {(i, j): C[i, j] / (std[i] * std[j]) for i, j in pairs} | {"std": None}

    pairs = list(itertools.combinations(range(len(names)), 2))
    table = [(f"{names[i]} with {names[j]}", "", itemgetter((i, j))) for i, j in pairs]
    draws = bootstrap(samples, truth, products, groups, paired)
    with np.errstate(all="ignore"):
        return compare_rows(([correlation(S) for S in draw] for draw in draws), table, {})[0]


# ------------------------------------------------------------------------------------------------------------
# ensembles: forecasts (M, N, ...) of what was then seen, truth (N, ...); NaN in either is left out


def crps(ensemble, truth):
    """Fair continuous ranked probability score, (M, N, ...), (N, ...) -> (N, ...) (Ferro 2014): E|X - y| less
    E|X - X'| / 2 of the members that are not missing, cell by cell; of one its absolute error."""
    M = np.isfinite(ensemble).sum(0)
    rank = np.arange(1, len(ensemble) + 1).reshape(-1, *[1] * truth.ndim)
    pairs = np.nansum((2 * rank - M - 1) * np.sort(ensemble, 0), 0)  # sum of |Xi - Xj|; NaN is sorted last
    error = np.nansum(np.abs(ensemble - truth), 0) / np.maximum(M, 1)
    return np.where((M > 0) & np.isfinite(truth), error - pairs / np.maximum(M * (M - 1), 1), np.nan)


def spread_skill(ensemble, truth, axis, area=None):
    """Root of the members' mean variance times (M + 1) / M, and RMSE of their mean: equal if calibrated."""
    M, seen = len(ensemble), np.isfinite(truth)
    spread = area_mean(np.where(seen, ensemble.var(0, ddof=1) * (M + 1) / M, np.nan), axis, area) ** 0.5
    return spread, area_mean((ensemble.mean(0) - truth) ** 2, axis, area) ** 0.5


def spread_ratio(ensemble, truth, area=None):
    """[spread over error of all conditions together, low, high]: its 95 % interval, if there are five."""
    some = np.isfinite(truth).any((1, 2, 3))
    spread, error = (v[some] ** 2 for v in spread_skill(ensemble, truth, (1, 2, 3), area))  # (N,)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws = bootstrap(spread, error, lambda v: {"sum": v.sum()}, paired=True)
        ratio, *others = [np.sqrt(s["sum"] / e["sum"]) for s, e in draws]
        return [ratio, *(np.quantile(others, (0.025, 0.975)) if others else ())]


def rank_histogram(ensemble, truth):
    """Share of each rank of the truth among the members, ties at random: flat if calibrated. (M + 1,)"""
    seen = np.isfinite(truth) & np.isfinite(ensemble).all(0)
    below, tied = (ensemble < truth).sum(0)[seen], (ensemble == truth).sum(0)[seen]
    rank = below + np.random.default_rng(0).integers(0, tied + 1)
    return np.bincount(rank, minlength=len(ensemble) + 1) / max(len(rank), 1)


def verify_ensemble(ensemble, truth, references, lead, least=-math.inf, g=np.asarray, area=None):
    """Scores per frame of one variable, a dict of plain values. (M, N, T, H, W), (N, T, H, W) with NaN.

    references: {name: (M', N, T, H, W) or broadcastable} to compare with; lead (T,) hours; least: values up
    to it are equal in the ranks (dry is dry); g: the transform in which spread and error are compared once
    more, where a few extremes do not make up most of the squared error; area (H,): weights of rows, of all
    but the ranks. Frames without any truth are left out.
    """
    frames, over = np.isfinite(truth).any((0, 2, 3)), (0, 2, 3)
    ensemble, truth, lead = ensemble[:, :, frames], truth[:, frames], np.asarray(lead)[frames]
    out = {"members": len(ensemble), "conditions": len(truth), "lead_hours": lead}
    out["crps"] = area_mean(crps(ensemble, truth), over, area)
    for name, r in references.items():
        r = np.broadcast_to(r, (len(r), len(truth), len(frames), *truth.shape[2:]))[:, :, frames]
        out[f"crps_{name}"] = area_mean(crps(r, truth), over, area)
    if len(ensemble) > 1:
        out["spread"], out["rmse"] = spread_skill(ensemble, truth, over, area)
        out["spread_skill"] = spread_ratio(ensemble, truth, area)
        out["spread_skill_transformed"] = spread_ratio(g(ensemble), g(truth), area)
        out["rank_histogram"] = rank_histogram(np.maximum(ensemble, least), np.maximum(truth, least))
    return plain(out)


# ------------------------------------------------------------------------------------------------------------
# tables


def shown(value, unit=None, sign=""):
    """A value, or an error in its unit: fractions as per cent or percentage points. - where there is none."""
    if value is None:
        return "-"
    digits = ".4g" if 0 < abs(value) < 0.1 else ".4f" if abs(value) < 1e4 else ".7g"
    digits = {"%": ".1%", "pt": ".2f", "dB": ".2f", "std": ".3f", "": ".4f"}.get(unit, digits)
    text = f"{100 * value if unit == 'pt' else value:{sign}{digits}}"
    return f"{text} {unit}" if unit in ("pt", "dB", "std") else text


def print_rows(heading, rows, note="", columns=("samples", "held-out", "exact law")):
    """Rows of `compare` or of `cross_correlations`, under a heading, and a sentence on them."""
    columns = columns[: max(len(row["values"]) for row in rows.values())]
    columns = "".join(f"{c:>12}" for c in columns)
    print(f"\n{heading:<32}{columns}{'error':>12}   95 % interval of the error")
    for label, row in rows.items():
        sign = "+" if row["values"] else ""  # a distance has none
        values = "".join(f" {shown(v):>11}" for v in row["values"])
        interval, within = "", "within sampling error" if row["within_sampling_error"] else ""
        if row["interval"]:
            low, high = (shown(v, row["unit"], sign) for v in row["interval"])
            interval = f"{low} .. {high}" if sign else f"up to {high} by chance"
        error = shown(row["error"], row["unit"], sign)
        print(f"  {label:<30}{values:<{len(columns)}} {error:>11}   {interval:<29}{within}".rstrip())
    if not note and not any(row["interval"] for row in rows.values()):
        note = "Too few independent clips for intervals."
    if note:
        print(f"  {note}")


def print_ensemble(variable, scores):
    """The scores of `verify_ensemble`, a line per frame."""
    units, members = variable.units or "1", scores["members"]
    print(f"\n{variable.name} [{units}]: {members} members, {scores['conditions']} conditions")
    columns = {"crps": "CRPS"} | {k: f"CRPS of {k[5:]}" for k in scores if k.startswith("crps_")}
    if members > 1:
        columns |= {"spread": "spread", "rmse": "RMSE of mean"}
        for label, key in ((f"in {units}", "spread_skill"), ("transformed", "spread_skill_transformed")):
            ratio, *ends = (shown(v) for v in scores[key])
            interval = f", 95 % interval {ends[0]} .. {ends[1]}" if ends else ""
            print(f"  spread / error, {label:<14}{ratio}{interval}")
        ranks = " ".join(f"{v * (members + 1):.2f}" for v in scores["rank_histogram"])
        print(f"  share of each rank, times members + 1 (1.00 if calibrated): {ranks}")
    widths = {k: max(12, len(name) + 4) for k, name in columns.items()}
    print(f"  {'lead, h':>8}" + "".join(f"{columns[k]:>{n}}" for k, n in widths.items()))
    for i, lead in enumerate(scores["lead_hours"]):
        print(f"  {lead:>8.4g}" + "".join(f" {shown(scores[k][i]):>{n - 1}}" for k, n in widths.items()))


# ------------------------------------------------------------------------------------------------------------
# pictures

WHITE, INK, GREY, BAND, NO_DATA = "#ffffff", "#1e1e1e", "#d7d7d7", "#dee2e8", "#bebebe"
TRUTH, DRAWN, LAW = "#141414", "#d6452f", "#2e78be"
RAIN = ("#ffffff", "#cde5f5", "#7cb9e2", "#2e78be", "#313695", "#762a83", "#e7298a")
DIVERGING = ("#213984", "#4382be", "#a0cde2", "#f7f7f7", "#f6b896", "#d05442", "#800c26")


def write(draw, xy, text, size=12, anchor="la", colour=INK):
    draw.text(xy, text, colour, ImageFont.load_default(size), anchor, stroke_width=2, stroke_fill=WHITE)


def save(path, image, **options):
    with data.replacing(path) as f:
        image.save(f, path.suffix[1:].upper(), **options)


def scale_of(x, floor, mean=None):
    """(low, high, palette, gamma < 1 to spread low values): from a floor of 0 up, else around the mean."""
    x = x[np.isfinite(x)] if np.isfinite(x).any() else np.zeros(1)
    if floor == 0:
        return 0.0, float(np.quantile(x, 0.999)) or 1.0, RAIN, 0.5
    mean = float(x.mean()) if mean is None else mean
    reach = float(np.quantile(np.abs(x - mean), 0.995)) or 1.0
    return mean - reach, mean + reach, DIVERGING, 1.0


def tile(x, scale, size):
    """A picture of one field (H, W) of `size` (width, height) pixels; grey where there is no data."""
    low, high, palette, gamma = scale
    u = np.clip((np.nan_to_num(x, nan=low) - low) / (high - low), 0, 1) ** gamma * (len(palette) - 1)
    channels = zip(*map(ImageColor.getrgb, palette))
    rgb = np.stack([np.interp(u, range(len(palette)), channel) for channel in channels], -1)  # (H, W, 3)
    rgb = np.where(np.isfinite(x)[..., None], rgb, ImageColor.getrgb(NO_DATA)).astype(np.uint8)
    return Image.fromarray(rgb).resize(size, Image.NEAREST if size[0] >= x.shape[1] else Image.BOX)


def colour_bar(image, x, y, height, scale, label):
    """A vertical bar at (x, y) with five values, and its label above."""
    low, high, palette, gamma = scale
    draw = ImageDraw.Draw(image)
    image.paste(tile(np.linspace(1, 0, height)[:, None], (0, 1, palette, 1.0), (14, height)), (x, y))
    draw.rectangle((x, y, x + 13, y + height - 1), outline=INK)
    for u in np.linspace(0, 1, 5):
        value = low + u ** (1 / gamma) * (high - low)
        write(draw, (x + 19, y + (height - 1) * (1 - u)), f"{value:.3g}", 11, "lm")
    write(draw, (x, y - 8), label, 12, "ls")


def unit_of_time(layout):
    """(name, sign, hours) of the unit of time in pictures: the largest that a step of the data fills."""
    units = ("day", "d", 24.0), ("hour", "h", 1.0), ("minute", "min", 1 / 60)
    return next((u for u in units if layout.step_hours >= u[2]), units[-1])


def mosaic(fields, columns, scale, factor):
    """A picture of fields (H, W) in rows of so many, `factor` pixels a cell, 4 pixels apart."""
    h, w = (n * factor for n in fields[0].shape)
    image = Image.new("RGB", (columns * (w + 4), -(-len(fields) // columns) * (h + 4)), GREY)
    for i, x in enumerate(fields):
        corner = (i % columns * (w + 4) + 2, i // columns * (h + 4) + 2)
        image.paste(tile(x, scale, (w, h)), corner)
    return image


def contact_sheet(path, rows, variable, layout, lead_hours):
    """Clips as rows of at most 12 frames, those known framed, in one colour scale; lead_hours (T,) above.

    rows: (label, field (T, H, W) with NaN, known (T,) bool) each.
    """
    _, sign, hours = unit_of_time(layout)
    chosen = np.unique(np.linspace(0, len(lead_hours) - 1, min(len(lead_hours), 12)).astype(int))
    fields = [layout.north_up(x[t]) for _, x, _ in rows for t in chosen]
    scale = scale_of(np.stack([x for _, x, _ in rows]), variable.floor)
    clips = mosaic(fields, len(chosen), scale, max(1, round(104 / max(fields[0].shape))))
    w, h, left, top = clips.width // len(chosen), clips.height // len(rows), 64, 50
    image = Image.new("RGB", (left + clips.width + 96, top + clips.height + 8), WHITE)
    image.paste(clips, (left, top))
    draw = ImageDraw.Draw(image)
    framed = ", framed where known" if any(known.any() for *_, known in rows) else ""
    write(draw, (left, 6), f"{variable.long_name or variable.name}: generated clips{framed}", 14)
    for k, t in enumerate(chosen):
        write(draw, (left + (k + 0.5) * w, top - 4), f"{lead_hours[t] / hours:+.3g} {sign}", 11, "ms")
    for i, (label, _, known) in enumerate(rows):
        y = top + i * h
        write(draw, (left - 8, y + h / 2), label, 11, "rm")
        for x in left + w * np.flatnonzero(known[chosen]):
            draw.rectangle((x, y, x + w - 1, y + h - 1), outline=INK, width=2)
    colour_bar(image, left + clips.width + 12, top + 6, min(clips.height, 260) - 10, scale, variable.units)
    save(path, image)


def animation(path, rows, variable, layout):
    """A looping GIF of the same rows, beside each other or, where all have one kind of label, in a square."""
    square = len({label.split()[0] for label, *_ in rows}) == 1
    side = math.isqrt(len(rows)) if square else len(rows)
    x = np.stack([layout.north_up(x) for _, x, _ in rows[: side * side]], 1)  # (T, N, H, W)
    scale, factor = scale_of(x, variable.floor), max(1, round(128 / max(x.shape[-2:])))
    frames = [mosaic(fields, side, scale, factor).quantize(96) for fields in x]
    save(path, frames[0], save_all=True, append_images=frames[1:], duration=250, loop=0)


def axis(values, log, start, stop):
    """(function from values to pixels, about six round values to mark) of an axis between two pixels."""

    def scaled(v):
        v = np.asarray(v, float)
        return np.log10(np.where(v > 0, v, np.nan)) if log else v

    def at(v):
        return np.interp(scaled(v), (low, high), (start, stop))

    u = scaled(values)
    u = u[np.isfinite(u)] if np.isfinite(u).any() else np.zeros(1)
    margin = 0.06 * np.ptp(u) or abs(u[0]) * 0.1 or 1.0
    low, high = u.min() - margin, u.max() + margin
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    marks = step * np.arange(math.ceil(low / step), high / step)
    if log:
        decades = 10.0 ** np.arange(math.floor(low), high, max(1, round(step)))
        marks = np.outer(decades, (1, 2, 5) if high - low < 3 else 1).ravel()
    return at, marks[(low <= scaled(marks)) & (scaled(marks) <= high)]


class Page:
    """A picture of two rows of three panels; first those of quantiles and of spectra, from `compare`."""

    def __init__(self, heading, curves, variable, layout):
        self.image = Image.new("RGB", (1200, 715), WHITE)
        self.draw, self.panels = ImageDraw.Draw(self.image), 0
        write(self.draw, (12, 8), f"{variable.long_name or variable.name}: {heading}", 14)
        units, (unit, _, hours) = variable.units or "1", unit_of_time(layout)
        q = curves["quantiles"]
        self.curve(f"quantiles, {units}", f"held-out, {units}", q["held_out"], q)
        for which, what, per in (("spatial", "cell", 1.0), ("temporal", unit, hours / layout.step_hours)):
            power = curves[f"{which}_power"]
            k = per * np.array(power["frequency"])
            self.curve(f"{which} power, ({units})^2", f"cycles per {what}", k, power, True, True)

    def panel(self, title):
        """Corner (x, y) of the next panel, 392 x 325 pixels."""
        x, y = self.panels % 3 * 400, self.panels // 3 * 335 + 40
        self.panels += 1
        write(self.draw, (x + 220, y + 12), title, 14, "mm")
        return x, y

    def plot(self, title, xlabel, lines, logx=False, logy=False, band=((), (), ())):
        """Lines (label, x, y, colour, whether as points); band (x, low, high) in grey."""
        x0, y0 = self.panel(title)
        left, right, top, bottom = x0 + 58, x0 + 380, y0 + 30, y0 + 285
        write(self.draw, ((left + right) / 2, y0 + 317), xlabel, 12, "mm")
        across, xmarks = axis(np.concatenate([x for _, x, *_ in lines]), logx, left, right)
        up, ymarks = axis(np.concatenate([y for _, _, y, *_ in lines]), logy, bottom, top)

        def pixels(x, y):
            return [(a, b) for a, b in zip(across(x), up(y)) if math.isfinite(a + b)]

        for v in xmarks:
            self.draw.line((across(v), top, across(v), bottom), fill=GREY)
            write(self.draw, (across(v), bottom + 4), f"{v:.3g}", 11, "ma")
        for v in ymarks:
            self.draw.line((left, up(v), right, up(v)), fill=GREY)
            write(self.draw, (left - 5, up(v)), f"{v:.3g}", 11, "rm")
        x, low, high = band
        if len(pixels(x, low)) > 1:
            self.draw.polygon(pixels(x, low) + pixels(x, high)[::-1], fill=BAND)
        first = [y for _, y in pixels(*lines[0][1:3])] or [0]
        rises = first[-1] < first[0]  # labels go to the corner that is free; pixels count from the top
        for n, (label, x, y, colour, points) in enumerate(lines):
            for a, b in pixels(x, y) if points else ():
                self.draw.ellipse((a - 3, b - 3, a + 3, b + 3), outline=colour, width=2)
            if not points and len(pixels(x, y)) > 1:
                self.draw.line(pixels(x, y), fill=colour, width=2)
            xy = (left + 8 if rises else right - 8, top + 8 + 16 * n)
            write(self.draw, xy, label, 12, "la" if rises else "ra", colour)
        self.draw.rectangle((left, top, right, bottom), outline=INK)

    def curve(self, title, xlabel, x, curve, logx=False, logy=False):
        """A curve of `compare`: samples, held-out clips, the exact law and the band of perfect samples."""
        lines = [("held-out", x, curve["held_out"], TRUTH, False)]
        if "exact" in curve:
            lines.append(("exact law", x, curve["exact"], LAW, False))
        lines.append(("samples", x, curve["samples"], DRAWN, len(x) < 60))
        self.plot(title, xlabel, lines, logx, logy, (x, *curve.get("band", ((), ()))))

    def map(self, title, x, scale, label):
        """A field (H, W) with its colour bar."""
        x0, y0 = self.panel(title)
        factor = min(282 / x.shape[1], 265 / x.shape[0])
        factor = math.floor(factor) or factor
        w, h = max(1, round(x.shape[1] * factor)), max(1, round(x.shape[0] * factor))
        self.image.paste(tile(x, scale, (w, h)), (x0 + 20, y0 + 40))
        self.draw.rectangle((x0 + 19, y0 + 39, x0 + 20 + w, y0 + 40 + h), outline=INK)
        colour_bar(self.image, x0 + 34 + w, y0 + 46, max(h - 8, 60), scale, label)


def verification_picture(path, result, variable, layout):
    """Quantiles, spectra, maxima, autocorrelation and the bias of the mean, from `compare`."""
    curves, (unit, _, hours) = result["curves"], unit_of_time(layout)
    heading = f"{result['samples']} samples (red) against {result['held_out_clips']} held-out clips (black)"
    heading += " and the exact law (blue)" * ("exact" in curves["quantiles"])
    heading += "; grey: where 95 % of perfect sample sets lie"
    page = Page(heading, curves, variable, layout)
    title = f"maximum of a clip, {variable.units or 1}"
    page.curve(title, "return period, clips", RETURNS, curves["returns"], logx=True)
    lags = np.arange(len(curves["autocorrelation"]["samples"])) * layout.step_hours / hours
    page.curve("autocorrelation", f"lag, {unit}s", lags, curves["autocorrelation"])
    bias = layout.north_up(np.array(result["bias_map"], dtype=float))
    what, label = ("mean", "fraction") if variable.floor == 0 else ("standard deviation", "std")
    page.map(f"bias of the mean / {what}", bias, scale_of(bias, None, 0.0), label)
    save(path, page.image)


def ensemble_picture(path, scores, curves, variable, layout):
    """Scores and ranks of `verify_ensemble`; quantiles and spectra of what was drawn by `compare`."""
    (unit, _, hours), units, members = unit_of_time(layout), variable.units or "1", scores["members"]
    heading = f"{members} members, {scores['conditions']} conditions"
    heading += "; what was generated (red) and what then came (black)"
    page = Page(heading, curves, variable, layout)

    def by_lead(title, colours):
        lead = np.divide(scores["lead_hours"], hours)
        lines = [(label, lead, scores[k], colour, len(lead) == 1) for label, k, colour in colours]
        page.plot(f"{title}, {units}", f"lead time, {unit}s", lines)

    keys = [k for k in scores if k.startswith("crps")]
    by_lead("CRPS", [(k[5:] or "ensemble", k, colour) for k, colour in zip(keys, (DRAWN, LAW, TRUTH))])
    if members > 1:
        by_lead("spread and error", [("spread", "spread", DRAWN), ("RMSE of the mean", "rmse", TRUTH)])
        share, rank = np.array(scores["rank_histogram"]) * (members + 1), np.arange(members + 1)
        lines = [("calibrated", rank, np.ones(members + 1), TRUTH, False), ("", rank, share, DRAWN, True)]
        lines.append(("", (0, 0), (0, 2), GREY, False))  # an axis from 0 to 2 at least
        page.plot("share of each rank, times members + 1", "rank of the truth", lines)
    save(path, page.image)


# ------------------------------------------------------------------------------------------------------------
# the script


def picture_rows(x, problem, codec, members, channel):
    """(label, fields (T, H, W), known (T,)) of what the pictures show: what is given, truth, draws."""
    known = (problem.mask[:2, 0].flatten(2).amin(-1) > 0).numpy() & (problem.factor == 1)
    known = known.repeat(codec.span, 1)  # (R, T)
    if not problem.mask.any():
        return [(f"clip {i}", x[i, channel], known[0]) for i in range(min(6, len(x)))]
    given, unseen, rows = problem.given(codec), problem.unseen(codec), []
    for r in range(len(known)):
        rows.append(("given", given[r, channel], known[r]))
        if unseen is not None:
            rows.append(("truth", problem.truth[r, channel], known[r]))
        for m in range(min(members, 3)):
            rows.append((f"draw {m}" if members > 1 else "drawn", x[r * members + m, channel], known[r]))
    return rows


def write_results(c, model, problem, x, history, folder):
    """samples.npz, samples.nc and the pictures; returns their names."""
    given = bool(problem.mask.any()) and (problem.imposed or c.members > 1)
    layout = replace(model.layout, calendar=problem.calendar)
    lead = (np.arange(x.shape[2]) - problem.reference) * layout.step_hours
    fields = x.reshape(-1, c.members, *x.shape[1:]) if given else x  # (R, M, C, L, H, W): ensembles
    reference = problem.hours[:, problem.reference] if given else None
    written = data.write_samples(folder, fields, layout, history, lead, reference)
    for i, variable in enumerate(model.codec.variables):
        rows = picture_rows(x, problem, model.codec, c.members, i)
        stem = f"samples_{variable.name}" if i else "samples"
        contact_sheet(folder / f"{stem}.png", rows, variable, layout, lead)
        animation(folder / f"{stem}.gif", rows, variable, layout)
        written += [f"{stem}.png", f"{stem}.gif"]
    return written


def references(model, problem):
    """What an ensemble is compared with: {name: fields that broadcast to (M, R, C, L, H, W)}."""
    given = problem.given(model.codec)
    if problem.factor > 1:
        return {"block means": given[None]}
    record = model.record
    starts = data.split_windows(record, model.settings.frames)[0]
    out = {"climatology": data.read_clips(record, data.thin(starts, 50), 1)[:, None]}  # (50, 1, C, 1, H, W)
    seen, there = np.isfinite(given[0]), np.isfinite(problem.truth[0])
    whole = np.flatnonzero((seen >= there).all((0, 2, 3)) & seen.any((0, 2, 3)))  # frames wholly known
    if len(whole):
        nearest = whole[np.abs(np.arange(given.shape[2])[:, None] - whole).argmin(1)]
        out["persistence"] = problem.truth[None, :, :, nearest]
    return out


def held_out_clips(model, frames):
    """Held-out clips that do not overlap, (N, C, T, H, W): up to 2^28 values, but at least 20 clips."""
    record = model.record
    starts = data.apart(data.split_windows(record, model.settings.frames)[1], model.settings.frames)
    values = len(model.layout.names) * frames * math.prod(model.layout.size)
    return data.read_clips(record, data.thin(starts, min(4000, max(20, 2**28 // values))), frames)


def in_pieces(x, n):
    """Sequences (N, C, L, H, W) as clips of n frames, those of one sequence in a row."""
    N, C, L, H, W = x.shape
    pieces = x[:, :, : L // n * n].reshape(N, C, L // n, n, H, W)
    return pieces.swapaxes(1, 2).reshape(-1, C, n, H, W)


def correlation_at_joins(y, windows):
    """Correlation with the frame before, {where: number}, of sequences y (N, L, H, W) drawn in windows."""
    numbers = np.arange(1 + max(w.max() for w, _ in windows))  # of frames, or of latents of several
    drawn_by = np.argmax([np.isin(numbers, w[keep]) for w, keep in windows], 0)
    drawn_by = drawn_by.repeat(y.shape[1] // len(numbers))
    joins, out = np.diff(drawn_by) != 0, {}
    for where, at in (("inside windows", ~joins), ("across joins", joins)):
        before, after = y[:, :-1][:, at], y[:, 1:][:, at]
        seen = np.isfinite(before) & np.isfinite(after)
        with np.errstate(invalid="ignore"):
            out[where] = np.corrcoef(before[seen], after[seen])[0, 1]
    return plain(out)


def verify_sequences(x, variable, windows, trained, how):
    """Do sequences x (N, L, H, W), twice as long as those trained on or longer, stay what they were?"""
    part, out = max(trained, x.shape[1] // 8), {}
    if x.shape[1] < 2 * trained:
        return out
    out["drift"] = compare(x[:, -part:], x[:, :part], paired=True, **how)["rows"]
    print_rows(f"last {part} frames against the first", out["drift"], columns=("last", "first"))
    if len(windows) > 1:
        out["joins"] = correlation_at_joins(variable.encode(x), windows)
        numbers = ", ".join(f"{shown(v)} {where}" for where, v in out["joins"].items())
        print(f"  correlation with the frame before: {numbers}")
    return out


def verify_samples(c, model, problem, x, folder):
    """Compare ensembles with what then came, edits with their clips, all others with held-out clips, long
    sequences in pieces. Returns what goes into verify.json."""
    s, layout, unseen, report = model.settings, model.layout, problem.unseen(model.codec), {}
    frames, groups = min(s.frames, x.shape[2]), len(problem.y)
    paired = unseen is not None or c.task == "edit"
    if unseen is not None:
        drawn = np.isfinite(unseen).any((0, 1, 3, 4))
        clips, truth = x[:, :, drawn], problem.truth[:, :, drawn]
        others = references(model, problem)
    else:
        clips = in_pieces(x, frames)
        truth = in_pieces(problem.truth, frames) if paired else held_out_clips(model, frames)
    again = model.codec.decode(model.codec.encode(truth), valid=True) if s.vae else None
    for i, variable in enumerate(model.codec.variables):
        how = {"floor": variable.floor, "dry": c.dry or variable.dry, "weights": layout.area()}
        law = None
        if s.dataset == "climate" and not paired and layout.size == (s.size, s.size):
            law = data.rain_law(s.size, frames, LEVELS, how["dry"])
        result = compare(clips[:, i], truth[:, i], exact=law, groups=groups, paired=paired, **how)
        report[variable.name] = result
        print_rows(f"{variable.name} [{variable.units or 1}]", result["rows"], result["note"])
        if s.vae:
            result["autoencoder"] = compare(again[:, i], truth[:, i], paired=True, **how)["rows"]
            print_rows("held-out clips through the autoencoder", result["autoencoder"])
        picture = folder / (f"verify_{variable.name}.png" if i else "verify.png")
        if unseen is None:
            verification_picture(picture, result, variable, layout)
            result |= verify_sequences(x[:, i], variable, problem.windows, s.frames, how | {"groups": groups})
            continue
        ensemble = x[:, i].reshape(-1, c.members, *x.shape[2:]).swapaxes(0, 1)  # (M, R, L, H, W)
        channel = {name: fields[:, :, i] for name, fields in others.items()}
        least = -math.inf if variable.floor is None else variable.floor + how["dry"]
        lead = (np.arange(x.shape[2]) - problem.reference) * layout.step_hours
        scores = verify_ensemble(ensemble, unseen[:, i], channel, lead, least, variable.encode, layout.area())
        result["ensemble"] = scores
        print_ensemble(variable, scores)
        ensemble_picture(picture, scores, result["curves"], variable, layout)
    if len(report) > 1:
        rows = cross_correlations(clips, truth, layout.names, layout.area(), groups, paired)
        report["correlation"] = rows
        print_rows("correlation of variables", rows)
    return report


def load_model(c):
    """(model, digest of the checkpoint's bytes, its step) on the device that the settings ask for."""
    device, dtype, compiled = train.pick_device(c)
    checkpoint = train.load_checkpoint(Path(c.out_dir) / "ckpt.pt")
    with train.fitting():
        model = train.Model.load(checkpoint, dtype)
    model.denoiser.to(device).eval().requires_grad_(False)
    model.denoiser.network.checkpoint_activations = c.checkpoint_activations
    what = f"{c.out_dir} holds an autoencoder: train a model of its latents, train.py --vae={c.out_dir}"
    require(model.settings.network != "vae", what)
    dataset = model.settings.dataset
    builtin, fields, means = dataset in ("climate", "gaussian"), model.conditions.channels, model.told_block
    cells = model.settings.coarsen == 1 or means
    require(cells or not c.exact, "--exact=true knows the law of cells, not of the means of --coarsen")
    require(not (c.exact and model.settings.vae), "--exact=true knows the law of cells, not of their latents")
    require(builtin or not c.exact, f"--exact=true knows the law of the built-in data, not of {dataset}")
    told = fields or means or c.guidance_scale == 1
    require(told, "--guidance_scale needs a checkpoint of train.py with --condition")
    what = "--input belongs to another --task than generate, or to a model that is told fields (--condition)"
    what = "refine --input with --task=superres" if means else what
    require(not c.input or c.task != "generate" or (fields and not means), what)
    latent = c.task in ("inpaint", "superres") and model.settings.vae
    require(not latent, f"--task={c.task} needs cells, and this is a model of latents, which know frames")
    other = c.task == "superres" and means not in (0, c.factor)
    require(not other, f"this upsampler is told means of --factor={means} cells, not {c.factor}")
    if not builtin:
        print(f"data      {dataset}, as {c.out_dir}/ckpt.pt names it")
    if compiled:
        model.denoiser.network.compile_blocks()
    return model, checkpoint["digest"], checkpoint["step"]


def draw_all(c, sampler, folder, digest, rank, world):
    """Draw the samples into parts-*/NNNNNN.pt, ranks of torchrun share them; rank 0 gets (clips on disk,
    folder of the parts), others None. An interrupted run goes on with the first batch that is not whole."""
    parts = folder / f"parts-{fingerprint(c, digest)}"
    parts.mkdir(parents=True, exist_ok=True)
    numbers, size = range(c.num_samples), min(c.batch_size, math.ceil(c.num_samples / world))
    batches = [list(numbers[i : i + size]) for i in numbers[::size]]  # whole: rounding is a batch's
    missing = [b for b in batches if not all((parts / f"{i:06d}.pt").exists() for i in b)]
    done = c.num_samples - sum(map(len, missing))
    if world > 1:
        torch.distributed.barrier()
    if done:
        print(f"{done} of {c.num_samples} samples are done already")
    begin, mine = time.perf_counter(), missing[rank::world]
    total = sum(map(len, mine)) * (len(sampler.grid) - 1) * len(sampler.problem.windows)
    with tqdm(total=total, desc="sampling", unit="step", disable=rank > 0) as bar:
        for indices in mine:
            clips = sampler.draw(indices, bar.update)
            if not clips.isfinite().all():
                raise RuntimeError("the samples are not finite: use more --steps or --clip=true")
            for i, x in zip(indices, clips.cpu()):
                with data.replacing(parts / f"{i:06d}.pt") as f:
                    torch.save(x.clone(), f)  # np.save would not notice a full disk
    if world > 1:
        torch.distributed.barrier()
    if missing:
        seconds, drawn = time.perf_counter() - begin, c.num_samples - done
        print(f"{drawn} clips in {seconds:.0f} s ({drawn / seconds:.2f} clips/s)")
    return sampler.decode(parts) if rank == 0 else None, parts


@torch.no_grad()
def main(argv=None):
    c, given, rules = train.configure(__file__, argv)
    train.check_owners(c, given, rules)
    check(c)
    c.out_dir, c.input = (str(Path(p).expanduser()) if p else p for p in (c.out_dir, c.input))
    rank, world = train.start_ranks(c)
    model, digest, step = load_model(c)
    law, emerging = None, model.sampling_levels
    if c.exact:
        law = BoxLaw.of(model.settings.frames, model.settings.size)
        law = law.map(lambda a: a.to(model.denoiser.gaussian.mean.device))
        emerging = diffusion.Levels("logsnr", *law.emergence(margin=5.0))
    require(c.input or "select" not in given, "--select belongs to --input")
    what = "--augment_logsnr belongs to an upsampler (train.py --condition=coarse)"
    require(model.told_block or "augment_logsnr" not in given, what)
    check_room(c, model, lengths(c, model)[0])
    problem, grid = pose(c, model), make_grid(c, model.levels, emerging)
    compared = c.verify and TASKS[c.task].start in ("noise", "edit")
    if compared:
        model.record.extent()  # if the data are gone nothing has been drawn yet; --verify=false needs none
    if law:  # nothing is known of the box
        problem.y = problem.mask = torch.zeros(()).expand(c.num_samples, *law.variances.shape)
    folder = Path(c.out_dir) / "samples"
    command = " ".join(["sample.py", *(sys.argv[1:] if argv is None else argv)])
    name = sampler_of(c, bool(problem.mask.any()) and problem.imposed)
    history = f"{command}: sampler {name}, {c.steps} steps, {c.out_dir}/ckpt.pt at step {step}"
    history += f", trained with --select={model.settings.select}" * bool(model.settings.select)
    with train.locked(folder) if rank == 0 else nullcontext():
        x, parts = draw_all(c, Sampler(c, model, problem, grid, law), folder, digest, rank, world)
        if rank > 0:
            return
        for name in ("verify.json", "verify*.png", "samples_*.png", "samples_*.gif"):
            for path in folder.glob(name):  # of an earlier run
                path.unlink()
        written = write_results(c, model, problem, x, history, folder)
        if compared:
            report = verify_samples(c, model, problem, x, folder)
            with data.replacing(folder / "verify.json") as f:
                f.write(json.dumps(report, indent=1, allow_nan=False).encode())
            written += ["verify.json", *sorted(path.name for path in folder.glob("verify*.png"))]
        del x
        shutil.rmtree(parts)
    print(f"\n{folder}/: {', '.join(written)}")


if __name__ == "__main__":
    train.run_main(main)
