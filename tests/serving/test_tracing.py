"""Traces, read back from the SDK's own exporter."""

import subprocess
import sys
from itertools import pairwise

import pytest
from live import PNG, captions_of, check_problem, running
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import ValidationError

from exports.registry import Registry
from serving import tracing
from serving.settings import Settings
from serving.timeline import Timeline

SEARCH = ["decode", "queue", "encode", "wait", "steps"]


@pytest.fixture
def exported(monkeypatch):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("serving.tracing.otlp_provider", lambda: provider)
    return exporter


@pytest.fixture
def root(tmp_path, tiny_bundles):
    Registry(tmp_path).publish(tiny_bundles.matching, version="5")
    return tmp_path


def test_a_request_is_a_span_and_its_stages_are_within(root, exported, photos):
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {**PNG, "x-request-id": "mine", "traceparent": f"00-{trace}-{parent}-01"}
    with running(root, tracing=True) as live:
        captions_of(live.caption(photos[0], headers=headers, params={"rerank": "itm"}))
    *stages, request = exported.get_finished_spans()
    assert request.name == "POST /v1/captions"
    assert f"{request.context.trace_id:032x}" == trace
    assert f"{request.parent.span_id:016x}" == parent
    assert dict(request.attributes) == {
        "http.request.method": "POST",
        "http.route": "/v1/captions",
        "http.response.status_code": 200,
        "cutline.request_id": "mine",
        "cutline.images": 1,
        "cutline.model": "tiny@5",
    }
    assert [span.name for span in stages] == [*SEARCH, "rerank"]
    assert {span.parent.span_id for span in stages} == {request.context.span_id}
    end = request.start_time
    for span in stages:
        assert end <= span.start_time <= span.end_time  # one after the other
        end = span.end_time
    assert end <= request.end_time
    for before, after in pairwise(stages):
        assert after.start_time - before.end_time < 1000  # ns: nothing is left out between


def test_each_image_has_its_own_stages_and_one_that_fails_has_those_it_reached(
    root, exported, photos
):
    files = [("image", ("a.png", photos[0])), ("image", ("b.png", b"no image"))]
    with running(root, tracing=True) as live:
        check_problem(live.client.post("/v1/captions", files=files), 415)
        files[1] = ("image", ("b.png", photos[1]))
        assert live.client.post("/v1/captions", files=files).status_code == 200
    spans = exported.get_finished_spans()
    requests = [span for span in spans if span.name.startswith("POST")]
    bad, good = (
        {
            image: [
                span.name
                for span in spans
                if span.parent
                and span.parent.span_id == request.context.span_id
                and span.attributes["cutline.image"] == image
            ]
            for image in (0, 1)
        }
        for request in requests
    )
    assert good == {0: SEARCH, 1: SEARCH}
    assert bad[1] == []
    assert requests[0].status.status_code is StatusCode.UNSET  # the client's own fault


def test_a_failure_is_marked_and_its_words_stay_out(root, exported, monkeypatch):
    async def quoting(request, *_):
        raise KeyError(await request.body())

    monkeypatch.setattr("serving.app.read_call", quoting)
    with running(root, tracing=True) as live:
        assert live.caption(b"sesame").status_code == 500
        live.client.get("/v1/models/sesame")
        live.client.get("/healthz")
    failed, unknown = exported.get_finished_spans()
    assert failed.status.status_code is StatusCode.ERROR
    assert unknown.name == "GET other"
    assert "sesame" not in failed.to_json() + unknown.to_json()


def test_an_untraced_server_loads_none_of_it():
    # FastAPI takes the bare interface, `opentelemetry.trace` and the like, where that is installed.
    code = (
        "import sys, serving.local, serving.__main__\n"
        "heavy = ('opentelemetry.sdk', 'opentelemetry.exporter', 'serving.tracing')\n"
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_without_the_libraries_the_setting_is_refused(monkeypatch):
    monkeypatch.setattr("serving.settings.find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'cutline\[tracing\]'"):
        Settings(tracing=True)
    assert not Settings().tracing


def test_where_spans_go_is_said_by_the_environment(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    provider = tracing.otlp_provider()
    assert provider.resource.attributes["service.name"] == "cutline"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert tracing.otlp_provider().resource.attributes["service.name"] == "mine"
    provider.shutdown()


def test_stages_end_where_the_image_did():
    reached = Timeline(received=1.0, decoded=2.0, encoding=3.0)
    assert list(tracing.stages(reached)) == [("decode", 1.0, 2.0), ("queue", 2.0, 3.0)]
    assert list(tracing.stages(Timeline(received=1.0))) == []
