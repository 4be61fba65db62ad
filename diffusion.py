"""Diffusion models in one notation: every process, loss, likelihood and sampler through the log-SNR.

    z = alpha x + sigma eps,   alpha^2 = sigmoid(logsnr),   sigma^2 = sigmoid(-logsnr),   eps ~ N(0, 1)
    denoise(z, logsnr) -> x_hat      z (B, C, T, H, W), logsnr (B,), x_hat like z, an estimate of E[x | z]

Pure functions that meet at `denoise`, and `Gaussian`, the law that a network is added to.
Steps take 0-dim float64 log-SNRs on the CPU, which multiply a tensor on any device in its dtype, without
waiting for it. Nothing here computes 1 - alpha^2: at |logsnr| = 30 that is lost to rounding.

Papers: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), SDE (Song et al. 2021, score-based SDEs), NCSN (Song
and Ermon 2019), VDM (Kingma et al. 2021), EDM (Karras et al. 2022), DPM++ (Lu et al. 2022), distillation
(Salimans and Ho 2022), min-SNR (Hang et al. 2023), K&G (Kingma and Gao 2023).
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice

import torch
from torch.nn.functional import avg_pool3d, logsigmoid, softplus
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# the forward process


def expand(a, x):
    """Append dimensions to a (B,) until it broadcasts against x (B, ...)."""
    return a.reshape(a.shape + (1,) * (x.ndim - a.ndim))


def like(a, x):
    """A small tensor `a` in the dtype of x and on its device, for which the host does not wait."""
    return a.to(x, non_blocking=True)


def alpha_sigma(logsnr):
    """alpha and sigma of the variance-preserving process, any shape, accurate for |logsnr| up to 80."""
    return (0.5 * logsigmoid(logsnr)).exp(), (0.5 * logsigmoid(-logsnr)).exp()


def scales(logsnr, z):
    """alpha and sigma of each sample, shaped, placed and typed to multiply z."""
    return tuple(like(expand(a, z), z) for a in alpha_sigma(logsnr))


def diffuse(x, logsnr, eps):
    """Draw z ~ q(z | x) = N(alpha x, sigma^2): x, eps (B, ...), logsnr (B,) -> z (B, ...). DDPM eq. 4."""
    alpha, sigma = scales(logsnr, x)
    return alpha * x + sigma * eps


# ------------------------------------------------------------------------------------------------------------
# levels: which log-SNRs are visited

BETA, RISE = 0.1, 19.9  # the VP-SDE's beta, BETA + RISE t; DDPM's 1e-4 .. 0.02 times 1000 steps
EDM_MEAN, EDM_STD = 1.0, 2.4  # EDM's training density of log-SNRs, for data of unit variance
RHO = 7.0  # exponent of EDM's sampling grid

SCHEDULES = {  # a clock g(logsnr), decreasing, and its inverse
    "cosine": (lambda l: torch.atan((-l / 2).exp()), lambda g: -2 * torch.log(torch.tan(g))),
    "linear": (  # -log alpha^2 = BETA g + RISE g^2 / 2, solved without cancellation
        lambda l: (2 * softplus(-l) / (BETA + (BETA**2 + 2 * RISE * softplus(-l)).sqrt())).clamp(max=1),
        lambda g: -torch.log(torch.expm1(BETA * g + RISE / 2 * g**2)),
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

    cosine (distillation; Foster's is cut to -7.824 .. 2.2253), linear (DDPM, VP-SDE), logsnr (VDM, NCSN),
    flow (rectified flow: rescaling z makes it the same process), normal (EDM's training), rho (EDM's
    sampling, -8.76 .. 12.43). shift adds 2 log(shift): below 1 it moves the density towards noise (Hoogeboom
    et al. 2023).
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
        l = torch.as_tensor(logsnr, dtype=torch.float64, device="cpu") - offset
        slope = torch.func.grad(lambda l: SCHEDULES[self.schedule][0](l).sum())(l)
        return torch.log(-slope / (end - start))

    def grid(self, num_steps):
        """The log-SNRs a sampler visits: (num_steps + 1,) float64, even in t, the last +inf for t = 0."""
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]
        return torch.cat([self.logsnr(t), t.new_tensor([math.inf])])


def stratified_times(batch_size, generator=None):
    """t_i = (u + i / B) mod 1: one uniform draw spread evenly over the batch (VDM app. I.1). (B,) float64."""
    u = torch.rand((), generator=generator, dtype=torch.float64)
    return (u + torch.arange(batch_size, dtype=torch.float64) / batch_size) % 1


# ------------------------------------------------------------------------------------------------------------
# the Gaussian law of the data

TOGETHER = 512  # cells of time and x whose covariance is taken together; beyond, time and x are taken apart
LEAST = 1e-6  # variance of a mode, at least
NEARLY = 0.02  # standard deviations within which what is observed exactly is met, before it is put right
ROUNDS = 10  # of filling and fitting where data are missing
FEWEST, SOME, VALUES = 20, 500, 4_000_000  # clips at least, at most, values at most, but in the last two


def rotate(x, dims, M):
    """Coefficients of x (..., T, H, W) in the patterns along dims that are the rows of the orthonormal M."""
    end = tuple(range(-len(dims), 0))
    x = x.movedim(dims, end)
    return (x.flatten(-len(dims)) @ M.mT).view(x.shape).movedim(end, dims)


def principal_axes(covariance):
    """Eigenvectors of a covariance (n, n) as rows of an orthonormal matrix, the largest variance first."""
    return torch.linalg.eigh(covariance.double())[1].flip(-1).mT.to(covariance).contiguous()


@dataclass(frozen=True, eq=False)
class Gaussian:
    """The normal law of clips: a mean, and independent modes of known variance in an orthonormal basis.

    A climate field is first of all a Gaussian process, and of that everything is known, mode by mode. A mode
    of variance w comes out of the noise at log-SNR -log w (`emergence`). Its best estimate is Wiener's, alpha
    w / (alpha^2 w + sigma^2) times its coefficient in z (`denoise`); a network adds to that what is not
    Gaussian, as far as the noise lets it know (`envelope`). How a draw moves when a part of it is known
    (`shift`), an exact step of a sampler (`flow`), a longer clip (`frames`) follow.

    mean (C, 1, H, W); variances (C, T, H, W) of the modes, which lie where clips have their cells; axes
    ((dims, M), ...): patterns along dimensions of a clip, the rows of M, those of time first.
    """

    mean: torch.Tensor
    variances: torch.Tensor
    axes: tuple

    @classmethod
    def fit(cls, batches):
        """The law of standardised clips, batches of (B, C, T, H, W), NaN where there are no data; read often.

        Expectation-maximisation by draws: what is missing is filled with draws of the law given what is
        there, the law is fitted to that, and so on. Filled with the mean, variances would be too low.
        """
        if not any(x.isnan().any() for x in batches):
            return cls.fit_complete(batches)
        law = cls.fit_complete([x.nan_to_num() for x in batches])
        count = sum(len(x) for x in batches)
        some = min(SOME, max(FEWEST, VALUES // law.variances.numel()))
        step = max(1, count // some)
        for i in tqdm(range(ROUNDS), "filling what is missing", leave=False):  # the finest modes take many
            of = islice(batches, 0, None, step if i < ROUNDS - 2 else 1)
            seeded = ((x, torch.Generator().manual_seed(k)) for k, x in enumerate(of))
            law = cls.fit_complete([law.fill(x, law.draw(x, generator)) for x, generator in seeded])
        return law

    @classmethod
    def fit_complete(cls, batches):
        """The law of clips without gaps: mean in every cell, principal axes, variance of every mode."""
        total, count = 0, 0
        for x in batches:
            total, count = total + x.sum(0), count + len(x)
        mean = (total / count).mean(1, keepdim=True)  # (C, 1, H, W)
        T, _, W = total.shape[1:]

        def covariance(dims):
            end = tuple(range(-len(dims), 0))
            series = ((x - mean).movedim(dims, end).flatten(-len(dims)).flatten(0, -2) for x in batches)
            return sum(s.mT @ s for s in series) / count

        # weather travels: time and x share their axes where these are not too long
        groups = ((-3, -1), (-2,)) if T * W <= TOGETHER else ((-3,), (-2,), (-1,))
        axes = tuple((dims, principal_axes(covariance(dims))) for dims in groups)
        basis = cls(mean, total, axes)
        variances = sum((basis.modes(x - mean) ** 2).sum(0) for x in batches) / count
        return cls(mean, variances.clamp(min=LEAST), axes)

    def map(self, f):
        """The same law with f done to every tensor."""
        axes = tuple((dims, f(M)) for dims, M in self.axes)
        return type(self)(f(self.mean), f(self.variances), axes)

    def modes(self, x):
        """Coefficients of anomalies x (..., T, H, W); keeps sums of squares."""
        for dims, M in self.axes:
            x = rotate(x, dims, M)
        return x

    def field(self, modes):
        """The inverse of modes."""
        for dims, M in self.axes:
            modes = rotate(modes, dims, M.mT)
        return modes

    def scaled(self, x, by):
        """Anomalies x with every mode multiplied by `by`."""
        return self.field(by * self.modes(x))

    def wiener(self, alpha, sigma):
        """Per mode the gain of E[x | z] = gain z and the variance Var[x | z]."""
        total = alpha**2 * self.variances + sigma**2
        return alpha * self.variances / total, sigma**2 * self.variances / total

    def estimates(self, z, logsnr):
        """E[x | z] and E[eps | z] of z (B, C, T, H, W), logsnr (B,): alpha and sigma times these make z."""
        alpha, sigma = scales(logsnr, z)
        Z = self.modes(z - alpha * self.mean) / (alpha**2 * self.variances + sigma**2)
        x, eps = self.field(torch.stack([alpha * self.variances * Z, sigma * Z]))
        return self.mean + x, eps

    def denoise(self, z, logsnr):
        """E[x | z], the best denoiser of data with this law."""
        return self.estimates(z, logsnr)[0]

    def envelope(self, logsnr):
        """How much of v a network may add to each mode at log-SNRs (B,): (B, C, T, H, W), from 0 to 1.

        The geometric mean of the gain and its root mean square over all modes: a mode that has not emerged
        yet is left alone, but for what the others tell of it.
        """
        gain, _ = self.wiener(*scales(logsnr.to(self.variances), self.variances[None]))
        return (gain * (gain**2).mean((1, 2, 3, 4), keepdim=True).sqrt()).sqrt()

    def spread(self, logsnr):
        """Root mean square over modes of the anomaly E[x | z] - mean, (B, 1, 1, 1, 1)."""
        alpha, sigma = scales(logsnr.to(self.variances), self.variances[None])
        gain, _ = self.wiener(alpha, sigma)
        return (alpha * gain * self.variances).mean((1, 2, 3, 4), keepdim=True).sqrt()

    def emergence(self, margin=0.0):
        """The log-SNRs (first, last) between which the modes emerge, at alpha^2 w = sigma^2, and a margin."""
        w = self.variances
        return -math.log(float(w.max())) - margin, -math.log(float(w[w > 0].min())) + margin

    def shift(self, known, x_hat, variances, std, tolerance=1e-10, steps=512):
        """V A' (A V A' + std^2)^-1 (y - A x_hat): how far E[x | z] moves when y = A x is known to within std.

        V = Cov[x | z] has the variances (B or 1, C, T, H, W) in the modes; std is the error of a single cell:
        a mean of n cells has n^1/2 times less. Conjugate gradients, preconditioned by the inverse of V cut to
        what is observed.
        """

        def seen(u, by):
            return known.lift(known.A(self.scaled(u, by)))

        missing, inverse = known.lift(known.y - known.A(x_hat)), 1 / (variances + std**2)
        u = conjugate_gradients(
            lambda u: seen(u, variances) + std**2 * u, missing, lambda r: seen(r, inverse), tolerance, steps
        )
        return self.scaled(u, variances)

    def draw(self, x, generator=None):
        """A draw of this law, like x (B, C, T, H, W)."""
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
        return self.mean + self.field(self.variances.sqrt() * noise)

    def fill(self, x, draw):
        """Clips x (B, C, T, H, W) with `draw`, moved to what is there, in place of every NaN.

        A draw of the law becomes one given what is there; the law's mean becomes the mean given that.
        """
        there = x.isfinite()
        known = Observation(x.nan_to_num(), there.to(x))
        # a thousandth is enough for a draw: finer modes of the fitted law do not change
        draw = draw + self.shift(known, draw, self.variances[None], NEARLY, tolerance=1e-3, steps=64)
        return torch.where(there, x, draw)

    def flow(self, t, s):
        """(ratio, gain) of the probability-flow ODE in every mode: Z_s = ratio Z_t + gain N, log-SNR t to s.

        Z: modes of z - alpha mean; N: what an x_hat adds to Wiener's, which is alpha w Z / S with S = alpha^2
        w + sigma^2; N is taken to be constant. dZ/dlogsnr = (alpha x_hat - alpha^2 Z) / 2 then gives
        ratio^2 = S_s / S_t and gain = (S_s / w)^1/2 [asinh(w^1/2 e^(logsnr / 2))] from t to s. As w goes to 0
        it is DDIM.
        """
        w = self.variances.clamp(min=1e-12)  # 0 of what the exact law of the built-in data leaves out
        t, s = t.to(w), s.to(w)
        S_t, S_s = (torch.sigmoid(l) * w + torch.sigmoid(-l) for l in (t, s))
        angle_t, angle_s = (torch.asinh(w.sqrt() * (l / 2).exp()) for l in (t, s))
        return (S_s / S_t).sqrt(), (S_s / w).sqrt() * (angle_s - angle_t)

    @lru_cache(32)
    def frames(self, T):
        """The law of clips of T frames: the autocovariance of every pattern in space is cut or goes on."""
        T0 = self.variances.shape[1]
        if T == T0:
            return self
        (dims, A), *others = self.axes
        n = len(A) // T0  # cells that share axes with time: W or 1
        V = self.variances.double().unflatten(-1, (-1, n)).movedim(1, -2).flatten(-2)  # (C, H, W / n, T0 n)
        r = [torch.einsum("chwm,mij->chwij", V, lagged(A, n, l)) / (T0 - l) for l in range(T0)]
        r = continue_covariances(r, T)
        A = principal_axes(toeplitz([a.mean((0, 1, 2)) for a in r]))
        V = sum((1 + (l > 0)) * torch.einsum("chwij,mij->chwm", r[l], lagged(A, n, l)) for l in range(T))
        variances = V.unflatten(-1, (T, n)).movedim(-2, 1).flatten(-2)  # (C, T, H, W)
        A = A.to(self.variances)
        return Gaussian(self.mean, variances.clamp(min=LEAST).to(self.variances), ((dims, A), *others))


def lagged(A, n, lag):
    """Products of the frames of patterns A (m, T n) that are `lag` apart, summed: (m, n, n)."""
    A = A.double().unflatten(-1, (-1, n))
    return torch.einsum("mti,mtj->mij", A[:, : A.shape[1] - lag], A[:, lag:])


def toeplitz(r):
    """Autocovariances r[lag] (..., n, n) -> the covariance of len(r) frames (..., n len(r), n len(r))."""
    T = len(r)
    rows = [torch.cat([r[v - u] if v >= u else r[u - v].mT for v in range(T)], -1) for u in range(T)]
    return torch.cat(rows, -2)


def continue_covariances(r, T):
    """Autocovariances r[lag] (..., n, n), cut to T lags, or continued by the autoregression that has them.

    Of all that agree with them it has the maximum entropy (Burg 1975).
    """
    T0 = min(T, len(r))  # averages need not be a covariance: white noise is added, the variance kept
    white = (LEAST - torch.linalg.eigvalsh(toeplitz(r[:T0]))[..., :1, None]).clamp(min=0)
    variance = r[0].diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    noisy = [r[0] + white * torch.eye(r[0].shape[-1]).to(white), *r[1:T0]]
    r = [a * variance / (variance + white) for a in noisy]
    if T0 == 1:  # nothing is known of the next frame
        return r + [0 * r[0]] * (T - 1)
    coefficients = torch.linalg.solve(toeplitz(r[:-1]), torch.cat(r[:0:-1], -2))
    for lag in range(T0, T):
        r.append(torch.cat(r[lag - T0 + 1 :], -1) @ coefficients)
    return r


# ------------------------------------------------------------------------------------------------------------
# parameterisations and losses: the network's output F estimates a x + b eps

PARAMS = {  # (a, b) from (alpha, sigma)
    "v": lambda alpha, sigma: (-sigma, alpha),  # dz / d angle (distillation eq. 9): alone fit for both ends
    "eps": lambda alpha, sigma: (0 * alpha, 1 + 0 * alpha),  # DDPM
    "x": lambda alpha, sigma: (1 + 0 * alpha, 0 * alpha),
    "score": lambda alpha, sigma: (0 * alpha, -1 / sigma),  # grad log q(z | x), denoising score matching
}

# log of the factor m on |error of v|^2. In K&G's form 1/2 E_p[w/p |error of eps|^2], w = 2 p m / alpha^2
WEIGHTINGS = {
    "v": lambda l, log_p: 0 * l,  # m = 1, SNR + 1 on x
    "eps": lambda l, log_p: logsigmoid(l),  # m = alpha^2 (DDPM's L_simple)
    "x": lambda l, log_p: logsigmoid(-l),  # m = sigma^2
    # m = max(SNR, 1) sigma^2 (distillation)
    "truncated_snr": lambda l, log_p: l.clamp(min=0) + logsigmoid(-l),
    "min_snr": lambda l, log_p: l.clamp(max=math.log(5)) - softplus(l),  # m = min(SNR, 5) / (SNR + 1)
    # m = alpha^2 / 2 p, w = 1 (VDM eq. 14)
    "elbo": lambda l, log_p: logsigmoid(l) - log_p.to(l) - math.log(2),
    "sigmoid": lambda l, log_p: WEIGHTINGS["elbo"](l, log_p) + logsigmoid(2 - l),  # w = sigmoid(2 - l) (K&G)
}


def to_x(F, z, logsnr, param):
    """x_hat from F and z = alpha x + sigma eps. 'eps' and 'score' divide by alpha."""
    alpha, sigma = scales(logsnr, z)
    a, b = PARAMS[param](alpha, sigma)
    return (b * z - sigma * F) / (alpha * b - sigma * a)


def to_eps(x_hat, z, logsnr):
    """(z - alpha x_hat) / sigma. The score is -eps_hat / sigma, v_hat is alpha eps_hat - sigma x_hat."""
    alpha, sigma = scales(logsnr, z)
    return (z - alpha * x_hat) / sigma


def masked_sum(a, mask):
    """Sum over all but the first dimension, over the entries where mask (0 or 1, or None) is 1. (B,)"""
    return (a if mask is None else a * mask).flatten(1).sum(1)


def training_loss(F, x, eps, logsnr, param="v", weighting="v", log_p=None, mask=None):
    """The weighted loss of each sample (B,), a mean over entries, and its plain squared v-error (B,).

    F the network's output, x, eps (B, ...), logsnr (B,) float64, log_p its log density (for elbo, sigmoid),
    mask 1 where x is data. Weight and conversion to v are joined in logs: nothing overflows where they
    cancel.
    """
    alpha, sigma = alpha_sigma(logsnr)
    a, b = PARAMS[param](alpha, sigma)
    target = like(expand(a, x), x) * x + like(expand(b, x), x) * eps
    count = x[0].numel() if mask is None else masked_sum(mask, None).clamp(min=1)
    error = masked_sum((F - target) ** 2, mask) / count
    log_factor = -2 * (alpha * b - sigma * a).abs().log()  # |error of v|^2 / |error of F|^2
    weight = (WEIGHTINGS[weighting](logsnr, log_p) + log_factor).exp()
    return like(weight, error) * error, like(log_factor.exp(), error) * error.detach()


# ------------------------------------------------------------------------------------------------------------
# likelihoods, in nats per sample: lower is better for bounds, log p is log p


def prior_kl(x, logsnr_min, mask=None):
    """KL(q(z_1 | x) || N(0, 1)) = 1/2 sum(alpha^2 (x^2 - 1) - log sigma^2), DDPM's L_T. (B,) float64"""
    l = torch.as_tensor(logsnr_min, dtype=torch.float64)
    return masked_sum(0.5 * (torch.sigmoid(l) * (x.double() ** 2 - 1) + softplus(l)), mask)


