"""The public operations: check the arguments, draw the noise, run the kernel or the reference."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from bvae import arguments, reference
from bvae.kernels import launch, noise
from bvae.kernels.cpu import image_errors as closed_errors
from bvae.kernels.cpu import reparam_kl as closed_sample
from bvae.network_ops import batch_norm_leaky_relu as batch_norm_leaky_relu
from bvae.network_ops import last_block as last_block
from bvae.objective import Activation, Likelihood, LossTerms, Objective, Reduction, Variance, Weights

if launch.AVAILABLE:
    import bvae.kernels.capacity_loss
    import bvae.kernels.image_errors
    import bvae.kernels.reparam_kl
    import bvae.kernels.total_correlation

Prior = tuple[Tensor, Tensor] | Distribution | None


def reparam_kl(
    mu: Tensor | Distribution,
    log_var: Tensor | float | None = None,
    *,
    std: Tensor | None = None,
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    first_sample: int = 0,
    generator: torch.Generator | None = None,
    samples: int | None = None,
    clamp: tuple[float, float] | None = None,
    prior: Prior = None,
    free_bits: float = 0.0,
    reduction: str = "sum",
    per_dim: bool = False,
) -> tuple[Tensor, ...]:
    """Draw z ~ N(mu, exp(log_var)) and measure KL(N(mu, exp(log_var)) || prior), by default to N(0, I).

        z = mu + exp(log_var / 2) * eps,    KL = 0.5 * (mu^2 + exp(log_var) - 1 - log_var)

    With a seed the noise eps is a function of (seed, step, sample, element): `bvae.kernels.noise`. The kernel
    does not store it; its backward pass draws it again. With seed and step as tensors, it takes one launch
    forward and one backward. A seed of None costs one more launch, to draw it; each Python int costs one, to
    copy it. Where no kernel runs, on a CPU for example, a seed of None draws eps with `torch.randn`.

    Args:
        mu: `[B, ...]` with one to four more dimensions, any strides; float32, bfloat16, float16, or float64,
            which runs the reference. Or a `torch.distributions.Normal`, which has mu and std.
        log_var: what broadcasts to mu's shape: `[B, ...]`, `[D]`, or one number.
        std: the standard deviation instead of log_var, for example `F.softplus(x)`.
        seed: 0-d int64 tensor on mu's device, or an int up to 2**64 - 1, which a captured graph freezes. None
            draws from torch's generator, so that `torch.manual_seed` reproduces and each call differs.
        step: 0-d int64 tensor on mu's device, or an int: each step of a seed has its own noise. None is 0.
        first_sample: the first sample's number, if the batch is a part of a larger one: the parts then draw
            the same noise as the whole.
        generator: draws the noise instead of torch's default generator, if there is no seed.
        samples: K draws of each: z is `[K, B, ...]`. The first is the z of None with the same seed.
        clamp: (low, high) bounds of log_var; its gradient is zero at and outside them. diffusers: (-30, 20).
        prior: (mu, log_var) or a Normal, given or learned, broadcasting to mu's shape. None is N(0, I).
        free_bits: nats per dimension. A dimension whose mean KL in the batch is less enters kl with this
            number, a constant: Kingma et al. (2016), equation 15.
        reduction: "none" leaves the KL per element.
        per_dim: also return the batch's mean KL of each dimension, without the free bits.

    `samples`, `prior`, `free_bits` and a `reduction` of "none" run the reference.

    Returns:
        z of mu's shape and dtype; kl `[B]` float32, nats per sample, summed over all other dimensions (with
        `reduction="none"` of mu's shape); with `per_dim`, the mean KL per dimension, float32 of shape
        mu.shape[1:], nats. float64 gives float64.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected.

    >>> import torch
    >>> from bvae import reparam_kl
    >>> mu, log_var = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.zeros(2, 2)
    >>> z, kl = reparam_kl(mu, log_var, seed=0)
    >>> z.shape, kl
    (torch.Size([2, 2]), tensor([0.0000, 2.5000]))
    >>> torch.equal(z, reparam_kl(mu, log_var, seed=0)[0])
    True
    >>> reparam_kl(torch.distributions.Normal(mu, 1.0), samples=5)[0].shape
    torch.Size([5, 2, 2])
    """
    mu, log_var = arguments.posterior(mu, log_var, std)
    prior = arguments.prior_of(prior, mu)
    arguments.check_clamp(clamp)
    arguments.check_kl_options(reduction, free_bits)
    arguments.check_sampling(mu, seed, first_sample, generator, samples)
    step = None if step is None else arguments.counter("step", step, mu.device)
    if seed is not None:
        seed = arguments.counter("seed", seed, mu.device)
    plain = samples is None and prior is None and free_bits == 0 and reduction == "sum"
    if plain and launch.runs_triton(mu, log_var):
        if seed is None:
            seed = torch.randint(2**63 - 1, (), generator=generator, dtype=torch.int64, device=mu.device)
        bounds = None if clamp is None else list(clamp)
        z, kl, kl_per_dim, _ = bvae.kernels.reparam_kl.reparam_kl(
            mu, log_var, seed, step, bounds, per_dim, first_sample
        )
        return (z, kl, kl_per_dim) if per_dim else (z, kl)
    if seed is None:
        # without a generator the call has no such argument, which torch.export cannot take
        source: dict[str, Any] = {} if generator is None else {"generator": generator}
        shape = mu.shape if samples is None else (samples, *mu.shape)
        eps = torch.randn(shape, dtype=reference.compute_dtype(mu, log_var), device=mu.device, **source)
    else:
        eps = _noise_of_seed(mu.shape, seed, step, first_sample, samples)
    if plain and clamp is None and not per_dim and launch.runs_closed_form(mu, log_var):
        return closed_sample.reparam_kl(mu, log_var, eps)
    z, kl, kl_per_dim = reference.reparam_kl(
        mu, log_var, eps, clamp=clamp, prior=prior, free_bits=free_bits, reduction=reduction, per_dim=per_dim
    )
    return (z, kl, kl_per_dim) if per_dim else (z, kl)


def _noise_of_seed(
    shape: torch.Size, seed: Tensor, step: Tensor | None, first_sample: int, samples: int | None
) -> Tensor:
    """Noise of `shape`, or `[samples, *shape]`: later draws continue with the elements after the first's."""
    if samples is None:
        return noise.normal(shape, seed, step, first_sample)
    eps = noise.normal((shape[0], samples * math.prod(shape[1:])), seed, step, first_sample)
    return eps.view(shape[0], samples, *shape[1:]).transpose(0, 1)


