"""The public operations: check the arguments, draw the seed, run the kernel or the reference."""

import torch
from torch import Tensor

from bvae import reference
from bvae.kernels import launch, noise
from bvae.reference import Activation, Likelihood, LossTerms, Objective, Reduction

if launch.AVAILABLE:
    import bvae.kernels.capacity_loss
    import bvae.kernels.reparam_kl

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_DIMS = 5  # the batch and up to four more


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def _check_float(name: str, tensor: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_describe(tensor)}")


def _check_pair(mu: Tensor, log_var: Tensor) -> None:
    _check_float("mu", mu)
    _check_float("log_var", log_var)
    if not 2 <= mu.dim() <= _MAX_DIMS:
        raise ValueError(f"mu must be [B, ...] with one to four more dimensions, got {_describe(mu)}")
    if mu.shape != log_var.shape:
        raise ValueError(f"log_var must have mu's shape {list(mu.shape)}, got {_describe(log_var)}")
    if mu.device != log_var.device:
        raise ValueError(f"log_var must be on mu's device {mu.device}, got {_describe(log_var)}")


def _check_clamp(clamp: tuple[float, float] | None) -> None:
    if clamp is None:
        return
    pair = isinstance(clamp, (tuple, list)) and len(clamp) == 2
    if not (pair and all(isinstance(bound, (int, float)) for bound in clamp)):
        raise TypeError(f"clamp must be two numbers (low, high) or None, got {clamp!r}")
    if not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be (low, high) with low < high, got {clamp}")


