"""Pictures with prompts: CSVs and DiffusionDB; groups of prompts that are near; splits that never part them."""

from __future__ import annotations

import csv
import logging
import pickle
import random
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import png

from git_model.batch import BadSample, Target
from git_model.datasets import groups
from git_model.datasets.files import SampleError
from git_model.datasets.groups import near_across, near_pairs, prompt_groups, split_groups
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset
from git_model.datasets.prompt_files import read_names, read_rows
from git_model.datasets.prompt_sources import DiffusionDb, PromptPictures
from git_model.datasets.sources import build_source
from git_model.errors import UserError
from git_model.models.text import SentenceEncoder
from git_model.tasks.registry import run

REAL = {"diffusiondb_gateway6": 6, "sd_i2p_kaggle7": 7}


def put(folder: Path, *names: str) -> None:
    """Write pictures of random colours; their bytes differ by name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(sum(name.encode())))


def write_csv(path: Path, rows: Sequence[Sequence[str]], head: Sequence[str] = ("image", "prompt")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return path


def read_pairs(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["image", "prompt"]
    return rows


def write_metadata(path: Path, names: Sequence[str], prompts: Sequence[str | None], **columns: Any) -> Path:
    """Write a table with DiffusionDB's thirteen columns and types."""
    count = len(names)
    told = {
        "image_name": pa.array(names),
        "prompt": pa.array(prompts, pa.string()),
        "part_id": pa.array(columns.get("part_id", [1] * count), pa.uint16()),
        "seed": pa.array([2026845913] * count, pa.uint32()),
        "step": pa.array([50] * count, pa.uint16()),
        "cfg": pa.array([7.0] * count, pa.float32()),
        "sampler": pa.array([8] * count, pa.uint8()),
        "width": pa.array([512] * count, pa.uint16()),
        "height": pa.array([512] * count, pa.uint16()),
        "user_name": pa.array(["c2f288a2" * 8] * count),
        "timestamp": pa.array([0] * count, pa.timestamp("ms", tz="UTC")),
        "image_nsfw": pa.array(columns.get("image_nsfw", [0.1] * count), pa.float32()),
        "prompt_nsfw": pa.array(columns.get("prompt_nsfw", [0.01] * count), pa.float32()),
    }
    pq.write_table(pa.table(told), path, row_group_size=max(2, count // 3))
    return path


def keys(source: Any) -> list[str]:
    return [source.said(i).key for i in range(len(source))]


# ----------------------------------------------------------------------------------------------------------- real ones
@pytest.mark.parametrize("name", REAL)
def test_real_pairs(reference_data: Path, name: str) -> None:
    folder = reference_data / "data" / name
    source = build_source([{"type": "prompts", "prompts": "prompts.csv", "images": "images"}], folder)
    with (folder / "prompts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert len(source) == len(rows) == REAL[name]
    for index, (image, prompt) in enumerate(rows):
        sample = source[index]
        assert sample.key == image.removesuffix(".png")
        assert sample.images == ((folder / "images" / f"{sample.key}.png").read_bytes(),)
        assert sample.targets == (Target(prompt.strip()),)
        assert source.said(index) == type(sample)(sample.key, (), sample.targets)
    assert list(source.texts()) == [prompt.strip() for _, prompt in rows]
    loaded = ImageTextDataset(source, Transform(32))[0, 0]
    assert not isinstance(loaded, BadSample)
    assert loaded.images[0].shape == (3, 32, 32)


def test_real_pairs_as_diffusiondb(reference_data: Path, tmp_path: Path) -> None:
    folder = reference_data / "data" / "diffusiondb_gateway6"
    rows = read_rows(folder / "prompts.csv")
    names, prompts = zip(*rows.pairs(), strict=True)
    write_metadata(tmp_path / "metadata.parquet", names, prompts)
    by_csv = PromptPictures(folder, "prompts.csv", "images")
    source = DiffusionDb(tmp_path, "metadata.parquet", str(folder / "images"))
    assert [source[i] for i in range(6)] == [by_csv[i] for i in range(6)]


# ----------------------------------------------------------------------------------------------------- CSV and folder
def test_pictures_of_a_csv(tmp_path: Path) -> None:
    put(tmp_path / "images", "a.png", "b.webp", "c.v2.jpg", "d.JPG", "sub/e.png", "f")
    put(tmp_path, "outside.png", "images.png")
    rows = [
        ("a.png", "  a cat, \n digital art "),
        ("b", "two"),
        ("c.v2", "three"),
        ("d.JPG", "four"),
        ("sub/e", "five"),
        ("f", "six"),
        ("gone.png", "seven"),
        ("gone2", "eight"),
        ("a.jpeg.png", ""),
        ("blank", " \t"),
        ("../outside.png", "nine"),
        ("sub/../../outside", "ten"),
        (str(tmp_path / "outside.png"), "eleven"),
        (".", "twelve"),
        ("nul\0.png", "thirteen"),
        ("x" * 300, "fourteen"),
        ("sub", "fifteen"),
    ]
    write_csv(tmp_path / "p.csv", rows)
    source = PromptPictures(tmp_path, "p.csv", "images")
    assert len(source) == len(rows)
    assert [source[i].targets[0].text for i in range(6)] == [
        "a cat, \n digital art",
        "two",
        "three",
        "four",
        "five",
        "six",
    ]
    files = ("a.png", "b.webp", "c.v2.jpg", "d.JPG", "sub/e.png", "f")
    assert [source[i].images[0] for i in range(6)] == [(tmp_path / "images" / name).read_bytes() for name in files]
    assert [source.said(i).key for i in range(6)] == ["a", "b", "c.v2", "d", "sub/e", "f"]
    data = ImageTextDataset(source, Transform(32))
    found = [data[0, i] for i in range(6, len(rows))]
    assert [(bad.key, bad.reason) for bad in found if isinstance(bad, BadSample)] == [
        ("gone", "missing"),
        ("gone2", "missing"),
        ("a.jpeg", "no_prompt"),
        ("blank", "no_prompt"),
        ("../outside", "bad_name"),
        ("sub/../../outside", "bad_name"),
        (str(tmp_path / "outside"), "bad_name"),
        (".", "bad_name"),
        ("nul\0", "bad_name"),
        ("x" * 300, "unreadable: File name too long"),
        ("sub", "missing"),
    ]
    assert len(list(source.texts())) == len(rows) - 2, "those of empty prompts"
    with pytest.raises(IndexError):
        source[len(rows)]
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == source[0], "worker processes that are spawned get a copy"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image,text\na,b\n", "has the columns image, text; wanted: prompt, and one of imgId, image"),
        ("image,prompt\na,b\nc,d\na.png,e\n", "'a' is there twice"),
        ("image,prompt\n", "holds no prompt"),
        ("image,prompt\na\n", "line 2: a name or a prompt is missing"),
        ("image,prompt\n,b\n", "line 2: a name or a prompt is missing"),
        ("image,prompt\n.png,b\n", "the name of record 0 is missing"),
        ('image,prompt\na,"b', "cannot read the prompts of"),
        ("", "has the columns none"),
    ],
)
def test_what_is_no_csv_of_prompts(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        PromptPictures(tmp_path, "p.csv", "images")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    write_csv(tmp_path / "p.csv", [("a", "b")])
    with pytest.raises(UserError, match=r"no image folder at .*nowhere"):
        PromptPictures(tmp_path, "p.csv", "nowhere")
    with pytest.raises(UserError, match=r"no prompt CSV file at .*q\.csv"):
        PromptPictures(tmp_path, "q.csv", ".")
    with pytest.raises(UserError, match="no DiffusionDB metadata file"):
        DiffusionDb(tmp_path, "metadata.parquet", ".")
    with pytest.raises(UserError, match=r"cannot read the prompts of 'none\.parquet'"):
        read_rows(Path("none.parquet"))
    with pytest.raises(UserError, match=r"unknown key 'nfsw' of source 'diffusiondb' .did you mean 'nsfw'"):
        build_source([{"type": "diffusiondb", "metadata": "m", "images": "i", "nfsw": 1}], tmp_path)


# ---------------------------------------------------------------------------------------------------------- DiffusionDB
def test_both_layouts_of_diffusiondb(tmp_path: Path) -> None:
    names = ["a.png", "b.png", "c.webp", "gone.png", "../p.png", "e.png"]
    prompts = ["one ", "two", "three", "four", "five", None]
    put(tmp_path, "images/part-000001/a.png", "images/part-002000/b.png", "images/c.webp", "flat/a.png", "p.png")
    entry = {"type": "diffusiondb", "metadata": "metadata.parquet", "images": "images"}
    write_metadata(tmp_path / "metadata.parquet", names, prompts, part_id=[1, 2000, 2, 3, None, 1])
    source = build_source([entry], tmp_path)
    assert len(source) == 6
    files = ("part-000001/a.png", "part-002000/b.png", "c.webp")
    assert [source[i].images[0] for i in range(3)] == [(tmp_path / "images" / name).read_bytes() for name in files]
    assert [source[i].key for i in range(3)] == ["a", "b", "c"]
    assert [source[i].targets for i in range(3)] == [(Target(text),) for text in ("one", "two", "three")]
    for index, reason in ((3, "missing"), (4, "bad_name"), (5, "no_prompt")):
        with pytest.raises(SampleError) as caught:
            source[index]
        assert caught.value.reason == reason
    assert list(source.texts()) == ["one", "two", "three", "four", "five"]
    assert build_source([{**entry, "images": "flat"}], tmp_path)[0].images == ((tmp_path / "flat/a.png").read_bytes(),)
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    pq.write_table(pa.table({"image_name": ["a.png"], "prompt": ["one"]}), tmp_path / "metadata.parquet")
    assert build_source([{**entry, "images": "flat", "nsfw": 2}], tmp_path)[0].key == "a", "no scores and no parts"


def test_nsfw_and_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"{letter}.png" for letter in "abcdefg"]
    write_metadata(
        tmp_path / "m.parquet",
        names,
        [f"prompt {name}" for name in names],
        image_nsfw=[0.1, 0.3, 2.0, 0.2, None, 1.0, 0.2],
        prompt_nsfw=[0.0, 0.0, 0.0, 0.9, 0.1, 0.1, float("nan")],
        part_id=range(7),
    )
    for nsfw, left in ((2, "a b c d e f g"), (1.0, "a b d f"), (0.9, "a b d"), (0.3, "a b"), (0.299, "a")):
        assert " ".join(keys(DiffusionDb(tmp_path, "m.parquet", ".", nsfw))) == left, nsfw
    assert DiffusionDb(tmp_path, "m.parquet", ".", 1.0).rows.parts.tolist() == [0, 1, 3, 5]  # type: ignore[union-attr]
    caplog.set_level(logging.INFO)
    (tmp_path / "ids.txt").write_text("\ufeffd\n\n c.png \r\na.PNG\nz\n")
    assert read_names(tmp_path / "ids.txt") == ["d", "c", "a", "z"]
    source = DiffusionDb(tmp_path, "m.parquet", ".", ids="ids.txt")
    assert list(source.texts()) == ["prompt a.png", "prompt d.png"], "in the metadata's order"
    assert "1 of the 4 names to keep are not in it" in caplog.text
    assert "m.parquet: 5 of 7 records are left out (nsfw above 1 or not told: 3; not among the ids: 4)" in caplog.text
    write_csv(tmp_path / "val.csv", [("g.png", "x"), ("b", "y")])
    assert keys(DiffusionDb(tmp_path, "m.parquet", ".", 2, "val.csv")) == ["b", "g"]
    (tmp_path / "few.txt").write_text("c\n")
    with pytest.raises(UserError, match="has nothing left: 7 of 7 records are left out"):
        DiffusionDb(tmp_path, "m.parquet", ".", ids="few.txt")
    (tmp_path / "few.txt").write_text("\n")
    with pytest.raises(UserError, match=r"few\.txt' holds no name"):
        DiffusionDb(tmp_path, "m.parquet", ".", ids="few.txt")
    for wrong in (-0.1, 2.5, float("nan"), "much", True):
        with pytest.raises(UserError, match="nsfw must be a number from 0"):
            DiffusionDb(tmp_path, "m.parquet", ".", wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"image": ["a"], "prompt": ["b"]}, "has no column image_name, image_nsfw, prompt_nsfw; it has image, prompt"),
        ({"image_name": ["a"], "prompt": [["b"]]}, "holds list<.*> where large_string is wanted"),
        ({"image_name": ["a"], "prompt": ["b"], "image_nsfw": ["much"]}, "holds string where float is wanted"),
        ({"image_name": ["a.png", "a.webp"], "prompt": ["b", "c"]}, "'a' is there twice"),
        ({"image_name": ["a", None], "prompt": ["b", "c"]}, "the name of record 1 is missing"),
        ({"image_name": ["a"], "prompt": [b"\xff"]}, "holds binary where large_string is wanted"),
        ({"image_name": [], "prompt": []}, "has nothing left"),
    ],
)
def test_what_is_no_metadata(tmp_path: Path, columns: dict[str, list[Any]], told: str) -> None:
    if "image_name" in columns:
        zeros = [0.0] * len(columns["image_name"])
        columns = {"image_nsfw": zeros, "prompt_nsfw": zeros, **columns}
    pq.write_table(pa.table(columns), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=told):
        DiffusionDb(tmp_path, "m.parquet", ".")
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot read the prompts of"):
        DiffusionDb(tmp_path, "m.parquet", ".")


