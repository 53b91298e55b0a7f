"""What is fuzzed: each reader of strangers' bytes, as the server calls it.

A target takes any bytes. It returns where they are read, or refused by one of the errors that the
reader declares; anything else that is raised is a finding. Where there is a second opinion on the
same bytes, the two must agree.
"""

import asyncio
import base64
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import onnx
import uvicorn
from google.protobuf.message import DecodeError, Message
from PIL import Image
from starlette.requests import Request
from uvicorn.server import ServerState

sys.path.append(str(Path(__file__).parents[1] / "serving"))

from fake_transport import Sent
from image_zoo import READ_HERE, polyglots, saved
from tiny_bundle import picture

from exports.images import ImageSpec
from serving.chat import read_chat
from serving.connection import Connection
from serving.decode_image import ImageLimits, decode_image
from serving.errors import BundleRejected, CaptionError, MalformedRequest
from serving.feedback import _read as read_feedback
from serving.json_body import MAX_DEPTH, read_json
from serving.onnx_walk import _DEFINED, _OWN_OPERATORS, _STANDARD, check_graph
from serving.request import read_call
from serving.settings import Settings
from serving.tensors import read_infer

SPEC = ImageSpec(height=32, width=48)
LIMITS = ImageLimits(max_pixels=250_000)  # small, so that many are tried in a second
SETTINGS = Settings(max_body_bytes=100_000, max_images=4)

_loop = asyncio.new_event_loop()
Image.init()  # not within the first execution


def image(body):
    """An image file becomes the pixels of an encoder."""
    try:
        pixels = decode_image(body, SPEC, LIMITS)
    except CaptionError as error:
        _is_the_client_s(error)
    else:
        assert (pixels.shape, pixels.dtype) == ((32, 48, 3), "uint8")


def json_body(body):
    """The bounded reader of JSON says what Python's own says, but for NaN and depth."""
    try:
        found = read_json(body)
    except MalformedRequest as error:
        if "not valid" not in error.detail:
            return
        try:
            json.loads(body.decode("utf-8-sig"), parse_constant=_refuse)
        except (ValueError, RecursionError):
            return
        raise AssertionError("valid JSON was refused") from error
    assert repr(found) == repr(json.loads(body.decode("utf-8-sig")))
    assert _depth(found) <= MAX_DEPTH


def captions(body):
    """A caption request: its type and its query stand in the first two lines."""
    _read_request(read_call, body, lambda call: call.images and call.parameters)


def chat(body):
    """A conversation; see `captions`."""
    _read_request(read_chat, body, lambda call: len(call.images) == 1 and call.asked)


def feedback(body):
    """A correction; see `captions`."""
    _read_request(read_feedback, body, lambda found: found.fields)


def tensors(body):
    """An inference request: the length of its JSON stands in the first line, if it has one."""
    length, _, body = body.partition(b"\n")
    try:
        images, parameters, wanted = read_infer(body, length.decode("latin-1") or None)
    except CaptionError as error:
        _is_the_client_s(error)
    else:
        assert all(isinstance(one, bytes) for one in images)
        assert isinstance(parameters, dict) and wanted.binary


def graph(body):
    """A graph that passes the walk keeps no tensor elsewhere and calls no foreign operator."""
    try:
        check_graph("it", body)
    except BundleRejected:
        return
    try:
        _is_harmless(onnx.ModelProto.FromString(body))
    except DecodeError:
        return  # ONNX Runtime refuses it, too


def connection(body):
    """Bytes on a connection, in pieces: a request is answered once, or refused by 400."""
    cuts, _, body = body.partition(b"\n")
    _loop.run_until_complete(_on_a_connection(cuts, body))


