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

TEXT: dict[str, Any] = {
    "context_length": 8,
    "vocab_size": 50,
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 1,
}
EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 16,
}
LLAMA: dict[str, Any] = {"architecture": "llama", "width": 32, "depth": 2, "heads": 4}
LONG = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
GRID: dict[str, Any] = {"features": "grid", "resolution": 64}
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
    classes: dict[str, Any] = {
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
    """Write a Hugging Face decoder with the tokenizer of its kind into a folder of its own."""
    folder = folder / f"{kind}{'-modern' if modern else ''}{''.join(f'-{name}' for name in sizes)}"
    torch.manual_seed(3)
    tokenizer = bpe() if kind in ("gpt2", "opt") else sentencepiece(modern)
    ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    body: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
        **ids,
    }
    wide: dict[str, Any] = {**body, "intermediate_size": 64, "num_key_value_heads": 2, **sizes}
    classes: dict[str, Any] = {
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


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
    for adapter in model.language.adapters().values():
        adapter.data.add_(0.1 * torch.randn_like(adapter))
    head = model.language.model.get_output_embeddings().weight
    head.data[model.codec.eos_id] *= 3  # so that some texts end before they are cut
    path = folder / "model_best.pt"
    model.frozen = ()  # everything goes into the file
    save_checkpoint(path, model, run, step=9, epoch=0, metrics={"cider": 0.5})
    return path


def jpeg(seed: int, width: int, height: int) -> bytes:
    """Return a JPEG of soft noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=92)
    return file.getvalue()


def llava_case(folder: Path, case: str) -> dict[str, Any]:
    """Return the sections of a config that LLaVA can hold; its parts are written into `folder`."""
    cases: dict[str, Any] = {
        "openai clip, linear, small llama": lambda: {
            "vision": {"name": openai_file(folder), "features": "grid", "layers": [-2], "resolution": 96},
            "mapper": {"type": "linear"},
            "language": {"name": "small", "small": LLAMA},
        },
        "openai clip, linear as a pair of GELUs, small llama": lambda: {
            "vision": {"name": openai_file(folder), **GRID, "layers": [-1]},
            "mapper": {"type": "linear"},
            "language": {"name": "small", "small": {**LLAMA, "width": 136}},
            "data": {"resize": "squash"},
        },
        "clip of several layers, mlp2x_gelu, llama": lambda: {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "resolution": 96, "layers": [3, 1]},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "llama")},
        },
        "siglip, mlp2x_gelu, llama of the newer tokenizer": lambda: {
            "vision": {"name": encoder_folder(folder, "siglip"), "features": "grid", "layers": [-2], "resolution": 96},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "llama", modern=True, tie_word_embeddings=True)},
        },
        "siglip, linear, mistral": lambda: {
            "vision": {"name": encoder_folder(folder, "siglip"), **GRID, "layers": [-1]},
            "mapper": {"type": "linear"},
            "language": {"name": decoder_folder(folder, "mistral", rope_parameters=LONG)},
        },
        "clip, mlp2x_gelu, qwen2 with spare rows": lambda: {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "layers": [-2]},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "qwen2", vocab_size=320, tie_word_embeddings=True)},
        },
        "clip, linear, qwen3": lambda: {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "layers": [-1]},
            "mapper": {"type": "linear"},
            "language": {"name": decoder_folder(folder, "qwen3")},
        },
        "clip, mlp2x_gelu, llama with adapters": lambda: {
            "vision": {"name": encoder_folder(folder, "clip"), **GRID, "layers": [-2]},
            "mapper": {"type": "mlp2x_gelu"},
            "language": {"name": decoder_folder(folder, "llama"), "lora": {"rank": 4, "targets": ["all-linear"]}},
        },
    }
    return cases[case]()


LLAVAS = (
    "openai clip, linear, small llama",
    "openai clip, linear as a pair of GELUs, small llama",
    "clip of several layers, mlp2x_gelu, llama",
    "siglip, mlp2x_gelu, llama of the newer tokenizer",
    "siglip, linear, mistral",
    "clip, mlp2x_gelu, qwen2 with spare rows",
    "clip, linear, qwen3",
    "clip, mlp2x_gelu, llama with adapters",
)


def native_case(folder: Path, case: str) -> dict[str, Any]:
    """Return the sections of a config that no LLaVA can hold, by the part that stands in the way."""
    cases: dict[str, Any] = {
        "resnet, mlp, gpt2": lambda: {
            "vision": {"name": openai_file(folder, "rn"), "features": "pooled", "resolution": 64},
            "mapper": {"type": "mlp", "tokens": 3},
            "language": {"name": decoder_folder(folder, "gpt2")},
        },
        "openai clip, transformer, opt": lambda: {
            "vision": {"name": openai_file(folder), **GRID, "layers": [-2]},
            "mapper": {"type": "transformer", "tokens": 4, "heads": 2, "depth": 1},
            "language": {"name": decoder_folder(folder, "opt")},
        },
        "pooled clip, linearLn, llama": lambda: {
            "vision": {"name": encoder_folder(folder, "clip"), "features": "pooled"},
            "mapper": {"type": "linearLn"},
            "language": {"name": decoder_folder(folder, "llama")},
        },
        "vit, grid, small gpt2, bidirectional": lambda: {
            "vision": {"name": encoder_folder(folder, "vit"), **GRID, "resolution": 96},
            "mapper": {"type": "grid"},
            "language": {"name": "small", "prefix_attention": "bidirectional"},
        },
        "small encoder, small llama": lambda: {"language": {"name": "small", "small": LLAMA}},
    }
    return cases[case]()


NATIVES = (
    "resnet, mlp, gpt2",
    "openai clip, transformer, opt",
    "pooled clip, linearLn, llama",
    "vit, grid, small gpt2, bidirectional",
    "small encoder, small llama",
)