def test_many_rows_are_compact(tmp_path: Path) -> None:
    count = 200_000
    names = [f"{number:032x}.png" for number in range(count)]
    prompts = [f"prompt {number} " + "of a cat in the rain " * 5 for number in range(count)]
    letters = sum(map(len, names)) + sum(map(len, prompts))
    write_metadata(tmp_path / "m.parquet", names, prompts, part_id=[n // 1000 for n in range(count)])
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in names[::2]))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    start = time.perf_counter()
    source = DiffusionDb(tmp_path, "m.parquet", ".")
    seconds = time.perf_counter() - start
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count
    assert seconds < 15, "a fraction of a second on a free core"
    assert pa.total_allocated_bytes() - before < letters * 1.25
    assert kept < 2e6, "the parts' numbers"
    assert peak < 50e6
    assert source.said(count - 1).targets == (Target(prompts[-1].strip()),)
    half = DiffusionDb(tmp_path, "m.parquet", ".", ids="ids.txt")
    assert len(half) == count // 2
    assert half.said(70_001).targets[0].text == prompts[140_002].strip()
    assert sum(1 for _ in half.texts()) == count // 2


# --------------------------------------------------------------------------------------------------------------- groups
def at(*degrees: float) -> np.ndarray:
    """Return directions in the plane: cosines are those of the angles between."""
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def same(labels: np.ndarray) -> list[int]:
    """Return labels numbered as they come."""
    return [labels.tolist().index(label) for label in labels.tolist()]


