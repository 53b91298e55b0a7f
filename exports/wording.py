"""Captions as words, and two faults that show without a reference; for trainer and server alike.

The rule: the caption in lower case and Unicode form NFC; each run of letters, their marks and
digits is a word, everything else separates. "A man's T-shirt, 2 dogs." gives
a man s t shirt 2 dogs.
"""

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

Ngram = tuple[str, ...]

_PLAIN = re.compile(r"[^\W_]+")
_ARTICLES = "a an the this these those my your his its our their"
_CONJUNCTIONS = "and or but nor while as if because than"
_PREPOSITIONS = (
    "of in at to from with for into onto against beside between among during near next toward "
    "towards upon"
)
_VERBS = "is are was were be being am"
UNFINISHED = frozenset(f"{_ARTICLES} {_CONJUNCTIONS} {_PREPOSITIONS} {_VERBS}".split())
"""English words that hardly ever close a caption."""


@cache
def _marked() -> re.Pattern[str]:
    """Finds words with their marks, which `re` takes for gaps: Hindi would fall to pieces."""
    signs = map(chr, range(sys.maxunicode))
    marks = "".join(sign for sign in signs if unicodedata.category(sign).startswith("M"))
    return re.compile(rf"(?:[^\W_]|[{marks}])+")


def words(caption: str) -> list[str]:
    """Returns the lower-case words of a caption, without punctuation."""
    if caption.isascii():
        return _PLAIN.findall(caption.lower())
    return _marked().findall(unicodedata.normalize("NFC", caption.lower()))


def ngrams(tokens: Sequence[str], order: int) -> Counter[Ngram]:
    """Returns how often each run of `order` words occurs."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def repeats(tokens: Sequence[str]) -> bool:
    """Says whether a word follows itself, or three words come again."""
    doubled = any(one == other for one, other in pairwise(tokens))
    return doubled or any(count > 1 for count in ngrams(tokens, 3).values())


def breaks_off(tokens: Sequence[str]) -> bool:
    """Says whether the last word wants another one."""
    return bool(tokens) and tokens[-1] in UNFINISHED
