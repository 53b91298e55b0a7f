"""The caption of the most similar captioned image: the baseline that a captioner has to beat."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.metrics import cider


class CaptionedNeighbours:
    """Some captioned images, whose captions are copied to images that resemble them.

    Args:
        captions: of each of the m captioned images.
    """

    def __init__(self, captions: Sequence[tuple[str, ...]]) -> None:
        self._captions = captions
        self._frequencies = cider.DocumentFrequencies.of(captions)
        self._typical: dict[int, str] = {}

    def copied(self, features: NDArray[np.float32], known: NDArray[np.float32]) -> list[str]:
        """Returns, for every image, the most typical caption of the most similar captioned image.

        Similarity is the cosine; typical is the caption with the highest CIDEr-D against its
        image's other captions.

        Args:
            features: unit vectors (n, D) of the images.
            known: unit vectors (m, D) of the captioned images.
        """
        return [self._typical_of(index) for index in (features @ known.T).argmax(1).tolist()]

    def _typical_of(self, index: int) -> str:
        if index not in self._typical:
            self._typical[index] = _most_typical(self._captions[index], self._frequencies)
        return self._typical[index]


def _most_typical(captions: tuple[str, ...], frequencies: cider.DocumentFrequencies) -> str:
    if len(captions) == 1:
        return captions[0]
    others = [[*captions[:i], *captions[i + 1 :]] for i in range(len(captions))]
    scores = cider.CiderD(others, frequencies=frequencies).scores(range(len(captions)), captions)
    return captions[int(scores.argmax())]
