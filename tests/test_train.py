"""The whole script on a CPU: files, resume bit for bit, NaN, bad samples, two processes == one."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from git_model.checkpoint import load_checkpoint, read_content
from git_model.config import Config
from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.flags import read_flags
from git_model.optimizer import learning_rate_factor
from git_model.run import Run


def config_of(tiny_tsv: Path, out: Path, *flags: str) -> Config:
    return read_flags(["--config", str(tiny_tsv / "recipe.yml"), "--output_dir", str(out), *flags])[0]


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def same_tensors(one: Path, other: Path) -> bool:
    a, b = read_content(one)["tensors"], read_content(other)["tensors"]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def finished(tiny_tsv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    train.train(config_of(tiny_tsv, out))
    return out


def test_a_run_leaves_these_files(finished: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        "model-000.pt",
        "model-001.pt",
        "model_best.pt",
        "model_latest.pt",
        "step-000000003",
        "step-000000006",
        ".lock",
        "metrics.jsonl",
        "run_report.json",
        "loss_curve.png",
        "resolved_config.yml",
    }
    report = json.loads((finished / "run_report.json").read_text())
    assert report["samples"]["rows"] == report["samples"]["ok"] == 48
    values = list(losses(finished).values())
    assert len(values) == 6
    assert values[-1] < values[0]
    assert yaml.safe_load((finished / "resolved_config.yml").read_text())["train"]["batch_size"] == 8


@pytest.mark.parametrize("stop_after", [1, 3, 4])
def test_resumed_equals_uninterrupted_bit_for_bit(
    tiny_tsv: Path, tmp_path: Path, finished: Path, stop_after: int
) -> None:
    config = config_of(tiny_tsv, tmp_path, "--save_every", "1")
    run = Run(config)
    for micro in run.steps():  # the loop of train.py, left after some steps as by a kill
        loss = run.backward(micro)
        run.report(loss, run.update(loss, micro), micro)
        if run.epoch_step == 0:
            run.validate()
        run.save_latest()
        if run.step == stop_after:
            break
    train.train(config)
    assert losses(tmp_path) == losses(finished)
    assert same_tensors(tmp_path / "model_latest.pt", finished / "model_latest.pt")


def test_a_finished_run_does_nothing_more(tiny_tsv: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    train.train(config_of(tiny_tsv, tmp_path / "copy"))
    assert losses(tmp_path / "copy") == losses(finished)


def test_half_a_save_is_none(tiny_tsv: Path, tmp_path: Path, finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It goes back to the older save with one warning, and ends with the same bits; without any it says so."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "step-000000006" / "state.pt").unlink()
    train.train(config_of(tiny_tsv, copy))
    warnings = [record.message for record in caplog.records if "step-000000006" in record.message]
    assert warnings == ["going back to step-000000003, because of step-000000006: state.pt is missing"]
    assert losses(copy) == losses(finished)
    assert same_tensors(copy / "model_latest.pt", finished / "model_latest.pt")
    for save in copy.glob("step-*"):
        (save / "model.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"no save in .* verifies") as caught:
        train.train(config_of(tiny_tsv, copy))
    assert caught.value.exit_code == EXIT_NO_CHECKPOINT
    train.train(config_of(tiny_tsv, copy, "--resume", "no", "--epochs", "1"))
    assert {path.name for path in copy.glob("step-*")} == {"step-000000003-1"}


def test_accumulation_equals_the_big_batch(tiny_tsv: Path, tmp_path: Path) -> None:
    """Same order, same targets, one loss: only float addition order differs."""
    no_dropout = ("--set", "language.small.dropout=0", "--epochs", "1")
    train.train(config_of(tiny_tsv, tmp_path / "big", *no_dropout))
    train.train(config_of(tiny_tsv, tmp_path / "parts", "--bs", "2", "--accumulation", "4", *no_dropout))
    big, parts = losses(tmp_path / "big"), losses(tmp_path / "parts")
    assert big.keys() == parts.keys()
    assert all(math.isclose(big[s], parts[s], rel_tol=1e-4) for s in big)


def test_two_processes_equal_one(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    flags = ["--set", "language.small.dropout=0", "--epochs", "1"]
    train.train(config_of(tiny_tsv, tmp_path / "one", *flags))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "train.py", "--bs", "4", *flags]
    command += ["--config", str(tiny_tsv / "recipe.yml"), "--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(math.isclose(one[s], two[s], rel_tol=1e-4) for s in one)


def poison(run: Run) -> None:
    with torch.no_grad():
        next(run.raw_model.mapper.parameters()).fill_(float("nan"))


def test_a_non_finite_step_is_skipped_counted_and_never_logged_as_zero(tiny_tsv: Path, tmp_path: Path) -> None:
    run = Run(config_of(tiny_tsv, tmp_path))
    steps, healthy = run.steps(), next(run.raw_model.mapper.parameters()).detach().clone()
    micro = next(steps)
    poison(run)
    before = [p.clone() for p in run.trained]
    loss = run.backward(micro)
    run.report(loss, run.update(loss, micro), micro)
    assert all(torch.equal(a, b) or bool(a.isnan().any()) for a, b in zip(before, run.trained, strict=True))
    assert run.guard.skipped == 1
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == "nan"
    with torch.no_grad():
        next(run.raw_model.mapper.parameters()).copy_(healthy)
    micro = next(steps)
    run.update(run.backward(micro), micro)
    assert run.guard.in_a_row == 0


def test_three_in_a_row_stop_the_run_with_the_samples(tiny_tsv: Path, tmp_path: Path) -> None:
    run = Run(config_of(tiny_tsv, tmp_path))
    poison(run)

    def go() -> None:
        for micro in run.steps():
            run.update(run.backward(micro), micro)

    with pytest.raises(UserError, match=r"p\d\d") as stop:
        go()
    assert stop.value.exit_code == 70
    assert run.guard.skipped == 3


def test_bad_samples_are_skipped_counted_and_stop_the_run(tiny_tsv: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(tiny_tsv, broken)
    rows = (broken / "t.img.tsv").read_text().splitlines()
    rows[3], rows[7] = "p03\t!!!", "p07\tAAAA"
    (broken / "t.img.tsv").write_text("\n".join(rows) + "\n")
    for index in broken.glob("t.img.lineidx*"):
        index.unlink()
    out = tmp_path / "tolerant"
    train.train(config_of(tiny_tsv, out, "--data_dir", str(broken), "--max_bad", "0.2"))
    samples = json.loads((out / "run_report.json").read_text())["samples"]
    assert samples["rows"] == 48
    assert samples["ok"] == 44
    assert sum(samples["reasons"].values()) == 4
    assert {key for keys in samples["examples"].values() for key in keys} == {"p03", "p07"}
    strict = ["--config", str(tiny_tsv / "recipe.yml"), "--data_dir", str(broken), "--output_dir", str(tmp_path / "s")]
    assert train.main([*strict, "--set", "data.max_bad=0.01", "--epochs", "9"]) == 3


def test_learning_rate_is_per_part_and_warms_up(tiny_tsv: Path, tmp_path: Path) -> None:
    run = Run(config_of(tiny_tsv, tmp_path, "--lr_mapper", "0.5", "--lr_vision", "0.25", "--freeze", "language"))
    rates = {g["part"]: g["initial_lr"] for g in run.optimizer.param_groups}
    assert rates == {"vision": 0.25, "mapper": 0.5}
    options = config_of(tiny_tsv, tmp_path, "--warmup_steps", "4", "--schedule", "cosine").train
    factor = [learning_rate_factor(options, 12)(s) for s in range(13)]
    assert factor[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert factor[5:] == sorted(factor[5:], reverse=True)
    assert factor[12] == pytest.approx(0)


@pytest.fixture(autouse=True)
def fresh_engine() -> None:
    """accelerate keeps one state a process and refuses to change its precision; each test starts its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_runs_and_fp16_says_it_needs_a_gpu(tiny_tsv: Path, tmp_path: Path) -> None:
    train.train(config_of(tiny_tsv, tmp_path / "b", "--precision", "bf16", "--epochs", "1"))
    assert all(math.isfinite(v) for v in losses(tmp_path / "b").values())
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="fp16"):
            Run(config_of(tiny_tsv, tmp_path / "h", "--precision", "fp16"))


