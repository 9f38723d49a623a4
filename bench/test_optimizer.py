"""One update of PyTorch-VAE's parameters by Muon: torch's, for which filters are flattened, and ours.

torch.optim.Muon computes in bfloat16, one matrix after the other; ours at a time all of equal length.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bvae.config import TrainingConfig
from bvae.model import BetaVAE
from bvae.training.optimizer import build_optimizer

TOLERANCE = 0.04  # of the update's norm: bfloat16, through five rounds


def test_update(device: torch.device, race: Callable[..., Any]) -> None:
    model = BetaVAE().to(device, memory_format=torch.channels_last)
    training = TrainingConfig(optimizer="muon")
    filters = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in filters]
    copies = [nn.Parameter(p.detach().clone()) for p in vectors]
    for parameter, copy in zip([*filters, *vectors], [*flat, *copies], strict=True):
        parameter.grad = torch.randn_like(parameter)
        copy.grad = parameter.grad.view_as(copy) if parameter.ndim < 3 else parameter.grad.flatten(1)
    ours = build_optimizer(training, model.parameters())
    torchs = (
        torch.optim.Muon(flat, lr=training.muon_lr, weight_decay=training.muon_weight_decay),
        torch.optim.Adam(copies, lr=training.lr, fused=True),
    )

    def update() -> None:
        for optimizer in torchs:
            optimizer.step()

    def moved(weights: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        return [weight.detach().flatten(1) - old for weight, old in zip(weights, before, strict=True)]

    def gate() -> dict[str, float]:
        before = [weight.detach().clone() for weight in flat]
        ours.step(), update()
        for a, b in zip(moved(filters, before), moved(flat, before), strict=True):
            assert (a - b).norm() <= TOLERANCE * b.norm(), f"{tuple(a.shape)}: {(a - b).norm() / b.norm()}"
        return {}

    race(
        "optimizer",
        "Muon, PyTorch-VAE's parameters",
        gate=gate,
        prepare=lambda: {"torch.optim.Muon": update, "ours": ours.step},
        headline="An update by Muon, PyTorch-VAE's parameters",
    )
