"""The mathematics of the objective in plain PyTorch: the specification of the kernels.

It runs on any device, is differentiated by autograd, and computes in float32, or in float64 if an argument is
float64. The tests and benchmarks compare the kernels with it. It runs where no kernel does: on a CPU, and for
the forms that the kernels lack.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bvae.objective import LossTerms, Objective, Weights

_SMALLEST = 1e-6  # a variance or scale that is a tensor counts as at least this, as in F.gaussian_nll_loss


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 if any of `tensors` is float64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def scale_pixels(images: Tensor, low: float = -1.0) -> Tensor:
    """uint8 pixels as float32 in [low, 1]; `low` is -1 or 0, the first number of a `pixel_range`.

    The shift comes before the factor, so that a fused multiply-add cannot change the rounding.
    """
    if low == 0.0:
        return images.float() * (1 / 255)
    return (images.float() - 127.5) * (1 / 127.5)


def reparam_kl(
    mu: Tensor,
    log_var: Tensor,
    eps: Tensor | None,
    *,
    clamp: tuple[float, float] | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    free_bits: float = 0.0,
    reduction: str = "sum",
    per_dim: bool = True,
) -> tuple[Any, Tensor, Any]:
    """A sample of N(mu, exp(log_var)), and its KL divergence to the prior: Kingma and Welling (2014).

        z  = mu + exp(log_var / 2) * eps
        KL = 0.5 * (mu^2 + exp(log_var) - 1 - log_var)         to N(0, I); else with mu - m and log_var - v:
        KL = 0.5 * ((mu - m)^2 / exp(v) + exp(log_var - v) - 1 - (log_var - v))

    Args:
        mu, log_var: `[B, ...]`, of one shape.
        eps: standard normal noise `[B, ...]` or `[K, B, ...]`; None for the KL alone.
        clamp: bounds of log_var; its gradient at and outside them is zero. diffusers has them.
        prior: the prior's mean m and log variance v, which broadcast to mu's shape.
        free_bits: a dimension whose mean KL in the batch is less has this instead, a constant, in `kl`:
            Kingma et al. (2016), equation 15.
        reduction: "sum" or "none".

    Returns:
        z in mu's dtype, or None without eps; the KL per sample, `[B]`, or with "none" per element, nats; with
        `per_dim` the batch's mean KL per dimension, nats, without the free bits, else None.
    """
    dtype = compute_dtype(mu, log_var)
    mean, log_variance = mu.to(dtype), log_var.to(dtype)
    if clamp is not None:  # torch.clamp's gradient at the bounds themselves depends on torch's version
        low, high = clamp
        inside = (log_variance > low) & (log_variance < high)
        log_variance = torch.where(inside, log_variance, log_variance.detach().clamp(low, high))
    half = 0.5 * log_variance
    std = torch.exp(half)
    z = None if eps is None else torch.addcmul(mean, std, eps.to(dtype)).to(mu.dtype)
    if prior is None:  # in the form that takes a CPU the fewest passes, forward and backward
        kl = torch.add(-0.5 - half, mean * mean + std * std, alpha=0.5)
    else:
        prior_mean, prior_log_variance = (p.to(dtype) for p in prior)
        excess = log_variance - prior_log_variance
        distance = (mean - prior_mean) * torch.exp(-0.5 * prior_log_variance)
        kl = 0.5 * (distance.square() + torch.exp(excess) - 1 - excess)
    kl_per_dim = kl.mean(0) if per_dim else None
    if free_bits > 0:
        kl = torch.where(kl.mean(0) < free_bits, free_bits, kl)
    if reduction == "sum":
        kl = kl.flatten(1).sum(1)
    return z, kl, kl_per_dim


def batch_norm_leaky_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, negative_slope: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of a training batch, Ioffe and Szegedy (2015), and LeakyReLU.

    Args:
        x: `[N, C, H, W]`, more than one number per channel.
        weight, bias: `[C]`.

    Returns:
        y in x's dtype; the mean and the unbiased variance of each channel, `[C]`.
    """
    dtype = compute_dtype(x, weight, bias)
    values, scale, shift = (t.to(dtype) for t in (x, weight, bias))
    mean = values.mean((0, 2, 3), keepdim=True)
    distance = values - mean
    variance = distance.square().mean((0, 2, 3), keepdim=True)
    before = distance * torch.rsqrt(variance + eps) * scale[:, None, None] + shift[:, None, None]
    y = F.leaky_relu(before, negative_slope).to(x.dtype)
    rows = x.numel() // x.shape[1]
    return y, mean.flatten(), variance.flatten() * (rows / (rows - 1))


