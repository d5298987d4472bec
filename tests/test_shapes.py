"""The drawn data set: what is said about a scene is true, unambiguous and the same everywhere."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from git_model.datasets import shapes, shapes_text
from git_model.datasets.records import TSVFile
from git_model.datasets.shapes import draw_scene, make_scene, visible_fractions, write_shapes
from git_model.datasets.shapes_prompt import prompt
from git_model.datasets.shapes_text import HELD_OUT, QA, Scene, Thing, captions, questions, regions
from git_model.errors import UserError

NUM = 150
SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: [make_scene(0, split, i) for i in range(NUM)] for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def every(scenes: dict[str, list[Scene]]) -> list[Scene]:
    return [s for split in scenes.values() for s in split]


def find(scene: Scene, words: str) -> list[Thing]:
    """All things that every given word fits ("object" fits all)."""
    wanted = set(words.split()) - {"object"}
    return [t for t in scene.things if wanted <= {t.size, t.colour, t.shape}]


def the(scene: Scene, words: str) -> Thing:
    found = find(scene, words)
    assert len(found) == 1, f"'{words}' is not unique in {scene}"
    return found[0]


def shift(a: Thing, b: Thing, side: str) -> float:
    """How far, in pixels, a's centre lies towards `side` of b's."""
    axis, sign = SIDES[side]
    return sign * (a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) / 2


def singular(word: str) -> str:
    return {"crosses": "cross", "objects": "object"}.get(word, word.removesuffix("s"))


def solve(scene: Scene, question: str) -> str:
    """Answer a question from the geometry alone; fails where it is ambiguous or unknown."""
    clear = 0.15 * scene.side
    if question == "what does the background look like?":
        return scene.ground.split()[0]
    if m := re.fullmatch(r"how many (.+) are there\?", question):
        return str(len(find(scene, " ".join(singular(w) for w in m[1].split()))))
    if m := re.fullmatch(r"what (shape|color) is (left of|right of|above|below) the (.+)\?", question):
        b, side = the(scene, m[3]), m[2].removesuffix(" of")
        moved = {t: shift(t, b, side) for t in scene.things if t is not b}
        assert all(abs(v) > clear for v in moved.values())
        (only,) = [t for t, v in moved.items() if v > 0]
        return only.shape if m[1] == "shape" else only.colour
    if m := re.fullmatch(r"what color is the (.+)\?", question):
        return the(scene, m[1]).colour
    if m := re.fullmatch(r"what shape is the (.+)\?", question):
        return the(scene, m[1]).shape
    if m := re.fullmatch(r"is the (.+) small or large\?", question):
        return the(scene, m[1]).size
    if m := re.fullmatch(r"is the (.+) (left or right of|above or below) the (.+)\?", question):
        a, b = the(scene, m[1]), the(scene, m[3])
        near, far = m[2].removesuffix(" of").split(" or ")
        assert abs(shift(a, b, near)) > clear
        return near if shift(a, b, near) > 0 else far
    if m := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if find(scene, m[1]) else "no"
    if m := re.fullmatch(r"is the (\w+) (\w+)\?", question):
        return "yes" if the(scene, m[1]).colour == m[2] else "no"
    raise AssertionError(f"a question of no known form: {question}")


def looks(scene: Scene) -> set[tuple[str, str, str]]:
    return {(t.colour, t.shape, t.size) for t in scene.things}


def test_a_scene_is_a_pure_function_of_seed_split_and_index(scenes: dict[str, list[Scene]]) -> None:
    again = make_scene(0, "train", 7)
    assert again == scenes["train"][7]
    assert captions(again) == captions(scenes["train"][7])
    assert questions(again) == questions(scenes["train"][7])
    assert draw_scene(again).tobytes() == draw_scene(scenes["train"][7]).tobytes()
    others = [make_scene(1, "train", 7), make_scene(0, "val", 7), make_scene(0, "train", 8)]
    assert len({again.things, *(s.things for s in others)}) == 4


def test_held_out_combinations_are_only_in_test(scenes: dict[str, list[Scene]]) -> None:
    assert len(HELD_OUT) == 6
    every = itertools.product(shapes_text.COLOURS, shapes_text.SHAPES, shapes_text.SIZES)
    kept = set(every) - HELD_OUT
    assert {(c, s) for c, s, _ in kept} == set(itertools.product(shapes_text.COLOURS, shapes_text.SHAPES))
    assert {size for *_, size in HELD_OUT} == set(shapes_text.SIZES)
    names = [f"{size} {c} {s}" for c, s, size in HELD_OUT]
    for scene in scenes["train"] + scenes["val"]:
        assert not looks(scene) & HELD_OUT
        said = [*captions(scene), *(f"{qa.question} {qa.answer}" for qa in questions(scene))]
        assert not [name for name in names for text in said if name in text]
    assert all(looks(scene) & HELD_OUT for scene in scenes["test"])
    assert set().union(*map(looks, scenes["test"])) >= HELD_OUT


def test_every_answer_follows_from_the_geometry(every: list[Scene]) -> None:
    kinds: Counter[str] = Counter()
    for scene in every:
        asked = questions(scene)
        assert 6 <= len(asked) <= 16
        assert len({qa.question for qa in asked}) == len(asked)
        for qa in asked:
            assert solve(scene, qa.question) == qa.answer, (scene, qa)
            kinds[qa.kind] += 1
    assert set(kinds) == {"count", "colour", "shape", "size", "relation", "yes/no", "ground"}
    assert min(kinds.values()) > NUM


@pytest.mark.parametrize("form", ["is there", "", "is the \\w+ \\w+\\?"])
def test_yes_and_no_are_balanced(form: str) -> None:
    asked: list[QA] = [q for i in range(700) for q in questions(make_scene(3, "train", i))]
    said = [q.answer for q in asked if q.kind == "yes/no" and re.search(form, q.question)]
    assert set(said) == {"yes", "no"}
    assert 0.45 <= said.count("yes") / len(said) <= 0.55


def test_five_varied_captions_name_what_is_there(every: list[Scene]) -> None:
    words: set[str] = set()
    for scene in every:
        said = captions(scene)
        assert len(said) == len(set(said)) == 5
        first, second = scene.things[0], scene.things[min(1, len(scene.things) - 1)]
        for text in said:
            assert re.fullmatch(r"[a-z ]+", text)
            assert len(text.split()) <= 20
            assert first.name in text
            assert second.name in text
            words |= set(text.split())
    for scene in every:
        words |= {w for qa in questions(scene) for w in f"{qa.question[:-1]} {qa.answer}".split()}
    assert len(words) <= 150


def test_captions_tell_the_truth_about_relations(every: list[Scene]) -> None:
    pattern = re.compile(
        r"(?:large|small|big|little) (\w+ \w+)(?: is)? (left of|right of|above|below) (?:a|the) \w+ (\w+ \w+)"
    )
    checked = 0
    for scene in every:
        for text in captions(scene):
            for a, said, b in pattern.findall(text):
                assert shift(the(scene, a), the(scene, b), said.removesuffix(" of")) > 0.2 * scene.side
                checked += 1
    assert checked > 2 * len(every)


def test_the_order_of_mention_can_be_seen(every: list[Scene]) -> None:
    for scene in every:
        order = [(t.size == "small", t.box[0] + t.box[2]) for t in scene.things]
        assert order == sorted(order)
        for size in ("small", "large"):
            xs = [(t.box[0] + t.box[2]) / 2 for t in scene.things if t.size == size]
            assert all(b - a >= 0.12 * scene.side for a, b in itertools.pairwise(xs))
    small = max(t.box[2] - t.box[0] for s in every for t in s.things if t.size == "small")
    assert 1.5 * small <= min(t.box[2] - t.box[0] for s in every for t in s.things if t.size == "large")


def test_things_are_visible_where_their_boxes_say(every: list[Scene]) -> None:
    for scene in every:
        assert min(visible_fractions(scene)) >= 0.6
        pixels = np.asarray(draw_scene(scene)).astype(int)
        assert pixels.shape == (scene.side, scene.side, 3)
        inside = np.zeros(pixels.shape[:2], bool)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scene.side
            assert 0 <= top < bottom <= scene.side
            inside[top:bottom, left:right] = True
            x, y = (int(c) for c in thing.centre)
            assert np.abs(pixels[y, x] - shapes.RGB[thing.colour]).max() <= 10, (scene, thing)
        # Outside all boxes there is only the muted ground: hardly saturated, neither black nor white.
        ground = pixels[~inside]
        assert np.ptp(ground, axis=1).max() <= 60
        assert ground.min() >= 90
        assert ground.max() <= 225


def test_a_thing_covered_by_another_counts_as_hidden() -> None:
    below = Thing("square", "red", "large", (0, 0, 20, 20))
    above = Thing("square", "blue", "large", (0, 10, 20, 30))
    assert visible_fractions(Scene("x", (below, above), "plain gray", 64)) == [0.5, 1.0]


def test_regions_are_the_things(every: list[Scene]) -> None:
    for scene in every[:20]:
        assert regions(scene) == [(f"a {t.size} {t.colour} {t.shape}", t.box) for t in scene.things]


def test_a_larger_side_shows_the_whole_things() -> None:
    scene = make_scene(0, "train", 0, side=224)
    assert draw_scene(scene).size == (224, 224)
    assert max(v for t in scene.things for v in t.box) > 64


def test_one_style_written_correctly_scores_above_three(scenes: dict[str, list[Scene]]) -> None:
    from pycocoevalcap.cider.cider import Cider

    references = {s.key: captions(s) for s in scenes["test"]}
    for style in range(len(shapes_text.PAIR_STYLES)):
        written = {s.key: [shapes_text.caption(s, style)] for s in scenes["test"]}
        assert Cider().compute_score(references, written)[0] > 3.0, shapes_text.PAIR_STYLES[style]


def test_files_are_written_once(tmp_path: Path) -> None:
    counts = write_shapes(tmp_path, train=5, val=3, test=2, progress=False)
    assert counts == {"train": 5, "val": 3, "test": 2}
    expected = {
        f"{split}.{column}.{suffix}"
        for split in counts
        for column in ("img", "caption", "question", "region", "pair", "prompt")
        for suffix in ("tsv", "lineidx", "lineidx.8b")
    }
    assert {p.name for p in tmp_path.iterdir()} == expected | {"dataset.json"}
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert write_shapes(tmp_path, train=5, val=3, test=2, progress=False) == counts
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    write_shapes(tmp_path, train=5, val=3, test=2, seed=1, progress=False)
    assert json.loads((tmp_path / "dataset.json").read_text())["seed"] == 1
    assert TSVFile(tmp_path / "train.img.tsv")[0][0] == make_scene(1, "train", 0).key
    (tmp_path / "val.region.tsv").unlink()
    write_shapes(tmp_path, train=5, val=3, test=2, seed=1, progress=False)
    assert (tmp_path / "val.region.tsv").is_file()


def test_files_hold_the_scenes(tmp_path: Path) -> None:
    write_shapes(tmp_path, train=6, val=0, test=0, progress=False)
    files = {c: TSVFile(tmp_path / f"train.{c}.tsv") for c in ("img", "caption", "question", "region")}
    ids: list[int] = []
    for i in range(6):
        scene = make_scene(0, "train", i)
        rows = {column: file[i] for column, file in files.items()}
        assert {row[0] for row in rows.values()} == {scene.key}
        picture = Image.open(io.BytesIO(base64.b64decode(rows["img"][1])))
        assert picture.tobytes() == draw_scene(scene).tobytes()
        assert [c["caption"] for c in json.loads(rows["caption"][1])] == captions(scene)
        asked = json.loads(rows["question"][1])
        assert [QA(q["question"], q["answer"], q["question_type"]) for q in asked] == questions(scene)
        ids += [q["question_id"] for q in asked]
        assert json.loads(rows["region"][1]) == [{"phrase": p, "box": [*box]} for p, box in regions(scene)]
    assert len(set(ids)) == len(ids)
    assert len(TSVFile(tmp_path / "val.img.tsv")) == 0


def test_wrong_parameters_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown split 'tset' .did you mean 'test'"):
        make_scene(0, "tset", 0)
    write_shapes(tmp_path, train=1, val=0, test=0, progress=False)
    with pytest.raises(UserError, match=r"side is 8; .* at least 32"):
        write_shapes(tmp_path, side=8)
    with pytest.raises(UserError, match="val is -1"):
        write_shapes(tmp_path, val=-1)
    assert (tmp_path / "dataset.json").is_file()


def test_prompts_tell_of_things_and_ground(every: list[Scene], tmp_path: Path) -> None:
    """Each thing once in the order of mention, then the style and palette of the ground, which no other ground has."""
    styles: dict[str, set[str]] = {}
    for scene in every:
        said, *rest = prompt(scene).split(", ")
        assert re.findall(r"(small|large) (\w+) (\w+)", said) == [(t.size, t.colour, t.shape) for t in scene.things]
        if len(scene.things) > 1:
            assert shapes_text.relation(*scene.things[:2]) in said
        styles.setdefault(scene.ground, set()).add(", ".join(rest))
    assert all(len(said) == 1 for said in styles.values())
    assert len(set.union(*styles.values())) == len(styles) == 24
    write_shapes(tmp_path, train=3, val=0, test=0, progress=False)
    rows = [TSVFile(tmp_path / "train.prompt.tsv")[i] for i in range(3)]
    assert [json.loads(cell) for _, cell in rows] == [
        [{"caption": prompt(make_scene(0, "train", i))}] for i in range(3)
    ]
