"""What every self-supervised method is given, and what the stage may ask of it."""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from exports.text import TextSpec
from trainer.config import Config as BaseConfig
from trainer.objective import Objective
from trainer.optim import freeze_prefixes


class MethodConfig(BaseConfig):
    """Keys of every method."""

    frozen: tuple[str, ...] = ()
    """Parameter prefixes that are never trained, e.g. `encoder.backbone.conv_stem`."""
    keep_statistics: bool = False
    """BatchNorm in the encoder keeps the means and variances that it came with: for encoders that
    go on from other weights, whose features the statistics of a thousand crops would shift."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method must know of its run.

    Attributes:
        images: How many images there are to learn from.
        batch_size: How many of them a step sees.
        steps: Optimiser steps in all.
        text: Vocabulary of the captions, where the method reads any.
        epoch_steps: How many of the steps are an epoch.
    """

    images: int
    batch_size: int
    steps: int
    text: TextSpec | None = None
    epoch_steps: int = 1


@dataclass(frozen=True, slots=True)
class Preparation:
    """An objective that is trained to its end before the method begins.

    Attributes:
        name: Of its folder within the run's.
        objective: On batches of one view.
        epochs: How long; the rest of `[loop]` is the run's.
        lr: Its learning rate; the rest of `[optim]` is the run's.
    """

    name: str
    objective: Objective
    epochs: int
    lr: float


class Method(Objective):
    """Base of the methods.

    `forward` is given `images` (V * B, 3, H, W), the first view of every image before the second,
    `indices` (B,), and where `reads_captions` also `token_ids` (B, T) and `lengths` (B,). Beside
    the loss it returns `of_chance`, the loss as a share of what knowing nothing would cost: it
    stays at 1 where nothing is learnt.

    Attributes:
        views: V, how many views of an image a batch holds.
        reads_captions: Whether it learns from captions, one drawn per image and epoch.
        divisible: Whether the loss of a batch is the mean of its parts' losses, so that batches may
            be accumulated. Contrastive losses compare the images of a batch and are not.
        remedies: What may help where nothing is learnt, in words.
    """

    views: ClassVar[int] = 1
    reads_captions: ClassVar[bool] = False
    divisible: ClassVar[bool] = True
    remedies: ClassVar[str] = "another optim.lr"

    def __init__(self, config: MethodConfig, encoder: Any, setting: Setting) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.setting = setting
        freeze_prefixes(self, config.frozen)
        self._keeps_statistics = config.keep_statistics

    def encoders(self) -> list[nn.Module]:
        """Returns the encoder and the copies of it that a method holds."""
        return [self.encoder]

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all but BatchNorms that keep their statistics."""
        super().train(mode)
        for encoder in self.encoders() if self._keeps_statistics else ():
            for module in encoder.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def preparation(self) -> Preparation | None:
        """Returns what must be trained first, if anything."""
        return None

    def pictures(self, images: Tensor) -> Tensor | None:
        """Returns what a person can judge the method by, or None.

        Args:
            images: (B, 3, H, W), uint8.

        Returns:
            uint8 (B, P, 3, H, W): P pictures of each image, such as its masked patches, their
            reconstruction and the image itself.
        """
        del images
        return None
