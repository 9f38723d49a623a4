"""`pytest bench`: the machine, its record, and the race that every benchmark runs."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import bvae
from bench.race import Race, Result, stopwatch
from bench.record import ROOT, Record, save
from bench.report import markdown
from bvae.kernels import launch

CACHE = "TORCHINDUCTOR_CACHE_DIR"
COLD, RECORD = pytest.StashKey[bool](), pytest.StashKey[Record]()
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record",
        type=Path,
        help="write a record if all passes: a .json file, or a folder such as bench/results",
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.exit("unset TRITON_INTERPRET: a kernel's time in the interpreter says nothing", returncode=4)
    if not Path(bvae.__file__).is_relative_to(ROOT):
        pytest.exit(
            f"bvae is that of {bvae.__file__}, not of {ROOT}: run python -m pytest there", returncode=4
        )
    # Nothing is compiled yet: a first call's time is that of a new machine, unless a cache is asked for.
    if CACHE not in os.environ:
        scratch = tempfile.TemporaryDirectory(prefix="bvae-bench-")
        os.environ[CACHE] = scratch.name
        config.stash[COLD] = True
        config.add_cleanup(scratch.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=stopwatch, group=Path(item.path).stem))


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        stash = items[0].config.stash
        stash[LEFT_OUT] = stash.get(LEFT_OUT, 0) + len(items)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def record(device: torch.device, request: pytest.FixtureRequest) -> Record:
    request.config.stash[RECORD] = made = Record(device, cold=COLD in request.config.stash)
    return made


@pytest.fixture
def race(device: torch.device, record: Record, benchmark) -> Iterator[Callable[..., Result]]:
    """`Race.run` for this test."""
    samples, calls = (0.02, 20) if device.type == "cuda" else (0.04, 2)
    torch.manual_seed(0)
    yield partial(Race(device, record.results, samples, calls).run, benchmark)
    launch.ENABLED = True
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    made = config.stash.get(RECORD, None)
    if made is None or not made.results:
        return
    finished = {**made.finish(), "left_out": config.stash.get(LEFT_OUT, 0)}
    terminalreporter.write_line("\n" + markdown(finished))
    path = config.getoption("--record")
    if path is None:
        return
    if config.getoption("benchmark_disable"):
        terminalreporter.write_line("no record is written: one round is no measurement")
    elif terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line("no record is written: a benchmark failed")
    else:
        terminalreporter.write_line(f"record: {save(finished, path)}")
