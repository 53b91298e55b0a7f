"""One scrape of a node: the pages of all its replicas, and what becomes of a dead one's."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from live import PATIENCE_S, PNG, until
from prometheus_client.parser import text_string_to_metric_families

from exports.registry import Registry
from serving.metrics import Metrics
from serving.metrics_port import MetricsPort
from serving.node_pages import NodePages, merged


def read(page):
    """Returns {(name, labels but replica): {replica: value}} of a page that must be sound."""
    found = {}
    families = list(text_string_to_metric_families(page.decode()))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        for sample in family.samples:
            labels = tuple(sorted(v for k, v in sample.labels.items() if k != "replica"))
            of_all = found.setdefault((sample.name, *labels), {})
            assert sample.labels["replica"] not in of_all, "counted twice"
            of_all[sample.labels["replica"]] = sample.value
    return found


@pytest.fixture
def replica(tmp_path):
    """Makes (metrics, pages) of one more replica of a node."""
    made = []

    def make(folder=tmp_path / "node", **times):
        metrics = Metrics()
        pages = NodePages(metrics.page, folder, **{"every_s": 0.05, "fresh_s": 60.0, **times})
        pages.start()
        made.append(pages)
        return metrics, pages

    yield make
    for pages in made:
        pages.close()


def served(metrics, times):
    for _ in range(times):
        metrics.request_started()
        metrics.request_finished("captions", 200, 0.1)


TOTAL = ("cutline_requests_total", "200", "captions")


def test_whoever_is_asked_speaks_for_all(replica):
    (one, its_pages), (two, other_pages) = replica(), replica()
    assert (its_pages.replica, other_pages.replica) == ("0", "1")
    served(one, 3)
    served(two, 5)
    until(lambda: read(its_pages.page())[TOTAL].get("1") == 5)
    until(lambda: read(other_pages.page())[TOTAL] == {"0": 3, "1": 5})
    every = read(its_pages.page())
    assert all(set(values) == {"0", "1"} for name, values in every.items() if name != TOTAL)


def test_no_counter_goes_back_whoever_answers(replica):
    (one, its_pages), (_, other_pages) = replica(), replica(every_s=60.0, fresh_s=60.0)
    last = 0
    for turn in range(20):
        served(one, 1)
        page = (its_pages if turn % 2 else other_pages).page()
        now = read(page).get(TOTAL, {}).get("0", 0)
        assert now >= last
        last = now
    assert last == 20


def test_a_page_that_is_written_meanwhile_is_not_missed(replica):
    (_, asked), (_, busy) = replica(), replica(every_s=0.0001)
    busy.page()
    for _ in range(20):
        assert set(read(asked.page())["cutline_ready",]) == {"0", "1"}


def test_one_that_leaves_is_gone_at_once_and_its_number_is_free(replica):
    (_, stays), (_, leaves) = replica(), replica()
    leaves.page()
    assert set(read(stays.page())["cutline_ready",]) == {"0", "1"}
    leaves.close()
    assert set(read(stays.page())["cutline_ready",]) == {"0"}
    _, next_pages = replica()
    assert next_pages.replica == "1"


def test_one_that_hangs_disappears_and_comes_back(replica):
    (_, pages), (_, hangs) = replica(fresh_s=0.5), replica(every_s=60.0)

    def shown():
        return set(read(pages.page())["cutline_ready",])

    until(lambda: hangs.page() and shown() == {"0", "1"})
    until(lambda: shown() == {"0"})
    until(lambda: hangs.page() and shown() == {"0", "1"})


def test_a_page_from_before_the_machine_started_is_not_believed(replica, tmp_path):
    _, pages = replica()
    old = b"%d\n%b" % (time.monotonic_ns() + 10**12, Metrics().page("7"))
    (tmp_path / "node" / "7.prom").write_bytes(old)
    (tmp_path / "node" / "8.prom").write_bytes(b"nonsense")
    assert set(read(pages.page())["cutline_ready",]) == {"0"}


@pytest.mark.parametrize("kind", ["link", "open", "file"])
def test_a_folder_that_others_may_write_to_is_not_used(replica, tmp_path, kind, caplog):
    folder = tmp_path / "bad"
    if kind == "file":
        folder.write_text("")
    elif kind == "open":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    metrics, pages = replica(folder)
    served(metrics, 1)
    assert read(pages.page())[TOTAL] == {"0": 1}
    assert "metrics are of this process alone" in caplog.text


def test_a_folder_that_goes_away_costs_no_scrape(replica, tmp_path, caplog):
    metrics, pages = replica()
    served(metrics, 1)
    for path in (tmp_path / "node").iterdir():
        path.unlink()
    (tmp_path / "node").rmdir()
    assert read(pages.page())[TOTAL] == {"0": 1}
    assert read(pages.page())[TOTAL] == {"0": 1}
    told = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(told) == 1


def test_pages_of_two_versions_of_the_server_merge():
    old = b"# HELP a A.\n# TYPE a gauge\na 1.0\n"
    new = b"# HELP a Now B.\n# TYPE a gauge\na 2.0\n# HELP b B.\n# TYPE b counter\nb 3.0\n"
    assert merged([old, new]) == (
        b"# HELP a A.\n# TYPE a gauge\na 1.0\na 2.0\n# HELP b B.\n# TYPE b counter\nb 3.0\n"
    )


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_port_of_the_node_passes_from_one_replica_to_the_next():
    number = free_port()
    ports = [
        MetricsPort(page, "127.0.0.1", number, retry_s=0.05)
        for page in (lambda: b"A", lambda: b"B")
    ]
    url = f"http://127.0.0.1:{number}"
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        ports[0].start()
        until(lambda: ports[0].is_mine)
        ports[1].start()
        until(lambda: client.get("/metrics").text == "A")
        assert client.get("/v1/models").status_code == 404
        assert not ports[1].is_mine
        ports[0].close()
        until(lambda: ports[1].is_mine)
        until(lambda: client.get("/metrics").text == "B")
    ports[1].close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", number), timeout=1)


def test_connections_that_say_nothing_do_not_pile_up():
    number = free_port()
    port = MetricsPort(lambda: b"A", "127.0.0.1", number)
    port.start()
    until(lambda: port.is_mine)
    silent = [socket.create_connection(("127.0.0.1", number), timeout=5) for _ in range(12)]
    try:
        # Those beyond the few are closed, not kept.
        assert silent[-1].recv(1) == b""
    finally:
        for one in silent:
            one.close()
        port.close()


@pytest.fixture
def processes(tmp_path, tiny_bundles):
    """Two servers of one node, as processes: [(process, client)], their registry, metrics port."""
    registry = Registry(tmp_path / "models")
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    shared = free_port()
    command = [sys.executable, "-m", "serving", "up", "--local", "--threads", "1"]
    command += ["--registry", str(registry.root), "--model", "tiny", "--port"]
    node = {
        "CUTLINE_METRICS_DIR": str(tmp_path / "node"),
        "CUTLINE_METRICS_PORT": str(shared),
        "CUTLINE_POLL_S": "0.1",
    }
    started = []
    try:
        for port in (free_port(), free_port()):
            process = subprocess.Popen(
                [*command, str(port)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **node},
            )
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S)
            started.append((process, client))
        for _, client in started:
            until(lambda client=client: answers(client, "/readyz"))
        yield started, registry, f"http://127.0.0.1:{shared}/metrics"
    finally:
        for process, client in started:
            client.close()
            process.kill()
            process.wait()


def answers(client, path):
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_two_processes_over_a_swap_and_a_death(processes, photos):
    [(first, one), (_, two)], registry, node = processes

    def scrape():
        return read(httpx.get(node, timeout=PATIENCE_S).content)

    def caption(client, times):
        for photo in photos[:times]:
            answer = client.post("/v1/captions", content=photo, headers=PNG)
            assert answer.status_code == 200

    caption(one, 3)
    caption(two, 5)
    until(lambda: sorted(scrape()[TOTAL].values()) == [3, 5])
    assert read(one.get("/metrics").content)[TOTAL] == read(two.get("/metrics").content)[TOTAL]

    registry.promote("tiny", "2")
    until(lambda: len(scrape().get(("cutline_model_info", "2", "tiny"), {})) == 2)
    after = scrape()
    assert ("cutline_model_info", "1", "tiny") not in after
    assert sorted(after[TOTAL].values()) == [3, 5]
    caption(one, 1)
    until(lambda: sorted(scrape()[TOTAL].values()) == [4, 5])

    first.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: answers_with_one(node))
    assert time.monotonic() - killed < 15  # 5 s until its page is old, and a busy machine
    assert list(scrape()[TOTAL].values()) == [5]


def answers_with_one(node):
    try:
        return len(read(httpx.get(node, timeout=PATIENCE_S).content)["cutline_ready",]) == 1
    except httpx.TransportError:
        return False  # the port is between two owners
