"""Caption metrics: BLEU, METEOR, ROUGE-L, CIDEr (and SPICE where its models are) on PTB tokens.

The scorers are pycocoevalcap's own classes, called one by one: its `COCOEvalCap.evaluate()` builds
SPICE first and so fails without network before any figure is out, and its tokenizer writes into its
own package folder, which a container keeps read-only.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from git_model.errors import UserError, one_of
from git_model.metrics.ptb import cached_ptb_tokenize

# An image's id, text or number. (Not `str | int`: a dict[int, str] is no Mapping[str | int, str].)
Key = Any
# Tokenised texts by position: {0: ["a dog runs"]}; the shape the scorers take.
Tokens = dict[int, list[str]]
# By name: the corpus figure and one figure an image, as floats of whatever kind the scorers return.
Figures = dict[str, tuple[Any, Any]]

DEFAULT_METRICS = ("Bleu", "ROUGE_L", "CIDEr")
# The jar prints and reads numbers in the machine's language: "0,5" under German.
_JAVA_ENGLISH = {"LC_ALL": "C.UTF-8", "JAVA_TOOL_OPTIONS": "-Duser.language=en -Duser.region=US"}


@dataclass(frozen=True)
class CaptionScores:
    """Caption metrics of a set of images.

    Args:
        overall: figure by name: Bleu_1..4, METEOR, ROUGE_L, CIDEr, SPICE.
        per_image: the same for every image, under the references' keys.
        tokenizer: ``java`` (the official tokens) or ``python``.
        not_computed: metric -> why it could not be computed.
    """

    overall: dict[str, float]
    per_image: dict[Key, dict[str, float]]
    tokenizer: str
    not_computed: dict[str, str] = field(default_factory=dict)


class _NotComputed(Exception):
    """Says why a metric cannot be computed here."""


def caption_scores(
    predictions: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    metrics: Sequence[str] = DEFAULT_METRICS,
    engine: str = "auto",
    cache: Path | None = None,
) -> CaptionScores:
    """Score one caption per image against its reference captions.

    Args:
        predictions: image -> caption; the ids ``5`` and ``"5"`` name the same image.
        references: image -> reference captions, at least one.
        metrics: names out of `METRICS`.
        engine: tokenizer, see `ptb_tokenize`.
        cache: folder that keeps the references' tokens between calls; where it cannot be written, nothing is kept.

    Raises:
        UserError: unknown metric, images on one side only, nothing to score, no reference words.
    """
    for name in metrics:
        if name not in METRICS:
            raise one_of("caption metric", name, METRICS)
    keys, said, wanted = _aligned(predictions, references)
    wanted_tokens, used = _tokenised(wanted, engine, cache)
    said_tokens, _ = _tokenised([[text] for text in said], used)
    _check_words(wanted_tokens)
    overall: dict[str, float] = {}
    per_image: dict[Key, dict[str, float]] = {key: {} for key in keys}
    not_computed: dict[str, str] = {}
    for name in dict.fromkeys(metrics):
        try:
            figures = METRICS[name](wanted_tokens, said_tokens)
        except _NotComputed as reason:
            not_computed[name] = str(reason)
            continue
        for figure, (whole, parts) in figures.items():
            overall[figure] = float(whole)
            for key, part in zip(keys, parts, strict=True):
                per_image[key][figure] = float(part)
    return CaptionScores(overall, per_image, used, not_computed)


def cider(predictions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> float:
    """Return CIDEr on the Python tokenizer's tokens: quick, the same on every machine, no Java.

    One image alone always scores 0: a word that is in every image's references has no weight.
    """
    return caption_scores(predictions, references, ("CIDEr",), engine="python").overall["CIDEr"]


def reference_ceiling(references: Mapping[Key, Sequence[str]]) -> float:
    """Return how well people agree: CIDEr of each reference caption against the others of its image.

    The j-th captions of all images are scored as if they were a model's, against the remaining ones
    (which also give the document frequencies); the result is the mean over j.

    Raises:
        UserError: an image with fewer than two references, or none at all.
    """
    if not references:
        raise UserError("no images to score")
    single = [key for key, texts in references.items() if len(texts) < 2]
    if single:
        raise UserError(
            f"agreement needs two references or more per image; {len(single)} of {len(references)} images "
            f"have fewer (e.g. {single[:3]})"
        )
    tokens, _ = _tokenised([list(texts) for texts in references.values()], "python")
    _check_words(tokens)
    scores = []
    for j in range(min(len(texts) for texts in tokens.values())):
        others = {i: texts[:j] + texts[j + 1 :] for i, texts in tokens.items()}
        if any(any(texts) for texts in others.values()):
            scores.append(_cider(others, {i: [texts[j]] for i, texts in tokens.items()})["CIDEr"][0])
    return float(sum(scores) / len(scores))


def blind_baselines(
    train_captions: Sequence[str], references: Mapping[Key, Sequence[str]], seed: int = 0
) -> dict[str, float]:
    """Return the CIDEr of two answers that never look at the image.

    Args:
        train_captions: the captions of the training set.
        references: image -> reference captions.
        seed: of the random choice, which depends on the keys and not on their order.

    Returns:
        ``most_frequent``: the commonest training caption for every image (the first one on a tie);
        ``random``: a training caption drawn for each image.
    """
    if not train_captions:
        raise UserError("blind baselines need at least one training caption")
    commonest = Counter(text.strip() for text in train_captions).most_common(1)[0][0]
    rng = random.Random(seed)
    drawn = {key: rng.choice(train_captions) for key in sorted(references, key=str)}
    return {
        "most_frequent": cider(dict.fromkeys(references, commonest), references),
        "random": cider(drawn, references),
    }


def _aligned(
    predictions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]
) -> tuple[list[Key], list[str], list[list[str]]]:
    """Return the references' keys, the captions and the references in one order."""
    for what, mapping in (("predictions", predictions), ("references", references)):
        repeated = [key for key, times in Counter(map(str, mapping)).items() if times > 1]
        if repeated:
            raise UserError(f"{what} name {len(repeated)} images twice, as text and number (e.g. {repeated[:3]})")
    said = {str(key): text for key, text in predictions.items()}
    without_caption = [key for key in references if str(key) not in said]
    known = {str(key) for key in references}
    without_reference = [key for key in predictions if str(key) not in known]
    if without_caption or without_reference:
        raise UserError(
            f"predictions and references are not of the same images: {len(without_caption)} of "
            f"{len(references)} referenced images lack a prediction (e.g. {without_caption[:3]}), "
            f"{len(without_reference)} of {len(predictions)} predictions lack references "
            f"(e.g. {without_reference[:3]})"
        )
    if not references:
        raise UserError("no images to score")
    bare = [key for key, texts in references.items() if not texts]
    if bare:
        raise UserError(f"{len(bare)} images have an empty list of references (e.g. {bare[:3]})")
    keys = list(references)
    return keys, [said[str(key)] for key in keys], [list(references[key]) for key in keys]


