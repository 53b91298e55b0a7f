"""Who asks: set by the guard, known in every task that works for the request."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from serving.rate import TokenBucket


@dataclass(frozen=True, slots=True)
class Caller:
    """The key of a request; nobody in particular where the server asks for none.

    Attributes:
        name: The key's name, which is no secret; empty without keys.
        bucket: Its rate limit, if it has one.
    """

    name: str = ""
    bucket: TokenBucket | None = None

    def charge(self, images: int) -> None:
        """Counts more images against the rate limit; what that overdraws, later requests wait."""
        if self.bucket is not None:
            self.bucket.charge(images)


_current: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - frozen


def caller() -> Caller:
    """Returns who asks for what is being done now."""
    return _current.get()


@contextmanager
def calling(one: Caller) -> Iterator[None]:
    """Makes `one` the caller of all that is done within, tasks and threads of asyncio included."""
    token = _current.set(one)
    try:
        yield
    finally:
        _current.reset(token)
