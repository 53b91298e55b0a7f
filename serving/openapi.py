"""The OpenAPI document: what FastAPI finds by itself, and the body forms that it cannot see.

The document is OpenAPI 3.0.3, since the Swagger UI that PyPI carries reads no 3.1.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.problem import MEDIA_TYPE
from serving.schema import CaptionParameters, CaptionRequest, Problem

_REF = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}


# What each code of `POST /v1/captions` means, for the OpenAPI page.
MEANINGS = {
    400: "An empty, truncated or undecodable image, wrong base64, or a malformed body",
    401: "No key, or one that is not known here",
    404: "No such model or version is served here",
    408: "The body did not arrive in time",
    413: "Too many bytes in the body, or too many pixels in an image",
    415: "The body, or an image in it, is of a type that this server does not read",
    422: "A parameter is unknown, given twice, or out of range, or an image cannot be fetched",
    429: "The server has no room for more, or the rate of the key is used up; `Retry-After` says"
    " when to come back",
    500: "The model gave no caption, or the server failed",
    503: "No model is loaded yet",
    504: "The deadline passed before the captions were there",
    507: "No room on disk for feedback",
}


# Where the server has no keys, none is needed.
_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_ANY_SCHEME: list[dict[str, list[str]]] = [{name: []} for name in _SCHEMES]


def describe(
    app: FastAPI,
    models: Sequence[type[BaseModel]],
    *,
    error_of: Callable[[str], type[BaseModel]],
    open_to_all: Collection[str] | None = None,
) -> dict[str, Any]:
    """Returns the OpenAPI document of `app`; made once.

    Args:
        app: Its routes are described.
        models: Of bodies that routes read by themselves, and of errors.
        error_of: Returns how errors are written under an address.
        open_to_all: The addresses that need no key, where others do; None: none does.
    """
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        bodies: list[type[BaseModel]] = [CaptionRequest, Problem, *models]
        _, extra = models_json_schema(
            [(model, "validation") for model in bodies], ref_template=_REF
        )
        document["components"]["schemas"].update(extra["$defs"])
        document["components"]["securitySchemes"] = _SCHEMES
        if open_to_all is not None:
            _ask_for_key(document, open_to_all, error_of)
        app.openapi_schema = _as_3_0(document)
        app.openapi_schema["openapi"] = "3.0.3"
    return app.openapi_schema


def _ask_for_key(
    document: dict[str, Any],
    open_to_all: Collection[str],
    error_of: Callable[[str], type[BaseModel]],
) -> None:
    """Says which operations need a key, and what is answered without."""
    document["security"] = _ANY_SCHEME
    for path, operations in document["paths"].items():
        model = error_of(path)
        media_type = MEDIA_TYPE if model is Problem else "application/json"
        answers = documented(401, 429, model=model, media_type=media_type)
        for operation in operations.values():
            if path in open_to_all:
                operation["security"] = []
            else:
                operation["responses"] = {**operation["responses"], **answers}


def captions_operation() -> dict[str, Any]:
    """Returns the parameters and the three body forms of `POST /v1/captions`."""
    parameters = CaptionParameters.model_json_schema()["properties"]
    files = {
        "type": "array",
        "minItems": 1,
        "items": _BINARY,
        "description": "One or more image files, each a part of its own.",
    }
    form = {"image": files} | {name: _plain(schema) for name, schema in parameters.items()}
    image = {"schema": _BINARY}
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema["description"],
                "schema": _plain(schema),
            }
            for name, schema in parameters.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["image"],
                        "additionalProperties": False,
                        "properties": form,
                    }
                },
                "application/json": {"schema": {"$ref": _REF.format(model="CaptionRequest")}},
                "image/*": image,
            },
        },
    }


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """Returns the body of an operation that takes JSON only; `describe` must know the model."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_or_json(fields: type[BaseModel], model: type[BaseModel]) -> dict[str, Any]:
    """Returns the two body forms of an operation that takes one image and fields beside it."""
    operation = json_body(model)
    properties = fields.model_json_schema()["properties"]
    parts = {"image": _BINARY} | {name: _part(schema) for name, schema in properties.items()}
    operation["requestBody"]["content"]["multipart/form-data"] = {
        "schema": {
            "type": "object",
            "required": ["image"],
            "additionalProperties": False,
            "properties": parts,
        }
    }
    return operation


def documented(
    *codes: int, model: type[BaseModel] = Problem, media_type: str = MEDIA_TYPE
) -> dict[int | str, dict[str, Any]]:
    """Returns OpenAPI's `responses` for the errors that a route can answer, and their form."""
    answers: dict[int | str, dict[str, Any]] = {
        code: {
            "description": MEANINGS[code],
            "content": {media_type: {"schema": {"$ref": _REF.format(model=model.__name__)}}},
        }
        for code in codes
    }
    if 429 in answers:
        answers[429]["headers"] = {
            "Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}
        }
    return answers


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "title"}


def _part(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns what a part of a form may be: one that is none is left out, not null."""
    given = [variant for variant in schema.get("anyOf", ()) if variant != {"type": "null"}]
    bare = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return bare | given[0] if given else schema


def _as_3_0(node: Any) -> Any:
    """Returns a document of JSON Schema 2020-12 in the words of OpenAPI 3.0."""
    if isinstance(node, list):
        return [_as_3_0(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _as_3_0(value) for key, value in node.items()}
    if isinstance(node.get("examples"), list):
        node["example"] = node.pop("examples")[0]
    variants = node.get("anyOf")
    if isinstance(variants, list) and {"type": "null"} in variants:
        del node["anyOf"]
        kept = [variant for variant in variants if variant != {"type": "null"}]
        if len(kept) > 1:
            node["anyOf"] = kept
        else:
            node |= {"allOf": kept} if "$ref" in kept[0] else kept[0]
        node["nullable"] = True
    return node
