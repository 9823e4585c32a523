"""Reads the commands that a page of documentation shows."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NOT_RUN = "(not run by us)"
"""Marks a command that no test runs."""


def command_lines(page: Path) -> list[str]:
    """The lines of the page's code blocks, continued lines joined, without comment lines and empty ones."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def commands_in(page: Path) -> list[list[str]]:
    """The words of each command that is not marked as not run."""
    return [shlex.split(line, comments=True) for line in command_lines(page) if NOT_RUN not in line]
