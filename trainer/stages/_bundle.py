"""What becomes a bundle, wherever the captioner came from: its graphs, its golden captions."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import JsonValue

from exports.bundle import write_bundle
from exports.images import ImageSpec, preprocess
from exports.manifest import (
    JOIN_FILE,
    DecoderSpec,
    Dtype,
    EncoderSpec,
    Generation,
    Golden,
    Manifest,
    MatcherSpec,
    Reranking,
)
from exports.reference import REFERENCE_FILE, Reference
from exports.text import TextSpec, Tokenizer
from trainer.captioner import Captioner
from trainer.compression import round_weights
from trainer.decoding import Hypothesis, StepModel, beam_search
from trainer.errors import ConfigError
from trainer.graphs import export_decoder, export_encoder, export_matcher, join_graph
from trainer.half import to_half
from trainer.onnx_steps import OnnxSteps
from trainer.photos import load_pixels
from trainer.reranking import judged

# A golden caption must win by this much, or other processors may not agree.
_MARGIN: dict[Dtype, float] = {"float32": 5e-3, "float16": 1e-2}


class Graphs(NamedTuple):
    """The graphs that differ from captioner to captioner, and the names of their tensors."""

    encoder: bytes
    encoder_spec: EncoderSpec
    decoder: bytes
    decoder_spec: DecoderSpec
    matcher: tuple[bytes, MatcherSpec] | None = None

    @classmethod
    def of(cls, captioner: Captioner) -> "Graphs":
        """Returns those of a captioner."""
        print("exporting the graphs ...")
        return cls(*export_encoder(captioner), *export_decoder(captioner))

    def steps(self, text: TextSpec) -> OnnxSteps:
        """Returns them ready to run."""
        specs = self.encoder_spec, self.decoder_spec
        return OnnxSteps(self.encoder, self.decoder, *specs, text, *(self.matcher or ()))

    def with_matcher(self, captioner: Captioner) -> "Graphs":
        """Returns them and that of the captioner's matcher, whose weights are rounded."""
        if self.decoder_spec.dtype == "float16":
            graph, spec = export_matcher(captioner)
            return self._replace(matcher=(to_half(graph, spec.memory), spec))
        # It computes in floats where the others do in integers.
        return self._replace(matcher=export_matcher(round_weights(captioner)))


