"""A decoder as a list of plain layers with float16 weights, which decoder.js runs.

The layers are convolutions, transposed or not, views of another shape, and activations. A linear layer is a
convolution of one pixel. BatchNorm is folded into the convolution before it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvae.errors import UsageError
from bvae.infogan_model import InfoGAN
from bvae.layers import BatchNormLeakyReLU
from bvae.model import BetaVAE

TOLERANCE = 1 / 255  # of the range: one level of a pixel; float16 costs the drawn faces' model a fifth of it
CODES = 8  # decoded both ways to measure that error


class Layers(NamedTuple):
    """A decoder, from z to an image in the range of its activation."""

    layers: list[dict[str, Any]]  # in order; `kind` says which
    weights: Tensor  # float16, of all convolutions in order: [kernel, kernel, in, out], then the bias [out]


class _Convolution(NamedTuple):
    options: dict[str, Any]
    weight: Tensor  # float64 [kernel, kernel, in, out]
    bias: Tensor  # float64 [out]


@torch.no_grad()
def export(model: BetaVAE) -> Layers:
    """The decoder's layers.

    Raises:
        UsageError: an InfoGAN, a network of one's own that is not a row of such layers, or weights that
            float16 cannot hold. This is measured: a few codes are decoded with the layers and with the model.

    >>> model = BetaVAE(latent_dim=10, hidden_dims=(4, 8), image_size=32)
    >>> [layer["kind"] for layer in export(model.eval()).layers][:4]
    ['convolution', 'view', 'convolution', 'leaky_relu']
    """
    if isinstance(model, InfoGAN):
        raise UsageError("an InfoGAN has categories where the page has sliders: use bvae.traverse")
    try:
        model = copy.deepcopy(model).float().cpu().eval()  # a GPU may compute float32 as TF32
        exported = _export(model)
        z = torch.randn(CODES, model.latent_dim, generator=torch.Generator().manual_seed(0))
        error = (decode(exported, z) - model.decode(z)).abs().max().item()
    except RuntimeError as mismatch:  # shapes that do not follow from one another
        raise UsageError(f"the decoder is not a row of layers: {str(mismatch).splitlines()[0]}") from None
    if not exported.weights.isfinite().all():
        raise UsageError("the decoder has weights beyond float16's 65504")
    low, high = model.pixel_range
    if not error <= TOLERANCE * (high - low):  # NaN too
        raise UsageError(f"the decoder's layers in float16 give pixels that differ by {error:.2g}")
    return exported


def _export(model: BetaVAE) -> Layers:
    layers: list[dict[str, Any] | _Convolution] = []
    for module in _in_order(model.decoder_input):
        _append(layers, module)
    layers.append(_view(model.code_shape))
    for module in _in_order(model.decoder):
        _append(layers, module)
    layers.append({"kind": model.activation})
    convolutions = [layer for layer in layers if isinstance(layer, _Convolution)]
    numbers = [part.flatten() for layer in convolutions for part in (layer.weight, layer.bias)]
    options = [layer.options if isinstance(layer, _Convolution) else layer for layer in layers]
    return Layers(options, torch.cat(numbers).to(torch.float16))


def decode(exported: Layers, z: Tensor) -> Tensor:
    """What decoder.js does: z [N, latent_dim] to images [N, C, H, W], float32 on the CPU."""
    weights, used = exported.weights.float(), 0
    x = z[:, :, None, None]
    for layer in exported.layers:
        kind = layer["kind"]
        if kind == "view":
            x = x.reshape(-1, *layer["shape"])
        elif kind == "convolution":
            shape = (layer["kernel"], layer["kernel"], x.shape[1], layer["channels"])
            size = shape[0] * shape[1] * shape[2] * shape[3]
            weight = weights[used : used + size].view(shape)
            bias = weights[used + size : used + size + shape[3]]
            used += size + shape[3]
            where = {"stride": layer["stride"], "padding": layer["padding"]}
            if layer["transposed"]:
                grow = layer["output_padding"]
                x = F.conv_transpose2d(x, weight.permute(2, 3, 0, 1), bias, output_padding=grow, **where)
            else:
                x = F.conv2d(x, weight.permute(3, 2, 0, 1), bias, **where)
        elif kind == "leaky_relu":
            x = F.leaky_relu(x, layer["slope"])
        else:
            x = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[kind](x)
    return x


def _in_order(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of a Sequential, and of those in it."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _in_order(child)
    else:
        yield module


def _append(layers: list[dict[str, Any] | _Convolution], module: nn.Module) -> None:
    """Add a module's layer to the list, or change the last one by a BatchNorm."""
    if isinstance(module, nn.BatchNorm2d):
        if not layers or not isinstance(layers[-1], _Convolution) or module.running_var is None:
            raise UsageError("the decoder has a BatchNorm2d that does not follow a convolution")
        layers[-1] = _fold(layers[-1], module)
        if isinstance(module, BatchNormLeakyReLU):
            layers.append({"kind": "leaky_relu", "slope": module.negative_slope})
        return
    for kind, convert in KNOWN.items():
        if isinstance(module, kind):
            layers.append(convert(module))
            return
    raise UsageError(f"the decoder has a {type(module).__name__}, which is none of the layers known here")


def _fold(layer: _Convolution, norm: nn.BatchNorm2d) -> _Convolution:
    """The convolution with the BatchNorm after it, in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    bias = (layer.bias - norm.running_mean.double()) * scale + shift
    return layer._replace(weight=layer.weight * scale, bias=bias)


def _convolution(module: nn.Conv2d | nn.ConvTranspose2d) -> _Convolution:
    transposed = isinstance(module, nn.ConvTranspose2d)
    sizes = module.kernel_size, module.stride, module.padding, module.output_padding
    plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    if not plain or any(isinstance(size, str) or size[0] != size[1] for size in sizes):
        raise UsageError(f"the decoder has a convolution that is not a plain square one: {module}")
    kernel, stride, padding, grow = (int(size[0]) for size in sizes)
    weight = module.weight.double().permute(*((2, 3, 0, 1) if transposed else (2, 3, 1, 0)))
    options = {"kernel": kernel, "stride": stride, "padding": padding, "output_padding": grow}
    return _layer(weight, module.bias, transposed=transposed, **options)


def _linear(module: nn.Linear) -> _Convolution:
    weight = module.weight.double().t()[None, None]
    return _layer(weight, module.bias, transposed=False, kernel=1, stride=1, padding=0, output_padding=0)


def _layer(weight: Tensor, bias: Tensor | None, **options: Any) -> _Convolution:
    channels = weight.shape[3]
    values = torch.zeros(channels, dtype=torch.float64) if bias is None else bias.double()
    return _Convolution({"kind": "convolution", "channels": channels, **options}, weight, values)


def _view(shape: Sequence[int]) -> dict[str, Any]:
    """Channels, height and width; a vector is an image of one pixel."""
    if len(shape) not in (1, 3):
        raise UsageError(f"the decoder has a view of {list(shape)}, which is no image and no vector")
    return {"kind": "view", "shape": [*shape, 1, 1][:3]}


KNOWN: dict[type[nn.Module], Callable[[Any], dict[str, Any] | _Convolution]] = {
    nn.Conv2d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.Linear: _linear,
    nn.Unflatten: lambda module: _view(module.unflattened_size),
    nn.ReLU: lambda module: {"kind": "leaky_relu", "slope": 0.0},
    nn.LeakyReLU: lambda module: {"kind": "leaky_relu", "slope": module.negative_slope},
    nn.Tanh: lambda module: {"kind": "tanh"},
    nn.Sigmoid: lambda module: {"kind": "sigmoid"},
}
