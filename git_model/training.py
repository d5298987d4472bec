"""What the loop needs and is not the loop: the engine, the data, the order of steps, accounting, guarding."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from git_model.architecture import PARTS
from git_model.batch import BadSample, CaptionBatch
from git_model.config import Config, TrainConfig
from git_model.datasets.collate import Collator
from git_model.datasets.images import Transform
from git_model.datasets.loader import GlobalSampler, ImageTextDataset
from git_model.datasets.sources import Source
from git_model.errors import EXIT_BUG, EXIT_TOO_MANY_BAD, UserError
from git_model.models.git import GitModel

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return the engine: one path for CPU, one card, several cards.

    Raises:
        UserError: a precision this machine has no arithmetic for.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    cuda = torch.cuda.is_available()
    if config.precision == "fp16" and not cuda:
        raise UserError("--precision fp16 needs a GPU (its scaler has nothing to do on a CPU); choose fp32 or bf16")
    # emulated bf16 would "work" on a V100, slowly and in fp32
    if config.precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16 arithmetic; choose --precision fp16")
    # unused branches (an attention pool beside grid features) have no gradient
    # the others wait while the main process validates: longer than NCCL's ten minutes
    handlers: list[Any] = [
        DistributedDataParallelKwargs(find_unused_parameters=True),
        InitProcessGroupKwargs(timeout=timedelta(hours=3)),
    ]
    return Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        cpu=not cuda,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=handlers,
        step_scheduler_with_optimizer=False,
    )


def training_data(config: Config, source: Source, resolution: int) -> ImageTextDataset:
    """Return the training set: drawn targets, augmentation."""
    transform = Transform(resolution, config.data.resize, config.data.augment)
    return ImageTextDataset(
        source,
        transform,
        targets=config.data.targets,
        captions=config.data.captions,
        seed=config.train.seed,
        cache=config.data.cache,
        augment=True,
    )


def describe_parts(model: GitModel) -> str:
    """Return one line: what is trained, what is frozen, with parameter counts."""
    words = []
    for part in PARTS:
        module: nn.Module = getattr(model, part)
        count = sum(p.numel() for p in module.parameters())
        words.append(f"{part} {'frozen' if part in model.frozen else 'trained'} {count:,}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"parameters: {', '.join(words)}; {trained:,} trained; {model.num_image_tokens} tokens an image"


def steps_of(batches: Iterable[CaptionBatch], accumulation: int) -> Iterator[list[CaptionBatch]]:
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

    def add(self, batch: CaptionBatch) -> None:
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


def collators(model: GitModel, config: Config) -> tuple[Collator, Collator]:
    """Return the collators of training (right padding, packed) and of asking (left padding)."""
    codec, tokens = model.codec, model.num_image_tokens
    return Collator(codec, tokens, pack=config.data.pack), Collator(codec, tokens, generate=True)
