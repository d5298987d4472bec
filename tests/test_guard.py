"""What strangers may do to the web page: a real server, raw requests; no browser."""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from paging import ROOT, page_of
from PIL import Image
from test_dense import checkpoint, saved_png

from git_model.datasets.images import decode_image
from git_model.errors import ImageError, UserError

pytest.importorskip("gradio", reason="the page's extra is not installed")

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from git_model.tasks.guard import LOOPBACK, SMALL_BODY, Guard, Pace, Sandbox, names_address
from git_model.tasks.session import MAX_PICTURES, MAX_UPLOAD, Session, looked_at

PATIENCE = 1.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("secret_place"), "roi")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_png(tmp_path_factory.mktemp("photos") / "a.png")


@pytest.fixture(scope="module")
def address(model: str) -> Iterator[str]:
    with page_of(model_path=model, max_new_tokens=3, per_minute=2) as found:
        yield found


@pytest.fixture(scope="module")
def counting() -> Iterator[tuple[str, int]]:
    """A guarded application that tells how many bytes it was sent."""

    async def count(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())), 503 if request.url.path == "/full" else 200)

    app = Starlette(routes=[Route("/{path:path}", count, methods=["GET", "POST"])])
    app.add_middleware(Guard, names=LOOPBACK, patience=PATIENCE)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def status(place: tuple[str, int], request: bytes, *more: bytes) -> int:
    """Send parts of a request, and return the answer's status; 0 = none came."""
    with socket.create_connection(place, timeout=20) as line:
        try:
            line.sendall(request)
            for part in more:
                line.sendall(part)
        except ConnectionError:  # it has refused before all was sent
            pass
        try:
            found = re.match(rb"HTTP/1.1 (\d+)", line.recv(4096))
        except ConnectionError:
            return 0
        return int(found[1]) if found else 0


def head(method: str = "POST", path: str = "/queue/join", **headers: Any) -> bytes:
    given = {"Host": "127.0.0.1:80", **{name.replace("_", "-"): value for name, value in headers.items()}}
    return "\r\n".join([f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in given.items()), "", ""]).encode()


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("method", "headers", "expected"),
    [
        ("GET", {}, 200),
        ("GET", {"Host": "localhost:80"}, 200),
        ("GET", {"Host": "[::1]:80"}, 200),
        ("GET", {"Host": "elsewhere.example"}, 403),
        ("GET", {"Host": "127.0.0.1.elsewhere.example"}, 403),
        ("GET", {"Host": "[::1"}, 403),
        ("GET", {"Origin": "https://elsewhere.example"}, 200),  # the browser keeps the answer from it
        ("POST", {"Origin": "http://127.0.0.1:80"}, 200),
        ("POST", {"Origin": "https://elsewhere.example"}, 403),
        ("POST", {"Origin": "null"}, 403),
        ("POST", {"Origin": "http://127.0.0.1:81"}, 403),
    ],
)
def test_names_and_other_sites(counting: tuple[str, int], method: str, headers: dict[str, str], expected: int) -> None:
    assert status(counting, head(method, Content_Length=0, **headers)) == expected


