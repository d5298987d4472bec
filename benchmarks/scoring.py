"""Seconds to score 5,000 images with 5 references each, without METEOR and SPICE.

    python benchmarks/scoring.py captions_val2017.json

Each image's first reference is scored against all of its references in COCO's own captions file; nothing is cached.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from git_model.datasets.annotations import read_references
from git_model.tasks.registry import run


def main() -> None:
    """Print the seconds and the figures."""
    references = read_references(sys.argv[1])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = [{"image_id": key, "caption": texts[0]} for key, texts in references.items()]
        (folder / "results.json").write_text(json.dumps(results))
        os.environ["XDG_CACHE_HOME"] = str(folder)
        start = time.perf_counter()
        task = {"type": "evaluate_on_coco_caption", "res_file": folder / "results.json", "label_file": sys.argv[1]}
        found = run({**task, "metrics": ["Bleu", "ROUGE_L", "CIDEr"]})
        seconds = time.perf_counter() - start
    print(f"{found['num_images']} images: {seconds:.1f} s, CIDEr {found['CIDEr']:.4f}, {found['tokenizer']} tokenizer")


if __name__ == "__main__":
    main()
