"""Does an exported model behave as the one it came from? Logits, n-best lists and captions.

Bounds on raw numbers are easily loosened and say little; what counts is that the same beams come
out. So three things are compared at several batch sizes and beam widths, the corners included.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from exports.manifest import Dtype, Generation
from exports.text import TextSpec, framed
from trainer.decoding import Hypothesis, StepModel, beam_search
from trainer.errors import ParityError
from trainer.reranking import MatchModel

SHAPES = ((1, 1), (1, 4), (2, 3), (3, 1), (8, 5), (17, 4))  # images, rows an image
BEAMS = (1, 3, 5)
LOG_PROB_TOLERANCE = 2e-3  # of two float32 computations of sums of some thousand terms
MATCH_TOLERANCE: dict[Dtype, float] = {"float32": 1e-4, "float16": 2e-2}
"""Of probabilities and cosines, by what a matcher computes in."""
TIE = 1e-3  # n-best lists may swap hypotheses whose scores are nearer than this


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared, and how it came out."""

    largest_log_prob_difference: float
    best_token_agreement: float
    n_best_lists: int
    n_best_equal: int
    captions: int
    captions_equal: int

    def check(self) -> "Parity":
        """Returns itself.

        Raises:
            ParityError: a difference that a user could see.
        """
        faults = []
        if not self.largest_log_prob_difference <= LOG_PROB_TOLERANCE:
            faults.append(
                f"log-probabilities differ by {self.largest_log_prob_difference:.2g}, more than "
                f"{LOG_PROB_TOLERANCE:g}"
            )
        if self.n_best_equal < self.n_best_lists:
            faults.append(f"{self.n_best_equal} of {self.n_best_lists} n-best lists are equal")
        if self.captions_equal < self.captions:
            faults.append(f"{self.captions_equal} of {self.captions} captions are equal")
        if faults:
            raise ParityError(f"the exported graphs differ from the model: {'; '.join(faults)}")
        return self

    def __str__(self) -> str:
        """Returns one line for people."""
        return (
            f"log-probabilities within {self.largest_log_prob_difference:.1e}, "
            f"{self.n_best_equal} of {self.n_best_lists} n-best lists and "
            f"{self.captions_equal} of {self.captions} captions equal"
        )

    def as_json(self) -> dict[str, float]:
        """Returns the fields by name."""
        return asdict(self)


def compare(
    reference: StepModel,
    exported: StepModel,
    pixels: NDArray[np.uint8],
    generation: Generation,
    *,
    prompt: Sequence[int] = (),
    batch_size: int = 16,
) -> Parity:
    """Returns how `exported` compares with `reference` on images (n, H, W, 3).

    Args:
        reference: the PyTorch captioner.
        exported: the graphs.
        pixels: the images; all are captioned by `generation`, the first few at every width.
        generation: the defaults of the bundle.
        prompt: what stands before every caption.
        batch_size: of the captions.
    """
    difference, agreement = _log_probs(reference, exported, pixels)
    lists, equal = _n_best(reference, exported, pixels[:8], generation, prompt)
    captions = 0
    for start in tqdm(range(0, len(pixels), batch_size), desc="parity", disable=None):
        batch = pixels[start : start + batch_size]
        first = beam_search(reference, batch, generation, prompt=prompt)
        second = beam_search(exported, batch, generation, prompt=prompt)
        captions += sum(_equal(a[:1], b[:1]) for a, b in zip(first, second, strict=True))
    return Parity(difference, agreement, lists, equal, len(pixels), captions)


def check_matches(
    reference: MatchModel,
    exported: MatchModel,
    pixels: NDArray[np.uint8],
    text: TextSpec,
    *,
    encoder: StepModel | None = None,
    dtype: Dtype = "float32",
) -> float:
    """Returns by how much the two differ, at most, on how well random captions fit.

    Args:
        reference: the PyTorch captioner.
        exported: the graphs.
        pixels: images (n, H, W, 3).
        text: of the captions.
        encoder: whose encodings both of them read; by default each its own.
        dtype: of `exported`.

    Raises:
        ParityError: by more than `MATCH_TOLERANCE`.
    """
    draw = np.random.default_rng(0)
    largest = 0.0
    for images, rows in SHAPES:
        chosen = pixels[draw.integers(0, len(pixels), images)]
        captions = [
            draw.integers(0, text.vocab_size, draw.integers(1, text.max_length)).tolist()
            for _ in range(images * rows)
        ]
        captioned = (*framed(captions, text), draw.integers(0, images, images * rows))
        found = [
            np.stack(model.match((encoder or model).encode(chosen), *captioned))
            for model in (reference, exported)
        ]
        gap = float(np.abs(found[0] - found[1]).max())
        largest = max(largest, gap if np.isfinite(gap) else float("inf"))
    if largest > MATCH_TOLERANCE[dtype]:
        raise ParityError(
            f"the exported matcher differs from the model: by {largest:.2g}, more than "
            f"{MATCH_TOLERANCE[dtype]:g}"
        )
    return largest


def _log_probs(
    reference: StepModel, exported: StepModel, pixels: NDArray[np.uint8]
) -> tuple[float, float]:
    """Returns the largest difference and the agreement on the best token, over random histories."""
    draw = np.random.default_rng(0)
    largest, agreed, rows_seen = 0.0, 0, 0
    for images, rows in SHAPES:
        chosen = pixels[draw.integers(0, len(pixels), images)]
        first, second = reference.start(chosen), exported.start(chosen)
        previous = images
        for _ in range(min(6, reference.max_length)):
            tokens = draw.integers(0, reference.vocab_size, images * rows).tolist()
            image = np.repeat(np.arange(images), rows)
            beams = (image * (previous // images) + draw.integers(0, previous // images)).tolist()
            first, values, ids = reference.step(first, tokens, beams, reference.vocab_size)
            second, others, other_ids = exported.step(second, tokens, beams, exported.vocab_size)
            gap = np.abs(_by_id(values, ids) - _by_id(others, other_ids))
            largest = max(largest, float(gap.max())) if np.isfinite(gap).all() else float("inf")
            agreed += int((ids[:, 0] == other_ids[:, 0]).sum())
            rows_seen += len(tokens)
            previous = images * rows
    return largest, agreed / rows_seen


def _by_id(values: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    ordered = np.empty_like(values)
    np.put_along_axis(ordered, ids, values, axis=1)
    return ordered


def _n_best(
    reference: StepModel,
    exported: StepModel,
    pixels: NDArray[np.uint8],
    generation: Generation,
    prompt: Sequence[int],
) -> tuple[int, int]:
    lists = equal = 0
    for width in BEAMS:
        changed = {**generation.model_dump(), "num_beams": width, "num_captions": width}
        wide = Generation.model_validate(changed)
        for size in (1, len(pixels)):
            first = beam_search(reference, pixels[:size], wide, prompt=prompt)
            second = beam_search(exported, pixels[:size], wide, prompt=prompt)
            lists += size
            equal += sum(_equal(a, b) for a, b in zip(first, second, strict=True))
    return lists, equal


def _equal(first: Sequence[Hypothesis], second: Sequence[Hypothesis]) -> bool:
    """Returns whether two n-best lists hold the same hypotheses, order aside where scores tie."""
    if len(first) != len(second):
        return False
    return all(
        a.token_ids == b.token_ids or (abs(a.score - b.score) < TIE and _has(second, a))
        for a, b in zip(first, second, strict=True)
    )


def _has(hypotheses: Sequence[Hypothesis], one: Hypothesis) -> bool:
    return any(other.token_ids == one.token_ids for other in hypotheses)
