"""The server's settings: arguments first, then `CUTLINE_*` environment variables, then these."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from exports.registry import DEFAULT_REGISTRY
from exports.remote import is_url
from serving.limits import MAX_PIXELS
from serving.logs import LogFormat


def _location(value: Path | str) -> Path | str:
    return str(value) if is_url(value) else Path(value)


Location = Annotated[Path | str, AfterValidator(_location)]


class Settings(BaseSettings):
    """Every knob of the server; `CUTLINE_MAX_QUEUE=64` sets `max_queue`."""

    model_config = SettingsConfigDict(env_prefix="CUTLINE_", extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")

    registry: Location = Field(
        DEFAULT_REGISTRY, description="folder or URL that holds <model>/<version>/"
    )
    cache: Path | None = Field(None, description="folder for what is fetched from a URL")
    model: str = Field("cutline-base", description="name, name@version or name@alias to follow")
    poll_s: PositiveFloat = Field(1.0, description="seconds between two looks at the registry")
    retry_s: PositiveFloat = Field(30.0, description="seconds before a refused bundle is retried")
    proof_s: PositiveFloat = Field(
        30.0, description="seconds in which a bundle must caption its golden images"
    )

    keys_file: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="JSON file of API keys, see `python -m serving key`; none: open to all"
    )
    open_pages: tuple[Literal["page", "docs", "metrics"], ...] = Field(
        ("page", "docs"), description="what needs no key where there are keys, beside the probes"
    )

    fetch_hosts: tuple[str, ...] = Field(
        (), description="hosts from which images may be fetched, host or host:port; none: no one's"
    )
    fetch_private: bool = Field(False, description="fetch by http and from private addresses too")
    fetch_s: PositiveFloat = Field(10.0, description="seconds to fetch the images of a request")

    provider: Literal["cpu", "cuda", "auto"] = "auto"
    threads: PositiveInt = Field(os.cpu_count() or 1, description="threads of one decode step")
    decode_threads: PositiveInt = Field(2, description="photographs decoded at the same time")
    latency_target_s: PositiveFloat = Field(
        1.0, description="seconds an image should take, its wait aside: fewer run together if not"
    )
    max_rows: PositiveInt = Field(128, description="beams that run together at most")
    max_queue: PositiveInt = Field(
        256, description="images that may wait, fewer if too late: then 429"
    )
    cache_bytes: int = Field(
        32 * 1024 * 1024, ge=0, description="bytes of encoded images kept for when they come again"
    )
    deadline_s: PositiveFloat = Field(30.0, description="seconds from a read body to its answer")

    log_format: LogFormat = Field("text", description="lines of the log: text or json")
    log_file: Path | None = Field(None, description="where its lines go in place of stderr")
    log_captions: bool = Field(False, description="write captions to the log")
    metrics_dir: Path | None = Field(
        None, description="folder where the replicas of a node show their metrics together"
    )
    metrics_host: str = Field("127.0.0.1", description="address of the metrics' own port")
    metrics_port: int = Field(0, ge=0, le=65535, description="port for metrics alone; 0: none")
    tracing: bool = Field(False, description="send OpenTelemetry traces, see OTEL_* variables")
    reproof_s: float = Field(
        300.0,
        ge=0,
        description="seconds between two checks of a golden caption; 0: at loading only",
    )

    # A 12-megapixel JPEG is 3 to 8 MB; base64 adds a third.
    max_body_bytes: PositiveInt = Field(16 * 1024 * 1024, description="bytes of one request body")
    max_held_bytes: PositiveInt = Field(
        512 * 1024 * 1024, description="bytes of all bodies held at once; beyond that 429"
    )
    max_images: PositiveInt = Field(16, description="images in one request")
    max_pixels: PositiveInt = Field(MAX_PIXELS, description="pixels of one image, before decoding")
    stall_s: PositiveFloat = Field(10.0, description="longest silence while a body is read")
    body_s: PositiveFloat = Field(120.0, description="longest time to read a body")

    feedback_dir: Path | None = Field(
        None, description="folder for corrections and their photographs; without it none are taken"
    )
    feedback_bytes: PositiveInt = Field(
        1024 * 1024 * 1024, description="bytes that feedback may take there; beyond that 507"
    )

    @field_validator("tracing")
    @classmethod
    def _has_its_libraries(cls, tracing: bool) -> bool:
        if tracing and not _can_trace():
            raise ValueError("needs OpenTelemetry: pip install 'cutline[tracing]'")
        return tracing


def _can_trace() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:  # not even its parent
        return False
