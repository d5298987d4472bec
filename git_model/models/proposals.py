"""RegionProposer: boxes worth a caption: a grid of several sizes, graph segmentation, or Segment Anything.

Boxes are left, top, right, bottom in pixels of the upright picture, whole numbers, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from git_model.errors import UserError, one_of

PixelBox = tuple[int, int, int, int]
Mask = np.ndarray  # (h,w) bool, of the whole picture, at most LONG_SIDE pixels long
Proposed = tuple[PixelBox, Mask | None]
GRID = (1, 2, 3)  # boxes that fit beside each other along a side; neighbours overlap by half
SEGMENTS = (50.0, 200.0, 800.0)  # scales of the graph segmentation: larger ones give larger parts
LONG_SIDE = 384  # pixels, of the picture that is segmented
LEAST = 0.005  # of the picture's area; smaller boxes are left out
ALIKE = 0.9  # boxes that overlap more are one


class RegionProposer:
    """Boxes of a picture.

    Args:
        kind: 'grid'; 'graph' (Felzenszwalb and Huttenlocher 2004, needs scikit-image); 'sam' (Kirillov et al. 2023).
        sam_model: Hugging Face id or folder of a SAM model.
        device: of SAM.

    Raises:
        UserError: an unknown kind, a package or a model that is not there.
    """

    def __init__(self, kind: str = "grid", sam_model: str = "facebook/sam-vit-base", device: str = "cpu") -> None:
        if kind not in PROPOSALS:
            raise one_of("proposals", kind, PROPOSALS)
        self.kind, self.device = kind, device
        self.segment: Any = _felzenszwalb() if kind == "graph" else None
        self.sam: Any = _load_sam(sam_model, device) if kind == "sam" else None

    def __call__(self, picture: Image.Image) -> list[PixelBox]:
        """Return the boxes, the whole picture not among them, largest first; the same for the same picture."""
        return [box for box, _ in self.regions(picture)]

    def regions(self, picture: Image.Image) -> list[Proposed]:
        """Return the boxes with what in them belongs together, where the kind tells that."""
        masks: dict[PixelBox, Mask | None] = {}
        for box, mask in PROPOSALS[self.kind](self, picture):
            masks.setdefault(box, mask)
        whole, least = (0, 0, picture.width, picture.height), LEAST * picture.width * picture.height
        kept = [box for box in masks if box != whole and area_of(box) >= least]
        return [(kept[i], masks[kept[i]]) for i in suppressed(kept, [area_of(box) for box in kept], ALIKE)]


def area_of(box: PixelBox) -> float:
    """Return a box's pixels."""
    return float((box[2] - box[0]) * (box[3] - box[1]))


def masked(picture: Image.Image, box: PixelBox, mask: Mask | None) -> Image.Image:
    """Return what is in a box, black where the mask says it does not belong to it."""
    if mask is None:
        return picture.crop(box)
    shown = Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(picture, Image.new("RGB", picture.size), shown).crop(box)


def suppressed(boxes: list[Any], scores: list[float], overlap: float) -> list[int]:
    """Return which boxes stay, best first: those that no better one overlaps by more (NMS); ties in given order.

    Args:
        boxes: left, top, right, bottom.
        scores: higher is better.
        overlap: intersection over union above which the lesser one goes.
    """
    if not boxes:
        return []
    sides = np.asarray(boxes, dtype=np.float64)  # (n,4)
    area = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])  # (n,)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    kept: list[int] = []
    while len(order):
        best, rest = int(order[0]), order[1:]
        kept.append(best)
        low, high = np.maximum(sides[best, :2], sides[rest, :2]), np.minimum(sides[best, 2:], sides[rest, 2:])  # (m,2)
        shared = np.clip(high - low, 0, None).prod(axis=1)  # (m,)
        order = rest[shared <= overlap * (area[best] + area[rest] - shared)]
    return kept


def _grid(_: RegionProposer, picture: Image.Image) -> Iterator[Proposed]:
    for across in GRID:
        for down in GRID:
            width, height = picture.width / across, picture.height / down
            for row in range(2 * down - 1):
                for column in range(2 * across - 1):
                    left, top = column * width / 2, row * height / 2
                    yield (round(left), round(top), round(left + width), round(top + height)), None


def _graph(proposer: RegionProposer, picture: Image.Image) -> Iterator[Proposed]:
    small = _small(picture)
    pixels = np.asarray(small)
    across, down = picture.width / small.width, picture.height / small.height
    for scale in SEGMENTS:
        parts = proposer.segment(pixels, scale=scale, sigma=0.8, min_size=max(20, pixels[..., 0].size // 200))  # (h,w)
        for part in range(int(parts.max()) + 1):
            mask = parts == part
            if mask.any():
                left, top, right, bottom = _around(mask)
                yield (round(left * across), round(top * down), round(right * across), round(bottom * down)), mask


def _sam(proposer: RegionProposer, picture: Image.Image) -> Iterator[Proposed]:
    import torch

    model, processor = proposer.sam
    steps, batch = 16, 64  # points a side; points of a forward
    width, height = _small(picture).size  # masks of the picture's own size would take gigabytes
    across, down = picture.width / width, picture.height / height
    x, y = np.meshgrid(*((np.arange(steps) + 0.5) / steps * side for side in picture.size))
    points = np.stack([x, y], axis=-1).reshape(-1, 1, 2)  # (256,1,2)
    with torch.no_grad():
        inputs = processor(picture, return_tensors="pt").to(proposer.device)
        image = model.get_image_embeddings(inputs["pixel_values"])
        for start in range(0, len(points), batch):
            asked = processor(picture, input_points=[points[start : start + batch].tolist()], return_tensors="pt")
            out = model(
                image_embeddings=image, input_points=asked["input_points"].to(proposer.device), multimask_output=True
            )
            good = out.pred_masks[0][out.iou_scores[0] >= 0.88].cpu()  # (n,h,w) logits, by SAM's own threshold
            if not len(good):
                continue
            sizes = (torch.tensor([[height, width]]), inputs["reshaped_input_sizes"].cpu())
            (masks,) = processor.post_process_masks([good[:, None]], *sizes)  # (n,1,height,width) bool
            for mask in masks[:, 0].numpy():
                if mask.any():
                    left, top, right, bottom = _around(mask)
                    yield (round(left * across), round(top * down), round(right * across), round(bottom * down)), mask


def _small(picture: Image.Image) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((LONG_SIDE, LONG_SIDE))
    return small


def _around(mask: Mask) -> PixelBox:
    rows, columns = np.nonzero(mask)
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


PROPOSALS: dict[str, Callable[[RegionProposer, Image.Image], Iterator[Proposed]]] = {
    "grid": _grid,
    "graph": _graph,
    "sam": _sam,
}


def _felzenszwalb() -> Any:
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise UserError(
            "proposals 'graph' need scikit-image: pip install 'generative-image-to-text[regions]'"
        ) from error
    return felzenszwalb


def _load_sam(name: str, device: str) -> Any:
    from transformers import SamImageProcessor, SamModel, SamProcessor

    from git_model.models.hub import check_name

    check_name(name, "SAM model")
    try:
        model: Any = SamModel.from_pretrained(name)
        return model.to(device).eval(), SamProcessor(SamImageProcessor.from_pretrained(name))
    except (OSError, ValueError, ImportError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load the SAM model '{name}': {told}; proposals 'grid' and 'graph' need none"
        ) from error
