"""What one visitor of the page has done so far: plain values, never changed and never shared."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image

from git_model.batch import Box
from git_model.errors import ImageError, UserError, one_of
from git_model.tasks.picture import annotated

MAX_UPLOAD = 10 * 2**20  # bytes of a picture's file
MAX_PICTURES = 6  # of one question
MAX_KEPT = 64 * 2**20  # bytes of a dialogue's pictures
SHOWN_SIDES = (400, 1024)  # pixels; the browser gets smaller pictures enlarged, to aim at, and larger ones reduced
FREE = (-1.0, -1.0, -1.0, -1.0)  # all sides of the picture
MODES = ("Describe", "Question")
Mode = Literal["Describe", "Question"]
Run = Callable[..., Any]


def direct(function: Run, *args: Any) -> Any:
    """Call a function here; see `guard.Sandbox` for elsewhere."""
    return function(*args)


@dataclass(frozen=True)
class Picture:
    """An uploaded picture and the box in it.

    Args:
        data: its file.
        size: width and height in pixels, upright.
        shown: the same, smaller or larger.
        corners: two corners in pixels, -1 = that side of the picture.
    """

    data: bytes
    size: tuple[int, int]
    shown: Image.Image
    corners: Box = FREE

    @property
    def box(self) -> Box | None:
        """Left, top, right, bottom; None = the whole picture. Raises as `in_picture` does."""
        from git_model.datasets.regions import in_picture

        return None if self.corners == FREE else in_picture(self.corners, *self.size)

    def drawn(self, corner: tuple[int, int] | None) -> Image.Image:
        """Return the shown picture with its box, or with a mark where the first corner is."""
        scale = self.shown.width / self.size[0]
        if corner is not None:
            x, y = (value * scale for value in corner)
            reach = max(self.shown.size) // 100 + 2
            near = (max(x - reach, 0), max(y - reach, 0))
            far = (min(x + reach, self.shown.width), min(y + reach, self.shown.height))
            return annotated(self.shown, [((*near, *far), "")])
        box = self.box
        return self.shown if box is None else annotated(self.shown, [([value * scale for value in box], "")])


@dataclass(frozen=True)
class Turn:
    """A question that was answered; its slots stand for its pictures."""

    question: str
    answer: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Session:
    """All that is known of a visitor.

    Args:
        mode: one of MODES.
        pictures: the one to describe, or those of the next question.
        chosen: which of them is shown.
        corner: the first click, while the second is awaited.
        turns: the dialogue.
        answer: the last one.
        record: the last answer with all that led to it, as JSON.
        message: what went wrong, or what to do next.
        due: whether a box was clicked and its description is to come.
    """

    mode: Mode = "Describe"
    pictures: tuple[Picture, ...] = ()
    chosen: int = 0
    corner: tuple[int, int] | None = None
    turns: tuple[Turn, ...] = ()  # the oldest are forgotten when their pictures have more than MAX_KEPT bytes
    answer: str = ""
    record: str = ""
    message: str = "Upload a picture."
    due: bool = False

    @property
    def picture(self) -> Picture | None:
        """The picture that is shown."""
        return self.pictures[self.chosen] if self.pictures else None

    def uploaded(self, files: Sequence[bytes], run: Run = direct) -> Session:
        """Add pictures to the next question, or put one in the place of the one to describe.

        Args:
            files: encoded pictures.
            run: what calls the decoder.

        Raises:
            UserError: too many, too large, or none that can be used.
        """
        if self.mode == "Describe":
            new = tuple(opened(data, run) for data in files[-1:])
            said = "Describe the whole picture, or click at two corners of a box."
            return replace(self, pictures=new, chosen=0, corner=None, answer="", record="", message=said)
        if (count := len(self.pictures) + len(files)) > MAX_PICTURES:
            raise UserError(f"{count} pictures for one question; at most {MAX_PICTURES}")
        pictures = (*self.pictures, *(opened(data, run) for data in files))
        said = f"Ask about {'the picture' if len(pictures) == 1 else f'the {len(pictures)} pictures'}."
        return replace(self, pictures=pictures, chosen=len(pictures) - 1, corner=None, message=said)

    def clicked(self, x: float, y: float) -> Session:
        """Take a click on the shown picture: the first corner of a box, or its second.

        Raises:
            UserError: no picture, or both corners in one place.
        """
        picture = self.needed()
        spot = (round(x * picture.size[0] / picture.shown.width), round(y * picture.size[1] / picture.shown.height))
        if self.corner is None:
            said = f"First corner: {spot[0]}, {spot[1]}. Click at the opposite corner."
            return replace(self._with(FREE), corner=spot, answer="", record="", message=said, due=False)
        done = replace(self.boxed((*self.corner, *spot)), message="")
        return replace(done, due=self.mode == "Describe")

    def boxed(self, corners: Sequence[Any]) -> Session:
        """Give the shown picture a box.

        Raises:
            UserError: no picture, or no box of it.
        """
        size = self.needed().size
        x0, y0, x1, y1 = (-1.0 if value is None else float(value) for value in corners)
        changed = self._with((x0, y0, x1, y1))
        try:
            box = changed.needed().box
        except ImageError as error:
            raise UserError(f"the box cannot be used: {error}; the picture has {size[0]}x{size[1]} pixels") from error
        return replace(changed._with(FREE if box is None else box), corner=None)

    def picked(self, number: int) -> Session:
        """Show another picture of the next question; raises UserError where there is none of that number."""
        if not 0 <= number < len(self.pictures):
            raise UserError(f"there is no picture {number + 1}; there are {len(self.pictures)}")
        return replace(self, chosen=number, corner=None)

    def restarted(self, mode: str) -> Session:
        """Forget everything; raises UserError for an unknown mode."""
        if mode not in MODES:
            raise one_of("mode", mode[:80], MODES)
        return Session(mode="Describe" if mode == "Describe" else "Question")

    def needed(self) -> Picture:
        """Return the picture that is shown; raises UserError where there is none."""
        if self.picture is None:
            raise UserError("there is no picture yet; upload one")
        return self.picture

    def _with(self, corners: Box) -> Session:
        kept = list(self.pictures)
        kept[self.chosen] = replace(kept[self.chosen], corners=corners)
        return replace(self, pictures=tuple(kept))


def without_folders(text: str) -> str:
    """Return a message without the folders of the paths in it: visitors need not know where things are."""
    return re.sub(r"(?<![\w:/])/(?:[^\s/'\",;:]+/)+", "", text)


def opened(data: bytes, run: Run = direct) -> Picture:
    """Return a picture as the page keeps it.

    Args:
        data: its file.
        run: what calls the decoder.

    Raises:
        UserError: too large, or none that can be used.
    """
    if len(data) > MAX_UPLOAD:
        raise UserError(f"the file has {len(data)} bytes; at most {MAX_UPLOAD} ({MAX_UPLOAD // 2**20} MB)")
    try:
        return Picture(data, *run(looked_at, data))
    except ImageError as error:
        raise UserError(f"this is no usable picture: {error.reason}") from error


def looked_at(data: bytes) -> tuple[tuple[int, int], Image.Image]:
    """Return a picture's width and height, and the picture as it is shown; raises ImageError."""
    from git_model.datasets.images import decode_image

    picture = decode_image(data)
    least, most = SHOWN_SIDES
    longest = max(picture.size)
    scale = most / longest if longest > most else -(-least // longest)
    shown = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    return picture.size, shown
