"""The embedded data set: drawn scenes with captions, questions and boxes, made anywhere in seconds.

A scene is a pure function of (seed, split, index). The `test` split shows combinations of colour, shape and
size that never occur in `train` and `val`, so its scores say whether the three were learned apart.
"""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import math
import os
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from git_model.datasets.records import json_cell, write_tsv
from git_model.datasets.shapes_prompt import prompt
from git_model.datasets.shapes_text import (
    COLOURS,
    HELD_OUT,
    PATTERNS,
    SHAPES,
    Box,
    Scene,
    Thing,
    said,
)
from git_model.errors import UserError, one_of

SPLITS = ("train", "val", "test")
COLUMNS = ("caption", "question", "region", "pair", "prompt")
VERSION = 4  # raise it when the drawing or the words change: folders written before are made anew
MIN_SIDE = 32
MIN_VISIBLE = 0.6
SUPERSAMPLE = 3

RGB = {
    "red": (214, 28, 38), "yellow": (252, 222, 40), "green": (26, 146, 58),
    "blue": (32, 78, 214), "white": (250, 250, 250), "black": (20, 20, 22),
}  # fmt: skip
# Of middle brightness and hardly saturated: white, black and every clear colour stand out.
TONE_RGB = {"gray": (150, 150, 152), "tan": (183, 162, 132), "mint": (146, 172, 156), "mauve": (166, 142, 160)}
RADII = {"small": (0.13, 0.143), "large": (0.215, 0.235)}  # fractions of the side
NUMBER_WEIGHTS = (40, 40, 20)  # of scenes with one, two and three things
USUAL, MOST = (1, 3), 4  # things in a scene


def make_scene(seed: int, split: str, index: int, side: int = 48, things: tuple[int, int] = USUAL) -> Scene:
    """Compose the scene number `index` of a split.

    Args:
        seed: of the whole data set.
        split: "train" or "val" (no held-out combination), or "test" (at least one in every scene).
        index: from 0, without an upper bound.
        side: of the square picture, in pixels.
        things: fewest and most in a scene; USUAL weighs their number by NUMBER_WEIGHTS, others are all as frequent.

    Raises:
        UserError: an unknown split, a side below MIN_SIDE, or numbers of things that are not from 1 to MOST.
    """
    if split not in SPLITS:
        raise one_of("split", split, SPLITS)
    if side < MIN_SIDE:
        raise UserError(f"side is {side}; a picture needs at least {MIN_SIDE} pixels")
    if not 1 <= things[0] <= things[1] <= MOST:
        raise UserError(f"{things[0]} to {things[1]} things in a scene; it has 1 to {MOST}")
    key = f"shapes_{seed}_{split}_{index:06d}"
    rng = random.Random(key)
    ground = f"{rng.choice(PATTERNS)} {rng.choice(list(TONE_RGB))}"
    number = rng.choices((1, 2, 3), weights=NUMBER_WEIGHTS)[0] if things == USUAL else rng.randint(*things)
    looks = _looks(rng, number, held_out=split == "test")
    while True:
        boxes = _layout(rng, looks, side)
        placed = [Thing(s, c, z, box) for (c, s, z), box in zip(looks, boxes, strict=True)]
        placed.sort(key=lambda t: (t.size != "large", t.centre))
        scene = Scene(key, tuple(placed), ground, side)
        if _readable(scene):
            return scene


