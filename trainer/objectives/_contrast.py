"""Image-text contrast, with slowly following copies, a queue and soft targets.

Li et al., 2021, "Align before Fuse: Vision and Language Representation Learning with Momentum
Distillation" (ALBEF), https://arxiv.org/abs/2107.07651, equations 1 and 6, as BLIP takes it over
(Li et al., 2022, https://arxiv.org/abs/2201.12086, section 3.2). The images and captions of a batch
are queries; among the keys, which the copies made of this batch and of those before it, each has to
find its own:

    p = softmax(query . keys / t),  L = (H(y, p of captions) + H(y, p of images)) / 2,

where y gives equal shares to the right keys, and a share alpha of it follows what the copies
themselves say.

Departures:

1. All captions of an image, and all that read the same as one of them, are right. With a few
   thousand captions the queue always holds some.
2. alpha rises over the first `len(dataset)` images, whatever the batches are.
3. The copies are in evaluation mode, without dropout.
4. `momentum = 0` is for small data: the batch is its own keys and nothing is copied, which is
   CLIP's loss (Radford et al., 2021, https://arxiv.org/abs/2103.00020, figure 3).
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.objectives._captioning import CaptioningConfig
from trainer.objectives._pairs import Labels, belongs, check_matcher, matcher_of

_COLDEST, _WARMEST = 0.001, 0.5
_NOBODY = -1  # whose the keys are that the queue begins with


class ContrastConfig(CaptioningConfig):
    """Keys of the objectives that contrast."""

    momentum: float = Field(default=0.995, ge=0, lt=1)
    """How much of itself a copy keeps at each step; 0: no copies, no queue and no soft targets."""
    queue: int = Field(default=57600, ge=1)
    """Images, with their captions, whose keys are remembered; at most all that there are."""
    alpha: float = Field(default=0.4, ge=0, lt=1)
    """Share of the targets that is the copies' own answer, once it has risen."""


