"""The README keeps its word: its commands run, its answer and its tree are true."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block_with(language: str, words: str) -> str:
    found = [block for block in blocks(language) if words in block]
    assert len(found) == 1, f"{len(found)} {language} blocks with {words!r}"
    return found[0]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_ready(port: int, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"not ready after {seconds} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_it_is_short() -> None:
    assert README.count("\n") <= 200


def test_the_tree_is_the_disk_s() -> None:
    tree = block_with("text", "trainer/")
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if re.match(r"\S", line)}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    present = {path.split("/")[0] for path in tracked}
    assert listed == {name for name in present if not name.startswith(".")} | {".ci/run"}
    folder = ""
    for line in tree.splitlines():
        if match := re.match(r"(  )?([\w./-]+)(  +\S.*)?$", line):
            nested, name = bool(match[1]), match[2]
            folder = folder if nested else name
            assert (ROOT / (folder + name if nested else name)).exists(), line


@pytest.mark.ray
def test_make_serve_and_the_answer() -> None:
    """The two commands of a stranger, and the JSON that the README shows."""
    assert "make serve" in block_with("sh", "make serve")
    curl = next(line for line in README.splitlines() if line.startswith("curl -F"))
    shown = json.loads(block_with("json", "request_id"))
    port = free_port()
    process = subprocess.Popen(["make", "serve", f"PORT={port}"], cwd=ROOT, start_new_session=True)
    try:
        wait_ready(port, process, 120)
        command = shlex.split(curl.replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
        answer = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
        found = json.loads(answer)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
    assert found["model"] == shown["model"] and found["version"] == shown["version"]
    pairs = zip(found["results"], shown["results"], strict=True)
    for first, second in pairs:
        for caption, expected in zip(first["captions"], second["captions"], strict=True):
            assert caption["text"] == expected["text"] and caption["tokens"] == expected["tokens"]
            assert caption["score"] == pytest.approx(expected["score"], abs=0.01)


@pytest.mark.timed
def test_the_tiny_road_in_under_three_minutes(tmp_path: Path) -> None:
    """Train, evaluate, export, publish, serve, POST: the README's block, line by line."""
    for name in ("trainer", "serving", "exports", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    *commands, serve, post = block_with("sh", "tiny/gpt2.toml").strip().splitlines()
    began = time.monotonic()
    for command in commands:
        run = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True
        )
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    figures = json.loads((tmp_path / "runs/tiny/evaluation/figures.json").read_text())
    assert figures["figures"]["CIDEr-D"][1] > 1.0, figures
    assert "<html" in (tmp_path / "runs/tiny/evaluation/sheet.html").read_text()
    port = free_port()
    assert serve.endswith(" &")
    serve = re.sub(r"--port \d+", f"--port {port}", serve.removesuffix(" &"))
    process = subprocess.Popen(
        ["bash", "-c", f"exec {serve}"], cwd=tmp_path, env=environment(), start_new_session=True
    )
    try:
        wait_ready(port, process, 60)
        answer = subprocess.run(
            re.sub(r":\d+/", f":{port}/", post),
            shell=True,
            cwd=tmp_path,
            check=True,
            capture_output=True,
        ).stdout
    finally:
        stop(process)
    seconds = time.monotonic() - began
    found = json.loads(answer)
    assert (found["model"], found["version"]) == ("cutline-tiny", "1")
    data = json.loads((tmp_path / "runs/shapecaps/captions_dev.json").read_text())
    first = data["images"][0]
    references = [a["caption"] for a in data["annotations"] if a["image_id"] == first["id"]]
    assert set(found["results"][0]["captions"][0]["text"].split()) & set(references[0].split())
    assert seconds < 180, f"took {seconds:.0f} s"
