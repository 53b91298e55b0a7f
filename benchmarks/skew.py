"""Step-level against static batching, when captions differ in length.

    python benchmarks/skew.py --images DIR
    python benchmarks/skew.py --tiny

One captioner, one set of photographs, encoded beforehand, so that what is timed is decoding. Four
of five images are captioned in 4 to 8 tokens, the fifth in 24 to 36, which parameters force.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
from common import machine, main, parser, photographs, table

from serving.captioner import Captioner
from serving.engine import Engine
from serving.params import Params
from trainer.photos import load_pixels

BATCHES = (8, 32)
SHORT, LONG, LONG_SHARE = (4, 8), (24, 36), 0.2
CACHE_BYTES = 2 << 30  # every image stays encoded


class Quiet:
    """The engine's metrics, of no interest here."""

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


@dataclass(slots=True)
class Way:
    """One way to schedule, and what it took in each round."""

    name: str
    run: Callable[[], None]
    seconds: list[float] = field(default_factory=list)


def lengths_of(count: int, seed: int = 0) -> list[int]:
    """Returns how many tokens each caption gets."""
    draw = random.Random(seed)
    return [draw.randint(*(LONG if draw.random() < LONG_SHARE else SHORT)) for _ in range(count)]


def padded(lengths: Sequence[int], batch: int) -> list[int]:
    """Returns the lengths that static batches compute: each its batch's longest."""
    return [
        max(lengths[start : start + batch])
        for start in range(0, len(lengths), batch)
        for _ in lengths[start : start + batch]
    ]


def _of_length(usual: Params, tokens: int) -> Params:
    return replace(usual, min_new_tokens=tokens, max_new_tokens=tokens)


def _static(
    captioner: Captioner, pixels: Sequence[np.ndarray], params: Sequence[Params], batch: int
) -> None:
    for start in range(0, len(pixels), batch):
        captioner.caption_batch(pixels[start : start + batch], params[start : start + batch])


def _step_level(
    captioner: Captioner,
    pixels: Sequence[np.ndarray],
    params: Sequence[Params],
    batch: int,
    runner: asyncio.Runner,
) -> None:
    rows = batch * params[0].num_beams  # as many beams at once as a static batch has
    engine = Engine(max_rows=rows, max_queue=len(pixels), latency_target_s=1e9, metrics=Quiet())

    async def everyone() -> None:
        await asyncio.gather(*map(engine.submit, [captioner] * len(pixels), pixels, params))

    try:
        runner.run(everyone())
    finally:
        engine.close()


def benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Prints the table."""
    captioner = Captioner.load(arguments.bundle, threads=arguments.threads, cache_bytes=CACHE_BYTES)
    paths = photographs(arguments.images, arguments.count)
    pixels = [load_pixels(path, captioner.image_spec) for path in paths]
    lengths = lengths_of(len(pixels))
    usual = Params.of(captioner.manifest.defaults)
    runner = stack.enter_context(asyncio.Runner())
    rows = []
    for batch in BATCHES:
        exact = [_of_length(usual, tokens) for tokens in lengths]
        to_the_end = [_of_length(usual, tokens) for tokens in padded(lengths, batch)]
        ways = [
            Way(
                "step-level", lambda b=batch, p=exact: _step_level(captioner, pixels, p, b, runner)
            ),
            Way("static", lambda b=batch, p=to_the_end: _static(captioner, pixels, p, b)),
            Way(
                "static, rows of finished images dropped",
                lambda b=batch, p=exact: _static(captioner, pixels, p, b),
            ),
        ]
        for number in range(arguments.rounds + 1):  # the first one encodes and warms up
            for way in (*ways[number % 3 :], *ways[: number % 3]):
                started = time.perf_counter()
                way.run()
                way.seconds.append(time.perf_counter() - started)
            print(f"batch {batch}: round {number} of {arguments.rounds}", file=sys.stderr)
        for way in ways:
            gains = [a / b for a, b in zip(way.seconds[1:], ways[0].seconds[1:], strict=True)]
            each = 1000 * median(way.seconds[1:]) / len(pixels)
            rows.append([str(batch), way.name, f"{each:.2f}", f"{median(gains):.2f}x"])
    print(f"\n{captioner.name}@{captioner.version}, {len(pixels)} images, beam {usual.num_beams}\n")
    print(table(["images at once", "batching", "ms an image", "time of step-level"], rows))
    rounds = f"medians of {arguments.rounds} rounds"
    print(f"\n{machine(arguments.threads, rounds, ('onnxruntime', 'numpy'))}")


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("--count", type=int, default=500, help="images, at most")
    made.add_argument("--rounds", type=int, default=3)
    sys.exit(main(benchmark, made.parse_args()))
