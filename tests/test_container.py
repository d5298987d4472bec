"""The real image: its own test, the README's commands from a read-only file system, and under a real SLURM.

`make container-test` builds the image and runs these; GIT_MODEL_IMAGE names another one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_train import losses

pytestmark = pytest.mark.container

PROJECT = "/opt/generative-image-to-text"
TOOL = shutil.which("singularity") or shutil.which("apptainer") or ""
TROUBLE = re.compile(r"Traceback|Read-only file system|Permission denied|Matplotlib|not a writable|cannot (find|reach)")
# as on a node that knows nobody: no home, no network, nothing of the host's environment, an image of its own
ALONE = ("--containall", "--no-home", "--net", "--network", "none")


@dataclass(frozen=True)
class User:
    """Someone with a folder of their own and the image, on a machine where only that much is theirs."""

    name: str
    folder: Path
    image: Path

    def line(self, *words: str) -> list[str]:
        """Return the command as this user's."""
        plain = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        return [*(plain if self.name == "nobody" else []), *words]

    def inside(self, *words: str) -> list[str]:
        """Return the command in the image, which has no network and sees nothing but the folder."""
        return self.line(
            TOOL, "exec", *ALONE, "--bind", f"{self.folder}:/data", "--pwd", "/data", str(self.image), *words
        )

    def run(self, *line: str, **options: Any) -> str:
        """Run it to its end; return what it printed, having looked for signs of trouble."""
        done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False, **options)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
        assert not TROUBLE.search(done.stderr), done.stderr[-3000:]
        return done.stdout

    def task(self, **params: Any) -> Any:
        """Run a task of inference.py in the image and return its result."""
        return json.loads(self.run(*self.inside("python", f"{PROJECT}/inference.py", "-p", json.dumps(params))))


@pytest.fixture(scope="module")
def image(root: Path) -> Path:
    if not TOOL:
        pytest.skip("no singularity and no apptainer on PATH")
    path = Path(os.environ.get("GIT_MODEL_IMAGE", root / "generative-image-to-text.sif")).resolve()
    if not path.is_file():
        pytest.skip(f"no image at {path} (make container-test builds it)")
    return path


@pytest.fixture(scope="module", params=["self", "nobody"])
def user(request: pytest.FixtureRequest, image: Path) -> Iterator[User]:
    """Who runs the tests, and (where that is root) an ordinary user whose home does not exist."""
    if request.param == "nobody" and os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp(prefix="git-container-"))
    if request.param == "nobody":
        shutil.chown(folder, "nobody", "nogroup")
        folder.chmod(0o755)
        readable = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "test", "-r", str(image)]
        if subprocess.run(readable).returncode:
            image = Path(shutil.copy(image, folder))
    yield User(request.param, folder, image)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shapes(user: User) -> User:
    """A few drawn scenes, made in the image."""
    user.task(type="make_shapes", out_dir="shapes", train=48, val=8, test=8)
    return user


def flags(out: str, *more: str) -> list[str]:
    """The README's training command: the demo's recipe, with one layer and few steps."""
    small = ["--set", "language.small.depth=1", "--set", "vision.small.stem=16,16,16", "--log_every", "1"]
    given = ["--config", f"{PROJECT}/checkpoints/shapes/config.yml", "--data_dir", "shapes", "--output_dir", out]
    return [*given, "--bs", "4", "--epochs", "2", "--validate_samples", "2", "--save_every", "2", *small, *more]


