"""Picture -> the text of the prompt that made it: by a captioner, an interrogator, or the nearest prompt of a bank."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from git_model.errors import UserError
from git_model.tasks.options import BatchOptions, SearchOptions, check_model_path
from git_model.tasks.prompt_inputs import check_there
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from PIL.Image import Image

    from git_model.datasets.asking import AskRow

Mode = Literal["caption", "classic", "classic_lite", "fast", "best", "negative", "nearest"]


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """How a prompt is recovered."""

    mode: Mode = "classic_lite"
    model_path: str | None = None
    suffix: str = ""
    towers: str | None = None
    lists: str | None = None
    flavors: Annotated[int, Range(1, 1000)] | None = None
    intermediate: Annotated[int, Range(1, 1000000)] = 2048
    bank: str | None = None
    device: str = "auto"

    @property
    def captions(self) -> bool:
        """Whether a captioner has a part in it."""
        return self.mode not in ("negative", "nearest")

    def check(self) -> None:
        """Say at once, without torch, what is wrong with these keys; raises UserError."""
        if self.captions and self.model_path is None:
            raise UserError(f"mode '{self.mode}' begins with a caption: give model_path, a checkpoint or an HF model")
        if not self.captions and self.model_path is not None:
            raise UserError(f"mode '{self.mode}' uses no caption: leave out model_path")
        if (self.mode == "nearest") != (self.bank is not None):
            raise UserError("mode 'nearest' and bank (a folder of make_prompt_bank) belong together")
        for name, given in (("lists", self.lists), ("flavors", self.flavors), ("towers", self.towers)):
            if given is not None and (self.mode == "caption" or (self.mode == "nearest" and name != "towers")):
                raise UserError(f"{name} has no part in mode '{self.mode}'")
        if self.lists is not None and not Path(self.lists).is_dir():
            raise UserError(f"no folder of lists at '{self.lists}'")
        check_there(bank=self.bank)
        if self.suffix and self.mode != "caption":
            raise UserError(f"suffix is for mode 'caption', not '{self.mode}'")
        if self.model_path is not None:
            check_model_path(self.model_path)


def image_to_prompt(
    *,
    image_path: str | None = None,
    image_tsv: str | None = None,
    out_tsv: str | None = None,
    recovery: RecoveryOptions,
    search: SearchOptions,
    share: BatchOptions,
    batch_size: Annotated[int, Range(1, 4096)] = 16,
) -> dict[str, Any] | None:
    """Recover the prompts that made pictures; a picture's is printed, those of a folder or a TSV go into out_tsv.

    mode: 'caption' = what the model says (one trained on prompts: recipes of type prompts or diffusiondb), with suffix;
        'classic', 'classic_lite' (no artists, no sites), 'fast', 'best': its caption with the nearest phrases of lists;
        'negative' = phrases least like the picture; 'nearest' = the nearest prompt of a bank.
    model_path: checkpoint, or a Hugging Face image-to-text model.
    lists: folder of artists.txt, flavors.txt, mediums.txt, movements.txt, trendings.txt, negative.txt and lists of your
        own; default: those of the package clip-interrogator (pip install --no-deps clip-interrogator).
    towers: model of pictures and texts that says what is near; default: ViT-L/14, or what made the bank.
    flavors: how many phrases; intermediate: candidates of 'best' and 'negative'.
    """
    if (image_path is None) == (image_tsv is None):
        raise UserError("image_to_prompt needs either image_path (a picture or a folder) or image_tsv")
    folder = image_path is not None and Path(image_path).is_dir()
    if (folder or image_tsv) and out_tsv is None:
        raise UserError("a folder's or a TSV's prompts go into a file: name out_tsv")
    if out_tsv is not None and not (folder or image_tsv) and Path(str(image_path)).exists():
        raise UserError("out_tsv is for a folder or a TSV of pictures; a single picture's prompt is printed")
    recovery.check()
    if image_path is not None and not Path(image_path).exists():
        raise UserError(f"no picture or folder at '{image_path}'")
    if search.answer_list:
        raise UserError("answer_list is for answers; a prompt is none")
    if not (folder or image_tsv):
        from git_model.tasks.picture import read_picture

        picture = read_picture(str(image_path))
        return {"image_path": image_path, "mode": recovery.mode, "prompt": Recoverer(recovery, search)([picture])[0]}

    from git_model.datasets.asking import AskRows, FolderRows
    from git_model.datasets.files import refuse_overwriting
    from git_model.datasets.images import decode_image
    from git_model.datasets.records import json_cell
    from git_model.tasks.journal import Done
    from git_model.tasks.opening import job_of
    from git_model.tasks.tsv import batch_run, check_files

    out = str(out_tsv)
    check_files(out, image_tsv, None)
    inputs = [image_path, image_tsv, recovery.model_path, recovery.lists, recovery.bank]
    refuse_overwriting(out, *inputs)
    found = FolderRows(Path(str(image_path)), decode_image) if folder else None
    files = [image_tsv, recovery.model_path, recovery.towers]
    files += [str(path) for path in found.files.values()] if found else []
    files += [str(path) for path in sorted(Path(recovery.lists).glob("*.txt"))] if recovery.lists else []
    files += [str(Path(recovery.bank) / "BANK.json")] if recovery.bank else []
    job = job_of(files, "recover", {**asdict(recovery), "device": ""}, asdict(search))

    def start() -> tuple[Any, Any, int]:
        rows = found or AskRows(Path(str(image_tsv)), None, decode_image)
        recover = Recoverer(recovery, search)

        def answered(some: list[AskRow]) -> dict[int, Done]:
            good = [row for row in some if not row.error]
            texts = dict(zip((row.row for row in good), recover([row.picture for row in good]), strict=True))
            told = {}
            for row in some:
                record = {"caption": texts.get(row.row, "")} | ({"error": row.error} if row.error else {})
                told[row.row] = Done((row.key, json_cell([record])), row.error, row.detail)
            return told

        return rows, answered, batch_size

    return batch_run(out, job, start, share, columns=2)


class Recoverer:
    """The models of a mode, and the prompts they give pictures."""

    def __init__(self, options: RecoveryOptions, search: SearchOptions) -> None:
        from git_model.tasks.opening import pick_device

        self.options, self.decoding = options, search.decoding()
        place = pick_device(options.device)
        self.captioner: Any = None
        self.bank: Any = None
        self.interrogator: Any = None
        if options.mode == "nearest":
            from git_model.tasks.bank import open_bank

            self.bank, self.towers = open_bank(str(options.bank), options.towers, place)
        elif options.mode != "caption":
            from git_model.datasets.kept import cache_folder
            from git_model.models.interrogator import Interrogator, read_lists
            from git_model.models.phrases import TwoTowers
            from git_model.tasks.bank import kept_bank

            lists = read_lists(options.lists)
            towers = TwoTowers(options.towers or "ViT-L/14", place)
            keep = cache_folder() / "phrases"
            self.interrogator = Interrogator(
                towers, lists, lambda phrases: kept_bank(phrases, towers, keep), options.intermediate
            )
            self.interrogator.check(options.mode, options.flavors)
        if options.captions:
            from git_model.tasks.captioner import open_captioner

            self.captioner = open_captioner(str(options.model_path), {}, options.device)

    def __call__(self, pictures: list[Image]) -> list[str]:
        """Return a prompt for each picture (upright, RGB)."""
        if not pictures:
            return []
        if self.bank is not None:
            return self.bank.prompts(self.bank.nearest(self.towers.pictures(pictures), 1)[1][:, 0])
        captions = [""] * len(pictures)
        if self.captioner is not None:
            given = self.captioner.encode([self.captioner.prepare(picture) for picture in pictures])
            captions = self.captioner.answer(given, captions, self.decoding)
        if self.interrogator is None:
            return [caption + self.options.suffix for caption in captions]
        return self.interrogator.prompts(pictures, captions, self.options.mode, self.options.flavors)
