"""What became of a list, for people: a table, a JSON file and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from git_model.datasets.files import write_all

SHOWN = 15  # reasons in the picture


def write_report(root: Path, report: dict[str, dict[str, Any]]) -> None:
    """Write `download_report.json` and `download_report.png` into the data's folder."""
    text = json.dumps(report, indent=2).encode() + b"\n"
    write_all([(root / "download_report.json", [text])])
    _draw(root / "download_report.png", report)


def table(report: dict[str, dict[str, Any]]) -> str:
    """Return lines of list, verdict, rows, share."""
    lines = [f"{'list':<10} {'verdict':<24} {'rows':>10} {'share':>8}"]
    for name, counts in report.items():
        total = counts["rows"]
        for verdict, rows in {"ok": counts["ok"], **counts["reasons"], "= all": total}.items():
            lines.append(f"{name:<10} {verdict:<24} {rows:>10,} {rows / max(1, total):>8.2%}")
    return "\n".join(lines)


def _draw(path: Path, report: dict[str, dict[str, Any]]) -> None:
    from io import BytesIO

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 3.2 * len(report)), layout="constrained")
    axes = figure.subplots(len(report), squeeze=False)[:, 0]
    for ax, (name, counts) in zip(axes, report.items(), strict=True):
        verdicts = list({"ok": counts["ok"], **counts["reasons"]}.items())
        shown = verdicts[:SHOWN]
        if rest := sum(rows for _, rows in verdicts[SHOWN:]):
            shown.append(("others", rest))
        words, rows = [word for word, _ in shown], [n for _, n in shown]
        bars = ax.barh(words[::-1], rows[::-1], color=["#2a9d8f" if w == "ok" else "#c05746" for w in words[::-1]])
        ax.bar_label(bars, [f"{n:,}" for n in rows[::-1]], padding=3)
        ax.set_title(f"{name}: {counts['ok']:,} of {counts['rows']:,} pictures")
        ax.set_xlabel("rows")
        ax.margins(x=0.12)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_all([(path, [buffer.getvalue()])])
