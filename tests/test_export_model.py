"""A trained model as a folder: transformers says of a JPEG what the checkpoint says, to the logit and to the letter."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import LLAVAS, NATIVES, PROMPTS, checkpoint, jpeg, llava_case, native_case, openai_file
from PIL import Image
from tiny import collator
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

import git_model
from git_model.batch import CaptionBatch, Target
from git_model.checkpoint import Loaded, load_checkpoint
from git_model.datasets import collate
from git_model.datasets.images import Transform
from git_model.errors import UserError
from git_model.models import hf
from git_model.tasks.registry import run

SIZES = ((80, 64), (64, 64), (40, 120))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(folder: Path, model: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """Run the task; return the folder and what it told."""
    out = folder / "exported"
    return out, run({"type": "export", "model_path": model, "out_dir": out, **options})


def rows(loaded: Loaded, images: list[bytes], prompts: list[str]) -> CaptionBatch:
    """Lay out pictures and prompts as inference does."""
    model, transform = loaded.model, Transform(loaded.model.vision.resolution, loaded.config.data.resize)
    items = [
        collate.Loaded(str(i), (transform(data),), (Target(prompt=prompt, question_id=i),))
        for i, (data, prompt) in enumerate(zip(images, prompts, strict=True))
    ]
    return collator(model, generate=True)(items)


@torch.no_grad()
def own_logits(loaded: Loaded, batch: CaptionBatch) -> Tensor:
    """The checkpoint's logits at every position of a batch."""
    model = loaded.model
    embeds = model.language.embed(batch, model.encode(batch.images))
    return model.language.project(model.language.hidden(embeds, batch))


def own_texts(path: Path, picture: Path, beams: int = 1) -> list[str]:
    """What inference.py says of a picture, for each prompt."""
    task = {"type": "test_git_inference_single_image", "image_path": picture, "model_path": path, "beams": beams}
    return [run({**task, "prompt": prompt, "device": "cpu"})["text"] for prompt in PROMPTS]


