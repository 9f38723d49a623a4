"""A record: the results, with the machine, the versions, the commit and the date."""

import json
import os
import platform
import re
import statistics
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.race import Result, clock, now
from bvae import files
from bvae.training.step import autocast_dtype

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CODE = (".", ":!bench/results", ":!*.md")  # files that can change a figure
# The facts of a run. In a file of several runs, rows of other runs than the head's have their own.
RUN = ("date", "commit", "uncommitted", "cold", "machine", "rates", "load_before")
PACKAGES = ("triton", "torchvision", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def source() -> tuple[str, bool]:
    """The source tree's commit, and whether its code has uncommitted changes.

    Without .git, both come from BVAE_COMMIT: 1a2b3c4, or 1a2b3c4-dirty with changes. Empty if it is not set.

    Raises:
        ValueError: BVAE_COMMIT is no commit.
    """
    with suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():  # otherwise git would use a repository around this folder
            # Records and reports do not count as changes: a second run still measures the same code.
            changes = _git("status", "--porcelain", "--untracked-files=no", "--", *CODE)
            return _git("rev-parse", "--short=7", "HEAD"), bool(changes)
    variable = os.environ.get("BVAE_COMMIT", "")
    if variable and not re.fullmatch("[0-9a-f]{7,40}(-dirty)?", variable):
        raise ValueError(f"BVAE_COMMIT must be a commit such as 1a2b3c4 or 1a2b3c4-dirty, got {variable!r}")
    return variable[:7], variable.endswith("-dirty")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def machine(device: torch.device) -> dict[str, Any]:
    """The facts of the machine on which the figures depend."""
    threads = torch.get_num_threads()
    cuda = device.type == "cuda"
    return {
        "kind": device.type,
        "device": torch.cuda.get_device_name(device) if cuda else f"{_cpu_model()}, {threads} CPU threads",
        "cpu": _cpu_model(),
        "threads": threads,
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": autocast_dtype(device, amp=True)[0] == torch.bfloat16,
        "system": platform.platform(),
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "versions": _versions(),
    }


def _best_of(call: Any, device: torch.device) -> float:
    call()
    return statistics.median(clock(call, device) for _ in range(7))


def rates(device: torch.device) -> dict[str, float]:
    """The machine's own limits, measured now: bytes copied and operations per second."""
    cuda = device.type == "cuda"
    source = torch.rand((1 << 28) if cuda else (1 << 25), device=device)  # 1 GiB, 128 MiB: beyond any cache
    target = torch.empty_like(source)
    copy = _best_of(lambda: target.copy_(source), device)
    limits = {"copy_bytes_per_s": 2 * source.nbytes / copy}
    n = 8192 if cuda else 1536
    for dtype in dict.fromkeys((torch.float32, autocast_dtype(device, amp=True)[0] or torch.float32)):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        limits[f"{name}_flop_per_s"] = 2 * n**3 / _best_of(lambda a=a, b=b: a @ b, device)
    return limits


class Record:
    """The results of a run, and the facts about it.

    Args:
        cold: nothing had been compiled before.
        path: a .json file, or a folder for <device>/<day>-<commit>.json. Existing results are kept, except
            for benchmarks that are measured again. None: nothing is written.

    Raises:
        ValueError: BVAE_COMMIT is not a commit, or the file is not a record.
    """

    def __init__(self, device: torch.device, *, cold: bool, path: Path | None = None) -> None:
        commit, uncommitted = source()
        self.device, self.path = device, path
        self.results: list[Result] = []
        self.run: dict[str, Any] = {
            "date": now(),
            "commit": commit,
            "uncommitted": uncommitted,
            "cold": cold,
            "machine": machine(device),
            "rates": rates(device),
            "load_before": os.getloadavg()[0],
        }
        if path and path.suffix != ".json":
            self.path = path / slug(self.run) / f"{self.run['date'][:10]}-{commit or 'no-commit'}.json"
        self._before = rows(load(self.path)) if self.path and self.path.exists() else []

    def measured(self) -> dict[str, Any]:
        """This run's results as a record."""
        return assemble([{**self.run, **result.as_json()} for result in self.results])

    def save(self) -> None:
        """Write the results so far, atomically. Raises OSError."""
        if self.path and self.results:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(self.path, dumps(assemble([*self._before, *rows(self.measured())])))

    def finish(self) -> None:
        """Measure the rates again, keep the better ones, and write."""
        after = rates(self.device)
        self.run["rates"] = {name: max(rate, after[name]) for name, rate in self.run["rates"].items()}
        self.save()


def rows(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A record's results, each with the facts of its run (`RUN`)."""
    run = {key: record[key] for key in RUN}
    return [{**run, **result} for result in record["results"]]


def assemble(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of `rows`, with the newest row of each benchmark.

    Its head has the facts of the newest row; other rows have only the facts that differ.
    """
    measured = sorted(measured, key=lambda row: row["date"])  # rows of the same second keep their order
    head = {key: measured[-1][key] for key in RUN}
    newest = {(row["group"], row["name"]): row for row in measured}
    results = [
        {key: value for key, value in row.items() if key not in RUN or value != head[key]}
        for row in newest.values()
    ]
    return {**head, "results": results}


def latest(results: Path = RESULTS) -> list[dict[str, Any]]:
    """One record per device, CPUs first: the newest measurement of each benchmark over all its records.

    A benchmark that no longer exists stays until the record that holds it is deleted.
    """
    devices: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(results.glob("*/*.json")):
        for row in rows(load(path)):
            devices.setdefault((row["machine"]["kind"], slug(row)), []).append(row)
    return [assemble(devices[device]) for device in sorted(devices)]


def slug(record: dict[str, Any]) -> str:
    """A folder name for the device."""
    return re.sub(r"[^a-z0-9]+", "-", record["machine"]["device"].lower()).strip("-")


def _round(value: Any) -> Any:
    """Round to four digits, the accuracy of a timing."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, (list, tuple)) else value


def dumps(record: dict[str, Any]) -> str:
    """JSON with one line per contender: small, and readable in a diff."""
    text = json.dumps(_round(record), indent=1)
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"


def load(path: Path) -> dict[str, Any]:
    """Read a record. Raises ValueError if the file is not one."""
    try:
        record = json.loads(path.read_text())
        rows(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of bench/: move it away ({error!r})") from None
    return record
