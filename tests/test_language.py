"""Parity with plain Hugging Face, causality, GIT's mask, packing, batch == single."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import DECODERS, byte_ids, captions, codec, language_model, picture
from torch import Tensor

from git_model.batch import IGNORE_INDEX, CaptionBatch, Target
from git_model.datasets.collate import Collator, Loaded
from git_model.errors import UserError
from git_model.models.language import Decoding, LanguageModel

K = 3
MODES = ("causal", "bidirectional")
EOS = 0


def image_tokens(count: int, seed: int = 5) -> Tensor:
    return torch.randn(count, K, 32, generator=torch.Generator().manual_seed(seed))


def embeds_of(language: LanguageModel, batch: CaptionBatch, seed: int = 5) -> Tensor:
    return language.embed(batch, image_tokens(len(batch.images), seed))


@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_loss_equals_plain_hugging_face(architecture: str) -> None:
    language = language_model(architecture)
    batch = Collator(codec(), K)([captions("a cat"), captions("two black dogs", seed=1)])
    embeds = embeds_of(language, batch)
    plain = language.model(inputs_embeds=embeds, attention_mask=batch.attention_mask.long(), labels=batch.labels).loss
    torch.testing.assert_close(language.loss(embeds, batch), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["Qwen2", "Gemma2", "Granite", "Cohere", "GPTNeoX", "Phi"])
def test_other_decoders_and_their_scaled_heads(model_type: str) -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "num_key_value_heads": 2, "head_dim": 8}
    extra = {"Granite": {"logits_scaling": 3.0}, "Cohere": {"logit_scale": 0.3}}.get(model_type, {})
    config = getattr(transformers, f"{model_type}Config")(vocab_size=257, **sizes, **special, **extra)
    language = LanguageModel(getattr(transformers, f"{model_type}ForCausalLM")(config).eval(), model_type)
    batch = Collator(codec(), K)([captions("a cat"), captions("two black dogs", seed=1)])
    embeds = embeds_of(language, batch)
    plain = language.model(inputs_embeds=embeds, attention_mask=batch.attention_mask.long(), labels=batch.labels).loss
    torch.testing.assert_close(language.loss(embeds, batch), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_a_later_token_never_changes_an_earlier_one(architecture: str, mode: str) -> None:
    language = language_model(architecture, mode)
    batch = Collator(codec(), K)([captions("abcdef")])
    embeds = embeds_of(language, batch)
    before = language.hidden(embeds, batch)
    noise = torch.randn(embeds.shape[-1])  # a constant would be undone by the first LayerNorm
    for position in range(K, embeds.shape[1]):  # text tokens
        changed = embeds.clone()
        changed[:, position] += noise
        after = language.hidden(changed, batch)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert (after[:, position:] - before[:, position:]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_image_tokens_see_each_other_only_when_bidirectional(architecture: str) -> None:
    moved = {}
    for mode in MODES:
        language = language_model(architecture, mode)
        batch = Collator(codec(), K)([captions("ab")])
        embeds = embeds_of(language, batch)
        changed = embeds.clone()
        changed[:, K - 1] += torch.randn(embeds.shape[-1])  # the last image token
        moved[mode] = (language.hidden(changed, batch) - language.hidden(embeds, batch))[:, 0].abs().max()
    assert moved["causal"] < 1e-6
    assert moved["bidirectional"] > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_packed_rows_equal_separate_rows(architecture: str, mode: str) -> None:
    language = language_model(architecture, mode)
    sample = captions("a cat", "a black cat sits", "c")
    asked = replace(sample, targets=(*sample.targets, Target("no", "a dog?", 1)))
    losses = []
    for pack in (False, True):
        batch = Collator(codec(), K, pack=pack)([asked, captions("two dogs", key="b", seed=1)])
        losses.append(language.loss(embeds_of(language, batch), batch))
        assert len(batch.input_ids) == (2 if pack else 5)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_padding_changes_nothing(architecture: str, mode: str) -> None:
    language = language_model(architecture, mode)
    alone = Collator(codec(), K)([captions("abc")])
    padded = Collator(codec(), K)([captions("abc"), captions("a much longer caption", seed=1)])
    row = language.hidden(embeds_of(language, alone), alone)[0]
    first = language.hidden(embeds_of(language, padded), padded)[0, : len(row)]
    torch.testing.assert_close(first, row, rtol=1e-5, atol=1e-5)


def asks(*prompts: str) -> list[Loaded]:
    return [Loaded(p, (picture(i),), (Target("", p, i),)) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("decoding", [Decoding(max_new_tokens=12), Decoding(beams=3, max_new_tokens=12)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", DECODERS)
def test_batch_equals_single(architecture: str, mode: str, decoding: Decoding) -> None:
    language, items = language_model(architecture, mode), asks("", "is it?", "how many of them are there")
    collate = Collator(codec(), K, generate=True)

    def texts(batch: CaptionBatch, tokens: Tensor) -> list[str]:
        ids = language.generate(language.embed(batch, tokens), batch, decoding, EOS, EOS).ids
        return [codec().decode(row) for row in ids.tolist()]

    tokens = image_tokens(len(items))
    together = texts(collate(items), tokens)
    alone = [texts(collate([item]), tokens[i : i + 1])[0] for i, item in enumerate(items)]
    assert together == alone
    assert len(set(together)) > 1, "the prompts matter"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", DECODERS)
@torch.no_grad()
def test_greedy_decoding_is_the_argmax_of_the_training_forward(architecture: str, mode: str) -> None:
    """Generation's cache, left padding and mask give what the training forward gives token by token."""
    language = language_model(architecture, mode)
    batch = Collator(codec(), K, generate=True)(asks("ab", "a longer one"))
    tokens = image_tokens(2)
    said = language.generate(language.embed(batch, tokens), batch, Decoding(max_new_tokens=6), EOS, EOS).ids
    for row, prompt in enumerate(("ab", "a longer one")):
        ids = list(byte_ids(prompt))
        for step in range(said.shape[1]):
            text = ids + said[row, :step].tolist()
            single = Collator(codec(), K, generate=True)(asks(prompt))
            grown = replace(
                single,
                input_ids=torch.tensor([[EOS] * K + text]),
                image_mask=torch.tensor([[True] * K + [False] * len(text)]),
                attention_mask=torch.ones(1, K + len(text), dtype=torch.bool),
                segments=torch.tensor([[0] * K + [1] * len(text)]),
                positions=torch.arange(K + len(text)).unsqueeze(0),
            )
            hidden = language.hidden(language.embed(grown, tokens[row : row + 1]), grown)
            assert int(language.project(hidden[0, -1]).argmax()) == int(said[row, step])
            if int(said[row, step]) == EOS:
                break


