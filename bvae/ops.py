"""The public operations: check the arguments, draw the seed, run the kernel or the reference."""

import math
from typing import Any

import torch
from torch import Tensor

from bvae import reference
from bvae.kernels import launch, noise
from bvae.reference import Activation, Likelihood, LossTerms, Reduction

if launch.AVAILABLE:
    from bvae.kernels import capacity_loss as loss_kernel
    from bvae.kernels import reparam_kl as latent_kernel

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
    if name == "seed" and 2**63 <= value < 2**64:  # torch.initial_seed() may be: its 64 bits are the seed
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
    store it; its backward pass draws it again. One launch forward and one backward, with seed and step as
    tensors: a seed of None costs one more to draw it, and each Python int one to fill it in.

    Args:
        mu, log_var: `[B, ...]` with one to four more dimensions, one shape and device, any strides; float32,
            bfloat16, float16, or float64, which runs the reference.
        seed: 0-d int64 tensor on mu's device, or an int up to 2**64 - 1, which a captured graph freezes. None
            draws one from torch's generator, so that `torch.manual_seed` reproduces and each call differs.
        step: 0-d int64 tensor on mu's device, or an int: another step of one seed is other noise. None is 0.
        first_sample: the first sample's number, where the batch is a part of a larger one: together the parts
            draw what the whole would.
        clamp: (low, high) bounds of log_var, at and outside which its gradient is zero; diffusers: (-30, 20).
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
        z, kl, kl_per_dim, _ = latent_kernel.forward(mu, log_var, seed, step, bounds, per_dim, first_sample)
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
        return latent_kernel.forward(mu, log_var, None, None, bounds, False)[1]
    return reference.reparam_kl(mu, log_var, torch.zeros_like(mu), clamp=clamp)[1]


def _as_recon(target: Tensor, recon: Tensor) -> Tensor:
    """`target` as a view of recon's shape: as it is, or from channels last if only that fits."""
    if target.shape == recon.shape:
        return target
    if target.dim() == 4 and target.permute(0, 3, 1, 2).shape == recon.shape:
        return target.permute(0, 3, 1, 2)
    expected = f"recon's shape {list(recon.shape)}"
    if recon.dim() == 4:
        expected += f" or, channels last, {list(recon.permute(0, 2, 3, 1).shape)}"
    raise ValueError(f"target must have {expected}, got {_describe(target)}")


def check_objective(
    likelihood: Likelihood, activation: Activation, reduction: Reduction, decoder_variance: float
) -> None:
    """Raise ValueError for a combination of options that no objective has."""
    if likelihood not in ("gaussian", "bernoulli"):
        raise ValueError(f"likelihood must be 'gaussian' or 'bernoulli', got {likelihood!r}")
    if activation not in (None, "tanh", "sigmoid"):
        raise ValueError(f"activation must be None, 'tanh' or 'sigmoid', got {activation!r}")
    if likelihood == "bernoulli" and activation is not None:
        raise ValueError(f"a bernoulli likelihood takes logits: activation must be None, got {activation!r}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    if not 0 < decoder_variance < math.inf:
        raise ValueError(f"decoder_variance must be positive, got {decoder_variance}")


def check_capacity(max_capacity: float, capacity_iters: int) -> None:
    """Raise ValueError for a capacity schedule that divides by zero or shrinks below it."""
    if not 0 <= max_capacity < math.inf:
        raise ValueError(f"max_capacity must be at least 0 nats, got {max_capacity}")
    if not 1 <= capacity_iters < math.inf or capacity_iters % 1 != 0:
        raise ValueError(f"capacity_iters must be at least 1 step and whole, got {capacity_iters}")


def _check_weight(weight: float | Tensor, device: torch.device) -> None:
    """Raise for a kl_weight that is no number and no 0-d float32 tensor on `device`."""
    if isinstance(weight, Tensor):
        if weight.dtype != torch.float32:
            raise TypeError(f"kl_weight must be a number or a 0-d float32 tensor, got {_describe(weight)}")
        if weight.dim() != 0 or weight.device != device:
            raise ValueError(f"kl_weight must be a number or 0-d on {device}, got {_describe(weight)}")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError("kl_weight gets no gradient: give kl_weight.detach()")
    elif isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"kl_weight must be a number or a 0-d float32 tensor, got {type(weight).__name__}")


def _check_loss(recon: Tensor, target: Tensor, kl: Tensor, objective: dict[str, Any]) -> Tensor:
    """Check the arguments of a loss, and return the target as a view of recon's shape.

    `objective` has the keyword arguments of `vae_loss`; its step becomes a tensor, its iterations an int.
    """
    likelihood = objective["likelihood"]
    check_objective(
        likelihood, objective["activation"], objective["reduction"], objective["decoder_variance"]
    )
    check_capacity(objective["max_capacity"], objective["capacity_iters"])
    objective["capacity_iters"] = int(objective["capacity_iters"])
    _check_float("recon", recon)
    _check_float("kl", kl)
    _check_weight(objective["kl_weight"], recon.device)
    if objective["step"] is not None:
        objective["step"] = _counter("step", objective["step"], recon.device)
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
    if likelihood == "bernoulli":
        _check_probabilities(target)
    return target


