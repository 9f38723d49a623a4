"""Weights that were read from a file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bvae.errors import UsageError


def check_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UsageError, which names the source, if a number in a state dict is NaN or infinite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UsageError(
                f"{source}: {name} is NaN or infinite: take a checkpoint from before the loss was"
            )
