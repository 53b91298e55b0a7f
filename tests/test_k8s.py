"""The manifests, as strictly as an API server with field validation reads them, without one.

An unknown key is an error everywhere: in the built-in kinds, in the RayService, in its pod
templates, in the Serve config inside it, and in the settings of the server inside that.
"""

import gzip
import json
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import jsonschema
import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from serving.haproxy import POD, environment
from serving.settings import Settings

# Ray, imported by some of the tests, still uses what pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

HERE = Path(__file__).parent
BASE = HERE.parent / "k8s" / "base"
KUBERNETES = "1.34"
# What the tests know of kustomize; a new field is added here when a kustomization starts to use it.
KUSTOMIZATION_FIELDS = {"apiVersion", "kind", "resources", "images"}

# What one machine sets and the pods do not, and why.
LEFT_OUT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",  # more than one machine
    "RAY_AUTH_MODE",  # authOptions; the operator makes the token
    "RAY_AUTH_TOKEN",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",  # no GPU
    "RAY_SERVE_LOG_TO_STDERR",  # a pod's log is where an operator looks
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S",  # Kubernetes drains, see preStop: Ray's own are right
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC",  # a pod has a /tmp of its own
    "RAY_SERVE_HAPROXY_SOCKET_PATH",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED",
}

Document = dict[str, Any]


def texts() -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(BASE.glob("*.yaml"))}


def problems(sources: dict[str, str]) -> list[str]:
    """Returns what is wrong with a folder of manifests, given as text by file name."""
    found = []
    for name, source in sources.items():
        document = yaml.safe_load(source)
        found += [f"{name}: {problem}" for problem in document_problems(document)]
        if name == "kustomization.yaml" and set(document.get("resources", ())) != set(sources) - {
            name
        }:
            found.append(f"{name}: resources are not the files of the folder")
    return found


def document_problems(document: Document) -> Iterator[str]:
    if document["kind"] == "Kustomization":
        yield from sorted(document.keys() - KUSTOMIZATION_FIELDS)
    elif document["kind"] == "RayService":
        for error in ray_service_schema().iter_errors(document):
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        # A CRD leaves the metadata open; that of any built-in kind is the same.
        yield from core_problems(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
        )
        for pod in pods(document):
            yield from core_problems(pod)
        yield from serve_problems(document["spec"].get("serveConfigV2", ""))
    else:
        yield from core_problems(document)


