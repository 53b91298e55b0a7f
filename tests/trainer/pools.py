"""Pools of made-up features, and a captioner that says what its rows decide."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import variants
from trainer.acquisition._pool import Pool

WORDS = ("dog", "cat", "bus", "tree", "red", "blue", "runs", "sits", "near", "far")


class FakeSpeaker:
    """Says one caption of the even rows again and again, and anything of the odd ones."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def samples(
        self, rows: Sequence[int], count: int, *, top_p: float, max_new_tokens: int
    ) -> list[list[str]]:
        self.asked += rows
        return [self._said(row, count, max_new_tokens) for row in rows]

    def _said(self, row: int, count: int, words: int) -> list[str]:
        draw = np.random.default_rng(row)
        captions = [" ".join(draw.choice(WORDS, min(words, 6))) for _ in range(count)]
        return captions if row % 2 else captions[:1] * count

    def gradients(self, rows: Sequence[int], width: int) -> NDArray[np.float32]:
        self.asked += rows
        found = [np.random.default_rng(row).normal(size=width) for row in rows]
        return np.array(found, np.float32)


def unit(features: NDArray[Any]) -> NDArray[np.float32]:
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def some_features(count: int, width: int = 8, seed: int = 0) -> NDArray[np.float32]:
    return unit(np.random.default_rng(seed).normal(size=(count, width)))


def make_pool(
    features: NDArray[np.float32],
    *,
    labelled: Sequence[int] = (),
    groups: Sequence[int] | None = None,
    budget: int = 8,
    **keys: Any,
) -> Pool:
    """A pool whose images are all different unless `groups` says otherwise."""
    known = np.zeros(len(features), np.bool_)
    known[list(labelled)] = True
    own = np.arange(len(features)) if groups is None else np.array(groups)
    return Pool.of(features, known, own, budget=budget, **keys)


def acquisition(name: str, **keys: Any) -> Any:
    module, config = variants.parse("acquisition", {"name": name, **keys})
    return module.Acquisition(config)
