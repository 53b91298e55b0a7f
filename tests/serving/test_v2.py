"""The Open Inference Protocol, asked by Triton's own client over a real socket."""

import base64
import json
import struct

import numpy as np
import pytest
from live import expected, running
from tiny_bundle import picture
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from exports.registry import Registry
from serving.params import Caption
from serving.tensors import NO_SCORE, Wanted, write_infer

INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def live(tmp_path_factory, tiny_bundles):
    root = tmp_path_factory.mktemp("registry")
    Registry(root).publish(tiny_bundles.one)
    with running(root, max_body_bytes=2_000_000, max_images=4) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    with triton.InferenceServerClient(f"127.0.0.1:{live.port}") as client:
        yield client


def tensor(photos, *, binary=True, shape=None):
    """Returns the input of a request: files as bytes, or in base64 where JSON holds them."""
    files = photos if binary else [base64.b64encode(photo) for photo in photos]
    values = np.array(files, dtype=np.object_).reshape(shape or [len(files)])
    image = triton.InferInput("image", values.shape, "BYTES")
    image.set_data_from_numpy(values, binary_data=binary)
    return [image]


def check(result, wanted):
    texts = [
        [text.decode() if isinstance(text, bytes) else text for text in row]
        for row in result.as_numpy("captions")
    ]
    assert texts == [[one["text"] for one in row] for row in wanted]
    scores = result.as_numpy("scores")
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[one["score"] for one in row] for row in wanted], rtol=1e-5)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("shape", [None, [3, 1]])
def test_images_get_captions_and_scores(
    client, tiny_captioner, photos, binary_in, binary_out, shape
):
    wanted = [expected(tiny_captioner, photo, num_beams=3, num_captions=2) for photo in photos[:3]]
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("captions", "scores")
    ]
    result = client.infer(
        "tiny",
        tensor(photos[:3], binary=binary_in, shape=shape),
        outputs=outputs,
        request_id="mine",
        parameters={"num_beams": 3, "num_captions": 2},
    )
    check(result, wanted)
    response = result.get_response()
    assert (response["model_name"], response["model_version"]) == ("tiny", "1")
    assert response["id"] == "mine"
    assert [("data" in output) for output in response["outputs"]] == [not binary_out] * 2


def test_by_default_all_comes_as_bytes(client, tiny_captioner, photos):
    result = client.infer("tiny", tensor(photos[:1]), model_version="1")
    check(result, [expected(tiny_captioner, photos[0])])
    assert all("data" not in output for output in result.get_response()["outputs"])


def test_only_what_is_wanted_comes(client, photos):
    outputs = [triton.InferRequestedOutput("scores")]
    result = client.infer("tiny", tensor(photos[:2]), outputs=outputs)
    assert result.as_numpy("captions") is None
    assert result.as_numpy("scores").shape == (2, 1)


def test_plain_json_is_enough(live, tiny_captioner, photos):
    image = {
        "name": "image",
        "shape": [1, 1],
        "datatype": "BYTES",
        "data": [[base64.b64encode(photos[0]).decode()]],
    }
    answer = live.client.post(INFER, json={"inputs": [image]})
    assert answer.headers["content-type"] == "application/json"
    [captions, scores] = answer.json()["outputs"]
    [wanted] = expected(tiny_captioner, photos[0])
    assert (captions["datatype"], captions["shape"]) == ("BYTES", [1, 1])
    assert captions["data"] == [wanted["text"]]
    assert scores["data"] == [pytest.approx(wanted["score"])]


