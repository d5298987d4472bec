"""Trained models of real architectures with random weights, as the checkpoints that `export` reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tiny import config
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from git_model.checkpoint import save_checkpoint
from git_model.models.build import build_model
from git_model.models.openai_clip import _network
from git_model.tokens import train_tokenizer

TEXT = {"context_length": 8, "vocab_size": 50, "transformer_width": 64, "transformer_heads": 1, "transformer_layers": 1}
EYE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 16}
LLAMA_TYPE = {"name": "small", "small": {"architecture": "llama", "width": 32, "depth": 2, "heads": 4}}
PROMPTS = ("", "what color is it?", "is it red")


def openai_file(folder: Path, kind: str = "vit") -> str:
    """Write openai-clip's own network, its state dict in the official layout."""
    sizes: dict[str, Any] = {"vision_layers": 3, "vision_width": 64, "vision_patch_size": 16}
    if kind == "rn":
        sizes = {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_patch_size": None}
    torch.manual_seed(1)
    clip = _network().CLIP(embed_dim=48, image_resolution=64, **sizes, **TEXT)
    shake(clip.visual, 0.05)
    torch.save(clip.state_dict(), folder / f"{kind}.pt")
    return str(folder / f"{kind}.pt")


def encoder_folder(folder: Path, kind: str) -> str:
    """Write a Hugging Face encoder."""
    torch.manual_seed(2)
    classes = {
        "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**EYE, image_size=64)),
        "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**EYE, image_size=64)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**EYE, image_size=64), add_pooling_layer=False),
    }
    model: Any = classes[kind]()
    shake(model, 0.1)
    model.save_pretrained(folder / kind)
    return str(folder / kind)


def sentencepiece(modern: bool) -> Any:
    """LLaMA's kind of tokenizer: BPE with byte fallback, words marked where they start, <s> before a text.

    Args:
        modern: the mark comes from a Metaspace pre-tokenizer for the first piece only (legacy=False), not a normalizer.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdefghijklmnopqrstuvwxyz?"]
    pieces += ["\u2581w", "\u2581i", "ha", "re", "\u2581is", "\u2581wha", "\u2581what", "at", "red", "or", "lor"]
    merges = [("\u2581", "w"), ("\u2581", "i"), ("h", "a"), ("r", "e"), ("\u2581i", "s"), ("\u2581w", "ha"), ("a", "t")]
    merges += [("\u2581wha", "t"), ("re", "d"), ("o", "r"), ("l", "or")]
    bpe: Any = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if modern:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(t, special=True) for t in pieces[:3]])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def decoder_folder(folder: Path, kind: str, modern: bool = False, **sizes: Any) -> str:
    """Write a Hugging Face decoder with the tokenizer of its kind."""
    torch.manual_seed(3)
    tokenizer = bpe() if kind in ("gpt2", "opt") else sentencepiece(modern)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tokenizer), **ids}
    wide = {**body, "intermediate_size": 64, "num_key_value_heads": 2, **sizes}
    classes = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**wide)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**wide)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**wide)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**wide, head_dim=8)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, vocab_size=len(tokenizer), **ids)
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**body, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=128)
        ),
    }
    model: Any = classes[kind]()
    shake(model, 0.2)
    model.save_pretrained(folder / kind)
    tokenizer.save_pretrained(folder / kind)
    return str(folder / kind)


def bpe() -> Any:
    """The tokenizer that training makes of its data."""
    return train_tokenizer(["what color is it? it is red", "a red circle", "a blue square is small"] * 4, 290)


def shake(model: torch.nn.Module, strength: float) -> None:
    """Give every weight a value of its own: the initial ones hide errors (zeros, ones, numbers near nothing)."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(strength * torch.randn_like(parameter))


def checkpoint(folder: Path, **sections: Any) -> Path:
    """Train nothing, save a checkpoint: random parts of the named architectures; return its path."""
    run = config(**sections)
    model = build_model(run, bpe() if run.language.name == "small" else None).eval()
    torch.manual_seed(4)
    shake(model.mapper, 0.1)
    if run.language.name == "small":
        shake(model.language, 0.2)
    head = model.language.model.get_output_embeddings().weight
    head.data[model.codec.eos_id] *= 3  # so that some texts end before they are cut
    path = folder / "model_best.pt"
    model.frozen = ()  # everything goes into the file
    save_checkpoint(path, model, run, step=9, epoch=0, metrics={"cider": 0.5})
    return path


def jpeg(path: Path, seed: int, width: int, height: int) -> Path:
    """Write a JPEG of soft noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).save(path, "JPEG", quality=92)
    return path


def jpeg_bytes(seed: int, width: int, height: int) -> bytes:
    """Return the bytes of such a JPEG."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=92)
    return file.getvalue()
