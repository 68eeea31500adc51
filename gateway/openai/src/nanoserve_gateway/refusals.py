"""What the gateway refuses by itself. No RPC's line in the server's log tells of it, so it has a line here, and is
counted if opentelemetry is installed.
"""

import json
import logging
import re
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from nanoserve_gateway.errors import Problem

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

try:
    from opentelemetry import metrics
except ImportError:
    metrics = None  # type: ignore[assignment]

# Of a caller's text in a line.
MAX_CHARS = 300
_PLAIN = re.compile(r"[\w./%\[\]:-]+", re.ASCII)

logger = logging.getLogger(__name__)


class Refusals:
    """Tells of each refusal: what was asked for, and what was wrong; never a key or a prompt. Event loop thread."""

    def __init__(self, meter_provider: "MeterProvider | None" = None) -> None:
        """meter_provider: of the counter; None = opentelemetry's own of this process, which may be none."""
        self._counter: Any = None
        if metrics is not None:
            self._counter = metrics.get_meter("nanoserve_gateway", meter_provider=meter_provider).create_counter(
                "nanoserve.http.rejected", "{request}", "HTTP requests that the gateway itself turned away, by reason."
            )

    def note(self, scope: Scope, problem: Problem) -> None:
        fields: dict[str, Any] = {
            "http": scope["method"],
            # As it was sent: line ends and the like are escaped in it.
            "path": scope["raw_path"].decode("ascii", "backslashreplace")[:MAX_CHARS],
            "status": problem.status,
            "reason": problem.code,
            "error": problem.message[:MAX_CHARS],
            "request_id": scope["state"]["request_id"],
        }
        line = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
        # The fields are for logs in JSON.
        logger.info("%s", line, extra={"fields": fields})
        if self._counter is not None:
            labels = {"http.response.status_code": problem.status, "nanoserve.error.reason": problem.code}
            self._counter.add(1, labels)


def _shown(value: Any) -> str:
    """In one line, and as one word."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
