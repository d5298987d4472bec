"""Random access to tar shards (img2dataset, webdataset): streamed, never extracted, safe across processes."""

from __future__ import annotations

import glob
import io
import itertools
import logging
import math
import os
import re
import tarfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from git_model.datasets.files import Descriptors, RecordError, checked_index, write_all
from git_model.errors import UserError

log = logging.getLogger(__name__)

MEMBERS = ("jpg", "jpeg", "png", "webp", "json", "txt", "cls")  # nothing that has to be unpickled
MAX_MEMBER_BYTES = 20 * 2**20
MAX_SHARDS = 1_000_000


@dataclass(frozen=True, slots=True)
class Record:
    """The files of a tar shard that share a name: its key, and content by lower-case extension."""

    key: str
    members: dict[str, bytes]


class TarShards(Sequence[Record]):
    """Records of img2dataset or webdataset tar shards.

    A shard is never extracted: names are keys, not paths; only regular files with an extension of
    MEMBERS count, the last one where a name repeats. Headers are read once; the index is kept beside a
    shard where that is allowed.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], cache: bool = True) -> None:
        self.paths, self._cache = [Path(path) for path in paths], cache
        self._files = Descriptors(self.paths)
        self._shards = [_tar_index(path, cache) for path in self.paths]
        self._ends = np.cumsum([len(shard["key_ends"]) for shard in self._shards], dtype=np.int64)

    def __reduce__(self) -> tuple[type[TarShards], tuple[list[Path], bool]]:
        return TarShards, (self.paths, self._cache)  # mapped anew, not copied

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]
        return self.record(index)

    def record(self, index: int, only: Collection[str] = MEMBERS) -> Record:
        """Return a record, with the members of some extensions only: the others are not read."""
        position = checked_index(index, len(self), "the tar shards")
        number = int(np.searchsorted(self._ends, position, "right"))
        shard, path = self._shards[number], self.paths[number]
        local = position - (int(self._ends[number - 1]) if number else 0)
        span = {n: slice(int(shard[n][local - 1]) if local else 0, int(shard[n][local])) for n in _ENDS}
        key = shard["keys"][span["key_ends"]].tobytes().decode("utf-8", "surrogateescape")
        members = {}
        for kind, offset, size in shard["members"][span["member_ends"]].tolist():
            if MEMBERS[kind] not in only:
                continue
            where = f"{path} record '{key}' member .{MEMBERS[kind]} ({size} bytes)"
            if size > MAX_MEMBER_BYTES:
                raise RecordError("too_large", where)
            members[MEMBERS[kind]] = self._files.read(number, size, offset)
            if len(members[MEMBERS[kind]]) != size:
                raise RecordError("truncated", where)
        return Record(key, members)


_ENDS = ("key_ends", "member_ends")
_ARRAYS = {"stamp": 1, "keys": 1, "key_ends": 1, "member_ends": 1, "members": 2}  # name -> dimensions


def _tar_index(path: Path, cache: bool) -> dict[str, np.ndarray]:
    """Return a shard's index: keys as bytes, where each key and its members end, (kind, offset, size)."""
    if not path.is_file():
        raise UserError(f"no tar shard '{path}'")
    status = path.stat()
    stamp = np.array([1, status.st_size, status.st_mtime_ns], np.int64)  # the layout's version first
    side = path.with_name(path.name + ".index")
    try:
        index = _mapped(side)
        if np.array_equal(index["stamp"], stamp) and _consistent(index, status.st_size):
            return index
        log.warning("%s is not of this %s: reading the shard again", side, path.name)
    except FileNotFoundError:
        pass
    except Exception as error:  # a damaged header raises anything
        log.warning("%s is unreadable (%s): reading the shard again", side, error)
    records, whole = _scan_tar(path, status.st_size)
    keys = [key.encode("utf-8", "surrogateescape") for key in records]
    rows = [(kind, *place) for members in records.values() for kind, place in members.items()]
    index = {
        "stamp": stamp,
        "keys": np.frombuffer(b"".join(keys), np.uint8),
        "key_ends": np.cumsum([len(key) for key in keys], dtype=np.int64),
        "member_ends": np.cumsum([len(members) for members in records.values()], dtype=np.int64),
        "members": np.array(rows, np.int64).reshape(-1, 3),
    }
    if not records:
        log.warning("%s holds no record (files named KEY.EXT with EXT one of %s)", path, ", ".join(MEMBERS))
    if cache and whole:
        buffer = io.BytesIO()
        for name in _ARRAYS:
            np.save(buffer, index[name], allow_pickle=False)
        with suppress(OSError):  # a read-only folder: scanned again next time
            write_all([(side, [buffer.getvalue()])])
    return index