def reconstruction_nll(dim, logsnr_max):
    """L_0 = E[-log N(x; z_0 / alpha, e^-logsnr_max)] of dim (number or (B,)) real entries."""
    return dim / 2 * (1 + math.log(2 * math.pi) - logsnr_max)


def eps_error(denoise, x, logsnr, eps, mask):
    """|eps - eps_hat|^2 summed over the entries where mask is 1. (B,)"""
    z = diffuse(x, logsnr, eps)
    return masked_sum((eps - to_eps(denoise(z, logsnr), z, logsnr)) ** 2, mask)


def diffusion_nll(denoise, x, t, eps, logsnr_min, logsnr_max, mask=None):
    """One-sample estimate of the continuous-time diffusion loss, t (B,) uniform. VDM eq. 17. (B,)"""
    width = logsnr_max - logsnr_min
    return 0.5 * width * eps_error(denoise, x, logsnr_max - width * t, eps, mask)


def discrete_nll(denoise, x, t, eps, logsnrs, mask=None):
    """One-sample estimate of sum_t L_{t-1}, a chain of T steps on finite logsnrs (T + 1,), noise first. (B,)

    t (B,) uniform picks one step; its KL is 1/2 expm1(l_s - l_t) |eps - eps_hat|^2. VDM eq. 14.
    """
    T = len(logsnrs) - 1
    i = (t * T).long().clamp(max=T - 1)  # (B,)
    l, s = logsnrs[i], logsnrs[i + 1]
    return (0.5 * T * torch.expm1(s - l)).to(x) * eps_error(denoise, x, l, eps, mask)


