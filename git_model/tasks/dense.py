"""Dense captions: a text for every box of a picture, given or proposed, with how sure the model is of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.batch import Region, Target
from git_model.errors import ImageError, UserError
from git_model.tasks.options import BatchOptions, ModelOptions, SearchOptions
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from git_model.models.language import Decoding
    from git_model.models.proposals import RegionProposer
    from git_model.tasks.captioner import GitCaptioner

FourNumbers = tuple[float, float, float, float]


@dataclass(frozen=True)
class Said:
    """A box in pixels of the upright picture, its text, and the mean log-probability of the text's tokens, if known."""

    box: FourNumbers
    text: str
    score: float | None


def dense_caption(
    *,
    image_path: str,
    boxes: list[FourNumbers] | None = None,
    proposals: Literal["grid", "graph", "sam"] = "grid",
    sam_model: str = "facebook/sam-vit-base",
    top_k: Annotated[int, Range(1, 10000)] = 16,
    overlap: Annotated[float, Range(0, 1)] = 0.5,
    prompt: str = "",
    out_image: str | None = None,
    batch_size: Annotated[int, Range(1, 4096)] = 32,
    model: ModelOptions,
    search: SearchOptions,
) -> dict[str, Any]:
    """Caption every given box of a picture, or the `top_k` of those proposed of whose captions the model is surest."""
    model.check()
    from git_model.models.proposals import RegionProposer
    from git_model.tasks.picture import check_name, enlarged, read_picture, save_picture

    if out_image is not None:
        check_name(out_image, image_path, model.model_path)
    picture = read_picture(image_path)
    captioner = _region_reader(model)
    proposer = None if boxes else RegionProposer(proposals, sam_model, captioner.device)
    wanted = boxes or shown_boxes(captioner, picture, _proposed(proposer, picture))
    decoding = search.decoding_of(captioner, bool(prompt))
    try:
        found = describe(captioner, picture, wanted, decoding, prompt, batch_size)
    except ImageError as error:
        raise UserError(f"boxes: {error}") from error
    if not boxes:
        found = best(found, top_k, overlap)
    if out_image is not None:
        save_picture(enlarged(picture, [(said.box, said.text) for said in found]), out_image)
    return {"image_path": image_path, "regions": [vars(said) for said in found]}


def describe(
    captioner: GitCaptioner,
    picture: Image,
    boxes: Sequence[FourNumbers],
    decoding: Decoding,
    prompt: str = "",
    batch_size: int = 32,
) -> list[Said]:
    """Return a text with its score for each box, in their order; the picture is encoded once.

    Args:
        captioner: trained with --region.
        picture: upright, RGB.
        boxes: in pixels.
        decoding: how.
        prompt: asked about every box.
        batch_size: boxes decoded together.

    Raises:
        ImageError: a box that is none of this picture.
    """
    targets = [Target(prompt=prompt, regions=(Region(0, box),)) for box in boxes]
    once = captioner.region_mode != "crop" and targets  # else each box is a picture of its own
    seen = captioner.encoded(captioner.see([picture], targets)) if once else None
    found: list[Said] = []
    for start in range(0, len(boxes), batch_size):
        some = slice(start, start + batch_size)
        asked = captioner.see([picture], targets[some]) if seen is None else replace(seen, targets=seen.targets[some])
        texts, scores = captioner.ask_scored([asked], decoding)
        found += [Said(*told) for told in zip(boxes[some], texts, scores, strict=True)]
    return found


def shown_boxes(captioner: GitCaptioner, picture: Image, boxes: Sequence[FourNumbers]) -> list[FourNumbers]:
    """Return the boxes of which the encoder's square shows anything: all, unless pictures are cropped to it."""
    if captioner.region_mode == "crop" or captioner.prepare.resize != "crop":
        return list(boxes)
    frame, kept = captioner.prepare.framed(picture)[1], []
    for box in boxes:
        with suppress(ImageError):
            frame.box(box)
            kept.append(box)
    return kept


def best(found: Sequence[Said], top_k: int, overlap: float) -> list[Said]:
    """Return the surest ones, best first, without those that a surer one overlaps; unknown scores are all alike."""
    from git_model.models.proposals import suppressed

    kept = suppressed([said.box for said in found], [said.score or 0.0 for said in found], overlap)
    return [found[i] for i in kept[:top_k]]


def dense_caption_tsv(
    *,
    image_tsv: str,
    out_tsv: str,
    proposals: Literal["grid", "graph", "sam"] = "grid",
    sam_model: str = "facebook/sam-vit-base",
    top_k: Annotated[int, Range(1, 10000)] = 16,
    overlap: Annotated[float, Range(0, 1)] = 0.5,
    prompt: str = "",
    model: ModelOptions,
    search: SearchOptions,
    share: BatchOptions,
    batch_size: Annotated[int, Range(1, 4096)] = 32,
) -> dict[str, Any] | None:
    """Caption proposed boxes of every picture of an image TSV; killed, it goes on; torchrun or parts share it."""
    from git_model.tasks.tsv import batch_run, check_files

    check_files(out_tsv, image_tsv)
    model.check()
    from git_model.datasets.asking import AskRow, AskRows
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.images import decode_image
    from git_model.models.proposals import RegionProposer
    from git_model.tasks.journal import Done
    from git_model.tasks.opening import job_of

    refuse_overwriting(out_tsv, image_tsv, model.model_path)
    asked = [proposals, sam_model, top_k, overlap, prompt]
    files = [model.model_path, image_tsv, sam_model if proposals == "sam" else None, search.answer_list]
    job = job_of(files, *asked, asdict(search), asdict(replace(model, device="")))
    search.answers()  # a list that cannot be read is told at once

    def start() -> tuple[AskRows, Any, int]:
        captioner = _region_reader(model)
        proposer = RegionProposer(proposals, sam_model, captioner.device)
        decoding = search.decoding_of(captioner, bool(prompt))

        def answer(rows: list[AskRow]) -> dict[int, Done]:
            return {row.row: one(row) for row in rows}

        def one(row: AskRow) -> Done:
            if row.error:
                return Done((row.key, "[]"), row.error, row.detail)
            wanted = shown_boxes(captioner, row.picture, _proposed(proposer, row.picture))
            found = describe(captioner, row.picture, wanted, decoding, prompt, batch_size)
            return Done(_row(row.key, best(found, top_k, overlap)))

        return AskRows(Path(image_tsv), None, decode_image), answer, 1

    return batch_run(out_tsv, job, start, share, columns=2)


def _proposed(proposer: RegionProposer | None, picture: Image) -> list[FourNumbers]:
    """Return the whole of a picture and what a proposer finds in it."""
    found = proposer(picture) if proposer else []
    return [(0.0, 0.0, float(picture.width), float(picture.height)), *found]


def _region_reader(model: ModelOptions) -> GitCaptioner:
    from git_model.tasks.captioner import GitCaptioner

    captioner = model.open()
    if not isinstance(captioner, GitCaptioner) or captioner.region_mode == "none":
        raise UserError(f"{model.model_path} reads whole pictures only; dense captions need one trained with --region")
    return captioner


def _row(key: str, found: Sequence[Said]) -> tuple[str, str]:
    """Return a row of a region TSV: key, JSON of texts, boxes (`rect`) and scores (`conf`)."""
    from git_model.datasets.records import json_cell

    return key, json_cell([{"caption": s.text, "rect": list(s.box), "conf": round(s.score or 0.0, 6)} for s in found])
