"""Retrieval: ranks of matrices made by hand, of random ones by definition, of real texts by a real encoder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from git_model.datasets.records import json_cell, write_tsv
from git_model.errors import UserError
from git_model.metrics import retrieval
from git_model.metrics.retrieval import nearest, ranks
from git_model.tasks.registry import run

# N=3 texts, M=6 captions, two of each picture; see vectors_of
HAND = np.array(
    [
        [0.9, 0.1, 0.8, 0.2, 0.3, 0.4],  # its best caption is the first of all
        [0.7, 0.6, 0.5, 0.4, 0.3, 0.2],  # two stand before
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4],  # equal to one that stands before it in the list
    ]
)


def definition(scores: np.ndarray, image_of: list[int]) -> tuple[list[int], list[int]]:
    """Sort, with equal scores in the order of the list, and look where the right ones are."""
    to_text = []
    for n in range(len(scores)):
        order = sorted(range(scores.shape[1]), key=lambda m: (-scores[n, m], m))
        to_text.append(min(order.index(m) for m in range(scores.shape[1]) if image_of[m] == n))
    to_image = []
    for m in range(scores.shape[1]):
        order = sorted(range(len(scores)), key=lambda n: (-scores[n, m], n))
        to_image.append(order.index(image_of[m]))
    return to_text, to_image


def vectors_of(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return texts (N,N+1) and captions (M,N+1), unit vectors with these products (columns of norm below 1)."""
    scores = scores / 2
    rest = np.sqrt(1 - (scores**2).sum(0))
    return np.eye(len(scores), len(scores) + 1), np.concatenate([scores, rest[None]]).T


def test_a_matrix_by_hand() -> None:
    texts, captions = vectors_of(HAND)
    found = ranks(texts, captions, [0, 0, 1, 1, 2, 2])
    assert found.image_to_text.tolist() == [0, 2, 1]
    assert found.text_to_image.tolist() == [0, 2, 1, 0, 0, 1]
    figures = found.figures()
    assert figures["i2t_R@1"] == pytest.approx(100 / 3)
    assert figures["i2t_R@5"] == 100
    assert figures["i2t_median_rank"] == 2
    assert figures["t2i_R@1"] == 50
    assert figures["t2i_median_rank"] == 1.5
    assert (figures["images"], figures["captions"]) == (3, 6)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 12), more=st.integers(0, 20), block=st.integers(1, 60))
def test_ranks_are_those_of_sorting(seed: int, count: int, more: int, block: int) -> None:
    dice = np.random.default_rng(seed)
    image_of = [*range(count), *dice.integers(0, count, more).tolist()]
    dice.shuffle(image_of)
    choices = dice.normal(size=(4, 5))  # few different vectors: many equal scores
    texts, captions = choices[dice.integers(0, 4, count)], choices[dice.integers(0, 4, len(image_of))]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (texts, captions)]
    scores = np.round(unit[0] @ unit[1].T, 9)
    whole = retrieval.BLOCK
    try:
        retrieval.BLOCK = block
        found = ranks(texts, captions, image_of)
        numbers, values = nearest(texts, captions, 3)
    finally:
        retrieval.BLOCK = whole
    assert (found.image_to_text.tolist(), found.text_to_image.tolist()) == definition(scores, image_of)
    expected = [sorted(range(len(image_of)), key=lambda m: (-row[m], m))[:3] for row in scores]
    assert numbers.tolist() == expected
    assert values == pytest.approx(np.take_along_axis(scores, np.array(expected), 1), abs=1e-6)


def test_captions_without_pictures() -> None:
    some = np.eye(3)
    for image_of, told in (([0, 1], "each"), ([0, 1, 1], "each picture a caption"), ([0, 1, 3], "each picture|of 3")):
        with pytest.raises(ValueError, match=told):
            ranks(some, some, image_of)