def ode_velocity(denoise, z, logsnr):
    """dz/dlogsnr of the probability-flow ODE (SDE eq. 13), -1/2 alpha sigma v_hat; logsnr 0-dim."""
    alpha = alpha_sigma(logsnr)[0]
    return 0.5 * alpha * (denoise(z, logsnr.expand(len(z))) - alpha * z)


def rk4(f, y, t, s):
    """One step of Runge-Kutta 4 for dy/dlogsnr = f(y, logsnr) from t to s."""
    h, mid = s - t, (t + s) / 2
    k1 = f(y, t)
    k2 = f(y + h / 2 * k1, mid)
    k3 = f(y + h / 2 * k2, mid)
    k4 = f(y + h * k3, s)
    return y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def ode_log_likelihood(denoise, x, logsnrs, probes):
    """log p(x) by the change of variables along the probability-flow ODE. SDE eq. 39. (B,) float64

    logsnrs: finite, data first. probes (K, B, ...): the divergence is the mean of p' J p over them; random
    +-1 estimate it (Hutchinson), the D axes times D^1/2 give it exactly. At the start z = alpha x.
    """

    def augmented(state, logsnr):  # state (B, D + 1): z and the accumulated divergence
        with torch.enable_grad():
            z = state[:, :-1].reshape(x.shape).detach().requires_grad_()
            dz = ode_velocity(denoise, z, logsnr)
            products = [p * torch.autograd.grad((dz * p).sum(), z, retain_graph=True)[0] for p in probes]
        divergence = torch.stack(products).mean(0).flatten(1).sum(1)
        return torch.cat([dz.detach().flatten(1), divergence[:, None]], 1)

    log_alpha = 0.5 * logsigmoid(logsnrs[0])
    state = torch.cat([log_alpha.exp() * x.flatten(1), x.new_zeros(len(x), 1)], 1)
    for t, s in zip(logsnrs[:-1], logsnrs[1:]):
        state = rk4(augmented, state, t, s)
    z, divergence = state[:, :-1].double(), state[:, -1].double()
    log_prior = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum(1)
    return log_prior + divergence + x[0].numel() * log_alpha.to(divergence)


