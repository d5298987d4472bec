"""What a cluster says to a process: who it is among the others, that it must stop, when its time is over."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

STOP_NOTE = "GIT_MODEL_STOP_NOTE"  # names the file that docs/slurm/train.sbatch looks at
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and how many there are: torchrun's variables, or those of srun.

    SLURM_NTASKS would not do: a batch script has it, too, and is one process.
    """
    for rank, world in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")):
        if rank in os.environ and world in os.environ:
            return int(os.environ[rank]), int(os.environ[world])
    return 0, 1


def adopt_slurm() -> None:
    """Under srun without torchrun, give torch.distributed its variables: one task a GPU, the first host leads."""
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    first = first_host(os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "localhost")))
    job = int(re.sub(r"\D", "", os.environ.get("SLURM_JOB_ID", "0")) or 0)
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    given = {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": tasks,
        "MASTER_ADDR": first,
        "MASTER_PORT": str(20_000 + job % 20_000),  # two jobs on a node must not meet
    }
    for name, value in given.items():
        os.environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's list, such as `gpu[003-007,012],login1`."""
    match = re.match(r"([^\[,]+)(?:\[([^\]]+)\])?([^,]*)", nodes.strip())
    if match is None:
        return "localhost"
    stem, numbers, rest = match.groups()
    return stem + re.split(r"[-,]", numbers)[0] + rest if numbers else stem


def note_stop(step: int) -> None:
    """Tell the batch script that the run was stopped and saved: torchrun makes 1 of every exit code."""
    path = os.environ.get(STOP_NOTE)
    if path:
        with open(path, "w", encoding="ascii") as file:
            file.write(f"{step}\n")


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM or SIGUSR1, or because its time is nearly over.

    Args:
        margin: seconds before the end of a SLURM job's time at which to stop; 0 = look at signals only.
    """

    def __init__(self, margin: float = 0.0) -> None:
        self.why = ""
        self.end = _job_end() - margin if margin else float("inf")

    @property
    def asked(self) -> bool:
        """Whether to stop at the next good moment."""
        if not self.why and time.time() >= self.end:
            self.why = "the job's time limit"
        return bool(self.why)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals instead of dying of them, in this block; the handler does nothing else."""

        def note(number: int, _frame: object) -> None:
            self.why = self.why or signal.Signals(number).name

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _job_end() -> float:
    """Return when this SLURM job will be ended, in seconds since 1970; infinity outside of one."""
    known = os.environ.get("SLURM_JOB_END_TIME", "")
    if known.isdecimal():
        return float(known)
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        return float("inf")
    try:  # older versions set no variable
        line = ["squeue", "--noheader", "--job", job, "--format", "%L"]
        left = subprocess.run(line, capture_output=True, text=True, timeout=20).stdout.strip()  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("cannot ask squeue for the job's time limit (%s): stopping at signals only", error)
        return float("inf")
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)
    if match is None:  # UNLIMITED, NOT_SET
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return time.time() + ((days * 24 + hours) * 60 + minutes) * 60 + seconds
