"""A model over a data set: what it says, its loss, and the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from git_model import regression
from git_model.batch import CaptionBatch, Target
from git_model.config import Config
from git_model.datasets.collate import Collator
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset, eval_batches
from git_model.datasets.sources import Source
from git_model.metrics.caption import cider
from git_model.metrics.vqa import exact_accuracy
from git_model.models.git import GitModel
from git_model.models.language import Decoding
from git_model.training import SampleLedger, asking


@dataclass(frozen=True)
class Prediction:
    """What the model said to one prompt.

    Args:
        key: of the image.
        target: the question, or the captions' references in `answers`.
        text: the model's.
    """

    key: str
    target: Target
    text: str


def eval_data(config: Config, source: Source, resolution: int) -> ImageTextDataset:
    """Return a set for asking: every target, no augmentation."""
    transform = Transform(resolution, config.data.resize)
    return ImageTextDataset(source, transform, targets=0, cache=config.data.cache, regions=config.region.mode)


def predict(
    model: GitModel,
    batches: Iterable[CaptionBatch],
    decoding: Decoding,
    device: Any,
    ledger: SampleLedger | None = None,
) -> Iterator[Prediction]:
    """Yield what the model says to every prompt of the batches; `ledger` counts what was skipped."""
    for batch in batches:
        if ledger is not None:
            ledger.add(batch)
        texts = model.generate(batch.to(device), decoding)
        asked = [(key, target) for key, row in zip(batch.keys, batch.targets, strict=True) for target in row]
        for (key, target), text in zip(asked, texts, strict=True):
            yield Prediction(key, target, text)


def scores(predictions: Iterable[Prediction]) -> dict[str, float]:
    """Return `cider` over the captions (x1, not x100) and `accuracy` over the questions, where there are any."""
    captions: dict[str, str] = {}
    references: dict[str, tuple[str, ...]] = {}
    answers: list[str] = []
    accepted: list[tuple[str, ...]] = []
    for number, p in enumerate(predictions):  # by number: joined sources may use a key twice
        if p.target.question_id is None:
            captions[str(number)], references[str(number)] = p.text, p.target.answers
        elif p.target.answers:
            answers.append(p.text)
            accepted.append(p.target.answers)
    found: dict[str, float] = {}
    if captions:
        found["cider"] = cider(captions, references)
    if answers:
        found["accuracy"] = exact_accuracy(answers, accepted)
    return found


def overall(found: dict[str, float]) -> float:
    """Return what the best checkpoint is chosen by: CIDEr / 10 plus accuracy, or the cosine; else minus the loss."""
    if "mean_cosine" in found:
        return found["mean_cosine"]
    if "cider" in found or "accuracy" in found:
        return found.get("cider", 0.0) / 10 + found.get("accuracy", 0.0)
    return -found["val_loss"]


@torch.no_grad()
def mean_loss(model: GitModel, batches: Iterable[CaptionBatch], device: Any) -> float:
    """Return the loss per target token over batches with targets."""
    total, count = 0.0, 0
    for batch in batches:
        if batch.num_targets:
            total += float(model(batch.to(device))) * batch.num_targets
            count += batch.num_targets
    return total / count if count else float("nan")


class Stopped(Exception):
    """Asked to stop in the middle of a validation."""


def validate(
    model: Any,
    data: ImageTextDataset,
    config: Config,
    teach: Any,
    device: Any,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Return `val_loss` and scores on `train.validate_samples` images of `data`: of greedy answers, or of vectors.

    Args:
        model: unwrapped.
        data: see `eval_data`.
        config: the run's.
        teach: the collator of training.
        device: of the model.
        stop: asked before each batch.

    Raises:
        Stopped: `stop` said so.
    """
    was_training = model.training
    model.eval()
    limit, size = config.train.validate_samples, max(1, config.train.batch_size)

    def heed() -> None:
        if stop():
            raise Stopped

    def batches(collator: Collator) -> Iterator[CaptionBatch]:
        for batch in eval_batches(data, collator, batch_size=size, limit=limit):
            heed()
            yield batch

    try:
        if config.regressor.type != "none":
            return regression.validate(model, data, teach, config, device, heed)
        ask = asking(model)
        found = {"val_loss": mean_loss(model, batches(teach), device)}
        decoding = Decoding(max_new_tokens=config.data.max_text_tokens)
        return found | scores(predict(model, batches(ask), decoding, device))
    finally:
        model.train(was_training)
