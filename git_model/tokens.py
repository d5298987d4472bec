"""Text <-> ids, in one place: EOS, pad, BOS, truncation, and the tokenizer that is trained on the data at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from git_model.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MAX_KNOWN = 1 << 16
LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class TextCodec:
    """The tokenizer rules of the project, for any Hugging Face tokenizer.

    A target is its ids plus exactly one EOS; truncation keeps the EOS. Padding reuses an id inside the
    embedding table (the pad token where there is one, else EOS): it is masked by length, never by id,
    so it is never trained on even where pad and EOS are the same. Special tokens written in a text are
    encoded as text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        vocab_size: rows of the language model's embedding table.
        max_target: longest target in tokens, EOS included.
        max_prompt: longest prompt in tokens.

    Raises:
        UserError: the tokenizer has no EOS, or one outside the embedding table.
    """

    _PLAIN: ClassVar[dict[str, bool]] = {"add_special_tokens": False, "split_special_tokens": True}

    def __init__(self, tokenizer: Any, vocab_size: int, max_target: int = 64, max_prompt: int = 512) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_target = max_target
        self.max_prompt = max_prompt
        self._known: dict[str, list[int]] = {}  # questions and answers come back, and the tokenizer is slow to call
        eos = tokenizer.eos_token_id
        if eos is None or not 0 <= eos < vocab_size:
            raise UserError(f"the tokenizer's EOS id is {eos}, outside the embedding table of {vocab_size} rows")
        self.eos_id: int = eos
        pad = tokenizer.pad_token_id
        # a [PAD] added to LLaMA has id == vocab_size: an index error; EOS serves, padding is masked by length
        self.pad_id: int = pad if pad is not None and 0 <= pad < vocab_size else eos
        default = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        # LLaMA and OPT were trained with a first token; the tokenizer adds it by itself, GPT-2's does not
        self.bos_ids: list[int] = [bos] if bos is not None and default and default[0] == bos else []
        # sentencepiece marks a word's start by itself, byte-level BPE wants the space in the text
        self._joint = "" if tokenizer.tokenize("a")[0].startswith("\u2581") else " "

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, without special tokens.

        Raises:
            UserError: longer than `max_prompt` tokens.
        """
        ids = self._ids(text) if text else []
        if len(ids) > self.max_prompt:
            raise UserError(f"the prompt has {len(ids)} tokens, more than {self.max_prompt}")
        return ids

    def target(self, text: str, after_prompt: bool = False) -> tuple[list[int], bool]:
        """Return the ids of a target with its one EOS, and whether it was cut to `max_target`."""
        ids = self._ids(self._joint + text if after_prompt else text)
        cut = len(ids) > self.max_target - 1
        return [*ids[: self.max_target - 1], self.eos_id], cut

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, the end not counted; nothing is cut. Many at a time are fast."""
        if not texts:
            return []
        return [len(ids) for ids in self.tokenizer(list(texts), **self._PLAIN)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids, up to the first EOS."""
        kept: list[int] = []
        for token in ids:
            if token == self.eos_id:
                break
            kept.append(int(token))
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def _ids(self, text: str) -> list[int]:
        ids = self._known.get(text)
        if ids is None:
            ids = self.tokenizer(text, **self._PLAIN)["input_ids"]
            if len(self._known) < MAX_KNOWN:
                self._known[text] = ids
        return ids


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts at hand: nothing it cannot spell, frequent words one token.

    Args:
        texts: captions, questions, answers.
        vocab_size: the largest vocabulary; fewer when the texts hold fewer pairs.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 257),  # 256 bytes and the end of text
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # each word also as it stands after a space, so a caption's first word shares its pieces with the others
    bpe.train_from_iterator((form for text in texts for form in (text, " " + text)), trainer)
    return tokenizer_from_json(bpe.to_str())


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer a checkpoint carries as `tokenizers` JSON."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token=END_OF_TEXT)


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer of a Hugging Face id or directory.

    Raises:
        UserError: it cannot be found or read.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    try:
        settings = llama_settings(name)
        kind: Any = AutoTokenizer if settings is None else LlamaTokenizer
        tokenizer = kind.from_pretrained(name, **(settings or {}))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the tokenizer of language model '{name}': {reason}") from error
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):  # transformers makes an empty one
        raise UserError(f"cannot load the tokenizer of language model '{name}': there are no vocabulary files")
    return tokenizer


def llama_settings(name: str) -> dict[str, Any] | None:
    """Return what a LLaMA tokenizer's own files lack; None where they are complete, or it is no LLaMA tokenizer.

    Early conversions name a class that never was in a release (LLaMATokenizer) and have "" for every special token;
    others carry the sentencepiece file alone, which today's transformers reads without the first token that every
    LLaMA was trained with.
    """
    from transformers.utils import cached_file

    def found(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    path = found("tokenizer_config.json")
    settings: Any = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    if str(settings.get("tokenizer_class", "")).lower().removesuffix("fast") != "llamatokenizer":
        return None
    given = {token: settings.get(token) for token in LLAMA_TOKENS}
    given = {token: text.get("content") if isinstance(text, dict) else text for token, text in given.items()}
    empty = {token: text for token, text in LLAMA_TOKENS.items() if not given[token]}
    if found("tokenizer.json") and not empty:
        return None
    return {**empty, "add_bos_token": settings.get("add_bos_token", True)}
