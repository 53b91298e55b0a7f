"""The manifests as kubectl renders them, and the pods that they lead to."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parent
K8S = ROOT / "k8s"

OVERLAYS = ("overlays/cpu", "overlays/gpu", "overlays/dev")
# What an operator applies.
KUSTOMIZATIONS = (*OVERLAYS, "storage", "retrain", "retrain-weekly")

Document = dict[str, Any]


def render(folder: Path) -> list[Document]:
    """Returns the objects of a kustomization, as kubectl makes them.

    Raises:
        ValueError: kubectl refuses it.
    """
    run = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    if run.returncode:
        raise ValueError(run.stderr)
    return list(yaml.load_all(run.stdout, yaml.CSafeLoader))


def kubectl() -> str:
    """Returns the kubectl of the dev dependencies, or else that of the machine."""
    own = Path(sys.executable).with_name("kubectl")
    found = str(own) if own.exists() else shutil.which("kubectl")
    assert found, "no kubectl: `pip install --group dev` brings one"
    return found


@cache
def rendered(name: str) -> list[Document]:
    return render(K8S / name)


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


def clusters(document: Document) -> list[Document]:
    """Returns the specs of the Ray clusters in a custom resource."""
    spec = document.get("spec", {})
    found = {
        "RayService": spec.get("rayClusterConfig"),
        "RayJob": spec.get("rayClusterSpec"),
        "RayCronJob": spec.get("jobTemplate", {}).get("rayClusterSpec"),
    }
    return [cluster] if (cluster := found.get(document["kind"])) else []


def groups(cluster: Document) -> list[Document]:
    return [cluster.get("headGroupSpec", {}), *cluster.get("workerGroupSpecs", [])]


def ray_pods(cluster: Document) -> list[Document]:
    """Returns the pod templates of a Ray cluster as Pods, which validators know."""
    return [
        {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        for group in groups(cluster)
        if "template" in group
    ]


def pods(documents: list[Document]) -> list[Document]:
    """Returns all pods that a set of objects leads to, the autoscaler's container in its head."""
    found = []
    for document in documents:
        for cluster in clusters(document):
            head, *workers = json.loads(json.dumps(ray_pods(cluster)))
            if cluster.get("enableInTreeAutoscaling"):
                options = {**cluster["autoscalerOptions"], "name": "autoscaler"}
                own = {"image": head["spec"]["containers"][0]["image"], "ports": []}
                head["spec"]["containers"].append(own | options)
            found += [head, *workers]
        if document["kind"] == "Deployment":
            found.append({"kind": "Pod", **document["spec"]["template"]})
    return found


def all_containers(pod: Document) -> list[Document]:
    spec = pod["spec"]
    return [*spec.get("initContainers", []), *spec["containers"]]
