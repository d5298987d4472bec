"""Images per second and core that reach the model: this loader, the original's, webdataset's, on the same pictures.

    python benchmarks/loader.py $DATA/rsicd/rsicd-val-*.tar
    python benchmarks/loader.py --photos $DATA/coco_val2017_subset/images

Each side decodes, resizes to 224, crops, and hands over batches of 32, in one process without workers (a core's worth);
the sides take turns, forwards and backwards, and the time is the processor's, so that other work on the machine takes
little of it. The ratio is of the medians, with the smallest and the largest ratio of a round, and of the best rounds.
Ours hands over bytes that the device normalises, the other two float32 that is normalised already, as their pipelines
do; the last line is ours with that done on the CPU, too. 'scaled' is what train.py does with --decode scaled.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from git_model.datasets.collate import Collator
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset, train_batches
from git_model.datasets.order import GlobalSampler
from git_model.datasets.shards import TarShards
from git_model.datasets.sources import ConceptualCaptions, WebDataset
from git_model.tokens import TextCodec, train_tokenizer

SIDE, BATCH = 224, 32
Picture = tuple[str, bytes, bytes]  # name of its shard, JPEG, caption
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def clip_transform(picture: Image.Image) -> torch.Tensor:
    """What openai-clip's transform does: shorter side, centre crop, RGB, tensor, normalise."""
    width, height = picture.size
    scale = SIDE / min(width, height)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    picture = picture.crop((left, top, left + SIDE, top + SIDE)).convert("RGB")
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)
    return (pixels - MEAN) / STD


class OriginalDataset(Dataset[tuple[torch.Tensor, str]]):
    """The original's: a list of captions in memory, a picture opened by its row number."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "Train_GCC-training.tsv").read_text().splitlines()
        self.folder, self.captions = folder, [line.split("\t")[0] for line in lines]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return clip_transform(Image.open(self.folder / "train" / f"{index:08d}.jpg")), self.captions[index]


def from_shards(shards: list[Path]) -> Iterator[Picture]:
    """Yield the name of a shard, and JPEG and caption of each record in it."""
    for shard in shards:
        for record in TarShards([shard], cache=False):
            text = record.members.get("txt") or json.loads(record.members["json"])["captions"][0].encode()
            yield shard.name, record.members["jpg"], text


def from_folder(folder: Path, least: int) -> Iterator[Picture]:
    """Yield the JPEGs of a folder whose longer side has at least so many pixels, as one shard."""
    for path in sorted(folder.rglob("*.jpg")):
        with Image.open(path) as picture:
            large = max(picture.size) >= least
        if large:
            yield "photos.tar", path.read_bytes(), b"a photograph"


def lay_out(pictures: Iterable[Picture], folder: Path) -> tuple[int, list[Path]]:
    """Write the pictures in the original's layout and as shards of .jpg and .txt; return how many, and the shards."""
    (folder / "train").mkdir()
    captions, made = [], []
    for name, shard in itertools.groupby(pictures, key=lambda picture: picture[0]):
        made.append(folder / name)
        with tarfile.open(made[-1], "w") as out:
            for _, jpg, text in shard:
                number = len(captions)
                (folder / "train" / f"{number:08d}.jpg").write_bytes(jpg)
                captions.append(text.decode().splitlines()[0])
                for ending, data in (("jpg", jpg), ("txt", text)):
                    info = tarfile.TarInfo(f"{number:08d}.{ending}")
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))
    (folder / "Train_GCC-training.tsv").write_text("".join(f"{text}\thttp://x\n" for text in captions))
    return len(captions), made


def ours(source: Any, codec: TextCodec, decode: str = "exact", normalise: bool = False) -> Callable[[], Iterator[int]]:
    """Return our training loader over a source."""

    def batches() -> Iterator[int]:
        data = ImageTextDataset(source, Transform(SIDE, decode=decode), targets=1)
        sampler = GlobalSampler(len(data), BATCH, seed=0, epochs=1)
        for batch in train_batches(data, sampler, Collator(codec, 1), workers=0, timeout=0):
            if normalise:
                _ = (batch.images.float().div(255) - MEAN) / STD
            yield len(batch.images)

    return batches


def sides(shards: list[Path], folder: Path, codec: TextCodec) -> dict[str, Callable[[], Iterator[int]]]:
    """Return what is timed, by name."""
    pattern = [str(path) for path in shards]

    def original() -> Iterator[int]:
        for pictures, _ in DataLoader(OriginalDataset(folder), batch_size=BATCH, shuffle=True):
            yield len(pictures)

    def web() -> Iterator[int]:
        data = webdataset.WebDataset(pattern, shardshuffle=False).shuffle(1000).decode("pil").to_tuple("jpg", "txt")
        for pictures, _ in DataLoader(data.map_tuple(clip_transform, str).batched(BATCH), batch_size=None):
            yield len(pictures)

    files, tar = ConceptualCaptions(folder), WebDataset(folder, "*.tar")
    return {
        "original (files)": original,
        "webdataset (tar)": web,
        "git_model (files)": ours(files, codec),
        "git_model (files, scaled)": ours(files, codec, "scaled"),
        "git_model (tar)": ours(tar, codec),
        "git_model (tar, normalised on the CPU)": ours(tar, codec, normalise=True),
    }


def main() -> None:
    """Time, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="*", type=Path, help="tar shards with .jpg, and .txt or .json with captions")
    parser.add_argument("--photos", type=Path, help="a folder of .jpg instead")
    parser.add_argument("--least", type=int, default=500, help="pixels that the longer side of a photo has at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if bool(given.shards) == bool(given.photos):
        parser.error("give shards, or a folder with --photos")
    torch.set_num_threads(1)
    codec = TextCodec(train_tokenizer(["a picture"], 300), 300, 64)
    pictures = from_folder(given.photos, given.least) if given.photos else from_shards(given.shards)
    with tempfile.TemporaryDirectory() as name:
        count, shards = lay_out(pictures, Path(name))
        runs = sides(shards, Path(name), codec)
        rates: dict[str, list[float]] = {side: [] for side in runs}
        for number in range(-1, given.rounds):  # the first one is not counted
            for side in list(runs)[:: -1 if number % 2 else 1]:
                started, seen = time.process_time(), sum(runs[side]())
                assert seen == count, (side, seen, count)
                rates[side] += [seen / (time.process_time() - started)] if number >= 0 else []
    base = rates["original (files)"]
    print(f"{count} pictures, {given.rounds} rounds, one thread")
    for side, found in rates.items():
        middle, each = statistics.median(found), [a / b for a, b in zip(found, base, strict=True)]
        print(
            f"{side:<40} {middle:7.0f} images/s  ({min(found):.0f} to {max(found):.0f})"
            f"  {middle / statistics.median(base):5.2f} x  ({min(each):.2f} to {max(each):.2f};"
            f" best rounds {max(found) / max(base):.2f})"
        )
    if given.json:
        given.json.write_text(json.dumps(rates, indent=2) + "\n")


if __name__ == "__main__":
    main()
