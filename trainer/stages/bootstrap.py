"""`python -m trainer bootstrap RECIPE`: captions that people did not have to write.

Captioning and Filtering (CapFilt) of Li et al., 2022, "BLIP", https://arxiv.org/abs/2201.12086,
section 3.3: a captioner describes images that have no caption, and a filter keeps those of its
captions, and of texts found beside images, that it takes for true. Captions are drawn by nucleus
sampling, which the paper found better than beam search: more diverse, so more surprising.

Departures:

1. The threshold is the lowest that reaches a stated precision on captions that people wrote,
   against captions of other images.
2. The filter is its classifier alone (ITM); nearness of embeddings is not asked.

`--out` gets `captions.csv`, which `finetune` takes as `data.train`: image, caption, who wrote it
(`source`: human, synthetic or web) and how likely it is true (`match`; people's are not asked for);
`dropped.csv`, the same of what was left out, and `dropped.html` with the pictures; `report.json`.
A run that was killed goes on where it was: `scored.jsonl` holds what is done.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.config import Config as BaseConfig
from trainer.data import Example, Only, check_apart, read_examples
from trainer.errors import ConfigError
from trainer.photos import read_captioned, usable_examples
from trainer.retrieval import Reader
from trainer.run import Run, claimed
from trainer.sheet import SheetRow, write_sheet
from trainer.stages._candidates import Batch, Candidate, Writer, name_of, score_batches
from trainer.stages._threshold import Threshold, choose_threshold, known_matches

SCORED = "scored.jsonl"
_CHANGEABLE: Any = {"precision", "wrong", "threshold", "sheet_images"}


class Source(BaseConfig):
    """Keys of `[labelled]`, `[held_out]`, `[unlabelled]` and `[web]`: a data set."""

    data: Path
    images: Path | None = None
    split: str | None = None
    only: Only | None = None
    """The part of it that is taken; by default all of it."""

    def read(self) -> list[Example]:
        """Returns its examples."""
        return read_examples(self.data, images=self.images, split=self.split, only=self.only)


class Config(BaseConfig):
    """A recipe that captions and filters."""

    captioner: Path
    """A run, which captions the unlabelled images."""
    filter: Path | None = None
    """A run with a [matcher], by default the captioner's."""
    labelled: Source
    """What people wrote; it becomes part of the data set."""
    held_out: Source | None = None
    """What people wrote and the filter has not learnt from, to choose the threshold by; by default
    `labelled`, which flatters a filter that was trained on it."""
    unlabelled: Source | None = None
    """Images to caption; those that are labelled or held out are left out."""
    web: Source | None = None
    """Images with texts that somebody put beside them."""
    precision: float = Field(default=0.9, gt=0, lt=1)
    """Share of the kept captions that shall be true."""
    wrong: float = Field(default=0.5, gt=0, lt=1)
    """Share of the captions that are wrong before they are filtered, as far as you know."""
    threshold: float | None = Field(default=None, ge=0, le=1)
    """Keeps what is at least as likely, whatever precision that gives."""
    captions_per_image: int = Field(default=1, ge=1)
    """Drawn for each unlabelled image."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_new_tokens: int = Field(default=20, ge=1)
    batch_size: int = Field(default=32, ge=1)
    sheet_images: int = Field(default=200, ge=1)
    seed: int = 0


def run(config: Config, out_dir: Path) -> None:
    """Captions, filters and writes the data set (see the module).

    Raises:
        ConfigError: there is nothing to caption or to filter, or the filter has no matcher.
        CheckpointError: a run is missing, or what is in `out_dir` is of another recipe or data.
        DataError: a data set cannot be read, or no threshold reaches the precision.
    """
    if config.unlabelled is None and config.web is None:
        raise ConfigError("nothing to do: name [unlabelled] images, [web] texts, or both")
    with claimed(config, out_dir, changeable=_CHANGEABLE, state=SCORED):
        _run(config, out_dir)


def _run(config: Config, out_dir: Path) -> None:
    filter_run = Run(config.filter or config.captioner)
    reader = _reader(filter_run, config.batch_size)
    labelled = _read(config.labelled)
    held_out = labelled
    if config.held_out is not None:
        held_out = _read(config.held_out)
        check_apart(labelled, held_out, "labelled", "held_out")
    _warn_of_seen(filter_run, held_out)
    image = filter_run.recipe.image
    true, false = known_matches(reader, image, held_out, seed=config.seed)
    threshold = _threshold(config, true, false)
    scored = score_batches(
        _batches(config, labelled, held_out),
        Writer(
            Run(config.captioner),
            captions=config.captions_per_image,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
        ),
        reader,
        image,
        out_dir / SCORED,
    )
    human = [Candidate(name_of(e), text, "human", None) for e in labelled for text in e.captions]
    kept = [*human, *(one for one in scored if (one.match or 0.0) >= threshold.value)]
    dropped = [one for one in scored if (one.match or 0.0) < threshold.value]
    _write_csv(out_dir / "captions.csv", kept)
    _write_csv(out_dir / "dropped.csv", dropped)
    _write_report(config, out_dir, threshold, kept, dropped)


def _reader(filter_run: Run, batch_size: int) -> Reader:
    captioner = filter_run.captioner()
    if captioner.matcher is None:
        raise ConfigError(
            f"{filter_run.folder} cannot filter: it has no [matcher]; give a run of the objectives "
            "itm or blip as filter"
        )
    return Reader(captioner, filter_run.tokenizer, batch_size=batch_size)


def _read(source: Source) -> list[Example]:
    return read_captioned(source.data, source.images, source.split, source.only)


def _batches(
    config: Config, labelled: Sequence[Example], held_out: Sequence[Example]
) -> list[Batch]:
    """Returns all that is to be scored, in a fixed order."""
    known = {example.image.resolve() for example in (*labelled, *held_out)}
    images = [one for one in _all(config.unlabelled) if one.image.resolve() not in known]
    texts = [one for one in _all(config.web) if one.captions]
    size = config.batch_size
    web = [Batch("web", texts[start : start + size]) for start in range(0, len(texts), size)]
    made = [Batch("synthetic", images[at : at + size]) for at in range(0, len(images), size)]
    return web + made


def _all(source: Source | None) -> list[Example]:
    """Returns the images of a data set, whether they have captions or not."""
    if source is None:
        return []
    return usable_examples(source.read())


def _warn_of_seen(filter_run: Run, held_out: Sequence[Example]) -> None:
    """Says so where the filter learnt from the captions that the threshold is chosen by."""
    data = filter_run.recipe.data
    if not data.train.exists():
        return
    examples = data.read()
    seen = {example.image.resolve() for example in examples}
    count = sum(example.image.resolve() in seen for example in held_out)
    if count:
        print(
            f"WARNING: {filter_run.folder} was trained on {count} of the {len(held_out)} images "
            "that the threshold is chosen by, so it will keep too much; name [held_out]"
        )


def _threshold(config: Config, true: NDArray[np.float64], false: NDArray[np.float64]) -> Threshold:
    if config.threshold is None:
        return choose_threshold(true, false, precision=config.precision, wrong=config.wrong)
    recall, passed = ((part >= config.threshold).mean() for part in (true, false))
    kept = (1 - config.wrong) * recall + config.wrong * passed
    precision = (1 - config.wrong) * recall / kept if kept else float("nan")
    return Threshold(config.threshold, float(precision), float(recall))


def _write_csv(path: Path, rows: Iterable[Candidate]) -> None:
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption", "source", "match"])
        for row in rows:
            match = "" if row.match is None else f"{row.match:.6f}"
            table.writerow([row.image, row.caption, row.source, match])
    temporary.replace(path)


def _write_report(
    config: Config,
    out_dir: Path,
    threshold: Threshold,
    kept: Sequence[Candidate],
    dropped: Sequence[Candidate],
) -> None:
    counts = {
        "kept": dict(Counter(row.source for row in kept)),
        "dropped": dict(Counter(row.source for row in dropped)),
    }
    report = {"threshold": asdict(threshold), **counts}
    (out_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sheet = out_dir / "dropped.html"
    sheet.unlink(missing_ok=True)
    if dropped:
        ordered = sorted(dropped, key=lambda row: row.match or 0.0)
        rows = [SheetRow(Path(row.image), row.caption, (row.source,), row.match) for row in ordered]
        title = f"Dropped: less likely to match than {threshold.value:.3f}"
        figures = {name: float(count) for name, count in counts["dropped"].items()}
        write_sheet(sheet, rows, title, figures, limit=config.sheet_images)
    print(
        f"threshold {threshold.value:.3f}: precision {threshold.precision:.3f}, recall "
        f"{threshold.recall:.3f} on known captions, of which {config.wrong:.0%} were taken as wrong"
    )
    for name in sorted({row.source for row in (*kept, *dropped)}):
        left_out = counts["dropped"].get(name, 0)
        print(f"  {name}: {counts['kept'].get(name, 0)} kept, {left_out} dropped")
    print(f"wrote {out_dir}/captions.csv, dropped.csv, dropped.html and report.json")
