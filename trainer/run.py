"""A training run's folder: what it holds and how a captioner is read back from it.

- `recipe.json`: the resolved recipe, defaults included;
- `tokenizer.json`, and `text.json`, its special ids and lengths;
- `decoder.json`, the architecture of a decoder that began with a checkpoint of `transformers`; with
  it the checkpoint itself is needed no more;
- `frequencies.safetensors`: a corpus's document frequencies, where rewards are weighed by them;
- `last.safetensors`: the whole state of the loop (see `trainer.checkpoint`); of a run that is
  watched for a gamed reward, `best.safetensors` is the best state so far;
- `log.jsonl`: losses and figures by step; `tensorboard/`: the same as curves;
- `learnt.json`, when it is done: who wrote what it learnt from, and how long it took.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field, field_validator, model_validator

from exports.images import ImageSpec
from exports.manifest import Generation
from exports.text import TextSpec, Tokenizer
from trainer import variants
from trainer.captioner import Captioner
from trainer.checkpoint import CHECKPOINT, save_checkpoint
from trainer.config import Config, validate, write_resolved
from trainer.data import Example, Only, read_examples
from trainer.distributed import barrier, rank
from trainer.errors import CheckpointError
from trainer.loop import Loop, load_kept_weights
from trainer.lora import Lora
from trainer.matching import MatcherConfig
from trainer.optim import Optim
from trainer.probes import ProbeConfig
from trainer.tokenizer import train_tokenizer
from trainer.transforms import Augment

_ARCHITECTURE = "decoder.json"
FREQUENCIES = "frequencies.safetensors"
BUILT = ("image", "encoder", "bridge", "decoder")
"""The tables of a recipe that say how a captioner is built."""


class Data(Config):
    """Keys of `[data]`: paths, and how much of each image's captions a step sees."""

    train: Path
    dev: Path | None = None
    images: Path | None = None
    """The folder that image names are relative to; by default found beside the files."""
    train_split: str | None = None
    only: Only | None = None
    """The part of `train` to learn from; by default all of it."""
    dev_split: str | None = None
    dev_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of `train` held out as `dev`, near-duplicates on one side; 0 where `dev` is named."""
    dev_images: int = Field(default=200, ge=1)
    """How many images of `dev` are captioned after an epoch, to see how the run goes."""
    captions_per_image: int = Field(default=5, ge=1)
    encoded_views: int = Field(default=0, ge=0)
    """Only with an encoder that is frozen from end to end: it looks once at so many augmented views
    of each image, which epochs take by turns, and is idle from then on. 0: every epoch has views
    of its own."""

    def read(self) -> list[Example]:
        """Returns the examples to learn from."""
        return read_examples(self.train, images=self.images, split=self.train_split, only=self.only)


class TokenizerConfig(Config):
    """Keys of `[tokenizer]`."""

    vocab_size: int = 3072


class Folds(Config):
    """Keys of `[folds]`: how many epochs are best is found on folds of the training images."""

    count: int = Field(default=5, ge=2)
    patience: int = Field(default=5, ge=1)
    """Evaluations that the folds go on at a time; they end where as many were no better."""


class Recipe(Config):
    """A recipe that trains a captioner."""

    seed: int = 0
    start: Path | None = None
    """A run whose tokenizer and weights this one begins with. What its recipe says of the captioner
    need not be said again."""
    data: Data
    image: ImageSpec
    tokenizer: TokenizerConfig = TokenizerConfig()
    encoder: dict[str, Any]
    bridge: dict[str, Any]
    decoder: dict[str, Any]
    objective: dict[str, Any]
    matcher: MatcherConfig | None = None
    """For captioners that also tell whether a caption fits an image."""
    lora: Lora | None = None
    """Trains pretrained parts by updates of low rank; whoever reads the run finds them added."""
    augment: Augment = Augment()
    optim: Optim = Optim()
    loop: Loop
    folds: Folds | None = None
    """Without it training takes `loop.epochs`."""
    generation: Generation = Field(default_factory=Generation)

    @model_validator(mode="before")
    @classmethod
    def _is_built_as_its_start(cls, table: Any) -> Any:
        start = table.get("start") if isinstance(table, dict) else None
        missing = [key for key in BUILT if key not in table] if start is not None else []
        path = Path(str(start)) / "recipe.json"
        if not missing or not path.is_file():  # what is missing is then named as ever
            return table
        known = json.loads(path.read_text(encoding="utf-8"))
        return {**{key: known[key] for key in (*missing, "matcher") if key in known}, **table}

    @field_validator("augment")
    @classmethod
    def _keeps_captions_true(cls, augment: Augment) -> Augment:
        augment.check_upright()
        return augment


class RawData(Config):
    """Keys of `[data]` of a recipe that learns from raw images."""

    train: Path
    """Any data set (see `trainer.data`); captions are read by methods that learn from them alone.
    """
    images: Path | None = None
    """The folder that image names are relative to; by default found beside the files."""
    train_split: str | None = None
    scale: float = Field(default=1.25, ge=1)
    """Decoded images are kept this much larger than `[image]`, so that crops of them stay sharp."""
    max_tokens: int = Field(default=40, ge=3)
    """Longer captions are cut."""

    def read(self) -> list[Example]:
        """Returns the examples to learn from."""
        return read_examples(self.train, images=self.images, split=self.train_split)


class PretrainRecipe(Config):
    """A recipe that trains an encoder without labels."""

    seed: int = 0
    data: RawData
    image: ImageSpec
    tokenizer: TokenizerConfig = TokenizerConfig()
    encoder: dict[str, Any]
    method: dict[str, Any]
    augment: Augment = Augment()
    second_view: Augment | None = None
    """Augmentations of the second view, where they differ from the first's."""
    optim: Optim = Optim()
    loop: Loop
    probe: ProbeConfig = ProbeConfig()

    @property
    def stored_image(self) -> ImageSpec:
        """What decoded images look like before a view is cut from them."""
        height, width = (
            round(side * self.data.scale) for side in (self.image.height, self.image.width)
        )
        return self.image.model_copy(update={"height": height, "width": width})


