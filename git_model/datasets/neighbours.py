"""PromptBank: prompts as pairs of vectors; the nearest to a picture by their keys say what its own vector may be.

    <folder>/BANK.json                   widths, rows of every shard, what made keys and values; written last
    <folder>/keys-00000.npy              (n,D) float32 unit vectors: the prompts in a space of pictures and texts
    <folder>/values-00000.npy            (n,F) float32: what is foretold, such as the prompts' sentence vectors
    <folder>/prompts-00000.jsonl         optional: the n prompts, a JSON string a line
    <folder>/prompts-00000.starts.npy    beside them, (n+1,) int64: where the lines begin, and the end

Rows are counted through all shards. The regression is that of Image-to-Prompts (jacksonchen1998, `3deb2cf`).
"""

from __future__ import annotations

import io
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.files import write_all
from git_model.errors import UserError
from git_model.lock import folder_lock

Rows = Sequence[int] | np.ndarray
Shard = tuple[np.ndarray, np.ndarray, Sequence[str] | None]  # keys, values, prompts

HEAD, FORMAT = "BANK.json", 1
OURS = re.compile(r"\.?(keys|values|prompts)-\d{5,}\.(npy|jsonl|starts\.npy)(\.[0-9a-f]{12}\.part)?")
BLOCK_QUERIES = 256  # scored at a time
BLOCK_SCORES = 2**22  # of these queries by as many rows: 16 MiB
BLOCK_NUMBERS = 2**20  # of keys, taken in float64 at a time
MAX_MAPPED = 256  # shards of keys that stay mapped: each keeps a descriptor
COEFFICIENT, POWER, FLOOR, NEGATIVE = 0.001, 6, 1e-4, 1e-4  # as published


