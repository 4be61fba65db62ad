"""Train a video diffusion model on climate fields.

    python train.py --dataset=climate --param=v
    python train.py --dataset=path/to/field.nc --out_dir=out-t2m
    python train.py --init_from=resume --max_iters=10000

Edit the settings below or override any of them as --key=value; --help lists them. What stands in brackets is
what a setting may be; `fixed` ones cannot change when a run is resumed.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import diffusion
from data import InputError
from model import Config, Denoiser, UNet

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------------------------------------------------------------------------------
# files
out_dir = "out"  # checkpoint, log and samples go here
init_from = "new"  # resume goes on from out_dir, scratch replaces what is there [new | resume | scratch]
describe = False  # print what was understood of the data and stop
# data
dataset = "climate"  # climate, gaussian, or a path to .npy, .npz, NetCDF, Zarr, or a folder of them [fixed]
variables = ""  # comma-separated names to stack as channels; empty takes every field [fixed]
frames = 8  # time steps per clip [>= 1, fixed]
min_frames = 0  # shortest clips trained on, 1 is single images; 0 is as frames [>= 0, fixed]
size = 32  # grid side of the built-in data [>= 2, fixed]
condition = ""  # what the network is told, comma-separated: hour, day, names of the dataset [fixed]
condition_dropout = 0.1  # share of clips that are not told, for guidance_scale [>= 0, < 1]
transform = "auto"  # auto or of data.TRANSFORMS; one for all variables or one each, comma-separated [fixed]
# network
width = 64  # channels at the first level, a multiple of 16 [>= 16, fixed]
mults = "1,2"  # channel multiples; every further level halves the resolution [fixed]
blocks = 1  # residual blocks per level [>= 1, fixed]
patch = 4  # pixel-unshuffle at the input: cells of a patch become channels [>= 1, fixed]
wrap_x = "auto"  # periodic longitude; auto: from the coordinates [auto | true | false, fixed]
# diffusion
param = "v"  # what the network predicts: v, eps, x or score [fixed]
linear_skip = True  # the network adds to the exact answer of the data's Gaussian law [fixed]
schedule = "spectrum"  # log-SNRs: spectrum (where modes emerge) or of diffusion.SCHEDULES [fixed]
logsnr_min = -30.0  # truncation of the schedule: pure noise [>= -60, fixed]
logsnr_max = 30.0  # truncation of the schedule: data [<= 60, fixed]
shift = 1.0  # adds 2 log(shift) to the log-SNR [> 0, fixed, schedule=cosine linear flow normal]
weighting = "auto"  # of the loss: auto (that of param) or of diffusion.WEIGHTINGS
# optimisation
batch_size = 32  # clips per micro-batch [>= 1]
gradient_accumulation_steps = 1  # micro-batches per step, shared by the ranks of torchrun [>= 1]
max_iters = 1800  # optimiser steps [>= 1]
learning_rate = 2e-3  # peak of AdamW's learning rate [> 0]
warmup_iters = 100  # linear warm-up, then cosine decay to min_lr at max_iters [>= 0]
min_lr = 1e-5  # learning rate at the end [>= 0]
weight_decay = 0.01  # of matrices and kernels [>= 0]
beta2 = 0.99  # AdamW's second-moment decay [> 0, < 1]
grad_clip = 1.0  # gradient norm is clipped to this; 0 is off [>= 0]
ema_decay = 0.995  # of the averaged weights that are evaluated and sampled [>= 0, < 1]
# evaluation and logging
eval_interval = 600  # steps between evaluations on held-out clips and checkpoints [>= 1]
eval_iters = 4  # held-out batches per evaluation [>= 1]
eval_only = False  # print held-out loss and likelihoods of the checkpoint and stop
ode_steps = 64  # Runge-Kutta steps of the exact likelihood that eval_only prints; 0 leaves it out [>= 0]
ode_clips = 8  # held-out clips of the exact likelihood [>= 1]
log_interval = 10  # steps between lines of log.jsonl [>= 1]
# machine
seed = 0  # of weights, batches, times and noise [>= 0, <= 4294967295, fixed]
device = "auto"  # auto, cpu, cuda, cuda:1, mps
dtype = "auto"  # of the network's autocast [auto | float32 | bfloat16]
compile = "auto"  # torch.compile; auto: on CUDA [auto | true | false]
checkpoint_activations = False  # compute them again in the backward pass: less memory, more time
# ------------------------------------------------------------------------------------------------------------

FORMAT = 10  # of checkpoints
BOUND_STEPS = 1000  # steps T of the discrete bound that eval_only prints
LOGSNR_BINS = (-10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 10)  # edges of the loss table in log.jsonl
COMPARE = {">=": float.__ge__, "<=": float.__le__, ">": float.__gt__, "<": float.__lt__}

# ------------------------------------------------------------------------------------------------------------
# settings


def require(condition, message):
    if not condition:
        raise InputError(message)


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is not true or false")
    return text.lower() == "true"


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (--help lists the settings)")


def read_settings(script):
    """The block between the first two rulers of a script: [(name, default, comment, rules)] of its lines."""
    block = re.split(r"(?m)^# -{20,}$", Path(script).read_text())[1]
    settings = []
    for name, literal, comment in re.findall(r"(?m)^(\w+) = (.+?)  # (.+)$", block):
        rules = re.search(r"\[(.+)\]$", comment)
        settings.append((name, ast.literal_eval(literal), comment, rules[1].split(", ") if rules else []))
    return settings


def check_rules(name, value, rules):
    """Refuse a value that breaks one of the rules in a setting's brackets."""
    for rule in rules:
        sign, _, bound = rule.partition(" ")
        if " | " in rule:
            choices = rule.split(" | ")
            require(str(value) in choices, f"--{name}={value} is not one of {', '.join(choices)}")
        elif sign in COMPARE:
            require(COMPARE[sign](float(value), float(bound)), f"--{name}={value} must be {rule}")


