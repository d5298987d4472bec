"""download.py, whole: lists, verdicts, kills, shards, against a real server on loopback."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from misbehaving import JPEG, Handler, Server, jpeg, png, serving
from PIL import Image

from git_model.datasets.sources import ConceptualCaptions, WebDataset

KILLS = int(os.environ.get("GIT_MODEL_KILLS", "3"))
VAL, TRAIN = ConceptualCaptions.FILES["val"], ConceptualCaptions.FILES["train"]
FAST = ["--allow_private", "--processes", "1", "--threads", "16", "--backoff", "0.01", "--timeout", "1.5"]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


def command(root: Path, folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(root / "download.py"), "--data_root", str(folder), *FAST, *more]


def finish(root: Path, folder: Path, *more: str, code: int = 0) -> str:
    done = subprocess.run(command(root, folder, *more), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def write_list(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in rows), encoding="utf-8")


def verdicts(path: Path) -> dict[int, str]:
    lines = path.read_text().splitlines()
    assert lines[0] == "row\tstatus\ttries\tbytes\tsha256"
    return {int(cells[0]): cells[1] for cells in (line.split("\t") for line in lines[1:])}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CATALOGUE = [
    ("ok/1", "ok"),
    ("png/2", "ok"),
    ("status/404/3", "http_404"),
    ("status/410/4", "http_410"),
    ("sometimes/500-500-200/5", "ok"),
    ("status/503/6", "http_503"),
    ("sometimes/429-200/7", "ok"),
    ("hang/8", "timeout"),
    ("slow/9", "timeout"),
    ("endless/10", "too_large"),
    ("short/11", "truncated"),
    ("long/12", "truncated"),
    ("html/13", "not_image:html"),
    ("empty/14", "empty"),
    ("cut/15", "truncated"),
    ("gzip/16", "encoded_body"),
    ("loop/17", "too_many_redirects"),
    ("to/ok/18", "ok"),
    ("to/file:///etc/passwd", "bad_scheme"),
    ("robots/noai/20", "robots"),
    ("drop/21", "disconnected"),
    ("nonsense/22", "protocol"),
    ("ok/1", "ok"),
]


def test_the_catalogue(server: Server, root: Path, tmp_path: Path) -> None:
    """Each row its verdict; the sums are the rows; nothing but good pictures on disk."""
    rows = [(f'"caption {i}', f"{server.url}/{path}") for i, (path, _) in enumerate(CATALOGUE)]
    expected = [verdict for _, verdict in CATALOGUE]
    for url, verdict in [
        ("file:///etc/passwd", "bad_scheme"),
        ("~://dstormer6em3i4km.onion.link/wp-content/uploads/2015/03/US-Forest-Ranger-Nazi-819x1024.jpg", "denied"),
        ("http://127.0.0.1:1/x.jpg", "refused"),
        (f"{server.url}/denied/me.jpg", "denied"),
        (f"{server.url}/same/val.jpg", "in_validation"),
        ("http://[::1/", "bad_url"),
        ("http://xn--a.example.com/x.jpg", "bad_url"),
    ]:
        rows.append(("plain", url))
        expected.append(verdict)
    write_list(tmp_path / TRAIN, rows)
    with (tmp_path / TRAIN).open("ab") as file:
        file.write(b"one column\n" + b"three\tcolumns\there\n" + b"\xff\xfe\thttp://example.org/\n")
        file.write(f"windows \u2028 line, NUL \0, \U0001f600\t{server.url}/ok/99\r\n".encode())
        file.write(b"x" * 200_000 + f"\t{server.url}/ok/100\n".encode())
        file.write(f"no line end\t{server.url}/ok/101".encode())
    expected += ["bad_row", "bad_row", "bad_row", "ok", "ok", "ok"]
    write_list(tmp_path / VAL, [("\ufeffval", f"{server.url}/same/val.jpg")])
    (tmp_path / "deny.txt").write_text(f"# ours\n127.0.0.1:{server.port}/denied/me.jpg\n")

    printed = finish(root, tmp_path, "--max_bytes", "1000000", "--deny", str(tmp_path / "deny.txt"))
    assert verdicts(tmp_path / "train.ledger.tsv") == dict(enumerate(expected))
    assert verdicts(tmp_path / "val.ledger.tsv") == {0: "ok"}
    report = json.loads((tmp_path / "download_report.json").read_text())["train"]
    assert report["rows"] == len(expected) == report["ok"] + sum(report["reasons"].values())
    assert Counter(expected) == {"ok": report["ok"], **report["reasons"]}
    assert all(f" {word} " in printed for word in {*expected})
    assert Image.open(tmp_path / "download_report.png").size[0] > 500

    pictures = files(tmp_path / "train")
    assert sorted(pictures) == [f"{i:08d}.jpg" for i, verdict in enumerate(expected) if verdict == "ok"]
    assert all(Image.open(io.BytesIO(data)).format == "JPEG" for data in pictures.values())
    assert pictures["00000000.jpg"] == pictures["00000022.jpg"] == jpeg((1, 0, 77))  # the file as it came
    assert Image.open(io.BytesIO(pictures["00000001.jpg"])).getpixel((5, 5)) == (255, 255, 255)
    assert server.asked["/ok/1"] == server.asked["/same/val.jpg"] == 1
    assert server.asked["/status/503/6"] == 4
    assert not any("denied" in path for path in server.asked)
    source = ConceptualCaptions(tmp_path, "train")
    assert source[0].targets[0].text == '"caption 0'
    assert source[len(expected) - 1].images == (jpeg((101, 0, 77)),)


def test_again_costs_nothing_and_failures_can_be_tried_again(server: Server, root: Path, tmp_path: Path) -> None:
    rows = [("a", f"{server.url}/sometimes/500-200/{i}") for i in range(4)] + [("b", f"{server.url}/status/404/x")]
    rows += [("c", f"{server.url}/ok/7")]
    write_list(tmp_path / TRAIN, rows)
    only = ["--splits", "train", "--retries", "0"]
    finish(root, tmp_path, *only, "--max_failed", "0.5", code=3)
    assert [*verdicts(tmp_path / "train.ledger.tsv").values()] == ["http_500"] * 4 + ["http_404", "ok"]
    asked = server.asked.total()
    finish(root, tmp_path, *only)
    assert server.asked.total() == asked
    assert "no row failed for that" in finish(root, tmp_path, *only, "--retry_failed", "http_5oo", code=2)
    finish(root, tmp_path, *only, "--retry_failed")
    assert [*verdicts(tmp_path / "train.ledger.tsv").values()] == ["ok"] * 4 + ["http_404", "ok"]
    assert server.asked.total() == asked + 4
    finish(root, tmp_path, *only, "--retry_failed", "http_404")
    assert server.asked["/status/404/x"] == 2
    (tmp_path / "train" / "00000005.jpg").unlink()  # lost: fetched again, whatever the ledger says
    finish(root, tmp_path, *only)
    assert server.asked["/ok/7"] == 2
    assert (tmp_path / "train" / "00000005.jpg").read_bytes() == jpeg((7, 0, 77))


def test_what_another_downloader_left(server: Server, root: Path, tmp_path: Path) -> None:
    """Good pictures are kept without a request; pages, empty and cut files are fetched again."""
    write_list(tmp_path / VAL, [("a", f"{server.url}/ok/{i}") for i in range(5)])
    (tmp_path / "val").mkdir()
    for row, data in enumerate([JPEG, b"<html>", b"", JPEG[:50]]):
        (tmp_path / "val" / f"{row:08d}.jpg").write_bytes(data)
    (tmp_path / "val" / ".00000004.jpg.abcdef.part").write_bytes(b"half")
    finish(root, tmp_path, "--splits", "val")
    assert files(tmp_path / "val") == {
        "00000000.jpg": JPEG,
        **{f"{i:08d}.jpg": jpeg((i, 0, 77)) for i in range(1, 5)},
    }
    assert server.asked["/ok/0"] == 0


def test_killed_at_any_moment_it_goes_on(server: Server, root: Path, tmp_path: Path) -> None:
    """No half picture under a final name, no URL succeeds twice, the same set in the end."""
    rng = random.Random(0)

    def table(number: int, handler: Handler) -> None:
        time.sleep(0.02)
        handler.how_ok(str(number), 1) if number % 7 else handler.how_missing("", 1)

    server.table = table
    write_list(tmp_path / TRAIN, [("a", f"{server.url}/table/{i % 380}") for i in range(400)])
    work = tmp_path / ".download" / "train"
    more = ["--splits", "train", "--threads", "4", "--samples_per_shard", "150", "--processes", "2"]

    def count() -> int:
        return sum(path.read_bytes().count(b"\n") for path in work.glob("*.ledger"))

    for kill in range(KILLS):
        process = subprocess.Popen(command(root, tmp_path, *more), stderr=subprocess.DEVNULL, start_new_session=True)
        goal = count() + rng.randrange(1, max(2, 400 // KILLS))
        until = time.monotonic() + (60 if kill % 4 < 3 else rng.uniform(0, 6))
        while time.monotonic() < until and count() < goal and process.poll() is None:
            time.sleep(0.005)
        process.kill()  # the parent alone: its workers must not outlive it
        process.wait()
        time.sleep(0.3)
        at_rest = server.asked.total()
        for path in (tmp_path / "train").glob("[0-9]*"):
            Image.open(path).load()
        assert server.asked.total() == at_rest, "a worker goes on without its parent"
    finish(root, tmp_path, *more)
    found = verdicts(tmp_path / "train.ledger.tsv")
    assert found == {i: "ok" if (i % 380) % 7 else "http_404" for i in range(400)}
    assert files(tmp_path / "train") == {
        f"{i:08d}.jpg": jpeg(((i % 380) % 256, (i % 380) // 256, 77)) for i, v in found.items() if v == "ok"
    }
    # in flight when it was killed: at most a request a thread may have been answered for nothing
    assert server.asked.total() <= 380 + KILLS * 8
    assert not work.exists()


def test_a_killed_process_ends_the_download(server: Server, root: Path, tmp_path: Path) -> None:
    """Out of memory, say: the engine would wait for its work for ever."""
    server.table = lambda number, handler: (time.sleep(0.1), handler.how_ok(str(number), 1))[1]
    write_list(tmp_path / VAL, [("a", f"{server.url}/table/{i}") for i in range(300)])
    process = subprocess.Popen(command(root, tmp_path, "--splits", "val"), stderr=subprocess.PIPE, text=True)
    work = tmp_path / ".download" / "val"
    while not any(path.read_text() for path in work.glob("*.pid")) or not any(work.glob("*.ledger")):
        time.sleep(0.05)
    os.kill(int(next(work.glob("*.pid")).read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 70
    assert "a process of the download was killed" in said
    server.table = lambda number, handler: handler.how_ok(str(number), 1)
    finish(root, tmp_path, "--splits", "val")
    assert len(files(tmp_path / "val")) == 300


def test_an_error_of_this_machine_stops_the_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from git_model.download import engine
    from git_model.download.ledger import LedgerPart
    from git_model.download.network import FetchPolicy

    job = engine.Job(tmp_path, tmp_path, None, (0,), FetchPolicy(), False)
    part = LedgerPart(job.part(0))
    writer = engine.RowWriter(job, 0, part)
    monkeypatch.setattr(engine, "fetch", lambda *_: (_ for _ in ()).throw(RuntimeError("can't start new thread")))
    fetch_row = engine._fetcher(job.policy, writer)
    assert fetch_row((0, "http://example.org/")) == (0, None, engine.STOPPED)
    assert isinstance(writer.error, RuntimeError)
    assert fetch_row((1, "http://example.org/")) == (1, None, engine.STOPPED)
    part.close()


def test_validation_never_in_train(server: Server, root: Path, tmp_path: Path) -> None:
    """Not when only the training set is fetched, and not when a picture was fetched before it was known."""
    write_list(tmp_path / TRAIN, [("a", f"{server.url}/ok/1"), ("b", f"{server.url}/ok/2")])
    finish(root, tmp_path, "--splits", "train")
    assert set(files(tmp_path / "train")) == {"00000000.jpg", "00000001.jpg"}
    write_list(tmp_path / VAL, [("v", f"{server.url}/ok/1")])
    finish(root, tmp_path, "--splits", "train")
    assert verdicts(tmp_path / "train.ledger.tsv") == {0: "in_validation", 1: "ok"}
    assert set(files(tmp_path / "train")) == {"00000001.jpg"}


def test_verdicts_belong_to_one_list(server: Server, root: Path, tmp_path: Path) -> None:
    write_list(tmp_path / "cc.part1.tsv", [("a", f"{server.url}/ok/1")])
    write_list(tmp_path / "cc.part2.tsv", [("b", f"{server.url}/ok/2")])
    for part in ("part1", "part2"):
        finish(root, tmp_path, "--url_list", str(tmp_path / f"cc.{part}.tsv"))
    assert files(tmp_path / "cc.part2") == {"00000000.jpg": jpeg((2, 0, 77))}
    same = ["--url_list", str(tmp_path / "cc.part1.tsv")]
    assert "output_format was files, is webdataset" in finish(
        root, tmp_path, *same, "--output_format", "webdataset", code=2
    )
    assert "image_size was 0, is 64" in finish(root, tmp_path, *same, "--image_size", "64", code=2)
    write_list(tmp_path / "cc.part1.tsv", [("other", f"{server.url}/ok/9")])
    assert "belong to another download (list was" in finish(root, tmp_path, *same, code=2)


def test_packed_leftovers_and_lost_shards(server: Server, root: Path, tmp_path: Path) -> None:
    """A picture that a kill left unpacked is taken over; a shard that is gone is fetched again."""
    write_list(tmp_path / "m.tsv", [("a", f"{server.url}/ok/{i}") for i in range(4)])
    more = ["--url_list", str(tmp_path / "m.tsv"), "--output_format", "webdataset", "--samples_per_shard", "2"]
    folder = tmp_path / ".download" / "m" / "pictures" / "00000"
    folder.mkdir(parents=True)
    (folder / "00000000.jpg").write_bytes(JPEG)
    (folder / "00000000.json").write_text(json.dumps({"caption": "kept", "sha256": "0" * 64}))
    (folder / "00000001.jpg").write_bytes(JPEG[:40])
    finish(root, tmp_path, *more)
    assert server.asked["/ok/0"] == 0
    with tarfile.open(tmp_path / "m" / "00000.tar") as shard:
        assert shard.getnames()[:3] == ["00000000.jpg", "00000000.txt", "00000000.json"]
    (tmp_path / "m" / "00001.tar").unlink()
    finish(root, tmp_path, *more)
    assert (tmp_path / "m" / "00001.tar").is_file()
    assert [server.asked[f"/ok/{i}"] for i in range(4)] == [0, 1, 2, 2]


def test_shards(server: Server, root: Path, tmp_path: Path) -> None:
    """img2dataset's layout, readable by the trainer; a second run adds to a shard."""
    rows = [(f"caption {i}", f"{server.url}/ok/{i}") for i in range(25)]
    rows[3] = ("late", f"{server.url}/sometimes/500-200/3")
    rows[21] = ("double", rows[2][1])
    write_list(tmp_path / "mine.tsv", rows)
    more = ["--url_list", str(tmp_path / "mine.tsv"), "--output_format", "webdataset", "--samples_per_shard", "10"]
    finish(root, tmp_path, *more, "--retries", "0")
    assert verdicts(tmp_path / "mine.ledger.tsv")[3] == "http_500"
    finish(root, tmp_path, *more, "--retry_failed")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {f"{i:05d}.tar" for i in range(3)}
    source = WebDataset(tmp_path, "mine/*.tar")
    found = {source[i].key: source[i] for i in range(len(source))}
    assert len(found) == 25
    assert {key: sample.targets[0].text for key, sample in found.items()} == {f"{i:08d}": rows[i][0] for i in range(25)}
    assert found["00000021"].images == found["00000002"].images == (jpeg((2, 0, 77)),)
    with tarfile.open(tmp_path / "mine" / "00000.tar") as shard:
        names = shard.getnames()
        about = json.load(shard.extractfile("00000003.json"))  # type: ignore[arg-type]
    assert names == sorted(names, key=lambda name: (name[:8], ["jpg", "txt", "json"].index(name[9:])))
    assert about["caption"] == "late"
    assert about["original_size"] == [60, 40]


