"""The contract of every data set: batches on a device, in an order that is a function of (seed, epoch)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from bvae.kernels.noise import philox

# Each use of the seed has a key of its own, so that order and flips share nothing with the noise.
_ORDER, _FLIP = 0x6F726472, 0x666C6970


class Loader(ABC):
    """Batches of uint8 images [B, H, W, C].

    Args:
        count: images in the data set.
        batch_size: images in a batch.
        seed: the order of an epoch is a function of (seed, epoch), a flip of (seed, epoch, image).
        device: where the batches are.
        train: shuffle, and drop the last batch if it is not full; otherwise keep both order and last batch.
        flip: mirror each image with probability one half.
        rank, world_size: which of how many processes reads. Step s of all of them together takes the s-th
            world_size * batch_size images of the one order; in evaluation they take turns with the batches.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        train: bool,
        flip: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.count, self.batch_size, self.seed, self.device = count, batch_size, seed, device
        self.train, self.flip, self.rank, self.world_size = train, flip, rank, world_size

    def __len__(self) -> int:
        """Batches in an epoch of this rank."""
        if self.train:
            return self.count // (self.batch_size * self.world_size)
        return len(range(self.rank * self.batch_size, self.count, self.world_size * self.batch_size))

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images [B, H, W, C] with their indices [B], from batch `start` on."""
        order, flipped = self.plan(number)
        batches = order.to(self._order_device).split(self.batch_size)
        mine = (batches[step * self.world_size + self.rank] for step in range(start, len(self)))
        for images, index in self._fetch(mine):
            yield (images if flipped is None else _flip(images, flipped[index])), index

    def plan(self, number: int) -> tuple[Tensor, Tensor | None]:
        """An epoch's order of all images, and which of them are mirrored [N], if any; on the device."""
        if self.train:
            # 62 random bits each: the sorted order is the same on every device.
            high, low, *_ = self._random(_ORDER, number)
            order = torch.argsort((high << 30) | (low >> 2), stable=True)
        else:
            order = torch.arange(self.count, device=self.device)
        flipped = (self._random(_FLIP, number)[0] & 1).bool() if self.flip else None
        return order, flipped

    def indices(self, number: int, start: int) -> Tensor:
        """The images [world_size * B] of an epoch's batch `start`, those of all ranks."""
        order, _ = self.plan(number)
        together = self.batch_size * self.world_size
        return order[start * together : (start + 1) * together]

    def head(self, n: int) -> Tensor:
        """The first n images, unflipped, whatever the rank: uint8 [n, H, W, C]."""
        index = torch.arange(min(n, self.count), device=self._order_device)
        return next(self._fetch(iter([index])))[0]

    @property
    def _order_device(self) -> torch.device:
        """Where `_fetch` needs the indices: asking the device for each batch's would make the host wait."""
        return self.device

    @abstractmethod
    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each index tensor [B], and the indices, both on the device."""

    def _random(self, purpose: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four 32-bit words for every image."""
        index = torch.arange(self.count, device=self.device)
        zero = torch.zeros_like(index)
        # not copied over: the host would wait for a GPU that is still busy with the epoch before
        low, high = zero[:1] + ((self.seed & 0xFFFFFFFF) ^ purpose), zero[:1] + (self.seed >> 32)
        return philox((index, zero + epoch, zero, zero), (low, high))


def _flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images [B, H, W, C] for which flipped [B] holds."""
    # a ^ ((b ^ a) & mask) is b under the mask and a elsewhere. In place, it takes a CPU a quarter of the time
    # of torch.where, and needs no large new memory, whose first touch costs as much as the arithmetic.
    given, chosen = images.flatten(1), images.flip(2).flatten(1)
    mask = (flipped.to(images.dtype) * 255)[:, None]
    return chosen.bitwise_xor_(given).bitwise_and_(mask).bitwise_xor_(given).view(images.shape)