async def _on_a_connection(cuts, body):
    failures = []
    _loop.set_exception_handler(lambda _, context: failures.append(context))
    asked = []

    async def app(scope, receive, send):
        asked.append(scope["path"])
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    sent = Sent()
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False)
    one = Connection(config, ServerState(), {}, _loop)
    one.connection_made(sent)
    for cut in (*cuts, len(body)):
        piece, body = body[:cut], body[cut:]
        if piece and not sent.is_closing():
            one.data_received(piece)
            await asyncio.sleep(0)
    for _ in range(4 * len(asked) + 4):
        await asyncio.sleep(0)
    one.connection_lost(None)
    await asyncio.sleep(0)
    codes = re.findall(rb"HTTP/1\.1 (\d+) ", b"".join(sent.writes))
    assert {*codes} <= {b"100", b"200", b"400"}, codes
    assert codes.count(b"200") <= len(asked)
    assert not failures, failures


def _is_harmless(message):
    if isinstance(message, onnx.TensorProto):
        assert not message.external_data and message.data_location == 0
    if isinstance(message, onnx.NodeProto):
        known = message.domain in _STANDARD or message.domain.startswith(_DEFINED)
        assert known or (message.domain, message.op_type) in _OWN_OPERATORS
    for _, value in message.ListFields():
        for one in [value] if isinstance(value, Message) else value if _many(value) else []:
            if isinstance(one, Message):
                _is_harmless(one)


def _many(value):
    return hasattr(value, "__iter__") and not isinstance(value, str | bytes)


def _read_request(read, body, check):
    kind, _, rest = body.partition(b"\n")
    query, _, content = rest.partition(b"\n")
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive():
        return messages.pop()

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": query,
        "headers": [(b"content-type", kind)],
    }
    try:
        found = _loop.run_until_complete(read(Request(scope, receive), SETTINGS, lambda _: None))
    except CaptionError as error:
        _is_the_client_s(error)
    else:
        assert check(found)


def _is_the_client_s(error):
    if not 400 <= error.status < 500:
        raise error
    error.detail.encode()  # it must reach the client


def _refuse(name):
    raise ValueError(name)


def _depth(value):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(_depth, inner), default=0)


def mend_png(body):
    """Returns a PNG whose chunks have the checksums that they should have; others as they are."""
    if not body.startswith(b"\x89PNG\r\n\x1a\n"):
        return body
    mended, at = bytearray(body), 8
    while at + 12 <= len(body):
        length = min(int.from_bytes(body[at : at + 4]), len(body) - at - 12)
        end = at + 8 + length
        mended[at : at + 4] = struct.pack(">I", length)
        mended[end : end + 4] = struct.pack(">I", zlib.crc32(mended[at + 4 : end]))
        at = end + 4
    return bytes(mended)


