"""The server's log: one line of JSON or of text for each thing that happened, to stderr by default.

One line a request, written by `log_request`; of what comes in floods, refusals with 429 and failed
probes, one a second for each kind, with how many they were. What the server
and uvicorn have to say besides comes in the same form. A log is read by many and kept for long, so
nothing of a request's body gets into it: no image, no name that a client made up, and no caption
unless the settings say so. What others write about a request's failure might quote it, so from them
only the kind of failure is taken and where it happened.
"""

import asyncio
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from http import HTTPStatus
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "json"]

state: ContextVar[dict[str, Any] | None] = ContextVar("state", default=None)
"""The state of the request that the running task works for, if any; see `noted`."""

# Probes and scrapes come every few seconds, all alike: only what goes wrong with them is told.
_QUIET_ROUTES = ("health", "metrics")
_LOUD = 400
_REST_S = 1.0
_HANDLER = "cutline"
_OURS = ("serving", "exports")
_OTHERS = ("uvicorn", "asyncio", "concurrent.futures", "python_multipart")
# Errors whose words are about this machine or the model's graphs, never about a request's body.
_HARMLESS = (OSError, MemoryError)
_HARMLESS_MODULES = ("onnxruntime.", "exports.errors")

_requests = logging.getLogger("serving.requests")


def start_log(form: LogFormat, path: Path | None = None) -> None:
    """Shows what the server has to say: its requests, which bundle it serves, why not another.

    Args:
        form: Of the lines.
        path: Where they go in place of stderr: a file, a named pipe, another process's stderr.
    """
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    refused: OSError | None = None
    if path is not None:
        try:
            handler = logging.FileHandler(path, encoding="utf-8")
        except OSError as error:
            refused = error
    handler.set_name(_HANDLER)
    handler.setFormatter(_Json() if form == "json" else _Text())
    for name in (*_OURS, *_OTHERS):
        log = logging.getLogger(name)
        for old in [one for one in log.handlers if one.name == _HANDLER]:
            log.removeHandler(old)
            old.close()
        log.addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    for name in _OTHERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    if refused:
        logging.getLogger(__name__).warning("no log in %s: %s", path, refused.strerror)


@contextmanager
def shown_on_stderr(pipe: Path) -> Iterator[None]:
    """Shows on stderr all that other processes write to a named pipe until the block ends.

    Lines of up to 4 KiB come out whole, whoever else writes at the time.

    Args:
        pipe: Is made.

    Raises:
        OSError: It cannot be made.
    """
    os.mkfifo(pipe, 0o600)
    end = b"\0"  # in no line
    # Open for writing too: there is no end of file when a writer goes.
    with FileIO(os.open(pipe, os.O_RDWR)) as lines:

        def show() -> None:
            while end not in (part := lines.read(65536) or end):
                _to_stderr(part)
            _to_stderr(part.partition(end)[0])

        reader = threading.Thread(target=show, name="cutline-log", daemon=True)
        reader.start()
        try:
            yield
        finally:
            os.write(lines.fileno(), end)
            reader.join()


def _to_stderr(part: bytes) -> None:
    # Whatever became of stderr, the pipe must be emptied: a full one stops all who write to it.
    with suppress(OSError):
        while part:
            part = part[os.write(2, part) :]


def noted() -> dict[str, Any]:
    """Returns the state of the running request, to read and to note more for its line."""
    current = state.get()
    return {} if current is None else current


def log_request(noted: Mapping[str, Any], route: str, code: int, seconds: float) -> None:
    """Writes the line of a request that is over.

    Args:
        noted: What the layers of the app noted in the state of the request's scope; see `_NOTED`.
        route: One of a fixed set: a path could be anything.
        code: HTTP's, or 499 for a client that left.
        seconds: From its first byte to its last.
    """
    if route in _QUIET_ROUTES and code < _LOUD:
        return
    fields = {"route": route, "code": code, "seconds": round(seconds, 4)}
    fields |= {name: noted[name] for name in _NOTED if noted.get(name) is not None}
    if code == HTTPStatus.TOO_MANY_REQUESTS or route in _QUIET_ROUTES:
        _floods.tell((route, code, fields.get("key"), fields.get("error")), fields)
    else:
        _write(fields)


def _write(fields: Mapping[str, Any]) -> None:
    _requests.info("request", extra={"fields": fields})


_NOTED = ("request_id", "images", "model", "error", "key", "trace_id", "captions")
"""What stands in a request's line if its scope's state has it.

`model` is name@version, `error` the title of the problem that was answered, `key` the name of the
API key, `captions` the texts, noted only where the settings allow it.
"""


class Floods:
    """Tells of what comes in floods: the first of a kind at once, then all by a line a second."""

    def __init__(self) -> None:
        """Starts with nothing to tell."""
        self._more: dict[Hashable, int] = {}  # how many came since the last line of their kind

    def tell(self, kind: Hashable, fields: dict[str, Any]) -> None:
        """Writes a line, or counts it for the next one; within an event loop."""
        if kind in self._more:
            self._more[kind] += 1
            return
        _write(fields)
        self._wait(kind, fields)

    def _wait(self, kind: Hashable, fields: dict[str, Any]) -> None:
        self._more[kind] = 0
        asyncio.get_running_loop().call_later(_REST_S, self._flush, kind, fields)

    def _flush(self, kind: Hashable, fields: dict[str, Any]) -> None:
        if times := self._more.pop(kind):
            _write(fields | {"times": times})
            self._wait(kind, fields)


_floods = Floods()


class _Json(logging.Formatter):
    """A line of JSON, ASCII: nothing in it can begin another line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if error := _error(record):
            line["exception"] = error
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    """A line for people; an error's places follow on lines of their own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_plain(value)}" for name, value in _fields(record).items())
        line = " ".join(part for part in (_plain(_message(record)), fields) if part)
        error = _error(record)
        return f"{_time(record)} {record.levelname} {line}" + (f"\n{error}" if error else "")


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    if _is_ours(record):
        return record.getMessage()
    # What asyncio and uvicorn append on further lines is the exception and its traceback.
    return record.getMessage().partition("\n")[0]


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = getattr(record, "fields", {})
    current = noted().get("request_id", "")
    return {"request_id": current, **fields} if current and not fields else fields


def _error(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[1] is None:
        return ""
    _, error, trace = record.exc_info
    return _told(error, trace)


def _told(error: BaseException, trace: TracebackType | None) -> str:
    """Returns the places that an error and its causes passed, and their words where harmless."""
    parts = ["".join(traceback.format_tb(trace)) + _words(error)]
    seen = {id(error)}
    cause = error.__cause__ or error.__context__
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        parts.append("".join(traceback.format_tb(cause.__traceback__)) + _words(cause))
        cause = cause.__cause__ or cause.__context__
    return "\nafter:\n".join(parts)


def _words(error: BaseException) -> str:
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    if isinstance(error, _HARMLESS) or kind.__module__.startswith(_HARMLESS_MODULES):
        return f"{name}: {error}"
    return name


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OURS


def _plain(value: object) -> str:
    """Returns a value on one line."""
    if isinstance(value, str):
        return value if value.isprintable() else ascii(value)
    if isinstance(value, Sequence):
        return json.dumps(value)
    return str(value)
