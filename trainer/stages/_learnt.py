"""`learnt.json` of a run: who wrote what it learnt from, and how long it took."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.checkpoint import load_checkpoint
from trainer.config import Config, validate, write_resolved
from trainer.data import Example
from trainer.distributed import rank
from trainer.loop import TrainingLoop

LEARNT = "learnt.json"


class Learnt(Config):
    """What a run that is done learnt from and took."""

    images: int
    captions: dict[str, int]
    """How many of each source; empty where it reads none."""
    seconds: float | None
    """Of all steps, at the speed of those that were measured: a run that was killed counts as fast
    as its last part. None where all steps were made before."""


@contextmanager
def recorded(
    loop: TrainingLoop, folder: Path, examples: Sequence[Example], *, captions: bool
) -> Iterator[None]:
    """Writes `learnt.json` to a run's folder when the training within is done.

    Args:
        loop: That makes its steps.
        folder: Of the run.
        examples: That it learns from.
        captions: Whether it reads their captions.
    """
    checkpoint = loop.checkpoint
    begun = load_checkpoint(checkpoint)[1]["step"] if checkpoint.exists() else 0
    since = time.perf_counter()
    yield
    elapsed, total = time.perf_counter() - since, loop.last
    if rank():
        return
    counts: Counter[str] = Counter()
    for example in examples if captions else ():
        counts[example.source] += len(example.captions)
    before = read_learnt(folder)
    seconds = None if before is None else before.seconds
    if begun < total:
        seconds = elapsed * total / (total - begun)
    images = len({example.image for example in examples})
    write_resolved(Learnt(images=images, captions=dict(counts), seconds=seconds), folder / LEARNT)


def read_learnt(folder: Path) -> Learnt | None:
    """Returns what a run recorded; None where it is not done, or older than the record."""
    path = folder / LEARNT
    if not path.exists():
        return None
    return validate(Learnt, json.loads(path.read_text(encoding="utf-8")), str(path))
