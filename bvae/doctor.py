"""Say what works on this machine, what does not, and what to install: the first thing a bug report needs.

  python -m bvae.doctor

Exit status: 0 training can run, with the options that are named where something is marked NO; 1 it cannot.
"""

import argparse
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

# Only what comes with Python is imported above: the rest is what may be broken.

REQUIRED = {  # distribution: what is imported; setup.py says what each is for
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
LIMIT = 300  # seconds for a trial; compiling takes one minute where it is slow
GB = 1e9
SCARCE = 3 * GB  # of disk


class Finding(NamedTuple):
    """One line of the report."""

    mark: str  # "ok", "--" absent and not needed, or "NO" broken
    name: str
    text: str


def trial(kind: str) -> str:
    """Try something and say how it went.

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
    return f"a tiny step takes {1000 * min(seconds[1:]):.1f} ms, getting ready {first:.1f} s"


def _decode(data: Path) -> str:
    import torch

    from bvae.pipelines import celeba, decoder
    from bvae.pipelines.picture import Picture

    files = celeba.splits(data)["train"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = decoder.build("dali", Picture(148, 32, 3), device)
    ((_, bad),) = reader.decode([files])
    if bad:
        raise RuntimeError(f"a good JPEG is not decoded: {next(iter(bad.values()))}")
    return f"{reader.version} decodes"


def attempt(kind: str) -> tuple[bool, str]:
    """Run a trial in a process of its own, which may crash or hang; whether it worked, and what it said."""
    code = f"import bvae.doctor; bvae.doctor.tell({kind!r})"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"it did not end within {LIMIT} s"
    if done.returncode == 0:
        return True, done.stdout.strip().splitlines()[-1]
    if done.returncode < 0:
        return False, f"it crashed with signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return False, lines[-1] if lines else f"it ended with status {done.returncode}"


def tell(kind: str) -> None:
    """A trial's outcome as text on stdout, or its failure as one line on stderr and status 1."""
    try:
        print(trial(kind))
    except Exception as error:  # whatever is broken on this machine
        sys.exit(reason(error))


def versions() -> Iterator[Finding]:
    """The system, this package and what it needs."""
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
        except Exception as error:  # a broken build fails in any way
            yield Finding("NO", name, f"does not load ({reason(error)}): install it again")


def graphics() -> Iterator[Finding]:
    """The GPU, its driver, and what it computes in."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        built = f"this torch is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
        if driver:
            yield Finding("NO", "GPU", f"{driver}, but PyTorch does not see it; {built}: see pytorch.org")
        else:
            yield Finding("--", "GPU", f"none, nor a driver: the CPU trains ({built})")
        return
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    name, memory = torch.cuda.get_device_name(), f"{free / GB:.1f} of {total / GB:.1f} GB free"
    text = f"{name} (compute {major}.{minor}), {memory}; {torch.cuda.device_count()} in all"
    yield Finding("ok", "GPU", text)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    yield Finding("ok", "driver", f"{driver or 'unknown'}; torch is built for {runtime}")


def _driver() -> str:
    """What the driver's own tool says of GPUs; empty without one."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return ""
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return "; ".join(done.stdout.splitlines()) if done.returncode == 0 else ""


def precision() -> Iterator[Finding]:
    """What --amp does here."""
    from bvae.device import choose_device
    from bvae.training.step import autocast_dtype

    dtype, text = autocast_dtype(choose_device("auto"), True)
    yield Finding("ok" if dtype else "--", "bf16", f"--amp is {text}")


def triton() -> Iterator[Finding]:
    """The kernels' compiler, and the switch that sends them to its interpreter."""
    if sys.platform != "linux":
        yield Finding("--", "triton", "there is none for this system: plain PyTorch does its work")
        return
    try:
        module = importlib.import_module("triton")
        yield Finding("ok", "triton", module.__version__)
    except ModuleNotFoundError:
        yield Finding("NO", "triton", "missing: pip install triton; plain PyTorch does its work until then")
    except Exception as error:
        yield Finding("NO", "triton", f"does not load ({reason(error)}): install it again")
    value = os.environ.get("TRITON_INTERPRET", "0")
    if value != "0":
        text = f"is {value}: kernels run in the interpreter, thousands of times slower; unset it to train"
        yield Finding("NO", "TRITON_INTERPRET", text)
    else:
        yield Finding("ok", "TRITON_INTERPRET", "not set")


def compilers() -> Iterator[Finding]:
    """What torch.compile needs on a CPU, and Triton on a GPU: it builds each kernel's launcher in C."""
    import torch

    name = os.environ.get("CXX", "g++")
    if shutil.which(name):
        yield _version("C++ compiler", name)
    else:
        text = (
            f"no {name}: torch.compile needs one on a CPU; install g++ or set CXX. Training is eager without"
        )
        yield Finding("--", "C++ compiler", text)
    if torch.cuda.is_available():
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        found = next(filter(shutil.which, names), None)
        if found:
            yield _version("C compiler", found)
        else:
            text = f"no {' nor '.join(names)}: install gcc or set CC; until then --no-compile --no-fused"
            yield Finding("NO", "C compiler", text)
    elif not shutil.which(name):
        return  # nothing is compiled here
    scheme = sysconfig.get_default_scheme()
    if scheme == "posix_local":  # Debian's, for what is installed by hand; the compilers look here:
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
    """What a compiler says of its version."""
    done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=30)
    shown = (done.stdout or done.stderr).strip().splitlines() or ["it says nothing"]
    return Finding("NO" if done.returncode else "ok", label, shown[0])


