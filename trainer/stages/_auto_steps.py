"""The steps of `python -m trainer auto`: what each does, in which folder."""

import csv
import math
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exports.registry import Registry
from trainer.config import validate
from trainer.data import read_examples
from trainer.errors import DataError, TrainerError
from trainer.labelling.answers import Answer, Answers
from trainer.photos import scan_images
from trainer.run import PretrainRecipe
from trainer.splits import duplicate_groups
from trainer.stages import acquire, bootstrap, export, finetune, label, pretrain
from trainer.stages._auto_pipeline import Pipeline, Step

_SPARE = 1.5, 5  # picks for each label wanted, and more: people skip some images
_TEST = "test-images"


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
        Step("test-labels", f"caption {test} of them", lambda _: _label_test(pipeline)),
    ]
    if config.start is not None:
        steps.append(Step("start", "ask the captioner at the start", lambda _: config.start))
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
    wanted = _picks_for(pipeline.config.test_labels)
    _acquire(pipeline, folder, wanted, {"method": {"name": "random"}})


def _label_test(pipeline: Pipeline) -> None:
    _label(pipeline, _TEST, pipeline.config.test_labels)
    pipeline.keep_test()


def _picks_for(labels: int) -> int:
    each, more = _SPARE
    return math.ceil(each * labels) + more


def _acquire(pipeline: Pipeline, folder: Path, count: int, changes: Mapping[str, Any]) -> None:
    config = pipeline.config
    table = {"seed": config.seed, **config.acquire, **pipeline.encoder(), **changes}
    table |= {"images": config.images, "count": count, "features": pipeline.folder}
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
        _acquire(pipeline, folder, _picks_for(own), speaker)

    def learn(folder: Path) -> Path:
        tables: dict[str, Any] = {"data": {"train": pipeline.train()}}
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
        # Few labels may well harm a captioner that has learnt from thousands.
        Step(model, f"learn from {count} captioned images", learn, trusted=config.start is None),
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
    answered = read_examples(pipeline.answers, images=config.images)
    count = sum(bool(example.captions) for example in answered)  # others were skipped
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
        tables = {"data": {"train": pipeline.train()}}
        finetune.run(pipeline.recipe(pseudo.filter, **tables), folder)

    def caption(folder: Path) -> None:
        table = {
            "captioner": pipeline.model,
            "filter": pipeline.folder / "filter",
            "labelled": {"data": pipeline.train()},
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
    """Writes and returns the list of images to caption, drawn of those unlike any test image."""
    scan = scan_images(read_examples(pipeline.config.images))
    looks = {path: one.look for path, one in scan.fingerprints.items()}
    tested = pipeline.test_images()
    free = [
        path
        for group in duplicate_groups(looks)
        if not any(path.resolve() in tested for path in group)
        for path in group
    ]
    random.Random(pipeline.config.seed).shuffle(free)
    path = pipeline.folder / "unlabelled.txt"
    lines = [str(image.resolve()) for image in free[:limit]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _scst(pipeline: Pipeline, folder: Path) -> Path:
    tables = {"data": {"train": pipeline.train()}, "start": pipeline.model}
    finetune.run(pipeline.recipe(pipeline.config.scst, **tables), folder)
    return folder


def _publish(pipeline: Pipeline, folder: Path) -> None:
    config = pipeline.config
    table = {
        **config.export,
        "run": pipeline.model,
        "name": config.name,
        "data": pipeline.test,
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


def _picked(folder: Path) -> list[str]:
    with (folder / "picks.csv").open(encoding="utf-8", newline="") as file:
        return [row["image"] for row in csv.DictReader(file)]
