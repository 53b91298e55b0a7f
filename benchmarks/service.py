"""This service against LitServe and BentoML around `generate`: the same weights, over HTTP.

    python benchmarks/service.py --run runs/base --bundle exports/models/cutline-base/2 --images DIR
    python benchmarks/service.py --sides plain,ray ...         without peers, and without a run

One server runs at a time. Closed loops (each client sends when it is answered) find what a side can
do; open loops (photographs arrive at random, whether or not others are answered) send to every side
the same load and show what one waits.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from client import Load, arrivals, closed_loop, open_loop, upload
from common import (
    UsageError,
    as_jpeg,
    check_run,
    compares,
    machine,
    main,
    parser,
    photographs,
    table,
)
from environments import PEERS as ENVIRONMENTS
from environments import python_with
from measured import Measured
from peers import PINS, choices
from PIL import Image
from servers import Command, ours, running

from exports.bundle import Bundle
from exports.images import ImageSpec, preprocess
from serving.captioner import Captioner
from serving.errors import CaptionFailed
from serving.params import Params

PATHS = {
    "plain": "/v1/captions",
    "ray": "/v1/captions",
    "litserve": "/predict",
    "bentoml": "/predict",
}
PEERS = ("litserve", "bentoml")
CLIENTS = (1, 8, 32)
ALONE = 100  # images that a single client sends: it is the slowest load
SHARES = (0.5, 0.8)  # offered to all sides, of what the slowest one can do
TRIAL = 96  # requests that choose a peer's settings
BATCH = 32  # of the engine without a server
WARM_UP = 0.2  # share of an open loop's arrivals that do not count


@dataclass(frozen=True, slots=True)
class Offer:
    """An open loop: its name in the table, and when requests are due, in seconds."""

    name: str
    moments: list[float]


def _benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    sides = _sides(arguments.sides)
    against = bool(set(sides) & set(PEERS))
    if against:
        check_run(arguments.run)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    jpegs = [as_jpeg(path) for path in photographs(arguments.images, arguments.count)]
    engine = Captioner.load(arguments.bundle, threads=arguments.threads)
    pixels = np.stack([_decoded(jpeg, engine.image_spec) for jpeg in jpegs])
    if against:
        expected, python = (
            _generated(arguments, pixels, engine),
            python_with(PINS, arguments.peers / "servers", sees_project=True),
        )
    else:
        expected = [text for part in _offline(engine, pixels) for text in part]
    commands, notes = {}, []
    for side in sides:
        if side in PEERS:
            commands[side], words = _fastest(side, python, arguments, jpegs)
            notes.append(f"{side}: {words}")
        else:
            registry, ray = folder / "registry", side == "ray"
            commands[side] = ours(arguments.bundle, registry, arguments.threads, ray=ray)

    found = Measured(sides, expected)
    for number in range(arguments.rounds):
        found.offline.append(_offline_rate(engine, pixels))
        for side in _rotated(sides, number):
            _closed(commands[side], side, jpegs, found)
        print(f"closed loops: round {number + 1} of {arguments.rounds}", file=sys.stderr)
    slowest = min(found.rate(_closed_name(CLIENTS[-1]), side) for side in sides)
    if not slowest:
        raise UsageError("a side answered nothing but errors")
    for number in range(arguments.rounds):
        offers = [_offer(share, slowest, arguments.seconds, number) for share in SHARES]
        for side in _rotated(sides, number):
            _open(commands[side], side, jpegs, found, offers)
        print(f"open loops: round {number + 1} of {arguments.rounds}", file=sys.stderr)
    _report(arguments, engine, found, notes)


def _report(
    arguments: argparse.Namespace, engine: Captioner, found: Measured, notes: Sequence[str]
) -> None:
    defaults = engine.manifest.defaults.model_dump()
    words = " ".join(f"{name}={value}" for name, value in defaults.items())
    print(f"\n{engine.name}@{engine.version}, {len(found.expected)} photographs, {words}\n")
    print(table(found.HEAD, found.rows()), end="\n\n")
    reference = "`generate`" if notes else "the engine offline"
    lines = [*found.ratios(_closed_name(CLIENTS[-1])), *notes]
    lines.append(f"same captions: as {reference}")
    lines.append(f"the client's own work: {found.client_ms():.2f} ms of a core a request")
    print("\n".join(f"- {line}" for line in lines), end="\n\n")
    packages = ("onnxruntime", "ray", *(("torch", "transformers") if notes else ()), "numpy")
    line = machine(arguments.threads, f"medians of {arguments.rounds} rounds", packages)
    print(", ".join((line, *(pin.replace("==", " ") for pin in PINS if notes))))


def _sides(names: str) -> list[str]:
    sides = list(dict.fromkeys(names.split(",")))
    if wrong := set(sides) - set(PATHS):
        raise UsageError(f"--sides: {', '.join(sorted(wrong))}: there are {', '.join(PATHS)}")
    return sides


def _decoded(jpeg: bytes, spec: ImageSpec) -> np.ndarray:
    with Image.open(BytesIO(jpeg)) as image:
        return preprocess(image, spec)


def _closed_name(clients: int) -> str:
    return f"{clients} client{'s' * (clients > 1)}"


def _offer(share: float, slowest: float, seconds: float, number: int) -> Offer:
    """Returns an open loop whose arrivals are the same for all sides, and others in each round."""
    rate = share * slowest
    moments = arrivals(rate, seconds / (1 - WARM_UP), seed=round(100 * share) + 1000 * number)
    return Offer(f"{rate:.1f} a second", moments)


def _batches(pixels: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(pixels), BATCH):
        yield pixels[start : start + BATCH]


def _offline(engine: Captioner, pixels: np.ndarray) -> Iterator[list[str]]:
    """Yields the captions of each batch, by the engine alone."""
    params = Params.of(engine.manifest.defaults)
    for part in _batches(pixels):
        found = engine.caption_batch(part, [params] * len(part))
        yield ["" if isinstance(one, CaptionFailed) else one[0].text for one in found]


def _offline_rate(engine: Captioner, pixels: np.ndarray) -> float:
    began = time.perf_counter()
    for _ in _offline(engine, pixels):
        pass
    return len(pixels) / (time.perf_counter() - began)


def _generated(arguments: argparse.Namespace, pixels: np.ndarray, engine: Captioner) -> list[str]:
    """Returns the captions by `generate`."""
    from contenders import generate, pytorch  # here: without peers, no PyTorch is needed

    from trainer.errors import TrainerError

    try:
        captioner = pytorch(arguments.run, arguments.bundle, arguments.threads)
    except TrainerError as error:
        raise UsageError(str(error)) from error
    tokenizer = Bundle.open(arguments.bundle).tokenizer()
    side = generate(captioner, engine.manifest.defaults)
    return [tokenizer.decode(ids) for ids in side.caption(pixels, BATCH)]


def _fastest(
    peer: str, python: Path, arguments: argparse.Namespace, jpegs: Sequence[bytes]
) -> tuple[Command, str]:
    """Returns how a peer is started to caption most at many clients, and its settings in words."""
    tried: list[tuple[float, str, Command]] = []
    for words, command in choices(peer, python, arguments.run, arguments.bundle, arguments.threads):
        with running(command) as server:
            requests = [upload(server.port, PATHS[peer], jpeg) for jpeg in jpegs]
            load = _warm(server.port, requests, CLIENTS[-1], min(TRIAL, 3 * len(jpegs)))
        print(f"{peer}, {words}: {load.rate:.1f} captions/s", file=sys.stderr)
        tried.append((load.rate, words, command))
    _, words, command = max(tried, key=lambda entry: entry[0])
    return command, words


def _warm(port: int, requests: Sequence[bytes], clients: int, count: int) -> Load:
    """Measures a closed loop when its like has run for a while; BentoML learns from the past."""
    closed_loop(port, requests, clients=clients, count=2 * clients + 8)
    return closed_loop(port, requests, clients=clients, count=count)


def _closed(command: Command, side: str, jpegs: Sequence[bytes], found: Measured) -> None:
    with running(command) as server:
        requests = [upload(server.port, PATHS[side], jpeg) for jpeg in jpegs]
        for clients in CLIENTS:
            count = len(jpegs) if clients > 1 else min(len(jpegs), ALONE)
            found.add(_closed_name(clients), side, _warm(server.port, requests, clients, count))


def _open(
    command: Command, side: str, jpegs: Sequence[bytes], found: Measured, offers: Sequence[Offer]
) -> None:
    with running(command) as server:
        requests = [upload(server.port, PATHS[side], jpeg) for jpeg in jpegs]
        for offer in offers:
            early = int(WARM_UP * len(offer.moments))
            load = open_loop(server.port, requests, offer.moments, warm_up=early)
            found.add(offer.name, side, load)


def _rotated(sides: Sequence[str], number: int) -> Sequence[str]:
    first = number % len(sides)
    return [*sides[first:], *sides[:first]]


if __name__ == "__main__":
    arguments = compares(parser(__doc__))
    arguments.add_argument("--sides", default=",".join(PATHS), help="default: %(default)s")
    arguments.add_argument("--seconds", type=float, default=40.0, help="of each open loop")
    arguments.add_argument("--peers", type=Path, default=ENVIRONMENTS, metavar="DIR")
    sys.exit(main(_benchmark, arguments.parse_args()))
