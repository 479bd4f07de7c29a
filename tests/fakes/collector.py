"""A collector of OpenTelemetry: takes spans by OTLP over HTTP, and writes each as a line of JSON to its log.

    python -m tests.fakes.collector --log FILE

prints its port. Source: opentelemetry-proto, collector/trace/v1.
"""

from __future__ import annotations

import argparse
import gzip
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


def value_of(value: Any) -> Any:
    """A value of an attribute."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def spans_in(body: bytes) -> list[dict[str, Any]]:
    """The spans of a request, with ids in hexadecimal digits."""
    found = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = {item.key: value_of(item.value) for item in resource.resource.attributes}.get("service.name")
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            found.append(
                {
                    "service": service,
                    "name": span.name,
                    "kind": span.kind,
                    "trace": span.trace_id.hex(),
                    "span": span.span_id.hex(),
                    "parent": span.parent_span_id.hex(),
                    "began": span.start_time_unix_nano,
                    "ended": span.end_time_unix_nano,
                    "failed": span.status.code == 2,
                    "attributes": {item.key: value_of(item.value) for item in span.attributes},
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    log: Path = parser.parse_args().log

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
            found = spans_in(body) if self.path == "/v1/traces" else []
            with log.open("a") as file:
                file.writelines(f"{json.dumps(span)}\n" for span in found)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
