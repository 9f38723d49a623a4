"""Report what works on this machine, what does not, and what to install. Put the output into bug reports.

  python -m bvae.doctor

Exit status: 0 training can run (a line marked NO names the options to use); 1 it cannot.
"""

import contextlib
import importlib
import io
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from bvae.command_line import Parser
from bvae.errors import exit_status

# Only the standard library is imported above, because any other package may be broken.

REQUIRED = {  # distribution: module; setup.py says what each is for
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "tyro": "tyro",
    "tensorboard": "torch.utils.tensorboard",
    "safetensors": "safetensors.torch",
    "tqdm": "tqdm",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "threadpoolctl": "threadpoolctl",
}
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
TINY = [
    *("--image-size", "32", "--hidden-dims", "4", "8", "--latent-dim", "3", "--batch-size", "8"),
    *("--decoder", "torchvision", "--max-steps", "100"),
]
LIMIT = 300  # seconds for a trial; compiling takes one minute on a slow machine
GB = 1e9
LITTLE_DISK = 3 * GB


class Finding(NamedTuple):
    """One line of the report."""

    mark: str  # "ok", "--" absent and not needed, or "NO" broken
    name: str
    text: str


def run_trial(kind: str) -> str:
    """Run one check that may crash, and return a line about its result.

    Args:
        kind: "dali", or a device and compile or no-compile: training steps of a tiny model.
    """
    from bvae.pipelines import faces

    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        data = faces.write(Path(scratch) / "faces", n=20, seed=0, progress=False)
        if kind == "dali":
            return _decode(data)
        device, execution = kind.split()
        places = ["--data-root", str(data), "--out", f"{scratch}/run", "--cache-dir", f"{scratch}/cache"]
        return _train([*TINY, *places, "--device", device, f"--{execution}"])


def _train(options: list[str]) -> str:
    from bvae.training.cli import parse
    from bvae.training.setup import open_run

    seconds, errors = [], io.StringIO()
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stderr(errors):
            run = stack.enter_context(open_run(parse(options, "")))  # compiles
        first = time.perf_counter() - start
        if "--compile" in options and not run.step.compile:
            raise RuntimeError(next(line for line in reversed(errors.getvalue().splitlines()) if line))
        for images in islice(run.batches(), 6):
            start = time.perf_counter()
            run.advance(images)
            run.step.metrics_buffer.send(run.done)
            run.step.receive(wait=True)
            seconds.append(time.perf_counter() - start)
    return f"a tiny step takes {1000 * min(seconds[1:]):.1f} ms, preparation {first:.1f} s"