def _tokenised(groups: Sequence[Sequence[str]], engine: str, cache: Path | None = None) -> tuple[Tokens, str]:
    """Tokenise groups of texts in one go; return them by position, and the engine used."""
    flat, used = cached_ptb_tokenize([text for group in groups for text in group], engine, cache)
    texts = iter(flat)
    return {place: [next(texts) for _ in group] for place, group in enumerate(groups)}, used


def _check_words(tokens: Tokens) -> None:
    """Refuse references without a single word, on which the scorers fail in obscure ways."""
    if not any(any(texts) for texts in tokens.values()):
        raise UserError("the reference captions hold no words")


def _bleu(wanted: Tokens, said: Tokens) -> Figures:
    from pycocoevalcap.bleu.bleu import Bleu

    whole, parts = Bleu(4).compute_score(wanted, said, verbose=0)
    return {f"Bleu_{n}": (whole[n - 1], parts[n - 1]) for n in (1, 2, 3, 4)}


def _rouge(wanted: Tokens, said: Tokens) -> Figures:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"ROUGE_L": Rouge().compute_score(wanted, said)}


def _cider(wanted: Tokens, said: Tokens) -> Figures:
    from pycocoevalcap.cider.cider import Cider

    return {"CIDEr": Cider().compute_score(wanted, said)}


def _meteor(wanted: Tokens, said: Tokens) -> Figures:
    _need_java()
    from pycocoevalcap.meteor.meteor import Meteor

    with _environment(_JAVA_ENGLISH):
        scorer = Meteor()
    process = scorer.meteor_p
    try:
        return {"METEOR": scorer.compute_score(wanted, said)}
    except (OSError, ValueError) as error:
        raise _NotComputed(f"METEOR's Java program failed: {error}") from error
    finally:
        if scorer.lock.locked():  # left so by a failure; its destructor would wait for ever
            scorer.lock.release()
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _spice(wanted: Tokens, said: Tokens) -> Figures:
    import pycocoevalcap.spice as package

    # Building Spice() without these would download 400 MB.
    models = Path(package.__path__[0]) / "lib" / "stanford-corenlp-3.6.0-models.jar"
    if not (models.is_file() and models.with_name("stanford-corenlp-3.6.0.jar").is_file()):
        raise _NotComputed("SPICE needs the Stanford CoreNLP 3.6.0 models, which are not installed")
    _need_java()
    from pycocoevalcap.spice.spice import Spice

    try:
        with _environment(_JAVA_ENGLISH):
            whole, parts = Spice().compute_score(wanted, said)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _NotComputed(f"SPICE's Java program failed: {error}") from error
    return {"SPICE": (whole, [part["All"]["f"] for part in parts])}


def _need_java() -> None:
    if not shutil.which("java"):
        raise _NotComputed("no Java runtime on PATH")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for children started inside, then put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


METRICS: dict[str, Callable[[Tokens, Tokens], Figures]] = {
    "Bleu": _bleu,
    "METEOR": _meteor,
    "ROUGE_L": _rouge,
    "CIDEr": _cider,
    "SPICE": _spice,
}
