"""What the labelling page runs beside itself: `finetune`, then `acquire`, each a command."""

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.labelling.photo_list import read_picks
from trainer.labelling.proposals import MOST, Caption, distinct
from trainer.labelling.refits import Step
from trainer.labelling.session import Session
from trainer.photos import load_pixels

_RUNS = "refits"
_NEWEST = "newest.txt"
_BEAMS = 6  # of which three shall differ
# Behind everything that a person waits for.
_TRAINER = ("nice", "-n", "10", sys.executable, "-m", "trainer")


class Rounds:
    """The steps of a round.

    Args:
        session: gets new proposals and a new order.
        images: the data set that is labelled, as its recipe names it.
        folder: of its images.
        out_dir: of the answers; runs go to `refits/`, the order to `order/`.
        refit: a recipe of `finetune`, if the model shall learn.
        order: a recipe of `acquire`, if what is left shall be put in order.
    """

    def __init__(
        self,
        session: Session,
        images: Path,
        folder: Path,
        out_dir: Path,
        refit: Path | None,
        order: Path | None,
    ) -> None:
        self._session = session
        self._images, self._folder, self._out_dir = images, folder, out_dir
        self._refit, self._order = refit, order

    def steps(self, labels: int) -> list[Step]:
        """Returns the steps of the round that begins with this many labels."""
        run = self._out_dir / _RUNS / f"{labels:04d}"
        steps = []
        if self._refit is not None:
            shutil.rmtree(run, ignore_errors=True)  # what a round that was broken off left
            data = {"data.train": self._session.answers.path, "data.images": self._folder}
            words = _command("finetune", self._refit, data, run)
            steps.append(Step("training", words, run.with_suffix(".log"), lambda: self._swap(run)))
        if self._order is not None:
            given: dict[str, Path | list[Path]] = {"images": self._images}
            given["labelled"] = [self._session.answers.path]
            if not self._images.is_dir():
                given["folder"] = self._folder
            if self._refit is not None:
                given["model"] = run
            out = self._out_dir / "order"
            words = _command("acquire", self._order, given, out)
            log = run.with_name(f"{run.name}-order.log")
            steps.append(Step("choosing what comes next", words, log, lambda: self._sort(out)))
        return steps

    def _swap(self, run: Path) -> None:
        self._session.proposals.use(proposer(run))
        newest = run.with_name(_NEWEST)
        temporary = newest.with_suffix(".partial")
        temporary.write_text(f"{run.name}\n", encoding="utf-8")
        temporary.replace(newest)

    def _sort(self, out: Path) -> None:
        self._session.prefer(read_picks(out / "picks.csv", self._session.photos)[0])


def newest_run(out_dir: Path) -> Path | None:
    """Returns the last model that has learnt from the labels of a folder, if any has."""
    path = out_dir / _RUNS / _NEWEST
    return path.parent / path.read_text(encoding="utf-8").strip() if path.exists() else None


def proposer(model: Path) -> Caption:
    """Returns what captions a photograph: the distinct best of a beam search.

    Args:
        model: a run's folder or a bundle's.

    Raises:
        CheckpointError, BundleError: there is no model.
    """
    # As late as can be: without a model the page does not wait for PyTorch.
    from trainer.decoding import beam_search
    from trainer.stages._model import Model

    opened = Model.open(model)
    beams = max(_BEAMS, opened.generation.num_beams)
    generation = opened.generation.model_copy(update={"num_beams": beams, "num_captions": beams})

    def captions(image: Path) -> Sequence[str]:
        pixels = load_pixels(image, opened.image)[None]
        [found] = beam_search(opened.steps, pixels, generation, prompt=opened.prompt_ids)
        return distinct([opened.tokenizer.decode(one.token_ids) for one in found])[:MOST]

    return captions


def _command(
    stage: str, recipe: Path, given: Mapping[str, Path | list[Path]], out_dir: Path
) -> list[str]:
    # JSON's strings and lists are TOML's, so a path that looks like a number stays a path.
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in given.items()]
    return [*_TRAINER, stage, str(recipe), *overrides, "--out", str(out_dir)]
