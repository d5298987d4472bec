"""One URL -> its bytes, or a reason: every address is checked at every hop, under one deadline and one byte cap.

httpcore speaks HTTP and TLS; its network backend is where a name becomes an address, so that is where addresses are
checked: a name is resolved once, and what was checked is what is connected to.
"""

from __future__ import annotations

import ipaddress
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from functools import cache
from typing import Any

import httpcore
import httpx

USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
ROBOTS = ("noai", "noimageai", "noindex", "noimageindex")  # of X-Robots-Tag, as img2dataset honours them
REDIRECTS = (301, 302, 303, 307, 308)
AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # a cloud's own service on a public address
NAT64 = ipaddress.ip_network("64:ff9b::/96")

# how often a reason is tried again; "many" is the policy's figure, everything else is final
MANY = ("http_408", "http_429", "http_500", "http_502", "http_503", "http_504", "truncated", "disconnected")
ONCE = ("refused", "unreachable")


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What a download may cost and where it may go.

    Args:
        deadline: seconds of one try, all redirects and bytes included.
        max_bytes: of a body.
        retries: of what may pass (5xx, 429, cut bodies).
        backoff: seconds before the first retry, doubled each time, with jitter.
        max_wait: longest pause that a server's Retry-After may ask for, seconds.
        max_hops: redirects followed.
        ports: allowed ones.
        robots_agent: name by which X-Robots-Tag may address us.
        private: for tests: private addresses and any port allowed.
    """

    deadline: float = 20.0
    max_bytes: int = 20 * 2**20
    retries: int = 3
    backoff: float = 1.0
    max_wait: float = 60.0
    max_hops: int = 5
    ports: tuple[int, ...] = (80, 443)
    robots_agent: str | None = None
    private: bool = False


class FetchError(Exception):
    """No bytes.

    Args:
        reason: a short word to count by.
        wait: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait, self.tries = reason, wait, 1


def fetch(url: str, policy: FetchPolicy) -> tuple[bytes, int]:
    """Return a body and how many tries it took.

    Raises:
        FetchError: reason and tries.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return _try(url, policy), tries
        except FetchError as error:
            error.tries = tries
            allowed = policy.retries if error.reason in MANY else min(1, policy.retries) * (error.reason in ONCE)
            if tries > allowed:
                raise
            pause = policy.backoff * 2 ** (tries - 1) * random.uniform(0.5, 1.5)
            time.sleep(min(policy.max_wait, pause if error.wait is None else max(error.wait, pause)))


def parse_url(url: str) -> httpx.URL:
    """Return a URL that may be fetched, without credentials and fragment.

    Raises:
        FetchError: `bad_scheme` or `bad_url`.
    """
    scheme, found, _ = url.strip().partition("://")
    if not found or scheme.lower() not in ("http", "https"):
        raise FetchError("bad_scheme")
    try:
        parsed = httpx.URL(url.strip()).copy_with(userinfo=b"", fragment=None)
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise FetchError("bad_url") from error
    if not parsed.host:
        raise FetchError("bad_url")
    return parsed


def is_public(address: str) -> bool:
    """Tell whether an address is one of the open internet, and none that stands for another kind."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner: list[Any] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        inner += [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        inner += [ipaddress.ip_address(ip.packed[-4:])] if ip in NAT64 else []
    return all(i.is_global and not i.is_multicast and i != AZURE_HOST for i in inner if i is not None)


def _try(url: str, policy: FetchPolicy) -> bytes:
    """Fetch once, through redirects."""
    until = time.monotonic() + policy.deadline
    try:
        target = parse_url(url)
        for _ in range(policy.max_hops + 1):
            body = _hop(target, policy, until)
            if isinstance(body, bytes):
                return body
            target = parse_url(str(body))
        raise FetchError("too_many_redirects")
    except httpcore.TimeoutException as error:
        raise FetchError("timeout") from error
    except (httpcore.NetworkError, httpcore.RemoteProtocolError) as error:
        raise FetchError("disconnected" if "disconnected" in str(error) else "protocol") from error
    except (httpcore.ProtocolError, UnicodeError, ValueError) as error:
        raise FetchError("protocol") from error


