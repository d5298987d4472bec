"""Bytes -> RGB -> uint8 tensor: the one transform of training and inference.

A picture is hostile until it is decoded: its kind is told from its first bytes, its size is checked
before a pixel is allocated, and whatever is wrong is an ImageError with a short reason to count by.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, features

from git_model.architecture import choice
from git_model.config import AUGMENTS, DECODES, RESIZES
from git_model.datasets.jpeg import decode_photo, random_part, turn_of
from git_model.datasets.regions import Frame
from git_model.errors import ImageError, UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 64_000_000
MAX_SIDE = 20_000
MAX_ASPECT = 50
MAX_FILE_BYTES = 256 * 2**20
STRIP = 16  # resized longer side / resolution from which only the shown part is resampled

_MAGIC: dict[str, tuple[bytes, ...]] = {  # Pillow's format, or the reason to refuse -> first bytes
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*"),
    "ICO": (b"\0\0\1\0",),
    "not_image:pdf": (b"%PDF",),
    "not_image:archive": (b"PK\3\4", b"\x1f\x8b"),
    "unsupported:eps": (b"%!PS", b"\xc5\xd0\xd3\xc6"),  # Pillow would start Ghostscript
    "unsupported:psd": (b"8BPS",),
    "unsupported:jp2": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "unsupported:jxl": (b"\0\0\0\x0cJXL ", b"\xff\x0a"),
}
_HEIF = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
_BMP_HEADERS = [bytes((n, 0, 0, 0)) for n in (12, 40, 52, 56, 64, 108, 124)]  # "BM" alone is too weak
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body", b"<script", b"<title", b"<meta", b"<div")


def decode_image(data: bytes, *, tolerate_truncated: bool = False) -> Image.Image:
    """Decode an encoded picture: first frame, upright, alpha on white, RGB.

    Args:
        data: a JPEG, PNG, WebP, AVIF, GIF, BMP, ICO or TIFF file.
        tolerate_truncated: keep what a cut-off file still shows, instead of refusing it.

    Raises:
        ImageError: whatever is wrong with the picture; no other exception of the decoder gets out.
    """
    kind = _sniff(data)
    if tolerate_truncated and kind == "JPEG":
        data = data + b"\xff\xd9"  # an end marker makes libjpeg fill in the rest, progressive files too
    try:
        for width, height in _ico_sizes(data) if kind == "ICO" else ():
            _check_size(width, height)  # Pillow decodes an icon when it opens it
        with Image.open(BytesIO(data), formats=[kind]) as image:  # no other format's decoder sees the bytes
            _check_size(*image.size)
            if kind == "PNG" and not tolerate_truncated:  # decoding skips the checksums: noise gets through
                Image.open(BytesIO(data), formats=[kind]).verify()
            _load(image, tolerate_truncated)
            turn = turn_of(image)
            rgb = _to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except ImageError:
        raise
    except Exception as error:  # decoders raise anything, MemoryError and SyntaxError included
        raise ImageError(_reason(error, kind, data), f"{type(error).__name__}: {error}") from error


def _sniff(data: bytes) -> str:
    """Return Pillow's name of the format, judged by the first bytes only."""
    if not data.strip(b"\0\r\n\t "):
        raise ImageError("empty", f"{len(data)} bytes")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and data[14:18] in _BMP_HEADERS:
        return "BMP"
    if data[4:8] == b"ftyp":  # ISO media: major brand, version, compatible brands
        brands = {data[i : i + 4] for i in (8, *range(16, 64, 4))}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        raise ImageError("unsupported:heic" if brands & _HEIF else "not_image:video")
    kind = next((kind for kind, starts in _MAGIC.items() if data.startswith(starts)), "") or _text_kind(data)
    if ":" in kind:
        raise ImageError(kind)
    return kind


