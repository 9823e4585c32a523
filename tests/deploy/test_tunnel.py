"""The server behind its tunnel, started as in the image for Vast.ai; a script replaces cloudflared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import pytest

from commands.local_server import clean_environment, reserved_ports, server_command, wait_until_ready
from tests import new_connection
from tests.edge import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(__file__).parent.parent.parent / "deploy" / "vast" / "behind_tunnel.sh"
CLOUDFLARED = """#!/bin/sh
echo "cloudflared $* with $TUNNEL_TOKEN" >>"$CLOUDFLARED_LOG"
exec sleep 300
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the script needs bash")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment with `cloudflared` and the tunnel blue."""
    program = tmp_path / "bin" / "cloudflared"
    program.parent.mkdir()
    program.write_text(CLOUDFLARED)
    program.chmod(0o755)
    return {
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "CLOUDFLARED_LOG": str(tmp_path / "cloudflared.log"),
        "CLOUDFLARE_TUNNEL": "blue",
        "CLOUDFLARE_TUNNEL_TOKEN_BLUE": "token-of-blue",
        "CLOUDFLARE_TUNNEL_TOKEN_GREEN": "token-of-green",
    }


def ended(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run `command` behind the tunnel until it ends."""
    return subprocess.run(
        [str(SCRIPT), *command], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("tunnel", ["blue", "green"])
def test_only_the_tunnel_gets_its_token(environment: dict[str, str], tunnel: str) -> None:
    """The token of the chosen tunnel is on no command line, and not in the server's environment."""
    wait_and_show = 'until [ -s "$CLOUDFLARED_LOG" ]; do sleep 0.05; done; env'
    run = ended({**environment, "CLOUDFLARE_TUNNEL": tunnel}, "bash", "-c", wait_and_show)
    assert run.returncode == 0
    log = Path(environment["CLOUDFLARED_LOG"]).read_text()
    assert log == f"cloudflared --no-autoupdate tunnel run with token-of-{tunnel}\n"
    assert "token-of-" not in run.stdout


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"CLOUDFLARE_TUNNEL": ""}, "CLOUDFLARE_TUNNEL must be blue or green, not ''"),
        ({"CLOUDFLARE_TUNNEL": "red"}, "CLOUDFLARE_TUNNEL must be blue or green, not 'red'"),
        (
            {"CLOUDFLARE_TUNNEL_TOKEN_BLUE": ""},
            "CLOUDFLARE_TUNNEL_TOKEN_BLUE is not set: it is the token of the tunnel blue",
        ),
        (
            {"PATH": "/usr/bin:/bin"},
            "cloudflared is not installed: build this image with deploy/vast/Dockerfile",
        ),
    ],
)
def test_start_without_a_tunnel_is_refused(
    environment: dict[str, str], changes: dict[str, str], sentence: str
) -> None:
    """Without a tunnel the server would be unreachable, so it is not started."""
    run = ended({**environment, **changes}, "echo", "the server runs")
    assert (run.returncode, run.stderr.strip(), run.stdout) == (1, sentence, "")


@pytest.mark.parametrize(
    ("command", "status"), [(("true",), 0), (("bash", "-c", "exit 3"), 3), (("nothing",), 127)]
)
def test_exit_status_is_the_servers(
    environment: dict[str, str], command: tuple[str, ...], status: int
) -> None:
    """The script ends with the server's exit status."""
    assert ended(environment, *command).returncode == status


@pytest.fixture
def served(environment: dict[str, str], tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The real server behind the tunnel: the script's process and the server's URL."""
    log_path = tmp_path / "server.log"
    own = clean_environment(tmp_path / "data", "0123456789abcdef")
    (tmp_path / "data").mkdir()
    with reserved_ports(1) as [port], log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(SCRIPT), *server_command(port)],
            env={**own, **environment, "API_WORKERS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", log_path)
            yield process, f"http://127.0.0.1:{port}"
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(60)


@pytest.mark.server
def test_crashed_tunnel_is_restarted(
    served: tuple[subprocess.Popen[bytes], str], environment: dict[str, str]
) -> None:
    """A crashed cloudflared is restarted while the server keeps running; SIGTERM stops both cleanly."""
    process, url = served
    log = Path(environment["CLOUDFLARED_LOG"])
    [cloudflared] = [
        child for child in psutil.Process(process.pid).children(recursive=True) if child.name() == "sleep"
    ]
    cloudflared.kill()
    assert wait_for(lambda: log.read_text().count("tunnel run"), lambda count: count == 2) == 2
    assert new_connection.get(f"{url}/readyz").status_code == httpx.codes.OK

    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert psutil.wait_procs(children, timeout=30)[1] == []
