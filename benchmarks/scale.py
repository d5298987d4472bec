"""Memory and seconds to the first batch over the number of images: they should not grow with it.

    python benchmarks/scale.py --rows 10000 100000 1000000

Writes a TSV pair and tar shards of small pictures for each size (1,000,000 take 5 GB of disk), then opens each in a
new process: seconds from the start of reading to the first batch of 32, and the growth of the process's memory: its own
(what each process pays), and the pages of files it has looked at (the index, mapped: one copy a node, and the system
may take them back). The first opening, which makes the indexes, is timed apart.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PER_SHARD = 10_000


def picture(number: int) -> bytes:
    """Return a small JPEG, one of 64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 64 * 4, 100, 50)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tsvs(folder: Path, rows: int) -> None:
    """Write a TSV pair."""
    from git_model.datasets.records import write_tsv

    cells = [base64.b64encode(picture(i)) for i in range(64)]
    said = b'[{"caption":"a small picture"}]'

    def images() -> Iterator[tuple[str, bytes]]:
        return ((f"{i:08d}", cells[i % 64]) for i in range(rows))

    write_tsv(folder / "t.img.tsv", images())
    write_tsv(folder / "t.caption.tsv", ((f"{i:08d}", said) for i in range(rows)))


def write(folder: Path, rows: int) -> None:
    """Write a TSV pair and tar shards."""
    write_tsvs(folder, rows)
    pictures = [picture(i) for i in range(64)]
    for shard in range(-(-rows // PER_SHARD)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            for i in range(shard * PER_SHARD, min(rows, (shard + 1) * PER_SHARD)):
                for ending, data in (("jpg", pictures[i % 64]), ("txt", b"a small picture")):
                    info = tarfile.TarInfo(f"{i:08d}.{ending}")
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))


def memory() -> dict[str, float]:
    """Return this process's memory in MB."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    own, whole = (int(told[name].split()[0]) / 1024 for name in ("Anonymous", "Rss"))
    return {"own": own, "mapped": whole - own}


def first_batch(kind: str, folder: Path) -> dict[str, Any]:
    """Open a set and take a batch, in this process."""
    from git_model.datasets.collate import Collator
    from git_model.datasets.images import Transform
    from git_model.datasets.loader import ImageTextDataset, train_batches
    from git_model.datasets.order import GlobalSampler
    from git_model.datasets.sources import build_source
    from git_model.tokens import TextCodec, train_tokenizer

    codec = TextCodec(train_tokenizer(["a picture"], 300), 300, 64)
    entry = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv"}
    if kind == "tar":
        entry = {"type": "webdataset", "shards": "*.tar"}
    before, started = memory(), time.perf_counter()
    data = ImageTextDataset(build_source([entry], folder), Transform(32), targets=1)
    sampler = GlobalSampler(len(data), 32, seed=0, epochs=1)
    batch = next(train_batches(data, sampler, Collator(codec, 1), workers=0, timeout=0))
    assert len(batch.images) == 32
    seconds, after = time.perf_counter() - started, memory()
    return {"seconds": seconds, "rows": len(data)} | {k: after[k] - before[k] for k in before}


def main() -> None:
    """Measure each size in new processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(first_batch(given.child[0], Path(given.child[1]))))
        return
    print(f"{'rows':>9} {'kind':<4} {'first opening':>14} {'first batch':>12} {'own memory':>15} {'mapped files':>13}")
    for rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            write(Path(name), rows)
            for side in Path(name).glob("*.lineidx*"):
                side.unlink()
            for kind in ("tsv", "tar"):
                told = []
                for _ in range(4):
                    line = [sys.executable, __file__, "--child", kind, name]
                    told.append(json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout))
                first, *again = told
                best = min(again, key=lambda t: t["seconds"])
                assert best["rows"] == rows
                print(
                    f"{rows:>9,} {kind:<4} {first['seconds']:>12.2f} s {best['seconds']:>10.3f} s "
                    f"{best['own']:>12.1f} MB {best['mapped']:>10.1f} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
