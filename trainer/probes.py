"""What an encoder is worth, measured without training it further.

| figure                | of                | what it says                                         |
|-----------------------|-------------------|------------------------------------------------------|
| `probe/rankme`        | raw images        | in how many directions the features differ           |
| `probe/uniformity`    | raw images        | how evenly they fill the sphere, lower is better     |
| `probe/spread`        | raw images        | 1 if isotropic, 0 if all images look the same to it  |
| `probe/alignment`     | two views of each | how far apart they are, lower is better              |
| `probe/caption_cider` | captioned images  | CIDEr-D on `dev` of the nearest captioned image's    |
|                       |                   | most typical caption, with its 95 % interval         |
| `probe/knn`           | labelled images   | accuracy of their neighbours' weighted vote          |
| `probe/linear`        | labelled images   | accuracy of a linear classifier                      |

The first four need no labels, and compare encoders of one architecture; the caption probe is the
one that is close to what the encoder is for. It takes the features as they are: subtracting the
mean of the captioned images, as few-shot classifiers do (Wang et al., 2019, "SimpleShot",
https://arxiv.org/abs/1911.04623), changed no figure of four encoders, random and trained, by more
than 0.006, well within its interval.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch.nn import functional as F

from exports.images import ImageSpec
from trainer.config import Config
from trainer.data import Example, check_apart
from trainer.errors import ConfigError, DataError
from trainer.features import (
    alignment,
    knn_accuracy,
    linear_accuracy,
    pooled_features,
    rankme,
    spread,
    uniformity,
)
from trainer.intervals import bootstrap
from trainer.labels import Labelled, read_labels
from trainer.metrics import cider
from trainer.metrics._scores import Scores, mean_scores
from trainer.neighbours import CaptionedNeighbours
from trainer.photos import load_all, read_captioned, usable_examples
from trainer.transforms import Augment, Crop, Flip, Transform

_PAIRS = 256  # images of which two views are compared: enough for a mean, and a fast one
_LABEL_FREE = ("probe/rankme", "probe/alignment", "probe/uniformity", "probe/spread")
_WITH_LABELS = ("probe/caption_cider", "probe/linear", "probe/knn")

_LEAST_SPREAD = 0.03  # random encoders begin at 0.1 or above, collapsed ones end below 0.015
_LEAST_RANK = 2.0
_LEAST_RANK_LEFT = 1 / 3  # of the start's


class ProbeConfig(Config):
    """Keys of `[probe]`."""

    sample: int = Field(default=1000, ge=2)
    """How many of the raw images RankMe, alignment, uniformity and spread look at."""
    captioned: Path | None = None
    """A few captioned images: what the caption probe may copy from. All are held in memory."""
    captioned_split: str | None = None
    dev: Path | None = None
    """Captioned images on which the caption probe is measured; needs `captioned`."""
    dev_split: str | None = None
    reveal: int = Field(default=0, ge=0)
    """How many captions may be copied from, one of each of so many images; 0 is all there are."""
    draws: int = Field(default=1, ge=1)
    """How often so many are drawn; the figure is the mean, and says less of which were drawn."""
    labels: Path | None = None
    """A CSV file with the columns image, label and perhaps split (train or test)."""
    images: Path | None = None
    """The folder that the image names of all three are relative to."""
    neighbours: int = Field(default=20, ge=1)
    """Known images whose labels vote for an image's."""
    temperature: float = Field(default=0.07, gt=0)
    """Of their votes; the lower, the more the nearest ones count."""


