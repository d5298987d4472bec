"""Records -> decoded samples -> batches, by worker processes whose deaths are told by name."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from git_model.batch import BadSample, Batch, Target
from git_model.datasets.collate import Loaded
from git_model.datasets.features import FeatureStore, chosen
from git_model.datasets.files import RecordError, SampleError
from git_model.datasets.images import ImageError, Transform, decode_image
from git_model.datasets.order import GlobalSampler, Index
from git_model.datasets.regions import carried, cut_out, ignored
from git_model.datasets.sources import Source
from git_model.errors import EXIT_BUG, UserError

B = TypeVar("B", bound=Batch)


class ImageTextDataset(Dataset[Loaded | BadSample]):
    """Records -> decoded samples; what cannot be used comes back as BadSample, never as a substitute.

    The choice of targets and the augmentation are functions of (seed, epoch, record): the same on any number of
    workers and ranks.

    Args:
        source: the records.
        transform: the one image transform.
        targets: how many captions or questions of an image per visit; 0 = all.
        captions: at most this many of them captions, where there are questions too; 0 = no limit.
        seed: of the draws.
        cache: keep decoded pictures in memory (of each worker).
        augment: draw augmentations (training).
        regions: how the model reads boxes, see `RegionConfig.mode`: they are carried along, cut out, or ignored.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        targets: int = 0,
        captions: int = 0,
        seed: int = 0,
        cache: bool = False,
        augment: bool = False,
        regions: str = "none",
    ) -> None:
        self.source = source
        self.transform = transform
        self.targets = targets
        self.captions = captions
        self.seed = seed
        self.augment = augment and transform.augment != "none"
        self.regions = regions
        self.cache: dict[int, Any] | None = {} if cache else None
        self.at: torch.Tensor | None = None
        self.store: FeatureStore | None = None  # features in place of pictures, which are not read then

    def __len__(self) -> int:
        return len(self.source)

    def watch(self, workers: int) -> None:
        """Let each worker say which record it is at: a dead one cannot."""
        self.at = torch.full((workers,), -1, dtype=torch.int64).share_memory_()

    def __getitem__(self, index: Index) -> Loaded | BadSample:
        epoch, record = index
        if self.at is not None and (worker := get_worker_info()) is not None:
            self.at[worker.id] = record
        try:
            sample = self.source[record] if self.store is None else self.source.said(record)
        except RecordError as error:
            return BadSample(error.key if isinstance(error, SampleError) else f"record {record}", error.reason)
        if sample.features:
            features = tuple(torch.from_numpy(np.asarray(f, np.float32)) for f in sample.features)
            wanted = None if sample.wanted is None else torch.from_numpy(np.asarray(sample.wanted, np.float32))
            return Loaded(sample.key, features, sample.targets, wanted)
        try:
            rng = np.random.default_rng([self.seed, epoch, record])
            targets = self._drawn(sample.targets, rng)
            if self.store is None:
                images, targets = self._look(record, sample.images, targets, rng if self.augment else None)
            else:
                images = (torch.from_numpy(self.store.get(record, sample)),)
        except (ImageError, SampleError) as error:
            return BadSample(sample.key, error.reason)
        return Loaded(sample.key, images, targets)

    def _drawn(self, targets: tuple[Target, ...], rng: np.random.Generator) -> tuple[Target, ...]:
        """Return this visit's targets, in the order they have in the record."""
        captions = [i for i, target in enumerate(targets) if target.question_id is None]
        kept = range(len(targets))
        if self.captions and self.captions < len(captions) < len(targets):
            chosen = {*rng.choice(captions, self.captions, replace=False).tolist()}
            kept = [i for i in kept if i in chosen or targets[i].question_id is not None]
        if self.targets and len(kept) > self.targets:
            kept = np.sort(rng.choice(kept, self.targets, replace=False)).tolist()
        return tuple(targets[i] for i in kept)

    def _look(
        self, record: int, files: Sequence[bytes], targets: tuple[Target, ...], rng: np.random.Generator | None
    ) -> tuple[tuple[Any, ...], tuple[Target, ...]]:
        """Return the transformed pictures, and the targets with boxes in their frames."""
        if self.regions == "crop":
            pictures = self._kept(record, files, decode_image)
            return cut_out(targets, pictures, lambda picture: self.transform(picture, rng))
        if rng is None:
            seen = self._kept(record, files, self.transform.framed)
        else:
            pictures = files if self.cache is None else self._kept(record, files, decode_image)
            seen = tuple(self.transform.framed(picture, rng) for picture in pictures)
        images = tuple(image for image, _ in seen)
        if self.regions == "ignore":
            return images, ignored(targets)
        return images, carried(targets, [frame for _, frame in seen])

    def _kept(self, record: int, files: Sequence[bytes], make: Callable[[bytes], Any]) -> tuple[Any, ...]:
        """Return what is made of each file; the cache keeps what does not change between visits."""
        if self.cache is None:
            return tuple(map(make, files))
        if record not in self.cache:
            self.cache[record] = tuple(map(make, files))
        return self.cache[record]


def train_batches(
    dataset: ImageTextDataset, sampler: GlobalSampler, collator: Callable[..., B], *, workers: int, timeout: int
) -> Iterator[B]:
    """Yield the training batches that are left.

    A worker that dies or hangs is a RuntimeError of torch's, here or wherever the process is: see `worker_error`.
    """
    if workers:
        dataset.watch(workers)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=outlive_first_sigterm if workers else None,
    )
    yield from loader


def outlive_first_sigterm(_worker: int) -> None:
    """Let the first SIGTERM pass: a cluster sends it to every process, and the main one still has to save."""

    def pass_once(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, pass_once)


def worker_error(dataset: ImageTextDataset, error: Exception) -> UserError | None:
    """Return what to tell of a failed worker, None where none failed.

    torch names a process; a person wants to know the records that the workers were at.
    """
    said = str(error)
    hung = "DataLoader timed out" in said
    if dataset.at is None or not (hung or "DataLoader worker" in said or isinstance(error, ConnectionError | EOFError)):
        return None
    reading = ", ".join(f"record {r}" for r in dataset.at.tolist() if r >= 0) or "nothing yet"
    what = "gave nothing for data.worker_timeout seconds" if hung else "died (killed, or out of memory)"
    hint = "; more shared memory (/dev/shm) or fewer --workers may help" if "shm" in said or "bus error" in said else ""
    return UserError(f"a data worker {what}; the workers were reading: {reading}{hint}", EXIT_BUG)


@contextmanager
def naming_failures(dataset: ImageTextDataset) -> Iterator[None]:
    """Tell of a dead data worker by the records it was at: torch raises it wherever the main process is.

    Raises:
        UserError: instead of torch's error.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again, anywhere
        if isinstance(error, UserError) or (told := worker_error(dataset, error)) is None:
            raise
        raise told from error


def eval_batches(
    dataset: ImageTextDataset, collator: Callable[..., B], *, batch_size: int, limit: int | None = None
) -> Iterator[B]:
    """Yield the records in their own order, at most `limit` of them (spread evenly over the set)."""
    records = list(chosen(len(dataset), limit))
    for start in range(0, len(records), batch_size):
        yield collator([dataset[(0, record)] for record in records[start : start + batch_size]])
