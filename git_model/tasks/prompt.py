"""Which prompt made a picture: vectors of prompts, their files, ensembles of them, their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.errors import UserError
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from git_model.datasets.vectors import Vectors

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def embed_prompt(
    *,
    prompts: str,
    out: str,
    suffix: str = "",
    text_encoder: str = ENCODER,
    batch_size: Annotated[int, Range(1, 65536)] = 64,
    device: str = "auto",
) -> dict[str, Any]:
    """Write the vectors of texts: a CSV of prompts (imgId or image, prompt) or captions (TSV, COCO's JSON) -> .npy.

    out: <name>.npy; the names go beside it into <name>.ids.txt.
    suffix: put behind every text, such as ', fine details, masterpiece'.
    text_encoder: sentence-transformers' id or folder.
    """
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.vectors import Vectors, write_vectors
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device

    refuse_overwriting(out, prompts)
    if Path(out).suffix != ".npy":
        raise UserError(f"out is '{out}'; files of vectors end in .npy")
    texts = read_texts(prompts)
    encoder = SentenceEncoder(text_encoder, pick_device(device))
    values = encoder([text + suffix for text in texts.values()], batch_size, progress=True)
    write_vectors(Path(out), Vectors(tuple(texts), values))
    return {"out": out, "count": len(texts), "dim": encoder.dim}


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
        sources of these three names.
    """
    from git_model.datasets import vectors as files
    from git_model.datasets.files import refuse_overwriting

    paths = {"vectors": vectors} if isinstance(vectors, str) else dict(vectors)
    refuse_overwriting(out, *paths.values())
    if Path(out).suffix != ".csv":
        raise UserError(f"out is '{out}'; a submission ends in .csv")
    if weights is None:
        weights = default_weights(paths)
    joined = files.weighted({name: files.read_vectors(Path(path)) for name, path in paths.items()}, weights)
    files.write_submission(Path(out), joined)
    return {"out": out, "images": len(joined.ids), "dim": joined.values.shape[1], "weights": weights}


WEIGHTS = {"regressor": 0.7488, "interrogated": 0.2112, "caption": 0.04}  # of the published ensemble


def default_weights(sources: dict[str, str]) -> dict[str, float]:
    """Return 1 for a single source, the published weights for the three of those names; else raises UserError."""
    if len(sources) == 1:
        return dict.fromkeys(sources, 1.0)
    if sources.keys() != WEIGHTS.keys():
        raise UserError(f"weights are needed for {', '.join(sources)}; those known are of {', '.join(WEIGHTS)}")
    return dict(WEIGHTS)


def score_submission(
    *,
    submission: str,
    truth: str,
    text_encoder: str = ENCODER,
    outfile: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Score a submission, or any file of vectors, by the competition's mean cosine; the order of lines does not matter.

    submission: .csv, or <name>.npy with its names.
    truth: prompts (CSV), which are encoded, or vectors (.npy, a submission).
    """
    from git_model.datasets.files import refuse_overwriting, write_all
    from git_model.datasets.vectors import read_vectors
    from git_model.metrics.similarity import similarity

    given, right = read_vectors(Path(submission)), truth_of(truth, text_encoder, device)
    if extra := set(given.ids) - set(right.ids):
        raise UserError(f"{submission}: {len(extra)} names that {truth} does not have, such as {min(extra)}")
    predicted = given.of(right.ids, submission)
    if predicted.shape != right.values.shape:
        raise UserError(f"{submission} has {predicted.shape[1]} numbers a vector, {truth} {right.values.shape[1]}")
    found: dict[str, Any] = similarity(predicted, right.values).figures()
    if outfile is not None:
        refuse_overwriting(outfile, submission, truth)
        write_all([(Path(outfile), [json.dumps(found, indent=1).encode()])])
    return found


def read_texts(path: str) -> dict[str, str]:
    """Return texts by name: prompts of a CSV, captions of a TSV or COCO's JSON; raises UserError."""
    from git_model.datasets.annotations import read_results
    from git_model.datasets.vectors import picture_name, read_prompts

    if path.endswith(".csv"):
        return read_prompts(Path(path))
    return {picture_name(str(key)): text for key, text in read_results(path).items()}


def truth_of(path: str, text_encoder: str, device: str = "auto") -> Vectors:
    """Return the right vectors: those of a file, or of a CSV's prompts, encoded now; raises UserError."""
    from git_model.datasets.vectors import HEADER, Vectors, read_vectors
    from git_model.models.text import SentenceEncoder
    from git_model.tasks.opening import pick_device

    if path.endswith(".csv"):
        try:
            with Path(path).open(encoding="utf-8-sig") as file:
                head = file.readline().strip()
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read '{path}': {error}") from error
        if head != ",".join(HEADER):
            texts = read_texts(path)
            return Vectors(tuple(texts), SentenceEncoder(text_encoder, pick_device(device))(list(texts.values())))
    return read_vectors(Path(path))
