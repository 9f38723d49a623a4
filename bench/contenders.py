"""Both sides of a training step, from the same weights: the seed's code with its options, and ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.race import clock
from bench.record import has_bfloat16
from bench.reference_step import SeedStep, SeedVAE
from bvae.losses import CapacityLoss
from bvae.model import BetaVAE
from bvae.step import TrainingStep

GAMMA, MAX_CAPACITY, CAPACITY_ITERS, LR = 10.0, 25.0, 10_000, 5e-4
LOG_VAR = -12.0  # in the gate: as good as no noise
GATE_STEPS, TOLERANCE = 3, 0.01  # a step changes the MSE by 6 %; bfloat16 by 0.2 %


@dataclass(frozen=True)
class Network:
    """The sizes of PyTorch-VAE's network."""

    latent_dim: int = 128
    hidden_dims: tuple[int, ...] = (32, 64, 128, 256, 512)
    image_size: int = 64

    @property
    def config(self) -> dict[str, Any]:
        """BetaVAE's arguments, for the record."""
        sizes = {"latent_dim": self.latent_dim, "hidden_dims": list(self.hidden_dims)}
        return {**sizes, "image_size": self.image_size}

    @property
    def kl_weight(self) -> float:
        """The seed's M_N."""
        return self.latent_dim / self.image_size**2


@dataclass
class Contender:
    """A step on its own images; `terms` waits for the device and gives the last one's MSE and KL."""

    step: Callable[[], object]
    terms: Callable[[], tuple[float, float]]
    load: Callable[[dict[str, Tensor]], object]  # weights under PyTorch-VAE's names


def mixed_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes in it."""
    cuda = device.type == "cuda"
    has = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else has_bfloat16()
    return torch.bfloat16 if has else None


def seed(network: Network, images: Tensor, **options: Any) -> Contender:
    """The seed's step on uint8 `images` [B, H, W, C], which its loader has scaled and laid out beforehand."""
    device = images.device
    scaled = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    model = SeedVAE(network.latent_dim, network.hidden_dims, network.image_size).to(device)
    step = SeedStep(
        model,
        kl_weight=network.kl_weight,
        gamma=GAMMA,
        max_capacity=MAX_CAPACITY,
        capacity_iters=CAPACITY_ITERS,
        lr=LR,
        **options,
    )
    last = [(0.0, 0.0, 0.0)]

    def call() -> None:
        last[0] = step(scaled)

    return Contender(call, lambda: last[0][1:], model.load_state_dict)


def ours(
    network: Network, images: Tensor, folder: Path, *, dtype: torch.dtype | None, compile: bool
) -> Contender:
    """`bvae.train`'s step on uint8 `images` [B, H, W, C]; weights pass through a file in `folder`."""
    device = images.device
    model = BetaVAE(3, **network.config).to(device, memory_format=torch.channels_last)
    loss = CapacityLoss(GAMMA, MAX_CAPACITY, CAPACITY_ITERS, network.kl_weight, activation="tanh").to(device)
    optimizer = torch.optim.Adam(model.parameters(), LR, fused=True)
    step = TrainingStep(model, loss, optimizer, seed=0, dtype=dtype, compile=compile, history=1)

    def load(state: dict[str, Tensor]) -> None:
        torch.save(state, folder / "weights.pt")
        model.load_state_dict(BetaVAE.from_pytorch_vae(folder / "weights.pt").state_dict())

    def terms() -> tuple[float, float]:
        scalars = step.read(int(step.step))
        return scalars["mse"], scalars["kld"]

    return Contender(lambda: step(images), terms, load)


def check(network: Network, contenders: dict[str, Contender], device: torch.device) -> dict[str, float]:
    """Train all contenders from the same weights, without noise, and compare what they report.

    Returns:
        seconds of each one's first step.

    Raises:
        AssertionError: an MSE or KL differs from the first contender's by more than rounding explains.
    """
    start = SeedVAE(network.latent_dim, network.hidden_dims, network.image_size).state_dict()
    weights = {name: value.clone() for name, value in start.items()}
    weights["fc_var.weight"].zero_()
    weights["fc_var.bias"].fill_(LOG_VAR)
    first_calls: dict[str, float] = {}
    reported: dict[str, list[tuple[float, float]]] = {}
    for name, contender in contenders.items():
        contender.load(weights)
        first_calls[name] = clock(contender.step, device)
        reported[name] = [contender.terms()]
        for _ in range(GATE_STEPS - 1):
            contender.step()
            reported[name].append(contender.terms())
    expected = next(iter(reported.values()))
    for name, terms in reported.items():
        for step, ((mse, kld), (mse0, kld0)) in enumerate(zip(terms, expected, strict=True), start=1):
            where = f"{name}, step {step}: MSE {mse:.5f} and KL {kld:.4f}, expected {mse0:.5f} and {kld0:.4f}"
            assert abs(mse - mse0) <= TOLERANCE * mse0, where
            assert abs(kld - kld0) <= TOLERANCE * kld0, where
    for contender in contenders.values():
        contender.load(start)
    return first_calls
