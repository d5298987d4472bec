"""Images per second of the batch task, beside a plain Hugging Face `generate` loop on the same weights.

    python benchmarks/inference.py                      # a ViT and a GPT-2 of base width, four layers each, random
    python benchmarks/inference.py --images 256 --device cuda

Both sides read the same TSV and must say the same; the ratio is of two runs in one process.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from git_model.checkpoint import load_checkpoint, save_checkpoint
from git_model.config import Config
from git_model.datasets.images import Transform
from git_model.datasets.records import TSVFile, write_tsv
from git_model.models.build import build_model
from git_model.schema import from_dict
from git_model.tasks.captioner import pick_device
from git_model.tasks.registry import run
from git_model.tokens import train_tokenizer

NEW_TOKENS = 16


def make(folder: Path, images: int, width: int, depth: int) -> None:
    """Write a random checkpoint and a TSV of noise pictures."""
    values = {
        "vision": {
            "name": "small",
            "features": "grid",
            "resolution": 224,
            "small": {"stem": [64, 128, 256, 512, width], "width": width, "depth": depth, "heads": width // 64},
        },
        "mapper": {"type": "grid"},
        "language": {
            "name": "small",
            "small": {"architecture": "gpt2", "width": width, "depth": depth, "heads": width // 64, "vocab_size": 400},
        },
        "train": {"freeze": ["nothing"]},
    }
    config = from_dict(Config, values)
    model = build_model(config, train_tokenizer(["a picture of a thing"], 400))
    for parameter in model.language.parameters():  # noise that says different things of different pictures
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.08)
    save_checkpoint(folder / "model.pt", model, config, step=0, epoch=0)
    dice = np.random.default_rng(0)
    rows = []
    for number in range(images):
        file = io.BytesIO()
        noise = dice.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG")
        rows.append((f"{number:06d}", base64.b64encode(file.getvalue())))
    write_tsv(folder / "images.tsv", rows)


@torch.inference_mode()
def plain(folder: Path, beams: int, device: str) -> list[str]:
    """One picture after the other, as a script would do it."""
    loaded = load_checkpoint(folder / "model.pt")
    model, codec = loaded.model.to(device), loaded.model.codec
    transform, texts = Transform(model.vision.resolution, loaded.config.data.resize), []
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, num_beams=beams, eos_token_id=codec.eos_id, pad_token_id=codec.pad_id
    )
    for _, data in TSVFile(folder / "images.tsv"):
        picture = transform(base64.b64decode(data)).unsqueeze(0).to(device)  # (1,3,H,W)
        tokens = model.mapper(model.vision(model.vision.normalise(picture)))  # (1,K,E)
        ids = model.language.model.generate(inputs_embeds=tokens, generation_config=settings)
        texts.append(codec.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    return texts


def ours(folder: Path, beams: int, batch_size: int, device: str, workers: int) -> list[str]:
    """The task, from TSV to TSV."""
    out = folder / f"{beams}_{batch_size}.tsv"
    task = {"type": "test_git_inference_single_tsv", "image_tsv": folder / "images.tsv", "out_tsv": out}
    task |= {"model_path": folder / "model.pt", "beams": beams, "batch_size": batch_size, "workers": workers}
    run({**task, "max_new_tokens": NEW_TOKENS, "device": device})
    return [json.loads(row[1])[0]["caption"] for row in TSVFile(out)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.images, options.width, options.depth)
        sizes = f"{options.images} images, width {options.width}, depth {options.depth}"
        print(f"{sizes}, {device}, {torch.get_num_threads()} threads")
        print(f"{'beams':>5} {'batch':>6} {'images/s':>9} {'x plain':>8}  same text")
        plain(folder, 1, device)  # warms both sides up
        for beams in options.beams:
            _line(options.images, beams, None, plain, (folder, beams, device))
            for batch in options.batch:
                _line(options.images, beams, batch, ours, (folder, beams, batch, device, options.workers))


_plain: dict[int, tuple[float, list[str]]] = {}


def _line(images: int, beams: int, batch: int | None, side: Any, arguments: tuple[Any, ...]) -> None:
    start = time.perf_counter()
    texts = side(*arguments)
    rate = images / (time.perf_counter() - start)
    _plain.setdefault(beams, (rate, texts))  # the plain loop comes first
    against, said = _plain[beams]
    same = sum(a == b for a, b in zip(texts, said, strict=True))
    print(f"{beams:>5} {batch or 'plain':>6} {rate:>9.2f} {rate / against:>8.2f}  {same}/{images}")


if __name__ == "__main__":
    main()
