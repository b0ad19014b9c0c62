"""Prometheus metrics under vLLM's names with the prefix ``graphserve:``.

Gauges and counters of the engine are read from its last stats snapshot when Prometheus asks; the request histograms are
filled once, when a request ends. Nothing here runs per token.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from graphserve.engine.client import EngineClient
from graphserve.engine.messages import OutputDelta

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class ServerMetrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, client: EngineClient) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(client))
        model = ["model_name"]
        self._success = self._counter("request_success", "Finished choices by reason", [*model, "finished_reason"])
        self._rejections = self._counter("admission_rejections", "Requests refused before queueing", ["reason"])
        self._responses = self._counter("http_responses", "HTTP responses", ["route", "status"])
        self._aborts = self._counter("request_aborts", "Requests whose client left before the end", model)
        self._first_token = self._histogram("time_to_first_token_seconds", "Request → first token", _SECONDS)
        self._per_token = self._histogram("request_time_per_output_token_seconds", "Mean of a choice", _SECONDS)
        self._latency = self._histogram("e2e_request_latency_seconds", "Request → last token", _SECONDS)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._output_tokens = self._histogram("request_generation_tokens", "Generated tokens of a choice", _TOKENS)
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request", _TOKENS)
        self._n = self._histogram("request_params_n", "n of a request", (1, 2, 5, 10, 20, 50, 100))

    def exposition(self) -> bytes:
        """The text Prometheus scrapes."""
        return generate_latest(self.registry)

    def count_response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def count_rejection(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def request(self, model: str, num_prompt_tokens: int, max_tokens: int, n: int) -> RequestTimer:
        """Begin the measurement of one engine request."""
        self._prompt_tokens.labels(model).observe(num_prompt_tokens)
        self._max_tokens.labels(model).observe(max_tokens)
        self._n.labels(model).observe(n)
        return RequestTimer(self, model)

    def _counter(self, name: str, help_text: str, labels: list[str]) -> Counter:
        return Counter(f"graphserve:{name}", help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"graphserve:{name}", help_text, ["model_name"], registry=self.registry, buckets=buckets)


class RequestTimer:
    """Times of one engine request, turned into observations when its choices end."""

    def __init__(self, metrics: ServerMetrics, model: str) -> None:
        self._metrics, self._model = metrics, model
        self._begin = time.monotonic()
        self._first_token: float | None = None
        self._num_tokens: dict[int, int] = {}

    def record(self, delta: OutputDelta) -> None:
        """Take note of one delta (possibly of several tokens merged)."""
        now = time.monotonic()
        if self._first_token is None and delta.token_ids:
            self._first_token = now
            self._metrics._first_token.labels(self._model).observe(now - self._begin)
        num_tokens = self._num_tokens.get(delta.index, 0) + len(delta.token_ids)
        self._num_tokens[delta.index] = num_tokens
        if delta.finish_reason is not None:
            self._metrics._success.labels(self._model, delta.finish_reason).inc()
            self._metrics._latency.labels(self._model).observe(now - self._begin)
            self._metrics._output_tokens.labels(self._model).observe(num_tokens)
            if num_tokens > 1 and self._first_token is not None:
                mean_s = (now - self._first_token) / (num_tokens - 1)
                self._metrics._per_token.labels(self._model).observe(mean_s)

    def aborted(self) -> None:
        """The client left before the end."""
        self._metrics._aborts.labels(self._model).inc()


class _EngineCollector(Collector):
    """Turns the last stats snapshot into metric families at scrape time.

    Counters of an engine process begin at zero with it; the client keeps those of its predecessors, so that what
    Prometheus sees never decreases.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        client = self._client
        stats, totals = client.stats, client.total_stats
        ready = GaugeMetricFamily("graphserve:engine_ready", "1 while the engine takes requests")
        ready.add_metric([], float(client.is_ready))
        yield ready
        restarts = CounterMetricFamily("graphserve:engine_restarts", "Restarts of the engine process")
        restarts.add_metric([], client.num_restarts)
        yield restarts
        if not client.has_info:
            return
        model = client.info.model
        yield _gauge("num_requests_running", "Sequences in the running batch", model, stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences that wait", model, stats.num_waiting)
        usage = stats.num_blocks_in_use / max(stats.num_blocks - 1, 1)  # block 0 is reserved
        yield _gauge("kv_cache_usage_perc", "Share of KV-cache blocks in use, 1 is all", model, usage)
        yield _gauge("kv_cache_blocks_in_use", "KV-cache blocks in use", model, stats.num_blocks_in_use)
        yield _gauge("captured_graphs", "Captured steps", model, stats.num_graphs)
        yield _gauge("captured_graph_bytes", "Device memory that captured steps took", model, stats.graph_bytes)
        for name, help_text, field in _ENGINE_COUNTERS:
            family = CounterMetricFamily(f"graphserve:{name}", help_text, labels=["model_name"])
            family.add_metric([model], getattr(totals, field))
            yield family
        by_variant = CounterMetricFamily(
            "graphserve:engine_variant_steps", "Steps by variant of the captured step", labels=["model_name", "variant"]
        )
        for variant, count in totals.num_variant_steps_total.items():
            by_variant.add_metric([model, variant], count)
        yield by_variant
        config = InfoMetricFamily("graphserve:cache_config", "KV-cache configuration")
        config.add_metric([], {"block_size": str(client.info.block_size), "num_gpu_blocks": str(stats.num_blocks)})
        yield config


_ENGINE_COUNTERS = (
    ("num_preemptions", "Preemptions", "num_preemptions_total"),
    ("prompt_tokens", "Prompt tokens processed", "prompt_tokens_total"),
    ("generation_tokens", "Tokens generated", "generation_tokens_total"),
    ("engine_steps", "Steps executed", "num_steps_total"),
    ("engine_eager_steps", "Steps that no captured one fitted, launched one by one", "num_eager_steps_total"),
    ("engine_sync_steps", "Steps that had to wait for the end of the step before", "num_sync_steps_total"),
)


def _gauge(name: str, help_text: str, model: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"graphserve:{name}", help_text, labels=["model_name"])
    family.add_metric([model], value)
    return family
