"""The steps of `python -m trainer auto`: what each does, in which folder, and what is kept."""

import csv
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from exports.registry import Registry
from trainer.config import Config as BaseConfig
from trainer.config import validate
from trainer.data import read_examples
from trainer.errors import DataError, TrainerError
from trainer.intervals import Interval, paired_difference
from trainer.labelling.answers import ANSWERS, Answer, Answers
from trainer.metrics import cider
from trainer.photos import read_captioned, scan_images
from trainer.run import PretrainRecipe, Recipe
from trainer.splits import duplicate_groups
from trainer.stages import acquire, bootstrap, evaluate, export, finetune, label, pretrain

if TYPE_CHECKING:
    from trainer.stages.auto import Config

_SPARE = 1.3  # picks for each label wanted: people skip some images
_TEST = "test-images"


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
        kept = gain is None or (not gain.high < 0 if step.trusted else gain.value >= 0)
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

    def recipe(self, *changes: Mapping[str, Any] | None, **tables: Any) -> Recipe:
        """Returns `[finetune]` with changes laid over it, table by table, and then `tables`.

        `false` takes a table out.
        """
        whole: dict[str, Any] = {"seed": self.config.seed, **self.config.finetune}
        for change in (*changes, tables):
            for key, value in (change or {}).items():
                old = whole.pop(key, None)
                if value is not False:
                    whole[key] = _over(old, value) if isinstance(old, dict) else value
        return validate(Recipe, whole, "auto, [finetune]")

    def labelled(self, *, test: bool) -> Path:
        """Writes and returns the table of what people wrote of the test images, or of all others.

        Raises:
            DataError: there is nothing.
        """
        examples = read_captioned(self.answers, self.config.images, None)
        chosen = self.test_images()
        own = [e for e in examples if (e.image.resolve() in chosen) == test]
        path = self.folder / ("test.csv" if test else f"train-{len(own)}.csv")
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "caption", "source"])
            for e in own:
                table.writerows([e.image.resolve(), text, "human"] for text in e.captions)
        temporary.replace(path)
        return path

    def test_images(self) -> set[Path]:
        """Returns the images that were drawn to be tested on."""
        return {self.path_of(name) for name in _picked(self.folder / _TEST)}

    def path_of(self, name: str) -> Path:
        """Returns the image that a table of picks names."""
        return (self.config.images / name).resolve()

    def encoder(self) -> dict[str, Any]:
        """Returns what `acquire` compares images by."""
        if self.config.pretrain is not None:
            return {"encoder": self.folder / "encoder"}
        return {"encoder": self.config.finetune["encoder"], "image": self.config.finetune["image"]}

    def _evaluate(self, run: Path, folder: Path) -> None:
        config = evaluate.Config(model=run, data=self.labelled(test=True))
        evaluate.run(config, folder / "evaluation")

    def _gain(self, name: str) -> Interval | None:
        """Returns CIDEr-D of a step's captions minus that of the best model before it."""
        if self.state.model is None:
            return None
        examples = read_captioned(self.labelled(test=True), None, None)
        references = [example.captions for example in examples]
        new, old = (
            cider.score(references, captions_of(self.folder / step / "evaluation"))
            for step in (name, self.state.model)
        )
        return paired_difference(new, old)["CIDEr-D"]


def planned(pipeline: Pipeline) -> list[Step]:
    """Returns all steps in their order."""
    config = pipeline.config
    steps = []
    if config.pretrain is not None:
        words = f"learn to see from the images alone ({config.pretrain['method']['name']})"
        steps.append(Step("encoder", words, lambda folder: _pretrain(pipeline, folder)))
    test = config.test_labels
    steps += [
        Step(_TEST, "draw images to test on", lambda folder: _draw_test(pipeline, folder)),
        Step("test-labels", f"caption {test} of them", lambda _: _label(pipeline, _TEST, test)),
    ]
    for number, count in enumerate(config.round_labels, start=1):
        steps += _round(pipeline, number, count)
    if config.pseudo is not None:
        steps += _pseudo(pipeline)
    if config.scst is not None:
        words = "learn to score well, by reinforcement"
        steps.append(Step("scst", words, lambda folder: _scst(pipeline, folder)))
    words = f"export the best model and publish it as {config.name}"
    return [*steps, Step("bundle", words, lambda folder: _publish(pipeline, folder))]


