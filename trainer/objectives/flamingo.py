"""Language modelling behind examples: each caption given its image, and what stands before it.

Alayrac et al., 2022, "Flamingo: a Visual Language Model for Few-Shot Learning",
https://arxiv.org/abs/2204.14198, equation 1: L = -sum_t log p(w_t | w_<t, the image it belongs to),
over a prompt of k examples and a query (see `trainer.few_shot`). The paper trains the bridge and
the gated layers alone: `frozen = ["encoder", "decoder.model"]`; a language model that is to learn
from examples must have seen texts of that form, which `frozen = ["encoder", "bridge",
"decoder.gated"]` teaches it beforehand.

1. Examples of an image are the others of the training set that resemble it most, by the encoder's
   features before the first step, instead of what happens to stand on one page of the web.
2. They take the caption of the same place in their image's list as the query does. Where places
   differ in style or language, so do prompts, and there is something to learn from examples.
3. The examples' captions are trained too, as in the paper, with a weight. Then a model of k
   examples is also one of fewer.

Without examples (`[bridge] shots = 0`) this is the objective `lm`.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset, InterleavedDataset, TrainingData
from trainer.errors import ConfigError
from trainer.features import nearest_others, pooled_features
from trainer.few_shot import hide_padding, own_image
from trainer.objectives._captioning import (
    CaptioningConfig,
    CaptioningObjective,
    cross_entropy,
    labels_of,
    token_loss,
)


class Config(CaptioningConfig):
    """Keys of `[objective] name = "flamingo"`."""

    label_smoothing: float = 0.1
    shot_weight: float = Field(default=1.0, ge=0)
    """Of the mean loss of the examples' captions, against that of the query's."""


class Objective(CaptioningObjective):
    """See the module.

    Raises:
        ConfigError: the bridge is none with gated layers.
    """

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        del dataset  # `data` makes prompts of it
        if captioner.decoder.reading.kind != "gated":
            raise ConfigError('flamingo needs gated layers: [bridge] name = "perceiver"')
        self._config = config

    def data(self, dataset: CaptionDataset) -> TrainingData:
        """Returns the items with their examples before them."""
        reading = self.captioner.decoder.reading
        if not reading.shots:
            return dataset
        features = pooled_features(self.captioner.encoder.eval(), dataset.images)
        shots = nearest_others(features, reading.shots)
        return InterleavedDataset(dataset, shots, reading.shot_tokens)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, its two parts, and the share of the query's tokens ranked first.

        Args:
            batch: as `InterleavedDataset.collate` makes it, or `CaptionDataset.collate`.
        """
        smoothing = self._config.label_smoothing
        if "shot_images" not in batch:
            memory = self.captioner.memory(batch["images"])
            loss, hits = cross_entropy(self.captioner, memory, batch, smoothing)
            return {"loss": loss, "token_accuracy": hits}
        shot_ids, shot_lengths = batch["shot_token_ids"], batch["shot_lengths"]
        logits = interleaved_logits(self.captioner, batch)
        behind = shot_ids[0].numel()
        query, hits = token_loss(
            logits[:, behind:], labels_of(batch["token_ids"], batch["lengths"]), smoothing
        )
        # The last position of a block foretells nothing: the next caption is another image's.
        before = logits[:, :behind].unflatten(1, shot_ids.shape[1:])[:, :, :-1].flatten(0, 1)
        labels = labels_of(shot_ids.flatten(0, 1), shot_lengths.flatten())
        shots, _ = token_loss(before, labels, smoothing)
        return {
            "loss": query + self._config.shot_weight * shots,
            "query_loss": query.detach(),
            "shot_loss": shots.detach(),
            "token_accuracy": hits,
        }


def interleaved_logits(captioner: Captioner, batch: dict[str, Any]) -> Tensor:
    """Returns logits (R, k * T + T', V) of prompts and of the queries' tokens but the last.

    Args:
        captioner: with gated layers.
        batch: see `InterleavedDataset.collate`.
    """
    images, shot_images = batch["images"], batch["shot_images"]
    shot_ids, shot_lengths = batch["shot_token_ids"], batch["shot_lengths"]
    count, shot_tokens = shot_ids.shape[1:]
    every = torch.cat([shot_images, images.unsqueeze(1)], dim=1)  # (B, k + 1, 3, H, W)
    latents = captioner.encode(every.flatten(0, 1))
    memory = captioner.decoder.memory(latents.unflatten(0, (len(images), -1)).flatten(1, 2))
    token_ids = torch.cat([shot_ids.flatten(1), batch["token_ids"][:, :-1]], dim=1)
    image_visible = own_image(token_ids.shape[1], shot_tokens, latents.shape[1], count + 1)
    text_visible = hide_padding(shot_lengths, shot_tokens, token_ids.shape[1] - count * shot_tokens)
    logits: Tensor = captioner.decoder(
        token_ids,
        memory,
        image_visible.to(images.device).expand(len(token_ids), -1, -1),
        text_visible,
    )
    return logits.float()
