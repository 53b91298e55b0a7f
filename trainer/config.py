"""One run is one TOML recipe, dotted overrides, and strict validation.

A misspelt key names itself and the keys that exist. A variant (an encoder, a decoder, an
objective, ...) is a table whose `name` picks the file and whose other keys are validated by that
file's own `Config`.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.errors import ConfigError


class Config(BaseModel):
    """Base of every part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


C = TypeVar("C", bound=BaseModel)


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the recipe's tables with the `section.key=value` overrides applied.

    A value is read as TOML, and as a plain string where it is not valid TOML (a path needs no
    quotes).

    Raises:
        ConfigError: the file is missing or not TOML, or an override has no `=`.
    """
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r} has no '='; write section.key=value")
        table = recipe
        *sections, last = key.split(".")
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        table[last] = _parse_value(text)
    return recipe


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def validate(model: type[C], table: dict[str, Any], where: str) -> C:
    """Returns `table` as a `model`; `where` names it in the error.

    Raises:
        ConfigError: one line a problem; an unknown key lists the keys that exist.
    """
    try:
        return model.model_validate(table)
    except ValidationError as error:
        lines = [_explain(model, problem) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _explain(model: type[BaseModel], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{path}: {message.lower()} (found {problem.get('input')!r})"
    parent: Any = model
    for part in problem["loc"][:-1]:
        annotation = parent.model_fields[part].annotation
        # Of `Table | None`, the table.
        parent = next((a for a in get_args(annotation) if a is not NoneType), annotation)
    return f"unknown key {path!r}; the keys are {', '.join(sorted(parent.model_fields))}"


def write_resolved(config: Config, path: Path) -> None:
    """Writes the validated config, defaults included, as JSON: the provenance of a run.

    A crash or a full disk leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
