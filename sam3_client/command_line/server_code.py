"""The commands that run the server's code, which a checkout has beside this package."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sam3_client.command_line.errors import CommandError

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKOUT = Path(__file__).resolve().parents[2]
PARTS = ("service.py", "settings.py", "commands/local_server.py", "sam3_runner")


@contextmanager
def server_code(command: str, install: str = "pip install -r requirements.lock") -> Iterator[Path]:
    """The checkout's folder, from which its modules can be imported inside the block.

    Args:
        command: as the user gave it, for the messages.
        install: of the packages that the code needs.

    Raises:
        CommandError: the server's code, or a package that it imports, is missing.
    """
    if not all((CHECKOUT / part).exists() for part in PARTS):
        raise CommandError(
            f"`{command}` needs the server's code, and only its client is installed here: clone the server's "
            "repository, and run `make .venv/run` and `.venv/bin/sam3` there"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    try:
        yield CHECKOUT
    except ModuleNotFoundError as error:
        raise CommandError(
            f"`{command}` needs the package {error.name}, which is not installed here: "
            f"run `{install}` in {CHECKOUT}"
        ) from error
