"""A training step: the seed's code, the same tuned and compiled, ours, and ours with each layer switched off.

All start from the same weights and, without noise, must train alike before anything is timed. The seed's code
gets its images scaled and in float32, as its loader would hand them over; ours gets uint8 and scales it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contenders import Contender, Network, check, mixed_precision, ours, seed

GPU = torch.cuda.is_available()
SEEDS = Network()
SMALL = Network(10, (16, 32, 64, 128, 256))  # the preset faces_cpu's


def _switches(dtype: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """Ours, and ours without each layer that this device has."""
    whole = {"dtype": dtype, "compile": True}
    found = {"ours": whole, "ours, no compile": {**whole, "compile": False}}
    return {**found, "ours, no amp": {**whole, "dtype": None}} if dtype else found


@pytest.mark.parametrize("batch", (64, 144, 1024) if GPU else (64,))
def test_step(batch: int, device: torch.device, race: Callable[..., Any], tmp_path: Path) -> None:
    dtype = mixed_precision(device)
    images = torch.randint(256, (batch, 64, 64, 3), dtype=torch.uint8, device=device)
    tuned = {"channels_last": True, "fused": True, "dtype": dtype}
    contenders: dict[str, Contender] = {
        "the seed's code": seed(SEEDS, images),
        "tuned": seed(SEEDS, images, **tuned),
        "compiled": seed(SEEDS, images, **tuned, compile=True),
        **{name: ours(SEEDS, images, tmp_path, **switch) for name, switch in _switches(dtype).items()},
    }
    race(
        "step",
        f"seed's network, batch {batch}",
        gate=lambda: check(SEEDS, contenders, device),
        prepare=lambda: {name: contender.step for name, contender in contenders.items()},
        images=batch,
        model=SEEDS.config,
        dtype="bfloat16" if dtype else "float32",
        headline=f"Training step, seed's network, batch {batch}",
    )


@pytest.mark.skipif(GPU, reason="the preset faces_cpu is for CPUs")
def test_step_of_the_cpu_preset(device: torch.device, race: Callable[..., Any], tmp_path: Path) -> None:
    """As `make train` runs it: float32, eager, since a run this short earns back no compiling."""
    images = torch.randint(256, (64, 64, 64, 3), dtype=torch.uint8, device=device)
    contenders = {
        "the seed's code": seed(SMALL, images),
        "tuned": seed(SMALL, images, channels_last=True, fused=True),
        "ours": ours(SMALL, images, tmp_path, dtype=None, compile=False),
    }
    race(
        "step",
        "faces_cpu's network, batch 64",
        gate=lambda: check(SMALL, contenders, device),
        prepare=lambda: {name: contender.step for name, contender in contenders.items()},
        images=64,
        model=SMALL.config,
        dtype="float32",
        headline="Training step, faces_cpu's network, batch 64",
    )