@contextmanager
def claimed(
    config: Config, folder: Path, *, changeable: Any, state: str = CHECKPOINT
) -> Iterator[None]:
    """Holds a run's folder for this process, and writes the recipe there.

    Args:
        config: the recipe.
        folder: of the run; made if absent.
        changeable: keys that may differ from those that the run there was begun with: what is
            learnt is the same. As pydantic's `exclude`.
        state: the file that a run goes on from, in its folder or in one of those below.

    Raises:
        CheckpointError: another process trains there, or the run there is of another recipe.
    """
    if rank():  # the first worker holds it for all
        barrier()
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _claim(config, folder, changeable, state)
            barrier()
            yield
    except Timeout as error:
        raise CheckpointError(f"{folder}: another process is training there") from error


def _claim(config: Config, folder: Path, changeable: Any, state: str) -> None:
    path = folder / "recipe.json"
    # What is trained first, by a method or as folds, has checkpoints in folders of its own.
    saved = any(folder.rglob(state))
    if saved and path.exists():
        begun = validate(type(config), json.loads(path.read_text(encoding="utf-8")), str(path))
        old, new = (one.model_dump(mode="json", exclude=changeable) for one in (begun, config))
        if old != new:
            table = next(name for name in new if old[name] != new[name])
            raise CheckpointError(
                f"{folder}: holds a run of another recipe ({table}: {old[table]}, here "
                f"{new[table]}); choose another folder with --out, or remove this one"
            )
    else:
        for name in ("text.json", _ARCHITECTURE, FREQUENCIES):  # of a run that never saved
            (folder / name).unlink(missing_ok=True)
    write_resolved(config, path)


def run_tokenizer(
    examples: Sequence[Example], *, vocab_size: int, max_length: int, folder: Path
) -> tuple[TextSpec, Tokenizer]:
    """Returns the tokenizer of a run's folder: trained once, then read, so that ids stay."""
    path, spec_path = folder / "tokenizer.json", folder / "text.json"
    if rank() == 0 and not spec_path.exists():
        captions = (caption for example in examples for caption in example.captions)
        body, text = train_tokenizer(captions, vocab_size=vocab_size, max_length=max_length)
        path.write_bytes(body)
        spec_path.write_text(text.model_dump_json() + "\n", encoding="utf-8")
    barrier()
    text = TextSpec.model_validate_json(spec_path.read_text(encoding="utf-8"))
    return text, Tokenizer(path.read_bytes(), text)


