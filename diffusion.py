"""Diffusion models in one notation: every process, loss, likelihood and sampler through the log-SNR.

    z = alpha x + sigma eps,   alpha^2 = sigmoid(logsnr),   sigma^2 = sigmoid(-logsnr),   eps ~ N(0, 1)

A discrete chain is a grid of log-SNRs, a schedule is the quantile function of a density of log-SNRs, the
variance-exploding process is z / alpha, and everything meets at one contract:

    denoise(z, logsnr) -> x_hat      z: (B, ...), logsnr: (B,), x_hat: (B, ...), the estimate of E[x | z]

Pure tensor functions: no modules, no files, no progress bars. Grids and coefficients are float64 on the CPU (a 0-dim
CPU tensor multiplies a tensor on any device, in that tensor's dtype, without a synchronisation), fields are whatever
the caller brings. Nothing here computes 1 - alpha^2: at |logsnr| = 30 that is lost to rounding.

Papers by their short names: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), SDE (Song et al. 2021, score-based
SDEs), NCSN (Song and Ermon 2019), VDM (Kingma et al. 2021), EDM (Karras et al. 2022), DPM++ (Lu et al. 2022),
distillation (Salimans and Ho 2022), min-SNR (Hang et al. 2023), K&G (Kingma and Gao 2023).
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import avg_pool3d, logsigmoid, softplus
from torch.nn.functional import interpolate as interpolate_nearest

# ----------------------------------------------------------------------------------------------------------------------
# the forward process


def expand(a, x):
    """Append dimensions to a (B,) until it broadcasts against x (B, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def alpha_sigma(logsnr):
    """Signal and noise scales of the variance-preserving process, any shape, accurate for |logsnr| up to 80."""
    return (0.5 * logsigmoid(logsnr)).exp(), (0.5 * logsigmoid(-logsnr)).exp()


def diffuse(x, logsnr, eps):
    """Draw z ~ q(z | x) = N(alpha x, sigma^2): x, eps (B, ...), logsnr (B,) -> z (B, ...). DDPM eq. 4."""
    alpha, sigma = alpha_sigma(logsnr)
    return expand(alpha, x).to(x) * x + expand(sigma, x).to(x) * eps


def renoise(z, logsnr_s, logsnr_t, eps):
    """Draw z_t ~ q(z_t | z_s) for a noisier t: the Markov transition alpha_{t|s} z_s + sigma_{t|s} eps. VDM eq. 21."""
    ratio = (0.5 * (logsigmoid(logsnr_t) - logsigmoid(logsnr_s))).exp()  # alpha_{t|s}
    std = (0.5 * logsigmoid(-logsnr_t)).exp() * (-torch.expm1(logsnr_t - logsnr_s)).sqrt()  # sigma_{t|s}
    return expand(ratio, z).to(z) * z + expand(std, z).to(z) * eps


# ----------------------------------------------------------------------------------------------------------------------
# schedules: t in [0, 1] (0 data, 1 noise) to log-SNR. Uniform t makes each the quantile function of a density

BETA_MIN, BETA_MAX = 0.1, 20.0  # the VP-SDE's linear beta; DDPM's 1e-4 .. 0.02 times 1000 steps
EDM_NORMAL = (1.0, 2.4)  # mean and standard deviation of EDM's training density for data of unit variance
RHO = 7.0  # exponent of EDM's sampling grid


def ddpm_logsnrs(num_steps=1000):
    """The exact discrete DDPM, betas 1e-4 .. 0.02: log-SNR of z_1 .. z_n, decreasing, (num_steps,) float64."""
    log_abar = torch.log1p(-torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)).cumsum(0)
    return log_abar - torch.log(-torch.expm1(log_abar))


def linear_time(logsnr):
    """The VP-SDE's u at a log-SNR, from -log alpha^2 = bmin u + (bmax - bmin) u^2 / 2 without cancellation; at most 1."""
    G = softplus(-logsnr)
    return (2 * G / (BETA_MIN + (BETA_MIN**2 + 2 * (BETA_MAX - BETA_MIN) * G).sqrt())).clamp(max=1)


root = lambda logsnr: (-0.5 * torch.as_tensor(logsnr, dtype=torch.float64) / RHO).exp()  # (sigma / alpha)^(1 / rho)
TIMES = {  # u(logsnr) in [0, 1] of the untruncated process, and logsnr(u); lo, hi the truncation, m, s of 'normal'
    "cosine": (lambda l, lo, hi, m, s: 2 / math.pi * torch.atan((-0.5 * l).exp()), lambda u, lo, hi, m, s: -2 * torch.log(torch.tan(math.pi / 2 * u))),
    "linear": (lambda l, lo, hi, m, s: linear_time(l), lambda u, lo, hi, m, s: -torch.log(torch.expm1(BETA_MIN * u + (BETA_MAX - BETA_MIN) / 2 * u**2))),
    "logsnr": (lambda l, lo, hi, m, s: (hi - l) / (hi - lo), lambda u, lo, hi, m, s: hi + (lo - hi) * u),
    "flow": (lambda l, lo, hi, m, s: torch.sigmoid(-0.5 * l), lambda u, lo, hi, m, s: 2 * (torch.log1p(-u) - torch.log(u))),
    "normal": (lambda l, lo, hi, m, s: torch.special.ndtr((m - l) / s), lambda u, lo, hi, m, s: m - s * torch.special.ndtri(u)),
    "rho": (lambda l, lo, hi, m, s: (root(l) - root(hi)) / (root(lo) - root(hi)), lambda u, lo, hi, m, s: -2 * RHO * torch.log(root(hi) + (root(lo) - root(hi)) * u)),
}  # fmt: skip
SCHEDULES = (*TIMES, "ddpm")


