"""The benchmarks measure what they say: known FLOPs, known memory, and other sides that agree where they should."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, GPT2Config

from git_model.batch import CaptionBatch
from git_model.config import Config
from git_model.datasets.collate import Loaded
from git_model.datasets.images import Transform
from git_model.models import openai_clip
from git_model.models.build import build_model
from git_model.models.git import GitModel
from git_model.models.language import Decoding
from git_model.schema import from_dict

sys.path.insert(0, str(ROOT))
from benchmarks import baselines, harness, training
from benchmarks.captions import LONGEST, SHORTEST, read_captions
from benchmarks.harness import Result
from benchmarks.report import report, table

TEXTS = ("a red dog on the grass", "two small blue houses near some green trees", "people", "the red house")


def test_sides_take_turns_and_neither_always_comes_first() -> None:
    calls: list[str] = []
    sides = {name: (lambda name=name: calls.append(name)) for name in ("a", "b")}
    timing = harness.alternate(sides, rounds=3, warmups=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert [len(times) for times in timing.seconds.values()] == [3, 3]


def test_a_ratio_is_the_middle_of_the_rounds_ratios() -> None:
    timing = harness.Timing({"other": [2.0, 30.0, 9.0], "ours": [1.0, 10.0, 2.0]})
    ratio = timing.ratio("other", "ours")
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.5), "not 9 / 2, the ratio of the medians"


def test_flops_of_products_and_of_the_backward_passes_that_are_needed() -> None:
    x, layer = torch.randn(5, 7, requires_grad=True), nn.Linear(7, 11)
    once = 2 * 5 * 7 * 11
    assert harness.count_flops(lambda: x @ layer.weight.T) == once
    assert harness.count_flops(lambda: layer(x).sum().backward()) == 3 * once
    layer.requires_grad_(False)
    assert harness.count_flops(lambda: layer(x).sum().backward()) == 2 * once, "frozen weights have no gradient"


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_is_counted(masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, 10, 4, requires_grad=True) for _ in range(3))
    mask = torch.zeros(2, 1, 10, 10) if masked else None
    product = 2 * 2 * 3 * 10 * 10 * 4
    assert harness.count_flops(lambda: F.scaled_dot_product_attention(q, k, v, mask)) == 2 * product
    both = harness.count_flops(lambda: F.scaled_dot_product_attention(q, k, v, mask).sum().backward())
    assert both == 2 * product + 5 * product, "the backward pass computes the scores again"


def test_peak_memory_counts_what_autograd_keeps() -> None:
    def let_go() -> None:
        a = torch.empty(1_000_000)
        b = torch.empty(2_000_000)
        del a
        _ = torch.empty(500_000), b

    assert harness.peak_growth(let_go) == 4 * 3_000_000

    x = torch.randn(1_000_000, requires_grad=True)
    kept = harness.peak_growth(lambda: x.exp().sin().cos())  # each keeps its input or its output
    free = harness.peak_growth(lambda: x.detach().exp().sin().cos())
    assert kept == 4 * 3_000_000
    assert free == 4 * 2_000_000
    assert harness.peak_growth(lambda: x.sum()) < 1000, "what was there before is not counted"


def test_held_memory_counts_shared_weights_once() -> None:
    layer, other = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    other.weight = layer.weight
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert harness.held_bytes(layer, other) == 400
    assert 800 <= harness.held_bytes(optimizer) <= 900, "two moments"


@pytest.fixture
def clip_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A CLIP ViT and a GPT-2 of their real architectures, tiny."""
    monkeypatch.setitem(openai_clip.ARCHITECTURES, "ViT-T/16", openai_clip.Architecture(24, 32, 2, 64, 16))
    ids = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **ids).save_pretrained(tmp_path)

    def make(features: str, mapper: str, **language: Any) -> tuple[GitModel, Config]:
        values = {
            "vision": {"name": "ViT-T/16", "features": features},
            "mapper": {"type": mapper},
            "language": {"name": str(tmp_path), **language},
            "data": {"max_text_tokens": 50},
            "train": {"lr": 1e-3, "warmup": 0},
        }
        config = from_dict(Config, values)
        model = build_model(config, tiny.byte_tokenizer(), held=("vision", "language"))
        dice = torch.Generator().manual_seed(1)
        for parameter in model.language.parameters():
            if parameter.ndim >= 2:
                parameter.data.normal_(0, 0.3, generator=dice)
        return model, config

    return make


def inputs(model: GitModel) -> tuple[list[Loaded], Tensor]:
    """Samples for ours, normalised pictures for the others."""
    samples = training.items(TEXTS, model.vision.resolution)
    return samples, model.vision.normalise(torch.stack([s.images[0] for s in samples]))


def asked(model: GitModel, samples: list[Loaded]) -> CaptionBatch:
    return tiny.collator(model, generate=True)(samples)


