"""A save survives: every crash point, every changed byte, a full disk; and the checks fail when it would not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from git_model import saves
from git_model.errors import EXIT_NO_CHECKPOINT, UserError
from git_model.saves import DamagedSave, Saves, find, publish, verify

CORRUPTIONS = int(os.environ.get("GIT_MODEL_CORRUPTIONS", "100"))  # of each kind and file; `make soak`: 700
OPERATIONS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "link", "open")
FILES = {"model.pt": b"m" * 50_000, "state.pt": b"s" * 9_000}


def content(step: int) -> dict[str, bytes]:
    return {name: data + str(step).encode() for name, data in FILES.items()}


def save(folder: Path, step: int, writer: Callable[[Path, int], None] | None = None) -> None:
    """What a run does: write a save, publish its model."""
    if writer is not None:
        writer(folder, step)
        return
    mine = Saves(folder)
    mine.newest()
    publish(mine.write(step, content(step)) / "model.pt", folder / "model_latest.pt")


def crash_points(folder: Path, step: int, writer: Callable[[Path, int], None] | None) -> Iterator[int]:
    """Run save() again and again in a fork that dies before its n-th system call; yield n after each."""
    point = 0
    while True:
        point += 1
        child = os.fork()
        if child == 0:
            _die_at(point)
            try:
                save(folder, step, writer)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return
        yield point


def _die_at(point: int) -> None:
    """Let this process be killed before its n-th call that changes the disk, or in the middle of a write."""
    count = 0

    def step_on() -> None:
        nonlocal count
        count += 1
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            step_on()
            return real(*args, **more)

        return call

    for name in OPERATIONS:
        setattr(os, name, wrapped(getattr(os, name)))

    def halves(path: Path, data: bytes | memoryview) -> None:
        with path.open("xb") as file:
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                step_on()
                file.write(part)
                file.flush()
            os.fsync(file.fileno())

    saves._write = halves


def lost_points(folder: Path, writer: Callable[[Path, int], None] | None = None) -> tuple[int, int]:
    """Return how many crash points lose everything or show half a save, and how many there are.

    The first save of a run, one beside another, one that removes an older one, and the same step once more.
    """
    lost = points = 0
    for number, before in enumerate(([], [1], [1, 2], [1, 2, 3])):
        step = 3 if number == 3 else number + 1
        base = folder / f"base{number}"
        base.mkdir(parents=True)
        for old in before:
            save(base, old, writer)
        here = folder / f"try{number}"
        shutil.copytree(base, here)
        for _ in crash_points(here, step, writer):
            points += 1
            try:
                found = Saves(here).newest()
            except UserError:
                found = None
            good = found is not None or not before
            if found is not None:
                told = int(found.name.split("-")[1])
                good = told in (step, *before[-1:]) and (found / "model.pt").read_bytes() == content(told)["model.pt"]
            latest = here / "model_latest.pt"
            good &= not before or (
                latest.exists() and latest.read_bytes()[: len(FILES["model.pt"])] == FILES["model.pt"]
            )
            lost += not good
            shutil.rmtree(here)
            shutil.copytree(base, here)
    return lost, points


def test_every_crash_point_leaves_an_old_or_a_new_save(tmp_path: Path) -> None:
    lost, points = lost_points(tmp_path)
    assert lost == 0
    assert points > 60


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return what a save does to the disk, in order."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def name_of(path: Any) -> str:
        name = Path(path).name
        return "draft" if name.startswith(".tmp-") else name

    def see_fsync(descriptor: int) -> None:
        calls.append(("fsync", name_of(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def see_rename(old: Any, new: Any, **more: Any) -> None:
        calls.append(("rename", name_of(new)))
        rename(old, new, **more)

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(os, "rename", see_rename)
    save(folder, 9)
    monkeypatch.undo()
    return calls


def in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a save reaches the disk in the order that survives a power loss, older saves going last."""
    for step in (1, 2):
        save(folder, step)
    calls = recorded(folder, monkeypatch)
    needed = [
        ("fsync", "model.pt"),
        ("fsync", "state.pt"),
        ("fsync", "MANIFEST.json"),
        ("fsync", "draft"),
        ("rename", "step-000000009"),
        ("fsync", folder.name),
        ("rename", "draft"),  # an older save goes
    ]
    return all(call in calls for call in needed) and [c for c in calls if c in needed][: len(needed)] == needed


