"""TSV files and tar shards: byte-exact writing, indexes that lie, worker processes, hostile archives."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from git_model.datasets import records
from git_model.datasets.files import RecordError
from git_model.datasets.records import TSVFile, json_cell, write_tsv
from git_model.datasets.shards import Record, TarShards, expand_shards
from git_model.errors import UserError

ROWS = [["k1", "first"], ["k2", "second, longer"], ["k3", ""], ["k4", " kept \u00a0 "], ["k5", "é"]]


@pytest.fixture
def tsv(tmp_path: Path) -> Path:
    path = tmp_path / "a.b.tsv"
    assert write_tsv(path, ROWS) == len(ROWS)
    return path


# -- TSV ---------------------------------------------------------------------------------------------


def test_writing_is_byte_exact(reference_data: Path, tmp_path: Path) -> None:
    oracles = sorted((reference_data / "oracles" / "git_tsv").glob("*.tsv"))
    assert len(oracles) == 8
    compared = 0
    for oracle in oracles:
        source, copy = tmp_path / "in" / oracle.name, tmp_path / "out" / oracle.name
        for folder in (source.parent, copy.parent):
            folder.mkdir(exist_ok=True)
        shutil.copyfile(oracle, source)
        rows = [[json_cell(json.loads(cell)) if cell[:1] in "[{" else cell for cell in row] for row in TSVFile(source)]
        assert write_tsv(copy, rows) == len(rows)
        for suffix in (".tsv", ".lineidx", ".lineidx.8b"):
            expected = oracle.with_suffix(suffix)
            if expected.exists():
                compared += 1
                assert copy.with_suffix(suffix).read_bytes() == expected.read_bytes(), expected
                # the index that reading built is the same one
                assert source.with_suffix(suffix).read_bytes() == expected.read_bytes(), expected
    assert compared == 8 * 3 - 2  # sharded.tsv came without its indexes


def test_columns_are_not_stripped(tsv: Path) -> None:
    file = TSVFile(tsv)
    assert list(file) == ROWS
    assert (len(file), file[-1], file.path) == (5, ROWS[-1], tsv)
    for index in (5, -6):
        with pytest.raises(IndexError, match=r"a\.b\.tsv, which has 5"):
            file[index]


@pytest.mark.parametrize("cell", ["a\tb", "a\nb", "a\rb", b"\n", b"\xff", "\ud800"])
def test_bad_cell_is_an_error_and_changes_nothing(tsv: Path, cell: str | bytes) -> None:
    before = {path.name: path.read_bytes() for path in tsv.parent.iterdir()}
    with pytest.raises(ValueError, match="row 1"):
        write_tsv(tsv, [["fine"], ["k", cell]])
    assert {path.name: path.read_bytes() for path in tsv.parent.iterdir()} == before


def test_rows_without_cells_and_other_types_are_errors(tmp_path: Path) -> None:
    for rows in ([[]], ["text"], [["a"], b"bytes"]):
        with pytest.raises(ValueError, match="sequence of one or more cells"):
            write_tsv(tmp_path / "a.tsv", rows)
    with pytest.raises(TypeError, match="float"):
        write_tsv(tmp_path / "a.tsv", [[1.5]])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_the_renames_leaves_no_stale_index(tsv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop after every step of the replacing: the file is whole, old or new, and every row is right."""
    new = [["n", "x" * n] for n in range(7)]
    steps = 0
    for stop in range(6):
        write_tsv(tsv, ROWS)
        done = 0

        def step(self: Path, *args: object, _stop: int = stop, **kw: object) -> None:
            nonlocal done
            if self.name.endswith(".part") and not args:
                return  # tidying up afterwards, which a crash would not do
            if done == _stop:
                raise KeyboardInterrupt
            done += 1
            (os.replace(self, args[0]) if args else os.unlink(self))  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", step)
            patch.setattr(Path, "unlink", step)
            try:
                write_tsv(tsv, new)
            except KeyboardInterrupt:
                steps += 1
        os.utime(tsv, ns=(0, 0))  # ages cannot tell
        assert list(TSVFile(tsv)) == (new if stop > 2 else ROWS), stop
    assert steps == 5  # two indexes removed, three files renamed