class Towers(nn.Module):
    """Copies of a captioner's encoder, decoder and matcher that follow them slowly."""

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.encoder = deepcopy(captioner.encoder)
        self.decoder = deepcopy(captioner.decoder)
        self.matcher = deepcopy(captioner.matcher)
        self.requires_grad_(False)

    @torch.no_grad()
    def embed(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns unit vectors of images (B, E) and captions (R, E)."""
        assert self.matcher is not None
        images = self.matcher.embed_images(self.encoder(batch["images"])[1])
        captions = self.matcher.embed_captions(self.decoder, batch["token_ids"], batch["lengths"])
        return images, captions

    @torch.no_grad()
    def follow(self, captioner: Captioner, momentum: float) -> None:
        """Moves each weight towards the captioner's: m * old + (1 - m) * new."""
        for name, mine in self.named_children():
            new = [p.detach() for p in getattr(captioner, name).parameters()]
            torch._foreach_lerp_(list(mine.parameters()), new, 1 - momentum)


class Contrast(nn.Module):
    """The loss and all that it remembers; the captioner itself is passed to every call.

    Args:
        config: the objective's keys.
        captioner: whose copies are made.
        dataset: how many images there are, and how many captions of each a batch holds.
        objective: its name, for errors.

    Raises:
        ConfigError: the captioner has no matcher.
    """

    image_queue: Tensor
    caption_queue: Tensor
    queue_indices: Tensor
    queue_keys: Tensor
    pointer: Tensor
    seen: Tensor

    def __init__(
        self, config: ContrastConfig, captioner: Captioner, dataset: CaptionDataset, objective: str
    ) -> None:
        super().__init__()
        self._config, self._images = config, len(dataset)
        self._new: list[_Keys] = []
        check_matcher(captioner, objective)
        self.towers: Towers | None = None
        if config.momentum:
            self.towers = Towers(captioner)
            size, captions = min(config.queue, len(dataset)), dataset.captions
            width = matcher_of(captioner).image_projection.out_features
            vectors = F.normalize(torch.randn(size, 1 + captions, width), dim=2)
            self.register_buffer("image_queue", vectors[:, 0].clone())
            self.register_buffer("caption_queue", vectors[:, 1:].clone())
            self.register_buffer("queue_indices", torch.full((size,), _NOBODY))
            self.register_buffer("queue_keys", torch.zeros(size, captions, dtype=torch.int64))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> "Contrast":
        """Keeps the copies in evaluation mode."""
        super().train(mode)
        if self.towers is not None:
            self.towers.eval()
        return self

    def forward(
        self, captioner: Captioner, images: Tensor, captions: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Returns the loss, the temperature, and how often the nearest caption is a right one.

        In evaluation the batch is its own keys, as without momentum: the queue is of training
        images.

        Args:
            captioner: whose matcher knows the temperature.
            images: unit vectors (B, E).
            captions: unit vectors (R, E).
            batch: as `CaptionDataset.collate` makes it.
        """
        labels = Labels.of(batch)
        keys, alpha = _Keys(images, captions, labels), 0.0
        if self.towers is not None and self.training:
            own = _Keys(*self.towers.embed(batch), labels)
            keys, alpha = self._with_queue(own), self._alpha()
            self._new.append(own)
        temperature = temperature_of(captioner)
        with torch.autocast(images.device.type, enabled=False):
            text_logits = images @ keys.captions.T / temperature
            image_logits = captions @ keys.images.T / temperature
            text_says = keys.images[: len(images)] @ keys.captions.T / temperature
            image_says = keys.captions[: len(captions)] @ keys.images.T / temperature
        right, found = belongs(labels, keys.labels), belongs(keys.labels, labels).T
        loss = soft_cross_entropy(text_logits, right, text_says, alpha)
        loss = (loss + soft_cross_entropy(image_logits, found, image_says, alpha)) / 2
        hits = right.gather(1, text_logits.argmax(1, keepdim=True)).float().mean()
        return {"loss": loss, "temperature": temperature.detach(), "caption_accuracy": hits}

    @torch.no_grad()
    def after_step(self, captioner: Captioner) -> None:
        """Bounds the temperature, moves the copies, and puts the step's keys into the queue."""
        matcher_of(captioner).temperature.clamp_(_COLDEST, _WARMEST)
        if self.towers is None:
            return
        self.towers.follow(captioner, self._config.momentum)
        for keys in self._new:
            images, size = len(keys.images), len(self.image_queue)
            places = (torch.arange(images, device=self.pointer.device) + self.pointer)[-size:]
            places %= size
            self.image_queue[places] = keys.images[-size:]
            self.caption_queue[places] = keys.captions.unflatten(0, (images, -1))[-size:]
            self.queue_indices[places] = keys.labels.indices[-size:]
            self.queue_keys[places] = keys.labels.keys[-size:]
            self.pointer.copy_((self.pointer + images) % size)
            self.seen += images
        self._new.clear()

    def _alpha(self) -> float:
        """Returns alpha as risen by now."""
        return self._config.alpha * min(1.0, self.seen.item() / self._images)

    def _with_queue(self, own: "_Keys") -> "_Keys":
        """Returns a batch's keys and those of the queue behind them."""
        labels = Labels(
            torch.cat([own.labels.indices, self.queue_indices]),
            torch.cat([own.labels.keys, self.queue_keys]),
        )
        return _Keys(
            torch.cat([own.images, self.image_queue]),
            torch.cat([own.captions, self.caption_queue.flatten(0, 1)]),
            labels,
        )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Unit vectors of images (N, E) and of their captions (N * C, E), and whose they are."""

    images: Tensor
    captions: Tensor
    labels: Labels


def temperature_of(captioner: Captioner) -> Tensor:
    """Returns the learnt temperature, within its bounds."""
    return matcher_of(captioner).temperature.clamp(_COLDEST, _WARMEST)


def soft_cross_entropy(logits: Tensor, right: Tensor, said: Tensor, alpha: float) -> Tensor:
    """Returns the mean cross-entropy of rows with their targets.

    Args:
        logits: (N, M).
        right: (N, M), truth values; the right columns of a row share the target equally.
        said: (N, M), logits of another model, whose answer is a part of the target.
        alpha: how large a part.
    """
    counted = right.float()
    shares = counted / counted.sum(1, keepdim=True)
    return F.cross_entropy(logits, shares.lerp(said.detach().softmax(1), alpha))
