"""Count the launches and the traffic of the training step as compiled for an H100, without a GPU.

    python -m bench.lowered --batch 144 --top 8     PyTorch-VAE's network, loss B, bfloat16

The input is fake tensors, the output is generated code, and nothing runs. Two small C libraries replace the
CUDA runtime and driver, and Python code answers torch's questions about the device. The step is the one that
a run captures, with its gather and its optimizer. The figures:

    launches    one for each Triton kernel, convolution, matrix product, operation of bvae and operation of
                eager torch; a convolution's backward pass is one per gradient. A library may launch more.
    MB          of the forward and backward pass: inductor's figures for its Triton kernels (torch 2.11 has
                none for several kernels in one), the activations of convolutions, all tensors of bvae's
                operations. Not counted, 0.2 MB per image at batch 144: the weights that libraries read, and
                linear layers' matrix products.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._inductor import compile_fx, config, graph
from torch._subclasses import fake_tensor

from bvae.config import TrainingConfig
from bvae.kernels import batch_norm, last_block, launch
from bvae.losses import CapacityLoss
from bvae.model import BetaVAE
from bvae.pipelines.memory_loaders import DeviceLoader
from bvae.training import step as step_module
from bvae.training.optimizer import build_optimizer

LIBRARIES = {"fake_cudart.c": "libfake_cudart.so", "fake_cuda.c": "libcuda.so.1"}
INSIDE = "BVAE_LOWERED"  # set in the process that runs with the fake libraries
PASSES = ("forward", "backward")


class Kernel(NamedTuple):
    """A launch of a Triton kernel."""

    part: str  # forward, backward or gather
    name: str
    bytes: float


@dataclass
class Count:
    """The launches and the traffic of a step."""

    kernels: list[Kernel] = field(default_factory=list)
    library: Counter[tuple[str, str]] = field(default_factory=Counter)  # launches by part and operation
    outside: Counter[str] = field(default_factory=Counter)  # launches of eager torch by operation
    library_bytes: int = 0


# --- Reading the code and the graph -----------------------------------------------------------------------
_RUN = re.compile(r"^\s+(triton_\w+)\.run\(", re.MULTILINE)
_LIBRARY = re.compile(r"\b(?:extern_kernels|torch\.ops\.(?:aten|bvae))\.(\w+)[\w.]*\((.*)$", re.MULTILINE)
_BYTES = re.compile(r"'kernel_name': '(\w+)'.*?'kernel_num_gb': ([0-9.e+-]+)")
_GRADIENTS = re.compile(r"\[(\w+), (\w+), \w+\]\)$")  # which gradients a convolution's backward pass computes


def _read(count: Count, part: str, code: str) -> None:
    """Add the launches in inductor's code to `count`."""
    sizes = {name: float(size) * 1e9 for name, size in _BYTES.findall(code)}
    body = code[code.rfind("def call(") :]
    count.kernels += [Kernel(part, name, sizes.get(name, 0.0)) for name in _RUN.findall(body)]
    for operation, arguments in _LIBRARY.findall(body):
        gradients = _GRADIENTS.search(arguments) if operation == "convolution_backward" else None
        count.library[part, operation] += gradients.groups().count("True") if gradients else 1


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in a graph's node, a tensor, or a list of these."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


# The plans of the operations of several launches: an operation's arguments are those of its plan
_PLANS: dict[str, Callable[..., tuple[list[launch.Launch], Any]]] = {
    "batch_norm_leaky_relu": batch_norm.plan_forward,
    "batch_norm_leaky_relu_backward": batch_norm.plan_backward,
    "last_block": last_block.plan_forward,
    "last_block_backward": last_block.plan_backward,
}


