"""CIDEr-D, captions a second: this project's against pycocoevalcap's, same captions, same idf.

    python benchmarks/cider.py --captions FLICKR8K/captions_dev.json \
        --corpus FLICKR8K/captions_train.json
    python benchmarks/cider.py --tiny

Of each image the first caption is scored against the others. The values must be equal.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import environments
import numpy as np
from common import ROOT, UsageError, machine, main, table

from exports.wording import ngrams, words
from trainer.errors import DataError
from trainer.metrics.cider import ORDERS, CiderD, DocumentFrequencies, score
from trainer.readers import read_rows

REQUIREMENT = "pycocoevalcap==1.2"
_INSIDE = "CUTLINE_BENCHMARK_INSIDE"
_TOLERANCE = 1e-6

Captions = list[list[str]]
Side = Callable[[], "np.ndarray[Any, np.dtype[np.float64]]"]


def benchmark(arguments: argparse.Namespace, stack: ExitStack) -> None:
    """Prints the table, from within the peer's environment."""
    del stack
    if _INSIDE not in os.environ:
        python = environments.python_with(
            [REQUIREMENT], environments.PEERS / "pycocoevalcap", sees_project=True
        )
        inside = {**os.environ, _INSIDE: "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([python, *sys.argv], env=inside)
        if done.returncode:
            raise UsageError("the benchmark did not come to its end; see above")
        return
    groups, corpus = captions_of(arguments)
    candidates, references = [own[0] for own in groups], [own[1:] for own in groups]
    rounds = f"median of {arguments.rounds} rounds"
    print(machine(1, rounds, ["numpy", "pycocoevalcap"]))
    print(f"{len(groups)} captions, document frequencies of {len(corpus)} images\n")
    rows = []
    for title, sides in (
        (
            f"a reward, {arguments.batch} at a time",
            (
                our_reward(references, candidates, corpus, arguments.batch),
                their_reward(references, candidates, corpus, arguments.batch),
            ),
        ),
        (
            "a corpus, nothing prepared",
            (lambda: score(references, candidates).per_image[:, 0], their_corpus(groups)),
        ),
    ):
        seconds = by_turns(sides, arguments.rounds)
        ours, theirs = (len(groups) / taken for taken in seconds)
        rows.append([title, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}x"])
    print(table(["captions a second", "ours", "pycocoevalcap", "ours / theirs"], rows))


def captions_of(arguments: argparse.Namespace) -> tuple[Captions, Captions]:
    """Returns the captions of each image, and those that document frequencies are of."""
    if arguments.drawn:
        return drawn(100), drawn(300)
    if arguments.captions is None:
        raise UsageError("name a captions file with --captions, or add --tiny")
    groups = read(arguments.captions)
    if not all(len(own) > 1 for own in groups):
        raise UsageError(f"{arguments.captions}: every image needs two captions or more")
    return groups, groups if arguments.corpus is None else read(arguments.corpus)


def read(path: Path) -> Captions:
    """Returns the captions of each image of a file."""
    found: dict[str, list[str]] = {}
    for row in read_rows(path)[1]:
        found.setdefault(row.image, []).extend(row.captions)
    return [own for own in found.values() if own]


def drawn(images: int) -> Captions:
    """Returns five captions for each of some images, of words as frequent as Zipf has them."""
    draw = random.Random(images)
    vocabulary = [f"word{number}" for number in range(200)]
    weights = [1 / (number + 1) for number in range(200)]
    return [
        [" ".join(draw.choices(vocabulary, weights, k=draw.randint(6, 14))) for _ in range(5)]
        for _ in range(images)
    ]


def our_reward(
    references: Captions, candidates: Sequence[str], corpus: Captions, batch: int
) -> Side:
    """Returns what scores all candidates, batch by batch, against references that are prepared."""
    scorer = CiderD(references, frequencies=DocumentFrequencies.of(corpus))
    starts = range(0, len(candidates), batch)

    def run() -> "np.ndarray[Any, np.dtype[np.float64]]":
        parts = [candidates[start : start + batch] for start in starts]
        return np.concatenate(
            [
                scorer.scores(range(start, start + len(part)), part)
                for start, part in zip(starts, parts, strict=True)
            ]
        )

    return run


class _AsLong(list[Any]):
    """References of a batch that say they are a whole corpus: the peer takes idf from their number.

    Args:
        rows: the references.
        images: of the corpus.
    """

    def __init__(self, rows: Sequence[Any], images: int) -> None:
        super().__init__(rows)
        self._images = images

    def __len__(self) -> int:
        return self._images


def their_reward(
    references: Captions, candidates: Sequence[str], corpus: Captions, batch: int
) -> Side:
    """Returns the peer's scores of the same batches with the same document frequencies.

    Its captions come split into words, which its Java tokeniser would do; it counts the n-grams of
    references anew in every call, since it has no place to keep them.
    """
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    frequencies: Counter[Any] = Counter()
    for own in corpus:
        split = [words(caption) for caption in own]
        frequencies.update({one for t in split for order in ORDERS for one in ngrams(t, order)})
    pairs = list(zip(spelt(candidates), map(spelt, references), strict=True))

    def run() -> "np.ndarray[Any, np.dtype[np.float64]]":
        found: list[float] = []
        for start in range(0, len(pairs), batch):
            scorer = CiderScorer()
            scorer.document_frequency = frequencies
            for pair in pairs[start : start + batch]:
                scorer += pair
            scorer.crefs = _AsLong(scorer.crefs, len(corpus))
            found += scorer.compute_cider()
        return np.array(found)

    return run


def their_corpus(groups: Captions) -> Side:
    """Returns the peer's usual call: everything from the captions on, words already split."""
    from pycocoevalcap.cider.cider import Cider

    truth = {number: spelt(own[1:]) for number, own in enumerate(groups)}
    said = {number: spelt(own[:1]) for number, own in enumerate(groups)}

    def run() -> "np.ndarray[Any, np.dtype[np.float64]]":
        found: np.ndarray[Any, np.dtype[np.float64]] = Cider().compute_score(truth, said)[1]
        return found

    return run


def spelt(captions: Sequence[str]) -> list[str]:
    """Returns captions as words with a space between them."""
    return [" ".join(words(caption)) for caption in captions]


def by_turns(sides: Sequence[Side], rounds: int) -> list[float]:
    """Returns the median seconds of each side, which take turns.

    They are those of the processor, so that what else runs on the machine counts for less.

    Raises:
        UsageError: they do not give the same values.
    """
    first, *others = [side() for side in sides]
    for other in others:
        apart = float(np.abs(first - other).max())
        if not apart < _TOLERANCE:
            raise UsageError(f"the two sides differ by {apart:.1e}: they score different things")
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, taken in zip(sides, seconds, strict=True):
            started = time.process_time()
            side()
            taken.append(time.process_time() - started)
    return [statistics.median(taken) for taken in seconds]


def command_line() -> argparse.ArgumentParser:
    """Returns the parser."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--captions", type=Path, help="a captions file, two or more an image")
    made.add_argument("--corpus", type=Path, help="whose document frequencies are used")
    made.add_argument("--batch", type=int, default=160, help="32 images, 5 samples each")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--tiny", dest="drawn", action="store_true", help="drawn captions")
    made.set_defaults(tiny=False)
    return made


if __name__ == "__main__":
    sys.exit(main(benchmark, command_line().parse_args(), DataError))
