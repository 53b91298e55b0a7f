"""How Ray Serve's HAProxy is kept lean and private: environment variables and a start script.

Nothing here imports Ray: Ray reads its variables while it is imported, so they must stand before.

Ray writes HAProxy's configuration from a fixed template, some lines of which do not suit a server
on somebody's machine: two status pages listen on all interfaces, HAProxy's own errors all become a
bare 500, one that has just been started knows no path, a client may switch off the timeouts,
whoever finds no connection free waits without an answer, and a half-sent body keeps a replica busy.
So a script edits them first, then starts it.
"""

import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from math import ceil
from pathlib import Path
from secrets import token_hex

from serving.problem import MEDIA_TYPE, plain_problem
from serving.settings import Settings

_ADMIN_SOCKET = "admin.sock"
_FRONTEND = "http_frontend"
# Ray acts upon these headers of a request: the first sets the time limit, the second lets a request
# run on when its client has gone.
_REFUSED_HEADERS = ("x-request-timeout-seconds", "x-request-disconnect-disabled")
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Where a pod has what `environment` chooses anew on one machine; the ports are Ray's own.
POD = {
    _BINARY: "/opt/haproxy/haproxy.sh",
    "RAY_SERVE_HAPROXY_STATS_PORT": "8404",
    "RAY_SERVE_HAPROXY_METRICS_PORT": "9101",
}
# Between the ports of Ray's workers and those that Linux gives to whoever asks for any.
_REPLICA_PORTS = range(20_000, 32_000, 128)
# Requests that HAProxy lets through at once: as many as an engine by default holds and works on.
# More are refused before a replica spends time on them; the other connections are for probes and
# for who comes next.
_MAXCONN = 512
_BUSY = _MAXCONN - 128
# Before that, callers who have many of them already are refused theirs: a flood takes no replica's
# time, and leaves the others their places.
_MANY, _MANY_OF_ONE = 224, 64
_OWN_ERRORS = {
    408: "The request's body did not come in time.",
    429: "The server has more requests than it can answer soon.",
    502: "The server broke off its answer; send the request again.",
    503: "No replica of the server takes requests now; try again in a moment.",
    504: "The server did not answer in time.",
}


@contextmanager
def replica_ports() -> Iterator[range]:
    """Yields ports for the replicas of one server, which are its own until the block ends.

    All servers would number them from the same one on, so that a new replica of one server takes
    the port of a dead replica of another, whose HAProxy still sends requests there.

    Raises:
        OSError: So many servers run on this machine that none is left.
    """
    for first in _REPLICA_PORTS:
        with socket.socket() as held:
            try:
                held.bind(("127.0.0.1", first))
            except OSError:  # another server's
                continue
            yield range(first + 1, first + _REPLICA_PORTS.step)
            return
    raise OSError(f"no ports are left for replicas: {len(_REPLICA_PORTS)} servers run here")


def environment(settings: Settings, folder: Path, haproxy: Path, ports: range) -> dict[str, str]:
    """Returns the environment for Ray and all its processes.

    Args:
        settings: The server's settings; HAProxy's time limits follow from them.
        folder: A private folder for sockets and configuration, with a short path.
        haproxy: The program that `write_start_script` made.
        ports: Where replicas listen, see `replica_ports`.
    """
    stats, metrics = _free_ports(2)
    body_s = int(settings.body_s)
    values: dict[str, object] = {
        # Everything on the loopback interface; one machine only.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": 0,
        "RAY_worker_niceness": 0,  # Ray's 15 starves the server on a busy machine
        "RAY_USAGE_STATS_ENABLED": 0,
        # A token of this cluster's own; without one Ray writes one into the home directory.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token_hex(32),
        "RAY_DEDUP_LOGS": 0,
        # Without a bound Ray keeps all that its workers print, the server's log among it.
        "RAY_ROTATION_MAX_BYTES": 16 * 1024 * 1024,
        "RAY_ROTATION_BACKUP_COUNT": 2,
        # A deployment that asks for no GPU must not be blinded to one.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": 0,
        "RAY_SERVE_LOG_TO_STDERR": 0,
        "RAY_SERVE_ENABLE_HA_PROXY": 1,
        # RAY_SERVE_THROUGHPUT_OPTIMIZED by its parts, but for gRPC between replicas.
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": 1,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": ports.start,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": ports.stop,
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": 0,
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": 0,
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": 1000,
        "RAY_SERVE_FREEZE_GC_ON_STARTUP": 1,
        # Ray kills a proxy that was not ready by then, and `up` with it, on a busy machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": 30,
        # It is replaced when three checks failed: soon if it is gone, not for being slow.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": 0.5,
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": 5,
        # `up` drains by itself before it shuts down, see `stop_listening`.
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": 0.1,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": 0,
        # Ray puts a folder of the node's name between: all paths must stay short.
        _BINARY: haproxy,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": folder / _ADMIN_SOCKET,
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": folder / "server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": folder / "metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": 0,  # the app counts its requests itself
        "RAY_SERVE_HAPROXY_STATS_PORT": stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        # A body that fits the buffer is sent again when a replica dies with it. Two buffers of each
        # busy connection bound the memory, so connections are bounded too.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": 3,
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": 1024 * 1024,
        "RAY_SERVE_HAPROXY_MAXCONN": _MAXCONN,
        "RAY_SERVE_HAPROXY_NBTHREAD": 1,
        # Longer than the app's own limits: it answers 504, and 408 to what is larger than a buffer.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": int(settings.stall_s) + 5,
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": body_s + int(settings.deadline_s) + 10,
    }
    return {name: str(value) for name, value in values.items()}


