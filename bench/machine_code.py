"""Show the machine code of the kernels, without a GPU: `python bench/machine_code.py [sm_90 ...]`.

Each case is a launch of the training, planned on meta tensors by the launcher itself, and compiled as its
first call on the device would compile it. Prints a Markdown table.
"""

import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bvae.kernels import batch_norm, capacity_loss, image_errors, last_block, reparam_kl, total_correlation
from bvae.kernels import launch as kernel_launch
from bvae.kernels.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def _latents(*shape: int, channels_last: bool = False) -> tuple[Tensor, ...]:
    """mu, log_var as from an encoder's heads: the halves of one tensor, `shape` each."""
    both = torch.empty(shape[0], 2 * shape[1], *shape[2:], dtype=torch.bfloat16, device="meta")
    if channels_last:
        both = both.to(memory_format=torch.channels_last)
    return both.chunk(2, 1)


def _scalar(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty((), dtype=dtype, device="meta")


def _sample(latents: tuple[Tensor, ...], per_dim: bool = False) -> Launch:
    return reparam_kl.plan_forward(*latents, _scalar(), _scalar(), None, per_dim)[0]


def _sample_backward(latents: tuple[Tensor, ...]) -> Launch:
    mu, log_var = latents
    grad_kl = torch.empty(mu.shape[0], device="meta")
    key = torch.empty(2, dtype=torch.int64, device="meta")
    return reparam_kl.plan_backward(mu, log_var, key, torch.empty_like(mu), grad_kl, None, None)[0]


def _images(dtype: torch.dtype, channels_last: bool = True, batch: int = 144) -> Tensor:
    images = torch.empty(batch, 3, 64, 64, dtype=dtype, device="meta")
    return images.to(memory_format=torch.channels_last) if channels_last else images


def _loss(recon: Tensor, target: Tensor, likelihood: str, activation: str | None, with_grad: bool) -> Launch:
    options = capacity_loss.Options(0.3, 25.0, 10_000, likelihood, activation, "mean", 0.5, -1.0)
    kl, kl_scale = torch.empty(recon.shape[0], device="meta"), _scalar(torch.float32)
    return capacity_loss.plan_forward(recon, target, kl, _scalar(), kl_scale, with_grad, options)[0]


def _loss_backward(recon: Tensor) -> Launch:
    one, batch = _scalar(torch.float32), recon.shape[0]
    grads = one, None, None
    return capacity_loss.plan_backward(torch.empty_like(recon), one, *grads, 1.0, batch, torch.float32)[0]


def _image_errors(likelihood: str, activation: str | None) -> Launch:
    low = 0.0 if likelihood in ("bernoulli", "probabilities") else -1.0
    options = True, likelihood, activation, 0.1, low
    return image_errors.plan_forward(_images(BF16), _images(U8), *options)[0]


def _image_errors_backward() -> Launch:
    return image_errors.plan_backward(_images(BF16), torch.empty(144, device="meta"), 2.0)[0]


def _correlation(batch: int, latents: int) -> Launch:
    mu, log_var = _latents(batch, latents)
    return total_correlation.plan_forward(torch.empty_like(mu), mu, log_var, -5.0, -1.0)[0]


def _correlation_backward(batch: int, latents: int, which: int) -> Launch:
    mu, log_var = _latents(batch, latents)
    log2_joint, log2_marginals = (torch.empty(s, device="meta") for s in ((batch,), (batch, latents)))
    inputs = torch.empty_like(mu), mu, log_var, log2_joint, log2_marginals
    return total_correlation.plan_backward(*inputs, log2_joint, log2_joint, -5.0, -1.0)[0][which]


def _features(channels: int, size: int, dtype: torch.dtype, batch: int) -> Tensor:
    x = torch.empty(batch, channels, size, size, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last)


def _norm(
    channels: int, size: int, number: int, dtype: torch.dtype = torch.bfloat16, batch: int = 144
) -> Launch:
    """A forward launch of BatchNorm and LeakyReLU: 0 has the statistics, 1 applies them."""
    x, vector = _features(channels, size, dtype, batch), torch.empty(channels, device="meta")
    return batch_norm.plan_forward(x, vector, vector, 1e-5, 0.01)[0][number]


def _norm_backward(channels: int, size: int, number: int, batch: int = 144) -> Launch:
    """A backward launch: 0 reduces, 1 has the gradient of the input."""
    x, vector = _features(channels, size, BF16, batch), torch.empty(channels, device="meta")
    return batch_norm.plan_backward(x, x, *[vector] * 4, 0.01)[0][number]


def _block(
    channels: int = 32,
    size: int = 64,
    likelihood: str = "gaussian",
    activation: str | None = "tanh",
    batch: int = 144,
) -> Launch:
    """The last block's forward launch, after the statistics."""
    vector, bias = torch.empty(channels, device="meta"), torch.empty(3, device="meta")
    weight = torch.empty(3, channels, 3, 3, device="meta").to(memory_format=torch.channels_last)
    tensors = _features(channels, size, BF16, batch), vector, vector, weight, bias, _images(U8, batch=batch)
    return last_block.plan_forward(*tensors, True, 1e-5, 0.01, likelihood, activation, 0.1, -1.0)[0][1]


def _block_backward(number: int, batch: int = 144) -> Launch:
    """A backward launch: 0 reduces, 1 adds the programs' sums, 2 has the gradient of the input."""
    vector, errors = torch.empty(32, device="meta"), torch.empty(batch, device="meta")
    weight = torch.empty(3, 32, 3, 3, device="meta").to(memory_format=torch.channels_last)
    x, grad = _features(32, 64, BF16, batch), torch.empty(batch, 64, 64, 3, dtype=BF16, device="meta")
    saved = x, vector, vector, weight, grad, torch.empty(batch, 3, device="meta"), vector, vector
    return last_block.plan_backward(*saved, errors, 2.0, 0.01)[0][number]


BF16, U8 = torch.bfloat16, torch.uint8
CASES: dict[str, Callable[[], Launch]] = {
    "sample, [144, 128]": lambda: _sample(_latents(144, 128)),
    "sample, [144, 128], backward": lambda: _sample_backward(_latents(144, 128)),
    "sample, [144, 128], per dimension": lambda: _sample(_latents(144, 128), per_dim=True),
    "sample, [64, 4, 64, 64]": lambda: _sample(_latents(64, 4, 64, 64)),
    "sample, [64, 4, 64, 64], backward": lambda: _sample_backward(_latents(64, 4, 64, 64)),
    "sample, [64, 4, 64, 64], channels last": lambda: _sample(_latents(64, 4, 64, 64, channels_last=True)),
    "sample, [144, 4, 64, 64], per dimension": lambda: _sample(_latents(144, 4, 64, 64), per_dim=True),
    "loss, tanh": lambda: _loss(_images(BF16), _images(U8), "gaussian", "tanh", True),
    "loss, tanh, evaluation": lambda: _loss(_images(BF16), _images(U8), "gaussian", "tanh", False),
    "loss, bernoulli": lambda: _loss(_images(BF16), _images(U8), "bernoulli", None, True),
    "loss, tanh, recon NCHW": lambda: _loss(_images(BF16, False), _images(U8), "gaussian", "tanh", True),
    "loss, backward": lambda: _loss_backward(_images(BF16)),
    "loss, laplace": lambda: _loss(_images(BF16), _images(U8), "laplace", "tanh", True),
    "loss, logistic": lambda: _loss(_images(BF16), _images(U8), "logistic", "tanh", True),
    "loss, probabilities": lambda: _loss(_images(BF16), _images(U8), "probabilities", None, True),
    "errors per image, tanh": lambda: _image_errors("gaussian", "tanh"),
    "errors per image, laplace": lambda: _image_errors("laplace", "tanh"),
    "errors per image, logistic": lambda: _image_errors("logistic", "tanh"),
    "errors per image, bernoulli": lambda: _image_errors("bernoulli", None),
    "errors per image, probabilities": lambda: _image_errors("probabilities", None),
    "errors per image, backward": _image_errors_backward,
    **{
        f"total correlation, [144, {latents}]{suffix}": case
        for latents in (10, 128, 512)
        for suffix, case in (
            ("", partial(_correlation, 144, latents)),
            (", backward, samples", partial(_correlation_backward, 144, latents, 0)),
            (", backward, posteriors", partial(_correlation_backward, 144, latents, 1)),
        )
    },
    "BatchNorm, 32 at 64 x 64, statistics": lambda: _norm(32, 64, 0),
    "BatchNorm, 32 at 64 x 64, apply": lambda: _norm(32, 64, 1),
    "BatchNorm, 32 at 64 x 64, reduce": lambda: _norm_backward(32, 64, 0),
    "BatchNorm, 32 at 64 x 64, gradient": lambda: _norm_backward(32, 64, 1),
    "BatchNorm, 32 at 64 x 64, statistics, float32": lambda: _norm(32, 64, 0, torch.float32),
    "BatchNorm, 256 at 4 x 4": lambda: _norm(256, 4, 0),
    "BatchNorm, 256 at 4 x 4, backward": lambda: _norm_backward(256, 4, 0),
    "last block": _block,
    "last block, logistic": lambda: _block(likelihood="logistic"),
    "last block, bernoulli": lambda: _block(likelihood="bernoulli", activation=None),
    "last block, reduce": lambda: _block_backward(0),
    "last block, sums": lambda: _block_backward(1),
    "last block, gradient": lambda: _block_backward(2),
}


def batch_variants(batch: int) -> dict[str, Launch]:
    """Launches that differ only in the batch size: the last batch of an epoch is shorter."""
    recon, nchw = _images(BF16, batch=batch), _images(BF16, False, batch)
    target = _images(U8, batch=batch)
    return {
        "loss": _loss(recon, target, "gaussian", "tanh", True),
        "loss, recon NCHW": _loss(nchw, target, "gaussian", "tanh", True),
        "loss, backward": _loss_backward(recon),
        "sample, [., 128]": _sample(_latents(batch, 128)),
        "sample, [., 128], per dimension": _sample(_latents(batch, 128), per_dim=True),
        "sample, [., 4, 64, 64], per dimension": _sample(_latents(batch, 4, 64, 64), per_dim=True),
        "sample, [., 128], backward": _sample_backward(_latents(batch, 128)),
        "total correlation, [., 128]": _correlation(batch, 128),
        "total correlation, [., 128], backward, samples": _correlation_backward(batch, 128, 0),
        "total correlation, [., 128], backward, posteriors": _correlation_backward(batch, 128, 1),
        "BatchNorm, statistics": _norm(32, 64, 0, batch=batch),
        "BatchNorm, apply": _norm(32, 64, 1, batch=batch),
        "BatchNorm, reduce": _norm_backward(32, 64, 0, batch),
        "BatchNorm, gradient": _norm_backward(32, 64, 1, batch),
        "last block": _block(batch=batch),
        "last block, reduce": _block_backward(0, batch),
        "last block, sums": _block_backward(1, batch),
        "last block, gradient": _block_backward(2, batch),
        "BatchNorm, few rows": _norm(512, 2, 0, batch=batch),
        "BatchNorm, few rows, backward": _norm_backward(512, 2, 0, batch),
    }


_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def _specialise(value: object) -> tuple[str, bool]:
    """A launch argument's type in the kernel's signature, and whether it is a multiple of 16."""
    if isinstance(value, Tensor):
        return _TYPES[value.dtype], value.storage_offset() * value.element_size() % 16 == 0
    if value is None or (value == 1 and not isinstance(value, float)):
        return "constexpr", False
    if isinstance(value, float):
        return "fp32", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def specialisation(launch: Launch) -> tuple[dict[str, object], dict, dict]:
    """The specialisation of a kernel: the types of `launch`'s arguments, the constants, the alignments."""
    signature: dict[str, object] = {}
    constants: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}

    def specialise(path: tuple[int, ...], value: object) -> str:
        kind, aligned = _specialise(value)
        if kind == "constexpr":
            constants[path] = value
        elif aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for index, parameter in enumerate(launch.kernel.params):
        value = launch.args[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[index,] = "constexpr", value
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(specialise((index, i), leaf) for i, leaf in enumerate(value))
        else:
            signature[parameter.name] = specialise((index,), value)
    return signature, constants, attributes


def compile_launch(launch: Launch, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """The kernel of `launch`, specialised to its arguments as by Triton on `target`."""
    source = ASTSource(launch.kernel, *specialisation(launch))
    return triton.compile(source, target=target, options=launch.options)


@dataclass(frozen=True)
class MachineCode:
    """The machine code of one kernel on one target. Widths are counted in its main loop, if it has one."""

    registers: int  # per thread; VGPRs on AMD
    spilled: int  # bytes of local memory per thread on NVIDIA, vector registers on AMD
    shared: int  # bytes per program
    loads: dict[int, int]  # width in bytes: number of instructions that load from global memory
    stores: dict[int, int]
    bytes_per_element: float | None  # loaded and stored by the main loop
    exact_divisions: int  # correctly rounded, on NVIDIA
    products: list[str]  # the kinds of instructions that multiply matrices


# Patterns for an access to global memory, a label and a jump: SASS, and AMD's assembly
_SASS = {
    "access": re.compile(r"\b(LDG|STG)\.E((?:\.\w+)*)"),
    "label": re.compile(r"^(\.L_x_\d+):"),
    "jump": re.compile(r"\bBRA\b.*\((\.L_x_\d+)\)"),
}
_AMDGCN = {
    "access": re.compile(r"\b(?:global|buffer)_(load|store)_(\w+)"),
    "label": re.compile(r"^(\.LBB\d+_\d+):"),
    "jump": re.compile(r"\bs_c?branch\w*\s+(\.LBB\d+_\d+)"),
}
_PRODUCTS = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|v_mfma)")  # of a warp group, a warp, an SM; of AMD
_AMD_WIDTHS = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "short": 2,
    "ubyte": 1,
    "byte": 1,
}


