"""img2dataset's Downloader with guards: what it fetches, what it keeps, where a picture goes, what is noted of it.

The engine gives the processes (or Spark's), the threads, the resizing and the hand-over between them. Its objects are
pickled into processes that are started anew, so every guard hangs on the object, not on a patched module.
"""

from __future__ import annotations

import heapq
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # a dependency of the engine asks the net for its own news

import img2dataset.downloader

from git_model.datasets.images import ImageError, decode_image
from git_model.download.fetch import fetch
from git_model.download.ledger import OK, LedgerPart, line
from git_model.download.network import FetchError, FetchPolicy

STOPPED = "stopped"  # not a verdict: the row is left for the next run


@dataclass(frozen=True, slots=True)
class Job:
    """What a process must know of a download.

    Args:
        work: ledgers' folder.
        pictures: folder of `{row:08d}.jpg`; for tar shards a folder for each range, until its pictures are packed.
        tars: folder of `{range:05d}.tar`, or None.
        ranges: the range of rows that each of the engine's shards is.
        policy: of fetching.
        resize: whether pictures are resized, so that none keeps its own bytes.
    """

    work: Path
    pictures: Path
    tars: Path | None
    ranges: tuple[int, ...]
    policy: FetchPolicy
    resize: bool

    def part(self, number: int) -> Path:
        """Return the ledger of a range."""
        return self.work / f"{number:05d}.ledger"

    def folder(self, number: int) -> Path:
        """Return where the pictures of a range are put first."""
        return self.pictures if self.tars is None else self.pictures / f"{number:05d}"


class GuardedDownloader(img2dataset.downloader.Downloader):
    """The engine's downloader, one shard a call; an error of the disk ends the run instead of a row.

    Args:
        job: see `Job`.
        engine: the engine's own arguments.
    """

    def __init__(self, job: Job, **engine: Any) -> None:
        super().__init__(**engine)
        self.job = job
        self.resizer = CheckedResizer(self.resizer, job.resize)

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        """Download a shard; what is wrong with this machine is raised, so that the run ends."""
        _die_with_parent()
        self.download_shard(row)
        return True, row

    def download_shard(self, row: tuple[int, str]) -> None:
        """Download a shard."""
        number = self.job.ranges[row[0]]
        part = LedgerPart(self.job.part(number))
        at_work = self.job.part(number).with_suffix(".pid")  # a killed process cannot say so: its parent looks
        at_work.write_text(str(os.getpid()))
        try:
            writer = RowWriter(self.job, number, part)
            self.sample_writer_class = lambda *_: writer
            img2dataset.downloader.download_image_with_retry = _fetcher(self.job.policy, writer)  # type: ignore[assignment]
            super().download_shard(row)
            if writer.error is not None:
                raise writer.error
            if self.job.tars is not None:
                pack(self.job.folder(number), self.job.tars / f"{number:05d}.tar")
        finally:
            part.close()
            at_work.unlink()


def _fetcher(policy: FetchPolicy, writer: RowWriter) -> Callable[..., tuple[int, io.BytesIO | None, str | None]]:
    """Return what stands in for the engine's own fetching."""

    def fetch_row(row: tuple[int, str], **_: Any) -> tuple[int, io.BytesIO | None, str | None]:
        key, url = row
        if writer.error is not None:
            return key, None, STOPPED
        try:
            body, writer.tries[url] = fetch(url, policy)
            return key, io.BytesIO(body), None
        except FetchError as error:
            writer.tries[url] = error.tries
            return key, None, error.reason
        except Exception as error:  # raised here it would leave the engine waiting for ever
            writer.error = error
            return key, None, STOPPED

    return fetch_row


class CheckedResizer:
    """The engine's resizer behind the project's own decoder, so that what is kept can be trained on.

    Args:
        resizer: the engine's.
        resize: whether it changes sizes; else a good JPEG keeps its bytes.
    """

    def __init__(self, resizer: Any, resize: bool) -> None:
        self.resizer, self.resize = resizer, resize

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:
        """Return (bytes, width, height, original width, original height, reason)."""
        data = stream.getvalue()
        try:
            picture = decode_image(data)
        except ImageError as error:
            return None, None, None, None, None, error.reason
        if data[:3] == b"\xff\xd8\xff" and not self.resize:
            return data, picture.width, picture.height, picture.width, picture.height, None
        # upright, without alpha, 8 bits a colour: what OpenCV would make of such files differs
        plain = io.BytesIO()
        picture.save(plain, "BMP")
        return self.resizer(plain, boxes)


