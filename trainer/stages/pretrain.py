"""`python -m trainer pretrain RECIPE`: an encoder from raw images, by a self-supervised method.

Beside what every run writes (see `trainer.run`) the folder gets `curves.png`, what the log holds as
curves, and `pictures.png` where the method has pictures to show.
"""

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from exports.text import TextSpec
from trainer import variants
from trainer.checkpoint import CHECKPOINT
from trainer.data import Example, describe
from trainer.dataset import CaptionIds, ViewDataset
from trainer.distributed import rank
from trainer.errors import ConfigError, DataError
from trainer.loop import TrainingLoop
from trainer.methods._method import Method, Preparation, Setting
from trainer.photos import load_all, usable_examples
from trainer.plots import plot_log
from trainer.probes import Probes, collapse_alarm
from trainer.run import PretrainRecipe as Config
from trainer.run import claimed, run_tokenizer
from trainer.runlog import read_log
from trainer.sides import Mirror
from trainer.stages._learnt import recorded
from trainer.transforms import Transform

# Keys of a recipe that may change while its run is under way: what is learnt is the same.
CHANGEABLE: Any = {
    "loop": {"workers", "save_every", "evaluate_every", "device"},
    "probe": True,
}
_LEARNING = 0.99  # the share of what knowing nothing costs below which something is learnt
_PICTURED = 8  # images of `pictures.png`
_LEGIBLE = 192  # pixels across, of each


def run(config: Config, out_dir: Path, *, probes: Probes | None = None) -> None:
    """Trains (or goes on training) the recipe's method in `out_dir`.

    Args:
        config: the recipe.
        out_dir: the run's folder.
        probes: what measures the encoder; by default as `[probe]` says.

    Raises:
        CheckpointError: another process trains there, or the run there is of another recipe.
        ConfigError: the data cannot make such batches, or the encoder does not suit the method.
        DivergenceError: a loss is not a number.
    """
    with claimed(config, out_dir, changeable=CHANGEABLE):
        _train(config, out_dir, probes)


def _train(config: Config, out_dir: Path, probes: Probes | None) -> None:
    module, method_config = variants.parse("methods", config.method)
    if module.Method.reads_captions:
        for augment in (config.augment, config.second_view or config.augment):
            augment.check_upright()
    examples = _read(config, reads_captions=module.Method.reads_captions)
    _check_batches(config, module.Method, len(examples))
    size = (config.image.height, config.image.width)
    first = Transform(config.augment, size)
    text, token_ids = None, None
    if module.Method.reads_captions:
        text, token_ids = _token_ids(config, examples, first.mirror, out_dir)
    torch.manual_seed(config.seed)
    encoder_module, encoder_config = variants.parse("encoders", config.encoder)
    encoder = encoder_module.Encoder(encoder_config, size)
    batches = len(examples) // config.loop.batch_size // config.loop.accumulate
    method = module.Method(
        method_config,
        encoder,
        Setting(len(examples), config.loop.batch_size, batches * config.loop.epochs, text, batches),
    )
    images = load_all(examples, config.stored_image)
    others = Transform(config.second_view or config.augment, size)
    transforms = [first, *[others] * (module.Method.views - 1)]
    dataset = ViewDataset(
        images,
        transforms,
        seed=config.seed,
        token_ids=token_ids,
        pad_id=text.pad_id if text else 0,
    )
    report = None
    if rank() == 0:
        probes = probes or Probes(config.probe, config.image, examples, seed=config.seed)
        report = Report(config, probes, images, method, out_dir)
    _prepare(config, method, ViewDataset(images, [first], seed=config.seed), out_dir)
    loop = TrainingLoop(
        method,
        dataset,
        config=config.loop,
        optim=config.optim,
        seed=config.seed,
        folder=out_dir,
        evaluate=report.measure if report else None,
        evaluate_first=True,
        after_evaluation=report.draw if report else None,
    )
    with recorded(loop, out_dir, examples, captions=module.Method.reads_captions):
        loop.run()


def _read(config: Config, *, reads_captions: bool) -> list[Example]:
    data = config.data
    examples = data.read()
    print(describe(data.train, examples))
    if reads_captions:
        examples = [example for example in examples if example.captions]
        if not examples:
            raise DataError(
                f"{data.train}: no image has a caption, and method {config.method['name']!r} "
                "learns from captions"
            )
    return usable_examples(examples)


