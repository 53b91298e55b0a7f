"""The page's server: what it answers its own page, and what it refuses everybody else."""

import io
import json
import os
import re
import socket
import threading
from pathlib import Path

import pytest
from desk import desk, reply, served
from PIL import Image

from trainer.errors import DataError
from trainer.labelling.refits import Refits
from trainer.labelling.server import MAX_BODY, LabelServer


@pytest.fixture
def session(tmp_path: Path):
    with desk(tmp_path, given={0: ["a dog", "a <b>cat</b>"]}) as session:
        yield session


@pytest.fixture
def client(session):
    with served(session) as client:
        yield client


def stored(session) -> list[dict]:
    return [json.loads(line) for line in session.answers.path.read_bytes().splitlines()]


def test_an_answer_is_on_disk_when_its_receipt_comes(client, session) -> None:
    first = client.get("/api/next", params={"tab": "one"}).json()
    assert first["photo"] == {
        "number": 0,
        "name": "p0.png",
        "revision": 0,
        "captions": [],
        "action": None,
        "done": False,
        "proposals": ["a dog", "a <b>cat</b>"],
    }
    assert (first["ahead"], first["wanted"], first["refit"]) == (1, 1, None)
    body = reply(captions=[" a \n dog "], action="accept", proposal=1)
    answer = client.post("/api/photos/0", json=body)
    [row] = stored(session)
    assert answer.status_code == 200
    assert (row["captions"], row["action"], row["proposal"]) == (["a dog"], "accept", 1)
    assert (row["revision"], row["seconds"], row["source"]) == (1, 1.5, "human")
    state = answer.json()
    assert (state["photo"]["revision"], state["photo"]["done"]) == (1, True)
    assert (state["progress"]["labelled"], state["progress"]["left"]) == (1, 3)
    assert state["recent"] == [0]
    assert client.get("/api/next", params={"tab": "one"}).json()["photo"]["number"] == 1


def test_of_two_tabs_the_later_one_is_shown_the_other_s_answer(client, session) -> None:
    assert client.post("/api/photos/2", json=reply(captions=["mine"])).status_code == 200
    late = client.post("/api/photos/2", json=reply(captions=["yours"], tab="two"))
    assert late.status_code == 409
    assert late.json()["photo"]["captions"] == ["mine"]
    assert late.json()["photo"]["revision"] == 1
    assert [row["captions"] for row in stored(session)] == [["mine"]]
    now = client.post("/api/photos/2", json=reply(1, ["yours"], tab="two"))
    assert now.status_code == 200
    # A lost receipt: the same answer once more is stale, and what is shown is the answer itself.
    again = client.post("/api/photos/2", json=reply(1, ["yours"], tab="two"))
    assert (again.status_code, again.json()["photo"]["captions"]) == (409, ["yours"])


def test_photographs_are_served_by_number_as_jpeg_without_their_metadata(client, session) -> None:
    path = session.photos[1].path.with_suffix(".jpg")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    Image.new("RGB", (3000, 1500), (200, 30, 30)).save(path, exif=exif)
    path.replace(session.photos[1].path)
    answer = client.get("/photos/1")
    assert answer.headers["content-type"] == "image/jpeg"
    assert b"where I live" not in answer.content
    image = Image.open(io.BytesIO(answer.content))
    assert image.size == (800, 1600)  # upright, and no larger than a screen
    assert client.get("/photos/4").status_code == 404
    session.photos[0].path.unlink()
    gone = client.get("/photos/0")
    assert (gone.status_code, gone.json()["error"].endswith("p0.png: no such file")) == (404, True)
    session.photos[2].path.write_bytes(b"damaged")
    assert "not an image" in client.get("/photos/2").json()["error"]


