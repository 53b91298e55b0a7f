"""`python -m serving`: runs the server, or captions files and folders without one."""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ValidationError

from exports.errors import ExportsError
from exports.manifest import Rerank
from serving.errors import CaptionError, KeysRejected
from serving.keys import KeyRing, make_key
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
    command.add_argument("--keys-file", type=Path, metavar="FILE", help="let in its keys alone")
    command.set_defaults(command=_up)

    command = commands.add_parser("key", help="make an API key: print it, and file its hash")
    command.add_argument("name", metavar="NAME", help="whose key it is, for people")
    command.add_argument(
        "--keys-file", type=Path, metavar="FILE", help="default: $CUTLINE_KEYS_FILE"
    )
    command.add_argument("--rate", type=float, help="images a second; default: no limit")
    command.add_argument("--burst", type=float, help="images at once; default: those of a second")
    command.add_argument("--admin", action="store_true", help="also lets in below /v1/admin")
    command.set_defaults(command=_key)

    command = commands.add_parser("caption", parents=[shared], help="caption files or a folder")
    command.add_argument("photos", type=Path, nargs="+", metavar="PHOTO|DIR")
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
    command.add_argument(
        "--out", type=Path, metavar="JSONL", help="append to a file; goes on where it stopped"
    )
    command.add_argument(
        "--sidecar", action="store_true", help="also write photo.txt beside photo.jpg"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace sidecars that somebody else wrote, too"
    )
    command.set_defaults(command=_caption)
    return parser


def _key(arguments: argparse.Namespace, settings: Settings) -> int:
    if settings.keys_file is None:
        raise KeysRejected("Say which file: --keys-file FILE, or CUTLINE_KEYS_FILE.")
    key = make_key(
        settings.keys_file,
        arguments.name,
        rate=arguments.rate,
        burst=arguments.burst,
        admin=arguments.admin,
    )
    print(key)
    print(f"{settings.keys_file} has its hash; the key is shown this once.", file=sys.stderr)
    return 0


def _up(arguments: argparse.Namespace, settings: Settings) -> int:
    if settings.keys_file is not None:
        KeyRing(settings.keys_file)  # says what is wrong with it here, not in a replica
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
    from serving.bulk import caption

    chosen = {name: getattr(arguments, name) for name in _CHOSEN}
    return caption(
        arguments.photos,
        {name: value for name, value in chosen.items() if value is not None},
        settings,
        as_json=arguments.json,
        out=arguments.out,
        sidecar=arguments.sidecar,
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    sys.exit(main())
