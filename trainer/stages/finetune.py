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
from trainer.transforms import Transform

# Keys of a recipe that may change while its run is under way: what is learnt is the same.
_CHANGEABLE: Any = {
    "loop": {"workers", "save_every", "evaluate_every", "device"},
    "data": {"dev", "dev_split", "dev_images"},
    "generation": True,
}


def run(config: Config, out_dir: Path) -> None:
    """Trains (or goes on training) the recipe's captioner in `out_dir`.

    Raises:
        CheckpointError: another process trains there, or the run there is of another recipe.
    """
    with claimed(config, out_dir, changeable=_CHANGEABLE):
        _train(config, out_dir)


def _train(config: Config, out_dir: Path) -> None:
    examples, held_out = _read(config)
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
    captioner.to(device_of(config.loop))
    objective = module.Objective(objective_config.kept(out_dir), captioner, dataset)
    if config.loop.accumulate > 1 and not objective.divisible:
        raise ConfigError(
            f"loop.accumulate = {config.loop.accumulate}, but {config.objective['name']!r} "
            "compares the images of a batch with each other: leave it out, and take as large a "
            "loop.batch_size as memory holds"
        )
    evaluation = Evaluation(config, objective, tokenizer, held_out, out_dir) if held_out else None
    hacking = None if evaluation is None else evaluation.hacking
    TrainingLoop(
        objective,
        objective.data(dataset),
        config=config.loop,
        optim=config.optim,
        seed=config.seed,
        folder=out_dir,
        evaluate=evaluation,
        evaluate_first=hacking is not None,
        after_saving=None if hacking is None else hacking.keep,
    ).run()


def _read(config: Config) -> tuple[list[Example], list[Example]]:
    """Returns the examples to train on, and those that are captioned after an epoch, if any."""
    data = config.data
    examples = read_captioned(data.train, data.images, data.train_split)
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
