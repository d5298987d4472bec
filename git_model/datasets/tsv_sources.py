"""GIT's TSVs as sources: captions, questions or regions of pictures row by row; questions about several pictures."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from git_model.batch import IMG_SLOT, Box, Region, Sample, Target
from git_model.datasets.files import RecordError, SampleError
from git_model.datasets.records import TSVFile
from git_model.errors import UserError


class TSVPair:
    """GIT's TSVs: an image TSV and, row by row beside it, captions, questions or regions.

    Args:
        dir: where relative names start.
        images: `key \\t base64` TSV.
        captions: `key \\t [{"caption"}]` TSV.
        questions: `key \\t [{"question", "question_id", "answer" or "answers"}]` TSV.
        regions: `key \\t [{"phrase" or "caption", "box" or "rect": [x, y, x, y]}]` TSV, in pixels.
    """

    def __init__(
        self,
        dir: Path,
        images: str,
        captions: str | None = None,
        questions: str | None = None,
        regions: str | None = None,
    ) -> None:
        self.images = TSVFile(existing_file(dir / images, "image TSV"))
        self.captions = TSVFile(existing_file(dir / captions, "caption TSV")) if captions else None
        self.questions = TSVFile(existing_file(dir / questions, "question TSV")) if questions else None
        self.regions = TSVFile(existing_file(dir / regions, "region TSV")) if regions else None
        for other in filter(None, (self.captions, self.questions, self.regions)):
            if len(other) != len(self.images):
                raise UserError(f"{other.path} has {len(other)} rows, {self.images.path} has {len(self.images)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        columns = self.images[index]
        key = columns[0]
        if len(columns) < 2:
            raise SampleError(key, "bad_row")
        try:
            image = base64.b64decode(columns[1], validate=True)
        except (binascii.Error, ValueError) as error:
            raise SampleError(key, "bad_base64") from error
        return Sample(key, (image,), self._targets(index, key))

    def said(self, index: int) -> Sample:
        """Return a record without its picture: the key is the texts' then."""
        file = self.captions or self.questions or self.regions
        key = (file or self.images)[index][0]
        return Sample(key, (), self._targets(index, key))

    def _targets(self, index: int, key: str) -> tuple[Target, ...]:
        targets: list[Target] = []
        if self.captions:
            targets += [Target(str(c["caption"])) for c in self._cell(self.captions, index, key, "caption")]
        if self.questions:
            asked = self._cell(self.questions, index, key, "question")
            targets += [_question(q, number, key) for number, q in enumerate(asked)]
        if self.regions:
            found = [_region(entry, key) for entry in self._cell(self.regions, index, key, "region")]
            if not found and not targets:
                raise SampleError(key, "image_without_region")
            targets += found
        return tuple(targets)

    def _cell(self, file: TSVFile, index: int, key: str, needed: str) -> list[dict[str, Any]]:
        columns = file[index]
        if columns[0] != key:
            raise UserError(f"row {index} of {file.path} has key '{columns[0]}', the image TSV has '{key}'")
        try:
            entries = json.loads(columns[1])
            if isinstance(entries, list) and all(
                isinstance(e, dict) and (needed == "region" or needed in e) for e in entries
            ):
                return entries
        except (IndexError, TypeError, ValueError):
            pass
        raise SampleError(key, f"bad_{needed}_json")

    def texts(self) -> Iterator[str]:
        """Yield every caption, question and answer."""
        for file in filter(None, (self.captions, self.questions, self.regions)):
            for columns in readable_rows(file):
                try:
                    entries = [_any_target(entry) for entry in json.loads(columns[1])]
                except (AttributeError, IndexError, KeyError, TypeError, ValueError):
                    continue  # counted when the record is drawn
                for target in entries:
                    yield from filter(None, (target.prompt, target.text))


class SeveralImages:
    """Questions about several pictures or regions: every row of the question TSV names the pictures of its slots.

    Args:
        dir: where relative names start.
        images: `key \\t base64` TSV.
        questions: `id \\t [{"question" with [IMG] slots, "answer" or "answers", "images": [{"key", "box"}]}]` TSV; the
            box, [x, y, x, y] in pixels, may be missing.
    """

    def __init__(self, dir: Path, images: str, questions: str) -> None:
        self.images = TSVFile(existing_file(dir / images, "image TSV"))
        self.questions = TSVFile(existing_file(dir / questions, "question TSV"))
        self.rows = {self.images.key(row).decode(errors="replace"): row for row in range(len(self.images))}

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Sample:
        sample, keys = self._asked(index)
        found = []
        for key in keys:
            try:
                found.append(base64.b64decode(self.images[self.rows[key]][1], validate=True))
            except (KeyError, IndexError, binascii.Error, ValueError) as error:
                raise SampleError(sample.key, f"no_picture '{key}'") from error
        return replace(sample, images=tuple(found))

    def said(self, index: int) -> Sample:
        """Return a record without its pictures."""
        return self._asked(index)[0]

    def _asked(self, index: int) -> tuple[Sample, list[str]]:
        name, cell = (*self.questions[index], "")[:2]
        numbers: dict[str, int] = {}
        targets = []
        try:
            for number, entry in enumerate(json.loads(cell)):
                regions = tuple(
                    Region(numbers.setdefault(str(image["key"]), len(numbers)), _box(image.get("box"), name))
                    for image in entry["images"]
                )
                targets.append(replace(_question(entry, number, name), regions=regions))
        except (KeyError, TypeError, ValueError) as error:
            raise SampleError(name, "bad_question_json") from error
        return Sample(name, (), tuple(targets)), list(numbers)

    def texts(self) -> Iterator[str]:
        """Yield every question and answer."""
        for index in range(len(self)):
            try:
                targets = self._asked(index)[0].targets
            except RecordError:
                continue  # counted when the record is drawn
            for target in targets:
                yield from filter(None, (*target.prompt.split(IMG_SLOT), target.text))


def _question(entry: Mapping[str, Any], number: int = 0, key: str = "") -> Target:
    if not isinstance(entry.get("answers", []), list):
        raise SampleError(key, "bad_question_json")
    answers = tuple(map(str, entry.get("answers", ())))
    answer = str(entry.get("answer", answers[0] if answers else ""))
    identity = entry.get("question_id", number)
    return Target(answer, str(entry["question"]), identity, answers or ((answer,) if answer else ()))


def _any_target(entry: Mapping[str, Any]) -> Target:
    if "phrase" in entry:
        return Target(str(entry["phrase"]))
    return Target(entry["caption"]) if "caption" in entry else _question(entry)


def _region(entry: Mapping[str, Any], key: str) -> Target:
    text, box = entry.get("phrase", entry.get("caption")), _box(entry.get("box", entry.get("rect")), key)
    if not isinstance(text, str) or not text.strip() or box is None:
        raise SampleError(key, "bad_region_json")
    return Target(text.strip(), regions=(Region(0, box),))


def _box(value: Any, key: str) -> Box | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4 or any(type(v) not in (int, float) for v in value):
        raise SampleError(key, "bad_region_json")
    left, top, right, bottom = map(float, value)
    return left, top, right, bottom


def readable_rows(file: TSVFile) -> Iterator[list[str]]:
    """Yield the readable rows of a file; the others are counted when they are drawn."""
    for index in range(len(file)):
        try:
            yield file[index]
        except RecordError:
            continue


def existing_file(path: Path, what: str) -> Path:
    """Return the path of a file that is there; raises UserError."""
    if not path.is_file():
        raise UserError(f"no {what} file at {path} (relative paths start at --data_dir)")
    return path
