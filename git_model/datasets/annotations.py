"""COCO's and VQA's JSON files and their TSV cousins: read with every fault named, written as the others read them.

Ids stay what the file says; where two files are compared, `5` and `"5"` are the same image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from git_model.datasets.files import RecordError
from git_model.datasets.records import TSVFile
from git_model.errors import UserError

Id = int | str


def read_json(path: str | Path) -> Any:
    """Return a JSON file's content.

    Raises:
        UserError: it is not there or no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is no valid JSON: {error}") from error


def read_references(path: str | Path) -> dict[Id, list[str]]:
    """Return the reference captions of every image: a caption TSV or COCO's `captions_*.json`.

    Raises:
        UserError: not such a file; names the row or the missing key.
    """
    if str(path).endswith(".tsv"):
        return {key: [text_of(c, "caption", path) for c in said] for key, said in _caption_rows(path)}
    content = read_json(path)
    found: dict[Id, list[str]] = {}
    for entry in entries(content, "annotations", ("image_id", "caption"), path):
        found.setdefault(image_id(entry["image_id"], path), []).append(text_of(entry, "caption", path))
    return found


def read_results(path: str | Path, failed: dict[str, str] | None = None) -> dict[Id, str]:
    """Return the caption of every image: a prediction TSV or COCO's results JSON.

    Args:
        path: of the file.
        failed: gets the records that the batch task could not answer, by key with the reason; None = they are captions,
            and empty.

    Raises:
        UserError: not such a file, an image with no caption or with several.
    """
    found: dict[Id, str] = {}
    if str(path).endswith(".tsv"):
        rows: Iterable[tuple[Id, list[dict[str, Any]]]] = _caption_rows(path)
    else:
        content = entries(read_json(path), None, ("image_id", "caption"), path)
        rows = ((image_id(entry["image_id"], path), [entry]) for entry in content)
    for number, (key, said) in enumerate(rows):
        if len(said) != 1:
            raise UserError(f"row {number} of '{path}' (key '{key}') has {len(said)} captions; a result has one")
        if key in found:
            raise UserError(f"'{path}' has the image '{key}' twice")
        if failed is not None and "error" in said[0]:
            failed[str(key)] = str(said[0]["error"])
            continue
        found[key] = text_of(said[0], "caption", path)
    return found


def read_answers(path: str | Path) -> tuple[list[tuple[int, str]], set[int]]:
    """Return (question id, answer) of a prediction TSV (one column) or of EvalAI's JSON, in the file's order.

    Returns:
        the answers, and the ids of those that are the batch task's error records (their answer is "").

    Raises:
        UserError: not such a file; names the row. Repeated ids are the caller's.
    """
    if str(path).endswith(".tsv"):
        content = [_cell(path, number, columns, 0) for number, columns in enumerate(_rows(path))]
    else:
        content = read_json(path)
    found, failed = [], set()
    for entry in entries(content, None, ("question_id", "answer"), path):
        if entry["question_id"] is None:  # the batch task's record of a row whose ids it could not read
            continue
        key = question_id(entry["question_id"], path)
        found.append((key, text_of(entry, "answer", f"{path}: question {key}")))
        if "error" in entry:
            failed.add(key)
    return found, failed


def read_questions(path: str | Path) -> list[dict[str, Any]]:
    """Return {"question_id", "question", "image_id"} of VQA's questions JSON or of a question TSV (key = image id).

    Raises:
        UserError: not such a file.
    """
    if not str(path).endswith(".tsv"):
        needed = ("question_id", "question", "image_id")
        content = [dict(e) for e in entries(read_json(path), "questions", needed, path)]
    else:
        content = []
        for number, columns in enumerate(_rows(path)):
            asked = _cell(path, number, columns, 1)
            rows = entries(asked, None, ("question_id", "question"), f"{path} row {number}")
            content += [{**entry, "image_id": columns[0]} for entry in rows]
    for entry in content:
        entry["question_id"] = question_id(entry["question_id"], path)
    return content


def read_vqa_annotations(path: str | Path) -> list[dict[str, Any]]:
    """Return VQA's annotations: the official JSON, or a question TSV with `answers` (texts) or one `answer`.

    Raises:
        UserError: not such a file, or a question without answers.
    """
    if not str(path).endswith(".tsv"):
        found = entries(read_json(path), "annotations", ("question_id", "answers"), path)
        return [checked_annotation(dict(entry), path) for entry in found]
    return [_with_answers(entry, path) for entry in read_questions(path)]


