"""Images from addresses that a request names: off by default, and then from a few hosts alone.

Whoever lets strangers choose what a server asks for lends them its place in the network. So: exact
hosts of a list; https; the name is resolved here, once, and the connection goes to the address that
was checked, whatever the name means a moment later; nothing but public addresses; no redirects; as
many bytes and seconds as the settings say; no proxy of the environment.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

import h11

from serving.errors import FetchFailed, ParameterError
from serving.limits import Take

_URL = re.compile(r"[!#$%&'()*+,./0-9:;=?@A-Z\[\]_a-z~-]{1,2048}")
_PORTS = {"https": 443, "http": 80}
_MAX_HEAD_BYTES = 16 * 1024
_CHUNK = 64 * 1024
# IPv6 addresses that stand for IPv4 ones (translated, 6to4, Teredo) or for none in particular.
_EMBEDDING = tuple(
    IPv6Network(text)
    for text in (
        "::/96",
        "::ffff:0:0/96",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "2001::/32",
        "2002::/16",
    )
)
_GLOBAL_V6 = IPv6Network("2000::/3")
_SPECIAL_V4 = (IPv4Network("192.0.0.0/24"), IPv4Network("192.88.99.0/24"))

Resolve = Callable[[str, int], Awaitable[list[str]]]


class _Target(NamedTuple):
    """What an address says."""

    host: str
    port: int
    path: str
    is_https: bool


async def resolve(host: str, port: int) -> list[str]:
    """Returns the IP addresses of a host."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Fetcher:
    """Fetches from the hosts of a list."""

    def __init__(
        self,
        hosts: Collection[str],
        *,
        private: bool,
        resolve: Resolve = resolve,
        context: ssl.SSLContext | None = None,
    ) -> None:
        """Fetches nothing yet.

        Args:
            hosts: `host`, or `host:port` where the port is not the usual one; empty: none at all.
            private: Whether http and addresses that are not public will do.
            resolve: Finds the IP addresses of a host.
            context: How certificates are checked; by default, by those of the system.
        """
        self._hosts = frozenset(host.lower() for host in hosts)
        self._private = private
        self._resolve = resolve
        self._context = context

    async def fetch(
        self, urls: list[str], take: Take, *, limit: int, seconds: float
    ) -> list[bytes]:
        """Returns what stands at each address.

        Args:
            urls: Addresses.
            take: Is told of the bytes as they come, and may raise.
            limit: Bytes of all together.
            seconds: For all together.

        Raises:
            ParameterError: An address is not allowed here.
            FetchFailed: Nothing came, or too much, or not in time.
        """
        targets = [self._target(url) for url in urls]
        bodies: list[bytes] = []
        for target in targets:
            try:
                async with asyncio.timeout(seconds):
                    started = asyncio.get_running_loop().time()
                    bodies.append(await self._fetch(target, take, limit))
            except TimeoutError as error:
                raise FetchFailed(f"{target.host} did not send the image in time.") from error
            # The certificate's, the resolver's, the network's; UnicodeError is a resolver's too.
            except (OSError, h11.RemoteProtocolError, UnicodeError) as error:
                raise FetchFailed(f"{target.host} cannot be reached, or not safely.") from error
            seconds -= asyncio.get_running_loop().time() - started
            limit -= len(bodies[-1])
        return bodies

    def _target(self, url: str) -> _Target:
        if not self._hosts:
            raise ParameterError("This server fetches nothing; send the files in `images`.")
        try:
            parts = urlsplit(url) if _URL.fullmatch(url) else None
            port = parts.port if parts else None
        except ValueError:  # a port, or brackets, that make no sense
            parts = port = None
        if parts is None or parts.hostname is None or parts.username is not None:
            raise ParameterError("An address in `urls` is none: https://HOST/PATH, in ASCII.")
        schemes = ("https", "http") if self._private else ("https",)
        if parts.scheme not in schemes:
            raise ParameterError(f"An address in `urls` must begin with {schemes[0]}://.")
        usual = _PORTS[parts.scheme]
        host = parts.hostname
        name = host if port in (None, usual) else f"{host}:{port}"
        if name not in self._hosts:
            raise ParameterError(f"This server fetches nothing from {name[:100]}.")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Target(host, port or usual, path, parts.scheme == "https")

    async def _fetch(self, target: _Target, take: Take, limit: int) -> bytes:
        address = await self._address(target)
        context = (self._context or _context()) if target.is_https else None
        reader, writer = await asyncio.open_connection(
            address,
            target.port,
            ssl=context,
            server_hostname=target.host if context else None,
            limit=_CHUNK,
        )
        try:
            writer.write(_request(target))
            return await _body(reader, target, take, limit)
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    async def _address(self, target: _Target) -> str:
        """Returns the address to connect to; if one of a name's is not allowed, none is."""
        found = await self._resolve(target.host, target.port)
        if not found or not (self._private or all(map(is_public, found))):
            raise FetchFailed(f"{target.host} is not at a public address.")
        return found[0]


def is_public(text: str) -> bool:
    """Returns whether an address is one of the public Internet, and of a single machine."""
    address: IPv4Address | IPv6Address
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _SPECIAL_V4)
    return address in _GLOBAL_V6 and not any(address in network for network in _EMBEDDING)


@cache
def _context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _request(target: _Target) -> bytes:
    usual = _PORTS["https" if target.is_https else "http"]
    host = f"[{target.host}]" if ":" in target.host else target.host
    return (
        f"GET {target.path} HTTP/1.1\r\n"
        f"Host: {host if target.port == usual else f'{host}:{target.port}'}\r\n"
        "Accept: image/*\r\nAccept-Encoding: identity\r\nUser-Agent: cutline\r\n"
        "Connection: close\r\n\r\n"
    ).encode("ascii")


async def _body(reader: asyncio.StreamReader, target: _Target, take: Take, limit: int) -> bytes:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
    # h11 reads an answer only to what it was told was asked.
    connection.send(h11.Request(method="GET", target=target.path, headers=[("Host", target.host)]))
    connection.send(h11.EndOfMessage())
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_CHUNK))
        elif isinstance(event, h11.Response):
            _check_head(event, target, limit)
        elif isinstance(event, h11.Data):
            if len(body) + len(event.data) > limit:
                raise _too_large(target)
            take(len(event.data))
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)


def _check_head(response: h11.Response, target: _Target, limit: int) -> None:
    if response.status_code != 200:
        moved = ", and redirects are not followed" if 300 <= response.status_code < 400 else ""
        raise FetchFailed(f"{target.host} answered {response.status_code}{moved}.")
    headers = dict(response.headers)
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise FetchFailed(f"{target.host} sent the image in an encoding that was not asked for.")
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(target)


def _too_large(target: _Target) -> FetchFailed:
    return FetchFailed(f"{target.host} sent more bytes than a request may have here.")
