"""Decoded images in memory: on the device if they fit, else on the host, copied a few batches ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bvae.pipelines.loader import Loader

SHARE = 0.6  # of a GPU's free memory for images: the model and its graphs need the rest
AHEAD = 2  # batches on their way to the GPU


class DeviceLoader(Loader):
    """Images uint8 [N, H, W, C] on the device that uses them: the host has no work in an epoch."""

    def __init__(self, images: Tensor, batch_size: int, seed: int, **options: Any) -> None:
        super().__init__(len(images), batch_size, seed, images.device, **options)
        self.images = images
        self._order: Tensor | None = None
        self._flipped: Tensor | None = None

    def begin(self, number: int) -> None:
        """Write an epoch's order and flips where `batch` reads them, always at the same addresses."""
        order, flipped = self.plan(number)
        if self._order is None:
            self._order, self._flipped = order, flipped
        else:
            self._order.copy_(order)
            if flipped is not None and self._flipped is not None:
                self._flipped.copy_(flipped)

    def batch(self, position: Tensor) -> Tensor:
        """The images [B, H, W, C] of batch `position` (0-d int64 on the device) of the current epoch.

        They are the same as from `epoch`. Only device operations are used, so a CUDA graph can hold them.
        """
        assert self._order is not None, "begin an epoch first"
        device = self.device
        lane = torch.arange(self.batch_size, device=device)
        index = self._order[(position * self.world_size + self.rank) * self.batch_size + lane]
        if self._flipped is None:
            return self.images[index]
        height, width = self.images.shape[1:3]
        row, column = torch.arange(height, device=device), torch.arange(width, device=device)
        columns = torch.where(self._flipped[index][:, None], width - 1 - column, column)
        return self.images[index[:, None, None], row[:, None], columns[:, None, :]]

    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index in indices:
            yield self.images.index_select(0, index), index  # on a CPU seven times as fast as []


class _Batch(NamedTuple):
    """A batch on its way to the device."""

    images: Tensor
    indices: Tensor
    copied: torch.cuda.Event | None


class HostLoader(Loader):
    """Images uint8 [N, H, W, C] in the host's memory, or mapped from disk.

    A thread gathers the next batches into pinned memory, and a separate stream copies them to the device.
    """

    def __init__(
        self, images: Tensor, batch_size: int, seed: int, device: torch.device, **options: Any
    ) -> None:
        super().__init__(len(images), batch_size, seed, device, **options)
        self.images = images
        # One stream for all epochs: memory that one stream has used cannot be reused by another.
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def _order_device(self) -> torch.device:
        return torch.device("cpu")

    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        side = self._side

        def gather(index: Tensor) -> _Batch:
            # The allocator of pinned memory waits for the copy before it reuses the memory.
            shape, pinned = (len(index), *self.images.shape[1:]), side is not None
            staged = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
            torch.index_select(self.images, 0, index, out=staged)
            with torch.cuda.stream(side):
                images = staged.to(self.device, non_blocking=True)
                indices_on_device = index.to(self.device, non_blocking=True)
                return _Batch(images, indices_on_device, side.record_event() if side else None)

        queue: deque[Future[_Batch]] = deque()
        pool = ThreadPoolExecutor(1)
        try:
            for index in indices:
                queue.append(pool.submit(gather, index))
                if len(queue) > AHEAD:
                    yield self._receive(queue.popleft().result())
            while queue:
                yield self._receive(queue.popleft().result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _receive(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """Order the batch's use after its copy, and the reuse of its memory after its use."""
        if batch.copied:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(batch.copied)
            batch.images.record_stream(stream)
            batch.indices.record_stream(stream)
        return batch.images, batch.indices


def choose_loader(
    images: Tensor, batch_size: int, seed: int, device: torch.device, **options: Any
) -> tuple[DeviceLoader | HostLoader, str]:
    """The loader for images that are mapped from disk, and a line that says where they are kept and why."""
    size = f"{images.nbytes / 1e9:.2f} GB"
    if device.type == "cpu":
        return DeviceLoader(images, batch_size, seed, **options), f"{size} in memory, mapped from disk"
    free, _ = torch.cuda.mem_get_info(device)
    limit = f"{SHARE:.0%} of the {free / 1e9:.1f} GB that are free on it"
    if images.nbytes <= SHARE * free:
        return DeviceLoader(
            images.to(device), batch_size, seed, **options
        ), f"{size} on the GPU, under {limit}"
    line = f"{size} on the host, copied through pinned memory: on the GPU they would take more than {limit}"
    return HostLoader(images, batch_size, seed, device, **options), line