def check_owners(c, given, rules):
    """Refuse a setting that was given but belongs to another value of one: [task=forecast hindcast]."""
    for name in given & rules.keys():
        for rule in rules[name]:
            key, equals, owners = rule.partition("=")
            if equals and key.isidentifier() and getattr(c, key) not in owners.split():
                used = owners.replace(" ", " or ")
                raise InputError(f"--{name} belongs to --{key}={used}, not {getattr(c, key)}")


def configure(script, argv=None):
    """Settings of a script overridden by --key=value: (namespace, names given on the command line, rules by
    name).

    Types come from the defaults, choices and ranges from the brackets. Raises InputError for an unknown key
    or a value that cannot be.
    """
    argv = sys.argv[1:] if argv is None else argv
    settings, doc = read_settings(script), Path(script).read_text().split('"""')[1]
    parser = Parser(Path(script).name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    for name, default, comment, _ in settings:
        kind = boolean if isinstance(default, bool) else type(default)
        help_text = f"{comment}, default {default!r}".replace("%", "%%")
        parser.add_argument(f"--{name}", type=kind, default=default, help=help_text, metavar=kind.__name__)
    c = parser.parse_args(argv, SimpleNamespace())
    for name, _, _, rules in settings:
        value = getattr(c, name)
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"--{name}={value} is not a finite number")
        check_rules(name, value, rules)
    given = {a.split("=")[0].lstrip("-") for a in argv if a.startswith("--")}
    return c, given, {name: rules for name, _, _, rules in settings}


def one_of(c, name, choices):
    value = getattr(c, name)
    require(value in choices, f"--{name}={value} is not one of {', '.join(choices)}")


def check(c):
    """Refuse settings that cannot work together, before anything is read or written."""
    one_of(c, "param", diffusion.PARAMS)
    one_of(c, "schedule", ("spectrum", *diffusion.SCHEDULES))
    one_of(c, "weighting", ("auto", *diffusion.WEIGHTINGS))
    require(c.width % 16 == 0, f"--width={c.width} must be a multiple of 16")
    whole = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", c.mults)
    require(whole, f"--mults={c.mults} must be whole numbers like 1,2,4")
    require(c.logsnr_min < c.logsnr_max, f"--logsnr_min={c.logsnr_min} is not below {c.logsnr_max}")
    require(c.min_frames <= c.frames, f"--min_frames={c.min_frames} is more than --frames={c.frames}")


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
    bfloat16 = c.dtype == "bfloat16"
    if c.dtype == "auto":
        bfloat16 = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    compiled = device.type == "cuda" if c.compile == "auto" else c.compile == "true"
    return device, torch.bfloat16 if bfloat16 else torch.float32, compiled


# ------------------------------------------------------------------------------------------------------------
# files: checkpoints are tensors and plain values only


