"""Ports that are reserved for local servers."""

from __future__ import annotations

import random
import socket
import subprocess
import sys

import pytest

from commands import local_server
from commands.local_server import ROOT, reserved_ports

COUNT = 5
CODE = f"""
import random
from commands.local_server import reserved_ports
random.seed(0)
with reserved_ports({COUNT}) as ports:
    print(*ports)
"""


def reserve_elsewhere() -> set[int]:
    """The ports that another process reserves, which tries the same ones in the same order."""
    ended = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return set(map(int, ended.stdout.split()))


@pytest.fixture(autouse=True)
def _same_order() -> None:
    random.seed(0)


def test_two_processes_reserve_different_ports() -> None:
    """While one process holds a reservation, no other process gets the port, though nothing listens on it."""
    with reserved_ports(COUNT) as ports:
        assert len(set(ports)) == COUNT
        assert reserve_elsewhere().isdisjoint(ports)


def test_reservation_ends_with_its_block() -> None:
    """After the block other processes can reserve the ports."""
    with reserved_ports(COUNT) as ports:
        pass
    assert reserve_elsewhere() == set(ports)


def test_port_in_use_is_not_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that a server listens on is not reserved, although it is the first choice."""
    first = random.choice(range(20))  # noqa: S311 - not a secret
    with socket.create_server(("127.0.0.1", 0)) as server:
        used = server.getsockname()[1]
        monkeypatch.setattr(local_server, "PORTS", range(used - first, used - first + 20))
        random.seed(0)
        with reserved_ports(1) as [port]:
            assert port != used
