"""What a sweep shows: scores and reconstructions along its grid, in a table and a plot; the paper's table."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvae.evaluation import baselines

Found = Mapping[str, Sequence[Mapping[str, Any]]]  # of each value of the grid, its runs' evaluations
Baselines = Mapping[
    str, Mapping[str, Sequence[float]]
]  # of each code and each set of factors, a score a seed

SCORES = {
    "beta_vae": "BetaVAE",
    "factor_vae": "FactorVAE",
    "mig": "MIG",
    "dci_disentanglement": "DCI",
    "sap": "SAP",
    "modularity": "modularity",
}
MODEL = {"reconstruction_nats": "reconstruction, nats", "kl": "KL, nats", "active_units": "active units"}


def values(results: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A score's mean over metric seeds, or a figure of the model, in each run that has it."""
    if name in SCORES:
        return [each["scores"][name]["mean"] for each in results if name in each["scores"]]
    return [each["model"][name] for each in results]


def spread(numbers: Sequence[float], digits: int, factor: float = 1) -> str:
    """Mean and, of several runs, their standard deviation."""
    if not numbers:
        return ""
    scaled = factor * np.array(numbers)
    text = f"{scaled.mean():.{digits}f}"
    return f"{text} ± {scaled.std(ddof=1):.{digits}f}" if len(numbers) > 1 else text


def table(key: str, found: Found) -> str:
    """A row for each value of the grid; mean and standard deviation over training seeds."""
    names = [name for name in SCORES if any(values(results, name) for results in found.values())]
    lines = [
        " | ".join([f"| {key} | runs", *(SCORES[n] for n in names), *MODEL.values()]) + " |",
        "|---" * (2 + len(names) + len(MODEL)) + "|",
    ]
    for value, results in found.items():
        cells = [value, str(len(results)), *(spread(values(results, name), 3) for name in names)]
        cells += [spread(values(results, name), 1) for name in MODEL]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def paper_table(scores: Baselines, found: Found) -> str:
    """BetaVAE scores in percent: of codes without training, of the models found, and the paper's."""
    columns = list(baselines.FACTORS)
    lines = [
        " | ".join(["| BetaVAE score, %", *columns, "paper [S]"]) + " |",
        "|---" * (2 + len(columns)) + "|",
    ]

    def row(name: str, cells: Sequence[str], paper: float | None) -> None:
        lines.append(" | ".join([f"| {name}", *cells, f"{paper:g}" if paper is not None else ""]) + " |")

    for name, paper in baselines.PAPER.items():
        row(name, [spread(scores[name][column], 1, 100) for column in columns], paper)
    of_beta: dict[float | None, Sequence[Mapping[str, Any]]] = {float(v): each for v, each in found.items()}
    for name, (beta, paper) in baselines.TRAINED.items():
        row(name, [spread(values(of_beta.get(beta, ()), "beta_vae"), 1, 100), ""], paper)
    return "\n".join(lines) + f"\n\n{baselines.NOTES}"


def draw(key: str, found: Found) -> Figure:
    """Scores at the left, reconstruction and KL at the right along the grid: a dot a run, a line of means."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in SCORES.items():
        _line(left, found, name, label)
    for name in ("reconstruction_nats", "kl"):
        _line(right, found, name, MODEL[name])
    left.set(ylabel="score", ylim=(0, 1.02))
    right.set(ylabel="nats per image", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel=key, xticks=range(len(found)), xticklabels=list(found))
        if axes.lines:
            axes.legend(fontsize="small")
    return figure


def _line(axes: Axes, found: Found, name: str, label: str) -> None:
    each = [values(results, name) for results in found.values()]
    places = [place for place, numbers in enumerate(each) if numbers]
    if not places:
        return
    kept = [each[place] for place in places]
    line = axes.plot(places, [np.mean(numbers) for numbers in kept], label=label)[0]
    colour = line.get_color()
    axes.fill_between(places, [min(n) for n in kept], [max(n) for n in kept], color=colour, alpha=0.15, lw=0)
    axes.scatter(np.repeat(places, [len(n) for n in kept]), np.concatenate(kept), s=12, color=colour)
