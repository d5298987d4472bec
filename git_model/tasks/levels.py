"""What is known of a picture, from the whole of it to its boxes, and how places and numbers are said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth")


@dataclass(frozen=True)
class Thing:
    """A box of a picture, left, top, right, bottom in its pixels, and what is said of it."""

    box: tuple[float, float, float, float]
    text: str

    @property
    def area(self) -> float:
        """Pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Levels:
    """What is known of a picture, all in one frame: pixels of the upright picture.

    Args:
        size: width and height.
        caption: of the whole picture; "" = none.
        regions: dense captions.
        semantics: what the largest regions are.
    """

    size: tuple[int, int]
    caption: str
    regions: tuple[Thing, ...]
    semantics: tuple[Thing, ...] = ()


def place_of(box: Sequence[float], size: tuple[int, int]) -> str:
    """Return where a box's centre is, in one of nine words; on a border between two thirds, the middle."""
    row, column = (
        0 if 3 * (low + high) < 2 * side else 2 if 3 * (low + high) > 4 * side else 1
        for low, high, side in ((box[1], box[3], size[1]), (box[0], box[2], size[0]))
    )
    return PLACES[row][column]


def spelt(text: str) -> str:
    """Return a text as part of a sentence: numbers in words, no brackets, nothing that ends a sentence.

    Words with digits that are no number below a thousand and no small ordinal (3D, 1990s) are left out.
    """
    text = re.sub(r"[^\s;:!?()\[\]{}]*\d[^\s;:!?()\[\]{}]*", lambda found: _in_words(found[0]), text)
    text = re.sub(r"[\[\](){}<>\"]", " ", text)
    text = re.sub(r"[.!?;:]+", ",", text)
    return re.sub(r"\s*,[\s,]*", ", ", " ".join(text.split())).strip(" ,")


def _in_words(number: str) -> str:
    number = number.strip("'\"-.,#")
    if re.fullmatch(r"[1-9](st|nd|rd|th)", number):
        return ORDINALS[int(number[0]) - 1]
    if not re.fullmatch(r"[0-9]{1,3}", number):
        return ""
    hundreds, rest = divmod(int(number), 100)
    said = [f"{NUMBERS[hundreds]} hundred"] if hundreds else []
    if rest >= len(NUMBERS):
        said.append(TENS[rest // 10 - 2] + (f"-{NUMBERS[rest % 10]}" if rest % 10 else ""))
    elif rest or not hundreds:
        said.append(NUMBERS[rest])
    return " ".join(said)
