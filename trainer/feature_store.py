"""Features of images by the bytes of their files, kept so that nothing is encoded twice.

`features/<encoder>/*.safetensors` below a folder, where `<encoder>` tells architecture, weights and
image size apart. Each file holds some images: `sha256` (n, 32) of their bytes and `looks` (n, 16)
(see `trainer.photos`), uint8 both, and `features` (n, D), unit vectors in float32. An encoding that
was killed goes on behind the last file.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch.nn import functional as F
from tqdm import tqdm

from exports.images import ImageSpec
from trainer.checkpoint import load_checkpoint, save_checkpoint
from trainer.data import Example
from trainer.errors import CheckpointError, DataError
from trainer.features import pooled_features
from trainer.photos import Fingerprint, load_all, scan_images

IMAGES_OF_A_FILE = 512


@dataclass(frozen=True, slots=True)
class Encoded:
    """Images that decode, with their features.

    Attributes:
        examples: n of them, in their order.
        features: (n, D), unit vectors.
        fingerprints: of each.
    """

    examples: list[Example]
    features: NDArray[np.float32]
    fingerprints: list[Fingerprint]


class FeatureStore:
    """The features that one encoder gives, in a folder.

    Args:
        folder: where `features/` is.
        encoder: as in `trainer.encoders`, in evaluation mode, on any device.
        table: the recipe's, without the place of its weights.
        image: what the encoder takes.
    """

    def __init__(self, folder: Path, encoder: Any, table: dict[str, Any], image: ImageSpec) -> None:
        self._encoder, self._image = encoder, image
        self._folder = folder / "features" / _identity(encoder, table, image)

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Returns the features of all images that decode, and says which do not.

        Raises:
            DataError: none does, or an image vanished meanwhile.
            CheckpointError: a file of features is damaged.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / ".lock"):  # whoever comes second finds what the first encoded
            return self._encode(examples)

    def _encode(self, examples: Sequence[Example]) -> Encoded:
        digests = _digests(examples)
        looks = self._known()
        waiting = _distinct(one for one in examples if digests.get(one.image) not in looks)
        report = scan_images(waiting)
        if waiting:
            print(report.summary())
        if len(waiting) < len(examples):
            print(f"features of {len(examples) - len(waiting)} images are there already")
        self._add(report.ok, report.fingerprints)
        # The bytes that were decoded, should a file have changed since it was read first.
        digests |= {path: found.sha256 for path, found in report.fingerprints.items()}
        left_out = {path for path, _ in report.problems}
        ok = [example for example in examples if example.image not in left_out]
        if not ok:
            raise DataError("no image can be decoded; the reasons are listed above")
        return self._gather(ok, [digests[example.image] for example in ok])

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))

    def _known(self) -> set[str]:
        return {sha for path in self._files() for sha in _hex(_load(path)["sha256"])}

    def _add(self, examples: Sequence[Example], fingerprints: dict[Path, Fingerprint]) -> None:
        begun = len(self._files())
        starts = range(0, len(examples), IMAGES_OF_A_FILE)
        for number, start in enumerate(tqdm(starts, desc="encoding", disable=None), begun):
            part = examples[start : start + IMAGES_OF_A_FILE]
            found = [fingerprints[example.image] for example in part]
            features = pooled_features(self._encoder, load_all(part, self._image))
            if not features.isfinite().all():
                raise DataError("the encoder's features are not finite numbers; take another")
            tensors = {
                "sha256": _bytes([bytes.fromhex(one.sha256) for one in found]),
                "looks": _bytes([one.look for one in found]),
                "features": F.normalize(features, dim=1),
            }
            save_checkpoint(self._folder / f"{number:05d}.safetensors", tensors, {})

    def _gather(self, examples: list[Example], digests: list[str]) -> Encoded:
        """Returns the features of images whose digests are in the files."""
        places: dict[str, list[int]] = {}
        for place, digest in enumerate(digests):
            places.setdefault(digest, []).append(place)
        features: NDArray[np.float32] | None = None
        fingerprints: list[Fingerprint | None] = [None] * len(examples)
        for path in self._files():
            tensors = _load(path)
            own, looks = tensors["features"].numpy(), tensors["looks"].numpy()
            if features is None:
                features = np.empty((len(examples), own.shape[1]), np.float32)
            for row, digest in enumerate(_hex(tensors["sha256"])):
                for place in places.get(digest, ()):
                    features[place] = own[row]
                    fingerprints[place] = Fingerprint(digest, looks[row].tobytes())
        assert features is not None
        return Encoded(examples, features, [one for one in fingerprints if one is not None])


def _identity(encoder: Any, table: dict[str, Any], image: ImageSpec) -> str:
    """Returns what tells an encoder from others: its table, its weights and what it is shown."""
    kept = {key: value for key, value in table.items() if key not in ("weights", "partial")}
    text = json.dumps([kept, image.model_dump()], sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _digests(examples: Sequence[Example]) -> dict[Path, str]:
    """Returns the sha256 of every file that can be read."""
    paths = list(dict.fromkeys(example.image for example in examples))
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(_digest, paths), total=len(paths), desc="reading", unit="img", disable=None
        )
        found = list(bar)
    return {path: one for path, one in zip(paths, found, strict=True) if one is not None}


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # the scan says why
        return None


def _distinct(examples: Iterator[Example]) -> list[Example]:
    return list({example.image: example for example in examples}.values())


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_checkpoint(path)[0]
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; remove this file, and its images are encoded anew"
        ) from error


def _bytes(rows: list[bytes]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1).copy())


def _hex(rows: torch.Tensor) -> list[str]:
    return [row.tobytes().hex() for row in rows.numpy()]