def test_memory_does_not_grow_with_the_matrix() -> None:
    """4,000 x 40,000 scores are 640 MB, a block of them 8 MB; the vectors are 11 MB."""
    code = """
import resource, numpy as np
from git_model.metrics import retrieval
from git_model.metrics.retrieval import ranks
retrieval.BLOCK = 2**21
dice = np.random.default_rng(0)
texts = dice.normal(size=(4_000, 64)).astype(np.float32)
image_of = np.arange(40_000) % 4_000
captions = texts[image_of] + dice.normal(size=(40_000, 64)).astype(np.float32) * 0.1
ranks(texts[:10], captions[:10], range(10))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = ranks(texts, captions, image_of).figures()
assert found["i2t_R@1"] == found["t2i_R@1"] == 100, found
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 300


# ------------------------------------------------------------------------------------------------------------ the task
LABELS = {
    "a": ["a dog runs over a meadow", "a brown dog plays outside"],
    "b": ["a red bus in a city street", "people get on a bus"],
    "c": ["a plate of pasta with basil", "someone eats spaghetti"],
    "d": ["<b>a boat</b> on a lake", "a small boat near the shore"],
}
TEXTS = {"a": "A dog is on the grass.", "b": "A bus drives.", "c": "Noodles with tomatoes.", "d": "A ship on water."}


def files(folder: Path, texts: dict[str, str] = TEXTS) -> dict[str, Any]:
    write_tsv(folder / "labels.tsv", ((k, json_cell([{"caption": c} for c in v])) for k, v in LABELS.items()))
    write_tsv(folder / "said.tsv", ((k, json_cell([{"caption": t}])) for k, t in texts.items()))
    return {"type": "evaluate_retrieval", "paragraph_tsv": folder / "said.tsv", "label_file": folder / "labels.tsv"}


def test_texts_find_their_captions(minilm: str, tmp_path: Path) -> None:
    found = run({**files(tmp_path), "text_encoder": minilm, "baselines": True})
    assert found["i2t_R@1"] == found["t2i_R@1"] == 100
    assert found["joined_captions"]["i2t_R@1"] == 100
    assert found["wrong_pictures"]["i2t_R@1"] == 0
    assert found["images"] == 4
    assert found["captions"] == 8
    written = json.loads(Path(found["outfile"]).read_text())
    assert written == {k: v for k, v in found.items() if k not in ("outfile", "page")}
    page = Path(found["page"]).read_text()
    assert "&lt;b&gt;a boat&lt;/b&gt;" in page
    assert "<b>a boat" not in page
    mixed = run({**files(tmp_path, {**TEXTS, "a": TEXTS["b"], "b": TEXTS["a"]}), "text_encoder": minilm})
    assert mixed["i2t_R@1"] == 50
    assert "Misses" in Path(mixed["page"]).read_text()


def test_captions_as_texts(minilm: str, tmp_path: Path) -> None:
    task = {"type": "evaluate_retrieval", "label_file": files(tmp_path)["label_file"], "text_encoder": minilm}
    first = run({**task, "references": "first", "outfile": tmp_path / "a.json"})
    assert first["captions"] == 4
    joined = run({**task, "references": "joined", "outfile": tmp_path / "b.json"})
    assert joined["captions"] == 8
    assert joined["i2t_R@1"] == 100


def test_what_cannot_be_scored(minilm: str, tmp_path: Path) -> None:
    task = {**files(tmp_path, {"a": "a dog", "x": "none"}), "text_encoder": minilm}
    with pytest.raises(UserError, match="3 images have no text, such as b, c, d; 'subset' scores only"):
        run(task)
    with pytest.raises(UserError, match="1 images have no caption, such as x"):
        run({**task, "subset": True})
    with pytest.raises(UserError, match="give one of paragraph_tsv and references"):
        run({**task, "references": "first"})
    write_tsv(tmp_path / "one.tsv", [("a", json_cell([{"caption": "alone"}]))])
    with pytest.raises(UserError, match="needs two captions a picture; image 'a' has one"):
        run({"type": "evaluate_retrieval", "label_file": tmp_path / "one.tsv", "references": "first"})
    task = files(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        run({**task, "text_encoder": "./nothing/there"})
    with pytest.raises(UserError, match=r"without modules\.json"):
        run({**task, "text_encoder": tmp_path})


def test_an_encoders_vectors(minilm: str) -> None:
    from git_model.models.text import SentenceEncoder

    encoder = SentenceEncoder(minilm)
    assert encoder.dim == 384
    texts = ["a dog", "a long sentence about a dog that runs over a meadow", "a dog", ""]
    together = encoder(texts)
    assert together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert (together[0] == together[2]).all()
    for text, vector in zip(texts, together, strict=True):
        assert encoder([text])[0] == pytest.approx(vector, abs=1e-5)
    assert encoder([]).shape == (0, 384)


def test_real_captions(minilm: str, reference_data: Path, tmp_path: Path) -> None:
    """97 COCO photographs with 485 captions: one of each against the four others, and all of each joined."""
    source = reference_data / "data" / "coco_val2017_subset" / "captions_val2017_subset.json"
    task = {"type": "evaluate_retrieval", "label_file": source, "text_encoder": minilm}
    first = run({**task, "references": "first", "outfile": tmp_path / "a.json", "baselines": True})
    assert (first["images"], first["captions"]) == (97, 388)
    joined = run({**task, "references": "joined", "outfile": tmp_path / "b.json"})
    assert (joined["images"], joined["captions"]) == (97, 485)
    assert joined["i2t_R@1"] >= first["i2t_R@1"] > 50
    assert joined["t2i_R@1"] >= first["t2i_R@1"] > 50
    assert first["wrong_pictures"]["i2t_R@1"] < 5
