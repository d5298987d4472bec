"""Captions of real length, and a tokenizer for them: what decides how much of a step is padding."""

from __future__ import annotations

import json
import random
import statistics
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from git_model.tokens import train_tokenizer

COCO = "coco_val2017_subset/captions_val2017.json"
MEAN, SPREAD, SHORTEST, LONGEST = 12.03, 2.80, 8, 57  # COCO val2017's 25,014 captions in GPT-2's tokens
WORDS = ("a", "red", "dog", "on", "the", "grass", "near", "two", "small", "houses", "with", "some", "trees", "people")


@dataclass(frozen=True)
class Captions:
    """Texts, their tokenizer, and where they come from."""

    texts: tuple[str, ...]
    tokenizer: Any
    told: str

    def batch(self, size: int, seed: int = 0) -> list[str]:
        """Return a drawn batch whose longest caption is as long as that of the middle one of 101 batches."""
        dice = random.Random(seed)
        drawn = [dice.sample(self.texts, size) for _ in range(101)]
        return sorted(drawn, key=lambda texts: max(self.lengths(texts)))[50]

    def lengths(self, texts: list[str]) -> list[int]:
        """Return how many tokens each text has."""
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def read_captions(data: Path) -> Captions:
    """Return COCO's captions, else RSICD's, else made ones with COCO's distribution of lengths (seeded).

    Args:
        data: folder of the real data sets; may be missing.
    """
    texts, source = _real(data)
    if not texts:
        dice = random.Random(0)
        counts = (min(LONGEST, max(SHORTEST, round(dice.gauss(MEAN, SPREAD)))) for _ in range(5000))
        texts, source = [" ".join(dice.choices(WORDS, k=count)) for count in counts], "made, with COCO's lengths"
    folder, kind = data / "tokenizers" / "gpt2", "GPT-2's tokenizer"
    if source.startswith("made") or not (folder / "merges.txt").is_file():
        tokenizer, kind = train_tokenizer(texts, 8000), "a tokenizer trained on them"
    else:
        from transformers import GPT2Tokenizer

        tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    lengths = [len(ids) for ids in tokenizer(texts[:5000], add_special_tokens=False)["input_ids"]]
    told = f"captions: {source}, {kind}, {statistics.mean(lengths):.1f} tokens (up to {max(lengths)})"
    return Captions(tuple(texts), tokenizer, told)


def _real(data: Path) -> tuple[list[str], str]:
    """Return the texts of a real data set and its name; nothing where there is none."""
    if (data / COCO).is_file():
        notes = json.loads((data / COCO).read_text(encoding="utf-8"))["annotations"]
        return [" ".join(note["caption"].split()) for note in notes], "COCO val2017"
    texts: list[str] = []
    for shard in sorted((data / "rsicd").glob("rsicd-val-*.tar")):
        with tarfile.open(shard) as records:
            for member in records:
                if member.name.endswith(".json") and (file := records.extractfile(member)) is not None:
                    texts += json.load(file)["captions"]
    return texts, "RSICD validation"
