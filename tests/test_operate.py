"""docs/operate.md keeps its word, and so does docs/observability.md of alerts on Kubernetes."""

import re
import shlex
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_manifests import (
    K8S,
    KUSTOMIZATIONS,
    OVERLAYS,
    all_containers,
    kubectl,
    of_kind,
    pods,
    render,
    rendered,
)
from k8s_strict import problems

import exports.__main__
import serving.__main__
from trainer import variants

# Ray, imported by some of the tests, still uses what pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

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
    parsers = {"exports": exports.__main__._parser, "serving": serving.__main__._parser}
    if package in parsers and "`" + command + "`" not in PAGE:  # its arguments too
        [words] = [one for one in simple(command) if package in one]
        assert parsers[package]().parse_args(words[words.index(package) + 1 :])
    if "deploy/cutline-admin" in command:  # whose image holds no trainer
        assert package in parsers


@cache
def help_of(*verb: str) -> str:
    run = subprocess.run([kubectl(), *verb, "--help"], capture_output=True, text=True, check=True)
    return run.stdout


def kubectl_commands() -> list[list[str]]:
    """Returns the arguments of every kubectl of the page, those behind a pipe too."""
    return [words[1:] for line in commands() for words in simple(line) if words[0] == "kubectl"]


def simple(line: str) -> list[list[str]]:
    """Returns the words of each command of a line of shell, what it redirects left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|&")
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if word in {"|", "&", "&&"}:
            found.append([])
        elif not redirected and word not in {">", ">>", "<"}:
            found[-1].append(word)
        redirected = word in {">", ">>", "<"}
    return [words for words in found if words]


def test_what_kubectl_is_told_it_understands() -> None:
    seen = set()
    for words in kubectl_commands():
        own = words[: words.index("--")] if "--" in words else words
        if own[0] == "-n":
            assert own[1] in {"cutline", "monitoring"}
            own = own[2:]
        verb = [own[0], *(["secret", "generic"] if own[0] == "create" else [])]
        if own[0] == "rollout":
            verb.append(own[1])
        seen.add(verb[0])
        for option in (one for one in own if one.startswith("-")):
            name = option.partition("=")[0]
            assert re.search(rf"^ +(-\w, )?{name}\b|^ +{name}, ", help_of(*verb), re.M), option
    assert seen >= {"apply", "wait", "rollout", "exec", "port-forward", "create", "get", "logs"}


def test_labels_containers_and_secrets_are_those_of_the_manifests() -> None:
    documents = [one for name in KUSTOMIZATIONS for one in rendered(name)]
    made = pods(documents)
    labels = {f"{k}={v}" for pod in made for k, v in pod["metadata"]["labels"].items()}
    named = re.findall(r"kubectl .*? (?:pods|logs).* -l (\S+)", "\n".join(commands()))
    assert named and set(named) <= labels
    containers = {one["name"] for pod in made for one in all_containers(pod)}
    assert set(re.findall(r"logs .* -c (\S+)", "\n".join(commands()))) <= containers
    secrets = set(re.findall(r"create secret generic (\S+)", PAGE))
    manifests = "\n".join(path.read_text() for path in sorted(K8S.rglob("*.yaml")))
    assert secrets == set(re.findall(r"(?:secretName: |secretRef:\s+name: )(\S+)", manifests))
    for key in re.findall(r"--from-literal=(\w+)=", PAGE):
        assert key in manifests
    [key] = set(re.findall(r"--from-file=(\S+?)=", PAGE))
    assert f"key: {key}" in manifests


def test_operators_live_where_the_policies_expect_them() -> None:
    spaces = set(re.findall(r"--namespace (\S+)", PAGE))
    policies = of_kind("NetworkPolicy", rendered("overlays/cpu"))
    peers = re.findall(r"'kubernetes.io/metadata.name': '([\w-]+)'", str(policies))
    assert spaces == set(peers) - {"kube-system"}


def test_edits_of_the_page_change_what_they_should(tmp_path: Path) -> None:
    """Every `sed` and `printf` of the page, one after the other, and what comes of all."""
    shutil.copytree(K8S, tmp_path / "k8s")
    edits = [line for line in commands() if re.match(r"sed |printf ", line)]
    assert len(edits) == 6
    for edit in edits:
        before = contents(tmp_path)
        subprocess.run(["sh", "-euc", edit], cwd=tmp_path, check=True)
        assert contents(tmp_path) != before, edit
    for overlay in OVERLAYS:
        assert list(problems(render(tmp_path / "k8s" / overlay))) == []
    text = str(render(tmp_path / "k8s/overlays/cpu"))
    for words in (
        "REGISTRY/cutline/serving:VERSION",
        "model: cutline-base@1",
        "'CUTLINE_KEYS_FILE'",
        "s3://BUCKET/PATH",
    ):
        assert words in text, words
    for name in KUSTOMIZATIONS:
        for pod in pods(render(tmp_path / "k8s" / name)):
            for one in all_containers(pod):
                assert re.fullmatch(r"REGISTRY/cutline/[\w-]+:VERSION", one["image"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_components_are_added_by_a_line(overlay: str, tmp_path: Path) -> None:
    """In any order, to any overlay, as the page says of `cpu`."""
    lines = re.findall(r"^printf '(.*)\\n' >> k8s/overlays/cpu/kustomization.yaml$", PAGE, re.M)
    assert len(lines) == 2
    for place, order in enumerate((lines, lines[::-1])):
        tree = tmp_path / str(place) / "k8s"
        shutil.copytree(K8S, tree)
        with (tree / overlay / "kustomization.yaml").open("a") as file:
            file.writelines(f"{line}\n" for line in order)
        documents = render(tree / overlay)
        assert list(problems(documents)) == []
        assert "'cutline-s3'" in str(documents) and "'CUTLINE_KEYS_FILE'" in str(documents)


def contents(folder: Path) -> dict[Path, str]:
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


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
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"cutline/([\w-]+):([\w.]+)", PAGE)) == {
        (one, version) for one in targets
    }


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
