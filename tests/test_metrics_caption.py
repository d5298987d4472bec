"""Caption metrics against the official COCO example, and the tokenizers against each other."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from git_model.errors import UserError
from git_model.metrics.caption import (
    METRICS,
    Key,
    blind_baselines,
    caption_scores,
    cider,
    reference_ceiling,
)
from git_model.metrics.ptb import PUNCTUATION, cached_ptb_tokenize, ptb_tokenize

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fakecap(reference_data: Path) -> Path:
    return reference_data / "oracles" / "coco_fakecap"


@pytest.fixture(scope="module")
def references(fakecap: Path) -> dict[Key, list[str]]:
    groups: dict[Key, list[str]] = {}
    for row in read(fakecap / "captions_val2014_fakecap_gt.json")["annotations"]:
        groups.setdefault(row["image_id"], []).append(row["caption"])
    return groups


@pytest.fixture(scope="module")
def predictions(fakecap: Path) -> dict[Key, str]:
    rows = read(fakecap / "captions_val2014_fakecap_results.json")
    # Text ids on this side, numbers on the other: the same images.
    return {str(row["image_id"]): row["caption"] for row in rows}


@pytest.fixture(scope="module")
def coco_captions(reference_data: Path) -> list[str]:
    path = reference_data / "data" / "coco_val2017_subset" / "captions_val2017.json"
    return [row["caption"] for row in read(path)["annotations"]]


def official_texts(
    fakecap: Path, references: dict[Key, list[str]], predictions: dict[Key, str]
) -> tuple[list[str], list[str]]:
    texts: list[str] = []
    tokens: list[str] = []
    for key, official in read(fakecap / "ptb_tokens.json").items():
        texts += [*references[int(key)], predictions[key]]
        tokens += [*official["refs"], official["hyp"]]
    return texts, tokens


@pytest.mark.parametrize("engine", ["python", pytest.param("java", marks=needs_java)])
def test_tokens_equal_the_official_ones(
    engine: str, fakecap: Path, references: dict[Key, list[str]], predictions: dict[Key, str]
) -> None:
    texts, tokens = official_texts(fakecap, references, predictions)
    assert len(texts) == 6005
    ours, used = ptb_tokenize(texts, engine)
    assert used == engine
    assert [pair for pair in zip(ours, tokens, strict=True) if pair[0] != pair[1]] == []


@needs_java
def test_python_tokens_agree_with_the_jar_on_coco(coco_captions: list[str]) -> None:
    ours, _ = ptb_tokenize(coco_captions, "python")
    jar, _ = ptb_tokenize(coco_captions, "java")
    differ = [(a, b) for a, b in zip(ours, jar, strict=True) if a != b]
    assert len(ours) == 25014
    assert len(differ) <= 3, differ  # "a sign that reads K." before a caption that starts with "A"


@needs_java
def test_python_tokens_agree_with_the_jar_on_cc3m(reference_data: Path) -> None:
    path = reference_data / "data" / "cc3m" / "Validation_GCC-1.1.0-Validation.tsv"
    texts = [line.split("\t")[0] for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(texts) == 15833  # with the private-use character that the jar drops
    assert ptb_tokenize(texts, "python")[0] == ptb_tokenize(texts, "java")[0]


HAND_MADE = {
    "A man's dog isn't here, they'll go.": "a man 's dog is n't here they 'll go",
    "cannot gonna 'tis rock'n'roll o'clock": "can not gon na 't is rock 'n' roll o'clock",
    'A T-shirt (red) and "quoted" -- text...': "a t-shirt -lrb- red -rrb- and quoted text",
    "$5.00 50% #1 10,000 2:30pm 1950s": "$ 5.00 50 % # 1 10,000 2:30 pm 1950s",
    "St. Louis at 5 p.m. on Main St.": "st. louis at 5 p.m. on main st.",
    "vitamin C. The end. Mary C. Smith": "vitamin c the end mary c. smith",
    "no. 5 or No. Not no.": "no. 5 or no not no",
    "a black/white and/or b&w AT&T": "a black/white and/or b & w at&t",
    "3 1/2 inch, 555-1234": "3\xa01/2 inch 555-1234",
    "it’s “curly” … ½ €": "it 's curly 1/2 $",
    "wow!! what?! no!": "wow !! what ?! no",
    "see www.example.com, <b>bold</b> :)": "see www.example.com <b> bold </b> :-rrb-",
    "line\nbreak\r\nand \u2028 more": "line break and more",
    "smile 😀 \ue000 done": "smile done",
    "": "",
    " . , ! ": "",
}


@pytest.mark.parametrize("engine", ["python", pytest.param("java", marks=needs_java)])
def test_hand_made_sentences(engine: str) -> None:
    ours, _ = ptb_tokenize(list(HAND_MADE), engine)
    assert dict(zip(HAND_MADE, ours, strict=True)) == HAND_MADE


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="aAbn0129'’.-/:$#@&<>()! \xa0", max_size=40))
def test_python_tokenizer_takes_any_text(text: str) -> None:
    ((tokens,), used) = ptb_tokenize([text], "python")
    assert used == "python"
    words = tokens.split(" ") if tokens else []
    assert "" not in words
    assert not PUNCTUATION.intersection(words)
    assert not set(tokens) & set("\r\n\u2028")


def test_python_tokens_do_not_depend_on_the_other_captions() -> None:
    texts = ["a sign that reads K.", "A dog", "no.", "7 dogs"]
    alone = [ptb_tokenize([text], "python")[0][0] for text in texts]
    assert ptb_tokenize(texts, "python")[0] == alone


def test_unknown_engine_names_the_allowed_ones() -> None:
    with pytest.raises(UserError, match=r"'pyton'.*did you mean 'python'.*auto, java, python"):
        ptb_tokenize(["a"], "pyton")


@needs_java
def test_jar_writes_nothing_into_the_package() -> None:
    import pycocoevalcap

    folder = Path(pycocoevalcap.__path__[0]) / "tokenizer"
    before = sorted(folder.iterdir())
    assert ptb_tokenize(["A Dog.", "", "A cat"], "java") == (["a dog", "", "a cat"], "java")
    assert ptb_tokenize([], "java") == ([], "java")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("engine", ["python", pytest.param("auto", marks=[needs_java, pytest.mark.slow])])
def test_official_example(
    engine: str,
    fakecap: Path,
    references: dict[Key, list[str]],
    predictions: dict[Key, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Under a language that writes 0,5 METEOR's wrapper fails unless its child is told otherwise.
    german = {"LC_ALL": "de_DE.UTF-8", "JAVA_TOOL_OPTIONS": "-Duser.language=de -Duser.region=DE"}
    for name, value in german.items():
        monkeypatch.setenv(name, value)
    names = ("Bleu", "ROUGE_L", "CIDEr") if engine == "python" else ("Bleu", "METEOR", "ROUGE_L", "CIDEr")
    scores = caption_scores(predictions, references, names, engine)
    assert {name: os.environ[name] for name in german} == german
    official = read(fakecap / "official_eval_pycocoevalcap-1.2.json")
    expected = {name: official[name] for name in official if name != "METEOR" or "METEOR" in names}
    assert scores.overall == pytest.approx(expected, rel=0, abs=1e-12)
    assert scores.tokenizer == ("python" if engine == "python" else "java")
    assert scores.not_computed == {}
    rows = read(fakecap / "official_evalImgs_pycocoevalcap-1.2.json")
    assert scores.per_image.keys() == {row["image_id"] for row in rows}
    for row in rows:
        for name, value in scores.per_image[row["image_id"]].items():
            assert value == pytest.approx(row[name], rel=0, abs=1e-12), (row["image_id"], name)
    assert scores.per_image[rows[0]["image_id"]].keys() == expected.keys()
    if engine == "python":
        assert cider(predictions, references) == scores.overall["CIDEr"]


def test_without_java(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: dict[Key, str] = {1: "a dog runs", 2: "a cat"}
    wanted: dict[Key, list[str]] = {1: ["a dog runs"], 2: ["a cat"]}
    scores = caption_scores(said, wanted, list(METRICS))
    assert scores.tokenizer == "python"
    assert scores.overall["CIDEr"] > 0
    assert scores.overall.keys() == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert scores.not_computed["METEOR"] == "no Java runtime on PATH"
    assert "SPICE" in scores.not_computed
    with pytest.raises(UserError, match="needs a Java runtime"):
        caption_scores(said, wanted, engine="java")


def test_small_figures() -> None:
    said: dict[Key, str] = {"a": "red circle on white", "b": "blue square on black"}
    wanted: dict[Key, list[str]] = {"a": ["Red circle on white."], "b": ["Blue square on black."]}
    scores = caption_scores(said, wanted, engine="python")
    # "on" is in every image and weighs nothing; the other n-grams match exactly: 10 for each image.
    assert scores.overall["CIDEr"] == pytest.approx(10.0)
    assert scores.overall["ROUGE_L"] == pytest.approx(1.0)
    assert scores.overall["Bleu_4"] == pytest.approx(1.0)
    assert cider({"a": "", "b": ""}, wanted) == 0.0
    assert cider({"a": "red circle on white"}, {"a": ["red circle on white"]}) == 0.0


@pytest.mark.parametrize(
    ("said", "wanted", "message"),
    [
        ({1: "a"}, {1: ["a"], 2: ["b"], 3: ["c"]}, r"2 of 3 referenced images lack.*\[2, 3\]"),
        ({1: "a", "x": "b"}, {1: ["a"]}, r"1 of 2 predictions lack references.*\['x'\]"),
        ({5: "a", "5": "b"}, {5: ["a"]}, "predictions name 1 images twice"),
        ({5: "a"}, {5: []}, r"empty list of references \(e\.g\. \[5\]\)"),
        ({}, {}, "no images"),
        ({5: "a"}, {5: ["", "."]}, "hold no words"),
    ],
)
def test_inputs_that_do_not_fit(said: dict[Key, str], wanted: dict[Key, list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        caption_scores(said, wanted, engine="python")


def test_unknown_metric() -> None:
    with pytest.raises(UserError, match=r"'CIDER'.*one of: Bleu, METEOR, ROUGE_L, CIDEr, SPICE"):
        caption_scores({1: "a"}, {1: ["a"]}, ["CIDER"])


def test_reference_ceiling_is_the_leave_one_out_mean() -> None:
    wanted: dict[Key, list[str]] = {
        1: ["a red circle", "one red circle", "a circle"],
        2: ["a blue square", "a blue box"],
    }
    first = cider({1: "a red circle", 2: "a blue square"}, {1: wanted[1][1:], 2: wanted[2][1:]})
    others = {1: ["a red circle", "a circle"], 2: ["a blue square"]}
    second = cider({1: "one red circle", 2: "a blue box"}, others)
    assert reference_ceiling(wanted) == pytest.approx((first + second) / 2, abs=1e-12)
    assert reference_ceiling({1: ["a dog"] * 2, 2: ["the cat"] * 2}) > 4
    with pytest.raises(UserError, match=r"1 of 2 images.*\[8\]"):
        reference_ceiling({7: ["a", "b"], 8: ["a"]})


def test_people_agree_more_than_the_example_model_and_it_more_than_the_blind(
    references: dict[Key, list[str]], predictions: dict[Key, str], coco_captions: list[str]
) -> None:
    references = dict(list(references.items())[:300])
    predictions = {str(key): predictions[str(key)] for key in references}
    model = cider(predictions, references)
    blind = blind_baselines(coco_captions, references, seed=3)
    assert model < reference_ceiling(references)
    assert max(blind.values()) < model / 2
    shuffled = dict(reversed(references.items()))
    assert blind_baselines(coco_captions, shuffled, seed=3) == pytest.approx(blind, abs=1e-12)
    assert blind_baselines(coco_captions, references, seed=4)["random"] != blind["random"]


def test_most_frequent_caption() -> None:
    wanted: dict[Key, list[str]] = {1: ["a red circle"], 2: ["a blue square"]}
    blind = blind_baselines(["a dog", "a blue square ", "a blue square"], wanted)
    assert blind["most_frequent"] == cider({1: "a blue square", 2: "a blue square"}, wanted)
    with pytest.raises(UserError, match="at least one training caption"):
        blind_baselines([], wanted)


def test_thirty_thousand_captions_in_seconds(coco_captions: list[str]) -> None:
    texts = (coco_captions * 2)[:30000]
    start = time.perf_counter()
    ptb_tokenize(texts, "python")
    assert time.perf_counter() - start < 10  # under 1 s when the machine is free


def test_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["A Dog.", "two cats\nsleep"]
    expected = ptb_tokenize(texts, "python")
    assert cached_ptb_tokenize(texts, "python", tmp_path / "c") == expected
    (file,) = (tmp_path / "c").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("git_model.metrics.ptb._python_tokens", None)  # would fail if it were called
        assert cached_ptb_tokenize(texts, "python", tmp_path / "c") == expected
        with pytest.raises(TypeError):
            cached_ptb_tokenize(texts[:1], "python", tmp_path / "c")
    file.write_text("[")
    assert cached_ptb_tokenize(texts, "python", tmp_path / "c") == expected
    assert cached_ptb_tokenize(texts, "python", Path("/proc/no/such")) == expected
