"""The batch task: same text for any batch size and number of ranks, error records, resume, two real processes."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import config, git_model, png
from tqdm import tqdm

from git_model.checkpoint import save_checkpoint
from git_model.datasets.records import TSVFile, json_cell, write_tsv
from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks import journal
from git_model.tasks.registry import run

QUESTIONS = ("what is it?", "is it red, or is it rather of another colour that is not red?", "why?")
BROKEN = {3: "bad_base64", 5: "not_image:text", 8: "duplicate_key", 11: "key_mismatch", 13: "bad_question_json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, 40 good pictures with one to three questions, and the same with five broken rows."""
    folder = tmp_path_factory.mktemp("batch")
    save_checkpoint(folder / "model.pt", git_model(), config(), step=0, epoch=0)
    for name, broken in (("good", {}), ("bad", BROKEN)):
        keys = ["k7" if broken and i == 8 else f"k{i}" for i in range(40)]
        images = [base64.b64encode(png(i)).decode() for i in range(40)]
        asked = [
            [{"question": q, "question_id": 10 * i + n} for n, q in enumerate(QUESTIONS[: 1 + i % 3])]
            for i in range(40)
        ]
        questions = [[key, json_cell(q)] for key, q in zip(keys, asked, strict=True)]
        if broken:
            images[3], images[5] = "not base64!", base64.b64encode(b"a page of text").decode()
            questions[11][0], questions[13][1] = "other", '[{"question": 3}]'
        write_tsv(folder / f"{name}.img.tsv", zip(keys, images, strict=True))
        write_tsv(folder / f"{name}.question.tsv", questions)
    return folder


def answer(folder: Path, out: Path, name: str = "good", questions: bool = True, **options: Any) -> bytes:
    """Run the task in this process and return its output."""
    asked = {"question_tsv": str(folder / f"{name}.question.tsv")} if questions else {}
    files = {"image_tsv": str(folder / f"{name}.img.tsv"), "model_path": str(folder / "model.pt"), **asked}
    options = {"max_new_tokens": 6, "workers": 0, "device": "cpu"} | options
    run({"type": "test_git_inference_single_tsv", "out_tsv": str(out), **files, **options})
    return out.read_bytes()


@pytest.mark.parametrize("questions", [True, False])
@pytest.mark.parametrize("beams", [1, 3])
def test_every_batch_size_says_the_same(folder: Path, tmp_path: Path, questions: bool, beams: int) -> None:
    said = {
        answer(folder, tmp_path / f"{size}.tsv", questions=questions, beams=beams, batch_size=size)
        for size in (1, 7, 64)
    }
    assert len(said) == 1
    rows = said.pop().decode().splitlines()
    assert len(rows) == (sum(1 + i % 3 for i in range(40)) if questions else 40)
    assert len(set(rows)) > 3  # a model that always says the same would pass anything


def test_one_row_is_what_the_single_image_task_says(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(png(4))
    lines = answer(folder, tmp_path / "o.tsv").decode().splitlines()
    texts = {json.loads(line)["question_id"]: json.loads(line)["answer"] for line in lines}
    for number in range(2):
        single = run(
            {
                "type": "test_git_inference_single_image",
                "image_path": str(tmp_path / "p.png"),
                "model_path": str(folder / "model.pt"),
                "prompt": QUESTIONS[number],
                "max_new_tokens": 6,
                "device": "cpu",
            }
        )
        assert texts[40 + number] == single["text"]


def test_the_output_is_gits(folder: Path, tmp_path: Path) -> None:
    answer(folder, tmp_path / "c.tsv", questions=False)
    rows = TSVFile(tmp_path / "c.tsv")
    assert [row[0] for row in rows] == [f"k{i}" for i in range(40)]
    assert all(list(json.loads(row[1])[0]) == ["caption"] for row in rows)
    assert (tmp_path / "c.lineidx.8b").is_file()
    assert (tmp_path / "c.lineidx").is_file()
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"c.tsv", "c.lineidx", "c.lineidx.8b", "c.run_report.json"}