def _break_index(path: Path, how: str) -> None:
    binary, text = path.with_suffix(".lineidx.8b"), path.with_suffix(".lineidx")
    data = binary.read_bytes()
    if how == "missing":
        binary.unlink()
        text.unlink()
    elif how == "text_garbage":
        binary.unlink()
        text.write_text("0\nx\n")
    elif how == "stale":
        os.utime(binary, ns=(0, 0))
    else:
        offsets = np.frombuffer(data, "<i8").copy()
        if how == "foreign_inside":
            offsets[2] += 3
        binary.write_bytes(
            {
                "truncated": data[:-16],
                "empty": b"",
                "odd": data[:-3],
                "foreign_longer": data + (10**6).to_bytes(8, "little"),
                "foreign_shifted": (offsets + 1).tobytes(),
                "foreign_inside": offsets.tobytes(),
                "foreign_joined": np.delete(offsets, 2).tobytes(),
                "negative": (-offsets).tobytes(),
                "descending": offsets[::-1].tobytes(),
            }[how]
        )


BREAKS = ["text_garbage", "stale", "truncated", "empty", "odd", "foreign_longer", "foreign_shifted"]
BREAKS += ["foreign_inside", "foreign_joined", "negative", "descending"]


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("chunk", [1 << 24, 7], ids=["small", "large"])  # small files are read as a whole
def test_a_broken_index_is_rebuilt_with_a_warning(
    tsv: Path, how: str, chunk: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK", chunk)
    good = tsv.with_suffix(".lineidx.8b").read_bytes()
    _break_index(tsv, how)
    file = TSVFile(tsv)
    assert [file[2], file[1], file[2], file[3], file[4], file[0]] == [ROWS[i] for i in (2, 1, 2, 3, 4, 0)]
    assert "rebuilding" in caplog.text
    assert tsv.with_suffix(".lineidx.8b").read_bytes() == good
    caplog.clear()
    assert list(TSVFile(tsv)) == ROWS
    assert caplog.text == ""  # once is enough


def test_a_missing_index_is_built_without_a_warning(tsv: Path, caplog: pytest.LogCaptureFixture) -> None:
    _break_index(tsv, "missing")
    assert list(TSVFile(tsv)) == ROWS
    assert tsv.with_suffix(".lineidx").read_text() == "0\n9\n27\n31\n44\n"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_the_text_index_alone_is_enough(tsv: Path) -> None:
    tsv.with_suffix(".lineidx.8b").unlink()
    assert list(TSVFile(tsv)) == ROWS
    assert not tsv.with_suffix(".lineidx.8b").exists()


def test_an_index_that_cannot_be_written_stays_in_memory(tsv: Path) -> None:
    _break_index(tsv, "missing")
    for side in (".lineidx", ".lineidx.8b"):
        tsv.with_suffix(side).mkdir()  # holds for root too, unlike permissions
    file = TSVFile(tsv)
    assert list(pickle.loads(pickle.dumps(file))) == list(file) == ROWS
    assert not list(tsv.parent.glob(".*"))


def test_last_row_without_line_end_empty_file_and_crlf(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    for data, rows in (
        (b"a\tb\nc\td", [["a", "b"], ["c", "d"]]),
        (b"", []),
        (b"\n", [[""]]),
        (b"\n\n\t\n", [[""], [""], ["", ""]]),
        (b"a\tb\r\n", [["a", "b\r"]]),
    ):
        path.write_bytes(data)
        for _ in range(2):  # with and without an index
            assert list(TSVFile(path)) == rows


def test_a_file_that_changes_gives_right_rows_or_an_error(tsv: Path) -> None:
    file = TSVFile(tsv)
    assert file[0] == ROWS[0]
    data = tsv.read_bytes()
    tsv.write_bytes(b"a longer first row\tx\n" + data)  # in place, under an open descriptor
    with pytest.raises(UserError, match="start again"):  # one more row than was counted
        file[1]
    assert file[1] == ROWS[0]
    assert len(file) == 6


def test_errors_name_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"fine\n\xff\xfe\n")
    file = TSVFile(path)
    with pytest.raises(RecordError, match=r"x\.tsv row 1: bad_utf8") as caught:
        file[1]
    assert pickle.loads(pickle.dumps(caught.value)).reason == "bad_utf8"
    with pytest.raises(UserError, match=r"nothing\.tsv"):
        TSVFile(tmp_path / "nothing.tsv")


def test_mutated_index_never_gives_a_wrong_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "m.tsv"
    rows = [[f"k{i}", "y" * int(rng.integers(0, 9))] for i in range(20)]
    write_tsv(path, rows)
    data, side = path.read_bytes(), path.with_suffix(".lineidx.8b")
    good = side.read_bytes()
    for trial in range(100):
        monkeypatch.setattr(records, "_CHUNK", 1 << 24 if trial % 4 == 0 else 16)
        bad = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            bad[rng.integers(len(bad)) if rng.random() < 0.3 else 8 * rng.integers(20)] = rng.integers(256)
        path.write_bytes(data)
        side.write_bytes(bytes(bad))
        file = TSVFile(path)
        for i in rng.permutation(20).tolist():
            assert file[i] == rows[i]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.text().filter(lambda s: not set(s) & set("\t\n\r")), min_size=1, max_size=4), max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "round.tsv"
    write_tsv(path, rows)
    assert list(TSVFile(path)) == rows
    assert path.read_bytes() == b"".join("\t".join(row).encode() + b"\n" for row in rows)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.characters()))