def _counter(name: str, value: Tensor | int, device: torch.device) -> Tensor:
    """A seed or step as the 0-d int64 tensor that the kernels read."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor or a Python int, got {_describe(value)}")
        if value.dim() != 0 or value.device != device:
            raise ValueError(f"{name} must be a 0-d tensor on {device}, got {_describe(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an int64 tensor or a Python int, got {type(value).__name__} {value!r}"
        )
    if name == "seed" and 2**63 <= value < 2**64:  # as torch.initial_seed() may be: use the same 64 bits
        value -= 2**64
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


def reparam_kl(
    mu: Tensor,
    log_var: Tensor,
    *,
    seed: Tensor | int | None = None,
    step: Tensor | int | None = None,
    first_sample: int = 0,
    clamp: tuple[float, float] | None = None,
    per_dim: bool = False,
) -> tuple[Tensor, ...]:
    """Draw z ~ N(mu, exp(log_var)) and measure KL(N(mu, exp(log_var)) || N(0, I)).

        z = mu + exp(log_var / 2) * eps,    KL = 0.5 * (mu^2 + exp(log_var) - 1 - log_var)

    The noise eps is a function of (seed, step, sample, element): `bvae.kernels.noise`. The kernel does not
    store it; its backward pass draws it again. With seed and step as tensors, it takes one launch forward and
    one backward. A seed of None costs one more launch, to draw it; each Python int costs one, to copy it.

    Args:
        mu, log_var: `[B, ...]` with one to four more dimensions, one shape and device, any strides; float32,
            bfloat16, float16, or float64, which runs the reference.
        seed: 0-d int64 tensor on mu's device, or an int up to 2**64 - 1, which a captured graph freezes. None
            draws one from torch's generator, so that `torch.manual_seed` reproduces and each call differs.
        step: 0-d int64 tensor on mu's device, or an int: each step of a seed has its own noise. None is 0.
        first_sample: the first sample's number, if the batch is a part of a larger one: the parts then draw
            the same noise as the whole.
        clamp: (low, high) bounds of log_var; its gradient is zero at and outside them. diffusers: (-30, 20).
        per_dim: also return the batch's mean KL of each dimension.

    Returns:
        z of mu's shape and dtype; kl `[B]` float32, nats per sample, summed over all other dimensions; with
        `per_dim`, the mean KL per dimension, float32 of shape mu.shape[1:], nats. float64 gives float64.

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
    """
    _check_pair(mu, log_var)
    _check_clamp(clamp)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=mu.device)
    seed = _counter("seed", seed, mu.device)
    step = None if step is None else _counter("step", step, mu.device)
    if not 0 <= first_sample <= 2**32 - len(mu):
        raise ValueError(
            f"first_sample must be 0 or more and number {len(mu)} samples in 32 bits, got {first_sample}"
        )
    if launch.runs_triton(mu, log_var):
        bounds = None if clamp is None else list(clamp)
        z, kl, kl_per_dim, _ = bvae.kernels.reparam_kl.reparam_kl(
            mu, log_var, seed, step, bounds, per_dim, first_sample
        )
    else:
        eps = noise.normal(mu.shape, seed, step, first_sample)
        z, kl, kl_per_dim = reference.reparam_kl(mu, log_var, eps, clamp=clamp)
    return (z, kl, kl_per_dim) if per_dim else (z, kl)


def gaussian_kl(mu: Tensor, log_var: Tensor, *, clamp: tuple[float, float] | None = None) -> Tensor:
    """The KL of `reparam_kl` without the sample: `[B]` float32, nats.

    >>> import torch
    >>> from bvae import gaussian_kl
    >>> gaussian_kl(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    tensor([2.5000])
    """
    _check_pair(mu, log_var)
    _check_clamp(clamp)
    if launch.runs_triton(mu, log_var):
        bounds = None if clamp is None else list(clamp)
        return bvae.kernels.reparam_kl.reparam_kl(mu, log_var, None, None, bounds, False)[1]
    return reference.reparam_kl(mu, log_var, torch.zeros_like(mu), clamp=clamp)[1]


def _as_recon(target: Tensor, recon: Tensor) -> Tensor:
    """`target` as a view of recon's shape: unchanged, or from channels last if only that fits."""
    if target.shape == recon.shape:
        return target
    if target.dim() == 4 and target.permute(0, 3, 1, 2).shape == recon.shape:
        return target.permute(0, 3, 1, 2)
    expected = f"recon's shape {list(recon.shape)}"
    if recon.dim() == 4:
        expected += f" or, channels last, {list(recon.permute(0, 2, 3, 1).shape)}"
    raise ValueError(f"target must have {expected}, got {_describe(target)}")


def _check_kl_scale(scale: Tensor, device: torch.device) -> None:
    """Raise if a tensor that weighs the KL is not 0-d float32 on `device`."""
    if scale.dtype != torch.float32:
        raise TypeError(f"kl_weight must be a number or a 0-d float32 tensor, got {_describe(scale)}")
    if scale.dim() != 0 or scale.device != device:
        raise ValueError(f"kl_weight must be a number or 0-d on {device}, got {_describe(scale)}")
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("kl_weight gets no gradient: pass kl_weight.detach()")


def _check_loss(recon: Tensor, target: Tensor, kl: Tensor, objective: Objective) -> Tensor:
    """Check the tensors of a loss, and return the target as a view of recon's shape."""
    _check_float("recon", recon)
    _check_float("kl", kl)
    if not 2 <= recon.dim() <= _MAX_DIMS:
        raise ValueError(f"recon must be [B, ...] with one to four more dimensions, got {_describe(recon)}")
    _check_tensor("target", target)
    if target.dtype != torch.uint8 and target.dtype not in _FLOATS:
        raise TypeError(f"target must be uint8 or floating point, got {_describe(target)}")
    target = _as_recon(target, recon)
    if target.device != recon.device:
        raise ValueError(f"target must be on recon's device {recon.device}, got {_describe(target)}")
    if kl.shape != recon.shape[:1] or kl.device != recon.device:
        raise ValueError(
            f"kl must be [{recon.shape[0]}] on {recon.device}, one number per image, got {_describe(kl)}"
        )
    if objective.likelihood == "bernoulli":
        _check_probabilities(target)
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"target gets no gradient: pass target.detach(), got {_describe(target)}")
    return target


def _check_probabilities(target: Tensor) -> None:
    """Raise for a Bernoulli target outside [0, 1]; only in eager mode on a CPU, where no sync is needed."""
    if torch.compiler.is_compiling() or target.device.type != "cpu" or not target.is_floating_point():
        return
    if target.numel() == 0:
        return
    low, high = (bound.item() for bound in torch.aminmax(target))
    if low < 0 or high > 1:
        raise ValueError(
            f"target of a bernoulli likelihood must lie in [0, 1], got {_describe(target)} with values from "
            f"{low:.6g} to {high:.6g}"
        )


