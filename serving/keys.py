"""API keys: made, kept as hashes in a file, and recognised.

A key is 256 random bits. What makes a password's hash slow, guessing, is hopeless against them, so
one sha256 is enough; and whoever reads the file has nothing to send to the server.
"""

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from exports.disk import folder_locked, replace_durably, settle_folder
from serving.errors import KeysRejected
from serving.rate import TokenBucket

logger = logging.getLogger(__name__)

_PREFIX = "cutline_"  # by which a scanner for secrets finds one that was published
_RANDOM_BYTES = 32
_LONGEST = 200  # characters of what is presented as a key
_MAX_FILE_BYTES = 1024 * 1024
_LOOK_EVERY_S = 1.0

Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Burst = Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)]


class Key(BaseModel):
    """What the file has of a key: a name for people, a hash, and what the key may do.

    `rate` is in images a second, `burst` in images; without a rate there is no limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rate: Rate | None = None
    burst: Burst | None = None
    admin: bool = False


class KeysFile(BaseModel):
    """The content of a keys file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    keys: tuple[Key, ...] = ()

    @field_validator("keys")
    @classmethod
    def _differ(cls, keys: tuple[Key, ...]) -> tuple[Key, ...]:
        for what in ("name", "sha256"):
            if len({getattr(key, what) for key in keys}) < len(keys):
                raise ValueError(f"two keys have the same {what}")
        return keys


class KeyRing:
    """The keys of a file, read again when it changes; for the thread of the event loop alone."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads the file.

        Raises:
            KeysRejected: It is not there, or is no keys file.
        """
        self._path = path
        self._clock = clock
        self._trouble = ""  # what was wrong with the file at the last look
        self._buckets: dict[str, TokenBucket] = {}
        self._keys, self._stamp = _read(path)
        self._looked_at = clock()
        self._use(self._keys)

    def find(self, presented: str) -> tuple[Key, TokenBucket | None] | None:
        """Returns the key that was presented and its rate limit, or None if it is none of ours."""
        self._look()
        if len(presented) > _LONGEST:
            return None
        digest = _digest(presented)
        found = None
        for key in self._keys:  # every one, so that the time tells nothing
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return None if found is None else (found, self._buckets.get(found.name))

    def _look(self) -> None:
        """Reads the file again if it changed; one that is damaged or gone leaves the keys."""
        now = self._clock()
        if now - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = now
        trouble = ""
        try:
            if _stamp(self._path.stat()) == self._stamp and not self._trouble:
                return
            keys, self._stamp = _read(self._path)
            self._use(keys)
        except (KeysRejected, OSError) as error:
            trouble = error.strerror or "unreadable" if isinstance(error, OSError) else str(error)
        if trouble and trouble != self._trouble:
            logger.error("the keys are as they were, for the new file is no good: %s", trouble)
        self._trouble = trouble

    def _use(self, keys: tuple[Key, ...]) -> None:
        buckets = {}
        for key in keys:
            if key.rate is None:
                continue
            burst = max(key.rate, 1.0) if key.burst is None else key.burst
            kept = self._buckets.get(key.name)
            same = kept is not None and (kept.rate, kept.burst) == (key.rate, burst)
            buckets[key.name] = (
                kept if kept and same else TokenBucket(key.rate, burst, clock=self._clock)
            )
        self._keys, self._buckets = keys, buckets
        logger.info("%d keys from %s", len(keys), self._path)


def make_key(
    path: Path,
    name: str,
    *,
    rate: float | None = None,
    burst: float | None = None,
    admin: bool = False,
) -> str:
    """Makes a key, adds its hash to the file, all or nothing, and returns the key itself.

    Raises:
        KeysRejected: The file is damaged, has the name already, or cannot be written.
    """
    secret = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    try:
        with folder_locked(path.parent):
            known = _read(path)[0] if path.exists() else ()
            if name in {key.name for key in known}:
                raise KeysRejected(f"{path} has a key {name} already; take it out first.")
            key = Key(name=name, sha256=_digest(secret), rate=rate, burst=burst, admin=admin)
            content = KeysFile(keys=(*known, key)).model_dump_json(indent=2, exclude_defaults=True)
            replace_durably(path, content.encode() + b"\n", mode=0o600)
            settle_folder(path.parent)
    except ValidationError as error:
        raise KeysRejected(_first(error)) from error
    except OSError as error:
        raise KeysRejected(f"{path}: {error.strerror}; nothing was changed.") from error
    return secret


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _read(path: Path) -> tuple[tuple[Key, ...], tuple[int, ...]]:
    """Returns the keys of a file and what tells it from the next one."""
    try:
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            body = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysRejected(f"{path}: {error.strerror}.") from error
    if len(body) > _MAX_FILE_BYTES:
        raise KeysRejected(f"{path} has more than {_MAX_FILE_BYTES} bytes.")
    try:
        return KeysFile.model_validate_json(body).keys, stamp
    except ValidationError as error:
        raise KeysRejected(f"{path} is no keys file: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """Returns what is wrong without what was found, which could be a key in the wrong place."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    is_extra = first["type"] == "extra_forbidden"
    where = ".".join(str(part) for part in (first["loc"][:-1] if is_extra else first["loc"]))
    return f"{where}: {first['msg']}." if where else f"{first['msg']}."
