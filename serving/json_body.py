"""JSON from strangers: bounded in depth and in number of values before it is read."""

import json
import re
from collections.abc import Callable
from typing import Any

from serving.errors import MalformedRequest

MAX_DEPTH = 32
MAX_TOKENS = 200_000  # strings, commas, brackets: 16 MiB of `[],[],` would become 300 MiB of lists

# A string to its end or to that of the text, or one character of structure. Nothing is tried twice
# (the quantifiers are possessive), so a pass over the text is linear whatever stands in it.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


def read_json(
    body: bytes, *, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Returns the value of a JSON text in UTF-8.

    Args:
        body: The text.
        object_pairs_hook: As of `json.loads`.

    Raises:
        MalformedRequest: It is no JSON, or is nested deeper or has more values than is allowed.
    """
    try:
        text = body.decode("utf-8-sig")
        _check(text)
        return json.loads(text, object_pairs_hook=object_pairs_hook, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedRequest("The body is not valid JSON.") from error


def _check(text: str) -> None:
    depth = 0
    for number, token in enumerate(_TOKEN.finditer(text)):
        if number >= MAX_TOKENS:
            raise MalformedRequest(f"The JSON has more than {MAX_TOKENS} parts.")
        character = text[token.start()]
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise MalformedRequest(f"The JSON is nested more than {MAX_DEPTH} deep.")
        elif character in "]}":
            depth -= 1


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
