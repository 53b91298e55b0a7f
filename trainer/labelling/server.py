"""The labelling page over HTTP, for the browser of this machine alone.

It listens on 127.0.0.1. A page of another site that the same browser shows can reach that too, so
requests must name this server (Host: no DNS rebinding) and come from its own page (Origin,
Sec-Fetch-Site). Photographs are served by number, re-encoded, never by path.

    GET  /                            the page
    GET  /api/next?tab=T[&beyond=1]   a photograph to label, leased to the tab
    GET  /api/photos/N?tab=T          that photograph
    GET  /api/status?tab=T[&number=N] progress, training, and a photograph's proposals
    POST /api/photos/N                an answer; 409 where it has not seen the latest one
    POST /api/release                 the tab is closed
    GET  /photos/N                    its pixels, JPEG
"""

import io
import json
import logging
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from PIL import Image
from pydantic import ValidationError

from trainer.errors import DataError
from trainer.labelling.refits import Refits
from trainer.labelling.replies import AnswerReply, Refused, ReleaseReply, Reply
from trainer.labelling.session import Session
from trainer.photos import load_thumbnail

HOST = "127.0.0.1"
MAX_BODY = 64 * 1024
_LONG_SIDE = 1600  # pixels: sharp on a large screen, quick to send
_QUALITY = 90
_TIMEOUT_S = 30.0  # for a client that says nothing more
_PHOTO = re.compile(r"/(api/)?photos/([0-9]{1,9})")

logger = logging.getLogger(__name__)

_R = TypeVar("_R", bound=Reply)


class LabelServer(ThreadingHTTPServer):
    """Serves a session.

    Args:
        session: What is labelled.
        refits: Training beside it, if any.
        port: 0 takes any that is free.

    Raises:
        DataError: The port is taken.
    """

    daemon_threads = True

    def __init__(self, session: Session, refits: Refits | None = None, *, port: int = 0) -> None:
        self.session = session
        self.refits = refits
        self.run = secrets.token_hex(8)
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise DataError(
                f"port {port} cannot be used ({error.strerror}); name another, or port=0 for any"
            ) from None
        self.origins = {f"http://{name}:{self.server_port}" for name in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keeps silent about browsers that went away."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            logger.exception("a request failed")


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    protocol_version = "HTTP/1.1"
    server_version = "cutline"
    sys_version = ""
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        """Answers a GET."""
        self._respond(self._get)

    def do_POST(self) -> None:
        """Answers a POST."""
        self._respond(self._post)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """Logs a request."""
        logger.debug(format, *args)

    def _respond(self, work: Callable[[], None]) -> None:
        try:
            self._check_sender()
            work()
        except Refused as error:
            self.close_connection = True  # its body may not have been read
            self._send_json(error.status, {"error": str(error)})
        except DataError as error:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": str(error)})

    def _check_sender(self) -> None:
        origins = self.server.origins
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or f"http://{hosts[0]}" not in origins:
            raise Refused(HTTPStatus.FORBIDDEN, "this page is for the browser of its own machine")
        origin = self.headers.get("Origin")
        foreign = origin not in origins and (origin is not None or self.command != "GET")
        site = self.headers.get("Sec-Fetch-Site", "same-origin")
        if foreign or site not in ("same-origin", "none"):
            raise Refused(HTTPStatus.FORBIDDEN, "another site's page asks; that is refused")

    def _get(self) -> None:
        address = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        session = self.server.session
        if address.path == "/":
            self._send_page()
        elif address.path == "/api/next":
            number = session.next_number(_tab(query), beyond="beyond" in query)
            self._send_json(HTTPStatus.OK, self._state(number))
        elif address.path == "/api/status":
            tab = _tab(query)
            number = self._number(query["number"]) if "number" in query else None
            if number is not None:
                session.hold(tab, number)
            self._send_json(HTTPStatus.OK, self._state(number))
        elif match := _PHOTO.fullmatch(address.path):
            number = self._number(match[2])
            if match[1] is None:
                self._send_photo(number)
                return
            session.hold(_tab(query), number)
            self._send_json(HTTPStatus.OK, self._state(number))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _post(self) -> None:
        path = urlsplit(self.path).path
        match = _PHOTO.fullmatch(path)
        if path == "/api/release":
            self.server.session.release(self._body(ReleaseReply).tab)
            self._send_json(HTTPStatus.OK, {})
        elif match and match[1]:
            self._answer(self._number(match[2]), self._body(AnswerReply))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _answer(self, number: int, answer: AnswerReply) -> None:
        session, texts = self.server.session, answer.texts()
        try:
            stored = session.answer(
                number,
                answer.action,
                texts,
                revision=answer.revision,
                proposal=answer.proposal if answer.action == "accept" else None,
                seconds=answer.seconds,
            )
        except OSError as error:
            logger.error("not saved: %s", error)
            self._send_json(HTTPStatus.INSUFFICIENT_STORAGE, {"error": f"not saved: {error}"})
            return
        session.hold(answer.tab, number)
        status = HTTPStatus.OK if stored else HTTPStatus.CONFLICT
        state = self._state(number)
        if stored and self.server.refits is not None:
            self.server.refits.consider(state["progress"]["labelled"])
        self._send_json(status, state)

    def _state(self, number: int | None) -> dict[str, Any]:
        """Returns what the page shows: a photograph, if there is one, and how far the work is."""
        session, refits = self.server.session, self.server.refits
        session.proposals.wake()
        return {
            "photo": None if number is None else session.shown(number),
            "ahead": None if number is None else session.ahead(number),
            "wanted": session.captions_per_image,
            "progress": asdict(session.progress()),
            "refit": None if refits is None else asdict(refits.state),
            "recent": session.recent(),
        }

    def _number(self, text: str) -> int:
        photos = self.server.session.photos
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) >= len(photos):
            raise Refused(HTTPStatus.NOT_FOUND, "there is no such photograph")
        return int(text)

    def _body(self, model: type[_R]) -> _R:
        """Returns the request's body; nothing is read that is too long or of another kind."""
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send application/json")
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,15}", length):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "say how long the body is")
        if int(length) > MAX_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BODY} bytes")
        try:
            return model.model_validate_json(self.rfile.read(int(length)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise Refused(HTTPStatus.BAD_REQUEST, f"{key}: {first['msg']}".lstrip(": ")) from None

    def _send_page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        body = _page().replace("{nonce}", nonce).replace("{run}", self.server.run).encode()
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; "
            f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self._send(HTTPStatus.OK, "text/html; charset=utf-8", body, policy)

    def _send_photo(self, number: int) -> None:
        pixels = load_thumbnail(self.server.session.photos[number].path, _LONG_SIDE)
        body = io.BytesIO()
        Image.fromarray(pixels).save(body, "JPEG", quality=_QUALITY)
        self._send(HTTPStatus.OK, "image/jpeg", body.getvalue())

    def _send_json(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(document).encode())

    def _send(
        self, status: HTTPStatus, kind: str, body: bytes, policy: str = "default-src 'none'"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header(
            "Cache-Control", "private, max-age=600" if kind == "image/jpeg" else "no-store"
        )
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def _tab(query: dict[str, str]) -> str:
    tab = query.get("tab", "")
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", tab):
        raise Refused(HTTPStatus.BAD_REQUEST, "name the tab that asks")
    return tab


@lru_cache(maxsize=1)
def _page() -> str:
    return resources.files("trainer.labelling").joinpath("page.html").read_text("utf-8")
