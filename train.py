"""Train a video diffusion model on climate fields.

    python train.py --dataset=climate --param=v
    python train.py --dataset=path/to/field.nc --out_dir=out-t2m
    python train.py --init_from=resume --max_iters=10000

Edit the settings below or override any of them as --key=value; --help lists them. What stands in brackets is
what a setting may be; `fixed` ones cannot change when a run is resumed.
"""

import argparse
import ast
import copy
import hashlib
import io
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import time
import timeit
import zipfile
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if __name__ == "__main__":  # torch takes seconds to import: until run_main, Ctrl-C ends without a traceback

    def interrupted(*_):
        print("train.py: interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    signal.signal(signal.SIGINT, interrupted)

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import diffusion
from data import InputError, require
from model import BINS, VAE, Config, Denoiser, DiT, LatentCodec, UNet

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
select = ""  # part of a file, "level=850,latitude=35:70,longitude=-20:40,time=2000:2010" [fixed]
variables = ""  # comma-separated names to stack as channels; empty takes every field [fixed]
frames = 8  # time steps per clip [>= 1, fixed]
min_frames = 0  # shortest clips trained on, 1 is single images; 0 is as frames [>= 0, fixed]
size = 32  # grid side of the built-in data [>= 2, fixed]
coarsen = 1  # n: train on means of n x n cells; with --condition=coarse on cells, given these [>= 1, fixed]
condition = ""  # what the network is told, comma-separated: hour, day, coarse, names in the data [fixed]
condition_dropout = 0.1  # share of clips that are not told, for guidance_scale [>= 0, < 1]
transform = "auto"  # auto or of data.TRANSFORMS; one for all variables or one each, comma-separated [fixed]
# network
network = "unet"  # unet; dit, a transformer; vae, the autoencoder of a latent model [unet | dit | vae, fixed]
vae = ""  # out_dir of a run with --network=vae in whose latents to train; empty: in the fields [fixed]
latents = 4  # numbers that a patch of a frame is compressed to [>= 1, fixed, network=vae]
width = 64  # unit of channels, a multiple of 16 [>= 16, fixed]
mults = "1,2"  # channels of each level in widths: 64, then 128 on half the grid [fixed, network=unet dit]
blocks = 1  # residual blocks per level [>= 1, <= 64, fixed]
patch = 4  # side of a patch in cells; set 8 from 256 x 256, 16 from 512, 1 with --vae [>= 1, <= 64, fixed]
time_patch = 1  # frames of a patch, of a latent of the autoencoder [>= 1, <= 64, fixed, network=dit vae]
wrap_x = "auto"  # periodic longitude; auto: from the coordinates [auto | true | false, fixed]
# diffusion
param = "v"  # what the network predicts: v, eps, x or score [fixed, network=unet dit]
linear_skip = True  # the network adds to the exact answer of the Gaussian law [fixed, network=unet dit]
schedule = "spectrum"  # spectrum (where modes emerge) or of diffusion.SCHEDULES [fixed, network=unet dit]
logsnr_min = -30.0  # truncation of the schedule: pure noise [>= -60, fixed]
logsnr_max = 30.0  # truncation of the schedule: data [<= 60, fixed]
shift = 1.0  # adds 2 log(shift) to the log-SNR [> 0, fixed, schedule=cosine linear flow normal]
weighting = "auto"  # of the loss: auto (that of param) or of diffusion.WEIGHTINGS [network=unet dit]
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
ema_decay = 0.995  # of the averaged weights; those of the lowest held-out loss are sampled [>= 0, < 1]
# evaluation and logging
eval_interval = 300  # steps between evaluations on held-out clips and checkpoints [>= 1]
eval_iters = 4  # held-out batches per evaluation [>= 1, <= 100000]
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

AUGMENT = (-2.0, 10.0)  # log-SNRs to which the block means that an upsampler is told are noised
BOUND_STEPS = 1000  # steps T of the discrete bound that eval_only prints
RESTS = 64  # of draws where there never are data, see Clips.filled
FORMAT = 14  # of checkpoints
PARTS = ("layout", "codec", "conditions", "config", "gaussian", "extent", "settings")  # of a model
KEYS = (*PARTS, "model", "ema", "best", "trust", "optimizer", "step")  # of a checkpoint
BIN_NAMES = [f"{lo}..{hi}" for lo, hi in pairwise(["", *BINS, ""])]  # in log.jsonl
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}

# ------------------------------------------------------------------------------------------------------------
# settings


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"'{text}' is not true or false")
    return text.lower() == "true"


def read_settings(script):
    """The block between the first two rulers of a script: [(name, default, comment, rules)] of its lines."""
    block = re.split(r"(?m)^# -{20,}$", Path(script).read_text())[1]
    settings = []
    for name, literal, comment in re.findall(r"(?m)^(\w+) = (.+?)  # (.+)$", block):
        rules = re.search(r"\[(.+)\]$", comment)
        settings.append((name, ast.literal_eval(literal), comment, rules[1].split(", ") if rules else []))
    return settings


def one_of(c, name, choices):
    value = getattr(c, name)
    require(value in choices, f"--{name}={value} is not one of {', '.join(choices)}")


def refuse(message):
    raise InputError(f"{message} (--help lists the settings)")


