"""COCO captions and VQAv2 as their authors publish them: annotation JSON beside a folder of pictures.

A picture is found by the file name that the JSON gives, or by its id: `COCO_val2014_000000391895.jpg`,
`000000391895.jpg` and `391895.png` are all image 391895.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from git_model.batch import Sample, Target
from git_model.datasets.annotations import Id, entries, read_json
from git_model.datasets.files import SampleError
from git_model.errors import UserError, one_of

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class ImageFolder:
    """Pictures of a folder (and its subfolders) by name and by id."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"no image folder at {folder}")
        self.folder = folder
        self.by_name: dict[str, str] = {}
        self.by_id: dict[str, str] = {}
        for place, _, names in os.walk(folder, followlinks=True):
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in PICTURES:
                    path = os.path.join(place, name)
                    self.by_name[name] = path
                    digits = re.search(r"(?:^|_)0*(\d+)$", stem)
                    self.by_id[digits[1] if digits else stem] = path
                    self.by_id.setdefault(stem, path)
        if not self.by_name:
            raise UserError(f"{folder} holds no picture ({', '.join(PICTURES)})")

    def read(self, key: Id, name: str = "") -> bytes:
        """Return a picture's file.

        Raises:
            SampleError: it is not there or cannot be read.
        """
        path = self.by_name.get(name) or self.by_id.get(str(key))
        if path is None:
            raise SampleError(str(key), "missing")
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
        # id, file name, captions
        self.records: list[tuple[Id, str, tuple[str, ...]]] = []
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
            captions.setdefault(entry["image_id"], []).append(str(entry["caption"]))
        for image in entries(content, "images", ("id",), path):
            if image["id"] in captions:
                self.records.append((image["id"], str(image.get("file_name", "")), tuple(captions[image["id"]])))

    def _karpathy(self, content: Any, path: Path, split: str | None) -> None:
        wanted = {"train": {"train", "restval"}}.get(split or "", {split})
        for image in entries(content, "images", ("filename", "split", "sentences"), path):
            if split is None or image["split"] in wanted:
                said = tuple(str(s["raw"]) for s in entries(image["sentences"], None, ("raw",), path))
                key = image.get("cocoid", image.get("imgid", image["filename"]))
                self.records.append((key, str(image["filename"]), said))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        key, name, captions = self.records[index]
        return Sample(str(key), (self.folder.read(key, name),), tuple(map(Target, captions)))

    def texts(self) -> Iterator[str]:
        """Yield every caption."""
        for _, _, captions in self.records:
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
        known: dict[Id, dict[str, Any]] = {}
        if annotations is not None:
            where = dir / annotations
            known = {
                e["question_id"]: e for e in entries(read_json(where), "annotations", ("question_id", "answers"), where)
            }
            if lost := [e["question_id"] for e in asked if e["question_id"] not in known]:
                raise UserError(f"{len(lost)} questions of {path} are not in {where} (e.g. {lost[:3]})")
        self.folder = ImageFolder(dir / images)
        self.asked: dict[Id, list[dict[str, Any]]] = {}
        for entry in asked:
            self.asked.setdefault(entry["image_id"], []).append(_merged(entry, known.get(entry["question_id"])))
        self.ids = list(self.asked)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        key = self.ids[index]
        targets = (
            Target(q.get("answer", ""), q["question"], q["question_id"], tuple(q.get("answers", ())))
            for q in self.asked[key]
        )
        return Sample(str(key), (self.folder.read(key),), tuple(targets))

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
    found = {"question": str(entry["question"]), "question_id": int(entry["question_id"])}
    if annotation is None:
        return found
    answers = [str(a["answer"]) for a in annotation["answers"]]
    common = annotation.get("multiple_choice_answer") or Counter(answers).most_common(1)[0][0]
    kinds = {key: annotation[key] for key in ("answer_type", "question_type") if key in annotation}
    return {**found, "answer": common, "answers": answers, **kinds}
