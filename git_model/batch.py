"""The words the rooms exchange: Sample, CaptionBatch and RegressionBatch, and the legend of tensor shapes.

Shape letters, used in every tensor comment of the project:

    B samples   R rows of a batch   I images   N vision tokens   D vision width
    K image tokens for the LM   E LM width   T text length   V vocabulary   Q regions (a picture, or a box in it)
    S sources of an ensemble   F numbers of a text's vector
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMG_SLOT = "[IMG]"
IGNORE_INDEX = -100


Box = tuple[float, float, float, float]  # left, top, right, bottom
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)  # in fractions


@dataclass(frozen=True, slots=True)
class Region:
    """What fills an image slot: a picture of the sample, or a box in it.

    Args:
        image: number of the picture in the sample.
        box: in pixels of the upright picture as it is in its file, -1 = that side of the picture; once loaded, in
            fractions of the encoder's input. None = all of the picture.
    """

    image: int = 0
    box: Box | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to say about the images of a sample.

    Args:
        text: the caption or answer to train on ("" when only asking).
        prompt: text before it, possibly with ``[IMG]`` slots; without a slot the images come first.
        question_id: the id of the question in its file, None for captions.
        answers: all accepted answers, for scoring.
        regions: what it is said of, slot by slot; () = every picture of the sample, whole.
    """

    text: str = ""
    prompt: str = ""
    question_id: int | None = None
    answers: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One record of a data set: encoded pictures and all that is said about them.

    Args:
        key: the record's name in its data set.
        images: encoded image files (JPEG, PNG...), one per ``[IMG]`` slot.
        targets: captions and question/answer pairs that share these images.
        features: of an ensemble, in place of images: S arrays (D,), one of nan for a source that is missing.
        wanted: (F,) the vector to learn, where it is given itself and not by a text.
    """

    key: str
    images: tuple[bytes, ...]
    targets: tuple[Target, ...] = ()
    features: tuple[Any, ...] = ()
    wanted: Any = None


@dataclass(frozen=True, slots=True)
class BadSample:
    """A record that could not be used; it is skipped, counted by reason and reported."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """A batch for every text task.

    A row is one sequence for the language model: a shared prefix (segment 0) and one or more
    segments that see the prefix and themselves only. One segment a row is the ordinary case;
    several segments a row ("packed") let all captions and questions of an image share its tokens.

    Args:
        images: (I,3,H,W) uint8, every distinct image of the batch once; or its features (I,N,D), made before.
        image_index: (S,) long; which image, or region where there are `boxes`, fills the s-th slot, slots in row-major
            order.
        input_ids: (R,T) long; image slots and padding hold the pad id.
        image_mask: (R,T) bool; True where an image token goes, K in a row for each slot.
        attention_mask: (R,T) bool; False on padding.
        segments: (R,T) long; 0 is the shared prefix, 1.. the segments, -1 padding.
        positions: (R,T) long; every segment counts on from the prefix's end.
        labels: (R,T) long; the token itself where it is a target, IGNORE_INDEX elsewhere.
        sources: (R,T) long; index in the row of the token that predicts this one (the one before it, or
            the prefix's last for a segment's first).
        keys: the samples' keys, one per row.
        targets: per row the targets its segments stand for, in order.
        skipped: records left out of this batch.
        truncated: how many targets were cut to the text limit.
        predictors: (L,) long; where in the flattened rows each of the L target tokens is predicted; from `sources`.
        wanted: (L,) long; those target tokens; from `labels`.
        packed: whether a row holds more than one segment; from `segments`.
        longest: positions in use; from `positions`.
        boxes: (Q,4) float, every distinct region of the batch once, in fractions of the encoder's input; None where
            the model takes whole pictures only.
        box_image: (Q,) long; the image each lies in.
    """

    images: Tensor
    image_index: Tensor
    input_ids: Tensor
    image_mask: Tensor
    attention_mask: Tensor
    segments: Tensor
    positions: Tensor
    labels: Tensor
    sources: Tensor
    keys: tuple[str, ...] = ()
    targets: tuple[tuple[Target, ...], ...] = ()
    skipped: tuple[BadSample, ...] = field(default=())
    truncated: int = 0
    predictors: Tensor = None  # type: ignore[assignment]
    wanted: Tensor = None  # type: ignore[assignment]
    packed: bool = None  # type: ignore[assignment]
    longest: int = None  # type: ignore[assignment]
    boxes: Tensor | None = None
    box_image: Tensor | None = None

    def __post_init__(self) -> None:
        # read off once, where the batch is made: asking the tensors later would make a GPU wait
        if self.wanted is not None:
            return
        rows, columns = (self.labels != IGNORE_INDEX).nonzero(as_tuple=True)
        told = {
            "predictors": rows * self.labels.shape[1] + self.sources[rows, columns],
            "wanted": self.labels[rows, columns],
            "packed": bool((self.segments > 1).any()),
            "longest": int(self.positions.max()) + 1 if self.positions.numel() else 0,
        }
        for name, value in told.items():
            object.__setattr__(self, name, value)

    @property
    def num_targets(self) -> int:
        """How many tokens of this batch are trained on."""
        return len(self.wanted)

    def without_last_column(self) -> CaptionBatch:
        """Return the batch without its last column, which holds ends only: nothing is predicted from them.

        Rows are padded on the right; `predictors` and `wanted` stay whole, `labels` does not.
        """
        width = self.labels.shape[1]
        names = ("input_ids", "image_mask", "attention_mask", "segments", "positions", "labels", "sources")
        rest: dict[str, Any] = {name: getattr(self, name)[:, :-1] for name in names}  # (R,T-1) each
        return replace(self, **rest, predictors=self.predictors - self.predictors // width)

    def pin_memory(self) -> CaptionBatch:
        """Return the batch with its tensors in pinned memory, for the loader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: Any, non_blocking: bool = True) -> CaptionBatch:
        """Return the batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> CaptionBatch:
        import torch

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(v) for n, v in values.items() if isinstance(v, torch.Tensor)})


@dataclass(frozen=True, slots=True)
class RegressionBatch:
    """Pictures, or features of several sources, and the vectors of what was said of them.

    Args:
        inputs: pictures (I,3,H,W) uint8 or features of them (I,N,D), alone; or S tensors (I,D) of an ensemble.
        missing: (I,S) bool; sources that are not there; None where there are no sources.
        which: (B,) long; the picture that a vector belongs to.
        wanted: (B,F) float.
        keys: the samples' keys, I of them.
        skipped: records left out of this batch.
    """

    inputs: tuple[Tensor, ...]
    missing: Tensor | None
    which: Tensor
    wanted: Tensor
    keys: tuple[str, ...] = ()
    skipped: tuple[BadSample, ...] = ()
    truncated: int = 0

    @property
    def images(self) -> Tensor:
        """What has a row for each picture."""
        return self.inputs[0]

    @property
    def num_targets(self) -> int:
        """How many vectors are trained on."""
        return len(self.wanted)

    def pin_memory(self) -> RegressionBatch:
        """Return the batch with its tensors in pinned memory, for the loader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def to(self, device: Any, non_blocking: bool = True) -> RegressionBatch:
        """Return the batch with its tensors on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> RegressionBatch:
        missing = None if self.missing is None else change(self.missing)
        inputs = tuple(change(tensor) for tensor in self.inputs)
        return replace(self, inputs=inputs, missing=missing, which=change(self.which), wanted=change(self.wanted))


Batch = CaptionBatch | RegressionBatch
