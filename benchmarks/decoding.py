"""Captions beside GIT's loop and beside transformers' batched `generate`, texts compared.

    python -m benchmarks.decoding

Random weights of real shapes: CLIP's ViT-B/32 (49 image tokens) or ViT-B/16 at 256 px (256), GPT-2 small. Against
GIT's loop it is the whole batch task, from a TSV of photographs to a TSV of captions; against `generate` it is
pictures that are decoded already to texts, the encoder included, in one batch on both sides.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from benchmarks import harness
from benchmarks.baselines import Original, git_loop, plain_generate
from benchmarks.captions import Captions, read_captions
from benchmarks.harness import Options, Result
from benchmarks.report import alone
from benchmarks.training import Case, build, small_gpt2
from git_model import training
from git_model.batch import Target
from git_model.datasets.collate import Loaded
from git_model.datasets.images import Transform
from git_model.datasets.records import TSVFile, write_tsv
from git_model.models.git import GitModel
from git_model.models.language import Decoding
from git_model.tasks.registry import run as run_task

NEW = 16  # tokens of a caption


@dataclass(frozen=True)
class Search:
    """Pictures in a batch, beams, and how many times as fast as transformers' `generate` it has to be."""

    vision: dict[str, Any]
    images: int
    beams: int
    gate: float


B32 = {"name": "ViT-B/32", "features": "grid"}
B16 = {"name": "ViT-B/16", "features": "grid", "resolution": 256}
SEARCHES = (Search(B32, 8, 4, 1.3), Search(B16, 4, 4, 2.0), Search(B32, 8, 1, 1.0), Search(B16, 4, 1, 1.0))


def model_of(
    vision: dict[str, Any], captions: Captions, options: Options, region: str = "none"
) -> tuple[GitModel, Any]:
    """Return a random model that says different things of different pictures."""
    if options.quick:  # the small encoder makes a token of every 8 x 8 pixels
        vision = {**vision, "resolution": 64}
    case = Case("", vision, "linear", ("auto",), 0, 0, region=region)
    model, config = build(case, captions, options.quick)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.language.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.08, generator=dice)
    return model.eval().to(options.device), config


