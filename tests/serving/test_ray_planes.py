"""One real start with keys: what listens where, and what Ray's own planes say to a stranger."""

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from test_deployment import LOOPBACK, cluster, environment_of, mark_of, marked  # noqa: F401

from serving.keys import make_key

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_RAY_CLIENT_PORT = 10001
_DASHBOARD_PORT = 8265


@pytest.fixture
def keys_file(tmp_path, monkeypatch):
    """A keys file that the server, started after this, is told of by its environment."""
    file = tmp_path / "keys.json"
    monkeypatch.setenv("CUTLINE_KEYS_FILE", str(file))
    return file


@pytest.fixture
def key(keys_file):
    return make_key(keys_file, "one", rate=1000)


def listening_ports(processes):
    """Returns the (address, port) pairs on which processes listen, from /proc/net."""
    inodes = set()
    for pid in processes:
        descriptors = []
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has ended since
            descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
        for descriptor in descriptors:
            with suppress(FileNotFoundError, ProcessLookupError):
                inodes.update(re.findall(r"socket:\[(\d+)\]", str(descriptor.readlink())))
    rows = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
    ]
    places = [row[1].split(":") for row in rows if row[3] == "0A" and row[9] in inodes]
    return {(address, int(port, 16)) for address, port in places}


def speaks_http(port):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as one:
            one.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return one.recv(5) == b"HTTP/"
    except OSError:
        return False


STRANGER = """
import ray, sys
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
print("IN", ray.nodes())
"""


@pytest.mark.usefixtures("key")
def test_ray_s_planes_are_closed_and_keys_hold_behind_haproxy(request, key, keys_file, photos):
    server, url, *_ = request.getfixturevalue("cluster")
    processes = marked(mark_of(server.pid))
    places = listening_ports(processes)
    assert {address for address, _ in places} <= LOOPBACK  # the machine's network sees nothing
    ports = {port for _, port in places}
    assert not {_RAY_CLIENT_PORT, _DASHBOARD_PORT} & ports
    tokens = {
        entry.partition(b"=")[2]
        for pid in processes
        for entry in environment_of(pid)
        if entry.startswith(b"RAY_AUTH_TOKEN=")
    }
    assert len(tokens) == 1 and len(tokens.pop()) == 64
    assert b"RAY_AUTH_MODE=token" in environment_of(next(iter(processes)))

    own = httpx.URL(url).port
    for port in sorted(ports - {own}):
        if not speaks_http(port):
            continue
        for path in ("/api/jobs/", "/api/version", "/api/serve/applications/"):
            answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=10)
            is_metrics = answer.text.startswith("# HELP")  # Ray's own, open, on every path
            assert is_metrics or answer.status_code >= 400, (port, path, answer.text[:200])

    photo = {"content": photos[0], "headers": {"content-type": "image/png"}}
    with httpx.Client(base_url=url, timeout=60) as client:
        refused = client.post("/v1/captions", **photo)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"].startswith("Bearer")
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        photo["headers"]["authorization"] = f"Bearer {key}"
        assert client.post("/v1/captions", **photo).status_code == 200
        other = make_key(keys_file, "other")
        photo["headers"]["authorization"] = f"Bearer {other}"
        statuses = {client.post("/v1/captions", **photo).status_code}
        while 200 not in statuses:
            statuses.add(client.post("/v1/captions", **photo).status_code)
        assert statuses <= {200, 401}

    gcs = gcs_address(processes)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 64,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    stranger = subprocess.run(
        [sys.executable, "-c", STRANGER, gcs],
        env=clean,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stranger.returncode != 0
    assert "IN" not in stranger.stdout
    assert "AuthenticationError" in stranger.stderr  # it was understood, and sent away


def gcs_address(processes):
    """Returns where the cluster's GCS listens, from the command lines of its processes."""
    for pid in processes:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if found := re.search(r"--gcs-address=(\S+)", line):
            return found[1]
    raise AssertionError("no process names the GCS")
