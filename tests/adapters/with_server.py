"""Runs a command beside a real server with the demo checkpoint: SAM3_URL and SAM3_API_KEY name it.

    python -m tests.adapters.with_server .venv/annotation/bin/python -m pytest ...

The adapters' tests run in the environment of the annotation tools, which cannot hold the server's packages.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from commands.local_server import local_server


def main(command: list[str]) -> int:
    """Run the command; its exit code."""
    settings = {"DIRECT_API": "true", "API_WORKERS": "1", "SAM3_CPU_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder, local_server(Path(folder), settings) as server:
        named = {"SAM3_URL": server.url, "SAM3_API_KEY": server.api_key}
        return subprocess.run(command, check=False, env=os.environ | named).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
