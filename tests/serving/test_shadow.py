"""A candidate that answers along: compared, promoted or refused, and never in anybody's way."""

import threading
import time

import pytest
from live import PATIENCE_S, Held, captions_of, expected, running, until
from test_loading import Watched

from exports.errors import RegistryError
from exports.registry import Registry
from exports.shadow_plan import ShadowPlan
from serving.captioner import Captioner
from serving.decode_image import ImageLimits
from serving.metrics import Metrics
from serving.params import Caption, Params
from serving.shadow import Shadow, Turn, word_overlap

ALL = ShadowPlan(version="2", share=1.0, min_requests=6, max_disagreement=1.0, max_slowdown=1e6)


@pytest.fixture
def registry(tmp_path, tiny_bundles):
    registry = Registry(tmp_path / "models")
    registry.publish(tiny_bundles.one)
    registry.publish(tiny_bundles.two)
    registry.promote("tiny", "1")
    return registry


def shadow_of(live):
    return live.client.get("/v1/models").json()["models"][0]["shadow"]


def ask_until(live, photos, condition):
    """Sends requests one by one, each with a gap behind it, until a condition holds."""
    end = time.monotonic() + PATIENCE_S
    turn = 0
    while not condition():
        assert time.monotonic() < end
        assert captions_of(live.caption(photos[turn % len(photos)]))
        turn += 1
        time.sleep(0.02)


def test_a_candidate_within_the_thresholds_is_promoted(registry, tiny_bundles, photos):
    load = Watched()
    with running(registry.root, load=load) as live:
        assert shadow_of(live) is None
        registry.set_shadow("tiny", ALL.model_copy(update={"auto": True}))
        ask_until(live, photos, lambda: live.manager.status().active.version == "2")
        assert registry.aliases("tiny") == {"production": "2", "previous": "1"}
        assert load.loaded == ["1", "2"]  # the candidate itself went to work
        assert load.most == 2
        captioner = Captioner.load(tiny_bundles.two, threads=1)
        [[caption]] = captions_of(live.caption(photos[0]))
        assert caption["text"] == expected(captioner, photos[0])[0]["text"]
        until(lambda: shadow_of(live)["verdict"].startswith("promoted: "))
        metrics, found = live.metrics(), shadow_of(live)
    assert registry.shadow("tiny").verdict == found["verdict"]
    assert (found["version"], found["loaded"]) == ("2", False)
    assert found["requests"] >= 6 and found["slowdown"] > 0
    counted = [metrics["cutline_shadow_requests_total", key] for key in ("agreed", "differed")]
    assert sum(counted) == found["requests"]
    assert counted[0] == found["agreed"]
    assert metrics["cutline_shadow_verdicts_total", "promoted"] == 1
    assert metrics["cutline_shadow_seconds_count",] == found["requests"]
    assert metrics["cutline_shadow_loaded",] == 0


def test_what_is_compared_are_the_captions_of_both(registry, tiny_bundles, tiny_captioner, photos):
    other = Captioner.load(tiny_bundles.two, threads=1)
    pairs = [
        (expected(tiny_captioner, photo)[0], expected(other, photo)[0]) for photo in photos[:4]
    ]
    assert any(one["text"] != another["text"] for one, another in pairs)
    registry.set_shadow("tiny", ALL.model_copy(update={"min_requests": 100}))
    with running(registry.root) as live:
        until(lambda: (shadow_of(live) or {}).get("loaded"))
        for asked, photo in enumerate(photos[:4], 1):
            live.caption(photo)
            until(lambda asked=asked: shadow_of(live)["requests"] == asked)
        found = shadow_of(live)
    assert found["agreed"] == sum(one["text"] == another["text"] for one, another in pairs)
    overlaps = [word_overlap(one["text"], another["text"]) for one, another in pairs]
    assert found["overlap"] == pytest.approx(sum(overlaps) / 4)
    assert found["live_score"] == pytest.approx(sum(one["score"] for one, _ in pairs) / 4)
    assert found["score"] == pytest.approx(sum(another["score"] for _, another in pairs) / 4)
    assert (found["failed"], found["dropped"], found["verdict"]) == (0, 0, "")


