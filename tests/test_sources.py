"""Every data source on files in its own layout; the seeded sampler; what is bad is skipped, not replaced."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import png

from git_model.batch import BadSample
from git_model.datasets.collate import Loaded
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset
from git_model.datasets.order import GlobalSampler
from git_model.datasets.sources import SampleError, build_source
from git_model.errors import UserError


def cc3m(folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    rows = [
        '"a quoted start\thttp://x/0',
        "two cats\thttp://x/1",
        'ends with "\thttp://x/2',
        "\thttp://x/3",
        "one column",
    ]
    (folder / "Train_GCC-training.tsv").write_text("".join(r + "\n" for r in rows), encoding="utf-8")
    for number in (0, 1, 3):
        (folder / "train" / f"{number:08d}.jpg").write_bytes(png(number))
    return folder


def test_conceptual_captions(tmp_path: Path) -> None:
    source = build_source([{"type": "cc3m", "split": "train"}], cc3m(tmp_path))
    assert len(source) == 5, "a quote at a caption's start swallows no row"
    assert source[0].targets[0].text == '"a quoted start'
    assert source[1].images == (png(1),)
    reasons = {}
    for index in (2, 3, 4):
        with pytest.raises(SampleError) as error:
            source[index]
        reasons[index] = error.value.reason
    assert reasons == {2: "missing", 3: "bad_row", 4: "bad_row"}


def test_bad_samples_come_back_as_such(tmp_path: Path) -> None:
    folder = cc3m(tmp_path)
    (folder / "train" / "00000001.jpg").write_bytes(b"<html>404</html>")
    data = ImageTextDataset(build_source([{"type": "cc3m"}], folder), Transform(16))
    items = [data[(0, i)] for i in range(5)]
    assert isinstance(items[0], Loaded)
    assert items[1:] == [
        BadSample("00000001.jpg", "not_image:html"),
        BadSample("00000002.jpg", "missing"),
        BadSample("00000003.jpg", "bad_row"),
        BadSample("00000004.jpg", "bad_row"),
    ]


def test_webdataset_of_img2dataset(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key, caption in (("000", "a cat"), ("001", "")):
            for ending, data in (
                ("jpg", png(1)),
                ("txt", caption.encode()),
                ("json", json.dumps({"caption": caption}).encode()),
            ):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = build_source([{"type": "webdataset", "shards": "{00000..00000}.tar"}], tmp_path)
    assert [t.text for t in source[0].targets] == ["a cat"]
    with pytest.raises(SampleError, match="no_caption"):
        source[1]
    assert list(source.texts()) == ["a cat"]


def test_real_shards(reference_data: Path) -> None:
    folder = reference_data / "data"
    val = build_source([{"type": "webdataset", "shards": "rsicd-val-*.tar", "captions": "captions"}], folder / "rsicd")
    assert len(val) == 1094
    assert all(len(val[i].targets) == 5 for i in (0, 500, 1093))
    web = build_source([{"type": "webdataset", "shards": "*.tar"}], folder / "cc12m_32")
    assert len(web) == 32
    assert all(web[i].targets[0].text for i in range(32))


def test_easy_vqa(reference_data: Path) -> None:
    source = build_source([{"type": "easy_vqa", "split": "test"}], reference_data / "data" / "easy_vqa")
    assert sum(len(source[i].targets) for i in range(len(source))) == 9673
    first = source[0]
    assert first.targets[0].prompt.endswith("?")
    assert len({t.question_id for i in range(len(source)) for t in source[i].targets}) == 9673


def test_tsv_pair_and_its_mismatches(tiny_tsv: Path, tmp_path: Path) -> None:
    pair = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv", "questions": "t.question.tsv"}
    source = build_source([pair, pair], tiny_tsv)
    assert len(source) == 48
    assert source[24] == source[0]
    assert [t.text for t in source[1].targets] == ["a green thing", "thing of green", "green"]
    assert source[1].targets[2].question_id == 1
    folder = tmp_path / "swapped"
    shutil.copytree(tiny_tsv, folder)
    rows = (folder / "t.question.tsv").read_text().splitlines()
    rows[0], rows[1] = rows[1], rows[0]
    (folder / "t.question.tsv").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match=r"row 0 .*'p01'.*'p00'"):
        build_source([pair], folder)[0]
    (folder / "t.question.tsv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(UserError, match="23 rows"):
        build_source([pair], folder)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"type": "cc3"}, ["'cc3'", "cc3m"]),
        ({"type": "cc3m", "splt": "x"}, ["'splt'", "split"]),
        ({"type": "cc3m", "split": "test"}, ["test", "train"]),
        ({"type": "tsv"}, ["images"]),
        ({"type": "cc3m"}, ["Train_GCC-training.tsv"]),
        ({"type": "webdataset", "shards": "none-*.tar"}, ["none-*.tar"]),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, entry: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        build_source([entry], tmp_path)
    assert all(word in str(error.value) for word in words), error.value


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_order_is_a_function_of_seed_epoch_and_position(
    size: int, batch: int, world: int, micro: int, seed: int
) -> None:
    """Ranks and micro-batches cut the same stretch of the same order; every record once an epoch."""
    big = GlobalSampler(size, batch * world * micro, seed=seed, epochs=2)
    ranks = [
        list(GlobalSampler(size, batch, seed=seed, epochs=2, rank=r, world=world, accumulation=micro))
        for r in range(world)
    ]
    steps = list(big)
    assert len(ranks[0]) == len(steps) * micro
    for number, wanted in enumerate(steps):
        parts = [ranks[r][number * micro + m] for m in range(micro) for r in range(world)]
        assert [index for part in parts for index in part] == wanted
    for epoch in (0, 1):
        records = [record for step in steps for e, record in step if e == epoch]
        assert sorted(records) == list(range(size))
    start = (1, big.steps_per_epoch // 2)
    resumed = GlobalSampler(size, batch * world * micro, seed=seed, epochs=2, start=start)
    assert list(resumed) == steps[big.steps_per_epoch + start[1] :]
    assert len(resumed) == len(list(resumed))


def loaded(data: ImageTextDataset, index: tuple[int, int]) -> Loaded:
    item = data[index]
    assert isinstance(item, Loaded)
    return item


def test_draws_depend_on_seed_epoch_and_record_alone(tiny_tsv: Path) -> None:
    entry = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv"}
    source = build_source([entry], tiny_tsv)

    def make(seed: int) -> ImageTextDataset:
        return ImageTextDataset(source, Transform(16, augment="crop+flip"), targets=1, seed=seed, augment=True)

    one, two, other = make(0), make(0), make(1)
    visits = [(epoch, record) for epoch in range(3) for record in range(8)]
    shuffled = [visits[i] for i in np.random.default_rng(0).permutation(len(visits))]
    first, again = {v: loaded(one, v) for v in visits}, {v: loaded(two, v) for v in shuffled}
    assert all(torch.equal(first[v].images[0], again[v].images[0]) for v in visits)
    assert all(first[v].targets == again[v].targets for v in visits)
    assert any(not torch.equal(first[v].images[0], loaded(other, v).images[0]) for v in visits)
    assert any(first[(0, r)].targets != first[(1, r)].targets for r in range(8))


def test_cells_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    import base64

    from tiny import codec

    from git_model.datasets.collate import Collator
    from git_model.datasets.records import json_cell, write_tsv

    keys = [f"k{i}" for i in range(5)]
    write_tsv(tmp_path / "i.tsv", [(k, base64.b64encode(png(0))) for k in keys])
    cells = ['{"caption":"x"}', '["caption"]', "3", "[{", '[{"caption":"a cat"}]']
    write_tsv(tmp_path / "c.tsv", list(zip(keys, cells, strict=True)))
    source = build_source([{"type": "tsv", "images": "i.tsv", "captions": "c.tsv"}], tmp_path)
    items = [ImageTextDataset(source, Transform(16))[(0, i)] for i in range(5)]
    assert items[:4] == [BadSample(k, "bad_caption_json") for k in keys[:4]]
    assert list(source.texts()) == ["a cat"]
    questions = [{"question": "how many?"}, {"question": "which?", "answer": "this"}]
    write_tsv(tmp_path / "q.tsv", [(k, json_cell(questions[: 1 + (k == "k0")])) for k in keys])
    asked = build_source([{"type": "tsv", "images": "i.tsv", "questions": "q.tsv"}], tmp_path)
    assert [t.question_id for t in asked[0].targets] == [0, 1], "a question without an id is still a question"
    batch = Collator(codec(), 2)([ImageTextDataset(asked, Transform(16))[(0, i)] for i in range(2)])
    assert batch.keys == ("k0",), "an unanswered question is not trained on"
    assert batch.skipped == (BadSample("k1", "no_target"),)
