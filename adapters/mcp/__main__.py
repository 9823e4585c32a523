"""Starts the MCP server on stdin and stdout: `python -m adapters.mcp --root FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from adapters.mcp.images import ImageFolder
from adapters.mcp.server import create_server
from sam3_client import AsyncClient, Sam3Error

# Clients of MCP wait for about a minute.
ANSWER_TIMEOUT_S = 45.0
MAX_WAIT_S = 10.0


def main() -> None:
    """Serve until stdin ends."""
    arguments = _parser().parse_args()
    try:
        client = AsyncClient(arguments.url, timeout_s=ANSWER_TIMEOUT_S, max_wait_s=MAX_WAIT_S)
        folder = ImageFolder(arguments.root)
    except (Sam3Error, NotADirectoryError) as error:
        sys.exit(str(error))
    create_server(client, folder).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m adapters.mcp",
        description="An MCP server on stdin and stdout, with the tool segment_image. "
        "Reads SAM3_API_KEY, the key of the SAM 3 server.",
    )
    parser.add_argument(
        "--root", type=Path, required=True, metavar="FOLDER", help="whose pictures agents may read"
    )
    parser.add_argument("--url", help="of the SAM 3 server (SAM3_URL, else http://127.0.0.1:3000)")
    return parser


if __name__ == "__main__":
    main()
