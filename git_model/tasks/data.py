"""Tasks that make data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from git_model.tasks.params import Range


def make_shapes(
    *,
    out_dir: str,
    train: Annotated[int, Range(1, 1_000_000)] = 8000,
    val: Annotated[int, Range(1, 1_000_000)] = 400,
    test: Annotated[int, Range(1, 1_000_000)] = 400,
    side: Annotated[int, Range(32, 512)] = 48,
    seed: Annotated[int, Range(0, 2**31)] = 0,
) -> dict[str, int]:
    """Draw the embedded data set as GIT TSVs; `test` holds attribute pairs that `train` never shows."""
    from git_model.datasets.shapes import write_shapes

    return write_shapes(Path(out_dir), train=train, val=val, test=test, side=side, seed=seed)
