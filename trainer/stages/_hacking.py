"""Notices a reward that is gamed, and keeps the best state from before.

A policy gradient finds what pays: n-grams twice, captions that break off, captions that grow. The
figures that tell are compared with those before the first step, and a run that spends its budget is
ended with the best of its states in its folder.
"""

import math
import os
import shutil
from pathlib import Path

from trainer.checkpoint import CHECKPOINT, load_checkpoint
from trainer.errors import RewardHackingError
from trainer.objectives._captioning import Budget
from trainer.runlog import read_log

BEST = "best.safetensors"
_QUALITY = "dev/CIDEr-D"
_CHANCE = 2  # captions that may turn bad by accident
_CURE = 'lower optim.lr, raise objective.xe_weight, or give "{}" a weight below 0 in rewards'


class HackingWatch:
    """Watches the captions of the same images, evaluation after evaluation.

    What it knows of a run stands in the run's log, so that one that goes on is watched as before.

    Args:
        folder: of the run.
        budget: how much worse captions may grow.
        images: whose captions are watched.
    """

    def __init__(self, folder: Path, budget: Budget, images: int) -> None:
        self._folder, self._budget, self._images = folder, budget, images

    def check(self, figures: dict[str, float]) -> None:
        """Takes an evaluation's figures, before they are in the log.

        Raises:
            RewardHackingError: the budget is spent. The checkpoint is the best state again.
        """
        before = next(iter(self._evaluations()), None)
        if before is None:
            return
        found = self._excess(figures, before)
        if found is None:
            return
        name, now, then, allowed = found
        kept = self._restore()
        cure = (
            "lower optim.lr or raise objective.xe_weight"
            if name == "length"
            else _CURE.format(name.replace(" ", "_"))
        )
        raise RewardHackingError(
            f"the reward is gamed: {name} of the captions of {self._images} images is {now:.3g}, "
            f"before the first step it was {then:.3g}, and objective.budget allows {allowed:.3g}. "
            f"{kept}; {cure}"
        )

    def keep(self) -> None:
        """Keeps the checkpoint, which the log's last figures are of, if it is the best so far."""
        qualities = [row[_QUALITY] for row in self._evaluations()]
        best = self._folder / BEST
        if qualities[-1] >= max(qualities) or not best.exists():
            _same(self._folder / CHECKPOINT, best)

    def _evaluations(self) -> list[dict[str, float]]:
        return [row for row in read_log(self._folder) if "dev/length" in row]

    def _excess(
        self, figures: dict[str, float], before: dict[str, float]
    ) -> tuple[str, float, float, float] | None:
        """Returns the first figure out of bounds: its name, value, value before, and the bound."""
        chance = _CHANCE / self._images
        for name, budget in (
            ("repetition", self._budget.repetition),
            ("bad endings", self._budget.bad_endings),
        ):
            now, then = figures[f"dev/{name}"], before[f"dev/{name}"]
            if now > then + budget + chance:
                return name, now, then, then + budget + chance
        now, then = figures["dev/length"], before["dev/length"]
        most = self._budget.length * max(1.0, then)
        if abs(now - then) > most:
            return "length", now, then, then + math.copysign(most, now - then)
        return None

    def _restore(self) -> str:
        best = self._folder / BEST
        if not best.exists():
            return f"{self._folder / CHECKPOINT} is of an earlier step"
        _same(best, self._folder / CHECKPOINT)
        step = load_checkpoint(best)[1]["step"]
        row = next((row for row in self._evaluations() if row["step"] == step), {})
        figure = f" (CIDEr-D {row[_QUALITY]:.3f})" if row else ""
        return f"{self._folder} holds its best state again, after step {step}{figure}"


def _same(source: Path, target: Path) -> None:
    """Lets `target` be the file that `source` is now; what is written to `source` later is not."""
    temporary = target.with_name(f".{target.name}.link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a disk without links
        shutil.copyfile(source, temporary)
    temporary.replace(target)
