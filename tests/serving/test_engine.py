"""The batcher with a scripted captioner, and once with the tiny bundle."""

import asyncio
import gc
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest

from serving.captioner import Caption, Params
from serving.decode_image import ImageLimits, decode_image
from serving.engine import Engine
from serving.errors import CaptionFailed, DeadlineExceeded, NotReady, QueueFull

PARAMS = Params(1, 1, 8, 0, 1.0, 0)
PATIENCE_S = 10.0


class Recorder:
    def __init__(self):
        self.waits, self.batches, self.encodes, self.steps, self.tokens = [], [], [], [], 0

    def observe_queue_wait(self, seconds):
        self.waits.append(seconds)

    def observe_batch(self, images):
        self.batches.append(images)

    def observe_encode(self, seconds):
        self.encodes.append(seconds)

    def observe_step(self, seconds):
        self.steps.append(seconds)

    def add_tokens(self, count):
        self.tokens += count


class GatedCaptioner:
    """Captions an image by its number; a batch waits at the gate. `poison` makes a batch fail."""

    def __init__(self, poison=None):
        self.poison = poison
        self.batches = []
        self.begun = threading.Event()
        self.gate = threading.Event()

    def caption_batch(self, pixels, params, *, observer=None):
        numbers = [int(image[0, 0, 0]) for image in pixels]
        self.batches.append(numbers)
        self.begun.set()
        assert self.gate.wait(PATIENCE_S)
        if self.poison in numbers:
            raise RuntimeError("secret of the machine")
        return [[Caption(str(number), -1.0, -3.0, 3, (4, 5, 2))] for number in numbers]


def image(number):
    return np.full((2, 2, 3), number, dtype=np.uint8)


@pytest.fixture
def make_engine():
    engines = []

    def make(**changes):
        engine = Engine(**{"max_batch_size": 8, "max_queue": 100, "metrics": Recorder(), **changes})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


async def until(condition):
    limit = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < limit
        await asyncio.sleep(0.001)


async def busy(engine, captioner):
    """Sends image 0 and returns its task once the compute thread stands at the gate with it."""
    task = asyncio.create_task(engine.submit(captioner, image(0), PARAMS))
    await until(captioner.begun.is_set)
    return task


def submit_all(engine, captioner, numbers, **arguments):
    return [
        asyncio.create_task(engine.submit(captioner, image(number), PARAMS, **arguments))
        for number in numbers
    ]


async def texts(tasks):
    return [captions[0].text for captions in await asyncio.gather(*tasks)]


def test_what_waits_together_is_one_batch_and_a_lone_image_waits_for_nobody(make_engine):
    metrics, captioner = Recorder(), GatedCaptioner()
    engine = make_engine(max_batch_size=4, metrics=metrics)

    async def scenario():
        tasks = [await busy(engine, captioner)]
        tasks += submit_all(engine, captioner, range(1, 7))
        await until(lambda: engine.waiting == 6)
        captioner.gate.set()
        return await texts(tasks)

    assert asyncio.run(scenario()) == list("0123456")
    assert captioner.batches == [[0], [1, 2, 3, 4], [5, 6]]
    engine.close()
    assert metrics.batches == [1, 4, 2]
    assert len(metrics.waits) == 7
    assert metrics.tokens == 21


def test_captioners_do_not_share_a_batch(make_engine):
    engine, old, new = make_engine(), GatedCaptioner(), GatedCaptioner()
    new.gate.set()

    async def scenario():
        tasks = [await busy(engine, old)]
        for number, captioner in enumerate([old, new, old, new], 1):
            tasks += submit_all(engine, captioner, [number])
        await until(lambda: engine.waiting == 4)
        old.gate.set()
        return await texts(tasks)

    assert asyncio.run(scenario()) == list("01234")
    assert (old.batches, new.batches) == ([[0], [1, 3]], [[2, 4]])


def test_a_wide_search_does_not_widen_a_whole_batch(make_engine):
    engine, captioner = make_engine(max_batch_size=4), GatedCaptioner()  # 32 rows
    beams = {1: 1, 2: 16, 3: 1, 4: 16, 5: 1, 6: 16}

    async def scenario():
        tasks = [await busy(engine, captioner)]
        for number, num_beams in beams.items():
            params = replace(PARAMS, num_beams=num_beams)
            tasks.append(asyncio.create_task(engine.submit(captioner, image(number), params)))
        await until(lambda: engine.waiting == 6)
        captioner.gate.set()
        return await texts(tasks)

    assert asyncio.run(scenario()) == list("0123456")
    assert captioner.batches == [[0], [1, 2], [3, 4], [5, 6]]


def test_the_first_of_a_batch_is_let_in_however_wide(make_engine):
    engine, captioner = make_engine(max_batch_size=1), GatedCaptioner()
    captioner.gate.set()
    params = replace(PARAMS, num_beams=16)
    assert asyncio.run(engine.submit(captioner, image(1), params))[0].text == "1"


def test_a_cancelled_waiter_leaves_the_queue(make_engine):
    engine, captioner = make_engine(), GatedCaptioner()

    async def scenario():
        first = await busy(engine, captioner)
        gone, stays = submit_all(engine, captioner, [1, 2])
        await until(lambda: engine.waiting == 2)
        gone.cancel()
        await until(lambda: engine.waiting == 1)
        captioner.gate.set()
        return await texts([first, stays])

    assert asyncio.run(scenario()) == ["0", "2"]
    assert captioner.batches == [[0], [2]]


