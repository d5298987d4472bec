"""The batch scripts under a real SLURM, in the real image: preempted and put back, in parts, one task a rank."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_container import TOOL, User, image, until, user
from test_train import losses, same_tensors

from git_model.checkpoint import read_content

__all__ = ["image", "user"]  # the fixtures

pytestmark = pytest.mark.container

# this machine's: no GPU, two cores
HERE = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=10")


def scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=False).stdout


@dataclass(frozen=True)
class Cluster:
    """A user with a copy of the project (the submitting folder of all jobs), data and a recipe."""

    user: User
    checkout: Path
    data: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a user exports: the image, two processes a node, one thread each."""
        known = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return {**known, "IMAGE": str(self.user.image), "GPUS": "2", "OMP_NUM_THREADS": "1"}

    def sbatch(self, *words: str, **more: str) -> str:
        """Submit a job and return its number."""
        line = self.user.line("sbatch", "--parsable", f"--output={self.checkout}/job-%A_%a.out", *HERE, *words)
        return self.user.run(*line, cwd=self.checkout, env={**self.environment, **more}).strip()

    def state(self, job: str) -> str:
        """Return the states of a job and of its array's tasks, and how often each was started again."""
        shown = scontrol("show", "job", job)
        return " ".join(word for word in shown.split() if word.startswith(("JobState=", "Restarts=")))

    def wait(self, job: str, seconds: float = 300) -> None:
        """Wait until it is over, and be content with nothing but success."""
        until(lambda: not {"PENDING", "RUNNING", "COMPLETING"} & _states(self.state(job)), f"job {job}", seconds)
        assert _states(self.state(job)) == {"COMPLETED"}, self.state(job) + self.said(job)[-3000:]

    def said(self, job: str) -> str:
        """Return what the job said, each of its starts."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.checkout.glob(f"job-{job}_*.out")))

    def execute(self, *words: str) -> str:
        """Run the checkout's code in the image, outside of SLURM."""
        line = self.user.line(TOOL, "exec", "--bind", str(self.data), str(self.user.image), *words)
        return self.user.run(*line, cwd=self.checkout, env=self.environment)


def _states(shown: str) -> set[str]:
    return {word.split("=")[1] for word in shown.split() if word.startswith("JobState=")}


@pytest.fixture(scope="module")
def cluster(user: User, tiny_tsv: Path, root: Path) -> Iterator[Cluster]:
    if not shutil.which("sbatch"):
        pytest.skip("no sbatch on PATH")
    if subprocess.run(["sinfo"], capture_output=True, check=False).returncode:
        pytest.skip("sbatch is here, but no SLURM answers")
    folder = Path(tempfile.mkdtemp(prefix="git-cluster-"))
    for name in ("train.py", "inference.py", "download.py"):
        shutil.copy(root / name, folder)
    shutil.copytree(root / "git_model", folder / "git_model", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "docs" / "slurm", folder / "docs" / "slurm")
    shutil.copytree(tiny_tsv, folder / "data")
    recipe = (folder / "data" / "recipe.yml").read_text().replace(str(tiny_tsv), str(folder / "data"))
    (folder / "data" / "recipe.yml").write_text(recipe)
    if user.name == "nobody":
        subprocess.run(["chown", "-R", "nobody:nogroup", str(folder)], check=True)
    folder.chmod(0o755)
    yield Cluster(user, folder, folder / "data")
    shutil.rmtree(folder)


