"""Beam search in plain steps: the reference that serving must equal token for token.

The rules are those of `transformers`' `generate` with `early_stopping=False`:

1. A step's candidates are the continuations of an image's live beams, scored by the sum of their
   log-probabilities; a banned token's is -inf, and nothing is renormalised.
2. The best 2K are looked at, by (sum descending, token id, row).
3. Of the first K, those that end (`<eos>`, or any at the last allowed step) become finished
   hypotheses with score = sum / n**length_penalty, where n counts generated tokens with `<eos>` and
   without prefix; the K best finished are kept.
4. The best K that do not end live on.
5. An image is done when K are finished and none alive could beat the worst of them as scored now.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from exports.manifest import Generation
from trainer.attention import Memory
from trainer.captioner import Captioner


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished caption: prefix and generated ids with `<eos>`, its score and log-probability."""

    token_ids: tuple[int, ...]
    score: float
    log_prob: float


class StepModel(Protocol):
    """A captioner, one decode step at a time, whatever runs it."""

    bos_id: int
    eos_id: int
    vocab_size: int
    max_length: int

    def encode(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """Returns what is kept of images (B, H, W, 3), by name (see `Captioner.encoded`)."""

    def start(self, images: NDArray[np.uint8]) -> Any:
        """Returns the state before the first token of images (B, H, W, 3), one row an image."""

    def step(
        self, state: Any, token_ids: Sequence[int], beam_index: Sequence[int], top_k: int
    ) -> tuple[Any, NDArray[np.float32], NDArray[np.int64]]:
        """Returns the next state and each row's best log-probabilities and ids, (R, top_k) each.

        Row r continues row beam_index[r] of the step before with token_ids[r]; the R / B rows of an
        image stand together.
        """


class TorchSteps:
    """The PyTorch captioner as a StepModel."""

    def __init__(self, captioner: Captioner) -> None:
        self._captioner = captioner.eval()
        self.bos_id, self.eos_id = captioner.text.bos_id, captioner.text.eos_id
        self.vocab_size, self.max_length = captioner.text.vocab_size, captioner.text.max_length
        self._device = next(captioner.parameters()).device

    @torch.inference_mode()
    def encode(self, images: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
        """See `StepModel`."""
        named = self._captioner.encoded(self._pixels(images))
        return {name: value.float().cpu().numpy() for name, value in named.items()}

    @torch.inference_mode()
    def start(self, images: NDArray[np.uint8]) -> Any:
        """See `StepModel`."""
        past = [p.to(self._device) for p in self._captioner.empty_cache(len(images))]
        return self._captioner.memory(self._pixels(images)), past

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def step(
        self, state: Any, token_ids: Sequence[int], beam_index: Sequence[int], top_k: int
    ) -> tuple[Any, NDArray[np.float32], NDArray[np.int64]]:
        """See `StepModel`."""
        memory, past = state
        rows = torch.tensor(beam_index, device=self._device)
        past = [cache.index_select(0, rows) for cache in past]
        tokens = torch.tensor(token_ids, device=self._device)
        logits, present = self._captioner.step(tokens, past[0].shape[2], past, memory)
        best = logits.float().log_softmax(-1).topk(min(top_k, self.vocab_size))
        return (memory, present), best.values.cpu().numpy(), best.indices.cpu().numpy()

    @torch.inference_mode()
    def match(
        self,
        encoded: Mapping[str, NDArray[np.float32]],
        token_ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        image: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """See `trainer.reranking.MatchModel`."""
        match, similarity = self._captioner.match(
            torch.from_numpy(token_ids).to(self._device),
            torch.from_numpy(lengths).to(self._device),
            torch.from_numpy(image).to(self._device),
            {
                name: torch.from_numpy(value).to(self._device, torch.float32)
                for name, value in encoded.items()
            },
        )
        return match.cpu().numpy(), similarity.cpu().numpy()


@torch.no_grad()
def sample(
    captioner: Captioner,
    memory: Memory,
    captions: int,
    *,
    max_new_tokens: int,
    top_p: float = 1.0,
    prefix: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Returns captions drawn from the model, and their lengths.

    Draws from PyTorch's global generator, which the loop seeds at every step.

    Args:
        captioner: in evaluation mode.
        memory: of the B images.
        captions: C, drawn for each image.
        max_new_tokens: where a caption is cut, `<eos>` included and the prefix not.
        top_p: tokens are drawn from the fewest that have this much probability together: nucleus
            sampling (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751).
        prefix: ids that every caption begins with.

    Returns:
        token_ids (B * C, T), `<bos>` ... `<eos>` and padding, the captions of an image together;
        lengths (B * C,), tokens without padding. One that is cut has no `<eos>`.
    """
    text, device = captioner.text, next(captioner.parameters()).device
    rows = memory.images * captions
    past = [empty.to(device) for empty in captioner.empty_cache(rows)]
    columns = [torch.full((rows,), text.bos_id, device=device)]
    last = min(len(prefix) + max_new_tokens, text.max_length - 1)
    lengths = torch.full((rows,), last + 1, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    for position in range(last):
        logits, past = captioner.step(columns[-1], position, past, memory)
        if position < len(prefix):
            columns.append(torch.full_like(columns[0], prefix[position]))
            continue
        weights = nucleus(logits.float().softmax(-1), top_p)
        drawn = torch.multinomial(weights, 1).squeeze(1)
        columns.append(drawn.masked_fill(ended, text.pad_id))
        ends = (drawn == text.eos_id) & ~ended
        lengths[ends] = position + 2
        ended |= ends
        if bool(ended.all()):
            break
    return torch.stack(columns, 1), lengths


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Returns probabilities (R, V) with 0 for all but the likeliest that come to `top_p`."""
    if top_p >= 1:
        return probabilities
    ordered, ids = probabilities.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probabilities).scatter(1, ids, kept)


@dataclass(slots=True)
class _Image:
    """One image's search: its live beams and what it has finished."""

    beams: list[tuple[float, list[int], int]]  # sum, ids after <bos>, row among this image's rows
    finished: list[Hypothesis] = field(default_factory=list)
    done: bool = False


def beam_search(
    model: StepModel,
    images: NDArray[np.uint8],
    generation: Generation,
    prefix: Sequence[int] = (),
    prompt: Sequence[int] = (),
) -> list[list[Hypothesis]]:
    """Returns the `num_captions` best hypotheses of every image, best first.

    Args:
        model: the captioner.
        images: (B, H, W, 3).
        generation: the parameters, the same for all images.
        prefix: ids that every caption begins with; neither scored nor counted.
        prompt: ids before that, which are no part of the caption.
    """
    width, prefix = generation.num_beams, (*prompt, *prefix)
    state = model.start(images)
    searches = [_Image([(0.0, [], 0)]) for _ in images]
    rows = 1
    previous_rows = 1
    for position in range(min(model.max_length - 1, len(prefix) + generation.max_new_tokens)):
        tokens, beam_index = [], []
        for index, search in enumerate(searches):
            for beam in range(rows):  # rows that no beam needs repeat the first one
                _, ids, row = search.beams[beam if beam < len(search.beams) else 0]
                tokens.append(ids[-1] if ids else model.bos_id)
                beam_index.append(index * previous_rows + row)
        top_k = 2 * width + 2 + position
        state, log_probs, ids_ = model.step(state, tokens, beam_index, top_k)
        last = position + 1 == min(model.max_length - 1, len(prefix) + generation.max_new_tokens)
        for index, search in enumerate(searches):
            if search.done:
                continue
            if position < len(prefix):
                search.beams = [(0.0, list(prefix[: position + 1]), 0)]
                continue
            block = slice(index * rows, (index + 1) * rows)
            candidates = _candidates(
                search, log_probs[block], ids_[block], generation, model, len(prefix)
            )
            _advance(search, candidates[: 2 * width], generation, model.eos_id, len(prefix), last)
        if all(search.done for search in searches):
            break
        previous_rows, rows = rows, (width if position + 1 > len(prefix) else 1)
    return [
        [
            replace(found, token_ids=found.token_ids[len(prompt) :])
            for found in search.finished[: generation.num_captions]
        ]
        for search in searches
    ]


def best_hypotheses(
    model: StepModel,
    images: NDArray[np.uint8],
    generation: Generation,
    *,
    prompt: Sequence[int] = (),
    batch_size: int = 32,
    progress: bool = True,
) -> list[Hypothesis]:
    """Returns the best hypothesis of every image of images (n, H, W, 3), batch by batch.

    `prompt` is as in `beam_search`.
    """
    best: list[Hypothesis] = []
    starts = range(0, len(images), batch_size)
    for start in tqdm(starts, desc="captioning", disable=None if progress else True):
        found = beam_search(model, images[start : start + batch_size], generation, prompt=prompt)
        best += [hypotheses[0] for hypotheses in found]
    return best


def _candidates(
    search: _Image,
    log_probs: NDArray[np.float32],
    ids: NDArray[np.int64],
    generation: Generation,
    model: StepModel,
    prefix: int,
) -> list[tuple[float, int, int]]:
    """Returns (sum, token, beam) of every allowed continuation, in the order of rule 2."""
    candidates: list[tuple[float, int, int]] = []
    for beam, (total, history, _) in enumerate(search.beams):
        banned = _banned([model.bos_id, *history], generation.no_repeat_ngram_size)
        if len(history) - prefix < generation.min_new_tokens:
            banned.add(model.eos_id)
        sums = (np.float32(total) + log_probs[beam]).tolist()  # in float32, as serving adds them
        candidates += [
            (value, token, beam)
            for value, token in zip(sums, ids[beam].tolist(), strict=True)
            if token not in banned
        ]
    return sorted(candidates, key=lambda candidate: (-candidate[0], candidate[1], candidate[2]))


def _banned(history: list[int], size: int) -> set[int]:
    """Returns the tokens that would repeat an n-gram of `size` tokens."""
    if size == 0 or len(history) + 1 < size:
        return set()
    tail = history[len(history) + 1 - size :]
    return {
        history[start + size - 1]
        for start in range(len(history) - size + 1)
        if history[start : start + size - 1] == tail
    }


def _advance(
    search: _Image,
    candidates: list[tuple[float, int, int]],
    generation: Generation,
    eos_id: int,
    prefix: int,
    last: bool,
) -> None:
    """Applies rules 3 to 5 to one image."""
    width = generation.num_beams
    length = len(search.beams[0][1]) + 1 - prefix
    norm = np.float32(float(length) ** generation.length_penalty)
    beams: list[tuple[float, list[int], int]] = []
    for rank, (total, token, beam) in enumerate(candidates):
        ids = [*search.beams[beam][1], token]
        if token == eos_id or last:
            if rank < width:
                score = float(np.float32(total) / norm)
                search.finished.append(Hypothesis(tuple(ids), score, total))
        elif len(beams) < width:
            beams.append((total, ids, beam))
    search.finished = sorted(search.finished, key=lambda one: -one.score)[:width]
    full = len(search.finished) == width
    search.done = (
        last
        or not beams
        or (full and search.finished[-1].score >= float(np.float32(beams[0][0]) / norm))
    )
    search.beams = beams or search.beams
