"""What an exported folder is made of: ids, pixels, files; whole or not there; damaged ones told."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import (
    checkpoint,
    jpeg,
    llava_case,
    sentencepiece,
)
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import git_model
from git_model.batch import Target
from git_model.checkpoint import load_checkpoint
from git_model.datasets.collate import Collator
from git_model.datasets.collate import Loaded as Item
from git_model.datasets.images import Transform
from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.models.llava import _with_row
from git_model.models.processing import image_tokenizer, tokenizer_refusal
from git_model.tasks import export_model
from git_model.tasks.registry import run
from git_model.tokens import TextCodec

PROMPTS = ("", "what color is it?", "is it red", " leading", "two  spaces\n", "caf\u00e9 \u65e5", "a" * 30, "</s> <s>x")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: one for LLaVA with a BOS, one without, one for native only."""
    found = {}
    for name, case in (("bos", "siglip, mlp2x_gelu, llama of the newer tokenizer"),
                       ("plain", "openai clip, linear as a pair of GELUs, small llama")):  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        found[name] = checkpoint(folder, **llava_case(folder, case))
    found["native"] = checkpoint(tmp_path_factory.mktemp("native"))
    return found


@pytest.fixture(scope="module")
def exported(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three, exported."""
    folder = tmp_path_factory.mktemp("exported")
    for name, path in parts.items():
        run({"type": "export", "model_path": path, "out_dir": folder / name})
    return {name: folder / name for name in parts}


# -- text


@pytest.mark.parametrize("kind", ["legacy", "newer", "bytes"])
def test_ids_after_the_image_are_those_of_training(kind: str) -> None:
    from exporting import bpe

    codec = TextCodec(bpe() if kind == "bytes" else sentencepiece(kind == "newer"), 320)
    assert codec.bos_ids == ([] if kind == "bytes" else [1])
    tokenizer, image_id = image_tokenizer(codec)
    assert image_id == len(codec.tokenizer)
    lay = Collator(codec, 4, generate=True)
    for prompt in PROMPTS[:-1]:  # a special token that a user types is text to us, and a token to everyone else
        row = lay([Item("k", (torch.zeros(3, 1, 1),), (Target(prompt=prompt, question_id=0),))])
        expected = [*row.input_ids[0].masked_fill(row.image_mask[0], image_id).tolist()]
        assert tokenizer("<image>" * 4 + prompt)["input_ids"] == expected, prompt
    slots = lay([Item("k", (torch.zeros(3, 1, 1),) * 2, (Target(prompt="is [IMG] what[IMG]red", question_id=0),))])
    theirs = tokenizer("is" + "<image>" * 4 + "what" + "<image>" * 4 + "red")["input_ids"]
    assert theirs == slots.input_ids[0].masked_fill(slots.image_mask[0], image_id).tolist()


def test_a_tokenizer_that_reads_prompts_otherwise_is_refused(tmp_path: Path) -> None:
    tokenizer = sentencepiece(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["cat"]})  # to us a word, to everyone else a token
    assert tokenizer_refusal(TextCodec(tokenizer, 320)).startswith("its tokenizer gives the prompt 'Is it a cat' other")


def test_a_conversation_of_one_message_is_the_prompt(exported: dict[str, Path]) -> None:
    image = Image.open(io.BytesIO(jpeg(0, 80, 64)))
    for name in ("bos", "plain"):
        processor = AutoProcessor.from_pretrained(exported[name])
        plain = processor(images=image, text="<image>what color is it?", return_tensors="pt")
        content = [{"type": "text", "text": "what color is it?"}, {"type": "image", "image": image}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        chat = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        assert torch.equal(chat["input_ids"], plain["input_ids"]), name
        assert torch.equal(chat["pixel_values"], plain["pixel_values"])
        with pytest.raises(Exception, match="trained on one user message"):
            processor.apply_chat_template([{"role": "system", "content": "be kind"}, *content], **options)


def test_the_new_row_is_never_the_largest() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 16)
    for row in (50, 52, 20):  # behind the table, further behind, inside (a table with spare rows)
        grown = _with_row(table, row)
        assert len(grown) == max(50, row + 1)
        assert torch.equal(grown[: min(row, 50)], table[: min(row, 50)])
        logits = torch.randn(4096, 16) @ grown.T
        assert (logits.argmax(-1) < 50).all()
        assert (logits.argmax(-1) != row).all()


def test_pipelines_say_it(exported: dict[str, Path], parts: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "p.jpg"
    picture.write_bytes(jpeg(3, 80, 64))
    ask = {"type": "test_git_inference_single_image", "image_path": picture, "model_path": parts["plain"]}
    pipe: Any = pipeline("image-text-to-text", model=str(exported["plain"]))
    for prompt in ("", "what color is it?"):
        said = pipe(images=str(picture), text=f"<image>{prompt}", return_full_text=False)[0]["generated_text"]
        assert said.strip() == run({**ask, "prompt": prompt, "device": "cpu"})["text"]


# -- pictures


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_pixels_are_those_of_training(resize: str, tmp_path: Path) -> None:
    """To the uint8 level; where CLIP's crop of an odd rest rounds otherwise, one pixel aside (docs/serving.md)."""
    case = llava_case(tmp_path, "openai clip, linear as a pair of GELUs, small llama")
    path = checkpoint(tmp_path, **{**case, "data": {"resize": resize}})
    run({"type": "export", "model_path": path, "out_dir": tmp_path / "out"})
    vision, transform = load_checkpoint(path).model.vision, Transform(64, resize)
    processor, moved = AutoProcessor.from_pretrained(tmp_path / "out").image_processor, 0
    for seed, (width, height) in enumerate([(80, 64), (64, 90), (333, 64), (500, 375), (67, 64), (64, 71), (31, 30)]):
        data = jpeg(seed, width, height)
        image = Image.open(io.BytesIO(data))
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        wide, high, left, top = transform._geometry(width, height)
        if resize == "crop" and (max(wide, high) - 64) % 4 == 3:
            box = (wide - 64) // 2, (high - 64) // 2
            image = image.resize((wide, high), Image.Resampling.BICUBIC).crop((*box, box[0] + 64, box[1] + 64))
            assert (left - box[0], top - box[1]) in ((1, 0), (0, 1))
            ours, moved = Transform(64)(image), moved + 1
        else:
            ours = transform(data)
        torch.testing.assert_close(theirs, vision.normalise(ours[None]), rtol=0, atol=1e-5)
    assert moved == (2 if resize == "crop" else 0)


# -- files


def test_the_files_are_those_that_engines_read(exported: dict[str, Path]) -> None:
    files = {p.name for p in exported["bos"].iterdir()}
    assert files == {
        "config.json", "model.safetensors", "generation_config.json", "preprocessor_config.json",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    with safe_open(exported["bos"] / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    tops = {"vision_tower.vision_model", "multi_modal_projector.linear_1", "multi_modal_projector.linear_2"}
    assert {".".join(n.split(".")[:2]) for n in names} == {*tops, "language_model.model"}, "the head is tied: not there"
    config = json.loads((exported["bos"] / "config.json").read_text())
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["vision_config"]["image_size"] == 96
    assert str(exported["bos"].parent.parent) not in json.dumps(config), "no place on the machine that trained it"
    generation = json.loads((exported["bos"] / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 40
    assert (generation["eos_token_id"], generation["bos_token_id"], generation["pad_token_id"]) == (2, 1, 2)
    assert json.loads((exported["bos"] / "tokenizer_config.json").read_text())["padding_side"] == "left"


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("float32", 4), ("float16", 2), ("bfloat16", 2)])
@pytest.mark.parametrize("name", ["plain", "native"])
def test_dtype(name: str, dtype: str, size: int, parts: dict[str, Path], tmp_path: Path) -> None:
    run({"type": "export", "model_path": parts[name], "out_dir": tmp_path / "out", "dtype": dtype})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(key).element_size() for key in weights.keys()} == {size}  # noqa: SIM118
    if name == "plain":
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
        assert next(model.parameters()).element_size() == size
    else:
        assert git_model.load_checkpoint(tmp_path / "out").model.language.model.dtype == torch.float32


def test_where_it_may_be_written(parts: dict[str, Path], tmp_path: Path) -> None:
    task = {"type": "export", "model_path": parts["native"]}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and no export"):
        run({**task, "out_dir": tmp_path / "full"})
    with pytest.raises(UserError, match="is a file; give a folder"):
        run({**task, "out_dir": tmp_path / "full" / "thesis.tex"})
    with pytest.raises(UserError, match="holds the model to export"):
        run({**task, "out_dir": parts["native"].parent})
    with pytest.raises(UserError, match=r"format must be one of: auto, llava, native, got 'lava' \(did you mean"):
        run({**task, "out_dir": tmp_path / "x", "format": "lava"})
    with pytest.raises(UserError, match="no checkpoint at"):
        run({**task, "model_path": tmp_path / "none.pt", "out_dir": tmp_path / "x"})
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder, then an older export
        run({**task, "out_dir": tmp_path / "empty"})
    run({**task, "model_path": tmp_path / "empty", "out_dir": tmp_path / "again"})  # an export may be exported
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "empty", "full"]


def test_a_failed_export_leaves_nothing(parts: dict[str, Path], exported: dict[str, Path], tmp_path: Path) -> None:
    run({"type": "export", "model_path": parts["native"], "out_dir": tmp_path / "x"})
    before = (tmp_path / "x" / "config.json").read_bytes()

    def fail(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    for out in ("x", "new"):
        with pytest.raises(OSError, match="No space"):
            export_model.write_folder(tmp_path / out, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "config.json").read_bytes() == before


def test_a_killed_export_leaves_nothing_under_its_name(parts: dict[str, Path], tmp_path: Path, root: Path) -> None:
    """Killed when the weights are written and the config is not."""
    code = (
        "import os, signal, sys, safetensors.torch as st; real = st.save_file\n"
        "def save(*a):\n real(*a); os.kill(os.getpid(), signal.SIGKILL)\n"
        "st.save_file = save; from git_model.tasks.registry import run\n"
        "run({'type': 'export', 'model_path': sys.argv[1], 'out_dir': sys.argv[2]})"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, str(parts["native"]), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = [p.name for p in tmp_path.iterdir()]
    assert left.endswith(".part")
    run({"type": "export", "model_path": parts["native"], "out_dir": tmp_path / "out"})
    assert git_model.load_checkpoint(tmp_path / "out").step == 9


def test_a_damaged_folder_is_told(parts: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run({"type": "export", "model_path": parts["native"], "out_dir": out})
    weights, config = out / "model.safetensors", json.loads((out / "config.json").read_text())
    whole = weights.read_bytes()
    for damaged in (whole[:-1], whole[:1000] + b"\x01" + whole[1001:], b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="was damaged after it was written") as caught:
            git_model.load_checkpoint(out)
        assert caught.value.exit_code == EXIT_NO_CHECKPOINT
    weights.write_bytes(whole)
    other = json.loads(json.dumps(config["run"]))
    other["language"]["small"]["width"] = 64
    deeper = json.loads(json.dumps(config["run"]))
    deeper["language"]["small"]["depth"] = 3
    changes = {"format": (99, "has format 99"), "tied": ({}, "does not fit its architecture .*lm_head"),
               "weights_sha256": (None, "was damaged")}  # fmt: skip
    for change, (value, words) in [
        *changes.items(),
        ("run", (other, "size mismatch")),
        ("run", (deeper, "does not fit")),
    ]:
        (out / "config.json").write_text(json.dumps({**config, change: value}))
        with pytest.raises(UserError, match=words) as caught:
            git_model.load_checkpoint(out)
        assert caught.value.exit_code == EXIT_NO_CHECKPOINT
    (out / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is no folder that the task 'export' wrote"):
        git_model.load_checkpoint(out)


def test_importing_the_package_brings_no_torch(root: Path) -> None:
    code = (
        "import sys, git_model, inference; assert 'torch' not in sys.modules;"
        "from git_model import load_checkpoint; assert 'torch' in sys.modules; assert load_checkpoint.__doc__"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_chekpoint'"):
        _ = git_model.load_chekpoint  # type: ignore[attr-defined]
