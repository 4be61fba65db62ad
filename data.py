"""Climate arrays in and out: built-in weather, your own files, windows, conditions, transforms, written
samples.

A record is a series of frames (time, y, x) of C variables on one grid, in physical units; a clip is `frames`
of them in a row, (C, T, H, W). NaN is no data. Bad input raises InputError: one line with the cause, what was
found and what mends it.
"""

import math
import os
import re
import time
import warnings
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

try:  # needed for files
    import cf_xarray  # noqa: F401, adds Dataset.cf
    import cftime
    import xarray as xr
except ImportError:
    xr = None


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what to do."""


class NothingSelected(InputError):
    """A file has nothing of the times that --select asks for; another file of the folder may have it."""


class NoSuchVariable(InputError):
    """A file has no variable of a name that is wanted; another file of the folder may have it."""


def require(condition, message):
    """Raises InputError with the message where the condition does not hold."""
    if not condition:
        raise InputError(message)


# ------------------------------------------------------------------------------------------------------------
# the built-in weather: a damped, advected stochastic heat equation, censored and raised to a power

CELL_KM, ELL_KM, WIND_KM_H = 8.8, 300.0, 25.0  # grid spacing, correlation length, wind from the west
MEAN_SHARE, MEAN_HOURS, MEMORY_HOURS = 0.4, 48.0, 12.0  # the k = 0 mode: its variance and memory; at k = 0+
THRESHOLD, POWER, RATE = 0.80, 2.4, 0.85  # rain = RATE s(y, x) max(0, z - THRESHOLD)^POWER mm/h
SEASONAL = 0.05  # the threshold moves by this over the year: wetter winters
SEASONS, SEASON_HOURS = 160, 1440  # 40 years of four seasons, the first 60 days of each: 230400 frames


def spectrum(size):
    """Variance, decay rate per hour and phase per hour of every Fourier mode, (M, M) each, M = 2 size.

    z_k(t + h) = exp(-r_k h - i k.U h) z_k(t) + sqrt(S_k (1 - exp(-2 r_k h))) xi on a doubly periodic box
    twice as wide as the domain, so that the domain is not periodic; S_k ~ (k^2 + (2 pi / ell)^2)^-2, total
    variance 1 (Sigrist, Kunsch and Stahel 2012; Hottovy and Stechmann 2015). The Nyquist modes are left out.
    """
    M = 2 * size
    k = 2 * math.pi * torch.fft.fftfreq(M, CELL_KM, dtype=torch.float64)  # (M,) radians per km
    k2 = k[:, None] ** 2 + k**2  # (M, M)
    S = (k2 + (2 * math.pi / ELL_KM) ** 2) ** -2
    S[0, 0] = S[M // 2] = S[:, M // 2] = 0
    S = (1 - MEAN_SHARE) * S / S.sum()
    rate = (1 + k2.sqrt() * ELL_KM / (2 * math.pi)) ** (2 / 3) / MEMORY_HOURS
    S[0, 0], rate[0, 0] = MEAN_SHARE, 1 / MEAN_HOURS
    return S, rate, (k * WIND_KM_H).expand(M, M)


def lag_covariance(frames, size):
    """Exact covariance of the latent field by lag in time and, modulo M = 2 size, in space: (frames, M, M)"""
    S, rate, phase = spectrum(size)
    lags = torch.arange(frames, dtype=torch.float64)[:, None, None]
    return torch.fft.ifft2(S * torch.exp(-lags * (rate + 1j * phase)), norm="forward").real


def latent_modes(frames, size):
    """The exact law of a latent clip on the whole periodic box, M = 2 size. Its Fourier modes are independent
    series: variances (M, M, T) in units of white noise and unitary modes (M, M, T, T) of each."""
    S, rate, phase = spectrum(size)
    lag = torch.arange(frames, dtype=torch.float64)[:, None] - torch.arange(frames)  # (T, T)
    C = S[..., None, None] * torch.exp(-lag.abs() * rate[..., None, None] - 1j * lag * phase[..., None, None])
    w, U = torch.linalg.eigh(C)
    return (2 * size) ** 2 * w.clamp(min=0), U


def orography(size):
    """The smooth rain factor s(y, x): hills in the west, a rain shadow behind them. (size, size) float32"""
    x = (np.arange(size) + 0.5) / size
    y, s = x[:, None], 0.9
    for height, y0, x0, width in ((0.9, 0.35, 0.25, 0.12), (0.6, 0.7, 0.4, 0.15), (-0.35, 0.45, 0.7, 0.2)):
        s = s + height * np.exp(-((y - y0) ** 2 + (x - x0) ** 2) / (2 * width**2))
    return s.astype(np.float32)


def threshold(season):
    """Censoring threshold c of a season (0 is winter)."""
    return THRESHOLD - SEASONAL * np.cos(np.pi / 2 * season)


def rain(z, c):
    """Rain in mm/h of a latent field z (..., size, size); the threshold c is a number or broadcasts."""
    return torch.from_numpy(RATE * orography(z.shape[-1])) * (z - c).clamp(min=0) ** POWER


def rain_cdf(q, size):
    """Exact P(R <= q) of `climate` in every cell, over whole years: q (n,) mm/h -> (n, size, size)."""
    root = (np.asarray(q, np.float64)[:, None, None] / (RATE * orography(size))) ** (1 / POWER)
    return np.mean([normal_cdf(threshold(season) + root) for season in range(4)], axis=0)


def rain_coefficients():
    """Hermite coefficients a_n of f(z) = max(0, z - c)^POWER by season, (4, 300): a_0 is its mean, and
    E[f(z) f(z')] = sum a_n^2 rho^n where z, z' have correlation rho (Mehler); others are less than 1e-5."""
    z, a = np.linspace(0, 12, 20001), np.zeros((4, 300))
    for season in range(4):
        u, before, h = z + threshold(season), 0.0, np.ones_like(z)
        density = z**POWER * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
        for n in range(300):  # normalised Hermite polynomials h_n
            a[season, n] = np.trapezoid(density * h, z)
            before, h = h, (u * h - math.sqrt(n) * before) / math.sqrt(n + 1)
    return a


def rings(power):
    """Radial average of the power (H, W) of fft2's waves, by cycles per cell: two (K,) arrays."""
    H, W = power.shape
    n = min(H, W)
    ring = np.rint(np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)) * n).astype(int)
    total, count = np.bincount(ring.ravel(), power.ravel()), np.bincount(ring.ravel())
    k = np.arange(1, n // 2 + 1)
    return k / n, total[k] / count[k]


def rain_law(size, frames, levels, dry=0.01):
    """Exact statistics of `climate` over whole years, all cells together, by name: mean, std, dry (share of
    values up to `dry` mm/h), quantiles at the levels (below 1), autocorrelation at lags 0 .. frames - 1,
    spatial_power (see rings), temporal_power (|rfft|^2 / frames without the mean), and the mean of every
    frame (frames,) and of every cell, map (size, size)."""
    p, a = RATE * orography(size).astype(np.float64), rain_coefficients()
    low, high = np.zeros(len(levels)), np.full(len(levels), p.max() * 10**POWER)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = rain_cdf(middle, size).mean((1, 2)) < levels
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    mean, lags = a[:, 0].mean() * p, np.arange(frames)
    lagged = np.polynomial.polynomial.polyval(lag_covariance(frames, size).numpy(), (a**2).mean(0))
    in_time = (p**2).mean() * lagged[:, 0, 0]
    pairs = np.fft.ifft2(np.abs(np.fft.fft2(p, (2 * size, 2 * size))) ** 2).real * lagged[0]  # summed by lag
    in_space = np.fft.fft2(pairs.reshape(2, size, 2, size).sum((0, 2))).real / size**2
    variance = in_time[0] - mean.mean() ** 2
    return {
        "mean": mean.mean(),
        "std": math.sqrt(variance),
        "dry": rain_cdf([dry], size).mean(),
        "quantiles": high.round(9),
        "frames": np.full(frames, mean.mean()),
        "map": mean,
        "autocorrelation": (in_time - mean.mean() ** 2) / variance,
        "spatial_power": rings(in_space)[1],
        "temporal_power": np.fft.rfft(in_time * (1 - lags / frames) * np.where(lags, 2, 1)).real[1:],
    }


def generate(path, kind, size, seed):
    """Write the built-in data, (SEASONS, SEASON_HOURS, size, size) float16 .npy. Season k + 5 of every ten is
    season k with its latent field negated (both train or both test): each has the exact law by itself, and
    together their mean is exact, else most of the record's sampling error (the slow k = 0 mode)."""
    S, rate, phase = spectrum(size)
    generator = torch.Generator().manual_seed(seed)
    decay = torch.exp(-rate - 1j * phase).to(torch.complex64)
    kick = (S * -torch.expm1(-2 * rate)).sqrt().to(torch.complex64)
    shape = (SEASONS // 4, *S.shape)  # each complex field is two real ones, and each of those two seasons

    def noise():
        return math.sqrt(2) * torch.randn(shape, dtype=torch.complex64, generator=generator)

    c = torch.from_numpy(threshold(np.arange(SEASONS))).float()[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent, age=24 * 3600)  # another machine may be making one
    with replacing(path) as f:
        out = reserved(f.name, (SEASONS, SEASON_HOURS, size, size), np.float16)
        z = S.sqrt() * noise()
        for hour in tqdm(range(SEASON_HOURS), desc=f"making {path}", unit="h"):
            latent = torch.fft.ifft2(z, norm="forward")[:, :size, :size]
            latent = torch.stack([latent.real, latent.imag], 1).view(-1, 5, size, size)
            latent = torch.cat([latent, -latent], 1).flatten(0, 1)  # (SEASONS, size, size)
            out[:, hour] = latent if kind == "gaussian" else rain(latent, c)
            z = decay * z + kick * noise()
        out.flush()
        del out


@dataclass
class Weather:
    """What a coarse model would know of `climate`: means of its latent field over 8 x 8 cells, as an array
    (N, size, size) read frame by frame."""

    size: int
    seed: int
    ndim = 3

    @property
    def shape(self):
        return (SEASONS * SEASON_HOURS, self.size, self.size)

    @cached_property
    def means(self):
        return builtin("gaussian", self.size, self.seed).coarsened(8)

    def __getitem__(self, i):
        return self.means.frames(i, i + 1)[0, 0].repeat(8, 0).repeat(8, 1)


def builtin_path(kind, size, seed=0, folder="data"):
    """Where the built-in data are kept; whoever edits the constants above gets a file of their own."""
    constants = CELL_KM, ELL_KM, WIND_KM_H, MEAN_SHARE, MEAN_HOURS, MEMORY_HOURS, SEASONS, SEASON_HOURS
    constants += (THRESHOLD, POWER, RATE, SEASONAL) if kind == "climate" else ()
    return Path(folder) / f"{kind}_{size}_seed{seed}_{zlib.crc32(repr(constants).encode()):08x}.npy"


def builtin(kind, size, seed, folder="data"):
    """The Record of `climate` (rain, mm/h) or `gaussian` (its latent field), made once and memory-mapped."""
    path = builtin_path(kind, size, seed, folder)
    if not path.exists():
        generate(path, kind, size, seed)
    array = np.load(path, mmap_mode="r").reshape(-1, size, size)
    hours = (np.arange(SEASONS)[:, None] * 90 * 24 + np.arange(SEASON_HOURS)).ravel()  # years of 360 days
    km = {"units": "km", "long_name": "distance"}
    coords = {d: {"dims": [d], "values": np.arange(size) * CELL_KM, "attrs": km} for d in ("y", "x")}
    rain_rate = {"units": "mm h-1", "long_name": "rain rate"}
    name, attrs = ("rain", rain_rate) if kind == "climate" else ("z", {"units": "1"})
    extras = {"orography": orography(size), "season": np.repeat(np.arange(SEASONS) % 4, SEASON_HOURS)}
    if kind == "climate" and size % 8 == 0:
        extras["weather"] = Weather(size, seed)
    layout = Layout([name], [attrs], coords=coords, calendar="360_day")
    return Record(layout, [Piece({name: array})], hours, extras, SEASON_HOURS)


# ------------------------------------------------------------------------------------------------------------
# the grid of a record, and the record itself

EPOCH = "hours since 1970-01-01"  # of Record.hours
UNDATED = ("none", "frames")  # calendars of records without dates: hours from the start, or numbers of frames
RESERVED = ("time", "realization", "forecast_reference_time", "channel", "samples", "units", "dims", "file")
UNITS = {"degC": "°c|(deg(ree)?s?_?)?c(elsius)?", "K": "(deg_?)?k(elvin)?", "d": "days?", "h": "hr|hours?"}


def canonical(units):
    """Units in one spelling, to compare them: kg/m^2/s, kg m**-2 s**-1 and kg m-2 s-1 are equal."""
    text = re.sub(r"\*\*|\^|\*", "", str(units).translate(str.maketrans("⁻¹²³·.", "-123  ")))
    text = re.sub(r"/\s*([^\W\d]+)(\d*)", lambda m: f" {m[1]}-{m[2] or 1}", text)
    words = [re.fullmatch(r"(.*?)(-?\d*)", word).groups() for word in text.split()]
    for i, (word, power) in enumerate(words):
        words[i] = next((unit for unit, p in UNITS.items() if re.fullmatch(p, word.lower())), word) + power
    return sorted(words)


def is_degrees(attrs):
    return str(attrs.get("units", "")).lower().startswith("degree")


def usual_step(steps):
    """Median of |steps|, those of 0 left out; NaN if there are no others."""
    steps = np.abs(steps[steps != 0])
    return float(np.nanmedian(steps)) if np.isfinite(steps).any() else math.nan


def cell_width(values):
    """Typical distance of neighbours of a coordinate (n,) or (H, W); 1 where there is but one value."""
    step = usual_step(np.concatenate([np.diff(values, axis=i).ravel() for i in range(values.ndim)]))
    return step if step == step else 1.0


def distance(a, b, period):
    """|a - b|, round the circle if there is a period; 0 where both are missing."""
    d = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b))
    return np.minimum(d % period, period - d % period) if period else d


