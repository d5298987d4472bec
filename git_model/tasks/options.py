"""Keys that several tasks share: each group is one argument of a task, and its fields are keys of `-p`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from git_model.cluster import rank_and_world
from git_model.errors import UserError
from git_model.tasks.values import Range

if TYPE_CHECKING:
    from git_model.models.language import Decoding
    from git_model.tasks.captioner import GitCaptioner, PublishedCaptioner


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model answers; the original's five architecture keys are held against what a checkpoint carries."""

    model_path: str
    prompt_format: str = "{prompt}"
    image_encoder_type: str | None = None
    language_model: str | None = None
    mapping_type: str | None = None
    output_grid: bool | None = None
    input_resolution: Annotated[int, Range(16, 4096)] | None = None
    device: str = "auto"
    compile: bool = False

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the five keys; None where not given."""
        return {
            "image_encoder_type": self.image_encoder_type,
            "language_model": self.language_model,
            "mapping_type": self.mapping_type,
            "output_grid": self.output_grid,
            "input_resolution": self.input_resolution,
        }

    def check(self) -> None:
        """Say at once, without torch, what is wrong with these keys.

        Raises:
            UserError: no such file, or a prompt_format without a place for the prompt.
        """
        if "{prompt}" not in self.prompt_format:
            raise UserError(f"prompt_format is '{self.prompt_format}', it needs {{prompt}} where the question goes")
        check_model_path(self.model_path)

    def open(self) -> GitCaptioner | PublishedCaptioner:
        """Load the model; see `open_captioner`."""
        from git_model.tasks.captioner import GitCaptioner, open_captioner

        captioner = open_captioner(self.model_path, self.architecture, self.device, self.prompt_format)
        if self.compile:
            if not isinstance(captioner, GitCaptioner):
                raise UserError(f"compile is for our checkpoints, {self.model_path} is a Hugging Face model")
            captioner.model.language.compile_steps()
        return captioner


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How text is searched for."""

    answer_list: str | None = None
    beams: Annotated[int, Range(1, 64)] = 1
    max_new_tokens: Annotated[int, Range(1, 1024)] = 40
    min_new_tokens: Annotated[int, Range(0, 1024)] = 0
    length_penalty: Annotated[float, Range(-10, 10)] = 1.0

    def decoding(self) -> Decoding:
        """Return the search, not yet kept to `answer_list`: that takes the model's tokens."""
        from git_model.models.language import Decoding

        return Decoding(self.beams, self.max_new_tokens, self.min_new_tokens, self.length_penalty)

    def decoding_of(self, captioner: GitCaptioner | PublishedCaptioner, after_prompt: bool) -> Decoding:
        """Return the search, kept to `answer_list` where there is one; raises UserError for a list that cannot be."""
        answers = self.answers()
        trie = captioner.trie(answers, after_prompt) if answers else None
        return replace(self.decoding(), answers=trie)

    def answers(self) -> list[str] | None:
        """Return what stands in `answer_list`, None without one; see `read_answer_list`."""
        return read_answer_list(self.answer_list) if self.answer_list else None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(SearchOptions):
    """How text is searched for or drawn."""

    sample: bool = False
    temperature: Annotated[float, Range(0.01, 100)] = 1.0
    top_p: Annotated[float, Range(0.0001, 1)] = 1.0
    seed: Annotated[int, Range(0, 2**31)] = 0

    def decoding(self) -> Decoding:
        """Return the search or the drawing."""
        drawn = {"sample": self.sample, "temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return replace(SearchOptions.decoding(self), **drawn)


@dataclass(frozen=True, kw_only=True)
class PartOptions:
    """Which block of the rows this process does: for array jobs, whose tasks know nothing of each other."""

    part: Annotated[int, Range(0, 65535)] | None = None
    parts: Annotated[int, Range(1, 65536)] | None = None

    def place(self) -> tuple[int, int]:
        """Return the number of this process's block and how many there are: the part's, or the rank's.

        Raises:
            UserError: one key without the other, no such part, or a part that several processes would do.
        """
        rank, world = rank_and_world()
        if self.part is None and self.parts is None:
            return rank, world
        if self.part is None or self.parts is None:
            raise UserError("part and parts belong together, such as 'part': 0, 'parts': 4")
        if self.part >= self.parts:
            raise UserError(f"part is {self.part}; of {self.parts} parts it must be from 0 to {self.parts - 1}")
        if world > 1:
            raise UserError(f"a part is one process's, here are {world}: start it alone, or leave out part and parts")
        return self.part, self.parts


@dataclass(frozen=True, kw_only=True)
class BatchOptions(PartOptions):
    """How a batch task goes over its rows."""

    workers: Annotated[int, Range(0, 256)] = 2
    max_bad: Annotated[float, Range(0, 1)] = 0.01


@dataclass(frozen=True, kw_only=True)
class TsvOptions:
    """Where a prepared set goes, as {name}.img.tsv and its companions, and how much of it may be unreadable."""

    out_dir: str
    name: str
    max_bad: Annotated[float, Range(0, 1)] = 0.0


def check_model_path(model_path: str) -> None:
    """Say at once what looks like a checkpoint's name and is none.

    Raises:
        UserError: no such file (an id of the hub has no ending .pt and at most one slash).
    """
    path = Path(model_path)
    named = path.suffix == ".pt" or path.is_absolute() or model_path.count("/") > 1 or path.parent.is_dir()
    if not path.exists() and named and path.parent != Path():
        raise UserError(f"no checkpoint at {model_path}")


def read_answer_list(path: str) -> list[str]:
    """Return the answers of a file: one a line, or a JSON list.

    Raises:
        UserError: no such file, or not a list of texts.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        answers = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read answer_list '{path}': {error}") from error
    if not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"answer_list '{path}' is no list of texts")
    kept = list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))
    if not kept:
        raise UserError(f"answer_list '{path}' holds no answer")
    return kept
