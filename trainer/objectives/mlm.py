"""Masked language modelling: tokens of a caption are hidden and told from the rest and the image.

Devlin et al., 2018, "BERT", https://arxiv.org/abs/1810.04805, section 3.1: of the tokens 15 % are
asked for; of these 80 % are replaced by [MASK], 10 % by a random token, and 10 % stay. With the
image: Li et al., 2021, "Align before Fuse", https://arxiv.org/abs/2107.07651, equation 4.

Departures:

1. Every token is drawn by itself; the paper draws a fixed share of each sequence.
2. `<bos>`, `<eos>` and padding are neither asked for nor put in place of a token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from exports.text import TextSpec
from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.objectives._captioning import CaptioningConfig, CaptioningObjective
from trainer.objectives._pairs import check_reads

_MASKED, _REPLACED = 0.8, 0.1  # of the tokens that are asked for


class Config(CaptioningConfig):
    """Keys of `[objective] name = "mlm"`."""

    mask_ratio: float = Field(default=0.15, gt=0, le=0.5)
    """Share of the tokens that are asked for; more than 0.15 makes the image count for more."""


class Objective(CaptioningObjective):
    """See the module.

    Raises:
        ConfigError: the decoder cannot read in both directions.
    """

    captions: ClassVar[bool] = False

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        del dataset  # whatever this loss needs of it is in the batches
        check_reads(captioner, "mlm")
        self._mask_ratio = config.mask_ratio

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss and the share of hidden tokens that the model ranks first.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        captioner, token_ids = self.captioner, batch["token_ids"]
        masking = draw_masking(token_ids, captioner.text, self._mask_ratio)
        memory = captioner.memory(batch["images"])
        hidden = captioner.decoder.read(
            masking.token_ids, batch["lengths"], memory, masked=masking.masked
        )
        logits = captioner.decoder.head(hidden[masking.asked]).float()
        labels = token_ids[masking.asked]
        # Of a batch in which no token was drawn, 0 and not 0 / 0.
        count = max(1, len(labels))
        loss = F.cross_entropy(logits, labels, reduction="sum") / count
        hits = (logits.argmax(1) == labels).sum() / count
        return {"loss": loss, "token_accuracy": hits}


@dataclass(frozen=True, slots=True)
class Masking:
    """What becomes of captions (R, T).

    Attributes:
        asked: (R, T), True for the tokens that are to be told.
        masked: (R, T), those among them that are hidden behind [MASK].
        token_ids: (R, T), with those replaced that a random token takes the place of.
    """

    asked: Tensor
    masked: Tensor
    token_ids: Tensor


def draw_masking(token_ids: Tensor, text: TextSpec, mask_ratio: float) -> Masking:
    """Returns a masking of token_ids (R, T), drawn from PyTorch's global generator."""
    special = torch.tensor(_specials(text), device=token_ids.device)
    draws = torch.rand(token_ids.shape, device=token_ids.device)
    asked = (draws < mask_ratio) & ~torch.isin(token_ids, special)
    fate = torch.rand(token_ids.shape, device=token_ids.device)
    replaced = asked & (fate >= _MASKED) & (fate < _MASKED + _REPLACED)
    ordinary = torch.arange(text.vocab_size, device=token_ids.device)
    ordinary = ordinary[~torch.isin(ordinary, special)]
    drawn = torch.randint(len(ordinary), token_ids.shape, device=token_ids.device)
    return Masking(
        asked, asked & (fate < _MASKED), torch.where(replaced, ordinary[drawn], token_ids)
    )


def _specials(text: TextSpec) -> list[int]:
    return [text.pad_id, text.bos_id, text.eos_id]