def test_groups_of_the_same_text() -> None:
    texts = ["A cat", "a  cat\n", "a dog", " A CAT", "a dog", "straße", "STRASSE"]
    assert same(prompt_groups(texts, None)) == [0, 0, 2, 0, 2, 5, 5]
    assert prompt_groups([], None).shape == (0,)
    assert prompt_groups(texts, None).dtype == np.int64


@pytest.mark.parametrize("block", [1, 2, 3, 4, 2048])
def test_groups_by_hand(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(groups, "BLOCK", block)
    # 20 degrees: cosine 0.94; 40: 0.77
    vectors = at(0, 100, 40, 180, 20, 120, 280) * np.array([[1], [5], [0.1], [1], [2], [1], [1]])
    assert same(prompt_groups(list("abcdefg"), vectors)) == [0, 1, 0, 3, 0, 1, 6], "a-e-c, through e; b-f"
    assert same(prompt_groups(list("abcdefg"), vectors, near=0.95)) == [0, 1, 2, 3, 4, 5, 6]
    assert same(prompt_groups(list("abcdefD"), vectors)) == [0, 1, 0, 3, 0, 1, 3], "the same text with any vector"
    joined = at(0, 90, 180, 10, 190)
    assert same(prompt_groups(["x", "X", "y", "z", "w"], joined)) == [0, 0, 2, 0, 2], "through either vector of x"
    edge = np.array([[1, 0], [0.9, 0.19**0.5], [0, 0], [0, 0]])
    assert same(prompt_groups(list("abcd"), edge)) == [0, 1, 2, 3], (
        "0.9 is not above 0.9, and nothing is near to nothing"
    )
    assert same(prompt_groups(list("abcd"), edge, 0.9 - 1e-6)) == [0, 0, 2, 3]
    assert same(prompt_groups(list("abcd"), np.ones((4, 3)), 1)) == [0, 1, 2, 3]
    assert same(prompt_groups(list("abcd"), np.ones((4, 3), np.float32), 0.999)) == [0, 0, 0, 0]


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 8))
    vectors = (centres[rng.integers(0, 12, 97)] + rng.normal(size=(97, 8)) * 0.35).astype(np.float32)
    texts = [str(n) for n in range(97)]
    unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    near = np.triu(np.round(unit @ unit.T, 9) > 0.9, 1)
    reached = np.eye(97, dtype=bool) | near | near.T
    for _ in range(7):
        reached |= reached @ reached
    slow = reached.argmax(axis=1)  # the first of each group
    assert 3 < len(set(slow.tolist())) < 90
    for block in (1, 7, 32, 97, 2048):
        monkeypatch.setattr(groups, "BLOCK", block)
        assert same(prompt_groups(texts, vectors)) == slow.tolist(), block
        found = {pair for left, right in near_pairs(vectors, 0.9) for pair in zip(left, right, strict=True)}
        assert found == set(zip(*np.nonzero(near), strict=True))
        across = {
            pair
            for left, right in near_pairs(vectors[:40], 0.9, vectors[40:])
            for pair in zip(left, right, strict=True)
        }
        assert across == set(zip(*np.nonzero(near[:40, 40:]), strict=True))


