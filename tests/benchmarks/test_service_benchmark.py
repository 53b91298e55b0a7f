"""`benchmarks/service.py` and its parts: a table comes out, and its figures mean what they say."""

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import client
import pytest
from measured import Measured, ratio, text_of


class _Slow(BaseHTTPRequestHandler):
    """One request at a time, 0.1 s each; every fourth fails, `/chunked` has no length."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    served = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert body.count(b"--4a1f0b6de7") == 2
        with self.lock:
            time.sleep(0.1)
            type(self).served += 1
            failed = self.path == "/failing" and self.served % 4 == 0
        self.send_response(503 if failed else 200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b'4\r\n{"te\r\na;x=y\r\nxt": "hi"}\r\n0\r\n\r\n')
        else:
            self.send_header("Content-Length", "14")
            self.end_headers()
            self.wfile.write(b'{"text": "hi"}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Slow)
    _Slow.served = 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_percentiles_are_latencies_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert client.percentile(values, 0.5) == 50
    assert client.percentile(values, 0.99) == 99
    assert client.percentile(values, 0.07) == 7
    assert client.percentile(values, 1.0) == 100
    assert client.percentile([3.0], 0.01) == 3
    assert math.isnan(client.percentile([], 0.5))


def test_arrivals_are_poisson() -> None:
    moments = client.arrivals(50, 40, seed=1)
    assert moments == client.arrivals(50, 40, seed=1) != client.arrivals(50, 40, seed=2)
    gaps = [b - a for a, b in zip([0.0, *moments], moments, strict=False)]
    assert min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert mean == pytest.approx(1 / 50, rel=0.1)
    assert deviation == pytest.approx(mean, rel=0.1)  # exponential: they are equal


def test_an_open_loop_counts_from_when_a_request_was_due(port: int) -> None:
    """Five at once, 0.1 s each: the last one waits for four others, and says so."""
    requests = [client.upload(port, "/", b"jpeg")]
    load = client.open_loop(port, requests, [0.0, 0.001, 0.002, 0.003, 0.004])
    assert load.errors == 0
    assert sorted(load.latencies) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.09)


def test_an_open_loop_counts_the_lateness_of_its_client(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = asyncio.sleep

    async def oversleep(seconds: float) -> None:
        await asleep(seconds + 0.3)

    monkeypatch.setattr(client.asyncio, "sleep", oversleep)
    load = client.open_loop(port, [client.upload(port, "/", b"jpeg")], [0.1])
    assert 0.4 <= load.latencies[0] < 0.6


def test_the_first_of_an_open_loop_do_not_count(port: int) -> None:
    requests = [client.upload(port, "/", b"jpeg")]
    load = client.open_loop(port, requests, [0.0, 0.2, 0.4, 0.6], warm_up=2)
    assert len(load.latencies) == len(load.answers) == 2
    assert load.seconds == pytest.approx(0.5, abs=0.09)  # from 0.2 to 0.7


def test_a_closed_loop_sends_all_in_turn(port: int) -> None:
    requests = [client.upload(port, path, b"jpeg") for path in ("/", "/chunked", "/")]
    load = client.closed_loop(port, requests, clients=2, count=6, first=1)
    assert sorted(place for place, _ in load.answers) == [0, 0, 1, 1, 2, 2]
    assert {text_of(body) for _, body in load.answers} == {"hi"}
    assert load.rate == pytest.approx(10, rel=0.2)


def test_errors_are_counted_apart(port: int) -> None:
    load = client.closed_loop(port, [client.upload(port, "/failing", b"")], clients=1, count=4)
    assert load.errors == 1 and len(load.latencies) == 3
    nobody = client.closed_loop(1, [b""], clients=1, count=2)
    assert nobody.errors == 2 and nobody.rate == 0


def test_captions_are_read_from_every_side_s_answer() -> None:
    ours = {"results": [{"captions": [{"text": "a dog"}, {"text": "a cat"}]}]}
    for answer in (ours, {"text": "a dog"}, ["a dog"]):
        assert text_of(json.dumps(answer).encode()) == "a dog"
    for answer in (b"<html>", b"[]", b"{}", b"3"):
        assert text_of(answer) == ""


def test_rows_and_ratios() -> None:
    assert ratio([2, 6, 50], [1, 2, 10]) == 3
    found = Measured(["plain", "bentoml"], ["a dog", "a cat"])
    found.offline += [40.0, 40.0, 40.0]
    for speed in (1, 2, 4):
        for side, factor in (("plain", 2), ("bentoml", 1)):
            latencies = [0.1 / factor] * 10
            answers = [(0, b'["a dog"]')] * 9 + [(1, b'["a cow"]')]
            load = client.Load(latencies, answers, 1, 1 / (speed * factor), 0.011)
            found.add("32 clients", side, load)
            found.add("9.0 a second", side, load)
    rows = list(found.rows())
    assert rows[0][:3] == ["none", "engine offline", "40.0"]
    assert rows[1] == ["32 clients", "plain", "40.0", "50", "50", "3", "90.0%"]
    assert list(found.ratios("32 clients")) == [
        "plain / engine offline, 32 clients: 1.00",
        "plain / bentoml, 32 clients: 2.00",
        "p99 of bentoml / p99 of plain, 9.0 a second: 2.00",
    ]
    assert found.client_ms() == pytest.approx(1)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/service.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows_of(stdout: str) -> dict[tuple[str, str], list[str]]:
    """Returns the table's rows by load and side."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in stdout.splitlines()
        if re.match(r"\| (\d|none)", line)
    ]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_the_plain_process_is_measured(bundle: Path, images: Path) -> None:
    done = benchmark(
        *("--bundle", str(bundle), "--images", str(images), "--sides", "plain"),
        *("--rounds", "1", "--seconds", "0.5"),
    )
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert len(rows) == 6 and float(rows.pop(("none", "engine offline"))[0]) > 0
    for (load, side), (rate, p50, p99, errors, same) in rows.items():
        assert side == "plain" and (load.endswith("a second") or "client" in load)
        assert float(rate) > 0 and float(p50) <= float(p99)
        assert (errors, same) == ("0", "100.0%")
    assert "- plain / engine offline, 32 clients: " in done.stdout
    assert "2 threads a side, medians of 1 rounds" in done.stdout


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for arguments, said in (
        (("--sides", "plain,bento"), "error: --sides: bento: there are plain, ray, litserve"),
        (("--sides", "plain", "--images", str(tmp_path)), f"error: {tmp_path}: no .avif"),
        (("--run", str(tmp_path)), f"error: {tmp_path}: no training run"),
    ):
        done = benchmark(*arguments)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith(said)
