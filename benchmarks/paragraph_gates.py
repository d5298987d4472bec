"""Do paragraphs tell pictures apart? Regions captioned by a trained model, one text of them, found among all captions.

    python -m benchmarks.paragraph_gates

400 scenes of the shapes' test split, the real MiniLM: recall of the paragraph beside that of a single region's caption,
of all reference captions joined, and of paragraphs of other pictures. Uses (or trains) the roi model of region_gates.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.region_gates import train
from git_model.models.text import DEFAULT

LEAST, MOST_WRONG = 3.0, 1.0  # times the single caption's recall at 1; percent


def main() -> int:
    """Write, score, print; return 1 where a gate is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/regions/gates"), help="region_gates' folder")
    parser.add_argument("--text_encoder", default=DEFAULT, help="sentence-transformers' id or folder")
    given = parser.parse_args()
    from git_model.datasets.shapes import write_shapes

    out, missed = given.out.resolve(), 0
    out.mkdir(parents=True, exist_ok=True)
    write_shapes(out / "shapes", side=64, things=(2, 4))
    for seed in given.seeds:
        model = out / f"roi-{seed}" / "model_latest.pt"
        if not model.is_file():
            train("roi", seed, out / "shapes", out)
        found = scores(model, out / "shapes", out / f"paragraphs-{seed}", given.text_encoder)
        (out / f"paragraphs-{seed}.json").write_text(json.dumps(found, indent=1))
        for way in ("i2t_R@1", "t2i_R@1"):
            ratio = found["paragraph"][way] / found["single"][way]
            bad = ratio < LEAST or found["wrong"][way] > MOST_WRONG
            missed += bad
            told = ", ".join(f"{name} {found[name][way]:.2f}" for name in ("paragraph", "single", "joined", "wrong"))
            print(
                f"seed {seed}, {way}: {told}; {ratio:.1f} times the single caption{'; MISSED' if bad else ''}",
                flush=True,
            )
    return bool(missed)


def scores(model: Path, data: Path, out: Path, encoder: str) -> dict[str, dict[str, float]]:
    """Write the paragraphs of the test split and score them."""
    from git_model.datasets.records import TSVFile, json_cell, write_tsv
    from git_model.tasks.registry import run

    out.mkdir(exist_ok=True)
    task: dict[str, Any] = {"type": "image_to_paragraph", "model_path": model, "image_tsv": data / "test.img.tsv"}
    task |= {"region_tsv": data / "test.region.tsv", "out_tsv": out / "paragraph.tsv", "max_new_tokens": 12}
    run({**task, "whole": False, "largest": 0})  # the model has learnt to tell of boxes only
    single = []
    for key, cell in TSVFile(out / "paragraph.tsv"):
        regions = json.loads(cell)[0]["regions"]
        sizes = [(r["rect"][2] - r["rect"][0]) * (r["rect"][3] - r["rect"][1]) for r in regions]
        single.append((key, json_cell([{"caption": regions[sizes.index(max(sizes))]["caption"]}])))
    write_tsv(out / "single.tsv", single)
    judged = {"type": "evaluate_retrieval", "label_file": data / "test.caption.tsv", "text_encoder": encoder}
    judged["image_tsv"] = data / "test.img.tsv"
    found = run({**judged, "paragraph_tsv": out / "paragraph.tsv", "baselines": True})
    alone = run({**judged, "paragraph_tsv": out / "single.tsv"})
    return {"paragraph": found, "single": alone, "joined": found["joined_captions"], "wrong": found["wrong_pictures"]}


if __name__ == "__main__":
    sys.exit(main())
