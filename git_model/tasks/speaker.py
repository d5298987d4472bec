"""What the model says to a visitor of the page, and the limits of what may be asked."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.batch import IMG_SLOT, Region, Target
from git_model.errors import ImageError, UserError
from git_model.tasks.session import MAX_KEPT, Picture, Run, Session, Turn, direct
from git_model.tasks.values import Range, convert, to_node

if TYPE_CHECKING:
    from git_model.models.language import Decoding
    from git_model.tasks.captioner import GitCaptioner, PublishedCaptioner

MAX_PROMPT = 4096  # bytes
MAX_TURNS = 20  # that a dialogue remembers


@dataclass(frozen=True)
class Settings:
    """How a text is searched for or drawn."""

    beams: int
    sample: bool
    temperature: float
    max_new_tokens: int
    seed: int = 0

    @classmethod
    def checked(cls, given: Sequence[Any], max_beams: int, most_tokens: int) -> Settings:
        """Return what the page's controls say.

        Args:
            given: beams, sample, temperature, max_new_tokens.
            max_beams: allowed here.
            most_tokens: of an answer, allowed here.

        Raises:
            UserError: a value out of its range.
        """
        whole = [int(v) if isinstance(v, float) and v.is_integer() else v for v in given]
        sample = convert(to_node(whole[1]), bool, "sampling")
        return cls(
            convert(to_node(whole[0]), Annotated[int, Range(1, max_beams)], "beams"),
            sample,
            convert(to_node(whole[2]), Annotated[float, Range(0.1, 2)], "temperature"),
            convert(to_node(whole[3]), Annotated[int, Range(1, most_tokens)], "new tokens"),
            secrets.randbelow(2**31) if sample else 0,
        )

    def decoding(self) -> Decoding:
        """Return the search or the drawing."""
        from git_model.tasks.options import SamplingOptions

        drawn = {"sample": True, "temperature": self.temperature, "seed": self.seed} if self.sample else {}
        return SamplingOptions(beams=self.beams, max_new_tokens=self.max_new_tokens, **drawn).decoding()  # type: ignore[arg-type]


@dataclass(frozen=True)
class Speaker:
    """A model with its name, which is all of its path that visitors may see."""

    captioner: GitCaptioner | PublishedCaptioner
    model_path: str
    max_seconds: float | None = None  # of an answer
    run: Run = direct  # what calls the decoder

    @property
    def reads_boxes(self) -> bool:
        """Whether a box makes a difference to this model."""
        return getattr(self.captioner, "region_mode", "none") not in ("none", "ignore")

    def described(self, session: Session, prompt: str, how: Settings) -> Session:
        """Describe the picture or the box in it; raises UserError for what cannot be."""
        picture = session.needed()
        _check_prompt(prompt)
        text = self._say([prompt], [picture], how)
        record = self._record(prompt, [picture], text, how)
        return replace(session, answer=text, record=record, message="", due=False)

    def asked(self, session: Session, question: str, how: Settings) -> Session:
        """Answer a question about the new pictures and those of the dialogue.

        Raises:
            UserError: no question, no picture, slots that do not fit the pictures, or all of it too long.
        """
        question = question.strip()
        _check_prompt(question)
        if not question:
            raise UserError("the question is empty")
        turns, new = session.turns[-MAX_TURNS + 1 :], session.pictures
        if not new and not turns:
            raise UserError("there is no picture yet; upload one")
        if new and IMG_SLOT not in question:
            question = f"{' '.join([IMG_SLOT] * len(new))} {question}"
        if question.count(IMG_SLOT) != len(new):
            raise UserError(f"the question has {question.count(IMG_SLOT)} {IMG_SLOT} slots for {len(new)} new pictures")
        told = [f"{turn.question} {turn.answer.replace(IMG_SLOT, '')}" for turn in turns]
        pictures = [*(picture for turn in turns for picture in turn.pictures), *new]
        text = self._say([*told, question], pictures, how)
        record = self._record(question, new, text, how)
        dialogue = kept_turns([*turns, Turn(question, text, new)])
        done = replace(session, pictures=(), chosen=0, corner=None, turns=dialogue, message="")
        return replace(done, answer=text, record=record)

    def _say(self, turns: Sequence[str], pictures: Sequence[Picture], how: Settings) -> str:
        from git_model.datasets.images import decode_image
        from git_model.tasks.captioner import GitCaptioner

        decoding = replace(how.decoding(), max_time=self.max_seconds)
        if not isinstance(self.captioner, GitCaptioner):
            if len(turns) > 1 or len(pictures) > 1:
                raise UserError("this model answers single questions about one picture; restart for the next")
            prompt = turns[0].replace(IMG_SLOT, "").strip()
            seen = self.captioner.encode([self.captioner.prepare(self.run(decode_image, pictures[0].data))])
            return self.captioner.answer(seen, [prompt], decoding)[0]
        regions = [Region(number, picture.box) for number, picture in enumerate(pictures)]
        target = Target(prompt=turns[0], regions=tuple(regions))
        if len(turns) > 1:
            target = self.captioner.shortened(turns, regions, decoding.longest)
        first = target.regions[0].image if target.regions else 0  # what was left out is the beginning
        kept = replace(target, regions=tuple(Region(r.image - first, r.box) for r in target.regions))
        seen = [self.run(decode_image, picture.data) for picture in pictures[first:]]
        try:
            return self.captioner.ask([self.captioner.see(seen, [kept])], decoding)[0]
        except ImageError as error:
            raise UserError(f"the box cannot be used: {error}") from error

    def _record(self, prompt: str, pictures: Sequence[Picture], text: str, how: Settings) -> str:
        boxes = [None if picture.box is None else list(picture.box) for picture in pictures]
        said = {"text": text, "prompt": prompt, "boxes": boxes, "sizes": [list(picture.size) for picture in pictures]}
        settings = {key: value for key, value in vars(how).items() if how.sample or key not in ("temperature", "seed")}
        said |= {"settings": settings, "model": Path(self.model_path).name}
        return json.dumps(said, ensure_ascii=False, indent=1)


def kept_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Return the newest turns, whose pictures have at most MAX_KEPT bytes; the newest stays."""
    size, first = 0, len(turns)
    while first > 0:
        size += sum(len(picture.data) for picture in turns[first - 1].pictures)
        if size > MAX_KEPT and first < len(turns):
            break
        first -= 1
    return tuple(turns[first:])


def _check_prompt(prompt: str) -> None:
    size = len(prompt.encode("utf-8", "surrogatepass"))
    if size > MAX_PROMPT:
        raise UserError(f"the text has {size} bytes; at most {MAX_PROMPT}")