def _looks(rng: random.Random, number: int, *, held_out: bool) -> list[tuple[str, str, str]]:
    """Choose (colour, shape, size) of each thing; no two share both colour and shape."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    while True:
        chosen = [rng.choice(pairs)]
        while len(chosen) < number:
            # Colours and shapes repeat more often than by chance: otherwise every count would be one.
            alike = rng.random() < 0.35
            pool = [p for p in pairs if p not in chosen and (not alike or {*p} & {*chosen[0]})]
            chosen.append(rng.choice(pool))
        rng.shuffle(chosen)
        num_large = rng.randint(*{3: (1, 2), 4: (0, 1)}.get(number, (0, number)))
        looks = [(c, s, "large" if i < num_large else "small") for i, (c, s) in enumerate(chosen)]
        if bool(HELD_OUT & {*looks}) == held_out:
            return looks


def _layout(rng: random.Random, looks: Sequence[tuple[str, str, str]], side: int) -> list[Box]:
    """Place the things without burying one under another."""
    boxes: list[Box] = []
    while len(boxes) < len(looks):
        colour, _, size = looks[len(boxes)]
        same = [colour == other for other, _, _ in looks[: len(boxes)]]
        tries = (_place(rng, size, side, alone=len(looks) == 1) for _ in range(10))
        fits = (t for t in tries if all(_apart(t, b, side, c) for b, c in zip(boxes, same, strict=True)))
        box = next(fits, None)
        boxes = [] if box is None else [*boxes, box]  # no room left: start again
    return boxes


def _place(rng: random.Random, size: str, side: int, *, alone: bool) -> Box:
    radius = rng.uniform(*RADII[size])
    if alone:  # near the middle of one of nine cells, so that the caption's place is plain to see
        x, y = (rng.choice((0.25, 0.5, 0.75)) + rng.uniform(-0.03, 0.03) for _ in range(2))
    else:
        x, y = (rng.uniform(radius + 0.02, 0.98 - radius) for _ in range(2))
    width = round(2 * radius * side)
    left, top = (min(max(round((c - radius) * side), 0), side - width) for c in (x, y))
    return left, top, left + width, top + width


def _apart(box: Box, other: Box, side: int, same_colour: bool) -> bool:
    """Tell whether two boxes overlap little, and not at all where their colours would run together."""
    radii = (box[2] - box[0] + other[2] - other[0]) / 2
    dx, dy = ((box[i] + box[i + 2] - other[i] - other[i + 2]) / 2 for i in range(2))
    if same_colour:
        return max(abs(dx), abs(dy)) > radii + 0.03 * side
    return math.hypot(dx, dy) > 0.8 * radii


def _readable(scene: Scene) -> bool:
    """Tell whether the order and the relation that captions use can be seen, and each thing too."""
    things = scene.things
    for first, second in itertools.pairwise(things):
        if first.size == second.size and second.centre[0] - first.centre[0] < 0.12 * scene.side:
            return False
    if len(things) > 1:
        dx, dy = (abs(a - b) / scene.side for a, b in zip(things[0].centre, things[1].centre, strict=True))
        if max(dx, dy) < 0.22 or abs(dx - dy) < 0.1:
            return False
    return min(visible_fractions(scene)) >= MIN_VISIBLE


def visible_fractions(scene: Scene) -> list[float]:
    """Return for each thing the fraction of its pixels that no later thing covers."""
    free = np.ones((scene.side, scene.side), bool)
    fractions = []
    for thing in reversed(scene.things):
        mask = Image.new("L", (scene.side, scene.side))
        _paint(ImageDraw.Draw(mask), thing, 255, 1)
        covered = np.asarray(mask) > 0
        fractions.append(float((covered & free).sum() / covered.sum()))
        free &= ~covered
    return fractions[::-1]


def draw_scene(scene: Scene) -> Image.Image:
    """Draw the scene as an RGB picture of scene.side pixels, anti-aliased by supersampling."""
    rng = random.Random(f"{scene.key}/drawing")
    picture = _ground(scene, rng)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        red, green, blue = (min(255, max(0, v + rng.randint(-8, 8))) for v in RGB[thing.colour])
        _paint(pen, thing, (red, green, blue), SUPERSAMPLE)
    return picture.reduce(SUPERSAMPLE)


def _ground(scene: Scene, rng: random.Random) -> Image.Image:
    """Return the textured ground, S = side * SUPERSAMPLE pixels square."""
    pattern, tone = scene.ground.split()
    size = scene.side * SUPERSAMPLE
    across = np.arange(size, dtype=np.float32) / size  # (S,)
    x, y = across[None, :], across[:, None]
    turn, phase, period = rng.uniform(0, math.pi), rng.random(), rng.uniform(0.11, 0.15)
    slope = x * math.cos(turn) + y * math.sin(turn)  # (S,S)
    if pattern == "plain":
        value = np.zeros((size, size), np.float32)
    elif pattern == "striped":
        value = np.sign(np.sin(slope * (2 * math.pi / period) + 2 * math.pi * phase))
    elif pattern == "dotted":
        u, v = ((c / period + phase) % 1 - 0.5 for c in (x, y))
        value = (u * u + v * v < 0.07) * np.float32(1.8) - np.float32(0.5)
    elif pattern == "checkered":
        value = ((x / period + phase) % 2 < 1) * np.float32(2) - np.float32(1)  # (1,S)
        value = value * value.T  # (S,S)
    elif pattern == "shaded":
        value = (slope - slope.min()) / (slope.max() - slope.min()) * 3.6 - 1.8
    else:
        dice = np.random.default_rng(zlib.crc32(scene.key.encode()))
        grains = dice.standard_normal((scene.side, scene.side), np.float32).clip(-2, 2)
        value = grains.repeat(SUPERSAMPLE, 0).repeat(SUPERSAMPLE, 1)
    shade = (value * 16 + (64 + rng.randint(-8, 8))).astype(np.uint8)  # (S,S); plus any tone: 92..223
    return Image.merge("RGB", [Image.fromarray(shade + np.uint8(c - 64)) for c in TONE_RGB[tone]])


@functools.cache
def _outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a polygonal shape, scaled to fill the unit square."""
    if shape == "square":
        return [(0, 0), (1, 0), (1, 1), (0, 1)]
    if shape == "triangle":
        return [(0.5, 0), (1, 1), (0, 1)]
    if shape == "cross":
        a, b = 0.32, 0.68
        return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
    radii = [1.0, 0.42] * 5  # what is left: the star
    corners = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]
    left, top = (min(c[i] for c in corners) for i in range(2))
    width, height = (max(c[i] for c in corners) - low for i, low in ((0, left), (1, top)))
    return [((u - left) / width, (v - top) / height) for u, v in corners]


