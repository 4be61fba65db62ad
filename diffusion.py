"""Diffusion models in one notation: every process, loss, likelihood and sampler through the log-SNR.

    z = alpha x + sigma eps,   alpha^2 = sigmoid(logsnr),   sigma^2 = sigmoid(-logsnr),   eps ~ N(0, 1)

A climate field is first of all a Gaussian process, and everything about a Gaussian is known exactly. So the
first object here after the log-SNRs is `Gaussian`, the normal law with the mean and the covariance of the
data. It gives the best linear denoiser in closed form, and a network adds what is not Gaussian; it says at
which log-SNRs there is something to learn, how a draw moves when a part of it is known, how a long sequence
goes on, and which sampling steps are exact. All else meets at one contract:

    denoise(z, logsnr) -> x_hat      z (B, C, T, H, W), logsnr (B,), x_hat like z, an estimate of E[x | z]

Pure functions of tensors: no modules, no files, no progress bars. Grids and coefficients are float64 on the
CPU (a 0-dim CPU tensor multiplies a tensor on any device, in that tensor's dtype, without a synchronisation).
Nothing here computes 1 - alpha^2: at |logsnr| = 30 that is lost to rounding.

Papers by their short names: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), SDE (Song et al. 2021,
score-based SDEs), NCSN (Song and Ermon 2019), VDM (Kingma et al. 2021), EDM (Karras et al. 2022), DPM++ (Lu
et al. 2022), distillation (Salimans and Ho 2022), min-SNR (Hang et al. 2023), K&G (Kingma and Gao 2023).
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import avg_pool3d, logsigmoid, softplus
from torch.nn.functional import interpolate as interpolate_nearest

# ------------------------------------------------------------------------------------------------------------
# the forward process


def expand(a, x):
    """Append dimensions to a (B,) until it broadcasts against x (B, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def alpha_sigma(logsnr):
    """alpha and sigma of the variance-preserving process, any shape, accurate for |logsnr| up to 80."""
    return (0.5 * logsigmoid(logsnr)).exp(), (0.5 * logsigmoid(-logsnr)).exp()


def scales(logsnr, z):
    """alpha and sigma of each sample, shaped, placed and typed to multiply z."""
    return tuple(expand(a, z).to(z) for a in alpha_sigma(logsnr))


def diffuse(x, logsnr, eps):
    """Draw z ~ q(z | x) = N(alpha x, sigma^2): x, eps (B, ...), logsnr (B,) -> z (B, ...). DDPM eq. 4."""
    alpha, sigma = scales(logsnr, x)
    return alpha * x + sigma * eps


def renoise(z, logsnr_s, logsnr_t, eps):
    """Draw z_t ~ q(z_t | z_s) for a noisier t: alpha_{t|s} z_s + sigma_{t|s} eps. VDM eq. 21."""
    ratio = (0.5 * (logsigmoid(logsnr_t) - logsigmoid(logsnr_s))).exp()  # alpha_{t|s}
    variance = torch.sigmoid(-logsnr_t) * -torch.expm1(logsnr_t - logsnr_s)  # sigma_{t|s}^2
    return expand(ratio, z).to(z) * z + expand(variance.sqrt(), z).to(z) * eps


# ------------------------------------------------------------------------------------------------------------
# levels: which log-SNRs are visited

BETA_MIN, BETA_MAX = 0.1, 20.0  # the VP-SDE's linear beta; DDPM's 1e-4 .. 0.02 times 1000 steps
EDM_MEAN, EDM_STD = 1.0, 2.4  # EDM's training density of log-SNRs, for data of unit variance
RHO = 7.0  # exponent of EDM's sampling grid


def linear_time(logsnr):
    """The VP-SDE's time u, from -log alpha^2 = bmin u + (bmax - bmin) u^2 / 2 without cancellation."""
    G = softplus(-logsnr)
    return (2 * G / (BETA_MIN + (BETA_MIN**2 + 2 * (BETA_MAX - BETA_MIN) * G).sqrt())).clamp(max=1)


SCHEDULES = {  # a clock g(logsnr), decreasing, and its inverse
    "cosine": (lambda l: torch.atan((-l / 2).exp()), lambda g: -2 * torch.log(torch.tan(g))),
    "linear": (
        linear_time,
        lambda g: -torch.log(torch.expm1(BETA_MIN * g + (BETA_MAX - BETA_MIN) / 2 * g**2)),
    ),
    "logsnr": (lambda l: -l, lambda g: -g),
    "flow": (lambda l: torch.sigmoid(-l / 2), lambda g: 2 * (torch.log1p(-g) - torch.log(g))),
    "normal": (
        lambda l: torch.special.ndtr((EDM_MEAN - l) / EDM_STD),
        lambda g: EDM_MEAN - EDM_STD * torch.special.ndtri(g),
    ),
    "rho": (lambda l: (-l / (2 * RHO)).exp(), lambda g: -2 * RHO * torch.log(g)),
}


@dataclass(frozen=True)
class Levels:
    """The log-SNRs of a run: a clock of SCHEDULES, cut to [lo, hi]. Time t runs from 0 (data) to 1 (noise).

    cosine   -2 log tan(pi t / 2)                (distillation; Foster's is lo -7.824, hi 2.2255)
    linear   -log expm1(0.1 t + 19.9 t^2 / 2)    (DDPM and the VP-SDE in continuous time; ends at -10.05)
    logsnr   linear in t                         (VDM; NCSN's geometric noise levels; EDM's log-uniform sigma)
    flow     2 log((1 - t) / t)                  (rectified flow; rescaling z makes it the same process)
    normal   quantiles of N(1, 2.4^2)            (EDM's training density)
    rho      (sigma / alpha)^(1/7) linear in t   (EDM's sampling grid, with lo -8.76, hi 12.43)

    shift adds 2 log(shift): below 1 it moves the density towards noise (simple diffusion, Hoogeboom et al.
    2023). It means nothing for logsnr and rho, whose levels lo and hi fix.
    """

    schedule: str = "cosine"
    lo: float = -30.0
    hi: float = 30.0
    shift: float = 1.0

    def ends(self):
        """The clock at hi and at lo, float64, and what the shift adds."""
        offset = 2 * math.log(self.shift)
        ends = torch.tensor([self.hi - offset, self.lo - offset], dtype=torch.float64)
        return *SCHEDULES[self.schedule][0](ends), offset

    def logsnr(self, t):
        """Log-SNR at time t, float64, same shape as t; strictly decreasing."""
        start, end, offset = self.ends()
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        return (SCHEDULES[self.schedule][1](start + (end - start) * t) + offset).clamp(self.lo, self.hi)

    def log_density(self, logsnr):
        """log p(logsnr) of the log-SNRs that uniform t gives, = -log |dlogsnr / dt|, float64, any shape."""
        start, end, offset = self.ends()
        with torch.enable_grad():
            l = torch.as_tensor(logsnr, dtype=torch.float64, device="cpu").detach() - offset
            l.requires_grad_()
            slope = torch.autograd.grad(SCHEDULES[self.schedule][0](l).sum(), l)[0]
        return torch.log(-slope / (end - start))

    def grid(self, num_steps):
        """The log-SNRs a sampler visits, noise first: (num_steps + 1,) float64, the last +inf (no noise: z =
        x_hat).

        Even in t without t = 0: so `rho` with n steps is EDM's grid of n + 1 without its last level.
        """
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
        return torch.cat([self.logsnr(t), t.new_tensor([math.inf])])


def stratified_times(batch_size, generator=None):
    """t_i = (u + i / B) mod 1: one uniform draw spread evenly over the batch (VDM app. I.1). (B,) float64."""
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return (u + torch.arange(batch_size, dtype=torch.float64) / batch_size) % 1


# ------------------------------------------------------------------------------------------------------------
# parameterisations: the network's output F estimates a x + b eps

PARAMS = {  # (a, b) from (alpha, sigma)
    "v": lambda alpha, sigma: (
        -sigma,
        alpha,
    ),  # dz / d angle (distillation eq. 9): the only one fit for both ends
    "eps": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),  # DDPM
    "x": lambda alpha, sigma: (1 + 0 * alpha, 0 * alpha),
    "score": lambda alpha, sigma: (0 * alpha, -1 / sigma),  # grad log q(z | x), denoising score matching
}