def _check_batches(config: Config, method: type[Method], images: int) -> None:
    size, accumulate = config.loop.batch_size, config.loop.accumulate
    if images < 2:
        raise DataError(f"{config.data.train}: {images} image; learning needs at least 2")
    if size > images:
        raise ConfigError(f"loop.batch_size = {size}, but there are {images} images; take {images}")
    if size < 2:
        raise ConfigError(f"loop.batch_size = {size}; a batch needs at least 2 images")
    if accumulate > 1 and not method.divisible:
        raise ConfigError(
            f"loop.accumulate = {accumulate}, but {config.method['name']!r} compares the images of "
            "a batch with each other: for batches larger than memory set method.chunk"
        )


def _token_ids(
    config: Config, examples: list[Example], mirror: Mirror, out_dir: Path
) -> tuple[TextSpec, CaptionIds]:
    """Returns the captions' vocabulary, and every image's captions as ids."""
    text, tokenizer = run_tokenizer(
        examples,
        vocab_size=config.tokenizer.vocab_size,
        max_length=config.data.max_tokens,
        folder=out_dir,
    )
    return text, CaptionIds.of(examples, tokenizer, text, mirror)


def _prepare(config: Config, method: Method, dataset: ViewDataset, out_dir: Path) -> None:
    """Trains what the method needs first, in a folder of its own; from then on it is frozen."""
    preparation = method.preparation()
    if preparation is None:
        return
    if not (out_dir / CHECKPOINT).exists():  # else it stands in there
        _train_first(config, preparation, dataset, out_dir)
    preparation.objective.requires_grad_(False)


def _train_first(
    config: Config, preparation: Preparation, dataset: ViewDataset, out_dir: Path
) -> None:
    print(f"first the {preparation.name}, {preparation.epochs} epochs")
    folder = out_dir / preparation.name
    folder.mkdir(exist_ok=True)
    TrainingLoop(
        preparation.objective,
        dataset,
        config=config.loop.model_copy(update={"epochs": preparation.epochs, "ema": 0.0}),
        optim=config.optim.model_copy(update={"lr": preparation.lr, "scales": {}}),
        seed=config.seed,
        folder=folder,
    ).run()


class Report:
    """What is measured and shown of a method, at the start and after each epoch."""

    def __init__(
        self,
        config: Config,
        probes: Probes,
        images: NDArray[np.uint8],
        method: Method,
        out_dir: Path,
    ) -> None:
        self._config, self._method, self._folder = config, method, out_dir
        self._probes = probes
        # Of a run that goes on; one that begins measures them itself.
        self._first = next((row for row in read_log(out_dir) if row["step"] == 0), {})
        self._pictured = images[:: max(1, len(images) // _PICTURED)][:_PICTURED]
        self._resize = Transform(type(config.augment)(), (config.image.height, config.image.width))

    def measure(self, epoch: int) -> dict[str, float]:
        """Returns the probes after an epoch, or before the first one (-1); says if all is lost."""
        figures = self._probes.measure(self._method.encoder)
        if epoch < 0:
            self._first = figures
        else:
            for alarm in (collapse_alarm(figures, self._first), self._chance_alarm(epoch)):
                if alarm:
                    tqdm.write(f"WARNING, epoch {epoch + 1}: {alarm}")
        return figures

    def _chance_alarm(self, epoch: int) -> str | None:
        """Returns that nothing is learnt, if the loss of the epoch says so after the warm-up."""
        if epoch < 1 + self._config.optim.warmup * self._config.loop.epochs:
            return None
        shares = [row["of_chance"] for row in read_log(self._folder) if "of_chance" in row]
        share = mean(shares[-self._method.setting.epoch_steps :])
        if share < _LEARNING:
            return None
        return (
            f"the loss is {share:.3f} of what knowing nothing costs: nothing is learnt; try "
            f"{self._method.remedies}"
        )

    def draw(self) -> None:
        """Renews `curves.png` and `pictures.png`."""
        plot_log(self._folder)
        self._draw_pictures()

    def _draw_pictures(self) -> None:
        device = next(self._method.parameters()).device
        pixels = torch.from_numpy(self._pictured).permute(0, 3, 1, 2)
        views = torch.stack([self._resize(image, 0, flip="never") for image in pixels])
        pictures = self._method.pictures(views.to(device))
        if pictures is not None:
            rows = pictures.cpu().permute(0, 3, 1, 4, 2)  # (B, H, P, W, 3)
            height, width = rows.shape[0] * rows.shape[1], rows.shape[2] * rows.shape[3]
            sheet = rows.reshape(height, width, 3).numpy()
            # Small pictures larger, pixel by pixel, so that a person sees them.
            larger = max(1, _LEGIBLE // pictures.shape[-1])
            sheet = sheet.repeat(larger, axis=0).repeat(larger, axis=1)
            Image.fromarray(sheet).save(self._folder / "pictures.png")
