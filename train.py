"""Train a video diffusion model on climate fields.

    python train.py --dataset=climate --param=v
    python train.py --dataset=path/to/field.nc --variables=t2m --transform=none
    python train.py --init_from=resume --max_iters=20000

Edit the settings below or override any of them as --key=value; --help lists them.
"""
import argparse
import ast
import copy
import functools
import importlib.util
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

import data
import diffusion
from data import InputError
from model import Config, UNet

# ----------------------------------------------------------------------------------------------------------------------
# files
out_dir = "out"  # checkpoint, log and samples go here
init_from = "scratch"  # scratch, or resume from out_dir/ckpt.pt
# data
dataset = "climate"  # climate, gaussian, or a path to .npy, .npz, NetCDF, Zarr, or a folder of them
variables = ""  # comma-separated names to stack as channels; empty takes every field
frames = 8  # time steps per clip
size = 32  # grid side of the built-in data
condition = ""  # what the network is told, comma-separated: known (parts of the clip, drawn at random; or some of prefix, suffix, every, ends, blocks, coarse, nothing), hour, day, a static field or series of the dataset
condition_dropout = 0.1  # share of clips that are told no hour, day, field or series, for guidance_scale
image_share = 0.0  # share of clips that are single frames from anywhere, with nothing mixed between them
transform = "auto"  # auto, none, sqrt, cbrt, log, quantile, censored, learnt; one for all variables or one each, comma-separated
transform_iters = 300  # of transform learnt: steps during which it learns jointly with the network; then it is frozen
# network
width = 64  # channels at the first level, a multiple of 16
mults = "1,2"  # channel multiples; every further level halves the resolution
blocks = 1  # residual blocks per level
patch = 4  # pixel-unshuffle at the input: cells of a patch become channels
wrap_x = "auto"  # periodic longitude: auto (from the coordinates), true, false
# diffusion
param = "v"  # what the network predicts: v, eps, x, score
linear_skip = True  # the network adds to the linear denoiser that the data's mean and spectrum give; false: learns all of it
schedule = "spectrum"  # log-SNRs trained on: spectrum (evenly where the data's modes emerge), cosine, linear, logsnr, flow, normal, rho, ddpm
logsnr_min = -30.0  # truncation of the schedule: pure noise
logsnr_max = 30.0  # truncation of the schedule: data
shift = 1.0  # adds 2 log(shift) to the log-SNR of cosine, linear, flow, normal; below 1 trains more on noise (large fields)
weighting = "auto"  # auto (that of param), v, eps, x, truncated_snr, min_snr, sigmoid, elbo
average_targets = True  # the target of a clip that is told nothing is the mean of many clips, each as likely as the noisy clip makes it: the same expectation, less variance
loss_power = 2  # 2 squared, 1 absolute error
# optimisation
batch_size = 32  # clips per micro-batch
gradient_accumulation_steps = 1  # micro-batches per step, shared by the ranks of torchrun
max_iters = 5000  # optimiser steps
learning_rate = 2e-3  # peak of AdamW's learning rate
warmup_iters = 100  # linear warm-up, then cosine decay to min_lr at max_iters
min_lr = 1e-5  # learning rate at the end
weight_decay = 0.01  # of matrices and kernels
beta2 = 0.99  # AdamW's second-moment decay
grad_clip = 1.0  # gradient norm is clipped to this; 0 is off
ema_decay = 0.995  # of the averaged weights that are evaluated and sampled
# evaluation and logging
eval_interval = 500  # steps between evaluations on held-out clips and checkpoints
eval_iters = 4  # held-out batches per evaluation
eval_only = False  # print held-out loss and likelihoods of the checkpoint and stop
bound_steps = 1000  # steps T of the discrete bound that eval_only prints
ode_steps = 64  # Runge-Kutta steps of the exact likelihood that eval_only prints; 0 leaves it out
ode_clips = 8  # held-out clips of the exact likelihood
log_interval = 10  # steps between lines of log.jsonl
# distillation into few steps
distill = ""  # checkpoint of a teacher: students start as copies and learn to take two of its steps in one (progressive distillation)
distill_steps = "32,16,8,4"  # steps of the students, each the teacher of the next, max_iters training steps each; in out_dir/steps-*
# machine
seed = 0  # of weights, batches, times and noise, and of the built-in data
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # auto, float32, bfloat16 (autocast)
compile = "auto"  # torch.compile: auto (on CUDA), true, false
checkpoint_activations = False  # compute activations again in the backward pass: less memory, a third more time
shard = False  # with torchrun: spread weights, averages and optimiser over the ranks (FSDP2), for models that fit no single one
bench = False  # measure the speed of these settings on this machine instead of training
# ----------------------------------------------------------------------------------------------------------------------

CHOICES = {
    "init_from": ("scratch", "resume"), "param": tuple(diffusion.PARAMS), "schedule": ("spectrum", *diffusion.SCHEDULES), "weighting": ("auto", *diffusion.WEIGHTINGS),
    "dtype": ("auto", "float32", "bfloat16"), "compile": ("auto", "true", "false"), "wrap_x": ("auto", "true", "false"), "loss_power": (1, 2),
}  # fmt: skip
FORMAT = 9  # of checkpoints
RECENT = 2**24  # values of the clips of the last steps that targets are averaged over (64 MiB)
TOGETHER = 2**25  # entries of the covariances in time and x, one for every row, at most
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # checkpoints do not depend on the number of ranks
LOGSNR_BINS = (-10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10)  # edges of the loss table in log.jsonl


def configure(script, argv=None, choices=None):
    """Settings of a script (the block between its first two rulers) overridden by --key=value. A namespace.

    Types come from the defaults. An unknown key or a wrong value ends in one line on stderr and exit code 2.
    """
    source = Path(script).read_text()
    block = re.split(r"(?m)^# -{20,}$", source)[1]
    settings = re.findall(r"(?m)^(\w+) = (.+?)  # (.+)$", block)

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: {message} (--help lists the settings)\n")

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"'{text}' is not true or false")
        return text.lower() == "true"

    doc = source.split('"""')[1]
    parser = Parser(prog=Path(script).name, description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, literal, comment in settings:
        default = ast.literal_eval(literal)
        kind = boolean if isinstance(default, bool) else type(default)
        help = f"{comment} [{literal}]".replace("%", "%%")
        parser.add_argument(f"--{name}", type=kind, default=default, choices=(choices or {}).get(name), help=help, metavar=kind.__name__.upper()[:5])
    c = SimpleNamespace(**vars(parser.parse_args(argv)))
    for name, value in vars(c).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name}={value} is not a finite number")
    return c


def require(condition, message):
    if not condition:
        raise InputError(message)


