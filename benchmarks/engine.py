"""This engine against `generate` of transformers: one model, one set of photographs, one search.

    python benchmarks/engine.py --run runs/base --bundle exports/models/cutline-base/2 --images DIR
    python benchmarks/engine.py --provider cuda --bundle EXPORTED_WITH_FP16 ...
    python benchmarks/engine.py --tiny

Pixels are decoded beforehand and token ids come out; all that lies between is timed. The sides take
turns every few batches, so that whatever else the machine does hits all of them.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from statistics import mean, median

import numpy as np
from common import compares, machine, main, parser, photographs, table
from contenders import Ids, Pixels, Side, bare, direct, generate, greedy, pytorch, queued, score

from serving.captioner import Captioner as Served
from trainer.errors import TrainerError
from trainer.photos import load_pixels
from trainer.run import Run

BATCHES = (1, 8, 32)
TURN = 32  # images, or four batches if those are more, before the next side has its turn
OURS = "this engine"
SHOWN = 20  # captions that differ
HEAD = (
    "batch",
    "side",
    "ms an image",
    "against `generate`",
    "encoder",
    "steps",
    "outside",
    "same captions",
)


def _benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    threads, device = arguments.threads, arguments.provider
    captioner = pytorch(arguments.run, arguments.bundle, threads, device)
    source = Run(arguments.run)
    served = Served.load(arguments.bundle, threads=threads, provider=device)
    floats = arguments.float and Served.load(arguments.float, threads=threads, provider=device)
    paths = photographs(arguments.images, arguments.count)
    pixels = np.stack([load_pixels(path, served.image_spec) for path in paths])
    generation = served.manifest.defaults
    runner = stack.enter_context(asyncio.Runner())

    rows: list[list[str]] = []
    differing: dict[tuple[int, Ids, Ids], list[int]] = {}
    for batch in BATCHES:
        part = pixels[: len(pixels) - len(pixels) % batch]
        if not len(part):
            continue
        ours, peer = direct(served, OURS), generate(captioner, generation)
        sides = [ours, queued(served, batch, runner, stack), bare(served), greedy(served), peer]
        if floats:
            sides.append(direct(floats, f"{OURS}, float32"))
        _warm_up(sides, part, batch)
        half = generate(captioner, generation, half=True)
        if _seconds(half, part, batch) < _seconds(peer, part, batch):
            sides.append(half)
        _measure(sides, part, batch, arguments.rounds)
        rows += _rows(sides, peer, batch)
        exact = sides[5] if floats else ours  # integers differ by more than ties
        for place, (our_ids, their_ids) in enumerate(zip(exact.found, peer.found, strict=True)):
            if our_ids != their_ids:
                differing.setdefault((place, our_ids, their_ids), []).append(batch)

    words = " ".join(f"{name}={value}" for name, value in generation.model_dump().items())
    print(f"\n{served.name}@{served.version}, {len(pixels)} images, {words}\n")
    print(table(HEAD, rows), end="\n\n")
    for (place, our_ids, their_ids), batches in islice(differing.items(), SHOWN):
        # Scored by PyTorch, both of them: how near a tie it was.
        texts = [
            f"{source.tokenizer.decode(ids)!r} "
            f"({score(captioner, pixels[place], ids, generation.length_penalty):.5f})"
            for ids in (our_ids, their_ids)
        ]
        print(f"- {paths[place].name}, batch {batches}: {texts[0]}; `generate`: {texts[1]}")
    runtime = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}[device]
    packages = (runtime, "torch", "transformers", "numpy")
    print(machine(arguments.threads, f"medians of {arguments.rounds} rounds", packages))


def _warm_up(sides: Sequence[Side], pixels: Pixels, batch: int) -> None:
    for side in sides:
        side.caption(pixels[: 2 * batch], batch)
        if side.meter:
            side.meter.reset()


def _seconds(side: Side, pixels: Pixels, batch: int) -> float:
    """Returns what one batch takes, at best of three times."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        side.caption(pixels[:batch], batch)
        times.append(time.perf_counter() - started)
    return min(times)


def _measure(sides: Sequence[Side], pixels: Pixels, batch: int, rounds: int) -> None:
    """Fills in the sides' seconds and captions: each captions every image in each round."""
    turn = max(TURN, 4 * batch)
    for number in range(rounds):
        for side in sides:
            side.seconds.append(0.0)
            side.found.clear()
        for shift, start in enumerate(range(0, len(pixels), turn), number):
            first = shift % len(sides)
            for side in (*sides[first:], *sides[:first]):
                part = pixels[start : start + turn]
                started = time.perf_counter()
                found = side.caption(part, batch)
                side.seconds[-1] += time.perf_counter() - started
                side.found += found
        print(f"batch {batch}: round {number + 1} of {rounds}", file=sys.stderr)


def _rows(sides: Sequence[Side], peer: Side, batch: int) -> Iterator[list[str]]:
    """Yields rows for the table; speeds are medians over the rounds."""
    images = len(peer.found)
    for side in sides:
        name = side.name
        faster = median(b / a for a, b in zip(side.seconds, peer.seconds, strict=True))
        same = mean(a == b for a, b in zip(side.found, peer.found, strict=True))
        shares = ["", "", ""]
        if side.meter:
            inside = [side.meter.encode, side.meter.step]
            whole = sum(side.seconds)
            shares = [f"{part / whole:.1%}" for part in (*inside, whole - sum(inside))]
            if side.meter.batches:
                name += f", {mean(side.meter.batches):.1f} at a time"
        cells = [str(batch), name, f"{1000 * median(side.seconds) / images:.1f}", f"{faster:.2f}x"]
        yield [*cells, *shares, f"{same:.1%}"]


if __name__ == "__main__":
    made = compares(parser(__doc__))
    made.add_argument(
        "--provider", choices=("cpu", "cuda"), default="cpu", help="where both sides compute"
    )
    made.add_argument("--float", type=Path, help="the same run, exported without [int8]")
    sys.exit(main(_benchmark, made.parse_args(), TrainerError))
