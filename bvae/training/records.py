"""The records of a run's log, metrics.jsonl, as they are read again."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bvae.opening import LOG, read_bytes

METRICS = "metrics.jsonl"


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a log and their records, without lines that a crash has cut short; no log has none.

    Raises:
        OSError: it cannot be read.
    """
    text = read_bytes(path, LOG).decode(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield line, record


def validated_kl(run: Path, latent_dim: int) -> list[float] | None:
    """The KL per latent of the last validation in a run folder's log, nats; None if the log has none."""
    last = None
    for _, record in read_records(run / METRICS):
        kl = record.get("kl_per_dim") if record.get("split") == "valid" else None
        if isinstance(kl, list) and len(kl) == latent_dim and all(isinstance(each, float) for each in kl):
            last = kl
    return last
