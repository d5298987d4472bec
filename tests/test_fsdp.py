"""Weights sharded over processes (FSDP2): the same losses as whole, saves that any number of processes goes on from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_lost_runs import torchrun
from test_quantised import save_decoder
from test_train import losses

from git_model.checkpoint import load_checkpoint, read_content
from git_model.errors import UserError
from git_model.flags import read_flags


def flags_of(recipe: Path, out: Path, *more: str) -> list[str]:
    line = ["--config", str(recipe / "recipe.yml"), "--output_dir", str(out), "--set", "language.small.dropout=0"]
    return [*line, "--epochs", "4", *more]


def finished(processes: int, flags: list[str], root: Path) -> str:
    process = torchrun(processes, flags, root)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said[-3000:]
    return said


def train_whole(flags: list[str], root: Path) -> None:
    subprocess.run([sys.executable, "train.py", *flags], cwd=root, check=True, capture_output=True)


def test_two_shards_are_one_model(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    """The losses, scores and weights of one process with the whole batch; each goes on from the other's saves."""
    through, parts = tmp_path / "through", tmp_path / "parts"
    same = ("--schedule", "constant", "--validate_every", "6")
    train_whole(flags_of(tiny_tsv, through, "--bs", "8", *same), root)
    finished(2, flags_of(tiny_tsv, parts, "--bs", "4", "--fsdp", "--epochs", "2", *same), root)
    first = read_content(parts / "model_latest.pt")
    train_whole(flags_of(tiny_tsv, parts, "--bs", "8", "--epochs", "3", *same), root)
    finished(2, flags_of(tiny_tsv, parts, "--bs", "4", "--fsdp", *same), root)
    one, two = losses(through), losses(parts)
    assert one.keys() == two.keys()
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-3)
    left, right = (read_content(folder / "model_latest.pt") for folder in (through, parts))
    assert right["metrics"]["val_loss"] == pytest.approx(left["metrics"]["val_loss"], rel=1e-3)
    assert left["tensors"].keys() == first["tensors"].keys()
    for name, tensor in left["tensors"].items():
        assert torch.allclose(right["tensors"][name], tensor, atol=2e-2), name
    assert load_checkpoint(parts / "model_best.pt").model


def test_adapters_on_a_sharded_decoder_of_half_precision(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    decoder = save_decoder("llama", tmp_path / "decoder")
    lora = ["-lm", str(decoder), "--freeze", "auto", "--lora_rank", "4", "--gradient_checkpointing"]
    lora += ["--precision", "bf16", "--epochs", "2"]
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    train_whole(flags_of(tiny_tsv, whole, "--bs", "8", *lora), root)
    finished(2, flags_of(tiny_tsv, shards, "--bs", "4", "--fsdp", *lora), root)
    assert list(losses(shards).values()) == pytest.approx(list(losses(whole).values()), rel=0.05)
    content = read_content(shards / "model_latest.pt")
    assert all(".lora_" in name for name in content["tensors"] if name.startswith("language."))
    assert load_checkpoint(shards / "model_latest.pt").model.language.adapters()


def test_a_batch_without_a_usable_sample_holds_nobody_up(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    """One process's pictures are all broken: it takes part in every exchange all the same."""
    from git_model.datasets.records import TSVFile, write_tsv

    folder = tmp_path / "data"
    folder.mkdir()
    rows = list(TSVFile(tiny_tsv / "t.img.tsv"))
    write_tsv(
        folder / "t.img.tsv", [(key, data if i % 3 else "bm90IGEgcGljdHVyZQ==") for i, (key, data) in enumerate(rows)]
    )
    for name in ("t.caption.tsv", "t.question.tsv"):
        (folder / name).write_bytes((tiny_tsv / name).read_bytes())
    flags = flags_of(tiny_tsv, tmp_path / "run", "--bs", "1", "--fsdp", "--data_dir", str(folder), "--max_bad", "1")
    flags += ["--epochs", "1", "--validate_every", "1000"]
    finished(2, flags, root)
    assert len(losses(tmp_path / "run")) == 12


def test_one_process_has_nothing_to_share(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    line = [sys.executable, "train.py", *flags_of(tiny_tsv, tmp_path, "--fsdp")]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "torchrun --nproc_per_node=2" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--lm_bits", "8"], "--lm_bits 8 or 4"), (["--compile"], "--compile"), (["--optimizer", "muon"], "muon")],
)
def test_what_cannot_be_sharded(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=f"--fsdp cannot go with .*{said}"):
        read_flags(["-lm", "gpt2", "-mpt", "mlp", "--fsdp", *flags])
