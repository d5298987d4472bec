"""Results as an aligned table, as JSON with what machine made them, and as one picture of ratios beside their gates."""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Options, Result, add_flags, read_options

RESULTS = Path(__file__).resolve().parent / "results"  # git-ignored
VERDICTS = {True: "ok", False: "MISSED", None: ""}
COLOURS = {True: "#2f7d4f", False: "#b3402e", None: "#7a7f87"}


def table(results: Sequence[Result]) -> str:
    """Return aligned lines: name, figure, spread, gate, verdict."""
    rows = [("figure", "", "spread", "gate", "")]
    for result in results:
        if result.value is None:
            continue
        spread = "" if result.low is None else f"{_number(result.low)} .. {_number(result.high)}"
        gate = "" if result.gate is None else f"{'<=' if result.at_most else '>='} {_number(result.gate)}"
        rows.append((result.name, f"{_number(result.value)} {result.unit}", spread, gate, VERDICTS[result.passed]))
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for name, value, *others in rows:
        right = [text.rjust(width) for text, width in zip((value, *others[:2]), widths[1:4], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right, others[2]]).rstrip())
    return "\n".join(lines)


def report(results: Sequence[Result], folder: Path) -> None:
    """Print the table and write `benchmarks.json` and `benchmarks.png`.

    Args:
        results: of all benchmarks.
        folder: made where it is not there.
    """
    print(table(results), flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    values = [{**asdict(result), "passed": result.passed} for result in results]
    told = {"machine": machine(), "results": values}
    (folder / "benchmarks.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    draw(results, folder / "benchmarks.png")
    print(f"{folder / 'benchmarks.json'}, {folder / 'benchmarks.png'}")


def ungated(results: Sequence[Result]) -> list[Result]:
    """Return the results without their gates: tiny shapes can neither reach nor miss them."""
    return [replace(result, gate=None) for result in results]


def alone(run: Callable[[Options], list[Result]], about: str | None) -> None:
    """Run one benchmark as a script and print its table.

    Args:
        run: the benchmark.
        about: the script's docstring.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG; default: the table only")
    given = parser.parse_args()
    results = run(read_options(given))
    if given.quick:
        results = ungated(results)
    if given.out:
        report(results, given.out)
    else:
        print(table(results))


def machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, threads, versions."""
    import transformers

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "card": card,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw a bar for every ratio, its spread, and a black line where its gate is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in results if r.value is not None and r.value > 0 and (r.unit == "x" or r.gate)]
    if not shown:
        return
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, result in enumerate(shown):
        value = float(result.value or 1)
        low, high = result.low or value, result.high or value
        error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.barh(place, value, 0.62, xerr=error, color=COLOURS[result.passed], error_kw={"ecolor": "#333333"})
        if result.gate is not None:
            axes.plot([result.gate] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        axes.annotate(f" {_number(value)}", (max(value, high, result.gate or 0), place), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [r.name for r in shown], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    if max(float(r.value or 1) for r in shown) > 8:  # a ratio of 30 would hide one of 1.1
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.margins(x=0.1)
    axes.set_xlabel("ratio; black line: gate (green: reached, red: missed, grey: none)")
    figure.savefig(path, dpi=130)


def _processor() -> str:
    """Return the processor's name; Python itself knows its kind only."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"
