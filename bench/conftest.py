"""`pytest bench`: the options, the record of the machine, and the race that every benchmark runs.

    python -m pytest bench --record bench/results           every benchmark; the record grows with each
    python -m pytest bench/test_step.py -k 144 --record bench/results      measure these rows again

Without .git, set BVAE_COMMIT in the environment to the commit: 1a2b3c4, or 1a2b3c4-dirty with changes, as
`git describe --always --abbrev=7 --dirty --exclude '*'` prints it.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import bvae
from bench.race import Race, Result
from bench.record import ROOT, Record, source
from bench.report import markdown
from bvae.kernels import launch
from bvae.training import malloc

CACHE = "TORCHINDUCTOR_CACHE_DIR"
COLD, RECORD = pytest.StashKey[bool](), pytest.StashKey[Record]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption(
        "--record",
        type=Path,
        help="write the results after each benchmark: to a .json file, or to <device>/<day>-<commit>.json "
        "in a folder such as bench/results. Existing rows stay; those measured again are replaced. "
        "Without .git, BVAE_COMMIT in the environment gives the commit",
    )
    group.addoption(
        "--seeds", type=int, default=1, help="trainings of each recipe in bench/test_quality.py (default: 1)"
    )
    group.addoption(
        "--quick", action="store_true", help="one short round of each, to see that it runs; writes no record"
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.exit("unset TRITON_INTERPRET: times in the interpreter mean nothing", returncode=4)
    if not Path(bvae.__file__).is_relative_to(ROOT):
        pytest.exit(
            f"bvae comes from {bvae.__file__}, not from {ROOT}: run python -m pytest there", returncode=4
        )
    if config.getoption("--quick") and config.getoption("--record"):
        pytest.exit("--quick measures nothing: remove --record", returncode=4)
    try:
        source()
    except ValueError as error:
        pytest.exit(str(error), returncode=4)
    # An empty compiler cache, unless the user sets one: a first call then takes as long as on a new machine.
    if CACHE not in os.environ:
        scratch = tempfile.TemporaryDirectory(prefix="bvae-bench-")
        os.environ[CACHE] = scratch.name
        config.stash[COLD] = True
        config.add_cleanup(scratch.cleanup)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def memory(device: torch.device) -> Iterator[None]:
    """All contenders keep freed memory, as a run on a CPU does: what it gains is not counted as ours."""
    with malloc.kept() if device.type == "cpu" else nullcontext():
        yield


@pytest.fixture(scope="session")
def record(device: torch.device, request: pytest.FixtureRequest) -> Record:
    config = request.config
    new_record = Record(device, cold=COLD in config.stash, path=config.getoption("--record"))
    config.stash[RECORD] = new_record
    return new_record


@pytest.fixture
def race(
    device: torch.device, record: Record, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Result]]:
    """`Race.run` for this test, after which the record is written."""
    samples, calls = (0.02, 20) if device.type == "cuda" else (0.04, 2)
    usual = Race(device, record.results, samples, calls)
    quick = Race(device, record.results, 0.0, 1, max_rounds=1)
    torch.manual_seed(0)
    yield (quick if request.config.getoption("--quick") else usual).run
    launch.ENABLED = True
    record.save()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    new_record = config.stash.get(RECORD, None)
    if new_record is None or not new_record.results:
        return
    try:
        new_record.finish()
    except RuntimeError as error:  # after a kernel has failed, the GPU cannot measure the rates again
        terminalreporter.write_line(f"the rates are those from the start, because the device failed: {error}")
    terminalreporter.write_line("\n" + markdown(new_record.measured()))
    if new_record.path:
        terminalreporter.write_line(f"record: {new_record.path}")