def test_a_candidate_beyond_a_threshold_is_refused_and_freed(registry, photos):
    load = Watched()
    plan = ALL.model_copy(update={"auto": True, "max_disagreement": 0.0})
    registry.set_shadow("tiny", plan)
    with running(registry.root, load=load) as live:
        ask_until(live, photos, lambda: registry.shadow("tiny").verdict)
        until(lambda: load.alive[1]() is None)
        assert live.manager.status().active.version == "1"
        assert live.metrics()["cutline_shadow_verdicts_total", "refused"] == 1
        assert shadow_of(live)["verdict"] == registry.shadow("tiny").verdict
    assert registry.aliases("tiny") == {"production": "1"}
    words = registry.shadow("tiny").verdict
    assert words.startswith("refused: ") and words.endswith("exceeds 0")


def test_a_slow_candidate_is_refused(registry, photos):
    plan = ALL.model_copy(update={"auto": True, "max_slowdown": 1e-6, "min_requests": 2})
    registry.set_shadow("tiny", plan)
    with running(registry.root) as live:
        ask_until(live, photos, lambda: registry.shadow("tiny").verdict)
    assert "slowdown" in registry.shadow("tiny").verdict
    assert registry.aliases("tiny") == {"production": "1"}


def test_without_auto_it_is_only_said(registry, photos):
    registry.set_shadow("tiny", ALL)
    with running(registry.root) as live:
        ask_until(live, photos, lambda: (shadow_of(live) or {}).get("verdict"))
        assert shadow_of(live)["verdict"].startswith("promote: ")
        time.sleep(0.1)
        assert live.manager.status().active.version == "1"
        registry.stop_shadow("tiny")
        until(lambda: shadow_of(live) is None)
    assert registry.aliases("tiny") == {"production": "1"}


def test_a_registry_that_is_only_read_hears_nothing(registry, photos, tmp_path):
    registry.set_shadow("tiny", ALL.model_copy(update={"auto": True}))
    url = f"file://{registry.root}"
    with running(url, cache=tmp_path / "cache", registry_of=registry) as live:
        ask_until(live, photos, lambda: "not done" in ((shadow_of(live) or {}).get("verdict", "")))
        verdict = shadow_of(live)["verdict"]
        assert live.manager.status().active.version == "1"
    assert verdict.startswith("promote: ") and verdict.endswith(
        "the registry is only read from here"
    )
    assert str(tmp_path) not in verdict
    assert registry.shadow("tiny").verdict == ""


def test_a_bad_candidate_harms_nobody(registry, tiny_bundles, photos):
    registry.publish(tiny_bundles.broken_golden)
    registry.set_shadow("tiny", ALL.model_copy(update={"version": "3", "auto": True}))
    with running(registry.root) as live:
        ask_until(live, photos, lambda: registry.shadow("tiny").verdict)
        assert live.metrics()["cutline_bundles_refused_total", "golden"] == 1
        assert live.manager.status().last_error is None
    assert registry.shadow("tiny").verdict.startswith("refused: tiny/3: golden")
    assert registry.aliases("tiny") == {"production": "1"}


def test_a_swap_takes_the_candidate_s_place(registry, tiny_bundles, photos):
    registry.publish(tiny_bundles.one)
    load = Watched()
    registry.set_shadow("tiny", ALL.model_copy(update={"min_requests": 10_000}))
    with running(registry.root, load=load) as live:
        ask_until(live, photos, lambda: (shadow_of(live) or {}).get("requests"))
        registry.promote("tiny", "3")
        ask_until(live, photos, lambda: live.manager.status().active.version == "3")
        ask_until(live, photos, lambda: shadow_of(live)["loaded"])
    assert load.loaded == ["1", "2", "3", "2"]
    assert load.most == 2


def test_the_first_of_two_servers_decides(registry):
    plan = ALL.model_copy(update={"auto": True})
    registry.set_shadow("tiny", plan)
    assert registry.conclude_shadow("tiny", plan, "promoted: first", promote=True)
    assert not registry.conclude_shadow("tiny", plan, "refused: second", promote=False)
    assert registry.shadow("tiny").verdict == "promoted: first"
    ended = registry.shadow("tiny")
    assert not registry.conclude_shadow("tiny", ended, "refused: third", promote=False)
    with pytest.raises(RegistryError, match="no tiny@9"):
        registry.set_shadow("tiny", plan.model_copy(update={"version": "9"}))
    (registry.root / "tiny" / "shadow.json").write_text("{}")
    with pytest.raises(RegistryError, match="not the plan of a shadow"):
        registry.shadow("tiny")


