"""The layers of PyTorch-VAE's network: `torch.nn`'s, with C++ on a CPU and without an unused counter.

In training, float32 in channels_last on a CPU goes to `kernels/cpu` where it is faster. Everything else, and
every evaluation, is PyTorch's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae import network_ops
from bvae.kernels import launch
from bvae.kernels.cpu import batch_norm, convolution


class Downsample(nn.Conv2d):
    """3 x 3, stride 2: halves height and width, rounded up. Without a bias, for the BatchNorm after it.

    BatchNorm would subtract the bias again: its gradient is zero, but it would cost a pass over the layer.

    Args:
        in_channels, out_channels: of the images.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W]."""
        if self.training and convolution.takes_deep(x, self.weight, transposed=False):
            return convolution.deep(x, self.weight, transposed=False)
        return super().forward(x)


class Upsample(nn.ConvTranspose2d):
    """3 x 3, stride 2, transposed, from `size` to `new_size`, which is 2 size - 1 or 2 size. Without a bias.

    Args:
        in_channels, out_channels: of the images.
        size, new_size: of a side, in pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int, new_size: int) -> None:
        self.grow = new_size - (2 * size - 1)
        super().__init__(
            in_channels, out_channels, 3, stride=2, padding=1, output_padding=self.grow, bias=False
        )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x [N, in_channels, size, size]."""
        if self.training and output_size is None and convolution.takes_deep(x, self.weight, transposed=True):
            return convolution.deep(x, self.weight, transposed=True, output_padding=self.grow)
        return super().forward(x, output_size)


class ToImage(nn.Conv2d):
    """3 x 3, stride 1, to the 1 or 3 channels of an image.

    Args:
        in_channels, out_channels: of the images.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, in_channels, H, W]."""
        if self.training and self.bias is not None and convolution.takes_few(x, self.weight):
            return convolution.few(x, self.weight, self.bias)
        return super().forward(x)


class BatchNormLeakyReLU(nn.BatchNorm2d):
    """`nn.BatchNorm2d` and `nn.LeakyReLU`, except that `num_batches_tracked` stays as it is.

    Only `momentum=None` reads that count, and updating it costs a launch per layer and step. The state dict
    still has it, so that `nn.BatchNorm2d` and this class can load each other's weights.

    BatchNorm keeps its input for the backward pass, not its output, so eager mode can overwrite the output
    with LeakyReLU's: 1.06 times faster on a CPU. When compiled, in place only means that autograd saves the
    result for the backward pass. BatchNorm's backward then reads three tensors, although it could compute the
    sign from two.

    Args:
        num_features: channels.
        negative_slope: the factor for negative values.
    """

    def __init__(self, num_features: int, negative_slope: float = 0.01) -> None:
        super().__init__(num_features)
        self.momentum: float
        self.negative_slope = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W], normalised over N, H and W by the batch's (training) or the running statistics."""
        if self.training and launch.NETWORK and network_ops.has_batch_norm_kernel(x):
            return network_ops.batch_norm_leaky_relu(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                momentum=self.momentum,
                eps=self.eps,
                negative_slope=self.negative_slope,
            )
        if self.training and batch_norm.takes(x):
            y, mean, var = batch_norm.batch_norm_leaky_relu(
                x, self.weight, self.bias, self.eps, self.negative_slope
            )
            network_ops.move_running(self.running_mean, self.running_var, mean, var, self.momentum)
            return y
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,  # type: ignore[arg-type]  # only an argument could make it None
            eps=self.eps,
        )
        return F.leaky_relu(y, self.negative_slope, inplace=not torch.compiler.is_compiling())
