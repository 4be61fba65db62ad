"""Numbers against closed forms and independent implementations: `pytest test_diffusion.py`.

Real fields are tried where the environment variable CLIMATE_FILES names a folder of them. Tests that take
minutes, or print a table, run with SLOW=1.
"""

import copy
import importlib.util
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import cache, partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion as D
import model
import sample
import train

try:
    import cftime
    import netCDF4  # noqa: F401
    import numcodecs.pickles
    import xarray as xr
    import zarr  # noqa: F401
except ImportError:
    xr = None


def skip(*args, **kwargs):
    pytest.skip("needs xarray, cf_xarray, netCDF4, zarr and cftime")


if xr is None:  # a test that makes or reads a file is skipped
    xr = SimpleNamespace(Dataset=skip, merge=skip, date_range=skip, open_dataset=skip)
    data.read_file = skip

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="slow: set SLOW=1")
f64 = partial(torch.tensor, dtype=torch.float64)
close = torch.testing.assert_close


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar_denoiser(w):
    """The exact denoiser of independent Gaussians: E[x | z] = alpha w z / (alpha^2 w + sigma^2)."""

    def denoise(z, logsnr):
        alpha, sigma = D.scales(logsnr, z)
        return alpha * w * z / (alpha**2 * w + sigma**2)

    return denoise


MEAN, STD = 1.2, 0.4  # of the right half of data with two peaks
PEAKS = torch.distributions.MixtureSameFamily(
    torch.distributions.Categorical(f64([0.5, 0.5])), torch.distributions.Normal(f64([-MEAN, MEAN]), STD)
)


def peaks_denoiser(z, logsnr):
    """The exact denoiser of data with two peaks, elementwise."""
    alpha, sigma = D.scales(logsnr, z)
    var = alpha**2 * STD**2 + sigma**2
    return (alpha * STD**2 * z + sigma**2 * MEAN * torch.tanh(alpha * MEAN * z / var)) / var


KINDS = {"apart": ((-3,), (-2,), (-1,)), "together": ((-3, -1), (-2,)), "dense": ((-3, -2, -1),)}


def some_law(kind="together", shape=(1, 2, 3, 4)):
    """A Gaussian law in a random basis, variances over four orders of magnitude."""
    sizes = [math.prod(shape[d] for d in dims) for dims in KINDS[kind]]
    axes = [torch.linalg.qr(normal(n, n, seed=i))[0] for i, n in enumerate(sizes)]
    variances = 10 ** (4 * uniform(*shape) - 2)
    return D.Gaussian(normal(shape[0], 1, *shape[2:]), variances, tuple(zip(KINDS[kind], axes)))


def unit_clips(law):
    return torch.eye(law.variances.numel(), dtype=torch.float64).view(-1, *law.variances.shape)


def dense(law):
    """Mean (D,) and covariance (D, D) of the flattened clips of a law."""
    rows = law.field(unit_clips(law)).flatten(1) * law.variances.flatten().sqrt()[:, None]
    return law.mean.expand(law.variances.shape).flatten(), rows.T @ rows


def draws(law, n):
    return law.mean + law.field(law.variances.sqrt() * normal(n, *law.variances.shape))


def gaussian_covariance(frames, size):
    """Exact covariance of a `gaussian` clip of shape (frames, size, size) flattened: (D, D) float64."""
    C = data.lag_covariance(frames, size)
    axes = torch.arange(frames), torch.arange(size), torch.arange(size)
    t, y, x = (i.flatten() for i in torch.meshgrid(*axes, indexing="ij"))
    dt, dy, dx = (i[:, None] - i for i in (t, y, x))
    sign = torch.where(dt < 0, -1, 1)  # C(-h, -d) = C(h, d)
    return C[dt.abs(), (sign * dy) % (2 * size), (sign * dx) % (2 * size)]


def field_law(T, size, mean=0.0, std=1.0):
    """The exact law of the built-in Gaussian field over std, in its own dense basis."""
    w, U = torch.linalg.eigh(gaussian_covariance(T, size) / std**2)
    w, mean = w.clamp(min=1e-9).view(1, T, size, size), torch.full((1, 1, size, size), mean).double()
    return D.Gaussian(mean, w, (((-3, -2, -1), U.T.contiguous()),))


