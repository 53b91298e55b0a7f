"""The interface over a real socket: answers, documentation, and a swap under load."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live import PNG, as_base64, captions_of, expected, running, until
from tiny_bundle import picture

from exports.registry import Registry
from serving.captioner import Captioner
from serving.metrics import MAX_SERIES

ENDS = ("", "/ready", "/infer")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_bundles):
    """A registry with version 1, which no test changes."""
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    return root


@pytest.fixture(scope="module")
def live(root):
    with running(root, max_body_bytes=2_000_000, max_images=4) as live:
        yield live


def test_the_three_forms_give_the_captions_of_the_model(live, tiny_captioner, photos):
    params = {"num_beams": 3, "num_captions": 2, "prefix": "a dog", "length_penalty": 0.5}
    wanted = [expected(tiny_captioner, photo, **params) for photo in photos[:2]]
    raw = live.caption(photos[0], params=params)
    files = [("image", (f"{at}.png", photo)) for at, photo in enumerate(photos[:2])]
    form = live.client.post("/v1/captions", files=files, data=params)
    json = live.client.post("/v1/captions", json={"images": as_base64(*photos[:2]), **params})

    for response, images in ((raw, 1), (form, 2), (json, 2)):
        for found, captions in zip(captions_of(response), wanted[:images], strict=True):
            assert len(found) == 2
            for one, other in zip(found, captions, strict=True):
                assert one == {key: pytest.approx(value) for key, value in other.items()}
    assert set(raw.json()) == {"model", "version", "request_id", "results"}
    assert (raw.json()["model"], raw.json()["version"]) == ("tiny", "1")
    assert wanted[0][0]["text"].startswith("a dog")


def test_the_request_id_is_echoed_or_made(live, photos):
    given = live.caption(photos[0], headers={**PNG, "x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == given.json()["request_id"] == "my-id.1"
    made = live.caption(photos[0], headers={**PNG, "x-request-id": "no id\tat all"})
    assert made.headers["x-request-id"] == made.json()["request_id"] != "no id\tat all"


@pytest.mark.parametrize("model", ["tiny", "tiny@1"])
def test_the_model_may_be_named(live, photos, model):
    assert captions_of(live.caption(photos[0], params={"model": model}))


def test_an_image_of_10000_by_1_is_captioned(live):
    assert captions_of(live.caption(picture(0, size=(10_000, 1))))


def test_versions_swap_under_a_stream_of_requests_and_none_fails(tmp_path, tiny_bundles, photos):
    registry = Registry(tmp_path / "models")
    for bundle in (tiny_bundles.one, tiny_bundles.two, tiny_bundles.broken_golden):
        registry.publish(bundle)
    registry.promote("tiny", "1")
    first, second = (
        Captioner.load(path, threads=1) for path in (tiny_bundles.one, tiny_bundles.two)
    )
    text = {
        "1": [expected(first, photo)[0]["text"] for photo in photos],
        "2": [expected(second, photo)[0]["text"] for photo in photos],
    }
    answers = [[] for _ in range(4)]
    stop = threading.Event()

    def stream(client, versions):
        while not stop.is_set():
            at = len(versions) % len(photos)
            response = client.post("/v1/captions", content=photos[at], headers=PNG)
            [[caption]] = captions_of(response)
            version = response.json()["version"]
            assert caption["text"] == text[version][at]
            versions.append(version)

    def all_have(count, version):
        until(lambda: all(versions.count(version) >= count for versions in answers))

    with (
        running(tmp_path / "models") as live,
        httpx.Client(base_url=live.client.base_url) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        streams = [pool.submit(stream, client, versions) for versions in answers]
        try:
            all_have(10, "1")
            registry.promote("tiny", "2")
            all_have(10, "2")
            registry.promote("tiny", "3")  # it promises captions that it does not give
            until(lambda: live.manager.status().last_error)
            all_have(30, "2")
        finally:
            stop.set()
        for future in streams:
            future.result()
        [model] = live.client.get("/v1/models").json()["models"]
        counted = live.metrics()["cutline_requests_total", "200", "captions"]
    for versions in answers:
        assert versions == sorted(versions)  # it changes once, and never back
    assert counted == sum(map(len, answers))
    assert (model["active"]["version"], model["desired"]) == ("2", "3")
    assert "golden" in model["last_error"]["reason"]
    assert str(tmp_path) not in model["last_error"]["reason"]


def test_metrics_after_traffic(live, photos):
    before = live.metrics()
    live.caption(photos[0])
    live.caption(b"")
    live.client.post("/v1/captions", json={"images": as_base64(*photos[:3])})
    after = live.metrics()

    def grew(*name):
        return after[name] - before.get(name, 0)

    assert grew("cutline_requests_total", "200", "captions") == 2
    assert grew("cutline_requests_total", "400", "captions") == 1
    assert grew("cutline_request_seconds_count") == 3
    assert grew("cutline_encode_images_sum") == grew("cutline_queue_wait_seconds_count") == 4
    assert grew("cutline_tokens_total") > 4
    assert grew("cutline_decode_step_seconds_sum") > 0
    assert grew("cutline_encode_seconds_sum") > 0
    assert after["cutline_model_info", "1", "tiny"] == 1
    assert len(after) <= MAX_SERIES


def test_the_models_page_describes_what_answers(live, tiny_captioner):
    [model] = live.client.get("/v1/models").json()["models"]
    assert model["active"]["defaults"] == tiny_captioner.manifest.defaults.model_dump()
    assert (model["reference"], model["desired"], model["last_error"]) == ("tiny", "1", None)


def test_the_documentation_is_complete_and_comes_from_here(live):
    page = live.client.get("/docs").text
    assert "http" not in page.replace("https://fastapi", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png"):
        assert f"docs/assets/{asset}" in page
        assert live.client.get(f"/docs/assets/{asset}").status_code == 200
    document = live.client.get("/openapi.json").json()
    v2 = "/v2/models/{model}"
    assert set(document["paths"]) == {
        *("/v1/captions", "/v1/models", "/v1/chat/completions", "/v1/feedback"),
        *("/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready"),
        *(v2 + version + end for version in ("", "/versions/{version}") for end in ENDS),
    }
    operation = document["paths"]["/v1/captions"]["post"]
    codes = {"200", "400", "404", "408", "413", "415", "422", "429", "500", "503", "504"}
    assert set(operation["responses"]) == codes
    assert set(operation["requestBody"]["content"]) == {
        "image/*",
        "multipart/form-data",
        "application/json",
    }
    names = {parameter["name"] for parameter in operation["parameters"]}
    schemas = document["components"]["schemas"]
    assert names | {"images", "urls"} == set(schemas["CaptionRequest"]["properties"])
    for node in walk(document):
        if "$ref" in node:
            assert node["$ref"].rpartition("/")[2] in schemas


def walk(node):
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from walk(item)


def test_the_server_needs_no_pytorch():
    code = "import sys; sys.modules['torch'] = None; import serving.app, serving.local"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
