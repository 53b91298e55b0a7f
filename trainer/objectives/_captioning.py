"""What the objectives on captioners share: their base, labels, and the cross-entropy."""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trainer.attention import Memory
from trainer.captioner import Captioner
from trainer.config import Config as BaseConfig
from trainer.dataset import CaptionDataset, TrainingData
from trainer.lora import LowRank
from trainer.objective import Objective
from trainer.optim import freeze_prefixes

IGNORE_INDEX = -100


class CaptioningConfig(BaseConfig):
    """Keys of every captioning objective."""

    frozen: tuple[str, ...] = ()
    """Parameter prefixes of the captioner that are never trained, e.g. `encoder.backbone.blocks.0`.
    """
    encoder_from_epoch: int = 0
    """The encoder trains from this epoch on (counted from 0); before it, it only encodes."""

    def kept(self, folder: Path) -> Self:
        """Returns the config as a run reads it: what must outlive its source is in its folder."""
        del folder
        return self


class Budget(BaseConfig):
    """How much worse captions of `data.dev` may grow while a reward rises.

    Against what they were before the first step. Two captions more are put down to chance.
    """

    repetition: float = Field(default=0.05, ge=0)
    """Share of captions that repeat themselves (see `trainer.metrics.repetition`)."""
    bad_endings: float = Field(default=0.05, ge=0)
    """Share of captions that break off (see `trainer.metrics.bad_endings`)."""
    length: float = Field(default=0.5, ge=0)
    """Change of the mean length, as a share of it, to either side."""


class CaptioningObjective(Objective):
    """A loss on a captioner whose encoder keeps its normalisation statistics.

    Batches of tens of images are too few to re-estimate BatchNorm, and statistics that move make
    training and serving differ; so the encoder is always in evaluation mode.

    Attributes:
        captions: Whether it teaches to caption. Runs of others are not measured by their captions.
        divisible: Whether the loss of a batch is the mean of its parts' losses, so that batches may
            be accumulated. Losses that compare the images of a batch are not.
        prompt_ids: What each caption is made to begin with, and is given when one is asked for.
        budget: Of objectives that a captioner may please by captions that nobody wants.
    """

    captions: ClassVar[bool] = True
    divisible: ClassVar[bool] = True

    def __init__(self, config: CaptioningConfig, captioner: Captioner) -> None:
        super().__init__()
        self.prompt_ids: tuple[int, ...] = ()
        self.budget: Budget | None = None
        self.captioner = captioner
        self._encoder_from = config.encoder_from_epoch
        freeze_prefixes(captioner, config.frozen)
        self._trained_encoder = [p for p in captioner.encoder.parameters() if p.requires_grad]

    def data(self, dataset: CaptionDataset) -> TrainingData:
        """Returns what batches are drawn from: the captioned images, or what is made of them."""
        return dataset

    def before_epoch(self, epoch: int) -> None:
        """Thaws the encoder when its epoch has come."""
        for parameter in self._trained_encoder:
            parameter.requires_grad_(epoch >= self._encoder_from)

    def train(self, mode: bool = True) -> "CaptioningObjective":
        """Sets training mode everywhere but in the encoder; its updates (LoRA) have dropout."""
        super().train(mode)
        self.captioner.encoder.eval()
        for part in self.captioner.encoder.modules():
            if isinstance(part, LowRank):
                part.train(mode)
        return self


def labels_of(token_ids: Tensor, lengths: Tensor) -> Tensor:
    """Returns token_ids (R, T) shifted left, (R, T - 1), with padding as IGNORE_INDEX."""
    labels = token_ids[:, 1:].clone()
    positions = torch.arange(labels.shape[1], device=labels.device)
    labels[positions >= lengths.unsqueeze(1) - 1] = IGNORE_INDEX
    return labels


def cross_entropy(
    captioner: Captioner,
    memory: Memory,
    batch: dict[str, Any],
    label_smoothing: float,
    *,
    prompt: int = 0,
) -> tuple[Tensor, Tensor]:
    """Returns the teacher-forced cross-entropy and the share of tokens ranked first.

    Args:
        captioner: its decoder is run.
        memory: of the B images.
        batch: `token_ids` (B * C, T), `<bos>` ... `<eos>` and padding; `lengths` (B * C,), tokens
            without padding.
        label_smoothing: probability spread over the vocabulary.
        prompt: how many tokens after `<bos>` are given and not to be learnt.
    """
    token_ids = batch["token_ids"]
    logits = captioner.decoder(token_ids[:, :-1], memory).float()
    labels = labels_of(token_ids, batch["lengths"])
    labels[:, :prompt] = IGNORE_INDEX
    return token_loss(logits, labels, label_smoothing)


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Returns the mean cross-entropy and the share of tokens ranked first.

    Args:
        logits: (R, T, V).
        labels: (R, T), IGNORE_INDEX where there is no token.
        label_smoothing: probability spread over the vocabulary.
    """
    loss = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing,
    )
    with torch.no_grad():
        hits = (logits.argmax(-1) == labels)[labels != IGNORE_INDEX].float().mean()
    return loss, hits
