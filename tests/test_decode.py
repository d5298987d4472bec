"""The quick way of JPEGs beside the exact one: near it in pixels, equal in verdicts, never enlarging."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_images import BAD, GOOD, JPEG, NOISE_JPEG, SCENE, _encoded, _noise, _scene

from git_model.batch import Sample, Target
from git_model.config import Config, DataConfig
from git_model.datasets.images import RESIZES, ImageError, Transform, decode_image
from git_model.datasets.jpeg import MARGIN, decode_photo
from git_model.datasets.loader import ImageTextDataset
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.training import training_data

TRIALS = int(os.environ.get("GIT_MODEL_IMAGES", "2000"))


def _photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with edges, slopes and a little noise, unlike in each corner."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], -1)
    for _ in range(12):
        cx, cy, r = rng.integers(width), rng.integers(height), rng.integers(3, max(4, min(width, height) // 4))
        planes[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = rng.integers(0, 256, 3)
    return Image.fromarray((planes + rng.normal(0, 3, planes.shape)).clip(0, 255).astype(np.uint8))


def _both(data: bytes, side: int, resize: str = "crop") -> np.ndarray:
    """Return how far scaled is from exact (3,H,W), in grey levels."""
    exact, scaled = (Transform(side, resize, decode=decode)(data) for decode in ("exact", "scaled"))
    assert (scaled.dtype, scaled.shape, scaled.is_contiguous()) == (torch.uint8, (3, side, side), True)
    return (exact.int() - scaled.int()).abs().numpy()


def _scale(data: bytes, side: int, resize: str = "crop") -> int:
    """Return how much smaller the quick way decodes; 0 = it leaves the picture to the exact way."""
    photo = decode_photo(data, Transform(side, resize)._resampled_to)
    return 0 if photo is None else photo.scale


# -- the exact way is what it was --------------------------------------------------------------------


def _reference(image: Image.Image, side: int, resize: str) -> np.ndarray:
    """CLIP's preprocessing in Pillow's own words: resize all of it, then cut or pad."""
    if resize == "squash":
        return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    width, height = image.size
    if resize == "crop":
        short = min(width, height)
        width, height = (side if s == short else int(side * s / short) for s in (width, height))
        left, top = round((width - side) / 2), round((height - side) / 2)
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(resized)[top : top + side, left : left + side]
    long = max(width, height)
    width, height = (max(1, round(side * s / long)) for s in (width, height))
    ground = np.full((side, side, 3), 127, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    ground[top : top + height, left : left + width] = np.asarray(
        image.resize((width, height), Image.Resampling.BICUBIC)
    )
    return ground


@pytest.mark.parametrize("resize", RESIZES)
def test_exact_is_to_the_bit_what_pillow_makes_of_the_whole_picture(resize: str) -> None:
    rng = np.random.default_rng(3)
    sizes = [(640, 480), (480, 640), (32, 32), (33, 32), (32, 40), (10, 31), (31, 10), (400, 31), (64, 32)]
    for width, height in (*sizes, *rng.integers(20, 300, (40, 2)).tolist()):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for data in (image, _encoded(image, "PNG")):
            seen = Transform(32, resize)(data).permute(1, 2, 0).numpy()
            assert np.array_equal(seen, _reference(image, 32, resize)), (width, height)


def test_exact_is_the_default() -> None:
    assert Transform(8).decode == DataConfig().decode == read_flags([])[0].data.decode == "exact"
    assert read_flags(["--decode", "scaled"])[0].data.decode == "scaled"
    for wrong in (lambda: Transform(8, decode="scale"), lambda: DataConfig(decode="scale")):
        with pytest.raises(UserError, match="did you mean 'scaled'"):
            wrong()


# -- near it in pixels -------------------------------------------------------------------------------

KINDS = [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}, {"optimize": True}]


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: next(iter(options), "plain"))
def test_scaled_is_near_exact(options: dict[str, object], resize: str) -> None:
    for size in ((160, 120), (121, 163), (100, 100), (97, 64)):  # too small to be decoded smaller
        for image in (_photo(*size), _photo(*size).convert("L")):
            data = _encoded(image, "JPEG", quality=90, **({} if image.mode == "L" else options))
            assert _scale(data, 56, resize) == 1
            difference = _both(data, 56, resize)
            assert difference.max() <= 3
            assert difference.mean() < 0.02
    for size, scale in (((640, 480), 4), ((333, 479), 2), ((1001, 901), 8)):
        data = _encoded(_photo(*size), "JPEG", quality=90, **options)
        assert _scale(data, 48, resize) >= scale
        difference = _both(data, 48, resize)
        assert difference.mean() < 1
        assert difference.max() <= 40
        if resize == "pad":  # the ground is the ground, and no pixel more
            where = [(Transform(48, "pad", decode=d)(data) == 127).all(0) for d in ("exact", "scaled")]
            assert (where[0] ^ where[1]).float().mean() < 0.01


def test_a_picture_is_decoded_as_small_as_the_margin_lets_it_be_and_never_enlarged() -> None:
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(150):
        width, height = rng.integers(8, 700, 2).tolist()
        side, resize = int(rng.integers(4, 90)), RESIZES[rng.integers(3)]
        transform = Transform(side, resize)
        data = _encoded(Image.new("RGB", (width, height)), "JPEG")
        new_width, new_height, *_ = transform._geometry(width, height)
        photo = decode_photo(data, transform._resampled_to)
        if new_width > width or new_height > height:
            assert photo is None
            continue
        assert photo is not None
        assert (photo.width, photo.height) == (width, height)
        assert photo.pixels.shape == (-(-height // photo.scale), -(-width // photo.scale), 3)
        plenty = min(width / new_width, height / new_height) / MARGIN
        fits = [scale for scale in (1, 2, 4, 8) if scale <= max(plenty, 1)]
        assert photo.scale == max(fits)
        seen.add(photo.scale)
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for width, side in ((161, 70), (162, 24), (161, 24)):
        data = _encoded(_photo(width, 100), "JPEG", quality=95, exif=exif)
        for resize in RESIZES:
            scale = _scale(data, side, resize)
            # 80.5 columns are one thing at the right edge and another at the left
            assert scale == (1 if side == 70 or (width == 161 and orientation > 1) else 2)
            assert _both(data, side, resize).mean() < (0.02 if scale == 1 else 0.7)


EQUAL = {
    "smaller": _encoded(_photo(200, 30), "JPEG"),
    "png": _encoded(_photo(200, 150), "PNG"),
    "bmp": _encoded(_photo(200, 150), "BMP"),
    "cmyk": _encoded(_photo(200, 150).convert("CMYK"), "JPEG"),
    "several": _encoded(_photo(200, 150), "MPO", save_all=True, append_images=[_photo(200, 150, 1)]),
    "warned of": (lambda data: data[:-2] + b"\0" * 30 + data[-2:])(_encoded(_photo(200, 150), "JPEG")),
}


@pytest.mark.parametrize("data", EQUAL.values(), ids=EQUAL)
def test_what_the_quick_way_leaves_alone_is_exact(data: bytes) -> None:
    for resize in RESIZES if len(data) != len(EQUAL["smaller"]) else ("crop", "squash"):
        assert _scale(data, 40, resize) == 0
        assert _both(data, 40, resize).max() == 0
    picture = _photo(200, 150)
    assert torch.equal(Transform(40, decode="scaled")(picture), Transform(40)(picture))


def test_real_photos(reference_data: Path) -> None:
    """The figures that jpeg.py tells."""
    folder = reference_data / "data" / "coco_val2017_subset" / "images"
    files = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    assert len(files) == 97
    for side, mean, most, psnr in ((224, 0.006, 2, 72), (112, 0.7, 24, 48), (64, 0.5, 16, 51)):
        scales = [_scale(data, side) for data in files]
        assert (max(scales) == 1) == (side == 224)
        seen = [_both(d, side) for d, scale in zip(files, scales, strict=True) if scale > 1 or side == 224]
        assert np.mean([d.mean() for d in seen]) < mean
        assert max(d.max() for d in seen) <= most
        assert np.mean([10 * np.log10(255**2 / max(np.mean(d**2.0), 1e-9)) for d in seen]) > psnr


WITHOUT = """
import sys, torch
from git_model.datasets.images import Transform
assert not torch.backends.cpu.get_cpu_capability().startswith("AVX")
data = sys.stdin.buffer.read()
for side in (56, 30):
    exact, scaled = (Transform(side, decode=decode)(data).int() for decode in ("exact", "scaled"))
    difference = (exact - scaled).abs().float()
    assert difference.mean() < (0.02 if side == 56 else 0.7), difference.mean()