def pictures(count: int, side: int) -> torch.Tensor:
    """Return (count,3,side,side) uint8: smooth noise, as unlike each other as photographs."""
    dice = np.random.default_rng(0)
    drawn = []
    for _ in range(count):
        noise = Image.fromarray(dice.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        drawn.append(np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()


def beside_generate(search: Search, captions: Captions, options: Options) -> Result:
    """Measure one batch of captions."""
    model, _ = model_of(search.vision, captions, options)
    original = Original(model, small_gpt2(options.quick)).eval().to(options.device)
    shown = pictures(2 if options.quick else search.images, model.vision.resolution)
    items = [Loaded(str(i), (picture,), (Target(question_id=i),)) for i, picture in enumerate(shown)]
    batch = training.asking(model)(items)
    batch, eos = batch.to(options.device), model.codec.eos_id
    decoding = Decoding(beams=search.beams, max_new_tokens=NEW)
    settings = GenerationConfig(max_new_tokens=NEW, num_beams=search.beams, eos_token_id=eos, pad_token_id=eos)
    said: dict[str, list[str]] = {}

    def ours() -> None:
        said["ours"] = model.generate(batch, decoding)

    @torch.no_grad()
    def theirs() -> None:
        pixels = model.vision.normalise(batch.images)
        ids = plain_generate(original, pixels, [""] * len(items), settings)
        said["generate"] = [model.codec.decode(row) for row in ids]

    timing = harness.alternate({"generate": theirs, "ours": ours}, options.rounds or 2, options.device)
    assert said["ours"] == said["generate"]
    ratio, rate = timing.ratio("generate", "ours"), len(items) / timing.median("ours")
    name = f"captions, {model.num_image_tokens} image tokens, {search.beams} beam(s)"
    flops = {"generate": harness.count_flops(theirs), "ours": harness.count_flops(ours)}
    peak = {"generate": harness.peak_growth(theirs, options.device), "ours": harness.peak_growth(ours, options.device)}
    print(
        f"{name}: {rate:.2f} images/s; FLOPs {flops['generate'] / flops['ours']:.2f} to 1, memory "
        f"{peak['generate'] / peak['ours']:.2f} to 1; {len(items)} of {len(items)} texts equal",
        flush=True,
    )
    facts = {"images_per_second": rate, "flops": flops, "peak_growth": peak, "seconds": timing.seconds}
    told = f"{name}: beside batched generate"
    return Result(told, ratio.median, ratio.low, ratio.high, search.gate, details=facts)


def beside_git(captions: Captions, options: Options) -> Result:
    """Measure the batch task: a TSV of photographs becomes a TSV of captions; GIT's loop does the first ones of it."""
    model, config = model_of(B32, captions, options)
    images = {"git": 2, "ours": 3 if options.quick else 16}
    original = Original(model, small_gpt2(options.quick)).eval().to(options.device)
    said: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = []
        for i, picture in enumerate(pictures(images["ours"], 480)):
            file = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
            rows.append((f"{i:06d}", base64.b64encode(file.getvalue())))
        write_tsv(folder / "images.tsv", rows)
        captioner = _Ready(model, config, options)

        def ours() -> None:
            said["ours"] = captioner.caption(folder / "images.tsv", folder / "out.tsv", images["ours"])

        @torch.no_grad()
        def theirs() -> None:
            transform, texts = Transform(model.vision.resolution), []
            for _, data in islice(TSVFile(folder / "images.tsv"), images["git"]):
                pixels = model.vision.normalise(transform(base64.b64decode(data))[None].to(options.device))
                ids = git_loop(original, pixels, 4, NEW, model.codec.eos_id)
                texts.append(model.codec.decode(ids[0]))
            write_tsv(folder / "git.tsv", [(str(i), json.dumps([{"caption": t}])) for i, t in enumerate(texts)])
            said["git"] = texts

        timing = harness.alternate({"git": theirs, "ours": ours}, options.rounds or 2, options.device, warmups=0)
    assert said["ours"][: images["git"]] == said["git"]
    timing = timing.each(images)
    ratio, rates = timing.ratio("git", "ours"), {side: 1 / timing.median(side) for side in images}
    print(f"TSV, 4 beams: {rates['ours']:.2f} images/s, GIT's loop {rates['git']:.2f}; texts equal", flush=True)
    facts = {"images_per_second": rates, "seconds_an_image": timing.seconds}
    return Result("TSV captions, 4 beams: beside GIT's loop", ratio.median, ratio.low, ratio.high, 10.0, details=facts)


class _Ready:
    """The batch task with its model in memory: GIT's side does not load its own either."""

    def __init__(self, model: GitModel, config: Any, options: Options) -> None:
        from git_model.checkpoint import Loaded as LoadedModel
        from git_model.tasks.captioner import GitCaptioner

        self.captioner = GitCaptioner(LoadedModel(model, config, {}), str(options.device))

    def caption(self, images: Path, out: Path, batch_size: int) -> list[str]:
        """Run the task; return its captions."""
        from git_model.tasks.options import ModelOptions

        for left in out.parent.glob(f"{out.name}*"):
            left.unlink()
        opened, ModelOptions.open = ModelOptions.open, lambda _: self.captioner  # type: ignore[method-assign]
        checked, ModelOptions.check = ModelOptions.check, lambda _: None  # type: ignore[method-assign]
        try:
            task = {"type": "test_git_inference_single_tsv", "image_tsv": images, "out_tsv": out, "model_path": "ready"}
            run_task({**task, "beams": 4, "max_new_tokens": NEW, "batch_size": batch_size, "workers": 0})
        finally:
            ModelOptions.open, ModelOptions.check = opened, checked  # type: ignore[method-assign]
        return [json.loads(row[1])[0]["caption"] for row in TSVFile(out)]


def run(options: Options) -> list[Result]:
    """Measure the task, then batches."""
    captions = read_captions(options.data)
    return [beside_git(captions, options), *(beside_generate(search, captions, options) for search in SEARCHES)]


if __name__ == "__main__":
    alone(run, __doc__)