class PromptBank:
    """A bank that `write_bank` has written, searched where it lies: memory does not grow with it.

    Raises:
        UserError: no whole bank in the folder, or a file of it is missing, damaged or of another shape.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        told = _read_head(self.folder / HEAD)
        self.key_width, self.value_width, self.sizes = told["key_width"], told["value_width"], told["shards"]
        self.keys_of, self.values_of, self.has_prompts = told["keys_of"], told["values_of"], told["prompts"]
        self.starts = np.cumsum([0, *self.sizes])  # of each shard, and the end
        self._open: dict[int, np.ndarray] = {}
        for number, size in enumerate(self.sizes):
            for what in ("keys", "values", "prompts") if self.has_prompts else ("keys", "values"):
                self._array(what, number)
            if self.has_prompts and not (path := self._path("prompts", number, "jsonl")).is_file():
                raise UserError(f"cannot read '{path}': no such file; wanted: {size} prompts")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Callable[..., PromptBank], tuple[Path]]:
        return PromptBank, (self.folder,)  # mapped anew

    def nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest rows of each query: cosines (q,k) float64, best first, and their numbers (q,k).

        Exact: products in float32 leave out only what their rounding cannot bring among the k; the rest is judged in
        float64. So neither shards nor blocks nor other queries change anything; of equal cosines the lower row is
        first. With numpy: on a million rows torch took 1.2 to 2.5 times as long, faiss-cpu mostly 2 to 5, at best 0.7.

        Args:
            queries: (q,D) of any length but zero.
            k: at least 1; a bank with fewer rows gives all of them.

        Raises:
            UserError: another width, a query or a key that is not finite, k below 1.
        """
        queries, k = np.asarray(queries, np.float64), min(k, len(self))
        if k < 1 or queries.ndim != 2 or queries.shape[1] != self.key_width:
            wanted = f"wanted: 1 or more, of {self.key_width} numbers, as '{self.keys_of}' makes them"
            raise UserError(f"'{self.folder}': {k} rows for queries {queries.shape}; {wanted}")
        sizes = np.linalg.norm(queries, axis=1, keepdims=True)  # (q,1)
        if not (good := np.isfinite(sizes) & (sizes > 0)).all():
            raise UserError(f"query {np.flatnonzero(~good)[0]} is not finite, or zero")
        cosines, rows = np.full((len(queries), k), -np.inf), np.full((len(queries), k), -1)
        for start in range(0, len(queries), BLOCK_QUERIES):
            some = slice(start, start + BLOCK_QUERIES)
            self._search(queries[some] / sizes[some], cosines[some], rows[some])
        return cosines, rows

    def regress(self, queries: np.ndarray, k: int = 100) -> np.ndarray:
        """Return the sum of the values of the k nearest rows, by `weights_at`: (q,F) float32 unit vectors.

        Raises:
            UserError: as `nearest`; values that are not finite or sum to nothing.
        """
        cosines, rows = self.nearest(queries, k)
        found = np.empty((len(rows), self.value_width), np.float32)
        for query, weights in enumerate(weights_at(1 - cosines)):
            total = weights @ self.values(rows[query]).astype(np.float64)  # (F,)
            size = float(np.linalg.norm(total))
            if not 0 < size < np.inf:
                raise UserError(f"'{self.folder}': values nearest to query {query} are not finite, or sum to nothing")
            found[query] = total / size
        return found

    def values(self, rows: Rows) -> np.ndarray:
        """Return the values (n,F) of rows by their numbers."""
        found = np.empty((len(rows), self.value_width), np.float32)
        for number, places, inside in self._by_shard(rows):
            found[places] = self._array("values", number)[inside]
        return found

    def prompts(self, rows: Rows) -> list[str]:
        """Return the prompts of rows by their numbers.

        Raises:
            UserError: the bank was written without, has no such row, or its lines are damaged.
        """
        if not self.has_prompts:
            raise UserError(f"'{self.folder}' was written without prompts")
        found = [""] * len(rows)
        for number, places, inside in self._by_shard(rows):
            starts, path = self._array("prompts", number), self._path("prompts", number, "jsonl")
            with path.open("rb") as file:
                for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                    try:
                        file.seek(starts[row])
                        found[place] = json.loads(file.read(max(0, starts[row + 1] - starts[row])))
                    except (OSError, ValueError) as error:
                        raise UserError(f"'{path}' is damaged at line {row + 1}: {error}") from error
        return found

    def _search(self, queries: np.ndarray, cosines: np.ndarray, rows: np.ndarray) -> None:
        """Fill `cosines` and `rows` (q,k) with the nearest of `queries` (q,D) float64 unit vectors."""
        slack = (self.key_width + 8) * 2.0**-24  # more than rounding in float32 moves a cosine
        rounded = queries.astype(np.float32)
        for first, keys in self._blocks(max(1, BLOCK_SCORES // len(queries))):
            least = (cosines[:, -1:] - slack).astype(np.float32)  # (q,1)
            query, row = _hopeful(rounded @ keys.T, least, cosines.shape[1], slack)  # (p,)
            exact = _dots(queries, keys, query, row)
            if not (good := np.isfinite(exact)).all():
                raise UserError(f"'{self.folder}': the key of row {row[~good][0] + first} is not finite")
            better = exact > cosines[query, -1]  # an equal one here is of a higher row
            query, row, exact = query[better], row[better] + first, exact[better]
            changed, begin = np.unique(query, return_index=True)
            for i, start, end in zip(changed, begin, np.searchsorted(query, changed, "right"), strict=True):
                both = np.concatenate([cosines[i], exact[start:end]])
                order = np.argsort(-both, kind="stable")[: cosines.shape[1]]
                cosines[i], rows[i] = both[order], np.concatenate([rows[i], row[start:end]])[order]

    def _blocks(self, rows: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the keys (n,D) of at most `rows` rows at a time, with the number of the first."""
        for number, size in enumerate(self.sizes):
            keys = self._array("keys", number)
            for start in range(0, size, rows):
                yield int(self.starts[number]) + start, keys[start : start + rows]

    def _by_shard(self, rows: Rows) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield each shard that has some of `rows`: its number, their places in `rows` and in the shard."""
        rows = np.asarray(rows, np.int64)
        if (wrong := rows[(rows < 0) | (rows >= len(self))]).size:
            raise UserError(f"row {wrong[0]} of '{self.folder}', which has rows 0 to {len(self) - 1}")
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(shards).tolist():
            places = np.flatnonzero(shards == number)
            yield number, places, rows[places] - self.starts[number]

    def _array(self, what: str, number: int) -> np.ndarray:
        """Return keys, values or the starts of prompts of a shard, mapped."""
        if what == "keys" and number in self._open:
            return self._open[number]
        size, path, kind = self.sizes[number], self._path(what, number), np.dtype(np.float32)
        shape: tuple[int, ...] = (size, self.key_width if what == "keys" else self.value_width)
        if what == "prompts":
            path, shape, kind = self._path(what, number, "starts.npy"), (size + 1,), np.dtype(np.int64)
        try:
            found = np.asarray(np.lib.format.open_memmap(path, mode="r"))
            if (found.shape, found.dtype) != (shape, kind) or not found.flags.c_contiguous:
                raise ValueError(f"it holds {found.dtype} of shape {found.shape}")
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read '{path}': {error}; wanted: {kind} of shape {shape}, row by row") from error
        if what == "keys" and len(self._open) < MAX_MAPPED:
            self._open[number] = found
        return found

    def _path(self, what: str, number: int, ending: str = "npy") -> Path:
        return self.folder / f"{what}-{number:05d}.{ending}"


def weights_at(distances: np.ndarray) -> np.ndarray:
    """Return the published weight of a neighbour at each distance, 1 - cosine."""
    return COEFFICIENT / (np.where(distances < 0, NEGATIVE, distances) ** POWER + FLOOR)


def _hopeful(scores: np.ndarray, least: np.ndarray, k: int, slack: float) -> tuple[np.ndarray, np.ndarray]:
    """Return queries and rows (p,) of the scores (q,n) that are `least` (q,1) or more, or no numbers.

    Where many are, as in the first block, they must also come near the k-th of the block.
    """
    passing = ~(scores < least)
    if (crowded := np.flatnonzero(np.count_nonzero(passing, axis=1) > 4 * k)).size:
        some = scores[crowded]  # (c,n)
        passing[crowded] &= ~(some < np.partition(some, -k, axis=1)[:, -k, None] - np.float32(2 * slack))
    return np.divmod(np.flatnonzero(passing), scores.shape[1])


def _dots(queries: np.ndarray, keys: np.ndarray, query: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the float64 products (p,) of pairs, each summed alike whatever is beside it."""
    found, step = np.empty(len(query)), max(1, BLOCK_NUMBERS // queries.shape[1])
    for start in range(0, len(query), step):
        some = slice(start, start + step)
        found[some] = (keys[row[some]] * queries[query[some]]).sum(axis=1)
    return found


def _read_head(path: Path) -> dict[str, Any]:
    """Return what BANK.json says, checked."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        numbers = [operator.index(n) for n in (told["key_width"], told["value_width"], *told["shards"])]
        good = len(numbers) > 2 and min(numbers) > 0 and (told["count"], told["format"]) == (sum(numbers[2:]), FORMAT)
        if not good or [type(told[x]) for x in ("prompts", "keys_of", "values_of")] != [bool, str, str]:
            raise ValueError(f"wanted: format {FORMAT}, two widths, names, and shards that sum to the count")
    except FileNotFoundError as error:
        raise UserError(f"no whole bank of prompts: '{path}', which is written last, is missing") from error
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"cannot read '{path}': {type(error).__name__}: {error}") from error
    return told


def write_bank(folder: str | Path, shards: Iterable[Shard], keys_of: str, values_of: str) -> None:
    """Write a bank, whole or not at all; what a killed writer has left is removed first.

    Args:
        folder: of the bank. One that holds a whole bank is refused, even the same: nothing is added or replaced.
        shards: keys (n,D), scaled to unit vectors; values (n,F), kept as they are; n prompts, or None in every shard.
        keys_of: what made the keys.
        values_of: what made the values.

    Raises:
        UserError: the folder holds a bank; no rows, other shapes, numbers that are not finite, keys that are zero.
    """
    folder, sizes = Path(folder), list[int]()
    kind: tuple[int, int, bool] | None = None
    with folder_lock(folder, "writing of a bank"):
        if (folder / HEAD).exists():
            raise UserError(f"'{folder}' holds a bank of prompts already: remove it, or write elsewhere")
        _clear(folder)
        try:
            for keys, values, prompts in shards:
                kind = kind or (keys.shape[-1], values.shape[-1], prompts is not None)
                if len(keys):
                    _write_shard(folder, len(sizes), kind, keys, values, prompts)
                    sizes.append(len(keys))
            if kind is None or not sizes:
                raise UserError(f"no rows for a bank of prompts in '{folder}'")
        except BaseException:
            _clear(folder)
            raise
        told = dict(zip(("key_width", "value_width", "prompts"), kind, strict=True))
        told |= {"format": FORMAT, "count": sum(sizes), "shards": sizes, "keys_of": keys_of, "values_of": values_of}
        write_all([(folder / HEAD, [json.dumps(told, indent=1).encode() + b"\n"])])


def _write_shard(
    folder: Path, number: int, kind: tuple[int, int, bool], keys: np.ndarray, values: np.ndarray, prompts: Any
) -> None:
    """Write the files of a shard: (n,D) and (n,F) and n prompts, if `kind` says so."""
    what, count = f"shard {number} for '{folder}'", len(keys)
    shapes = (keys.shape, values.shape, None if prompts is None else len(prompts))
    if shapes != ((count, kind[0]), (count, kind[1]), count if kind[2] else None) or 0 in kind[:2]:
        wanted = f"(n,{kind[0]}), (n,{kind[1]}), {'n' if kind[2] else None}"
        raise UserError(f"{what}: keys, values and prompts of shapes {shapes}; wanted: {wanted}")
    keys, values = np.asarray(keys, np.float32), np.asarray(values, np.float32)
    lengths = np.linalg.norm(keys, axis=1, keepdims=True)  # (n,1)
    good = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0) & np.isfinite(values).all(axis=1)
    if not good.all():
        raise UserError(f"{what}: key or value of its row {np.flatnonzero(~good)[0]} is not finite, or the key is zero")
    files = {f"keys-{number:05d}.npy": _npy(keys / lengths), f"values-{number:05d}.npy": _npy(values)}
    if prompts is not None:
        lines: list[bytes | memoryview] = [json.dumps(prompt).encode() + b"\n" for prompt in prompts]
        files[f"prompts-{number:05d}.starts.npy"] = _npy(np.cumsum([0, *map(len, lines)], dtype=np.int64))
        files[f"prompts-{number:05d}.jsonl"] = lines
    write_all([(folder / name, chunks) for name, chunks in files.items()])


def _npy(array: np.ndarray) -> list[bytes | memoryview]:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array))
    return [file.getbuffer()]


def _clear(folder: Path) -> None:
    """Remove the shards, and parts of them, of a folder without BANK.json."""
    for path in [path for path in folder.iterdir() if OURS.fullmatch(path.name)]:
        path.unlink()
