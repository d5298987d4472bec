"""Batches of one length: the same records in an order that pads less, for any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from test_train import config_of, losses
from tiny import codec

import train
from git_model.datasets import order
from git_model.datasets.order import GlobalSampler, text_lengths
from git_model.datasets.sources import build_source
from git_model.errors import UserError

SIZE, STEP = 1003, 16
LENGTHS = np.random.default_rng(0).gamma(6, 9, SIZE).astype(np.float32)


def sampler(window: int, **changes: int) -> GlobalSampler:
    options = {"batch_size": STEP, "seed": 1, "epochs": 2, **changes}
    return GlobalSampler(SIZE, **options, lengths=LENGTHS, window=window)  # type: ignore[arg-type]


def waste(order: np.ndarray) -> float:
    """Return the share of a padded batch that is padding."""
    whole = LENGTHS[order[: SIZE - SIZE % STEP]].reshape(-1, STEP)
    return 1 - whole.sum() / (whole.max(axis=1) * STEP).sum()


def test_every_record_once_and_little_padding() -> None:
    plain, grouped = sampler(0).order(0), sampler(20).order(0)
    assert sorted(grouped) == list(range(SIZE))
    assert waste(plain) > 0.35
    assert waste(grouped) < 0.08
    assert not np.array_equal(grouped, sampler(20).order(1))
    np.testing.assert_array_equal(grouped, sampler(20).order(0))


def test_a_window_holds_what_it_held() -> None:
    """Records stay within their window of steps: the order is as random as before, seen from farther away."""
    plain, grouped = sampler(0).order(0), sampler(20).order(0)
    for start in range(0, SIZE, 20 * STEP):
        end = start + 20 * STEP
        assert set(plain[start:end]) == set(grouped[start:end])
    lengths = LENGTHS[grouped[: 20 * STEP]].reshape(20, STEP).mean(axis=1)
    assert abs(np.corrcoef(lengths, np.arange(20))[0, 1]) < 0.5, "steps come in any order"


def test_the_last_short_step_is_no_step_of_long_texts() -> None:
    plain, grouped = sampler(0).order(0), sampler(20).order(0)
    np.testing.assert_array_equal(plain[-(SIZE % STEP) :], grouped[-(SIZE % STEP) :])


@pytest.mark.parametrize(("batch", "world", "micro"), [(8, 2, 1), (4, 2, 2), (2, 8, 1)])
def test_any_number_of_processes_sees_the_same_steps(batch: int, world: int, micro: int) -> None:
    one = list(sampler(20))
    shares = [list(sampler(20, batch_size=batch, rank=r, world=world, accumulation=micro)) for r in range(world)]
    for step, records in enumerate(one):
        split = [pair for m in range(micro) for share in shares for pair in share[step * micro + m]]
        assert split == records


def test_lengths_are_read_without_pictures(tiny_tsv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build_source([{"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv"}], tiny_tsv)
    asked: list[int] = []

    def words(texts: Sequence[str]) -> list[int]:
        asked.append(len(texts))
        return [len(text.split()) for text in texts]

    monkeypatch.setattr(order, "TEXTS_TOGETHER", 10)
    lengths = text_lengths(source, words)
    assert lengths[0] == (len(["a", "red", "thing"]) + len(["thing", "of", "red"])) / 2
    assert len(lengths) == 24
    assert len(asked) == 3
    assert text_lengths(source, words, together=True)[0] == 6


def test_lengths_are_those_of_the_collator() -> None:
    tiny_codec = codec()
    texts = ["a red dog on the grass", "", "a"]
    assert tiny_codec.lengths(texts) == [len(tiny_codec.target(text)[0]) - 1 for text in texts]
    assert tiny_codec.lengths([]) == []


def test_a_run_with_it_goes_on_to_the_bit(tiny_tsv: Path, tmp_path: Path) -> None:
    flags = ("--group_by_length", "2", "--epochs", "2", "--schedule", "constant")
    train.train(config_of(tiny_tsv, tmp_path / "whole", *flags))
    train.train(config_of(tiny_tsv, tmp_path / "parts", *flags, "--epochs", "1"))
    train.train(config_of(tiny_tsv, tmp_path / "parts", *flags))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="group_by_length was 2, is 3"):
        train.train(config_of(tiny_tsv, tmp_path / "parts", *flags, "--group_by_length", "3"))
