"""Batches straight from the image files, for data that fit neither memory nor disk once decoded."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bvae.errors import UsageError
from bvae.pipelines.decoder import Decoder, cores, reason
from bvae.pipelines.loader import Loader
from bvae.pipelines.picture import Picture, inspect
from bvae.pipelines.webdataset import ImageFile, hold

SMALL = Picture(None, 1, 3)  # for a trial: the pixels are not used


class StreamingLoader(Loader):
    """Files that are decoded each time they are used, some batches ahead."""

    def __init__(
        self,
        files: Sequence[ImageFile],
        decoder: Decoder,
        batch_size: int,
        seed: int,
        device: torch.device,
        **options: Any,
    ) -> None:
        super().__init__(len(files), batch_size, seed, device, **options)
        self.files, self.decoder = files, decoder

    @property
    def _order_device(self) -> torch.device:
        return torch.device("cpu")

    def _fetch(self, indices: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Raises UsageError for a file that cannot be decoded."""
        pending: deque[Tensor] = deque()

        def batches() -> Iterator[list[ImageFile]]:
            for index in indices:
                pending.append(index)
                yield [self.files[i] for i in index.tolist()]

        for images, bad in self.decoder.decode(batches()):
            index = pending.popleft()
            for position, text in bad.items():
                raise UsageError(
                    f"{self.files[int(index[position])]} cannot be decoded: {text}. "
                    "`python -m bvae.data check` finds all such files; repair or remove them"
                )
            yield images.to(self.device), index.to(self.device)


def inspect_files(files: Sequence[ImageFile], label: str) -> dict[int, str]:
    """Read all files; return the positions of damaged ones, and what is wrong.

    Only files whose headers tell little about damage are decoded: those other than plain JPEGs and PNGs.
    """
    from bvae.pipelines.torch_decode import decode_bytes  # torchvision takes seconds

    def find_damage(file: ImageFile) -> str | None:
        try:
            with hold(file) as data:
                header = inspect(data)
                if not header.plain and header.kind != "PNG":
                    decode_bytes(data, SMALL)
        except (RuntimeError, ValueError, OSError) as error:
            return reason(error)
        return None

    with ThreadPoolExecutor(cores()) as pool:
        results: Iterable[str | None] = tqdm(
            pool.map(find_damage, files), total=len(files), desc=label, unit=" images", disable=None
        )
        return {position: text for position, text in enumerate(results) if text}
