"""A download from the list to the report: plan, engine, verdicts; killed at any moment, the same command goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from git_model.datasets.sources import ConceptualCaptions
from git_model.download.console import SilentLogger, progress
from git_model.download.ledger import OK, Ledger, LedgerPart
from git_model.download.network import FetchPolicy
from git_model.download.plan import Plan, plain_list, read_denied
from git_model.errors import EXIT_BUG, UserError
from git_model.lock import folder_lock

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
    policy: FetchPolicy = field(default_factory=FetchPolicy)


def download(options: DownloadOptions) -> dict[str, dict[str, Any]]:
    """Download every list asked for and return the counts of each: rows = ok + sum(reasons).

    Raises:
        UserError: bad options, another download in the same folder, rows left without a verdict.
    """
    root = Path(options.data_root)
    if options.dedup == "sha256" and options.output_format != "files":
        raise UserError("--dedup sha256 links files to each other; it goes with --output_format files only")
    if options.distributor == "pyspark" and find_spec("pyspark") is None:
        raise UserError("--distributor pyspark needs the package pyspark: pip install pyspark (and Java)")
    lists = _lists(root, options)
    denied = read_denied(options.deny)
    report: dict[str, dict[str, Any]] = {}
    held_out: frozenset[bytes] = frozenset()
    with folder_lock(root / ".download", "download"):
        for name, tsv in lists.items():
            if not tsv.is_file():
                plain_list(Path(str(options.url_list)), tsv, options.caption_col, options.url_col)
            plan = Plan(tsv, denied, held_out)
            ledger = Split(name, root, options).run(plan)
            report[name] = {"rows": len(plan), **_counts(ledger), "tries": int(ledger.tries.sum(dtype=np.int64))}
            if name == "val":
                held_out = plan.digests()
    return report


def _lists(root: Path, options: DownloadOptions) -> dict[str, Path]:
    """Return the TSVs by name: validation first, since the training set must not hold any of it."""
    if options.url_list is not None:
        path = Path(options.url_list)
        if not path.is_file():
            raise UserError(f"no list '{path}'")
        name = path.name.split(".")[0]
        plain = path.suffix == ".tsv" and (options.caption_col, options.url_col) == ("0", "1")
        return {name: path if plain else root / f"{name}.tsv"}
    files = {name: root / ConceptualCaptions.FILES[name] for name in ("val", "train") if name in options.splits}
    if missing := [path for path in files.values() if not path.is_file()]:
        names = ", ".join(ConceptualCaptions.FILES.values())
        raise UserError(f"no file '{missing[0]}'; --data_root must hold {names} (or give --splits, or --url_list)")
    return files


def _counts(ledger: Ledger) -> dict[str, Any]:
    counts = ledger.counts()
    return {"ok": counts.pop(OK, 0), "reasons": counts}


class Split:
    """One list on its way to disk.

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

    def run(self, plan: Plan) -> Ledger:
        """Fetch what has no verdict yet, and write the ledger."""
        ledger = self._known(plan)
        ranges = self._write_work(plan, ledger)
        waiting = int((ledger.status == 0).sum())
        if ranges:
            with progress(self.name, self.work, len(plan), len(plan) - waiting):
                self._engine(ranges)
            self._merge(ledger)
        if self.packed:
            self._pack_leftovers()
        if lost := int((ledger.status == 0).sum()):
            raise UserError(f"{lost} rows of {self.name} have no verdict; {self.work}/engine.log tells why", EXIT_BUG)
        if self.options.dedup == "sha256":
            self._link_equal(ledger)
        ledger.write(self.final)
        shutil.rmtree(self.work)
        return ledger

    def _known(self, plan: Plan) -> Ledger:
        """Return what earlier runs found, less what is asked for again or is not there any more."""
        ledger = Ledger(len(plan))
        ledger.read(self.final)
        self._merge(ledger)
        for row, reason in plan.refused.items():
            ledger.set(row, reason)
        if self.options.retry_failed is not None:
            ledger.clear(self._asked_again(ledger))
        if not self.packed:
            there = self._files(len(plan))
            ok = ledger.status == ledger.numbers[OK]
            if gone := int((ok & ~there).sum()):
                log.warning("%s: %d pictures of the ledger are gone and will be fetched again", self.name, gone)
                ledger.clear(ok & ~there)
            self._adopt(ledger, np.flatnonzero(there & (ledger.status == 0)))
        return ledger

    def _merge(self, ledger: Ledger) -> None:
        for path in sorted(self.work.glob("*.ledger")):
            LedgerPart(path).close()  # waits for a process of a killed run that is not quite gone
            ledger.read(path)

    def _asked_again(self, ledger: Ledger) -> np.ndarray:
        wanted = str(self.options.retry_failed)
        names = {name.strip() for name in wanted.split(",")}
        failed = [word for word in ledger.words[1:] if word != OK]
        if unknown := names - {"transient", "all", *failed}:
            raise UserError(
                f"--retry_failed '{', '.join(sorted(unknown))}' is no reason of {self.final}; "
                f"one of: transient, all, {', '.join(failed)}"
            )
        again = {w for w in failed if w in names or "all" in names or ("transient" in names and TRANSIENT.fullmatch(w))}
        return np.isin(ledger.status, [ledger.numbers[word] for word in again])

    def _files(self, rows: int) -> np.ndarray:
        """Return which rows have a picture; remove what a kill left half-written."""
        there = np.zeros(rows, bool)
        if not self.out.is_dir():
            return there
        with os.scandir(self.out) as entries:
            for entry in entries:
                if entry.name.startswith(".") and entry.name.endswith(".part"):
                    os.unlink(entry.path)
                elif re.fullmatch(r"\d{8,}\.jpg", entry.name) and int(entry.name[:-4]) < rows:
                    there[int(entry.name[:-4])] = True
        return there

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

    def _write_work(self, plan: Plan, ledger: Ledger) -> tuple[int, ...]:
        """Write the engine's input, a file for each range; return the ranges."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        shutil.rmtree(self.work / "list", ignore_errors=True)
        shutil.rmtree(self.work / "engine", ignore_errors=True)
        (self.work / "list").mkdir(parents=True)
        schema = pa.schema(
            {"url": pa.string(), "rows": pa.list_(pa.int64()), "captions": pa.list_(pa.string())}  # type: ignore[arg-type]
        )
        ranges = []
        for number, entries in plan.work(ledger, self.options.samples_per_shard):
            urls, rows, captions = zip(*entries, strict=True)
            table = pa.table({"url": urls, "rows": rows, "captions": captions}, schema=schema)
            pq.write_table(table, self.work / "list" / f"{number:05d}.parquet")
            ranges.append(number)
        return tuple(ranges)

    def _engine(self, ranges: tuple[int, ...]) -> None:
        from git_model.download.engine import GuardedDownloader, Job

        engine: Any = import_module("img2dataset.main")  # the package hides it behind a function of that name

        options = self.options
        tars = self.out if self.packed else None
        job = Job(self.work, self.pictures, tars, ranges, options.policy, bool(options.image_size))
        engine.Downloader = partial(GuardedDownloader, job)
        engine.LoggerProcess = SilentLogger
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark would start whatever python3 is on the PATH
        ctrl_c = signal.getsignal(signal.SIGINT)
        try:
            engine.download(
                url_list=str(self.work / "list"),
                input_format="parquet",
                output_folder=str(self.work / "engine"),
                output_format="dummy",  # the guarded downloader brings its own writer
                save_additional_columns=["rows", "captions"],
                image_size=options.image_size or 256,
                resize_mode=options.resize_mode if options.image_size else "no",
                resize_only_if_bigger=True,
                encode_quality=options.quality,
                processes_count=options.processes,
                thread_count=options.threads,
                number_sample_per_shard=options.samples_per_shard,
                extract_exif=False,
                compute_hash="sha256",
                distributor=options.distributor,
                subjob_size=max(1, options.processes) * 4,
                max_shard_retry=0,
            )
        except SystemExit as stop:  # the engine's own answer to Ctrl-C
            raise KeyboardInterrupt from stop
        finally:
            signal.signal(signal.SIGINT, ctrl_c)

    def _pack_leftovers(self) -> None:
        """Pack what a killed run had fetched and not packed."""
        from git_model.download.engine import pack

        for folder in sorted(self.pictures.glob("*")):
            pack(folder, self.out / f"{folder.name}.tar")

    def _link_equal(self, ledger: Ledger) -> None:
        """Make one file of pictures with equal bytes."""
        known = np.flatnonzero((ledger.status == ledger.numbers[OK]) & ledger.sha256.any(1))
        digests = np.ascontiguousarray(ledger.sha256[known]).view("V32").ravel()
        first: dict[bytes, Path] = {}
        for row, digest in zip(known.tolist(), digests, strict=True):
            path = self.out / f"{row:08d}.jpg"
            kept = first.setdefault(digest.tobytes(), path)
            if kept is not path and not path.samefile(kept):
                link = path.with_name(f".{path.name}.link.part")
                link.unlink(missing_ok=True)
                link.hardlink_to(kept)
                link.replace(path)


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
