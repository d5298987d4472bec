"""The batch scripts: signals go on to the training, a saved run is put back into the queue, a failed one is not."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import losses

from git_model.tasks.params import parse_params
from git_model.tasks.registry import resolve

SCRIPT = Path("docs") / "slurm" / "train.sbatch"
SRUN = '#!/bin/bash\necho "srun $*" >>"$CALLS"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "scontrol $*" >>"$CALLS"\n[ "$1" = show ] && echo localhost\nexit 0\n'
# a training that saves when asked, and ends with a code of the test's choice
TRAINER = """#!/bin/bash
stop() { [ -n "$SAVES" ] && echo "$SAVES" >"$GIT_MODEL_STOP_NOTE"; sleep 0.2; exit "$CODE"; }
trap stop USR1
echo started >>"$CALLS"
[ -n "$ENDS" ] && [ "$CODE" = 75 ] && echo 9 >"$GIT_MODEL_STOP_NOTE"
[ -n "$ENDS" ] && exit "${HIDDEN:-$CODE}"
while :; do sleep 0.05; done
"""


class Job:
    """A batch script that runs, with what SLURM's programs were asked."""

    def __init__(self, folder: Path, root: Path, **environment: str) -> None:
        self.calls = folder / "calls"
        tools = folder / "bin"
        tools.mkdir(exist_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "trainer": TRAINER}.items():
            absent = "#!/bin/bash\nexit 127\n"  # and not the machine's own: it might have such a job
            (tools / name).write_text(absent if f"NO_{name}" in environment else text)
            (tools / name).chmod(0o755)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
            "PATH": f"{tools}:/usr/bin:/bin",
            "CALLS": str(self.calls),
            "LAUNCH": "trainer",
            "SLURM_JOB_ID": "41",
            "SAVES": "7",
            "CODE": "75",
            "ENDS": "",
            **environment,
        }
        self.calls.write_text("")
        self.process = subprocess.Popen(
            ["bash", str(root / SCRIPT), "--config", "x.yml", "--output_dir=anywhere"],
            cwd=folder,
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    def signalled(self, *numbers: signal.Signals) -> tuple[int, str]:
        """Wait until the training runs, send signals to the script alone, return exit code and what it said."""
        until = time.monotonic() + 20
        while "started" not in self.calls.read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.1)
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.05)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    @property
    def requeued(self) -> list[str]:
        """What was put back into the queue."""
        return [line.split()[-1] for line in self.calls.read_text().splitlines() if "scontrol requeue" in line]


@pytest.mark.parametrize(
    "numbers",
    [(signal.SIGUSR1,), (signal.SIGTERM,), (signal.SIGUSR1, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1)],
    ids=["USR1", "TERM", "both", "twice"],
)
def test_a_saved_run_is_requeued(tmp_path: Path, root: Path, numbers: tuple[signal.Signals, ...]) -> None:
    job = Job(tmp_path, root)
    assert job.signalled(*numbers)[0] == 0
    assert job.requeued == ["41"]
    assert "srun --kill-on-bad-exit=1 trainer train.py --config x.yml" in job.calls.read_text()


def test_torchrun_hides_the_code(tmp_path: Path, root: Path) -> None:
    """It makes 1 of 75: the signal that was passed on tells."""
    job = Job(tmp_path, root, CODE="1")
    job.signalled(signal.SIGUSR1)
    assert job.requeued == ["41"]


@pytest.mark.parametrize("code", ["0", "2", "3", "70", "1"])
def test_an_end_of_its_own_is_an_end(tmp_path: Path, root: Path, code: str) -> None:
    job = Job(tmp_path, root, CODE=code, ENDS="yes")
    job.process.communicate(timeout=30)
    assert job.process.returncode == int(code)
    assert job.requeued == []


@pytest.mark.parametrize("hidden", ["75", "1"], ids=["python", "torchrun"])
def test_the_time_limit_inside_needs_no_signal(tmp_path: Path, root: Path, hidden: str) -> None:
    job = Job(tmp_path, root, CODE="75", ENDS="yes", HIDDEN=hidden)
    job.process.communicate(timeout=30)
    assert job.requeued == ["41"]


