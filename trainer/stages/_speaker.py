"""What a run's captioner says of images: captions drawn, its best one, and what that teaches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from trainer.acquisition._head_gradients import head_gradients
from trainer.data import Example
from trainer.dataset import padded
from trainer.decoding import TorchSteps, beam_search
from trainer.photos import load_pixels
from trainer.run import Run
from trainer.stages._candidates import drawn_captions

_BATCH = 32


class RunSpeaker:
    """The captioner of a run, which is loaded once it is asked. See `trainer.acquisition._pool`.

    Args:
        run: of `finetune`.
        examples: the images, by row.
        seed: of what is drawn.
    """

    def __init__(self, run: Run, examples: Sequence[Example], *, seed: int) -> None:
        self._run, self._examples, self._seed = run, examples, seed
        self._loaded: Any = None
        self._best: dict[int, tuple[int, ...]] = {}

    @torch.inference_mode()
    def samples(
        self, rows: Sequence[int], count: int, *, top_p: float, max_new_tokens: int
    ) -> list[list[str]]:
        """Returns `count` captions drawn for each image, the same for the same rows."""
        found: list[list[str]] = []
        for number, (_, pixels) in enumerate(self._batches(rows, "drawing captions")):
            torch.manual_seed((self._seed << 32) + number)
            found += drawn_captions(
                self._run,
                self._captioner(),
                self._tensor(pixels),
                count,
                max_new_tokens=max_new_tokens,
                top_p=top_p,
            )
        return found

    def best(self, rows: Sequence[int]) -> list[str]:
        """Returns the caption that beam search finds for each image."""
        begin, decode = len(self._run.prompt_ids), self._run.tokenizer.decode
        return [decode(list(ids[begin:])) for ids in self._best_ids(rows)]

    def gradients(self, rows: Sequence[int], width: int) -> NDArray[np.float32]:
        """Returns `head_gradients` of the best captions, (r, width)."""
        captioner, text = self._captioner(), self._run.text
        found, begin = [], 1 + len(self._run.prompt_ids)
        best = self._best_ids(rows)
        for number, (own, pixels) in enumerate(self._batches(rows, "gradients")):
            ids = [[text.bos_id, *one] for one in best[number * _BATCH :][: len(own)]]
            token_ids, lengths = padded(ids, text.pad_id)
            with torch.inference_mode():
                memory = captioner.memory(self._tensor(pixels))
                found.append(
                    head_gradients(
                        captioner, memory, token_ids, lengths, width, begin=begin, seed=self._seed
                    )
                )
        gradients: NDArray[np.float32] = torch.cat(found).numpy()
        return gradients

    def _best_ids(self, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Returns the ids of the best captions, prompt and `<eos>` included; asks once for each."""
        waiting = [row for row in rows if row not in self._best]
        if waiting:
            steps, run = TorchSteps(self._captioner()), self._run
            for own, pixels in self._batches(waiting, "captioning"):
                lists = beam_search(steps, pixels, run.recipe.generation, run.prompt_ids)
                self._best |= {
                    row: hypotheses[0].token_ids for row, hypotheses in zip(own, lists, strict=True)
                }
        return [self._best[row] for row in rows]

    def _batches(
        self, rows: Sequence[int], what: str
    ) -> Iterator[tuple[Sequence[int], NDArray[np.uint8]]]:
        starts = range(0, len(rows), _BATCH)
        for start in tqdm(starts, desc=what, disable=None):
            own = rows[start : start + _BATCH]
            images = [self._examples[row].image for row in own]
            yield own, np.stack([load_pixels(one, self._run.recipe.image) for one in images])

    def _captioner(self) -> Any:
        if self._loaded is None:
            self._loaded = self._run.captioner()
        return self._loaded

    def _tensor(self, pixels: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)
