"""Who is let in, over a real socket, and what is said to the others."""

import json
import logging
import socket

import pytest
from live import PNG, as_base64, captions_of, check_problem, head, running, send, until

from exports.registry import Registry
from serving.guard import PROBES
from serving.keys import make_key
from serving.local import warn_if_open
from serving.settings import Settings


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    """A registry with version 1, which no test changes."""
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    return root


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A keys file, and its keys by name."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    made = {
        "plain": make_key(file, "plain"),
        "admin": make_key(file, "admin", admin=True),
        "slow": make_key(file, "slow", rate=0.01, burst=3),
    }
    return file, made


@pytest.fixture(scope="module")
def live(root, keys):
    with running(root, keys_file=keys[0]) as live:
        yield live


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_a_key_lets_in_by_either_header(live, keys, photos):
    key = keys[1]["plain"]
    for headers in (bearer(key), {"authorization": f"bearer  {key}"}, {"x-api-key": key}):
        assert captions_of(live.caption(photos[0], headers={**PNG, **headers}))
        assert live.client.get("/v1/models", headers=headers).status_code == 200
    both = {**bearer(key), "x-api-key": key}
    assert live.client.get("/v1/models", headers=both).status_code == 200


def no_keys(key, other):
    return {
        "none": ({}, ""),
        "wrong": (bearer(key[:-2]), "invalid_token"),
        "empty": ({"x-api-key": ""}, "invalid_token"),
        "no scheme": ({"authorization": key}, ""),
        "another scheme": ({"authorization": f"Basic {key}"}, ""),
        "two": ({**bearer(key), "x-api-key": other}, "invalid_token"),
        "Latin": ({"x-api-key": "ÿ" * 40}, "invalid_token"),
        "in a cookie": ({"cookie": f"key={key}"}, ""),
    }


@pytest.mark.parametrize("case", no_keys("", ""))
def test_nobody_else_is_let_in(live, keys, photos, case):
    headers, told = no_keys(keys[1]["plain"], keys[1]["admin"])[case]
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    answers = [
        live.caption(photos[0], headers={**PNG, **headers}),
        live.client.get("/v1/models", headers=headers),
        live.client.get("/metrics", headers=headers),
        live.client.get("/nothing/here", headers=headers),
        live.client.post("/healthz", headers=headers),
        live.client.get("/v1/captions/", headers=headers),
        live.client.get("/docs/../v1/models", headers=headers),
    ]
    for answer in answers:
        check_problem(answer, 401)
        assert answer.headers["www-authenticate"].startswith('Bearer realm="cutline"')
        assert ("invalid_token" in answer.headers["www-authenticate"]) == bool(told)


def test_a_path_is_what_the_router_takes_it_for(live):
    # Written out, since a client would tidy them.
    for path in (b"/docs/%2e%2e/v1/models", b"//v1/models", b"/v1/%6dodels", b"/docs/../v1/models"):
        request = b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path
        assert send(live, request).split(b" ")[1] in (b"401", b"404")


def test_probes_the_page_and_the_documentation_are_open(live):
    for path in (
        "/healthz",
        "/readyz",
        "/",
        "/docs",
        "/openapi.json",
        "/docs/assets/swagger-ui.css",
    ):
        assert live.client.get(path).status_code == 200


def test_which_pages_are_open_is_a_setting(root, keys):
    with running(root, keys_file=keys[0], open_pages=("metrics",)) as live:
        assert live.client.get("/metrics").status_code == 200
        for path in ("/", "/docs", "/docs/assets/swagger-ui.css", "/openapi.json"):
            check_problem(live.client.get(path), 401)


def test_the_answer_comes_before_a_byte_of_the_body(live):
    request = head(10_000_000).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    request = request.replace(b"Expect", b"Connection: close\r\nExpect")
    answer = send(live, request)
    assert answer.startswith(b"HTTP/1.1 401 ")  # and no 100 Continue before it


def test_who_is_refused_cannot_go_on_sending_without_end(live):
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    for request in (head(10_000_000), chunked + b"1\r\na\r\n"):
        answer = send(live, request)  # until the server closes
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert b"\r\nconnection: close\r\n" in answer.lower()
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        for _ in range(2):  # what is short may be sent to its end: the connection goes on
            connection.sendall(head(3) + b"abc")
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")


def test_what_is_below_admin_needs_an_admin_key(live, keys):
    for path in ("/v1/admin", "/v1/admin/promote", "/v1/admin/%2e%2e/models"):
        check_problem(live.client.post(path), 401)
        refused = live.client.post(path, headers=bearer(keys[1]["plain"]))
        check_problem(refused, 403)
        assert "insufficient_scope" in refused.headers["www-authenticate"]
    admitted = live.client.post("/v1/admin/promote", headers=bearer(keys[1]["admin"]))
    check_problem(admitted, 404)  # past the guard; nothing of this name is there


