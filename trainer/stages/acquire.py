"""`python -m trainer acquire RECIPE`: which images to label next.

Takes images of which some may be labelled, encodes them, and picks those whose captions are worth
the most (see `trainer.acquisition`): none that is labelled, no near-duplicate of one that is, no
two near-duplicates. `--out` gets `picks.csv`, one row a pick, the first to be labelled first:
image, rank, method, cluster, typicality, score, a reason in words, and what the model says of it
(`proposal`); `picks.html`, the same with the pictures; `report.json`, how well the picks cover all
images; and `features/` (see `trainer.feature_store`): a second round encodes new images only.

Images count as labelled where the data set has a caption for them, or a file that `labelled` names
does. Captions that nobody has looked at (`source` synthetic or web, as `bootstrap` writes) do not
count.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import Field

from exports.images import ImageSpec
from trainer import variants
from trainer.acquisition._distances import nearest
from trainer.acquisition._pool import Pick, Pool, no_captioner
from trainer.config import Config as BaseConfig
from trainer.data import Example, image_roots, read_examples
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.feature_store import Encoded, FeatureStore
from trainer.run import Run
from trainer.splits import duplicate_groups
from trainer.stages._encoder import open_encoder
from trainer.stages._picks import Named, write_picks, write_table
from trainer.stages._speaker import RunSpeaker

_UNREAD = frozenset({"synthetic", "web"})


class Config(BaseConfig):
    """A recipe that picks images."""

    images: Path
    """A folder, or any data set (see `trainer.data`); what has captions there is labelled."""
    folder: Path | None = None
    """The folder that image names are relative to; by default `images` itself, or found beside it.
    """
    split: str | None = None
    labelled: tuple[Path, ...] = ()
    """Data sets whose captioned images count as labelled; names are relative to the same folder."""
    encoder: Path | dict[str, Any] | None = None
    """The folder of a run of `pretrain` or `finetune`, or an `[encoder]` table with `weights`; by
    default the model's."""
    image: ImageSpec | None = None
    """What the encoder is shown; by default as in its run."""
    features: Path | None = None
    """The folder that features are kept in, where several rounds share them; by default `--out`."""
    model: Path | None = None
    """A captioner's run, for the methods that ask one, and for proposals."""
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "schedule"})
    count: int = Field(default=20, ge=1)
    """Images to pick."""
    sheet_images: int = Field(default=200, ge=1)
    seed: int = 0


def run(config: Config, out_dir: Path) -> None:
    """Picks, and writes what the module says.

    Raises:
        ConfigError: too few images are left, no encoder is named, or the method asks a captioner
            and there is none.
        DataError: a data set cannot be read, or everything is labelled.
        CheckpointError: a run is missing, or another process works in `out_dir`.
    """
    module, method_config = variants.parse("acquisition", config.method)
    source = config.encoder or config.model
    if source is None:
        raise ConfigError(
            "no encoder to compare images by: set encoder to a run of `python -m trainer pretrain` "
            "or `finetune`, or write an [encoder] table"
        )
    # Before anything is encoded, which may take an hour.
    if module.Acquisition.asks and config.model is None:
        raise no_captioner(config.method["name"])
    model = Run(config.model) if config.model is not None else None
    images = _read(config)
    with _alone_in(out_dir):
        encoder = open_encoder(source, config.image, seed=config.seed)
        kept = config.features or out_dir
        store = FeatureStore(kept, encoder.module, encoder.table, encoder.image)
        encoded = store.encode(images.examples)
        speaker = None
        if model is not None:
            speaker = RunSpeaker(model, encoded.examples, seed=config.seed)
        pool = _pool(config, images, encoded, speaker)
        picks = module.Acquisition(method_config).pick(pool, config.count)
        proposals = speaker.best([pick.row for pick in picks]) if speaker else [""] * len(picks)
        named = [
            Named(example.image, images.name_of(example), pick, proposal)
            for pick, proposal in zip(picks, proposals, strict=True)
            for example in [encoded.examples[pick.row]]
        ]
        _write(config, out_dir, named, _figures(pool, len(encoded.examples), picks))


@dataclass(frozen=True, slots=True)
class _Images:
    """All images, each once; the labelled ones may be from elsewhere."""

    examples: list[Example]
    labelled: frozenset[Path]
    root: Path

    def name_of(self, example: Example) -> str:
        image = example.image
        inside = image.is_relative_to(self.root)
        return (image.relative_to(self.root) if inside else image).as_posix()


