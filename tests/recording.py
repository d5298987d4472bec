"""train.py that notes which samples each step saw: python recording.py NOTES FLAGS... (also under torchrun)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import train
from git_model.batch import Batch
from git_model.run import Run

notes = Path(sys.argv[1])
real = Run.backward


def backward(self: Run, micro: list[Batch]) -> float:
    """Note the step's samples, then do what it does."""
    line = {"step": self.step + 1, "epoch": self.epoch, "keys": [key for batch in micro for key in batch.keys]}
    with open(f"{notes}.{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return real(self, micro)


Run.backward = backward  # type: ignore[method-assign]
sys.exit(train.main(sys.argv[2:]))
