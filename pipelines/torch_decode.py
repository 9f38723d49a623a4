"""Image files to uint8 batches with torchvision and Pillow, on the CPU's cores."""

import io
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as F

from bvae.errors import UsageError
from bvae.pipelines.decoder import AHEAD, Decoded, cores, reason
from bvae.pipelines.picture import Header, Picture, inspect
from bvae.pipelines.pillow import pixels
from bvae.pipelines.webdataset import ImageFile, read


def decode_bytes(data: bytes, picture: Picture) -> Tensor:
    """One image as uint8 [size, size, channels].

    Raises:
        ValueError: the image is damaged, or smaller than the crop.
        RuntimeError: the JPEG cannot be decoded.
    """
    header = inspect(data)
    if header.kind == "png":
        image = _decode_png(data, header, picture.channels)
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


def _decode_png(data: bytes, header: Header, channels: int) -> Tensor:
    """uint8 [channels, H, W], by Pillow: torchvision's PNG decoder crashes the process on damaged data."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
            if file.size != (header.width, header.height):
                raise UsageError("it has two headers")
            image = pixels(file, channels)
    except Exception as error:  # each kind of damage raises another type
        raise UsageError(f"broken PNG: {error}") from None
    return torch.from_numpy(image).permute(2, 0, 1)


def decode_into(out: Tensor, file: ImageFile, picture: Picture) -> str | None:
    """Decode a file into out, uint8 [size, size, channels]; return what is wrong with the file, or None."""
    try:
        out.copy_(decode_bytes(read(file), picture))
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
