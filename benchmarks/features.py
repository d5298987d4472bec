"""Epochs over stored features of a frozen encoder beside the original's, which encodes every picture in every epoch.

    python -m benchmarks.features

Both sides start from JPEG photographs with captions and train the same mapper under the same GPT-2 small: the original
by its own loader and step, ours by the feature store (filled before; the time that took is told), batches of like
length, and the step of `train.py`. What is compared is the time an image.
"""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from benchmarks.baselines import Original, original_batches, original_step
from benchmarks.captions import Captions, read_captions
from benchmarks.harness import Options, Result
from benchmarks.report import alone
from benchmarks.training import Case, OurStep, build, original_optimizer, small_gpt2
from git_model.datasets.features import FeatureStore
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset, train_batches
from git_model.datasets.order import GlobalSampler, text_lengths
from git_model.datasets.sources import build_source
from git_model.encoding import encode_once, open_store

SIDE = (640, 480)  # of a photograph


@dataclass(frozen=True)
class Epoch:
    """What is trained, on how many pictures, in batches of how many.

    Args:
        case: the model.
        pictures: of our epoch: enough that captions of like length find each other, as they do in a long run.
        batch: pictures a step.
        sample: of these, how many the original trains on in a round; its time an image does not depend on their number.
        rounds: how often the sides take turns.
    """

    case: Case
    pictures: int
    batch: int
    sample: int
    rounds: int


FROZEN = ("auto", "vision")
B32, L14 = ({"name": name, "features": "pooled"} for name in ("ViT-B/32", "ViT-L/14"))
EPOCHS = (
    Epoch(Case("ViT-B/32 pooled, linear", B32, "linear", FROZEN, 32, 3.0), 512, 32, 64, 2),
    Epoch(Case("ViT-B/32 pooled, mlp", B32, "mlp", FROZEN, 32, 3.0), 128, 32, 32, 2),
    Epoch(Case("ViT-L/14 pooled, mlp", L14, "mlp", FROZEN, 8, 10.0), 8, 8, 8, 2),
    Epoch(Case("ViT-L/14 grid, linear", {**L14, "features": "grid"}, "linear", FROZEN, 4, 2.5), 4, 4, 4, 2),
)


def lay_out(folder: Path, captions: Captions, options: Options, count: int) -> None:
    """Write the original's layout: photographs of COCO where they are at hand, else drawn ones of their size."""
    (folder / "train").mkdir(parents=True)
    photos = sorted((options.data / "coco_val2017_subset" / "images").glob("*.jpg"))
    dice = np.random.default_rng(0)
    for number in range(count):
        target = folder / "train" / f"{number:08d}.jpg"
        if photos:
            target.write_bytes(photos[number % len(photos)].read_bytes())
        else:
            noise = Image.fromarray(dice.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            noise.resize(SIDE, Image.Resampling.BICUBIC).save(target, quality=90)
    texts = random.Random(0).sample(captions.texts, count)
    (folder / "Train_GCC-training.tsv").write_text("".join(f"{text}\thttp://x\n" for text in texts), encoding="utf-8")


class OurEpoch:
    """An epoch over stored features.

    Args:
        step: ours.
        data: the pictures' data set, with its store.
        batch: pictures a step.
    """

    def __init__(self, step: OurStep, data: ImageTextDataset, batch: int) -> None:
        self.step, self.data, self.batch = step, data, batch
        self.lengths = text_lengths(data.source, step.run.raw_model.codec.lengths)
        self.losses: list[float] = []

    def __call__(self) -> None:
        """Train once over all pictures."""
        options = {"seed": 0, "epochs": 1, "lengths": self.lengths, "window": 100}
        sampler = GlobalSampler(len(self.data), self.batch, **options)
        batches = train_batches(self.data, sampler, self.step.collate, workers=0, timeout=0)
        self.losses = [self.step.take(batch) for batch in batches]


def filled(step: OurStep, config: Any, folder: Path, store: Path) -> tuple[ImageTextDataset, FeatureStore, float]:
    """Return the data set, its store with all features in it, and the seconds that took."""
    model, entries = step.run.raw_model, [{"type": "cc3m", "split": "train"}]
    data = ImageTextDataset(build_source(entries, folder), Transform(model.vision.resolution), targets=1)
    config = replace(config, data=replace(config.data, train=tuple(entries), feature_store=str(store), workers=0))
    found = open_store(config, model.vision, data, "train")
    start = time.perf_counter()
    encode_once(found, config, model.vision, data, step.run.accelerator.device)
    return data, found, time.perf_counter() - start


def compare(epoch: Epoch, captions: Captions, options: Options) -> Result:
    """Measure one case."""
    case, count, batch, sample = epoch.case, epoch.pictures, epoch.batch, epoch.sample
    if options.quick:
        count, batch, sample = 4, 2, 2
    model, config = build(case, captions, options.quick)
    original, ours = Original(model, small_gpt2(options.quick)), OurStep(model, config)
    device = ours.run.accelerator.device
    original.to(device)
    step = original_step(original, original_optimizer(model, config))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cc3m"
        lay_out(folder, captions, options, count)
        data, store, seconds = filled(ours, config, folder, Path(name) / "store")
        mean_loss, pictures = _losses(ours, data, store)
        assert abs(mean_loss - pictures) < 2e-3 * pictures, (mean_loss, pictures)
        data.store = store
        epoch_of_ours = OurEpoch(ours, data, batch)

        def theirs() -> None:
            for images, texts in islice(original_batches(folder, batch), sample // batch):
                step(images.to(device), texts)

        rounds = options.rounds or epoch.rounds
        timing = harness.alternate({"original": theirs, "ours": epoch_of_ours}, rounds, device, warmups=0)
        flops = {"original": harness.count_flops(theirs) / sample, "ours": harness.count_flops(epoch_of_ours) / count}
    images = {"original": sample, "ours": count}
    timing = timing.each(images)
    ratio = timing.ratio("original", "ours")
    rates = {side: 1 / timing.median(side) for side in images}
    print(
        f"features {case.name}: {rates['ours']:.1f} images/s, the original {rates['original']:.1f}; FLOPs "
        f"{flops['original'] / flops['ours']:.2f} to 1; encoding took {seconds:.1f} s, {store.bytes / 1e6:.1f} MB; "
        f"loss {mean_loss:.5f}, from pictures {pictures:.5f}",
        flush=True,
    )
    facts = {"images_per_second": rates, "flops_an_image": flops, "fill_seconds": seconds, "store_bytes": store.bytes}
    facts |= {"loss_stored": mean_loss, "loss_from_pictures": pictures, "seconds_an_image": timing.seconds}
    return Result(f"features {case.name}: later epochs", ratio.median, ratio.low, ratio.high, case.gate, details=facts)


@torch.no_grad()
def _losses(step: OurStep, data: ImageTextDataset, store: FeatureStore) -> tuple[float, float]:
    """Return the loss over some pictures by their stored features, and by the pictures."""
    found = []
    for data.store in (store, None):
        items: Any = [data[(0, record)] for record in range(min(4, len(data)))]
        batch = step.collate(items).to(step.run.accelerator.device)
        found.append(float(step.run.raw_model(batch)))
    return found[0], found[1]


def run(options: Options) -> list[Result]:
    """Measure every case."""
    captions = read_captions(options.data)
    return [compare(epoch, captions, options) for epoch in EPOCHS]


if __name__ == "__main__":
    alone(run, __doc__)