def write_start_script(
    folder: Path, binary: Path, environment_of: dict[str, str], settings: Settings
) -> None:
    """Writes the script that starts `binary`, HAProxy itself, with the lines edited."""
    for code, detail in _OWN_ERRORS.items():
        (folder / f"{code}.http").write_bytes(_error_page(code, detail))
    # In this order: half-sent bodies count as requests, but not as a caller's. Up to the size of a
    # buffer a body is read before a replica hears of it. A caller is an address or a key, hashed,
    # since nobody should read it here.
    rules = (
        "stick-table type string len 40 size 100k expire 1m store conn_cur",
        f"http-request deny deny_status 429 if METH_POST {{ be_conn gt {_BUSY} }}",
        f"http-request wait-for-body time {ceil(settings.body_s)}s at-least 1m if METH_POST",
        "http-request set-var(txn.caller) src",
        *(
            f"http-request set-var(txn.caller) req.hdr({name}) if {{ req.hdr({name}) -m found }}"
            for name in ("x-api-key", "authorization")
        ),
        "http-request track-sc0 var(txn.caller),sha1,hex",
        "http-request deny deny_status 429 "
        f"if METH_POST {{ be_conn gt {_MANY} }} {{ sc0_conn_cur gt {_MANY_OF_ONE} }}",
    )
    loopback = "s/^( *bind ) *[*]?:({ports})$/\\1127.0.0.1:\\2/".format(
        ports="|".join(
            environment_of[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS")
        )
    )
    edits = [
        loopback,
        f"s#errorfile ([0-9]+) .*#errorfile \\1 {folder}/\\1.http#",
        *(f"/^defaults$/a\\    errorfile {code} {folder}/{code}.http" for code in (408, 429)),
        *(f"/^backend http-/a\\    {rule}" for rule in rules),
        # Until it is told where replicas are, which may be half a second, it has no other answer.
        "/^backend default_backend$/,/^ *http-request return /"
        "s/^( *http-request return ).*/\\1status 503 default-errorfiles/",
        *(
            f"/^frontend {_FRONTEND}$/a\\    http-request del-header {name}"
            for name in _REFUSED_HEADERS
        ),
    ]
    script = Path(environment_of[_BINARY])
    script.write_text(
        "#!/bin/sh\n"
        "# Ray calls this as HAProxy: -db -f CONFIGURATION ...\n"
        f"sed -i -E {shlex.join(part for edit in edits for part in ('-e', edit))} "
        '"$3" || exit 1\n'
        f'exec {shlex.quote(str(binary))} "$@"\n'
    )
    script.chmod(0o755)  # in a container image, whoever runs it is not who wrote it


def write_pod_script(folder: Path, binary: Path) -> None:
    """Writes the start script of a pod to `folder`, with the time limits of default settings.

    The Dockerfile calls this.
    """
    environment_of = POD | {_BINARY: str(folder / Path(POD[_BINARY]).name)}
    defaults = Settings.model_validate({})  # mypy takes Settings() for incomplete
    write_start_script(folder, binary, environment_of, defaults)


def stop_listening(folder: Path) -> None:
    """Tells HAProxy to take no new connections; requests that run are not touched."""
    _command(folder, f"disable frontend {_FRONTEND}")


def is_haproxy(pid: int) -> bool:
    """Returns whether a process is one of HAProxy's."""
    try:
        return b"/haproxy\0-db" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def running_requests(folder: Path) -> int:
    """Returns the number of requests that HAProxy waits for."""
    lines = _command(folder, "show stat").splitlines()
    names = lines[0].lstrip("# ").split(",")
    rows = [dict(zip(names, line.split(","), strict=False)) for line in lines[1:] if line]
    return sum(
        int(row["scur"])
        for row in rows
        if row["svname"] == "BACKEND" and row["pxname"] not in ("stats", "default_backend")
    )


def _command(folder: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as admin:
        admin.settimeout(2.0)
        [path] = folder.glob(f"*/{_ADMIN_SOCKET}")
        admin.connect(str(path))
        admin.sendall(command.encode() + b"\n")
        return b"".join(iter(lambda: admin.recv(65536), b"")).decode()


def _error_page(code: int, detail: str) -> bytes:
    phrase = HTTPStatus(code).phrase
    body = bytes(plain_problem(code, phrase, detail, "").body)
    head = (
        f"HTTP/1.1 {code} {phrase}\r\nContent-Type: {MEDIA_TYPE}\r\nRetry-After: 1\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
