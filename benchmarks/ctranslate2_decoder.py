"""The decoder alone in CTranslate2: does it say the same, and how fast is it?

    python benchmarks/ctranslate2_decoder.py --run runs/base --images DIR
    python benchmarks/ctranslate2_decoder.py --tiny

Image tokens come in, encoded beforehand, and token ids come out.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from common import check_run, compares, machine, main, parser, photographs, table
from ctranslate2_side import REQUIREMENT, CTranslate2, Decoded, DecoderSide, Floats, Ids, Setting
from numpy.typing import NDArray

from exports.manifest import Generation
from serving.captioner import Captioner
from serving.errors import CaptionError
from serving.params import Params
from trainer.captioner import Captioner as TorchCaptioner
from trainer.decoding import TorchSteps, beam_search
from trainer.errors import TrainerError
from trainer.photos import load_pixels
from trainer.run import Run

BATCHES = (1, 8, 32)
TYPES = ("float32", "int8")  # on a CPU its int8 is its int8_float32
FIXED = Setting("24 steps", Generation(min_new_tokens=24, max_new_tokens=24))
NATURAL = Setting("to the end", Generation())
PATIENT = Setting("to the end, patience 1.5", Generation(), 1.5)  # most like ours, see README
# What comes before the first step is told by two greedy runs.
FEW, MANY = (
    Setting(f"{n} greedy", Generation(num_beams=1, min_new_tokens=n, max_new_tokens=n))
    for n in (1, 9)
)
GREEDY = Setting("greedy", Generation(num_beams=1))
TIMED = (FIXED, NATURAL, PATIENT)
HEAD = (
    "batch",
    "engine",
    "setting",
    "ms an image",
    "before the first step",
    "steps, against CTranslate2 int8",
    "same captions",
    "fastest with",
)
OURS = "this engine"


class Ours:
    """This engine's decode steps on images that are encoded already, as `CTranslate2` has them."""

    def __init__(self, served: Captioner, pixels: NDArray[np.uint8]) -> None:
        self._served = served
        self._encoded = [
            one
            for start in range(0, len(pixels), 8)
            for one in served.encode(list(pixels[start : start + 8]))
        ]

    def decode(self, places: Sequence[int], batch: int, setting: Setting) -> Decoded:
        """See `ctranslate2_side.Decode`."""
        params = Params.of(setting.generation)
        found: dict[int, Ids] = {}
        started = time.perf_counter()
        for start in range(0, len(places), batch):
            running = {
                self._served.join(self._encoded[place], params): place
                for place in places[start : start + batch]
            }
            while running:
                for slot, captions in self._served.step():
                    if isinstance(captions, CaptionError):
                        raise captions
                    found[running.pop(slot)] = captions[0].token_ids
        return Decoded([found[place] for place in places], time.perf_counter() - started)

    def knobs(self, _: int) -> str:
        """Returns what it was tuned to: nothing."""
        return ""


Engines = dict[str, CTranslate2 | Ours]


def benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Prints the table and how near the translation is."""
    check_run(arguments.run)
    torch.set_num_threads(arguments.threads)
    captioner = Run(arguments.run).captioner()
    paths = photographs(arguments.images, arguments.count)
    pixels = np.stack([load_pixels(path, captioner.image) for path in paths])
    memory = encode(captioner, pixels)
    peers = {
        kind: CTranslate2(
            captioner, memory, compute_type=kind, threads=arguments.threads, stack=stack
        )
        for kind in TYPES
    }
    served = Captioner.load(arguments.bundle, threads=arguments.threads)
    engines: Engines = {OURS: Ours(served, pixels), **peers}
    expected = {
        setting: reference(captioner, memory, setting.generation) for setting in (*TIMED, GREEDY)
    }
    rows: list[list[str]] = []
    for batch in BATCHES:
        if batch <= len(memory):
            places = range(len(memory) - len(memory) % batch)
            sides = _measure(engines, places, batch, arguments.rounds)
            rows += _rows(sides, engines, expected, batch)
    print(f"\n{REQUIREMENT}, {len(memory)} images, beam 4\n")
    print(table(HEAD, rows), end="\n\n")
    for kind, peer in peers.items():
        found = peer.decode(range(len(memory)), BATCHES[0], GREEDY).ids
        same = sum(a == b for a, b in zip(found, expected[GREEDY], strict=True))
        error = worst_error(captioner, memory, peer, expected[NATURAL])
        print(
            f"{kind}: {same} of {len(memory)} greedy captions are PyTorch's; the log-probabilities "
            f"of its captions' tokens differ by {error:.1e} at most"
        )
    rounds = f"medians of {arguments.rounds} rounds"
    print(machine(arguments.threads, rounds, ("onnxruntime", "torch", "numpy")))


def encode(captioner: TorchCaptioner, pixels: NDArray[np.uint8]) -> Floats:
    """Returns the memory (n, N, D) of pixels (n, H, W, 3)."""
    with torch.inference_mode():
        parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(16)
        return torch.cat([captioner.encode(part) for part in parts]).numpy()


class MemorySteps(TorchSteps):
    """The PyTorch decoder, started on memory (B, N, D) in place of images.

    Where the end token is banned throughout, it is banned as CTranslate2 does it, before the
    softmax: the log-probabilities of the others go up. Ours, as `transformers`, leaves them.
    """

    def __init__(self, captioner: TorchCaptioner, *, endless: bool) -> None:
        super().__init__(captioner)
        self._endless = endless

    @torch.inference_mode()
    def start(self, images: NDArray[Any]) -> Any:
        """See `StepModel`."""
        captioner = self._captioner
        memory = captioner.decoder.memory(torch.from_numpy(images))
        return memory, captioner.empty_cache(len(images))

    def step(
        self, state: Any, token_ids: Sequence[int], beam_index: Sequence[int], top_k: int
    ) -> tuple[Any, Floats, NDArray[np.int64]]:
        """See `StepModel`."""
        if not self._endless:
            return super().step(state, token_ids, beam_index, top_k)
        state, log_probs, ids = super().step(state, token_ids, beam_index, self.vocab_size)
        others = np.where(ids == self.eos_id, -np.inf, log_probs)
        log_probs = log_probs - np.log(np.exp(others).sum(1, keepdims=True))
        return state, log_probs[:, :top_k], ids[:, :top_k]


def reference(captioner: TorchCaptioner, memory: Floats, generation: Generation) -> list[Ids]:
    """Returns what the project's own beam search says, slowly."""
    steps = MemorySteps(captioner, endless=generation.min_new_tokens == generation.max_new_tokens)
    found = beam_search(steps, memory, generation)  # type: ignore[arg-type]
    return [hypotheses[0].token_ids for hypotheses in found]


