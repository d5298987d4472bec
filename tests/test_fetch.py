"""One URL: the downloader catalogue against a real server that misbehaves."""

from __future__ import annotations

import random
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import img2dataset.downloader  # noqa: F401 - its import must not count as a slow server
import pytest
from misbehaving import JPEG, Server, self_signed, serving

from git_model.download.fetch import fetch, parse_url
from git_model.download.network import FetchError, FetchPolicy, is_public, resolve

POLICY = FetchPolicy(deadline=2.0, backoff=0.01, max_bytes=10**6, private=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as one:
        yield one


def reason(url: str, policy: FetchPolicy = POLICY) -> tuple[str, int]:
    with pytest.raises(FetchError) as caught:
        fetch(url, policy)
    return caught.value.reason, caught.value.tries


def test_a_picture(server: Server) -> None:
    assert fetch(f"{server.url}/same/a", POLICY) == (JPEG, 1)
    asked = {name.lower(): value for name, value in server.headers["/same/a"].items()}
    assert asked["accept-encoding"] == "identity"
    assert asked["host"] == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("status/404", ("http_404", 1)),
        ("status/410", ("http_410", 1)),
        ("status/403", ("http_403", 1)),
        ("status/204", ("http_204", 1)),
        ("status/503", ("http_503", 4)),
        ("sometimes/500-500-500-500", ("http_500", 4)),
        ("short", ("truncated", 4)),
        ("big", ("too_large", 1)),
        ("endless", ("too_large", 1)),
        ("endlesshead", ("protocol", 1)),
        ("empty", ("empty", 1)),
        ("gzip", ("encoded_body", 1)),
        ("loop", ("too_many_redirects", 1)),
        ("to/to/to/to/to/to/to/same", ("too_many_redirects", 1)),
        ("nowhere", ("http_302", 1)),
        ("robots/noai", ("robots", 1)),
        ("robots/all,NoIndex", ("robots", 1)),
        ("drop", ("disconnected", 4)),
        ("nonsense", ("protocol", 1)),
        ("to/file:///etc/passwd", ("bad_scheme", 1)),
        ("to/ftp://example.org/x.jpg", ("bad_scheme", 1)),
    ],
)
def test_what_is_refused(server: Server, path: str, wanted: tuple[str, int]) -> None:
    assert reason(f"{server.url}/{path}") == wanted


@pytest.mark.parametrize(
    ("path", "tries"),
    [
        ("sometimes/500-500-200", 3),
        ("sometimes/503-200", 2),
        ("sometimes/429-200", 2),
        ("shortonce/1", 2),
        ("to/same", 1),
        ("to/to/to/to/to/same", 1),
        ("robots/somebot_noai", 1),
    ],
)
def test_what_comes_in_the_end(server: Server, path: str, tries: int) -> None:
    assert fetch(f"{server.url}/{path}", POLICY) == (JPEG, tries)


def test_robots_may_name_us(server: Server) -> None:
    ours = replace(POLICY, robots_agent="somebot")
    assert reason(f"{server.url}/robots/somebot_noai", ours) == ("robots", 1)


@pytest.mark.parametrize("path", ["hang", "slow", "slowhead"])
def test_the_deadline_is_of_the_whole_try(server: Server, path: str) -> None:
    started = time.monotonic()
    assert reason(f"{server.url}/{path}", replace(POLICY, deadline=0.5)) == ("timeout", 1)
    assert time.monotonic() - started < 3


def test_retry_after_is_heard_and_capped(server: Server) -> None:
    started = time.monotonic()
    assert fetch(f"{server.url}/busy/1/x", POLICY) == (JPEG, 2)
    assert time.monotonic() - started >= 1
    started = time.monotonic()
    assert fetch(f"{server.url}/busy/3600/x", replace(POLICY, max_wait=0.2)) == (JPEG, 2)
    assert time.monotonic() - started < 3


def test_a_declared_length_is_believed(server: Server) -> None:
    """What comes after it is not read; the check of the picture finds it cut."""
    assert fetch(f"{server.url}/long", POLICY) == (JPEG[:100], 1)


def test_compressed_bodies_cost_nothing(server: Server) -> None:
    tracemalloc.start()
    reason(f"{server.url}/gzip/again")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert reason(f"http://127.0.0.1:{port}/x") == ("refused", 2)


def test_a_certificate_nobody_vouches_for(tmp_path: Path) -> None:
    with serving(self_signed(tmp_path)) as server:
        assert reason(f"{server.url}/same") == ("tls", 1)
        assert not server.asked


