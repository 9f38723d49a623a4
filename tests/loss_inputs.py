"""What a decoder, a data set and an encoder hand to a loss, in miniature."""

import torch
from torch import Tensor

SHAPE = (5, 3, 12, 20)


def decoder_output(dtype: torch.dtype, device: torch.device, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """What a channels_last decoder gives."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return x.to(memory_format=torch.channels_last).requires_grad_()


def pixels(device: torch.device, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """uint8 images `[B, C, H, W]` that lie in memory as `[B, H, W, C]`."""
    n, c, h, w = shape
    data = torch.randint(256, (n, h, w, c), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return data.to(device).permute(0, 3, 1, 2)


def divergence(device: torch.device, batch: int = 5) -> Tensor:
    """KL per image, nats, around 15: above C at step 3000, below it at step 10000."""
    return (
        (10 + 10 * torch.rand(batch, generator=torch.Generator().manual_seed(2))).to(device).requires_grad_()
    )
