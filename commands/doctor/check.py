"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, and what was found.

    Attributes:
        name: of what was looked at.
        status: failed: the server does not start, or does not work; warning: it starts.
        finding: without secrets.
        mend: what to do; empty where there is nothing to do, or `finding` says it.
    """

    name: str
    status: Status
    finding: str
    mend: str = ""
