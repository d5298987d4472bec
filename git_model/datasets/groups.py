"""Groups of prompts that say the same or nearly so, and splits that never part a group.

A prompt that is in both halves of a split is learnt by heart in one and asked for in the other. DiffusionDB's users
press the button many times on one prompt, and change a word of it: both are grouped here before anything is drawn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np

from git_model.errors import UserError

BLOCK = 1024  # rows and columns of the matrix of cosines that are held at a time
DOUBT = 1e-4  # float32's error of a cosine is below this; what is nearer to the bound is computed again in float64
DIGITS = 9  # of a cosine that count: rounding must not decide


def plain_text(text: str) -> str:
    """Return a text without what does not make it another prompt: case, and how much white space is where."""
    return " ".join(text.split()).casefold()


def prompt_groups(texts: Sequence[str], vectors: np.ndarray | None, near: float = 0.9) -> np.ndarray:
    """Return the group of each text, (N,) int64: two in one group have the same label, which stands for its content.

    The same text (case and white space apart) is one group; so are texts whose vectors' cosine is above `near`, and
    those joined by others between them. The label comes from the group's first text in the alphabet, not from its
    place: rows in another order have the same labels. Memory is flat, time grows with the square of the distinct
    texts: 100,000 with 384 numbers each take about a minute of one core.

    Args:
        texts: N, with repetitions.
        vectors: (N,F) of the texts, of any length; of equal texts the first's counts. None = the same text only.
        near: a cosine above this joins.

    Raises:
        UserError: vectors of another number, or not finite.
    """
    numbers: dict[str, int] = {}
    own = np.fromiter((numbers.setdefault(text, len(numbers)) for text in texts), np.int64, len(texts))  # (N,)
    plain = [plain_text(text) for text in numbers]  # n distinct texts
    first: dict[str, int] = {}
    root = np.array([first.setdefault(text, number) for number, text in enumerate(plain)], np.int64)  # (n,)
    if vectors is not None:
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise UserError(f"vectors of shape {vectors.shape} for {len(texts)} texts")
        for left, right in near_pairs(vectors[np.unique(own, return_index=True)[1]], near):
            root = _joined(root, left, right)
    least: dict[int, str] = {}
    for number, text in zip(root.tolist(), plain, strict=True):
        least[number] = min(text, least.get(number, text))
    label = {number: _digest(text) for number, text in least.items()}
    return np.array([label[number] for number in root.tolist()], np.int64)[own]


def split_groups(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which rows are held out, (N,) bool: whole groups, as many rows as the share allows and never more.

    Groups are drawn by seed and label; one that would be too many stays in training, and smaller ones after it may
    still come. A group's turn does not depend on the others, nor on the order of the rows.

    Args:
        labels: (N,) integers, of `prompt_groups`.
        share: of the rows, from 0 (none) to below 1.
        seed: of the draw.

    Raises:
        UserError: a share outside that; a single group; or the smallest group is more than the share.
    """
    if not 0 <= share < 1:
        raise UserError(f"the share that is held out must be from 0 to below 1, got {share}")
    names, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)  # (G,), (N,), (G,)
    held = np.zeros(len(names), bool)
    if share > 0:
        room = math.floor(share * len(labels) + 1e-9)  # 0.29 * 100 is 28.999999999999996
        if len(names) < 2:
            raise UserError(f"nothing can be held out: the {len(labels)} rows are {len(names)} group of prompts")
        if sizes.min() > room:
            raise UserError(
                f"nothing can be held out: a share of {share:g} is {room} of {len(labels)} rows, "
                f"and the smallest group of prompts has {sizes.min()}; from {sizes.min() / len(labels):.4g} on it fits"
            )
        for number in sorted(range(len(names)), key=lambda number: (_digest(f"{seed}:{names[number]}"), number)):
            if sizes[number] <= room:
                held[number] = True
                room -= int(sizes[number])
    return held[group]


def near_across(vectors: np.ndarray, held_out: np.ndarray, near: float = 0.9) -> tuple[int, int] | None:
    """Return two rows of the two sides of a split whose cosine is above `near`; None = there are none, as it should be.

    Args:
        vectors: (N,F).
        held_out: (N,) bool.
        near: see `prompt_groups`.
    """
    kept, held = np.nonzero(~held_out)[0], np.nonzero(held_out)[0]
    for left, right in near_pairs(vectors[kept], near, vectors[held]):
        if len(left):
            return int(kept[left[0]]), int(held[right[0]])
    return None


def near_pairs(
    vectors: np.ndarray, near: float, others: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows (i,), (j,) of vectors whose cosine is above `near`, block by block.

    Args:
        vectors: (n,F).
        near: the bound; a vector of length 0 is near to none that is above 0.
        others: (m,F) that j counts in; None = the same ones, and each pair comes once, as i < j.

    Raises:
        UserError: not finite.
    """
    given = vectors if others is None else others
    left = _unit(vectors)  # (n,F)
    right = left if others is None else _unit(others)  # (m,F)
    for top in range(0, len(left), BLOCK):
        for start in range(top if others is None else 0, len(right), BLOCK):
            cosines = left[top : top + BLOCK] @ right[start : start + BLOCK].T  # (b,c)
            rows, columns = np.nonzero(cosines > near - DOUBT)  # (p,), (p,)
            if others is None and start == top:
                rows, columns = rows[rows < columns], columns[rows < columns]
            sure = cosines[rows, columns] > near + DOUBT  # (p,)
            rows, columns = rows + top, columns + start
            for part in np.array_split(np.nonzero(~sure)[0], math.ceil((~sure).sum() / BLOCK) or 1):
                sure[part] = _cosines(vectors[rows[part]], given[columns[part]]) > near
            yield rows[sure], columns[sure]


def _joined(root: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return each row's root, the smallest row of its group, with the groups of some pairs joined.

    Args:
        root: (n,) as it was; changed in place.
        left: (p,) rows.
        right: (p,) rows.
    """
    while True:
        low, high = np.sort([root[left], root[right]], axis=0)  # (p,), (p,)
        apart = low < high
        if not apart.any():
            return root
        left, right = left[apart], right[apart]
        np.minimum.at(root, high[apart], low[apart])  # they point downwards only: no circles
        while (root[root] != root).any():
            root = root[root]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return float32 vectors of length 1; those of length 0 stay."""
    if not np.isfinite(vectors).all():
        raise UserError(f"the vector of row {int(np.nonzero(~np.isfinite(vectors).all(axis=1))[0][0])} is not finite")
    length = np.sqrt(np.einsum("nf,nf->n", vectors, vectors, dtype=np.float64))  # (n,)
    return np.divide(vectors, np.where(length > 0, length, 1)[:, None], dtype=np.float32, casting="same_kind")  # (n,F)


def _cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows, (p,), the same in whatever block they are met."""
    left, right = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)  # (p,)
    return np.round((left * right).sum(axis=1) / np.where(lengths > 0, lengths, 1), DIGITS)


def _digest(text: str) -> int:
    """Return 64 bits of a text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), signed=True)
