"""The plan of a run against runs: bytes counted on real tensors, the process's own memory, steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_quantised import decoder_config
from tiny import byte_tokenizer, config

import train
from git_model.config import Config
from git_model.datasets.sources import build_source
from git_model.errors import UserError
from git_model.flags import read_flags
from git_model.models.build import build_model
from git_model.models.git import GitModel
from git_model.models.skeleton import EndlessText, quantised_bits
from git_model.optimizer import build_optimizer
from git_model.planning import LARGEST, Outlook, allowed_memory, available_memory, steps_of_run, usable, usual_record
from git_model.rehearsal import (
    CardArithmetic,
    Ledger,
    Peaks,
    Record,
    Rehearsal,
    full_batch,
    gradients,
    optimizer_step,
    peak_memory,
)
from git_model.run import Run

ARCHITECTURES = ("gpt2", "opt", "llama")
BATCH = 3


def shapes(architecture: str, features: str = "grid", **sections: Any) -> Config:
    """A small encoder and decoder, wide enough that their tensors are not outnumbered by scalars."""
    small = {"architecture": architecture, "width": 256, "depth": 4, "heads": 4, "vocab_size": 2000, "positions": 256}
    eye = {"stem": [32, 64, 128], "width": 128, "depth": 2, "heads": 2}
    parts: dict[str, Any] = {
        "vision": {"name": "small", "features": features, "resolution": 64, "small": eye},
        "mapper": {"type": "linear"},
        "language": {"name": "small", "small": small},
        "data": {"max_text_tokens": 48},
    }
    return config(**{name: {**parts.get(name, {}), **sections.get(name, {})} for name in {*parts, *sections}})


def loose(model: GitModel) -> list[Any]:
    """The tensors of quantised layers that are no parameters."""
    found: list[Any] = []
    for layer in model.modules():
        kept: Any = layer
        if quantised_bits(layer) == 8:
            found += [kept.state.CB, kept.state.SCB, kept.weight.CB, kept.weight.SCB]
        if quantised_bits(layer) == 4:
            state = kept.weight.quant_state
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return found


def held(*things: Any) -> int:
    """Bytes of tensors, those that share theirs counted once."""
    storages = [thing.untyped_storage() for thing in things if isinstance(thing, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured(model: GitModel, settings: Config, size: int, record: Record) -> tuple[int, int]:
    """Take two real steps; return the bytes of the weights, and the most of the second step.

    torch's profiler sees each allocation, those inside of kernels, too.
    """
    model.language.room = None
    model.train()
    optimizer = build_optimizer(model, settings.train)
    batch = full_batch(model, settings, size, record)

    def step() -> None:
        gradients(model, batch, settings.train, Ledger(), card=False)
        optimizer_step(optimizer, Ledger())
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    kept: Any = profiler.profiler
    events = [event for event in kept.kineto_results.events() if event.name() == "[memory]"]
    growth = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    weights = held(*model.parameters(), *model.buffers(), *loose(model))
    state = held(*(value for values in optimizer.state.values() for value in values.values()))
    return weights, weights + state + held(*(getattr(batch, f.name) for f in fields(batch))) + int(growth.max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("features", ["pooled", "grid"])
def test_the_peak_is_that_of_real_tensors(architecture: str, features: str) -> None:
    """AdamW, everything trained, in float32."""
    settings = shapes(architecture, features)
    rehearsal = Rehearsal(settings)
    for checkpointing in (False, True):
        model = build_model(settings, EndlessText(2000))
        if checkpointing:
            model.checkpoint_activations()
        weights, most = measured(model, settings, BATCH, Record())
        peaks = rehearsal.peaks(checkpointing)
        assert peaks.weights == weights
        assert peaks.at(BATCH) == pytest.approx(most, rel=1e-3)


@pytest.mark.parametrize(
    ("sections", "record"),
    [
        ({"train": {"precision": "bf16", "freeze": ["language"]}}, Record(1, 3)),
        ({"train": {"accumulation": 3, "optimizer": "muon"}, "data": {"pack": False}}, Record(2, 2)),
        ({"language": {"prefix_attention": "bidirectional"}, "train": {"freeze": ["vision"]}}, Record()),
    ],
    ids=["bf16, packed", "accumulated, muon, not packed", "bidirectional, frozen"],
)
def test_other_ways_to_train(sections: dict[str, Any], record: Record) -> None:
    small = shapes("llama").language.small
    values: dict[str, Any] = {**sections, "data": {"max_text_tokens": 20, **sections.get("data", {})}}
    values["language"] = {"small": {**vars(small), "depth": 1}, **sections.get("language", {})}
    settings = shapes("llama", **values)
    _, most = measured(build_model(settings, EndlessText(2000)), settings, BATCH, record)
    # a CPU's product in bfloat16 takes memory of its own, which no operation returns
    near = 2e-2 if settings.train.precision == "bf16" else 1e-3
    assert Rehearsal(settings, record).peaks(False).at(BATCH) == pytest.approx(most, rel=near)


@pytest.mark.parametrize("card", [False, True], ids=["cpu", "card"])
def test_one_rehearsal_tells_every_size_of_batch(card: bool) -> None:
    """What a storage holds is either fixed or a multiple of the batch: sizes that were never run come out the same."""
    settings = shapes("gpt2", train={"precision": "bf16"}, language={"small": {"width": 256, "vocab_size": 2000}})
    rehearsal = Rehearsal(settings, Record(1, 2))
    for checkpointing in (False, True):
        peaks = rehearsal.peaks(checkpointing, card)
        found = [rehearsal.peaks(checkpointing, card, size).at(0) for size in (1, 5, 64)]
        assert [peaks.at(size) for size in (1, 5, 64)] == pytest.approx(found, rel=1e-3)
        early, late = (peaks.at(size + 1) - peaks.at(size) for size in (64, 99))
        assert early <= late == pytest.approx(early, rel=0.02), "another moment may be the fullest in a larger batch"


def test_chunks_of_the_loss_are_counted_whole() -> None:
    """With a large vocabulary small batches take less than is said, by less than the logits of a chunk a few times."""
    settings = shapes("gpt2", language={"small": {"width": 64, "depth": 1, "vocab_size": 50000}})
    rehearsal = Rehearsal(settings)
    peaks = rehearsal.peaks(False)
    for size in (1, 64, 256):
        found = rehearsal.peaks(False, size=size).at(0)
        assert found * (0.999 if size >= 64 else 1) <= peaks.at(size) * 1.001 <= found * 1.01 + (size < 64) * 5e8


def test_a_process_holds_what_is_computed(root: Path) -> None:
    """Peak size of a real process; what it has more are the libraries that every new shape wakes."""
    settings = shapes("gpt2", language={"small": {"vocab_size": 8000}}, data={"max_text_tokens": 64})
    values = {"vision": vars(settings.vision), "mapper": {"type": "linear"}, "language": vars(settings.language)}
    values |= {"data": {"max_text_tokens": 64}, "train": {"freeze": ["nothing"]}}
    asked = json.dumps({"config": values, "batch": 32, "checkpointing": False}, default=vars)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "benchmarks/memory.py", "--one", asked]
    done = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert peak_memory(settings, 32, False) == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random decoders, wide enough that their scales are no small matter's small matter."""
    from transformers import AutoModelForCausalLM

    folders = {architecture: tmp_path_factory.mktemp(architecture) for architecture in ARCHITECTURES}
    for architecture, folder in folders.items():
        shape = decoder_config(architecture)
        sizes = {"hidden_size": 256, "num_hidden_layers": 4}
        for name, size in {**sizes, "intermediate_size": 700, "ffn_dim": 1024, "word_embed_proj_dim": 256}.items():
            if hasattr(shape, name):
                setattr(shape, name, size)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return folders


