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
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from git_model.batch import BadSample
from git_model.datasets.files import SampleError, write_all
from git_model.errors import EXIT_IO, UserError
from git_model.saves import sync_folder

if TYPE_CHECKING:
    from torch import Tensor

    from git_model.datasets.loader import ImageTextDataset

log = logging.getLogger(__name__)

FILE_BYTES = 64 * 2**20  # of one file, about
FILE_RECORDS = 4096  # of one file, at most
KINDS = {"float16": 2, "int8": 1}  # bytes a number


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
        return [number for number in range(self.files) if f"{number:05d}.safetensors" not in there]

    def members(self, number: int) -> Sequence[int]:
        """Return the records of a file."""
        return self.records[number * self.per_file : (number + 1) * self.per_file]

    def get(self, record: int, key: str) -> np.ndarray:
        """Return the features (N,D) float16 of a record.

        Args:
            record: its number in the data set.
            key: its key there, held against the one its features were made for.

        Raises:
            SampleError: its picture could not be used; with the reason found then.
            UserError: it is not in the store, or another record is in its place.
        """
        slot = record if self.slots is None else self.slots[record]
        number, place = divmod(slot, self.per_file)
        if number not in self._open:
            self._open[number] = _File(self.folder / f"{number:05d}.safetensors")
        file = self._open[number]
        if (reason := file.reasons.get(str(place))) is not None:
            raise SampleError(key, reason)
        if int(file.keys[place]) != zlib.crc32(key.encode()):
            raise UserError(
                f"the data has changed since its features were stored: record {record} is '{key}' now; "
                f"remove {self.folder} to encode it again"
            )
        found = file.features[place]  # (N,D)
        if self.kind == "float16":
            return found.copy()  # the mapping is read-only, which torch's tensors cannot say
        assert file.scales is not None
        return (found * file.scales[place][:, None]).astype(np.float16)

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

    def write(self, number: int, features: np.ndarray, keys: Sequence[str], reasons: Mapping[int, str]) -> float:
        """Write a file, whole or not at all.

        Args:
            number: which.
            features: (records,N,D) float32; zeros for a record without a usable picture.
            keys: of its records.
            reasons: why a record, by its place in the file, has no features.

        Returns:
            the error of rounding: root mean square over that of the features.
        """
        from safetensors.numpy import save_file

        tensors: dict[str, np.ndarray] = {"keys": np.array([zlib.crc32(key.encode()) for key in keys], np.uint32)}
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
        where = self.folder / f"{number:05d}.safetensors"
        part = where.with_name(f".{where.name}.{uuid.uuid4().hex[:12]}.part")
        told = {"reasons": json.dumps({str(place): reason for place, reason in reasons.items()})}
        try:
            save_file(tensors, part, metadata=told)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(where)
            sync_folder(self.folder)
        finally:
            part.unlink(missing_ok=True)
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
            raise UserError(f"cannot read the features in {path}: {error}; remove it to encode them again") from error
        self.reasons: dict[str, str] = json.loads(head["__metadata__"]["reasons"])
        arrays = {}
        for name, kind in (("features", None), ("keys", np.uint32), ("scales", np.float32)):
            if name in head:
                start, end = head[name]["data_offsets"]
                kind = kind or {"F16": np.float16, "I8": np.int8}[head[name]["dtype"]]
                arrays[name] = whole[8 + size + start : 8 + size + end].view(kind).reshape(head[name]["shape"])
        self.features, self.keys, self.scales = arrays["features"], arrays["keys"], arrays.get("scales")


def fill(
    store: FeatureStore,
    data: ImageTextDataset,
    encode: Callable[[Tensor], Tensor],
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 32,
    workers: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Encode this process's share of what a store lacks; a progress bar on the first.

    Args:
        store: of `data`; announced.
        data: the pictures as they are encoded.
        encode: (I,3,H,W) uint8 -> (I,N,D).
        rank: of this process; files are dealt out by number.
        world: number of processes.
        batch_size: pictures at a time.
        workers: processes that read pictures.
        stop: asked after each file.

    Returns:
        whether this share is whole; False where `stop` said so.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from git_model.datasets.collate import Loaded

    numbers = [number for number in store.missing() if number % world == rank]
    order = [(0, record) for number in numbers for record in store.members(number)]
    loader = DataLoader(data, sampler=order, batch_size=None, num_workers=workers, collate_fn=_as_it_is)  # type: ignore[arg-type]
    stream, errors = iter(loader), []
    with tqdm(total=len(order), unit="image", desc="encoding pictures once", disable=rank > 0 or not order) as bar:
        for number in numbers:
            count = len(store.members(number))
            features = np.zeros((count, *store.shape), np.float32)
            keys, reasons, waiting = [], {}, []
            for place in range(count):
                item = next(stream)
                keys.append(item.key)
                if isinstance(item, BadSample):
                    reasons[place] = item.reason
                elif isinstance(item, Loaded) and len(item.images) != 1:
                    raise UserError(f"a feature store holds one picture a record; '{item.key}' has {len(item.images)}")
                else:
                    waiting.append((place, item.images[0].clone()))
                if waiting and (len(waiting) == batch_size or place == count - 1):
                    _encode(waiting, encode, features)
                bar.update()
            _encode(waiting, encode, features)
            errors.append(store.write(number, features, keys, reasons))
            if stop():
                return False
    if errors and rank == 0:
        log.info("%s features: root mean square error %.2e of theirs", store.kind, max(errors))
    return True


def _encode(waiting: list[tuple[int, Any]], encode: Callable[[Any], Any], features: np.ndarray) -> None:
    """Put the features of the waiting pictures in their places."""
    import torch

    if waiting:
        places = [place for place, _ in waiting]
        features[places] = encode(torch.stack([picture for _, picture in waiting])).float().cpu().numpy()
        waiting.clear()


def _as_it_is(item: Any) -> Any:
    return item


def _spelled(records: Sequence[int]) -> Any:
    """Return records in few words."""
    return len(records) if isinstance(records, range) else [int(r) for r in records]


def chosen(size: int, limit: int | None) -> Iterator[int]:
    """Yield the records of an evaluation: at most `limit`, spread evenly over `size`."""
    count = size if limit is None else min(limit, size)
    return (i * size // count for i in range(count))