def test_it_finished_while_it_was_asked(tmp_path: Path, root: Path) -> None:
    job = Job(tmp_path, root, CODE="0", SAVES="")
    assert job.signalled(signal.SIGUSR1)[0] == 0
    assert job.requeued == []


def test_an_array_job(tmp_path: Path, root: Path) -> None:
    job = Job(tmp_path, root, SLURM_ARRAY_JOB_ID="90", SLURM_ARRAY_TASK_ID="7")
    job.signalled(signal.SIGUSR1)
    assert job.requeued == ["90_7"]


@pytest.mark.parametrize("identity", ["", "41; rm -rf /", "-h"])
def test_no_job_that_could_be_requeued(tmp_path: Path, root: Path, identity: str) -> None:
    code, said = Job(tmp_path, root, SLURM_JOB_ID=identity).signalled(signal.SIGUSR1)
    assert code == 75
    assert "everything is saved, start it again" in said


def test_without_scontrol(tmp_path: Path, root: Path) -> None:
    code, said = Job(tmp_path, root, NO_scontrol="yes").signalled(signal.SIGUSR1)
    assert code == 75
    assert "scontrol cannot requeue 41; everything is saved" in said


def test_no_loop_without_progress(tmp_path: Path, root: Path) -> None:
    """Three times without coming further are enough; a save of a later step starts the count anew."""
    for saves, code in (("", 0), ("", 0), ("5", 0), ("5", 0), ("", 0), ("6", 0), ("6", 0), ("6", 0), ("", 75)):
        job = Job(tmp_path, root, SAVES=saves)
        ended, said = job.signalled(signal.SIGUSR1)
        assert ended == code, (saves, said)
    assert "started 3 times without coming further than step 6" in said
    assert job.requeued == []
    assert not list(tmp_path.glob(".requeued-*"))


