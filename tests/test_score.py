"""The scoring tasks: the official figures from files, offline, with a page that a browser can show."""

from __future__ import annotations

import base64
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from tiny import png

from git_model.datasets.records import TSVFile, json_cell, write_tsv
from git_model.errors import UserError
from git_model.tasks.registry import run


def read(path: Path) -> Any:
    """Return a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection leaves this process."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("offline")
def test_the_official_caption_example(reference_data: Path, tmp_path: Path) -> None:
    folder = reference_data / "oracles" / "coco_fakecap"
    official = read(folder / "official_eval_pycocoevalcap-1.2.json")
    found = run(
        {
            "type": "evaluate_on_coco_caption",
            "res_file": folder / "captions_val2014_fakecap_results.json",
            "label_file": folder / "captions_val2014_fakecap_gt.json",
            "outfile": tmp_path / "r.eval.json",
        }
    )
    assert "SPICE" in found["not_computed"]
    if "METEOR" in found["not_computed"]:
        assert "Java" in found["not_computed"]["METEOR"]
        official.pop("METEOR")
    for name, figure in official.items():
        assert found[name] == pytest.approx(figure, rel=0, abs=1e-12), name
    assert {k: v for k, v in read(tmp_path / "r.eval.json").items() if k in official} == {k: found[k] for k in official}
    each = {row[0]: json.loads(row[1]) for row in TSVFile(tmp_path / "r.eval.per_image.tsv")}
    for row in read(folder / "official_evalImgs_pycocoevalcap-1.2.json"):
        for name in official:
            assert each[str(row["image_id"])][name] == pytest.approx(row[name], rel=0, abs=1e-12)
    page = (tmp_path / "r.eval.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 60
    assert "Worst by CIDEr" in page


def test_two_tsvs_and_pictures_on_the_page(tmp_path: Path) -> None:
    keys = [str(i) for i in range(5)]
    write_tsv(tmp_path / "i.tsv", [(k, base64.b64encode(png(i)).decode()) for i, k in enumerate(keys)])
    write_tsv(tmp_path / "gt.tsv", [(k, json_cell([{"caption": f"thing {k} <b>"}] * 2)) for k in keys])
    write_tsv(tmp_path / "p.tsv", [(k, json_cell([{"caption": f"thing {k}"}])) for k in keys[:4]])
    task = {"type": "evaluate_on_coco_caption", "res_file": tmp_path / "p.tsv", "label_file": tmp_path / "gt.tsv"}
    task |= {"metrics": ["Bleu", "CIDEr"], "image_tsv": tmp_path / "i.tsv"}
    with pytest.raises(UserError, match="1 of 5 referenced images lack a prediction"):
        run(task)
    found = run(task | {"subset": True})
    assert found["num_images"] == 4
    assert "METEOR" not in found
    assert found["outfile"] == str(tmp_path / "p.eval.json")
    page = (tmp_path / "p.eval.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "<b>" not in page.split("</style>")[1]
    assert read(tmp_path / "p_coco_format.json")[0] == {"image_id": "0", "caption": "thing 0"}


@pytest.mark.parametrize("variant", ["head", "pre2021"])
@pytest.mark.parametrize("answers", ["first", "majority", "noisy", "second"])
def test_the_official_vqa_scores(reference_data: Path, tmp_path: Path, answers: str, variant: str) -> None:
    folder = reference_data / "oracles" / "vqa"
    suffix = "" if variant == "head" else "pre2021"
    official = read(folder / f"textvqa_val_official{suffix}_{answers}.json")
    found = run(
        {
            "type": "evaluate_on_vqa",
            "res_file": folder / f"textvqa_val_pred_{answers}.json",
            "label_file": folder / "textvqa_val_annotations.json",
            "outfile": tmp_path / "o.json",
            "variant": variant,
        }
    )
    assert found["accuracy"] == official["accuracy"]
    written = read(tmp_path / "o.json")["evalQA"]
    assert written == pytest.approx(official["evalQA"], abs=0.005)  # the official file is rounded


def test_a_question_tsv_with_answers_is_a_label_file(tmp_path: Path) -> None:
    questions = [
        {"question": "?", "question_id": 1, "answer": "red", "question_type": "what color"},
        {"question": "?", "question_id": 2, "answers": ["two"] * 3 + ["2"] * 7},
    ]
    write_tsv(tmp_path / "q.tsv", [("k", json_cell(questions))])
    said = [{"answer": "red", "question_id": 1}, {"answer": "Two", "question_id": 2}]
    write_tsv(tmp_path / "p.tsv", [(json_cell(row),) for row in said])
    task = {"type": "evaluate_on_vqa", "res_file": tmp_path / "p.tsv", "label_file": tmp_path / "q.tsv"}
    found = run(task)
    assert found["accuracy"] == {"overall": 100.0, "perAnswerType": {"other": 100.0},
                                 "perQuestionType": {"what color": 100.0, "all": 100.0}}  # fmt: skip
    write_tsv(tmp_path / "p.tsv", [(json_cell(said[0]),), (json_cell(said[0]),)])
    with pytest.raises(UserError, match="1 questions more than once"):
        run(task)
    write_tsv(tmp_path / "p.tsv", [(json_cell(said[0]),)])
    write_tsv(tmp_path / "q.tsv", [("k", json_cell([{"question": "?", "question_id": 1}]))])
    with pytest.raises(UserError, match="neither a list of answers nor an answer"):
        run(task)


@pytest.mark.parametrize("answers", [[1], ["a", 2], "red", [], [{"answer": 5}], [{"answer": "a", "answer_id": 1}, {}]])
def test_labels_of_odd_types_are_named(answers: Any, tmp_path: Path) -> None:
    write_tsv(tmp_path / "q.tsv", [("k", json_cell([{"question": "?", "question_id": 1, "answers": answers}]))])
    write_tsv(tmp_path / "p.tsv", [(json_cell({"answer": "a", "question_id": 1}),)])
    with pytest.raises(UserError, match="question 1"):
        run({"type": "evaluate_on_vqa", "res_file": tmp_path / "p.tsv", "label_file": tmp_path / "q.tsv"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no valid JSON"),
        ("{}", "holds a dict where a list is needed"),
        ('[{"image_id": 1}]', "entry 0 of .* lacks caption"),
        ('[{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]', "the image '1' twice"),
        ('[{"image_id": null, "caption": "a"}]', "image_id is None"),
        ("[]", "images lack a prediction"),
    ],
)
def test_faults_are_named(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    (tmp_path / "g.json").write_text('{"annotations": [{"image_id": 1, "caption": "a dog"}]}')
    task = {"type": "evaluate_on_coco_caption", "res_file": tmp_path / "r.json", "label_file": tmp_path / "g.json"}
    with pytest.raises(UserError, match=words):
        run(task)
