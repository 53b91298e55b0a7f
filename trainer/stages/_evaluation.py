"""What a run that trains a captioner measures as it goes."""

import random
from collections.abc import Sequence

import torch

from exports.text import Tokenizer
from trainer.data import Example
from trainer.dataset import CaptionDataset, EpochSampler, padded
from trainer.decoding import TorchSteps, best_hypotheses
from trainer.metrics import bleu, cider, distinct
from trainer.objectives._captioning import CaptioningObjective, cross_entropy
from trainer.photos import load_all
from trainer.retrieval import Pairs, Reader, measure
from trainer.run import Recipe
from trainer.stages._collapse import PROBE, CollapseWatch
from trainer.transforms import Augment, Transform


class Evaluation:
    """Measures after an epoch, on a fixed sample of `held_out`.

    CIDEr-D, BLEU and the share of distinct captions for objectives that teach to caption; for
    others their own figures. Where there is a matcher, how well it knows what belongs together.
    """

    def __init__(
        self,
        config: Recipe,
        objective: CaptioningObjective,
        tokenizer: Tokenizer,
        held_out: Sequence[Example],
    ) -> None:
        self._config, self._objective, self._tokenizer = config, objective, tokenizer
        count = min(config.data.dev_images, len(held_out))
        self._examples = random.Random(config.seed).sample(held_out, count)
        self._pixels = load_all(self._examples, config.image)
        self._captions = [example.captions for example in self._examples]
        self._watch = CollapseWatch(config.loop.epochs, self._cost_of_wrong_images)

    def __call__(self, epoch: int) -> dict[str, float]:
        """Returns the figures by name.

        Raises:
            CollapseError: captions are all alike (see `CollapseWatch`).
        """
        figures = self._of_captions(epoch) if self._objective.captions else self._of_objective()
        captioner = self._objective.captioner
        if captioner.matcher is not None:
            reader = Reader(captioner, self._tokenizer)
            for scores in measure(reader, Pairs(self._pixels, self._captions)):
                figures |= scores.corpus
        return {f"dev/{name}": value for name, value in figures.items()}

    def _of_captions(self, epoch: int) -> dict[str, float]:
        best = best_hypotheses(
            TorchSteps(self._objective.captioner),
            self._pixels,
            self._config.generation,
            prompt=self._objective.prompt_ids,
            progress=False,
        )
        captions = [self._tokenizer.decode(one.token_ids) for one in best]
        self._watch.check(epoch, captions)
        found: dict[str, float] = {}
        for metric in (cider, bleu, distinct):
            found |= metric.score(self._captions, captions).corpus
        return found

    @torch.no_grad()
    def _cost_of_wrong_images(self) -> float:
        """Returns by how much the loss rises when images of the probe are exchanged."""
        captioner = self._objective.captioner
        text, device = captioner.text, next(captioner.parameters()).device
        longest = text.max_length - 2
        token_ids, lengths = padded(
            [
                [text.bos_id, *self._tokenizer.encode(captions[0])[:longest], text.eos_id]
                for captions in self._captions[:PROBE]
            ],
            text.pad_id,
        )
        batch = {"token_ids": token_ids.to(device), "lengths": lengths.to(device)}
        shown = torch.from_numpy(self._pixels[:PROBE]).permute(0, 3, 1, 2).to(device)
        right, wrong = (
            cross_entropy(captioner, captioner.memory(images), batch, 0.0)[0].item()
            for images in (shown, shown.roll(1, 0))
        )
        return wrong - right

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
