"""All benchmarks in one run: a table, benchmarks/results/benchmarks.json and .png.

    python -m benchmarks                    # all
    python -m benchmarks --only training    # some of them

A new one is a function `(Options) -> list[Result]` and a line in BENCHMARKS.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks import decoding, features, harness, regions, scaling, scripts, training
from benchmarks.harness import Options, Result
from benchmarks.report import RESULTS, report, ungated

BENCHMARKS: dict[str, Callable[[Options], list[Result]]] = {
    "training": training.run,
    "features": features.run,
    "decoding": decoding.run,
    "regions": regions.run,
    "scaling": scaling.run,
    "loader": scripts.loader,
    "scale": scripts.script("scale", scripts.scale),
    "scoring": scripts.script("scoring", scripts.scoring),
}


def main() -> int:
    """Run what is asked for and report it together; return 1 where a benchmark failed to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(BENCHMARKS)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON and the PNG")
    harness.add_flags(parser)
    given = parser.parse_args()
    options = harness.read_options(given)
    results: list[Result] = []
    failed = []
    for name in given.only:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            results += BENCHMARKS[name](options)
        except Exception:  # the others' figures are worth having
            traceback.print_exc()
            failed.append(name)
        print(f"-- {name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    report(ungated(results) if options.quick else results, given.out)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
