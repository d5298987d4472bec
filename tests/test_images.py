"""The image catalogue, the geometry of the transform, and what a hostile file may cost."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from git_model.datasets import images
from git_model.datasets.images import AUGMENTS, ImageError, Transform, decode_image, read_image
from git_model.errors import UserError

TRIALS = int(os.environ.get("GIT_MODEL_IMAGES", "2000"))

needs_webp = pytest.mark.skipif(not features.check("webp"), reason="Pillow without WebP")
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
needs_tiff = pytest.mark.skipif(not features.check("libtiff"), reason="Pillow without libtiff")


def _scene(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture without any symmetry, so that a wrong turn cannot pass."""
    x = np.linspace(0, 1, width)[None, :]
    y = np.linspace(0, 1, height)[:, None]
    red, green = 40 + 180 * x + 0 * y, 30 + 200 * y * y + 0 * x
    blue = 120 + 100 * np.sin(3 * x + 5 * y)
    return Image.fromarray(np.stack([red, green, blue], -1).round().astype(np.uint8))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _distance(a: Image.Image, b: Image.Image) -> float:
    assert (a.size, a.mode, b.mode) == (b.size, "RGB", "RGB")
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


def _noise(width: int = 200, height: int = 160) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 100)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _jpeg_header(width: int, height: int) -> bytes:
    data = bytearray(_encoded(_scene(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _ico(payload: bytes, side: int = 16) -> bytes:
    """An icon whose directory claims side x side, whatever its payload is."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, side, side, 0, 0, 1, 32, len(payload), 22) + payload


def _text_bomb() -> bytes:
    body = b"Comment\0\0" + zlib.compress(b"x" * 100_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    good = _encoded(_scene(), "PNG")
    return good[:33] + chunk + good[33:]


SCENE = _scene()
JPEG = _encoded(SCENE, "JPEG", quality=95)
PNG = _encoded(SCENE, "PNG")
NOISE_JPEG, NOISE_PNG = _encoded(_noise(), "JPEG"), _encoded(_noise(), "PNG")
PALETTE = SCENE.quantize(64)

GOOD = [
    pytest.param(JPEG, 2.0, id="jpeg"),
    pytest.param(_encoded(SCENE, "JPEG", quality=95, progressive=True), 2.0, id="jpeg-progressive"),
    pytest.param(_encoded(SCENE.convert("CMYK"), "JPEG", quality=95), 2.0, id="jpeg-cmyk"),
    pytest.param(PNG, 0.0, id="png"),
    pytest.param(_encoded(PALETTE, "PNG"), 8.0, id="png-palette"),
    pytest.param(_encoded(SCENE, "BMP"), 0.0, id="bmp"),
    pytest.param(_encoded(SCENE, "TIFF"), 0.0, id="tiff"),
    pytest.param(_encoded(SCENE, "TIFF", compression="tiff_lzw"), 0.0, id="tiff-lzw", marks=needs_tiff),
    pytest.param(_encoded(SCENE, "GIF"), 8.0, id="gif"),
    pytest.param(
        _encoded(SCENE, "WEBP", lossless=True) if features.check("webp") else b"",
        0.0,
        id="webp",
        marks=needs_webp,
    ),
    pytest.param(
        _encoded(SCENE, "AVIF", quality=95) if features.check("avif") else b"", 3.0, id="avif", marks=needs_avif
    ),
    pytest.param(JPEG + b"trailing garbage" * 9, 2.0, id="jpeg-trailing-garbage"),
    pytest.param(JPEG + NOISE_JPEG, 2.0, id="two-jpegs"),
    pytest.param(_encoded(SCENE, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff"), 2.0, id="broken-exif"),
    pytest.param(_encoded(SCENE, "JPEG", quality=95, exif=b"Exif\0\0" + b"\xee" * 60_000), 2.0, id="huge-exif"),
    pytest.param(_encoded(SCENE, "JPEG", quality=95, icc_profile=b"no profile" * 50), 2.0, id="icc-garbage"),
    pytest.param(_encoded(SCENE, "GIF", save_all=True, append_images=[_noise(96, 64)]), 8.0, id="gif-animated"),
    pytest.param(_encoded(SCENE, "PNG", save_all=True, append_images=[_noise(96, 64)]), 0.0, id="png-animated"),
    pytest.param(
        _encoded(SCENE, "WEBP", lossless=True, save_all=True, append_images=[_noise(96, 64)])
        if features.check("webp")
        else b"",
        0.0,
        id="webp-animated",
        marks=needs_webp,
    ),
]


@pytest.mark.parametrize(("data", "tolerance"), GOOD)
def test_good_files(data: bytes, tolerance: float) -> None:
    assert _distance(decode_image(data), SCENE) <= tolerance


def test_grey_bilevel_icon_and_one_pixel() -> None:
    grey = SCENE.convert("L")
    assert _distance(decode_image(_encoded(grey, "PNG")), grey.convert("RGB")) == 0
    assert _distance(decode_image(_encoded(grey.convert("1"), "PNG")), grey.convert("1").convert("RGB")) == 0
    square = SCENE.crop((0, 0, 64, 64))
    assert _distance(decode_image(_encoded(square, "ICO", sizes=[(64, 64)])), square) == 0
    pixel = Image.new("RGB", (1, 1), (9, 8, 7))
    assert decode_image(_encoded(pixel, "PNG")).getpixel((0, 0)) == (9, 8, 7)
    assert Transform(8)(_encoded(pixel, "PNG")).flatten(1).tolist() == [[9] * 64, [8] * 64, [7] * 64]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    """The stored picture is turned by hand, in numpy, the way the EXIF standard words it."""
    upright = np.asarray(SCENE)
    across = upright.transpose(1, 0, 2)
    stored = {  # where the first row and first column of what is stored belong
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: across,  # left, top
        6: across[::-1],  # right, top
        7: across[::-1, ::-1],  # right, bottom
        8: across[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if kind == "JPEG" else {}
    data = _encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    assert _distance(decode_image(data), SCENE) <= (1.0 if kind == "JPEG" else 0.0)


def test_alpha_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))  # hidden red
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 250, 0, 0])
    seen = {
        "clear": (clear, {}, 255),
        "half": (half, {}, 127),
        "LA": (Image.new("LA", (8, 8), (0, 0)), {}, 255),
        "LA half": (Image.new("LA", (8, 8), (0, 128)), {}, 127),
        "palette": (palette, {"transparency": 1}, 255),
        "palette bytes": (palette, {"transparency": b"\xff\x80"}, (252, 127, 127)),
        "grey": (Image.new("L", (8, 8), 5), {"transparency": 5}, 255),
        "rgb": (Image.new("RGB", (8, 8), (5, 6, 7)), {"transparency": (5, 6, 7)}, 255),
        "grey 16": (Image.fromarray(np.full((8, 8), 700, np.uint16)), {"transparency": 700}, 255),
    }
    for name, (image, options, expected) in seen.items():
        pixel = decode_image(_encoded(image, "PNG", **options)).getpixel((3, 3))
        assert pixel == (expected if isinstance(expected, tuple) else (expected,) * 3), name
    gif = _encoded(palette, "GIF", transparency=1)
    assert decode_image(gif).getpixel((3, 3)) == (255, 255, 255)
    assert Transform(4)(clear).min() == 255  # the same for pictures that are handed over decoded


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey(kind: str) -> None:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (64, 96), dtype=np.uint16)
    deep[0, :3] = (0, 65535, 65535 - 128)
    seen = np.asarray(decode_image(_encoded(Image.fromarray(deep), kind)))
    assert np.array_equal(seen[..., 0], np.round(deep / 257).astype(np.uint8))
    assert abs(seen.mean() - np.asarray(Image.fromarray((deep >> 8).astype(np.uint8))).mean()) < 1


def test_sixteen_bit_big_endian_tiff() -> None:
    deep = np.arange(256, dtype=">u2").reshape(16, 16) * 257
    tags = [(256, 3, 16), (257, 3, 16), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 3, 16)]
    tags.append((279, 4, 512))
    directory = struct.pack(">H", len(tags)) + b"".join(
        struct.pack(">HHI", tag, form, 1) + (struct.pack(">HH", v, 0) if form == 3 else struct.pack(">I", v))
        for tag, form, v in tags
    )
    data = b"MM\0*" + struct.pack(">I", 520) + deep.tobytes() + directory + b"\0" * 4
    assert np.array_equal(np.asarray(decode_image(data))[..., 0].ravel(), np.arange(256))


FLOAT = Image.fromarray(np.random.default_rng(0).random((8, 8)).astype(np.float32))
FTYP = b"\0\0\0\x18ftyp%s\0\0\0\0mif1%s" + b"\0" * 40
BAD = [
    pytest.param(b"", "empty", id="zero-bytes"),
    pytest.param(b"\0" * 500, "empty", id="only-zeros"),
    pytest.param(b" \r\n\r\n", "empty", id="only-blanks"),
    pytest.param(b"\n<!DOCTYPE HTML><html></html>", "not_image:html", id="html"),
    pytest.param(b"\xef\xbb\xbf <HTML lang=en>", "not_image:html", id="html-bom"),
    pytest.param(b"BMW makes motor cars, and this is a text", "not_image:text", id="text"),
    pytest.param('{"error": "introuvable é"}'.encode(), "not_image:text", id="json"),
    pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported:svg", id="svg"),
    pytest.param(b"<?xml version='1.0'?>\n<svg/>", "unsupported:svg", id="svg-xml"),
    pytest.param(b"%PDF-1.7\n", "not_image:pdf", id="pdf"),
    pytest.param(b"PK\3\4" + b"\0" * 30, "not_image:archive", id="zip"),
    pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported:eps", id="eps"),
    pytest.param(FTYP % (b"heic", b"heic"), "unsupported:heic", id="heic"),
    pytest.param(FTYP % (b"mif1", b"hevc"), "unsupported:heic", id="heif"),
    pytest.param(FTYP.replace(b"mif1", b"isom") % (b"mp42", b"mp41"), "not_image:video", id="mp4"),
    pytest.param(b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40, "unsupported:jp2", id="jpeg-2000"),
    pytest.param(bytes(range(7, 200)), "not_image:unknown", id="binary"),
    pytest.param(_encoded(SCENE, "PPM"), "not_image:unknown", id="ppm"),
    pytest.param(NOISE_JPEG[: len(NOISE_JPEG) // 2], "truncated", id="jpeg-half"),
    pytest.param(NOISE_JPEG[:-2], "truncated", id="jpeg-without-end"),
    pytest.param(NOISE_JPEG[:100], "truncated", id="jpeg-cut-in-tables"),
    pytest.param(NOISE_PNG[: len(NOISE_PNG) // 2], "truncated", id="png-half"),
    pytest.param(NOISE_PNG[:20], "truncated", id="png-cut-in-header"),
    pytest.param(_encoded(_noise(), "BMP")[:20_000], "truncated", id="bmp-half"),
    pytest.param(_encoded(_noise(), "GIF")[:9000], "truncated", id="gif-half"),
    pytest.param(_encoded(_noise(), "TIFF")[:50_000], "truncated", id="tiff-half"),
    pytest.param(
        _encoded(_noise(), "WEBP")[:5000] if features.check("webp") else b"",
        "truncated",
        id="webp-half",
        marks=needs_webp,
    ),
    pytest.param(
        NOISE_PNG[:5000] + bytes([NOISE_PNG[5000] ^ 255]) + NOISE_PNG[5001:], "corrupt", id="png-flipped-byte"
    ),
    pytest.param(b"\x89PNG\r\n\x1a\n" + b"\7" * 90 + b"IEND", "corrupt", id="png-garbage"),
    pytest.param(b"\xff\xd8\xff" + b"\7" * 90 + b"\xff\xd9", "corrupt", id="jpeg-garbage"),
    pytest.param(_encoded(FLOAT, "TIFF"), "unsupported_mode", id="tiff-float"),
    pytest.param(
        _encoded(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF"), "unsupported_mode", id="tiff-int32"
    ),
    pytest.param(_encoded(SCENE.resize((1, 5000)), "PNG"), "aspect", id="1x5000"),
    pytest.param(_encoded(Image.new("RGB", (20_000, 1)), "JPEG"), "aspect", id="20000x1"),
    pytest.param(_encoded(Image.new("RGB", (65_500, 1)), "JPEG"), "aspect", id="65500x1"),
    pytest.param(_png_header(50_000, 50_000), "too_large", id="50000x50000"),
    pytest.param(_png_header(2**31 - 1, 2**31 - 1), "too_large", id="2^31x2^31"),
    pytest.param(_jpeg_header(65_500, 65_500), "too_large", id="jpeg-65500x65500"),
    pytest.param(_png_header(20_001, 3_000), "too_large", id="side-20001"),
    pytest.param(_png_header(8_001, 8_000), "too_large", id="just-over-64-Mpx"),
    pytest.param(_ico(_png_header(12_000, 12_000)), "too_large", id="ico-hides-png"),
    pytest.param(_ico(struct.pack("<IiiHH", 40, 12_000, 24_000, 1, 32) + b"\0" * 99), "too_large", id="ico-hides-bmp"),
    pytest.param(_text_bomb(), "corrupt", id="png-text-bomb"),
]


@pytest.mark.parametrize(("data", "reason"), BAD)
def test_bad_files(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.reason == reason, str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as a worker process hands it over
    assert (again.reason, str(again)) == (reason, str(caught.value))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_warning_is_too_large() -> None:
    with pytest.raises(ImageError, match="too_large"):
        decode_image(_png_header(12_000, 12_000))


def test_every_cut_and_flip_of_a_png_is_refused() -> None:
    """Pillow's decoder alone shows noise for about every tenth flipped byte."""
    cuts = [PNG[:cut] for cut in range(8, len(PNG) - 4, 7)]
    flips = [PNG[:at] + bytes([PNG[at] ^ 0x10]) + PNG[at + 1 :] for at in range(16, len(PNG) - 12, 3)]
    for data in (*cuts, *flips):
        with pytest.raises(ImageError):
            decode_image(data)


def test_truncated_files_can_be_kept() -> None:
    whole = decode_image(NOISE_JPEG)
    kept = decode_image(NOISE_JPEG[:-2], tolerate_truncated=True)
    assert _distance(kept, whole) < 0.5
    progressive = _encoded(SCENE.resize((480, 320)), "JPEG", progressive=True)
    for data in (NOISE_JPEG, NOISE_PNG, progressive):
        half, full = decode_image(data[: len(data) // 2], tolerate_truncated=True), decode_image(data)
        top = (0, 0, full.width, full.height // 3)
        assert _distance(half.crop(top), full.crop(top)) < 8
    assert _distance(decode_image(PNG, tolerate_truncated=True), SCENE) == 0
    with pytest.raises(ImageError, match="truncated"):
        decode_image(NOISE_JPEG[:100], tolerate_truncated=True)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_threads_do_not_see_each_others_tolerance() -> None:
    half = NOISE_PNG[: len(NOISE_PNG) // 2]

    def decode(number: int) -> str:
        try:
            decode_image(half, tolerate_truncated=number % 2 == 0)
        except ImageError as error:
            return error.reason
        return "kept"

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, range(80))) == ["kept", "truncated"] * 40


def test_only_image_errors_come_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for error, reason in (
        (MemoryError(), "too_large"),
        (SyntaxError("broken"), "corrupt"),
        (RecursionError(), "corrupt"),
        (KeyboardInterrupt(), None),
    ):

        def load(self: object, _error: BaseException = error) -> None:
            raise _error

        with monkeypatch.context() as patch:
            patch.setattr(ImageFile.ImageFile, "load", load)
            with pytest.raises(ImageError if reason else KeyboardInterrupt) as caught:
                decode_image(JPEG)
            assert getattr(caught.value, "reason", None) == reason


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow talks about metadata
def test_mutated_files_are_decoded_or_refused() -> None:
    rng = np.random.default_rng(7)
    small = _scene(24, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [_encoded(small, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "ICO")]
    seeds += [_encoded(small, "WEBP")] if features.check("webp") else []
    seeds += [_encoded(small, "AVIF")] if features.check("avif") else []
    seeds += [_encoded(small, "JPEG", exif=exif), _encoded(small.quantize(8), "PNG", transparency=1)]
    seeds += [_encoded(small, "TIFF", compression="tiff_deflate")] if features.check("libtiff") else []
    seen = {"ok": 0}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for trial in range(TRIALS):
        data = bytearray(seeds[trial % len(seeds)])
        for _ in range(int(rng.integers(1, 5))):
            # headers decide: hit the first bytes as often as all the rest
            at = int(rng.integers(min(64, len(data)) if rng.random() < 0.5 else len(data)))
            data[at] = int(rng.integers(256))
        if rng.random() < 0.2:
            del data[int(rng.integers(len(data))) :]
        started = time.process_time()
        try:
            image = decode_image(bytes(data), tolerate_truncated=trial % 3 == 0)
        except ImageError as error:
            seen[error.reason] = seen.get(error.reason, 0) + 1
        else:
            assert image.mode == "RGB"
            assert image.width * image.height <= images.MAX_PIXELS
            seen["ok"] += 1
        assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown < 512 * 1024
    assert all(reason.strip() == reason.lower() != "" for reason in seen)
    assert seen["ok"] > 100
    assert seen["corrupt"] > 20
    assert seen["truncated"] > 20


BUDGET = """
import io, resource, sys
from PIL import Image
from git_model.datasets.images import ImageError, decode_image
for line in sys.stdin:
    data, reason = bytes.fromhex(line.split()[0]), line.split()[1]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_image(data)
    except ImageError as error:
        assert error.reason == reason, (error, reason)
    else:
        raise SystemExit("decoded")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < float(line.split()[2]), f"{reason}: {grown:.0f} MB"
"""


def test_refusing_costs_no_memory() -> None:
    cases = [
        (_encoded(Image.new("RGB", (20_000, 1)), "JPEG"), "aspect", 50),
        (_encoded(Image.new("RGB", (65_500, 1)), "JPEG"), "aspect", 50),
        (_png_header(50_000, 50_000), "too_large", 50),
        (_encoded(Image.new("1", (12_000, 12_000)), "PNG"), "too_large", 50),
        (_ico(_encoded(Image.new("1", (9_000, 9_000)), "PNG")), "too_large", 50),
        (_text_bomb(), "corrupt", 200),
    ]
    lines = "".join(f"{data.hex()} {reason} {limit}\n" for data, reason, limit in cases)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BUDGET], input=lines, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_long_strips_are_resampled_only_where_they_show() -> None:
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 255, (2, 60_000, 3), dtype=np.uint8))
    seen = Transform(224)(strip)  # the plain way would first make a picture of 6.7 million x 224 pixels
    assert tuple(seen.shape) == (3, 224, 224)
    band = _scene(340, 17)  # 20:1, where both ways are affordable
    plain = band.resize((20 * 32, 32), Image.Resampling.BICUBIC).crop((304, 0, 336, 32))
    ours = Transform(32)(band).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - np.asarray(plain).astype(int)).max() <= 1


# -- reading a file ----------------------------------------------------------------------------------


def test_read_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    assert read_image(path) == read_image(str(path)) == JPEG
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for where, said in (
        (tmp_path / "missing.jpg", "No such file"),
        (tmp_path, "a folder"),
        (pipe, "no regular file"),  # opening it would wait for a writer for ever
        ("/dev/zero", "no regular file"),
        (tmp_path / "loop.jpg", "symbolic link"),
        ("nul\0.jpg", "null"),
        (path / "below.jpg", "Not a directory"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            read_image(where)
        assert str(where) in str(caught.value)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(JPEG) - 1)
    with pytest.raises(UserError, match="too large"):
        read_image(path)


# -- geometry ----------------------------------------------------------------------------------------


def _bicubic(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resample one axis with the antialiased cubic kernel (a = -0.5), written from its definition."""
    old = pixels.shape[axis]
    scale = old / size
    stretch = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    t = np.abs((np.arange(old)[None] + 0.5 - centres[:, None]) / stretch)
    near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    weights = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    weights /= weights.sum(1, keepdims=True)
    moved = np.moveaxis(pixels.astype(float), axis, 0)
    out = np.moveaxis(np.tensordot(weights, moved, 1), 0, axis)
    return np.clip(np.round(out), 0, 255)


def _by_hand(image: Image.Image, width: int, height: int) -> np.ndarray:
    return _bicubic(_bicubic(np.asarray(image), width, 1), height, 0)


CLIP_GEOMETRY = [  # picture, resized by torchvision's rule, first column and row of the crop
    ((320, 240), (64, 48), (8, 0)),
    ((240, 320), (48, 64), (0, 8)),
    ((100, 100), (48, 48), (0, 0)),
    ((333, 250), (63, 48), (8, 0)),  # 63.9 is cut to 63; 7.5 rounds to 8 (half to even)
    ((250, 340), (48, 65), (0, 8)),  # 8.5 rounds to 8
    ((49, 48), (49, 48), (0, 0)),  # 0.5 rounds to 0
    ((48, 51), (48, 51), (0, 2)),  # 1.5 rounds to 2
    ((20, 31), (48, 74), (0, 13)),  # upscaled
]


@pytest.mark.parametrize(("size", "resized", "start"), CLIP_GEOMETRY)
def test_crop_is_clips_geometry(size: tuple[int, int], resized: tuple[int, int], start: tuple[int, int]) -> None:
    image = _scene(*size)
    expected = _by_hand(image, *resized)[start[1] : start[1] + 48, start[0] : start[0] + 48]
    seen = Transform(48)(_encoded(image, "PNG"))
    assert (seen.dtype, tuple(seen.shape), seen.is_contiguous()) == (torch.uint8, (3, 48, 48), True)
    assert np.abs(seen.permute(1, 2, 0).numpy() - expected).max() <= 1
    assert torch.equal(seen, Transform(48)(image))


def test_squash_and_pad() -> None:
    image = _scene(320, 200)
    squashed = Transform(48, "squash")(image).permute(1, 2, 0).numpy()
    assert np.abs(squashed - _by_hand(image, 48, 48)).max() <= 1
    for picture, shown in ((image, np.s_[9:39, :]), (image.transpose(Image.Transpose.TRANSPOSE), np.s_[:, 9:39])):
        padded = Transform(48, "pad")(picture).permute(1, 2, 0).numpy()
        width, height = (48, 30) if picture.width > picture.height else (30, 48)
        assert np.abs(padded[shown] - _by_hand(picture, width, height)).max() <= 1
        ground = padded.copy()
        ground[shown] = 127
        assert (ground == 127).all()
    thin = Transform(16, "pad")(Image.new("RGB", (50, 1), (255, 255, 255)))
    assert (thin == 255).sum() == 3 * 16
    assert (thin == 127).sum() == 3 * 16 * 15


def test_settings_are_checked() -> None:
    for settings, said in (
        ({"resize": "stretch"}, "one of: crop, squash, pad"),
        ({"augment": "filp"}, "did you mean 'flip'"),
        ({"resolution": 0}, "resolution 0"),
        ({"resolution": True}, "resolution True"),
    ):
        with pytest.raises(UserError, match=said):
            Transform(**({"resolution": 32} | settings))  # type: ignore[arg-type]


# -- augmentation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENTS)
def test_augmentation_is_a_function_of_the_generator(augment: str) -> None:
    transform = Transform(32, augment=augment)
    plain = Transform(32)(SCENE)
    assert torch.equal(transform(SCENE), plain)  # nothing is drawn without a generator
    draws = [transform(PNG, np.random.default_rng(seed)) for seed in range(60)]
    again = [transform(SCENE, np.random.default_rng(seed)) for seed in range(60)]
    assert all(torch.equal(a, b) for a, b in zip(draws, again, strict=True))
    assert all(d.shape == plain.shape and d.is_contiguous() for d in draws)
    kinds = len({d.numpy().tobytes() for d in draws})
    expected = {"none": 1, "flip": 2, "dihedral": 8}
    assert kinds == expected.get(augment, kinds)
    assert ("crop" in augment) == (kinds > 8)


def test_symmetries_are_the_squares_own() -> None:
    plain = Transform(32)(SCENE).numpy()
    turns = [np.rot90(side, k, (1, 2)) for side in (plain, plain[:, :, ::-1]) for k in range(4)]
    draws = {Transform(32, augment="dihedral")(SCENE, np.random.default_rng(s)).numpy().tobytes() for s in range(90)}
    assert draws == {np.ascontiguousarray(turn).tobytes() for turn in turns}
    mirrored = {Transform(32, augment="flip")(SCENE, np.random.default_rng(s)).numpy().tobytes() for s in range(20)}
    assert mirrored == {np.ascontiguousarray(turn).tobytes() for turn in (plain, plain[:, :, ::-1])}


def test_random_crops_keep_the_promised_area() -> None:
    """A picture of its own coordinates shows which part a crop has kept."""
    ramp = np.stack([*np.meshgrid(np.arange(200), np.arange(200)), np.zeros((200, 200))], -1).astype(np.uint8)
    areas, lefts = [], []
    for seed in range(80):
        seen = Transform(100, "squash", "crop")(Image.fromarray(ramp), np.random.default_rng(seed)).float()
        width, height = (float(seen[i].max() - seen[i].min()) + 1 for i in (0, 1))
        assert abs(width - height) <= 3
        areas.append(width * height / 200**2)
        lefts.append(float(seen[0].min()))
    assert 0.68 < min(areas) < 0.75
    assert 0.95 < max(areas) <= 1.0
    assert max(lefts) > 15


# -- real pictures -----------------------------------------------------------------------------------


def test_real_pictures(reference_data: Path) -> None:
    paths = sorted((reference_data / "data" / "cc3m" / "ccby_18_photos").glob("*.jpg"))
    assert len(paths) == 18
    for path in paths:
        seen = Transform(224)(read_image(path))
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        short = min(rgb.size)
        width, height = (int(224 * side / short) for side in rgb.size)
        left, top = round((width - 224) / 2), round((height - 224) / 2)
        resized = rgb.resize((width, height), Image.Resampling.BICUBIC)
        expected = np.asarray(resized)[top : top + 224, left : left + 224]
        assert np.array_equal(seen.permute(1, 2, 0).numpy(), expected), path.name