def configure(script, argv=None):
    """Settings of a script overridden by --key=value: (namespace, set of the names given, rules by name).

    Types come from the defaults, choices and ranges from the brackets. Raises InputError.
    """
    settings, doc = read_settings(script), Path(script).read_text().split('"""')[1]
    parser = argparse.ArgumentParser(Path(script).name, description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = refuse
    for name, default, comment, _ in settings:
        kind = boolean if isinstance(default, bool) else type(default)
        for module, table in re.findall(r"of (data|diffusion)\.(\w+)", comment):
            comment = comment.replace(f"of {module}.{table}", ", ".join(getattr(globals()[module], table)))
        about = {"help": f"{comment}, default {default!r}".replace("%", "%%"), "metavar": kind.__name__}
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, **about)
    given = vars(parser.parse_args(argv))
    c = SimpleNamespace(**{name: default for name, default, _, _ in settings} | given)
    for name, _, _, rules in settings:
        value = getattr(c, name)
        usual = isinstance(value, str) or (isinstance(value, (int, float)) and abs(value) < 1e15)
        require(usual, f"--{name}={value} is not a finite number of usual size")
        for rule in rules:
            sign, _, bound = rule.partition(" ")
            if " | " in rule:
                one_of(c, name, rule.split(" | "))
            elif sign in COMPARE:
                require(COMPARE[sign](value, float(bound)), f"--{name}={value} must be {rule}")
    return c, set(given), {name: rules for name, _, _, rules in settings}


def check_owners(c, given, rules):
    """Refuse what was given if the setting it belongs to has another value: [task=forecast hindcast]."""
    for name in given:
        for key, owners in re.findall(r"\b(\w+)=([\w ]+)", ", ".join(rules[name])):
            belongs = f"--{name} belongs to --{key}={owners.replace(' ', ' or ')}"
            require(getattr(c, key) in owners.split(), f"{belongs}, not {getattr(c, key)}")


def told_names(c):
    return [n.strip() for n in c.condition.split(",") if n.strip()]


def check(c):
    """Refuse settings that cannot work together, before anything is read or written."""
    one_of(c, "param", diffusion.PARAMS)
    one_of(c, "schedule", ("spectrum", *diffusion.SCHEDULES))
    one_of(c, "weighting", ("auto", *diffusion.WEIGHTINGS))
    known = ("auto", *data.TRANSFORMS)
    for name in c.transform.split(","):
        require(name.strip() in known, f"--transform={name} is not one of {', '.join(known)}")
    require(not c.describe or c.init_from == "new", "--describe is of --dataset: leave --init_from out")
    require(c.width % 16 == 0, f"--width={c.width} must be a multiple of 16")
    whole = re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", c.mults)
    require(whole, f"--mults={c.mults} must be whole numbers like 1,2,4")
    require(c.logsnr_min < c.logsnr_max, f"--logsnr_min={c.logsnr_min} is not below {c.logsnr_max}")
    coarse = "coarse" in told_names(c)
    require(not coarse or c.coarsen > 1, "--condition=coarse needs the size of blocks, --coarsen=4")
    require(not coarse or not c.vae, "--condition=coarse and --vae exclude each other")
    require(c.network != "vae" or not c.vae, "--network=vae and --vae exclude each other: train one first")
    require(c.network != "vae" or not c.condition, "--network=vae is told nothing: leave --condition out")
    require(not c.vae or c.transform == "auto", f"--transform is that of --vae={c.vae}: leave it out")
    require(c.min_frames <= c.frames, f"--min_frames={c.min_frames} is more than --frames={c.frames}")


def memory_size():
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf


def check_room(c):
    """Refuse what is far too large here, roughly: built-in data, 20 bytes a weight, activations."""
    builtin, made = c.dataset in ("climate", "gaussian"), data.builtin_path(c.dataset, c.size)
    free, size = shutil.disk_usage(".").free, 2 * data.SEASONS * data.SEASON_HOURS * c.size**2
    fits = size < free or not builtin or made.exists()
    require(fits, f"the data of --size={c.size} take {size / 1e9:.0f} GB, and {free / 1e9:.0f} are free")
    weights = 27 * (2 * c.blocks + 3) * sum((c.width * int(m)) ** 2 for m in c.mults.split(","))
    patches = c.batch_size * c.frames * (c.size / c.patch if builtin else 1) ** 2
    needed = 20 * weights + 100 * patches * c.width * c.blocks * (not c.checkpoint_activations)
    cuda = torch.cuda.is_available() and c.device != "cpu"
    memory = torch.cuda.mem_get_info()[1] if cuda else memory_size()
    text = f"--width={c.width} --mults={c.mults} --batch_size={c.batch_size} need about {needed / 1e9:.0f} GB"
    require(needed < memory, f"{text} of memory, and there are {memory / 1e9:.0f}")


def pick_device(c):
    """(device, autocast dtype, compile?) from the settings device, dtype and compile."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(auto if c.device == "auto" else c.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device={c.device} is not available: {str(e).splitlines()[0]}")
    cuda = device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    fast = cuda or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    bfloat16 = fast if c.dtype == "auto" else c.dtype == "bfloat16"
    compiled = cuda if c.compile == "auto" else c.compile == "true"
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
        except OSError as e:  # of another kind: a file system without locks
            text = f"another process is writing to {folder}: wait for it, or use another --out_dir"
            require(not isinstance(e, BlockingIOError), text)
        data.remove_stale(folder)
        yield folder


def load_checkpoint(path, setting="--out_dir"):
    """Read a checkpoint (nothing in it can run), with the digest of its bytes. Raises InputError."""
    path = Path(path).expanduser()
    previous = path.with_suffix(".prev.pt")
    hint = f"; the one before it is {previous}: copy it to {path}" if previous.exists() else ""
    require(path.exists(), f"there is no checkpoint {path}: run train.py first, or set {setting}{hint}")
    try:
        content = path.read_bytes()
        if zipfile.ZipFile(io.BytesIO(content)).testzip():
            raise zipfile.BadZipFile  # torch.load does not look at the checksums
        checkpoint = torch.load(io.BytesIO(content), "cpu", weights_only=True)
        version = checkpoint["format"]
    except Exception as e:
        raise InputError(f"{path} is not a checkpoint that can be read ({type(e).__name__}){hint}")
    require(version == FORMAT, f"{path} has format {version}, this program reads {FORMAT}: train anew")
    lacking = [key for key in KEYS if key not in checkpoint]
    require(not lacking, f"{path} is not a whole checkpoint, it has no {', '.join(lacking)}{hint}")
    return checkpoint | {"digest": hashlib.sha256(content).hexdigest()}


@contextmanager
def fitting():
    """Whatever of a checkpoint is not as this program writes it is an InputError."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        text = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise InputError(f"the checkpoint does not fit this program ({text}): train anew")


