"""Compile layers.cpp when it is first needed, keep the library in the user's cache, and load it.

The compiler is called directly, because the file needs none of torch's headers: two seconds instead of half a
minute, no ninja, and no lock that a killed process leaves behind. Each process that finds no library compiles
its own and renames it into place: whichever is last wins, and all are equal.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from ctypes import CDLL, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from bvae.kernels import launch

SOURCE = Path(__file__).with_name("layers.cpp")
# The instruction sets that torch itself distinguishes; ATEN_CPU_CAPABILITY chooses a smaller one.
ARCHITECTURES = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared"),
    *("-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math"),
)
_RETURN_NOTHING = ("bvae_convolution", "bvae_weight_gradient", "bvae_batch_norm", "bvae_batch_norm_backward")

loaded: CDLL | None = None  # None: plain PyTorch. A run sets it, see `load`


class NotBuilt(Exception):
    """There is no library for this machine; the message says why, in a few words."""


def load() -> CDLL:
    """The library for this machine, compiled if the cache does not hold it; assign it to `loaded` to use it.

    Raises:
        NotBuilt: no compiler, a compiler that fails, a cache that cannot be written, or another processor.
    """
    architecture = ARCHITECTURES.get(torch.backends.cpu.get_cpu_capability())
    if architecture is None:
        raise NotBuilt("they need AVX2")
    path = library_path(architecture)
    if not path.is_absolute():  # a container's user of a number alone
        raise NotBuilt("there is no home folder to keep them in: set XDG_CACHE_HOME")
    try:
        if not path.exists():
            print("Compiling the layers in C++ for this CPU, once: some seconds", file=sys.stderr, flush=True)
            _build(path, architecture)
        library = CDLL(str(path))
        for name in _RETURN_NOTHING:
            getattr(library, name).restype = None
    except (OSError, AttributeError) as error:  # a damaged file too: the next run compiles it again
        path.unlink(missing_ok=True)
        raise NotBuilt(str(error)) from None
    return library


def library_path(architecture: str) -> Path:
    """Where the library of this source, these flags and this compiler is or will be."""
    key = hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS, architecture, _compiler())).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return cache / "bvae" / f"layers-{architecture}-{key.hexdigest()[:16]}.so"


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _build(path: Path, architecture: str) -> None:
    """Compile into a file of this process's own, then rename it. Raises NotBuilt or OSError."""
    compiler = _compiler()
    if not compiler or not shutil.which(compiler[0]):
        raise NotBuilt("they need a C++ compiler: install g++")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".layers-") as folder:
        result = Path(folder, path.name)
        command = [*compiler, *FLAGS, f"-march={architecture}", str(SOURCE), "-o", str(result)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode or not result.exists():
            lines = [line for line in process.stderr.splitlines() if "error" in line.lower()]
            raise NotBuilt(f"{compiler[0]} failed: {(lines or ['no message'])[0].strip()}")
        result.replace(path)


def takes(x: Tensor) -> bool:
    """Whether an input [N, C, H, W] is one for the CPU layers, apart from its dtype: channels_last on a CPU.

    Not inside `torch.func`'s transforms or forward-mode AD, for which these layers have no rule.
    """
    return (
        loaded is not None
        and launch.ENABLED
        and x.device.type == "cpu"
        and x.dim() == 4
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not launch.is_transformed()
    )


def is_graph_wanted() -> bool:
    """In a backward pass: whether it is to be differentiated again; never while it is traced to compile."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def pointer(tensor: Tensor) -> c_void_p:
    """The address of a tensor whose elements the library reads or writes in the order of memory."""
    return c_void_p(tensor.data_ptr())


def rows(x: Tensor) -> Tensor:
    """x [N, C, H, W] as [N, H, W, C] without gaps: no copy in channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()
