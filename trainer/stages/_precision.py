"""Graphs that compute in fewer bits than the model, and what that may cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from exports.manifest import next_name
from trainer.config import Config as BaseConfig
from trainer.errors import ParityError
from trainer.half import to_half
from trainer.intervals import Interval
from trainer.photos import load_all, read_captioned
from trainer.quantise_decoder import quantise_decoder
from trainer.quantise_encoder import quantise_encoder
from trainer.run import Run
from trainer.stages._bundle import Graphs
from trainer.stages._figures import differences_of


class Precision(BaseConfig):
    """Keys that `[int8]` and `[fp16]` share."""

    NAME: ClassVar[str]
    IN_WORDS: ClassVar[str]

    budget: float = Field(default=0.05, ge=0)
    """How much CIDEr-D may be lost against the float32 graphs; beyond it no bundle is written.

    What counts is the lower end of the difference's 95 % interval, so that few images' luck does
    not pass for harmless. Where integers change a quarter of the captions, that end lies 0.01 below
    the difference on 1,000 images, and so 0.03 below it on 100: of many, 0.02 may be asked."""

    def applied(self, graphs: Graphs, source: Run) -> Graphs:
        """Returns the graphs, without a matcher, in this precision."""
        raise NotImplementedError

    def check(
        self, references: Sequence[Sequence[str]], found: Sequence[str], floats: Sequence[str]
    ) -> tuple[str, dict[str, Interval]]:
        """Returns what this precision changes, in words and figures.

        Args:
            references: of the images that were captioned.
            found: their captions in this precision.
            floats: those of the same graphs in float32.

        Raises:
            ParityError: more CIDEr-D may be lost than the budget.
        """
        differences = differences_of(references, found, floats)
        difference, same = differences["CIDEr-D"], alike(found, floats)
        if not difference.low >= -self.budget:  # NaN, of a single image, included
            raise ParityError(
                f"[{self.NAME}] changes CIDEr-D by {difference} on {len(references)} images, and a "
                f"loss beyond {self.NAME}.budget = {self.budget:g} cannot be ruled out ({same} are "
                "those of float32): measure on more images if the interval is wide, or export "
                f"without [{self.NAME}]"
            )
        words = (
            f"The graphs compute in {self.IN_WORDS}. Against the same graphs in float32 that "
            f"changes CIDEr-D by {difference} and leaves {same} as they were."
        )
        return words, differences


class Int8(Precision):
    """Keys of `[int8]`: graphs that compute in 8-bit integers, for CPUs."""

    NAME: ClassVar[str] = "int8"
    IN_WORDS: ClassVar[str] = "8-bit integers"

    data: Path
    """Captioned images, best those of training; what ranges activations have is seen there."""
    images: Path | None = None
    split: str | None = None
    calibration_images: int = Field(default=128, ge=1)

    def applied(self, graphs: Graphs, source: Run) -> Graphs:
        """See `Precision`."""
        examples = read_captioned(self.data, self.images, self.split)
        pixels = load_all(examples[: self.calibration_images], source.recipe.image)
        print(f"quantising by the activations on {len(pixels)} images ...")
        steps, generation = graphs.steps(source.text), source.recipe.generation
        decoder = quantise_decoder(graphs.decoder, steps, pixels, generation, source.prompt_ids)
        batches = (pixels[start : start + 8] for start in range(0, len(pixels), 8))
        embeddings = set(graphs.encoder_spec.outputs).difference(graphs.decoder_spec.memory)
        encoder = quantise_encoder(graphs.encoder, batches, floats=embeddings)
        return graphs._replace(encoder=encoder, decoder=decoder)


class Fp16(Precision):
    """Keys of `[fp16]`: graphs in half precision, for GPUs, with caches of half the size.

    A CPU computes them in float32 and converts to and fro at every step: there they are slower,
    and may be closer to float32 than on a GPU. What a GPU makes of them, the golden captions tell.
    """

    NAME: ClassVar[str] = "fp16"
    IN_WORDS: ClassVar[str] = "half precision"

    def applied(self, graphs: Graphs, source: Run) -> Graphs:
        """See `Precision`."""
        del source  # nothing is calibrated
        spec = graphs.decoder_spec.model_copy(update={"dtype": "float16"})
        return graphs._replace(
            encoder=to_half(graphs.encoder, spec.memory),
            decoder=to_half(
                graphs.decoder, (*spec.memory, *spec.cache, *map(next_name, spec.cache))
            ),
            decoder_spec=spec,
        )


def alike(first: Sequence[str], second: Sequence[str]) -> str:
    """Returns how many captions are the same, in words."""
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return f"{same} of {len(first)} captions"