@pytest.mark.parametrize("case", LLAVAS)
def test_llava_says_what_the_checkpoint_says(case: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, **llava_case(tmp_path, case))
    out, told = export(tmp_path, path)
    assert (told["format"], "why_not_llava" in told) == ("llava", False)
    loaded = load_checkpoint(path)
    theirs: Any
    theirs, report = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    theirs.eval()
    processor: Any = AutoProcessor.from_pretrained(out)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    files = [jpeg(i, *SIZES[i]) for i in range(3)]
    batch = rows(loaded, files, list(PROMPTS))
    pictures = [Image.open(io.BytesIO(data)) for data in files]
    texts = [f"<image>{prompt}" for prompt in PROMPTS]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=True)

    image_id = theirs.config.image_token_id
    marked = batch.input_ids.masked_fill(batch.image_mask, image_id)
    assert torch.equal(inputs["input_ids"], marked)
    assert torch.equal(inputs["attention_mask"], batch.attention_mask.long())
    pixels = loaded.model.vision.normalise(batch.images)
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=1e-5)

    with torch.no_grad():
        logits = theirs(**inputs, position_ids=batch.positions).logits
    ours, real = own_logits(loaded, batch), batch.attention_mask
    known = [i for i in range(ours.shape[-1]) if i != image_id]
    assert ours[real].std() > 0.1, "logits that differ"
    torch.testing.assert_close(logits[real][:, known], ours[real][:, known], rtol=1e-4, atol=1e-4)
    assert (logits[real][:, image_id] < logits[real][:, known].max(-1).values).all()

    with torch.inference_mode():
        new = theirs.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    said = [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert said == loaded.model.generate(batch)
    picture = tmp_path / "p.jpg"
    picture.write_bytes(files[0])
    for beams in (1, 3):  # through our own tasks, too
        assert own_texts(out, picture, beams) == own_texts(path, picture, beams)


@pytest.mark.parametrize("case", NATIVES)
def test_native_needs_nothing_but_its_folder(case: str, tmp_path: Path) -> None:
    """The encoder's and the decoder's own files are gone when the folder is read."""
    (tmp_path / "parts").mkdir()
    path = checkpoint(tmp_path, **native_case(tmp_path / "parts", case))
    loaded = load_checkpoint(path)
    picture = tmp_path / "p.jpg"
    picture.write_bytes(jpeg(0, 80, 64))
    expected = own_texts(path, picture)
    out, told = export(tmp_path, path)
    assert told["format"] == "native"
    assert told["why_not_llava"]
    shutil.rmtree(tmp_path / "parts")
    path.unlink()

    again = git_model.load_checkpoint(out)
    assert (again.config, again.step, again.metrics) == (loaded.config, 9, {"cider": 0.5})
    theirs, ours = again.model.state_dict(), loaded.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    head = again.model.language.model
    tied = head.get_output_embeddings().weight is head.get_input_embeddings().weight
    assert tied == (head.config.tie_word_embeddings is True)
    assert own_texts(out, picture) == expected

    model: Any = AutoModel.from_pretrained(out)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert type(model) is hf.GitModelForCaptioning
    assert AutoConfig.from_pretrained(out).run["mapper"]["type"] == loaded.config.mapper.type
    image = Image.open(picture).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(out)([image] * 3, return_tensors="pt")["pixel_values"]
    asked = tokenizer(list(PROMPTS), add_special_tokens=False, padding=True, return_tensors="pt")
    asked = {name: asked[name].long() for name in ("input_ids", "attention_mask")}
    batch = rows(loaded, [picture.read_bytes()] * 3, list(PROMPTS))
    with torch.no_grad():
        logits = model(pixels, **asked).logits
    real = batch.attention_mask
    torch.testing.assert_close(logits[real], own_logits(loaded, batch)[real], rtol=1e-4, atol=1e-4)
    assert model.say(model.generate(pixels, **asked)) == expected
    assert model.say(model.generate(pixels[:1])) == expected[:1]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"vision": {"features": "pooled", "layers": []}}, "it reads pooled features.*--output_grid True --layers -2"),
        ({"vision": {"layers": []}}, "the encoder's final norm.*train with --layers -1 or --layers -2"),
        ({"mapper": {"type": "linearLn"}}, "its mapper is 'linearLn'.*one of: linear, mlp2x_gelu"),
        ({"language": {"prefix_attention": "bidirectional"}}, "image tokens see each other.*LLaVA's mask is causal"),
        ({"data": {"resize": "pad"}}, "data.resize pad.*choose crop or squash"),
        ({"language": {"name": "small"}}, "its language model is a gpt2.*hold: llama, mistral, qwen2, qwen3"),
        ({"vision": {"name": "rn"}}, "its image encoder is a ResNet"),
        ({"vision": {"name": "small", "layers": [-1]}}, "its image encoder is the small encoder"),
    ],
)
def test_what_llava_cannot_hold_is_refused(sections: dict[str, Any], words: str, tmp_path: Path) -> None:
    case = llava_case(tmp_path, "openai clip, linear as a pair of GELUs, small llama")
    for section, keys in sections.items():
        case[section] = (
            keys if "small" in keys.values() and section == "language" else {**case.get(section, {}), **keys}
        )
    if case["vision"]["name"] == "rn":
        case["vision"]["name"] = openai_file(tmp_path, "rn")
    path = checkpoint(tmp_path, **case)
    with pytest.raises(UserError, match=rf"can be no LLaVA: .*{words}.*; or choose format native") as caught:
        export(tmp_path, path, format="llava")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir() if "export" in p.name) == []
    out, told = export(tmp_path, path)
    assert told["format"] == "native"
    assert (out / "preprocessor_config.json").exists() == (case.get("data", {}).get("resize") != "pad")
