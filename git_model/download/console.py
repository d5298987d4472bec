"""What a download shows: a bar of verdicts; the engine's own talk goes to a file."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


class SilentLogger:
    """In place of the engine's logger: the verdicts are counted here, not there."""

    def __init__(self, *_: Any) -> None:
        self.done_shards: set[int] = set()

    def start(self) -> None:
        """Begin nothing."""

    def join(self) -> None:
        """Wait for nothing."""

    def terminate(self) -> None:
        """End nothing."""


@contextmanager
def progress(name: str, work: Path, total: int, done: int, check: Callable[[], None]) -> Iterator[None]:
    """Show verdicts as they come, and call `check` each second; what the engine prints goes to `engine.log`."""
    screen = os.fdopen(os.dup(2), "w")
    bar = tqdm(desc=name, total=total, initial=done, unit="image", file=screen, smoothing=0.05, mininterval=1.0)
    over, places = threading.Event(), {path: path.stat().st_size for path in work.glob("*.ledger")}

    def count() -> None:
        for path in work.glob("*.ledger"):
            with path.open("rb") as file:
                file.seek(places.get(path, 0))
                new = file.read()
            places[path] = places.get(path, 0) + len(new)
            bar.update(new.count(b"\n"))

    def watch() -> None:
        while not over.wait(1.0):
            count()
            check()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with redirected(work / "engine.log"):
            yield
    finally:
        over.set()
        thread.join()
        count()
        bar.close()
        screen.close()


@contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Send this process's output, and that of those it starts, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
