"""A real HTTP server on loopback that answers in every way servers on the internet do."""

from __future__ import annotations

import gzip
import io
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image


def jpeg(colour: Any = "red", size: tuple[int, int] = (60, 40), **options: Any) -> bytes:
    """Return a JPEG file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def png(mode: str = "RGBA", size: tuple[int, int] = (60, 40)) -> bytes:
    """Return a PNG file."""
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


JPEG = jpeg()
BOMB = gzip.compress(bytes(10**8), 1)


class Handler(BaseHTTPRequestHandler):
    """The first word of the path says how to behave; what follows makes URLs differ."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Behave as asked."""
        how, _, rest = self.path.lstrip("/").partition("/")
        server: Server = self.server.farm  # type: ignore[attr-defined]
        with server.guard:
            server.asked[self.path] += 1
            count = server.asked[self.path]
        server.headers[self.path] = dict(self.headers.items())
        getattr(self, f"how_{how.partition('?')[0]}", self.how_missing)(rest, count)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, length: Any = None) -> None:
        """Send a whole answer, with a wrong length if one is given."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        if length is not None:
            self.close_connection = True

    def how_missing(self, rest: str, count: int) -> None:
        """Not there."""
        self.answer(404, b"<html>no</html>")

    def how_ok(self, rest: str, count: int) -> None:
        """A picture, another one for each path."""
        number = int("".join(c for c in rest if c.isdigit()) or 0)
        self.answer(200, jpeg((number % 256, number // 256 % 256, 77)), {"Content-Type": "image/jpeg"})

    def how_same(self, rest: str, count: int) -> None:
        """The same picture for every path."""
        self.answer(200, JPEG)

    def how_png(self, rest: str, count: int) -> None:
        """A transparent picture."""
        self.answer(200, png())

    def how_status(self, rest: str, count: int) -> None:
        """The status in the path, with a page."""
        status = int(rest.split("/")[0])
        self.answer(status, JPEG if status == 200 else b"<html></html>")

    def how_sometimes(self, rest: str, count: int) -> None:
        """Statuses in turn, the last one for ever: /sometimes/500-500-200."""
        turns = [int(word) for word in rest.split("/")[0].split("-")]
        status = turns[min(count, len(turns)) - 1]
        self.answer(status, JPEG if status == 200 else b"", {"Retry-After": "0"} if status == 429 else {})

    def how_busy(self, rest: str, count: int) -> None:
        """429 with Retry-After once."""
        self.answer(200, JPEG) if count > 1 else self.answer(429, b"", {"Retry-After": rest.split("/")[0]})

    def how_hang(self, rest: str, count: int) -> None:
        """Never answers."""
        time.sleep(30)

    def how_slow(self, rest: str, count: int) -> None:
        """One byte each tenth of a second."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(1000):
            self.wfile.write(b"x")
            self.wfile.flush()
            time.sleep(0.1)

    def how_slowhead(self, rest: str, count: int) -> None:
        """A header that never ends, slowly."""
        for _ in range(1000):
            self.wfile.write(b"H")
            self.wfile.flush()
            time.sleep(0.1)

    def how_endless(self, rest: str, count: int) -> None:
        """Chunks for ever."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def how_endlesshead(self, rest: str, count: int) -> None:
        """Headers for ever."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X-More: " + b"x" * 1000 + b"\r\n")

    def how_short(self, rest: str, count: int) -> None:
        """Promises more than it sends."""
        self.answer(200, JPEG[:100], length=len(JPEG))

    def how_shortonce(self, rest: str, count: int) -> None:
        """Cut the first time."""
        self.how_short(rest, count) if count == 1 else self.answer(200, JPEG)

    def how_long(self, rest: str, count: int) -> None:
        """Promises less than it sends."""
        self.answer(200, JPEG, length=100)

    def how_big(self, rest: str, count: int) -> None:
        """Says it is huge."""
        self.answer(200, b"", length=10**10)

    def how_html(self, rest: str, count: int) -> None:
        """A page with status 200, under the name of a picture."""
        self.answer(200, b"<!doctype html><html>buy this domain</html>", {"Content-Type": "image/jpeg"})

    def how_empty(self, rest: str, count: int) -> None:
        """Nothing."""
        self.answer(200)

    def how_cut(self, rest: str, count: int) -> None:
        """Half a picture, honestly declared."""
        picture = jpeg(size=(200, 200))
        self.answer(200, picture[: len(picture) // 2])

    def how_gzip(self, rest: str, count: int) -> None:
        """A compressed body that nobody asked for: 100 MB in 100 KB."""
        self.answer(200, BOMB, {"Content-Encoding": "gzip"})

    def how_to(self, rest: str, count: int) -> None:
        """Redirect to what follows, a path or a whole URL."""
        self.answer(302, b"", {"Location": rest if "://" in rest or rest.startswith("//") else f"/{rest}"})

    def how_utf8(self, rest: str, count: int) -> None:
        """Redirect to a path in bytes beyond ASCII."""
        self.wfile.write("HTTP/1.1 302 Found\r\nLocation: /same/ö.jpg\r\nContent-Length: 0\r\n\r\n".encode())
        self.close_connection = True

    def how_loop(self, rest: str, count: int) -> None:
        """Redirect to itself."""
        self.answer(301, b"", {"Location": self.path})

    def how_nowhere(self, rest: str, count: int) -> None:
        """Redirect without a place."""
        self.answer(302)

    def how_robots(self, rest: str, count: int) -> None:
        """A picture that must not be used."""
        self.answer(200, JPEG, {"X-Robots-Tag": rest.split("/")[0].replace("_", ": ")})

    def how_drop(self, rest: str, count: int) -> None:
        """Close without a word."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def how_nonsense(self, rest: str, count: int) -> None:
        """Not HTTP."""
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        self.close_connection = True

    def how_table(self, rest: str, count: int) -> None:
        """What the test says of this number."""
        server: Server = self.server.farm  # type: ignore[attr-defined]
        server.table(int(rest), self)


class Server:
    """Counts what it was asked for.

    Args:
        certificate: PEM of key and certificate, for TLS.
    """

    def __init__(self, certificate: Path | None = None) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.guard = threading.Lock()
        self.table: Callable[[int, Handler], None] = lambda _number, handler: handler.answer(404)
        self.http = _Quiet(("127.0.0.1", 0), Handler)
        self.http.farm = self  # type: ignore[attr-defined]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_address[1]
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.port}"


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are the point."""


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[Server]:
    """Run a server until the end of the block."""
    server = Server(certificate)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def self_signed(folder: Path) -> Path:
    """Make a certificate that nobody vouches for."""
    path = folder / "self.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [*request, "-keyout", str(path), "-out", str(folder / "cert.pem")],
        check=True,
        capture_output=True,
    )
    path.write_bytes(path.read_bytes() + (folder / "cert.pem").read_bytes())
    return path
