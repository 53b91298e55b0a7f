"""The trainer's command line: `python -m trainer STAGE RECIPE [section.key=value ...]`."""

import argparse
import sys
from pathlib import Path

from exports.errors import ExportsError
from trainer import variants
from trainer.config import read_recipe, validate
from trainer.errors import TrainerError


def main(argv: list[str] | None = None) -> int:
    """Runs one stage; returns 0, or 1 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("stage", choices=variants.names("stages"))
    parser.add_argument("recipe", type=Path, help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/<recipe name>)")
    arguments = parser.parse_args(argv)
    try:
        stage = variants.load("stages", arguments.stage)
        recipe = read_recipe(arguments.recipe, arguments.overrides)
        config = validate(stage.Config, recipe, str(arguments.recipe))
        stage.run(config, arguments.out or Path("runs") / arguments.recipe.stem)
    except (TrainerError, ExportsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
