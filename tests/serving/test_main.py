"""The command line, in process; and `up --local` as the process that people start."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from exports.registry import Registry
from serving.__main__ import main
from serving.decode_image import ImageLimits, decode_image
from serving.local import _not_ready
from serving.params import Params
from serving.settings import Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    Registry(root).publish(tiny_bundles.matching, model="matching")
    return root


@pytest.fixture
def caption(root, tmp_path, photos, monkeypatch, capsys):
    """Runs `caption` in a folder with good photographs and bad ones."""
    for at, photo in enumerate(photos[:3]):
        (tmp_path / f"{at}.png").write_bytes(photo)
    (tmp_path / "letter.jpg").write_text("Dear reader")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(
            ["caption", "--registry", str(root), "--model", "tiny", "--threads", "1", *arguments]
        )
        return code, *capsys.readouterr()

    return run


def test_files_are_captioned_a_line_each(caption):
    code, out, err = caption("0.png", "1.png", "--prefix", "a dog")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["0.png", "1.png"]
    assert all(": a dog" in line for line in lines)


def test_json_has_the_n_best(caption):
    code, out, _ = caption("0.png", "--json", "--num-beams", "3", "--num-captions", "2")
    assert code == 0
    answer = json.loads(out)
    assert answer["file"] == "0.png"
    scores = [one["score"] for one in answer["captions"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2
    _, text, _ = caption("0.png", "--num-beams", "3", "--num-captions", "2")
    assert [one["text"] in text for one in answer["captions"]] == [True, True]


def test_captions_are_reranked(caption, matching_captioner, photos):
    wide = ("--model", "matching", "--num-beams", "6", "--num-captions", "6", "--json")
    found = {}
    for how in ("none", "itm", "clip"):
        code, out, _ = caption("0.png", *wide, "--rerank", how)
        assert code == 0
        found[how] = json.loads(out)["captions"]
    assert all(one["match"] is None for one in found["none"])
    limits = ImageLimits()
    pixels = [decode_image(photos[0], matching_captioner.image_spec, limits)]
    for how in ("itm", "clip"):
        params = Params.of(
            matching_captioner.manifest.defaults, num_beams=6, num_captions=6, rerank=how
        )
        [expected] = matching_captioner.caption_batch(pixels, [params])
        assert [one["text"] for one in found[how]] == [one.text for one in expected]
        assert [one["match"] for one in found[how]] == [one.match for one in expected]
    orders = {tuple(one["text"] for one in captions) for captions in found.values()}
    assert len(orders) > 1


def test_a_bad_file_is_named_and_the_others_are_done(caption, monkeypatch):
    monkeypatch.setenv("CUTLINE_MAX_BATCH_SIZE", "2")
    code, out, err = caption("0.png", "letter.jpg", "none.png", "1.png", "2.png")
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()] == ["0.png", "1.png", "2.png"]
    errors = err.splitlines()
    assert errors[0].startswith("error: letter.jpg: ")
    assert errors[1].startswith("error: none.png: No such file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("0.png", "--model", "vlm"), "vlm"),
        (("0.png", "--num-beams", "0"), "num_beams"),
        (("0.png", "--threads", "0"), "threads"),
        (("0.png", "--rerank", "itm"), "rerank must be none, since tiny@1 has no matcher"),
    ],
)
def test_a_wrong_argument_is_one_line(caption, arguments, words):
    code, out, err = caption(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_one_plain_process_serves_until_it_is_told_to_stop(root, photos):
    port = free_port()
    command = [
        *(sys.executable, "-m", "serving", "up", "--local", "--port", str(port), "--threads", "1"),
        *("--registry", str(root), "--model", "tiny"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        watchdog = threading.Timer(120, server.kill)
        watchdog.start()
        try:
            assert server.stdout.readline() == f"Cutline is ready at http://127.0.0.1:{port}\n"
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/captions", files={"image": photos[0]})
            assert answer.json()["version"] == "1"
            server.terminate()
            assert "serving tiny@1" in server.stderr.read()
            assert server.wait() == 0
        finally:
            watchdog.cancel()
            server.kill()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@contextmanager
def answering(answer):
    """Listens on a port and gives one connection the bytes of `answer`."""

    def answer_one():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer_one)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.fixture
def dead_proxy(monkeypatch):
    """A proxy in the environment that answers nobody."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")


@pytest.mark.usefixtures("dead_proxy")
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OK, ""),
        (b'HTTP/1.1 503 No\r\nContent-Length: 17\r\n\r\n{"detail": "Why"}', "Why"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\n[]", "The server starts."),
        (b"HTTP/1.1 503 No\r\nContent-Length: 99\r\n\r\n{", "The server starts."),
        (b"nonsense\r\n\r\n", "The server starts."),
        (b"", "The server starts."),
    ],
)
def test_whatever_answers_the_server_learns_whether_it_is_ready(answer, said):
    with answering(answer) as port:
        assert _not_ready(Settings(port=port)) == said


@pytest.mark.usefixtures("dead_proxy")
@pytest.mark.parametrize(("answer", "code"), [(OK, 0), (OK.replace(b"200", b"503"), 1)])
def test_the_image_asks_itself_for_its_health(answer, code):
    dockerfile = (Path(__file__).parents[2] / "Dockerfile").read_text()
    [command] = set(re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", dockerfile, re.MULTILINE))
    program, *arguments = json.loads(command)
    assert program == "python"
    with answering(answer) as port:
        asked = [argument.replace("8000", str(port)) for argument in arguments]
        done = subprocess.run([sys.executable, *asked], check=False, env=os.environ, timeout=60)
    assert done.returncode == code


@pytest.mark.parametrize("flags", [(), ("--local",)])
def test_a_port_that_is_taken_is_an_error(capsys, flags):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["up", "--port", str(port), *flags]) == 1
    assert f"error: 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
