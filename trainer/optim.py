"""What is trained and how fast: freezing, AdamW groups, the schedule, the moving average."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn

from trainer.config import Config
from trainer.errors import ConfigError

_POSITIONS = ("position", "pos_embed", "relative_position_bias_table")


class Optim(Config):
    """Keys of `[optim]`."""

    name: Literal["adamw", "lars"] = "adamw"
    """LARS is for contrastive batches from 512 images on; its rate is near 0.3 * batch / 256."""
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW; the first is LARS's momentum."""
    warmup: float = 0.05
    """Share of all steps over which the rate rises from 0."""
    final: float = 0.01
    """Share of the rate that is left at the end of the cosine."""
    scales: dict[str, float] = Field(default_factory=dict)
    """Parameter prefix -> factor on `lr`, e.g. `{ "captioner.encoder" = 0.1 }`."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the rate from each layer of an encoder to the one below it; 1 is off."""


@runtime_checkable
class Layered(Protocol):
    """A module whose layers are known: an encoder."""

    def layers_above(self) -> dict[str, int]:
        """Returns for each parameter how many layers stand above its own, 0 for the last."""


def freeze_prefixes(module: nn.Module, prefixes: Sequence[str], *, key: str = "frozen") -> None:
    """Turns gradients off for the parameters at or below the dotted names in `prefixes`.

    Args:
        module: of the parameters.
        prefixes: their names or what those begin with.
        key: what a recipe calls them.

    Raises:
        ConfigError: a prefix that names no parameter.
    """
    for prefix in prefixes:
        hit = [p for name, p in module.named_parameters() if is_below(name, prefix)]
        if not hit:
            tops = sorted({name.split(".")[0] for name, _ in module.named_parameters()})
            raise ConfigError(f"{key} = {prefix!r} names no parameter; they begin with {tops}")
        for parameter in hit:
            parameter.requires_grad_(False)


def train_only(module: nn.Module, prefixes: Sequence[str]) -> int:
    """Freezes all but what is at or below the dotted names in `prefixes`, and every norm.

    Returns:
        How many numbers can still be trained.

    Raises:
        ConfigError: a prefix names no parameter, or nothing is left to train.
    """
    names = [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if not any(is_below(name, prefix) for name in names):
            raise ConfigError(f"trained = {prefix!r} names no parameter; they look like {names[0]}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(any(is_below(name, prefix) for prefix in prefixes))
    for part in module.modules():
        if "norm" in type(part).__name__.lower():
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(False)
    count = sum(one.numel() for one in module.parameters() if one.requires_grad)
    if not count:
        raise ConfigError(f"trained = {list(prefixes)} leaves nothing to train; norms never are")
    return count


def is_below(name: str, prefix: str) -> bool:
    """Returns whether a dotted name is `prefix` or begins with all of its parts."""
    return name == prefix or name.startswith(f"{prefix}.")


def build_optimizer(module: nn.Module, config: Optim) -> torch.optim.Optimizer:
    """Returns the optimiser over every parameter of `module`.

    Vectors (norms, biases) and embeddings of positions are not decayed. A parameter's rate is

        lr * scale * layer_decay ** k,

    with the scale of the longest prefix in `config.scales` that fits, and k the layers of its
    encoder that stand above it; 0 outside encoders. Clark et al., 2020, "ELECTRA",
    https://arxiv.org/abs/2003.10555; in vision Bao et al., 2021, "BEiT",
    https://arxiv.org/abs/2106.08254. Departure: there the last layer has k = 1, below the head;
    here `scales` says how an encoder's rate compares to the rest.

    Parameters that are frozen now take part too: without a gradient they are left alone.

    Raises:
        ConfigError: a prefix in `config.scales` that names no parameter, or a `layer_decay` where
            there is no encoder with layers.
    """
    names = [name for name, _ in module.named_parameters()]
    for prefix in config.scales:
        if not any(is_below(name, prefix) for name in names):
            raise ConfigError(f"scales: {prefix!r} names no parameter; they look like {names[0]}")
    above = _layers_above(module) if config.layer_decay < 1 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        prefixes = [prefix for prefix in config.scales if is_below(name, prefix)]
        scale = config.scales[max(prefixes, key=len)] if prefixes else 1.0
        scale *= config.layer_decay ** above.get(name, 0)
        positions = "wpe" in name or name.endswith(_POSITIONS)
        decayed = parameter.ndim > 1 and not positions
        decay = config.weight_decay if decayed else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    rows = [
        {"params": parameters, "lr": config.lr * scale, "weight_decay": decay, "scale": scale}
        for (scale, decay), parameters in groups.items()
    ]
    if config.name == "lars":
        return Lars(rows, lr=config.lr, momentum=config.betas[0])
    return torch.optim.AdamW(rows, lr=config.lr, betas=config.betas, fused=True)


def _layers_above(module: nn.Module) -> dict[str, int]:
    """Returns `Layered.layers_above` of all parts of `module`, by the module's own names."""
    found = {
        f"{path}.{name}".removeprefix("."): above
        for path, part in module.named_modules()
        if isinstance(part, Layered)
        for name, above in part.layers_above().items()
    }
    if not found:
        raise ConfigError("optim.layer_decay: there is no encoder with layers here; leave it out")
    return found


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step of each matrix is in proportion to the matrix's own norm.

    With d the decay, g the gradient and eta the trust coefficient, the momentum takes in

        u = eta |w| / (|g| + d |w|) * (g + d w),

    and plain g for parameters without decay: norms and biases. You et al., 2017, "Large Batch
    Training of Convolutional Networks", https://arxiv.org/abs/1708.03888, algorithm 1, with the
    exclusions of SimCLR, https://arxiv.org/abs/2002.05709, section B.6.

    Args:
        params: groups, each with its `weight_decay`; those with 0 are not adapted.
        lr: the global rate.
        momentum: how much of the last step stays.
        trust: eta.
    """

    def __init__(
        self, params: Any, *, lr: float, momentum: float = 0.9, trust: float = 1e-3
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step; a closure is not supported."""
        assert closure is None
        for group in self.param_groups:
            decay = group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad
                if decay:
                    size, slope = weight.norm(), weight.grad.norm()
                    adapted = group["trust"] * size / (slope + decay * size)
                    scale = torch.where((size > 0) & (slope > 0), adapted, 1.0)
                    update = (update + decay * weight) * scale
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                weight.add_(buffer, alpha=-group["lr"])


def learning_rate(step: int, total: int, config: Optim) -> float:
    """Returns the rate of `step`, counted from 0: linear warm-up, then a cosine.

    Loshchilov and Hutter, 2017, "SGDR", https://arxiv.org/abs/1608.03983.
    """
    warmup = config.warmup * total
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    share = (step - warmup) / max(1.0, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr * (config.final + (1 - config.final) * cosine)


class MovingAverage:
    """An exponential moving average of a module's parameters.

    The decay rises as (1 + step) / (10 + step) to its final value, so that the random weights of
    the start are forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after optimiser step number `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages = list(self.shadow.values())
        weights = [p.detach() for _, p in self._module.named_parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's weights with the average; twice is no change."""
        for name, parameter in self._module.named_parameters():
            average = self.shadow[name]
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Takes over a saved average."""
        for name, average in self.shadow.items():
            average.copy_(shadow[name])