# ------------------------------------------------------------------------------------------------------------
# samplers. A step takes (denoise, z, t, s, noise, memory) from log-SNR t to s, both finite, and returns (z_s,
# x_hat, memory)


def sample(denoise, z, logsnrs, step, noise=torch.randn_like):
    """Run a sampler over the grid from z (B, ...) at logsnrs[0]; yields (z, x_hat) after every step.

    A grid to +inf ends in a denoised field, one towards noise encodes, one that starts inside edits (SDEdit).
    step(denoise, z, t, s, noise, memory) -> z at s, x_hat, memory of the next step; x_hat is for the caller.
    """

    def at(z, logsnr):
        return denoise(z, logsnr.expand(len(z)))  # steps name one log-SNR for the batch

    memory = None
    for t, s in zip(logsnrs[:-1], logsnrs[1:]):
        if math.isinf(s):
            z = x_hat = at(z, t)
        else:
            z, x_hat, memory = step(at, z, t, s, noise, memory)
        yield z, x_hat


def update(z, x_hat, t, s, eta=1.0, variance=0.0, noise=torch.randn_like):
    """z_s = c z + (alpha_s - alpha_t c) x_hat + noise: DDPM eq. 7 at eta 1, DDIM eq. 12 in general.

    variance: 0 is right for data of zero variance, 1 of unit variance (Nichol and Dhariwal 2021, eq. 15).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
    one_minus_r = -torch.expm1(t - s)
    c = sigma_s / sigma_t * (1 - eta**2 * one_minus_r).sqrt()
    z_s = c * z + (alpha_s - alpha_t * c) * x_hat
    if eta == 0:
        return z_s
    return z_s + eta * one_minus_r.sqrt() * sigma_s ** (1 - variance) * sigma_t**variance * noise(z)


def extrapolate(now, t, s, memory):
    """`now` at log-SNR t, taken to the middle of the step to s on the line from memory = (before, when)."""
    if memory is None:
        return now
    before, when = memory
    return now + 0.5 * (s - t) / (t - when) * (now - before)


def multistep(denoise, z, t, s, noise, memory, order=1, eta=1.0, variance=0.0, until=math.inf):
    """Ancestral sampling, DDIM (eta 0), and of order 2 DPM-Solver++(2M) (eta 0) and its SDE form (eta 1).

    Steps from log-SNR `until` on are those of eta 0. A young network makes too little weather without noise
    in the first steps, too little light rain with noise in the last.
    """
    x_hat = denoise(z, t)
    D = extrapolate(x_hat, t, s, memory)
    z = update(z, D, t, s, eta if t < until else 0.0, variance, noise)
    return z, x_hat, (x_hat, t) if order == 2 else None


def modes_step(denoise, z, t, s, noise, memory, law):
    """An exponential integrator in the modes of a Gaussian law: exact for data of that law, else order 2."""
    x_hat = denoise(z, t)
    N = law.modes(x_hat - law.denoise(z, t))
    ratio, gain = law.flow(t, s)
    Z = ratio * law.modes(z - alpha_sigma(t)[0] * law.mean) + gain * extrapolate(N, t, s, memory)
    return alpha_sigma(s)[0] * law.mean + law.field(Z), x_hat, (N, t)


def heun(denoise, z, t, s, noise, memory, churn=0.0):
    """EDM algorithm 2, Heun's method on dy/d(sigma/alpha), y = z / alpha; churn first adds so much noise."""
    if churn > 0:
        alpha, sigma = alpha_sigma(t)
        t = t - 2 * math.log1p(churn)
        z = alpha_sigma(t)[0] / alpha * (z + math.sqrt(churn * (2 + churn)) * sigma * noise(z))
    x_hat = denoise(z, t)
    x_hat_s = denoise(update(z, x_hat, t, s, eta=0.0), s)
    # averaging d = eps_hat at both ends is D = x_hat + e^h / 2 (x_hat_s - x_hat)
    D = x_hat + 0.5 * ((s - t) / 2).exp() * (x_hat_s - x_hat)
    return update(z, D, t, s, eta=0.0), x_hat, None


