"""`python -m serving`: runs the server, or captions files without one."""

import argparse
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from exports.errors import ExportsError
from exports.manifest import Rerank
from exports.remote import open_source
from serving.captioner import SLOTS, Captioner
from serving.decode_image import ImageLimits, decode_image
from serving.errors import CaptionError, UndecodableImage
from serving.params import Caption, Params
from serving.schema import CaptionAnswer
from serving.session import Pixels
from serving.settings import Settings

_CHOSEN = ("num_beams", "num_captions", "max_new_tokens", "length_penalty", "prefix", "rerank")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 1 after an error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        given = {name: getattr(arguments, name, None) for name in Settings.model_fields}
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
        return int(arguments.command(arguments, settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        print(f"error: {where}: {first['msg']}", file=sys.stderr)
    except (ExportsError, CaptionError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--registry", metavar="DIR", help="or a URL; default: the packaged models")
    shared.add_argument("--model", help="name, name@version or name@alias; default: cutline-base")
    shared.add_argument("--threads", type=int, help="default: the number of cores")
    shared.add_argument("--provider", choices=("cpu", "cuda", "auto"), help="default: auto")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("up", parents=[shared], help="serve until interrupted")
    command.add_argument("--host", help="default: 127.0.0.1")
    command.add_argument("--port", type=int, help="default: 8000")
    command.add_argument("--local", action="store_true", help="one plain process, without Ray")
    command.set_defaults(command=_up)

    command = commands.add_parser("caption", parents=[shared], help="caption files")
    command.add_argument("photos", type=Path, nargs="+", metavar="PHOTO")
    command.add_argument("--num-beams", type=int)
    command.add_argument("--num-captions", type=int)
    command.add_argument("--max-new-tokens", type=int)
    command.add_argument("--length-penalty", type=float)
    command.add_argument("--prefix", help="words that each caption must begin with")
    command.add_argument(
        "--rerank",
        choices=get_args(Rerank),
        help="sort captions by how well each fits; needs a model with a matcher",
    )
    command.add_argument("--json", action="store_true", help="one JSON object a photo")
    command.set_defaults(command=_caption)
    return parser


def _up(arguments: argparse.Namespace, settings: Settings) -> int:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        socket.create_server((settings.host, settings.port), family=family).close()
    except OSError as error:
        print(f"error: {settings.host}:{settings.port}: {error.strerror}", file=sys.stderr)
        return 1
    # Imported here: `caption` needs no web server, and Ray reads its environment while it loads.
    if arguments.local:
        from serving.local import serve

        serve(settings)
    else:
        from serving.deployment import up

        up(settings)
    return 0


def _caption(arguments: argparse.Namespace, settings: Settings) -> int:
    source = open_source(settings.registry, settings.cache)
    with source.held(source.find(settings.model).resolved) as path:
        captioner = Captioner.load(path, threads=settings.threads, provider=settings.provider)
    chosen = {name: getattr(arguments, name) for name in _CHOSEN}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    params = Params.of(captioner.manifest.defaults, **chosen)
    captioner.check(params)
    failed = False
    for path, result in _captioned(arguments.photos, captioner, params, settings):
        if isinstance(result, CaptionError):
            print(f"error: {path}: {result.detail}", file=sys.stderr, flush=True)
            failed = True
        else:
            print(_json(path, result) if arguments.json else _text(path, result), flush=True)
    return int(failed)


def _captioned(
    paths: Sequence[Path], captioner: Captioner, params: Params, settings: Settings
) -> Iterator[tuple[Path, list[Caption] | CaptionError]]:
    """Yields each file with its captions or what was wrong with it, in order, batch by batch."""
    limits = ImageLimits(max_pixels=settings.max_pixels)
    remaining = iter(paths)
    while batch := list(islice(remaining, SLOTS)):
        decoded = [_decoded(path, captioner, limits) for path in batch]
        good = [pixels for pixels in decoded if not isinstance(pixels, CaptionError)]
        captions = iter(captioner.caption_batch(good, [params] * len(good)) if good else ())
        for path, pixels in zip(batch, decoded, strict=True):
            yield path, pixels if isinstance(pixels, CaptionError) else next(captions)


def _decoded(path: Path, captioner: Captioner, limits: ImageLimits) -> Pixels | CaptionError:
    try:
        return decode_image(path.read_bytes(), captioner.image_spec, limits)
    except CaptionError as error:
        return error
    except OSError as error:
        return UndecodableImage(error.strerror or "cannot be read")


def _text(path: Path, captions: list[Caption]) -> str:
    if len(captions) == 1:
        return f"{path}: {captions[0].text}"
    rows = (f"  {caption.score:7.3f}  {caption.text}" for caption in captions)
    return "\n".join((f"{path}:", *rows))


def _json(path: Path, captions: list[Caption]) -> str:
    answers = [CaptionAnswer.model_validate(caption).model_dump() for caption in captions]
    return json.dumps({"file": str(path), "captions": answers}, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
