"""Image-text contrast: an image and its captions find each other in a space that they share.

See `trainer.objectives._contrast` for the loss, its paper and the departures.
"""

from typing import Any, ClassVar

from torch import Tensor

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.objectives._captioning import CaptioningObjective
from trainer.objectives._contrast import Contrast, ContrastConfig
from trainer.objectives._pairs import matcher_of


class Config(ContrastConfig):
    """Keys of `[objective] name = "itc"`."""


class Objective(CaptioningObjective):
    """See the module.

    Raises:
        ConfigError: the captioner has no matcher.
    """

    captions: ClassVar[bool] = False
    divisible: ClassVar[bool] = False

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        self.contrast = Contrast(config, captioner, dataset, "itc")

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, the temperature, and how often the nearest caption is a right one.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        captioner = self.captioner
        matcher = matcher_of(captioner)
        images = matcher.embed_images(captioner.encoder(batch["images"])[1])
        captions = matcher.embed_captions(captioner.decoder, batch["token_ids"], batch["lengths"])
        return self.contrast(captioner, images, captions, batch)

    def after_step(self, step: int) -> None:
        """Moves the copies after the captioner, and the step's keys into the queue."""
        del step
        self.contrast.after_step(self.captioner)
