"""What tasks of prompts are given: files that are there, texts by name."""

from __future__ import annotations

from pathlib import Path

from git_model.errors import UserError

ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


def check_npy(out: str) -> None:
    """Raise UserError where `out` is no name for vectors."""
    if Path(out).suffix != ".npy":
        raise UserError(f"out is '{out}'; files of vectors end in .npy")


def check_there(*files: str | None, bank: str | None = None) -> None:
    """Raise UserError where a file, or a bank of prompts, is not there: before torch is imported."""
    for path in filter(None, files):
        if not Path(path).is_file():
            raise UserError(f"no file '{path}'")
    if bank is not None and not (Path(bank) / "BANK.json").is_file():
        raise UserError(f"no bank of prompts at '{bank}': make_prompt_bank writes one")


def unique(names: list[str]) -> None:
    """Raise UserError where a name is there twice: a.png and a.jpg are one name."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"'{name}' is there twice: vectors are joined by a picture's name without its ending")
        seen.add(name)


def read_texts(path: str, failed: dict[str, str] | None = None) -> dict[str, str]:
    """Return texts by name: prompts of a CSV or parquet, captions of a TSV or COCO's JSON; raises UserError.

    Args:
        path: of the file.
        failed: gets the captions that say why there is none; None = such a one is an error.
    """
    from git_model.datasets.annotations import read_results
    from git_model.datasets.prompt_files import picture_name, read_prompts, read_rows

    if path.endswith(".csv"):
        return read_prompts(Path(path))
    if path.endswith(".parquet"):
        return {picture_name(name): text for name, text in read_rows(Path(path)).pairs()}
    lost: dict[str, str] = {}
    found = read_results(path, lost)
    if failed is None and lost:
        raise UserError(f"'{path}' has no caption of '{next(iter(lost))}': {next(iter(lost.values()))}")
    (failed if failed is not None else {}).update(lost)
    unique([picture_name(str(key)) for key in found])
    return {picture_name(str(key)): text for key, text in found.items()}
