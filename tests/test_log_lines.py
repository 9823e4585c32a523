"""Log lines that no stranger can forge."""

from __future__ import annotations

import io
import logging
import re
from typing import TYPE_CHECKING

import pytest

from log_lines import escape_log_lines, escaped

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("stranger")
FORGED = "x\r\n2026-01-01 [INFO] forged\x1b[2K\x9b2J\u2028\u202e\ud800"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What `logger` writes; its handler was there before anything was escaped."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    before = logging.getLogRecordFactory()
    escape_log_lines()
    yield stream
    logging.setLogRecordFactory(before)
    logger.removeHandler(handler)


def lines(log: io.StringIO) -> list[str]:
    return log.getvalue().split("\n")[:-1]


def test_message_keeps_to_its_line(log: io.StringIO) -> None:
    """Line ends, terminal commands, marks of direction and lone surrogates in a value are spelt out."""
    logger.info("task %s failed", FORGED)
    [line] = lines(log)
    assert line.isprintable()
    assert line.endswith(r"task x\r\n2026-01-01 [INFO] forged\x1b[2K\x9b2J\u2028\u202e\ud800 failed")


def test_traceback_cannot_look_like_a_record(log: io.StringIO) -> None:
    """The lines of a traceback are indented, those of a stranger's text within it, too."""
    error = KeyError(FORGED)
    error.__cause__ = ValueError(FORGED)
    logger.error("request %s failed", FORGED, exc_info=error)
    first, *others = lines(log)
    assert re.match(r"\d{4}-.* \[ERROR\] request x", first)
    assert others
    for line in lines(log):
        assert line.isprintable()
    assert {line[:2] for line in others} == {"  "}


def test_plain_text_stays(log: io.StringIO) -> None:
    """Other scripts and emoji are written as they are; the line end of a message is dropped."""
    logger.info("%s\n", "café 猫 🔴")
    assert lines(log)[0].endswith("café 猫 🔴")
    assert escaped("C:\\data") == "C:\\data"
