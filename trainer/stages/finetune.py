"""`python -m trainer finetune RECIPE`: a captioner from images and their captions."""

from pathlib import Path
from typing import Any

import torch

from exports.text import TextSpec, Tokenizer
from trainer import variants
from trainer.checkpoint import CHECKPOINT
from trainer.data import Example, check_apart
from trainer.dataset import CaptionDataset
from trainer.errors import ConfigError
from trainer.loop import TrainingLoop, device_of
from trainer.lora import adapt
from trainer.objectives._captioning import CaptioningConfig
from trainer.photos import load_all, read_captioned
from trainer.run import Recipe as Config
from trainer.run import (
    Run,
    build_captioner,
    claimed,
    copy_text,
    keep_pretrained_text,
    kept_architecture,
    run_tokenizer,
)
from trainer.splits import split_examples
from trainer.stages._evaluation import Evaluation
from trainer.stages._folds import Measure, chosen_epochs
from trainer.stages._learnt import recorded
from trainer.transforms import Transform


def _changeable(config: Config) -> Any:
    """Returns the keys that may change while a run is under way: what is learnt is the same."""
    loop = {"workers", "save_every", "device"}
    found: dict[str, Any] = {"loop": loop, "data": {"dev", "dev_split", "dev_images"}}
    if config.folds is None:  # else they decide how long is trained
        loop.add("evaluate_every")
        found["generation"] = True
    return found


def run(config: Config, out_dir: Path) -> None:
    """Trains (or goes on training) the recipe's captioner in `out_dir`.

    Raises:
        CheckpointError: another process trains there, or the run there is of another recipe.
    """

    def train_fold(
        folder: Path, training: list[Example], measure: Measure, until: int | None
    ) -> None:
        with claimed(config, folder, changeable=_changeable(config)):
            _train(config, folder, training, measure, until)

    with claimed(config, out_dir, changeable=_changeable(config)):
        examples, held_out = _read(config)
        until = None
        if config.folds is not None:
            until = chosen_epochs(config, examples, out_dir, train_fold)
        _train(config, out_dir, examples, _evaluation(config, held_out, out_dir), until)


def _evaluation(config: Config, held_out: list[Example], out_dir: Path) -> Measure:
    """Returns what measures a run on held-out images; nothing does where there are none."""
    if not held_out:
        return lambda objective, dataset: None
    return lambda objective, dataset: Evaluation(
        config, objective, dataset.tokenizer, held_out, out_dir
    )


def _train(
    config: Config, out_dir: Path, examples: list[Example], measure: Measure, until: int | None
) -> None:
    text, tokenizer = _tokenizer(config, examples, out_dir)
    torch.manual_seed(config.seed)
    begins = config.start is None and not (out_dir / CHECKPOINT).exists()
    captioner = build_captioner(
        config, text, pretrained=begins, architecture=kept_architecture(out_dir)
    )
    if config.start is not None:
        Run(config.start).load_into(captioner)
    module, objective_config = variants.parse("objectives", config.objective)
    assert isinstance(objective_config, CaptioningConfig)
    size = (config.image.height, config.image.width)
    dataset = CaptionDataset(
        examples,
        load_all(examples, config.image),
        tokenizer,
        text,
        captions=config.data.captions_per_image,
        transform=Transform(config.augment, size),
        seed=config.seed,
    )
    if config.lora is not None:
        adapt(captioner, config.lora)
    captioner.to(device_of(config.loop))
    objective = module.Objective(objective_config.kept(out_dir), captioner, dataset)
    if config.loop.accumulate > 1 and not objective.divisible:
        raise ConfigError(
            f"loop.accumulate = {config.loop.accumulate}, but {config.objective['name']!r} "
            "compares the images of a batch with each other: leave it out, and take as large a "
            "loop.batch_size as memory holds"
        )
    data = objective.data(dataset)
    if config.data.encoded_views:
        if any(parameter.requires_grad for parameter in captioner.encoder.parameters()):
            raise ConfigError(
                f"data.encoded_views = {config.data.encoded_views}, but the encoder is trained, "
                'and would soon see otherwise: set objective.frozen = ["encoder"], or leave it out'
            )
        # In this layout convolutions on a CPU take two thirds of the time.
        captioner.encoder.to(memory_format=torch.channels_last)
        dataset.encode(captioner.encoder.eval(), config.data.encoded_views)
    evaluation = measure(objective, dataset)
    hacking = evaluation.hacking if isinstance(evaluation, Evaluation) else None
    loop = TrainingLoop(
        objective,
        data,
        config=config.loop,
        optim=config.optim,
        seed=config.seed,
        folder=out_dir,
        evaluate=evaluation,
        evaluate_first=hacking is not None,
        after_saving=None if hacking is None else hacking.keep,
        until=until,
    )
    with recorded(loop, out_dir, examples, captions=True):
        loop.run()


def _read(config: Config) -> tuple[list[Example], list[Example]]:
    """Returns the examples to train on, and those that are captioned after an epoch, if any."""
    data = config.data
    examples = read_captioned(data.train, data.images, data.train_split, data.only)
    if data.dev is None:
        if not data.dev_fraction:
            return examples, []
        return split_examples(examples, data.dev_fraction, config.seed)
    if data.dev_fraction:
        raise ConfigError("data.dev names the held-out images already: leave dev_fraction out")
    held_out = read_captioned(data.dev, data.images, data.dev_split)
    check_apart(examples, held_out, "data.train", "data.dev")
    return examples, held_out


def _tokenizer(
    config: Config, examples: list[Example], out_dir: Path
) -> tuple[TextSpec, Tokenizer]:
    if not (out_dir / "text.json").exists():
        if config.start is None:
            keep_pretrained_text(config.decoder, examples, out_dir)
        else:
            copy_text(config.start, out_dir)
    _, decoder = variants.parse("decoders", config.decoder)
    return run_tokenizer(
        examples,
        vocab_size=config.tokenizer.vocab_size,
        max_length=getattr(decoder, "max_length"),  # noqa: B009  every decoder's Config has it
        folder=out_dir,
    )