def last_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    objective: Objective,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A decoder's last block and its errors; `bvae.ops.last_block` documents the arguments.

    Returns:
        the errors and squared errors per image, `[B]`; BatchNorm's mean and unbiased variance, `[C]`.
    """
    dtype = compute_dtype(x, target)
    a, mean, variance = batch_norm_leaky_relu(x, norm_weight, norm_bias, eps, negative_slope)
    recon = F.conv2d(a, weight.to(a.dtype), bias.to(a.dtype), padding=1).to(dtype)
    y = scale_pixels(target, objective.pixel_range[0]) if target.dtype == torch.uint8 else target
    y = y.to(dtype)
    if objective.likelihood == "bernoulli":
        y = torch.where((y < 0) | (y > 1), torch.nan, y)
    output = recon
    if objective.activation == "tanh":
        output = torch.tanh(recon)
    elif objective.activation == "sigmoid" or (objective.likelihood == "bernoulli" and objective.from_logits):
        output = torch.sigmoid(recon)
    squares = (output.detach() - y).square().flatten(1).sum(1)
    return pixel_errors(recon, y, objective).flatten(1).sum(1), squares, mean, variance


def capacity_at(step: Tensor, max_capacity: float | Tensor, capacity_iters: int) -> Tensor:
    """C = clamp(max_capacity / capacity_iters * step, 0, max_capacity), nats: Burgess et al. (2018)."""
    if isinstance(max_capacity, Tensor):
        rising = step.to(max_capacity.dtype) * (max_capacity / capacity_iters)
        return torch.minimum(rising.clamp(min=0.0), max_capacity)
    return (step.float() * (max_capacity / capacity_iters)).clamp(0.0, max_capacity)


def _at_least_smallest(spread: Tensor) -> Tensor:
    """A variance or scale; the gradient passes, as with F.gaussian_nll_loss. A negative one gives NaN."""
    spread = torch.where(spread < 0, torch.nan, spread)
    return spread + (spread.clamp(min=_SMALLEST) - spread).detach()


def pixel_errors(x: Tensor, y: Tensor, objective: Objective) -> Tensor:
    """The error of each element, not yet divided by the variance or scale: see `bvae.ops.vae_loss`.

    Args:
        x: the decoder's output, before the activation.
        y: the target, in the decoder's range.
    """
    if objective.likelihood == "bernoulli":
        if objective.from_logits:
            return F.binary_cross_entropy_with_logits(x, y, reduction="none")
        wrong = ~((x >= 0) & (x <= 1))  # torch's function stops a GPU for these
        error = F.binary_cross_entropy(torch.where(wrong, 0.5, x), y, reduction="none")
        return torch.where(wrong, torch.nan, error)
    if objective.activation is not None:
        x = torch.tanh(x) if objective.activation == "tanh" else torch.sigmoid(x)
    if objective.likelihood == "gaussian":
        return F.mse_loss(x, y, reduction="none")
    if objective.likelihood == "laplace":
        return F.l1_loss(x, y, reduction="none")
    return _logistic_errors(x, y, objective)


def _logistic_errors(x: Tensor, y: Tensor, objective: Objective) -> Tensor:
    """-log of the probability that a logistic distribution around x gives to y's bin, one of 256.

    With the bin's ends at a and b scales from x, log(sigmoid(a) - sigmoid(b)) is log sigmoid(a) +
    log sigmoid(-b) + log(1 - exp(b - a)), which does not cancel. The first and last bin have no outer end.
    """
    low, high = objective.pixel_range
    half_bin = (high - low) / 510
    scale = objective.decoder_scale
    if isinstance(scale, Tensor):
        scale = _at_least_smallest(scale.to(x.dtype))
        log_width: Any = torch.log(-torch.expm1(-2 * half_bin / scale))
    else:
        log_width = math.log(-math.expm1(-2 * half_bin / scale))
    above = -F.logsigmoid((y + half_bin - x) / scale)
    below = -F.logsigmoid((x - y + half_bin) / scale)
    return torch.where(y <= low, above, torch.where(y >= high, below, above + below - log_width))


def _divided(errors: Tensor, count: float | Tensor, spread: float | Tensor, objective: Objective) -> Tensor:
    """The negative log-likelihood of `count` elements, whose `errors` add up, up to a constant.

    A tensor, which may be learned, adds the logarithm that keeps it from growing.
    """
    if objective.likelihood in ("bernoulli", "logistic"):
        return errors
    gaussian = objective.likelihood == "gaussian"
    if not isinstance(spread, Tensor):
        divisor = 2 * spread if gaussian else spread
        return errors if divisor == 1 else errors / divisor
    spread = _at_least_smallest(spread.to(errors.dtype))
    nll = count * torch.log(spread) + errors / spread
    return 0.5 * nll if gaussian else nll


def vae_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    objective: Objective,
    *,
    step: Tensor | None = None,
    kl_scale: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> LossTerms:
    """The beta-VAE's objectives; `bvae.ops.vae_loss` documents the arguments.

    The KL's weight is the objective's kl_weight, times kl_scale (one number in a tensor) if it is given.
    """
    dtype = compute_dtype(recon, target, kl)
    x = recon.to(dtype)
    if target.dtype == torch.uint8:
        y = scale_pixels(target, objective.pixel_range[0]).to(dtype)
    else:
        y = target.to(dtype)
        if objective.likelihood == "bernoulli":  # make a wrong target visible without a sync
            y = torch.where((y < 0) | (y > 1), torch.nan, y)
    if mask is not None:  # before the error, whose gradient would carry a NaN of an element left out
        x, y = torch.where(mask, x, 0.0), torch.where(mask, y, 0.0)
    errors = pixel_errors(x, y, objective)
    spread, elements = objective.spread, tuple(range(1, x.dim()))
    if isinstance(spread, Tensor) and spread.numel() > 1:
        errors = _divided(errors, 1.0, spread, objective)
    counts: int | Tensor = math.prod(x.shape[1:])
    if mask is not None:
        errors = torch.where(mask, errors, 0.0)
        counts = mask.expand(x.shape).sum(elements)
    return terms_of(errors.sum(elements), counts, kl, objective, step=step, kl_scale=kl_scale, weight=weight)


def terms_of(
    errors: Tensor,
    counts: int | Tensor,
    kl: Tensor,
    objective: Objective,
    *,
    step: Tensor | None = None,
    kl_scale: Tensor | None = None,
    weight: Tensor | None = None,
) -> LossTerms:
    """The objective of images whose `pixel_errors` add up to `errors` `[B]`, over `counts` elements each.

    without step: loss = recon + weight * kld             Higgins et al. (2017), equation 4
    with step:    loss = recon + weight * |kld - C|       Burgess et al. (2018), equation 8

    A variance or scale of more than one number has divided them already.
    """
    dtype = errors.dtype
    if weight is not None:
        weight = torch.where(weight < 0, torch.nan, weight).to(dtype)
    images = errors.shape[0] if weight is None else weight.sum()

    def total(per_image: Tensor) -> Tensor:
        return (per_image if weight is None else weight * per_image).sum()

    elements = total(counts.to(dtype)) if isinstance(counts, Tensor) else images * counts
    spread = objective.spread
    if isinstance(spread, str):  # "optimal"
        spread = (total(errors) / elements).clamp(min=_SMALLEST)
    if not isinstance(spread, Tensor) or spread.numel() == 1:
        spread = spread.reshape(()) if isinstance(spread, Tensor) else spread
        errors = _divided(errors, counts, spread, objective)
    kl_weight: float | Tensor = objective.kl_weight
    if kl_scale is not None:
        kl_weight = kl_weight * kl_scale.reshape(()).to(dtype)
    kl = kl.to(dtype)
    if objective.reduction == "none":
        recon_term, kld = (errors if weight is None else weight * errors), kl
    else:
        recon_term = total(errors) / (elements if objective.reduction == "mean" else images)
        kld = total(kl) / images
    capacity, excess = torch.zeros((), dtype=dtype, device=errors.device), kld
    if step is not None:
        limit = objective.max_capacity
        limit = limit.reshape(()).to(dtype) if isinstance(limit, Tensor) else limit
        capacity = capacity_at(step, limit, objective.capacity_iters).to(dtype)
        excess = (kld - capacity).abs()
    if objective.reduction == "none" and weight is not None:
        excess = weight * excess
    return LossTerms(recon_term + kl_weight * excess, recon_term, kld, capacity)


def log_importance_weights(batch: int, dataset_size: int, weights: Weights) -> tuple[float, float]:
    """log w_ii and log w_ij of `log_aggregate_posterior`.

    stratified: 1/N for an image's own posterior and (N - 1)/(N (B - 1)) for each other of the batch, because
    the others stand for the N - 1 images that are not this one. The mean density over all batches is then the
    exact one. Minibatch stratified sampling in the appendix of Chen et al. (2018) gives one of the others
    another weight; averaged over which one, it is this. weighted: 1/(N B) for all, as their first estimator.
    """
    if weights == "weighted":
        return (-math.log(dataset_size * batch),) * 2
    others = (dataset_size - 1) / (dataset_size * (batch - 1))
    return -math.log(dataset_size), math.log(others)


def log_aggregate_posterior(
    z: Tensor, mu: Tensor, log_var: Tensor, dataset_size: int, weights: Weights = "stratified"
) -> tuple[Tensor, Tensor]:
    """The log density of the aggregate posterior and of the product of its marginals, from a batch.

        log q(z_i)         = log sum_j w_ij prod_d N(z_id; mu_jd, sigma_jd)
        sum_d log q(z_id)  = sum_d log sum_j w_ij N(z_id; mu_jd, sigma_jd)

    q is the mixture of the posteriors of all N images of the data set, of which the batch is a random part.
    Their mean difference estimates the total correlation: Chen et al. (2018), "Isolating Sources of
    Disentanglement in Variational Autoencoders". The `[B, B, D]` densities are stored; the kernel does not.

    Args:
        z: `[B, D]`, a sample of each posterior.
        mu, log_var: the posteriors, `[B, D]`.
        dataset_size: N, at least B. weights: see `log_importance_weights`.

    Returns:
        two tensors `[B]`, nats.
    """
    dtype = compute_dtype(z, mu, log_var)
    z, mu, log_var = z.to(dtype), mu.to(dtype), log_var.to(dtype)
    own, other = log_importance_weights(len(z), dataset_size, weights)
    log_weight = torch.where(torch.eye(len(z), dtype=torch.bool, device=z.device), own, other).to(dtype)
    distance = (z[:, None] - mu).square() * torch.exp(-log_var)
    log_density = -0.5 * (distance + log_var + math.log(2 * math.pi))  # [B, B, D]
    joint = torch.logsumexp(log_weight + log_density.sum(2), 1)
    marginals = torch.logsumexp(log_weight[..., None] + log_density, 1)
    return joint, marginals.sum(1)


def covariance_penalty(mu: Tensor, log_var: Tensor | None, off_diagonal: float, diagonal: float) -> Tensor:
    """DIP-VAE's penalty, 0-d: off_diagonal sum_{i != j} C_ij^2 + diagonal sum_i (C_ii - 1)^2.

    Kumar et al. (2018), equations 6 and 7. C is the covariance of mu over the batch, divided by B; with
    log_var (DIP-VAE-II) the mean posterior variance is added to its diagonal, which makes it the covariance
    of z.
    """
    dtype = compute_dtype(mu)
    centred = mu.to(dtype) - mu.to(dtype).mean(0)
    covariance = centred.T @ centred / len(mu)
    variances = covariance.diagonal()
    others = covariance - torch.diag(variances)
    if log_var is not None:
        variances = variances + log_var.to(dtype).exp().mean(0)
    return off_diagonal * others.square().sum() + diagonal * (variances - 1).square().sum()