@dataclass(frozen=True, slots=True)
class Content:
    """What a bundle is made of beside its golden captions.

    Attributes:
        name: and `version`: as it may be published.
        description: for the manifest, as `licence`.
        captioner: which the graphs are of.
        graphs: checked.
        tokenizer_json: the tokenizer.
        generation: the defaults.
        prompt_ids: what stands before every caption.
        card: MODEL_CARD.md.
        metrics: and `provenance`: see `Manifest`.
        reranking: with a matcher, how it weighs.
        reference: what the training images look like, if that is known.
    """

    name: str
    version: str
    description: str
    licence: str
    captioner: Captioner
    graphs: Graphs
    tokenizer_json: bytes
    generation: Generation
    card: str
    metrics: dict[str, JsonValue]
    provenance: dict[str, Any]
    prompt_ids: tuple[int, ...] = ()
    reranking: Reranking | None = None
    reference: Reference | None = None

    def write(self, target: Path, golden: Sequence[Path]) -> None:
        """Writes the bundle to the folder `target`.

        Args:
            target: must not exist.
            golden: pictures that go into it with the captions it must give; some are drawn if none
                are named.

        Raises:
            ConfigError: no picture has a clear best caption.
            BundleError: `target` exists, or the disk refuses.
        """
        captioner, graphs = self.captioner, self.graphs
        promises, pictures = self._golden(golden)
        files = {
            graphs.encoder_spec.file: graphs.encoder,
            graphs.decoder_spec.file: graphs.decoder,
            JOIN_FILE: join_graph(captioner, graphs.decoder_spec.dtype),
            "tokenizer.json": self.tokenizer_json,
            "MODEL_CARD.md": self.card.encode(),
            **pictures,
        }
        if self.reference:
            files[REFERENCE_FILE] = self.reference.to_json()
        matcher = None
        if graphs.matcher and self.reranking:
            body, spec = graphs.matcher
            matcher = spec.model_copy(update={"reranking": self.reranking})
            files[matcher.file] = body
        manifest = Manifest(
            name=self.name,
            version=self.version,
            created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            description=self.description,
            licence=self.licence,
            image=captioner.image,
            text=captioner.text,
            encoder=graphs.encoder_spec,
            decoder=graphs.decoder_spec,
            matcher=matcher,
            prompt_ids=self.prompt_ids,
            defaults=self.generation,
            golden=promises,
            metrics=self.metrics,
            provenance=self.provenance,
            files={},
        )
        write_bundle(target, manifest, files)
        size = sum(len(body) for body in files.values()) / 1e6
        print(f"wrote {target} ({size:.1f} MB)")

    def _golden(self, paths: Sequence[Path]) -> tuple[tuple[Golden, ...], dict[str, bytes]]:
        """Returns golden captions and their pictures by bundle path."""
        pictures = {path.name: path.read_bytes() for path in paths} if paths else drawings()
        text = self.captioner.text
        steps, tokenizer = self.graphs.steps(text), Tokenizer(self.tokenizer_json, text)
        golden, kept = [], {}
        for name, body in pictures.items():
            with Image.open(io.BytesIO(body)) as image:
                pixels = preprocess(image, self.captioner.image)[None]
            best = self._clear_winner(steps, pixels)
            if best is None:
                print(f"golden: {name} left out, two captions score nearly alike")
                continue
            kept[f"golden/{name}"] = body
            golden.append(
                Golden(
                    image=f"golden/{name}",
                    token_ids=best.token_ids,
                    text=tokenizer.decode(best.token_ids),
                    score=round(best.score, 5),
                    **(_matched(steps, pixels, best, text) if self.reranking else {}),
                )
            )
        if not golden:
            raise ConfigError("golden: no picture has a clear best caption; name others")
        return tuple(golden), kept

    def _clear_winner(self, steps: StepModel, pixels: NDArray[np.uint8]) -> Hypothesis | None:
        pair = self.generation.model_copy(
            update={"num_captions": min(2, self.generation.num_beams)}
        )
        [[best, *others]] = beam_search(steps, pixels, pair, prompt=self.prompt_ids)
        margin = _MARGIN[self.graphs.decoder_spec.dtype]
        return None if others and best.score - others[0].score < margin else best


def _matched(
    steps: OnnxSteps, pixels: NDArray[np.uint8], best: Hypothesis, text: TextSpec
) -> dict[str, float]:
    [[found]] = judged(steps, steps.encode(pixels), [[best]], text)
    return {"match": round(found.match, 5), "similarity": round(found.similarity, 5)}


def check_golden(paths: Sequence[Path]) -> None:
    """Raises DataError or ConfigError for pictures that cannot be taken, before the long work."""
    for path in paths:
        load_pixels(path, ImageSpec(height=32, width=32))
    if len({path.name for path in paths}) < len(paths):
        raise ConfigError("golden: two of the pictures have one name; rename one")


def check_free(target: Path) -> None:
    """Raises ConfigError where a bundle stands already."""
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder with --out")


def drawings() -> dict[str, bytes]:
    """Returns a few small drawings by name, the same each time."""
    pictures = {}
    for number, (ground, ball) in enumerate(
        (("green", "red"), ("white", "black"), ("navy", "orange"), ("tan", "brown"))
    ):
        image = Image.new("RGB", (96, 64), "skyblue")
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 32, 96, 64), fill=ground)
        draw.ellipse((20 + 12 * number, 24, 44 + 12 * number, 48), fill=ball)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pictures[f"drawing-{number}.png"] = buffer.getvalue()
    return pictures
