"""The metrics of /metrics, in Prometheus' text format. Each application has its own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hildanext.decoding.engines import Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Meters:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.answers = Counter("hildanext_requests", "HTTP requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "hildanext_request_seconds",
            "Seconds from request to last byte of the answer",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queued = Gauge("hildanext_queue", "Requests waiting for a slot", registry=registry)
        self.running = Gauge("hildanext_running", "Requests being decoded", registry=registry)
        self.batch = Histogram(
            "hildanext_batch_size",
            "Requests decoded together in one pass",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
            registry=registry,
        )
        self.first_block = Histogram(
            "hildanext_time_to_first_block_seconds",
            "Seconds from request to first finished block",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("hildanext_tokens", "Tokens generated, in finished completions", registry=registry)
        self.forwards = Counter("hildanext_forwards", "Denoising passes, in finished completions", registry=registry)
        self.per_forward = Histogram(
            "hildanext_tokens_per_forward",
            "Tokens per forward (TPF) of each completion",
            buckets=(0.5, 1, 1.5, 2, 2.5, 3, 4, 6, 8, 16, 32),
            registry=registry,
        )
        self.per_second = Histogram(
            "hildanext_tokens_per_second",
            "Tokens per second of each completion",
            buckets=(1, 3, 10, 30, 100, 300, 1000, 3000, 10000),
            registry=registry,
        )
        self.verified = Counter(
            "hildanext_drafts_verified",
            "Drafts that the base verified after right ones, by the row of the group (0: a lookup) and the result",
            ["row", "result"],
            registry=registry,
        )
        self.errors = Counter("hildanext_errors", "Requests that ended with an error", ["kind"], registry=registry)
        self.jobs = Gauge("hildanext_jobs", "Jobs in each state", ["state"], registry=registry)

    def completed(self, stats: Stats, n_tokens: int) -> None:
        self.tokens.inc(n_tokens)
        self.forwards.inc(stats.forwards)
        if stats.forwards:  # the dummy engine has none
            self.per_forward.observe(stats.tokens_per_forward)
            self.per_second.observe(stats.tokens_per_second)
        for row, (tried, right) in enumerate(zip(stats.tried_by_offset, stats.right_by_offset, strict=True)):
            self.verified.labels(str(row), "accepted").inc(right)
            self.verified.labels(str(row), "rejected").inc(tried - right)

    def text(self) -> bytes:
        return generate_latest(self.registry)
