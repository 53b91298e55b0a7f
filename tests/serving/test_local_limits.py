"""The plain process: what uvicorn itself takes of a head before anybody has looked at it."""

import socket
import threading

import pytest

from serving.local import web_server
from serving.settings import Settings


async def app(scope, receive, send):
    assert scope["type"] == "http"
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


@pytest.mark.parametrize("unit", [b"X-A: aaaaaaaa\r\n", b"a"])
def test_a_head_without_end_is_cut_off(port, unit):
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
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