def dali() -> Iterator[Finding]:
    """The faster decoder, tried on drawn faces."""
    from bvae.pipelines.decoder import choose

    if choose("auto") != "dali":
        text = f"not installed: torchvision decodes; pip install {DALI[0]} (or {DALI[1]}) is faster"
        yield Finding("--", "DALI", text)
        return
    works, text = attempt("dali")
    yield (
        Finding("ok", "DALI", text) if works else Finding("NO", "DALI", f"{text}: use --decoder torchvision")
    )


def room() -> Iterator[Finding]:
    """Memory, and disk where runs and decoded images go."""
    from bvae.pipelines.cache import default_folder

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
            little = free < SCARCE
            more = ": little; CelebA at 64 x 64 takes 2.0 GB" if little else ""
            yield Finding("NO" if little else "ok", name, f"{folder}, {free / GB:.1f} GB free{more}")


def _nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder that may have to be made first; empty if it can be."""
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
    works, text = attempt(kind)
    return Finding("ok" if works else "NO", name, text)


SECTIONS: dict[str, Callable[[], Iterator[Finding]]] = {
    "versions": versions,
    "GPU": graphics,
    "bf16": precision,
    "triton": triton,
    "compilers": compilers,
    "DALI": dali,
    "memory and disk": room,
    "training": steps,
}


def examine() -> Iterator[Finding]:
    """All findings, as they come up; a check that fails is one."""
    for name, check in SECTIONS.items():
        try:
            yield from check()
        except Exception as error:  # whatever is broken here, the rest is to be seen as well
            yield Finding("NO", name, f"cannot be looked at ({reason(error)})")


def reason(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def verdict(findings: list[Finding]) -> tuple[bool, str]:
    """Whether training can run, and how."""
    mark = {finding.name: finding.mark for finding in findings}
    working = [name for name in mark if name.endswith((", eager", ", compiled")) and mark[name] == "ok"]
    if not working:
        return False, "Training cannot run: mend what is marked NO, from the top."
    broken = [name for name, m in mark.items() if m == "NO"]
    line = f"Training can run ({'; '.join(working)})."
    return True, line + (f" Not well: {', '.join(broken)}." if broken else "")


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 training can run, if need be with the options that are named; 1 it cannot."""
    argparse.ArgumentParser(
        prog="python -m bvae.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    findings = []
    for finding in examine():
        findings.append(finding)
        print(f"{finding.mark}  {finding.name:<17} {finding.text}", flush=True)
    can_run, line = verdict(findings)
    print(line)
    return 0 if can_run else 1


if __name__ == "__main__":
    sys.exit(main())
