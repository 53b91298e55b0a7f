"""VQ-KD: each patch's nearest code, from which a decoder rebuilds what a teacher says of it.

Peng et al., 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers",
https://arxiv.org/abs/2208.06366, equations 1 to 3. With h an encoder's features, v the codebook, t
a frozen teacher's features and every vector of unit length:

    z_i = argmin_j |h_i - v_j|,  loss = 1 - cos(decoder(v_z), t) + beta |h - sg(v_z)|^2,

the gradient of v_z passed straight through to h. The codes follow their features' means, an
exponential moving average, and are no parameters.

Departures:

1. The encoder and decoder are convolutions on the grid; the paper has a ViT-B and a transformer.
2. A code that hardly anything is assigned to starts anew at a random feature of the batch. All do
   so at the first step, in place of the paper's k-means.
3. The teacher may have any map: it is resampled to the grid.
"""

from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import variants
from trainer.visual_tokenizers._tokenizer import (
    TokenizerConfig,
    VisualTokenizer,
    map_decoder,
    patch_encoder,
    perplexity,
    scaled,
)


class Config(TokenizerConfig):
    """Keys of `[method.tokenizer] name = "vq_kd"`."""

    teacher: dict[str, Any]
    """An `[encoder]` table: whose features the ids describe. It should have learnt something."""
    code_width: int = Field(default=32, ge=3)
    """Of the codes; a narrow space keeps more of them in use."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the codes' moving average."""
    commitment: float = Field(default=1.0, ge=0)
    """beta."""
    revive_below: float = Field(default=0.1, ge=0)
    """A code starts anew when its average count falls below this share of an even share."""


class Tokenizer(VisualTokenizer):
    """See the module.

    Args:
        config: the recipe's table.
        image_size: (H, W) in pixels.
        grid: patches down and across.
        steps: nothing here depends on them.
    """

    codebook: Tensor
    counts: Tensor

    def __init__(
        self, config: Config, image_size: tuple[int, int], grid: tuple[int, int], steps: int
    ) -> None:
        del steps
        super().__init__(config, image_size, grid)
        self._config = config
        module, teacher_config = variants.parse("encoders", config.teacher)
        self.teacher: Any = module.Encoder(teacher_config, image_size).requires_grad_(False)
        width, blocks, code_width = config.width, config.blocks, config.code_width
        self.encoder = patch_encoder(self.patch, width, blocks, code_width)
        features = nn.Conv2d(width, self.teacher.width, 1)
        self.decoder = map_decoder(code_width, width, blocks, features)
        codebook = F.normalize(torch.randn(config.vocab_size, code_width), dim=1)
        self.register_buffer("codebook", codebook)
        self.register_buffer("counts", torch.zeros(config.vocab_size))
        self._assigned: list[tuple[Tensor, Tensor]] = []

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all but the teacher, which stays as it is used."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, its parts, and how many codes the batch makes use of."""
        features = self._features(batch["images"])
        token_ids = self._nearest(features.detach())
        codes = self.codebook[token_ids]
        if self.training:
            self._assigned.append((features.detach(), token_ids))
        passed = features + (codes - features).detach()
        rebuilt = self.decoder(passed.transpose(1, 2).unflatten(2, self.grid)).float()
        cosine = F.cosine_similarity(rebuilt, self._taught(batch["images"]), dim=1).mean()
        commitment = (features - codes).square().sum(2).mean()
        return {
            "loss": 1 - cosine + self._config.commitment * commitment,
            "cosine": cosine.detach(),
            "commitment": commitment.detach(),
            "perplexity": perplexity(token_ids, self.vocab_size),
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Moves the codes towards the features assigned to them, and revives the idle ones."""
        del step
        features = torch.cat([rows.flatten(0, 1) for rows, _ in self._assigned])
        token_ids = torch.cat([ids.flatten() for _, ids in self._assigned])
        self._assigned.clear()
        decay, vocab_size = self._config.decay, self.vocab_size
        fewest = self._config.revive_below * len(token_ids) / vocab_size
        idle = self.counts < fewest
        counts = torch.bincount(token_ids, minlength=vocab_size).to(features.dtype)
        sums = torch.zeros_like(self.codebook).index_add_(0, token_ids, features)
        means = F.normalize(sums, dim=1)
        moved = F.normalize(self.codebook.lerp(means, 1 - decay), dim=1)
        moved = torch.where(counts[:, None] > 0, moved, self.codebook)
        drawn = torch.randint(len(features), (vocab_size,), device=features.device)
        self.codebook.copy_(torch.where(idle[:, None], features[drawn], moved))
        self.counts.copy_(torch.where(idle, 1.25 * fewest, self.counts.lerp(counts, 1 - decay)))

    @torch.no_grad()
    def token_ids(self, images: Tensor) -> Tensor:
        """Returns the nearest codes (B, N)."""
        return self._nearest(self._features(images))

    @torch.no_grad()
    def decode(self, token_ids: Tensor) -> Tensor:
        """Returns a map of ids (B, N), uint8 (B, 3, H, W): codes that are near look alike.

        No pixels can be had from the ids, so red, green and blue are the codebook's first three
        principal components.
        """
        centred = self.codebook - self.codebook.mean(0)
        components = torch.linalg.svd(centred, full_matrices=False)[2][:3]
        places = centred @ components.T
        low, high = places.amin(0), places.amax(0)
        colours = ((places - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8)
        mapped = colours[token_ids].transpose(1, 2).unflatten(2, self.grid)
        return mapped.repeat_interleave(self.patch[0], 2).repeat_interleave(self.patch[1], 3)

    def _features(self, images: Tensor) -> Tensor:
        """Returns h (B, N, D), unit length."""
        features = self.encoder(scaled(images)).float().flatten(2).transpose(1, 2)
        return F.normalize(features, dim=2)

    def _nearest(self, features: Tensor) -> Tensor:
        return (features @ self.codebook.T).argmax(2)  # the nearest, as all have unit length

    @torch.no_grad()
    def _taught(self, images: Tensor) -> Tensor:
        features: Tensor = self.teacher.feature_map(images).float()
        return F.interpolate(features, self.grid, mode="bilinear", align_corners=False)
