"""The trainer's command line: `python -m trainer STAGE RECIPE [section.key=value ...]`."""

import argparse
import sys
from errno import ENOSPC
from pathlib import Path

from exports.errors import ExportsError
from trainer import variants
from trainer.config import read_recipe, validate
from trainer.distributed import launch
from trainer.errors import ConfigError, TrainerError


def main(argv: list[str] | None = None) -> int:
    """Runs one stage; returns 0, or 1 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("stage", choices=variants.names("stages"))
    parser.add_argument("recipe", type=Path, help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/<recipe name>)")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that share every batch (Ray Train)"
    )
    arguments = parser.parse_intermixed_args(argv)
    out_dir = arguments.out or Path("runs") / arguments.recipe.stem
    try:
        stage = variants.load("stages", arguments.stage)
        recipe = read_recipe(arguments.recipe, arguments.overrides)
        config = validate(stage.Config, recipe, str(arguments.recipe))
        if arguments.workers != 1 and arguments.stage != "pretrain":
            raise ConfigError(
                f"--workers {arguments.workers}: only pretrain is shared by several processes; "
                f"leave it out for {arguments.stage}"
            )
        if arguments.workers < 1:
            raise ConfigError(f"--workers {arguments.workers}; at least one is needed")
        if arguments.workers > 1:
            launch(arguments.workers, arguments.stage, recipe, str(arguments.recipe), out_dir)
        else:
            stage.run(config, out_dir)
    except (TrainerError, ExportsError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.errno == ENOSPC:  # which names no file
            said = f"{out_dir}: no space left; make room and give the same command again"
        print(f"error: {said}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
