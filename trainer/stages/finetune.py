"""`python -m trainer finetune RECIPE`: a captioner from images and their captions."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from exports.text import TextSpec, Tokenizer
from trainer import variants
from trainer.data import Example, check_apart
from trainer.dataset import CaptionDataset, EpochSampler
from trainer.decoding import TorchSteps, best_hypotheses
from trainer.errors import ConfigError
from trainer.loop import TrainingLoop
from trainer.metrics import bleu, cider, distinct
from trainer.objectives._captioning import CaptioningObjective
from trainer.photos import load_all, read_captioned
from trainer.retrieval import Pairs, Reader, measure
from trainer.run import Recipe as Config
from trainer.run import Run, build_captioner, claimed, run_tokenizer
from trainer.splits import split_examples
from trainer.transforms import Augment, Transform

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
    captioner = build_captioner(config, text, pretrained=config.start is None)
    if config.start is not None:
        Run(config.start).load_into(captioner)
    module, objective_config = variants.parse("objectives", config.objective)
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
    objective = module.Objective(objective_config, captioner, dataset)
    if config.loop.accumulate > 1 and not objective.divisible:
        raise ConfigError(
            f"loop.accumulate = {config.loop.accumulate}, but {config.objective['name']!r} "
            "compares the images of a batch with each other: leave it out, and take as large a "
            "loop.batch_size as memory holds"
        )
    TrainingLoop(
        objective,
        dataset,
        config=config.loop,
        optim=config.optim,
        seed=config.seed,
        folder=out_dir,
        evaluate=_Evaluation(config, objective, tokenizer, held_out) if held_out else None,
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
    if config.start is not None and not (out_dir / "text.json").exists():
        start = Run(config.start)
        (out_dir / "tokenizer.json").write_bytes(start.tokenizer_json)
        (out_dir / "text.json").write_text(start.text.model_dump_json() + "\n", encoding="utf-8")
    _, decoder = variants.parse("decoders", config.decoder)
    return run_tokenizer(
        examples,
        vocab_size=config.tokenizer.vocab_size,
        max_length=getattr(decoder, "max_length"),  # noqa: B009  every decoder's Config has it
        folder=out_dir,
    )


class _Evaluation:
    """What the loop measures after an epoch, on a fixed sample of `held_out`.

    CIDEr-D, BLEU and the share of distinct captions for objectives that teach to caption; for
    others their own figures. Where there is a matcher, how well it knows what belongs together.
    """

    def __init__(
        self,
        config: Config,
        objective: CaptioningObjective,
        tokenizer: Tokenizer,
        held_out: Sequence[Example],
    ) -> None:
        self._config, self._objective, self._tokenizer = config, objective, tokenizer
        count = min(config.data.dev_images, len(held_out))
        self._examples = random.Random(config.seed).sample(held_out, count)
        self._pixels = load_all(self._examples, config.image)
        self._captions = [example.captions for example in self._examples]

    def __call__(self, epoch: int) -> dict[str, float]:
        """Returns the figures by name."""
        del epoch
        figures = self._of_captions() if self._objective.captions else self._of_objective()
        captioner = self._objective.captioner
        if captioner.matcher is not None:
            reader = Reader(captioner, self._tokenizer)
            for scores in measure(reader, Pairs(self._pixels, self._captions)):
                figures |= scores.corpus
        return {f"dev/{name}": value for name, value in figures.items()}

    def _of_captions(self) -> dict[str, float]:
        prompt = self._objective.prompt_ids
        best = best_hypotheses(
            TorchSteps(self._objective.captioner),
            self._pixels,
            self._config.generation,
            prefix=prompt,
            progress=False,
        )
        captions = [self._tokenizer.decode(one.token_ids[len(prompt) :]) for one in best]
        found: dict[str, float] = {}
        for metric in (cider, bleu, distinct):
            found |= metric.score(self._captions, captions).corpus
        return found

    @torch.no_grad()
    def _of_objective(self) -> dict[str, float]:
        """Returns the mean of what the objective says of held-out batches."""
        config, captioner = self._config, self._objective.captioner
        dataset = CaptionDataset(
            self._examples,
            self._pixels,
            self._tokenizer,
            captioner.text,
            captions=config.data.captions_per_image,
            transform=Transform(Augment(), (config.image.height, config.image.width)),
            seed=config.seed,
        )
        device = next(captioner.parameters()).device
        rows: list[dict[str, float]] = []
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            for keys in EpochSampler(
                len(dataset), config.loop.batch_size, seed=config.seed, epoch=0
            ):
                batch = dataset.collate([dataset[key] for key in keys])
                losses = self._objective({k: value.to(device) for k, value in batch.items()})
                rows.append({name: value.item() for name, value in losses.items()})
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