class Probes:
    """Measures an encoder, as often as asked, always on the same images.

    Args:
        config: `[probe]`.
        image: the size that the encoder takes.
        examples: the raw images, whose files decode.
        seed: of which of them are looked at, and of their views.

    Raises:
        ConfigError: one of `captioned` and `dev` is missing.
        DataError: a data set cannot be read, `captioned` and `dev` share an image, or the labels
            leave nothing to learn or to measure.
    """

    def __init__(
        self, config: ProbeConfig, image: ImageSpec, examples: Sequence[Example], *, seed: int
    ) -> None:
        draw = random.Random(seed)
        sample = draw.sample(list(examples), min(config.sample, len(examples)))
        self._images = load_all(sample, image)
        self._views = _two_views(self._images[:_PAIRS], draw)
        self._captions = _caption_probe(config, image, seed)
        self._labels = _label_probe(config, image)

    def measure(self, encoder: Any) -> dict[str, float]:
        """Returns the figures by name; those without labels are nan where features are not finite.

        Args:
            encoder: as in `trainer.encoders`, in evaluation mode, on any device.
        """
        with torch.no_grad(), _own_randomness(encoder):
            features = pooled_features(encoder, self._images)
            if not features.isfinite().all():
                return dict.fromkeys(_LABEL_FREE, math.nan)
            first, second = (pooled_features(encoder, views) for views in self._views)
            values = (rankme(features), alignment(first, second), uniformity(features))
            figures = dict(zip(_LABEL_FREE, (*values, spread(features)), strict=True))
            if self._labels is not None:
                figures |= self._labels.measure(encoder)
        if self._captions is not None:
            interval = bootstrap(self.caption_scores(encoder))["CIDEr-D"]
            figures["probe/caption_cider"] = interval.value
            figures["probe/caption_low"] = interval.low
            figures["probe/caption_high"] = interval.high
        return figures

    def caption_scores(self, encoder: Any) -> Scores:
        """Returns the CIDEr-D of every image of `dev`, to compare two encoders in pairs.

        Raises:
            ConfigError: there are no captioned images.
        """
        if self._captions is None:
            raise ConfigError("the caption probe needs probe.captioned and probe.dev")
        with torch.no_grad(), _own_randomness(encoder):
            return self._captions.scores(encoder)


class _CaptionProbe:
    """What captions are worth to their neighbours.

    Args:
        captioned: what may be copied from.
        dev: where it is measured.
        image: the encoder's size.
        draws: of captioned images those that are revealed, and which of their captions.
    """

    def __init__(
        self,
        captioned: Sequence[Example],
        dev: Sequence[Example],
        image: ImageSpec,
        draws: Sequence[dict[int, tuple[str, ...]]],
    ) -> None:
        self._draws = [
            (list(revealed), CaptionedNeighbours(list(revealed.values()))) for revealed in draws
        ]
        self._references = [example.captions for example in dev]
        self._known, self._images = load_all(captioned, image), load_all(dev, image)

    def scores(self, encoder: Any) -> Scores:
        known, features = (
            F.normalize(pooled_features(encoder, images), dim=1).numpy()
            for images in (self._known, self._images)
        )
        found = [
            cider.score(self._references, neighbours.copied(features, known[revealed]))
            for revealed, neighbours in self._draws
        ]
        per_image: NDArray[np.float64] = np.mean([one.per_image[:, 0] for one in found], axis=0)
        return mean_scores(found[0].names[0], per_image)


def _draws(
    config: ProbeConfig, captioned: Sequence[Example], seed: int
) -> list[dict[int, tuple[str, ...]]]:
    """Returns the captions that each draw reveals, by image.

    Raises:
        ConfigError: there are fewer captioned images than are to be revealed.
    """
    if not config.reveal:
        return [{number: example.captions for number, example in enumerate(captioned)}]
    if config.reveal > len(captioned):
        raise ConfigError(
            f"probe.reveal = {config.reveal}, but {config.captioned} has {len(captioned)} images"
        )
    draw = random.Random(seed)
    return [
        {
            number: (draw.choice(captioned[number].captions),)
            for number in draw.sample(range(len(captioned)), config.reveal)
        }
        for _ in range(config.draws)
    ]


def _caption_probe(config: ProbeConfig, image: ImageSpec, seed: int) -> _CaptionProbe | None:
    if config.captioned is None and config.dev is None:
        return None
    if config.captioned is None or config.dev is None:
        raise ConfigError(
            "probe.captioned and probe.dev go together: captions are copied from the one and "
            "measured on the other"
        )
    captioned = read_captioned(config.captioned, config.images, config.captioned_split)
    dev = read_captioned(config.dev, config.images, config.dev_split)
    check_apart(captioned, dev, "probe.captioned", "probe.dev")
    return _CaptionProbe(captioned, dev, image, _draws(config, captioned, seed))


