"""A new run that starts from another's weights, and goes on from its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_train import config_of

import train
from git_model.checkpoint import load_checkpoint, read_content
from git_model.errors import UserError

SHORT = ("--epochs", "1", "--schedule", "constant")


def test_weights_and_vocabulary_come_along(tiny_tsv: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    train.train(config_of(tiny_tsv, first, *SHORT))
    start = first / "model_latest.pt"
    second = tmp_path / "second"
    # a learning rate that changes nothing: what is saved is what it started from
    still = (*SHORT, "--init_from", str(start), "--lr", "1e-30", "--weight_decay", "0", "--seed", "7")
    train.train(config_of(tiny_tsv, second, *still))
    before, after = read_content(start), read_content(second / "model_latest.pt")
    assert before["tokenizer"] == after["tokenizer"]
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        torch.testing.assert_close(after["tensors"][name], tensor, rtol=0, atol=1e-6)
    # its own saves go before it, wherever the first run is then
    start.unlink()
    train.train(config_of(tiny_tsv, second, *still, "--epochs", "2"))
    assert load_checkpoint(second / "model_latest.pt").step == 2 * after["step"]


def test_frozen_parts_that_were_brought_are_saved(tiny_tsv: Path, tmp_path: Path) -> None:
    train.train(config_of(tiny_tsv, tmp_path / "first", *SHORT))
    start = tmp_path / "first" / "model_latest.pt"
    frozen = (*SHORT, "--init_from", str(start), "--freeze", "vision")
    train.train(config_of(tiny_tsv, tmp_path / "second", *frozen))
    before, after = (read_content(p)["tensors"] for p in (start, tmp_path / "second" / "model_latest.pt"))
    same = [torch.equal(before[name], tensor) for name, tensor in after.items() if name.startswith("vision.")]
    assert same
    assert all(same)
    train.train(config_of(tiny_tsv, tmp_path / "second", *frozen, "--epochs", "2"))


@pytest.mark.parametrize("kind", ["missing", "foreign", "other"])
def test_what_cannot_be_started_from(kind: str, tiny_tsv: Path, tmp_path: Path) -> None:
    path = tmp_path / "start.pt"
    if kind == "foreign":
        torch.save({"a": torch.zeros(1)}, path)
    elif kind == "other":
        train.train(config_of(tiny_tsv, tmp_path / "first", *SHORT, "--mapping_type", "linear"))
        path = tmp_path / "first" / "model_latest.pt"
    told = {"missing": "no checkpoint", "foreign": "holds no weights", "other": "does not fit its architecture"}[kind]
    with pytest.raises(UserError, match=told):
        train.train(config_of(tiny_tsv, tmp_path / "run", *SHORT, "--init_from", str(path)))
