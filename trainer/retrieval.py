"""How well a captioner's matcher knows captions and images that belong together.

- Retrieval by nearness in the shared space: TR of an image's captions among all captions, IR of a
  caption's image among all images. R@k: how often one is among the best k; median: of its rank.
- ITM AUC: how often the classifier finds a true caption of some image likelier than a caption of
  another image for some image; `swapped`: than a true one with a word changed (see
  `trainer.attributes`). 0.5 is chance.

Where captions repeat, every image that has a caption is a right one for it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exports.text import TextSpec, Tokenizer
from trainer.attributes import swapped
from trainer.captioner import Captioner
from trainer.dataset import padded
from trainer.metrics._scores import Scores, mean_scores

_RANKS = 1000  # told apart; worse ones count as the worst
_BEST = (1, 5, 10)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Images with their captions.

    Attributes:
        pixels: uint8 (n, H, W, 3).
        captions: those of each image, at least one.
    """

    pixels: NDArray[np.uint8]
    captions: Sequence[Sequence[str]]


class Embedder(Protocol):
    """Anything that puts images and captions into one space."""

    def embed_images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Returns unit vectors (n, E) of pixels (n, H, W, 3)."""

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors (m, E) of captions."""


class Reader:
    """A captioner's matcher, asked about texts.

    Args:
        captioner: with a matcher.
        tokenizer: of its captions.
        batch_size: images at a time.
    """

    def __init__(self, captioner: Captioner, tokenizer: Tokenizer, *, batch_size: int = 32) -> None:
        assert captioner.matcher is not None
        self._captioner, self._matcher = captioner.eval(), captioner.matcher
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._device = next(captioner.parameters()).device

    @torch.inference_mode()
    def embed_images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Returns unit vectors (n, E) of pixels (n, H, W, 3)."""
        found = []
        for start in range(0, len(pixels), self._batch_size):
            images = self._images(pixels[start : start + self._batch_size])
            found.append(self._matcher.embed_images(self._captioner.encoder(images)[1]))
        return torch.cat(found)

    @torch.inference_mode()
    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Returns unit vectors (m, E) of captions."""
        found, rows = [], 8 * self._batch_size
        for start in range(0, len(captions), rows):
            batch = self._ids(captions[start : start + rows])
            found.append(self._matcher.embed_captions(self._captioner.decoder, *batch))
        return torch.cat(found)

    @torch.inference_mode()
    def probabilities(
        self, pixels: NDArray[np.uint8], captions: Sequence[Sequence[str]]
    ) -> list[Floats]:
        """Returns for each image how likely each of its captions is to describe it."""
        found: list[Floats] = []
        for start in range(0, len(pixels), self._batch_size):
            batch = captions[start : start + self._batch_size]
            memory = self._captioner.memory(self._images(pixels[start : start + len(batch)]))
            # All images of a batch get as many rows; blank ones fill up what is missing.
            most = max(1, *map(len, batch))
            filled = [text for own in batch for text in [*own, *[""] * (most - len(own))]]
            logits = self._matcher.match_logits(self._captioner.decoder, *self._ids(filled), memory)
            rows = logits.softmax(1)[:, 1].view(len(batch), most).double().cpu().numpy()
            found += [row[: len(own)] for row, own in zip(rows, batch, strict=True)]
        return found

    def _images(self, pixels: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)

    def _ids(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        text = self._captioner.text
        rows = [caption_ids(self._tokenizer, text, caption) for caption in captions]
        token_ids, lengths = padded(rows, text.pad_id)
        return token_ids.to(self._device), lengths.to(self._device)


def caption_ids(tokenizer: Tokenizer, text: TextSpec, caption: str) -> list[int]:
    """Returns `<bos>` ... `<eos>`, cut to the longest sequence that a decoder reads."""
    return [text.bos_id, *tokenizer.encode(caption)[: text.max_length - 2], text.eos_id]


def measure(reader: Reader, pairs: Pairs, *, seed: int = 0) -> list[Scores]:
    """Returns the figures of the module, fit for `trainer.intervals`.

    Args:
        reader: whose matcher is measured.
        pairs: held out, at least 2.
        seed: of the false captions.
    """
    scores = retrieval_scores(reader, pairs)
    others = [[text] if text is not None else [] for text in _of_others(pairs, seed)]
    scores += _auc_scores("ITM AUC", reader, pairs, others)
    changed = _changed(pairs, seed)
    return scores + _auc_scores("ITM AUC swapped", reader, pairs, changed)


def retrieval_scores(reader: Embedder, pairs: Pairs) -> list[Scores]:
    """Returns TR and IR: R@1, R@5, R@10 and the median rank."""
    text_ranks, image_ranks = retrieval_ranks(reader, pairs)
    return [rank_scores("TR", text_ranks), rank_scores("IR", image_ranks)]


def retrieval_ranks(
    reader: Embedder, pairs: Pairs
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Returns for each image the rank of its best caption, (1,), and for its captions its own.

    Ranks count from 1; those of an image's c captions, (c,), are of the image among all images.
    """
    images = reader.embed_images(pairs.pixels)
    flat = [caption for own in pairs.captions for caption in own]
    similarity = (images @ reader.embed_captions(flat).T).double().cpu().numpy()
    right = _right(pairs)
    text_ranks = _best_ranks(similarity, right)
    image_ranks = _best_ranks(similarity.T, right.T)
    ends = np.cumsum([len(own) for own in pairs.captions])
    return [row[None] for row in text_ranks], np.split(image_ranks, ends[:-1])


def _right(pairs: Pairs) -> NDArray[np.bool_]:
    """Returns (n, m), whether each of all m captions is one of each image's."""
    flat = [caption for own in pairs.captions for caption in own]
    return np.array([np.isin(flat, own) for own in pairs.captions])


def _best_ranks(similarity: Floats, right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Returns the rank of each row's best right column, from 1; ties count against it."""
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    ranks: NDArray[np.int64] = 1 + ((similarity >= best) & ~right).sum(1)
    return ranks


def rank_scores(name: str, ranks: Sequence[NDArray[np.int64]]) -> Scores:
    """Returns R@k and the median of ranks (from 1), some of each image."""
    bins = min(_RANKS, max(int(own.max()) for own in ranks))
    bins = max(bins, *_BEST)
    counts = np.stack(
        [np.bincount(np.minimum(own, bins) - 1, minlength=bins) for own in ranks]
    ).astype(np.float64)
    names = (*(f"{name} R@{k}" for k in _BEST), f"{name} median")
    return Scores(names, _of_counts(counts, 1), counts, _of_counts)


def mean_recall(
    text_ranks: Sequence[NDArray[np.int64]], image_ranks: Sequence[NDArray[np.int64]]
) -> Floats:
    """Returns (n,), for each image the mean of R@1, R@5 and R@10 of both directions.

    The arguments are those of `retrieval_ranks`.
    """
    directions = [rank_scores("", ranks).per_image[:, :-1] for ranks in (text_ranks, image_ranks)]
    means: Floats = np.concatenate(directions, axis=1).mean(1)
    return means


def _of_counts(counts: Floats, images: int) -> Floats:
    """Returns the figures (..., 4) of how often each rank occurs, (..., bins)."""
    del images  # an image counts by its captions
    reached = counts.cumsum(-1) / counts.sum(-1, keepdims=True)
    best = reached[..., [k - 1 for k in _BEST]]
    median = (reached >= 0.5).argmax(-1)[..., None] + 1
    return np.concatenate([best, median], axis=-1)


def auc_scores(name: str, true: Sequence[Floats], false: Sequence[Floats]) -> Scores:
    """Returns the share of pairs (true, false) in which the true one has more; ties count half.

    Every image counts the same. What an image adds is what its true ones and its false ones add
    beyond the whole, so that resampled means spread as the figure does (DeLong et al., 1988,
    https://doi.org/10.2307/2531595).

    Args:
        name: of the figure.
        true: values of each of n images, at least one each.
        false: likewise.
    """
    above = _shares_below(true, false)
    below = 1 - _shares_below(false, true)
    return mean_scores(name, above + below - above.mean())


def _shares_below(values: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """Returns (n,): the mean share of the others that an image's values have more than."""
    weights = np.concatenate([np.full(len(own), 1 / len(own)) for own in others]) / len(others)
    flat = np.concatenate(others)
    order = flat.argsort()
    reached = np.concatenate([[0.0], weights[order].cumsum()])

    def share(own: Floats) -> float:
        first = np.searchsorted(flat[order], own, side="left")
        last = np.searchsorted(flat[order], own, side="right")
        return float(((reached[first] + reached[last]) / 2).mean())

    return np.array([share(own) for own in values])


def _auc_scores(
    name: str, reader: Reader, pairs: Pairs, false: Sequence[Sequence[str]]
) -> list[Scores]:
    """Returns the AUC over the images that have a false caption, or nothing where none has."""
    kept = [index for index, texts in enumerate(false) if texts]
    if not kept:
        return []
    true = [list(pairs.captions[index]) for index in kept]
    both = [own + list(false[index]) for own, index in zip(true, kept, strict=True)]
    found = reader.probabilities(pairs.pixels[kept], both)
    mine = [row[: len(own)] for row, own in zip(found, true, strict=True)]
    theirs = [row[len(own) :] for row, own in zip(found, true, strict=True)]
    return [auc_scores(name, mine, theirs)]


def _of_others(pairs: Pairs, seed: int) -> list[str | None]:
    """Returns for each image a caption that only other images have; None: there is none."""
    draw = random.Random(seed)
    flat = [caption for own in pairs.captions for caption in own]
    found = []
    for own in pairs.captions:
        drawn = (draw.choice(flat) for _ in range(100))
        found.append(next((caption for caption in drawn if caption not in own), None))
    return found


def _changed(pairs: Pairs, seed: int) -> list[list[str]]:
    """Returns for each image its captions with a word changed, where they have such a word."""
    draw = random.Random(seed)
    words = {word for own in pairs.captions for caption in own for word in caption.lower().split()}
    changed = [[swapped(caption, draw, words=words) for caption in own] for own in pairs.captions]
    return [
        [text for text in texts if text is not None and text not in own]
        for texts, own in zip(changed, pairs.captions, strict=True)
    ]
