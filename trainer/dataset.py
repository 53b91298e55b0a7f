"""Batches of images with their captions, in an order that depends on the seed and epoch alone."""

import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from exports.text import TextSpec, Tokenizer
from trainer.data import Example
from trainer.transforms import Transform

_SIDED = re.compile(r"\b(left|right)\b", re.IGNORECASE)


class CaptionDataset(Dataset[dict[str, Any]]):
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
        self.examples, self.tokenizer = examples, tokenizer
        self._images, self._captions = images, captions
        self._transform, self._seed = transform, seed
        longest = text.max_length - 2
        self._token_ids = [
            [[text.bos_id, *tokenizer.encode(c)[:longest], text.eos_id] for c in example.captions]
            for example in examples
        ]
        self._sided = [any(_SIDED.search(c) for c in example.captions) for example in examples]
        self._pad_id = text.pad_id

    def __len__(self) -> int:
        return len(self._token_ids)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        draw = random.Random(f"{self._seed}-{epoch}-{index}")
        own = self._token_ids[index]
        drawn = draw.sample(own, k=min(self._captions, len(own)))
        drawn += draw.choices(own, k=self._captions - len(drawn))
        image = torch.from_numpy(self._images[index]).permute(2, 0, 1)
        flip: Literal["free", "never"] = "never" if self._sided[index] else "free"
        view = self._transform(image, draw.getrandbits(62), flip=flip)
        return {"image": view, "token_ids": drawn, "index": index}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns one batch.

        `images` (B, 3, H, W) uint8; `indices` (B,), of the examples; `token_ids` (B * C, T), the
        captions of an image together, padded; `lengths` (B * C,), tokens without padding.
        """
        sequences = [ids for item in items for ids in item["token_ids"]]
        lengths = torch.tensor([len(ids) for ids in sequences])
        token_ids = torch.full((len(sequences), int(lengths.max())), self._pad_id)
        for row, ids in enumerate(sequences):
            token_ids[row, : len(ids)] = torch.tensor(ids)
        images = torch.stack([item["image"] for item in items])
        indices = torch.tensor([item["index"] for item in items])
        return {"images": images, "token_ids": token_ids, "lengths": lengths, "indices": indices}


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of `(epoch, index)` in one shuffled epoch, from batch `start` on.

    Args:
        size: how many items there are.
        batch_size: B; the last, smaller batch is left out unless it is the only one.
        seed: with `epoch`, decides the order.
        epoch: counted from 0.
        start: batches to skip, for a resume in the middle of an epoch.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, epoch: int, start: int = 0):
        self._size, self._batch_size, self._epoch, self._start = size, batch_size, epoch, start
        self._seed = seed

    def __len__(self) -> int:
        return max(1, self._size // self._batch_size) - self._start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = list(range(self._size))
        random.Random(f"{self._seed}-{self._epoch}").shuffle(order)
        for batch in range(self._start, self._start + len(self)):
            rows = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield [(self._epoch, index) for index in rows]
