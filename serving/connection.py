"""A client's connection: what never ends is cut off, and an answer leaves whole.

uvicorn by llhttp (httptools), with what that leaves open. Nothing there bounds the bytes or the
seconds of a head, nor the bytes behind a body's last piece. And head and body of an answer are sent
one after the other: a process that is killed between the two leaves half an answer with HAProxy,
which cannot ask another replica for it any more.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 15.0
_UNFINISHED = 64 * 1024  # bytes


class Connection(HttpToolsProtocol):
    """HTTP/1.1 with one client, for uvicorn's `http`."""

    _unfinished = 0  # bytes since a head or a piece of a body ended
    _head_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Waits for the first head."""
        super().connection_made(transport)
        self.transport = _Whole(transport, self.loop)  # type: ignore[assignment]
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits for nothing any more."""
        self._has_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads on, and refuses what has become too long without an end."""
        self._unfinished += len(data)
        before = self._unfinished
        super().data_received(data)
        # The same as before: nothing has ended within this data.
        if before == self._unfinished > _UNFINISHED and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        """Waits for the rest of a head."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Has a head."""
        self._has_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Has a piece of a body."""
        self._unfinished = 0
        super().on_body(body)

    def _should_upgrade(self) -> bool:
        return False  # whatever else a client would speak, it is answered in HTTP

    def _unsupported_upgrade_warning(self) -> None:
        pass

    def _await_head(self) -> None:
        if self._head_late is None:
            self._head_late = self.loop.call_later(HEAD_S, lambda: self.transport.close())

    def _has_head(self) -> None:
        self._unfinished = 0
        if self._head_late is not None:
            self._head_late.cancel()
            self._head_late = None


class _Whole:
    """A transport that sends at once what is written in one turn of the event loop."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._send)
        self._held.append(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        held, self._held = self._held, []
        if held and not self._transport.is_closing():  # the client may have gone since
            self._transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