def target(x, eps, logsnr, param):
    """What F should be, a x + b eps: alpha eps - sigma x for v."""
    a, b = PARAMS[param](*scales(logsnr, x))
    return a * x + b * eps


def to_x(F, z, logsnr, param):
    """x_hat from F and z = alpha x + sigma eps. 'eps' and 'score' divide by alpha."""
    alpha, sigma = scales(logsnr, z)
    a, b = PARAMS[param](alpha, sigma)
    return (b * z - sigma * F) / (alpha * b - sigma * a)


def to_eps(x_hat, z, logsnr):
    """(z - alpha x_hat) / sigma. The score is -eps_hat / sigma, v_hat is alpha eps_hat - sigma x_hat."""
    alpha, sigma = scales(logsnr, z)
    return (z - alpha * x_hat) / sigma


# ------------------------------------------------------------------------------------------------------------
# what is observed


@dataclass
class Observation:
    """What is known of a field: y = A x, where A takes means over factor x factor cells and keeps them where
    mask is 1.

    y, mask: (B, C, T, H / factor, W / factor), y 0 where mask is 0. Known frames, known cells and every n-th
    frame have factor 1, a coarse field has mask 1. lift is a right inverse, A(lift(u)) = u.
    """

    y: torch.Tensor
    mask: torch.Tensor
    factor: int = 1

    def A(self, x):
        pooled = x if self.factor == 1 else avg_pool3d(x, (1, self.factor, self.factor))
        return self.mask * pooled

    def lift(self, u):
        u = self.mask * u
        if self.factor == 1:
            return u
        return interpolate_nearest(u, scale_factor=(1.0, self.factor, self.factor))

    def known_part(self, x):
        """The orthogonal projection of x onto what is observed, lift(A x)."""
        return self.lift(self.A(x))

    def project(self, x):
        """The field nearest to x that agrees with y."""
        return x + self.lift(self.y - self.A(x))