def test_a_deadline_is_told_at_once_and_the_image_not_computed(make_engine):
    engine, captioner = make_engine(), GatedCaptioner()

    async def scenario():
        first = await busy(engine, captioner)
        started = time.monotonic()
        [late] = submit_all(engine, captioner, [1], deadline=started + 0.05)
        with pytest.raises(DeadlineExceeded):
            await late
        assert time.monotonic() - started < PATIENCE_S / 2  # while the compute thread is busy
        with pytest.raises(DeadlineExceeded):
            await engine.submit(captioner, image(2), PARAMS, time.monotonic() - 1)
        in_time = submit_all(engine, captioner, [3], deadline=time.monotonic() + PATIENCE_S)
        captioner.gate.set()
        return await texts([first, *in_time])

    assert asyncio.run(scenario()) == ["0", "3"]
    assert captioner.batches == [[0], [3]]


def test_a_full_queue_refuses_and_says_when_to_come_back(make_engine):
    engine, captioner = make_engine(max_queue=2), GatedCaptioner()

    async def scenario():
        tasks = [await busy(engine, captioner), *submit_all(engine, captioner, [1, 2])]
        await until(lambda: engine.waiting == 2)
        with pytest.raises(QueueFull) as refusal:
            await engine.submit(captioner, image(3), PARAMS)
        assert 1 <= refusal.value.retry_after <= 60
        captioner.gate.set()
        return await texts(tasks)

    assert asyncio.run(scenario()) == ["0", "1", "2"]


def test_a_poisoned_image_harms_only_itself(make_engine):
    engine, captioner = make_engine(), GatedCaptioner(poison=2)

    async def scenario():
        tasks = [await busy(engine, captioner), *submit_all(engine, captioner, [1, 2, 3])]
        await until(lambda: engine.waiting == 3)
        captioner.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    zero, one, two, three = asyncio.run(scenario())
    assert [zero[0].text, one[0].text, three[0].text] == ["0", "1", "3"]
    assert isinstance(two, CaptionFailed)
    assert "secret" not in two.detail
    assert captioner.batches == [[0], [1, 2, 3], [1], [2], [3]]


def test_closing_drains_and_then_refuses(make_engine):
    engine, captioner = make_engine(), GatedCaptioner()

    async def scenario():
        tasks = [await busy(engine, captioner), *submit_all(engine, captioner, [1, 2])]
        await until(lambda: engine.waiting == 2)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while True:
            try:
                # Refused from the moment that closing begins, though the others still wait.
                async with asyncio.timeout(0.01):
                    await engine.submit(captioner, image(9), PARAMS)
            except TimeoutError:
                continue
            except NotReady:
                break
        assert not closing.done()
        captioner.gate.set()
        await closing
        return await texts(tasks)

    assert asyncio.run(scenario()) == ["0", "1", "2"]


def test_event_loops_share_an_engine_and_one_may_die(make_engine):
    engine, captioner = make_engine(), GatedCaptioner()

    async def lives():
        tasks = submit_all(engine, captioner, [1])
        await until(lambda: engine.waiting == 2)
        captioner.gate.set()
        return await texts(tasks)

    dead = asyncio.new_event_loop()
    computed = dead.run_until_complete(busy(engine, captioner))
    queued = dead.create_task(engine.submit(captioner, image(8), PARAMS))
    dead.run_until_complete(asyncio.sleep(0))
    dead.close()
    assert asyncio.run(lives()) == ["1"]
    assert captioner.batches == [[0], [1]]
    assert not computed.done()
    assert not queued.done()


def test_an_idle_engine_lets_go_of_a_captioner_that_was_swapped_out(make_engine):
    engine, captioner = make_engine(), GatedCaptioner()
    captioner.gate.set()
    asyncio.run(engine.submit(captioner, image(1), PARAMS))
    watched = weakref.ref(captioner)
    del captioner
    limit = time.monotonic() + PATIENCE_S
    while watched() is not None and time.monotonic() < limit:
        gc.collect()
        time.sleep(0.001)
    assert watched() is None


def test_a_real_captioner_in_a_crowd(make_engine, tiny_captioner, photos, black_photo):
    metrics = Recorder()
    engine = make_engine(metrics=metrics, max_batch_size=5)
    limits = ImageLimits()
    pixels = [decode_image(body, tiny_captioner.image_spec, limits) for body in photos]
    black = decode_image(black_photo, tiny_captioner.image_spec, limits)
    base = Params.of(tiny_captioner.manifest.defaults)
    params = [replace(base, num_beams=beams) for beams in (1, 2, 3, 4)]
    jobs = [(pixels[index % 8], params[index % 4]) for index in range(40)]

    async def scenario():
        tasks = [engine.submit(tiny_captioner, *job) for job in jobs]
        tasks.insert(20, engine.submit(tiny_captioner, black, base))
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(scenario())
    assert isinstance(found.pop(20), CaptionFailed)
    for (one, entry), captions in zip(jobs, found, strict=True):
        [expected] = tiny_captioner.caption_batch([one], [entry])
        assert [c.token_ids for c in captions] == [c.token_ids for c in expected]
    assert sum(metrics.batches) == 41
    assert max(metrics.batches) == 5
    assert len(metrics.encodes) == len(metrics.batches)
    assert len(metrics.steps) > len(metrics.encodes)