def logsnr_schedule(t, name="cosine", logsnr_min=-30.0, logsnr_max=30.0, shift=1.0, normal=EDM_NORMAL):
    """Log-SNR at time t, float64, same shape as t; strictly decreasing ('ddpm': a step function of 1000 levels).

    cosine   -2 log tan(pi u / 2)                (distillation; Foster's offset cosine is logsnr in [-7.824, 2.2255])
    linear   -log expm1(0.1 u + 19.9 u^2 / 2)    (DDPM and the VP-SDE in continuous time; ends at -10.05)
    ddpm     the same as the exact chain of 1000 steps (t in (i-1, i]/1000 is z_i)
    logsnr   linear in u                         (VDM; NCSN's geometric noise levels; EDM's log-uniform sigma)
    flow     2 log((1 - u) / u)                  (rectified flow; rescaling z makes it the same process)
    normal   quantiles of Normal(*normal)        (EDM's training density)
    rho      (sigma/alpha)^(1/7) linear in u     (EDM's sampling grid)

    Truncation to [logsnr_min, logsnr_max] is u = u(logsnr_max) + (u(logsnr_min) - u(logsnr_max)) t.
    shift adds 2 log(shift): below 1 it moves the density towards noise (simple diffusion, Hoogeboom et al. 2023); it
    means nothing for logsnr, rho and ddpm, whose levels the truncation or the table fixes.
    """
    t = torch.as_tensor(t).to("cpu", torch.float64)
    offset = 2 * math.log(shift)
    if name == "ddpm":
        table = ddpm_logsnrs()
        l = table[(torch.ceil(t * len(table) - 1e-9).long() - 1).clamp(0, len(table) - 1)]
    else:
        (time_at, logsnr_at), lo, hi = TIMES[name], logsnr_min - offset, logsnr_max - offset
        u0, u1 = time_at(t.new_tensor([hi, lo]), lo, hi, *normal)
        l = logsnr_at(u0 + (u1 - u0) * t, lo, hi, *normal)
    return (l + offset).clamp(logsnr_min, logsnr_max)


def log_density(logsnr, name="cosine", logsnr_min=-30.0, logsnr_max=30.0, shift=1.0, normal=EDM_NORMAL):
    """log p(logsnr) of the log-SNRs that uniform t gives, = -log |dlogsnr/dt|, float64, any shape; not for 'ddpm'."""
    offset = 2 * math.log(shift)
    (time_at, _), lo, hi = TIMES[name], logsnr_min - offset, logsnr_max - offset
    with torch.enable_grad():
        l = (torch.as_tensor(logsnr).to("cpu", torch.float64) - offset).detach().requires_grad_()
        slope = torch.autograd.grad(time_at(l, lo, hi, *normal).sum(), l)[0]
    u0, u1 = time_at(slope.new_tensor([hi, lo]), lo, hi, *normal)
    return torch.log(-slope / (u1 - u0))


def spectrum_range(w, margin=0.0):
    """The log-SNRs between which data with mode variances w (any shape) emerge from the noise, widened by margin.

    A mode of variance w emerges where alpha^2 w = sigma^2, at log-SNR -log w: the largest, the mean of the field, first,
    the smallest scales last.
    """
    return -math.log(float(w.max())) - margin, -math.log(float(w.min())) + margin


def stratified_times(batch_size, generator=None):
    """t_i = (u + i / B) mod 1: one uniform draw spread evenly over the batch (VDM app. I.1). (B,) float64."""
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return (u + torch.arange(batch_size, dtype=torch.float64) / batch_size) % 1


def sampling_grid(num_steps, name="cosine", logsnr_min=-30.0, logsnr_max=30.0, shift=1.0, normal=EDM_NORMAL):
    """The log-SNRs a sampler visits, noise first: (num_steps + 1,) float64, the last one +inf (no noise: z = x_hat).

    Even in the time of the schedule `name`: 'logsnr' is even in log-SNR, 'rho' is EDM's grid (in EDM's range with
    logsnr in [-8.76, 12.43]). A discrete chain has no more than its own levels.
    """
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    l = logsnr_schedule(t, name, logsnr_min, logsnr_max, shift, normal)
    return torch.cat([l.unique_consecutive(), t.new_tensor([math.inf])])


# ----------------------------------------------------------------------------------------------------------------------
# parameterisations: the network's output F estimates a x + b eps

PARAMS = {  # (a, b) from (alpha, sigma)
    "v": lambda alpha, sigma: (-sigma, alpha),  # dz / d angle (distillation eq. 9): the only one fit for both ends
    "eps": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),  # DDPM
    "x": lambda alpha, sigma: (1 + 0 * alpha, 0 * alpha),
    "score": lambda alpha, sigma: (0 * alpha, -1 / sigma),  # grad log q(z | x), denoising score matching
}


def scales(logsnr, z, param="v"):
    """alpha, sigma, a, b of each sample, shaped to multiply z."""
    alpha, sigma = (expand(c, z).to(z) for c in alpha_sigma(logsnr))
    return alpha, sigma, *PARAMS[param](alpha, sigma)


def target(x, eps, logsnr, param):
    """What F should be, a x + b eps: alpha eps - sigma x for v."""
    _, _, a, b = scales(logsnr, x, param)
    return a * x + b * eps


def to_x(F, z, logsnr, param):
    """x_hat from F and z = alpha x + sigma eps. 'eps' and 'score' divide by alpha."""
    alpha, sigma, a, b = scales(logsnr, z, param)
    return (b * z - sigma * F) / (alpha * b - sigma * a)


def to_eps(x_hat, z, logsnr):
    """eps_hat = (z - alpha x_hat) / sigma; the score is -eps_hat / sigma and v_hat = alpha eps_hat - sigma x_hat."""
    alpha, sigma, _, _ = scales(logsnr, z)
    return (z - alpha * x_hat) / sigma


def make_denoiser(network, param, cond=None):
    """Turn network(z, logsnr, cond) -> F into denoise(z, logsnr) -> x_hat, computed in z's dtype."""
    return lambda z, logsnr: to_x(network(z, logsnr.to(z), cond).to(z), z, logsnr, param)