def test_json_round_trip(text: str) -> None:
    """Any text, lone surrogates and line ends included, survives a JSON cell."""
    cell = json_cell([{"caption": text, "a": 1}])
    assert cell.isascii()
    assert not set(cell) & set("\t\n\r")
    assert cell.startswith('[{"a":1,"caption":"')
    assert json.loads(cell) == [{"caption": text, "a": 1}]


# -- worker processes --------------------------------------------------------------------------------


def _rows_of(file: TSVFile | TarShards, indices: list[int]) -> list[list[str] | Record]:
    return [file[i] for i in indices]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes(tsv: Path, tmp_path: Path, method: str) -> None:
    _tar(tmp_path / "s.tar", {f"{i:03d}.txt": b"t%d" % i for i in range(20)})
    rows = [[f"{i}", "z" * (i % 50)] for i in range(300)]
    write_tsv(tsv, rows)
    file, shards = TSVFile(tsv), TarShards([tmp_path / "s.tar"])
    assert (file[7], shards[3].key) == (rows[7], "003")  # descriptors are open before the workers start
    rng = np.random.default_rng(1)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        asked = [rng.integers(0, 300, 100).tolist() for _ in range(4)]
        answers = [pool.submit(_rows_of, file, indices) for indices in asked]
        records_of = pool.submit(_rows_of, shards, [19, 0])
        for indices, answer in zip(asked, answers, strict=True):
            assert answer.result(60) == [rows[i] for i in indices]
        assert records_of.result(60) == [Record("019", {"txt": b"t19"}), Record("000", {"txt": b"t0"})]
    assert file[299] == rows[299]