def _read(config: Config) -> _Images:
    found = read_examples(config.images, images=config.folder, split=config.split)
    examples: dict[Path, Example] = {}
    for one in found:
        examples.setdefault(one.image.resolve(), one)
    root = _root(config, found)
    labelled = _captioned(found)
    for path in config.labelled:
        own = read_examples(path, images=None if path.is_dir() else root)
        captioned = _captioned(own)
        if not captioned:
            raise DataError(f"{path}: named as labelled, but none of its images has a caption")
        foreign = [one for one in own if one.image.resolve() in captioned - examples.keys()]
        if foreign:
            print(
                f"WARNING: {path}: {len(foreign)} of its {len(captioned)} labelled images are not "
                f"among {config.images}, such as {foreign[0].image}; they count as labelled, where "
                "they exist"
            )
        examples |= {one.image.resolve(): one for one in foreign}
        labelled |= captioned
    return _Images(list(examples.values()), frozenset(labelled), root)


def _root(config: Config, examples: Sequence[Example]) -> Path:
    """Returns the folder that picks are named from."""
    if config.images.is_dir():
        return config.images
    roots = image_roots(config.images, config.folder)
    return next(
        (
            root
            for root in reversed(roots)
            if all(one.image.is_relative_to(root) for one in examples)
        ),
        roots[0],
    )


def _captioned(examples: Iterable[Example]) -> set[Path]:
    return {one.image.resolve() for one in examples if one.captions and one.source not in _UNREAD}


def _pool(config: Config, images: _Images, encoded: Encoded, speaker: RunSpeaker | None) -> Pool:
    paths = [example.image for example in encoded.examples]
    numbers = {path: row for row, path in enumerate(paths)}
    looks = {path: one.look for path, one in zip(paths, encoded.fingerprints, strict=True)}
    groups: NDArray[np.int64] = np.empty(len(paths), np.int64)
    for number, group in enumerate(duplicate_groups(looks)):
        groups[[numbers[path] for path in group]] = number
    labelled = np.array([path.resolve() in images.labelled for path in paths])
    return Pool.of(
        encoded.features, labelled, groups, budget=config.count, seed=config.seed, speaker=speaker
    )


def _figures(pool: Pool, images: int, picks: Sequence[Pick]) -> dict[str, Any]:
    """Returns how many images there are, and how far they are from what is labelled or picked."""
    places = {int(row): place for place, row in enumerate(pool.rows)}
    draw = np.random.default_rng(pool.seed)
    chance = draw.permutation(pool.open)[: len(picks)].tolist()
    mean, largest = _distances(pool, [places[pick.row] for pick in picks])
    mean_by_chance, largest_by_chance = _distances(pool, chance)
    return {
        "images": images,
        "near_duplicates": images - len(pool.rows),
        "labelled": int(pool.labelled.sum()),
        "picked": len(picks),
        "clusters": len(pool.clusters.sizes),
        "mean_distance": mean,
        "mean_distance_by_chance": mean_by_chance,
        "largest_distance": largest,
        "largest_distance_by_chance": largest_by_chance,
    }


def _distances(pool: Pool, places: Sequence[int]) -> tuple[float, float]:
    """Returns the mean and largest distance of an image to the nearest labelled or picked one."""
    known = pool.features[pool.plus(places).labelled]
    apart = nearest(pool.features, known)[1]
    return float(apart.mean()), float(apart.max())


def _write(config: Config, out_dir: Path, named: Sequence[Named], figures: dict[str, Any]) -> None:
    write_table(out_dir / "picks.csv", named)
    (out_dir / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    shown = {
        name.replace("_", " "): f"{value:.3f}" if isinstance(value, float) else str(value)
        for name, value in figures.items()
    }
    title = f"Label next: {config.images.name}"
    write_picks(out_dir / "picks.html", named, title, shown, limit=config.sheet_images)
    print(
        f"picked {figures['picked']} of {figures['images']} images; {figures['labelled']} are "
        f"labelled, {figures['near_duplicates']} near-duplicates are set aside"
    )
    print(
        "distance of an image to the nearest labelled or picked: mean "
        f"{figures['mean_distance']:.3f}, largest {figures['largest_distance']:.3f}; with as many "
        f"by chance {figures['mean_distance_by_chance']:.3f} and "
        f"{figures['largest_distance_by_chance']:.3f}"
    )
    print(f"wrote {out_dir}/picks.csv, picks.html and report.json")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise CheckpointError(f"{folder}: another process is working there") from error
