"""Tasks that make data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks.options import TsvOptions
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from git_model.datasets.sources import Source


def make_shapes(
    *,
    out_dir: str,
    train: Annotated[int, Range(1, 1_000_000)] = 10_500,
    val: Annotated[int, Range(1, 1_000_000)] = 400,
    test: Annotated[int, Range(1, 1_000_000)] = 400,
    side: Annotated[int, Range(32, 512)] = 48,
    seed: Annotated[int, Range(0, 2**31)] = 0,
    things: tuple[Annotated[int, Range(1, 4)], Annotated[int, Range(1, 4)]] = (1, 3),
) -> dict[str, int]:
    """Draw the embedded data set as GIT TSVs; `test` holds attribute pairs that `train` never shows."""
    from git_model.datasets.shapes import write_shapes

    return write_shapes(Path(out_dir), train=train, val=val, test=test, side=side, seed=seed, things=things)


def prepare_coco(
    *,
    annotations: str,
    image_dir: str,
    split: Literal["train", "restval", "val", "test"] | None = None,
    target: TsvOptions,
) -> dict[str, Any]:
    """Write {name}.img.tsv and {name}.caption.tsv from COCO: Karpathy's JSON (with split) or the official one."""
    from git_model.datasets.coco import CocoCaptions

    return _prepared(CocoCaptions(Path(), annotations, image_dir, split), target)


def prepare_vqa(
    *,
    questions: str,
    image_dir: str,
    annotations: str | None = None,
    target: TsvOptions,
) -> dict[str, Any]:
    """Write {name}.img.tsv and {name}.question.tsv from VQAv2's questions JSON; with annotations also the answers."""
    from git_model.datasets.coco import VqaV2

    return _prepared(VqaV2(Path(), questions, image_dir, annotations), target)


def prepare_tsv(
    *,
    config: str,
    source: Literal["train", "val"] = "val",
    data_dir: str | None = None,
    target: TsvOptions,
) -> dict[str, Any]:
    """Write the TSVs of a recipe's own data: {name}.img.tsv with .caption.tsv, .question.tsv or both."""
    from git_model.config import Config
    from git_model.datasets.sources import build_source
    from git_model.schema import from_dict, read_yaml

    data = from_dict(Config, read_yaml(Path(config))).data
    return _prepared(build_source(getattr(data, source), data_dir or data.dir), target)


def _prepared(source: Source, target: TsvOptions) -> dict[str, Any]:
    from tqdm import tqdm

    from git_model.datasets.prepare import write_tsvs

    with tqdm(total=len(source), unit="image") as bar:
        rows, lost = write_tsvs(source, Path(target.out_dir), target.name, bar.update)
    if sum(lost.values()) > target.max_bad * len(source):
        raise UserError(
            f"{sum(lost.values())} of {len(source)} images could not be read ({lost}), more than max_bad "
            f"{target.max_bad}; the others are in {target.out_dir}/{target.name}.img.tsv",
            EXIT_TOO_MANY_BAD,
        )
    return {"out_dir": target.out_dir, "images": len(source), "rows": rows, "left_out": lost}
