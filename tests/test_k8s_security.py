"""The manifests are closed as docs/operate.md says: pods, tokens, images, ports."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from k8s_manifests import (
    K8S,
    KUSTOMIZATIONS,
    OVERLAYS,
    ROOT,
    Document,
    all_containers,
    application,
    clusters,
    everything,
    groups,
    of_kind,
    pods,
    ray_service,
    rendered,
)
from k8s_network import ports_of, reached

from serving.settings import Settings

SERVICE_PORT = 8000
# Ray's GCS, dashboard and client, its agents, HAProxy's status pages, the replica behind HAProxy.
CLOSED_PORTS = (6379, 8265, 10001, 52365, 8080, 9101, 8404, 30000)
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


def test_the_server_cannot_write_the_registry() -> None:
    for overlay in OVERLAYS:
        _, worker = pods([ray_service(overlay)])
        for one in all_containers(worker):
            [mount] = [mount for mount in one["volumeMounts"] if mount["name"] == "registry"]
            assert mount == {"name": "registry", "mountPath": "/registry", "readOnly": True}


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
    settings = Settings(**application(overlay)["args"])
    assert settings.metrics_host == "0.0.0.0"
    assert settings.metrics_port == scraped_port(overlay)
    assert reached(policies, pod["worker"], prometheus, settings.metrics_port)
    assert not any(reached(policies, pod["worker"], prometheus, port) for port in CLOSED_PORTS)


def scraped_port(overlay: str) -> int:
    """Returns the number of the port that the PodMonitor names."""
    [monitor] = of_kind("PodMonitor", rendered("overlays/cpu"))
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    _, worker = pods([ray_service(overlay)])
    ports = {
        port["name"]: port["containerPort"] for port in worker["spec"]["containers"][0]["ports"]
    }
    return int(ports[endpoint["port"]])


def test_retraining_is_closed_too() -> None:
    """Also in a namespace without the service's default."""
    policies = of_kind("NetworkPolicy", rendered("retrain"))
    [pod] = pods(rendered("retrain"))
    labels = pod["metadata"]["labels"]
    for stranger in STRANGERS.values():
        ports = {SERVICE_PORT, *CLOSED_PORTS, *ports_of(policies)}
        assert not any(reached(policies, labels, stranger, port) for port in ports)
