"""config -> model: the one switch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch

from git_model.config import Config, LanguageConfig
from git_model.errors import UserError
from git_model.models.git import GitModel
from git_model.models.language import LanguageModel
from git_model.models.mapper import build_mapper
from git_model.models.vision import build_vision
from git_model.tokens import TextCodec, load_tokenizer

log = logging.getLogger(__name__)


def build_model(config: Config, tokenizer: Any = None, held: Collection[str] = ()) -> GitModel:
    """Build the three parts and freeze what the config freezes.

    Args:
        config: the whole run; its `vision`, `mapper`, `language` and `train.freeze` are read.
        tokenizer: for a small language model, the one trained on the data; None loads it by the LM's name.
        held: parts whose weights a checkpoint brings: only their architecture is built.

    Raises:
        UserError: something that cannot be found or does not fit together.
    """
    if tokenizer is None:
        if config.language.name == "small":
            raise UserError("a small language model needs the tokenizer of its data")
        tokenizer = load_tokenizer(config.language.name)
    torch.manual_seed(config.train.seed)
    vision = build_vision(config.vision, "vision" not in held)
    hf_model = build_decoder(config.language, tokenizer, "language" not in held)
    language = LanguageModel(
        hf_model, config.language.name, config.language.prefix_attention, config.train.label_smoothing
    )
    torch.manual_seed(config.train.seed + 1)
    mapper = build_mapper(config.mapper, vision.dim, language.dim, vision.num_tokens)
    codec = TextCodec(tokenizer, language.vocab_size, config.data.max_text_tokens, config.data.max_prompt_tokens)
    model = GitModel(vision, mapper, language, codec)
    model.freeze(frozen_parts(config))
    for part in ("vision", "mapper", "language"):  # a trained part is float32 whatever its file says
        if part not in model.frozen:
            getattr(model, part).float()
    return model


def frozen_parts(config: Config) -> tuple[str, ...]:
    """Return the parts `train.freeze` names: 'auto' is the language model when it is pretrained."""
    names = set(config.train.freeze)
    if "auto" in names:
        names.discard("auto")
        if config.language.name != "small":
            names.add("language")
    names.discard("nothing")
    return tuple(part for part in ("vision", "mapper", "language") if part in names)


def build_decoder(config: LanguageConfig, tokenizer: Any, load_weights: bool = True) -> Any:
    """Return the Hugging Face causal LM of `config`.

    Raises:
        UserError: no such model, or one that is no causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    if config.name == "small":
        return AutoModelForCausalLM.from_config(small_decoder_config(config, tokenizer), dtype=dtype)
    try:
        if not load_weights:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.name), dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(config.name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the language model '{config.name}': {reason}") from error


def small_decoder_config(config: LanguageConfig, tokenizer: Any) -> Any:
    """Return the Hugging Face config of a small decoder with the tokenizer's vocabulary."""
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    small = config.small
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if small.architecture == "gpt2":
        return GPT2Config(
            n_positions=small.positions,
            n_embd=small.width,
            n_layer=small.depth,
            n_head=small.heads,
            resid_pdrop=small.dropout,
            embd_pdrop=small.dropout,
            attn_pdrop=small.dropout,
            **ids,
        )
    if small.architecture == "opt":
        return OPTConfig(
            hidden_size=small.width,
            word_embed_proj_dim=small.width,
            ffn_dim=4 * small.width,
            num_hidden_layers=small.depth,
            num_attention_heads=small.heads,
            max_position_embeddings=small.positions,
            dropout=small.dropout,
            **ids,
        )
    return LlamaConfig(
        hidden_size=small.width,
        intermediate_size=8 * small.width // 3,
        num_hidden_layers=small.depth,
        num_attention_heads=small.heads,
        max_position_embeddings=small.positions,
        tie_word_embeddings=True,
        **ids,
    )