def _mapped(side: Path) -> dict[str, np.ndarray]:
    """Map the arrays of an index, one after another as np.save writes them: no process holds them, all share them."""
    index: dict[str, np.ndarray] = {}
    with side.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        for name in _ARRAYS:
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError(f"{name} has another layout")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start, size = file.tell(), math.prod(shape) * dtype.itemsize
            if fortran or dtype.kind not in "iu" or start + size > end:
                raise ValueError(f"{name} does not fit")
            index[name] = np.memmap(side, dtype, "r", start, shape) if size else np.empty(shape, dtype)
            file.seek(start + size)
    return index


def _consistent(index: dict[str, np.ndarray], size: int) -> bool:
    members, total = index["members"], {"key_ends": len(index["keys"]), "member_ends": len(index["members"])}
    return bool(
        all(index[name].ndim == d and index[name].dtype.kind in "iu" for name, d in _ARRAYS.items())
        and len(index["key_ends"]) == len(index["member_ends"])
        and all((np.diff(index[n], prepend=0, append=total[n]) >= 0).all() for n in _ENDS)
        and all(index[n][-1:].sum() == total[n] for n in _ENDS)
        and members.shape[1] == 3
        and (members >= 0).all()
        and (members[:, 0] < len(MEMBERS)).all()
        and (members[:, 1] <= size - members[:, 2]).all()
    )


def _scan_tar(path: Path, size: int) -> tuple[dict[str, dict[int, tuple[int, int]]], bool]:
    """Read a tar's headers; return key -> kind -> (offset, size), and whether it is undamaged."""
    records: dict[str, dict[int, tuple[int, int]]] = {}
    position = -1
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # they would add up to gigabytes
                if archive.offset <= position or info.offset_data + info.size > size:
                    raise tarfile.ReadError("a member reaches outside the file")  # CVE-2025-8194: loops
                position = archive.offset
                # webdataset's rule: the key ends at the first dot of the base name
                name = re.fullmatch(r"(?s)(?:\./)?((?:.*/)?[^./]+)\.([^/.]+)", info.name)
                if name and name[2].lower() in MEMBERS and info.isreg() and not info.issparse():
                    place = (info.offset_data, info.size)
                    records.setdefault(name[1], {})[MEMBERS.index(name[2].lower())] = place
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
                raise tarfile.ReadError(f"broken header at byte {archive.offset}")
    except Exception as error:  # hostile headers raise anything
        if position < 0:
            raise UserError(f"'{path}' is not an uncompressed tar shard ({error})") from error
        log.warning("%s is damaged (%s): using the %d records before that", path, error, len(records))
        return records, False
    return records, True


def expand_shards(spec: str) -> list[Path]:
    """Return the shards named by a path, a glob, or a range as in ``data/{00000..00008}.tar``.

    Raises:
        UserError: nothing matches, or a file of the range is missing.
    """
    names = [str(Path(spec).expanduser())]
    while braces := re.search(r"\{(\d+)\.\.(\d+)\}", names[0]):
        low, high = braces.groups()
        width = max(map(len, (low, high))) if low.startswith("0") else 0
        count = int(high) - int(low) + 1
        if not 0 < count * len(names) <= MAX_SHARDS:
            raise UserError(f"shard range '{braces[0]}' is empty or longer than {MAX_SHARDS}")
        numbers = [f"{number:0{width}d}" for number in range(int(low), int(high) + 1)]
        names = [name.replace(braces[0], number, 1) for name, number in itertools.product(names, numbers)]
    paths = []
    for name in names:
        found = [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        if not found:
            raise UserError(f"no shard matches '{name}'" + (f" (of '{spec}')" if name != spec else ""))
        paths += map(Path, found)
    return paths
