"""What the server writes about itself: lines for people, or one JSON object a line for programs.

Nothing that a stranger sends gets into a line unescaped, and nothing secret gets in at all: no keys, no queries, no
text of prompts or answers.
"""

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

access_log = logging.getLogger("headway.access")

MAX_PATH = 200  # characters of a path that are shown


class JsonLines(logging.Formatter):
    """One object a line: time (UTC), level, logger, message, what else is known, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Send everything from this level on to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonLines() if form == "json" else logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for chatty in ("uvicorn", "asyncio"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))


def tell_access(method: str, path: str, status: int, seconds: float, num_bytes: int, call_id: str) -> None:
    """A call has been answered, or left by its caller (499)."""
    shown = path[:MAX_PATH].encode("unicode_escape").decode()
    fields = {
        "method": method,
        "path": shown,
        "status": status,
        "ms": round(1e3 * seconds, 1),
        "bytes": num_bytes,
        "request_id": call_id,
    }
    access_log.info("%s %s %d, %.1f ms, %d bytes, %s", *fields.values(), extra={"fields": fields})
