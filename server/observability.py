"""Numbers and log lines for operators: a metrics registry of our own, and one format for every log.

Names begin with `grok:`; three gauges also go out under the `vllm:` names that gateways and dashboards read. What concerns sequences is
counted by `server/generation.py` as deltas pass, refusals by `server/errors.py`; what concerns the engine is read from its last statistics
when somebody scrapes, so the step loop never waits for a scrape. The client sums the totals of one engine process after the other: no
counter falls when the engine is restarted. Nothing here sees a prompt or a text.
"""

import atexit
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Iterator

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.types import EngineStats, GenerationRequest, TokenDelta

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The registry behind `/metrics`."""

    def __init__(self, client: EngineClient, *, model_name: str) -> None:
        disable_created_metrics()  # a second series per counter that nobody reads
        self._registry = CollectorRegistry()
        self._registry.register(_EngineSeries(client, model_name=model_name))
        self.prompt_tokens = Counter("grok:prompt_tokens", "Prompt tokens of submitted sequences", registry=self._registry)
        self.cached_tokens = Counter("grok:prompt_tokens_cached", "Prompt tokens found in the cache", registry=self._registry)
        self.generation_tokens = Counter("grok:generation_tokens", "Generated tokens", registry=self._registry)
        self.refused = Counter(
            "grok:requests_refused", "Requests that may be sent again later, by the error's code", ["code"], registry=self._registry
        )
        self.finished = Counter("grok:sequences_finished", "Sequences by how they ended", ["finished_reason"], registry=self._registry)
        self.ttft_s = Histogram(
            "grok:time_to_first_token_seconds",
            "From arrival to a sequence's first token",
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self.itl_s = Histogram(
            "grok:inter_token_latency_seconds", "Between a sequence's steps with a token", buckets=_ITL_BUCKETS_S, registry=self._registry
        )
        self.e2e_s = Histogram(
            "grok:e2e_request_latency_seconds", "From arrival to a sequence's end", buckets=_LATENCY_BUCKETS_S, registry=self._registry
        )

    def scrape(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self._registry)


class SequenceMeter:
    """Watches the deltas of one sequence. `ended` is called exactly once, with a finish reason or `abort`."""

    __slots__ = ("_arrival_s", "_last_token_s", "_metrics", "_num_cached")

    def __init__(self, metrics: Metrics, request: GenerationRequest) -> None:
        self._metrics = metrics
        self._arrival_s = request.arrival_s
        self._last_token_s: float | None = None
        self._num_cached = 0
        metrics.prompt_tokens.inc(len(request.prompt_token_ids))

    def saw(self, delta: TokenDelta) -> None:
        """Count what one step added."""
        if delta.num_cached_tokens > self._num_cached:
            self._metrics.cached_tokens.inc(delta.num_cached_tokens - self._num_cached)
            self._num_cached = delta.num_cached_tokens
        if not delta.token_ids:
            return
        now = time.monotonic()
        if self._last_token_s is None:
            self._metrics.ttft_s.observe(now - self._arrival_s)
        else:
            self._metrics.itl_s.observe(now - self._last_token_s)
        self._last_token_s = now
        self._metrics.generation_tokens.inc(len(delta.token_ids))

    def ended(self, reason: str) -> None:
        """Count the sequence's one end."""
        self._metrics.finished.labels(finished_reason=reason).inc()
        self._metrics.e2e_s.observe(time.monotonic() - self._arrival_s)


class _EngineSeries(Collector):
    """What the engine last told about itself, read at scrape time."""

    def __init__(self, client: EngineClient, *, model_name: str) -> None:
        self._client = client
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        usage = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        waiting = {"capacity": stats.num_waiting, "engine": self._client.num_held}
        shared = {
            "num_requests_running": ("Sequences in the batch", stats.num_running),
            "num_requests_waiting": ("Sequences waiting for room in the batch, or for an engine", sum(waiting.values())),
            "kv_cache_usage_perc": ("Share of cache blocks in use, 0 to 1", usage),
        }
        for name, (text, value) in shared.items():
            yield GaugeMetricFamily(f"grok:{name}", text, value=value)
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        by_reason = GaugeMetricFamily(
            "grok:num_requests_waiting_by_reason", "Waiting for room in the batch (capacity), or for a restarted engine", labels=["reason"]
        )
        for reason, count in waiting.items():
            by_reason.add_metric([reason], count)
        yield by_reason
        yield GaugeMetricFamily("grok:kv_cache_blocks", "Blocks of the cache", value=stats.num_blocks)
        yield GaugeMetricFamily("grok:kv_cache_blocks_used", "Blocks that running sequences hold", value=stats.num_blocks_used)
        yield GaugeMetricFamily("grok:kv_cache_blocks_cached", "Free blocks kept for the prefix cache", value=stats.num_blocks_cached)
        yield GaugeMetricFamily("grok:engine_ready", "1 while an engine runs", value=float(self._client.is_ready))
        yield from self._totals(stats)

    def _totals(self, stats: EngineStats) -> Iterator[Metric]:
        yield CounterMetricFamily("grok:engine_restarts", "Engines that became ready after the first", value=self._client.num_restarts)
        yield CounterMetricFamily("grok:engine_steps", "Steps of all engines", value=stats.num_steps)
        yield CounterMetricFamily("grok:preemptions", "Sequences whose blocks were taken back", value=stats.num_preemptions)
        yield CounterMetricFamily("grok:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", value=stats.num_lookup_tokens)
        yield CounterMetricFamily("grok:prefix_cache_hits", "Prompt tokens found in the prefix cache", value=stats.num_hit_tokens)
        yield CounterMetricFamily("grok:late_compilations", "Programs compiled after readiness; 0", value=stats.num_late_compilations)


def configure_logging(*, as_json: bool, level: str = "INFO") -> None:
    """Send structlog, uvicorn and every other logger through one format to standard error.

    A line is rendered where it is logged and written by a thread of its own: a slow terminal or pipe never stalls the event loop, and
    when 10,000 lines wait, further ones are dropped.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # structlog's own choice of traceback shows local variables, prompts among them, and takes a third of a second to draw.
    plain = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer() if as_json else plain
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    lines: queue.Queue[logging.LogRecord] = queue.Queue(maxsize=10_000)
    sender = _DroppingQueueHandler(lines)
    sender.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ]
            if as_json
            else [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    writer = logging.handlers.QueueListener(lines, logging.StreamHandler(sys.stderr))
    writer.start()
    atexit.register(writer.stop)
    logging.basicConfig(handlers=[sender], level=level, force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # ours says more


class _DroppingQueueHandler(logging.handlers.QueueHandler):
    """Drops a line rather than wait or complain when the writer cannot keep up."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return
