"""Images from Python (arrays, tensors, Datasets, Hugging Face datasets) as one uint8 tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from bvae.errors import UsageError
from bvae.pipelines.picture import Picture
from bvae.pipelines.pillow import pixels

CHUNK = 1024  # images converted at a time
COLUMNS = ("image", "img", "images", "pixels")  # of a Hugging Face dataset, tried in this order


def collect(
    images: Any,
    size: int | None = None,
    channels: int | None = None,
    crop: int | None = None,
    name: str = "images",
) -> Tensor:
    """Images as uint8 [N, size, size, channels] on the CPU.

    Images of another size are cropped and resized by the rule of `Picture`.

    Args:
        images: an array or tensor [N, H, W, C], [N, C, H, W] or [N, H, W], uint8, bool or floating point in
            [0, 1]; or a Dataset, or another iterable, of images or of tuples or mappings that hold one: PIL
            images of any size, or arrays and tensors without N of one size.
        size: side in pixels. None: that of the images, which must then be equal squares.
        channels: 1 (grey) or 3 (RGB). None: that of the images.
        crop: side of the centred square to crop, in pixels. None: the largest that fits.
        name: of the argument, for messages.

    Raises:
        UsageError: no images, another shape or dtype, values outside [0, 1], or sizes that differ.
        TypeError: an object of another type.
    """
    if isinstance(images, np.ndarray | Tensor):
        batch = _channels_last(torch.as_tensor(images), name)
        parts: Iterable[Tensor] = batch.split(CHUNK) if len(batch) else ()
    elif isinstance(images, DataLoader):
        raise UsageError(f"{name} must be a Dataset, not a DataLoader: give its .dataset")
    elif isinstance(images, Iterable) or hasattr(images, "__getitem__"):
        parts = _of_items(images, name)
    else:
        raise TypeError(
            f"{name} must be an array, a tensor, a folder or a Dataset of images, got {type(images).__name__}"
        )
    converted_parts = [_convert(part, size, channels, crop, name) for part in parts]
    if not converted_parts:
        raise UsageError(f"{name} holds no images")
    channels = channels or max(part.shape[3] for part in converted_parts)
    shapes = {tuple(part.shape[1:3]) for part in converted_parts}
    if len(shapes) > 1:
        first, second, *_ = (f"{height} x {width}" for height, width in sorted(shapes))
        raise UsageError(
            f"{name} differ in size ({first} and {second} pixels): give image_size to resize them all"
        )
    return torch.cat([_with_channels(part, channels) for part in converted_parts])


def _channels_last(batch: Tensor, name: str) -> Tensor:
    """[N, H, W, C] as a view."""
    shape = list(batch.shape)
    if batch.dim() == 3 and shape[2] not in (1, 3):
        return batch[..., None]
    if batch.dim() == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3):
        return batch
    if batch.dim() == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        return batch.permute(0, 2, 3, 1)
    raise UsageError(
        f"{name} must be [N, H, W, C] or [N, C, H, W] with C 1 (grey) or 3 (RGB), or [N, H, W], got {shape}"
    )


def _convert(batch: Tensor, size: int | None, channels: int | None, crop: int | None, name: str) -> Tensor:
    """uint8 [n, size, size, C] of one batch [n, H, W, C]."""
    converted = _to_uint8(batch.detach().cpu(), name)
    if channels:
        converted = _with_channels(converted, channels)
    height, width = converted.shape[1:3]
    if size is None or height == width == size == (crop or size):
        return converted
    from bvae.pipelines.torch_decode import resize  # imports torchvision, which takes seconds

    top, left, side = Picture(crop, size, converted.shape[3]).square(width, height)
    return resize(converted[:, top : top + side, left : left + side], size)


def _to_uint8(batch: Tensor, name: str) -> Tensor:
    if batch.dtype == torch.uint8:
        return batch
    if batch.dtype == torch.bool:
        return batch.to(torch.uint8) * 255
    if not batch.is_floating_point():
        dtype = str(batch.dtype).removeprefix("torch.")
        raise UsageError(f"{name} must be uint8, or floating point in [0, 1], got {dtype}")
    low, high = (float(bound) for bound in torch.aminmax(batch))
    if low >= 0 and high <= 1:
        return (batch.float() * 255).round().to(torch.uint8)
    if not (np.isfinite(low) and np.isfinite(high)):
        fix = "remove the values that are not finite"
    elif low < 0:
        fix = "give (images + 1) / 2 if they lie in [-1, 1], or undo your normalisation"
    else:
        fix = "divide them by 255, or give uint8"
    raise UsageError(f"{name} of floating point must lie in [0, 1], got {low:.4g} to {high:.4g}: {fix}")


def _with_channels(batch: Tensor, channels: int) -> Tensor:
    """Grey repeated as RGB, or RGB as grey by PIL's weights (ITU-R 601-2)."""
    if batch.shape[3] == channels:
        return batch
    if channels == 3:
        return batch.expand(-1, -1, -1, 3)
    weights = torch.tensor([0.299, 0.587, 0.114])
    return (batch.float() @ weights).round().to(torch.uint8)[..., None]


def _of_items(images: Any, name: str) -> Iterator[Tensor]:
    """The items of a Dataset, in batches; all images of a batch have one size."""
    count = len(images) if isinstance(images, Sized) else None
    # By index where that is possible: iterating a Dataset ends only if it raises IndexError.
    items = map(images.__getitem__, range(count)) if count is not None else iter(images)
    bar = tqdm(items, total=count, desc="reading images", unit=" images", disable=None, delay=1)
    waiting: list[Tensor] = []
    for number, item in enumerate(bar):
        image = _image(item, f"{name}[{number}]")
        if (waiting and waiting[0].shape != image.shape) or len(waiting) == CHUNK:
            yield torch.stack(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.stack(waiting)


def _image(item: Any, name: str) -> Tensor:
    """One item as [H, W, C]."""
    if isinstance(item, Mapping):
        columns = [column for column in (*COLUMNS, *item) if _is_image(item.get(column))]
        if not columns:
            raise UsageError(f"{name} has no column of images, only {', '.join(map(str, item))}")
        item = item[columns[0]]
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, Image.Image):
        item = pixels(item)
    if not isinstance(item, np.ndarray | Tensor):
        raise UsageError(f"{name} must be an image (PIL, array or tensor), got {type(item).__name__}")
    image = torch.as_tensor(item)
    return image[..., None] if image.dim() == 2 else _channels_last(image[None], name)[0]


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray | Tensor) and value.ndim in (2, 3))
