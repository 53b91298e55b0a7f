"""What a PromQL expression asks for: selectors, and the labels that it groups by."""

import re
from dataclasses import dataclass

_OPERATORS = frozenset({"and", "or", "unless", "offset", "bool", "inf", "nan"})
_MODIFIERS = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_SELECTOR = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(\{[^}]*\}|\()?")
_MATCHER = re.compile(r'\s*(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"\s*')
_RANGE = re.compile(r"\[[^\]]*\]")


@dataclass(frozen=True)
class Selector:
    """A metric and its matchers: label, operator, value."""

    name: str
    matchers: tuple[tuple[str, str, str], ...]


def selectors(query):
    """Returns the selectors of a query; refuses matchers that it does not understand."""
    plain = _GROUPING.sub(" ", _RANGE.sub(" ", query))
    # A duration after `offset` would read as a number and a name.
    plain = re.sub(r"\boffset\s+\w+", " ", plain)
    found = []
    at = 0
    while match := _SELECTOR.search(plain, at):
        at = match.end()
        name, rest = match.groups()
        if match.start() and plain[match.start() - 1].isdigit():
            continue  # 1e9
        if rest == "(" or name in _OPERATORS | _MODIFIERS:
            continue
        found.append(Selector(name, _matchers(rest[1:-1]) if rest else ()))
    return found


def grouped_labels(query):
    """Returns the labels that stand in by(...), on(...) and the like."""
    lists = (labels for _, labels in _GROUPING.findall(_STRING.sub('""', query)))
    return {label.strip() for labels in lists for label in labels.split(",") if label.strip()}


def _matchers(text):
    found, at = [], 0
    while at < len(text.rstrip(", ")):
        match = _MATCHER.match(text, at)
        assert match, f"no matcher: {text[at:]!r}"
        found.append(match.groups())
        at = match.end()
        if at < len(text):
            assert text[at] == ",", text
            at += 1
    return tuple(found)