def vae_loss(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    kl_weight: float | Tensor = 1.0,
    step: Tensor | int | None = None,
    max_capacity: float = 25.0,
    capacity_iters: int = 10_000,
    likelihood: Likelihood = "gaussian",
    activation: Activation = None,
    reduction: Reduction = "mean",
    decoder_variance: float = 0.5,
) -> LossTerms:
    """The beta-VAE's objective or, with `step`, the capacity objective.

        loss = recon + kl_weight * kld             Higgins et al. (2017), equation 4
        loss = recon + kl_weight * |kld - C|       Burgess et al. (2018), equation 8

    with kld the mean of kl over the batch, C = clamp(max_capacity / capacity_iters * step, 0, max_capacity).
    The reconstruction term, up to a constant the negative log-likelihood of an image in nats, is

        gaussian     sum of (activation(recon) - target)^2 / (2 * decoder_variance)
        bernoulli    sum of the binary cross-entropy of target with the logits recon

    averaged over the batch (`reduction="sum"`) and, for `"mean"`, over the elements of an image too: with the
    default variance of 1/2 that is the mean squared error.

    Args:
        recon: `[B, ...]` with one to four more dimensions, any strides, floating point. The decoder's output:
            raw with `activation`, else already activated; logits for `bernoulli`.
        target: floating point in the decoder's range, or uint8, which is scaled to it: [0, 1] for
            `bernoulli` or `activation="sigmoid"`, else [-1, 1] (`bvae.reference.Objective.pixel_range`).
            recon's shape with any strides, or `[B, H, W, C]` for recon `[B, C, H, W]`; a shape that fits both
            ways is read as `[B, C, H, W]`.
        kl: `[B]` floating point, nats per image.
        kl_weight: the factor of the KL term: beta or gamma, times M/N where the reconstruction is a mean. A
            number, or a 0-d float32 tensor on recon's device, which the kernel loads. `torch.compile`
            compiles again for each new number, up to its limit, and a captured graph keeps the number that it
            was captured with. If the weight changes from step to step, pass a tensor and write into it, or
            anneal the attributes of `bvae.losses`' modules, which do that.
        step: 0-d int64 tensor on recon's device, or an int, which a captured graph freezes: the training
            step, 1 on the first. None is the objective without a capacity.
        max_capacity, capacity_iters: C's last value in nats, and the step that reaches it.

    The kernel reads recon and target once. If recon needs a gradient, the kernel also writes it up to a
    factor, which the backward pass applies. With bfloat16 and uint8 that is 5 bytes per element forward and 4
    backward, in one launch each; a tensor like recon is kept in between.

    Returns:
        `LossTerms`, 0-d float32 tensors; loss, recon and kld are differentiable with respect to recon and kl.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected. A target that requires a
        gradient raises, because it gets none. A float target outside [0, 1] for `bernoulli` raises on a CPU
        in eager mode; elsewhere the check would make the host wait, and the loss is NaN instead.

    >>> import torch
    >>> from bvae import vae_loss
    >>> recon, images = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    >>> terms = vae_loss(recon, images, torch.tensor([2.0]), kl_weight=0.5)
    >>> terms.loss, terms.recon, terms.kld
    (tensor(2.), tensor(1.), tensor(2.))
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
    )
    return loss_of(objective, recon, target, kl, step=step, kl_scale=kl_scale)


def loss_of(
    objective: Objective,
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    step: Tensor | int | None = None,
    kl_scale: Tensor | None = None,
) -> LossTerms:
    """`vae_loss` of an `Objective`.

    The KL's weight has two factors. objective.kl_weight, a Python number, is compiled in and costs no launch.
    `kl_scale`, 0-d float32 on recon's device, is the one device scalar: the kernel loads it, so it may change
    between calls of a compiled function and replays of a captured graph. A loss module needs both: M/N comes
    from the shapes of each call. Writing it into the scalar would take a launch, and a captured graph would
    repeat that launch and overwrite a beta or gamma that was assigned later.
    """
    target = _check_loss(recon, target, kl, objective)
    if kl_scale is not None:
        _check_kl_scale(kl_scale, recon.device)
    step = None if step is None else _counter("step", step, recon.device)
    if not launch.runs_triton(recon, target, kl):
        return reference.vae_loss(recon, target, kl, objective, step=step, kl_scale=kl_scale)
    *terms, _, _ = bvae.kernels.capacity_loss.vae_loss(
        recon,
        target,
        kl,
        step,
        kl_scale,
        recon.requires_grad and torch.is_grad_enabled(),
        # the fields of `capacity_loss.Options`
        objective.kl_weight,
        objective.max_capacity,
        int(objective.capacity_iters),  # PyTorch-VAE's is 1e5
        objective.likelihood,
        objective.activation,
        objective.reduction,
        objective.decoder_variance,
        objective.pixel_range[0],
    )
    return LossTerms(*terms)
