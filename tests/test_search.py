"""The search over shared prefixes says what transformers' `generate` says."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoConfig, GPTNeoXConfig, MistralConfig

from git_model.batch import Target
from git_model.datasets.collate import Collator, Loaded
from git_model.models.answers import AnswerTrie
from git_model.models.language import Decoding, LanguageModel
from git_model.models.prompts import follows_masks
from git_model.models.search import Tree, nucleus
from tests.tiny import DECODERS, captions, codec, git_model, language_model, picture

EOS, K = 256, 3
PROMPTS = ("", "is it?", "how many of them are there", "and what", "why", "", "of which colour is the small one")
SEARCHES = {
    "greedy": Decoding(max_new_tokens=14),
    "greedy, long": Decoding(max_new_tokens=14, min_new_tokens=5),
    "2 beams": Decoding(beams=2, max_new_tokens=14),
    "4 beams": Decoding(beams=4, max_new_tokens=14),
    "4 beams, long": Decoding(beams=4, max_new_tokens=14, min_new_tokens=4, length_penalty=2.0),
    "5 beams, short": Decoding(beams=5, max_new_tokens=9, length_penalty=-1.0),
    "3 beams, no penalty": Decoding(beams=3, max_new_tokens=9, length_penalty=0.0),
    "one token": Decoding(beams=3, max_new_tokens=1),
}


def ending(language: LanguageModel, bonus: float = 3.0) -> LanguageModel:
    """Make texts end at different lengths: of random weights hardly any would."""
    head = language.model.get_output_embeddings()
    with torch.no_grad():
        own = torch.nn.Linear(head.in_features, head.out_features)
        own.weight.copy_(head.weight)
        own.bias.zero_()
        own.bias[EOS] = bonus
    language.model.set_output_embeddings(own)
    return language


def asked(prompts: tuple[str, ...], pictures: int) -> list[Loaded]:
    """Each picture is asked some of the prompts, in order."""
    items = [Loaded(str(i), (picture(i),), ()) for i in range(pictures)]
    for number, prompt in enumerate(prompts):
        at = number * pictures // len(prompts)
        items[at] = replace(items[at], targets=(*items[at].targets, Target("", prompt, number)))
    return items


def image_tokens(pictures: int, width: int = 32) -> Tensor:
    """Random image tokens (I,K,E)."""
    return torch.randn(pictures, K, width, generator=torch.Generator().manual_seed(5))


def said(
    language: LanguageModel, decoding: Decoding, pictures: int, *, plain: bool, pack: bool = True
) -> list[list[int]]:
    """Return the ids of every answer, to the end token."""
    return found(language, decoding, pictures, plain=plain, pack=pack)[0]


def found(
    language: LanguageModel, decoding: Decoding, pictures: int, *, plain: bool, pack: bool = True
) -> tuple[list[list[int]], list[float]]:
    """Return the ids of every answer, to the end token, and its score."""
    batch = Collator(codec(), K, generate=True, pack=pack and not plain)(asked(PROMPTS, pictures))
    embeds = language.embed(batch, image_tokens(pictures))
    how = language.reference if plain else language.generate
    ids, scores = how(embeds, batch, decoding, EOS, EOS, scored=True)
    assert scores is not None
    return [row[: row.index(EOS)] if EOS in row else row for row in ids.tolist()], scores.tolist()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("mode", ["causal", "bidirectional"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_texts_are_those_of_transformers(architecture: str, mode: str, search: str) -> None:
    language, decoding = ending(language_model(architecture, mode)), SEARCHES[search]
    expected, scores = found(language, decoding, 3, plain=True)
    assert language.branches
    for pack in (True, False):  # prompts that share a picture's tokens; left-padded rows
        ids, own = found(language, decoding, 3, plain=False, pack=pack)
        assert ids == expected
        assert own == pytest.approx(scores, abs=1e-4)
    if decoding.max_new_tokens > 1 and not decoding.min_new_tokens:
        assert len({len(ids) for ids in expected}) > 1, "some end before others"


@pytest.mark.parametrize("search", ["greedy", "4 beams"])
def test_when_the_time_is_over_a_text_ends_with_what_there_is(search: str) -> None:
    language, decoding = ending(language_model("gpt2")), SEARCHES[search]
    assert found(language, replace(decoding, max_time=600.0), 3, plain=False) == found(
        language, decoding, 3, plain=False
    )
    one = said(language, replace(decoding, max_new_tokens=1), 3, plain=False)
    ended = found(language, replace(decoding, max_time=0.0), 3, plain=False)
    assert [ids[:1] for ids in ended[0]] == one
    alone = found(language, replace(decoding, max_new_tokens=1), 3, plain=False)[1]
    assert ended[1] == pytest.approx(alone, abs=1e-5), "the mean of one token"


@pytest.mark.parametrize("beams", [1, 4])
def test_answers_from_a_list(beams: int) -> None:
    language = language_model("gpt2", seed=3)
    texts = ("yes", "no", "a cat", "a car", "a cart")
    trie = AnswerTrie({text: [*codec().tokenizer(text)["input_ids"], EOS] for text in texts}, EOS)
    decoding = Decoding(beams=beams, answers=trie)
    expected = said(language, decoding, 2, plain=True)
    assert said(language, decoding, 2, plain=False) == expected
    assert all(trie.text([*ids, EOS]) in texts for ids in expected)


def grown(config: Any) -> LanguageModel:
    """A random decoder of another family."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.25)
    return LanguageModel(model, "random").eval()


