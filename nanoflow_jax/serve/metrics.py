"""What Prometheus reads at /metrics. docs/metrics.md maps the names to those of other engines."""

import collections
import time
from collections.abc import Sequence
from typing import Any

import prometheus_client
from prometheus_client import core

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import client as client_lib
from nanoflow_jax.engine_process import messages
from nanoflow_jax.serve import memory

PREFIX = "nanoflow"
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1000.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_COUNTS = (1, 2, 5, 10, 20, 50, 100)
# Latencies of so many last requests make up the percentiles of the page.
_RECENT = 1000


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Any:
            return prometheus_client.Counter(
                name, text, labels, namespace=PREFIX, registry=self.registry
            )

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Any:
            return prometheus_client.Histogram(
                name, text, buckets=buckets, namespace=PREFIX, registry=self.registry
            )

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.requests = counter("request_success", "Finished choices.", "finished_reason")
        self.refused = counter("requests_refused", "Requests answered with 429.")
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self.tpot = histogram(
            "request_time_per_output_token_seconds", "Mean of a request after its first.", _SECONDS
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between tokens of a stream.", _SECONDS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", _SECONDS)
        self.queue = histogram(
            "request_queue_time_seconds", "Arrival until the prompt began to run.", _SECONDS
        )
        self.prefill = histogram(
            "request_prefill_time_seconds", "Prompt began to run to first token.", _SECONDS
        )
        self.decode = histogram("request_decode_time_seconds", "First to last token.", _SECONDS)
        self.inference = histogram(
            "request_inference_time_seconds", "Prompt began to run to last token.", _SECONDS
        )
        self.step_tokens = histogram("iteration_tokens_total", "Tokens of a step.", _TOKENS)
        self.prompt_len = histogram("request_prompt_tokens", "Prompt tokens.", _TOKENS)
        self.output_len = histogram("request_generation_tokens", "Generated tokens.", _TOKENS)
        self.params_n = histogram("request_params_n", "Choices asked for.", _COUNTS)
        self.params_max = histogram("request_params_max_tokens", "max_tokens given.", _TOKENS)
        self.recent: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=_RECENT) for name in ("ttft_s", "tpot_s", "e2e_s")
        }
        self.totals: collections.Counter[str] = collections.Counter()
        self._load = messages.Load()

    def watch(self, client: client_lib.EngineClient) -> None:
        """Shows an engine's load from now on."""
        self.registry.register(_LoadCollector(client))

    def take_step(self, stepped: messages.Stepped) -> None:
        """Counts a step of the engine."""
        load, before = stepped.load, self._load
        self._load = load
        if load.steps < before.steps:  # another engine, from nought
            before = messages.Load()
        if load.steps > before.steps:
            tokens = load.decode_tokens - before.decode_tokens
            self.step_tokens.observe(tokens + load.prefill_tokens - before.prefill_tokens)

    def begin(self, params: request_lib.SamplingParams) -> None:
        """Counts a request that was taken in."""
        self.params_n.observe(params.n)
        if params.max_tokens is not None:
            self.params_max.observe(params.max_tokens)

    def finish(self, times: messages.Times, *, prompt_tokens: int) -> None:
        """Counts a request that has ended.

        Args:
            times: How it went.
            prompt_tokens: Of its prompt.
        """
        self.prompt_tokens.inc(prompt_tokens)
        self.generation_tokens.inc(times.num_tokens)
        self.totals["prompt_tokens"] += prompt_tokens
        self.totals["generation_tokens"] += times.num_tokens
        for reason in times.reasons:
            self.requests.labels(reason).inc()
            self.totals[reason] += 1
        self.prompt_len.observe(prompt_tokens)
        self.output_len.observe(times.num_tokens)
        self.e2e.observe(times.end_s)
        self.recent["e2e_s"].append(times.end_s)
        if times.first_token_s is not None and times.started_s is not None:
            self._count_parts(times, times.started_s, times.first_token_s)

    def _count_parts(self, times: messages.Times, started_s: float, first_token_s: float) -> None:
        decode_s = times.end_s - first_token_s
        self.queue.observe(started_s)
        self.prefill.observe(first_token_s - started_s)
        self.decode.observe(decode_s)
        self.inference.observe(times.end_s - started_s)
        self.ttft.observe(first_token_s)
        self.recent["ttft_s"].append(first_token_s)
        each = times.num_tokens / max(1, len(times.reasons))
        if each > 1:
            self.tpot.observe(decode_s / (each - 1))
            self.recent["tpot_s"].append(decode_s / (each - 1))

    def count_abort(self) -> None:
        """Counts a request whose client left, or whose time was up."""
        self.requests.labels("abort").inc()
        self.totals["abort"] += 1

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return bytes(prometheus_client.generate_latest(self.registry))

    def percentiles(self) -> dict[str, dict[str, float | int | None]]:
        """Latencies of recent requests, for the page."""
        return {name: _percentiles(sorted(values)) for name, values in self.recent.items()}


class _LoadCollector:
    """The engine's state as gauges, read when they are asked for."""

    def __init__(self, client: client_lib.EngineClient) -> None:
        self._client = client
        self._started = time.time()

    def collect(self) -> Any:
        """The gauges of now."""
        load, ready = self._client.load, self._client.ready
        pages = ready.num_pages if ready is not None else 0

        def gauge(name: str, text: str, value: float) -> Any:
            return core.GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)

        def counter(name: str, text: str, value: float) -> Any:
            return core.CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)

        yield gauge("num_requests_running", "Choices in the dense batch.", load.running)
        yield gauge("num_requests_waiting", "Choices that wait for room.", load.waiting)
        if ready is not None and ready.sessions_at:
            yield gauge("split_sessions", "Open split sessions.", load.sessions)
        yield gauge("kv_cache_usage_perc", "Pages used, 1 is all.", load.pages_used / max(1, pages))
        yield counter("num_preemptions", "Requests that lost their pages.", load.preemptions)
        yield counter("late_compiles", "Programs compiled inside a step.", load.late_compiles)
        yield counter("engine_steps", "Steps of this engine.", load.steps)
        yield counter("engine_failed_steps", "Steps the device gave up.", load.failed_steps)
        yield counter("engine_cpu_seconds", "Processor time of this engine.", load.cpu_s)
        yield counter("engine_starts", "Engines started.", self._client.num_starts)
        yield counter("front_cpu_seconds", "Processor time of the server.", time.process_time())
        for name, held in memory.of_server(self._client.pid).items():
            yield gauge(f"{name}_resident_memory_bytes", f"Memory of the {name} in RAM.", held)
        yield gauge("start_time_seconds", "When the server started.", self._started)
        if ready is not None:
            info = core.GaugeMetricFamily(
                f"{PREFIX}_cache_config_info",
                "The page pool.",
                labels=["num_gpu_blocks", "block_size"],
            )
            info.add_metric([str(ready.num_pages), str(ready.page_size)], 1.0)
            yield info


def _percentiles(values: Sequence[float]) -> dict[str, float | int | None]:
    def at(fraction: float) -> float | None:
        if not values:
            return None
        return values[min(len(values) - 1, int(fraction * len(values)))]

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "count": len(values)}
