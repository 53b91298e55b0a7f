"""What every fine-tuning of an alignment is made from and measured with."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exports.images import ImageSpec
from trainer.alignment import MEAN_RECALL, ORIGINAL, Forgetting, Retrieval
from trainer.charts import Curve
from trainer.checkpoint import CHECKPOINT
from trainer.data import Example
from trainer.dataset import CaptionIds, ViewDataset
from trainer.forgetting import agreement
from trainer.interpolation import interpolated
from trainer.loop import TrainingLoop, device_of, load_kept_weights
from trainer.metrics._scores import Scores, mean_scores
from trainer.optim import train_only
from trainer.photos import load_all
from trainer.retrieval import Pairs, mean_recall, rank_scores, retrieval_ranks
from trainer.stages._alignment_recipe import Config
from trainer.stages._last_blocks import last_blocks
from trainer.stages._towers import TowerReader, Towers
from trainer.transforms import Transform

Weights = dict[str, Tensor]


class Bench:
    """What every fine-tuning is made from and measured with.

    Attributes:
        original: the weights at the start.
        trained: how many numbers are trained, and of how many.
    """

    def __init__(self, config: Config, towers: Towers, examples: Sequence[Example]) -> None:
        self._config, self._towers = config, towers
        method = towers.method.to(device=device_of(config.loop))
        # As the loop lays them out, so that the same weights give the same figures.
        method.to(memory_format=torch.channels_last)
        prefixes = config.trained or last_blocks(method, config.trained_blocks)
        self.trained = train_only(method, prefixes), sum(p.numel() for p in method.parameters())
        self.original = _state(method)
        self._measured = deepcopy(method)
        self._tokenizer = towers.tokenizer
        self._places = {example: place for place, example in enumerate(examples)}
        self._pixels = load_all(examples, _larger(towers.tables.image, config.data.scale))

    def finetuned(self, examples: Sequence[Example], folder: Path) -> Weights:
        """Returns the weights after fine-tuning on some of the examples, in a folder of its own."""
        config, tables, text = self._config, self._towers.tables, self._towers.text
        folder.mkdir(exist_ok=True)
        method = deepcopy(self._towers.method)
        transform = Transform(config.augment, (tables.image.height, tables.image.width))
        dataset = ViewDataset(
            self._pixels[[self._places[example] for example in examples]],
            [transform],
            seed=config.seed,
            token_ids=CaptionIds.of(examples, self._tokenizer, text, transform.mirror),
            pad_id=text.pad_id,
        )
        TrainingLoop(
            method,
            dataset,
            config=config.loop,
            optim=config.optim,
            seed=config.seed,
            folder=folder,
        ).run()
        load_kept_weights(method, folder / CHECKPOINT, "")
        return _state(method)

    def reader(self, weights: Weights) -> TowerReader:
        """Returns the towers with some weights, until it is asked for others."""
        self._measured.load_state_dict(weights)
        return TowerReader(self._measured, self._tokenizer, self._towers.text)

    def pairs(self, examples: Sequence[Example]) -> Pairs:
        """Returns images as the towers take them, with all of their captions."""
        pixels = load_all(examples, self._towers.tables.image)
        return Pairs(pixels, [example.captions for example in examples])

    def retrieval(
        self, title: str, examples: Sequence[Example], weights: dict[str, Weights]
    ) -> Retrieval:
        """Returns what each of the weights finds among the examples."""
        pairs = self.pairs(examples)
        return Retrieval.of(
            title,
            {
                name: _scores(*retrieval_ranks(self.reader(own), pairs))
                for name, own in weights.items()
            },
        )

    def forgetting(
        self, source: str, examples: Sequence[Example], weights: dict[str, Weights]
    ) -> Forgetting:
        """Returns how far the weights see images, those of `source`, as the original does."""
        pixels = load_all(examples, self._towers.tables.image)
        views = {name: self.reader(own).view(pixels) for name, own in weights.items()}
        count = self._config.neighbours
        figures = {
            name: agreement(views[ORIGINAL], own, neighbours=count)
            for name, own in views.items()
            if name != ORIGINAL
        }
        return Forgetting(source, len(examples), count, figures)


class Search:
    """What the weights between the original and a fold's find in the part that it held out."""

    def __init__(
        self,
        alphas: Sequence[float],
        bench: Bench,
        tuned: Weights,
        held_out: Sequence[Example],
    ) -> None:
        pairs = bench.pairs(held_out)
        self.ranks = {
            alpha: retrieval_ranks(bench.reader(interpolated(bench.original, tuned, alpha)), pairs)
            for alpha in alphas
        }
        self.curve: Curve = [
            (a, float(mean_recall(*ranks).mean())) for a, ranks in self.ranks.items()
        ]
        shown = ", ".join(f"{alpha:g}: {value:.3f}" for alpha, value in self.curve)
        print(f"mean recall by alpha: {shown}")


def together(searches: Sequence[Search], alpha: float) -> list[Scores]:
    """Returns the scores over all images, each in the fold that held it out."""
    text, image = (
        [own for search in searches for own in search.ranks[alpha][side]] for side in (0, 1)
    )
    return _scores(text, image)


def _scores(
    text_ranks: Sequence[NDArray[np.int64]], image_ranks: Sequence[NDArray[np.int64]]
) -> list[Scores]:
    """Returns TR, IR and, last, the mean recall."""
    return [
        rank_scores("TR", text_ranks),
        rank_scores("IR", image_ranks),
        mean_scores(MEAN_RECALL, mean_recall(text_ranks, image_ranks)),
    ]


def _state(method: torch.nn.Module) -> Weights:
    return {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}


def _larger(image: ImageSpec, scale: float) -> ImageSpec:
    height, width = (round(side * scale) for side in (image.height, image.width))
    return image.model_copy(update={"height": height, "width": width})