def test_a_bad_row_gets_a_record_and_a_count(folder: Path, tmp_path: Path) -> None:
    answer(folder, tmp_path / "b.tsv", "bad", max_bad=0.2)
    report = json.loads((tmp_path / "b.run_report.json").read_text())
    assert report["reasons"] == dict.fromkeys(sorted(BROKEN.values()), 1)
    assert report["rows"] == 40 == report["ok"] + sum(report["reasons"].values())
    detail = next(e["detail"] for e in report["examples"] if e["reason"] == "key_mismatch")
    assert "row 11" in detail
    assert "'other'" in detail
    assert "'k11'" in detail
    answer(folder, tmp_path / "g.tsv")
    good = [json.loads(row[0]) for row in TSVFile(tmp_path / "g.tsv")]
    bad = [json.loads(row[0]) for row in TSVFile(tmp_path / "b.tsv")]
    assert {r["error"] for r in bad if "error" in r} == set(BROKEN.values())
    spared = {r["question_id"]: r for r in good if r["question_id"] // 10 not in BROKEN}
    assert {r["question_id"]: r for r in bad if "error" not in r} == spared
    ids = [r["question_id"] for r in bad]
    assert [i for i in ids if i is not None] == [r["question_id"] for r in good if r["question_id"] // 10 != 13]
    assert ids.count(None) == 1


def test_too_many_bad_rows_end_with_3_and_all_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"5 of 40 rows .*not_image") as caught:
        answer(folder, tmp_path / "b.tsv", "bad")
    assert caught.value.exit_code == EXIT_TOO_MANY_BAD
    assert len(TSVFile(tmp_path / "b.tsv")) > 70


def test_questions_of_other_rows_are_refused(folder: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "few.tsv", [("k0", "[]")])
    with pytest.raises(UserError, match="has 1 rows"):
        answer(folder, tmp_path / "o.tsv", question_tsv=str(tmp_path / "few.tsv"), questions=False)


@pytest.mark.parametrize("beams", [1, 4])
def test_answers_come_from_the_list(folder: Path, tmp_path: Path, beams: int) -> None:
    allowed = ["yes", "no", "yesterday", "a red square", "a red"]
    (tmp_path / "answers.txt").write_text("\n".join(allowed))
    options = {"answer_list": str(tmp_path / "answers.txt"), "beams": beams}
    said = {answer(folder, tmp_path / f"{size}.tsv", batch_size=size, **options) for size in (1, 64)}
    assert len(said) == 1
    found = {json.loads(line)["answer"] for line in said.pop().splitlines()}
    assert found <= set(allowed)
    assert len(found) > 1


def test_an_answer_list_is_checked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, words in (("empty.txt", "holds no answer"), ("none.txt", "cannot read answer_list")):
        with pytest.raises(UserError, match=words):
            answer(folder, tmp_path / "o.tsv", answer_list=str(tmp_path / name))


def test_odd_rows_are_records_not_the_runs_end(folder: Path, tmp_path: Path) -> None:
    images = [(f"k{i}", base64.b64encode(png(i)).decode()) for i in range(4)]
    lines = ["\t".join(row) for row in images]
    lines[1] = lines[1].replace("k1", "k\r1")
    (tmp_path / "i.tsv").write_bytes(("\n".join([*lines, "\r"]) + "\n").encode())
    asked = ["what?"] * 5
    asked[2], asked[3] = "what \ud83d?", "why? " * 300
    keys = ["k0", "k\r1", "k2", "k3", "\r"]
    rows = (
        f"{k}\t{json_cell([{'question': q, 'question_id': i}])}"
        for i, (k, q) in enumerate(zip(keys, asked, strict=False))
    )
    (tmp_path / "q.tsv").write_bytes(("\n".join(rows) + "\n").encode())
    files = {"image_tsv": str(tmp_path / "i.tsv"), "question_tsv": str(tmp_path / "q.tsv"), "max_bad": 1}
    answer(folder, tmp_path / "o.tsv", **files)
    records = [json.loads(row[0]) for row in TSVFile(tmp_path / "o.tsv")]
    errors = [record.get("error") for record in records]
    assert errors == [None, "bad_key", "bad_question_json", "bad_prompt", "bad_row"]
    answer(folder, tmp_path / "c.tsv", **{**files, "question_tsv": None})
    assert [row[0] for row in TSVFile(tmp_path / "c.tsv")] == ["k0", "k1", "k2", "k3", ""]


def test_an_input_is_never_overwritten(folder: Path) -> None:
    before = (folder / "good.img.tsv").read_bytes()
    with pytest.raises(UserError, match="would overwrite the input"):
        answer(folder, folder / "good.img.tsv")
    assert (folder / "good.img.tsv").read_bytes() == before


def test_an_old_report_is_not_another_outputs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(folder, tmp_path / "o.tsv")
    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # killed between the output and its report
            answer(folder, tmp_path / "o.tsv", max_new_tokens=2)
    assert answer(folder, tmp_path / "o.tsv") == first


def test_what_is_done_is_not_done_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = answer(folder, tmp_path / "o.tsv")
    monkeypatch.setattr("git_model.tasks.captioner.open_captioner", None)  # would fail if it were called
    assert answer(folder, tmp_path / "o.tsv") == first
    with pytest.raises(TypeError):
        answer(folder, tmp_path / "o.tsv", max_new_tokens=7)  # another job


def test_a_journal_goes_on_with_another_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.tsv"
    rows = {i: journal.Done((f"k{i}", "[]")) for i in range(10)}
    one = journal.Journal(out, "job", 0, 1, 10)
    one.add({i: rows[i] for i in range(7)})
    one.close()
    with one.path.open("ab") as file:
        file.write(b'[7, ["k7", "')  # torn by a kill
    first, second = (journal.Journal(out, "job", rank, 2, 10) for rank in range(2))
    assert (first.left(), second.left()) == ([], [7, 8, 9])
    assert journal.Journal(out, "another job", 0, 1, 10).left() == list(range(10))


COMMAND = [sys.executable, "inference.py", "-p"]


def params(folder: Path, out: Path, name: str = "good") -> str:
    values = {
        "type": "test_git_inference_single_tsv",
        "image_tsv": str(folder / f"{name}.img.tsv"),
        "question_tsv": str(folder / f"{name}.question.tsv"),
        "model_path": str(folder / "model.pt"),
        "out_tsv": str(out),
        "max_new_tokens": 6,
        "batch_size": 1,
        "workers": 1,
        "max_bad": 1,
        "device": "cpu",
    }
    return json.dumps(values)


def test_two_processes_say_what_one_says(folder: Path, tmp_path: Path, root: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2", "--master_port=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "inference.py", "-p", params(folder, tmp_path / "two.tsv", "bad")],
        cwd=root,
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["reasons"] == dict.fromkeys(sorted(BROKEN.values()), 1)
    assert (tmp_path / "two.tsv").read_bytes() == answer(folder, tmp_path / "one.tsv", "bad", max_bad=1)
    assert not list(tmp_path.glob("two.tsv.*"))


KILLS = int(os.environ.get("GIT_MODEL_KILLS", "20"))


def test_killed_at_any_moment_it_goes_on(folder: Path, tmp_path: Path) -> None:
    """kill -9 at random moments; a fork of this process is a process of its own, without the seconds of imports."""
    expected = answer(folder, tmp_path / "whole.tsv", batch_size=1)
    start = time.monotonic()
    answer(folder, tmp_path / "timed.tsv", batch_size=1)
    span = time.monotonic() - start
    dice, out, kills, finished = random.Random(0), tmp_path / "killed.tsv", 0, 0
    while kills < KILLS:
        child = os.fork()
        if child == 0:
            code = 1
            torch.set_num_threads(1)  # a forked process has none of its parent's
            tqdm.set_lock(threading.RLock())  # tqdm's own is shared with the parent: killed holding it, both would wait
            try:
                answer(folder, out, batch_size=1)
                code = 0
            finally:
                os._exit(code)
        time.sleep(dice.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
        else:
            kills += 1
        if out.exists():  # never anything but the whole
            assert out.read_bytes() == expected
            finished += 1
            for path in tmp_path.glob("killed.*"):
                path.unlink()
    assert finished > 0
    assert answer(folder, out, batch_size=1) == expected
