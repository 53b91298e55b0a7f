"""A loaded bundle: pixels in, captions out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exports.bundle import Bundle
from exports.errors import ExportsError
from exports.images import ImageSpec
from exports.manifest import Generation, Manifest, Rerank
from exports.text import Tokenizer
from serving.beam import Beams, Done, Hypothesis
from serving.candidates import MAX_BEAMS
from serving.decode_image import ImageLimits, decode_image
from serving.decoding import Observer
from serving.errors import BundleRejected, CaptionError, CaptionFailed, ParameterError
from serving.group import BeamParams
from serving.limits import MAX_LENGTH_PENALTY
from serving.matcher import Match, Wish
from serving.memories import Encoded, MemoryCache
from serving.session import Graphs, OnnxSession, Pixels, Provider

logger = logging.getLogger(__name__)

SLOTS = 64  # images that one captioner searches at once


@dataclass(frozen=True, slots=True)
class Params:
    """How one image is captioned: the fields of `Generation`, words to begin with, the order."""

    num_beams: int
    num_captions: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    no_repeat_ngram_size: int
    prefix: str = ""
    rerank: Rerank = "none"

    @classmethod
    def of(cls, defaults: Generation, **chosen: Any) -> "Params":
        """Returns a bundle's defaults, but for the fields that are chosen."""
        return cls(**{**defaults.model_dump(), **chosen})


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption, as `Hypothesis` says, with its text, and what it was reranked by, if it was."""

    text: str
    score: float
    log_prob: float
    tokens: int
    token_ids: tuple[int, ...]
    match: float | None = None
    similarity: float | None = None


Result = list[Caption] | CaptionFailed


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

    @classmethod
    def load(
        cls, path: Path, *, threads: int, provider: Provider = "cpu", cache_bytes: int = 0
    ) -> "Captioner":
        """Opens the bundle in `path`, loads its graphs, and lets it caption its golden images.

        Args:
            path: A bundle's folder.
            threads: CPU threads that share the work of one run.
            provider: Where the graphs run.
            cache_bytes: How much is kept of images that were encoded, for when they come again.

        Raises:
            BundleRejected: A file is damaged, the graphs do not load or do not fit the manifest, or
                a golden caption came out wrong.
        """
        try:
            bundle = Bundle.open(path)
            manifest = bundle.manifest
            tokenizer = bundle.tokenizer()
            graphs = Graphs.read(bundle)
        except ExportsError as error:
            raise BundleRejected(str(error)) from error
        try:
            session = OnnxSession(graphs, manifest, threads=threads, provider=provider)
            captioner = cls(manifest, tokenizer, session, cache_bytes=cache_bytes)
        except BundleRejected as error:
            raise BundleRejected(f"{path}: {error.detail}") from error
        except Exception as error:  # ONNX Runtime's errors share no base but this
            raise _not_shown(f"{path}: the graphs do not load") from error
        captioner._prove(bundle)
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
        self._search_params(params)

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
        slot = self._beams.join(self._search_params(params))
        try:
            self._decoding.place(encoded.memory, [encoded.index], [slot])
        except Exception:
            self._beams.leave(slot)
            raise
        if params.rerank != "none":
            self._wishes[slot] = Wish(
                encoded.memory, encoded.index, params.rerank, params.num_captions
            )
        return slot

    def leave(self, slot: int) -> None:
        """Frees the slot of an image that nobody waits for."""
        self._beams.leave(slot)
        self._wishes.pop(slot, None)

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
        found: dict[int, Result] = {}
        images = list(zip(pixels, params, strict=True))
        for start in range(0, len(images), self._slots):
            part = images[start : start + self._slots]
            encoded = self.encode([image for image, _ in part], observer)
            places = {
                self.join(one, entry): start + place
                for place, (one, (_, entry)) in enumerate(zip(encoded, part, strict=True))
            }
            while places:
                for slot, result in self.step(observer):
                    found[places.pop(slot)] = result
        return [found[place] for place in range(len(images))]

    @property
    def _called(self) -> str:
        return f"{self.name}@{self.version}"

    def _result(self, done: Done, observer: Observer | None) -> Result:
        wish = self._wishes.pop(done.slot, None)
        if done.is_nan:
            return self._not_finite
        if not done.hypotheses:
            return CaptionFailed("The model found no caption for this image by these parameters.")
        if wish is None or self._matcher is None:
            return [self._caption(hypothesis) for hypothesis in done.hypotheses]
        try:
            best = self._matcher.best(done.hypotheses, wish, observer)
        except Exception:  # it costs this image its captions, and no other
            logger.exception("captions could not be matched with their image")
            return CaptionFailed(f"{self._called} failed on this image.")
        return [self._caption(*pair) for pair in best] or self._not_finite

    @property
    def _not_finite(self) -> CaptionFailed:
        return CaptionFailed(f"{self._called} gave numbers that are not finite for this image.")

    def _caption(self, found: Hypothesis, match: Match | None = None) -> Caption:
        return Caption(
            text=self._tokenizer.decode(found.token_ids),
            score=found.score,
            log_prob=found.log_prob,
            tokens=found.tokens,
            token_ids=found.token_ids,
            **(match._asdict() if match else {}),
        )

    def _search_params(self, params: Params) -> BeamParams:
        text = self.manifest.text
        prefix_ids = tuple(self._tokenizer.prefix_ids(params.prefix))
        room = text.max_length - 1 - len(prefix_ids)
        widest = min(text.vocab_size, MAX_BEAMS)
        _require(1 <= params.num_beams <= widest, "num_beams", f"1 to {widest}")
        _require(
            1 <= params.num_captions <= params.num_beams,
            "num_captions",
            f"1 to num_beams, here {params.num_beams}",
        )
        _require(params.max_new_tokens >= 1, "max_new_tokens", "1 or more")
        _require(room >= 1, "prefix", f"shorter: the model writes {text.max_length - 1} tokens")
        longest = min(params.max_new_tokens, room)
        _require(
            0 <= params.min_new_tokens <= longest,
            "min_new_tokens",
            f"0 to {longest}, the longest caption that these parameters allow",
        )
        _require(
            abs(params.length_penalty) <= MAX_LENGTH_PENALTY,
            "length_penalty",
            f"{-MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}",
        )
        _require(params.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", "0 or more")
        reranks = self.manifest.reranks
        reason = "" if self._matcher else f", since {self._called} has no matcher"
        _require(params.rerank in reranks, "rerank", " or ".join(reranks) + reason)
        return BeamParams(
            num_beams=params.num_beams,
            # What is reranked is cut afterwards.
            num_captions=params.num_captions if params.rerank == "none" else params.num_beams,
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
            length_penalty=params.length_penalty,
            no_repeat_ngram_size=params.no_repeat_ngram_size,
            prefix_ids=prefix_ids,
        )

    def _prove(self, bundle: Bundle) -> None:
        """Captions the golden images, which also warms up; raises BundleRejected."""
        golden = self.manifest.golden
        if not golden:
            raise BundleRejected(f"{bundle.path}: without golden captions there is no proof")
        try:
            pixels = [
                decode_image(bundle.read(entry.image), self.image_spec, ImageLimits())
                for entry in golden
            ]
            params = [Params.of(self.manifest.defaults)] * len(golden)
            found = self.caption_batch(pixels, params)
            faults = self._match_faults(pixels)
        except CaptionError as error:
            raise BundleRejected(f"{bundle.path}: {error.detail}") from error
        except Exception as error:  # a graph may fail in any way
            raise _not_shown(f"{bundle.path}: the graphs do not run") from error
        for entry, captions in zip(golden, found, strict=True):
            if isinstance(captions, CaptionFailed):
                raise BundleRejected(f"{bundle.path}: {entry.image}: {captions.detail}")
            if captions[0].token_ids != entry.token_ids:
                raise BundleRejected(
                    f"{bundle.path}: {entry.image} is captioned {captions[0].text!r},"
                    f" but the manifest promises {entry.text!r}"
                )
        for entry, fault in zip(golden, faults, strict=False):
            if fault:
                raise BundleRejected(f"{bundle.path}: {entry.image}: {fault}")

    def _match_faults(self, pixels: Sequence[Pixels]) -> list[str]:
        """Returns what the matcher says wrongly of each golden image, if there is a matcher."""
        if self._matcher is None:
            return []
        encoded = zip(self.manifest.golden, self.encode(pixels), strict=True)
        return [self._matcher.fault(entry, one.memory, one.index) for entry, one in encoded]


def _not_shown(what: str) -> BundleRejected:
    """Logs the error that is being handled; its words, ONNX Runtime's, are not for clients."""
    logger.exception(what)
    return BundleRejected(f"{what}; the server's log says why")


def _require(holds: bool, name: str, allowed: str) -> None:
    if not holds:
        raise ParameterError(f"{name} must be {allowed}.")