def test_the_order_of_what_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_order(tmp_path, monkeypatch)


def damaged(good: Path, work: Path, rng: random.Random, kind: str, name: str) -> Path:
    """Return a copy of a save, damaged."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(good, work / good.name)
    path = work / good.name / name
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "page":
        place = min(place, len(data) - 1) // 4096 * 4096
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
    elif kind == "insert":
        data[place:place] = rng.randbytes(rng.randrange(1, 9))
    path.write_bytes(data)
    return path.parent


@pytest.mark.parametrize("name", ["model.pt", "state.pt", "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["flip", "cut", "page", "insert"])
def test_every_change_is_told(tmp_path: Path, kind: str, name: str) -> None:
    assert told_changes(tmp_path, kind, name, CORRUPTIONS) == CORRUPTIONS


@pytest.mark.parametrize("kind", ["missing", "swapped", "empty_manifest", "foreign_manifest", "renamed", "link"])
def test_foreign_parts_are_told(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    new, old = find(tmp_path)
    if kind == "missing":
        (new / "state.pt").unlink()
    elif kind == "swapped":
        shutil.copy(old / "state.pt", new / "state.pt")
    elif kind == "empty_manifest":
        (new / "MANIFEST.json").write_bytes(b"")
    elif kind == "foreign_manifest":
        shutil.copy(old / "MANIFEST.json", new / "MANIFEST.json")
    elif kind == "renamed":
        new = new.rename(tmp_path / "step-000000007")
    else:
        told = json.loads((new / "MANIFEST.json").read_text())
        told["files"] = {"../../x": {"sha256": "0" * 64, "size": 0}}
        (new / "MANIFEST.json").write_bytes(saves._canonical(told))
    with pytest.raises(DamagedSave):
        verify(new)
    assert Saves(tmp_path).newest() == old


def test_going_back_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = Saves(tmp_path, keep=4)
    for step in (1, 2, 3, 4):
        mine.write(step, content(step))
    for name in ("step-000000004", "step-000000003"):
        (tmp_path / name / "model.pt").write_bytes(b"x")
    assert Saves(tmp_path, keep=4).newest() == tmp_path / "step-000000002"
    assert [record.message for record in caplog.records] == [
        "going back to step-000000002, because of step-000000004: model.pt has 1 bytes, not 50001; "
        "step-000000003: model.pt has 1 bytes, not 50001"
    ]


def test_the_last_ones_stay_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    mine = Saves(tmp_path, keep=2)
    for step in (1, 2, 3):
        mine.write(step, content(step))
    assert [path.name for path in find(tmp_path)] == ["step-000000003", "step-000000002"]
    (tmp_path / "step-000000003" / "state.pt").unlink()
    again = Saves(tmp_path, keep=2)
    assert again.newest() == tmp_path / "step-000000002"
    again.write(3, content(3))
    assert [path.name for path in find(tmp_path)] == ["step-000000003-1", "step-000000002"]
    assert Saves(tmp_path).newest() == tmp_path / "step-000000003-1"


def test_what_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mine = Saves(tmp_path, keep=2)
    for step in (1, 2):
        mine.write(step, content(step))

    def busy(*_: Any, **more: Any) -> None:
        if not more.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (3, 4):
        mine.write(step, content(step))
    assert "cannot remove the older save" in caplog.text
    assert Saves(tmp_path).newest() == tmp_path / "step-000000004"


def test_none_verifies(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000000001" / "MANIFEST.json").unlink()
    with pytest.raises(UserError, match="no save in") as error:
        Saves(tmp_path).newest()
    assert error.value.exit_code == EXIT_NO_CHECKPOINT
    assert Saves(tmp_path / "empty").newest() is None


def test_what_a_kill_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "model.pt").write_bytes(b"half")
    save(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_latest.pt", "step-000000001"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_the_disk_fails_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Whatever fails: the error gets out, the older save verifies, nothing half-written stays."""
    save(tmp_path, 1)
    for failing in range(1, 5):
        count = 0

        def broken(descriptor: int, failing: int = failing) -> None:
            nonlocal count
            count += 1
            if count == failing:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", broken)
        if failing < 4:
            with pytest.raises(OSError, match=os.strerror(code)) as error:
                Saves(tmp_path).write(2, content(2))
            if code == errno.ENOSPC:
                assert "needs 59,002 bytes" in str(error.value)
        monkeypatch.undo()
        assert Saves(tmp_path).newest() == tmp_path / "step-000000001"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model_latest.pt", "step-000000001"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this container may not mount")
    try:
        save(tmp_path, 1)
        with pytest.raises(OSError, match="No space left") as error:
            Saves(tmp_path).write(2, content(2))
        assert error.value.errno == errno.ENOSPC
        assert Saves(tmp_path).newest() == tmp_path / "step-000000001"
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def in_place(folder: Path, step: int) -> None:
    """Mutant: one save, written where it stays."""
    target = folder / "step-000000001"
    target.mkdir(exist_ok=True)
    for name, data in content(step).items():
        (target / name).unlink(missing_ok=True)
        saves._write(target / name, data)
    (target / "MANIFEST.json").unlink(missing_ok=True)
    saves._write(target / "MANIFEST.json", saves.manifest(target.name, content(step)))
    publish(target / "model.pt", folder / "model_latest.pt")


