"""Which decoder reads the image files, and what all decoders share."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bvae.errors import UsageError
from bvae.pipelines.picture import Picture
from bvae.pipelines.webdataset import ImageFile

AHEAD = 2  # batches being decoded while one is used
BATCH = 256  # files per batch, where nothing else sets the number


class Decoded(NamedTuple):
    """A batch."""

    images: Tensor  # uint8 [B, size, size, channels] on the decoder's device; those of bad files are zero
    bad: dict[int, str]  # position in the batch: what is wrong with the file


class Decoder(Protocol):
    """Batches of files to batches of pixels."""

    version: str  # for messages

    def decode(self, batches: Iterable[Sequence[ImageFile]]) -> Iterator[Decoded]:
        """The batches in their order; works ahead."""
        ...


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason(error: Exception) -> str:
    """An error's cause in one line."""
    text = getattr(error, "strerror", None) or str(error)  # without the path of OSError and NotRead
    first = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"^\w+, \S+:\d+, ", "", first)  # torchvision's function, source file and line


def choose(name: str) -> str:
    """ "dali" or "torchvision" for a name or "auto". Imports neither.

    Raises:
        ValueError: DALI is requested but not installed.
    """
    # Other wheels create the namespace `nvidia` too. Without it, find_spec("nvidia.dali") would raise.
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if name == "dali" and not installed:
        raise UsageError("--decoder dali: DALI is not installed (pip install nvidia-dali-cuda130)")
    if name == "auto":
        return "dali" if installed else "torchvision"
    return name


def build(name: str, picture: Picture, device: torch.device) -> Decoder:
    """The chosen decoder.

    Raises:
        ValueError: DALI is installed but does not load.
    """
    if name == "torchvision":
        from bvae.pipelines.torch_decode import TorchDecoder  # torchvision takes seconds

        return TorchDecoder(picture)
    try:
        from bvae.pipelines.dali import DaliDecoder  # takes a second and the GPU's libraries
    except (ImportError, OSError) as error:
        raise UsageError(f"DALI does not load ({error}): choose --decoder torchvision") from None
    return DaliDecoder(picture, device)
