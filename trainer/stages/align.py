"""`python -m trainer align RECIPE`: a CLIP fine-tuned on a few captioned images.

The last blocks of both towers and the projections are trained by CLIP's own loss, norms never. The
weights kept lie between the original and the fine-tuned ones (WiSE-FT, see
`trainer.interpolation`): how far, k folds decide. Each holds some images out while the others are
learnt from, and the alpha with the largest mean recall over all images is taken.

The folder is a run like one of `pretrain`, so `encoder.weights` and `start` of other recipes take
it: `last.safetensors` holds the interpolated weights. Beside it stand `align.html`, `report.json`,
and the trainings, `fold-1/`, `fold-2/` ... and `all/`: what was killed goes on where it was.
"""

import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.alignment import (
    KEPT,
    MEAN_RECALL,
    ORIGINAL,
    TUNED,
    Alignment,
    Retrieval,
    write_alignment,
)
from trainer.checkpoint import CHECKPOINT, save_checkpoint
from trainer.data import Example, check_apart, describe, read_examples
from trainer.errors import ConfigError
from trainer.interpolation import interpolated
from trainer.intervals import Interval, paired_difference
from trainer.loop import device_of
from trainer.metrics._scores import Scores
from trainer.photos import read_captioned, usable_examples
from trainer.run import claimed
from trainer.splits import folds
from trainer.stages._alignment_bench import Bench, Search, together
from trainer.stages._alignment_recipe import Config, Resolved
from trainer.stages._towers import Towers, open_towers

_CHANGEABLE: Any = {
    "loop": {"workers", "save_every", "evaluate_every", "device"},
    "alphas": True,
    "data": {"dev", "dev_split"},
    "general": True,
    "unlabelled": True,
    "neighbours": True,
}
_SAME = 1e-9  # mean recalls nearer than this differ by rounding alone


def run(config: Config, out_dir: Path) -> None:
    """Fine-tunes (or goes on fine-tuning) in `out_dir`, and writes the page and its numbers.

    Raises:
        CheckpointError: no CLIP to start from, another process trains in `out_dir`, or the run
            there is of another recipe or of other images.
        ConfigError: the plan, the folds or the batches do not fit.
        DataError: a data set cannot be read, or dev shares images with train.
    """
    towers = open_towers(config.start)
    examples = read_captioned(config.data.train, config.data.images, config.data.train_split)
    resolved = Resolved.of(config, towers.tables, examples)
    with claimed(resolved, out_dir, changeable=_CHANGEABLE):
        towers.keep_text(out_dir)
        _align(config, towers, examples, out_dir)


def _align(config: Config, towers: Towers, examples: Sequence[Example], out_dir: Path) -> None:
    dev = _read_dev(config, examples)
    parts = [
        ([example for example in examples if example not in held_out], held_out)
        for held_out in folds(examples, config.folds.count, config.seed)
    ]
    _check_sizes(config, parts)
    general = _read_general(config, examples)
    source, others = _read_unlabelled(config, dev, examples)
    bench = Bench(config, towers, examples)
    searches = []
    for number, (train, held_out) in enumerate(parts, start=1):
        print(f"\nfold {number} of {len(parts)}: {len(train)} images, {len(held_out)} held out")
        tuned = bench.finetuned(train, out_dir / f"fold-{number}")
        searches.append(Search(config.alphas, bench, tuned, held_out))
    gains, alpha = chosen_alpha({a: together(searches, a)[-1] for a in config.alphas})
    print(f"\nalpha {alpha:g}; now all {len(examples)} images")
    tuned = bench.finetuned(examples, out_dir / "all")
    weights = {
        ORIGINAL: bench.original,
        TUNED: tuned,
        KEPT: interpolated(bench.original, tuned, alpha),
    }
    kept = {f"objective.{name}": tensor for name, tensor in weights[KEPT].items()}
    save_checkpoint(out_dir / CHECKPOINT, kept, {"alpha": alpha})
    tables = [bench.retrieval("dev", dev, weights) if dev else _of_folds(searches, alpha)]
    tables += [bench.retrieval(f"general ({name})", own, weights) for name, own in general.items()]
    found = Alignment(
        start=config.start,
        images=len(examples),
        alpha=alpha,
        gains=gains,
        folds=[search.curve for search in searches],
        trained=bench.trained,
        retrieval=tables,
        forgetting=bench.forgetting(source, others, weights),
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        place=str(device_of(config.loop)),
    )
    write_alignment(out_dir, found)
    _print(found)
    print(f"\nwrote {out_dir}/{CHECKPOINT}, align.html and report.json")