"""


def test_a_processor_without_the_vector_instructions(root: Path) -> None:
    data = _encoded(_photo(163, 121), "JPEG", quality=90)
    assert (_scale(data, 56), _scale(data, 30)) == (1, 2)
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", WITHOUT]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr.decode()


# -- the same verdicts -------------------------------------------------------------------------------


def _verdict(data: bytes, decode: str, side: int) -> tuple[str, np.ndarray | None]:
    try:
        return "ok", Transform(side, decode=decode)(data).numpy()
    except ImageError as error:
        return error.reason, None


def _same(data: bytes) -> str:
    """Hold the two ways against each other at a size for which all is decoded, and at one for which less is."""
    exact, scaled = _verdict(data, "exact", 60), _verdict(data, "scaled", 60)
    assert scaled[0] == exact[0] == _verdict(data, "scaled", 12)[0]
    if exact[1] is not None and scaled[1] is not None:
        assert np.abs(exact[1].astype(int) - scaled[1]).max() <= 3
    return exact[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("data", "_"), [*GOOD, *BAD])
def test_catalogue(data: bytes, _: object) -> None:
    _same(data)


SEEDS = [
    JPEG,
    NOISE_JPEG,
    _encoded(SCENE, "JPEG", progressive=True),
    _encoded(_noise(), "JPEG", progressive=True),
    _encoded(SCENE, "JPEG", restart_marker_blocks=4),
    _encoded(SCENE.convert("L"), "JPEG"),
    _encoded(_scene(150, 119), "JPEG", quality=50),
]


@pytest.mark.parametrize("data", SEEDS, ids=range(len(SEEDS)))
def test_every_cut_gets_its_verdict(data: bytes) -> None:
    """libjpeg only warns of a file that ends too early."""
    assert decode_photo(data, Transform(16)._resampled_to) is not None
    for cut in (*range(3, len(data), max(1, len(data) // 60)), *range(len(data) - 40, len(data))):
        assert _same(data[:cut]) in ("truncated", "corrupt") or cut >= len(data) - 2
        _same(data[:cut] + b"\xff\xd9")  # an end where there should be none
        assert decode_photo(data[:cut], Transform(16)._resampled_to) is None


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_files_get_the_same_verdict() -> None:
    rng = np.random.default_rng(5)
    seen: dict[str, int] = {}
    quick = 0
    for trial in range(TRIALS):
        data = bytearray(SEEDS[trial % len(SEEDS)])
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(min(700, len(data)) if rng.random() < 0.5 else len(data)))] = int(rng.integers(256))
        if rng.random() < 0.2:
            start = int(rng.integers(len(data)))
            del data[start : start + int(rng.integers(1, 60))]
        reason = _same(bytes(data))
        seen[reason] = seen.get(reason, 0) + 1
        quick += _scale(bytes(data), 12) > 1
    assert seen["ok"] > TRIALS // 10
    assert seen["corrupt"] > TRIALS // 100
    assert seen["truncated"] > TRIALS // 100
    assert quick > TRIALS // 20


# -- in training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["flip", "dihedral", "crop", "crop+flip", "crop+dihedral"])
def test_augmentation_draws_the_same(augment: str) -> None:
    for size in ((160, 120), (500, 400), (52, 50)):  # the last would be enlarged where the smallest part is cut out
        data = _encoded(_photo(*size), "JPEG", quality=95)
        exact, scaled = (Transform(45, augment=augment, decode=decode) for decode in ("exact", "scaled"))
        for seed in range(12):
            draws = [np.random.default_rng(seed) for _ in range(2)]
            pictures = [transform(data, rng).int() for transform, rng in zip((exact, scaled), draws, strict=True)]
            assert (pictures[0] - pictures[1]).abs().float().mean() < (0.02 if "crop" in augment else 0.7)
            assert draws[0].integers(1 << 30) == draws[1].integers(1 << 30)


class _Records:
    """A source of encoded pictures."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, record: int) -> Sample:
        return Sample(str(record), (self.files[record],), (Target("a picture", "", None, ()),))


