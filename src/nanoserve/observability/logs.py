"""How log lines look: for people, or a JSON object each; with the ids of the request and trace that they belong to."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from nanoserve.observer import current_call


def _add_ids(record: logging.LogRecord) -> bool:
    """A filter that drops nothing: it gives a record what the formatters want of the call that its task serves."""
    call = current_call.get()
    named = {"request_id": call.request_id, "trace_id": call.trace_id} if call is not None else {}
    record.ids = ids = {name: value for name, value in named.items() if value}
    record.suffix = "".join(f" {name}={value}" for name, value in ids.items())
    return True


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, ids, and the fields of an access line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def dress(handler: logging.Handler, log_format: str, people: str) -> None:
    """Set how a handler's lines look: log_format "json", or "human" in the style `people`."""
    handler.addFilter(_add_ids)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(people + "%(suffix)s"))
