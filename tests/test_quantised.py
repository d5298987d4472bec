"""8-bit and 4-bit decoders and LoRA: they learn, come back as they were, and refuse what cannot be."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, captions, collator

import train
from git_model.architecture import LanguageConfig, LoraConfig
from git_model.checkpoint import load_checkpoint, read_content
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.models.decoders import build_decoder
from git_model.models.lora import adapters, merge_adapters
from git_model.models.quantised import int8_product, load_quantised
from git_model.tasks.registry import run

ARCHITECTURES = ("llama", "opt", "gpt2")


def decoder_config(architecture: str) -> Any:
    from transformers import GPT2Config, LlamaConfig, OPTConfig

    width, depth, ids = 64, 2, {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0}
    if architecture == "gpt2":
        return GPT2Config(n_positions=128, n_embd=width, n_layer=depth, n_head=4, **ids)
    if architecture == "opt":
        sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width, "num_hidden_layers": depth}
        return OPTConfig(**sizes, num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, **ids)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": depth}
    return LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=128, **ids)


def save_decoder(architecture: str, folder: Path) -> Path:
    """Write a random decoder with a byte tokenizer, as a hub has it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoder_config(architecture))
    for parameter in model.parameters():  # the initial weights are too small to tell anything apart
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.12)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {a: save_decoder(a, tmp_path_factory.mktemp(a)) for a in ARCHITECTURES}


def trained(recipe: Path, decoder: Path, out: Path, *flags: str) -> list[float]:
    """Train a recipe on a frozen decoder; return the losses of its steps."""
    line = ["--config", str(recipe / "recipe.yml"), "--output_dir", str(out), "-lm", str(decoder), "--freeze", "auto"]
    train.train(read_flags([*line, "--lr", "0.01", "--epochs", "8", "--validate_every", "1000", *flags])[0])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("rank", [0, 4], ids=["mapper", "lora"])
def test_it_learns_and_comes_back(
    architecture: str, bits: int, rank: int, decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path
) -> None:
    flags = ["--lm_bits", str(bits), *(["--lora_rank", str(rank), "--freeze", "vision"] if rank else [])]
    losses = trained(tiny_tsv, decoders[architecture], tmp_path, *flags)
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])

    content = read_content(tmp_path / "model_latest.pt")
    own = [name for name in content["tensors"] if name.startswith("language.")]
    assert all(".lora_" in name for name in own), "the decoder's own weights are not saved"
    assert bool(own) == bool(rank)
    assert content["frozen"]["language"]["name"] == str(decoders[architecture])

    loaded = load_checkpoint(tmp_path / "model_latest.pt")
    saved = {name: t for name, t in content["tensors"].items() if ".lora_" in name}
    assert all(torch.equal(loaded.model.language.adapters()[n.removeprefix("language.")], t) for n, t in saved.items())
    batch = collator(loaded.model)([captions("a red thing")])
    again = load_checkpoint(tmp_path / "model_latest.pt").model
    with torch.no_grad():
        assert torch.equal(loaded.model(batch), again(batch)), "quantised twice, the same weights"
    asked = collator(loaded.model, generate=True)([captions("x"), captions("x", seed=1)])
    texts = loaded.model.generate(asked)
    assert len(texts) == 2
    assert texts == again.generate(asked)


