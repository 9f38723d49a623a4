"""The report of a sweep: scores and reconstructions for each value, as table and plot; the paper's table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvae.evaluation import baselines

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # value of the grid: evaluations of its runs
Baselines = Mapping[str, Mapping[str, Sequence[float]]]  # code: set of factors: one score per seed

SCORES = {
    "beta_vae": "BetaVAE",
    "factor_vae": "FactorVAE",
    "mig": "MIG",
    "dci_disentanglement": "DCI",
    "sap": "SAP",
    "modularity": "modularity",
    "infom": "InfoM",
    "infoc": "InfoC",
    "infoe": "InfoE",
    "udr": "UDR",
}
MODEL = {"reconstruction_nats": "reconstruction, nats", "kl": "KL, nats", "active_units": "active units"}


def values(results: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A score's mean over metric seeds, or a figure of the model, in each run that has it."""
    if name in SCORES:
        return [each["scores"][name]["mean"] for each in results if name in each["scores"]]
    return [each["model"][name] for each in results]


def spread(numbers: Sequence[float], digits: int, factor: float = 1) -> str:
    """The mean and, for several runs, the standard deviation."""
    if not numbers:
        return ""
    scaled = factor * np.array(numbers)
    text = f"{scaled.mean():.{digits}f}"
    return f"{text} ± {scaled.std(ddof=1):.{digits}f}" if len(numbers) > 1 else text


def table(key: str, by_value: Results) -> str:
    """A row for each value of the grid; mean and standard deviation over training seeds."""
    names = [name for name in SCORES if any(values(results, name) for results in by_value.values())]
    lines = [
        " | ".join([f"| {key} | runs", *(SCORES[n] for n in names), *MODEL.values()]) + " |",
        "|---" * (2 + len(names) + len(MODEL)) + "|",
    ]
    for value, results in by_value.items():
        cells = [value, str(len(results)), *(spread(values(results, name), 3) for name in names)]
        cells += [spread(values(results, name), 1) for name in MODEL]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def paper_table(scores: Baselines, by_value: Results) -> str:
    """BetaVAE scores in percent: of codes without training, of the sweep's models, and of the paper."""
    columns = list(baselines.FACTORS)
    lines = [
        " | ".join(["| BetaVAE score, %", *columns, "paper [S]"]) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]

    def row(name: str, cells: Sequence[str], paper: float | None) -> None:
        lines.append(" | ".join([f"| {name}", *cells, f"{paper:g}" if paper is not None else ""]) + " |")

    for name, paper in baselines.PAPER.items():
        row(name, [spread(scores[name][column], 1, 100) for column in columns], paper)
    by_beta: dict[float | None, Sequence[Mapping[str, Any]]] = {
        float(v): each for v, each in by_value.items()
    }
    for name, (beta, paper) in baselines.TRAINED.items():
        row(name, [spread(values(by_beta.get(beta, ()), "beta_vae"), 1, 100), ""], paper)
    return "\n".join(lines) + f"\n\n{baselines.NOTES}"


def draw(key: str, by_value: Results) -> Figure:
    """Plot scores, reconstruction and KL over the grid: a dot per run, a line of means."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, label in SCORES.items():
        _line(left, by_value, name, label)
    _line(middle, by_value, "reconstruction_nats", "reconstruction")
    _line(right, by_value, "kl", "KL")
    left.set(ylabel="score", ylim=(0, 1.02))
    middle.set(ylabel="reconstruction, nats per image")
    right.set(ylabel="KL, nats per image", ylim=(0, None))
    for axes in (left, middle, right):
        axes.set(xlabel=key, xticks=range(len(by_value)), xticklabels=list(by_value))
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def _line(axes: Axes, by_value: Results, name: str, label: str) -> None:
    columns = [values(results, name) for results in by_value.values()]
    xs = [x for x, numbers in enumerate(columns) if numbers]
    if not xs:
        return
    ys = [columns[x] for x in xs]
    line = axes.plot(xs, [np.mean(numbers) for numbers in ys], label=label)[0]
    colour = line.get_color()
    axes.fill_between(xs, [min(n) for n in ys], [max(n) for n in ys], color=colour, alpha=0.15, lw=0)
    axes.scatter(np.repeat(xs, [len(n) for n in ys]), np.concatenate(ys), s=12, color=colour)
