"""Examples before the text: images with captions that resemble the one to be captioned.

Alayrac et al., 2022, "Flamingo: a Visual Language Model for Few-Shot Learning",
https://arxiv.org/abs/2204.14198: a prompt is k examples and then the query. Text attends to all
text before it, but only to the image that it belongs to (section 2.3, "per-image attention
masking"); the examples are the labelled images nearest to the query, the nearest last (RICES:
appendix A.2, after Yang et al., 2021, https://arxiv.org/abs/2109.05014).

1. Every example takes T positions, the rest of them hidden, so that a token stands at the same
   place in training and serving, whatever the lengths of the captions before it.
2. Features are compared from the mean of the labelled images on: encoders put all images into a
   narrow cone, in which cosines differ by less than the rounding of what is stored.
3. A caption's own `<bos>` and `<eos>` part the examples; there are no tokens for that alone.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.attention import Memory
from trainer.dataset import blocks


class ShotIndex(nn.Module):
    """Labelled images to take examples from; all in buffers, so that a graph has them as constants.

    Args:
        pooled: (n, D), the encoder's pooled features.
        latents: (n, K, D'), the bridge's tokens.
        captions: of each image one, as ids `<bos>` ... `<eos>`.
        shots: k, examples in a prompt, at most n.
        shot_tokens: T, of each; longer captions are cut.
        pad_id: what fills them up.
    """

    mean: Tensor
    features: Tensor
    latents: Tensor
    token_ids: Tensor
    lengths: Tensor

    def __init__(
        self,
        pooled: Tensor,
        latents: Tensor,
        captions: list[list[int]],
        *,
        shots: int,
        shot_tokens: int,
        pad_id: int,
    ) -> None:
        super().__init__()
        self.shots = shots
        token_ids, lengths = blocks(captions, pad_id, shot_tokens)
        # Rounded as it will be stored: the features are then exact differences from it.
        self.register_buffer("mean", pooled.float().mean(0).half().float())
        self.register_buffer("features", F.normalize(pooled.float() - self.mean, dim=1))
        self.register_buffer("latents", latents)
        self.register_buffer("token_ids", token_ids.to(pooled.device))
        self.register_buffer("lengths", lengths.to(pooled.device))

    @property
    def positions(self) -> int:
        """P = k * T, of a prompt."""
        return self.shots * self.token_ids.shape[1]

    def nearest(self, pooled: Tensor) -> Tensor:
        """Returns which images stand before those with pooled features (B, D): (B, k)."""
        cosines = F.normalize(pooled.float() - self.mean, dim=1) @ self.features.T
        return cosines.topk(self.shots, dim=1).indices.flip(1)

    def prompted(self, memory: Memory, pooled: Tensor, decoder: Any) -> Memory:
        """Returns the memory of images with their prompts before the text.

        Args:
            memory: of the B images.
            pooled: (B, D), their features.
            decoder: reads the prompts; its text then stands at positions P and on.
        """
        chosen = self.nearest(pooled)
        text_visible = hide_padding(self.lengths[chosen], self.token_ids.shape[1])
        image_visible = own_image(self.positions, self.token_ids.shape[1], self.latents.shape[1])
        prefix = decoder.prompt_pairs(
            self.token_ids[chosen].flatten(1),
            decoder.memory(self.latents[chosen].flatten(1, 2)),
            image_visible.to(pooled.device).expand(len(chosen), -1, -1),
            text_visible,
        )
        return Memory(memory.image, prefix, text_visible)


def own_image(positions: int, shot_tokens: int, latents: int, images: int | None = None) -> Tensor:
    """Returns whether each position sees each image token: those of its own image, no other's.

    Args:
        positions: P, of all examples, and of the query behind them where it is there.
        shot_tokens: T.
        latents: K, of one image.
        images: whose tokens there are; by default those of examples that fill all positions.

    Returns:
        (1, P, images * K); what stands behind the examples belongs to the last image.
    """
    count = positions // shot_tokens if images is None else images
    image = (torch.arange(positions) // shot_tokens).clamp(max=count - 1)
    return (image[:, None] == torch.arange(count).repeat_interleave(latents))[None]


def hide_padding(lengths: Tensor, shot_tokens: int, behind: int = 0) -> Tensor:
    """Returns (R, 1, 1, P): 0 for the tokens of examples, -inf for what fills them up.

    Args:
        lengths: (R, k), of the examples' captions.
        shot_tokens: T.
        behind: positions of a query behind them, all of which count.
    """
    padding = torch.arange(shot_tokens, device=lengths.device) >= lengths.unsqueeze(2)
    bias = torch.zeros(padding.shape, device=lengths.device).masked_fill(padding, float("-inf"))
    return F.pad(bias.flatten(1), (0, behind))[:, None, None]