def _text_kind(data: bytes) -> str:
    head = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(_HTML):
        return "not_image:html"
    if head.startswith((b"<svg", b"<?xml")) and b"<svg" in head:
        return "unsupported:svg"
    return "not_image:text" if all(c >= 32 or c in b"\t\r\n\f" for c in head) else "not_image:unknown"


def _check_size(width: int, height: int) -> None:
    short, long = sorted((abs(width), abs(height)))
    if long > MAX_ASPECT * short:
        raise ImageError("aspect", f"{width}x{height} is longer than {MAX_ASPECT}:1")
    if long > MAX_SIDE or long * short > MAX_PIXELS:
        raise ImageError("too_large", f"{width}x{height}; at most {MAX_SIDE} a side and {MAX_PIXELS} pixels")


def _ico_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes of the pictures inside an icon, which need not be what its directory says."""
    for entry in range(6, min(6 + 16 * int.from_bytes(data[4:6], "little"), len(data) - 15), 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        head = data[start : start + 24]
        if len(head) == 24:
            width, height = struct.unpack_from(*((">II", head, 16) if head[1:4] == b"PNG" else ("<ii", head, 4)))
            yield width, height


def _load(image: ImageFile.ImageFile, tolerate_truncated: bool) -> None:
    try:
        image.load()
    except OSError as error:
        if not tolerate_truncated or "truncated" not in str(error) or image.format == "JPEG":
            raise
        image.tile = []  # nothing left to decode: load() keeps its rows. Pillow's own flag is process-wide
        image.load()


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB, on white; an RGB picture is not copied. Raises ImageError for float and 32-bit ones."""
    if image.mode in ("F", "I"):  # no agreed range: a guess shows black or white pictures
        raise ImageError("unsupported_mode", image.mode)
    if image.mode.startswith("I;16"):  # Pillow's convert() clips at 255: an all-white picture
        grey = np.array(image, dtype=np.uint16)
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey[grey == clear] = 65535
        grey = grey // 257 + (grey % 257 > 128)  # = round(grey / 257) without leaving 16 bits
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception, kind: str, data: bytes) -> str:
    said = str(error).lower()
    if isinstance(error, (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return "too_large"
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        return f"unsupported:{kind.lower()}"
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"")
    size = int.from_bytes(data[4:8], "little") + 8 if kind == "WEBP" else 0
    if "truncated" in said or end not in data[2:] or len(data) < size:
        return "truncated"
    return "unsupported_mode" if "conversion from" in said else "corrupt"


def read_image(path: str | os.PathLike[str]) -> bytes:
    """Read an image file that a user named.

    Raises:
        UserError: missing, a folder, a pipe or device (never opened: it could hang), unreadable, too large.
    """
    try:
        where = Path(path)
        status = where.stat()
        regular = stat.S_ISREG(status.st_mode)
        if regular and status.st_size <= MAX_FILE_BYTES:
            return where.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot read image '{path}': {getattr(error, 'strerror', None) or error}") from error
    what = "too large" if regular else "a folder" if where.is_dir() else "no regular file"
    raise UserError(f"image '{path}' is {what}; give an image file of at most {MAX_FILE_BYTES // 2**20} MB")


@dataclass(frozen=True)
class Transform:
    """The one way from a picture to the encoder's input; normalising is the encoder's, on its device.

    Args:
        resolution: side of the square output in pixels.
        resize: 'crop' = shorter side to `resolution` (bicubic), centre crop: the geometry of CLIP's own
            preprocessing (openai/CLIP clip.py, torchvision Resize + CenterCrop); 'squash' = both sides
            to `resolution`, nothing lost; 'pad' = longer side to `resolution`, on mean grey.
        augment: one of AUGMENTS, applied only where a generator is given. 'flip' and 'dihedral' make
            captions with "left" or "above" untrue; 'crop' keeps 70..100 % of the area and the aspect.
        decode: 'exact'; 'scaled' = encoded JPEGs larger than the output go the quick way of jpeg.py, which tells how
            far from the exact one they end up; with 'crop' they are decoded whole.
    """

    resolution: int
    resize: str = "crop"
    augment: str = "none"
    decode: str = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.resolution, bool) or not isinstance(self.resolution, int) or self.resolution < 1:
            raise UserError(f"resolution {self.resolution!r} is no whole number of pixels above 0")
        choice("resize", self.resize, RESIZES)
        choice("augment", self.augment, AUGMENTS)
        choice("decode", self.decode, DECODES)

    def __call__(self, data: bytes | Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """Return a picture as a contiguous uint8 tensor (3,H,W), H = W = resolution.

        Args:
            data: an encoded file, or a picture that is already decoded.
            rng: augment with draws from it; None = the evaluation geometry.
        """
        return self.framed(data, rng)[0]

    def framed(self, data: bytes | Image.Image, rng: np.random.Generator | None = None) -> tuple[Tensor, Frame]:
        """Return what calling returns, and where in the picture it lies: boxes follow by it."""
        import torch

        crop = rng is not None and "crop" in self.augment
        photo = decode_photo(data, self._resampled_to, whole=crop) if self.decode == "scaled" else None
        image = None
        if photo is None:
            image = _to_rgb(data) if isinstance(data, Image.Image) else decode_image(data)
            if 0 in image.size:
                raise ImageError("empty", f"{image.width}x{image.height}")
        width, height = (photo or image).width, (photo or image).height  # type: ignore[union-attr]
        part = random_part(width, height, rng) if crop else (0, 0, width, height)
        new_width, new_height, left, top = self._geometry(part[2] - part[0], part[3] - part[1])
        if photo is not None:
            kept = photo.cut(part) if crop else photo
            pixels = kept.framed(self.resolution, new_width, new_height, left, top)  # (H,W,3)
        else:
            assert image is not None
            pixels = np.asarray(self._resized(image.crop(part) if crop else image))  # (H,W,3)
        draw = 0
        if rng is not None:
            draw = int(rng.integers(8 if "dihedral" in self.augment else 2 if "flip" in self.augment else 1))
            pixels = np.rot90(pixels[:, :: -1 if draw & 1 else 1], draw >> 1)  # mirror, then quarter turns
        frame = Frame(width, height, part, (new_width, new_height), (left, top), self.resolution, draw)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), frame  # (3,H,W)

    def _geometry(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the resized width and height, and where in them the output frame starts (x, y)."""
        side = self.resolution
        if self.resize == "squash":
            return side, side, 0, 0
        if self.resize == "pad":
            new_width, new_height = (max(1, round(side * s / max(width, height))) for s in (width, height))
            return new_width, new_height, -((side - new_width) // 2), -((side - new_height) // 2)
        along = int(side * max(width, height) / min(width, height))  # torchvision cuts the fraction off
        new_width, new_height = (side, along) if width <= height else (along, side)
        return new_width, new_height, round((new_width - side) / 2.0), round((new_height - side) / 2.0)

    def _resampled_to(self, width: int, height: int) -> tuple[int, int]:
        _check_size(width, height)
        return self._geometry(width, height)[:2]

    def _resized(self, image: Image.Image) -> Image.Image:
        side, bicubic = self.resolution, Image.Resampling.BICUBIC
        width, height, left, top = self._geometry(image.width, image.height)
        if max(width, height) > STRIP * side:  # 65500x1 would become a resized picture of gigabytes
            x, y = image.width / width, image.height / height
            right, bottom = min((left + side) * x, image.width), min((top + side) * y, image.height)
            return image.resize((side, side), bicubic, box=(left * x, top * y, right, bottom))
        if self.resize != "pad":  # Pillow's two passes, one by one: what the frame does not show skips the second
            across = image.resize((width, image.height), bicubic).crop((left, 0, left + side, image.height))
            return across.resize((side, height), bicubic).crop((0, top, side, top + side))
        ground = Image.new("RGB", (side, side), (127, 127, 127))
        ground.paste(image.resize((width, height), bicubic), (-left, -top))
        return ground