def _planned(node: fx.Node) -> list[launch.Launch]:
    """The launches of a node's operation; none if it has no plan of several."""
    plan = _PLANS.get(getattr(node.target, "_opname", ""))
    if plan is None or getattr(node.target, "namespace", "") != "bvae":
        return []

    def on_meta(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        (tensor,) = _tensors(argument)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return plan(*(on_meta(argument) for argument in node.args))[0]


def _count_library(count: Count, part: str, nodes: fx.graph._node_list) -> None:
    """Add to `count` the bytes that convolutions move, without weights, and all that bvae's operations move.

    An operation of several launches moves what each of them moves, and counts as often as it launches.
    """
    moved: list[Tensor] = []
    for node in nodes:
        inputs, outputs = _tensors(node.args), _tensors(node)
        if node.target is torch.ops.aten.convolution.default:
            moved += [inputs[0], outputs[0]]
        elif node.target is torch.ops.aten.convolution_backward.default:
            gradient, image = inputs[:2]
            moved += [gradient, image]  # for the weights' gradient
            if node.args[-1][0]:
                moved += [gradient, outputs[0]]
        elif launches := _planned(node):
            count.library[part, node.target._opname] += len(launches) - 1
            moved += [
                tensor for each in launches for tensor in each.args.values() if isinstance(tensor, Tensor)
            ]
        elif getattr(node.target, "namespace", "") == "bvae":
            moved += inputs + outputs
    count.library_bytes += sum(tensor.nbytes for tensor in moved)


# --- Compiling without running ----------------------------------------------------------------------------
class _FakeStep(fake_tensor.FakeTensorMode):
    """Runs a step on fake tensors, and counts the launches of eager torch on a GPU."""

    def __init__(self, outside: Counter[str]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.outside, self.compiled = outside, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name == "_local_scalar_dense":
            return True  # Adam asks whether its learning rate is positive
        if name.startswith("_fused_"):
            result = None  # the optimizer's kernel writes in place; fake tensors do not support it
        else:
            result = super().__torch_dispatch__(function, types, args, kwargs or {})
        returns = function._schema.returns
        is_view = "view" in name or any(
            value.alias_info and not value.alias_info.is_write for value in returns
        )
        launches_nothing = function.namespace != "aten" or "empty" in name or name == "detach"
        on_gpu = any(tensor.is_cuda for tensor in _tensors([*args, result]))
        if on_gpu and not (self.compiled or is_view or launches_nothing):
            self.outside[name] += 1
        return result


class _Lowered(Exception):
    """Ends a compilation when the code has been generated."""


@contextmanager
def _lowering(count: Count, step: _FakeStep) -> Iterator[None]:
    """Make torch.compile add its generated code to `count`, and run its graphs on fake tensors."""
    code: list[str] = []

    def stop(self: graph.GraphLowering) -> None:
        code.append(self.codegen()[0].value)
        raise _Lowered

    def lower(module: fx.GraphModule, inputs: Any, **options: Any) -> Callable[..., Any]:
        part = "gather" if options.get("is_inference") else PASSES[bool(options.get("is_backward"))]
        try:
            compile_fx.compile_fx_inner(module, inputs, **options)
        except Exception as error:
            cause: BaseException | None = error
            while cause and not isinstance(cause, _Lowered):
                cause = cause.__cause__ or cause.__context__
            if not cause:
                raise
        _read(count, part, code[-1])
        _count_library(count, part, module.graph.nodes)
        # inductor has made foreach operations in-place, which return nothing, and left their outputs unused
        module.graph.eliminate_dead_code()
        module.recompile()

        def run(arguments: list[Any]) -> Any:
            step.compiled = True
            try:
                return module(*arguments)
            finally:
                step.compiled = False

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    compile = compile_fx.compile_fx

    def compile_to_code(module: Any, inputs: Any, **options: Any) -> Any:
        return compile(module, inputs, **{"inner_compile": lower, **options})  # it calls itself

    with (
        mock.patch.object(compile_fx, "compile_fx", compile_to_code),
        mock.patch.object(graph.GraphLowering, "compile_to_module", stop),
        config.patch(benchmark_kernel=True, force_disable_caches=True, compile_threads=1),  # with bytes
    ):
        yield


@contextmanager
def _h100() -> Iterator[None]:
    """Answer the questions of torch and Triton about the device, as an H100."""
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    properties = SimpleNamespace(
        **{"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "gcnArchName": "sm_90", "warp_size": 32},
        **{"multi_processor_count": 132, "max_threads_per_multi_processor": 2048},
        **{"regs_per_multiprocessor": 65536, "L2_cache_size": 50 << 20, "total_memory": 80 << 30},
        **{"shared_memory_per_block": 49152, "shared_memory_per_block_optin": 232448},
        **{"shared_memory_per_multiprocessor": 233472, "max_threads_per_block": 1024},
    )
    of_device = {"get_device_properties": properties, "current_device": 0}
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {**of_device, "is_available": True, "device_count": 1, "_lazy_init": None},
        CudaInterface: {**of_device, "get_compute_capability": 90},
        CudaInterface.Worker: of_device,
        fake_tensor: {"init_gpu_context": None},  # it makes a tensor that is not fake
    }
    answers[torch.cuda] |= {"get_device_capability": (9, 0), "is_current_stream_capturing": False}
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=always(GPUTarget("cuda", 90, 32)),
            get_current_device=always(0),
            get_device_interface=always(torch.cuda),
        )
    )
    real = torch.tensor

    def tensor(value: Any, *, device: Any = "cpu", **options: Any) -> Tensor:
        """`torch.tensor`, whose own copy to the device is replaced by an empty tensor."""
        on_cpu = real(value, **options)
        return on_cpu if device == "cpu" else torch.empty(on_cpu.shape, dtype=on_cpu.dtype, device=device)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "tensor", tensor))
        for owner, functions in answers.items():
            for name, value in functions.items():
                stack.enter_context(mock.patch.object(owner, name, always(value)))
        yield


