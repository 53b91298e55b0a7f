"""When an image was where: filled while it goes through the server, read when its request ends."""

from dataclasses import dataclass


@dataclass(slots=True)
class Timeline:
    """Times on the clock of `time.monotonic`, in seconds; 0 where the image never came.

    Attributes:
        received: Its bytes were there.
        decoded: It was pixels, and began to wait.
        encoding: The encoder began with it.
        encoded: The encoder was done; it waits for room among the searches.
        joined: The search for its captions began.
        done: The captions were there, reranked if that was asked for.
        match_s: Seconds of reranking, the last of the search.
    """

    received: float = 0.0
    decoded: float = 0.0
    encoding: float = 0.0
    encoded: float = 0.0
    joined: float = 0.0
    done: float = 0.0
    match_s: float = 0.0
