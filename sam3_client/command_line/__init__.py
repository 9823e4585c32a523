"""The command `sam3`."""

from __future__ import annotations

import sys

EXTRA = ("typer", "rich", "filelock")
"""What the extra `cli` installs."""


def main() -> None:
    """Run the command; the exit codes are listed in `sam3 predict --help`."""
    try:
        from sam3_client.command_line.app import app  # noqa: PLC0415 - its packages may be missing
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f"sam3 needs {error.name}, which the client alone does not: pip install {' '.join(EXTRA)}")
    app(prog_name="sam3")