def conjugate_gradients(S, b, steps, precondition=None, tolerance=1e-12):
    """u with S u = b for every sample of b (B, ...) by itself; S and precondition symmetric and positive.

    precondition: about the inverse of S. A sample is left alone once the square of its residual, r'
    precondition(r), is below tolerance times that at the start, or where S is not positive; so it does not
    depend on its neighbours. All stop when every sample has: asked every eighth step, since a GPU has to be
    waited for.
    """

    def dot(a, b):
        return expand((a * b).flatten(1).sum(1), a)

    def ratio(a, b):
        return going * a / torch.where(going, b, 1)  # nothing divided by 0, nor in the gradient

    u, r = torch.zeros_like(b), b
    p = r if precondition is None else precondition(r)
    rr = dot(r, p)
    enough = tolerance * rr
    for step in range(steps):
        going = rr > enough
        if step % 8 == 0 and not going.any():
            break
        Sp = S(p)
        curvature = dot(p, Sp)
        going = going & (curvature > 0)
        length = ratio(rr, curvature)
        u, r = u + length * p, r - length * Sp
        q = r if precondition is None else precondition(r)
        before, rr = rr, dot(r, q)
        p = going * q + ratio(rr, before) * p
    return u


# ------------------------------------------------------------------------------------------------------------
# the Gaussian law of the data

TOGETHER = 2048  # cells of time and x whose covariance is taken together; beyond, time and x are taken apart
LEAST = 1e-6  # variance of a mode, at least
NEARLY = 0.02  # standard deviations within which what is observed exactly is met, before it is put right
ROUNDS = 4  # of fitting and filling where data are missing


def rotate(x, dims, M, inverse=False):
    """Coefficients of x (..., T, H, W) in the patterns along dims that are the rows of the orthonormal M; and
    back.
    """
    end = tuple(range(-len(dims), 0))
    x = x.movedim(dims, end)
    return (x.flatten(-len(dims)) @ (M if inverse else M.mT)).view(x.shape).movedim(end, dims)


def principal_axes(covariance):
    """Eigenvectors of covariances (..., n, n) as rows of orthonormal matrices, the largest variance first."""
    return torch.linalg.eigh(covariance.double())[1].flip(-1).mT.to(covariance).contiguous()