def test_resized_as_asked(server: Server, root: Path, tmp_path: Path) -> None:
    """Upright first, alpha on white, then the engine's resizing."""
    turned = Image.new("RGB", (90, 60), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    pictures = [buffer.getvalue(), png("RGBA", (80, 40)), jpeg(size=(20, 10)), png("I;16", (50, 100))]
    server.table = lambda number, handler: handler.answer(200, pictures[number])
    write_list(tmp_path / VAL, [("a", f"{server.url}/table/{i}") for i in range(4)])
    finish(root, tmp_path, "--splits", "val", "--image_size", "30")
    sizes = [Image.open(tmp_path / "val" / f"{i:08d}.jpg").size for i in range(4)]
    assert sizes == [(30, 45), (60, 30), (20, 10), (30, 60)]


def test_equal_pictures_become_one_file(server: Server, root: Path, tmp_path: Path) -> None:
    write_list(tmp_path / VAL, [("a", f"{server.url}/same/{i}") for i in range(3)] + [("b", f"{server.url}/ok/1")])
    finish(root, tmp_path, "--splits", "val", "--dedup", "sha256")
    assert [(tmp_path / "val" / f"{i:08d}.jpg").stat().st_nlink for i in range(4)] == [3, 3, 3, 1]


@pytest.mark.parametrize("packed", [False, True])
def test_csv_lists(server: Server, root: Path, tmp_path: Path, packed: bool) -> None:
    """Quoting means something here: a caption may hold line ends and commas."""
    path = tmp_path / ("list.csv.gz" if packed else "list.csv")
    with gzip.open(path, "wt", newline="") if packed else path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "link", "text"])
        out.writerow(["1", f"{server.url}/ok/1", 'two\nlines, "quoted"\tand a tab'])
        out.writerow(["2", f"{server.url}/ok/2"])
        out.writerow(["3", f"{server.url}/ok/3", "three"])
    data = tmp_path / "data"
    named = ["--url_list", str(path), "--caption_col", "text", "--url_col", "link"]
    assert "did you mean 'link'" in finish(root, data, *named[:-1], "lnk", code=2)
    finish(root, data, *named)
    assert [*verdicts(data / "list.ledger.tsv").values()] == ["ok", "bad_row", "ok"]
    assert (data / "list.captions.tsv").read_text().split("\t")[0] == 'two lines, "quoted" and a tab'


