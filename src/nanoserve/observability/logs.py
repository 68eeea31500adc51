"""How log lines look: for people, or a JSON object each; with the ids of the request and trace that they belong to."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from nanoserve.observer import current_call


class IdFilter(logging.Filter):
    """Gives a record what the formatters want of the call that its task serves. It drops nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = current_call.get()
        named = {"request_id": call.request_id, "trace_id": call.trace_id} if call is not None else {}
        ids = {name: value for name, value in named.items() if value}
        record.ids = ids
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
    handler.addFilter(IdFilter())
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(people + "%(suffix)s"))
