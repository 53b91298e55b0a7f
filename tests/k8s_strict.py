"""Tells what an API server with strict field validation refuses, and more.

An unknown key is an error everywhere: in the built-in kinds, in the custom resources, in the pod
templates inside them, in the Serve config inside those, in the settings of the server inside that,
and in tables whose keys are anybody's choice, labels among them, wherever the project knows which
it means.
"""

import gzip
import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import jsonschema
import yaml
from k8s_manifests import HERE, Document, clusters, groups, ray_pods
from pydantic import BaseModel, ValidationError
from referencing import Registry, Resource

from serving.settings import Settings

KUBERNETES = "1.34.0"

DASHBOARD = "grafana_dashboard"
"""The label by which Grafana's sidecar finds a ConfigMap; its files' names end in .json."""

LABELS = {
    "app.kubernetes.io/name",
    "app.kubernetes.io/component",
    "kubernetes.io/metadata.name",
    "pod-security.kubernetes.io/enforce",
    "pod-security.kubernetes.io/audit",
    "pod-security.kubernetes.io/warn",
    DASHBOARD,
}
RESOURCES = {"cpu", "memory", "storage", "nvidia.com/gpu"}
# What an API server takes in these fields, wherever the schemas let any text pass.
WORDS = {
    "accessModes": ("ReadWriteOnce", "ReadWriteMany"),
    "effect": ("NoSchedule",),
    "fsGroupChangePolicy": ("OnRootMismatch",),
    "operator": ("Exists", "In"),
    "policyTypes": ("Ingress", "Egress"),
    "protocol": ("TCP", "UDP"),
    "whenUnsatisfiable": ("ScheduleAnyway",),
    "pod-security.kubernetes.io/enforce": ("restricted",),
    "pod-security.kubernetes.io/audit": ("restricted",),
    "pod-security.kubernetes.io/warn": ("restricted",),
}
CUSTOM_VERSIONS = {
    **dict.fromkeys(("RayService", "RayJob", "RayCronJob"), "ray.io/v1"),
    **dict.fromkeys(("PodMonitor", "PrometheusRule"), "monitoring.coreos.com/v1"),
}
# Of alerts.
ALERT_LABELS = {"severity"}
ALERT_ANNOTATIONS = {"summary", "description", "runbook_url"}


def problems(documents: list[Document]) -> Iterator[str]:
    """Yields what is wrong with a set of objects."""
    for document in documents:
        yield from (f"{document.get('kind')}: {words}" for words in document_problems(document))
        for name in document.get("data", {}) if document.get("kind") == "ConfigMap" else ():
            if document["metadata"].get("labels", {}).get(DASHBOARD) == "1":
                used = name.endswith(".json")
            else:
                others = (other for other in documents if other != document)
                used = any(name in json.dumps(other) for other in others)
            if not used:
                yield f"ConfigMap: nothing uses {name}"


def document_problems(document: Document) -> Iterator[str]:
    """Yields what is wrong with one object."""
    if not {"apiVersion", "kind", "metadata"} <= document.keys():
        yield f"no object: {sorted(document)}"
        return
    yield from free_keys(document)
    yield from wrong_words(document)
    if (HERE / "k8s_schemas" / f"{document['kind'].lower()}.json.gz").exists():
        yield from custom_problems(document)
    else:
        yield from core_problems(document)


def custom_problems(document: Document) -> Iterator[str]:
    if document["apiVersion"] != CUSTOM_VERSIONS[document["kind"]]:
        yield f"apiVersion: {document['apiVersion']}"
    # A CRD leaves the metadata open; that of any built-in kind is the same.
    yield from core_problems(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    )
    for cluster in clusters(document):
        for pod in ray_pods(cluster):
            yield from core_problems(pod)
        for group in groups(cluster):
            unknown = group.get("rayStartParams", {}).keys() - ray_start_options()
            yield from (f"rayStartParams: {name}" for name in sorted(unknown))
    if document["kind"] == "RayService":
        yield from serve_problems(document.get("spec", {}).get("serveConfigV2", ""))
    for error in custom_schema(document["kind"]).iter_errors(document):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"


def core_problems(document: Document) -> tuple[str, ...]:
    return _core_problems(json.dumps(document))


@cache
def _core_problems(text: str) -> tuple[str, ...]:
    document = json.loads(text)
    try:
        schema = core_schema(document["kind"], document["apiVersion"])
    except FileNotFoundError:
        return (f"no kind {document['kind']} in {document['apiVersion']}",)
    errors = schema.iter_errors(document)
    return tuple(f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors)


@cache
def core_schema(kind: str, version: str) -> jsonschema.Draft202012Validator:
    """Returns the schema of a built-in kind from kubernetes-validate."""
    folder = files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}-local-strict"
    group, _, number = version.rpartition("/")
    place = f"{group.partition('.')[0]}-{number}" if group else number
    schema = json.loads((folder / f"{kind.lower()}-{place}.json").read_text())
    definitions = core_definitions(str(folder))
    registry: Registry[Any] = definitions @ (Resource.from_contents(schema) @ Registry())
    return jsonschema.Draft202012Validator(schema, registry=registry)


