"""The manifests are true to the server, the trainer and each other; their scripts run."""

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest
import yaml
from k8s_manifests import (
    K8S,
    KUSTOMIZATIONS,
    OVERLAYS,
    ROOT,
    Document,
    all_containers,
    application,
    clusters,
    of_kind,
    pods,
    ray_service,
    rendered,
)

from exports.registry import DEFAULT_REGISTRY, Registry
from exports.remote import default_cache
from serving.haproxy import POD, environment
from serving.metrics import Metrics
from serving.node_pages import NodePages, node_folder
from serving.settings import Settings

# Ray, imported by some of the tests, still uses what pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# What one machine sets and the pods do not, and why.
LEFT_OUT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",  # more than one machine
    "RAY_AUTH_MODE",  # authOptions; the operator makes the token
    "RAY_AUTH_TOKEN",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",  # a worker with a GPU asks for it
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT",  # no two servers share the ports of a pod
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT",
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


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_is_set_up_as_on_one_machine(overlay: str) -> None:
    settings = Settings(**application(overlay)["args"])
    expected = environment(settings, Path("/tmp"), Path("/tmp/haproxy"), range(2)) | POD | ADDED
    assert expected.keys() >= LEFT_OUT
    head, worker = pods([ray_service(overlay)])
    for container in (head["spec"]["containers"][0], *all_containers(worker)):
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert variables == {name: expected[name] for name in expected.keys() - LEFT_OUT}

    script = Path(POD["RAY_SERVE_HAPROXY_BINARY_PATH"])
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert dockerfile.count(f"write_pod_script(Path('{script.parent}')") == 2, (
        "serving, serving-gpu"
    )

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


@pytest.mark.parametrize("overlay", ["overlays/cpu", "overlays/gpu"])
def test_what_is_watched_is_what_the_tests_of_monitoring_read(overlay: str) -> None:
    [rule] = of_kind("PrometheusRule", rendered(overlay))
    alerts = yaml.safe_load((K8S / "monitoring/alerts.yaml").read_text())
    assert rule["spec"] == alerts["spec"]
    [shown] = of_kind("ConfigMap", rendered(overlay))
    assert shown["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert shown["data"] == {"dashboard.json": (K8S / "monitoring/dashboard.json").read_text()}
    [missing] = [
        one["expr"]
        for group in rule["spec"]["groups"]
        for one in group["rules"]
        if one["alert"] == "CutlineReplicaMissing"
    ]
    [workers] = ray_service(overlay)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert missing == f"count(cutline_ready) < {workers['minReplicas']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_a_server_writes_by_itself_has_a_place(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root file system is read-only: replicas meet in /tmp, and what is fetched goes there."""
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    settings = Settings(**application(overlay)["args"])
    assert settings.metrics_dir is None and settings.cache is None
    assert {node_folder().parent, default_cache().parent} == {Path("/tmp")}
    _, worker = pods([ray_service(overlay)])
    [container] = worker["spec"]["containers"]
    assert not {"TMPDIR", "TEMP", "TMP"} & {entry["name"] for entry in container["env"]}
    [mount] = [one for one in container["volumeMounts"] if one["mountPath"] == "/tmp"]
    assert not mount.get("readOnly")
    [volume] = [one for one in worker["spec"]["volumes"] if one["name"] == mount["name"]]
    assert set(volume) == {"name", "emptyDir"}
    # A kubelet makes it of fsGroup's group, and every folder in it inherits that.
    made = tmp_path / "tmp"
    made.mkdir()
    made.chmod(0o2777)
    pages = NodePages(Metrics().page, made / "metrics")
    pages.start()
    try:
        assert (made / "metrics/0.lock").exists()
        assert b'replica="0"' in pages.page()
    finally:
        pages.close()


def test_weekly_runs_what_a_run_by_hand_runs() -> None:
    [job] = of_kind("RayJob", rendered("retrain"))
    weekly = rendered("retrain-weekly")
    [cron] = of_kind("RayCronJob", weekly)
    assert cron["spec"]["jobTemplate"] == job["spec"]
    assert of_kind("RayJob", weekly) == [], "it would run at once"


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


def carried() -> Path:
    """The model of the package."""
    return Registry(DEFAULT_REGISTRY).resolve("cutline-base").path


def test_an_empty_registry_gets_the_first_model_as_production(tmp_path: Path) -> None:
    script = script_of(rendered("storage"), "Deployment", "first-model")
    variables = {"CUTLINE_REGISTRY": str(tmp_path)}
    run_shell(script, tmp_path, variables)
    assert Registry(tmp_path).aliases("cutline-base") == {"production": "1"}
    # What is published now waits; and a second start changes nothing.
    Registry(tmp_path).publish(carried())
    run_shell(script, tmp_path, variables)
    assert Registry(tmp_path).versions("cutline-base") == ["1", "2"]
    assert Registry(tmp_path).resolve("cutline-base").version == "1"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_worker_waits_for_the_first_model(scheme: str, tmp_path: Path) -> None:
    """In a folder and at a URL."""
    script = script_of(rendered("overlays/cpu"), "RayService", "first-model")
    waiting = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUTLINE_REGISTRY": f"{scheme}{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with waiting:
        try:
            assert waiting.stdout
            assert "cutline-base" in waiting.stdout.readline()
            Registry(tmp_path).publish(carried())
            assert waiting.wait(60) == 0
        finally:
            waiting.kill()


@pytest.mark.chaos
def test_a_retraining_publishes_and_promotes_nothing(tmp_path: Path) -> None:
    """The script of the job, on drawings, with a preset of minutes made shorter still."""
    script = (K8S / "retrain/retrain.sh").read_text()
    [job] = of_kind("RayJob", rendered("retrain"))
    assert job["spec"]["entrypoint"] == "sh /etc/cutline/retrain.sh"
    recipes = ROOT / "trainer/recipes"
    drawings = ["shapecaps", str(recipes / "tiny/shapecaps.toml"), "--out", str(tmp_path / "made")]
    run_shell(f'{sys.executable} -m trainer "$@"', tmp_path, {}, *drawings)
    (tmp_path / "photos").symlink_to(tmp_path / "made/images")
    (tmp_path / "captions.json").symlink_to(tmp_path / "made/captions_train.json")
    registry = tmp_path / "registry"
    Registry(registry).publish(carried(), model="mine", version="1")
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
