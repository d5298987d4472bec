"""The benchmarks that are scripts of their own, each a process; what they print is kept with the results."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.captions import COCO
from benchmarks.harness import Options, Result

HERE = Path(__file__).resolve().parent


def script(name: str, arguments: Callable[[Options], list[str] | None]) -> Callable[[Options], list[Result]]:
    """Return a benchmark that runs a script of this folder.

    Args:
        name: of the file, without its ending.
        arguments: what to call it with; None = the data it needs is not there, and it is left out.
    """

    def run(options: Options) -> list[Result]:
        given = arguments(options)
        if given is None:
            print(f"{name}: left out, {options.data} has not the data it reads")
            return []
        command = [sys.executable, str(HERE / f"{name}.py"), *given]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line.rstrip())
        if process.returncode:
            raise RuntimeError(f"{name}.py ended with {process.returncode}")
        return [Result(name, None, details={"arguments": given, "printed": lines})]

    return run


def loader(options: Options) -> list[Result]:
    """Photographs of 500 px and more, decoded the quick way, beside the original's loader."""
    photos = options.data / "coco_val2017_subset" / "images"
    if not photos.is_dir():
        print(f"loader: left out, no folder {photos}")
        return []
    rounds = 1 if options.quick else options.rounds or 7
    with tempfile.TemporaryDirectory() as name:
        rates = Path(name) / "rates.json"
        given = ["--photos", str(photos), "--rounds", str(rounds), "--json", str(rates)]
        (printed,) = script("loader", lambda _: given)(options)
        found = json.loads(rates.read_text())
    each = [a / b for a, b in zip(found["git_model (files, scaled)"], found["original (files)"], strict=True)]
    told = "loader, photographs, --decode scaled: beside the original"
    return [Result(told, statistics.median(each), min(each), max(each), 2.0, details=printed.details)]


def scoring(options: Options) -> list[str] | None:
    """COCO's captions file."""
    file = options.data / COCO
    return [str(file)] if file.is_file() else None


def scale(options: Options) -> list[str]:
    """The sizes asked for."""
    return ["--rows", *map(str, (100,) if options.quick else options.rows)]
