"""Black and white images of one bit per pixel: an eighth of the memory, unpacked on the device when used."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bvae.pipelines.memory_loaders import DeviceLoader

GATHER = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201: as a factor, bit 8 i goes to bit 63 - i of the product


def pack(images: Tensor) -> Tensor:
    """uint8 [N, ...] of 0 and 1, a multiple of 8 pixels each, to uint8 [N, pixels / 8], first pixel highest.

    The same as `numpy.packbits`, on any device.
    """
    eight = images.flatten(1).contiguous().view(torch.int64)
    return ((eight * GATHER) >> 56).to(torch.uint8)


def unpack(packed: Tensor, side: int, pixels: Tensor | None = None) -> Tensor:
    """uint8 [N, side^2 / 8] of one bit per pixel to images, uint8 [N, side, side, 1] of 0 and 255.

    A compiled caller must pass `pixels_of_bytes`: torch.compile would build the table again, on the host.
    """
    pixels = pixels_of_bytes(packed.device) if pixels is None else pixels
    eight = pixels.index_select(0, packed.flatten().int())
    return eight.view(torch.uint8).view(-1, side, side, 1)


@cache
def pixels_of_bytes(device: torch.device) -> Tensor:
    """The eight pixels of every byte, as one integer each: [256]."""
    bits = torch.arange(256)[:, None] >> torch.arange(7, -1, -1) & 1
    return (255 * bits).to(torch.uint8).view(torch.int64).squeeze(1).to(device)


class PackedLoader(DeviceLoader):
    """Images of one bit per pixel, uint8 [N, side^2 / 8], on the device that uses them; never mirrored."""

    def __init__(self, packed: Tensor, side: int, batch_size: int, seed: int, **options: Any) -> None:
        super().__init__(packed, batch_size, seed, flip=False, **options)
        self.side = side
        self._pixels = pixels_of_bytes(packed.device)

    def batch(self, position: Tensor) -> Tensor:
        """Images [B, side, side, 1] of batch `position` of the current epoch; see `DeviceLoader.batch`."""
        return unpack(super().batch(position), self.side, self._pixels)

    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for packed, index in super()._fetch(indices):
            yield unpack(packed, self.side, self._pixels), index
