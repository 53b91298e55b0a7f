"""Keys on disk: made, recognised, taken back; the guard that asks for them is in test_guard."""

import hashlib
import json
import logging
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.__main__ import main
from serving.errors import KeysRejected
from serving.keys import KeyRing, make_key


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def names(ring, *keys):
    found = [ring.find(key) for key in keys]
    return [one and one[0].name for one in found]


def test_a_made_key_is_recognised_and_the_file_has_only_its_hash(file):
    one, two = make_key(file, "one", rate=2, burst=5), make_key(file, "two", admin=True)
    ring = KeyRing(file)
    assert names(ring, one, two) == ["one", "two"]
    wrong = ("", one[:-1], one + "x", one.upper(), "cutline_", "\0", "ä" * 50, one * 1000)
    assert names(ring, *wrong) == [None] * len(wrong)
    text = file.read_text()
    assert one not in text and two not in text
    assert json.loads(text) == {
        "keys": [
            {"name": "one", "sha256": sha256(one), "rate": 2.0, "burst": 5.0},
            {"name": "two", "sha256": sha256(two), "admin": True},
        ]
    }
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]
    assert len(one) > 40 and one[:12] != two[:12]


def sha256(key):
    return hashlib.sha256(key.encode()).hexdigest()


def test_writers_at_once_lose_no_key(file):
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda at: make_key(file, f"key{at}"), range(16)))
    assert names(KeyRing(file), *keys) == [f"key{at}" for at in range(16)]


def test_a_full_disk_changes_nothing(file, monkeypatch):
    old = make_key(file, "old")
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.keys.os.fsync", full)
    with pytest.raises(KeysRejected, match="No space left"):
        make_key(file, "new")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["keys.json"]
    assert names(KeyRing(file), old) == ["old"]


def test_a_changed_file_is_read_within_a_second_or_two(file, tmp_path):
    clock = Clock()
    old = make_key(file, "old")
    ring = KeyRing(file, clock=clock)
    new = make_key(file, "new")
    assert names(ring, new) == [None]  # it looks once a second
    clock.now += 1.5
    assert names(ring, old, new) == ["old", "new"]
    file.write_text(json.dumps({"keys": [{"name": "new", "sha256": sha256(new)}]}))
    clock.now += 1.5
    assert names(ring, old, new) == [None, "new"]
    file.write_text('{"keys": []}')
    clock.now += 1.5
    assert names(ring, old, new) == [None, None]  # all taken back: nobody is let in


def test_a_mounted_secret_is_followed_through_its_links(tmp_path):
    clock = Clock()
    versions = [tmp_path / name for name in ("..1", "..2")]
    keys = []
    for at, folder in enumerate(versions):
        folder.mkdir()
        keys.append(make_key(folder / "keys.json", f"v{at}"))
    data = tmp_path / "..data"
    data.symlink_to(versions[0].name)
    file = tmp_path / "keys.json"
    file.symlink_to("..data/keys.json")
    ring = KeyRing(file, clock=clock)
    assert names(ring, *keys) == ["v0", None]
    (tmp_path / "..new").symlink_to(versions[1].name)
    (tmp_path / "..new").replace(data)  # as the kubelet does
    clock.now += 1.5
    assert names(ring, *keys) == [None, "v1"]


DAMAGE = {
    "no JSON": ("{", "JSON"),
    "a misspelt field": ('{"keys": [{"name": "a", "sha": "1"}]}', "keys.0"),
    "a key in place of its hash": (
        '{"keys": [{"name": "a", "sha256": "cutline_SECRETSECRETSECRET"}]}',
        "sha256",
    ),
    "a key in place of a field": (
        '{"keys": [{"name": "a", "sha256": "%s", "cutline_SECRETSECRET": 1}]}' % ("0" * 64),
        "keys.0",
    ),
    "two of a name": (
        json.dumps({"keys": [{"name": "a", "sha256": digit * 64} for digit in "01"]}),
        "same name",
    ),
    "a rate of nothing": (
        '{"keys": [{"name": "a", "sha256": "%s", "rate": 0}]}' % ("0" * 64),
        "rate",
    ),
    "too long": (" " * 1_100_000, "more than"),
    "gone": (None, "No such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_keeps_the_keys_and_says_so_once(file, caplog, damage):
    content, words = DAMAGE[damage]
    clock = Clock()
    key = make_key(file, "old")
    good = file.read_bytes()
    ring = KeyRing(file, clock=clock)
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    for _ in range(3):
        clock.now += 1.5
        assert names(ring, key) == ["old"]
    errors = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 1
    assert words in errors[0].getMessage()
    assert "SECRET" not in caplog.text and key not in caplog.text
    with pytest.raises(KeysRejected):
        KeyRing(file)  # but a server does not start with it
    file.write_bytes(good)
    new = make_key(file, "new")
    clock.now += 1.5
    assert names(ring, key, new) == ["old", "new"]


def test_a_rate_limit_outlives_a_reload(file):
    clock = Clock()
    key = make_key(file, "one", rate=0.5, burst=1)
    ring = KeyRing(file, clock=clock)
    assert ring.find(key)[1].take() == 0
    make_key(file, "two")
    clock.now += 1.2
    assert ring.find(key)[1].take() == pytest.approx(0.8)


def test_the_command_prints_a_key_once(file, capsys, monkeypatch):
    monkeypatch.delenv("CUTLINE_KEYS_FILE", raising=False)
    assert main(["key", "ci", "--keys-file", str(file), "--rate", "2", "--burst", "4"]) == 0
    out, err = capsys.readouterr()
    [(key, bucket)] = [KeyRing(file).find(out.strip())]
    assert (key.name, key.rate, key.burst, key.admin) == ("ci", 2, 4, False)
    assert (bucket.rate, bucket.burst) == (2, 4)
    assert out.strip() not in err
    monkeypatch.setenv("CUTLINE_KEYS_FILE", str(file))
    assert main(["key", "boss", "--admin"]) == 0
    assert KeyRing(file).find(capsys.readouterr().out.strip())[0].admin


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ci",), "--keys-file"),
        (("ci", "--keys-file", "{file}"), "a key ci already"),
        (("no name", "--keys-file", "{file}"), "name"),
        (("x", "--keys-file", "{file}", "--rate", "-1"), "rate"),
        (("x", "--keys-file", "{file}", "--rate", "nan"), "rate"),
        (("x", "--keys-file", "/no/such/folder/keys.json"), "No such file"),
    ],
)
def test_a_wrong_argument_is_one_line(file, capsys, monkeypatch, arguments, words):
    monkeypatch.delenv("CUTLINE_KEYS_FILE", raising=False)
    make_key(file, "ci")
    before = file.read_bytes()
    assert main(["key", *(one.format(file=file) for one in arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err and len(err.splitlines()) == 1
    assert file.read_bytes() == before


def test_a_server_does_not_start_with_a_damaged_file(file, capsys):
    file.write_text("{")
    assert main(["up", "--local", "--keys-file", str(file), "--port", "1"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {file} is no keys file")
