"""A TSV in parts, as array jobs do it: each block a process of its own, joined into what one process writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_tsv_task import BROKEN, COMMAND, answer, folder, params

from git_model.errors import EXIT_TOO_MANY_BAD, UserError
from git_model.tasks import journal, tsv
from git_model.tasks.registry import run

__all__ = ["folder"]  # the fixture: a random model, 40 good pictures, 40 of which five are broken

PARTS = 4


def do(folder: Path, out: Path, *parts: int, name: str = "bad", **options: Any) -> None:
    """Do some parts in this process; a part alone leaves no output."""
    for part in parts:
        with pytest.raises(FileNotFoundError):
            answer(folder, out, name, part=part, parts=PARTS, **options)


def merge(out: Path, parts: int = PARTS, **options: Any) -> dict[str, Any]:
    return run({"type": "merge_tsv_parts", "out_tsv": str(out), "parts": parts, **options})


def shown(out: Path) -> tuple[list[bytes], dict[str, Any]]:
    """Return the bytes of the output and its indexes, and the report without the output's name."""
    files = [out, out.with_suffix(".lineidx"), out.with_suffix(".lineidx.8b")]
    report = json.loads(journal.report_path(out).read_bytes())
    assert report.pop("out_tsv") == str(out)
    return [path.read_bytes() for path in files], report


@pytest.mark.parametrize("questions", [True, False], ids=["answers", "captions"])
def test_four_parts_in_any_order_are_the_whole(folder: Path, tmp_path: Path, questions: bool) -> None:
    answer(folder, tmp_path / "one.tsv", "bad", questions, max_bad=1)
    out = tmp_path / "parts.tsv"
    do(folder, out, 2, 0, 3, 1, questions=questions)
    assert merge(out, max_bad=1)["rows"] == 40
    assert shown(out) == shown(tmp_path / "one.tsv")
    assert len(list(tmp_path.iterdir())) == 8, "nothing else is left"
    assert merge(out, max_bad=1)["rows"] == 40, "merged already"
    assert answer(folder, out, "bad", questions, part=1, parts=PARTS, max_bad=1) == out.read_bytes(), "all is done"


def test_examples_are_the_same_few(folder: Path, tmp_path: Path) -> None:
    """More broken rows than a report shows: the parts' examples are cut as one process's are."""
    question = tmp_path / "q.tsv"
    question.write_bytes(b"other\t[]\n" * 40)
    options = {"questions": False, "question_tsv": str(question), "max_bad": 1}
    answer(folder, tmp_path / "one.tsv", "good", **options)
    do(folder, tmp_path / "parts.tsv", 0, 1, 2, 3, name="good", **options)
    merge(tmp_path / "parts.tsv", max_bad=1)
    assert shown(tmp_path / "parts.tsv") == shown(tmp_path / "one.tsv")
    assert len(shown(tmp_path / "one.tsv")[1]["examples"]) == 3


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.tsv"
    do(folder, out, 0, 2)
    with pytest.raises(UserError, match=r"parts 1, 3 of 4 of .*o\.tsv' not through yet"):
        merge(out)
    do(folder, out, 1)
    with pytest.raises(UserError, match=r"part 3 of 4"):
        merge(out)
    with pytest.raises(UserError, match=r"parts 0, 1, 2, 3, 4 of 5"):
        merge(out, parts=5)
    assert not out.exists()
    with pytest.raises(UserError, match="no folder"):
        merge(tmp_path / "nowhere" / "o.tsv")


def test_a_foreign_part_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.tsv"
    do(folder, out, 0, 1, 3)
    do(folder, out, 2, max_new_tokens=7)
    with pytest.raises(UserError, match=r"part 2 of .* another model, file or setting than part 0"):
        merge(out)
    assert not out.exists()
    do(folder, out, 2)
    assert merge(out, max_bad=1)["ok"] == 35


