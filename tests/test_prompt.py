"""Vectors of prompts: the competition's own file, files and submissions in any order, ensembles by name, similarity."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from git_model.datasets.prompt_files import read_prompts
from git_model.datasets.vectors import (
    Vectors,
    names_path,
    read_submission,
    read_vectors,
    weighted,
    write_submission,
    write_vectors,
)
from git_model.errors import UserError
from git_model.metrics.similarity import cosines, mean_cosine, similarity
from git_model.tasks.registry import run

KAGGLE = ("data", "sd_i2p_kaggle7")


def vectors(count: int = 5, width: int = 4, seed: int = 0, prefix: str = "i") -> Vectors:
    values = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return Vectors(tuple(f"{prefix}{n}" for n in range(count)), values)


# ---------------------------------------------------------------------------------------------------------- the golden
def test_the_competitions_own_submission(minilm: str, reference_data: Path, tmp_path: Path) -> None:
    """Seven prompts, 2,688 numbers that Kaggle published."""
    folder = reference_data.joinpath(*KAGGLE)
    told = run(
        {"type": "embed_prompt", "prompts": folder / "prompts.csv", "out": tmp_path / "p.npy", "text_encoder": minilm}
    )
    assert told == {"out": str(tmp_path / "p.npy"), "count": 7, "dim": 384}
    run({"type": "write_submission", "vectors": tmp_path / "p.npy", "out": tmp_path / "s.csv"})
    ours, theirs = read_submission(tmp_path / "s.csv"), read_submission(folder / "sample_submission.csv")
    assert set(ours.ids) == set(theirs.ids)
    assert np.abs(ours.values - theirs.of(ours.ids)).max() <= 1e-5
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert len(lines) == 2689
    assert [line.split(",")[0] for line in lines] == [
        line.split(",")[0] for line in (folder / "sample_submission.csv").read_text().splitlines()
    ]
    score = {"type": "score_submission", "truth": folder / "prompts.csv", "text_encoder": minilm}
    found = run({**score, "submission": tmp_path / "s.csv"})
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert found["R@1"] == 1
    assert found["mean_vector_cosine"] == pytest.approx(0.5232, abs=1e-3)
    assert run({**score, "submission": folder / "sample_submission.csv"})["mean_cosine"] == pytest.approx(1, abs=1e-6)


# ----------------------------------------------------------------------------------------------------- files of vectors
def test_files_of_vectors(tmp_path: Path) -> None:
    given = vectors()
    write_vectors(tmp_path / "a.npy", given)
    back = read_vectors(tmp_path / "a.npy")
    assert back.ids == given.ids
    assert (back.values == given.values).all()
    for text, told in (("i0\ni1\n", "2 names"), ("i0\n" * 5, "'i0' has more than one vector")):
        names_path(tmp_path / "a.npy").write_text(text)
        with pytest.raises(UserError, match=told):
            read_vectors(tmp_path / "a.npy")
    names_path(tmp_path / "a.npy").unlink()
    with pytest.raises(UserError, match="cannot read the names"):
        read_vectors(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="cannot read the vectors"):
        read_vectors(tmp_path / "b.npy")
    with pytest.raises(UserError, match=r"end in \.npy"):
        write_vectors(tmp_path / "a.bin", given)
    with pytest.raises(UserError, match="cannot be a line"):
        write_vectors(tmp_path / "c.npy", Vectors(("a\nb",), np.zeros((1, 2), np.float32)))
    with pytest.raises(UserError, match="vector of 'b' is not finite"):
        Vectors(("a", "b"), np.array([[0.0], [np.nan]]))
    with pytest.raises(UserError, match="1 of 2 names have no vector, such as x"):
        given.of(["i0", "x"])


def test_prompts_of_both_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text('imgId,prompt\n20057f34d,"a crater, photo"\na,"two\nlines"\n')
    assert read_prompts(tmp_path / "k.csv") == {"20057f34d": "a crater, photo", "a": "two\nlines"}
    (tmp_path / "d.csv").write_text("image,prompt,seed\n0-1.png,a cat,1\nb.v2,none,2\n")
    assert read_prompts(tmp_path / "d.csv") == {"0-1": "a cat", "b.v2": "none"}
    for text, told in (
        ("image,text\na,b\n", "has the columns image, text; wanted: prompt"),
        ("image,prompt\na,b\na.png,c\n", "line 3: 'a' is there twice"),
        ("image,prompt\n", "holds no prompt"),
        ("image,prompt\na\n", "line 2: a name or a prompt is missing"),
        ("", "has the columns none"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=told):
            read_prompts(tmp_path / "bad.csv")


# ---------------------------------------------------------------------------------------------------------- submissions
def test_a_submission_in_any_order(tmp_path: Path) -> None:
    given = vectors(20, 8)
    write_submission(tmp_path / "a.csv", given)
    order = list(range(20))
    random.Random(1).shuffle(order)
    shuffled = Vectors(tuple(given.ids[i] for i in order), given.values[order])
    write_submission(tmp_path / "b.csv", shuffled)
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    head, *lines = (tmp_path / "a.csv").read_text().splitlines()
    random.Random(2).shuffle(lines)
    (tmp_path / "c.csv").write_text("\n".join([head, *lines]) + "\n")
    back = read_submission(tmp_path / "c.csv")
    assert (back.of(given.ids) == given.values).all(), "nine digits hold a float32"
    assert run({"type": "score_submission", "submission": tmp_path / "c.csv", "truth": tmp_path / "a.csv"})[
        "mean_cosine"
    ] == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,val\n", "begins with id, val; a submission with imgId_eId, val"),
        ("imgId_eId,val\n", "holds no vector"),
        ("imgId_eId,val\na_0,1\na_0,2\n", "line 3: 'a_0' is there twice"),
        ("imgId_eId,val\na_0,1\na_2,2\n", "'a' has 2 numbers, not those from 0 to 1"),
        ("imgId_eId,val\na_0,1\na_1,2\nb_0,1\n", "'b' has 1 numbers, not those from 0 to 1"),
        ("imgId_eId,val\na_x,1\n", "line 2: .* is no name_number, value"),
        ("imgId_eId,val\na_0,nan\n", "vector of 'a' is not finite"),
    ],
)
def test_what_is_no_submission(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        read_submission(tmp_path / "a.csv")


# ------------------------------------------------------------------------------------------------------------ ensembles
def test_a_weighted_sum_by_name(tmp_path: Path) -> None:
    axes = {
        "regressor": Vectors(("a", "b"), np.array([[1, 0, 0], [0, 1, 0]], np.float32)),
        "interrogated": Vectors(("b", "a"), np.array([[1, 0, 0], [0, 1, 0]], np.float32)),
        "caption": Vectors(("a", "b"), np.array([[0, 0, 1], [0, 0, 1]], np.float32)),
    }
    weights = {"regressor": 0.7488, "interrogated": 0.2112, "caption": 0.04}
    total = weighted(axes, weights)
    assert total.ids == ("a", "b")
    assert (total.values == np.array([[0.7488, 0.2112, 0.04], [0.2112, 0.7488, 0.04]], np.float32)).all()
    for name, source in axes.items():
        write_vectors(tmp_path / f"{name}.npy", source)
    paths = {name: tmp_path / f"{name}.npy" for name in axes}
    told = run({"type": "write_submission", "vectors": paths, "out": tmp_path / "s.csv"})
    assert told["weights"] == weights, "the published ones"
    assert (read_submission(tmp_path / "s.csv").of(["a", "b"]) == total.values).all()
    named = {
        "type": "write_submission",
        "vectors": {"x": paths["caption"], "y": paths["regressor"]},
        "out": tmp_path / "t.csv",
    }
    with pytest.raises(UserError, match="weights are needed for x, y"):
        run(named)
    with pytest.raises(UserError, match=r"weights\.y must be a finite number, got 'much'"):
        run({**named, "weights": {"x": 1, "y": "much"}})
    with pytest.raises(UserError, match="weights of x for sources x, y"):
        run({**named, "weights": {"x": 1}})
    lacking = {**axes, "caption": Vectors(("a",), np.zeros((1, 3), np.float32))}
    with pytest.raises(UserError, match="caption: 1 of 2 names have no vector, such as b"):
        weighted(lacking, weights)
    with pytest.raises(UserError, match="widths differ: regressor 3, interrogated 3, caption 2"):
        weighted({**axes, "caption": Vectors(("a", "b"), np.zeros((2, 2), np.float32))}, weights)


# ----------------------------------------------------------------------------------------------------------- similarity
def test_similarity_by_hand() -> None:
    right = np.array([[1.0, 0], [0, 2], [0, 0.5]])
    predicted = np.array([[3.0, 0], [1, 1], [0, -1]])
    found = similarity(predicted, right)
    assert found.cosines == pytest.approx([1, 2**-0.5, -1])
    assert mean_cosine(predicted, right) == pytest.approx((1 + 2**-0.5 - 1) / 3)
    assert found.figures()["median_cosine"] == pytest.approx(2**-0.5)
    assert found.recall == pytest.approx(2 / 3), "the second is as near to the first: a tie is right"
    guess = np.array([1, 2]) / 5**0.5
    assert found.mean_vector == pytest.approx((guess[0] + 2 * guess[1]) / 3)
    assert similarity(predicted, right, block=1).recall == found.recall
    assert cosines(np.zeros((1, 2)), np.ones((1, 2))) == [0]
    for wrong in (np.zeros((0, 2)), np.zeros((2, 2))):
        with pytest.raises(ValueError, match="beside"):
            similarity(wrong, np.zeros((0, 2)))


def test_similarity_with_more_to_choose_from_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = np.random.default_rng(0)
    right, others = dice.normal(size=(40, 6)), dice.normal(size=(70, 6))
    predicted = right + 0.6 * dice.normal(size=right.shape)
    predicted[3] = 0.0  # like nothing
    others[5] = 2 * right[0]  # the right one of row 0 once more: a tie
    bank = np.concatenate([right, others])
    scores = predicted @ bank.T / np.linalg.norm(bank, axis=1)
    best = scores.argmax(axis=1)
    best[(best == 45) | (np.arange(40) == 3)] = -1
    best[0] = 0 if best[0] == -1 else best[0]
    monkeypatch.setattr("git_model.metrics.similarity.COLUMNS", 7)
    found = similarity(predicted, right, others=others, block=11)
    assert found.nearest[3] == -1
    assert [n for i, n in enumerate(found.nearest.tolist()) if best[i] >= 0] == [n for n in best.tolist() if n >= 0]
    assert found.recall == np.mean(found.nearest == np.arange(40))
    guess = dice.normal(size=(9, 6))
    told = similarity(predicted, right, guess=guess).mean_vector
    mean = (guess / np.linalg.norm(guess, axis=1, keepdims=True)).mean(axis=0)
    assert told == pytest.approx(mean_cosine(np.tile(mean, (40, 1)), right))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"type": "embed_prompt", "prompts": "p.csv", "out": "x.bin"}, r"end in \.npy"),
        ({"type": "embed_prompt", "prompts": "none.csv", "out": "x.npy"}, "no file 'none.csv'"),
        ({"type": "write_submission", "vectors": "a.npy", "out": "x.txt"}, r"ends in \.csv"),
        ({"type": "write_submission", "vectors": ["a.npy"], "out": "x.csv"}, r"vectors must be text or a mapping"),
        ({"type": "score_submission", "submission": "none.csv", "truth": "none.npy"}, "no file 'none.csv'"),
    ],
)
def test_what_does_not_fit(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        run(keys)


def test_names_that_the_truth_does_not_have(tmp_path: Path) -> None:
    write_vectors(tmp_path / "a.npy", vectors(3))
    write_vectors(tmp_path / "b.npy", vectors(5))
    task = {"type": "score_submission", "submission": tmp_path / "b.npy", "truth": tmp_path / "a.npy"}
    with pytest.raises(UserError, match=r"2 names that .* does not have, such as i3"):
        run(task)
    with pytest.raises(UserError, match="2 of 5 names have no vector"):
        run({**task, "submission": tmp_path / "a.npy", "truth": tmp_path / "b.npy"})
    write_vectors(tmp_path / "c.npy", vectors(3, 7))
    with pytest.raises(UserError, match=r"7 numbers a vector, .* 4"):
        run({**task, "submission": tmp_path / "c.npy"})