def gaussian_kl(
    mu: Tensor | Distribution,
    log_var: Tensor | float | None = None,
    *,
    std: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    prior: Prior = None,
    free_bits: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """The KL of `reparam_kl` without the sample, float32, nats: `[B]`, or mu's shape for `reduction="none"`.

    >>> import torch
    >>> from bvae import gaussian_kl
    >>> gaussian_kl(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    tensor([2.5000])
    >>> gaussian_kl(torch.tensor([[1.0, 2.0]]), 0.0, prior=(torch.ones(2), torch.zeros(2)), reduction="none")
    tensor([[0.0000, 0.5000]])
    """
    mu, log_var = arguments.posterior(mu, log_var, std)
    prior = arguments.prior_of(prior, mu)
    arguments.check_clamp(clamp)
    arguments.check_kl_options(reduction, free_bits)
    plain = prior is None and free_bits == 0 and reduction == "sum"
    if plain and launch.runs_triton(mu, log_var):
        bounds = None if clamp is None else list(clamp)
        return bvae.kernels.reparam_kl.reparam_kl(mu, log_var, None, None, bounds, False)[1]
    options: dict[str, Any] = {"clamp": clamp, "prior": prior, "free_bits": free_bits, "reduction": reduction}
    return reference.reparam_kl(mu, log_var, None, per_dim=False, **options)[1]


def total_correlation(
    z: Tensor, mu: Tensor, log_var: Tensor, dataset_size: int, *, weights: Weights = "stratified"
) -> Tensor:
    """The total correlation of the latents under the aggregate posterior q(z), estimated from a batch.

        TC = E[log q(z) - sum_d log q(z_d)]        KL = MI + TC + sum_d KL(q(z_d), p(z_d))

    Chen et al. (2018), equation 2. beta-TCVAE is recon + KL + (beta - 1) TC. It is the mean of
    `log_aggregate_posterior`'s difference, whose arguments it has.

    Returns:
        0-d float32 (float64 gives float64), nats.

    Raises:
        TypeError, ValueError: as `log_aggregate_posterior`.

    >>> import torch
    >>> from bvae import total_correlation
    >>> mu = torch.tensor([[-3.0, -3.0], [3.0, 3.0], [0.0, 0.0]])  # the two latents agree
    >>> log_var = torch.full((3, 2), -4.0)
    >>> total_correlation(mu, mu, log_var, dataset_size=3)  # log 3: three images, one position each
    tensor(1.0986)
    """
    joint, product = log_aggregate_posterior(z, mu, log_var, dataset_size, weights=weights)
    return (joint - product).mean()


def log_aggregate_posterior(
    z: Tensor, mu: Tensor, log_var: Tensor, dataset_size: int, *, weights: Weights = "stratified"
) -> tuple[Tensor, Tensor]:
    """log q(z_i) and sum_d log q(z_id) at the samples of a batch; q is the mixture of all images' posteriors.

    With log q(z_i | x_i) and log p(z_i) the parts of the KL in Chen et al. (2018) follow, index-code mutual
    information, total correlation and dimension-wise KL: their sum is log q(z_i | x_i) - log p(z_i).

    Args:
        z: a sample of each posterior, `[B, ...]` with one to four more dimensions, all of which are latents;
            any strides; float32, bfloat16, float16, or float64, which runs the reference.
        mu, log_var: the posteriors, as in `reparam_kl`. At least 3, drawn at random from the data set.
        dataset_size: N, the number of images that the batch is drawn from.
        weights: of the batch's posteriors in the mixture. "stratified": 1/N for z's own, and
            (N - 1)/(N (B - 1)) for each other, so that the mean density over all batches is the exact one.
            "weighted": 1/(N B) for all, the first estimator of Chen et al. (2018), whose total correlation is
            too high by about (D - 1) log N; its gradient is that of the plain batch mean.

    The densities of B x B pairs in D dimensions take part, and the kernel keeps none of them: it reads the
    inputs, stores `[B, D]`, and computes the densities again in its backward pass, one launch forward and two
    backward. More than 512 latents run the reference, which stores `[B, B, D]`.

    Returns:
        two tensors `[B]` float32 (float64 gives float64), nats.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected; fewer than 3 images, or a
            dataset_size below B.
    """
    z, mu, log_var = arguments.latents(z, mu, log_var, dataset_size, weights)
    if launch.runs_triton(z, mu, log_var) and z.shape[1] <= bvae.kernels.total_correlation.MOST_LATENTS:
        log_weights = reference.log_importance_weights(z.shape[0], dataset_size, weights)
        op = bvae.kernels.total_correlation.log_aggregate_posterior
        return op(z, mu, log_var, *log_weights)[:2]
    return reference.log_aggregate_posterior(z, mu, log_var, dataset_size, weights)


def vae_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    kl_weight: float | Tensor = 1.0,
    step: Tensor | int | None = None,
    max_capacity: float | Tensor = 25.0,
    capacity_iters: int = 10_000,
    likelihood: Likelihood = "gaussian",
    activation: Activation = None,
    from_logits: bool = True,
    reduction: Reduction = "mean",
    decoder_variance: Variance = 0.5,
    decoder_scale: float | Tensor = 1.0,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> LossTerms:
    """The beta-VAE's objective or, with `step`, the capacity objective.

        loss = recon + kl_weight * kld             Higgins et al. (2017), equation 4
        loss = recon + kl_weight * |kld - C|       Burgess et al. (2018), equation 8

    with kld the mean of kl over the batch, C = clamp(max_capacity / capacity_iters * step, 0, max_capacity).
    The reconstruction term, up to a constant the negative log-likelihood of an image in nats, is the sum over
    its elements, with x = activation(recon), y the target, v = decoder_variance and s = decoder_scale, of

        gaussian     (x - y)^2 / (2 v)
        laplace      |x - y| / s
        logistic     -log(sigmoid((y - x + h) / s) - sigmoid((y - x - h) / s)), h half of a step of uint8
        bernoulli    the binary cross-entropy of y with the logits recon

    averaged over the batch (`reduction="sum"`) and, for `"mean"`, over the elements of an image too: with the
    default variance of 1/2 that is the mean squared error, and for laplace the mean absolute error.

    Args:
        recon: `[B, ...]` with one to four more dimensions, any strides, floating point. The decoder's output:
            raw with `activation`, else already activated; logits for `bernoulli`.
        target: floating point in the decoder's range, or uint8, which is scaled to it: [0, 1] for
            `bernoulli` or `activation="sigmoid"`, else [-1, 1] (`bvae.objective.Objective.pixel_range`).
            recon's shape with any strides, or `[B, H, W, C]` for recon `[B, C, H, W]`; a shape that fits both
            ways is read as `[B, C, H, W]`. It gets a gradient if it requires one.
        kl: `[B]` floating point, nats per image.
        kl_weight: the factor of the KL term: beta or gamma, times M/N where the reconstruction is a mean. A
            number, or one in a floating-point tensor on recon's device, learned or not. `torch.compile`
            compiles again for each new number, up to its limit, and a captured graph keeps the number that it
            was captured with. If the weight changes from step to step, pass a tensor and write into it, or
            anneal the attributes of `bvae.losses`' modules, which do that.
        step: 0-d int64 tensor on recon's device, or an int, which a captured graph freezes: the training
            step, 1 on the first. None is the objective without a capacity.
        max_capacity, capacity_iters: C's last value in nats, a number or one in a tensor, and the step that
            reaches it.
        from_logits: False takes bernoulli's recon as probabilities. Logarithms are bounded by -100, as in
            `F.binary_cross_entropy`.
        reduction: "mean", "sum", or "none": loss, recon (as for "sum") and kld are then `[B]`, one per image,
            and the capacity term is the |kl - C| of each image.
        decoder_variance: of the gaussian: a number; a tensor that broadcasts to recon's shape, such as one
            parameter or a decoder's variance of each pixel, which adds 0.5 log v to each element; or
            "optimal", the batch's mean squared error, which is the best v: Rybkin et al. (2021).
        decoder_scale: of laplace and logistic: a number, or a tensor that broadcasts to recon's shape. A
            tensor adds log s to each element of laplace. The nats of logistic are complete in any case.
        weight: `[B]` floating point, at least 0: the averages are averages with these weights, and a
            `reduction` of "none" multiplies loss and recon by them.
        mask: bool, recon's shape or 1 in some dimensions: False leaves elements out of the reconstruction,
            whatever they hold, and out of the number that "mean" divides by.

    The kernel reads recon and target once. If recon needs a gradient, the kernel also writes it up to a
    factor, which the backward pass applies. With bfloat16 and uint8 that is 5 bytes per element forward and 4
    backward, in one launch each; a tensor like recon is kept in between. A `weight`, a `reduction` of "none",
    a learned number or an optimal variance add launches on `[B]`. A mask, a variance or scale of several
    numbers, a learned scale of logistic and a gradient of the target run the reference.

    Returns:
        `LossTerms`, 0-d float32 tensors; loss, recon and kld are differentiable.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected. A float target or
        probability outside [0, 1] for `bernoulli`, a negative weight, variance or scale raise on a CPU in
        eager mode, and logits that all lie in [0, 1] give a warning; elsewhere the check would make the host
        wait, and the loss is NaN instead, without a warning.

    >>> import torch
    >>> from bvae import vae_loss
    >>> recon, images = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    >>> terms = vae_loss(recon, images, torch.tensor([2.0]), kl_weight=0.5)
    >>> terms.loss, terms.recon, terms.kld
    (tensor(2.), tensor(1.), tensor(2.))
    >>> vae_loss(recon, images, torch.tensor([2.0]), reduction="none").loss  # 192 elements, and the KL
    tensor([194.])
    """
    kl_scale = kl_weight if isinstance(kl_weight, Tensor) else None
    objective = Objective(
        kl_weight=1.0 if isinstance(kl_weight, Tensor) else kl_weight,
        max_capacity=max_capacity,
        capacity_iters=capacity_iters,
        likelihood=likelihood,
        activation=activation,
        reduction=reduction,
        decoder_variance=decoder_variance,
        decoder_scale=decoder_scale,
        from_logits=from_logits,
    )
    return loss_of(objective, recon, target, kl, step=step, kl_scale=kl_scale, weight=weight, mask=mask)


def loss_of(
    objective: Objective,
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    step: Tensor | int | None = None,
    kl_scale: Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> LossTerms:
    """`vae_loss` of an `Objective`.

    The KL's weight has two factors. objective.kl_weight, a Python number, is compiled in and costs no launch.
    `kl_scale`, one number on recon's device, is the one device scalar: the kernel loads it, so it may change
    between calls of a compiled function and replays of a captured graph. A loss module needs both: M/N comes
    from the shapes of each call. Writing it into the scalar would take a launch, and a captured graph would
    repeat that launch and overwrite a beta or gamma that was assigned later.
    """
    target = arguments.target_of(recon, target, kl, objective)
    arguments.check_tensor_options(objective, recon)
    arguments.check_weight_and_mask(weight, mask, recon)
    if kl_scale is not None:
        arguments.check_kl_scale(kl_scale, recon.device)
    step = None if step is None else arguments.counter("step", step, recon.device)
    rest = {"step": step, "kl_scale": kl_scale, "weight": weight}
    wants_gradient = torch.is_grad_enabled() and target.requires_grad
    plain = mask is None and not wants_gradient
    by_kernel = launch.runs_triton(recon, target, kl) and objective.has_kernel(recon.dtype)
    if not plain or not by_kernel:
        if not plain or not _has_closed_form(objective, recon, target, kl):
            return reference.vae_loss(recon, target, kl, objective, mask=mask, **rest)
        errors = closed_errors.image_errors(
            recon, target, objective.likelihood, objective.activation, objective.pixel_range[0]
        )
        return reference.terms_of(errors, math.prod(recon.shape[1:]), kl, objective, **rest)
    with_grad = recon.requires_grad and torch.is_grad_enabled()
    likelihood = objective.likelihood if objective.from_logits else "probabilities"
    pixel_low = objective.pixel_range[0]
    learned = kl_scale is not None and kl_scale.requires_grad and torch.is_grad_enabled()
    numbers = not isinstance(objective.spread, (str, Tensor)) and not isinstance(
        objective.max_capacity, Tensor
    )
    if objective.reduction == "none" or weight is not None or learned or not numbers:
        scale = objective.spread if likelihood == "logistic" else 1.0
        errors, _ = bvae.kernels.image_errors.image_errors(
            recon, target, with_grad, likelihood, objective.activation, scale, pixel_low
        )
        return reference.terms_of(errors, math.prod(recon.shape[1:]), kl, objective, **rest)
    if kl_scale is not None:
        kl_scale = kl_scale.detach().reshape(()).float()
    *terms, _, _ = bvae.kernels.capacity_loss.vae_loss(
        recon,
        target,
        kl,
        step,
        kl_scale,
        with_grad,
        # the fields of `capacity_loss.Options`
        objective.kl_weight,
        objective.max_capacity,
        int(objective.capacity_iters),  # PyTorch-VAE's is 1e5
        likelihood,
        objective.activation,
        objective.reduction,
        objective.spread,
        pixel_low,
    )
    return LossTerms(*terms)


def _has_closed_form(objective: Objective, recon: Tensor, target: Tensor, kl: Tensor) -> bool:
    """Whether `kernels/cpu` computes the reconstruction term of `objective` for these tensors."""
    if not launch.runs_closed_form(recon, target, kl):
        return False
    if objective.likelihood == "gaussian":
        return not isinstance(objective.spread, Tensor) or objective.spread.numel() == 1
    return objective.likelihood == "bernoulli" and objective.from_logits
