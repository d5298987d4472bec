"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

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
