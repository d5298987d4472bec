"""The order of a run: which record comes at which step, a function of seed and epoch alone; lengths of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from git_model.datasets.files import RecordError
from git_model.datasets.sources import Source

Index = tuple[int, int]  # (epoch, record)
BLOCKS_TOGETHER = 16  # whose records are mixed with each other: few enough to stay in a node's page cache
TEXTS_TOGETHER = 4096  # records whose texts a tokenizer counts in one call


class GlobalSampler(Sampler[list[Index]]):
    """Yields each micro-batch's records of this rank, from one order that depends on (seed, epoch) alone.

    Step s of an epoch takes the positions [s*G, (s+1)*G) of the epoch's permutation, G = batch_size * world *
    accumulation; micro-batches and ranks cut that stretch in order. So one big batch, accumulation and several
    ranks see the same samples at the same step. The last step of an epoch may be short: some of its micro-batches
    are then empty.

    Args:
        size: records.
        batch_size: records a rank and micro-batch.
        seed: of the order.
        epochs: how many to yield.
        rank: of this process.
        world: number of processes.
        accumulation: micro-batches a step.
        start: (epoch, step) to begin at.
        block: records that are read together; 0 = any order.
        lengths: of the records' texts, in tokens; None = whatever order of lengths comes.
        window: steps whose records are sorted by length, so that those of a step are of a length; the steps of a
            window then come in any order.
        mixture: (records, weight) of each source, the records being joined in this order; None = every record once an
            epoch. A source's share of an epoch is its weight's; from epoch to epoch it goes on where it was, so that
            none of its records comes twice before all others came.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        epochs: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        start: tuple[int, int] = (0, 0),
        block: int = 0,
        lengths: np.ndarray | None = None,
        window: int = 0,
        mixture: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.epochs = epochs
        self.rank = rank
        self.world = world
        self.accumulation = accumulation
        self.start = start
        self.block = block
        self.lengths, self.window, self.mixture = lengths, window, mixture
        self.step_size = batch_size * world * accumulation
        self.steps_per_epoch = -(-size // self.step_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return the records of an epoch: a permutation, or what the mixture draws."""
        rng = np.random.default_rng([self.seed, epoch])
        order = self._drawn(rng) if self.mixture is None else rng.permutation(self._mixed(epoch, self.mixture))
        if self.lengths is None or not self.window:
            return order
        whole = self.size - self.size % self.step_size  # the short last step stays what it is
        for start in range(0, whole, self.window * self.step_size):
            part = order[start : min(start + self.window * self.step_size, whole)]
            steps = part[np.argsort(self.lengths[part], kind="stable")].reshape(-1, self.step_size)
            part[:] = steps[rng.permutation(len(steps))].reshape(-1)
        return order

    def _drawn(self, rng: np.random.Generator) -> np.ndarray:
        kind = np.int32 if self.size < 2**31 else np.int64  # 4 bytes a record in every process
        if not self.block:
            return rng.permutation(np.arange(self.size, dtype=kind))
        starts = rng.permutation(np.arange(0, self.size, self.block))
        order = np.empty(self.size, kind)
        filled = 0
        for first in range(0, len(starts), BLOCKS_TOGETHER):
            ranges = [np.arange(s, min(s + self.block, self.size)) for s in starts[first : first + BLOCKS_TOGETHER]]
            drawn = rng.permutation(np.concatenate(ranges))
            order[filled : filled + len(drawn)] = drawn
            filled += len(drawn)
        return order

    def _mixed(self, epoch: int, mixture: Sequence[tuple[int, float]]) -> np.ndarray:
        whole = self.size * np.cumsum([weight for _, weight in mixture]) / sum(weight for _, weight in mixture)
        counts = np.diff(np.rint(whole).astype(int), prepend=0)  # of each source, `size` together
        found, offset = [], 0
        for number, ((records, _), count) in enumerate(zip(mixture, counts.tolist(), strict=True)):
            first, left = divmod(epoch * count, records)
            rounds = range(first, first + -(-(left + count) // records))
            orders = [np.random.default_rng([self.seed, number, turn]).permutation(records) for turn in rounds]
            if orders:
                found.append(offset + np.concatenate(orders)[left : left + count])
            offset += records
        return np.concatenate(found)

    def __len__(self) -> int:
        done = self.start[0] * self.steps_per_epoch + self.start[1]
        return (self.epochs * self.steps_per_epoch - done) * self.accumulation

    def __iter__(self) -> Iterator[list[Index]]:
        """Yield lists of (epoch, record)."""
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            order = self.order(epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.steps_per_epoch):
                for micro in range(self.accumulation):
                    block = (step * self.accumulation + micro) * self.world + self.rank
                    records = order[block * self.batch_size : (block + 1) * self.batch_size]
                    yield [(epoch, int(record)) for record in records]


def text_lengths(source: Source, count: Callable[[Sequence[str]], Sequence[int]], together: bool = False) -> np.ndarray:
    """Return the tokens of each record's texts: of one on average, or of all `together`. No picture is read.

    Records that cannot be read count 0; they are reported when they are drawn.

    Args:
        source: of the records.
        count: texts -> tokens of each; it is asked for many at a time.
        together: a record's texts share a row.
    """
    lengths = np.zeros(len(source), np.float32)
    for start in range(0, len(source), TEXTS_TOGETHER):
        texts: list[str] = []
        owners: list[int] = []
        shares: list[float] = []
        for record in range(start, min(start + TEXTS_TOGETHER, len(source))):
            try:
                targets = source.said(record).targets
            except RecordError:
                continue
            said = [text for t in targets for text in (t.prompt, t.text) if text]
            texts += said
            owners += [record] * len(said)
            shares += [1.0 if together else 1 / len(targets)] * len(said)
        np.add.at(lengths, owners, np.multiply(shares, count(texts)))
    return lengths
