"""A loaded bundle: pixels in, captions out."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exports.bundle import Bundle
from exports.errors import ExportsError
from exports.images import ImageSpec
from exports.manifest import Generation, Manifest
from exports.text import Tokenizer
from serving.beam import BeamParams, Hypothesis, beam_search
from serving.decode_image import ImageLimits, decode_image
from serving.errors import BundleRejected, CaptionError, CaptionFailed, ParameterError
from serving.limits import MAX_LENGTH_PENALTY
from serving.session import Observer, OnnxSession, Pixels, Provider

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Params:
    """How one image is captioned: the fields of `Generation`, and words to begin with."""

    num_beams: int
    num_captions: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    no_repeat_ngram_size: int
    prefix: str = ""

    @classmethod
    def of(cls, defaults: Generation, **chosen: Any) -> "Params":
        """Returns a bundle's defaults, but for the fields that are chosen."""
        return cls(**{**defaults.model_dump(), **chosen})


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption, as `Hypothesis` says, with its text."""

    text: str
    score: float
    log_prob: float
    tokens: int
    token_ids: tuple[int, ...]


class Captioner:
    """A bundle that has proved itself. `caption_batch` is for one thread at a time."""

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, session: OnnxSession) -> None:
        """Use `Captioner.load`, which verifies."""
        self.manifest = manifest
        self._tokenizer = tokenizer
        self._session = session

    @classmethod
    def load(cls, path: Path, *, threads: int, provider: Provider = "cpu") -> "Captioner":
        """Opens the bundle in `path`, loads its graphs, and lets it caption its golden images.

        Args:
            path: A bundle's folder.
            threads: CPU threads that share the work of one run.
            provider: Where the graphs run.

        Raises:
            BundleRejected: A file is damaged, the graphs do not load or do not fit the manifest, or
                a golden caption came out wrong.
        """
        try:
            bundle = Bundle.open(path)
            manifest = bundle.manifest
            tokenizer = bundle.tokenizer()
            encoder = bundle.read(manifest.encoder.file)
            decoder = bundle.read(manifest.decoder.file)
        except ExportsError as error:
            raise BundleRejected(str(error)) from error
        try:
            session = OnnxSession(encoder, decoder, manifest, threads=threads, provider=provider)
        except BundleRejected as error:
            raise BundleRejected(f"{path}: {error.detail}") from error
        except Exception as error:  # ONNX Runtime's errors share no base but this
            raise _not_shown(f"{path}: the graphs do not load") from error
        captioner = cls(manifest, tokenizer, session)
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

    def caption_batch(
        self,
        pixels: Pixels | Sequence[Pixels],
        params: Sequence[Params],
        *,
        observer: Observer | None = None,
    ) -> list[list[Caption] | CaptionFailed]:
        """Returns the captions of each image, best first, or why there are none.

        Args:
            pixels: uint8 (B, H, W, 3), or B arrays (H, W, 3), from `decode_image`.
            params: One entry per image.
            observer: Is told how long the graphs took.

        Raises:
            ParameterError: An entry of `params` is out of range.
        """
        searches = [self._search_params(entry) for entry in params]
        memory = self._session.encode(np.stack(list(pixels)), observer)
        found = beam_search(self._session.start(memory, observer), searches)
        return [self._captions(hypotheses) for hypotheses in found]

    def _captions(self, hypotheses: Sequence[Hypothesis]) -> list[Caption] | CaptionFailed:
        if not hypotheses:
            return CaptionFailed("The model found no caption for this image by these parameters.")
        return [
            Caption(
                text=self._tokenizer.decode(found.token_ids),
                score=found.score,
                log_prob=found.log_prob,
                tokens=found.tokens,
                token_ids=found.token_ids,
            )
            for found in hypotheses
        ]

    def _search_params(self, params: Params) -> BeamParams:
        text = self.manifest.text
        prefix_ids = tuple(self._tokenizer.prefix_ids(params.prefix))
        room = text.max_length - 1 - len(prefix_ids)
        _require(1 <= params.num_beams <= text.vocab_size, "num_beams", f"1 to {text.vocab_size}")
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
        values = asdict(params)
        del values["prefix"]
        return BeamParams(**values, prefix_ids=prefix_ids)

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
        except CaptionError as error:
            raise BundleRejected(f"{bundle.path}: {error.detail}") from error
        except Exception as error:  # a graph may fail in any way
            raise _not_shown(f"{bundle.path}: the graphs do not run") from error
        for entry, captions in zip(golden, found, strict=True):
            if isinstance(captions, CaptionFailed):
                raise BundleRejected(f"{bundle.path}: {entry.image} gets no caption at all")
            if captions[0].token_ids != entry.token_ids:
                raise BundleRejected(
                    f"{bundle.path}: {entry.image} is captioned {captions[0].text!r},"
                    f" but the manifest promises {entry.text!r}"
                )


def _not_shown(what: str) -> BundleRejected:
    """Logs the error that is being handled; its words, ONNX Runtime's, are not for clients."""
    logger.exception(what)
    return BundleRejected(f"{what}; the server's log says why")


def _require(holds: bool, name: str, allowed: str) -> None:
    if not holds:
        raise ParameterError(f"{name} must be {allowed}.")
