"""The nearest prompts of a bank: are they exact, how many queries a second, and does memory grow with the bank?

    python -m benchmarks.neighbours [--rows 1000000] [--dim 384] [--queries 64]

Two banks of random unit vectors, of rows/4 and rows, are made in a temporary folder, shard by shard. Of each, a line
of JSON tells: whether the 100 nearest of some queries are those of brute force in float64; queries/s, one at a time
(nearest) and all at once (regress); what the process's anonymous memory (RssAnon, every millisecond, freed memory
given back before) grew by at most while it searched. Pages of the mapped files are not in it: the system drops them
when it needs room. At last a plain loop over the larger bank, whole in memory: bank @ query, argpartition. Ends with
1 where the nearest differ, or where the larger bank takes 16 MiB more than the smaller one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from git_model.datasets.neighbours import PromptBank, Shard, write_bank

K, SHARD, VALUES = 100, 50_000, 32
CHECKED = 8  # queries held against brute force, and given to the plain loop
ROUNDS = 3  # of a measurement; the fastest counts
ALLOWED = 16 * 2**20  # bytes between the two banks' growth


def main() -> int:
    """Make, search, check, print; return 1 where the nearest or the memory are not as they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--queries", type=int, default=64)
    given = parser.parse_args()
    queries = units(np.random.default_rng(1), given.queries, given.dim)
    with tempfile.TemporaryDirectory() as name:
        found = []
        for rows in (max(1, given.rows // 4), given.rows):
            folder = Path(name) / str(rows)
            write_bank(folder, shards(rows, given.dim), "random", "random")
            found.append(searched(folder, queries))
            print(json.dumps(found[-1]), flush=True)
        plain = plain_loop(folder, queries[:CHECKED])
    flat = found[1]["growth_bytes"] <= found[0]["growth_bytes"] + ALLOWED
    right = all(bank["exact"] for bank in found)
    ratios = {way: round(found[1][way] / plain, 2) for way in ("one_by_one_per_s", "at_once_per_s")}
    print(json.dumps({"plain_loop_per_s": round(plain, 2), "times_the_plain_loop": ratios, "memory_flat": flat}))
    return int(not (right and flat))


def units(dice: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Return random unit vectors (rows,width) float32."""
    given = dice.standard_normal((rows, width), dtype=np.float32)
    return given / np.linalg.norm(given, axis=1, keepdims=True)


def shards(rows: int, width: int) -> Iterator[Shard]:
    """Yield a bank's shards, one in memory at a time."""
    dice = np.random.default_rng(0)
    for start in range(0, rows, SHARD):
        size = min(SHARD, rows - start)
        yield units(dice, size, width), units(dice, size, VALUES), None


def searched(folder: Path, queries: np.ndarray) -> dict[str, Any]:
    """Return the figures of a bank."""
    bank = PromptBank(folder)
    bank.regress(queries[:1], K)  # libraries take memory when they are used first
    some = queries[:CHECKED]
    one_by_one, first = growth_of(lambda: [bank.nearest(query[None], K) for query in some])
    at_once, second = growth_of(lambda: bank.regress(queries, K))
    return {
        "rows": len(bank),
        "keys_bytes": len(bank) * bank.key_width * 4,
        "exact": exact(folder, some, *bank.nearest(some, K)),
        "one_by_one_per_s": round(len(some) / one_by_one, 2),
        "at_once_per_s": round(len(queries) / at_once, 2),
        "at_once": len(queries),
        "growth_bytes": max(first, second),
    }


def growth_of(work: Callable[[], Any]) -> tuple[float, int]:
    """Return the fastest round's seconds, and what anonymous memory grew by at most."""
    gc.collect()
    with suppress(AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory, used again, hides growth
    done, most, before = threading.Event(), [0], anonymous()

    def watch() -> None:
        while not done.wait(0.001):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = []
    try:
        for _ in range(ROUNDS):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    finally:
        done.set()
        watcher.join()
    return min(seconds), max(0, most[0] - before)


def anonymous() -> int:
    """Return the bytes of memory that are this process's own, not a file's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


def exact(folder: Path, queries: np.ndarray, cosines: np.ndarray, rows: np.ndarray) -> bool:
    """Return whether `rows` are the nearest by brute force in float64; ties may fall either way."""
    paths = sorted(folder.glob("keys-*.npy"))
    scores = np.concatenate([queries.astype(np.float64) @ np.load(path).T.astype(np.float64) for path in paths], axis=1)
    scores /= np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    for own, found, score in zip(cosines, rows, scores, strict=True):
        k = min(K, len(score))
        kth = np.partition(score, -k)[-k]
        above = set(np.flatnonzero(score > kth + 1e-12).tolist())
        good = len(set(found.tolist())) == k and above <= set(found.tolist()) and (score[found] >= kth - 1e-12).all()
        if not (good and np.allclose(own, score[found], rtol=0, atol=1e-12) and (np.diff(own) <= 0).all()):
            return False
    return True


def plain_loop(folder: Path, queries: np.ndarray) -> float:
    """Return the queries/s of the bank in memory, one query at a time."""
    bank = np.concatenate([np.load(path) for path in sorted(folder.glob("keys-*.npy"))])
    best = np.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for query in queries:
            scores = bank @ query
            rows = np.argpartition(scores, -min(K, len(scores)))[-K:]
            rows[np.argsort(-scores[rows])]
        best = min(best, time.perf_counter() - start)
    return len(queries) / best


if __name__ == "__main__":
    sys.exit(main())
