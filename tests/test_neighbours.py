"""The nearest of a bank are those of brute force, however it is cut up; what they foretell is what was published."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from git_model.datasets import neighbours
from git_model.datasets.neighbours import PromptBank, Shard, weights_at, write_bank
from git_model.errors import UserError

WIDTH, VALUES = 24, 6
SIZES = (1, 70, 333, 13, 700)  # of shards


def units(rows: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    given = np.random.default_rng(seed).standard_normal((rows, width))
    return (given / np.linalg.norm(given, axis=1, keepdims=True)).astype(np.float32)


def cut(keys: np.ndarray, values: np.ndarray, sizes: tuple[int, ...] = SIZES, texts: bool = True) -> Iterator[Shard]:
    assert sum(sizes) == len(keys)
    for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
        rows = slice(start, start + size)
        yield keys[rows], values[rows], [f"prompt {i}" for i in range(start, start + size)] if texts else None


def made(folder: Path, keys: np.ndarray, sizes: tuple[int, ...] = SIZES) -> PromptBank:
    write_bank(folder, cut(keys, units(len(keys), VALUES, 1), sizes), "clip", "minilm")
    return PromptBank(folder)


def brute(folder: Path, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """All cosines in float64, sorted; equal ones in the order of the rows."""
    keys = np.concatenate([np.load(path) for path in sorted(folder.glob("keys-*.npy"))]).astype(np.float64)
    given = queries.astype(np.float64)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    cosines = np.stack([(keys * query).sum(axis=1) for query in given])
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, rows, 1), rows


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_QUERIES", 5)
    monkeypatch.setattr(neighbours, "BLOCK_SCORES", 5 * 64)
    monkeypatch.setattr(neighbours, "BLOCK_NUMBERS", 100 * WIDTH)
    monkeypatch.setattr(neighbours, "MAX_MAPPED", 3)


@pytest.fixture
def bank(tmp_path: Path) -> PromptBank:
    return made(tmp_path / "bank", units(sum(SIZES)))


@pytest.mark.parametrize("k", [1, 7, 100, 1117, 5000])
def test_the_nearest_are_those_of_brute_force(bank: PromptBank, k: int) -> None:
    queries = 3 * units(12, seed=2)  # of any length
    cosines, rows = bank.nearest(queries, k)
    wanted, wanted_rows = brute(bank.folder, queries, k)
    assert len(bank) == 1117
    assert (cosines.shape, rows.shape) == ((12, min(k, 1117)),) * 2
    assert np.array_equal(rows, wanted_rows)
    assert np.array_equal(cosines, wanted)


def test_of_equal_cosines_the_lower_row_is_first(tmp_path: Path) -> None:
    keys = units(9)[np.random.default_rng(3).integers(0, 9, sum(SIZES))]  # nine keys, each a hundred times
    bank = made(tmp_path, keys)
    queries = np.concatenate([units(9), units(3, seed=4)])
    for k in (3, 150, 400):
        cosines, rows = bank.nearest(queries, k)
        assert np.array_equal(rows, brute(tmp_path, queries, k)[1])
        assert (np.diff(rows, axis=1)[np.diff(cosines, axis=1) == 0] > 0).all()


@pytest.mark.parametrize("k", [5, 100])  # of blocks of 320: their own k-th counts, or does not
@pytest.mark.parametrize("best_last", [False, True])
def test_keys_closer_together_than_float32_tells(tmp_path: Path, best_last: bool, k: int) -> None:
    middle = units(20, seed=6)
    for number, query in enumerate(middle):
        keys = query + 1e-6 * units(1117, seed=5)
        bank = made(tmp_path / str(number), keys[np.argsort((keys @ query) * (1 if best_last else -1))])
        wanted, wanted_rows = brute(bank.folder, query[None], k)
        cosines, rows = bank.nearest(query[None], k)
        assert np.array_equal(cosines, wanted)
        assert np.array_equal(rows, wanted_rows)


def test_shards_change_nothing(tmp_path: Path, bank: PromptBank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_SCORES", 5 * 500)
    whole = made(tmp_path / "whole", units(sum(SIZES)), (sum(SIZES),))
    queries = units(8, seed=2)
    for one, other in zip(bank.nearest(queries, 100), whole.nearest(queries, 100), strict=True):
        assert np.array_equal(one, other)
    assert np.array_equal(bank.regress(queries), whole.regress(queries))
    assert bank.prompts(range(1117)) == whole.prompts(range(1117))


def test_other_queries_change_nothing(bank: PromptBank) -> None:
    queries = units(13, seed=2)
    cosines, rows = bank.nearest(queries, 20)
    foretold = bank.regress(queries, 20)
    for i in range(13):
        alone = bank.nearest(queries[i : i + 1], 20)
        assert np.array_equal(alone[0][0], cosines[i])
        assert np.array_equal(alone[1][0], rows[i])
        assert np.array_equal(bank.regress(queries[i : i + 1], 20)[0], foretold[i])
    none = bank.nearest(queries[:0], 20)
    assert (none[0].shape, none[1].shape, bank.regress(queries[:0]).shape) == ((0, 20), (0, 20), (0, VALUES))


def test_weights_are_the_published_ones() -> None:
    weights = weights_at(np.array([0.6, 0.7, 0.8, 0.0, 1e-4, -1e-7, -0.5]))
    np.testing.assert_allclose(weights[:3] / 0.001, [21.39, 8.49, 3.81], atol=0.005)
    np.testing.assert_allclose(weights[3:], 10.0)


def test_regression_is_the_loop_that_was_published(bank: PromptBank) -> None:
    keys, values = (
        np.concatenate([np.load(p) for p in sorted(bank.folder.glob(f"{n}-*"))]) for n in ("keys", "values")
    )
    queries = units(6, seed=2)
    wanted = []
    for query in queries:
        distances = [1 - float(np.dot(key.astype(np.float64), query.astype(np.float64))) for key in keys]
        total = np.zeros(VALUES)
        for row in sorted(range(len(keys)), key=lambda row: distances[row])[:100]:
            distance = distances[row] if distances[row] >= 0 else 1e-4
            total += 0.001 / (distance**6 + 1e-4) * values[row]
        wanted.append(total / np.sqrt((total**2).sum()))
    found = bank.regress(queries)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(bank.regress(keys[40:44], 1), values[40:44], atol=1e-6)  # itself


def test_a_bank_keeps_what_it_was_given(tmp_path: Path) -> None:
    texts = ["a dog", "", 'two\nlines, "quotes"\u2028', "犬 🐕", "\ud800 alone"]
    keys, values = 5 * units(5), units(5, VALUES)
    parts = [slice(0, 2), slice(2, 2), slice(2, 5)]
    write_bank(tmp_path, [(keys[part], values[part], texts[part]) for part in parts], "CLIP", "MiniLM")
    bank = PromptBank(tmp_path)
    assert (bank.keys_of, bank.values_of, bank.key_width, bank.value_width) == ("CLIP", "MiniLM", WIDTH, VALUES)
    assert bank.sizes == [2, 3]
    assert bank.prompts([4, 0, 3, 2, 1, 4]) == [texts[i] for i in (4, 0, 3, 2, 1, 4)]
    assert np.array_equal(bank.values(np.array([3, 1])), values[[3, 1]])
    stored = np.concatenate([np.load(tmp_path / f"keys-0000{i}.npy") for i in range(2)])
    np.testing.assert_allclose(stored, units(5), atol=1e-6)  # scaled
    again = pickle.loads(pickle.dumps(bank))  # for worker processes
    assert np.array_equal(again.nearest(keys, 2)[1], bank.nearest(keys, 2)[1])
    assert len(pickle.dumps(bank)) < 1000


class Killed(BaseException):
    pass


def test_a_killed_writer_leaves_no_bank(tmp_path: Path) -> None:
    keys, values = units(sum(SIZES)), units(sum(SIZES), VALUES)

    def killed() -> Iterator[Shard]:
        for number, shard in enumerate(cut(keys, values)):
            if number == 3:
                assert len(list(tmp_path.glob("keys-*"))) == 3, "written as they come"
                raise Killed
            yield shard

    (tmp_path / "keys-00007.npy").write_bytes(b"of a writer that had no time to clear up")
    (tmp_path / ".keys-00008.npy.0123456789ab.part").touch()
    (tmp_path / "notes.txt").write_text("not ours")
    with pytest.raises(Killed):
        write_bank(tmp_path, killed(), "a", "b")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes.txt"}
    with pytest.raises(UserError, match=r"BANK\.json.*is missing"):
        PromptBank(tmp_path)
    bank = made(tmp_path, keys)
    assert len(bank) == 1117
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    with pytest.raises(UserError, match="holds a bank of prompts already"):
        write_bank(tmp_path, killed(), "a", "b")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")} == before


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("BANK.json", b"{", "BANK.json"),
        ("BANK.json", b"[]", "BANK.json"),
        ("BANK.json", {"count": 9}, "shards that sum to the count"),
        ("BANK.json", {"shards": []}, "shards that sum to the count"),
        ("BANK.json", {"format": 2}, "wanted: format 1"),
        ("BANK.json", {"key_width": "24"}, "BANK.json"),
        ("BANK.json", {"keys_of": None}, "BANK.json"),
        ("keys-00001.npy", None, "keys-00001.npy.*float32 of shape \\(70, 24\\)"),
        ("keys-00001.npy", b"", "keys-00001.npy"),
        ("keys-00001.npy", b"PK\x03\x04 no array", "keys-00001.npy"),
        ("keys-00001.npy", np.zeros((70, 23), np.float32), "holds float32 of shape \\(70, 23\\)"),
        ("keys-00001.npy", np.zeros((70, WIDTH)), "holds float64"),
        ("keys-00001.npy", np.zeros((WIDTH, 70), np.float32).T, "row by row"),
        ("values-00004.npy", None, "values-00004.npy"),
        ("values-00004.npy", 100, "values-00004.npy"),
        ("prompts-00002.jsonl", None, "prompts-00002.jsonl"),
        ("prompts-00002.starts.npy", None, "prompts-00002.starts.npy"),
    ],
)
def test_damage_is_told_when_a_bank_is_opened(
    bank: PromptBank, name: str, content: bytes | dict | int | np.ndarray | None, told: str
) -> None:
    path = bank.folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    elif isinstance(content, int):
        path.write_bytes(path.read_bytes()[:-content])
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        PromptBank(bank.folder)


@pytest.mark.parametrize(("what", "told"), [("keys", "key of row 76 is not finite"), ("values", "not finite")])
def test_numbers_that_are_not_finite_are_found_out(bank: PromptBank, what: str, told: str) -> None:
    path = bank.folder / f"{what}-00002.npy"
    array = np.load(path)
    array[5] = np.nan
    np.save(path, array)
    with pytest.raises(UserError, match=told):
        PromptBank(bank.folder).regress(units(3, seed=2), 1117)
    if what == "keys":
        with pytest.raises(UserError, match=told):
            PromptBank(bank.folder).nearest(units(3, seed=2), 1)


def test_damaged_prompts_are_told(bank: PromptBank) -> None:
    path = bank.folder / "prompts-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert bank.prompts([69]) == ["prompt 69"]
    with pytest.raises(UserError, match=r"prompts-00001\.jsonl' is damaged at line 70"):
        bank.prompts([70])


def test_questions_that_a_bank_cannot_answer(tmp_path: Path, bank: PromptBank) -> None:
    for queries in (units(2, WIDTH + 1), units(2)[0]):
        with pytest.raises(UserError, match=r"wanted: 1 or more, of 24 numbers, as 'clip' makes"):
            bank.nearest(queries, 3)
    for number in (0, np.nan, np.inf):
        with pytest.raises(UserError, match="query 1 is not finite, or zero"):
            bank.regress(units(3) * [[1], [number], [1]])
    with pytest.raises(UserError, match="0 rows"):
        bank.nearest(units(1), 0)
    for row in (-1, 1117):
        with pytest.raises(UserError, match=f"row {row} of"):
            bank.prompts([3, row])
    write_bank(tmp_path / "mute", [(np.ones((2, WIDTH)), np.array([[1.0], [-1.0]]), None)], "a", "b")
    mute = PromptBank(tmp_path / "mute")
    with pytest.raises(UserError, match="without prompts"):
        mute.prompts([0])
    with pytest.raises(UserError, match="sum to nothing"):
        mute.regress(units(1))


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        ([], "no rows"),
        ([(units(0), units(0, VALUES), None)], "no rows"),
        ([(units(3), units(2, VALUES), None)], "wanted:"),
        ([(units(3), units(3, VALUES), ["a", "b"])], "wanted:"),
        ([(units(3)[0], units(3, VALUES), None)], "wanted:"),
        ([(units(3), units(3, VALUES), None), (units(3, 5), units(3, VALUES), None)], "shard 1.*wanted: \\(n,24\\)"),
        ([(units(3), units(3, VALUES), None), (units(3), units(3, VALUES), ["a"] * 3)], "shard 1"),
        ([(units(3) * [[1], [0], [1]], units(3, VALUES), None)], "row 1 is not finite, or the key is zero"),
        ([(units(3) * [[1], [1], [np.inf]], units(3, VALUES), None)], "row 2 is not finite"),
        ([(units(3), units(3, VALUES) * np.nan, None)], "row 0 is not finite"),
    ],
)
def test_shards_that_make_no_bank(tmp_path: Path, shards: list[Shard], told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_bank(tmp_path, shards, "a", "b")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_memory_does_not_grow_with_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK_SCORES", 5 * 500)
    peaks = []
    queries = units(40, seed=2)
    for rows in (5_000, 50_000):
        bank = made(tmp_path / str(rows), units(rows), (rows // 5,) * 5)
        tracemalloc.start()
        bank.regress(queries, 50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < units(50_000).nbytes / 4


def test_importing_needs_no_torch() -> None:
    told = "import sys, git_model.datasets.neighbours; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], cwd=ROOT, check=False).returncode == 0