def _images():
    palette = Image.frombytes("P", (16, 16), bytes(range(256)))
    exif = Image.Exif()
    exif[0x0112] = 6
    yield from (saved(kind) for kind in READ_HERE)
    for kind in READ_HERE:
        yield picture(0, format=kind, size=(16, 16))
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        yield saved(kind, exif=exif)
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16"):
        yield saved("PNG", Image.new(mode, (9, 7)))
    for mode in ("1", "L", "LA", "P", "RGBA", "I;16", "F", "CMYK", "YCbCr", "LAB"):
        yield saved("TIFF", Image.new(mode, (9, 7)))
    for compression in ("packbits", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "lzma", "zstd"):
        yield saved("TIFF", compression=compression)
    yield saved("TIFF", Image.new("1", (16, 16)), compression="group4")
    yield saved("JPEG", progressive=True)
    yield saved("JPEG", Image.new("CMYK", (16, 16)))
    yield saved("JPEG", Image.new("L", (16, 16)))
    yield saved("WEBP", lossless=True)
    yield saved("WEBP", Image.new("RGBA", (16, 16)))
    yield saved("PNG", palette, transparency=bytes(range(256)))
    yield saved("GIF", palette, transparency=3)
    yield saved("BMP", palette)
    yield saved("BMP", Image.new("RGBA", (5, 5)))
    frames = [Image.new("RGB", (8, 8), (40 * at, 0, 0)) for at in range(3)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        yield saved(kind, frames[0], save_all=True, append_images=frames[1:])
    yield from (body for body, _ in polyglots().values() if len(body) < 4000)


def _requests():
    photo = saved("PNG")
    encoded = base64.b64encode(photo).decode()
    url = f"data:image/png;base64,{encoded}"

    def part(name, content, file=""):
        file = file and f'; filename="{file}"'
        head = f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        return head.encode() + content + b"\r\n"

    form = part("image", photo, "a.png") + part("num_beams", b"2") + b"--b--\r\n"
    rated = part("image", photo, "a.png") + part("rating", b"2") + b"--b--\r\n"
    kinds = {
        "captions": [
            (b"image/png", b"num_beams=2&prefix=a%20dog", photo),
            (b"multipart/form-data; boundary=b", b"", form),
            (b'multipart/form-data; boundary="b"; charset=utf-8', b"rerank=itm", form),
            (b"application/json", b"model=tiny", {"images": [encoded], "num_beams": 2}),
            (b"application/json", b"", {"urls": ["https://a.b/c.png"], "length_penalty": 0.5}),
        ],
        "chat": [
            (
                b"application/json",
                b"",
                {
                    "model": "tiny",
                    "n": 2,
                    "max_tokens": 9,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "messages": [
                        {"role": "system", "content": "short"},
                        {
                            "role": "user",
                            "content": [
                                {"type": "text", "text": "What is it?"},
                                {"type": "image_url", "image_url": {"url": url}},
                            ],
                        },
                    ],
                },
            ),
        ],
        "feedback": [
            (b"application/json", b"", {"image": encoded, "correction": "a dog", "rating": 3}),
            (b"multipart/form-data; boundary=b", b"", rated),
        ],
    }
    for target, cases in kinds.items():
        for kind, query, content in cases:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            yield target, kind + b"\n" + query + b"\n" + body


def _infers():
    photo = saved("PNG")
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
    there = {**tensor, "data": [base64.b64encode(photo).decode()]}
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}]
    yield b"\n" + json.dumps({"inputs": [there], "parameters": {"num_beams": 2}}).encode()
    packed = struct.pack("<I", len(photo)) + photo
    behind = {**tensor, "parameters": {"binary_data_size": len(packed)}}
    head = json.dumps({"id": "1", "inputs": [behind], "outputs": outputs}).encode()
    yield str(len(head)).encode() + b"\n" + head + packed


def _on_the_wire():
    post = b"POST /v1/captions?n=1 HTTP/1.1\r\nHost: x\r\n"
    yield b"\nGET / HTTP/1.1\r\nHost: x\r\n\r\nGET /%41 HTTP/1.1\r\nConnection: close\r\n\r\n"
    yield b"\x08\x30\n" + post + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"
    yield b"\x50\n" + post + b"Transfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nT: 1\r\n\r\n"
    yield b"\nGET /v1 HTTP/1.0\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"


def _graphs():
    helper = onnx.helper
    value = helper.make_tensor_value_info
    inner = onnx.numpy_helper.from_array(__import__("numpy").arange(3.0), "w")
    constant = helper.make_node("Constant", [], ["z"], value=inner)
    branch = helper.make_graph([constant], "b", [], [value("z", 1, [3])], initializer=[inner])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    outer = helper.make_graph([node], "a", [value("c", 9, [])], [value("y", 1, [3])])
    model = helper.make_model(outer)
    yield model.SerializeToString()
    function = helper.make_function(
        "pkg.a", "F", ["x"], ["y"], [constant], [helper.make_opsetid("", 20)]
    )
    model.functions.append(function)
    inner.data_location = onnx.TensorProto.EXTERNAL
    model.graph.initializer.append(inner)
    yield model.SerializeToString()


def seeds():
    """Returns bytes to begin with, of each target by its name."""
    found = {"image": list(_images()), "tensors": list(_infers()), "graph": list(_graphs())}
    found["connection"] = list(_on_the_wire())
    found["json_body"] = [b'{"a": [1, -2.5e3, "\\u00e4\\"[", true, null, {}]}', b"[[[[]]]]", b'"a"']
    for target, body in _requests():
        found.setdefault(target, []).append(body)
    return found


TARGETS = {
    target.__name__: target
    for target in (image, json_body, captions, chat, feedback, tensors, graph, connection)
}
