"""Records to Markdown and plots: `python -m bench.report`.

Takes the newest measurement of each benchmark on each device, over all its records. Writes them in full, with
plots, to a README.md beside the records, and rewrites two tables between their markers, with a column per
device. The README's table has one benchmark of each group; that of docs/performance.md has all headlines of
the records. Cells that are older than their column's head name their date and commit.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import RESULTS, ROOT, latest, rows, slug
from bench.roofline import busy_seconds, cost, share

README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
NOT_MEASURED = "not measured yet"
GROUPS = "quality", "step", "training", "kernels", "optimizer", "loader", "scaling"
LOWEST = 0.5  # of our quality: where a plot of quality begins
BUSY = 0.5  # processes beside the benchmarks' own

Record = dict[str, Any]
Result = dict[str, Any]


def quantity(seconds: float, images: int | None) -> str:
    """The time per call or, if the call works on images, images per second."""
    if images:
        return (
            f"{images / seconds:.4g} images/s"
            if images / seconds < 1e4
            else f"{images / seconds:,.0f} images/s"
        )
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError


def times(ratio: Sequence[float]) -> str:
    """A ratio (how many times as fast), with its quartiles."""
    median, low, high = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in ratio)
    return f"{median} x ({low} to {high})"


def _when(run: Record | Result) -> str:
    uncommitted = " with changes" if run["uncommitted"] else ""
    return f"{run['date'][:10]}, commit {run['commit'] or 'none'}{uncommitted}"


def _conditions(record: Record) -> str:
    return f"{record['machine']['device']}, {_when(record)}"


def _origin(result: Result, record: Record) -> str:
    """When a result was measured and with which other versions, in brackets; empty if as in its head."""
    versions = record["machine"]["versions"]
    others = [f"{k} {v}" for k, v in result["machine"]["versions"].items() if v != versions.get(k)]
    if not others and _when(result) == _when(record):
        return ""
    return f" ({', '.join([_when(result), *others])})"


def _remarks(record: Record) -> str:
    """A remark if the machine did other work before the benchmarks began."""
    load = max(result["load_before"] for result in rows(record))
    text = f" {record['machine']['device']}: the machine was shared, load {load:.1f} at the first benchmark."
    return text if load > BUSY else ""


def _results(record: Record) -> list[Result]:
    """The results in the order of the report, the most important group first."""
    ranks = {group: rank for rank, group in enumerate(GROUPS)}
    return sorted(rows(record), key=lambda result: ranks.get(result["group"], len(ranks)))


def markdown(record: Record) -> str:
    """The whole record: a table per group, a line per benchmark, a column per contender.

    A contender's cell has its rate and how many times as fast the hero is: "ours", or its replacement.
    """
    machine, rates = record["machine"], record["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    measured = f"copy {rates['copy_bytes_per_s'] / 1e9:.0f} GB/s"
    for name, rate in rates.items():
        if name.endswith("_flop_per_s"):
            measured += f", {name.removesuffix('_flop_per_s')} {rate / 1e9:,.0f} GFLOP/s"
    driver = f"; driver {machine['driver']}, CUDA {machine['cuda']}" if machine["driver"] else ""
    results = _results(record)
    cached = "" if all(result["cold"] for result in results) else ", as far as a cache had not the code"
    lines = [
        f"# {_conditions(record)}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_capability']}{driver}; {versions}. "
        f"Measured in the same run: {measured}.{_remarks(record)}",
        "",
        "Medians over alternating rounds. In brackets: how many times as fast the contender named there is, "
        f"and the quartiles of that. Its first call includes compiling{cached}; its share of the floor is "
        "that of `bench/roofline.py`, on a GPU without the gaps between kernels, and above 100% where a "
        "cache served, or others kept the machine from the rates above when these were measured.",
    ]
    for group in dict.fromkeys(result["group"] for result in results):
        lines += ["", *_group([r for r in results if r["group"] == group], record)]
    bars = [bar for result in results for bar in result["bars"]]
    if bars:
        lines += ["", "| asked for | at least | measured | |", "|---|---|---|---|"]
    for bar, ratio in bars:
        verdict = "met" if ratio[0] >= bar["at_least"] else "missed"
        lines.append(_row([bar["claim"], f"{bar['at_least']:g} x", times(ratio), verdict]))
    return "\n".join(lines) + "\n"


def _group(results: list[Result], record: Record) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result["timings"]))
    names += list(dict.fromkeys(r["missing"] for r in results if r["missing"]))
    header = [results[0]["group"], *names, "first call", "of the floor"]
    if any(t["launches"] for r in results for t in r["timings"].values()):
        header += ["launches", "extra MB"]
    lines = [_row(header), "|---" * len(header) + "|"]
    for result in results:
        cells = [result["name"] + _origin(result, record)]
        timings, floor = result["timings"], share(result)
        for name in names:
            if name == result["missing"]:
                cells.append(NOT_MEASURED)
            elif name not in timings:
                cells.append("")
            else:
                cell = quantity(timings[name]["seconds"][0], result["facts"].get("images"))
                ratio = f"{cell} ({result['hero']}: {times(timings[name]['ratio'])})"
                cells.append(cell if name == result["hero"] else ratio)
        best = timings[result["hero"]]
        cells.append("" if best["first_call"] is None else f"{best['first_call']:.3g} s")
        cells.append("" if floor is None else f"{floor:.0%}")
        if n_bytes := result["facts"].get("bytes"):
            cells[-1] += f" ({n_bytes / busy_seconds(best) / 1e9:.3g} GB/s)"
        if len(header) > len(cells):
            cells += [
                "" if best[k] is None else f"{best[k] / d:.3g}"
                for k, d in (("launches", 1), ("peak_bytes", 1e6))
            ]
        lines.append(_row(cells))
        if cpu := result["facts"].get("cpu_us_per_image"):
            hero = result["hero"]
            ratios = {name: f"{spent / cpu[hero]:.2f} x that of {hero}" for name, spent in cpu.items()}
            spent = [f"{cpu[name]:.0f} µs ({ratios[name]})" if name in cpu else "" for name in names]
            lines.append(_row([f"{result['name']}: CPU time an image", *spent, "", ""]))
        if result["group"] == "quality":
            lines += _quality_rows(result, names)
    return lines


def _quality_rows(result: Result, names: list[str]) -> list[str]:
    """The quality that each recipe reached, by seed, with the KL; and its CPU time."""
    facts = result["facts"]
    reached = {
        name: ", ".join(f"{q:.3f} ({kl:.1f})" if abs(q) < 1 else f"{q:.1f} ({kl:.1f})" for q, kl in pairs)
        for name, pairs in (
            (name, zip(facts["quality"][name], facts["kl"][name], strict=True)) for name in facts["quality"]
        )
    }
    spent = {name: f"{seconds:.0f} s" for name, seconds in facts["cpu_seconds"].items()}
    return [
        _row([f"{result['name']}: {label}", *(cells.get(name, "") for name in names), "", ""])
        for label, cells in ((f"{facts['unit']} (KL, nats)", reached), ("CPU time", spent))
    ]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _headline(result: Result, brief: bool) -> str:
    """The hero's rate, and how many times as fast it is as others.

    If `brief`, only the first contender is compared, and the best of the others in time to quality. Otherwise
    all contenders of a step, also ours without single layers; in other groups the first and the fastest.
    """
    timings, hero = result["timings"], result["hero"]
    cell = quantity(timings[hero]["seconds"][0], result["facts"].get("images"))
    if result["missing"]:
        cell = f"{result['missing']}: {NOT_MEASURED}; {hero}: {cell}"
    others = [name for name in timings if name != hero]
    if brief and result["group"] != "quality":
        others = others[:1]
    elif result["group"] != "step":
        first, *peers = [name for name in others if not name.startswith("ours")]
        others = [first, *sorted(peers, key=lambda name: timings[name]["seconds"][0])[:1]]
    return "<br>".join([cell, *(_comparison(result, name) for name in others)])


def _comparison(result: Result, name: str) -> str:
    text = f"{times(result['timings'][name]['ratio'])} as fast as {name}"
    if not (missed := result["facts"].get("missed", {}).get(name)):
        return text
    return f"at least {text}, which missed the target in {missed} of {result['rounds']} runs"


def headline_table(records: Sequence[Record], *, brief: bool) -> str:
    """The table of the records' headlines; one column per device, CPUs first.

    Args:
        brief: only the first measured benchmark of each group, compared with what people use today.
    """
    columns: list[tuple[str, dict[str, str]]] = []  # a head, and the cells by their label
    groups: dict[str, str] = {}  # of the labels
    for record in sorted(records, key=lambda record: record["machine"]["kind"] != "cpu"):
        shown = [result for result in _results(record) if result["facts"].get("headline")]
        if brief:
            measured = [result for result in shown if not result["missing"]]
            shown = list({result["group"]: result for result in reversed(measured)}.values())[::-1]
        cells = {r["facts"]["headline"]: _headline(r, brief) + _origin(r, record) for r in shown}
        columns.append((_conditions(record), cells))
        groups |= {result["facts"]["headline"]: result["group"] for result in shown}
    lines = [_row(["", *(head for head, _ in columns)]), "|---" * (len(columns) + 1) + "|"]
    for label in sorted(groups, key=lambda label: GROUPS.index(groups[label])):
        lines.append(_row([label, *(cells.get(label, "") for _, cells in columns)]))
    remark = "".join(_remarks(record) for record in records)
    return "\n".join(lines) + (f"\n\n{remark.strip()}" if remark else "")


def rewrite(text: str, table: str) -> str:
    """Replace the table between a page's markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"a page with a table needs each of the lines {BEGIN} and {END} once")
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)


