"""What rewards are given: the captions that were drawn, and what there is to judge them by."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data import Example
from trainer.metrics.cider import DocumentFrequencies

END = " eos"  # as a word; no tokeniser of captions makes it of punctuation

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sources:
    """What captions may be judged by.

    Attributes:
        examples: those trained on.
        references: of each one the captions, then of each one those of its mirror image.
        frequencies: of n-grams, ends included (`marked`).
        matcher: a run with a [matcher], or None.
        edits: a label file, or None.
        device: where a matcher is to run; None leaves it on the CPU.
    """

    examples: Sequence[Example]
    references: Sequence[Sequence[str]]
    frequencies: DocumentFrequencies
    matcher: Path | None = None
    edits: Path | None = None
    device: torch.device | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """R captions that were drawn for B images; those of an image stand together.

    Attributes:
        texts: (R,), without their ends.
        ended: (R,), whether the model ended a caption; one that was cut has no end.
        references: (R,), number of the references (`Sources`) of each.
        images: (B, 3, H, W), uint8, as the model saw them.
    """

    texts: Sequence[str]
    ended: Sequence[bool]
    references: Sequence[int]
    images: Tensor

    @property
    def marked(self) -> list[str]:
        """The captions with their end as a last word, where they have one."""
        return [
            text + END if ended else text
            for text, ended in zip(self.texts, self.ended, strict=True)
        ]


class Reward(ABC):
    """What a caption is worth by one measure."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources

    @abstractmethod
    def scores(self, sampled: Sampled) -> Floats:
        """Returns what each of the R captions is worth, (R,)."""


def marked(captions: Sequence[str]) -> list[str]:
    """Returns what people wrote with its end as a last word."""
    return [caption + END for caption in captions]
