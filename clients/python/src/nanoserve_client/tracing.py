"""The caller's span of a call, if opentelemetry is installed: child of the current span, and parent of the server's.

Without it, or without a tracer provider, all of this does nothing but pass the caller's own `traceparent` on.
"""

import functools
from collections.abc import Mapping

import grpc
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    trace = None  # type: ignore[assignment]


class CallSpan:
    """One call, its retries included. It ends once, with its last reference at the latest: nobody reads on."""

    def __init__(self, request: Message, target: str, traceparent: str | None) -> None:
        """Begins now. traceparent: a parent that the caller names, instead of the current span."""
        self._headers = {} if traceparent is None else {"traceparent": traceparent}
        self._span: trace.Span | None = None
        if trace is None:
            return
        propagator = TraceContextTextMapPropagator()
        method = _method_of(request.DESCRIPTOR)
        self._span = trace.get_tracer("nanoserve_client").start_span(
            method,
            context=propagator.extract(self._headers) if self._headers else None,
            kind=trace.SpanKind.CLIENT,
            attributes={"rpc.system.name": "grpc", "rpc.method": method, **_address(target)},
        )
        propagator.inject(self._headers, trace.set_span_in_context(self._span))

    @property
    def headers(self) -> Mapping[str, str]:
        """What tells the server of it."""
        return self._headers

    def end(self, code: grpc.StatusCode) -> None:
        """The call has this status."""
        if self._span is None or not self._span.is_recording():
            return
        self._span.set_attribute("rpc.response.status_code", code.name)
        if code is not grpc.StatusCode.OK:
            self._span.set_attribute("error.type", code.name)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()

    def __del__(self) -> None:
        self.end(grpc.StatusCode.CANCELLED)


@functools.cache
def _method_of(request: Descriptor) -> str:
    """The only method that takes such a message, such as "nanoserve.v1.ModelService/Tokenize"."""
    services = request.file.services_by_name.values()
    methods = (method for service in services for method in service.methods)
    method = next(method for method in methods if method.input_type is request)
    return f"{method.containing_service.full_name}/{method.name}"


def _address(target: str) -> dict[str, str | int]:
    """Host and port of a target such as "127.0.0.1:50051" or "dns:///llm.example:443"; else the target as it is."""
    host, _, port = target.rpartition("/")[2].rpartition(":")
    if target.startswith("unix:") or not (host and port.isdigit()):
        return {"server.address": target}
    return {"server.address": host.strip("[]"), "server.port": int(port)}