@pytest.mark.parametrize(
    ("architecture", "bits", "rank"), [("llama", 8, 0), ("llama", 4, 8), ("gpt2", 4, 0), ("opt", 8, 8)]
)
def test_quantised_decoders(architecture: str, bits: int, rank: int, decoders: dict[str, Path]) -> None:
    """On a CPU, bitsandbytes unpacks 4 bits through copies of a layer that no card needs, and nobody sees."""
    language = {"name": str(decoders[architecture]), "bits": bits, "lora": {"rank": rank}}
    settings = config(language=language, train={"freeze": ["vision"] if rank else ["auto"]})
    peaks = Rehearsal(settings).peaks(False)
    weights, most = measured(build_model(settings, EndlessText(257)), settings, BATCH, Record())
    assert peaks.weights == weights
    assert peaks.at(BATCH) == pytest.approx(most, rel=0.08 if bits == 4 else 0.01)


def test_steps_are_those_of_a_run(tiny_tsv: Path, tmp_path: Path) -> None:
    line = ["--config", str(tiny_tsv / "recipe.yml"), "--output_dir", str(tmp_path), "--bs", "5", "--accumulation", "2"]
    settings, _ = read_flags([*line, "--epochs", "3"])
    run = Run(settings)
    assert steps_of_run(settings, len(run.data), 1) == (run.sampler.steps_per_epoch, run.total_steps) == (3, 9)
    assert steps_of_run(settings, 24, 2) == (2, 6)


def test_what_is_in_a_record(tiny_tsv: Path) -> None:
    """Two captions and a question; the recipe takes two a visit."""
    settings, _ = read_flags(["--config", str(tiny_tsv / "recipe.yml")])
    source = build_source(settings.data.train, settings.data.dir)
    assert usual_record(settings, source) == Record(1, 2)
    everything, _ = read_flags(["--config", str(tiny_tsv / "recipe.yml"), "--targets", "0"])
    assert usual_record(everything, source) == Record(1, 3)


def peaks_of(fixed: int, growing: int) -> Peaks:
    return Peaks(0, 0, 0, 0, np.array([fixed]), np.array([growing]))


