"""COCO captions and VQAv2 as their authors publish them: annotation JSON beside a folder of pictures.

A picture is found by the file name that the JSON gives, or by its id: `COCO_val2014_000000391895.jpg`,
`000000391895.jpg` and `391895.png` are all image 391895.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from git_model.batch import Sample, Target
from git_model.datasets.annotations import Id, checked_annotation, entries, image_id, question_id, read_json, text_of
from git_model.datasets.files import SampleError
from git_model.errors import UserError, one_of

AMBIGUOUS = "ambiguous"
PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class ImageFolder:
    """Pictures of a folder (and its subfolders) by name and by id."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no image folder at {folder}")
        self.folder = folder
        self.by_name: dict[str, str] = {}  # with the last folder, and without it where that is clear
        self.by_id: dict[str, str] = {}
        for place, _, names in os.walk(folder, followlinks=True):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in PICTURES:
                    path = os.path.join(place, name)
                    digits = re.search(r"(?:^|_)0*(\d+)$", stem)
                    self.by_name[os.path.join(os.path.basename(place), name)] = path
                    for table, key in ((self.by_name, name), (self.by_id, digits[1] if digits else stem)):
                        table[key] = AMBIGUOUS if key in table else path
        if not self.by_name:
            raise UserError(f"{folder} holds no picture ({', '.join(PICTURES)})")

    def read(self, key: Id, name: str = "", folder: str = "") -> bytes:
        """Return a picture's file: by its name where one is given (in `folder` first), else by its id.

        Raises:
            SampleError: it is not there, there are several, or it cannot be read.
        """
        named = self.by_name.get(os.path.join(os.path.basename(folder), name)) or self.by_name.get(name)
        path = named if name and (named or not str(key).isdecimal()) else self.by_id.get(str(key))
        if path is None:
            raise SampleError(str(key), "missing")
        if path == AMBIGUOUS:
            raise SampleError(str(key), "ambiguous_name")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise SampleError(str(key), f"unreadable: {error.strerror}") from error


class CocoCaptions:
    """COCO captions: Karpathy's `dataset_coco.json` or the official `captions_*.json`.

    Args:
        dir: where relative names start.
        annotations: the JSON.
        images: folder of the pictures.
        split: of Karpathy's file: train (with restval), restval, val or test; None = all.
    """

    SPLITS = ("train", "restval", "val", "test")

    def __init__(self, dir: Path, annotations: str, images: str, split: str | None = None) -> None:
        content = read_json(dir / annotations)
        if split is not None and split not in self.SPLITS:
            raise one_of("coco split", split, self.SPLITS)
        self.folder = ImageFolder(dir / images)
        # id, folder, file name, captions
        self.records: list[tuple[Id, str, str, tuple[str, ...]]] = []
        if isinstance(content, dict) and "annotations" in content:
            if split is not None:
                raise UserError(f"split is for Karpathy's file; {annotations} is an official one, of one split")
            self._official(content, dir / annotations)
        else:
            self._karpathy(content, dir / annotations, split)
        if not self.records:
            raise UserError(f"{dir / annotations} holds no image{f' of split {split}' if split else ''}")

    def _official(self, content: dict[str, Any], path: Path) -> None:
        captions: dict[Id, list[str]] = {}
        for entry in entries(content, "annotations", ("image_id", "caption"), path):
            captions.setdefault(image_id(entry["image_id"], path), []).append(text_of(entry, "caption", path))
        for image in entries(content, "images", ("id",), path):
            if image["id"] in captions:
                self.records.append((image["id"], "", str(image.get("file_name", "")), tuple(captions[image["id"]])))

    def _karpathy(self, content: Any, path: Path, split: str | None) -> None:
        wanted = {"train": {"train", "restval"}}.get(split or "", {split})
        for image in entries(content, "images", ("filename", "split", "sentences"), path):
            if split is None or image["split"] in wanted:
                said = tuple(str(s["raw"]) for s in entries(image["sentences"], None, ("raw",), path))
                # only COCO's own id is also in file names; other sets of Karpathy's (Flickr) go by the name
                key = image_id(image.get("cocoid", image["filename"]), path)
                self.records.append((key, str(image.get("filepath", "")), str(image["filename"]), said))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        key, folder, name, _ = self.records[index]
        return replace(self.said(index), images=(self.folder.read(key, name, folder),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        key, *_, captions = self.records[index]
        return Sample(str(key), (), tuple(map(Target, captions)))

    def texts(self) -> Iterator[str]:
        """Yield every caption."""
        for *_, captions in self.records:
            yield from captions


class VqaV2:
    """VQA as EvalAI publishes it: questions JSON, annotations JSON, a folder of pictures.

    Args:
        dir: where relative names start.
        questions: `v2_OpenEnded_mscoco_*_questions.json`.
        images: folder of the pictures.
        annotations: `v2_mscoco_*_annotations.json`; None for a test set.
    """

    def __init__(self, dir: Path, questions: str, images: str, annotations: str | None = None) -> None:
        path = dir / questions
        asked = entries(read_json(path), "questions", ("question_id", "question", "image_id"), path)
        known: dict[int, dict[str, Any]] = {}
        if annotations is not None:
            where = dir / annotations
            known = {
                question_id(e["question_id"], where): checked_annotation(e, where)
                for e in entries(read_json(where), "annotations", ("question_id", "answers"), where)
            }
            if lost := [e["question_id"] for e in asked if question_id(e["question_id"], path) not in known]:
                raise UserError(f"{len(lost)} questions of {path} are not in {where} (e.g. {lost[:3]})")
        self.folder = ImageFolder(dir / images)
        self.asked: dict[Id, list[dict[str, Any]]] = {}
        for entry in asked:
            number = question_id(entry["question_id"], path)
            found = {"question": text_of(entry, "question", path), "question_id": number}
            self.asked.setdefault(image_id(entry["image_id"], path), []).append(_merged(found, known.get(number)))
        self.ids = list(self.asked)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.said(index), images=(self.folder.read(self.ids[index]),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        key = self.ids[index]
        targets = (
            Target(q.get("answer", ""), q["question"], q["question_id"], tuple(q.get("answers", ())))
            for q in self.asked[key]
        )
        return Sample(str(key), (), tuple(targets))

    def questions(self, index: int) -> list[dict[str, Any]]:
        """Return what a question TSV says of a record: the answer and question types, too."""
        return self.asked[self.ids[index]]

    def texts(self) -> Iterator[str]:
        """Yield every question and its answer."""
        for questions in self.asked.values():
            for q in questions:
                yield from filter(None, (q["question"], q.get("answer")))


def _merged(entry: dict[str, Any], annotation: dict[str, Any] | None) -> dict[str, Any]:
    """Return a question as a question TSV holds it."""
    if annotation is None:
        return entry
    answers = [a["answer"] for a in annotation["answers"]]
    common = annotation.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
    kinds = {key: annotation[key] for key in ("answer_type", "question_type") if key in annotation}
    return {**entry, "answer": common, "answers": answers, **kinds}
