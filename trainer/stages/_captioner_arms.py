"""Arms that are captioners, each made by steps; their captions of `[dev]` decide.

`[arms.NAME] steps` is a list of them (see `trainer.stages._steps`), laid over the tables that all
arms share. In any of a step's values `{seed}` stands for the run's seed, `{1}` for the folder of
the arm's first step, and `{NAME}` for the last one of an earlier arm of the same seed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from exports.manifest import Generation
from trainer.comparison import CAPTIONERS, RunFigures, Sample
from trainer.config import Config as BaseConfig
from trainer.config import validate, write_resolved
from trainer.data import check_apart
from trainer.decoding import TorchSteps, best_hypotheses
from trainer.errors import ConfigError
from trainer.matching import MatcherConfig
from trainer.metrics import cider, distinct
from trainer.photos import load_all, read_captioned
from trainer.run import Data, Recipe, Run
from trainer.stages._arms import (
    RESULT,
    ArmsConfig,
    Bench,
    check_arms,
    check_informative,
)
from trainer.stages._steps import Step, read_step, with_values
from trainer.stages.bootstrap import Source

CAPTIONS = "captions.json"
_SAMPLES = 8  # images of the page


class Dev(BaseConfig):
    """Keys of `[dev]`: captioned images that no arm learns from."""

    data: Path
    images: Path | None = None
    split: str | None = None
    first: int | None = Field(default=None, ge=2)
    """How many of them are captioned, the first ones; by default all."""


class Config(ArmsConfig):
    """A recipe that compares captioners: the tables of `finetune`, which steps lay theirs over."""

    dev: Dev
    optimizer_steps: int | None = Field(default=None, ge=1)
    """Of every arm, divided among its finetunings by their `share`; by default `loop.epochs` of
    each decides."""
    data: Data
    unlabelled: Source | None = None
    """Images that `bootstrap` captions; what is labelled is `data.train`."""
    encoder: dict[str, Any]
    bridge: dict[str, Any]
    decoder: dict[str, Any]
    objective: dict[str, Any] = Field(default_factory=dict)
    matcher: MatcherConfig | None = None
    generation: Generation = Field(default_factory=Generation)

    @property
    def shared(self) -> dict[str, dict[str, Any]]:
        """The tables that steps lay theirs over, by stage."""
        data, unlabelled = self.data, self.unlabelled
        labelled = Source(
            data=data.train, images=data.images, split=data.train_split, only=data.only
        )
        return {
            "finetune": self.model_dump(include=set(Recipe.model_fields)),
            "bootstrap": {
                "labelled": labelled.model_dump(),
                "unlabelled": unlabelled and unlabelled.model_dump(),
            },
        }


class Said(BaseConfig):
    """`captions.json`: what a captioner says of dev's images."""

    generation: Generation
    images: tuple[str, ...]
    captions: tuple[str, ...]


class Arm(BaseConfig):
    """Keys of `[arms.NAME]`."""

    steps: list[dict[str, Any]] = Field(min_length=1)


