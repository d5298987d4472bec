"""What stands between the web page and strangers: requests are judged, pictures decoded apart, answers counted."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from pebble import ProcessExpired, ProcessPool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from git_model.errors import ImageError, UserError
from git_model.tasks.session import MAX_PICTURES, MAX_UPLOAD

T = TypeVar("T")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SMALL_BODY = 2**20  # bytes of a request that uploads nothing
PATIENCE = 10.0  # seconds that the next bytes of a request may take
DECODING_SECONDS, DECODING_BYTES = 10.0, 2 * 2**30
MAX_STORED = 2 * 2**30  # bytes of all uploads
# Gradio's own scripts are in the page and build functions; everything else comes from this server or from nowhere
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)


class Guard:
    """Judges requests before they are read, and forbids the page all foreign addresses.

    Refused are another site's name that was pointed here (403), what another site's page sends (403), bodies that are
    too large, whatever they say of their length (413), those that do not come (408), and addresses in a file's place,
    which Gradio would fetch (400).

    Args:
        app: what answers.
        names: hosts that may be asked for; () = any.
        same_site: whether only this page may send; not behind a tunnel, which has another name.
        patience: seconds that the next bytes of a request may take.
        uploads: how many an address may send.
        folder: where they go; it may hold MAX_STORED bytes.
    """

    def __init__(
        self,
        app: ASGIApp,
        names: Sequence[str] = (),
        same_site: bool = True,
        patience: float = PATIENCE,
        uploads: Pace | None = None,
        folder: str | None = None,
    ) -> None:
        self.app, self.names, self.same_site, self.patience = app, names, same_site, patience
        self.uploads, self.folder = uploads, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] != "websocket":
                await self.app(scope, receive, send)
            return
        if refused := self._refused(scope):
            status, text = refused
            start: Message = {"type": "http.response.start", "status": status, "headers": [(b"connection", b"close")]}
            await send(_marked(start))
            await send({"type": "http.response.body", "body": text})
            return

        async def answer(message: Message) -> None:
            await send(_marked(message))

        limited = self._limited(receive, _most(scope))
        await self.app(
            scope, limited if _uploads(scope) or scope["method"] == "GET" else _without_addresses(limited), answer
        )

    def _refused(self, scope: Scope) -> tuple[int, bytes] | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self.names and _name_of(host) not in self.names:
            return 403, b"this page answers to this machine's own name only"
        origin = headers.get(b"origin")
        reading = scope["method"] in ("GET", "HEAD", "OPTIONS")
        if self.same_site and not reading and origin is not None and origin.partition("://")[2] != host:
            return 403, b"this page takes nothing from other sites"
        if ":/" in scope["path"] or "://" in unquote(scope["query_string"].decode("latin-1")):
            return 400, b"nothing is fetched from elsewhere"
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or len(length) > 12 or int(length) > _most(scope):
            return 413, b"too large"
        return self._refused_upload(scope) if _uploads(scope) else None

    def _refused_upload(self, scope: Scope) -> tuple[int, bytes] | None:
        try:
            if self.uploads is not None:
                self.uploads.check((scope.get("client") or ("",))[0])
        except UserError as error:
            return 429, str(error).encode()
        if self.folder is not None and _size(self.folder) > MAX_STORED:
            return 503, b"too many pictures are kept at the moment"
        return None

    def _limited(self, receive: Receive, most: int) -> Receive:
        """Return the same, with an end to what a body may hold and how long it may take."""
        taken, whole = 0, False

        async def limited() -> Message:
            nonlocal taken, whole
            if whole:  # the answer is being made: what comes now is the end of the connection
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.patience)
            except TimeoutError:
                raise HTTPException(408, "the request does not come") from None
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, "too large")
            whole = not message.get("more_body", False)
            return message

        return limited


def _without_addresses(receive: Receive) -> Receive:
    """Return the same, with the body in one piece in which no file is an address."""
    first = True

    async def whole() -> Message:
        nonlocal first
        if not first:
            return await receive()
        first, body, more = False, b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return message
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if names_address(body):
            raise HTTPException(400, "files are uploaded, not named")
        return {"type": "http.request", "body": body, "more_body": False}

    return whole


def names_address(body: bytes) -> bool:
    """Tell whether JSON has an address where a file's path belongs; what is no JSON has none."""
    found = False

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal found
        for key, value in pairs:  # all of them: a key may be there twice
            found |= key == "path" and isinstance(value, str) and "://" in value
        return dict(pairs)

    try:
        json.loads(body, object_pairs_hook=look)
    except (ValueError, RecursionError):
        return False
    return found


def _most(scope: Scope) -> int:
    return MAX_PICTURES * MAX_UPLOAD + SMALL_BODY if _uploads(scope) else SMALL_BODY


def _uploads(scope: Scope) -> bool:
    return scope["path"].endswith("/upload") and scope["method"] == "POST"


def _size(folder: str) -> int:
    """Return the bytes of all files below a folder; those that go meanwhile do not count."""
    total = 0
    for path in Path(folder).rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size
    return total


def _marked(message: Message) -> Message:
    if message["type"] != "http.response.start":
        return message
    added = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
    if message["status"] == 503:  # as many wait as may
        added.append((b"retry-after", b"10"))
    return {**message, "headers": [*message.get("headers", ()), *added]}


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class Pace:
    """Lets each client ask so often in a minute.

    Args:
        most: times; 0 = as often as wanted.
        clock: in seconds.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.most, self.clock = most, clock
        self.asked: dict[str, deque[float]] = {}

    def check(self, client: str) -> None:
        """Count a request; raises UserError where it is one too many."""
        if not self.most:
            return
        now = self.clock()
        self.asked = {name: times for name, times in self.asked.items() if now - times[-1] < 60}
        times = self.asked.setdefault(client, deque(maxlen=self.most))
        if len(times) == self.most and now - times[0] < 60:
            raise UserError(f"{self.most} answers a minute; the next in {math.ceil(60 - (now - times[0]))} s")
        times.append(now)


class Sandbox:
    """Runs functions on what strangers sent in a process of its own, which may take so much time and memory.

    Args:
        seconds: of a call; the process is killed then, the next call gets another.
        memory: bytes of address space.
    """

    def __init__(self, seconds: float = DECODING_SECONDS, memory: int = DECODING_BYTES) -> None:
        self.seconds = seconds
        spawned = multiprocessing.get_context("spawn")  # not forked from threads, and without the model's memory
        self.pool = ProcessPool(max_workers=1, initializer=_limit, initargs=[memory], context=spawned)

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """Return what a function of a module returns.

        Raises:
            ImageError: whatever the function raised of the kind; too slow; or its process died.
        """
        try:
            return self.pool.schedule(function, args=args, timeout=self.seconds).result()
        except TimeoutError as error:
            raise ImageError("too_slow", f"more than {self.seconds:g} s") from error
        except (MemoryError, ProcessExpired) as error:
            raise ImageError("too_large", "its decoder had not enough memory, or died") from error

    def close(self) -> None:
        """End the process."""
        self.pool.stop()
        self.pool.join()


def _limit(memory: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
