"""What the spread over training seeds allows to say: pairwise tests, and how scores agree over runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Values = Callable[[Sequence[Mapping[str, Any]], str], list[float]]  # of a score, in each run that has it


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for their number (Holm 1979). NaN stays NaN and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    corrected, highest = list(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p[i] * (len(order) - rank)))
        corrected[i] = highest
    return corrected


def pairwise(
    by_label: Mapping[str, Sequence[Mapping[str, Any]]], names: Mapping[str, str], values: Values
) -> str:
    """Welch's t-test between all cells that have two runs or more, as a Markdown table.

    The p-values of each score are corrected for the number of its pairs. They are empty where no run differs
    from another with the same options.
    """
    lines = ["| score | | and | difference | p (Welch, Holm) |", "|---|---|---|---|---|"]
    for name, title in names.items():
        columns = {label: values(results, name) for label, results in by_label.items()}
        pairs = list(combinations([label for label, column in columns.items() if len(column) > 1], 2))
        corrected = holm([_welch(columns[a], columns[b]) for a, b in pairs])
        for (a, b), p in zip(pairs, corrected, strict=True):
            difference = np.mean(columns[a]) - np.mean(columns[b])
            lines.append(
                f"| {title} | {a} | {b} | {difference:+.3g} | {'' if math.isnan(p) else f'{p:.2g}'} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _welch(a: Sequence[float], b: Sequence[float]) -> float:
    if np.ptp(a) == np.ptp(b) == 0:
        return math.nan
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def correlations(runs: Sequence[Mapping[str, Any]], names: Mapping[str, str], values: Values) -> str:
    """Spearman's rank correlation between the scores over all runs, as a Markdown table.

    Runs are of all cells. Empty with fewer than 3 runs, and for a score that does not vary.
    """
    columns = {title: values(runs, name) for name, title in names.items()}
    columns = {title: column for title, column in columns.items() if len(column) == len(runs)}
    if len(runs) < 3 or len(columns) < 2:
        return ""
    matrix = _spearman(np.array(list(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for title, row in zip(columns, matrix, strict=True):
        cells = ("" if math.isnan(value) else f"{value:.2f}" for value in row)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spearman(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank correlations [S, S] of columns [S, N]; NaN where one does not vary."""
    ranks = stats.rankdata(columns, axis=1)
    centred = ranks - ranks.mean(1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return centred @ centred.T / np.outer(norms, norms)
