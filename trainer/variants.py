"""A folder is a registry: every file of it defines the same names, and its file name is its name.

Adding a variant is adding one file. Files that begin with an underscore are shared code.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from trainer.config import Config, validate
from trainer.errors import ConfigError


def names(folder: str) -> list[str]:
    """Returns the sorted names of the variants in `trainer/<folder>/`."""
    package = importlib.import_module(f"trainer.{folder}")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(folder: str, name: str) -> ModuleType:
    """Returns the module of one variant.

    Raises:
        ConfigError: no such file; the message lists the variants that exist.
    """
    if name not in names(folder):
        raise ConfigError(f"no {folder} called {name!r}; there are {', '.join(names(folder))}")
    return importlib.import_module(f"trainer.{folder}.{name}")


def parse(folder: str, table: dict[str, Any]) -> tuple[ModuleType, Config]:
    """Returns the module that `table["name"]` picks and its `Config` made from the other keys.

    Raises:
        ConfigError: no `name`, an unknown one, or keys that the variant's `Config` refuses.
    """
    if "name" not in table:
        raise ConfigError(f"{folder}: no 'name'; choose one of {', '.join(names(folder))}")
    module = load(folder, table["name"])
    keys = {key: value for key, value in table.items() if key != "name"}
    return module, validate(module.Config, keys, f"{folder}/{table['name']}")
