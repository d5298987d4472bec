"""A small model trained here, then asked through inference.py as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import png

import train
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.tasks.registry import run


@pytest.fixture(scope="module")
def model_path(tiny_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    flags = ["--config", str(tiny_tsv / "recipe.yml"), "--output_dir", str(out), "--epochs", "3"]
    train.train(read_flags([*flags, "--set", "train.validate_samples=2"])[0])
    return out / "model_latest.pt"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    path.write_bytes(png(0))
    return path


def ask(**params: Any) -> Any:
    return run({"type": "test_git_inference_single_image", **params})


def test_caption_and_question(model_path: Path, image: Path) -> None:
    caption = ask(image_path=str(image), model_path=str(model_path))
    answer = ask(image_path=str(image), model_path=str(model_path), prompt="what colour?", beams=3)
    assert isinstance(caption["text"], str)
    assert answer["prompt"] == "what colour?"
    assert caption == ask(image_path=[str(image)], model_path=str(model_path)) | {"image_path": str(image)}


def test_several_images_fill_the_slots(model_path: Path, image: Path) -> None:
    two = ask(image_path=[str(image)] * 2, model_path=str(model_path), prompt="[IMG] and [IMG] ?")
    assert isinstance(two["text"], str)
    with pytest.raises(UserError, match="slots"):
        ask(image_path=str(image), model_path=str(model_path), prompt="[IMG] and [IMG] ?")


def test_the_originals_architecture_keys_must_agree(model_path: Path, image: Path) -> None:
    base = {"image_path": str(image), "model_path": str(model_path)}
    ask(**base, image_encoder_type="small", language_model="small", mapping_type="grid", output_grid=True)
    for key, value in {"language_model": "gpt2", "output_grid": False, "input_resolution": 224}.items():
        with pytest.raises(UserError, match=key):
            ask(**base, **{key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_path": "/nowhere.jpg"}, "nowhere"),
        ({"model_path": "/nowhere.pt"}, "nowhere"),
        ({"bbox": [1, 2, 3, 4]}, "bbox"),
        ({"prompt": "x" * 3000}, "tokens"),
        ({"device": "tpu9"}, "tpu9"),
        ({"max_new_tokens": 1000}, "can hold"),
    ],
)
def test_mistakes_are_named(model_path: Path, image: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ask(**({"image_path": str(image), "model_path": str(model_path)} | changes))


def test_a_broken_picture_is_an_error(model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match="not_image"):
        ask(image_path=str(tmp_path / "x.jpg"), model_path=str(model_path))


def test_the_command_prints_json(model_path: Path, image: Path, root: Path) -> None:
    params = f"{{'type': 'test_git_inference_single_image', 'image_path': '{image}', 'model_path': '{model_path}',}}"
    done = subprocess.run(
        [sys.executable, "inference.py", "-p", params],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["image_path"] == str(image)


def test_evaluate_scores_and_writes_the_page(model_path: Path, tiny_tsv: Path, tmp_path: Path) -> None:
    result = run(
        {
            "type": "evaluate",
            "model_path": str(model_path),
            "data_dir": str(tiny_tsv),
            "image_tsv": "t.img.tsv",
            "caption_tsv": "t.caption.tsv",
            "question_tsv": "t.question.tsv",
            "out_dir": str(tmp_path / "out"),
            "limit": 12,
            "baselines": True,
        }
    )
    assert set(result["blind_captions"]) == {"most_frequent", "random"}
    assert set(result["scores"]) == set(result["blank_image"]) == {"cider", "accuracy"}
    assert result["references_cider"] >= 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 12
    assert page.count("data:image/png;base64,") == 12
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 24
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"] == result["scores"]


def test_evaluate_wants_one_description_of_the_set(model_path: Path, tmp_path: Path) -> None:
    for extra in ({}, {"source": "val", "image_tsv": "x"}, {"source": "nowhere"}, {"image_tsv": "x"}):
        with pytest.raises(UserError):
            run({"type": "evaluate", "model_path": str(model_path), "out_dir": str(tmp_path), **extra})


def test_the_page_escapes_what_the_model_says(tmp_path: Path) -> None:
    from git_model.batch import Sample, Target
    from git_model.tasks.report import write_report
    from git_model.validation import Prediction

    target = Target("", "<b>?</b>", 1, ("</script>",))
    said = Prediction("k", target, "<img src=x onerror=alert(1)>")
    result = {"model_path": "<m>", "scores": {"accuracy": 0.0}, "blank_image": {"accuracy": 0.0}}
    page = write_report(tmp_path / "r.html", [Sample("k", (png(0),), (target,))], [said], result).read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<b>" not in page
