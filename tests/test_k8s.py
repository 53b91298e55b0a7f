"""The manifests: valid as an API server reads them, closed as the docs say, true to the server."""

import json
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_manifests import (
    HERE,
    K8S,
    KUSTOMIZATIONS,
    Document,
    clusters,
    custom_schema,
    groups,
    key_paths,
    misspelt,
    pods,
    problems,
    reached,
    render,
)

from exports.registry import DEFAULT_REGISTRY, Registry
from serving.haproxy import POD, environment
from serving.metrics import Metrics
from serving.settings import Settings

# Ray, imported by some of the tests, still uses what pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = HERE.parent
OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/dev")
SERVICE_PORT = 8000
# Ray's GCS, dashboard and client, its agents, and HAProxy's status pages.
CLOSED_PORTS = (6379, 8265, 10001, 52365, 8080, 9101, 8404)
STRANGERS: dict[str, Document] = {
    "nobody": {},
    "a neighbour": {"namespace": "cutline", "labels": {"app.kubernetes.io/name": "other"}},
    "another tenant": {
        "namespace": "default",
        "labels": {"app.kubernetes.io/name": "cutline", "app.kubernetes.io/component": "head"},
    },
    "a false operator": {
        "namespace": "default",
        "labels": {"app.kubernetes.io/name": "kuberay-operator"},
    },
}

# What one machine sets and the pods do not, and why.
LEFT_OUT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",  # more than one machine
    "RAY_AUTH_MODE",  # authOptions; the operator makes the token
    "RAY_AUTH_TOKEN",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",  # a worker with a GPU asks for it
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
# What the pods set and one machine does not.
ADDED = {"HOME": "/tmp", "CUTLINE_REGISTRY": "/registry"}


@cache
def rendered(name: str) -> list[Document]:
    return render(K8S / name)


def of_kind(kind: str, documents: list[Document]) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def ray_service(overlay: str) -> Document:
    [found] = of_kind("RayService", rendered(overlay))
    return found


def application(overlay: str) -> Document:
    config = yaml.safe_load(ray_service(overlay)["spec"]["serveConfigV2"])
    [found] = config["applications"]
    assert isinstance(found, dict)
    return found