def _decode(data: Path) -> str:
    import torch

    from bvae.pipelines import celeba, decoder
    from bvae.pipelines.picture import Picture

    files = celeba.inventory(data).splits["train"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = decoder.build("dali", Picture(148, 32, 3), device)
    ((_, bad),) = reader.decode([files])
    if bad:
        raise RuntimeError(f"a good JPEG is not decoded: {next(iter(bad.values()))}")
    return f"{reader.version} decodes"


def try_in_subprocess(kind: str) -> tuple[bool, str]:
    """Run a trial in a separate process, which may crash or hang; return its success and its output."""
    code = f"import bvae.doctor; bvae.doctor.print_trial({kind!r})"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"it did not end within {LIMIT} s"
    if process.returncode == 0:
        return True, process.stdout.strip().splitlines()[-1]
    if process.returncode < 0:
        return False, f"it crashed with signal {-process.returncode}"
    lines = process.stderr.strip().splitlines()
    return False, lines[-1] if lines else f"it ended with status {process.returncode}"


def print_trial(kind: str) -> None:
    """A trial's result as text on stdout, or its failure as one line on stderr and status 1."""
    try:
        print(run_trial(kind))
    except Exception as error:  # anything may be broken on this machine
        sys.exit(reason(error))


def versions() -> Iterator[Finding]:
    """The system, this package and the packages that it needs."""
    import bvae

    yield Finding("ok", "system", f"{platform.platform()}, {os.cpu_count()} CPU cores")
    supported = sys.version_info >= (3, 10)
    text = platform.python_version() + ("" if supported else ": install Python 3.10 or newer")
    yield Finding("ok" if supported else "NO", "python", text)
    yield Finding("ok", "bvae", f"{bvae.__version__} in {Path(bvae.__file__).parent}")
    for name, module in REQUIRED.items():
        try:
            importlib.import_module(module)
            yield Finding("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding("ok", name, "version unknown")
        except ModuleNotFoundError:
            yield Finding("NO", name, f"missing: pip install {name}")
        except Exception as error:  # a broken build may raise anything
            yield Finding("NO", name, f"does not load ({reason(error)}): install it again")


def gpu_and_driver() -> Iterator[Finding]:
    """The GPU, its driver, and the CUDA or ROCm version of torch."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        built = f"this torch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
        if driver:
            yield Finding("NO", "GPU", f"{driver}, but PyTorch does not see it; {built}: see pytorch.org")
        else:
            yield Finding("--", "GPU", f"no GPU and no driver: training runs on the CPU ({built})")
        return
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    name, memory = torch.cuda.get_device_name(), f"{free / GB:.1f} of {total / GB:.1f} GB free"
    text = f"{name} (compute {major}.{minor}), {memory}; {torch.cuda.device_count()} in all"
    yield Finding("ok", "GPU", text)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    yield Finding("ok", "driver", f"{driver or 'unknown'}; torch is built for {runtime}")


def _driver() -> str:
    """The GPUs that nvidia-smi lists; empty without it."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ""
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    process = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return "; ".join(process.stdout.splitlines()) if process.returncode == 0 else ""


def precision() -> Iterator[Finding]:
    """The precision that --amp gives on this machine."""
    from bvae.device import choose_device
    from bvae.training.step import autocast_dtype

    dtype, text = autocast_dtype(choose_device("auto"), True)
    yield Finding("ok" if dtype else "--", "bf16", f"--amp is {text}")


def triton() -> Iterator[Finding]:
    """Triton, which compiles the kernels, and the variable that switches to its interpreter."""
    if sys.platform != "linux":
        yield Finding("--", "triton", "not available for this system: plain PyTorch is used instead")
        return
    try:
        module = importlib.import_module("triton")
        yield Finding("ok", "triton", module.__version__)
    except ModuleNotFoundError:
        yield Finding("NO", "triton", "missing: pip install triton; plain PyTorch is used until then")
    except Exception as error:
        yield Finding("NO", "triton", f"does not load ({reason(error)}): install it again")
    value = os.environ.get("TRITON_INTERPRET", "0")
    if value != "0":
        text = f"is {value}: kernels run in the interpreter, thousands of times slower; unset it to train"
        yield Finding("NO", "TRITON_INTERPRET", text)
    else:
        yield Finding("ok", "TRITON_INTERPRET", "not set")


def compilers() -> Iterator[Finding]:
    """Compilers: torch.compile needs C++ on a CPU; on a GPU Triton builds each kernel's launcher in C."""
    import torch

    name = os.environ.get("CXX", "g++")
    if shutil.which(name):
        yield _version("C++ compiler", name)
    else:
        text = f"no {name}: torch.compile needs one on a CPU; install g++ or set CXX; until then eager"
        yield Finding("--", "C++ compiler", text)
    if torch.cuda.is_available():
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        compiler = next(filter(shutil.which, names), None)
        if compiler:
            yield _version("C compiler", compiler)
        else:
            text = f"no {' nor '.join(names)}: install gcc or set CC; until then --no-compile --no-fused"
            yield Finding("NO", "C compiler", text)
    elif not shutil.which(name):
        return  # nothing is compiled here
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's scheme for local installs; the compilers use this one:
        scheme = "posix_prefix"
    headers = Path(sysconfig.get_path("include", scheme))
    if (headers / "Python.h").is_file():
        yield Finding("ok", "Python's headers", str(headers))
    else:
        options = "--no-compile --no-fused" if torch.cuda.is_available() else "--no-compile"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        text = f"no Python.h in {headers}: install them (python{version}-dev); until then {options}"
        yield Finding("NO", "Python's headers", text)


def _version(label: str, name: str) -> Finding:
    """A compiler's version, as it prints it."""
    process = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=30)
    shown = (process.stdout or process.stderr).strip().splitlines() or ["no output"]
    return Finding("NO" if process.returncode else "ok", label, shown[0])


def dali() -> Iterator[Finding]:
    """The faster decoder, tried on drawn faces."""
    from bvae.pipelines.decoder import choose

    if choose("auto") != "dali":
        text = f"not installed: torchvision decodes; pip install {DALI[0]} (or {DALI[1]}) is faster"
        yield Finding("--", "DALI", text)
        return
    works, text = try_in_subprocess("dali")
    yield (
        Finding("ok", "DALI", text) if works else Finding("NO", "DALI", f"{text}: use --decoder torchvision")
    )


def memory_and_disk() -> Iterator[Finding]:
    """Free memory, and free disk space for runs and decoded images."""
    from bvae.pipelines.cache_folder import default_folder

    with contextlib.suppress(OSError, ValueError, IndexError):  # a system without it
        lines = Path("/proc/meminfo").read_text().splitlines()
        kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        text = f"{kb['MemAvailable'] * 1024 / GB:.1f} of {kb['MemTotal'] * 1024 / GB:.1f} GB free"
        yield Finding("ok", "memory", text)
    for name, folder, option in (
        ("cache folder", default_folder(), "--cache-dir"),
        ("runs folder", Path("runs"), "--out"),
    ):
        problem = unwritable(folder)
        if problem:
            yield Finding("NO", name, f"{problem}: choose another with {option}")
        else:
            free = shutil.disk_usage(_nearest(folder)).free
            little = free < LITTLE_DISK
            more = ": little; CelebA at 64 x 64 takes 2.0 GB" if little else ""
            yield Finding("NO" if little else "ok", name, f"{folder}, {free / GB:.1f} GB free{more}")


def _nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def unwritable(folder: Path) -> str:
    """Why a folder, which may not exist yet, cannot be written; empty if it can."""
    nearest = _nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        return f"{nearest} cannot be written ({error.strerror})"
    return ""


def steps() -> Iterator[Finding]:
    """A tiny training step on each backend."""
    import torch

    from bvae.training.step import compiles

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        yield _step(f"{device.upper()}, eager", f"{device} no-compile")
        can, text = compiles(torch.device(device), True)
        if can:
            yield _step(f"{device.upper()}, compiled", f"{device} compile")
        else:
            yield Finding("--", f"{device.upper()}, compiled", text)


def _step(name: str, kind: str) -> Finding:
    works, text = try_in_subprocess(kind)
    return Finding("ok" if works else "NO", name, text)


SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "GPU": gpu_and_driver,
    "bf16": precision,
    "triton": triton,
    "compilers": compilers,
    "DALI": dali,
    "memory and disk": memory_and_disk,
    "training": steps,
}


def run_checks() -> Iterator[Finding]:
    """Yield all findings; a check that fails is a finding too."""
    for name, check in SECTIONS.items():
        try:
            yield from check()
        except Exception as error:  # anything may be broken here; the other checks still run
            yield Finding("NO", name, f"cannot be checked ({reason(error)})")


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def summarise(findings: list[Finding]) -> tuple[bool, str]:
    """Whether training can run, and how."""
    mark = {finding.name: finding.mark for finding in findings}
    working = [name for name in mark if name.endswith((", eager", ", compiled")) and mark[name] == "ok"]
    if not working:
        return False, "Training cannot run: fix the lines marked NO, from the top."
    broken = [name for name, m in mark.items() if m == "NO"]
    line = f"Training can run ({'; '.join(working)})."
    return True, line + (f" Not well: {', '.join(broken)}." if broken else "")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 training can run, perhaps with the options that are named; 1 it cannot."""

    def run() -> int:
        Parser(prog="python -m bvae.doctor", description=__doc__).parse_args(argv)
        findings = []
        for finding in run_checks():
            findings.append(finding)
            print(f"{finding.mark}  {finding.name:<17} {finding.text}", flush=True)
        can_run, line = summarise(findings)
        print(line)
        return 0 if can_run else 1

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