@contextmanager
def locked(folder):
    """The folder, made and held for one process; InputError where another has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a")
    except OSError as e:
        raise InputError(f"{folder} cannot be written: {e.strerror}")
    with handle:
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is writing to {folder}: wait for it, or use another --out_dir")
        except OSError:  # a file system without locks
            pass
        yield folder


def keep_previous(path):
    """Leave what path holds beside it as *.prev.pt: by a link, or a copy where the file system has none."""
    temporary = path.with_name(f".{os.getpid()}.prev.pt")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_suffix(".prev.pt"))


def save_checkpoint(path, checkpoint):
    """Write, flush to disk, then rename; the previous checkpoint stays beside it."""
    with data.replacing(path) as f:
        torch.save(checkpoint, f)
        if path.exists():
            keep_previous(path)


def load_checkpoint(path):
    """Read a checkpoint (nothing in it can run). Raises InputError naming the file and what to do."""
    path = Path(path).expanduser()
    previous = path.with_suffix(".prev.pt")
    hint = f"; the one before it is {previous}: copy it to {path}" if previous.exists() else ""
    require(path.exists(), f"there is no checkpoint {path}: run train.py first, or set --out_dir{hint}")
    try:
        with open(path, "rb") as f:  # one file, whatever becomes of its name meanwhile
            damaged = zipfile.ZipFile(f).testzip()  # torch.load does not look at the checksums
            require(damaged is None, f"{path} is damaged (checksum of {damaged}){hint}")
            f.seek(0)
            digest = hashlib.sha256(f.read()).hexdigest()
            f.seek(0)
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
        version = checkpoint["format"]
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(f"{path} holds more than tensors and plain values: it was not opened{hint}")
    except Exception as e:
        raise InputError(f"{path} is not a checkpoint that can be read ({type(e).__name__}){hint}")
    require(version == FORMAT, f"{path} has format {version}, this program reads {FORMAT}: train anew")
    return checkpoint | {"digest": digest}


def open_log(path, step):
    """Keep the lines of log.jsonl up to step (-1: none): what a lost future wrote is written again."""

    def kept(line):
        try:
            return json.loads(line)["iter"] <= step
        except (ValueError, KeyError, TypeError):
            return False  # torn by a crash

    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    with data.replacing(path) as f:
        f.write("".join(line + "\n" for line in lines if kept(line)).encode())


# ------------------------------------------------------------------------------------------------------------
# the model


@dataclass
class Model:
    """A denoiser and all that must be known of the data it was trained on: what a checkpoint holds."""

    denoiser: Denoiser
    layout: data.Layout  # names, grid, coordinates, units, calendar
    codec: data.Codec  # physical units to standardised values and back
    conditions: data.Conditions  # what the network is told
    extent: list  # frames, first and last hour of the record, on which its split depends
    settings: SimpleNamespace  # of train.py

    @property
    def levels(self):
        """The log-SNRs trained on; spectrum: evenly over where the data's modes emerge, and 4 beyond."""
        s = self.settings
        if s.schedule != "spectrum":
            return diffusion.Levels(s.schedule, s.logsnr_min, s.logsnr_max, s.shift)
        first, last = self.denoiser.gaussian.emergence(margin=4.0)
        return diffusion.Levels("logsnr", max(s.logsnr_min, first), min(s.logsnr_max, last))

    @property
    def sampling_levels(self):
        """The log-SNRs that sampling visits: evenly over where the modes emerge, and 5 beyond, if that was
        trained on.

        Outside that range a step changes nothing; a grid even in the time of a +-30 cosine starves the mean
        of the field.
        """
        s = self.settings
        ends = self.levels.logsnr([1.0, 0.0]).tolist()
        lo, hi = (s.logsnr_min, s.logsnr_max) if s.schedule == "spectrum" else ends
        first, last = self.denoiser.gaussian.emergence(margin=5.0)
        return diffusion.Levels("logsnr", max(lo, first), min(hi, last))

    def state(self):
        return {
            "config": asdict(self.denoiser.network.config),
            "gaussian": self.denoiser.gaussian.state(),
            "layout": self.layout.state(),
            "codec": self.codec.state(),
            "conditions": self.conditions.state(),
            "extent": self.extent,
            "settings": vars(self.settings),
        }

    @classmethod
    def load(cls, checkpoint, dtype=torch.float32, weights="ema"):
        """The model of a checkpoint with its averaged weights or, weights="model", those of its last step."""
        settings, codec = SimpleNamespace(**checkpoint["settings"]), data.Codec.load(checkpoint["codec"])
        network = UNet(Config(**checkpoint["config"]))
        network.load_state_dict(checkpoint[weights])
        gaussian = diffusion.Gaussian(**checkpoint["gaussian"])
        denoiser = make_denoiser(network, gaussian, codec, settings, dtype)
        layout = data.Layout.load(checkpoint["layout"])
        conditions = data.Conditions.load(checkpoint["conditions"])
        return cls(denoiser, layout, codec, conditions, checkpoint["extent"], settings)

    def open_record(self):
        """The record trained on, if it is still the same, else InputError: a longer one would be split in
        other places.
        """
        s = self.settings
        record = data.open_record(s.dataset, s.variables, s.size)
        record = record.fit_to(self.layout, s.dataset)
        require(
            record.extent() == self.extent,
            f"{s.dataset} no longer holds the {self.extent[0]} frames that the checkpoint was trained on, and"
            " its held-out part would be another: keep them in a file of their own",
        )
        return record


def make_denoiser(network, gaussian, codec, c, dtype):
    network.checkpoint_activations = c.checkpoint_activations
    return Denoiser(network, gaussian, c.param, c.frames, codec.low, c.linear_skip, dtype, codec.valid)