def keep_one_purged_first(folder: Path, step: int) -> None:
    """Mutant: the older save goes before the new one is there."""
    for old in find(folder):
        shutil.rmtree(old)
    mine = Saves(folder)
    publish(mine.write(step, content(step)) / "model.pt", folder / "model_latest.pt")


@pytest.mark.parametrize("mutant", [in_place, keep_one_purged_first])
def test_the_crash_points_find_a_save_that_can_be_lost(tmp_path: Path, mutant: Callable[[Path, int], None]) -> None:
    lost, points = lost_points(tmp_path, mutant)
    assert lost > points // 8


def test_the_order_finds_a_save_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsynced(path: Path, data: bytes | memoryview) -> None:
        path.write_bytes(data)

    monkeypatch.setattr(saves, "_write", unsynced)
    with pytest.MonkeyPatch.context() as inner:
        assert not in_order(tmp_path, inner)


def told_changes(folder: Path, kind: str, name: str, trials: int) -> int:
    """Return how many of some changes a save tells."""
    rng, told = random.Random(0), 0
    save(folder / "run", 5)
    (good,) = find(folder / "run")
    saves.verify(good)
    for _ in range(trials):
        try:
            saves.verify(damaged(good, folder / "work", rng, kind, name))
        except DamagedSave:
            told += 1
    return told


def test_the_changes_find_a_save_without_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def there(path: Path) -> None:
        if not (path / "model.pt").is_file():
            raise DamagedSave("model.pt is missing")

    monkeypatch.setattr(saves, "verify", there)
    assert told_changes(tmp_path, "flip", "model.pt", 20) < 20


@pytest.mark.parametrize("keep", [1, 2])
def test_one_damaged_save_is_survived_by_two(tmp_path: Path, keep: int) -> None:
    mine = Saves(tmp_path, keep=keep)
    for step in (1, 2, 3):
        mine.write(step, content(step))
    (tmp_path / "step-000000003" / "state.pt").write_bytes(b"")
    if keep == 1:  # refused by the config: this is why
        with pytest.raises(UserError):
            Saves(tmp_path).newest()
    else:
        assert Saves(tmp_path).newest() == tmp_path / "step-000000002"


def test_one_save_to_keep_is_refused(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "checkpoints/shapes/config.yml", "--keep", "1"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "train.keep 1 is below 2" in done.stderr
