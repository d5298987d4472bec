"""Trained models on real data, through every command: `make soak` trains them first, and then these run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from git_model.checkpoint import load_checkpoint
from git_model.datasets.annotations import read_references, read_results
from git_model.datasets.records import TSVFile
from git_model.datasets.sources import build_source
from git_model.metrics.vqa import exact_accuracy
from git_model.models.language import Decoding
from git_model.tasks.registry import run
from git_model.training import asking
from git_model.validation import eval_batches, eval_data, predict, scores

pytestmark = pytest.mark.soak


def trained(root: Path, name: str) -> Path:
    """The last checkpoint of a recipe that `make soak` has trained."""
    path = root / "checkpoints" / name / "model_latest.pt"
    if not path.is_file():
        pytest.skip(f"no {path}: train checkpoints/{name}/config.yml first (make soak)")
    return path


def prepared(root: Path, data: Path, name: str, out: Path) -> dict[str, Any]:
    """Write the recipe's validation set as TSVs."""
    recipe = root / "checkpoints" / name / "config.yml"
    return run({"type": "prepare_tsv", "config": recipe, "data_dir": data / name, "out_dir": out, "name": "val"})


def test_easy_vqa_says_the_same_number_three_times(root: Path, reference_data: Path, tmp_path: Path) -> None:
    model = trained(root, "easy_vqa")
    data = reference_data / "data"
    assert prepared(root, data, "easy_vqa", tmp_path)["rows"]["val.question.tsv"] == 1000
    files = {"image_tsv": tmp_path / "val.img.tsv", "question_tsv": tmp_path / "val.question.tsv"}
    said = tmp_path / "said.tsv"
    report = run(
        {
            "type": "test_git_inference_single_tsv",
            "model_path": model,
            "out_tsv": said,
            "batch_size": 256,
            "max_new_tokens": 8,
            **files,
        }
    )
    assert (report["rows"], report["ok"], report["reasons"]) == (1000, 1000, {})
    official = run({"type": "evaluate_on_vqa", "res_file": said, "label_file": files["question_tsv"]})
    assert official["questions"] == 9673

    exported = tmp_path / "evalai.json"
    task = {"type": "convert_tsv_to_vqa_json", "predict_file": said, "out_json": exported}
    assert run({**task, "question_file": files["question_tsv"]}) == {
        "out_json": str(exported), "questions": 9673, "filled": 0, "failed": 0,
    }  # fmt: skip
    answers = {row["question_id"]: row["answer"] for row in json.loads(exported.read_text())}
    asked = [q for row in TSVFile(files["question_tsv"]) for q in json.loads(row[1])]
    from_export = exact_accuracy([answers[q["question_id"]] for q in asked], [[q["answer"]] for q in asked])

    loaded = load_checkpoint(model)
    source = build_source([{"type": "easy_vqa", "split": "test"}], data / "easy_vqa")
    ask = asking(loaded.model)
    batches = eval_batches(eval_data(loaded.config, source, loaded.model.vision.resolution), ask, batch_size=32)
    straight = scores(predict(loaded.model, batches, Decoding(max_new_tokens=8), "cpu"))["accuracy"]
    print(f"easy-VQA: official {official['accuracy']['overall']}, export {from_export}, model {straight}")
    assert straight == from_export > 0.98
    assert official["accuracy"]["overall"] == round(100 * straight, 2)


def test_rsicd_scores_like_plain_pycocoevalcap(root: Path, reference_data: Path, tmp_path: Path) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    model = trained(root, "rsicd")
    prepared(root, reference_data / "data", "rsicd", tmp_path)
    said, label = tmp_path / "said.tsv", tmp_path / "val.caption.tsv"
    task = {"type": "test_git_inference_single_tsv", "image_tsv": tmp_path / "val.img.tsv", "model_path": model}
    run({**task, "out_tsv": said, "batch_size": 64})
    found = run({"type": "evaluate_on_coco_caption", "res_file": said, "label_file": label})
    assert found["num_images"] == 1094

    wanted = {k: [{"caption": text} for text in texts] for k, texts in read_references(label).items()}
    captions = {k: [{"caption": text}] for k, text in read_results(said).items()}
    tokens, words = (PTBTokenizer().tokenize(texts) for texts in (wanted, captions))
    expected = {"CIDEr": Cider(), "ROUGE_L": Rouge(), "METEOR": Meteor()}
    for name, scorer in expected.items():
        assert found[name] == pytest.approx(scorer.compute_score(tokens, words)[0], rel=0, abs=1e-12), name
    for n, figure in enumerate(Bleu(4).compute_score(tokens, words, verbose=0)[0], 1):
        assert found[f"Bleu_{n}"] == pytest.approx(figure, rel=0, abs=1e-12)
    print(f"RSICD: {found}")
    assert found["CIDEr"] > 1
