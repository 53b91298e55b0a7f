"""Bad input gets a clear answer, and the next request an answer of its own."""

import socket
import struct
import time
import zlib
from pathlib import Path

import pytest
from image_zoo import FORMATS, READ_HERE, file_of, png_of, polyglots
from live import PNG, Held, as_base64, captions_of, check_problem, head, running, send
from tiny_bundle import black_picture, picture

from exports.registry import Registry

JSON = {"content-type": "application/json"}
TEXT = {"content-type": "text/plain"}


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


def truncated_jpeg():
    return picture(0, format="JPEG", size=(640, 480))[:2000]


def bomb():
    """Returns a PNG of a few bytes that states 30,000 x 30,000 pixels."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


def text_named_jpg():
    return {"files": {"image": ("photo.jpg", b"Dear reader, this is no photograph.", "image/jpeg")}}


BAD = {
    "empty body": (400, lambda _: {"content": b"", "headers": PNG}),
    "truncated JPEG": (400, lambda _: {"content": truncated_jpeg(), "headers": PNG}),
    "broken JSON": (400, lambda _: {"content": b"{", "headers": JSON}),
    "wrong base64": (400, lambda _: {"json": {"images": ["no base64!"]}}),
    "one bad image of two": (400, lambda photo: {"json": {"images": as_base64(photo, b"")}}),
    "unknown model": (404, lambda photo: {"files": {"image": photo}, "data": {"model": "vlm"}}),
    "unknown version": (
        404,
        lambda photo: {"files": {"image": photo}, "data": {"model": "tiny@9"}},
    ),
    "too many pixels": (413, lambda _: {"content": bomb(), "headers": PNG}),
    "too many bytes": (413, lambda _: {"content": b"x" * 2_000_001, "headers": PNG}),
    "text named .jpg": (415, lambda _: text_named_jpg()),
    "text as text": (415, lambda _: {"content": b"hello", "headers": TEXT}),
    "no type": (415, lambda photo: {"content": photo}),
    "num_beams=0": (422, lambda photo: {"files": {"image": photo}, "data": {"num_beams": 0}}),
    "num_beams=99": (422, lambda photo: {"json": {"images": as_base64(photo), "num_beams": 99}}),
    "unknown key": (422, lambda photo: {"json": {"images": as_base64(photo), "beams": 2}}),
    "beyond the beams": (
        422,
        lambda photo: {"files": {"image": photo}, "data": {"num_captions": 5}},
    ),
    "no room": (422, lambda photo: {"files": {"image": photo}, "data": {"prefix": "a dog " * 30}}),
    "a model without an answer": (500, lambda _: {"content": black_picture(), "headers": PNG}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_problem_and_the_next_request_an_answer(live, photos, name):
    status, request = BAD[name]
    check_problem(live.client.post("/v1/captions", **request(photos[0])), status)
    assert captions_of(live.caption(photos[0]))


def test_no_file_of_the_zoo_makes_the_server_fail(live, photos):
    types = {
        400: "urn:cutline:problem:undecodable-image",
        413: "urn:cutline:problem:image-too-large",
        415: "urn:cutline:problem:not-an-image",
    }
    files = [(file_of(kind), kind in READ_HERE) for kind in FORMATS] + [*polyglots().values()]
    files += [(png_of(*[(b"zTXt", b"a\0\0")] * 100), False), (bomb(), False)]
    for body, is_image in files:
        answer = live.caption(body)
        if is_image:
            assert captions_of(answer)
        else:
            assert answer.status_code in types
            problem = check_problem(answer, answer.status_code)
            assert problem["type"] == types[answer.status_code]
    assert captions_of(live.caption(photos[0]))


def test_details_help(live, photos):
    def detail(**request):
        return live.client.post("/v1/captions", **request).json()["detail"]

    assert "num_beams" in detail(json={"images": as_base64(photos[0]), "beams": 2})
    assert "tiny@1" in detail(files={"image": photos[0]}, data={"model": "vlm"})
    assert "Image 2 of 2" in detail(json={"images": as_base64(photos[0], b"GIF89a")})
    assert "pixels" in detail(content=bomb(), headers=PNG)


def test_200_megabytes_are_refused_without_being_kept(live, photos):
    def body():
        for _ in range(200):
            yield megabyte

    megabyte = b"x" * 1_000_000
    status = Path("/proc/self/status")

    def kilobytes(key):
        [line] = [line for line in status.read_text().splitlines() if line.startswith(key)]
        return int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    check_problem(live.client.post("/v1/captions", content=body(), headers=PNG), 413)
    assert kilobytes("VmHWM") - before < 20_000
    assert captions_of(live.caption(photos[0]))


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/captions", 405), ("GET", "/etc/passwd", 404)]
)
def test_a_wrong_address_is_a_problem_too(live, method, path, status):
    check_problem(live.client.request(method, path), status)


def test_a_body_that_stalls_is_answered_408(root, photos):
    with running(root, stall_s=1.0) as live:
        answer = send(live, head(len(photos[0])), photos[0][:100])
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()
        assert b"application/problem+json" in answer
        assert captions_of(live.caption(photos[0]))


def test_half_sent_bodies_do_not_keep_others_out(root, photos):
    with running(root, stall_s=30) as live:
        open_ends = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(64)]
        for connection in open_ends:
            connection.sendall(head(100_000) + b"half")
        start = time.monotonic()
        assert captions_of(live.caption(photos[0]))
        assert time.monotonic() - start < 15
        for connection in open_ends:
            connection.close()


def test_a_length_that_lies_harms_nobody(live, photos):
    assert b" 413 " in send(
        live, head(10**15).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    )
    shorter = head(10) + photos[0]  # the rest looks like another request, and is none
    assert b" 400 " in send(live, shorter)
    assert captions_of(live.caption(photos[0]))


def test_what_nobody_foresaw_is_a_500_that_tells_nothing(root, tiny_captioner, photos):
    class Broken(Held):
        def check(self, params):
            if params.prefix:
                raise RuntimeError("/tmp/secret exploded")

    captioner = Broken(tiny_captioner)
    captioner.go_on.set()
    with running(root, load=lambda _: captioner) as live:
        check_problem(live.caption(photos[0], params={"prefix": "a"}), 500)
        assert captions_of(live.caption(photos[0]))
