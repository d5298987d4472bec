"""Descriptors, positions and atomic writing: what TSV files and tar shards share."""

from __future__ import annotations

import logging
import operator
import os
import threading
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from git_model.errors import UserError
from git_model.saves import sync_folder

log = logging.getLogger(__name__)

MAX_OPEN_FILES = 64


class RecordError(ValueError):
    """A record that cannot be read; `reason` is a short word to count by, `detail` names file and row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both in args: the error survives pickling out of a worker
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[1]}: {self.reason}"


class SampleError(RecordError):
    """A record that can be read but cannot become a sample.

    Args:
        key: the record's name.
        reason: a short word to count by.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason, key)
        self.key = key

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return SampleError, (self.key, self.reason)


class Descriptors:
    """Read-only descriptors of some files, opened when first read, anew in every process."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._reset()

    def _reset(self) -> None:
        self._pid, self._lock, self._open = os.getpid(), threading.Lock(), dict[int, int]()

    def read(self, which: int, size: int, offset: int) -> bytes:
        """Return `size` bytes at `offset` of file number `which`; fewer only at its end."""
        if self._pid != os.getpid():  # forked: the parent's descriptors and lock are not ours to touch
            self._reset()
        with self._lock:
            if which not in self._open:
                if len(self._open) >= MAX_OPEN_FILES:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[which] = os.open(self.paths[which], os.O_RDONLY | os.O_CLOEXEC)
            parts = []
            while size > 0 and (part := os.pread(self._open[which], size, offset)):
                parts.append(part)
                size, offset = size - len(part), offset + len(part)
        return b"".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["paths"])

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            for descriptor in self._open.values():
                with suppress(OSError):
                    os.close(descriptor)


# -- TSV ---------------------------------------------------------------------------------------------


def write_all(files: Iterable[tuple[Path, Iterable[bytes | memoryview]]], mtime_ns: int | None = None) -> None:
    """Write files, the first one being what the others describe; each final name holds a whole file."""
    parts: dict[Path, Path] = {}
    try:
        for path, chunks in files:
            parts[path] = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
            with parts[path].open("xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            if mtime_ns is not None:
                os.utime(parts[path], ns=(mtime_ns, mtime_ns))
        # An old index goes before its TSV changes: whatever the crash, none is left beside a new TSV.
        for path in list(parts)[1:]:
            path.unlink(missing_ok=True)
        for path, part in parts.items():
            part.replace(path)
        sync_folder(next(iter(parts)).parent)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def refuse_overwriting(out: str | Path, *inputs: str | Path | None) -> None:
    """Raise UserError where an output is one of the inputs, or the index of one."""
    target = Path(out).resolve()
    for given in filter(None, inputs):
        path = Path(given).resolve()
        if target in (path, path.with_suffix(".lineidx"), path.with_suffix(".lineidx.8b")):
            raise UserError(f"the output '{out}' would overwrite the input '{given}'")


def checked_index(index: int, length: int, what: object) -> int:
    """Return `index` counted from 0, or raise IndexError naming `what`."""
    index = operator.index(index)
    if not -length <= index < length:
        raise IndexError(f"record {index} of {what}, which has {length}")
    return index % length
