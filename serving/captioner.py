"""A loaded bundle: pixels in, captions out."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from exports.bundle import Bundle
from exports.errors import BundleError
from exports.images import ImageSpec
from exports.manifest import Manifest
from exports.reference import REFERENCE_FILE, Reference
from exports.text import Tokenizer
from serving.beam import Beams, Done, Hypothesis
from serving.decoding import Observer
from serving.errors import BundleRejected, CaptionFailed
from serving.matcher import Match, Wish
from serving.memories import Encoded, MemoryCache
from serving.params import Caption, Params, Result, Seen, beam_params
from serving.proof import not_shown, prove
from serving.session import Graphs, OnnxSession, Pixels, Provider

logger = logging.getLogger(__name__)

SLOTS = 64  # images that one captioner searches at once


class Captioner:
    """A bundle that has proved itself: images are encoded, join, and leave with their captions.

    `encode` is for one thread at a time, and so is all the rest, but not for the same one.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        session: OnnxSession,
        *,
        slots: int = SLOTS,
        cache_bytes: int = 0,
    ) -> None:
        """Use `Captioner.load`, which verifies."""
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._session = session
        self._slots = slots
        self._decoding = session.decoding(slots)
        self._beams = Beams(self._decoding, slots=slots)
        self._memories = MemoryCache(cache_bytes)
        self._matcher = session.matcher
        self._wishes: dict[int, Wish] = {}  # by slot, of images that are to be reranked
        self._distances: dict[int, tuple[float, bool]] = {}  # by slot
        self.golden_pixels: list[Pixels] = []  # of the manifest's golden images, proved

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        threads: int,
        provider: Provider = "cpu",
        cache_bytes: int = 0,
        proof_s: float = math.inf,
    ) -> "Captioner":
        """Opens the bundle in `path`, loads its graphs, and lets it caption its golden images.

        Args:
            path: A bundle's folder.
            threads: CPU threads that share the work of one run.
            provider: Where the graphs run.
            cache_bytes: How much is kept of images that were encoded, for when they come again.
            proof_s: How long the golden images may take.

        Raises:
            BundleRejected: A file is damaged, the graphs do not load or do not fit the manifest, or
                a golden caption came out wrong or too late.
        """
        try:
            bundle = Bundle.open(path)
            manifest = bundle.manifest
            tokenizer = bundle.tokenizer()
            graphs = Graphs.read(bundle)
            reference = None
            if REFERENCE_FILE in manifest.files:
                reference = Reference.from_json(bundle.read(REFERENCE_FILE))
        except BundleError as error:
            raise BundleRejected(str(error), error.cause) from error
        try:
            session = OnnxSession(
                graphs, manifest, threads=threads, provider=provider, reference=reference
            )
            captioner = cls(manifest, tokenizer, session, cache_bytes=cache_bytes)
        except BundleRejected as error:
            raise BundleRejected(f"{path}: {error.detail}", error.cause) from error
        except Exception as error:  # ONNX Runtime's errors share no base but this
            raise not_shown(f"{path}: the graphs do not load", error) from error
        captioner.golden_pixels = prove(bundle, captioner._golden_answers, allowed_s=proof_s)
        if manifest.decoder.dtype == "float16" and session.device == "cpu":
            logger.warning(
                "%s is in half precision, for GPUs: on a CPU it is slower than in float32 or int8",
                captioner._called,
            )
        return captioner

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """The model's version."""
        return self.manifest.version

    @property
    def image_spec(self) -> ImageSpec:
        """What `decode_image` must make of a photograph."""
        return self.manifest.image

    def check(self, params: Params) -> None:
        """Raises ParameterError if this model cannot search by `params`."""
        beam_params(params, self.manifest, self._tokenizer)

    @property
    def rows(self) -> int:
        """Beams that the images in search may come to."""
        return self._beams.rows

    @property
    def free_slots(self) -> int:
        """How many images may join."""
        return self._slots - self._beams.images

    def encode(self, pixels: Sequence[Pixels], observer: Observer | None = None) -> list[Encoded]:
        """Returns what the decoder needs of each image, uint8 (H, W, 3), from `decode_image`.

        Images that are the same, or were encoded of late, are not encoded again.
        """
        hits = self._memories.hits
        found = self._memories.encode(pixels, lambda new: self._session.encode(new, observer))
        if observer is not None:
            observer.add_repeats(self._memories.hits - hits)
        return found

    def join(self, encoded: Encoded, params: Params) -> int:
        """Puts an image to a free slot, where the next `step` begins with it; returns the slot.

        Raises:
            ParameterError: An entry of `params` is out of range.
        """
        slot = self._beams.join(beam_params(params, self.manifest, self._tokenizer))
        try:
            self._decoding.place(encoded.memory, [encoded.index], [slot])
        except Exception:
            self._beams.leave(slot)
            raise
        if params.rerank != "none":
            self._wishes[slot] = Wish(
                encoded.memory, encoded.index, params.rerank, params.num_captions
            )
        if encoded.memory.distances:
            self._distances[slot] = encoded.memory.distances[encoded.index]
        return slot

    def leave(self, slot: int) -> None:
        """Frees the slot of an image that nobody waits for."""
        self._beams.leave(slot)
        self._wishes.pop(slot, None)
        self._distances.pop(slot, None)

    def step(self, observer: Observer | None = None) -> list[tuple[int, Result]]:
        """Continues every image by one token; returns the slots that got free, and their captions.

        If the step fails, each image is tried alone, so that a bad one harms only itself.
        """
        self._decoding.observer = observer
        try:
            gone = self._beams.advance()
        except Exception as error:  # nothing that a model or an image does may end the caller
            logger.warning("a step of %d images failed: %r", self._beams.images, error)
        else:
            return [(done.slot, self._result(done, observer)) for done in gone]
        found: list[tuple[int, Result]] = []
        for slot in self._beams.slots:
            try:
                gone = self._beams.advance([slot])
            except Exception:
                logger.exception("an image could not be captioned")
                self.leave(slot)
                found.append((slot, CaptionFailed(f"{self._called} failed on this image.")))
            else:
                found += [(done.slot, self._result(done, observer)) for done in gone]
        return found

    def caption_batch(
        self,
        pixels: Pixels | Sequence[Pixels],
        params: Sequence[Params],
        *,
        observer: Observer | None = None,
    ) -> list[Result]:
        """Returns the captions of each image, best first, or why there are none.

        Args:
            pixels: uint8 (B, H, W, 3), or B arrays (H, W, 3), from `decode_image`.
            params: One entry per image.
            observer: Is told how long the graphs took.

        Raises:
            ParameterError: An entry of `params` is out of range.
        """
        for entry in set(params):
            self.check(entry)
        found: list[Result] = []
        images = list(zip(pixels, params, strict=True))
        for start in range(0, len(images), self._slots):
            part = images[start : start + self._slots]
            encoded = self.encode([image for image, _ in part], observer)
            found += self._caption_encoded(encoded, [entry for _, entry in part], observer)
        return found

    def _caption_encoded(
        self, encoded: Sequence[Encoded], params: Sequence[Params], observer: Observer | None = None
    ) -> list[Result]:
        """Returns the captions of each image; those that find no slot wait for one."""
        waiting = deque(enumerate(zip(encoded, params, strict=True)))
        places: dict[int, int] = {}
        found: dict[int, Result] = {}
        while waiting or places:
            while waiting and self.free_slots:
                at, pair = waiting.popleft()
                places[self.join(*pair)] = at
            for slot, result in self.step(observer):
                found[places.pop(slot)] = result
        return [found[at] for at in range(len(encoded))]

    @property
    def _called(self) -> str:
        return f"{self.name}@{self.version}"

    def _result(self, done: Done, observer: Observer | None) -> Result:
        wish = self._wishes.pop(done.slot, None)
        seen = Seen(*self._distances.pop(done.slot, ()))
        if done.is_nan:
            return self._not_finite
        if not done.hypotheses:
            return CaptionFailed("The model found no caption for this image by these parameters.")
        prompt = len(self.manifest.prompt_ids)
        found = [replace(one, token_ids=one.token_ids[prompt:]) for one in done.hypotheses]
        if wish is None or self._matcher is None:
            return [self._caption(hypothesis, seen) for hypothesis in found]
        started = perf_counter()
        try:
            best = self._matcher.best(found, wish, observer)
        except Exception:  # it costs this image its captions, and no other
            logger.exception("captions could not be matched with their image")
            return CaptionFailed(f"{self._called} failed on this image.")
        seen = seen._replace(match_s=perf_counter() - started)
        return [self._caption(one, seen, match) for one, match in best] or self._not_finite

    @property
    def _not_finite(self) -> CaptionFailed:
        return CaptionFailed(f"{self._called} gave numbers that are not finite for this image.")

    def _caption(self, found: Hypothesis, seen: Seen, match: Match | None = None) -> Caption:
        return Caption(
            text=self._tokenizer.decode(found.token_ids),
            score=found.score,
            log_prob=found.log_prob,
            tokens=found.tokens,
            token_ids=found.token_ids,
            seen=seen,
            **(match._asdict() if match else {}),
        )

    def _golden_answers(self, pixels: Sequence[Pixels]) -> tuple[list[Result], list[str]]:
        """Returns the golden images' captions, and what the matcher says wrongly of each."""
        golden = self.manifest.golden
        encoded = self.encode(pixels)
        params = [Params.of(self.manifest.defaults)] * len(encoded)
        found = self._caption_encoded(encoded, params)
        if self._matcher is None:
            return found, [""] * len(golden)
        pairs = zip(golden, encoded, strict=True)
        return found, [self._matcher.fault(entry, one.memory, one.index) for entry, one in pairs]
