"""Read what torch.save wrote without running anything that is pickled in it.

A pickle names functions and classes to call. Here the names of tensors' parts alone have their meaning. Every
other name is a class of stand-ins that do nothing, so that a file with a training loop's objects, or a
malicious one, still gives its tensors.
"""

import io
import pickle
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bvae.errors import UsageError
from bvae.opening import WEIGHTS, read_bytes


class Inert(dict[Any, Any]):
    """Takes the place of an object of another class: takes everything and does nothing."""

    origin = ""  # the class's name in the file
    is_module = False  # whether it was a torch module
    dump_patches = False  # what torch asks a module's class from old files

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        return dict.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        return Inert()

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...


def load(path: str | Path) -> Any:
    """The content of a file of torch.save: tensors and plain values on the CPU, `Inert` for all else.

    Raises:
        UsageError: the file is something else, too long or damaged; the message says which.
        OSError: it cannot be read.
    """
    data = read_bytes(path, WEIGHTS)
    head = data[:200].lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")
    if head[:1] == b"<":
        raise UsageError(f"{path} is a web page, not a checkpoint: download it again")
    if not head:
        raise UsageError(f"{path} is empty")
    try:
        if _is_torchscript(data):  # torch would compile its code
            raise UsageError(
                f"{path} is a TorchScript program: save the model's state_dict() with torch.save"
            )
        # weights_only has a list of its own, and refuses the whole file for one name that is not on it.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the source of a stand-in has changed
            return torch.load(io.BytesIO(data), map_location="cpu", pickle_module=_MODULE, weights_only=False)
    except (UsageError, MemoryError):
        raise
    except Exception:  # any type; torch's message is left out: it says how to run the file's code
        raise UsageError(f"{path} is not a file of torch.save, or is damaged") from None


def _is_torchscript(data: bytes) -> bool:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    tensor: Tensor = torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))
    return tensor


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    return function(*arguments)


_MEANINGS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): Inert,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
}


_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # BUILD can be replaced in it


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if meaning := _MEANINGS.get((module, name)):
            return meaning
        if module == "torch" and (
            name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(torch, name)
        return type("Inert", (Inert,), {"origin": f"{module}.{name}"})

    def build(self) -> None:
        """Drop an object's state: setting it could change what the names above mean."""
        state = self.stack.pop()
        instance = self.stack[-1]
        if isinstance(instance, Inert) and isinstance(state, dict) and "_modules" in state:
            instance.is_module = True

    dispatch[pickle.BUILD[0]] = build


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_MODULE = types.SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="inert_pickle")
