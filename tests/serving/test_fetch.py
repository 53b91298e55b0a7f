"""Fetching images by their addresses, from a local TLS server, with a resolver that may lie.

The certificates beside are for these tests alone; they are of hosts that can never exist.
"""

import asyncio
import ssl
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from live import captions_of, check_problem, running

from exports.registry import Registry
from serving.errors import FetchFailed, ParameterError, QueueFull
from serving.fetch import Fetcher, is_public

CERTIFICATES = Path(__file__).parent / "certificates"
PHOTO = b"the bytes of a photograph"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 25\r\n\r\n" + PHOTO


class Site:
    """A server in a thread that answers each connection by the same bytes, then by silence."""

    def __init__(self, *parts, pause=0.0, tls="images.test"):
        self.parts, self.pause, self.tls = parts, pause, tls
        self.requests, self.connections = [], 0
        self.port = 0

    async def _answer(self, reader, writer):
        self.connections += 1
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            for part in self.parts:
                await asyncio.sleep(self.pause)
                writer.write(part)
                await writer.drain()
            await reader.read()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve(self, started, stop):
        context = None
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATES / f"{self.tls}.pem")
        async with await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=context) as server:
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await asyncio.to_thread(stop.wait)
            server.close()

    @contextmanager
    def up(self):
        started, stop = threading.Event(), threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve(started, stop)))
        thread.start()
        assert started.wait(30)
        try:
            yield self
        finally:
            stop.set()
            thread.join(30)


