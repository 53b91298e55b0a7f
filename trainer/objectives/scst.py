"""Self-critical sequence training: a policy gradient on what sampled captions are worth.

L = -1/n * sum_k A_k sum_t log p(w_t^k | w_<t^k, image) over k sampled captions an image and n
tokens, after Rennie et al., 2017, https://arxiv.org/abs/1612.00563. The advantage A_k is the reward
r_k less a baseline:

- `leave_one_out`, the mean of the image's other rewards: A_k = K / (K - 1) * (r_k - mean of all).
  Luo, 2020, "A Better Variant of Self-Critical Sequence Training", https://arxiv.org/abs/2003.09971.
- `greedy`, the reward of the caption of the likeliest tokens, as Rennie et al. have it: what the
  model would say when asked. It costs one more decode.

r is a weighted sum of the parts in `trainer/rewards`. Departures:

1. The end of a caption counts as a word of it, in samples and references, or captions that break
   off ("a man in a") would lose nothing.
2. Document frequencies are fixed for the run: those of the training references, or of a larger
   corpus (`frequencies`), kept in the run's folder.
3. Dropout is off: samples are drawn from the distribution whose gradient is taken.
4. `xe_weight` times the cross-entropy of the human captions is added, an anchor for small data.
5. A run with held-out images ends when its captions of them repeat themselves, break off or change
   in length more than `budget` allows.
"""

import math
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from trainer import variants
from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.decoding import greedy, sample
from trainer.errors import ConfigError
from trainer.metrics.cider import DocumentFrequencies
from trainer.objectives._captioning import (
    IGNORE_INDEX,
    Budget,
    CaptioningConfig,
    CaptioningObjective,
    cross_entropy,
    labels_of,
)
from trainer.rewards._frequencies import keep_frequencies, read_frequencies
from trainer.rewards._reward import Reward, Sampled, Sources, marked


class Config(CaptioningConfig):
    """Keys of `[objective] name = "scst"`."""

    rewards: dict[str, float] = Field(default={"cider_d": 1.0}, min_length=1)
    """Weights of the parts, by their names in `trainer/rewards`."""
    baseline: Literal["leave_one_out", "greedy"] = "leave_one_out"
    samples: int = Field(default=5, ge=1)
    """Captions drawn of each image; leaving one out takes at least 2."""
    max_new_tokens: int = 20
    """Where samples are cut."""
    xe_weight: float = 0.1
    label_smoothing: float = 0.1
    """Of the anchor."""
    frequencies: Path | None = None
    """A captions file, of whatever images, whose document frequencies rewards weigh words by; by
    default those of the training captions. Of a hundred captions that is too little to tell a
    telling word from a rare one, so name a larger corpus then. Counted once, at the start of a run.
    """
    matcher: Path | None = None
    """A run with a [matcher], for the rewards `match` and `similarity`."""
    edits: Path | None = None
    """A label file, for the reward `edits`."""
    budget: Budget = Budget()
    """How much worse captions may grow before the run is ended."""

    def kept(self, folder: Path) -> Self:
        """See `CaptioningConfig.kept`: the corpus is needed no more once it is counted."""
        if self.frequencies is None:
            return self
        return self.model_copy(update={"frequencies": keep_frequencies(self.frequencies, folder)})


