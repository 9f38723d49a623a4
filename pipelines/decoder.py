"""Which decoder reads the image files."""

from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Protocol

import torch

from bvae.errors import UsageError
from bvae.pipelines.picture import Picture
from bvae.pipelines.torch_decode import Decoded, TorchDecoder
from bvae.pipelines.webdataset import ImageFile

BATCH = 256  # files handed to a decoder at once, where nothing else decides


class Decoder(Protocol):
    """Batches of files to batches of pixels."""

    version: str  # for people to read

    def decode(self, batches: Iterable[Sequence[ImageFile]]) -> Iterator[Decoded]:
        """The batches in their order; works ahead."""
        ...


def choose(name: str) -> str:
    """ "dali" or "torchvision" for a name or "auto". Imports neither.

    Raises:
        ValueError: DALI is asked for and not installed.
    """
    # Other wheels make the namespace `nvidia` too; without it, a look inside would raise.
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
        return TorchDecoder(picture)
    try:
        from bvae.pipelines.dali import DaliDecoder  # takes a second and the GPU's libraries
    except (ImportError, OSError) as error:
        raise UsageError(f"DALI does not load ({error}): choose --decoder torchvision") from None
    return DaliDecoder(picture, device)
