"""`python -m trainer finetune RECIPE`: a captioner from images and their captions."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from exports.text import TextSpec, Tokenizer
from trainer import variants
from trainer.captioner import Captioner
from trainer.config import write_resolved
from trainer.data import Example, describe, read_examples
from trainer.dataset import CaptionDataset
from trainer.decoding import TorchSteps, best_hypotheses
from trainer.errors import CheckpointError, DataError
from trainer.loop import TrainingLoop
from trainer.metrics import bleu, cider, distinct
from trainer.photos import load_all, usable_examples
from trainer.run import Recipe as Config
from trainer.run import Run, build_captioner
from trainer.tokenizer import train_tokenizer
from trainer.transforms import Transform


def run(config: Config, out_dir: Path) -> None:
    """Trains (or goes on training) the recipe's captioner in `out_dir`.

    Raises:
        CheckpointError: another process trains there, or the run there is of another recipe.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out_dir / ".lock", timeout=0):
            _train(config, out_dir)
    except Timeout as error:
        raise CheckpointError(f"{out_dir}: another process is training there") from error


def _train(config: Config, out_dir: Path) -> None:
    examples = read_captioned(config.data.train, config.data.images, config.data.train_split)
    text, tokenizer = _tokenizer(config, examples, out_dir)
    write_resolved(config, out_dir / "recipe.json")
    torch.manual_seed(config.seed)
    captioner = build_captioner(config, text, pretrained=config.start is None)
    if config.start is not None:
        captioner.load_state_dict(Run(config.start).weights())
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
    TrainingLoop(
        module.Objective(objective_config, captioner, dataset),
        dataset,
        config=config.loop,
        optim=config.optim,
        seed=config.seed,
        folder=out_dir,
        evaluate=_evaluation(config, captioner, tokenizer),
    ).run()


def read_captioned(source: Path, images: Path | None, split: str | None) -> list[Example]:
    """Returns the examples that have captions and whose images decode, and says what was read."""
    examples = read_examples(source, images=images, split=split)
    print(describe(source, examples))
    captioned = [example for example in examples if example.captions]
    if not captioned:
        raise DataError(f"{source}: none of its {len(examples)} images has a caption")
    return usable_examples(captioned)


def _tokenizer(
    config: Config, examples: list[Example], out_dir: Path
) -> tuple[TextSpec, Tokenizer]:
    """Returns the run's tokenizer: trained once, then read back, so that ids never change."""
    path, spec_path = out_dir / "tokenizer.json", out_dir / "text.json"
    if config.start is not None:
        start = Run(config.start)
        path.write_bytes(start.tokenizer_json)
        spec_path.write_text(start.text.model_dump_json() + "\n", encoding="utf-8")
    if not spec_path.exists():
        _, decoder = variants.parse("decoders", config.decoder)
        body, text = train_tokenizer(
            (caption for example in examples for caption in example.captions),
            vocab_size=config.tokenizer.vocab_size,
            max_length=getattr(decoder, "max_length"),  # noqa: B009  every decoder's Config has it
        )
        path.write_bytes(body)
        spec_path.write_text(text.model_dump_json() + "\n", encoding="utf-8")
    text = TextSpec.model_validate_json(spec_path.read_text(encoding="utf-8"))
    return text, Tokenizer(path.read_bytes(), text)


def _evaluation(
    config: Config, captioner: Captioner, tokenizer: Tokenizer
) -> Callable[[int], dict[str, float]] | None:
    """Returns what the loop calls after an epoch: CIDEr-D of a fixed sample of dev."""
    if config.data.dev is None:
        return None
    examples = read_captioned(config.data.dev, config.data.images, config.data.dev_split)
    random.Random(config.seed).shuffle(examples)
    examples = examples[: config.data.dev_images]
    pixels = load_all(examples, config.image)
    references = [example.captions for example in examples]

    def evaluate(epoch: int) -> dict[str, float]:
        del epoch
        steps = TorchSteps(captioner)
        best = best_hypotheses(steps, pixels, config.generation, progress=False)
        captions = [tokenizer.decode(hypothesis.token_ids) for hypothesis in best]
        figures = [m.score(references, captions).corpus for m in (cider, bleu, distinct)]
        return {f"dev/{name}": value for part in figures for name, value in part.items()}

    return evaluate
