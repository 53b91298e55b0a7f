"""Weights between those a model began with and those it was fine-tuned to (WiSE-FT).

Wortsman et al., 2021, "Robust fine-tuning of zero-shot models", https://arxiv.org/abs/2109.01903,
equation 1:  theta_alpha = (1 - alpha) theta_0 + alpha theta_1.
"""

from collections.abc import Mapping

from torch import Tensor


def interpolated(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Returns theta_alpha: `first` exactly at 0, `second` exactly at 1.

    Args:
        first: theta_0 by name.
        second: theta_1, of the same names and shapes.
        alpha: how far from the first to the second. Integers, which count steps, jump at 1.
    """
    return {name: _between(value, second[name], alpha) for name, value in first.items()}


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if first.is_floating_point():
        return first.lerp(second, alpha)
    return (second if alpha == 1 else first).clone()
