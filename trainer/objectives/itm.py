"""Image-text matching: does a caption, read together with an image, describe it?

See `trainer.objectives._matching` for the loss, its paper and the departures. Trained alone it
draws negatives by a similarity that nothing trains: begin with a run of `itc`, or train `blip`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.objectives._captioning import CaptioningObjective
from trainer.objectives._contrast import temperature_of
from trainer.objectives._matching import MatchingConfig, matching_loss
from trainer.objectives._pairs import Labels, belongs, check_matcher, matcher_of


class Config(MatchingConfig):
    """Keys of `[objective] name = "itm"`."""


class Objective(CaptioningObjective):
    """See the module.

    Raises:
        ConfigError: the captioner has no matcher.
    """

    captions: ClassVar[bool] = False
    divisible: ClassVar[bool] = False

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        del dataset  # whatever this loss needs of it is in the batches
        check_matcher(captioner, "itm")
        self._easy = config.easy_negatives

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, what it gains on a constant answer, and the accuracy.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        captioner = self.captioner
        memory, pooled = captioner.memory_and_pooled(batch["images"])
        matcher = matcher_of(captioner)
        with torch.no_grad():
            captions = matcher.embed_captions(
                captioner.decoder, batch["token_ids"], batch["lengths"]
            )
            similarity = matcher.embed_images(pooled) @ captions.T / temperature_of(captioner)
        labels = Labels.of(batch)
        return matching_loss(
            captioner, memory, batch, similarity, belongs(labels, labels), easy=self._easy
        )
