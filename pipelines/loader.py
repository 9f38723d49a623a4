"""The contract of every data set: batches on a device, in an order that is a function of (seed, epoch)."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from bvae.kernels.noise import philox

# Each use of the seed has its own key, so that order, flips and noise are independent.
_ORDER, _FLIP = 0x6F726472, 0x666C6970


class Loader(ABC):
    """Batches of uint8 images [B, H, W, C].

    Args:
        count: images in the data set.
        batch_size: images in a batch.
        seed: the order of an epoch is a function of (seed, epoch), a flip of (seed, epoch, image).
        device: of the batches.
        train: shuffle, and drop the last batch if it is not full. False keeps the order and the last batch.
        flip: mirror each image with probability one half.
        rank, world_size: this process's number, and the number of processes. In training, step s of all of
            them takes the s-th world_size * batch_size images of one common order; in evaluation the batches
            go to the processes in turn.
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
        """Batches of images [B, H, W, C] with their indices [B], starting at batch `start`."""
        order, flipped = self.plan(number)
        batches = order.to(self._order_device).split(self.batch_size)
        own_batches = (batches[step * self.world_size + self.rank] for step in range(start, len(self)))
        for images, index in self._fetch(own_batches):
            yield (images if flipped is None else _flip(images, flipped[index])), index

    def plan(self, number: int) -> tuple[Tensor, Tensor | None]:
        """An epoch's order of all images [N], and a mask of the mirrored ones [N] or None; on the device."""
        if self.train:
            # 62 random bits each: the sorted order is the same on every device.
            high, low, *_ = self._random(_ORDER, number)
            order = torch.argsort((high << 30) | (low >> 2), stable=True)
        else:
            order = torch.arange(self.count, device=self.device)
        flipped = (self._random(_FLIP, number)[0] & 1).bool() if self.flip else None
        return order, flipped

    def indices(self, number: int, start: int) -> Tensor:
        """The indices [world_size * B] of an epoch's batch `start`, for all ranks together."""
        order, _ = self.plan(number)
        whole_batch = self.batch_size * self.world_size
        return order[start * whole_batch : (start + 1) * whole_batch]

    def head(self, n: int) -> Tensor:
        """The first n images, unflipped, the same on every rank: uint8 [n, H, W, C]."""
        index = torch.arange(min(n, self.count), device=self._order_device)
        return next(self._fetch(iter([index])))[0]

    @property
    def _order_device(self) -> torch.device:
        """The device on which `_fetch` needs the indices: a copy from a GPU would make the host wait."""
        return self.device

    @abstractmethod
    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of each index tensor [B], and the indices, both on the device."""

    def _random(self, purpose: int, epoch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Four 32-bit words for every image."""
        index = torch.arange(self.count, device=self.device)
        zero = torch.zeros_like(index)
        # computed on the device: with a copy, the host would wait for a GPU that is busy with the last epoch
        low, high = zero[:1] + ((self.seed & 0xFFFFFFFF) ^ purpose), zero[:1] + (self.seed >> 32)
        return philox((index, zero + epoch, zero, zero), (low, high))


def _flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the images [B, H, W, C] where flipped [B] is true."""
    # a ^ ((b ^ a) & mask) is b under the mask and a elsewhere. In place, it takes a CPU a quarter of the time
    # of torch.where, and needs no large new memory, whose first touch costs as much as the arithmetic.
    original, mirrored = images.flatten(1), images.flip(2).flatten(1)
    mask = (flipped.to(images.dtype) * 255)[:, None]
    return mirrored.bitwise_xor_(original).bitwise_and_(mask).bitwise_xor_(original).view(images.shape)
