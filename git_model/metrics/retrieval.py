"""Retrieval: does a text find its picture's captions, and a caption the text of its picture?

Scores are products of unit vectors, S = P C^T for N texts P, one a picture, and M captions C, never held whole: a
hundred thousand texts and half a million captions take less than 4 GB. Equal scores stand in the order of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

RECALL_AT = (1, 5, 10)
BLOCK = 2**24  # scores at a time
EQUAL = 1e-6  # scores that differ by less are equal: sums in another order differ by as much


@dataclass(frozen=True)
class Ranks:
    """How many stand before the right one, 0 = found at once.

    Args:
        image_to_text: (N,) of each text, before the best of its picture's captions.
        text_to_image: (M,) of each caption, before its picture's text.
    """

    image_to_text: np.ndarray
    text_to_image: np.ndarray

    def figures(self) -> dict[str, float]:
        """Return `i2t_R@k` and `t2i_R@k` in percent, the median ranks (from 1), and how many there are of each."""
        found: dict[str, float] = {}
        for name, ranks in (("i2t", self.image_to_text), ("t2i", self.text_to_image)):
            found |= {f"{name}_R@{k}": 100 * float((ranks < k).mean()) for k in RECALL_AT}
            found[f"{name}_median_rank"] = float(np.median(ranks)) + 1
        return {**found, "images": len(self.image_to_text), "captions": len(self.text_to_image)}


def ranks(texts: Any, captions: Any, image_of: Sequence[int] | np.ndarray, device: str = "cpu") -> Ranks:
    """Rank every picture's captions for its text, and the texts for every caption.

    Args:
        texts: (N,F) float32 vectors; they are made unit vectors.
        captions: (M,F) likewise.
        image_of: (M,) the picture, from 0 to N-1, that each caption belongs to; each has at least one.
        device: where the products are made.

    Raises:
        ValueError: a picture without a caption, or a number that is no picture's.
    """
    import torch

    own = torch.as_tensor(np.asarray(image_of), dtype=torch.long)  # (M,)
    count = len(texts)
    if len(own) != len(captions) or not bool((torch.bincount(own, minlength=count) > 0).all()) or len(own) == 0:
        raise ValueError("each caption has a picture, and each picture a caption")
    if int(own.max()) >= count:
        raise ValueError(f"a caption of picture {int(own.max())}, of {count}")
    order = torch.argsort(own, stable=True)  # captions picture by picture, each one's in their order
    starts = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(own, minlength=count).cumsum(0)])  # (N+1,)
    p, c = _unit(texts, device), _unit(captions, device)  # (N,F), (M,F)
    own = own.to(device)
    known = torch.cat([(p[own[i : i + 2**16]] * c[i : i + 2**16]).sum(1) for i in range(0, len(c), 2**16)])  # (M,)
    number = torch.arange(len(c), device=device)  # (M,)
    to_text, to_image = [], torch.zeros(len(c), dtype=torch.long, device=device)  # (M,)
    step = max(1, BLOCK // len(c))
    for start in range(0, count, step):
        scores = p[start : start + step] @ c.T  # (b,M)
        row = torch.arange(start, start + len(scores), device=device)  # (b,)
        best, first = _best_own(known, order, starts, row.tolist())  # (b,) each
        to_text.append(_before(scores, best, number, first))
        to_image += _before(scores.T, known, row, own)
    return Ranks(torch.cat(to_text).cpu().numpy(), to_image.cpu().numpy())


def nearest(texts: Any, captions: Any, most: int = 5, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Return the `most` best captions of each text, best first: their numbers and scores, (N,most) each.

    Equal scores stand in the order of the list.
    """
    p, c = _unit(texts, device), _unit(captions, device)  # (N,F), (M,F)
    most, step = min(most, len(c)), max(1, BLOCK // len(c))
    numbers, values = [], []
    for start in range(0, len(p), step):
        scores = p[start : start + step] @ c.T  # (b,M)
        rounded = (scores / EQUAL).round()  # what is equal is made so
        index = rounded.sort(dim=1, descending=True, stable=True).indices[:, :most]  # (b,most)
        numbers.append(index.cpu())
        values.append(scores.gather(1, index).cpu())
    return np.concatenate(numbers), np.concatenate(values)


def _before(scores: Tensor, right: Tensor, number: Tensor, mine: Tensor) -> Tensor:
    """Return how many of each line's scores stand before the right one, (n,).

    Args:
        scores: (n,m).
        right: (n,) the score of the right one.
        number: (m,) places of the columns in their list, without gaps.
        mine: (n,) place of the right one; among equal scores, those with lower places stand before it.
    """
    import torch

    above = torch.count_nonzero(scores > (right + EQUAL)[:, None], 1)  # (n,)
    near = torch.count_nonzero(scores >= (right - EQUAL)[:, None], 1)  # (n,)
    itself = (mine >= number[0]) & (mine <= number[-1])  # (n,)
    tied = torch.nonzero(near > above + itself)[:, 0]  # (t,)
    for some in tied.split(max(1, BLOCK // scores.shape[1])):
        equal = (scores[some] - right[some, None]).abs() <= EQUAL  # (t,m)
        above[some] += torch.count_nonzero(equal & (number < mine[some, None]), 1)
    return above


def _unit(vectors: Any, device: str) -> Tensor:
    import torch

    found = torch.as_tensor(np.asarray(vectors, dtype=np.float32)).to(device)
    return torch.nn.functional.normalize(found, dim=1)


def _best_own(known: Tensor, order: Tensor, starts: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the best score among a picture's own captions, and the number of the first that has it."""
    import torch

    best, first = [], []
    for row in rows:
        own = order[starts[row] : starts[row + 1]].to(known.device)
        scores = known[own]
        top = scores.max()
        best.append(top)
        first.append(own[int(torch.nonzero(scores >= top - EQUAL)[0, 0])])
    return torch.stack(best), torch.stack(first)
