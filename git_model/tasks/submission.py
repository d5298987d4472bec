"""Predicted vectors of prompts: joined by name, weighted, scored, handed in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from git_model.errors import UserError
from git_model.tasks.prompt_inputs import ENCODER, check_there, read_texts

if TYPE_CHECKING:
    from git_model.datasets.vectors import Vectors

WEIGHTS = {"regressor": 0.7488, "interrogated": 0.2112, "caption": 0.04}  # of the published ensemble


def write_submission(
    *,
    vectors: str | dict[str, str],
    out: str,
    weights: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Write Kaggle's submission: the vectors of a file, or a weighted sum of several sources', joined by name.

    vectors: <name>.npy, or several: {regressor: a.npy, interrogated: b.npy, caption: c.npy}.
    out: submission.csv.
    weights: of the sources, such as {regressor: 0.7488, interrogated: 0.2112, caption: 0.04}, which is the default for
        sources of these three names; `fit_weights` finds others.
    """
    from git_model.datasets import vectors as files
    from git_model.datasets.files import refuse_overwriting

    refuse_overwriting(out, *named(vectors).values())
    if Path(out).suffix != ".csv":
        raise UserError(f"out is '{out}'; a submission ends in .csv")
    joined, used = joined_of(read_all(vectors), weights)
    files.write_submission(Path(out), joined)
    return {"out": out, "images": len(joined.ids), "dim": joined.values.shape[1], "weights": used}