def count_step(batch: int, training: TrainingConfig) -> Count:
    """Lower the captured step for `batch` images. Needs the fake libraries."""
    with torch.device("meta"):
        model = BetaVAE().to(memory_format=torch.channels_last)
        loss = CapacityLoss(kl_weight=0.03125, activation="tanh")
    count, device = Count(), torch.device("cuda:0")
    fake = _FakeStep(count.outside)
    with _h100(), fake, _lowering(count, fake):
        for module in (*model.modules(), loss):
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(weight, device=device)))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(buffer, device=device))
        images = torch.empty(4 * batch, *model.input_shape[1:], 3, dtype=torch.uint8, device=device)
        optimizer = build_optimizer(training, model.parameters())
        step = step_module.TrainingStep(
            model, loss, optimizer, seed=0, dtype=torch.bfloat16, compile=True, buffer_steps=10
        )
        with mock.patch.object(step_module, "capture", lambda run, *_: run):
            step.capture(DeviceLoader(images, batch, 0, train=True, flip=True))
        step()  # compiles, and creates the optimizer's state
        count.outside.clear()
        step()
    return count


def show(count: Count, batch: int, top: int) -> None:
    """Print the result of `count_step`."""
    print(f"torch {torch.__version__}, batch {batch}; launches:")
    for part in (*PASSES, "gather"):
        numbers = {"Triton": sum(kernel.part == part for kernel in count.kernels)}
        numbers |= {operation: n for (p, operation), n in count.library.items() if p == part}
        print(f"{part:10}" + ", ".join(f"{n} {name}" for name, n in numbers.items()))
    print(f"{'eager':10}" + ", ".join(f"{n} {name}" for name, n in count.outside.items()))
    for kernel in sorted(count.kernels, key=lambda kernel: -kernel.bytes)[:top]:
        print(f"{kernel.bytes / 1e6:7.1f} MB  {kernel.part:8}  {kernel.name}")
    passes = [kernel for kernel in count.kernels if kernel.part in PASSES]
    inside = len(passes) + count.library.total()
    outside = len(count.kernels) - len(passes) + count.outside.total()
    print(f"{inside} launches in the compiled passes, {outside} outside (gather and eager)")
    moved = (sum(kernel.bytes for kernel in passes) + count.library_bytes) / batch
    print(f"TOTAL {moved / 1e6:.2f} MB per image, {inside + outside} launches")


# --- The process with the fake libraries ------------------------------------------------------------------
def stand_ins(folder: Path) -> dict[str, str]:
    """Compile the two libraries into a folder; return the environment in which they replace CUDA's.

    Raises:
        RuntimeError: a requirement is missing; the message says what to do.
    """
    if sys.platform != "linux" or not torch.version.cuda or not launch.AVAILABLE:
        raise RuntimeError("bench.lowered needs Linux, torch's build for CUDA, and triton: pip install torch")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not compiler:
        raise RuntimeError("bench.lowered needs a C compiler: install gcc, or name one in the variable CC")
    for source, library in LIBRARIES.items():
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-w",
            "-o",
            folder / library,
            Path(__file__).with_name(source),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "no message").splitlines()[0]
            raise RuntimeError(f"{compiler} does not compile {source} ({reason}): name another in CC")
    return {
        **os.environ,
        INSIDE: "1",
        "LD_PRELOAD": str(folder / LIBRARIES["fake_cudart.c"]),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TORCH_LOGS": "-inductor",  # it warns about every compilation that is stopped
        "PYTHONWARNINGS": "ignore",
    }


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 a requirement is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.lowered", description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=144)
    parser.add_argument("--optimizer", choices=("adam", "muon"), default="adam")
    parser.add_argument("--network", action="store_true", help="with the kernels of the network's layers")
    parser.add_argument("--top", type=int, default=8, help="how many of the largest kernels to list")
    arguments = parser.parse_args(argv)
    if INSIDE in os.environ:
        launch.NETWORK = arguments.network
        training = TrainingConfig(optimizer=arguments.optimizer)
        show(count_step(arguments.batch, training), arguments.batch, arguments.top)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = stand_ins(Path(folder))
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return subprocess.run([sys.executable, "-m", "bench.lowered", *argv], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
