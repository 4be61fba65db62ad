"""Climate arrays in and out: the built-in weather, your own files, transforms, windows, statistics, written samples.

A field is stored as frames (time, y, x) per variable, in physical units; a clip is `frames` consecutive time steps,
(C, T, H, W), standardised to mean 0 and variance 1 for the network. NaN is "no data" everywhere.
"""
import math
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# the built-in weather: a damped, advected stochastic heat equation, censored and raised to a power

CELL_KM, ELL_KM, WIND_KM_H = 8.8, 300.0, 25.0  # grid spacing, correlation length, wind from the west
MEAN_SHARE, MEAN_HOURS, MEMORY_HOURS = 0.4, 48.0, 12.0  # the k = 0 mode: its variance and memory; memory at k = 0+
THRESHOLD, POWER, RATE = 0.80, 2.4, 0.85  # rain = RATE s(y, x) max(0, z - THRESHOLD)^POWER mm/h
SEASONAL = 0.05  # the threshold moves by this over the year: wetter winters
SEASONS, SEASON_HOURS = 160, 1440  # 40 years of four seasons, the first 60 days of each: 230400 frames


def spectrum(size):
    """Stationary variance, decay rate per hour and phase per hour of every Fourier mode, (M, M) each, M = 2 size.

    z_k(t + h) = exp(-r_k h - i k.U h) z_k(t) + sqrt(S_k (1 - exp(-2 r_k h))) xi on a doubly periodic box twice as wide
    as the domain, so that the cropped domain is not periodic; S_k ~ (k^2 + (2 pi / ell)^2)^-2, total variance 1
    (Sigrist, Kunsch and Stahel 2012; Hottovy and Stechmann 2015). The Nyquist modes are left out.
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
    """Exact covariance of the latent field at lags in time 0 .. frames - 1 and in space (modulo M = 2 size): (frames, M, M)"""
    S, rate, phase = spectrum(size)
    lags = torch.arange(frames, dtype=torch.float64)[:, None, None]
    return torch.fft.ifft2(S * torch.exp(-lags * (rate + 1j * phase)), norm="forward").real


def gaussian_covariance(frames, size):
    """Exact covariance of a `gaussian` clip of shape (frames, size, size) flattened: (D, D) float64."""
    C = lag_covariance(frames, size)
    t, y, x = (i.flatten() for i in torch.meshgrid(torch.arange(frames), *[torch.arange(size)] * 2, indexing="ij"))
    dt, dy, dx = (i[:, None] - i for i in (t, y, x))
    sign = torch.where(dt < 0, -1, 1)  # C(-h, -d) = C(h, d)
    return C[dt.abs(), (sign * dy) % (2 * size), (sign * dx) % (2 * size)]


def orography(size):
    """The fixed, smooth rain factor s(y, x): hills in the west, a rain shadow behind them. (size, size) float32"""
    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
    hill = lambda y0, x0, w: np.exp(-((y - y0) ** 2 + (x - x0) ** 2) / (2 * w**2))
    s = 0.9 + 0.9 * hill(0.35, 0.25, 0.12) + 0.6 * hill(0.7, 0.4, 0.15) - 0.35 * hill(0.45, 0.7, 0.2)
    return s.astype(np.float32)


def threshold(season):
    """Censoring threshold c of a season (0 is winter)."""
    return THRESHOLD - SEASONAL * np.cos(np.pi / 2 * season)


def rain_cdf(q, size):
    """Exact P(R <= q) of `climate` in every cell, over whole years: q (n,) mm/h -> (n, size, size)."""
    root = (np.asarray(q, np.float64)[:, None, None] / (RATE * orography(size))) ** (1 / POWER)
    return np.mean([torch.special.ndtr(torch.from_numpy(threshold(k) + root)).numpy() for k in range(4)], axis=0)


def rain_products(rho):
    """E[(z - c)^p (z' - c)^p] over the wet, of latent values with correlation rho (any shape), averaged over the year.

    The sum over n of a_n^2 rho^n with a_n the Hermite coefficients of the power (Mehler); they fall as n^-2, so that the
    300 used leave less than 1e-5 of it at rho = 1.
    """
    z, squares = np.linspace(0, 12, 20001), 0
    for season in range(4):
        u, before, h = z + threshold(season), 0.0, np.ones_like(z)
        f, a = z**POWER * np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi), []
        for n in range(300):  # normalised Hermite polynomials h_n
            a.append(np.trapezoid(f * h, z))
            before, h = h, (u * h - math.sqrt(n) * before) / math.sqrt(n + 1)
        squares = squares + np.array(a) ** 2 / 4
    return np.polynomial.polynomial.polyval(np.asarray(rho), squares)


def rain_law(size, frames, levels, dry=0.01):
    """Exact statistics of `climate` over whole years, all cells together: mean, std, share of dry cells (up to `dry`
    mm/h), quantiles at the levels (below 1), autocorrelation at lags 0 .. frames - 1, power spectra in space and time as
    spatial_spectrum and temporal_spectrum define them, and the mean of every cell (size, size)."""
    z, p = np.linspace(0, 12, 20001), RATE * orography(size).astype(np.float64)
    moment = lambda n: p**n * np.mean([np.trapezoid(z ** (n * POWER) * np.exp(-((z + threshold(k)) ** 2) / 2), z) for k in range(4)]) / math.sqrt(2 * math.pi)
    low, high = np.zeros(len(levels)), np.full(len(levels), p.max() * 10**POWER)
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        below = rain_cdf(middle, size).mean((1, 2)) < levels
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    dry, mean, variance = rain_cdf([dry], size).mean(), moment(1).mean(), moment(2).mean() - moment(1).mean() ** 2
    lagged = rain_products(lag_covariance(frames, size))  # (frames, 2 size, 2 size)
    in_time = (p**2).mean() * lagged[:, 0, 0]
    pairs = np.fft.ifft2(np.abs(np.fft.fft2(p, (2 * size, 2 * size))) ** 2).real * lagged[0]  # sum over pairs of cells at each lag
    waves = np.fft.rfft(np.eye(frames), axis=0)
    temporal = np.einsum("kt,tu,ku->k", waves, in_time[abs(np.subtract.outer(np.arange(frames), np.arange(frames)))], waves.conj()).real / frames
    return {"mean": mean, "std": math.sqrt(variance), "dry": dry, "quantiles": high.round(9), "map": moment(1), "autocorrelation": (in_time - mean**2) / variance,
            "spatial_power": rings(np.fft.fft2(pairs.reshape(2, size, 2, size).sum((0, 2))).real / size**2)[1], "temporal_power": temporal[1:]}  # fmt: skip


def rain(z, c):
    """Rain in mm/h of a latent field z (..., size, size) with threshold c, a number or a tensor that broadcasts."""
    return torch.from_numpy(RATE * orography(z.shape[-1])) * (z - c).clamp(min=0) ** POWER


def latent_modes(frames, size):
    """The exact law of a latent clip on the whole periodic box, by Fourier mode (M = 2 size): every mode is a series of
    `frames` independent of the others. Its variances (M, M, T) in units of white noise and unitary modes (M, M, T, T)."""
    S, rate, phase = spectrum(size)
    lag = torch.arange(frames, dtype=torch.float64)[:, None] - torch.arange(frames)  # (T, T)
    C = S[..., None, None] * torch.exp(-lag.abs() * rate[..., None, None] - 1j * lag * phase[..., None, None])
    w, U = torch.linalg.eigh(C)
    return (2 * size) ** 2 * w.clamp(min=0), U


def generate(path, kind, size, seed):
    """Write the built-in data: (SEASONS, SEASON_HOURS, size, size) float16 .npy, through a temporary file.

    Season k + 5 of every ten is season k with its latent field negated (both train or both test). Each has the exact law
    by itself; together their mean is exact, and that is most of the record's own sampling error (the slow k = 0 mode).
    """
    S, rate, phase = spectrum(size)
    generator = torch.Generator().manual_seed(seed)
    decay = torch.exp(-rate - 1j * phase).to(torch.complex64)
    kick = (S * -torch.expm1(-2 * rate)).sqrt().to(torch.complex64)
    draw = lambda: math.sqrt(2) * torch.randn(SEASONS // 4, *S.shape, dtype=torch.complex64, generator=generator)
    c = torch.from_numpy(threshold(np.arange(SEASONS))).float()[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        out = np.lib.format.open_memmap(temporary, "w+", np.float16, (SEASONS, SEASON_HOURS, size, size))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a bus error while writing the map
            with open(temporary, "r+b") as f:
                os.posix_fallocate(f.fileno(), 0, os.path.getsize(temporary))
        z = S.sqrt() * draw()
        for hour in tqdm(range(SEASON_HOURS), desc=f"making {path}", unit="h"):
            field = torch.fft.ifft2(z, norm="forward")[:, :size, :size]  # real and imaginary part: two seasons
            field = torch.stack([field.real, field.imag], 1).view(-1, 5, size, size)  # (SEASONS / 10, 5, size, size)
            field = torch.cat([field, -field], 1).flatten(0, 1)  # (SEASONS, size, size)
            out[:, hour] = field if kind == "gaussian" else rain(field, c)
            z = decay * z + kick * draw()
        out.flush()
        del out
        np.load(temporary, mmap_mode="r")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# reading: every source becomes a Climate, frames (time, y, x) per variable with coordinates and times


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and what to do."""


class Climate:
    """A record of C variables on one grid, read by frame; large arrays stay on disk.

    pieces: consecutive stretches of the record, each a list of C array-likes (n, H, W); hours: (N,) float64, increasing
    within a run (any other step is a gap); names, attrs: per variable; dims: names of (y, x); coords: {name: {"dims",
    "values", "attrs"}}; calendar; block: frames per block of the train/test split, or None for the default; extras:
    {name: array (H, W) or (N,)}, static fields and series that a model may be conditioned on.
    """

    def __init__(self, pieces, hours, names, attrs, dims=("y", "x"), coords=None, calendar="standard", block=None, extras=None):
        self.extras = extras or {}
        self.pieces, self.hours, self.names, self.attrs = pieces, np.asarray(hours, np.float64), names, attrs
        self.dims, self.coords, self.calendar, self.block = tuple(dims), coords or {}, calendar, block
        self.ends = np.cumsum([len(p[0]) for p in pieces])
        self.size = tuple(pieces[0][0].shape[1:])  # (H, W)
        steps = np.diff(self.hours)
        self.step_hours = float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0

    def __len__(self):
        return len(self.hours)

    def frames(self, start, stop):
        """Frames [start, stop) in physical units, (C, T, H, W) float32; NaN (and infinities) are no data."""
        parts, begin = [], 0
        for piece, end in zip(self.pieces, self.ends):
            lo, hi = max(start, begin), min(stop, end)
            if lo < hi:
                parts.append(np.stack([np.asarray(a[lo - begin : hi - begin], np.float32) for a in piece]))
            begin = end
        x = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
        return np.where(np.isfinite(x), x, np.float32(np.nan))

    def wraps(self):
        """True if x is a longitude that goes all the way round."""
        c = self.coords.get(self.dims[1])
        if c is None or len(c["dims"]) != 1:
            return False
        if not str(c["attrs"].get("units", "")).startswith("degree") and self.dims[1].lower() not in ("lon", "longitude"):
            return False
        step = np.diff(np.asarray(c["values"], np.float64))
        return len(step) > 2 and bool(np.ptp(step) < 0.01 * abs(step[0]) and abs(abs(step[0]) * (len(step) + 1) - 360) < abs(step[0]) / 2)


def builtin(kind, size, seed, folder="data"):
    """The built-in `climate` (rain, mm/h) or `gaussian` (its latent field) data, made once and memory-mapped."""
    path = Path(folder) / f"{kind}_{size}_seed{seed}.npy"
    if not path.exists():
        generate(path, kind, size, seed)
    array = np.load(path, mmap_mode="r")
    array = array.reshape(-1, size, size)
    hours = (np.arange(SEASONS)[:, None] * 90 * 24 + np.arange(SEASON_HOURS)).ravel()  # 360-day years
    km = {"units": "km", "long_name": "distance"}
    coords = {d: {"dims": [d], "values": np.arange(size) * CELL_KM, "attrs": km} for d in ("y", "x")}
    name, attrs = ("rain", {"units": "mm h-1", "long_name": "rain rate"}) if kind == "climate" else ("z", {"units": "1"})
    extras = {"orography": orography(size), "season": np.repeat(np.arange(SEASONS) % 4, SEASON_HOURS)}
    return Climate([[array]], hours, [name], [attrs], ("y", "x"), coords, "360_day", SEASON_HOURS, extras)


TIME_NAMES, Y_NAMES, X_NAMES = (
    ("time", "t", "valid_time", "date"),
    ("latitude", "lat", "y", "rlat", "grid_latitude", "projection_y_coordinate", "nj", "south_north"),
    ("longitude", "lon", "x", "rlon", "grid_longitude", "projection_x_coordinate", "ni", "west_east"),
)


def which_dim(ds, dim, axis, names):
    """Is this dimension of the data set the given axis, by its CF attributes or its name?"""
    attrs = ds[dim].attrs if dim in ds.coords else {}
    return attrs.get("axis") == axis or attrs.get("standard_name") in names or dim.lower() in names


def read_xarray(path, variables, memory=2**30):
    """NetCDF or Zarr by xarray: CF names and attributes, packed integers, any calendar; up to so many bytes are held."""
    try:
        import xarray as xr
    except ImportError:
        raise InputError(f"reading {path} needs xarray: pip install xarray netCDF4 zarr cftime")
    zarr = Path(path).is_dir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            coder = xr.coders.CFDatetimeCoder(time_unit="s") if hasattr(xr, "coders") else True
            ds = xr.open_dataset(path, engine="zarr" if zarr else None, decode_times=coder, chunks=None)
    except Exception as e:  # a damaged file, or the backend is not installed
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(f"cannot read {path}: {reason} (needs xarray with {'zarr' if zarr else 'netCDF4'})")
    usable = {}
    for name, da in ds.data_vars.items():
        da = da.squeeze([d for d in da.dims if da.sizes[d] == 1 and not which_dim(ds, d, "T", TIME_NAMES)])
        dims = [next((d for d in da.dims if which_dim(ds, d, *a)), None) for a in (("T", TIME_NAMES), ("Y", Y_NAMES), ("X", X_NAMES))]
        if da.dtype.kind in "fiu" and None not in dims and len(da.dims) == 3:
            usable[name] = da.transpose(*dims)
    if not variables:
        if not usable:
            raise InputError(f"{path} has no variable with dimensions time, y, x; it has {', '.join(f'{k}{list(v.dims)}' for k, v in ds.data_vars.items())}")
        variables = list(usable)
    missing = [v for v in variables if v not in usable]
    if missing:
        raise InputError(f"{path} has no field '{missing[0]}' with dimensions time, y, x; it has {', '.join(usable) or 'none'}")
    fields = [usable[v] for v in variables]
    if len({f.shape for f in fields}) > 1 or len({f.dims for f in fields}) > 1:
        raise InputError(f"the fields {', '.join(variables)} of {path} lie on different grids; choose one grid with --variables")
    tdim, ydim, xdim = fields[0].dims
    calendar, hours = "none", np.arange(fields[0].shape[0], dtype=np.float64)
    if tdim in ds.coords:
        t = ds[tdim].values
        if t.dtype.kind == "M":
            calendar, hours = "standard", t.astype("datetime64[s]").astype(np.float64) / 3600
        elif t.dtype == object:
            import cftime

            calendar = t[0].calendar
            hours = np.asarray(cftime.date2num(t, hours_since(calendar), calendar=calendar), np.float64)
        else:
            hours = t.astype(np.float64)
    coords = {}
    for name, c in fields[0].coords.items():
        if c.dtype.kind in "fiu" and c.ndim and set(c.dims) <= {ydim, xdim}:
            coords[name] = {"dims": list(c.dims), "values": c.values, "attrs": plain(c.attrs)}
    extras = {}
    for name, v in {**ds.data_vars, **ds.coords}.items():
        if name not in variables and v.dtype.kind in "fiu" and set(v.dims) in ({tdim}, {ydim, xdim}):
            extras[name] = v.transpose(*[d for d in (tdim, ydim, xdim) if d in v.dims]).values
    attrs = [plain(f.attrs) for f in fields]
    fits = sum(f.size for f in fields) * 4 < memory  # larger ones are read window by window
    try:
        arrays = [f.values if fits else f for f in fields]
    except Exception as e:
        raise InputError(f"cannot read {path}: its data are damaged ({type(e).__name__})")
    return Climate([arrays], hours, list(variables), attrs, (ydim, xdim), coords, calendar, extras=extras)


def hours_since(calendar):
    """Units of Climate.hours: numpy's epoch for its calendar, for others one within the years that models write."""
    return f"hours since {1970 if calendar == 'standard' else 1850}-01-01"


def plain(attrs):
    """Attributes as plain strings and numbers, the only ones a checkpoint holds."""
    keep = {k: v.item() if isinstance(v, np.generic) else v for k, v in attrs.items()}
    return {k: v for k, v in keep.items() if isinstance(v, (str, int, float)) and not k.startswith("_") and k != "grid_mapping"}


def read_numpy(path, variables):
    """.npy: (time, y, x) or (time, channel, y, x). .npz: one array (time, y, x) per variable, 1-D time (hours), y and x."""
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = {k: loaded[k] for k in loaded.files} if hasattr(loaded, "files") else {Path(path).stem: loaded}
    except Exception as e:
        raise InputError(f"cannot read {path}: {str(e).splitlines()[0] if str(e) else type(e).__name__}")
    fields = {k: a for k, a in arrays.items() if a.ndim == 3 and a.dtype.kind in "fiu"}
    for k, a in arrays.items():
        if a.ndim == 4 and a.dtype.kind in "fiu":
            fields.update({f"{k}_{i}" if a.shape[1] > 1 else k: a[:, i] for i in range(a.shape[1])})
    for v in variables:
        if v not in fields:
            raise InputError(f"{path} has no field '{v}' with dimensions time, y, x; it has {', '.join(fields) or 'none'}")
    names = list(variables) or list(fields)
    if not names:
        raise InputError(f"{path} has no array of shape (time, y, x) or (time, channel, y, x)")
    if len({fields[n].shape for n in names}) > 1:
        raise InputError(f"the fields {', '.join(names)} of {path} have different shapes; choose one grid with --variables")
    n, H, W = fields[names[0]].shape
    axis = lambda keys, length: next((arrays[k] for k in arrays if k.lower() in keys and arrays[k].shape == (length,)), None)
    hours = axis(TIME_NAMES, n)
    if hours is not None and hours.dtype.kind == "M":
        hours = hours.astype("datetime64[s]").astype(np.float64) / 3600
    coords, degrees = {}, {k.lower() for k in arrays} & {"lat", "latitude", "lon", "longitude"}
    for d, v, unit in (("y", axis(Y_NAMES, H), "degrees_north"), ("x", axis(X_NAMES, W), "degrees_east")):
        if v is not None:
            coords[d] = {"dims": [d], "values": np.array(v, np.float64), "attrs": {"units": unit} if degrees else {}}
    extras = {k: a for k, a in arrays.items() if a.shape in ((n,), (H, W)) and a.dtype.kind in "fiu"}
    return Climate([[fields[k] for k in names]], np.arange(n) if hours is None else hours, names, [{} for _ in names], ("y", "x"), coords, "none", extras=extras)


def open_climate(dataset, variables="", size=32, seed=0):
    """`climate`, `gaussian`, or a path: .npy, .npz, NetCDF, Zarr, or a folder of such files in order of their names."""
    if dataset in ("climate", "gaussian"):
        return builtin(dataset, size, seed)
    path, wanted = Path(dataset), [v.strip() for v in variables.split(",") if v.strip()]
    if not path.exists():
        raise InputError(f"dataset '{dataset}' is neither climate, gaussian nor an existing file or folder")
    is_zarr = lambda p: p.is_dir() and any((p / f).exists() for f in ("zarr.json", ".zgroup", ".zmetadata"))
    read = lambda p, files=1: read_numpy(p, wanted) if p.suffix in (".npy", ".npz") else read_xarray(p, wanted, 2**30 / files)
    if not path.is_dir() or is_zarr(path):
        return read(path)
    known = (".npy", ".npz", ".nc", ".nc4", ".cdf", ".h5")
    files = sorted(p for p in path.iterdir() if p.suffix in known or is_zarr(p))
    if not files:
        raise InputError(f"folder {dataset} holds no {', '.join(known)} or Zarr data")
    parts = [read(p, len(files)) for p in files]
    first = parts[0]
    for p, f in zip(parts, files):
        same = p.coords.keys() == first.coords.keys() and all(np.array_equal(c["values"], first.coords[k]["values"], equal_nan=True) for k, c in p.coords.items())
        if p.size != first.size or len(p.names) != len(first.names) or not same or p.calendar != first.calendar or (f.suffix != ".npy" and p.names != first.names):
            raise InputError(f"{f} has another grid, calendar or other variables than {files[0]}; a folder is one record in time, all variables in every file")
    if first.calendar == "none" and all(p.hours[0] == 0 for p in parts):  # no times: one file a run of its own
        starts = np.cumsum([0] + [len(p) + 1e6 for p in parts[:-1]])
        hours = np.concatenate([p.hours + s for p, s in zip(parts, starts)])
    else:
        hours = np.concatenate([p.hours for p in parts])
    series = [k for k, a in first.extras.items() if a.ndim == 1 and all(k in p.extras for p in parts)]
    extras = {k: a for k, a in first.extras.items() if a.ndim == 2} | {k: np.concatenate([p.extras[k] for p in parts]) for k in series}
    return Climate([p.pieces[0] for p in parts], hours, first.names, first.attrs, first.dims, first.coords, first.calendar, extras=extras)


# ----------------------------------------------------------------------------------------------------------------------
# windows and batches


def runs(climate, frames):
    """Starts of all clips of consecutive frames: none crosses a gap (a step not positive or over 1.5 times the median)."""
    steps = np.diff(climate.hours)
    gap = (steps <= 0) | (steps > 1.5 * climate.step_hours)  # (N - 1,) between i and i + 1
    crossed = np.concatenate([[0], np.cumsum(gap)])  # gaps before each frame
    starts = np.arange(max(len(climate) - frames + 1, 0))
    return starts[crossed[starts + frames - 1] == crossed[starts]]


def split_windows(climate, frames, length=None):
    """Starts of all clips of consecutive frames, (train, test): every fifth block is test data, no clip is partly in one.

    frames: of the clips trained on, which set the size of a block; length: of the clips wanted, if another. Raises
    InputError where either part has none.
    """
    N, length = len(climate), length or frames
    if N < 2 * frames:
        raise InputError(f"the dataset has {N} frames; clips of --frames={frames} need at least {2 * frames}")
    block = climate.block or max(N // min(max(N // (3 * frames), 5), 50), frames)
    blocks = N // block
    number = np.minimum(np.arange(N) // block, blocks - 1)
    held_out = number % 5 == 4 if blocks >= 5 else number == blocks - 1
    starts, before = runs(climate, length), np.concatenate([[0], np.cumsum(held_out)])  # held-out frames before each
    inside = before[starts + length] - before[starts]
    train, test = starts[inside == 0], starts[inside == length]
    if not len(train) or not len(test):
        raise InputError(f"training or test data have no {length} consecutive frames: too many gaps, or fewer frames than that in a block of {block}")
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
    """At most so many of an index, in order: one at random of each of as many equal stretches, for a fixed stride would
    see a daily cycle at the same hours only."""
    if len(index) <= count:
        return index
    return index[((np.arange(count) + np.random.default_rng(0).random(count)) * len(index) / count).astype(int)]


def pick(starts, seed, step, count):
    """`count` clip starts for one batch: a function of (seed, step) alone."""
    return starts[np.random.default_rng([seed, *np.atleast_1d(step)]).integers(0, len(starts), count)]


def clips(climate, starts, frames):
    """Physical clips at the given starts, (B, C, T, H, W) float32 with NaN."""
    return np.stack([climate.frames(s, s + frames) for s in starts])


def windows(length, frames, overlap, known=(), circular=False, reverse=False):
    """The clips that cover a sequence one after the other: [(frame numbers (frames,), which of them to keep (frames,))].

    Each begins with `overlap` frames kept from the one before and draws the rest, what that drew beyond them again: so the
    last one sees both of its ends. known: frame numbers given from the start; a clip that does not reach the next of them
    is kept up to the last it sees. circular: the last one ends with the first `overlap` frames; reverse: from the end back.
    """
    frames, total = min(frames, length), length + (overlap if circular else 0)
    known = sorted(length - 1 - k for k in known) if reverse else known
    starts = [0]
    while starts[-1] + frames < total:
        start, end = starts[-1], starts[-1] + frames
        seen = [k for k in known if start + overlap <= k < end]
        keep_to = seen[-1] + 1 if seen and known[-1] >= end else end
        starts.append(min(keep_to - overlap, total - frames))
    kept = [after - start + overlap for start, after in zip(starts, starts[1:])] + [frames]
    plan = [((s + np.arange(frames)) % length, np.arange(frames) < n) for s, n in zip(starts, kept)]
    return [(length - 1 - w[::-1], k[::-1].copy()) for w, k in plan] if reverse else plan


# ----------------------------------------------------------------------------------------------------------------------
# conditions: the known part of a clip, and what else a model may be told

KNOWN = {  # is frame t of T known?
    "nothing": lambda t, T, n: t < 0,
    "prefix": lambda t, T, n: t < n,
    "suffix": lambda t, T, n: t >= T - n,
    "ends": lambda t, T, n: (t < n) | (t >= T - n),
    "every": lambda t, T, n: t % n == 0,
}
KINDS = (*KNOWN, "blocks", "coarse")


def random_known(rng, kinds, factors, T, H, W):
    """What is known of one training clip: mask (T, H / factor, W / factor) and factor, that of block means. n and the boxes are drawn."""
    kind = kinds[rng.integers(len(kinds))]
    if kind in KNOWN and T < (3 if kind == "ends" else 2):  # no frame would stay unknown
        kind = "nothing"
    if kind == "coarse":
        factors = [f for f in factors if H % f == 0 == W % f]
        factor = factors[rng.integers(len(factors))] if factors else 1
        return np.full((T, H // factor, W // factor), float(factor > 1), np.float32), factor
    mask = np.ones((T, H, W), np.float32)
    if kind == "blocks":  # one to three boxes are hidden, in some of the frames
        for _ in range(rng.integers(1, 4)):
            (h, w), (a, b) = rng.integers(1, [max(H * 3 // 4, 1) + 1, max(W * 3 // 4, 1) + 1]), np.sort(rng.integers(0, T + 1, 2))
            y, x = rng.integers(0, [H - h + 1, W - w + 1])
            mask[a if b > a else 0 : b if b > a else T, y : y + h, x : x + w] = 0
        return mask, 1
    highest = {"every": T, "ends": (T + 1) // 2}.get(kind, T)  # at least one frame stays unknown
    n = rng.integers(2, highest + 1) if kind == "every" else rng.integers(1, max(highest, 2))
    t = np.arange(T) + (rng.integers(n) if kind == "every" else 0)
    return mask * KNOWN[kind](t, T, n)[:, None, None], 1


DAYS = {"360_day": 360, "noleap": 365, "365_day": 365, "all_leap": 366, "366_day": 366}


def fit_conditions(climate, names, index):
    """One plain dict per name, fitted on the frames in index: 'hour' and 'day' (of the year), static fields and series.

    Numbers are standardised; a series of at most 16 whole numbers is taken for classes, one channel each.
    """
    fitted = []
    for name in names:
        if name in ("hour", "day"):
            if climate.calendar == "none":
                raise InputError(f"--condition={name} needs times with a calendar, which this dataset has not")
            fitted.append({"name": name, "channels": 2, "period": 24.0 * (1 if name == "hour" else DAYS.get(climate.calendar, 365.2425))})
            continue
        if name not in climate.extras:
            raise InputError(f"--condition={name} is not one of known, {', '.join(KINDS)}, hour, day" + "".join(f", {k}" for k in climate.extras))
        v = climate.extras[name]
        v = v[index] if v.ndim == 1 else v
        classes = np.unique(v) if v.ndim == 1 and v.dtype.kind in "iu" else []
        if 2 <= len(classes) <= 16:
            fitted.append({"name": name, "channels": len(classes), "classes": classes.tolist()})
        else:
            fitted.append({"name": name, "channels": 1, "mean": float(np.nanmean(v)), "std": float(np.nanstd(v)) or 1.0})
    return fitted


def condition_values(climate, fitted, index, hours=None, size=None):
    """Channels (B, 1 + K, T, H, W) of the conditions at frames index (B, T), the first is 1: told. hours (B, T) where they
    run past the record, of which the series then keep their last value; size: (H, W) if not the record's."""
    hours, index = climate.hours[index] if hours is None else hours, np.minimum(index, len(climate) - 1)
    channels, everywhere = [np.ones((1, 1, 1, 1))], lambda v: v[..., None, None]  # each (B, T, H, W), or 1 for any of them
    for f in fitted:
        if "period" not in f and f["name"] not in climate.extras:
            raise InputError(f"this dataset has no '{f['name']}', which the model was trained to be told; it has {', '.join(climate.extras) or 'nothing of the kind'}")
        if "period" in f:
            angle = 2 * np.pi * (hours / f["period"] % 1)
            channels += [everywhere(np.sin(angle)), everywhere(np.cos(angle))]
        elif "classes" in f:
            channels += [everywhere(climate.extras[f["name"]][index] == k) for k in f["classes"]]
        else:
            v = np.nan_to_num((np.asarray(climate.extras[f["name"]], np.float32) - f["mean"]) / f["std"])
            channels.append(everywhere(v[index]) if v.ndim == 1 else v[None, None])
    return torch.from_numpy(np.stack([np.broadcast_to(v, (*index.shape, *(size or climate.size))) for v in channels], 1).astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------------
# transforms: per variable, y = (g(x) - mean) / std, all exactly invertible

GAP = 0.25  # of `censored`: the dry value lies this far below the lightest rain, in Gaussian scores; wider gaps make more dry cells
HIDDEN, LEAST_SLOPE, LEARNT_FITS = 16, 0.1, 400  # of `learnt`: units per layer, minimum gradient, steps before training
normal_cdf = lambda y: torch.special.ndtr(torch.as_tensor(y, dtype=torch.float64)).numpy()
normal_quantile = lambda p: torch.special.ndtri(torch.as_tensor(p, dtype=torch.float64)).numpy()


def fit_scale(x, floor):
    """A typical |x|, all that the closed forms need."""
    return {"scale": float(np.median(np.abs(x[x != 0])))}


def fit_quantile(x, floor, gap=0.0):
    """Gaussian scores: a monotone table of y = Phi^-1(share of training values up to x), linear between its knots.

    Knots are even in y as far as 20 training values lie beyond them; then come the extremes, then a straight line with
    the slope of the last unit of y. An atom at the floor is one value, `gap` below the score at which the rest begins.
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
    return {"x": torch.from_numpy(X), "y": torch.from_numpy(Y), "dry": None if floor is None else float(edge - gap)}


def fit_censored(x, floor):
    """`quantile` with the dry atom set apart: an estimate of a dry cell may err by the gap, and it is exactly dry."""
    if floor is None:
        raise InputError("transform 'censored' is for a variable with an atom at its minimum (dry cells): use quantile")
    return fit_quantile(x, floor, GAP)


def monotone(u, weights):
    """An increasing network of one number, 1 -> 16 -> 16 -> 1: every weight is a softplus. u (K,) -> (K,)"""
    h = u[:, None]
    for W, b in zip(weights[:-1:2], weights[1::2]):
        h = torch.tanh(h @ torch.nn.functional.softplus(W) + b)  # (K, 16)
    return LEAST_SLOPE * u + (h @ torch.nn.functional.softplus(weights[-1]))[:, 0]


def learnt_table(f):
    """Standardised y at the knots (K,), and the mean of log dy/dx over all training values: differentiable.

    The transform is linear between knots, so mean and variance of the training values, and with them the gradient
    through the normalisation, are exact from three moments per interval. Dry cells have no slope and count 0.
    """
    share, first, second, wet = f["moments"]  # (K - 1,) each: shares of the values, sums of t and t^2 in the interval, wet share
    Y = monotone((f["x"] - f["centre"]) / f["scale"], f["weights"])
    y, d = Y[:-1], Y.diff()
    mean = (share * y + first * d).sum()
    std = ((share * y**2 + 2 * first * y * d + second * d**2).sum() - mean**2).sqrt()
    return (Y - mean) / std, (wet * (d / f["x"].diff() / std).log()).sum()


def fit_learnt(x, floor):
    """The dissertation's learnt transform: `monotone`, tabulated. Maximises the mean log slope at unit variance.

    That is the change-of-variables term alone, whose best y is normal; train.py goes on jointly with the network.
    """
    low, reach, rest = x.min(), np.ptp(x), x if floor is None else x[x > floor]
    X = np.unique(np.concatenate([np.quantile(rest, np.linspace(0, 1, 257)), low + reach * np.linspace(-0.5, 1.5, 257), low + reach * np.array([-1e3, 0, 1e3])]))
    X = X[np.append(True, np.diff(X) > 1e-9 * reach)]  # closer knots have no slope in float64
    i = np.clip(np.searchsorted(X, x, "right") - 1, 0, len(X) - 2)
    t = (x - X[i]) / (X[i + 1] - X[i])
    wet = np.ones_like(x) if floor is None else x > floor
    moments = torch.from_numpy(np.stack([np.bincount(i, a, len(X) - 1) for a in (np.ones_like(x), t, t**2, wet)]) / len(x))
    g = torch.Generator().manual_seed(0)
    raw = lambda a, *shape: torch.log(torch.expm1(torch.as_tensor(a, dtype=torch.float64))) + 0.1 * torch.randn(shape, generator=g, dtype=torch.float64)
    bias = lambda: torch.zeros(HIDDEN, dtype=torch.float64)
    weights = [raw(torch.logspace(-0.5, 1.5, HIDDEN), 1, HIDDEN), bias(), raw(1 / HIDDEN, HIDDEN, HIDDEN), bias(), raw(1 / HIDDEN, HIDDEN, 1)]  # wide and narrow steps
    f = {"x": torch.from_numpy(X), "dry": None, "centre": float(np.median(x)), "scale": float(x.std()), "moments": moments, "weights": weights}
    with torch.enable_grad():
        optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], 0.03)
        for _ in range(LEARNT_FITS):
            optimizer.zero_grad()
            (-learnt_table(f)[1]).backward()
            optimizer.step()
    f["weights"] = [w.detach() for w in weights]  # without the last gradient
    return f | {"y": learnt_table(f)[0]}


def learn(physical, x, transform):
    """Standardised clips x (B, C, T, H, W) made again with gradients into learnt transforms, and the gain: the mean log
    slope per entry, the change-of-variables term that the loss falls by. On x's device."""
    x, gain = x.clone(), 0
    for i, f in enumerate(transform):
        if "weights" in f:
            Y, slope = learnt_table(f)
            v = torch.from_numpy(physical[:, i]).double()  # (B, T, H, W)
            k = (torch.searchsorted(f["x"], v.nan_to_num(f["centre"]), right=True) - 1).clamp(0, len(Y) - 2)
            t = (v - f["x"][k]) / f["x"].diff()[k]
            x[:, i] = torch.where(t.isfinite(), torch.lerp(Y[k], Y[k + 1], t.nan_to_num()).float(), x[:, i].cpu()).to(x)
            gain = gain + slope / len(transform)
    return x, gain


def refresh(transform, freeze=False):
    """Tables of the learnt transforms after a step of their weights; frozen, they are tables and no more."""
    for f in transform:
        if "weights" in f:
            f["y"] = learnt_table(f)[0].detach()
            used = f["moments"][0].nonzero().flatten()
            f["low"], f["high"] = float(f["y"][used[0]]), float(f["y"][used[-1] + 1])
            if freeze:
                del f["weights"], f["moments"]


def to_table(x, f):
    y = np.interp(x, f["x"], f["y"])
    return y if f["dry"] is None else np.where(x <= f["floor"], f["dry"], y)


def from_table(y, f):
    return np.interp(y, f["y"], f["x"])  # the first knot of a table with an atom is the floor: all below it is dry


def table_slope(x, f):
    X, Y = f["x"].numpy(), f["y"].numpy()
    return (np.diff(Y) / np.diff(X))[np.clip(np.searchsorted(X, x) - 1, 0, len(X) - 2)]


away = lambda x, f: np.maximum(np.abs(x), 1e-6 * f["scale"])  # the slope of a root at exactly 0 is infinite
TRANSFORMS = {  # fit(x, floor) -> f of plain values and tensors; g(x, f), its inverse(y, f), its slope(x, f). The closed
    # forms are odd functions, so that they hold for either sign
    "none": (fit_scale, lambda x, f: x, lambda y, f: y, lambda x, f: np.ones_like(x)),
    "sqrt": (fit_scale, lambda x, f: np.sign(x) * np.sqrt(np.abs(x)), lambda y, f: y * np.abs(y), lambda x, f: 0.5 / np.sqrt(away(x, f))),
    "cbrt": (fit_scale, lambda x, f: np.cbrt(x), lambda y, f: y**3, lambda x, f: 1 / (3 * np.cbrt(away(x, f)) ** 2)),
    "log": (fit_scale, lambda x, f: np.sign(x) * np.log1p(np.abs(x) / f["scale"]), lambda y, f: np.sign(y) * np.expm1(np.abs(y)) * f["scale"], lambda x, f: 1 / (f["scale"] + np.abs(x))),
    "quantile": (fit_quantile, to_table, from_table, table_slope),
    "censored": (fit_censored, to_table, from_table, table_slope),
    "learnt": (fit_learnt, to_table, from_table, table_slope),
}


def fit_transform(climate, train_starts, frames, names):
    """One plain dict per variable, fitted on the training clips alone (at most about 4e6 values of each).

    names: one name for all variables or one each, comma-separated; 'auto' is cbrt for a variable with floor 0, else
    none. A variable has a floor (rain: 0) if over 5 % of its values equal its minimum: what is written never lies below,
    and up to `drizzle` above it, the power of ten nearest to a tenth of the mean, counts as dry.
    """
    names = [n.strip() for n in names.split(",")]
    names = names * len(climate.names) if len(names) == 1 else names
    if len(names) != len(climate.names):
        raise InputError(f"--transform names {len(names)} transforms for {len(climate.names)} variables ({', '.join(climate.names)})")
    index = covered_frames(train_starts, frames)
    index = thin(index, max(1, int(4e6 / np.prod(climate.size))))
    sample = np.concatenate([climate.frames(i, i + 1) for i in index], 1)  # (C, n, H, W)
    fitted = []
    for name, variable, x in zip(names, climate.names, sample):
        if name not in ("auto", *TRANSFORMS):
            raise InputError(f"transform '{name}' is not one of auto, {', '.join(TRANSFORMS)}")
        x = x[np.isfinite(x)].astype(np.float64)
        if not len(x):
            raise InputError(f"variable '{variable}' has no finite values in the training clips")
        if x.min() == x.max():
            raise InputError(f"variable '{variable}' is constant ({x.min():g}) in the training clips: there is nothing to learn")
        floor = float(x.min()) if np.mean(x == x.min()) > 0.05 else None
        if name == "auto":
            name = "cbrt" if floor == 0 else "none"
        fit, g, *_ = TRANSFORMS[name]
        f = {"name": name, "floor": floor, **fit(x, floor)}
        y = g(x, f)
        mean, std = float(y.mean()), float(y.std())
        low, high = float((y.min() - mean) / std), float((y.max() - mean) / std)  # range of the standardised values
        drizzle = 0.0 if floor is None else 10.0 ** round(math.log10((x.mean() - floor) / 10))
        fitted.append({**f, "mean": mean, "std": std, "low": low, "high": high, "drizzle": drizzle})
    return fitted


def normalise(x, transform):
    """Physical (..., C, T, H, W) with NaN -> standardised torch float32 with 0 for no data, and the mask (1 is data)."""
    y = np.stack([(TRANSFORMS[f["name"]][1](x[..., i, :, :, :], f) - f["mean"]) / f["std"] for i, f in enumerate(transform)], -4)
    mask = np.isfinite(y)
    return torch.from_numpy(np.where(mask, y, 0).astype(np.float32)), torch.from_numpy(mask.astype(np.float32))


def denormalise(y, transform, valid=None):
    """The inverse, (..., C, T, H, W) torch -> numpy float32; never below a variable's floor; NaN where valid (C, 1, H, W) is 0."""
    y = y.detach().cpu().numpy().astype(np.float64)
    x = np.stack([TRANSFORMS[f["name"]][2](y[..., i, :, :, :] * f["std"] + f["mean"], f) for i, f in enumerate(transform)], -4)
    for i, f in enumerate(transform):
        if f["floor"] is not None:
            x[..., i, :, :, :] = np.maximum(x[..., i, :, :, :], f["floor"])
    return (x if valid is None else np.where(np.asarray(valid) > 0, x, np.nan)).astype(np.float32)


def log_slope(x, transform):
    """log |dy/dx| of the transform summed over each clip (B,), for the change of variables; x (B, C, T, H, W) physical.

    None where a variable has a floor: rain has an atom at 0 and so no density in its own units.
    """
    if any(f["floor"] is not None for f in transform):
        return None
    parts = [np.log(TRANSFORMS[f["name"]][3](x[:, i].astype(np.float64), f) / f["std"]) for i, f in enumerate(transform)]  # (C, B, T, H, W)
    return torch.from_numpy(np.sum(parts, axis=(0, 2, 3, 4), where=np.isfinite(x).swapaxes(0, 1)))


def valid_cells(climate, index):
    """Where a cell ever has data in the given frames, (C, 1, H, W) float32, and whether any value is missing.

    Looks at all frames up to 1 GiB of them, at some of a larger record.
    """
    ever, complete = False, True
    for i in thin(index, max(1, 2**28 // (len(climate.names) * math.prod(climate.size)))):
        finite = np.isfinite(climate.frames(i, i + 1))
        ever, complete = ever | finite, complete and finite.all()
    return ever.astype(np.float32), not complete


# ----------------------------------------------------------------------------------------------------------------------
# verification: pure functions of physical clips of one variable, (N, T, H, W), NaN-aware

LEVELS = [1 - 10.0**-n + k * 10.0 ** -(n + 1) for n in range(6) for k in range(9)]  # the dissertation's 54 quantile levels
SHOWN, LAGS, RETURNS = (0.9, 0.99, 0.999, 0.9999), (1, 3, 6), (2, 10, 50)  # rows of the table; return periods in clips
RESAMPLES = 400  # of the bootstrap


def latitude_weights(coords, dims):
    """Area of a cell by row, (H,), where y is a latitude; else None."""
    c = coords.get(dims[0])
    if c is None or len(c["dims"]) != 1 or not (str(c["attrs"].get("units", "")).startswith("degree") or dims[0].lower() in ("lat", "latitude")):
        return None
    return np.cos(np.deg2rad(np.asarray(c["values"], np.float64))).clip(0)


def area_mean(a, axis, area=None):
    """Mean of a (..., H, W) over axis but for NaN, each cell weighted by the area of its row (H,) if that is given."""
    if area is None:
        return np.nanmean(a, axis)
    there = np.isfinite(a)
    return np.sum(area[:, None] * a, axis, where=there) / np.sum(area[:, None] * there, axis)


def rings(power):
    """Radial average of the power of the waves of fft2, (H, W), against wavenumber in cycles per cell. Two (K,) arrays."""
    H, W = power.shape
    n = min(H, W)
    ring = np.rint(np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)) * n).astype(int)
    total, count = np.bincount(ring.ravel(), power.ravel()), np.bincount(ring.ravel())
    k = np.arange(1, n // 2 + 1)
    return k / n, total[k] / count[k]


def spatial_spectrum(x):
    """Radially averaged power of single frames against wavenumber in cycles per cell. Two (K,) arrays."""
    return rings((np.abs(np.fft.fft2(x)) ** 2).mean((0, 1)) / (x.shape[-2] * x.shape[-1]))


def temporal_spectrum(x):
    """Power of a cell's time series, averaged over cells, against frequency in cycles per time step. Two (K,) arrays."""
    T = x.shape[1]
    power = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean((0, 2, 3)) / T
    return np.arange(1, T // 2 + 1) / T, power[1:]


def spell_lengths(wet):
    """How many runs of 1 .. T wet frames in a row the cells have, (T,); runs are cut at the ends of a clip. wet (n, T, H, W)"""
    T, run, counts = wet.shape[1], 0, 0
    for t in range(T):
        run = (run + 1) * wet[:, t]
        last = run * ~wet[:, t + 1] if t < T - 1 else run  # (n, H, W): length where a run ends, else 0
        counts = counts + np.bincount(last.ravel(), minlength=T + 1)
    return counts[1:]


def tally(x, edges, wet, weights, centre):
    """Everything the statistics need of clips x (n, T, H, W), as sums: sums over blocks add up, so a bootstrap is cheap.

    edges: values at which to count; wet: above it a cell is not dry; weights (H,) of the rows; no data is `centre`.
    """
    n, T, H, W = x.shape
    valid = np.isfinite(x)
    w = valid * weights[:, None]
    a = np.where(valid, x - centre, 0.0)
    pair = [(w[:, : T - l] * valid[:, l:], a[:, : T - l], a[:, l:]) for l in range(T)]
    lags = [[v.sum(), (v * b).sum(), (v * c).sum(), (v * b * c).sum()] for v, b, c in pair]
    largest = np.where(valid, x, -np.inf).max((1, 2, 3))
    return {
        "clips": n, "count": w.sum(), "sum": (w * a).sum(), "square": (w * a**2).sum(), "cell": a.sum((0, 1)), "cell_count": valid.sum((0, 1)),
        "at": np.bincount(np.searchsorted(edges, x[valid]), w[valid], len(edges)), "maxima": np.bincount(np.searchsorted(edges, largest[largest > -np.inf]), minlength=len(edges)),
        "dry": (w * (x <= wet)).sum(), "spells": spell_lengths(x > wet), "lags": np.transpose(lags), "space": n * spatial_spectrum(a)[1], "time": n * temporal_spectrum(a)[1],
    }  # fmt: skip


def statistics(S, edges, centre):
    """The statistics that sums S of `tally` give: numbers, curves and the mean of every cell."""
    m = S["sum"] / S["count"]
    variance = max(S["square"] / S["count"] - m**2, 1e-30)
    cdf, cdf_maxima = S["at"].cumsum() / S["count"], S["maxima"].cumsum() / S["maxima"].sum()
    count, first, second, product = S["lags"]
    lengths, spells = np.arange(1, len(S["spells"]) + 1), max(S["spells"].sum(), 1)
    with np.errstate(invalid="ignore"):  # cells without data
        return {
            "mean": m + centre, "std": math.sqrt(variance), "dry": S["dry"] / S["count"], "wet_spell": S["spells"] @ lengths / spells, "spells": S["spells"] / spells,
            "cdf": cdf, "quantiles": np.interp(LEVELS, cdf, edges), "returns": np.interp(1 - 1 / np.array(RETURNS), cdf_maxima, edges),
            "autocorrelation": ((product - m * (first + second)) / count + m**2) / variance, "spatial_power": S["space"] / S["clips"], "temporal_power": S["time"] / S["clips"],
            "map": S["cell"] / S["cell_count"] + centre,
        }  # fmt: skip


def few(n):
    """Blocks of n clips of one record, which are not independent: about sqrt(n) clips long, at least 10, at most 100."""
    return min(n, max(round(math.sqrt(n)), 10), 100)


def bootstrap(samples, truth, sums, groups=None, paired=False):
    """Sums over samples (N, ...) and over true clips (M, ...), by blocks: (draw, the least number of blocks).

    sums: clips -> {name: sum}. draw() -> [sums of samples, of truth]; draw(rng): over blocks drawn with replacement.
    Samples are independent, or `groups` runs of them are: a sequence cut in pieces, the members of one condition.
    Held-out clips are not: see `few`.
    paired: group i was made of, or for, truth[i]: the two are drawn together.
    Of n blocks n - 1 are drawn, which gives means their variance (Rao and Wu 1988; n would give (n - 1) / n of it). With
    the ten blocks of a short record a 95 % interval still holds the truth only about 90 % of the time.
    """
    groups = groups or len(samples)
    counts, blocks = [few(groups)] * 2 if paired else [min(groups, 100), few(len(truth))], []
    for x, n, units in zip((samples, truth), counts, (groups, len(truth))):
        at = np.linspace(0, units, n + 1).astype(int) * (len(x) // units)
        parts = [sums(x[i:j]) for i, j in zip(at, at[1:])]
        blocks.append({k: np.array([p[k] for p in parts], np.float64) for k in parts[0]})

    def draw(rng=None):
        weights = [np.ones(n) if rng is None else rng.multinomial(n - 1, np.full(n, 1 / n)).astype(np.float64) for n in counts]
        return [{k: np.tensordot(w, v, 1) for k, v in b.items()} for w, b in zip(weights[:1] * 2 if paired else weights, blocks)]

    return draw, min(counts)


def row(unit, error, noise, *values):
    """A line of the table: the values of samples, held-out data and exact law where known, the error (a fraction where the
    unit is % or pt), and its 95 % bootstrap interval; of a distance, which has no values, the 95 % bound of what the
    sampling error alone gives. A difference inside the sampling error is marked as such."""
    interval = None
    if np.isfinite(noise).all():
        interval = (error - np.quantile(noise, (0.975, 0.025))).tolist() if values else [0.0, float(np.quantile(noise, 0.95))]
    within = interval is not None and (interval[0] <= 0 <= interval[1] if values else error <= interval[1])
    number = lambda v: float(v) if np.isfinite(v) else None
    return {"values": [number(v) for v in values], "error": number(error), "unit": unit, "interval": interval, "within_sampling_error": bool(within)}


POWERS = {"spatial_power": "spatial power", "temporal_power": "temporal power"}


def differences(s, r, scale):
    """Samples' statistics minus the reference's, each in its scale; of power also in dB."""
    d = {k: (s[k] - r[k]) / scale.get(k, 1) for k in ("mean", "std", "dry", "wet_spell", "cdf", "quantiles", "returns", "autocorrelation", *POWERS, "map")}
    return d | {k + "_db": 10 * np.log10(np.maximum(s[k], 1e-30) / np.maximum(r[k], 1e-30)) for k in POWERS}


def distances(d, edges, area):
    """One number >= 0 for each curve of differences d: Wasserstein-1, errors of power and their log-spectral distance, mean |bias|."""
    out = {"wasserstein": (np.abs(d["cdf"])[:-1] * np.diff(edges)).sum(), "bias": np.nansum(area * np.abs(d["map"])) / area.sum()}
    for k in POWERS:
        if len(d[k]):
            out |= {k + " median": np.median(np.abs(d[k])), k + " worst": np.abs(d[k]).max(), k + " db": np.sqrt(np.mean(d[k + "_db"] ** 2))}
    return out


def compare(samples, truth, floor=None, dry=0.01, weights=None, exact=None, units="", groups=None, paired=False):
    """Statistics of sampled against true clips (N, T, H, W), a dict of plain values for verify.json.

    Errors are against the exact law where one is given (rain_law), else against the held-out clips; those of mean,
    quantiles, maxima and the mean map are relative for a variable with a floor (rain) and in units of the true standard
    deviation otherwise (relative errors of kelvins mean nothing). weights: (H,) area of the rows, or None.
    Sampling errors by `bootstrap`, which explains groups and paired; fewer than five blocks say nothing of them.
    """
    exact, weights = exact or {}, np.ones(samples.shape[2]) if weights is None else weights
    centre, wet = float(np.nanmean(truth, dtype=np.float64)), math.inf if floor is None else floor + dry
    bins = np.linspace(min(np.nanmin(a) for a in (samples, truth)), max(np.nanmax(a) for a in (samples, truth)), 241)
    edges = [bins]  # the distribution function is counted at the quantiles asked for, where it is exact, and between them
    for a in (samples, truth):
        edges += [np.quantile(a[np.isfinite(a)], [*LEVELS, *normal_cdf(np.linspace(-4.5, 4.5, 181))])]
        edges += [np.quantile(np.where(np.isfinite(a), a, -np.inf).max((1, 2, 3)), 1 - 1 / np.array(RETURNS))]
    edges = np.unique(np.concatenate(edges).astype(samples.dtype))
    draw_sums, blocks = bootstrap(samples, truth, lambda x: tally(x, edges, wet, weights, centre), groups, paired)
    draw = lambda rng=None: [statistics(S, edges, centre) for S in draw_sums(rng)]
    s, t = draw()
    r = t | exact  # what the samples are held against
    wettable = floor is not None
    relative = lambda v: np.where(v == 0, 1, np.abs(v)) if wettable else r["std"]
    usual = np.where(r["map"] > 0.1 * np.nanmean(r["map"]), r["map"], np.nan) if wettable else r["std"]  # no ratio to cells where it hardly ever rains
    scale = {k: relative(r[k]) for k in ("mean", "quantiles", "returns")} | {k: np.maximum(r[k], 1e-30) for k in ("std", "wet_spell", *POWERS)} | {"map": usual}
    D = differences(s, r, scale)
    area = np.where(np.isfinite(D["map"]), weights[:, None], 0.0)
    rng, noise, bounds = np.random.default_rng(0), [], []
    for _ in range(RESAMPLES):
        a, b = draw(rng)
        d = {k: v - D[k] for k, v in differences(a, b | exact, scale).items()}
        bounds.append(distances(d, edges, area))
        noise.append({k: v for k, v in d.items() if k not in ("map", "cdf")})  # a map per draw would be large
    enough = blocks >= 5
    noise, bounds = ({k: np.where(enough, [n[k] for n in draws], np.nan) for k in draws[0]} for draws in (noise, bounds))

    known = lambda k: {name: v[k] for name, v in (("samples", s), ("held_out", t), ("exact", exact)) if k in v}
    line = lambda unit, k, *i: row(unit, D[k][i], noise[k][(slice(None), *i)], *(np.asarray(v)[i] for v in known(k).values()))
    part = "%" if wettable else "std"
    unit = lambda k: {"wasserstein": units, "bias": part}.get(k, "dB" if k.endswith("db") else "%")
    far = {k: row(unit(k), v, bounds[k]) for k, v in distances(D, edges, area).items()}
    rows = {"mean": line(part, "mean"), "standard deviation": line("%", "std")}
    if wettable:
        rows |= {"dry fraction": line("pt", "dry"), "wet spell, frames": line("%", "wet_spell")}
    rows |= {f"quantile {l}": line(part, "quantiles", int(np.argmin(np.abs(np.array(LEVELS) - l)))) for l in SHOWN}
    rows |= {f"clip maximum, 1 in {n}": line(part, "returns", i) for i, n in enumerate(RETURNS)}
    rows |= {f"autocorrelation, lag {l}": line("", "autocorrelation", l) for l in LAGS if l < samples.shape[1]}
    rows["Wasserstein-1"] = far["wasserstein"]
    rows |= {f"{name}, {label}": far[f"{k} {v}"] for k, name in POWERS.items() for v, label in (("median", "median error"), ("worst", "worst error"), ("db", "distance")) if f"{k} {v}" in far}
    rows["mean |bias| per cell"] = far["bias"]
    beyond = math.sqrt(max(0.0, far["bias"]["error"] ** 2 - np.mean(bounds["bias"]) ** 2)) if enough else np.nan  # independent errors add in squares
    rows["mean |bias| beyond sampling"] = row(part, beyond, np.nan)

    curves = {k: {name: v.tolist() for name, v in known(k).items()} for k in ("quantiles", "returns", "autocorrelation", *POWERS)}
    for k, c in curves.items() if enough else ():  # where perfect samples of this number would lie
        c["band"] = [(r[k] + scale.get(k, 1) * q).tolist() for q in np.quantile(noise[k], (0.025, 0.975), axis=0)]
    curves["quantiles"]["levels"], curves["returns"]["clips"] = LEVELS, list(RETURNS)
    curves["spatial_power"]["frequency"], curves["temporal_power"]["frequency"] = (f(np.zeros((1, *samples.shape[1:])))[0].tolist() for f in (spatial_spectrum, temporal_spectrum))
    share = lambda cdf: np.diff(np.interp(bins[::6], edges, cdf)) + np.eye(1, 40)[0] * cdf[0]  # an atom at the minimum lies in the first bin
    curves["histogram"] = {"edges": bins[::6].tolist(), "samples": share(s["cdf"]).tolist(), "held_out": share(t["cdf"]).tolist()}
    if wettable:
        curves["wet_spells"] = {name: v.tolist() for name, v in known("spells").items()}
    tidy = lambda a: [[float(f"{v:.4g}") if np.isfinite(v) else None for v in values] for values in a]
    return {"samples": len(samples), "held_out_clips": len(truth), "rows": rows, "curves": curves,
            "mean_map": {"samples": tidy(s["map"]), "reference": tidy(r["map"])}, "bias_map": tidy(D["map"])}  # fmt: skip


def cross_correlations(samples, truth, names, weights=None, groups=None, paired=False):
    """Correlation of every pair of variables in the same cell and frame, rows as in `compare`. (N, C, T, H, W) both"""
    weights = np.ones(samples.shape[3]) if weights is None else weights

    def products(x):
        valid = np.isfinite(x).all(1, keepdims=True)
        a, w = np.where(valid, x - centre, 0.0), valid * weights[:, None]
        return {"count": w.sum(), "sum": (w * a).sum((0, 2, 3, 4)), "product": np.einsum("nithw,njthw->ij", w * a, a)}

    def correlation(S):
        m = S["sum"] / S["count"]
        C = S["product"] / S["count"] - np.outer(m, m)
        return C / np.sqrt(np.outer(np.diag(C), np.diag(C)))

    centre = np.nanmean(truth, (0, 2, 3, 4), keepdims=True, dtype=np.float64)[0]
    draw, _ = bootstrap(samples, truth, products, groups, paired)
    rng, (s, t) = np.random.default_rng(0), map(correlation, draw())
    noise = np.array([np.subtract(*map(correlation, draw(rng))) - (s - t) for _ in range(RESAMPLES)])
    return {f"{a} with {b}": row("", s[i, j] - t[i, j], noise[:, i, j], s[i, j], t[i, j]) for i, a in enumerate(names) for j, b in enumerate(names) if i < j}


# ----------------------------------------------------------------------------------------------------------------------
# ensembles: forecasts (M, N, ...) of what was then seen, truth (N, ...); NaN in truth is left out


def crps(ensemble, truth):
    """Continuous ranked probability score, fair: E|X - y| - E|X - X'| / 2 with the members as a sample (Ferro 2014). (N, ...)

    One member is a point forecast, whose score is its absolute error.
    """
    M = len(ensemble)
    error = np.abs(ensemble - truth).mean(0)
    rank = np.arange(1, M + 1).reshape(-1, *[1] * truth.ndim)  # sum over pairs |Xi - Xj| = sum (2 i - M - 1) X_(i)
    return error - ((2 * rank - M - 1) * np.sort(ensemble, 0)).sum(0) / max(M * (M - 1), 1)


def energy_score(ensemble, truth, area=None):
    """The same for whole fields, |.| the Euclidean norm over y, x per cell (root mean square): (M, N, T, H, W) -> (N, T)."""
    norm = lambda d: np.sqrt(area_mean(np.where(np.isfinite(truth), d, np.nan) ** 2, (-2, -1), area))
    M = len(ensemble)
    pairs = sum(norm(ensemble[i] - ensemble[j]) for i in range(M) for j in range(i))
    return np.mean([norm(e - truth) for e in ensemble], 0) - pairs / max(M * (M - 1), 1)


def spread_skill(ensemble, truth, axis, area=None):
    """Spread, root of the mean variance of the members times (M + 1) / M, and RMSE of their mean: equal if calibrated."""
    M, seen = len(ensemble), np.isfinite(truth)
    spread = area_mean(np.where(seen, ensemble.var(0, ddof=1) * (M + 1) / M, np.nan), axis, area) ** 0.5
    return spread, area_mean((ensemble.mean(0) - truth) ** 2, axis, area) ** 0.5


def rank_histogram(ensemble, truth, seed=0):
    """How often the truth has each rank among the members, ties drawn at random: flat if calibrated. (M + 1,) shares"""
    seen = np.isfinite(truth)
    below, tied = (ensemble < truth).sum(0)[seen], (ensemble == truth).sum(0)[seen]
    rank = below + np.random.default_rng(seed).integers(0, tied + 1)
    return np.bincount(rank, minlength=len(ensemble) + 1) / max(len(rank), 1)


def verify_ensemble(ensemble, truth, references, lead, least=-math.inf, g=np.asarray, area=None):
    """Scores per frame of one variable, a dict of plain values. ensemble (M, N, T, H, W), truth (N, T, H, W) with NaN.

    references: {name: (M', N, T, H, W) or broadcastable} to compare with, persistence and climatology say; lead (T,) hours;
    least: values up to it count as equal in the ranks (dry is dry: no rank for 0.001 mm/h above 0); g: the transform in
    which spread and error are compared once more, where a few extremes do not make up most of the squared error; area (H,):
    weights of rows, of all but the ranks.
    """
    frames, over = np.isfinite(truth).any((0, 2, 3)), (0, 2, 3)
    ensemble, truth, lead = ensemble[:, :, frames], truth[:, frames], np.asarray(lead)[frames]
    out = {"members": len(ensemble), "conditions": len(truth), "lead_hours": lead.tolist(), "crps": area_mean(crps(ensemble, truth), over, area).tolist()}
    for name, r in references.items():
        r = np.broadcast_to(r, (len(r), len(truth), len(frames), *truth.shape[2:]))[:, :, frames]
        out[f"crps_{name}"] = area_mean(crps(r, truth), over, area).tolist()
    out["energy_score"] = np.nanmean(energy_score(ensemble, truth, area), 0).tolist()
    if len(ensemble) > 1:
        out["spread"], out["rmse"] = (v.tolist() for v in spread_skill(ensemble, truth, over, area))
        some = np.isfinite(truth).any((1, 2, 3))
        for name, f in (("spread_skill", lambda a: a), ("spread_skill_transformed", g)):
            v, e = (a[some] ** 2 for a in spread_skill(f(ensemble), f(truth), (1, 2, 3), area))  # (N,)
            (draw, blocks), rng = bootstrap(v, e, lambda a: {"sum": a.sum()}, paired=True), np.random.default_rng(0)
            ratio = lambda sums: math.sqrt(sums[0]["sum"] / sums[1]["sum"])
            interval = np.quantile([ratio(draw(rng)) for _ in range(1000)], (0.025, 0.975)).tolist() if blocks >= 5 else []
            out[name] = [ratio(draw()), *interval]  # with its 95 % interval
        out["rank_histogram"] = rank_histogram(*(np.maximum(a, least) for a in (ensemble, truth))).tolist()
    return out


def drift(x, y, joins, frames, floor=None, dry=0.01, area=None):
    """Do long sequences (N, L, H, W) stay what they were? {statistic: [first `frames` frames, last ones, ratio, its interval]}.

    x physical, y transformed (of rain itself a few storms decide the variance). joins: frames at which a window began to be
    new; the correlation with the frame before is compared with that elsewhere. The 95 % interval (low, high) is by a
    bootstrap over sequences, if there are five. area (H,): weights of rows, not of spectra.
    """
    anomaly, heavy, at = y - np.nanmean(y), np.nanquantile(x, 0.99), np.isin(np.arange(1, x.shape[1]), joins)
    share = lambda above: np.where(np.isnan(x), np.nan, x > above)
    fields = {"mean": x, "variance, transformed": anomaly**2, "share above quantile 0.99": share(heavy)} | ({} if floor is None else {"wet fraction": share(floor + dry)})
    mean = lambda a: area_mean(a, (1, 2, 3), area)
    pairs = {name: [mean(part) for part in (a[:, :frames], a[:, -frames:])] for name, a in fields.items()}  # (N,) each
    a, b = (np.stack([spatial_spectrum(one[None])[1] for one in np.nan_to_num(part)]) for part in (anomaly[:, :frames], anomaly[:, -frames:]))  # (N, K)
    K = a.shape[1]
    for i in range(min(3, K)):
        some = slice(i * K // 3, (i + 1) * K // 3) if K >= 3 else slice(i, i + 1)
        pairs[f"spatial power, transformed, wavenumbers {some.start + 1} to {some.stop}"] = [a[:, some].mean(1), b[:, some].mean(1)]
    products = anomaly[:, 1:] * anomaly[:, :-1] / np.nanvar(y)
    pairs["lag-1 autocorrelation, transformed, inside and across joins"] = [mean(products[:, which]) for which in (~at, at)]
    drawn = np.random.default_rng(0).multinomial(len(x) - 1, np.full(len(x), 1 / len(x)), 1000)  # how often each sequence is, as in `bootstrap`
    ratio = lambda a, b: np.divide(b, a, out=np.full(np.shape(a), np.nan), where=a != 0)
    interval = lambda a, b: np.nanquantile(ratio(drawn @ a, drawn @ b), (0.025, 0.975)).tolist() if len(x) >= 5 else []
    return {name: [float(a.mean()), float(b.mean()), float(ratio(a.mean(), b.mean())), *interval(a, b)] for name, (a, b) in pairs.items()}


# ----------------------------------------------------------------------------------------------------------------------
# writing samples


def write_samples(folder, x, meta, history, hours, reference=None):
    """samples.npz, and samples.nc where xarray is installed; meta: see train.describe; hours (T,): time of the frames.

    x (N, C, T, H, W) physical, or with reference (R,), hours of the calendar from which `hours` counts, (R, M, C, T, H, W):
    an ensemble of M realisations for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    coords = {k: np.asarray(c["values"]) for k, c in meta["coords"].items()}
    lead = ["forecast_reference_time"] if reference is not None else []
    dims = (*lead, "realization", "time", *meta["dims"])
    arrays = {"samples": x, "channel": np.array(meta["names"]), "units": np.array([str(a.get("units", "1")) for a in meta["attrs"]]), "time": hours, **coords}
    if lead:
        arrays[lead[0]] = reference
    with replacing(folder / "samples.npz") as f:
        np.savez(f, dims=np.array([*lead, "realization", "channel", "time", *meta["dims"]]), **arrays)
    try:
        import netCDF4  # noqa: F401, the engine that writes
        import xarray as xr
    except ImportError:
        return ["samples.npz"]
    ds = xr.Dataset(
        {n: (dims, x[..., i, :, :, :], a) for i, (n, a) in enumerate(zip(meta["names"], meta["attrs"]))},
        {k: (tuple(c["dims"]), coords[k], c["attrs"]) for k, c in meta["coords"].items()},
        {"Conventions": "CF-1.8", "history": history},
    )
    ds["realization"] = ("realization", np.arange(x.shape[len(lead)]), {"standard_name": "realization"})
    ds["time"] = ("time", hours, {"standard_name": "forecast_period", "long_name": f"time since the {'reference time' if lead else 'first frame'}", "units": "hours"})
    if lead:
        attrs = {"standard_name": "forecast_reference_time", "units": "hours"}
        if meta["calendar"] != "none":
            attrs |= {"units": hours_since(meta["calendar"]), "calendar": meta["calendar"]}
        ds[lead[0]] = (lead[0], reference, attrs)
    with replacing(folder / "samples.nc") as f:
        ds.to_netcdf(f.name, engine="netcdf4", encoding={n: {"_FillValue": np.float32(np.nan), "zlib": True} for n in meta["names"]})
    return ["samples.npz", "samples.nc"]


@contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is whole, flushed and closed; a reader never sees half of it."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
