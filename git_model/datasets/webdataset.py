"""A source over tar shards: picture and text, as img2dataset writes them and others of that shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from git_model.batch import Sample, Target
from git_model.datasets.files import RecordError, SampleError
from git_model.datasets.shards import TarShards, expand_shards


class WebDataset:
    """Tar shards of picture and text: img2dataset's (`.jpg`, `.txt`, `.json`) and others of that shape.

    Args:
        dir: where relative names start.
        shards: a path, a glob or a brace range `{00000..00331}`.
        captions: key in a member's JSON that holds one caption or a list; without it, the `.txt` member or
            the JSON's `caption`.
    """

    def __init__(self, dir: Path, shards: str, captions: str | None = None) -> None:
        self.records = TarShards(expand_shards(str(dir / shards)))
        self.captions = captions

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        image = next((record.members[e] for e in ("jpg", "jpeg", "png", "webp") if e in record.members), None)
        if image is None:
            raise SampleError(record.key, "no_image")
        return Sample(record.key, (image,), tuple(map(Target, self._captions(record.key, record.members))))

    def said(self, index: int) -> Sample:
        """Return a record without its picture."""
        record = self.records.record(index, only=("txt", "json"))
        return Sample(record.key, (), tuple(map(Target, self._captions(record.key, record.members))))

    def _captions(self, key: str, members: Mapping[str, bytes]) -> list[str]:
        try:
            if self.captions is None and "txt" in members:
                found = members["txt"].decode("utf-8")
            else:
                found = json.loads(members["json"])[self.captions or "caption"]
        except (KeyError, TypeError, ValueError) as error:
            raise SampleError(key, "no_caption") from error
        captions = [str(c).strip() for c in (found if isinstance(found, list) else [found])]
        if not any(captions):
            raise SampleError(key, "no_caption")
        return [c for c in captions if c]

    def texts(self) -> Iterator[str]:
        """Yield every caption."""
        for index in range(len(self)):
            try:
                record = self.records.record(index, only=("txt", "json"))
                yield from self._captions(record.key, record.members)
            except RecordError:
                continue  # counted when the record is drawn
