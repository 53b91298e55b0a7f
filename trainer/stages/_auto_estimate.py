"""The plan of `python -m trainer auto`, with about how long each step takes on this machine."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from exports.text import TextSpec
from trainer.data import read_examples
from trainer.run import Recipe, build_captioner
from trainer.stages._auto_pipeline import Pipeline, Step

_CAPTION_SECONDS = 25.0  # of a person who looks, thinks and types
_WORDS = 14  # tokens of a caption
_BACKWARD = 3.0  # a step of training, in forward passes
_SAMPLED = 8.0  # a step of reinforcement, in steps of training: captions are drawn token by token
_EXPORT_SECONDS = 90.0


def estimate(pipeline: Pipeline, steps: Sequence[Step]) -> str:
    """Returns the plan as lines of text; nothing is written.

    Two costs are measured, of looking at an image and of learning from its captions; all else
    follows from the counts in the preset.
    """
    costs = _Costs(pipeline)
    lines, machine, person = [], 0.0, 0.0
    for number, step in enumerate(steps, start=1):
        done = pipeline.state.done.get(step.name)
        seconds = costs.of(step.name)
        by_hand = "labels" in step.name and pipeline.config.answers is None
        if done is None and by_hand:
            person += seconds
        elif done is None:
            machine += seconds
        about = "done" if done else _words(seconds) + (" of yours" if by_hand else "")
        lines.append(f"  {number:2d}  {step.words:64s} {about}")
    whole = f"in all about {_words(machine)} of this machine"
    if person:
        whole += f" and {_words(person)} of yours"
    count = f"{costs.images} images, {pipeline.config.labels} of them to be captioned by a person"
    return "\n".join([count, *lines, whole])


class _Costs:
    """Seconds by step name.

    Attributes:
        images: How many there are.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        config = self._config = pipeline.config
        self.images = len(read_examples(config.images))
        self._pipeline = pipeline
        self._look, self._tell = _measured(pipeline.recipe(data={"train": config.images}))

    def of(self, step: str) -> float:
        """Returns how long a step takes, about."""
        config, counts = self._config, self._config.round_labels
        kind, _, number = step.partition("-")
        if step == "encoder":
            epochs = (config.pretrain or {})["loop"]["epochs"]
            return float(2 * _BACKWARD * epochs * self.images * self._look)
        if step == "test-images":
            return self.images * self._look
        if step == "start":
            return config.test_labels * (2 * self._look + _WORDS * self._tell)
        if kind == "picks":
            return 5.0
        if "labels" in step and config.answers is not None:
            return 1.0
        if step == "test-labels":
            return _CAPTION_SECONDS * config.captions_per_image * config.test_labels
        if kind == "labels":
            own = counts[int(number) - 1] - (counts[int(number) - 2] if int(number) > 1 else 0)
            return _CAPTION_SECONDS * config.captions_per_image * own
        if kind == "model":
            return self._training(None, counts[int(number) - 1])
        pseudo = min(self.images, config.pseudo.images) if config.pseudo else 0
        if step == "filter" and config.pseudo:
            return self._training(config.pseudo.filter, counts[-1])
        if step == "pseudo-captions":
            return pseudo * (2 * self._look + _WORDS * self._tell)
        if step == "pseudo-model" and config.pseudo:
            return self._training(config.pseudo.finetune, pseudo)
        if step == "scst":
            return _SAMPLED * self._training(config.scst, counts[-1])
        return _EXPORT_SECONDS

    def _training(self, changes: dict[str, Any] | None, images: int) -> float:
        """Returns the seconds of a run on so many images, its folds included."""
        recipe = self._pipeline.recipe(changes, data={"train": self._config.images})
        each = recipe.data.captions_per_image * self._tell
        looks = self._look * _BACKWARD
        once = 0.0
        if recipe.data.encoded_views:
            looks, once = 0.0, recipe.data.encoded_views * images * self._look
        runs = 1 + (recipe.folds.count if recipe.folds else 0)
        return runs * (once + recipe.loop.epochs * images * (each + looks))


def _measured(recipe: Recipe) -> tuple[float, float]:
    """Returns the seconds of encoding an image, and of a training step for one caption."""
    text = TextSpec(
        vocab_size=recipe.tokenizer.vocab_size,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        max_length=max(_WORDS, int(recipe.decoder.get("max_length", _WORDS))),
    )
    captioner = build_captioner(recipe, text, pretrained=False).eval()
    images = torch.zeros(8, 3, recipe.image.height, recipe.image.width, dtype=torch.uint8)
    token_ids = torch.ones(8, _WORDS, dtype=torch.long)
    looks, tells = [], []
    for _ in range(3):
        begun = time.perf_counter()
        with torch.no_grad():
            encoded = captioner.encoder.encoded(images)
        looks.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        captioner(encoded, token_ids).logsumexp(-1).sum().backward()
        tells.append(time.perf_counter() - begun)
    return min(looks) / len(images), min(tells) / len(images)


def _words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{round(minutes)} min" if minutes < 90 else f"{minutes / 60:.1f} h"
