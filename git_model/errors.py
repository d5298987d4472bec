"""What goes wrong, in words for the person who typed the command, and the exit codes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_USAGE = 2  # bad input: one line, no traceback
EXIT_TOO_MANY_BAD = 3  # finished, but too many samples failed
EXIT_BUG = 70  # ours
EXIT_IO = 74  # disk full, read-only
EXIT_PREEMPTED = 75  # state saved, requeue me
EXIT_NO_CHECKPOINT = 76  # nothing that verifies


class UserError(ValueError):
    """Bad input. The message names the value and what is allowed; no traceback is shown.

    Args:
        message: one sentence for the person who typed the command.
        exit_code: what the program ends with.
    """

    def __init__(self, message: str, exit_code: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_of(what: str, got: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a value outside a closed list: names the value, the nearest, the list."""
    names = [str(a) for a in allowed]
    return UserError(f"unknown {what} '{got}'{nearest(str(got), names)}; one of: {', '.join(names)}")