class RowWriter:
    """The engine's sample writer: a picture under its final name, whole or not at all, then its verdict.

    Args:
        job: see `Job`.
        number: of the range.
        part: its ledger.
    """

    def __init__(self, job: Job, number: int, part: LedgerPart) -> None:
        self.part, self.folder, self.packed = part, job.folder(number), job.tars is not None
        self.tries: dict[str, int] = {}
        self.error: Exception | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def write(self, picture: bytes | None, key: str, caption: Any, meta: dict[str, Any]) -> None:
        """Keep a picture and note the verdict for all rows of its URL."""
        reason, rows = meta["error_message"], meta["rows"]
        if reason == STOPPED or self.error is not None:
            return
        tries, sha256 = self.tries.pop(meta["url"], 0), meta.get("sha256") or ""
        try:
            if picture is None:
                self.part.add(line(row, reason, tries) for row in rows)
                return
            for row, text in zip(rows, meta["captions"], strict=True):
                self._keep(picture, row, rows[0])
                if self.packed:
                    size = [meta["original_width"], meta["original_height"]]
                    about = {"caption": text, "url": meta["url"], "sha256": sha256, "original_size": size}
                    write_whole(self.folder / f"{row:08d}.json", json.dumps(about, sort_keys=True).encode())
            self.part.add(line(row, OK, tries, len(picture), sha256) for row in rows)
        except OSError as error:  # a full disk: no verdict, and nothing more is fetched
            self.error = error

    def _keep(self, picture: bytes, row: int, first: int) -> None:
        path = self.folder / f"{row:08d}.jpg"
        if row != first:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # a file system without links
                path.hardlink_to(self.folder / f"{first:08d}.jpg")
                return
        write_whole(path, picture)

    def close(self) -> None:
        """Nothing is open."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears under its name only when it is whole."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@cache
def _die_with_parent() -> None:
    """End this process when the one that started it is gone: nobody would stop it otherwise."""
    parent = multiprocessing.parent_process()
    if parent is None:  # Spark looks after its own
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends us

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def pack(folder: Path, tar: Path) -> None:
    """Move pictures into a tar shard: members in the order of rows, as img2dataset names them.

    Args:
        folder: `{row:08d}.jpg` with `{row:08d}.json` beside; is gone at the end.
        tar: written anew with what it held; the same pictures give the same bytes.
    """
    keys = sorted(path.stem for path in folder.glob("*.json") if path.with_suffix(".jpg").is_file())
    if keys:
        tar.parent.mkdir(parents=True, exist_ok=True)
        part = tar.with_name(f".{tar.name}.{uuid.uuid4().hex[:12]}.part")
        try:
            with part.open("xb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as out:
                    for name, data in heapq.merge(_packed(tar, set(keys)), _loose(folder, keys), key=_member_order):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        out.addfile(info, io.BytesIO(data))
                file.flush()
                os.fsync(file.fileno())
            part.replace(tar)
        finally:
            part.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _member_order(member: tuple[str, bytes]) -> tuple[str, int]:
    key, _, ending = member[0].partition(".")
    return key, ("jpg", "txt", "json").index(ending)


def _packed(tar: Path, replaced: set[str]) -> Iterator[tuple[str, bytes]]:
    """Yield what a shard of ours holds already."""
    if not tar.is_file():
        return
    with tarfile.open(tar, "r:") as archive:
        for info in archive:
            archive.members = []  # type: ignore[attr-defined]  # they would add up
            data = archive.extractfile(info)
            if data is not None and info.name.partition(".")[0] not in replaced:
                yield info.name, data.read()


def _loose(folder: Path, keys: list[str]) -> Iterator[tuple[str, bytes]]:
    for key in keys:
        about = (folder / f"{key}.json").read_bytes()
        yield f"{key}.jpg", (folder / f"{key}.jpg").read_bytes()
        yield f"{key}.txt", json.loads(about)["caption"].encode()
        yield f"{key}.json", about
