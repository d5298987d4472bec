"""Boxes through the tasks: single pictures, lists, dense captions, TSVs; scores, proposals, drawn pictures."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny import byte_tokenizer, config

from git_model.batch import Region, Target
from git_model.checkpoint import save_checkpoint
from git_model.datasets.records import TSVFile, write_tsv
from git_model.errors import UserError
from git_model.models.build import build_model
from git_model.models.proposals import RegionProposer, suppressed
from git_model.tasks.caption import asked_about
from git_model.tasks.captioner import GitCaptioner, open_captioner
from git_model.tasks.dense import Said, best, describe
from git_model.tasks.picture import annotated, save_picture
from git_model.tasks.registry import run

NONE: dict[str, Any] = {"output_grid": None}
SIZE = (90, 60)


def scene(seed: int = 0) -> Image.Image:
    """A noisy picture with three plain boxes."""
    dice = np.random.default_rng(seed)
    image = Image.fromarray(dice.integers(90, 130, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
    pen = ImageDraw.Draw(image)
    for left, colour in ((5, "red"), (35, "blue"), (65, "white")):
        pen.rectangle((left, 20, left + 19, 39), fill=colour)
    return image


def saved_png(path: Path, seed: int = 0) -> str:
    scene(seed).save(path)
    return str(path)


def checkpoint(folder: Path, mode: str, name: str = "model.pt") -> str:
    settings = config(region={"mode": mode, "width": 32, "heads": 4, "depth": 2, "queries": 4})
    model = build_model(settings, byte_tokenizer()).eval()
    torch.manual_seed(5)
    for parameter in model.parameters():  # small initial weights say the same of every box
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.3)
    save_checkpoint(folder / name, model, settings, step=1, epoch=0)
    return str(folder / name)


@pytest.fixture(scope="module", params=["roi", "crop", "query", "prefix"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def roi(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("roi"), "roi")


BOXES = [[5, 20, 25, 40], [35, 20, 55, 40], [65, 20, 85, 40]]


def say(model: str, image: Any, **keys: Any) -> Any:
    return run(
        {
            "type": "test_git_inference_single_image",
            "model_path": model,
            "image_path": image,
            "max_new_tokens": 6,
            **keys,
        }
    )["text"]


# -------------------------------------------------------------------------------------------------------- one picture
def test_a_box_and_several(reader: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    alone = [say(reader, path, bbox=box) for box in BOXES]
    assert len(set(alone)) > 1, "the box makes a difference"
    assert say(reader, path, bbox=BOXES) == alone, "several boxes of one picture: a text for each"
    assert say(reader, path, bbox=[40, 25, 20, 5][::-1]) == alone[0], "corners in any order"
    whole = say(reader, path)
    assert say(reader, path, bbox=[-1, -1, -1, -1]) == say(reader, path, bbox=[0, 0, *SIZE]) == whole


def test_several_pictures_with_boxes(reader: str, tmp_path: Path) -> None:
    one, two = saved_png(tmp_path / "a.png"), saved_png(tmp_path / "b.png", 1)
    prompt = "first [IMG] second [IMG] which?"
    said = say(reader, [one, two], bbox=[BOXES[0], None], prompt=prompt)
    assert isinstance(said, str)
    twice = say(reader, [one, one], bbox=[BOXES[0], BOXES[1]], prompt=prompt)
    assert twice == say(reader, one, bbox=[BOXES[0], BOXES[1]], prompt=prompt), "one picture fills both slots"


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"bbox": [0, 0, 91, 10]}, r"bbox: box_outside: \[0, 0, 91, 10\] of 90x60"),
        ({"bbox": [5, 5, 5, 9]}, "box_empty"),
        ({"bbox": [1, 2, 3]}, "bbox.* must be a list of 4"),
        ({"bbox": []}, "bbox must be|empty list"),
        ({"bbox": [[1, 2, 3, 4], [1, 2, 3, 4]], "prompt": "[IMG] a [IMG] b [IMG]"}, r"3 \[IMG\] slots for 2 images"),
        ({"bbox": "all"}, "bbox must be"),
    ],
)
def test_boxes_that_do_not_fit(roi: str, tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        say(roi, saved_png(tmp_path / "a.png"), **keys)


def test_a_long_dialogue_loses_whole_turns(roi: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captioner = open_captioner(roi, NONE, "cpu")
    assert isinstance(captioner, GitCaptioner)
    size, most = captioner.model.num_image_tokens, captioner.model.language.max_positions
    assert most == 256
    regions = tuple(Region(number) for number in range(4))
    turns = ["one [IMG] what? a cat", "no picture here", "two [IMG] three [IMG] which? the last", "and [IMG] now?"]
    whole = captioner.shortened(turns, regions, 8)
    assert whole.prompt == " ".join(turns)
    assert whole.regions == regions
    left = []
    for new in range(8, 256):
        if size + len("and") + len("now?") + new > most:
            with pytest.raises(UserError, match="with images and answer"):
                captioner.shortened(turns, regions, new)
            break
        kept = captioner.shortened(turns, regions, new)
        assert kept.prompt.count("[IMG]") == len(kept.regions), "never a slot without its image"
        assert kept.regions == regions[len(regions) - len(kept.regions) :]
        text = sum(len(part.strip()) for part in kept.prompt.split("[IMG]"))
        assert size * len(kept.regions) + text + new <= most
        left.append(len(kept.regions))
    assert sorted(set(left), reverse=True) == [4, 3, 1]
    none = captioner.shortened([turns[0], "x" * 60, "y" * 60], regions[:1], 150)
    assert (none.prompt.count("[IMG]"), none.regions) == (0, regions[:1]), "no regions would be all pictures"
    path = saved_png(tmp_path / "a.png")
    history = [["look [IMG] what?", "a [IMG]thing"]]  # an answer's slot is none
    said = say(roi, path, bbox=[BOXES[0], BOXES[1]], history=history, prompt="and [IMG] this?")
    assert said == say(roi, path, bbox=[BOXES[0], BOXES[1]], prompt="look [IMG] what? a thing and [IMG] this?")


def test_numbers_of_boxes_and_pictures() -> None:
    with pytest.raises(UserError, match="bbox has 3 boxes for 2 pictures"):
        asked_about("", [0, 1], [(0, 0, 1, 1)] * 3)
    with pytest.raises(UserError, match="bbox has 1 boxes for 2 pictures"):
        asked_about("", [0, 1], (0, 0, 1, 1))
    assert asked_about("", [0, 1], None) == (Target(regions=(Region(0), Region(1))),)
    assert len(asked_about("what [IMG] is it?", [0], [(0, 0, 1, 1), None])) == 2, "one slot: asked of each box"


def test_a_model_of_whole_pictures_says_so(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "none")
    path = saved_png(tmp_path / "a.png")
    assert isinstance(say(model, path), str)
    with pytest.raises(UserError, match="without --region"):
        say(model, path, bbox=BOXES[0])
    with pytest.raises(UserError, match="trained with --region"):
        run({"type": "dense_caption", "model_path": model, "image_path": path})


# ------------------------------------------------------------------------------------------------------ dense captions
def test_given_boxes_come_back_in_their_order_with_their_scores(reader: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    task = {"type": "dense_caption", "model_path": reader, "image_path": path, "boxes": BOXES, "max_new_tokens": 6}
    found = run(task)["regions"]
    assert [list(entry["box"]) for entry in found] == BOXES
    assert [entry["text"] for entry in found] == [say(reader, path, bbox=box) for box in BOXES]
    assert found == run({**task, "batch_size": 1})["regions"] or all(
        a["score"] == pytest.approx(b["score"], abs=1e-4)
        for a, b in zip(found, run({**task, "batch_size": 1})["regions"], strict=True)
    )
    assert all(entry["score"] < 0 for entry in found)


def test_a_score_is_the_mean_of_the_tokens(roi: str) -> None:
    """Against the loss of the box's caption alone, which is the mean of -log p."""
    captioner = open_captioner(roi, NONE, "cpu")
    assert isinstance(captioner, GitCaptioner)
    boxes = [(5.0, 20.0, 25.0, 40.0), (35.0, 20.0, 55.0, 40.0), (65.0, 20.0, 85.0, 40.0)]
    asked = captioner.see([scene()], [Target(regions=(Region(0, box),)) for box in boxes])
    from git_model.datasets.collate import Collator, Loaded
    from git_model.models.language import Decoding

    collate = Collator(captioner.model.codec, captioner.model.num_image_tokens, regions=True)
    for texts in (["a"], ["longer text"], ["xyz", "a"]):  # lists of answers: each of them comes to its end
        trie = captioner.trie(texts, False)
        for number, said in enumerate(describe(captioner, scene(), boxes, Decoding(answers=trie))):
            assert said.text in texts
            one = Loaded("", asked.images, (Target(said.text, regions=asked.targets[number].regions),))
            with torch.no_grad():
                assert said.score == pytest.approx(-float(captioner.model(collate([one]))), abs=1e-5)


