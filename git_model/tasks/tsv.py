"""The batch task: every row of an image TSV captioned, or every question about it answered."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.cluster import rank_and_world
from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.options import BatchOptions, ModelOptions, SearchOptions
from git_model.tasks.values import Range

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from git_model.datasets.asking import AskRow, AskRows
    from git_model.models.language import Decoding
    from git_model.tasks.captioner import GitCaptioner, PublishedCaptioner
    from git_model.tasks.journal import Done, Journal

    Answer = Callable[[list[AskRow]], dict[int, Done]]


def caption_tsv(
    *,
    image_tsv: str,
    out_tsv: str,
    question_tsv: str | None = None,
    prompt: str = "",
    model: ModelOptions,
    search: SearchOptions,
    share: BatchOptions,
    batch_size: Annotated[int, Range(1, 65536)] = 32,
) -> dict[str, Any] | None:
    """Caption an image TSV, or answer its question TSV; killed, it goes on; torchrun or parts share it."""
    from git_model.datasets.asking import AskRows
    from git_model.datasets.files import refuse_overwriting
    from git_model.tasks.opening import job_of

    check_files(out_tsv, image_tsv, question_tsv)
    model.check()
    refuse_overwriting(out_tsv, image_tsv, question_tsv, model.model_path, search.answer_list)
    answers = search.answers()
    files = [model.model_path, image_tsv, question_tsv]
    job = job_of(files, prompt, answers, asdict(search), asdict(replace(model, device="")))

    def start() -> tuple[AskRows, Answer, int]:
        captioner = model.open()
        how = search.decoding_of(captioner, bool(question_tsv or prompt))
        rows = AskRows(Path(image_tsv), Path(question_tsv) if question_tsv else None, captioner.prepare, prompt)
        asked = rows.questions is not None
        held = captioner.batches * batch_size
        return rows, lambda chunk: _answered(captioner, chunk, how, batch_size, asked=asked), held

    return batch_run(out_tsv, job, start, share, columns=1 if question_tsv else 2)


def check_files(out_tsv: str, *inputs: str | None) -> None:
    """Say at once what is wrong with the names of a batch task's files.

    Raises:
        UserError: an output that is no .tsv, an input that is not there.
    """
    if Path(out_tsv).suffix != ".tsv":
        raise UserError(f"out_tsv is '{out_tsv}'; its name must end in .tsv")
    for path in filter(None, inputs):
        if not Path(path).is_file():
            raise UserError(f"no TSV file '{path}'")


def batch_run(
    out_tsv: str,
    job: str,
    start: Callable[[], tuple[AskRows, Answer, int]],
    share: BatchOptions,
    *,
    columns: int,
) -> dict[str, Any] | None:
    """Answer the rows of a TSV that no run before has answered, on as many processes as there are; join, report, judge.

    Args:
        out_tsv: what is written.
        job: the identity of model, inputs and settings.
        start: loads the model; returns the rows, what answers some of them, and how many are held at a time.
        share: which rows are this process's, how many processes decode pictures, how many rows may fail.
        columns: of the output; a row of captions has 2, a row of answers 1 for each question.

    Returns:
        the report; None where another process gives it.

    Raises:
        UserError: too many rows failed (exit code 3; the output is there), or the GPU's memory is full.
    """
    from git_model.tasks import journal

    out, (rank, world), started = Path(out_tsv), share.place(), time.time()
    if finished := _finished(out, job):
        return _judged(finished, share.max_bad) if share.parts or rank == 0 else None
    if rank == 0 and out.exists():
        log.warning("%s holds another job's texts; they are replaced when this one is through", out)
    rows, answer, held = start()
    out.parent.mkdir(parents=True, exist_ok=True)
    done = journal.Journal(out, job, rank, world, len(rows))
    _answer_all(rows, answer, done, held, share.workers)
    counts = journal.finish_rank(out, done, rank, world, columns)
    if share.parts:  # merge_tsv_parts joins and judges
        return {"out_tsv": out_tsv, "part": rank, "parts": world, **counts}
    if rank > 0:
        if _finished(out, job):  # rank 0 had this rank's part from a run before, and is through
            journal.clean(out)
        return None
    return _closed(out_tsv, {"job": job, **journal.merge(out, job, world, started)}, share.max_bad)


def merge_tsv_parts(
    *,
    out_tsv: str,
    parts: Annotated[int, Range(1, 65536)],
    max_bad: Annotated[float, Range(0, 1)] = 0.01,
) -> dict[str, Any]:
    """Join the parts of test_git_inference_single_tsv into what one process would have written."""
    from git_model.tasks import journal

    out = Path(out_tsv)
    if not out.parent.is_dir():
        raise UserError(f"no folder '{out.parent}' with parts of '{out_tsv}'")
    finished = _finished(out)
    if finished and journal.jobs(out) <= {finished["job"]}:  # merged before, and perhaps killed while cleaning up
        journal.clean(out)
        return _judged(finished, max_bad)
    return _closed(out_tsv, journal.gather(out, parts), max_bad)


def _closed(out_tsv: str, counts: dict[str, Any], max_bad: float) -> dict[str, Any]:
    """Write the report of a whole output, remove what it was joined from, judge."""
    from git_model.tasks import journal

    out, report = Path(out_tsv), {"out_tsv": out_tsv, **counts}
    journal.write_report(out, report)
    journal.clean(out)
    return _judged(report, max_bad)


def _answer_all(rows: AskRows, answer: Answer, done: Journal, size: int, workers: int) -> None:
    """Answer the rows that the journal lacks, and note them there some at a time."""
    import torch
    from tqdm import tqdm

    left, total = done.left(), len(done.rows)
    quiet = rank_and_world()[0] > 0
    with tqdm(total=total, initial=total - len(left), unit="image", smoothing=0.1, disable=quiet) as bar:
        for chunk in chunks(rows, left, workers, size):
            try:
                done.add(answer(chunk))
            except torch.OutOfMemoryError as error:
                told = "the GPU's memory is full: lower batch_size; what is done so far is kept"
                raise UserError(told) from error
            bar.update(len(chunk))
    done.close()


def chunks(rows: Any, left: Sequence[int], workers: int, size: int) -> Iterator[list[AskRow]]:
    """Yield the rows that are left, decoded by worker processes, some at a time."""
    from torch.utils.data import DataLoader

    loader = DataLoader(rows, batch_size=None, sampler=left, num_workers=workers, collate_fn=_as_it_is)  # type: ignore[arg-type]
    stream = map(_own, loader)
    while chunk := list(islice(stream, size)):
        yield chunk


def _own(row: AskRow) -> AskRow:
    """Copy a picture out of the worker's shared memory: thousands waiting there would use up the open files."""
    import torch

    return replace(row, picture=row.picture.clone()) if isinstance(row.picture, torch.Tensor) else row


