"""Everything that only a GPU can tell, in order: `python -m bench.gpu`, or `make gpu`.

  python -m bench.gpu                  all stages
  python -m bench.gpu step-144 loader  some of them
  python -m bench.gpu --total 580      as many as end in time
  python -m bench.gpu --dry            a cheap form of each on the CPU, to see that it starts

Each stage is a process of its own with a time limit; one that fails does not stop the next. What it printed,
with the seconds since it began, is in OUT/gpu/STAGE.txt; benchmarks add to the machine's record in OUT. A
table comes last. Without a GPU there is nothing to do.

Exit status: 0 every stage passed or was left out, 1 one failed, 2 no such stage.
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, NamedTuple

import torch

from bench.record import RESULTS, ROOT
from bvae.pipelines import faces
from bvae.pipelines.decoder import choose

LIMIT = 600.0  # seconds for a stage
GRACE = 20.0  # more, to write what it has
LEAST = 1.0  # for which no stage is started

# A package that is missing must not stop the rest, and after an illegal access all that follows fails.
GPU_TESTS = "-m pytest -v -m gpu --continue-on-collection-errors --maxfail 8 tests/test_gpu_kernels.py tests"
BENCH = "-m pytest -v --record {out}"
TRAIN = "-m bvae.train --amp --profile --out {scratch}"
COLLECT = "-m pytest --collect-only -q"
TINY = (
    "-m bvae.train --profile --data-root {scratch}/data/celeba --cache-dir {scratch}/cache --no-compile "
    "--image-size 32 --latent-dim 3 --batch-size 8 --decoder torchvision --max-steps 2"
)


@dataclass(frozen=True)
class Stage:
    """Python's arguments on a GPU, and in the cheap form; {out} and {scratch} are folders."""

    command: str
    dry: str
    sanitizer: bool = False  # on a GPU, compute-sanitizer runs Python
    dali: bool = False  # needs it


STAGES = {
    "tests": Stage(f'{GPU_TESTS} -k "not step"', f'{COLLECT} -m gpu tests -k "not step"'),
    "step-tests": Stage(f"{GPU_TESTS} -k step", f"{COLLECT} -m gpu tests -k step"),
    "step-144": Stage(f"{BENCH} bench/test_step.py -k 144", f"{COLLECT} bench/test_step.py"),
    "step-1024": Stage(f"{BENCH} bench/test_step.py -k 1024", f"{COLLECT} bench/test_step.py"),
    "faces": Stage(f"{TRAIN}/faces", f"{TINY} --out {{scratch}}/faces --hidden-dims 4 8"),
    "sprites": Stage(
        f"{TRAIN}/sprites --data sprites --max-steps 20000",
        f"{TINY} --out {{scratch}}/sprites --hidden-dims 8 --channels 1 --no-flip",
    ),
    "network": Stage(
        f"{TRAIN}/network --max-steps 200 --network-kernels auto",
        f"{TINY} --out {{scratch}}/network --hidden-dims 4 8 --network-kernels auto",
    ),
    "kernels": Stage(f"{BENCH} bench/test_kernels.py", f"{COLLECT} bench/test_kernels.py"),
    "scaling": Stage(f"{BENCH} bench/test_scaling.py", f"{COLLECT} bench/test_scaling.py"),
    "loader": Stage(f"{BENCH} bench/test_loader.py", f"{COLLECT} bench/test_loader.py"),
    "sanitizer": Stage("-m bench.every_kernel", "-m bench.every_kernel", sanitizer=True),
    "dali": Stage("-m bench.dali_sweep", "-m bench.dali_sweep --images 16", dali=True),
}


class Outcome(NamedTuple):
    """A row of the table."""

    stage: str
    result: str
    seconds: float
    record: Path | None


def run(name: str, command: list[str], log: Path, limit: float) -> Outcome:
    """Run a command from the root; show what it prints and keep it."""
    start, over = time.monotonic(), threading.Event()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a group of its own, to be stopped as a whole
    )

    def stop(number: signal.Signals) -> None:
        over.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    stops = ((limit, signal.SIGINT), (limit + GRACE, signal.SIGKILL))
    timers = [threading.Timer(seconds, stop, [number]) for seconds, number in stops]
    for timer in timers:
        timer.start()
    try:
        with log.open("w") as file:
            print(f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC: {shlex.join(command)}", file=file)
            _copy(process.stdout, file, start)
        status = process.wait()
    except BaseException:  # Ctrl-C is for the stage as well, which is not in the terminal's group
        stop(signal.SIGKILL)
        raise
    finally:
        for timer in timers:
            timer.cancel()
    result = "ok" if status == 0 else f"failed, status {status}"
    return Outcome(name, f"over {limit:.0f} s" if over.is_set() else result, time.monotonic() - start, log)


def _copy(source: IO[str] | None, file: IO[str], start: float) -> None:
    assert source
    for line in source:
        text = f"{time.monotonic() - start:7.1f}  {line.rstrip()}"
        print(text, flush=True)
        print(text, file=file, flush=True)


def _stage(name: str, stage: Stage, out: Path, scratch: Path, dry: bool, limit: float) -> Outcome:
    """Run a stage, or say why it is left out."""
    words = shlex.split(stage.dry if dry else stage.command)
    command = [sys.executable, *(word.format(out=out, scratch=scratch) for word in words)]
    if stage.sanitizer and not dry:
        tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
        if not tool:
            return Outcome(name, "left out: no compute-sanitizer", 0.0, None)
        command = [tool, "--tool", "memcheck", "--error-exitcode", "1", *command]
    if stage.dali and choose("auto") != "dali":
        return Outcome(name, "left out: no DALI", 0.0, None)
    print(f"\n{name}: {shlex.join(command)}", flush=True)
    return run(name, command, out / "gpu" / f"{name}.txt", limit)


def table(outcomes: list[Outcome]) -> str:
    rows = [("stage", "result", "seconds", "output")]
    for stage, result, seconds, record in outcomes:
        rows.append((stage, result, f"{seconds:.0f}", str(record or "")))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[3]]).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)}; all without")
    parser.add_argument("--dry", action="store_true", help="the cheap form of each, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where records go (default: bench/results)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a stage (default: 600)")
    parser.add_argument("--total", type=float, default=math.inf, help="seconds for all, the table included")
    given = parser.parse_args(argv)
    if unknown := [name for name in given.stages if name not in STAGES]:
        parser.error(f"no stage {unknown[0]}: choose from {', '.join(STAGES)}")
    if not given.dry and not torch.cuda.is_available():
        print("no GPU here: nothing to run (--dry runs a cheap form of each stage on the CPU)")
        return 0
    out, outcomes = given.out.resolve(), []
    (out / "gpu").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bvae-gpu-") as scratch:
        if given.dry:
            faces.write(Path(scratch) / "data", n=60, progress=False)
        end = time.monotonic() + given.total - GRACE
        for name in given.stages or STAGES:
            limit = min(given.limit, end - time.monotonic() - GRACE)
            if limit < LEAST:
                outcomes.append(Outcome(name, "left out: no time", 0.0, None))
                continue
            outcomes.append(_stage(name, STAGES[name], out, Path(scratch), given.dry, limit))
    print(f"\n{table(outcomes)}")
    return int(any(outcome.record and outcome.result != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
