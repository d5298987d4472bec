"""What is there already: verdicts and pictures of earlier runs, of a killed one, of another downloader."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from git_model.datasets.files import write_all
from git_model.download.ledger import OK, Ledger, LedgerPart
from git_model.download.network import FetchPolicy
from git_model.download.plan import Plan
from git_model.errors import UserError

log = logging.getLogger(__name__)

TRANSIENT = re.compile(r"http_(408|425|429|5\d\d)|timeout|refused|unreachable|truncated|disconnected|protocol|dns|tls")


@dataclass(frozen=True, kw_only=True)
class DownloadOptions:
    """What download.py can be told; see its `--help`."""

    data_root: str
    url_list: str | None = None
    caption_col: str = "0"
    url_col: str = "1"
    splits: tuple[str, ...] = ("val", "train")
    output_format: Literal["files", "webdataset"] = "files"
    image_size: int = 0
    resize_mode: Literal["keep_ratio", "center_crop", "border", "keep_ratio_largest"] = "keep_ratio"
    quality: int = 95
    processes: int = 2
    threads: int = 64
    samples_per_shard: int = 10_000
    retry_failed: str | None = None
    dedup: Literal["url", "sha256"] = "url"
    deny: str | None = None
    max_failed: float = 1.0
    distributor: Literal["multiprocessing", "pyspark"] = "multiprocessing"
    spark_master: str | None = None
    policy: FetchPolicy = field(default_factory=FetchPolicy)


class Place:
    """Where one list's pictures and verdicts are.

    Args:
        name: of the folder of its pictures.
        root: where that folder and `{name}.ledger.tsv` go.
        options: see `DownloadOptions`.
    """

    def __init__(self, name: str, root: Path, options: DownloadOptions) -> None:
        self.name, self.options, self.out = name, options, root / name
        self.work, self.final = root / ".download" / name, root / f"{name}.ledger.tsv"
        self.packed = options.output_format == "webdataset"
        self.pictures = self.work / "pictures" if self.packed else self.out

    def bind(self, tsv: Path) -> None:
        """Hold the verdicts that are there against the list and the options they were found with.

        Raises:
            UserError: the list was changed, or pictures of another kind were asked for.
        """
        options, about = self.options, self.final.with_suffix(".json")
        with tsv.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        now = {"list": digest, "output_format": options.output_format, "image_size": options.image_size}
        now |= {"resize_mode": options.resize_mode, "samples_per_shard": options.samples_per_shard}
        if about.is_file():
            before = json.loads(about.read_text())
            if changed := [f"{k} was {before.get(k)}, is {v}" for k, v in now.items() if before.get(k) != v]:
                told = f"{self.final} and {self.out} belong to another download ({'; '.join(changed)})"
                raise UserError(f"{told}: give another --data_root, or move them and {about.name} away")
        write_all([(about, [json.dumps(now, indent=1).encode() + b"\n"])])

    def known(self, plan: Plan) -> Ledger:
        """Return what earlier runs found, less what is asked for again or is not there any more."""
        ledger = Ledger(len(plan))
        ledger.read(self.final)
        self.merge(ledger)
        for row, reason in plan.refused.items():
            ledger.set(row, reason)
            if not self.packed:  # of a run before the row was refused: the trainer would read it
                (self.out / f"{row:08d}.jpg").unlink(missing_ok=True)
        if self.options.retry_failed is not None:
            ledger.clear(self._asked_again(ledger))
        if not self.packed:
            sizes = self._files(len(plan))
            there = sizes > 0
            ok = ledger.status == ledger.numbers[OK]
            there &= ~ok | (ledger.size == sizes)  # an empty file after a power loss is none
            if gone := int((ok & ~there).sum()):
                log.warning("%s: %d pictures of the ledger are gone and will be fetched again", self.name, gone)
                ledger.clear(ok & ~there)
            self._adopt(ledger, np.flatnonzero(there & (ledger.status == 0)))
        else:
            self._known_packed(plan, ledger)
        return ledger

    def _known_packed(self, plan: Plan, ledger: Ledger) -> None:
        """Take over what a killed run fetched and did not pack; forget what a lost shard held."""
        for part in self.out.glob(".*.part"):
            part.unlink()
        loose: set[int] = set()
        for path in self.pictures.glob("*/*"):
            told = path.with_suffix(".json")
            if path.suffix != ".jpg" or not told.is_file():
                if path.suffix != ".json" or not path.with_suffix(".jpg").is_file():
                    path.unlink()
                continue
            size, _ = adopt_picture(path)
            row = int(path.stem)
            if size and row < len(plan) and row not in plan.refused:
                ledger.set(row, OK, 0, size, str(json.loads(told.read_text())["sha256"]))
                loose.add(row)
            else:
                path.unlink()
        ok = np.flatnonzero(ledger.status == ledger.numbers[OK])
        ranges = plan.first[ok] // self.options.samples_per_shard
        gone = [n for n in np.unique(ranges).tolist() if not (self.out / f"{n:05d}.tar").is_file()]
        lost = ok[np.isin(ranges, gone) & ~np.isin(ok, list(loose))]
        if len(lost):
            log.warning("%s: %d pictures of lost shards will be fetched again", self.name, len(lost))
            ledger.clear(lost)

    def merge(self, ledger: Ledger) -> None:
        """Take over the verdicts of parts that no run has put into the ledger yet."""
        for path in sorted(self.work.glob("*.ledger")):
            LedgerPart(path).close()  # waits for a process of a killed run that is not quite gone
            ledger.read(path)

    def _asked_again(self, ledger: Ledger) -> np.ndarray:
        names = {name.strip() for name in str(self.options.retry_failed).split(",")}
        failed = [word for word in ledger.words[1:] if word != OK]
        again = {w for w in failed if w in names or "all" in names or ("transient" in names and TRANSIENT.fullmatch(w))}
        return np.isin(ledger.status, [ledger.numbers[word] for word in again])

    def _files(self, rows: int) -> np.ndarray:
        """Return the size of each row's picture, 0 where there is none; remove what a kill left half-written."""
        sizes = np.zeros(rows, np.int64)
        if not self.out.is_dir():
            return sizes
        with os.scandir(self.out) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(".part"):
                    os.unlink(entry.path)
                elif re.fullmatch(r"\d{8,}\.jpg", entry.name) and int(entry.name[:-4]) < rows:
                    sizes[int(entry.name[:-4])] = entry.stat().st_size
        return sizes

    def _adopt(self, ledger: Ledger, rows: np.ndarray) -> None:
        """Take over pictures without a verdict: those of a killed run, or of another downloader."""
        if not len(rows):
            return
        with multiprocessing.get_context("spawn").Pool(self.options.processes) as pool:
            paths = [self.out / f"{row:08d}.jpg" for row in rows]
            found = pool.imap(adopt_picture, paths, chunksize=16)
            for row, (size, sha256) in zip(rows, tqdm(found, f"{self.name}: there already", len(rows)), strict=True):
                if sha256:
                    ledger.set(int(row), OK, 0, size, "" if self.options.image_size else sha256)


def adopt_picture(path: Path) -> tuple[int, str]:
    """Return bytes and SHA-256 of a picture, or (0, '') where it cannot be decoded."""
    import hashlib

    from git_model.datasets.images import ImageError, decode_image

    data = path.read_bytes()
    try:
        decode_image(data)
    except ImageError:
        return 0, ""
    return len(data), hashlib.sha256(data).hexdigest()


def check_reasons(wanted: str, ledgers: Iterable[Path]) -> None:
    """Hold the reasons of --retry_failed against those that rows failed for.

    Raises:
        UserError: one that no ledger has.
    """
    names = {name.strip() for name in wanted.split(",")} - {"transient", "all"}
    if not names:
        return
    found = {line.split(b"\t")[1].decode() for path in ledgers if path.is_file() for line in path.open("rb")}
    found -= {"status", OK}
    if unknown := names - found:
        told = f"one of: transient, all, {', '.join(sorted(found))}"
        raise UserError(f"--retry_failed '{', '.join(sorted(unknown))}': no row failed for that; {told}")