# ----------------------------------------------------------------------------------------------------------------------
# the linear part: the best denoiser that knows only the data's mean and spectrum. A network adds the rest to it.
# It is EDM's skip connection c_skip with a variance per mode instead of one for all; for white data and v it is zero


def principal_axis(covariance):
    """The eigenvectors of covariances (..., n, n) as the rows of orthonormal matrices, the largest variance first."""
    return torch.linalg.eigh(covariance.double())[1].flip(-1).mT.to(covariance).contiguous()


def to_modes(x, axes, inverse=False):
    """Modes of clips, patterns in y times patterns in time and x: (..., T, H, W) both ways; keeps sums of squares.

    axes: orthonormal matrices whose rows are the patterns. [(R, T W, T W), (H, H)]: those in time and x together, one set for
    all patterns in y (R = 1) or one for each (R = H). [(T, T), (H, H), (W, W)]: time and x apart.
    """
    if len(axes) == 3:
        for dim, M in zip((-3, -2, -1), axes):
            x = (x.movedim(dim, -1) @ (M if inverse else M.T)).movedim(-1, dim)
        return x
    A, Y = axes
    x = (x if inverse else Y @ x).movedim(-2, 0)  # (H, ..., T, W)
    x = (x.flatten(-2).flatten(1, -2) @ (A if inverse else A.mT)).view(x.shape).movedim(0, -2)
    return Y.T @ x if inverse else x


ROWS = 2**26  # entries of the axes in time and x of longer clips, at most: beyond, all patterns in y share one set


def modes_of_length(w, axes, T):
    """Mode variances (C, T0, H, W) and axes for clips of T frames instead.

    The autocovariance of every pattern in y (of every pattern in space, where x is apart from time), taken for stationary,
    is cut, or goes on as that of the autoregression of order T0 - 1 that has it: of all that agree with it the one of
    maximum entropy (Burg 1975), and always a covariance.
    """
    T0, together = w.shape[1], len(axes) == 2
    if T == T0:
        return w, axes
    A = axes[0] if together else axes[0][None]  # (1 or H, T0 n, T0 n)
    n = A.shape[-1] // T0  # cells that are in a pattern with time: W or 1

    def lagged(A, most):  # for every lag products of frames so far apart, summed: (1 or H, patterns, n, n)
        A = A.double().unflatten(-1, (-1, n))
        return (torch.einsum("hmti,hmtj->hmij", A[:, :, : A.shape[2] - l], A[:, :, l:]) for l in range(most))

    def toeplitz(r, T):  # autocovariances [(..., n, n)] -> the covariance of T frames (..., n T, n T)
        return torch.cat([torch.cat([r[v - u] if v >= u else r[u - v].mT for v in range(T)], -1) for u in range(T)], -2)

    V = w.double().unflatten(-1, (-1, n)).movedim(1, -2)  # (C, H, W / n, T0, n)
    r = [torch.einsum("chwm,hmij->chwij", V.flatten(-2), a) / (T0 - l) for l, a in enumerate(lagged(A, T0))]
    lowest = torch.linalg.eigvalsh(toeplitz(r, min(T, T0)))[..., :1, None]  # averages over pairs of frames need not be a covariance
    white = (1e-6 - lowest).clamp(min=0) * torch.eye(n).to(lowest)  # what it takes to be one, of the same variance
    before = r[0].diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    r = [(a + white * (l == 0)) * before / (before + white.sum((-2, -1), keepdim=True)) for l, a in enumerate(r)]
    if T > T0 > 1:
        last = torch.cat(r[:0:-1], -2)  # covariance of T0 - 1 frames with the next one
        coefficients = torch.linalg.solve(toeplitz(r, T0 - 1), last)
    for l in range(T0, T):
        r.append(torch.cat(r[l - T0 + 1 :], -1) @ coefficients if T0 > 1 else 0 * r[0])
    apart = len(A) > 1 and len(A) * (T * n) ** 2 <= ROWS
    means = [a.mean((0, 2)) if apart else a.mean((0, 1, 2))[None] for a in r]  # (1 or H, n, n)
    A = principal_axis(toeplitz(means, T))
    V = sum((1 + (l > 0)) * torch.einsum("chwij,hmij->chwm", r[l], a) for l, a in enumerate(lagged(A, T))).unflatten(-1, (T, n))
    return V.movedim(-2, 1).flatten(-2).clamp(min=1e-6).to(w), [(A if together else A[0]).to(w), *axes[1:]]


FACTORS = (2, 4, 8)  # sides of the block means that a network is told in training
TOLD_STD = 0.2  # of cells about what is told of them, to the linear part alone: it then leaves them to z where that says more, and is found in fewer steps
NEARLY = 0.02  # the same where a network's estimate is moved


def known_projection(weight):
    """The orthogonal projection of clips onto what is known of them, lift(A(x)), from the weights in Observation.channels().

    weight (B, C, T, H, W): 1, or 1 / factor^2 for block means, each clip with a factor of its own.
    """
    parts = []
    for f in (1, *FACTORS):
        if not any(n % f for n in weight.shape[-2:]):
            which = ((weight * f**2 - 1).abs() < 0.01).to(weight)
            parts.append(Observation(which, avg_pool3d(which, (1, f, f)), f))  # y is not asked for
    return lambda x: sum(known.lift(known.A(x)) for known in parts)


def shift_to_known(P, missing, v, axes, std=TOLD_STD, steps=16):
    """V P (P V P + std^2)^-1 missing: how far E[x | z] moves when its known part P x is off by `missing` (B, C, T, H, W).

    P: a projection like that of known_projection. V = Cov[x | z] has the variances v (B, C, T, H, W) in the modes, axes as in
    to_modes. By conjugate gradients, at most `steps` of them, preconditioned by the inverse of V, cut to what is known. The
    known cells are taken to be within std: the larger it is the fewer steps are needed, and where frames are known fewer
    than where there are holes.
    """
    scaled = lambda x, v: to_modes(v * to_modes(x, axes), axes, inverse=True)
    S = lambda u: P(scaled(u, v)) + std**2 * u
    return scaled(conjugate_gradients(S, missing, steps, lambda r: P(scaled(r, 1 / (v + std**2))), tolerance=1e-8), v)


