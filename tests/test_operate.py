"""docs/operate.md keeps its word, and so does docs/observability.md of alerts on Kubernetes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_manifests import K8S, KUSTOMIZATIONS, render

import exports.__main__
import serving.__main__
from trainer import variants

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/operate.md").read_text(encoding="utf-8")
ALERTS = (ROOT / "docs/observability.md").read_text(encoding="utf-8").partition("## Alerts\n")[2]
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE + ALERTS, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Returns every command of the page, those inside its sentences too."""
    lines = "".join(BLOCKS).replace("\\\n", " ").splitlines()
    prose = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    inline = re.findall(r"`((?:kubectl|helm|python|docker|git) [^`]+)`", prose)
    return [line for line in lines if line.strip()] + [line for line in inline if " " in line]


def verbs_of(package: Any) -> set[str]:
    actions = package._parser()._subparsers._group_actions
    return {name for action in actions for name in action.choices}


def test_there_are_commands() -> None:
    assert len(commands()) > 40


@pytest.mark.parametrize("command", sorted({c for c in commands() if "python -m" in c}))
def test_our_own_commands_exist(command: str) -> None:
    package, verb = re.findall(r"python -m (\w+) (\w+)", command)[0]
    known = {
        "exports": verbs_of(exports.__main__),
        "serving": verbs_of(serving.__main__),
        "trainer": {*variants.names("stages"), "auto", "import"},
    }
    assert verb in known[package]
    if package == "exports":  # its arguments too
        arguments = shlex.split(command.partition("python -m exports ")[2])
        assert exports.__main__._parser().parse_args(arguments)


def test_folders_exist() -> None:
    applied = re.findall(r"-k (\S+)", "\n".join(commands()))
    assert {name.removeprefix("k8s/") for name in applied} <= set(KUSTOMIZATIONS)
    for name in re.findall(r"\bk8s/[\w./-]+[\w]", PAGE):
        assert (ROOT / name).exists(), name
    for target, heading in re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", PAGE + ALERTS):
        path = ROOT / "docs" / target
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
        assert not heading or heading in {one.lower().replace(" ", "-") for one in headings}
    for photo in re.findall(r"image=@(\S+)", PAGE):
        assert (ROOT / photo).exists()


def test_objects_exist() -> None:
    """What a command names is made by a manifest, or by KubeRay of one."""
    made = {
        (document["kind"].lower(), document["metadata"]["name"])
        for name in KUSTOMIZATIONS
        for document in render(K8S / name)
    }
    made |= {("svc", "cutline-serve-svc"), ("svc", "cutline-head-svc")}
    text = "\n".join(commands())
    named = set(re.findall(r"\b(svc|deploy|rayservice|rayjob|raycronjob)[/ ](cutline[\w-]*)", text))
    assert len(named) == 6
    assert {(kind.replace("deploy", "deployment"), name) for kind, name in named} <= made


def test_targets_of_the_image_exist() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", dockerfile, re.MULTILINE))
    targets = set(re.findall(r"--target (\S+)", PAGE)) | {"serving-gpu"}
    assert targets <= stages
    images = yaml.safe_load((K8S / "images/kustomization.yaml").read_text())["images"]
    assert {entry["name"] for entry in images} == {f"cutline/{target}" for target in targets}


def test_every_alert_has_its_section_and_no_other_has() -> None:
    [rule] = [
        document
        for document in render(K8S / "overlays/cpu")
        if document["kind"] == "PrometheusRule"
    ]
    alerts = {one["alert"] for group in rule["spec"]["groups"] for one in group["rules"]}
    assert sorted(re.findall(r"^### (Cutline\w+)$", ALERTS, re.MULTILINE)) == sorted(alerts)
    assert "observability.md#alerts" in PAGE
    assert not [alert for alert in alerts if alert in PAGE], "what to do is said in one place"


def test_numbers_are_those_of_the_manifests() -> None:
    for overlay, words in (("cpu", "2 to 8 replicas"), ("gpu", "2 to 4 replicas")):
        [service] = [
            one for one in render(K8S / "overlays" / overlay) if one["kind"] == "RayService"
        ]
        [workers] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        assert words == f"{workers['minReplicas']} to {workers['maxReplicas']} replicas"
        row = next(line for line in PAGE.splitlines() if f"`k8s/overlays/{overlay}`" in line)
        assert words in row
