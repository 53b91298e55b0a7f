"""MoCo: a view finds its image's other view, encoded by a slowly following copy of the encoder.

v2: He et al., 2019, "Momentum Contrast for Unsupervised Visual Representation Learning",
https://arxiv.org/abs/1911.05722, with the head and augmentations of Chen et al., 2020,
https://arxiv.org/abs/2003.04297. The negatives are a queue of past keys (equation 1).

v3: Chen et al., 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
https://arxiv.org/abs/2104.02057. No queue: the negatives are the batch's other keys, the loss is
symmetric and times 2 t, a predictor follows the queries' head, and a vision transformer's patch
projection stays as it is.

Momentum: theta_k <- m theta_k + (1 - m) theta_q after every step.

Departures:

1. The queue holds at most half of the images. A longer one would hold the image itself, as a
   negative of its own.
2. Shuffled BatchNorm on one device: `norm_splits` parts of a batch are normalised apart, the keys'
   in another order than the queries'.
"""

import copy
import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.distributed import gathered, world_size
from trainer.errors import ConfigError
from trainer.methods._contrastive import REMEDIES, Pooled, in_chunks, info_nce, projection_head
from trainer.methods._method import Method as BaseMethod
from trainer.methods._method import MethodConfig, Setting

_LONGEST_QUEUE = 65536


class Config(MethodConfig):
    """Keys of `[method] name = "moco"`."""

    variant: Literal["v2", "v3"] = "v2"
    temperature: float = Field(default=0.2, gt=0)
    momentum: float = Field(default=0.99, ge=0, le=1)
    """m; the papers' 0.999 (v2) is for a million images and hardly moves in a thousand steps. In v3
    it rises to 1 along a cosine."""
    queue: int | None = Field(default=None, ge=1)
    """Keys that v2 remembers; by default half as many as there are images, 65,536 at most."""
    norm_splits: int = Field(default=1, ge=1)
    """Parts of a batch that BatchNorm sees apart (v2); 1 is enough for encoders without it."""
    hidden: int = Field(default=2048, ge=1)
    width: int = Field(default=128, ge=1)
    chunk: int = Field(default=0, ge=0)
    """Queries encoded at a time (v3), for batches larger than memory; 0 encodes all together."""


class Method(BaseMethod):
    """See the module."""

    views = 2
    divisible = False
    remedies = REMEDIES
    queue: Tensor
    pointer: Tensor

    def __init__(self, config: Config, encoder: Any, setting: Setting) -> None:
        super().__init__(config, encoder, setting)
        self._config, self._v3 = config, config.variant == "v3"
        hidden, width = config.hidden, config.width
        if self._v3:
            self.head = projection_head(
                encoder.width, hidden, hidden, width, last_norm=True, affine=False
            )
            self.predictor = projection_head(width, hidden, width, last_norm=True, affine=False)
            if hasattr(encoder.backbone, "patch_embed"):
                encoder.backbone.patch_embed.requires_grad_(False)
        else:
            layers = (nn.Linear(encoder.width, hidden), nn.ReLU(), nn.Linear(hidden, width))
            self.head = nn.Sequential(*layers)
            size = _queue_size(config.queue, setting)
            self.register_buffer("queue", F.normalize(torch.randn(size, width), dim=1))
            self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self._new_keys: list[Tensor] = []

    def encoders(self) -> list[nn.Module]:
        """Returns the encoder and its slow copy."""
        return [self.encoder, self.momentum_encoder]

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss; at chance a query takes any key for its own, all with one loss."""
        if self._v3:
            loss = self._symmetric(batch)
            images = len(batch["images"]) // 2 * world_size()
            chance = 4 * self._config.temperature * math.log(images)
        else:
            loss, chance = self._with_queue(batch), math.log(len(self.queue) + 1)
        return {"loss": loss, "of_chance": loss.detach() / chance}

    def _with_queue(self, batch: dict[str, Any]) -> Tensor:
        first, second = batch["images"].chunk(2)
        parts = first.chunk(self._config.norm_splits)
        pooled = torch.cat([self.encoder(part)[1] for part in parts])
        queries = F.normalize(self.head(pooled).float(), dim=1)
        keys = self._shuffled_keys(second)
        if self.training:
            self._new_keys.append(gathered(keys))
        return self.queue_loss(queries, keys, self.queue)

    def queue_loss(self, queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
        """Returns the cross-entropy of finding each query's own key beside those of the queue.

        Args:
            queries: (B, D), unit length like all of them.
            keys: (B, D), of the same images.
            queue: (K, D).
        """
        own = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([own, queries @ queue.T], dim=1) / self._config.temperature
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.int64))

    @torch.no_grad()
    def _shuffled_keys(self, images: Tensor) -> Tensor:
        order = torch.randperm(len(images), device=images.device)
        parts = images[order].chunk(self._config.norm_splits)
        keys = torch.cat([self._keys(part) for part in parts])
        return keys[order.argsort()]

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        pooled = self.momentum_encoder(images)[1]
        return F.normalize(self.momentum_head(pooled).float(), dim=1)

    def _symmetric(self, batch: dict[str, Any]) -> Tensor:
        temperature = self._config.temperature
        pooled = in_chunks(Pooled(self.encoder), batch["images"], self._config.chunk)
        # View by view, as BatchNorm would see them were they encoded apart.
        queries = [
            F.normalize(self.predictor(self.head(view)).float(), dim=1) for view in pooled.chunk(2)
        ]
        keys = [self._keys(view) for view in batch["images"].chunk(2)]
        losses = info_nce(queries[0], keys[1], temperature)
        losses = losses + info_nce(queries[1], keys[0], temperature)
        return 2 * temperature * losses

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the copy after the encoder, and the step's keys into the queue."""
        momentum = self._config.momentum
        if self._v3:
            left = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.setting.steps)))
            momentum = 1 - (1 - momentum) * left
        for mine, followed in (
            (self.momentum_encoder, self.encoder),
            (self.momentum_head, self.head),
        ):
            torch._foreach_lerp_(list(mine.parameters()), list(followed.parameters()), 1 - momentum)
        for keys in self._new_keys:
            places = torch.arange(len(keys), device=keys.device) + self.pointer
            self.queue[places % len(self.queue)] = keys
            self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))
        self._new_keys.clear()


def _queue_size(asked: int | None, setting: Setting) -> int:
    """Returns how many keys the queue holds.

    Raises:
        ConfigError: more than there are images, or fewer than a batch has.
    """
    most = min(_LONGEST_QUEUE, setting.images // 2)
    if asked is not None and asked > setting.images:
        raise ConfigError(
            f"method.queue = {asked}, but there are {setting.images} images: every image would "
            f"be its own negative; leave the key out for {most}"
        )
    if asked is not None and asked > most:
        print(
            f"method.queue = {asked} is more than half of {setting.images} images: taken as {most}"
        )
    size = most if asked is None else min(asked, most)
    if size < setting.batch_size:
        raise ConfigError(
            f"a queue of {size} keys is smaller than a batch of {setting.batch_size}; lower "
            'loop.batch_size, or take method.variant = "v3", which has no queue'
        )
    return size
