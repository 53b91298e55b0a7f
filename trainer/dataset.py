"""Batches of images with their captions, in an order that depends on the seed and epoch alone."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from exports.text import TextSpec, Tokenizer
from trainer.data import Example
from trainer.sides import Mirror
from trainer.transforms import Sides, Transform

_ENCODED_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class CaptionIds:
    """The captions of every image as ids, `<bos>` ... `<eos>`.

    Attributes:
        written: As they were written.
        mirrored: As they are of the mirror image, in the same order; None where that is not known.
    """

    written: list[list[list[int]]]
    mirrored: list[list[list[int]] | None]

    @classmethod
    def of(
        cls, examples: Iterable[Example], tokenizer: Tokenizer, text: TextSpec, mirror: Mirror
    ) -> "CaptionIds":
        """Returns the captions of `examples`, longer ones cut."""

        def ids(captions: Sequence[str]) -> list[list[int]]:
            return [framed(tokenizer.encode(caption), text) for caption in captions]

        captions = [example.captions for example in examples]
        written = [ids(own) for own in captions]
        others = [mirror(own) for own in captions]
        return cls(
            written,
            [
                known if other == own else None if other is None else ids(other)
                for own, other, known in zip(captions, others, written, strict=True)
            ],
        )

    def sides(self, index: int) -> Sides:
        """Returns how an image may be turned."""
        return "never" if self.mirrored[index] is None else "free"

    def of_view(self, index: int, mirrored: bool) -> list[list[int]]:
        """Returns the captions of an image, or those of its mirror image."""
        found = self.mirrored[index] if mirrored else self.written[index]
        assert found is not None, "an image was mirrored whose captions cannot be"
        return found


class TrainingData(Dataset[dict[str, Any]], ABC):
    """What the loop draws batches from: items by `(epoch, index)`, and how they become a batch."""

    @abstractmethod
    def __len__(self) -> int:
        """How many items an epoch has."""

    @abstractmethod
    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """Returns an item, the same for the same key."""

    @abstractmethod
    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns one batch, with `images` in it, (.., 3, H, W) or encoded."""


class CaptionDataset(TrainingData):
    """Items are drawn by `(epoch, index)`; the item's randomness comes from the seed and these two.

    Args:
        examples: with at least one caption each.
        images: their pixels, uint8 (n, H, W, 3).
        tokenizer: turns captions into ids.
        text: its special ids and the longest sequence; longer captions are cut.
        captions: C, how many captions of an image go into one item; an image with fewer repeats
            some, one with more has C drawn anew each epoch.
        transform: the augmentations.
        seed: of the augmentations and draws.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        images: NDArray[np.uint8],
        tokenizer: Tokenizer,
        text: TextSpec,
        *,
        captions: int,
        transform: Transform,
        seed: int,
    ) -> None:
        self.examples, self.tokenizer, self.text = examples, tokenizer, text
        self.images, self.captions = images, captions
        self._transform, self._seed = transform, seed
        self.token_ids = CaptionIds.of(examples, tokenizer, text, transform.mirror)
        self._encoded: list[tuple[Tensor, list[bool]]] = []  # by view: (n, N + 1, D), mirrored

    def encode(self, encoder: Any, views: int) -> None:
        """Has a frozen encoder look once at each image's first views; items then hold what it saw.

        Epoch e gets view e % `views`, so the first epochs are what they would have been.

        Args:
            encoder: as in `trainer.encoders`, in evaluation mode, on any device.
            views: V, how many of each image; without augmentations one is all.
        """
        device, encoded = next(encoder.parameters()).device, list[tuple[Tensor, list[bool]]]()
        with tqdm(total=views * len(self), desc="encoding", unit="img", disable=None) as bar:
            for view in range(views):
                blocks, mirrored = [], list[bool]()
                for start in range(0, len(self), _ENCODED_AT_ONCE):
                    rows = range(start, min(start + _ENCODED_AT_ONCE, len(self)))
                    items = [self[view, index] for index in rows]
                    images = torch.stack([item["image"] for item in items])
                    blocks.append(encoder.encoded(images.to(device)).float().cpu())
                    mirrored += [item["mirrored"] for item in items]
                    bar.update(len(rows))
                encoded.append((torch.cat(blocks), mirrored))
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        draw = random.Random(f"{self._seed}-{epoch}-{index}")
        count = len(self.token_ids.written[index])
        drawn = draw.sample(range(count), k=min(self.captions, count))
        drawn += draw.choices(range(count), k=self.captions - len(drawn))
        if self._encoded:
            features, sides = self._encoded[epoch % len(self._encoded)]
            view, mirrored = features[index], sides[index]
        else:
            image = torch.from_numpy(self.images[index]).permute(2, 0, 1)
            flip = self.token_ids.sides(index)
            view, mirrored = self._transform.view(image, draw.getrandbits(62), flip=flip)
        own = self.token_ids.of_view(index, mirrored)
        return {
            "image": view,
            "mirrored": mirrored,
            "token_ids": [own[number] for number in drawn],
            "drawn": drawn,
            "index": index,
        }

    def references(self, *, mirrored: bool) -> list[tuple[str, ...]]:
        """Returns the captions of every image, or those of the mirror images that items may hold.

        Args:
            mirrored: which of the two.
        """
        written = [example.captions for example in self.examples]
        if not mirrored:
            return written
        return [self._transform.mirror(captions) or captions for captions in written]

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns one batch.

        `images` (B, 3, H, W) uint8, or (B, N + 1, D) once encoded; `indices` (B,), of the
        examples; `mirrored` (B,), whether images and captions are those of the mirror image;
        `token_ids` (B * C, T), the captions of an image together, padded; `lengths` (B * C,),
        tokens without padding.
        """
        token_ids, lengths = padded(
            [ids for item in items for ids in item["token_ids"]], self.text.pad_id
        )
        images = torch.stack([item["image"] for item in items])
        return {
            "images": images,
            "indices": torch.tensor([item["index"] for item in items]),
            "mirrored": torch.tensor([item["mirrored"] for item in items]),
            "token_ids": token_ids,
            "lengths": lengths,
        }


