"""Image to paragraph: a picture, a folder, a TSV; whose captions and regions; phrases; nothing leaves the machine."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from paging import LISTENER
from PIL import Image
from published import save, save_clip, save_diffusion
from test_dense import BOXES, SIZE, checkpoint, saved_png, scene

from git_model.datasets.records import TSVFile, write_tsv
from git_model.errors import UserError
from git_model.models.phrases import PhraseBank, TwoTowers, read_phrases
from git_model.models.proposals import RegionProposer, masked
from git_model.tasks.levels import Levels, Thing, place_of
from git_model.tasks.picture import captioned, wrapped
from git_model.tasks.registry import run
from git_model.tasks.writers import broken_rules

ROOT = Path(__file__).resolve().parent.parent
TASK = {"type": "image_to_paragraph", "max_new_tokens": 5, "top_k": 3, "largest": 2, "workers": 0}


@pytest.fixture(scope="module")
def roi(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("roi"), "roi")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("plain"), "none")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_clip(tmp_path_factory.mktemp("clip"))


def levels_of(record: dict[str, Any]) -> Levels:
    things = tuple(Thing(tuple(r["rect"]), r["caption"]) for r in record["regions"])
    return Levels(tuple(record["size"]), record["global"], things)


def test_a_picture(roi: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    told = run({**TASK, "model_path": roi, "image_path": path, "out_image": tmp_path / "out.png"})
    assert told["size"] == list(SIZE)
    assert len(told["regions"]) == 3
    assert [r["conf"] for r in told["regions"]] == sorted((r["conf"] for r in told["regions"]), reverse=True)
    assert len(told["semantics"]) == 2
    assert told["writer"] == "template"
    assert "why" not in told
    if told["paragraph"]:
        assert not broken_rules(told["paragraph"], levels_of(told))
    assert told == run({**TASK, "model_path": roi, "image_path": path}), "the same twice"
    drawn = Image.open(tmp_path / "out.png")
    assert drawn.width >= SIZE[0]
    assert drawn.height > SIZE[1], "the text is under the picture"
    alone = run({"type": "dense_caption", "model_path": roi, "image_path": path, "boxes": BOXES, "max_new_tokens": 5})
    given = run({**TASK, "model_path": roi, "image_path": path, "boxes": BOXES})
    assert [r["caption"] for r in given["regions"]] == [r["text"] for r in alone["regions"]]
    assert [r["rect"] for r in given["regions"]] == BOXES


def test_one_frame_at_any_resolution(roi: str, tmp_path: Path) -> None:
    """Boxes in, boxes out and places are the file's own pixels, whatever the encoder's resolution is."""
    places = []
    for scale in (1, 2, 7):
        scene().resize((SIZE[0] * scale, SIZE[1] * scale), Image.Resampling.NEAREST).save(tmp_path / "a.png")
        boxes = [[v * scale for v in box] for box in BOXES]
        told = run({**TASK, "model_path": roi, "image_path": tmp_path / "a.png", "boxes": boxes})
        assert [r["rect"] for r in told["regions"]] == boxes
        places.append([place_of(r["rect"], told["size"]) for r in told["regions"]])
        for place, region in zip(places[-1], told["regions"], strict=True):
            assert not region["caption"].strip() or place in told["paragraph"].casefold()
    assert places == [["on the left", "in the middle", "on the right"]] * 3


def test_whose_captions(roi: str, plain: str, tmp_path: Path) -> None:
    path = saved_png(tmp_path / "a.png")
    whole = run(
        {"type": "test_git_inference_single_image", "model_path": plain, "image_path": path, "max_new_tokens": 5}
    )
    told = run({**TASK, "model_path": roi, "caption_model": plain, "image_path": path})
    assert told["global"] == whole["text"]
    assert run({**TASK, "model_path": roi, "whole": False, "image_path": path})["global"] == ""
    parts = run({**TASK, "model_path": roi, "region_model": plain, "image_path": path, "boxes": BOXES})
    for region, box in zip(parts["regions"], BOXES, strict=True):
        scene().crop(tuple(box)).save(tmp_path / "part.png")  # type: ignore[arg-type]
        ask = {"type": "test_git_inference_single_image", "model_path": plain, "image_path": tmp_path / "part.png"}
        assert region["caption"] == run({**ask, "max_new_tokens": 5})["text"]
        assert region["conf"] is None


def test_a_folder_and_a_tsv(roi: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "below/c.png", "a.png")):
        scene(seed).save(folder / name)
    (folder / "broken.jpg").write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    task = {**TASK, "model_path": roi, "max_bad": 0.5}
    report = run({**task, "image_path": folder, "out_tsv": tmp_path / "f.tsv"})
    assert (report["rows"], report["ok"], report["reasons"]) == (4, 3, {"not_image:text": 1})
    out = TSVFile(tmp_path / "f.tsv")
    assert [out[i][0] for i in range(4)] == ["a.png", "b.png", "below/c.png", "broken.jpg"]
    assert json.loads(out[3][1]) == [{"caption": "", "error": "not_image:text"}]
    (record,) = json.loads(out[0][1])
    single = run({**TASK, "model_path": roi, "image_path": folder / "a.png"})
    assert record["caption"] == single["paragraph"]
    assert record["regions"] == single["regions"]
    rows = [(name, base64.b64encode((folder / name).read_bytes())) for name in ("a.png", "b.png", "below/c.png")]
    write_tsv(tmp_path / "i.tsv", rows)
    run({**task, "image_tsv": tmp_path / "i.tsv", "out_tsv": tmp_path / "t.tsv"})
    assert [TSVFile(tmp_path / "t.tsv")[i] for i in range(3)] == [out[i] for i in range(3)]
    for part in range(2):
        run({**task, "image_tsv": tmp_path / "i.tsv", "out_tsv": tmp_path / "p.tsv", "part": part, "parts": 2})
    run({"type": "merge_tsv_parts", "out_tsv": tmp_path / "p.tsv", "parts": 2})
    assert (tmp_path / "p.tsv").read_bytes() == (tmp_path / "t.tsv").read_bytes()


def test_regions_from_a_file(roi: str, tmp_path: Path) -> None:
    rows = []
    for seed in range(3):
        file = io.BytesIO()
        scene(seed).save(file, "PNG")
        rows.append((f"k{seed}", base64.b64encode(file.getvalue())))
    write_tsv(tmp_path / "i.tsv", rows)
    outside = [{"rect": [0, 0, SIZE[0] + 1, 5]}]
    write_tsv(tmp_path / "r.tsv", [("k0", json.dumps([{"box": b} for b in BOXES])), ("k1", json.dumps(outside))])
    task = {**TASK, "model_path": roi, "image_tsv": tmp_path / "i.tsv", "region_tsv": tmp_path / "r.tsv", "max_bad": 1}
    report = run({**task, "out_tsv": tmp_path / "o.tsv"})
    assert report["reasons"] == {"box_outside": 1, "no_regions": 1}
    (record,) = json.loads(TSVFile(tmp_path / "o.tsv")[0][1])
    assert [r["rect"] for r in record["regions"]] == BOXES
    write_tsv(tmp_path / "bad.tsv", [("k0", "[{}]")])
    with pytest.raises(UserError, match=r"row 0 of .*bad\.tsv holds no boxes"):
        run({**task, "region_tsv": tmp_path / "bad.tsv", "out_tsv": tmp_path / "x.tsv"})


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "give one of image_path and image_tsv"),
        ({"image_path": "{png}", "image_tsv": "{tsv}"}, "give one of image_path and image_tsv"),
        ({"image_tsv": "{tsv}"}, "needs out_tsv"),
        (
            {"image_tsv": "{tsv}", "out_tsv": "o.tsv", "boxes": [[0, 0, 1, 1]]},
            "boxes and out_image are for one picture",
        ),
        ({"image_path": "{png}", "region_tsv": "{tsv}"}, "region_tsv goes with image_tsv"),
        ({"image_path": "{png}", "writer": "gpt"}, "writer must be one of"),
        ({"image_path": "{png}", "writer_prompt": "none.txt"}, "cannot read writer_prompt 'none.txt'"),
        ({"image_path": "{png}", "writer": "openai", "key_env": "NOT_SET"}, "NOT_SET is not set"),
        ({"image_path": "{png}", "phrases": "none.txt"}, "cannot read the phrases of 'none.txt'"),
        ({"image_path": "{png}", "caption_model": "x/none.pt"}, "no checkpoint at x/none.pt"),
        ({"image_path": "{png}", "boxes": [[0, 0, 1000, 1]]}, "box_outside"),
    ],
)
def test_what_does_not_fit(roi: str, tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    places = {"{png}": saved_png(tmp_path / "a.png"), "{tsv}": str(tmp_path / "a.tsv")}
    write_tsv(tmp_path / "a.tsv", [("k", "!!")])
    with pytest.raises(UserError, match=told):
        run({**TASK, "model_path": roi, **{k: places.get(str(v), v) for k, v in keys.items()}})


def test_the_model_itself_writes_or_the_template(roi: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved_png(tmp_path / "a.png")
    (tmp_path / "short.txt").write_text("tell: {caption}")
    task = {**TASK, "model_path": roi, "image_path": path, "writer": "decoder"}
    long = run(task)
    assert long["writer"] == "template"
    assert "more than 221" in long["why"]
    short = run({**task, "writer_prompt": tmp_path / "short.txt"})
    assert short["why"], "an untrained model's words break the rules"
    assert short["paragraph"] == run({**task, "writer": "template"})["paragraph"]
    assert caplog.text.count("the template writes") == 2


def test_nothing_leaves_the_machine(roi: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        LISTENER.replace('if where not in (None, "", "127.0.0.1", "localhost", "::1"):', "if True:")
    )
    params = {**TASK, "model_path": roi, "image_path": saved_png(tmp_path / "a.png")}
    done = subprocess.run(
        [sys.executable, "inference.py", "-p", json.dumps(params)], cwd=ROOT, capture_output=True, text=True,
        check=True, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert json.loads(done.stdout)["writer"] == "template"
    assert "FOREIGN" not in done.stderr


# ------------------------------------------------------------------------------------------------------------- phrases
def test_phrases_name_the_largest_regions(roi: str, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "list.txt").write_text("a dog\na cat\n\na dog\na plate of food\n")
    path = saved_png(tmp_path / "a.png")
    task = {
        **TASK,
        "model_path": roi,
        "image_path": path,
        "boxes": BOXES,
        "phrases": tmp_path / "list.txt",
        "towers": clip,
    }
    told = run(task)
    towers = TwoTowers(clip)
    bank = PhraseBank(read_phrases(str(tmp_path / "list.txt")), towers)
    assert bank.phrases == ["a dog", "a cat", "a plate of food"]
    crops = [scene().crop(tuple(box)) for box in BOXES[:2]]  # type: ignore[arg-type]
    scores = towers.pictures(crops) @ towers.texts(bank.phrases).T
    assert [s["caption"] for s in told["semantics"]] == [bank.phrases[i] for i in scores.argmax(1)]
    (kept,) = (tmp_path / "cache" / "git_model" / "phrases").iterdir()
    assert np.load(kept) == pytest.approx(bank.vectors)
    np.save(kept, np.roll(np.load(kept), 1, 0))  # the next run reads it
    assert [s["caption"] for s in run(task)["semantics"]] == [bank.phrases[(i + 1) % 3] for i in scores.argmax(1)]
    kept.write_bytes(b"damaged")
    assert run(task) == told


def test_vectors_of_both_towers(clip: str) -> None:
    from transformers import AutoModel, AutoProcessor

    towers, pictures, texts = TwoTowers(clip), [scene(0), scene(1).resize((33, 71))], ["a dog", "a plate of food"]
    model, processor = AutoModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    with torch.no_grad():
        inputs = processor(images=pictures, text=texts, return_tensors="pt", padding="max_length", max_length=12)
        out = model(**inputs)
    assert towers.pictures(pictures) == pytest.approx(out.image_embeds.numpy(), abs=1e-5)
    assert towers.texts(texts) == pytest.approx(out.text_embeds.numpy(), abs=1e-5)
    assert towers.texts(texts, batch_size=1) == pytest.approx(towers.texts(texts), abs=1e-6)


def test_what_is_no_bank(clip: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        PhraseBank([], TwoTowers(clip))
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(UserError, match="holds no phrase"):
        read_phrases(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="no such folder"):
        TwoTowers("./nothing/here")


# ------------------------------------------------------------------------------------------------------------- redrawn
def test_redrawn_from_its_edges_and_text(roi: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the package diffusers is not installed")
    from git_model.models.diffusion import Redrawer

    model, control = save_diffusion(tmp_path)
    draw = Redrawer(model, control)
    first = draw(scene(), "a dog")
    assert first.size == (88, 64)
    assert draw(scene(), "a dog").tobytes() == first.tobytes(), "the seed decides"
    for other in (draw(scene(), "a dog", seed=1), draw(scene(), "zzz"), draw(scene().rotate(90), "a dog")):
        assert other.tobytes() != first.tobytes(), "noise, text and edges make a difference"
    task = {**TASK, "model_path": roi, "image_path": saved_png(tmp_path / "a.png"), "controlnet": control}
    told = run({**task, "out_image": tmp_path / "out.png", "redraw": model})
    drawn = Image.open(tmp_path / "out.png")
    assert drawn.width == 6 * SIZE[0] + round(88 * 6 * SIZE[1] / 64)
    assert told == run({**TASK, "model_path": roi, "image_path": tmp_path / "a.png"})
    with pytest.raises(UserError, match="draws into out_image"):
        run({**task, "redraw": model})
    with pytest.raises(UserError, match="no such folder"):
        Redrawer(model, str(tmp_path / "none"))


def test_a_published_captioner(roi: str, tmp_path: Path) -> None:
    """Another's model for the whole and for the regions: what is in a box alone."""
    published, path = str(save("git", tmp_path / "git")), saved_png(tmp_path / "a.png")
    alone = {"type": "test_git_inference_single_image", "model_path": published, "max_new_tokens": 5}
    told = run({**TASK, "model_path": published, "image_path": path, "boxes": BOXES})
    assert told["global"] == run({**alone, "image_path": path})["text"]
    for region, box in zip(told["regions"], BOXES, strict=True):
        scene().crop(tuple(box)).save(tmp_path / "part.png")  # type: ignore[arg-type]
        assert region["caption"] == run({**alone, "image_path": tmp_path / "part.png"})["text"]
    mixed = run({**TASK, "model_path": roi, "caption_model": published, "image_path": path, "boxes": BOXES})
    assert mixed["global"] == told["global"]
    assert mixed["regions"] != told["regions"]


# --------------------------------------------------------------------------------------------------------- small parts
def test_what_belongs_to_a_region() -> None:
    proposer = RegionProposer("graph")
    found = proposer.regions(scene())
    assert [box for box, _ in found] == proposer(scene())
    for box, mask in found:
        assert mask is not None
        part = np.asarray(masked(scene(), box, mask))
        assert part.shape == (box[3] - box[1], box[2] - box[0], 3)
        inside = mask[box[1] : box[3], box[0] : box[2]]
        assert (part[~inside] == 0).all()
        assert (part[inside] == np.asarray(scene().crop(box))[inside]).all()
    assert RegionProposer("grid").regions(scene())[0][1] is None


def test_a_text_under_a_picture() -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(12)
    text = "a rather long text " * 10 + "x" * 300
    lines = wrapped(text, font, 150)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 150 for line in lines)
    assert wrapped("", font, 150) == []
    drawn = captioned(scene(), text)
    assert (
        drawn.crop((0, 0, drawn.width, SIZE[1])).tobytes()
        != drawn.crop((0, SIZE[1], drawn.width, 2 * SIZE[1])).tobytes()
    )
