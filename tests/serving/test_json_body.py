"""JSON is bounded before it is read, in linear time."""

import json
import time

import pytest

from serving.errors import MalformedRequest
from serving.json_body import MAX_DEPTH, MAX_TOKENS, read_json


@pytest.mark.parametrize(
    "value",
    [
        {"images": ["QUJD"], "num_beams": 4, "prefix": 'a "dog" [in] {braces} \\ '},
        [[[["\\", '"', '\\\\"[[[[', "ä☃𝄞"]]]],
        "[" * 1000,
        {"[" * 50: "]" * 50},
        1.5,
        None,
    ],
)
def test_what_is_within_bounds_is_read_as_it_is(value):
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode("utf-8-sig")) == value


def nested(depth, opening="[", closing="]"):
    return (opening * depth + closing * depth).encode()


def test_depth_is_bounded_and_brackets_in_strings_do_not_count():
    assert read_json(nested(MAX_DEPTH))
    for body in (
        nested(MAX_DEPTH + 1),
        nested(100_000),
        b"[" * 5_000_000,
        nested(MAX_DEPTH + 1, '{"a":', "1}"),
        b'["\\"", ' + nested(MAX_DEPTH) + b"]",
    ):
        with pytest.raises(MalformedRequest, match="nested"):
            read_json(body)


def test_the_number_of_values_is_bounded():
    assert len(read_json(b"[" + b"0," * (MAX_TOKENS - 3) + b"0]")) == MAX_TOKENS - 2
    for body in (b"[" + b"[]," * MAX_TOKENS + b"0]", b"[" + b'"",' * MAX_TOKENS + b"0]"):
        with pytest.raises(MalformedRequest, match="parts"):
            read_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"]]]]",
        b"[NaN]",
        b"[Infinity]",
        b"[1] 2",
        b'"\\',
        b'"a',
        b"\xff",
        "[1]".encode("utf-16"),
        b"1" * 5000,
    ],
)
def test_what_is_no_json_is_said_to_be_none(body):
    with pytest.raises(MalformedRequest, match="not valid JSON"):
        read_json(body)


@pytest.mark.parametrize("unit", [b'"', b"\\", b'\\"', b'"\\', b"a", b'""', b" "])
def test_the_time_is_linear_whatever_comes(unit):
    def seconds(size):
        body = b'"' + unit * (size // len(unit))
        start = time.process_time()
        with pytest.raises(MalformedRequest):
            read_json(body)
        return time.process_time() - start

    assert seconds(4_000_000) < 20 * seconds(500_000) + 0.2
