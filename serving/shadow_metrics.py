"""The part of the metrics page that tells of a shadow."""

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary

Outcome = Literal["agreed", "differed", "failed", "dropped"]


class ShadowMetrics:
    """Counts what a candidate answers beside the version that serves. Safe from any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Adds its series to a registry's page."""
        self._requests = Counter(
            "cutline_shadow_requests",
            "Live requests meant for the candidate too, by outcome",
            ["outcome"],
            registry=registry,
        )
        self._overlap = Summary(
            "cutline_shadow_overlap", "F1 of the words of both captions", registry=registry
        )
        self._seconds = Summary(
            "cutline_shadow_seconds", "Seconds of the candidate's answers", registry=registry
        )
        self._live_seconds = Summary(
            "cutline_shadow_live_seconds",
            "Seconds of live requests that were alone while there was a candidate",
            registry=registry,
        )
        self._score = Gauge(
            "cutline_shadow_score_difference",
            "Mean score of the candidate less that of the version that serves",
            registry=registry,
        )
        self._verdicts = Counter(
            "cutline_shadow_verdicts", "Shadows that ended", ["verdict"], registry=registry
        )
        self._loaded = Gauge(
            "cutline_shadow_loaded", "1 while a candidate is asked", registry=registry
        )
        for outcome in ("agreed", "differed", "failed", "dropped"):
            self._requests.labels(outcome)
        for verdict in ("promoted", "refused"):
            self._verdicts.labels(verdict)

    def asked(self, outcome: Outcome) -> None:
        """Count a request that the candidate answered, or that was dropped."""
        self._requests.labels(outcome).inc()

    def compared(self, overlap: float, seconds: float, score_difference: float) -> None:
        """Record an answer of the candidate; the difference is the mean so far."""
        self._overlap.observe(overlap)
        self._seconds.observe(seconds)
        self._score.set(score_difference)

    def live_alone(self, seconds: float) -> None:
        """Record a live request that had the server to itself."""
        self._live_seconds.observe(seconds)

    def loaded(self, loaded: bool) -> None:
        """Record whether there is a candidate."""
        self._loaded.set(loaded)

    def ended(self, *, promoted: bool) -> None:
        """Count a verdict."""
        self._verdicts.labels("promoted" if promoted else "refused").inc()
