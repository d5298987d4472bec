"""One writer a folder: a lock that the system takes back when its process dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from git_model.errors import UserError


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold the only right to write into a folder.

    Args:
        folder: is made where it is missing; its file `.lock` names who holds it and stays behind, unlocked.
        what: the kind of work, for the message.

    Raises:
        UserError: another process holds it (names its host and number).
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise UserError(f"{folder} is in use by {holder}: wait for that {what} or stop it") from error
        except OSError as error:  # Lustre without flock, some NFS: better said than two writers
            told = f"the file system of {folder} has no locks ({error.strerror})"
            raise UserError(f"{told}: mount it with them (Lustre: -o flock), or write elsewhere") from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{socket.gethostname()}, process {os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
