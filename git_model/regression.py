"""What training a regressor needs beside the loop: the vectors to learn, a validation, predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from git_model.batch import RegressionBatch
from git_model.cluster import rank_and_world
from git_model.config import Config
from git_model.datasets.collate_vectors import TextVectors, VectorCollator
from git_model.datasets.features import chosen
from git_model.datasets.files import RecordError
from git_model.datasets.kept import cache_folder, kept, version_of
from git_model.datasets.loader import ImageTextDataset, eval_batches
from git_model.datasets.sources import Joined, Source
from git_model.datasets.vector_source import VectorSource
from git_model.errors import UserError
from git_model.metrics.similarity import similarity
from git_model.models.regressor import EnsembleRegressor, PromptRegressor


def completed(config: Config, source: Source, val_source: Source) -> Config:
    """Return the config with what an ensemble's data say: names and widths of its sources, numbers of a vector.

    Raises:
        UserError: data that are none of this kind of model, or that differ from the config or from each other.
    """
    options = config.regressor
    every = [*_parts(source), *_parts(val_source)]
    ensembles = [part for part in every if isinstance(part, VectorSource)]
    if options.type != "ensemble":
        if ensembles:
            raise UserError("data of type 'vectors' are for --regressor ensemble: they hold no pictures")
        return config
    if len(ensembles) < len(every):
        raise UserError("--regressor ensemble reads data of type 'vectors', which hold features of several sources")
    widths = ensembles[0].widths
    for part in ensembles[1:]:
        if list(part.widths.items()) != list(widths.items()):
            raise UserError(f"sources differ: {widths} and {part.widths}")
    if options.sources and list(options.sources.items()) != list(widths.items()):
        raise UserError(f"regressor.sources is {dict(options.sources)}, the data has {widths}")
    for part in ensembles:
        if part.dim is not None and part.dim != options.dim:
            raise UserError(f"regressor.dim is {options.dim}, the vectors to learn have {part.dim} numbers")
    return replace(config, regressor=replace(options, sources=widths))


def _parts(source: Source) -> list[Source]:
    return list(source.sources) if isinstance(source, Joined) else [source]


def text_vectors(config: Config, sources: Iterable[Source], device: torch.device) -> TextVectors | None:
    """Return the vectors that a regressor learns: of every text of some sources, from this user's cache or made now.

    Returns:
        None for a model that writes text, and where there is none: samples that bring their vectors themselves.

    Raises:
        UserError: no such encoder, or vectors of another width than `regressor.dim`.
    """
    if config.regressor.type == "none":
        return None
    sources = list(sources)
    for part in (part for source in sources for part in _parts(source)):
        _check_targets(part)
    texts = list(dict.fromkeys(chain.from_iterable(source.texts() for source in sources)))
    if not texts:
        return None
    from git_model.models.text import SentenceEncoder

    encoder = SentenceEncoder(config.regressor.text_encoder, str(device))
    if encoder.dim != config.regressor.dim:
        told = f"regressor.dim is {config.regressor.dim}, {encoder.name} gives {encoder.dim} numbers"
        raise UserError(f"{told}: --set regressor.dim={encoder.dim}")
    made_of = [encoder.name, version_of(encoder.name, encoder.config), *texts]
    first = rank_and_world()[0] == 0
    values = kept(cache_folder() / "texts", made_of, len(texts), lambda: encoder(texts, progress=first))
    return TextVectors({text: row for row, text in enumerate(texts)}, values)


def _check_targets(source: Source, looked_at: int = 64) -> None:
    """Raise UserError where what is said is no prompt of a whole picture: answers to questions, texts of boxes."""
    for record in chosen(len(source), looked_at):
        try:
            said = source.said(record)
        except RecordError:
            continue
        if any(target.prompt or target.regions for target in said.targets):
            told = "a regressor learns what is said of a whole picture; leave questions and regions out of its data"
            raise UserError(f"'{said.key}' has questions or boxes: {told}")


def predicted(
    model: PromptRegressor | EnsembleRegressor, batches: Iterable[RegressionBatch], device: Any
) -> Iterator[tuple[RegressionBatch, Tensor]]:
    """Yield each batch that is not empty with the unit vectors (I,F) of what is in it."""
    with torch.no_grad():
        for batch in batches:
            if not batch.keys:
                continue
            there = batch.to(device)
            if isinstance(model, EnsembleRegressor):
                yield batch, model.vectors(there.inputs, there.missing).cpu()
            else:
                yield batch, model.vectors(there.images).cpu()


def validate(
    model: PromptRegressor | EnsembleRegressor,
    data: ImageTextDataset,
    collator: VectorCollator,
    config: Config,
    device: Any,
    stop: Callable[[], None],
) -> dict[str, float]:
    """Return `val_loss` and how near the vectors come, beside what guessing the mean vector gives.

    Args:
        model: unwrapped; in evaluation mode.
        data: at most `train.validate_samples` records of it are looked at.
        collator: as in training.
        config: the run's.
        device: of the model.
        stop: called before each batch; may raise.
    """

    def batches() -> Iterator[RegressionBatch]:
        limit, size = config.train.validate_samples, config.train.batch_size
        for batch in eval_batches(data, collator, batch_size=size, limit=limit):
            stop()
            yield batch

    found, right = [], []
    for batch, vectors in predicted(model, batches(), device):
        found.append(vectors[batch.which].numpy())
        right.append(batch.wanted.numpy())
    if not found:
        return {"val_loss": float("nan")}
    told = similarity(np.concatenate(found), np.concatenate(right)).figures()
    told.pop("count")
    return {"val_loss": 1 - told["mean_cosine"], **told}
