"""A download from the list to the report: plan, engine, verdicts; killed at any moment, the same command goes on."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.sources import ConceptualCaptions
from git_model.download.console import SilentLogger, progress
from git_model.download.known import DownloadOptions, Place, check_reasons
from git_model.download.ledger import OK, Ledger
from git_model.download.network import FetchPolicy
from git_model.download.plan import Plan, plain_list, read_denied
from git_model.errors import EXIT_BUG, UserError
from git_model.lock import folder_lock

log = logging.getLogger(__name__)


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
    if options.retry_failed is not None:
        check_reasons(options.retry_failed, [root / f"{name}.ledger.tsv" for name in lists])
    with folder_lock(root / ".download", "download"):
        if options.url_list is None and "train" in options.splits:
            validation = root / ConceptualCaptions.FILES["val"]
            if validation.is_file():  # also where only the training set is fetched
                held_out = Plan(validation).digests()
        for name, tsv in lists.items():
            if options.url_list is not None and tsv != Path(options.url_list):
                plain_list(Path(options.url_list), tsv, options.caption_col, options.url_col)
            split = Split(name, root, options)
            split.bind(tsv)
            plan = Plan(tsv, denied, held_out if name == "train" else frozenset())
            ledger = split.run(plan)
            report[name] = {"rows": len(plan), **_counts(ledger), "tries": int(ledger.tries.sum(dtype=np.int64))}
    return report


def _lists(root: Path, options: DownloadOptions) -> dict[str, Path]:
    """Return the TSVs by name: validation first, since the training set must not hold any of it."""
    if options.url_list is not None:
        path = Path(options.url_list)
        if not path.is_file():
            raise UserError(f"no list '{path}'")
        name = re.sub(r"\.(tsv|csv)(\.gz)?$", "", path.name)
        plain = path.suffix == ".tsv" and (options.caption_col, options.url_col) == ("0", "1")
        return {name: path if plain else root / f"{name}.captions.tsv"}
    files = {name: root / ConceptualCaptions.FILES[name] for name in ("val", "train") if name in options.splits}
    if missing := [path for path in files.values() if not path.is_file()]:
        names = ", ".join(ConceptualCaptions.FILES.values())
        raise UserError(f"no file '{missing[0]}'; --data_root must hold {names} (or give --splits, or --url_list)")
    return files


def _counts(ledger: Ledger) -> dict[str, Any]:
    counts = ledger.counts()
    return {"ok": counts.pop(OK, 0), "reasons": counts}


class Split(Place):
    """One list on its way to disk."""

    killed = False

    def run(self, plan: Plan) -> Ledger:
        """Fetch what has no verdict yet, and write the ledger."""
        ledger = self.known(plan)
        ranges = self._write_work(plan, ledger)
        waiting = int((ledger.status == 0).sum())
        if ranges:
            with progress(self.name, self.work, len(plan), len(plan) - waiting, self._find_killed):
                self._engine(ranges, replace(self.options.policy, denied=plan.denied))
            self.merge(ledger)
        if self.packed:
            self._pack_leftovers()
        if lost := int((ledger.status == 0).sum()):
            raise UserError(f"{lost} rows of {self.name} have no verdict; {self.work}/engine.log tells why", EXIT_BUG)
        if self.options.dedup == "sha256":
            self._link_equal(ledger)
        ledger.write(self.final)
        shutil.rmtree(self.work)
        return ledger

    def _find_killed(self) -> None:
        """End the wait for a process that was killed: the engine's pool would go on waiting for its work."""
        if self.options.distributor != "multiprocessing" or self.killed:
            return
        for path in self.work.glob("*.pid"):
            try:
                os.kill(int(path.read_text() or 0) or os.getpid(), 0)
            except ProcessLookupError:
                if path.exists():
                    self.killed = True
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # it waits in a lock
            except (FileNotFoundError, ValueError):
                continue

    def _write_work(self, plan: Plan, ledger: Ledger) -> tuple[int, ...]:
        """Write the engine's input, a file for each range; return the ranges."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        shutil.rmtree(self.work / "list", ignore_errors=True)
        shutil.rmtree(self.work / "engine", ignore_errors=True)
        for left in self.work.glob("*.pid"):  # of a killed run
            left.unlink()
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

    def _engine(self, ranges: tuple[int, ...], policy: FetchPolicy) -> None:
        from git_model.download.engine import GuardedDownloader, Job

        engine: Any = import_module("img2dataset.main")  # the package hides it behind a function of that name

        options = self.options
        tars = self.out if self.packed else None
        job = Job(self.work, self.pictures, tars, ranges, policy, bool(options.image_size))
        engine.Downloader = partial(GuardedDownloader, job)
        engine.LoggerProcess = SilentLogger
        if options.distributor == "pyspark":
            _start_spark(options)
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
            if self.killed:
                told = "a process of the download was killed (out of memory? fewer --threads hold fewer pictures)"
                raise UserError(f"{told}; what is done is kept, start the same command again", EXIT_BUG) from stop
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


def _start_spark(options: DownloadOptions) -> None:
    """Start the session that the engine then finds: spark-submit's, the named master's, or one on this machine."""
    from pyspark import SparkConf  # type: ignore[missing-import]
    from pyspark.sql import SparkSession  # type: ignore[missing-import]

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark would start whatever python3 is on the PATH
    master = options.spark_master or SparkConf().get("spark.master", f"local[{options.processes}]")
    SparkSession.builder.appName("download").master(str(master)).getOrCreate()
