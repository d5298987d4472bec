"""report.html: pictures with what the model said, beside references and right answers. One file, no script."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from git_model.batch import Sample
    from git_model.datasets.sources import Source
    from git_model.metrics.caption import CaptionScores
    from git_model.validation import Prediction

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1d2430; }
.scroll { overflow-x: auto; }
table.scores { border-collapse: collapse; margin: 1rem 0 2rem; }
table.scores td, table.scores th { border: 1px solid #ccd3dd; padding: .3rem .9rem; text-align: right; }
table.scores th:first-child, table.scores td:first-child { text-align: left; }
article { display: grid; grid-template-columns: 200px 1fr; gap: 1.2rem; padding: 1rem 0;
  border-top: 1px solid #e2e6ec; }
img { width: 192px; height: auto; image-rendering: auto; border-radius: 6px; }
.said { font-weight: 600; } .reference { color: #5a6573; } .right { color: #0b7a3b; } .wrong { color: #b3261e; }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
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
    lead = (
        f"{result['model_path']}, {len(groups)} pictures, {len(articles)} shown. Bold: the model's caption, grey: the "
        "references. Answers: green is right, red is wrong. Blank pictures: the same model without anything to see. "
        "References among themselves: each reference caption scored against the others of its picture."
    )
    from git_model.datasets.files import write_all

    write_all([(path, [_page("What the model says", lead, _table(result), articles)])])
    return path


def write_caption_page(
    path: Path,
    found: CaptionScores,
    results: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    image_tsv: str | None = None,
) -> Path:
    """Write the worst and the best captions beside their pictures and references; return the page's path.

    Args:
        path: of the page.
        found: the scores; the order is by CIDEr, or by the first figure computed.
        results: image -> caption.
        references: image -> reference captions.
        image_tsv: where the pictures are; None shows none.
    """
    from git_model.datasets.files import write_all

    by = "CIDEr" if "CIDEr" in found.overall else next(iter(found.overall), "")
    order = sorted(found.per_image, key=lambda key: (found.per_image[key].get(by, 0.0), str(key)))
    worst, best = order[: PICTURES // 2], order[: -PICTURES // 2 - 1 : -1]
    said = {str(key): text for key, text in results.items()}
    pictures = _pictures(image_tsv, {str(key) for key in (*worst, *best)}) if image_tsv else {}
    parts = []
    for title, keys in (("Worst", worst), ("Best", best)):
        parts.append(f"<h2>{title} by {by}</h2>")
        for key in keys:
            listed = "".join(f"<li>{html.escape(text)}</li>" for text in references[key])
            figures = ", ".join(f"{name} {100 * figure:.1f}" for name, figure in found.per_image[key].items())
            body = (
                f"<div class='said'>{html.escape(said[str(key)])}</div><ul class='reference'>{listed}</ul>"
                f"<div class='reference'>{html.escape(figures)}</div>"
            )
            parts.append(_beside(pictures.get(str(key), b""), str(key), body))
    rows = "".join(f"<tr><td>{name}</td><td>{100 * figure:.2f}</td></tr>" for name, figure in found.overall.items())
    lead = f"{len(found.per_image)} images, {found.tokenizer} tokenizer; figures x100."
    lead += "".join(f" {name} is not computed: {why}." for name, why in found.not_computed.items())
    write_all(
        [(path, [_page("Captions against their references", lead, f"<table class='scores'>{rows}</table>", parts)])]
    )
    return path


def write_retrieval_page(
    path: Path, examples: Sequence[Mapping[str, Any]], figures: Mapping[str, float], image_tsv: str | None = None
) -> Path:
    """Write what texts found, misses first; return the page's path.

    Args:
        path: of the page.
        examples: `key`, `text`, `rank`, and `found`: captions, with whether they are the picture's own.
        figures: for the table.
        image_tsv: where the pictures are; None shows none.
    """
    from git_model.datasets.files import write_all

    pictures = _pictures(image_tsv, {str(e["key"]) for e in examples}) if image_tsv else {}
    parts = []
    for title, missed in (("Misses, the worst first", True), ("Hits", False)):
        chosen = [example for example in examples if (example["rank"] > 1) == missed]
        parts.append(f"<h2>{title}</h2>" if chosen else "")
        for example in chosen:
            listed = "".join(
                f"<li class='{'right' if own else 'wrong'}'>{html.escape(text)}</li>" for text, own in example["found"]
            )
            told = f"the first of its own captions is number {example['rank']}"
            body = f"<div class='said'>{html.escape(example['text'])}</div><ul>{listed}</ul>"
            body += f"<div class='reference'>{told}</div>"
            parts.append(_beside(pictures.get(str(example["key"]), b""), str(example["key"]), body))
    rows = "".join(f"<tr><td>{name}</td><td>{figure:g}</td></tr>" for name, figure in figures.items())
    lead = "Bold: a picture's text; under it the captions it finds first, green where they are the picture's own."
    write_all([(path, [_page("Found by its text", lead, f"<table class='scores'>{rows}</table>", parts)])])
    return path


def _pictures(image_tsv: str, keys: Collection[str]) -> dict[str, bytes]:
    """Return the encoded pictures of some keys; an unreadable one is left out."""
    from git_model.datasets.records import TSVFile

    file, found = TSVFile(image_tsv), dict[str, bytes]()
    for row in range(len(file)):
        if file.key(row).decode(errors="replace") in keys:
            with suppress(ValueError, IndexError):
                key, data = file[row][:2]
                found[key] = base64.b64decode(data, validate=True)
    return found


def _page(title: str, lead: str, table: str, parts: Iterable[str]) -> bytes:
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>{title}</title>"
        f"<style>{STYLE}</style>"
        f"<h1>{title}</h1><p>{html.escape(lead)}</p><div class='scroll'>{table}</div>{''.join(parts)}</html>\n"
    ).encode(errors="replace")


def _beside(image: bytes, key: str, body: str) -> str:
    """Return a picture with its key, and what is said beside it."""
    kind = "jpeg" if image[:2] == b"\xff\xd8" else "png"
    data = base64.b64encode(image).decode()
    picture = f"<img alt='{html.escape(key)}' src='data:image/{kind};base64,{data}'>" if image else ""
    return f"<article><div>{picture}<div class='reference'>{html.escape(key)}</div></div><div>{body}</div></article>"


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
    return _beside(image, key, "".join(parts))