def euler_maruyama(denoise, z, t, s, noise, memory):
    """The reverse SDE dz = [f - g^2 score] dt + g dB (SDE eq. 6), g^2 dt = sigma^2 dlogsnr; steps below 2."""
    x_hat = denoise(z, t)
    alpha, sigma = alpha_sigma(t)
    d = s - t
    drift = alpha * x_hat + (0.5 * sigma**2 - 1) * z
    return z + d * drift + sigma * d.sqrt() * noise(z), x_hat, None


def ode(denoise, z, t, s, noise, memory):
    """The probability-flow ODE by Runge-Kutta 4: encodes and decodes exactly."""
    estimates = []

    def remembered(z, logsnr):
        estimates.append(denoise(z, logsnr))
        return estimates[-1]

    return rk4(partial(ode_velocity, remembered), z, t, s), estimates[0], None


def langevin(denoise, z, t, s, noise, memory, num_corrections=1, snr=0.16, predictor=None):
    """Predictor-corrector (SDE algorithm 3): a predictor step to s, then Langevin steps on the score there.

    predictor None keeps z / alpha: annealed Langevin dynamics (NCSN algorithm 1). The step, d = 2 (snr
    sigma)^2, is NCSN's: the SDE paper's depends on the state, which shifts the law.
    """
    if predictor is None:
        z = alpha_sigma(s)[0] / alpha_sigma(t)[0] * z
    else:
        z, _, memory = predictor(denoise, z, t, s, noise, memory)
    sigma = alpha_sigma(s)[1]
    for _ in range(num_corrections):  # d score = -2 snr^2 sigma eps_hat
        x_hat = denoise(z, s)
        z = z + 2 * snr * sigma * (noise(z) - snr * to_eps(x_hat, z, s))
    return z, x_hat, memory


