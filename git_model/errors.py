"""What goes wrong, in words for the person who typed the command, and the exit codes."""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Iterable

PATHS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EPIPE)

LOST_PEER = re.compile(r"Connection (closed|reset) by peer|NCCL.*remote process exited", re.DOTALL)

EXIT_OK = 0
EXIT_USAGE = 2  # bad input: one line, no traceback
EXIT_TOO_MANY_BAD = 3  # finished, but too many samples failed
EXIT_BUG = 70  # ours
EXIT_IO = 74  # disk full, read-only
EXIT_PREEMPTED = 75  # state saved, requeue me
EXIT_NO_CHECKPOINT = 76  # nothing that verifies
EXIT_INTERRUPTED = 130  # Ctrl-C


class UserError(ValueError):
    """Bad input. The message names the value and what is allowed; no traceback is shown.

    Args:
        message: one sentence for the person who typed the command.
        exit_code: what the program ends with.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Preempted(UserError):
    """Asked to stop; everything is saved (exit code 75): start the same command again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_PREEMPTED)


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_of(what: str, got: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a value outside a closed list: names the value, the nearest, the list."""
    names = [str(a) for a in allowed]
    return UserError(f"unknown {what} '{got}'{nearest(str(got), names)}; one of: {', '.join(names)}")


def explain(error: BaseException, interrupted: str = "interrupted") -> tuple[int, str]:
    """Return the exit code and the line to show for a failure.

    Args:
        error: whatever ended the program.
        interrupted: what to say of Ctrl-C.
    """
    if isinstance(error, UserError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return EXIT_IO, str(error)
    if isinstance(error, PATHS):  # a path that the user named
        return EXIT_USAGE, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, interrupted
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        return 1, "another process of this run ended first; its own line says why"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("git_model"):
        return (
            EXIT_USAGE,
            f"no package '{error.name}' in {sys.executable}: is the environment on (. .venv/bin/activate)?",
        )
    return EXIT_BUG, f"our bug, please report it (--debug shows where): {type(error).__name__}: {error}"


class ImageError(ValueError):
    """A picture that cannot be used: `reason` is a short word to count by, `detail` the decoder's words."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)  # both in args: the error survives pickling out of a worker
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(str(part) for part in self.args if part)
