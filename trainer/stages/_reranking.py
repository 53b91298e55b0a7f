"""What an export settles about a captioner's matcher: its parity, its weights, its worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exports.manifest import Dtype, Reranking
from trainer.captioner import Captioner
from trainer.data import Example
from trainer.decoding import StepModel, TorchSteps
from trainer.errors import DataError
from trainer.onnx_steps import OnnxSteps
from trainer.parity import check_matches
from trainer.photos import load_all, read_captioned
from trainer.reranking import Judged, judged_lists, tuned
from trainer.run import Recipe, Run
from trainer.splits import split_examples
from trainer.stages._figures import RerankFigures, rerank_figures

_PARITY_IMAGES = 16


@dataclass(frozen=True, slots=True)
class Matching:
    """What was settled.

    Attributes:
        parity: by how much the graph and the model differ at most.
        reranking: how the matcher weighs.
        arms: by evidence, what reranking comes to.
        words: all of that for people.
    """

    parity: float
    reranking: Reranking
    arms: dict[str, RerankFigures]
    words: str


def settle(
    captioner: Captioner,
    steps: OnnxSteps,
    pixels: NDArray[np.uint8],
    references: Sequence[Sequence[str]],
    source: Run,
    *,
    encoder: StepModel | None,
    dtype: Dtype,
) -> Matching:
    """Returns how an exported matcher weighs, once it is shown to behave as the model's.

    Args:
        captioner: whose matcher the graph holds, weight for weight.
        steps: the graphs.
        pixels: images (n, H, W, 3) to take figures on.
        references: their captions.
        source: the run; weights are chosen on the data that it was watched on.
        encoder: whose encodings the model reads; by default its own.
        dtype: what the graphs' memory is in.

    Raises:
        ParityError: the graph does not behave as the model.
    """
    assert captioner.matcher is not None
    parity = check_matches(
        TorchSteps(captioner),
        steps,
        pixels[:_PARITY_IMAGES],
        source.text,
        encoder=encoder,
        dtype=dtype,
    )
    reranking, how = _chosen(captioner.matcher.reranking, steps, source)
    lists = _judged_lists(steps, pixels, source)
    arms = rerank_figures(lists, reranking, references, source.tokenizer.decode)
    return Matching(parity, reranking, arms, _in_words(parity, arms, len(pixels), how))


def _chosen(reranking: Reranking, steps: OnnxSteps, source: Run) -> tuple[Reranking, str]:
    """Returns the weights that caption the run's `dev` data best, and how they came about.

    They stay as they are where the run has no such data, or they are gone.
    """
    try:
        examples = _dev_examples(source.recipe)
    except DataError as error:
        print(f"the run's dev data cannot be read: {error}")
        return reranking, "are the usual ones, since the run's dev data were gone"
    if not examples:
        return reranking, "are the usual ones, since the run has no dev data"
    print(f"weighing the matcher on {len(examples)} images of the run's dev data ...")
    pixels = load_all(examples, source.recipe.image)
    lists = _judged_lists(steps, pixels, source)
    references = [example.captions for example in examples]
    found = tuned(reranking, lists, references, source.tokenizer.decode)
    return found, f"are those that caption {len(examples)} images of the run's dev data best"


def _judged_lists(steps: OnnxSteps, pixels: NDArray[np.uint8], source: Run) -> list[list[Judged]]:
    generation, prompt = source.recipe.generation, source.prompt_ids
    return judged_lists(steps, pixels, generation, source.text, prompt=prompt)


def _dev_examples(recipe: Recipe) -> list[Example]:
    data = recipe.data
    if data.dev is not None:
        return read_captioned(data.dev, data.images, data.dev_split)
    if not data.dev_fraction:
        return []
    examples = read_captioned(data.train, data.images, data.train_split)
    return split_examples(examples, data.dev_fraction, recipe.seed)[1]


def _in_words(parity: float, arms: Mapping[str, RerankFigures], images: int, how: str) -> str:
    gains = "; ".join(
        f"`rerank={name}` (the search weighing {arm.weight:g}) changes {arm.changed} of {images} "
        f"captions, and CIDEr-D by {arm.gain['CIDEr-D']}"
        for name, arm in arms.items()
    )
    return (
        "The model also tells how well a caption fits an image, and can sort captions by that. "
        f"On the same images, against the search alone: {gains}. The weights {how}. Matches are "
        f"within {parity:.1e} of the PyTorch model's."
    )
