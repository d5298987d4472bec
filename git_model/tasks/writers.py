"""One paragraph out of what is known of a picture: by a template, by the model itself, or by any OpenAI-like endpoint.

Whoever writes, the same rules hold: one paragraph, at most seven sentences, no digits or brackets, and every object
with a word for its place. What breaks them is written once more; then the template, which cannot, writes.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from git_model.errors import UserError
from git_model.tasks.levels import Levels, Thing, place_of, spelt

if TYPE_CHECKING:
    from PIL.Image import Image

    from git_model.models.decoding import Decoding
    from git_model.tasks.captioner import GitCaptioner, PublishedCaptioner

log = logging.getLogger(__name__)

MOST_SENTENCES = 7
GIVE_UP = 5  # pictures in a row for which an endpoint gives nothing
PLACE = re.compile(  # "on the right", "in the upper left corner", "below the tree"; not "the right answer"
    r"\b(at|on|in|to|near|along|toward|towards|from|by)\b[^,;]{0,24}?"
    r"\b(left|right|top|bottom|middle|cent(er|re)|corner|side|edge|foreground|background|front)\b"
    r"|\b(above|below|under|beneath|beside|between|behind|next to)\b",
    re.I,
)
SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
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


# levels, their picture, what was wrong with the text before -> a paragraph
Writer = Callable[["Levels", "Image | None", str], str]


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


def broken_rules(paragraph: str, levels: Levels, language: str = "English") -> list[str]:
    """Return what is wrong with a paragraph, in words for who writes it again; none = it may stand.

    An object counts as placed where one sentence names it and a place. Its name is its last noun, or all its words if
    another object has the same noun. In other languages than English only the form is judged: captions are English.
    """
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
    if language.casefold() != "english":
        return wrong
    placed = [set(re.findall(r"\w+", sentence.casefold())) for sentence in sentences if PLACE.search(sentence)]
    names = {spelt(thing.text).casefold() for thing in levels.regions}
    words = {name: [word for word in re.findall(r"\w+", name) if word not in FILLERS] for name in sorted(names)}
    nouns = Counter(named[-1] for named in words.values() if named)
    for name, named in words.items():
        wanted = set(named if named and nouns[named[-1]] > 1 else named[-1:])
        if wanted and not any(wanted <= sentence for sentence in placed):
            wrong.append(f"it does not say where '{name}' is")
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
        if urlsplit(base_url).scheme not in ("http", "https"):
            raise UserError(f"base_url is '{base_url}'; it begins with http:// or https://")
        if not os.environ.get(key_env) and base_url.startswith("https://api.openai.com"):
            raise UserError(f"the environment variable {key_env} is not set; writer 'openai' takes its key from it")
        self.error, self.model, self.form, self.language = openai.OpenAIError, model, form, language
        self.key_env, key = key_env, os.environ.get(key_env) or "none"  # servers of one's own want none
        self.base_url, self.silent = base_url, 0  # how often in a row it gave nothing
        try:
            self.client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=retries)
        except Exception as error:  # httpx's, of an address that is none
            raise UserError(f"base_url '{base_url}' is no address: {error}") from error

    def __call__(self, levels: Levels, picture: Image | None = None, wrong: str = "") -> str:
        """Return the endpoint's paragraph; raises Unwritten where it gives none."""
        asked = prompt_of(levels, self.form, self.language, wrong)
        messages: Any = [{"role": "user", "content": asked}]
        try:
            out = self.client.chat.completions.create(model=self.model, messages=messages)
            text = (out.choices[0].message.content or "").strip()
            self.silent = 0
            return text
        except (self.error, IndexError, AttributeError, TypeError, ValueError) as error:
            code = getattr(error, "status_code", None)  # a provider's own words may hold what was sent
            if code in (401, 403):  # of every picture
                raise UserError(f"the endpoint refuses the key of {self.key_env} (status {code})") from error
            self.silent += 1
            told = f"{type(error).__name__}{f' {code}' if code else ''} of {self.base_url}"
            if self.silent == GIVE_UP:
                raise UserError(
                    f"{told}, {GIVE_UP} times in a row: is it there? What was written before is kept"
                ) from error
            raise Unwritten(told) from error


class Unwritten(Exception):
    """Nobody wrote; says why, in words that may be logged."""


class Itself:
    """Writes with the captioner's own language model, which sees the picture, too.

    Args:
        captioner: any.
        decoding: returns how, with the time that is left.
        form: of the prompt, see `prompt_of`.
        language: of the paragraph.
    """

    def __init__(
        self, captioner: GitCaptioner | PublishedCaptioner, decoding: Callable[[], Decoding], form: str, language: str
    ) -> None:
        self.captioner, self.decoding, self.form, self.language = captioner, decoding, form, language

    def __call__(self, levels: Levels, picture: Image | None, wrong: str = "") -> str:
        """Return the model's text; raises Unwritten where the prompt is too long for it."""
        assert picture is not None, "it looks at the picture"
        decoding = self.decoding()
        asked = prompt_of(levels, self.form, self.language, wrong)
        try:
            self.captioner.length(asked, decoding.longest)
            encoded = self.captioner.encode([self.captioner.prepare(picture)])
            return self.captioner.answer(encoded, [asked], decoding)[0].strip()
        except UserError as error:
            raise Unwritten(str(error)) from error


@dataclass(frozen=True)
class Paragraph:
    """A text, who wrote it, and why not the one who was asked to."""

    text: str
    writer: str
    why: str = ""


def compose(levels: Levels, picture: Image | None, name: str, writer: Writer, language: str = "English") -> Paragraph:
    """Return a paragraph that keeps the rules: the writer's first or second one, else the template's.

    Args:
        levels: of the picture.
        picture: for writers that look at it.
        name: of the writer.
        writer: see `Writer`; may raise Unwritten.
        language: of the writer; the template's is English.
    """
    wrong = ""
    for _ in range(2):
        try:
            text = writer(levels, picture, wrong)
        except Unwritten as error:
            wrong = str(error)
            break
        broken = broken_rules(text, levels, language if name != "template" else "English")
        if not broken:
            return Paragraph(text, name)
        wrong = "; ".join(broken)
    if name != "template":
        log.warning("writer '%s' gave no paragraph that can stand (%s): the template writes", name, wrong)
    return Paragraph(template(levels), "template", wrong)