def _with_answers(entry: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a question with ten-person answers: as they are, or from texts, or from one text."""
    texts = entry.get("answers", [entry["answer"]] if "answer" in entry else None)
    if not isinstance(texts, list) or not texts:
        raise UserError(f"'{path}': question {entry['question_id']} has neither a list of answers nor an answer")
    texts = texts * 10 if len(texts) == 1 else texts  # one known answer stands for ten people who agree
    answers = [t if isinstance(t, dict) else {"answer": t, "answer_id": n} for n, t in enumerate(texts, 1)]
    return checked_annotation({**entry, "answers": answers}, path)


def checked_annotation(entry: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return an annotation whose answers are texts and whose types, where it has them, too.

    Raises:
        UserError: names the question.
    """
    where = f"{path}: question {entry['question_id']}"
    for answer in entries(entry["answers"], None, ("answer",), where):
        text_of(answer, "answer", where)
    if not entry["answers"]:
        raise UserError(f"'{where}' has no answers")
    for kind in ("answer_type", "question_type"):
        if kind in entry:
            text_of(entry, kind, where)
    return entry


def coco_results(results: Mapping[Id, str]) -> str:
    """Return COCO's results JSON, in GIT's bytes."""
    return json.dumps([{"image_id": key, "caption": caption} for key, caption in results.items()])


def coco_ground_truth(references: Mapping[Id, list[str]]) -> str:
    """Return COCO's ground-truth JSON of reference captions, in GIT's bytes (common.py, `iter_caption_to_json`)."""
    said = [(key, caption) for key, captions in references.items() for caption in captions]
    return json.dumps(
        {
            "info": "dummy",
            "licenses": "dummy",
            "type": "captions",
            "images": [{"file_name": key, "id": key} for key in references],
            "annotations": [{"image_id": k, "caption": caption, "id": n} for n, (k, caption) in enumerate(said)],
        }
    )


def entries(content: Any, key: str | None, needed: tuple[str, ...], where: str | Path) -> list[dict[str, Any]]:
    """Return the mappings of a list, or of the list under `key`, each with the needed keys.

    Raises:
        UserError: another shape; names the entry and the key.
    """
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"'{where}' has no '{key}'")
        content = content[key]
    if not isinstance(content, list):
        raise UserError(f"'{where}' holds a {type(content).__name__} where a list is needed")
    for number, entry in enumerate(content):
        missing = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if missing:
            raise UserError(f"entry {number} of '{where}' lacks {', '.join(missing)}")
    return content


def _rows(path: str | Path) -> Iterable[list[str]]:
    file = TSVFile(path)
    for number in range(len(file)):
        try:
            yield file[number]
        except RecordError as error:
            raise UserError(f"row {number} of '{path}' cannot be read: {error.reason}") from error


def _cell(path: str | Path, number: int, columns: list[str], which: int) -> Any:
    try:
        return json.loads(columns[which])
    except IndexError as error:
        told = "is it a file of answers?" if len(columns) == 1 else "is it a TSV of captions?"
        raise UserError(f"row {number} of '{path}' has no column {which + 1}: {told}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"row {number} of '{path}' has no JSON in column {which + 1}: {error}") from error


def _caption_rows(path: str | Path) -> Iterable[tuple[Id, list[dict[str, Any]]]]:
    seen: set[str] = set()
    for number, columns in enumerate(_rows(path)):
        if columns[0] in seen:
            raise UserError(f"row {number} of '{path}' repeats the key '{columns[0]}'")
        seen.add(columns[0])
        yield columns[0], entries(_cell(path, number, columns, 1), None, ("caption",), f"{path} row {number}")


def image_id(value: Any, path: str | Path) -> Id:
    """Return an image's id: an integer, or a text that can be a key.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.isprintable():
        return value
    raise UserError(f"'{path}': image_id is {value!r:.60}; an integer or a text is needed")


def question_id(value: Any, path: str | Path) -> int:
    """Return a question's id.

    Raises:
        UserError: no integer, nor the text of one.
    """
    text = str(value)[:20]
    if isinstance(value, int | str) and not isinstance(value, bool) and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    raise UserError(f"'{path}': question_id is {value!r:.60}; an integer is needed")


def text_of(entry: Mapping[str, Any], name: str, path: str | Path) -> str:
    """Return a text of an entry.

    Raises:
        UserError: it is none, or holds half a character.
    """
    value = entry[name]
    try:
        if isinstance(value, str) and value.encode() is not None:
            return value
    except UnicodeEncodeError:
        pass
    raise UserError(f"'{path}': {name} is {value!r:.60}; a text is needed")
