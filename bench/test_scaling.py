"""Images per second over the batch, the image's size and the number of latents: PyTorch-VAE's step, and ours.

One of the three varies at a time. The others are those of PyTorch-VAE's network in mixed precision on a GPU,
and of the network of faces_cpu, in float32 and eager mode with Adam, on a CPU. On a GPU each point takes some
50 s, mostly to compile the step: with these few points the file takes less than ten minutes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contenders import Network, check, dtype_name, ours, pytorch_vae
from bvae.config import TrainingConfig

GPU = torch.cuda.is_available()
if GPU:
    NETWORK, BATCH, TRAINING = Network(), 144, TrainingConfig(amp=True)
    # Batch 144 is also the point of 64 pixels and 128 latents. The largest batch comes last.
    AXES = {"image size": (128, 256), "latents": (10, 1024), "batch": (16, 144, 1024, 4096)}
else:
    NETWORK, BATCH, TRAINING = Network(10, (16, 32, 64, 128, 256)), 32, TrainingConfig(compile=False)
    AXES = {"batch": (16, 64, 256), "image size": (32, 64, 128), "latents": (10, 100, 1000)}


@pytest.mark.parametrize(("axis", "value"), [(axis, value) for axis in AXES for value in AXES[axis]])
def test_scaling(
    axis: str, value: int, device: torch.device, race: Callable[..., Any], tmp_path: Path
) -> None:
    network, batch = NETWORK, BATCH
    if axis == "batch":
        batch = value
    else:
        network = replace(network, **{{"image size": "image_size", "latents": "latent_dim"}[axis]: value})
    size = network.image_size
    images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    contenders = {
        "PyTorch-VAE": pytorch_vae(network, images),
        "ours": ours(network, images, tmp_path, TRAINING),
    }
    race(
        "scaling",
        f"{axis} {value}",
        gate=lambda: check(network, contenders, device),
        prepare=lambda: {name: contender.step for name, contender in contenders.items()},
        rounds=5,
        images=batch,
        model=network.config,
        dtype=dtype_name(device, TRAINING.amp),
        axis=axis,
        value=value,
    )