SAMPLERS = {
    "ancestral": multistep,
    "ddim": partial(multistep, eta=0.0),
    "dpmpp": partial(multistep, order=2, eta=0.0),
    "dpmpp_sde": partial(multistep, order=2),
    "dpmpp_mixed": partial(multistep, order=2, until=0.0),  # sample.py: midway through where modes emerge
    "modes": modes_step,
    "heun": heun,
    "sde": euler_maruyama,
    "ode": ode,
    "pc": partial(langevin, predictor=multistep),
    "langevin": partial(langevin, num_corrections=10),
}
DETERMINISTIC = ("dpmpp", "modes", "heun", "ode")  # without churn; ddim with eta 0, too


def interpolate(a, b, weight):
    """Between noises or encodings: cos(w pi/2) a + sin(w pi/2) b has the variance of independent a and b."""
    return math.cos(weight * math.pi / 2) * a + math.sin(weight * math.pi / 2) * b


# ------------------------------------------------------------------------------------------------------------
# what is observed, and guidance, which wraps a denoiser and returns one


@dataclass
class Observation:
    """What is known of a field: y = A x, means over factor x factor cells where mask is 1, else 0.

    y, mask: (B, C, T, H / factor, W / factor).
    """

    y: torch.Tensor
    mask: torch.Tensor
    factor: int = 1

    def A(self, x):
        return self.mask * (x if self.factor == 1 else avg_pool3d(x, (1, self.factor, self.factor)))

    def lift(self, u):
        """A right inverse of A, A(lift(u)) = u; lift(A(x)) is the orthogonal projection onto what is seen."""
        n, u = self.factor, self.mask * u
        return u if n == 1 else u.repeat_interleave(n, -2).repeat_interleave(n, -1)

    def project(self, x):
        """The field nearest to x that agrees with y."""
        return x + self.lift(self.y - self.A(x))


