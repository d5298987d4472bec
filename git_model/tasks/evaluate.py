"""Score a checkpoint on TSVs: captions by CIDEr, questions by accuracy, beside what a blind model would get."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.options import check_model_path
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from git_model.batch import CaptionBatch
    from git_model.datasets.sources import Source
    from git_model.validation import Prediction

log = logging.getLogger(__name__)


def evaluate(
    *,
    model_path: str,
    out_dir: str,
    image_tsv: str | None = None,
    caption_tsv: str | None = None,
    question_tsv: str | None = None,
    source: Literal["train", "val"] | None = None,
    data_dir: str = ".",
    batch_size: Annotated[int, Range(1, 4096)] = 32,
    beams: Annotated[int, Range(1, 64)] = 1,
    max_new_tokens: Annotated[int, Range(1, 1024)] = 40,
    limit: Annotated[int, Range(1, 10**9)] | None = None,
    max_bad: Annotated[float, Range(0, 1)] = 0.01,
    baselines: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Caption and answer a whole set, score it beside blank pictures, write report.html and scores.json.

    The set is an image TSV with captions and/or questions, or `source: val` / `source: train`: the recipe's own.
    `baselines` adds the CIDEr of the most frequent and of a random training caption.
    """
    check_model_path(model_path)
    if (image_tsv is None) == (source is None):
        raise UserError("evaluate needs either image_tsv (with caption_tsv and/or question_tsv) or source: val | train")
    if image_tsv is not None and caption_tsv is None and question_tsv is None:
        raise UserError("evaluate needs caption_tsv, question_tsv or both beside image_tsv")
    for name in filter(None, (image_tsv, caption_tsv, question_tsv)):
        if not (Path(data_dir) / name).is_file():
            raise UserError(f"no TSV file '{Path(data_dir) / name}'")
    from tqdm import tqdm

    from git_model.checkpoint import load_checkpoint
    from git_model.datasets.files import write_all
    from git_model.datasets.sources import build_source
    from git_model.models.language import Decoding
    from git_model.tasks.opening import pick_device
    from git_model.tasks.report import write_report
    from git_model.training import SampleLedger, asking
    from git_model.validation import eval_batches, eval_data, predict, scores

    where = pick_device(device)
    loaded = load_checkpoint(model_path, device=where)
    config, model = loaded.config, loaded.model
    entries = _entries(config, image_tsv, caption_tsv, question_tsv, source)
    records = build_source(entries, data_dir)
    data = eval_data(config, records, model.vision.resolution)
    decoding = Decoding(beams, max_new_tokens)
    ask = asking(model.to(where))

    ledger = SampleLedger(1.0)  # counts here; judged at the end, when the report is written

    def answers(blank: bool) -> list[Prediction]:
        batches: Iterable[CaptionBatch] = eval_batches(data, ask, batch_size=batch_size, limit=limit)
        count = -(-min(limit or len(data), len(data)) // batch_size)
        name = "blank pictures" if blank else "pictures"
        shown = tqdm(batches, total=count, desc=name, unit="batch")
        if blank:
            return list(predict(model, _blank(shown), decoding, where))
        return list(predict(model, shown, decoding, where, ledger))

    predictions, blind = answers(False), answers(True)
    if not predictions:
        raise UserError("none of the samples could be used")
    result: dict[str, Any] = {"model_path": model_path, "scores": scores(predictions), "blank_image": scores(blind)}
    result |= _ceiling(predictions) | {"samples": ledger.state()}
    if baselines:
        result["blind_captions"] = _baselines(build_source(config.data.train, data_dir), predictions, config.train.seed)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    result["report"] = str(write_report(out / "report.html", records, predictions, result))
    result["predictions"] = str(_write_predictions(out, predictions))
    write_all([(out / "scores.json", [json.dumps(result, indent=2).encode() + b"\n"])])
    if ledger.exceeds(max_bad):
        raise UserError(
            f"{ledger.bad} of {ledger.rows} samples are unusable, more than max_bad {max_bad}: {ledger.summary()}; "
            f"the scores of the others are in {out / 'scores.json'}",
            EXIT_TOO_MANY_BAD,
        )
    return result


def _entries(
    config: Any, image_tsv: str | None, caption_tsv: str | None, question_tsv: str | None, source: str | None
) -> list[dict[str, Any]]:
    """Return the data source the caller described."""
    if source is not None:
        return [dict(entry) for entry in getattr(config.data, source)]
    return [{"type": "tsv", "images": image_tsv, "captions": caption_tsv, "questions": question_tsv}]


def _blank(batches: Iterable[CaptionBatch]) -> Iterator[CaptionBatch]:
    """Yield the batches with mid-grey pictures: what the model says without looking."""
    from dataclasses import replace

    for batch in batches:
        yield replace(batch, images=batch.images * 0 + 127)


def _baselines(train: Source, predictions: list[Prediction], seed: int) -> dict[str, float]:
    """Return what captions score that were chosen without looking at the picture."""
    from contextlib import suppress

    from git_model.datasets.files import RecordError
    from git_model.metrics.caption import blind_baselines

    known: list[str] = []
    for index in range(len(train)):
        with suppress(RecordError):
            known += [t.text for t in train[index].targets if t.question_id is None]
    references = {p.key: p.target.answers for p in predictions if p.target.question_id is None}
    if not known or not references:
        raise UserError("baselines needs captions in the training set and in the set that is scored")
    return blind_baselines(known, references, seed)


def _ceiling(predictions: list[Prediction]) -> dict[str, float]:
    """Return the captions' own agreement: each reference scored against the others."""
    from git_model.metrics.caption import reference_ceiling

    references = {p.key: p.target.answers for p in predictions if p.target.question_id is None}
    several = {key: texts for key, texts in references.items() if len(texts) > 1}
    return {"references_cider": reference_ceiling(several)} if several else {}


def _write_predictions(out: Path, predictions: list[Prediction]) -> Path:
    """Write one JSON line per prompt; the file appears whole or not at all."""
    from git_model.datasets.files import write_all

    path = out / "predictions.jsonl"
    lines = (
        {"key": p.key, "question_id": p.target.question_id, "prompt": p.target.prompt, "text": p.text}
        for p in predictions
    )
    write_all([(path, (json.dumps(line, sort_keys=True).encode() + b"\n" for line in lines))])
    return path