def check_folder(c, digest=None):
    """Refuse to replace a checkpoint that nobody said may go, or that is no longer the one of this digest."""
    path = Path(c.out_dir) / "ckpt.pt"
    hint = "--init_from=resume goes on with it, --init_from=scratch replaces it"
    require(c.init_from != "new" or not path.exists(), f"{c.out_dir} holds a checkpoint: {hint}")
    same = digest is None or load_checkpoint(path)["digest"] == digest
    require(same, f"another process has written {path} since it was read: resume again")


def keep_log(path, step):
    """Leave the lines of log.jsonl up to step: what a lost future wrote is written again."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = re.findall(r'(?m)^(\{"iter": (\d+),.*\n)', text)  # one torn by a crash has no end
    with data.replacing(path) as f:
        f.write("".join(line for line, i in lines if int(i) <= step).encode())


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
    def grid(self):
        """(H, W) of what is denoised: of the fields, or of their latents."""
        return tuple(self.denoiser.gaussian.variances.shape[-2:])

    @property
    def told_block(self):
        """Cells along the side of a block whose means an upsampler is told; 0 if this is none."""
        return self.settings.coarsen if "coarse" in told_names(self.settings) else 0

    def tell_coarse(self, clips, logsnr, generator):
        """What an upsampler is told of physical clips (B, C, T, H, W), or of their block means as they are.

        The means, encoded and noised to log-SNRs (B,) (conditioning augmentation, Ho et al. 2022), and the
        log-SNR: (B, C + 1, T, H, W).
        """
        n = self.told_block
        if clips.shape[-2:] == tuple(self.layout.size):
            clips = data.block_means(clips, n)
        y = self.codec.encode(clips).nan_to_num()
        z = diffusion.diffuse(y, logsnr, torch.randn(y.shape, generator=generator)).float()
        level = diffusion.expand(logsnr.to(z), z) / 10 + torch.zeros_like(z[:, :1])
        return torch.cat([z, level], 1).repeat_interleave(n, -2).repeat_interleave(n, -1)

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
        """The log-SNRs that sampling visits: evenly over where modes emerge, and 5 beyond, but not past the
        ends of a schedule. To start 4 beyond would leave the first mode 2 % of its variance short."""
        s = self.settings
        lo, hi = s.logsnr_min, s.logsnr_max
        if s.schedule != "spectrum":
            lo, hi = self.levels.logsnr([1.0, 0.0]).tolist()
        first, last = self.denoiser.gaussian.emergence(margin=5.0)
        return diffusion.Levels("logsnr", max(lo, first), min(hi, last))

    def state(self):
        """Tensors and plain values, for load."""
        parts = {name: getattr(self, name).state() for name in ("layout", "codec", "conditions")}
        parts |= {"config": asdict(self.denoiser.network.config), "gaussian": vars(self.denoiser.gaussian)}
        return parts | {"extent": self.extent, "settings": vars(self.settings)}

    @classmethod
    def load(cls, checkpoint, dtype=torch.float32, weights="best"):
        """The model of a checkpoint, with the averaged weights of the lowest held-out loss or, if weights is
        "model", those of its last step."""
        settings, codec = SimpleNamespace(**checkpoint["settings"]), data.Codec.load(checkpoint["codec"])
        if "latents" in checkpoint["codec"]:
            codec = LatentCodec.load(codec, checkpoint["codec"])
        config, gaussian = Config(**checkpoint["config"]), diffusion.Gaussian(**checkpoint["gaussian"])
        denoiser = make_denoiser(config, gaussian, codec, settings, dtype)
        denoiser.network.load_state_dict(checkpoint[weights] or checkpoint["ema"])  # none evaluated yet
        if weights == "best":
            denoiser.trust.copy_(checkpoint["trust"])
        parts = data.Layout.load(checkpoint["layout"]), codec, data.Conditions(checkpoint["conditions"])
        return cls(denoiser, *parts, checkpoint["extent"], settings)

    @cached_property
    def record(self):
        """The record trained on; InputError if it is no longer the same, and so would be split elsewhere."""
        s = self.settings
        record = open_data(s).fit_to(self.layout, s.dataset)
        what = f"{s.dataset} no longer holds the {self.extent[0]} frames that the checkpoint was trained on"
        require(record.extent() == self.extent, f"{what}: keep them in a file of their own")
        return record


NETWORKS = {"unet": UNet, "dit": DiT, "vae": VAE}


def open_data(c):
    """The record that the settings name, of block means if they say so."""
    record = data.open_record(c.dataset, c.variables, c.size, select=c.select)
    means = record.coarsened(c.coarsen) if c.coarsen > 1 else record  # refuses a grid that n does not divide
    record = record if "coarse" in told_names(c) else means
    if "weather" in told_names(c) and isinstance(record.extras.get("weather"), data.Weather):
        record.extras["weather"].means  # makes its data now, by one rank
    return record


def open_autoencoder(c, record, clips):
    """The codec of latents: the autoencoder of --vae, its latents standardised by batches of clips."""
    checkpoint = load_checkpoint(Path(c.vae) / "ckpt.pt", "--vae")
    with fitting():
        vae = Model.load(checkpoint)
    require(vae.settings.network == "vae", f"--vae={c.vae} was not trained with --network=vae")
    order = vae.layout.match(record.layout, c.dataset, reference=f"--vae={c.vae}")
    require(order is None, f"{c.dataset} has its rows or columns in another order than the data of {c.vae}")
    p = vae.settings.time_patch
    whole = c.frames % p == 0 == c.min_frames % p
    require(whole, f"a latent of {c.vae} is {p} frames: --frames and --min_frames must be multiples of {p}")
    codec = LatentCodec(vae.codec, vae.denoiser.network, record.layout.size).fit(clips)
    x = vae.codec.encode(clips[0])
    lost = (vae.codec.encode(codec.decode(codec.encode(clips[0]))) - x).pow(2).nanmean().sqrt()
    print(f"latents   of {c.vae}, whose autoencoder loses {lost:.3f} standard deviations (RMS)")
    return codec


def make_denoiser(config, gaussian, codec, c, dtype):
    network = NETWORKS[c.network](config)
    network.checkpoint_activations = c.checkpoint_activations
    frames = c.frames // codec.span
    return Denoiser(network, gaussian, c.param, frames, codec.low, c.linear_skip, dtype, codec.valid)


def fit_to_data(record, starts, c):
    """(codec, conditions) fitted to the training clips."""
    codec = data.Codec.fit(record, starts, c.frames, c.transform)
    names = [n for n in told_names(c) if n != "coarse"]
    return codec, data.Conditions.fit(record, names, data.covered_frames(starts, c.frames))


def fit(record, starts, c, dtype):
    """An untrained model of a record: codec, conditions and Gaussian law are fitted to its training clips."""
    codec, conditions = fit_to_data(record, starts, c)
    values = len(record.layout.names) * c.frames * math.prod(record.layout.size)
    chosen = data.thin(starts, max(20, min(5000, 40_000_000 // values)))
    parts = np.array_split(chosen, min(len(chosen), max(1, len(chosen) * values // 1_000_000)))
    read = partial(data.read_clips, record, frames=c.frames)
    if c.vae:
        codec = open_autoencoder(c, record, [read(some) for some in parts[:20]])
    elif not codec.complete:
        print("missing   values are filled with draws of the law fitted to them: this may take minutes")
    batches = DataLoader(parts, None, collate_fn=lambda some: codec.encode(read(some)))
    gaussian = diffusion.Gaussian.fit(batches)  # which reads them many times
    wrap_x = record.layout.wraps() if c.wrap_x == "auto" else c.wrap_x == "true"
    mults, C = tuple(map(int, c.mults.split(","))), len(gaussian.mean)
    coarse = ("coarse" in told_names(c)) * (len(record.layout.names) + 1)
    shown = 2 * C * c.linear_skip + conditions.channels + coarse
    numbers = C * c.time_patch * c.patch**2
    fewer = c.network != "vae" or c.latents <= numbers
    require(fewer, f"--latents={c.latents} are more than the {numbers} numbers of a patch")
    sizes = {"time_patch": c.time_patch, "latents": c.latents, "wrap_x": wrap_x}
    torch.manual_seed(c.seed)
    config = Config(C, shown, c.width, mults, c.blocks, c.patch, **sizes)
    denoiser = make_denoiser(config, gaussian, codec, c, dtype)
    return Model(denoiser, record.layout, codec, conditions, record.extent(), c)


# ------------------------------------------------------------------------------------------------------------
# batches


class Batch(NamedTuple):
    x: torch.Tensor  # (B, C, T, H, W) standardised, no NaN
    mask: torch.Tensor | None  # 1 where x is data; None: everywhere
    cond: torch.Tensor | None  # (B, K, T, H, W) what the network is told
    logsnr: torch.Tensor  # (B,) float64, on the CPU
    eps: torch.Tensor  # like x

    def to(self, device):
        moved = {k: a for k, a in self._asdict().items() if a is not None and k != "logsnr"}
        return self._replace(**{k: a.to(device, non_blocking=True) for k, a in moved.items()})


class Clips(Dataset):
    """Batches of clips of a record, each a function of stream = (seed, step, micro-batch) alone.

    shortest: clips have from so many to model.settings.frames frames, one number for a batch; 0: all of them.
    Missing values are filled with draws of the Gaussian law given what is there, as it was fitted: so what
    the network sees is weather everywhere, and the loss asks for the data alone.
    """

    def __init__(self, record, starts, model, shortest=0):
        self.record, self.starts, self.model, self.shortest = record, starts, model, shortest
        self.levels, self.gaussian = model.levels, model.denoiser.gaussian  # on the CPU, as batches are
        self.kept = {}  # of `filled`

    def where(self, stream):
        """(starts of the clips, their number of frames) of a batch."""
        s = self.model.settings
        ends = np.array([self.shortest or s.frames, s.frames]) // self.model.codec.span
        length = np.random.default_rng((*stream, 3)).integers(ends[0], ends[1] + 1, 1)[0]
        chosen = np.random.default_rng(stream).integers(0, len(self.starts), s.batch_size)
        return self.starts[chosen], int(length) * self.model.codec.span

    def filled(self, x, starts, generator):
        """Clips x with draws of the Gaussian law given what is there in place of NaN.

        Where only cells are missing that never have data (land), a draw is the mean given what is there and
        a rest that does not depend on it. Both are kept: to make them for every batch takes longer than to
        train.
        """
        law, land = self.gaussian.frames(x.shape[2]), self.model.codec.valid == 0
        if not torch.equal(x.isnan(), land.expand_as(x)):
            return law.fill(x, law.draw(x, generator))
        nothing = torch.zeros_like(x[:1]).masked_fill(land, torch.nan)

        def mean(clip):
            return law.fill(clip, law.mean.expand_as(clip))

        def rest(i):
            return law.fill(nothing, law.draw(nothing, torch.Generator().manual_seed(i)) - law.mean)

        def kept(key, make, of):
            if (key, x.shape[2]) in self.kept:
                return self.kept[key, x.shape[2]]
            value = make(of)
            if (1 + len(self.kept)) * value.nbytes < data.MEMORY:
                self.kept[key, x.shape[2]] = value
            return value

        which = torch.randint(RESTS, (len(x),), generator=generator).tolist()
        drawn = zip(starts.tolist(), x.split(1), which)
        return torch.cat([kept(start, mean, clip) + kept(-1 - i, rest, i) for start, clip, i in drawn])

    def __getitem__(self, stream):
        s, conditions = self.model.settings, self.model.conditions
        starts, T = self.where(stream)
        clips = data.read_clips(self.record, starts, T)
        x = self.model.codec.encode(clips)
        generator = torch.Generator().manual_seed(torch_seed(stream))
        logsnr = self.levels.logsnr(diffusion.stratified_times(s.batch_size, generator))
        eps = torch.randn(x.shape, generator=generator)
        mask = cond = None
        if not x.isfinite().all():
            mask, x = x.isfinite().float(), self.filled(x, starts, generator)
        parts = []
        if conditions.channels:
            index = starts[:, None] + np.arange(0, T, self.model.codec.span)
            parts.append(conditions.values(self.record, index, size=self.model.grid))
        if self.model.told_block:
            noised = AUGMENT[0] + (AUGMENT[1] - AUGMENT[0]) * torch.rand(s.batch_size, generator=generator)
            parts.append(self.model.tell_coarse(clips, noised, generator))
        if parts:
            told = np.random.default_rng((*stream, 2)).random(s.batch_size) >= s.condition_dropout
            cond = torch.cat(parts, 1)
            cond = cond * diffusion.expand(torch.from_numpy(told), cond)
        return Batch(x, mask, cond, logsnr, eps)


def torch_seed(stream):
    """A seed of torch's generators from whole numbers."""
    return int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1)


