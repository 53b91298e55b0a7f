"""The cache of encoded images: what is kept, what goes, and that nothing is encoded twice."""

import numpy as np
import onnxruntime as ort

from serving.decoding import Memory
from serving.memories import MemoryCache

IMAGE_BYTES = 4 * 2 * 3


def image(number):
    return np.full((2, 2, 3), number, dtype=np.uint8)


class Encoder:
    def __init__(self):
        self.batches = []

    def __call__(self, pixels):
        self.batches.append(pixels[:, 0, 0, 0].tolist())
        values = np.broadcast_to(pixels[:, :1, 0, :2], (len(pixels), 3, 2)).astype(np.float32)
        return Memory(len(pixels), (ort.OrtValue.ortvalue_from_numpy(values.copy()),))


def numbers(found):
    return [int(one.memory.values[0].numpy()[one.index, 0, 0]) for one in found]


def test_images_that_were_seen_are_not_encoded_again():
    cache, encoder = MemoryCache(10 * IMAGE_BYTES), Encoder()
    assert numbers(cache.encode([image(n) for n in (1, 2, 1)], encoder)) == [1, 2, 1]
    assert numbers(cache.encode([image(n) for n in (2, 3, 1)], encoder)) == [2, 3, 1]
    assert encoder.batches == [[1, 2], [3]]
    assert (cache.held, cache.hits) == (3 * IMAGE_BYTES, 3)


def test_the_batch_that_was_asked_for_longest_ago_goes_first():
    cache, encoder = MemoryCache(3 * IMAGE_BYTES), Encoder()
    for number in (1, 2, 3, 1, 4):
        assert numbers(cache.encode([image(number)], encoder)) == [number]
    assert cache.held == 3 * IMAGE_BYTES
    assert numbers(cache.encode([image(1), image(2)], encoder)) == [1, 2]
    assert encoder.batches == [[1], [2], [3], [4], [2]]


def test_nothing_larger_than_the_bound_is_kept():
    cache, encoder = MemoryCache(IMAGE_BYTES), Encoder()
    for _ in range(2):
        assert numbers(cache.encode([image(1), image(2)], encoder)) == [1, 2]
    assert (cache.held, len(encoder.batches)) == (0, 2)
    none = MemoryCache(0)
    for _ in range(2):
        assert numbers(none.encode([image(1)], encoder)) == [1]
    assert len(encoder.batches) == 4