def fit(record, starts, c, dtype):
    """An untrained model of a record: the codec, the conditions and the Gaussian law are fitted to its
    training clips.
    """
    codec = data.Codec.fit(record, starts, c.frames, c.transform)
    names = [n.strip() for n in c.condition.split(",") if n.strip()]
    conditions = data.Conditions.fit(record, names, data.covered_frames(starts, c.frames))
    C, (H, W) = len(record.layout.names), record.layout.size
    values = C * c.frames * H * W
    chosen = data.thin(starts, max(20, min(5000, 40_000_000 // values)))
    parts = np.array_split(chosen, max(1, len(chosen) * values // 1_000_000))
    gaussian = diffusion.Gaussian.fit(Encoded(record, codec, parts, c.frames))
    wrap_x = record.layout.wraps() if c.wrap_x == "auto" else c.wrap_x == "true"
    torch.manual_seed(c.seed)
    shown = 2 * C * c.linear_skip + conditions.channels
    network = UNet(
        Config(C, shown, c.width, tuple(map(int, c.mults.split(","))), c.blocks, c.patch, wrap_x=wrap_x)
    )
    denoiser = make_denoiser(network, gaussian, codec, c, dtype)
    return Model(denoiser, record.layout, codec, conditions, record.extent(), c)


@dataclass
class Encoded:
    """Batches of encoded clips, read anew each time they are iterated over."""

    record: data.Record
    codec: data.Codec
    parts: list  # starts of the clips of every batch
    frames: int

    def __iter__(self):
        for starts in self.parts:
            yield self.codec.encode(data.read_clips(self.record, starts, self.frames))


# ------------------------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    x: torch.Tensor  # (B, C, T, H, W) standardised, no NaN
    mask: torch.Tensor | None  # 1 where x is data; None: everywhere
    cond: torch.Tensor | None  # (B, K, T, H, W) what the network is told
    logsnr: torch.Tensor  # (B,) float64, on the CPU
    eps: torch.Tensor  # like x

    def to(self, device):
        x, mask, cond, eps = (
            a if a is None else a.to(device, non_blocking=True)
            for a in (self.x, self.mask, self.cond, self.eps)
        )
        return Batch(x, mask, cond, self.logsnr, eps)


class Clips(Dataset):
    """Batches of clips of a record, each a function of stream = (seed, step, micro-batch) alone.

    shortest: clips have from so many to model.settings.frames frames, one number for a batch; 0: all of them.
    Missing values are filled with draws of the Gaussian law given what is there, as it was fitted: so what
    the network sees is weather everywhere, and the loss asks for the data alone.
    """

    def __init__(self, record, starts, model, shortest=0):
        self.record, self.starts, self.model, self.shortest = record, starts, model, shortest
        self.levels = model.levels
        self.gaussian = model.denoiser.gaussian  # on the CPU, where batches are made

    def where(self, stream):
        """(starts of the clips, their number of frames) of a batch."""
        s = self.model.settings
        T = s.frames
        if self.shortest:
            T = int(np.random.default_rng((*stream, 3)).integers(self.shortest, s.frames + 1))
        return data.pick(self.starts, stream[0], stream[1:], s.batch_size), T

    def told(self, starts, T):
        """What the network is told of clips, (B, K, T, H, W), or None."""
        if not self.model.conditions.channels:
            return None
        return self.model.conditions.values(self.record, starts[:, None] + np.arange(T))

    def __getitem__(self, stream):
        s = self.model.settings
        starts, T = self.where(stream)
        x = self.model.codec.encode(data.read_clips(self.record, starts, T))
        generator = torch.Generator().manual_seed(torch_seed(stream))
        logsnr = self.levels.logsnr(diffusion.stratified_times(s.batch_size, generator))
        eps = torch.randn(x.shape, generator=generator)
        mask = None if x.isfinite().all() else x.isfinite().float()
        if mask is not None:
            x = self.gaussian.frames(T).fill(x, generator)
        cond = self.told(starts, T)
        if cond is not None:
            told = np.random.default_rng((*stream, 2)).random(s.batch_size) >= s.condition_dropout
            cond = cond * diffusion.expand(torch.from_numpy(told), cond)
        return Batch(x, mask, cond, logsnr, eps)


def torch_seed(stream):
    """A seed of torch's generators from whole numbers."""
    return int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1)


# ------------------------------------------------------------------------------------------------------------
# loss and evaluation


def loss_of(denoiser, batch, model, averaging=False):
    """Weighted loss (B,) and squared v-error (B,) of one batch, by the model's denoiser or its wrapper."""
    s = model.settings
    weighting = {"score": "eps"}.get(s.param, s.param) if s.weighting == "auto" else s.weighting
    log_p = model.levels.log_density(batch.logsnr) if weighting in ("elbo", "sigmoid") else None
    x, eps = batch.x, batch.eps
    z = diffusion.diffuse(x, batch.logsnr, eps)
    if averaging and batch.mask is None and batch.cond is None:  # clips that differ in nothing but x
        x, eps = diffusion.average_targets(x, eps, batch.logsnr)
    F = denoiser(z, batch.logsnr.to(z), batch.cond)
    return diffusion.training_loss(F, x, eps, batch.logsnr, s.param, weighting, log_p, batch.mask)


class Tally:
    """Sums of the loss, and of the squared v-error by bin of log-SNR, kept on the device until they are asked
    for.
    """

    def __init__(self, device):
        self.edges = torch.tensor(LOGSNR_BINS, dtype=torch.float64)
        self.sums = torch.zeros(
            2, len(LOGSNR_BINS) + 2, device=device
        )  # values and counts; the loss comes last

    def add(self, loss, v_error, logsnr):
        which = torch.bucketize(logsnr, self.edges).to(v_error.device, non_blocking=True)
        self.sums[0].index_add_(0, which, v_error)
        self.sums[1].index_add_(0, which, torch.ones_like(v_error))
        self.sums[:, -1] += torch.stack([loss.detach().sum(), torch.ones_like(loss).sum()])

    def read(self):
        """(mean loss, {'lo..hi': mean squared v-error}) of all ranks; starts anew."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        return self.means()

    def means(self):
        values, counts = self.sums.tolist()
        self.sums.zero_()
        edges = ["", *map(str, LOGSNR_BINS), ""]
        bins = {f"{lo}..{hi}": round(v / n, 5) for lo, hi, v, n in zip(edges, edges[1:], values, counts) if n}
        return values[-1] / counts[-1], bins


@torch.no_grad()
def evaluate(denoiser, held_out, model, device):
    """Loss on held-out clips with fixed times and noise: (mean weighted loss, v-error per log-SNR bin)."""
    tally = Tally(device)
    for i in range(model.settings.eval_iters):
        batch = held_out[model.settings.seed + 1, 0, i].to(device)
        tally.add(*loss_of(denoiser, batch, model), batch.logsnr)
    return tally.means()


@torch.no_grad()
def likelihood(model, held_out, device):
    """Held-out negative log-likelihoods in float32: {name: (nats per entry, standard error)}.

    The bounds average over eval_iters batches, the probability-flow ODE over the first ode_clips clips of
    them with one Hutchinson probe each. 'physical' rows include the transform's change of variables; rain,
    with its atom at 0, has no such density.
    """
    s, rows = model.settings, {}
    lo, hi = s.logsnr_min, s.logsnr_max
    chain = torch.linspace(lo, hi, BOUND_STEPS + 1, dtype=torch.float64)
    path = torch.linspace(hi, lo, s.ode_steps + 1, dtype=torch.float64)
    for i in range(s.eval_iters):
        stream = s.seed + 1, 0, i
        batch = held_out[stream].to(device)
        x, mask, generator = batch.x, batch.mask, torch.Generator().manual_seed(i)
        t = diffusion.stratified_times(len(x), generator)
        dim = torch.full((len(x),), float(x[0].numel())) if mask is None else mask.cpu().flatten(1).sum(1)

        def denoise(z, logsnr, cond=batch.cond):
            return model.denoiser.denoise(z, logsnr, None if cond is None else cond[: len(z)])

        prior = diffusion.prior_kl(x, lo, mask).cpu()
        decoder = diffusion.reconstruction_nll(dim, hi)
        continuous = diffusion.diffusion_nll(denoise, x, t, batch.eps, lo, hi, mask).cpu()
        discrete = diffusion.discrete_nll(denoise, x, t, batch.eps, chain, mask).cpu()
        parts = {
            "prior": prior,
            "diffusion": continuous,
            "reconstruction": decoder,
            "continuous bound": prior + continuous + decoder,
            f"discrete bound, T = {BOUND_STEPS}": prior + discrete + decoder,
        }
        some = x[: max(0, s.ode_clips - i * s.batch_size)]
        if s.ode_steps and mask is None and len(some):
            probes = torch.randint(0, 2, (1, *some.shape), generator=generator).to(x) * 2 - 1
            parts["probability-flow ODE"] = -diffusion.ode_log_likelihood(denoise, some, path, probes).cpu()
        slope = model.codec.log_slope(data.read_clips(held_out.record, *held_out.where(stream)))
        if slope is not None:
            for name in {"continuous bound", "probability-flow ODE"} & parts.keys():
                parts[f"{name}, physical"] = parts[name] - slope[: len(parts[name])]
        for name, value in parts.items():
            rows.setdefault(name, []).append((value / dim[: len(value)]).double())
    rows = {name: torch.cat(values) for name, values in rows.items()}
    return {name: (v.mean().item(), v.std().item() / math.sqrt(len(v))) for name, v in rows.items()}


def print_likelihood(step, loss, bins, rows, codec):
    """What eval_only prints."""
    print(f"step {step}: held-out loss {loss:.5f}; squared v-error per bin of log-SNR:")
    print("  " + ", ".join(f"{k} {v:.4f}" for k, v in bins.items()))
    print(f"{'negative log-likelihood per entry':<36}{'nats':>12}{'+-':>10}{'bits':>12}")
    for name, (nats, error) in rows.items():
        print(f"  {name:<34}{nats:>12.4f}{error:>10.4f}{nats / math.log(2):>12.4f}")
    if any(v.floor is not None for v in codec.variables):
        print(
            "  (of the transformed field: a variable with an atom at its floor has no density in its units)"
        )


# ------------------------------------------------------------------------------------------------------------
# the run


@dataclass
class Run:
    """A training run: what is trained, by what, on what, and how far it is."""

    model: Model
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    train: Clips
    held_out: Clips
    device: torch.device
    step: int = 0


def start_ranks(c):
    """(rank, world size) as torchrun set them, (0, 1) without it; joins the process group (nccl on CUDA, else
    gloo).
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        cuda = c.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            require(
                local < gpus,
                f"this machine has {gpus} GPUs: use a --nproc_per_node of at most that, or --device=cpu",
            )
            torch.cuda.set_device(local)
        # long enough for rank 0 to make the built-in data, or to evaluate
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return int(os.environ.get("RANK", 0)), world


def make_optimizer(c, network, device):
    """AdamW, with weight decay on matrices and kernels alone."""
    matrices = [p for p in network.parameters() if p.ndim >= 2]
    rest = [p for p in network.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]
    fused = device.type != "mps"
    return torch.optim.AdamW(
        groups, c.learning_rate, (0.9, c.beta2), weight_decay=c.weight_decay, fused=fused
    )


def averaged(denoiser, decay):
    """Moving average of the weights, with a short memory at first: min(decay, (1 + n) / (10 + n))."""

    def lerp(averages, current, n):
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return AveragedModel(denoiser, multi_avg_fn=lerp)


def learning_rate_at(step, c):
    """Linear warm-up, then cosine decay to min_lr at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    progress = min(1.0, (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters))
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - c.min_lr)


def inherit(c, settings, given, rules):
    """A resumed run keeps its settings but for those given now; fixed ones cannot change."""
    for key, value in settings.items():
        if "fixed" in rules[key]:
            require(
                key not in given or getattr(c, key) == value,
                f"--{key} is {value} in the checkpoint and cannot change: use another --out_dir",
            )
        if key not in given and key not in ("out_dir", "init_from", "eval_only", "describe"):
            setattr(c, key, value)


def open_data(c, model, rank):
    """The record of a run and the starts of its training and held-out clips."""
    if rank > 0:
        dist.barrier()  # rank 0 makes the built-in data first
    record = model.open_record() if model else data.open_record(c.dataset, c.variables, c.size)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return record, *data.split_windows(record, c.frames)


def start(c, given, rules):
    """The run that the settings ask for, new or resumed."""
    rank, world = start_ranks(c)
    model, checkpoint = None, None
    if c.init_from == "resume" or c.eval_only:
        checkpoint = load_checkpoint(Path(c.out_dir) / "ckpt.pt")
        inherit(c, checkpoint["settings"], given, rules)
    device, dtype, compiled = pick_device(c)
    if checkpoint:
        model = Model.load(checkpoint | {"settings": vars(c)}, dtype, "model")
    check(c)
    steps = c.gradient_accumulation_steps
    require(steps % world == 0, f"--gradient_accumulation_steps={steps} is no multiple of the {world} ranks")
    record, train_starts, held_out_starts = open_data(c, model, rank)
    model = model or fit(record, train_starts, c, dtype)
    seen = data.valid_cells(record, held_out_starts, c.frames)[0].any((1, 2, 3))
    for name in np.array(record.layout.names)[~seen]:
        raise InputError(f"variable '{name}' has no data in the held-out part: nothing to compare with")
    if rank == 0:
        tell(record, model.codec, train_starts, held_out_starts, c.frames)
    train, held_out = Clips(record, train_starts, model, c.min_frames), Clips(record, held_out_starts, model)
    model.denoiser.to(device)
    ema = averaged(model.denoiser, c.ema_decay)
    run = Run(model, ema, make_optimizer(c, model.denoiser.network, device), train, held_out, device)
    if checkpoint:
        run.step = checkpoint["step"]
        ema.module.network.load_state_dict(checkpoint["ema"])
        ema.n_averaged.fill_(run.step)
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        for (
            p,
            state,
        ) in run.optimizer.state.items():  # a fused optimiser pairs entries by their place in memory
            same = {k: v for k, v in state.items() if v.shape == p.shape}
            state.update({k: torch.empty_like(p).copy_(v).detach() for k, v in same.items()})
    if compiled:
        model.denoiser.network.compile_blocks()
    return run


def tell(record, codec, train_starts, held_out_starts, frames):
    """Print what was understood of the data."""
    print("\n".join([*record.notes, data.describe(record, codec, train_starts, held_out_starts, frames)]))


def save(run):
    """Write the checkpoint of a run; not one whose weights are not finite: the last one is good."""
    finite = all(p.isfinite().all() for p in run.model.denoiser.parameters())
    if not finite:
        raise RuntimeError(
            f"the weights are not finite at step {run.step}: nothing is saved, lower --learning_rate"
        )
    checkpoint = {
        "format": FORMAT,
        **run.model.state(),
        "step": run.step,
        "model": run.model.denoiser.network.state_dict(),
        "ema": run.ema.module.network.state_dict(),
        "optimizer": run.optimizer.state_dict(),
    }
    save_checkpoint(Path(run.model.settings.out_dir) / "ckpt.pt", checkpoint)


def train_step(run, denoiser, batches, tally, world):
    """One step of the optimiser over this rank's micro-batches: (gradient norm, 1 if that is not finite)."""
    c, network = run.model.settings, run.model.denoiser.network
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, c)
    micro_batches = c.gradient_accumulation_steps // world
    for i in range(micro_batches):
        last = i == micro_batches - 1  # gradients are averaged over ranks once a step
        with nullcontext() if last or world == 1 else denoiser.no_sync():
            batch = next(batches).to(run.device)
            loss, v_error = loss_of(denoiser, batch, run.model, averaging=True)
            (loss.mean() / micro_batches).backward()
        tally.add(loss, v_error, batch.logsnr)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), c.grad_clip or math.inf)
    bad = (~torch.isfinite(norm)).float()
    if run.device.type != "mps":
        run.optimizer.found_inf = (
            bad  # a fused optimiser leaves the weights alone where this is 1: no waiting
        )
    elif bad:
        run.optimizer.zero_grad(set_to_none=True)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update_parameters(run.model.denoiser)
    run.step += 1
    return norm, bad


class Signals:
    """The last of SIGINT, SIGTERM and SIGHUP: a run ends after the step it is in, once its checkpoint is
    written.
    """

    def __enter__(self):
        self.received = 0
        names = [n for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
        self.handlers = {n: signal.signal(getattr(signal, n), self.receive) for n in names}
        return self

    def __exit__(self, *error):
        for name, handler in self.handlers.items():
            signal.signal(getattr(signal, name), handler)

    def receive(self, number, frame):
        self.received = number

    def agreed(self, step, device):
        """The signal, once every rank knows: they ask each other every tenth step, since that waits for the
        device.
        """
        if not dist.is_initialized():
            return self.received
        if step % 10:
            return 0
        flag = torch.tensor(self.received, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


def peak_flops(device, dtype):
    """Floating point operations per second of a 3x3 convolution: what the machine can do."""
    x, kernel = (torch.randn(s).to(device, dtype) for s in ((16, 256, 32, 32), (256, 256, 3, 3)))
    x, kernel = (a.to(memory_format=torch.channels_last) for a in (x, kernel))
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        torch.conv2d(x, kernel, padding=1).sum().item()
        best = min(best, time.perf_counter() - begin)
    return 2 * kernel.numel() * x.shape[0] * x.shape[2] * x.shape[3] / best


@torch.no_grad()
def clip_flops(run):
    """Operations of one clip in a training step: three times those of the forward pass, counted."""
    layout, channels = run.model.layout, run.model.conditions.channels
    shape = run.model.settings.frames, *layout.size
    x = torch.zeros(1, len(layout.names), *shape, device=run.device)
    with FlopCounterMode(display=False) as counter:
        run.ema.module(x, x.new_zeros(1), x.new_zeros(1, channels, *shape) if channels else None)
    return 3 * counter.get_total_flops()


def log_line(run, tally, norm, skipped, speed):
    """What goes into log.jsonl: means over the steps since the last line."""
    loss, bins = tally.read()
    return {
        "iter": run.step,
        "loss": round(loss, 6),
        "lr": run.optimizer.param_groups[0]["lr"],
        "grad_norm": round(norm.item(), 4),
        "clips_per_s": round(speed, 2),
        "skipped": skipped,
        "bins": bins,
    }


def make_batches(run, rank):
    """An iterator over this rank's micro-batches of all steps to come; on CUDA one is made ahead, in pinned
    memory.
    """
    c, cuda = run.model.settings, run.device.type == "cuda"
    micros = range(rank, c.gradient_accumulation_steps, dist.get_world_size() if dist.is_initialized() else 1)
    streams = [(c.seed, step, micro) for step in range(run.step, c.max_iters) for micro in micros]
    arrays = [a for piece in run.train.record.pieces for a in piece.arrays.values()]
    workers = int(cuda and all(isinstance(a, np.ndarray) for a in arrays))  # open files do not survive a fork
    loader = DataLoader(run.train, batch_size=None, sampler=streams, num_workers=workers, pin_memory=cuda)
    return iter(loader)


def train_until_done(run, rank, world, signals):
    """The loop: steps, lines of the log, evaluations and checkpoints, until max_iters or a signal, which is
    returned.
    """
    c, path = run.model.settings, Path(run.model.settings.out_dir) / "log.jsonl"
    denoiser = (
        DistributedDataParallel(run.model.denoiser, broadcast_buffers=False)
        if world > 1
        else run.model.denoiser
    )
    batches, tally = make_batches(run, rank), Tally(run.device)
    share = clip_flops(run) / peak_flops(run.device, run.model.denoiser.dtype) / world
    skipped, in_a_row = torch.zeros(2, device=run.device)  # steps without a finite gradient
    clock, logged = time.perf_counter(), run.step
    with tqdm(total=c.max_iters, initial=run.step, desc="training", unit="it", disable=rank > 0) as bar:
        while run.step < c.max_iters:
            norm, bad = train_step(run, denoiser, batches, tally, world)
            skipped, in_a_row = skipped + bad, (in_a_row + bad) * bad
            bar.update()
            stop = signals.agreed(run.step, run.device)
            due = stop or run.step == c.max_iters or run.step % c.eval_interval == 0
            if not due and run.step % c.log_interval:
                continue
            if int(in_a_row) >= 10:
                raise RuntimeError(
                    f"no gradient was finite in the {int(in_a_row)} steps up to {run.step}; the last"
                    " checkpoint, if any, is good: lower --learning_rate or use --dtype=float32"
                )
            clips = (run.step - logged) * c.batch_size * c.gradient_accumulation_steps
            speed = clips / (time.perf_counter() - clock)
            line = log_line(run, tally, norm, int(skipped), speed)
            now = f"loss {line['loss']:.4f}, {speed:.1f} clips/s, {speed * share:.0%} of the machine's peak"
            bar.set_postfix_str(now)
            if due and not stop and rank == 0:
                results = evaluate(run.ema.module, run.held_out, run.model, run.device)
                line["val_loss"], line["val_bins"] = results
                bar.write(f"step {run.step}: held-out loss {line['val_loss']:.4f}, {now}")
            if rank == 0:
                with open(path, "a") as f:
                    f.write(json.dumps(line) + "\n")
                if due:
                    save(run)
            if stop:
                return stop
            clock, logged = time.perf_counter(), run.step
    return 0


def print_likelihoods(run):
    """What eval_only prints: the held-out loss, and likelihoods in float32."""
    run.model.denoiser = run.ema.module.eval()
    results = evaluate(run.model.denoiser, run.held_out, run.model, run.device)
    run.model.denoiser.dtype = torch.float32
    print_likelihood(run.step, *results, likelihood(run.model, run.held_out, run.device), run.model.codec)


def train(c, given, rules, out):
    """Train, or with eval_only evaluate; returns the signal that stopped it, or 0."""
    run = start(c, given, rules)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if c.eval_only:
        if rank == 0:
            print_likelihoods(run)
        return 0
    with locked(out) if rank == 0 else nullcontext(), Signals() as signals:
        if rank == 0:
            open_log(out / "log.jsonl", run.step if c.init_from == "resume" else -1)
            parameters = sum(p.numel() for p in run.model.denoiser.parameters()) / 1e6
            ranks, dtype = f"{world} " if world > 1 else "", str(run.model.denoiser.dtype)[6:]
            print(f"network   {parameters:.1f} M parameters on {ranks}{run.device} in {dtype}")
            if run.step >= c.max_iters:
                print(f"{out}/ckpt.pt is at step {run.step} already: give a larger --max_iters to train on")
        stop = train_until_done(run, rank, world, signals)
    if rank == 0 and stop:
        message = f"stopped by signal {stop} at step {run.step}; continue with --init_from=resume"
        print(message, file=sys.stderr)
    elif rank == 0:
        print(f"{out}/ckpt.pt is ready: python sample.py --out_dir={out}")
    return stop


def main(argv=None):
    c, given, rules = configure(__file__, argv)
    check_owners(c, given, rules)
    check(c)
    out = Path(c.out_dir).expanduser()
    c.out_dir = str(out)
    if c.describe:
        record = data.open_record(c.dataset, c.variables, c.size)
        starts, held_out = data.split_windows(record, c.frames)
        return tell(record, data.Codec.fit(record, starts, c.frames, c.transform), starts, held_out, c.frames)
    old = (out / "ckpt.pt").exists() and c.init_from == "new" and not c.eval_only
    require(
        not old,
        f"{out} holds a checkpoint: --init_from=resume goes on with it, --init_from=scratch replaces it",
    )
    stop = train(c, given, rules, out)
    if stop:
        sys.exit(128 + stop)


def run_main(main):
    """Run a script: bad input ends in one line and exit code 2, a failure of the machine in one and 1."""
    script = Path(sys.argv[0]).name
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as e:
        print(f"{script}: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (OSError, RuntimeError, MemoryError) as e:
        if os.environ.get("DEBUG"):
            raise
        print(f"{script}: {str(e).splitlines()[0] if str(e) else type(e).__name__}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
