"""Files of prompts: CSVs of names and texts, DiffusionDB's metadata, lists of names.

Names and prompts of the large ones stay in arrow's columns: DiffusionDB's two millions take what their letters take.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from git_model.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

ID_COLUMNS = ("imgId", "image", "image_name", "id", "key")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
ENDING = r"(?i)\.(png|jpe?g|webp)$"  # what `picture_name` takes off
SCORES = ("image_nsfw", "prompt_nsfw")
BLURRED = 2.0  # DiffusionDB's image_nsfw of a picture that Stable Diffusion's own filter has blurred
ROWS = 65536  # made into arrow's columns at a time


def picture_name(name: str) -> str:
    """Return a picture's name without its ending: a.png -> a."""
    stem, dot, ending = name.rpartition(".")
    return stem if dot and ending.lower() in ("png", "jpg", "jpeg", "webp") else name


def read_prompts(path: Path) -> dict[str, str]:
    """Return the texts of a CSV file by name, names without a picture's ending.

    The columns are `prompt` and one of ID_COLUMNS (Kaggle's imgId, DiffusionDB's image).

    Raises:
        UserError: no such file, other columns, or a name twice.
    """
    found: dict[str, str] = {}
    for name, text, line in csv_pairs(path, "prompt"):
        key = picture_name(name)
        if not key:
            raise UserError(f"'{path}', line {line}: a name or a prompt is missing")
        if key in found:
            raise UserError(f"'{path}', line {line}: '{key}' is there twice")
        found[key] = text
    if not found:
        raise UserError(f"'{path}' holds no prompt")
    return found


@dataclass(frozen=True, eq=False)
class PromptRows:
    """The rows of a file of prompts.

    Args:
        path: of the file, for messages.
        names: (N,) of the pictures, as they are written.
        prompts: (N,) as they are written.
        parts: (N,) DiffusionDB's `part_id`, -1 = none; None where the file has no such column.
    """

    path: Path
    names: pa.ChunkedArray
    prompts: pa.ChunkedArray
    parts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield names and prompts."""
        for start in range(0, len(self), ROWS):
            names, prompts = self.names.slice(start, ROWS), self.prompts.slice(start, ROWS)
            yield from zip(names.to_pylist(), prompts.to_pylist(), strict=True)


def read_rows(path: Path) -> PromptRows:
    """Read a CSV of prompts, or DiffusionDB's metadata (.parquet), all of it; raises UserError."""
    return read_metadata(path) if path.suffix == ".parquet" else read_csv(path)


def read_csv(path: Path) -> PromptRows:
    """Read names and prompts of a CSV; the columns are `prompt` and one of ID_COLUMNS.

    Raises:
        UserError: no such file, other columns, no row, or a name that is missing or there twice.
    """
    import pyarrow as pa

    pairs = csv_pairs(path, "prompt")
    names, prompts = [], []
    while block := list(islice(pairs, ROWS)):
        names.append(pa.array((name for name, *_ in block), pa.large_string()))
        prompts.append(pa.array((prompt for _, prompt, _ in block), pa.large_string()))
    if not names:
        raise UserError(f"'{path}' holds no prompt")
    rows = PromptRows(path, pa.chunked_array(names), pa.chunked_array(prompts))
    _check_names(rows)
    return rows