def _hop(target: httpx.URL, policy: FetchPolicy, until: float) -> bytes | httpx.URL:
    """Return the body at a URL, or where it sends us."""
    headers = [
        (b"Host", target.netloc),
        (b"User-Agent", USER_AGENT.encode()),
        (b"Accept", b"image/avif,image/webp,image/png,image/jpeg,image/*;q=0.8"),
        (b"Accept-Encoding", b"identity"),  # nothing to unpack, so nothing that unpacks to gigabytes
        (b"Connection", b"close"),
    ]
    where = httpcore.URL(
        scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path or b"/"
    )
    backend = _CheckedBackend(policy, until)
    with (
        httpcore.HTTPConnection(where.origin, ssl_context=_tls(), network_backend=backend) as connection,
        connection.stream("GET", where, headers=headers) as response,
    ):
        heads = Message()
        for name, value in response.headers:
            heads[name.decode("latin-1")] = value.decode("latin-1")
        if response.status in REDIRECTS and heads["Location"]:
            try:
                return target.join(heads["Location"].strip())
            except (httpx.InvalidURL, ValueError) as error:
                raise FetchError("bad_redirect") from error
        if response.status != 200:
            raise FetchError(f"http_{response.status}", _retry_after(heads["Retry-After"]))
        _check_headers(heads, policy)
        return _body(response.iter_stream(), policy.max_bytes)


def _check_headers(heads: Message, policy: FetchPolicy) -> None:
    from img2dataset.downloader import is_disallowed

    if is_disallowed(heads, policy.robots_agent, set(ROBOTS)):
        raise FetchError("robots")
    if (heads["Content-Encoding"] or "identity").strip().lower() not in ("identity", ""):
        raise FetchError("encoded_body")
    length = heads["Content-Length"] or "0"
    if length.isdecimal() and int(length) > policy.max_bytes:
        raise FetchError("too_large")


def _body(chunks: Iterable[bytes], most: int) -> bytes:
    body = bytearray()
    try:
        for chunk in chunks:
            body += chunk
            if len(body) > most:
                raise FetchError("too_large")
    except (httpcore.RemoteProtocolError, httpcore.NetworkError) as error:
        raise FetchError("truncated") from error
    if not body:
        raise FetchError("empty")
    return bytes(body)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, given as seconds or as a date."""
    from email.utils import parsedate_to_datetime

    if value is None:
        return None
    try:
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


@cache
def _tls() -> ssl.SSLContext:
    return httpcore.default_ssl_context()


def resolve(host: str, port: int, timeout: float) -> list[str]:
    """Return the addresses of a name, in the system's order.

    Raises:
        FetchError: no such name, or no answer in time (the system's own patience cannot be set).
    """
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout)
    if not answers:
        raise FetchError("timeout")
    if isinstance(answers[0], Exception):
        raise FetchError("dns") from answers[0]
    return list(dict.fromkeys(str(entry[4][0]) for entry in answers[0]))


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to public addresses only, and ends everything at the deadline."""

    def __init__(self, policy: FetchPolicy, until: float) -> None:
        self.policy, self.until, self.plain = policy, until, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        """Resolve, check, connect to what was checked."""
        if port not in self.policy.ports and not self.policy.private:
            raise FetchError("blocked_port")
        found = resolve(host, port, _left(self.until))
        addresses = [a for a in found if self.policy.private or is_public(a)]
        if not addresses:
            raise FetchError("blocked_address")
        for number, address in enumerate(addresses):
            share = _left(self.until) / (len(addresses) - number)
            try:
                return _Timed(self.plain.connect_tcp(address, port, share, local_address, socket_options), self.until)
            except httpcore.ConnectTimeout:
                if number == len(addresses) - 1:
                    raise
            except httpcore.ConnectError as error:
                if number == len(addresses) - 1:
                    refused = isinstance(error.__context__, ConnectionRefusedError)
                    raise FetchError("refused" if refused else "unreachable") from error
        raise AssertionError("the last address returns or raises")


class _Timed(httpcore.NetworkStream):
    """A stream whose every wait ends at the deadline."""

    def __init__(self, stream: httpcore.NetworkStream, until: float) -> None:
        self.stream, self.until = stream, until

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, _left(self.until))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, _left(self.until))

    def close(self) -> None:
        self.stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        try:
            return _Timed(self.stream.start_tls(ssl_context, server_hostname, _left(self.until)), self.until)
        except httpcore.ConnectError as error:
            raise FetchError("tls") from error

    def get_extra_info(self, info: str) -> Any:
        return self.stream.get_extra_info(info)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("deadline")
    return left
