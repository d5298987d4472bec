"""A trained model as a folder: transformers says of a JPEG what the checkpoint says, to the logit and to the letter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import exporting
import pytest
import torch
from exporting import PROMPTS, checkpoint, decoder_folder, encoder_folder, jpeg, jpeg_bytes, openai_file
from PIL import Image
from tiny import captions, collator
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from git_model.batch import CaptionBatch, Target
from git_model.checkpoint import Loaded, load_checkpoint
from git_model.datasets import collate
from git_model.datasets.images import Transform
from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.tasks.registry import run

SIZES = ((80, 64), (64, 64), (40, 120))
GRID = {"features": "grid", "resolution": 64}


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


def llava_cases(folder: Path) -> dict[str, dict[str, Any]]:
    """Sections of configs that LLaVA can hold."""
    llama = {"architecture": "llama", "depth": 2, "heads": 4}
    return {
        "openai clip, linear, small llama": {
            "vision": {"name": openai_file(folder), "features": "grid", "layers": [-2], "resolution": 96},
            "mapper": {"type": "linear"},
            "language": {"name": "small", "small": {**llama, "width": 32}},
        },
        "openai clip, linear as a pair of GELUs, small llama": {
            "vision": {"name": openai_file(folder), **GRID, "layers": [-1]},
            "mapper": {"type": "linear"},
            "language": {"name": "small", "small": {**llama, "width": 136}},
            "data": {"resize": "squash"},
        },
        "clip of several layers, mlp2x_gelu, llama": {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "resolution": 96, "layers": [3, 1]},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "llama")},
        },
        "siglip, mlp2x_gelu, llama of the newer tokenizer": {
            "vision": {"name": encoder_folder(folder, "siglip"), "features": "grid", "layers": [-2], "resolution": 96},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "llama", modern=True, tie_word_embeddings=True)},
        },
        "siglip, linear, mistral": {
            "vision": {"name": encoder_folder(folder, "siglip"), **GRID, "layers": [-1]},
            "mapper": {"type": "linear"},
            "language": {"name": decoder_folder(folder, "mistral")},
        },
        "clip, mlp2x_gelu, qwen2 with spare rows": {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "layers": [-2]},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "qwen2", vocab_size=320, tie_word_embeddings=True)},
        },
        "clip, linear, qwen3": {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "layers": [-1]},
            "mapper": {"type": "linear"},
            "language": {"name": decoder_folder(folder, "qwen3")},
        },
    }


CASES = (
    "openai clip, linear, small llama",
    "openai clip, linear as a pair of GELUs, small llama",
    "clip of several layers, mlp2x_gelu, llama",
    "siglip, mlp2x_gelu, llama of the newer tokenizer",
    "siglip, linear, mistral",
    "clip, mlp2x_gelu, qwen2 with spare rows",
    "clip, linear, qwen3",
)


@pytest.mark.parametrize("case", CASES)
def test_llava_says_what_the_checkpoint_says(case: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, **llava_cases(tmp_path)[case])
    out, told = export(tmp_path, path)
    assert (told["format"], "why_not_llava" in told) == ("llava", False)
    loaded = load_checkpoint(path)
    theirs, processor = AutoModelForImageTextToText.from_pretrained(out).eval(), AutoProcessor.from_pretrained(out)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    files = [jpeg_bytes(i, *SIZES[i]) for i in range(3)]
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
    picture = jpeg(tmp_path / "p.jpg", 1, 80, 64)
    for beams in (1, 3):  # through our own tasks, too
        assert own_texts(out, picture, beams) == own_texts(path, picture, beams)
