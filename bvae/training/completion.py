"""The mark of a finished run: written after all its results, with their sizes and checksums."""

import contextlib
import hashlib
import json
from pathlib import Path

from bvae import files
from bvae.opening import CONFIG, WEIGHTS, read_bytes

MARK = "finished.json"
RESULTS = (
    *("config.yaml", "config.json", "model.safetensors"),
    *("reconstructions.png", "samples.png", "traversals.png", "traversals.gif"),
)


def mark(run: Path) -> None:
    """Write the mark into a run folder. Raises OSError."""
    checksums = {name: _checksum(run / name) for name in RESULTS}
    files.write_text(run / MARK, json.dumps(checksums, indent=1) + "\n")


def unmark(run: Path) -> None:
    """Remove the mark, before a run writes into the folder. Raises OSError."""
    files.remove(run / MARK)


def is_marked(run: Path) -> bool:
    """Whether the run has finished, and its results are those that it wrote."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        marked = json.loads(read_bytes(run / MARK, CONFIG))
        return all(marked.get(name) == _checksum(run / name) for name in RESULTS)
    return False


def _checksum(path: Path) -> list[int | str]:
    data = read_bytes(path, WEIGHTS)
    return [len(data), hashlib.blake2b(data, digest_size=16).hexdigest()]