def make_batches(run):
    """An iterator over this rank's micro-batches of all steps to come; on CUDA one is made ahead."""
    c, cuda = run.c, run.device.type == "cuda"
    steps, micros = range(run.step, c.max_iters), range(run.rank, c.gradient_accumulation_steps, run.world)
    streams = ((c.seed, step, micro) for step in steps for micro in micros)
    arrays = [a for piece in run.train.record.pieces for a in piece.arrays.values()]
    workers = int(cuda and all(isinstance(a, np.ndarray) for a in arrays))  # open files do not survive a fork
    return iter(DataLoader(run.train, None, sampler=streams, num_workers=workers, pin_memory=cuda))


# ------------------------------------------------------------------------------------------------------------
# loss and evaluation


def loss_of(denoiser, batch, model):
    """Weighted loss (B,) and squared v-error (B,) of one batch, by the model's denoiser or its wrapper."""
    s = model.settings
    if s.network == "vae":
        return autoencoder_loss(denoiser, batch)
    weighting = {"score": "eps"}.get(s.param, s.param) if s.weighting == "auto" else s.weighting
    log_p = model.levels.log_density(batch.logsnr) if weighting in ("elbo", "sigmoid") else None
    z = diffusion.diffuse(batch.x, batch.logsnr, batch.eps)
    F = denoiser(z, diffusion.like(batch.logsnr, z), batch.cond)
    return diffusion.training_loss(F, batch.x, batch.eps, batch.logsnr, s.param, weighting, log_p, batch.mask)


