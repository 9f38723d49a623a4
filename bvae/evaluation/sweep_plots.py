"""The plots of a sweep: scores along the grid, and what they cost in reconstruction and KL."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bvae.evaluation.sweep_report import SCORES, Results, values

COLUMNS = 4  # of the trade-offs


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
        if key == "model":  # long names
            axes.tick_params(axis="x", rotation=20)
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


def draw_tradeoffs(key: str, by_value: Results) -> Figure:
    """Plot reconstruction and each score against the KL: a dot per run, a colour per model."""
    shown = [name for name in SCORES if any(values(results, name) for results in by_value.values())]
    rows = math.ceil((1 + len(shown)) / COLUMNS)
    figure = Figure(figsize=(3.5 * COLUMNS, 3.2 * rows), layout="constrained")
    left, *rest = (figure.add_subplot(rows, COLUMNS, i + 1) for i in range(1 + len(shown)))
    for label, results in by_value.items():
        kl = values(results, "kl")
        left.scatter(kl, values(results, "reconstruction_nats"), s=14, label=label)
        for axes, name in zip(rest, shown, strict=True):
            scores = values(results, name)
            if len(scores) == len(kl):
                axes.scatter(kl, scores, s=14)
    left.set(xlabel="KL, nats per image", ylabel="reconstruction, nats per image")
    left.legend(fontsize="small", title=key)
    for axes, name in zip(rest, shown, strict=True):
        axes.set(xlabel="KL, nats", title=SCORES[name], ylim=(0, 1.02))
    return figure
