"""A look through an ONNX file before anything else reads it: what it holds must be in it.

ONNX lets a tensor point to another file, by any path that the writer likes, and a node to an
operator of any library. Neither is allowed here. The file is walked as what it is, a protocol
buffer (https://protobuf.dev/programming-guides/encoding), so that ONNX Runtime never sees one that
does not pass, and the server needs no `onnx`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from serving.errors import BundleRejected

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_FIXED = {_I64: 8, _I32: 4}
_MAX_VARINT_BYTES = 10
_MAX_TAG = 2**32 - 1
_ORT_MAGIC = b"ORTM"  # at byte 4, ONNX Runtime reads its own format instead

# By message, what its fields are that lead to tensors and nodes; of onnx.proto3, IR version 13.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {
        5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse",
    },
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}  # fmt: skip
_NODE_OPERATOR, _NODE_DOMAIN = 4, 7
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14

_STANDARD = ("", "ai.onnx")
_DEFINED = "pkg."  # PyTorch's exporter defines these in the file itself, by other operators
# What the trainer's graphs have of ONNX Runtime's own operators. Others of them open files.
_OWN_OPERATORS = (
    ("com.microsoft", "MatMulIntegerToFloat"),
    ("com.microsoft", "MultiHeadAttention"),
)


class _Field(NamedTuple):
    """A field of a message: its number, and a number or the place of its bytes."""

    number: int
    value: int = 0
    span: tuple[int, int] | None = None


def check_graph(what: str, body: bytes) -> None:
    """Looks through a file; time and memory are linear in its nodes and tensors.

    Raises:
        BundleRejected: It is no ONNX file, a tensor is kept outside of it, or an operator is
            neither ONNX's nor one that the trainer uses.
    """
    if body[4:8] == _ORT_MAGIC:
        raise BundleRejected(f"{what} is in ONNX Runtime's own format, not in ONNX")
    operators: set[tuple[str, str]] = set()
    found_graph = False
    messages = [("model", 0, len(body))]
    try:
        while messages:
            kind, start, end = messages.pop()
            operator = domain = ""
            for field in _fields(body, start, end):
                child = _CHILDREN[kind].get(field.number)
                if kind == "tensor":
                    _check_tensor(what, field)
                elif child and field.span:
                    messages.append((child, *field.span))
                    found_graph |= child == "graph"
                elif kind == "node" and field.number == _NODE_OPERATOR:
                    operator = _text(body, field)
                elif kind == "node" and field.number == _NODE_DOMAIN:
                    domain = _text(body, field)
            if kind == "node":
                operators.add((domain, operator))
    except ValueError as error:
        raise BundleRejected(f"{what} is no ONNX file: {error}") from error
    if not found_graph:
        raise BundleRejected(f"{what} is no ONNX file: it has no graph")
    for domain, operator in sorted(operators):
        known = domain in _STANDARD or domain.startswith(_DEFINED)
        if not known and (domain, operator) not in _OWN_OPERATORS:
            raise BundleRejected(
                f"{what} has the operator {operator[:60]!a} of {domain[:60]!a}: not run here"
            )


def _check_tensor(what: str, field: _Field) -> None:
    # Any location but 0: readers take the low bits of a number for the whole of it.
    if field.number == _TENSOR_EXTERNAL or (field.number == _TENSOR_LOCATION and field.value):
        raise BundleRejected(
            f"{what} keeps a tensor in another file; a bundle's graphs hold all their weights"
        )


def _text(body: bytes, field: _Field) -> str:
    if field.span is None:
        raise ValueError("a name is no text")
    start, end = field.span
    return body[start:end].decode("utf-8")


def _fields(body: bytes, start: int, end: int) -> Iterator[_Field]:
    """Yields the fields of the message that stands from `start` to `end`; raises ValueError."""
    at = start
    while at < end:
        tag, at = _varint(body, at, end)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag > _MAX_TAG:
            raise ValueError("a field has no number that it may have")
        if wire == _VARINT:
            value, at = _varint(body, at, end)
            yield _Field(number, value)
            continue
        if wire == _LEN:
            length, at = _varint(body, at, end)
        elif wire in _FIXED:
            length = _FIXED[wire]
        else:
            raise ValueError(f"a field is of the wire type {wire}")
        if length > end - at:
            raise ValueError("it is cut off")
        yield _Field(number, span=(at, at + length)) if wire == _LEN else _Field(number)
        at += length


def _varint(body: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for place in range(_MAX_VARINT_BYTES):
        if at >= end:
            raise ValueError("it is cut off")
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at
    raise ValueError("a number has no end")
