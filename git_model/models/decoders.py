"""Which causal language model: a Hugging Face one by name, or a small one of a real architecture."""

from __future__ import annotations

import logging
from typing import Any

import torch

from git_model.architecture import LanguageConfig
from git_model.errors import UserError
from git_model.models.hub import check_name
from git_model.models.lora import add_adapters, chosen_targets


def build_decoder(
    config: LanguageConfig, tokenizer: Any, load_weights: bool = True, device: torch.device | str = "cpu"
) -> Any:
    """Return the Hugging Face causal LM of `config`, on the CPU; a quantised one on `device`.

    Args:
        config: which, of how many bits, with which adapters.
        tokenizer: of a small one; its vocabulary decides the sizes.
        load_weights: False builds the architecture alone.
        device: where quantised weights are made: they had better not be moved.

    Raises:
        UserError: no such model, or one that is no causal LM; adapters for layers that it lacks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.name == "small":
        return AutoModelForCausalLM.from_config(small_decoder_config(config, tokenizer), dtype=dtype)
    check_name(config.name, "language model")
    try:
        if not load_weights:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.name), dtype=dtype)
            fuse_activations(model)
            return model
        targets: tuple[str, ...] = ()
        if config.bits < 16 or config.lora.rank:
            quiet_bitsandbytes()
        if config.lora.rank:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.name))
            targets = chosen_targets(skeleton, config.lora)
        if config.bits < 16:
            from git_model.models.quantised import load_quantised

            model = load_quantised(config, dtype, torch.device(device))
        else:
            model = AutoModelForCausalLM.from_pretrained(config.name, dtype=dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the language model '{config.name}': {reason}") from error
    if config.lora.rank:
        add_adapters(model, config.lora, targets)
    fuse_activations(model)
    return model


def fuse_activations(model: Any) -> None:
    """Let GPT-2's own GELU run as torch's tanh approximation: the same function, one operation for eight."""
    from transformers.activations import NewGELUActivation

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def quiet_bitsandbytes() -> None:
    """Keep its notes to itself: of a package that makes CPUs faster, and of every layer's casts at every token."""
    for name in ("backends.cpu.ops", "autograd._functions"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)


def decoder_width(config: LanguageConfig) -> int:
    """Return E of a decoder without loading its weights.

    Raises:
        UserError: no such model.
    """
    from transformers import AutoConfig

    if config.name == "small":
        return config.small.width
    check_name(config.name, "language model")
    try:
        found = AutoConfig.from_pretrained(config.name).get_text_config()
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the language model '{config.name}': {reason}") from error
    return int(getattr(found, "word_embed_proj_dim", None) or found.hidden_size)


def small_decoder_config(config: LanguageConfig, tokenizer: Any) -> Any:
    """Return the Hugging Face config of a small decoder with the tokenizer's vocabulary."""
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    small = config.small
    spread = small.width**-0.5  # the libraries' 0.02 is for widths near 1,000: here attention would start out blind
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
            initializer_range=spread,
            activation_function="gelu_pytorch_tanh",  # GPT-2's own gelu_new in one kernel
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
            init_std=spread,
            **ids,
        )
    return LlamaConfig(
        hidden_size=small.width,
        intermediate_size=8 * small.width // 3,
        num_hidden_layers=small.depth,
        num_attention_heads=small.heads,
        max_position_embeddings=small.positions,
        tie_word_embeddings=True,
        initializer_range=spread,
        **ids,
    )
