"""What every method of picking images is."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from trainer.acquisition._pool import Pick, Pool
from trainer.errors import ConfigError, DataError


class Acquisition(ABC):
    """Base of the methods; subclasses write `choose`.

    Args:
        config: the file's `Config`.

    Attributes:
        asks: Whether the method cannot do without a captioner.
    """

    asks: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    def pick(self, pool: Pool, count: int) -> list[Pick]:
        """Returns `count` images to label, best first: none labelled, no two near-duplicates.

        The same for the same pool and seed.

        Raises:
            ConfigError: there are fewer images, or the method needs what the pool has not.
            DataError: there are none.
        """
        left = len(pool.open)
        if not left:
            raise DataError("every image is labelled, or a near-duplicate of one that is")
        if count > left:
            raise ConfigError(f"{count} images to pick, but {left} are left; take {left} or fewer")
        return self.choose(pool, count)

    @abstractmethod
    def choose(self, pool: Pool, count: int) -> list[Pick]:
        """Returns `count` of the pool's open places as picks; there are as many."""
