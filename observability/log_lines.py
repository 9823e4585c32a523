"""Log lines that no caller can forge, as text or as JSON."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

BENTOML_LOGGERS = ("bentoml", "uvicorn.error", "circus")
"""BentoML gives these handlers of their own, beside the root logger's."""

_IDS: ContextVar[dict[str, str]] = ContextVar("log_ids", default={})  # noqa: B039 - never changed in place


@contextmanager
def log_ids(**ids: str) -> Iterator[None]:
    """Put `request_id` and `task_id` on every JSON event of the block, and of the tasks that it starts."""
    token = _IDS.set(_IDS.get() | ids)
    try:
        yield
    finally:
        _IDS.reset(token)


def escape_log_lines() -> None:
    """Escape the messages of every logger of this process.

    A message cannot contain a line break or a terminal's control sequence. The lines of a traceback are
    indented, so that none looks like a message.
    """
    logging.setLogRecordFactory(_EscapedRecord)


def log_info_of(packages: Iterable[str]) -> None:
    """Log what these packages log from INFO on, as BentoML's root logger formats it.

    BentoML's own set-up logs others from WARNING on. Lines of uvicorn and circus, which two of its handlers
    would write, are written once.
    """
    for package in packages:
        logging.getLogger(package).setLevel(logging.INFO)
    for name in BENTOML_LOGGERS[1:]:
        logging.getLogger(name).handlers = []


def log_as_json() -> None:
    """From now on write one JSON object a line for what is logged, warned, raised or printed in this process.

    Call it after BentoML has set up its own log; a second call changes nothing.
    """
    if isinstance(sys.stderr, _PrintedLines):
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_JsonEvents())
    logging.getLogger().handlers = [handler]
    for name in BENTOML_LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.stdout = _PrintedLines(sys.stdout, handler, "stdout", logging.INFO)
    sys.stderr = _PrintedLines(sys.stderr, handler, "stderr", logging.ERROR)


def escaped(text: str) -> str:
    r"""`text` with unprintable characters escaped as by Python: \n, \x1b, \u202e (right to left), \ud800."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


class _EscapedRecord(logging.LogRecord):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info:
            # Every handler's formatter uses this text.
            lines = "".join(traceback.format_exception(*self.exc_info)).rstrip("\n").split("\n")
            self.exc_text = "\n".join(f"  {escaped(line)}" for line in lines)

    def getMessage(self) -> str:  # noqa: N802 - logging's name
        return escaped(super().getMessage().rstrip("\n"))


class _JsonEvents(JsonFormatter):
    """The fields of an event: time (UTC), level, logger, pid, message, ids, the call's own, exception."""

    def __init__(self) -> None:
        super().__init__(rename_fields={"exc_info": "exception"})

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data |= {"level": record.levelname, "logger": record.name, "pid": record.process}
        log_data["message"] = record.message
        log_data |= _IDS.get()
        span = trace.get_current_span().get_span_context()
        if span.trace_flags.sampled:
            log_data["trace_id"] = trace.format_trace_id(span.trace_id)
        super().add_fields(log_data, record, message_dict)


class _PrintedLines:
    """Replaces stdout or stderr: each printed line becomes an event."""

    def __init__(self, stream: TextIO, handler: logging.Handler, name: str, level: int) -> None:
        self._stream, self._handler, self._name, self._level = stream, handler, name, level
        self._begun = ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                record = logging.makeLogRecord({"name": self._name, "levelno": self._level, "msg": line})
                record.levelname = logging.getLevelName(self._level)
                # Not by the handler: if it fails it prints to stderr, which is this object.
                self._stream.write(f"{self._handler.format(record)}\n")
        self._stream.flush()
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _log_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    logging.getLogger("uncaught").critical("this process ends with an error", exc_info=(kind, error, where))


def _log_uncaught_in_thread(uncaught: threading.ExceptHookArgs) -> None:
    if uncaught.exc_value is not None:
        name = uncaught.thread.name if uncaught.thread else "a thread"
        logging.getLogger("uncaught").critical("%s ends with an error", name, exc_info=uncaught.exc_value)
