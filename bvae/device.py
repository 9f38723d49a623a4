"""Which device a command uses."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bvae.errors import UsageError

if TYPE_CHECKING:
    import torch

NODES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, AMD and WSL


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU. On Linux without a device node there is none, and torch is not imported."""
    if sys.platform == "linux" and not any(Path(node).exists() for node in NODES):
        return False
    import torch

    return torch.cuda.is_available()


def choose_device(name: str) -> torch.device:
    """ "auto" is the first GPU, or else the CPU. Raises UsageError for "cuda" without a GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no GPU (see torch.cuda.is_available())")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
