"""Any source -> GIT's TSVs: pictures keep their bytes, what cannot be read is left out and counted."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from git_model.batch import Sample
from git_model.datasets.coco import VqaV2
from git_model.datasets.files import RecordError
from git_model.datasets.records import json_cell, write_tsv
from git_model.datasets.sources import Source
from git_model.errors import UserError

KINDS = ("caption", "question")


def write_tsvs(
    source: Source, folder: Path, name: str, tick: Callable[[], Any] = lambda: None
) -> tuple[dict[str, int], dict[str, int]]:
    """Write `{name}.img.tsv` and, beside it, `{name}.caption.tsv`, `{name}.question.tsv` or both.

    Args:
        source: records with one picture each.
        folder: made if need be.
        name: of the set.
        tick: called for every record.

    Returns:
        rows by file name, and how many records were left out, by reason.

    Raises:
        UserError: a record with several pictures, which a TSV row cannot hold; nothing that can be read.
    """
    lost: Counter[str] = Counter()
    said: list[tuple[str, str, str]] = []  # key, captions, questions; texts are small beside pictures

    def images() -> Iterator[tuple[str, bytes]]:
        for index in range(len(source)):
            tick()
            try:
                sample = source[index]
            except RecordError as error:
                lost[error.reason] += 1
                continue
            if len(sample.images) != 1:
                raise UserError(f"record '{sample.key}' has {len(sample.images)} pictures; a TSV row holds one")
            captions = [{"caption": t.text} for t in sample.targets if t.question_id is None]
            questions = source.questions(index) if isinstance(source, VqaV2) else _questions(sample)
            said.append((sample.key, json_cell(captions), json_cell(questions)))
            yield sample.key, base64.b64encode(sample.images[0])

        if not said:  # before anything is renamed: an earlier set stays
            raise UserError(f"none of the {len(source)} records could be read: {dict(lost)}")
        for kind in KINDS:  # of an earlier set, they would not fit the new pictures
            for suffix in ("tsv", "lineidx", "lineidx.8b"):
                (folder / f"{name}.{kind}.{suffix}").unlink(missing_ok=True)

    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(f".{name}.*.part"):  # of a killed process
        torn.unlink(missing_ok=True)
    rows = {f"{name}.img.tsv": write_tsv(folder / f"{name}.img.tsv", images())}
    for column, kind in enumerate(KINDS, 1):
        if any(row[column] != "[]" for row in said):
            file = f"{name}.{kind}.tsv"
            rows[file] = write_tsv(folder / file, ((row[0], row[column]) for row in said))
    return rows, dict(lost)


def _questions(sample: Sample) -> list[dict[str, Any]]:
    """Return the questions of a sample as a question TSV holds them."""
    found = []
    for target in sample.targets:
        if target.question_id is not None:
            answers = {"answer": target.text} if target.text else {}
            if target.answers and target.answers != (target.text,):
                answers |= {"answers": list(target.answers)}
            found.append({"question": target.prompt, "question_id": target.question_id, **answers})
    return found
