"""Climate arrays in and out: built-in weather, your own files, windows, conditions, transforms, written
samples.

A record is a series of frames (time, y, x) of C variables on one grid, in physical units; a clip is `frames`
of them in a row, (C, T, H, W). NaN is no data. Bad input raises InputError: one line with the cause, what was
found and what mends it.
"""

import itertools
import math
import os
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what to do."""


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
    twice as wide as the domain, so that the cropped domain is not periodic; S_k ~ (k^2 + (2 pi / ell)^2)^-2,
    total variance 1 (Sigrist, Kunsch and Stahel 2012; Hottovy and Stechmann 2015). The Nyquist modes are left
    out.
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


def gaussian_covariance(frames, size):
    """Exact covariance of a `gaussian` clip of shape (frames, size, size) flattened: (D, D) float64."""
    C = lag_covariance(frames, size)
    axes = torch.arange(frames), torch.arange(size), torch.arange(size)
    t, y, x = (i.flatten() for i in torch.meshgrid(*axes, indexing="ij"))
    dt, dy, dx = (i[:, None] - i for i in (t, y, x))
    sign = torch.where(dt < 0, -1, 1)  # C(-h, -d) = C(h, d)
    return C[dt.abs(), (sign * dy) % (2 * size), (sign * dx) % (2 * size)]


def latent_modes(frames, size):
    """The exact law of a latent clip on the whole periodic box, by Fourier mode (M = 2 size).

    Every mode is a series of `frames` independent of the others: its variances (M, M, T) in units of white
    noise, and its unitary modes (M, M, T, T).
    """
    S, rate, phase = spectrum(size)
    lag = torch.arange(frames, dtype=torch.float64)[:, None] - torch.arange(frames)  # (T, T)
    C = S[..., None, None] * torch.exp(-lag.abs() * rate[..., None, None] - 1j * lag * phase[..., None, None])
    w, U = torch.linalg.eigh(C)
    return (2 * size) ** 2 * w.clamp(min=0), U


def orography(size):
    """The smooth rain factor s(y, x): hills in the west, a rain shadow behind them. (size, size) float32"""
    grid = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(grid, grid, indexing="ij")
    s = 0.9
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


def rain_products(rho):
    """E[(z - c)^p (z' - c)^p] over the wet, of latent values with correlation rho (any shape), averaged over
    the year.

    The sum over n of a_n^2 rho^n with a_n the Hermite coefficients of the power (Mehler); they fall as n^-2,
    so that the 300 used leave less than 1e-5 of it at rho = 1.
    """
    z, squares = np.linspace(0, 12, 20001), 0
    for season in range(4):
        u, before, h = z + threshold(season), 0.0, np.ones_like(z)
        density, a = z**POWER * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi), []
        for n in range(300):  # normalised Hermite polynomials h_n
            a.append(np.trapezoid(density * h, z))
            before, h = h, (u * h - math.sqrt(n) * before) / math.sqrt(n + 1)
        squares = squares + np.array(a) ** 2 / 4
    return np.polynomial.polynomial.polyval(np.asarray(rho), squares)


def rain_moment(n, size):
    """Exact E[R^n] of `climate` in every cell, over whole years: (size, size)"""
    z = np.linspace(0, 12, 20001)
    wet = [np.trapezoid(z ** (n * POWER) * np.exp(-((z + threshold(k)) ** 2) / 2), z) for k in range(4)]
    return (RATE * orography(size).astype(np.float64)) ** n * np.mean(wet) / math.sqrt(2 * math.pi)


def rings(power):
    """Radial average of the power (H, W) of fft2's waves by wavenumber in cycles per cell: two (K,)
    arrays."""
    H, W = power.shape
    n = min(H, W)
    ring = np.rint(np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)) * n).astype(int)
    total, count = np.bincount(ring.ravel(), power.ravel()), np.bincount(ring.ravel())
    k = np.arange(1, n // 2 + 1)
    return k / n, total[k] / count[k]


def rain_law(size, frames, levels, dry=0.01):
    """Exact statistics of `climate` over whole years, all cells together, by name: mean, std, dry (share of
    values up to `dry` mm/h), quantiles at the levels (below 1), autocorrelation at lags 0 .. frames - 1,
    spatial_power (see rings) and temporal_power (as |rfft|^2 / frames without the mean), and map, the mean of
    every cell (size, size)."""
    p = RATE * orography(size).astype(np.float64)
    low, high = np.zeros(len(levels)), np.full(len(levels), p.max() * 10**POWER)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = rain_cdf(middle, size).mean((1, 2)) < levels
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    mean = rain_moment(1, size).mean()
    variance = rain_moment(2, size).mean() - mean**2
    lagged = rain_products(lag_covariance(frames, size))  # (frames, 2 size, 2 size)
    in_time = (p**2).mean() * lagged[:, 0, 0]
    pairs = np.fft.ifft2(np.abs(np.fft.fft2(p, (2 * size, 2 * size))) ** 2).real * lagged[0]  # summed by lag
    in_space = np.fft.fft2(pairs.reshape(2, size, 2, size).sum((0, 2))).real / size**2
    waves, t = np.fft.rfft(np.eye(frames), axis=0), np.arange(frames)
    covariance = in_time[abs(np.subtract.outer(t, t))]  # (T, T)
    temporal = np.einsum("kt,tu,ku->k", waves, covariance, waves.conj()).real / frames
    return {
        "mean": mean,
        "std": math.sqrt(variance),
        "dry": rain_cdf([dry], size).mean(),
        "quantiles": high.round(9),
        "map": rain_moment(1, size),
        "autocorrelation": (in_time - mean**2) / variance,
        "spatial_power": rings(in_space)[1],
        "temporal_power": temporal[1:],
    }


def generate(path, kind, size, seed):
    """Write the built-in data: (SEASONS, SEASON_HOURS, size, size) float16 .npy, through a temporary file.

    Season k + 5 of every ten is season k with its latent field negated (both train or both test). Each has
    the exact law by itself; together their mean is exact, and that is most of the record's own sampling error
    (the slow k = 0 mode).
    """
    S, rate, phase = spectrum(size)
    generator = torch.Generator().manual_seed(seed)
    decay = torch.exp(-rate - 1j * phase).to(torch.complex64)
    kick = (S * -torch.expm1(-2 * rate)).sqrt().to(torch.complex64)
    shape = (SEASONS // 4, *S.shape)  # each complex field is two real ones, and each of those two seasons

    def noise():
        return math.sqrt(2) * torch.randn(shape, dtype=torch.complex64, generator=generator)

    c = torch.from_numpy(threshold(np.arange(SEASONS))).float()[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        out = reserved(temporary, (SEASONS, SEASON_HOURS, size, size), np.float16)
        z = S.sqrt() * noise()
        for hour in tqdm(range(SEASON_HOURS), desc=f"making {path}", unit="h"):
            latent = torch.fft.ifft2(z, norm="forward")[:, :size, :size]
            latent = torch.stack([latent.real, latent.imag], 1).view(-1, 5, size, size)
            latent = torch.cat([latent, -latent], 1).flatten(0, 1)  # (SEASONS, size, size)
            out[:, hour] = latent if kind == "gaussian" else rain(latent, c)
            z = decay * z + kick * noise()
        out.flush()
        del out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def builtin(kind, size, seed, folder="data"):
    """The Record of `climate` (rain, mm/h) or `gaussian` (its latent field), made once and memory-mapped."""
    path = Path(folder) / f"{kind}_{size}_seed{seed}.npy"
    if not path.exists():
        generate(path, kind, size, seed)
    array = np.load(path, mmap_mode="r").reshape(-1, size, size)
    hours = (np.arange(SEASONS)[:, None] * 90 * 24 + np.arange(SEASON_HOURS)).ravel()  # years of 360 days
    km = {"units": "km", "long_name": "distance"}
    coords = {d: {"dims": [d], "values": np.arange(size) * CELL_KM, "attrs": km} for d in ("y", "x")}
    if kind == "climate":
        name, attrs = "rain", {"units": "mm h-1", "long_name": "rain rate"}
    else:
        name, attrs = "z", {"units": "1"}
    extras = {"orography": orography(size), "season": np.repeat(np.arange(SEASONS) % 4, SEASON_HOURS)}
    layout = Layout([name], [attrs], coords=coords, calendar="360_day")
    return Record(layout, [Piece({name: array})], hours, extras, SEASON_HOURS)


# ------------------------------------------------------------------------------------------------------------
# the grid of a record, and the record itself

UNDATED = ("none", "frames")  # calendars of records without dates: hours from the start, or numbers of frames
RESERVED = ("time", "realization", "forecast_reference_time", "channel", "samples", "units", "dims", "file")
SAME_UNIT = dict.fromkeys("°C C celsius deg_C degree_C degree_celsius degrees_celsius".split(), "degC")
SAME_UNIT |= dict.fromkeys("kelvin degK deg_K degree_K".split(), "K") | dict.fromkeys(("day", "days"), "d")
SAME_UNIT |= dict.fromkeys(("hr", "hour", "hours"), "h") | {"sec": "s", "second": "s", "percent": "%"}


def canonical(units):
    """Units in one spelling, to compare them: kg/m^2/s, kg m**-2 s**-1 and kg m-2 s-1 are equal."""
    text = re.sub(r"\*\*|\^|\*", "", str(units).translate(str.maketrans("⁻¹²³·.", "-123  ")))
    text = re.sub(r"/\s*([^\W\d]+)(\d*)", lambda m: f" {m[1]}-{m[2] or 1}", text)
    words = [re.fullmatch(r"(.*?)(-?\d*)", word).groups() for word in text.split()]
    return sorted(SAME_UNIT.get(unit, SAME_UNIT.get(unit.lower(), unit)) + power for unit, power in words)


def is_degrees(coord):
    return str(coord["attrs"].get("units", "")).lower().startswith("degree")


def cell_width(values):
    """Typical distance of neighbours along the wider axis of a coordinate; 1 where there is but one value."""
    steps = [np.abs(np.diff(values, axis=i)) for i in range(values.ndim) if values.shape[i] > 1]
    widths = [np.median(s[np.isfinite(s)]) for s in steps if np.isfinite(s).any()]
    return float(max(widths, default=1.0)) or 1.0


def same_places(a, b, period):
    """True where coordinates (n,) or (H, W) agree to a hundredth of a cell; those missing in both agree."""
    d = np.where(np.isnan(a) & np.isnan(b), 0.0, np.abs(a - b))
    d = np.minimum(d % period, period - d % period) if period else d
    return bool((d <= cell_width(a) / 100).all())


def places(coord, period, factor=1):
    """The values of a coordinate, float64; factor: of the grid whose cells are blocks of so many cells."""
    values = np.asarray(coord["values"], np.float64)
    for axis in range(values.ndim) if factor > 1 else ():
        values = np.unwrap(values, period=period, axis=axis) if period else values
        values = values.reshape(*values.shape[:axis], -1, factor, *values.shape[axis + 1 :]).mean(axis + 1)
    return values


def step_tolerance(step):
    """By how much a step may differ from the usual one: a tenth of it, a third of a calendar month. Hours."""
    return step / 3 if 28 * 24 <= step <= 31 * 24 else step / 10


def by(size):
    return " x ".join(f"{n:g}" for n in size)


@dataclass
class Layout:
    """What the frames of a record are: variables, grid and time step, in plain values and arrays.

    names, attrs: per variable (units and long_name are text); dims: names of (y, x); size: (H, W); coords:
    {name: {"dims", "values", "attrs"}} on (y, x), one without dims is a grid mapping; calendar: a CF
    calendar, "none" for hours without dates or "frames" for numbers of frames; step_hours: the usual step,
    NaN of a single frame; named: False where the names are made up, as those of a bare array.
    """

    names: list
    attrs: list
    dims: tuple = ("y", "x")
    size: tuple = ()
    coords: dict = field(default_factory=dict)
    calendar: str = "frames"
    step_hours: float = math.nan
    named: bool = True

    @property
    def dated(self):
        return self.calendar not in UNDATED

    def axis(self, i):
        """The coordinate along y (0) or x (1), one in degrees first; None if there is none."""
        along = [c for c in self.coords.values() if list(c["dims"]) == [self.dims[i]]]
        return min(along, key=lambda c: not is_degrees(c), default=None)

    def is_angle(self, i):
        """Is y a latitude (0), x a longitude (1)?"""
        names = ("lat", "latitude") if i == 0 else ("lon", "longitude")
        return self.axis(i) is not None and (is_degrees(self.axis(i)) or self.dims[i].lower() in names)

    def wraps(self):
        """True if x is a longitude that goes all the way round."""
        if not self.is_angle(1) or self.size[1] < 4:
            return False
        step = np.diff(np.asarray(self.axis(1)["values"], np.float64))
        width = abs(step[0])
        return bool(np.ptp(step) < 0.01 * width and abs(width * (len(step) + 1) - 360) < width / 2)

    def area(self):
        """Area of a cell by row, (H,), where y is a latitude; else None."""
        return np.cos(np.deg2rad(places(self.axis(0), None))).clip(0) if self.is_angle(0) else None

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

    def match(self, other, what, factor=1, reference="the checkpoint"):
        """Which rows and columns of `other` are this grid's, ((H,), (W,)), where only their order differs;
        else None.

        other: the Layout of `what`, at 1 / factor of the resolution. Raises InputError, naming what differs:
        names, units, size, coordinates (1/100 cell), calendar, step (a tenth). What one does not know is not
        compared.
        """
        known = "frames" not in (self.calendar, other.calendar)
        if known and abs(other.step_hours - self.step_hours) > step_tolerance(self.step_hours):
            theirs, ours = duration(other.step_hours), duration(self.step_hours)
            raise InputError(
                f"{what} has a frame every {theirs}; {reference} needs one every {ours}: resample it"
            )
        return self.order(other, what, factor, reference)

    def order(self, other, what, factor=1, reference="the checkpoint"):
        """`match` without the step."""
        named, size = self.named and other.named, tuple(n / factor for n in self.size)
        if len(other.names) != len(self.names) or (named and other.names != self.names):
            both = ",".join(n for n in self.names if n in other.names)
            mend = (
                f"choose --variables={both}" if both else "all must have the same (cdo merge, xarray.merge)"
            )
            theirs = f"{', '.join(other.names)}; {reference} has {', '.join(self.names)}"
            raise InputError(f"{what} has variables {theirs}: {mend}")
        for name, a, b in zip(self.names, self.attrs, other.attrs):
            if "units" in a and "units" in b and canonical(a["units"]) != canonical(b["units"]):
                units = f"{name} in {b['units']}, {reference} in {a['units']}"
                raise InputError(f"{what} has {units}: convert it first")
        if self.dated and other.dated and self.calendar != other.calendar:
            calendars = f"calendar {other.calendar}, {reference} has {self.calendar}"
            raise InputError(f"{what} has {calendars}: convert it, cdo setcalendar or ds.convert_calendar")
        if tuple(other.size) != size:
            grids = f"a grid of {by(other.size)}, {reference} of {by(size)}"
            raise InputError(f"{what} has {grids}: select or regrid the same cells")
        rows, columns = (self.order_along(i, other, what, factor, reference) for i in (0, 1))
        for r, c in itertools.product((rows, rows[::-1]), (columns, columns[::-1])):
            wrong = self.misplaced(other, r, c, factor)
            if not wrong:
                return None if (np.diff(r) == 1).all() and (np.diff(c) == 1).all() else (r, c)
        raise InputError(f"{what} has other {wrong} than {reference}: select or regrid the same cells")

    def misplaced(self, other, rows, columns, factor):
        """A coordinate (H, W) of both that differs in this order of rows and columns, or ""."""
        for name, c in self.coords.items():
            if len(c["dims"]) == 2 and name in other.coords:
                period = 360 if is_degrees(c) else None
                theirs = places(other.coords[name], period)[np.ix_(rows, columns)]
                if not same_places(places(c, period, factor), theirs, period):
                    return name
        return ""

    def order_along(self, i, other, what, factor, reference):
        """Which indices of the other's axis are this one's: the order alone may differ, longitudes by 360."""
        a, b = self.axis(i), other.axis(i)
        if a is None or b is None:
            return np.arange(int(other.size[i]))
        period = 360 if i == 1 and (self.is_angle(1) or other.is_angle(1)) else None
        own, theirs = places(a, period, factor), places(b, period)
        order = np.arange(len(own))
        if same_places(own, theirs, period):
            return order
        start = own.min() - cell_width(own) / 2  # where to cut the circle
        p, q = ((v - start) % period if period else v for v in (own, theirs))
        order[np.argsort(p, kind="stable")] = np.argsort(q, kind="stable")
        if same_places(own, theirs[order], period):
            return order
        name = next(k for k, c in other.coords.items() if c is b)
        span = f"{name} {theirs[0]:g} to {theirs[-1]:g}, {reference} {own[0]:g} to {own[-1]:g}"
        raise InputError(f"{what} has {span}: select or regrid the same cells")


@dataclass
class Piece:
    """A stretch of frames of one source: {name: array-like (n, H, W)}; order: which (rows, columns) to
    read."""

    arrays: dict
    source: str = ""
    order: tuple = None

    def __len__(self):
        return next(iter(self.arrays.values())).shape[0]

    def read(self, names, start, stop):
        """Frames [start, stop) of variables, (C, T, H, W) float32."""
        x = np.stack([np.asarray(self.arrays[n][start:stop], np.float32) for n in names])
        return x if self.order is None else x[..., self.order[0][:, None], self.order[1]]

    def like(self, order, names):
        """With rows and columns in another order, if it is not None, and variables under other names."""
        mine, arrays = self.order, {names.get(k, k): a for k, a in self.arrays.items()}
        if order is not None and mine is not None:
            order = mine[0][order[0]], mine[1][order[1]]
        return Piece(arrays, self.source, mine if order is None else order)


class Record:
    """Frames of C variables on one grid, read piece by piece; large arrays stay on disk.

    layout: size and step_hours are set here; pieces: list of Piece; hours: (N,) in hours_since of the
    calendar; extras: {name: array-like (H, W), (N,) or (N, H, W)}, what a model may be told; block: frames
    per block of the split, or None; index: (N,) where in the pieces a frame lies; notes: one line each of
    what was assumed, sorted or left out.
    """

    def __init__(self, layout, pieces, hours, extras=None, block=None, index=None, notes=()):
        self.pieces, self.hours, self.block = pieces, np.asarray(hours, np.float64), block
        self.ends, self.notes = np.cumsum([len(p) for p in pieces]), list(notes)
        self.index = np.arange(len(self.hours)) if index is None else index
        steps = np.diff(self.hours)
        step = float(np.median(steps[steps > 0])) if (steps > 0).any() else math.nan
        size = tuple(int(n) for n in pieces[0].arrays[layout.names[0]].shape[1:])
        self.layout = replace(layout, size=size, step_hours=step)
        more = [k for k in pieces[0].arrays if k not in layout.names and all(k in p.arrays for p in pieces)]
        self.extras = {**(extras or {}), **{k: Told(self, k) for k in more}}

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
        missing = ~(np.abs(x) < 9.9e36)
        return np.where(missing, np.float32(np.nan), x) if missing.any() else x

    def gaps(self):
        """(N - 1,) True where frame i + 1 does not follow frame i by the usual step."""
        step = self.layout.step_hours
        return ~(np.abs(np.diff(self.hours) - step) <= step_tolerance(step))

    def extent(self):
        """Number of frames, first and last hour: what the held-out part depends on."""
        return [len(self), *self.hours[[0, -1]].tolist()]

    def fit_to(self, layout, what, factor=1):
        """This record under the names and in the order of rows and columns of another layout, frame numbers
        as hours of its step. Raises InputError where they differ in more than order (Layout.match)."""
        order, names = layout.match(self.layout, what, factor), dict(zip(self.layout.names, layout.names))
        pieces = [p.like(order, names) for p in self.pieces]
        extras = {k: v for k, v in self.extras.items() if not isinstance(v, Told)}
        if order is not None:
            extras = {k: v[np.ix_(*order)] if v.ndim == 2 else v for k, v in extras.items()}
        hours, own = self.hours, replace(self.layout, names=layout.names, attrs=layout.attrs)
        if factor == 1:
            own = replace(own, dims=layout.dims, coords=layout.coords)
        if own.calendar == "frames" and layout.calendar != "frames":
            hours, own = hours * layout.step_hours, replace(own, calendar="none")
        return Record(own, pieces, hours, extras, self.block, self.index, self.notes)


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
        return self.record.frames(i, i + 1, [self.name])[0, 0]  # (H, W)


# ------------------------------------------------------------------------------------------------------------
# reading times

SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "millisecond": 1e-3, "s": 1, "sec": 1, "second": 1, "min": 60}
SECONDS |= {"minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "d": 86400, "day": 86400, "week": 604800}
MONTHS = {"month": 1, "mon": 1, "year": 12, "yr": 12, "common_year": 12}
CALENDARS = {"": "standard", "gregorian": "standard", "360": "360_day", "365": "noleap", "365_day": "noleap"}
CALENDARS |= {"366": "all_leap", "366_day": "all_leap"}


def hours_since(calendar):
    """Units of Record.hours: since numpy's epoch in its calendar, in others since 1850."""
    return f"hours since {1970 if calendar == 'standard' else 1850}-01-01"


def unit_of(word, table):
    word = word.strip().lower()
    return table.get(word, table.get(word.removesuffix("s")))


def decode_times(values, attrs):
    """Times of any kind (n,) as hours (n,) float64 and calendar: datetimes, texts, numbers with CF units,
    months or years since, dates as numbers (20200131.5). "none": hours without dates; "frames": steps of no
    known length."""
    if values.dtype.kind in "Mm":
        ticks = values.astype(f"{values.dtype.kind}8[us]").astype(np.float64) / 3.6e9
        return np.where(np.isnat(values), np.nan, ticks), "standard" if values.dtype.kind == "M" else "none"
    units, calendar = str(attrs.get("units", "")).strip(), str(attrs.get("calendar", "")).lower()
    if values.dtype.kind in "SUOT":  # ISO dates, with any separators
        texts = [v.decode("ascii", "replace") if isinstance(v, bytes) else str(v) for v in values]
        units = "" if all(re.match(r"\s*\d{4}-?\d\d", t) for t in texts) else "text"
        values = np.array([math.nan if units else float(re.sub(r"\D", "", t)[:14]) for t in texts])
    v = values.astype(np.float64)
    v = np.where(np.abs(v) < 2.0**63, v, np.nan)  # numpy's "not a time" as an integer
    try:
        hours, calendar = dated_hours(v, units, CALENDARS.get(calendar, calendar))
        if calendar != "proleptic_gregorian" or np.nanmin(hours, initial=0) < -2.3e6:
            return hours, calendar
        return hours - 43829 * 24, "standard"  # from 1583 on the two are one, whose epoch is 1970
    except (ValueError, TypeError, OverflowError):
        pass  # no date, or one that nobody knows: the steps may be known all the same
    unit = unit_of(re.split(" since ", units, flags=re.IGNORECASE)[0], SECONDS)
    if unit is not None:
        return v * unit / 3600, "none"
    steps = np.abs(np.diff(v))
    return (v / np.median(steps[steps > 0]) if (steps > 0).any() else np.arange(float(len(v)))), "frames"


def dated_hours(v, units, calendar):
    """Numbers as hours and calendar; ValueError if they are no dates."""
    import cftime

    word, *reference = re.split(" since ", units, maxsplit=1, flags=re.IGNORECASE)
    if reference:
        start = cftime.num2date(0, f"hours since {reference[0]}", calendar)
        offset = cftime.date2num(start, hours_since(calendar), calendar)
        if unit_of(word, SECONDS) is not None:
            return v * unit_of(word, SECONDS) / 3600 + offset, calendar
        first = start.year * 12 + start.month - 1
        months = first + v * (unit_of(word, MONTHS) or math.nan)
        return month_hours(months, calendar) + offset - month_hours(np.array([first]), calendar), calendar
    whole, part = np.floor(v), v % 1
    digits = len(str(int(np.nanmax(whole, initial=0))))
    if " as %" in units and digits <= 6:  # years or months
        months = 12 * v if digits <= 4 else 12 * (whole // 100) + whole % 100 - 1 + part
        return month_hours(months, calendar), calendar
    day, clock = whole // 10.0 ** (digits - 8), whole % 10.0 ** (digits - 8) * 10.0 ** (14 - digits)  # hhmmss
    month, day_of_month = day // 100 % 100, day % 100
    valid = (month >= 1) & (month <= 12) & (day_of_month >= 1) & (day_of_month <= 31) & (day < 3e7)
    if digits < 8 or digits % 2 or not (valid | np.isnan(v)).all() or unit_of(units, SECONDS) is not None:
        raise ValueError(units)
    hours = clock // 10000 + clock // 100 % 100 / 60 + clock % 100 / 3600
    days = 24 * (day_of_month - 1 + (part if digits == 8 else 0))
    return month_hours(12 * (day // 10000) + month - 1, calendar) + days + hours, calendar


def month_hours(months, calendar):
    """Hours of a count of months since the year 0; a part of one is that part of its days."""
    import cftime

    if not np.isfinite(months).any():
        raise ValueError("no months")
    whole = np.arange(math.floor(np.nanmin(months)), math.floor(np.nanmax(months)) + 2)
    firsts = [cftime.datetime(m // 12, m % 12 + 1, 1, calendar=calendar) for m in whole.tolist()]
    return np.interp(months, whole, cftime.date2num(firsts, hours_since(calendar), calendar))


def duration(hours):
    name, unit = next((u for u in (("days", 24), ("hours", 1)) if hours >= u[1]), ("minutes", 1 / 60))
    return f"{hours / unit:.6g} {name}"


def date_text(hours, layout):
    """A time of a record in words."""
    if not layout.dated:
        return f"{'hour' if layout.calendar == 'none' else 'frame'} {hours:g}"
    if layout.calendar == "standard":
        return str(np.datetime64(round(hours * 60), "m")).replace("T", " ")
    import cftime

    return str(cftime.num2date(hours, hours_since(layout.calendar), layout.calendar))[:16]


# ------------------------------------------------------------------------------------------------------------
# reading files: each gives one Record, or one for each member, which are then joined

MEMORY = 2**30  # bytes of fields held in memory; larger ones are read window by window
SUFFIXES = (".npy", ".npz", ".nc", ".nc4", ".cdf", ".netcdf", ".h5", ".hdf5", ".he5")
FOREIGN = {  # how files begin that are not read
    b"GRIB": "is GRIB: convert it, grib_to_netcdf -o OUT.nc or cdo -f nc copy",
    b"PK": "is a zip archive: unpack it",
    b"\x1f\x8b": "is compressed: gunzip it",
    b"BZh": "is compressed: bunzip2 it",
    b"\xfd7zXZ": "is compressed: unxz it",
    b"\x0e\x03\x13\x01": "is HDF4: convert it, h4tonccf",
    b"II*\0": "is TIFF: convert it, gdal_translate -of netCDF",
    b"MM\0*": "is TIFF: convert it, gdal_translate -of netCDF",
    b"<": "is a web page, not data: download it again",
}
AXES = {  # attributes that cf_xarray knows, and names of dimensions, the likelier first
    "T": ("time", "time t valid_time date datetime time_counter ocean_time frame step lead_time"),
    "Y": ("latitude", "latitude lat y rlat grid_latitude projection_y_coordinate south_north nj j nlat yh"),
    "X": ("longitude", "longitude lon x rlon grid_longitude projection_x_coordinate west_east ni i nlon xh"),
}
MEMBERS = "member members number realization realisation ensemble_member ensemble ens batch sample".split()
MARKS = ("axis", "cartesian_axis", "standard_name")  # attributes that say what a coordinate is
BOUNDS = {"bnds", "bounds", "nbnds", "nbounds", "axis_nbounds", "tbnds", "nv", "nvertex", "vertices"}
UNNAMED = re.compile(r"(phony_)?dim_\d+$")  # dimensions that nobody has named
NAMING = "bounds climatology coordinates grid_mapping cell_measures ancillary_variables formula_terms".split()


def plain(attrs):
    """Attributes as plain values, which a checkpoint can hold, but for those that name other variables."""
    keep = {}
    for k, v in attrs.items():
        v = v.tolist() if isinstance(v, (np.ndarray, np.generic)) else v
        v = str(v) if k in ("units", "long_name") else v
        numbers = isinstance(v, list) and all(isinstance(i, (int, float)) for i in v)
        if (numbers or isinstance(v, (str, int, float))) and not k.startswith("_") and k not in NAMING:
            keep[k] = v
    return keep


class Channel:
    """Channel i of an array (time, channel, y, x), or a single frame (y, x) if i is None, as an array
    (time, y, x) that is not read before it is indexed."""

    def __init__(self, array, i=None):
        self.array, self.i = array, i
        self.shape = (1, *array.shape) if i is None else (array.shape[0], *array.shape[2:])

    def __getitem__(self, frames):
        return np.asarray(self.array)[None][frames] if self.i is None else self.array[frames, self.i]


def array_fields(arrays, notes):
    """The fields (time, y, x) of arrays by name; an array of texts of their number names channels."""
    fields = {k: a for k, a in arrays.items() if a.ndim == 3 and a.dtype.kind in "fiub"}
    for k, a in arrays.items():
        if a.ndim != 4 or a.dtype.kind not in "fiub":
            continue
        n, (H, W) = a.shape[1], a.shape[2:]
        texts = [t for t in arrays.values() if t.shape == (n,) and t.dtype.kind == "U"]
        labels = [str(t) for t in texts[0]] if texts else [f"{k}_{i}" if n > 1 else k for i in range(n)]
        fields |= {label: Channel(a, i) for i, label in enumerate(labels)}
        if not texts and (n > 4 or W <= 4 < H):
            taken = f"{k} {a.shape} is taken for {n} channels of {H} x {W}"
            notes.append(f"{taken}; if they come last, np.moveaxis(a, -1, 1); separate clips: one file each")
    return fields


def read_arrays(path, arrays, wanted, named=True):
    """The Record of arrays by name: fields, 1-D time (dates, or hours), y and x; others are extras."""
    notes = []
    fields = array_fields(arrays, notes)
    if not named and len(wanted) == len(fields) and not {*wanted} <= fields.keys():
        fields = dict(zip(wanted, fields.values()))  # a bare array takes the names that are given
    names, has = wanted or list(fields), ", ".join(f"{k} {a.dtype} {a.shape}" for k, a in arrays.items())
    wrong = [v for v in wanted if v not in fields]
    if wrong or not names:
        what = f"field '{wrong[0]}'" if wrong else "numbers"
        raise InputError(f"{path} has no {what} of shape (time, y, x) or (time, channel, y, x); it has {has}")
    if len({fields[n].shape for n in names}) > 1:
        raise InputError(
            f"{path} has fields that differ in shape, {', '.join(names)}: choose with --variables"
        )
    n, H, W = fields[names[0]].shape
    hours, calendar, coords = np.arange(n, dtype=np.float64), "frames", {}
    for k, a in arrays.items():
        axis = next((axis for axis, (_, known) in AXES.items() if k.lower() in known.split()), "")
        if axis == "T" and a.shape == (n,):
            hours, calendar = decode_times(np.asarray(a), {"units": "hours"} if a.dtype.kind in "fiu" else {})
        elif axis and a.shape == ((H,) if axis == "Y" else (W,)):
            unit = {"lat": "degrees_north", "lon": "degrees_east"}.get(k.lower()[:3])
            attrs = {"units": unit} if unit else {}
            coords[axis.lower()] = {"dims": [axis.lower()], "values": np.array(a, np.float64), "attrs": attrs}
    extras = [k for k, a in arrays.items() if a.shape in ((n,), (H, W)) and a.dtype.kind in "fiub"]
    extras = {k: np.asarray(arrays[k]) for k in extras}
    layout = Layout(names, [{} for _ in names], coords=coords, calendar=calendar, named=named)
    same = {k: a for k, a in fields.items() if a.shape == (n, H, W)}
    return [Record(layout, [Piece(same, str(path))], hours, extras, notes=notes)]


def read_numpy(path, wanted):
    """The Record of a .npy, memory-mapped, or .npz."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        single = not hasattr(loaded, "files")
        arrays = {Path(path).stem: loaded} if single else {k: loaded[k] for k in loaded.files}
    except Exception as e:
        raise InputError(f"cannot read {path}: {reason(e)}")
    return read_arrays(path, arrays, wanted, named=not single)


def reason(e):
    """An error in one line."""
    if "pickle" in str(e):
        return "it holds Python objects, which could run code: save numbers, texts or dates"
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def open_dataset(path, group=""):
    """A file, or its only group with fields, as an xarray.Dataset that is not read; times stay numbers."""
    try:
        import xarray as xr
    except ImportError:
        raise InputError(f"reading {path} needs xarray: pip install xarray netCDF4 zarr cftime")
    engine = "zarr" if path.is_dir() else "netcdf4"
    options = {"engine": engine, "decode_cf": False, "chunks": None, "cache": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = decode(xr.open_dataset(path, group=group or None, **options))
            if ds.data_vars or group:
                return ds
            names = [k.strip("/") for k in xr.open_groups(path, engine=engine, decode_times=False)]
            groups = {k: decode(xr.open_dataset(path, group=k or None, **options)) for k in names}
    except Exception as e:  # a damaged file, or the backend is not installed
        raise InputError(f"cannot read {path}: {reason(e)} (needs xarray with {engine})")
    full = [k for k, g in groups.items() if any(v.ndim > 1 for v in g.data_vars.values())]
    if len(full) > 1:
        raise InputError(f"{path} has data in groups {', '.join(full)}: choose one, {path}/{full[0]}")
    ds = groups[full[0]] if full else ds
    outer = [groups[str(p).strip(".")] for p in Path(full[0]).parents] if full else []
    for variables in (parent.variables for parent in outer):  # its coordinates hold for the group too
        more = {k: v for k, v in variables.items() if v.ndim and k not in ds.variables}
        ds = ds.assign_coords({k: v for k, v in more.items() if v.sizes.items() <= ds.sizes.items()})
    return ds


def decode(ds):
    """CF decoding but for times. netCDF's default fill values of integers are no data if none is declared."""
    import xarray as xr

    for v in ds.data_vars.values():
        fill = {"i2": -(2**15) + 1, "i4": -(2**31) + 1, "i8": -(2**63) + 2}.get(v.dtype.str[1:])
        declared = {"_FillValue", "missing_value", "scale_factor", "add_offset"} & v.attrs.keys()
        if fill is not None and v.ndim > 2 and not declared:
            v.attrs["_FillValue"] = v.dtype.type(fill)
    return xr.decode_cf(ds, decode_times=False, decode_timedelta=False, decode_coords="all")


def likely_axes(ds):
    """The dimensions that may be time, y and x, {"T", "Y", "X": list}, the likelier first: by CF attributes
    (cf_xarray), by name, by units."""
    one, likely = {k: v for k, v in ds.variables.items() if v.ndim == 1}, {}
    for axis, (coordinate, names) in AXES.items():
        try:
            import cf_xarray  # noqa: F401, adds ds.cf

            keys = ds.cf.axes.get(axis, []) + ds.cf.coordinates.get(coordinate, [])
        except ImportError:
            keys = [k for k, v in one.items() if {axis, coordinate} & {str(v.attrs.get(a)) for a in MARKS}]
        dims = [one[k].dims[0] for k in keys if k in one]
        dims += [d for name in names.split() for d in ds.dims if d.lower() == name]
        unit = {"T": ".* since ", "Y": "degrees?_?n", "X": "degrees?_?e"}[axis]
        dims += [v.dims[0] for v in one.values() if re.match(unit, str(v.attrs.get("units")).lower())]
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


def is_member(ds, d):
    return d.lower() in MEMBERS or (d in ds.coords and ds[d].attrs.get("standard_name") == "realization")


def variants(da, rest, labels, wanted):
    """{name: DataArray}: a variable, its channels if a dimension has names of them, the levels asked for."""
    found = {} if rest else {da.name: da}
    if len(rest) == 1:
        found = {k: da.isel({rest[0]: i}, drop=True) for i, k in enumerate(labels.get(rest[0], []))}
    for text in wanted:
        name, *values = text.split("@")
        if name != da.name or len(values) != len(rest):
            continue
        at = {}
        for d, value in zip(rest, values):
            levels = level_names(da, d)
            if value not in levels:
                raise InputError(f"{name} has no {d} '{value}'; it has {', '.join(levels)}")
            at[d] = levels.index(value)
        found[text] = da.isel(at, drop=True)
    return found


def level_names(da, d):
    values = da[d].values.tolist() if d in da.coords else range(da.sizes[d])
    return [f"{v:g}" if isinstance(v, float) else str(v) for v in values]


def fields_of(ds, wanted):
    """{name: DataArray ([member,] [time,] y, x)} of what can be used, {name: why not} of other variables."""
    usable, refused, likely = {}, {}, likely_axes(ds)
    texts = [d for d in ds.dims if d in ds.coords and ds[d].dtype.kind in "SUOT"]
    labels = {d: [v.decode() if isinstance(v, bytes) else str(v) for v in ds[d].values] for d in texts}
    extra = {"expver", *(d for d in ds.dims if is_member(ds, d)), *labels}
    asked = {w.split("@")[0] for w in wanted}
    names = [*ds.data_vars, *(k for k in ds.coords if k in asked)]
    axes = {k: axes_of(ds[k], likely, extra) for k in names}
    timed = any(axes[k][0] and ds[k].ndim > 2 for k in axes)
    for name, (t, y, x) in axes.items():
        da = ds[name]
        da = da.squeeze([d for d in da.dims if ds.sizes[d] == 1 and d not in (t, y, x)], drop=True)
        front = [d for d in da.dims if is_member(ds, d)][:1] + [t] * (t is not None)
        rest = [d for d in da.dims if d not in (*front, y, x)]
        named = {d: [f"{name}_{i}" for i in range(ds.sizes[d])] for d in rest if UNNAMED.match(d)}
        sizes = f"{name} ({', '.join(f'{d} {n}' for d, n in da.sizes.items())})"
        if da.dtype.kind not in "fiub":
            refused[name] = f"{name} holds {da.dtype}, not numbers"
        elif y is None or x is None or BOUNDS & {y, x}:
            refused[name] = f"{sizes} is not on a grid of y and x: interpolate it to one"
        elif t is None and timed:
            refused[name] = f"{sizes} has no dimension of time: ds.rename({da.dims[0]}='time')"
        elif not (found := variants(da, rest, labels | named, wanted)):
            refused[name] = further(da, rest, sizes, t)
        else:
            usable |= {k: v.transpose(*front, y, x) for k, v in found.items()}
    return usable, refused


def further(da, rest, sizes, tdim):
    """Why a variable with further dimensions is not used, and what to do."""
    levels = [level_names(da, d) for d in rest]
    mend = f"choose with --variables={da.name}@{'@'.join(v[0] for v in levels)}"
    if tdim is None:
        mend += f", or if it is time, ds.rename({rest[0]}='time')"
    if rest[0] == "expver":
        mend = f"merge them, ds.sel(expver={levels[0][0]}).combine_first(ds.sel(expver={levels[0][-1]}))"
    which = "; ".join(f"{d} is one of {', '.join(v[:8])}" for d, v in zip(rest, levels))
    return f"{sizes} has more dimensions than time, y and x, {which}: {mend}"


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
        if k == tdim:
            fallback = hours, calendar
    return fallback


def coordinates(ds, da, dims, notes):
    """The coordinates on (y, x) of a field, and its grid mapping."""
    coords, mapping = {}, str(da.encoding.get("grid_mapping", "")).split(":")[0].split(" ")[0]
    for name, c in ds.coords.items():
        moving = [d for d in c.dims if d not in dims]  # WRF writes its latitudes again in every frame
        if moving and str(c.attrs.get("units")).startswith("degree") and {*dims} <= {*c.dims} and c.size:
            c = c.isel({d: 0 for d in moving})
        if name in RESERVED and c.ndim and {*c.dims} <= {*dims}:
            notes.append(f"coordinate '{name}' is left out: written samples have that name themselves")
        elif c.dtype.kind in "fiu" and c.ndim and {*c.dims} <= {*dims}:
            c = c.transpose(*[d for d in dims if d in c.dims])
            coords[name] = {"dims": list(c.dims), "values": c.values, "attrs": plain(c.attrs)}
        elif name == mapping and c.ndim == 0 and name not in RESERVED:
            coords[name] = {"dims": [], "values": np.zeros((), np.int32), "attrs": plain(c.attrs)}
    return coords


def read_xarray(path, wanted, group, memory):
    """The Records of NetCDF, HDF5 or Zarr, one a member; fields of more than `memory` bytes stay on disk."""
    ds, notes = open_dataset(path, group), []
    usable, refused = fields_of(ds, wanted)
    for v in wanted:
        if v not in usable:
            why = refused.get(v.split("@")[0], f"it has no '{v}'")
            raise InputError(f"{path}: {why}; it has {', '.join(usable) or 'no field of time, y, x'}")
    names = wanted or list(usable)
    if not names:
        why = refused[max(refused, key=lambda k: ds[k].ndim)] if refused else "it has no variables"
        raise InputError(f"{path} has no field of time, y, x: {why}")
    fields = [usable[n] for n in names]
    if len({(f.dims, f.shape) for f in fields}) > 1:
        kinds = ", ".join(f"{n} {f.dims} {f.shape}" for n, f in zip(names, fields))
        raise InputError(f"{path} has fields on different grids, {kinds}: choose one grid with --variables")
    *front, ydim, xdim = fields[0].dims
    members = [d for d in front if is_member(ds, d)]
    tdim = next((d for d in front if d not in members), None)
    hours, calendar = times_of(ds, tdim, fields[0].sizes.get(tdim, 1))
    if calendar == "frames":
        notes.append("no times are found that can be read: frames are numbered, and their step is unknown")
    attrs, coords = [plain(f.attrs) for f in fields], coordinates(ds, fields[0], (ydim, xdim), notes)
    attrs = [a | {"grid_mapping": k} for a in attrs for k, c in coords.items() if not c["dims"]] or attrs
    layout = Layout(names, attrs, (ydim, xdim), coords=coords, calendar=calendar)
    extras = {}
    for k, v in ds.variables.items():
        if k not in names and v.dtype.kind in "fiub" and {*v.dims} in ({tdim}, {ydim, xdim}):
            extras[k] = v.transpose(*[d for d in (tdim, ydim, xdim) if d in v.dims]).values
    same = {k: f for k, f in usable.items() if (f.dims, f.shape) == (fields[0].dims, fields[0].shape)}
    held = names if sum(f.size for f in fields) * 4 < memory else []
    try:
        same |= {k: same[k].load() for k in held}
    except Exception as e:
        raise InputError(f"cannot read {path}: its data are damaged ({type(e).__name__})")
    records, count = [], fields[0].sizes[members[0]] if members else 1
    for m in range(count):
        arrays = {k: f.isel({members[0]: m}) if members else f for k, f in same.items()}
        arrays = {k: f.values if k in held else f for k, f in arrays.items()}
        arrays = arrays if tdim else {k: Channel(f) for k, f in arrays.items()}
        records.append(Record(layout, [Piece(arrays, str(path))], hours, extras, notes=notes))
    if members:
        records[0].notes.append(f"the {count} members along {members[0]} are records of their own")
    return records


def zarr_arrays(path):
    """{name: array} of a Zarr store without names of dimensions, which xarray needs; None if it has them."""
    try:
        import zarr

        store = zarr.open(str(path), mode="r")
        arrays = dict(store.arrays()) if isinstance(store, zarr.Group) else {path.stem: store}
    except Exception as e:
        raise InputError(f"cannot read {path}: {reason(e)}")
    for a in arrays.values():
        if "_ARRAY_DIMENSIONS" in a.attrs or any(getattr(a.metadata, "dimension_names", None) or ()):
            return None
    return arrays or None


def kind_of(path):
    """numpy, netcdf, zarr or None, by the first bytes. Raises InputError for what is known and not read."""
    if path.is_dir():
        store = any((path / f).exists() for f in ("zarr.json", ".zgroup", ".zmetadata", ".zarray"))
        return "zarr" if store else None
    suffix = path.suffix.lower()
    with open(path, "rb") as f:
        start = f.read(8)
    if suffix in (".npy", ".npz") or start.startswith(b"\x93NUMPY"):
        return "numpy"
    for magic, text in FOREIGN.items():
        if start.startswith(magic):
            raise InputError(f"{path} {text}")
    return "netcdf" if start.startswith((b"CDF", b"\x89HDF")) or suffix in SUFFIXES else None


def read_file(path, wanted, group, memory):
    """The Records of one file or Zarr store, one a member."""
    kind, arrays = kind_of(path), None
    if kind is None:
        raise InputError(f"{path} is none of NetCDF, HDF5, Zarr, .npy and .npz")
    if kind == "numpy":
        return read_numpy(path, wanted)
    if kind == "zarr":
        try:  # the codec that would run code from the file is taken out before a store is opened
            from numcodecs.registry import codec_registry, entries

            codec_registry.pop("pickle", None)
            entries.pop("pickle", None)
        except ImportError:
            pass  # then xarray says what is missing
        else:
            arrays = zarr_arrays(path)
    if arrays is not None:
        return read_arrays(path, arrays, wanted, named=False)
    return read_xarray(path, wanted, group, memory)


def read_folder(path, wanted, notes):
    """The Records of the files and Zarr stores of a folder in order of their names, a list for each."""
    kinds, others, foreign = {}, [], None
    for p in sorted(p for p in path.iterdir() if not p.name.startswith(".")):
        try:
            kinds[p] = kind_of(p)
        except InputError as e:
            kinds[p], foreign = None, e
    files, others = [p for p in kinds if kinds[p]], [p.name for p in kinds if not kinds[p]]
    if not files and foreign:
        raise foreign
    if not files:
        folder = next((p for p in kinds if p.is_dir()), None)
        mend = f"it holds {', '.join(others[:5]) or 'nothing'}"
        mend = f"name one of its sub-folders, {folder}" if folder else mend
        raise InputError(f"folder {path} holds no NetCDF, HDF5, Zarr, .npy or .npz: {mend}")
    if others:
        notes.append(f"{len(others)} other entries of the folder are not read: {', '.join(others[:5])}")
    records = [read_file(p, wanted, "", MEMORY / len(files)) for p in files]
    empty = [p.name for p, r in zip(files, records) if not len(r[0])]
    if empty:
        notes.append(f"files without frames are left out: {', '.join(empty[:5])}")
    return [r for r in records if len(r[0])]


def numbered(files, notes):
    """[(member, Record)] of the Records of each file. A file of the very times of another is a further
    member, unless it repeats it; files without dates that begin at the same hour are records of their own."""
    first, parts, seen = files[0][0], [], {}
    apart = len(files) > 1 and not first.layout.dated and len({f[0].hours[0] for f in files}) == 1
    if apart and first.layout.calendar == "frames" and all(len(f[0]) == 1 for f in files):
        notes.append("files of one frame without a time are taken in order of their names")
        for i, r in enumerate(r for f in files for r in f):
            r.hours = r.hours + i
        apart = False
    for number, records in enumerate(files):
        same = seen.setdefault(records[0].hours.tobytes(), []) if len(records[0]) > 1 and not apart else []
        if any(same_frames(records[0], s, *thin(np.arange(len(s)), 10)) for s in same):
            notes.append(f"{records[0].pieces[0].source} repeats another file and is left out")
            continue
        parts += [((number if apart else len(same), m), r) for m, r in enumerate(records)]
        same.append(records[0])
    if any(len(same) > 1 for same in seen.values()):
        notes.append("files of the same times are members of an ensemble, records of their own")
    return parts


def same_frames(a, b, *frames):
    return all(np.array_equal(a.frames(i, i + 1), b.frames(i, i + 1), equal_nan=True) for i in frames)


def in_order(records, layout, notes):
    """Of one member's Records the pieces, hours, and where in the pieces each frame lies, in order of time
    and each time once. Raises InputError where two frames of one time differ."""
    pieces, hours = [p for r in records for p in r.pieces], np.concatenate([r.hours for r in records])
    whole, order = Record(layout, pieces, hours), np.argsort(hours, kind="stable")
    order = order[np.isfinite(hours[order])]
    if len(order) < len(hours):
        notes.append(f"{len(hours) - len(order)} frames without a time are left out")
    twice = 1 + np.flatnonzero(np.diff(hours[order]) < 1e-6)
    for i in thin(twice, 100):
        a, b = order[[i - 1, i]]
        if not np.array_equal(whole.frames(a, a + 1), whole.frames(b, b + 1), equal_nan=True):
            sources = dict.fromkeys(pieces[k].source for k in np.searchsorted(whole.ends, (a, b), "right"))
            when = date_text(hours[a], layout)
            raise InputError(f"{' and '.join(sources)}: two different frames of {when}: remove one of them")
    if len(twice):
        notes.append(f"{len(twice)} frames that repeat others are left out")
    index = np.delete(order, twice)
    moved = int((index != np.sort(index)).sum())
    if moved:
        notes.append(f"{moved} frames were not in order of time and are sorted")
    return pieces, hours[index], index


def join(parts, notes):
    """One Record of [(member, Record)]: members one after the other, each in order of time."""
    first, members = parts[0][1], {}
    reference = first.pieces[0].source
    for member, r in parts:
        source = r.pieces[0].source
        order = first.layout.order(r.layout, source, 1, reference)
        if r.layout.dated != first.layout.dated:
            which = source if first.layout.dated else reference
            raise InputError(f"{which} has no dates, and other files of the folder have")
        if order is not None:
            notes.append(f"{source} is reordered: its rows or columns have another order than {reference}")
        r.pieces = [p.like(order, dict(zip(r.layout.names, first.layout.names))) for p in r.pieces]
        members.setdefault(member, []).append(r)
    records, pieces, hours, index = [r for own in members.values() for r in own], [], [], []
    for own in members.values():
        p, h, i = in_order(own, first.layout, notes)
        index.append(i + sum(len(piece) for piece in pieces))
        pieces, hours = pieces + p, hours + [h]
    extras, index = {}, np.concatenate(index)
    for k, a in first.extras.items():
        if a.ndim == 2:
            extras[k] = a
        elif a.ndim == 1 and all(k in r.extras for r in records):
            extras[k] = np.concatenate([r.extras[k] for r in records])[index]
    return Record(first.layout, pieces, np.concatenate(hours), extras, index=index, notes=notes)


def open_record(dataset, variables="", size=32, seed=0):
    """The Record of `climate`, `gaussian` (size, seed), or a path: .npy, .npz, NetCDF, HDF5, Zarr, a group of
    those (FILE/GROUP), or a folder of them. variables: names, comma-separated, `name@value` for a level.
    Raises InputError."""
    if dataset in ("climate", "gaussian"):
        return builtin(dataset, size, seed)
    path, group, notes = Path(dataset).expanduser(), "", []
    wanted = [v.strip() for v in variables.split(",") if v.strip()]
    while not path.exists() and path != path.parent:
        path, group = path.parent, f"{path.name}/{group}".strip("/")
    if group and path.is_dir():
        raise InputError(f"dataset '{dataset}' is neither climate, gaussian nor an existing file or folder")
    folder = path.is_dir() and kind_of(path) is None
    files = read_folder(path, wanted, notes) if folder else [read_file(path, wanted, group, MEMORY)]
    if not files or not len(files[0][0]):
        raise InputError(f"{path} holds no frames")
    notes += dict.fromkeys(note for records in files for note in records[0].notes)
    record = join(numbered(files, notes), notes)
    for name in record.layout.names:
        if "/" in name or name in RESERVED or name in record.layout.coords:
            why = "'/' cannot be written" if "/" in name else "written samples have that name themselves"
            raise InputError(f"{path} has a variable '{name}', and {why}: rename it in the file")
    gaps = record.gaps()
    within = gaps & (np.diff(record.hours) > 0)  # not those from one member to the next
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
    both.

    frames: of the clips trained on, which set the size of a block; length: of the clips wanted, if another.
    Raises InputError where either part has none.
    """
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
        why = f"{int(record.gaps().sum())} gaps in time and blocks of {block} frames: take fewer --frames"
        raise InputError(f"the {part} data have no {length} consecutive frames, with {why}")
    return train, test


def covered_frames(starts, frames):
    """The frames that a set of clips touches, sorted."""
    return np.unique(starts[:, None] + np.arange(frames))


def apart(starts, frames):
    """The clips among these that do not overlap, first come first taken: for statistics, not for training."""
    chosen, end = [], -1
    for s in starts:
        if s >= end:
            chosen.append(s)
            end = s + frames
    return np.array(chosen)


def thin(index, count):
    """At most so many of an index, in order: one at random of each of as many equal stretches, for a fixed
    stride would see a daily cycle at the same hours only."""
    if len(index) <= count:
        return index
    place = (np.arange(count) + np.random.default_rng(0).random(count)) / count
    return index[(place * len(index)).astype(int)]


def pick(starts, seed, step, count):
    """`count` clip starts for one batch: a function of (seed, step) alone."""
    return starts[np.random.default_rng([seed, *np.atleast_1d(step)]).integers(0, len(starts), count)]


def read_clips(record, starts, frames):
    """Physical clips at the given starts, (B, C, T, H, W) float32 with NaN."""
    return np.stack([record.frames(s, s + frames) for s in starts])


def windows(length, frames, overlap, known=(), reverse=False):
    """The clips that cover a sequence one after the other: [(frame numbers (frames,), which to keep
    (frames,))].

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

DAYS = {"360_day": 360, "noleap": 365, "365_day": 365, "all_leap": 366, "366_day": 366}  # others 365.2425


@dataclass
class Conditions:
    """What a model is told of its clips: `hour`, `day` (of the year), and static fields (H, W), series (N,)
    and fields in time (N, H, W) of a record's extras.

    fitted: a dict of plain values each, name and channels, with either period (hours), classes, or mean and
    std. Numbers are standardised; a series of at most 16 whole numbers is taken for classes, one channel
    each.
    """

    fitted: list

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
                fitted.append({"name": name, "channels": 1, "mean": mean, "std": std})
        return cls(fitted)

    @classmethod
    def load(cls, state):
        return cls(state)

    def state(self):
        return self.fitted

    @property
    def names(self):
        return [f["name"] for f in self.fitted]

    @property
    def channels(self):
        """Of `values`: "told" and those of each condition; 0 if there are none."""
        return 1 + sum(f["channels"] for f in self.fitted) if self.fitted else 0

    @property
    def needs_calendar(self):
        return any("period" in f for f in self.fitted)

    def values(self, record, index, hours=None, size=None):
        """Channels (B, 1 + K, T, H, W) of the conditions at frames index (B, T); the first is 1, "told".

        hours (B, T) where they run past the record, whose series then keep their last value; size: (H, W) if
        not the record's. Raises InputError where these data cannot tell it.
        """
        if self.needs_calendar and not record.layout.dated:
            raise InputError("the model is told the hour or the day, and these data have no dates")
        hours, size = record.hours[index] if hours is None else hours, tuple(size or record.layout.size)
        index = np.minimum(index, len(record) - 1)
        channels = [np.ones((1, 1, 1, 1))]  # each broadcasts to (B, T, H, W)
        for f in self.fitted:
            if "period" in f:
                angle = 2 * np.pi * (hours / f["period"] % 1)[..., None, None]
                channels += [np.sin(angle), np.cos(angle)]
                continue
            if f["name"] not in record.extras:
                has = ", ".join(record.extras) or "nothing of the kind"
                raise InputError(f"the model is told '{f['name']}', and these data have {has}")
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

GAP = 0.25  # of `censored`: the dry value lies this far below the lightest rain, in Gaussian scores
HIDDEN, LEAST_SLOPE, LEARNT_FITS = 16, 0.1, 400  # of `learnt`: units per layer, least gradient, steps


def normal_cdf(y):
    return torch.special.ndtr(torch.as_tensor(y, dtype=torch.float64)).numpy()


def normal_quantile(p):
    return torch.special.ndtri(torch.as_tensor(p, dtype=torch.float64)).numpy()


def away(x, scale):
    """|x|, but not so near 0 that the slope of a root is infinite."""
    return np.maximum(np.abs(x), 1e-6 * scale)


FORMULAS = {  # odd functions of x and a typical |x|: y, its inverse, its slope
    "none": (lambda x, s: x, lambda y, s: y, lambda x, s: np.ones_like(x)),
    "sqrt": (
        lambda x, s: np.sign(x) * np.sqrt(np.abs(x)),
        lambda y, s: y * np.abs(y),
        lambda x, s: 0.5 / np.sqrt(away(x, s)),
    ),
    "cbrt": (lambda x, s: np.cbrt(x), lambda y, s: y**3, lambda x, s: 1 / (3 * np.cbrt(away(x, s)) ** 2)),
    "log": (
        lambda x, s: np.sign(x) * np.log1p(np.abs(x) / s),
        lambda y, s: np.sign(y) * np.expm1(np.abs(y)) * s,
        lambda x, s: 1 / (s + np.abs(x)),
    ),
}


def fit_quantile(x, floor, gap=0.0):
    """Gaussian scores: a monotone table of y = Phi^-1(share of training values up to x), linear between its
    knots.

    Knots are even in y as far as 20 training values lie beyond them; then come the extremes, then a straight
    line with the slope of the last unit of y. An atom at the floor is one value, `gap` below the score at
    which the rest begins. Returns knots (2, K) and the score of the floor, None without one.
    """
    n, rest = len(x), x if floor is None else x[x > floor]
    share = len(rest) / n
    tail = max(min(20 / n, 0.05 * share), 0.7 / n)
    edge, last = normal_quantile([tail if floor is None else 1 - share, 1 - tail])
    Y = np.linspace(edge, last, 257)
    X = np.quantile(rest, np.clip((normal_cdf(Y) - 1 + share) / share, 0, 1))
    extremes = normal_quantile([0.5 / n, 1 - 0.5 / n])
    X, Y = np.append(X, x.max()), np.append(Y, extremes[1])
    if floor is None:
        X, Y = np.append(x.min(), X), np.append(extremes[0], Y)
    else:
        X[0] = floor
    X, tied = np.unique(X, return_inverse=True)
    Y = np.bincount(tied, Y) / np.bincount(tied)
    slope = X[-1] - np.interp(Y[-1] - 1, Y, X), np.interp(Y[0] + 1, Y, X) - X[0]
    X, Y = np.append(X, X[-1] + 1e3 * slope[0]), np.append(Y, Y[-1] + 1e3)
    if floor is None:
        X, Y = np.append(X[0] - 1e3 * slope[1], X), np.append(Y[0] - 1e3, Y)
    return np.stack([X, Y]), None if floor is None else float(edge - gap)


def fit_censored(x, floor):
    """`quantile` with the dry atom apart: an estimate may err by the gap and is exactly dry."""
    if floor is None:
        raise InputError("transform 'censored' needs an atom at the minimum (dry cells): use quantile")
    return fit_quantile(x, floor, GAP)


def monotone(u, weights):
    """An increasing network of one number, 1 -> 16 -> 16 -> 1: every weight is a softplus. u (K,) -> (K,)"""
    h = u[:, None]
    for W, b in zip(weights[:-1:2], weights[1::2]):
        h = torch.tanh(h @ torch.nn.functional.softplus(W) + b)  # (K, 16)
    return LEAST_SLOPE * u + (h @ torch.nn.functional.softplus(weights[-1]))[:, 0]


def monotone_weights():
    """Weights before training, wide and narrow steps among them."""
    g = torch.Generator().manual_seed(0)
    shapes = (1, HIDDEN), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (HIDDEN, 1)
    sizes = torch.logspace(-0.5, 1.5, HIDDEN, dtype=torch.float64), 0, 1 / HIDDEN, 0, 1 / HIDDEN
    weights = []
    for shape, a in zip(shapes, sizes):
        w = torch.zeros(shape, dtype=torch.float64)
        if len(shape) == 2:  # softplus(w) is about a
            noise = 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
            w = torch.as_tensor(a, dtype=torch.float64).expm1().log() + noise
        weights.append(w)
    return weights


def fit_learnt(x, floor):
    """The dissertation's learnt transform: `monotone`, tabulated. Maximises the mean log slope at unit
    variance, the change-of-variables term, whose best y is normal.

    The table is linear between knots, so mean and variance of the training values, and with them the gradient
    through the normalisation, are exact from three moments per interval. Dry cells have no slope and count 0.
    """
    low, reach, rest = x.min(), np.ptp(x), x if floor is None else x[x > floor]
    X = [np.quantile(rest, np.linspace(0, 1, 257)), low + reach * np.linspace(-0.5, 1.5, 257)]
    X = np.unique(np.concatenate([*X, low + reach * np.array([-1e3, 0, 1e3])]))
    X = X[np.append(True, np.diff(X) > 1e-9 * reach)]  # closer knots have no slope in float64
    i = np.clip(np.searchsorted(X, x, "right") - 1, 0, len(X) - 2)
    t = (x - X[i]) / (X[i + 1] - X[i])
    wet = np.ones_like(x) if floor is None else x > floor
    moments = [np.bincount(i, a, len(X) - 1) / len(x) for a in (np.ones_like(x), t, t**2, wet)]
    share, first, second, wet = (torch.from_numpy(m) for m in moments)  # (K - 1,) each, by interval
    knots, u = torch.from_numpy(X), torch.from_numpy((X - np.median(x)) / x.std())
    weights = [w.requires_grad_() for w in monotone_weights()]

    def table():
        """Standardised y at the knots (K,), and the mean of log dy/dx over all training values."""
        Y = monotone(u, weights)
        y, d = Y[:-1], Y.diff()
        mean = (share * y + first * d).sum()
        std = ((share * y**2 + 2 * first * y * d + second * d**2).sum() - mean**2).sqrt()
        return (Y - mean) / std, (wet * (d / knots.diff() / std).log()).sum()

    with torch.enable_grad():
        optimizer = torch.optim.Adam(weights, 0.03)
        for _ in range(LEARNT_FITS):
            optimizer.zero_grad()
            (-table()[1]).backward()
            optimizer.step()
    return np.stack([X, table()[0].detach().numpy()]), None


TABLES = {"quantile": fit_quantile, "censored": fit_censored, "learnt": fit_learnt}
TRANSFORMS = (*FORMULAS, *TABLES)


def find_floor(x):
    """(floor or None, rounding): the value that over 5 % of x (n,) have and none lies below; of rain it is 0,
    up to rounding: packed zeros are 1e-19 and differences of sums -1e-9. Up to `rounding` above it, a value
    is the floor."""
    rounding = 1e-6 * float(x.std())
    if -1000 * rounding <= x.min() <= rounding and np.mean(np.abs(x) <= rounding) > 0.05:
        return 0.0, rounding
    low = float(x.min())
    return (low, rounding) if np.mean(x <= low + rounding) > 0.05 else (None, rounding)


NO_DATA = {-32768, -9999, -999, -99, 999, 9999, 32767, 99999, float(np.float32(1e20))}  # customary marks


def suspects(x):
    """[(value, count)] of extremes that are no weather: repeated or customary marks of no data, ten standard
    deviations away from the rest."""
    found, ends = [], (x.min(), x.max())
    rest = x[(x > ends[0]) & (x < ends[1])]
    for v in ends if len(rest) else ():
        count = int((x == v).sum())
        if abs(v - rest.mean()) > 10 * rest.std() and (count > 1 or float(v) in NO_DATA):
            found.append((float(v), count))
    return found


@dataclass
class Variable:
    """One variable and its transform: physical arrays of any shape <-> float64 of mean 0 and variance 1 in
    training.

    floor: what no value lies below and many have, or None; rounding: up to this above it a value is the
    floor; dry: up to this above it counts as dry, 0 without one; scale: of FORMULAS; knots (2, K): of TABLES;
    dry_score: y of the floor in them; low, high: range of the standardised training values; range, at_floor,
    missing (shares) and suspicious: of the training values, for describe.
    """

    name: str
    units: str
    long_name: str
    transform: str
    floor: float = None
    rounding: float = 0.0
    dry: float = 0.0
    scale: float = 1.0
    knots: torch.Tensor = None
    dry_score: float = None
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 0.0
    range: tuple = (0.0, 0.0)
    at_floor: float = 0.0
    missing: float = 0.0
    suspicious: tuple = ()

    @classmethod
    def fit(cls, name, attrs, transform, x):
        """From training values x (n,) with NaN. Raises InputError where there is nothing to learn."""
        missing, x = float(np.isnan(x).mean()), x[~np.isnan(x)].astype(np.float64)
        if not len(x):
            raise InputError(f"variable '{name}' has no data in the training clips")
        if x.min() == x.max():
            raise InputError(f"variable '{name}' is constant ({x[0]:g}) in the training clips")
        floor, rounding = find_floor(x)
        if transform == "auto":
            transform = "cbrt" if floor == 0 else "none"
        v = cls(name, attrs.get("units", ""), attrs.get("long_name", name), transform, floor, rounding)
        v.missing, v.suspicious, v.range = missing, suspects(x), (float(x.min()), float(x.max()))
        x = v.snapped(x)
        if floor is not None:
            v.dry, v.at_floor = 10.0 ** round(math.log10((x.mean() - floor) / 10)), float((x == floor).mean())
        if transform in TABLES:
            knots, v.dry_score = TABLES[transform](x, floor)
            v.knots = torch.from_numpy(knots)
        else:
            v.scale = float(np.median(np.abs(x[x != 0])))
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
        """dy/dx of encode."""
        x = np.asarray(x, np.float64)
        if self.knots is None:
            return FORMULAS[self.transform][2](x, self.scale) / self.std
        X, Y = self.knots.numpy()
        return (np.diff(Y) / np.diff(X))[np.clip(np.searchsorted(X, x) - 1, 0, len(X) - 2)] / self.std

    def describe(self):
        """One line: range, transform, floor and the share of values at it, missing values, suspicious
        ones."""
        share = f"({100 * self.at_floor:.3g} % of values)"
        floor = "no floor" if self.floor is None else f"floor {self.floor:g} {share}"
        span = f"{self.range[0]:.4g} to {self.range[1]:.4g} {self.units}".strip()
        text = f"{self.name}: {span}, transform {self.transform}, {floor}, {100 * self.missing:.3g} % missing"
        for value, count in self.suspicious:
            text += f"; WARNING: {value:g}, {count} times, far from others: if it is no data, set _FillValue"
        return text


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
    """Where a cell ever has data in these clips, (C, 1, H, W) float32, and whether no value is missing.

    Looks at all frames up to 1 GiB of them, at some of a larger record.
    """
    size = len(record.layout.names) * math.prod(record.layout.size)
    ever, complete = False, True
    for i in thin(covered_frames(starts, frames), max(1, 2**28 // size)):
        finite = np.isfinite(record.frames(i, i + 1))
        ever, complete = ever | finite, complete and bool(finite.all())
    return ever.astype(np.float32), complete


@dataclass
class Codec:
    """Physical clips <-> standardised ones: a list of Variable; valid (C, 1, H, W), 1 where a cell ever has
    data; complete: whether no value is missing in training."""

    variables: list
    valid: torch.Tensor
    complete: bool

    @classmethod
    def fit(cls, record, starts, frames, names):
        """Fitted on the training clips alone.

        names: one of TRANSFORMS for all variables or one each, comma-separated; 'auto' is cbrt for a variable
        with floor 0, else none. Raises InputError.
        """
        layout, names = record.layout, [n.strip() for n in names.split(",")]
        names = names * len(layout.names) if len(names) == 1 else names
        if len(names) != len(layout.names):
            each = f"{len(layout.names)} variables ({', '.join(layout.names)})"
            raise InputError(f"--transform names {len(names)} transforms for {each}: give one, or one each")
        wrong = next((n for n in names if n not in ("auto", *TRANSFORMS)), None)
        if wrong is not None:
            raise InputError(f"transform '{wrong}' is not one of auto, {', '.join(TRANSFORMS)}")
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
        """log |dy/dx| summed over each physical clip (B, C, T, H, W), for the change of variables: (B,)
        float64.

        None where a variable has a floor: rain has an atom at 0 and so no density in its own units.
        """
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
    for i, (up, down) in enumerate((("northward", "southward"), ("eastward", "westward"))):
        c, others = layout.axis(i), [k for k, o in layout.coords.items() if len(o["dims"]) == 2]
        text = f"{layout.dims[i]} {'by ' + ' and '.join(others) if others else 'without coordinates'}"
        if c is not None:
            a, b = places(c, None)[[0, -1]]
            rising = np.median(np.diff(places(c, None))) > 0 if a != b else None
            text = f"{layout.dims[i]} {a:g} to {b:g} {c['attrs'].get('units', '')}".strip()
            text += f" ({up if rising else down})" if layout.is_angle(i) and a != b else ""
        axes.append(text)
    dates = " to ".join(date_text(h, layout) for h in (record.hours.min(), record.hours.max()))
    step = f"one every {duration(layout.step_hours)}"
    step = "steps of unknown length" if layout.calendar == "frames" else step
    calendar = f"{layout.calendar} calendar" if layout.dated else "no dates"
    parts = [(len(s), len(covered_frames(s, frames))) for s in (train_starts, test_starts)]
    split = "training {} clips of {} frames, test {} of {}".format(*parts[0], *parts[1])
    lines = [
        f"grid      {by(layout.size)}: {', '.join(axes)}{', all the way round' if layout.wraps() else ''}",
        f"time      {len(record)} frames, {dates}, {calendar}, {step}, {int(record.gaps().sum())} gaps",
        *(f"variable  {v.describe()}" for v in codec.variables),
        f"split     {split}; a clip is {frames} consecutive frames",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# writing samples


def write_samples(folder, x, layout, history, lead, reference=None):
    """samples.npz, and samples.nc where xarray is installed; the names of the files written.

    x (N, C, T, H, W) physical; lead (T,): hours of the frames. With reference (R,), hours of the calendar
    from which `lead` counts, x is (R, M, C, T, H, W): an ensemble of M realisations for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coords = {k: c for k, c in layout.coords.items() if len(c["dims"])}
    origin = [] if reference is None else ["forecast_reference_time"]
    units = np.array([a.get("units", "1") for a in layout.attrs])
    arrays = {"samples": x, "channel": np.array(layout.names), "units": units, "time": lead}
    arrays |= {k: np.asarray(c["values"]) for k, c in coords.items()} | dict.fromkeys(origin, reference)
    with replacing(folder / "samples.npz") as f:
        np.savez(f, dims=np.array([*origin, "realization", "channel", "time", *layout.dims]), **arrays)
    try:
        import netCDF4  # noqa: F401, the engine that writes
        import xarray as xr
    except ImportError:
        return ["samples.npz"]
    dims = (*origin, "realization", "time", *layout.dims)
    fields = {n: (dims, x[..., i, :, :, :], a) for i, (n, a) in enumerate(zip(layout.names, layout.attrs))}
    mappings = {k: ((), c["values"], c["attrs"]) for k, c in layout.coords.items() if not len(c["dims"])}
    places = {k: (tuple(c["dims"]), c["values"], c["attrs"]) for k, c in coords.items()}
    ds = xr.Dataset(fields | mappings, places, {"Conventions": "CF-1.8", "history": history})
    ds["realization"] = ("realization", np.arange(x.shape[len(origin)]), {"standard_name": "realization"})
    since, unit = "reference time" if origin else "first frame", "hours"
    attrs = {"standard_name": "forecast_period", "long_name": f"time since the {since}", "units": unit}
    if layout.calendar == "frames":
        unit, attrs = "1", {"long_name": f"frames since the {since}", "units": "1"}
    ds["time"] = ("time", lead, attrs)
    if origin:
        attrs = {"standard_name": origin[0], "units": unit}
        if layout.dated:
            attrs |= {"units": hours_since(layout.calendar), "calendar": layout.calendar}
        ds[origin[0]] = (origin[0], reference, attrs)
    fill = {n: {"_FillValue": np.float32(np.nan), "zlib": True} for n in layout.names}
    with replacing(folder / "samples.nc") as f:
        ds.to_netcdf(f.name, engine="netcdf4", encoding=fill)
    return ["samples.npz", "samples.nc"]


def reserved(path, shape, dtype):
    """An array on disk, its space taken: a full disk is an error now, not a bus error later."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array


@contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is whole; a reader never sees half of it."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
