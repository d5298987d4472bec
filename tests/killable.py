"""Run a training in forks that are killed, until one ends: python killable.py OUT KILLS SEED FLAGS...

torch is imported once; nothing is computed here, so a fork is as good as a new process and starts in milliseconds.
Prints {"kills", "in_save", "codes"}.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 - imported for the forks
import torch

import git_model.run  # noqa: F401
import train


def started(flags: list[str]) -> int:
    """Return the number of a fork that trains."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    code = train.main(flags)
    sys.stderr.flush()
    os._exit(code)


def main(out: Path, kills: int, seed: int, flags: list[str]) -> None:
    """Kill, start again, and let the last one end."""
    rng, in_save, done = random.Random(seed), 0, 0
    flags = [*flags, "--output_dir", str(out)]
    while done < kills:
        child = started(flags)
        before, drafts = {path.name for path in out.glob("step-*")}, set(out.glob(".tmp-*"))
        until = time.monotonic() + 20
        # half of the kills at any time, half once a save has been seen: or slow starts would take all of them
        if rng.random() < 0.5:
            while time.monotonic() < until and {path.name for path in out.glob("step-*")} == before:
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.5))
        ended, _ = os.waitpid(child, os.WNOHANG)
        if ended:
            break  # it was through
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done += 1
        in_save += bool(set(out.glob(".tmp-*")) - drafts)
    _, status = os.waitpid(started(flags), 0)
    print(json.dumps({"kills": done, "in_save": in_save, "code": os.waitstatus_to_exitcode(status)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