def conjugate_gradients(S, b, precondition, tolerance=1e-10, steps=512):
    """u with S u = b for every sample of b (B, ...); S is positive; so is precondition, about its inverse.

    A sample is left alone once r' precondition(r), r its residual, is below tolerance times that at the
    start: so it does not depend on its neighbours.
    """

    def dot(a, b):
        return expand((a * b).flatten(1).sum(1), a)

    def ratio(a, b):
        return going * a / torch.where(going, b, 1)  # nothing divided by 0, nor in the gradient

    u, r = torch.zeros_like(b), b
    p = precondition(r)
    rr = dot(r, p)
    enough = tolerance * rr
    for step in range(steps):
        going = rr > enough
        if step % 8 == 0 and not going.any():  # asked now and then, as a GPU has to be waited for
            break
        Sp = S(p)
        curvature = dot(p, Sp)
        going = going & (curvature > 0)
        length = ratio(rr, curvature)
        u, r = u + length * p, r - length * Sp
        q = precondition(r)
        before, rr = rr, dot(r, q)
        p = going * q + ratio(rr, before) * p
    return u


def clip(denoise, low, high):
    """Clamp x_hat to a range. Samplers recompute eps_hat from x_hat, so the two stay consistent."""
    return lambda z, logsnr: denoise(z, logsnr).clamp(low, high)


