"""Requests and answers of the Open Inference Protocol, version 2, as bytes.

The protocol: https://github.com/kserve/open-inference-protocol. Its extension for binary tensors,
which the clients of NVIDIA's Triton use by default, puts them behind the JSON of a body; a header
says where the JSON ends. There a BYTES element is its length, four bytes, little-endian, and then
itself. In JSON it is a string, and strings hold no photographs: there it is base64.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from serving.errors import MalformedRequest, ParameterError
from serving.params import Caption
from serving.request import from_base64, json_object, out_of_range, shown
from serving.schema import Base64

IMAGE = "image"
CAPTIONS, SCORES = "captions", "scores"
JSON_LENGTH = "inference-header-content-length"
BINARY_OUTPUT = "binary_data_output"
# What an image with fewer captions than the others has in their place; JSON has no infinity.
NO_SCORE = float(np.finfo(np.float32).min)

_FORM = '{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["<base64>"]}]}'
_LENGTH = struct.Struct("<I")


class TensorSpec(BaseModel):
    """What a tensor must be, or will be; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


INPUTS = [TensorSpec(name=IMAGE, datatype="BYTES", shape=[-1])]
OUTPUTS = [
    TensorSpec(name=CAPTIONS, datatype="BYTES", shape=[-1, -1]),
    TensorSpec(name=SCORES, datatype="FP32", shape=[-1, -1]),
]


class InferInput(BaseModel):
    """A tensor of a request."""

    name: str = Field(examples=[IMAGE])
    shape: list[int] = Field(description="[images] or [images, 1]", examples=[[1]])
    datatype: str = Field(examples=["BYTES"])
    parameters: dict[str, Any] = Field(
        default={}, description="`binary_data_size`: bytes of the tensor behind the JSON."
    )
    data: list[Base64 | list[Base64]] | None = Field(
        default=None, description="Image files in base64, where they do not stand behind the JSON."
    )


class WantedOutput(BaseModel):
    """A tensor that the answer shall hold."""

    name: str = Field(examples=[CAPTIONS])
    parameters: dict[str, Any] = Field(
        default={}, description="`binary_data`: whether it shall stand behind the JSON."
    )


class InferRequest(BaseModel):
    """Images to caption."""

    id: str = Field(default="", max_length=256, description="Comes back in the answer.")
    inputs: list[InferInput] = Field(min_length=1, max_length=1)
    outputs: list[WantedOutput] = Field(default=[], description="Without them: all.")
    parameters: dict[str, Any] = Field(
        default={},
        description="Those of `POST /v1/captions`, and `binary_data_output`: whether outputs "
        "stand behind the JSON if nothing else is said of them.",
    )


class InferOutput(BaseModel):
    """A tensor of an answer, row by row."""

    name: str
    datatype: str
    shape: list[int] = Field(description="[images, captions of each]")
    parameters: dict[str, Any] | None = None
    data: list[str] | list[float] | None = None