@cache
def core_definitions(folder: str) -> Resource[Any]:
    return Resource.from_contents(json.loads(Path(folder, "_definitions.json").read_text()))


@cache
def custom_schema(kind: str) -> jsonschema.Draft202012Validator:
    packed = (HERE / "k8s_schemas" / f"{kind.lower()}.json.gz").read_bytes()
    return jsonschema.Draft202012Validator(strict(json.loads(gzip.decompress(packed)), root=True))


def strict(schema: Any, *, root: bool = False) -> Any:
    """Returns a CRD's schema as JSON Schema under which unknown fields are errors."""
    if not isinstance(schema, dict):
        return schema
    converted = dict(schema)
    if schema.get("x-kubernetes-int-or-string"):
        converted["type"] = ["integer", "string"]
    for key in ("items", "additionalProperties"):
        if key in schema:
            converted[key] = strict(schema[key])
    if "properties" in schema:
        converted["properties"] = {
            name: strict(inner) for name, inner in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            converted.setdefault("additionalProperties", False)
    if root:
        converted["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return converted


@cache
def ray_start_options() -> frozenset[str]:
    from ray.scripts.scripts import start

    return frozenset(name.lstrip("-") for option in start.params for name in option.opts)


def free_keys(value: Any, where: str = "") -> Iterator[str]:
    """Yields keys of tables that Kubernetes leaves open and that the project does not know."""
    known = {
        "labels": ALERT_LABELS if ".rules." in where else LABELS,
        "matchLabels": LABELS,
        "annotations": ALERT_ANNOTATIONS if ".rules." in where else set(),
        "requests": RESOURCES,
        "limits": RESOURCES,
    }
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from free_keys(item, f"{where}.{place}")
    if isinstance(value, dict):
        for key, item in value.items():
            if key in known and isinstance(item, dict):
                yield from (f"{where}.{key}: {name}" for name in sorted(item.keys() - known[key]))
            yield from free_keys(item, f"{where}.{key}")


def wrong_words(value: Any) -> Iterator[str]:
    """Yields what stands where an API server takes certain words only; see `WORDS`."""
    if isinstance(value, list):
        for item in value:
            yield from wrong_words(item)
    if isinstance(value, dict):
        for key, item in value.items():
            found = item if isinstance(item, list) else [item]
            if key in WORDS:
                yield from (f"{key}: {word}" for word in found if word not in WORDS[key])
            yield from wrong_words(item)


@cache
def serve_problems(text: str) -> tuple[str, ...]:
    """Returns what is wrong with a serveConfigV2; Serve itself ignores keys it does not know."""
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(text) or {}
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        return (str(error),)
    found = list(unknown_keys(config, ServeDeploySchema, "serveConfigV2"))
    for application in config.get("applications", []):
        try:
            Settings(**application.get("args", {}))
        except ValidationError as error:
            found.append(f"args: {error}")
        for deployment in application.get("deployments", []):
            try:  # Serve's own schema takes any
                AutoscalingConfig.model_validate(deployment.get("autoscaling_config", {}))
            except ValidationError as error:
                found.append(f"autoscaling_config: {error}")
            unknown = deployment.get("user_config", {}).keys() - {"model"}
            found += (f"user_config: {key}" for key in unknown)
    return tuple(found)


def unknown_keys(value: Any, model: type[BaseModel], where: str) -> Iterator[str]:
    from ray.serve.config import AutoscalingConfig

    for key, inner in value.items():
        if key not in model.model_fields:
            yield f"{where}: unknown key {key}"
            continue
        nested = [
            part
            for part in parts(model.model_fields[key].annotation)
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if key == "autoscaling_config":
            nested = [AutoscalingConfig]
        for item in inner if isinstance(inner, list) else [inner]:
            if nested and isinstance(item, dict):
                yield from unknown_keys(item, nested[0], f"{where}.{key}")


def parts(annotation: Any) -> Iterator[Any]:
    """Yields an annotation and what stands inside its brackets: of `list[X] | None` also X."""
    yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def key_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the way to every key of nested tables; a Serve config's keys are among them."""
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from key_paths(item, (*path, place))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from key_paths(item, (*path, key))
    elif path[-1:] == ("serveConfigV2",):
        yield from key_paths(yaml.safe_load(value), (*path, "<text>"))


def misspelt(value: Any, path: tuple[Any, ...]) -> Any:
    """Returns a copy of nested tables in which one key is spelt wrong."""
    first, *rest = path
    if first == "<text>":
        return yaml.safe_dump(misspelt(yaml.safe_load(value), tuple(rest)))
    if isinstance(value, list):
        return [
            misspelt(item, tuple(rest)) if place == first else item
            for place, item in enumerate(value)
        ]
    if rest:
        return {**value, first: misspelt(value[first], tuple(rest))}
    return {(slip(key) if key == first else key): item for key, item in value.items()}


def slip(word: str) -> str:
    """Returns a word with two letters changed places or, if that changes nothing, one doubled."""
    swapped = re.sub(r"([a-zA-Z])([a-zA-Z])(?!.*[a-zA-Z]{2})", r"\2\1", word)
    return swapped if swapped != word else f"{word}{word[-1]}"