def autoencoder_loss(denoiser, batch):
    """-ELBO and its KL part, (B,) each, in nats per entry of the field."""
    with denoiser.autocast(batch.x):
        reconstruction, kl = denoiser.network(batch.x, batch.eps)
    size = diffusion.masked_sum(torch.ones_like(batch.x), batch.mask).clamp(min=1)
    kl = kl.flatten(1).sum(1) / size
    return diffusion.masked_sum(reconstruction, batch.mask) / size + kl, kl


def means(results, network):
    """(mean loss, {'lo..hi': mean squared v-error by bin of log-SNR}) of a list of (loss, v-error, logsnr);
    of an autoencoder the two parts of its loss."""
    loss, v_error, logsnr = (torch.cat(part).cpu() for part in zip(*results))
    if network == "vae":
        parts = {"reconstruction": loss - v_error, "kl": v_error}
        return loss.mean().item(), {name: part.mean().item() for name, part in parts.items()}
    which = torch.bucketize(logsnr, torch.tensor(BINS))
    rows = {BIN_NAMES[i]: v_error[which == i].mean().item() for i in which.unique().tolist()}
    return loss.mean().item(), {name: float(f"{value:.4g}") for name, value in rows.items()}


@torch.no_grad()
def evaluate(run, *denoisers):
    """[(mean loss, v-error by bin)] of denoisers on held-out clips with fixed times and noise."""
    results = []
    for i in range(run.c.eval_iters):
        batch = run.held_out[run.c.seed + 1, 0, i].to(run.device)
        results.append([(*loss_of(denoiser, batch, run.model), batch.logsnr) for denoiser in denoisers])
    return [means(found, run.c.network) for found in zip(*results)]


