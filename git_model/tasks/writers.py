"""One paragraph out of what is known of a picture: by a template, by the model itself, or by any OpenAI-like endpoint.

Whoever writes, the same rules hold: one paragraph, at most seven sentences, no digits or brackets, and every object
with a word for its place. What breaks them is written once more; then the template, which cannot, writes.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from git_model.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from git_model.models.decoding import Decoding
    from git_model.tasks.captioner import GitCaptioner, PublishedCaptioner

log = logging.getLogger(__name__)

MOST_SENTENCES = 7
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
PLACE_WORDS = re.compile(
    r"\b(left|right|top|bottom|middle|cent(er|re)|corner|above|below|upper|lower|beside|between|behind|front)\b", re.I
)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
FILLERS = {"a", "an", "the", "of", "in", "on", "at", "with", "and", "or", "to", "is", "are", "it", "its", "by", "from"}
RULES = (
    "Write one paragraph of at most seven sentences that describes the picture. Name every object with its color and "
    "its place, in words such as left, right, top, bottom and middle, never by numbers. Use no digits and no brackets."
)
PROMPT = (
    "a. Resolution: {width}x{height}\n"
    "b. Caption: {caption}\n"
    "c. Dense captions: {regions}\n"
    "d. Region semantics: {semantics}\n"
    "Boxes are [left, top, right, bottom] in pixels of this resolution.\n"
    "{rules} Answer in {language}."
)


@dataclass(frozen=True)
class Thing:
    """A box of a picture, left, top, right, bottom in its pixels, and what is said of it."""

    box: tuple[float, float, float, float]
    text: str

    @property
    def area(self) -> float:
        """Pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Levels:
    """What is known of a picture, all in one frame: pixels of the upright picture.

    Args:
        size: width and height.
        caption: of the whole picture; "" = none.
        regions: dense captions.
        semantics: what the largest regions are.
    """

    size: tuple[int, int]
    caption: str
    regions: tuple[Thing, ...]
    semantics: tuple[Thing, ...] = ()


# levels, their picture, what was wrong with the text before -> a paragraph
Writer = Callable[["Levels", "Image | None", str], str]


def place_of(box: Sequence[float], size: tuple[int, int]) -> str:
    """Return where a box's centre is, in one of nine words; on a border between two thirds, the middle."""
    row, column = (
        0 if 3 * (low + high) < 2 * side else 2 if 3 * (low + high) > 4 * side else 1
        for low, high, side in ((box[1], box[3], size[1]), (box[0], box[2], size[0]))
    )
    return PLACES[row][column]


def spelt(text: str) -> str:
    """Return a text as part of a sentence: numbers in words, no brackets, nothing that ends a sentence."""
    text = re.sub(r"\d+(?:[.,]\d+)*", lambda found: _in_words(found[0]), text)
    text = re.sub(r"[\[\](){}<>\"]", " ", text)
    text = re.sub(r"[.!?;:]+", ",", text)
    return re.sub(r"\s*,[\s,]*", ", ", " ".join(text.split())).strip(" ,")


def _in_words(number: str) -> str:
    return NUMBERS[int(number)] if number.isdecimal() and int(number) < len(NUMBERS) else "many"


