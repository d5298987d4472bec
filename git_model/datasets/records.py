"""Random access to GIT TSV files, safe across worker processes.

Rows are read by position (pread) on descriptors that each process opens for itself, so a data set can be
forked, spawned or pickled, and no worker moves another's file pointer.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.files import Descriptors, RecordError, checked_index, write_all
from git_model.errors import UserError

log = logging.getLogger(__name__)

MAX_ROW_BYTES = 512 * 2**20
_CHUNK = 1 << 24
_KEY_BYTES = 128


def json_cell(value: Any) -> str:
    """Return `value` as the JSON of a TSV cell: sorted keys, no spaces, ASCII (GIT's ``json_dump``)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _cell(value: str | bytes | int) -> bytes:
    if isinstance(value, bytes):
        value.decode()  # a TSV is UTF-8: anything else could be written but not read
    elif not isinstance(value, (str, int)):
        raise TypeError(f"a TSV cell is str, bytes or int, not {type(value).__name__}")
    raw = value if isinstance(value, bytes) else str(value).encode()
    if any(byte in raw for byte in b"\t\n\r"):
        raise ValueError(f"a TSV cell cannot hold a tab or a line end: {raw[:80]!r}")
    return raw


def _sides(path: Path) -> tuple[Path, Path]:
    """Return the text and the binary index of a TSV: the name without its last suffix."""
    return path.with_suffix(".lineidx"), path.with_suffix(".lineidx.8b")


def write_tsv(path: str | os.PathLike[str], rows: Iterable[Sequence[str | bytes | int]]) -> int:
    """Write a GIT TSV (microsoft/GenerativeImage2Text, tsv_io.py) and its indexes; return the row count.

    Nothing changes under the final names where `rows` raises.

    Raises:
        ValueError: a cell holds a tab or line end or is not UTF-8, or a row has no cell.
    """
    starts = array("q", [0])  # of every row, and the end

    def lines() -> Iterator[bytes]:
        for row in rows:
            if not row or isinstance(row, (str, bytes)):
                raise ValueError(f"{path} row {len(starts) - 1}: a row is a sequence of one or more cells")
            try:
                line = b"\t".join(map(_cell, row)) + b"\n"
            except ValueError as error:
                raise ValueError(f"{path} row {len(starts) - 1}: {error}") from error
            starts.append(starts[-1] + len(line))
            yield line

    def files() -> Iterator[tuple[Path, Iterable[bytes]]]:
        yield Path(path), lines()
        yield from _index_files(Path(path), np.array(starts[:-1], "<i8"))

    write_all(files())
    return len(starts) - 1


def _index_files(path: Path, offsets: np.ndarray) -> Iterator[tuple[Path, Iterable[bytes]]]:
    text, binary = _sides(path)
    yield text, (b"%d\n" % offset for offset in offsets)
    yield binary, (offsets.astype("<i8").tobytes(),)


class TSVFile(Sequence[list[str]]):
    """Rows of a TSV as lists of columns; only the line end is taken off, no column is stripped.

    The index is trusted only as far as it fits: its age, its length and both its ends are checked when it
    is read, and the line ends around a row whenever that row is. Else it is rebuilt, with a warning.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"no TSV file '{path}'")
        self._rebuilt = False
        self._load()

    def _load(self) -> None:
        self._file, status = Descriptors([self.path]), self.path.stat()
        self._size = status.st_size
        text, binary = _sides(self.path)
        side = binary if binary.exists() else text
        try:
            if side.stat().st_mtime_ns < status.st_mtime_ns:
                raise ValueError("is older than the TSV")
            if side == binary and self._size:
                self._offsets: np.ndarray = np.memmap(side, "<i8", "r")
            else:
                self._offsets = np.array([int(word) for word in side.read_bytes().split()], "<i8")
            if side == binary and text.exists() and text.read_bytes().count(b"\n") != len(self):
                raise ValueError(f"differs from {text.name}")
            if not self._fits():
                raise ValueError("does not fit the TSV")
        except FileNotFoundError:
            self._rebuild()
        except (OSError, ValueError, OverflowError) as error:
            log.warning("index %s %s: rebuilding it", side, error)
            self._rebuild()

    def _fits(self) -> bool:
        """Whether the offsets are right (small files) or rise from 0 to the start of the last line."""
        offsets, size = self._offsets, self._size
        if size <= _CHUNK:  # a glance at the whole file costs as much as one at its end
            return np.array_equal(offsets, self._scan())
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] >= size or (offsets[1:] <= offsets[:-1]).any():
            return False
        for position in range(int(offsets[-1]), size, _CHUNK):
            found = self._file.read(0, _CHUNK, position).find(b"\n")
            if found >= 0:
                return position + found == size - 1
        return True

    def _scan(self) -> np.ndarray:
        self._size, found = 0, [np.zeros(1, "<i8")]
        while chunk := self._file.read(0, _CHUNK, self._size):
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + self._size + 1)
            self._size += len(chunk)
        starts = np.concatenate(found)
        return starts[starts < self._size]

    def _rebuild(self) -> None:
        self._file, status = Descriptors([self.path]), self.path.stat()
        self._offsets = self._scan()
        try:  # dated like what was read: a TSV that changes meanwhile is newer than this index
            write_all(_index_files(self.path, self._offsets), status.st_mtime_ns)
        except OSError as error:
            log.info("the index of %s is kept in memory only: %s", self.path, error)

    def _row(self, index: int) -> bytes | None:
        """Return a row without its line end; None where the index does not meet the line ends."""
        start, last = int(self._offsets[index]), index + 1 == len(self)
        size = (self._size if last else int(self._offsets[index + 1])) - start
        before = int(start > 0)
        if size > MAX_ROW_BYTES:
            return None
        raw = self._file.read(0, size + before, start - before)
        if len(raw) != size + before or (before and raw[0] != 10):
            return None
        end = raw.find(b"\n", before)
        return raw[before : len(raw) - (end >= 0)] if end == len(raw) - 1 or (last and end < 0) else None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> list[str]:  # type: ignore[override]
        row = self._row(checked_index(index, len(self), self.path))
        if row is None and not self._rebuilt:
            log.warning("row %d of %s does not meet its index: rebuilding it", index, self.path)
            self._rebuilt, before = True, len(self)
            self._rebuild()
            if len(self) != before:  # whoever counted the rows before counted wrong
                raise UserError(f"the index of {self.path} was not its own; it is rebuilt now: start again")
            row = self._row(checked_index(index, len(self), self.path))
        if row is None:
            raise RecordError("bad_row", f"{self.path} row {index}")
        try:
            return row.decode().split("\t")
        except UnicodeDecodeError as error:
            raise RecordError("bad_utf8", f"{self.path} row {index}") from error

    def key(self, index: int) -> bytes:
        """Return the first column of a row, reading no more than it takes; unchecked UTF-8."""
        start, known = int(self._offsets[index]), b""
        while not any(mark in known for mark in (b"\t", b"\n")):
            more = self._file.read(0, _KEY_BYTES, start + len(known))
            if not more:
                break
            known += more
        return known.partition(b"\n")[0].partition(b"\t")[0]

    def __getstate__(self) -> dict[str, Any]:
        mapped = isinstance(self._offsets, np.memmap)  # would be pickled as a copy: mapped anew instead
        return {k: v for k, v in vars(self).items() if not (mapped and k == "_offsets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if "_offsets" not in state:
            self._load()
