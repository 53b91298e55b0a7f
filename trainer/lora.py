"""Low-rank adaptation: pretrained matrices stay as they are, and what they learn is of low rank.

    W' = W + alpha / rank * B A,

with A (rank, in) drawn and B (out, rank) 0 at the start. Hu et al., 2021, "LoRA", section 4.1,
https://arxiv.org/abs/2106.09685.

1. Every matrix below the targets is adapted, in convolutional networks those of 1 x 1 convolutions;
   the paper adapts the attention's of queries and values.
2. Dropout leaves inputs of A out for a whole batch, not token by token: here the update is a part
   of the weight, so that a layer may be run in whatever way its owner runs it.
3. A is drawn with a deviation of 1 / sqrt(in), so that A x is about as large as x.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.optim import freeze_prefixes, is_below

_KEY = ".parametrizations.weight."  # how PyTorch names what a weight is made of


class Lora(Config):
    """Keys of `[lora]`."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    """Factor on the update, together with 1 / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=("encoder",), min_length=1)
    """Parts of the captioner, as prefixes of its parameters' names. All that is pretrained there is
    frozen, norms and biases too, and its matrices get an update."""


class LowRank(nn.Module):
    """Adds a product of two narrow matrices to a weight.

    Args:
        weight: (rows, columns), or with two sides of 1 more.
        config: `[lora]`.
        inputs_in_rows: whether the rows of the weight belong to the inputs.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, config: Lora, *, inputs_in_rows: bool) -> None:
        super().__init__()
        rows, columns = weight.shape[:2]
        self.left = nn.Parameter(weight.new_zeros(rows, config.rank))
        self.right = nn.Parameter(weight.new_zeros(config.rank, columns))
        self.register_buffer("scale", weight.new_tensor(config.alpha / config.rank))
        self._dropout, self._inputs_in_rows = config.dropout, inputs_in_rows
        inputs = rows if inputs_in_rows else columns
        nn.init.normal_(self.left if inputs_in_rows else self.right, std=inputs**-0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """Returns `weight` with its update, of the same shape."""
        left: Tensor = self.left
        right: Tensor = self.right
        if self._dropout and self.training:
            if self._inputs_in_rows:
                left = left * F.dropout(torch.ones_like(left[:, :1]), self._dropout)
            else:
                right = right * F.dropout(torch.ones_like(right[:1]), self._dropout)
        with torch.autocast(weight.device.type, enabled=False):  # what is kept is the full sum
            return _updated(weight, left, right, self.scale)


def adapt(captioner: nn.Module, config: Lora) -> None:
    """Freezes what is below the targets, and gives every matrix there an update that is 0.

    A matrix that two modules share (word embeddings and the head) stays as it is: an update would
    part them.

    Raises:
        ConfigError: a target that names nothing, or where there is no matrix.
    """
    freeze_prefixes(captioner, config.targets, key="lora.targets")
    owners = Counter(id(p) for _, p in captioner.named_parameters(remove_duplicate=False))
    for target in config.targets:
        adapted = 0
        for name, module in list(captioner.named_modules()):
            side = _inputs_in_rows(module)
            if side is None or not is_below(name, target) or owners[id(module.weight)] > 1:
                continue
            assert isinstance(module.weight, Tensor)
            update = LowRank(module.weight, config, inputs_in_rows=side)
            parametrize.register_parametrization(module, "weight", update)
            adapted += 1
        if not adapted:
            raise ConfigError(
                f"lora.targets = {target!r}: there is no linear layer or 1 x 1 convolution to "
                "adapt; name the part of the captioner that holds some"
            )


def merged(
    tensors: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns a module's tensors with every update added to its weight, by the plain names.

    Args:
        tensors: of a module that may be adapted.
        scales: where the updates' factors are, if not among them: a moving average has none.
    """
    found = {name: tensor for name, tensor in tensors.items() if _KEY not in name}
    for name, weight in tensors.items():
        module, parted, part = name.partition(_KEY)
        if parted and part == "original":
            left, right = (tensors[f"{module}{_KEY}0.{side}"] for side in ("left", "right"))
            scale = (scales or tensors)[f"{module}{_KEY}0.scale"]
            found[f"{module}.weight"] = _updated(weight, left, right, scale)
    return found


def _updated(weight: Tensor, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    return weight + (scale * (left @ right)).view_as(weight)


def _inputs_in_rows(module: nn.Module) -> bool | None:
    """Returns whether the rows of a module's matrix belong to its inputs; None without a matrix."""
    if parametrize.is_parametrized(module):
        return None
    if isinstance(module, nn.Conv2d):
        return False if module.kernel_size == (1, 1) and module.groups == 1 else None
    if isinstance(module, nn.Linear):
        return False
    # Of `transformers`, which only decoders may import.
    return True if type(module).__name__ == "Conv1D" else None