class InferAnswer(BaseModel):
    """Captions and scores."""

    model_name: str
    model_version: str
    id: str
    outputs: list[InferOutput]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the answer shall hold: whether each tensor stands behind the JSON, by its name."""

    id: str
    binary: dict[str, bool]


def read_infer(body: bytes, json_length: str | None) -> tuple[list[bytes], dict[str, Any], Wanted]:
    """Returns the image files of a request, its parameters, and what it wants.

    Args:
        body: JSON, and what stands behind it.
        json_length: How long the JSON is, as the header says; None: all of it.

    Raises:
        MalformedRequest: The body is not what it says of itself.
        ParameterError: The tensors are not those of a captioner.
    """
    head, rest = _divided(body, json_length)
    try:
        asked = InferRequest.model_validate(json_object(head, _FORM), strict=True)
    except ValidationError as error:
        raise out_of_range(error) from error
    [tensor] = asked.inputs
    if (tensor.name, tensor.datatype) != (IMAGE, "BYTES"):
        raise ParameterError(
            f"The input must be called {IMAGE} and be of the type BYTES; this one is "
            f"{shown(tensor.name)} of the type {shown(tensor.datatype)}."
        )
    images = _images_of(tensor, rest)
    if tensor.shape not in ([len(images)], [len(images), 1]):
        raise ParameterError(
            f"The shape of {IMAGE} must be [images] or [images, 1], here [{len(images)}] or "
            f"[{len(images)}, 1], since it holds so many."
        )
    parameters = dict(asked.parameters)
    binary = _flag(parameters.pop(BINARY_OUTPUT, False), BINARY_OUTPUT)
    wanted = asked.outputs or [WantedOutput(name=spec.name) for spec in OUTPUTS]
    return images, parameters, Wanted(asked.id, dict(_outputs(wanted, default=binary)))


def _divided(body: bytes, json_length: str | None) -> tuple[bytes, bytes]:
    if json_length is None:
        return body, b""
    if not (json_length.isascii() and json_length.isdecimal() and len(json_length) < 16):
        raise MalformedRequest(f"{JSON_LENGTH} must be a number of bytes.")
    end = int(json_length)
    if end > len(body):
        raise MalformedRequest(f"{JSON_LENGTH} says {end}; the body has {len(body)} bytes.")
    return body[:end], body[end:]


def _images_of(tensor: InferInput, rest: bytes) -> list[bytes]:
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if rest:
            raise MalformedRequest("Bytes stand behind the JSON that no tensor claims.")
        texts = [text for row in tensor.data or [] for text in _row(row)]
        return [from_base64(text, f"data[{at}]") for at, text in enumerate(texts)]
    if tensor.data is not None:
        raise ParameterError("A tensor has data or binary_data_size, not both.")
    if type(size) is not int or size != len(rest):
        raise MalformedRequest(
            f"binary_data_size is {shown(str(size))}; {len(rest)} bytes stand behind the JSON."
        )
    return list(_elements(rest))


def _row(row: str | list[str]) -> list[str]:
    return [row] if isinstance(row, str) else row


def _elements(packed: bytes) -> Iterator[bytes]:
    """Yields the elements of a BYTES tensor."""
    place = 0
    while place < len(packed):
        start = place + _LENGTH.size
        if start > len(packed):
            break
        (length,) = _LENGTH.unpack_from(packed, place)
        place = start + length
        if place > len(packed):
            break
        yield packed[start:place]
    if place != len(packed):
        raise MalformedRequest("The binary data ends within an element.")


def _outputs(wanted: Sequence[WantedOutput], *, default: bool) -> Iterator[tuple[str, bool]]:
    names = [spec.name for spec in OUTPUTS]
    for output in wanted:
        if output.name not in names:
            raise ParameterError(
                f"There is no output {shown(output.name)}; there are {', '.join(names)}."
            )
        unknown = output.parameters.keys() - {"binary_data"}
        if unknown:
            raise ParameterError(
                f"An output has no parameter {shown(min(unknown))}, only binary_data."
            )
        yield output.name, _flag(output.parameters.get("binary_data", default), "binary_data")


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be true or false.")
    return value


def write_infer(
    model: tuple[str, str], wanted: Wanted, results: Sequence[Sequence[Caption]]
) -> tuple[bytes, dict[str, str]]:
    """Returns the body and the headers of an answer.

    Args:
        model: Name and version of who captioned.
        wanted: Which tensors, and where they stand.
        results: The captions of each image; shorter rows are filled up with "" and `NO_SCORE`.
    """
    width = max(map(len, results))
    shape = [len(results), width]
    rows = [[*row, *[None] * (width - len(row))] for row in results]
    flat = [caption for row in rows for caption in row]
    texts = [caption.text if caption else "" for caption in flat]
    scores = [caption.score if caption else NO_SCORE for caption in flat]
    outputs: list[InferOutput] = []
    tail = b""
    for name, binary in wanted.binary.items():
        datatype, packed = ("BYTES", _packed(texts)) if name == CAPTIONS else ("FP32", _le(scores))
        output = InferOutput(name=name, datatype=datatype, shape=shape)
        if binary:
            output.parameters = {"binary_data_size": len(packed)}
            tail += packed
        else:
            output.data = texts if name == CAPTIONS else scores
        outputs.append(output)
    answer = InferAnswer(model_name=model[0], model_version=model[1], id=wanted.id, outputs=outputs)
    head = answer.model_dump_json(exclude_none=True).encode()
    if not any(wanted.binary.values()):
        return head, {"content-type": "application/json"}
    return head + tail, {"content-type": "application/octet-stream", JSON_LENGTH: str(len(head))}


def _packed(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(_LENGTH.pack(len(one)) + one for one in encoded)


def _le(numbers: Sequence[float]) -> bytes:
    return np.asarray(numbers, dtype="<f4").tobytes()