def keep_best(run):
    """Evaluate, and keep the averaged weights if none before had a lower held-out loss: of few data a network
    soon learns them by heart. They are not used at log-SNRs at which the Gaussian law alone is better. The
    entries of the log's line, and what is said of them."""
    c, trust = run.c, torch.ones_like(run.best.trust)
    denoisers = [run.ema, run.best] + ([] if c.network == "vae" else [run.ema.linear])
    (loss, bins), (least, _), *alone = evaluate(run, *denoisers)
    if not math.isfinite(loss):
        hint = "which is not saved: lower --learning_rate"
        raise RuntimeError(f"held-out loss not finite at step {run.step}, {hint}")
    line, text = {"val_loss": loss, "val_bins": bins}, f"held-out loss {loss:.4f}"
    if alone:
        line["gaussian_bins"] = law = alone[0][1]
        worse = {k: v / law[k] for k, v in bins.items() if v > 1.005 * law[k] > 0}
        where = "nowhere above it"
        if worse:
            where = ", ".join(f"{k} ({ratio:.2f} times)" for k, ratio in worse.items())
            where = f"above it at log-SNR {where}"
        text += f", v-error {sum(bins.values()) / sum(law.values()):.2f} of the Gaussian law's, {where}"
        if worse and c.linear_skip:
            trust = trust.new_tensor([k not in worse for k in BIN_NAMES])
            run.ema.trust.copy_(trust)
            ((loss, _),) = evaluate(run, run.ema)  # as it would be sampled
            run.ema.trust.fill_(1)
    untrained = c.network == "vae" and not run.evaluated  # of zeros: no law to fall back on
    run.evaluated = True
    if loss >= least and not untrained:
        return line, f"{text}; the weights of the lowest so far, {least:.4f}, are kept for sampling"
    run.best.network.load_state_dict(run.ema.network.state_dict())
    run.best.trust.copy_(trust)
    return line, text + ", not used there" * (not trust.all())


@torch.no_grad()
def print_likelihoods(run):
    """What eval_only prints: the held-out loss, and negative log-likelihoods in float32 with standard errors.

    The bounds are those of eval_iters batches, the probability-flow ODE's of the first ode_clips clips with
    one Hutchinson probe each. 'physical' rows include the change of variables of the transform.
    """
    c, rows, lo, hi = run.c, {}, run.c.logsnr_min, run.c.logsnr_max
    ((loss, bins),) = evaluate(run, run.best)
    if c.network == "vae":
        return print(f"step {run.step}: held-out -ELBO {loss:.5f} nats per entry: {bins}")
    print(f"step {run.step}: held-out loss {loss:.5f}; squared v-error per bin of log-SNR: {bins}")
    run.best.dtype = torch.float32
    chain = torch.linspace(lo, hi, BOUND_STEPS + 1, dtype=torch.float64)
    path = torch.linspace(hi, lo, c.ode_steps + 1, dtype=torch.float64)
    for i in range(c.eval_iters):
        stream, generator = (c.seed + 1, 0, i), torch.Generator().manual_seed(i)
        x, mask, cond, _, eps = run.held_out[stream].to(run.device)

        def denoise(z, logsnr, cond=cond):
            return run.best.denoise(z, logsnr, None if cond is None else cond[: len(z)])

        t = diffusion.stratified_times(len(x), generator)
        size = diffusion.masked_sum(torch.ones_like(x), mask)
        ends = diffusion.prior_kl(x, lo, mask) + diffusion.reconstruction_nll(size, hi)
        discrete = ends + diffusion.discrete_nll(denoise, x, t, eps, chain, mask)
        nats = {f"discrete bound, T = {BOUND_STEPS}": discrete}
        nats["continuous bound"] = ends + diffusion.diffusion_nll(denoise, x, t, eps, lo, hi, mask)
        some = x[: max(0, c.ode_clips - i * c.batch_size)]
        if c.ode_steps and mask is None and len(some):
            probes = torch.randint(0, 2, (1, *some.shape), generator=generator).to(x) * 2 - 1
            nats["probability-flow ODE"] = -diffusion.ode_log_likelihood(denoise, some, path, probes)
        slope = run.model.codec.log_slope(data.read_clips(run.held_out.record, *run.held_out.where(stream)))
        if slope is not None:  # rain, with its atom at 0, has no density in its units
            nats |= {f"{name}, physical": v - slope[: len(v)].to(v) for name, v in nats.items()}
        for name, v in nats.items():
            rows.setdefault(name, []).append((v / size[: len(v)]).cpu())
    for name, parts in rows.items():
        v = torch.cat(parts)
        print(f"  {name:<34}{v.mean():>10.4f} +- {v.std() / math.sqrt(len(v)):.4f} nats per entry")


# ------------------------------------------------------------------------------------------------------------
# the run


