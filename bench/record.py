"""A record: what was measured, on which machine, with which versions, at which commit, when."""

import json
import os
import platform
import re
import statistics
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.race import Result, clock
from bvae.training.step import autocast_dtype

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("triton", "torchvision", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def _git(*arguments: str) -> str:
    """What git says about this source tree; empty where it is none."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
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
    """The machine's own limits, measured now: bytes copied and arithmetic done in a second."""
    cuda = device.type == "cuda"
    source = torch.rand((1 << 28) if cuda else (1 << 25), device=device)  # 1 GiB, 128 MiB: beyond any cache
    target = torch.empty_like(source)
    copy = _best_of(lambda: target.copy_(source), device)
    found = {"copy_bytes_per_s": 2 * source.nbytes / copy}
    n = 8192 if cuda else 1536
    for dtype in dict.fromkeys((torch.float32, autocast_dtype(device, amp=True)[0] or torch.float32)):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_flop_per_s"] = 2 * n**3 / _best_of(lambda a=a, b=b: a @ b, device)
    return found


class Record:
    """A run's results, and what was true while it ran; cold: nothing had been compiled before."""

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.device = device
        self.results: list[Result] = []
        self.head = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "--short=7", "HEAD"),
            "uncommitted": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "cold": cold,
            "machine": machine(device),
            "rates": rates(device),
            "load_before": os.getloadavg()[0],
        }

    def finish(self) -> dict[str, Any]:
        """The whole record. The rates are the better of before and after; load is a minute's average."""
        self.head["load_after"] = os.getloadavg()[0]
        after = rates(self.device)
        self.head["rates"] = {name: max(rate, after[name]) for name, rate in self.head["rates"].items()}
        return {**self.head, "results": [result.as_json() for result in self.results]}


def save(record: dict[str, Any], path: Path) -> Path:
    """Write a record to a .json file, or under a folder as <device>/<date>-<commit>.json."""
    if path.suffix != ".json":
        path = path / slug(record) / f"{record['date'][:10]}-{record['commit'] or 'no-commit'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(record))
    return path


def slug(record: dict[str, Any]) -> str:
    """The device as a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", record["machine"]["device"].lower()).strip("-")


def _round(value: Any) -> Any:
    """Four digits say all that a timing can."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, (list, tuple)) else value


def dumps(record: dict[str, Any]) -> str:
    """JSON with a line for each contender: small, and readable in a diff."""
    text = json.dumps(_round(record), indent=1)
    return re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text) + "\n"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def newest(kind: str, results: Path = RESULTS) -> Path | None:
    """The newest record of a kind of device ('cpu', 'cuda')."""
    found = [
        (load(path)["date"], path)
        for path in results.glob("*/*.json")
        if load(path)["machine"]["kind"] == kind
    ]
    return max(found)[1] if found else None