def _of_folds(searches: Sequence[Search], alpha: float) -> Retrieval:
    """Returns what the weights of the folds find, each in what it held out."""
    among = {ORIGINAL: 0.0, TUNED: 1.0, KEPT: alpha}
    scores = {name: together(searches, own) for name, own in among.items()}
    return Retrieval.of("the folds held out, which chose alpha too", scores)


def _read_dev(config: Config, examples: Sequence[Example]) -> list[Example]:
    data = config.data
    if data.dev is None:
        return []
    dev = read_captioned(data.dev, data.images, data.dev_split)
    check_apart(examples, dev, "data.train", "data.dev")
    return dev


def _read_general(config: Config, examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Returns the images of `[general]` by the name of their file, if there are any."""
    if config.general is None:
        return {}
    data, images, split = config.general.data, config.general.images, config.general.split
    general = read_captioned(data, images, split)
    check_apart(examples, general, "data.train", "general.data")
    return {data.name: general}


def _read_unlabelled(
    config: Config, dev: Sequence[Example], examples: Sequence[Example]
) -> tuple[str, list[Example]]:
    """Returns images that tell what was forgotten, and whose they are, in words."""
    given = config.unlabelled
    if given is None:
        name, found = ("dev", list(dev)) if dev else ("train", list(examples))
    else:
        found = read_examples(given.data, images=given.images, split=given.split)
        print(describe(given.data, found))
        found = random.Random(config.seed).sample(found, min(given.sample, len(found)))
        name, found = given.data.name, usable_examples(found)
    if config.neighbours >= len(found):
        raise ConfigError(
            f"neighbours = {config.neighbours}, but there are {len(found)} images ({name}) that "
            "tell what is forgotten; take fewer, or name more in [unlabelled]"
        )
    return name, found


def _check_sizes(config: Config, parts: Sequence[tuple[list[Example], list[Example]]]) -> None:
    """Raises ConfigError where a fold has too few images to be learnt from or to be measured on."""
    least, held_out = (min(len(part[side]) for part in parts) for side in (0, 1))
    if held_out < 2:
        raise ConfigError(
            f"folds.count = {config.folds.count} leaves a fold {held_out} image, and among fewer "
            "than 2 nothing can be searched; take a lower count"
        )
    if not 2 <= config.loop.batch_size <= least:
        raise ConfigError(
            f"loop.batch_size = {config.loop.batch_size}, but a fold learns from {least} images; "
            f"take 2 to {least}"
        )
    if config.loop.accumulate > 1:
        raise ConfigError(
            "loop.accumulate: CLIP compares the images of a batch with each other; take as large a "
            "loop.batch_size as memory holds"
        )


def chosen_alpha(recalls: dict[float, Scores]) -> tuple[list[tuple[float, Interval]], float]:
    """Returns the gains over alpha 0 by alpha, and the best alpha; of equals the smallest.

    Args:
        recalls: by alpha, the mean recall of every image where it was held out.
    """
    first = recalls[0.0]
    gains = [(a, paired_difference(recalls[a], first)[MEAN_RECALL]) for a in sorted(recalls)]
    most = max(gain.value for _, gain in gains)
    return gains, next(alpha for alpha, gain in gains if gain.value > most - _SAME)


def _print(found: Alignment) -> None:
    for table in found.retrieval:
        print(f"\nretrieval, {table.title}, {table.images} images")
        for name, figures in table.figures.items():
            print(f"  {name}")
            for figure, interval in figures.items():
                gain = table.differences.get(name, {}).get(figure)
                print(f"    {figure:12s} {interval}" + (f"  difference {gain}" if gain else ""))
    print(f"\nagreement with the original, {found.forgetting.images} images")
    for name, figures in found.forgetting.figures.items():
        shown = ", ".join(f"{figure} {one.value:.3f}" for figure, one in figures.items())
        print(f"  {name}: {shown}")
    print(f"\n{found.verdict}")