def classifier_free(denoise, unconditional, scale):
    """u + scale (c - u): 0 ignores the condition, above 1 exaggerates it (Ho and Salimans 2022, eq. 6)."""
    return lambda z, logsnr: torch.lerp(unconditional(z, logsnr), denoise(z, logsnr), scale)


def classifier_guidance(denoise, log_prob, scale=1.0):
    """x_hat + (sigma^2 / alpha) scale grad_z log p(c | z): Bayes' rule for the score (SDE eq. 14).
    log_prob(z, logsnr) -> (B,)"""

    def guided(z, logsnr):
        alpha, sigma = scales(logsnr, z)
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            gradient = torch.autograd.grad(log_prob(z, logsnr).sum(), z)[0]
        return denoise(z.detach(), logsnr) + sigma**2 / alpha * scale * gradient

    return guided


def imputation(denoise, known):
    """x_hat with its known part put right (Lugmayr et al. 2022, Song et al. 2021 app. I.2).

    At each level the known part of z is then a draw of the forward process given y; the unknown part hears of
    y only through z, too late: seams and lost spread.
    """
    return lambda z, logsnr: known.project(denoise(z, logsnr))


def reconstruction_guidance(denoise, known, weight):
    """Imputation of x_hat - (weight alpha / 2) grad_z |y - A x_hat|^2, a sum (Ho et al. 2022, eq. 7)."""

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

    Moment matching (Rozet et al. 2024) without the derivative of a network; exact for Gaussian data. Where
    std, the error of y, is 0, y is met exactly, and what is unknown follows it within NEARLY.
    """

    def guided(z, logsnr):
        x_hat = denoise(z, logsnr)
        _, variances = law.wiener(*scales(logsnr, z))
        x_hat = x_hat + law.shift(known, x_hat, variances, std * known.factor or NEARLY)
        return x_hat if std else known.project(x_hat)

    return guided