def test_ctrl_c(server: Server, root: Path, tmp_path: Path) -> None:
    server.table = lambda number, handler: (time.sleep(0.2), handler.how_ok(str(number), 1))[1]
    write_list(tmp_path / VAL, [("a", f"{server.url}/table/{i}") for i in range(2000)])
    process = subprocess.Popen(
        command(root, tmp_path, "--splits", "val"), stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    while not any((tmp_path / ".download" / "val").glob("*.ledger")):
        time.sleep(0.05)
    second = finish(root, tmp_path, "--splits", "val", code=2)
    assert f"in use by {os.uname().nodename}, process {process.pid}" in second
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    started = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - started < 3
    assert process.returncode == 130
    assert said.strip().endswith("error: interrupted; start the same command again to go on")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own")
def test_a_full_disk(server: Server, root: Path, tmp_path: Path) -> None:
    """Exit code 74; what is there is whole; with room it goes on."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        noise = [os.urandom(40_000) for _ in range(60)]

        def table(number: int, handler: Handler) -> None:
            buffer = io.BytesIO()
            Image.frombytes("RGB", (100, 133), noise[number][:39_900]).save(buffer, "JPEG", quality=95)
            handler.answer(200, buffer.getvalue())

        server.table = table
        write_list(small / VAL, [("a", f"{server.url}/table/{i}") for i in range(60)])
        assert "No space left" in finish(root, small, "--splits", "val", code=74)
        for path in (small / "val").glob("[0-9]*"):
            Image.open(path).load()
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        finish(root, small, "--splits", "val")
        assert len(files(small / "val")) == 60
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data_rot", "x"], "--data_root"),
        (["--data_root", "x", "--imagesize", "3"], "did you mean '--image_size'"),
        (["--data_root", "x", "--image_size", "big"], "must be a whole number from 0 to 10000, got 'big'"),
        (["--data_root", "x", "--splits", "test"], "--splits 'test'; one of: train, val"),
        (["--data_root", "x"], "must hold Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv"),
        (["--data_root", "x", "--url_list", "nothing.tsv"], "no list 'nothing.tsv'"),
        (["--data_root", "x", "--distributor", "pyspark"], "pip install pyspark"),
        (["--data_root", "x", "--output_format", "zip"], "invalid choice: 'zip'"),
        (["--data_root", "x", "--dedup", "sha256", "--output_format", "webdataset"], "files only"),
    ],
)
def test_wrong_commands_answer_at_once(root: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(root / "download.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert time.monotonic() - started < 1.5
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_conceptual_captions_as_it_was(server: Server, root: Path, tmp_path: Path, reference_data: Path) -> None:
    """The real validation list; each URL answers as the report of 2019 says it did."""
    report = {}
    with gzip.open(reference_data / "data" / "cc3m" / "downloaded_validation_report.tsv.gz", "rt") as file:
        for line in file:
            url, _, status, kind = line.split("\t")[:4]
            report[url] = (int(status), kind.split(";")[0])
    real = (reference_data / "data" / "cc3m" / VAL).read_bytes().split(b"\n")
    rows = [tuple(cell.decode() for cell in line.split(b"\t")) for line in real if line]
    assert len(rows) == 15_833
    answers = [report[url.strip()] for _, url in rows]
    bodies = {"text/html": b"<html></html>", "text/x-php": b"<?php ?>", "text/plain": b"gone", "inode/x-empty": b""}

    def table(number: int, handler: Handler) -> None:
        status, kind = answers[number]
        picture = png("RGB") if kind == "image/png" else JPEG
        handler.answer(status, bodies.get(kind, picture) if status == 200 else b"")

    server.table = table
    write_list(tmp_path / VAL, [(caption, f"{server.url}/table/{i}") for i, (caption, _) in enumerate(rows)])
    finish(root, tmp_path, "--splits", "val", "--processes", "2", "--retries", "1", "--backoff", "0")
    found = verdicts(tmp_path / "val.ledger.tsv")
    assert len(found) == len(rows)
    for (status, kind), verdict in zip(answers, (found[i] for i in range(len(rows))), strict=True):
        if status != 200:
            assert verdict == f"http_{status}"
        else:
            assert verdict == {"inode/x-empty": "empty"}.get(kind, "ok") or (kind in bodies and "not_image" in verdict)
    counts = Counter(status for status, _ in answers)
    assert {f"http_{s}": n for s, n in counts.items() if s != 200} == {
        v: n for v, n in Counter(found.values()).items() if v.startswith("http_")
    }
    assert [s.targets[0].text for s in (ConceptualCaptions(tmp_path, "val")[i] for i in (0, 15_832))] == [
        rows[0][0].strip(),
        rows[-1][0].strip(),
    ]
