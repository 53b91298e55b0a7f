"""Self-critical sequence training: a policy gradient on the CIDEr-D of sampled captions.

L = -1/n * sum_k A_k sum_t log p(w_t^k | w_<t^k, image) over k sampled captions an image, after
Rennie et al., 2017, https://arxiv.org/abs/1612.00563, with the leave-one-out baseline of Luo, 2020,
"A Better Variant of Self-Critical Sequence Training", https://arxiv.org/abs/2003.09971:
A_k = r_k - mean of the other rewards = K / (K - 1) * (r_k - mean of all).

1. The end of a caption counts as a word of it, in samples and references, or captions that break
   off ("a man in a") would lose nothing.
2. Document frequencies are those of the training references, fixed for the run.
3. Dropout is off: samples are drawn from the distribution whose gradient is taken.
4. `xe_weight` times the cross-entropy of the human captions is added, an anchor for small data.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.captioner import Captioner
from trainer.dataset import CaptionDataset
from trainer.decoding import sample
from trainer.errors import ConfigError
from trainer.metrics.cider import CiderD, DocumentFrequencies
from trainer.objectives._captioning import (
    IGNORE_INDEX,
    CaptioningConfig,
    CaptioningObjective,
    cross_entropy,
    labels_of,
)

_END = " eos"  # as a word; no tokeniser of captions makes it of punctuation


class Config(CaptioningConfig):
    """Keys of `[objective] name = "scst"`."""

    samples: int = 5
    """Captions drawn of each image, at least 2."""
    max_new_tokens: int = 20
    """Where samples are cut."""
    xe_weight: float = 0.1
    label_smoothing: float = 0.1
    """Of the anchor."""


class Objective(CaptioningObjective):
    """See the module.

    Args:
        config: the recipe's table.
        captioner: trained by cross-entropy before.
        dataset: its captions are the references.

    Raises:
        ConfigError: fewer than 2 samples, which have no baseline.
    """

    def __init__(self, config: Config, captioner: Captioner, dataset: CaptionDataset) -> None:
        super().__init__(config, captioner)
        if config.samples < 2:
            raise ConfigError(f"scst: samples = {config.samples}; a baseline takes at least 2")
        self._config = config
        self._decode = dataset.tokenizer.decode
        written, mirrored = (
            [[caption + _END for caption in own] for own in dataset.references(mirrored=side)]
            for side in (False, True)
        )
        self._images = len(written)
        frequencies = DocumentFrequencies.of(written)
        self._scorer = CiderD(written + mirrored, frequencies=frequencies)

    def train(self, mode: bool = True) -> "Objective":
        """Keeps evaluation mode: no dropout (see departure 3 of the module)."""
        super().train(False)
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, the mean reward and the mean length of the samples.

        Args:
            batch: as `CaptionDataset.collate` makes it.
        """
        count = self._config.samples
        memory = self.captioner.memory(batch["images"])
        token_ids, lengths = sample(
            self.captioner, memory, count, max_new_tokens=self._config.max_new_tokens
        )
        references = batch["indices"] + self._images * batch["mirrored"]
        rewards = self._rewards(token_ids, lengths, references.tolist())
        advantage = leave_one_out(rewards).flatten().to(token_ids.device)
        logits = self.captioner.decoder(token_ids[:, :-1], memory)
        policy = policy_loss(logits.float(), labels_of(token_ids, lengths), advantage)
        anchor, _ = cross_entropy(self.captioner, memory, batch, self._config.label_smoothing)
        return {
            "loss": policy + self._config.xe_weight * anchor,
            "reward": rewards.mean(),
            "cross_entropy": anchor.detach(),
            "sample_length": lengths.float().mean(),
        }

    def _rewards(self, token_ids: Tensor, lengths: Tensor, images: list[int]) -> Tensor:
        """Returns CIDEr-D (B, K) of samples token_ids (B * K, T)."""
        values = []
        for row, (ids, length) in enumerate(zip(token_ids.tolist(), lengths.tolist(), strict=True)):
            ended = ids[length - 1] == self.captioner.text.eos_id
            text = self._decode(ids[:length]) + (_END if ended else "")
            values.append(self._scorer.score(images[row // self._config.samples], text))
        return torch.tensor(values).view(len(images), -1)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Returns each reward minus the mean of the others of its image, (B, K) both."""
    samples = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * samples / (samples - 1)


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
