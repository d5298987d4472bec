"""COCO and VQAv2 as published: sources to train on, and tasks that write them as TSVs."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import png

from git_model.batch import Target
from git_model.datasets.coco import VqaV2
from git_model.datasets.records import TSVFile
from git_model.datasets.sources import build_source
from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.registry import run

NAMES = ("COCO_val2014_000000000007.jpg", "sub/000000000123.png", "42.jpg")
IDS = (7, 123, 42)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures under three naming customs, Karpathy's and the official JSON of both tasks."""
    for number, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(number))
    splits = ("train", "restval", "test")
    karpathy = [
        {"filename": Path(n).name, "cocoid": i, "split": s, "sentences": [{"raw": f"{c} {i}"} for c in "ab"]}
        for n, i, s in zip(NAMES, IDS, splits, strict=True)
    ]
    files: dict[str, Any] = {
        "karpathy": {"images": karpathy, "dataset": "coco"},
        "captions": {
            "images": [{"id": i, "file_name": Path(n).name} for n, i in zip(NAMES, IDS, strict=True)],
            "annotations": [{"image_id": i, "caption": f"{c} {i}", "id": 0} for c in "ab" for i in IDS],
        },
        "questions": {
            "questions": [{"question_id": 10 * i + n, "question": f"q{n}?", "image_id": i} for n in (0, 1) for i in IDS]
        },
        "annotations": {"annotations": [_answered(10 * i + n) for n in (0, 1) for i in IDS]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def _answered(number: int) -> dict[str, Any]:
    answers = [{"answer": "yes" if n < 6 else "no", "answer_id": n, "answer_confidence": "yes"} for n in range(10)]
    kinds = {"answer_type": "yes/no", "question_type": "is"}
    return {"question_id": number, "image_id": 1, "multiple_choice_answer": "yes", "answers": answers, **kinds}


@pytest.mark.parametrize(
    ("split", "ids"), [("train", ("7", "123")), ("restval", ("123",)), ("test", ("42",)), (None, ("7", "123", "42"))]
)
def test_karpathys_splits(folder: Path, split: str | None, ids: tuple[str, ...]) -> None:
    entry = {"type": "coco", "annotations": "karpathy.json", "images": "images"}
    source = build_source([entry | ({"split": split} if split else {})], folder)
    samples = [source[i] for i in range(len(source))]
    assert tuple(s.key for s in samples) == ids
    assert samples[0].images[0] == png(IDS.index(int(ids[0])))
    assert samples[0].targets == (Target(f"a {ids[0]}"), Target(f"b {ids[0]}"))
    assert sorted(source.texts()) == sorted(f"{c} {i}" for c in "ab" for i in ids)


def test_official_captions_become_tsvs(folder: Path) -> None:
    task = {"type": "prepare_coco", "image_dir": folder / "images", "out_dir": folder / "tsv", "name": "val"}
    found = run({**task, "annotations": folder / "captions.json"})
    assert found["rows"] == {"val.img.tsv": 3, "val.caption.tsv": 3}
    images, captions = (TSVFile(folder / "tsv" / f"val.{kind}.tsv") for kind in ("img", "caption"))
    assert [row[0] for row in images] == [row[0] for row in captions] == ["7", "123", "42"]
    assert base64.b64decode(images[1][1]) == png(1)
    assert json.loads(captions[2][1]) == [{"caption": "a 42"}, {"caption": "b 42"}]
    again = build_source([{"type": "tsv", "images": "val.img.tsv", "captions": "val.caption.tsv"}], folder / "tsv")
    whole = build_source([{"type": "coco", "annotations": "captions.json", "images": "images"}], folder)
    assert [again[i] for i in range(3)] == [whole[i] for i in range(3)]


def test_vqa_becomes_tsvs(folder: Path) -> None:
    task = {"type": "prepare_vqa", "image_dir": folder / "images", "out_dir": folder / "tsv", "name": "v"}
    task |= {"questions": folder / "questions.json"}
    run({**task, "annotations": folder / "annotations.json"})
    rows = [json.loads(row[1]) for row in TSVFile(folder / "tsv" / "v.question.tsv")]
    assert [q["question_id"] for q in rows[0]] == [70, 71]
    assert rows[0][0]["answers"] == ["yes"] * 6 + ["no"] * 4
    assert (rows[0][0]["answer"], rows[0][0]["answer_type"], rows[0][0]["question_type"]) == ("yes", "yes/no", "is")
    again = build_source([{"type": "tsv", "images": "v.img.tsv", "questions": "v.question.tsv"}], folder / "tsv")
    whole = VqaV2(folder, "questions.json", "images", "annotations.json")
    assert [again[i] for i in range(3)] == [whole[i] for i in range(3)]
    assert list(whole.texts()) == list(again.texts())
    run({**task, "name": "test"})  # a test set has no answers
    asked = json.loads(TSVFile(folder / "tsv" / "test.question.tsv")[0][1])
    assert asked == [{"question": f"q{n}?", "question_id": 70 + n} for n in (0, 1)]
    scored = run({"type": "evaluate_on_vqa", "res_file": _said(folder), "label_file": folder / "annotations.json"})
    assert scored["accuracy"]["perAnswerType"] == {"yes/no": 100.0}
    scored = run({"type": "evaluate_on_vqa", "res_file": _said(folder), "label_file": folder / "tsv/v.question.tsv"})
    assert scored["accuracy"]["perAnswerType"] == {"yes/no": 100.0}


def _said(folder: Path) -> Path:
    rows = [{"question_id": 10 * i + n, "answer": "yes"} for n in (0, 1) for i in IDS]
    (folder / "said.json").write_text(json.dumps(rows))
    return folder / "said.json"


def test_a_missing_picture_is_left_out_and_counted(folder: Path) -> None:
    (folder / "images" / NAMES[1]).unlink()
    task = {"type": "prepare_coco", "image_dir": folder / "images", "out_dir": folder / "tsv", "name": "val"}
    task |= {"annotations": folder / "captions.json"}
    with pytest.raises(UserError, match=r"1 of 3 images could not be read \(\{'missing': 1\}\)") as caught:
        run(task)
    assert caught.value.exit_code == EXIT_TOO_MANY_BAD
    assert run({**task, "max_bad": 0.5})["left_out"] == {"missing": 1}
    for kind in ("img", "caption"):
        assert [row[0] for row in TSVFile(folder / "tsv" / f"val.{kind}.tsv")] == ["7", "42"]


def test_a_name_never_stands_for_another_picture(folder: Path) -> None:
    images = [{"filename": f"img_000{i}.png", "imgid": i, "split": "test", "sentences": [{"raw": "a"}]} for i in (2, 3)]
    (folder / "flickr.json").write_text(json.dumps({"images": images}))
    (folder / "images" / "img_0003.png").write_bytes(png(3))
    task = {"type": "prepare_coco", "annotations": folder / "flickr.json", "image_dir": folder / "images"}
    task |= {"out_dir": folder / "tsv", "name": "f"}
    assert run({**task, "max_bad": 0.5})["left_out"] == {"missing": 1}
    assert [row[0] for row in TSVFile(folder / "tsv" / "f.img.tsv")] == ["img_0003.png"]
    (folder / "images" / "sub" / "img_0003.png").write_bytes(png(4))  # the same name twice
    before = (folder / "tsv" / "f.img.tsv").read_bytes()
    with pytest.raises(UserError, match=r"none of the 2 records could be read: .*ambiguous_name"):
        run({**task, "max_bad": 1})
    assert (folder / "tsv" / "f.img.tsv").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": "none.json"}, "cannot read"),
        ({"annotations": "captions.json", "split": "val"}, "split is for Karpathy's file"),
        ({"split": "tset"}, "did you mean 'test'"),
        ({"split": "val"}, "holds no image of split val"),
        ({"images": "none"}, "no image folder"),
        ({"annotations": "questions.json"}, "has no 'images'"),
    ],
)
def test_faults_are_named(folder: Path, changes: dict[str, str], words: str) -> None:
    entry = {"type": "coco", "annotations": "karpathy.json", "images": "images", **changes}
    with pytest.raises(UserError, match=words):
        build_source([entry], folder)


def test_a_question_without_annotation_is_named(folder: Path) -> None:
    (folder / "few.json").write_text(json.dumps({"annotations": [_answered(70)]}))
    with pytest.raises(UserError, match=r"5 questions of .* are not in"):
        VqaV2(folder, "questions.json", "images", "few.json")


def test_real_coco(reference_data: Path, tmp_path: Path) -> None:
    coco = reference_data / "data" / "coco_val2017_subset"
    task = {"type": "prepare_coco", "image_dir": coco / "images", "out_dir": tmp_path, "name": "val"}
    assert run({**task, "annotations": coco / "captions_val2017_subset.json"})["images"] == 97
    labels = tmp_path / "val.caption.tsv"
    first = [[row[0], json.loads(row[1])[0]["caption"]] for row in TSVFile(labels)]
    results = tmp_path / "first.json"
    results.write_text(json.dumps([{"image_id": int(key), "caption": text} for key, text in first]))
    scored = run({"type": "evaluate_on_coco_caption", "res_file": results, "label_file": labels, "metrics": ["Bleu"]})
    assert scored["Bleu_1"] == pytest.approx(1)
