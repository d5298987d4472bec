"""One URL -> its bytes, or a reason: redirects one by one, a deadline and a byte cap, retries of what may pass."""

from __future__ import annotations

import random
import re
import ssl
import time
from collections.abc import Iterable
from email.message import Message
from functools import cache

import httpcore
import httpx

from git_model.download.network import CheckedBackend, FetchError, FetchPolicy

USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
ROBOTS = ("noai", "noimageai", "noindex", "noimageindex")  # of X-Robots-Tag, as img2dataset honours them
REDIRECTS = (301, 302, 303, 307, 308)
# how often a reason is tried again; "many" is the policy's figure, everything else is final
MANY = ("http_408", "http_429", "http_500", "http_502", "http_503", "http_504", "truncated", "disconnected")
ONCE = ("refused", "unreachable")


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
        if parsed.host:  # decoding it may fail, too
            return parsed
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise FetchError("bad_url") from error
    raise FetchError("bad_url")


def is_denied(target: httpx.URL, denied: frozenset[str]) -> bool:
    """Tell whether a host, or a URL whatever its scheme and port, is on a list of `bare_url`s."""
    if not denied:
        return False
    host = target.host.casefold()
    return host in denied or bare_url(f"//{host}{target.raw_path.decode('ascii')}") in denied


def bare_url(url: str) -> str:
    """Return a URL, or what is left of one, without scheme and credentials, in lower case."""
    return re.sub(r"^[^/]*//", "", url.strip()).rpartition("@")[2].casefold()


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
    if is_denied(target, policy.denied):
        raise FetchError("denied")
    agent = USER_AGENT + (f" (compatible; {policy.robots_agent})" if policy.robots_agent else "")
    headers = [
        (b"Host", target.netloc),
        (b"User-Agent", agent.encode("ascii", "replace")),
        (b"Accept", b"image/avif,image/webp,image/png,image/jpeg,image/*;q=0.8"),
        (b"Accept-Encoding", b"identity"),  # nothing to unpack, so nothing that unpacks to gigabytes
        (b"Connection", b"close"),
    ]
    where = httpcore.URL(
        scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path or b"/"
    )
    backend = CheckedBackend(policy, until)
    with (
        httpcore.HTTPConnection(where.origin, ssl_context=_tls(), network_backend=backend) as connection,
        connection.stream("GET", where, headers=headers) as response,
    ):
        heads = Message()
        for name, value in response.headers:
            heads[name.decode("latin-1")] = _text(value)
        if response.status in REDIRECTS and heads["Location"]:
            try:
                return target.join(heads["Location"].strip())
            except (httpx.InvalidURL, ValueError) as error:
                raise FetchError("bad_redirect") from error
        if response.status != 200:
            raise FetchError(f"http_{response.status}", _retry_after(heads["Retry-After"]))
        _check_headers(heads, policy)
        return _body(response.iter_stream(), policy.max_bytes)


def _text(value: bytes) -> str:
    """Return a header's text: ASCII by the standard, UTF-8 by many servers' habit."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _check_headers(heads: Message, policy: FetchPolicy) -> None:
    if "X-Robots-Tag" in heads:
        from img2dataset.downloader import is_disallowed  # seconds to import, outside of the engine

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
