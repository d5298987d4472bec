"""What a batch run has to answer: rows of an image TSV and, beside them, of a question TSV.

Unlike a training source, a row that cannot be used does not vanish: it comes with its key, its question ids
and the reason, so that the output keeps the order and the number of rows.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.files import RecordError
from git_model.datasets.images import ImageError, read_image
from git_model.datasets.records import TSVFile
from git_model.errors import UserError


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask about a picture; the id is None for a caption, and where the file does not tell it."""

    prompt: str
    question_id: int | None = None


@dataclass(frozen=True, slots=True)
class AskRow:
    """A row of the image TSV.

    Args:
        row: its number.
        key: its key; `row_<number>` where that cannot be read.
        picture: what `prepare` made of it; None with an error.
        questions: one for each record of the output.
        error: why it cannot be answered, as a short word to count by; "" where it can.
        detail: what a person needs to find the fault.
    """

    row: int
    key: str
    picture: Any
    questions: tuple[Question, ...]
    error: str = ""
    detail: str = ""


PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")


class FolderRows:
    """The pictures of a folder and those below it, in the order of their names, which are the keys.

    Args:
        folder: with files that end as pictures do.
        prepare: encoded picture -> what the model takes.

    Raises:
        UserError: no such folder, no picture in it, or a name that no TSV can hold.
    """

    def __init__(self, folder: Path, prepare: Callable[[bytes], Any]) -> None:
        self.prepare = prepare
        if not folder.is_dir():
            raise UserError(f"no folder '{folder}'")
        found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and path.is_file())
        self.files = {path.relative_to(folder).as_posix(): path for path in sorted(found)}
        if not self.files:
            raise UserError(f"the folder '{folder}' has no pictures ({', '.join(PICTURE_ENDINGS)})")
        if wrong := [key for key in self.files if set(key) & set("\t\r\n") or not _is_text(key)]:
            raise UserError(f"{wrong[0]!r}: a name with a tab, a line's end or no text cannot be a key")
        self.keys = list(self.files)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> AskRow:
        key = self.keys[row]
        asked = (Question(""),)
        try:
            return AskRow(row, key, self.prepare(read_image(self.files[key])), asked)
        except ImageError as error:
            return AskRow(row, key, None, asked, error.reason, f"{self.files[key]}: {error}")
        except UserError as error:
            return AskRow(row, key, None, asked, "unreadable", str(error))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class AskRows:
    """The rows, read at random, in any process.

    Args:
        images: `key \\t base64` TSV.
        questions: `key \\t [{"question", "question_id"}]` TSV with the same rows; None asks for captions.
        prepare: encoded picture -> what the model takes.
        prompt: of the captions.

    Raises:
        UserError: a file is missing, or the two have different numbers of rows.
    """

    def __init__(self, images: Path, questions: Path | None, prepare: Callable[[bytes], Any], prompt: str = "") -> None:
        self.images, self.prepare, self.prompt = TSVFile(images), prepare, prompt
        self.questions = TSVFile(questions) if questions else None
        if self.questions is not None and len(self.questions) != len(self.images):
            raise UserError(
                f"{questions} has {len(self.questions)} rows, {images} has {len(self.images)}; "
                "a question TSV has the rows and keys of its image TSV"
            )
        self.repeated = repeated_keys(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> AskRow:
        columns, error, detail = self._columns(self.images, row)
        key = columns[0].replace("\r", "") if columns else f"row_{row}"
        if columns and key != columns[0] and not error:
            error, detail = "bad_key", f"row {row} of {self.images.path} has a carriage return in its key '{key}'"
        if not error and row in self.repeated:
            error, detail = "duplicate_key", f"row {row} of {self.images.path} repeats the key '{key}'"
        questions, why, where = self._questions(row, columns[0] if columns else None)
        error, detail = (error, detail) if error else (why, where)
        if error:
            return AskRow(row, key, None, questions, error, detail)
        try:
            picture = self.prepare(base64.b64decode(columns[1], validate=True))
        except (binascii.Error, ValueError) as found:
            error = found.reason if isinstance(found, ImageError) else "bad_base64"
            return AskRow(row, key, None, questions, error, f"row {row} of {self.images.path}, key '{key}': {found}")
        return AskRow(row, key, picture, questions)

    def _columns(self, file: TSVFile, row: int) -> tuple[list[str], str, str]:
        """Return the two columns of a row, an error and its detail."""
        try:
            columns = file[row]
        except RecordError as error:
            return [], error.reason, str(error)
        if len(columns) != 2:
            return columns[:1], "bad_row", f"row {row} of {file.path} has {len(columns)} columns instead of 2"
        return columns, "", ""

    def _questions(self, row: int, key: str | None) -> tuple[tuple[Question, ...], str, str]:
        """Return what is asked about a row, an error and its detail."""
        if self.questions is None:
            return (Question(self.prompt),), "", ""
        unknown = (Question(""),)  # one record stands for the ids that cannot be read
        columns, error, detail = self._columns(self.questions, row)
        if error:
            return unknown, error.replace("bad_", "bad_question_"), detail
        try:
            asked = tuple(Question(_text(entry), _id(entry)) for entry in json.loads(columns[1]))
        except (KeyError, TypeError, ValueError, RecursionError) as found:
            return unknown, "bad_question_json", f"row {row} of {self.questions.path}: {found!r:.200}"
        if key is not None and columns[0] != key:
            detail = f"row {row} of {self.questions.path} has key '{columns[0]}', the image TSV has '{key}'"
            return asked, "key_mismatch", detail
        return asked, "", ""


def _text(entry: dict[str, Any]) -> str:
    if not isinstance(entry["question"], str):
        raise TypeError(f"the question is {entry['question']!r}, not text")
    entry["question"].encode()  # half an emoji is a ValueError here, and a TypeError in a tokenizer
    return entry["question"]


def _id(entry: dict[str, Any]) -> int:
    identity = entry["question_id"]
    if not isinstance(identity, int) or isinstance(identity, bool):
        raise TypeError(f"the question_id is {identity!r}, not an integer")
    return identity


def repeated_keys(file: TSVFile) -> Collection[int]:
    """Return the rows whose key an earlier row has; reads the first bytes of every row, holds 8 bytes of each."""
    hashes = np.zeros(len(file), "<u8")
    for row in range(len(file)):
        digest = hashlib.blake2b(file.key(row), digest_size=8).digest()
        hashes[row] = int.from_bytes(digest, "little")
    _, firsts = np.unique(hashes, return_index=True)
    if len(firsts) == len(hashes):
        return frozenset()
    return frozenset(np.setdiff1d(np.arange(len(hashes)), firsts).tolist())
