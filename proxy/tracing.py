"""Traces by OpenTelemetry, if they are configured: one span for each request to a model, made when it has ended.

The spans are built from the request's record alone. Names and attributes: the semantic conventions for generative AI.
Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans (status: development).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.log.access import outcome

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

logger = logging.getLogger(__name__)

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""The standard ones that say where spans are sent to."""
INSTALL = "pip install 'llama-smart-proxy[otel]'"
FLUSH_S = 2.0
"""How long the end of the process waits for the last spans to be sent."""
EXPORT_S = 5.0
OPERATIONS = {
    "/embeddings": "embeddings", "/embedding": "embeddings", "/embed": "embeddings", "/completions": "text_completion",
    "/completion": "text_completion", "/generate": "text_completion", "/infill": "text_completion",
}  # fmt: skip
"""`gen_ai.operation.name` by the end of a path; `chat` is that of chats, and of all others."""


class Tracing:
    """Sends spans in batches, in a thread. `observe` is an observer of requests."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is the URL of the collector, to which `/v1/traces` is added; empty for what the standard variables
        of the environment say."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({SERVICE_VERSION: __version__})  # OTEL_SERVICE_NAME takes precedence
        if str(resource.attributes.get(SERVICE_NAME)).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "llama-smart-proxy"}))
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces" if endpoint else None, timeout=EXPORT_S)
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer: Tracer = self._provider.get_tracer("llama_smart_proxy", __version__)
        self._parents = TraceContextTextMapPropagator()

    def observe(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended, if it was one to a model."""
        if record.slot:
            _Request(record, self._tracer, self._parents.extract({"traceparent": record.traceparent})).trace()

    async def close(self) -> None:
        """Send what is left, for at most `FLUSH_S` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await run_in_thread(self._provider.shutdown)


class _Request:
    """The spans of one request: its own, and below it one for each wait, for each agent, and for its server."""

    def __init__(self, record: RequestRecord, tracer: Tracer, parent: Context) -> None:
        self._record = record
        self._tracer = tracer
        self._parent = parent
        self._since_1970_ns = time.time_ns() - time.monotonic_ns()

    def trace(self) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        record = self._record
        operation = "chat" if "/chat" in record.path else OPERATIONS.get(record.path[record.path.rfind("/") :], "chat")
        name = f"{operation} {record.model}"
        model = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": record.backend or "-",
            "gen_ai.request.model": record.model,
        }
        root = self._span(name, self._parent, record.arrived_s, SpanKind.SERVER, {**model, **self._of_request()})
        below = set_span_in_context(root)
        for step in record.steps or ():
            attributes = {f"llama_smart_proxy.{key}": _value(value) for key, value in step.detail.items()}
            if step.kind is StepKind.AGENT:
                attributes["gen_ai.agent.name"] = str(step.detail.get("agent"))
            title = f"agent {step.detail.get('agent')}" if step.kind is StepKind.AGENT else str(step.kind)
            self._span(title, below, step.began_s, SpanKind.INTERNAL, attributes).end(self._ns(step.ended_s))
        if record.sent_s:
            sent = self._span(name, below, record.sent_s, SpanKind.CLIENT, {**model, **self._of_answer()})
            sent.end(self._ns(record.last_byte_s or record.ended_s))
        self._mark(root)
        root.end(self._ns(record.ended_s))

    def _span(self, name: str, parent: Context, began_s: float, kind: Any, attributes: Mapping[str, Any]) -> Span:
        return self._tracer.start_span(name, parent, kind, attributes, start_time=self._ns(began_s))

    def _of_request(self) -> dict[str, Any]:
        record = self._record
        return {
            "http.request.method": record.method,
            "http.response.status_code": record.status,
            "url.path": record.path,
            "llama_smart_proxy.request_id": record.request_id,
            "llama_smart_proxy.dialect": record.api,
            "llama_smart_proxy.agents": list(record.agents),
        }

    def _of_answer(self) -> dict[str, Any]:
        record, usage = self._record, self._record.usage or {}
        found = {
            "gen_ai.usage.input_tokens": usage.get("prompt_tokens"),
            "gen_ai.usage.output_tokens": usage.get("completion_tokens"),
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        }
        if record.first_byte_s:
            found["gen_ai.response.time_to_first_chunk"] = record.first_byte_s - record.sent_s
        return {name: value for name, value in found.items() if value is not None}

    def _mark(self, root: Span) -> None:
        """Give the request's span the counts, too, and its error."""
        from opentelemetry.trace import StatusCode

        root.set_attributes(self._of_answer())
        if (ended := outcome(self._record)) != "ok":
            root.set_attribute("error.type", ended)
            root.set_status(StatusCode.ERROR)

    def _ns(self, at_s: float) -> int:
        return int(at_s * 1e9) + self._since_1970_ns


def _value(value: Any) -> Any:
    return value if isinstance(value, str | int | float) else str(value)


def tracing_for(config: Config, environ: Mapping[str, str]) -> Tracing | None:
    """What is configured; None if nothing is. Raises: ConfigError if it is not installed."""
    endpoint = config.telemetry.otlp or ""
    if not endpoint and not any(environ.get(name) for name in VARIABLES):
        return None
    try:
        return Tracing(endpoint)
    except ImportError as exc:
        if endpoint:
            raise ConfigError([f"telemetry.otlp: traces require further packages: {INSTALL}"]) from exc
    logger.warning("no traces are sent to %s: they require further packages: %s", " or ".join(VARIABLES), INSTALL)
    return None
