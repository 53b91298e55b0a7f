"""What the training images look like to the encoder, so that a server can tell when others come.

Of each image one vector: an output of the encoder graph, averaged over the image's tokens. Of the
training images the mean and the deviation of each of its numbers are kept, and of a new image

    distance = sqrt(mean_i ((x_i - mean_i) / deviation_i) ** 2)

which is the Mahalanobis distance by a diagonal covariance (Lee et al., 2018, "A Simple Unified
Framework for Detecting Out-of-Distribution Samples", https://arxiv.org/abs/1807.03888) over the
root of the number of dimensions: the training images' own mean square is 1, whatever the encoder.
Departures: 1. a diagonal, since a hundred images do not fill a matrix; 2. no classes, since
captions have none.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from exports.errors import BundleError

REFERENCE_FILE = "reference.json"
"""Its name in a bundle; one that has none cannot tell."""
_SMALLEST = 1e-6  # a number that never varied would make any other infinitely strange
_QUANTILE = 0.99

Floats = npt.NDArray[np.floating]


class Reference(BaseModel):
    """The statistics of the training images.

    `output` names the encoder's output. `usual` is the distance that 99 % of the training images
    stay below, each half of them held against the other; `images` is how many there were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    output: str
    images: int = Field(ge=2)
    mean: tuple[float, ...] = Field(min_length=1)
    deviation: tuple[float, ...]
    usual: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_sound(self) -> "Reference":
        if len(self.mean) != len(self.deviation):
            raise ValueError(f"{len(self.mean)} means, but {len(self.deviation)} deviations")
        if not np.isfinite(self.mean).all() or not min(self.deviation) > 0:
            raise ValueError("a mean is not finite or a deviation is not above 0")
        return self

    @classmethod
    def fit(cls, output: str, features: Floats) -> "Reference":
        """Returns that of images, from their `features_of` (B, D), B at least 4."""
        half = [features[0::2], features[1::2]]
        crossed = [_distances(other, *_moments(one)) for one, other in (half, half[::-1])]
        mean, deviation = _moments(features)
        return cls(
            output=output,
            images=len(features),
            mean=tuple(mean.round(6).tolist()),
            deviation=tuple(deviation.round(6).clip(_SMALLEST).tolist()),
            usual=round(float(np.quantile(np.concatenate(crossed), _QUANTILE)), 4),
        )

    def distances(self, values: Floats) -> Floats:
        """Returns the distance of each image, (B,); those beyond `usual` are strange.

        Args:
            values: What the encoder gave of them as `output`.

        Raises:
            BundleError: It has another size than that of the training images.
        """
        features = features_of(values)
        if features.shape[1] != len(self.mean):
            raise BundleError(
                f"{REFERENCE_FILE} has {len(self.mean)} numbers, but {self.output} gives"
                f" {features.shape[1]}"
            )
        return _distances(features, np.array(self.mean), np.array(self.deviation))

    def to_json(self) -> bytes:
        """Returns it as the bytes of reference.json."""
        return self.model_dump_json().encode() + b"\n"

    @classmethod
    def from_json(cls, body: bytes) -> "Reference":
        """Reads reference.json.

        Raises:
            BundleError: Not JSON, or a missing or wrong field; the message names the first.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise BundleError(f"{REFERENCE_FILE}: {where}: {first['msg']}") from error


def features_of(values: Floats) -> Floats:
    """Returns one vector (B, D) of each image.

    Args:
        values: (B, ..., tokens, numbers), as (B, N, D), or (B, heads, N, D) of keys.
    """
    features: Floats = values.astype(np.float32).mean(axis=-2).reshape(len(values), -1)
    return features


def _moments(features: Floats) -> tuple[Floats, Floats]:
    return features.mean(axis=0), features.std(axis=0).clip(_SMALLEST)


def _distances(features: Floats, mean: Floats, deviation: Floats) -> Floats:
    found: Floats = np.sqrt((((features - mean) / deviation) ** 2).mean(axis=1))
    return found
