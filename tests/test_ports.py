"""The server's sockets: its HTTP port, and nothing else that another user of the machine can open.

tests/test_lifecycle.py tests that a stop removes them.
"""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil
import pytest

from benchmarks.process_tree import call_each, process_tree

if TYPE_CHECKING:
    from commands.local_server import LocalServer

pytestmark = pytest.mark.server


def open_ports(server: LocalServer) -> set[int]:
    """The TCP and UDP ports on which the processes listen."""
    return {
        held.laddr.port
        for connections in call_each(process_tree(server.pid), lambda each: each.net_connections("inet"))
        for held in connections
        if held.status == psutil.CONN_LISTEN or held.type == socket.SOCK_DGRAM
    }


def test_only_the_http_port_is_open(server: LocalServer) -> None:
    """The server's processes listen only on the HTTP port, even on loopback."""
    assert open_ports(server) == {urlsplit(server.url).port}


def unix_sockets(server: LocalServer) -> set[Path]:
    """The paths of the unix sockets of the server's processes."""
    return {
        Path(str(held.laddr))
        for connections in call_each(process_tree(server.pid), lambda each: each.net_connections("unix"))
        for held in connections
        if str(held.laddr)
    }


def test_sockets_between_processes_are_private(server: LocalServer) -> None:
    """The unix sockets are in folders that only the server's user can enter."""
    paths = unix_sockets(server)
    assert paths  # the runner's
    for path in paths:
        folder = path.parent.stat()
        assert stat.S_IMODE(folder.st_mode) == 0o700, path
        assert folder.st_uid == psutil.Process(server.pid).uids().real
