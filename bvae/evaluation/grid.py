"""The grid of a sweep: options of bvae.train with their values, in every combination."""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from bvae.errors import UsageError


class Cell(NamedTuple):
    """One combination of values, which is trained with several seeds."""

    label: str  # in tables and plots: 4, or loss_type=H beta=4 if there are several options
    folder: str  # the beginning of its runs' names: beta-4
    options: dict[str, str]

    @property
    def command(self) -> list[str]:
        """The options of bvae.train."""
        return [word for key, value in self.options.items() for word in (f"--{key.replace('_', '-')}", value)]


def parse(grids: Sequence[str]) -> tuple[str, list[Cell]]:
    """What the tables call the cells, and the cells of all grids: "loss_type=H beta=1,4" has two.

    Raises:
        ValueError: a text that is no grid, or two equal cells.
    """
    combinations = [combination for text in grids for combination in _combinations(text)]
    keys = {key for options in combinations for key in options}
    alone = len(keys) == 1
    cells = []
    for options in combinations:
        label = " ".join(options.values() if alone else (f"{key}={value}" for key, value in options.items()))
        folder = "-".join(f"{key}-{value}" for key, value in options.items())
        cells.append(Cell(label, folder, options))
    if len({cell.folder for cell in cells}) < len(cells):
        raise UsageError(f"--grid must hold different values, got {' and '.join(map(repr, grids))}")
    return keys.pop() if alone else "model", cells


def _combinations(text: str) -> list[dict[str, str]]:
    columns: dict[str, list[str]] = {}
    for part in text.split():
        key, equals, values = part.partition("=")
        columns[key] = [value.strip() for value in values.split(",")]
        if not (key and equals and all(columns[key])):
            raise UsageError(f"--grid must be options and different values, as beta=1,4, got {text!r}")
    if not columns:
        raise UsageError("--grid must be options and different values, as beta=1,4, got nothing")
    return [dict(zip(columns, values, strict=True)) for values in product(*columns.values())]
