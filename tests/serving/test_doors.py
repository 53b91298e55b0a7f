"""Whatever stands in a body, no door answers 500, and errors keep the form of their door."""

import copy
import json
import random

import pytest
from live import as_base64, running
from tiny_bundle import picture

from exports.registry import Registry

PHOTO = as_base64(picture(0))[0]
URL = f"data:image/png;base64,{PHOTO}"
JSON = {"content-type": "application/json"}
SEEDS = {
    "/v1/captions": {"images": [PHOTO], "num_beams": 2, "model": "tiny"},
    "/v1/chat/completions": {
        "model": "tiny",
        "n": 2,
        "max_tokens": 3,
        "stream": False,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "text"},
        "messages": [
            {"role": "system", "content": "short"},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]},
        ],
    },
    "/v2/models/tiny/infer": {
        "id": "1",
        "inputs": [
            {
                "name": "image",
                "shape": [1],
                "datatype": "BYTES",
                "parameters": {},
                "data": [PHOTO],
            }
        ],
        "outputs": [{"name": "scores", "parameters": {"binary_data": False}}],
        "parameters": {"num_beams": 2, "binary_data_output": False},
    },
    "/v1/feedback": {"image": PHOTO, "correction": "a dog", "rating": 3, "request_id": "r"},
}
ODD = (
    *(None, True, False, 0, -1, 2, 17, 10**40, 0.5, "", "a", "\ud800", "\x00", [], {}),
    *(["a"], [[]], [None], {"a": 1}, [{"type": "image_url"}], "data:,", "data:;base64,AAAA"),
)


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    with running(root, feedback_dir=root / "feedback") as live:
        yield live


def places(node, path=()):
    """Yields the way to each value within a body, and to the body."""
    yield path
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs if isinstance(node, dict | list) else ():
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


def changed(body, way, value):
    """Returns a body with another value at a place."""
    if not way:
        return value
    body = copy.deepcopy(body)
    node = body
    for key in way[:-1]:
        node = node[key]
    node[way[-1]] = value
    return body


@pytest.mark.parametrize("path", SEEDS)
def test_no_value_anywhere_makes_a_door_fail(live, path):
    seed = SEEDS[path]
    assert live.client.post(path, json=seed).status_code in (200, 201)
    every = [changed(seed, way, odd) for way in places(seed) for odd in ODD]
    for body in random.Random(0).sample(every, min(len(every), 160)):
        answer = live.client.post(path, content=json.dumps(body), headers=JSON)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code >= 400:
            keys = {"/v1/chat/completions": {"error"}, "/v2/models/tiny/infer": {"error"}}
            assert keys.get(path, {"type"}) <= answer.json().keys()


@pytest.mark.parametrize("path", SEEDS)
@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff", b"NaN", b'{"a": 1, "a": 1}'])
def test_no_bytes_make_a_door_fail(live, path, body):
    answer = live.client.post(path, content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text