def template(levels: Levels, picture: Image | None = None, wrong: str = "") -> str:
    """Write by rule: the caption, then every object with its place, the largest first; the same for the same levels."""
    things = sorted(levels.regions or levels.semantics, key=lambda thing: -thing.area)
    places: dict[str, list[str]] = {}
    for thing in things:
        said = spelt(thing.text)
        where = places.setdefault(place_of(thing.box, levels.size), [])
        if said and said not in where:
            where.append(said)
    told = [f"{_listed(t)} {'is' if len(t) == 1 else 'are'} {place}" for place, t in places.items() if t]
    sentences = [caption] if (caption := spelt(levels.caption)) else []
    share = max(1, -(-len(told) // (MOST_SENTENCES - len(sentences))))  # places a sentence
    sentences += [", and ".join(told[i : i + share]) for i in range(0, len(told), share)]
    return " ".join(sentence[:1].upper() + sentence[1:] + "." for sentence in sentences)


def _listed(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"


def broken_rules(paragraph: str, levels: Levels) -> list[str]:
    """Return what is wrong with a paragraph, in words for who writes it again; none = it may stand."""
    wrong = []
    text = paragraph.strip()
    if not text:
        return ["it is empty"]
    if "\n" in text:
        wrong.append("it is more than one paragraph")
    sentences = [sentence for sentence in SENTENCE_END.split(text) if sentence.strip()]
    if len(sentences) > MOST_SENTENCES:
        wrong.append(f"it has {len(sentences)} sentences, more than seven")
    if re.search(r"\d", text):
        wrong.append("it has digits")
    if re.search(r"[\[\](){}]", text):
        wrong.append("it has brackets")
    placed = " ".join(sentence.casefold() for sentence in sentences if PLACE_WORDS.search(sentence))
    words = set(re.findall(r"\w+", placed))
    for thing in levels.regions:
        named = [word for word in re.findall(r"\w+", spelt(thing.text).casefold()) if word not in FILLERS]
        if named and named[-1] not in words:
            wrong.append(f"it does not say where '{thing.text}' is")
    return wrong


def prompt_of(levels: Levels, form: str = PROMPT, language: str = "English", wrong: str = "") -> str:
    """Return what a language model is asked.

    Args:
        levels: of the picture.
        form: text with the places {width}, {height}, {caption}, {regions}, {semantics}, {rules} and {language}.
        language: of the paragraph.
        wrong: with the paragraph before.
    """

    def listed(things: Sequence[Thing]) -> str:
        return "; ".join(f"{t.text}: [{', '.join(str(round(v)) for v in t.box)}]" for t in things) or "none"

    values = {
        "width": str(levels.size[0]), "height": str(levels.size[1]), "caption": levels.caption or "none",
        "regions": listed(levels.regions), "semantics": listed(levels.semantics), "rules": RULES, "language": language,
    }  # fmt: skip
    asked = re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), form)
    return f"{asked}\nThe paragraph before was wrong: {wrong}." if wrong else asked


class Endpoint:
    """Writes through a server that speaks OpenAI's chat completions.

    Args:
        base_url: such as http://127.0.0.1:8000/v1.
        model: its name there.
        key_env: name of the environment variable with the key; the key is never written anywhere.
        timeout: seconds of a try.
        retries: after errors that may pass.
        form: of the prompt, see `prompt_of`.
        language: of the paragraph.

    Raises:
        UserError: the package is not installed, or the variable is not set.
    """

    def __init__(
        self, base_url: str, model: str, key_env: str, timeout: float, retries: int, form: str, language: str
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise UserError("writer 'openai' needs: pip install 'generative-image-to-text[openai]'") from error
        if not os.environ.get(key_env):
            raise UserError(f"the environment variable {key_env} is not set; writer 'openai' takes its key from it")
        self.error, self.model, self.form, self.language = openai.OpenAIError, model, form, language
        self.client = openai.OpenAI(
            api_key=os.environ[key_env], base_url=base_url, timeout=timeout, max_retries=retries
        )

    def __call__(self, levels: Levels, picture: Image | None = None, wrong: str = "") -> str:
        """Return the endpoint's paragraph; raises Unwritten where it gives none."""
        asked = prompt_of(levels, self.form, self.language, wrong)
        messages: Any = [{"role": "user", "content": asked}]
        try:
            out = self.client.chat.completions.create(model=self.model, messages=messages)
            return (out.choices[0].message.content or "").strip()
        except (self.error, IndexError, AttributeError, TypeError, ValueError) as error:
            code = getattr(error, "status_code", None)  # a provider's own words may hold what was sent
            raise Unwritten(f"{type(error).__name__}{f' {code}' if code else ''}") from error


class Unwritten(Exception):
    """Nobody wrote; says why, in words that may be logged."""


class Itself:
    """Writes with the captioner's own language model, which sees the picture, too.

    Args:
        captioner: any.
        decoding: how.
        form: of the prompt, see `prompt_of`.
        language: of the paragraph.
    """

    def __init__(
        self, captioner: GitCaptioner | PublishedCaptioner, decoding: Decoding, form: str, language: str
    ) -> None:
        self.captioner, self.decoding, self.form, self.language = captioner, decoding, form, language

    def __call__(self, levels: Levels, picture: Image | None, wrong: str = "") -> str:
        """Return the model's text; raises Unwritten where the prompt is too long for it."""
        assert picture is not None, "it looks at the picture"
        asked = prompt_of(levels, self.form, self.language, wrong)
        try:
            self.captioner.length(asked, self.decoding.longest)
            encoded = self.captioner.encode([self.captioner.prepare(picture)])
            return self.captioner.answer(encoded, [asked], self.decoding)[0].strip()
        except UserError as error:
            raise Unwritten(str(error)) from error


@dataclass(frozen=True)
class Paragraph:
    """A text, who wrote it, and why not the one who was asked to."""

    text: str
    writer: str
    why: str = ""


def compose(levels: Levels, picture: Image | None, name: str, writer: Writer) -> Paragraph:
    """Return a paragraph that keeps the rules: the writer's first or second one, else the template's.

    Args:
        levels: of the picture.
        picture: for writers that look at it.
        name: of the writer.
        writer: see `Writer`; may raise Unwritten.
    """
    wrong = ""
    for _ in range(2):
        try:
            text = writer(levels, picture, wrong)
        except Unwritten as error:
            wrong = str(error)
            break
        broken = broken_rules(text, levels)
        if not broken:
            return Paragraph(text, name)
        wrong = "; ".join(broken)
    if name != "template":
        log.warning("writer '%s' gave no paragraph that can stand (%s): the template writes", name, wrong)
    return Paragraph(template(levels), "template", wrong)
