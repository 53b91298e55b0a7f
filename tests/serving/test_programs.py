"""The examples of docs/programs.md do what they say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from live import running

from exports.registry import Registry
from trainer.data import read_examples

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "programs.md").read_text("utf-8")
BLOCKS = {
    (section.partition("\n")[0], language): code
    for section in TEXT.split("\n## ")[1:]
    for language, code in re.findall(r"^```(sh|python)\n(.*?)^```$", section, re.M | re.S)
}
CHAT = "OpenAI's chat completions"
V2 = "Open Inference Protocol, version 2"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bundles):
    """A folder with a photograph, its own server, and a way to run an example there."""
    folder = tmp_path_factory.mktemp("programs")
    registry = folder / "registry"
    Registry(registry).publish(tiny_bundles.one)
    photo = (ROOT / "tests" / "photos" / "cat.jpg").read_bytes()
    (folder / "cat.jpg").write_bytes(photo)
    (folder / "photos" / "2024").mkdir(parents=True)
    (folder / "photos" / "2024" / "cat.jpg").write_bytes(photo)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CUTLINE_REGISTRY": str(registry),
        "CUTLINE_MODEL": "tiny",
    }
    with running(registry, feedback_dir=folder / "feedback") as live:

        def run(section, language):
            code = BLOCKS[section, language].replace(":8000", f":{live.port}")
            program = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else ["python", "-c"]
            return subprocess.run(
                [*program, code.replace("cutline-base", "tiny")],
                cwd=folder,
                env=environment,
                check=True,
                capture_output=True,
                text=True,
                timeout=100,
            ).stdout

        run.folder, run.live = folder, live
        yield run


def test_all_examples_are_run_here():
    assert set(BLOCKS) == {
        *(
            (section, language)
            for section in (CHAT, V2, "Feedback")
            for language in ("sh", "python")
        ),
        ("A folder", "sh"),
    }


def test_chat(place):
    answer = json.loads(place(CHAT, "sh"))
    lines = place(CHAT, "python").splitlines()
    assert answer["choices"][0]["message"]["content"]
    assert len(lines) == 3


def test_inference(place):
    outputs = json.loads(place(V2, "sh"))["outputs"]
    lines = place(V2, "python").splitlines()
    assert [line.partition(" ")[2] for line in lines] == outputs[0]["data"]
    assert [float(line.split()[0]) for line in lines] == pytest.approx(outputs[1]["data"], abs=0.01)


def test_a_folder(place):
    place("A folder", "sh")
    [row] = map(json.loads, (place.folder / "captions.jsonl").read_text().splitlines())
    [shown] = re.findall(r"^```json\n(.*?)^```$", TEXT, re.M | re.S)
    assert row.keys() == json.loads(shown).keys()
    assert (place.folder / "photos" / "2024" / "cat.txt").read_text() == row["captions"][0] + "\n"


def test_feedback(place):
    name = json.loads(place("Feedback", "sh"))["image"]
    assert place("Feedback", "python").strip() == name
    [example] = read_examples(place.folder / "feedback" / "answers.jsonl")
    assert example.captions == ("a tabby cat on a sofa",)
    assert example.image.name == name


def test_what_the_text_says_of_addresses_is_true(place):
    paths = place.live.client.get("/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/models", "/v1/feedback", "/v2", "/v2/health/live"):
        assert path in TEXT and path in paths
