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
        room: how many positions are kept for what stands before the text. prefix: those of the
            image's tokens, 0 where the bridge has placed them itself; gated: those of examples.
        causal: prefix: whether its tokens are hidden from those before them.
        shot_tokens: gated: T, the positions of each example (see `trainer.few_shot`).
    """

    kind: Literal["cross_attention", "gated", "prefix"]
    every: int = 1
    room: int = 0
    causal: bool = True
    shot_tokens: int = 0

    @property
    def shots(self) -> int:
        """How many examples there is room for."""
        return self.room // self.shot_tokens if self.shot_tokens else 0
