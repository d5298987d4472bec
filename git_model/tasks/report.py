"""report.html: pictures with what the model said, beside references and right answers. One file, no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from git_model.batch import Sample
    from git_model.datasets.sources import Source
    from git_model.validation import Prediction

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; color: #1d2430; }
table.scores { border-collapse: collapse; margin: 1rem 0 2rem; }
table.scores td, table.scores th { border: 1px solid #ccd3dd; padding: .3rem .9rem; text-align: right; }
table.scores th:first-child, table.scores td:first-child { text-align: left; }
article { display: grid; grid-template-columns: 200px 1fr; gap: 1.2rem; padding: 1rem 0;
  border-top: 1px solid #e2e6ec; }
img { width: 192px; height: auto; image-rendering: auto; border-radius: 6px; }
.said { font-weight: 600; } .reference { color: #5a6573; } .right { color: #0b7a3b; } .wrong { color: #b3261e; }
ul { margin: .3rem 0; padding-left: 1.2rem; }
"""
PICTURES = 60


def write_report(
    path: Path, source: Sequence[Sample] | Source, predictions: Iterable[Prediction], result: dict[str, Any]
) -> Path:
    """Write the page and return its path.

    Args:
        path: of the page.
        source: where the pictures are, in the predictions' order.
        predictions: grouped by picture.
        result: `scores`, `blank_image`, `references_cider`.
    """
    groups = [(key, list(items)) for key, items in groupby(predictions, key=lambda p: p.key)]
    step = max(1, len(groups) // PICTURES)
    chosen = dict(groups[::step][:PICTURES])
    articles = []
    for index in range(len(source)):
        try:
            sample = source[index]
        except ValueError:
            continue  # counted where it was scored
        if sample.key in chosen:
            articles.append(_article(sample.images[0], sample.key, chosen.pop(sample.key)))
        if not chosen:
            break
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>What the model says</title>"
        f"<style>{STYLE}</style><h1>What the model says</h1>"
        f"<p>{html.escape(str(result['model_path']))}, {len(groups)} pictures, {len(articles)} shown.</p>"
        f"{_table(result)}{''.join(articles)}</html>\n"
    )
    from git_model.datasets.files import write_all

    write_all([(path, [page.encode()])])
    return path


def _table(result: dict[str, Any]) -> str:
    rows = []
    for name, title in (("cider", "captions: CIDEr (x100)"), ("accuracy", "questions: exact answers (%)")):
        if name in result["scores"]:
            numbers = [result["scores"][name], result["blank_image"][name]]
            if name == "cider" and "references_cider" in result:
                numbers.append(result["references_cider"])
            cells = "".join(f"<td>{100 * n:.1f}</td>" for n in numbers) + "<td></td>" * (3 - len(numbers))
            rows.append(f"<tr><td>{title}</td>{cells}</tr>")
    head = "<tr><th></th><th>model</th><th>blank pictures</th><th>references among themselves</th></tr>"
    return f"<table class='scores'>{head}{''.join(rows)}</table>"


def _article(image: bytes, key: str, predictions: list[Prediction]) -> str:
    kind = "jpeg" if image[:2] == b"\xff\xd8" else "png"
    picture = f"<img alt='{html.escape(key)}' src='data:image/{kind};base64,{base64.b64encode(image).decode()}'>"
    parts = []
    for p in predictions:
        said = html.escape(p.text)
        if p.target.question_id is None:
            references = "".join(f"<li>{html.escape(r)}</li>" for r in p.target.answers)
            parts.append(f"<div class='said'>{said}</div><ul class='reference'>{references}</ul>")
        else:
            right = p.text in p.target.answers
            note = (
                "" if right else f" <span class='reference'>(right: {html.escape(' / '.join(p.target.answers))})</span>"
            )
            mark = "right" if right else "wrong"
            parts.append(f"<div>{html.escape(p.target.prompt)} <span class='{mark}'>{said}</span>{note}</div>")
    caption = f"<div class='reference'>{html.escape(key)}</div>"
    return f"<article><div>{picture}{caption}</div><div>{''.join(parts)}</div></article>"
