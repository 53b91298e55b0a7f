"""Which parameters a few pairs may move: the last blocks of both towers and the projections.

A hundred captions cannot teach all of a large model, but they can make it forget. The temperature
stays as it is too: a colder one would lower the loss and sort nothing better.
"""

import re

from torch import nn

from trainer.errors import ConfigError

_BLOCK = re.compile(r"(?:blocks\.layers|blocks|stages|layers)\.(\d+)\.|layer(\d+)\.")
_PROJECTIONS = ("image_projection", "text_projection")
_TOWERS = ("encoder.backbone", "text_encoder")


def last_blocks(method: nn.Module, count: int) -> list[str]:
    """Returns the names of all from the last `count` blocks of each tower on, and the projections.

    A block is a layer of a transformer, or a stage of a CNN; what stands behind the last one (a
    CNN's last convolution) belongs to it. Of a tower that has not so many blocks all are meant, but
    not what stands before them.

    Raises:
        ConfigError: a tower has no blocks that are known.
    """
    names = list(_PROJECTIONS)
    for tower in _TOWERS if count else ():
        own = [name for name, _ in method.get_submodule(tower).named_parameters()]
        numbers = [_number(name) for name in own]
        known = sorted({number for number in numbers if number is not None})
        if not known:
            raise ConfigError(
                f"{tower}: no blocks are known of {own[0]} and the like; set `trained` to the "
                "prefixes of the parameters that shall be trained"
            )
        begin = numbers.index(known[-count:][0])
        names += [f"{tower}.{name}" for name in own[begin:]]
    return names


def _number(name: str) -> int | None:
    found = _BLOCK.match(name)
    return int(found[1] or found[2]) if found else None