def test_preempted_put_back_and_finished(cluster: Cluster) -> None:
    """Two ranks; USR1 as before a time limit; the queue starts it again: the same losses, the same weights."""
    given = ["--config", "data/recipe.yml", "--validate_samples", "2", "--bs", "4", "--workers", "1"]
    given += ["--epochs", "30", "--save_every", "1000"]
    launch = ["torchrun", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    cluster.execute(*launch, "--local-addr=127.0.0.1", "train.py", *given, "--output_dir", "one")
    out = cluster.checkout / "two"
    job = cluster.sbatch("docs/slurm/train.sbatch", *given, "--output_dir", "two")
    until(lambda: (out / "metrics.jsonl").exists() and max(losses(out), default=0) >= 5, "five steps")
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    until(lambda: "PENDING" in cluster.state(job) or "Restarts=1" in cluster.state(job), f"a requeue of job {job}", 120)
    reached = max(losses(out))
    assert 5 <= reached < 90, "it was stopped on the way"
    assert f"stopped by SIGUSR1 and saved at step {reached}" in cluster.said(job)
    cluster.wait(job)  # SLURM starts it again after two minutes, when the old start's credential is over
    assert "Restarts=1" in cluster.state(job)
    assert f"resuming at step {reached} of 90" in cluster.said(job)
    assert losses(out) == losses(cluster.checkout / "one")
    assert set(losses(out)) == set(range(1, 91))
    assert "squeue" not in cluster.said(job), "the end of the job's time is known inside"
    assert same_tensors(out / "model_latest.pt", cluster.checkout / "one" / "model_latest.pt")
    assert not [path.name for path in cluster.checkout.glob(".*-*")], "its notes are gone"


def test_an_array_of_parts_and_a_job_that_joins_them(cluster: Cluster) -> None:
    given = ["--config", "data/recipe.yml", "--epochs", "1", "--output_dir", "model"]
    job = cluster.sbatch("docs/slurm/run.sbatch", "train.py", *given)
    cluster.wait(job)
    params = {
        "type": "test_git_inference_single_tsv",
        "image_tsv": "data/t.img.tsv",
        "question_tsv": "data/t.question.tsv",
        "model_path": "model/model_latest.pt",
        "out_tsv": "one.tsv",
        "max_new_tokens": 8,
    }
    cluster.execute("python", "inference.py", "-p", json.dumps(params))
    parts = json.dumps(params | {"out_tsv": "parts.tsv"})[:-1] + ", }"  # as in the README, with its last comma
    array = cluster.sbatch("--array=0-3", "docs/slurm/caption.sbatch", parts)
    merge = json.dumps({"type": "merge_tsv_parts", "out_tsv": "parts.tsv", "parts": 4})
    joined = cluster.sbatch(f"--dependency=afterok:{array}", "docs/slurm/run.sbatch", "inference.py", "-p", merge)
    cluster.wait(joined)
    assert (cluster.checkout / "parts.tsv").read_bytes() == (cluster.checkout / "one.tsv").read_bytes()
    reports = [json.loads((cluster.checkout / f"{name}.run_report.json").read_text()) for name in ("one", "parts")]
    assert reports[1] == reports[0] | {"out_tsv": "parts.tsv"}
    assert sorted(p.name for p in cluster.checkout.glob("parts.*")) == [
        "parts.lineidx",
        "parts.lineidx.8b",
        "parts.run_report.json",
        "parts.tsv",
    ]


def test_one_task_a_rank_and_data_on_the_nodes_disk(cluster: Cluster) -> None:
    """`srun` starts the ranks itself; torchrun reads a copy of the data that is gone afterwards: the same losses."""
    given = ["--config", "data/recipe.yml", "--validate_samples", "2", "--bs", "4", "--epochs", "2"]
    ranks = cluster.sbatch("--ntasks-per-node=2", "docs/slurm/run.sbatch", "train.py", *given, "--output_dir", "ranks")
    cluster.wait(ranks)
    local = cluster.checkout / "local"
    subprocess.run(cluster.user.line("mkdir", str(local)), check=True)
    staged = cluster.sbatch("docs/slurm/train.sbatch", *given, "--output_dir", "staged", STAGE="data", LOCAL=str(local))
    cluster.wait(staged)
    assert len(losses(cluster.checkout / "ranks")) == 6
    assert losses(cluster.checkout / "ranks") == losses(cluster.checkout / "staged")
    trained_on = read_content(cluster.checkout / "staged" / "model_latest.pt")["config"]["data"]["dir"]
    assert trained_on == f"{local}/git-model-{staged}"
    assert not list(local.iterdir())