def test_groups_with_wrong_vectors() -> None:
    with pytest.raises(UserError, match=r"vectors of shape \(2, 3\) for 3 texts"):
        prompt_groups(["a", "b", "c"], np.ones((2, 3)))
    with pytest.raises(UserError, match="the vector of row 1 is not finite"):
        prompt_groups(["a", "b"], np.array([[1.0], [np.nan]]))


# --------------------------------------------------------------------------------------------------------------- splits
def test_whole_groups_are_held_out() -> None:
    labels = np.repeat(np.arange(40), np.random.default_rng(1).integers(1, 9, 40))
    seen = set()
    for seed in range(20):
        held = split_groups(labels, 0.25, seed)
        assert all(len(set(held[labels == label].tolist())) == 1 for label in range(40))
        assert 0.2 * len(labels) < held.sum() <= 0.25 * len(labels)
        assert (split_groups(labels, 0.25, seed) == held).all()
        seen.add(held.tobytes())
    assert len(seen) == 20
    # a group of 60 rows never fits into 50; those after it still come
    labels = np.array([7] * 60 + [8] * 20 + [9] * 20)
    assert all(split_groups(labels, 0.5, seed).tolist() == [False] * 60 + [True] * 40 for seed in range(10))
    assert split_groups(np.arange(100), 0.29, 0).sum() == 29
    assert split_groups(np.arange(10), 1 - 0.8, 0).sum() == 2
    assert not split_groups(np.arange(10), 0, 0).any()


