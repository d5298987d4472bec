"""Boxes of a sample's targets: carried along with the picture's transform, cut out of it, or left aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING

from PIL import Image

from git_model.batch import Box, Region, Target
from git_model.errors import ImageError

if TYPE_CHECKING:
    from torch import Tensor


def in_picture(box: Sequence[float], width: int, height: int) -> Box:
    """Return a box as left, top, right, bottom in pixels; its corners may come in any order.

    Args:
        box: two corners x, y, x, y in pixels; -1 = that side of the picture.
        width: of the upright picture.
        height: of the upright picture.

    Raises:
        ImageError: no four numbers, outside of the picture, or empty ("box...").
    """
    told = f"[{', '.join(f'{v:g}' if isinstance(v, int | float) else repr(v) for v in box)}] of {width}x{height}"
    if len(box) != 4 or any(isinstance(v, bool) or not isinstance(v, int | float) or not isfinite(v) for v in box):
        raise ImageError("box_malformed", f"{told}; wanted x, y, x, y in pixels")
    sides = (0, 0, width, height)
    x0, y0, x1, y1 = (float(side if value == -1 else value) for value, side in zip(box, sides, strict=True))
    left, top, right, bottom = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
    if left < 0 or top < 0 or right > width or bottom > height:
        raise ImageError("box_outside", told)
    if right <= left or bottom <= top:
        raise ImageError("box_empty", told)
    return left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a transformed picture lies in the one it was made of.

    Args:
        width: of the upright picture in pixels.
        height: of the upright picture in pixels.
        part: left, top, right, bottom of what was kept of it.
        resized: width and height the part was resampled to.
        start: left and top of the output in the resampled part.
        side: of the output in pixels.
        draw: bit 0: mirrored; then quarter turns, counterclockwise.
    """

    width: int
    height: int
    part: tuple[int, int, int, int]
    resized: tuple[int, int]
    start: tuple[int, int]
    side: int
    draw: int = 0

    def box(self, box: Sequence[float]) -> Box:
        """Carry a box to the output, in fractions of it.

        Raises:
            ImageError: see `in_picture`; or the output shows nothing of it ("box_cut_off").
        """
        found = in_picture(box, self.width, self.height)
        left, top, right, bottom = self.part
        sizes = (right - left, bottom - top)

        def carry(value: float, axis: int) -> float:
            inside = (value - (left, top)[axis]) * self.resized[axis] / sizes[axis] - self.start[axis]
            return min(max(inside / self.side, 0.0), 1.0)

        x0, y0, x1, y1 = (carry(value, axis) for value, axis in zip(found, (0, 1, 0, 1), strict=True))
        if x1 <= x0 or y1 <= y0:
            said = ", ".join(f"{v:g}" for v in found)
            raise ImageError("box_cut_off", f"the output shows nothing of [{said}] of {self.width}x{self.height}")
        if self.draw & 1:
            x0, x1 = 1 - x1, 1 - x0
        for _ in range(self.draw >> 1):
            x0, y0, x1, y1 = y0, 1 - x1, y1, 1 - x0
        return x0, y0, x1, y1


def carried(targets: Sequence[Target], frames: Sequence[Frame]) -> tuple[Target, ...]:
    """Return the targets with their boxes in fractions of the transformed pictures.

    Raises:
        ImageError: a box that cannot be carried, or a region of a picture that is not there.
    """

    def carry(region: Region) -> Region:
        if not 0 <= region.image < len(frames):
            raise ImageError("region_without_picture", f"picture {region.image} of {len(frames)}")
        return region if region.box is None else Region(region.image, frames[region.image].box(region.box))

    return tuple(_each(target, carry) for target in targets)


def ignored(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Return the targets with whole pictures in place of boxes."""
    return tuple(_each(target, lambda region: Region(region.image)) for target in targets)


def cut_out(
    targets: Sequence[Target], pictures: Sequence[Image.Image], transform: Callable[[Image.Image], Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Target, ...]]:
    """Make a picture of every region.

    Args:
        targets: their boxes in pixels of the pictures.
        pictures: decoded.
        transform: of what is cut out.

    Returns:
        each distinct region's pixels, and the targets with whole pictures that are those.

    Raises:
        ImageError: a box that does not lie in its picture, or a region of a picture that is not there.
    """
    known: dict[Region, int] = {}
    every = tuple(Region(number) for number in range(len(pictures)))
    for target in targets:
        for region in target.regions or every:
            known.setdefault(region, len(known))
    seen = []
    for region in known:
        if not 0 <= region.image < len(pictures):
            raise ImageError("region_without_picture", f"picture {region.image} of {len(pictures)}")
        picture = pictures[region.image]
        if region.box is not None:
            left, top, right, bottom = in_picture(region.box, picture.width, picture.height)
            corner = (min(int(left), picture.width - 1), min(int(top), picture.height - 1))
            far = (max(round(right), corner[0] + 1), max(round(bottom), corner[1] + 1))
            picture = picture.crop((*corner, *far))
        seen.append(transform(picture))
    return tuple(seen), tuple(
        replace(target, regions=tuple(Region(known[region]) for region in target.regions or every))
        for target in targets
    )


def _each(target: Target, change: Callable[[Region], Region]) -> Target:
    return replace(target, regions=tuple(map(change, target.regions))) if target.regions else target
