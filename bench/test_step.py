"""A training step: PyTorch-VAE, the same tuned and compiled, ours, and ours with each layer switched off.

All start from the same weights and must give the same losses, without noise, before anything is timed.
PyTorch-VAE gets its images scaled and in float32, as from its loader; ours gets uint8 and scales it. "tuned"
is PyTorch-VAE with channels_last, fused Adam, cuDNN's choice of algorithms and mixed precision; "compiled"
adds torch.compile. On a CPU all keep freed memory, as a run does (`bvae/training/malloc.py`), except those
named "memory returned".
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contenders import (
    Contender,
    Network,
    check,
    dtype_name,
    ours,
    pytorch_vae,
    with_memory_returned,
)
from bench.race import Bar
from bvae.config import TrainingConfig, read

GPU = torch.cuda.is_available()
FULL_SIZE = Network()
SMALL = Network(10, (16, 32, 64, 128, 256))  # the preset faces_cpu's


def _layers(device: torch.device, batch: int) -> dict[str, TrainingConfig]:
    """Ours, and ours without each layer that this device has."""
    all_layers = TrainingConfig(amp=True)
    variants = {"ours": all_layers, "ours, no compile": replace(all_layers, compile=False)}
    if GPU and batch != 144:  # each other variant is one more step to compile: this file has ten minutes
        return variants
    if GPU:
        variants["ours, no capture"] = replace(all_layers, capture=False)
        variants["ours, no fused"] = replace(all_layers, fused=False)
    in_float32 = replace(all_layers, amp=False)
    if dtype_name(device, amp=True) != "float32":
        variants["ours, no amp"] = in_float32
        if not GPU:
            variants["ours, no C++"] = replace(all_layers, fused=False)
    if not GPU:
        variants["ours, float32, no C++"] = replace(in_float32, fused=False)
        variants["ours, float32, no compile"] = replace(in_float32, compile=False)
    return variants


@pytest.mark.parametrize("batch", (64, 144, 1024) if GPU else (64,))
def test_step(batch: int, device: torch.device, race: Callable[..., Any], tmp_path: Path) -> None:
    images = torch.randint(256, (batch, 64, 64, 3), dtype=torch.uint8, device=device)
    contenders: dict[str, Contender] = {
        "PyTorch-VAE": pytorch_vae(FULL_SIZE, images),
        "tuned": pytorch_vae(FULL_SIZE, images, tuned=True),
        "compiled": pytorch_vae(FULL_SIZE, images, tuned=True, compile=True),
    }
    for name, training in _layers(device, batch).items():
        contenders[name] = ours(FULL_SIZE, images, tmp_path, training)
    steps = {name: contender.step for name, contender in contenders.items()}
    bars = []
    if not GPU:
        for name in ("PyTorch-VAE", "ours"):
            steps[f"{name}, memory returned"] = with_memory_returned(contenders[name].step)
        # float32 against float32
        fast = next(name for name in ("ours, no amp", "ours") if name in contenders)
        bars = [
            Bar("a CPU's step in float32, over PyTorch-VAE's", "PyTorch-VAE", fast, 2.4),
            Bar("the layers in C++, over torch.compile alone", "ours, float32, no C++", fast, 1.4),
        ]
    race(
        "step",
        f"PyTorch-VAE's network, batch {batch}",
        gate=lambda: check(FULL_SIZE, contenders, device),
        prepare=lambda: steps,
        rounds=7,
        bars=bars,
        images=batch,
        model=FULL_SIZE.config,
        dtype=dtype_name(device, amp=True),
        headline=f"Training step, PyTorch-VAE's network, batch {batch}",
    )


@pytest.mark.skipif(GPU, reason="the preset faces_cpu is for CPUs")
def test_step_of_the_cpu_preset(device: torch.device, race: Callable[..., Any], tmp_path: Path) -> None:
    """As in `make train`: eager, since compiling does not pay in a short run; in bfloat16 if the CPU has it.

    All update by Adam, so that their losses can be compared. "ours, Muon" is what the preset does.
    """
    images = torch.randint(256, (64, 64, 64, 3), dtype=torch.uint8, device=device)
    preset = replace(read("faces_cpu")[0].training, optimizer="adam")
    contenders = {
        "PyTorch-VAE": pytorch_vae(SMALL, images),
        "tuned": pytorch_vae(SMALL, images, tuned=True),
        "ours": ours(SMALL, images, tmp_path, preset),
    }
    in_float32 = replace(preset, amp=False)
    if dtype_name(device, preset.amp) != "float32":
        contenders["ours, no amp"] = ours(SMALL, images, tmp_path, in_float32)
        contenders["ours, no C++"] = ours(SMALL, images, tmp_path, replace(preset, fused=False))
    contenders["ours, float32, no C++"] = ours(SMALL, images, tmp_path, replace(in_float32, fused=False))
    muon = ours(SMALL, images, tmp_path, replace(preset, optimizer="muon"))
    race(
        "step",
        "faces_cpu's network, batch 64",
        gate=lambda: check(SMALL, contenders, device),
        prepare=lambda: {
            **{name: contender.step for name, contender in contenders.items()},
            "ours, Muon": muon.step,
        },
        rounds=7,
        images=64,
        model=SMALL.config,
        dtype=dtype_name(device, preset.amp),
        headline="Training step, faces_cpu's network, eager, batch 64",
    )
