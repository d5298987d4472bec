"""[Loaded sample] -> RegressionBatch: pictures, or an ensemble's features, and the vectors of what was said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from git_model.batch import BadSample, RegressionBatch
from git_model.datasets.collate import Loaded
from git_model.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TextVectors:
    """The vector of every text of a run.

    Args:
        places: each text's row.
        values: (n,F) float32; may be mapped from a file.
    """

    places: Mapping[str, int]
    values: np.ndarray

    def of(self, text: str) -> np.ndarray:
        """Return a text's vector (F,)."""
        return self.values[self.places[text]]


class VectorCollator:
    """Builds batches; called in the loader's workers.

    Args:
        vectors: of the texts; None where the samples have their own.
        width: F.
    """

    def __init__(self, vectors: TextVectors | None, width: int) -> None:
        self.vectors, self.width = vectors, width

    def __call__(self, items: Sequence[Loaded | BadSample]) -> RegressionBatch:
        """Return the batch of the good items; the bad ones are listed in `skipped`."""
        import torch

        skipped = [item for item in items if isinstance(item, BadSample)]
        kept: list[Loaded] = []
        which: list[int] = []
        wanted: list[Tensor] = []
        for item in items:
            if isinstance(item, BadSample):
                continue
            found = self._wanted(item)
            if not found:
                skipped.append(BadSample(item.key, "no_target"))
                continue
            which += [len(kept)] * len(found)
            wanted += found
            kept.append(item)
        columns = zip(*(k.images for k in kept), strict=True)
        inputs: tuple[Tensor, ...] = tuple(torch.stack(column) for column in columns)
        several = bool(kept) and inputs[0].ndim == 2  # (I,D): an ensemble's
        return RegressionBatch(
            inputs=inputs or (torch.zeros(0, 3, 1, 1, dtype=torch.uint8),),
            missing=torch.stack([x.isnan().any(dim=1) for x in inputs], dim=1) if several else None,
            which=torch.tensor(which, dtype=torch.long),
            wanted=torch.stack(wanted) if wanted else torch.zeros(0, self.width),
            keys=tuple(k.key for k in kept),
            skipped=tuple(skipped),
        )

    def _wanted(self, item: Loaded) -> list[Tensor]:
        """Return the vectors (F,) of a sample.

        Raises:
            UserError: several pictures in one sample: whose vector would it be?
        """
        import torch

        if item.wanted is not None:
            return [item.wanted]
        if self.vectors is None:
            return []
        if len(item.images) != 1 and item.images[0].ndim > 1:
            raise UserError(f"a regressor takes one picture a record; '{item.key}' has {len(item.images)}")
        return [torch.tensor(self.vectors.of(t.text)) for t in item.targets if t.text and not (t.prompt or t.regions)]
