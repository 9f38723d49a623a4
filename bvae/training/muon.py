"""Muon: momentum whose matrices are made orthogonal before each update; Adam for all other parameters."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

# Newton-Schulz (Jordan et al. 2024): X <- aX + b(XX')X + c(XX')^2 X. Five rounds bring all singular values
# that are not tiny to between 0.7 and 1.2; other coefficients would reach 1 more exactly, but more slowly.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) and, for what is no matrix, Adam.

    Parameters of two dimensions and more are updated as matrices, a filter as [channels, the rest]: Nesterov
    momentum, made orthogonal by Newton-Schulz, times sqrt(max(1, rows / columns)) and the learning rate.
    `torch.optim.Muon` does the same for matrices alone, one after the other, and reads its rate on the host.
    Here matrices of one length share their products, and nothing waits for the device, so that a CUDA graph
    can hold an update. Fused Adam (Kingma & Ba 2015) updates all other parameters.

    The loss scaler of float16 may pass its factor, as to fused Adam: a step whose gradients are not finite
    then changes nothing.

    Args:
        parameters: floating point, on one device.
        lr: Muon's learning rate, a 0-d tensor on the parameters' device.
        adam_lr: Adam's, likewise.
        momentum: of Muon.
        betas, eps: of Adam.
        weight_decay: decoupled: each step of Muon shrinks its parameters by lr * weight_decay.
        adam_weight_decay: of Adam, an L2 penalty.

    Example:
        >>> import torch
        >>> from bvae.training.muon import Muon
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> Muon([weight], lr=torch.tensor(0.1), adam_lr=torch.tensor(1e-3)).step()
        >>> bool(weight.diagonal().max() < 1)
        True
    """

    # GradScaler then sets grad_scale and found_inf for a step, and does not wait for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: Tensor,
        adam_lr: Tensor,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_weight_decay: float = 0.0,
    ) -> None:
        parameters = list(parameters)
        matrices = [p for p in parameters if p.ndim >= 2]
        others = [p for p in parameters if p.ndim < 2]
        by_muon = {"params": matrices, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        by_adam: dict[str, Any] = {"params": others, "lr": adam_lr, "betas": betas, "eps": eps}
        by_adam["weight_decay"] = adam_weight_decay
        by_adam["fused"] = True  # so that `load_state_dict` moves the step counts to the parameters' device
        super().__init__([group for group in (by_muon, by_adam) if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient; return the loss if a `closure` computes it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._muon if "momentum" in group else self._adam)(group, parameters)
        return loss

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        momenta = [self._moment(p, "momentum_buffer") for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        lr = group["lr"]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None:
            gradients = list(torch._foreach_div(gradients, scale))
        if found_inf is not None:  # a momentum that gets itself as its gradient stays, and the rate is zero
            skipped = found_inf > 0
            gradients = [torch.where(skipped, m, g) for m, g in zip(momenta, gradients, strict=True)]
            lr = torch.where(skipped, 0.0, lr)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = list(torch._foreach_lerp(gradients, momenta, group["momentum"]))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        updates = orthogonalise(updates)
        # The square root of rows / columns, if there are more rows.
        torch._foreach_mul_(updates, [max(1.0, len(u) ** 2 / u.numel()) ** 0.5 for u in updates])
        torch._foreach_mul_(updates, -lr)
        torch._foreach_add_(parameters, updates)

    def _adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for p in parameters:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
        beta1, beta2 = group["betas"]
        adam(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [self._moment(p, "exp_avg") for p in parameters],
            [self._moment(p, "exp_avg_sq") for p in parameters],
            [],
            [self.state[p]["step"] for p in parameters],
            fused=group["fused"],
            capturable=parameters[0].is_cuda,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )

    def _moment(self, parameter: Tensor, name: str) -> Tensor:
        """A parameter's average of that name; zeros at first."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state[name]


def orthogonalise(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each matrix the nearest one whose singular values are about 1.

    Args:
        tensors: float32 or float64 [rows, ...]; all but the first dimension are the columns.

    Returns:
        the same shapes and dtypes; singular values between 0.68 and 1.14, except those that were tiny.

    Example:
        >>> import torch
        >>> from bvae.training.muon import orthogonalise
        >>> (matrix,) = orthogonalise([torch.tensor([[3.0, 4.0]])])
        >>> bool(0.68 < matrix.norm() < 1.14)
        True
    """
    in_bfloat16 = tensors[0].is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    # Matrices whose longer sides are equal share their products: missing rows are zeros, which stay zeros.
    by_length: dict[int, list[int]] = {}
    for number, tensor in enumerate(tensors):
        by_length.setdefault(max(len(tensor), tensor[0].numel()), []).append(number)
    results = list(tensors)
    for length, numbers in by_length.items():
        heights = [tensors[number].numel() // length for number in numbers]
        dtype = torch.bfloat16 if in_bfloat16 else tensors[0].dtype
        x = tensors[0].new_zeros(len(numbers), max(heights), length, dtype=dtype)
        for wide, height, number in zip(x, heights, numbers, strict=True):
            _like(wide[:height], tensors[number]).copy_(tensors[number])
        x /= torch.linalg.matrix_norm(x, keepdim=True) + 1e-7  # no singular value is larger than 1
        x = (_by_products if in_bfloat16 else _by_squares)(x).to(tensors[0].dtype)
        for wide, height, number in zip(x, heights, numbers, strict=True):
            results[number] = _like(wide[:height], tensors[number])
    return results


def _like(wide: Tensor, tensor: Tensor) -> Tensor:
    """A view of a wide matrix in the shape of the tensor, and in its memory format, if its rows are short."""
    matrix = wide if len(wide) == len(tensor) else wide.mT
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return matrix.unflatten(1, tensor.permute(0, 2, 3, 1).shape[1:]).permute(0, 3, 1, 2)
    return matrix.unflatten(1, tensor.shape[1:])


def _by_products(x: Tensor) -> Tensor:
    """Newton-Schulz as it is written, which bfloat16 bears."""
    for _ in range(ROUNDS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=B, alpha=C)
        x = torch.baddbmm(x, polynomial, x, beta=A)
    return x


def _by_squares(x: Tensor) -> Tensor:
    """The same on XX' alone: half the arithmetic for filters, whose columns are 4.5 times their rows.

    Each round multiplies X from the left by P = a + bS + cS^2, where S = XX'. P and S commute, so the next S
    is PSP, and X itself is needed only at the end. bfloat16 would lose the small singular values in S.
    """
    square = x @ x.mT
    product: Tensor | None = None
    for number in range(ROUNDS):
        polynomial = torch.baddbmm(square, square, square, beta=B, alpha=C)
        polynomial.diagonal(dim1=1, dim2=2).add_(A)
        product = polynomial if product is None else polynomial @ product
        if number < ROUNDS - 1:
            square = polynomial @ (square @ polynomial)
    assert product is not None
    return product @ x
