"""BEiT: an encoder that some patches are hidden from says which visual tokens they are.

Bao et al., 2021, "BEiT: BERT Pre-Training of Image Transformers",
https://arxiv.org/abs/2106.08254; Peng et al., 2022, "BEiT v2", https://arxiv.org/abs/2208.06366,
with the tokenizer `vq_kd`:

    loss = -mean over masked patches of log softmax(head(norm(h)))[tokenizer(image)],

with h the features of an encoder that finds a learnt mask token at the patches that blocks of
random size and place hide (algorithm 1). The tokenizer is trained first, on the same images, and
does not change from then on.

Nothing but the patches' own features is taught: take an encoder that pools them (`beit_*`, or
`vit_base_patch16_gap_224` in any size). A class token is taught only as far as patches look at it.

Departures:

1. The last block of an image is cut where it would hide more than its share of the patches. So all
   images hide equally many, and the loss of a batch is the mean of its images' losses.
2. timm's `beit_*` have relative positions in each layer; the paper's pre-training has one table for
   all layers. timm's plain transformers have absolute positions and no layer scale.
3. No patch-aggregation through the class token (v2, section 3.3).
"""

import math
import random
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import variants
from trainer.errors import ConfigError
from trainer.methods._masked import check_patches, greyed, pixel_mask
from trainer.methods._method import Method as BaseMethod
from trainer.methods._method import MethodConfig, Preparation, Setting
from trainer.visual_tokenizers._tokenizer import perplexity

_FLATTEST = 0.3  # height of a block over its width; 1 / 0.3 is the steepest


class Config(MethodConfig):
    """Keys of `[method] name = "beit"`."""

    mask_ratio: float = Field(default=0.4, gt=0, lt=1)
    """Share of the patches that are hidden."""
    min_block: int | None = Field(default=None, ge=1)
    """Patches in the smallest block; by default a twelfth of all, which is the paper's 16 of 196,
    and never more than that."""
    tokenizer: dict[str, Any] = Field(default_factory=lambda: {"name": "dvae"})
    """A table `[method.tokenizer]`: one of `trainer/visual_tokenizers/` and its keys."""


class Method(BaseMethod):
    """See the module."""

    remedies = "another optim.lr, or a tokenizer that is trained longer or has fewer ids"

    def __init__(self, config: Config, encoder: Any, setting: Setting) -> None:
        super().__init__(config, encoder, setting)
        check_patches(encoder, "beit")
        self._grid = encoder.grid
        patches = self._grid[0] * self._grid[1]
        self._hidden = _hidden_patches(patches, config.mask_ratio)
        self._min_block = _smallest_block(config.min_block, patches, self._hidden)
        self._tokenizer_config: Any
        module, self._tokenizer_config = variants.parse("visual_tokenizers", config.tokenizer)
        steps = self._tokenizer_config.epochs * setting.epoch_steps
        self.tokenizer: Any = module.Tokenizer(
            self._tokenizer_config, encoder.image_size, encoder.grid, steps
        )
        self.mask_token = nn.Parameter(torch.empty(encoder.width))
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = nn.Linear(encoder.width, self.tokenizer.vocab_size)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def preparation(self) -> Preparation:
        """Returns the tokenizer's training."""
        config = self._tokenizer_config
        return Preparation("visual_tokenizer", self.tokenizer, config.epochs, config.lr)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of all but the tokenizer, which stays as it is used."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the loss, how often the likeliest token is right, and how many tokens there are.

        `token_perplexity` is what the batch's targets make use of: were it near 1, there would be
        nothing to learn. At chance all ids are equally likely.
        """
        images = batch["images"]
        draw = random.Random(int(torch.randint(2**62, ())))
        mask = self._masks(len(images), draw).to(images.device)
        token_ids = self.tokenizer.token_ids(images)
        logits = self._hidden_logits(images, mask)
        loss = F.cross_entropy(logits, token_ids[mask])
        return {
            "loss": loss,
            "of_chance": loss.detach() / math.log(self.tokenizer.vocab_size),
            "accuracy": (logits.argmax(1) == token_ids[mask]).float().mean(),
            "token_perplexity": perplexity(token_ids, self.tokenizer.vocab_size),
        }

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Returns the visible patches, the decoded guess, the decoded truth, and the image.

        The guess has the likeliest token at each hidden patch and the true ones elsewhere. The mask
        is the same at every call.
        """
        mask = self._masks(len(images), random.Random(0)).to(images.device)
        token_ids = self.tokenizer.token_ids(images)
        guessed = token_ids.masked_scatter(mask, self._hidden_logits(images, mask).argmax(1))
        hidden = pixel_mask(mask, self._grid, self.tokenizer.patch)
        decoded = [self.tokenizer.decode(ids) for ids in (guessed, token_ids)]
        return torch.stack([greyed(images, hidden), *decoded, images], dim=1)

    def _masks(self, images: int, draw: random.Random) -> Tensor:
        """Returns (B, N), true at the hidden patches."""
        hidden = [
            block_mask(draw, self._grid, self._hidden, self._min_block) for _ in range(images)
        ]
        mask = torch.zeros(images, self._grid[0] * self._grid[1], dtype=torch.bool)
        return mask.scatter_(1, torch.tensor(hidden), True)

    def _hidden_logits(self, images: Tensor, mask: Tensor) -> Tensor:
        """Returns (B * hidden, V), the hidden patches of an image together."""
        tokens = self.encoder.masked_tokens(images, mask, self.mask_token)
        patches = tokens[:, self.encoder.prefix_tokens :]
        logits: Tensor = self.head(self.norm(patches[mask]))
        return logits.float()


