"""The three body forms as bytes on the wire; whole requests are in test_app."""

import asyncio
import base64
import json

import pytest
from starlette.requests import Request

from serving.errors import (
    BodyTimeout,
    ImageTooLarge,
    MalformedRequest,
    NotAnImage,
    ParameterError,
    QueueFull,
)
from serving.limits import Budget
from serving.request import ClientGone, read_call
from serving.settings import Settings

SETTINGS = Settings(max_body_bytes=1000, max_images=3, stall_s=0.1, body_s=0.3)
PHOTO = b"the bytes of a photograph"
BASE64 = base64.b64encode(PHOTO).decode()


def read(
    kind, *chunks, query="", headers=(), pauses=0.0, settings=SETTINGS, cut=False, budget=None
):
    """Reads a request whose body comes in `chunks`, with a pause before each."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = cut
    if cut:
        messages.append({"type": "http.disconnect"})

    async def receive():
        await asyncio.sleep(pauses)
        return messages.pop(0)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/captions",
        "query_string": query.encode(),
        "headers": [(b"content-type", kind.encode()), *headers],
    }
    with (budget or Budget(10**9, "full")).share() as take:
        return asyncio.run(read_call(Request(scope, receive), settings, take))


def as_json(**fields):
    return json.dumps(fields).encode()


def form(*parts):
    """Returns a multipart body of (name, filename or None, content)."""
    lines = b""
    for name, filename, content in parts:
        named = f'; filename="{filename}"' if filename else ""
        head = f'--XX\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
        lines += head.encode() + content + b"\r\n"
    return lines + b"--XX--\r\n"


FORM = "multipart/form-data; boundary=XX"


def test_a_raw_body_in_pieces():
    call = read("image/jpeg", PHOTO[:5], PHOTO[5:], query="num_beams=2&prefix=a%20dog")
    assert call.images == [PHOTO]
    assert call.parameters.model_dump(exclude_unset=True) == {"num_beams": 2, "prefix": "a dog"}


def test_json_with_two_images_and_a_query():
    body = as_json(images=[BASE64, BASE64], num_beams=2, length_penalty=1)
    call = read("application/json; charset=utf-8", body, query="prefix=a")
    assert call.images == [PHOTO, PHOTO]
    given = call.parameters.model_dump(exclude_unset=True)
    assert given == {"num_beams": 2, "length_penalty": 1.0, "prefix": "a"}


def test_a_form_with_two_images_and_fields():
    body = form(("image", "a.jpg", PHOTO), ("num_beams", None, b"2"), ("image", "b", PHOTO))
    call = read(FORM, body, query="num_captions=2")
    assert call.images == [PHOTO, PHOTO]
    given = call.parameters.model_dump(exclude_unset=True)
    assert given == {"num_beams": 2, "num_captions": 2}


@pytest.mark.parametrize("charset", ["utf-8", "UTF-8", '"us-ascii"'])
def test_a_form_may_name_its_charset(charset):
    body = form(("image", "a.jpg", PHOTO), ("prefix", None, b"a dog"))
    assert read(f"{FORM}; charset={charset}", body).parameters.prefix == "a dog"


def test_a_large_form_is_kept_in_memory(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no file may be written")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    settings = Settings(max_body_bytes=4_000_000)
    body = form(("image", "a.jpg", b"x" * 3_000_000))
    assert read(FORM, body, settings=settings).images == [b"x" * 3_000_000]


@pytest.mark.parametrize(
    ("kind", "body", "error", "words"),
    [
        ("image/png", b"", MalformedRequest, "empty"),
        ("application/json", b"", MalformedRequest, "empty"),
        ("application/json", b'{"images": [', MalformedRequest, "JSON"),
        ("application/json", b"[" * 900, MalformedRequest, "JSON"),
        ("application/json", b'{"images": [], "num_beams": NaN}', MalformedRequest, "JSON"),
        ("application/json", b"\xff\xfe", MalformedRequest, "JSON"),
        ("application/json", b"[]", ParameterError, "object"),
        ("application/json", as_json(image=BASE64), ParameterError, "images"),
        ("application/json", as_json(images=BASE64), ParameterError, "images"),
        ("application/json", as_json(images=[1]), ParameterError, "images"),
        ("application/json", as_json(images=[]), ParameterError, "1 to 3 images"),
        ("application/json", as_json(images=[BASE64] * 4), ParameterError, "has 4"),
        ("application/json", as_json(images=[BASE64, "*"]), MalformedRequest, r"images\[1\]"),
        ("application/json", as_json(images=["é"]), MalformedRequest, "base64"),
        ("application/json", as_json(images=[BASE64], num_beam=2), ParameterError, "'num_beam'"),
        ("application/json", as_json(images=[BASE64], num_beam=2), ParameterError, "num_beams"),
        ("application/json", as_json(images=[BASE64], num_beams="2"), ParameterError, "num_beams"),
        ("application/json", as_json(images=[BASE64], num_beams=True), ParameterError, "num_beams"),
        ("application/json", as_json(images=[BASE64], num_beams=None), ParameterError, "num_beams"),
        ("application/json", as_json(images=[BASE64], num_beams=99), ParameterError, "num_beams"),
        ("application/json", as_json(images=[], prefix="\ud800"), ParameterError, "prefix"),
        ("application/json", b'{"images": [], "images": []}', ParameterError, "twice"),
        (FORM, form(("image", None, PHOTO)), ParameterError, "filename"),
        (FORM, form(("photo", "a.jpg", PHOTO)), ParameterError, "'photo'"),
        (FORM, form(("num_beams", "a.txt", b"2")), ParameterError, "not be a file"),
        (FORM, form(("num_beams", None, b"2"), ("num_beams", None, b"3")), ParameterError, "twice"),
        (FORM, form(("num_beams", None, b"2")), ParameterError, "1 to 3 images; this one has 0"),
        (FORM, form(*[("image", "a", PHOTO)] * 4), ParameterError, "has 4"),
        (FORM, b"--YY\r\nnot ours", MalformedRequest, "multipart"),
        (FORM, form(("image", "a.jpg", PHOTO))[:60], MalformedRequest, "multipart"),
        ("multipart/form-data", form(("image", "a.jpg", PHOTO)), MalformedRequest, "multipart"),
        (f"{FORM}; charset=punycode", form(("prefix", None, b"a")), MalformedRequest, "UTF-8"),
        (f"{FORM}; charset=utf-16", form(("image", "a", PHOTO)), MalformedRequest, "UTF-8"),
        ("text/plain", PHOTO, NotAnImage, "'text/plain'"),
        ("", PHOTO, NotAnImage, "no Content-Type"),
        ("application/x-www-form-urlencoded", PHOTO, NotAnImage, "urlencoded"),
    ],
)
def test_a_wrong_body_is_named(kind, body, error, words):
    with pytest.raises(error, match=words):
        read(kind, body)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("num_beams=0", "num_beams"),
        ("num_beams=two", "num_beams"),
        ("num_beams=", "num_beams"),
        ("length_penalty=nan", "length_penalty"),
        ("beams=2", "'beams'.*num_beams"),
        ("num_beams=2&num_beams=3", "twice"),
        ("%00%FF=1", "no parameter"),
    ],
)
def test_a_wrong_query_is_named(query, words):
    with pytest.raises(ParameterError, match=words):
        read("image/png", PHOTO, query=query)


def test_the_body_wins_over_the_query():
    query = "num_beams=3&num_captions=2"
    call = read("application/json", as_json(images=[BASE64], num_beams=2), query=query)
    given = call.parameters.model_dump(exclude_unset=True)
    assert given == {"num_beams": 2, "num_captions": 2}


def test_a_form_of_many_parts_is_refused_before_it_is_parsed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("no part may be parsed")

    settings = Settings(max_body_bytes=4_000_000, max_images=3)
    parts = [("image", "a.jpg", b"x")] * 3 + [("prefix", None, b"a")]
    with pytest.raises(ParameterError, match="twice"):
        read(FORM, form(*parts, *parts[3:]), settings=settings)
    monkeypatch.setattr("serving.request.MultiPartParser", refuse)
    with pytest.raises(ParameterError, match="parts"):
        read(FORM, form(*parts * 5000), settings=settings)


def test_nested_json_is_refused():
    with pytest.raises(MalformedRequest, match="nested"):
        read("application/json", b'{"images": ' + b"[" * 400 + b"]" * 400 + b"}")


def test_an_announced_length_is_refused_before_a_byte_is_read():
    with pytest.raises(ImageTooLarge, match="1000"):
        read("image/png", PHOTO, headers=[(b"content-length", b"1001")], pauses=60)


@pytest.mark.parametrize("headers", [(), [(b"content-length", b"25")], [(b"content-length", b"x")]])
def test_a_body_without_end_is_refused_at_the_limit(headers):
    with pytest.raises(ImageTooLarge, match="1000"):
        read("image/png", *[b"x" * 300] * 1000, headers=headers)


def test_a_body_of_exactly_the_limit_passes():
    assert read("image/png", b"x" * 999, b"x").images == [b"x" * 1000]


def test_bodies_share_a_budget_and_give_back_what_they_took():
    budget = Budget(1500, "no room")
    with budget.share() as take:
        take(1000)
        # What is announced costs nothing before it is there.
        with pytest.raises(BodyTimeout):
            read(
                "image/png", b"half", headers=[(b"content-length", b"900")], pauses=1, budget=budget
            )
        with pytest.raises(QueueFull, match="no room") as refusal:
            read("image/png", b"x" * 400, b"x" * 400, budget=budget)
        assert refusal.value.retry_after == 1
        assert budget.held == 1000
        assert read("image/png", b"x" * 500, budget=budget).images
    assert budget.held == 0
    assert read("image/png", b"x" * 800, budget=budget).images


def test_a_silent_client_is_let_go():
    with pytest.raises(BodyTimeout, match="0 bytes"):
        read("image/png", PHOTO, pauses=0.15)


def test_a_trickling_client_is_let_go():
    with pytest.raises(BodyTimeout):
        read("image/png", *[b"x"] * 20, pauses=0.05)


def test_a_client_that_leaves_is_noticed():
    with pytest.raises(ClientGone):
        read("image/png", PHOTO, cut=True)
