"""Traces by OpenTelemetry: off until `trace_to` names a collector.

The tracer is not the process's global one: with that, FastAPI and others would add spans with callers'
addresses and whole URLs.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from sam3_runner.metrics import trace_with

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

EXPORT_TIMEOUT_S = 3.0
"""A collector that does not answer must not delay a stop for longer; the spans are lost."""

_tracer: trace.Tracer | None = None


def trace_to(endpoint: str, *, process: str, version: str) -> None:
    """Send this process's spans to a collector from now on, in the background.

    The sampler, headers and further attributes are OpenTelemetry's own variables, OTEL_*.

    Args:
        endpoint: URL of a collector of OTLP over HTTP, without /v1/traces.
        process: the name of this process, for the spans' resource.
        version: of the server.
    """
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - for who traces
        OTLPSpanExporter,
    )

    global _tracer  # noqa: PLW0603 - one a process
    ours: dict[str, AttributeValue] = {
        "service.name": "sam3",
        "service.version": version,
        "sam3.process": process,
        "process.pid": os.getpid(),
    }
    provider = TracerProvider(resource=Resource(ours).merge(OTELResourceDetector().detect()))
    exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("sam3", version)
    trace_with(_tracer)


@contextmanager
def root_span(name: str, headers: Mapping[str, str], **attributes: str) -> Iterator[Span]:
    """The span of a whole request or task; in the caller's trace, where `headers` have a traceparent.

    An error's message may hold private data, and is left out.
    """
    if _tracer is None:
        yield trace.INVALID_SPAN
        return
    with _tracer.start_as_current_span(
        name,
        propagate.extract(headers, Context()),
        trace.SpanKind.SERVER,
        attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span
