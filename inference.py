"""Run one task: python inference.py -p "{'type': ..., ...}" prints its result as JSON; logs go to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Mapping, Sequence

from git_model.errors import EXIT_OK, explain
from git_model.flags import Parser
from git_model.tasks.params import escape, parse_params
from git_model.tasks.registry import TASKS, Task, describe, run


def run_command(argv: Sequence[str], tasks: Mapping[str, Task]) -> None:
    """Read the command line, run the task, print its result."""
    lines = argparse.RawDescriptionHelpFormatter
    told = {name: tasks[name] for name in argv if name in tasks} or tasks  # --help TYPE tells of that one
    parser = Parser("inference.py", None, __doc__, describe(told), formatter_class=lines, allow_abbrev=False)
    parser.add_argument("-p", metavar="PARAMS", default="", help="a YAML mapping: 'type' and the task's keys")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    params = parse_params(parser.read(argv).p, tasks)
    with contextlib.redirect_stdout(sys.stderr):  # some metrics print; stdout is for the result alone
        result = run(params, tasks)
    if result is None:  # of torchrun's processes the first one speaks
        return
    text = json.dumps(result, ensure_ascii=False, indent=2, allow_nan=False)
    # UTF-8 in any locale; a writer of its own, else a full disk fails once more at exit, with code 120
    with open(sys.stdout.fileno(), "w", encoding="utf-8", errors="backslashreplace", closefd=False) as out:
        print(text, file=out)


def main(argv: Sequence[str], tasks: Mapping[str, Task] = TASKS) -> int:
    """Return the exit code; a failure is one line on stderr, a traceback only with --debug."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # to stderr
    try:
        run_command(argv, tasks)
        return EXIT_OK
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error)
        print((traceback.format_exc() if "--debug" in argv else "") + f"error: {escape(message)}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
