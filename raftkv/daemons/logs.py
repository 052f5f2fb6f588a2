"""Logging of a daemon to stderr: one line a record, as text or as JSON objects.

Whatever else Python would write there by itself, warnings and errors that nobody can catch, goes the same way, so that
a stream of JSON stays one.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

LEVELS = ("debug", "info", "warning", "error")

log = logging.getLogger("raftkv")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (ISO 8601, UTC), level, logger, message, who says it, and the traceback if any."""

    def __init__(self, who: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._who = dict(who or {})

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, object] = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._who,
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, form: str, who: Mapping[str, object] | None = None) -> None:
    """Send all records of at least `level` to stderr, in `form` 'text' or 'json'; `who` is in each JSON object."""
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonFormatter(who))
    else:
        handler.setFormatter(
            logging.Formatter("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
        )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log.critical("ends: %r", error, exc_info=error)
    sys.unraisablehook = lambda args: log.error(
        "%s: %r", args.err_msg or "ignored", args.object, exc_info=args.exc_value
    )


def say_last(text: str) -> None:
    """One line on stderr about why the process ends, in the form of the log if that is JSON."""
    handlers = logging.getLogger().handlers
    if handlers and isinstance(handlers[0].formatter, JsonFormatter):
        log.critical("%s", text)
    else:
        sys.stderr.write(f"raftkv: {text}\n")
