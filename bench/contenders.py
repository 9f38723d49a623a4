"""Both sides of a training step, from the same weights: PyTorch-VAE with its options, and ours."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from bench.race import clock
from bench.reference_step import PyTorchVAE, PyTorchVAEStep
from bvae.config import TrainingConfig
from bvae.kernels import launch
from bvae.kernels.cpu import library
from bvae.losses import CapacityLoss
from bvae.model import BetaVAE
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training import malloc
from bvae.training.optimizer import build_optimizer
from bvae.training.step import TrainingStep, autocast_dtype, captures, load_cpu_layers

GAMMA, MAX_CAPACITY, CAPACITY_ITERS, LR = 10.0, 25.0, 10_000, 5e-4
LOG_VAR = -12.0  # in the gate: almost no noise
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
        """PyTorch-VAE's M_N."""
        return self.latent_dim / self.image_size**2


@dataclass
class Contender:
    """A step on its own images; `terms` waits for the device and returns the last step's MSE and KL."""

    step: Callable[[], object]
    terms: Callable[[], tuple[float, float]]
    load: Callable[[dict[str, Tensor]], object]  # weights under PyTorch-VAE's names


def dtype_name(device: torch.device, amp: bool) -> str:
    """The dtype in which a step computes, for the record."""
    return str(autocast_dtype(device, amp)[0] or torch.float32).removeprefix("torch.")


def pytorch_vae(network: Network, images: Tensor, *, tuned: bool = False, compile: bool = False) -> Contender:
    """PyTorch-VAE's step on uint8 `images` [B, H, W, C], scaled and laid out beforehand, as by its loader.

    `tuned` adds what its users could switch on: channels_last, fused Adam, cuDNN's choice of algorithms, and
    bfloat16 if the device has it.
    """
    device = images.device
    scaled = (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
    model = PyTorchVAE(network.latent_dim, network.hidden_dims, network.image_size).to(device)
    step = PyTorchVAEStep(
        model,
        kl_weight=network.kl_weight,
        gamma=GAMMA,
        max_capacity=MAX_CAPACITY,
        capacity_iters=CAPACITY_ITERS,
        lr=LR,
        channels_last=tuned,
        fused=tuned or None,
        dtype=torch.bfloat16 if tuned and dtype_name(device, amp=True) == "bfloat16" else None,
        compile=compile,
    )
    last = [(0.0, 0.0, 0.0)]

    def call() -> None:
        torch.backends.cudnn.benchmark = tuned
        last[0] = step(scaled)

    return Contender(call, lambda: last[0][1:], model.load_state_dict)


def with_memory_returned(step: Callable[[], object]) -> Callable[[], object]:
    """The same step in a process that returns freed memory to the system, as glibc does by itself."""

    def call() -> None:
        malloc.keep(False)
        try:
            step()
        finally:
            malloc.keep(True)

    return call


def ours(
    network: Network,
    images: Tensor | DeviceLoader,
    folder: Path,
    training: TrainingConfig,
) -> Contender:
    """`bvae.train`'s step on uint8 `images` [B, H, W, C], with the layers that `training` enables.

    With a data set on a GPU, it gathers a batch per step inside its graph, as training does. Weights are
    loaded through a file in `folder`.
    """
    device = images.device
    model = BetaVAE(3, **network.config).to(device, memory_format=torch.channels_last)
    loss = CapacityLoss(GAMMA, MAX_CAPACITY, CAPACITY_ITERS, network.kl_weight, activation="tanh").to(device)
    step = TrainingStep(
        model,
        loss,
        build_optimizer(replace(training, lr=LR), model.parameters()),
        seed=0,
        dtype=autocast_dtype(device, training.amp)[0],
        compile=training.compile,
        buffer_steps=training.log_every,
    )
    to_capture = [captures(device, training)[0]]
    layers = load_cpu_layers(training, device)

    def call() -> None:
        torch.backends.cudnn.benchmark = True
        before = launch.ENABLED, library.loaded
        launch.ENABLED, library.loaded = training.fused, layers
        try:
            if to_capture[0]:
                to_capture[0] = False
                if not step.capture(images):
                    raise torch.OutOfMemoryError("the step's graph does not fit the GPU's memory")
            step(images if isinstance(images, Tensor) else None)
        finally:
            launch.ENABLED, library.loaded = before

    def terms() -> tuple[float, float]:
        step.metrics_buffer.send(int(step.step))
        scalars = step.receive(wait=True)
        assert scalars
        return scalars.mse, scalars.kld

    def load(state: dict[str, Tensor]) -> None:
        torch.save(state, folder / "weights.pt")
        model.load_state_dict(BetaVAE.from_pytorch_vae(folder / "weights.pt").state_dict())

    return Contender(call, terms, load)


def check(network: Network, contenders: dict[str, Contender], device: torch.device) -> dict[str, float]:
    """Train all contenders from the same weights, almost without noise, and compare their MSE and KL.

    Returns:
        the seconds of each contender's first step.

    Raises:
        AssertionError: an MSE or KL differs from the first contender's by more than rounding can explain.
    """
    torch._dynamo.reset()  # the number of compilations of a function is limited, over all benchmarks
    start = PyTorchVAE(network.latent_dim, network.hidden_dims, network.image_size).state_dict()
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
            text = f"{name}, step {step}: MSE {mse:.5f} and KL {kld:.4f}, expected {mse0:.5f} and {kld0:.4f}"
            assert abs(mse - mse0) <= TOLERANCE * mse0, text
            assert abs(kld - kld0) <= TOLERANCE * kld0, text
    for contender in contenders.values():
        contender.load(start)
    return first_calls
