"""Log lines as text or as one JSON object per line."""

from __future__ import annotations

import json
import logging
import re
import sys
import time

from vllm_rfork.logs.quoting import MAX_LINE, printable
from vllm_rfork.planner.http import valid_json

#: Attributes of a record that ``logging`` sets; all others were given with ``extra``.
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NOT_ASCII = re.compile("[^\\x20-\\x7e]")


class JsonLines(logging.Formatter):
    """One object per line: ``at`` (UTC), ``level``, ``logger``, ``message``, then the fields of ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, without a line break."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        message = record.getMessage()[:MAX_LINE]  # JSON escapes control characters
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, "message": message}
        line |= {name: value for name, value in vars(record).items() if name not in _OWN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # ASCII only: other characters may control the terminal that shows the log.
        return _NOT_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], valid_json.encode(line).decode())


class TextLines(logging.Formatter):
    """``LEVEL date logger: message field=value``; control characters are escaped, so that no line can be forged."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        fields = {name: value for name, value in vars(record).items() if name not in _OWN}
        at = time.strftime("%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{record.levelname} {at} {record.name}: {record.getMessage()}"
        line += "".join(f" {name}={value!r}" for name, value in fields.items())
        lines = [line, *(self.formatException(record.exc_info).splitlines() if record.exc_info else ())]
        return "\n".join(printable(each, MAX_LINE) for each in lines)


def set_up(log_format: str, log_level: str) -> None:
    """Log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