def _pretrain(pipeline: Pipeline, folder: Path) -> None:
    config = pipeline.config
    table = {"seed": config.seed, **(config.pretrain or {})}
    table["data"] = {**table.get("data", {}), "train": config.images}
    pretrain.run(validate(PretrainRecipe, table, "auto, [pretrain]"), folder)


def _draw_test(pipeline: Pipeline, folder: Path) -> None:
    wanted = math.ceil(pipeline.config.test_labels * _SPARE)
    _acquire(pipeline, folder, wanted, {"method": {"name": "random"}})


def _acquire(pipeline: Pipeline, folder: Path, count: int, changes: Mapping[str, Any]) -> None:
    config = pipeline.config
    table = {"seed": config.seed, **config.acquire, **pipeline.encoder(), **changes}
    table |= {"images": config.images, "count": count}
    if pipeline.answers.exists():
        table["labelled"] = [pipeline.answers]
    acquire.run(validate(acquire.Config, table, "auto, [acquire]"), folder)


def _round(pipeline: Pipeline, number: int, count: int) -> list[Step]:
    """Returns the steps of a round, after which `count` images are labelled to learn from."""
    config = pipeline.config
    picks, model = f"picks-{number}", f"model-{number}"
    own = count - (config.round_labels[number - 2] if number > 1 else 0)

    def pick(folder: Path) -> None:
        speaker = {"model": pipeline.model} if pipeline.state.model else {}
        _acquire(pipeline, folder, math.ceil(own * _SPARE), speaker)

    def learn(folder: Path) -> Path:
        tables: dict[str, Any] = {"data": {"train": pipeline.labelled(test=False)}}
        if config.pretrain is not None:
            tables["encoder"] = {"weights": str(pipeline.folder / "encoder")}
        finetune.run(pipeline.recipe(**tables), folder)
        return folder

    return [
        Step(picks, f"pick {own} images to learn from", pick),
        Step(
            f"labels-{number}",
            f"caption them ({count} in all)",
            lambda _: _label(pipeline, picks, config.test_labels + count),
        ),
        Step(model, f"learn from {count} captioned images", learn, trusted=True),
    ]


def _label(pipeline: Pipeline, picks: str, wanted: int) -> None:
    """Has images labelled until `wanted` are.

    Raises:
        DataError: the answers do not reach; TrainerError: the page was left before.
    """
    config, folder = pipeline.config, pipeline.answers.parent
    if config.answers is not None:
        _answer(pipeline, _picked(pipeline.folder / picks), wanted)
        return
    model = pipeline.model if pipeline.state.model else None
    label.run(
        label.Config(
            images=config.images,
            picks=pipeline.folder / picks / "picks.csv",
            model=model,
            captions_per_image=config.captions_per_image,
            port=config.port,
            open_browser=config.open_browser,
            until=wanted,
        ),
        folder,
    )
    count = len(read_examples(pipeline.answers, images=config.images))
    if count < wanted:
        raise TrainerError(
            f"{count} of {wanted} images are labelled; give the same command again to go on"
        )