def wiener(alpha, sigma, w):
    """(gain, variance) of a Gaussian mode of variance w: E[x | z] = gain z, Var[x | z] = variance."""
    total = alpha**2 * w + sigma**2
    return alpha * w / total, sigma**2 * w / total


def linear_part(z, logsnr, mean, w, axes, param, known=None, steps=16):
    """What a network of this parameterisation should say if the data were Gaussian with this mean and mode variances w.

    Per mode of z - alpha mean: E[x - mean | z] = alpha w z / (alpha^2 w + sigma^2), Wiener's filter, and
    E[eps | z] = sigma z / (alpha^2 w + sigma^2). mean (C, 1, H, W), w (C, T, H, W) or one per clip, axes as in to_modes,
    z (B, C, T, H, W), logsnr (B,) -> F like z, the scale (B, 1, 1, 1, 1) of what is left, the estimates of x, (x_hat - mean)
    over its standard deviation, and of eps, like z, which together are z again, better conditioned (beside weather as a whole
    the finest scales are faint in z), and x_hat. The scale is the root of the mean over modes of (alpha w / (alpha^2 w + sigma^2))^2,
    the variance of v that is unknown times the share of it that z tells of. It goes to 0 in pure noise, where x_hat is the
    mean of the data whatever their law, and to 1 without noise.

    known: Observation.channels(), (B, 2C, T, H, W). F and x_hat are then given y as well.
    """
    alpha, sigma, a, b = scales(logsnr, z, param)
    total = alpha**2 * w + sigma**2  # variance of the modes of z
    gain, variance = wiener(alpha, sigma, w)
    rest = (gain**2).mean((1, 2, 3, 4), keepdim=True).sqrt()
    std = (alpha**2 * w**2 / total).mean((1, 2, 3, 4), keepdim=True).sqrt()
    Z = to_modes(z - alpha * mean, axes)
    x, eps = to_modes(torch.stack([gain * Z, sigma / total * Z]), axes, inverse=True)
    x_hat, F = mean + x, a * (mean + x) + b * eps
    if known is not None:
        y, weight = known.chunk(2, 1)
        P = known_projection(weight)
        shift = shift_to_known(P, y - P(x_hat), variance, axes, steps=steps)
        x_hat, F = x_hat + shift, F + (a - b * alpha / sigma) * shift  # eps moves by -alpha / sigma times as much
    return F, rest, x / std, eps, x_hat


def above_lowest(z, logsnr, low):
    """asinh((z - alpha low) / sigma): how far z is above where the lowest value x can take would be, in units of the noise.

    Where rain is dry x is `low` exactly, and the noise can be read off: with a resolution that z itself lacks in bfloat16
    beside heavy rain. asinh keeps that near 0 and grows like a logarithm beyond. low (C, 1, 1, 1), z (B, C, T, H, W).
    """
    alpha, sigma, _, _ = scales(logsnr, z)
    return torch.asinh((z - alpha * low) / sigma)


# ----------------------------------------------------------------------------------------------------------------------
# losses

WEIGHTINGS = {  # log of the factor m on the squared error of v. In K&G's form 1/2 E_p[w/p |eps - eps_hat|^2], w = 2 p m / alpha^2
    "v": lambda l, log_p: 0 * l,  # m = 1, w = 2 p / alpha^2 (SNR + 1 on x)
    "eps": lambda l, log_p: logsigmoid(l),  # m = alpha^2, w = 2 p (DDPM's L_simple)
    "x": lambda l, log_p: logsigmoid(-l),  # m = sigma^2, w = 2 p / SNR
    "truncated_snr": lambda l, log_p: l.clamp(min=0) + logsigmoid(-l),  # m = max(SNR, 1) sigma^2, w = 2 p max(1, 1 / SNR) (distillation)
    "min_snr": lambda l, log_p: l.clamp(max=math.log(5)) - softplus(l),  # m = min(SNR, 5) / (SNR + 1), w = 2 p min(1, 5 / SNR)
    "elbo": lambda l, log_p: logsigmoid(l) - log_p.to(l) - math.log(2),  # m = alpha^2 / (2 p), w = 1 (VDM eq. 14); log_p is log p(l)
    "sigmoid": lambda l, log_p: WEIGHTINGS["elbo"](l, log_p) + logsigmoid(2 - l),  # w = sigmoid(2 - logsnr) (K&G)
}  # fmt: skip


def log_v_factor(logsnr, param):
    """log of |error of v|^2 / |error of F|^2: 1 for v, 1/alpha^2 for eps, 1/sigma^2 for x, sigma^2/alpha^2 for score."""
    return {"v": 0 * logsnr, "eps": -logsigmoid(logsnr), "x": -logsigmoid(-logsnr), "score": -logsnr}[param]


