"""Captions of mirror images: what stands on the left is then on the right."""

import re
import unicodedata
from collections.abc import Sequence

_ENGLISH = (("left", "right"),)
# "leftmost", "left-handed"; the hyphen ends a word already.
_ENDINGS = "(?:most|hand(?:ed)?|wards?)?"
# English says both words of other things than sides ("has left the room", "right behind him"); the
# words before them tell ("on his right behind the fence").
_OTHERWISE = re.compile(
    r"\b(?:ha[sd]|have|having|been|be|is|are|was|were|just|who|all)\s+left\b(?![\s-]+(?:of|side|hand))"
    r"|\bleft\s+(?:alone|behind|over|by|from|the|a|an|his|her|its|their)\b"
    r"|(?<!\bthe\s)(?<!\bhis\s)(?<!\bher\s)(?<!\bits\s)(?<!\bour\s)(?<!\btheir\s)(?<!\bon\s)"
    r"(?<!\bto\s)\bright\s+(?:in|into|on|onto|at|by|next|behind|before|after|beside|near|above|"
    r"below|under|over|through|up|down|out|off|outside|inside|alongside|along|towards?|around|"
    r"across|away|against|between|there|here|now|angles?)\b"
    r"|\b(?:all|look|looks|turn|turns)\s+right\s*[\"'“”]",
    re.IGNORECASE,
)


class Mirror:
    """Turns captions of an image into captions of its mirror image.

    Words are exchanged by pairs, whole words only, in the case that they were written in; what a
    pair's words begin counts too ("leftmost", "left-hand").

    Args:
        swaps: pairs of words that change places, such as ("left", "right"). Without any no caption
            is changed, and English ones that say a side have no mirror image.
    """

    def __init__(self, swaps: Sequence[tuple[str, str]]) -> None:
        self._swaps = {one.casefold(): other for pair in swaps for one, other in (pair, pair[::-1])}
        words = [word for pair in swaps or _ENGLISH for word in pair]
        self._sided = re.compile("|".join(_pattern(word) for word in words), re.IGNORECASE)
        self._english = any(word.casefold() in ("left", "right") for word in words)

    def __call__(self, captions: Sequence[str]) -> tuple[str, ...] | None:
        """Returns what captions of an image say of its mirror image; None where that is not known.

        It is not where a caption says a side and there are no `swaps`, and where an English one
        means something else by it: "has left", "right behind".
        """
        if not any(self._sided.search(caption) for caption in captions):
            return tuple(captions)
        if not self._swaps or (self._english and any(map(_OTHERWISE.search, captions))):
            return None
        return tuple(self._sided.sub(self._exchanged, caption) for caption in captions)

    def _exchanged(self, found: re.Match[str]) -> str:
        word = found[0]
        other = self._swaps[word.casefold()]
        if word.isupper() and len(word) > 1:
            return other.upper()
        return other[:1].upper() + other[1:] if word[:1].isupper() else other


def _pattern(word: str) -> str:
    """Returns an expression for a word with what may follow it, and of which the word is all."""
    # Scripts of wide characters do not part words.
    if any(unicodedata.east_asian_width(letter) == "W" for letter in word):
        return re.escape(word)
    return rf"\b{re.escape(word)}(?={_ENDINGS}\b)"
