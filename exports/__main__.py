"""`python -m exports`: lists, verifies and moves the bundles of a registry."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from exports.bundle import Bundle
from exports.errors import BundleError, ExportsError, RegistryError
from exports.manifest import MANIFEST_FILE
from exports.registry import DEFAULT_REGISTRY, Registry, Resolved, check_place
from exports.shadow_plan import ShadowPlan


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

    command = commands.add_parser(
        "shadow",
        parents=[shared],
        help="let a version answer a share of the live requests too, and compare",
        description=(
            "Lets a version answer a share of the live requests too: clients never see its "
            "captions. Without a version, shows the shadow that there is."
        ),
    )
    command.add_argument("model")
    command.add_argument("version", nargs="?", help="a version or an alias")
    plan = ShadowPlan.model_fields
    for name, words in (
        ("share", "of the requests"),
        ("min_requests", "before anything is decided"),
        ("max_disagreement", "1 less the mean overlap of the words of both captions"),
        ("max_slowdown", "median seconds over those of the version that serves"),
    ):
        default = plan[name].default
        command.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar="N",
            help=f"{words}; default: %(default)s",
        )
    command.add_argument(
        "--auto", action="store_true", help="promote or refuse it by these thresholds"
    )
    command.add_argument("--stop", action="store_true", help="end the shadow that there is")
    command.set_defaults(command=_shadow)
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


def _shadow(arguments: argparse.Namespace) -> list[str]:
    registry, model = Registry(arguments.registry), arguments.model
    if arguments.stop:
        ended = registry.stop_shadow(model)
        return [f"{model}@{ended.version} is no shadow any more" if ended else _no_shadow(model)]
    if arguments.version is None:
        registry.resolve(model)  # it is there
        plan = registry.shadow(model)
        return [_no_shadow(model) if plan is None else _shadow_described(model, plan)]
    names = ShadowPlan.model_fields.keys() - {"verdict"}
    try:
        plan = ShadowPlan(**{name: getattr(arguments, name) for name in names})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        flag = f"--{first['loc'][0]}".replace("_", "-")
        raise RegistryError(f"{flag}: {first['msg']}") from error
    placed = registry.set_shadow(model, plan)
    return [_shadow_described(model, plan.model_copy(update={"version": placed.version}))]


def _no_shadow(model: str) -> str:
    return f"{model} has no shadow"


def _shadow_described(model: str, plan: ShadowPlan) -> str:
    decides = "promotes or refuses it" if plan.auto else "decides nothing"
    said = plan.verdict or (
        f"after {plan.min_requests} requests a server {decides}: disagreement at most"
        f" {plan.max_disagreement:g}, slowdown at most {plan.max_slowdown:g}"
    )
    return f"{model}@{plan.version} is asked {plan.share:.0%} of the requests too; {said}"


if __name__ == "__main__":
    sys.exit(main())
