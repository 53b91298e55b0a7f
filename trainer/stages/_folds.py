"""For how many epochs to train, where images with captions are too few to hold some out.

Cross-validation: as many captioners as there are folds, each of which learns from all folds but one
and captions that one after every evaluation. The figure of an epoch is the mean CIDEr-D over all
images, each captioned by the model that has not seen it; document frequencies are those of all
labelled captions, since a fold of twenty images has none to speak of. The best epoch is taken, the
earliest of equals, and a last captioner learns from all images that long.

1. What is carried over are epochs, so that the last captioner reads each caption as often as the
   folds' did, in more steps as it has more images. Take a `loop.batch_size` that divides both
   numbers of images: what is left over of an epoch is left out of it.
2. The rate of the last captioner falls as that of the folds' did, along the schedule of all
   `loop.epochs`, and stops where they were best. A schedule of its own, ended in the chosen epoch,
   would be another recipe than the one that was measured.
3. Folds go on `folds.patience` evaluations at a time, all of them before any goes further, and end
   where none of as many was better than what had been.
4. The best of many figures flatters a little; and the last captioner has more images than those
   that were measured. To compare recipes, compare them on images of which none was trained on.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.nn import functional as F

from trainer import variants
from trainer.checkpoint import CHECKPOINT
from trainer.data import Example
from trainer.dataset import CaptionDataset
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.features import pooled_features
from trainer.intervals import Interval, bootstrap, paired_difference
from trainer.loop import Loop
from trainer.metrics import cider
from trainer.metrics._scores import Scores, mean_scores
from trainer.neighbours import CaptionedNeighbours
from trainer.objectives._captioning import CaptioningObjective
from trainer.photos import load_all
from trainer.plots import plot_folds
from trainer.run import Recipe
from trainer.splits import folds
from trainer.stages._evaluation import captions_of
from trainer.stages._figures import as_json

Measure = Callable[[CaptioningObjective, CaptionDataset], Callable[[int], dict[str, float]] | None]
"""Makes, of what is trained, what measures it after an epoch."""
Train = Callable[[Path, list[Example], Measure, int | None], None]
"""Trains in a folder, on examples, measured so, until an epoch."""

REPORT, PICTURE = "folds.json", "folds.png"
_CAPTIONS = "captions.json"


def chosen_epochs(config: Recipe, examples: Sequence[Example], out_dir: Path, train: Train) -> int:
    """Returns how many epochs are best, having trained the folds in `folds/N` of `out_dir`.

    Writes `folds.json` and `folds.png` there. Folds that a killed run left are gone on with.

    Raises:
        ConfigError: the objective does not teach to caption.
        DataError: too few images for the folds, or one has no caption that a person wrote.
        CheckpointError: the folds there are of other images.
    """
    assert config.folds is not None
    module, _ = variants.parse("objectives", config.objective)
    if not module.Objective.captions:
        raise ConfigError(
            f"[folds] measures captions, which objective {config.objective['name']!r} does not "
            "teach; leave the table out"
        )
    parts = folds(examples, config.folds.count, config.seed)
    found = [
        Fold(config, examples, part, out_dir / "folds" / str(number))
        for number, part in enumerate(parts)
    ]
    scorer = cider.CiderD([example.captions for fold in found for example in fold.held_out])
    every, patience = _evaluated(config.loop), config.folds.patience
    curve: dict[int, Scores] = {}
    for start in range(0, len(every), patience):
        stretch = every[start : start + patience]
        for number, fold in enumerate(found):
            if stretch[-1] not in fold.captions:
                print(f"fold {number + 1} of {len(found)}, to epoch {stretch[-1]}")
                fold.train(train, scorer.frequencies, stretch[-1])
        curve |= {n: _scored(scorer, [fold.captions[n] for fold in found]) for n in stretch}
        best = max(curve, key=lambda epochs: (curve[epochs].corpus["CIDEr-D"], -epochs))
        if best < stretch[0]:
            break
    copied = _scored(scorer, [fold.copied for fold in found])
    _report(found, curve, copied, best, out_dir)
    return best


def _evaluated(loop: Loop) -> list[int]:
    """Returns after how many epochs each evaluation comes."""
    return [*range(loop.evaluate_every, loop.epochs, loop.evaluate_every), loop.epochs]


@dataclass
class Fold:
    """Some of the images, and the captioner that learns from the others.

    Args:
        config: the recipe.
        examples: all of them.
        part: those of the fold.
        folder: of the captioner's run.

    Attributes:
        held_out: The fold's images with the captions that people wrote.
        captions: By epochs, a caption for each of `held_out`.
        copied: The caption of the nearest of the other images, for each of `held_out`.
    """

    config: Recipe
    examples: Sequence[Example]
    part: Sequence[Example]
    folder: Path
    held_out: list[Example] = field(init=False)
    captions: dict[int, list[str]] = field(init=False, default_factory=dict)
    copied: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.held_out = [e for e in self.part if e.source == "human"]
        if not self.held_out:
            raise DataError(
                f"a fold of {len(self.part)} images has no caption that a person wrote, and is "
                "measured by those alone; take fewer folds, or more captions by hand"
            )
        path = self.folder / _CAPTIONS
        if not self._begun:
            return
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read, but the run there needs it; remove {self.folder}"
            ) from error
        if kept["images"] != self.names:
            raise CheckpointError(
                f"{self.folder}: belongs to folds of other images; choose another folder with "
                "--out, or remove this one"
            )
        self.copied = kept["copied"]
        self.captions = {int(epochs): own for epochs, own in kept["captions"].items()}

    @property
    def _begun(self) -> bool:
        return (self.folder / CHECKPOINT).exists()

    @property
    def names(self) -> list[str]:
        """The images of `held_out`."""
        return [example.image.name for example in self.held_out]

    def train(self, train: Train, frequencies: cider.DocumentFrequencies, until: int) -> None:
        """Goes on to an epoch, captioning `held_out` after every evaluation on the way."""
        held_out = {example.image for example in self.part}
        training = [example for example in self.examples if example.image not in held_out]
        references = [example.captions for example in self.held_out]

        def measure(
            objective: CaptioningObjective, dataset: CaptionDataset
        ) -> Callable[[int], dict[str, float]]:
            pixels = load_all(self.held_out, self.config.image)
            if not self._begun:  # else the encoder is not what training began with
                self.copied = _copied(objective, dataset, pixels)
                self._keep()

            def after(epoch: int) -> dict[str, float]:
                captions = captions_of(objective, dataset.tokenizer, pixels, self.config.generation)
                self.captions[epoch + 1] = captions
                self._keep()
                scores = cider.score(references, captions, frequencies=frequencies)
                return {f"dev/{name}": value for name, value in scores.corpus.items()}

            return after

        train(self.folder, training, measure, until)

    def _keep(self) -> None:
        path = self.folder / _CAPTIONS
        kept = {"images": self.names, "copied": self.copied, "captions": self.captions}
        _write(path, kept)


def _copied(objective: CaptioningObjective, dataset: CaptionDataset, pixels: Any) -> list[str]:
    """Returns for images (n, H, W, 3) captions of those that the encoder, untrained, finds nearest.

    Features are compared from their mean on, without which all images of some encoders are alike.
    """
    labelled = [n for n, example in enumerate(dataset.examples) if example.source == "human"]
    encoder = objective.captioner.encoder.eval()
    known = pooled_features(encoder, dataset.images[labelled])
    features = pooled_features(encoder, pixels)
    unit = [F.normalize(rows - known.mean(0), dim=1).numpy() for rows in (features, known)]
    captions = [dataset.examples[n].captions for n in labelled]
    return CaptionedNeighbours(captions).copied(*unit)


def _scored(scorer: cider.CiderD, captions: Sequence[Sequence[str]]) -> Scores:
    """Returns the scores of all images' captions, fold by fold."""
    flat = [caption for own in captions for caption in own]
    values = [scorer.score(image, caption) for image, caption in enumerate(flat)]
    return mean_scores("CIDEr-D", np.array(values))