def test_no_such_name() -> None:
    assert reason("http://no-such-host.invalid/x.jpg") == ("dns", 1)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/a.jpg",
        "gopher://example.org/1",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "~://dstormer.example/a.jpg",
        "//example.org/a.jpg",
        "example.org/a.jpg",
        "",
    ],
)
def test_schemes(url: str) -> None:
    assert reason(url) == ("bad_scheme", 1)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a.jpg",
        "http://0177.0.0.1/",
        "http://xn--a.example.com/x.jpg",
        "http://exa\x00mple.org/",
        "http://[::1",
    ],
)
def test_urls(url: str) -> None:
    assert reason(url) == ("bad_url", 1)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0.0.0.0",
        "localhost",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "168.63.129.16",
        "224.0.0.1",
        "255.255.255.255",
        "[::1]",
        "[::]",
        "[fe80::1]",
        "[fc00::1]",
        "[fd00:ec2::254]",
        "[::ffff:127.0.0.1]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "[ff02::1]",
        "[fec0::1]",
        "[::7f00:1]",
        "[::ffff:0:7f00:1]",
        "[64:ff9b:1::7f00:1]",
        "[5f00::1]",
        "[3fff::1]",
        "[2001:db8::1]",
    ],
)
def test_addresses_that_are_not_the_internet(host: str) -> None:
    assert reason(f"http://{host}/x.jpg", replace(POLICY, private=False)) == ("blocked_address", 1)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_addresses_of_the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("denied", ["127.0.0.1", "127.0.0.1/same/denied.jpg"])
def test_the_deny_list_holds_at_every_hop(server: Server, denied: str) -> None:
    policy = replace(POLICY, denied=frozenset([denied]))
    for url in (f"{server.url}/same/denied.jpg", f"http://user@127.0.0.1:{server.port}/same/denied.jpg"):
        assert reason(url, policy) == ("denied", 1)
    hops = replace(POLICY, denied=frozenset(["127.0.0.1/same/inner.jpg"]))
    assert reason(f"{server.url}/to/same/inner.jpg", hops) == ("denied", 1)
    assert not any("denied" in path or path == "/same/inner.jpg" for path in server.asked)


def test_a_location_in_utf8(server: Server) -> None:
    assert fetch(f"{server.url}/utf8/x", POLICY) == (JPEG, 1)
    assert "/same/%C3%B6.jpg" in server.asked


def test_junk_is_bad_and_nothing_else() -> None:
    rng = random.Random(0)
    pieces = [*"[]:@/%a1 ?#", "http://", "https://", "xn--", "\u2122", "..", "\u0130", "\x00"]
    for _ in range(5000):
        url = "http://" + "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9)))
        with suppress(FetchError):  # the only error that gets out
            assert parse_url(url).host


def test_other_ports() -> None:
    assert reason("http://example.org:22/x", replace(POLICY, private=False)) == ("blocked_port", 1)


def test_a_redirect_inwards_is_blocked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first hop is let through as a public name would be; the second is checked like the first."""
    real = socket.getaddrinfo

    def named(host: Any, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host == "public.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", named)
    once = iter([True])
    monkeypatch.setattr("git_model.download.network.is_public", lambda address: next(once, False))
    policy = replace(POLICY, private=False, ports=(server.port,))
    inward = f"http://127.0.0.1:{server.port}/same/secret"
    assert reason(f"http://public.example:{server.port}/to/{inward}", policy) == ("blocked_address", 1)
    assert "/same/secret" not in server.asked


def test_a_name_is_asked_for_once_a_hop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rebinding: the second answer, a private one, is never asked for."""
    answers = iter(["127.0.0.1", "10.0.0.1", "10.0.0.1"])
    asked = []

    real = socket.getaddrinfo

    def named(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
        if host == "127.0.0.1":  # connecting to what was checked
            return real(host, port, *rest, **more)
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", named)
    monkeypatch.setattr("git_model.download.network.is_public", lambda address: address == "127.0.0.1")
    policy = replace(POLICY, private=False, ports=(server.port,))
    assert fetch(f"http://turning.example:{server.port}/same/r", policy) == (JPEG, 1)
    assert asked == ["turning.example"]


def test_of_several_addresses_the_public_ones(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, server.port)) for a in ("10.9.9.9", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    monkeypatch.setattr("git_model.download.network.is_public", lambda address: address == "127.0.0.1")
    policy = replace(POLICY, private=False, ports=(server.port,))
    assert fetch(f"http://two.example:{server.port}/same/two", policy) == (JPEG, 1)


def test_a_slow_resolver_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
    started = time.monotonic()
    with pytest.raises(FetchError, match="timeout"):
        resolve("slow.example", 80, 0.3)
    assert time.monotonic() - started < 2


def test_credentials_are_dropped(server: Server) -> None:
    fetch(f"http://user:secret@127.0.0.1:{server.port}/same/login", POLICY)
    assert not any("secret" in value for value in server.headers["/same/login"].values())
    assert "secret" not in str(parse_url("http://user:secret@example.org/"))


def test_a_proxy_of_the_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert fetch(f"{server.url}/same/direct", POLICY) == (JPEG, 1)


@pytest.mark.parametrize(
    "path", ["same/with space.jpg", "same/öl.jpg", "same/a%20b.jpg", "same/x?q=1&r=[2]", "same/a#b"]
)
def test_addresses_as_people_type_them(server: Server, path: str) -> None:
    assert fetch(f"{server.url}/{path}", POLICY) == (JPEG, 1)
