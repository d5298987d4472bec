"""VQA accuracy against the official scores of TextVQA val, and hand-made cases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from git_model.errors import UserError
from git_model.metrics.vqa import exact_accuracy, normalise_answer, vqa_accuracy


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def oracle(reference_data: Path) -> Path:
    return reference_data / "oracles" / "vqa"


@pytest.fixture(scope="module")
def annotations(oracle: Path) -> list[dict[str, Any]]:
    return read(oracle / "textvqa_val_annotations.json")["annotations"]


def predicted(oracle: Path, name: str) -> dict[int, str]:
    return {row["question_id"]: row["answer"] for row in read(oracle / f"textvqa_val_pred_{name}.json")}


def test_normalisation_equals_the_official_one(oracle: Path) -> None:
    pairs = read(oracle / "answer_normalisation.json")
    assert len(pairs) == 21805
    wrong = [(raw, normalise_answer(raw), wanted) for raw, wanted in pairs if normalise_answer(raw) != wanted]
    assert wrong == []


@pytest.mark.parametrize("name", ["first", "second", "majority", "noisy"])
@pytest.mark.parametrize(("variant", "file"), [("head", "official"), ("pre2021", "officialpre2021")])
def test_official_scores(oracle: Path, annotations: list[dict[str, Any]], name: str, variant: str, file: str) -> None:
    official = read(oracle / f"textvqa_val_{file}_{name}.json")
    scores = vqa_accuracy(predicted(oracle, name), annotations, variant)
    assert scores.variant == variant
    assert scores.overall == official["accuracy"]["overall"]
    assert scores.per_answer_type == official["accuracy"]["perAnswerType"]
    assert scores.per_question_type == official["accuracy"]["perQuestionType"]
    assert {str(key): round(value, 2) for key, value in scores.per_question.items()} == official["evalQA"]


@pytest.mark.parametrize(("name", "wanted"), [("first", 87.15), ("majority", 98.45), ("noisy", 98.31)])
def test_always_variant(oracle: Path, annotations: list[dict[str, Any]], name: str, wanted: float) -> None:
    """The published figures of lmms-eval's evaluator on the same predictions."""
    assert vqa_accuracy(predicted(oracle, name), annotations, "always").overall == wanted


def question(answers: list[str], key: int = 1, ids: bool = True, answer_type: str = "other") -> dict[str, Any]:
    rows = [{"answer": text, **({"answer_id": n} if ids else {})} for n, text in enumerate(answers)]
    return {"question_id": key, "answers": rows, "answer_type": answer_type, "question_type": "what is"}


def test_agreement_by_hand() -> None:
    # Three of ten say "cat": an annotator who did sees 2 others (2/3), the seven others see 3 (1).
    scores = vqa_accuracy({1: "cat"}, [question(["cat"] * 3 + ["dog"] * 7)])
    assert scores.per_question[1] == pytest.approx(100 * (3 * 2 / 3 + 7) / 10)
    assert scores.overall == 90.0
    assert vqa_accuracy({1: "cat"}, [question(["cat"] + ["dog"] * 9)]).overall == 30.0
    assert vqa_accuracy({1: "cow"}, [question(["cat"] + ["dog"] * 9)]).overall == 0.0


def test_answers_without_ids_collapse_as_in_the_official_code() -> None:
    answers = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy({1: "cat"}, [question(answers, ids=False)]).overall == 70.0


def test_variants_differ_where_all_people_agree() -> None:
    annotations = [question(["yes"] * 10)]
    said = {1: "Yes."}
    assert vqa_accuracy(said, annotations, "head").overall == 0.0
    assert vqa_accuracy(said, annotations, "pre2021").overall == 100.0
    assert vqa_accuracy(said, annotations, "always").overall == 100.0
    # pre2021 leaves number words in the human answers alone.
    numbers = [question(["two"] * 9 + ["2"])]
    assert vqa_accuracy({1: "two"}, numbers, "pre2021").overall == 30.0
    assert vqa_accuracy({1: "two"}, numbers, "head").overall == 100.0
    assert numbers == [question(["two"] * 9 + ["2"])]  # the annotations are not written to


def test_types_are_averaged_apart() -> None:
    annotations = [
        question(["2"] * 10, 1, answer_type="number"),
        question(["yes"] * 10, 2, answer_type="yes/no"),
        question(["no"] * 10, 3, answer_type="yes/no"),
    ]
    scores = vqa_accuracy({1: "2", 2: "yes", 3: "yes"}, annotations)
    assert scores.per_answer_type == {"number": 100.0, "yes/no": 50.0}
    assert scores.per_question_type == {"what is": 66.67}
    assert scores.overall == 66.67


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("The dog!", "dog"),
        ("two cats, a dog", "2 cats dog"),
        ("1,000 dollars", "1000 dollars"),
        ("1.5.", "1.5"),
        ("dont", "don't"),
        ("couldntve couldn'tve", "couldntve couldn't've"),
        ("somebody'd", "somebodyd"),
        ("lets shed its", "lets shed its"),
        ("Im", "im"),
        ("t-shirt", "t shirt"),
        ("a" + "." * 40, "a........"),  # the official code removes 32 stops at most
        ("", ""),
    ],
)
def test_normalisation_by_hand(raw: str, wanted: str) -> None:
    assert normalise_answer(raw) == wanted


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_normalised_answers_hold_plain_words(text: str) -> None:
    words = normalise_answer(text)
    assert words == " ".join(words.split())
    assert not {"a", "an", "the"} & set(words.split())


def test_mismatches_are_errors() -> None:
    annotations = [question(["a"] * 10, 1), question(["b"] * 10, 2)]
    with pytest.raises(UserError, match=r"1 of 2 without a prediction.*'2'.*1 predictions for unknown.*'9'"):
        vqa_accuracy({1: "a", 9: "b"}, annotations)
    with pytest.raises(UserError, match=r"'heads'.*did you mean 'head'"):
        vqa_accuracy({1: "a", 2: "b"}, annotations, "heads")
    with pytest.raises(UserError, match="no questions"):
        vqa_accuracy({}, [])
    with pytest.raises(UserError, match="repeat 1 question ids"):
        vqa_accuracy({1: "a"}, [annotations[0], annotations[0]])
    with pytest.raises(UserError, match="question 4: 'answers'"):
        vqa_accuracy({4: "a"}, [{"question_id": 4, "answers": []}])


def test_exact_accuracy() -> None:
    said = ["The Red.", "two", "no", ""]
    accepted = [["red"], ["2", "three"], ["yes"], ["a"]]
    assert exact_accuracy(said, accepted) == 0.75  # "" and "a" are both nothing once normalised
    with pytest.raises(UserError, match="1 predictions for 2 questions"):
        exact_accuracy(["a"], [["a"], ["b"]])
    with pytest.raises(UserError, match="no answers"):
        exact_accuracy([], [])
    with pytest.raises(UserError, match="row 1"):
        exact_accuracy(["a", "b"], [["a"], []])
