"""What the rewards of a matcher share: the run that it is of, and its view of a batch."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trainer.errors import ConfigError
from trainer.retrieval import Reader
from trainer.rewards._reward import Sampled, Sources
from trainer.run import Run


class Matching:
    """The matcher of another run, which stays as it is while the captioner learns.

    A captioner's own matcher reads with the decoder that is trained, so its judgement would move
    with what it judges: name the run that training starts from instead.

    Args:
        sources: with a run.
        reward: that asks it, for an error.

    Raises:
        ConfigError: no run is named, or it has no matcher.
    """

    def __init__(self, sources: Sources, reward: str) -> None:
        if sources.matcher is None:
            raise ConfigError(
                f"objective.rewards has {reward}, which asks a matcher: name a run with a "
                "[matcher] as objective.matcher, such as the one that this run starts from"
            )
        run = Run(sources.matcher)
        captioner = run.captioner()
        if captioner.matcher is None:
            raise ConfigError(
                f"objective.matcher = {sources.matcher}: that run has no [matcher]; give one of "
                "the objectives itc, itm or blip"
            )
        self._size = (run.recipe.image.height, run.recipe.image.width)
        self.reader = Reader(captioner.to(sources.device), run.tokenizer)

    def pixels(self, images: Tensor) -> NDArray[np.uint8]:
        """Returns images (B, 3, H, W) in the size that the matcher takes: (B, H', W', 3).

        Raises:
            ConfigError: they were encoded, and are seen no more.
        """
        if images.ndim == 3:
            raise ConfigError(
                "objective.rewards asks a matcher, which looks at images: leave data.encoded_views "
                "out"
            )
        if tuple(images.shape[2:]) != self._size:
            sized = F.interpolate(images.float(), self._size, mode="bilinear", antialias=True)
            images = sized.round().clamp(0, 255).to(images.dtype)
        found: NDArray[np.uint8] = images.permute(0, 2, 3, 1).cpu().numpy()
        return np.ascontiguousarray(found)


def by_image(sampled: Sampled) -> list[list[str]]:
    """Returns the texts of each of the B images."""
    own = len(sampled.texts) // len(sampled.images)
    return [list(sampled.texts[at : at + own]) for at in range(0, len(sampled.texts), own)]