def test_what_cannot_be_split() -> None:
    with pytest.raises(UserError, match="the 5 rows are 1 group"):
        split_groups(np.zeros(5, np.int64), 0.5, 0)
    with pytest.raises(UserError, match=r"a share of 0\.1 is 1 of 10 rows, and the smallest group of prompts has 5"):
        split_groups(np.array([1] * 5 + [2] * 5), 0.1, 0)
    for share in (1, -0.1, float("nan")):
        with pytest.raises(UserError, match="from 0 to below 1"):
            split_groups(np.arange(5), share, 0)


def test_a_split_does_not_depend_on_the_order_of_rows() -> None:
    rng = random.Random(0)
    texts = [f"{rng.choice('abcdefgh')} number {rng.randrange(30)}" for _ in range(300)]
    vector = dict(zip(sorted(set(texts)), np.random.default_rng(0).normal(size=(300, 3)), strict=False))

    def held(order: Sequence[str], seed: int) -> set[str]:
        out = split_groups(prompt_groups(order, np.array([vector[text] for text in order]), 0.999), 0.2, seed)
        return {text for text, is_out in zip(order, out.tolist(), strict=True) if is_out}

    first = held(texts, 5)
    shuffled = rng.sample(texts, len(texts))
    assert held(shuffled, 5) == first
    assert held(texts, 6) != first
    # what comes to it does not move the others: those with the lowest turns are the same in a larger file
    labels = prompt_groups(texts, None)
    more = prompt_groups([*texts, *(f"new {n}" for n in range(300))], None)
    assert (more[:300] == labels).all()