def _as_it_is(row: AskRow) -> AskRow:
    return row


def _answered(
    captioner: GitCaptioner | PublishedCaptioner,
    chunk: list[AskRow],
    decoding: Decoding,
    batch_size: int,
    asked: bool,
) -> dict[int, Done]:
    """Return the output of some rows: pictures encoded once, prompts in batches of like length, or by picture."""
    good = [row for row in chunk if not row.error]
    encoded: dict[int, Any] = {}
    for start in range(0, len(good), batch_size):
        part = good[start : start + batch_size]
        encoded |= zip((row.row for row in part), captioner.encode([row.picture for row in part]), strict=True)
    texts: dict[tuple[int, int], str] = {}
    refused: dict[tuple[int, int], str] = {}
    waiting: list[tuple[int, int, int, str]] = []  # length, row, number of the question, prompt
    for row in good:
        for number, question in enumerate(row.questions):
            try:
                waiting.append((captioner.length(question.prompt, decoding.longest), row.row, number, question.prompt))
            except UserError as error:
                refused[row.row, number] = str(error)
    if captioner.shares:  # a picture's prompts stay together, pictures with as many and as long ones, too
        size = Counter(row for _, row, _, _ in waiting)
        longest = {row: length for length, row, _, _ in sorted(waiting)}
        waiting.sort(key=lambda w: (size[w[1]], longest[w[1]], *w[1:]))
    else:
        waiting.sort()
    for start in range(0, len(waiting), batch_size):
        part = waiting[start : start + batch_size]
        said = captioner.answer([encoded[row] for _, row, _, _ in part], [prompt for *_, prompt in part], decoding)
        texts |= {(row, number): text for (_, row, number, _), text in zip(part, said, strict=True)}
    return {row.row: _done(row, texts, refused, asked) for row in chunk}


def _done(row: AskRow, texts: dict[tuple[int, int], str], refused: dict[tuple[int, int], str], asked: bool) -> Done:
    """Return a row's output: an error record where there is no text."""
    from git_model.datasets.records import json_cell
    from git_model.tasks.journal import Done

    records = []
    error, detail = row.error, row.detail
    for number, question in enumerate(row.questions):
        place = (row.row, number)
        record: dict[str, Any] = {"answer" if asked else "caption": texts.get(place, "")}
        if asked:
            record["question_id"] = question.question_id
        if place in refused:
            error, detail = "bad_prompt", f"key '{row.key}': {refused[place]}"
        if place not in texts:
            record["error"] = row.error or "bad_prompt"
        records.append(record)
    if asked:
        return Done(tuple(json_cell(record) for record in records), error, detail)
    return Done((row.key, json_cell(records)), error, detail)


def _finished(out: Path, job: str | None = None) -> dict[str, Any] | None:
    """Return the report of this very job (None: of any) where its output is already there."""
    from git_model.tasks.journal import report_path

    try:
        report = json.loads(report_path(out).read_bytes())
        return report if out.is_file() and report["job"] == (job or report["job"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _judged(report: dict[str, Any], max_bad: float) -> dict[str, Any]:
    from git_model.tasks.journal import report_path

    bad = report["rows"] - report["ok"]
    if bad > max_bad * report["rows"]:
        reasons = ", ".join(f"{reason} x{count}" for reason, count in report["reasons"].items())
        first = f" (such as: {report['examples'][0]['detail']})" if report["examples"] else ""
        raise UserError(
            f"{bad} of {report['rows']} rows could not be answered, more than max_bad {max_bad}: {reasons}{first}; "
            f"{report['out_tsv']} holds all rows, {report_path(Path(report['out_tsv']))} tells more",
            EXIT_TOO_MANY_BAD,
        )
    return report