def test_an_interrupted_run_ends_with_the_same_adapters(
    decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path
) -> None:
    flags = ["--lm_bits", "8", "--lora_rank", "4", "--lora_dropout", "0.1", "--schedule", "constant"]
    whole = trained(tiny_tsv, decoders["llama"], tmp_path / "whole", *flags, "--epochs", "4")
    trained(tiny_tsv, decoders["llama"], tmp_path / "parts", *flags, "--epochs", "2")
    assert trained(tiny_tsv, decoders["llama"], tmp_path / "parts", *flags, "--epochs", "4") == whole
    ends = [read_content(tmp_path / name / "model_latest.pt")["tensors"] for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("bits", [16, 8])
def test_checkpointed_activations_change_nothing(
    bits: int, decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path
) -> None:
    flags = ["--lm_bits", str(bits), "--lora_rank", "4", "--epochs", "1"]
    plain = trained(tiny_tsv, decoders["llama"], tmp_path / "plain", *flags)
    less = trained(tiny_tsv, decoders["llama"], tmp_path / "less", *flags, "--gradient_checkpointing")
    assert less == pytest.approx(plain, rel=1e-5)


def int8_layer(decoder: Path, how: str, dtype: torch.dtype) -> Any:
    from bitsandbytes.nn import Linear8bitLt

    model = load_quantised(LanguageConfig(name=str(decoder), bits=8, int8=how), dtype, torch.device("cpu"))
    return next(m for m in model.modules() if isinstance(m, Linear8bitLt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_products_are_those_of_bitsandbytes(decoders: dict[str, Path], dtype: torch.dtype) -> None:
    """Both ways, to the bit, forward and backward; the other side is the package's own autograd functions."""
    from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt

    for how, other in (("dequantised", MatMul8bitFp), ("llm.int8", MatMul8bitLt)):
        layer = int8_layer(decoders["opt"], how, dtype)
        results: list[tuple[Any, Any]] = []
        for ours in (True, False):
            x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            bias = layer.bias.to(dtype)
            y = layer(x) if ours else other.apply(x, layer.weight, None, bias, layer.state)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
            results.append((y.detach(), x.grad))
        assert torch.equal(results[0][0], results[1][0]), how
        assert torch.equal(results[0][1], results[1][1]), how


@pytest.mark.parametrize("how", ["llm.int8", "dequantised"])
def test_checkpointed_activations_are_freed(how: str, decoders: dict[str, Path]) -> None:
    """bitsandbytes' own function keeps its inputs where checkpointing cannot free them."""
    config = LanguageConfig(name=str(decoders["llama"]), bits=8, int8=how)
    model = build_decoder(config, None).requires_grad_(False).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    seen: list[Any] = []
    for name, layer in model.named_modules():
        if name.endswith("down_proj"):
            layer.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    embeds = torch.randn(1, 6, 64).requires_grad_()
    out = model(inputs_embeds=embeds, use_cache=False).logits.sum()
    gc.collect()
    assert len(seen) == 2
    assert not [reference for reference in seen if reference() is not None]
    out.backward()
    assert embeds.grad is not None


def test_no_line_for_every_layer(decoders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes logs each cast: hundreds of lines a token of a big model."""
    model = build_decoder(LanguageConfig(name=str(decoders["llama"]), bits=8, int8="llm.int8", dtype="bfloat16"), None)
    logits(model)
    assert "bitsandbytes" not in " ".join(record.name for record in caplog.records)


def test_bitsandbytes_own_product_trains_too(decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path) -> None:
    flags = ["--lm_bits", "8", "--set", "language.int8=llm.int8", "--lora_rank", "4"]
    losses = trained(tiny_tsv, decoders["llama"], tmp_path, *flags)
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def v100(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100-SXM2-32GB")
    return torch.device("cuda")


def test_a_v100_has_no_int8_arithmetic(v100: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    assert int8_product("auto", v100) == "dequantised"
    assert "Tesla V100-SXM2-32GB has compute capability 7.0, LLM.int8() needs 7.5" in caplog.text
    assert "--lm_bits 4 (NF4)" in caplog.text
    assert int8_product("dequantised", v100) == "dequantised"
    with pytest.raises(UserError, match=r"needs 7\.5; choose --lm_bits 4 \(NF4\), or --set language.int8=dequantised"):
        int8_product("llm.int8", v100)


def test_newer_cards_have_it_and_cpus_imitate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert int8_product("auto", torch.device("cuda")) == "llm.int8"
    assert int8_product("auto", torch.device("cpu")) == "dequantised"
    assert int8_product("llm.int8", torch.device("cpu")) == "llm.int8"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bits", [8, 4])
def test_saving_after_a_forward_leaves_the_weights_alone(
    architecture: str, bits: int, decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path
) -> None:
    """bitsandbytes 0.50 packs NF4 weights anew in a CPU's first forward; asked for their bytes then, it spoils them."""
    config = LanguageConfig(name=str(decoders[architecture]), bits=bits, lora=LoraConfig(rank=2))
    model = build_decoder(config, None)
    before = logits(model)
    held = model.state_dict()  # harmless with our settings, and nothing of ours asks for it
    assert torch.equal(logits(model), before)
    assert held


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merged_adapters_say_the_same(architecture: str, decoders: dict[str, Path]) -> None:
    config = LanguageConfig(name=str(decoders[architecture]), lora=LoraConfig(rank=4, targets=("all-linear",)))
    model = build_decoder(config, None)
    added = adapters(model)
    for parameter in added.values():
        parameter.data.normal_(0, 0.1)
    before, plain = logits(model), logits(build_decoder(LanguageConfig(name=config.name), None))
    assert not torch.allclose(before, plain, atol=1e-2)
    merge_adapters(model)
    assert not adapters(model)
    assert torch.allclose(logits(model), before, atol=1e-4)


def test_gradients_pass_through_4_bits_after_a_forward_without_them(decoders: dict[str, Path]) -> None:
    """A validation between two steps: bitsandbytes' packed weights would give no gradient from then on."""
    model = build_decoder(LanguageConfig(name=str(decoders["llama"]), bits=4), None).requires_grad_(False).eval()
    gradients: list[Any] = []
    for _ in range(2):
        embeds = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        model(inputs_embeds=embeds).logits.square().sum().backward()
        gradients.append(embeds.grad)
        logits(model)
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[1])


def test_what_was_trained_on_4_bits_is_merged_into_16(
    decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tiny_tsv, decoders["llama"], tmp_path, "--lm_bits", "4", "--lora_rank", "4")
    whole = load_checkpoint(tmp_path / "model_latest.pt", bits=16)
    assert whole.config.language.bits == 16
    batch = collator(whole.model)([captions("a red thing")])
    before = float(whole.model(batch).detach())
    whole.model.language.merge_adapters()
    assert float(whole.model(batch).detach()) == pytest.approx(before, rel=1e-5)
    assert {p.dtype for p in whole.model.language.parameters()} == {torch.float32}
    assert "are not those this model was trained on" not in caplog.text

    task = {"type": "export", "model_path": tmp_path / "model_latest.pt", "out_dir": tmp_path / "out"}
    assert run(task)["format"] == "native"
    exported = load_checkpoint(tmp_path / "out")
    assert (exported.config.language.bits, exported.config.language.lora.rank) == (16, 0)
    with torch.no_grad():
        assert float(exported.model(batch)) == pytest.approx(before, rel=1e-5)


def test_another_base_is_noticed(
    decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_decoder("llama", tmp_path / "base")
    trained(tiny_tsv, base, tmp_path / "run", "--lm_bits", "4", "--lora_rank", "4", "--epochs", "1")
    load_checkpoint(tmp_path / "run" / "model_latest.pt")
    assert "are not those" not in caplog.text
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    load_checkpoint(tmp_path / "run" / "model_latest.pt")
    assert f"the language weights of '{base}' are not those this model was trained on" in caplog.text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lm_bits", "7"], "7 is not one of: 16, 8, 4"),
        (["--lm_bits", "8", "-lm", "small"], "--lm_bits 8 is for pretrained language models"),
        (["--lora_rank", "8", "-lm", "small"], "--lora_rank 8 is for pretrained language models"),
        (["--lm_bits", "8", "--freeze", "nothing"], "weights of 8 bits cannot be trained: --lora_rank 8"),
        (["--lora_rank", "8", "--freeze", "language"], "leave 'language' out of --freeze"),
        (["--set", "language.int8=fast"], "one of: auto, llm.int8, dequantised"),
        (["--lora_targets", "q_proj"], "do nothing without --lora_rank"),
        (["--lora_alpha", "32"], "do nothing without --lora_rank"),
        (["--lora_rank", "-1"], "language.lora.rank -1 is below 0"),
    ],
)
def test_what_cannot_be_is_said_when_the_flags_are_read(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        read_flags(["-lm", "gpt2", "-mpt", "mlp", *flags])


def test_a_target_that_is_no_layer(decoders: dict[str, Path]) -> None:
    config = LanguageConfig(name=str(decoders["llama"]), lora=LoraConfig(rank=4, targets=("q_prj",)))
    with pytest.raises(UserError, match=r"'q_prj' \(did you mean 'q_proj'\?\).*down_proj.*; or all-linear"):
        build_decoder(config, None)


def test_the_report_tells_the_peak(decoders: dict[str, Path], tiny_tsv: Path, tmp_path: Path) -> None:
    """How it compares between numbers of bits: benchmarks/quantised.py."""
    trained(tiny_tsv, decoders["llama"], tmp_path, "--lm_bits", "8", "--epochs", "1")
    assert json.loads((tmp_path / "run_report.json").read_text())["peak_memory_bytes"] > 1e8
