"""What the loop needs and is not the loop: the data, the order of steps, accounting, guarding."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import nn

from git_model.batch import BadSample, Batch
from git_model.config import Config
from git_model.datasets.collate import Collator
from git_model.datasets.collate_vectors import TextVectors, VectorCollator
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset
from git_model.datasets.order import GlobalSampler, text_lengths
from git_model.datasets.sources import Source
from git_model.errors import EXIT_BUG, EXIT_TOO_MANY_BAD, UserError
from git_model.models.git import GitModel
from git_model.models.parts import PartedModel
from git_model.tokens import TextCodec
from git_model.weights import adapters_of

log = logging.getLogger(__name__)
B = TypeVar("B", bound=Batch)


def training_data(config: Config, source: Source, resolution: int) -> ImageTextDataset:
    """Return the training set: drawn targets, augmentation."""
    transform = Transform(resolution, config.data.resize, config.data.augment, config.data.decode)
    return ImageTextDataset(
        source,
        transform,
        targets=config.data.targets,
        captions=config.data.captions,
        seed=config.train.seed,
        cache=config.data.cache,
        augment=True,
        regions=config.region.mode,
    )


def data_order(config: Config, source: Source, codec: TextCodec | None, rank: int, world: int) -> GlobalSampler:
    """Return the order of a run's records for one of its processes."""
    options, window = config.train, config.data.group_by_length
    together = config.data.pack and config.data.targets == 0
    weights = config.data.weights
    sizes = [len(part) for part in getattr(source, "sources", [source])]
    return GlobalSampler(
        len(source),
        options.batch_size,
        seed=options.seed,
        epochs=options.epochs,
        rank=rank,
        world=world,
        accumulation=options.accumulation,
        block=config.data.shuffle_block,
        lengths=text_lengths(source, codec.lengths, together) if window and codec else None,
        window=window,
        mixture=list(zip(sizes, weights, strict=True)) if weights else None,
    )


def describe_parts(model: PartedModel) -> str:
    """Return one line: what is trained, what is frozen, with parameter counts."""
    words = []
    for part in model.parts:
        module: nn.Module = getattr(model, part)
        how = "frozen" if part in model.frozen else "trained"
        if added := adapters_of(module):
            how = f"frozen, with {sum(p.numel() for p in added.values()):,} trained in adapters,"
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        words.append(f"{part} {how} {parameter_count(module):,} ({size / 1e6:,.1f} MB)")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = f"; {model.num_image_tokens} tokens an image" if isinstance(model, GitModel) else ""
    return f"parameters: {', '.join(words)}; {trained:,} trained{tokens}"


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters; 4-bit ones are stored two a byte."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in module.parameters())
    return sum(torch.Size(shape).numel() for shape in shapes)


def steps_of(batches: Iterable[B], accumulation: int) -> Iterator[list[B]]:
    """Yield the micro-batches of one optimiser step at a time."""
    iterator = iter(batches)
    while micro := list(islice(iterator, accumulation)):
        yield micro


def next_position(sampler: GlobalSampler, epoch: int, step: int) -> tuple[int, int]:
    """Return (epoch, step in the epoch) of the step after this one."""
    return (epoch, step + 1) if step + 1 < sampler.steps_per_epoch else (epoch + 1, 0)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, rank): nothing to save, nothing to forget to restore."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


