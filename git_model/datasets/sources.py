"""DATASETS: files of the field -> Sample. A source is a sequence of records; a recipe names its arguments."""

from __future__ import annotations

import inspect
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

from git_model.batch import Sample, Target
from git_model.datasets.coco import CocoCaptions, VqaV2
from git_model.datasets.files import SampleError
from git_model.datasets.prompt_sources import DiffusionDb, PictureFolder, PromptPictures
from git_model.datasets.records import TSVFile
from git_model.datasets.region_files import CocoRegions, TextOcr, VisualGenome
from git_model.datasets.tsv_sources import SeveralImages, TSVPair, existing_file, readable_rows
from git_model.datasets.vector_source import VectorSource
from git_model.datasets.webdataset import WebDataset
from git_model.errors import UserError, nearest, one_of


class Source(Protocol):
    """What the loader knows of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample:
        """Return a record, or raise SampleError."""

    def said(self, index: int) -> Sample:
        """Return a record without its pictures, which are not read; raises SampleError."""

    def texts(self) -> Iterator[str]:
        """Yield every caption, question and answer, without touching a picture."""


class ConceptualCaptions:
    """The original's layout: a TSV of caption and url; row number i is the picture `{i:08d}.jpg`.

    Args:
        dir: folder of the TSVs and of `train/` and `val/`.
        split: 'train' or 'val'.
    """

    FILES: Mapping[str, str] = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}

    def __init__(self, dir: Path, split: str = "train") -> None:
        if split not in self.FILES:
            raise one_of("cc3m split", split, self.FILES)
        self.images = dir / split
        self.rows = TSVFile(existing_file(dir / self.FILES[split], "Conceptual Captions"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        sample = self.said(index)
        return replace(sample, images=(_read(self.images / sample.key),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        name = f"{index:08d}.jpg"
        columns = self.rows[index]
        if len(columns) < 2 or not columns[0].strip():
            raise SampleError(name, "bad_row")
        return Sample(name, (), (Target(columns[0].strip()),))

    def texts(self) -> Iterator[str]:
        """Yield every caption."""
        yield from (columns[0].strip() for columns in readable_rows(self.rows))


class EasyVqa:
    """easy-VQA: `{split}/questions.json` of [question, answer, image id] and `{split}/images/{id}.png`.

    Args:
        dir: folder of `train/` and `test/`.
        split: 'train' or 'test'.
    """

    def __init__(self, dir: Path, split: str = "train") -> None:
        if split not in ("train", "test"):
            raise one_of("easy_vqa split", split, ("train", "test"))
        self.images = dir / split / "images"
        rows = json.loads(existing_file(dir / split / "questions.json", "easy-VQA").read_text(encoding="utf-8"))
        self.targets: dict[int, list[Target]] = {}
        for number, (question, answer, image) in enumerate(rows):
            self.targets.setdefault(int(image), []).append(Target(answer, question, number, (answer,)))
        self.ids = sorted(self.targets)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        sample = self.said(index)
        return replace(sample, images=(_read(self.images / f"{sample.key}.png"),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        image = self.ids[index]
        return Sample(str(image), (), tuple(self.targets[image]))

    def texts(self) -> Iterator[str]:
        """Yield every question and answer."""
        for targets in self.targets.values():
            for target in targets:
                yield from (target.prompt, target.text)


class Joined:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sample:
        source, local = self._place(index)
        return source[local]

    def said(self, index: int) -> Sample:
        """Return a record without its pictures."""
        source, local = self._place(index)
        return source.said(local)

    def _place(self, index: int) -> tuple[Source, int]:
        which = bisect_right(self.ends, index)
        return self.sources[which], index - (self.ends[which - 1] if which else 0)

    def texts(self) -> Iterator[str]:
        """Yield theirs."""
        return chain.from_iterable(source.texts() for source in self.sources)


DATASETS: dict[str, Callable[..., Source]] = {
    "cc3m": ConceptualCaptions,
    "tsv": TSVPair,
    "webdataset": WebDataset,
    "easy_vqa": EasyVqa,
    "coco": CocoCaptions,
    "vqav2": VqaV2,
    "several_images": SeveralImages,
    "visual_genome": VisualGenome,
    "textocr": TextOcr,
    "coco_regions": CocoRegions,
    "prompts": PromptPictures,
    "diffusiondb": DiffusionDb,
    "pictures": PictureFolder,
    "vectors": VectorSource,
}


def build_source(entries: Sequence[Mapping[str, Any]], dir: str | Path) -> Source:
    """Build the sources of a recipe.

    Args:
        entries: mappings with a `type` (a key of DATASETS) and that source's arguments.
        dir: where relative paths start.

    Raises:
        UserError: unknown type or key (with the nearest), missing file, nothing in it.
    """
    sources = [DATASETS[kind](Path(dir), **arguments) for kind, arguments in map(checked_entry, entries)]
    if sum(map(len, sources)) == 0:
        raise UserError(f"the data sources under {dir} hold no record")
    return sources[0] if len(sources) == 1 else Joined(sources)


def checked_entry(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return a recipe entry's type and arguments, known to fit; opens no file.

    Raises:
        UserError: unknown type or key (with the nearest), or a key that is missing.
    """
    arguments = dict(entry)
    kind = str(arguments.pop("type", ""))
    if kind not in DATASETS:
        raise one_of("data source type", kind, DATASETS)
    allowed = {n: p for n, p in inspect.signature(DATASETS[kind]).parameters.items() if n != "dir"}
    if unknown := [key for key in arguments if key not in allowed]:
        near = nearest(unknown[0], allowed)
        raise UserError(f"unknown key '{unknown[0]}' of source '{kind}'{near}; one of: {', '.join(allowed)}")
    if missing := [n for n, p in allowed.items() if p.default is p.empty and n not in arguments]:
        raise UserError(f"source '{kind}' needs {', '.join(missing)}")
    return kind, arguments


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise SampleError(path.name, "missing") from error
    except OSError as error:
        raise SampleError(path.name, f"unreadable: {error.strerror}") from error
