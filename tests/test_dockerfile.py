"""The Dockerfile, as far as one can tell unbuilt; docs/operate.md has what was built and run."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
STAGES = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"serving": "server-cpu", "serving-gpu": "server-gpu", "trainer": "cpu,workers"}


def pins() -> dict[str, str]:
    lines = (ROOT / "k8s/images/constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements(extras: str) -> list[Requirement]:
    """Returns what the project asks for with some extras, its own extras within them too."""
    asked = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra in extras.split(","):
        for line in PROJECT["optional-dependencies"][extra]:
            one = Requirement(line)
            own = one.name == "cutline"
            asked += requirements(",".join(one.extras)) if own else [one]
    return asked


@pytest.mark.parametrize("more", ["", ",s3", ",tracing"])
@pytest.mark.parametrize("target", EXTRAS)
def test_every_dependency_is_pinned(target: str, more: str) -> None:
    stage = STAGES[f"{target}-venv"]
    [(argument, extras)] = re.findall(r"^ARG (\w+_EXTRAS)=(\S+)$", stage, re.M)
    assert extras == EXTRAS[target]
    assert f'pip install ".[${{{argument}}}]"' in stage
    for one in requirements(f"{extras}{more}"):
        version = pins()[canonicalize_name(one.name)]
        assert one.specifier.contains(version), one


def test_the_trainer_has_no_cuda_unless_asked() -> None:
    """PyPI's PyTorch asks for gigabytes of it, so another index comes first."""
    stage = STAGES["trainer-venv"]
    [index] = re.findall(r"^ARG TORCH_INDEX=(\S+)$", stage, re.M)
    assert index == "https://download.pytorch.org/whl/cpu"
    first, second = re.findall(r"pip install (.*?) +&&", stage)[:2]
    assert first.split() == ["--no-deps", "--index-url", '"${TORCH_INDEX}"', "torch", "torchvision"]
    assert second == '".[${TRAINER_EXTRAS}]"'
    assert "cuda" not in STAGES["serving-venv"]


def test_what_a_bucket_asks_for_is_pinned_too() -> None:
    assert {"aiobotocore", "botocore", "aioitertools", "jmespath"} <= pins().keys()
    # s3fs takes the fsspec of its own version, and botocore no later dateutil.
    assert pins()["s3fs"] == pins()["fsspec"]
    assert pins()["python-dateutil"].startswith("2.")


def test_what_ray_asks_for_is_pinned_too() -> None:
    for name in ("starlette", "aiohttp", "grpcio", "protobuf", "requests"):
        assert name in pins()
    assert "PIP_CONSTRAINT=/src/constraints.txt" in STAGES["venv"]


@pytest.mark.parametrize("target", ["serving", "serving-gpu"])
def test_the_server_carries_no_training_library(target: str) -> None:
    names = {one.name for one in requirements(EXTRAS[target])}
    assert not names & {"torch", "torchvision", "transformers", "timm", "onnx", "matplotlib"}
    assert "COPY trainer" not in STAGES[f"{target}-venv"]


@pytest.mark.parametrize("target", EXTRAS)
def test_an_image_runs_as_nobody_in_particular(target: str) -> None:
    stage = STAGES[target]
    assert re.search(r"^USER 10001:10001$", stage, re.M)
    after = stage.partition("USER 10001:10001\n")[2]
    assert "RUN " not in after and "USER " not in after and "\nCMD " in f"\n{after}"
    assert re.search(r"^HEALTHCHECK ", stage, re.M)


def test_bases_are_pinned_and_the_server_is_what_one_gets() -> None:
    [base] = re.findall(r"^ARG PYTHON=(\S+)$", DOCKERFILE, re.M)
    assert re.fullmatch(
        r"docker\.io/library/python:3\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base
    )
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.M)
    assert set(bases) <= {"${PYTHON}", *STAGES}
    assert list(STAGES)[-1] == "serving"


def test_what_is_copied_is_sent() -> None:
    """.dockerignore keeps everything out but what it names."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M):
        for source in sources.split():
            assert f"!{source}" in ignored
            assert (ROOT / source).exists()