SIZES = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_grouped_heads_and_other_families() -> None:
    mistral = MistralConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, sliding_window=None)
    for config in (mistral, GPTNeoXConfig(**SIZES, intermediate_size=64)):
        language = ending(grown(config))
        assert language.branches
        for search in ("greedy", "4 beams"):
            expected = said(language, SEARCHES[search], 3, plain=True)
            assert said(language, SEARCHES[search], 3, plain=False) == expected


def test_a_window_is_left_to_transformers() -> None:
    sizes = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
    language = ending(grown(MistralConfig(**sizes, sliding_window=16)))
    assert language.branches
    expected = said(language, SEARCHES["greedy"], 7, plain=True)
    assert said(language, SEARCHES["greedy"], 7, plain=False, pack=False) == expected
    assert said(language, SEARCHES["greedy"], 3, plain=False) == said(language, SEARCHES["greedy"], 3, plain=True)


def test_masks_that_count_columns_are_left_to_transformers() -> None:
    """GPT-Neo's local layers look back a number of columns, of which a tree has more than tokens."""
    kinds = [[["global", "local"], 1]]
    config = GPTNeoConfig(
        vocab_size=257, hidden_size=32, num_layers=2, num_heads=4, attention_types=kinds, window_size=8
    )
    language = ending(grown(config))
    assert not language.branches
    assert said(language, SEARCHES["4 beams"], 3, plain=False) == said(language, SEARCHES["4 beams"], 3, plain=True)


def test_a_decoder_without_positions_is_asked_one_prompt_a_row() -> None:
    """BLOOM tells distances from the number of columns, which in a tree is not the number of tokens."""
    language = ending(grown(BloomConfig(vocab_size=257, hidden_size=32, n_layer=2, n_head=4)))
    assert not language.branches
    expected = said(language, SEARCHES["4 beams"], 3, plain=True)
    assert said(language, SEARCHES["4 beams"], 3, plain=False, pack=False) == expected
    assert said(language, SEARCHES["4 beams"], 3, plain=False) == expected, "packed rows are taken apart"
    batch = Collator(codec(), K, generate=True, pack=True)(asked(PROMPTS, 3))
    with pytest.raises(ValueError, match="one prompt a row"):
        language.reference(language.embed(batch, image_tokens(3)), batch, SEARCHES["4 beams"], EOS, EOS)


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_probe_notices_a_mask_that_is_ignored(architecture: str) -> None:
    language = language_model(architecture)
    assert follows_masks(language)

    def deaf(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None}

    with language.body.register_forward_pre_hook(deaf, with_kwargs=True):
        assert not follows_masks(language)


