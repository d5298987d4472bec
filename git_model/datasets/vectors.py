"""Vectors with the names of what they are of: prompts, pictures; files of them, and submissions.

    <name>.npy       (N,F) float32
    <name>.ids.txt   N names, one a line: what row i is of

Everything is joined by name, never by place: two folders are not listed in the same order everywhere.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from git_model.datasets.files import write_all
from git_model.errors import UserError

HEADER = ("imgId_eId", "val")


@dataclass(frozen=True)
class Vectors:
    """Vectors by name.

    Args:
        ids: N names, each once.
        values: (N,F) float32.
    """

    ids: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.ids) != len(self.values):
            raise UserError(f"{len(self.ids)} names for vectors of shape {self.values.shape}")
        if len(set(self.ids)) < len(self.ids):
            seen: set[str] = set()
            twice = next(name for name in self.ids if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise UserError(f"'{twice}' has more than one vector")
        if not np.isfinite(self.values).all():
            row = int(np.nonzero(~np.isfinite(self.values).all(1))[0][0])
            raise UserError(f"the vector of '{self.ids[row]}' is not finite")

    def of(self, ids: Sequence[str], what: str = "vectors") -> np.ndarray:
        """Return the vectors of some names, (n,F), in the order of the names.

        Args:
            ids: which.
            what: these are, for the message.

        Raises:
            UserError: a name that has none.
        """
        rows = self.rows(ids)
        if missing := [name for name, row in zip(ids, rows.tolist(), strict=True) if row < 0]:
            some = ", ".join(missing[:3])
            raise UserError(f"{what}: {len(missing)} of {len(ids)} names have no vector, such as {some}")
        return self.values[rows]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Return the row of each name, (n,) int64; -1 of one that has none."""
        place = {name: row for row, name in enumerate(self.ids)}
        return np.array([place.get(name, -1) for name in ids], np.int64)

    def sorted(self) -> Vectors:
        """Return the same in the order of the names."""
        order = sorted(range(len(self.ids)), key=lambda row: self.ids[row])
        return Vectors(tuple(self.ids[row] for row in order), self.values[order])


def names_path(path: Path) -> Path:
    """Return where the names of `<name>.npy` are."""
    return path.with_suffix(".ids.txt")


def write_vectors(path: Path, vectors: Vectors) -> None:
    """Write `<name>.npy` and its names, both or neither.

    Raises:
        UserError: another ending, or a name with a line's end in it.
    """
    if path.suffix != ".npy":
        raise UserError(f"'{path}': files of vectors end in .npy")
    if wrong := [name for name in vectors.ids if name.splitlines() != [name]]:
        raise UserError(f"{wrong[0]!r} cannot be a line of {names_path(path).name}")
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(vectors.values, dtype=np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    names = "".join(f"{name}\n" for name in vectors.ids)
    write_all([(names_path(path), [names.encode()]), (path, [file.getvalue()])])


def read_vectors(path: Path) -> Vectors:
    """Read `<name>.npy` with its names, or a submission (.csv).

    Raises:
        UserError: no such file, something else in it, or names that do not fit.
    """
    if path.suffix == ".csv":
        return read_submission(path)
    values = read_array(path)
    try:
        names = names_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the names of '{path}': {error}") from error
    if len(values) != len(names):
        raise UserError(f"'{path}' holds {len(values)} vectors, {names_path(path).name} {len(names)} names")
    return Vectors(tuple(names), values)


def read_array(path: Path) -> np.ndarray:
    """Return the vectors (N,F) float32 of a `.npy` file, without their names.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the vectors of '{path}': {error}") from error
    if values.ndim != 2 or values.dtype.kind != "f" or not values.size:
        raise UserError(
            f"'{path}' holds {values.dtype} of shape {values.shape}; vectors are floats (N,F), at least one"
        )
    return values.astype(np.float32)


def write_submission(path: Path, vectors: Vectors) -> None:
    """Write the competition's format: a line a number, `<name>_<0..F-1>`, in the order of the names."""
    given = vectors.sorted()
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(HEADER)
    for name, vector in zip(given.ids, given.values, strict=True):
        rows.writerows((f"{name}_{place}", f"{value:.9g}") for place, value in enumerate(vector.tolist()))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_all([(path, [file.getvalue().encode()])])


def read_submission(path: Path) -> Vectors:
    """Return the vectors of a submission, whatever the order of its lines.

    Raises:
        UserError: no such file, another header, or numbers that are missing, there twice or none.
    """
    values: dict[str, dict[int, float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, strict=True)
            header = tuple(next(rows, ()))
            if header != HEADER:
                raise UserError(f"'{path}' begins with {', '.join(header)}; a submission with {', '.join(HEADER)}")
            for row in rows:
                try:
                    label, number = row
                    name, _, place = label.rpartition("_")
                    vector = values.setdefault(name, {})
                    index, value = int(place), float(number)
                except ValueError as error:
                    raise UserError(f"'{path}', line {rows.line_num}: {row} is no name_number, value") from error
                if index in vector:
                    raise UserError(f"'{path}', line {rows.line_num}: '{label}' is there twice")
                vector[index] = value
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the submission '{path}': {error}") from error
    if not values:
        raise UserError(f"'{path}' holds no vector")
    width = max(len(vector) for vector in values.values())
    for name, vector in values.items():
        if set(vector) != set(range(width)):
            raise UserError(f"'{path}': '{name}' has {len(vector)} numbers, not those from 0 to {width - 1}")
    rows_of = [[vector[i] for i in range(width)] for vector in values.values()]
    return Vectors(tuple(values), np.asarray(rows_of, dtype=np.float32))


def weighted(sources: Mapping[str, Vectors], weights: Mapping[str, float]) -> Vectors:
    """Return the weighted sum of several sources' vectors, joined by name, in the order of the names.

    Args:
        sources: by their own names; all with vectors of the same things and width.
        weights: of each source; nothing is scaled afterwards: a cosine does not care.

    Raises:
        UserError: weights and sources that differ, or a thing that a source lacks (names both).
    """
    if sources.keys() != weights.keys() or not sources:
        raise UserError(f"weights of {', '.join(weights) or 'nothing'} for sources {', '.join(sources) or 'none'}")
    if not any(weights.values()):
        raise UserError(f"weights {dict(weights)} leave nothing of the sources")
    ids = sorted(set().union(*(set(source.ids) for source in sources.values())))
    parts = {name: source.of(ids, name).astype(np.float64) for name, source in sources.items()}
    if len({part.shape for part in parts.values()}) > 1:
        raise UserError(f"widths differ: {', '.join(f'{name} {part.shape[1]}' for name, part in parts.items())}")
    total = sum(weights[name] * part for name, part in parts.items())
    return Vectors(tuple(ids), np.asarray(total, dtype=np.float32))