def _ratios(record: Record, plt: Any) -> Any:
    """A bar plot: how many times as fast as the first contender, with quartiles."""
    results = [r for r in _results(record) if "headline" in r["facts"]]
    if not results:
        return None
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(results)))
    for y, result in enumerate(reversed(results)):
        first = next(iter(result["timings"]))
        median, low, high = result["timings"][first]["ratio"]
        whiskers = [[median - low], [high - median]]
        axes.barh(y, median - 1, left=1, xerr=whiskers, color="tab:blue", capsize=3)
        axes.text(max(high, 1) * 1.1, y, f"{result['hero']} / {first}", va="center", fontsize=8)
    axes.set_yticks(range(len(results)), [r["facts"]["headline"] for r in reversed(results)])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(axes.get_xlim()[0], axes.get_xlim()[1] * 6)  # room for the last label
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times as fast; whiskers: quartiles")
    return figure


def _roofline(record: Record, plt: Any) -> Any:
    """A roofline plot of the steps, under the roofs of copying and of arithmetic."""
    rates, results = record["rates"], [r for r in rows(record) if "model" in r["facts"]]
    if not results:
        return None
    figure, axes = plt.subplots(figsize=(9, 5))
    intensities = [2.0**i for i in range(1, 12)]
    for dtype in sorted({r["facts"]["dtype"] for r in results}):
        roof = [min(rates["copy_bytes_per_s"] * i, rates[f"{dtype}_flop_per_s"]) / 1e9 for i in intensities]
        axes.loglog(intensities, roof, label=f"roof, {dtype}")
    for group in dict.fromkeys(r["group"] for r in results):
        x, y = [], []
        for facts, result in ((r["facts"], r) for r in results if r["group"] == group):
            step_cost = cost(facts["model"], 4 if facts["dtype"] == "float32" else 2)
            flop = facts["images"] * step_cost.flop
            x.append(flop / step_cost.bytes_per_step(facts["images"]))
            y.append(flop / result["timings"][result["hero"]]["seconds"][0] / 1e9)
        axes.loglog(x, y, "o", label=group)
    axes.set_xlabel("arithmetic intensity at the fused floor, FLOP per byte")
    axes.set_ylabel("GFLOP/s")
    axes.legend()
    return figure


