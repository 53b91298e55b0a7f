"""The trainer's command line.

python -m trainer STAGE RECIPE [section.key=value ...]
python -m trainer auto DIR [--labels N] [section.key=value ...]
python -m trainer import DIR --name NAME [--registry REGISTRY]
python -m trainer import BUNDLE --out RUN
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from importlib import import_module
from pathlib import Path

from exports.errors import ExportsError
from trainer import variants
from trainer.config import read_recipe, validate
from trainer.distributed import launch
from trainer.errors import ConfigError, TrainerError

_PRESETS = Path(__file__).parent / "recipes"


def main(argv: list[str] | None = None) -> int:
    """Runs one stage or an import; returns 0, or 1 after one line that says what is wrong."""
    argv = sys.argv[1:] if argv is None else argv
    verbs = {"auto": _auto, "import": _import}
    try:
        verbs.get(argv[0] if argv else "", _stage)(argv)
    except (TrainerError, ExportsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _auto(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer auto",
        description="From a folder of photographs to a published captioner, asking for captions.",
    )
    parser.add_argument("images", type=Path, metavar="DIR", help="the photographs")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="scst=false leaves a step out"
    )
    parser.add_argument("--labels", type=int, help="images that you caption (100)")
    parser.add_argument("--answers", type=Path, help="a data set whose captions stand in for you")
    parser.add_argument("--name", help="of the model in the registry (mine)")
    parser.add_argument("--registry", type=Path, help="where it is published (runs/registry)")
    parser.add_argument("--start", type=Path, help="a run that captions already, to learn on from")
    parser.add_argument(
        "--preset", type=Path, help="a recipe (auto.toml; with --start auto_from_start.toml)"
    )
    parser.add_argument("--out", type=Path, help="folder of all that is made (runs/auto)")
    given = vars(parser.parse_intermixed_args(argv[1:]))
    known = _PRESETS / ("auto_from_start.toml" if given["start"] else "auto.toml")
    preset, out_dir = given.pop("preset") or known, given.pop("out") or Path("runs") / "auto"
    recipe = read_recipe(preset, given.pop("overrides"))
    recipe |= {key: value for key, value in given.items() if value is not None}
    # A table that an override calls false, such as pseudo or scst, is a step that is left out.
    recipe = {key: value for key, value in recipe.items() if value is not False}
    stage = variants.load("stages", "auto")
    config = validate(stage.Config, recipe, str(preset))
    with _room_in(out_dir):
        stage.run(config, out_dir)


def _import(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer import",
        description="A captioner that transformers' save_pretrained wrote becomes a bundle; a "
        "bundle becomes a run that learns on.",
    )
    parser.add_argument("folder", type=Path, help="what save_pretrained wrote, or a bundle")
    parser.add_argument("--name", help="of the model in a registry")
    parser.add_argument("--registry", type=Path, help="where to publish it as the next version")
    parser.add_argument("--out", type=Path, help="folder of the bundle or run (runs/<name>)")
    parser.add_argument("--licence", default="not stated", help="of the weights")
    parser.add_argument("--description", help="one line; by default where it came from")
    parser.add_argument(
        "--golden", type=Path, nargs="+", default=(), metavar="PICTURE", help="published with it"
    )
    arguments = vars(parser.parse_args(argv[1:]))
    out_dir = arguments.pop("out") or Path("runs") / (arguments["name"] or "imported")
    importing = import_module("trainer.importing")  # as late as a stage, for what it imports itself
    config = validate(importing.Config, arguments, "import")
    with _room_in(out_dir):
        importing.run(config, out_dir)


def _stage(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=variants.names("stages"))
    parser.add_argument("recipe", type=Path, help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/<recipe name>)")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that share every batch (Ray Train)"
    )
    arguments = parser.parse_intermixed_args(argv)
    stage = variants.load("stages", arguments.stage)
    recipe = read_recipe(arguments.recipe, arguments.overrides)
    config = validate(stage.Config, recipe, str(arguments.recipe))
    out_dir = arguments.out or Path("runs") / arguments.recipe.stem
    if arguments.workers != 1 and arguments.stage != "pretrain":
        raise ConfigError(
            f"--workers {arguments.workers}: only pretrain is shared by several processes; "
            f"leave it out for {arguments.stage}"
        )
    if arguments.workers < 1:
        raise ConfigError(f"--workers {arguments.workers}; at least one is needed")
    with _room_in(out_dir):
        if arguments.workers > 1:
            launch(arguments.workers, arguments.stage, recipe, str(arguments.recipe), out_dir)
        else:
            stage.run(config, out_dir)


@contextmanager
def _room_in(out_dir: Path) -> Iterator[None]:
    """Names the folder where a disk is full, which the system's own error does not."""
    try:
        yield
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        raise TrainerError(
            f"{out_dir}: no space left; make room and give the same command again"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
