"""How near predicted vectors are to the right ones: cosines, and whether the right one is the nearest of all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLUMNS = 8192  # of the bank, compared with at a time


@dataclass(frozen=True)
class Similarity:
    """Figures of predicted vectors.

    Args:
        cosines: (N,) of each with its right one.
        recall: share of those whose right vector is the nearest of the bank: all right ones and others.
        mean_vector: mean cosine that one and the same vector would get, the mean of the right ones (what guessing gives
            to somebody who has seen all the answers) or of the vectors that were given to guess by.
        nearest: (N,) number of the nearest in the bank, the right ones first; -1 of a vector without length.
    """

    cosines: np.ndarray
    recall: float
    mean_vector: float
    nearest: np.ndarray

    def figures(self) -> dict[str, float]:
        """Return mean, median, recall and the guess, from -1 to 1 or 0 to 1, and how many there are."""
        return {
            "mean_cosine": float(self.cosines.mean()),
            "median_cosine": float(np.median(self.cosines)),
            "R@1": self.recall,
            "mean_vector_cosine": self.mean_vector,
            "count": len(self.cosines),
        }


def mean_cosine(predicted: np.ndarray, right: np.ndarray) -> float:
    """Return the mean cosine of (N,F) with (N,F)."""
    return float(cosines(predicted, right).mean())


def cosines(predicted: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair, (N,); 0 where a vector has no length."""
    return (unit(predicted) * unit(right)).sum(axis=1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return float64 vectors of length 1; those of length 0 stay."""
    vectors = np.asarray(vectors, dtype=np.float64)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def similarity(
    predicted: np.ndarray,
    right: np.ndarray,
    others: np.ndarray | None = None,
    guess: np.ndarray | None = None,
    block: int = 1024,
) -> Similarity:
    """Compare predicted vectors with the right ones.

    Args:
        predicted: (N,F).
        right: (N,F).
        others: (M,F) more that the bank holds.
        guess: (n,F) whose mean is the guess; None = the right ones.
        block: rows of the matrix of all cosines that are held at a time.

    Raises:
        ValueError: shapes that differ, or no vectors.
    """
    if predicted.shape != right.shape or len(right) == 0:
        raise ValueError(f"{predicted.shape} vectors beside {right.shape}")
    wanted = unit(right)
    bank = wanted if others is None else np.concatenate([wanted, unit(others)])  # (N+M,F)
    nearest = np.empty(len(right), np.int64)
    for start in range(0, len(right), block):
        given = unit(predicted[start : start + block])  # (b,F)
        rows = np.arange(start, start + len(given))
        # the same prompt twice is a tie, which the right one wins; nothing is like a vector of no length
        best = np.round((given * wanted[rows]).sum(axis=1), 9)  # (b,)
        row = np.where(np.linalg.norm(given, axis=1) > 0, rows, -1)
        for first in range(0, len(bank), COLUMNS):
            scores = np.round(given @ bank[first : first + COLUMNS].T, 9)  # (b,c)
            top = scores.argmax(axis=1)
            score = scores[np.arange(len(given)), top]
            row, best = np.where(score > best, first + top, row), np.maximum(score, best)
        nearest[rows] = row
    found = int((nearest == np.arange(len(right))).sum())
    mean = (wanted if guess is None else unit(guess)).mean(axis=0, keepdims=True)
    guessed = float((unit(mean) * wanted).sum(axis=1).mean())
    return Similarity(cosines(predicted, right), found / len(right), guessed, nearest)