def test_without_keys_everybody_is_let_in_but_nothing_is_below_admin(root, photos):
    with running(root) as live:
        assert captions_of(live.caption(photos[0]))
        assert live.client.get("/metrics").status_code == 200
        for path in ("/v1/admin", "/v1/admin/promote"):
            check_problem(live.client.post(path, headers=bearer("cutline_x")), 404)
        document = live.client.get("/openapi.json").json()
        assert "security" not in document


def test_a_key_has_a_rate(live, keys, photos):
    slow, plain = bearer(keys[1]["slow"]), bearer(keys[1]["plain"])
    # Three at once; a request of two images counts as two.
    assert captions_of(live.caption(photos[0], headers={**PNG, **slow}))
    body = {"images": as_base64(*photos[:2])}
    assert captions_of(live.client.post("/v1/captions", json=body, headers=slow))
    refused = live.caption(photos[0], headers={**PNG, **slow})
    check_problem(refused, 429)
    assert 60 <= int(refused.headers["retry-after"]) <= 100
    for _ in range(5):
        assert live.client.get("/v1/models", headers=plain).status_code == 200


def test_a_request_overdraws_the_rate_and_the_next_waits(root, tmp_path, photos):
    file = tmp_path / "keys.json"
    key = make_key(file, "one", rate=0.1, burst=1)
    with running(root, keys_file=file) as live:
        body = {"images": as_base64(*photos[:4])}
        assert captions_of(live.client.post("/v1/captions", json=body, headers=bearer(key)))
        refused = live.client.get("/v1/models", headers=bearer(key))
        check_problem(refused, 429)
        assert 30 <= int(refused.headers["retry-after"]) <= 40


def test_keys_come_and_go_without_a_restart(root, tmp_path):
    file = tmp_path / "keys.json"
    old = make_key(file, "old")
    with running(root, keys_file=file) as live:

        def status(key):
            return live.client.get("/v1/models", headers=bearer(key)).status_code

        assert status(old) == 200
        new = make_key(file, "new")
        until(lambda: status(new) == 200)
        kept = [key for key in json.loads(file.read_text())["keys"] if key["name"] == "new"]
        file.write_text(json.dumps({"keys": kept}))
        until(lambda: status(old) == 401)
        file.write_text("damaged")
        assert status(new) == 200


def test_refusals_are_counted_and_no_key_is_ever_told(root, keys, photos, caplog, tmp_path):
    file = tmp_path / "keys.json"
    key = make_key(file, "one", rate=0.01, burst=2)
    caplog.set_level(logging.DEBUG)
    with running(root, keys_file=file, open_pages=("metrics",)) as live:
        said = [
            live.client.get("/v1/models", headers=bearer(key)),
            live.client.get("/v1/admin/x", headers=bearer(key)),
            live.caption(photos[0], params={"key": key}, headers={**PNG, **bearer(key)}),
            live.client.get("/v1/models", headers=bearer(key)),
            live.client.get("/v1/models", headers=bearer(key[::-1])),
            live.client.get("/v1/models"),
            live.client.get("/metrics"),
        ]
        found = live.metrics()
    assert [answer.status_code for answer in said] == [200, 403, 422, 429, 401, 401, 200]
    counted = {
        reason: found["cutline_refused_requests_total", reason]
        for reason in ("no_key", "wrong_key", "not_admin", "rate")
    }
    assert counted == {"no_key": 1, "wrong_key": 1, "not_admin": 1, "rate": 1}
    # The client, in the same process, logs what it sends.
    logged = [one.getMessage() for one in caplog.records if not one.name.startswith("http")]
    assert any("keys from" in line for line in logged)
    texts = "".join([*(f"{answer.text}{answer.headers}" for answer in said), *logged])
    for secret in (key, key[::-1], key[8:20]):
        assert secret not in texts


def test_the_interface_says_how_to_send_a_key(live):
    document = live.client.get("/openapi.json").json()
    schemes = document["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert (schemes["key"]["in"], schemes["key"]["name"]) == ("header", "X-API-Key")
    assert document["security"] == [{"bearer": []}, {"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            is_probe = path in PROBES
            assert (operation.get("security") == []) == is_probe
            assert ("401" in operation["responses"]) != is_probe


@pytest.mark.parametrize(
    "headers",
    [
        b"X-A: " + b"a" * 40_000 + b"\r\n",
        b"X-A: a\r\n" * 101,
        b"Cookie: a\r\n" * 90 + b"A: b\r\n" * 90,
    ],
)
def test_a_flood_of_headers_is_refused(live, headers):
    answer = send(
        live, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + b"\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert live.client.get("/healthz").status_code == 200


def test_an_address_of_40_kilobytes_is_refused(live):
    answer = send(
        live,
        b"GET /healthz?" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("host", "keys_file", "warned"),
    [
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("10.0.0.1", None, True),
        ("example.org", None, True),
        ("127.0.0.1", None, False),
        ("::1", None, False),
        ("localhost", None, False),
        ("0.0.0.0", "keys.json", False),
    ],
)
def test_a_server_that_is_open_to_a_network_says_so(host, keys_file, warned, caplog):
    warn_if_open(Settings(host=host, keys_file=keys_file))
    assert ("open to everybody" in caplog.text) == warned