def masked_mean(a, mask=None):
    """Mean over all but the first dimension, over the entries where mask (broadcastable, 0 or 1) is 1. (B,)"""
    if mask is None:
        return a.flatten(1).mean(1)
    mask = mask.expand_as(a)
    return (a * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def training_loss(network, x, logsnr, eps, param="v", weighting="v", log_p=None, mask=None, cond=None, power=2):
    """The weighted loss of each sample (B,), and its plain squared v-error (B,), the same ruler for every setting.

    x, eps (B, ...), logsnr (B,) float64; mask: 1 where x is data; power 1 is the absolute error with the root of the weight.
    The weight and the conversion to v are joined in logs, so nothing overflows where they cancel.
    """
    z = diffuse(x, logsnr, eps)
    F = network(z, logsnr.to(z), cond)
    error = (F.to(z) - target(x, eps, logsnr, param)).abs()
    log_factor = log_v_factor(logsnr, param)
    weight = (power / 2 * (WEIGHTINGS[weighting](logsnr, log_p) + log_factor)).exp()
    v_error = masked_mean(error.detach() ** 2, mask) * log_factor.exp().to(z)
    return weight.to(z) * masked_mean(error**power, mask), v_error


# ----------------------------------------------------------------------------------------------------------------------
# likelihoods, in nats per sample: lower is better for bounds, log p is log p


def clip_posterior(x, z, logsnr, others=None):
    """E[x_i | z_i, the clips]: which of x and others a z came from is uncertain, and the average over that is a better target.

    By the tower rule its mean given z_i is E[x | z_i] still, however many others (N, ...) drawn like x there are, so the best
    denoiser is the same and only the variance of the gradient falls (Rao-Blackwell; Xu et al. 2023). It matters in much noise:
    elsewhere the weights are 1 and 0 and x_i is itself. x, z (B, ...), logsnr (B,) -> (B, ...)
    """
    alpha, sigma = (c.to(x)[:, None] for c in alpha_sigma(logsnr))
    sets = [a.flatten(1) for a in (x, others) if a is not None]
    # -|z_i - alpha_i x_j|^2 / 2 sigma_i^2 + c
    log_p = torch.cat([alpha / sigma**2 * (z.flatten(1) @ a.T - alpha / 2 * torch.linalg.vecdot(a, a)) for a in sets], 1)
    weights = (log_p.softmax(1) - torch.eye(*log_p.shape).to(x)).split([len(a) for a in sets], 1)  # x_i itself is not multiplied: TF32 would round it
    return x + sum(p @ a for p, a in zip(weights, sets)).view_as(x)


def two_steps_in_one(denoise, z, t, mid, s, modes):
    """The x_hat with which one step of `flow` from log-SNR t to s ends where two, by way of mid, do. t, mid, s (B,), s up to inf.

    Targets of progressive distillation (Salimans and Ho 2022, algorithm 2, there with DDIM): Z_s = ratio Z_t + gain N twice
    over, solved for the one N.
    """
    t, mid, s = (expand(l, z).to(z) for l in (t, mid, s))
    Z, N = to_flow(z, denoise(z, t.flatten()), t, modes)
    (ratio, gain), (ratio_mid, gain_mid) = flow(t, mid, modes[1]), flow(mid, s.clamp(max=80), modes[1])
    z_mid = from_flow(ratio * Z + gain * N, mid, modes)
    x_mid = denoise(z_mid, mid.flatten())
    (mean, w, axes), (alpha, sigma), (_, N_mid) = modes, alpha_sigma(t), to_flow(z_mid, x_mid, mid, modes)
    both = (ratio_mid * gain * N + gain_mid * N_mid) / (ratio_mid * gain + gain_mid)
    x_hat = mean + to_modes(wiener(alpha, sigma, w)[0] * Z + both, axes, inverse=True)
    return torch.where(s.isinf(), x_mid, x_hat)  # the last step denoises


def prior_kl(x, logsnr_min, mask=None):
    """KL(q(z_1 | x) || N(0, 1)) = 1/2 sum(alpha^2 (x^2 - 1) - log sigma^2), L_T of DDPM eq. 5. (B,) float64"""
    l = torch.as_tensor(logsnr_min, dtype=torch.float64)
    kl = 0.5 * (torch.sigmoid(l) * (x.double() ** 2 - 1) + softplus(l))
    return (kl if mask is None else kl * mask).flatten(1).sum(1)


def reconstruction_nll(dim, logsnr_max):
    """E[-log N(x; z_0 / alpha, e^-logsnr_max)] of `dim` real-valued entries: L_0, negative once the noise is small.

    dim: a number or a tensor of the entries in each sample.
    """
    return dim / 2 * (1 + math.log(2 * math.pi) - logsnr_max)


def eps_error(denoise, x, logsnr, eps, mask=None):
    """|eps - eps_hat|^2 summed over the entries where mask is 1. (B,)"""
    z = diffuse(x, logsnr, eps)
    error = (eps - to_eps(denoise(z, logsnr), z, logsnr)) ** 2
    return (error if mask is None else error * mask).flatten(1).sum(1)


def diffusion_nll(denoise, x, t, eps, logsnr_min, logsnr_max, mask=None):
    """One-sample estimate of the continuous-time diffusion loss, t (B,) uniform in [0, 1]. VDM eq. 17. (B,)"""
    width = logsnr_max - logsnr_min
    return 0.5 * width * eps_error(denoise, x, logsnr_max - width * t, eps, mask)


def discrete_nll(denoise, x, t, eps, logsnrs, mask=None):
    """One-sample estimate of sum_t L_{t-1} of the T-step chain on finite logsnrs (T + 1,), noise first. (B,)

    t (B,) uniform in [0, 1] picks one step; KL = 1/2 expm1(l_s - l_t) |eps - eps_hat|^2 (VDM eq. 13). Add prior_kl at
    logsnrs[0] and reconstruction_nll at logsnrs[-1] for the bound.
    """
    T = len(logsnrs) - 1
    i = (t * T).long().clamp(max=T - 1)  # (B,)
    l, s = logsnrs[i], logsnrs[i + 1]
    return (0.5 * T * torch.expm1(s - l)).to(x) * eps_error(denoise, x, l, eps, mask)


def ode_velocity(denoise, z, logsnr):
    """dz/dlogsnr of the probability-flow ODE = -1/2 alpha sigma v_hat = (alpha x_hat - alpha^2 z) / 2. SDE eq. 13."""
    alpha = alpha_sigma(logsnr)[0]
    return 0.5 * alpha * (denoise(z, logsnr) - alpha * z)


def rk4(f, y, logsnrs):
    """Classical Runge-Kutta for dy/dlogsnr = f(y, logsnr) through the grid, either direction; yields y at each point."""
    for t, s in zip(logsnrs[:-1], logsnrs[1:]):
        h, mid = s - t, (t + s) / 2
        k1 = f(y, t)
        k2 = f(y + h / 2 * k1, mid)
        k3 = f(y + h / 2 * k2, mid)
        k4 = f(y + h * k3, s)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield y


def ode_log_likelihood(denoise, x, logsnrs, probes=None):
    """log p(x) by the instantaneous change of variables along the probability-flow ODE. SDE eq. 39. (B,) float64

    logsnrs: finite grid, data first (decreasing). probes: (K, B, ...) of +-1 for Hutchinson's estimator of the
    divergence, averaged over K; None is the exact trace, one backward pass per entry (small x only).
    The field starts as z = alpha x, so log p(x) = log p(z) + dim log alpha.
    """
    dim, shape = x[0].numel(), x.shape
    at = lambda z, logsnr: denoise(z, logsnr.expand(len(z)).to(z.device))

    def augmented(state, logsnr):  # state (B, dim + 1): z and the accumulated divergence
        with torch.enable_grad():
            z = state[:, :-1].reshape(shape).detach().requires_grad_()
            dz = ode_velocity(at, z, logsnr)
            if probes is None:
                rows = [torch.autograd.grad(dz.flatten(1)[:, i].sum(), z, retain_graph=True)[0].flatten(1)[:, i] for i in range(dim)]
                div = torch.stack(rows).sum(0)
            else:
                div = sum((torch.autograd.grad((dz * p).sum(), z, retain_graph=True)[0] * p).flatten(1).sum(1) for p in probes) / len(probes)
        return torch.cat([dz.detach().flatten(1), div[:, None]], 1)

    log_alpha = 0.5 * logsigmoid(logsnrs[0])
    state = torch.cat([log_alpha.exp() * x.flatten(1), x.new_zeros(len(x), 1)], 1)
    for state in rk4(augmented, state, logsnrs):
        pass
    z, div = state[:, :-1].double(), state[:, -1].double()
    log_prior = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum(1)
    return log_prior + div + dim * log_alpha.to(div)


# ----------------------------------------------------------------------------------------------------------------------
# samplers: one loop, one update.  z_s = c z_t + (alpha_s - alpha_t c) D + noise, where
#
#   ancestral   c = r alpha_s / alpha_t      D = x_hat                  r = SNR_t / SNR_s
#   DDIM        c = sigma_s / sigma_t        D = x_hat                  (eta between the two)
#   DPM++(2M)   c of either (ODE or SDE)     D = x_hat extrapolated from the last two
#   modes       c and the factor of D for every mode of the data by itself
#   Heun        c = sigma_s / sigma_t        D = x_hat corrected with a second evaluation at s
#   Langevin    c = alpha_s / alpha_t        (z / alpha stays) followed by Langevin steps at s


def update(z, x_hat, t, s, eta=1.0, variance=0.0, noise=torch.randn_like):
    """One step from log-SNR t to a larger s (0-dim float64 tensors). DDPM eq. 7 at eta 1, DDIM eq. 12 in general.

    variance: 0 is the lower bound (1-r) sigma_s^2 (the true posterior for data of zero variance), 1 the upper
    (1-r) sigma_t^2 (for unit-variance data), between them the interpolation in logs (Nichol and Dhariwal 2021, eq. 15).
    At eta 0 the step is DDIM, z_s = cos(d) z + sin(d) v_hat in the angle atan(sigma / alpha).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    one_minus_r = -torch.expm1(t - s)
    c = sigma_s / sigma_t * (1 - eta**2 * one_minus_r).sqrt()
    z_s = c * z + (alpha_s - alpha_t * c) * x_hat
    if eta == 0 or math.isinf(s):
        return z_s
    return z_s + eta * one_minus_r.sqrt() * sigma_s ** (1 - variance) * sigma_t**variance * noise(z)


def single_step(denoise, z, t, s, noise, memory, eta=1.0, variance=0.0):
    """Ancestral sampling (eta 1) and DDIM (eta 0 deterministic): first order, one evaluation."""
    x_hat = denoise(z, t)
    return update(z, x_hat, t, s, eta, variance, noise), x_hat, None


def extrapolate(now, t, s, memory):
    """What is at log-SNR t, taken on to the middle of the step to s along the line from (before, t_before) = memory, if there is one."""
    if memory is None or math.isinf(s):
        return now
    before, t_before = memory
    return now + 0.5 * (s - t) / (t - t_before) * (now - before)


def multistep(denoise, z, t, s, noise, memory, eta=0.0, until=math.inf):
    """DPM-Solver++(2M) (eta 0) and its SDE form (eta 1): second order, one evaluation; D from the last two x_hat.

    Steps from log-SNR `until` on are those of eta 0. Either form is right with the best denoiser; a network's errors make
    the first lose variance of weather as a whole and the second light rain about its edges.
    """
    x_hat = denoise(z, t)
    D = extrapolate(x_hat, t, s, memory)
    return update(z, D, t, s, eta if t < until else 0.0, 0.0, noise), x_hat, (x_hat, t)


def flow(t, s, w):
    """(ratio, gain) of the probability-flow ODE in a mode of variance w, Z_s = ratio Z_t + gain N, from log-SNR t to s, finite.

    N is what an x_hat adds to Wiener's, alpha w Z / S with S = alpha^2 w + sigma^2, taken to be constant. With q = e^(logsnr / 2),
    dZ/dlogsnr = (alpha x_hat - alpha^2 Z) / 2 gives ratio^2 = S_s / S_t and gain = (S_s / w)^1/2 [asinh(w^1/2 q)] from t to s.
    As w goes to 0 it is DDIM: sigma_s / sigma_t and alpha_s - alpha_t sigma_s / sigma_t.
    """
    S = lambda logsnr: torch.sigmoid(logsnr) * w + torch.sigmoid(-logsnr)
    angle = lambda logsnr: torch.asinh(w.sqrt() * (logsnr / 2).exp())
    return (S(s) / S(t)).sqrt(), (S(s) / w).sqrt() * (angle(s) - angle(t))


def to_flow(z, x_hat, logsnr, modes):
    """Z and N of `flow` from z and x_hat, modes = (mean, w, axes) as in linear_part."""
    (mean, w, axes), (alpha, sigma) = modes, alpha_sigma(logsnr)
    Z = to_modes(z - alpha * mean, axes)
    return Z, to_modes(x_hat - mean, axes) - wiener(alpha, sigma, w)[0] * Z


def from_flow(Z, logsnr, modes):
    """z of Z."""
    mean, _, axes = modes
    return alpha_sigma(logsnr)[0] * mean + to_modes(Z, axes, inverse=True)


def modes_step(denoise, z, t, s, noise, memory, modes, order=2):
    """An exponential integrator in the modes: of second order as `multistep`, exact where the data are Gaussian with these modes.

    DDIM and DPM-Solver++ are exact where x_hat is constant, for data of zero variance.
    """
    x_hat = denoise(z, t)
    if math.isinf(s):
        return x_hat, x_hat, None
    Z, N = to_flow(z, x_hat, t, modes)
    D = extrapolate(N, t, s, memory) if order == 2 else N
    ratio, gain = flow(t, s, modes[1])
    return from_flow(ratio * Z + gain * D, s, modes), x_hat, (N, t)


def heun(denoise, z, t, s, noise, memory, churn=0.0):
    """EDM algorithm 2: Heun's method on dy/d(sigma/alpha), y = z / alpha; churn > 0 first adds noise to sigma (1 + churn)."""
    if churn > 0:
        t, t_data = t - 2 * math.log1p(churn), t
        z = renoise(z, t_data, t, noise(z))
    x_hat = denoise(z, t)
    z_s = update(z, x_hat, t, s, eta=0.0)
    if not math.isinf(s):  # averaging d = eps_hat at both ends is D = x_hat + e^h / 2 (x_hat_s - x_hat)
        x_hat_s = denoise(z_s, s)
        z_s = update(z, x_hat + 0.5 * ((s - t) / 2).exp() * (x_hat_s - x_hat), t, s, eta=0.0)
    return z_s, x_hat, None


def euler_maruyama(denoise, z, t, s, noise, memory):
    """The reverse SDE dz = [f - g^2 score] dt + g dB (SDE eq. 6) in log-SNR, where g^2 dt = sigma^2 dlogsnr. Steps below 2."""
    x_hat = denoise(z, t)
    if math.isinf(s):
        return x_hat, x_hat, None
    alpha, sigma = alpha_sigma(t)
    d = s - t
    return z + d * (alpha * x_hat + (0.5 * sigma**2 - 1) * z) + sigma * d.sqrt() * noise(z), x_hat, None


def ode(denoise, z, t, s, noise, memory):
    """The probability-flow ODE by Runge-Kutta 4: four evaluations a step; small enough steps encode and decode exactly."""
    x_hat = denoise(z, t)
    if math.isinf(s):
        return x_hat, x_hat, None
    return next(rk4(partial(ode_velocity, denoise), z, torch.stack([t, s]))), x_hat, None


def langevin(denoise, z, t, s, noise, memory, num_corrections=1, snr=0.16, predictor=None):
    """Predictor-corrector (SDE algorithm 3): a predictor step to s, then Langevin steps on the score there.

    predictor None keeps z / alpha: annealed Langevin dynamics (NCSN algorithm 1), all the work done by corrections.
    z + d score + sqrt(2 d) n with d = 2 (snr sigma)^2, NCSN's step. The SDE paper's 2 (snr |n| / |score|)^2 is the same
    on average, but a step that depends on the state shifts the law it samples: badly so in few dimensions.
    """
    if predictor is not None:
        z, x_hat, memory = predictor(denoise, z, t, s, noise, memory)
    elif math.isinf(s):
        z = x_hat = denoise(z, t)
    else:
        z = alpha_sigma(s)[0] / alpha_sigma(t)[0] * z
    if math.isinf(s):
        return z, x_hat, memory
    sigma = alpha_sigma(s)[1]
    for _ in range(num_corrections):  # d score = -2 snr^2 sigma eps_hat
        x_hat = denoise(z, s)
        z = z + 2 * snr * sigma * (noise(z) - snr * to_eps(x_hat, z, s))
    return z, x_hat, memory


SAMPLERS = {
    "ancestral": single_step,
    "ddim": single_step,
    "dpmpp": multistep,
    "dpmpp_sde": partial(multistep, eta=1.0),
    "modes": modes_step,
    "heun": heun,
    "sde": euler_maruyama,
    "ode": ode,
    "pc": partial(langevin, predictor=single_step),
    "langevin": partial(langevin, num_corrections=10),
}


def sample(denoise, z, logsnrs, step=single_step, noise=torch.randn_like):
    """Run a sampler over the grid from z (B, ...) at logsnrs[0]; yields (z, x_hat) after every step.

    noise(z) draws standard normals shaped like z. A grid ending in +inf ends in a denoised field; a finite grid that
    runs towards noise with a deterministic step encodes; one that starts inside the range edits (SDEdit).
    """
    at = lambda z, logsnr: denoise(z, logsnr.expand(len(z)).to(z.device))  # steps name one log-SNR for the batch
    memory = None
    for t, s in zip(logsnrs[:-1], logsnrs[1:]):
        z, x_hat, memory = step(at, z, t, s, noise, memory)
        yield z, x_hat


def interpolate(a, b, weight):
    """Between two noises or encodings: cos(w pi/2) a + sin(w pi/2) b, which keeps the variance of independent a and b."""
    return math.cos(weight * math.pi / 2) * a + math.sin(weight * math.pi / 2) * b


# ----------------------------------------------------------------------------------------------------------------------
# guidance: wraps a denoiser, returns a denoiser


def clip(denoise, low, high):
    """Clamp x_hat to a range. Samplers recompute eps_hat from x_hat, so the two stay consistent."""
    return lambda z, logsnr: denoise(z, logsnr).clamp(low, high)


def classifier_free(denoise, unconditional, scale):
    """u + scale (c - u): 0 ignores the condition, 1 samples given it, above 1 exaggerates it (Ho and Salimans 2022, eq. 6)."""
    return lambda z, logsnr: torch.lerp(unconditional(z, logsnr), denoise(z, logsnr), scale)


def classifier_guidance(denoise, log_prob, scale=1.0):
    """x_hat + (sigma^2 / alpha) scale grad_z log p(c | z), log_prob(z, logsnr) -> (B,): Bayes' rule for the score (SDE eq. 14)."""

    def guided(z, logsnr):
        alpha, sigma, _, _ = scales(logsnr, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            gradient = torch.autograd.grad(log_prob(z, logsnr).sum(), z)[0]
        return denoise(z.detach(), logsnr) + sigma**2 / alpha * scale * gradient

    return guided


@dataclass
class Observation:
    """What is known of a field: y = A x, where A takes means over factor x factor cells and keeps them where mask is 1.

    y, mask: (B, C, T, H / factor, W / factor), y 0 where mask is 0. Known frames, known cells and every n-th frame have
    factor 1, a coarse field has mask 1. lift is a right inverse, A(lift(u)) = u.
    """

    y: torch.Tensor
    mask: torch.Tensor
    factor: int = 1

    def A(self, x):
        return self.mask * (x if self.factor == 1 else avg_pool3d(x, (1, self.factor, self.factor)))

    def lift(self, u):
        u = self.mask * u
        return u if self.factor == 1 else interpolate_nearest(u, scale_factor=(1.0, self.factor, self.factor))

    def project(self, x):
        """The field nearest to x that agrees with y."""
        return x + self.lift(self.y - self.A(x))

    def channels(self):
        """As input of a network trained with conditions: what is known, and how well (1, or 1 / factor^2 for a mean)."""
        return torch.cat([self.lift(self.y), self.lift(self.mask) / self.factor**2], 1)  # (B, 2C, T, H, W)


def imputation(denoise, known):
    """x_hat with its known part put right (Lugmayr et al. 2022, Song et al. 2021 app. I.2).

    Every sampler's update then takes the known part of z from t to s given y and the z_t of its own chain: at each level
    a draw of the forward process given y. The unknown part hears of y only through z, too late: seams and lost spread.
    """
    return lambda z, logsnr: known.project(denoise(z, logsnr))


def reconstruction_guidance(denoise, known, weight):
    """Imputation of x_hat - (weight alpha / 2) grad_z |y - A x_hat|^2 (Ho et al. 2022, eq. 6).

    The square is a sum over the entries of each sample, so that weight means the same for any batch and shape.
    """

    def guided(z, logsnr):
        alpha = scales(logsnr, z)[0]
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x_hat = denoise(z, logsnr)
            gradient = torch.autograd.grad(((known.y - known.A(x_hat)) ** 2).sum(), z)[0]
        return known.project(x_hat.detach() - weight / 2 * alpha * gradient)

    return guided


def moment_matching(denoise, known, steps=8, std=0.0):
    """x_hat + V A' (std^2 + A V A')^-1 (y - A x_hat): E[x | z, y] were q(x | z) normal (Rozet et al. 2024).

    V = Cov[x | z] = (sigma^2 / alpha) d x_hat / d z (Tweedie), which is symmetric, so that V A' u is one vector-Jacobian
    product of A x_hat. `steps` of conjugate gradients, one product each; exact for Gaussian data. std: that of the
    observations' error; 0 meets y exactly.
    """

    def guided(z, logsnr):
        alpha, sigma, _, _ = scales(logsnr, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x_hat = denoise(z, logsnr)
            seen = known.A(x_hat)
        V_At = lambda u: sigma**2 / alpha * torch.autograd.grad(seen, z, u, retain_graph=True)[0]
        u = conjugate_gradients(lambda u: std**2 * u + known.A(V_At(u)), known.y - seen.detach(), steps)
        x_hat = x_hat.detach() + V_At(u)
        return x_hat if std else known.project(x_hat)

    return guided


def linear_matching(denoise, known, w, axes, std=0.0):
    """moment_matching with V = Cov[x | z] of the linear part, variance sigma^2 w / (alpha^2 w + sigma^2) of every mode.

    No derivative of the network is needed, and as exact for Gaussian data. w (C, T, H, W), axes: as in linear_part. Where
    std, of the error of y, is 0 that is met exactly, and taken to be within NEARLY where what is unknown follows it.
    """

    def guided(z, logsnr):
        x_hat, (alpha, sigma, _, _) = denoise(z, logsnr), scales(logsnr, z)
        P = lambda x: known.lift(known.A(x))
        error = std * known.factor or NEARLY  # spread over its cells a mean of n is n^1/2 times as long
        x_hat = x_hat + shift_to_known(P, known.lift(known.y) - P(x_hat), wiener(alpha, sigma, w)[1], axes, error)
        return x_hat if std else known.project(x_hat)

    return guided


def conjugate_gradients(S, b, steps, precondition=lambda r: r, tolerance=1e-12):
    """u of S u = b for every sample of b (B, ...) by itself, S and precondition (about its inverse) symmetric and positive.

    A sample is left alone once the square of what is missing, r' precondition(r), is below tolerance times that at the start,
    or where S is not positive.
    """
    dot = lambda a, b: expand((a * b).flatten(1).sum(1), a)
    u, r, p = torch.zeros_like(b), b, precondition(b)
    rr = dot(r, p)
    enough = tolerance * rr
    for _ in range(steps):
        going = rr > enough
        if b.device.type == "cpu" and not going.any():  # a GPU would have to be waited for
            break
        Sp = S(p)
        curvature = dot(p, Sp)
        going = going & (curvature > 0)
        over = lambda a, b: going * a / torch.where(going, b, 1)  # nothing divided by 0, nor in the gradient
        length = over(rr, curvature)
        u, r = u + length * p, r - length * Sp
        q = precondition(r)
        before, rr = rr, dot(r, q)
        p = going * q + over(rr, before) * p
    return u