def test_a_trained_model_comes_back_and_captions(finished: Path, tiny_tsv: Path) -> None:
    loaded = load_checkpoint(finished / "model_best.pt")
    assert loaded.config.language.small.width == 32
    assert loaded.metrics["val_loss"] > 0
    assert not loaded.model.training


def test_tensorboard_writes_where_asked(tiny_tsv: Path, tmp_path: Path) -> None:
    train.train(config_of(tiny_tsv, tmp_path, "--report_to", "tensorboard", "--epochs", "1"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_a_run_goes_on_with_the_same_settings_only(tiny_tsv: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    for flags, words in (
        (["--lr", "0.5"], "train.lr was 0.003, is 0.5"),
        (["--bs", "4"], "samples a step was 8, is 4"),
        (["--set", "language.small.width=64"], "language.small.width"),
        (["--seed", "1"], "train.seed"),
    ):
        with pytest.raises(UserError, match=words):
            Run(config_of(tiny_tsv, tmp_path / "copy", *flags))
    same = ("--bs", "4", "--accumulation", "2", "--epochs", "3", "--log_every", "2")
    train.train(config_of(tiny_tsv, tmp_path / "copy", *same))
    assert max(losses(tmp_path / "copy")) == 9


def test_other_data_is_noticed_on_resume(tiny_tsv: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    less = tmp_path / "less"
    less.mkdir()
    for name in ("t.img.tsv", "t.caption.tsv", "t.question.tsv"):
        (less / name).write_text("".join((tiny_tsv / name).read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(UserError, match="24 records, the data now holds 20"):
        Run(config_of(tiny_tsv, tmp_path / "copy", "--data_dir", str(less)))


def test_a_log_line_cut_short_by_a_kill_does_not_stop_the_resume(
    tiny_tsv: Path, tmp_path: Path, finished: Path
) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    with open(tmp_path / "copy" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    train.train(config_of(tiny_tsv, tmp_path / "copy", "--epochs", "3"))
    assert max(losses(tmp_path / "copy")) == 9


def test_mistakes_in_a_recipe_are_found_before_torch(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    recipe = yaml.safe_load((tiny_tsv / "recipe.yml").read_text())
    recipe["data"]["train"][0]["type"] = "tvs"
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    code = f"import sys, train; print(train.main(['--config', {str(tmp_path / 'r.yml')!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "did you mean 'tsv'" in done.stderr


def test_nan_on_one_rank_skips_the_step_on_both(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    code = f"""
import torch, train
from git_model.flags import read_flags
from git_model.run import Run
flags = ["--config", {str(tiny_tsv / "recipe.yml")!r}, "--output_dir", {str(tmp_path / "two")!r}, "--bs", "4"]
run = Run(read_flags(flags)[0])
before = [p.detach().clone() for p in run.trained]
for micro in run.steps():
    forward = run.raw_model.language.loss
    if run.accelerator.process_index == 1:
        run.raw_model.language.loss = lambda *a: forward(*a) * float("nan")
    loss = run.backward(micro)
    run.update(loss, micro)
    break
same = all(torch.equal(a, b) for a, b in zip(before, run.trained))
import sys  # one write a line: two processes share the pipe
said = ("rank", run.accelerator.process_index, "skipped", run.guard.skipped, "same", same)
sys.stdout.write(" ".join(map(str, said)) + chr(10))
sys.stdout.flush()
run.accelerator.wait_for_everyone()
run.accelerator.end_training()
"""
    (tmp_path / "probe.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(tmp_path / "probe.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == [f"rank {r} skipped 1 same True" for r in (0, 1)]


def test_wandb_is_told_when_asked(tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train.train(config_of(tiny_tsv, tmp_path / "run", "--report_to_wandb", "--epochs", "1"))
    assert list(tmp_path.rglob("run-*.wandb"))