def read_metadata(path: Path, nsfw: float = BLURRED, ids: list[str] | None = None) -> PromptRows:
    """Read names, prompts and parts of DiffusionDB's metadata.

    Args:
        path: the parquet file; columns other than those needed are not read, and prompts only a block at a time.
        nsfw: see `DiffusionDb`; at 2 the scores need not be there.
        ids: names to keep, without endings; None = all.

    Raises:
        UserError: no such file, columns that are missing or of another type, nothing left, or a name that is missing or
            there twice.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(nsfw, bool) or not isinstance(nsfw, int | float) or not 0 <= nsfw <= BLURRED:
        raise UserError(f"nsfw must be a number from 0 (nothing) to {BLURRED:g} (everything), got '{nsfw}'")
    scores = SCORES if nsfw < BLURRED else ()
    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if missing := [name for name in ("image_name", "prompt", *scores) if name not in columns]:
                raise UserError(f"'{path}' has no column {', '.join(missing)}; it has {', '.join(columns)}")
            table = file.read([name for name in ("image_name", "part_id", *scores) if name in columns])
            names = _cast(table.column("image_name"), pa.large_string(), "", path)
            kept = _kept(table, names, nsfw, ids, path)  # (rows,)
            prompts, start = [], 0
            for batch in file.iter_batches(ROWS, columns=["prompt"]):
                some = pa.array(kept[start : start + len(batch)])
                prompts.append(_cast(batch.column(0).filter(some), pa.large_string(), "", path))
                start += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the prompts of '{path}': {_line(error)}") from error
    parts = None
    if "part_id" in columns:
        parts = np.asarray(_cast(table.column("part_id"), pa.int32(), -1, path))[kept]
    rows = PromptRows(path, names.filter(pa.array(kept)), pa.chunked_array(prompts, pa.large_string()), parts)
    _check_names(rows)
    return rows


def read_names(path: Path) -> list[str]:
    """Read names of pictures, without endings: a CSV with one of ID_COLUMNS, or a text file with one a line.

    Raises:
        UserError: no such file, other columns, or no name.
    """
    if path.suffix == ".csv":
        found = [name for name, *_ in csv_pairs(path)]
    else:
        try:
            found = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the names of '{path}': {error}") from error
    if not (names := [picture_name(name.strip()) for name in found if name.strip()]):
        raise UserError(f"'{path}' holds no name")
    return names


def csv_pairs(path: Path, wanted: str | None = None) -> Iterator[tuple[str, str, int]]:
    """Yield names, what is in the wanted column ("" where none is wanted), and the line; raises UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            columns = rows.fieldnames or []
            name = next((column for column in ID_COLUMNS if column in columns), None)
            if name is None or (wanted and wanted not in columns):
                told = f"has the columns {', '.join(columns) or 'none'}"
                needed = f"{wanted}, and " if wanted else ""
                raise UserError(f"'{path}' {told}; wanted: {needed}one of {', '.join(ID_COLUMNS)}")
            for row in rows:
                text = row[wanted] if wanted else ""
                if text is None or not row[name]:
                    raise UserError(f"'{path}', line {rows.line_num}: a name or a prompt is missing")
                yield row[name], text, rows.line_num
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the prompts of '{path}': {error}") from error


def _cast(column: Any, kind: Any, missing: str | float, path: Path) -> Any:
    """Return a column of arrow's as another type, checked, null as `missing`; raises UserError."""
    import pyarrow as pa

    try:
        found = column.cast(kind).fill_null(missing)
        found.validate(full=True)  # of letters, too
    except pa.ArrowException as error:
        raise UserError(f"'{path}' holds {column.type} where {kind} is wanted: {_line(error)}") from error
    return found


def _kept(table: pa.Table, names: Any, nsfw: float, ids: list[str] | None, path: Path) -> np.ndarray:
    """Return which rows of the metadata are kept, (rows,) bool; raises UserError where none is."""
    import pyarrow as pa

    safe = np.ones(len(table), bool)
    for score in SCORES if nsfw < BLURRED else ():
        told = _cast(table.column(score), pa.float32(), np.nan, path)
        safe &= np.asarray(told) <= np.float32(nsfw)
    asked = np.ones(len(table), bool)
    if ids is not None:
        wanted = pa.array(ids, pa.large_string())
        asked = np.asarray(_compute().is_in(_without_endings(names), value_set=wanted))
        if lost := len(set(ids)) - int(asked.sum()):
            log.warning("%s: %d of the %d names to keep are not in it", path, lost, len(set(ids)))
    kept = safe & asked
    left = f"{len(kept) - kept.sum():,} of {len(kept):,} records are left out"
    left += f" (nsfw above {nsfw:g} or not told: {(~safe).sum():,}; not among the ids: {(~asked).sum():,})"
    if not kept.any():
        raise UserError(f"'{path}' has nothing left: {left}")
    if not kept.all():
        log.info("%s: %s", path.name, left)
    return kept


def _without_endings(names: Any) -> Any:
    """Return what `picture_name` makes of arrow's texts."""
    return _compute().replace_substring_regex(names, ENDING, "")


def _check_names(rows: PromptRows) -> None:
    """Raise UserError where a name is missing or there twice: vectors and features are joined by them."""
    keys = _without_endings(rows.names)
    if (row := _compute().index(keys, "").as_py()) >= 0:
        raise UserError(f"'{rows.path}': the name of record {row} is missing")
    some = (keys.slice(start, ROWS).to_pylist() for start in range(0, len(keys), ROWS))
    hashes = np.fromiter((hash(key) for block in some for key in block), np.int64, len(keys))  # a set would take GBs
    if len(np.unique(hashes)) < len(keys):
        counts = _compute().value_counts(keys)
        twice = counts.field("values").filter(np.asarray(counts.field("counts")) > 1)
        if len(twice):
            raise UserError(f"'{rows.path}': '{twice[0]}' is there twice")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def release() -> None:
    """Give back what reading took: arrow keeps it otherwise, as much again as the columns."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _compute() -> Any:
    """Return arrow's functions, which are made when it is imported: no checker knows them."""
    import pyarrow.compute

    return pyarrow.compute
