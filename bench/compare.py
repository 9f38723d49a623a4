"""Run the same benchmarks on two commits: `python -m bench.compare BASE [--rounds 2] [pytest's options]`.

BASE is checked out beside the source tree and gets the tree's own bench/. The two are measured in turn: base,
tree; tree, base. The command prints the timings that moved beyond the spread: those for which the quartiles
of all runs of one side lie beyond the quartiles of all runs of the other.

    python -m bench.compare main -k "kernels and 144"
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bench.record import ROOT, load
from bench.report import quantity

Record = dict[str, Any]


class Span(NamedTuple):
    """A contender's seconds per call over several records: the median of medians, the outermost quartiles."""

    median: float
    low: float
    high: float
    images: int | None


class Move(NamedTuple):
    """A contender that became faster or slower beyond the spread."""

    name: str
    base: Span
    tree: Span

    @property
    def speedup(self) -> float:
        return self.base.median / self.tree.median


def spans(records: list[Record]) -> dict[str, Span]:
    """The span of each benchmark and contender."""
    seconds: dict[str, list[list[float]]] = {}
    images: dict[str, int | None] = {}
    for record in records:
        for result in record["results"]:
            for contender, timing in result["timings"].items():
                name = f"{result['group']}: {result['name']}: {contender}"
                seconds.setdefault(name, []).append(timing["seconds"])
                images[name] = result["facts"].get("images")
    result_spans = {}
    for name, values in seconds.items():
        medians, lows, highs = zip(*values, strict=True)
        result_spans[name] = Span(sorted(medians)[len(medians) // 2], min(lows), max(highs), images[name])
    return result_spans


def moves(base: list[Record], tree: list[Record]) -> list[Move]:
    """The timings that moved beyond the spread, the largest change first."""
    before, after = spans(base), spans(tree)
    moved = [
        Move(name, before[name], after[name])
        for name in before.keys() & after.keys()
        if after[name].low > before[name].high or after[name].high < before[name].low
    ]
    return sorted(moved, key=lambda move: (-max(move.speedup, 1 / move.speedup), move.name))


def table(base: list[Record], tree: list[Record]) -> str:
    """Markdown: the timings that moved, and the number of all timings."""
    moved, count = moves(base, tree), len(spans(base).keys() & spans(tree).keys())
    lines = [f"{len(moved)} of {count} timings moved beyond the spread."]
    if moved:
        lines += ["", "| benchmark | base | tree | speed-up |", "|---|---|---|---|"]
    for name, old, new in moved:
        cells = quantity(old.median, old.images), quantity(new.median, new.images)
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {old.median / new.median:.2f} x |")
    return "\n".join(lines)


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)


@contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """Check out `commit` with this tree's benchmarks."""
    with tempfile.TemporaryDirectory(prefix="bvae-base-") as scratch:
        folder = Path(scratch) / "base"
        _git("worktree", "add", "--detach", str(folder), commit)
        try:
            shutil.rmtree(folder / "bench", ignore_errors=True)
            shutil.copytree(
                ROOT / "bench", folder / "bench", ignore=shutil.ignore_patterns("__pycache__", "results")
            )
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def _measure(folder: Path, record: Path, options: list[str]) -> Record:
    command = [sys.executable, "-m", "pytest", "bench", "--record", str(record), *options]
    subprocess.run(command, cwd=folder, check=True)
    return load(record)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a run failed, 2 there is no such commit."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    parser.add_argument("base", help="the commit to compare with")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side")
    arguments, options = parser.parse_known_args(argv)
    records: dict[str, list[Record]] = {"base": [], "tree": []}
    try:
        with _checkout(arguments.base) as folder:
            for turn in range(arguments.rounds):
                sides = [("base", folder), ("tree", ROOT)]
                for side, source in sides[:: -1 if turn % 2 else 1]:
                    print(f"round {turn + 1} of {arguments.rounds}: {side}", flush=True)
                    records[side].append(_measure(source, folder.parent / f"{side}-{turn}.json", options))
    except subprocess.CalledProcessError as error:
        if "worktree" in error.cmd:
            print(f"error: {arguments.base}: {error.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return 2
        print("error: a benchmark failed, see above; select others with -k", file=sys.stderr)
        return 1
    print(table(records["base"], records["tree"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
