"""The identity of a process: it differs from dead processes, zombies, and processes that reuse its pid."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from processes import identity

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
CODE = "from processes import identity as own; print(own.current(), flush=True); input()"


@pytest.fixture
def child() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another process, and its own identity."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_killed_process_is_not_alive(child: tuple[subprocess.Popen[str], str]) -> None:
    """A process is alive until it is killed; a zombie is not alive."""
    process, child_identity = child
    assert child_identity.startswith(f"{process.pid}:")
    assert identity.is_alive(child_identity)
    process.kill()
    assert process.stdout is not None
    process.stdout.read()  # ends with the process, which is then a zombie
    while identity.is_alive(child_identity):
        pass
    assert process.returncode is None
    process.wait()
    assert not identity.is_alive(child_identity)


def test_parent_is_recognised(child: tuple[subprocess.Popen[str], str]) -> None:
    """A process recognises its parent; a running child is not a parent."""
    assert not identity.is_parent(child[1])
    code = f"from processes import identity as own; print(own.is_parent('{identity.current()}'))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert printed.stdout.strip() == b"True"


def test_identity_does_not_change() -> None:
    """The identity of a process is constant."""
    assert identity.current() == identity.current()
    assert identity.is_alive(identity.current())


def test_reused_pid_is_another_process() -> None:
    """The same pid with another start time is another process."""
    pid, _, started = identity.current().partition(":")
    assert not identity.is_alive(f"{pid}:{started}1")
    assert not identity.is_alive(f"{pid}:{float(started.rpartition('-')[2]):.2f}.")


@pytest.mark.parametrize(
    "text", ["", ":", "1", "1:", "-1:3", "x:1", "\u0661:1", "99999999999:1", "9" * 30 + ":1"]
)
def test_malformed_identity_is_not_alive(text: str) -> None:
    """A malformed identity names no process, and raises no error."""
    assert not identity.is_alive(text)
    assert not identity.is_parent(text)