SUBJECTS = (
    "a cat floating in space with beautiful galaxies",
    "neo - tokyo street between pyramids of egypt",
    "grumpy donald duck sitting in a bar",
    "a crumbling ruined city by simon stalenhag",
    "an industrial spaceport on a vast desert planet",
    "a magician god holding a divine staff",
    "ramen carved out of fractal rose ebony",
    "an astronaut standing on a white rose",
    "portrait painting of a shimmering greek hero",
    "a thundering retro robot crane, inks on parchment",
    "a quiet harbour at dawn, fishing boats, oil on canvas",
    "macro photograph of a dragonfly's wing",
)
WAYS = ("{}", "{}, highly detailed", "{} !", " {} , detailed", "{}, very detailed", "{}.")


def near_prompts() -> list[str]:
    """Return 72 prompts: twelve subjects, each told six times with few words changed, the first in capitals too."""
    return [way.format(subject) for subject in SUBJECTS for way in WAYS] + [subject.upper() for subject in SUBJECTS]


def test_no_near_prompts_on_both_sides(minilm: str, tmp_path: Path) -> None:
    texts = near_prompts()
    vectors = SentenceEncoder(minilm)(texts)
    by_text = split_groups(prompt_groups(texts, None), 0.25, 0)
    assert near_across(vectors, by_text, 0.9) is not None, "the same text alone leaves near ones on both sides"
    labels = prompt_groups(texts, vectors, 0.9)
    assert len(SUBJECTS) <= len(set(labels.tolist())) < 40
    for seed in range(10):
        held = split_groups(labels, 0.25, seed)
        assert near_across(vectors, held, 0.9) is None
        assert near_across(vectors, ~held, 0.9) is None
        assert held.any()
    # and so does the task
    write_csv(tmp_path / "p.csv", [(f"{n}.png", text) for n, text in enumerate(texts)])
    told = run({"type": "split_prompts", "prompts": tmp_path / "p.csv", "out_dir": tmp_path / "out", "share": 0.25,
                "text_encoder": minilm, "device": "cpu"})  # fmt: skip
    train, val = read_pairs(tmp_path / "out" / "train.csv"), read_pairs(tmp_path / "out" / "val.csv")
    assert sorted(train + val) == sorted([f"{n}.png", text] for n, text in enumerate(texts))
    sizes = [labels.tolist().count(label) for label in set(labels.tolist())]
    assert told == {
        "rows": 84, "texts": 72, "groups": len(sizes), "train": len(train), "val": len(val), "largest_group": max(sizes)
    }  # fmt: skip
    assert 0 < len(val) <= 21
    both = [int(name.removesuffix(".png")) for name, _ in train + val]
    assert near_across(vectors[both], np.arange(84) >= len(train), 0.9) is None
    # rows in another order: the same names, in that order
    shuffled = random.Random(3).sample(list(enumerate(texts)), len(texts))
    write_csv(tmp_path / "q.csv", [(f"{n}.png", text) for n, text in shuffled])
    run({"type": "split_prompts", "prompts": tmp_path / "q.csv", "out_dir": tmp_path / "two", "share": 0.25,
         "text_encoder": minilm, "device": "cpu"})  # fmt: skip
    again = read_pairs(tmp_path / "two" / "val.csv")
    assert sorted(again) == sorted(val)
    assert again == [[f"{n}.png", text] for n, text in shuffled if [f"{n}.png", text] in val]