def _report(
    found: Sequence[Fold], curve: dict[int, Scores], copied: Scores, best: int, out_dir: Path
) -> None:
    """Writes and prints what was found."""
    intervals = {epochs: bootstrap(scores)["CIDEr-D"] for epochs, scores in curve.items()}
    neighbours, figure = bootstrap(copied)["CIDEr-D"], intervals[best]
    gain = paired_difference(curve[best], copied)["CIDEr-D"]
    ends = np.cumsum([len(fold.held_out) for fold in found])[:-1]
    by_fold = {
        epochs: [float(part.mean()) for part in np.split(scores.per_image[:, 0], ends)]
        for epochs, scores in curve.items()
    }
    report = {
        "epochs": best,
        "images": sum(len(fold.held_out) for fold in found),
        **as_json({"CIDEr-D": figure, "neighbours": neighbours, "gain": gain}),
        "curve": [
            {
                "epochs": epochs,
                **as_json({"CIDEr-D": intervals[epochs]}),
                "folds": [round(value, 4) for value in by_fold[epochs]],
            }
            for epochs in curve
        ],
        "folds": [fold.names for fold in found],
    }
    _write(out_dir / REPORT, report)
    plot_folds(
        out_dir / PICTURE,
        by_fold,
        {epochs: _bounds(interval) for epochs, interval in intervals.items()},
        baseline=_bounds(neighbours),
        chosen=best,
    )
    print(
        f"best after {best} epochs: {figure.value:.2f} ({figure.low:.2f} to {figure.high:.2f}) "
        f"over {report['images']} images; nearest neighbour's caption {neighbours.value:.2f}"
    )


def _bounds(interval: Interval) -> tuple[float, float, float]:
    return interval.value, interval.low, interval.high


def _write(path: Path, content: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
