"""`python -m exports`: lists, verifies and moves the bundles of a registry."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from exports.bundle import Bundle
from exports.errors import BundleError, ExportsError
from exports.manifest import MANIFEST_FILE
from exports.registry import DEFAULT_REGISTRY, Registry, Resolved, check_place


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 1 after one line of error on stderr."""
    arguments = _parser().parse_args(argv)
    try:
        for line in arguments.command(arguments):
            print(line)
    except ExportsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m exports", description=__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--registry", default=str(DEFAULT_REGISTRY), metavar="DIR", help="default: %(default)s"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", parents=[shared], help="every model and version")
    command.set_defaults(command=_list)

    command = commands.add_parser("verify", help="check every byte of a bundle, or of a model's")
    command.add_argument("path", type=Path, help="a bundle's folder, or a model's folder")
    command.set_defaults(command=_verify)

    command = commands.add_parser("publish", parents=[shared], help="copy a bundle in")
    command.add_argument("path", type=Path, help="a bundle's folder")
    command.add_argument("--model", help="default: the name in its manifest")
    command.add_argument("--version", help="default: one more than the highest")
    command.set_defaults(command=_publish)

    command = commands.add_parser("promote", parents=[shared], help="make a version production")
    command.add_argument("model")
    command.add_argument("version")
    command.set_defaults(command=_promote)

    command = commands.add_parser("rollback", parents=[shared], help="swap production and previous")
    command.add_argument("model")
    command.set_defaults(command=_rollback)
    return parser


def _list(arguments: argparse.Namespace) -> list[str]:
    registry = Registry(arguments.registry)
    lines = []
    for model in registry.models():
        aliases = registry.aliases(model)
        for version in registry.versions(model):
            names = [alias for alias, meant in sorted(aliases.items()) if meant == version]
            lines.append("  ".join([f"{model}@{version}", *names]))
    return lines


def _verify(arguments: argparse.Namespace) -> list[str]:
    path: Path = arguments.path
    if not path.is_dir():
        raise BundleError(f"there is no folder {path}")
    if (path / MANIFEST_FILE).exists():
        return [_described(Bundle.open(path))]
    folders = sorted(
        entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not folders:
        raise BundleError(f"{path} holds neither a {MANIFEST_FILE} nor a folder of a version")
    lines = []
    for folder in folders:
        bundle = Bundle.open(folder)
        check_place(bundle.manifest, Resolved(path.resolve().name, folder.name, folder))
        lines.append(_described(bundle))
    return lines


def _described(bundle: Bundle) -> str:
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    return (
        f"ok  {manifest.name}@{manifest.version}  {len(manifest.files)} files, {size / 1e6:.1f} MB"
        f"  manifest sha256 {bundle.digest}"
    )


def _publish(arguments: argparse.Namespace) -> list[str]:
    published = Registry(arguments.registry).publish(
        arguments.path, model=arguments.model, version=arguments.version
    )
    return [f"published {published.reference} at {published.path}"]


def _promote(arguments: argparse.Namespace) -> list[str]:
    promoted = Registry(arguments.registry).promote(arguments.model, arguments.version)
    return [f"{promoted.reference} is production now"]


def _rollback(arguments: argparse.Namespace) -> list[str]:
    restored = Registry(arguments.registry).rollback(arguments.model)
    return [f"{restored.reference} is production again"]


if __name__ == "__main__":
    sys.exit(main())
