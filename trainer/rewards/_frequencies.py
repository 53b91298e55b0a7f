"""The document frequencies that a run's rewards weigh words by: counted once, kept in its folder.

With a hundred captions nearly every word is in one image or in all, so that CIDEr-D hardly knows a
telling word from a rare one. The captions of a larger corpus, of whatever images, tell it.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from exports.wording import words
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.data import Example
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.metrics._hashes import count_ngrams, places_of
from trainer.metrics.cider import DocumentFrequencies
from trainer.readers import read_rows
from trainer.rewards._reward import END, marked
from trainer.run import FREQUENCIES

_PROBE = "A man's T-shirt, 2 dogs . Caf\u00e9 cafe\u0301 \u0939\u093f\u0928\u094d\u0926\u0940"
_LEAST_KNOWN = 0.5  # of the words of the references


def count_corpus(source: Path) -> DocumentFrequencies:
    """Returns the frequencies of a captions file, ends included; its images are not looked for.

    Raises:
        DataError: it cannot be read, or holds no caption.
    """
    _, rows = read_rows(source)
    captions: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        captions[row.image] += marked(row.captions)
    references = [own for own in captions.values() if own]
    if not references:
        raise DataError(f"objective.frequencies = {source}: it holds no caption")
    return DocumentFrequencies.of(references)


def keep_frequencies(source: Path, folder: Path) -> Path:
    """Counts a captions file unless a run's folder has its table already; returns the table."""
    table = folder / FREQUENCIES
    if not table.exists():
        found = count_corpus(source)
        print(f"{source}: frequencies of {len(found.counts)} n-grams over {found.images} images")
        save_checkpoint(
            table,
            {
                "numbers": torch.from_numpy(found.numbers.view(np.int64)),
                "counts": torch.from_numpy(found.counts),
            },
            {"images": found.images, "rule": rule()},
        )
    return table


def read_frequencies(source: Path, examples: Sequence[Example]) -> DocumentFrequencies:
    """Returns the frequencies of a table or of a captions file.

    Raises:
        CheckpointError: the table is damaged, or its words were made by another rule.
        ConfigError: it knows few of the words of the examples.
    """
    found = _read_table(source) if source.name == FREQUENCIES else count_corpus(source)
    captions = [words(text) for example in examples for text in marked(example.captions)]
    ngrams = count_ngrams([[word] for word in {word for tokens in captions for word in tokens}])
    _, known = places_of(ngrams.numbers, found.numbers)
    if known.mean() < _LEAST_KNOWN:
        raise ConfigError(
            f"objective.frequencies = {source}: it has {known.mean():.0%} of the words of the "
            "training captions, so it would weigh them by chance; take a corpus in their language "
            "and of their kind"
        )
    return found


def _read_table(path: Path) -> DocumentFrequencies:
    tensors, state = load_checkpoint(path)
    if state.get("rule") != rule():
        raise CheckpointError(
            f"{path}: its words were made by another rule than rewards use now; remove it, and the "
            "captions file of objective.frequencies is counted anew"
        )
    numbers = tensors["numbers"].numpy().view(np.uint64)
    return DocumentFrequencies(numbers, tensors["counts"].numpy(), state["images"])


def rule() -> str:
    """Returns a hash of how captions become words and n-grams, the word for an end included.

    Rewards and table must agree on it, or no n-gram of the one is found in the other.
    """
    ngrams = count_ngrams([words(_PROBE + END)])
    made = json.dumps([ngrams.numbers.tolist(), ngrams.count.tolist()])
    return hashlib.sha256(made.encode()).hexdigest()
