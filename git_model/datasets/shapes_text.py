"""What is said about a drawn scene: its words, five captions, questions with answers, regions, and pairs of scenes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "yellow", "green", "blue", "white", "black")
PATTERNS = ("plain", "striped", "dotted", "checkered", "shaded", "grainy")
NUMBERS = ("zero", "one", "two", "three", "four")

SIZES = ("small", "large")

# Six of the sixty combinations of colour, shape and size, one of every colour. Each has its twin of the other size in
# training, so colour and shape are seen together, but never at this size.
HELD_OUT: frozenset[tuple[str, str, str]] = frozenset(
    (colour, SHAPES[-i % len(SHAPES)], SIZES[i % 2]) for i, colour in enumerate(COLOURS)
)

CLEAR = 0.15  # of the side: a smaller displacement is not asked about
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ASKED_OF = (("shape", "shape"), ("color", "colour"))  # the word of a question, the field of a Thing
SYNONYMS = {"small": "little", "large": "big"}
NUM_CAPTIONS = 5
PAIR_QUESTION = "image 1 [IMG] image 2 [IMG] describe image {number}"

Box = tuple[int, int, int, int]

# {a}, {b}: the first two things in the order of mention, {big_a}, {big_b} in other words for their size;
# {tail}: the other things; {rel}, {back}: where a is, seen from b, and b, seen from a.
# The first three begin and end alike on purpose: references that share n-grams give CIDEr its scale.
PAIR_STYLES = (
    "a {a} {rel} a {b}{tail}",
    "there is a {a} {rel} a {b}{tail}",
    "a {a} {rel} a {b}{tail} on a {ground} background",
    "a {b} {back} a {a}{tail}",
    "a picture of {number} shapes with a {a} {rel} a {b}",
    "on a {ground} background a {a} and a {b}{tail}",
    "the {big_a} is {rel} the {big_b} on {ground} ground",
)
SINGLE_STYLES = (
    "a {a} {place}",
    "there is a {a} {place}",
    "a {a} {place} on a {ground} background",
    "{place} of the picture is a {a}",
    "a picture of one shape a {a} {place}",
    "on a {ground} background a single {a}",
    "the {big_a} is {place} on {ground} ground",
)


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object.

    Args:
        shape: one of SHAPES.
        colour: one of COLOURS.
        size: "small" or "large".
        box: its full extent, occluded or not, XYXY in pixels; the right and lower edges are exclusive.
    """

    shape: str
    colour: str
    size: str
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, (x, y) in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def name(self) -> str:
        """Colour and shape, which no two things of a scene share."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture before it is drawn.

    Args:
        key: its name in the data set; also seeds the texture and the choice of words.
        things: in the order of painting and of mention: large before small, then left to right.
        ground: a pattern and a tone, such as "striped tan".
        side: pixels.
    """

    key: str
    things: tuple[Thing, ...]
    ground: str
    side: int


@dataclass(frozen=True, slots=True)
class QA:
    """A question with its one right answer; `kind` groups questions for scoring."""

    question: str
    answer: str
    kind: str