class Resolver:
    """Gives each of its answers once, the last one for ever, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    async def __call__(self, host, port):
        self.asked.append(host)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def trusting(name="images.test"):
    return ssl.create_default_context(cafile=CERTIFICATES / f"{name}.pem")


def fetch(site, *, resolver=None, private=True, limit=1000, seconds=20.0, take=None, path="/a.jpg"):
    """Fetches from a site that stands, for the resolver, where it says."""
    fetcher = Fetcher(
        [f"images.test:{site.port}"],
        private=private,
        resolve=resolver or Resolver(["127.0.0.1"]),
        context=trusting(),
    )
    url = f"https://images.test:{site.port}{path}"
    return asyncio.run(fetcher.fetch([url], take or (lambda _: None), limit=limit, seconds=seconds))


def test_an_image_is_fetched_by_name_and_certificate():
    taken = []
    with Site(OK).up() as site:
        assert fetch(site, take=taken.append, path="/a.jpg?size=1#top") == [PHOTO]
    [request] = site.requests
    assert request.startswith(b"GET /a.jpg?size=1 HTTP/1.1\r\n")
    assert f"\r\nHost: images.test:{site.port}\r\n".encode() in request
    assert sum(taken) == len(PHOTO)


def test_a_body_without_a_length_or_in_chunks_is_read():
    for answer in (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n19\r\n" + PHOTO + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    ):
        with Site(answer).up() as site:
            assert fetch(site) == [PHOTO]


def test_a_wrong_certificate_is_refused():
    with Site(OK, tls="other.test").up() as site, pytest.raises(FetchFailed, match="not safely"):
        fetch(site)
    assert site.requests == []


def test_a_server_without_tls_is_refused():
    plain = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with Site(plain, tls=None).up() as site, pytest.raises(FetchFailed):
        fetch(site, seconds=1)
    assert not any(b"GET" in request for request in site.requests)


_PRIVATE = """
127.0.0.1 127.9.9.9 0.0.0.0 10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254
100.64.0.1 192.0.0.1 192.0.2.1 198.18.0.1 203.0.113.1 192.88.99.1 224.0.0.1 239.1.1.1 240.0.0.1
255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 64:ff9b::7f00:1
64:ff9b:1::1 2002:7f00:1:: 2001::1 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1
ff02::1 100::1 localhost 8.8.8.8.
"""


def test_public_is_what_is_public():
    assert [address for address in _PRIVATE.split() if is_public(address)] == []
    for address in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1"):
        assert is_public(address)


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::ffff:127.0.0.1"], []]
)
def test_a_name_of_a_private_address_is_refused_without_a_connection(found):
    with Site(OK).up() as site:
        with pytest.raises(FetchFailed, match="not at a public address") as refusal:
            fetch(site, private=False, resolver=Resolver(found))
        assert site.connections == 0
    assert "127.0.0.1" not in refusal.value.detail


def test_a_name_that_changes_its_mind_changes_nothing(monkeypatch):
    """DNS rebinding: the address that was checked is the address that is connected to."""
    connected = []

    async def connect(host, port, **options):
        connected.append((host, options["server_hostname"]))
        raise ConnectionRefusedError

    monkeypatch.setattr("serving.fetch.asyncio.open_connection", connect)
    resolver = Resolver(["8.8.8.8"], ["127.0.0.1"])
    fetcher = Fetcher(["images.test"], private=False, resolve=resolver)
    with pytest.raises(FetchFailed, match="cannot be reached"):
        asyncio.run(fetcher.fetch(["https://images.test/"], lambda _: None, limit=9, seconds=9))
    assert connected == [("8.8.8.8", "images.test")]
    assert resolver.asked == ["images.test"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status):
    with Site(PHOTO).up() as target:
        location = f"https://images.test:{target.port}/secret"
        answer = f"HTTP/1.1 {status} X\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
        words = "redirects are not followed"
        with Site(answer.encode()).up() as site, pytest.raises(FetchFailed, match=words):
            fetch(site)
    assert target.connections == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n", "more bytes"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"x" * 200_000, "more bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"C8\r\n" + b"x" * 200 + b"\r\n"
         + b"FFFF\r\n" + b"x" * 65535, "more bytes"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "404"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", "encoding"),
        (b"HTTP/1.1 200 OK\r\n" + b"X-A: aaaaaaaa\r\n" * 5000, "cannot be reached"),
        (b"hello\r\n\r\n", "cannot be reached"),
    ],
)  # fmt: skip
def test_a_bad_answer_is_refused(answer, words):
    with Site(answer).up() as site, pytest.raises(FetchFailed, match=words):
        fetch(site)


def test_a_slow_body_is_cut_off():
    slow = Site(OK[:-5], *(b"x",) * 5, pause=0.3)
    with slow.up() as site, pytest.raises(FetchFailed, match="in time"):
        fetch(site, seconds=0.8)


def test_what_is_fetched_counts_as_held():
    def full(_):
        raise QueueFull("no room", retry_after=1)

    with Site(OK).up() as site, pytest.raises(QueueFull):
        fetch(site, take=full)


@pytest.mark.parametrize(
    "url",
    [
        "https://other.test/a",
        "https://images.test.evil.test/",
        "https://evil.images.test/",
        "https://images.test./",
        "https://images.test:8443/",
        "https://images.test@evil.test/",
        "https://user:word@images.test/",
        "https://images.test\\@evil.test/",
        "https://images.test\r\nX: y/",
        "https://images.test/ HTTP/1.1",
        "https://\u0131mages.test/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[/",
        "https://images.test:99999/",
        "https://images.test:x/",
        "http://images.test/",
        "ftp://images.test/",
        "file:///etc/passwd",
        "data:image/png;base64,AA==",
        "//images.test/",
        "images.test",
        "",
        "https://images.test/" + "a" * 3000,
    ],
)
def test_an_address_that_is_not_on_the_list_is_refused_before_it_is_resolved(url):
    resolver = Resolver(["8.8.8.8"])
    fetcher = Fetcher(["images.test"], private=False, resolve=resolver)
    with pytest.raises(ParameterError):
        asyncio.run(fetcher.fetch([url], lambda _: None, limit=9, seconds=1))
    assert resolver.asked == []


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    return root


def test_a_server_fetches_nothing_unless_it_is_told_to(root, photos):
    with Site(b"", tls=None).up() as site, running(root) as live:
        url = f"http://127.0.0.1:{site.port}/a.png"
        refused = live.client.post("/v1/captions", json={"urls": [url]})
        assert "fetches nothing" in check_problem(refused, 422)["detail"]
    assert site.connections == 0


def test_a_server_that_may_captions_what_it_fetched(root, photos):
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(photos[0]) + photos[0]
    with Site(answer, tls=None).up() as site:
        allowed = {"fetch_hosts": (f"127.0.0.1:{site.port}",), "fetch_private": True}
        with running(root, max_images=2, **allowed) as live:
            url = f"http://127.0.0.1:{site.port}/a.png"
            fetched = captions_of(live.client.post("/v1/captions", json={"urls": [url]}))
            assert fetched == captions_of(live.caption(photos[0]))
            three = live.client.post("/v1/captions", json={"urls": [url] * 3})
            check_problem(three, 422)