def test_the_picture_runs_once_and_what_is_through_leaves() -> None:
    """Tokens that go through the decoder: the prefix once a picture, then beams of what is not through yet."""
    language, sizes = ending(language_model("gpt2")), []
    decoding = Decoding(beams=4, max_new_tokens=14)
    batch = Collator(codec(), K, generate=True, pack=True)(asked(PROMPTS, 3))
    lengths = [len(ids) for ids in said(language, decoding, 3, plain=True)]
    assert language.branches  # tried out now

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.append(kwargs["inputs_embeds"].shape[:2].numel())

    with language.body.register_forward_pre_hook(note, with_kwargs=True):
        language.generate(language.embed(batch, image_tokens(3)), batch, decoding, EOS, EOS)
    assert sizes[0] == batch.input_ids.numel() == 3 * batch.input_ids.shape[1]
    assert sizes[1] == 3 * 3 * 4, "three pictures, at most three prompts each, four beams"
    assert min(lengths) < max(lengths)
    assert sizes[-1] < sizes[1]


def test_a_sample_does_not_depend_on_what_is_asked_beside_it() -> None:
    language = ending(language_model("llama"))
    for decoding in (
        Decoding(sample=True, temperature=1.5, seed=3, max_new_tokens=10),
        Decoding(sample=True, temperature=1.5, top_p=0.8, seed=3, max_new_tokens=10),
    ):
        together = said(language, decoding, 7, plain=False)
        tokens, alone = image_tokens(7), []
        for i, item in enumerate(asked(PROMPTS, 7)):
            batch = Collator(codec(), K, generate=True)([item])
            ids = language.generate(language.embed(batch, tokens[i : i + 1]), batch, decoding, EOS, EOS).ids[0].tolist()
            alone.append(ids[: ids.index(EOS)] if EOS in ids else ids)
        assert together == alone
        assert said(language, replace(decoding, seed=4), 7, plain=False) != together


def test_samples_follow_the_probabilities() -> None:
    """First tokens over many seeds, held against the softmax: within four standard deviations each."""
    language, draws = language_model("gpt2"), 3000
    batch = Collator(codec(), K, generate=True)(asked(("a",), 1))
    embeds = language.embed(batch, image_tokens(1))
    with torch.no_grad():
        odds = (Tree(language, embeds, batch, 1).plant()[0, 0] / 3.0).softmax(0)
    counts = torch.zeros(257)
    for seed in range(draws):
        decoding = Decoding(sample=True, temperature=3.0, seed=seed, max_new_tokens=1)
        counts[language.generate(embeds, batch, decoding, EOS, EOS).ids[0, 0]] += 1
    likely = odds > 0.005
    off = (counts[likely] / draws - odds[likely]).abs() / (odds[likely] * (1 - odds[likely]) / draws).sqrt()
    assert likely.sum() > 5
    assert float(off.max()) < 4


def test_nucleus_keeps_the_likeliest_that_make_up_p() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    kept = [(nucleus(logits, p)[0] > -math.inf).tolist() for p in (0.2, 0.5, 0.51, 0.76, 1.0)]
    assert kept[0] == kept[1] == [False, True, False, False]
    assert kept[2] == [False, True, False, True]
    assert kept[3] == [False, True, True, True]
    assert kept[4] == [True] * 4


def test_questions_of_a_picture_share_its_row() -> None:
    model = git_model()
    item = captions("x")
    questions = tuple(Target("", f"what is number {n}?", n) for n in range(5))
    batch = Collator(model.codec, model.num_image_tokens, generate=True, pack=True)([replace(item, targets=questions)])
    assert len(batch.input_ids) == 1
    texts = model.generate(batch, Decoding(max_new_tokens=8))
    single = Collator(model.codec, model.num_image_tokens, generate=True)
    alone = [model.generate(single([replace(item, targets=(q,))]), Decoding(max_new_tokens=8))[0] for q in questions]
    assert texts == alone
    assert len(set(texts)) > 1


def test_half_precision_runs() -> None:
    language = language_model("llama")
    half = LanguageModel(copy.deepcopy(language.model).bfloat16(), "half").eval()
    assert half.branches
    assert len(said(half, SEARCHES["4 beams"], 3, plain=False)) == len(PROMPTS)
