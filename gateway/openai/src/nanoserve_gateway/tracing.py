"""The gateway's span of an HTTP request, if opentelemetry is installed.

It continues the caller's `traceparent`, and the client's span of the gRPC call is its child. Without a tracer provider
that header is only passed on.
"""

from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    trace = None  # type: ignore[assignment]

IS_INSTALLED = trace is not None
# What makes a call; probes and pages do not.
TRACED = ("/v1/", "/tokenize", "/detokenize")


class Tracing:
    """ASGI middleware. The span ends with the last byte of the answer, or when the caller goes away."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if trace is None or scope["type"] != "http" or not scope["path"].startswith(TRACED):
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        span = trace.get_tracer("nanoserve_gateway").start_span(
            method,
            context=TraceContextTextMapPropagator().extract(_headers(scope)),
            kind=trace.SpanKind.SERVER,
            attributes={"http.request.method": method, "url.path": scope["path"], "url.scheme": scope["scheme"]},
        )

        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                _note_answer(span, scope, message["status"])
            await send(message)

        with trace.use_span(span, end_on_exit=True, record_exception=False):
            await self._app(scope, receive, noting_status)


def _note_answer(span: Any, scope: Scope, status: int) -> None:
    if (route := scope.get("route")) is not None:
        span.update_name(f"{scope['method']} {route.path}")
        span.set_attribute("http.route", route.path)
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_attribute("error.type", str(status))
        span.set_status(trace.StatusCode.ERROR)


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
