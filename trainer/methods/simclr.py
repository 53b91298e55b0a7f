"""SimCLR: two views of an image are each other's only positive among a batch's 2N views.

Chen et al., 2020, "A Simple Framework for Contrastive Learning of Visual Representations",
https://arxiv.org/abs/2002.05709:

    h = encoder(view),  z = head(h) / |head(h)|,  loss = NT-Xent over all 2N (equation 1).

The head is thrown away: what is kept is the encoder, whose h keeps what z has learnt to ignore.
"""

import math
from typing import Any

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trainer.distributed import gathered
from trainer.methods._contrastive import REMEDIES, Pooled, in_chunks, nt_xent, projection_head
from trainer.methods._method import Method as BaseMethod
from trainer.methods._method import MethodConfig, Setting


class Config(MethodConfig):
    """Keys of `[method] name = "simclr"`."""

    temperature: float = Field(default=0.2, gt=0)
    """0.1 for batches of thousands, 0.5 for a few dozen."""
    hidden: int = Field(default=2048, ge=1)
    """Width of the head's inner layers."""
    width: int = Field(default=128, ge=1)
    """Of the embeddings that are compared."""
    layers: int = Field(default=2, ge=1)
    """Of the head."""
    chunk: int = Field(default=0, ge=0)
    """Views encoded at a time, for batches larger than memory; 0 encodes all together."""


class Method(BaseMethod):
    """See the module."""

    views = 2
    divisible = False
    remedies = REMEDIES

    def __init__(self, config: Config, encoder: Any, setting: Setting) -> None:
        super().__init__(config, encoder, setting)
        self._config = config
        widths = [encoder.width] + [config.hidden] * (config.layers - 1) + [config.width]
        self.head = projection_head(*widths)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss; at chance each view takes any other of the 2N for its positive."""
        pooled = in_chunks(Pooled(self.encoder), batch["images"], self._config.chunk)
        views = F.normalize(self.head(pooled).float(), dim=1).chunk(2)
        first, second = (gathered(view) for view in views)
        loss = nt_xent(first, second, self._config.temperature)
        return {"loss": loss, "of_chance": loss.detach() / math.log(2 * len(first) - 1)}