def core_problems(document: Document) -> Iterator[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
        yield f"{document['kind']}: {error.message}"


def pods(ray_service: Document) -> list[Document]:
    """Returns the pod templates of a RayService as Pods, which validators know."""
    cluster = ray_service["spec"].get("rayClusterConfig", {})
    groups = [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]
    templates = [group["template"] for group in groups if "template" in group]
    return [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]


@cache
def ray_service_schema() -> jsonschema.Draft202012Validator:
    schema = json.loads(gzip.decompress((HERE / "k8s_schemas" / "rayservice.json.gz").read_bytes()))
    return jsonschema.Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
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
    return converted


def serve_problems(text: str) -> Iterator[str]:
    """Yields what is wrong with a serveConfigV2; Serve itself ignores keys it does not know."""
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(text) or {}
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        yield str(error)
    yield from unknown_keys(config, ServeDeploySchema, "serveConfigV2")
    for application in config.get("applications", []):
        try:
            Settings(**application.get("args", {}))
        except ValidationError as error:
            yield f"args: {error}"
        for deployment in application.get("deployments", []):
            for key in deployment.get("user_config", {}).keys() - {"model"}:
                yield f"user_config: {key}"


def unknown_keys(value: Any, model: type[BaseModel], where: str) -> Iterator[str]:
    for key, inner in value.items():
        if key not in model.model_fields:
            yield f"{where}: unknown key {key}"
            continue
        nested = [
            part
            for part in parts(model.model_fields[key].annotation)
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        for item in inner if isinstance(inner, list) else [inner]:
            if nested and isinstance(item, dict):
                yield from unknown_keys(item, nested[0], f"{where}.{key}")


def parts(annotation: Any) -> Iterator[Any]:
    """Yields an annotation and what stands inside its brackets: of `list[X] | None` also X."""
    yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


def ray_service() -> Document:
    document: Document = yaml.safe_load((BASE / "rayservice.yaml").read_text())
    return document


def test_the_manifests_are_valid() -> None:
    assert problems(texts()) == []


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("kustomization.yaml", "resources:", "resource:"),
        ("kustomization.yaml", "  - networkpolicy.yaml\n", ""),
        ("networkpolicy.yaml", "policyTypes:", "policyType:"),
        ("networkpolicy.yaml", "port: 8000", "port: true"),
        ("poddisruptionbudget.yaml", "minAvailable:", "minAvailible:"),
        ("rayservice.yaml", "labels:", "lables:"),
        ("rayservice.yaml", "serveConfigV2:", "serveConfigV3:"),
        ("rayservice.yaml", "rayVersion:", "rayVerzion:"),
        ("rayservice.yaml", "mode: token", "mode: tokens"),
        ("rayservice.yaml", "groupName: cpu", "groupname: cpu"),
        ("rayservice.yaml", "readinessProbe:", "readynessProbe:"),
        ("rayservice.yaml", "runAsNonRoot: true", "runAsNonRoot: 'yes'"),
        ("rayservice.yaml", "path: /api/healthz", "paths: /api/healthz"),
        ("rayservice.yaml", "cpu: 500m", "cpus: [500m]"),
        ("rayservice.yaml", "proxy_location: EveryNode", "proxy_location: EveryPod"),
        ("rayservice.yaml", "      host: 0.0.0.0", "      hosts: 0.0.0.0"),
        ("rayservice.yaml", "route_prefix: /", "route_prefixes: /"),
        ("rayservice.yaml", "num_replicas: 2", "num_replica: 2"),
        ("rayservice.yaml", "num_replicas: 2", "num_replicas: 0"),
        ("rayservice.yaml", "threads: 2", "treads: 2"),
        ("rayservice.yaml", "provider: cpu", "provider: tpu"),
        ("rayservice.yaml", "model: cutline-base", "modell: cutline-base"),
    ],
)
def test_a_slip_is_found(file: str, right: str, wrong: str) -> None:
    sources = texts()
    assert right in sources[file]
    sources[file] = sources[file].replace(right, wrong, 1)

    assert [problem for problem in problems(sources) if problem.startswith(file)]


def test_the_pods_keep_to_the_restricted_standard() -> None:
    for pod in pods(ray_service()):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC"}
        assert not spec["automountServiceAccountToken"]
        assert all(set(volume) <= {"name", "emptyDir"} for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["readinessProbe"]
            assert container["livenessProbe"]
            assert container["resources"]["limits"].keys() == {"cpu", "memory"}
            assert not any("hostPort" in port for port in container["ports"])


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    ray_version = ray_service()["spec"]["rayClusterConfig"]["rayVersion"]
    (image,) = {container["image"] for pod in pods(ray_service()) for container in containers(pod)}

    assert kustomization["images"] == [{"name": image, "newTag": project["version"]}]
    assert f"ray[serve]=={ray_version}" in project["optional-dependencies"]["server"]


def containers(pod: Document) -> list[Document]:
    return list(pod["spec"]["containers"])


def test_serve_is_set_up_as_on_one_machine() -> None:
    config = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    settings = Settings(**application["args"])
    expected = environment(settings, Path("/tmp"), Path("/tmp/haproxy")) | POD
    assert expected.keys() >= LEFT_OUT

    for pod in pods(ray_service()):
        (container,) = containers(pod)
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables.pop("HOME") == "/tmp"
        assert variables == {name: expected[name] for name in expected.keys() - LEFT_OUT}

    script = Path(POD["RAY_SERVE_HAPROXY_BINARY_PATH"])
    dockerfile = (HERE.parent / "Dockerfile").read_text()
    assert f"write_pod_script(Path('{script.parent}')" in dockerfile.partition("\nUSER ")[0]

    worker = pods(ray_service())[1]["spec"]
    (container,) = worker["containers"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert sleep > settings.deadline_s
    assert worker["terminationGracePeriodSeconds"] > sleep + settings.deadline_s
    assert settings.threads == int(container["resources"]["limits"]["cpu"])


def test_the_deployment_exists_under_its_name() -> None:
    from ray.serve import Application

    from serving.deployment import build

    config = yaml.safe_load(ray_service()["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"

    app = build(Settings(**application["args"]))

    assert isinstance(app, Application)
    assert [entry["name"] for entry in application["deployments"]] == [app._bound_deployment.name]
