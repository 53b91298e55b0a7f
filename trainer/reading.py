"""How a decoder comes to read an image: what a bridge asks of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Reading:
    """What becomes of the bridge's tokens in the decoder.

    Attributes:
        kind: `cross_attention`, each layer attends to them by the family's own means; `gated`,
            layers that begin closed are put before the decoder's; `prefix`, they stand before the
            text.
        every: gated: before every so many layers.
        placed: prefix: how many positions the image takes from the text, each token one; 0 where
            the bridge has placed its tokens itself.
        causal: prefix: whether its tokens are hidden from those before them.
    """

    kind: Literal["cross_attention", "gated", "prefix"]
    every: int = 1
    placed: int = 0
    causal: bool = True
