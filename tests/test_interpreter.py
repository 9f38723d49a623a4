"""Triton's interpreter computes with bfloat16 as a GPU does, by the repairs that it still needs."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from noise_kernels import interpreter_fault
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder


def _round(x, y, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def _multiply(a, b, c, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    tl.store(c + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))


@pytest.fixture(autouse=True)
def _works(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if fault := interpreter_fault():
        pytest.skip(fault)


@pytest.fixture
def unpatched(monkeypatch):
    """The interpreter as it comes."""
    for name, method in interpreter.UNPATCHED.items():
        monkeypatch.setattr(InterpreterBuilder, name, method)


def rounded(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(len(x), dtype=torch.bfloat16)
    InterpretedFunction(_round)[(1,)](x, y, len(x))
    return y


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    c = torch.empty(len(a), len(a))
    InterpretedFunction(_multiply)[(1,)](a, b, c, len(a))
    return c


def numbers() -> torch.Tensor:
    """Ties, the largest number, subnormal ones, infinities and random bits."""
    special = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-39, -(2.0**-133), float("inf"), -float("inf")]
    bits = torch.randint(-(2**31), 2**31, (247,), generator=torch.Generator().manual_seed(0))
    random = bits.to(torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(special), random.where(random.isfinite(), 0.0)])


def matrices() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, 16, generator=generator).bfloat16()
    return a, b


def test_float32_is_rounded_to_nearest_and_even():
    x = numbers()
    assert torch.equal(rounded(x).view(torch.int16), x.bfloat16().view(torch.int16))
    assert rounded(torch.tensor([float("nan")] * 2)).isnan().all()


def test_matrices_are_multiplied_as_numbers():
    a, b = matrices()
    torch.testing.assert_close(product(a, b), a.float() @ b.float())


@pytest.mark.usefixtures("unpatched")
def test_the_rounding_still_needs_its_repair():
    assert not torch.equal(rounded(numbers()), numbers().bfloat16()), (
        f"remove it: triton {triton.__version__}"
    )


@pytest.mark.usefixtures("unpatched")
def test_the_product_still_needs_its_repair():
    a, b = matrices()
    same = torch.allclose(product(a, b), a.float() @ b.float())
    assert not same, f"remove it: triton {triton.__version__} multiplies bfloat16"
