"""What became of every row: appended row by row while a download runs, merged into one TSV at its end.

A line is `row \t status \t tries \t bytes \t sha256`: status is `ok` or a reason, bytes and sha256 are those of the
body that was fetched. Parts belong to ranges of rows, one writer each.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from git_model.datasets.files import write_all

OK = "ok"
HEADER = "row\tstatus\ttries\tbytes\tsha256\n"


class Ledger:
    """The verdicts on all rows of a list, in arrays: 3.3 million rows take 150 MB.

    Args:
        rows: how many there are.
    """

    def __init__(self, rows: int) -> None:
        self.words = ["", OK]  # a status is an index into these; 0 = no verdict yet
        self.numbers = {word: i for i, word in enumerate(self.words)}
        self.status = np.zeros(rows, np.uint16)
        self.tries = np.zeros(rows, np.uint8)
        self.size = np.zeros(rows, np.uint32)
        self.sha256 = np.zeros((rows, 32), np.uint8)

    def __len__(self) -> int:
        return len(self.status)

    def set(self, row: int, status: str, tries: int = 0, size: int = 0, sha256: str = "") -> None:
        """Note a verdict; the last one counts."""
        if status not in self.numbers:
            self.numbers[status] = len(self.words)
            self.words.append(status)
        self.status[row] = self.numbers[status]
        self.tries[row], self.size[row] = min(tries, 255), size
        self.sha256[row] = np.frombuffer(bytes.fromhex(sha256), np.uint8) if sha256 else 0

    def get(self, row: int) -> str:
        """Return a row's status; '' where there is none yet."""
        return self.words[self.status[row]]

    def clear(self, rows: np.ndarray) -> None:
        """Forget the verdicts on some rows (a mask or numbers)."""
        self.status[rows] = 0

    def counts(self) -> dict[str, int]:
        """Return how many rows have each status, the most frequent reason first; rows without one under ''."""
        numbers = np.bincount(self.status, minlength=len(self.words)).tolist()
        found = [(word, n) for word, n in zip(self.words, numbers, strict=True) if n]
        return dict(sorted(found, key=lambda pair: (-pair[1], pair[0])))

    def read(self, path: Path) -> None:
        """Take over the verdicts of a file; a torn last line is left out, what is no verdict as well."""
        if not path.is_file():
            return
        with path.open("rb") as file:
            for line in file:
                cells = line.decode("ascii", "replace").rstrip("\n").split("\t")
                if not line.endswith(b"\n") or len(cells) != 5 or not cells[0].isdecimal():
                    continue
                row, status, tries, size, sha256 = cells
                with suppress(ValueError, OverflowError):
                    if int(row) < len(self):
                        self.set(int(row), status, int(tries), int(size), sha256)

    def write(self, path: Path) -> None:
        """Write all verdicts, in the order of rows."""
        write_all([(path, self._lines())])

    def _lines(self) -> Iterator[bytes]:
        yield HEADER.encode()
        for row in np.flatnonzero(self.status).tolist():
            sha256 = self.sha256[row].tobytes().hex() if self.sha256[row].any() else ""
            yield line(row, self.get(row), int(self.tries[row]), int(self.size[row]), sha256)


def line(row: int, status: str, tries: int = 0, size: int = 0, sha256: str = "") -> bytes:
    """Return one verdict as it stands in a file."""
    return f"{row}\t{status}\t{tries}\t{size}\t{sha256}\n".encode()


class LedgerPart:
    """The verdicts on one range of rows while they are found; waits for another process that holds it.

    Args:
        path: is made where it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        end = os.fstat(self.descriptor).st_size
        if end and os.pread(self.descriptor, 1, end - 1) != b"\n":
            os.write(self.descriptor, b"\n")  # ends a torn line, which is then no verdict

    def rows(self) -> set[int]:
        """Return the rows that have a verdict."""
        cells = (entry.split(b"\t") for entry in self.path.read_bytes().splitlines())
        return {int(c[0]) for c in cells if len(c) == 5 and c[0].isdigit()}

    def add(self, lines: Iterable[bytes]) -> None:
        """Append verdicts: one write, so that a kill tears at most the last line."""
        whole = b"".join(lines)
        done = os.write(self.descriptor, whole)
        while done < len(whole):  # a full disk raises on the second try
            done += os.write(self.descriptor, whole[done:])

    def close(self) -> None:
        """Bring it to the disk and let go of it."""
        os.fsync(self.descriptor)
        os.close(self.descriptor)