class Objective(CaptioningObjective):
    """See the module.

    Args:
        config: the recipe's table.
        captioner: trained by cross-entropy before.
        dataset: its captions are the references.

    Raises:
        ConfigError: no such reward or weight, one that lacks its source, or a single sample without
            a baseline.
    """

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        if config.samples < 2 and config.baseline == "leave_one_out":
            raise ConfigError(
                f"scst: samples = {config.samples}; leaving one out takes at least 2, the baseline "
                '"greedy" one'
            )
        self.budget = config.budget
        self._config = config
        self._decode = dataset.tokenizer.decode
        self._images = len(dataset)
        self._rewards = _rewards(config, captioner, dataset)

    def train(self, mode: bool = True) -> "Objective":
        """Keeps evaluation mode: no dropout (see departure 3 of the module)."""
        super().train(False)
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, the mean reward, each part of it, and the mean length of the samples.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        config = self._config
        memory = self.captioner.memory(batch["images"])
        token_ids, lengths = sample(
            self.captioner, memory, config.samples, max_new_tokens=config.max_new_tokens
        )
        rewards, parts = self._worth(token_ids, lengths, batch)
        said = {"reward": rewards.mean(), **parts}
        if config.baseline == "greedy":
            best = greedy(self.captioner, memory, max_new_tokens=config.max_new_tokens)
            baseline, _ = self._worth(*best, batch)
            advantage = rewards - baseline
            said["greedy_reward"] = baseline.mean()
        else:
            advantage = leave_one_out(rewards)
        logits = self.captioner.decoder(token_ids[:, :-1], memory)
        advantage = advantage.flatten().to(token_ids.device)
        policy = policy_loss(logits.float(), labels_of(token_ids, lengths), advantage)
        anchor, _ = cross_entropy(self.captioner, memory, batch, config.label_smoothing)
        return {
            "loss": policy + config.xe_weight * anchor,
            **said,
            "cross_entropy": anchor.detach(),
            "sample_length": lengths.float().mean(),
        }

    def _worth(
        self, token_ids: Tensor, lengths: Tensor, batch: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns rewards (B, C) of captions token_ids (B * C, T), and the mean of each part."""
        indices = (batch["indices"] + self._images * batch["mirrored"]).tolist()
        captions = len(token_ids) // len(indices)
        texts, ended = [], []
        for ids, length in zip(token_ids.tolist(), lengths.tolist(), strict=True):
            texts.append(self._decode(ids[:length]))
            ended.append(ids[length - 1] == self.captioner.text.eos_id)
        references = [index for index in indices for _ in range(captions)]
        sampled = Sampled(texts, ended, references, batch["images"])
        total = torch.zeros(len(indices), captions)
        parts = {}
        for name, (weight, reward) in self._rewards.items():
            worth = torch.from_numpy(reward.scores(sampled)).float().view(len(indices), -1)
            total += weight * worth
            parts[f"reward/{name}"] = worth.mean()
        return total, parts


def _rewards(
    config: Config, captioner: Captioner, dataset: CaptionDataset
) -> dict[str, tuple[float, Reward]]:
    """Returns the parts of the reward with their weights."""
    bad = [name for name, weight in config.rewards.items() if not math.isfinite(weight)]
    if bad or not any(config.rewards.values()):
        raise ConfigError(
            f"objective.rewards = {config.rewards}: weights are finite, and not all are 0"
        )
    frequencies = (
        DocumentFrequencies.of([marked(example.captions) for example in dataset.examples])
        if config.frequencies is None
        else read_frequencies(config.frequencies, dataset.examples)
    )
    sources = Sources(
        dataset.examples,
        [*dataset.references(mirrored=False), *dataset.references(mirrored=True)],
        frequencies,
        config.matcher,
        config.edits,
        next(captioner.parameters()).device,
    )
    return {
        name: (weight, variants.load("rewards", name).Reward(sources))
        for name, weight in config.rewards.items()
    }


def leave_one_out(rewards: Tensor) -> Tensor:
    """Returns each reward minus the mean of the others of its image, (B, K) both."""
    samples = rewards.shape[1]
    apart = rewards - rewards[:, :1]  # equal rewards are 0 apart; their mean is rounded
    return (apart - apart.mean(1, keepdim=True)) * samples / (samples - 1)


def policy_loss(logits: Tensor, labels: Tensor, advantage: Tensor) -> Tensor:
    """Returns minus the advantage-weighted mean log-probability of the sampled tokens.

    Args:
        logits: (R, T, V).
        labels: (R, T), IGNORE_INDEX where there is no token; the end token counts.
        advantage: (R,), the same for every token of a sample.
    """
    sampled = labels != IGNORE_INDEX
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(advantage.unsqueeze(1) * log_probs * sampled).sum() / sampled.sum()
