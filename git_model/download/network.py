"""Where a name becomes an address: only those of the open internet, and everything under one deadline.

httpcore's network backend is that place: a name is resolved once, and what was checked is what is connected to.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpcore

AZURE_HOST = ipaddress.ip_address("168.63.129.16")  # a cloud's own service on a public address
NAT64 = ipaddress.ip_network("64:ff9b::/96")
UNICAST6 = ipaddress.ip_network("2000::/3")  # all that is given out of IPv6; the rest only looks like addresses
DOCUMENTS6 = ipaddress.ip_network("3fff::/20")


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
        robots_agent: name by which X-Robots-Tag may address us, in lower case; sent with each request.
        denied: hosts, and URLs without their scheme, that are not asked; in lower case.
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
    denied: frozenset[str] = frozenset()
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


def is_public(address: str) -> bool:
    """Tell whether an address is one of the open internet, and none that stands for another kind."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and ip != AZURE_HOST
    inside = ip.ipv4_mapped or (ipaddress.IPv4Address(ip.packed[-4:]) if ip in NAT64 else None)
    if inside is not None:
        return is_public(str(inside))
    carried = [ip.sixtofour, *(ip.teredo or ())]
    plain = ip in UNICAST6 and ip not in DOCUMENTS6 and ip.is_global
    return plain and all(is_public(str(i)) for i in carried if i is not None)


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


class CheckedBackend(httpcore.NetworkBackend):
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
