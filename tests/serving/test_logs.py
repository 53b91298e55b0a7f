"""The log: one line a request, the same form for all, and nothing of a body in any of them."""

import asyncio
import base64
import io
import json
import logging
import subprocess
import sys

import pytest
from live import PNG, captions_of, running
from tiny_bundle import picture

from exports.registry import Registry
from serving import logs
from serving.logs import start_log

SECRET = "sesame-7f3a"


@pytest.fixture
def logged(monkeypatch):
    """Starts the log in a form, and returns its lines so far."""
    stream = io.StringIO()
    monkeypatch.setattr(logs, "_floods", logs.Floods())  # others' loops ended in the middle of one

    def start(form, path=None):
        monkeypatch.setattr(sys, "stderr", stream)
        start_log(form, path)
        return lambda: stream.getvalue().splitlines()

    yield start
    for name in (*logs._OURS, *logs._OTHERS):
        log = logging.getLogger(name)
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(logging.NOTSET)


@pytest.fixture
def root(tmp_path, tiny_bundles):
    Registry(tmp_path).publish(tiny_bundles.one)
    return tmp_path


def requests(lines):
    """Returns the lines of requests, each of which must be JSON like every other."""
    return [line for line in map(json.loads, lines) if line["logger"] == "serving.requests"]


def test_of_what_is_refused_in_floods_one_line_a_second_stands_for_all(logged, monkeypatch):
    lines = logged("json")
    monkeypatch.setattr(logs, "_REST_S", 0.05)

    async def flood():
        for key in ("a", "a", "b", "a", "a"):
            logs.log_request({"key": key, "error": "Queue full"}, "captions", 429, 0.01)
        for code in (503, 503, 503, 500):
            logs.log_request({"error": "Not ready"}, "health", code, 0.01)
        logs.log_request({"key": "a"}, "captions", 200, 0.2)
        await asyncio.sleep(0.2)
        logs.log_request({"key": "a", "error": "Queue full"}, "captions", 429, 0.01)
        await asyncio.sleep(0.1)

    asyncio.run(flood())
    told = [(line.get("key"), line["code"], line.get("times")) for line in requests(lines())]
    assert told == [
        ("a", 429, None),
        ("b", 429, None),
        (None, 503, None),
        (None, 500, None),
        ("a", 200, None),
        ("a", 429, 3),
        (None, 503, 2),
        ("a", 429, None),
    ]
    assert not logs._floods._more


def test_a_request_is_one_line_of_json(root, logged, photos):
    lines = logged("json")
    with running(root) as live:
        ready = len(requests(lines()))
        headers = {**PNG, "x-request-id": "mine"}
        [[caption]] = captions_of(live.caption(photos[0], headers=headers))
        live.client.post("/v1/captions", content=b"no image", headers=PNG)
        live.client.get("/healthz")
        live.client.get("/metrics")
        live.client.get(f"/{SECRET}")
    good, bad, unknown = requests(lines())[ready:]
    assert good.pop("time").endswith("Z")
    assert 0 < good.pop("seconds") < 60
    assert good == {
        "level": "info",
        "logger": "serving.requests",
        "message": "request",
        "request_id": "mine",
        "route": "captions",
        "code": 200,
        "images": 1,
        "model": "tiny@1",
    }
    assert (bad["code"], bad["error"]) == (415, "Not an image")
    assert len(bad["request_id"]) == 32
    assert (unknown["route"], unknown["code"]) == ("other", 404)
    assert caption["text"] not in "\n".join(lines())


def test_probes_are_told_only_when_they_fail(tmp_path, logged):
    lines = logged("json")
    with running(tmp_path, wait=False) as live:
        assert live.client.get("/readyz").status_code == 503
        live.client.get("/healthz")
    assert [(line["route"], line["code"]) for line in requests(lines())] == [("health", 503)]


def test_captions_are_told_where_that_is_switched_on(root, logged, photos):
    lines = logged("json")
    with running(root, log_captions=True) as live:
        [[caption]] = captions_of(live.caption(photos[0]))
    assert requests(lines())[-1]["captions"] == [[caption["text"]]]


def test_the_text_form_has_the_same(root, logged, photos):
    lines = logged("text")
    with running(root) as live:
        live.caption(photos[0], headers={**PNG, "x-request-id": "mine"})
    [line] = [line for line in lines() if "route=captions" in line]
    assert "INFO request route=captions code=200 seconds=" in line
    assert "request_id=mine images=1 model=tiny@1" in line


def bodies():
    """Yields (content type, body, query) of requests which fail in every layer that reads them."""
    coded = base64.b64encode(SECRET.encode()).decode()
    form = (
        f'--b\r\nContent-Disposition: form-data; name="{{}}"; filename="{SECRET}"\r\n\r\n{{}}\r\n'
    )
    yield "image/png", SECRET.encode(), ""
    yield "image/png", picture(1)[:200] + SECRET.encode(), ""
    yield "image/png", picture(1), f"prefix={SECRET}"
    yield "image/png", picture(1), f"{SECRET}=1"
    yield "image/png", picture(1), f"model={SECRET}"
    yield f"text/{SECRET}", b"x", ""
    yield "application/json", json.dumps({"images": [coded], "prefix": SECRET}).encode(), ""
    yield "application/json", json.dumps({"images": [SECRET]}).encode(), ""
    yield "application/json", json.dumps({SECRET: SECRET}).encode(), ""
    yield "application/json", f'{{"images": {SECRET}'.encode(), ""
    yield "application/json", b'{"images": "' + SECRET.encode() + b'\xff"}', ""
    yield "multipart/form-data; boundary=b", form.format("image", SECRET).encode() + b"--b--", ""
    yield "multipart/form-data; boundary=b", form.format(SECRET, "x").encode() + b"--b--", ""
    yield "multipart/form-data; boundary=b", form.format("image", SECRET).encode(), ""
    yield f"multipart/form-data; boundary={SECRET}", SECRET.encode(), ""