def relation(thing: Thing, other: Thing) -> str:
    """Say where `thing` is, seen from `other`, along the axis on which they are further apart."""
    dx, dy = thing.centre[0] - other.centre[0], thing.centre[1] - other.centre[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def place(thing: Thing, side: int) -> str:
    """Say in which of nine cells of the picture a thing lies, such as "at the top left"."""
    x, y = (min(2, int(3 * c / side)) for c in thing.centre)
    words = [w for w in (("top", "", "bottom")[y], ("left", "", "right")[x]) if w]
    return f"at the {' '.join(words)}" if words else "in the middle"


def caption(scene: Scene, style: int) -> str:
    """Describe the scene in one fixed style, an index of PAIR_STYLES (as long as SINGLE_STYLES)."""
    first = scene.things[0]
    second = scene.things[min(1, len(scene.things) - 1)]
    rel = relation(first, second) if second is not first else ""
    return (PAIR_STYLES if rel else SINGLE_STYLES)[style].format(
        a=f"{first.size} {first.name}",
        b=f"{second.size} {second.name}",
        big_a=f"{SYNONYMS[first.size]} {first.name}",
        big_b=f"{SYNONYMS[second.size]} {second.name}",
        rel=rel,
        back=OPPOSITE.get(rel, ""),
        tail="".join(f" and a {thing.size} {thing.name}" for thing in scene.things[2:]),
        place=place(first, scene.side),
        number=NUMBERS[len(scene.things)],
        ground=scene.ground,
    )


def captions(scene: Scene) -> list[str]:
    """Return NUM_CAPTIONS captions in different styles, a pure function of the scene."""
    rng = random.Random(f"{scene.key}/captions")
    return [caption(scene, style) for style in rng.sample(range(len(PAIR_STYLES)), NUM_CAPTIONS)]


def regions(scene: Scene) -> list[tuple[str, Box]]:
    """Return a phrase and a box (XYXY, pixels) for every thing."""
    return [(f"a {t.size} {t.name}", t.box) for t in scene.things]


def questions(scene: Scene) -> list[QA]:
    """Return six to fifteen distinct questions, each with exactly one right answer.

    A question speaks of a thing only by words that fit no other thing of the scene; questions about
    places are asked only where the displacement is more than CLEAR of the side.
    """
    rng = random.Random(f"{scene.key}/questions")
    kinds = (_counts, _attributes, _relations, _yes_no)
    unique = list({qa.question: qa for kind in kinds for qa in kind(scene, rng)}.values())
    return rng.sample(unique, len(unique))


def _counts(scene: Scene, rng: random.Random) -> Iterator[QA]:
    yield QA("how many objects are there?", str(len(scene.things)), "count")
    thing = rng.choice(scene.things)
    field = rng.choice(("shape", "colour", "size"))
    value = getattr(thing, field)
    if rng.random() < 0.2:  # sometimes none: otherwise "at least one" could be learned without looking
        value = rng.choice({"shape": SHAPES, "colour": COLOURS, "size": SIZES}[field])
    number = sum(getattr(t, field) == value for t in scene.things)
    plural = {"cross": "crosses"}.get(value, f"{value}s") if field == "shape" else f"{value} objects"
    yield QA(f"how many {plural} are there?", str(number), "count")


def _attributes(scene: Scene, rng: random.Random) -> Iterator[QA]:
    for thing in scene.things:
        by_shape, by_colour = (_unique_words(scene, thing, field, "size") for field in ("shape", "colour"))
        if by_shape is not None:
            yield QA(f"what color is the {by_shape}?", thing.colour, "colour")
        if by_colour is not None:
            yield QA(f"what shape is the {by_colour} object?", thing.shape, "shape")
    yield QA(f"is the {noun(scene, (thing := rng.choice(scene.things)))} small or large?", thing.size, "size")
    yield QA("what does the background look like?", scene.ground.split()[0], "ground")


def noun(scene: Scene, thing: Thing) -> str:
    """Name a thing by its shape where no other has it, else by colour and shape."""
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    return thing.shape if alone else thing.name


def _unique_words(scene: Scene, thing: Thing, field: str, extra: str) -> str | None:
    """Name a thing by `field`, or by `extra` and `field`, if the words fit it alone."""
    alike = [t for t in scene.things if getattr(t, field) == getattr(thing, field)]
    if len(alike) == 1:
        return str(getattr(thing, field))
    if sum(getattr(t, extra) == getattr(thing, extra) for t in alike) == 1:
        return f"{getattr(thing, extra)} {getattr(thing, field)}"
    return None


def clear_relations(thing: Thing, other: Thing, side: int) -> list[str]:
    """List where `thing` clearly is, seen from `other`: none, one or two of OPPOSITE's words."""
    dx, dy = thing.centre[0] - other.centre[0], thing.centre[1] - other.centre[1]
    found = []
    if abs(dx) > CLEAR * side:
        found.append("left of" if dx < 0 else "right of")
    if abs(dy) > CLEAR * side:
        found.append("above" if dy < 0 else "below")
    return found


def _relations(scene: Scene, rng: random.Random) -> Iterator[QA]:
    pairs = [
        (a, rel, b)
        for a in scene.things
        for b in scene.things
        if a is not b
        for rel in clear_relations(a, b, scene.side)
    ]
    rng.shuffle(pairs)
    for a, rel, b in pairs:
        others = [t for t in scene.things if t is not a and t is not b]
        if all(OPPOSITE[rel] in clear_relations(t, b, scene.side) for t in others):
            word, field = rng.choice(ASKED_OF)
            yield QA(f"what {word} is {rel} the {noun(scene, b)}?", getattr(a, field), "relation")
            break


def _yes_no(scene: Scene, rng: random.Random) -> Iterator[QA]:
    """Ask what is there and what colour it is; the answer is drawn first, so that both are equally frequent."""
    present = {(t.colour, t.shape) for t in scene.things}
    pool = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present]
    # Half-right combinations (this colour, another shape) can be refused only by looking at both.
    near = [p for p in pool if any((p[0] == t.colour) != (p[1] == t.shape) for t in scene.things)]
    for _ in range(2 if len(scene.things) == 1 else 1):
        yes = rng.random() < 0.5
        colour, shape = rng.choice(sorted(present)) if yes else rng.choice(near)
        yield QA(f"is there a {colour} {shape}?", _word(yes), "yes/no")
    alone = [t for t in scene.things if sum(o.shape == t.shape for o in scene.things) == 1]
    if alone:
        thing, yes = rng.choice(alone), rng.random() < 0.5
        wrong = [c for c, s in pool if s == thing.shape]
        yield QA(f"is the {thing.shape} {thing.colour if yes else rng.choice(wrong)}?", _word(yes), "yes/no")


def _word(yes: bool) -> str:
    return "yes" if yes else "no"


def said(scene: Scene, following: Scene, index: int) -> dict[str, list[dict[str, object]]]:
    """Return the records of a scene in each of the data set's files.

    Args:
        scene: number `index` of its split.
        following: the next one, which questions about two pictures show beside it.
        index: 100 ids a scene keep questions apart in a split.
    """
    return {
        "caption": [{"caption": text} for text in captions(scene)],
        "question": [
            {"question": qa.question, "question_id": 100 * index + i, "answer": qa.answer, "question_type": qa.kind}
            for i, qa in enumerate(questions(scene))
        ],
        "region": [{"phrase": phrase, "box": list(box)} for phrase, box in regions(scene)],
        "pair": _pairs(scene, following, index),
    }


def _pairs(scene: Scene, following: Scene, index: int) -> list[dict[str, object]]:
    """Return questions about a thing of this scene and one of the next: which of the two pictures is meant counts."""
    both = (scene, following)
    rng = random.Random(f"{scene.key}/pair")
    chosen = [rng.choice(regions(shown)) for shown in both]
    images = [{"key": shown.key, "box": list(box)} for shown, (_, box) in zip(both, chosen, strict=True)]
    told: list[dict[str, object]] = []
    for number, (phrase, _) in enumerate(chosen, start=1):
        question = PAIR_QUESTION.format(number=number)
        told.append({"question": question, "question_id": 2 * index + number - 1, "answer": phrase, "images": images})
    return told
