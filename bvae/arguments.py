"""Checks of the operations' arguments: each error names the argument, its shape and what was expected."""

import math
import warnings
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

from bvae.kernels import launch
from bvae.objective import Objective, Weights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_DIMS = 5  # the batch and up to four more

LEAST_BATCH = 3  # for the total correlation: each image needs others that stand for the whole data set

Pair = tuple[Tensor, Tensor]


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def _check_float(name: str, tensor: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {describe(tensor)}")


def _check_device(name: str, tensor: Tensor, device: torch.device, whose: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {whose} device {device}, got {describe(tensor)}")


def _can_look(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device: on a CPU, in eager mode, untransformed."""
    eager = not torch.compiler.is_compiling() and not launch.is_transformed()
    return eager and tensor.device.type == "cpu" and tensor.numel() > 0


def _fits(shape: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor of `shape` broadcasts to `wanted`."""
    inner = wanted[len(wanted) - len(shape) :]
    return len(shape) <= len(wanted) and all(
        size == 1 or size == full for size, full in zip(shape, inner, strict=True)
    )


# the posterior and the prior


def _of_distribution(name: str, distribution: Distribution) -> Pair:
    """The mean and the standard deviation of a Normal, or of an Independent one."""
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if not isinstance(base, Normal):
        raise TypeError(
            f"{name} must be a torch.distributions.Normal, or an Independent of one, got {distribution}"
        )
    return base.loc, base.scale


def posterior(mu: Tensor | Distribution, log_var: Tensor | float | None, std: Tensor | None) -> Pair:
    """mu and log_var, of mu's shape, of a posterior in any of the forms that `ops.reparam_kl` takes."""
    if not isinstance(mu, Tensor) and isinstance(mu, Distribution):
        if log_var is not None or std is not None:
            raise TypeError("a distribution has its own scale: give no log_var and no std with it")
        mu, std = _of_distribution("mu", mu)
    _check_float("mu", mu)
    if not 2 <= mu.dim() <= _MAX_DIMS:
        raise ValueError(f"mu must be [B, ...] with one to four more dimensions, got {describe(mu)}")
    if (log_var is None) == (std is None):
        raise TypeError("give log_var or std, and not both")
    name = "log_var" if std is None else "std"
    spread: Any = log_var if std is None else std
    if isinstance(spread, Real) and not isinstance(spread, bool):
        spread = torch.full((), float(spread), dtype=mu.dtype, device=mu.device)
    _check_float(name, spread)
    if not _fits(spread.shape, mu.shape):
        raise ValueError(
            f"{name} must have mu's shape {list(mu.shape)} or broadcast to it, got {describe(spread)}"
        )
    _check_device(name, spread, mu.device, "mu's")
    if std is not None:
        spread = _log_var_of(spread)
    return mu, spread if spread.shape == mu.shape else spread.expand(mu.shape)


def _log_var_of(std: Tensor) -> Tensor:
    if _can_look(std) and std.detach().min() < 0:
        raise ValueError(f"std must not be negative, got {describe(std)} with {std.min().item():.6g}")
    return 2 * torch.log(std if std.dtype == torch.float64 else std.float())


def prior_of(prior: Pair | Distribution | None, mu: Tensor) -> Pair | None:
    """The mean and the log variance of a prior, which broadcast to mu's shape."""
    if prior is None:
        return None
    if isinstance(prior, Distribution):
        mean, std = _of_distribution("prior", prior)
        named = {"prior's mean": mean, "prior's std": std}
    elif isinstance(prior, (tuple, list)) and len(prior) == 2:
        named = {"prior's mu": prior[0], "prior's log_var": prior[1]}
    else:
        raise TypeError(
            f"prior must be (mu, log_var), a torch.distributions.Normal or None, got {type(prior).__name__}"
        )
    for name, tensor in named.items():
        _check_float(name, tensor)
        if not _fits(tensor.shape, mu.shape):
            raise ValueError(f"{name} must broadcast to mu's shape {list(mu.shape)}, got {describe(tensor)}")
        _check_device(name, tensor, mu.device, "mu's")
    first, second = named.values()
    return first, _log_var_of(second) if isinstance(prior, Distribution) else second


def check_clamp(clamp: tuple[float, float] | None) -> None:
    if clamp is None:
        return
    pair = isinstance(clamp, (tuple, list)) and len(clamp) == 2
    if not (pair and all(isinstance(bound, (int, float)) for bound in clamp)):
        raise TypeError(f"clamp must be two numbers (low, high) or None, got {clamp!r}")
    if not clamp[0] < clamp[1]:
        raise ValueError(f"clamp must be (low, high) with low < high, got {clamp}")


def check_kl_options(reduction: str, free_bits: float) -> None:
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none', got {reduction!r}")
    if not isinstance(free_bits, Real) or isinstance(free_bits, bool):
        raise TypeError(f"free_bits must be a number, got {type(free_bits).__name__}")
    if not 0 <= free_bits < math.inf:
        raise ValueError(f"free_bits must be at least 0 nats per dimension, got {free_bits}")


def check_sampling(
    mu: Tensor,
    seed: Tensor | int | None,
    first_sample: int,
    generator: torch.Generator | None,
    samples: int | None,
) -> None:
    if isinstance(first_sample, Tensor):
        raise TypeError(f"first_sample must be a Python int, got {describe(first_sample)}")
    # not for 0, the usual: it would be a bound on the batch of an exported program
    if first_sample != 0 and not 0 <= first_sample <= 2**32 - mu.shape[0]:
        raise ValueError(
            f"first_sample must be 0 or more and number {mu.shape[0]} samples in 32 bits, got {first_sample}"
        )
    if samples is not None and (isinstance(samples, (bool, Tensor)) or not isinstance(samples, int)):
        raise TypeError(f"samples must be a Python int or None, got {type(samples).__name__} {samples!r}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if seed is not None:
        raise ValueError("give a seed or a generator, and not both")
    if generator.device.type != mu.device.type:
        raise ValueError(f"generator must be on mu's device {mu.device}, got one on {generator.device}")


def counter(name: str, value: Tensor | int, device: torch.device) -> Tensor:
    """A seed or step as the 0-d int64 tensor that the kernels read."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor or a Python int, got {describe(value)}")
        if value.dim() != 0 or value.device != device:
            raise ValueError(f"{name} must be a 0-d tensor on {device}, got {describe(value)}")
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


# the total correlation


def latents(
    z: Tensor, mu: Tensor, log_var: Tensor, dataset_size: int, weights: Weights
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu and log_var as `[B, D]`, and the checks of the options."""
    mu, log_var = posterior(mu, log_var, None)
    _check_float("z", z)
    if z.shape != mu.shape:
        raise ValueError(f"z must have mu's shape {list(mu.shape)}, got {describe(z)}")
    _check_device("z", z, mu.device, "mu's")
    if weights not in ("stratified", "weighted"):
        raise ValueError(f"weights must be 'stratified' or 'weighted', got {weights!r}")
    batch = mu.shape[0]
    if batch < LEAST_BATCH:
        raise ValueError(
            f"the total correlation of {batch} images cannot be estimated, at least {LEAST_BATCH} are "
            "needed: each image's density comes from the other posteriors of the batch"
        )
    if isinstance(dataset_size, bool) or not isinstance(dataset_size, int):
        got = describe(dataset_size) if isinstance(dataset_size, Tensor) else repr(dataset_size)
        raise TypeError(f"dataset_size must be a Python int, the number of training images, got {got}")
    if dataset_size < batch:
        raise ValueError(
            f"dataset_size must be the number of training images, of which the batch is a part: got "
            f"{dataset_size} for a batch of {batch}"
        )
    return z.flatten(1), mu.flatten(1), log_var.flatten(1)


# the loss


def target_of(recon: Tensor, target: Tensor, kl: Tensor, objective: Objective) -> Tensor:
    """Check the tensors of a loss, and return the target as a view of recon's shape."""
    _check_float("recon", recon)
    _check_float("kl", kl)
    if not 2 <= recon.dim() <= _MAX_DIMS:
        raise ValueError(f"recon must be [B, ...] with one to four more dimensions, got {describe(recon)}")
    _check_tensor("target", target)
    if target.dtype != torch.uint8 and target.dtype not in _FLOATS:
        raise TypeError(f"target must be uint8 or floating point, got {describe(target)}")
    target = _as_recon(target, recon)
    _check_device("target", target, recon.device, "recon's")
    if kl.shape != recon.shape[:1] or kl.device != recon.device:
        raise ValueError(
            f"kl must be [{recon.shape[0]}] on {recon.device}, one number per image, got {describe(kl)}"
        )
    if objective.likelihood == "bernoulli":
        if target.is_floating_point():
            _check_probabilities("target of a bernoulli likelihood", target)
        if objective.from_logits:
            _warn_of_probabilities(recon)
        else:
            _check_probabilities("recon with from_logits=False", recon)
    return target


def _as_recon(target: Tensor, recon: Tensor) -> Tensor:
    """`target` as a view of recon's shape: unchanged, or from channels last if only that fits."""
    if target.shape == recon.shape:
        return target
    if target.dim() == 4 and target.permute(0, 3, 1, 2).shape == recon.shape:
        return target.permute(0, 3, 1, 2)
    expected = f"recon's shape {list(recon.shape)}"
    if recon.dim() == 4:
        expected += f" or, channels last, {list(recon.permute(0, 2, 3, 1).shape)}"
    raise ValueError(f"target must have {expected}, got {describe(target)}")


def _within_unit(values: Tensor) -> tuple[bool, float, float]:
    low, high = (bound.item() for bound in torch.aminmax(values.detach()))
    return low >= 0 and high <= 1, low, high


def _check_probabilities(name: str, values: Tensor) -> None:
    """Raise for values outside [0, 1], where they can be read; elsewhere the loss is NaN."""
    if not _can_look(values):
        return
    within, low, high = _within_unit(values)
    if not within and not (math.isnan(low) or math.isnan(high)):
        raise ValueError(
            f"{name} must lie in [0, 1], got {describe(values)} with values from {low:.6g} to {high:.6g}"
        )


def _warn_of_probabilities(logits: Tensor) -> None:
    """Warn if all values are in [0, 1], where they can be read; logits show it in their first image.

    All logits of an untrained network may lie a little above 0. Its probabilities lie around 0.5.
    """
    if not _can_look(logits):
        return
    within, _, highest = _within_unit(logits[0])
    if within and highest > 0.25 and _within_unit(logits)[0]:
        warnings.warn(
            "all values of recon lie in [0, 1], where a bernoulli likelihood expects logits: if they are "
            "probabilities, as after a sigmoid, pass from_logits=False",
            stacklevel=4,
        )


def check_kl_scale(scale: Tensor, device: torch.device) -> None:
    """Raise if a tensor that weighs the KL is not one floating-point number on `device`."""
    _check_one("kl_weight", scale, device)


def _check_one(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be a number or a floating-point tensor, got {describe(tensor)}")
    if tuple(tensor.shape) not in ((), (1,)) or tensor.device != device:
        raise ValueError(f"{name} must be a number or one in a tensor on {device}, got {describe(tensor)}")


def check_tensor_options(objective: Objective, recon: Tensor) -> None:
    """Check the options of an objective that are tensors."""
    if isinstance(objective.max_capacity, Tensor):
        _check_one("max_capacity", objective.max_capacity, recon.device)
    spread = objective.spread
    if not isinstance(spread, Tensor):
        return
    name = "decoder_variance" if objective.likelihood == "gaussian" else "decoder_scale"
    _check_float(name, spread)
    _check_device(name, spread, recon.device, "recon's")
    if not _fits(spread.shape, recon.shape):
        raise ValueError(
            f"{name} must broadcast to recon's shape {list(recon.shape)}, got {describe(spread)}"
        )
    if _can_look(spread) and not spread.detach().min() >= 0:
        raise ValueError(f"{name} must be positive, got {describe(spread)} with {spread.min().item():.6g}")


def check_weight_and_mask(weight: Tensor | None, mask: Tensor | None, recon: Tensor) -> None:
    if weight is not None:
        _check_float("weight", weight)
        if weight.shape != recon.shape[:1]:
            raise ValueError(f"weight must be [{recon.shape[0]}], one per image, got {describe(weight)}")
        _check_device("weight", weight, recon.device, "recon's")
        if _can_look(weight) and not weight.detach().min() >= 0:
            raise ValueError(
                f"weight must be at least 0, got {describe(weight)} with {weight.min().item():.6g}"
            )
    if mask is not None:
        _check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True where an element counts, got {describe(mask)}")
        if mask.dim() != recon.dim() or not _fits(mask.shape, recon.shape):
            raise ValueError(
                f"mask must have recon's shape {list(recon.shape)}, or 1 in some dimensions, got "
                f"{describe(mask)}"
            )
        _check_device("mask", mask, recon.device, "recon's")


def check_batch_norm(x: Tensor, vectors: dict[str, Tensor]) -> None:
    """Raise unless x is a batch of images with a variance, and each of the vectors is `[C]` on its device."""
    for name, tensor in {"x": x, **vectors}.items():
        _check_tensor(name, tensor)
        _check_float(name, tensor)
        _check_device(name, tensor, x.device, "x's")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got {describe(x)}")
    for name, vector in vectors.items():
        if vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}], one per channel of x, got {describe(vector)}")
    if x.numel() // max(x.shape[1], 1) < 2:
        raise ValueError(
            f"BatchNorm in training needs more than one number per channel, got x {describe(x)}: use larger "
            "batches, or evaluate"
        )


def check_last_block(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, objective: Objective) -> Tensor:
    """Raise for wrong arguments of `bvae.ops.last_block`; the target as [B, channels, H, W]."""
    for name, tensor in {"weight": weight, "bias": bias}.items():
        _check_float(name, tensor)
    _check_tensor("target", target)
    if target.dtype != torch.uint8 and target.dtype not in _FLOATS:
        raise TypeError(f"target must be uint8 or floating point, got {describe(target)}")
    for name, tensor in {"weight": weight, "bias": bias, "target": target}.items():
        _check_device(name, tensor, x.device, "x's")
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 3, 3):
        raise ValueError(f"weight must be [channels, {x.shape[1]}, 3, 3], got {describe(weight)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], one per channel, got {describe(bias)}")
    spread = objective.spread
    if isinstance(spread, Tensor) and spread.numel() > 1:
        raise ValueError(f"a variance or scale must be one number for the last block, got {describe(spread)}")
    batch, _, height, width = x.shape
    return _as_recon(target, torch.empty((batch, weight.shape[0], height, width), device="meta"))
