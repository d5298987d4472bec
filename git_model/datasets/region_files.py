"""Files of regions: Visual Genome, TextOCR, COCO-style boxes. A record is a picture with all its boxes and their texts.

What cannot be used is left out and counted by reason in `dropped`; the rest is held in arrays, so that Visual Genome's
five million regions take a few hundred megabytes, which worker processes share.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from git_model.batch import Box, Region, Sample, Target
from git_model.datasets.annotations import Id, entries, image_id, read_json, text_of
from git_model.datasets.coco import ImageFolder
from git_model.datasets.regions import in_picture
from git_model.errors import ImageError, UserError

log = logging.getLogger(__name__)

Size = tuple[float, float]
NO_BOX = "box_malformed"


class RegionRecords:
    """Pictures with boxes and texts; what the sources below share.

    Args:
        folder: of the pictures.
        path: of the file, for messages.
    """

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self.path = ImageFolder(folder), path
        self.dropped: Counter[str] = Counter()  # regions by reason; and "image_without_region"
        self.names: list[tuple[Id, str]] = []  # id and file name
        self._starts, self._places = [0], [0]  # of each picture's first region, of each text in `_texts`
        self._boxes: list[Box] = []
        self._texts = bytearray()

    def add(self, key: Id, name: str, said: Iterable[tuple[str, Sequence[float]]], size: Size | None) -> None:
        """Add a picture's regions, those that can be used; a picture without one is left out.

        Args:
            key: the picture's id.
            name: of its file.
            said: texts and boxes x, y, x, y in pixels.
            size: width and height of the picture; None where the file does not tell: boxes are then held against the
                picture when it is read.
        """
        for text, box in said:
            try:
                if not text.strip():
                    raise ImageError("blank_text")
                width, height = size or (max(box, default=0), max(box, default=0))
                if not all(isinstance(v, int | float) and v >= 0 for v in box):  # -1 is a typing error here
                    raise ImageError("box_outside" if len(box) == 4 else NO_BOX)
                found = in_picture(box, width, height)  # type: ignore[arg-type]
            except ImageError as error:
                self.dropped[error.reason] += 1
                continue
            except TypeError:
                self.dropped[NO_BOX] += 1
                continue
            self._boxes.append(found)
            self._texts += text.strip().encode(errors="replace")
            self._places.append(len(self._texts))
        if len(self._boxes) == self._starts[-1]:
            self.dropped["image_without_region"] += 1
            return
        self.names.append((key, name))
        self._starts.append(len(self._boxes))

    def close(self) -> None:
        """Pack what was added; say what was left out.

        Raises:
            UserError: no picture has a region.
        """
        if not self.names:
            raise UserError(f"{self.path} holds no usable region; left out: {dict(self.dropped)}")
        self.boxes = np.array(self._boxes, dtype=np.float32)  # (regions,4)
        self.starts, self.places = np.array(self._starts), np.array(self._places)
        self._boxes, self._starts, self._places = [], [], []
        told = f"{self.path.name}: {len(self.boxes):,} regions of {len(self):,} pictures"
        if self.dropped:
            told += f"; left out: {', '.join(f'{count:,} {reason}' for reason, count in self.dropped.most_common())}"
        log.info("%s", told)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        key, name = self.names[index]
        folder, _, file = name.rpartition("/")
        return replace(self.said(index), images=(self.folder.read(key, file, folder),))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        key, _ = self.names[index]
        regions = range(int(self.starts[index]), int(self.starts[index + 1]))
        return Sample(str(key), (), tuple(self._target(number) for number in regions))

    def _target(self, number: int) -> Target:
        left, top, right, bottom = self.boxes[number].tolist()
        return Target(self._text(number), regions=(Region(0, (left, top, right, bottom)),))

    def _text(self, number: int) -> str:
        return self._texts[self.places[number] : self.places[number + 1]].decode()

    def texts(self) -> Iterator[str]:
        """Yield every text."""
        for start, end in pairwise(self.places.tolist()):
            yield self._texts[start:end].decode()


class VisualGenome(RegionRecords):
    """Visual Genome 1.2: `region_descriptions.json`, and `image_data.json` for sizes and file names.

    Args:
        dir: where relative names start.
        images: folder that holds `VG_100K/` and `VG_100K_2/`, or the pictures.
        regions: the JSON of regions.
        image_data: the JSON of sizes; None where there is none.
        sentence: first letter upper case and a full stop, as Click4Caption trains on them.
    """

    def __init__(
        self,
        dir: Path,
        images: str = ".",
        regions: str = "region_descriptions.json",
        image_data: str | None = "image_data.json",
        sentence: bool = False,
    ) -> None:
        super().__init__(dir / images, dir / regions)
        facts: dict[Id, tuple[str, Size]] = {}
        if image_data is not None:
            wanted = ("image_id", "width", "height")
            for entry in entries(read_json(dir / image_data), None, wanted, dir / image_data):
                name = "/".join(str(entry.get("url", "")).split("/")[-2:])
                facts[image_id(entry["image_id"], dir / image_data)] = name, (entry["width"], entry["height"])
        for entry in entries(read_json(self.path), None, ("regions",), self.path):
            said = entries(entry["regions"], None, ("phrase", "x", "y", "width", "height"), self.path)
            key = image_id(entry.get("id", entry.get("image_id", said[0].get("image_id") if said else None)), self.path)
            if image_data is not None and key not in facts:
                self.dropped["image_not_in_image_data"] += 1
                continue
            name, size = facts.get(key, ("", None))
            texts = (as_sentence(str(r["phrase"])) if sentence else str(r["phrase"]) for r in said)
            boxes = ((r["x"], r["y"], r["width"], r["height"]) for r in said)
            self.add(key, name, zip(texts, map(corners, boxes), strict=True), size)
        self.close()


class TextOcr(RegionRecords):
    """TextOCR 0.1: words in pictures. Words that would be a few pixels in the encoder's input are left out.

    Args:
        dir: where relative names start.
        annotations: the JSON.
        images: folder of the pictures.
        least: pixels; a word narrower or lower than this at `side` is left out.
        side: of the encoder's input.
        words: pictures with fewer usable words are left out.
    """

    def __init__(
        self,
        dir: Path,
        annotations: str = "TextOCR_0.1_train.json",
        images: str = "train_images",
        least: float = 5,
        side: int = 224,
        words: int = 6,
    ) -> None:
        super().__init__(dir / images, dir / annotations)
        content = read_json(self.path)
        if not isinstance(content, dict) or not all(isinstance(content.get(k), dict) for k in ("imgs", "anns")):
            raise UserError(f"'{self.path}' is no TextOCR file: it has no 'imgs' and 'anns'")
        of_image: dict[str, list[dict[str, Any]]] = {}
        for note in entries(list(content["anns"].values()), None, ("image_id", "utf8_string", "bbox"), self.path):
            of_image.setdefault(str(note["image_id"]), []).append(note)
        for key, image in content["imgs"].items():
            try:
                width, height = float(image["width"]), float(image["height"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"'{self.path}': image '{key}' has no width and height") from error
            said = []
            for note in of_image.get(str(key), []):
                x0, y0, x1, y1 = corners(note["bbox"]) or (0.0,) * 4
                box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
                narrow = (box[2] - box[0]) * side / width < least or (box[3] - box[1]) * side / height < least
                if note["utf8_string"] == "." or narrow:
                    self.dropped["illegible" if note["utf8_string"] == "." else "small_word"] += 1
                else:
                    said.append((str(note["utf8_string"]), box))
            if len(said) < words:
                self.dropped["few_words"] += len(said)
                said = []
            self.add(str(key), Path(str(image.get("file_name", ""))).name, said, (width, height))
        self.close()


class CocoRegions(RegionRecords):
    """COCO-style boxes: instances (the text is the category's name), or any such file with a text at every box.

    Args:
        dir: where relative names start.
        annotations: the JSON: images, annotations with bbox x, y, width, height, and categories.
        images: folder of the pictures.
        text: key of an annotation's text, e.g. 'caption'; None = its category's name.
    """

    def __init__(self, dir: Path, annotations: str, images: str, text: str | None = None) -> None:
        super().__init__(dir / images, dir / annotations)
        content = read_json(self.path)
        needed = ("image_id", "bbox", text or "category_id")
        names: dict[Any, str] = {}
        if text is None:
            told = entries(content, "categories", ("id", "name"), self.path)
            names = {entry["id"]: str(entry["name"]) for entry in told}
        of_image: dict[Id, list[tuple[str, Sequence[float]]]] = {}
        for note in entries(content, "annotations", needed, self.path):
            if note.get("iscrowd"):
                self.dropped["crowd"] += 1
                continue
            said = names.get(note["category_id"], "") if text is None else text_of(note, text, self.path)
            of_image.setdefault(image_id(note["image_id"], self.path), []).append((said, corners(note["bbox"])))
        for image in entries(content, "images", ("id",), self.path):
            size = (image["width"], image["height"]) if "width" in image and "height" in image else None
            key = image_id(image["id"], self.path)
            self.add(key, str(image.get("file_name", "")), of_image.get(key, []), size)
        self.close()


def corners(box: Any) -> tuple[float, ...]:
    """Return x, y, x, y of x, y, width, height; () of what is no such thing."""
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return ()
    return (x, y, x + width, y + height) if width > 0 and height > 0 else (x, y, x, y)


def as_sentence(phrase: str) -> str:
    """Return a phrase with its first letter upper case and a full stop."""
    phrase = phrase.strip()
    return f"{phrase[:1].upper()}{phrase[1:]}{'' if phrase.endswith('.') else '.'}" if phrase else ""
