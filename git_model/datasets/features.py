"""FeatureStore: what a frozen encoder says of every picture, encoded once, memory-mapped from then on.

    <folder>/<key>/STORE.json            what the features are of: encoder, transform, records
    <folder>/<key>/00000.safetensors     of some hundred records each: features, for int8 also scales, and the keys

The key is a hash of STORE.json: another encoder, transform or data set makes another store beside this one. A file
appears under its name when it is whole, so that any number of processes may write at the same time and be killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from git_model.batch import Sample
from git_model.datasets.files import SampleError, write_all
from git_model.errors import EXIT_IO, UserError

log = logging.getLogger(__name__)

FILE_BYTES = 64 * 2**20  # of one file, about
FILE_RECORDS = 4096  # of one file, at most
KINDS = {"float16": 2, "int8": 1}  # bytes a number
MAX_MAPPED = 256  # files a process has mapped at a time: each keeps a descriptor


class FeatureStore:
    """Features of the pictures of a data set, one picture a record.

    Args:
        folder: where stores are.
        identity: what the features are of; whatever changes them belongs here. Its hash names this store.
        records: the data set's records that are in it, in order.
        shape: (N,D) of a picture's features.
        kind: 'float16', or 'int8' with a float32 scale for each of the N tokens.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], records: Sequence[int], shape: tuple[int, int], kind: str
    ) -> None:
        self.identity = {**identity, "records": _spelled(records), "shape": list(shape), "kind": kind}
        text = json.dumps(self.identity, sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.records, self.shape, self.kind = records, shape, kind
        self.slots = None if isinstance(records, range) else {record: slot for slot, record in enumerate(records)}
        per = shape[0] * shape[1] * KINDS[kind]
        self.per_file = max(1, min(FILE_RECORDS, FILE_BYTES // per))
        self.bytes = len(records) * (per + (4 * shape[0] if kind == "int8" else 0) + 4)
        self.files = -(-len(records) // self.per_file)
        self._open: dict[int, _File] = {}

    def __reduce__(self) -> tuple[Callable[..., FeatureStore], tuple[Any, ...]]:
        own = ("records", "shape", "kind")
        identity = {name: value for name, value in self.identity.items() if name not in own}
        return FeatureStore, (self.folder.parent, identity, self.records, self.shape, self.kind)  # mapped anew

    def __len__(self) -> int:
        return len(self.records)

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not there yet."""
        there = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [number for number in range(self.files) if self._path(number).name not in there]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def members(self, number: int) -> Sequence[int]:
        """Return the records of a file."""
        return self.records[number * self.per_file : (number + 1) * self.per_file]

    def get(self, record: int, sample: Sample) -> np.ndarray:
        """Return the features (N,D) of a record: float16, or float32 of int8.

        Args:
            record: its number in the data set.
            sample: what is said of it; name and texts are held against those its features were made beside.

        Raises:
            SampleError: its picture could not be used; with the reason found then.
            UserError: it is not in the store, or another record is in its place.
        """
        slot = record if self.slots is None else self.slots.get(record, -1)
        if not 0 <= slot < len(self):
            raise UserError(f"record {record} ('{sample.key}') is not in the feature store {self.folder}")
        number, place = divmod(slot, self.per_file)
        if number not in self._open:
            if len(self._open) >= MAX_MAPPED:
                self._open.pop(next(iter(self._open)))
            self._open[number] = _File(self._path(number))
        file = self._open[number]
        if int(file.keys[place]) != stamp(sample):
            raise UserError(
                f"the data has changed since its features were stored: record {record} is '{sample.key}' now, with "
                f"other texts or another name; remove {self.folder} to encode it again"
            )
        if (reason := file.reasons.get(str(place))) is not None:
            raise SampleError(sample.key, reason)
        found = file.features[place]  # (N,D)
        if self.kind == "float16":
            return found.copy()  # the mapping is read-only, which torch's tensors cannot say
        assert file.scales is not None
        return found * file.scales[place][:, None]

    def announce(self) -> None:
        """Make the folder and say how large the store will be.

        Raises:
            UserError: the disk has less room than is needed (exit code 74).
        """
        left = len(self.missing())
        if not left:
            log.info("features of %d pictures are in %s", len(self), self.folder)
            return
        needed = self.bytes * left / max(1, self.files)
        tokens, width = self.shape
        told = f"{len(self):,} pictures x {tokens} x {width} x {KINDS[self.kind]} bytes = {self.bytes / 1e9:,.2f} GB"
        log.info("feature store %s: %s, %.2f GB of it still to be written", self.folder, told, needed / 1e9)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise UserError(f"cannot write the feature store {self.folder}: {error.strerror}", EXIT_IO) from error
        if free < needed:
            raise UserError(
                f"the feature store needs {needed / 1e9:,.2f} GB ({told}), its disk has {free / 1e9:,.2f} GB left; "
                "int8 features take half, pooled ones a fraction",
                EXIT_IO,
            )
        write_all([(self.folder / "STORE.json", [json.dumps(self.identity, indent=2).encode() + b"\n"])])

    def write(self, number: int, features: np.ndarray, stamps: Sequence[int], reasons: Mapping[int, str]) -> float:
        """Write a file, whole or not at all.

        Args:
            number: which.
            features: (records,N,D) float32; zeros for a record without a usable picture.
            stamps: of its records, see `stamp`.
            reasons: why a record, by its place in the file, has no features.

        Returns:
            the error of rounding: root mean square over that of the features.
        """
        from safetensors.numpy import save

        if not np.isfinite(features).all():
            raise UserError(f"the encoder gives numbers that are not finite (file {number} of {self.folder})")
        tensors: dict[str, np.ndarray] = {"keys": np.array(stamps, np.uint32)}
        if self.kind == "int8":
            scales = np.maximum(np.abs(features).max(axis=2), 1e-12) / 127  # (records,N)
            tensors["features"] = np.round(features / scales[..., None]).astype(np.int8)
            tensors["scales"] = scales.astype(np.float32)
            back = tensors["features"] * tensors["scales"][..., None]
        else:
            with np.errstate(over="ignore"):
                tensors["features"] = features.astype(np.float16)
            back = tensors["features"].astype(np.float32)
            if not np.isfinite(back).all():
                raise UserError("features do not fit float16 (65,504 at most); feature_type int8 has a scale a token")
        told = {"reasons": json.dumps({str(place): reason for place, reason in reasons.items()})}
        write_all([(self._path(number), [save(tensors, metadata=told)])])
        size = float(np.sqrt(np.mean(np.square(features, dtype=np.float64))))
        return float(np.sqrt(np.mean(np.square(back - features, dtype=np.float64)))) / max(size, 1e-12)


class _File:
    """A file of a store, mapped: arrays that are read where they lie."""

    def __init__(self, path: Path) -> None:
        try:
            whole = np.memmap(path, np.uint8, "r")
            size = int.from_bytes(whole[:8].tobytes(), "little")
            head = json.loads(whole[8 : 8 + size].tobytes())
        except (OSError, ValueError) as error:
            told = "" if isinstance(error, OSError) else "; remove it to encode them again"
            raise UserError(f"cannot read the features in {path}: {error}{told}", EXIT_IO) from error
        self.reasons: dict[str, str] = json.loads(head["__metadata__"]["reasons"])
        arrays = {}
        for name, kind in (("features", None), ("keys", np.uint32), ("scales", np.float32)):
            if name in head:
                start, end = head[name]["data_offsets"]
                kind = kind or {"F16": np.float16, "I8": np.int8}[head[name]["dtype"]]
                arrays[name] = whole[8 + size + start : 8 + size + end].view(kind).reshape(head[name]["shape"])
        self.features, self.keys, self.scales = arrays["features"], arrays["keys"], arrays.get("scales")


def stamp(sample: Sample) -> int:
    """Return a number that tells a record's name and texts from others."""
    words = [sample.key, *(word for target in sample.targets for word in (target.prompt, target.text))]
    return zlib.crc32("\0".join(words).encode("utf-8", "surrogatepass"))


def _spelled(records: Sequence[int]) -> Any:
    """Return records in few words."""
    return len(records) if isinstance(records, range) else [int(r) for r in records]


def chosen(size: int, limit: int | None) -> Iterator[int]:
    """Yield the records of an evaluation: at most `limit`, spread evenly over `size`."""
    count = size if limit is None else min(limit, size)
    return (i * size // count for i in range(count))