def _check_probabilities(target: Tensor) -> None:
    """Raise for a Bernoulli target outside [0, 1] where looking costs no synchronisation: eager, on a CPU."""
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
            `bernoulli` or `activation="sigmoid"`, else [-1, 1] (`bvae.reference.pixel_range`). recon's shape
            with any strides, or `[B, H, W, C]` for recon `[B, C, H, W]`; a shape that fits both ways is read
            as `[B, C, H, W]`.
        kl: `[B]` floating point, nats per image.
        kl_weight: the factor of the KL term: beta or gamma, times M/N where the reconstruction is a mean. A
            number, or a 0-d float32 tensor on recon's device, which the kernel loads. A number is compiled
            in: under `torch.compile` each new one is compiled anew, until the limit of recompilations, and a
            captured graph keeps the one it saw. Where the weight changes from step to step, give a tensor
            and write into it, or anneal the attributes of `bvae.losses`' modules, which do that.
        step: 0-d int64 tensor on recon's device, or an int, which a captured graph freezes: the training
            step, 1 on the first. None is the objective without a capacity.
        max_capacity, capacity_iters: C's last value in nats, and the step that reaches it.

    The kernel reads recon and target once and, where recon needs a gradient, writes it up to a factor, which
    the backward pass applies: with bfloat16 and uint8 that is 5 bytes an element forward and 4 backward, one
    launch each, and a tensor like recon kept in between. `vae_loss_and_grads` does without the second pass.

    Returns:
        `LossTerms`, 0-d float32 tensors; loss, recon and kld are differentiable, by recon and kl.

    Raises:
        TypeError, ValueError: naming the argument, its shape and what was expected. A target that requires a
        gradient has none to get and raises. A float target outside
        [0, 1] for `bernoulli` raises on a CPU in eager mode; elsewhere, where looking would stop the device,
        the loss is NaN.

    >>> import torch
    >>> from bvae import vae_loss
    >>> recon, images = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    >>> terms = vae_loss(recon, images, torch.tensor([2.0]), kl_weight=0.5)
    >>> terms.loss, terms.recon, terms.kld
    (tensor(2.), tensor(1.), tensor(2.))
    """
    objective: dict[str, Any] = {
        "kl_weight": kl_weight,
        "step": step,
        "max_capacity": max_capacity,
        "capacity_iters": capacity_iters,
        "likelihood": likelihood,
        "activation": activation,
        "reduction": reduction,
        "decoder_variance": decoder_variance,
    }
    return weighted_loss(recon, target, kl, None, **objective)


def weighted_loss(
    recon: Tensor, target: Tensor, kl: Tensor, weight: Tensor | None, **options: Any
) -> LossTerms:
    """`vae_loss` with `weight`, 0-d float32 on recon's device, as one more factor of the KL term.

    The kernel loads it: it is the part of the weight that changes, where `kl_weight` is the part that stays.
    """
    objective = {"step": None, "max_capacity": 0.0, "capacity_iters": 1, **options}
    target = _check_loss(recon, target, kl, objective)
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"target gets no gradient: give target.detach(), got {_describe(target)}")
    if weight is not None:
        _check_weight(weight, recon.device)
    if launch.runs_triton(recon, target, kl):
        with_slope = recon.requires_grad and torch.is_grad_enabled()
        outputs = _run_kernel(recon, target, kl, weight, objective, with_slope, as_gradient=False)
        return LossTerms(*outputs[:4])
    if weight is not None:
        objective["kl_weight"] = weight * objective["kl_weight"]
    return reference.vae_loss(recon, target, kl, **objective)


def vae_loss_and_grads(
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
) -> tuple[LossTerms, Tensor, Tensor]:
    """`vae_loss`, and the loss's gradients by recon and kl from the same pass, without a backward launch.

    The backward pass then starts with `torch.autograd.backward((recon, kl), (grad_recon, grad_kl))`. The
    terms are not differentiable. A float16 gradient of a mean underflows: use `vae_loss` and a scaler.

    Args:
        The arguments of `vae_loss`.

    Returns:
        The terms; the gradient of loss by recon, in its dtype, and by kl, `[B]` in its dtype.
    """
    objective: dict[str, Any] = {
        "kl_weight": kl_weight,
        "step": step,
        "max_capacity": max_capacity,
        "capacity_iters": capacity_iters,
        "likelihood": likelihood,
        "activation": activation,
        "reduction": reduction,
        "decoder_variance": decoder_variance,
    }
    target = _check_loss(recon, target, kl, objective)
    recon, target, kl = recon.detach(), target.detach(), kl.detach()
    if launch.runs_triton(recon, target, kl):
        *terms, kl_slope, grad_recon = _run_kernel(
            recon, target, kl, None, objective, with_slope=True, as_gradient=True
        )
        return LossTerms(*terms), grad_recon, kl_slope.to(kl.dtype).expand(kl.shape)
    with torch.enable_grad():
        recon, kl = recon.requires_grad_(), kl.requires_grad_()
        result = reference.vae_loss(recon, target, kl, **objective)
        grad_recon, grad_kl = torch.autograd.grad(result.loss, (recon, kl))
    return LossTerms(*(term.detach() for term in result)), grad_recon, grad_kl


def _run_kernel(
    recon: Tensor,
    target: Tensor,
    kl: Tensor,
    weight: Tensor | None,
    objective: dict[str, Any],
    with_slope: bool,
    as_gradient: bool,
) -> tuple[Tensor, ...]:
    """The loss kernel's outputs: the four terms, kl's slope and recon's."""
    if isinstance(objective["kl_weight"], Tensor):
        weight, objective = objective["kl_weight"], {**objective, "kl_weight": 1.0}
    low, _ = reference.pixel_range(objective["likelihood"], objective["activation"])
    return loss_kernel.forward(
        recon,
        target,
        kl,
        weight=weight,
        **objective,
        pixel_low=low,
        with_slope=with_slope,
        as_gradient=as_gradient,
    )
