"""`python -m trainer compare RECIPE`: is it worth training the encoder on these images, and how?

Every arm of the recipe is an encoder, kept as it is or trained by a method, over the same seeds,
images and budget. The caption probe decides. Beside `compare.html` and `compare.json` the folder
gets `<arm>/<seed>/`, the runs: a comparison that was killed goes on where it was.
"""

import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer import variants
from trainer.checkpoint import CHECKPOINT, load_checkpoint
from trainer.comparison import ArmFigures, Budget, Comparison, RunFigures, write_comparison
from trainer.config import Config as BaseConfig
from trainer.config import validate, write_resolved
from trainer.data import Example, check_apart, describe, read_examples
from trainer.errors import CheckpointError, DataError
from trainer.loop import device_of, load_kept_weights
from trainer.metrics import cider
from trainer.photos import usable_examples
from trainer.probes import Probes
from trainer.run import PretrainRecipe, claimed
from trainer.runlog import read_log
from trainer.stages import pretrain
from trainer.stages._arms import Arm, Config, baseline_of, pretrain_recipe, read_arms
from trainer.verdict import judge

RESULT = "result.json"
_CAPTION_PROBE = "probe/caption_cider"


class Result(BaseConfig):
    """`result.json` of a run that is done: what it learnt from and took."""

    images: int
    steps: int
    seconds: float | None
    """Of all steps, at the speed of those that were measured: a run that was killed counts as fast
    as its last part. None where all steps were made before."""


def run(config: Config, out_dir: Path) -> None:
    """Trains what is not trained yet, and writes the page and its numbers.

    Raises:
        ConfigError: there is nothing to compare, or an arm cannot be built.
        DataError: the images of dev have been seen, or say nothing.
        CheckpointError: a run in `out_dir` is of another recipe or of other images.
    """
    arms = read_arms(config)
    baseline = baseline_of(config, arms)
    examples, seen = _read_examples(config, arms)
    probes = Probes(config.probe, config.image, examples, seed=config.seeds[0])
    out_dir.mkdir(parents=True, exist_ok=True)
    write_resolved(config, out_dir / "recipe.json")
    runs = _run_all(config, arms, _Bench(config, examples, probes, out_dir))
    scores = {name: np.stack([run.cider_d for run in found]) for name, found in runs.items()}
    untrained = [name for name, arm in arms.items() if arm.method is None]
    comparison = Comparison(
        arms={
            name: ArmFigures(_words(arm.encoder), _words(arm.method), runs[name])
            for name, arm in arms.items()
        },
        judgement=judge(scores, baseline),
        seen=seen,
        subject="the frozen encoder" if untrained == [baseline] else baseline,
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        place=str(device_of(config.loop)),
    )
    write_comparison(out_dir, comparison)
    print(f"\n{comparison.verdict}\nwrote {out_dir}/compare.html and compare.json")


def _read_examples(config: Config, arms: dict[str, Arm]) -> tuple[list[Example], int]:
    """Returns what is learnt from, and how many of dev's images are among it."""
    data, probe = config.data, config.probe
    assert probe.dev is not None  # `read_arms` has seen to it
    dev = _captioned(read_examples(probe.dev, images=probe.images, split=probe.dev_split))
    if not cider.DocumentFrequencies.of([example.captions for example in dev]).informative:
        raise DataError(
            f"{probe.dev}: CIDEr-D says nothing of its {len(dev)} captioned image(s); it needs "
            "several, with different captions"
        )
    examples = read_examples(data.train, images=data.images, split=data.train_split)
    print(describe(data.train, examples))
    if any(_reads_captions(arm) for arm in arms.values()):
        check_apart(_captioned(examples), dev, "data.train with captions", "probe.dev")
    known = {example.image.resolve() for example in dev}
    usable = usable_examples(examples)
    return usable, sum(example.image.resolve() in known for example in usable)


def _reads_captions(arm: Arm) -> bool:
    if arm.method is None:
        return False
    return bool(variants.load("methods", arm.method["name"]).Method.reads_captions)


def _captioned(examples: list[Example]) -> list[Example]:
    return [example for example in examples if example.captions]


def _words(table: dict[str, Any] | None) -> str:
    """Returns a variant's table in a line."""
    if table is None:
        return "no method: the encoder as it is"
    keys = [f"{key} {value}" for key, value in table.items() if key != "name"]
    return ", ".join([table["name"], *keys])


