"""Files of regions: Visual Genome, TextOCR, COCO boxes, TSVs; what is left out is counted; mixtures of them."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import train
from git_model.batch import Region
from git_model.config import DataConfig
from git_model.datasets.files import SampleError
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset
from git_model.datasets.order import GlobalSampler
from git_model.datasets.records import json_cell, write_tsv
from git_model.datasets.region_files import CocoRegions, TextOcr, VisualGenome
from git_model.datasets.sources import build_source
from git_model.errors import UserError
from git_model.tasks.registry import run


def jpeg(width: int = 80, height: int = 60) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(file, "JPEG")
    return file.getvalue()


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg())


def region(phrase: str, x: Any, y: Any, width: Any, height: Any) -> dict[str, Any]:
    return {"phrase": phrase, "x": x, "y": y, "width": width, "height": height}


# ------------------------------------------------------------------------------------------------------- Visual Genome
def genome(folder: Path) -> None:
    pictures(folder, "VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K/3.jpg")
    told = [
        {"image_id": i, "width": 80, "height": 60, "url": f"https://cs.stanford.edu/people/x/{place}/{i}.jpg"}
        for i, place in ((1, "VG_100K"), (2, "VG_100K_2"), (3, "VG_100K"))
    ]
    (folder / "image_data.json").write_text(json.dumps(told))
    said = [
        {"id": 1, "regions": [region(" a cat ", 0, 0, 40, 30), region("  ", 1, 1, 5, 5), region("out", 50, 0, 31, 9)]},
        {"id": 2, "regions": [region("flat", 5, 5, 0, 9), region("left", -1, 0, 9, 9), region("ok", 70, 50, 10, 10)]},
        {"id": 3, "regions": [region("big", 0, 0, 81, 61)]},
        {"id": 4, "regions": [region("nowhere", 0, 0, 5, 5)]},
    ]
    (folder / "region_descriptions.json").write_text(json.dumps(said))


def test_visual_genome(tmp_path: Path) -> None:
    genome(tmp_path)
    source = VisualGenome(tmp_path)
    assert len(source) == 2
    assert source[0].key == "1"
    assert [(t.text, t.regions) for t in source[0].targets] == [("a cat", (Region(0, (0, 0, 40, 30)),))]
    assert source[1].images == (jpeg(),)
    assert [t.text for t in source.said(1).targets] == ["ok"]
    assert source.said(1).images == ()
    assert list(source.texts()) == ["a cat", "ok"]
    assert source.dropped == {
        "blank_text": 1, "box_outside": 3, "box_empty": 1, "image_without_region": 1, "image_not_in_image_data": 1
    }  # fmt: skip
    spoken = VisualGenome(tmp_path, sentence=True)
    assert list(spoken.texts()) == ["A cat.", "Ok."]


def test_visual_genome_through_the_loader(tmp_path: Path) -> None:
    genome(tmp_path)
    source = build_source([{"type": "visual_genome"}], tmp_path)
    data = ImageTextDataset(source, Transform(32, "squash"), targets=12, regions="roi")
    item = data[0, 0]
    assert item.targets[0].regions == (Region(0, (0.0, 0.0, 0.5, 0.5)),)  # type: ignore[union-attr]


def test_the_real_regions(reference_data: Path, tmp_path: Path) -> None:
    """Every region of the fifteen pictures is kept or counted, by a count that this test makes itself."""
    path = reference_data / "data" / "vg_regions_15" / "region_graphs.json"
    said = json.loads(path.read_text())
    pictures(tmp_path, *(f"{entry['image_id']}.jpg" for entry in said))
    (tmp_path / "regions.json").write_bytes(path.read_bytes())
    source = VisualGenome(tmp_path, regions="regions.json", image_data=None)
    assert sum(len(entry["regions"]) for entry in said) == 3028
    assert len(source.boxes) == 3028
    assert not source.dropped
    assert len(source) == 15
    assert list(source.texts()) == [r["phrase"].strip() for entry in said for r in entry["regions"]]
    # with sizes that cut some off
    sizes = [{"image_id": entry["image_id"], "width": 640, "height": 480} for entry in said]
    (tmp_path / "image_data.json").write_text(json.dumps(sizes))
    source = VisualGenome(tmp_path, regions="regions.json")
    every = [r for entry in said for r in entry["regions"]]
    out = sum(r["x"] + r["width"] > 640 or r["y"] + r["height"] > 480 for r in every)
    assert 0 < out < 3028
    assert source.dropped["box_outside"] == out
    assert len(source.boxes) == 3028 - out


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "no valid JSON"), ("{}", "regions.json"), ('[{"id": 1}]', "regions"), ("[]", "no usable region")],
)
def test_files_that_are_none(tmp_path: Path, content: str, told: str) -> None:
    pictures(tmp_path, "1.jpg")
    (tmp_path / "regions.json").write_text(content)
    with pytest.raises(UserError, match=told):
        VisualGenome(tmp_path, regions="regions.json", image_data=None)


@pytest.mark.parametrize("box", [("a", 0, 5, 5), (None, 0, 5, 5), (float("nan"), 0, 5, 5)])
def test_numbers_that_are_none_are_counted(tmp_path: Path, box: tuple[Any, ...]) -> None:
    pictures(tmp_path, "1.jpg")
    said = [{"id": 1, "regions": [region("bad", *box), region("good", 0, 0, 5, 5)]}]
    (tmp_path / "regions.json").write_text(json.dumps(said))
    source = VisualGenome(tmp_path, regions="regions.json", image_data=None)
    assert list(source.texts()) == ["good"]
    assert source.dropped.total() == 1


# --------------------------------------------------------------------------------------------------------------- others
def test_textocr(tmp_path: Path) -> None:
    pictures(tmp_path, "train_images/a.jpg", "train_images/b.jpg")
    notes = [("a", "EXIT", [10, 10, 30, 20]), ("a", ".", [10, 10, 30, 20]), ("a", "tiny", [10, 10, 1, 20])]
    notes += [("a", "edge", [70, 50, 30, 30]), ("b", "alone", [0, 0, 40, 40])]
    anns = {str(i): {"image_id": k, "utf8_string": s, "bbox": b} for i, (k, s, b) in enumerate(notes)}
    imgs = {k: {"width": 80, "height": 60, "file_name": f"train/{k}.jpg"} for k in "ab"}
    (tmp_path / "TextOCR_0.1_train.json").write_text(json.dumps({"imgs": imgs, "anns": anns}))
    source = TextOcr(tmp_path, words=2)
    assert [(t.text, t.regions[0].box) for t in source[0].targets] == [
        ("EXIT", (10, 10, 40, 30)),
        ("edge", (70, 50, 80, 60)),
    ]
    assert len(source) == 1
    assert source.dropped == {"illegible": 1, "small_word": 1, "few_words": 1, "image_without_region": 1}
    with pytest.raises(UserError, match="no usable region"):
        TextOcr(tmp_path)  # six words, as Click4Caption wants; no endless search for a picture that has them


def test_coco_boxes(tmp_path: Path) -> None:
    pictures(tmp_path, "images/000000000007.jpg")
    content = {
        "images": [{"id": 7, "file_name": "000000000007.jpg", "width": 80, "height": 60}, {"id": 8}],
        "categories": [{"id": 3, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "bbox": [1, 2, 30, 40], "category_id": 3, "caption": "a dog that runs"},
            {"image_id": 7, "bbox": [1, 2, 30, 40], "category_id": 3, "caption": "many", "iscrowd": 1},
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    assert list(CocoRegions(tmp_path, "instances.json", "images").texts()) == ["dog"]
    source = CocoRegions(tmp_path, "instances.json", "images", text="caption")
    assert list(source.texts()) == ["a dog that runs"]
    assert source[0].targets[0].regions == (Region(0, (1, 2, 31, 42)),)
    assert source.dropped == {"crowd": 1, "image_without_region": 1}


def test_real_category_boxes(reference_data: Path) -> None:
    folder = reference_data / "data" / "coco_val2017_subset"
    source = CocoRegions(folder, "boxes/tinycoco_instances_train2017.json", "images")
    data = ImageTextDataset(source, Transform(64, "squash"), regions="roi")
    found = Counter(type(data[0, i]).__name__ for i in range(len(source)))
    content = json.loads((folder / "boxes" / "tinycoco_instances_train2017.json").read_text())
    there = {path.name for path in (folder / "images").iterdir()}
    have = {i["id"] for i in content["images"] if i["file_name"] in there}
    with_boxes = {a["image_id"] for a in content["annotations"] if not a.get("iscrowd")}
    assert found["Loaded"] >= 0.9 * len(have & with_boxes) > 0


def test_real_category_boxes_train_and_caption(reference_data: Path, tmp_path: Path) -> None:
    """What a user does: a recipe, train.py, inference.py; the photographs it has seen, whose names it has to tell."""
    folder = reference_data / "data" / "coco_val2017_subset"
    entry = {"type": "coco_regions", "images": "images", "annotations": "boxes/tinycoco_instances_train2017.json"}
    recipe = {
        "vision": {
            "name": "small", "features": "grid", "resolution": 64,
            "small": {"stem": [16, 32, 48], "width": 48, "depth": 1, "heads": 2},
        },
        "region": {"mode": "roi", "cells": 3},
        "mapper": {"type": "grid"},
        "language": {
            "name": "small", "prefix_attention": "bidirectional",
            "small": {"architecture": "gpt2", "width": 48, "depth": 2, "heads": 2, "vocab_size": 300},
        },
        "data": {"dir": str(folder), "train": [entry], "val": [entry], "targets": 4, "cache": True},
        "train": {
            "output_dir": str(tmp_path / "run"), "epochs": 40, "batch_size": 10, "optimizer": "muon", "lr": 0.004,
            "warmup": 10, "freeze": ["nothing"], "validate_samples": 6,
        },
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert train.main(["--config", str(tmp_path / "recipe.yml")]) == 0
    report = json.loads((tmp_path / "run" / "run_report.json").read_text())
    assert report["samples"]["ok"] > 0
    source = build_source([entry], folder)
    asked = right = 0
    for sample in (source[i] for i in range(12)):
        (tmp_path / "a.jpg").write_bytes(sample.images[0])
        boxes = [target.regions[0].box for target in sample.targets]
        task = {"type": "test_git_inference_single_image", "model_path": tmp_path / "run" / "model_latest.pt"}
        said = run({**task, "image_path": tmp_path / "a.jpg", "bbox": boxes, "max_new_tokens": 8})["text"]
        asked, right = asked + len(boxes), right + sum(s == t.text for s, t in zip(said, sample.targets, strict=True))
    most = max(Counter(t.text for i in range(12) for t in source[i].targets).values())
    print(f"{right} of {asked} boxes named, the most frequent name {most} times")
    assert right > most


def tsv(folder: Path, name: str, rows: list[tuple[str, Any]]) -> None:
    write_tsv(folder / name, [(key, value if isinstance(value, str) else json_cell(value)) for key, value in rows])


def test_regions_of_a_tsv(tmp_path: Path) -> None:
    image = base64.b64encode(jpeg()).decode()
    tsv(tmp_path, "i.tsv", [(key, image) for key in "abc"])
    tsv(
        tmp_path,
        "r.tsv",
        [
            ("a", [{"phrase": "one", "box": [0, 0, 40, 30]}, {"caption": "two", "rect": [1, 2, 3.5, 4]}]),
            ("b", [{"phrase": "bad", "box": [0, 0, 40]}]),
            ("c", []),
        ],
    )
    source = build_source([{"type": "tsv", "images": "i.tsv", "regions": "r.tsv"}], tmp_path)
    assert [t.regions[0].box for t in source[0].targets] == [(0, 0, 40, 30), (1, 2, 3.5, 4)]
    for index, reason in ((1, "bad_region_json"), (2, "image_without_region")):
        with pytest.raises(SampleError, match=reason):
            source[index]
    assert list(source.texts()) == ["one", "two", "bad"]


def test_questions_about_several_pictures(tmp_path: Path) -> None:
    tsv(
        tmp_path,
        "i.tsv",
        [(key, base64.b64encode(jpeg(*size)).decode()) for key, size in zip("ab", [(80, 60), (40, 40)], strict=True)],
    )
    prompt = "one [IMG] two [IMG] which is larger?"
    said = {"question": prompt, "answer": "the first", "images": [{"key": "a"}, {"key": "b", "box": [0, 0, 20, 40]}]}
    lost = {**said, "images": [{"key": "a"}, {"key": "z"}]}
    tsv(tmp_path, "q.tsv", [("1", [said]), ("2", [lost]), ("3", [{"question": "no images"}]), ("4", "no json")])
    source = build_source([{"type": "several_images", "images": "i.tsv", "questions": "q.tsv"}], tmp_path)
    sample = source[0]
    assert sample.images == (jpeg(), jpeg(40, 40))
    assert sample.targets[0].prompt == prompt
    assert sample.targets[0].regions == (Region(0), Region(1, (0, 0, 20, 40)))
    for index, reason in ((1, "no_picture 'z'"), (2, "bad_question_json"), (3, "bad_question_json")):
        with pytest.raises(SampleError, match=reason):
            source[index]
    assert "one " in list(source.texts())


# -------------------------------------------------------------------------------------------------------------- mixture
SIZES, WEIGHTS = (40, 7, 100), (5.0, 1.0, 3.0)


def mixed(**changes: Any) -> GlobalSampler:
    options: dict[str, Any] = {"seed": 1, "epochs": 6, "mixture": list(zip(SIZES, WEIGHTS, strict=True)), **changes}
    return GlobalSampler(
        sum(SIZES), changes.pop("batch_size", 4), **{k: v for k, v in options.items() if k != "batch_size"}
    )


def of_source(order: np.ndarray, number: int) -> np.ndarray:
    start = sum(SIZES[:number])
    return order[(order >= start) & (order < start + SIZES[number])] - start


def test_shares_are_the_weights() -> None:
    order = mixed().order(0)
    assert len(order) == sum(SIZES)
    counts = [len(of_source(order, number)) for number in range(3)]
    assert counts == pytest.approx([147 * w / 9 for w in WEIGHTS], abs=1)


def test_no_record_comes_twice_before_all_others_came() -> None:
    sampler = mixed()
    drawn = np.concatenate([sampler.order(epoch) for epoch in range(6)])
    for number, size in enumerate(SIZES):
        seen = Counter(of_source(drawn, number).tolist())
        assert set(seen) == set(range(size)) or sum(seen.values()) < size
        assert max(seen.values()) - min(seen.values() if len(seen) == size else [0]) <= 1
    assert sampler.order(0).tolist() != sampler.order(1).tolist()


def test_a_mixture_goes_on_where_it_was_and_is_the_same_on_any_number_of_processes() -> None:
    whole = list(mixed())
    per_epoch = len(whole) // 6
    assert list(mixed(start=(2, 5))) == whole[2 * per_epoch + 5 :]
    halves = [list(mixed(batch_size=2, rank=rank, world=2)) for rank in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_steps_of_a_mixture_are_not_of_one_source() -> None:
    order = mixed().order(0)
    assert 0.3 < np.mean(order[:40] < 40) < 0.8


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"weights": (1.0, 2.0)}, "for each of 1 train sources"),
        ({"weights": (0.0,)}, "above 0"),
        ({"weights": (1.0,), "shuffle_block": 8}, "shuffle_block"),
    ],
)
def test_weights_are_checked(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        DataConfig(**keys)