def keep_pretrained_text(
    decoder: dict[str, Any], examples: Sequence[Example], folder: Path
) -> None:
    """Writes the tokenizer and the architecture of a decoder's checkpoint to a run's folder.

    Args:
        decoder: the `[decoder]` table; nothing is written where it names no `weights`.
        examples: whose captions must be spelt with it.
        folder: of the run.

    Raises:
        ConfigError: the tokenizer will not do; DataError: it cannot spell a caption.
    """
    _, config = variants.parse("decoders", decoder)
    source, max_length = (getattr(config, key) for key in ("weights", "max_length"))
    if not source:
        return
    # As late as the decoders: `transformers` takes seconds to import.
    from trainer.decoders._pretrained import read_text

    captions = (caption for example in examples for caption in example.captions)
    body, text, architecture = read_text(source, captions, max_length=max_length)
    (folder / "tokenizer.json").write_bytes(body)
    (folder / _ARCHITECTURE).write_text(json.dumps(architecture) + "\n", encoding="utf-8")
    (folder / "text.json").write_text(text.model_dump_json() + "\n", encoding="utf-8")


def copy_text(start: Path, folder: Path) -> None:
    """Copies tokenizer and decoder architecture of the run `start` to another run's folder.

    Raises:
        CheckpointError: there is no such run.
    """
    Run(start)
    for name in ("tokenizer.json", _ARCHITECTURE, "text.json"):
        if (start / name).exists():
            (folder / name).write_bytes((start / name).read_bytes())


def kept_architecture(folder: Path) -> dict[str, Any] | None:
    """Returns the architecture of the checkpoint that a run's decoder began with, if it did."""
    path = folder / _ARCHITECTURE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Run:
    """A run's folder, read back.

    Args:
        folder: what `python -m trainer finetune` wrote.

    Raises:
        CheckpointError: a file of it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            resolved = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
            text = (folder / "text.json").read_text(encoding="utf-8")
            self.tokenizer_json = (folder / "tokenizer.json").read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{folder}: no training run ({error.filename} is missing); give the folder that "
                "`python -m trainer finetune` wrote"
            ) from error
        self.recipe = validate(Recipe, resolved, str(folder / "recipe.json"))
        self.text = TextSpec.model_validate_json(text)
        self.tokenizer = Tokenizer(self.tokenizer_json, self.text)

    def captioner(self) -> Captioner:
        """Returns the trained captioner, with the kept weights (the moving average, if any)."""
        architecture = kept_architecture(self.folder)
        captioner = build_captioner(
            self.recipe, self.text, pretrained=False, architecture=architecture
        )
        self.load_into(captioner)
        return captioner.eval()

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What each caption of this run begins with, and is to be asked for with."""
        return tuple(self.tokenizer.prefix_ids(self.recipe.objective.get("prompt", "")))

    def load_into(self, captioner: Captioner) -> None:
        """Gives the trained weights to a captioner of the same architecture."""
        load_kept_weights(captioner, self.folder / CHECKPOINT, "captioner.")


def write_run(
    folder: Path, recipe: Recipe, text: TextSpec, tokenizer_json: bytes, captioner: Captioner
) -> None:
    """Writes a captioner that was not trained here as a run of no steps, to be read as any other.

    Raises:
        CheckpointError: there is a run in the folder, or another process trains there.
    """
    if (folder / CHECKPOINT).exists():
        raise CheckpointError(f"{folder}: holds a run; choose another folder with --out")
    tensors = {f"objective.captioner.{k}": v.clone() for k, v in captioner.state_dict().items()}
    with claimed(recipe, folder, changeable=None):
        (folder / "tokenizer.json").write_bytes(tokenizer_json)
        (folder / "text.json").write_text(text.model_dump_json() + "\n", encoding="utf-8")
        save_checkpoint(folder / CHECKPOINT, tensors, {"step": 0, "total": 0})


def build_captioner(
    recipe: Recipe,
    text: TextSpec,
    *,
    pretrained: bool = True,
    architecture: dict[str, Any] | None = None,
) -> Captioner:
    """Returns the recipe's captioner.

    Args:
        recipe: its tables.
        text: vocabulary and special ids.
        pretrained: with its starting weights; not where others replace them.
        architecture: of the decoder, where the run has kept one.
    """
    encoder, decoder = dict(recipe.encoder), dict(recipe.decoder)
    if not pretrained:
        encoder["weights"] = decoder["weights"] = ""
    if architecture is not None:
        decoder["architecture"] = architecture
    return Captioner(
        encoder=encoder,
        bridge=recipe.bridge,
        decoder=decoder,
        image=recipe.image,
        text=text,
        matcher=recipe.matcher,
    )