def places(coord, period=None, factor=1):
    """The values of a coordinate, float64; factor: of the grid whose cells are blocks of so many cells."""
    values = np.asarray(coord["values"], np.float64)
    for axis in range(values.ndim) if factor > 1 else ():
        values = np.unwrap(values, period=period, axis=axis) if period else values
        values = values.reshape(*values.shape[:axis], -1, factor, *values.shape[axis + 1 :]).mean(axis + 1)
    return values


def block_means(x, n):
    """Means over n x n cells of x (..., H, W)."""
    *front, H, W = x.shape
    return x.reshape(*front, H // n, n, W // n, n).mean((-3, -1))


def step_tolerance(step):
    """By how much a step may differ from the usual one: a tenth of it, a third of a calendar month. Hours."""
    return step / 3 if 28 * 24 <= step <= 31 * 24 else step / 10


def by(size):
    return " x ".join(f"{n:g}" for n in size)


@dataclass
class Layout:
    """What the frames of a record are, in plain values and arrays."""

    names: list
    attrs: list  # of each variable; units and long_name are text
    dims: tuple = ("y", "x")
    size: tuple = ()  # (H, W)
    coords: dict = field(default_factory=dict)  # {name: {dims, values, attrs}}; without dims: a grid mapping
    calendar: str = "frames"  # of CF, "none": hours without dates, or "frames": numbers of frames
    step_hours: float = math.nan  # the usual step; NaN of a single frame
    named: bool = True  # False: the names are made up, as those of a bare array

    @property
    def dated(self):
        return self.calendar not in UNDATED

    def axis(self, i):
        """The coordinate along y (0) or x (1), one in degrees first; None if there is none."""
        along = [c for c in self.coords.values() if list(c["dims"]) == [self.dims[i]]]
        return min(along, key=lambda c: not is_degrees(c["attrs"]), default=None)

    def is_angle(self, i):
        """Is y a latitude (0), x a longitude (1)?"""
        axis, names = self.axis(i), (("lat", "latitude"), ("lon", "longitude"))[i]
        return axis is not None and (is_degrees(axis["attrs"]) or self.dims[i].lower() in names)

    def wraps(self):
        """True if x is a longitude that goes all the way round."""
        if not self.is_angle(1) or self.size[1] < 4:
            return False
        step = np.diff(np.unwrap(places(self.axis(1)), period=360))
        width = abs(step[0])
        return bool(np.ptp(step) < 0.01 * width and abs(width * (len(step) + 1) - 360) < width / 2)

    def area(self):
        """Area of a cell by row, (H,), where y is a latitude; else None."""
        return np.cos(np.deg2rad(places(self.axis(0)))).clip(0) if self.is_angle(0) else None

    def north_up(self, x):
        """x (..., H, W) with its rows turned round if the y coordinate increases, for pictures."""
        y = None if self.axis(0) is None else self.axis(0)["values"]
        return x if y is None or y[0] >= y[-1] else x[..., ::-1, :]

    def state(self):
        """Plain values and tensors, for a checkpoint."""
        coords = {k: {**c, "values": torch.as_tensor(np.array(c["values"]))} for k, c in self.coords.items()}
        return {**vars(self), "dims": list(self.dims), "size": list(self.size), "coords": coords}

    @classmethod
    def load(cls, state):
        coords = {k: {**c, "values": c["values"].numpy()} for k, c in state["coords"].items()}
        return cls(**{**state, "dims": tuple(state["dims"]), "size": tuple(state["size"]), "coords": coords})

    def match(self, other, what, factor=1, reference="the checkpoint", step=True):
        """Which rows and columns of `other` are this grid's, ((H,), (W,)), None if all are in order.

        other: the Layout of `what`, at 1 / factor of the resolution. Raises InputError, naming what differs:
        step, names, units, calendar, size, coordinates (1/100 cell). What one does not know is not compared.
        """

        def alike(same, theirs, ours, mend):
            require(same, f"{what} has {theirs}; {reference} has {ours}: {mend}")

        if step and "frames" not in (self.calendar, other.calendar):
            differs = abs(other.step_hours - self.step_hours) > step_tolerance(self.step_hours)
            steps = (f"a frame every {duration(layout.step_hours)}" for layout in (other, self))
            alike(not differs, *steps, "resample it")
        both = ",".join(n for n in self.names if n in other.names)
        mend = f"choose --variables={both}" if both else "all must have the same (xarray.merge)"
        named = self.named and other.named
        same = other.names == self.names if named else len(other.names) == len(self.names)
        alike(same, f"variables {', '.join(other.names)}", ", ".join(self.names), mend)
        for name, a, b in zip(self.names, self.attrs, other.attrs):
            if "units" in a and "units" in b:
                same = canonical(a["units"]) == canonical(b["units"])
                alike(same, f"{name} in {b['units']}", a["units"], "convert it first")
        same = not (self.dated and other.dated) or self.calendar == other.calendar
        mend = "convert it, cdo setcalendar or ds.convert_calendar"
        alike(same, f"calendar {other.calendar}", self.calendar, mend)
        mend, size = "select or regrid the same cells", tuple(n / factor for n in self.size)
        alike(tuple(other.size) == size, f"a grid of {by(other.size)}", by(size), mend)
        order = [np.arange(int(n)) for n in other.size]
        pairs = [(self.axis(i), other.axis(i), [i]) for i in (0, 1)]
        pairs += [(c, other.coords.get(k), [0, 1]) for k, c in self.coords.items() if len(c["dims"]) == 2]
        for ours, theirs, axes in pairs:
            if ours is None or theirs is None:
                continue
            angle = is_degrees(ours["attrs"]) or axes == [1] and (self.is_angle(1) or other.is_angle(1))
            period = 360 if angle else None
            a, b = places(ours, period, factor), places(theirs)
            width = cell_width(a) / 100
            if len(axes) == 1 and not (distance(a, b, period) <= width).all():
                order[axes[0]] = distance(a[:, None], b, period).argmin(1)
            same = (distance(a, b[np.ix_(*(order[i] for i in axes))], period) <= width).all()
            name = next(k for k, c in other.coords.items() if c is theirs)
            alike(same, f"{name} {b.flat[0]:g} to {b.flat[-1]:g}", f"{a.flat[0]:g} to {a.flat[-1]:g}", mend)
        return None if all((np.diff(o) == 1).all() for o in order) else tuple(order)


@dataclass
class Piece:
    """A stretch of frames of one source: {name: array-like (n, H, W), or (H, W) of a single frame}, and which
    (rows, columns) of them are read, None for all."""

    arrays: dict
    source: str = ""
    order: tuple = None

    def __len__(self):
        array = next(iter(self.arrays.values()))
        return array.shape[0] if array.ndim == 3 else 1

    def read(self, names, start, stop):
        """Frames [start, stop) of variables, (C, T, H, W) float32."""
        arrays = [self.arrays[n] for n in names]
        x = np.stack([np.asarray(a[start:stop] if a.ndim == 3 else a, np.float32) for a in arrays])
        x = x.reshape(len(names), stop - start, *x.shape[-2:])
        return x if self.order is None else x[..., self.order[0][:, None], self.order[1]]

    def seen_as(self, names, order):
        """The piece with its variables renamed, and rows and columns taken in this order."""
        if order is not None and self.order is not None:
            order = tuple(i[j] for i, j in zip(self.order, order))
        arrays = {names.get(k, k): a for k, a in self.arrays.items()}
        return Piece(arrays, self.source, self.order if order is None else order)


@dataclass(eq=False)
class Record:
    """Frames of C variables on one grid, read piece by piece; large arrays stay on disk."""

    layout: Layout  # its size and step_hours are set here
    pieces: list
    hours: np.ndarray  # (N,) since EPOCH in the calendar
    extras: dict = field(default_factory=dict)  # {name: array-like (H, W), (N,) or (N, H, W)} to be told
    block: int = None  # frames per block of the split
    index: np.ndarray = None  # (N,) where in the pieces a frame lies
    member: np.ndarray = None  # (N,) number of the independent series it belongs to
    notes: list = field(default_factory=list)  # a line each of what was assumed, sorted or left out
    coarsen: int = 1  # frames are means over so many cells square

    def __post_init__(self):
        self.hours, first = np.asarray(self.hours, np.float64), self.pieces[0].arrays
        self.ends = np.cumsum([len(p) for p in self.pieces])
        self.index = np.arange(len(self)) if self.index is None else self.index
        self.member = np.zeros(len(self), int) if self.member is None else self.member
        step = usual_step(np.diff(self.hours)[np.diff(self.member) == 0])
        size = tuple(int(n) // self.coarsen for n in first[self.layout.names[0]].shape[-2:])
        self.layout = replace(self.layout, size=size, step_hours=step)
        more = [k for k in first if k not in self.layout.names and all(k in p.arrays for p in self.pieces)]
        self.extras = {**self.extras, **{k: Told(self, k) for k in more}}

    def __len__(self):
        return len(self.hours)

    def frames(self, start, stop, names=None):
        """Frames [start, stop), (C, T, H, W) float32, physical. NaN, infinities and 9.97e36, netCDF's default
        fill value, are no data."""
        at, parts = self.index[start:stop], []
        piece = np.searchsorted(self.ends, at, "right")
        breaks = 1 + np.flatnonzero((np.diff(at) != 1) | (np.diff(piece) != 0))
        for part in np.split(np.arange(len(at)), breaks):
            p, end = self.pieces[piece[part[0]]], self.ends[piece[part[0]]]
            first = at[part[0]] - end + len(p)
            parts.append(p.read(names or self.layout.names, first, first + len(part)))
        x = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
        x[~(np.abs(x) < 9.9e36)] = np.nan
        return x if self.coarsen == 1 else block_means(x, self.coarsen)

    def gaps(self):
        """(N - 1,) True where frame i + 1 does not follow frame i by the usual step."""
        step = self.layout.step_hours
        usual = np.abs(np.diff(self.hours) - step) <= step_tolerance(step)
        return ~usual | (np.diff(self.member) != 0)

    def coarsened(self, n):
        """The record of its means over n x n cells, NaN where one of them is missing. Raises InputError."""
        (H, W), coords = self.layout.size, {}
        require(H % n == 0 == W % n, f"--coarsen={n} does not divide the grid of {H} x {W}")
        for k, c in self.layout.coords.items():
            longitude = c is self.layout.axis(1) and self.layout.is_angle(1)
            period = 360 if longitude or is_degrees(c["attrs"]) else None
            coords[k] = c | {"values": places(c, period, n)} if c["dims"] else c
        extras = {k: block_means(v, n) if v.ndim == 2 else v for k, v in self.extras.items() if v.ndim < 3}
        return replace(self, layout=replace(self.layout, coords=coords), extras=extras, coarsen=n)

    def extent(self):
        """Number of frames, first and last hour: what the held-out part depends on."""
        return [len(self), *self.hours[[0, -1]].tolist()]

    def fit_to(self, layout, what, factor=1, told=False, reference="the checkpoint"):
        """This record under the names and in the order of rows and columns of another layout, frame numbers
        as hours of its step. told: its variables are not those of the layout, but what a model is told.
        Raises InputError where they differ in more than order (Layout.match)."""
        renamed = replace(self.layout, names=layout.names, attrs=layout.attrs)
        own = self.layout if told else renamed
        order = layout.match(renamed if told else self.layout, what, factor, reference)
        extras = {k: v for k, v in self.extras.items() if not isinstance(v, Told)}
        if order is not None:  # blocks of cells move as a whole
            extras = {k: v[np.ix_(*order)] if v.ndim == 2 else v for k, v in extras.items()}
            order = tuple((i[:, None] * self.coarsen + np.arange(self.coarsen)).ravel() for i in order)
        hours = self.hours
        if factor == 1:
            own = replace(own, dims=layout.dims, coords=layout.coords)
        if own.calendar == "frames" and layout.calendar != "frames":
            hours, own = hours * layout.step_hours, replace(own, calendar="none")
        pieces = [p.seen_as(dict(zip(self.layout.names, own.names)), order) for p in self.pieces]
        record = replace(self, layout=own, pieces=pieces, hours=hours, extras=extras)
        record.extras |= {k: Told(record, k) for k in own.names if told}
        return record


@dataclass
class Told:
    """A field of a record's files that is no variable of it, as an array (N, H, W) read frame by frame."""

    record: Record
    name: str
    ndim = 3

    @property
    def shape(self):
        return (len(self.record), *self.record.layout.size)

    def __getitem__(self, i):
        """Frame i (H, W), or the frames (n, H, W) of a slice."""
        if isinstance(i, slice):
            return self.record.frames(i.start, i.stop, [self.name])[0]
        return self.record.frames(i, i + 1, [self.name])[0, 0]


# ------------------------------------------------------------------------------------------------------------
# reading times

CALENDARS = {"gregorian": "standard", "365_day": "noleap", "366_day": "all_leap", "360": "360_day"}


def texts(values):
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in values]


def decode_times(values, attrs):
    """Times of any kind (n,) as hours since EPOCH (n,) float64 and calendar: datetimes, numbers with CF
    units, dates as texts or numbers (20200131.5). "none": hours without dates; "frames": steps of no known
    length."""
    kind, units = values.dtype.kind, str(attrs.get("units", "")).strip()
    if kind in "Mm":
        ticks = values.astype(f"{kind}8[us]").astype(np.float64) / 3.6e9
        return np.where(np.isnat(values), np.nan, ticks), "standard" if kind == "M" else "none"
    if kind in "SUOT":
        date = r"\s*\d{4}-?\d\d(?!.*[T _:]\d\d.*[+-](?!00))"  # in no other zone than UTC
        dates = all(re.match(date, t) for t in texts(values))
        values = np.array([float(re.sub(r"\D", "", t)[:14]) if dates else math.nan for t in texts(values)])
        units = "as %" if dates else ""
    v = values.astype(np.float64)
    v = np.where(np.abs(v) < 2.0**63, v, np.nan)  # numpy's "not a time" as an integer
    word, *since = re.split(r"\s+since\s+", units.lower(), maxsplit=1)
    unit, calendar = unit_hours(word), str(attrs.get("calendar") or "standard").lower()
    calendar = CALENDARS.get(calendar, calendar)
    if unit and not since:
        return v * unit, "none"
    try:
        hours = hours_since(v, word, unit, since[0], calendar) if since else date_hours(v, units, calendar)
    except (ValueError, TypeError, OverflowError):  # no date, or one that nobody knows
        if unit:
            return v * unit, "none"
        step = usual_step(np.diff(v))
        return v / step if step == step else np.arange(float(len(v))), "frames"
    late = np.nanmin(hours, initial=0) > -3.39e6  # from 1583 on the two are one
    return hours, "standard" if calendar == "proleptic_gregorian" and late else calendar


def unit_hours(word):
    """Hours of a unit of time in CF's words, or None."""
    try:
        return cftime.date2num(cftime.num2date(1, f"{word} since 2000-01-01"), "hours since 2000-01-01")
    except ValueError:
        return None


def hours_since(v, word, unit, reference, calendar):
    """Numbers in units since a date as hours since EPOCH; part of a month is that part of its days."""
    start = cftime.num2date(0, f"hours since {reference}", calendar)
    if unit:
        return v * unit + cftime.date2num(start, EPOCH, calendar)
    months = start.month - 1 + v * {"month": 1, "year": 12}.get(word.removesuffix("s"), math.nan)
    whole = np.arange(math.floor(np.nanmin(months)), math.floor(np.nanmax(months)) + 2)
    dates = [start.replace(year=start.year + m // 12, month=m % 12 + 1) for m in whole.tolist()]
    return np.interp(months, whole, cftime.date2num(dates, EPOCH, calendar))


def date_hours(v, units, calendar):
    """Dates as numbers, 20200131.5 or 2020013112, as hours since EPOCH; ValueError if they are none."""
    known = np.isfinite(v)
    digits = [str(int(x)) for x in v[known]]
    lengths = {len(d) for d in digits}
    if len(lengths) != 1 or not lengths <= ({4, 6, 8, 10, 12, 14} if "as %" in units else {8, 10, 12, 14}):
        raise ValueError(units)
    form, hours = "%Y%m%d%H%M%S"[: min(lengths) - 2], np.full(len(v), np.nan)
    dates = [cftime.datetime.strptime(d, form, calendar) for d in digits]
    hours[known] = cftime.date2num(dates, EPOCH, calendar)
    return hours + (24 * (v % 1) if lengths == {8} else 0)


def duration(hours):
    name, unit = next((u for u in (("days", 24), ("hours", 1)) if hours >= u[1]), ("minutes", 1 / 60))
    return f"{hours / unit:.6g} {name}"


def date_text(hours, layout):
    if not layout.dated or xr is None:
        return f"{'frame' if layout.calendar == 'frames' else 'hour'} {hours:g}"
    return str(cftime.num2date(round(hours * 60) / 60, EPOCH, layout.calendar))[:16]


# ------------------------------------------------------------------------------------------------------------
# reading files: each is an xarray.Dataset that is not read, and gives one Record for each member

MEMORY = 2**30  # bytes of fields held in memory; larger ones are read window by window
KINDS = ("numpy", "netcdf", "zarr")
SUFFIXES = (".nc", ".nc4", ".cdf", ".netcdf", ".h5", ".hdf5", ".he5")
BEGINNINGS = {  # of files, and their kind or why they are not read
    b"\x93NUMPY": "numpy",
    b"CDF": "netcdf",
    b"\x89HDF": "netcdf",
    b"GRIB": "is GRIB: convert it, grib_to_netcdf -o OUT.nc or cdo -f nc copy",
    b"PK": "is a zip archive: unpack it",
    b"\x1f\x8b": "is compressed: gunzip it",
    b"<": "is a web page, not data: download it again",
}
AXES = {  # CF name, names of dimensions, units
    "T": ("time", r"(\w+_)?time(_counter|_utc)?|t|date|datetime|frame|step", r".* since .*"),
    "Y": ("latitude", r"(grid_)?lat(itude)?|[rn]lat|[jy]|nj|yh|south_north", r"degrees?_?n.*"),
    "X": ("longitude", r"(grid_)?lon(gitude)?|[rn]lon|[ix]|ni|xh|west_east", r"degrees?_?e.*"),
}
REFERENCE = "forecast_reference_time"
MEMBERS = rf"(ensemble_)?members?|number|reali[sz]ation|ens(emble)?|batch|sample|{REFERENCE}"
UNNAMED = re.compile(r"(phony_)?dim_\d+$")  # dimensions that nobody has named


def plain(attrs):
    """Attributes as plain values, which a checkpoint can hold."""
    keep = {}
    for k, v in attrs.items():
        v = v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v
        v = str(v) if k in ("units", "long_name") else v
        numbers = isinstance(v, list) and all(isinstance(i, (int, float)) for i in v)
        if (numbers or isinstance(v, (str, int, float))) and not k.startswith("_"):
            keep[k] = v
    return keep


def reason(e):
    if "pickle" in str(e):
        return "it holds Python objects, which could run code: save numbers, texts or dates"
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def numpy_dataset(path, wanted, notes):
    """A .npy, memory-mapped, or .npz as a Dataset: fields (time, y, x), (time, channel, y, x) or of the
    dimensions that an array `dims` names; 1-D arrays named like time, y and x are their coordinates."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        name = "field" if path.stem in RESERVED else path.stem
        arrays = {name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as e:
        raise InputError(f"cannot read {path}: {reason(e)}")
    has = ", ".join(f"{k} {a.dtype} {a.shape}" for k, a in arrays.items())
    dims = texts(np.ravel(arrays.pop("dims", ())))
    fields = {k: a for k, a in arrays.items() if a.ndim in ((max(len(dims), 3),) if dims else (3, 4))}
    shapes = {a.shape for k, a in fields.items() if k in wanted}
    fields = {k: a for k, a in fields.items() if a.shape in shapes} or fields
    require(fields, f"{path} has no numbers (time, y, x) or (time, channel, y, x); it has {has}")
    n, *channels, H, W = next(iter(fields.values())).shape
    if not dims:
        for axis, name, size in ("T", "time", n), ("Y", "y", H), ("X", "x", W):
            fits = [k for k, a in arrays.items() if a.shape == (size,)]
            fits = [k for k in fits if re.fullmatch(AXES[axis][1], k.lower())]
            dims.append([*fits, axis if name in fields else name][0])  # a field may be named x
        if channels and (channels[0] > 4 or W <= 4 < H):
            taken = f"{path} is taken for frames of {channels[0]} channels of {H} x {W}"
            notes.append(f"{taken}; if channels come last, np.moveaxis(a, -1, 1); clips: one file each")
    variables, sizes = {}, {}
    for k, a in fields.items():
        along = dims if a.ndim == len(dims) else [dims[0], f"dim_{a.shape[1]}", *dims[1:]]
        variables[k] = along, a
        sizes |= dict(zip(along, a.shape))
    for k, a in arrays.items():
        along = [d for d in (k, f"dim_{a.size}", "channel", dims[0]) if a.shape == (sizes.get(d),)]
        if along:
            number = a.dtype.kind in "fiu" and along[0] in (dims[0], "time")
            hours = {"units": "hours"} if number and decode_times(a, {})[1] in UNDATED else {}
            variables[along[0] if UNNAMED.match(along[0]) and k != "units" else k] = along[:1], a, hours
        elif a.shape == (H, W):
            variables[k] = dims[-2:], a
    try:
        return xr.Dataset(variables)
    except ValueError:
        raise InputError(f"{path} has fields that differ in shape: choose with --variables; it has {has}")


def open_dataset(path, group=""):
    """A file, or its only group with fields, as a Dataset that is not read; times stay numbers."""
    groups, engine = [], "zarr" if path.is_dir() else "netcdf4"
    options = {"engine": engine, "decode_cf": False, "cache": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if path.is_dir():
                import numcodecs.registry

                numcodecs.registry.codec_registry.pop("pickle", None)  # it would run code from the store
                numcodecs.registry.entries.pop("pickle", None)
            ds = xr.open_dataset(path, group=group or None, **options)
            if not group and not ds.data_vars:
                groups = [node for node in xr.open_datatree(path, **options).subtree if node.data_vars]
        except Exception as e:  # a damaged file, or the backend is not installed
            raise InputError(f"cannot read {path}: {reason(e)} (needs xarray with {engine})")
        if len(groups) > 1:
            names = ", ".join(node.path[1:] for node in groups)
            raise InputError(f"{path} has data in groups {names}: choose one, {path}{groups[0].path}")
        ds = groups[0].to_dataset() if groups else ds
        for v in ds.data_vars.values():  # netCDF's default fill values of whole numbers, if none is declared
            fill = {"i2": -(2**15) + 1, "i4": -(2**31) + 1, "i8": -(2**63) + 2}.get(v.dtype.str[1:])
            declared = {"_FillValue", "missing_value", "scale_factor", "add_offset"} & v.attrs.keys()
            if fill is not None and v.ndim > 2 and not declared:
                v.attrs["_FillValue"] = v.dtype.type(fill)
        return xr.decode_cf(ds, decode_times=False, decode_timedelta=False, decode_coords="all")


def likely_axes(ds):
    """The dimensions that may be time, y and x, {"T", "Y", "X": list}, the likelier first: by CF attributes,
    by name, by units."""
    one, likely = {k: v for k, v in ds.variables.items() if v.ndim == 1}, {}
    for axis, (coordinate, names, units) in AXES.items():
        keys = ds.cf.axes.get(axis, []) + ds.cf.coordinates.get(coordinate, [])
        dims = [one[k].dims[0] for k in keys if k in one]
        dims += [d for d in ds.dims if re.fullmatch(names, d.lower())]
        dims += [v.dims[0] for v in one.values() if re.fullmatch(units, str(v.attrs.get("units")).lower())]
        likely[axis] = list(dict.fromkeys(dims))
    return likely


def axes_of(da, likely, extra):
    """The dimensions (time, y, x) of a variable or None; extra: those that are members or channels."""
    dims, found = [d for d in da.dims if d not in extra], {}
    if len(da.dims) > 2 and all(UNNAMED.match(d) for d in da.dims):
        return da.dims[0], *da.dims[-2:]
    for axis in "TYX":
        found[axis] = next((d for d in likely[axis] if d in dims and d not in found.values()), None)
    rest = [d for d in dims if d not in found.values()]
    for axis in "XY":  # of what is left the last two are y and x
        if found[axis] is None and rest:
            found[axis] = rest.pop()
    return found["T"], found["Y"], found["X"]


def members_of(ds):
    """The dimensions along which a Dataset holds independent records."""
    marked = {d for d in ds.dims if d in ds.coords and ds[d].attrs.get("standard_name") == "realization"}
    return [d for d in ds.dims if d in marked or re.fullmatch(MEMBERS, d.lower())]


def fields_of(ds):
    """{name: DataArray (*members, [time,] y, x)} of what can be used, {name: why not} of other variables."""
    usable, refused, likely, members = {}, {}, likely_axes(ds), members_of(ds)
    named = [d for d in ds.dims if ds[d].dtype.kind in "SUOT"]
    extra = {"expver", *members, *(d for d in named if not any(d in dims for dims in likely.values()))}
    axes = {k: axes_of(ds[k], likely, extra) for k in ds.data_vars}
    timed = any(axes[k][0] and ds[k].ndim > 2 for k in axes)
    for name, (t, y, x) in axes.items():
        da = ds[name]
        da = da.squeeze([d for d in da.dims if ds.sizes[d] == 1 and d not in (t, y, x, "channel")], drop=True)
        front = [d for d in (*members, t) if d in da.dims]
        rest = [d for d in da.dims if d not in (*front, y, x)]
        channels = []
        if len(rest) == 1 and (rest[0] in named or UNNAMED.match(rest[0])):
            channels = [v if rest[0] in named else f"{name}_{v}" for v in texts(ds[rest[0]].values)]
        sizes = f"{name} ({', '.join(f'{d} {n}' for d, n in da.sizes.items())})"
        if da.dtype.kind not in "fiub":
            refused[name] = f"{name} holds {da.dtype}, not numbers"
        elif y is None or x is None:
            refused[name] = f"{sizes} is not on a grid of y and x: interpolate it to one"
        elif t is None and timed:
            refused[name] = f"{sizes} has no dimension of time: ds.rename({da.dims[0]}='time')"
        elif "expver" in rest:
            merged = "ds.sel(expver=1).combine_first(ds.sel(expver=5))"
            refused[name] = f"{sizes} has ERA5 and ERA5T apart: merge them, {merged}"
        elif rest and not channels:
            mend = f"choose with --select={rest[0]}={texts(da[rest[0]].values)[0]}"
            mend += "" if t else f"; if it is time, ds.rename({rest[0]}='time')"
            refused[name] = f"{sizes} has more dimensions than time, y and x: {mend}"
        else:
            found = {c: da.isel({rest[0]: i}, drop=True) for i, c in enumerate(channels)} or {name: da}
            for i, v in enumerate(found.values()):
                if channels and "units" in ds and ds["units"].dims == tuple(rest):
                    v.attrs["units"] = texts(ds["units"].values)[i]
            usable |= {k: v.transpose(*front, y, x) for k, v in found.items()}
    return usable, refused


def times_of(ds, tdim, n):
    """(hours, calendar) of the frames along tdim, or of the one frame if it is None: by its coordinate, else
    by any variable along it that holds dates (WRF's Times, XTIME; valid_time)."""
    fallback = np.arange(n, dtype=np.float64), "frames"
    for k in dict.fromkeys([tdim, "valid_time", "time", *ds.variables]):
        v = ds.variables.get(k)
        if v is None or v.size != n or v.ndim > 2 or not (tdim in v.dims if tdim else v.ndim == 0):
            continue
        hours, calendar = decode_times(np.atleast_1d(v.values).ravel(), v.attrs)
        if calendar not in UNDATED and (k == tdim or len(np.unique(hours)) == n):
            return hours, calendar
        fallback = (hours, calendar) if k == tdim else fallback
    return fallback


def selected(ds, select, notes, path, lacking=None):
    """What `name=value` (the nearest) and `name=low:high`, comma-separated, choose of a Dataset, still
    unread. Times are chosen by dates, longitudes from west to east.

    lacking: None, or a set for a file of a folder. If it holds nothing but undated fields of y and x, as a
    land-sea mask does, it may lack other dimensions, and (path, name) of each is added.
    """
    likely = likely_axes(ds)
    flat = not likely["T"] and all(v.squeeze().ndim <= 2 for v in ds.data_vars.values())
    mask = lacking is not None and flat and times_of(ds, None, 1)[1] in UNDATED
    for text in (t.strip() for t in select.split(",") if t.strip()):
        name, equals, chosen = (part.strip() for part in text.partition("="))
        ends = [end.strip() for end in re.split(r"(?<!T\d\d):|:(?=\d{4}-)", chosen)]  # T12:00 is one time
        horizontal = any(re.fullmatch(AXES[axis][1], name.lower()) for axis in "YX")
        if mask and equals and name not in ds.variables and name not in ds.dims and not horizontal:
            lacking.add((str(path), name))
            continue
        if not equals or name not in ds.dims or len(ends) > 2:
            dims = ", ".join(ds.dims)
            raise InputError(f"{path}: --select={text} is no name=value or name=low:high of {dims}")
        values, n = ds[name].values, ds.sizes[name]
        if not n:  # a file without frames
            continue
        hours, calendar = times_of(ds, name, n) if name in likely["T"] else (None, "none")
        try:
            if calendar not in UNDATED:
                known = np.isfinite(hours)
                order = np.argsort(hours)[: known.sum()]  # missing times come last
                values = np.where(known, cftime.num2date(np.nan_to_num(hours), EPOCH, calendar), None)
                series = xr.DataArray(order, {name: xr.CFTimeIndex(values[order])}, [name])
                at = np.sort(series.sel({name: slice(*ends) if len(ends) == 2 else ends[0]}), axis=None)
            elif values.dtype.kind in "SUOT":
                at = np.flatnonzero(np.array(texts(values)) == ends[0])
            else:
                circle = name in likely["X"] and is_degrees(ds[name].attrs)
                at = near(values.astype(np.float64), [float(e) for e in ends], circle)
        except (KeyError, ValueError, TypeError):  # the last where no time is known
            at = []
        if not len(at):
            kind = NothingSelected if name in likely["T"] else InputError
            raise kind(f"{path}: --select={text} finds nothing: {name} has {values[0]} to {values[-1]}")
        notes.append(f"selected: {name} {values[at[0]]} to {values[at[-1]]}, {len(at)} of {n}")
        ds = ds.isel({name: slice(at[0], at[-1] + 1) if (np.diff(at) == 1).all() else at})
    return ds


def near(values, ends, circle):
    """Which values lie between two ends, or nearest to one; on a circle of 360 degrees from west to east."""
    width = cell_width(values) if len(values) > 1 else 1e-3 * abs(values[0])
    if len(ends) == 1:
        far = distance(values, ends[0], 360 if circle else None)
        return [far.argmin()] if far.min() <= width else []
    low, high = ends if circle else sorted(ends)
    span = high - low + 360 * (high < low) + width / 500  # coordinates may be rounded
    x = values - low + width / 1000
    x = x % 360 if circle else x
    at = np.flatnonzero((x >= 0) & (x <= span))
    return at[np.argsort(x[at])] if circle and values[0] < values[-1] else at


def kind_of(path):
    """One of KINDS, by the first bytes, or why it is not read."""
    if path.is_dir():
        store = any((path / f).exists() for f in ("zarr.json", ".zgroup", ".zmetadata", ".zarray"))
        return "zarr" if store else "is a folder: give its path"
    if path.suffix.lower() in (".npy", ".npz"):
        return "numpy"
    with open(path, "rb") as f:
        start = f.read(8)
    other = "netcdf" if path.suffix.lower() in SUFFIXES else "is none of NetCDF, HDF5, Zarr, .npy and .npz"
    return next((kind for magic, kind in BEGINNINGS.items() if start.startswith(magic)), other)


def coordinates(ds, da, dims, notes):
    """The coordinates on (y, x) of a field, and its grid mapping."""
    coords, mapping = {}, str(da.encoding.get("grid_mapping", "")).split(":")[0].split(" ")[0]
    for name, c in ds.coords.items():
        moving = [d for d in c.dims if d not in dims]  # WRF writes its latitudes again in every frame
        if moving and is_degrees(c.attrs) and {*dims} <= {*c.dims} and c.size:
            c = c.isel({d: 0 for d in moving})
        if name in RESERVED and {*c.dims} & {*dims}:
            notes.append(f"coordinate '{name}' is left out: written samples have that name themselves")
        elif c.dtype.kind in "fiu" and c.ndim and {*c.dims} <= {*dims}:
            c = c.transpose(*dims, missing_dims="ignore")
            coords[name] = {"dims": list(c.dims), "values": c.values, "attrs": plain(c.attrs)}
        elif name == mapping and c.ndim == 0:
            coords[name] = {"dims": [], "values": np.zeros((), np.int32), "attrs": plain(c.attrs)}
    return coords


def choose(path, ds, wanted, bare):
    """The names of the fields that are read, and by name all fields on their grid."""
    usable, refused = fields_of(ds)
    if bare and len(wanted) == len(usable) and not {*wanted} <= usable.keys():
        usable = dict(zip(wanted, usable.values()))  # a bare array takes the names that are given
    names = wanted or list(usable)
    has = f"it has {', '.join(usable) or 'no field of time, y, x'}"
    for v in names:
        require(v not in refused, f"{path}: {refused.get(v)}; {has}")
        if v not in usable:
            raise NoSuchVariable(f"{path}: it has no '{v}'; {has}")
    why = refused[max(refused, key=lambda k: ds[k].ndim)] if refused else "it has no variables"
    require(names, f"{path} has no field of time, y, x: {why}")
    grid = usable[names[0]].sizes
    kinds = ", ".join(f"{n} ({by(usable[n].shape)})" for n in names)
    if any(usable[n].sizes != grid for n in names):
        raise InputError(f"{path} has fields on different grids, {kinds}: choose one grid with --variables")
    return names, {k: f for k, f in usable.items() if f.sizes == grid}


def read_file(path, wanted, group, select, memory, notes, lacking=None):
    """The Records of a file or Zarr store, one a member; fields of more than `memory` bytes stay on disk.
    lacking: see `selected`."""
    kind = kind_of(path)
    require(kind in KINDS, f"{path} {kind}")
    require(xr, f"reading {path} needs xarray: pip install xarray cf_xarray netCDF4 zarr cftime")
    ds = numpy_dataset(path, wanted, notes) if kind == "numpy" else open_dataset(path, group)
    ds = selected(ds, select, notes, path, lacking)
    bare = kind == "numpy" and len(ds.variables) == 1
    names, fields = choose(path, ds, wanted, bare)
    first = fields[names[0]]
    *front, ydim, xdim = first.dims
    members = [d for d in members_of(ds) if d in front]
    tdim = next((d for d in front if d not in members), None)
    hours, calendar = times_of(ds, tdim, first.sizes.get(tdim, 1))
    if calendar == "frames" and not bare and len(hours) > 1:
        notes.append("no times are found that can be read: frames are numbered, and their step is unknown")
    starts = np.zeros([first.sizes[d] for d in members])
    if REFERENCE in members and calendar == "none":  # hours from it
        since, dated = times_of(ds, REFERENCE, first.sizes[REFERENCE])
        if dated not in UNDATED:
            calendar, starts = dated, starts + since.reshape([-1 if d == REFERENCE else 1 for d in members])
    coords = coordinates(ds, first, (ydim, xdim), notes)
    mapping = {"grid_mapping": k for k, c in coords.items() if not c["dims"]}
    attrs = [plain(fields[n].attrs) | mapping for n in names]
    layout = Layout(names, attrs, (ydim, xdim), coords=coords, calendar=calendar, named=not bare)
    extras = {}
    for k, v in ds.variables.items():
        if k not in (*names, tdim) and v.dtype.kind in "fiub" and {*v.dims} in ({tdim}, {ydim, xdim}):
            extras[k] = v.transpose(tdim, ydim, xdim, missing_dims="ignore").values
    held = fields if kind == "numpy" else names if first.size * len(names) * 4 < memory else []
    try:
        fields |= {k: fields[k].values for k in held}
    except Exception as e:
        raise InputError(f"cannot read {path}: its data are damaged ({type(e).__name__})")
    records = []
    for m, start in np.ndenumerate(starts):
        piece = Piece({k: f[m] for k, f in fields.items()}, str(path))
        records.append(Record(layout, [piece], hours + start, extras))
    if members:
        notes.append(f"the {len(records)} members along {', '.join(members)} are records of their own")
    return records


def check_lacking(lacking, records, nothing, notes):
    """Refuse what --select asks of a folder if all that could be read of it are masks that lack it."""
    for name in dict.fromkeys(name for _, name in lacking):
        without = {path for path, n in lacking if n == name}
        if without.issuperset(r[0].pieces[0].source for r in records):
            what = f"--select={name}=...: no file of the folder has a dimension {name}"
            raise next(iter(nothing.values()), InputError(what))
        notes.append(f"no {name} in {', '.join(sorted(without))}: --select={name}=... leaves it as it is")


def read_files(files, wanted, select, notes):
    """The Records of each file that has frames: of the variables that are wanted or, where it has none of
    these, of all it has, as what a model is told may lie in a file of its own."""
    records, nothing, why, lacking = [], {}, [], set()

    def read(p, names, notes):
        return read_file(p, names, "", select, MEMORY / len(files), notes, lacking)

    for p in files:
        try:
            records.append(read(p, wanted, notes))
        except NothingSelected as e:
            nothing[p.name] = e
        except InputError as e:
            if not wanted:
                raise
            has = read(p, [], [])
            some = [v for v in wanted if v in has[0].layout.names]
            records.append(read(p, some, notes) if some else has)
            if not isinstance(e, NoSuchVariable):  # it has what is wanted, but not as it could be read
                why.append(e)
    found = {v for r in records for v in r[0].layout.names}
    if why and not found.issuperset(wanted):
        raise why[0]
    empty = [Path(r[0].pieces[0].source).name for r in records if not len(r[0])]
    if empty:
        notes.append(f"files without frames are left out: {', '.join(empty[:5])}")
    records = [r for r in records if len(r[0])]
    check_lacking(lacking, records, nothing, notes)
    if nothing and not records:
        raise next(iter(nothing.values()))
    if nothing:
        names = ", ".join([*nothing][:5])
        notes.append(f"files with nothing of --select are left out, {len(nothing)} of {len(files)}: {names}")
    return records


def read_folder(path, wanted, select, notes):
    """The Records of the files and Zarr stores of a folder in order of their names, a list for each. A file
    with a single frame of other variables than the rest holds fields that stand still, as a land-sea mask:
    they become extras of the first record."""
    kinds = {p: kind_of(p) for p in sorted(path.iterdir()) if not p.name.startswith(".")}
    files = [p for p, kind in kinds.items() if kind in KINDS]
    others = [f"{p.name} {kind}" for p, kind in kinds.items() if kind not in KINDS]
    require(files, f"folder {path} holds nothing to read: {[*others, 'it is empty'][0]}")
    if others:
        notes.append(f"{len(others)} entries of the folder are not read: {others[0]}")
    twice = [p for p in files if p.suffix == ".npz" and p.with_suffix(".nc") in files]
    if twice:  # as sample.py writes them
        notes.append(f"{twice[0].name} is left out, {twice[0].stem}.nc is read")
        files = [p for p in files if p not in twice]
    records = read_files(files, wanted, select, notes)
    names = wanted or [v for r in records if len(r[0]) > 1 for v in r[0].layout.names]
    single = [r[0] for r in records if len(r) == len(r[0]) == 1 and r[0].layout.named]
    still = [r for r in single if names and {*r.layout.names}.isdisjoint(names)]
    records = [r for r in records if r[0] not in still]
    found = {v: None for r in records for v in r[0].layout.names}
    lacking = [v for v in wanted if v not in found and all(r[0].layout.named for r in records)]
    has = f"they have {', '.join(found)}" if found else "each holds a field that stands still"
    require(not lacking or not (records or still), f"no file of {path} has {', '.join(lacking)}; {has}")
    for r in still:
        source, names = r.pieces[0].source, r.layout.names
        first = records[0][0]
        r = r.fit_to(first.layout, source, told=True, reference=first.pieces[0].source)
        first.extras |= {k: r.frames(0, 1, [k])[0, 0] for k in names}
        which = f"{source} is one frame of {', '.join(names)}, which stands still"
        notes.append(f"{which}: --condition may name it")
    return records


def numbered(files, notes):
    """[(number, Record)] of the Records of each file: those of one number make one series. A file of the very
    times of another is a further member; so are files without dates that begin alike."""
    first, parts, seen = files[0][0], [], {}
    alone = not first.layout.dated and len({records[0].hours[0] for records in files}) == 1
    if alone and len(files) > 1 and all(len(records[0]) == 1 for records in files):
        raise InputError("files of one frame and no time have no order: np.concatenate them into one")
    for records in files:
        record = records[0]
        twins = seen.setdefault("alone" if alone else record.hours.round(6).tobytes(), [])
        copied = [t.pieces[0].source for t in twins if not alone and same_frames(t, record)]
        if copied:
            notes.append(f"{record.pieces[0].source} repeats {copied[0]} and is left out")
            continue
        number = len(twins) if alone or len(record) > 1 else 0
        twins.append(record)
        parts += [((number, m), r) for m, r in enumerate(records)]
    if any(number > 0 for (number, _), _ in parts):
        notes.append("files of the same times are members of an ensemble, records of their own")
    return parts


def same_frames(a, b):
    """Whether records of the same times have the same values, as far as ten frames tell."""
    pairs = ((r.frames(i, i + 1) for r in (a, b)) for i in thin(np.arange(len(a)), 10))
    return all(np.array_equal(*pair, equal_nan=True) for pair in pairs)


def join(parts, notes):
    """One Record of [(number, Record)]: one series after the other, each in order of time and each time once.
    Raises InputError where two frames of one time differ, or two grids."""
    numbers, records = zip(*parts)
    first, reference = records[0], records[0].pieces[0].source
    for r in records:
        source = r.pieces[0].source
        order = first.layout.match(r.layout, source, 1, reference, step=False)
        if r.layout.dated != first.layout.dated:
            which = source if first.layout.dated else reference
            raise InputError(f"{which} has no dates, and other files of the folder have")
        if order is not None:
            notes.append(f"{source} has its rows or columns in another order than {reference}: reordered")
        r.pieces = [p.seen_as(dict(zip(r.layout.names, first.layout.names)), order) for p in r.pieces]
    series = np.unique(numbers, axis=0, return_inverse=True)[1].ravel()
    member = np.repeat(series, [len(r) for r in records])
    hours, pieces = np.concatenate([r.hours for r in records]), [p for r in records for p in r.pieces]
    whole, order = Record(first.layout, pieces, hours), np.lexsort((hours, member))
    order = order[np.isfinite(hours[order])]
    if len(order) < len(hours):
        notes.append(f"{len(hours) - len(order)} frames without a time are left out")
    twice = 1 + np.flatnonzero((np.diff(hours[order]) < 1e-6) & (np.diff(member[order]) == 0))
    for i in thin(twice, 100):
        a, b = (whole.frames(k, k + 1) for k in order[[i - 1, i]])
        if not np.array_equal(a, b, equal_nan=True):
            sources = (pieces[k].source for k in np.searchsorted(whole.ends, order[[i - 1, i]], "right"))
            when = f"two different frames of {date_text(hours[order[i]], first.layout)}"
            raise InputError(f"{' and '.join(dict.fromkeys(sources))}: {when}: remove one of them")
    if len(twice):
        notes.append(f"{len(twice)} frames that repeat others are left out")
    index = np.delete(order, twice)
    moved = int((index != index[np.lexsort((index, member[index]))]).sum())
    if moved:
        notes.append(f"{moved} frames were not in order of time and are sorted")
    extras = {k: a for k, a in first.extras.items() if a.ndim == 2}
    for k, a in first.extras.items():
        if a.ndim == 1 and all(k in r.extras for r in records):
            extras[k] = np.concatenate([r.extras[k] for r in records])[index]
    return Record(first.layout, pieces, hours[index], extras, None, index, member[index], notes)


def by_variables(files):
    """The Records of files in groups of the same variables; one group if a variable would be in two."""
    groups = {}
    for records in files:
        groups.setdefault(tuple(records[0].layout.names), []).append(records)
    names = [name for group in groups for name in group]
    apart = len(names) == len({*names}) and all(records[0].layout.named for records in files)
    return [*groups.values()] if apart else [files]


def merged(records, wanted):
    """One Record of Records that hold different variables: of the frames that all of those wanted have (all,
    if none is named). Others that cover these frames may be told. Raises InputError where those wanted differ
    in grid, step or calendar, or have no frame in common."""

    def asked(r):
        return not wanted or not {*wanted}.isdisjoint(r.layout.names)

    def times(r):
        return [*zip(r.member.tolist(), r.hours.round(6).tolist())]

    first, *others = sorted(records, key=lambda r: not asked(r))
    parts, common, notes, reference = [first], {*times(first)}, [*first.notes], first.pieces[0].source
    for r in others:
        source = r.pieces[0].source
        lost = common.difference(times(r))
        try:
            require(r.layout.dated == first.layout.dated, f"only one of {source} and {reference} has dates")
            enough = len(lost) < len(common) if asked(r) else not lost
            require(enough, f"{source} has other times than {reference}: select or resample them")
            parts.append(r.fit_to(first.layout, source, told=True, reference=reference))
        except InputError as e:
            if asked(r):
                raise
            notes.append(f"left out: {e}")
            continue
        common -= lost
    arrays, attrs, extras = {}, {}, {}
    for r in parts:
        at = np.array([i for i, k in enumerate(times(r)) if k in common])
        part = replace(r, index=r.index[at], hours=r.hours[at], member=r.member[at])
        moving = [k for k, v in r.extras.items() if isinstance(v, Told)]
        arrays |= {k: Told(part, k) for k in (*r.layout.names, *moving)}
        attrs |= dict(zip(r.layout.names, r.layout.attrs))
        extras |= {k: v[at] if v.ndim == 1 else v for k, v in r.extras.items() if v.ndim < 3}
    names = wanted or [*attrs]
    layout = replace(first.layout, names=names, attrs=[attrs[n] for n in names])
    counts = ", ".join(f"{len(r)} of {' and '.join(r.layout.names)}" for r in parts)
    notes.append(f"variables lie in files of their own, frames: {counts}; {len(common)} are those of all")
    return Record(layout, [Piece(arrays, reference)], part.hours, extras, member=part.member, notes=notes)


def open_record(dataset, variables="", size=32, seed=0, select=""):
    """The Record of `climate`, `gaussian` (size, seed), or a path: .npy, .npz, NetCDF, HDF5, Zarr, a group of
    those (FILE/GROUP), or a folder of them.

    variables: names, comma-separated; select: "level=850,latitude=35:70,time=2000:2010", the part that is
    read (see selected). Raises InputError.
    """
    if dataset in ("climate", "gaussian"):
        require(not select, f"--select={select} is for files, and {dataset} is made here: choose its --size")
        return builtin(dataset, size, seed)
    path, group, notes = Path(dataset).expanduser(), "", []
    wanted = [*dict.fromkeys(v.strip() for v in variables.split(",") if v.strip())]
    while not path.exists() and path != path.parent:
        path, group = path.parent, f"{path.name}/{group}".strip("/")
    if group and path.is_dir():
        raise InputError(f"dataset '{dataset}' is neither climate, gaussian nor an existing file or folder")
    if path.is_dir() and kind_of(path) not in KINDS:
        files = read_folder(path, wanted, select, notes)
    else:
        files = [read_file(path, wanted, group, select, MEMORY, notes)]
    if not files or not np.isfinite(np.concatenate([records[0].hours for records in files])).any():
        raise InputError(f"{path} holds no frames")
    notes = [*dict.fromkeys(notes)]  # the same of many files once
    parts = [join(numbered(group, notes), notes) for group in by_variables(files)]
    record = merged(parts, wanted) if len(parts) > 1 else parts[0]
    for name in (*record.layout.names, *record.layout.dims):
        legal = re.fullmatch(r"\w([^/\x00-\x1f\x7f]{0,98}[^/\s])?", name)
        taken = name in RESERVED or (name in record.layout.coords and name not in record.layout.dims)
        if not legal or taken:
            why = "NetCDF has no such names" if not legal else "written samples have that name themselves"
            raise InputError(f"{path} has a variable or dimension '{name[:99]}', and {why}: rename it")
    gaps = record.gaps()
    within = gaps & (np.diff(record.member) == 0)
    if within.any():
        alone = int((np.append(True, gaps) & np.append(gaps, True)).sum())
        usual = f"{int(within.sum())} steps are not the usual one of {duration(record.layout.step_hours)}"
        record.notes.append(f"{usual}: no clip crosses them; {alone} of {len(record)} frames stand alone")
    return record


# ------------------------------------------------------------------------------------------------------------
# windows and batches


def runs(record, frames):
    """Starts of all clips of consecutive frames: none crosses a gap."""
    crossed = np.concatenate([[0], np.cumsum(record.gaps())])  # gaps before each frame
    starts = np.arange(max(len(record) - frames + 1, 0))
    return starts[crossed[starts + frames - 1] == crossed[starts]]


def split_windows(record, frames, length=None):
    """Starts of all clips of consecutive frames, (train, test): every fifth block is test data, no clip is in
    both. frames: of the clips trained on, which set the size of a block; length: of the clips wanted, if
    another. Raises InputError where either part has none."""
    N, length = len(record), length or frames
    if N < 2 * frames:
        raise InputError(f"the dataset has {N} frames; clips of --frames={frames} need at least {2 * frames}")
    block = record.block or max(N // min(max(N // (3 * frames), 5), 50), frames)
    blocks = N // block
    number = np.minimum(np.arange(N) // block, blocks - 1)
    held_out = number % 5 == 4 if blocks >= 5 else number == blocks - 1
    starts = runs(record, length)
    before = np.concatenate([[0], np.cumsum(held_out)])  # held-out frames before each
    inside = before[starts + length] - before[starts]
    train, test = starts[inside == 0], starts[inside == length]
    if not len(train) or not len(test):
        part = "training" if not len(train) else "test"
        mend = "take fewer --frames" if length == frames else "take a shorter --length"
        why = f"{int(record.gaps().sum())} gaps in time and blocks of {block} frames: {mend}"
        raise InputError(f"the {part} data have no {length} consecutive frames, with {why}")
    return train, test


def covered_frames(starts, frames):
    """The frames that a set of clips touches, sorted."""
    return np.unique(starts[:, None] + np.arange(frames))


def apart(starts, frames):
    """The clips among these that do not overlap, first come first taken: for statistics, not for training."""
    chosen = []
    for s in starts:
        if not chosen or s >= chosen[-1] + frames:
            chosen.append(s)
    return np.array(chosen)


def thin(index, count):
    """At most so many of an index, in order: one at random of each of as many equal stretches, for a fixed
    stride would see a daily cycle at the same hours only."""
    if len(index) <= count:
        return index
    place = (np.arange(count) + np.random.default_rng(0).random(count)) / count
    return index[(place * len(index)).astype(int)]


def read_clips(record, starts, frames):
    """Physical clips at the given starts, (B, C, T, H, W) float32 with NaN."""
    return np.stack([record.frames(s, s + frames) for s in starts])


def windows(length, frames, overlap, known=(), reverse=False):
    """The clips that cover a sequence in turn: [(frame numbers (frames,), which to keep (frames,))].

    Each begins with `overlap` frames kept from the one before and draws the rest, what that drew beyond them
    again: so the last one sees both of its ends. known: frame numbers given from the start; a clip that does
    not reach the next of them is kept up to the last it sees. reverse: from the end back.
    """
    frames = min(frames, length)
    known = sorted(length - 1 - k for k in known) if reverse else known
    starts = [0]
    while starts[-1] + frames < length:
        start, end = starts[-1], starts[-1] + frames
        seen = [k for k in known if start + overlap <= k < end]
        keep_to = seen[-1] + 1 if seen and known[-1] >= end else end
        starts.append(min(keep_to - overlap, length - frames))
    kept = [after - start + overlap for start, after in zip(starts, starts[1:])] + [frames]
    plan = [(s + np.arange(frames), np.arange(frames) < n) for s, n in zip(starts, kept)]
    return [(length - 1 - w[::-1], k[::-1].copy()) for w, k in plan] if reverse else plan


# ------------------------------------------------------------------------------------------------------------
# conditions: what else a model may be told

DAYS = {"360_day": 360, "noleap": 365, "all_leap": 366}  # others 365.2425


@dataclass
class Conditions:
    """What a model is told of its clips: `hour`, `day` (of the year), and static fields (H, W), series (N,)
    and fields in time (N, H, W) of a record's extras. Numbers are standardised; a series of at most 16 whole
    numbers is taken for classes, one channel each."""

    fitted: list  # of dicts: name and channels, with either period (hours), classes, or mean and std

    @classmethod
    def fit(cls, record, names, index):
        """Fitted on the frames in index. Raises InputError for a name that the record does not have."""
        fitted, periods = [], {"hour": 24.0, "day": 24.0 * DAYS.get(record.layout.calendar, 365.2425)}
        for name in names:
            if name in periods and not record.layout.dated:
                raise InputError(f"--condition={name} needs times with a calendar, and there are none")
            if name in periods:
                fitted.append({"name": name, "channels": 2, "period": periods[name]})
                continue
            if name not in record.extras:
                raise InputError(f"--condition={name} is not one of {', '.join([*periods, *record.extras])}")
            v = record.extras[name]
            if v.ndim != 2:
                v = np.stack([v[i] for i in (index if v.ndim == 1 else thin(index, LEAST_FRAMES))])
            classes = np.unique(v).tolist() if v.ndim == 1 and v.dtype.kind in "iub" else []
            if 2 <= len(classes) <= 16:
                fitted.append({"name": name, "channels": len(classes), "classes": classes})
            else:
                mean, std = float(np.nanmean(v)), float(np.nanstd(v)) or 1.0
                if missing := np.isnan(v).mean():
                    record.notes.append(f"{name}: {100 * missing:.3g} % are missing, and told as its mean")
                fitted.append({"name": name, "channels": 1, "mean": mean, "std": std})
        return cls(fitted)

    def state(self):
        return self.fitted

    @property
    def channels(self):
        """Of `values`: "told" and those of each condition; 0 if there are none."""
        return 1 + sum(f["channels"] for f in self.fitted) if self.fitted else 0

    def values(self, record, index, hours=None, size=None):
        """Channels (B, 1 + K, T, H, W) of the conditions at frames index (B, T); the first is 1, "told".

        hours (B, T) where they run past the record, whose series then keep their last value; size: (H, W) if
        not the record's. Raises InputError where these data cannot tell it.
        """
        hours, size = record.hours[index] if hours is None else hours, tuple(size or record.layout.size)
        index = np.minimum(index, len(record) - 1)
        channels = [np.ones((1, 1, 1, 1))]  # each broadcasts to (B, T, H, W)
        for f in self.fitted:
            if "period" in f and not record.layout.dated:
                raise InputError("the model is told the hour or the day, and these data have no dates")
            if "period" in f:
                angle = 2 * np.pi * (hours / f["period"] % 1)[..., None, None]
                channels += [np.sin(angle), np.cos(angle)]
                continue
            has = ", ".join(record.extras) or "nothing of the kind"
            require(f["name"] in record.extras, f"the model is told '{f['name']}', and these data have {has}")
            v = record.extras[f["name"]]
            if v.ndim > 1 and tuple(v.shape[-2:]) != size:
                raise InputError(f"'{f['name']}' has a grid of {by(v.shape[-2:])}; {by(size)} is needed")
            if v.ndim != 2:
                v = np.array([[v[i] for i in clip] for clip in index])  # (B, T) or (B, T, H, W)
                v = v[..., None, None] if v.ndim == 2 else v
            if "classes" in f:
                channels += [v == k for k in f["classes"]]
            else:
                channels.append(np.nan_to_num((np.asarray(v, np.float32) - f["mean"]) / f["std"]))
        channels = [np.broadcast_to(v, (*index.shape, *size)) for v in channels]
        return torch.from_numpy(np.stack(channels, 1).astype(np.float32))


# ------------------------------------------------------------------------------------------------------------
# transforms: per variable, y = (g(x) - mean) / std, all exactly invertible

GAP = 0.25  # of `censored`, else 0: its dry value lies so far below the lightest rain, in Gaussian scores
TANH_UNITS, LEAST_SLOPE, LEARNT_STEPS = 32, 0.1, 300  # of `learnt`: tanh units, least gradient, steps of Adam


def normal_cdf(y):
    return torch.special.ndtr(torch.as_tensor(y, dtype=torch.float64)).numpy()


FORMULAS = {  # (y of x, x of y), also of negative x; s is the median of |x| > 0
    "none": (lambda x, s: x, lambda y, s: y),
    "sqrt": (lambda x, s: np.sign(x) * np.sqrt(np.abs(x)), lambda y, s: y * np.abs(y)),
    "cbrt": (lambda x, s: np.cbrt(x), lambda y, s: y**3),
    "log": (lambda x, s: np.sign(x) * np.log1p(abs(x) / s), lambda y, s: np.sign(y) * np.expm1(abs(y)) * s),
}


def fit_quantile(x, floor, gap=0.0):
    """Gaussian scores: a monotone table of y = Phi^-1(share of training values up to x), linear between its
    knots.

    Knots are even in y as far as 20 training values lie beyond them; then come the extremes, then a straight
    line with the slope of the last unit of y. An atom at the floor is one value, `gap` below the score at
    which the rest begins. Returns knots (2, K) and the score of the floor, None without one.
    """
    if gap and floor is None:
        raise InputError("transform 'censored' needs an atom at the minimum (dry cells): use quantile")
    n, rest = len(x), x if floor is None else x[x > floor]
    share = len(rest) / n
    tail = max(min(20 / n, 0.05 * share), 0.7 / n)
    ends = [tail if floor is None else 1 - share, 1 - tail, 1 - 0.5 / n]
    edge, last, end = torch.special.ndtri(torch.tensor(ends, dtype=torch.float64)).numpy()
    Y = np.concatenate([[-end] if floor is None else [], np.linspace(edge, last, 257), [end]])
    X = np.quantile(rest, np.clip((normal_cdf(Y) - 1 + share) / share, 0, 1))
    X[[0, -1]] = x.min(), x.max()
    X, tied = np.unique(X, return_inverse=True)
    Y = np.bincount(tied, Y) / np.bincount(tied)
    slope = X[-1] - np.interp(Y[-1] - 1, Y, X), np.interp(Y[0] + 1, Y, X) - X[0]
    X, Y = np.append(X, X[-1] + 1e3 * slope[0]), np.append(Y, Y[-1] + 1e3)
    if floor is None:
        X, Y = np.append(X[0] - 1e3 * slope[1], X), np.append(Y[0] - 1e3, Y)
    return np.stack([X, Y]), None if floor is None else float(edge - gap)


def fit_learnt(x, floor):
    """A network of one number, a sum of increasing tanh units, tabulated: it maximises the mean log slope at
    unit variance, the change-of-variables term, whose best y is normal. An atom at the floor has no slope."""
    rest, shift, scale = x if floor is None else x[x > floor], np.median(x), x.std()
    X = np.append(x.min(), np.quantile(rest, (np.arange(1000) + 0.5) / 1000))  # the atom first
    share = torch.full(X.shape, len(rest) / len(x) / 1000, dtype=torch.float64)
    share[0] = 1 - len(rest) / len(x)
    centre = (np.quantile(rest, (np.arange(TANH_UNITS) + 0.5) / TANH_UNITS) - shift) / scale
    steep, height = -np.log(np.maximum(np.gradient(centre), 1e-3)), np.full(TANH_UNITS, -4.0)
    weights = [torch.tensor(w, requires_grad=True) for w in (centre, steep, height)]

    def increasing(x):
        """y (K,) and dy/du (K,)"""
        u = torch.from_numpy((x - shift) / scale)
        t = torch.tanh((u[:, None] - weights[0]) * weights[1].exp())  # (K, units)
        y = LEAST_SLOPE * u + t @ weights[2].exp()
        return y, LEAST_SLOPE + (1 - t**2) @ (weights[1] + weights[2]).exp()

    with torch.enable_grad():
        optimizer = torch.optim.Adam(weights, 0.03)
        for _ in range(LEARNT_STEPS):
            optimizer.zero_grad()
            y, slope = increasing(X)
            variance = share @ (y - share @ y) ** 2
            (share[1:] @ (variance.log() / 2 - slope[1:].log())).backward()
            optimizer.step()
    far = x.min() + np.ptp(x) * np.concatenate([[-1e3], np.linspace(-0.5, 1.5, 257), [1e3]])
    X = np.unique(np.append(X, far))
    X = X[np.append(True, np.diff(X) > 1e-9 * np.ptp(x))]  # closer knots have no slope in float64
    return np.stack([X, increasing(X)[0].detach().numpy()]), None


TABLES = {"quantile": fit_quantile, "censored": partial(fit_quantile, gap=GAP), "learnt": fit_learnt}
TRANSFORMS = (*FORMULAS, *TABLES)


def find_floor(x):
    """(floor or None, rounding): the value that over 5 % of x (n,) have and none lies below; of rain it is 0,
    up to rounding: packed zeros are 1e-19 and differences of sums -1e-9. Up to `rounding` above it, a value
    is the floor."""
    rounding, low = 1e-6 * float(x.std()), float(x.min())
    if -1000 * rounding <= low <= rounding and np.mean(np.abs(x) <= rounding) > 0.05:
        return 0.0, rounding
    return (low, rounding) if np.mean(x <= low + rounding) > 0.05 else (None, rounding)


@dataclass
class Variable:
    """One variable and its transform: physical arrays of any shape <-> float64 of mean 0 and variance 1 in
    training."""

    name: str
    units: str
    long_name: str
    transform: str
    floor: float = None  # what no value lies below and many have
    rounding: float = 0.0  # up to this above it a value is the floor
    dry: float = 0.0  # up to this above it a value counts as dry; 0 without a floor
    scale: float = 1.0  # of FORMULAS
    knots: torch.Tensor = None  # (2, K), of TABLES
    dry_score: float = None  # y of the floor in them
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0  # lowest and highest standardised training value
    high: float = 0.0
    summary: str = ""  # what was found, one line

    @classmethod
    def fit(cls, name, attrs, transform, x):
        """From training values x (n,) with NaN. Raises InputError where there is nothing to learn."""
        missing, x = np.isnan(x).mean(), x[~np.isnan(x)].astype(np.float64)
        require(len(x), f"variable '{name}' has no data in the training clips")
        require(x.min() < x.max(), f"variable '{name}' is constant ({x[0]:g}) in the training clips")
        floor, rounding = find_floor(x)
        if transform == "auto":
            transform = "cbrt" if floor == 0 else "none"
        v = cls(name, attrs.get("units", ""), attrs.get("long_name", name), transform, floor, rounding)
        span, bottom = f"{x.min():.4g} to {x.max():.4g} {v.units}".strip(), "no floor"
        doubts, ends = "", (x.min(), x.max())
        rest = x[(x > ends[0]) & (x < ends[1])]
        for end in ends if len(rest) else ():  # weather does not repeat a value so far from all others
            count = int((x == end).sum())
            if count > 1 and abs(end - rest.mean()) > 10 * rest.std() > 0:
                doubts += f"; WARNING: {end:g}, {count} times, far from others: set _FillValue if no data"
        x = v.snapped(x)
        if floor is not None:
            v.dry = 10.0 ** round(math.log10((x.mean() - floor) / 10))
            bottom = f"floor {floor:g} ({100 * np.mean(x == floor):.3g} % of values)"
        v.scale = float(np.median(np.abs(x[x != 0])))
        v.summary = f"{name}: {span}, transform {transform}, {bottom}, {100 * missing:.3g} % missing{doubts}"
        if transform in TABLES:
            knots, v.dry_score = TABLES[transform](x, floor)
            v.knots = torch.from_numpy(knots)
        y = v.forward(x)
        v.mean, v.std = float(y.mean()), float(y.std())
        v.low, v.high = float((y.min() - v.mean) / v.std), float((y.max() - v.mean) / v.std)
        return v

    def snapped(self, x):
        return x if self.floor is None else np.where(x <= self.floor + self.rounding, self.floor, x)

    def forward(self, x):
        """The transform, not standardised."""
        if self.knots is None:
            return FORMULAS[self.transform][0](x, self.scale)
        y = np.interp(x, *self.knots.numpy())
        return y if self.dry_score is None else np.where(x <= self.floor, self.dry_score, y)

    def encode(self, x):
        return (self.forward(self.snapped(np.asarray(x, np.float64))) - self.mean) / self.std

    def decode(self, y):
        """The inverse, never below the floor."""
        y = np.asarray(y, np.float64) * self.std + self.mean
        if self.knots is None:
            x = FORMULAS[self.transform][1](y, self.scale)
        else:
            x = np.interp(y, *self.knots.numpy()[::-1])  # below the first knot, the floor, all is dry
        return x if self.floor is None else np.maximum(x, self.floor)

    def slope(self, x):
        """dy/dx of encode, by a central difference."""
        x, h = np.asarray(x, np.float64), 1e-6 * self.scale
        return (self.encode(x + h) - self.encode(x - h)) / (2 * h)


SAMPLE = 4_000_000  # values of each variable that a transform is fitted on
LEAST_FRAMES = 200  # that they come from at least, for a few frames of a large grid are a few days' weather


def sample_values(record, index):
    """Values of each variable, (C, n) float32: whole frames, or random parts of many large ones."""
    cells = math.prod(record.layout.size)
    index = thin(index, max(LEAST_FRAMES, SAMPLE // cells))
    share, rng = min(cells, SAMPLE // len(index)), np.random.default_rng(0)
    parts = []
    for i in index:
        x = record.frames(i, i + 1).reshape(-1, cells)  # (C, H W)
        parts.append(x if share == cells else x[:, rng.choice(cells, share, replace=False, shuffle=False)])
    return np.concatenate(parts, 1)


def valid_cells(record, starts, frames):
    """Where a cell ever has data in these clips, (C, 1, H, W) float32, and whether no value is missing; of a
    record beyond 1 GiB some frames are looked at."""
    size = len(record.layout.names) * math.prod(record.layout.size)
    ever, complete = False, True
    for i in thin(covered_frames(starts, frames), max(1, 2**28 // size)):
        finite = np.isfinite(record.frames(i, i + 1))
        ever, complete = ever | finite, complete and bool(finite.all())
    return ever.astype(np.float32), complete


@dataclass
class Codec:
    """Physical clips <-> standardised ones."""

    span = 1  # physical frames for each that is denoised; more in model.LatentCodec

    variables: list
    valid: torch.Tensor  # (C, 1, H, W), 1 where a cell ever has data
    complete: bool  # whether no value is missing in training

    @classmethod
    def fit(cls, record, starts, frames, names):
        """Fitted on the training clips alone. names: of TRANSFORMS, one for all variables or one each,
        comma-separated; 'auto' is cbrt for a variable with floor 0, else none. Raises InputError."""
        layout, names = record.layout, [n.strip() for n in names.split(",")]
        names = names * len(layout.names) if len(names) == 1 else names
        if len(names) != len(layout.names):
            each = f"{len(layout.names)} variables ({', '.join(layout.names)})"
            raise InputError(f"--transform names {len(names)} transforms for {each}: give one, or one each")
        sample = sample_values(record, covered_frames(starts, frames))
        variables = [Variable.fit(*of) for of in zip(layout.names, layout.attrs, names, sample)]
        valid, complete = valid_cells(record, starts, frames)
        return cls(variables, torch.from_numpy(valid), complete)

    def encode(self, x):
        """Physical numpy (..., C, T, H, W) -> standardised torch float32; NaN stays."""
        y = np.stack([v.encode(x[..., i, :, :, :]) for i, v in enumerate(self.variables)], -4)
        return torch.from_numpy(y.astype(np.float32))

    def decode(self, y, valid=False):
        """The inverse, torch -> physical numpy float32; valid: NaN in cells that never have data."""
        y = y.detach().cpu().numpy()
        x = np.stack([v.decode(y[..., i, :, :, :]) for i, v in enumerate(self.variables)], -4)
        x = x.astype(np.float32)
        return np.where(self.valid.numpy() > 0, x, np.float32(np.nan)) if valid else x

    def log_slope(self, x):
        """The change of variables: log |dy/dx| summed over each physical clip (B, C, T, H, W), (B,) float64;
        None where a variable has a floor: rain has an atom at 0 and so no density in its own units."""
        if any(v.floor is not None for v in self.variables):
            return None
        parts = [np.log(v.slope(x[:, i])) for i, v in enumerate(self.variables)]  # (C, B, T, H, W)
        return torch.from_numpy(np.sum(parts, axis=(0, 2, 3, 4), where=np.isfinite(x).swapaxes(0, 1)))

    @property
    def low(self):
        """The standardised lowest value of each variable, (C, 1, 1, 1)."""
        return torch.tensor([v.low for v in self.variables]).view(-1, 1, 1, 1)

    def limits(self):
        """Lowest and highest standardised value of all variables."""
        return min(v.low for v in self.variables), max(v.high for v in self.variables)

    def state(self):
        """Plain values and tensors, for a checkpoint."""
        return {**vars(self), "variables": [vars(v) for v in self.variables]}

    @classmethod
    def load(cls, state):
        return cls([Variable(**v) for v in state["variables"]], state["valid"], state["complete"])


def describe(record, codec, train_starts, test_starts, frames):
    """What was understood of the data, a few lines; record.notes says what reading did to it."""
    layout, axes = record.layout, []
    for i, d in enumerate(layout.dims):
        c = layout.axis(i)
        ends = "" if c is None else "{:g} to {:g} ".format(*places(c)[[0, -1]]) + c["attrs"].get("units", "")
        axes.append(f"{d} {ends}".rstrip())
    axes += [k for k, c in layout.coords.items() if len(c["dims"]) == 2]
    dates = " to ".join(date_text(h, layout) for h in (record.hours.min(), record.hours.max()))
    unknown = layout.calendar == "frames"
    step = "steps of unknown length" if unknown else f"one every {duration(layout.step_hours)}"
    calendar = f"{layout.calendar} calendar" if layout.dated else "no dates"
    parts = [(len(s), len(covered_frames(s, frames))) for s in (train_starts, test_starts)]
    split = "training {} clips of {} frames, test {} of {}".format(*parts[0], *parts[1])
    lines = [
        f"grid      {by(layout.size)}: {', '.join(axes)}{', all the way round' if layout.wraps() else ''}",
        f"time      {len(record)} frames, {dates}, {calendar}, {step}, {int(record.gaps().sum())} gaps",
        *(f"variable  {v.summary}" for v in codec.variables),
        f"split     {split}; a clip is {frames} consecutive frames",
    ]
    told = [*["hour", "day"] * layout.dated, *record.extras]
    lines += [f"told      --condition may name {', '.join(told)}"] * bool(told)
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# writing


def write_samples(folder, x, layout, history, lead, reference=None):
    """samples.npz, and samples.nc where xarray is installed; open_record reads both. Returns their names.

    x (N, C, T, H, W) physical; lead (T,): hours of the frames. With reference (R,), hours of the calendar
    from which `lead` counts, x is (R, M, C, T, H, W): an ensemble of M realisations for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coords = {k: c for k, c in layout.coords.items() if len(c["dims"])}
    origin = [] if reference is None else [REFERENCE]
    units = np.array([a.get("units", "1") for a in layout.attrs])
    arrays = {"samples": x, "channel": np.array(layout.names), "units": units, "time": lead}
    arrays |= {k: np.asarray(c["values"]) for k, c in coords.items()} | dict.fromkeys(origin, reference)
    with replacing(folder / "samples.npz") as f:
        np.savez(f, dims=np.array([*origin, "realization", "channel", "time", *layout.dims]), **arrays)
    if xr is None or find_spec("netCDF4") is None:
        return ["samples.npz"]
    dims = (*origin, "realization", "time", *layout.dims)
    ds = xr.Dataset({k: (c["dims"], c["values"], c["attrs"]) for k, c in layout.coords.items()})
    ds = ds.set_coords([*coords]).assign_attrs({"Conventions": "CF-1.8", "history": history})
    for i, name in enumerate(layout.names):
        ds[name] = dims, x[..., i, :, :, :], layout.attrs[i]
    ds["realization"] = "realization", np.arange(x.shape[len(origin)]), {"standard_name": "realization"}
    since = "reference time" if origin else "first frame"
    attrs = {"standard_name": "forecast_period", "long_name": f"time since the {since}", "units": "hours"}
    if layout.calendar == "frames":
        attrs = {"long_name": f"frames since the {since}", "units": "1"}
    ds["time"] = "time", lead, attrs
    if origin:
        dates = {"units": EPOCH, "calendar": layout.calendar} if layout.dated else {"units": attrs["units"]}
        ds[REFERENCE] = REFERENCE, reference, {"standard_name": REFERENCE} | dates
    fill = {n: {"_FillValue": np.float32(np.nan), "zlib": True} for n in layout.names}
    with replacing(folder / "samples.nc") as f:
        ds.to_netcdf(f.name, engine="netcdf4", encoding=fill)
    return ["samples.npz", "samples.nc"]


@contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is whole; a reader never sees half of it."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}.part")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name is on disk, too
            folder = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):  # some file systems cannot
                os.fsync(folder)
            os.close(folder)
    except OSError as e:
        raise OSError(f"{path} cannot be written: {e.strerror or e}")
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder, age=0.0):
    """Delete what processes that are dead left half written at least `age` seconds ago (see `replacing`)."""
    for path in folder.glob(".*.part") if os.name == "posix" else ():
        pid = re.match(r"\.(\d{1,9})\.", path.name)
        if pid is None or time.time() - path.stat().st_mtime < age:
            continue
        try:
            os.kill(int(pid[1]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:  # it lives, and is another user's
            pass


def reserved(path, shape, dtype):
    """A memory-mapped .npy of this shape, its disk space taken: a full disk is an error now, not a bus error
    later."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array