def test_bodies(counting: tuple[str, int]) -> None:
    fits = head(Content_Length=SMALL_BODY)
    assert status(counting, fits, bytes(SMALL_BODY)) == 200
    assert status(counting, head(Content_Length=SMALL_BODY + 1)) == 413, "before a byte of it"
    assert status(counting, head(Content_Length="many")) in (400, 413)
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    endless = head(Transfer_Encoding="chunked")
    assert status(counting, endless, *[chunk] * (SMALL_BODY // 0x10000 + 2)) == 413
    assert status(counting, endless, chunk, b"0\r\n\r\n") == 200
    pictures = head(path="/gradio_api/upload", Content_Length=MAX_PICTURES * MAX_UPLOAD)
    assert status(counting, pictures, bytes(MAX_PICTURES * MAX_UPLOAD)) == 200
    assert status(counting, head(path="/gradio_api/upload", Content_Length=2**30)) == 413


def test_come_back_later(counting: tuple[str, int]) -> None:
    host, port = counting
    assert httpx.get(f"http://{host}:{port}/full").headers["retry-after"] == "10"
    assert "retry-after" not in httpx.get(f"http://{host}:{port}/").headers


def test_uploads_are_counted_and_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = Guard(None, uploads=Pace(2), folder=str(tmp_path))  # type: ignore[arg-type]
    scope: dict[str, Any] = {
        "type": "http",
        "path": "/gradio_api/upload",
        "method": "POST",
        "query_string": b"",
        "headers": [],
    }
    scope["client"] = ("10.0.0.1", 1)
    assert guard._refused(scope) is None
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "kept.png").write_bytes(bytes(100))
    monkeypatch.setattr("git_model.tasks.guard.MAX_STORED", 99)
    assert guard._refused(scope) == (503, b"too many pictures are kept at the moment")
    assert (guard._refused(scope) or (0,))[0] == 429
    assert guard._refused({**scope, "path": "/"}) is None
    assert (guard._refused({**scope, "headers": [(b"content-length", b"9" * 5000)]}) or (0,))[0] == 413


def test_slow_ones_do_not_hold_up_others(counting: tuple[str, int]) -> None:
    started = time.monotonic()
    slow = [socket.create_connection(counting, timeout=20) for _ in range(200)]
    for number, line in enumerate(slow):
        line.sendall(head(Content_Length=100)[: None if number % 2 else -10] + b"x" * (number % 2))
    assert status(counting, head("GET")) == 200
    for line in slow[1::2]:  # their bodies do not come
        assert line.recv(100).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started >= PATIENCE
    for line in slow:
        line.close()
    assert status(counting, head("GET")) == 200


# ----------------------------------------------------------------------------------------------------- the page itself
def place(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("http://").partition(":")
    return host, int(port)


def test_no_file_is_given_out(address: str, model: str) -> None:
    files = [
        model,
        str(ROOT / "pyproject.toml"),
        "/etc/passwd",
        "../pyproject.toml",
        "~/.ssh/id_rsa",
        "/proc/self/environ",
    ]
    spelt = [
        form for file in files for form in (file, quote(file, safe=""), f"file={file}", f"./{file}", f"..%2f{file}")
    ]
    spelt += [
        "%00",
        "a%00.png",
        "..\\..\\etc\\passwd",
        "file:///etc/passwd",
        "http://127.0.0.1/",
        "\\\\host\\share",
        "con",
        "//etc/passwd",
    ]
    asked = [f"{address}/gradio_api/file={form}" for form in spelt]
    asked += [
        f"{address}/{form}" for form in ("../etc/passwd", "static/../../etc/passwd", "assets/%2e%2e/%2e%2e/etc/passwd")
    ]
    fetching = ("stream/../../x", "proxy=http://127.0.0.1/", "x?url=http%3A//127.0.0.1/")
    asked += [f"{address}/gradio_api/{form}" for form in fetching]
    assert len(asked) >= 40
    for url in asked:
        answer = httpx.get(url)
        assert answer.status_code in (400, 403, 404, 405, 422), url
        assert "root:" not in answer.text


def test_no_address_is_fetched(address: str) -> None:
    """Gradio would: what it asks for is heard by the page's fixture."""
    config = httpx.get(f"{address}/config").json()
    uploading = next(d["id"] for d in config["dependencies"] if any(event == "upload" for _, event in d["targets"]))
    for url in ("http://elsewhere.example/a.png", "https://elsewhere.example/a.png", "ftp://elsewhere.example/a.png"):
        told = {"data": [None, [{"path": url, "meta": {"_type": "gradio.FileData"}}]], "fn_index": uploading}
        answer = httpx.post(f"{address}/gradio_api/queue/join", json={**told, "session_hash": "s"})
        assert (answer.status_code, answer.text) == (400, '{"detail":"files are uploaded, not named"}')
    assert names_address(b'{"path": "\\u0068ttp://a/", "path": "b"}'), "spelt otherwise, and hidden by another"
    assert not names_address(b'{"prompt": "see http://a/"}')
    assert not names_address(b"no JSON")
    assert not names_address(b"[" * 500_000)


def test_a_hundred_files_and_a_large_one(address: str, photo: str) -> None:
    small = Path(photo).read_bytes()
    answer = httpx.post(f"{address}/gradio_api/upload", files=[("files", (f"{i}.png", small)) for i in range(100)])
    assert answer.status_code == 200
    with pytest.raises(UserError, match="100 pictures for one question; at most 6"):
        Session(mode="Question").uploaded([small] * 100)
    large = httpx.post(f"{address}/gradio_api/upload", files={"files": ("a.png", bytes(11 * 2**20))}, timeout=20)
    assert large.status_code == 413
    assert status(place(address), head(path="/gradio_api/upload", Content_Length=2**34)) == 413


def test_too_many_at_once(address: str) -> None:
    """As many wait as may, the others are told to come back; nothing breaks, and the page goes on."""
    config = httpx.get(f"{address}/config").json()
    asking = next(d["id"] for d in config["dependencies"] if len(d["inputs"]) > 8)  # all that a description depends on

    def join(number: int) -> httpx.Response:
        told = {"data": [None, "", -1, -1, -1, -1, 1, False, 1, 3], "fn_index": asking, "session_hash": f"h{number}"}
        return httpx.post(f"{address}/gradio_api/queue/join", json=told, timeout=30)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(join, range(200)))
    assert {answer.status_code for answer in answers} <= {200, 503}
    assert all(a.headers.get("retry-after") == "10" for a in answers if a.status_code == 503)
    assert httpx.get(address).status_code == 200


# ----------------------------------------------------------------------------------------------------------- its parts
def test_pace() -> None:
    now = [0.0]
    pace = Pace(2, lambda: now[0])
    for at in (0, 10):
        now[0] = at
        pace.check("a")
    now[0] = 20
    with pytest.raises(UserError, match="2 answers a minute; the next in 40 s"):
        pace.check("a")
    pace.check("b")
    now[0] = 60
    pace.check("a")
    with pytest.raises(UserError, match="the next in 10 s"):
        pace.check("a")
    now[0] = 1000
    pace.check("c")
    assert set(pace.asked) == {"c"}, "who has gone is forgotten"
    free = Pace(0)
    for _ in range(100):
        free.check("a")


def taken(megabytes: int) -> int:
    """Take memory, in the other process."""
    return len(bytearray(megabytes * 2**20))


def test_sandbox() -> None:
    sandbox = Sandbox(seconds=2, memory=2**30)
    try:
        file = io.BytesIO()
        Image.new("RGB", (30, 20), "red").save(file, "PNG")
        size, shown = sandbox(looked_at, file.getvalue())
        assert size == (30, 20)
        assert shown.getpixel((0, 0)) == (255, 0, 0)
        with pytest.raises(ImageError, match="not_image:text"):
            sandbox(decode_image, b"no picture")
        assert sandbox(taken, 100) == 100 * 2**20
        with pytest.raises(ImageError, match="too_large"):
            sandbox(taken, 2000)
        with pytest.raises(ImageError, match="too_slow"):
            sandbox(time.sleep, 30)
        assert sandbox(looked_at, file.getvalue())[0] == (30, 20), "the next one finds another process"
    finally:
        sandbox.close()


def test_settings_that_cannot_be(model: str) -> None:
    from git_model.tasks.registry import run

    with pytest.raises(UserError, match="per_minute is -1; 0 or more"):
        run({"type": "demo", "model_path": model, "port": 0, "per_minute": -1})
    with pytest.raises(UserError, match="max_seconds must be a whole number from 1 to 3600, got 0"):
        run({"type": "demo", "model_path": model, "port": 0, "max_seconds": 0})
