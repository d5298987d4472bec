"""Saves of a run: folders `step-<step>/` that are whole or not there, with a manifest that tells any changed byte.

A save is written into a folder with a temporary name: files, then `MANIFEST.json` with their sizes and SHA-256, each
brought to the disk, then the folder; then it is renamed, and the folder above is brought to the disk. Older saves
go after that. What a kill leaves is either an older save or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from git_model.errors import EXIT_NO_CHECKPOINT, UserError

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
SCHEMA = 1
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")
_TEMPORARY = ".tmp-"


class DamagedSave(Exception):
    """A save that is not what was written; says why."""


class Saves:
    """The saves of one run, newest last.

    Args:
        folder: the run's.
        keep: how many stay.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.own: list[Path] = []  # of this run; others in the folder go once this run has a save

    def newest(self) -> Path | None:
        """Return the newest save that verifies; None where there is none at all.

        Raises:
            UserError: there are saves, and none verifies (exit code 76).
        """
        found = find(self.folder)
        damaged: list[str] = []
        for save in found:
            try:
                verify(save)
            except DamagedSave as error:
                damaged.append(f"{save.name}: {error}")
                continue
            if damaged:
                log.warning("going back to %s, because of %s", save.name, "; ".join(damaged))
            self.own = [save]
            return save
        if found:
            told = f"no save in {self.folder} verifies ({'; '.join(damaged)}); --resume no starts anew"
            raise UserError(told, EXIT_NO_CHECKPOINT)
        return None

    def write(self, step: int, files: Mapping[str, bytes | memoryview]) -> Path:
        """Write a save, then remove older ones; return its folder.

        Raises:
            OSError: disk full, read-only; nothing of the save is left then, and nothing else was touched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"{_TEMPORARY}*"):  # of a kill; the run's lock says that no other writes here
            shutil.rmtree(left, ignore_errors=True)
        for left in self.folder.glob(".*.part"):
            left.unlink(missing_ok=True)
        final = self._name(step)
        draft = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}"
        try:
            draft.mkdir()
            for name, data in files.items():
                _write(draft / name, data)
            _write(draft / MANIFEST, manifest(final.name, files))
            sync_folder(draft)
            draft.rename(final)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed, free = sum(len(data) for data in files.values()), shutil.disk_usage(self.folder).free
                told = f"{error.strerror}: the save of step {step} needs {needed:,} bytes, {free:,} are free; "
                raise OSError(error.errno, f"{told}older saves are untouched", str(self.folder)) from error
            raise
        sync_folder(self.folder)
        self.own.append(final)
        self._remove_older()
        return final

    def _name(self, step: int) -> Path:
        """Return a name that is not taken: one step may be saved again, and an old save is never overwritten."""
        name, number = self.folder / f"step-{step:09d}", 0
        while name.exists():
            number += 1
            name = self.folder / f"step-{step:09d}-{number}"
        return name

    def _remove_older(self) -> None:
        self.own = self.own[-self.keep :]
        for save in find(self.folder):
            if save not in self.own:
                away = self.folder / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}"
                try:
                    save.rename(away)  # half a save must not look like one
                    shutil.rmtree(away)
                except OSError as error:  # the new one is there: what cannot be removed may stay
                    log.warning("cannot remove the older save %s: %s", save, error)


def find(folder: Path) -> list[Path]:
    """Return what looks like a save, the newest first."""
    named = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*") if path.is_dir())
    numbered = [(int(name[1]), int(name[2] or 0), path) for name, path in named if name]
    return [path for *_, path in sorted(numbered, reverse=True)]


def manifest(name: str, files: Mapping[str, bytes | memoryview]) -> bytes:
    """Return the manifest of a save of that name."""
    told = {n: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for n, data in files.items()}
    return _canonical({"files": told, "name": name, "schema": SCHEMA})


def verify(save: Path) -> None:
    """Check every byte of a save.

    Raises:
        DamagedSave: a file is missing, cut, changed or foreign.
    """
    try:
        text = (save / MANIFEST).read_bytes()
        told: Any = json.loads(text)
        if _canonical(told) != text or told["schema"] != SCHEMA or told["name"] != save.name or not told["files"]:
            raise DamagedSave(f"{MANIFEST} is not its own")
        for name, expected in told["files"].items():
            path = save / name
            if path.stat().st_size != expected["size"]:
                raise DamagedSave(f"{name} has {path.stat().st_size} bytes, not {expected['size']}")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise DamagedSave(f"{name} was changed")
    except FileNotFoundError as error:
        raise DamagedSave(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedSave(f"it cannot be read ({type(error).__name__}: {error})") from error


def publish(file: Path, name: Path) -> None:
    """Give a file of a save a second name, whatever stood there before: a hard link, or a copy."""
    draft = name.with_name(f".{name.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        try:
            draft.hardlink_to(file)
        except OSError:  # a file system without links
            _write(draft, file.read_bytes())
        draft.replace(name)
        sync_folder(name.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes | memoryview) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _canonical(told: Any) -> bytes:
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode() + b"\n"