def test_a_picture_is_encoded_once_for_all_its_boxes(roi: str) -> None:
    captioner = open_captioner(roi, NONE, "cpu")
    assert isinstance(captioner, GitCaptioner)
    seen: list[int] = []
    captioner.model.vision.tower.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    from git_model.models.language import Decoding

    found = describe(
        captioner,
        scene(),
        [(float(a), float(b), float(c), float(d)) for a, b, c, d in BOXES] * 9,
        Decoding(max_new_tokens=3),
        batch_size=4,
    )
    assert len(found) == 27
    assert seen == [1]


def test_proposals_are_ranked_and_thinned(roi: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    task = {"type": "dense_caption", "model_path": roi, "image_path": path, "max_new_tokens": 4}
    found = run({**task, "top_k": 5})["regions"]
    scores = [entry["score"] for entry in found]
    assert len(found) == 5
    assert scores == sorted(scores, reverse=True)
    boxes = [entry["box"] for entry in found]
    assert suppressed(boxes, scores, 0.5) == list(range(5))
    assert run({**task, "top_k": 5}) == run({**task, "top_k": 5}), "the same twice"


def test_a_row_whose_boxes_the_encoder_does_not_see(tmp_path: Path) -> None:
    """Pictures cropped to a square: proposals outside of it are left out, given ones are an error of their row."""
    settings = config(region={"mode": "roi", "width": 32, "heads": 4}, data={"resize": "crop"})
    save_checkpoint(tmp_path / "m.pt", build_model(settings, byte_tokenizer()).eval(), settings, step=1, epoch=0)
    Image.new("RGB", (300, 40), "red").save(tmp_path / "wide.png")
    task = {"model_path": tmp_path / "m.pt", "image_path": tmp_path / "wide.png", "max_new_tokens": 3}
    assert run({**task, "type": "dense_caption", "top_k": 50})["regions"]
    with pytest.raises(UserError, match="boxes: box_cut_off"):
        run({**task, "type": "dense_caption", "boxes": [[0, 0, 10, 10]]})
    told = run({**task, "type": "image_to_paragraph", "top_k": 3})
    assert told["regions"]


def test_no_boxes(reader: str, tmp_path: Path) -> None:
    captioner = open_captioner(reader, NONE, "cpu")
    assert isinstance(captioner, GitCaptioner)
    from git_model.models.language import Decoding

    assert describe(captioner, scene(), [], Decoding(max_new_tokens=3)) == []
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    told = run({"type": "image_to_paragraph", "model_path": reader, "image_path": tmp_path / "dot.png"})
    assert told["regions"] == []


def test_an_answer_list_and_an_input_are_not_overlooked(roi: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    task = {"type": "dense_caption", "model_path": roi, "image_path": path, "boxes": BOXES}
    (tmp_path / "list.txt").write_text("cat\ndog\n")
    found = run({**task, "answer_list": tmp_path / "list.txt"})["regions"]
    assert {entry["text"] for entry in found} <= {"cat", "dog"}
    for out in (path, roi):
        with pytest.raises(UserError, match=r"would overwrite the input|ending of a picture"):
            run({**task, "out_image": out})
    assert Image.open(path).size == SIZE


def test_best() -> None:
    said = [Said((0, 0, 10, 10), "a", -2.0), Said((1, 0, 10, 10), "b", -1.0), Said((50, 50, 60, 60), "c", -3.0)]
    assert [s.text for s in best(said, 9, 0.5)] == ["b", "c"]
    assert [s.text for s in best(said, 1, 0.95)] == ["b"]


def test_suppression_against_its_definition() -> None:
    dice = np.random.default_rng(0)
    corners = dice.uniform(0, 100, (60, 2, 2))
    boxes = [(*np.minimum(a, b).tolist(), *np.maximum(a, b).tolist()) for a, b in corners]
    scores = dice.normal(size=60).round(1).tolist()

    def iou(a: Any, b: Any) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
        return shared / (area - shared)

    kept: list[int] = []
    for i in sorted(range(60), key=lambda i: -scores[i]):
        if all(iou(boxes[i], boxes[j]) <= 0.3 for j in kept):
            kept.append(i)
    assert suppressed(boxes, scores, 0.3) == kept
    assert suppressed([], [], 0.3) == []


def test_proposals_of_a_grid_and_of_a_graph() -> None:
    picture = scene()
    grid = RegionProposer("grid")(picture)
    assert len(grid) == len(set(grid)) > 20
    assert all(0 <= x0 < x1 <= SIZE[0] and 0 <= y0 < y1 <= SIZE[1] for x0, y0, x1, y1 in grid)
    pytest.importorskip("skimage")
    graph = RegionProposer("graph")(picture)
    for box in BOXES:  # each drawn box is found to a pixel or two
        assert min(max(abs(a - b) for a, b in zip(box, found, strict=True)) for found in graph) <= 2
    assert graph == RegionProposer("graph")(picture)
    with pytest.raises(UserError, match="'grids'"):
        RegionProposer("grids")


def test_proposals_of_sam(tmp_path: Path) -> None:
    """The real architecture, small and random: boxes come out of its masks."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    vision = SamVisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16, output_channels=16,
        mlp_dim=32, window_size=0, global_attn_indexes=[0], num_pos_feats=8,
    )  # fmt: skip
    prompt = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    mask = SamMaskDecoderConfig(
        hidden_size=16, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16
    )
    torch.manual_seed(0)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask))
    for parameter in model.mask_decoder.iou_prediction_head.parameters():
        parameter.data.fill_(0.5)  # every mask is good
    model.save_pretrained(tmp_path)
    SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    found = RegionProposer("sam", str(tmp_path))(scene())
    assert found
    assert all(0 <= x0 < x1 <= SIZE[0] and 0 <= y0 < y1 <= SIZE[1] for x0, y0, x1, y1 in found)
    with pytest.raises(UserError, match="cannot load the SAM model"):
        RegionProposer("sam", str(tmp_path / "nothing"))


# --------------------------------------------------------------------------------------------------------------- TSVs
def test_tsv_in_tsv_out(roi: str, tmp_path: Path) -> None:
    rows = []
    for seed in range(3):
        file = io.BytesIO()
        scene(seed).save(file, "PNG")
        rows.append((f"k{seed}", base64.b64encode(file.getvalue()).decode()))
    rows.append(("bad", "!!"))
    write_tsv(tmp_path / "i.tsv", rows)
    task = {"type": "dense_caption_tsv", "model_path": roi, "image_tsv": str(tmp_path / "i.tsv"), "workers": 0}
    task |= {"top_k": 3, "max_new_tokens": 3, "max_bad": 0.5}
    report = run({**task, "out_tsv": str(tmp_path / "o.tsv")})
    assert report["ok"] == 3
    assert report["rows"] == 4
    out = TSVFile(tmp_path / "o.tsv")
    assert [out[i][0] for i in range(4)] == ["k0", "k1", "k2", "bad"]
    cells = json.loads(out[0][1])
    assert len(cells) == 3
    assert set(cells[0]) == {"caption", "rect", "conf"}
    assert json.loads(out[3][1]) == []
    for part in range(2):
        run({**task, "out_tsv": str(tmp_path / "p.tsv"), "part": part, "parts": 2})
    run({"type": "merge_tsv_parts", "out_tsv": str(tmp_path / "p.tsv"), "parts": 2, "max_bad": 0.5})
    assert (tmp_path / "p.tsv").read_bytes() == (tmp_path / "o.tsv").read_bytes()
    # what comes out can be trained on
    from git_model.datasets.sources import build_source

    source = build_source([{"type": "tsv", "images": "i.tsv", "regions": "o.tsv"}], tmp_path)
    assert len(source.said(0).targets) <= 3


# ------------------------------------------------------------------------------------------------------ drawn pictures
def test_the_drawn_box_is_where_it_belongs(tmp_path: Path) -> None:
    plain = Image.new("RGB", (100, 80))
    drawn = np.asarray(annotated(plain, [((10, 20, 50, 60), "")]))
    rows, columns = np.nonzero(drawn.any(axis=2))
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (10, 20, 50, 60)
    assert not drawn[21:59, 11:49].any(), "its inside is free"
    assert not np.asarray(plain).any(), "the picture itself stays"
    tiny = np.asarray(annotated(Image.new("RGB", (20, 20)), [((2, 2, 9, 9), "")]))
    assert tiny.any(), "a line is a pixel wide at least"
    with_text = np.asarray(annotated(plain, [((10, 20, 50, 60), "<b>cat</b>")]))
    assert with_text[21:40, 11:49].any()
    save_picture(annotated(plain, []), str(tmp_path / "x.png"))
    assert Image.open(tmp_path / "x.png").size == (100, 80)
    for name, told in (("x.txt", "'.png'|.png"), ("no/x.png", "no folder")):
        with pytest.raises(UserError, match=told):
            save_picture(plain, str(tmp_path / name))


def test_out_image(roi: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    task = {"type": "dense_caption", "model_path": roi, "image_path": path, "boxes": BOXES, "max_new_tokens": 2}
    run({**task, "out_image": str(tmp_path / "out.png")})
    large = scene().resize((6 * SIZE[0], 6 * SIZE[1]), Image.Resampling.BICUBIC)  # for the labels
    changed = np.asarray(Image.open(tmp_path / "out.png")) != np.asarray(large)
    assert changed[120:240, 30].any()
    assert not changed[:112, :].any(), "nothing above the boxes"
    with pytest.raises(UserError, match="no folder"):
        run({**task, "out_image": str(tmp_path / "no" / "out.png")})
