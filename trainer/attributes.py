"""Words that tell things apart, and captions with one of them changed: nearly right, so wrong.

Such a caption names the same things as the true one, so only a reader of word and picture together
tells them apart (Thrush et al., 2022, "Winoground", https://arxiv.org/abs/2204.03162; Yuksekgonul
et al., 2023, "When and Why Vision-Language Models Behave Like Bags-of-Words",
https://arxiv.org/abs/2210.01936).
"""

import random
import re
from collections.abc import Collection

_KINDS = (
    "red green blue yellow purple white black brown orange pink grey gray",
    "circle square triangle",
    "left right",
    "above below",
    "man woman boy girl",
    "men women boys girls",
    "dog cat horse",
    "inside outside",
)
_ALIKE = {"grey": "gray", "gray": "grey"}
_KIND_OF = {word: kind.split() for kind in _KINDS for word in kind.split()}
_WORD = re.compile(rf"\b({'|'.join(_KIND_OF)})\b", re.IGNORECASE)


def swapped(
    caption: str, draw: random.Random, *, words: Collection[str] | None = None
) -> str | None:
    """Returns a caption with one word changed for another of its kind; None: it has no such word.

    Args:
        caption: a true one.
        draw: decides which word, and what for.
        words: what it may be changed for, where that is less than all: a word that captions never
            use gives itself away.
    """
    choices = [
        (match, other)
        for match in _WORD.finditer(caption)
        for other in _others(match[0].lower())
        if words is None or other in words
    ]
    if not choices:
        return None
    match, other = draw.choice(choices)
    return caption[: match.start()] + other + caption[match.end() :]


def _others(word: str) -> list[str]:
    return [other for other in _KIND_OF[word] if other not in (word, _ALIKE.get(word))]
