"""Weights in safetensors files: compared with a model's before memory is taken for them, and written."""

import json
import os
import reprlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from bvae.errors import UsageError
from bvae.opening import WEIGHTS, open_regular

HEADER = 1 << 24  # most bytes of a safetensors header; a model's has some thousand
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
DTYPES = {**FLOATS, "I64": torch.int64}  # of models, by the names in a header


def read(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file that fit the expected ones, which may be on `meta`.

    The header is compared first: it says how large the file must be, and no more is read.

    Raises:
        UsageError: the file is damaged, or holds other tensors.
        OSError: it cannot be read.
    """
    with open_regular(path, WEIGHTS) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else HEADER + 1
        if length > min(HEADER, size - 8):
            raise UsageError(f"{path} is damaged: it has no header of safetensors")
        header = file.read(length)
        kinds = _parse(path, header)
        if reason := _names_difference(kinds, expected) or _kinds_difference(kinds, expected):
            raise UsageError(f"{path} is not the model that its config.json describes: {reason}")
        needed = sum(kinds[name].dtype.itemsize * value.numel() for name, value in expected.items())
        if size - 8 - length != needed:
            raise UsageError(f"{path} is damaged: its tensors take {size - 8 - length} bytes, not {needed}")
        data = head + header + file.read(needed)
    try:
        found = load(data)
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if reason := difference(found, expected):
        raise UsageError(f"{path}: {reason}")
    return found


class _Kind(NamedTuple):
    """What a header says of a tensor."""

    dtype: Any
    shape: Any


def _parse(path: Path, header: bytes) -> dict[str, _Kind]:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return {name: _Kind(DTYPES.get(e["dtype"], e["dtype"]), e["shape"]) for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is damaged: its header is not one of safetensors") from None


def difference(found: Mapping[Any, Any], expected: Mapping[str, Tensor]) -> str | None:
    """The first reason why tensors cannot take the place of the expected ones; None if they can.

    A tensor must have the shape of the expected one, its dtype or another of floating point if that is one,
    and no `fault`. The expected tensors may be on `meta`.
    """
    if reason := _names_difference(found, expected):
        return reason
    for name, value in expected.items():
        if reason := tensor_difference(found[name], value):
            return f"{name} {reason}"
        if name.endswith("running_var") and not (found[name] >= 0).all():  # BatchNorm takes its root
            return f"{name} is negative"
    return None


def tensor_difference(found: Any, expected: Tensor, finite: bool = True) -> str | None:
    """As `difference`, of one value, which need be no tensor. `finite`: its elements must be."""
    if not isinstance(found, Tensor):
        return f"is no tensor, but {reprlib.repr(found)}"
    return fault(found, finite) or _kind_difference(_Kind(found.dtype, list(found.shape)), expected)


def fault(value: Tensor, finite: bool = True) -> str | None:
    """Why a tensor from a file cannot be used; None if it is plain, dense, real and `finite`, in memory."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
        return "is no plain tensor"
    if value.is_nested or value.is_quantized or value.device.type == "meta":
        return "is no plain tensor"
    if not _is_dense(value):
        return "has elements that overlap, or gaps between them"  # a small file could claim to be a large one
    if value.is_complex():
        return "is complex"
    if finite and value.is_floating_point() and not value.isfinite().all():
        return "is NaN or infinite"
    return None


def _names_difference(found: Mapping[Any, Any], expected: Mapping[str, Tensor]) -> str | None:
    if missing := next((name for name in expected if name not in found), None):
        return f"it lacks {missing}"
    return next((f"the model has no {reprlib.repr(name)}" for name in found if name not in expected), None)


def _kinds_difference(found: Mapping[str, _Kind], expected: Mapping[str, Tensor]) -> str | None:
    reasons = ((name, _kind_difference(found[name], value)) for name, value in expected.items())
    return next((f"{name} {reason}" for name, reason in reasons if reason), None)


def _kind_difference(found: _Kind, expected: Tensor) -> str | None:
    if found.shape != list(expected.shape):
        return f"is {reprlib.repr(found.shape)} instead of {list(expected.shape)}"
    wanted = FLOATS.values() if expected.is_floating_point() else (expected.dtype,)
    return None if found.dtype in wanted else f"is {reprlib.repr(found.dtype)} instead of {expected.dtype}"


def _is_dense(value: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of the dimensions."""
    size = 1
    for stride, length in sorted(zip(value.stride(), value.shape, strict=True)):
        if length > 1 and stride != size:
            return False
        size *= max(length, 1)
    return True


def write(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file, the same for the same tensors and texts.

    safetensors itself writes the metadata in another order in each process.
    """
    data = save(dict(state))
    (length,) = struct.unpack("<Q", data[:8])
    header = {"__metadata__": dict(metadata), **json.loads(data[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of 8
    return struct.pack("<Q", len(text)) + text + data[8 + length :]
