"""This engine against `generate` of transformers: one model, one set of photographs, one search.

    python benchmarks/engine.py --run runs/base --bundle exports/models/cutline-base/1 --images DIR
    python benchmarks/engine.py --tiny

Pixels are decoded beforehand and token ids come out; all that lies between is timed. The sides take
turns every few batches, so that whatever else the machine does hits all of them.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from contenders import Ids, Pixels, Side, direct, generate, queued, score
from random_run import random_run

from exports.errors import ExportsError
from serving.captioner import Captioner as Served
from serving.errors import CaptionError
from trainer.compression import round_weights
from trainer.errors import TrainerError
from trainer.photos import load_pixels
from trainer.run import Run
from trainer.stages.export import blended

BATCHES = (1, 8, 32)
TURN = 32  # images, or four batches if those are more, before the next side has its turn
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif"}
HEAD = """\
| batch | side | ms an image | against `generate` | encoder | steps | outside | same captions |
|---|---|---|---|---|---|---|---|"""
NO_RUN = (
    "{}: no training run, and `generate` needs its checkpoint: a bundle holds graphs only. Train "
    "one as trainer/recipes/flickr8k/base.toml says, or add --tiny to time random weights of the "
    "same size"
)


class UsageError(Exception):
    """What the command line names is not there."""


def main() -> int:
    """Runs the benchmark; returns 1 after an error on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/base"), help="a training run")
    parser.add_argument(
        "--bundle", type=Path, default=Path("exports/models/cutline-base/1"), help="its export"
    )
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--tiny", action="store_true", help="random weights, drawn pictures")
    parser.add_argument("--count", type=int, default=500, help="images, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    arguments = parser.parse_args()
    try:
        with ExitStack() as stack:
            _benchmark(arguments, stack)
    except (UsageError, ExportsError, CaptionError, TrainerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    run, bundle, images = arguments.run, arguments.bundle, arguments.images
    if arguments.tiny:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run, bundle, drawn = random_run(Path(folder))
        images = images or drawn
    elif not (run / "recipe.json").exists():
        raise UsageError(NO_RUN.format(run))
    torch.set_num_threads(arguments.threads)
    source, served = Run(run), Served.load(bundle, threads=arguments.threads)
    captioner = round_weights(blended(source, served.manifest.provenance["blend"]))
    captioner.encoder.to(memory_format=torch.channels_last)  # convolves in half the time
    paths, pixels = _decode(images, served, arguments.count)
    generation = served.manifest.defaults
    runner = stack.enter_context(asyncio.Runner())

    rows: list[str] = []
    differing: dict[tuple[int, Ids, Ids], list[int]] = {}
    for batch in BATCHES:
        part = pixels[: len(pixels) - len(pixels) % batch]
        if not len(part):
            continue
        ours, peer = direct(served), generate(captioner, generation)
        sides = [ours, queued(served, batch, runner, stack), peer]
        _warm_up(sides, part, batch)
        half = generate(captioner, generation, bf16=True)
        if _seconds(half, part, batch) < _seconds(peer, part, batch):
            sides.append(half)
        _measure(sides, part, batch, arguments.rounds)
        rows += _rows(sides, peer, batch)
        for place, (our_ids, their_ids) in enumerate(zip(ours.found, peer.found, strict=True)):
            if our_ids != their_ids:
                differing.setdefault((place, our_ids, their_ids), []).append(batch)

    words = " ".join(f"{name}={value}" for name, value in generation.model_dump().items())
    print(f"\n{served.name}@{served.version}, {len(pixels)} images, {words}\n\n{HEAD}")
    print("\n".join(rows), end="\n\n")
    for (place, our_ids, their_ids), batches in differing.items():
        # Scored by PyTorch, both of them: how near a tie it was.
        texts = [
            f"{source.tokenizer.decode(ids)!r} "
            f"({score(captioner, pixels[place], ids, generation.length_penalty):.5f})"
            for ids in (our_ids, their_ids)
        ]
        print(f"- {paths[place].name}, batch {batches}: {texts[0]}; `generate`: {texts[1]}")
    print(_machine(arguments))


def _decode(folder: Path | None, served: Served, count: int) -> tuple[list[Path], Pixels]:
    if folder is None or not folder.is_dir():
        raise UsageError("name a folder of photographs with --images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)[:count]
    if not paths:
        raise UsageError(f"{folder}: no {', '.join(sorted(SUFFIXES))} in there")
    return paths, np.stack([load_pixels(path, served.image_spec) for path in paths])


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


def _rows(sides: Sequence[Side], peer: Side, batch: int) -> Iterator[str]:
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
        yield f"| {' | '.join([*cells, *shares, f'{same:.1%}'])} |"


def _machine(arguments: argparse.Namespace) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    packages = ("onnxruntime", "torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{os.cpu_count()} cores of {(names or [platform.processor()])[0]}, {arguments.threads} "
        f"threads a side, medians of {arguments.rounds} rounds; Python "
        f"{platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
