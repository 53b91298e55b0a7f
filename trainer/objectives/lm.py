"""Language modelling: the cross-entropy of each caption given its image.

L = -1/n * sum_t log p(w_t | w_<t, image), teacher forced (Vinyals et al., 2015, "Show and Tell",
https://arxiv.org/abs/1411.4555), with label smoothing (Szegedy et al., 2016,
https://arxiv.org/abs/1512.00567).
"""

from typing import Any

from torch import Tensor

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.objectives._captioning import CaptioningConfig, CaptioningObjective, cross_entropy


class Config(CaptioningConfig):
    """Keys of `[objective] name = "lm"`."""

    label_smoothing: float = 0.1


class Objective(CaptioningObjective):
    """See the module."""

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        del dataset  # whatever this loss needs of it is in the batches
        self._label_smoothing = config.label_smoothing

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss and the share of tokens that the model ranks first.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        memory = self.captioner.memory(batch["images"])
        loss, hits = cross_entropy(self.captioner, memory, batch, self._label_smoothing)
        return {"loss": loss, "token_accuracy": hits}
