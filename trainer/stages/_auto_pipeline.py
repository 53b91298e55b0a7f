"""What the steps of `python -m trainer auto` share: what is done, what was kept, who is tested."""

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.data import Example, read_examples
from trainer.errors import DataError
from trainer.intervals import Interval, paired_difference
from trainer.labelling.answers import ANSWERS
from trainer.metrics import cider
from trainer.photos import read_captioned
from trainer.run import Recipe
from trainer.stages import evaluate

if TYPE_CHECKING:
    from trainer.stages.auto import Config


class Done(BaseConfig):
    """What `auto.json` keeps of a step that is done.

    Attributes:
        seconds: It took; of a step that was killed and went on, the last part.
        run: The folder of the captioner that it made.
        skipped: Why it was not taken.
        gain: CIDEr-D on the test images minus that of the model before, as value, low, high.
        kept: Whether what it made takes the place of the model before.
    """

    seconds: float
    run: Path | None = None
    skipped: str | None = None
    gain: tuple[float | None, ...] | None = None
    kept: bool = True


class State(BaseConfig):
    """`auto.json`."""

    done: dict[str, Done] = Field(default_factory=dict)
    model: str | None = None
    """The step whose captioner is the best so far."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step.

    Attributes:
        name: Of its folder below `--out`.
        words: What it does, for people.
        work: Does it in the folder; returns the folder of the captioner that it made, if any.
        optional: A DataError, which says that the data will not do for it, only leaves it out.
        trusted: What it makes is kept unless the test images tell that it did harm, as more labels
            hardly do; of others it is kept where they gain.
    """

    name: str
    words: str
    work: Callable[[Path], Path | None]
    optional: bool = False
    trusted: bool = False

    def keeps(self, gain: Interval) -> bool:
        """Says whether what the step made takes the place of the model before."""
        return not gain.high < 0 if self.trusted else gain.value >= 0


class Pipeline:
    """What the steps share: the preset, the folders, and what is done.

    Args:
        config: of the stage.
        folder: `--out`.
    """

    def __init__(self, config: "Config", folder: Path) -> None:
        self.config, self.folder = config, folder
        self._file = folder / "auto.json"
        self.state = State()
        if self._file.exists():
            text = self._file.read_text(encoding="utf-8")
            self.state = validate(State, json.loads(text), str(self._file))

    @property
    def answers(self) -> Path:
        """What the person answered."""
        return self.folder / "labels" / ANSWERS

    @property
    def model(self) -> Path:
        """The run of the best captioner so far."""
        assert self.state.model is not None
        run = self.state.done[self.state.model].run
        assert run is not None
        return run

    def take(self, step: Step) -> None:
        """Takes a step, unless it is done.

        Raises:
            TrainerError: it cannot be taken; what was done before stays.
        """
        if step.name in self.state.done:
            print("done before")
            return
        begun, run, skipped = time.monotonic(), None, None
        try:
            run = step.work(self.folder / step.name)
        except DataError as error:
            if not step.optional:
                raise
            skipped = str(error)
            print(f"left out: {error}")
        gain, model = None, self.state.model
        if run is not None:
            self._evaluate(run, self.folder / step.name)
            gain = self._gain(step.name)
        kept = gain is None or step.keeps(gain)
        if run is not None and kept:
            model = step.name
        done = Done(
            seconds=round(time.monotonic() - begun, 1),
            run=run,
            skipped=skipped,
            gain=None if gain is None else tuple(map(_number, astuple(gain))),
            kept=kept,
        )
        self.state = State(done={**self.state.done, step.name: done}, model=model)
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(self.state.model_dump_json(indent=2) + "\n", encoding="utf-8")
        temporary.replace(self._file)

    def not_kept(self) -> list[str]:
        """Returns what became of the steps that bought nothing, in words."""
        words = []
        for name, done in self.state.done.items():
            if done.skipped is not None:
                words.append(f"{name} was left out: {done.skipped}.")
            elif not done.kept and done.gain is not None:
                value, low, high = done.gain
                change = f"it changed CIDEr-D by {value} ({low} to {high})"
                words.append(f"{name} was tried and not kept: {change}.")
        return words

    def recipe(self, *changes: Mapping[str, Any] | None, **tables: Any) -> Recipe:
        """Returns `[finetune]` with changes laid over it, table by table, and then `tables`.

        `false` takes a table out.
        """
        config = self.config
        begun = {} if config.start is None else {"start": config.start}
        whole: dict[str, Any] = {"seed": config.seed, **begun, **config.finetune}
        for change in (*changes, tables):
            for key, value in (change or {}).items():
                old = whole.pop(key, None)
                if value is not False:
                    whole[key] = _over(old, value) if isinstance(old, dict) else value
        return validate(Recipe, whole, "auto, [finetune]")

    @property
    def test(self) -> Path:
        """The table of what people wrote of the test images; it stays as it was first made."""
        return self.folder / "test.csv"

    def test_images(self) -> set[Path]:
        """Returns the images that are tested on."""
        return {example.image.resolve() for example in read_examples(self.test)}

    def keep_test(self) -> None:
        """Makes all that is labelled so far the test images."""
        if not self.test.exists():
            write_labels(self.test, read_captioned(self.answers, self.config.images, None))

    def train(self) -> Path:
        """Writes and returns the table of what people wrote of other images.

        Raises:
            DataError: there is nothing.
        """
        examples = read_captioned(self.answers, self.config.images, None)
        tested = self.test_images()
        own = [example for example in examples if example.image.resolve() not in tested]
        path = self.folder / f"train-{len(own)}.csv"
        write_labels(path, own)
        return path

    def path_of(self, name: str) -> Path:
        """Returns the image that a table of picks names."""
        return (self.config.images / name).resolve()

    def encoder(self) -> dict[str, Any]:
        """Returns what `acquire` compares images by."""
        if self.config.pretrain is not None:
            return {"encoder": self.folder / "encoder"}
        if self.config.start is not None:
            return {"encoder": self.config.start}
        return {"encoder": self.config.finetune["encoder"], "image": self.config.finetune["image"]}

    def _evaluate(self, run: Path, folder: Path) -> None:
        config = evaluate.Config(model=run, data=self.test)
        evaluate.run(config, folder / "evaluation")

    def _gain(self, name: str) -> Interval | None:
        """Returns CIDEr-D of a step's captions minus that of the best model before it."""
        if self.state.model is None:
            return None
        examples = read_captioned(self.test, None, None)
        references = [example.captions for example in examples]
        new, old = (
            cider.score(references, captions_of(self.folder / step / "evaluation"))
            for step in (name, self.state.model)
        )
        return paired_difference(new, old)["CIDEr-D"]


def captions_of(evaluation: Path) -> list[str]:
    """Returns the captions that an evaluation wrote, in the order of its images."""
    lines = (evaluation / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["caption"] for line in lines]


def write_labels(path: Path, examples: Sequence[Example]) -> None:
    """Writes what people wrote as a table, at once or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "source"])
        for example in examples:
            table.writerows([example.image.resolve(), text, "human"] for text in example.captions)
    temporary.replace(path)


def _over(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table with another laid over it; another variant takes its place."""
    if "name" in new and new["name"] != old.get("name"):
        return dict(new)
    return {**old, **new}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