@dataclass(frozen=True)
class Gaussian:
    """A normal law of clips: a mean, and independent modes in an orthonormal basis.

    mean (C, 1, H, W); variances (C, T, H, W) of the modes, which lie where clips have their cells; axes
    ((dims, M), ...): patterns along dimensions of a clip, the rows of M, those of time first. Everything a
    diffusion model asks of a law is closed form for this one: with an exact basis it is the ruler for
    networks, fitted to data it is what a network starts from.
    """

    mean: torch.Tensor
    variances: torch.Tensor
    axes: tuple
    lengths: dict = field(default_factory=dict, repr=False, compare=False)  # laws of other lengths, once made

    @classmethod
    def fit(cls, batches):
        """The law of clips: their mean in every cell, principal axes, and the variance of every mode about
        the mean.

        batches: standardised clips (B, C, T, H, W), NaN where there are no data; iterated over several times.
        Weather travels, so time and x share their axes where these are at most TOGETHER; else they have their
        own. What is missing is filled with draws of the law given what is there, the law is fitted to filled
        clips, and so on (expectation-maximisation by draws): filled with the mean, variances and correlations
        would be too low.
        """
        law, missing = None, any(x.isnan().any() for x in batches)
        for _ in range(ROUNDS if missing else 1):
            law = cls.fit_complete(lambda law=law: filled(batches, law))
        return law

    @classmethod
    def fit_complete(cls, clips):
        """The law of complete clips; clips() iterates over batches of them."""

        def average(f):
            total, count = 0, 0
            for x in clips():
                total, count = total + f(x), count + len(x)
            return total / count

        mean = average(lambda x: x.sum(0)).mean(1, keepdim=True)  # (C, 1, H, W)
        T, _, W = next(iter(clips())).shape[-3:]
        groups = ((-3, -1), (-2,)) if T * W <= TOGETHER else ((-3,), (-2,), (-1,))

        def covariance(x, dims):
            series = (x - mean).movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)).flatten(0, -2)
            return series.mT @ series

        axes = tuple((dims, principal_axes(average(partial(covariance, dims=dims)))) for dims in groups)
        basis = cls(mean, torch.empty(0), axes)
        variances = average(lambda x: (basis.modes(x - mean) ** 2).sum(0))
        return cls(mean, variances.clamp(min=LEAST), axes)

    def state(self):
        """Tensors and plain values, as the arguments of Gaussian."""
        return {"mean": self.mean, "variances": self.variances, "axes": self.axes}

    def map(self, f):
        """The same law with f done to every tensor."""
        axes = tuple((dims, f(M)) for dims, M in self.axes)
        return type(self)(f(self.mean), f(self.variances), axes)

    def modes(self, x):
        """Coefficients of anomalies x (..., T, H, W), real or complex; keeps sums of squares."""
        for dims, M in self.axes:
            x = rotate(x, dims, M)
        return x

    def field(self, modes):
        """The inverse of modes."""
        for dims, M in self.axes:
            modes = rotate(modes, dims, M, inverse=True)
        return modes

    def wiener(self, alpha, sigma):
        """Per mode the gain of E[x | z] = gain z and the variance Var[x | z]."""
        total = alpha**2 * self.variances + sigma**2
        return alpha * self.variances / total, sigma**2 * self.variances / total

    def estimates(self, z, logsnr):
        """E[x | z] and E[eps | z] of z (B, C, T, H, W), logsnr (B,), by Wiener's filter; they add up to z."""
        alpha, sigma = scales(logsnr, z)
        total = alpha**2 * self.variances + sigma**2  # variance of the modes of z
        Z = self.modes(z - alpha * self.mean)
        x, eps = self.field(torch.stack([alpha * self.variances / total * Z, sigma / total * Z]))
        return self.mean + x, eps

    def denoise(self, z, logsnr):
        """E[x | z], the best denoiser of data with this law."""
        return self.estimates(z, logsnr)[0]

    def envelope(self, logsnr):
        """How much of v a network may add to the linear estimate in every mode at log-SNRs (B,): (B, C, T, H,
        W).

        The geometric mean of the gain, how much z tells of this mode, and its root mean square over all
        modes. It goes to 0 in pure noise, where x_hat is the mean whatever the law of the data, and to 1
        without noise; a mode that has not emerged yet is left alone, but for what the others tell of it.
        """
        gain, _ = self.wiener(*scales(logsnr.to(self.variances), self.variances[None]))
        return (gain * (gain**2).mean((1, 2, 3, 4), keepdim=True).sqrt()).sqrt()

    def spread(self, logsnr):
        """Root mean square over modes of the anomaly E[x | z] - mean, (B, 1, 1, 1, 1)."""
        alpha, sigma = scales(logsnr.to(self.variances), self.variances[None])
        total = alpha**2 * self.variances + sigma**2
        return (alpha**2 * self.variances**2 / total).mean((1, 2, 3, 4), keepdim=True).sqrt()

    def emergence(self, margin=0.0):
        """The log-SNRs between which the modes emerge from the noise, widened by margin: (noisiest, least
        noisy).

        A mode of variance w emerges where alpha^2 w = sigma^2, at -log w: the mean of the field first, small
        scales last.
        """
        w = self.variances
        return -math.log(float(w.max())) - margin, -math.log(float(w[w > 0].min())) + margin

    def shift(self, known, x_hat, variances, std):
        """V A' (A V A' + std^2)^-1 (y - A x_hat): how far E[x | z] moves when y = A x is known to within std.

        known: an Observation; V = Cov[x | z] has the variances (B or 1, C, T, H, W) in the modes. By
        conjugate gradients on what is observed, preconditioned by the inverse of V cut to it. std is that of
        a cell: a mean of n cells is n^1/2 times as long when it is spread over them.
        """

        def scaled(x, by):
            return self.field(by * self.modes(x))

        def S(u):
            return known.known_part(scaled(u, variances)) + std**2 * u

        def precondition(r):
            return known.known_part(scaled(r, 1 / (variances + std**2)))

        missing = known.lift(known.y) - known.known_part(x_hat)
        return scaled(conjugate_gradients(S, missing, 128, precondition, tolerance=1e-10), variances)

    def fill(self, x, generator=None):
        """Clips x (B, C, T, H, W) with a draw of this law given what is there in place of every NaN."""
        there = x.isfinite()
        known = Observation(x.nan_to_num(), there.to(x))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
        draw = self.mean + self.field(self.variances.sqrt() * noise)
        draw = draw + self.shift(known, draw, self.variances[None], NEARLY)
        return torch.where(there, x, draw)

    def flow(self, t, s):
        """(ratio, gain) of the probability-flow ODE in every mode: Z_s = ratio Z_t + gain N, log-SNR t to s,
        finite.

        N is what an x_hat adds to Wiener's, alpha w Z / S with S = alpha^2 w + sigma^2, taken to be constant.
        With q = e^(logsnr / 2), dZ/dlogsnr = (alpha x_hat - alpha^2 Z) / 2 gives ratio^2 = S_s / S_t and gain
        = (S_s / w)^1/2 [asinh(w^1/2 q)] from t to s. As w goes to 0 it is DDIM.
        """
        w = self.variances
        t, s = t.to(w), s.to(w)
        S_t, S_s = (torch.sigmoid(l) * w + torch.sigmoid(-l) for l in (t, s))
        angle_t, angle_s = (torch.asinh(w.sqrt() * (l / 2).exp()) for l in (t, s))
        return (S_s / S_t).sqrt(), (S_s / w).sqrt() * (angle_s - angle_t)

    def split(self, z, x_hat, logsnr):
        """Z and N of `flow` from z and x_hat at a log-SNR (0-dim or (B,))."""
        alpha, sigma = scales(logsnr, z)
        Z = self.modes(z - alpha * self.mean)
        return Z, self.modes(x_hat - self.mean) - self.wiener(alpha, sigma)[0] * Z

    def join(self, Z, logsnr):
        """z of Z."""
        return scales(logsnr, Z)[0] * self.mean + self.field(Z)

    def frames(self, T):
        """The law of clips of T frames: their mean, modes and axes; kept once it has been made.

        The autocovariance of every pattern in y (in y and x, where time has axes of its own), taken for
        stationary, is cut, or goes on as that of the autoregression of order T0 - 1 that has it: of all that
        agree with it the one of maximum entropy (Burg 1975), and always a covariance.
        """
        if T == self.variances.shape[1]:
            return self
        if T not in self.lengths:
            self.lengths[T] = self.of_length(T)
        return self.lengths[T]

    def of_length(self, T):
        """The law of T frames, made."""
        (dims, A), *others = self.axes
        T0 = self.variances.shape[1]
        n = len(A) // T0  # cells that share axes with time: W or 1
        V = self.variances.double().unflatten(-1, (-1, n)).movedim(1, -2).flatten(-2)  # (C, H, W / n, T0 n)
        r = [torch.einsum("chwm,mij->chwij", V, lagged(A, n, l)) / (T0 - l) for l in range(T0)]
        r = continue_covariances(positive(r, min(T, T0)), T)
        A = principal_axes(toeplitz([a.mean((0, 1, 2)) for a in r]))
        V = sum((1 + (l > 0)) * torch.einsum("chwij,mij->chwm", r[l], lagged(A, n, l)) for l in range(T))
        variances = V.unflatten(-1, (T, n)).movedim(-2, 1).flatten(-2)  # (C, T, H, W)
        A = A.to(self.variances)
        return Gaussian(self.mean, variances.clamp(min=LEAST).to(self.variances), ((dims, A), *others))


