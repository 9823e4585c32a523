"""A collector of traces: receives OTLP over HTTP, and keeps the spans."""

from __future__ import annotations

import gzip
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Span:
    """A received span; ids in hex, times in nanoseconds since 1970."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    process: str
    begin_ns: int
    end_ns: int
    is_error: bool


@dataclass
class Collector:
    """The spans received so far.

    Attributes:
        endpoint: the value of OTEL_EXPORTER_OTLP_ENDPOINT.
        raw: all bodies, decompressed.
    """

    endpoint: str
    spans: list[Span] = field(default_factory=list)
    raw: bytes = b""

    def of_trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace."""
        return [span for span in self.spans if span.trace_id == trace_id]

    def add(self, body: bytes) -> None:
        """Add the spans of one request's body."""
        self.raw += body
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {each.key: each.value.string_value for each in group.resource.attributes}
            self.spans += [
                Span(
                    span.name,
                    *(span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()),
                    attributes["sam3.process"],
                    *(span.start_time_unix_nano, span.end_time_unix_nano),
                    is_error=span.status.code == span.status.STATUS_CODE_ERROR,
                )
                for scope in group.scope_spans
                for span in scope.spans
            ]


@contextmanager
def collector() -> Iterator[Collector]:
    """Run a collector on loopback until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            received.add(body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
