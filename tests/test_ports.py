"""Where the server can be reached: its HTTP port, and nothing that another user of the machine can open."""

from __future__ import annotations

import socket
import stat
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from commands.local_server import LocalServer, local_server
from tests.server_processes import left_after

pytestmark = pytest.mark.server


def processes_of(server: LocalServer) -> list[psutil.Process]:
    """The supervisor and all that it started."""
    supervisor = psutil.Process(server.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def open_ports(server: LocalServer) -> set[int]:
    """The TCP and UDP ports at which one of the processes can be reached."""
    return {
        held.laddr.port
        for process in processes_of(server)
        for held in process.net_connections("inet")
        if held.status == psutil.CONN_LISTEN or held.type == socket.SOCK_DGRAM
    }


def test_http_port_alone_is_open(server: LocalServer) -> None:
    """No process of the server listens anywhere but at the HTTP port, the loopback included."""
    assert open_ports(server) == {urlsplit(server.url).port}


def unix_sockets(server: LocalServer) -> set[Path]:
    """The unix sockets of the server's processes that have a path."""
    return {
        Path(str(held.laddr))
        for process in processes_of(server)
        for held in process.net_connections("unix")
        if str(held.laddr)
    }


def test_sockets_between_processes_are_private(server: LocalServer) -> None:
    """The unix sockets lie in folders that only the server's user may enter."""
    paths = unix_sockets(server)
    assert paths  # the runner's
    for path in paths:
        folder = path.parent.stat()
        assert stat.S_IMODE(folder.st_mode) == 0o700, path
        assert folder.st_uid == psutil.Process(server.pid).uids().real


def test_no_socket_outlives_the_server(tmp_path: Path) -> None:
    """A stop leaves no process, no socket and none of their folders behind."""
    with local_server(tmp_path / "server") as running:
        paths, processes = unix_sockets(running), processes_of(running)
        assert paths
    assert left_after(processes, 5.0) == []
    assert [path for path in paths if path.parent.exists()] == []
