"""What a training step costs as batches and data sets grow: linear in images, flat in rows.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --rows 10000 1000000      # 5 GB of disk

Linear: seconds an image, of a step of 16 pictures beside one of 4 (the same four, four times: the same padding).
Flat: seconds to read a shuffled batch of 32 from a TSV pair and to take a step of a tiny model on it, which hides
little of the reading; in turn from the small set and from the big one. scale.py tells what opening a set takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, scale
from benchmarks.captions import read_captions
from benchmarks.harness import Options, Result
from benchmarks.report import alone
from benchmarks.training import CASES, GROWTH, OurStep, build, items
from git_model.batch import CaptionBatch
from git_model.config import Config
from git_model.datasets.collate import Collator
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset, train_batches
from git_model.datasets.order import GlobalSampler
from git_model.datasets.sources import build_source
from git_model.models.build import build_model
from git_model.schema import from_dict
from git_model.tokens import train_tokenizer

FEW, TIMES = 4, 4
BATCHES = 20  # of 32, a turn
TINY: dict[str, Any] = {
    "vision": {
        "name": "small",
        "features": "grid",
        "resolution": 32,
        "small": {"stem": [8, 16, 16], "width": 16, "depth": 1, "heads": 2},
    },
    "mapper": {"type": "linear"},
    "language": {"name": "small", "small": {"width": 32, "depth": 1, "heads": 2, "vocab_size": 300}},
    "train": {"freeze": ["nothing"]},
}


def linear_in_images(options: Options) -> Result:
    """Return how much longer an image takes in a batch four times as big."""
    captions, case = read_captions(options.data), CASES[1]
    model, config = build(case, captions, options.quick)
    step = OurStep(model, config)
    few = items(captions.batch(FEW), model.vision.resolution)
    many = few * TIMES
    sides = {"few": lambda: step(few), "many": lambda: step(many)}
    timing = harness.alternate(sides, options.rounds or 4, step.run.accelerator.device)
    growth = timing.ratio("many", "few")
    details = {"images": [len(few), len(many)], "seconds": timing.seconds}
    values = (growth.median / TIMES, growth.low / TIMES, growth.high / TIMES)
    name = f"training {case.name}: time of an image, {len(many)} beside {len(few)}"
    return Result(name, *values, gate=GROWTH, at_most=True, details=details)


def turn(folder: Path, step: OurStep, collate: Collator, rows: int, count: int) -> Callable[[], int]:
    """Return a call that reads `count` batches of a set and takes their steps; the next call goes on after them."""
    entry = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv"}
    data = ImageTextDataset(build_source([entry], folder), Transform(32), targets=1)
    assert len(data) == rows
    sampler = GlobalSampler(rows, 32, seed=0, epochs=10**6)
    batches: Iterator[CaptionBatch] = train_batches(data, sampler, collate, workers=0, timeout=0)

    def some() -> int:
        seen = 0
        for batch in islice(batches, count):
            step.take(batch)
            seen += len(batch.images)
        return seen

    return some


def flat_in_rows(options: Options) -> Result:
    """Return how much longer a batch and its step take from the big set than from the small one."""
    config = from_dict(Config, TINY)
    model = build_model(config, train_tokenizer(["a small picture"], 300))
    step = OurStep(model, config)
    small, big = (200, 2000) if options.quick else options.rows
    with tempfile.TemporaryDirectory() as name:
        sides: dict[str, Callable[[], int]] = {}
        for rows in (small, big):
            folder = Path(name) / str(rows)
            folder.mkdir()
            scale.write_tsvs(folder, rows)
            sides[str(rows)] = turn(folder, step, step.collate, rows, 2 if options.quick else BATCHES)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny products: a second thread waits more than it works
        timing = harness.alternate(sides, options.rounds or 7, step.run.accelerator.device)
        torch.set_num_threads(threads)
    growth = timing.ratio(str(big), str(small))
    details = {"batches": BATCHES, "seconds": timing.seconds}
    title = f"training: time of a step, {big:,} rows beside {small:,}"
    return Result(title, growth.median, growth.low, growth.high, GROWTH, True, details=details)


def run(options: Options) -> list[Result]:
    """Measure both."""
    return [linear_in_images(options), flat_in_rows(options)]


if __name__ == "__main__":
    alone(run, __doc__)
