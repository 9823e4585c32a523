"""Reads the commands in a page of documentation."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

NOT_RUN = "(not run by us)"
"""Marks a command that no test runs."""


def command_lines(page: Path) -> list[str]:
    """The lines of the page's code blocks; joins continued lines, skips comments and empty lines."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def commands_in(page: Path) -> list[list[str]]:
    """The words of each command without the mark NOT_RUN."""
    return [shlex.split(line, comments=True) for line in command_lines(page) if NOT_RUN not in line]