def _width(modifiers: str) -> int:
    """The bytes that a memory instruction moves per thread."""
    if modifiers.startswith("."):  # SASS: .U8, .S16, .64, .128, .256; 32 bits if none is named
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", modifiers)
        return int(bits[1]) // 8 if bits else 4
    return next((w for name, w in _AMD_WIDTHS.items() if modifiers.startswith(name)), 4)


def _main_loop(lines: list[str], syntax: dict[str, re.Pattern[str]]) -> list[str] | None:
    """The first loop that touches global memory, without the loops inside it."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := syntax["label"].search(line))}
    jumps = [(i, labels.get(m[1], i)) for i, line in enumerate(lines) if (m := syntax["jump"].search(line))]
    loops = sorted((start, -end) for end, start in jumps if start < end)
    for start, minus_end in loops:
        inner = [(s, -e) for s, e in loops if s > start and -e < -minus_end]
        body = [i for i in range(start, 1 - minus_end) if not any(s <= i <= e for s, e in inner)]
        if any(syntax["access"].search(lines[i]) for i in body):
            return [lines[i] for i in body]
    return None


def _accesses(lines: Iterable[str], syntax: dict[str, re.Pattern[str]]) -> tuple[Counter[int], Counter[int]]:
    """The number of loads and of stores of each width."""
    loads, stores = Counter[int](), Counter[int]()
    for line in lines:
        if match := syntax["access"].search(line):
            (stores if match[1] in ("STG", "store") else loads)[_width(match[2] or ".")] += 1
    return loads, stores


def _nvidia(kernel: triton.compiler.CompiledKernel) -> tuple[list[str], int, int]:
    """SASS, registers, bytes of local memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])

        def run(tool: str, option: str) -> str:
            command = [getattr(triton.knobs.nvidia, tool).path, option, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run("cuobjdump", "--dump-resource-usage")))
        return (
            run("nvdisasm", "-c").splitlines(),
            int(usage["REG"]),
            int(usage["STACK"]) + int(usage["LOCAL"]),
        )


