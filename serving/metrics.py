"""The server's own metrics page: a fixed, small set of series.

A histogram of b buckets costs b + 2 series (`+Inf` is one of the b), so the buckets are few, and
the number of (route, code) pairs is capped: whatever a client does, at most `MAX_SERIES` lines come
out, `MAX_BYTES` in all. No label but those of `LABELS`, and none whose values a client chooses.
"""

from collections.abc import Callable, Iterable, Iterator
from threading import Lock
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)

from exports.errors import Cause
from serving.machine import memory_limit
from serving.shadow_metrics import ShadowMetrics

MAX_SERIES = 140
MAX_BYTES = 14_000
LABELS = frozenset(
    {"replica", "route", "code", "outcome", "fault", "reason", "verdict", "model", "version", "le"}
)
FAULTS = ("repetition", "bad_ending", "empty")
_MAX_PAIRS = 24
_CAPTIONING = frozenset({"captions", "chat", "infer"})  # routes

# Without this every counter and histogram has a second, useless series: the time it was made.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """Counts what the server does; also the `EngineMetrics` of the engine. Safe from any thread."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "cutline_requests", "HTTP requests answered", ["route", "code"], registry=registry
        )
        self._seconds = Histogram(
            "cutline_request_seconds",
            "Seconds from a caption request's first byte to its answer",
            buckets=(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
            registry=registry,
        )
        self._wait = Histogram(
            "cutline_queue_wait_seconds",
            "Seconds an image waits to be encoded",
            buckets=(0.01, 0.1, 1.0),
            registry=registry,
        )
        self._batch = Summary(
            "cutline_encode_images", "Images in one encoder run", registry=registry
        )
        self._repeats = Counter(
            "cutline_encode_repeats", "Images whose encoding was kept", registry=registry
        )
        self._rows = Summary(
            "cutline_decode_step_rows",
            "Beams that images in one step may come to",
            registry=registry,
        )
        self._encode = Summary(
            "cutline_encode_seconds", "Seconds of one encoder run", registry=registry
        )
        self._step = Summary(
            "cutline_decode_step_seconds", "Seconds of one decoder step", registry=registry
        )
        self._match = Summary(
            "cutline_match_seconds", "Seconds of one matcher run", registry=registry
        )
        self._turned_away = Counter(
            "cutline_refused_requests",
            "Requests of nobody who may, by what was wrong",
            ["reason"],
            registry=registry,
        )
        self._tokens = Counter(
            "cutline_tokens", "Tokens generated in returned captions", registry=registry
        )
        self._swaps = Counter(
            "cutline_swaps", "Bundles loaded, by outcome", ["outcome"], registry=registry
        )
        self._refused = Counter(
            "cutline_bundles_refused", "Bundles not put to work", ["reason"], registry=registry
        )
        self.shadow = ShadowMetrics(registry)
        self._model = Gauge(
            "cutline_model_info",
            "1 for the bundle that answers",
            ["model", "version"],
            registry=registry,
        )
        self._proofs = Counter(
            "cutline_proofs",
            "Golden captions asked for since loading, by outcome",
            ["outcome"],
            registry=registry,
        )
        self._ready = Gauge(
            "cutline_ready", "1 when a bundle answers and its last proof held", registry=registry
        )
        self._running = Gauge(
            "cutline_requests_running", "Requests not yet answered", registry=registry
        )
        self._depth = Gauge(
            "cutline_queue_depth", "Images that wait to be encoded", registry=registry
        )
        self._queue_limit = Gauge(
            "cutline_queue_limit", "Images that may wait to be encoded", registry=registry
        )
        self._confidence = Histogram(
            "cutline_caption_confidence",
            "Probability of a caption's tokens, their geometric mean; the best caption of an image",
            buckets=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
            registry=registry,
        )
        self._words = Histogram(
            "cutline_caption_words",
            "Words of the best caption of an image",
            buckets=(4, 6, 8, 10, 12, 16, 24),
            registry=registry,
        )
        self._faults = Counter(
            "cutline_caption_faults",
            "Best captions that repeat themselves, break off or say nothing",
            ["fault"],
            registry=registry,
        )
        self._distance: Histogram | None = None
        self._strange: Counter | None = None
        Gauge(
            "cutline_memory_limit_bytes",
            "Bytes of memory that all processes of the container may take",
            registry=registry,
        ).set(memory_limit())
        ProcessCollector(registry=registry)
        self._pairs: set[tuple[str, str]] = set()
        self._lock = Lock()
        for outcome in ("loaded", "refused"):
            self._swaps.labels(outcome)
        for reason in ("no_key", "wrong_key", "not_admin", "rate"):
            self._turned_away.labels(reason)
        for cause in get_args(Cause):
            self._refused.labels(cause)
        for fault in FAULTS:
            self._faults.labels(fault)
        for outcome in ("passed", "failed", "skipped"):
            self._proofs.labels(outcome)

    def request_started(self) -> None:
        """Count one request that runs."""
        self._running.inc()

    def request_finished(self, route: str, code: int, seconds: float) -> None:
        """Count an answered request; latency is kept for routes that caption."""
        self._running.dec()
        pair = (route, str(code))
        with self._lock:
            if pair not in self._pairs:
                if len(self._pairs) >= _MAX_PAIRS:
                    pair = ("other", "other")
                self._pairs.add(pair)
        self._requests.labels(*pair).inc()
        if route in _CAPTIONING:
            self._seconds.observe(seconds)

    def request_refused(self, reason: str) -> None:
        """Count a request that the guard turned away; the reason is one of four."""
        self._turned_away.labels(reason).inc()

    def observe_queue_wait(self, seconds: float) -> None:
        """Record how long an image waited to be encoded."""
        self._wait.observe(seconds)

    def observe_batch(self, images: int) -> None:
        """Record how many images are encoded together."""
        self._batch.observe(images)

    def observe_rows(self, rows: int) -> None:
        """Record how many beams a step takes in."""
        self._rows.observe(rows)

    def observe_encode(self, seconds: float) -> None:
        """Record one run of the encoder."""
        self._encode.observe(seconds)

    def add_repeats(self, images: int) -> None:
        """Count images that were not encoded again."""
        self._repeats.inc(images)

    def observe_step(self, seconds: float) -> None:
        """Record one step of the decoder."""
        self._step.observe(seconds)

    def observe_match(self, seconds: float) -> None:
        """Record one run of the matcher."""
        self._match.observe(seconds)

    def add_tokens(self, count: int) -> None:
        """Count generated tokens."""
        self._tokens.inc(count)

    def observe_caption(self, confidence: float, words: int, faults: Iterable[str]) -> None:
        """Record the best caption of an image; `faults` are of `FAULTS`."""
        self._confidence.observe(confidence)
        self._words.observe(words)
        for fault in faults:
            self._faults.labels(fault).inc()

    def observe_distance(self, distance: float, *, is_strange: bool) -> None:
        """Record how far an image is from those that the model was trained on.

        The series appear with the first image of a bundle that can tell.
        """
        with self._lock:
            if self._distance is None:
                self._distance = Histogram(
                    "cutline_image_distance",
                    "Distance of an image's features from the training images'; theirs is 1",
                    buckets=(0.6, 0.8, 1.0, 1.2, 1.5, 2.0, 4.0),
                    registry=self._registry,
                )
                self._strange = Counter(
                    "cutline_images_strange",
                    "Images farther than all but 1 % of the training images",
                    registry=self._registry,
                )
        self._distance.observe(distance)
        if is_strange and self._strange is not None:
            self._strange.inc()

    def watch_queue(self, depth: Callable[[], int], limit: Callable[[], int]) -> None:
        """Ask how many images wait, and how many may, for every page."""
        self._depth.set_function(depth)
        self._queue_limit.set_function(limit)

    def model_loaded(self, model: str, version: str) -> None:
        """Record that a bundle went to work; the one before leaves the page."""
        self._swaps.labels("loaded").inc()
        self._model.clear()
        self._model.labels(model, version).set(1)
        self._ready.set(1)

    def model_refused(self, cause: Cause) -> None:
        """Count a bundle that was not put to work, and why."""
        self._swaps.labels("refused").inc()
        self._refused.labels(cause).inc()

    def proof_done(self, outcome: str) -> None:
        """Count a golden caption that was asked for; a wrong one means not ready."""
        self._proofs.labels(outcome).inc()
        if outcome != "skipped":
            self._ready.set(outcome == "passed")

    def page(self, replica: str = "") -> bytes:
        """Return the page in Prometheus' text format, all of it labelled with `replica`, if any."""
        if not replica:
            return generate_latest(self._registry)
        return generate_latest(_Labelled(self._registry, replica))


class _Labelled:
    """The metrics of a registry with one more label."""

    def __init__(self, registry: CollectorRegistry, replica: str) -> None:
        self._registry, self._replica = registry, replica

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [
                sample._replace(labels={"replica": self._replica, **sample.labels})
                for sample in family.samples
            ]
            yield family
