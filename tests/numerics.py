"""How tests compare: against float64, with the error of torch in the same dtype as the measure."""

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def worst(x: Tensor, exact: Tensor) -> float:
    """The largest absolute difference."""
    return (x.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_as_good_as_torch(
    ours: Tensor, torchs: Tensor, exact: Tensor, device: torch.device, what: str = ""
) -> None:
    """`max|ours - exact| <= 2 * max|torch's - exact| + atol`, where `exact` is float64 and `torchs` the plain
    PyTorch code in the dtype of the test; atol is two float32 roundings of the largest value, and four where
    `ours` is from a GPU, whose exponential and division are off by up to two."""
    assert ours.shape == exact.shape, what
    atol = (2.0**-21 if device.type == "cuda" else 2.0**-22) * exact.abs().max().item()
    assert worst(ours, exact) <= 2 * worst(torchs, exact) + atol, what


def same_places(a: Tensor, b: Tensor) -> bool:
    """Whether NaN, +inf and -inf stand in the same places."""
    return all(torch.equal(test(a), test(b)) for test in (torch.isnan, torch.isposinf, torch.isneginf))