CAPTION = Caption(text="a dog", score=-0.5, log_prob=-1.0, tokens=3, token_ids=(1, 2, 3))


def as_usual(captioner):
    return Params.of(captioner.manifest.defaults)


@pytest.fixture
def shadow(tiny_captioner):
    """A shadow that asks a candidate, held back at its encoder, about every request."""
    held, metrics = Held(tiny_captioner), Metrics()
    shadow = Shadow(metrics.shadow, ImageLimits())
    shadow.begin(ALL, held)
    yield shadow, held
    held.go_on.set()
    shadow.end()


def offer(shadow, photo, *, alone=True):
    shadow.offer([photo], as_usual, [CAPTION], Turn(alone, 0.5))


def test_no_graph_of_a_candidate_runs_beside_a_live_request(shadow, photos):
    shadow, held = shadow
    held.go_on.set()
    with shadow.live():
        offer(shadow, photos[0])
        time.sleep(0.1)  # in which nothing may happen
        assert not held.began.is_set()
    until(lambda: shadow.report().requests == 1)
    assert held.batches == [1]


def test_a_live_request_never_waits_for_a_candidate(shadow, photos):
    """The candidate hangs in a graph for good: live requests come and go, offers are dropped."""
    shadow, held = shadow
    offer(shadow, photos[0])
    assert held.began.wait(PATIENCE_S)
    began = time.monotonic()
    for photo in photos * 10:
        with shadow.live() as turn:
            pass
        assert not turn.alone  # a candidate ran meanwhile
        offer(shadow, photo)
    assert time.monotonic() - began < 5
    assert shadow.report().dropped == 10 * len(photos) - 1  # one waits
    held.go_on.set()
    until(lambda: shadow.report().requests == 2)


def test_a_request_is_alone_only_if_no_other_ran_meanwhile(shadow):
    shadow, _ = shadow
    with shadow.live() as first, shadow.live() as second:
        pass
    with shadow.live() as third:
        pass
    assert (first.alone, second.alone, third.alone) == (False, False, True)


def test_what_only_the_candidate_fails_on_counts_against_it(shadow, photos, black_photo):
    shadow, held = shadow
    held.go_on.set()
    offer(shadow, black_photo)
    until(lambda: shadow.report().requests == 1)
    offer(shadow, b"no image")
    until(lambda: shadow.report().requests == 2)

    def at_length(captioner):
        return Params.of(captioner.manifest.defaults, prefix="a dog " * 50)

    shadow.offer([photos[0]], at_length, [CAPTION], Turn(True, 0.5))
    until(lambda: shadow.report().requests == 3)
    found = shadow.report()
    assert (found.failed, found.agreed, found.overlap, found.score) == (3, 0, 0.0, None)


def test_a_candidate_that_is_let_go_stops_at_once(shadow, photos):
    shadow, held = shadow
    with shadow.live():
        offer(shadow, photos[0])
        time.sleep(0.05)
        assert shadow.end() is held  # it waited for a gap
    assert shadow.report().requests == 0
    assert shadow.version is None
    assert not [one for one in threading.enumerate() if one.name == "cutline-shadow"]


def test_only_a_share_is_taken(tiny_captioner, photos):
    held = Held(tiny_captioner)
    shadow = Shadow(Metrics().shadow, ImageLimits())
    shadow.begin(ALL.model_copy(update={"share": 0.25}), held)
    for _ in range(400):
        offer(shadow, photos[0])
    held.go_on.set()
    until(lambda: shadow.report().requests)
    taken = shadow.report().dropped + shadow.report().requests
    shadow.end()
    assert 60 < taken < 140


def test_overlap_is_the_f1_of_words():
    assert word_overlap("a dog runs", "A dog runs") == 1
    assert word_overlap("a dog", "the cat") == 0
    assert word_overlap("a dog a dog", "a dog") == pytest.approx(2 * 2 / 6)
    assert word_overlap("", "") == 1
    assert word_overlap("", "a") == 0
