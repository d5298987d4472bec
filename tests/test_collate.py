"""Exact ids, labels, masks, positions; the invariants of the batch (S9, S10, S12, S18)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_ids, captions, codec, picture

from git_model.batch import IGNORE_INDEX, BadSample, Target
from git_model.datasets.collate import Collator, Loaded
from git_model.errors import UserError
from git_model.tokens import TextCodec, train_tokenizer

K = 2
EOS = 0  # the byte tokenizer's only special token
X = IGNORE_INDEX


def test_ids_labels_and_masks_of_captions() -> None:
    batch = Collator(codec(), K)([captions("ab", key="p"), captions("c", key="q", seed=1)])
    a, b, c = byte_ids("abc")
    assert batch.input_ids.tolist() == [[EOS, EOS, a, b, EOS], [EOS, EOS, c, EOS, EOS]]
    assert batch.labels.tolist() == [[X, X, a, b, EOS], [X, X, c, EOS, X]]
    assert batch.image_mask.tolist() == [[True, True, False, False, False]] * 2
    assert batch.attention_mask.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert batch.sources.tolist() == [[0, 0, 1, 2, 3], [0, 0, 1, 2, 0]]
    assert batch.image_index.tolist() == [0, 1]
    assert batch.keys == ("p", "q")


def test_question_and_answer() -> None:
    sample = Loaded("q", (picture(0),), (Target("no", "ok?", 7),))
    batch = Collator(codec(), K)([sample])
    prompt, answer = byte_ids("ok?"), byte_ids(" no")
    assert batch.input_ids.tolist() == [[EOS] * K + list(prompt) + list(answer) + [EOS]]
    assert batch.labels.tolist() == [[X] * (K + 3) + list(answer) + [EOS]]


def test_packed_rows_share_the_image_and_restart_their_positions() -> None:
    batch = Collator(codec(), K, pack=True)([captions("a", "bc")])
    a, b, c = byte_ids("abc")
    assert batch.input_ids.tolist() == [[EOS, EOS, a, EOS, b, c, EOS]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch.sources.tolist() == [[0, 0, 1, 2, 1, 4, 5]]
    assert batch.image_index.tolist() == [0]


def test_slots_in_the_prompt_stand_where_they_are_written() -> None:
    target = Target("a", "[IMG] b [IMG] c", 1)
    batch = Collator(codec(), K)([Loaded("two", (picture(0), picture(1)), (target,))])
    (b,), (c,) = byte_ids("b"), byte_ids("c")
    assert batch.input_ids.tolist() == [[0, 0, b, 0, 0, c, *byte_ids(" a"), EOS]]
    assert batch.image_mask[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert batch.image_index.tolist() == [0, 1]


def test_wrong_number_of_slots_is_reported_not_trained_on() -> None:
    batch = Collator(codec(), K)([Loaded("two", (picture(0),), (Target("a", "[IMG] [IMG]", 1),)), captions("a")])
    assert [bad.key for bad in batch.skipped] == ["two"]
    assert len(batch.input_ids) == 1


def test_generation_pads_left_and_has_no_targets() -> None:
    one = Loaded("one", (picture(0),), (Target("yes", "a", 1), Target("no", "abc", 2)))
    batch = Collator(codec(), K, generate=True)([one])
    assert batch.input_ids.tolist() == [[0, 0, 0, 0, *byte_ids("a")], [0, 0, *byte_ids("abc")]]
    assert batch.attention_mask.tolist() == [[False] * 2 + [True] * 3, [True] * 5]
    assert batch.positions.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert batch.num_targets == 0
    assert batch.image_index.tolist() == [0, 0], "one picture, encoded once"


def test_captions_are_asked_for_once() -> None:
    batch = Collator(codec(), K, generate=True)([captions("a", "b", "c")])
    assert len(batch.input_ids) == 1
    assert batch.targets[0][0].answers == ("a", "b", "c")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=4), st.booleans())
def test_each_caption_contributes_len_plus_one_targets(texts: list[str], pack: bool) -> None:
    texts = [t.encode("utf-8", "ignore").decode() or "x" for t in texts]
    batch = Collator(codec(400), K, pack=pack)([captions(*texts)])
    assert batch.num_targets == sum(len(byte_ids(t)) + 1 for t in texts)
    assert int((batch.labels == EOS).sum()) == len(texts), "exactly one EOS each"


def test_truncation_keeps_eos_and_is_counted() -> None:
    batch = Collator(codec(max_target=4), K)([captions("abcdefgh"), captions("abc")])
    assert batch.truncated == 1
    assert batch.labels.tolist()[0][K:] == [*byte_ids("abc"), EOS]
    assert batch.labels.tolist()[1][K:] == [*byte_ids("abc"), EOS]


def test_bad_samples_are_listed_and_an_empty_batch_is_a_batch() -> None:
    batch = Collator(codec(), K)([BadSample("x", "truncated")])
    assert batch.skipped == (BadSample("x", "truncated"),)
    assert batch.input_ids.shape == (0, 0)
    assert batch.num_targets == 0


def test_special_tokens_in_a_text_are_text() -> None:
    ids, _ = codec().target("a<|endoftext|>b")
    assert ids.count(EOS) == 1
    assert codec().decode(ids) == "a<|endoftext|>b"


def test_pad_is_never_outside_the_table() -> None:
    tokenizer = train_tokenizer(["a cat"], 300)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # what the original did to LLaMA
    assert tokenizer.pad_token_id == size
    assert TextCodec(tokenizer, size).pad_id == tokenizer.eos_token_id


def test_eos_outside_the_table_is_refused() -> None:
    with pytest.raises(UserError, match="EOS"):
        TextCodec(train_tokenizer(["a"], 257), 0)


def test_long_prompt_is_refused() -> None:
    rules = TextCodec(train_tokenizer([], 257), 257, max_prompt=8)
    with pytest.raises(UserError, match="9 tokens"):
        rules.prompt("123456789")


def test_real_tokenizers_follow_the_rules(reference_data, tmp_path) -> None:  # noqa: ANN001
    """LLaMA's tokenizer marks words by itself and begins with BOS; GPT-2's wants the space and has no BOS."""
    from transformers import GPT2Tokenizer

    folder = reference_data / "data" / "tokenizers" / "gpt2"
    gpt2 = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    rules = TextCodec(gpt2, 50257)
    assert rules.bos_ids == []
    assert rules.pad_id == rules.eos_id == 50256
    question, (answer, _) = rules.prompt("is there a cat?"), rules.target("yes", after_prompt=True)
    assert question + answer == [*gpt2("is there a cat? yes")["input_ids"], 50256]
    assert torch.tensor(answer).max() < 50257


def test_a_visit_takes_some_captions_and_the_questions(tiny_tsv: Path) -> None:
    from git_model.datasets.images import Transform
    from git_model.datasets.loader import ImageTextDataset
    from git_model.datasets.sources import build_source

    entry = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv", "questions": "t.question.tsv"}
    source = build_source([entry], tiny_tsv)
    data = ImageTextDataset(source, Transform(32), captions=1)
    drawn = [data[epoch, 3].targets for epoch in range(20)]  # type: ignore[union-attr]
    assert all([t.question_id is None for t in targets] == [True, False] for targets in drawn)
    assert {targets[0].text for targets in drawn} == {t.text for t in source[3].targets[:2]}
    only_captions = build_source([entry | {"questions": None}], tiny_tsv)
    assert len(ImageTextDataset(only_captions, Transform(32), captions=1)[0, 3].targets) == 2  # type: ignore[union-attr]
