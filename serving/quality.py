"""What captions look like as they go out: how sure the model was, and the faults that show."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

from exports.wording import breaks_off, repeats, words
from serving.params import Caption


class QualityMetrics(Protocol):
    """Where it is counted."""

    def observe_caption(self, confidence: float, words: int, faults: Iterable[str]) -> None:
        """Records the best caption of an image."""

    def observe_distance(self, distance: float, *, is_strange: bool) -> None:
        """Records how far an image is from those that the model was trained on."""


def observe(metrics: QualityMetrics, found: Sequence[Sequence[Caption]]) -> None:
    """Counts the best caption of each image, and how far the image is from what the model knows."""
    for best, *_ in found:
        spoken = words(best.text)
        metrics.observe_caption(confidence(best), len(spoken), faults(spoken))
        if best.seen.distance is not None:
            metrics.observe_distance(best.seen.distance, is_strange=best.seen.is_strange)


def confidence(caption: Caption) -> float:
    """Returns the geometric mean of its tokens' probabilities.

    Unlike the score it is the same whatever `length_penalty` the client chose.
    """
    return math.exp(caption.log_prob / max(caption.tokens, 1))


def faults(spoken: Sequence[str]) -> list[str]:
    """Returns which of `serving.metrics.FAULTS` a caption, as words, has."""
    found = {
        "repetition": repeats(spoken),
        "bad_ending": breaks_off(spoken),
        "empty": not spoken,
    }
    return [fault for fault, has in found.items() if has]