@dataclass(frozen=True, slots=True)
class _Bench:
    """What every run is made and measured with."""

    config: Config
    examples: list[Example]
    probes: Probes
    folder: Path

    def folder_of(self, name: str, seed: int) -> Path:
        """Returns where a run of an arm stands."""
        return self.folder / name / str(seed)

    def run_of(self, name: str, arm: Arm, seed: int) -> RunFigures:
        """Returns what an arm's run comes to; trains it unless it has been."""
        config = self.config
        torch.manual_seed(seed)  # as `pretrain` does: the encoder that the run begins with
        module, encoder_config = variants.parse("encoders", arm.encoder)
        encoder = module.Encoder(encoder_config, (config.image.height, config.image.width))
        # Laid out as in training, so that the same encoder gives the same figures.
        encoder.to(device=device_of(config.loop), memory_format=torch.channels_last).eval()
        if arm.method is None:
            figures, budget = [(0.0, self.probes.measure(encoder))], None
        else:
            recipe, folder = pretrain_recipe(config, name, arm, seed), self.folder_of(name, seed)
            images = len(_captioned(self.examples) if _reads_captions(arm) else self.examples)
            result = _train(recipe, folder, images, self.probes)
            load_kept_weights(encoder, folder / CHECKPOINT, "encoder.")
            epochs = recipe.loop.epochs
            figures = _logged(folder, epochs / result.steps)
            budget = Budget(images, epochs, recipe.loop.batch_size, result.steps, result.seconds)
        before, after = figures[0][1], figures[-1][1]
        if not math.isfinite(before.get(_CAPTION_PROBE, math.nan)):
            raise DataError(
                f"arm {name!r}: the features that its encoder begins with are not finite"
            )
        curve = [(epoch, row[_CAPTION_PROBE]) for epoch, row in figures if _CAPTION_PROBE in row]
        scores = self.probes.caption_scores(encoder)
        return RunFigures(seed, before, after, scores.per_image[:, 0], curve, budget)


def _run_all(config: Config, arms: dict[str, Arm], bench: _Bench) -> dict[str, list[RunFigures]]:
    """Returns every arm's runs, in the order of the seeds; each arm runs once before any twice."""
    runs: dict[str, list[RunFigures]] = {name: [] for name in arms}
    order = [(name, seed) for seed in config.seeds for name in arms]
    for place, (name, seed) in enumerate(order):
        to_come = [
            other
            for other in order[place:]
            if arms[other[0]].method and not (bench.folder_of(*other) / RESULT).exists()
        ]
        left = _time_left(runs, len(to_come))
        print(f"\nrun {place + 1} of {len(order)}: {name}, seed {seed}{left}", flush=True)
        runs[name].append(bench.run_of(name, arms[name], seed))
    return runs


def _train(recipe: PretrainRecipe, folder: Path, images: int, probes: Probes) -> Result:
    """Trains a run to its end, unless `result.json` says that this has been done."""
    path, checkpoint = folder / RESULT, folder / CHECKPOINT
    if path.exists() and checkpoint.exists():
        with claimed(recipe, folder, changeable=pretrain.CHANGEABLE):
            result = validate(Result, json.loads(path.read_text(encoding="utf-8")), str(path))
        if result.images != images:
            raise CheckpointError(
                f"{folder}: learnt from {result.images} images, now there are {images}; choose "
                "another folder with --out, or remove this one"
            )
        return result
    begun = load_checkpoint(checkpoint)[1]["step"] if checkpoint.exists() else 0
    since = time.perf_counter()
    pretrain.run(recipe, folder, probes=probes)
    elapsed = time.perf_counter() - since
    steps = load_checkpoint(checkpoint)[1]["total"]
    seconds = elapsed * steps / (steps - begun) if begun < steps else None
    result = Result(images=images, steps=steps, seconds=seconds)
    write_resolved(result, path)
    return result


def _logged(folder: Path, epochs_per_step: float) -> list[tuple[float, dict[str, float]]]:
    """Returns what the probes of a run said, each time with the epochs trained by then."""
    return [
        (row["step"] * epochs_per_step, {k: v for k, v in row.items() if k.startswith("probe/")})
        for row in read_log(folder)
        if "probe/rankme" in row
    ]


def _time_left(runs: dict[str, list[RunFigures]], to_come: int) -> str:
    """Returns how long so many runs will take, as far as the ones that are done tell."""
    budgets = [run.budget for found in runs.values() for run in found if run.budget]
    known = [budget.seconds for budget in budgets if budget.seconds is not None]
    if not known or not to_come:
        return ""
    seconds = to_come * sum(known) / len(known)
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"
