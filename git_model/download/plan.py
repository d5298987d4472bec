"""A list of captions and URLs -> what is to be fetched: rows by bytes, duplicates once, refusals before any request."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from git_model.datasets.files import write_all
from git_model.download.fetch import bare_url, is_denied, parse_url
from git_model.download.ledger import Ledger
from git_model.download.network import FetchError
from git_model.errors import UserError, one_of

# Conceptual Captions holds two addresses of a neo-Nazi site; the original asks its users to delete them by hand
DENIED = (
    "dstormer6em3i4km.onion.link/wp-content/uploads/2015/03/US-Forest-Ranger-Nazi-819x1024.jpg",
    "dstormer6em3i4km.onion.link/wp-content/uploads/2014/05/pretty-for-a-dark-skinned-girl.jpg",
)
_PLAIN = re.compile(r"https?://[A-Za-z0-9.-]+(?:/[!#-;=?-Z_a-z~%&]*)?")  # nearly all of them: nothing to find wrong


def rows_of(path: Path) -> Iterator[tuple[str, str] | None]:
    """Yield (caption, url) for each line of a TSV, None for a line that is no such pair.

    Lines end with LF (a CR before it goes), columns with one tab, and nothing is unquoted: a caption that opens with
    a quotation mark is a caption. So row i here is row i for the trainer.
    """
    with path.open("rb") as file:
        for line in file:
            cells = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t")
            if len(cells) != 2:
                yield None
                continue
            try:
                caption, url = (cell.decode("utf-8").strip() for cell in cells)
            except UnicodeDecodeError:
                yield None
                continue
            yield (caption, url) if caption and url else None


class Plan:
    """Which rows wait for which URL.

    Args:
        tsv: caption and url.
        denied: URLs or hosts never asked for.
        held_out: digests of URLs that belong to another split.
    """

    def __init__(self, tsv: Path, denied: Iterable[str] = (), held_out: frozenset[bytes] = frozenset()) -> None:
        self.tsv = tsv
        self.denied = frozenset(bare_url(entry) for entry in (*DENIED, *denied))
        refused: dict[int, str] = {}
        digests = bytearray()
        for row, pair in enumerate(rows_of(tsv)):
            digest = url_digest(pair[1]) if pair else bytes(16)
            if reason := _refusal(pair, digest, self.denied, held_out):
                refused[row] = reason
            digests += digest
        self.refused = refused
        self._digests = np.frombuffer(bytes(digests), "S16")
        # the first row of each URL fetches it for all the others
        _, first, which = np.unique(self._digests, return_index=True, return_inverse=True)
        self.first = first[which] if len(which) else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._digests)

    def digests(self) -> frozenset[bytes]:
        """Return the digest of every URL, for the plan of another split."""
        return frozenset(self._digests.tolist())

    def work(self, ledger: Ledger, size: int) -> Iterator[tuple[int, list[tuple[str, list[int], list[str]]]]]:
        """Yield (number of the range, [(url, rows, captions)]) for what has no verdict yet.

        Args:
            ledger: verdicts so far.
            size: rows of a range; a URL belongs to the range of its first row.
        """
        repeated = np.flatnonzero(self.first != np.arange(len(self)))
        others: dict[int, list[int]] = {}
        for row in repeated.tolist():
            others.setdefault(int(self.first[row]), []).append(row)
        shared = set(repeated.tolist())
        waiting = _captions(self.tsv, shared)
        entries: list[tuple[str, list[int], list[str]]] = []
        current = 0
        for row, pair in enumerate(rows_of(self.tsv)):
            if row // size != current:
                if entries:
                    yield current, entries
                entries, current = [], row // size
            if pair is None or row in shared:
                continue
            together = [r for r in (row, *others.get(row, [])) if not ledger.status[r]]
            if together:
                entries.append((pair[1], together, [pair[0] if r == row else waiting[r] for r in together]))
        if entries:
            yield current, entries


def _captions(tsv: Path, rows: set[int]) -> dict[int, str]:
    if not rows:
        return {}
    return {row: pair[0] for row, pair in enumerate(rows_of(tsv)) if row in rows and pair}


def url_digest(url: str) -> bytes:
    """Return 16 bytes that stand for a URL; never all zero, and never ending in a zero (numpy drops those)."""
    return hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=15).digest() + b"u"


def _refusal(
    pair: tuple[str, str] | None, digest: bytes, denied: frozenset[str], held_out: frozenset[bytes]
) -> str | None:
    """Return why a row is not asked for, None where it is."""
    if pair is None:
        return "bad_row"
    bare = bare_url(pair[1])
    if bare in denied or re.split(r"[/:?#]", bare, maxsplit=1)[0] in denied:
        return "denied"
    if digest in held_out:
        return "in_validation"
    if _PLAIN.fullmatch(pair[1]) and "xn--" not in pair[1]:
        return None
    try:
        return "denied" if is_denied(parse_url(pair[1]), denied) else None
    except FetchError as error:
        return error.reason


def read_denied(path: str | None) -> list[str]:
    """Return the URLs and hosts of a file, one a line; `#` begins a remark.

    Raises:
        UserError: no such file.
    """
    if path is None:
        return []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --deny '{path}': {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def plain_list(path: Path, out: Path, caption_col: str, url_col: str) -> None:
    """Write any TSV or CSV as a TSV of caption and url; row i stays row i.

    Args:
        path: `.tsv`, `.csv`, `.tsv.gz` or `.csv.gz`; quoting means something in a CSV only.
        out: the TSV.
        caption_col: a number from 0, or a name in the first line (which is then no row).
        url_col: the same.

    Raises:
        UserError: another kind of file, or no such column.
    """
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind not in ("tsv", "csv"):
        raise one_of("kind of list", path.name, ["*.tsv", "*.csv", "*.tsv.gz", "*.csv.gz"])
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as raw:
        text = io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="" if kind == "csv" else "\n")
        if kind == "csv":
            csv.field_size_limit(2**24)
            cells: Iterator[list[str]] = csv.reader(text)
        else:
            cells = (line.rstrip("\r\n").split("\t") for line in text)
        try:
            write_all([(out, _pairs(cells, path, caption_col, url_col))])
        except csv.Error as error:
            raise UserError(f"{path} is no CSV: {error}") from error


def _pairs(cells: Iterator[list[str]], path: Path, caption_col: str, url_col: str) -> Iterator[bytes]:
    names = not (caption_col.isdecimal() and url_col.isdecimal())
    head = next(cells, []) if names else []
    places = []
    for column in (caption_col, url_col):
        if names and column not in head:
            raise one_of(f"column of {path}", column, head)
        places.append(head.index(column) if names else int(column))
    for row in cells:
        pair = [" ".join(row[place].split()) if place < len(row) else "" for place in places]
        yield "\t".join(pair).encode("utf-8", "surrogateescape") + b"\n"
