"""BLIP: an image and its captions find each other, are matched, and the captions are told.

L = ITC + ITM + LM, from one encoding of the images. Li et al., 2022, "BLIP: Bootstrapping
Language-Image Pre-training for Unified Vision-Language Understanding and Generation",
https://arxiv.org/abs/2201.12086, section 3.2. The parts are those of the objectives `itc`, `itm`
and `lm`, with their departures.
"""

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.errors import ConfigError
from trainer.objectives._captioning import CaptioningObjective, cross_entropy
from trainer.objectives._contrast import Contrast, ContrastConfig, temperature_of
from trainer.objectives._matching import MatchingConfig, matching_loss
from trainer.objectives._pairs import Labels, belongs, matcher_of


class Config(ContrastConfig, MatchingConfig):
    """Keys of `[objective] name = "blip"`."""

    itc: float = Field(default=1.0, ge=0)
    itm: float = Field(default=1.0, ge=0)
    lm: float = Field(default=1.0, ge=0)
    """Weights of the three losses."""
    label_smoothing: float = 0.1
    """Of the captions' cross-entropy."""
    prompt: str = ""
    """What every caption is made to begin with, such as "a picture of". It is given and not learnt,
    so a captioner that was trained with it must be asked with it."""


class Objective(CaptioningObjective):
    """See the module.

    Raises:
        ConfigError: the captioner has no matcher, or the prompt leaves no room for a caption.
    """

    divisible: ClassVar[bool] = False

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        self._config = config
        self.contrast = Contrast(config, captioner, dataset, "blip")
        self.prompt_ids = tuple(dataset.tokenizer.prefix_ids(config.prompt))
        if len(self.prompt_ids) + 3 > captioner.text.max_length:
            raise ConfigError(
                f"blip: the prompt is {len(self.prompt_ids)} tokens long, and decoder.max_length "
                f"{captioner.text.max_length}: no word fits behind it"
            )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the weighted sum of the losses, each of them, and what they log.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        captioner, config = self.captioner, self._config
        matcher = matcher_of(captioner)
        memory, pooled = captioner.memory_and_pooled(batch["images"])
        images = matcher.embed_images(pooled)
        captions = matcher.embed_captions(captioner.decoder, batch["token_ids"], batch["lengths"])
        contrast = self.contrast(captioner, images, captions, batch)
        with torch.no_grad():
            similarity = images @ captions.T / temperature_of(captioner)
            labels = Labels.of(batch)
        right, easy = belongs(labels, labels), config.easy_negatives
        matching = matching_loss(captioner, memory, batch, similarity, right, easy=easy)
        telling, hits = cross_entropy(
            captioner,
            memory,
            self._prompted(batch),
            config.label_smoothing,
            prompt=len(self.prompt_ids),
        )
        losses = {"itc": contrast.pop("loss"), "itm": matching.pop("loss"), "lm": telling}
        total = config.itc * losses["itc"] + config.itm * losses["itm"] + config.lm * telling
        logged = {name: loss.detach() for name, loss in losses.items()}
        return {"loss": total, **logged, **contrast, **matching, "token_accuracy": hits}

    def _prompted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the batch's captions with the prompt after `<bos>`, cut to what can be told."""
        token_ids, longest = batch["token_ids"], self.captioner.text.max_length
        prompt = torch.tensor(self.prompt_ids, dtype=token_ids.dtype, device=token_ids.device)
        parts = (token_ids[:, :1], prompt.expand(len(token_ids), -1), token_ids[:, 1:])
        lengths = (batch["lengths"] + len(prompt)).clamp(max=longest)
        return {"token_ids": torch.cat(parts, 1)[:, :longest], "lengths": lengths}

    def after_step(self, step: int) -> None:
        """Moves the copies after the captioner, and the step's keys into the queue."""
        del step
        self.contrast.after_step(self.captioner)