def _scaling(record: Record, plt: Any) -> Any:
    """A plot of images per second over each of the axes."""
    results = [r for r in rows(record) if r["group"] == "scaling"]
    if not results:
        return None
    names = list(dict.fromkeys(r["facts"]["axis"] for r in results))
    figure, panels = plt.subplots(1, len(names), figsize=(4 * len(names), 4), sharey=True, squeeze=False)
    for axes, name in zip(panels[0], names, strict=True):
        line = sorted(
            (r for r in results if r["facts"]["axis"] == name), key=lambda result: result["facts"]["value"]
        )
        for contender in dict.fromkeys(contender for r in line for contender in r["timings"]):
            timed = [(r["facts"], r["timings"][contender]) for r in line if contender in r["timings"]]
            y = [facts["images"] / timing["seconds"][0] for facts, timing in timed]
            axes.loglog([facts["value"] for facts, _ in timed], y, "o-", label=contender)
        axes.set_xlabel(name)
        axes.set_xticks([r["facts"]["value"] for r in line], [str(r["facts"]["value"]) for r in line])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(True, which="both", alpha=0.3)
    panels[0][0].set_ylabel("images/s")
    panels[0][0].legend()
    return figure


def _quality(record: Record, plt: Any) -> Any:
    """Plots of quality over the seconds of training, a curve per recipe and seed."""
    results = [r for r in rows(record) if r["group"] == "quality"]
    if not results:
        return None
    figure, panels = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
    for axes, result in zip(panels[0], results, strict=True):
        facts = result["facts"]
        for number, (name, curves) in enumerate(facts["curves"].items()):
            for seed, curve in enumerate(curves):
                label = None if seed else name
                axes.plot(*zip(*curve, strict=True), ".-", color=f"C{number}", label=label)
        if "target" in facts:
            axes.axhline(facts["target"], color="black", linewidth=0.8, linestyle=":")
        low, high = (f(facts["quality"][name]) for f, name in ((min, "ours"), (max, "ours")))
        axes.set_ylim(low - LOWEST * abs(low), high + 0.05 * abs(high))
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(facts["unit"])
        axes.set_title(result["name"], fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def draw(record: Record, folder: Path) -> list[Path]:
    """Write the record's plots into a folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for name, plot in (
        ("quality", _quality),
        ("ratios", _ratios),
        ("roofline", _roofline),
        ("scaling", _scaling),
    ):
        figure = plot(record, plt)
        if figure is None:
            continue
        figure.suptitle(_conditions(record), fontsize=9)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=80, metadata={"Software": None})
        plt.close(figure)
        written.append(folder / f"{name}.png")
    return written


def main(readme: Path = README, performance: Path = PERFORMANCE, results: Path = RESULTS) -> int:
    """Exit status: 0 done, 1 there is no record, a file is not a record, or a page has no markers."""
    try:
        records = latest(results)
        pages = {
            path: rewrite(path.read_text(), headline_table(records, brief=path is readme))
            for path in (readme, performance)
        }
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not records:
        print(f"error: no record under {results}: make one with `make bench`", file=sys.stderr)
        return 1
    for record in records:
        folder = results / slug(record)
        folder.mkdir(exist_ok=True)  # a record may lie in a folder of another name
        pictures = draw(record, folder)
        page = folder / "README.md"
        page.write_text(markdown(record) + "".join(f"\n![{p.stem}]({p.name})\n" for p in pictures))
        print(markdown(record), *(f"wrote {written}" for written in (page, *pictures)), sep="\n")
    for path, text in pages.items():
        path.write_text(text)
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
