"""A process is told apart from every other: from dead ones, from zombies, and from who has its pid now."""

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
    """Another process, and the identity that it gives itself."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
        process.kill()


def test_who_lives(child: tuple[subprocess.Popen[str], str]) -> None:
    """Alive until it is killed; dead as a zombie already, which nobody has waited for."""
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


def test_who_is_the_parent(child: tuple[subprocess.Popen[str], str]) -> None:
    """A child is no parent, however alive."""
    assert not identity.is_parent(child[1])
    code = f"from processes import identity as own; print(own.is_parent('{identity.current()}'))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert printed.stdout.strip() == b"True"


def test_it_stays_the_same() -> None:
    """The identity of a process never changes."""
    assert identity.current() == identity.current()
    assert identity.is_alive(identity.current())


def test_reused_pid_is_another_process() -> None:
    """The same pid with another start is not the same process."""
    pid, _, started = identity.current().partition(":")
    assert not identity.is_alive(f"{pid}:{started}1")
    assert not identity.is_alive(f"{pid}:{float(started.rpartition('-')[2]):.2f}.")


@pytest.mark.parametrize(
    "text", ["", ":", "1", "1:", "-1:3", "x:1", "\u0661:1", "99999999999:1", "9" * 30 + ":1"]
)
def test_malformed_text_is_nobody(text: str) -> None:
    """What is no identity names nobody, and raises nothing."""
    assert not identity.is_alive(text)
    assert not identity.is_parent(text)