FOREIGN = [
    {"Host": "evil.example"},
    {"Host": "127.0.0.1:1"},
    {"Host": "127.0.0.1"},
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # another server on this machine
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_other_sites_pages_are_refused(client, session, headers: dict[str, str]) -> None:
    for path in ("/", "/api/next?tab=one", "/photos/0", "/api/status?tab=one"):
        assert client.get(path, headers=headers).status_code == 403
    assert client.post("/api/photos/0", json=reply(), headers=headers).status_code == 403
    assert stored(session) == []


def test_an_answer_without_an_origin_is_refused(client, session) -> None:
    del client.headers["origin"]
    assert client.get("/api/status?tab=one").status_code == 200
    assert client.post("/api/photos/0", json=reply()).status_code == 403
    assert client.post("/api/release", json={"tab": "one"}).status_code == 403
    assert stored(session) == []


def test_localhost_is_this_machine_too(client) -> None:
    port = client.base_url.port
    names = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
    assert client.post("/api/photos/0", json=reply(), headers=names).status_code == 200


def test_it_listens_on_this_machine_alone(session) -> None:
    with LabelServer(session) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        with pytest.raises(DataError, match=rf"port {server.server_port} cannot be used"):
            LabelServer(session, port=server.server_port)


def test_nothing_leads_to_other_files(client, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((tmp_path / "photos" / "p0.png").read_bytes())
    paths = [
        *("/photos/../secret.png", "/photos/..%2fsecret.png", "/photos/%2e%2e/secret.png"),
        *("/photos//etc/passwd", "/photos/p0.png", "/photos/-1", "/photos/0x0", "/photos/٣"),
        *("/photos/99999999999999999999", "/photos/0/..", "/etc/passwd", "/api", "/page.html"),
    ]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert set(answer.json()) == {"error"}


def test_the_page_runs_its_own_script_alone(client) -> None:
    page, again = client.get("/"), client.get("/")
    policy = page.headers["content-security-policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert page.text.count(f'nonce="{nonce}"') == 2
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert nonce not in again.text
    assert "https://" not in page.text  # nothing from elsewhere
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_photograph_that_a_browser_remembers_is_of_this_run(session) -> None:
    addresses = []
    for _ in range(2):
        with served(session) as client:
            addresses += re.findall(r"/photos/\S+\?run=\w+", client.get("/").text)
            assert "max-age" in client.get("/photos/0").headers["cache-control"]
            assert client.get("/api/status?tab=t").headers["cache-control"] == "no-store"
    assert len(set(addresses)) == 2


def test_hostile_file_names_and_captions_stay_text(tmp_path: Path) -> None:
    with desk(tmp_path) as session, served(session) as client:
        words = '</script><img src=x onerror="alert(1)">'
        client.post("/api/photos/0", json=reply(captions=[words]))
        answer = client.get("/api/photos/0", params={"tab": "one"})
        assert answer.json()["photo"]["captions"] == [words]
        assert answer.headers["content-type"] == "application/json"
        assert "innerHTML" not in client.get("/").text


BAD = {
    "not JSON": (b"{", 400),
    "no object": (b"[]", 400),
    "not UTF-8": (b'{"tab": "\xff"}', 400),
    "deep": (b"[" * 60000, 400),
    "half a pair": (json.dumps(reply(captions=["\ud83d"])).encode(), 400),
    "no words": (json.dumps(reply(captions=[" \n"])).encode(), 400),
    "edit of nothing": (json.dumps(reply(captions=[])).encode(), 400),
    "clear of something": (json.dumps(reply(action="clear")).encode(), 400),
    "import": (json.dumps(reply(action="import")).encode(), 400),
    "twice": (json.dumps(reply(captions=["a dog", "A  dog"])).encode(), 400),
    "too long": (json.dumps(reply(captions=["x" * 1001])).encode(), 400),
    "too many": (json.dumps(reply(captions=[str(n) for n in range(21)])).encode(), 400),
    "a number": (json.dumps(reply(captions=[7])).encode(), 400),
    "negative": (json.dumps(reply(revision=-1)).encode(), 400),
    "text revision": (json.dumps(reply(revision="0")).encode(), 400),
    "not a number": (json.dumps(reply(seconds=float("nan"))).encode(), 400),
    "unknown key": (json.dumps(reply(source="web")).encode(), 400),
    "no tab": (b'{"revision": 0, "action": "skip", "captions": []}', 400),
    "huge": (b" " * (MAX_BODY + 1), 413),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_is_refused_with_a_reason_and_the_next_one_works(
    client, session, name: str
) -> None:
    body, status = BAD[name]
    kind = {"Content-Type": "application/json"}
    answer = client.post("/api/photos/0", content=body, headers=kind)
    assert answer.status_code == status
    assert answer.json()["error"]
    assert stored(session) == []
    assert client.post("/api/photos/0", json=reply()).status_code == 200


def test_forms_of_other_sites_are_no_answers(client, session) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = client.post(
            "/api/photos/0", content=json.dumps(reply()), headers={"Content-Type": kind}
        )
        assert answer.status_code == 415
    chunks = client.post(
        "/api/photos/0",
        content=iter([json.dumps(reply()).encode()]),  # no length
        headers={"Content-Type": "application/json"},
    )
    assert chunks.status_code == 411
    assert client.get("/api/next").status_code == 400
    assert client.get("/api/next", params={"tab": "a b"}).status_code == 400
    assert stored(session) == []


def test_a_body_that_breaks_off_stores_nothing(client, session) -> None:
    address, body = ("127.0.0.1", client.base_url.port), json.dumps(reply())
    head = (
        f"POST /api/photos/0 HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\n"
        f"Origin: http://127.0.0.1:{address[1]}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall((head + body[:-5]).encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert stored(session) == []


def test_a_disk_that_refuses_is_told_and_the_answer_can_be_given_again(
    client, session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = client.post("/api/photos/0", json=reply())
    assert answer.status_code == 507
    assert "No space left" in answer.json()["error"]
    assert session.shown(0)["revision"] == 0
    assert client.post("/api/photos/0", json=reply()).status_code == 200
    assert len(stored(session)) == 1


def full(file: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_closed_tab_gives_its_photograph_back(client) -> None:
    def ask(tab: str) -> int:
        return client.get("/api/next", params={"tab": tab}).json()["photo"]["number"]

    assert (ask("one"), ask("two"), ask("one")) == (0, 1, 0)
    assert client.post("/api/release", json={"tab": "one"}).status_code == 200
    assert ask("three") == 0


def test_training_is_considered_after_each_answer_and_its_state_told(session, tmp_path) -> None:
    began: list[int] = []
    refits = Refits(tmp_path, 2, lambda labels: began.append(labels) or [])
    with served(session, refits) as client:
        for number, action in enumerate(("edit", "skip", "edit")):
            captions = ["a dog"] if action == "edit" else []
            client.post(f"/api/photos/{number}", json=reply(0, captions, action))
        refits.stop()
        state = client.get("/api/status", params={"tab": "one", "number": "0"}).json()
    assert began == [2]
    assert state["refit"]["labels"] == 2
    assert state["photo"]["number"] == 0


def test_many_answers_at_once_are_all_kept(tmp_path: Path) -> None:
    with desk(tmp_path, count=30) as session, served(session) as client:

        def work(numbers) -> None:
            for number in numbers:
                answer = client.post(f"/api/photos/{number}", json=reply(captions=[str(number)]))
                assert answer.status_code == 200

        threads = [threading.Thread(target=work, args=(range(n, 30, 5),)) for n in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(int(row["captions"][0]) for row in stored(session)) == list(range(30))
