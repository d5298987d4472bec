"""A run that cannot be lost: kills, signals, hanging workers, two writers, changed machines."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_train import config_of, losses, same_tensors

import train
from git_model import engine, resume
from git_model.checkpoint import read_content
from git_model.cluster import StopRequest, adopt_slurm, first_host, rank_and_world
from git_model.config import Config
from git_model.datasets.order import GlobalSampler
from git_model.errors import EXIT_BUG, EXIT_PREEMPTED, Preempted, UserError
from git_model.lock import folder_lock
from git_model.run import Run
from git_model.saves import find

KILLS = int(os.environ.get("GIT_MODEL_KILLS", "30"))
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def flags_of(tiny_tsv: Path, out: Path | None, *more: str) -> list[str]:
    named = ["--output_dir", str(out)] if out else []
    return ["--config", str(tiny_tsv / "recipe.yml"), *named, "--validate_samples", "2", *more]


def torchrun(processes: int, flags: list[str], root: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    line += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "train.py", *flags]
    return subprocess.Popen(line, cwd=root, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        if (out / "metrics.jsonl").exists() and max(losses(out), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def test_kills(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    """Every step has the bits of the uninterrupted run, once; the weights at the end are equal."""
    steps = 6 * KILLS  # about as many as a try takes before it is killed
    more = ["--epochs", str(2 * KILLS), "--save_every", "2", "--validate_every", "50"]
    for name, kills in (("whole", 0), ("killed", KILLS)):
        line = [sys.executable, str(root / "tests" / "killable.py"), str(tmp_path / name), str(kills), "0"]
        done = subprocess.run(
            [*line, *flags_of(tiny_tsv, None, *more)],
            cwd=root,
            env={**ONE_THREAD, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        told = json.loads(done.stdout.splitlines()[-1])
        print(told)
        assert told["code"] == 0, done.stderr[-2000:]
    assert told["kills"] > KILLS // 2
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    counts = Counter(line["step"] for line in map(json.loads, lines) if "loss" in line)
    assert set(counts.values()) == {1}
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(counts) == steps
    assert same_tensors(tmp_path / "killed" / "model_latest.pt", tmp_path / "whole" / "model_latest.pt")
    assert not list((tmp_path / "killed").glob(".tmp-*"))


def test_signals_save_at_the_step(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    """Exit code 75, a save of exactly that step; a second signal does no harm; the same bits in the end."""
    more = ["--epochs", "20", "--save_every", "1000"]
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    out = tmp_path / "stopped"
    line = [sys.executable, "train.py", *flags_of(tiny_tsv, out, *more)]
    rng = random.Random(0)
    stops, started = 0, 0.0
    while True:
        process = subprocess.Popen(line, cwd=root, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
        if stops < 2:
            wait_for_step(out, max(losses(out), default=0) + 1 if (out / "metrics.jsonl").exists() else 2, process)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(numbers[stops])
            process.send_signal(numbers[stops])
            started = time.monotonic()
        _, said = process.communicate(timeout=120)
        if stops >= 2:
            break
        assert time.monotonic() - started < 10
        assert process.returncode == EXIT_PREEMPTED, said[-1000:]
        told = f"error: stopped by {numbers[stops].name} and saved at step "
        step = int(said[said.index(told) + len(told) :].split()[0])
        assert find(out)[0].name.startswith(f"step-{step:09d}")
        assert max(losses(out)) == step
        stops += 1
    assert process.returncode == 0, said[-1000:]
    whole = tmp_path / "whole"
    done = subprocess.run([sys.executable, "train.py", *flags_of(tiny_tsv, whole, *more)], cwd=root, env=ONE_THREAD)
    assert done.returncode == 0
    assert losses(out) == losses(whole)
    assert same_tensors(out / "model_latest.pt", whole / "model_latest.pt")
    assert same_tensors(out / "model_best.pt", whole / "model_best.pt")


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_sigterm_to_everything_saves(tiny_tsv: Path, tmp_path: Path, root: Path, under_torchrun: bool) -> None:
    """scancel and torchrun send it to the data workers, too; they outlive it until the main process has saved."""
    flags = flags_of(tiny_tsv, tmp_path, "--epochs", "60", "--save_every", "1000", "--workers", "2")
    if under_torchrun:
        process = torchrun(1, flags, root)
    else:
        line = [sys.executable, "train.py", *flags]
        process = subprocess.Popen(
            line, cwd=root, env=ONE_THREAD, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    wait_for_step(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM) if under_torchrun else os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (1 if under_torchrun else EXIT_PREEMPTED), said[-1500:]
    assert find(tmp_path)[0].name == f"step-{max(losses(tmp_path)):09d}"
    assert "stopped by SIGTERM and saved at step" in said


class StopInValidation(StopRequest):
    """Asked to stop in the middle of the n-th validation."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = 0

    @property
    def asked(self) -> bool:
        self.questions += 1
        return self.questions > 4  # three steps of the epoch, then the first batch of the validation


