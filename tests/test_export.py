"""Conversions: GIT's own bytes, EvalAI's rules, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from git_model.datasets.records import json_cell, write_tsv
from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.registry import run


def vqa(out: Path, predict_file: Path, **options: Any) -> Any:
    """Convert and read back."""
    run({"type": "convert_tsv_to_vqa_json", "predict_file": predict_file, "out_json": out, **options})
    return json.loads(out.read_text())


@pytest.fixture
def said(tmp_path: Path) -> Path:
    write_tsv(tmp_path / "p.tsv", [(json_cell({"answer": f"The {i}.", "question_id": i}),) for i in (3, 1, 2)])
    return tmp_path / "p.tsv"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    questions = [{"question_id": i, "question": "?", "image_id": 7} for i in (1, 2, 3, 4)]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    return tmp_path / "q.json"


def test_gits_own_bytes(reference_data: Path, tmp_path: Path) -> None:
    git = reference_data / "oracles" / "git_tsv"
    vqa(tmp_path / "v.json", git / "pred.vqa.tsv")
    assert (tmp_path / "v.json").read_bytes() == (git / "pred.vqa.json").read_bytes()
    for source, expected in (("pred.coco.tsv", "pred.coco_coco_format.json"), ("test.caption.tsv", "gt.coco.json")):
        out = tmp_path / expected
        run({"type": "convert_tsv_to_coco_format", "res_file": git / source, "outfile": out})
        assert out.read_bytes() == (git / expected).read_bytes()
        run({"type": "convert_coco_to_tsv_format", "coco_file": out, "outfile": tmp_path / source})
        again = tmp_path / "again.json"
        run({"type": "convert_tsv_to_coco_format", "res_file": tmp_path / source, "outfile": again})
        assert again.read_bytes() == out.read_bytes()
    assert (tmp_path / "pred.coco.tsv").read_bytes() == (git / "pred.coco.tsv").read_bytes()
    assert (tmp_path / "pred.coco.lineidx.8b").read_bytes() == (git / "pred.coco.lineidx.8b").read_bytes()


def test_without_questions_the_order_is_the_files(said: Path, tmp_path: Path) -> None:
    assert [row["question_id"] for row in vqa(tmp_path / "o.json", said)] == [3, 1, 2]


def test_with_questions_every_id_is_there_once(said: Path, asked: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"1 of 4 questions have no answer \(e.g. \[4\]\)") as caught:
        vqa(tmp_path / "o.json", said, question_file=asked)
    assert caught.value.exit_code == EXIT_TOO_MANY_BAD
    assert not (tmp_path / "o.json").exists()
    rows = vqa(tmp_path / "o.json", said, question_file=asked, fill_missing=True)
    assert [(row["question_id"], row["answer"]) for row in rows] == [
        (1, "The 1."),
        (2, "The 2."),
        (3, "The 3."),
        (4, ""),
    ]
    assert all(type(row["question_id"]) is int for row in rows)


def test_questions_may_be_a_tsv(said: Path, tmp_path: Path) -> None:
    questions = [{"question": "?", "question_id": i} for i in (1, 2, 3)]
    write_tsv(tmp_path / "q.tsv", [("img", json_cell(questions))])
    rows = vqa(tmp_path / "o.json", said, question_file=tmp_path / "q.tsv", normalise=True)
    assert [row["answer"] for row in rows] == ["1", "2", "3"]


def test_an_error_record_is_no_answer(said: Path, asked: Path, tmp_path: Path) -> None:
    rows = [{"answer": "a", "question_id": i} for i in (1, 2, 3)] + [{"answer": "", "error": "x", "question_id": 4}]
    write_tsv(tmp_path / "p.tsv", [(json_cell(row),) for row in rows])
    with pytest.raises(UserError, match=r"1 of 4 questions have no answer"):
        vqa(tmp_path / "o.json", tmp_path / "p.tsv", question_file=asked)
    assert len(vqa(tmp_path / "o.json", tmp_path / "p.tsv")) == 4
    with pytest.raises(UserError, match="would overwrite the input"):
        vqa(said, said)


def test_one_reference_an_image_is_ground_truth_where_it_is_said(tmp_path: Path) -> None:
    write_tsv(tmp_path / "c.tsv", [("k", json_cell([{"caption": "a"}]))])
    task = {"type": "convert_tsv_to_coco_format", "res_file": tmp_path / "c.tsv", "outfile": tmp_path / "c.json"}
    run({**task, "kind": "ground_truth"})
    assert json.loads((tmp_path / "c.json").read_text())["annotations"][0]["image_id"] == "k"


def test_a_record_of_an_unreadable_row_is_no_answer(tmp_path: Path) -> None:
    lost = {"answer": "", "error": "bad_question_json", "question_id": None}
    write_tsv(tmp_path / "p.tsv", [(json_cell(lost),), (json_cell({"answer": "a", "question_id": 5}),)])
    assert vqa(tmp_path / "o.json", tmp_path / "p.tsv") == [{"answer": "a", "question_id": 5}]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"answer": "a", "question_id": 1}, {"answer": "b", "question_id": 1}], r"1 questions more than once .*\[1\]"),
        ([{"answer": "a", "question_id": 9}], r"questions that .* does not have \(e.g. \[9\]\)"),
        ([{"answer": 3, "question_id": 1}], "question 1': answer is 3; a text is needed"),
        ([{"answer": "a", "question_id": "x"}], "question_id is 'x'; an integer is needed"),
        ([{"answer": "a"}], "entry 0 of .* lacks question_id"),
        (["a"], "entry 0 of .* lacks question_id, answer"),
    ],
)
def test_faults_are_named(rows: list[Any], words: str, asked: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "p.tsv", [(json_cell(row),) for row in rows])
    with pytest.raises(UserError, match=words):
        vqa(tmp_path / "o.json", tmp_path / "p.tsv", question_file=asked, fill_missing=True)


def test_no_json_in_a_row_is_named(tmp_path: Path) -> None:
    write_tsv(tmp_path / "p.tsv", [("{",)])
    with pytest.raises(UserError, match=r"row 0 of .* has no JSON in column 1"):
        vqa(tmp_path / "o.json", tmp_path / "p.tsv")
    with pytest.raises(UserError, match="no TSV file"):
        vqa(tmp_path / "o.json", tmp_path / "none.tsv")
    with pytest.raises(UserError, match=r"its name must end in \.tsv"):
        run({"type": "convert_tsv_to_coco_format", "res_file": "x.json"})