@pytest.mark.parametrize(("features", "mapper"), [("pooled", "mlp"), ("grid", "linear")])
def test_the_original_says_the_same_of_real_tokens(clip_model: Any, features: str, mapper: str) -> None:
    model, config = clip_model(features, mapper)
    original = baselines.Original(model)
    ours = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in original.parameters()} <= ours, "the same weights, not copies"
    assert {p.requires_grad for p in original.decoder.parameters()} == {False}
    assert {p.requires_grad for p in original.encoder.parameters()} == {True}
    samples, pixels = inputs(model)
    torch.testing.assert_close(original.prefix(pixels), model.encode(torch.stack([s.images[0] for s in samples])))
    loss, theirs = training.same_loss(model, original, samples, config)
    assert loss == pytest.approx(theirs, rel=1e-5)
    whole = original(pixels, TEXTS)
    length = model.num_image_tokens + max(len(text.encode()) for text in TEXTS)
    assert whole.logits.shape == (len(TEXTS), length, 300), "logits of every position"
    assert whole.loss.item() != pytest.approx(loss, rel=1e-3), "its own loss counts padding"


def test_both_steps_train_what_is_not_frozen(clip_model: Any) -> None:
    model, config = clip_model("pooled", "mlp")
    original = baselines.Original(model)
    samples, pixels = inputs(model)
    ours = training.OurStep(model, config)
    theirs = baselines.original_step(original, training.original_optimizer(model, config))
    for step in (lambda: ours(samples), lambda: theirs(pixels, TEXTS)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses = [step() for _ in range(3)]
        assert losses[2] < losses[0]
        moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"vision", "mapper"}


def test_the_originals_batches_are_ours_normalised(clip_model: Any, tmp_path: Path) -> None:
    model, _ = clip_model("pooled", "mlp")
    (tmp_path / "train").mkdir()
    rows = [Image.effect_noise((300, 240), 60).convert("RGB") for _ in TEXTS]
    for number, picture in enumerate(rows):
        picture.save(tmp_path / "train" / f"{number:08d}.jpg")
    (tmp_path / "Train_GCC-training.tsv").write_text("".join(f"{text}\thttp://x\n" for text in TEXTS))
    ((pixels, captions),) = baselines.original_batches(tmp_path, len(TEXTS))
    order = [TEXTS.index(caption) for caption in captions]
    assert sorted(order) == [0, 1, 2, 3]
    transform = Transform(224)
    ours = [transform((tmp_path / "train" / f"{number:08d}.jpg").read_bytes()) for number in order]
    torch.testing.assert_close(pixels, model.vision.normalise(torch.stack(ours)))


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_decoding_says_the_same(clip_model: Any, beams: int, bidirectional: bool) -> None:
    model, _ = clip_model("grid", "linear", prefix_attention="bidirectional" if bidirectional else "causal")
    model.eval()
    original, (samples, pixels) = baselines.Original(model), inputs(model)
    end = model.codec.eos_id
    ours = model.generate(asked(model, samples), Decoding(beams=beams, max_new_tokens=12))
    slow = baselines.git_loop(original, pixels, beams, 12, end, bidirectional)
    assert [model.codec.decode(row) for row in slow] == ours
    assert len(set(ours)) > 1, "different pictures, different texts"
    if not bidirectional:
        settings = GenerationConfig(max_new_tokens=12, num_beams=beams, eos_token_id=end, pad_token_id=end)
        batched = baselines.plain_generate(original, pixels, [""] * len(TEXTS), settings)
        assert [model.codec.decode(row) for row in batched] == ours
        assert original.caption(pixels, settings) == ours


def test_made_captions_have_the_lengths_they_claim(tmp_path: Path) -> None:
    captions = read_captions(tmp_path)
    assert captions.told.startswith("captions: made")
    lengths = captions.lengths(list(captions.texts))
    assert SHORTEST <= min(lengths) <= max(lengths) <= LONGEST
    assert sum(lengths) / len(lengths) == pytest.approx(12.03, abs=0.3)
    assert captions.batch(8) == captions.batch(8)


def test_the_report_tells_what_missed_its_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result("fast", 1.3, 1.2, 1.4, gate=1.25),
        Result("slow", 1.1, 1.0, 1.2, gate=1.25),
        Result("growth", 1.05, gate=1.1, at_most=True),
        Result("told", 12.0, unit="images/s", details={"seconds": [1.0, 2.0]}),
        Result("text only", None, details={"text": "as printed"}),
    ]
    assert [r.passed for r in results] == [True, False, True, None, None]
    lines = table(results).splitlines()
    assert "MISSED" in lines[2]
    assert sum("MISSED" in line for line in lines) == 1
    report(results, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "benchmarks.json").read_text())
    assert [r["name"] for r in written["results"]] == ["fast", "slow", "growth", "told", "text only"]
    assert written["machine"]["torch"] == torch.__version__
    assert (tmp_path / "out" / "benchmarks.png").stat().st_size > 1000
    assert "slow" in capsys.readouterr().out
