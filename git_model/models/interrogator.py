"""Interrogator: a prompt for a picture, of its caption and the nearest phrases of lists, in CLIP Interrogator's modes.

The modes, the counts, the sites and the form of the prompts are those of clip-interrogator 0.6.0, which brings lists;
classic_lite is the prompt of an ensemble for the recovery of prompts. What is mended here: the reverse ranking finds
the true minimum, the reverse chain compares like with like, and nothing grows beyond what the text tower reads.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile
from pathlib import Path

import numpy as np
from PIL import Image

from git_model.errors import UserError, one_of
from git_model.models.phrases import PhraseBank, TwoTowers, read_phrases

MODES = ("classic", "classic_lite", "fast", "best", "negative")
MERGED = ("artists", "flavors", "mediums", "movements", "trendings")  # in the order in which equal ones win
PARTS = {  # the lists that a mode reads; all but negative read one's own lists, too
    "classic": MERGED,
    "classic_lite": ("flavors", "mediums", "movements"),
    "fast": MERGED,
    "best": MERGED,
    "negative": ("flavors", "negative"),
}
FLAVORS = {"classic": 3, "classic_lite": 3, "fast": 32, "best": 32, "negative": 32}  # phrases, unless told otherwise
LEAST = 8  # phrases that a chain takes even if they do not help
INTERMEDIATE = 2048  # candidates of a chain
ROWS = 64  # pictures ranked at once: a row has a number for each of a hundred thousand phrases
ROOM = 2**24  # about how many numbers are kept of texts seen before
log = logging.getLogger(__name__)
PACKAGE = "clip_interrogator"
SITES = (
    "Artstation", "behance", "cg society", "cgsociety", "deviantart", "dribble", "flickr", "instagram", "pexels",
    "pinterest", "pixabay", "pixiv", "polycount", "reddit", "shutterstock", "tumblr", "unsplash", "zbrush central",
)  # fmt: skip


@dataclass(frozen=True)
class Lists:
    """Phrases by what they tell, ready for a prompt; an empty list is left out of it."""

    artists: tuple[str, ...] = ()  # 'by X' and 'inspired by X'
    flavors: tuple[str, ...] = ()
    mediums: tuple[str, ...] = ()
    movements: tuple[str, ...] = ()
    trendings: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # any other lists, by name


def read_lists(folder: str | None) -> Lists:
    """Return the lists of a folder, or those that come with the package clip-interrogator.

    Args:
        folder: with any of artists.txt, flavors.txt, mediums.txt, movements.txt, trendings.txt and negative.txt, one
            phrase a line (artists: one name a line); any other .txt file is a list of one's own. None: the package's
            files, which are read without importing it, and the sites that its program names.

    Raises:
        UserError: no such folder or package, no .txt file, or one that cannot be read or holds nothing.
    """
    if folder is not None:
        return _lists_in(Path(folder))
    spec = importlib.util.find_spec(PACKAGE)
    places = [Path(place) / "data" for place in (spec.submodule_search_locations or ())] if spec else []
    data = next((place for place in places if place.is_dir()), None)
    if data is None:
        told = "pip install --no-deps clip-interrogator, or give a folder with artists.txt, flavors.txt, mediums.txt..."
        raise UserError(f"the lists of phrases are not here: {told}")
    lists = _lists_in(data)
    said = ("{}", "trending on {}", "featured on {}", "{} contest winner")
    return replace(lists, trendings=lists.trendings or tuple(how.format(site) for how in said for site in SITES))


def _lists_in(folder: Path) -> Lists:
    if not folder.is_dir():
        raise UserError(f"no folder of lists at '{folder}'")
    files = sorted(file for file in folder.glob("*.txt") if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UserError(f"no list in '{folder}': it needs files such as artists.txt, flavors.txt or mediums.txt")
    found = {file.stem: tuple(read_phrases(str(file))) for file in files}
    known = {name: found.pop(name, ()) for name in (*MERGED, "negative")}
    artists = known["artists"]
    known["artists"] = tuple(f"{how} {a.removeprefix('by ')}" for how in ("by", "inspired by") for a in artists)
    if lacking := [name for name, phrases in known.items() if not phrases and name != "trendings"]:
        log.info("%s: no %s; prompts go without", folder, ", ".join(f"{name}.txt" for name in lacking))
    return Lists(**known, own=found)


class Interrogator:
    """Writes prompts for pictures.

    Args:
        towers: what compares pictures and texts.
        lists: the phrases.
        bank: makes the vectors of a list, or finds kept ones; called once for each list that a mode ranks.
        intermediate: candidates of a chain ('best' and 'negative'), the nearest or the farthest ones.
    """

    def __init__(
        self,
        towers: TwoTowers,
        lists: Lists,
        bank: Callable[[Sequence[str]], PhraseBank] | None = None,
        intermediate: int = INTERMEDIATE,
    ) -> None:
        self.towers, self.lists, self.intermediate = towers, lists, intermediate
        self.bank = bank or (lambda phrases: PhraseBank(phrases, towers))
        self.limit: int = towers.model.config.text_config.max_position_embeddings  # tokens, with those at both ends
        self._own = {f"own/{name}": phrases for name, phrases in lists.own.items()}
        self._phrases = {name: getattr(lists, name) for name in (*MERGED, "negative")} | self._own
        self._banks: dict[str, PhraseBank] = {}

    def check(self, mode: str, flavors: int | None = None) -> None:
        """Say early what `prompts` would say.

        Raises:
            UserError: an unknown mode, fewer than one flavor, or none of the lists that the mode reads.
        """
        if mode not in MODES:
            raise one_of("mode", mode, MODES)
        if flavors is not None and flavors < 1:
            raise UserError(f"flavors must be 1 or more, not {flavors}")
        if not any(self._phrases[name] for name in self._names(mode)):
            raise UserError(f"mode '{mode}' needs one of {', '.join(f'{part}.txt' for part in sorted(PARTS[mode]))}")

    def prompts(
        self, pictures: Sequence[Image.Image], captions: Sequence[str], mode: str, flavors: int | None = None
    ) -> list[str]:
        """Return one prompt a picture; the same for the same picture and caption.

        - classic: caption, medium (unless the caption begins with it) and artist, site, movement, flavors, own lists.
        - classic_lite: the same without artist and site.
        - fast: caption, then the nearest phrases of all lists.
        - best: the one most like the picture of caption, classic, fast, and a chain: caption, then phrase by phrase
          what brings it nearest.
        - negative: a chain of what is least like the picture, of the flavors and the negative list; no caption.

        A prompt that is longer than the text tower reads loses its last parts, whole ones between commas.

        Args:
            pictures: RGB.
            captions: one a picture.
            mode: one of MODES.
            flavors: how many; in 'fast' and 'negative' of all phrases, in 'best' of every candidate. Default: 3 in the
                classic modes, 32 in the others.

        Raises:
            UserError: as `check`, or another number of captions than of pictures.
        """
        self.check(mode, flavors)
        if len(pictures) != len(captions):
            raise UserError(f"{len(pictures)} pictures, but {len(captions)} captions")
        if not pictures:
            return []
        most, told = flavors or FLAVORS[mode], [caption.strip() for caption in captions]
        vectors = self.towers.pictures(pictures)  # (q,F)
        if mode == "negative":
            return self._negative(vectors, most)
        if mode == "best":
            return self._best(vectors, told, most)
        return self._fast(vectors, told, most) if mode == "fast" else self._classic(vectors, told, most, mode)

    def _classic(self, vectors: np.ndarray, captions: Sequence[str], most: int, mode: str) -> list[str]:
        names = self._names(mode)
        near = {name: self._top((name,), vectors, most if name == "flavors" else 1) for name in names}
        prompts = []
        for row, caption in enumerate(captions):
            got = {name: near[name][row] if name in near else [] for name in (*MERGED, *self._own)}
            head = _joined([caption, *(medium for medium in got["mediums"] if not caption.startswith(medium))])
            head = " ".join(part for part in (head, *got["artists"]) if part)  # no comma before an artist
            own = [phrase for name in self._own for phrase in got[name]]
            prompts.append(self._cut(_joined([head, *got["trendings"], *got["movements"], *got["flavors"], *own])))
        return prompts

    def _fast(self, vectors: np.ndarray, captions: Sequence[str], most: int) -> list[str]:
        near = self._top(self._names("fast"), vectors, most)
        return [self._cut(_joined([caption, *some])) for caption, some in zip(captions, near, strict=True)]

    def _best(self, vectors: np.ndarray, captions: Sequence[str], most: int) -> list[str]:
        likeness = _Likeness(self.towers, vectors)
        near = self._top(self._names("best"), vectors, self.intermediate)
        classic, fast = self._classic(vectors, captions, most, "classic"), self._fast(vectors, captions, most)
        prompts = []
        for row, caption in enumerate(captions):
            chain = self._chain(lambda texts, row=row: likeness(texts, row), self._cut(caption), near[row], most)
            candidates = [chain, classic[row], fast[row]]  # the chain may be the caption, if nothing brings it nearer
            prompts.append(candidates[int(likeness(candidates, row).argmax())])
        return prompts

    def _negative(self, vectors: np.ndarray, most: int) -> list[str]:
        likeness = _Likeness(self.towers, vectors)
        far = self._top(("flavors",), -vectors, self.intermediate)
        return [
            self._chain(lambda texts, row=row: -likeness(texts, row), "", [*some, *self.lists.negative], most)
            for row, some in enumerate(far)
        ]

    def _chain(self, score: Callable[[list[str]], np.ndarray], start: str, phrases: Sequence[str], most: int) -> str:
        """Return the best text met while the phrase that scores highest is added, again and again.

        Args:
            score: of texts, (n,); higher is better.
            start: may be empty.
            phrases: each is added at most once; of equal ones the first.
            most: phrases to add. The first LEAST are added even if they do not help; then only what helps.
        """
        best = now = start
        high = level = float(score([start])[0]) if start else -np.inf
        left = list(dict.fromkeys(phrases))
        for step in range(most):
            longer = [_joined([now, phrase]) for phrase in left]
            fits = self._fits(longer)  # what does not fit now will not fit later
            left, longer = ([text for text, fit in zip(some, fits, strict=True) if fit] for some in (left, longer))
            if not left:
                break
            scores = score(longer)  # (n,)
            top = int(scores.argmax())
            if step >= LEAST and scores[top] <= level:
                break
            now, level = longer[top], float(scores[top])
            del left[top]
            if level > high:
                best, high = now, level
        return best

    def _top(self, names: Sequence[str], vectors: np.ndarray, most: int) -> list[list[str]]:
        """Return the `most` nearest phrases of some lists for each vector (q,F), best first; ties in the lists' order.

        The farthest are the nearest of -vectors: there is no second way to sort.
        """
        found: list[list[str]] = []
        for start in range(0, len(vectors), ROWS):
            some = vectors[start : start + ROWS]  # (r,F)
            rows: list[dict[str, float]] = [{} for _ in some]
            for bank in map(self._bank_of, filter(self._phrases.__getitem__, names)):
                for row, scores in zip(rows, np.round(some @ bank.vectors.T, 6), strict=True):  # of (r,n)
                    for i in _first(scores, most):
                        row.setdefault(bank.phrases[i], float(scores[i]))
            found.extend(sorted(row, key=lambda phrase, row=row: -row[phrase])[:most] for row in rows)
        return found

    def _bank_of(self, name: str) -> PhraseBank:
        if name not in self._banks:
            self._banks[name] = self.bank(self._phrases[name])
        return self._banks[name]

    def _names(self, mode: str) -> list[str]:
        return [*PARTS[mode], *(self._own if mode != "negative" else ())]

    def _fits(self, texts: Sequence[str]) -> list[bool]:
        """Return which texts the text tower reads to their end."""
        if not texts:
            return []
        told = self.towers.processor(text=list(texts), padding=False, truncation=True, max_length=self.limit + 1)
        return [len(ids) <= self.limit for ids in told["input_ids"]]

    def _cut(self, text: str) -> str:
        """Return as many of a text's parts as fit, the first one in any case."""
        grown = list(accumulate(text.split(", "), "{}, {}".format))
        fits = sum(1 for _ in takewhile(bool, self._fits(grown)))
        return grown[max(fits, 1) - 1]


class _Likeness:
    """Cosines of texts and a call's pictures (q,F); a text that was met before is not encoded again."""

    def __init__(self, towers: TwoTowers, vectors: np.ndarray) -> None:
        self.towers, self.vectors = towers, vectors
        self.known: dict[str, np.ndarray] = {}  # each (q,)
        self.most = ROOM // (len(vectors) + 128)  # texts; one takes about as much as 128 numbers

    def __call__(self, texts: Sequence[str], row: int) -> np.ndarray:
        """Return (n,) cosines of texts and one picture."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        if new:
            cosines = np.round(self.vectors @ self.towers.texts(new).T, 6)  # (q,n)
            self.known.update(zip(new, cosines.T, strict=True))
        scores = np.array([self.known[text][row] for text in texts])  # (n,)
        if len(self.known) > self.most:
            self.known.clear()
        return scores


def _first(scores: np.ndarray, most: int) -> np.ndarray:
    """Return where the `most` highest of (n,) are, best first, of equal ones the first: no need to sort them all."""
    least = np.partition(scores, -most)[-most] if most < len(scores) else -np.inf
    enough = np.flatnonzero(scores >= least)
    return enough[np.argsort(-scores[enough], kind="stable")][:most]


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)
