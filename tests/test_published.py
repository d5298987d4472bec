"""Hugging Face image-to-text models behind our tasks: what they say is what their own `generate` says."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from PIL import Image
from tiny import png
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from git_model.datasets.records import TSVFile, json_cell, write_tsv
from git_model.errors import UserError
from git_model.tasks.registry import run

PROMPTS = ("what is it ?", "is it a red dog ?", "what ?")
COUNT = 6


@pytest.fixture(scope="module", params=published.ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with six pictures and eighteen questions beside it."""
    folder = published.save(request.param, tmp_path_factory.mktemp(request.param))
    write_tsv(folder / "t.img.tsv", [(f"k{i}", base64.b64encode(png(i, 40)).decode()) for i in range(COUNT)])
    asked = [[{"question": q, "question_id": 10 * i + n} for n, q in enumerate(PROMPTS)] for i in range(COUNT)]
    write_tsv(folder / "t.question.tsv", [(f"k{i}", json_cell(q)) for i, q in enumerate(asked)])
    return folder


def direct(folder: Path, number: int, prompt: str, beams: int) -> str:
    """What the library says, one picture at a time, as its documentation does it."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    picture = Image.open(io.BytesIO(png(number, 40)))
    kind = model.config.model_type
    if kind == "llava":
        prompt = f"USER: <image>\n{prompt or 'Describe this image.'} ASSISTANT:"
    text = {"text": prompt} if prompt and kind != "git" else {}
    inputs = processor(images=picture, **text, return_tensors="pt")
    if kind == "git" and prompt:  # as the library's example of visual question answering
        ids = processor(text=prompt, add_special_tokens=False).input_ids
        inputs["input_ids"] = torch.tensor([[processor.tokenizer.cls_token_id, *ids]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=6, num_beams=beams, do_sample=False)
    said = processor.batch_decode(out, skip_special_tokens=True)[0].strip()
    seen = processor.tokenizer.decode(inputs.get("input_ids", [[]])[0], skip_special_tokens=True).strip()
    assert said.startswith(seen)
    return said.removeprefix(seen).strip()


def ask(folder: Path, out: Path, **options: Any) -> list[Any]:
    """Run the batch task and return its records."""
    task = {"type": "test_git_inference_single_tsv", "image_tsv": folder / "t.img.tsv", "model_path": folder}
    run({**task, "out_tsv": out, "max_new_tokens": 6, "workers": 0, "device": "cpu"} | options)
    return [json.loads(row[-1]) for row in TSVFile(out)]


@pytest.mark.parametrize("beams", [1, 3])
def test_it_says_what_its_own_generate_says(folder: Path, tmp_path: Path, beams: int) -> None:
    found = ask(folder, tmp_path / "c.tsv", beams=beams)
    captions = [records[0]["caption"] for records in found]
    assert captions == [direct(folder, i, "", beams) for i in range(COUNT)]
    found = ask(folder, tmp_path / "q.tsv", beams=beams, question_tsv=folder / "t.question.tsv", batch_size=5)
    answers = {record["question_id"]: record["answer"] for record in found}
    expected = {10 * i + n: direct(folder, i, q, beams) for i in range(COUNT) for n, q in enumerate(PROMPTS)}
    assert answers == expected
    assert len(set(captions) | set(answers.values())) > 3


def test_answers_come_from_a_list(folder: Path, tmp_path: Path) -> None:
    allowed = {"yes", "no", "a dog", "YES?no", "a red  dog"}  # decoding their tokens gives other texts back
    (tmp_path / "answers.txt").write_text("\n".join(sorted(allowed)))
    options = {"question_tsv": folder / "t.question.tsv", "answer_list": tmp_path / "answers.txt", "beams": 2}
    said = {record["answer"] for record in ask(folder, tmp_path / "q.tsv", **options)}
    assert said <= allowed


def test_one_picture(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(2, 40))
    task = {"type": "test_git_inference_single_image", "image_path": tmp_path / "p.png", "model_path": folder}
    task |= {"max_new_tokens": 6, "device": "cpu"}
    assert run({**task, "prompt": PROMPTS[0]})["text"] == direct(folder, 2, PROMPTS[0], 1)
    asked = run({**task, "prompt": "it", "prompt_format": "what is {prompt} ?"})["text"]
    assert asked == direct(folder, 2, "what is it ?", 1)
    with pytest.raises(UserError, match="takes one here"):
        run({**task, "image_path": [str(tmp_path / "p.png")] * 2})
    with pytest.raises(UserError, match=r"language_model: not for a Hugging Face model"):
        run({**task, "language_model": "gpt2"})
    with pytest.raises(UserError, match=r"it needs \{prompt\}"):
        run({**task, "prompt_format": "what?"})


def test_what_is_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(2))
    task = {"type": "test_git_inference_single_image", "image_path": tmp_path / "p.png", "device": "cpu"}
    with pytest.raises(UserError, match=r"a folder without config\.json"):
        run({**task, "model_path": tmp_path})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match=r"cannot load .* as a Hugging Face image-to-text model"):
        run({**task, "model_path": tmp_path})
    with pytest.raises(UserError, match="no checkpoint at"):
        run({**task, "model_path": tmp_path / "none.pt"})


def test_an_encoder_and_a_decoder_joined_by_hand(tmp_path: Path) -> None:
    folder = published.save_joined(tmp_path / "joined")
    (tmp_path / "p.png").write_bytes(png(2, 40))
    task = {"type": "test_git_inference_single_image", "image_path": tmp_path / "p.png", "model_path": folder}
    task |= {"max_new_tokens": 6, "device": "cpu"}
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=Image.open(tmp_path / "p.png"), return_tensors="pt")
    out = model.generate(**pixels, max_new_tokens=6)
    words: Any = AutoTokenizer.from_pretrained(folder)
    assert run(task)["text"] == words.decode(out[0], skip_special_tokens=True).strip()
    with pytest.raises(UserError, match="takes no prompt"):
        run({**task, "prompt": "what?"})