def test_the_server_and_its_model_are_described(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("tiny", "2")
    assert not client.is_model_ready("vlm")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    metadata = client.get_model_metadata("tiny", "1")
    assert metadata == client.get_model_metadata("tiny")
    assert (metadata["name"], metadata["versions"]) == ("tiny", ["1"])
    assert metadata["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    assert [(one["name"], one["datatype"]) for one in metadata["outputs"]] == [
        ("captions", "BYTES"),
        ("scores", "FP32"),
    ]


def test_a_server_without_a_model_is_live_but_not_ready(tmp_path):
    with running(tmp_path, wait=False) as live:
        assert live.client.get("/v2/health/live").json() == {"live": True}
        answer = live.client.get("/v2/health/ready")
        assert answer.status_code == 503
        assert set(answer.json()) == {"error"}
        assert live.client.get("/v2/models/tiny/ready").status_code == 503


def test_the_client_is_told_what_is_wrong_and_the_next_request_is_answered(client, photos):
    for given, words in (
        ({"model_name": "vlm"}, "vlm"),
        ({"model_version": "9"}, "tiny@9"),
        ({"parameters": {"num_beams": 99}}, "num_beams"),
        ({"parameters": {"beams": 2}}, "beams"),
        ({"parameters": {"model": "tiny"}}, "model"),
        ({"inputs": tensor([photos[0], b"no image"])}, "Image 2 of 2"),
        ({"inputs": tensor(photos[:5])}, "1 to 4 images"),
        ({"outputs": [triton.InferRequestedOutput("logits")]}, "logits"),
        ({"outputs": [triton.InferRequestedOutput("scores", class_count=2)]}, "classification"),
        ({"request_compression_algorithm": "gzip"}, "Compressed"),
    ):
        request = {"model_name": "tiny", "inputs": tensor(photos[:1]), **given}
        with pytest.raises(InferenceServerException, match=words):
            client.infer(**request)
    assert client.infer("tiny", tensor(photos[:1])).as_numpy("captions").shape == (1, 1)


def packed(*elements):
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def image(**changes):
    return {"name": "image", "shape": [1], "datatype": "BYTES", **changes}


def sized(size, **changes):
    return image(parameters={"binary_data_size": size}, **changes)


PHOTO = picture(0)
CUT = packed(PHOTO)[:-1]
TEXT = base64.b64encode(PHOTO).decode()
# The tensor, the bytes behind the JSON, the length that the header says (None: the right one).
BROKEN = {
    "an element that is cut off": (400, sized(len(CUT)), CUT, None),
    "half a length": (400, sized(3), b"abc", None),
    "a size that lies": (400, sized(10), packed(PHOTO), None),
    "a size that is no number": (400, sized("x"), packed(PHOTO), None),
    "a size that is true": (400, sized(True), b"x", None),
    "both": (422, sized(len(packed(PHOTO)), data=[TEXT]), packed(PHOTO), None),
    "unclaimed bytes": (400, image(data=[TEXT]), b"rest", None),
    "a header beyond the body": (400, image(data=[TEXT]), b"", "99999999"),
    "a header that is no number": (400, image(data=[TEXT]), b"", "-1"),
    "a header within the JSON": (400, image(data=[TEXT]), b"", "10"),
    "another shape": (422, image(data=[TEXT], shape=[2]), b"", None),
    "a huge shape": (422, image(data=[TEXT], shape=[1, 10**30]), b"", None),
    "no image": (422, image(data=[], shape=[0]), b"", None),
    "no data": (422, image(), b"", None),
    "another name": (422, image(name="pixels", data=[TEXT]), b"", None),
    "another type": (422, image(datatype="FP32", data=[1.0]), b"", None),
    "no base64": (400, image(data=["?"]), b"", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_is_not_what_it_says_is_refused(live, name):
    status, tensor, rest, length = BROKEN[name]
    head = json.dumps({"inputs": [tensor]}).encode()
    headers = {"inference-header-content-length": length or str(len(head))}
    answer = live.client.post(INFER, content=head + rest, headers=headers)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}


def test_requests_are_counted_by_what_they_are(live, client, photos):
    before = live.metrics().get(("cutline_requests_total", "200", "infer"), 0)
    client.infer("tiny", tensor(photos[:1]))
    assert live.metrics()["cutline_requests_total", "200", "infer"] == before + 1
    assert live.client.get("/v2/models/tiny/config").json().keys() == {"error"}


def test_shorter_rows_are_filled_up():
    def caption(text, score):
        return Caption(text, score, score, 1, (2,))

    results = [[caption("a", -1.0)], [caption("ä", -2.0), caption("c", -3.0)]]
    body, headers = write_infer(
        ("tiny", "1"), Wanted("", {"captions": True, "scores": False}), results
    )
    length = int(headers["inference-header-content-length"])
    [captions, scores] = json.loads(body[:length])["outputs"]
    assert captions["shape"] == scores["shape"] == [2, 2]
    assert scores["data"] == [-1.0, NO_SCORE, -2.0, -3.0]
    assert body[length:] == packed(b"a", b"", "ä".encode(), b"c")
    assert captions["parameters"] == {"binary_data_size": len(body) - length}
    assert np.float32(NO_SCORE) == np.finfo(np.float32).min
