"""What a connection takes before the app has looked at it, and how its answers leave."""

import asyncio
import socket
import threading
import time
from contextlib import suppress

import pytest
from fake_transport import Sent
from uvicorn.server import ServerState

from serving import connection
from serving.connection import Connection
from serving.local import web_server
from serving.settings import Settings


async def app(scope, receive, send):
    assert scope["type"] == "http"
    while scope["method"] == "POST" and (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    server = web_server(app, Settings(port=port))
    server.config.lifespan = "off"
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        thread.join(0.005)
    yield port
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


HEAD = b"GET / HTTP/1.1\r\nHost: x\r\nX: "
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"


@pytest.mark.parametrize(
    ("begin", "unit"),
    [
        (HEAD, b"X-A: aaaaaaaa\r\n"),
        (HEAD, b"a"),
        (b"GET /", b"a"),
        (CHUNKED + b"0\r\n", b"X-A: aaaaaaaa\r\n"),
        (CHUNKED + b"5;a=", b"a"),
    ],
)
def test_what_has_no_end_is_cut_off(port, begin, unit):
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(begin)
        try:
            while sent < 20_000_000:
                sent += one.send(unit * (64_000 // len(unit)))
        except OSError:
            pass
        try:
            answer = one.recv(100)
        except OSError:
            answer = b""
    assert sent < 20_000_000
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_long_body_is_no_head(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        for _ in range(3):
            one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n")
            one.sendall(bytes(3_000_000))
            assert one.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_a_head_that_comes_too_slowly_is_not_waited_for(port, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")
        one.sendall(b"GET /")
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() < began + 10:
                one.sendall(b"a")
                with suppress(TimeoutError):
                    one.settimeout(0.05)
                    if not one.recv(100):
                        break
    assert 0.2 < time.monotonic() - began < 5


def test_a_slow_body_is_the_apps_matter(port, monkeypatch):
    monkeypatch.setattr(connection, "HEAD_S", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\na")
        time.sleep(0.5)
        one.sendall(b"b")
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")


def on_a_connection(head, then):
    """Returns a transport on which a request came, after `then` was awaited with it."""

    async def run():
        sent = Sent()
        one = Connection(web_server(app, Settings()).config, ServerState(), {})
        one.connection_made(sent)
        for _ in range(2):
            one.data_received(head)
            await then(sent)
        one.connection_lost(None)
        return sent

    return asyncio.run(run())


@pytest.mark.parametrize("how", [b"", b"Connection: close\r\n"])
def test_an_answer_leaves_whole(how):
    sent = on_a_connection(
        b"GET / HTTP/1.1\r\nHost: x\r\n" + how + b"\r\n", lambda _: asyncio.sleep(0.02)
    )
    assert [write[:15] for write in sent.writes] == [b"HTTP/1.1 200 OK"] * (1 if how else 2)
    assert all(write.endswith(b"ok\r\n0\r\n\r\n") for write in sent.writes)
    assert sent.closed_after == len(sent.writes)


def test_nothing_is_sent_to_a_client_that_has_gone():
    async def gone(sent):
        await asyncio.sleep(0)  # the app has answered, in this turn
        sent.close()
        await asyncio.sleep(0.02)

    assert on_a_connection(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", gone).writes == []


def test_who_would_speak_otherwise_is_answered_in_http(port):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert one.recv(100).startswith(b"HTTP/1.1 200 ")
