"""How text is generated: the settings that every model of the project understands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from git_model.errors import UserError
from git_model.models.answers import AnswerTrie


@dataclass(frozen=True)
class Decoding:
    """How text is generated.

    Args:
        beams: 1 = greedy (or sampling).
        max_new_tokens: longest answer in tokens, image and prompt not counted.
        min_new_tokens: EOS is forbidden before.
        length_penalty: exponent on the length of a beam's score; above 0 favours longer ones (Hugging Face's sense).
        sample: draw instead of taking the likeliest; needs `seed` for repeatability.
        temperature: of sampling.
        top_p: of sampling; 1 = off.
        seed: of sampling.
        max_time: seconds after which a text ends with what there is (Hugging Face's name); None = never.
        answers: the only token sequences allowed; sets `max_new_tokens` to the longest.
    """

    beams: int = 1
    max_new_tokens: int = 40
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    max_time: float | None = None
    answers: AnswerTrie | None = None

    def __post_init__(self) -> None:
        if self.beams < 1 or self.max_new_tokens < 1 or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(
                f"decoding needs beams >= 1 and 0 <= min_new_tokens <= max_new_tokens >= 1, got beams {self.beams}, "
                f"min {self.min_new_tokens}, max {self.max_new_tokens}"
            )
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise UserError(f"sampling needs temperature > 0 and 0 < top_p <= 1, got {self.temperature}, {self.top_p}")
        if self.answers and self.min_new_tokens:
            raise UserError(f"a list of answers allows no min_new_tokens, got {self.min_new_tokens}")

    @property
    def longest(self) -> int:
        """The most new tokens a row can get."""
        return self.answers.longest if self.answers else self.max_new_tokens

    def settings(self, eos_id: int | list[int], pad_id: int, **others: Any) -> dict[str, Any]:
        """Return the arguments of Hugging Face's `generate`; `others` go into its GenerationConfig."""
        config = GenerationConfig(
            max_new_tokens=self.longest,
            min_new_tokens=self.min_new_tokens or None,
            num_beams=self.beams,
            length_penalty=self.length_penalty if self.beams > 1 else None,
            do_sample=self.sample,
            temperature=self.temperature if self.sample else None,
            top_p=self.top_p if self.sample else None,
            top_k=0 if self.sample else None,
            max_time=self.max_time,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
            **others,
        )
        if self.answers is None:
            return {"generation_config": config}
        return {"generation_config": config, "prefix_allowed_tokens_fn": self.answers.constraint()}