class _LabelProbe:
    def __init__(
        self, config: ProbeConfig, known: list[Labelled], others: list[Labelled], image: ImageSpec
    ) -> None:
        self._config = config
        classes = sorted({row.label for row in known})
        numbers = {label: number for number, label in enumerate(classes)}
        self._images, self._known = (
            load_all([Example(row.image, (), None) for row in rows], image)
            for rows in (others, known)
        )
        # -1, which nothing predicts, stands for a label that no known image has.
        self._image_labels, self._known_labels = (
            torch.tensor([numbers.get(row.label, -1) for row in rows]) for rows in (others, known)
        )

    def measure(self, encoder: Any) -> dict[str, float]:
        features, known = (pooled_features(encoder, i) for i in (self._images, self._known))
        sets = (features, self._image_labels, known, self._known_labels)
        vote = knn_accuracy(
            *sets, neighbours=self._config.neighbours, temperature=self._config.temperature
        )
        return {"probe/knn": vote, "probe/linear": linear_accuracy(*sets)}


def _label_probe(config: ProbeConfig, image: ImageSpec) -> _LabelProbe | None:
    if config.labels is None:
        return None
    rows = read_labels(config.labels, images=config.images)
    found = usable_examples([Example(row.image, (), None) for row in rows])
    usable = {example.image for example in found}
    known, others = (
        [row for row in rows if row.known is side and row.image in usable] for side in (True, False)
    )
    labels = len({row.label for row in known})
    if labels < 2 or not others:
        raise DataError(
            f"{config.labels}: {len(known)} images of {labels} labels to learn from, {len(others)} "
            "to measure on; a probe needs two labels and images on both sides"
        )
    return _LabelProbe(config, known, others, image)


def _two_views(images: NDArray[np.uint8], draw: random.Random) -> list[NDArray[np.uint8]]:
    """Returns two mildly changed copies of images (n, H, W, 3)."""
    transform = Transform(Augment(crop=Crop(area=0.7), flip=Flip()), images.shape[1:3])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return [
        torch.stack([transform(image, draw.getrandbits(62), flip="free") for image in pixels])
        .permute(0, 2, 3, 1)
        .numpy()
        for _ in range(2)
    ]


@contextmanager
def _own_randomness(encoder: Any) -> Iterator[None]:
    """Leaves the random state of training as it is, whatever the encoder draws."""
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def collapse_alarm(figures: Mapping[str, float], first: Mapping[str, float]) -> str | None:
    """Returns why an encoder must be taken for collapsed, in one sentence, or None.

    A RankMe that falls is no alarm by itself, since features that keep fewer things apart may keep
    the right ones: it is one where no probe with labels got better.

    Args:
        figures: what `Probes.measure` returned now.
        first: what it returned of the encoder that training began with; may be empty.
    """
    if any(math.isnan(figures[name]) for name in _LABEL_FREE):
        return "the features are not finite numbers; lower optim.lr"
    rank, start = figures["probe/rankme"], first.get("probe/rankme", math.nan)
    if figures["probe/spread"] < _LEAST_SPREAD:
        return (
            f"all images have nearly the same features (spread {figures['probe/spread']:.4f}; 1 is "
            "isotropic, 0 a single point): the encoder has collapsed"
        )
    if rank < _LEAST_RANK:
        return f"the features differ in one direction only (RankMe {rank:.2f}): they have collapsed"
    better = any(
        figures[name] > first[name] for name in _WITH_LABELS if name in figures and name in first
    )
    if rank < start * _LEAST_RANK_LEFT and not better:
        return (
            f"the features differ in ever fewer directions (RankMe {rank:.1f}, at the start "
            f"{start:.1f}) and no probe with labels got better: they carry less and less"
        )
    return None