def start_ranks(c):
    """(rank, world size) as torchrun set them, (0, 1) without it; joins the group. Only rank 0 prints."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    if world > 1 and not dist.is_initialized():
        cuda = c.device in ("auto", "cuda") and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # long enough for rank 0 to make the built-in data, or to evaluate
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return rank, world


def learning_rate_at(step, c):
    """Linear warm-up, then cosine decay to min_lr at max_iters."""
    if step < c.warmup_iters:
        return c.learning_rate * (step + 1) / (c.warmup_iters + 1)
    progress = min(1.0, (step - c.warmup_iters) / max(1, c.max_iters - c.warmup_iters))
    return c.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (c.learning_rate - c.min_lr)


def inherit(c, settings, given, rules):
    """A resumed run keeps its settings but for those given now; fixed ones cannot change."""
    for key in settings.keys() - {"out_dir", "init_from", "eval_only", "describe"}:
        old, new = settings[key], getattr(c, key) if key in given else settings[key]
        same = new == old or "fixed" not in rules[key]
        require(same, f"--{key} is {old} in the checkpoint and cannot change: use another --out_dir")
        setattr(c, key, new)


def start(c, checkpoint):
    """The run that the settings or a checkpoint ask for: what is trained, by what, on what, how far it is."""
    rank, world = start_ranks(c)
    steps = c.gradient_accumulation_steps
    require(steps % world == 0, f"--gradient_accumulation_steps={steps} is no multiple of the {world} ranks")
    require(world == 1 or c.network != "vae", "--network=vae is trained in one process, without torchrun")
    check_room(c)
    device, dtype, compiled = pick_device(c)
    model = None
    if checkpoint:
        with fitting():
            model = Model.load(checkpoint | {"settings": vars(c)}, dtype, "model")
    if rank > 0:
        dist.barrier()  # rank 0 makes the built-in data first
    record = model.record if model else open_data(c)
    if rank == 0 and world > 1:
        dist.barrier()
    starts = data.split_windows(record, c.frames)
    model = model or fit(record, starts[0], c, dtype)
    seen = data.valid_cells(record, starts[1], c.frames)[0].any((1, 2, 3))
    for name in np.array(record.layout.names)[~seen]:
        raise InputError(f"variable '{name}' has no data in the held-out part: nothing to compare with")
    print(*record.notes, data.describe(record, model.codec, *starts, c.frames), sep="\n")
    run = SimpleNamespace(c=model.settings, model=model, device=device, rank=rank, world=world)
    run.train, run.held_out = Clips(record, starts[0], model, c.min_frames), Clips(record, starts[1], model)
    model.denoiser.to(device)
    run.ema = copy.deepcopy(model.denoiser).requires_grad_(False)  # with the moving average of the weights
    run.best, run.evaluated = copy.deepcopy(run.ema), False  # with those of the lowest held-out loss
    for p in run.best.network.parameters():
        p.zero_()  # until one is known: the Gaussian law alone
    matrices = [p for p in model.denoiser.parameters() if p.ndim >= 2]
    rest = [p for p in model.denoiser.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": c.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    run.optimizer = torch.optim.AdamW(groups, c.learning_rate, (0.9, c.beta2), fused=True)
    run.step, run.digest = 0, None
    if checkpoint:
        run.step, run.digest = checkpoint["step"], checkpoint["digest"]
        with fitting():
            run.ema.network.load_state_dict(checkpoint["ema"])
            run.evaluated = bool(checkpoint["best"])
            if run.evaluated:
                run.best.network.load_state_dict(checkpoint["best"])
                run.best.trust.copy_(checkpoint["trust"])
            run.optimizer.load_state_dict(checkpoint["optimizer"])
        for p, moments in run.optimizer.state.items():  # a fused optimiser pairs entries by place in memory
            moments |= {k: torch.empty_like(p).copy_(v) for k, v in moments.items() if v.shape == p.shape}
    if compiled and c.network != "vae":
        model.denoiser.network.compile_blocks()
    return run


def save(run):
    """Write a checkpoint of finite weights beside the old one, then rename; the old one is ckpt.prev.pt.

    From the first on, log.jsonl is that of this run, too.
    """
    if not all(p.isfinite().all() for p in run.model.denoiser.parameters()):
        raise RuntimeError(f"weights not finite at step {run.step}, nothing is saved: lower --learning_rate")
    checkpoint = {"format": FORMAT, **run.model.state(), "step": run.step}
    checkpoint |= {"model": run.model.denoiser.network.state_dict(), "ema": run.ema.network.state_dict()}
    checkpoint["best"] = run.best.network.state_dict() if run.evaluated else {}
    checkpoint |= {"trust": run.best.trust, "optimizer": run.optimizer.state_dict()}
    path = run.log.with_name("ckpt.pt")
    with data.replacing(path) as f:
        torch.save(checkpoint, f)
        if path.exists():
            with open(path, "rb") as old, data.replacing(path.with_name("ckpt.prev.pt")) as previous:
                shutil.copyfileobj(old, previous)
    run.log = run.log.replace(run.log.with_name("log.jsonl"))


def train_step(run, denoiser, batches, results):
    """One step over this rank's micro-batches: (norm of the gradient, 1 where that is not finite)."""
    c, parameters = run.c, list(run.model.denoiser.network.parameters())
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(run.step, c)
    micro_batches = c.gradient_accumulation_steps // run.world
    for i in range(micro_batches):
        last = i == micro_batches - 1  # gradients are averaged over ranks once a step
        with nullcontext() if last or run.world == 1 else denoiser.no_sync():
            batch = next(batches).to(run.device)
            loss, v_error = loss_of(denoiser, batch, run.model)
            (loss.mean() / micro_batches).backward()
        results.append((loss.detach(), v_error.detach(), batch.logsnr))
    norm = torch.nn.utils.clip_grad_norm_(parameters, c.grad_clip or math.inf)
    bad = (~torch.isfinite(norm)).float()
    run.optimizer.found_inf = bad  # where it is 1 a fused optimiser leaves the weights alone: no waiting
    run.optimizer.step()
    run.optimizer.zero_grad()
    kept = min(c.ema_decay, (1 + run.step) / (10 + run.step))  # a short memory at first
    with torch.no_grad():
        torch._foreach_lerp_(list(run.ema.network.parameters()), parameters, 1 - kept)
    run.step += 1
    return norm, bad


