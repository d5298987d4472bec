"""Image to paragraph: captions of the whole and of its regions, what the largest are, and one text of it all."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from git_model.errors import ImageError, UserError
from git_model.tasks.dense import FourNumbers
from git_model.tasks.options import BatchOptions, ModelOptions, SearchOptions, check_model_path
from git_model.tasks.teller import RegionOptions, Teller, WriterOptions
from git_model.tasks.values import Range


def image_to_paragraph(
    *,
    image_path: str | None = None,
    image_tsv: str | None = None,
    out_tsv: str | None = None,
    boxes: list[FourNumbers] | None = None,
    region_tsv: str | None = None,
    out_image: str | None = None,
    redraw: str | None = None,
    controlnet: str = "lllyasviel/sd-controlnet-canny",
    regions: RegionOptions,
    writing: WriterOptions,
    model: ModelOptions,
    search: SearchOptions,
    share: BatchOptions,
    batch_size: Annotated[int, Range(1, 4096)] = 32,
) -> dict[str, Any] | None:
    """Write a paragraph about a picture, or about each of a folder's or an image TSV's; killed, a batch goes on.

    image_path: a picture, or a folder of them; a folder and image_tsv need out_tsv.
    boxes, region_tsv: regions to tell of, of the picture or of each row; without them they are proposed.
    out_image: the picture with its regions over the paragraph; redraw: beside it another picture that this Stable
        Diffusion model makes of the paragraph and the picture's edges, with a controlnet.
    caption_model, region_model: in place of model_path, for the whole picture or the regions; whole: tell of it.
    largest: so many of the largest regions are named by the nearest of `phrases` (a file, one a line; `towers` is a
        CLIP), without phrases by a caption of what is in the region alone.
    writer: 'template', 'decoder' (the model itself) or 'openai' (base_url, writer_model, key_env); what breaks the
        rules is written once more, then by the template.
    """
    from git_model.tasks.tsv import batch_run, check_files

    folder = image_path is not None and Path(image_path).is_dir()
    if (image_path is None) == (image_tsv is None):
        raise UserError("give one of image_path and image_tsv")
    if (folder or image_tsv) and out_tsv is None:
        raise UserError("a folder or a TSV of pictures needs out_tsv")
    if (folder or image_tsv) and (boxes or out_image):
        raise UserError("boxes and out_image are for one picture; for a TSV's regions give region_tsv")
    if redraw and not out_image:
        raise UserError("redraw draws into out_image; name one")
    if out_tsv and not (folder or image_tsv):
        raise UserError("out_tsv is for a folder or a TSV of pictures; a single picture's paragraph is printed")
    if search.answer_list:
        raise UserError("answer_list is for answers; a paragraph is none")
    if region_tsv and not image_tsv:
        raise UserError("region_tsv goes with image_tsv, whose keys it has")
    model.check()
    for other in filter(None, (regions.caption_model, regions.region_model)):
        check_model_path(other)
    form = writing.form()
    inputs = [image_path, image_tsv, region_tsv, model.model_path, regions.caption_model, regions.region_model]
    inputs += [regions.phrases, writing.writer_prompt]
    if not (folder or image_tsv):
        from git_model.tasks.picture import beside, captioned, check_name, enlarged, read_picture, save_picture

        if out_image is not None:
            check_name(out_image, *inputs)
        picture = read_picture(str(image_path))
        teller = Teller(model, regions, writing, form, search.decoding(), batch_size)
        try:
            told = teller.told(picture, boxes)
        except ImageError as error:
            raise UserError(f"boxes: {error}") from error
        if out_image is not None:
            drawn = enlarged(picture, [(thing.box, thing.text) for thing in told.levels.regions])
            if redraw is not None:
                from git_model.models.diffusion import Redrawer

                drawn = beside(drawn, Redrawer(redraw, controlnet, teller.device)(picture, told.paragraph.text))
            save_picture(captioned(drawn, told.paragraph.text), out_image)
        return {"image_path": image_path, **told.record()}

    from git_model.datasets.asking import AskRow, AskRows, FolderRows
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.images import decode_image
    from git_model.datasets.records import json_cell
    from git_model.tasks.journal import Done
    from git_model.tasks.opening import job_of

    out = str(out_tsv)
    check_files(out, image_tsv, region_tsv)
    refuse_overwriting(out, *inputs)
    given = rows_of(region_tsv) if region_tsv else None
    files = [*inputs[1:], regions.towers, regions.sam_model if regions.proposals == "sam" else None]
    found = FolderRows(Path(str(image_path)), decode_image) if folder else None
    if found:
        files += [str(path) for path in found.files.values()]
    asked = [asdict(regions), {**asdict(writing), "writer_prompt": form}, asdict(search)]
    job = job_of(files, "paragraph", *asked, asdict(replace(model, device="")))

    def start() -> tuple[Any, Any, int]:
        rows = found or AskRows(Path(str(image_tsv)), None, decode_image)
        teller = Teller(model, regions, writing, form, search.decoding(), batch_size)

        def one(row: AskRow) -> Done:
            def failed(error: str, detail: str) -> Done:
                return Done((row.key, json_cell([{"caption": "", "error": error}])), error, detail)

            if row.error:
                return failed(row.error, row.detail)
            try:
                told = teller.told(row.picture, given[row.key] if given is not None else None)
            except KeyError:
                return failed("no_regions", f"key '{row.key}' is not in {region_tsv}")
            except ImageError as error:
                return failed(error.reason, f"key '{row.key}': {error}")
            record = told.record()
            return Done((row.key, json_cell([{"caption": record.pop("paragraph"), **record}])))

        return rows, lambda some: {row.row: one(row) for row in some}, 1

    return batch_run(out, job, start, share, columns=2)


def rows_of(region_tsv: str) -> dict[str, list[FourNumbers]]:
    """Return the boxes of a region TSV by key: `key \\t [{"box" or "rect": [left, top, right, bottom]}]`.

    Raises:
        UserError: a row that is none.
    """
    from git_model.datasets.records import TSVFile

    file, found = TSVFile(Path(region_tsv)), dict[str, list[FourNumbers]]()
    for row in range(len(file)):
        try:
            key, cell = file[row][:2]
            entries = json.loads(cell)
            found[key] = [tuple(float(v) for v in e["box" if "box" in e else "rect"]) for e in entries]  # type: ignore[misc]
            if any(len(box) != 4 for box in found[key]):
                raise ValueError("a box has four numbers")
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise UserError(f"row {row} of {region_tsv} holds no boxes: {error!r:.200}") from error
    return found
