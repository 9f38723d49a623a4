"""Image files to uint8 batches with torchvision and Pillow, on the CPU's cores."""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from bvae.errors import UsageError
from bvae.pipelines.budget import DECODING
from bvae.pipelines.decoder import AHEAD, Decoded, cores, reason
from bvae.pipelines.picture import Header, Picture, inspect
from bvae.pipelines.pillow import pixels, without_text
from bvae.pipelines.webdataset import ImageFile, hold

# Bytes that decoding takes for each pixel, as measured with 80 megapixels: 6 to 12, and 12 to 30.
JPEG, OTHERS = 12, 32


def decode_bytes(data: bytes, picture: Picture) -> Tensor:
    """One image as uint8 [size, size, channels].

    Raises:
        ValueError: the image is damaged, or smaller than the crop.
        RuntimeError: the JPEG cannot be decoded.
    """
    header = inspect(data)
    with DECODING.take(header.width * header.height * (JPEG if header.kind == "JPEG" else OTHERS)):
        return _decode(data, header, picture)


def _decode(data: bytes, header: Header, picture: Picture) -> Tensor:
    """`decode_bytes` of a file whose header was read."""
    if header.kind != "JPEG":
        image = _decode_by_pillow(data, header, picture.channels)
    else:
        mode = ImageReadMode.RGB if picture.channels == 3 else ImageReadMode.GRAY
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = decode_jpeg(encoded, mode=mode, apply_exif_orientation=True)
    top, left, side = picture.square(image.shape[2], image.shape[1])
    square = image[:, top : top + side, left : left + side].permute(1, 2, 0)
    return resize(square[None], picture.size)[0]


def resize(squares: Tensor, size: int) -> Tensor:
    """Antialiased bilinear, from uint8 [B, side, side, C] to [B, size, size, C]: the rule of `Picture`."""
    return F.resize(squares.permute(0, 3, 1, 2), [size, size], antialias=True).permute(0, 2, 3, 1)


def _decode_by_pillow(data: bytes, header: Header, channels: int) -> Tensor:
    """uint8 [channels, H, W]. PNG too, because torchvision's decoder crashes the process on damaged data."""
    try:
        image = _open(data, header, channels)
    except Exception as error:  # each kind of damage raises another type
        if header.kind != "PNG" or (bare := without_text(data)) == data:
            raise UsageError(f"broken {header.kind}: {error}") from None
        return _decode_by_pillow(bare, header, channels)
    return torch.from_numpy(image).permute(2, 0, 1)


def _open(data: bytes, header: Header, channels: int) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=[header.kind]) as file:
        if file.size != (header.width, header.height):
            raise UsageError("it has two headers")
        if header.kind == "TIFF" and file.mode in ("I", "F"):
            raise UsageError("values of 32 bits are not read: convert them to 8 or 16 bits")
        return pixels(file, channels)


def decode_into(out: Tensor, file: ImageFile, picture: Picture) -> str | None:
    """Decode a file into out, uint8 [size, size, channels]; return what is wrong with the file, or None."""
    try:
        with hold(file) as data:
            out.copy_(decode_bytes(data, picture))
    except (RuntimeError, ValueError, OSError) as error:
        return reason(error)
    return None


class TorchDecoder:
    """Decodes batches of files on all cores, some batches ahead."""

    version = f"torchvision {torchvision.__version__}"

    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    def decode(self, batches: Iterable[Sequence[ImageFile]]) -> Iterator[Decoded]:
        """The batches in their order."""
        picture = self.picture
        queue: deque[tuple[Tensor, list[Future[str | None]]]] = deque()

        def finish() -> Decoded:
            images, work = queue.popleft()
            return Decoded(images, {i: text for i, task in enumerate(work) if (text := task.result())})

        # One thread of torch per worker: whole images in parallel scale better than each operation does.
        pool = ThreadPoolExecutor(cores(), initializer=torch.set_num_threads, initargs=(1,))
        try:
            for files in batches:
                images = torch.zeros(
                    len(files), picture.size, picture.size, picture.channels, dtype=torch.uint8
                )
                work = [pool.submit(decode_into, images[i], file, picture) for i, file in enumerate(files)]
                queue.append((images, work))
                if len(queue) > AHEAD:
                    yield finish()
            while queue:
                yield finish()
        finally:  # after an error, Ctrl-C or a reader that stops early, do not decode the files in the queue
            pool.shutdown(cancel_futures=True)