def agreed(run, received):
    """The signal, once every rank knows: they ask each other every tenth step, since that waits."""
    if run.world == 1:
        return received
    if run.step % 10:
        return 0
    flag = torch.tensor(received, device=run.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return int(flag)


def peak_flops(device, dtype):
    """Floating point operations a second of a 3 x 3 convolution: what the machine can do."""
    x, kernel = (torch.randn(s).to(device, dtype) for s in ((16, 256, 32, 32), (256, 256, 3, 3)))
    seconds = timeit.repeat(lambda: torch.conv2d(x, kernel, padding=1).sum().item(), repeat=3, number=1)
    return 2 * kernel.numel() * 16 * 32 * 32 / min(seconds)


@torch.no_grad()
def peak_share(run):
    """What one clip a second is of the machine's peak; a training step is three times its forward pass."""
    batch = run.held_out[run.c.seed + 1, 0, 0].to(run.device)
    with FlopCounterMode(display=False) as counter:
        loss_of(run.ema, batch, run.model)
    return 3 * counter.get_total_flops() / len(batch.x) / peak_flops(run.device, run.ema.dtype) / run.world


def train_until_done(run, received):
    """Steps, lines of the log, evaluations and checkpoints until max_iters or a signal; the signal, or 0."""
    c, denoiser, batches, share = run.c, run.model.denoiser, make_batches(run), peak_share(run)
    if run.world > 1:
        denoiser = DistributedDataParallel(denoiser)
    results, clock = [], time.perf_counter()  # since the last line of the log
    skipped, in_a_row = torch.zeros(2, device=run.device)  # steps without a finite gradient
    with tqdm(total=c.max_iters, initial=run.step, desc="training", disable=run.rank > 0) as bar:
        while run.step < c.max_iters:
            norm, bad = train_step(run, denoiser, batches, results)
            skipped, in_a_row = skipped + bad, (in_a_row + bad) * bad
            bar.update()
            stop = agreed(run, max(received, default=0))
            due = stop or run.step == c.max_iters or run.step % c.eval_interval == 0
            if not due and run.step % c.log_interval:
                continue
            if in_a_row >= 10:
                hint = "the last checkpoint, if any, is good: lower --learning_rate or use --dtype=float32"
                raise RuntimeError(f"no gradient was finite in the 10 steps up to {run.step}; {hint}")
            if run.rank == 0:
                loss, bins = means(results, c.network)
                speed = len(results) * run.world * c.batch_size / (time.perf_counter() - clock)
                bar.set_postfix_str(f"loss {loss:.4f}, {speed:.1f} clips/s, {speed * share:.0%} of the peak")
                line = {"iter": run.step, "loss": round(loss, 6), "lr": run.optimizer.param_groups[0]["lr"]}
                line |= {"grad_norm": round(norm.item(), 4), "clips_per_s": round(speed, 2)}
                line |= {"skipped": int(skipped), "bins": bins}
                if due and not stop:
                    found, text = keep_best(run)
                    line |= found
                    bar.write(f"step {run.step}: loss {loss:.4f}, {text}")
                with open(run.log, "a") as f:
                    f.write(re.sub(r"-?\b(NaN|Infinity)\b", "null", json.dumps(line)) + "\n")
                if due:
                    save(run)
            results, skipped, clock = [], 0 * skipped, time.perf_counter()
            if stop:
                return stop
    return 0


def train(run):
    """Train in out_dir, held for this process; the signal that stopped it, or 0."""
    out, received = Path(run.c.out_dir), []
    with ExitStack() as stack:
        if run.rank == 0:
            stack.enter_context(locked(out))
            check_folder(run.c, run.digest)  # again: another process may have had it meanwhile
            replaces = not run.digest and (out / "log.jsonl").exists()  # the log of another run, until saved
            run.log = out / ("log.new.jsonl" if replaces else "log.jsonl")
            keep_log(run.log, run.step)  # of a new run none
            million, dtype = sum(p.numel() for p in run.ema.parameters()) / 1e6, str(run.ema.dtype)[6:]
            print(f"network   {million:.1f} M parameters on {run.world} x {run.device} in {dtype}")
        for kind in {getattr(signal, n, signal.SIGTERM) for n in ("SIGINT", "SIGTERM", "SIGHUP")}:
            if signal.getsignal(kind) != signal.SIG_IGN:  # as nohup does with SIGHUP
                handler = signal.signal(kind, lambda number, frame: received.append(number))
                stack.callback(signal.signal, kind, handler)  # at the end
        stop = train_until_done(run, received)  # a signal ends it after the step it is in
    if stop and run.rank == 0:
        hint = "continue with --init_from=resume"
        print(f"stopped by signal {int(stop)} at step {run.step}; {hint}", file=sys.stderr)
    elif not stop:
        use = f"train.py --vae={out}" if run.c.network == "vae" else f"sample.py --out_dir={out}"
        print(f"{out}/ckpt.pt is at step {run.step}: python {use}")
    return stop


def main(argv=None):
    c, given, rules = configure(__file__, argv)
    c.out_dir, checkpoint = str(Path(c.out_dir).expanduser()), None
    if c.init_from == "resume" or c.eval_only:
        checkpoint = load_checkpoint(Path(c.out_dir) / "ckpt.pt")
        with fitting():
            inherit(c, checkpoint["settings"], given, rules)
    check_owners(c, given, rules)
    check(c)
    if c.describe:
        check_room(c)
        record = open_data(c)
        starts = data.split_windows(record, c.frames)
        codec, _ = fit_to_data(record, starts[0], c)
        return print(*record.notes, data.describe(record, codec, *starts, c.frames), sep="\n")
    if not c.eval_only:
        check_folder(c)
    run = start(c, checkpoint)
    if c.eval_only and run.rank == 0:
        print_likelihoods(run)
    elif not c.eval_only and (stop := train(run)):
        sys.exit(128 + stop)


def run_main(main):
    """Run a script: bad input ends in one line and exit code 2, a failure of the machine in one and 1."""
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, KeyboardInterrupt, OSError, RuntimeError, MemoryError) as e:
        if os.environ.get("DEBUG"):
            raise
        text = "interrupted" if isinstance(e, KeyboardInterrupt) else str(e) or type(e).__name__
        print(f"{Path(sys.argv[0]).name}: {text.splitlines()[0]}", file=sys.stderr)
        sys.exit({InputError: 2, KeyboardInterrupt: 130}.get(type(e), 1))


if __name__ == "__main__":
    run_main(main)
