"""Download the pictures of Conceptual Captions, or of any list of captions and URLs; each row gets a verdict.

Or weights by name, for machines without internet.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from git_model.errors import EXIT_OK, EXIT_TOO_MANY_BAD, UserError, explain
from git_model.flags import Parser, number

EPILOG = """
Row i of Train_GCC-training.tsv becomes train/{i:08d}.jpg, row i of Validation_GCC-1.1.0-Validation.tsv val/{i:08d}.jpg.
What became of each row stands in train.ledger.tsv and val.ledger.tsv (row, status, tries, bytes, sha256), the sums in
download_report.json and .png. Stop it at any moment and start it again: it goes on. A resolver of names on this machine
(bind, knot) helps: every row asks for a name. The engine is img2dataset.

  python download.py --data_root ../data/conceptual
  python download.py --data_root ../data/conceptual --image_size 256 --processes 8 --threads 64
  python download.py --data_root ../data/conceptual --retry_failed transient
  python download.py --data_root ../data/mine --url_list mine.csv --caption_col text --url_col link \\
      --output_format webdataset
  python download.py --weights ViT-B/32 gpt2-large     (into ~/.cache/clip and the Hugging Face cache)
"""


def build_parser() -> Parser:
    """Return the parser of download.py."""
    lines = argparse.RawDescriptionHelpFormatter
    parser = Parser("download.py", None, __doc__, EPILOG, formatter_class=lines, allow_abbrev=False)
    add = parser.add_argument
    add("--data_root", help="folder of the lists; pictures and ledgers go there, too")
    add(
        "--weights",
        metavar="NAME",
        nargs="+",
        help="OpenAI CLIP's names and Hugging Face ids: fetch these, no pictures",
    )
    add("--splits", default="train,val", help="of Conceptual Captions: train, val or both (default)")
    add("--url_list", help="another list in place of Conceptual Captions: .tsv or .csv, .gz allowed")
    add("--caption_col", default="0", help="column of --url_list: a number from 0, or a name in its first line")
    add("--url_col", default="1", help="the same for the URL")
    add("--output_format", default="files", choices=["files", "webdataset"], help="pictures, or tar shards of them")
    add("--samples_per_shard", default=10_000, type=number(1, 10**6), help="rows of a shard (and of a unit of work)")
    add("--image_size", default=0, type=number(0, 10_000), help="pixels to resize to; 0 = keep the file as it is")
    sides = ["keep_ratio", "center_crop", "border", "keep_ratio_largest"]
    add("--resize_mode", default="keep_ratio", choices=sides, help="what --image_size is the size of (img2dataset's)")
    add("--quality", default=95, type=number(1, 100), help="of JPEGs that are written anew")
    add("--processes", default=2, type=number(1, 1024), help="that fetch and resize")
    add("--threads", default=64, type=number(1, 1024), help="of each process, one request each")
    add("--timeout", default=20.0, type=number(0.1, 3600.0), help="seconds of one try, redirects and body included")
    add("--max_bytes", default=20 * 2**20, type=number(1, 2**31), help="of one picture")
    add("--retries", default=3, type=number(0, 20), help="of 5xx, 429 and cut bodies, with growing pauses")
    add("--backoff", default=1.0, type=number(0.0, 60.0), help="seconds before the first retry")
    again = "transient, all, or reasons joined by commas: these rows are tried again (without a word: transient)"
    add("--retry_failed", metavar="REASONS", nargs="?", const="transient", help=again)
    add("--dedup", default="url", choices=["url", "sha256"], help="sha256: equal pictures become one file")
    add("--deny", help="file of URLs or hosts that are never asked; two of Conceptual Captions always are")
    add("--user_agent_token", help="name by which X-Robots-Tag may address this download")
    add("--max_failed", default=1.0, type=number(0.0, 1.0), help="share of failed rows that ends with exit code 3")
    how = "pyspark: over a cluster (pip install pyspark; --data_root on a disk that all machines share)"
    add("--distributor", default="multiprocessing", choices=["multiprocessing", "pyspark"], help=how)
    add("--spark_master", help="such as spark://host:7077; default: that of spark-submit, else this machine")
    add("--allow_private", action="store_true", help="for tests: private addresses and any port")
    add("--debug", action="store_true", help="show tracebacks")
    return parser


def fetch_all(names: Sequence[str]) -> None:
    """Bring weights here, and say where they lie and what the machine that will use them has to be told."""
    from git_model.models.hub import fetch_weights

    for name in names:
        print(f"{name}\t{fetch_weights(name)}")
    from huggingface_hub import constants

    told = {"HF_HOME": constants.HF_HOME}
    if Path(constants.HF_HUB_CACHE) != Path(constants.HF_HOME) / "hub":
        told = {"HF_HUB_CACHE": constants.HF_HUB_CACHE}
    told |= {name: os.environ[name] for name in ("CLIP_CACHE",) if name in os.environ}
    words = [f"{name}={shlex.quote(value)}" for name, value in told.items()]
    print(f"where there is no internet: export {' '.join(words)} HF_HUB_OFFLINE=1")


def run(given: argparse.Namespace) -> None:
    """Download, report, and judge."""
    if given.weights and not given.data_root:
        fetch_all(given.weights)
        return
    if given.weights or not given.data_root:
        raise UserError("give either --data_root (pictures) or --weights (of models); see download.py -h")
    splits = tuple(name.strip() for name in given.splits.split(","))
    if unknown := set(splits) - {"train", "val"}:
        raise UserError(f"--splits '{', '.join(sorted(unknown))}'; one of: train, val, train,val")
    from git_model.download.known import TRANSIENT, DownloadOptions
    from git_model.download.network import FetchPolicy
    from git_model.download.report import table, write_report
    from git_model.download.run import download

    policy = FetchPolicy(
        deadline=given.timeout,
        max_bytes=given.max_bytes,
        retries=given.retries,
        backoff=given.backoff,
        robots_agent=given.user_agent_token and given.user_agent_token.strip().lower(),
        private=given.allow_private,
    )
    same = ("data_root", "url_list", "caption_col", "url_col", "output_format", "samples_per_shard", "image_size")
    same += ("resize_mode", "quality", "processes", "threads", "retry_failed", "dedup", "deny", "max_failed")
    chosen = {name: getattr(given, name) for name in (*same, "distributor", "spark_master")}
    report = download(DownloadOptions(**chosen, splits=splits, policy=policy))
    write_report(Path(given.data_root), report)
    print(table(report))
    again = sum(n for counts in report.values() for word, n in counts["reasons"].items() if TRANSIENT.fullmatch(word))
    if again:
        print(f"{again:,} rows failed for reasons that may pass: --retry_failed tries them again")
    rows = sum(counts["rows"] for counts in report.values())
    failed = rows - sum(counts["ok"] for counts in report.values())
    if failed > given.max_failed * rows:
        told = f"{failed} of {rows} rows failed, more than --max_failed {given.max_failed}"
        raise UserError(told, EXIT_TOO_MANY_BAD)


def main(argv: Sequence[str]) -> int:
    """Return the exit code; a failure is one line on stderr, a traceback only with --debug."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        run(build_parser().read(argv))
        return EXIT_OK
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error, "interrupted; start the same command again to go on")
        print((traceback.format_exc() if "--debug" in argv else "") + f"error: {message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