def test_stopped_while_validating_it_validates_again(tiny_tsv: Path, tmp_path: Path) -> None:
    config = config_of(tiny_tsv, tmp_path / "stopped")
    run = Run(config, StopInValidation())
    with pytest.raises(Preempted, match="saved at step 3 of 6"):  # noqa: PT012
        for micro in run.steps():
            loss = run.backward(micro)
            run.report(loss, run.update(loss, micro), micro)
            run.stop_if_asked()
            train.round_off(run)
    assert not (tmp_path / "stopped" / "model_best.pt").exists()
    train.train(config)
    train.train(config_of(tiny_tsv, tmp_path / "whole"))
    for name in ("model_best.pt", "model_latest.pt", "model-000.pt"):
        assert same_tensors(tmp_path / "stopped" / name, tmp_path / "whole" / name)
    one, other = ([{k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")}
                   for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                  for name in ("stopped", "whole"))  # fmt: skip
    assert one == other


def test_two_ranks_stop_together_and_go_on(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    """SIGUSR1 to torchrun, as a cluster sends it; then a rank is killed; then they go on to the end: the same bits."""
    more = ["--epochs", "20", "--save_every", "1", "--set", "language.small.dropout=0"]
    out = tmp_path / "two"
    flags = flags_of(tiny_tsv, out, *more, "--bs", "4")
    process = torchrun(2, flags, root)
    wait_for_step(out, 3, process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    stopped = max(losses(out))
    assert find(out)[0].name.startswith(f"step-{stopped:09d}")
    report = [path.stat().st_mtime for path in find(out)]
    assert time.time() - max(report) < 30

    process = torchrun(2, flags, root)
    wait_for_step(out, stopped + 3, process)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert process.returncode != 0

    for folder in (out, tmp_path / "whole"):
        process = torchrun(2, flags_of(tiny_tsv, folder, *more, "--bs", "4"), root)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said[-3800:]
    assert losses(out) == losses(tmp_path / "whole")
    assert set(losses(out)) == set(range(1, 61))
    assert same_tensors(out / "model_latest.pt", tmp_path / "whole" / "model_latest.pt")


def mutated_losses(tiny_tsv: Path, out: Path, *flags: str) -> dict[int, float]:
    """Return the losses of a run that is left after step 4 and goes on."""
    config = config_of(tiny_tsv, out, "--save_every", "1", *flags)
    run = Run(config)
    for micro in run.steps():
        loss = run.backward(micro)
        run.report(loss, run.update(loss, micro), micro)
        run.save_latest()
        if run.step == 4:
            break
    train.train(config)
    return losses(out)


def forget(name: str) -> Any:
    """Return a `resume.load` that loses one thing of the state."""
    real = resume.load

    def load(*args: Any, **more: Any) -> dict[str, Any]:
        state = real(*args, **more)
        if name == "position":
            state["epoch"], state["epoch_step"] = 0, 0
        elif name == "schedule":
            state["schedule"] = {**state["schedule"], "last_epoch": 0, "_step_count": 1}
        elif name == "optimizer":
            state["optimizer"] = {**state["optimizer"], "state": {}}
        return state

    return load


@pytest.mark.parametrize("mutant", ["none", "random", "position", "schedule", "optimizer"])
def test_a_forgetful_save_is_found(
    tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    """The comparison of bits goes red for each part of the state that is not restored."""
    whole = tmp_path / "whole"
    train.train(config_of(tiny_tsv, whole))
    if mutant == "random":
        monkeypatch.setattr("git_model.training.seed_step", lambda *_: None)
        train.train(config_of(tiny_tsv, whole, "--resume", "no"))
    elif mutant != "none":
        monkeypatch.setattr(resume, "load", forget(mutant))
    equal = mutated_losses(tiny_tsv, tmp_path / "again") == losses(whole)
    equal &= same_tensors(tmp_path / "again" / "model_latest.pt", whole / "model_latest.pt")
    assert equal is (mutant == "none")


def test_the_scaler_comes_back(tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: a scaler of the same class on the CPU, through the run's own save and restore."""
    real, scale = engine.build_accelerator, 4096.0

    def with_scaler(config: Config) -> Any:
        accelerator = real(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    monkeypatch.setattr(engine, "build_accelerator", with_scaler)
    config = config_of(tiny_tsv, tmp_path)
    Run(config).save_latest()
    scale = 2.0
    scaler: Any = Run(config).scaler
    assert scaler.get_scale() == 4096.0


def test_a_kill_before_the_model_is_published(tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save is there, `model_latest.pt` is the one before: the next start mends it, though the run is through."""
    train.train(config_of(tiny_tsv, tmp_path, "--epochs", "1"))
    with monkeypatch.context() as patch:
        patch.setattr(resume, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.train(config_of(tiny_tsv, tmp_path, "--epochs", "2"))
    assert read_content(tmp_path / "model_latest.pt")["step"] == 3
    train.train(config_of(tiny_tsv, tmp_path, "--epochs", "2"))
    assert read_content(tmp_path / "model_latest.pt")["step"] == 6


def test_a_changed_machine_is_told(
    tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train.train(config_of(tiny_tsv, tmp_path, "--epochs", "1"))
    real = resume.fingerprint
    monkeypatch.setattr(resume, "fingerprint", lambda world: {**real(world), "threads": 99})
    with pytest.raises(UserError, match=r"threads was .*, is 99"):
        train.train(config_of(tiny_tsv, tmp_path, "--epochs", "2", "--require_exact"))
    train.train(config_of(tiny_tsv, tmp_path, "--epochs", "2"))
    assert "going on is not exact to the bit, threads was" in caplog.text


def test_two_writers(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    line = [sys.executable, "train.py", *flags_of(tiny_tsv, tmp_path)]
    with folder_lock(tmp_path, "run"):
        started = time.monotonic()
        done = subprocess.run(line, cwd=root, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"in use by {os.uname().nodename}, process {os.getpid()}" in done.stderr
        assert time.monotonic() - started < 10
        assert not list(tmp_path.glob("step-*"))
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from git_model.lock import folder_lock\n"
         "with folder_lock(Path(sys.argv[1]), 'run'): print('held', flush=True); time.sleep(60)", str(tmp_path)],
        cwd=root, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    with folder_lock(tmp_path, "run"):  # a killed holder holds nothing
        pass


def broken_source(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Let record 5 kill or hang the worker that reads it."""
    from git_model.datasets.sources import TSVPair

    real, mine = TSVPair.__getitem__, os.getpid()

    def getitem(self: TSVPair, index: int) -> Any:
        if index == 5 and os.getpid() != mine:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else time.sleep(60)
        return real(self, index)

    monkeypatch.setattr(TSVPair, "__getitem__", getitem)


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.1])
def test_a_worker_killed_at_any_time(tiny_tsv: Path, tmp_path: Path, root: Path, wait: float) -> None:
    """torch raises it wherever the main process is; it is told by the records all the same."""
    line = [sys.executable, "train.py", *flags_of(tiny_tsv, tmp_path, "--epochs", "200", "--workers", "1")]
    process = subprocess.Popen(line, cwd=root, env=ONE_THREAD, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 5, process)
    time.sleep(wait)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_BUG
    assert re.search(r"error: a data worker died .*; the workers were reading: record \d+", said), said[-800:]


@pytest.mark.parametrize(("how", "said"), [("killed", "died"), ("hung", "gave nothing for data.worker_timeout")])
def test_a_worker_that_dies_or_hangs(
    tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    broken_source(monkeypatch, how)
    config = config_of(tiny_tsv, tmp_path, "--workers", "2", "--set", "data.worker_timeout=2")
    with pytest.raises(UserError, match=rf"a data worker {said}.*record 5\b") as error:
        train.train(config)
    assert error.value.exit_code == EXIT_BUG


def test_a_folder_that_cannot_be_written(tiny_tsv: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", *flags_of(tiny_tsv, Path("/proc/nothing"))],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (2, 74)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("block", [0, 1, 7, 64])
def test_order_in_blocks(block: int) -> None:
    """A permutation, a function of seed and epoch, the same for every world; blocks stay together."""
    samplers = [
        GlobalSampler(1000, 4, seed=3, epochs=1, rank=rank, world=world, block=block)
        for world in (1, 2)
        for rank in range(world)
    ]
    order = samplers[0].order(0)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() == samplers[1].order(0).tolist()
    assert order.tolist() != samplers[0].order(1).tolist()
    if block in (7, 64):
        window = order[: 16 * block]
        assert len({r // block for r in window.tolist()}) <= 17
        assert np.abs(np.diff(window)).mean() > 1


def test_resuming_costs_nothing_at_any_size() -> None:
    """The position is two numbers: the first batch after 30 million samples comes as fast as the first of all."""
    late = GlobalSampler(3_300_000, 32, seed=0, epochs=10, start=(9, 100_000))
    started = time.perf_counter()
    batch = next(iter(late))
    assert time.perf_counter() - started < 2
    assert [record for _, record in batch] == late.order(9)[3_200_000 : 3_200_000 + 32].tolist()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("a[1,3]", "a1"),
        ("h1,h2", "h1"),
        ("r[1-2]-ib", "r1-ib"),
    ],
)
def test_slurms_lists_of_hosts(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_ranks_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "gpu[3-4]", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert rank_and_world() == (5, 8)
    adopt_slurm()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["5", "8", "1", "4", "gpu3", "23456"]
    for name in names:
        del os.environ[name]  # not by monkeypatch, which would bring them back


def test_the_time_limit(tiny_tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    assert not StopRequest(10).asked
    with pytest.raises(Preempted, match="stopped by the job's time limit and saved at step 1 of"):
        train.train(config_of(tiny_tsv, tmp_path, "--stop_before_end", "120"))
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    train.train(config_of(tiny_tsv, tmp_path))
    assert max(losses(tmp_path)) == 6


def test_the_time_limit_as_squeue_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$3" = 77 ] && echo 1-00:01:30 || echo UNLIMITED\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert abs(StopRequest(1).end - (time.time() + 86_400 + 90 - 1)) < 5
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert StopRequest(1).end == math.inf


@pytest.mark.slow
def test_real_shards_two_ranks_killed_then_one(tmp_path: Path, root: Path, reference_data: Path) -> None:
    """RSICD's tar shards: whatever happens, an epoch shows every picture exactly once."""
    recipe = root / "checkpoints" / "rsicd" / "config.yml"
    flags = ["--config", str(recipe), "--data_dir", str(reference_data / "data" / "rsicd"), "--epochs", "1"]
    flags += ["--output_dir", str(tmp_path / "run"), "--save_every", "3", "--log_every", "1", "--validate_samples", "2"]
    flags += ["--workers", "1", "--input_resolution", "32", "--set", "vision.small.stem=8,8,8,8", "--targets", "1"]
    flags += ["--set", "vision.small.width=16", "--set", "vision.small.depth=1", "--set", "vision.small.heads=2"]
    flags += ["--set", "language.small.width=32", "--set", "language.small.depth=1", "--set", "language.small.heads=2"]
    flags += ["--set", "data.cache=False", "--set", "data.augment=none", "--set", "data.shuffle_block=100"]
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    line += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", str(root / "tests" / "recording.py")]
    environment = {**ONE_THREAD, "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [*line, str(tmp_path / "two"), *flags, "--bs", "64"], cwd=root, env=environment, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 10, process)  # type: ignore[arg-type]
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=True)  # torchrun and its workers, all at once
    process.wait()
    saved = int(find(tmp_path / "run")[0].name.split("-")[1])
    one = [sys.executable, str(root / "tests" / "recording.py"), str(tmp_path / "one"), *flags, "--bs", "128"]
    done = subprocess.run(one, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    seen: Counter[str] = Counter()
    for name in ("two.0", "two.1", "one.0"):
        for told in map(json.loads, (tmp_path / name).read_text().splitlines()):
            if name == "one.0" or told["step"] <= saved:
                seen.update(told["keys"])
    assert len(seen) == 8734
    assert set(seen.values()) == {1}
