"""config -> model: the one switch."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from git_model.architecture import DTYPES
from git_model.config import Config
from git_model.errors import UserError
from git_model.hardware import suited_dtype
from git_model.models.decoders import build_decoder, decoder_width
from git_model.models.git import GitModel
from git_model.models.hub import check_name
from git_model.models.language import LanguageModel
from git_model.models.mapper import build_mapper
from git_model.models.parts import PartedModel
from git_model.models.region import RegionMapper, build_reader
from git_model.models.regressor import EnsembleRegressor, PromptRegressor
from git_model.models.vision import VisionEncoder, build_vision, vision_facts
from git_model.tokens import TextCodec, load_tokenizer

log = logging.getLogger(__name__)


def build(
    config: Config, tokenizer: Any = None, held: Collection[str] = (), device: torch.device | str = "cpu"
) -> PartedModel:
    """Build the model of a run, whichever kind it is; arguments and errors as of `build_model`."""
    if config.regressor.type == "none":
        return build_model(config, tokenizer, held, device)
    return build_regressor(config, held)


def build_regressor(config: Config, held: Collection[str] = ()) -> PromptRegressor | EnsembleRegressor:
    """Build a model whose answer is a vector, and freeze what the config freezes.

    Args:
        config: the whole run; its `vision`, `regressor` and `train.freeze` are read.
        held: parts whose weights a checkpoint brings: only their architecture is built.

    Raises:
        UserError: something that cannot be found or does not fit together.
    """
    options = config.regressor
    torch.manual_seed(config.train.seed)
    if options.type == "ensemble":
        shape = (options.width, options.depth, options.heads, options.dropout)
        model: PromptRegressor | EnsembleRegressor = EnsembleRegressor(options.sources, options.dim, *shape)
    else:
        vision = build_vision(config.vision, "vision" not in held)
        torch.manual_seed(config.train.seed + 1)
        model = PromptRegressor(vision.float(), options.dim, options.hidden)
    model.freeze(frozen_parts(config))
    return model


def build_model(
    config: Config,
    tokenizer: Any = None,
    held: Collection[str] = (),
    device: torch.device | str = "cpu",
    vision: VisionEncoder | None = None,
) -> GitModel:
    """Build the three parts and freeze what the config freezes.

    Args:
        config: the whole run; its `vision`, `mapper`, `language` and `train.freeze` are read.
        tokenizer: for a small language model, the one trained on the data; None loads it by the LM's name.
        held: parts whose weights a checkpoint brings: only their architecture is built.
        device: where the model is going; quantised weights are made there, the rest on the CPU.
        vision: the encoder, where it is built already (an export says itself what it is).

    Raises:
        UserError: something that cannot be found or does not fit together.
    """
    if tokenizer is None:
        if config.language.name == "small":
            raise UserError("a small language model needs the tokenizer of its data")
        check_name(config.language.name, "language model")
        tokenizer = load_tokenizer(config.language.name)
    if (
        config.mapper.type == "none" and vision is None
    ):  # it joins equal widths only: said before any weights are fetched
        facts = vision_facts(config.vision)
        build_mapper(config.mapper, facts.dim, decoder_width(config.language), facts.num_tokens)
    torch.manual_seed(config.train.seed)
    vision = vision or build_vision(config.vision, "vision" not in held)
    frozen, dtype = frozen_parts(config), config.language.dtype
    adapted = bool(config.language.lora.rank)
    if dtype == "auto":
        dtype = DTYPES[config.train.precision] if "language" in frozen or adapted else "float32"
    dtype = suited_dtype(dtype, device)
    hf_model = build_decoder(replace(config.language, dtype=dtype), tokenizer, "language" not in held, device)
    language = LanguageModel(
        hf_model,
        config.language.name,
        config.language.prefix_attention,
        config.train.label_smoothing,
        compute=getattr(torch, dtype) if config.language.bits < 16 else None,
    )
    torch.manual_seed(config.train.seed + 1)
    mapper = _build_mapper(config, vision, language.dim, load="mapper" not in held)
    codec = TextCodec(tokenizer, language.vocab_size, config.data.max_text_tokens, config.data.max_prompt_tokens)
    model = GitModel(vision, mapper, language, codec)
    if language.max_positions is not None:  # a longer prompt is a skipped sample, not the run's end
        room = language.max_positions - mapper.num_tokens - config.data.max_text_tokens
        if room < 0:
            raise UserError(
                f"the language model has {language.max_positions} positions; {mapper.num_tokens} image tokens and "
                f"data.max_text_tokens {config.data.max_text_tokens} are more"
            )
        codec.max_prompt = min(codec.max_prompt, room)
    model.freeze(frozen)
    for part in ("vision", "mapper", "language"):  # a trained part is float32 whatever its file says
        if part not in model.frozen and not (part == "language" and adapted):
            getattr(model, part).float()
    return model


def _build_mapper(config: Config, vision: VisionEncoder, width: int, load: bool) -> Any:
    """Return the mapper, and what comes between it and the encoder."""
    reader = build_reader(config.region, vision.dim, vision.num_tokens)
    given = (vision.dim, vision.num_tokens) if reader is None else (reader.dim, reader.num_tokens)
    mapper = build_mapper(config.mapper, given[0], width, given[1])
    if load and config.region.warm_start is not None:
        left = reader.warm_start(config.region.warm_start)
        log.info("%s: started the region reader, but for %s", config.region.warm_start, ", ".join(left) or "nothing")
    norm = nn.LayerNorm(vision.dim) if config.vision.join == "mean" else None
    return mapper if reader is None and norm is None else RegionMapper(mapper, reader, norm)


def frozen_parts(config: Config) -> tuple[str, ...]:
    """Return the parts `train.freeze` names: 'auto' is the language model when it is pretrained.

    One with adapters is no frozen part: they are trained, and only they are.
    """
    names = set(config.train.freeze)
    if "auto" in names:
        names.discard("auto")
        if "language" in config.parts and config.language.name != "small" and not config.language.lora.rank:
            names.add("language")
    names.discard("nothing")
    return tuple(part for part in config.parts if part in names)
