"""The matcher graph: how well captions fit the image that they were found for."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from exports.manifest import Evidence, Golden, Manifest, MatcherSpec
from exports.text import framed
from serving.beam import Hypothesis
from serving.decoding import Memory, Observer

FED = ("token_ids", "lengths", "image")
ANSWERED = ("match", "similarity")
_TOLERANCE = 1e-2  # of golden matches: processors round what is encoded in integers differently


class Match(NamedTuple):
    """How well a caption fits: a probability, and the cosine of its embedding and the image's."""

    match: float
    similarity: float


@dataclass(frozen=True, slots=True)
class Wish:
    """How the captions of an image in search shall be sorted, and how many are asked for.

    The image is the one at `index` in `memory`, which is kept that long.
    """

    memory: Memory
    index: int
    evidence: Evidence
    captions: int


class Matcher:
    """Runs the graph on the captions of one image at a time; whom else it serves changes nothing.

    For one thread at a time.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        manifest: Manifest,
        spec: MatcherSpec,
        turn: AbstractContextManager[Any],
    ) -> None:
        """Use `OnnxSession.matcher`."""
        self.spec = spec
        self._session, self._text, self._turn = session, manifest.text, turn
        self._places = {name: at for at, name in enumerate(manifest.decoder.memory)}

    def match(
        self,
        memory: Memory,
        index: int,
        captions: Sequence[Sequence[int]],
        observer: Observer | None = None,
    ) -> list[Match]:
        """Returns how well each caption fits.

        Args:
            memory: Of a batch of images.
            index: Which of them it is.
            captions: At least one, as `Hypothesis.token_ids`.
            observer: Is told how long it took.
        """
        # Two rows at least: a product with one takes another kernel, which rounds otherwise.
        rows = captions if len(captions) > 1 else [*captions, *captions]
        token_ids, lengths = framed(rows, self._text)
        image = np.full(len(rows), index, dtype=np.int64)
        binding = self._session.io_binding()
        for name, array in zip(FED, (token_ids, lengths, image), strict=True):
            binding.bind_cpu_input(name, array)
        for name in self.spec.memory:
            binding.bind_ortvalue_input(name, memory.values[self._places[name]])
        binding.bind_ortvalue_input(self.spec.image_embedding, memory.image_embedding)
        for name in ANSWERED:
            binding.bind_output(name, "cpu")
        with self._turn:
            started = perf_counter()
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            seconds = perf_counter() - started
        if observer is not None:
            observer.observe_match(seconds)
        found = np.stack(binding.copy_outputs_to_cpu(), axis=1)[: len(captions)]
        return [Match(*pair) for pair in found.tolist()]

    def fault(self, golden: Golden, memory: Memory, index: int) -> str:
        """Returns what is wrong with what it says of a golden caption and its image, or ""."""
        [found] = self.match(memory, index, [golden.token_ids])
        promised = (golden.match, golden.similarity)
        for name, value, wanted in zip(ANSWERED, found, promised, strict=True):
            if not math.isfinite(value):
                return f"the {name} of {golden.text!r} is not finite"
            if wanted is not None and abs(value - wanted) > _TOLERANCE:
                return (
                    f"the {name} of {golden.text!r} is {value:.4f}, but the manifest promises "
                    f"{wanted:.4f}"
                )
        return ""

    def best(
        self, found: Sequence[Hypothesis], wish: Wish, observer: Observer | None = None
    ) -> list[tuple[Hypothesis, Match]]:
        """Returns the captions of one image by their rank, those of equal rank as they stood.

        Args:
            found: The captions, all that the search has.
            wish: What is to become of them.
            observer: Is told how long it took.

        Returns:
            As many as are wished for, or none where the matcher's numbers are not finite.
        """
        captions = [hypothesis.token_ids for hypothesis in found]
        matches = self.match(wish.memory, wish.index, captions, observer)
        if not all(math.isfinite(value) for match in matches for value in match):
            return []

        def rank(pair: tuple[Hypothesis, Match]) -> float:
            return self.spec.reranking.rank(wish.evidence, pair[0].score, *pair[1])

        return sorted(zip(found, matches, strict=True), key=rank, reverse=True)[: wish.captions]