class InterleavedDataset(TrainingData):
    """Items of a `CaptionDataset`, each behind examples: other images of it with a caption each.

    Args:
        dataset: with at least one other image for every example asked for.
        shots: (n, k), which images stand before each, in this order.
        shot_tokens: T, of an example; longer captions are cut.
    """

    def __init__(self, dataset: CaptionDataset, shots: Tensor, shot_tokens: int) -> None:
        self._dataset, self._shots, self._shot_tokens = dataset, shots, shot_tokens

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        item = self._dataset[key]
        others = [(other, self._dataset[epoch, other]) for other in self._shots[index].tolist()]
        known = self._dataset.token_ids
        captions = [known.of_view(other, shown["mirrored"]) for other, shown in others]
        # Of all images the caption of the same place: where that decides the style or language,
        # a prompt is of one.
        shots = [own[number % len(own)] for number in item["drawn"] for own in captions]
        images = torch.stack([shown["image"] for _, shown in others])
        return {**item, "shot_images": images, "shot_token_ids": shots}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns a batch as `CaptionDataset.collate` does, and the examples before each caption.

        `shot_images` (B, k, 3, H, W) uint8; `shot_token_ids` (B * C, k, T), padded; `shot_lengths`
        (B * C, k).
        """
        batch = self._dataset.collate(items)
        rows = [ids for item in items for ids in item["shot_token_ids"]]
        token_ids, lengths = blocks(rows, self._dataset.text.pad_id, self._shot_tokens)
        count = self._shots.shape[1]
        batch["shot_images"] = torch.stack([item["shot_images"] for item in items])
        batch["shot_token_ids"] = token_ids.unflatten(0, (-1, count))
        batch["shot_lengths"] = lengths.unflatten(0, (-1, count))
        return batch


class ViewDataset(TrainingData):
    """Items are views of one image, and where there are captions one of the first view's captions.

    Args:
        images: uint8 (n, H, W, 3), of any size that the transforms take.
        transforms: one for each view.
        seed: of the views and draws.
        token_ids: of every image the captions, or None.
        pad_id: fills up shorter captions of a batch.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        transforms: Sequence[Transform],
        *,
        seed: int,
        token_ids: CaptionIds | None = None,
        pad_id: int = 0,
    ) -> None:
        self._images, self._transforms, self._seed = images, transforms, seed
        self._token_ids, self._pad_id = token_ids, pad_id

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        draw = random.Random(f"{self._seed}-{epoch}-{index}")
        image = torch.from_numpy(self._images[index]).permute(2, 0, 1)
        sides = "free" if self._token_ids is None else self._token_ids.sides(index)
        views = [one.view(image, draw.getrandbits(62), flip=sides) for one in self._transforms]
        item: dict[str, Any] = {"views": [view for view, _ in views], "index": index}
        if self._token_ids is not None:
            mirrored = views[0][1]
            item["token_ids"] = draw.choice(self._token_ids.of_view(index, mirrored))
        return item

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns one batch.

        `images` (V * B, 3, H, W) uint8, all first views before all second ones; `indices` (B,), of
        the images; and with captions `token_ids` (B, T), padded, and `lengths` (B,).
        """
        by_view = zip(*(item["views"] for item in items), strict=True)
        images = torch.stack([view for views in by_view for view in views])
        batch = {"images": images, "indices": torch.tensor([item["index"] for item in items])}
        if self._token_ids is not None:
            captions = [item["token_ids"] for item in items]
            batch["token_ids"], batch["lengths"] = padded(captions, self._pad_id)
        return batch


def framed(token_ids: Sequence[int], text: TextSpec) -> list[int]:
    """Returns `<bos>` ... `<eos>`, cut to the longest sequence."""
    return [text.bos_id, *token_ids[: text.max_length - 2], text.eos_id]


def padded(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Returns ids (R, T), filled up with `pad_id`, and their lengths (R,)."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    token_ids = torch.full((len(sequences), int(lengths.max())), pad_id)
    for row, ids in enumerate(sequences):
        token_ids[row, : len(ids)] = torch.tensor(ids)
    return token_ids, lengths


def blocks(captions: Sequence[Sequence[int]], pad_id: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns captions as ids (R, length), padded or cut before the last id, and their lengths."""
    cut = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in captions]
    token_ids, lengths = padded(cut, pad_id)
    return F.pad(token_ids, (0, length - token_ids.shape[1]), value=pad_id), lengths


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, index)` in one shuffled epoch, from batch `start` on.

    Args:
        size: how many items there are.
        batch_size: B; the last, smaller batch is left out unless it is the only one.
        seed: with `epoch`, decides the order.
        epoch: counted from 0.
        start: batches to skip, for a resume in the middle of an epoch.
        part: (w, W): of every batch, the w-th of W equal parts.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        start: int = 0,
        part: tuple[int, int] = (0, 1),
    ):
        self._size, self._batch_size, self._epoch, self._start = size, batch_size, epoch, start
        self._seed, self._part = seed, part

    def __len__(self) -> int:
        return max(1, self._size // self._batch_size) - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self._size))
        random.Random(f"{self._seed}-{self._epoch}").shuffle(order)
        for batch in range(self._start, self._start + len(self)):
            rows = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            worker, workers = self._part
            share = len(rows) // workers
            yield [(self._epoch, index) for index in rows[worker * share : (worker + 1) * share]]
