"""Pictures that are read whole, and written with boxes and their texts drawn in."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from git_model.datasets.files import refuse_overwriting, write_all
from git_model.errors import ImageError, UserError, one_of

LEGIBLE = 480  # pixels of the longer side at least, for labels
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#800000")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def read_picture(path: str) -> Image.Image:
    """Return the picture of a file that a user named; raises UserError for what is none."""
    from git_model.datasets.images import decode_image, read_image

    data = read_image(path)
    try:
        return decode_image(data)
    except ImageError as error:
        raise UserError(f"{path} is no usable picture: {error.reason}") from error


def annotated(picture: Image.Image, boxes: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """Return a copy of a picture with boxes drawn, each with its text in its top left corner.

    Args:
        picture: RGB.
        boxes: left, top, right, bottom in pixels, and a text; "" = none.
    """
    drawn = picture.convert("RGB").copy()
    pen = ImageDraw.Draw(drawn)
    thick = max(1, (picture.width + picture.height) // 224)
    font = ImageFont.load_default(max(10, min(picture.size) // 30))
    for number, ((left, top, right, bottom), text) in enumerate(boxes):
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=thick)
        if text:
            x, y = left + thick, top + thick
            pen.rectangle(pen.textbbox((x, y), text, font=font), fill=colour)
            pen.text((x, y), text, fill="white", font=font)
    return drawn


def enlarged(picture: Image.Image, boxes: Sequence[tuple[Sequence[float], str]]) -> Image.Image:
    """Return what `annotated` returns, a small picture first made as large as labels need."""
    scale = max(1, -(-LEGIBLE // max(picture.size)))
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    return annotated(large, [([value * scale for value in box], text) for box, text in boxes])


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two pictures side by side, the right one as high as the left one."""
    width = max(1, round(right.width * left.height / right.height))
    both = Image.new("RGB", (left.width + width, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right.resize((width, left.height), Image.Resampling.BICUBIC), (left.width, 0))
    return both


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """Return a picture over a strip with a text, whose lines are as wide as the picture allows."""
    font = ImageFont.load_default(max(12, picture.width // 40))
    margin, width = max(4, picture.width // 80), max(picture.width, 160)
    lines = wrapped(text, font, width - 2 * margin)
    height = sum(font.getmetrics()) + 2 if isinstance(font, ImageFont.FreeTypeFont) else 14
    whole = Image.new("RGB", (width, picture.height + len(lines) * height + 2 * margin), "white")
    whole.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        pen.text((margin, picture.height + margin + number * height), line, fill="black", font=font)
    return whole


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    """Return the lines of a text, none wider than `width` pixels; a word that is gets broken."""
    lines, line = [], ""
    for word in text.split():
        if font.getlength(f"{line} {word}".strip()) <= width:
            line = f"{line} {word}".strip()
            continue
        lines += [line] if line else []
        line = word
        while font.getlength(line) > width and len(line) > 1:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines, line = [*lines, line[:fits]], line[fits:]
    return [*lines, line] if line else lines


def check_name(path: str, *inputs: str | None) -> Path:
    """Return the path of a picture that can be written.

    Args:
        path: of the picture.
        inputs: what must not be overwritten.

    Raises:
        UserError: an ending that is no picture's, a folder that is not there, or an input's name.
    """
    refuse_overwriting(path, *inputs)
    where = Path(path)
    if where.suffix.lower() not in FORMATS:
        raise one_of("ending of a picture's name", where.suffix, FORMATS)
    if not where.parent.is_dir():
        raise UserError(f"no folder {where.parent} for {where.name}")
    return where


def save_picture(picture: Image.Image, path: str) -> None:
    """Write a picture, whole or not at all; the name's ending says the format. Raises as `check_name` does."""
    where = check_name(path)
    file = io.BytesIO()
    try:
        picture.save(file, FORMATS[where.suffix.lower()], quality=92)
    except (ValueError, OSError) as error:
        size = f"{picture.width}x{picture.height}"
        raise UserError(f"a picture of {size} cannot be written as {where.suffix}: {error}") from error
    write_all([(where, [file.getvalue()])])
