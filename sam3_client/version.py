"""The version of this package, in its one place."""

from __future__ import annotations

VERSION = "0.1.0"
