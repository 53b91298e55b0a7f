"""Several bundles side by side: how many captions a second each gives.

    python benchmarks/bundles.py --images DIR BUNDLE BUNDLE ...
    python benchmarks/bundles.py --tiny

Each captions the same photographs, decoded beforehand, by the server's own scheduler, with its own
defaults and as many clients as `--clients` says. They take turns every few batches, so that
whatever else the machine does hits all of them.
"""

import argparse
import asyncio
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
from common import UsageError, machine, main, parser, photographs, table
from contenders import Side, queued

from serving.captioner import Captioner
from trainer.photos import load_pixels

HEAD = ("bundle", "MiB", "beams", "captions/s", "of the first")
TURN = 4  # batches of one bundle before the next one has its turn


def benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Prints the table."""
    folders: list[Path] = arguments.bundles or [arguments.bundle]
    if len(set(folders)) < len(folders):
        raise UsageError("a bundle is named twice")
    paths = photographs(arguments.images, arguments.count)
    captioners = [Captioner.load(folder, threads=arguments.threads) for folder in folders]
    pixels = [
        np.stack([load_pixels(path, captioner.image_spec) for path in paths])
        for captioner in captioners
    ]
    runner = stack.enter_context(asyncio.Runner())
    sides = [queued(one, arguments.clients, runner, stack) for one in captioners]
    for number in range(arguments.rounds + 1):  # the first one warms up
        _round(sides, pixels, arguments.clients)
        print(f"round {number} of {arguments.rounds}", file=sys.stderr)
    first = sides[0].seconds[1:]
    rows = []
    for folder, captioner, side in zip(folders, captioners, sides, strict=True):
        seconds = side.seconds[1:]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        speed = median(a / b for a, b in zip(first, seconds, strict=True))
        rows.append(
            [
                str(folder),
                f"{size / 2**20:.1f}",
                str(captioner.manifest.defaults.num_beams),
                f"{len(paths) / median(seconds):.1f}",
                f"{speed:.2f}x",
            ]
        )
    print(f"\n{len(paths)} images, {arguments.clients} clients\n")
    print(table(HEAD, rows))
    rounds = f"medians of {arguments.rounds} rounds"
    print(f"\n{machine(arguments.threads, rounds, ('onnxruntime', 'numpy'))}")


def _round(sides: list[Side], pixels: list[np.ndarray], clients: int) -> None:
    """Has every side caption every image once, and notes its seconds."""
    turn = TURN * clients
    for side in sides:
        side.seconds.append(0.0)
    for start in range(0, len(pixels[0]), turn):
        for side, own in zip(sides, pixels, strict=True):
            begun = time.perf_counter()
            side.caption(own[start : start + turn], clients)
            side.seconds[-1] += time.perf_counter() - begun


if __name__ == "__main__":
    made = parser(__doc__)
    made.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE", help="default: --bundle")
    made.add_argument("--clients", type=int, default=8, help="at once")
    made.add_argument("--count", type=int, default=200, help="images, at most")
    made.add_argument("--rounds", type=int, default=3)
    sys.exit(main(benchmark, made.parse_args()))
