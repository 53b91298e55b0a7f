"""The manifests are valid as an API server reads them, and no slip goes unnoticed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from k8s_manifests import (
    ADDED_BY_HAND,
    HERE,
    K8S,
    KUSTOMIZATIONS,
    RECORDS,
    all_containers,
    everything,
    of_kind,
    pods,
    recorded,
    rendered,
)
from k8s_strict import key_paths, misspelt, problems

# Ray, imported by some of the tests, still uses what pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# What a file is tried with; all others with an overlay.
APPLIED_WITH = {
    "components/s3": ("overlays/cpu",),
    "components/keys": ("overlays/cpu",),
    "components/gpu": ("overlays/gpu",),
    "overlays/gpu": ("overlays/gpu",),
    "overlays/dev": ("overlays/dev",),
    "storage": ("storage",),
    "retrain": ("retrain",),
    "retrain-weekly": ("retrain-weekly",),
}


def slips(tmp_path: Path, *resources: str, components: tuple[str, ...] = ()) -> list[str]:
    """Returns what kubectl or an API server has against a kustomization of ours."""
    try:
        return list(problems(everything(tmp_path, *resources, components=components)))
    except ValueError as error:
        return [str(error)]


def test_every_kustomization_is_rendered_by_these_tests() -> None:
    found = {path.parent.relative_to(K8S).as_posix() for path in K8S.rglob("kustomization.yaml")}
    parts = {name for name in found if name.startswith("components/")}
    assert found == {*KUSTOMIZATIONS, *parts, "base", "images", "monitoring"}


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_is_valid(name: str) -> None:
    assert rendered(name)
    assert list(problems(rendered(name))) == []


@pytest.mark.parametrize("file", RECORDS)
def test_what_is_applied_is_what_was_reviewed(file: str) -> None:
    """Every value: of many no schema knows whether they are meant."""
    reviewed = (HERE / "k8s_rendered" / file).read_text(encoding="utf-8")
    assert recorded(file) == reviewed, "if that is meant: python tests/k8s_manifests.py"


def test_the_kinds_that_are_asked_for_are_there() -> None:
    kinds = {document["kind"] for name in KUSTOMIZATIONS for document in rendered(name)}
    wanted = "RayService RayJob RayCronJob PersistentVolumeClaim NetworkPolicy PodMonitor Namespace"
    assert kinds >= {*wanted.split(), "PrometheusRule", "PodDisruptionBudget", "Deployment"}


@pytest.mark.parametrize(
    "added",
    [
        ("components/s3",),
        ("components/s3", "components/keys"),
        ("components/keys", "components/s3"),
    ],
)
def test_servers_may_follow_a_bucket(added: tuple[str, ...], tmp_path: Path) -> None:
    """With keys too, in either order."""
    documents = everything(tmp_path, "overlays/gpu", components=added)
    assert list(problems(documents)) == []
    containers = [one for pod in pods(documents) for one in all_containers(pod)]
    variables = [
        {entry["name"]: entry["value"] for entry in one["env"]}
        for one in containers
        if one["name"] != "autoscaler"
    ]
    assert len(variables) == 3
    assert {one["CUTLINE_REGISTRY"] for one in variables} == {"s3://cutline-models/registry"}
    assert [one.get("CUTLINE_POLL_S") for one in variables] == ["15", None, "15"]
    assert "cutline-registry" not in json.dumps(documents)
    for pod in pods(documents):
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounts = {mount["name"] for one in all_containers(pod) for mount in one["volumeMounts"]}
        assert mounts == volumes
    # Who reads the bucket has its key; the head, which only builds the application, has not.
    with_key = [one["name"] for one in containers if "cutline-s3" in json.dumps(one)]
    assert with_key == ["first-model", "ray-worker"]


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


def sources() -> list[Any]:
    """Returns every file; those of whole objects, whose every key is tried above, as slow."""
    found = []
    for path in sorted(K8S.rglob("*.yaml")):
        name = path.relative_to(K8S).as_posix()
        whole = path.name != "kustomization.yaml" and name.startswith(
            ("base/", "monitoring/", "storage/", "retrain")
        )
        found.append(pytest.param(name, marks=pytest.mark.slow if whole else ()))
    return found


@pytest.mark.parametrize("file", sources())
def test_a_slip_in_any_file_is_found(file: str, tmp_path: Path) -> None:
    """The last key of a file, patches and kustomizations among them, through kubectl."""
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / file
    text = path.read_text()
    [*_, last] = re.finditer(r"^( *(?:- )*)([a-zA-Z]+):(?= |$)", text, re.MULTILINE)
    path.write_text(f"{text[: last.start(2)]}{last[2]}{last[2][-1]}{text[last.end(2) :]}")

    folder = next((name for name in APPLIED_WITH if file.startswith(f"{name}/")), "")
    resources = APPLIED_WITH.get(folder, ("overlays/cpu",))
    components = (folder,) if folder in ADDED_BY_HAND else ()
    assert slips(tmp_path, *resources, components=components), f"{last[2]} in {file}"


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("base/kustomization.yaml", "- networkpolicy.yaml", "- networkpolicies.yaml"),
        ("base/networkpolicy.yaml", "port: 8000", "port: true"),
        ("base/networkpolicy.yaml", "policyTypes: [Ingress]", "policyTypes: [Ingres]"),
        ("base/networkpolicy.yaml", "protocol: TCP", "protocol: TPC"),
        ("base/rayservice.yaml", "apiVersion: ray.io/v1", "apiVersion: ray.io/v2"),
        ("base/rayservice.yaml", "mode: token", "mode: tokens"),
        ("base/rayservice.yaml", "version: v2", "version: v3"),
        ("base/rayservice.yaml", "runAsNonRoot: true", "runAsNonRoot: 'yes'"),
        ("base/rayservice.yaml", "memory: 2Gi", "memory: [2Gi]"),
        ("base/rayservice.yaml", "dashboard-host:", "dashboard-hosts:"),
        ("base/rayservice.yaml", "proxy_location: EveryNode", "proxy_location: EveryPod"),
        ("base/rayservice.yaml", "min_replicas: 2", "min_replicas: -2"),
        ("base/rayservice.yaml", "threads: 2", "threads: two"),
        ("base/rayservice.yaml", "provider: cpu", "provider: tpu"),
        ("base/rayservice.yaml", "metrics_port: 9464", "metrics_port: 94640"),
        ("monitoring/kustomization.yaml", "- dashboard.json", "- dashboards.json"),
        ("monitoring/kustomization.yaml", 'dashboard: "1"', 'dashboard: "true"'),
    ],
)
def test_a_wrong_value_is_found(file: str, right: str, wrong: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    path = tmp_path / "k8s" / file
    assert right in path.read_text()
    path.write_text(path.read_text().replace(right, wrong, 1))
    assert slips(tmp_path, "overlays/cpu")
