"""Language modelling: the cross-entropy of each caption given its image.

L = -1/n * sum_t log p(w_t | w_<t, image), teacher forced (Vinyals et al., 2015, "Show and Tell",
https://arxiv.org/abs/1411.4555), with label smoothing (Szegedy et al., 2016,
https://arxiv.org/abs/1512.00567).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.captioner import Captioner
from trainer.config import Config as BaseConfig
from trainer.encoders._timm import freeze_prefixes
from trainer.objective import Objective as BaseObjective

IGNORE_INDEX = -100


class Config(BaseConfig):
    """Keys of `[objective] name = "lm"`."""

    label_smoothing: float = 0.1
    frozen: tuple[str, ...] = ()
    """Parameter prefixes of the captioner that are never trained, e.g. `encoder.backbone.blocks.0`.
    """
    encoder_from_epoch: int = 0
    """The encoder trains from this epoch on (counted from 0); before it, it only encodes."""


class Objective(BaseObjective):
    """See the module; normalisation layers of the encoder keep their running statistics.

    Batches of tens of images are too few to re-estimate BatchNorm, and statistics that move make
    training and serving differ; so the encoder is always in evaluation mode.
    """

    def __init__(self, config: Config, captioner: Captioner) -> None:
        super().__init__()
        self.config = config
        self.captioner = captioner
        freeze_prefixes(captioner, config.frozen)
        self._trained_encoder = [p for p in captioner.encoder.parameters() if p.requires_grad]

    def before_epoch(self, epoch: int) -> None:
        """Thaws the encoder when its epoch has come."""
        for parameter in self._trained_encoder:
            parameter.requires_grad_(epoch >= self.config.encoder_from_epoch)

    def train(self, mode: bool = True) -> "Objective":
        """Sets training mode everywhere but in the encoder."""
        super().train(mode)
        self.captioner.encoder.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss and the share of tokens that the model ranks first.

        Args:
            batch: `images` (B, 3, H, W) uint8; `token_ids` (B * C, T), `<bos>` ... `<eos>` and
                padding; `lengths` (B * C,), tokens without padding.
        """
        token_ids = batch["token_ids"]
        logits = self.captioner(batch["images"], token_ids[:, :-1]).float()
        labels = labels_of(token_ids, batch["lengths"])
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.config.label_smoothing,
        )
        with torch.no_grad():
            counted = labels != IGNORE_INDEX
            hits = (logits.argmax(-1) == labels)[counted].float().mean()
        return {"loss": loss, "token_accuracy": hits}


def labels_of(token_ids: Tensor, lengths: Tensor) -> Tensor:
    """Returns token_ids (R, T) shifted left, (R, T - 1), with padding as IGNORE_INDEX."""
    labels = token_ids[:, 1:].clone()
    positions = torch.arange(labels.shape[1], device=labels.device)
    labels[positions >= lengths.unsqueeze(1) - 1] = IGNORE_INDEX
    return labels
