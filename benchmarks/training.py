"""A training step beside the original's: speed, FLOPs, memory, and the share of the machine's rate it reaches.

    python -m benchmarks.training

Real shapes, random weights: CLIP's ViT-B/32 or ViT-L/14, GPT-2 small (frozen, as in the original), captions of real
length. Both sides train the same weights on the same batch in turn, with the same learning rate, decay and betas.
Ours is what `train.py` runs: the collator, `Run.backward`, `Run.update`. The original's step is in baselines.py,
without its dropout (GPT-2's 0.1, which it leaves on), its loader and its DDP: all of them would cost it more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from benchmarks import harness
from benchmarks.baselines import Original, original_step
from benchmarks.captions import Captions, read_captions
from benchmarks.harness import Ceiling, Options, Result
from benchmarks.report import alone
from git_model import engine, training
from git_model.batch import CaptionBatch, Target
from git_model.config import Config
from git_model.datasets.collate import Loaded
from git_model.models.build import build_model
from git_model.models.git import GitModel
from git_model.optimizer import learning_rate_factor, parameter_groups
from git_model.run import Run
from git_model.schema import from_dict

SHARE = 0.9  # of the ratio that the FLOPs give
RATE = 0.75  # of the machine's measured rate of products
GROWTH = 1.1  # of the time an image takes, from a batch to one four times as big


@dataclass(frozen=True)
class Case:
    """A model to train.

    Args:
        name: of the row.
        vision: encoder and its features.
        mapper: type.
        freeze: parts; the language model is always frozen.
        batch: images of a timed step.
        gate: times as fast as the original.
        memory: times less peak memory; None = told only.
        memory_batch: images of the step whose memory is measured; None = `batch`.
        region: how boxes are read.
    """

    name: str
    vision: dict[str, Any]
    mapper: str
    freeze: tuple[str, ...]
    batch: int
    gate: float
    memory: float | None = None
    memory_batch: int | None = None
    region: str = "none"


CASES = (
    Case("ViT-B/32 pooled, mlp", {"name": "ViT-B/32", "features": "pooled"}, "mlp", ("auto",), 32, 1.05),
    Case("ViT-B/32 grid, linear", {"name": "ViT-B/32", "features": "grid"}, "linear", ("auto",), 16, 1.15),
    Case(
        "frozen ViT-L/14 grid, linear",
        {"name": "ViT-L/14", "features": "grid"},
        "linear",
        ("auto", "vision"),
        4,
        1.12,
        memory=2.0,
        memory_batch=12,
    ),
)


def small_gpt2(quick: bool = False) -> GPT2Config:
    """Return the shape of GPT-2 small; its activation is the one OpenAI's weights come with."""
    sizes: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 50257} if quick else {}
    return GPT2Config(**sizes)


def build(case: Case, captions: Captions, quick: bool = False) -> tuple[GitModel, Config]:
    """Return the model of a case with random weights, by the way that a checkpoint's is built."""
    with tempfile.TemporaryDirectory() as name:
        small_gpt2(quick).save_pretrained(name)
        values = {
            "vision": {**case.vision, "name": "small"} if quick else case.vision,
            "mapper": {"type": case.mapper},
            "region": {"mode": case.region},
            "language": {"name": name},
            "train": {"freeze": list(case.freeze), "lr": 1e-6, "warmup": 0},
        }
        config = from_dict(Config, values)
        return build_model(config, captions.tokenizer, held=("vision", "language")), config


class OurStep:
    """A training step of `Run`, without the data, the saves and the log that it has around it.

    Args:
        model: in training mode from here on.
        config: of the run.
    """

    def __init__(self, model: GitModel, config: Config) -> None:
        run: Any = Run.__new__(Run)
        run.config, run.raw_model = config, model
        run.accelerator = engine.build_accelerator(config)
        run.total_steps, run.step, run.epoch, run.epoch_step = 10**6, 0, 0, 0
        run.sampler = SimpleNamespace(steps_per_epoch=10**6)
        run.guard = training.StepGuard(config.train.max_bad_steps)
        model.train()
        run._prepare()
        self.run, self.collate = run, training.teaching(model, config)

    def __call__(self, items: Sequence[Loaded]) -> float:
        """Collate, and take a step; return its loss."""
        return self.take(self.collate(items))

    def take(self, batch: CaptionBatch) -> float:
        """Take a step; return its loss."""
        loss = self.run.backward([batch])
        self.run.update(loss, [batch])
        return loss


def items(texts: Sequence[str], side: int, seed: int = 0) -> list[Loaded]:
    """Return noise pictures with captions, as the data set hands them to the collator."""
    dice = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (len(texts), 3, side, side), dtype=torch.uint8, generator=dice)
    return [Loaded(str(i), (pictures[i],), (Target(text),)) for i, text in enumerate(texts)]


def same_loss(model: GitModel, original: Original, samples: Sequence[Loaded], config: Config) -> tuple[float, float]:
    """Return both sides' loss on the real tokens of the captions, their ends included: it has to be the same.

    The original's own mean also counts padding, and no end of text by itself.
    """
    batch = training.teaching(model, config)(samples).to(next(model.parameters()).device)
    tokens = model.num_image_tokens
    ids, labels = batch.input_ids[:, tokens:], batch.labels[:, tokens:]
    with torch.no_grad():
        theirs = original.outputs(model.vision.normalise(batch.images), ids, labels).loss
        return float(model(batch)), float(theirs)