@pytest.mark.parametrize("form", ["json", "text"])
def test_nothing_of_a_body_gets_into_the_log(root, logged, form, monkeypatch):
    lines = logged(form)
    with running(root) as live:
        for kind, body, query in bodies():
            answer = live.client.post(
                f"/v1/captions?{query}", content=body, headers={"content-type": kind}
            )
            assert answer.status_code in (200, 400, 404, 415, 422), (kind, body)
        # And where the code is at fault: its error quotes the body, and so do the errors before.
        monkeypatch.setattr("serving.app.read_call", quoting)
        answer = live.client.post("/v1/captions", content=SECRET, headers=PNG)
        assert answer.status_code == 500
    told = "\n".join(lines())
    coded = base64.b64encode(SECRET.encode()).decode()
    assert SECRET not in told
    assert coded not in told
    assert "KeyError" in told
    assert "in quoting" in told  # where it happened is told
    assert len(told) < 20_000


async def quoting(request, *_):
    body = await request.body()
    try:
        json.loads(body)
    except ValueError as error:
        raise KeyError(body) from error


def test_what_others_write_has_our_form_and_no_words_of_theirs_on_errors(logged):
    lines = logged("json")
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n%s", SECRET)

    async def never_asked_for():
        loop = asyncio.get_running_loop()
        loop.call_exception_handler(
            {"message": "Task exception was never retrieved", "exception": ValueError(SECRET)}
        )

    asyncio.run(never_asked_for())
    first, second = map(json.loads, lines())
    assert first["logger"] == "uvicorn.error"
    assert first["message"] == "Exception in ASGI application"
    assert first["exception"].endswith("ValueError")
    assert second["logger"] == "asyncio"
    assert SECRET not in "\n".join(lines())


def test_words_about_the_machine_are_kept(logged):
    lines = logged("json")
    log = logging.getLogger("serving.swap")
    for error in (OSError(28, "No space left on device"), RuntimeError(SECRET)):
        try:
            raise error
        except Exception:
            log.exception("not serving %s", "tiny")
    first, second = map(json.loads, lines())
    assert "No space left on device" in first["exception"]
    assert second["exception"].endswith("RuntimeError")


def test_a_line_stays_a_line(logged):
    lines = logged("text")
    logging.getLogger("serving").info("one\ntwo \x1b[31m")
    [line] = lines()
    assert line.endswith(r"INFO 'one\ntwo \x1b[31m'")


def test_starting_the_log_twice_tells_nothing_twice(logged):
    logged("text")
    lines = logged("json")
    logging.getLogger("serving.swap").info("once")
    logging.getLogger("uvicorn.error").error("too")
    assert [json.loads(line)["message"] for line in lines()] == ["once", "too"]


def test_lines_may_go_elsewhere(logged, tmp_path):
    path = tmp_path / "log"
    path.write_text("what stood there\n")
    logged("json", path)
    on_stderr = logged("text", path)  # the file of before is closed: a warning would be an error
    logging.getLogger("serving").info("one")
    assert path.read_text().endswith("INFO one\n")
    assert path.read_text().startswith("what stood there\n")
    assert on_stderr() == []


def test_where_no_line_can_go_is_told_and_all_stay_on_stderr(logged, tmp_path):
    lines = logged("text", tmp_path / "no" / "log")
    logging.getLogger("serving").info("one")
    refused, line = lines()
    assert f"WARNING no log in {tmp_path}/no/log: No such file or directory" in refused
    assert line.endswith("INFO one")


WRITER = """
import logging, sys
from pathlib import Path
from serving.logs import start_log
start_log("json", Path(sys.argv[1]))
for number in range(500):
    logging.getLogger("serving").info("%s", sys.argv[2] * 100 + str(number))
"""


def test_lines_of_several_processes_come_out_whole(tmp_path, capfd):
    pipe = tmp_path / "log"
    with logs.shown_on_stderr(pipe):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, pipe, letter]) for letter in "ab"
        ]
        assert [writer.wait(60) for writer in writers] == [0, 0]
    told = [json.loads(line)["message"] for line in capfd.readouterr().err.splitlines()]
    expected = [letter * 100 + str(number) for letter in "ab" for number in range(500)]
    assert sorted(told) == sorted(expected)


def test_a_stderr_that_nobody_reads_stops_no_writer(tmp_path):
    """As under `python -m serving up 2>&1 | head -1`."""
    showing = f"""
import subprocess, sys
from pathlib import Path
from serving.logs import shown_on_stderr
with shown_on_stderr(Path({str(tmp_path / "log")!r})):
    command = [sys.executable, "-c", {WRITER!r}, {str(tmp_path / "log")!r}, "a" * 10]
    assert subprocess.run(command, timeout=30).returncode == 0
"""
    with subprocess.Popen([sys.executable, "-c", showing], stderr=subprocess.PIPE) as process:
        process.stderr.close()
        assert process.wait(60) == 0


STILL_WRITING = """
import subprocess, sys, time
from pathlib import Path
from serving.logs import shown_on_stderr

for turn in range(20):
    pipe = Path(sys.argv[1], str(turn))
    with shown_on_stderr(pipe), pipe.open("wb") as lines:
        writer = subprocess.Popen(["yes"], stdout=lines)
        time.sleep(0.05)
    writer.kill()
    writer.wait()
"""


def test_the_end_is_found_while_others_still_write(tmp_path):
    command = [sys.executable, "-c", STILL_WRITING, tmp_path]
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60).returncode == 0