def until(ready: Any, what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def step_of(folder: Path) -> int:
    return max(losses(folder), default=0) if (folder / "metrics.jsonl").exists() else 0


# ---- the image


def test_it_holds_this_project(image: Path, root: Path) -> None:
    names = ["train.py", "inference.py", "download.py", "constraints.txt", "pyproject.toml"]
    names += [str(path.relative_to(root)) for path in sorted(root.glob("checkpoints/*/config.yml"))]
    names += [str(path.relative_to(root)) for path in sorted((root / "git_model").rglob("*.py"))]
    said = subprocess.run(
        [TOOL, "exec", "--pwd", PROJECT, str(image), "sha256sum", *names], capture_output=True, text=True, check=False
    )
    own = subprocess.run(["sha256sum", *names], cwd=root, capture_output=True, text=True, check=True).stdout
    changed = {line.split()[-1] for line in set(own.splitlines()) - set(said.stdout.splitlines())}
    assert not changed, f"{image} was made before {sorted(changed)} changed: remove it, make container-test builds it"


def test_its_own_test(user: User) -> None:
    folder = user.folder / "tmp"
    subprocess.run(user.line("mkdir", "-p", str(folder)), check=True)
    line = user.line(TOOL, "test", "--bind", str(folder), str(user.image))
    told = user.run(*line, cwd=user.folder, env={**os.environ, "TMPDIR": str(folder)})
    assert "ten pictures were trained on, ten others captioned" in told
    assert not list(folder.iterdir()), "it cleans up"


def test_it_says_what_it_can_do(image: Path) -> None:
    for words in ((), ("fly",)):
        done = subprocess.run([TOOL, "run", str(image), *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "one of: train, inference, download" in done.stderr
    for word in ("train", "inference", "download"):
        done = subprocess.run([TOOL, "run", str(image), word, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert f"usage: {word}.py" in done.stdout
    told = subprocess.run([TOOL, "run-help", str(image)], capture_output=True, text=True, check=True).stdout
    assert "singularity run --nv generative-image-to-text.sif train --help" in told


def test_whose_code_runs(user: User) -> None:
    """A checkout in the current directory comes before the image's copy; without one, that is used."""
    checkout = user.folder / "checkout" / "git_model"
    subprocess.run(user.line("mkdir", "-p", str(checkout)), check=True)
    (checkout / "__init__.py").write_text("")
    for folder, where in ((checkout.parent, "/data/checkout"), (user.folder, PROJECT)):
        (folder / "where.py").write_text("import git_model\nprint(git_model.__file__)\n")
        launch = [
            "torchrun",
            "--nproc_per_node=1",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=127.0.0.1:0",
            "--local-addr=127.0.0.1",
        ]
        inside = "/data/checkout" if folder != user.folder else "/data"
        line = [*user.inside(*launch, "where.py")]
        line[line.index("--pwd") + 1] = inside
        assert user.run(*line).startswith(f"{where}/git_model/")


def test_the_readmes_commands(shapes: User) -> None:
    """Trains, is killed, goes on; captions, answers, scores with METEOR, writes EvalAI's file."""
    user, out = shapes, shapes.folder / "run"
    launch = ["torchrun", "--nnodes=1", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    train = user.inside(*launch, "--local-addr=127.0.0.1", f"{PROJECT}/train.py", *flags("run"))
    with (user.folder / "said").open("wb") as said:
        process = subprocess.Popen(train, stderr=said, start_new_session=True)
        until(lambda: process.poll() is not None or step_of(out) >= 5, "five steps")
        assert process.poll() is None, (user.folder / "said").read_text()[-3000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reached = step_of(out)
    user.run(*train)
    assert set(losses(out)) == set(range(1, 25))
    assert 5 <= reached < 24, "it was killed on the way"
    model = {"model_path": "run/model_latest.pt", "image_tsv": "shapes/test.img.tsv", "max_new_tokens": 8}
    user.task(type="test_git_inference_single_tsv", out_tsv="c.tsv", **model)
    scores = user.task(type="evaluate_on_coco_caption", res_file="c.tsv", label_file="shapes/test.caption.tsv")
    assert set(scores["not_computed"]) == {"SPICE"}
    assert 0 <= scores["METEOR"] <= 1
    assert scores["tokenizer"] == "java"
    asked = "shapes/test.question.tsv"
    user.task(type="test_git_inference_single_tsv", out_tsv="a.tsv", question_tsv=asked, **model)
    user.task(type="convert_tsv_to_vqa_json", predict_file="a.tsv", out_json="evalai.json")
    answers = json.loads((user.folder / "evalai.json").read_text())
    assert {tuple(sorted(answer)) for answer in answers} == {("answer", "question_id")}
    assert len(answers) == len((user.folder / "a.tsv").read_text().splitlines())
    assert {path.owner() for path in out.iterdir()} == {user.folder.owner()}


def test_nothing_is_said_of_caches(user: User) -> None:
    """Libraries that want to write into a home find a place, in silence."""
    code = "import matplotlib.pyplot, torch, transformers, huggingface_hub; print('quiet')"
    done = subprocess.run(user.inside("python", "-W", "error::UserWarning", "-c", code), capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("quiet\n", 0), done.stderr
    assert not [line for line in done.stderr.splitlines() if not line.startswith("INFO:")], done.stderr
