"""Decoded images that stay on the device, and the epochs over them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bvae.kernels.noise import philox

# Each use of the seed has a key of its own, so that order and flips share nothing with the noise.
_ORDER, _FLIP = 0x6F726472, 0x666C6970


class Resident:
    """uint8 images [N, H, W, C] on their device, in batches.

    Args:
        images: uint8 [N, H, W, C], contiguous.
        batch_size: images in a batch.
        seed: the order of an epoch is a function of (seed, epoch), a flip of (seed, epoch, image).
        train: shuffle, and drop the last batch if it is not full; otherwise keep both order and last batch.
        flip: mirror each image with probability one half.
    """

    def __init__(self, images: Tensor, batch_size: int, seed: int, *, train: bool, flip: bool) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.train, self.flip = train, flip

    def __len__(self) -> int:
        """Batches in an epoch."""
        n = len(self.images)
        return n // self.batch_size if self.train else -(-n // self.batch_size)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of uint8 images [B, H, W, C] with their indices [B], from batch `start` on."""
        if self.train:
            # 62 random bits each: the sorted order is the same on every device.
            high, low, *_ = self._random(_ORDER, number)
            order = torch.argsort((high << 30) | (low >> 2), stable=True)
        else:
            order = torch.arange(len(self.images), device=self.images.device)
        flipped = (self._random(_FLIP, number)[0] & 1).bool() if self.flip else None
        for batch in range(start, len(self)):
            index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.images[index]
            if flipped is not None:
                images = torch.where(flipped[index].view(-1, 1, 1, 1), images.flip(2), images)
            yield images, index

    def _random(self, purpose: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four 32-bit words for every image."""
        index = torch.arange(len(self.images), device=self.images.device)
        zero = torch.zeros_like(index)
        key = torch.tensor([self.seed & 0xFFFFFFFF, self.seed >> 32], device=index.device)
        return philox((index, zero + epoch, zero, zero), (key[0] ^ purpose, key[1]))
