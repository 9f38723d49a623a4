"""mu, log_var, noise -> z and the KL per sample, with a gradient in closed form: a third fewer passes.

    z  = mu + std * eps, std = exp(log_var / 2)       d z / d mu = 1        d z / d log_var = eps * std / 2
    KL = sum of 0.5 * (mu^2 + std^2 - 1 - log_var)    d KL / d mu = mu      d KL / d log_var = (std^2 - 1) / 2

`reference.reparam_kl` is the specification; autograd differentiates it operation by operation.
"""

from typing import Any

import torch
from torch import Tensor

from bvae.kernels.cpu import library


def reparam_kl(mu: Tensor, log_var: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """z in mu's dtype, and the KL to N(0, I) per sample, `[B]` float32, nats. All have mu's shape."""
    return _ReparamKL.apply(mu, log_var, eps)


class _ReparamKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_var: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        mean, half = mu.float(), 0.5 * log_var.float()
        std = torch.exp(half)
        ctx.save_for_backward(mu, log_var, eps, std)
        kl = torch.add(-0.5 - half, torch.addcmul(mean * mean, std, std), alpha=0.5)
        return torch.addcmul(mean, std, eps).to(mu.dtype), kl.flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        mu, log_var, eps, std = ctx.saved_tensors
        if library.is_graph_wanted():  # what was computed in `forward` has no graph
            std = torch.exp(0.5 * log_var.float())
        by_z, by_kl = grad_z.float(), grad_kl.view(-1, *[1] * (mu.dim() - 1))
        by_std = torch.addcmul(by_z * eps, by_kl, std)
        return (
            torch.addcmul(by_z, by_kl, mu.float()).to(mu.dtype),
            (0.5 * torch.addcmul(-by_kl, by_std, std)).to(log_var.dtype),
            None,
        )
