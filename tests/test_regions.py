"""Boxes: in the picture's pixels, through its transform, in the batch, through the readers, into the text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import byte_tokenizer, codec, config, picture

from git_model.architecture import RegionConfig
from git_model.batch import Box, Region, Sample, Target
from git_model.checkpoint import load_checkpoint
from git_model.config import AUGMENTS, Config
from git_model.datasets.collate import Collator, Loaded
from git_model.datasets.images import Transform
from git_model.datasets.loader import ImageTextDataset
from git_model.datasets.regions import Frame, carried, cut_out, ignored, in_picture
from git_model.errors import ImageError, UserError
from git_model.models.build import build_model
from git_model.models.git import GitModel
from git_model.models.language import Decoding
from git_model.models.region import BoxEncoder, FourierPositions, QueryReader, RoiReader

MODES = ("roi", "query", "prefix")
DEEP = {"stem": [8, 16, 16], "width": 16, "depth": 2, "heads": 2}


def png(width: int = 320, height: int = 240, box: tuple[int, int, int, int] | None = None) -> bytes:
    """A black picture with a white box."""
    image = Image.new("RGB", (width, height))
    if box:
        image.paste((255, 255, 255), box)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- pixels
def test_corners_in_any_order_and_whole_sides() -> None:
    assert in_picture((50, 60, 10, 20), 320, 240) == (10, 20, 50, 60)
    assert in_picture((10, 60, 50, 20), 320, 240) == (10, 20, 50, 60)
    assert in_picture((-1, -1, -1, -1), 320, 240) == (0, 0, 320, 240)
    assert in_picture((10, -1, -1, 20), 320, 240) == (10, 0, 320, 20)


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 321, 10), "box_outside"),
        ((-2, 0, 10, 10), "box_outside"),
        ((0, 0, 10, 240.5), "box_outside"),
        ((5, 5, 5, 9), "box_empty"),
        ((1, 2, 3), "box_malformed"),
        ((float("nan"), 0, 5, 5), "box_malformed"),
        ((float("inf"), 0, 5, 5), "box_malformed"),
        (("1", 0, 5, 5), "box_malformed"),
        ((True, 0, 5, 5), "box_malformed"),
    ],
)
def test_boxes_that_are_none(box: Any, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        in_picture(box, 320, 240)
    assert error.value.reason == reason
    assert "320x240" in str(error.value)


def test_a_box_outside_names_its_values() -> None:
    with pytest.raises(ImageError, match=r"\[10, 20, 400, 60\] of 320x240"):
        in_picture((10, 20, 400, 60), 320, 240)


def test_box_follows_resize_and_crop() -> None:
    frames = {resize: Transform(48, resize).framed(png())[1] for resize in ("crop", "squash", "pad")}
    whole = 48.0
    crop, squash, pad = frames.values()
    assert crop.box((40, 0, 280, 240)) == (0.0, 0.0, 1.0, 1.0)
    assert crop.box((100, 60, 140, 120)) == pytest.approx([v / whole for v in (12, 12, 20, 24)])
    assert crop.box((0, 0, 50, 10)) == pytest.approx([v / whole for v in (0, 0, 2, 2)])  # clipped on the left
    with pytest.raises(ImageError, match="box_cut_off"):
        crop.box((0, 0, 40, 240))
    assert squash.box((160, 0, 320, 120)) == (0.5, 0.0, 1.0, 0.5)
    assert pad.box((-1, -1, -1, -1)) == pytest.approx([v / whole for v in (0, 6, 48, 42)])


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_box_is_where_its_pixels_are(augment: str, resize: str) -> None:
    """White where the box is: after resize, crop, mirror and turns it still is."""
    transform, box = Transform(64, resize, augment), (110, 80, 190, 150)
    for seed in range(12):
        pixels, frame = transform.framed(png(box=box), np.random.default_rng(seed))
        rows, columns = (pixels[0] > 127).nonzero().unbind(1)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert [float(v) / 64 for v in seen] == pytest.approx(frame.box(box), abs=1.01 / 64)
    plain, turned = transform(png(box=box)), transform.framed(png(box=box))[0]
    assert torch.equal(plain, turned)


@given(
    st.tuples(*[st.floats(0, 1) for _ in range(4)]),
    st.integers(0, 7),
    st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
)
def test_what_comes_out_is_a_box(corners: Box, draw: int, size: tuple[int, int]) -> None:
    width, height = size
    x0, y0, x1, y1 = corners
    frame = Frame(width, height, (0, 0, width, height), (32, 32), (0, 0), 32, draw)
    box = (x0 * width, y0 * height, x1 * width, y1 * height)
    if abs(x0 - x1) < 1e-6 or abs(y0 - y1) < 1e-6:  # too little of it for fractions
        return
    left, top, right, bottom = frame.box(box)
    assert 0 <= left < right <= 1
    assert 0 <= top < bottom <= 1


def test_cutting_out() -> None:
    image = Image.open(io.BytesIO(png(box=(100, 60, 140, 120))))
    targets = (
        Target("a", regions=(Region(0, (100, 60, 140, 120)),)),
        Target("b"),
        Target("c", regions=(Region(0, (140, 120, 100, 60)), Region(0, (100, 60, 140, 120)))),
    )
    seen, told = cut_out(targets, [image], Transform(16, "squash"))
    assert len(seen) == 3
    assert (seen[0] == 255).all()
    assert [t.regions for t in told] == [(Region(0),), (Region(1),), (Region(2), Region(0))]
    tiny = cut_out([Target(regions=(Region(0, (3.2, 3.2, 3.4, 3.4)),))], [image], Transform(16, "squash"))
    assert tiny[0][0].shape == (3, 16, 16)
    with pytest.raises(ImageError, match="picture 1 of 1"):
        cut_out([Target(regions=(Region(1),))], [image], Transform(16))
    with pytest.raises(ImageError, match="picture 1 of 1"):
        carried([Target(regions=(Region(1),))], [Transform(16).framed(png())[1]])
    assert ignored(targets)[0].regions == (Region(0),)


# --------------------------------------------------------------------------------------------------------------- data
class Records:
    """Two pictures a record."""

    def __init__(self, *targets: Target) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        return Sample("k", (png(box=(0, 0, 160, 240)), png(64, 64)), self.targets)

    said = __getitem__

    def texts(self) -> Any:
        return iter(())


BOX: Box = (0, 0, 160, 120)
SPOKEN = (Target("left", regions=(Region(0, BOX),)), Target("all", regions=(Region(0), Region(1, (0, 0, 32, 64)))))


@pytest.mark.parametrize("cache", [False, True])
def test_what_the_loader_makes_of_boxes(cache: bool) -> None:
    for _ in range(2):
        carry, cut, ignore = (
            ImageTextDataset(Records(*SPOKEN), Transform(32, "squash"), cache=cache, regions=mode)
            for mode in ("roi", "crop", "ignore")
        )
        found = carry[0, 0]
        assert isinstance(found, Loaded)
        assert len(found.images) == 2
        assert [t.regions for t in found.targets] == [
            (Region(0, (0.0, 0.0, 0.5, 0.5)),),
            (Region(0), Region(1, (0.0, 0.0, 0.5, 1.0))),
        ]
        found = cut[0, 0]
        assert isinstance(found, Loaded)
        assert [t.regions for t in found.targets] == [(Region(0),), (Region(1), Region(2))]
        assert (found.images[0] == 255).all()
        found = ignore[0, 0]
        assert isinstance(found, Loaded)
        assert [t.regions for t in found.targets] == [(Region(0),), (Region(0), Region(1))]


def test_a_bad_box_is_a_skipped_sample_with_its_reason() -> None:
    data = ImageTextDataset(Records(Target("x", regions=(Region(0, (0, 0, 999, 9)),))), Transform(32), regions="roi")
    assert data[0, 0].reason == "box_outside"  # type: ignore[union-attr]


def test_one_region_of_a_batch_is_there_once() -> None:
    item = Loaded("a", (picture(0),), (Target("x", regions=(Region(0, BOX),)), Target("y", regions=(Region(0, BOX),))))
    other = Loaded("b", (picture(1),), (Target("z"), Target("w", regions=(Region(0, (0, 0, 1, 1)),))))
    batch = Collator(codec(), 2, pack=True, regions=True)([item, other])
    assert len(batch.images) == 2
    assert batch.boxes is not None
    assert batch.box_image is not None
    assert batch.box_image.tolist() == [0, 1, 1]
    assert batch.boxes.tolist() == [list(BOX), [0, 0, 1, 1], [0, 0, 1, 1]]
    assert batch.image_index.tolist() == [0, 1, 2]
    assert [len(row) for row in batch.targets] == [2, 1, 1], "of one region, so in one row"
    assert Collator(codec(), 2)([Loaded("c", (picture(0),), (Target("x"),))]).boxes is None


def test_a_model_of_whole_pictures_is_not_given_boxes() -> None:
    item = Loaded("a", (picture(0),), (Target("x", regions=(Region(0, BOX),)),))
    batch = Collator(codec(), 2)([item])
    assert "without --region" in batch.skipped[0].reason


def test_slots_and_regions_have_to_agree() -> None:
    item = Loaded("a", (picture(0),), (Target("x", "one [IMG] two [IMG] three [IMG]", regions=(Region(0), Region(0))),))
    assert "3 [IMG] slots for 2 images" in Collator(codec(), 2, regions=True)([item]).skipped[0].reason


def test_a_row_that_is_too_long_is_a_skipped_sample() -> None:
    items = [Loaded(key, (picture(0),) * count, (Target("x"),)) for key, count in (("few", 2), ("many", 9))]
    batch = Collator(codec(), 4, longest=20)(items)
    assert batch.keys == ("few",)
    assert "38 tokens with images and answer, more than 20" in batch.skipped[0].reason


# ------------------------------------------------------------------------------------------------------------- readers
def test_roi_of_the_whole_picture_is_its_grid() -> None:
    """n cells over n cells: bilinear points average to the cell itself where the map is linear."""
    side, dim = 4, 3
    reader = RoiReader(dim, side)
    y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
    features = torch.stack([x, y, x + y], -1).flatten(0, 1)[None].expand(2, -1, -1)  # (2,16,3)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.25, 0.25, 0.75, 0.75]])
    pooled = reader(features, boxes, torch.tensor([0, 1]))[:, :-2]
    inner = (features[0].view(4, 4, 3)[1:3, 1:3]).flatten(0, 1)
    torch.testing.assert_close(pooled[0].view(4, 4, 3)[1:3, 1:3].flatten(0, 1), inner)
    # a 2 x 2 part in 4 x 4 cells: positions a quarter apart
    columns = pooled[1].view(4, 4, 3)[0, :, 0]
    torch.testing.assert_close(columns, torch.tensor([1.25, 1.75, 2.25, 2.75]))


def test_roi_is_the_mean_of_its_points() -> None:
    """RoIAlign written out, point by point."""
    torch.manual_seed(0)
    side, dim, cells = 5, 2, 3
    reader, features = RoiReader(dim, cells), torch.randn(1, 25, 2)
    box = torch.tensor([[0.13, 0.31, 0.72, 0.94]])
    pooled = reader(features, box, torch.zeros(1, dtype=torch.long))[0, :-2].view(cells, cells, dim)
    grid = features.view(side, side, dim).numpy()

    def at(x: float, y: float) -> Any:
        u, v = (min(max(value * side - 0.5, 0), side - 1) for value in (x, y))
        i, j = int(v), int(u)
        below, right = min(i + 1, side - 1), min(j + 1, side - 1)
        fy, fx = v - i, u - j
        top = grid[i, j] * (1 - fx) + grid[i, right] * fx
        return top * (1 - fy) + (grid[below, j] * (1 - fx) + grid[below, right] * fx) * fy

    x0, y0, x1, y1 = box[0].tolist()
    for r in range(cells):
        for c in range(cells):
            points = [
                at(x0 + (x1 - x0) * (c + (a + 0.5) / 2) / cells, y0 + (y1 - y0) * (r + (b + 0.5) / 2) / cells)
                for a in range(2)
                for b in range(2)
            ]
            assert pooled[r, c].detach().numpy() == pytest.approx(np.mean(points, 0), abs=1e-5)


def test_fourier_positions() -> None:
    positions = FourierPositions(8)
    code = positions(torch.tensor([[0.5, 0.5], [0.1, 0.9]]))
    torch.testing.assert_close(code[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    expected = 2 * np.pi * (np.array([-0.8, 0.8]) @ positions.gaussian.numpy())  # type: ignore[union-attr,operator]
    torch.testing.assert_close(code[1, :4].numpy(), np.sin(expected).astype(np.float32), rtol=1e-4, atol=1e-5)
    corners = BoxEncoder(8)(torch.tensor([[0.1, 0.2, 0.1, 0.2]]))
    assert not torch.equal(corners[0, 0], corners[0, 1]), "what corner it is makes a difference"


def model_of(mode: str, **region: Any) -> tuple[GitModel, Config]:
    settings = config(region={"mode": mode, "width": 32, "heads": 4, "depth": 2, "queries": 4, **region})
    return build_model(settings, byte_tokenizer()).eval(), settings


def item_of(*boxes: Box | None, key: str = "k", seed: int = 0) -> Loaded:
    targets = tuple(Target("text", "say", i, regions=(Region(0, box),)) for i, box in enumerate(boxes))
    return Loaded(key, (picture(seed),), targets)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_one_is_a_batch_of_many(mode: str) -> None:
    model, _ = model_of(mode)
    boxes: list[Box | None] = [(0.0, 0.0, 0.5, 0.5), None, (0.5, 0.2, 1.0, 0.9)]
    collate = Collator(model.codec, model.num_image_tokens, regions=True)
    together = collate([item_of(*boxes), item_of(*boxes, key="other", seed=1)])
    tokens = model.encode(together.images, together.boxes, together.box_image)  # (6,K,E)
    assert tokens.shape[:2] == (6, model.num_image_tokens)
    for number, box in enumerate(boxes):
        single = collate([item_of(box, seed=1)])
        alone = model.encode(single.images, single.boxes, single.box_image)
        torch.testing.assert_close(alone[0], tokens[3 + number], rtol=1e-4, atol=1e-5)
    whole = model.encode(together.images)
    torch.testing.assert_close(whole, tokens[[1, 4]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_box_matters_and_gradients_reach_all(mode: str) -> None:
    model, _ = model_of(mode)
    batch = Collator(model.codec, model.num_image_tokens, regions=True)([item_of((0.0, 0.0, 0.4, 0.4), None)])
    tokens = model.encode(batch.images, batch.boxes, batch.box_image)
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)
    model.train()
    model(batch).backward()
    left = [name for name, p in model.mapper.named_parameters() if p.requires_grad and p.grad is None]
    assert not left
    # `place` ends in keys and values of softmax attention: what all cells share has no gradient to speak of
    still = [name for name, p in model.mapper.named_parameters() if p.grad is not None and not p.grad.any()]
    assert not [name for name in still if "key.bias" not in name]


@pytest.mark.parametrize("mode", MODES)
def test_saved_is_loaded(mode: str, tmp_path: Path) -> None:
    from git_model.checkpoint import save_checkpoint

    model, settings = model_of(mode)
    save_checkpoint(tmp_path / "model.pt", model, settings, step=1, epoch=0)
    loaded = load_checkpoint(tmp_path / "model.pt").model
    batch = Collator(model.codec, model.num_image_tokens, regions=True)([item_of((0.1, 0.2, 0.7, 0.9))])
    first, second = (m.encode(batch.images, batch.boxes, batch.box_image) for m in (model, loaded))
    assert torch.equal(first, second)
    buffers = dict(loaded.mapper.named_buffers())
    for name, buffer in model.mapper.named_buffers():
        assert torch.equal(buffers[name], buffer)
    decoding = Decoding(max_new_tokens=4)
    ask = Collator(model.codec, model.num_image_tokens, regions=True, generate=True)([item_of((0.1, 0.2, 0.7, 0.9))])
    assert model.generate(ask, decoding) == loaded.generate(ask, decoding)


def test_query_starts_from_blip2_and_from_bert(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, Blip2QFormerConfig, Blip2QFormerModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    blip = Blip2QFormerModel(Blip2QFormerConfig(**sizes, intermediate_size=128, encoder_hidden_size=24))
    from safetensors.torch import save_file

    state = {f"qformer.{k}": v for k, v in blip.state_dict().items()} | {"query_tokens": torch.randn(1, 4, 32)}
    (tmp_path / "blip2").mkdir()
    save_file(state, tmp_path / "blip2" / "model.safetensors")
    settings = RegionConfig("query", width=32, heads=4, depth=2, queries=4)
    reader = QueryReader(24, settings)
    left = reader.warm_start(str(tmp_path / "blip2"))
    assert all(not name.startswith(("former", "queries")) for name in left)
    for name, tensor in blip.state_dict().items():
        assert torch.equal(reader.state_dict()[f"former.{name}"], tensor)
    assert torch.equal(reader.queries, state["query_tokens"][0])

    bert = BertModel(BertConfig(**sizes, intermediate_size=128, vocab_size=50))
    bert.save_pretrained(tmp_path / "bert")
    reader = QueryReader(24, settings)
    left = reader.warm_start(str(tmp_path / "bert"))
    assert all("crossattention" in n or not n.startswith("former") for n in left), "BERT has no cross-attention"
    layer: Any = bert.encoder.layer[1]
    ours = reader.former.encoder.layer[1]
    assert torch.equal(ours.attention.attention.query.weight, layer.attention.self.query.weight)
    assert torch.equal(ours.attention.output.LayerNorm.bias, layer.attention.output.LayerNorm.bias)
    assert torch.equal(ours.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(ours.output_query.dense.weight, layer.output.dense.weight)
    assert torch.equal(reader.former.layernorm.weight, bert.embeddings.LayerNorm.weight)
    with pytest.raises(UserError, match="no Q-Former layers of width 64"):
        QueryReader(24, RegionConfig("query", width=64, heads=4, depth=2)).warm_start(str(tmp_path / "bert"))
    with pytest.raises(UserError, match=r"no \*.safetensors"):
        reader.warm_start(str(tmp_path / "nothing"))


def test_query_attends_every_second_layer_and_drops_the_corners() -> None:
    reader = QueryReader(24, RegionConfig("query", width=32, heads=4, depth=4, queries=5))
    assert [layer.has_cross_attention for layer in reader.former.encoder.layer] == [True, False, True, False]
    assert reader(torch.randn(2, 9, 24), torch.rand(3, 4), torch.tensor([0, 1, 1])).shape == (3, 5, 32)


def test_layers_averaged_have_a_trained_norm(tmp_path: Path) -> None:
    settings = config(vision={"layers": [1, 2], "join": "mean", "small": DEEP}, train={"freeze": ["vision"]})
    model = build_model(settings, byte_tokenizer()).eval()
    joined = build_model(config(vision={"layers": [1, 2], "small": DEEP}), byte_tokenizer()).eval()
    joined.vision.load_state_dict(model.vision.state_dict())
    pixels = torch.stack([picture(0), picture(1)])
    features = joined.features(pixels)  # (2,N,2*D)
    torch.testing.assert_close(model.features(pixels), sum(features.chunk(2, dim=2)) / 2)
    assert model.mapper.norm.weight.requires_grad
    assert not any(p.requires_grad for p in model.vision.parameters())


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"region": {"mode": "rois"}}, "'roi'"),
        (
            {"region": {"mode": "roi"}, "vision": {"features": "pooled"}, "mapper": {"type": "mlp"}},
            "--output_grid True",
        ),
        ({"region": {"mode": "roi", "warm_start": "x"}}, "is for --region query"),
        ({"region": {"mode": "query", "width": 30, "heads": 4}}, "no multiple of heads"),
        ({"vision": {"join": "mean"}}, "needs vision.layers"),
        ({"region": {"mode": "roi"}, "data": {"feature_store": "x"}, "train": {"freeze": ["vision"]}}, "size of every"),
    ],
)
def test_settings_that_do_not_fit(sections: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config(**sections)


def test_pictures_are_squashed_where_boxes_are_read() -> None:
    assert config(region={"mode": "roi"}).data.resize == "squash"
    assert config().data.resize == "crop"
    assert config(region={"mode": "roi"}, data={"resize": "pad"}).data.resize == "pad"


def test_no_llava_reads_boxes() -> None:
    from git_model.models.llava import config_refusal

    plain: dict[str, Any] = {"vision": {"features": "grid", "layers": [-1]}, "mapper": {"type": "linear"}}
    assert "whole pictures" in config_refusal(config(**plain, region={"mode": "roi"}))
    plain["vision"]["join"] = "mean"
    assert "averaged" in config_refusal(config(**plain))


def test_a_packed_row_is_as_long_as_its_longest_segment() -> None:
    item = Loaded("k", (picture(0),), (Target("a longer text"), Target("x")))
    batch = Collator(codec(), 2, pack=True, longest=10)([item])
    assert "16 tokens" in batch.skipped[0].reason


def test_a_plan_counts_a_box_for_every_text() -> None:
    from git_model.rehearsal import Record, full_batch

    model, settings = model_of("roi")
    batch = full_batch(model, settings, 2, Record(1, 3))
    assert batch.boxes is not None
    assert len(batch.boxes) == 6
    assert len(batch.images) == 2