def score_submission(
    *,
    submission: str,
    truth: str,
    baseline: str | None = None,
    subset: bool = False,
    text_encoder: str = ENCODER,
    outfile: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score a submission, or any file of vectors, by the competition's mean cosine; the order of lines does not matter.

    submission: .csv, or <name>.npy with its names.
    truth: prompts (CSV), which are encoded, or vectors (.npy, a submission).
    baseline, subset: see evaluate_on_prompt_similarity.
    """
    more: dict[str, Any] = {"text_encoder": text_encoder, "outfile": outfile, "device": device}
    return evaluate_on_prompt_similarity(vectors=submission, truth=truth, baseline=baseline, subset=subset, **more)


def evaluate_on_prompt_similarity(
    *,
    vectors: str | dict[str, str],
    truth: str,
    weights: dict[str, float] | None = None,
    bank: str | None = None,
    baseline: str | None = None,
    subset: bool = False,
    text_encoder: str = ENCODER,
    outfile: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score vectors of prompts: cosines with the right ones, and how often the right one is the nearest of a bank.

    vectors: <name>.npy or a submission (.csv); or several sources, each of which is scored, and their weighted sum.
    truth: prompts (CSV, TSV), which are encoded, or vectors (.npy, a submission); every name of it needs a vector.
    weights: of the sources; see write_submission. Without, sources of other names are scored each for itself.
    bank: more prompts, vectors, or a bank (make_prompt_bank) that R@1 chooses among, beside the right ones of all.
    baseline: vectors or prompts of the training set, whose mean is the guess that every score stands beside; default:
        the mean of the right ones, which only somebody who has seen the answers could guess.
    subset: score the names of truth alone, where there are vectors of more.
    outfile: JSON with the figures and, picture by picture, the cosine and whose prompt is the nearest.
    """
    from git_model.datasets.files import refuse_overwriting, write_all
    from git_model.metrics.similarity import similarity

    given = named(vectors).values()
    check_there(*given)
    for path in (truth, bank, baseline):
        if path is not None and not Path(path).exists():
            raise UserError(f"no file '{path}'")
    if outfile is not None:
        refuse_overwriting(outfile, truth, bank, baseline, *given)
        Path(outfile).parent.mkdir(parents=True, exist_ok=True)
    parts = read_all(vectors)
    alone = weights is None and len(parts) > 1 and parts.keys() != WEIGHTS.keys()
    if alone and outfile is not None:
        raise UserError("outfile needs weights of these sources: it tells of their sum")
    joined, used = joined_of(parts, dict.fromkeys(parts, 1.0) if alone else weights)
    right = vectors_of(truth, text_encoder, device)
    others = vectors_of(bank, text_encoder, device).values if bank else None
    guess = vectors_of(baseline, text_encoder, device).values if baseline else None
    shown = vectors if isinstance(vectors, str) else "the sources"

    def scored(given: Vectors, what: str) -> Any:
        if (extra := set(given.ids) - set(right.ids)) and not subset:
            told = f"{len(extra)} names that {truth} does not have, such as {min(extra)}"
            raise UserError(f"{what}: {told}; 'subset': true scores the others")
        return similarity(given.of(right.ids, what), right.values, others=others, guess=guess)

    for what, array in ((shown, joined.values), (bank, others), (baseline, guess)):
        if array is not None and array.shape[1] != right.values.shape[1]:
            raise UserError(f"{what} has {array.shape[1]} numbers a vector, {truth} {right.values.shape[1]}")
    if alone:
        return {"sources": {name: scored(part, name).figures() for name, part in parts.items()}}
    found = scored(joined, shown)
    told: dict[str, Any] = found.figures()
    if not isinstance(vectors, str):
        told |= {"weights": used, "sources": {name: scored(part, name).figures() for name, part in parts.items()}}
    if outfile is not None:
        names = [right.ids[row] if row < len(right.ids) else None for row in found.nearest.tolist()]
        listed = zip(right.ids, found.cosines.tolist(), names, strict=True)
        images = [{"key": key, "cosine": cosine, "nearest": name} for key, cosine, name in listed]
        write_all([(Path(outfile), [json.dumps({**told, "images": images}, indent=1).encode()])])
    return told


def fit_weights(
    *,
    vectors: dict[str, str],
    truth: str,
    train: str,
    text_encoder: str = ENCODER,
    device: str = "auto",
) -> dict[str, Any]:
    """Fit the weights of several sources on a training split: least squares to the right vectors of its names.

    vectors: {regressor: a.npy, interrogated: b.npy, ...}, with all names.
    truth: prompts (CSV) or vectors, of all names.
    train: CSV of prompts (as split_prompts writes) or file of vectors, whose names are the training split; the scores
        on it and on the names that are not in it are told apart. A source that was trained on these names is nearer
        there than anywhere else: fit on names that none of them has learnt.
    """
    check_there(train, *vectors.values())
    import numpy as np

    from git_model.datasets.prompt_files import read_prompts
    from git_model.datasets.vectors import read_vectors, weighted
    from git_model.metrics.similarity import mean_cosine, unit

    right = vectors_of(truth, text_encoder, device)
    names = read_prompts(Path(train)) if train.endswith(".csv") else read_vectors(Path(train)).ids
    known = set(right.ids)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{train}: {len(unknown)} names that {truth} does not have, such as {unknown[0]}")
    inside = sorted(names)
    outside = sorted(known - set(inside))
    sources = read_all(vectors)
    columns = [source.of(inside, name).astype(np.float64).ravel() for name, source in sources.items()]
    wanted = unit(right.of(inside, truth)).ravel()
    if any(column.shape != wanted.shape for column in columns):
        widths = {name: source.values.shape[1] for name, source in sources.items()}
        raise UserError(f"vectors of {widths} numbers for right ones of {right.values.shape[1]}")
    found = np.linalg.lstsq(np.stack(columns, axis=1), wanted, rcond=None)[0]
    weights = dict(zip(sources, found.tolist(), strict=True))
    joined = weighted(sources, weights)
    told: dict[str, Any] = {"weights": weights, "train": len(inside)}
    told["train_cosine"] = mean_cosine(joined.of(inside), right.of(inside))
    if outside:
        told |= {"held_out": len(outside), "held_out_cosine": mean_cosine(joined.of(outside), right.of(outside))}
    return told


def named(vectors: str | dict[str, str]) -> dict[str, str]:
    """Return files of vectors by their sources' names."""
    return {"vectors": vectors} if isinstance(vectors, str) else dict(vectors)


def read_all(vectors: str | dict[str, str]) -> dict[str, Vectors]:
    """Return the vectors of each source; raises UserError."""
    from git_model.datasets.vectors import read_vectors

    return {name: read_vectors(Path(path)) for name, path in named(vectors).items()}


def joined_of(parts: Mapping[str, Vectors], weights: dict[str, float] | None) -> tuple[Vectors, dict[str, float]]:
    """Return the weighted sum of sources, joined by name, and the weights; raises UserError."""
    from git_model.datasets.vectors import weighted

    used = default_weights(parts) if weights is None else weights
    return weighted(parts, used), used


def default_weights(sources: Mapping[str, Any]) -> dict[str, float]:
    """Return 1 for a single source, the published weights for the three of those names; else raises UserError."""
    if len(sources) == 1:
        return dict.fromkeys(sources, 1.0)
    if not sources:
        raise UserError("vectors names no source")
    if sources.keys() != WEIGHTS.keys():
        told = f"the published ones are for all of {', '.join(WEIGHTS)}; fit_weights finds others"
        raise UserError(f"weights are needed for {', '.join(sources)}: {told}")
    return dict(WEIGHTS)


def vectors_of(path: str, text_encoder: str, device: str = "auto") -> Vectors:
    """Return the vectors of a file, or of the prompts of a CSV or TSV, encoded now; raises UserError."""
    from git_model.datasets.vectors import HEADER, Vectors, read_vectors
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device

    if Path(path).is_dir():
        from git_model.datasets.neighbours import PromptBank

        bank = PromptBank(path)
        return Vectors(tuple(map(str, range(len(bank)))), bank.values(range(len(bank))))
    check_there(path)
    texts: dict[str, str] | None = read_texts(path) if path.endswith((".tsv", ".json", ".parquet")) else None
    if path.endswith(".csv"):
        try:
            with Path(path).open(encoding="utf-8-sig") as file:
                head = file.readline().strip()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read '{path}': {error}") from error
        if head != ",".join(HEADER):
            texts = read_texts(path)
    if texts is None:
        return read_vectors(Path(path))
    return Vectors(tuple(texts), SentenceEncoder(text_encoder, pick_device(device))(list(texts.values())))
