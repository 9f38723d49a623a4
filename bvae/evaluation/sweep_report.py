"""The report of a sweep: tables of scores and reconstructions for each value of the grid."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bvae.evaluation import baselines, statistics

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


def comparisons(by_value: Results) -> str:
    """Pairwise tests over training seeds, and rank correlations over all runs, as Markdown."""
    names = {**SCORES, **MODEL}
    runs = [run for results in by_value.values() for run in results]
    parts = {
        "Differences between models, over training seeds": statistics.pairwise(by_value, names, values),
        "Rank correlation of the scores over all runs (Spearman)": statistics.correlations(
            runs, names, values
        ),
    }
    written = [f"## {title}\n\n{text}" for title, text in parts.items() if text]
    return "\n".join(written) or "Too few runs: pairwise tests need two per model, correlations three.\n"


def csv_table(key: str, by_value: Results) -> str:
    """A row for each run: all its scores and figures."""
    runs = [(value, run) for value, results in by_value.items() for run in results]
    scores = sorted({name for _, run in runs for name in run["scores"]})
    figures = sorted({name for _, run in runs for name in run["model"] if not name.endswith("per_latent")})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([key, "run", *scores, *figures])
    for value, run in runs:
        means = [run["scores"][name]["mean"] if name in run["scores"] else "" for name in scores]
        table.writerow([value, run["run"], *means, *(run["model"].get(name) for name in figures)])
    return text.getvalue()


def latex(key: str, by_value: Results) -> str:
    """`table` for a paper, with booktabs."""
    header, _, *rows = (line.strip("| ").split(" | ") for line in table(key, by_value).splitlines())

    def row(cells: Sequence[str]) -> str:
        return " & ".join(_escape(cell) for cell in cells) + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            row(header),
            r"\midrule",
            *map(row, rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _escape(cell: str) -> str:
    for character in "_%&#":
        cell = cell.replace(character, "\\" + character)
    return cell.replace("±", r"$\pm$")