def test_training_data_is_scaled_where_the_recipe_says_so() -> None:
    source = _Records([_encoded(_photo(300, 200, seed), "JPEG") for seed in range(4)])
    for augment in ("none", "flip", "crop"):
        seen = {}
        for decode in ("exact", "scaled"):
            for cache in (False, True):
                data = DataConfig(augment=augment, decode=decode, cache=cache)
                made = training_data(Config(data=data), source, 64)  # type: ignore[arg-type]
                seen[decode, cache] = torch.stack([made[(1, record)].images[0] for record in range(4)])  # type: ignore[union-attr]
        assert torch.equal(seen["exact", True], seen["exact", False])
        # pictures that stay in memory are decoded whole, once: drawing from them is exact
        assert torch.equal(seen["scaled", True], seen["scaled", False]) == (augment == "none")
        assert not torch.equal(seen["scaled", False], seen["exact", False])
        assert (seen["scaled", False].int() - seen["exact", False].int()).abs().float().mean() < 0.1


def test_broken_pictures_are_told_by_both() -> None:
    source = _Records([JPEG, NOISE_JPEG[:-2], b"<html>"])
    for augment in ("none", "crop"):
        for decode in ("exact", "scaled"):
            data = ImageTextDataset(source, Transform(32, augment=augment, decode=decode), augment=True)  # type: ignore[arg-type]
            told = [getattr(data[(0, record)], "reason", "") for record in range(3)]
            assert told == ["", "truncated", "not_image:html"]


def test_decoding_tells_no_more_than_pillow() -> None:
    """The whole picture has the same bits in both libraries: what differs comes from resampling."""
    for data in (JPEG, NOISE_JPEG, *SEEDS[2:]):
        photo = decode_photo(data, lambda width, height: (width, height))
        assert photo is not None
        assert np.array_equal(photo.pixels, np.asarray(decode_image(data)))
