"""A trained decoder (LLaMA, 260K parameters): its published text, and a mapper trained under it while frozen."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import train
from git_model.architecture import LanguageConfig
from git_model.datasets.collate import Collator, Loaded, Target
from git_model.flags import read_flags
from git_model.models.decoders import build_decoder
from git_model.models.language import Decoding, LanguageModel
from git_model.tokens import TextCodec, load_tokenizer


def read_llama2c(path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Read llama2.c's float32 file (its export.py, version 0) into Hugging Face names."""
    data = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack("7i", data[:28])
    sizes = {"dim": dim, "hidden": hidden, "layers": layers, "heads": heads, "kv": kv_heads, "vocab": vocab}
    numbers, at = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return numbers[at - count : at].reshape(shape)

    def halves(weight: Tensor, count: int) -> Tensor:
        """llama2.c turns neighbouring pairs, Hugging Face the two halves of a head."""
        return weight.reshape(count, -1, 2, dim).transpose(1, 2).reshape(weight.shape)

    width = dim // heads * kv_heads
    out = {"model.embed_tokens.weight": take(vocab, dim)}
    stacks = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, width, dim),
        "self_attn.v_proj": take(layers, width, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    for name, stack in stacks.items():
        for layer, weight in enumerate(stack):
            turned = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            out[f"model.layers.{layer}.{name}.weight"] = halves(weight, turned) if turned else weight
    out["model.norm.weight"] = take(dim)
    out["lm_head.weight"] = out["model.embed_tokens.weight"]
    return sizes | {"positions": positions}, out


def read_tokenizer(path: Path, size: int) -> Any:
    """Turn llama2.c's tokenizer file into a Hugging Face one: a sentencepiece BPE with byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    data, at, pieces = path.read_bytes(), 4, []
    for _ in range(size):
        _, length = struct.unpack_from("fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode("utf-8").replace(" ", "\u2581"))
        at += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    ids = {piece: i for i, piece in enumerate(pieces)}
    assert len(ids) == size
    merges = [(p[:k], p[k:]) for p in pieces[259:] for k in range(1, len(p)) if p[:k] in ids and p[k:] in ids]
    bpe = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(t, special=True) for t in pieces[:3]])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def stories(reference_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published weights as a Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = reference_data / "data" / "weights" / "stories260K"
    sizes, weights = read_llama2c(folder / "stories260K.bin")
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["dim"],
        intermediate_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        max_position_embeddings=sizes["positions"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    out = tmp_path_factory.mktemp("stories")
    model.save_pretrained(out)
    read_tokenizer(folder / "tok512.bin", sizes["vocab"]).save_pretrained(out)
    return out


def published(reference_data: Path) -> str:
    text = (reference_data / "data" / "weights" / "stories260K" / "stories260K.md").read_text(encoding="utf-8")
    return text[text.index("Once upon a time") :].split("```")[0]


def test_it_continues_its_published_text(stories: Path, reference_data: Path) -> None:
    tokenizer = load_tokenizer(str(stories))
    language = LanguageModel(build_decoder(LanguageConfig(name=str(stories)), tokenizer), str(stories)).eval()
    codec = TextCodec(tokenizer, language.vocab_size)
    assert codec.bos_ids == [1]
    batch = Collator(codec, 0, generate=True)([Loaded("empty", (), (Target("", "", 0),))])
    assert batch.input_ids.tolist() == [[1]]
    embeds = language.embed(batch, torch.zeros(0, 0, language.dim))
    ids = language.generate(embeds, batch, Decoding(max_new_tokens=120), codec.eos_id, codec.pad_id).ids
    text = codec.decode(ids[0].tolist())
    assert len(text) > 250
    assert published(reference_data).startswith(text)


def test_a_mapper_trained_under_the_frozen_decoder_lowers_the_loss(
    stories: Path, tiny_tsv: Path, tmp_path: Path
) -> None:
    flags = ["--config", str(tiny_tsv / "recipe.yml"), "--output_dir", str(tmp_path), "-lm", str(stories)]
    train.train(read_flags([*flags, "--freeze", "auto", "--epochs", "10", "--lr", "0.01"])[0])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    content = torch.load(tmp_path / "model_latest.pt", weights_only=True)
    assert {name.split(".")[0] for name in content["tensors"]} == {"vision", "mapper"}, "the decoder is not saved"
    assert content["frozen"]["language"]["name"] == str(stories)