def block_mask(
    draw: random.Random, grid: tuple[int, int], hidden: int, min_block: int
) -> list[int]:
    """Returns which patches are hidden.

    Blocks are put down until `hidden` patches are covered; the last may be cut at its end.

    Args:
        draw: decides.
        grid: rows and columns.
        hidden: how many patches.
        min_block: how many the smallest block has.
    """
    covered: dict[int, None] = {}
    while len(covered) < hidden:
        left = hidden - len(covered)
        top, start, height, width = draw_block(draw, grid, min_block, max(left, min_block))
        block = (
            row * grid[1] + column
            for row in range(top, top + height)
            for column in range(start, start + width)
        )
        fresh = [patch for patch in block if patch not in covered]
        covered |= dict.fromkeys(fresh[:left])
    return list(covered)


def draw_block(
    draw: random.Random, grid: tuple[int, int], smallest: int, largest: int
) -> tuple[int, int, int, int]:
    """Returns a block's top row and first column, its height and its width.

    Its area is drawn evenly, its aspect evenly by its logarithm (as the paper's authors do), its
    place evenly. The grid bounds the sides and `smallest` the area, before the aspect does.

    Args:
        draw: decides.
        grid: rows and columns.
        smallest: area, in patches; at most the grid's.
        largest: area.
    """
    rows, columns = grid
    area = draw.uniform(smallest, largest)
    aspect = math.exp(draw.uniform(math.log(_FLATTEST), -math.log(_FLATTEST)))
    lowest = math.ceil(smallest / columns)
    height = min(max(round(math.sqrt(area * aspect)), lowest), rows)
    narrowest = math.ceil(smallest / height)
    width = min(max(round(area / height), narrowest), columns)
    return draw.randint(0, rows - height), draw.randint(0, columns - width), height, width


def _hidden_patches(patches: int, mask_ratio: float) -> int:
    """Returns how many patches are hidden.

    Raises:
        ConfigError: none or all.
    """
    hidden = round(patches * mask_ratio)
    if not 0 < hidden < patches:
        raise ConfigError(
            f"method.mask_ratio = {mask_ratio} of {patches} patches leaves {patches - hidden} "
            f"visible and {hidden} masked; both need at least 1: change it, or take smaller patches"
        )
    return hidden


def _smallest_block(asked: int | None, patches: int, hidden: int) -> int:
    """Returns how many patches the smallest block has.

    Raises:
        ConfigError: more than are hidden.
    """
    if asked is not None and asked > hidden:
        raise ConfigError(
            f"method.min_block = {asked}, but method.mask_ratio hides {hidden} patches of "
            f"{patches}; take at most that"
        )
    return min(max(1, patches // 12), 16, hidden) if asked is None else asked
