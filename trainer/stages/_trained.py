"""What `pretrain` and `finetune` wrote, read back for a report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from trainer.charts import Curve
from trainer.config import validate
from trainer.errors import CheckpointError
from trainer.intervals import Interval
from trainer.photos import read_captioned
from trainer.report_parts import Panel
from trainer.run import PretrainRecipe, Recipe
from trainer.runlog import read_log
from trainer.splits import split_examples
from trainer.stages._learnt import Learnt, read_learnt

_PANELS = {
    "loss": "Loss",
    "dev/CIDEr-D": "CIDEr-D on held-out images",
    "dev/BLEU-4": "BLEU-4 on held-out images",
    "dev/distinct": "Share of distinct captions",
    "dev/IR R@1": "Captions that find their image at once",
    "probe/caption_cider": "CIDEr-D of the caption probe",
    "probe/rankme": "RankMe: directions in which features differ",
}
_POINTS = 80  # of a curve, at most: each is the mean of the steps about it


@dataclass(frozen=True, slots=True)
class Trained:
    """The folder of a run.

    Attributes:
        folder: It was read from.
        recipe: It was trained by.
        learnt: What it learnt from; None where it is not done, or older than that record.
        log: Its lines.
    """

    folder: Path
    recipe: Recipe | PretrainRecipe
    learnt: Learnt | None
    log: Sequence[Mapping[str, float]]

    @property
    def sentence(self) -> str:
        """What the run did."""
        recipe, learnt = self.recipe, self.learnt
        on = ""
        if learnt is not None:
            captions = sum(learnt.captions.values())
            with_captions = f" with {captions:,} captions" if captions else " without captions"
            on = f" on {learnt.images:,} images{with_captions}"
        if isinstance(recipe, PretrainRecipe):
            parts, start = [recipe.encoder["name"]], recipe.encoder.get("weights")
            how = recipe.method["name"]
        else:
            parts = [table["name"] for table in (recipe.encoder, recipe.bridge, recipe.decoder)]
            how, start = recipe.objective["name"], recipe.start
        begun = f", from {Path(start).name}" if start else ""
        model = " \N{RIGHTWARDS ARROW} ".join(parts)
        return f"Trained{on}, {recipe.loop.epochs} epochs{begun} ({model}, {how})."

    @property
    def captions(self) -> bool:
        """Whether it is a captioner."""
        return isinstance(self.recipe, Recipe)

    @property
    def seconds(self) -> float | None:
        """It took, where that is known."""
        return None if self.learnt is None else self.learnt.seconds

    @property
    def figures(self) -> dict[str, Interval]:
        """What the caption probe said last of an encoder; its interval is over images of dev."""
        found = [row for row in self.log if "probe/caption_cider" in row]
        if not found:
            return {}
        keys = (f"probe/caption_{end}" for end in ("cider", "low", "high"))
        return {_PANELS["probe/caption_cider"]: Interval(*(found[-1][key] for key in keys))}

    def seen(self, images: Sequence[Path]) -> int:
        """Returns how many of these images a captioner was trained on, if its data is there."""
        recipe = self.recipe
        if not isinstance(recipe, Recipe) or not recipe.data.train.exists():
            return 0
        data = recipe.data
        if data.dev_fraction:
            examples = read_captioned(data.train, data.images, data.train_split, data.only)
            examples, _ = split_examples(examples, data.dev_fraction, recipe.seed)
        else:
            examples = data.read()
        known = {example.image.resolve() for example in examples if example.captions}
        return sum(image in known for image in images)


def read_trained(folder: Path) -> Trained:
    """Returns what a run tells of itself.

    Raises:
        CheckpointError: The folder holds no run.
    """
    path = folder / "recipe.json"
    try:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no training run ({path} is missing); give the folder that `python -m "
            "trainer pretrain` or `finetune` wrote"
        ) from error
    if "method" not in table and "objective" not in table:
        raise CheckpointError(f"{folder}: not a run of pretrain or finetune, by its recipe.json")
    recipe: Recipe | PretrainRecipe
    if "method" in table:
        recipe = validate(PretrainRecipe, table, str(path))
    else:
        recipe = validate(Recipe, table, str(path))
    return Trained(folder, recipe, read_learnt(folder), read_log(folder))


def panels_of(runs: Mapping[str, Trained]) -> list[Panel]:
    """Returns the curves of the runs' logs, one panel a figure."""
    panels = []
    for key, title in _PANELS.items():
        lines = {name: _curve(run.log, key) for name, run in runs.items()}
        lines = {name: line for name, line in lines.items() if len(line) > 1}
        if lines:
            panels.append(Panel(title, lines))
    return panels


def _curve(log: Sequence[Mapping[str, float]], key: str) -> Curve:
    """Returns the figure by step, thinned by means where there are many steps."""
    points = [(row["step"], row[key]) for row in log if key in row]
    width = -(-len(points) // _POINTS)
    if width < 2:
        return points
    blocks = (points[start : start + width] for start in range(0, len(points), width))
    return [
        (fmean(step for step, _ in block), fmean(value for _, value in block)) for block in blocks
    ]