@torch.inference_mode()
def worst_error(
    captioner: TorchCaptioner, memory: Floats, peer: CTranslate2, captions: Sequence[Ids]
) -> float:
    """Returns the largest difference from PyTorch in a token's log-probability."""
    text = captioner.text
    bare = [tuple(token for token in ids if token != text.eos_id) for ids in captions]
    differences = []
    for place, theirs in enumerate(peer.log_probs(range(len(memory)), bare)):
        tokens = torch.tensor([[text.bos_id, *bare[place], text.eos_id]])
        seen = captioner.decoder.memory(torch.from_numpy(memory[place : place + 1]))
        logits = captioner.decoder(tokens[:, :-1], seen)
        ours = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).flatten()
        differences.append(float((ours - torch.tensor(theirs)).abs().max()))
    return max(differences)


Sides = dict[tuple[str, Setting], DecoderSide]


def _measure(engines: Engines, places: Sequence[int], batch: int, rounds: int) -> Sides:
    """Returns the sides, each of which has captioned every image in each round."""
    sides: Sides = {
        (kind, setting): DecoderSide(f"{kind}, {setting.name}", engine.decode)
        for setting in (*TIMED, FEW, MANY)
        for kind, engine in engines.items()
        if kind != OURS or setting is not PATIENT  # ours is as patient as can be
    }
    for engine in engines.values():
        engine.decode(places[:batch], batch, FIXED)  # warms up, or chooses its knobs
    order = list(sides.items())
    for number in range(rounds):
        shift = number % len(order)
        for (_, setting), side in (*order[shift:], *order[:shift]):
            decoded = side.decode(places, batch, setting)
            side.seconds.append(decoded.seconds)
            side.found = decoded.ids
        print(f"batch {batch}: round {number + 1} of {rounds}", file=sys.stderr)
    return sides


def _rows(
    sides: Sides, engines: Engines, expected: dict[Setting, list[Ids]], batch: int
) -> Iterator[list[str]]:
    """Yields rows for the table; times are medians over the rounds.

    What comes before the first step is not ours to compare: this engine's encoder does it.
    """
    before = {kind: _before(sides, kind) for kind in engines}
    for (kind, setting), side in sides.items():
        if setting in (FEW, MANY):
            continue
        peer = sides["int8", setting]
        mine, theirs = _each(side) - before[kind], _each(peer) - before["int8"]
        wanted = expected[setting][: len(side.found)]
        same = mean(a == b for a, b in zip(side.found, wanted, strict=True))
        yield [
            str(batch),
            OURS if kind == OURS else f"CTranslate2 {kind}",
            setting.name,
            f"{_each(side):.2f}",
            f"{before[kind]:.2f}",
            f"{theirs / mine:.2f}x",
            f"{same:.1%}",
            engines[kind].knobs(batch),
        ]


def _each(side: DecoderSide) -> float:
    return 1000 * median(side.seconds) / len(side.found)


def _before(sides: Sides, kind: str) -> float:
    few, many = _each(sides[kind, FEW]), _each(sides[kind, MANY])
    return max(few - (many - few) / 8, 0.0)


if __name__ == "__main__":
    arguments = compares(parser(__doc__))
    arguments.set_defaults(count=64, rounds=5)
    sys.exit(main(benchmark, arguments.parse_args(), TrainerError))
