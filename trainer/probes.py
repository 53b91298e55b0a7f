"""What an encoder is worth, measured without training it further."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from exports.images import ImageSpec
from trainer.config import Config
from trainer.data import Example, read_examples
from trainer.metrics import cider
from trainer.metrics._scores import Scores
from trainer.photos import load_all


class ProbeConfig(Config):
    """Keys of `[probe]`."""

    captioned: Path | None = None
    """A few captioned images: what the caption probe may copy from."""
    captioned_split: str | None = None
    dev: Path | None = None
    """Captioned images on which the caption probe is measured; needs `captioned`."""
    dev_split: str | None = None
    images: Path | None = None
    """The folder that the image names of both are relative to."""
    sample: int = Field(default=1000, ge=2)
    """How many of the raw images RankMe, alignment and uniformity look at."""


class Probes:
    """Measures an encoder after every epoch."""

    def __init__(
        self, config: ProbeConfig, image: ImageSpec, examples: Sequence[Example], *, seed: int
    ) -> None:
        del seed
        pixels = load_all(examples[: config.sample], image)
        self._images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        self._pairs: list[tuple[list[Example], Tensor]] = []
        if config.captioned is not None and config.dev is not None:
            for source, split in (
                (config.captioned, config.captioned_split),
                (config.dev, config.dev_split),
            ):
                rows = read_examples(source, images=config.images, split=split)
                rows = [example for example in rows if example.captions]
                side = torch.from_numpy(load_all(rows, image)).permute(0, 3, 1, 2)
                self._pairs.append((rows, side))

    @torch.no_grad()
    def measure(self, encoder: Any) -> dict[str, float]:
        """Returns the figures by name."""
        figures = {"probe/rankme": rankme(_pooled(encoder, self._images))}
        if self._pairs:
            figures["probe/caption_cider"] = self.caption_scores(encoder).corpus["CIDEr-D"]
        return figures

    @torch.no_grad()
    def caption_scores(self, encoder: Any) -> Scores:
        """Returns CIDEr-D of the nearest captioned image's first caption, on dev."""
        (captioned, their), (dev, own) = self._pairs
        features = F.normalize(_pooled(encoder, own), dim=1)
        known = F.normalize(_pooled(encoder, their), dim=1)
        nearest = (features @ known.T).argmax(1).tolist()
        captions = [captioned[index].captions[0] for index in nearest]
        return cider.score([example.captions for example in dev], captions)


def _pooled(encoder: Any, images: Tensor) -> Tensor:
    device = next(encoder.parameters()).device
    return torch.cat([encoder(batch.to(device))[1].float().cpu() for batch in images.split(64)])


def rankme(features: Tensor) -> float:
    """Returns the effective rank of features (n, D), from 1 to min(n, D).

    Garrido et al., 2022, "RankMe", https://arxiv.org/abs/2210.02885, equation 1: the exponential of
    the entropy of the normalised singular values.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + 1e-7
    return float((-(shares * shares.log()).sum()).exp())
