import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import MAX_SERIES, Metrics


def samples(metrics):
    families = text_string_to_metric_families(metrics.page().decode())
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_everything_is_counted_once():
    metrics = Metrics()
    metrics.watch_queue(lambda: 7)
    metrics.request_started()
    metrics.request_started()
    metrics.request_finished("captions", 200, 0.2)
    metrics.observe_queue_wait(0.05)
    metrics.observe_batch(3)
    metrics.observe_rows(12)
    metrics.observe_encode(0.5)
    metrics.add_repeats(2)
    metrics.observe_step(0.25)
    metrics.add_tokens(11)
    metrics.model_loaded("tiny", "1")
    metrics.model_loaded("tiny", "2")
    metrics.model_refused("hash")

    found = samples(metrics)
    assert found["cutline_requests_total", "200", "captions"] == 1
    assert found["cutline_requests_running",] == 1
    assert found["cutline_request_seconds_bucket", "0.1"] == 0
    assert found["cutline_request_seconds_bucket", "0.25"] == 1
    assert found["cutline_queue_wait_seconds_sum",] == 0.05
    assert found["cutline_encode_images_sum",] == 3
    assert found["cutline_decode_step_rows_sum",] == 12
    assert found["cutline_encode_seconds_sum",] == 0.5
    assert found["cutline_encode_repeats_total",] == 2
    assert found["cutline_decode_step_seconds_sum",] == 0.25
    assert found["cutline_tokens_total",] == 11
    assert found["cutline_queue_depth",] == 7
    assert found["cutline_swaps_total", "loaded"] == 2
    assert found["cutline_swaps_total", "refused"] == 1
    assert found["cutline_bundles_refused_total", "hash"] == 1
    assert found["cutline_bundles_refused_total", "golden"] == 0
    assert found["cutline_model_info", "2", "tiny"] == 1
    assert ("cutline_model_info", "1", "tiny") not in found


def test_latency_is_that_of_captions_alone():
    metrics = Metrics()
    metrics.request_started()
    metrics.request_finished("models", 200, 0.2)
    assert samples(metrics)["cutline_request_seconds_count",] == 0


@pytest.mark.parametrize("codes", [range(400, 404), range(100, 600)])
def test_the_page_stays_small_and_loses_no_request(codes):
    metrics = Metrics()
    metrics.model_loaded("tiny", "1")
    for route in ("captions", "models", "health", "page", "metrics", "other"):
        for code in codes:
            metrics.request_started()
            metrics.request_finished(route, code, 0.1)
    found = samples(metrics)
    assert len(found) <= MAX_SERIES
    counted = [value for (name, *_), value in found.items() if name == "cutline_requests_total"]
    assert sum(counted) == 6 * len(codes)
