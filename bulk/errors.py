"""What goes wrong in a bulk run: with one picture, or with the run.

BulkError
    PictureError            becomes the picture's error row; the run goes on
    RunError                ends the run with a sentence and an exit code
        WrongUsage              2: an argument cannot be used
        NoPictures              2: nothing to segment
        BadManifest             2: the list of pictures cannot be read
        OtherRun                2: the folder belongs to other settings
        StoreUnavailable        3: the store failed for longer than the retries wait
        CredentialsRefused      3: credentials are missing, wrong or expired
        StoreRefused            3: the store refuses what the run needs, such as listing or writing
        StoreFull               3: the store has no space left, or is read-only
        ModelUnavailable        3: the model cannot be loaded
        ClusterUnavailable      3: Ray cannot run the work

All of them can be pickled, since they cross processes.
"""

from __future__ import annotations

from typing import Final, Literal

SOME_FAILED: Final = 1
"""Exit code: the run is complete, and some pictures are error rows."""
USAGE: Final = 2
"""Exit code: the arguments cannot be used as they are."""
UNAVAILABLE: Final = 3
"""Exit code: a store, its credentials or the cluster failed; the same command goes on later."""

PictureCode = Literal[
    "NOT_FOUND", "TOO_LARGE", "FORBIDDEN", "REFUSED", "UNSUPPORTED_IMAGE", "INFERENCE_FAILED"
]
"""FORBIDDEN: this user or these credentials may not read it. REFUSED: the store gives it to nobody."""


class BulkError(Exception):
    """Base of the errors that a bulk run raises on purpose."""


class PictureError(BulkError):
    """One picture cannot be segmented. It becomes an error row.

    Args:
        code: for programs.
        message: a sentence for people, without the picture's name, which is in the row.
    """

    def __init__(self, code: PictureCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class RunError(BulkError):
    """Ends the run.

    Args:
        message: a sentence that says what is wrong and what to do.
        exit_code: `USAGE` or `UNAVAILABLE`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.message = message
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.message


class _UsageError(RunError):
    def __init__(self, message: str) -> None:
        super().__init__(message, USAGE)
        self.args = (message,)  # what pickle passes to this constructor


class _UnavailableError(RunError):
    def __init__(self, message: str) -> None:
        super().__init__(message, UNAVAILABLE)
        self.args = (message,)


class WrongUsage(_UsageError):
    """An argument of the command cannot be used."""


class NoPictures(_UsageError):
    """The source has no picture; the message says what was looked for."""


class BadManifest(_UsageError):
    """The manifest cannot be read; the message names the line or row where there is one."""


class OtherRun(_UsageError):
    """The run's folder holds a run with other settings, or something else."""


class StoreUnavailable(_UnavailableError):
    """The store failed for longer than the retries wait."""


class CredentialsRefused(_UnavailableError):
    """The credentials are missing, wrong or expired."""


class StoreRefused(_UnavailableError):
    """The store answers, and refuses what the run needs: a right is missing, or it cannot do it."""


class StoreFull(_UnavailableError):
    """The store has no space left, its quota is used up, or it is read-only."""


class ModelUnavailable(_UnavailableError):
    """The model cannot be loaded on a machine of the cluster."""


class ClusterUnavailable(_UnavailableError):
    """Ray cannot be reached, or cannot run the work."""
