import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.metrics import FAULTS, LABELS, MAX_BYTES, MAX_SERIES, Metrics


def samples(metrics):
    families = text_string_to_metric_families(metrics.page("0").decode())
    return {
        (sample.name, *sorted(v for k, v in sample.labels.items() if k != "replica")): sample.value
        for family in families
        for sample in family.samples
    }


def test_everything_is_counted_once():
    metrics = Metrics()
    metrics.watch_queue(lambda: 7, lambda: 256)
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


def busiest():
    """Returns metrics that did everything there is, with as many codes as count apart."""
    metrics = Metrics()
    metrics.watch_queue(lambda: 7, lambda: 256)
    metrics.model_loaded("a" * 64, "1" * 64)
    metrics.model_refused("registry")
    metrics.request_refused("not_admin")
    metrics.observe_caption(0.5, 9, FAULTS)
    metrics.observe_distance(1.5, is_strange=True)
    for outcome in ("skipped", "failed", "passed"):
        metrics.proof_done(outcome)
    third = 1 / 3  # as long as a number gets
    for outcome in ("agreed", "differed", "failed", "dropped"):
        metrics.shadow.asked(outcome)
    metrics.shadow.compared(third, third, -third)
    metrics.shadow.live_alone(third)
    metrics.shadow.loaded(True)
    metrics.shadow.ended(promoted=False)
    for code in range(100, 600):
        metrics.request_started()
        metrics.request_finished("captions", code, 0.1)
    return metrics


def test_the_busiest_page_is_bounded_and_so_are_its_labels():
    page = busiest().page("255")
    families = list(text_string_to_metric_families(page.decode()))
    found = [sample for family in families for sample in family.samples]
    assert 0.9 * MAX_SERIES < len(found) <= MAX_SERIES
    room = 10 * len(found)  # for counters of a year
    assert 0.9 * MAX_BYTES < len(page) + room <= MAX_BYTES
    assert {name for sample in found for name in sample.labels} == LABELS
    assert {sample.labels["replica"] for sample in found} == {"255"}
    assert all(family.documentation for family in families)


def test_quality_is_counted_and_distances_only_where_a_bundle_can_tell():
    metrics = Metrics()
    metrics.observe_caption(0.55, 9, ["repetition"])
    metrics.observe_caption(0.05, 0, ["empty", "bad_ending"])
    found = samples(metrics)
    assert found["cutline_caption_confidence_bucket", "0.5"] == 1
    assert found["cutline_caption_confidence_sum",] == pytest.approx(0.6)
    assert found["cutline_caption_words_bucket", "10.0"] == 2
    for fault in FAULTS:
        assert found["cutline_caption_faults_total", fault] == 1
    assert not any("distance" in name or "strange" in name for name, *_ in found)
    metrics.observe_distance(1.1, is_strange=False)
    metrics.observe_distance(3.0, is_strange=True)
    found = samples(metrics)
    assert found["cutline_image_distance_bucket", "1.2"] == 1
    assert found["cutline_image_distance_sum",] == pytest.approx(4.1)
    assert found["cutline_images_strange_total",] == 1


def test_a_failed_proof_is_not_ready_until_one_passes():
    metrics = Metrics()
    metrics.model_loaded("tiny", "1")
    ready = []
    for outcome in ("skipped", "failed", "skipped", "passed"):
        metrics.proof_done(outcome)
        ready.append(samples(metrics)["cutline_ready",])
    assert ready == [1, 0, 0, 1]
    assert samples(metrics)["cutline_proofs_total", "skipped"] == 2


def test_memory_is_told_with_its_limit():
    found = samples(Metrics())
    used, limit = found["process_resident_memory_bytes",], found["cutline_memory_limit_bytes",]
    assert 10e6 < used < limit < 1e15
