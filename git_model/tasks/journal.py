"""What a batch run has done so far, on disk: killed at any moment, the next run goes on from here.

Rank r of n appends its finished rows to `{out_tsv}.{r}.{n}.journal`. When its block is complete it writes
`{out_tsv}.{r}.{n}.tsv` and, last, `{out_tsv}.{r}.{n}.json` with its counts. Rank 0 waits for all of these, joins them
in order into `out_tsv`, and removes them. Everything carries the job's identity: what another model, file or
setting left behind is not continued, but started anew. Part p of an array job's n is rank p of n that nobody waits
for: `gather` joins the parts when all are through.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from git_model.datasets.files import write_all
from git_model.datasets.records import TSVFile, write_tsv
from git_model.errors import UserError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
TELL_SECONDS = 60
EXAMPLES = 3  # of each reason, in a report


@dataclass(frozen=True, slots=True)
class Done:
    """A finished row.

    Args:
        cells: of the output: a caption row's two columns, or one record for each question.
        error: "" or the reason it could not be answered.
        detail: of the error.
    """

    cells: tuple[str, ...]
    error: str = ""
    detail: str = ""


def block(total: int, rank: int, world: int) -> range:
    """Return the rows of a rank: blocks of ceil(total / world), as GIT cuts them."""
    size = -(-total // world)
    return range(min(rank * size, total), min((rank + 1) * size, total))


def rank_file(out_tsv: Path, rank: int, world: int, suffix: str) -> Path:
    """Return the name of a rank's file beside `out_tsv`."""
    return out_tsv.with_name(f"{out_tsv.name}.{rank}.{world}.{suffix}")


class Journal:
    """The rows of one rank; appending is the only change, and a torn end is cut off when it is read.

    Args:
        out_tsv: the final name.
        job: the identity of model, inputs and settings.
        rank: of this process.
        world: number of processes.
        total: rows of the input.
    """

    def __init__(self, out_tsv: Path, job: str, rank: int, world: int, total: int) -> None:
        self.path, self.job = rank_file(out_tsv, rank, world, "journal"), job
        self.rows = block(total, rank, world)
        found: dict[int, Done] = {}
        for path in _ranks_files(out_tsv, "journal"):  # a run with another number of ranks has other names
            found |= _read(path, job)
        self.done = {row: done for row, done in found.items() if row in self.rows}
        lines = (_line(row, done) for row, done in sorted(self.done.items()))
        write_all([(self.path, [_head(job), *lines])])  # anew: a torn or foreign end is gone
        if self.left():  # the counts there are another job's: nobody may take them for this one's
            rank_file(out_tsv, rank, world, "json").unlink(missing_ok=True)
        self.file = self.path.open("ab")

    def left(self) -> list[int]:
        """Return the rows still to be answered, in order."""
        return [row for row in self.rows if row not in self.done]

    def add(self, rows: dict[int, Done]) -> None:
        """Append finished rows and make them last."""
        self.file.write(b"".join(_line(row, done) for row, done in sorted(rows.items())))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done |= rows

    def close(self) -> None:
        """Close the file; it stays."""
        self.file.close()


def _head(job: str) -> bytes:
    return json.dumps({"job": job}).encode() + b"\n"


def _line(row: int, done: Done) -> bytes:
    return json.dumps([row, done.cells, done.error, done.detail]).encode() + b"\n"


def _read(path: Path, job: str) -> dict[int, Done]:
    """Return the finished rows of a journal of this job; nothing of any other."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    lines = data[: data.rfind(b"\n") + 1].splitlines()  # without a line torn by a kill
    found: dict[int, Done] = {}
    try:
        if json.loads(lines[0])["job"] != job:
            return {}
        for line in lines[1:]:
            row, cells, error, detail = json.loads(line)
            found[int(row)] = Done(tuple(cells), error, detail)
    except (IndexError, KeyError, TypeError, ValueError) as error:  # no journal of ours beyond this line
        log.warning("%s is damaged after %d rows (%s): the others are answered again", path, len(found), error)
    return found


def _ranks_files(out_tsv: Path, suffixes: str) -> Iterator[Path]:
    pattern = re.compile(re.escape(out_tsv.name) + rf"\.\d+\.\d+\.({suffixes})")
    return (path for path in sorted(out_tsv.parent.iterdir()) if pattern.fullmatch(path.name))


def finish_rank(out_tsv: Path, journal: Journal, rank: int, world: int, columns: int) -> dict[str, Any]:
    """Write a rank's TSV and then its counts; return the counts.

    Args:
        out_tsv: the final name.
        journal: complete.
        rank: of this process.
        world: number of processes.
        columns: of the output; a row of captions has 2, a row of answers 1 for each question.
    """
    failed = [done for _, done in sorted(journal.done.items()) if done.error]
    examples = _first_of_each([{"reason": done.error, "detail": done.detail} for done in failed])
    reasons = dict(Counter(done.error for done in failed))
    write_tsv(rank_file(out_tsv, rank, world, "tsv"), _output(journal, columns))
    report = {"job": journal.job, "rows": len(journal.rows), "reasons": reasons, "examples": examples}
    write_all([(rank_file(out_tsv, rank, world, "json"), [json.dumps(report).encode()])])
    return report


def _first_of_each(examples: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Return the first few examples of each reason, in their order: the same for any number of ranks."""
    seen: Counter[str] = Counter()
    kept = []
    for example in examples:
        seen[example["reason"]] += 1
        if seen[example["reason"]] <= EXAMPLES:
            kept.append(example)
    return kept


