"""VQA accuracy: the official answer normalisation and scoring, in the three variants in use.

Reference: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py. Its oddities are part
of the published figures, so they are kept; the comments name them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from git_model.errors import UserError, one_of

VARIANTS = ("head", "pre2021", "always")
_MATCHES_FOR_FULL_SCORE = 3

# In the official order: marks are removed one after the other.
_MARKS = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The official pattern means "a stop between digits stays", but its look-behind is mistyped as a
# look-ahead that always holds: what it does is drop every stop that no digit follows.
_STOP = re.compile(r"\.(?!\d)")
_MAX_STOPS = int(re.UNICODE)  # passed in the place of `count`: at most this many stops go

_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())  # noqa: SIM905
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

# Contractions that are recognised when ONE apostrophe is missing ("dont", "couldnt've"). The official
# table also has keys with capitals, which cannot match a lower-cased word, and no "its", "lets", "shed",
# "shell", "well", "were", "wed" or "id", which are words of their own.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
    y'all'd've you'd you'd've you'll you're you've
"""


def _spellings() -> dict[str, str]:
    """Return {contraction with one apostrophe missing: contraction}."""
    table = {"somebody'd": "somebodyd"}  # the official table has this pair the wrong way round
    for word in _CONTRACTIONS.split():
        for place, char in enumerate(word):
            if char == "'":
                table[word[:place] + word[place + 1 :]] = word
    return table


_SPELLINGS = _spellings()


@dataclass(frozen=True)
class VqaScores:
    """VQA accuracy in percent.

    Args:
        overall: mean over questions, two decimals as the official code rounds.
        per_answer_type: the same for "yes/no", "number", "other".
        per_question_type: the same for "how many", "what color"...
        per_question: question id -> accuracy, not rounded.
        variant: which of `VARIANTS` was computed.
    """

    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]
    per_question: dict[int, float]
    variant: str


def normalise_answer(text: str) -> str:
    """Return an answer as the official scoring compares it: marks, articles, number words, contractions."""
    return _words(_strip_marks(_strip_space(text)))


def vqa_accuracy(
    predictions: Mapping[int, str], annotations: Sequence[Mapping[str, Any]], variant: str = "head"
) -> VqaScores:
    """Score answers against ten human answers a question: 100 % where three others said the same.

    Args:
        predictions: question id -> answer; ids may be ints or their text.
        annotations: VQA annotations: ``question_id``, ``answers`` (list of ``{"answer": str, ...}``),
            and optionally ``answer_type``, ``question_type``.
        variant: ``head`` (the official repository: both sides normalised where the human answers
            differ), ``pre2021`` (the commit before, still in LAVIS: the prediction always normalised,
            human answers only stripped of marks), ``always`` (both sides always; lmms-eval).

    Raises:
        UserError: unknown variant, no questions, or predictions and questions that do not match.
    """
    if variant not in VARIANTS:
        raise one_of("VQA variant", variant, VARIANTS)
    answered = _by_id(predictions, annotations)
    score = _VARIANTS[variant]
    accuracies: dict[int, float] = {}
    answer_types: dict[str, list[float]] = defaultdict(list)
    question_types: dict[str, list[float]] = defaultdict(list)
    for annotation in annotations:
        key = annotation["question_id"]
        answers = _human_answers(annotation)
        accuracy = score(answered[str(key)], answers)
        accuracies[key] = accuracy
        answer_types[annotation.get("answer_type", "other")].append(accuracy)
        question_types[annotation.get("question_type", "all")].append(accuracy)
    return VqaScores(
        overall=_percent(list(accuracies.values())),
        per_answer_type={name: _percent(values) for name, values in answer_types.items()},
        per_question_type={name: _percent(values) for name, values in question_types.items()},
        per_question={key: 100 * accuracy for key, accuracy in accuracies.items()},
        variant=variant,
    )


