"""Encoded images, kept for when the same pixels come again."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from serving.decoding import Memory
from serving.session import Pixels

_Key = bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image of an encoded batch."""

    memory: Memory
    index: int


class MemoryCache:
    """The encoder's outputs of the images seen last, by their pixels; bounded in bytes.

    What was encoded together stays together: nothing is copied, and a batch goes as a whole when
    none of its images was asked for longest. For one thread at a time.
    """

    def __init__(self, limit: int) -> None:
        """Starts empty; `limit` is in bytes, 0 keeps nothing."""
        self.held = 0
        self.hits = 0
        self._limit = limit
        self._found: dict[_Key, Encoded] = {}
        self._batches: OrderedDict[int, tuple[Memory, list[_Key]]] = OrderedDict()  # oldest first

    def encode(
        self, pixels: Sequence[Pixels], encoder: Callable[[Pixels], Memory]
    ) -> list[Encoded]:
        """Returns each image (H, W, 3), encoding those together that are not here."""
        if not self._limit:
            memory = encoder(np.stack(pixels))
            return [Encoded(memory, index) for index in range(len(pixels))]
        keys = [blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
        new = {
            key: image for key, image in zip(keys, pixels, strict=True) if key not in self._found
        }
        self.hits += len(keys) - len(new)
        known = {key: self._found[key] for key in keys if key not in new}
        for found in known.values():
            self._batches.move_to_end(id(found.memory))
        if new:
            memory = encoder(np.stack(list(new.values())))
            fresh = {key: Encoded(memory, index) for index, key in enumerate(new)}
            known |= fresh
            self._keep(memory, fresh)
        return [known[key] for key in keys]

    def _keep(self, memory: Memory, fresh: dict[_Key, Encoded]) -> None:
        if memory.size > self._limit:
            return
        self._found |= fresh
        self._batches[id(memory)] = (memory, list(fresh))
        self.held += memory.size
        while self.held > self._limit:
            _, (oldest, keys) = self._batches.popitem(last=False)
            self.held -= oldest.size
            for key in keys:
                del self._found[key]
