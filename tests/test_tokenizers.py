"""Tokenizers of published language models, and the traps that LLaMA's conversions left; real vocabularies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import captions
from transformers import AutoConfig, AutoModelForCausalLM

from git_model.datasets.collate import Collator
from git_model.errors import UserError
from git_model.tokens import TextCodec, load_tokenizer

TEXT = "a red circle left of two blue squares"
# tokenizer_config.json as conversions of LLaMA have it; None: the file is not there
OLDEST = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
PADDED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
PADDED |= {"pad_token": "[PAD]"}
MARKED: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
MARKED |= {name: {"__type": "AddedToken", "content": text} for name, text in PADDED.items() if name.endswith("token")}


@pytest.fixture
def llama(reference_data: Path, tmp_path: Path) -> Path:
    shutil.copy(reference_data / "data" / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    config = {"model_type": "llama", "vocab_size": 32000, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    config |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LLaMAForCausalLM"]}))
    return tmp_path


def pieces(folder: Path, text: str) -> list[int]:
    """sentencepiece's own ids."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)


@pytest.mark.parametrize("settings", [OLDEST, PADDED, MARKED], ids=["oldest", "padded", "marked"])
def test_every_conversion_of_llama_gives_the_ids_it_was_trained_with(llama: Path, settings: dict[str, Any]) -> None:
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    codec = TextCodec(load_tokenizer(str(llama)), 32000)
    assert (codec.bos_ids, codec.eos_id) == ([1], 2), "not config.json's 0 and 1"
    assert codec.prompt(TEXT) == pieces(llama, TEXT)
    assert codec.target(TEXT) == ([*pieces(llama, TEXT), 2], False)
    assert codec.decode([*pieces(llama, TEXT), 2, 5]) == TEXT
    assert 0 <= codec.pad_id < 32000, "[PAD] would be row 32000 of a table of 32000"


def test_a_pad_outside_the_table_never_reaches_the_model(llama: Path) -> None:
    (llama / "tokenizer_config.json").write_text(json.dumps(PADDED))
    tokenizer = load_tokenizer(str(llama))
    assert tokenizer.pad_token_id == 32000
    codec = TextCodec(tokenizer, 32000)
    batch = Collator(codec, 4)([captions("a", key="a"), captions(TEXT, key="b", seed=1)])
    assert not batch.attention_mask.all(), "there is padding"
    assert int(batch.input_ids.max()) < 32000
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(llama))
    assert torch.isfinite(model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits).all()


@pytest.mark.parametrize(("kind", "first", "end"), [("gpt2", [], 50256), ("opt", [2], 2)])
def test_gpt2_and_opt(kind: str, first: list[int], end: int, reference_data: Path, tmp_path: Path) -> None:
    """The same merges, two ways to begin: nothing, and OPT's </s>, which is its BOS."""
    source = reference_data / "data" / "tokenizers" / kind
    names = {"gpt2": ("vocab.json", "merges.txt"), "opt": ("gpt2-vocab.json", "gpt2-merges.txt")}[kind]
    for name, own in zip(names, ("vocab.json", "merges.txt"), strict=True):
        shutil.copy(source / name, tmp_path / own)
    special = {"gpt2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")}
    special["opt"] = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": kind == "opt", **special[kind]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    size = {"gpt2": 50257, "opt": 50272}[kind]
    codec = TextCodec(load_tokenizer(str(tmp_path)), size)
    assert (codec.bos_ids, codec.eos_id) == (first, end)
    assert codec.pad_id == {"gpt2": 50256, "opt": 1}[kind]
    ids, cut = codec.target(TEXT)
    assert ids.count(end) == 1
    assert ids[-1] == end
    assert not cut
    assert codec.decode(ids) == TEXT


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="cannot load the tokenizer of language model"):
        load_tokenizer(str(tmp_path))