def test_lengths_of_answers() -> None:
    language = language_model("gpt2")
    batch = Collator(codec(), K, generate=True)(asks("a"))
    embeds = language.embed(batch, image_tokens(1))
    ids = language.generate(embeds, batch, Decoding(min_new_tokens=9, max_new_tokens=9), EOS, EOS).ids
    assert ids.shape == (1, 9)
    assert EOS not in ids[0, :8].tolist()


def test_sampling_is_repeatable_and_varied() -> None:
    language = language_model("gpt2")
    batch = Collator(codec(), K, generate=True)(asks("a"))
    embeds = language.embed(batch, image_tokens(1))

    def draw(seed: int) -> list[int]:
        decoding = Decoding(sample=True, temperature=2.0, seed=seed, max_new_tokens=10)
        return language.generate(embeds, batch, decoding, EOS, EOS).ids[0].tolist()

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(5)}) > 1


def test_too_long_for_the_position_table_is_a_sentence() -> None:
    language = language_model("gpt2")
    batch = Collator(codec(300), K)([captions("x" * 200)])
    with pytest.raises(UserError, match="204"):
        language.loss(embeds_of(language, batch), batch)


def test_bad_decoding_is_refused() -> None:
    with pytest.raises(UserError, match="beams 0"):
        Decoding(beams=0)
    with pytest.raises(UserError, match="top_p"):
        Decoding(sample=True, top_p=0)


def test_label_smoothing_is_cross_entropys() -> None:
    language = language_model("gpt2")
    batch = Collator(codec(), K)([captions("abc")])
    embeds = embeds_of(language, batch)
    logits = language.model(inputs_embeds=embeds).logits[:, :-1].flatten(0, 1)
    wanted = F.cross_entropy(logits, batch.labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, label_smoothing=0.1)
    language.label_smoothing = 0.1
    torch.testing.assert_close(language.loss(embeds, batch), wanted, rtol=1e-5, atol=1e-5)


def test_a_hubs_generation_settings_do_not_leak_into_greedy() -> None:
    from transformers import GenerationConfig

    batch = Collator(codec(), K, generate=True)(asks("a"))
    said = []
    for penalty in (None, 50.0):
        language = language_model("gpt2")
        language.model.generation_config = GenerationConfig(repetition_penalty=penalty, no_repeat_ngram_size=1)
        language = LanguageModel(language.model, "small")
        embeds = language.embed(batch, image_tokens(1))
        said.append(language.generate(embeds, batch, Decoding(max_new_tokens=12), EOS, EOS).ids.tolist())
    assert said[0] == said[1]
