"""What the benchmarks have in common: their arguments, their photographs, their tables."""

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib import metadata
from io import BytesIO
from pathlib import Path

from PIL import Image

from exports.errors import ExportsError
from serving.errors import CaptionError

ROOT = Path(__file__).parents[1]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif"}
NO_RUN = (
    "{}: no training run, and `generate` needs its checkpoint: a bundle holds graphs only. Train "
    "one as trainer/recipes/flickr8k/base.toml says, or add --tiny to see it run on random weights "
    "and a small model"
)


class UsageError(Exception):
    """What the command line names is not there, or does not run."""


def parser(document: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=document.partition("\n")[0])
    made.add_argument(
        "--bundle", type=Path, default=Path("exports/models/cutline-base/2"), help="what is served"
    )
    made.add_argument("--images", type=Path, help="a folder of photographs")
    made.add_argument("--tiny", action="store_true", help="random weights, drawn pictures")
    made.add_argument("--threads", type=int, default=2, help="of each side")
    return made


def compares(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the arguments of a benchmark that compares with `generate`, round after round."""
    made.add_argument("--run", type=Path, default=Path("runs/base"), help="the bundle's run")
    made.add_argument("--count", type=int, default=500, help="images, at most")
    made.add_argument("--rounds", type=int, default=3)
    return made


def main(
    benchmark: Callable[[argparse.Namespace, ExitStack], None],
    arguments: argparse.Namespace,
    *expected: type[Exception],
) -> int:
    """Runs a benchmark; returns 1 after an error on stderr that is ours or expected."""
    # Servers have sessions of their own: whoever ends the benchmark ends them through it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with ExitStack() as stack:
            if arguments.tiny:
                make_tiny(arguments, Path(stack.enter_context(tempfile.TemporaryDirectory())))
            benchmark(arguments, stack)
    except (UsageError, ExportsError, CaptionError, *expected) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make_tiny(arguments: argparse.Namespace, folder: Path) -> None:
    """Lets the arguments name a run that nobody trained, its bundle, and drawn pictures."""
    from random_run import random_run  # here: what needs no PyTorch need not load it

    arguments.run, arguments.bundle, drawn = random_run(folder)
    arguments.images = arguments.images or drawn


def check_run(folder: Path) -> None:
    """Raises UsageError if a folder is no training run; loads no PyTorch to say so."""
    if not (folder / "recipe.json").exists():
        raise UsageError(NO_RUN.format(folder))


def photographs(folder: Path | None, count: int) -> list[Path]:
    """Returns the first `count` image files of a folder, by name.

    Raises:
        UsageError: There is no such folder, or no image in it.
    """
    if folder is None or not folder.is_dir():
        raise UsageError("name a folder of photographs with --images")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)[:count]
    if not paths:
        raise UsageError(f"{folder}: no {', '.join(sorted(SUFFIXES))} in there")
    return paths


def as_jpeg(path: Path, *, long_side: int | None = None) -> bytes:
    """Returns a photograph as a camera or a browser would send it; scaled if a side is given."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    if long_side:
        scale = long_side / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size])
    body = BytesIO()
    picture.save(body, "JPEG", quality=90)
    return body.getvalue()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("| --- ", "|---") for cells in lines)


def machine(threads: int, rounds: str, packages: Sequence[str]) -> str:
    """Returns the line that says where the figures come from."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return (
        f"{os.cpu_count()} cores of {(names or [platform.processor()])[0]}, {threads} "
        f"threads a side, {rounds}; Python {platform.python_version()}, {versions}"
    )