def exact_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Return the fraction of answers that equal any accepted one once both are normalised.

    Args:
        predictions: one answer a question.
        answers: the accepted answers of each question, in the same order.

    Raises:
        UserError: the lengths differ, nothing to score, or a question without accepted answers.
    """
    if len(predictions) != len(answers):
        raise UserError(f"{len(predictions)} predictions for {len(answers)} questions")
    if not predictions:
        raise UserError("no answers to score")
    empty = [row for row, accepted in enumerate(answers) if not accepted]
    if empty:
        raise UserError(f"{len(empty)} questions have no accepted answer, the first in row {empty[0]}")
    right = sum(
        normalise_answer(said) in map(normalise_answer, accepted)
        for said, accepted in zip(predictions, answers, strict=True)
    )
    return right / len(predictions)


def _by_id(predictions: Mapping[int, str], annotations: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the predictions by the text of their id; every question must have one, and no other."""
    answered = {str(key): text for key, text in predictions.items()}
    wanted = [str(annotation["question_id"]) for annotation in annotations]
    if not wanted:
        raise UserError("no questions to score")
    if len(set(wanted)) != len(wanted):
        raise UserError(f"the annotations repeat {len(wanted) - len(set(wanted))} question ids")
    missing = [key for key in wanted if key not in answered]
    extra = sorted(answered.keys() - set(wanted))
    if missing or extra:
        raise UserError(
            f"predictions do not match the questions: {len(missing)} of {len(wanted)} without a prediction "
            f"(e.g. {missing[:3]}), {len(extra)} predictions for unknown questions (e.g. {extra[:3]})"
        )
    return answered


def _human_answers(annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return copies of a question's human answers."""
    answers = annotation.get("answers")
    if not answers or any("answer" not in answer for answer in answers):
        raise UserError(
            f"question {annotation['question_id']}: 'answers' must be a list of {{'answer': text}}, got {answers!r:.80}"
        )
    return [dict(answer) for answer in answers]


def _head(said: str, answers: list[dict[str, Any]]) -> float:
    """Score one question as the official repository does."""
    said = _strip_space(said)
    for answer in answers:
        answer["answer"] = _strip_space(answer["answer"])
    if len({answer["answer"] for answer in answers}) > 1:
        said = _words(_strip_marks(said))
        for answer in answers:
            answer["answer"] = _words(_strip_marks(answer["answer"]))
    return _agreement(said, answers)


def _pre2021(said: str, answers: list[dict[str, Any]]) -> float:
    """Score one question as the official repository did before 2021."""
    if len({answer["answer"] for answer in answers}) > 1:
        for answer in answers:
            answer["answer"] = _strip_marks(answer["answer"])
    return _agreement(normalise_answer(said), answers)


def _always(said: str, answers: list[dict[str, Any]]) -> float:
    """Score one question with both sides normalised, whatever the human answers are."""
    for answer in answers:
        answer["answer"] = normalise_answer(answer["answer"])
    return _agreement(normalise_answer(said), answers)


_VARIANTS: dict[str, Callable[[str, list[dict[str, Any]]], float]] = {
    "head": _head,
    "pre2021": _pre2021,
    "always": _always,
}


def _agreement(said: str, answers: list[dict[str, Any]]) -> float:
    """Return the mean over annotators of min(1, matches among the OTHERS / 3).

    "Others" are, officially, the answers whose whole record differs from this one: answers without
    an ``answer_id`` that say the same are all left out, not only this annotator's.
    """
    matching = [answer for answer in answers if answer["answer"] == said]
    scores = [min(1.0, sum(other != answer for other in matching) / _MATCHES_FOR_FULL_SCORE) for answer in answers]
    return sum(scores) / len(scores)


def _percent(values: Sequence[float]) -> float:
    return round(100 * sum(values) / len(values), 2)


def _strip_space(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def _strip_marks(text: str) -> str:
    """Drop or blank the punctuation; every test looks at the text as it came, not as it becomes."""
    drop_all = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or drop_all else " ")
    return _STOP.sub("", out, count=_MAX_STOPS)


def _words(text: str) -> str:
    """Lower the case, turn number words into digits, drop articles, restore apostrophes."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)