def _amd(kernel: triton.compiler.CompiledKernel) -> tuple[list[str], int, int]:
    """Assembly, vector registers, spilled ones: a scalar register spills to a lane of one, not to memory."""
    assembly = kernel.asm["amdgcn"]
    numbers = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly))
    return assembly.splitlines(), int(numbers["vgpr_count"]), int(numbers["vgpr_spill_count"])


# the arguments whose product is the number of elements that a program's main loop visits at a time
_TILES = ("BLOCK",), ("ROWS", "COLUMNS"), ("PARTS", "COLUMNS"), ("PLACES", "CHANNELS_PADDED")


def inspect(case: str, target: str) -> MachineCode:
    """Compile one of CASES for one of TARGETS and read the result."""
    amd = TARGETS[target].backend == "hip"
    with mock.patch.object(kernel_launch, "ON_AMD", amd):
        launch = CASES[case]()
    kernel = compile_launch(launch, TARGETS[target])
    lines, registers, spilled = _amd(kernel) if amd else _nvidia(kernel)
    syntax = _AMDGCN if amd else _SASS
    loop = _main_loop(lines, syntax) if "scf.for" in kernel.asm["ttgir"] else None
    loads, stores = _accesses(lines if loop is None else loop, syntax)
    per_element = None
    if loop is not None:
        sides = next(sides for sides in _TILES if set(sides) <= launch.args.keys())
        tile = math.prod(launch.args[side] for side in sides)
        threads = launch.num_warps * TARGETS[target].warp_size
        per_element = sum(w * n for w, n in (loads + stores).items()) * threads / tile
    exact = kernel.asm.get("ptx", "").count("div.rn.f32")
    shared, products = kernel.metadata.shared, sorted(set(_PRODUCTS.findall("\n".join(lines))))
    return MachineCode(registers, spilled, shared, dict(loads), dict(stores), per_element, exact, products)


def _widths(counts: dict[int, int]) -> str:
    return ", ".join(f"{n} x {width}" for width, n in sorted(counts.items(), reverse=True)) or "none"


def main(targets: list[str]) -> None:
    """Print the table of all cases for `targets`, by default all."""
    print(
        "| kernel | target | registers | spills | shared | loads x bytes | stores x bytes | bytes/element |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for target in targets or TARGETS:
            code = inspect(case, target)
            moved = "" if code.bytes_per_element is None else f"{code.bytes_per_element:.1f}"
            cells = (case, target, code.registers, code.spilled, code.shared)
            print("|", *(f"{c} |" for c in (*cells, _widths(code.loads), _widths(code.stores), moved)))


if __name__ == "__main__":
    main(sys.argv[1:])