def everything(tmp_path: Path, *resources: str, components: tuple[str, ...] = ()) -> list[Document]:
    """Returns a kustomization of ours, rendered beside a copy of the project's."""
    tree = tmp_path / "k8s"
    if not tree.exists():
        shutil.copytree(K8S, tree)
    (tree / "all").mkdir(exist_ok=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"../{name}" for name in resources],
        "components": [f"../{name}" for name in components],
    }
    (tree / "all/kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(tree / "all")


def slips(tmp_path: Path, *resources: str, components: tuple[str, ...] = ()) -> list[str]:
    """Returns what kubectl or an API server has against a kustomization of ours."""
    try:
        return list(problems(everything(tmp_path, *resources, components=components)))
    except ValueError as error:
        return [str(error)]


def test_every_kustomization_is_rendered_by_these_tests() -> None:
    found = {path.parent.relative_to(K8S).as_posix() for path in K8S.rglob("kustomization.yaml")}
    parts = {name for name in found if name.startswith("components/")} | {"base", "images"}
    assert found == {*KUSTOMIZATIONS, *parts}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_is_valid(name: str) -> None:
    assert rendered(name)
    assert list(problems(rendered(name))) == []


def test_the_kinds_that_are_asked_for_are_there() -> None:
    kinds = {document["kind"] for name in KUSTOMIZATIONS for document in rendered(name)}
    wanted = "RayService RayJob RayCronJob PersistentVolumeClaim NetworkPolicy PodMonitor Namespace"
    assert kinds >= {*wanted.split(), "PrometheusRule", "PodDisruptionBudget", "Deployment"}


def test_models_may_lie_in_a_bucket(tmp_path: Path) -> None:
    documents = everything(
        tmp_path, "overlays/gpu", "storage", "retrain", components=("components/s3",)
    )
    assert list(problems(documents)) == []
    containers = [one for pod in pods(documents) for one in all_containers(pod)]
    addresses = {
        entry["value"]
        for one in containers
        for entry in one.get("env", ())
        if entry["name"] == "CUTLINE_REGISTRY"
    }
    assert addresses == {"s3://cutline-models/registry"}
    assert "cutline-registry" not in json.dumps(documents)
    for pod in pods(documents):
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounts = {mount["name"] for one in all_containers(pod) for mount in one["volumeMounts"]}
        assert mounts == volumes
    # Who reads or writes the bucket has its key; the head, which does neither, has not.
    with_key = [one["name"] for one in containers if "cutline-s3" in json.dumps(one)]
    assert len(with_key) == 5, with_key


def test_keys_may_be_asked_for(tmp_path: Path) -> None:
    documents = everything(tmp_path, "overlays/cpu", components=("components/keys",))
    assert list(problems(documents)) == []
    [service] = of_kind("RayService", documents)
    head, worker = pods([service])
    for container in (head["spec"]["containers"][0], worker["spec"]["containers"][0]):
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables["CUTLINE_KEYS_FILE"] == "/etc/cutline/keys.json"
    [mount] = [
        mount
        for mount in worker["spec"]["containers"][0]["volumeMounts"]
        if mount["mountPath"] == "/etc/cutline"
    ]
    [volume] = [one for one in worker["spec"]["volumes"] if one["name"] == mount["name"]]
    assert volume["secret"]["optional"] is False, "without keys no worker, rather than an open one"


def planted() -> list[tuple[str, int, tuple[Any, ...]]]:
    """Returns every key of every object, and where it stands."""
    seen = set()
    found = []
    for name in KUSTOMIZATIONS:
        for place, document in enumerate(rendered(name)):
            for path in key_paths(document):
                mark = (document["kind"], document["metadata"]["name"], path)
                if mark not in seen and "jobTemplate" not in path[:-1]:  # RayJob's own
                    seen.add(mark)
                    found.append((name, place, path))
    return found


def not_found(slips: list[tuple[str, int, tuple[Any, ...]]]) -> list[str]:
    missed = []
    for name, place, path in slips:
        right = rendered(name)
        wrong = misspelt(right[place], path)
        if next(problems([wrong, *right[:place], *right[place + 1 :]]), None) is None:
            missed.append(f"{name} {right[place]['kind']}: {'.'.join(map(str, path))}")
    return missed


def test_a_misspelt_key_is_found() -> None:
    """One key of each name and each place; list items with the same keys are as one."""
    first: dict[Any, tuple[str, int, tuple[Any, ...]]] = {}
    for name, place, path in planted():
        kind = rendered(name)[place]["kind"]
        first.setdefault(
            (kind, *(part for part in path if isinstance(part, str))), (name, place, path)
        )
    assert len(first) > 300
    assert not_found(list(first.values())) == []


@pytest.mark.slow
def test_any_misspelt_key_is_found() -> None:
    assert not_found(planted()) == []


SOURCES = sorted(path.relative_to(K8S).as_posix() for path in K8S.rglob("*.yaml"))


@pytest.mark.parametrize("file", SOURCES)
def test_a_slip_in_any_file_is_found(file: str, tmp_path: Path) -> None:
    """The last key of a file, patches and kustomizations among them, through kubectl."""
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / file
    text = path.read_text()
    [*_, last] = re.finditer(r"^( *(?:- )*)([a-zA-Z]+):(?= |$)", text, re.MULTILINE)
    path.write_text(f"{text[: last.start(2)]}{last[2]}{last[2][-1]}{text[last.end(2) :]}")

    folder = "/".join(file.split("/")[:2])
    components = (folder,) if folder in ("components/s3", "components/keys") else ()
    user = next(
        (
            (name,)
            for folder, name in (
                ("components/gpu", "overlays/gpu"),
                ("overlays/gpu", "overlays/gpu"),
                ("overlays/dev", "overlays/dev"),
                ("storage", "storage"),
                ("retrain-weekly", "retrain-weekly"),
                ("retrain", "retrain"),
            )
            if file.startswith(f"{folder}/")
        ),
        ("overlays/cpu", "storage", "retrain") if components else ("overlays/cpu",),
    )
    assert slips(tmp_path, *user, components=components), f"{last[2]} in {file}"


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("base/kustomization.yaml", "- networkpolicy.yaml", "- networkpolicies.yaml"),
        ("base/networkpolicy.yaml", "port: 8000", "port: true"),
        ("base/rayservice.yaml", "mode: token", "mode: tokens"),
        ("base/rayservice.yaml", "version: v2", "version: v3"),
        ("base/rayservice.yaml", "runAsNonRoot: true", "runAsNonRoot: 'yes'"),
        ("base/rayservice.yaml", "memory: 2Gi", "memory: [2Gi]"),
        ("base/rayservice.yaml", "dashboard-host:", "dashboard-hosts:"),
        ("base/rayservice.yaml", "proxy_location: EveryNode", "proxy_location: EveryPod"),
        ("base/rayservice.yaml", "min_replicas: 2", "min_replicas: -2"),
        ("base/rayservice.yaml", "threads: 2", "threads: two"),
        ("base/rayservice.yaml", "provider: cpu", "provider: tpu"),
    ],
)
def test_a_wrong_value_is_found(file: str, right: str, wrong: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong, 1))
    assert slips(tmp_path, "overlays/cpu")