def filled(batches, law):
    """The batches with what is missing drawn from the law, the same draws every time; with 0, if there is no
    law yet.
    """
    for i, x in enumerate(batches):
        if not x.isnan().any():
            yield x
        else:
            yield x.nan_to_num() if law is None else law.fill(x, torch.Generator().manual_seed(i))


def lagged(A, n, lag):
    """Products of the frames of every pattern that are `lag` apart, summed: A (patterns, T n) -> (patterns,
    n, n).
    """
    A = A.double().unflatten(-1, (-1, n))
    return torch.einsum("mti,mtj->mij", A[:, : A.shape[1] - lag], A[:, lag:])


def toeplitz(r):
    """Autocovariances r[lag] (..., n, n) -> the covariance of len(r) frames (..., n len(r), n len(r))."""
    T = len(r)
    rows = [torch.cat([r[v - u] if v >= u else r[u - v].mT for v in range(T)], -1) for u in range(T)]
    return torch.cat(rows, -2)


def positive(r, T):
    """Autocovariances of T frames that are a covariance: white noise is added to averages that are not,
    variance kept.
    """
    lowest = torch.linalg.eigvalsh(toeplitz(r[:T]))[..., :1, None]
    white = (LEAST - lowest).clamp(min=0) * torch.eye(r[0].shape[-1]).to(lowest)
    before = r[0].diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    share = before / (before + white.sum((-2, -1), keepdim=True))
    return [(a + white * (lag == 0)) * share for lag, a in enumerate(r)]


def continue_covariances(r, T):
    """The first T autocovariances of the autoregression of order len(r) - 1 with autocovariances r[lag] (...,
    n, n).
    """
    T0, r = len(r), list(r)
    if T0 > 1 and T > T0:
        coefficients = torch.linalg.solve(toeplitz(r[:-1]), torch.cat(r[:0:-1], -2))
    for lag in range(T0, T):
        r.append(torch.cat(r[lag - T0 + 1 :], -1) @ coefficients if T0 > 1 else 0 * r[0])
    return r[:T]


# ------------------------------------------------------------------------------------------------------------
# losses

# log of the factor m on |error of v|^2. In K&G's form 1/2 E_p[w/p |error of eps|^2], w = 2 p m / alpha^2
WEIGHTINGS = {
    "v": lambda l, log_p: 0 * l,  # m = 1, SNR + 1 on x
    "eps": lambda l, log_p: logsigmoid(l),  # m = alpha^2 (DDPM's L_simple)
    "x": lambda l, log_p: logsigmoid(-l),  # m = sigma^2
    "truncated_snr": lambda l, log_p: (
        l.clamp(min=0) + logsigmoid(-l)
    ),  # m = max(SNR, 1) sigma^2 (distillation)
    "min_snr": lambda l, log_p: l.clamp(max=math.log(5)) - softplus(l),  # m = min(SNR, 5) / (SNR + 1)
    "elbo": lambda l, log_p: (
        logsigmoid(l) - log_p.to(l) - math.log(2)
    ),  # m = alpha^2 / 2 p, w = 1 (VDM eq. 14)
    "sigmoid": lambda l, log_p: WEIGHTINGS["elbo"](l, log_p) + logsigmoid(2 - l),  # w = sigmoid(2 - l) (K&G)
}


def log_v_factor(logsnr, param):
    """log of |error of v|^2 / |error of F|^2: 1, 1 / alpha^2, 1 / sigma^2, sigma^2 / alpha^2."""
    factors = {"v": 0 * logsnr, "eps": -logsigmoid(logsnr), "x": -logsigmoid(-logsnr), "score": -logsnr}
    return factors[param]


