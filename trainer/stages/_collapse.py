"""Notices captions that are all alike, while a run may still be saved.

A decoder that ignores its image says the commonest thing to everyone. That is normal at first, and
no reason to wait in the second half of a run.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from trainer.errors import CollapseError

PROBE = 32  # images whose captions are watched
_LEAST_DISTINCT = 0.1  # of them, as a share
_PATIENCE = 3  # evaluations in a row
_DEPENDS = 0.02  # nats that a wrong image must cost, to count as looked at


class CollapseWatch:
    """Watches the captions of the same images, evaluation after evaluation.

    Args:
        epochs: of the run; nothing is said in the first half of them, nor at the end.
        cost_of_wrong_images: by how much the loss on the probe rises when they are exchanged.
    """

    def __init__(self, epochs: int, cost_of_wrong_images: Callable[[], float]) -> None:
        self._epochs, self._cost_of_wrong_images = epochs, cost_of_wrong_images
        self._alike = 0

    def check(self, epoch: int, captions: Sequence[str]) -> None:
        """Takes the captions after `epoch`, counted from 0.

        Raises:
            CollapseError: they were all alike for three evaluations; says whether the image counts.
        """
        probe = captions[:PROBE]
        self._alike = self._alike + 1 if len(set(probe)) <= _LEAST_DISTINCT * len(probe) else 0
        in_time = self._epochs // 2 <= epoch < self._epochs - 1
        if self._alike < _PATIENCE or not in_time:
            return
        ((caption, count),) = Counter(probe).most_common(1)
        cost = self._cost_of_wrong_images()
        why = (
            "a wrong image costs next to nothing, so the decoder does not look: check that the "
            "captions belong to their images, or lower optim.lr"
            if cost < _DEPENDS
            else "wrong images do cost something, so the decoder looks but says the common thing: "
            "train longer, lower objective.label_smoothing, or caption more different images"
        )
        raise CollapseError(
            f"after epoch {epoch + 1} of {self._epochs}, {count} of {len(probe)} images are "
            f"captioned {caption!r}, as for the last {_PATIENCE} evaluations. Exchanging images "
            f"raises the loss by {cost:.3f}; {why}"
        )