def test_a_new_job_takes_back_what_an_old_one_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All parts of an old job are there; one of a new job dies at work: the old ones are no longer a whole."""
    out = tmp_path / "o.tsv"
    do(folder, out, 0, 1, 2, 3)
    with monkeypatch.context() as context:
        context.setattr(tsv, "_answer_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            answer(folder, out, "bad", part=2, parts=PARTS, max_new_tokens=7)
    with pytest.raises(UserError, match="part 2 of 4"):
        merge(out)


def test_an_old_output_is_not_taken_for_the_merged_one(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.tsv"
    before = answer(folder, out, "bad", max_new_tokens=3, max_bad=1)
    for part in range(PARTS - 1):
        answer(folder, out, "bad", part=part, parts=PARTS)
    with pytest.raises(UserError, match="part 3 of 4"):
        merge(out)
    assert out.read_bytes() == before
    answer(folder, out, "bad", part=3, parts=PARTS)
    merge(out, max_bad=1)
    assert out.read_bytes() == answer(folder, tmp_path / "one.tsv", "bad", max_bad=1) != before


def test_killed_while_merging(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the report it is done again; after it, only the cleaning is."""
    out = tmp_path / "o.tsv"
    for name in ("write_report", "clean"):
        do(folder, out, 0, 1, 2, 3)
        with monkeypatch.context() as context:
            context.setattr(journal, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                merge(out, max_bad=1)
        if name == "clean":
            journal.rank_file(out, 0, PARTS, "json").unlink()  # it had begun
        merge(out, max_bad=1)
        assert {p.name for p in tmp_path.glob("o.*")} == {"o.tsv", "o.lineidx", "o.lineidx.8b", "o.run_report.json"}
        for path in tmp_path.glob("o.*"):
            path.unlink()


def test_too_many_bad_rows_are_judged_once(folder: Path, tmp_path: Path) -> None:
    do(folder, tmp_path / "o.tsv", 0, 1, 2, 3)  # a part with broken rows ends well: the others must not wait for it
    with pytest.raises(UserError, match="5 of 40 rows") as caught:
        merge(tmp_path / "o.tsv")
    assert caught.value.exit_code == EXIT_TOO_MANY_BAD
    assert (tmp_path / "o.tsv").is_file()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"part": 0}, "part and parts belong together"),
        ({"parts": 4}, "part and parts belong together"),
        ({"part": 4, "parts": 4}, "part is 4; of 4 parts it must be from 0 to 3"),
        ({"part": -1, "parts": 4}, "from 0 to"),
        ({"part": 0, "parts": 0}, "from 1 to"),
    ],
)
def test_which_part(folder: Path, tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        answer(folder, tmp_path / "o.tsv", **keys)


def test_a_part_is_one_processs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="a part is one process's, here are 2"):
        answer(folder, tmp_path / "o.tsv", part=0, parts=2)


def test_a_killed_part_goes_on(folder: Path, tmp_path: Path, root: Path) -> None:
    """A real process with a time limit's end: its journal is torn, the next start answers the rest only."""
    out, env = tmp_path / "o.tsv", {**os.environ, "OMP_NUM_THREADS": "1"}
    rows = journal.block(40, 1, PARTS)
    do(folder, out, 1, batch_size=1)
    path = journal.rank_file(out, 1, PARTS, "journal")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(rows)
    changed = lines[2].replace(b'\\"answer\\":\\"', b'\\"answer\\":\\"KEPT ')
    assert changed != lines[2]
    path.write_bytes(b"".join([*lines[:2], changed, lines[3][:15]]))  # two rows whole, the third torn
    journal.rank_file(out, 1, PARTS, "json").unlink()
    line = json.dumps({**json.loads(params(folder, out, "bad")), "part": 1, "parts": PARTS})
    done = subprocess.run([*COMMAND, line], cwd=root, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert (told["part"], told["parts"], told["rows"]) == (1, PARTS, len(rows))
    assert told["reasons"] == {BROKEN[11]: 1, BROKEN[13]: 1}
    said = journal.rank_file(out, 1, PARTS, "tsv").read_bytes()
    assert said.count(b"KEPT ") == changed.count(b"KEPT ") > 0, "what was done is not done again"
    do(folder, out, 0, 2, 3)
    line = json.dumps({"type": "merge_tsv_parts", "out_tsv": str(out), "parts": PARTS, "max_bad": 1})
    done = subprocess.run([sys.executable, "inference.py", "-p", line], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = answer(folder, tmp_path / "one.tsv", "bad", max_bad=1)
    assert out.read_bytes().replace(b"KEPT ", b"") == whole