def masked_mean(a, mask=None):
    """Mean over all but the first dimension, over the entries where mask (0 or 1) is 1; 0 where there are
    none. (B,)
    """
    if mask is None:
        return a.flatten(1).mean(1)
    return (a * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def training_loss(F, x, eps, logsnr, param="v", weighting="v", log_p=None, mask=None):
    """The weighted loss of each sample (B,), and its plain squared v-error (B,), the same ruler for every
    setting.

    F the network's output, x, eps (B, ...), logsnr (B,) float64, log_p its log density (for elbo, sigmoid);
    mask: 1 where x is data. The weight and the conversion to v are joined in logs, so nothing overflows where
    they cancel.
    """
    error = masked_mean((F - target(x, eps, logsnr, param)) ** 2, mask)
    log_factor = log_v_factor(logsnr, param)
    weight = (WEIGHTINGS[weighting](logsnr, log_p) + log_factor).exp()
    return weight.to(error) * error, log_factor.exp().to(error) * error.detach()


def average_targets(x, eps, logsnr):
    """(x, eps) of less variance that make the same z: x the mean of the batch, each clip as likely as z makes
    it.

    Any clip may have become z_i. By the tower rule the mean of E[x_i | z_i, the clips] given z_i is E[x |
    z_i] still, so the best denoiser is the same and only the variance of the gradient falls (Rao-Blackwell;
    Xu et al. 2023). It matters in much noise: elsewhere the weights are 1 and 0. x, eps (B, ...), logsnr
    (B,).
    """
    alpha, sigma = scales(logsnr, x)
    a, b = alpha.flatten(1), sigma.flatten(1)
    z, clips = diffuse(x, logsnr, eps).flatten(1), x.flatten(1)
    # -|z_i - alpha_i x_j|^2 / 2 sigma_i^2 + c_i
    log_p = a / b**2 * (z @ clips.T - a / 2 * torch.linalg.vecdot(clips, clips))
    shift = (
        log_p.softmax(1) - torch.eye(len(x)).to(x)
    ) @ clips  # x_i itself is not multiplied: TF32 would round it
    shift = torch.where(logsnr.to(x)[:, None] > 6, 0, shift).view_as(
        x
    )  # alpha / sigma would magnify rounding errors
    return x + shift, eps - alpha / sigma * shift


# ------------------------------------------------------------------------------------------------------------
# likelihoods, in nats per sample: lower is better for bounds, log p is log p


def masked_sum(a, mask):
    return (a if mask is None else a * mask).flatten(1).sum(1)


def prior_kl(x, logsnr_min, mask=None):
    """KL(q(z_1 | x) || N(0, 1)) = 1/2 sum(alpha^2 (x^2 - 1) - log sigma^2), DDPM's L_T. (B,) float64"""
    l = torch.as_tensor(logsnr_min, dtype=torch.float64)
    return masked_sum(0.5 * (torch.sigmoid(l) * (x.double() ** 2 - 1) + softplus(l)), mask)


def reconstruction_nll(dim, logsnr_max):
    """E[-log N(x; z_0 / alpha, e^-logsnr_max)] of `dim` real entries (number or (B,)): L_0, negative in
    little noise.
    """
    return dim / 2 * (1 + math.log(2 * math.pi) - logsnr_max)


def eps_error(denoise, x, logsnr, eps, mask=None):
    """|eps - eps_hat|^2 summed over the entries where mask is 1. (B,)"""
    z = diffuse(x, logsnr, eps)
    return masked_sum((eps - to_eps(denoise(z, logsnr), z, logsnr)) ** 2, mask)


def diffusion_nll(denoise, x, t, eps, logsnr_min, logsnr_max, mask=None):
    """One-sample estimate of the continuous-time diffusion loss, t (B,) uniform. VDM eq. 17. (B,)"""
    width = logsnr_max - logsnr_min
    return 0.5 * width * eps_error(denoise, x, logsnr_max - width * t, eps, mask)


def discrete_nll(denoise, x, t, eps, logsnrs, mask=None):
    """One-sample estimate of sum_t L_{t-1} of the T-step chain on finite logsnrs (T + 1,), noise first. (B,)

    t (B,) uniform in [0, 1] picks one step; KL = 1/2 expm1(l_s - l_t) |eps - eps_hat|^2 (VDM eq. 13). Add
    prior_kl at logsnrs[0] and reconstruction_nll at logsnrs[-1] for the bound.
    """
    T = len(logsnrs) - 1
    i = (t * T).long().clamp(max=T - 1)  # (B,)
    l, s = logsnrs[i], logsnrs[i + 1]
    return (0.5 * T * torch.expm1(s - l)).to(x) * eps_error(denoise, x, l, eps, mask)


def ode_velocity(denoise, z, logsnr):
    """dz/dlogsnr of the probability-flow ODE = -1/2 alpha sigma v_hat = (alpha x_hat - alpha^2 z) / 2.

    SDE eq. 13.
    """
    alpha = alpha_sigma(logsnr)[0]
    return 0.5 * alpha * (denoise(z, logsnr) - alpha * z)


def rk4(f, y, t, s):
    """One step of Runge-Kutta 4 for dy/dlogsnr = f(y, logsnr), from t to s, either direction."""
    h, mid = s - t, (t + s) / 2
    k1 = f(y, t)
    k2 = f(y + h / 2 * k1, mid)
    k3 = f(y + h / 2 * k2, mid)
    k4 = f(y + h * k3, s)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def divergence(dz, z, probes=None):
    """div dz(z) of every sample (B,): Hutchinson's mean of p' J p over probes (K, B, ...) of +-1, or the
    exact trace.

    The exact trace takes one backward pass an entry: for small z only.
    """
    if probes is None:
        flat = dz.flatten(1)
        rows = [torch.autograd.grad(flat[:, i].sum(), z, retain_graph=True)[0] for i in range(flat.shape[1])]
        return torch.stack([row.flatten(1)[:, i] for i, row in enumerate(rows)]).sum(0)
    products = [
        (torch.autograd.grad((dz * p).sum(), z, retain_graph=True)[0] * p).flatten(1).sum(1) for p in probes
    ]
    return torch.stack(products).mean(0)


def ode_log_likelihood(denoise, x, logsnrs, probes=None):
    """log p(x) by the instantaneous change of variables along the probability-flow ODE. SDE eq. 39. (B,)
    float64

    logsnrs: finite grid, data first (decreasing); probes: see divergence. The field starts as z = alpha x, so
    log p(x) = log p(z) + dim log alpha.
    """
    dim, shape = x[0].numel(), x.shape

    def at(z, logsnr):
        return denoise(z, logsnr.expand(len(z)))

    def augmented(state, logsnr):  # state (B, dim + 1): z and the accumulated divergence
        with torch.enable_grad():
            z = state[:, :-1].reshape(shape).detach().requires_grad_()
            dz = ode_velocity(at, z, logsnr)
            div = divergence(dz, z, probes)
        return torch.cat([dz.detach().flatten(1), div[:, None]], 1)

    log_alpha = 0.5 * logsigmoid(logsnrs[0])
    state = torch.cat([log_alpha.exp() * x.flatten(1), x.new_zeros(len(x), 1)], 1)
    for t, s in zip(logsnrs[:-1], logsnrs[1:]):
        state = rk4(augmented, state, t, s)
    z, div = state[:, :-1].double(), state[:, -1].double()
    log_prior = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum(1)
    return log_prior + div + dim * log_alpha.to(div)


# ------------------------------------------------------------------------------------------------------------
# samplers: one loop, and one update for most.  z_s = c z_t + (alpha_s - alpha_t c) D + noise, where
#
#   ancestral   c = r alpha_s / alpha_t      D = x_hat                  r = SNR_t / SNR_s
#   DDIM        c = sigma_s / sigma_t        D = x_hat                  (eta between the two)
#   DPM++(2M)   c of either (ODE or SDE)     D = x_hat extrapolated from the last two
#   modes       c and the factor of D for every mode of the data by itself
#   Heun        c = sigma_s / sigma_t        D = x_hat corrected with a second evaluation at s
#   Langevin    c = alpha_s / alpha_t        (z / alpha stays) followed by Langevin steps at s
#
# A step takes (denoise, z, t, s, noise, memory) and returns (z_s, x_hat, memory), t and s 0-dim float64 log-
# SNRs.


def update(z, x_hat, t, s, eta=1.0, variance=0.0, noise=torch.randn_like):
    """One step from log-SNR t to a larger s (0-dim float64 tensors). DDPM eq. 7 at eta 1, DDIM eq. 12 in
    general.

    variance: 0 is the lower bound (1-r) sigma_s^2 (the true posterior for data of zero variance), 1 the upper
    (1-r) sigma_t^2 (for unit-variance data), between them the interpolation in logs (Nichol and Dhariwal
    2021, eq. 15). At eta 0 the step is DDIM, z_s = cos(d) z + sin(d) v_hat in the angle atan(sigma / alpha).
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
    """What is at log-SNR t, taken on to the middle of the step to s along the line from memory = (before,
    t_before).
    """
    if memory is None or math.isinf(s):
        return now
    before, t_before = memory
    return now + 0.5 * (s - t) / (t - t_before) * (now - before)


def multistep(denoise, z, t, s, noise, memory, eta=0.0, until=math.inf):
    """DPM-Solver++(2M) (eta 0) and its SDE form (eta 1): second order, one evaluation; D from the last two
    x_hat.

    Steps from log-SNR `until` on are those of eta 0. Either form is right with the best denoiser; a network's
    errors make the first lose variance of weather as a whole and the second light rain about its edges.
    """
    x_hat = denoise(z, t)
    D = extrapolate(x_hat, t, s, memory)
    return update(z, D, t, s, eta if t < until else 0.0, 0.0, noise), x_hat, (x_hat, t)


def modes_step(denoise, z, t, s, noise, memory, law):
    """An exponential integrator in the modes of a Gaussian law: exact where the data have it, else of second
    order.

    DDIM and DPM-Solver++ are exact where x_hat is constant, for data of zero variance.
    """
    x_hat = denoise(z, t)
    if math.isinf(s):
        return x_hat, x_hat, None
    Z, N = law.split(z, x_hat, t)
    ratio, gain = law.flow(t, s)
    return law.join(ratio * Z + gain * extrapolate(N, t, s, memory), s), x_hat, (N, t)


def heun(denoise, z, t, s, noise, memory, churn=0.0):
    """EDM algorithm 2: Heun's method on dy/d(sigma/alpha), y = z / alpha; churn > 0 first noises to sigma (1
    + churn).
    """
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
    """The reverse SDE dz = [f - g^2 score] dt + g dB (SDE eq.

    6) in log-SNR, g^2 dt = sigma^2 dlogsnr. Steps below 2.
    """
    x_hat = denoise(z, t)
    if math.isinf(s):
        return x_hat, x_hat, None
    alpha, sigma = alpha_sigma(t)
    d = s - t
    drift = alpha * x_hat + (0.5 * sigma**2 - 1) * z
    return z + d * drift + sigma * d.sqrt() * noise(z), x_hat, None


def ode(denoise, z, t, s, noise, memory):
    """The probability-flow ODE by Runge-Kutta 4, four evaluations a step: encodes and decodes exactly."""
    x_hat = denoise(z, t)
    if math.isinf(s):
        return x_hat, x_hat, None
    return rk4(partial(ode_velocity, denoise), z, t, s), x_hat, None


def langevin(denoise, z, t, s, noise, memory, num_corrections=1, snr=0.16, predictor=None):
    """Predictor-corrector (SDE algorithm 3): a predictor step to s, then Langevin steps on the score there.

    predictor None keeps z / alpha: annealed Langevin dynamics (NCSN algorithm 1), all the work done by
    corrections. z + d score + sqrt(2 d) n with d = 2 (snr sigma)^2, NCSN's step. The SDE paper's 2 (snr |n| /
    |score|)^2 is the same on average, but a step that depends on the state shifts the law it samples: badly
    so in few dimensions.
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
    "ddim": partial(single_step, eta=0.0),
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

    noise(z) draws standard normals shaped like z. A grid ending in +inf ends in a denoised field; a finite
    grid that runs towards noise with a deterministic step encodes; one that starts inside the range edits
    (SDEdit).
    """

    def at(z, logsnr):
        return denoise(z, logsnr.expand(len(z)))  # steps name one log-SNR for the batch

    memory = None
    for t, s in zip(logsnrs[:-1], logsnrs[1:]):
        z, x_hat, memory = step(at, z, t, s, noise, memory)
        yield z, x_hat


def interpolate(a, b, weight):
    """Between noises or encodings: cos(w pi/2) a + sin(w pi/2) b has the variance of independent a and b."""
    return math.cos(weight * math.pi / 2) * a + math.sin(weight * math.pi / 2) * b


# ------------------------------------------------------------------------------------------------------------
# guidance: wraps a denoiser, returns a denoiser


def clip(denoise, low, high):
    """Clamp x_hat to a range. Samplers recompute eps_hat from x_hat, so the two stay consistent."""
    return lambda z, logsnr: denoise(z, logsnr).clamp(low, high)


def classifier_free(denoise, unconditional, scale):
    """u + scale (c - u): 0 ignores the condition, above 1 exaggerates it (Ho and Salimans 2022, eq. 6)."""
    return lambda z, logsnr: torch.lerp(unconditional(z, logsnr), denoise(z, logsnr), scale)


def classifier_guidance(denoise, log_prob, scale=1.0):
    """x_hat + (sigma^2 / alpha) scale grad_z log p(c | z): Bayes' rule for the score (SDE eq. 14).

    log_prob(z, logsnr) -> (B,).
    """

    def guided(z, logsnr):
        alpha, sigma = scales(logsnr, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            gradient = torch.autograd.grad(log_prob(z, logsnr).sum(), z)[0]
        return denoise(z.detach(), logsnr) + sigma**2 / alpha * scale * gradient

    return guided


def imputation(denoise, known):
    """x_hat with its known part put right (Lugmayr et al. 2022, Song et al. 2021 app. I.2).

    Every sampler's update then takes the known part of z from t to s given y and the z_t of its own chain: at
    each level a draw of the forward process given y. The unknown part hears of y only through z, too late:
    seams and lost spread.
    """
    return lambda z, logsnr: known.project(denoise(z, logsnr))


def reconstruction_guidance(denoise, known, weight):
    """Imputation of x_hat - (weight alpha / 2) grad_z |y - A x_hat|^2 (Ho et al. 2022, eq. 6).

    The square is a sum over the entries of each sample, so that weight means the same for any batch and
    shape.
    """

    def guided(z, logsnr):
        alpha, _ = scales(logsnr, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            x_hat = denoise(z, logsnr)
            gradient = torch.autograd.grad(((known.y - known.A(x_hat)) ** 2).sum(), z)[0]
        return known.project(x_hat.detach() - weight / 2 * alpha * gradient)

    return guided


def linear_matching(denoise, known, law, std=0.0):
    """x_hat + V A' (std^2 + A V A')^-1 (y - A x_hat) with V = Cov[x | z] of a Gaussian law.

    E[x | z, y] were q(x | z) normal with that covariance (moment matching, Rozet et al. 2024, without the
    derivative of a network); exact for Gaussian data. Where std, of the error of y, is 0 that is met exactly,
    and taken to be within NEARLY where what is unknown follows it.
    """

    def guided(z, logsnr):
        x_hat = denoise(z, logsnr)
        _, variances = law.wiener(*scales(logsnr, z))
        x_hat = x_hat + law.shift(known, x_hat, variances, std * known.factor or NEARLY)
        return x_hat if std else known.project(x_hat)

    return guided
