"""Log lines that callers cannot forge, and JSON logs."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from observability.log_lines import escape_log_lines, escaped

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger("test")
FORGED = "x\r\n2026-01-01 [INFO] forged\x1b[2K\x9b2J\u2028\u202e\ud800"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The output of `logger`, whose handler was added before escaping was set up."""
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


def test_message_is_one_line(log: io.StringIO) -> None:
    """Line breaks, terminal commands, direction marks and lone surrogates in a value are escaped."""
    logger.info("task %s failed", FORGED)
    [line] = lines(log)
    assert line.isprintable()
    assert line.endswith(r"task x\r\n2026-01-01 [INFO] forged\x1b[2K\x9b2J\u2028\u202e\ud800 failed")


def test_traceback_cannot_look_like_a_record(log: io.StringIO) -> None:
    """The lines of a traceback are indented, including those of a caller's text in it."""
    error = KeyError(FORGED)
    error.__cause__ = ValueError(FORGED)
    logger.error("request %s failed", FORGED, exc_info=error)
    first, *others = lines(log)
    assert re.match(r"\d{4}-.* \[ERROR\] request x", first)
    assert others
    for line in lines(log):
        assert line.isprintable()
    assert {line[:2] for line in others} == {"  "}


def test_plain_text_is_not_escaped(log: io.StringIO) -> None:
    """Other scripts and emoji are not escaped; the line break at a message's end is removed."""
    logger.info("%s\n", "café 猫 🔴")
    assert lines(log)[0].endswith("café 猫 🔴")
    assert escaped("C:\\data") == "C:\\data"


JSON_LOG = """
import logging, sys, threading, warnings
from bentoml._internal.log import configure_server_logging
from observability.log_lines import escape_log_lines, log_as_json, log_ids, log_info_of
configure_server_logging()
escape_log_lines()
log_info_of(["results"])
log_as_json()
logging.getLogger("uvicorn.error").warning("of uvicorn")
logging.getLogger("circus").warning("of circus")
logging.getLogger("bentoml.serve").info("of bentoml")
logging.getLogger("other").info("not heard")
with log_ids(request_id="r-1"):
    with log_ids(task_id="t-1"):
        logging.getLogger("results.outbox").info("%s\\n", sys.argv[1], extra={"status": 200})
    logging.getLogger("results.outbox").info("without a task")
try:
    raise ValueError(sys.argv[1])
except ValueError:
    logging.getLogger("results.outbox").exception("with an exception")
warnings.warn("a warning")
print("printed", end=" ")
print("in two steps")
def fail():
    raise KeyError("in a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
END
"""


TEXT_LOG = """
import logging
from bentoml._internal.log import configure_server_logging
from observability.log_lines import log_info_of
configure_server_logging()
log_info_of(["results"])
for name in ("bentoml.serve", "uvicorn.error", "circus", "results.outbox", "other"):
    logging.getLogger(name).info("info of %s", name)
    logging.getLogger(name).warning("warning of %s", name)
"""


def test_text_log_has_each_line_once() -> None:
    """Our parts and BentoML log from INFO on, others from WARNING on, and no line is written twice."""
    printed = subprocess.run(
        [sys.executable, "-c", TEXT_LOG],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [re.sub(r"^.*\] ", "", line) for line in printed.splitlines()] == [
        *(
            "info of bentoml.serve",
            "warning of bentoml.serve",
            "warning of uvicorn.error",
            "warning of circus",
        ),
        *("info of results.outbox", "warning of results.outbox", "warning of other"),
    ]


def json_log(end: str) -> tuple[int, list[dict[str, Any]]]:
    """Run a process that logs like the server and then ends; returns its exit status and its events."""
    ended = subprocess.run(
        [sys.executable, "-c", JSON_LOG.replace("END", end), FORGED.replace("\ud800", "")],
        cwd=Path(__file__).parent.parent.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return ended.returncode, [json.loads(line) for line in ended.stdout.decode("ascii").splitlines()]


def test_json_has_one_event_per_line() -> None:
    """Each event of loggers, warnings, threads, prints and exceptions is logged once, in one line."""
    status, events = json_log("raise RuntimeError('the end')")
    assert status == 1
    assert [(event["level"], event["logger"], event["message"]) for event in events] == [
        ("WARNING", "uvicorn.error", "of uvicorn"),
        ("WARNING", "circus", "of circus"),
        ("INFO", "bentoml.serve", "of bentoml"),
        ("INFO", "results.outbox", escaped(FORGED.replace("\ud800", ""))),
        ("INFO", "results.outbox", "without a task"),
        ("ERROR", "results.outbox", "with an exception"),
        ("WARNING", "py.warnings", events[6]["message"]),
        ("INFO", "stdout", "printed in two steps"),
        ("CRITICAL", "uncaught", events[8]["message"]),
        ("CRITICAL", "uncaught", "this process ends with an error"),
    ]
    assert "a warning" in events[6]["message"]
    assert "KeyError: 'in a thread'" in events[8]["exception"]
    assert events[9]["exception"].endswith("RuntimeError: the end")
    assert events[5]["exception"].startswith("Traceback (most recent call last):")


def test_json_has_the_ids_of_request_and_task() -> None:
    """An event has the ids of the request and the task in whose block it was logged, and its own fields."""
    status, events = json_log("sys.exit('cannot start: a sentence')")
    assert status == 1
    of_task, of_request, without = events[3], events[4], events[5]
    assert (of_task["request_id"], of_task["task_id"], of_task["status"]) == ("r-1", "t-1", 200)
    assert of_request["request_id"] == "r-1"
    assert "task_id" not in of_request
    assert "request_id" not in without
    last = events[-1]
    assert (last["level"], last["logger"], last["message"]) == (
        *("ERROR", "stderr"),
        "cannot start: a sentence",
    )