def all_containers(pod: Document) -> list[Document]:
    spec = pod["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_pod_keeps_to_the_restricted_standard(name: str) -> None:
    for pod in pods(rendered(name)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"}
        assert spec["automountServiceAccountToken"] is False
        kinds = {kind for volume in spec["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret", "configMap", "projected"}
        for one in all_containers(pod):
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert one["resources"]["limits"].keys() >= {"cpu", "memory"}
            assert one["resources"]["requests"].keys() == one["resources"]["limits"].keys()
            assert not any("hostPort" in port for port in one.get("ports", ()))


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_only_the_autoscaler_holds_a_token(name: str) -> None:
    holders = [
        one["name"]
        for pod in pods(rendered(name))
        for volume in pod["spec"]["volumes"]
        if "projected" in volume
        for one in all_containers(pod)
        if volume["name"] in {mount["name"] for mount in one["volumeMounts"]}
    ]
    assert holders == (["autoscaler"] if name in ("overlays/cpu", "overlays/gpu") else [])


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_ray_is_closed_and_probed(name: str) -> None:
    for document in rendered(name):
        for cluster in clusters(document):
            assert cluster["authOptions"] == {"mode": "token"}
            for group in groups(cluster):
                [container] = group["template"]["spec"]["containers"]
                assert container.keys() >= {"startupProbe", "readinessProbe", "livenessProbe"}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_image_is_pinned(name: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {one["image"] for pod in pods(rendered(name)) for one in all_containers(pod)}
    assert images
    for image in images:
        assert re.fullmatch(rf"cutline/(serving|serving-gpu|trainer):{re.escape(version)}", image)


def test_images_are_named_in_one_place(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s/images/kustomization.yaml"
    path.write_text(path.read_text().replace("newName: ", "newName: registry.example/"))
    for name in KUSTOMIZATIONS:
        for pod in pods(everything(tmp_path, name)):
            for one in all_containers(pod):
                assert one["image"].startswith("registry.example/cutline/")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_service_leads_to_what_is_closed(overlay: str) -> None:
    """KubeRay's Service for Serve has those ports of the head whose name begins with serve."""
    assert of_kind("Service", rendered(overlay)) == []
    spec = ray_service(overlay)["spec"]
    assert "serveService" not in spec
    assert spec["excludeHeadPodFromServeSvc"] is True
    head, *workers = groups(spec["rayClusterConfig"])
    assert "serviceType" not in head, "ClusterIP"
    for group in (head, *workers):
        ports = group["template"]["spec"]["containers"][0]["ports"]
        serving = [port["containerPort"] for port in ports if port["name"].startswith("serve")]
        assert serving == [SERVICE_PORT]


def ports_of(policies: list[Document]) -> set[int]:
    """Returns every port that a policy names; all others are alike."""
    rules = [rule for policy in policies for rule in policy["spec"].get("ingress", ())]
    return {one["port"] for rule in rules for one in rule.get("ports", ())}


def labels_of(overlay: str) -> dict[str, dict[str, str]]:
    head, worker = pods([ray_service(overlay)])
    return {"head": head["metadata"]["labels"], "worker": worker["metadata"]["labels"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("who", STRANGERS)
def test_a_stranger_reaches_the_captioning_port_alone(overlay: str, who: str) -> None:
    policies = of_kind("NetworkPolicy", rendered(overlay))
    pod = labels_of(overlay)
    ports = {SERVICE_PORT, *CLOSED_PORTS, *ports_of(policies)}
    found = {port for port in ports if reached(policies, pod["worker"], STRANGERS[who], port)}
    assert found == {SERVICE_PORT}
    assert not any(reached(policies, pod["head"], STRANGERS[who], port) for port in CLOSED_PORTS)
    assert not reached(policies, pod["head"], STRANGERS[who], SERVICE_PORT)
    admin = {"app.kubernetes.io/name": "cutline-admin"}
    assert not any(reached(policies, admin, STRANGERS[who], port) for port in CLOSED_PORTS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_those_who_must_get_in_do(overlay: str) -> None:
    policies = of_kind("NetworkPolicy", rendered(overlay))
    pod = labels_of(overlay)
    peer = {"namespace": "cutline", "labels": pod["worker"]}
    operator = {
        "namespace": "kuberay-system",
        "labels": {"app.kubernetes.io/name": "kuberay-operator"},
    }
    prometheus = {"namespace": "monitoring", "labels": {"app.kubernetes.io/name": "prometheus"}}
    assert all(reached(policies, pod["head"], peer, port) for port in (6379, 8265, 40000))
    assert all(reached(policies, pod["head"], operator, port) for port in (8265, 8000))
    assert not any(reached(policies, pod["head"], operator, port) for port in (6379, 10001))
    scraped = metrics_port(overlay)
    assert reached(policies, pod["worker"], prometheus, scraped)
    assert not reached(policies, pod["worker"], prometheus, 8265)


def test_retraining_is_closed_too() -> None:
    """Also in a namespace without the service's default."""
    policies = of_kind("NetworkPolicy", rendered("retrain"))
    [pod] = pods(rendered("retrain"))
    labels = pod["metadata"]["labels"]
    for stranger in STRANGERS.values():
        ports = {SERVICE_PORT, *CLOSED_PORTS, *ports_of(policies)}
        assert not any(reached(policies, labels, stranger, port) for port in ports)


def metrics_port(overlay: str) -> int:
    """Returns the number of the port that the PodMonitor names."""
    [monitor] = of_kind("PodMonitor", rendered("overlays/cpu"))
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    _, worker = pods([ray_service(overlay)])
    ports = {
        port["name"]: port["containerPort"] for port in worker["spec"]["containers"][0]["ports"]
    }
    return int(ports[endpoint["port"]])


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_what_is_named_is_there(name: str) -> None:
    """Selectors select, volumes are claimed, mounts have volumes, probes have ports."""
    documents = rendered(name)
    own = [
        pod["metadata"]["labels"] for pod in pods(rendered("overlays/cpu") + rendered("storage"))
    ]
    own += [pod["metadata"]["labels"] for pod in pods(documents)]
    for document in documents:
        assert document.get("metadata", {}).get("namespace", "cutline") == "cutline"
        for kind, field in (("NetworkPolicy", "podSelector"), ("PodMonitor", "selector")):
            if document["kind"] == kind and (selector := document["spec"][field]):
                assert any(selector["matchLabels"].items() <= labels.items() for labels in own)
    claims = {
        one["metadata"]["name"] for one in of_kind("PersistentVolumeClaim", rendered("storage"))
    }
    for pod in pods(documents):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
            if "configMap" in volume:
                names = {one["metadata"]["name"] for one in of_kind("ConfigMap", documents)}
                assert volume["configMap"]["name"] in names
            if "secret" in volume:
                assert volume["secret"] == {
                    "secretName": "cutline-keys",
                    "optional": True,
                    "defaultMode": 0o440,
                    "items": [{"key": "keys.json", "path": "keys.json"}],
                }
        for one in all_containers(pod):
            assert {mount["name"] for mount in one["volumeMounts"]} <= volumes.keys()
            ports = {port["name"] for port in one.get("ports", ())}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                port = one.get(probe, {}).get("httpGet", {}).get("port", 52365)
                assert port == 52365 or port in ports


def test_the_server_cannot_write_the_registry() -> None:
    for overlay in OVERLAYS:
        _, worker = pods([ray_service(overlay)])
        for one in all_containers(worker):
            [mount] = [mount for mount in one["volumeMounts"] if mount["name"] == "registry"]
            assert mount == {"name": "registry", "mountPath": "/registry", "readOnly": True}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_is_set_up_as_on_one_machine(overlay: str) -> None:
    settings = Settings(**application(overlay)["args"])
    expected = environment(settings, Path("/tmp"), Path("/tmp/haproxy")) | POD | ADDED
    assert expected.keys() >= LEFT_OUT
    head, worker = pods([ray_service(overlay)])
    for container in (head["spec"]["containers"][0], *all_containers(worker)):
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables == {name: expected[name] for name in expected.keys() - LEFT_OUT}

    script = Path(POD["RAY_SERVE_HAPROXY_BINARY_PATH"])
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"write_pod_script(Path('{script.parent}')" in dockerfile.partition("\nUSER ")[0]

    [container] = worker["spec"]["containers"]
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert sleep > settings.deadline_s
    assert worker["spec"]["terminationGracePeriodSeconds"] > sleep + settings.deadline_s
    limits = container["resources"]["limits"]
    assert settings.threads == int(limits["cpu"])
    assert (settings.provider == "cuda") == ("nvidia.com/gpu" in limits)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_scale_with_replicas(overlay: str) -> None:
    spec = ray_service(overlay)["spec"]["rayClusterConfig"]
    [deployment] = application(overlay)["deployments"]
    [workers] = spec["workerGroupSpecs"]
    scaling = deployment.get("autoscaling_config")
    assert deployment["max_replicas_per_node"] == 1
    if scaling is None:
        assert overlay == "overlays/dev" and not spec["enableInTreeAutoscaling"]
        assert deployment["num_replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 1
        return
    assert spec["enableInTreeAutoscaling"]
    assert scaling["min_replicas"] == workers["minReplicas"] == workers["replicas"] >= 2
    assert scaling["max_replicas"] == workers["maxReplicas"] > scaling["min_replicas"]
    [budget] = of_kind("PodDisruptionBudget", rendered(overlay))
    assert budget["spec"]["minAvailable"] < workers["minReplicas"], "no node could be drained"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_deployment_exists_under_its_name(overlay: str) -> None:
    from ray.serve import Application

    from serving.deployment import build

    found = application(overlay)
    assert found["import_path"] == f"{build.__module__}:{build.__name__}"
    app = build(Settings(**found["args"]))
    assert isinstance(app, Application)
    [deployment] = found["deployments"]
    assert deployment["name"] == app._bound_deployment.name
    scaling = deployment.get("autoscaling_config", {})
    assert scaling.get("target_ongoing_requests", 1) < app._bound_deployment.max_ongoing_requests


def test_ray_s_version_is_the_image_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in KUSTOMIZATIONS:
        for document in rendered(name):
            for cluster in clusters(document):
                pin = f"ray[serve]=={cluster['rayVersion']}"
                assert pin in project["optional-dependencies"]["server"]


def test_alerts_ask_for_metrics_that_are_exported() -> None:
    page = Metrics().page().decode()
    exported = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    exported |= {f"{name}{end}" for name in exported for end in ("_bucket", "_sum", "_count")}
    [rule] = of_kind("PrometheusRule", rendered("overlays/cpu"))
    rules = [one for group in rule["spec"]["groups"] for one in group["rules"]]
    assert rules
    for one in rules:
        asked = set(re.findall(r"\bcutline_\w+", one["expr"]))
        assert asked and asked <= exported, one["alert"]


def test_weekly_runs_what_a_run_by_hand_runs() -> None:
    [job] = of_kind("RayJob", rendered("retrain"))
    weekly = rendered("retrain-weekly")
    [cron] = of_kind("RayCronJob", weekly)
    assert cron["spec"]["jobTemplate"] == job["spec"]
    assert of_kind("RayJob", weekly) == [], "it would run at once"
    assert custom_schema("RayCronJob")


def script_of(documents: list[Document], kind: str, container: str) -> str:
    [found] = [
        one
        for pod in pods(of_kind(kind, documents))
        for one in all_containers(pod)
        if one["name"] == container
    ]
    return str(found["command"][-1])


def run_shell(script: str, place: Path, environment_of: dict[str, str], *arguments: str) -> str:
    """Runs a script of a manifest with this Python; returns what it printed."""
    import os
    import sys

    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = subprocess.run(
        ["sh", "-euc", script, "sh", *arguments],
        cwd=place,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment_of},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_an_empty_registry_gets_the_first_model_as_production(tmp_path: Path) -> None:
    script = script_of(rendered("storage"), "Deployment", "first-model")
    variables = {"CUTLINE_REGISTRY": str(tmp_path)}
    run_shell(script, tmp_path, variables)
    assert Registry(tmp_path).aliases("cutline-base") == {"production": "1"}
    # What is published now waits; and a second start changes nothing.
    Registry(tmp_path).publish(DEFAULT_REGISTRY / "cutline-base" / "1")
    run_shell(script, tmp_path, variables)
    assert Registry(tmp_path).versions("cutline-base") == ["1", "2"]
    assert Registry(tmp_path).resolve("cutline-base").version == "1"

    wait = script_of(rendered("overlays/cpu"), "RayService", "first-model")
    run_shell(wait, tmp_path, variables)


@pytest.mark.slow
def test_a_retraining_publishes_and_promotes_nothing(tmp_path: Path) -> None:
    """The script of the job, on drawings, with a preset of minutes made shorter still."""
    import sys

    script = (K8S / "retrain/retrain.sh").read_text()
    [job] = of_kind("RayJob", rendered("retrain"))
    assert job["spec"]["entrypoint"] == "sh /etc/cutline/retrain.sh"
    recipes = ROOT / "trainer/recipes"
    drawings = ["shapecaps", str(recipes / "tiny/shapecaps.toml"), "--out", str(tmp_path / "made")]
    run_shell(f'{sys.executable} -m trainer "$@"', tmp_path, {}, *drawings)
    (tmp_path / "photos").symlink_to(tmp_path / "made/images")
    (tmp_path / "captions.json").symlink_to(tmp_path / "made/captions_train.json")
    registry = tmp_path / "registry"
    Registry(registry).publish(DEFAULT_REGISTRY / "cutline-base" / "1", model="mine")
    Registry(registry).promote("mine", "1")
    [pod] = pods([job])
    named = {entry["name"] for entry in pod["spec"]["containers"][0]["env"]}
    variables = {
        "CUTLINE_REGISTRY": str(registry),
        "DATA": str(tmp_path),
        "LABELS": "40",
        "MODEL": "mine",
        "PRESET": str(recipes / "tiny/auto.toml"),
    }
    assert variables.keys() <= named
    fewer = ("pseudo=false", "scst=false", "pretrain.loop.epochs=1", "finetune.loop.epochs=2")
    run_shell(script, tmp_path, variables, *fewer)

    assert Registry(registry).versions("mine") == ["1", "2"]
    assert Registry(registry).aliases("mine") == {"production": "1"}