def observe(x, kind):
    """An Observation of clips x (B, 1, T, H, W)."""
    t, factor = torch.arange(x.shape[2])[:, None, None], 2 if kind == "means" else 1
    mask = {
        "means": torch.ones_like(x[..., ::2, ::2]),
        "cells": (uniform(*x.shape[1:], seed=1) < 0.3).expand(x.shape),
        "frames": (t < x.shape[2] // 2).expand(x.shape),
        "every second": (t % 2 == 0).expand(x.shape),
    }[kind].double()
    return D.Observation(D.Observation(x, mask, factor).A(x), mask, factor)


def conditional(law, known, noise=0.0):
    """Mean and covariance of the law's clips given one Observation, by the textbook formula."""
    mean, C = dense(law)
    A = known.A(unit_clips(law)).flatten(1).T  # y = A x
    seen = A.abs().sum(1) > 0
    A, y = A[seen], known.y.flatten()[seen]
    K = C @ A.T @ torch.linalg.inv(A @ C @ A.T + noise**2 * torch.eye(len(A)).double())
    return mean + K @ (y - A @ mean), C - K @ A @ C


# ------------------------------------------------------------------------------------------------------------
# levels and the forward process

CLOCKS = {  # sigma / alpha at time t
    "cosine": lambda t: torch.tan(math.pi / 2 * t),
    "linear": lambda t: torch.expm1(0.1 * t + 19.9 / 2 * t**2).sqrt(),
    "logsnr": lambda t: (-40 + 80 * t).exp(),
    "flow": lambda t: t / (1 - t),
    "normal": lambda t: (-(1 - 2.4 * torch.special.ndtri(t)) / 2).exp(),
    "rho": lambda t: (math.exp(-40 / 7) + t * (math.exp(40 / 7) - math.exp(-40 / 7))) ** 7,
}


@pytest.mark.parametrize("name", D.SCHEDULES)
def test_schedules_are_those_of_the_papers(name):
    t, levels = torch.linspace(0.02, 0.98, 49, dtype=torch.float64), D.Levels(name, -80.0, 80.0)
    close((-levels.logsnr(t) / 2).exp(), CLOCKS[name](t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["cosine", "flow", "logsnr"])
def test_schedules_are_exact_to_both_ends(name):
    l = D.Levels(name).logsnr(torch.linspace(0, 1, 501, dtype=torch.float64))
    close(l, -l.flip(0), rtol=0, atol=1e-6)
    assert l[0] == 30 and (l.diff() < 0).all()


def test_levels_are_cut_and_shifted():
    """Foster's offset cosine is a cut of the cosine: alpha = cos of an angle even in t."""
    t, start, end = torch.linspace(0, 1, 11, dtype=torch.float64), math.acos(0.95), math.acos(0.02)
    lo, hi, by = -7.8240, 2.2253, 2 * math.log(0.25)
    levels = D.Levels("cosine", lo, hi)
    close(D.alpha_sigma(levels.logsnr(t))[0], torch.cos(start + t * (end - start)), rtol=0, atol=1e-4)
    close(D.Levels("cosine", lo + by, hi + by, 0.25).logsnr(t), levels.logsnr(t) + by)


@pytest.mark.parametrize("name", D.SCHEDULES)
def test_log_density_is_the_slope_of_the_schedule(name):
    t, h, levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6, D.Levels(name, -9.0, 9.0, 0.7)
    slope = (levels.logsnr(t + h) - levels.logsnr(t - h)) / (2 * h)
    close(levels.log_density(levels.logsnr(t)), -(-slope).log(), rtol=1e-5, atol=1e-5)


def test_rho_is_edms_grid_without_its_last_level():
    n, hi, lo = 12, 80 ** (1 / 7), 0.002 ** (1 / 7)
    grid = D.Levels("rho", -14 * math.log(hi), -14 * math.log(lo)).grid(n)
    np.testing.assert_allclose((-grid / 2).exp(), [*(hi + np.arange(n) / n * (lo - hi)) ** 7, 0], rtol=1e-9)


def test_times_are_stratified():
    t = D.stratified_times(8, torch.Generator().manual_seed(3)).sort().values
    close(t.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))
    assert 0 <= t[0] < 1 / 8


@pytest.mark.parametrize("t,s", [(-30, -29.94), (-30, -6.9), (-1, 0.5), (7, 30), (29.94, 30), (-30, 30)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_updates_hold_in_float32(t, s, eta):
    z, x_hat = normal(2, 64)
    full = D.update(z, x_hat, f64(t), f64(s), eta, 0.0, torch.zeros_like)
    single = D.update(z.float(), x_hat.float(), f64(t), f64(s), eta, 0.0, torch.zeros_like)
    close(single, full.float(), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# parameterisations and losses


def outputs(x, eps, logsnr):
    """What a network should say, by parameterisation."""
    alpha, sigma = D.scales(logsnr, x)
    return {"v": alpha * eps - sigma * x, "eps": eps, "x": x, "score": -eps / sigma}


@pytest.mark.parametrize("param", D.PARAMS)
@pytest.mark.parametrize("weighting", D.WEIGHTINGS)
def test_a_weighting_means_the_same_for_every_parameterisation(param, weighting):
    (x, eps, wrong), logsnr = normal(3, 5, 6), f64([-9.0, -3.0, 0.0, 2.0, 9.0])
    log_p, z, x_hat = D.Levels().log_density(logsnr), D.diffuse(x, logsnr, eps), x + 0.1 * wrong
    F = outputs(x_hat, D.to_eps(x_hat, z, logsnr), logsnr)[param]
    loss, v_error = D.training_loss(F, x, eps, logsnr, param, weighting, log_p)
    snr, sigma2 = logsnr.exp(), torch.sigmoid(-logsnr)
    on_x = {  # the same weighting written on the error of x
        "v": 1 / sigma2,
        "eps": snr,
        "x": 1.0,
        "truncated_snr": snr.clamp(min=1),
        "min_snr": snr.clamp(max=5),
        "elbo": snr / (2 * log_p.exp()),
        "sigmoid": snr / (2 * log_p.exp()) * torch.sigmoid(2 - logsnr),
    }[weighting]
    error = ((0.1 * wrong) ** 2).mean(1)
    close(loss, on_x * error, rtol=1e-8, atol=0)
    close(v_error, error / sigma2, rtol=1e-8, atol=0)


def test_masked_cells_are_left_out_of_the_loss():
    x, off, mask = torch.zeros(3, 2, 1, 2, 3, 3)
    mask[:, :, :, 1:], off[:, :, :, 0], off[:, :, :, 1] = 1, 100.0, 3.0
    loss, _ = D.training_loss(off, x, x, f64([0.0, 0.0]), mask=mask)
    assert loss.tolist() == pytest.approx([4.5, 4.5])  # 9 in three of six cells


# ------------------------------------------------------------------------------------------------------------
# the Gaussian law


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_the_conditional_expectation(kind):
    law, z, logsnr = some_law(kind), normal(5, 1, 2, 3, 4, seed=3), f64([-8.0, -2.0, 0.0, 3.0, 8.0])
    (m, C), (x_hat, eps_hat), eye = dense(law), law.estimates(z, logsnr), torch.eye(24).double()
    for i, l in enumerate(logsnr):
        alpha, sigma = D.alpha_sigma(l)
        gain = alpha * torch.linalg.solve(alpha**2 * C + sigma**2 * eye, C).T
        close(x_hat[i].flatten(), m + gain @ (z[i].flatten() - alpha * m), rtol=1e-6, atol=1e-8)
    alpha, sigma = D.scales(logsnr, z)
    close(alpha * x_hat + sigma * eps_hat, z)


def test_spread_is_the_size_of_the_estimate():
    law = some_law()
    x, level = draws(law, 6000), f64([0.5])
    x_hat = law.denoise(D.diffuse(x, level, normal(*x.shape, seed=9)), level)
    size = (x_hat - law.mean).square().mean().sqrt().item()
    assert law.spread(level).item() == pytest.approx(size, rel=0.03)


def test_envelope_leaves_hidden_modes_alone_and_lets_clear_ones_go():
    law = some_law()
    noise, clear = law.envelope(f64([-40.0, 40.0]))
    assert noise.max() < 1e-6 and clear.min() > 1 - 1e-6
    gain = law.wiener(*D.alpha_sigma(f64(-1.0)))[0]
    close(law.envelope(f64([-1.0]))[0].square(), gain * gain.square().mean().sqrt())


def test_modes_emerge_where_signal_and_noise_are_equal():
    first, last = some_law().emergence(margin=1.0)
    w = some_law().variances
    assert first == pytest.approx(-math.log(w.max()) - 1) and last == pytest.approx(-math.log(w.min()) + 1)


@pytest.mark.parametrize("gaps", [False, True])
def test_fit_finds_the_law(gaps):
    """Also where boxes hide a quarter of the cells: filled with 0 the variance would be a quarter too low."""
    law, rng = field_law(4, 6, mean=0.5), np.random.default_rng(0)
    x = draws(law, 1500 if gaps else 3000).float()
    for clip in x if gaps else ():
        i, j = rng.integers(0, 4, 2)
        clip[..., i : i + 3, j : j + 3] = math.nan
    fitted = D.Gaussian.fit(x.split(500)).map(torch.Tensor.double)
    assert fitted.mean.mean().item() == pytest.approx(0.5, abs=0.05)
    true, got = dense(law)[1].diagonal(), dense(fitted)[1].diagonal()
    assert (got / true - 1).abs().mean() < 0.06
    assert (fitted.variances.max() / law.variances.max()).item() == pytest.approx(1, abs=0.1)


def test_large_grids_take_time_and_x_apart(monkeypatch):
    x = [draws(some_law("apart", (1, 3, 4, 5)), 200)]
    assert [dims for dims, _ in D.Gaussian.fit(x).axes] == [(-3, -1), (-2,)]
    monkeypatch.setattr(D, "TOGETHER", 14)
    assert [dims for dims, _ in D.Gaussian.fit(x).axes] == [(-3,), (-2,), (-1,)]


def test_fill_draws_what_is_missing_given_what_is_there():
    law = field_law(2, 4)
    x = draws(law, 1)
    known = observe(x, "cells")
    holes = torch.where(known.mask > 0, x, math.nan).expand(4000, *x.shape[1:])
    filled = law.fill(holes, law.draw(holes, torch.Generator().manual_seed(0)))
    assert torch.equal(known.mask * filled, (known.mask * x).expand_as(filled))
    mean, C = conditional(law, known)
    std = C.diagonal().clamp(min=0).sqrt()
    close(law.fill(holes[:1], law.mean.expand_as(x)).flatten(), mean, rtol=0, atol=0.05)
    assert ((filled.mean(0).flatten() - mean).abs() < 5 * std / 4000**0.5 + 0.01).all()
    assert (filled.std(0).flatten() - std).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["frames", "every second", "cells", "means"])
def test_shift_is_the_conditional_expectation(kind):
    law = field_law(4, 6)
    known = observe(draws(law, 1), kind)
    got = law.shift(known, law.mean.expand(1, *law.variances.shape), law.variances[None], 0.2)
    expected = conditional(law, known, 0.2 / known.factor)[0]
    assert (got.flatten() - expected).norm() < 1e-3 * expected.norm()


def after(step, denoise, z, grid):
    *_, (z, _) = D.sample(denoise, z, grid, step)
    return z


def test_flow_is_the_probability_flow_ode():
    """Exact in one step for a Gaussian, and for anything constant that is added to x_hat in each mode."""
    law, added = some_law(), normal(1, 1, 2, 3, 4, seed=2)

    def denoise(z, logsnr):
        return law.denoise(z, logsnr) + added

    z, grid = normal(4, 1, 2, 3, 4, seed=1), torch.linspace(-9, 7, 400, dtype=torch.float64)
    once = after(partial(D.modes_step, law=law), denoise, z, grid[[0, -1]])
    close(once, after(D.ode, denoise, z, grid), rtol=1e-5, atol=1e-6)


def test_a_step_of_the_ode_asks_four_times():
    asked = []
    after(D.ode, lambda z, logsnr: asked.append(logsnr) or z, normal(2, 1), torch.linspace(-1, 1, 3))
    assert len(asked) == 8


def test_steps_in_the_modes_are_of_second_order():
    law, z = some_law(), normal(4, 1, 2, 3, 4, seed=1)
    other = D.Gaussian(law.mean, law.variances * 3 ** normal(1, 2, 3, 4, seed=3), law.axes)
    grids = [torch.linspace(-9, 7, n + 1, dtype=torch.float64) for n in (40, 80, 400)]
    exact = after(D.ode, law.denoise, z, grids[2])
    rough, fine = (after(partial(D.modes_step, law=other), law.denoise, z, grid) for grid in grids[:2])
    assert (rough - exact).norm() / (fine - exact).norm() > 3.3


def turning_weather(T):
    """The law of T frames of the autoregression x' = P x + noise, times a law of two rows; axes together."""
    P, C = f64([[0.7, 0.4, 0.0], [-0.3, 0.6, 0.2], [0.0, -0.2, 0.5]]), torch.eye(3).double()
    for _ in range(200):
        C = P @ C @ P.T + torch.diag(f64([0.2, 0.5, 0.3]))
    with_first = [torch.linalg.matrix_power(P, k) @ C for k in range(T)]  # of frame k with frame 0
    rows = [[with_first[u - v] if u >= v else with_first[v - u].mT for v in range(T)] for u in range(T)]
    w_t, A = torch.linalg.eigh(torch.cat([torch.cat(row, 1) for row in rows]))
    w_y, Y = torch.linalg.eigh(f64([[1.0, 0.3], [0.3, 0.5]]))
    axes = ((-3, -1), A.T.contiguous()), ((-2,), Y.T.contiguous())
    return D.Gaussian(torch.zeros(1, 1, 2, 3).double(), (w_t.view(1, T, 1, 3) * w_y.view(2, 1)), axes)


@pytest.mark.parametrize("T", [1, 2, 7])
def test_other_lengths_of_an_autoregression_are_exact(T):
    close(dense(turning_weather(3).frames(T))[1], dense(turning_weather(T))[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["together", "apart"])
def test_other_lengths_are_always_a_covariance_of_the_same_variance(kind):
    law = some_law(kind, (1, 4, 2, 3))
    longer = law.frames(20)
    assert longer.variances.min() > 0 and longer is law.frames(20)
    assert longer.variances.mean().item() == pytest.approx(law.variances.mean().item(), rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# samplers


def variance_of(step, grid, w):
    """Exact variance of a linear sampler's output for data variance w: entry k is that of noise k."""
    used = itertools.count(1)

    def noise(z):
        return torch.zeros_like(z).index_fill_(0, torch.tensor(next(used)), 1.0)

    z = torch.zeros(len(grid) + 1, 1, dtype=torch.float64)
    z[0] = 1.0
    *_, (z, _) = D.sample(scalar_denoiser(w), z, grid, step, noise)
    return (z**2).sum().item()


STEPS = D.SAMPLERS | {
    "eta_half": partial(D.SAMPLERS["ddim"], eta=0.5),
    "churn": partial(D.heun, churn=0.02),
}


@pytest.mark.parametrize("name", ["ancestral", "dpmpp_sde", "dpmpp_mixed", "sde", "eta_half", "churn"])
def test_samplers_reach_the_exact_spectrum(name):
    grids = [D.Levels("logsnr", -16.0, 17.0).grid(n) for n in (100, 200)]
    for w in (0.01, 1.0, 100.0):  # a steep spectrum, each eigenvalue a scalar Gaussian
        error = [abs(variance_of(STEPS[name], grid, w) / w - 1) for grid in grids]
        assert error[1] < 0.09 and (error[1] < error[0] / 1.8 or error[1] < 1e-4)


def test_steps_beyond_until_add_no_noise():
    z, grid, denoise = normal(4, 1), torch.linspace(-2, 2, 9, dtype=torch.float64), scalar_denoiser(0.3)
    silent = after(partial(D.SAMPLERS["dpmpp_mixed"], until=-2.0), denoise, z, grid)
    close(silent, after(D.SAMPLERS["dpmpp"], denoise, z, grid), rtol=0, atol=0)


@pytest.mark.parametrize("name,order", [("ddim", 1), ("dpmpp", 2), ("heun", 2), ("ode", 4)])
def test_order_of_convergence(name, order):
    w, ends, errors = 0.3, f64([-5.0, 5.0]), []
    variance = w * torch.sigmoid(ends) + torch.sigmoid(-ends)
    for n in (128, 256):
        grid = torch.linspace(-5, 5, n + 1, dtype=torch.float64)
        z = after(STEPS[name], scalar_denoiser(w), f64([[1.0]]), grid)
        errors.append(abs(z.item() - (variance[1] / variance[0]).sqrt().item()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


def test_update_is_the_textbook_ddpm_posterior():
    beta = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - beta)
    logsnrs, x0, zt = torch.from_numpy(np.log(abar / (1 - abar))), 0.7, -0.4
    for i in (1, 2, 10, 500, 999):
        mean = math.sqrt(abar[i - 1]) * beta[i] / (1 - abar[i]) * x0
        mean += math.sqrt(1 - beta[i]) * (1 - abar[i - 1]) / (1 - abar[i]) * zt
        args = f64([zt]), f64([x0]), logsnrs[i], logsnrs[i - 1], 1.0
        at = D.update(*args, 0.0, torch.zeros_like).item()
        low, between, up = (D.update(*args, v, torch.ones_like).item() - at for v in (0.0, 0.5, 1.0))
        assert at == pytest.approx(mean, abs=1e-10) and between**2 == pytest.approx(low * up)
        assert low**2 == pytest.approx((1 - abar[i - 1]) / (1 - abar[i]) * beta[i], rel=1e-9)
        assert up**2 == pytest.approx(beta[i], rel=1e-9)  # DDPM's other choice, sigma_t^2 = beta_t


@pytest.mark.parametrize("name", ["ddim", "heun"])
def test_steps_are_edms_in_its_own_variables(name):
    """Euler and Heun on y = z / alpha, dy/dsigma = (y - x_hat) / sigma: variance exploding."""
    w, z, t, s = 0.3, f64([[0.8]]), f64(-2.0), f64(-0.7)
    (a, b), (c, d) = D.alpha_sigma(t), D.alpha_sigma(s)

    def slope(y, sigma):
        return (y - w / (w + sigma**2) * y) / sigma

    y, h = z / a, d / c - b / a
    first = slope(y, b / a)
    second = slope(y + h * first, d / c) if name == "heun" else first
    close(after(STEPS[name], scalar_denoiser(w), z, torch.stack([t, s])), (y + h * (first + second) / 2) * c)


@pytest.mark.parametrize("step", [partial(D.SAMPLERS["langevin"], snr=0.25), D.SAMPLERS["pc"]])
def test_langevin_recovers_both_peaks(step):
    torch.manual_seed(0)
    x = after(step, peaks_denoiser, normal(20000, 1), D.Levels("logsnr", -8.0, 9.0).grid(80))
    below = PEAKS.cdf(q := f64([-1.2, -0.6, 0.0, 0.6, 1.2]))
    close((x < q).double().mean(0), below, rtol=0, atol=0.02)


def test_interpolated_noise_is_noise():
    a, b = normal(2, 20000)
    variances = [D.interpolate(a, b, w).var().item() for w in (0.0, 0.3, 1.0)]
    assert variances == pytest.approx([1, 1, 1], abs=0.04)


# ------------------------------------------------------------------------------------------------------------
# likelihoods


def eps_error(w, l):
    """E|eps - eps_hat|^2 of the exact denoiser for data variance w at log-SNR l."""
    return torch.sigmoid(l) * w / (torch.sigmoid(l) * w + torch.sigmoid(-l))


def test_continuous_elbo_is_the_entropy_of_a_gaussian():
    w, lo, hi, n = f64([0.01, 0.3, 1.0, 5.0]), -30.0, 30.0, 200_000
    l = torch.linspace(lo, hi, 20001, dtype=torch.float64)
    diffusion = 0.5 * torch.trapezoid(eps_error(w, l[:, None]).sum(1), l).item()
    elbo = D.prior_kl(w.sqrt()[None], lo).item() + diffusion + D.reconstruction_nll(4, hi)  # x^2 = w
    assert elbo == pytest.approx(0.5 * (math.log(2 * math.pi * math.e) + w.log()).sum().item(), abs=4e-3)
    t = D.stratified_times(n, torch.Generator().manual_seed(0))
    estimate = D.diffusion_nll(scalar_denoiser(w), w.sqrt() * normal(n, 4), t, normal(n, 4, seed=1), lo, hi)
    assert estimate.mean().item() == pytest.approx(diffusion, abs=4 * estimate.std().item() / math.sqrt(n))


def test_discrete_estimate_agrees_with_the_closed_form():
    w, n, grid = 0.3, 100_000, torch.linspace(-30, 30, 101, dtype=torch.float64)
    t, x = D.stratified_times(n, torch.Generator().manual_seed(0)), math.sqrt(w) * normal(n, 1)
    estimate = D.discrete_nll(scalar_denoiser(w), x, t, normal(n, 1, seed=1), grid)
    exact = (0.5 * torch.expm1(grid[1:] - grid[:-1]) * eps_error(w, grid[:-1])).sum().item()
    assert estimate.mean().item() == pytest.approx(exact, abs=4 * estimate.std().item() / math.sqrt(n))


def test_likelihoods_leave_masked_entries_out():
    x, eps, t = normal(3, 1), normal(3, 1, seed=1), f64([0.1, 0.5, 0.9])
    wide, mask = torch.cat([x, 0 * x + 100], 1), f64([[1.0, 0.0]]).expand(3, 2)
    close(D.prior_kl(wide, -3.0, mask), D.prior_kl(x, -3.0))
    pair = torch.cat([eps, eps], 1)
    masked = D.diffusion_nll(scalar_denoiser(0.3), wide, t, pair, -9.0, 9.0, mask)
    close(masked, D.diffusion_nll(scalar_denoiser(0.3), x, t, eps, -9.0, 9.0))


ODE_GRID = torch.linspace(14, -14, 401, dtype=torch.float64)


def test_ode_likelihood_of_two_peaks():
    torch.manual_seed(0)
    x = PEAKS.sample((64, 1))
    got = D.ode_log_likelihood(peaks_denoiser, x, ODE_GRID, torch.ones(1, 64, 1))
    assert (got - PEAKS.log_prob(x)[:, 0]).abs().max() < 1e-2


def test_hutchinson_is_unbiased():
    law = some_law("dense", (1, 1, 2, 3))
    x = draws(law, 1)
    exact = torch.distributions.MultivariateNormal(*dense(law)).log_prob(x.flatten()).item()
    axes = 6**0.5 * unit_clips(law)[:, None]
    assert D.ode_log_likelihood(law.denoise, x, ODE_GRID, axes).item() == pytest.approx(exact, abs=0.01)
    probes = normal(1, 256, *x.shape[1:]).sign()
    estimates = D.ode_log_likelihood(law.denoise, x.expand(256, -1, -1, -1, -1), ODE_GRID[::4], probes)
    error = estimates.std().item() / 16
    assert estimates.mean().item() == pytest.approx(exact, abs=3 * error + 1e-3) and error > 0.01


# ------------------------------------------------------------------------------------------------------------
# observations and guidance


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_project_gives_the_nearest_field_that_agrees(factor):
    mask = (uniform(2, 3, 2, 8 // factor, 12 // factor) < 0.5).double()
    x, known = normal(2, 3, 2, 8, 12), D.Observation(mask * normal(*mask.shape, seed=1), mask, factor)
    p = known.project(x)
    close(known.A(p), known.y)
    between = known.project(normal(*x.shape, seed=2)) - p  # two fields that agree
    assert ((p - x) * between).sum().abs() < 1e-9  # the way there is normal to them all


def test_conjugate_gradients_solve_each_sample_by_itself():
    A = normal(3, 6, 6)
    A, b = A @ A.mT + 0.1 * torch.eye(6).double(), normal(3, 6, seed=1)
    b[1] = 0  # nothing to solve

    def solve(which):
        def product(u):
            return torch.einsum("bij,bj->bi", A[which], u)

        return D.conjugate_gradients(product, b[which], lambda r: r, steps=40)

    together = solve([0, 1, 2])
    close(together, torch.linalg.solve(A, b), rtol=1e-4, atol=1e-5)
    assert torch.equal(together[:1], solve([0])) and together[1].abs().max() == 0


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_scattered_cells_shift_the_estimate_exactly_in_any_batch(share):
    exact = field_law(4, 8)
    law, x = exact.map(torch.Tensor.float), draws(exact, 8).float()
    known = D.Observation(x, (uniform(*x.shape, seed=3) < share).float())
    known.y = known.A(x)
    shift = law.shift(known, law.mean.expand(x.shape), law.variances[None], D.NEARLY)  # the worst condition
    first = D.Observation(known.y[:1], known.mask[:1])
    alone = law.shift(first, law.mean.expand(1, *x.shape[1:]), law.variances[None], D.NEARLY)
    close(shift[:1], alone, rtol=0, atol=1e-4)
    mean, _ = conditional(exact, D.Observation(first.y.double(), first.mask.double()), D.NEARLY)
    close(shift[0].flatten().double(), mean, rtol=0, atol=1e-4)


METHODS = {
    "imputation": lambda law, known: D.imputation(law.denoise, known),
    "guidance": lambda law, known: D.reconstruction_guidance(law.denoise, known, 3.0),
    "linear": lambda law, known: D.linear_matching(law.denoise, known, law),
}


@pytest.mark.parametrize("kind", ["cells", "means"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_observed_is_met_exactly(method, kind):
    law = field_law(3, 4)
    known, z = observe(draws(law, 2), kind), normal(2, *law.variances.shape, seed=5)
    x_hat = METHODS[method](law, known)(z, f64([-4.0, 1.0]))
    close(known.A(x_hat), known.y, rtol=0, atol=1e-12)


GIVEN = [(kind, None) for kind in ("frames", "every second", "cells", "means")]
GIVEN += [("means", 2.0), ("cells", 1.4)]


@pytest.mark.parametrize("kind,logsnr", GIVEN)
def test_linear_matching_draws_from_the_exact_conditional(kind, logsnr):
    """What DPM++ draws is linear in its first noise: its mean and standard deviation are known exactly.

    logsnr: to which what is known is noised, as the block means that a cascade is told.
    """
    law, noise = field_law(4, 6), 0.0 if logsnr is None else math.exp(-logsnr / 2)
    known, grid = observe(draws(law, 1), kind), D.Levels("logsnr", *law.emergence(5.0)).grid(64)
    first = torch.cat([0 * law.variances[None], unit_clips(law)])
    y = torch.cat([known.y, torch.zeros(len(first) - 1, *known.y.shape[1:])])
    observed = D.Observation(y, known.mask.expand_as(y), known.factor)
    denoise, level = D.linear_matching(law.denoise, observed, law, noise), grid[:1].expand(len(first))
    z = D.diffuse(denoise(torch.zeros_like(first), level), level, first)
    drawn = after(D.SAMPLERS["dpmpp"], denoise, z, grid).flatten(1)
    (mean, C), std = conditional(law, known, noise), drawn[1:].square().sum(0).sqrt()
    unknown = C.diagonal() > 1e-8
    scale = C.diagonal()[unknown].mean().sqrt()
    assert (drawn[0] - mean)[unknown].square().mean().sqrt() < 0.02 * scale
    assert (std[unknown].square().mean().sqrt() / scale).item() == pytest.approx(1, abs=0.03)


def test_reconstruction_guidance_is_a_sum_per_sample():
    """x_hat = G z with G symmetric: grad |y - A x_hat|^2 = -2 G A' (y - A x_hat), whatever the neighbours."""
    law, z, l = field_law(2, 4), normal(3, 1, 2, 4, 4, seed=2), f64([-3.0, 0.0, 2.0])
    known, x_hat, (alpha, sigma) = observe(draws(law, 3), "means"), law.denoise(z, l), D.scales(l, z)
    back = law.scaled(known.lift(known.y - known.A(x_hat)) / 4, law.wiener(alpha, sigma)[0])
    guided = D.reconstruction_guidance(law.denoise, known, 2.0)(z, l)
    close(guided, known.project(x_hat + 2.0 * alpha * back))


def test_classifier_free_guidance_extrapolates():
    guided = D.classifier_free(lambda z, l: z + 3, lambda z, l: z + 1, 2.5)
    assert guided(torch.zeros(2, 1), torch.zeros(2)).tolist() == [[6.0], [6.0]]


def test_classifier_guidance_is_bayes_rule():
    """c = a x + noise observed: with log p(c | z) in closed form the guided estimate is E[x | z, c]."""
    w, a, s, c = f64([2.0, 0.3]), f64([1.0, -2.0]), 0.7, 1.3
    z, l = normal(5, 2), torch.linspace(-4, 4, 5, dtype=torch.float64)
    alpha, sigma = D.scales(l, z)
    gain, V = alpha * w / (alpha**2 * w + sigma**2), w * sigma**2 / (alpha**2 * w + sigma**2)
    variance = (a**2 * V).sum(1) + s**2

    def log_p(z, logsnr):
        return -0.5 * (c - (a * gain * z).sum(1)) ** 2 / variance

    expected = gain * z + V * a * ((c - (a * gain * z).sum(1)) / variance)[:, None]
    close(D.classifier_guidance(scalar_denoiser(w), log_p)(z, l), expected)
    close(D.classifier_guidance(scalar_denoiser(w), log_p, 0.0)(z, l), gain * z)


# ------------------------------------------------------------------------------------------------------------
# the networks


def noisy(*shape, logsnr=(-3.0, 2.0)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor(logsnr)


def small_unet(**config):
    torch.manual_seed(0)
    net = model.UNet(model.Config(**{"width": 16, "mults": (1, 2), "blocks": 1, "heads": 2, **config}))
    for p in net.requires_grad_(False).parameters():
        if p.abs().max() == 0:  # wake the outputs that start at zero
            p.normal_(0, 0.05)
    return net


def transformer(time_patch=1, wrap_x=False):
    """A DiT with random weights everywhere, where a new one has zeros."""
    torch.manual_seed(0)
    network = model.DiT(model.Config(1, 1, 16, (1,), 1, 2, time_patch, wrap_x=wrap_x, heads=2))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return network


NETWORKS = {
    "unet": partial(small_unet, cond_channels=1),
    "dit": transformer,
    "dit of two frames": partial(transformer, 2),
    "dit around the globe": partial(transformer, 1, True),
}
networks = pytest.mark.parametrize("name", NETWORKS)
two_networks = pytest.mark.parametrize("name", ["unet", "dit"])
CLIP = normal(2, 1, 3, 6, 10).float(), torch.tensor([-3.0, 2.0]), normal(2, 1, 3, 6, 10, seed=1).float()


@networks
def test_a_network_sees_everything_in_its_own_clip(name):
    """In the last corner of the last frame: padding loses nothing, attention reaches everywhere."""
    net, l = NETWORKS[name](), torch.tensor([-3.0, 2.0])
    z, cond = (torch.randn(2, 1, 5, 9, 7, requires_grad=True) for _ in range(2))
    out = net(z, l, cond)
    assert out.shape == z.shape and (net(z, l + 1, cond) - out).abs().amin() > 0
    out[0, 0, -1, -1, -1].backward()
    assert all((a.grad[0] != 0).all() and not a.grad[1].any() for a in (z, cond))


@two_networks
@pytest.mark.parametrize("wrap", [True, False])
def test_without_its_place_a_network_around_the_globe_has_no_seam(name, wrap):
    net, l = NETWORKS[name](wrap_x=wrap), torch.zeros(1)
    z, cond = torch.randn(2, 1, 1, 3, 8, 16)
    placed = net(z, l, cond)
    net.position_features = lambda H, W, device: torch.zeros(1, 8, H, W)
    before, rolled = net(z, l, cond), net(z.roll(4, -1), l, cond.roll(4, -1))
    assert (before - placed).abs().max() > 1e-3  # the network knows where it is, unless told not to
    assert torch.allclose(rolled, before.roll(4, -1), atol=1e-5) == wrap


@two_networks
def test_a_network_knows_time_by_differences_alone(name, monkeypatch):
    network, turns = NETWORKS[name](), model.turns
    expected = network(*CLIP)
    monkeypatch.setattr(model, "turns", lambda n, pairs, device: turns(n + 5, pairs, device)[5:])
    close(network(*CLIP), expected, rtol=1e-4, atol=1e-4)


def test_odd_widths_are_padded_around_the_globe():
    h = torch.randn(2, 1, 8, 9)
    padded, left = small_unet(wrap_x=True).pad(h, 4)
    width = padded.shape[-1]
    assert width % 4 == 0 and 0 < left < width - 9
    assert torch.equal(padded, h.repeat(1, 1, 1, 3)[..., 9 - left : 9 - left + width])


def test_last_layer_sees_a_cell_and_its_neighbours():
    net = small_unet(in_channels=1, cond_channels=1, wrap_x=True)  # padded on both sides, and cut
    net.features.weight.zero_()
    net.features.bias.zero_()  # nothing from the patches
    z, cond = (torch.randn(2, 1, 4, 8, 9, requires_grad=True) for _ in range(2))
    box = torch.zeros(z.shape, dtype=torch.bool)
    box[0, 0, :3, :5, 1:6] = True
    net(z, torch.tensor([-4.0, 4.0]), cond)[0, 0, 1, 2, 3].backward()
    assert torch.equal(z.grad != 0, box) and torch.equal(cond.grad != 0, box)


def test_a_clip_that_stands_still_is_answered_alike_in_every_frame():
    """Its ends are no place of their own, as zeros beyond them would make them."""
    still = torch.randn(2, 1, 1, 8, 8).expand(2, 1, 5, 8, 8)
    answer = small_unet()(still, torch.tensor([-3.0, 2.0]))
    close(answer, answer[:, :, :1].expand_as(answer), rtol=0, atol=1e-5)


def test_time_attention_knows_the_order():
    attention, x = model.Attention(32, 2, "time"), torch.randn(6, 32, 2, 2)
    torch.nn.init.normal_(attention.out.weight)
    assert (attention(x, 6) - attention(x.flip(0), 6).flip(0)).abs().max() > 1e-2


def test_norms_know_which_frame_is_wetter():
    size = torch.tensor([1.0, 5.0, 1.0, 2.0, 1.0, 3.0])[:, None, None, None]
    h, norm = torch.randn(6, 32, 4, 5) * size + 1, torch.nn.GroupNorm(2, 32)  # two clips of three frames
    g, dims = h.view(2, 3, 2, 16, 4, 5), (1, 3, 4, 5)
    expected = (g - g.mean(dims, keepdim=True)) / (g.var(dims, correction=0, keepdim=True) + norm.eps).sqrt()
    got = model.by_clip(norm, h.to(memory_format=torch.channels_last), 3)
    close(got, expected.view(6, 32, 4, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_of_the_unet_need_no_copies(batch):
    """Their inputs lie in memory as they want them, of a single clip, too."""
    net, copied = small_unet(in_channels=2), []

    def note(layer, inputs, output):
        copied.extend([layer] * (not inputs[0].is_contiguous(memory_format=torch.channels_last)))

    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer is not net.position:  # which is small
            layer.register_forward_hook(note)
    net(torch.randn(batch, 2, 6, 16, 16), torch.zeros(batch))
    assert not copied


@two_networks
def test_blocks_compile_once(name):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    net, (z, _, cond), graphs = NETWORKS[name]().requires_grad_(), CLIP, []
    fast = copy.deepcopy(net)
    fast.compile_blocks("eager")
    for l in (-3.0, 0.5, 7.0):  # new log-SNRs are new numbers, not new programs
        a, b = (f(z, torch.full((2,), l), cond) for f in (fast, net))
        close(a, b)
        a.square().mean().backward()
        b.square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0 and not counters["graph_break"]
    for p, q in zip(fast.parameters(), net.parameters()):
        close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradient():
    net, z, l, gradients = small_unet(), torch.randn(2, 1, 3, 8, 8), torch.tensor([-1.0, 2.0]), []
    for net.checkpoint_activations in (False, True):
        x = z.clone().requires_grad_()
        gradients.append(torch.autograd.grad(net(x, l).square().sum(), x)[0])
    close(*gradients)


# ------------------------------------------------------------------------------------------------------------
# the denoiser


def small_denoiser(network, **options):
    law = some_law("together", (1, 4, 8, 8)).map(torch.Tensor.float)
    return model.Denoiser(network, law, "v", 4, torch.full((1, 1, 1, 1), -0.4), **options), law


class Spy(torch.nn.Module):
    """A network that notes what it is shown, and always answers the same."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.shown = answer, []

    def forward(self, eps, logsnr, seen):
        self.shown.append((eps, seen))
        return self.answer.expand_as(eps).clone()


def added(spy, z, l, **options):
    """What the spy's answer adds to the Gaussian's."""
    return small_denoiser(spy, **options)[0](z, l) - small_denoiser(Spy(torch.zeros(())))[0](z, l)


@pytest.mark.parametrize("network,T", [(model.UNet, 1), (model.UNet, 4), (model.UNet, 11), (model.DiT, 4)])
def test_an_untrained_network_gives_the_answer_of_the_gaussian(network, T):
    denoiser, law = small_denoiser(network(model.Config(cond_channels=2, width=16)))
    z, l = noisy(2, 1, T, 8, 8)
    close(denoiser.denoise(z, l), law.frames(T).denoise(z, l), rtol=1e-4, atol=1e-4)


def test_without_the_skip_the_network_is_all():
    net, (z, l) = small_unet(), noisy(2, 1, 4, 8, 8)
    close(small_denoiser(net, linear_skip=False)[0](z, l), net(z, l))


def test_the_network_is_shown_the_linear_estimates():
    spy, (z, l), cond = Spy(torch.zeros(())), noisy(2, 1, 4, 8, 8), torch.randn(2, 1, 4, 8, 8)
    denoiser, law = small_denoiser(spy)
    denoiser(z, l, cond)
    (eps, seen), (x_hat, eps_hat), (alpha, sigma) = spy.shown[0], law.estimates(z, l), D.scales(l, z)
    close(eps, eps_hat)
    above = torch.asinh((z + 0.4 * alpha) / sigma)
    close(seen, torch.cat([(x_hat - law.mean) / law.spread(l), above, cond], 1))


def test_what_is_added_is_scaled_by_the_envelope():
    law, (z, l) = small_denoiser(None)[1], noisy(2, 1, 4, 8, 8)
    expected = law.field(law.envelope(l) * law.modes(torch.ones_like(z)))
    close(added(Spy(torch.ones(())), z, l), expected, rtol=1e-3, atol=1e-4)


def test_a_long_clip_is_shown_in_pieces_that_fade():
    spy = Spy(torch.arange(4.0)[:, None, None])  # where in its piece a frame is
    got = added(spy, *noisy(2, 1, 11, 8, 8, logsnr=(40.0, 40.0)))  # without noise the envelope is 1
    # weights 1 3 3 1; (3, 1) of 4, frame 7 (1, 3, 1) of 5, frame 8 (3, 3) of 6
    expected = torch.tensor([0, 1, *[1.5] * 5, 1.2, 1.5, 2.25, 3])
    close(got[0, 0, :, 0, 0], expected, rtol=1e-3, atol=1e-3)
    assert len(spy.shown) == 5 and all(eps.shape[2] == 4 for eps, _ in spy.shown)


def test_nothing_is_added_where_there_never_are_data():
    valid = (torch.arange(8) >= 4).float().expand(1, 1, 8, 8)
    got = added(Spy(torch.ones(())), *noisy(2, 1, 4, 8, 8, logsnr=(40.0, 40.0)), valid=valid)
    close(got, valid.expand_as(got), rtol=1e-3, atol=1e-3)


def test_a_denoiser_takes_its_gaussian_along():
    denoiser, law = small_denoiser(small_unet(cond_channels=2))
    law.frames(6)
    moved = copy.deepcopy(denoiser).to(torch.float64)
    assert moved.gaussian.mean.dtype == torch.float64 and denoiser.gaussian.mean.dtype == torch.float32
    assert moved.gaussian.frames(6).variances.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------------
# the autoencoder


@pytest.mark.parametrize("frames, side", [(1, 2), (4, 1)])
def test_a_linear_autoencoder_is_probabilistic_pca(frames, side):
    """Its ELBO reaches the likelihood of PPCA (Tipping and Bishop 1999 eq. 8; Lucas et al. 2019)."""
    torch.manual_seed(0)
    x = normal(4000, 4) @ torch.diag(f64([2.0, 1.0, 0.4, 0.2])) @ torch.linalg.qr(normal(4, 4, seed=1))[0]
    x = x.float().view(-1, 1, frames, side, side)
    vae = model.VAE(model.Config(width=16, blocks=0, patch=side, time_patch=frames, latents=2))
    optimizer = torch.optim.Adam(vae.parameters(), 0.02)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600) + 1e-4
        reconstruction, kl = vae(x, normal(*x.shape, seed=step).float())
        optimizer.zero_grad()
        ((reconstruction.sum() + kl.sum()) / len(x)).backward()
        optimizer.step()
    with torch.no_grad():
        parts = [vae(x, normal(*x.shape, seed=k).float()) for k in range(20)]
    elbo = -np.mean([(r.sum() + kl.sum()).item() / len(x) for r, kl in parts])
    variances = torch.linalg.eigvalsh((x.flatten(1).T @ x.flatten(1) / len(x)).double()).flip(0)
    log_det = variances[:2].log().sum() + 2 * variances[2:].mean().log()
    exact = -0.5 * (log_det + 4 + 4 * math.log(2 * math.pi))
    assert elbo == pytest.approx(exact.item(), rel=0.01) and elbo < exact + 0.01


@pytest.fixture(scope="module", params=[1, 2])
def latent(request):
    torch.manual_seed(0)
    walk = np.cumsum(np.random.default_rng(0).standard_normal((40, 7, 10)), 0).astype(np.float32)
    record = data.Record(data.Layout(["walk"], [{}]), [data.Piece({"walk": walk})], np.arange(40))
    codec = data.Codec.fit(record, np.arange(30), 4, "none")
    vae = model.VAE(model.Config(width=16, patch=4, time_patch=request.param, latents=3))
    clips = data.read_clips(record, np.arange(30), 4)
    return model.LatentCodec(codec, vae, (7, 10)).fit([clips[:15], clips[15:]]), clips


def test_latents_are_standardised_and_of_any_grid(latent):
    codec, clips = latent
    latents = codec.encode(clips)
    assert latents.shape == (30, 3, 4 // codec.span, 2, 3) and codec.decode(latents).shape == clips.shape
    flat = latents.transpose(0, 1).flatten(1)
    close(flat.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    close(flat.std(1), torch.ones(3), atol=1e-4, rtol=0)


def test_a_frame_that_is_missing_has_no_latents_and_changes_no_others(latent):
    codec, clips = latent
    holes = clips.copy()
    holes[:, :, 2] = np.nan
    latents, expected = codec.encode(holes), codec.encode(clips)
    others = np.delete(np.arange(4 // codec.span), 2 // codec.span)
    assert latents[:, :, 2 // codec.span].isnan().all()
    close(latents[:, :, others], expected[:, :, others])


def test_an_autoencoder_takes_any_number_of_frames_and_cells():
    torch.manual_seed(0)
    vae = model.VAE(model.Config(width=16, patch=4, time_patch=2))
    x = normal(2, 1, 5, 7, 10).float()
    padded = torch.nn.functional.pad(x, (0, 2, 0, 1, 0, 1), mode="replicate")
    close(vae.encode(x)[0], vae.encode(padded)[0], rtol=0, atol=1e-5)
    reconstruction, kl = vae(x, torch.randn_like(x))
    assert reconstruction.shape == x.shape and kl.shape == (2, 4, 3, 2, 3)


# ------------------------------------------------------------------------------------------------------------
# climate arrays: the built-in weather, files, windows, conditions, transforms, written samples


RNG = np.random.default_rng(0)
FIELD = (280 + RNG.standard_normal((24, 5, 6))).astype(np.float32)
RAIN = np.where(RNG.random((24, 5, 6)) < 0.6, 0, RNG.gamma(0.5, 2.0, (24, 5, 6))).astype(np.float32)
NORTH, EAST = {"units": "degrees_north"}, {"units": "degrees_east"}
LAT, LON = ("lat", 60.0 - np.arange(5), NORTH), ("lon", 10.0 + np.arange(6), EAST)
GLOBAL = ("lon", np.arange(6) * 60.0, EAST)
SHUFFLED = np.random.default_rng(1).permutation(24)


def record_of(*arrays, hours=None, calendar="none", **settings):
    """A Record of arrays (N, H, W) named a, b, c ..."""
    names = list("abcdef"[: len(arrays)])
    layout = data.Layout(names, [{} for _ in names], calendar=calendar)
    hours = np.arange(len(arrays[0])) if hours is None else hours
    return data.Record(layout, [data.Piece(dict(zip(names, arrays)))], hours, **settings)


def hourly(n=24, start="2020-01-01", step="h"):
    return np.datetime64(start, "s") + np.arange(n) * np.timedelta64(1, step)


def dataset(values=FIELD, time=None, name="t2m", lat=LAT, lon=LON, dims=("time", "lat", "lon"), **attrs):
    """A Dataset of one field as a plain NetCDF file holds it."""
    time = hourly(len(values)) if time is None else time
    return xr.Dataset({name: (dims, values, {"units": "K"} | attrs)}, dict(zip(dims, (time, lat, lon))))


def opened(tmp_path, ds, name="a.nc", **settings):
    ds.to_netcdf(tmp_path / name)
    return data.open_record(tmp_path / name, **settings)


def dates(record):
    """Times of a record to the minute, as text."""
    hours = np.round(record.hours * 60) / 60
    return [str(d)[:16] for d in cftime.num2date(hours, data.EPOCH, record.layout.calendar)]


def refusal(path, **settings):
    """The one line with which something is refused."""
    with pytest.raises(data.InputError) as e:
        data.open_record(path, **settings)
    assert "\n" not in str(e.value)
    return str(e.value)


# the built-in weather


def small_builtin(monkeypatch, tmp_path, kind="climate", size=8, seasons=20, hours=400):
    monkeypatch.setattr(data, "SEASONS", seasons)
    monkeypatch.setattr(data, "SEASON_HOURS", hours)
    return data.builtin(kind, size, 0, tmp_path)


def test_builtin_gaussian_has_its_covariance(monkeypatch, tmp_path):
    c = small_builtin(monkeypatch, tmp_path, "gaussian", 6, 240, 40)
    exact = gaussian_covariance(8, 6).numpy()
    seasons = c.frames(0, len(c)).reshape(24, 2, 5, 40, 36)
    assert (seasons[:, 1] == -seasons[:, 0]).all()
    # every season of a half is an independent draw of the field: 240 of them, compared mode by mode
    first = seasons[:, 0, :, :8].reshape(120, 288)
    first = np.concatenate([first, seasons[:, 0, :, 20:28].reshape(120, 288)])
    values, vectors = np.linalg.eigh(exact)
    scores = (first @ vectors) ** 2 / values  # each column a mean of 240 chi-squared variables
    assert np.abs(scores.mean(0) - 1).max() < 5.5 * math.sqrt(2 / 240) and abs(scores.mean() - 1) < 0.02


def test_covariance_is_one_at_lag_0_positive_and_advected_from_the_west():
    exact = gaussian_covariance(8, 6).numpy()
    np.testing.assert_allclose(np.diag(exact), 1, atol=1e-12)
    assert np.linalg.eigvalsh(exact).min() > 0
    C = exact.reshape(8, 6, 6, 8, 6, 6)
    assert C[0, 3, 2, 1, 3, 4] > C[0, 3, 2, 1, 3, 0] + 0.05


def test_latent_modes_have_the_covariance_of_the_field():
    T, size, M = 3, 3, 6
    w, U = data.latent_modes(T, size)
    unit = torch.eye(T * M * M, dtype=torch.float64).reshape(-1, 1, T, M, M)
    waves = torch.einsum("yxts,bctyx->bcsyx", U.conj(), torch.fft.fft2(unit, norm="ortho") + 0j)
    waves = torch.einsum("yxts,bcsyx->bctyx", U, waves * w.permute(2, 0, 1))
    C = torch.fft.ifft2(waves, norm="ortho").real.reshape(T * M * M, -1)
    inside = torch.zeros(T, M, M, dtype=torch.bool)
    inside[:, :size, :size] = True
    C = C[inside.flatten()][:, inside.flatten()]
    close(C, gaussian_covariance(T, size), rtol=1e-9, atol=1e-9)


def test_builtin_climate_follows_its_marginal_law(monkeypatch, tmp_path):
    c = small_builtin(monkeypatch, tmp_path, size=8, seasons=400, hours=25)
    rain = c.frames(0, len(c))[0].reshape(400, 25, 8, 8)
    for level, p in zip([0.0, 0.01, 1.0, 4.0], data.rain_cdf([0.0, 0.01, 1.0, 4.0], 8)):  # (8, 8)
        share = (rain <= level).mean(1)  # (400, 8, 8) independent seasons
        error = share.mean((1, 2)).std() / math.sqrt(400)
        assert abs(share.mean() - p.mean()) < 4 * error
        assert np.abs(share.mean(0) - p).max() < 5 * share.std(0).max() / math.sqrt(400)


def test_builtin_is_the_same_for_the_same_seed(monkeypatch, tmp_path):
    one, two = (small_builtin(monkeypatch, tmp_path / d, seasons=20, hours=5) for d in "ab")
    assert one.frames(0, 100).tobytes() == two.frames(0, 100).tobytes()


def test_edited_weather_is_made_anew(monkeypatch):
    rain, field = (partial(data.builtin_path, kind, 8) for kind in ("climate", "gaussian"))
    before = rain(), field()
    monkeypatch.setattr(data, "THRESHOLD", 1.6)
    assert rain() != before[0] and field() == before[1]


LEVELS = np.array([0.5, 0.9, 0.99, 0.999, 0.9999])


def test_weather_is_what_the_rain_was_made_of(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SEASONS", 20)
    monkeypatch.setattr(data, "SEASON_HOURS", 3)
    monkeypatch.chdir(tmp_path)
    rain, z = data.builtin("climate", 16, 0), data.builtin("gaussian", 16, 0).frames(0, 60)[0]
    means, weather = z.reshape(60, 2, 8, 2, 8).mean((2, 4)), rain.extras["weather"]
    np.testing.assert_allclose(weather[7][::8, ::8], means[7], rtol=1e-5)
    c = torch.from_numpy(data.threshold(rain.extras["season"]))[:, None, None]
    expected = data.rain(torch.from_numpy(z), c).numpy()  # of a field rounded to float16
    np.testing.assert_allclose(rain.frames(0, 60)[0], expected, rtol=0.02, atol=0.01)


def test_exact_moments_and_quantiles_of_the_rain():
    law, q = data.rain_law(8, 6, LEVELS, 0.01), 400 * np.linspace(0, 1, 8001) ** 3
    survival = 1 - data.rain_cdf(q, 8).mean((1, 2))
    assert law["mean"] == pytest.approx(np.trapezoid(survival, q), rel=1e-4) == law["map"].mean()
    assert law["std"] ** 2 + law["mean"] ** 2 == pytest.approx(np.trapezoid(2 * q * survival, q), rel=1e-4)
    wet = law["quantiles"] > 0
    np.testing.assert_allclose(data.rain_cdf(law["quantiles"][wet], 8).mean((1, 2)), LEVELS[wet], atol=1e-7)
    assert law["dry"] == pytest.approx(data.rain_cdf([0.01], 8).mean())


@pytest.mark.parametrize("rho", [-0.3, 0.4, 0.95])
def test_products_of_the_rain_are_the_double_integral(rho):
    z, double = np.linspace(0, 9, 1501), []
    for season in range(4):
        u = z + data.threshold(season)
        joint = np.exp(-(u[:, None] ** 2 + u**2 - 2 * rho * u[:, None] * u) / (2 - 2 * rho**2))
        joint /= 2 * math.pi * math.sqrt(1 - rho**2)
        double.append(np.trapezoid(np.trapezoid(np.outer(z**data.POWER, z**data.POWER) * joint, z), z))
    series = (data.rain_coefficients() ** 2 * rho ** np.arange(300)).sum(1)
    np.testing.assert_allclose(series, double, rtol=1e-4)


def test_exact_spectra_and_autocorrelation_of_the_rain():
    law, g = data.rain_law(8, 6, LEVELS), torch.Generator().manual_seed(0)
    z = torch.linalg.cholesky(gaussian_covariance(6, 8)) @ torch.randn(384, 20000, generator=g).double()
    seasons = enumerate(z.split(5000, 1))
    x = [data.rain(s.view(6, 8, 8, -1).movedim(-1, 0), data.threshold(k)) for k, s in seasons]
    x = torch.cat(x).numpy()
    space = data.rings((np.abs(np.fft.fft2(x)) ** 2).mean((0, 1)) / 64)[1]
    np.testing.assert_allclose(space, law["spatial_power"], rtol=0.04)
    time = (np.abs(np.fft.rfft(x, axis=1)) ** 2).mean((0, 2, 3))[1:] / 6
    np.testing.assert_allclose(time, law["temporal_power"], rtol=0.04)
    a = x - x.mean()
    lagged = [(a[:, : 6 - lag] * a[:, lag:]).mean() / a.var() for lag in range(6)]
    np.testing.assert_allclose(lagged, law["autocorrelation"], atol=0.02)


# reading: each layout in miniature, bit for bit as xarray reads it

TWO_D = {"nav_lat": (("y", "x"), 50.0 + np.add.outer(np.arange(5), 0.1 * np.arange(6)), NORTH)}
TWO_D["nav_lon"] = (("y", "x"), np.add.outer(0.1 * np.arange(5), np.arange(6)) + 0.0, EAST)


def packed():
    ds = dataset()
    ds.t2m.encoding = {"dtype": "int16", "scale_factor": 0.001, "add_offset": 280.0, "_FillValue": -32768}
    return ds


def two_d_coordinates():
    field = {"t2m": (("time_counter", "y", "x"), FIELD, {"units": "K"})}
    return xr.Dataset(field, {"time_counter": hourly()} | TWO_D)


def renamed(t, y, x):
    return dataset().rename(time=t, lat=y, lon=x).drop_vars([y, x])


def attributed(**attrs):
    """Times, rows and columns of no known name, in the opposite order, told by one attribute."""
    ds = dataset().rename(time="p", lat="q", lon="r").transpose("r", "q", "p")
    for i, name in enumerate("pqr"):
        ds[name].attrs = {key: values[i] for key, values in attrs.items() if values[i]}
    return ds


def valid_time_along_step():
    ds = dataset(time=np.arange(24)).rename(time="step")
    return ds.assign_coords(valid_time=("step", hourly()), time=hourly()[0])


LAYOUTS = {  # name: Dataset of the field t2m
    "plain": dataset,
    "packed": packed,
    "big_endian": lambda: dataset(FIELD.astype(">f4")).assign_coords(lat=LAT[1].astype(">f4")),
    "float64": lambda: dataset(FIELD.astype(np.float64)),
    "bool": lambda: dataset(RAIN > 0),
    "transposed": lambda: dataset().transpose("lon", "lat", "time"),
    "size_1": lambda: dataset().isel(lat=[2], lon=[3]),
    "height_of_size_1": lambda: dataset().expand_dims("height", 1),
    "nemo": two_d_coordinates,
    "pop": lambda: renamed("time", "nlat", "nlon"),
    "roms": lambda: renamed("ocean_time", "eta_rho", "xi_rho"),
    "any_names": lambda: renamed("when", "down", "right"),
    "cfgrib_step": valid_time_along_step,
    "axis": lambda: attributed(axis="TYX"),
    "standard_name": lambda: attributed(standard_name=("time", "latitude", "longitude")),
    "units": lambda: attributed(units=("", "degrees_N", "degrees_E")),
}


@pytest.mark.parametrize("suffix", ["nc", "zarr"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_read_is_what_xarray_reads(tmp_path, name, suffix):
    path, ds = tmp_path / f"a.{suffix}", LAYOUTS[name]()
    ds.to_netcdf(path) if suffix == "nc" else ds.to_zarr(path, zarr_format=2)
    r, given = data.open_record(path), xr.open_dataset(path, engine="zarr" if suffix == "zarr" else None).t2m
    given = given.squeeze("height") if "height" in given.dims else given
    time = next(d for d in given.dims if d not in r.layout.dims)
    expected = given.transpose(time, *r.layout.dims).values.astype(np.float32)
    assert r.layout.names == ["t2m"] and (r.frames(0, 24)[0] == expected).all()
    assert given.sizes[r.layout.dims[0]] in (5, 1)  # which are the rows
    assert dates(r)[1] == "2020-01-01 01:00" and r.layout.step_hours == 1 and not r.gaps().any()


def test_zarr_of_version_3_with_texts_and_a_missing_chunk(tmp_path):
    ds = dataset().assign_coords(region=("lat", np.array(list("abcde"))))
    ds.to_zarr(tmp_path / "a.zarr", zarr_format=3, encoding={"t2m": {"chunks": (6, 5, 6)}})
    next(p for p in (tmp_path / "a.zarr/t2m/c").glob("1/*/*") if p.is_file()).unlink()
    x = data.open_record(tmp_path / "a.zarr").frames(0, 24)[0]
    assert np.isnan(x[6:12]).all() and (x[:6] == FIELD[:6]).all() and (x[12:] == FIELD[12:]).all()


def test_dimensions_that_nobody_named_are_those_of_npy(tmp_path):
    ds = xr.Dataset({"t2m": (("phony_dim_0", "phony_dim_1", "phony_dim_2"), FIELD)})
    assert (opened(tmp_path, ds, "a.h5").frames(0, 24)[0] == FIELD).all()


@pytest.mark.parametrize("name", ["number", "ensemble_member", "anything"])
def test_members_are_records_that_no_window_joins(tmp_path, name):
    values = np.stack([FIELD, FIELD + 10, FIELD + 20])
    ds = dataset().drop_vars("t2m").assign(t2m=((name, "time", "lat", "lon"), values))
    attrs = {"standard_name": "realization"} if name == "anything" else {}
    r = opened(tmp_path, ds.assign_coords({name: (name, np.arange(3), attrs)}))
    assert (r.frames(0, 72)[0].reshape(3, 24, 5, 6) == values).all()
    assert {*np.arange(72)} - {*data.runs(r, 4)} == {21, 22, 23, 45, 46, 47, 69, 70, 71}


def test_a_dimension_of_names_gives_channels(tmp_path):
    stacked = np.stack([FIELD, RAIN], 1)
    ds = dataset().drop_vars("t2m").assign(x=(("time", "channel", "lat", "lon"), stacked))
    r = opened(tmp_path, ds.assign_coords(channel=["t2m", "rain"]))
    assert r.layout.names == ["t2m", "rain"]
    assert (data.open_record(tmp_path / "a.nc", "rain").frames(0, 24) == RAIN).all()


def levels():
    fields = np.stack([FIELD, RAIN, FIELD + RAIN], 1)
    ds = dataset().drop_vars("t2m").assign(z=(("time", "plev", "lat", "lon"), fields))
    return ds.assign_coords(plev=[500.0, 700.0, 850.0], lon=GLOBAL)


SELECTIONS = {  # text: what xarray selects
    "plev=850,lat=57:59,lon=60:180": dict(plev=850, lat=slice(59, 57), lon=slice(60, 180)),
    "plev=690,lat=59:57": dict(plev=700, lat=slice(59, 57)),
    "plev=500,time=2020-01-01T06:2020-01-01T09": dict(plev=500, time=slice("2020-01-01T06", "2020-01-01T09")),
    "plev=500,lon=-120:60": dict(plev=500, lon=[240, 300, 0, 60]),
}


@pytest.mark.parametrize("text", SELECTIONS)
def test_a_selection_is_that_of_xarray(tmp_path, monkeypatch, text):
    monkeypatch.setattr(data, "MEMORY", 1)
    r, part = opened(tmp_path, levels(), select=text), levels().sel(SELECTIONS[text])
    assert (r.frames(0, len(r))[0] == part.z.values).all() and len(r) == part.sizes["time"]
    assert (r.layout.coords["lon"]["values"] == part.lon).all()
    assert [n for n in r.notes if n.startswith("selected")]


def test_a_year_is_selected_in_any_calendar(tmp_path):
    ds = dataset(time=xr.date_range("2000-12-20", periods=24, freq="D", calendar="360_day", use_cftime=True))
    r = opened(tmp_path, ds, select="time=2001")
    assert dates(r)[0] == "2001-01-01 00:00" and len(r) == 13


@pytest.mark.parametrize("inner", ["/Grid", "/a/b"])
def test_the_only_group_with_data_is_opened_with_the_coordinates_around_it(tmp_path, inner):
    ds = dataset()
    ds.coords.to_dataset().to_netcdf(tmp_path / "a.HDF5")
    ds[["t2m"]].drop_vars(["lat", "lon", "time"]).to_netcdf(tmp_path / "a.HDF5", mode="a", group=inner)
    r = data.open_record(tmp_path / "a.HDF5")
    assert (r.frames(0, 24)[0] == FIELD).all() and list(r.layout.coords) == ["lat", "lon"] and r.layout.dated


def test_of_several_groups_one_is_chosen_by_the_path(tmp_path):
    dataset().to_netcdf(tmp_path / "a.nc", group="one")
    dataset(FIELD + 1).to_netcdf(tmp_path / "a.nc", mode="a", group="two")
    assert "groups one, two: choose one" in refusal(tmp_path / "a.nc")
    assert (data.open_record(tmp_path / "a.nc/two").frames(0, 24)[0] == FIELD + 1).all()


def test_wrf_takes_its_dates_from_times_and_keeps_its_latitudes(tmp_path):
    stamps = [str(t).replace("T", "_") for t in hourly()]
    moving = {k: (("Time", *v[0]), np.tile(v[1], (24, 1, 1)), v[2]) for k, v in TWO_D.items()}
    fields = {"T2": (("Time", "y", "x"), FIELD, {"units": "K"}), "Times": ("Time", np.array(stamps, "S19"))}
    encoding = {"Times": {"char_dim_name": "DateStrLen"}}
    xr.Dataset(fields, moving).to_netcdf(tmp_path / "wrfout_d01", encoding=encoding)
    r = data.open_record(tmp_path / "wrfout_d01")
    assert r.layout.names == ["T2"] and dates(r)[5] == "2020-01-01 05:00"
    assert (r.layout.coords["nav_lat"]["values"] == TWO_D["nav_lat"][1]).all()


# times

MONTHS = ["1900-01-01", "1900-02-01", "1900-03-01", "1900-04-01"]
TIMES = [  # numbers, units, calendar, first dates or a calendar without, step
    ([0, 1, 2], "Hours Since 2001-01-01T00:00:00Z", "", ["2001-01-01 00:00", "2001-01-01 01:00"], 1),
    ([0, 6, 12], "days since 2001-02-28", "noleap", ["2001-02-28", "2001-03-06"], 144),
    ([58, 59, 60], "days since 2001-01-01", "360_day", ["2001-02-29", "2001-02-30"], 24),
    ([0, 1800], "seconds since 1970-01-01 00:00:00 UTC", "julian", ["1970-01-01", "1970-01-01 00:30"], 0.5),
    ([365, 366], "days since 1-1-1", "proleptic_gregorian", ["0002-01-01", "0002-01-02"], 24),
    ([730485, 730486], "days since 0001-01-01", "proleptic_gregorian", ["2001-01-01", "2001-01-02"], 24),
    ([0, 1, 2, 3], "months since 1900-01-01", "gregorian", MONTHS, 744),
    ([0.5, 1.5, 2.5], "months since 1960-01-01", "360", ["1960-01-16", "1960-02-16"], 720),
    ([0, 1, 2], "years since 1948-1-1 00:00:00", "noleap", ["1948-01-01", "1949-01-01"], 8760),
    ([20191231.5, 20200101.0], "day as %Y%m%d.%f", "", ["2019-12-31 12:00", "2020-01-01 00:00"], 12),
    ([201912, 202001, 202002], "month as %Y%m.%f", "", ["2019-12-01", "2020-01-01"], 744),
    ([20191231, 20200101, 20200102], "", "", ["2019-12-31", "2020-01-01"], 24),
    ([2019123118, 2020010100], "YYYYMMDDHH", "", ["2019-12-31 18:00", "2020-01-01 00:00"], 6),
    ([0, 6, 12], "hours", "", "none", 6),
    ([0, 1, 2], "days since the launch", "", "none", 24),
    ([0, 5, 10], "furlongs", "", "frames", 1),
]


@pytest.mark.parametrize("times,units,calendar,expected,step", TIMES)
def test_numbers_are_times(tmp_path, times, units, calendar, expected, step):
    ds = dataset(FIELD[: len(times)], np.asarray(times, np.float64))
    ds.time.attrs = {"units": units} | ({"calendar": calendar} if calendar else {})
    r = opened(tmp_path, ds)
    if isinstance(expected, str):
        assert r.layout.calendar == expected and not r.layout.dated
    else:
        assert [d[: len(e)] for d, e in zip(dates(r), expected)] == expected
    assert any("step is unknown" in n for n in r.notes) == (expected == "frames")
    assert r.layout.step_hours == pytest.approx(step, abs=1e-6) and not r.gaps().any()


def test_timedeltas_are_hours_unless_dates_lie_beside_them(tmp_path):
    leads = dataset(time=np.arange(24) * np.timedelta64(21600, "s"))
    assert opened(tmp_path, leads).layout.step_hours == 6
    beside = leads.expand_dims("batch").assign_coords(datetime=(("batch", "time"), hourly()[None]))
    r = opened(tmp_path, beside, "b.nc")
    assert r.layout.dated and r.layout.step_hours == 1


UTC = ["2020-01-0{}", "2020010{}", "2020-01-0{}_00:00:00", "2020-01-0{}T00Z", "2020-01-0{} 00:00:00+00:00"]
ELSEWHERE = ["2020-01-0{}T00:00+02:00", "2020-01-0{}T00-0500", "2020-01-0{} 00:00:00 +01:00"]


@pytest.mark.parametrize("form", UTC + ELSEWHERE)
def test_texts_are_dates_but_those_of_another_zone(tmp_path, form):
    np.savez(tmp_path / "a.npz", t2m=FIELD[:3], time=np.array([form.format(day) for day in (1, 2, 3)]))
    r = data.open_record(tmp_path / "a.npz")
    assert r.layout.dated == (form in UTC) == (not r.notes)
    assert form in ELSEWHERE or dates(r)[2] == "2020-01-03 00:00"


def part(of=slice(None), **more):
    return dataset().isel(time=of, **more)


BACKWARDS = slice(None, None, -1)
FOLDERS = {  # its files, words of a note
    "descending": (lambda: {"a": part(BACKWARDS)}, "sorted"),
    "shuffled": (lambda: {"a": part(SHUFFLED)}, "sorted"),
    "overlapping": (lambda: {"a": part(slice(15)), "b": part(slice(9, 24))}, "6 frames that repeat others"),
    "copied": (lambda: {"a": part(), "b": part()}, "b.nc repeats"),
    "turned": (lambda: {1: part(slice(12)), 2: part(slice(12, 24), lat=BACKWARDS)}, "2.nc has its rows or"),
    "frames": (lambda: {23 - k: part(k) for k in range(24)}, ""),  # in another order than their names
    "valid_time": (lambda: {k: part(k).rename(time="valid_time") for k in range(24)}, ""),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_frames_of_files_are_sorted_by_time_each_once(tmp_path, name):
    files, note = FOLDERS[name]
    for stem, ds in files().items():
        ds.to_netcdf(tmp_path / f"{stem}.nc")
    r = data.open_record(tmp_path)
    np.testing.assert_array_equal(r.frames(0, len(r))[0], FIELD)
    assert not r.gaps().any() and r.layout.step_hours == 1 and any(note in n for n in [*r.notes, ""])


def apart(folder):
    """A folder of files that hold one variable each, as CMIP's, of other times and rows in another order."""
    part(slice(12)).to_netcdf(folder / "t2m_1.nc")
    part(slice(12, 20)).to_netcdf(folder / "t2m_2.nc")
    dataset(2 * FIELD, name="pr").isel(time=slice(4, 24), lat=BACKWARDS).to_netcdf(folder / "pr.nc")
    return folder


def test_variables_may_lie_in_files_of_their_own(tmp_path):
    r = data.open_record(apart(tmp_path), "t2m,pr")
    np.testing.assert_array_equal(r.frames(0, len(r)), np.stack([FIELD, 2 * FIELD])[:, 4:20, ::-1])
    assert r.hours[0] - data.open_record(tmp_path / "t2m_1.nc").hours[0] == 4
    assert any("20 of pr, 20 of t2m; 16 are those of all" in note for note in r.notes)


def test_files_without_what_is_selected_are_left_out(tmp_path):
    part(slice(12)).to_netcdf(tmp_path / "a.nc")
    part(slice(12, 24)).to_netcdf(tmp_path / "b.nc")
    part(slice(0)).to_netcdf(tmp_path / "empty.nc")
    r = data.open_record(tmp_path, select="time=2020-01-01T14:2020-01-01T20")
    np.testing.assert_array_equal(r.frames(0, len(r))[0], FIELD[14:21])
    assert "left out, 1 of 3: a.nc" in " ".join(r.notes)
    assert "finds nothing: time has 2020" in refusal(tmp_path, select="time=1999")


def test_variables_that_are_not_wanted_may_be_told_if_they_have_all_frames(tmp_path):
    dataset(2 * FIELD, name="pr").isel(lat=BACKWARDS).to_netcdf(tmp_path / "pr.nc")
    dataset(name="sst").isel(time=slice(3)).to_netcdf(tmp_path / "sst.nc")
    part(slice(20)).to_netcdf(tmp_path / "t2m.nc")
    r = data.open_record(tmp_path, "t2m")
    np.testing.assert_array_equal(r.frames(0, len(r))[0], FIELD[:20])
    np.testing.assert_array_equal(r.extras["pr"][3], 2 * FIELD[3])
    assert "sst" not in r.extras and any("left out" in n and "sst.nc" in n for n in r.notes)


def test_the_last_frame_of_a_variable_may_lie_in_a_file_of_its_own(tmp_path):
    part().to_netcdf(tmp_path / "t2m.nc")
    for i, of in enumerate((slice(23), slice(23, 24))):
        dataset(2 * FIELD, name="pr").isel(time=of).to_netcdf(tmp_path / f"pr_{i}.nc")
    r = data.open_record(tmp_path)
    np.testing.assert_array_equal(r.frames(0, len(r)), np.stack([2 * FIELD, FIELD]))


@pytest.mark.parametrize("select,left", [("", 23), ("time=2020-01-01T05:2020-01-01T09", 4)])
def test_frames_without_a_time_are_left_out(tmp_path, select, left):
    time = hourly()
    time[7] = "NaT"
    r = opened(tmp_path, dataset(time=time), select=select)
    assert len(r) == left and r.gaps().sum() == 1


def test_two_frames_of_one_time_are_refused(tmp_path):
    later = part(slice(9, 24)).copy(deep=True)
    later["t2m"][2, 1, 1] += 1
    part(slice(15)).to_netcdf(tmp_path / "a.nc")
    later.to_netcdf(tmp_path / "b.nc")
    assert re.search("a.nc and .*b.nc: two different frames of 2020-01-01 11:00", refusal(tmp_path))


TIME_STEPS = [([1, 1, 1, 1.05, 1, 1], []), ([1, 1, 1, 1.2, 1, 1], [3]), ([6, 6, 6, 6, 1, 1, 6], [4, 5])]
TIME_STEPS += [([24 * d for d in (31, 28, 61, 30, 31)], [2]), ([24 * d for d in (10, 10, 10, 13, 10)], [3])]


@pytest.mark.parametrize("steps,gaps", TIME_STEPS)
def test_a_step_off_the_usual_one_is_a_gap(steps, gaps):
    hours = np.cumsum([0.0, *steps])
    r = record_of(np.zeros((len(hours), 2, 2)), hours=hours)
    assert np.flatnonzero(r.gaps()).tolist() == gaps


def test_gaps_are_told_in_one_line(tmp_path):
    time = np.concatenate([hourly(14, step="D"), hourly(10, "2020-03-01", "h")])
    expected = "10 steps are not the usual one of 1 days: no clip crosses them; 10 of 24 frames stand alone"
    assert opened(tmp_path, dataset(time=time)).notes == [expected]


# grids: what is compared, between files and with a checkpoint

REORDERED = {
    "south_first": lambda ds: ds.isel(lat=slice(None, None, -1)),
    "rolled": lambda ds: ds.roll(lon=2, roll_coords=True),
    "centred": lambda ds: ds.assign_coords(lon=("lon", (GLOBAL[1] + 180) % 360 - 180, EAST)).sortby("lon"),
    "rounding": lambda ds: ds.assign_coords(lat=("lat", LAT[1] + 1e-6, NORTH)),
    "renamed": lambda ds: ds.rename(lat="latitude", lon="longitude"),
}


@pytest.mark.parametrize("change", REORDERED)
def test_only_the_order_differs_and_is_mended(tmp_path, change):
    ours = opened(tmp_path, dataset(lon=GLOBAL))
    other = opened(tmp_path, REORDERED[change](dataset(lon=GLOBAL)).isel(time=slice(0, 4)), "b.nc")
    fitted = other.fit_to(ours.layout, "b.nc")
    assert (fitted.frames(0, 4)[0] == FIELD[:4]).all() and fitted.layout.coords == ours.layout.coords


def test_a_circle_whose_ends_meet_is_in_order(tmp_path):
    r = opened(tmp_path, dataset(lon=("lon", np.linspace(0, 360, 6), EAST)))
    assert r.layout.match(r.layout, "itself") is None and not r.layout.wraps()


def elsewhere(ds):
    return ds.assign_coords(lat=("lat", ds.lat.values - 20, ds.lat.attrs))


DIFFERENT = {  # what differs: change, what the message names
    "place": (elsewhere, "lat 40 to 36; {} has 60 to 56"),
    "cell": (lambda ds: ds.assign_coords(lon=("lon", ds.lon.values + 0.02, EAST)), "lon 10.02 to 15.02"),
    "units": (lambda ds: ds.assign(t2m=ds.t2m.assign_attrs(units="degC")), "t2m in degC; {} has K"),
    "name": (lambda ds: ds.rename(t2m="tas"), "variables tas; {} has t2m"),
    "size": (lambda ds: ds.isel(lon=slice(0, 4)), "grid of 5 x 4; {} has 5 x 6"),
    "calendar": (lambda ds: ds.convert_calendar("noleap"), "calendar noleap; {} has standard"),
    "step": (lambda ds: ds.isel(time=slice(0, 24, 3)), "a frame every 3 hours; {} has a frame every 1 hours"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_any_other_difference_is_refused_by_name(tmp_path, what):
    change, message = DIFFERENT[what]
    ours, other = opened(tmp_path, dataset()), opened(tmp_path, change(dataset()), "b.nc")
    with pytest.raises(data.InputError, match=f"^b.nc has .*{message.format('the checkpoint')}"):
        ours.layout.match(other.layout, "b.nc")


def test_files_that_were_reordered_are_so_again_for_a_checkpoint(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    part(slice(12)).to_netcdf(files / "a.nc")
    part(slice(12, 24), lat=BACKWARDS).to_netcdf(files / "b.nc")
    turned = opened(tmp_path, part(lat=BACKWARDS, lon=BACKWARDS))
    again = data.open_record(files).fit_to(turned.layout, "files")
    assert (again.frames(0, 24)[0] == FIELD[:, ::-1, ::-1]).all()


def test_two_dimensional_coordinates_are_compared(tmp_path):
    ours = opened(tmp_path, two_d_coordinates())
    other = opened(tmp_path, two_d_coordinates().isel(y=slice(None, None, -1)), "b.nc")
    with pytest.raises(data.InputError, match="nav_lat"):
        ours.layout.match(other.layout, "b.nc")


UNITS = [("K", "kelvin", True), ("mm/day", "mm day-1", True), ("kg/m^2/s", "kg m**-2 s**-1", True)]
UNITS += [("m s⁻¹", "m/s", True), ("°C", "degC", True), ("mm/h", "mm hr-1", True), ("m", "mm", False)]
UNITS += [("K", "degC", False), ("mm/h", "mm/day", False), ("m s-1", "m s-2", False)]


@pytest.mark.parametrize("a,b,same", UNITS)
def test_units_are_compared_in_one_spelling(a, b, same):
    assert (data.canonical(a) == data.canonical(b)) == same


def test_coarse_grids_are_compared_with_means_of_blocks(tmp_path):
    fine = opened(tmp_path, dataset().isel(lat=slice(0, 4)))
    coarse = dataset().isel(lat=slice(0, 4)).coarsen(lat=2, lon=2).mean()
    assert fine.layout.match(opened(tmp_path, coarse, "b.nc").layout, "b.nc", 2) is None
    with pytest.raises(data.InputError, match="lat 39.5 to 37.5"):
        fine.layout.match(opened(tmp_path, elsewhere(coarse), "c.nc").layout, "c.nc", 2)


def test_blocks_of_cells_move_as_a_whole(tmp_path):
    fine = opened(tmp_path, dataset().isel(lat=slice(0, 4))).coarsened(2)
    turned = opened(tmp_path, dataset().isel(lat=[3, 2, 1, 0]), "b.nc").coarsened(2)
    again = turned.fit_to(fine.layout, "b.nc").frames(0, 24)  # the sums are taken in another order
    np.testing.assert_allclose(again, fine.frames(0, 24), rtol=1e-6)


def test_channels_of_npz_have_names_and_units(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.stack([FIELD, RAIN], 1), channel=["t2m", "pr"], units=["K", "mm/h"])
    layout = data.open_record(tmp_path / "a.npz").layout
    assert layout.names == ["t2m", "pr"] and [a["units"] for a in layout.attrs] == ["K", "mm/h"]


def test_bare_arrays_take_the_names_that_are_given(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([FIELD, RAIN], 1))
    r = data.open_record(tmp_path / "a.npy", "t2m,pr")
    assert r.layout.names == ["t2m", "pr"] and (r.frames(2, 5)[1] == RAIN[2:5]).all()
    assert data.open_record(tmp_path / "a.npy", "a_1").layout.names == ["a_1"]


def test_bare_arrays_fit_where_their_size_does_and_take_the_step(tmp_path):
    np.save(tmp_path / "a.npy", FIELD[:4])
    ours = opened(tmp_path, dataset(time=hourly(24, step="D")))
    r = data.open_record(tmp_path / "a.npy").fit_to(ours.layout, "a.npy")
    assert r.hours.tolist() == [0, 24, 48, 72] and r.layout.calendar == "none" and r.layout.names == ["t2m"]


def test_files_of_the_same_times_are_members(tmp_path):
    for m in range(3):
        dataset(FIELD + 10 * m).to_netcdf(tmp_path / f"r{m}.nc")
    r = data.open_record(tmp_path, select="lat=58:60")
    assert len(r) == 72 and len(data.runs(r, 4)) == 3 * 21
    assert ["members" in n for n in r.notes] == [False, True]  # what is selected is told once


def test_files_without_times_do_not_join(tmp_path):
    np.save(tmp_path / "y1.npy", FIELD[:11]), np.save(tmp_path / "y2.npy", FIELD[11:])
    r = data.open_record(tmp_path)
    assert (r.frames(9, 14)[0] == FIELD[9:14]).all() and {9, 10}.isdisjoint(data.runs(r, 3))


def test_what_a_folder_holds_beside_is_told(tmp_path):
    dataset().to_netcdf(tmp_path / "A.NC")
    dataset().isel(time=slice(0, 0)).drop_vars("time").to_netcdf(tmp_path / "b.nc")
    (tmp_path / "readme.txt").write_text("of no use")
    r = data.open_record(tmp_path)
    assert len(r) == 24 and ["b.nc" in n for n in r.notes] == [False, True] and "readme.txt" in r.notes[0]


# large files, damage, what is refused


@pytest.mark.parametrize("layout", ["time lat lon", "member time lat lon", "time channel lat lon", "npy"])
def test_large_files_are_read_window_by_window(tmp_path, monkeypatch, layout):
    big = np.zeros((400, 60, 100), np.float32)  # 10 MB
    big[:] = np.arange(400)[:, None, None]
    ds = dataset(big, hourly(400), lat=("lat", np.arange(60.0)), lon=("lon", np.arange(100.0)))
    ds = ds.expand_dims(channel=["one", "two"]) if "channel" in layout else ds
    ds = ds.expand_dims(member=2) if "member" in layout else ds
    if layout == "npy":
        np.save(path := tmp_path / "a.npy", big)
    else:
        ds.isel(lat=slice(None, None, -1)).transpose(*layout.split()).to_netcdf(path := tmp_path / "a.nc")
    monkeypatch.setattr(data, "MEMORY", 1)
    tracemalloc.start()
    r = data.open_record(path)
    assert (r.frames(100, 108)[0] == np.arange(100, 108)[:, None, None]).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def damaged(path, cut):
    """A compressed file of which the half, or one bit, is lost."""
    dataset().to_netcdf(path, encoding={"t2m": {"zlib": True, "fletcher32": True}})
    whole = bytearray(path.read_bytes())
    at = max(whole.find(b"\x78\x5e"), whole.find(b"\x78\x9c"))  # in the compressed field
    whole[at + 300] ^= 16
    path.write_bytes(whole[: len(whole) // 2] if cut else whole)


def one_frame_each(folder):
    folder.mkdir()
    np.save(folder / "a.npy", FIELD[:1]), np.save(folder / "b.npy", FIELD[1:2])


def two_places(folder):
    folder.mkdir()
    part(slice(12)).to_netcdf(folder / "a.nc")
    elsewhere(part(slice(12, 24))).to_netcdf(folder / "b.nc")


def other_fields(folder):
    folder.mkdir()
    part(slice(1)).to_netcdf(folder / "a.nc")


def of_two_kinds(path):
    path.mkdir()
    levels().assign(sp=levels()["z"].isel(plev=0, drop=True)).to_netcdf(path / "a.nc")


def elsewhen(path):
    path.mkdir()
    part(slice(12)).to_netcdf(path / "t2m.nc")
    dataset(name="pr").isel(time=slice(12, 24)).to_netcdf(path / "pr.nc")


def two_calendars(folder):
    folder.mkdir()
    part(slice(12)).to_netcdf(folder / "a.nc")
    part(slice(12, 24)).convert_calendar("noleap").to_netcdf(folder / "b.nc")


def two_grids():
    return xr.merge([dataset(), dataset(name="u", lat=("y2", LAT[1]), dims=("time", "y2", "lon"))])


def further():
    return dataset().isel(time=0).expand_dims(region=["n", "s"], plev=[500.0, 850.0])


REFUSED = {  # what writes a path or makes a Dataset, settings, words of the message
    "nowhere": (lambda p: None, "", "neither climate, gaussian nor"),
    "noext": (lambda p: p.write_bytes(b"GRIB\xff\xff\0\2"), "", "is GRIB: convert it"),
    "a.nc": (lambda p: p.write_bytes(b"PK\3\4"), "", "is a zip archive: unpack it"),
    "raw.bin": (lambda p: p.write_bytes(bytes(100)), "", "none of NetCDF"),
    "nonsense.nc": (lambda p: p.write_bytes(b"CDF nonsense"), "", "cannot read"),
    "empty.nc": (lambda p: p.write_bytes(b""), "", "cannot read"),
    "cut.nc": (lambda p: damaged(p, cut=True), "", "cannot read"),
    "flipped.nc": (lambda p: damaged(p, cut=False), "", "cannot read"),
    "objects.npy": (lambda p: np.save(p, np.array([{}], object), allow_pickle=True), "", "Python objects"),
    "flat.npy": (lambda p: np.save(p, FIELD[0]), "", "no numbers .time, y, x.*float32 .5, 6."),
    "name.npy": (lambda p: np.save(p, FIELD), "variables=t2m,pr", "it has no 't2m'; it has name"),
    "two_grids.npz": (lambda p: np.savez(p, a=FIELD, b=FIELD[:, :3]), "", "differ in shape"),
    "slash.npz": (lambda p: np.savez(p, **{"rain mm/h": FIELD}), "", "'rain mm/h', and NetCDF has no such"),
    "empty_folder": (lambda p: p.mkdir(), "", "it is empty"),
    "folders": (lambda p: (p / "2019").mkdir(parents=True), "", "holds nothing.*2019 is a folder: give its"),
    "one_frame_each": (one_frame_each, "", "have no order"),
    "two_places": (two_places, "", "b.nc has lat 40 to 36; .*a.nc has 60 to 56"),
    "other": (lambda p: other_fields(p), "variables=pr", "no file of .*other has pr"),
    "apart": (lambda p: elsewhen(p), "", "t2m.nc has other times than .*pr.nc"),
    "levels": (lambda p: of_two_kinds(p), "variables=z", "choose with --select=plev=500"),
    "two_calendars": (two_calendars, "", "b.nc has .*calendar noleap; .*a.nc has standard"),
    "time.nc": (lambda p: dataset(name="realization"), "", "'realization', and written samples"),
    "no_time.nc": (lambda p: dataset().rename(time="band").drop_vars("band"), "", r"rename\(band='time'\)"),
    "cells.nc": (lambda p: dataset().stack(cell=("lat", "lon")).reset_index("cell"), "", "interpolate it"),
    "text.nc": (lambda p: dataset(np.full((24, 5, 6), "x")), "variables=t2m", "t2m holds .*, not numbers"),
    "missing.nc": (lambda p: dataset(), "variables=pr", "it has no 'pr'; it has t2m"),
    "nothing.nc": (lambda p: xr.Dataset(), "", "no variables"),
    "no_frames.nc": (lambda p: dataset().isel(time=slice(0, 0)), "", "holds no frames"),
    "expver.nc": (lambda p: dataset().expand_dims(expver=[1, 5]), "", r"expver=1\).combine"),
    "mixed.nc": (lambda p: two_grids(), "", "different grids.*--variables"),
    "two.nc": (lambda p: further(), "", "choose with --select=region=n;"),
    "levels.nc": (lambda p: levels(), "", "choose with --select=plev=500"),
    "depth.nc": (lambda p: levels(), "select=depth=3", "no name=value or name=low:high of time, plev"),
    "plev.nc": (lambda p: levels(), "select=plev", "no name=value"),
    "plev_10.nc": (lambda p: levels(), "select=plev=10", "plev=10 finds nothing: plev has 500.0 to 850.0"),
    "one_level.nc": (lambda p: levels().isel(plev=[0]), "select=plev=500.9", "plev has 500.0 to 500.0"),
    "lat_a.nc": (lambda p: levels(), "select=lat=a:b", "lat has 60.0 to 56.0"),
    "no_times.nc": (
        lambda p: dataset(time=[np.datetime64("NaT", "ns")] * 24),
        "select=time=2020",
        "has None to None",
    ),
    "1999.nc": (lambda p: levels(), "select=time=1999:2001", "nothing: time has 2020-01-01 00:00:00 to"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    make, settings, message = REFUSED[name]
    made = make(tmp_path / name)
    if hasattr(made, "to_netcdf"):
        made.to_netcdf(tmp_path / name)
    assert re.search(message, refusal(tmp_path / name, **parse(settings)))


PICKLE, TEXT = {"id": "pickle", "protocol": 5}, {"id": "vlen-utf8"}


@pytest.mark.parametrize("filters,compressor", [([TEXT], PICKLE), ([PICKLE], None)])
def test_a_pickle_in_zarr_never_runs(tmp_path, monkeypatch, filters, compressor):
    marker, label = tmp_path / "marker", tmp_path / "a.zarr/label"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    ds = dataset().assign_coords(label=("lat", np.arange(5.0)))
    ds.to_zarr(tmp_path / "a.zarr", zarr_format=2, consolidated=False)
    meta = json.loads((label / ".zarray").read_text())
    meta |= {"filters": filters, "compressor": compressor, "dtype": "|O", "fill_value": None}
    (label / ".zarray").write_text(json.dumps(meta))
    (label / "0").write_bytes(pickle.dumps(Evil()))
    unsafe = "numcodecs.pickles.ALLOW_UNSAFE_PICKLE_DECODE"
    monkeypatch.setattr(unsafe, True, raising=False)  # as up to 0.16.1
    numcodecs.register_codec(numcodecs.pickles.Pickle)
    assert "could run code" in refusal(tmp_path / "a.zarr") and not marker.exists()


# windows


def test_windows_stay_within_blocks_and_gaps():
    hours = np.concatenate([np.arange(40), 100 + np.arange(35), [140], 141 + np.arange(24)])
    train_starts, test = data.split_windows(record_of(np.zeros((100, 2, 2)), hours=hours), 5)
    assert not {*data.covered_frames(train_starts, 5)} & {*data.covered_frames(test, 5)}
    assert all((np.diff(hours[s : s + 5]) == 1).all() for s in (*train_starts, *test)) and len(test)


def months():
    return record_of(np.zeros((61, 2, 2)), hours=np.cumsum([0] + [31, 28, 31, 30, 31, 30] * 10) * 24.0)


@pytest.mark.parametrize("length,last", [(None, 3), (7, 7)])
def test_every_fifth_block_is_test_data_for_clips_of_any_length(length, last):
    training, test = data.split_windows(months(), 3, length)  # six blocks of ten months, the last of eleven
    assert training.tolist() == [*range(41 - last), *range(50, 62 - last)]
    assert test.tolist() == [*range(40, 51 - last)]


@pytest.mark.parametrize("frames,length,message", [(3, 11, "no 11 consecutive"), (31, None, "at least 62")])
def test_too_few_frames_are_refused(frames, length, message):
    with pytest.raises(data.InputError, match=message):
        data.split_windows(months(), frames, length)


def test_thinned_frames_are_of_every_hour_of_the_day():
    chosen = data.thin(np.arange(24 * 400), 400)  # a stride of 24 sees one hour
    assert (chosen // 24 == np.arange(400)).all() and len({*(chosen % 24)}) == 24
    assert (data.thin(np.arange(9), 9) == np.arange(9)).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length,frames,overlap", [(8, 8, 2), (21, 8, 3), (240, 8, 2), (5, 8, 2), (3, 2, 1)])
def test_windows_cover_a_sequence(length, frames, overlap, reverse):
    done = np.zeros(length, bool)
    for n, (w, keep) in enumerate(data.windows(length, frames, overlap, reverse=reverse)):
        assert (np.diff(w) == 1).all() and len(w) == min(frames, length)
        edge = done[w][-overlap:] if reverse else done[w][:overlap]
        assert n == 0 or done[w].sum() == overlap == edge.sum()  # of which all was kept
        done[w[keep]] = True
    assert done.all()


GIVEN = [(n, 2, (0, 1, n - 2, n - 1), False) for n in range(5, 22)]
CASES = itertools.product((16, 30), (1, 2), (2, 3, 4), (False, True))
GIVEN += [(n, k, range(0, n, every), reverse) for n, k, every, reverse in CASES]
GIVEN += [(40, 2, (*range(20), *range(31, 40)), False)]  # a gap


@pytest.mark.parametrize("length,overlap,known,reverse", GIVEN)
def test_windows_see_what_is_known_on_both_sides(length, overlap, known, reverse):
    frames, done = 8, np.isin(np.arange(length), known)

    def nearest(t, step):
        return next((d for d in range(1, frames) if 0 <= t + d * step < length and done[t + d * step]), None)

    for w, keep in data.windows(length, frames, overlap, known, reverse):
        drawn = [t for t in w[keep] if not done[t]]
        for t, step in itertools.product(drawn, (-1, 1)):
            # the nearest known frame on either side is in the window, if one of this size can have both
            near, other = nearest(t, step), nearest(t, -step)
            reach = frames if other is None else frames - other
            assert near is None or t + near * step in w or near + overlap >= reach
        assert drawn or np.isin(w[overlap:], known).all()
        done[w[keep]] = True
    assert done.all()


# conditions

HILL, SERIES, CLASSES = np.arange(6.0).reshape(2, 3), np.linspace(0, 1, 48), np.arange(48) % 3
MOVING = np.arange(48.0 * 6).reshape(48, 2, 3)


def told(calendar="360_day", **extras):
    extras = {"nao": SERIES, "kind": CLASSES, "hill": HILL, "wind": MOVING} | extras
    return record_of(np.zeros((48, 2, 3)), hours=np.arange(48.0) + 31 * 24, calendar=calendar, extras=extras)


def values_of(names, index, hours=None):
    return data.Conditions.fit(told(), names, np.arange(48)).values(told(), np.array(index), hours)


def test_the_first_channel_says_that_something_is_told():
    v = values_of(["hour", "nao", "kind"], [[6, 7]])
    assert v.shape[1] == 1 + 2 + 1 + 3 and (v[:, 0] == 1).all() and data.Conditions([]).channels == 0


DAY, PAST = 2 * math.pi * 31.25 / 360, np.array([[791.0, 792.0]])  # six o'clock; beyond the end
CONDITIONS = {  # name: frames, hours, values in the last frame of the first clip, last row, first column
    "hour": ([[5, 6]], None, [1, 0]),
    "day": ([[5, 6]], None, [math.sin(DAY), math.cos(DAY)]),
    "nao": ([[47, 48]], PAST, [0.5 / np.std(SERIES)]),  # a series keeps its last value
    "kind": ([[6, 7]], None, [0, 1, 0]),  # whole numbers are classes
    "hill": ([[0, 1, 2], [3, 4, 5]], None, [(HILL[1, 0] - HILL.mean()) / HILL.std()]),
    "wind": ([[0, 1, 2], [3, 4, 5]], None, [(MOVING[2, 1, 0] - MOVING.mean()) / MOVING.std()]),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_is_told(name):
    index, hours, expected = CONDITIONS[name]
    v = values_of([name], index, hours)
    assert v[0, 1:, -1, -1, 0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_what_is_missing_is_told_as_the_mean_and_said():
    record = told(nao=np.where(np.arange(48) < 12, np.nan, SERIES))
    v = data.Conditions.fit(record, ["nao"], np.arange(48)).values(record, np.array([[0]]))
    assert (v[0, 1] == 0).all() and record.notes == ["nao: 25 % are missing, and told as its mean"]


@pytest.mark.parametrize("name", ["series", "pr"])
def test_what_else_a_file_has_is_sorted_with_its_frames_and_told(tmp_path, name):
    series = np.sin(np.arange(24.0))
    ds = dataset().assign(pr=(("time", "lat", "lon"), RAIN), series=("time", series))
    ds.isel(time=SHUFFLED).to_netcdf(tmp_path / "a.nc")
    r, x = data.open_record(tmp_path / "a.nc", "t2m"), RAIN if name == "pr" else series[:, None, None]
    v = data.Conditions.fit(r, [name], np.arange(24)).values(r, np.array([[5]]))
    close(v[0, 1, 0], torch.from_numpy((x[5] - x.mean()) / x.std()).float().expand(5, 6))


MASKS = {  # what is done to a mask of two dimensions
    "as it is": lambda ds: ds,
    "turned": lambda ds: ds.isel(lat=BACKWARDS),
    "dated": lambda ds: ds.expand_dims(time=hourly(1)),
}


@pytest.mark.parametrize("variables", ["", "t2m"])
@pytest.mark.parametrize("name", MASKS)
def test_a_field_that_stands_still_may_lie_in_a_file_of_its_own(tmp_path, name, variables):
    mask = xr.Dataset({"lsm": (("lat", "lon"), np.arange(30.0).reshape(5, 6))}, {"lat": LAT, "lon": LON})
    MASKS[name](mask).to_netcdf(tmp_path / "lsm.nc")
    for name, times in (("t2m_1", slice(12)), ("t2m_2", slice(12, 24))):
        part(times).to_netcdf(tmp_path / f"{name}.nc")
    r = data.open_record(tmp_path, variables)
    assert r.layout.names == ["t2m"] and len(r) == 24 and any("lsm.nc is one frame" in n for n in r.notes)
    np.testing.assert_array_equal(r.extras["lsm"], np.arange(30.0).reshape(5, 6))


def of_levels(lat=slice(None)):
    """Levels on the grid of `part`."""
    return levels().assign_coords(lon=part().lon).isel(lat=lat)


def test_a_mask_in_a_folder_may_lack_the_levels_and_times_that_are_selected(tmp_path):
    of_levels().to_netcdf(tmp_path / "z.nc")
    part(0).drop_vars("time").rename(t2m="lsm").to_netcdf(tmp_path / "lsm.nc")
    r = data.open_record(tmp_path, select="plev=500,time=2020-01-01T05:2020-01-01T07")
    np.testing.assert_array_equal(r.frames(0, len(r))[0], of_levels()["z"].sel(plev=500).values[5:8])
    np.testing.assert_array_equal(r.extras["lsm"], FIELD[0])
    assert sum("lsm.nc: --select=" in note for note in r.notes) == 2


BESIDE_LEVELS = {  # select: a further file of the folder that it cannot be applied to, and is refused for it
    "plev=500": lambda: part(),  # frames of their own
    "plev=700": lambda: part(0).rename(t2m="lsm"),  # a date
    "plev=850": lambda: part(0).drop_vars("time").rename(t2m="lsm").assign_coords(plev=500.0),
    "lat=57:59": lambda: part(0).drop_vars("time").rename(t2m="lsm", lat="latitude"),
    "lvl=500": lambda: part(0).drop_vars("time").rename(t2m="lsm"),
    "number=0": lambda: part(slice(3)).drop_vars(["time", "lat", "lon"]).rename(time="dim_0", lat="dim_1"),
}


@pytest.mark.parametrize("select", BESIDE_LEVELS)
def test_a_selection_is_never_left_out_in_silence(tmp_path, select):
    of_levels().to_netcdf(tmp_path / "z.nc")
    BESIDE_LEVELS[select]().to_netcdf(tmp_path / "beside.nc")
    assert re.search(rf"(beside|z)\.nc: --select={select} is no name=value", refusal(tmp_path, select=select))


def test_nothing_selected_but_a_mask_is_refused(tmp_path):
    part().to_netcdf(tmp_path / "a.nc")
    part(0).drop_vars("time").rename(t2m="lsm").to_netcdf(tmp_path / "lsm.nc")
    assert "a.nc: --select=time=1999 finds nothing" in refusal(tmp_path, select="time=1999")


def test_a_single_frame_with_a_mask_in_its_file_does_not_stand_still(tmp_path):
    part(slice(1, 24)).to_netcdf(tmp_path / "rest.nc")
    part(slice(1)).assign(lsm=part(slice(1))["t2m"]).to_netcdf(tmp_path / "first.nc")
    assert "choose --variables=t2m" in refusal(tmp_path)


def test_a_still_field_on_another_grid_is_refused_by_the_names_of_both_files(tmp_path):
    part().to_netcdf(tmp_path / "t2m.nc")
    part(0, lat=slice(3)).rename(t2m="lsm").to_netcdf(tmp_path / "lsm.nc")
    assert re.search("lsm.nc has a grid of 3 x 6; .*t2m.nc has 5 x 6", refusal(tmp_path))


def test_a_bare_array_of_one_frame_is_a_frame_and_does_not_stand_still(tmp_path):
    np.save(tmp_path / "a.npy", FIELD)
    np.save(tmp_path / "b.npy", FIELD[:1] + 1)
    r = data.open_record(tmp_path)
    assert len(r) == len(FIELD) + 1 and not r.extras


@pytest.mark.parametrize("name,message", [("hil", "nao, kind, hill"), ("day", "with a calendar")])
def test_conditions_that_are_not_there_are_refused(name, message):
    with pytest.raises(data.InputError, match=message):
        data.Conditions.fit(told("frames"), [name], np.arange(48))


@pytest.mark.parametrize("name,message", [("nao", "have nothing"), ("day", "no dates"), ("hill", "of 2 x 2")])
def test_data_without_a_condition_of_the_model_are_refused(name, message):
    other = record_of(np.zeros((48, 2, 3)), extras={"hill": HILL[:, :2]} if name == "hill" else {})
    with pytest.raises(data.InputError, match=message):
        data.Conditions.fit(told(), [name], np.arange(48)).values(other, np.array([[6]]))


# transforms


def codec_of(*arrays, names="none", frames=4, starts=None):
    r = record_of(*arrays)
    starts = np.arange(len(r) - frames + 1) if starts is None else starts
    return r, data.Codec.fit(r, starts, frames, names)


SMOOTH = [n for n in data.TRANSFORMS if n != "censored"]  # those that need no atom
WIDE = (RNG.standard_normal((40, 3, 4)) * 10 ** RNG.uniform(-4, 2, (40, 3, 4))).astype(np.float32)


@pytest.mark.parametrize("name", SMOOTH)
def test_transforms_invert_exactly_and_standardise_the_training_frames(name):
    r, codec = codec_of(WIDE, names=name, starts=np.arange(20))
    clip = data.read_clips(r, [0, 9], 4)
    back = codec.decode(codec.encode(clip))
    np.testing.assert_allclose(back, clip, rtol=2e-5, atol=2e-8 * np.abs(clip).max())
    seen = codec.encode(r.frames(0, 23)[None])
    assert seen.mean().abs() < 1e-5 and abs(seen.std(correction=0) - 1) < 1e-5
    assert codec.limits() == pytest.approx((seen.min().item(), seen.max().item()), rel=1e-5)
    assert codec.low.shape == (1, 1, 1, 1) and codec.low.item() == pytest.approx(seen.min().item(), rel=1e-5)


@pytest.mark.parametrize("name", data.FORMULAS)
def test_change_of_variables_is_the_slope_of_the_transform(name):
    x = np.array([0.1, 0.5, 2.0, 4.0]).reshape(4, 1, 1, 1, 1)
    v = data.Variable.fit("a", {}, name, np.random.default_rng(0).standard_normal(999))
    codec = data.Codec([v], torch.ones(1, 1, 1, 1), True)
    slopes = {"none": x**0, "sqrt": x**-0.5, "cbrt": x ** (-2 / 3), "log": 1 / (1 + x / v.scale)}
    slope = np.log(slopes[name] / slopes[name][0]).ravel()  # up to a constant factor
    x = x.astype(np.float32)
    got = codec.log_slope(x).numpy()
    np.testing.assert_allclose(got - got[0], slope, atol=1e-6)
    gappy = np.concatenate([x, np.full_like(x, np.nan)], 4)  # what is missing has no density
    np.testing.assert_allclose(codec.log_slope(gappy).numpy(), got)
    assert codec_of(RAIN)[1].log_slope(np.zeros((1, 1, 4, 5, 6))) is None  # nor has an atom


def censored_rain(n=200_000, c=0.8):
    """A latent normal and the rain made of it: its Gaussian scores are the latent itself where it rains."""
    z = np.random.default_rng(0).standard_normal(n)
    return z, np.maximum(z - c, 0) ** 2.4


@pytest.mark.parametrize("name,gap", [("quantile", 0.0), ("censored", data.GAP)])
def test_gaussian_scores_find_the_latent_field(name, gap):
    z, x = censored_rain()
    v = data.Variable.fit("rain", {}, name, x)
    y, wet = v.forward(v.snapped(x)), x > v.rounding
    bulk = wet & (z < 3)
    assert np.abs(y - z)[bulk].max() < 0.05 and v.dry_score == pytest.approx(0.8 - gap, abs=0.01)
    assert (y[~wet] == v.dry_score).all() and y[wet].min() >= v.dry_score + gap
    back = v.decode(v.encode(x))
    assert (back[~wet] == 0).all() and np.abs(back - x)[wet].max() < 1e-9
    noisy = v.dry_score + np.random.default_rng(1).uniform(-9, 0.99 * gap, 1000)
    assert (v.decode((noisy - v.mean) / v.std) == 0).all()  # no drizzle from a nearly dry estimate
    beyond = np.array([1.5, 2.0, 4.0]) * x.max()
    np.testing.assert_allclose(v.decode(v.encode(beyond)), beyond, rtol=1e-9)
    assert (np.diff(v.encode(beyond)) > 0.2).all() and (v.slope(beyond) > 0).all()


def test_quantile_transform_goes_on_beyond_the_training_extremes():
    v = data.Variable.fit("t", {}, "quantile", 280 + 3 * np.random.default_rng(0).standard_normal(100_000))
    far = np.array([262.0, 298.0])  # six standard deviations
    assert np.abs(v.encode(far) - [-6, 6]).max() < 0.7 and np.abs(v.decode(v.encode(far)) - far).max() < 1e-9


def test_quantile_transform_of_whole_numbers_scores_the_middle_of_each_atom():
    tied = np.round(280 + 3 * np.random.default_rng(0).standard_normal(100_000))
    v = data.Variable.fit("t", {}, "quantile", tied)
    y = v.encode(tied)
    assert abs(v.mean) < 0.02 and abs(v.std - 1) < 0.03 and np.abs(v.decode(y) - tied).max() < 1e-9


def test_learnt_transform_is_near_the_best():
    heat = np.exp(np.random.default_rng(0).standard_normal(20_000) / 2)  # log-normal: the logarithm is best
    v = data.Variable.fit("t", {}, "learnt", heat)
    best = np.mean(np.log(1 / heat / np.log(heat).std()))
    assert np.log(v.slope(heat)).mean() == pytest.approx(best, abs=0.01)


def test_learnt_transform_of_rain_is_monotone_and_exact():
    _, x = censored_rain(20_000)
    v = data.Variable.fit("rain", {}, "learnt", x)
    assert (np.diff(v.knots[1]) > 0).all() and np.abs(v.decode(v.encode(x)) - x).max() < 2e-6 * x.max()


UNFIT = [(FIELD, "censored", "atom"), (FIELD, "none,none", "2 transforms for 1 variables")]
UNFIT += [(0 * FIELD, "auto", "constant .0."), (FIELD * np.nan, "auto", "no data in the train")]


@pytest.mark.parametrize("array,names,message", UNFIT)
def test_transforms_that_cannot_be_fitted_are_refused(array, names, message):
    with pytest.raises(data.InputError, match=message):
        codec_of(array, names=names)


def test_what_is_missing_stays_missing_and_dead_cells_come_back():
    gappy = RAIN.copy()
    gappy[:, 0, 0], gappy[3, 2, 2], gappy[4, 2, 2] = np.nan, np.nan, np.inf
    r, codec = codec_of(gappy)
    y = codec.encode(data.read_clips(r, [0, 4], 4))
    assert y.isnan().sum() == 8 + 2 and not codec.complete and codec_of(RAIN)[1].complete
    assert codec.valid.shape == (1, 1, 5, 6) and codec.valid.sum() == 29
    back = codec.decode(y.nan_to_num() - 9, valid=True)
    assert np.isnan(back[..., 0, 0]).all() and (back[..., 1:, :] == 0).all()  # never below the floor


NOISE = RNG.uniform(-1, 1, RAIN.shape).astype(np.float32)
FLOORS = {  # values, floor
    "exact": (RAIN, 0.0),
    "packed": (np.where(RAIN > 0, RAIN, 8.7e-19 * NOISE), 0.0),
    "two_negatives": (np.where(np.arange(720).reshape(24, 5, 6) % 400 == 7, -2e-9, RAIN), 0.0),
    "never_0": (RAIN + 1e-12 * np.abs(NOISE), 0.0),
    "small_units": (RAIN / 3600000, 0.0),
    "other_floor": (np.maximum(FIELD, 279.5), 279.5),
    "none": (FIELD, None),
    "few_zeros": (np.abs(FIELD - 280), None),
    "anomalies": (np.where(RAIN > 0, RAIN - 1, 0), None),
    "fill_value": (np.where(np.abs(NOISE) < 0.01, np.float32(9.96921e36), RAIN), 0.0),
}


@pytest.mark.parametrize("kind", FLOORS)
def test_the_floor_is_found_to_rounding_and_rain_gets_a_cube_root(kind):
    x, floor = FLOORS[kind]
    v = codec_of(x.astype(np.float32), names="auto")[1].variables[0]
    assert v.transform == ("cbrt" if floor == 0 else "none")
    assert v.floor is floor is None or v.floor == pytest.approx(floor)
    assert floor is None or 0.05 < np.mean(v.decode(v.encode(x)) == v.floor) < 0.9


@pytest.mark.parametrize("unit,dry", [(1.0, 1e-2), (1 / 3600, 1e-6), (25.4, 0.1)])
def test_what_counts_as_dry_has_the_size_of_the_rain(unit, dry):
    x = np.where(np.arange(1000) % 5 == 0, np.linspace(0.2, 0.8, 1000), 0)  # 0.1 on average
    x = (unit * x).astype(np.float32).reshape(10, 10, 10)
    assert codec_of(x, frames=1)[1].variables[0].dry == pytest.approx(dry)


@pytest.mark.parametrize("value,cells", [(-9999.0, 70), (-99.0, 400), (1e20, 5), (500.0, 1)])
def test_marks_of_no_data_are_told_by_value_and_count(value, cells):
    x = RAIN.copy()
    x.flat[:cells] = value
    summary = codec_of(x)[1].variables[0].summary
    assert (f"WARNING: {value:g}, {cells} times, far from others" in summary) == (cells > 1)
    assert cells > 1 or "WARNING" not in summary  # a single extreme may be weather


@pytest.mark.parametrize("name", ["x", "time"])
def test_an_array_may_be_named_like_a_dimension(name, tmp_path):
    np.save(tmp_path / f"{name}.npy", FIELD)
    np.testing.assert_array_equal(data.open_record(tmp_path / f"{name}.npy").frames(0, len(FIELD))[0], FIELD)


def test_fill_values_of_integers_are_no_data_where_none_is_declared(tmp_path):
    x = np.random.default_rng(0).integers(0, 100, (24, 5, 6)).astype(np.int16)
    x[3, 2, 1] = -32767
    got = opened(tmp_path, dataset(x, lat=np.arange(5.0), lon=np.arange(6.0))).frames(0, 24)[0]
    assert np.isnan(got[3, 2, 1]) and np.isnan(got).sum() == 1 and (got[4:] == x[4:]).all()


def test_a_large_grid_is_sampled_in_parts_of_many_frames(monkeypatch):
    monkeypatch.setattr(data, "SAMPLE", 40_000)
    x = np.sin(2 * np.pi * np.arange(2400) / 24)[:, None, None] + np.zeros((1, 100, 200))  # a day's cycle
    r, codec = codec_of(x.astype(np.float32), frames=1)
    assert data.sample_values(r, np.arange(2400)).shape == (1, 40_000)
    v = codec.variables[0]
    assert abs(v.mean) < 0.1 and v.std == pytest.approx(math.sqrt(0.5), rel=0.05)


def test_codec_layout_and_conditions_come_back_from_a_checkpoint(tmp_path):
    layout = opened(tmp_path, dataset()).layout
    codec = codec_of(RAIN, FIELD, names="censored,quantile")[1]
    c = data.Conditions.fit(told(), ["hour", "kind"], np.arange(48))
    torch.save([codec.state(), layout.state(), c.state()], tmp_path / "a.pt")
    states = torch.load(tmp_path / "a.pt", weights_only=True)
    again, x = data.Codec.load(states[0]), np.stack([RAIN, FIELD])[None]
    assert torch.equal(again.encode(x), codec.encode(x)) and data.Conditions(states[2]) == c
    again = data.Layout.load(states[1])
    assert again.match(layout, "itself") is None and again.dims == layout.dims and again.attrs == layout.attrs


# grids in words and pictures


def test_longitudes_all_the_way_round_areas_and_north(tmp_path):
    assert opened(tmp_path, dataset(lon=GLOBAL)).layout.wraps()
    assert opened(tmp_path, dataset(lon=GLOBAL), "d.nc", select="lon=-180:179").layout.wraps()
    layout = opened(tmp_path, dataset(lat=("lat", np.array([60.0, 0, 45, 30, 90]), {})), "b.nc").layout
    np.testing.assert_allclose(layout.area(), [0.5, 1, math.sqrt(0.5), math.sqrt(0.75), 0], atol=1e-9)
    assert record_of(FIELD).layout.area() is None and not layout.wraps()
    south_first = opened(tmp_path, part(lat=BACKWARDS), "c.nc").layout
    assert (south_first.north_up(FIELD) == FIELD[:, ::-1]).all()
    assert (record_of(FIELD).layout.north_up(FIELD) == FIELD).all()


def test_describe_says_what_was_understood(tmp_path):
    r = opened(tmp_path, dataset(np.where(FIELD > 279, RAIN, np.nan), name="pr", units="mm/h"))
    training, test = data.split_windows(r, 3)
    text = data.describe(r, data.Codec.fit(r, training, 3, "auto"), training, test, 3)
    words = ["5 x 6", "lat 60 to 56 degrees_north", "2020-01-01 00:00 to 2020-01-01 23:00"]
    words += ["standard", "one every 1 hours, 0 gaps", "mm/h, transform cbrt, floor 0 ("]
    assert [w for w in [*words, f"training {len(training)} clips"] if w not in text] == []


# written samples


def written(tmp_path, ds, reference=None):
    r = opened(tmp_path, ds)
    x = r.frames(0, 4)[None] if reference is None else r.frames(0, 4)[None, None]
    names = data.write_samples(tmp_path / "out", x, r.layout, "by hand", np.arange(4.0), reference)
    nc = xr.open_dataset(tmp_path / "out/samples.nc", decode_timedelta=False)
    assert names == ["samples.npz", "samples.nc"]
    return r, nc, np.load(tmp_path / "out/samples.npz")


def test_written_samples_open_in_xarray(tmp_path):
    r, nc, npz = written(tmp_path, dataset(units=np.int64(1)))
    assert nc.t2m.dims == ("realization", "time", "lat", "lon") and (nc.t2m[0] == FIELD[:4]).all()
    assert nc.t2m.attrs["units"] == "1" and nc.lat.attrs == NORTH and (nc.lat == LAT[1]).all()
    assert nc.attrs["history"] == "by hand" and nc.time.values.tolist() == [0, 1, 2, 3]
    assert (npz["samples"][0, 0] == FIELD[:4]).all() and (npz["lon"] == LON[1]).all()
    assert npz["channel"].tolist() == ["t2m"] and npz["dims"].tolist()[1] == "channel"


@pytest.mark.parametrize("name", ["samples.npz", "samples.nc"])
@pytest.mark.parametrize("references", [0, 3])
def test_written_samples_are_read_again(tmp_path, name, references):
    ds = dataset().assign(pr=(("time", "lat", "lon"), RAIN, {"units": "mm/h"}))
    r = opened(tmp_path, ds)
    shape = (*([references] if references else []), 2, 2, 4, 5, 6)  # ([R,] M, C, T, H, W)
    x = RNG.standard_normal(shape).astype(np.float32)
    x[..., 0, 0] = np.nan
    reference = r.hours[0] + 4.0 * np.arange(references) if references else None  # one where the other ends
    data.write_samples(tmp_path, x, r.layout, "", np.arange(4.0), reference)
    again = data.open_record(tmp_path / name)
    flat = x.reshape(-1, 2, 4, 5, 6)
    np.testing.assert_array_equal(again.frames(0, len(again)), np.concatenate(flat, 1))
    assert again.layout.names == ["t2m", "pr"] and [a["units"] for a in again.layout.attrs] == ["K", "mm/h"]
    assert data.runs(again, 2).tolist() == [4 * i + k for i in range(len(flat)) for k in range(3)]
    if references and name == "samples.nc":
        assert dates(again)[8] == "2020-01-01 04:00"


def test_grid_mapping_and_two_dimensional_coordinates_are_carried_over(tmp_path):
    mapping = {"grid_mapping_name": "transverse_mercator", "standard_parallel": [30.0, 60.0]}
    ds = two_d_coordinates().assign(crs=((), 1, mapping))
    ds.t2m.attrs |= {"grid_mapping": "crs"}
    _, nc, _ = written(tmp_path, ds)
    assert nc.t2m.attrs["grid_mapping"] == "crs" and nc.crs.attrs.keys() == mapping.keys()
    assert nc.crs.attrs["standard_parallel"].tolist() == [30, 60]
    assert (nc.nav_lat == TWO_D["nav_lat"][1]).all()


def test_coordinates_whose_names_are_taken_are_left_out(tmp_path):
    r, _, _ = written(tmp_path, dataset().assign_coords(samples=("lat", np.arange(5.0))))
    assert any("samples" in n for n in r.notes)


def test_numbers_of_frames_are_not_written_as_hours(tmp_path):
    assert written(tmp_path, dataset().drop_vars("time"))[1].time.attrs["units"] == "1"


def test_a_reserved_array_takes_its_space(tmp_path):
    array = data.reserved(tmp_path / "a.npy", (1000, 100), np.float32)
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes
    array[7] = 3
    array.flush()
    assert np.load(tmp_path / "a.npy")[7].tolist() == [3] * 100


# ------------------------------------------------------------------------------------------------------------
# verification, tables and pictures

RAIN_RATE = SimpleNamespace(name="rain", units="mm h-1", long_name="rain rate", floor=0.0, dry=0.01)
WARM = SimpleNamespace(name="t2m", units="K", long_name="", floor=None, dry=0.0, encode=np.asarray)


def stepping_layout(step=1.0, y=(2, 1, 0)):
    coords = {"y": {"dims": ["y"], "values": np.array(y), "attrs": {}}}
    return data.Layout(["rain"], [{}], size=(3, 2), coords=coords, step_hours=step)


def autoregressive(shape, seed=0, correlation=0.8, joins=()):
    """Independent cells that remember: correlation from frame to frame, 0.3 across joins. (N, T, H, W)"""
    x = np.random.default_rng(seed).standard_normal(shape)
    for t in range(1, shape[1]):
        r = 0.3 if t in joins else correlation
        x[:, t] = r * x[:, t - 1] + math.sqrt(1 - r * r) * x[:, t]
    return x


@pytest.fixture(scope="module")
def rain_pair():
    x = np.maximum(autoregressive((400, 6, 4, 5)), 0)
    return 1.5 * x[:200], x[200:]


@pytest.fixture(scope="module")
def wetter(rain_pair):
    return sample.compare(*rain_pair, 0.0, 0.1)["rows"]


# statistics


def test_white_noise_has_power_one_at_every_scale():
    x = np.random.default_rng(0).standard_normal((200, 6, 8, 10))
    for spectrum, length in ((sample.spatial_spectrum, 4), (sample.temporal_spectrum, 3)):
        k, power = spectrum(x)
        assert len(k) == length and np.abs(power - 1).max() < 0.05


@pytest.fixture(scope="module")
def kelvins():
    x = autoregressive((400, 6, 4, 5))
    a, b = 280 + x[:200], 281 + x[200:]
    return a, b, sample.compare(a, b)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_autocorrelation_is_that_of_the_process(missing):
    x = autoregressive((400, 6, 4, 5))
    x[np.random.default_rng(1).random(x.shape) < missing] = np.nan
    curve = sample.compare(280 + x[:200], 281 + x[200:])["curves"]["autocorrelation"]["samples"]
    np.testing.assert_allclose(curve, 0.8 ** np.arange(6), atol=0.05)


def test_quantiles_and_maxima_are_numpys(kelvins):
    rows, quantiles = kelvins[2]["rows"], kelvins[2]["curves"]["quantiles"]
    for i, (x, who) in enumerate(zip(kelvins, ("samples", "held_out"))):
        exact = np.quantile(x, sample.LEVELS)
        assert len(exact) == 54
        np.testing.assert_allclose(quantiles[who], exact, atol=0.3)  # of 24000 values, in the tail
        np.testing.assert_allclose(quantiles[who][1:27], exact[1:27], atol=0.02)
        for p in (0.9, 0.99, 0.999, 0.9999):
            assert rows[f"quantile {p}"]["values"][i] == pytest.approx(np.quantile(x, p), abs=0.1)
        for n in sample.RETURNS:
            maximum = np.quantile(x.max((1, 2, 3)), 1 - 1 / n)
            assert rows[f"clip maximum, 1 in {n}"]["values"][i] == pytest.approx(maximum, abs=0.15)


def test_kelvins_err_in_standard_deviations(kelvins):
    a, b, result = kelvins
    row = result["rows"]["mean"]
    assert row["unit"] == "std" and row["error"] == pytest.approx((a.mean() - b.mean()) / b.std(), rel=1e-6)


FACTOR = {"quantile 0.99": 0.5, "mean |bias| per cell": 0.5, "standard deviation": 0.5}
FACTOR |= {f"{which} power, distance": 10 * math.log10(2.25) for which in ("spatial", "temporal")}


@pytest.mark.parametrize("label", FACTOR)
def test_a_constant_factor_is_the_error_of_rain_and_squared_in_the_power(label, wetter):
    unit, within = ("dB", 0.3) if "power" in label else ("%", 0.1)
    assert wetter[label]["unit"] == unit
    assert wetter[label]["error"] == pytest.approx(FACTOR[label], abs=within)


def test_dry_is_what_lies_below_the_threshold(wetter, rain_pair):
    assert wetter["dry fraction"]["values"][1] == pytest.approx((rain_pair[1] <= 0.1).mean(), abs=1e-6)


def test_one_row_adds_a_statistic(rain_pair, monkeypatch, capsys):
    row = ("variation", "%", lambda s: s["std"] / s["mean"])
    monkeypatch.setattr(sample, "STATISTICS", [*sample.STATISTICS, row])
    result = sample.compare(*rain_pair, 0.0, 0.1)
    sample.print_rows("rain", result["rows"], result["note"])
    a = rain_pair[0]
    assert result["rows"]["variation"]["values"][0] == pytest.approx(a.std() / a.mean())
    assert "  variation  " in capsys.readouterr().out


def test_frames_that_are_wetter_than_others_are_seen(rain_pair):
    wet_end = rain_pair[1] * np.array([1, 1, 1, 1, 1, 2])[:, None, None]
    rows = sample.compare(wet_end, rain_pair[1], 0.0)["rows"]
    assert rows["mean |bias| per frame"]["error"] == pytest.approx(1 / 6)


def test_clips_too_short_for_a_row_have_none_of_it(rain_pair):
    rows = sample.compare(*(x[:, :2] for x in rain_pair), 0.0)["rows"]
    assert "autocorrelation, lag 1" in rows and "autocorrelation, lag 3" not in rows
    assert "temporal power, distance" not in sample.compare(*(x[:, :1] for x in rain_pair), 0.0)["rows"]


@pytest.fixture(scope="module")
def hills():
    rng = np.random.default_rng(1)
    return [np.maximum(rng.standard_normal((40, 4, 5, 6)), 0) * np.arange(1, 6)[:, None] for _ in range(2)]


def test_a_row_of_twice_the_area_counts_like_two(hills):
    weighted = sample.compare(*hills, 0.0, weights=np.array([3.0, 1.0, 2.0, 1.0, 2.0]))["rows"]
    repeated = sample.compare(*(np.repeat(x, [3, 1, 2, 1, 2], 2) for x in hills), 0.0)["rows"]
    for label in weighted:
        np.testing.assert_allclose(weighted[label]["values"], repeated[label]["values"], rtol=0.02, atol=1e-3)
    bias = "mean |bias| per cell"
    assert weighted[bias]["error"] == pytest.approx(repeated[bias]["error"], rel=1e-6)


def test_missing_cells_count_nothing(hills):
    holes = sample.compare(*(np.where(np.arange(6) == 2, np.nan, x) for x in hills), 0.0)
    cut = sample.compare(*(np.delete(x, 2, 3) for x in hills), 0.0)
    for label, row in holes["rows"].items():
        np.testing.assert_allclose(row["values"], cut["rows"][label]["values"], rtol=1e-3)
    assert holes["bias_map"][0][2] is None


def test_cells_where_it_hardly_ever_rains_have_no_ratio(rain_pair):
    desert = np.where(np.arange(20).reshape(4, 5) == 7, 0.01, 1.0)
    result = sample.compare(*(desert * x for x in rain_pair), 0.0)
    assert result["bias_map"][1][2] is None and result["bias_map"][1][1] == pytest.approx(0.5, abs=0.3)


def test_a_law_that_is_known_is_the_reference(rain_pair):
    rows = sample.compare(*rain_pair, 0.0, exact={"mean": 0.25})["rows"]
    assert rows["mean"]["error"] == pytest.approx(rain_pair[0].mean() / 0.25 - 1)
    assert rows["mean"]["values"][2] == 0.25 and len(rows["standard deviation"]["values"]) == 2


def test_the_exact_law_of_the_rain_has_the_names_of_the_statistics():
    law = data.rain_law(8, 6, sample.LEVELS, 0.01)
    samples, truth = np.random.default_rng(0).random((2, 12, 6, 8, 8))
    result = sample.compare(samples, truth, 0.0, exact=law)
    told = {label for label, row in result["rows"].items() if len(row["values"]) == 3}
    assert {"mean", "standard deviation", "dry fraction", "quantile 0.9999", "autocorrelation, lag 3"} <= told
    assert result["curves"]["spatial_power"]["exact"] == pytest.approx(law["spatial_power"])
    np.testing.assert_allclose(result["bias_map"], samples.mean((0, 1)) / law["map"] - 1, rtol=1e-3)
    by_frame = np.abs(samples.mean((0, 2, 3)) / law["mean"] - 1).mean()
    assert result["rows"]["mean |bias| per frame"]["error"] == pytest.approx(by_frame)


# sampling errors


def heavy_rain(rng, n):
    """Log-normal above a threshold: as skewed as rain. (n, 2, 4, 4)"""
    return np.maximum(np.exp(1.5 * rng.standard_normal((n, 2, 4, 4))) - 2, 0)


def test_intervals_of_skewed_statistics_cover_the_truth(monkeypatch):
    """Percentiles of the resampled error; turned round they cover 0.8 in place of 0.92."""
    monkeypatch.setattr(sample, "RESAMPLES", 100)
    rng, keys = np.random.default_rng(0), ("quantile 0.999", "clip maximum, 1 in 10", "clip maximum, 1 in 50")
    many = heavy_rain(rng, 100000)
    law = {"quantiles": np.quantile(many, sample.LEVELS)}
    law["returns"] = np.quantile(many.max((1, 2, 3)), 1 - 1 / np.array(sample.RETURNS))
    inside = []
    for _ in range(80):
        rows = sample.compare(heavy_rain(rng, 128), heavy_rain(rng, 144), 0.0, exact=law)["rows"]
        inside.append([rows[k]["within_sampling_error"] for k in keys])
    print("coverage of a nominal 95 %:", dict(zip(keys, np.mean(inside, 0))))
    assert np.mean(inside) >= 0.86


def test_intervals_cover_where_held_out_clips_remember(monkeypatch):
    """225 clips worth 25 free ones: the interval of a difference of nothing holds 0, and finds a real one."""
    monkeypatch.setattr(sample, "RESAMPLES", 80)
    rng, inside, chance, found, beyond, narrower = np.random.default_rng(0), [], [], [], [], []
    keys = ("mean", "quantile 0.9", "mean |bias| per cell", "spatial power, distance")
    for trial in range(60):
        free, bound = rng.standard_normal((300, 1, 1, 1)), autoregressive((1, 225, 1, 1, 1), 1 + trial)[0]
        a, b = (np.exp(0.4 * m + 0.3 * rng.standard_normal((len(m), 2, 4, 4))) for m in (free, bound))
        rows = sample.compare(a, b, 0.0)["rows"]
        inside.append([rows[k]["within_sampling_error"] for k in keys])
        chance.append([rows[f"mean |bias| {k}"]["error"] for k in ("beyond sampling", "per cell")])
        if trial % 6 == 0:
            law = sample.compare(a, b, 0.0, exact={"mean": math.exp(0.125)})["rows"]["mean"]
            narrower.append(np.diff(law["interval"]) / np.diff(rows["mean"]["interval"]))
            double = sample.compare(2.0 * a, b, 0.0)["rows"]
            found.append(not double["mean"]["within_sampling_error"])
            beyond.append(double["mean |bias| beyond sampling"]["error"])
    assert np.mean(inside) >= 0.75 and (np.mean(inside, 0) >= 0.7).all(), np.mean(inside, 0)
    assert all(found) and np.median(beyond) == pytest.approx(1.0, abs=0.15)
    assert np.divide(*np.mean(chance, 0)) < 0.75
    assert np.mean(narrower) < 0.5  # against the law the held-out clips' error is no part of it


def test_one_clip_says_nothing_of_its_error(rain_pair, capsys):
    result = sample.compare(rain_pair[0][:1], rain_pair[1][:1], 0.0)
    assert result["rows"]["mean"]["interval"] is None and "band" not in result["curves"]["quantiles"]
    sample.print_rows("rain", result["rows"], result["note"])
    assert "Too few independent clips" in capsys.readouterr().out


def resampled_means(samples, truth, groups=None, paired=False):
    """Means of samples and of truth by `bootstrap`, (1 + RESAMPLES, 2): first those of all."""
    draws = sample.bootstrap(samples, truth, lambda a: {"sum": a.sum(), "count": a.size}, groups, paired)
    return np.array([[s["sum"] / s["count"] for s in both] for both in draws])


def test_bootstrap_has_the_unbiased_variance_of_a_mean(monkeypatch):
    monkeypatch.setattr(sample, "RESAMPLES", 4000)
    five = np.random.default_rng(0).normal(size=5)
    means = resampled_means(five, five, paired=True)
    assert means[0, 0] == pytest.approx(five.mean())
    assert np.var(means[1:, 0]) == pytest.approx(five.var(ddof=1) / 5, rel=0.1)
    assert len(resampled_means(five[:4], five[:4], paired=True)) == 1


def test_pieces_of_a_sequence_are_drawn_together(monkeypatch):
    monkeypatch.setattr(sample, "RESAMPLES", 2000)
    rng = np.random.default_rng(0)
    group = rng.normal(size=80)
    means = resampled_means(np.repeat(group, 6)[:, None], rng.normal(size=(80, 1)), groups=80)
    assert np.std(means[1:, 0]) == pytest.approx(group.std() / math.sqrt(80), rel=0.06)
    assert [sample.few(n) for n in (4, 80, 400, 10**5)] == [4, 10, 20, 100]


def test_of_pairs_the_difference_is_known():
    rng = np.random.default_rng(0)
    truth, field = rng.normal(size=(80, 1)), rng.normal(size=(40, 4, 8, 8))
    means = resampled_means(np.repeat(truth, 6, 0) + 0.1, truth, groups=80, paired=True)
    np.testing.assert_allclose(means[:, 0] - means[:, 1], 0.1)
    low, high = sample.compare(field - 0.05, field)["rows"]["mean"]["interval"]
    assert low < -0.06 and high > -0.04
    pair = sample.compare(field - 0.05, field, paired=True)["rows"]["mean"]["interval"]
    assert np.allclose(pair, -0.05 / field.std(), atol=1e-6)


def test_correlation_between_variables():
    rng = np.random.default_rng(0)
    a, e = rng.standard_normal((2, 300, 3, 4, 5))
    x = np.stack([a, 0.6 * a + 0.8 * e, 5 + 3 * e], 1)
    x[0, 1, 0, 0, 0] = np.nan
    rows = sample.cross_correlations(x[:150], x[150:], ["u", "v", "w"])
    assert list(rows) == ["u with v", "u with w", "v with w"]
    assert [row["values"][0] for row in rows.values()] == pytest.approx([0.6, 0.0, 0.8], abs=0.03)
    assert np.diff(rows["u with v"]["interval"]) < 0.1
    shuffled = x[:150].copy()
    shuffled[:, 1] = rng.standard_normal(a[:150].shape)
    rows = sample.cross_correlations(shuffled, x[150:], ["u", "v", "w"])
    assert not rows["u with v"]["within_sampling_error"]


# what is dry, small or missing


@pytest.mark.parametrize("dust", [0.0, 8.7e-19])
@pytest.mark.filterwarnings("error")
def test_all_dry_held_out_clips_are_said_in_one_sentence(dust, capsys):
    a, b = np.zeros((2, 40, 6, 8, 8), np.float32)
    a[:5] = np.random.default_rng(0).gamma(0.5, 2, (5, 6, 8, 8))
    result = sample.compare(a, b + np.float32(dust), 0.0, 0.01)
    sample.print_rows("rain", result["rows"], result["note"])
    out = capsys.readouterr().out
    assert out.count("all dry") == 1 and "%" not in out.replace("95 %", "")
    assert result["rows"]["standard deviation"]["error"] is None
    assert result["rows"]["dry fraction"]["error"] == pytest.approx((a <= 0.01).mean() - 1)
    json.dumps(result, allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_missing_frames_and_cells_are_no_warning_and_no_nan():
    x = autoregressive((80, 4, 5, 6))
    x[:, :, 0, 0], x[:40:2], x[1], x[5, 2] = np.nan, np.nan, np.nan, np.nan
    result = sample.compare(x[40:], x[:40])
    json.dumps(result, allow_nan=False)
    assert all(row["interval"] for label, row in result["rows"].items() if "beyond" not in label)


def test_nothing_to_compare_is_one_line():
    x = np.zeros((4, 2, 3, 3))
    with pytest.raises(data.InputError, match="all of the held-out clips is missing"):
        sample.compare(x, x * np.nan)


def test_the_table_says_what_is_within_sampling_error(wetter, capsys):
    sample.print_rows("rain", wetter)
    lines = capsys.readouterr().out.splitlines()[2:]
    said = [line.endswith("within sampling error") for line in lines]
    assert said == [row["within_sampling_error"] for row in wetter.values()] and True in said


# ensembles


def test_crps_is_its_definition():
    rng = np.random.default_rng(0)
    truth, members = rng.normal(size=(40, 3, 4, 4)), rng.normal(size=(5, 40, 3, 4, 4))
    pairs = np.mean([np.abs(a - b) for a, b in itertools.permutations(members, 2)], 0)
    np.testing.assert_allclose(sample.crps(members, truth), np.abs(members - truth).mean(0) - pairs / 2)
    np.testing.assert_allclose(sample.crps(truth[None] + 1, truth), 1)


@pytest.mark.filterwarnings("error")
def test_missing_members_are_left_out():
    rng = np.random.default_rng(0)
    truth, members = rng.normal(size=30), rng.normal(size=(5, 30))
    members[3, 4], members[:, 5] = np.nan, np.nan
    score = sample.crps(members, truth)
    assert score[4] == pytest.approx(sample.crps(members[[0, 1, 2, 4]], truth)[4]) and np.isnan(score[5])


@pytest.fixture(scope="module")
def calibrated():
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(20000, 1, 1, 1))
    return signal + rng.normal(size=(5, 20000, 1, 1, 1)), signal + rng.normal(size=(20000, 1, 1, 1))


def test_spread_equals_error_if_calibrated(calibrated):
    spread, rmse = sample.spread_skill(*calibrated, None)
    assert spread / rmse == pytest.approx(1, abs=0.02)
    assert rmse == pytest.approx(math.sqrt(1 + 1 / 5), abs=0.02)


def test_interval_of_the_spread_covers(calibrated):
    members, truth = calibrated
    parts = [slice(i, i + 40) for i in range(0, 4000, 40)]
    ratio, low, high = np.transpose([sample.spread_ratio(members[:, p], truth[p]) for p in parts])
    assert 0.85 < ((low < 1) & (1 < high)).mean() < 1 and ratio.mean() == pytest.approx(1, abs=0.02)


def test_spread_and_error_in_the_transform(calibrated):
    members, truth = calibrated
    scores = sample.verify_ensemble(members, truth, {}, [0.0], g=lambda a: np.where(a > 0, 2.0, 0.0))
    wet, then = members > 0, truth > 0
    ratio = math.sqrt(wet.var(0, ddof=1).mean() * 6 / 5 / ((wet.mean(0) - then) ** 2).mean())
    assert scores["spread_skill_transformed"][0] == pytest.approx(ratio, rel=1e-6)


def test_ranks_are_flat_if_calibrated_and_ties_are_drawn(calibrated):
    dry = np.zeros((5, 20000))
    for members, truth in (calibrated, (dry, dry[0])):
        np.testing.assert_allclose(sample.rank_histogram(members, truth), 1 / 6, atol=0.012)


def test_drizzle_has_no_rank():
    drizzle = 0.01 * np.random.default_rng(0).random((5, 20000, 1, 1, 1))
    scores = sample.verify_ensemble(drizzle, np.zeros((20000, 1, 1, 1)), {}, [0.0], 0.01)
    np.testing.assert_allclose(scores["rank_histogram"], 1 / 6, atol=0.012)


@pytest.fixture(scope="module")
def gappy():
    """Members, truth and references of which cells, frames and scans are missing."""
    rng = np.random.default_rng(0)
    truth, members = rng.normal(size=(40, 3, 4, 4)), rng.normal(size=(5, 40, 3, 4, 4))
    climatology, persistence = rng.normal(size=(9, 1, 1, 4, 4)), truth[None, :, :1].copy()
    climatology[4], climatology[:3, ..., 1, 1] = np.nan, np.nan
    truth[:, 0], truth[:, :, 2, 1] = np.nan, np.nan
    return members, truth, {"persistence": persistence, "climatology": climatology}


def test_frames_without_truth_are_left_out(gappy):
    members, truth, references = gappy
    scores = sample.verify_ensemble(members, truth, references, [0.0, 1.0, 2.0])
    assert scores["lead_hours"] == [1.0, 2.0]
    assert scores["crps"] == pytest.approx(np.nanmean(sample.crps(members, truth)[:, 1:], (0, 2, 3)))
    persistence = np.nanmean(np.abs(truth - references["persistence"][0])[:, 1:], (0, 2, 3))
    assert scores["crps_persistence"] == pytest.approx(persistence)


@pytest.mark.filterwarnings("error")
def test_missing_scans_do_not_spoil_the_climatology(gappy):
    scores = sample.verify_ensemble(*gappy, [0.0, 1.0, 2.0])
    json.dumps(scores, allow_nan=False)
    expected = [1 / math.sqrt(math.pi)] * 2  # as of the members
    assert scores["crps_climatology"] == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("key", ["crps", "crps_climatology", "spread", "rmse", "spread_skill"])
def test_scores_weigh_rows_by_area(key, gappy):
    rows, lead, (members, truth, references) = np.array([1, 3, 2, 1]), [0.0, 1.0, 2.0], gappy
    repeated = [np.repeat(a, rows, -2) for a in (members, truth)]
    references = {k: np.repeat(r, rows, -2) for k, r in references.items()}
    repeated = sample.verify_ensemble(*repeated, references, lead)[key]
    weighted, even = (sample.verify_ensemble(*gappy, lead, area=a)[key] for a in (rows.astype(float), None))
    assert weighted == pytest.approx(repeated) and weighted != pytest.approx(even)


def test_ranks_of_what_lies_outside_or_is_missing():
    members = np.random.default_rng(0).normal(size=(5, 100))
    assert sample.rank_histogram(members, members[0] - 9)[0] == 1
    assert sample.rank_histogram(members, members[0] + 9)[5] == 1
    members[2, :50] = np.nan
    assert sample.rank_histogram(members, np.where(np.arange(100) < 50, -9.0, 9.0))[5] == 1


def test_a_forecast_that_is_right_everywhere_is_valid_json(capsys):
    zero = np.zeros((3, 8, 2, 4, 4))
    scores = sample.verify_ensemble(zero, zero[0], {"climatology": zero}, [1.0, 2.0])
    json.dumps(scores, allow_nan=False)
    sample.print_ensemble(RAIN_RATE, scores)
    assert scores["spread_skill"] == [None] * 3 and "nan" not in capsys.readouterr().out


# long sequences


@pytest.mark.parametrize("fades", [False, True])
def test_the_last_frames_are_compared_with_the_first(fades, capsys):
    x = autoregressive((60, 40, 6, 6), correlation=0.9)
    x = 5 + x * np.linspace(1, 0.5 if fades else 1, 40)[:, None, None]
    how = {"floor": None, "dry": 0.0, "weights": np.ones(6)}
    rows = sample.verify_sequences(x, WARM, [], 4, how)["drift"]
    assert rows["standard deviation"]["within_sampling_error"] != fades
    assert rows["mean"]["within_sampling_error"]
    assert rows["mean"]["values"][1] == pytest.approx(x[:, :5].mean())
    assert "last 5 frames against the first" in capsys.readouterr().out
    assert not sample.verify_sequences(x[:, :7], WARM, [], 4, how)


def test_seams_between_windows_are_seen():
    plan = data.windows(40, 12, 2)
    joins = [w[k][-1] + 1 for w, k in plan[:-1]]
    x = autoregressive((60, 40, 6, 6), correlation=0.9, joins=joins)
    found = sample.correlation_at_joins(x, plan)
    assert found == pytest.approx({"inside windows": 0.9, "across joins": 0.3}, abs=0.05)


# pictures


def test_pictures_tell_time_in_a_unit_of_its_own():
    for step, sign in ((1 / 120, "min"), (0.5, "min"), (1.0, "h"), (6.0, "h"), (24.0, "d"), (730.5, "d")):
        unit, short, hours = sample.unit_of_time(stepping_layout(step))
        assert short == sign and hours == {"minute": 1 / 60, "hour": 1, "day": 24}[unit]


@pytest.mark.parametrize("log", [True, False])
def test_an_axis_holds_its_values_and_marks_them(log):
    at, marks = sample.axis([1.0, 100.0, np.nan], log, 100, 200)
    assert 100 < at(1.0) < at(10.0) < at(100.0) < 200 and at(1.0) - 100 == pytest.approx(200 - at(100.0))
    assert (at(10.0) == pytest.approx(150)) == log
    assert len(marks) >= 3 and all(float(f"{v:.3g}") == v and 100 < at(v) < 200 for v in marks)
    assert np.isfinite(sample.axis([np.nan], log, 0, 1)[1]).all()


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_known_frames_are_framed_and_north_is_up(tmp_path):
    x = np.zeros((2, 3, 2))
    x[:, 0] = 1.0  # the first row of the file
    rows = [("clip", x, np.array([True, False]))]
    for y in ((2, 1, 0), (0, 1, 2)):
        sample.contact_sheet(tmp_path / f"{y[0]}.png", rows, RAIN_RATE, stepping_layout(y=y), np.arange(2.0))
    down, up = (pixels(tmp_path / f"{first}.png") for first in (2, 0))
    assert (down[60, 90] == up[60 + 2 * 35, 90]).all()  # 35 pixels a cell
    assert (down[60, 90] != up[60, 90]).any()
    assert down[50, 80].tolist() == [30] * 3 and down[50, 64 + 74 + 20].tolist() == [215] * 3


@pytest.mark.parametrize("labels,size", [("clip clip clip clip", (2, 2)), ("given draw", (2, 1))])
def test_animation_is_a_square_of_clips_or_a_row(labels, size, tmp_path):
    x = np.arange(12.0).reshape(3, 2, 2)
    rows = [(f"{label} {i}", x + i, np.zeros(3, bool)) for i, label in enumerate(labels.split())]
    sample.animation(tmp_path / "a.gif", rows, WARM, stepping_layout())
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.size == (132 * size[0], 132 * size[1])


@pytest.mark.parametrize("variable", [RAIN_RATE, WARM])
@pytest.mark.parametrize("clips", ["usual", "dry", "with land", "of one frame"])
@pytest.mark.filterwarnings("error")
def test_verification_pictures_of_anything_there_is(variable, clips, rain_pair, tmp_path):
    a, b = (x[:, : 1 if clips == "of one frame" else None].copy() for x in rain_pair)
    if clips == "dry":
        b[:] = 0
    if clips == "with land":
        a[..., 0], b[..., 0] = np.nan, np.nan
    result = sample.compare(a, b, variable.floor, 0.1)
    sample.verification_picture(tmp_path / "v.png", result, variable, stepping_layout())
    picture = pixels(tmp_path / "v.png")
    assert picture.shape == (715, 1200, 3) and (picture == (214, 69, 47)).all(-1).any()


@pytest.mark.parametrize("members", [1, 4])
def test_ensemble_picture(members, gappy, tmp_path, capsys):
    ensemble, truth, references = gappy
    scores = sample.verify_ensemble(ensemble[:members], truth, references, [0.0, 1.0, 2.0])
    curves = sample.compare(ensemble[0], truth)["curves"]
    sample.ensemble_picture(tmp_path / "e.png", scores, curves, WARM, stepping_layout())
    sample.print_ensemble(WARM, scores)
    assert ("RMSE" in capsys.readouterr().out) == (members > 1)
    assert (pixels(tmp_path / "e.png")[415:660, 860:1170] == (214, 69, 47)).all(-1).any() == (members > 1)


# ------------------------------------------------------------------------------------------------------------
# the two scripts: settings, training, checkpoints, tasks, drawing, bad input


TINY = "dataset=walk.npy frames=4 width=16 mults=1 patch=4 batch_size=4 warmup_iters=2 eval_iters=1"
TINY += " log_interval=1 max_iters=2 device=cpu dtype=float32"
DRAW = "num_samples=4 steps=3 verify=false device=cpu dtype=float32"
STILL = " learning_rate=1e-12 min_lr=0"  # a network of zeros: the Gaussian law alone
TOLD = "dataset=told.npz variables=walk condition=hill,tide,hour"


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder of arrays (60, 8, 8): a random walk, with land, with gaps, rain, and parts of it."""
    xr.Dataset()  # or skip: even an array is read through it
    d, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((60, 8, 8)), 0).astype(np.float32)
    rain = np.maximum(rng.standard_normal(walk.shape), 0).astype(np.float32)
    hole, land = walk[:40].copy(), walk.copy()
    hole[20:22, 2:5, 3:6], land[:, :3] = np.nan, np.nan
    arrays = {"walk": walk, "hole": hole, "land": land, "rain": rain, "now": walk[-2:], "short": walk[:6]}
    arrays["still"] = np.broadcast_to(rng.standard_normal((8, 8)), walk.shape)
    arrays["gaps"] = np.where(rng.random(walk.shape) < 0.2, np.nan, land)
    arrays |= {"coarse": walk[:40].reshape(40, 4, 2, 4, 2).mean((2, 4)), "narrow": walk[..., :4]}
    for name, a in arrays.items():
        np.save(d / f"{name}.npy", a)
    hours, tide = np.datetime64("2001-01-01", "h") + 6 * np.arange(60), np.arange(60) % 7 / 4
    told = {"time": hours, "tide": tide, "hill": np.arange(64.0).reshape(8, 8), "walk": walk}
    np.savez(d / "told.npz", **told)
    np.savez(d / "fewer.npz", **{k: v if k == "hill" else v[:50] for k, v in told.items()})
    np.savez(d / "told_coarse.npz", walk=walk.reshape(60, 4, 2, 4, 2).mean((2, 4)), time=hours, tide=tide)
    np.savez(d / "pair.npz", a=walk, b=rain)
    return d


@pytest.fixture
def workplace(inputs, monkeypatch):
    """In the folder of inputs, with built-in data of 20 seasons of 40 hours."""
    monkeypatch.chdir(inputs)
    monkeypatch.setattr(data, "SEASONS", 20)
    monkeypatch.setattr(data, "SEASON_HOURS", 40)
    return inputs


def parse(text):
    return dict(setting.split("=", 1) for setting in text.split())


def line(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def learn(folder, settings="", **more):
    """Train a tiny network in a folder; its checkpoint."""
    usual = parse(TINY.replace("mults=1", "")) if "network=vae" in settings else parse(TINY)
    train.main(line(usual | parse(settings) | more | {"out_dir": folder}))
    return checkpoint_of(folder)


def resume(folder, settings=""):
    train.main(line({"out_dir": folder, "init_from": "resume"} | parse(settings)))
    return checkpoint_of(folder)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    def trained(settings=""):
        folder = tmp_path_factory.mktemp("run")
        learn(folder, settings)
        return folder

    return cache(trained)


@pytest.fixture
def trained(workplace, once):
    """trained("name=value ..."): the folder of a tiny network, trained once a session."""
    return once


@pytest.fixture
def own(trained, tmp_path):
    """The same as a copy that may be trained on or damaged."""
    ignore = shutil.ignore_patterns("samples")
    return lambda settings="": Path(shutil.copytree(trained(settings), tmp_path / "own", ignore=ignore))


def drawn(folder, settings="", **more):
    """Run sample.py: x (N, C, L, H, W), the arrays of samples.npz and the report of verify.json, or None."""
    sample.main(line(parse(DRAW) | parse(settings) | more | {"out_dir": folder}))
    return results(folder)


def results(folder):
    with np.load(folder / "samples/samples.npz") as f:
        file, path = dict(f), folder / "samples/verify.json"
    x, report = file["samples"], json.loads(path.read_text()) if path.exists() else None
    return SimpleNamespace(x=x.reshape(-1, *x.shape[-4:]), file=file, report=report)


def posed(folder, settings=""):
    """The Problem of these settings."""
    c, given, rules = train.configure(sample.__file__, line(parse(DRAW) | parse(settings)))
    train.check_owners(c, given, rules)
    sample.check(c)
    return sample.pose(c, model_of(folder))


def model_of(folder):
    return train.Model.load(checkpoint_of(folder))


def checkpoint_of(folder, name="ckpt.pt"):
    return torch.load(folder / name, weights_only=True)


def log_of(folder):
    lines = [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "clips_per_s"} for entry in lines]


def state_of(folder):
    """What must not differ between two runs: the log without its clock, weights, averages and optimiser."""
    c = checkpoint_of(folder)
    moments = [t for s in c["optimizer"]["state"].values() for t in s.values()]
    tensors = [*c["model"].values(), *c["ema"].values(), *c["best"].values(), *moments]
    return log_of(folder), [t.numpy().tobytes() for t in tensors]


def clips_of(folder, held_out=False, **settings):
    """The clips of a run, with some of its settings changed."""
    model = model_of(folder)
    vars(model.settings).update(settings)
    record = model.record
    return train.Clips(record, data.split_windows(record, 4)[held_out], model, model.settings.min_frames)


def started(target, *args, limit=None, errors=os.devnull):
    """The id of a process that runs target(*args) as a script does, with a limit on the size of files."""
    if pid := os.fork():
        return pid
    code = 0
    try:
        torch.set_num_threads(1)  # a forked process has no thread pool
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train.run_main(partial(target, *args))
    except SystemExit as e:
        code = e.code
    finally:
        sys.stderr.flush()
        os._exit(code or 0)


def end(child, number=0):
    """The exit code of a process, after a signal."""
    os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def error_lines(path):
    """What a run wrote on stderr, but for its bar."""
    texts = re.split(r"[\r\n]", path.read_text())
    return [t for t in texts if t.strip() and not t.startswith(("training:", "sampling:"))]


# settings

EVERY = [(script, *s) for script in (train, sample) for s in train.read_settings(script.__file__)]
IDS = [f"{script.__name__} {name}" for script, name, *_ in EVERY]
every = pytest.mark.parametrize("script,name,default,comment,rules", EVERY, ids=IDS)
OWNERS = ("task", "sampler", "method", "schedule", "network")


@every
def test_brackets_hold_and_tables_exist(script, name, default, comment, rules):
    def accepts(value):
        try:
            return getattr(train.configure(script.__file__, [f"--{name}={value}"])[0], name) == value
        except data.InputError:
            return False

    assert accepts(default)
    for module, table in re.findall(r"\b(?:(data|diffusion)\.)?([A-Z]{4,}S)\b", comment):
        assert len(getattr(sys.modules[module] if module else script, table)) > 2
    for rule in rules:
        sign, _, bound = rule.partition(" ")
        if " | " in rule:
            assert all(accepts(choice) for choice in rule.split(" | ")) and not accepts("blue")
        elif sign in train.COMPARE:
            bound = type(default)(float(bound))
            beyond = bound + (1 if "<" in sign else -1) * (1 if isinstance(default, int) else 1e-6)
            assert accepts(bound) == ("=" in sign) and not accepts(beyond)
        else:
            assert rule == "fixed" or rule.partition("=")[0] in OWNERS


OTHERS = "width=48 mults=1,2,2 edit_logsnr=1.0 param=eps schedule=cosine weighting=min_snr sampler=ode"
OTHERS += " task=forecast device=cpu condition=day transform=none"


def another(name, default, rules):
    """A legal value of a setting other than its default."""
    choices = [c for rule in rules if " | " in rule for c in rule.split(" | ") if c != default]
    if name in parse(OTHERS):
        return type(default)(parse(OTHERS)[name])
    if choices or isinstance(default, bool):
        return choices[-1] if choices else not default
    if isinstance(default, str):
        return default + "-2"
    return 0.5 if {"< 1", "<= 1"} & set(rules) else default - 1 if "<= 60" in rules else default + 1


def edited(script, folder, **values):
    """A copy of a script with other values in its block."""
    text = Path(script.__file__).read_text()
    for name, value in values.items():
        text, n = re.subn(rf"(?m)^{name} = .+?  # ", lambda _: f"{name} = {value!r}  # ", text)
        assert n == 1
    path = folder / f"{script.__name__}.py"
    path.write_text(text)
    return path


ASKED = {train: ("schedule=logsnr", "schedule=flow"), sample: ("task=superres", "task=edit", "task=encode")}


@every
def test_an_edited_global_is_the_default_and_no_check_objects(
    script, name, default, comment, rules, tmp_path
):
    value, usual = another(name, default, rules), vars(train.configure(script.__file__, [])[0])
    path = edited(script, tmp_path, **{name: value})
    assert vars(train.configure(path, [])[0]) == usual | {name: value} != usual
    assert vars(train.configure(path, [f"--{name}={default}"])[0]) == usual
    for asked in ASKED[script]:
        c = train.configure(path, line(parse(asked)))[0]
        vars(c).update(exact=False, sampler="ode", churn=0.0)  # that check must refuse
        script.check(c)


EDITED = [  # globals, what is asked of the script then
    (sample, "known=4", "task=superres"),
    (sample, "method=guidance guidance_weight=2.0", "task=interpolate"),
    (sample, "sampler=ddim eta=0.5 spacing=rho edit_logsnr=1.0", "task=edit"),
    (sample, "sampler=pc snr=0.1 corrections=2 members=2", "task=inpaint"),
    (sample, "task=forecast known=1 spacing=rho", "sampler=dpmpp"),
    (train, "schedule=cosine shift=0.5 min_frames=2", "schedule=spectrum"),
]


@pytest.mark.parametrize("script,values,asked", EDITED)
def test_runs_with_edited_globals(script, values, asked, trained, tmp_path):
    types = {name: type(default) for owner, name, default, *_ in EVERY if owner is script}
    path = edited(script, tmp_path, **{name: types[name](value) for name, value in parse(values).items()})
    spec = importlib.util.spec_from_file_location("edited", path)
    sys.modules["edited"] = module = importlib.util.module_from_spec(spec)  # dataclasses look for it
    spec.loader.exec_module(module)
    for more in ("", asked):
        folder = tmp_path / f"out{more}" if script is train else trained()
        usual = TINY if script is train else DRAW
        module.main(line(parse(usual) | parse(more) | {"out_dir": folder}))


def test_help_names_what_a_table_has(capsys):
    with pytest.raises(SystemExit):
        train.configure(train.__file__, ["--help"])
    assert "min_snr" in capsys.readouterr().out


# every value of a table

PLANS = [f"schedule={name}" for name in ("spectrum", *D.SCHEDULES)]
PLANS += [f"weighting={name}" for name in D.WEIGHTINGS]
PLANS += [f"param={name}" for name in D.PARAMS]
PLANS += [f"transform={name} dataset=rain.npy" for name in data.TRANSFORMS]
PLANS += ["linear_skip=false", "transform=none,cbrt dataset=pair.npz", "gradient_accumulation_steps=2"]
PLANS += ["frames=1", "frames=5 min_frames=1", "checkpoint_activations=true"]
PLANS += ["network=dit time_patch=2", "network=dit min_frames=1", "coarsen=2", "coarsen=2 condition=coarse"]


DRAWS = [f"sampler={name} steps=20" for name in D.SAMPLERS]
DRAWS += ["spacing=rho", "spacing=time", "clip=true"]


@pytest.mark.parametrize("plan,drawing", [*((p, "spacing=time") for p in PLANS), *(("", d) for d in DRAWS)])
def test_trains_and_draws_with(plan, drawing, trained):
    folder = trained(plan)
    kept = {k: str(v).lower() for k, v in checkpoint_of(folder)["settings"].items()}
    assert parse(plan).items() <= kept.items() and np.isfinite(drawn(folder, drawing).x).all()


# training


def test_training_overfits_one_clip(workplace, tmp_path):
    learn(tmp_path, "dataset=still.npy linear_skip=false schedule=cosine max_iters=150 learning_rate=0.01")
    x = drawn(tmp_path, "steps=24 spacing=time sampler=ddim").x
    assert np.square(x - np.load("still.npy")[:4]).mean() < 0.1  # every sample is the one clip, of variance 1


def test_resume_is_bit_identical(workplace, tmp_path):
    learn(tmp_path, "max_iters=6 eval_interval=3")
    whole = state_of(tmp_path)
    os.replace(tmp_path / "ckpt.prev.pt", tmp_path / "ckpt.pt")
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"iter": 3, "lo')  # torn by a crash
    torch.manual_seed(123)
    resume(tmp_path)  # every setting comes from the checkpoint, the future is written anew
    assert state_of(tmp_path) == whole and [entry["iter"] for entry in whole[0]] == [1, 2, 3, 4, 5, 6]


def at_step(step, act):
    """learning_rate_at, with something done at a step."""
    honest = train.learning_rate_at
    return lambda now, c: (act() if now == step else None, honest(now, c))[1]


def test_stopped_by_a_signal_and_resumed_is_bit_identical(workplace, tmp_path, monkeypatch):
    plan = "max_iters=6 eval_interval=6 log_interval=4"
    learn(tmp_path / "whole", plan)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        m.setattr(train, "learning_rate_at", at_step(2, partial(os.kill, os.getpid(), signal.SIGTERM)))
        learn(tmp_path / "cut", plan)
    assert stop.value.code == 143 and checkpoint_of(tmp_path / "cut")["step"] == 3
    resume(tmp_path / "cut")
    (whole, weights), (cut, again) = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert weights == again and [entry["iter"] for entry in cut] == [3, 4, 6]
    mean = (3 * cut[0]["loss"] + cut[1]["loss"]) / 4  # a line is of the steps since the last
    assert whole[0]["loss"] == pytest.approx(mean, abs=2e-6) and whole[1] == cut[2]


def test_settings_given_on_resume_hold_and_the_others_are_kept(own):
    folder = own()
    resume(folder, "learning_rate=0.5 max_iters=3")
    kept = resume(folder, "max_iters=4")["settings"]
    assert kept["learning_rate"] == 0.5 and kept["batch_size"] == 4 and log_of(folder)[2]["lr"] > 0.01


def test_settings_given_on_resume_belong_to_what_the_checkpoint_says(own):
    assert resume(own("network=dit time_patch=2"), "max_iters=3 time_patch=2")["step"] == 3


def test_learning_rate_warms_up_and_decays():
    c = SimpleNamespace(learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=109)
    rates = [train.learning_rate_at(i, c) for i in (0, 4, 9, 59, 109, 200)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1, 0.1])


def test_a_clip_of_over_a_million_values_is_fitted(workplace, tmp_path):
    np.save(tmp_path / "large.npy", np.random.default_rng(0).standard_normal((24, 360, 360), np.float32))
    learn(tmp_path, f"dataset={tmp_path}/large.npy frames=8 batch_size=1 patch=36 max_iters=1")


def test_averages_keep_their_share(workplace, tmp_path):
    three = learn(tmp_path, "max_iters=3 eval_interval=2 warmup_iters=0 learning_rate=0.01")
    two = checkpoint_of(tmp_path, "ckpt.prev.pt")
    for key, now in three["model"].items():  # after n updates the average keeps (1 + n) / (10 + n) of itself
        torch.testing.assert_close(three["ema"][key], now.lerp(two["ema"][key], 3 / 12))


def test_weights_of_the_lowest_held_out_loss_are_drawn_from(workplace, tmp_path, capsys):
    learn(tmp_path, "max_iters=80 eval_interval=10 learning_rate=0.02 min_lr=0.02 eval_iters=4")
    losses = [entry["val_loss"] for entry in log_of(tmp_path) if "val_loss" in entry]
    assert min(losses) < losses[-1] and capsys.readouterr().out.count("are kept for sampling")
    train.main([f"--out_dir={tmp_path}", "--eval_only=true", "--ode_steps=0"])
    assert f"held-out loss {min(losses):.5f}" in capsys.readouterr().out
    weights = model_of(tmp_path).denoiser.network.state_dict()
    assert all(torch.equal(checkpoint_of(tmp_path)["best"][key], value) for key, value in weights.items())


def test_a_network_that_is_never_better_than_the_gaussian_law_is_not_drawn_from(workplace, tmp_path):
    kept = learn(tmp_path, "max_iters=4 eval_interval=2 learning_rate=10 warmup_iters=0")
    assert log_of(tmp_path)[-1]["val_loss"] > 1 and not any(v.any() for v in kept["best"].values())


def test_where_held_out_clips_are_estimated_better_by_the_law_alone_it_is_alone(
    workplace, tmp_path, monkeypatch, capsys
):
    law, network = {"-6..-4": 0.8, "-4..-2": 0.8}, {"-6..-4": 0.9, "-4..-2": 0.5}

    def evaluate(run, ema, *others):  # the network is worse as a whole, and better where it is used
        return [(0.8 if ema.trust.all() else 0.6, network), (0.7, law), (0.7, law)][: 1 + len(others)]

    monkeypatch.setattr(train, "evaluate", evaluate)
    trust = learn(tmp_path)["trust"]
    assert train.BIN_NAMES[int(trust.argmin())] == "-6..-4" and trust.sum() == len(trust) - 1
    assert "above it at log-SNR -6..-4 (1.12 times), not used there" in capsys.readouterr().out
    assert torch.equal(model_of(tmp_path).denoiser.trust, trust)
    assert torch.equal(
        checkpoint_of(tmp_path)["best"]["stem.weight"], checkpoint_of(tmp_path)["ema"]["stem.weight"]
    )
    better = {"-6..-4": 0.7, "-4..-2": 0.7}
    monkeypatch.setattr(train, "evaluate", lambda *_: [(0.6, better), (0.5, law), (0.7, law)])
    assert torch.equal(resume(tmp_path, "max_iters=3")["trust"], trust)  # of the weights that are kept
    assert "not used there" not in capsys.readouterr().out


def test_what_is_not_trusted_is_not_added():
    denoiser, _ = small_denoiser(small_unet(cond_channels=2))
    z, logsnr = torch.randn(2, 1, 4, 8, 8), torch.tensor([-5.0, -3.0])
    denoiser.trust[train.BIN_NAMES.index("-6..-4")] = 0
    added = (denoiser(z, logsnr) - denoiser.linear(z, logsnr)).abs().amax((1, 2, 3, 4))
    assert added[0] == 0 and added[1] > 0.01


def broken(steps):
    """Clips.__getitem__ with noise that is not a number in these training steps."""
    honest = train.Clips.__getitem__

    def batch(clips, stream):
        b, seed = honest(clips, stream), clips.model.settings.seed
        return b._replace(eps=b.eps * math.nan) if stream[0] == seed and stream[1] in steps else b

    return batch


def test_a_step_without_a_finite_gradient_is_left_out(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr(train.Clips, "__getitem__", broken({0, 2}))
    three, two = learn(tmp_path, "max_iters=3 eval_interval=2"), checkpoint_of(tmp_path, "ckpt.prev.pt")
    assert all(torch.equal(three["model"][k], v) for k, v in two["model"].items())
    assert [entry["skipped"] for entry in log_of(tmp_path)] == [1, 0, 1]  # since the last line


def infinite_loss(run, *_):
    """train.evaluate, where the held-out loss is not finite from step 4 on."""
    return [(loss, {"0..2": 1.0}) for loss in (1.0 if run.step < 4 else math.inf, 2.0, 2.0)]


INFINITE_RATE = {"learning_rate_at": lambda step, c: 1e-3 if step < 3 else math.inf}
INFINITE_RATE["keep_best"] = lambda run: ({}, "")
NOT_FINITE = [  # what is done in place of functions of train.py, settings, the message, the step that is kept
    (
        {"Clips.__getitem__": broken(range(7, 99))},
        "eval_interval=6",
        "no .* finite in .* 10 steps up to 17",
        12,
    ),
    (INFINITE_RATE, "eval_interval=2", "weights not finite at step 4, nothing is saved", 2),
    ({"evaluate": infinite_loss}, "eval_interval=2", "held-out loss not finite at step 4, .* not saved", 2),
]


@pytest.mark.parametrize("instead,plan,message,step", NOT_FINITE)
def test_what_is_not_finite_ends_a_run_and_is_not_saved(
    instead, plan, message, step, workplace, tmp_path, monkeypatch
):
    for name, f in instead.items():
        monkeypatch.setattr(f"train.{name}", f)
    with pytest.raises(RuntimeError, match=message):
        learn(tmp_path, f"max_iters=60 {plan}")
    kept = checkpoint_of(tmp_path)
    assert kept["step"] == step
    assert all(v.isfinite().all() for part in ("model", "ema") for v in kept[part].values())


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that are read, sizes that depend on data."""

    count = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        Waits.count += f in reads
        return f(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(workplace, tmp_path, monkeypatch):
    step, seen = train.train_step, []

    def watched(run, denoiser, batches, results):
        batch, Waits.count = next(batches), 0
        with Waits(), monkeypatch.context() as m:
            for name in ("cpu", "numpy", "tolist"):
                m.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("a tensor leaves its device"))
            out = step(run, denoiser, iter([batch]), results)
        seen.append(Waits.count)
        return out

    monkeypatch.setattr(train, "train_step", watched)
    learn(tmp_path, "max_iters=3 log_interval=3")
    assert seen == [0, 0, 0]


@slow
def test_nothing_is_compiled_again(workplace, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    seen, save, draw = [], train.save, sample.Sampler.draw

    def count(f):
        def counted(*args):
            out = f(*args)
            seen.append(counters["stats"]["unique_graphs"])
            return out

        return counted

    torch._dynamo.reset()
    counters.clear()
    eager = partialmethod(model.Network.compile_blocks, backend="eager")
    monkeypatch.setattr(model.Network, "compile_blocks", eager)
    monkeypatch.setattr(train, "save", count(save))
    monkeypatch.setattr(sample.Sampler, "draw", count(draw))
    learn(tmp_path, "max_iters=4 eval_interval=1 compile=true")
    trained, seen[:] = seen.copy(), []
    drawn(tmp_path, "num_samples=6 batch_size=2 compile=true")
    assert len(trained) == 4 and trained[0] == trained[-1] > 0
    assert len(seen) == 3 and seen[0] == seen[-1] and not counters["graph_break"]


def test_what_dead_processes_left_is_removed_and_no_more(own):
    folder, dead = own(), os.fork() or os._exit(0)
    os.waitpid(dead, 0)
    left, living = folder / f".{dead}.ckpt.pt.part", folder / f".{os.getpid()}.log.jsonl.part"
    for path in (left, living):
        path.write_text("half")
    with train.locked(folder):
        assert living.exists() and not left.exists() and (folder / "ckpt.pt").exists()


def test_batches_depend_on_seed_step_and_micro_alone(trained):
    stream, folder = (0, 3, 1), trained("dataset=gaps.npy")
    clips = clips_of(folder)
    batch = clips[stream]
    clips[0, 9, 9], torch.rand(1), np.random.rand()
    assert all(a is b or torch.equal(a, b) for a, b in zip(batch, clips_of(folder)[stream]))
    for other in (clips[1, 3, 1], clips[0, 4, 1], clips[0, 3, 0]):
        assert not any(torch.equal(getattr(batch, k), getattr(other, k)) for k in ("x", "eps", "logsnr"))


def test_conditions_are_dropped_together(trained):
    cond = clips_of(trained(TOLD), condition_dropout=0.3, batch_size=400)[0, 0, 0].cond
    dropped = cond[:, 0, 0, 0, 0] == 0
    assert cond.shape[1] == 5 and 0.2 < dropped.float().mean() < 0.4 and (cond[dropped] == 0).all()
    assert (cond[~dropped][:, 0] == 1).all() and (cond[~dropped][:, 1] != 0).all()


def test_missing_values_are_filled_with_draws(trained):
    clips = clips_of(trained("dataset=gaps.npy"), batch_size=64)
    batch, starts = clips[0, 0, 0], clips.where((0, 0, 0))[0]
    given = clips.model.codec.encode(data.read_clips(clips.record, starts, 4))
    truth = clips.model.codec.encode(np.stack([[np.load("walk.npy")[i : i + 4]] for i in starts]))
    assert torch.equal(batch.mask == 1, given.isfinite()) and batch.x.isfinite().all()
    assert torch.equal(batch.x[batch.mask == 1], given[batch.mask == 1])
    again = clips.gaussian.fill(given, clips.gaussian.draw(given, torch.Generator().manual_seed(9)))
    assert (batch.x - again)[batch.mask == 0].std() > 0.05  # a draw, not the mean
    gap = (batch.mask == 0) & (torch.arange(8)[:, None] >= 3)  # off land: others around it are known
    assert (batch.x - truth)[gap].std() < 0.8 * truth[gap].std()


def test_land_is_filled_with_draws_that_are_made_once(trained, monkeypatch):
    clips, generator = clips_of(trained("dataset=land.npy")), torch.Generator().manual_seed(0)
    x = clips.model.codec.encode(data.read_clips(clips.record, [5], 4)).expand(300, -1, -1, -1, -1)
    filled, law = clips.filled(x, np.full(300, 5), generator), clips.gaussian
    expected, land = law.fill(x, law.draw(x, generator)), x[0].isnan()
    assert torch.equal(filled.where(~land, 0), x.nan_to_num()) and len(filled.unique(dim=0)) > 50
    std = expected.std(0)[land]
    assert ((filled.mean(0) - expected.mean(0))[land] / std).pow(2).mean() < 2 / train.RESTS
    assert (filled.std(0)[land] / std).mean().item() == pytest.approx(1, abs=0.05)
    monkeypatch.setattr(D.Gaussian, "fill", None)
    assert clips.filled(x, np.full(300, 5), generator).isfinite().all()


@pytest.mark.parametrize("name", ["gaps", "land"])
def test_samples_are_nan_where_a_cell_never_has_data(name, trained):
    x = drawn(trained(f"dataset={name}.npy")).x
    assert np.isnan(x[..., :3, :]).all() and np.isfinite(x[..., 3:, :]).all()


def test_likelihoods_are_those_of_the_law(trained, capsys):
    folder = trained("dataset=gaussian size=8" + STILL)
    argv = "eval_only=true ode_steps=96 ode_clips=2 eval_iters=20"
    train.main(line(parse(argv) | {"out_dir": folder}))
    printed = capsys.readouterr().out
    rows = re.findall(r"  (\S.*?) +(-?\d+\.\d+) \+- (\S+) nats", printed)
    rows = {name: (float(mean), float(error)) for name, mean, error in rows}
    clips = clips_of(folder, held_out=True)
    law = clips.gaussian

    def expected(x):
        w = law.variances
        return 0.5 * (law.modes(x - law.mean) ** 2 / w + w.log() + math.log(2 * math.pi)).mean().item()

    assert rows["probability-flow ODE"][0] == pytest.approx(expected(clips[1, 0, 0].x[:2]), abs=0.05)
    bound, error = rows["continuous bound"]
    assert bound == pytest.approx(expected(torch.cat([clips[1, 0, i].x for i in range(20)])), abs=3 * error)
    assert rows["discrete bound, T = 1000"][0] > bound - 3 * error
    physical = bound + math.log(clips.model.codec.variables[0].std)  # log |dx / dy|
    assert rows["continuous bound, physical"][0] == pytest.approx(physical, abs=2e-4)


# checkpoints


def test_scratch_replaces_a_run_only_with_a_whole_checkpoint(own, monkeypatch):
    folder = own()
    before = {name: (folder / name).read_bytes() for name in ("ckpt.pt", "log.jsonl")}
    with monkeypatch.context() as m:
        m.setattr(train, "learning_rate_at", at_step(2, partial(os._exit, 9)))
        assert end(started(learn, folder, "init_from=scratch max_iters=9")) == 9
    assert before == {name: (folder / name).read_bytes() for name in before}
    assert learn(folder, "init_from=scratch seed=1 max_iters=3")["settings"]["seed"] == 1
    assert (folder / "ckpt.prev.pt").read_bytes() == before["ckpt.pt"]
    assert [entry["iter"] for entry in log_of(folder)] == [1, 2, 3]
    assert not (folder / "log.new.jsonl").exists()


@pytest.mark.parametrize("init_from,message", [("new", "holds a checkpoint"), ("resume", "has written")])
def test_a_checkpoint_written_meanwhile_is_not_replaced(
    init_from, message, own, trained, tmp_path, monkeypatch
):
    folder = own() if init_from == "resume" else tmp_path
    foreign, honest = (trained("seed=1") / "ckpt.pt").read_bytes(), train.start

    def slow(*args):
        run = honest(*args)
        (folder / "ckpt.pt").write_bytes(foreign)
        return run

    monkeypatch.setattr(train, "start", slow)
    with pytest.raises(data.InputError, match=message):
        learn(folder, init_from=init_from)
    assert (folder / "ckpt.pt").read_bytes() == foreign


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="shows when torch is being imported")
@pytest.mark.parametrize("script", [train, sample])
def test_an_interrupt_while_torch_is_imported_is_one_line(script):
    command = [sys.executable, script.__file__, "--out_dir=nowhere"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    assert child.communicate()[1] == f"{script.__name__}.py: interrupted\n" and child.returncode == 130


LONG = {learn: "init_from=scratch max_iters=99999", drawn: "num_samples=9999 batch_size=1"}
HELD = [(learn, "", "stopped by signal 2"), (drawn, "/samples", "interrupted")]


@pytest.mark.parametrize("task,where,message", HELD)
def test_one_process_holds_a_folder_until_it_is_interrupted(task, where, message, own, tmp_path):
    folder, errors = own(), [tmp_path / "first", tmp_path / "second"]
    first = started(task, folder, LONG[task], errors=errors[0])
    for _ in range(3000):
        if [*folder.glob("samples/parts-*/*.pt"), *folder.glob("log.new*")]:
            break
        time.sleep(0.02)
    assert end(started(task, folder, LONG[task], errors=errors[1])) == 2
    assert end(first, signal.SIGINT) == 130
    (early,), (late,) = (error_lines(path) for path in errors)
    assert message in early and f"another process is writing to {folder}{where}:" in late
    assert end(started(task, folder, "init_from=scratch" if task is learn else "")) == 0  # the system lets go


# tasks

POSED = {  # settings of a task: which of its frames are known, the reference
    "task=forecast": ([0, 1], 1),
    "task=forecast length=7 known=3": ([0, 1, 2], 2),
    "task=hindcast known=1": ([3], 3),
    "task=interpolate every=3": ([0, 3], 0),
    "task=superres factor=4": ([0, 1, 2, 3], 0),
    "task=inpaint": ([0, 1, 2, 3], 0),
    "task=edit": ([], 0),
    "task=extend input=walk.npy length=9": ([0, 1, 2, 3], 0),
}


@pytest.mark.parametrize("settings", POSED)
def test_a_problem_is_the_clip_and_what_is_known_of_it(settings, trained):
    walk, problem, n = np.load("walk.npy"), posed(trained(), settings), 4 if "extend" in settings else None
    frames = problem.mask.amax((0, 1, 3, 4)).nonzero().flatten().tolist()
    assert (frames, problem.reference) == POSED[settings]
    start, L = problem.hours[:, 0].astype(int), problem.hours.shape[1]  # the hours of a bare array are frames
    assert (problem.hours == start[:, None] + np.arange(L)).all()
    np.testing.assert_array_equal(problem.truth[:, 0, :n], np.stack([walk[i : i + (n or L)] for i in start]))
    held_out = data.split_windows(model_of(trained()).record, 4, max(L, 4))[1]
    assert "input" in settings or set(start) <= set(held_out)


def test_clips_with_a_gap_are_chosen_or_else_the_middle_is_hidden(trained):
    problem = posed(trained(), "task=inpaint input=hole.npy num_samples=5")
    assert problem.hours[:, 0].tolist() == [17, 18, 19, 20, 21]  # of which frames 20 and 21 have one
    assert (problem.mask == 0).flatten(1).sum(1).tolist() == [9, 18, 18, 18, 9]
    hidden = posed(trained(), "task=inpaint").mask[0, 0, 0] == 0
    assert hidden[2:6, 2:6].all() and hidden.sum() == 16


def test_static_fields_of_the_fine_grid_are_told(trained):
    problem = posed(trained(TOLD), "task=superres factor=2 input=told_coarse.npz")
    hill = np.arange(64.0).reshape(8, 8)
    expected = np.broadcast_to((hill - hill.mean()) / hill.std(), (4, 4, 8, 8))
    np.testing.assert_allclose(problem.told[:, 1], expected, rtol=1e-5, atol=1e-5)


GUIDED = ("interpolate", "superres", "inpaint input=hole.npy")
MET = ["task=forecast", "task=hindcast known=1", "task=interpolate every=3", "task=inpaint input=hole.npy"]
MET += ["task=superres", "task=superres factor=2 input=coarse.npy", "task=forecast input=now.npy"]
MET += [f"task={task} length=9 frames=4" for task in ("forecast", "hindcast", "interpolate")]
MET += ["task=extend input=walk.npy length=9", "task=inpaint"]
MET += [f"task={t} method={m}" for t in GUIDED for m in ("guidance", "imputation")]


@pytest.mark.parametrize("settings", MET)
def test_every_task_meets_what_is_known(settings, trained):
    problem, x = posed(trained(), settings), drawn(trained(), settings).x
    seen = D.Observation(problem.y, problem.mask, problem.factor)
    np.testing.assert_allclose(seen.A(model_of(trained()).codec.encode(x)), problem.y, atol=1e-4)
    assert np.isfinite(x).all() and x.shape == (4, 1, problem.hours.shape[1], 8, 8)


ENDS = sample.Task(lambda t, length, c: (t < c.known) | (t >= length - c.known))
COUNTS = {"forecast known=2": 1, "hindcast known=1": 3, "interpolate": 0, "inpaint": 0, "ends known=1": 0}


@pytest.mark.parametrize("task,reference", COUNTS.items())
def test_lead_times_count_from_what_is_known(task, reference, trained, monkeypatch):
    monkeypatch.setitem(sample.TASKS, "ends", ENDS)
    assert posed(trained(), f"task={task}").reference == reference


def test_a_task_that_leaves_nothing_to_draw_is_refused(trained, monkeypatch):
    monkeypatch.setitem(sample.TASKS, "ends", ENDS)
    with pytest.raises(data.InputError, match="leaves nothing to draw"):
        posed(trained(), "task=ends known=2")


def test_an_error_of_what_is_known_leaves_room(trained):
    settings = "task=forecast obs_std=0.3 steps=8"
    problem, x = posed(trained(), settings), drawn(trained(), settings).x
    off = (model_of(trained()).codec.encode(x) - problem.y)[:, :, :2]
    assert 0.01 < off.square().mean().sqrt() < 0.4


def test_an_ensemble_of_exact_forecasts_is_calibrated(workplace, tmp_path, monkeypatch):
    """A network of zeros upon the exact law of fields of 6 x 6 cells."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SEASONS", 80)
    kept = learn(tmp_path, "dataset=gaussian size=6 patch=2 max_iters=1" + STILL)
    field = data.Codec.load(kept["codec"]).variables[0]
    law = field_law(4, 6, -field.mean / field.std, field.std).map(torch.Tensor.float)
    torch.save(kept | {"gaussian": vars(law)}, tmp_path / "ckpt.pt")
    got = drawn(tmp_path, "task=forecast members=8 num_samples=640 batch_size=640 steps=16 verify=true")
    scores, C = got.report["z"]["ensemble"], gaussian_covariance(4, 6)
    assert abs(scores["spread_skill"][0] - 1) < 0.1
    assert np.abs(np.array(scores["rank_histogram"]) * 9 - 1).max() < 0.3
    variance = (C[72:, 72:] - C[72:, :72] @ torch.linalg.solve(C[:72, :72], C[:72, 72:])).diagonal()
    spread = np.array(scores["spread"]) * math.sqrt(8 / 9)
    assert spread == pytest.approx(variance.view(2, 36).mean(1).sqrt().numpy(), rel=0.05)
    others = np.minimum(scores["crps_persistence"], scores["crps_climatology"])
    assert (np.array(scores["crps"]) < others).all()
    assert got.file["samples"].shape == (80, 8, 1, 4, 6, 6) and got.file["time"].tolist() == [-1, 0, 1, 2]
    record = data.open_record("gaussian", size=6)
    at = np.searchsorted(record.hours, got.file["forecast_reference_time"])
    given = np.stack([record.frames(i - 1, i + 1)[0] for i in at])[:, None]
    given, known = np.broadcast_to(given, (80, 8, 2, 6, 6)), got.file["samples"][:, :, 0, :2]
    np.testing.assert_allclose(known, given, atol=2e-4)


@pytest.mark.parametrize("sampler", ["auto", "modes"])
def test_exact_clips_have_the_law_of_the_field(trained, sampler):
    settings = f"exact=true num_samples=300 batch_size=300 steps=24 sampler={sampler}"
    x = drawn(trained("dataset=gaussian size=8" + STILL), settings).x
    w, V = np.linalg.eigh(gaussian_covariance(4, 8).numpy())
    modes = x.reshape(300, -1) @ V[:, -12:]
    assert (np.abs(modes.mean(0)) < 4 * np.sqrt(w[-12:] / 300)).all()
    assert (np.abs(modes.var(0) / w[-12:] - 1) < 4 * math.sqrt(2 / 300)).all()


def test_exact_rain_is_unbiased_against_its_law(trained):
    settings = "exact=true num_samples=200 batch_size=200 steps=24 verify=true"
    got, law = drawn(trained("dataset=climate size=8"), settings), data.rain_law(8, 4, sample.LEVELS)
    clips = got.x.mean((1, 2, 3, 4))
    assert abs(clips.mean() - law["mean"]) < 3 * clips.std() / math.sqrt(200)
    assert abs((got.x == 0).mean() - law["dry"]) < 0.05
    assert got.report["rain"]["rows"]["mean"]["values"][2] == pytest.approx(law["mean"])


def test_what_follows_given_clips_is_compared_with_the_exact_law(own):
    folder = own("dataset=climate size=8")
    drawn(folder)
    settings = f"task=extend length=8 input={folder}/samples/samples.nc verify=true"
    assert len(drawn(folder, settings).report["rain"]["rows"]["mean"]["values"]) == 3


# drawing


def test_samples_depend_on_their_number_and_seed_alone(trained):
    settings = ("num_samples=5 batch_size=5", "num_samples=3 batch_size=2", "num_samples=3 seed=1")
    five, three, other = (drawn(trained(), s).x for s in settings)
    np.testing.assert_allclose(three, five[:3], rtol=1e-4, atol=1e-3)
    assert np.abs(other - three).min() > 0


@pytest.mark.parametrize("method", ["linear", "guidance", "imputation"])
def test_members_differ_and_do_not_depend_on_the_batch(method, trained):
    settings = f"task=inpaint input=hole.npy members=2 num_samples=6 method={method} batch_size="
    one, six = (drawn(trained(), settings + n).file["samples"] for n in "16")
    np.testing.assert_allclose(one, six, rtol=1e-3, atol=2e-3)
    assert six.shape == (3, 2, 1, 4, 8, 8) and np.abs(six[:, 0] - six[:, 1]).max() > 0.01


def test_an_edited_script_draws_anew(monkeypatch):
    before = sample.fingerprint(SimpleNamespace(input="", task="generate"), "")
    monkeypatch.setattr(D, "__file__", data.__file__)
    assert sample.fingerprint(SimpleNamespace(input="", task="generate"), "") != before


def parts_of(folder, settings=""):
    c = train.configure(sample.__file__, line(parse(DRAW) | parse(settings)))[0]
    digest = train.load_checkpoint(folder / "ckpt.pt")["digest"]
    return folder / f"samples/parts-{sample.fingerprint(c, digest)}"


GOES_ON = {"batch_size=1 verify=true num_samples=3": True, "steps=4": False, "seed=1": False}


@pytest.mark.parametrize("settings,same", GOES_ON.items())
def test_drawing_goes_on_where_the_same_drawing_stopped(settings, same, own):
    folder = own()
    parts = parts_of(folder)
    parts.mkdir(parents=True)
    torch.save(torch.full((1, 4, 8, 8), 0.25), parts / "000001.pt")
    x = drawn(folder, settings).x
    assert (np.ptp(x[1]) < 1e-6) == same and np.ptp(x[2]) > 0.1
    assert parts.exists() == (not same)  # those of another run are not touched
    resume(folder, "max_iters=3")
    assert parts_of(folder) != parts


SIZES = {"": [4], "length=11": [11], "length=20": [16, 16], "length=11 frames=8": [8, 8], "frames=3": [3]}
SIZES["task=extend"] = [16, 16, 16]


@pytest.mark.parametrize("settings", SIZES)
def test_how_many_frames_are_drawn_together(settings, trained):
    assert [len(w) for w, _ in posed(trained(), settings).windows] == SIZES[settings]


def test_a_window_sees_what_those_before_it_drew_and_never_land(trained, monkeypatch):
    seen, honest, folder = [], sample.make_denoiser, trained("dataset=land.npy")

    def spy(c, model, known, *args):
        seen.append((known.y.clone(), known.mask.clone()))
        return honest(c, model, known, *args)

    monkeypatch.setattr(sample, "make_denoiser", spy)
    x = drawn(folder, "task=extend length=6 frames=4 num_samples=1").x
    (_, first), (y, second) = seen  # frames 0 to 3 and 2 to 5
    assert first.max() == 0 and second[:, :, :2, 3:].min() == 1
    assert second[..., :3, :].max() == 0 and second[:, :, 2:].max() == 0 and (y[second == 0] == 0).all()
    before = model_of(folder).codec.encode(x)[:, :, 2:4, 3:]
    np.testing.assert_allclose(y[:, :, :2, 3:], before, atol=1e-4)


def test_written_samples_are_input_again_and_know_their_history(own):
    xr = pytest.importorskip("xarray")
    folder = own("dataset=told.npz variables=walk")
    x, path = drawn(folder).x, folder / "samples/samples.nc"
    np.testing.assert_array_equal(posed(folder, f"task=edit input={path}").truth, x)
    with xr.open_dataset(path, decode_timedelta=False) as ds:
        history = ds.attrs["history"]
    assert "sample.py --num_samples=4 --steps=3" in history and "dpmpp_mixed, 3 steps" in history
    assert "at step 2" in history


def test_little_noise_leaves_an_edit_close_to_its_clip(trained):
    settings = "task=edit steps=60 edit_logsnr=4.0 sampler=ancestral verify=true length=8 frames=4"
    truth, got = posed(trained(), settings).truth, drawn(trained(), settings)
    assert 1e-3 < np.abs(got.x - truth).mean() / truth.std() < 0.1
    report = got.report["walk"]
    assert report["rows"]["mean"]["values"][1] == pytest.approx(truth.mean(), rel=1e-4)  # what it was made of
    assert report["drift"]["mean"]["values"][0] == pytest.approx(got.x[:, :, 4:].mean(), rel=1e-4)
    assert set(report["joins"]) == {"inside windows", "across joins"}


@pytest.mark.parametrize("task,same", [("encode", [0, 1, 2]), ("morph", [0, 2])])
def test_encoded_clips_come_back(task, same, trained, capsys):
    settings = f"task={task} steps=32 num_samples=3"
    truth, x = posed(trained(), settings).truth, drawn(trained(), settings).x
    np.testing.assert_allclose(x[same], truth[same], atol=0.02 * truth.std())
    assert ("round trip: RMS" in capsys.readouterr().out) == (task == "encode") and np.ptp(x, 0).min() > 0


def test_guidance_exaggerates_what_is_told(own):
    folder = own(TOLD)
    kept = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.manual_seed(0)
    kept["best"] = kept["ema"]
    torch.nn.init.normal_(kept["best"]["cell.out.weight"], std=0.05)  # a network that says something
    torch.save(kept, folder / "ckpt.pt")
    plain, more, nothing = (drawn(folder, guidance_scale=s, steps=1).x for s in (1, 3, 0))
    np.testing.assert_allclose(more - nothing, 3 * (plain - nothing), rtol=1e-2, atol=1e-3)
    assert np.abs(plain - nothing).max() > 0.01


def test_an_upsampler_is_told_the_block_means(trained):
    m = model_of(trained("coarsen=2 condition=coarse"))
    clips = normal(3, 1, 4, 8, 8).float().numpy()
    told = m.tell_coarse(clips, torch.full((3,), 60.0), torch.Generator().manual_seed(0))
    means = m.codec.encode(clips.reshape(3, 1, 4, 4, 2, 4, 2).mean((4, 6)))
    close(told[:, :1, :, ::2, 1::2], means, atol=1e-4, rtol=1e-4)
    assert (told[:, 1] == 6).all()


def test_an_upsampler_sees_noise_of_the_level_it_is_told(trained):
    m, logsnr = model_of(trained("coarsen=2 condition=coarse")), torch.tensor([-2.0, 2.0])
    told = m.tell_coarse(np.zeros((2, 1, 400, 8, 8), np.float32), logsnr, torch.Generator().manual_seed(0))
    close(told[:, 0].var((1, 2, 3)), torch.sigmoid(-logsnr), rtol=0.05, atol=0)
    assert told[:, 1, 0, 0, 0].tolist() == pytest.approx([-0.2, 0.2])


@pytest.mark.parametrize("file", ["", "samples.npz", "samples.nc"])
def test_a_cascade_refines_every_sample_of_its_base(file, own, trained):
    base, fine = own("coarsen=2"), trained("coarsen=2 condition=coarse")
    means = drawn(base, "num_samples=5").x
    settings = f"num_samples=3 task=superres factor=2 input={base}/samples/{file}"
    given = posed(fine, settings).given(model_of(fine).codec)
    np.testing.assert_allclose(given[..., ::2, ::2], means[:3], rtol=1e-4)
    upper = drawn(fine, f"{settings} verify=true")
    assert means.shape == (5, 1, 4, 4, 4) and upper.x.shape == (3, 1, 4, 8, 8) and "walk" in upper.report
    with pytest.raises(data.InputError, match="has 5 clips: --num_samples is at most 5 x"):
        posed(fine, settings.replace("num_samples=3", "num_samples=6"))


def test_every_second_frame_of_a_base_model_is_filled_in(own, trained, workplace):
    twelve, walk = workplace / "twelve.npz", dict(np.load(workplace / "told.npz"))
    np.savez(twelve, walk=walk["walk"][::2], time=walk["time"][::2])
    base, fine = own(f"dataset={twelve}"), trained("dataset=told.npz variables=walk")
    given = drawn(base, "num_samples=2").x
    x = drawn(fine, f"num_samples=2 task=interpolate length=7 input={base}/samples/samples.nc").x
    np.testing.assert_allclose(x[:, :, ::2], given, rtol=1e-4, atol=1e-4)


def test_what_is_told_between_the_frames_of_a_base_model_is_said(trained, workplace, capsys):
    every_second = {k: v if k == "hill" else v[::2] for k, v in np.load("told.npz").items()}
    np.savez(workplace / "second.npz", **every_second)
    told = posed(trained(TOLD), "task=interpolate length=7 input=second.npz").told
    assert (told[:, 2, :6:2] == told[:, 2, 1:6:2]).all() and told[:, 2].unique().numel() > 1
    assert "kept for the 1 that follow it" in capsys.readouterr().out


def test_fields_that_are_told_may_come_alone(trained, workplace):
    told = dict(np.load(workplace / "told.npz"))
    np.savez(workplace / "wind.npz", wind=told["walk"] * 2 + 3, walk=told["walk"], time=told["time"])
    np.savez(workplace / "alone.npz", wind=told["walk"][:9] * 2 + 3, time=told["time"][:9])
    folder = trained("dataset=wind.npz variables=walk condition=wind,hour")
    problem = posed(folder, "input=alone.npz num_samples=3 length=9")
    held = (told["walk"] * 2 + 3 - model_of(folder).conditions.fitted[0]["mean"])[:9]
    expected = held / model_of(folder).conditions.fitted[0]["std"]
    np.testing.assert_allclose(problem.told[0, 1], expected, rtol=1e-4, atol=1e-4)
    assert drawn(folder, "input=alone.npz num_samples=2").x.shape == (2, 1, 4, 8, 8)


def test_a_field_that_equals_the_target_is_learnt(workplace, tmp_path):
    told = dict(np.load("told.npz"))
    np.savez("echo.npz", walk=told["walk"], echo=told["walk"], time=told["time"])
    settings = "dataset=echo.npz variables=walk condition=echo condition_dropout=0 batch_size=16 eval_iters=8"
    settings += " patch=1 learning_rate=0.005 max_iters=300 eval_interval=300 log_interval=300"
    learn(tmp_path, settings)
    hidden = {k: v for k, v in log_of(tmp_path)[-1]["val_bins"].items() if int(k.split("..")[1] or 99) <= 2}
    assert len(hidden) == 5 and max(hidden.values()) < 0.1  # 0.5 to 1 of the Gaussian law alone


def test_a_model_of_latents_learns_resumes_and_draws(own, tmp_path, capsys):
    vae, folder = own("network=vae"), tmp_path / "latent"
    assert resume(vae, "max_iters=3")["step"] == 3
    bins = json.loads((vae / "log.jsonl").read_text().splitlines()[-1])["bins"]
    learn(folder, vae=vae, patch=1)
    assert "whose autoencoder loses" in capsys.readouterr().out and set(bins) == {"reconstruction", "kl"}
    assert resume(folder, "max_iters=3")["step"] == 3
    clips = drawn(folder, "verify=true")
    assert clips.x.shape == (4, 1, 4, 8, 8) and "autoencoder" in clips.report["walk"]
    known = drawn(folder, "task=forecast input=now.npy").x
    assert known.shape == (4, 1, 4, 8, 8) and np.isfinite(known).all()


@pytest.fixture
def of_latents(trained):
    """The folder of a model of latents of two frames."""
    vae = trained("network=vae time_patch=2 latents=8")
    return trained(f"vae={vae} patch=1 condition=tide,hour dataset=told.npz variables=walk")


def test_latents_of_two_frames(of_latents):
    assert model_of(of_latents).denoiser.frames == 2  # latents
    problem = posed(of_latents, "task=extend known=2 length=8 frames=4 input=told.npz")
    assert problem.told.shape[2] == 4 and [w.tolist() for w, _ in problem.windows] == [[0, 1], [1, 2], [2, 3]]
    codec, settings = model_of(of_latents).codec, "task=forecast known=2 length=12 frames=4 members=2"
    settings += " verify=true input=told.npz"
    x, given = drawn(of_latents, settings).x, posed(of_latents, settings).truth
    expected = codec.decode(codec.encode(given[:, :, :2]))
    np.testing.assert_allclose(x[::2, :, :2], expected, rtol=1e-3, atol=1e-3)
    joins = drawn(of_latents, "length=8 frames=4 verify=true input=told.npz").report["walk"]["joins"]
    assert set(joins) == {"inside windows", "across joins"}


@pytest.mark.parametrize("task", ["edit", "morph", "encode"])
def test_latents_of_given_clips(task, of_latents):
    assert drawn(of_latents, f"task={task}").x.shape == (4, 1, 4, 8, 8)


def test_held_out_clips_of_a_large_grid_are_fewer(trained, monkeypatch):
    model = model_of(trained("dataset=gaussian size=8" + STILL))
    monkeypatch.setattr(data, "read_clips", lambda record, starts, frames: starts)
    assert len(sample.held_out_clips(model, 4)) == 40
    model.layout.size = (2**12, 2**11)  # 2^25 values a clip, of which eight are not enough
    assert len(sample.held_out_clips(model, 4)) == 20


def test_files_of_every_variable_are_named(own, capsys):
    folder = own("transform=none,cbrt dataset=pair.npz")
    drawn(folder, "task=forecast verify=true")
    names = capsys.readouterr().out.splitlines()[-1].split("/: ")[1].split(", ")
    assert sorted(names) == sorted(p.name for p in (folder / "samples").iterdir() if p.name[0] != ".")
    assert {"samples_b.gif", "verify_b.png", "verify.json", "samples.npz"} <= set(names)
    assert drawn(folder).report is None and not (folder / "samples/verify.png").exists()  # of an earlier run


# bad input


class Foreign:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.fixture
def wrecks(trained, of_latents, workplace):
    """Folders of checkpoints: ok, vae and latent sound, the others damaged or foreign."""
    if (workplace / "ok").exists():
        return workplace
    whole, kept = (trained() / "ckpt.pt").read_bytes(), checkpoint_of(trained())
    shrunk, half = checkpoint_of(trained("dataset=told.npz variables=walk")), len(whole) // 2
    shrunk["settings"]["dataset"] = "fewer.npz"
    contents = {
        "ok": whole,
        "vae": (trained("network=vae time_patch=2 latents=8") / "ckpt.pt").read_bytes(),
        "latent": (of_latents / "ckpt.pt").read_bytes(),
        "cut": whole[:half],
        "flip": whole[:half] + bytes([whole[half] ^ 16]) + whole[half + 1 :],
        "format": {"format": 99},
        "evil": {"format": Foreign()},
        "hollow": {"format": train.FORMAT},
        "alien": kept | {"settings": kept["settings"] | {"network": "gan"}},
        "shrunk": shrunk,
    }
    for name, content in contents.items():
        (workplace / name).mkdir()
        path = workplace / name / "ckpt.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
    (workplace / "flip/ckpt.prev.pt").write_bytes(whole)
    return workplace


BAD = """
train bogus=1: unrecognized
train max_iters=ten: invalid int
train learning_rate=nan: not a finite number
train batch_size=--: not a finite number
train blocks=10000: must be <= 64
train max_iters=100000000000000000000: of usual size
train eval_only=maybe: true or false
train param=w: not one of v, eps, x, score
train logsnr_min=9 logsnr_max=-9: is not below
train min_frames=9: more than --frames=8
train shift=0.5: belongs to --schedule=cosine
train width=20: multiple of 16
train mults=1,x: whole numbers
train width=16384: GB of memory
train batch_size=1000000: GB of memory
train dataset=climate size=1000000: GB, and
train condition=coarse: needs the size of blocks
train dataset=walk.npy frames=4 coarsen=3: does not divide
train network=vae vae=ok: exclude each other
train network=vae condition=hour: is told nothing
train dataset=walk.npy frames=4 network=vae latents=99: more than the 16 numbers of a patch
train latents=3: belongs to --network=vae
train transform=none,cubic: --transform=cubic is not one of auto, none
train describe=true init_from=resume out_dir=ok: leave --init_from out
train network=vae param=eps: --param belongs to --network=unet or dit, not vae
train vae=ok transform=log: --transform is that of --vae=ok
train dataset=walk.npy frames=4 coarsen=3 condition=coarse: does not divide
train dataset=walk.npy frames=4 vae=nowhere: or set --vae
train dataset=walk.npy frames=4 vae=ok: not trained with --network=vae
train device=tpu: not available
train dataset=elsewhere: elsewhere
train dataset=walk.npy frames=4 out_dir=walk.npy: cannot be written
train dataset=walk.npy out_dir=ok: holds a checkpoint
train dataset=climate select=y=3: is for files
train init_from=resume: no checkpoint
train init_from=resume out_dir=vae weighting=min_snr: belongs to --network=unet or dit, not vae
train dataset=told.npz variables=walk frames=4 min_frames=3 vae=vae: --min_frames must be multiples of 2
train init_from=resume out_dir=ok width=32: --width is 16 in the checkpoint and cannot change
sample out_dir=cut: not a checkpoint that can be read
sample out_dir=evil: not a checkpoint that can be read (UnpicklingError)
sample out_dir=flip: the one before it is flip/ckpt.prev.pt
sample out_dir=format: format 99, this program reads
sample out_dir=hollow: it has no layout, codec
sample out_dir=alien: does not fit this program
sample out_dir=shrunk task=forecast: no longer holds the 60 frames
sample task=paint: not one of generate
sample churn=1 sampler=ddim: belongs to --sampler=heun, not ddim
sample task=encode sampler=ancestral: deterministic
sample task=morph sampler=ode num_samples=1: at least 2
sample out_dir=ok input=walk.npy: belongs to another --task
sample out_dir=ok select=x=0:3: --select belongs to --input
sample out_dir=ok augment_logsnr=3: belongs to an upsampler
sample out_dir=ok num_samples=1000000000: GB of disk
sample task=forecast members=3: must be a multiple of --members=3
sample exact=true task=edit: belongs to --task=generate
sample exact=true out_dir=ok: not of walk.npy
sample out_dir=ok guidance_scale=2: --condition
sample out_dir=ok task=superres factor=2 length=17 input=coarse.npy: single window
sample out_dir=ok sampler=sde steps=3: unstable
sample out_dir=ok task=edit edit_logsnr=50: outside the grid
sample out_dir=ok task=edit input=narrow.npy: narrow.npy
sample out_dir=vae: holds an autoencoder
sample out_dir=latent task=superres: needs cells
sample out_dir=latent task=inpaint: needs cells
sample out_dir=latent exact=true: not of their latents
sample out_dir=latent task=interpolate: knows single frames
sample out_dir=latent task=forecast known=1: a latent is 2 frames
sample out_dir=latent length=5: --length, --frames and --known must be multiples of 2
sample out_dir=ok task=forecast known=4: leaves nothing of 4 frames
sample out_dir=ok task=forecast length=99: take a shorter --length
sample out_dir=ok task=superres factor=3: does not divide the grid of 8 x 8
sample out_dir=ok task=inpaint input=walk.npy: has no NaN
sample out_dir=ok task=forecast length=6 frames=4 obs_std=0.1: single window
sample out_dir=ok task=encode sampler=ode length=6 frames=4: single window
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_is_one_line_and_writes_nothing(case, wrecks, capsys, monkeypatch):
    def tree():
        return {p: p.stat().st_mtime_ns for p in wrecks.rglob("*") if p.name != ".lock"}

    (script, _, settings), message = case.split(": ")[0].partition(" "), case.split(": ", 1)[1]
    monkeypatch.setattr("sys.argv", [f"{script}.py", *line({"device": "cpu"} | parse(settings))])
    before = tree()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.run_main({"train": train, "sample": sample}[script].main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith(f"{script}.py: ") and error.count("\n") == 1
    assert tree() == before


# the machine


def test_a_full_disk_loses_nothing(own):
    """A limit on the size of files stands for the full disk."""
    folder = own()
    before = (folder / "ckpt.pt").read_bytes()
    assert end(started(resume, folder, "max_iters=4", limit=100_000)) == 1
    assert (folder / "ckpt.pt").read_bytes() == before and not list(folder.glob(".*.part"))
    assert end(started(drawn, folder, limit=1000)) == 1 and not (folder / "samples/samples.npz").exists()
    assert len(drawn(folder).x) == 4


TRIALS = int(os.environ.get("TRIALS", 20))


def until_done(run, again, unfinished, seconds, number):
    """Run, killed by a signal after some seconds; then again, as often as it takes."""
    child = started(*run)
    time.sleep(seconds)
    assert end(child, number) in (0, -9, -15, 143)  # done, killed, ended before the loop or in it
    assert end(started(*(again if unfinished() else run))) == 0


@slow
def test_killed_at_any_moment_and_resumed_is_identical(workplace, tmp_path):
    """SLOW=1 TRIALS=100: training killed by SIGKILL or SIGTERM at random, drawing by SIGKILL, until done."""
    plan, draws = "max_iters=30 eval_interval=3 log_interval=3", "num_samples=12 batch_size=2 steps=6"
    whole, begin, rng = tmp_path / "whole", time.perf_counter(), np.random.default_rng(0)
    assert end(started(learn, whole, plan)) == 0
    seconds = time.perf_counter() - begin
    assert end(started(drawn, whole, draws)) == 0  # with one thread, as below: threads change the rounding
    expected = results(whole).x
    for trial in range(TRIALS):
        out, number = tmp_path / f"trial{trial}", (signal.SIGKILL, signal.SIGTERM)[trial % 3 == 2]
        train_it = (learn, out, plan), (resume, out), (out / "ckpt.pt").exists
        until_done(*train_it, rng.uniform(0, 1.1 * seconds), number)
        assert state_of(out)[1] == state_of(whole)[1]
        draw_it = (drawn, whole, draws), (drawn, whole, draws), bool
        until_done(*draw_it, rng.uniform(0, 0.5), signal.SIGKILL)
        assert (results(whole).x == expected).all() and not list(whole.glob("samples/parts-*"))


@slow
@pytest.mark.parametrize(
    "task,settings", [(learn, "init_from=scratch max_iters=9"), (drawn, "num_samples=60")]
)
def test_of_two_that_start_at_once_one_goes_on(task, settings, own):
    """SLOW=1: the other is refused, and what is left is what one of them alone leaves."""
    folder, left = own(), None
    for trial in range(TRIALS + 1):
        children = [started(task, folder, settings) for _ in range(2 if trial else 1)]
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert codes == ([0, 2] if trial else [0]) and not list(folder.glob("samples/parts-*"))
        now = state_of(folder)[1] if task is learn else results(folder).x.tobytes()
        left = left or now
        assert now == left


def launch(ranks, script, settings, folder):
    """Run a script by torchrun, or by itself, in the working folder."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=29617"]
    command = [sys.executable, *torchrun * (ranks > 1), script.__file__]
    argv = line(parse(settings) | {"out_dir": folder})
    subprocess.run([*command, *argv], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@slow
@pytest.mark.parametrize("ranks", [(2, 2), (2, 1), (1, 2)])
def test_ranks_end_where_one_process_does(ranks, workplace, tmp_path):
    """SLOW=1: two gloo ranks, and a change of their number by resume; then they draw."""
    plan, one, out = f"{TINY} gradient_accumulation_steps=2 max_iters=8", tmp_path / "one", tmp_path / "out"
    launch(1, train, f"{plan} eval_interval=4", one)
    launch(ranks[0], train, f"{plan} eval_interval=4", out)
    os.replace(out / "ckpt.prev.pt", out / "ckpt.pt")
    launch(ranks[1], train, "init_from=resume", out)
    for part in ("model", "ema", "best"):
        expected, got = (dict(checkpoint_of(folder)[part]) for folder in (one, out))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    expected = drawn(one, "num_samples=5").x
    launch(2, sample, f"{DRAW} num_samples=5", one)
    np.testing.assert_allclose(results(one).x, expected, rtol=1e-4, atol=1e-4)


REAL = Path(os.environ.get("CLIMATE_FILES", "/nonexistent")).glob("*")
REAL = sorted(p for p in REAL if p.suffix in (".nc", ".zarr"))


@pytest.mark.skipif(not REAL, reason="CLIMATE_FILES names no folder with .nc or .zarr files")
@pytest.mark.parametrize("path", REAL, ids=lambda p: p.name)
def test_real_fields_come_back_on_their_own_grid(path, workplace, tmp_path):
    xr = pytest.importorskip("xarray")
    learn(tmp_path, dataset=path, batch_size=1)
    drawn(tmp_path, "num_samples=1 steps=2")
    got, given = (xr.open_dataset(p, decode_timedelta=False) for p in (tmp_path / "samples/samples.nc", path))
    name = next(iter(got.data_vars))
    assert got[name].attrs["units"] == given[name].attrs["units"]
    assert got[name].dims[2:] == given[name].dims[1:]
    for c in (c for c in got[name].coords if set(got[c].dims) <= set(got[name].dims[2:])):
        np.testing.assert_array_equal(got[c], given[c])
    assert (np.isnan(got[name].values[0]) == np.isnan(given[name].values).all(0)).all()


# ------------------------------------------------------------------------------------------------------------
# slow: tables that are printed, `SLOW=1 pytest -s test_diffusion.py -k bench` (or ruler)


def timed(work, rounds):
    """Median seconds of each function in a dict, in interleaved rounds after one to warm up."""
    times = {name: [] for name in work}
    for i in range(rounds + 1):
        for name, f in work.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            f()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    return {name: float(np.median(t[1:])) for name, t in times.items()}


def find_peer(channels, parameters):
    """Unet3D of video-diffusion-pytorch of the nearest number of parameters, if it is installed, or None."""
    if importlib.util.find_spec("video_diffusion_pytorch") is None:
        return None
    if importlib.util.find_spec("torchvision") is None:
        sys.modules["torchvision"] = MagicMock()  # the peer reads image files with it, nothing else
    from video_diffusion_pytorch import Unet3D

    def distance(dim):
        with torch.device("meta"):
            return abs(sum(p.numel() for p in Unet3D(dim, channels=channels).parameters()) - parameters)

    return Unet3D(min(range(16, 161, 8), key=distance), channels=channels)


def contestant(network, loss, forward):
    """(a training step, a forward pass) of a network, as functions of nothing."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, torch.no_grad()(forward)


@slow
@pytest.mark.parametrize(
    "shape,config,batch",
    [
        ((8, 32, 32), model.Config(1, 2, 64, (1, 2), 1, 4), 16),
        ((10, 64, 64), model.Config(1, 2, 144, (1, 2, 2), 2, 2), 1),
    ],
    ids=["default", "37M"],
)
def test_bench(shape, config, batch):
    """Clips per second and share of the measured peak, training and forward, beside a peer of this size."""
    device, dtype, _ = train.pick_device(SimpleNamespace(device="auto", dtype="auto", compile="auto"))
    law = D.Gaussian(torch.zeros(1, 1, *shape[1:]), torch.ones(1, *shape), (((-2,), torch.eye(shape[1])),))
    network = model.UNet(config)
    denoiser = model.Denoiser(network, law, "v", shape[0], torch.zeros(1, 1, 1, 1), dtype=dtype).to(device)
    x, logsnr = torch.randn(batch, 1, *shape, device=device), torch.zeros(batch, device=device)
    parameters = sum(p.numel() for p in network.parameters())

    def loss():
        return (denoiser(x, logsnr) ** 2).mean()

    step, forward = contestant(denoiser, loss, lambda: denoiser(x, logsnr))
    work = {"ours, training": step, "ours, forward": forward}
    peer = find_peer(1, parameters)
    if peer:
        peer, t = peer.to(device), torch.zeros(batch, device=device).long()
        cast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
        step, forward = contestant(peer, cast(lambda: (peer(x, t) ** 2).mean()), cast(lambda: peer(x, t)))
        work |= {"peer, training": step, "peer, forward": forward}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        denoiser(x[:1], logsnr[:1])
    flops, peak = counter.get_total_flops(), train.peak_flops(device, dtype)
    size = f"{parameters / 1e6:.1f} M parameters, {flops / 1e9:.1f} GFLOP a clip"
    print(f"\n{tuple(x.shape)}, {size}, {device}, {dtype}")
    print(f"peak of a 3x3 convolution {peak / 1e9:.0f} GFLOP/s")
    for name, seconds in timed(work, 5).items():
        rate, share = batch / seconds, ""
        if name.startswith("ours"):
            share = f"{(3 if 'training' in name else 1) * flops * rate / peak:8.1%} of the peak"
        print(f"  {name:<16}{rate:>10.3f} clips/s{share}")


GROWTH = {  # H, W, frames: settings of train.py
    (32, 32, 8): "batch_size=32",
    (64, 64, 8): "batch_size=8",
    (128, 128, 8): "batch_size=2",
    (256, 256, 8): "batch_size=2 patch=8",
    (721, 1440, 8): "batch_size=1 patch=16",
    (32, 32, 16): "batch_size=16",
    (32, 32, 32): "batch_size=8",
}


@slow
def test_growth(tmp_path, capsys):
    """What a clip of a larger grid costs: speed, and memory and time, of the start alone, too."""
    with capsys.disabled():
        head = f"{'clips/s':>9}{'M cells/s':>11}{'GB':>7}{'to start':>10}{'s to start':>12}"
        print(f"\n{'H x W x frames':<18}{head}  settings")
    costs = {}
    for (H, W, frames), settings in GROWTH.items():
        x = np.random.default_rng(0).standard_normal((max(60, 10 * frames), H, W), np.float32)
        np.save(tmp_path / "x.npy", x)
        plan = f"dataset={tmp_path}/x.npy out_dir={tmp_path}/out frames={frames} init_from=scratch"
        plan += f" max_iters=5 log_interval=1 eval_iters=1 {settings}"
        begin = time.time()
        command = [sys.executable, "-u", train.__file__, *line(parse(plan))]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        next(text for text in run.stdout if text.startswith("network"))  # all is ready for the first step
        start, used = time.time() - begin, Path(f"/proc/{run.pid}/status").read_text()
        early = int(re.search(r"VmHWM:\s+(\d+)", used)[1])
        run.stdout.read()
        _, status, usage = os.wait4(run.pid, 0)
        assert status == 0
        log = [json.loads(text) for text in (tmp_path / "out/log.jsonl").read_text().splitlines()]
        rate = max(entry["clips_per_s"] for entry in log)
        costs[H, W, frames] = 1 / (rate * H * W * frames)
        with capsys.disabled():
            name, cells = data.by((H, W, frames)), rate * H * W * frames / 1e6
            memory = f"{usage.ru_maxrss / 1e6:>7.2f}{early / 1e6:>10.2f}"
            print(f"{name:<18}{rate:>9.3f}{cells:>11.3f}{memory}{start:>12.1f}  {settings}")
        assert start < 30 and early < 3e6 and usage.ru_maxrss < 5e6
    assert costs[256, 256, 8] < 1.5 * costs[32, 32, 8]


@slow
@torch.no_grad()
def test_ruler(tmp_path, capsys):
    """A network's distance from the best denoiser of Gaussian data, and its samples' from the law, by band.

    OUT names a folder of `train.py --dataset=gaussian --size=16`; without it a short one is trained. The
    excess |v_hat - v_best|^2 / E|v - v_best|^2 is exact for a given z: the rest of the error is not
    predictable.
    """
    out = os.environ.get("OUT", str(tmp_path))
    if out == str(tmp_path):
        with torch.enable_grad():
            train.main([f"--out_dir={out}", "--dataset=gaussian", "--size=16", "--max_iters=300"])
    sample.main([f"--out_dir={out}", "--num_samples=1024"])
    trained = model_of(Path(out))
    T, size = trained.settings.frames, trained.settings.size
    field, generator = trained.codec.variables[0], torch.Generator().manual_seed(0)
    law = field_law(T, size, -field.mean / field.std, field.std)
    w = law.variances.flatten()
    x = trained.codec.encode(results(Path(out)).x).double()
    y = law.modes(x - law.mean).flatten(1) ** 2 / w  # 1 on average
    edges = [0, 1, 5, 20, 80, 320, 1280, len(w)]
    with capsys.disabled():
        print(f"\n{'modes':>12}{'log-SNR':>10}{'excess v-loss':>15}{'gain':>8}{'variance of samples':>22}")
        for lo, hi in zip(edges, edges[1:]):
            logsnr = torch.full((128,), -w[lo:hi].log().mean().item(), dtype=torch.float64)
            noise = torch.randn(2, 128, 1, T, size, size, generator=generator).double()
            z = D.diffuse(law.mean + law.field(law.variances.sqrt() * noise[0]), logsnr, noise[1])
            best, got = law.denoise(z, logsnr), trained.denoiser.denoise(z.float(), logsnr).double()
            excess = (got - best).pow(2).mean() / law.wiener(*D.alpha_sigma(logsnr[0]))[1].mean()
            theirs, ours = (law.modes(a - law.mean).flatten(1)[:, lo:hi] for a in (best, got))
            gain, each = (ours * theirs).sum() / theirs.pow(2).sum(), y[:, lo:hi].mean(1)
            text = f"{lo + 1:>6}-{hi:<5}{logsnr[0]:>10.1f}{excess:>15.2%}{gain:>8.3f}"
            print(f"{text}{each.mean():>14.3f} +- {each.std() / math.sqrt(len(each)):.3f}")