def _answer(pipeline: Pipeline, picks: list[str], wanted: int) -> None:
    """Answers in the person's place, best pick first."""
    config = pipeline.config
    assert config.answers is not None
    known = {e.image.resolve(): e for e in read_examples(config.answers, images=config.images)}
    answers = Answers(pipeline.answers.parent)
    try:
        labelled = sum(bool(answer.captions) for answer in answers.all())
        for name in picks:
            example = known.get(pipeline.path_of(name))
            if labelled == wanted or answers.last(name) is not None:
                continue
            captions = example.captions[: config.captions_per_image] if example else ()
            when = datetime.now(UTC).isoformat(timespec="seconds")
            answers.add(
                Answer(
                    image=name,
                    captions=captions,
                    action="import" if captions else "skip",
                    revision=1,
                    when=when,
                )
            )
            labelled += bool(captions)
    finally:
        answers.close()
    if labelled < wanted:
        raise DataError(
            f"{config.answers}: has captions for {labelled} of {wanted} images that were picked; "
            "give a file with more, or ask for fewer labels"
        )


def _pseudo(pipeline: Pipeline) -> list[Step]:
    pseudo = pipeline.config.pseudo
    assert pseudo is not None

    def learn_filter(folder: Path) -> None:
        tables = {"data": {"train": pipeline.labelled(test=False)}}
        finetune.run(pipeline.recipe(pseudo.filter, **tables), folder)

    def caption(folder: Path) -> None:
        table = {
            "captioner": pipeline.model,
            "filter": pipeline.folder / "filter",
            "labelled": {"data": pipeline.labelled(test=False)},
            "unlabelled": {"data": _unlabelled(pipeline, pseudo.images)},
            "precision": pseudo.precision,
            "seed": pipeline.config.seed,
        }
        bootstrap.run(validate(bootstrap.Config, table, "auto, [pseudo]"), folder)

    def learn(folder: Path) -> Path:
        captions = pipeline.folder / "pseudo-captions" / "captions.csv"
        if not captions.exists():
            raise DataError("there are no synthetic captions")
        tables = {"data": {"train": captions}, "start": pipeline.model}
        finetune.run(pipeline.recipe(pseudo.finetune, **tables), folder)
        return folder

    return [
        Step("filter", "learn whether a caption fits", learn_filter),
        Step("pseudo-captions", "caption the images without labels", caption, optional=True),
        Step("pseudo-model", "learn from people's and synthetic captions", learn, optional=True),
    ]


def _unlabelled(pipeline: Pipeline, limit: int) -> Path:
    """Writes and returns the list of images to caption: nothing that resembles a test image."""
    scan = scan_images(read_examples(pipeline.config.images))
    looks = {path: one.look for path, one in scan.fingerprints.items()}
    tested = pipeline.test_images()
    free = [
        path
        for group in duplicate_groups(looks)
        if not any(path.resolve() in tested for path in group)
        for path in group
    ]
    path = pipeline.folder / "unlabelled.txt"
    lines = [str(image.resolve()) for image in free[:limit]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _scst(pipeline: Pipeline, folder: Path) -> Path:
    tables = {"data": {"train": pipeline.labelled(test=False)}, "start": pipeline.model}
    finetune.run(pipeline.recipe(pipeline.config.scst, **tables), folder)
    return folder


def _publish(pipeline: Pipeline, folder: Path) -> None:
    config = pipeline.config
    table = {
        **config.export,
        "run": pipeline.model,
        "name": config.name,
        "data": pipeline.labelled(test=True),
    }
    bundle = folder / "bundle"
    if not bundle.exists():
        export.run(validate(export.Config, table, "auto, [export]"), folder)
    registry = Registry(config.registry)
    published = registry.publish(bundle, model=config.name)
    registry.promote(config.name, published.version)
    print(
        f"{config.name}@{published.version} is in {config.registry}; serve it with\n"
        f"  python -m serving up --local --registry {config.registry} --model {config.name}"
    )


def captions_of(evaluation: Path) -> list[str]:
    """Returns the captions that an evaluation wrote, in the order of its images."""
    lines = (evaluation / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["caption"] for line in lines]


def _picked(folder: Path) -> list[str]:
    with (folder / "picks.csv").open(encoding="utf-8", newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]


def _over(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table with another laid over it; another variant takes its place."""
    if "name" in new and new["name"] != old.get("name"):
        return dict(new)
    return {**old, **new}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
