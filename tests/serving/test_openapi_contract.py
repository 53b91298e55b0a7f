"""The OpenAPI document and the server agree: schemathesis tries every door both ways.

It makes requests that the document allows and requests that it forbids, and compares codes,
headers, types and bodies of the answers with what the document says.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import running

from exports.registry import Registry
from serving.guard import PROBES
from serving.keys import make_key

HERE = Path(__file__).parent
# How parameters depend on one another, and what a bundle can do, no schema says: 422 may meet what
# the document allows. What the models and versions are called is the server's.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 404, 422, 429]

[parameters]
"path.model" = "tiny"
"path.version" = "1"
"""


def contract(live, folder, *options):
    """Runs schemathesis against a server; returns its exit code and what it said."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    document = f"http://127.0.0.1:{live.port}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [*command, document, "--no-color", "--warnings", "off", "--seed", "1", *options],
        env={**os.environ, "SCHEMATHESIS_HOOKS": "contract_hooks", "PYTHONPATH": path},
        cwd=folder,  # where it leaves what it found
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout[:20_000] + done.stdout[-2_000:]


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.matching)
    return root


def test_every_door_does_what_the_document_says(root, tmp_path):
    with running(root, feedback_dir=tmp_path / "feedback") as live:
        code, said = contract(live, tmp_path, "--max-examples", "3", "--phases", "coverage,fuzzing")
    assert code == 0, said


def test_with_keys_every_door_asks_for_one(root, tmp_path):
    keys = tmp_path / "keys.json"
    key = make_key(keys, "ci")
    with running(root, keys_file=keys, feedback_dir=tmp_path / "feedback") as live:
        header = f"Authorization: Bearer {key}"
        code, said = contract(
            live, tmp_path, "--max-examples", "1", "--phases", "fuzzing", "--header", header
        )
        without = {
            path: live.client.request(method, path.format(model="tiny", version="1")).status_code
            for path, methods in live.client.get("/openapi.json").json()["paths"].items()
            for method in methods
        }
    assert code == 0, said
    assert {path for path, status in without.items() if status != 401} == set(PROBES)


@pytest.mark.chaos
@pytest.mark.parametrize("with_keys", [False, True])
def test_every_door_does_so_for_minutes(root, tmp_path, with_keys):
    settings = {"feedback_dir": tmp_path / "feedback"}
    options = ["--max-examples", "300"]
    if with_keys:
        settings["keys_file"] = tmp_path / "keys.json"
        options += ["--header", f"Authorization: Bearer {make_key(settings['keys_file'], 'ci')}"]
    with running(root, **settings) as live:
        code, said = contract(live, tmp_path, *options)
    assert code == 0, said
