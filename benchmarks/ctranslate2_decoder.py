"""The decoder alone in CTranslate2: does it say the same, and how fast is it?

    python benchmarks/ctranslate2_decoder.py --run runs/base --images DIR
    python benchmarks/ctranslate2_decoder.py --tiny

Image tokens come in, encoded beforehand, and token ids come out.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from ctranslate2_side import REQUIREMENT, CTranslate2, DecoderSide, Floats, Ids, Setting
from numpy.typing import NDArray
from peers import PeerError
from random_run import random_run

from exports.manifest import Generation
from trainer.captioner import Captioner
from trainer.decoding import TorchSteps, beam_search
from trainer.errors import TrainerError
from trainer.photos import load_pixels
from trainer.run import Run

BATCHES = (1, 8, 32)
TYPES = ("float32", "int8")  # on a CPU its int8 is its int8_float32
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif"}
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
HEAD = """\
| batch | weights | setting | ms an image | before the first step | same captions | fastest with |
|---|---|---|---|---|---|---|"""


class UsageError(Exception):
    """What the command line names is not there."""


def main() -> int:
    """Runs the benchmark; returns 1 after an error on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/base"), help="a training run")
    parser.add_argument("--images", type=Path, help="a folder of photographs")
    parser.add_argument("--tiny", action="store_true", help="random weights, drawn pictures")
    parser.add_argument("--count", type=int, default=64, help="images, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    try:
        with ExitStack() as stack:
            _benchmark(arguments, stack)
    except (UsageError, PeerError, TrainerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    run, images = arguments.run, arguments.images
    if arguments.tiny:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        run, _, drawn = random_run(Path(folder))
        images = images or drawn
    captioner = Run(run).captioner()
    memory = encode(captioner, _decode(images, captioner, arguments.count))
    peers = {
        kind: CTranslate2(
            captioner, memory, compute_type=kind, threads=arguments.threads, stack=stack
        )
        for kind in TYPES
    }
    expected = {
        setting: reference(captioner, memory, setting.generation) for setting in (*TIMED, GREEDY)
    }
    rows: list[str] = []
    for batch in BATCHES:
        if batch <= len(memory):
            places = range(len(memory) - len(memory) % batch)
            sides = _measure(peers, places, batch, arguments.rounds)
            rows += _rows(sides, peers, expected, batch)
    print(f"\n{REQUIREMENT}, {len(memory)} images, {arguments.threads} threads at most\n\n{HEAD}")
    print("\n".join(rows), end="\n\n")
    for kind, peer in peers.items():
        found = peer.decode(range(len(memory)), BATCHES[0], GREEDY).ids
        same = sum(a == b for a, b in zip(found, expected[GREEDY], strict=True))
        error = worst_error(captioner, memory, peer, expected[NATURAL])
        print(
            f"{kind}: {same} of {len(memory)} greedy captions are PyTorch's; the log-probabilities "
            f"of its captions' tokens differ by {error:.1e} at most"
        )


def encode(captioner: Captioner, pixels: NDArray[np.uint8]) -> Floats:
    """Returns the memory (n, N, D) of pixels (n, H, W, 3)."""
    with torch.inference_mode():
        parts = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(16)
        return torch.cat([captioner.encode(part) for part in parts]).numpy()


class MemorySteps(TorchSteps):
    """The PyTorch decoder, started on memory (B, N, D) in place of images.

    Where the end token is banned throughout, it is banned as CTranslate2 does it, before the
    softmax: the log-probabilities of the others go up. Ours, as `transformers`, leaves them.
    """

    def __init__(self, captioner: Captioner, *, endless: bool) -> None:
        super().__init__(captioner)
        self._endless = endless

    @torch.inference_mode()
    def start(self, images: NDArray[Any]) -> Any:
        """See `StepModel`."""
        captioner = self._captioner
        memory = captioner.decoder.memory_cache(torch.from_numpy(images))
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


def reference(captioner: Captioner, memory: Floats, generation: Generation) -> list[Ids]:
    """Returns what the project's own beam search says, slowly."""
    steps = MemorySteps(captioner, endless=generation.min_new_tokens == generation.max_new_tokens)
    found = beam_search(steps, memory, generation)  # type: ignore[arg-type]
    return [hypotheses[0].token_ids for hypotheses in found]


@torch.inference_mode()
def worst_error(
    captioner: Captioner, memory: Floats, peer: CTranslate2, captions: Sequence[Ids]
) -> float:
    """Returns the largest difference from PyTorch in a token's log-probability."""
    text = captioner.text
    bare = [tuple(token for token in ids if token != text.eos_id) for ids in captions]
    differences = []
    for place, theirs in enumerate(peer.log_probs(range(len(memory)), bare)):
        tokens = torch.tensor([[text.bos_id, *bare[place], text.eos_id]])
        logits = captioner.decoder(tokens[:, :-1], torch.from_numpy(memory[place : place + 1]))
        ours = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).flatten()
        differences.append(float((ours - torch.tensor(theirs)).abs().max()))
    return max(differences)


def _decode(folder: Path | None, captioner: Captioner, count: int) -> NDArray[np.uint8]:
    if folder is None or not folder.is_dir():
        raise UsageError("name a folder of photographs with --images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)[:count]
    if not paths:
        raise UsageError(f"{folder}: no {', '.join(sorted(SUFFIXES))} in there")
    return np.stack([load_pixels(path, captioner.image) for path in paths])


Sides = dict[tuple[str, Setting], DecoderSide]


def _measure(
    peers: dict[str, CTranslate2], places: Sequence[int], batch: int, rounds: int
) -> Sides:
    """Returns the sides, each of which has captioned every image in each round."""
    sides: Sides = {
        (kind, setting): DecoderSide(f"{kind}, {setting.name}", peer.decode)
        for setting in (*TIMED, FEW, MANY)
        for kind, peer in peers.items()
    }
    for peer in peers.values():
        peer.decode(places[:batch], batch, FIXED)  # chooses its knobs
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
    sides: Sides,
    peers: dict[str, CTranslate2],
    expected: dict[Setting, list[Ids]],
    batch: int,
) -> Iterator[str]:
    """Yields rows for the table; times are medians over the rounds."""
    for kind, peer in peers.items():
        few, many = (
            1000 * median(sides[kind, s].seconds) / len(sides[kind, s].found) for s in (FEW, MANY)
        )
        before = few - (many - few) / 8
        for setting in TIMED:
            side = sides[kind, setting]
            ms = 1000 * median(side.seconds) / len(side.found)
            wanted = expected[setting][: len(side.found)]
            same = mean(a == b for a, b in zip(side.found, wanted, strict=True))
            cells = [str(batch), kind, setting.name, f"{ms:.2f}", f"{before:.2f}", f"{same:.1%}"]
            yield f"| {' | '.join([*cells, peer.knobs(batch)])} |"


if __name__ == "__main__":
    sys.exit(main())