def check(c):
    """Refuse settings that cannot work, before anything is read or written."""
    for name in ("frames", "size", "width", "blocks", "patch", "batch_size", "gradient_accumulation_steps", "max_iters", "eval_interval", "eval_iters", "log_interval", "bound_steps", "ode_clips"):
        require(getattr(c, name) >= 1, f"--{name}={getattr(c, name)} must be at least 1")
    for name in ("warmup_iters", "weight_decay", "min_lr", "grad_clip", "seed", "ode_steps", "transform_iters"):
        require(getattr(c, name) >= 0, f"--{name}={getattr(c, name)} must not be negative")
    require(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", c.distill_steps), f"--distill_steps={c.distill_steps} must be whole numbers like 32,16,8")
    require(c.width % 16 == 0, f"--width={c.width} must be a multiple of 16")
    require(re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", c.mults), f"--mults={c.mults} must be whole numbers like 1,2,4")
    require(c.logsnr_min < c.logsnr_max, f"--logsnr_min={c.logsnr_min} must be below --logsnr_max={c.logsnr_max}")
    require(max(-c.logsnr_min, c.logsnr_max) <= 60, "log-SNR beyond +-60 leaves the range of float32")
    require(c.shift > 0 and c.learning_rate > 0, "--shift and --learning_rate must be positive")
    require(0 <= c.condition_dropout < 1 and 0 <= c.image_share < 1, "--condition_dropout and --image_share must lie in [0, 1)")
    require(c.image_share == 0 or 0 < round(c.image_share * c.batch_size) < c.batch_size, f"--image_share={c.image_share} of --batch_size={c.batch_size} is less than one clip, or all of them")
    require(0 <= c.ema_decay < 1 and 0 < c.beta2 < 1, "--ema_decay must lie in [0, 1), --beta2 in (0, 1)")
    require(c.schedule != "ddpm" or c.weighting not in ("elbo", "sigmoid"), f"--weighting={c.weighting} needs a density of log-SNR, which --schedule=ddpm (a discrete chain) has not: use --schedule=linear")
    require(c.shift == 1 or c.schedule in ("cosine", "linear", "flow", "normal"), f"--shift means nothing for --schedule={c.schedule}: use cosine, linear, flow or normal")


def pick_device(c):
    """(device, autocast dtype, compile?) from the settings device, dtype and compile."""
    name = c.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device={c.device} is not available: {str(e).splitlines()[0]}")
    fast_cpu = any(getattr(torch.cpu, f, bool)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    bfloat16 = {"auto": device.type == "cuda" or (device.type == "cpu" and fast_cpu), "bfloat16": True, "float32": False}[c.dtype]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    return device, torch.bfloat16 if bfloat16 else torch.float32, {"auto": device.type == "cuda", "true": True, "false": False}[c.compile]


def run_network(network, device, dtype, c, meta):
    """network(z, logsnr, cond, mix) under autocast; scaled and added in float32 to the linear part of mean and spectrum.

    It sees the linear estimates of eps and x in place of z, the distance from the lowest value and, if it can be told parts of
    clips, the estimate of x given those. The scale, which goes to 0 in pure noise, is 1 for a clip that is told something:
    then there is more to say. Of a clip longer than those trained on the linear part sees the whole, the network pieces as
    long as those, and what it adds fades from one to the next over the half they share: so all of the clip is one weather,
    however long, and nothing is asked of the network that it has not learnt. run.modes(T) are the mean, the mode variances and
    the axes of T frames.
    """
    mean, modes, axes = meta["mean"].to(device), meta["modes"].to(device), [a.to(device) for a in meta["axes"]]
    modes_of_length = functools.cache(lambda T: (mean, *diffusion.modes_of_length(modes, axes, T)))
    linear_part = lambda z, logsnr, known: diffusion.linear_part(z, logsnr, *modes_of_length(z.shape[2]), c.param, known)
    first = len(mean) * meta["masked"]  # of the channels of cond that say what is known, or told
    known_part = lambda cond: cond[:, first : first + 2 * len(mean)] if meta["known"] else None

    def parts(z, logsnr, cond, mix):  # what the linear part says, what the network adds
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        if not c.linear_skip:
            with autocast:
                return 0.0, network(z, logsnr, cond, mix).float()
        known = known_part(cond)
        estimates = linear_part(z, logsnr, known)
        if mix is not None:  # unrelated frames, each a clip of its own
            T = z.shape[2]
            alone = [None if a is None else rearrange(a, "b c t h w -> (b t) c 1 h w") for a in (z, known)]
            alone = linear_part(alone[0], logsnr.repeat_interleave(T), alone[1])
            alone = [rearrange(p, "(b t) c 1 h w -> b c t h w", t=T) for p in alone]
            estimates = [torch.where(diffusion.expand(mix, z) > 0, *both) for both in zip(estimates, alone)]
        linear, rest, x, eps, x_hat = estimates
        if meta["known"] or meta["conditions"]:
            told = (cond[:, first:] != 0).flatten(1).any(1)
            rest = torch.where(diffusion.expand(told, rest), 1.0, rest)
        low = torch.stack([torch.full((1, 1, 1), f["low"], device=device) for f in meta["transform"]])  # moves while a transform is learnt
        seen = [x, diffusion.above_lowest(z, logsnr, low), *([x_hat] if meta["known"] else []), *([] if cond is None else [cond])]
        with autocast:
            return linear, rest * network(eps, logsnr, torch.cat(seen, 1), mix).float()

    def run(z, logsnr, cond=None, mix=None):
        n, T = c.frames, z.shape[2]
        if T <= n:
            linear, added = parts(z, logsnr, cond, mix)
            return linear + added
        linear = linear_part(z, logsnr, known_part(cond))[0] if c.linear_skip else 0.0
        total, weight, t = torch.zeros_like(z), z.new_zeros(T, 1, 1), torch.arange(n, device=device)
        share = (2.0 * torch.minimum(t, n - 1 - t) + 1)[:, None, None]  # (n, 1, 1)
        for start in [*range(0, T - n, max(n // 2, 1)), T - n]:
            piece = slice(start, start + n)
            total[:, :, piece] += share * parts(z[:, :, piece], logsnr, None if cond is None else cond[:, :, piece], None)[1]
            weight[piece] += share
        return linear + total / weight

    run.modes = modes_of_length
    return run


def condition_channels(meta, x, valid=None, known=None, told=None):
    """The network's further input for clips x (B, C, T, H, W), or None: where there is data, what is known, what it is told.

    known: Observation.channels(); told: data.condition_values(). What is not given is 0, as in training with `nothing`
    known and with dropout.
    """
    parts, blank = [], lambda channels: x.new_zeros(len(x), channels, *x.shape[2:])
    if meta["masked"]:
        parts.append(valid.expand_as(x))
    if meta["known"]:
        parts.append(blank(2 * x.shape[1]) if known is None else known)
    if meta["conditions"]:
        parts.append(blank(1 + sum(f["channels"] for f in meta["conditions"])) if told is None else told)
    return torch.cat(parts, 1) if parts else None


def fit_linear(climate, starts, c, transform):
    """What the linear part knows: mean of every cell (C, 1, H, W), variance of the modes about it (C, T, H, W), their axes.

    The axes are the principal ones of the covariance in y and of that in time and x together, for weather travels, of every
    pattern in y by itself, as the large live longer: a covariance that is no product. That wants many clips; with fewer one
    set in time and x does for all patterns in y, and with few, or where those are beyond TOGETHER, time and x are taken
    apart: whatever makes the last fifth of the clips likeliest given the others. (Cosines would be no eigenvectors: of edges
    and round globes these know by themselves.) From up to 5000 training clips, fewer of large ones (4e7 values in all, but at
    least 50 clips).
    """
    H, W = climate.size
    values = len(climate.names) * c.frames * H * W
    chosen, mean, size = data.thin(starts, max(50, min(5000, 40_000_000 // values))), 0, max(1, 1_000_000 // values)

    def average(f, starts):
        parts = (starts[i : i + size] for i in range(0, len(starts), size))
        return sum(f(data.normalise(data.clips(climate, part, c.frames), transform)[0] - mean) for part in parts) / len(starts)

    def covariance(series, starts):  # series(clips) (..., many, n) -> (..., n, n)
        def product(x):
            s = series(x)
            return s.mT @ s

        return average(product, starts)

    def fit(starts, kind):
        along = lambda dim: diffusion.principal_axis(covariance(lambda x: x.movedim(dim, -1).flatten(0, -2), starts))
        if kind == "apart":
            axes = [along(dim) for dim in (-3, -2, -1)]
        else:
            Y = along(-2)
            C = covariance(lambda x: rearrange(Y @ x, "b c t h w -> h (b c) (t w)"), starts)
            axes = [diffusion.principal_axis(C if kind == "rows" else C.sum(0, keepdim=True)), Y]
        return axes, average(lambda x: (diffusion.to_modes(x, axes) ** 2).sum(0), starts).clamp(min=1e-6)

    def surprise(fitted, starts):  # -2 log likelihood of a Gaussian per value
        axes, w = fitted
        return float((w.log() + average(lambda x: (diffusion.to_modes(x, axes) ** 2).sum(0), starts) / w).mean())

    mean = average(lambda x: x.sum(0), chosen).mean(1, keepdim=True)
    late, kinds = len(chosen) // 5, ["apart", "together", "rows"] if H * (c.frames * W) ** 2 <= TOGETHER else ["apart"]
    best = min(kinds, key=lambda kind: surprise(fit(chosen[:-late], kind), chosen[-late:])) if late and len(kinds) > 1 else "apart"
    axes, w = fit(chosen, best)
    return {"mean": mean, "modes": w, "axes": axes}


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: tensors and plain values only


def extent(climate):
    """Number of frames, first and last hour of a record: what the split into training and held-out data depends on."""
    return [len(climate), *climate.hours[[0, -1]].tolist()]


def open_trained(settings, meta):
    """The data set a checkpoint was trained on, if it is still the same, else InputError: a longer record would be split in other places."""
    climate, path = data.open_climate(settings.dataset, settings.variables, settings.size, settings.seed), settings.dataset
    require(climate.names == meta["names"] and list(climate.size) == meta["size"], f"{path} no longer has the variables and grid that the checkpoint was trained on")
    require(extent(climate) == meta["record"], f"{path} no longer holds the {meta['record'][0]} frames that the checkpoint was trained on, and its held-out part would be another: keep them in a file of their own")
    return climate


def describe(climate, transform, valid, masked):
    """What sample.py must know of the data: names, units, coordinates, transform, valid cells, time step."""
    coords = {k: {**v, "values": torch.as_tensor(np.array(v["values"]))} for k, v in climate.coords.items()}
    return {"names": climate.names, "attrs": climate.attrs, "dims": list(climate.dims), "coords": coords, "size": list(climate.size), "step_hours": climate.step_hours,
            "record": extent(climate), "calendar": climate.calendar, "transform": transform, "valid": torch.from_numpy(valid), "masked": bool(masked)}  # fmt: skip


def save_checkpoint(path, checkpoint):
    """Write, flush to disk, then rename; the previous checkpoint stays beside it as *.prev.pt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.replacing(path) as f:
        torch.save(checkpoint, f)
        if path.exists():
            previous = path.with_suffix(".prev.pt")
            previous.unlink(missing_ok=True)
            os.link(path, previous)


def load_checkpoint(path):
    """Read a checkpoint (weights_only: nothing in it can run). Raises InputError naming the file and what to do."""
    path = Path(path)
    previous = path.with_suffix(".prev.pt")
    hint = f"; the one before it is {previous}: copy it to {path}" if previous.exists() else ""
    if not path.exists():
        raise InputError(f"there is no checkpoint {path}: run train.py first, or set --out_dir{hint}")
    try:
        with zipfile.ZipFile(path) as z:  # torch.load does not look at the checksums
            damaged = z.testzip()
        require(damaged is None, f"{path} is damaged (checksum of {damaged}){hint}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format"]
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors and plain values and was not opened: it could run code{hint}")
    except Exception as e:
        raise InputError(f"{path} is not a readable checkpoint of this program ({type(e).__name__}){hint}")
    if version != FORMAT:
        raise InputError(f"{path} has format {version}, this program reads {FORMAT}: use the version that wrote it")
    return checkpoint


def build(checkpoint, device):
    """The network of a checkpoint with its averaged weights, ready to sample."""
    network = UNet(Config(**checkpoint["config"]))
    network.load_state_dict(checkpoint["ema"])
    return network.to(device).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------


def split_conditions(c):
    """--condition as kinds of known parts and names of the rest."""
    names = [n.strip() for n in c.condition.split(",") if n.strip()]
    kinds = data.KINDS if "known" in names else [n for n in names if n in data.KINDS]
    return list(kinds), [n for n in names if n != "known" and n not in data.KINDS]


def levels(c, meta):
    """The arguments of diffusion.logsnr_schedule for a run: its schedule, or log-SNRs spread evenly over where the data's modes emerge."""
    if c.schedule == "spectrum":
        first, last = diffusion.spectrum_range(meta["modes"], margin=4.0)
        return "logsnr", max(c.logsnr_min, first), min(c.logsnr_max, last)
    return c.schedule, c.logsnr_min, c.logsnr_max, c.shift


def default_grid(num_steps, c, meta):
    """The log-SNRs that sampling visits: even where the data's modes emerge, the last one +inf. (num_steps + 1,)

    Outside that range a step changes nothing; a grid even in log-SNR inside it gives every mode the same number of steps,
    where one even in time of a +-30 cosine starves the mean of the field.
    """
    return diffusion.sampling_grid(num_steps, *sampling_range(c, meta))


def sampling_range(c, meta):
    """("logsnr", first, last): where the data's modes emerge from the noise and 5 beyond, as far as the schedule goes.

    `spectrum` trains on 4 beyond: what the last unit adds is a bit more of the variance of the first and the last mode.
    """
    ends = (c.logsnr_min, c.logsnr_max) if c.schedule == "spectrum" else diffusion.logsnr_schedule([1.0, 0.0], *levels(c, meta)).tolist()
    first, last = diffusion.spectrum_range(meta["modes"], margin=5.0)
    return "logsnr", max(first, ends[0]), min(last, ends[1])


def micro_batch(climate, starts, c, meta, device, stream, teacher=None):
    """One batch, a function of stream = (seed, step, micro), and of the teacher of a student: a namespace of

    physical (B, C, T, H, W) in units, x standardised, mask of its data (None: all), loss_mask of what is to be predicted,
    cond, mix (None: frames belong together), logsnr, eps.
    """
    T, single = c.frames, round(c.image_share * c.batch_size)
    index = data.pick(starts, stream[0], stream[1:], c.batch_size)[:, None] + np.arange(T)  # (B, T)
    physical = data.clips(climate, index[single:, 0], T)
    if single:  # frames from anywhere
        index[:single] = data.pick(starts, stream[0], (*stream[1:], 1), single * T).reshape(single, T)
        physical = np.concatenate([rearrange(data.clips(climate, index[:single].ravel(), 1), "(b t) c 1 h w -> b c t h w", t=T), physical])
    x, mask = data.normalise(physical, meta["transform"])
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1))
    t = diffusion.stratified_times(c.batch_size, generator)
    if teacher:  # the student's steps alone
        grid, k = default_grid(2 * int(c.distill_steps), c, meta), 2 * (t * int(c.distill_steps)).long()
        logsnr = grid[k]
    else:
        logsnr = diffusion.logsnr_schedule(t, *levels(c, meta))
    eps = torch.randn(x.shape, generator=generator)
    known, unknown, rng = None, mask, np.random.default_rng((*stream, 2))
    if meta["known"]:
        known, unknown = [], mask.clone()
        for i in range(len(x)):
            kinds = [k for k in meta["known"] if i >= single or k in ("nothing", "blocks", "coarse")] or ["nothing"]
            m, factor = data.random_known(rng, kinds, diffusion.FACTORS, T, *climate.size)
            whole = diffusion.Observation(mask[i : i + 1], torch.from_numpy(m).expand(1, x.shape[1], *m.shape), factor)
            whole.mask = whole.mask * (whole.A(mask[i : i + 1]) > 0.999)  # a mean over missing cells is not known
            whole.y = whole.A(x[i : i + 1])
            known.append(whole.channels())
            if factor == 1:
                unknown[i] -= whole.mask[0]
        known = torch.cat(known)
    told = None
    if meta["conditions"]:
        told = data.condition_values(climate, meta["conditions"], index)
        told *= diffusion.expand(torch.from_numpy(rng.random(len(x)) >= c.condition_dropout), told)
    move = lambda a: a if a is None else a.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else a.to(device)
    mix = (torch.arange(len(x)) >= single).float() if single else None
    b = SimpleNamespace(physical=physical, x=move(x), mask=move(None if mask.all() and not meta["masked"] else mask), loss_mask=move(None if unknown.all() and not meta["masked"] else unknown),
                           cond=move(condition_channels(meta, x, mask, known, told)), mix=move(mix), logsnr=logsnr, eps=move(eps))  # fmt: skip
    if teacher:
        z, denoise = diffusion.diffuse(b.x, logsnr, b.eps), diffusion.make_denoiser(lambda z, logsnr, cond: teacher(z, logsnr, cond, b.mix), c.param, b.cond)
        with torch.no_grad():
            b = retarget(b, diffusion.two_steps_in_one(denoise, z, logsnr, grid[k + 1], grid[k + 2], teacher.modes(T)))
    return b


def retarget(b, x):
    """The batch with clean clips x in place of its own, and the eps with which they make the same z."""
    alpha, sigma, _, _ = diffusion.scales(b.logsnr, x)
    b.x, b.eps = x, b.eps + alpha / sigma * (b.x - x)
    return b


def ahead(f, keys, background):
    """f(key) of every key in order; in the background, one is made while the one before is used."""
    with ThreadPoolExecutor(1) if background else nullcontext() as pool:
        make = partial(pool.submit, f) if background else lambda key: SimpleNamespace(result=partial(f, key))
        coming = None
        for key in keys:
            due, coming = coming, make(key)
            if due:
                yield due.result()
        if coming:
            yield coming.result()


def average_targets(b, others=None):
    """A batch with the same z and targets of less variance (diffusion.clip_posterior) for the clips that are told nothing."""
    if b.mask is None and b.mix is None:
        average = diffusion.clip_posterior(b.x, diffusion.diffuse(b.x, b.logsnr, b.eps), b.logsnr, others)
        own = b.logsnr.to(b.x) > 6  # hardly another clip is as likely, and alpha / sigma would make much of rounding errors
        own = own if b.cond is None else own | (b.cond != 0).flatten(1).any(1)
        b = retarget(b, torch.where(diffusion.expand(own, b.x), b.x, average))
    return b


def batch_loss(run, c, meta, b):
    """Weighted loss (B,) and squared v-error (B,) of one micro-batch."""
    weighting = {"score": "eps"}.get(c.param, c.param) if c.weighting == "auto" else c.weighting
    log_p = diffusion.log_density(b.logsnr, *levels(c, meta)) if weighting in ("elbo", "sigmoid") else None
    network = lambda z, logsnr, cond: run(z, logsnr, cond, b.mix)
    return diffusion.training_loss(network, b.x, b.logsnr, b.eps, c.param, weighting, log_p, b.loss_mask, b.cond, c.loss_power)


def by_bin(logsnrs, v_errors):
    """Mean squared v-error per bin of log-SNR, {'lo..hi': value}; the ends are open."""
    which = np.digitize(logsnrs, LOGSNR_BINS)
    edges = ["", *(str(b) for b in LOGSNR_BINS), ""]
    return {f"{edges[i]}..{edges[i + 1]}": round(float(v_errors[which == i].mean()), 5) for i in range(len(LOGSNR_BINS) + 1) if (which == i).any()}


@torch.no_grad()
def evaluate(network, climate, starts, c, meta, device, dtype, teacher=None):
    """Loss on held-out clips with fixed times and noise: (mean weighted loss, v-error per log-SNR bin)."""
    run = run_network(network.eval(), device, dtype, c, meta)
    losses, v_errors, logsnrs = [], [], []
    for i in range(c.eval_iters):
        b = micro_batch(climate, starts, c, meta, device, (c.seed + 1, 0, i), teacher)
        loss, v = batch_loss(run, c, meta, b)
        losses.append(loss), v_errors.append(v), logsnrs.append(b.logsnr)
    return torch.cat(losses).mean().item(), by_bin(torch.cat(logsnrs).numpy(), torch.cat(v_errors).cpu().numpy())


@torch.no_grad()
def likelihood(network, climate, starts, c, meta, device):
    """Held-out negative log-likelihoods in float32: {name: (nats per entry, standard error)}.

    The bounds average over eval_iters batches, the probability-flow ODE over ode_clips clips with one Hutchinson probe
    each. 'physical' rows include the transform's change of variables; rain, with its atom at 0, has no such density.
    """
    c = SimpleNamespace(**{**vars(c), "image_share": 0.0})  # of clips, not of unrelated frames
    run, lo, hi = run_network(network.eval(), device, torch.float32, c, meta), c.logsnr_min, c.logsnr_max
    grid = torch.linspace(lo, hi, c.bound_steps + 1, dtype=torch.float64)
    rows = {}
    for i in range(c.eval_iters):
        b = micro_batch(climate, starts, c, meta, device, (c.seed + 1, 0, i))
        x, mask, eps, physical = b.x, b.mask, b.eps, b.physical
        t = diffusion.stratified_times(len(x), torch.Generator().manual_seed(i))
        denoise = diffusion.make_denoiser(run, c.param, condition_channels(meta, x, mask))
        dim = torch.full((len(x),), float(x[0].numel())) if mask is None else mask.cpu().flatten(1).sum(1)
        slope = data.log_slope(physical, meta["transform"])
        prior = diffusion.prior_kl(x.cpu(), lo, None if mask is None else mask.cpu())
        decoder = diffusion.reconstruction_nll(dim, hi)
        continuous = diffusion.diffusion_nll(denoise, x, t, eps, lo, hi, mask).cpu()
        discrete = diffusion.discrete_nll(denoise, x, t, eps, grid, mask).cpu()
        batch = {"prior": prior, "diffusion": continuous, "reconstruction": decoder, "continuous bound": prior + continuous + decoder,
                 f"discrete bound, T = {c.bound_steps}": prior + discrete + decoder}  # fmt: skip
        if slope is not None:
            batch["continuous bound, physical"] = batch["continuous bound"] - slope
        for name, value in batch.items():
            rows.setdefault(name, []).append(value / dim)
    if c.ode_steps and not meta["masked"]:
        physical = data.clips(climate, data.pick(starts, c.seed + 1, (0, 0), c.ode_clips), c.frames)
        x = data.normalise(physical, meta["transform"])[0].to(device)
        probes = torch.randint(0, 2, (1, *x.shape), generator=torch.Generator().manual_seed(c.seed)).to(x) * 2 - 1
        denoise, path = diffusion.make_denoiser(lambda z, logsnr, _: run(z, logsnr, condition_channels(meta, z)), c.param), torch.linspace(hi, lo, c.ode_steps + 1, dtype=torch.float64)
        for j in tqdm(range(0, c.ode_clips, c.batch_size), desc="exact likelihood", leave=False):
            part = slice(j, j + c.batch_size)
            nll = -diffusion.ode_log_likelihood(denoise, x[part], path, probes[:, part]).cpu()
            rows.setdefault("probability-flow ODE", []).append(nll / x[0].numel())
            slope = data.log_slope(physical[part], meta["transform"])
            if slope is not None:
                rows.setdefault("probability-flow ODE, physical", []).append((nll - slope) / x[0].numel())
    rows = {name: torch.cat([v.double() for v in values]) for name, values in rows.items()}
    return {name: (v.mean().item(), v.std().item() / math.sqrt(len(v))) for name, v in rows.items()}


def learning_rate_at(step, c):
    """Linear warm-up, then cosine decay to min_lr at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    progress = min(1.0, (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters))
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - c.min_lr)


FIXED = ("dataset", "variables", "frames", "size", "condition", "transform", "transform_iters", "width", "mults", "blocks", "patch", "wrap_x", "param", "linear_skip", "schedule", "logsnr_min", "logsnr_max", "shift", "seed")


def logged_until(line, step):
    """Is this a whole line of log.jsonl from no later than step? What a lost future wrote is written again."""
    try:
        return json.loads(line)["iter"] <= step
    except (ValueError, KeyError, TypeError):
        return False  # torn by a crash


def given(argv):
    """Names of the settings on a command line."""
    return {a.split("=")[0].lstrip("-") for a in argv if a.startswith("--")}


def inherit(c, settings, argv):
    """A resumed run has the settings it was started with, but for those given now; those in FIXED cannot change."""
    for key, value in settings.items():
        if key in FIXED:
            require(key not in given(argv) or getattr(c, key) == value, f"--{key} is {value} in the checkpoint and cannot change; start a new run in another --out_dir")
        if key not in given(argv) and key not in ("out_dir", "init_from", "eval_only"):
            setattr(c, key, value)


def open_log(out, step):
    """Make out_dir, clear what a killed run left half-written, and keep the log up to step (-1: none of it)."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for leftover in out.glob(".*.ckpt.pt"):
            leftover.unlink(missing_ok=True)
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        with data.replacing(out / "log.jsonl") as f:
            f.write("".join(l + "\n" for l in lines if logged_until(l, step)).encode())
    except OSError as e:
        raise InputError(f"--out_dir={out} cannot be written: {e.strerror}")


def print_likelihood(step, val_loss, bins, rows, C, meta):
    """What eval_only prints."""
    print(f"step {step}: held-out loss {val_loss:.5f}; squared v-error per bin of log-SNR: " + ", ".join(f"{k} {v:.4f}" for k, v in bins.items()))
    print(f"{'negative log-likelihood per entry':<36}{'nats':>12}{'+-':>10}{'bits':>12}")
    for name, (nats, error) in rows.items():
        print(f"  {name:<34}{nats:>12.4f}{error:>10.4f}{nats / math.log(2):>12.4f}")
    if data.log_slope(np.zeros((1, C, 1, 1, 1)), meta["transform"]) is None:
        print("  (of the transformed field: a variable with an atom at its floor has no density in its own units)")


def start_ranks(c):
    """(rank, world size) as torchrun set them, (0, 1) without it; joins the process group (nccl on CUDA, else gloo)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        cuda = c.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            require(int(os.environ["LOCAL_RANK"]) < torch.cuda.device_count(), f"this machine has {torch.cuda.device_count()} GPUs: use a --nproc_per_node of at most that, or --device=cpu")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=10))
    return int(os.environ.get("RANK", 0)), world


def spread(network, device, world):
    """Shard a network over the ranks block by block (FSDP2, which wants contiguous weights)."""
    network.to(memory_format=torch.contiguous_format)
    mesh = dist.init_device_mesh(device.type, (world,))
    for module in [*network.down, *network.middle, *network.up, network]:
        fully_shard(module, mesh=mesh)


def gather(entries, world):
    """Per-micro-batch tuples of tensors from all ranks, on the CPU, in the order one rank alone would have made them."""
    mine = [[t.detach().cpu() for t in entry] for entry in entries]
    if world == 1:
        return mine
    everyone = [None] * world
    dist.all_gather_object(everyone, mine)
    return [entry for group in zip(*everyone) for entry in group]


def make_network(c, climate, meta):
    """An untrained network for this data and these settings."""
    C, blank = len(climate.names), condition_channels(meta, torch.zeros(1, len(climate.names), 1, 1, 1), torch.zeros(1))
    wrap = climate.wraps() if c.wrap_x == "auto" else c.wrap_x == "true"
    network = UNet(Config(C, (2 + bool(meta["known"])) * C * c.linear_skip + (0 if blank is None else blank.shape[1]), c.width, tuple(int(m) for m in c.mults.split(",")), c.blocks, c.patch, wrap_x=wrap))
    network.checkpoint_activations = c.checkpoint_activations
    return network


def make_optimizer(c, network, device):
    """AdamW, with weight decay on matrices and kernels alone."""
    groups = [{"params": [p for p in network.parameters() if p.ndim >= 2]}, {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, c.learning_rate, (0.9, c.beta2), weight_decay=c.weight_decay, fused=device.type != "mps")


def distill(c, argv):
    """A chain of students, each an ordinary run in its own folder that takes two steps of the one before in one; goes on where it stopped."""
    rest = [f"--{name}={getattr(c, name)}" for name in given(argv) - {"distill", "distill_steps", "out_dir", "init_from"}]
    teacher = c.distill
    for steps in c.distill_steps.split(","):
        out = Path(c.out_dir) / f"steps-{steps}"
        go_on = ["--init_from=resume"] if (out / "ckpt.pt").exists() else []
        main([*rest, f"--distill={teacher}", f"--distill_steps={steps}", f"--out_dir={out}", *go_on])
        teacher = out / "ckpt.pt"


def prepare(c, checkpoint, rank):
    """The data set and what is fitted on it: (climate, training starts, test starts, meta)."""
    if rank > 0:
        dist.barrier()  # rank 0 makes the built-in data first
    climate = open_trained(c, checkpoint["data"]) if checkpoint else data.open_climate(c.dataset, c.variables, c.size, c.seed)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    train_starts, test_starts = data.split_windows(climate, c.frames)
    if checkpoint:
        return climate, train_starts, test_starts, checkpoint["data"]
    fitted, covered = data.fit_transform(climate, train_starts, c.frames, c.transform), data.covered_frames(train_starts, c.frames)
    meta = describe(climate, fitted, *data.valid_cells(climate, covered))
    meta["known"], names = split_conditions(c)
    meta["conditions"] = data.fit_conditions(climate, names, covered)
    meta |= fit_linear(climate, train_starts, c, fitted)
    return climate, train_starts, test_starts, meta


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    c = configure(__file__, argv, CHOICES)
    out, resume = Path(c.out_dir), c.init_from == "resume"
    if c.distill and "," in c.distill_steps and not c.eval_only:
        check(c)
        return distill(c, argv)
    checkpoint = load_checkpoint(out / "ckpt.pt") if resume or c.eval_only else None
    if checkpoint:
        inherit(c, checkpoint["settings"], argv)
        require(c.distill_steps == checkpoint["settings"]["distill_steps"], f"--distill_steps is {checkpoint['settings']['distill_steps']} in the checkpoint and cannot change; start a new run in another --out_dir")
    taught = load_checkpoint(c.distill) if c.distill else None
    if taught and taught["settings"]["distill"]:
        steps = taught["settings"]["distill_steps"]
        require(int(steps) == 2 * int(c.distill_steps), f"{c.distill} is a student of {steps} steps and knows no others: it can teach half as many, not --distill_steps={c.distill_steps}")
    if taught and not checkpoint:
        inherit(c, taught["settings"], argv)
    check(c)
    if c.bench:
        return bench(c)
    rank, world = start_ranks(c)
    require(world > 1 or not c.shard, "--shard=true needs more than one rank: torchrun --nproc_per_node=8 train.py ...")
    require(c.gradient_accumulation_steps % world == 0, f"--gradient_accumulation_steps={c.gradient_accumulation_steps} is shared by the {world} ranks and must be a multiple of {world}")
    device, amp, compiled = pick_device(c)
    torch.manual_seed(c.seed)
    climate, train_starts, test_starts, meta = prepare(c, checkpoint or taught, rank)

    C, step = len(climate.names), checkpoint["step"] if checkpoint else 0
    network = make_network(c, climate, meta).to(device)
    local = lambda tensors: [t.to_local() if isinstance(t, DTensor) else t for t in tensors]  # this rank's shard

    def lerp(averaged, current, n):  # a short memory at first
        torch._foreach_lerp_(local(averaged), local(current), 1 - min(c.ema_decay, (1 + int(n)) / (10 + int(n))))

    teacher = run_network(build(taught, device), device, amp, c, meta) if taught else None
    if taught:
        network.load_state_dict(taught["ema"])
    ema = AveragedModel(network, multi_avg_fn=lerp)
    if checkpoint:
        network.load_state_dict(checkpoint["model"])
        ema.module.load_state_dict(checkpoint["ema"])
        ema.n_averaged.fill_(step)
    if c.shard:
        spread(network, device, world), spread(ema.module, device, world)
    optimizer = make_optimizer(c, network, device)
    skipped, in_a_row = torch.zeros(2, device=device)  # steps without a finite gradient; on the device: no synchronisation
    # A learnt transform moves the data under the network while it learns. So it does that first, while mean and modes stay
    # those of its first fit (the network learns what they miss), and is then frozen and they are measured again. Its weights,
    # and the table they make, are in the checkpoint's description of the data: resumed, it learns on
    learning = [w.requires_grad_() for f in meta["transform"] for w in f.get("weights", [])]
    transform_optimizer = torch.optim.Adam(learning or [torch.zeros(0)])
    earlier = []  # losses of the last run that are not yet in the log
    if checkpoint:
        set_optimizer_state_dict(network, optimizer, checkpoint["optimizer"], options=WHOLE)
        for p, state in optimizer.state.items():  # a fused optimiser pairs entries by their place in memory
            state.update({k: torch.empty_like(p).copy_(v).detach() for k, v in state.items() if v.shape == p.shape})
        if learning:
            transform_optimizer.load_state_dict(checkpoint["transform_optimizer"])
        earlier, (skipped, in_a_row) = checkpoint["pending"], torch.tensor(checkpoint["skipped"], device=device)
    evaluate_now = lambda: evaluate(ema.module, climate, test_starts, c, meta, device, amp, teacher)
    if c.eval_only:
        if rank == 0 or c.shard:
            results = *evaluate_now(), likelihood(ema.module, climate, test_starts, c, meta, device)
        if rank == 0:
            print_likelihood(step, *results, C, meta)
        return
    if compiled:
        network.compile_blocks()
    model = network
    if world > 1 and not c.shard:
        model = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None)
    run = run_network(model, device, amp, c, meta)
    if rank == 0:
        open_log(out, step if resume else -1)
        print(f"{climate.names} {climate.size[0]}x{climate.size[1]}, {c.frames} frames, {len(train_starts)} training and {len(test_starts)} test clips; "
              f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters on {world if world > 1 else ''} {device} in {str(amp)[6:]}; out in {out}/")  # fmt: skip
        if step >= c.max_iters:
            print(f"{out}/ckpt.pt is at step {step} already: give a larger --max_iters to train on")

    def save():
        checkpoint = {  # all ranks take part, rank 0 has the result
            "format": FORMAT, "settings": vars(c), "config": asdict(network.config), "data": meta, "step": step, "pending": earlier + gather(seen, world),
            "skipped": [float(skipped), float(in_a_row)], "model": get_model_state_dict(network, options=WHOLE), "ema": get_model_state_dict(ema.module, options=WHOLE),
            "optimizer": get_optimizer_state_dict(network, optimizer, options=WHOLE), "transform_optimizer": transform_optimizer.state_dict(),
        }  # fmt: skip
        if rank == 0:
            save_checkpoint(out / "ckpt.pt", checkpoint)

    signalled, stop = [0], 0
    handlers = {s: signal.signal(s, lambda number, frame: signalled.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    # on the CPU a second thread would only be in the way, and a transform that learns changes between batches
    keys = ((s, micro) for s in range(step, c.max_iters) for micro in range(rank, c.gradient_accumulation_steps, world))
    batches = ahead(lambda key: micro_batch(climate, train_starts, c, meta, device, (c.seed, *key), teacher), keys, device.type == "cuda" and not learning and not teacher)
    # targets are averaged over the clips of the last steps too, each micro-batch over its own: so ranks need not exchange them
    averaging = c.average_targets and c.loss_power == 2 and not (teacher or meta["masked"] or c.image_share)  # a mean of targets is not the best median
    first = c.transform_iters * any(f["name"] == "learnt" for f in meta["transform"])  # step from which on clips stay as they are
    shape = c.batch_size, C, c.frames, *climate.size
    kept = max(1, RECENT // (c.gradient_accumulation_steps * math.prod(shape)))  # steps
    recent = {micro: torch.zeros(kept, *shape, device=device) for micro in range(rank, c.gradient_accumulation_steps, world)} if averaging else {}
    for s in range(max(first, step - kept), step):
        for micro in recent:
            recent[micro][(s - first) % kept] = micro_batch(climate, train_starts, c, meta, device, (c.seed, s, micro)).x
    seen, clock, clips_done = [], time.perf_counter(), 0
    bar = tqdm(total=c.max_iters, initial=step, desc="training", unit="it", smoothing=0.05, disable=rank > 0)
    network.train()
    while step < c.max_iters and not stop:
        if learning and step >= c.transform_iters:
            learning = []
            data.refresh(meta["transform"], freeze=True)
            meta |= fit_linear(climate, train_starts, c, meta["transform"])
            run = run_network(model, device, amp, c, meta)
        lr = learning_rate_at(step, c)
        for group in [*optimizer.param_groups, *transform_optimizer.param_groups]:
            group["lr"] = lr
        for micro in range(rank, c.gradient_accumulation_steps, world):
            last = micro + world >= c.gradient_accumulation_steps  # gradients are averaged over ranks once a step
            if c.shard:
                network.set_requires_gradient_sync(last)
            with nullcontext() if last or world == 1 or c.shard else model.no_sync():
                b = next(batches)
                gain = 0
                if learning:
                    b.x, gain = data.learn(b.physical, b.x, meta["transform"])
                elif averaging:
                    x, b = b.x, average_targets(b, recent[micro][: step - first].flatten(0, 1))
                    recent[micro][(step - first) % kept] = x
                loss, v_error = batch_loss(run, c, meta, b)
                ((loss.mean() - gain) * world / c.gradient_accumulation_steps).backward()
            seen.append((loss.detach(), v_error, b.logsnr))
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), c.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = (~torch.isfinite(norm)).float()
        if device.type != "mps":
            optimizer.found_inf = bad  # a fused optimiser leaves the weights alone where this is 1
        elif bad:
            optimizer.zero_grad(set_to_none=True)
        skipped, in_a_row = skipped + bad, (in_a_row + bad) * bad
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if learning:
            for w in learning:
                w.grad.nan_to_num_(0, 0, 0)
                if world > 1:
                    dist.all_reduce(w.grad)
                    w.grad /= world
            transform_optimizer.step()
            transform_optimizer.zero_grad(set_to_none=True)
            data.refresh(meta["transform"])
        ema.update_parameters(network)
        step += 1
        clips_done += c.batch_size * c.gradient_accumulation_steps
        bar.update()
        stop = signalled[-1]
        if world > 1:  # all ranks stop at the same step; they agree every tenth, since asking waits for the device
            stop = 0
            if step % 10 == 0:
                flag = torch.tensor(signalled[-1], device=device)
                dist.all_reduce(flag, dist.ReduceOp.MAX)
                stop = int(flag)

        evaluating = step % c.eval_interval == 0 or step == c.max_iters
        if step % c.log_interval == 0 or evaluating:
            losses, v_errors, logsnrs = (torch.cat(a) for a in zip(*(earlier + gather(seen, world))))
            earlier, seen = [], []
            if in_a_row >= 10:
                bar.close()
                raise RuntimeError(f"the gradient was not finite {int(in_a_row)} steps in a row up to step {step}; the last checkpoint, if there is one, is good: lower --learning_rate or use --dtype=float32")
            speed = clips_done / (time.perf_counter() - clock)
            line = {"iter": step, "loss": round(losses.mean().item(), 6), "lr": lr, "grad_norm": round(norm.item(), 4), "clips_per_s": round(speed, 2), "skipped": int(skipped), "bins": by_bin(logsnrs.numpy(), v_errors.numpy())}
            bar.set_postfix(loss=f"{line['loss']:.4f}", clips_per_s=f"{speed:.1f}")
            if evaluating and (rank == 0 or c.shard):
                val_loss, line["val_bins"] = evaluate_now()
                line["val_loss"] = round(val_loss, 6)
                bar.write(f"step {step}: loss {line['loss']:.4f}, held-out {val_loss:.4f}, {speed:.1f} clips/s")
            if rank == 0:
                with open(out / "log.jsonl", "a") as f:
                    f.write(json.dumps(line) + "\n")
            if evaluating:
                save()
            clock, clips_done = time.perf_counter(), 0
    bar.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stop:
        save()
        if rank == 0:
            print(f"stopped by signal {stop} at step {step}; continue with --init_from=resume", file=sys.stderr)
        sys.exit(128 + stop)
    if rank == 0:
        print(f"{out}/ckpt.pt is ready: python sample.py --out_dir={c.out_dir}")


# ----------------------------------------------------------------------------------------------------------------------
# --bench=true


def seconds(f, device):
    """Duration of f(): by events on CUDA, where the host runs ahead, else by the clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(), f(), end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def find_peer(C, parameters):
    """Unet3D of video-diffusion-pytorch, where it is installed, of the nearest number of parameters; or None."""
    if importlib.util.find_spec("video_diffusion_pytorch") is None:
        return None
    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torchvision"] = MagicMock()  # the peer reads image files with it, nothing else
    from video_diffusion_pytorch import Unet3D

    def size(dim):
        with torch.device("meta"):
            return abs(sum(p.numel() for p in Unet3D(dim, channels=C).parameters()) - parameters)

    return Unet3D(min(range(16, 161, 8), key=size), channels=C)


def bench(c, rounds=5):
    """Print a table of speeds: ours and the peer's, eager and compiled, as medians of interleaved rounds beside the peak.

    Training is a whole step (forward, backward, AdamW, average) on batch_size clips; the peak is the faster of a 3x3
    convolution and a matrix product in the same number format; floating point operations are those of the forward pass,
    counted, and three times as many in training.
    """
    device, amp, compiled = pick_device(c)
    climate, starts, _, meta = prepare(c, None, 0)
    torch.manual_seed(c.seed)
    b = micro_batch(climate, starts, c, meta, device, (c.seed, 0, 0))
    z, logsnr = diffusion.diffuse(b.x, b.logsnr, b.eps), b.logsnr.to(device, torch.float32)
    work, first, modules = {}, {}, {}  # what is timed, seconds to the first training step

    def contestant(name, network, loss, forward):
        optimizer, average = make_optimizer(c, network, device), AveragedModel(network)

        def step():
            loss(network).backward()
            optimizer.step(), optimizer.zero_grad(set_to_none=True), average.update_parameters(network)

        first[name], modules[name] = seconds(step, device), network
        work[name, "training"], work[name, "forward"] = step, torch.no_grad()(lambda: forward(network))

    for name in ["eager", "compiled"] if compiled else ["eager"]:
        network = make_network(c, climate, meta).to(device)
        if name == "compiled":
            network.compile_blocks()
        run = run_network(network, device, amp, c, meta)
        contestant(name, network, lambda net, run=run: batch_loss(run, c, meta, b)[0].mean(), lambda net, run=run: run(z, logsnr, b.cond))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_network(modules["eager"], device, amp, c, meta)(z[:1], logsnr[:1], None if b.cond is None else b.cond[:1])
    flops, parameters = counter.get_total_flops(), sum(p.numel() for p in network.parameters())
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if resource else math.nan
    grid = default_grid(64, c, meta)
    denoise = diffusion.make_denoiser(lambda z, logsnr, _: run(z, logsnr, b.cond), c.param)
    work["sampling", ""] = lambda: [None for _ in zip(range(2), diffusion.sample(torch.no_grad()(denoise), z, grid, diffusion.SAMPLERS["dpmpp_sde"]))]
    work["data", ""] = lambda: micro_batch(climate, starts, c, meta, device, (c.seed, 1, 0))
    x, kernel = (torch.randn(shape).to(device, amp, memory_format=torch.channels_last) for shape in ((32, 256, 32, 32), (256, 256, 3, 3)))
    matrix = torch.randn(3072, 3072).to(device, amp)
    work["peak", "convolution"], work["peak", "matmul"] = lambda: torch.conv2d(x, kernel, padding=1), lambda: matrix @ matrix
    peak_flops = {"convolution": 2 * kernel.numel() * 32**3, "matmul": 2 * 3072**3}
    peer = find_peer(len(climate.names), parameters)
    for dtype in {torch.float32, amp} if peer else ():
        t = torch.randint(0, 1000, (len(b.x),), device=device)
        autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        for how in ("", " compiled") if compiled else ("",):
            network = copy.deepcopy(peer).to(device)
            if how:
                network.compile()
            contestant(f"peer {str(dtype)[6:]}{how}", network, autocast(lambda net: (net(z, t) - b.eps).abs().mean()), autocast(lambda net: net(z, t)))
    times = {key: [] for key in work}
    for f in work.values():
        f()  # warm
    for _ in range(rounds):
        for key, f in work.items():
            times[key].append(seconds(f, device))
    clips_per_s = {key: c.batch_size / float(np.median(t)) for key, t in times.items()}
    peaks = {kind: flop / float(np.median(times["peak", kind])) for kind, flop in peak_flops.items()}
    peak = max(peaks.values())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{len(climate.names)}x{c.frames}x{climate.size[0]}x{climate.size[1]} clips, {c.batch_size} at a time, {device}, {where}, {str(amp)[6:]}, torch {torch.__version__}; medians of {rounds} interleaved rounds")
    print(f"{parameters / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP per clip forward, three times that in training; peak memory {memory / 2**30:.2f} GiB")
    print("peak " + ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in peaks.items()))
    print(f"{'':<24}{'M par.':>8}{'first step, s':>15}{'training, clips/s':>19}{'of peak':>9}{'forward, clips/s':>18}{'of peak':>9}")
    for name, network in modules.items():
        share = lambda kind, n: f"{n * flops * clips_per_s[name, kind] / peak:>9.1%}" if "peer" not in name else f"{'':>9}"
        print(f"{name:<24}{sum(p.numel() for p in network.parameters()) / 1e6:>8.2f}{first[name]:>15.2f}{clips_per_s[name, 'training']:>19.3f}{share('training', 3)}{clips_per_s[name, 'forward']:>18.3f}{share('forward', 1)}")
    print(f"data {clips_per_s['data', '']:.0f} clips/s; sampling {clips_per_s['sampling', ''] * 2 / 64:.3f} clips/s (dpmpp_sde, 64 steps, from 2)")
    if peer:
        for kind in ("training", "forward"):
            ours, theirs = (max((v, k[0]) for k, v in clips_per_s.items() if k[1] == kind and ("peer" in k[0]) == p) for p in (False, True))
            print(f"{kind}: {ours[0] / theirs[0]:.2f} times the peer's best ({theirs[1]})")


# ----------------------------------------------------------------------------------------------------------------------


def run_main(main):
    """Run a script: bad input ends in one line and exit code 2, a failure of the machine in one line and 1."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        sys.exit(2)
    except (OSError, RuntimeError) as e:
        if os.environ.get("DEBUG"):
            raise
        print(f"{Path(sys.argv[0]).name}: {str(e).splitlines()[0] if str(e) else type(e).__name__}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
