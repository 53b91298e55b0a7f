"""What captions are worth: figures with intervals, differences, what reranking comes to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exports.manifest import Reranking
from trainer import variants
from trainer.intervals import Interval, bootstrap, paired_difference
from trainer.reranking import EVIDENCE, Judged, reranked


def score_all(references: Sequence[Sequence[str]], captions: Sequence[str]) -> dict[str, Interval]:
    """Returns every metric's figures with bootstrap 95 % intervals."""
    figures: dict[str, Interval] = {}
    for name in variants.names("metrics"):
        figures |= bootstrap(variants.load("metrics", name).score(references, captions))
    return figures


def as_json(figures: dict[str, Interval]) -> dict[str, Any]:
    """Returns each figure as [value, low, high], rounded to 4 digits; None where it has no value.

    CIDEr-D of a single image has none, and JSON has no word for it.
    """
    return {
        name: [
            None if math.isnan(number) else round(number, 4)
            for number in (figure.value, figure.low, figure.high)
        ]
        for name, figure in figures.items()
    }


def differences_of(
    references: Sequence[Sequence[str]], captions: Sequence[str], others: Sequence[str]
) -> dict[str, Interval]:
    """Returns the figures of captions minus those of others, with paired 95 % intervals."""
    found: dict[str, Interval] = {}
    for name in ("cider", "bleu", "rouge"):
        score = variants.load("metrics", name).score
        found |= paired_difference(score(references, captions), score(references, others))
    return found


@dataclass(frozen=True, slots=True)
class RerankFigures:
    """What reranking by one kind of evidence comes to.

    Attributes:
        weight: of the search's own score, 1 being the search alone.
        figures: of the reranked captions.
        gain: their difference from the captions that the search alone puts first.
        changed: images whose caption is another.
    """

    weight: float
    figures: dict[str, Interval]
    gain: dict[str, Interval]
    changed: int

    def as_json(self) -> dict[str, Any]:
        """Returns the fields by name."""
        return {
            "weight": self.weight,
            "figures": as_json(self.figures),
            "gain": as_json(self.gain),
            "changed": self.changed,
        }


def rerank_figures(
    lists: Sequence[Sequence[Judged]],
    reranking: Reranking,
    references: Sequence[Sequence[str]],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, RerankFigures]:
    """Returns, by evidence, the figures of reranked captions against the search's own first."""
    plain = [decode(own[0].hypothesis.token_ids) for own in lists]
    found: dict[str, RerankFigures] = {}
    for evidence in EVIDENCE:
        best = reranked(lists, reranking, evidence)
        captions = [decode(hypothesis.token_ids) for hypothesis in best]
        found[evidence] = RerankFigures(
            reranking.weight(evidence),
            score_all(references, captions),
            differences_of(references, captions, plain),
            sum(one != other for one, other in zip(captions, plain, strict=True)),
        )
    return found
