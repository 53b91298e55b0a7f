"""What the loop trains: an Objective, and nothing else about it is known."""

from typing import Any

from torch import Tensor, nn


class Objective(nn.Module):
    """A loss with the modules it trains.

    Subclasses implement `forward(batch) -> {"loss": scalar, ...}`; every further scalar of the
    dictionary is logged. The loop saves and restores `state_dict()`, so whatever a method must
    remember between steps (a queue, a momentum encoder) is a buffer or a submodule.
    """

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns `{"loss": ..., other scalars to log}` for one batch."""
        raise NotImplementedError

    def before_epoch(self, epoch: int) -> None:
        """Called at the start of every epoch and after a resume; sets what depends on it alone."""

    def after_step(self, step: int) -> None:
        """Called after every optimiser step, with how many have been taken."""
