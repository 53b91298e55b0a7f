"""Captions that nobody has looked at: drawn by a captioner, scored by a filter, batch by batch."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from exports.images import ImageSpec
from trainer.captioner import Captioner
from trainer.data import Example
from trainer.decoding import sample
from trainer.errors import CheckpointError
from trainer.photos import load_pixels
from trainer.retrieval import Reader
from trainer.run import Run


@dataclass(frozen=True, slots=True)
class Candidate:
    """A caption, who wrote it, and how likely it describes its image (None: not asked)."""

    image: str
    caption: str
    source: str
    match: float | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Images whose captions are scored together: their own (web), or what a captioner says."""

    source: Literal["web", "synthetic"]
    examples: Sequence[Example]

    @property
    def given(self) -> list[list[str]]:
        """What is known of each image beforehand: its file and the texts that it came with."""
        texts = [example.captions if self.source == "web" else () for example in self.examples]
        return [[name_of(example), *own] for example, own in zip(self.examples, texts, strict=True)]


def name_of(example: Example) -> str:
    """Returns the image's file, wherever a data set that names it may stand."""
    return str(example.image.resolve())


class Writer:
    """A captioner that draws captions by nucleus sampling.

    Args:
        run: the captioner's.
        captions: how many are drawn of each image.
        top_p: see `trainer.decoding.sample`.
        max_new_tokens: likewise.
        seed: with the number of a batch, decides its captions.
    """

    def __init__(
        self, run: Run, *, captions: int, top_p: float, max_new_tokens: int, seed: int
    ) -> None:
        self._run, self._captioner = run, run.captioner()
        self._each, self._top_p = captions, top_p
        self._max_new_tokens, self._seed = max_new_tokens, seed

    @torch.inference_mode()
    def captions(self, examples: Sequence[Example], number: int) -> list[tuple[str, ...]]:
        """Returns captions of each image of batch `number`, no two of an image the same."""
        run = self._run
        torch.manual_seed((self._seed << 32) + number)
        pixels = [load_pixels(example.image, run.recipe.image) for example in examples]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        found = drawn_captions(
            run,
            self._captioner,
            images,
            self._each,
            max_new_tokens=self._max_new_tokens,
            top_p=self._top_p,
        )
        return [tuple(dict.fromkeys(text for text in own if text)) for own in found]


def drawn_captions(
    run: Run,
    captioner: Captioner,
    images: Tensor,
    count: int,
    *,
    max_new_tokens: int,
    top_p: float,
) -> list[list[str]]:
    """Returns `count` captions of each image (B, 3, H, W), by nucleus sampling.

    Args:
        run: that the captioner is of.
        captioner: on the device of the images.
        images: as the captioner takes them.
        count: drawn of each; some may be alike, or empty.
        max_new_tokens: where they are cut.
        top_p: share of the probability that is drawn from.
    """
    prompt = run.prompt_ids
    token_ids, lengths = sample(
        captioner,
        captioner.memory(images),
        count,
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        prefix=prompt,
    )
    texts = [
        run.tokenizer.decode(ids[1 + len(prompt) : length])
        for ids, length in zip(token_ids.tolist(), lengths.tolist(), strict=True)
    ]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def score_batches(
    batches: Sequence[Batch], writer: Writer, reader: Reader, image: ImageSpec, path: Path
) -> list[Candidate]:
    """Returns every candidate. Batches that `path` holds are read from it, others added to it.

    Args:
        batches: in the same order each time.
        writer: of what is not there yet.
        reader: the filter.
        image: what its images look like.
        path: one JSON object a batch.

    Raises:
        CheckpointError: what `path` holds is of other images or texts.
    """
    done = _done(path, batches)
    with path.open("a", encoding="utf-8") as file:
        for number in tqdm(range(len(done), len(batches)), desc="captioning", disable=None):
            batch = batches[number]
            texts = [example.captions for example in batch.examples]
            if batch.source == "synthetic":
                texts = writer.captions(batch.examples, number)
            pixels = np.stack([load_pixels(one.image, image) for one in batch.examples])
            found = reader.probabilities(pixels, texts)
            rows = [
                Candidate(name_of(example), text, batch.source, float(match))
                for example, own, matches in zip(batch.examples, texts, found, strict=True)
                for text, match in zip(own, matches, strict=True)
            ]
            line = {"given": batch.given, "rows": [asdict(row) for row in rows]}
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done.append(rows)
    return [row for rows in done for row in rows]


def _done(path: Path, batches: Sequence[Batch]) -> list[list[Candidate]]:
    """Returns the candidates of the batches that are done; half a line at the end is cut off."""
    if not path.exists():
        return []
    body = path.read_text(encoding="utf-8")
    whole = body[: body.rfind("\n") + 1]
    if whole != body:
        path.write_text(whole, encoding="utf-8")
    lines = [json.loads(line) for line in whole.splitlines()]
    if [line["given"] for line in lines] != [batch.given for batch in batches[: len(lines)]]:
        raise CheckpointError(
            f"{path}: of other images or texts than the recipe names now; choose another folder "
            "with --out, or remove this file to begin again"
        )
    return [[Candidate(**row) for row in line["rows"]] for line in lines]