def test_data_loader_workers(tsv: Path) -> None:
    from torch.utils.data import DataLoader

    rows = [[f"{i}", "z" * (i % 50)] for i in range(200)]
    write_tsv(tsv, rows)
    file = TSVFile(tsv)
    assert file[3] == rows[3]
    loader = DataLoader(file, batch_size=16, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    assert [row for batch in loader for row in batch] == rows


def test_pickle_is_small_and_has_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "big.tsv"
    write_tsv(path, ([i, "x"] for i in range(20_000)))
    file = TSVFile(path)
    assert file[5] == ["5", "x"]
    state = pickle.dumps(file)
    assert len(state) < 1000  # the mapped index is mapped anew
    assert pickle.loads(state)[19_999] == ["19999", "x"]


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("git_model.datasets.files.MAX_OPEN_FILES", 2)
    for n in range(5):
        _tar(tmp_path / f"{n}.tar", {"a.txt": b"%d" % n})
    shards = TarShards(expand_shards(f"{tmp_path}/{{0..4}}.tar"))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert [shards[i].members["txt"] for i in (0, 1, 2, 3, 4, 0)] == [b"0", b"1", b"2", b"3", b"4", b"0"]
    if before:
        assert len(os.listdir("/proc/self/fd")) - before <= 2
        del shards
        assert len(os.listdir("/proc/self/fd")) <= before


# -- tar shards --------------------------------------------------------------------------------------


def _tar(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_records_are_grouped_by_name(tmp_path: Path) -> None:
    path = _tar(
        tmp_path / "s.tar",
        {
            "./0001.JPG": b"j1",
            "0002.png": b"p2",
            "./0001.json": b"{}",  # not beside its picture
            "0002.txt": b"old",
            "0002.txt": b"t2",  # noqa: F601
            "0002.seg.png": b"webdataset: the extension is seg.png",
            "0003.pkl": b"cos\nsystem\n",
            "0003.cls": b"7",
            "dir/0001.txt": b"another key",
            ".jpg": b"no key",
            "noext": b"",
            "x" * 90 + "/" + "y" * 60 + ".webp": b"",
        },
        tarfile.PAX_FORMAT,
    )
    shards = TarShards([path])
    assert list(shards) == [
        Record("0001", {"jpg": b"j1", "json": b"{}"}),
        Record("0002", {"png": b"p2", "txt": b"t2"}),
        Record("0003", {"cls": b"7"}),
        Record("dir/0001", {"txt": b"another key"}),
        Record("x" * 90 + "/" + "y" * 60, {"webp": b""}),
    ]
    assert shards[-1] == shards[4]
    with pytest.raises(IndexError, match="has 5"):
        shards[5]


def test_hostile_members_are_keys_or_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = folder / "h.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind, link in (
            ("link.txt", tarfile.SYMTYPE, str(secret)),
            ("hard.txt", tarfile.LNKTYPE, "../secret.txt"),
            ("device.txt", tarfile.CHRTYPE, ""),
            ("pipe.txt", tarfile.FIFOTYPE, ""),
            ("folder.txt", tarfile.DIRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            archive.addfile(info)
        for name in ("../../evil.txt", "/etc/absolute.txt", "caf\udce9.txt", "new\nline.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"ok"))
    before = sorted(tmp_path.rglob("*"))
    shards = TarShards([path], cache=False)
    assert [record.key for record in shards] == ["../../evil", "/etc/absolute", "caf\udce9", "new\nline"]
    assert all(record.members == {"txt": b"ok"} for record in shards)
    assert sorted(tmp_path.rglob("*")) == before


def test_large_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = TarShards([_tar(tmp_path / "s.tar", {"a.txt": b"x" * 101, "b.txt": b"x" * 100})])
    monkeypatch.setattr("git_model.datasets.shards.MAX_MEMBER_BYTES", 100)
    assert len(shards[1].members["txt"]) == 100
    with pytest.raises(RecordError, match=r"s\.tar record 'a' member \.txt \(101 bytes\): too_large") as caught:
        shards[0]
    assert caught.value.reason == "too_large"


def test_damaged_tars(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = _tar(tmp_path / "g.tar", {f"{i}.txt": b"t" * 700 for i in range(4)})  # 512 + 1024 bytes each
    data = good.read_bytes()
    cut, broken, negative = tmp_path / "cut.tar", tmp_path / "broken.tar", tmp_path / "negative.tar"
    cut.write_bytes(data[: 1536 * 2 + 600])
    broken.write_bytes(data[: 1536 * 2] + b"\xff" * 300 + data[1536 * 2 + 300 :])
    backwards = bytearray(data)
    header = backwards[1536:2048]
    header[124:136] = b"\xff" * 4 + (-1536).to_bytes(8, "big", signed=True)  # CVE-2025-8194
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    backwards[1536:2048] = header
    negative.write_bytes(backwards)
    for path, left in ((cut, 2), (broken, 2), (negative, 1)):
        caplog.clear()
        assert [len(r.members["txt"]) for r in TarShards([path])] == [700] * left, path
        assert f"{path.name} is damaged" in caplog.text
        assert not path.with_name(path.name + ".index").exists()
    for content in (b"", b"not a tar" * 200, b"\x1f\x8b" + data):
        cut.write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.tar' is not an uncompressed tar"):
            TarShards([cut])
    with pytest.raises(UserError, match=r"no tar shard .*none\.tar"):
        TarShards([tmp_path / "none.tar"])


def test_mutated_tars_only_raise_what_is_promised(tmp_path: Path) -> None:
    files = {f"{i}.txt": b"t" * 40 for i in range(6)} | {"n" * 120 + ".json": b"{}"}
    data = _tar(tmp_path / "g.tar", files, tarfile.PAX_FORMAT).read_bytes()
    rng, path = np.random.default_rng(2), tmp_path / "m.tar"
    seen: set[int | str] = set()
    for _ in range(300):
        bad = bytearray(data)
        for _ in range(int(rng.integers(1, 12))):
            bad[rng.integers(len(bad))] = rng.integers(256)
        path.write_bytes(bytes(bad[: rng.integers(len(bad))] if rng.random() < 0.3 else bad))
        try:
            seen.add(len(list(TarShards([path], cache=False))))
        except (UserError, RecordError) as error:
            seen.add(type(error).__name__)
    assert {"UserError", 7} <= seen


def test_index_cache_is_verified(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = _tar(tmp_path / "s.tar", {"a.txt": b"1", "b.txt": b"2"})
    expected = list(TarShards([path]))
    side = tmp_path / "s.tar.index"
    stored = side.read_bytes()
    assert list(TarShards([path])) == expected
    assert caplog.text == ""
    with side.open("rb") as file:
        index = {name: np.load(file) for name in ("stamp", "keys", "key_ends", "member_ends", "members")}

    def store(**changed: np.ndarray) -> None:
        with side.open("wb") as file:
            for array in (index | changed).values():
                np.save(file, array)

    for name, value in (
        ("members", np.array([[5, 10**9, 3], [5, 0, 1]])),
        ("members", index["members"] + [[99, 0, 0], [0, 0, 0]]),
        ("member_ends", np.array([2, 1])),
        ("key_ends", np.array([1, 99])),
        ("key_ends", np.array([1.0, 2.0])),
        ("stamp", index["stamp"] + 1),
    ):
        store(**{name: value})
        caplog.clear()
        assert list(TarShards([path])) == expected
        assert "s.tar.index is not of this" in caplog.text or "is unreadable (key_ends does not fit)" in caplog.text
        assert side.read_bytes() == stored  # made anew
    store(keys=np.array([{}], object))  # would have to be unpickled
    assert list(TarShards([path])) == expected
    assert "unreadable" in caplog.text
    side.write_bytes(b"PK\3\4 no index")
    assert list(TarShards([path])) == expected
    _tar(path, {"c.txt": b"3", "a.txt": b"4"})
    assert [record.key for record in TarShards([path])] == ["c", "a"]


def test_expand_shards(tmp_path: Path) -> None:
    names = [f"{i:02d}.tar" for i in range(8, 12)]
    for name in (*names, "odd[1].tar"):
        (tmp_path / name).touch()

    def expand(spec: str) -> list[str]:
        return [path.name for path in expand_shards(f"{tmp_path}/{spec}")]

    assert expand("{08..11}.tar") == names
    assert expand("0{8..9}.tar") == names[:2]
    assert expand("{0..0}{8..9}.tar") == names[:2]
    assert expand("*.tar") == [*names, "odd[1].tar"]
    assert expand("{0..1}[0189].tar") == names
    assert expand("odd[1].tar") == ["odd[1].tar"]
    for spec, said in (
        ("{08..12}.tar", r"12\.tar"),
        ("none*.tar", r"none\*\.tar"),
        ("{3..1}.tar", "empty"),
        ("{0..99999999999}.tar", "longer than"),
    ):
        with pytest.raises(UserError, match=said):
            expand(spec)


def _linked(folder: Path, pattern: str, tmp_path: Path) -> list[Path]:
    """Symbolic links to reference shards, so that index files land in the test's own folder."""
    links = []
    for shard in sorted(folder.glob(pattern)):
        links.append(tmp_path / shard.name)
        links[-1].symlink_to(shard)
    return links


def test_rsicd(reference_data: Path, tmp_path: Path) -> None:
    _linked(reference_data / "data" / "rsicd", "rsicd-val-*.tar", tmp_path)
    shards = TarShards(expand_shards(f"{tmp_path}/rsicd-val-{{00000..00001}}.tar"))
    assert len(shards) == 1094
    for _ in range(2):  # scanned, then from the cache
        for index in (0, 999, 1000, 1093):
            record = shards[index]
            meta = json.loads(record.members["json"])
            assert sorted(record.members) == ["jpg", "json"]
            assert (meta["key"], len(meta["captions"])) == (record.key, 5)
            assert record.members["jpg"].startswith(b"\xff\xd8")
        assert (tmp_path / "rsicd-val-00001.tar.index").exists()
        shards = TarShards(shards.paths)


def test_cc12m(reference_data: Path, tmp_path: Path) -> None:
    links = _linked(reference_data / "data" / "cc12m_32", "*.tar", tmp_path)
    shards = pickle.loads(pickle.dumps(TarShards(links)))
    assert len(shards) == 32
    with tarfile.open(links[0]) as archive:
        plain = {info.name: archive.extractfile(info).read() for info in archive if info.isreg()}  # type: ignore[union-attr]
    ours = {f"{record.key}.{kind}": data for record in shards for kind, data in record.members.items()}
    assert ours == plain