def _paint(pen: ImageDraw.ImageDraw, thing: Thing, fill: int | tuple[int, int, int], scale: int) -> None:
    left, top, right, bottom = (scale * v for v in thing.box)
    width, height = right - left - 1, bottom - top - 1  # PIL includes the last row and column
    if thing.shape == "circle":
        pen.ellipse((left, top, left + width, top + height), fill=fill)
    else:
        pen.polygon([(left + u * width, top + v * height) for u, v in _outline(thing.shape)], fill=fill)


def write_shapes(
    out_dir: Path,
    *,
    train: int = 10_500,
    val: int = 400,
    test: int = 400,
    side: int = 48,
    seed: int = 0,
    things: tuple[int, int] = USUAL,
    progress: bool = True,
) -> dict[str, int]:
    """Write the data set as GIT TSV files: image, caption, question, region, pair and prompt for each split.

    Nothing is written when `dataset.json`, which comes last, already states the same parameters.

    Args:
        out_dir: made if need be.
        train, val, test: scenes in each split; these numbers are returned.
        side: of the square pictures, in pixels.
        seed: of the whole data set.
        things: fewest and most in a scene.
        progress: show a bar on stderr.

    Raises:
        UserError: a negative count; or see `make_scene`.
    """
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if count < 0:
            raise UserError(f"{split} is {count}; the number of scenes must be 0 or more")
    stated: dict[str, object] = {"version": VERSION, "seed": seed, "side": side, "things": list(things)}
    stated |= {"counts": counts, "held_out": sorted(HELD_OUT)}
    text = json.dumps(stated)
    statement = out_dir / "dataset.json"
    names = [out_dir / f"{split}.{column}.tsv" for split in SPLITS for column in ("img", *COLUMNS)]
    done = statement.is_file() and statement.read_text(encoding="utf-8") == text
    if done and all(name.is_file() for name in names):
        return counts
    make_scene(seed, "train", 0, side, things)  # refuses a bad side before anything is touched
    out_dir.mkdir(parents=True, exist_ok=True)
    statement.unlink(missing_ok=True)  # a run that stops half-way must not look finished
    with tqdm(total=sum(counts.values()), desc="drawing shapes", unit="scene", disable=not progress) as bar:
        for split, count in counts.items():
            scenes = [make_scene(seed, split, i, side, things) for i in range(count)]
            write_tsv(out_dir / f"{split}.img.tsv", _image_rows(scenes, bar))
            following = [*scenes[1:], *scenes[:1]]
            told = [
                {**said(scene, after, i), "prompt": [{"caption": prompt(scene)}]}
                for i, (scene, after) in enumerate(zip(scenes, following, strict=True))
            ]
            for column in COLUMNS:
                rows = ((s.key, json_cell(words[column])) for s, words in zip(scenes, told, strict=True))
                write_tsv(out_dir / f"{split}.{column}.tsv", rows)
    statement.with_suffix(".partial").write_text(text, encoding="utf-8")
    os.replace(statement.with_suffix(".partial"), statement)
    return counts


def _image_rows(scenes: Sequence[Scene], bar: tqdm) -> Iterator[tuple[str, str]]:
    for scene in scenes:
        file = io.BytesIO()
        draw_scene(scene).save(file, "PNG", compress_level=1)
        bar.update()
        yield scene.key, base64.b64encode(file.getvalue()).decode("ascii")
