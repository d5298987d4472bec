"""Features of several sources beside the vectors of prompts, as a data set: what EnsembleRegressor learns from."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from git_model.batch import Sample, Target
from git_model.datasets.files import SampleError
from git_model.datasets.groups import prompt_groups, split_groups
from git_model.datasets.prompt_files import read_prompts
from git_model.datasets.vectors import Vectors, names_path, read_array, read_vectors
from git_model.errors import UserError, one_of

log = logging.getLogger(__name__)
SPLITS = ("train", "val")
MISSING = ("refuse", "mask")


class VectorSource:
    """Vectors by name: those of each source, and the one to learn; joined by name.

    Args:
        dir: where relative names start.
        sources: a file of vectors (.npy with its .ids.txt) by the source's name.
        truth: file of the vectors to learn; or else
        prompts: CSV of prompts, whose texts are encoded (`regressor.text_encoder`).
        split: 'train' or 'val': a part of `truth`, so that no prompt is on both sides: neither the same vector, nor one
            with a cosine above `near`. None = everything.
        fraction: of the records that are in 'train'.
        seed: of the split.
        near: see `split`.
        count: this many records, the first by name; None = all.
        missing: 'refuse' a source that lacks a name, or 'mask' it.

    Raises:
        UserError: files that cannot be read or do not fit together.
    """

    def __init__(
        self,
        dir: Path,
        sources: Mapping[str, str],
        truth: str | None = None,
        prompts: str | None = None,
        split: str | None = None,
        fraction: float = 0.8,
        seed: int = 0,
        near: float = 0.9,
        count: int | None = None,
        missing: str = "refuse",
    ) -> None:
        if not isinstance(sources, Mapping) or not sources or not all(isinstance(p, str) for p in sources.values()):
            raise UserError("source 'vectors' needs sources: a mapping of names to .npy files")
        for name, value, kinds in (
            ("truth", truth, str), ("prompts", prompts, str), ("count", count, int), ("seed", seed, int),
            ("fraction", fraction, int | float), ("near", near, int | float),
        ):  # fmt: skip
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                wanted = {str: "a file's name", int: "a whole number"}.get(kinds, "a number")  # type: ignore[call-overload]
                raise UserError(f"source 'vectors': {name} must be {wanted}, got {value!r}")
        if not 0 <= near <= 1:
            raise UserError(f"source 'vectors': near {near} is not from 0 to 1")
        if (truth is None) == (prompts is None):
            raise UserError("source 'vectors' needs either truth (vectors) or prompts (CSV)")
        if split is not None and split not in SPLITS:
            raise one_of("vectors split", split, SPLITS)
        if missing not in MISSING:
            raise one_of("vectors missing", missing, MISSING)
        if split is not None and truth is None:
            raise UserError("source 'vectors' splits by the vectors of truth; the task split_prompts splits prompts")
        self.said_of = read_prompts(dir / prompts) if prompts else {}
        self.truth = _read(dir / truth) if truth else None
        names = self.truth.ids if self.truth else tuple(self.said_of)
        self.sources = {str(name): _read(dir / str(path)) for name, path in sources.items()}
        files = [path for path in (truth, *sources.values()) if path]
        nameless = [path for path in files if path.endswith(".npy") and not names_path(dir / path).is_file()]
        if nameless and (len(nameless) < len(files) or prompts):
            raise UserError(f"{nameless[0]} has no .ids.txt and others have names: what belongs to what?")
        if nameless and any(len(source.ids) != len(names) for source in self.sources.values()):
            sizes = ", ".join(f"{name} {len(source.ids)}" for name, source in self.sources.items())
            raise UserError(f"{nameless[0]} has no .ids.txt, and the files have not the same number of rows: {sizes}")
        if nameless:
            log.warning("%s: no .ids.txt beside it; rows are taken to be in the same order everywhere", nameless[0])
        chosen = _chosen(names, count, named=not nameless)
        if split is not None and truth is not None:
            held_out = _held_out(dir / truth, (dir / truth).stat().st_mtime_ns, tuple(chosen), fraction, seed, near)
            chosen = [name for name, out in zip(chosen, held_out, strict=True) if out == (split == "val")]
        self.ids = chosen
        self.rows = {name: _rows(source, chosen, name, missing) for name, source in self.sources.items()}
        if bare := {name: int((rows < 0).sum()) for name, rows in self.rows.items() if (rows < 0).any()}:
            told = ", ".join(f"{name} {number}" for name, number in bare.items())
            log.warning("of %d records, sources lack and are masked: %s", len(chosen), told)
        self.right = _rows(self.truth, chosen, "truth", "refuse") if self.truth else None
        self.blanks = {name: np.full(width, np.nan, np.float32) for name, width in self.widths.items()}

    @property
    def widths(self) -> dict[str, int]:
        """Return the sources' widths by name, in order."""
        return {name: source.values.shape[1] for name, source in self.sources.items()}

    @property
    def dim(self) -> int | None:
        """Return F, of the vectors to learn; None where they are texts."""
        return self.truth.values.shape[1] if self.truth else None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        row = {name: int(rows[index]) for name, rows in self.rows.items()}
        if max(row.values()) < 0:
            raise SampleError(self.ids[index], "no_source")
        features = tuple(
            source.values[row[name]] if row[name] >= 0 else self.blanks[name] for name, source in self.sources.items()
        )
        wanted = self.truth.values[self.right[index]] if self.truth and self.right is not None else None
        said = self.said(index)
        return Sample(said.key, (), said.targets, features, wanted)

    def said(self, index: int) -> Sample:
        """Return a record without its features."""
        key = self.ids[index]
        return Sample(key, (), (Target(self.said_of[key]),) if self.said_of else ())

    def texts(self) -> Iterator[str]:
        """Yield every prompt."""
        yield from (self.said_of[key] for key in self.ids if self.said_of)


def _read(path: Path) -> Vectors:
    """Read vectors, once for all sources of a run; rows of a file without names are named by their numbers."""
    return _read_once(path, path.stat().st_mtime_ns if path.exists() else 0)


@functools.lru_cache(maxsize=16)
def _read_once(path: Path, _time: int) -> Vectors:
    if path.suffix == ".npy" and not names_path(path).is_file():
        values = read_array(path)
        return Vectors(tuple(f"{row:09d}" for row in range(len(values))), values)
    return read_vectors(path)


def _chosen(names: Sequence[str], count: int | None, named: bool) -> list[str]:
    """Return the names that are used: without a count all of them, in their order."""
    if count is None:
        return list(names)
    if not 1 <= count <= len(names):
        raise UserError(f"source 'vectors': count is {count}, there are {len(names)} records")
    return sorted(names)[:count] if named else list(names)[:count]


@functools.lru_cache(maxsize=4)  # the two halves ask the same
def _held_out(path: Path, _time: int, names: tuple[str, ...], fraction: float, seed: int, near: float) -> list[bool]:
    if not 0 < fraction < 1:
        raise UserError(f"source 'vectors': fraction {fraction} is not between 0 and 1")
    labels = prompt_groups(names, _read(path).of(names, "truth"), near)
    return split_groups(labels, 1 - fraction, seed).tolist()


def _rows(source: Vectors, names: Sequence[str], what: str, missing: str) -> np.ndarray:
    """Return each name's row, -1 where there is none and that is allowed."""
    rows = source.rows(names)
    if missing == "refuse" and (rows < 0).any():
        told = f"{int((rows < 0).sum())} of {len(names)} names have no vector, such as {names[int(np.argmin(rows))]}"
        raise UserError(f"{what}: {told}" + "; 'missing': 'mask' does without them" * (what != "truth"))
    return rows
