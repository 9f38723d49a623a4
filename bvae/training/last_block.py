"""The decoder in a training step: where it can, the kernel of the last block computes the errors too."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bvae.kernels import launch
from bvae.layers import BatchNormLeakyReLU, ToImage
from bvae.losses import AnnealedBeta, BetaLoss, CapacityLoss
from bvae.model import BetaVAE
from bvae.network_ops import has_last_block_kernel, last_block


class Errors(NamedTuple):
    """What `bvae.ops.last_block` gives instead of the decoder's output."""

    sums: Tensor  # [B], of an image's errors
    squares: Tensor  # [B], of its squared errors in the decoder's range; no gradient
    elements: int  # of an image


def decode(model: BetaVAE, loss: nn.Module, z: Tensor, target: Tensor) -> Tensor | Errors:
    """The decoder's raw output for z [B, latent_dim]; or its errors, if the last block's kernel gives them.

    It does with the network's kernels on, for PyTorch-VAE's network in training, sizes and dtypes that it
    takes, and this library's losses in the model's range of pixels. A user's loss needs the output itself.

    Args:
        target: uint8 images [B, C, H, W].
    """
    parts = ending(model.decoder) if launch.NETWORK else None
    if parts is None:
        return model.decode_raw(z)
    before, norm, to_image = parts
    x = model.decoder_input(z).view(-1, *model.code_shape)
    x = x.contiguous(memory_format=torch.channels_last)  # kept for backward: compilers copy it twice
    for module in before:
        x = module(x)
    if not takes(model, loss, norm, to_image, x):
        return to_image(norm(x))
    assert isinstance(loss, BetaLoss | CapacityLoss)
    assert to_image.bias is not None
    objective = loss.objective()
    errors, squares = last_block(
        x,
        norm.weight,
        norm.bias,
        to_image.weight,
        to_image.bias,
        target,
        objective,
        norm.running_mean,
        norm.running_var,
        momentum=norm.momentum,
        eps=norm.eps,
        negative_slope=norm.negative_slope,
    )
    return Errors(errors, squares, target[0].numel())


def takes(model: BetaVAE, loss: nn.Module, norm: BatchNormLeakyReLU, to_image: ToImage, x: Tensor) -> bool:
    """Whether the kernel computes the last block from x, the input of its BatchNorm `norm`."""
    if type(loss) not in (BetaLoss, AnnealedBeta, CapacityLoss) or not norm.training or to_image.bias is None:
        return False
    assert isinstance(loss, BetaLoss | CapacityLoss)
    objective = loss.objective()
    fits = objective.pixel_range == model.pixel_range
    return fits and has_last_block_kernel(x, to_image.weight, objective)


def ending(decoder: nn.Module) -> tuple[list[nn.Module], BatchNormLeakyReLU, ToImage] | None:
    """The modules of PyTorch-VAE's decoder before its last block, and the block's two; None for another."""
    if not isinstance(decoder, nn.Sequential) or len(decoder) < 2:
        return None
    *blocks, block, to_image = decoder.children()
    if not isinstance(block, nn.Sequential) or len(block) == 0:
        return None
    *layers, norm = block.children()
    if type(norm) is BatchNormLeakyReLU and type(to_image) is ToImage:
        return [*blocks, *layers], norm, to_image
    return None