def original_optimizer(model: GitModel, config: Config) -> torch.optim.Optimizer:
    """Return torch's AdamW as the original makes it, with our groups' rates and decay."""
    groups = [{k: v for k, v in group.items() if k != "muon"} for group in parameter_groups(model, config.train)]
    optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=(0.9, config.train.beta2))
    factor = learning_rate_factor(config.train, 10**6)
    torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return optimizer


def compare(case: Case, captions: Captions, options: Options) -> list[Result]:
    """Measure one case."""
    model, config = build(case, captions, options.quick)
    original = Original(model, small_gpt2(options.quick))
    ours = OurStep(model, config)
    device = ours.run.accelerator.device
    original.to(device)
    adam = original_optimizer(model, config)
    theirs = original_step(original, adam)

    def sides(images: int) -> tuple[list[str], list[Loaded], dict[str, harness.Side]]:
        """Both steps on the same batch; the original's loader has made its pictures float32 and normalised."""
        texts = captions.batch(2 if options.quick else images)
        samples = items(texts, model.vision.resolution)
        pixels: Tensor = model.vision.normalise(torch.stack([s.images[0] for s in samples]).to(device))
        return texts, samples, {"original": lambda: theirs(pixels, texts), "ours": lambda: ours(samples)}

    texts, samples, timed = sides(case.batch)
    losses = same_loss(model, original, samples, config)
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0], losses
    flops = {name: harness.count_flops(side) for name, side in timed.items()}
    before = harness.machine_ceiling(device)
    warmups = 2 if device.type == "cuda" else 0  # counting was a step of each
    timing = harness.alternate(timed, options.rounds or 2, device, warmups)
    after = harness.machine_ceiling(device)
    ceiling = Ceiling(max(before.flops, after.flops), max(before.bandwidth, after.bandwidth))
    held_texts, _, weighed = sides(case.memory_batch or case.batch)
    facts = {
        "captions": captions.told,
        "caption_tokens": captions.lengths(texts),
        "batch": len(texts),
        "memory_batch": len(held_texts),
        "image_tokens": model.num_image_tokens,
        "losses_on_real_tokens": losses,
        "flops": flops,
        "seconds": timing.seconds,
        "peak_growth": {name: harness.peak_growth(side, device) for name, side in weighed.items()},
        "held": {
            "original": harness.held_bytes(original, adam),
            "ours": harness.held_bytes(model, ours.run.optimizer.optimizer),
        },
    }
    return judge(case, timing, ceiling, facts)


def judge(case: Case, timing: harness.Timing, ceiling: Ceiling, facts: dict[str, Any]) -> list[Result]:
    """Turn what was measured into figures with gates."""
    flops, name = facts["flops"], f"training {case.name}"
    ratio, expected = timing.ratio("original", "ours"), flops["original"] / flops["ours"]
    rates = [flops["ours"] / seconds / ceiling.flops for seconds in timing.seconds["ours"]]
    rate = flops["ours"] / timing.median("ours") / ceiling.flops
    theirs = flops["original"] / timing.median("original") / ceiling.flops
    peak = {side: facts["held"][side] + facts["peak_growth"][side] for side in flops}
    growth, at = facts["peak_growth"], f", batch {facts['memory_batch']}"
    speed = facts["batch"] / timing.median("ours")
    print(
        f"{name}: batch {facts['batch']}, {speed:.2f} images/s, {flops['ours'] / 1e9:.0f} GFLOP of "
        f"{flops['original'] / 1e9:.0f}, {100 * rate:.0f} % of {ceiling.flops / 1e9:.0f} GFLOP/s (original "
        f"{100 * theirs:.0f} %); batch {facts['memory_batch']}: peak {peak['ours'] / 1e6:,.0f} MB of "
        f"{peak['original'] / 1e6:,.0f}",
        flush=True,
    )
    return [
        Result(f"{name}: speed", ratio.median, ratio.low, ratio.high, case.gate, details=facts),
        Result(
            f"{name}: speed / what its FLOPs give",
            ratio.median / expected,
            ratio.low / expected,
            ratio.high / expected,
            SHARE,
            details={"flop_ratio": expected},
        ),
        Result(
            f"{name}: share of the machine's products",
            rate,
            min(rates),
            max(rates),
            RATE,
            unit="of rate",
            details={"ceiling": ceiling.flops, "copy_bytes_per_second": ceiling.bandwidth, "original": theirs},
        ),
        Result(f"{name}: peak memory{at}", peak["original"] / peak["ours"], gate=case.memory, details={"peak": peak}),
        Result(f"{name}: memory of the step alone{at}", growth["original"] / growth["ours"]),
    ]


def run(options: Options) -> list[Result]:
    """Measure every case."""
    captions = read_captions(options.data)
    print(captions.told, flush=True)
    return [result for case in CASES for result in compare(case, captions, options)]


if __name__ == "__main__":
    alone(run, __doc__)