def test_a_real_training_through_the_script(tiny_tsv: Path, tmp_path: Path, root: Path) -> None:
    """Asked to stop, requeued, started again by the queue, finished: the same losses as without all that."""
    folder, calls = tmp_path / "run", tmp_path / "calls"
    environment = Job(tmp_path, root, ENDS="yes", CODE="0").environment
    environment |= {"LAUNCH": sys.executable, "OMP_NUM_THREADS": "1"}
    flags = ["--config", str(tiny_tsv / "recipe.yml"), "--epochs", "20", "--save_every", "1000"]
    line = ["bash", str(root / SCRIPT), *flags, "--output_dir", str(folder)]
    calls.write_text("")
    process = subprocess.Popen(line, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or max(losses(folder), default=0) < 5:
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert "stopped by SIGUSR1 and saved at step" in said
    assert "scontrol requeue 41" in calls.read_text()
    assert subprocess.run(line, cwd=root, env=environment, capture_output=True).returncode == 0
    assert not list(root.glob(".requeued-41")) + list(root.glob(".stopped-41"))
    assert set(losses(folder)) == set(range(1, 61))
    assert calls.read_text().count("scontrol requeue") == 1


# ---- the other scripts


def submit(folder: Path, root: Path, script: str, *words: str, srun: str = "", **more: str) -> subprocess.Popen[str]:
    """Start a batch script with programs that note what they are asked."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    noting = '#!/bin/bash\n{ printf "%s" "${0##*/}"; printf "\\t%q" "$@"; echo; } >>"$CALLS"\n'
    for name, rest in {"srun": srun, "scontrol": ""}.items():
        (tools / name).write_text(noting + rest)
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "CALLS": str(folder / "calls"), "SLURM_JOB_ID": "41", **more}
    line = ["bash", str(root / "docs" / "slurm" / script), *words]
    return subprocess.Popen(line, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)


def asked(folder: Path, program: str) -> list[list[str]]:
    """Return what a program was asked, one list of words a call."""
    lines = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    told = [subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True) for line in lines]
    return [words[1:-1] for words in (done.stdout.split("\0") for done in told) if words[0] == program]


def test_every_script_is_sound(root: Path) -> None:
    scripts = sorted((root / "docs" / "slurm").glob("*.sbatch"))
    assert [path.name for path in scripts] == ["caption.sbatch", "run.sbatch", "train.sbatch"]
    for path in scripts:
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_pages_tasks_resolve(root: Path) -> None:
    page = (root / "docs" / "cluster.md").read_text(encoding="utf-8")
    found = [resolve(parse_params(text))[0].__name__ for text in re.findall(r'"(\{.*?\})"', page, re.DOTALL)]
    assert found == ["caption_tsv", "merge_tsv_parts"]
    for name in re.findall(r"docs/slurm/[\w.]+", page):
        assert (root / name).is_file(), name


@pytest.mark.parametrize("end", ["}", ", }", ", \\\n}", "}  "])
def test_a_task_of_an_array_does_its_part(tmp_path: Path, root: Path, end: str) -> None:
    given = (
        "{'type': 'test_git_inference_single_tsv', 'image_tsv': 'a {b}.tsv', 'model_path': 'm.pt', 'out_tsv': 'o.tsv'"
    )
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    for more, parts in (({}, 4), ({"PARTS": "8"}, 8)):
        process = submit(tmp_path, root, "caption.sbatch", given + end, **array, **more)
        assert process.wait(timeout=30) == 0, process.communicate()[1]
        words = asked(tmp_path, "srun")[-1]
        assert words[:-1] == ["--kill-on-bad-exit=1", "python", "inference.py", "-p"]
        arguments = resolve(parse_params(words[-1]))[1]
        assert (arguments["share"].part, arguments["share"].parts) == (2, parts)
        assert arguments["image_tsv"] == "a {b}.tsv"


def test_a_part_without_time_goes_back_into_the_queue(tmp_path: Path, root: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "90", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "9"}
    process = submit(tmp_path, root, "caption.sbatch", "{'type': 'x'}", srun="sleep 1", **array)
    until = time.monotonic() + 20
    while not asked(tmp_path, "srun"):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=30) == 0
    assert asked(tmp_path, "scontrol") == [["requeue", "90_7"]]


@pytest.mark.parametrize("script", ["train.sbatch", "run.sbatch", "caption.sbatch"])
def test_in_a_container(tmp_path: Path, root: Path, script: str) -> None:
    """IMAGE puts `singularity exec` before the program; signals to all pass by what serves the image's files."""
    more = {"IMAGE": "my image.sif", "SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1", "LAUNCH": "torchrun"}
    for flags, expected in (({}, ["--nv"]), ({"CONTAINER_FLAGS": "--nv --bind /data"}, ["--nv", "--bind", "/data"])):
        assert submit(tmp_path, root, script, "{'type': 'x'}", **more, **flags).wait(timeout=30) == 0
        words = asked(tmp_path, "srun")[-1]
        start = words.index("singularity")
        assert words[start : start + 3 + len(expected)] == ["singularity", "exec", *expected, "my image.sif"]
        assert words[1:4] == (
            ["bash", "-c", 'trap "" USR1 TERM; exec "$@"'] if script != "caption.sbatch" else words[1:4]
        )


def test_data_on_the_nodes_disk(tmp_path: Path, root: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a b.tar").write_bytes(b"shard")
    real = 'while [[ $1 == --* ]]; do shift; done\n[ "$1" = trainer ] || exec "$@"\nls "$LOCAL"/*/* >>"$LOCAL/seen"'
    more = {"STAGE": "data", "LOCAL": str(tmp_path / "my local"), "LAUNCH": "trainer"}
    (tmp_path / "my local").mkdir()
    process = submit(tmp_path, root, "train.sbatch", "--epochs", "1", srun=real, **more)
    assert process.wait(timeout=30) == 0, process.communicate()[1]
    calls = asked(tmp_path, "srun")
    assert calls[1][-2:] == ["--data_dir", f"{tmp_path}/my local/git-model-41"]
    assert (tmp_path / "my local" / "seen").read_text().strip().endswith("a b.tar")
    assert [path.name for path in (tmp_path / "my local").iterdir()] == ["seen"], "the copy is gone"
    process = submit(tmp_path, root, "train.sbatch", srun=real, **more | {"STAGE": "nowhere"})
    assert process.wait(timeout=30) == 74, "nothing is trained without the data"