class CaptionerBench(Bench):
    """Captioners over the same seeds, measured by their captions of the same images.

    Raises:
        ConfigError: there is nothing to compare, or a step cannot be read.
    """

    kind = CAPTIONERS

    def __init__(self, config: Config, out_dir: Path) -> None:
        super().__init__(out_dir)
        self.config: Config = config
        check_arms(config, "two of [arms.NAME] with steps")
        self.baseline = self.subject = config.baseline or next(iter(config.arms))
        for name in config.arms:
            self.steps_of(name, config.seeds[0])
        self._said: dict[tuple[str, int], list[str]] = {}

    def prepare(self) -> None:
        """Reads the images that decide.

        Raises:
            DataError: a step learns from some of them, or they say nothing.
        """
        dev = self.config.dev
        self._dev = read_captioned(dev.data, dev.images, dev.split)[: dev.first]
        check_informative(dev.data, self._dev)
        sources = {
            source: f"arms.{name}"
            for name in self.config.arms
            for seed in self.config.seeds
            for step in self.steps_of(name, seed)
            for source in step.sources
            if not source[0].is_relative_to(self._out_dir)
        }
        for (path, source), where in sources.items():
            check_apart(source.read(), self._dev, f"{path} ({where})", "dev")
        self._pixels = load_all(self._dev, self.config.image)

    def about(self, name: str) -> Mapping[str, str]:
        """Returns the steps of an arm."""
        steps = self.steps_of(name, self.config.seeds[0])
        return {f"step {number}": step.title for number, step in enumerate(steps, 1)}

    def is_done(self, name: str, seed: int) -> bool:
        """Whether nothing of a run is left to be trained."""
        return all((step.folder / RESULT).exists() for step in self.steps_of(name, seed))

    def run_of(self, name: str, seed: int) -> RunFigures:
        """Returns what an arm's run comes to; makes what steps have not been made."""
        steps = self.steps_of(name, seed)
        budgets = {
            f"{n} {step.title}": step.made(self.config.optimizer_steps)
            for n, step in enumerate(steps, 1)
        }
        captions = self._said[name, seed] = self._captions(steps[-1])
        references = [example.captions for example in self._dev]
        figures = distinct.score(references, captions).corpus
        scores = cider.score(references, captions).per_image[:, 0]
        return RunFigures(seed, {}, figures, scores, [], budgets)

    def samples(self) -> list[Sample]:
        """Returns a few images with what people and every arm's first run say of them."""
        seed, count = self.config.seeds[0], len(self._dev)
        chosen = range(0, count, -(-count // _SAMPLES))
        return [
            Sample(
                self._dev[place].image,
                self._dev[place].captions[0],
                {name: self._said[name, seed][place] for name in self.config.arms},
            )
            for place in chosen
        ]

    def steps_of(self, name: str, seed: int) -> list[Step]:
        """Returns the steps of an arm's run, each of which can be read.

        Raises:
            ConfigError: a step's keys are wrong, or the last one makes no captioner.
        """
        config, steps = self.config, list[Step]()
        arm, folder = validate(Arm, config.arms[name], f"arms.{name}"), self.folder_of(name, seed)
        shared = config.shared
        known: dict[str, object] = {"seed": seed, **self._ends(name, seed)}
        for number, table in enumerate(arm.steps, 1):
            where, own = f"arms.{name}, step {number}", folder / str(number)
            table = with_values(table, known, where)
            steps.append(read_step(table, shared, steps, seed=seed, folder=own, where=where))
            known[str(number)] = own
        if not isinstance(steps[-1].config, Recipe):
            raise ConfigError(
                f"arms.{name}: its last step is {steps[-1].stage}, which makes no captioner; end "
                "with one of finetune"
            )
        shares = sum(step.share for step in steps)
        if config.optimizer_steps is not None and abs(shares - 1) > 1e-6:
            raise ConfigError(
                f"arms.{name}: its steps have shares of {shares:g} of the {config.optimizer_steps} "
                "optimizer_steps in all, so the arms would not be alike; let the shares add up to 1"
            )
        return steps

    def _ends(self, name: str, seed: int) -> dict[str, Path]:
        """Returns the folders of the last steps of the arms before one."""
        arms = self.config.arms
        earlier = list(arms)[: list(arms).index(name)]
        return {one: self.folder_of(one, seed) / str(len(arms[one]["steps"])) for one in earlier}

    def _captions(self, step: Step) -> list[str]:
        """Returns what a captioner says of dev; kept beside it, and asked for only once."""
        run, path = Run(step.folder), step.folder / CAPTIONS
        images = tuple(str(example.image) for example in self._dev)
        generation = step.config.generation
        if path.exists():
            known = validate(Said, json.loads(path.read_text(encoding="utf-8")), str(path))
            if (known.generation, known.images) == (generation, images):
                return list(known.captions)
        steps = TorchSteps(run.captioner())
        found = best_hypotheses(steps, self._pixels, generation, prompt=run.prompt_ids)
        captions = [run.tokenizer.decode(one.token_ids) for one in found]
        said = Said(generation=generation, images=images, captions=tuple(captions))
        write_resolved(said, path)
        return captions