def _output(journal: Journal, columns: int) -> Iterator[Sequence[str]]:
    for row in journal.rows:
        cells = journal.done[row].cells
        for start in range(0, len(cells), columns):
            yield cells[start : start + columns]


def merge(out_tsv: Path, job: str, world: int, started: float) -> dict[str, Any]:
    """Wait for every rank and join their TSVs into `out_tsv`; return the counts.

    Raises:
        UserError: a rank that began with this run did another job.
    """
    files = [rank_file(out_tsv, rank, world, "json") for rank in range(world)]
    return _joined(out_tsv, [_wait(path, job, rank, started) for rank, path in enumerate(files)])


def gather(out_tsv: Path, parts: int) -> dict[str, Any]:
    """Join the TSVs of an array job's parts into `out_tsv`, without waiting; return the counts and the job.

    Raises:
        UserError: a part that is not through, or one of another job than the first; nothing is written.
    """
    reports: list[dict[str, Any]] = []
    missing: list[int] = []
    for part in range(parts):
        try:
            if not rank_file(out_tsv, part, parts, "tsv").is_file():
                raise FileNotFoundError
            reports.append(json.loads(rank_file(out_tsv, part, parts, "json").read_bytes()))
        except FileNotFoundError:
            missing.append(part)
    if missing:
        named = f"part{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:20]))}"
        raise UserError(f"{named} of {parts} of '{out_tsv}' not through yet: start what is missing, then merge")
    for part, report in enumerate(reports):
        if report["job"] != reports[0]["job"]:
            raise UserError(
                f"part {part} of '{out_tsv}' was done with another model, file or setting than part 0: "
                "start the one again that is wrong"
            )
    return {"job": reports[0]["job"], **_joined(out_tsv, reports)}


def jobs(out_tsv: Path) -> set[str]:
    """Return the identities of the jobs whose journals or counts lie beside `out_tsv`."""
    found: set[str] = set()
    for path in _ranks_files(out_tsv, "journal|json"):
        try:
            with path.open("rb") as file:
                found.add(json.loads(file.readline())["job"])
        except (OSError, ValueError, KeyError, TypeError):  # torn or gone: nobody's
            continue
    return found


def _joined(out_tsv: Path, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the output of all ranks, in order, and return the sums of their counts."""
    world = len(reports)
    parts = [TSVFile(rank_file(out_tsv, rank, world, "tsv")) for rank in range(world)]
    report_path(out_tsv).unlink(missing_ok=True)  # never an old report beside a new output
    write_tsv(out_tsv, (row for part in parts for row in part))
    total = sum((Counter(report["reasons"]) for report in reports), Counter[str]())
    rows, bad = sum(report["rows"] for report in reports), total.total()
    examples = _first_of_each(example for report in reports for example in report["examples"])
    return {"rows": rows, "ok": rows - bad, "reasons": dict(sorted(total.items())), "examples": examples}


def report_path(out_tsv: Path) -> Path:
    """Return the name of the run's report."""
    return out_tsv.with_suffix(".run_report.json")


def write_report(out_tsv: Path, report: dict[str, Any]) -> None:
    """Write the run's report."""
    write_all([(report_path(out_tsv), [json.dumps(report, indent=2).encode() + b"\n"])])


def clean(out_tsv: Path) -> None:
    """Remove the ranks' files of this and of earlier runs; `out_tsv` and its report are in place."""
    torn = [path for path in out_tsv.parent.glob(".*.part") if path.name.startswith(f".{out_tsv.name}.")]  # by a kill
    for path in [*_ranks_files(out_tsv, r"journal|json|tsv|lineidx|lineidx\.8b"), *torn]:
        path.unlink(missing_ok=True)


def _wait(path: Path, job: str, rank: int, started: float) -> dict[str, Any]:
    """Return a rank's counts as soon as they are there; a rank that dies takes this one with it (torchrun)."""
    told = time.monotonic()
    while True:
        try:
            report = json.loads(path.read_bytes())
            if report["job"] == job:
                return report
            if path.stat().st_mtime > started:
                raise UserError(f"rank {rank} did another job: was the model or a file replaced meanwhile? Start again")
        except FileNotFoundError:
            pass
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            log.info("waiting for rank %d: %s", rank, path)
        time.sleep(POLL_SECONDS)