class SampleLedger:
    """Counts samples used and skipped, by reason with examples, and stops the run above a limit.

    Args:
        limit: largest share of unusable samples.
    """

    EXAMPLES = 20
    PATIENCE = 100  # samples before the share means anything, unless all are bad

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.ok = 0
        self.truncated = 0
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    @property
    def bad(self) -> int:
        """Samples skipped so far."""
        return self.reasons.total()

    @property
    def rows(self) -> int:
        """Samples seen so far: used and skipped."""
        return self.ok + self.bad

    def exceeds(self, share: float) -> bool:
        """Whether more than `share` of the samples is unusable."""
        return self.bad > share * self.rows

    def add(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            UserError: more than the limit is unusable (exit code 3).
        """
        self.ok += len(batch.images)
        self.truncated += batch.truncated
        for bad in batch.skipped:
            self._note(bad)
        if self.exceeds(self.limit) and (self.rows >= self.PATIENCE or self.ok == 0):
            raise UserError(
                f"{self.bad} of {self.rows} samples are unusable, more than --max_bad {self.limit}: {self.summary()}",
                EXIT_TOO_MANY_BAD,
            )

    def _note(self, bad: BadSample) -> None:
        reason = bad.reason.split(":")[0] if bad.reason.startswith("prompt") else bad.reason
        self.reasons[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < self.EXAMPLES:
            examples.append(bad.key)
        if self.reasons[reason] <= 3:
            log.warning("sample %s skipped: %s", bad.key, bad.reason)

    def summary(self) -> str:
        """Return the reasons with counts and an example each."""
        return ", ".join(f"{r} x{n} (e.g. {self.examples[r][0]})" for r, n in self.reasons.most_common()) or "none"

    def state(self) -> dict[str, Any]:
        """Return rows in = ok + sum(reasons), for the run's report and for resuming."""
        reasons, examples = dict(self.reasons), {r: list(keys) for r, keys in self.examples.items()}
        return {"rows": self.rows, "ok": self.ok, "reasons": reasons, "examples": examples, "truncated": self.truncated}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state."""
        self.ok, self.truncated = state["ok"], state["truncated"]
        self.reasons, self.examples = Counter(state["reasons"]), state["examples"]


def merge_ledgers(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the sum of several ranks' `SampleLedger.state()`."""
    whole = SampleLedger(1.0)
    for state in states:
        whole.ok += state["ok"]
        whole.truncated += state["truncated"]
        whole.reasons.update(state["reasons"])
        for reason, keys in state["examples"].items():
            kept = whole.examples.setdefault(reason, [])
            kept.extend(keys[: SampleLedger.EXAMPLES - len(kept)])
    return whole.state()


class StepGuard:
    """Decides whether a step may touch the weights, and when to give up.

    Args:
        limit: non-finite steps in a row until the run stops.
    """

    FP16_PATIENCE = 50  # the scaler finds its scale by overflowing a few times

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_a_row = 0
        self.overflows = 0
        self.skipped = 0

    def allows(self, loss: float, norm: float, keys: Iterable[str], scaled: bool) -> bool:
        """Return whether to step.

        Args:
            loss: of the whole step, over all ranks.
            norm: of the unscaled gradient, over all ranks.
            keys: this rank's samples of the step.
            scaled: fp16: an overflowing gradient with a finite loss is the scaler's business.

        Raises:
            UserError: `limit` non-finite steps in a row; names the samples (exit code 70).
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self.in_a_row = self.overflows = 0
            return True
        self.skipped += 1
        if scaled and math.isfinite(loss):
            self.overflows += 1
        else:
            self.in_a_row += 1
        if self.in_a_row >= self.limit or self.overflows >= self.FP16_PATIENCE:
            names = ", ".join(list(keys)[:32])
            raise UserError(
                f"{max(self.in_a_row, self.overflows)} steps in a row had a non-finite loss ({loss}) or gradient "
                f"({norm}); the weights are those of the last good step. Samples of this step: {names}",
                EXIT_BUG,
            )
        log.warning("step skipped: loss %s, gradient norm %s; samples %s", loss, norm, ", ".join(list(keys)[:8]))
        return False


def teaching(model: PartedModel, config: Config, vectors: TextVectors | None = None) -> Collator | VectorCollator:
    """Return the collator of training; `vectors` are those of a regressor's texts."""
    if not isinstance(model, GitModel):
        return VectorCollator(vectors, config.regressor.dim)
    return Collator(model.codec, model.num_image_tokens, pack=config.data.pack, **_reading(model))


def asking(model: GitModel) -> Collator:
    """Return the collator of asking: prompts of a picture share its tokens if the language model can do that."""
    return Collator(model.codec, model.num_image_tokens, pack=model.language.branches, generate=True, **_reading(model))


def _reading(model: GitModel) -> dict[str, Any]:
    return {"regions": model.reads_regions, "longest": model.language.max_positions}