def test_the_largest_batch_that_fits() -> None:
    place = Outlook("", peaks_of(2 * 10**9, 10**9), peaks_of(10**9, 10**6), beside=10**8)
    assert usable(16e9) == pytest.approx(13.4e9)
    assert place.fitting(16e9) == [8, LARGEST]
    assert place.at(8) == [10_100_000_000, 1_108_000_000]
    assert place.fitting(3.2e9) == [0, 512]


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """Of version 2 and 1, of the own group and those above it; "max" and huge numbers are no limits."""
    job = tmp_path / "tree" / "slurm" / "job_7"
    old = tmp_path / "tree" / "memory" / "docker"
    for folder in (job, old):
        folder.mkdir(parents=True)
    (tmp_path / "groups").write_text("0::/slurm/job_7\n4:cpu,memory:/docker\n3:cpuset:/x\n")
    (job / "memory.max").write_text("8000\n")
    (job / "memory.current").write_text("5000\n")
    (job / "memory.stat").write_text("anon 1\ninactive_file 2000\n")
    (job.parent / "memory.max").write_text("max\n")
    (job.parent / "memory.current").write_text("9\n")
    (old / "memory.limit_in_bytes").write_text("700\n")
    (old / "memory.usage_in_bytes").write_text("300\n")
    (old / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 50\n")
    assert allowed_memory(tmp_path / "groups", tmp_path / "tree") == [5000, 450]
    assert allowed_memory(tmp_path / "none", tmp_path / "tree") == []
    name, size = available_memory()
    assert name == "this RAM" or torch.cuda.is_available()
    assert size > 1e8


def plan_flags(tiny_tsv: Path, out: Path, *flags: str) -> list[str]:
    return ["--plan", "--config", str(tiny_tsv / "recipe.yml"), "--output_dir", str(out), *flags]


def test_the_command_line(
    tiny_tsv: Path, tmp_path: Path, decoders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """The decoder's folder holds a config.json and nothing else; no folder of a run appears."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((decoders["llama"] / "config.json").read_bytes())
    line = plan_flags(tiny_tsv, tmp_path / "run", "-lm", str(bare), "--freeze", "auto", "--lm_bits", "4")
    assert train.main(line) == 0
    told = capfd.readouterr().out
    assert "24 images, 3 steps an epoch, 6 in 2 epochs" in told
    assert "rows of 16 image tokens and 2 texts of data.max_text_tokens 64" in told
    assert "suggested here: --bs" in told
    for words in ("vision", "mapper", "language", "this RAM", "a card of 16 GB", "a card of 80 GB", "batch 1024"):
        assert words in told, told
    assert [path.name for path in tmp_path.iterdir()] == ["bare"]


def test_bad_input(tiny_tsv: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["-lm", "nobody/nothing", "--freeze", "auto"], "'nobody/nothing'"),
        (["--data_dir", str(tmp_path / "none")], "no image TSV file"),
        (["--set", "language.small.positions=64"], "are more"),
    ):
        assert train.main(plan_flags(tiny_tsv, tmp_path / "run", *flags)) == 2
        told = capfd.readouterr()
        assert words in told.err
        assert not told.out


def test_a_wrong_flag_is_told_before_torch_is_imported(root: Path) -> None:
    code = "import sys, train; print(train.main(['--plan', '--bss', '3']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "did you mean '--bs'?" in done.stderr


def test_several_processes(
    tiny_tsv: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds a second copy of the gradients, to exchange them; the first speaks for all."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train.main(plan_flags(tiny_tsv, tmp_path / "run")) == 0
    told = capfd.readouterr().out
    assert "24 images, 1 steps an epoch" in told
    assert "gradients exchanged" in told
    monkeypatch.setenv("RANK", "1")
    assert train.main(plan_flags(tiny_tsv, tmp_path / "run")) == 0
    assert capfd.readouterr().out == ""


def test_a_model_that_looks_at_its_own_numbers() -> None:
    rehearsal = Rehearsal(config())
    rehearsal.model.mapper.register_forward_hook(lambda _module, _given, out: out * bool(out.sum() > 0))
    with pytest.raises(UserError, match="--plan cannot follow 'small' or 'small'"):
        rehearsal.peaks(False)


def test_cards_widen_what_cpus_do_not() -> None:
    """CUDA's autocast normalises and takes powers in float32, a CPU's does not; products are narrow on both."""
    norm, product = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert {norm(x).dtype, (x**3).dtype, product(x).dtype} == {torch.bfloat16}
        with CardArithmetic():
            assert norm(x).dtype == (x**3).dtype == torch.pow(x, 3.0).dtype == torch.float32
            assert product(norm(x)).dtype == torch.bfloat16
    with CardArithmetic():
        assert norm(x.float()).dtype == torch.float32
        assert (x**3).dtype == torch.bfloat16


def test_cards_keep_no_scores_of_attention_with_dropout() -> None:
    """On a CPU dropout means the plain product, whose scores are kept; on a card it is part of the kernel."""
    small = {"width": 64, "depth": 2, "heads": 8, "vocab_size": 300, "dropout": 0.1}
    rehearsal = Rehearsal(shapes("gpt2", language={"small": small}), Record(1, 4))
    assert rehearsal.peaks(False, card=True).at(BATCH) < 0.8 * rehearsal.peaks(False, card=False).at(BATCH)
