"""The captions that a search found for an image, sorted anew by how well each fits it.

How the two scores weigh stands in `exports.manifest.Reranking`; the server does the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from exports.manifest import Evidence, Generation, Reranking
from exports.text import TextSpec, framed
from trainer.decoding import Hypothesis, StepModel, beam_search
from trainer.metrics import cider

EVIDENCE: tuple[Evidence, ...] = get_args(Evidence)
WEIGHTS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class MatchModel(StepModel, Protocol):
    """A captioner that also tells how well captions fit."""

    def match(
        self,
        encoded: Mapping[str, NDArray[np.float32]],
        token_ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        image: NDArray[np.int64],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns probabilities of a match and cosines, (C,) each; see `Captioner.match`."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A hypothesis and what the matcher says of it."""

    hypothesis: Hypothesis
    match: float
    similarity: float


def judged(
    model: MatchModel,
    encoded: Mapping[str, NDArray[np.float32]],
    found: Sequence[Sequence[Hypothesis]],
    text: TextSpec,
) -> list[list[Judged]]:
    """Returns the hypotheses of each image, in their order, with what the matcher says of them.

    Args:
        model: the captioner.
        encoded: of the images, from `model.encode`.
        found: their hypotheses.
        text: the special ids.
    """
    token_ids, lengths = framed([one.token_ids for own in found for one in own], text)
    image = np.repeat(np.arange(len(found)), [len(own) for own in found])
    match, similarity = model.match(encoded, token_ids, lengths, image)
    values = zip(match.tolist(), similarity.tolist(), strict=True)
    return [[Judged(one, *next(values)) for one in own] for own in found]


def judged_lists(
    model: MatchModel,
    images: NDArray[np.uint8],
    generation: Generation,
    text: TextSpec,
    *,
    prompt: Sequence[int] = (),
    batch_size: int = 32,
) -> list[list[Judged]]:
    """Returns all that a search finds for each of images (n, H, W, 3), its best first.

    `prompt` stands before the captions and is not read with them: no matcher has learnt it.
    """
    wide = generation.model_copy(update={"num_captions": generation.num_beams})
    lists = []
    for start in tqdm(range(0, len(images), batch_size), desc="captioning", disable=None):
        batch = images[start : start + batch_size]
        found = beam_search(model, batch, wide, prompt=prompt)
        lists += judged(model, model.encode(batch), found, text)
    return lists


def reranked(
    lists: Sequence[Sequence[Judged]], reranking: Reranking, evidence: Evidence
) -> list[Hypothesis]:
    """Returns the best hypothesis of each image; the search's order decides where ranks tie."""

    def rank(one: Judged) -> float:
        return reranking.rank(evidence, one.hypothesis.score, one.match, one.similarity)

    return [max(own, key=rank).hypothesis for own in lists]


def tuned(
    reranking: Reranking,
    lists: Sequence[Sequence[Judged]],
    references: Sequence[Sequence[str]],
    decode: Callable[[Sequence[int]], str],
) -> Reranking:
    """Returns the weights of `WEIGHTS` whose captions have the highest CIDEr-D.

    All weights choose among the same hypotheses of the same images. Of equals the one is taken
    that is nearest to what it was.
    """
    scorer = cider.CiderD(references)
    for evidence in EVIDENCE:
        key = f"{evidence}_weight"
        before = reranking.weight(evidence)
        figures = {}
        for weight in sorted({*WEIGHTS, before}, key=lambda one: abs(one - before)):
            changed = reranking.model_copy(update={key: weight})
            best = reranked(lists, changed, evidence)
            figures[weight] = sum(
                scorer.score(image, decode(one.token_ids)) for image, one in enumerate(best)
            )
        reranking = reranking.model_copy(update={key: max(figures, key=figures.__getitem__)})
    return reranking