# ------------------------------------------------------------------------------------------------------------- the task
def test_metadata_split_and_read(tmp_path: Path) -> None:
    """What the task writes chooses the records of the metadata that it was made of."""
    names = [f"{n:03d}.png" for n in range(50)]
    prompts = [f'prompt {n // 2}, "quoted"\nand more' for n in range(50)]
    write_metadata(tmp_path / "metadata.parquet", names, prompts)
    task = {"type": "split_prompts", "prompts": tmp_path / "metadata.parquet", "out_dir": tmp_path, "near": None}
    assert run(task) == {"rows": 50, "texts": 25, "groups": 25, "train": 46, "val": 4, "largest_group": 2}
    train = DiffusionDb(tmp_path, "metadata.parquet", ".", ids="train.csv")
    val = DiffusionDb(tmp_path, "metadata.parquet", ".", ids="val.csv")
    assert sorted(keys(train) + keys(val)) == [f"{n:03d}" for n in range(50)]
    assert not set(train.texts()) & set(val.texts())
    assert list(PromptPictures(tmp_path, "val.csv", ".").texts()) == list(val.texts())
    first = (tmp_path / "val.csv").read_bytes()
    run(task)
    assert (tmp_path / "val.csv").read_bytes() == first
    run({**task, "seed": 1})
    assert (tmp_path / "val.csv").read_bytes() != first
    assert run({**task, "share": 0})["val"] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompts": "train.csv", "out_dir": "."}, "would overwrite the input"),
        ({"prompts": "p.csv", "out_dir": "p.csv"}, "out_dir is '.*', which is a file"),
        ({"prompts": "none.csv"}, r"cannot read the prompts of '.*none\.csv'"),
        ({"share": 0.95}, "share must be a finite number from 0 to 0.9, got 0.95"),
        ({"near": 2}, "near must be a finite number from 0 to 1 or null, got 2"),
        ({"share": 0.1}, "the smallest group of prompts has 2"),
        ({"sahre": 0.1}, "unknown key 'sahre' for split_prompts .did you mean 'share'"),
    ],
)
def test_what_the_task_refuses(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    for name in ("p.csv", "train.csv"):
        write_csv(tmp_path / name, [("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")])
    there = sorted(path.name for path in tmp_path.iterdir())
    task: dict[str, Any] = {"type": "split_prompts", "prompts": "p.csv", "out_dir": "out", "near": None, **given}
    paths = {name: tmp_path / task[name] for name in ("prompts", "out_dir")}
    with pytest.raises(UserError, match=told):
        run({**task, **paths})
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_both_files_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "p.csv", [(str(n), f"prompt {n}") for n in range(20)])

    def full(pairs: Any) -> Any:
        if len(list(pairs)) == 2:  # val.csv, the second
            raise OSError(28, "No space left on device")
        return [b"train"]

    monkeypatch.setattr("git_model.tasks.prompt_split._csv", full)
    with pytest.raises(OSError, match="No space left"):
        run({"type": "split_prompts", "prompts": tmp_path / "p.csv", "out_dir": tmp_path / "out", "near": None})
    assert list((tmp_path / "out").iterdir()) == []


def test_imports_are_light(root: Path) -> None:
    code = (
        "import sys, git_model.tasks.prompt_split; heavy = {'numpy', 'pyarrow', 'torch', 'sentence_transformers'};"
        "print(sorted(heavy & set(sys.modules))); import git_model.datasets.prompt_sources, git_model.datasets.groups;"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['numpy']"]
