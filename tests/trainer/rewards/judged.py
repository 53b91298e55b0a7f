"""What rewards are given in their tests: three images, their captions, and captions drawn."""

import json
from pathlib import Path

import numpy as np
import torch

from trainer.data import Example
from trainer.metrics.cider import DocumentFrequencies
from trainer.rewards._reward import Sampled, Sources, marked

EXAMPLES = [
    Example(
        Path("photos/a/dog.jpg"),
        ("a dog runs on the grass", "a brown dog is running in a field"),
        None,
    ),
    Example(
        Path("photos/a/bus.jpg"),
        ("a red bus parked on the street", "a bus on a city street"),
        None,
    ),
    Example(
        Path("photos/b/bus.jpg"),
        ("two people ride bikes near the sea", "people riding bicycles by the ocean"),
        None,
    ),
]


def sources(**changes: object) -> Sources:
    frequencies = DocumentFrequencies.of([marked(example.captions) for example in EXAMPLES])
    written = [example.captions for example in EXAMPLES]
    return Sources(EXAMPLES, written, frequencies, **changes)  # type: ignore[arg-type]


def sampled(*texts: str, examples: tuple[int, ...] = (), ended: bool = True) -> Sampled:
    """Captions of one image, by default the first, or each of the image beside it."""
    numbers = examples or (0,) * len(texts)
    images = torch.randint(
        0,
        256,
        (len(set(numbers)), 3, 32, 32),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    return Sampled(texts, [ended] * len(texts), numbers, images)


def label_file(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def alone(reward, one: Sampled) -> np.ndarray:
    """The scores of captions that are judged one at a time."""
    own = len(one.texts) // len(one.images)
    rows = range(len(one.texts))
    return np.concatenate(
        [
            reward.scores(
                Sampled(
                    [one.texts[row]],
                    [one.ended[row]],
                    [one.references[row]],
                    one.images[row // own : row // own + 1],
                )
            )
            for row in rows
        ]
    )
