"""The errors of a result store; no message holds a prompt, a URL or a secret.

ResultsError
    TaskNotFound        404: this user has no row with this id
    TaskInProgress      409: another attempt holds the row; carries retry_after_s
    AttemptLost         the attempt no longer holds the row: discard its work, settle nothing
        AlreadySettled  this attempt has settled the row, and its user has changed it since
    MetadataInvalid     500: metadata or labels are not JSON (NaN, infinity, a tensor): a bug of this server
    ResultsUnavailable  502: the store failed; a retry may succeed
    ResultsMisconfigured  stops the start: no retry succeeds before the operator changes something
"""


class ResultsError(Exception):
    """Base of the errors that a result store raises on purpose."""


class TaskNotFound(ResultsError):
    """No row has this id, or it is another user's: callers cannot distinguish the two."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id}")


class TaskInProgress(ResultsError):
    """Another attempt holds the row; its lease expires in `retry_after_s` seconds."""

    def __init__(self, task_id: str, retry_after_s: float) -> None:
        super().__init__(f"task {task_id} is being processed; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class AttemptLost(ResultsError):
    """Another attempt has claimed or settled the row since this attempt claimed it."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"task {task_id} is no longer held by this attempt")


class AlreadySettled(AttemptLost):
    """This attempt has settled the row, which now holds other content: its user has changed it."""


class MetadataInvalid(ResultsError):
    """The metadata or the labels cannot be written as JSON."""


class ResultsUnavailable(ResultsError):
    """The store could not be read or written."""


class ResultsMisconfigured(ResultsError):
    """The settings or the table cannot work as they are; the message is a sentence for the operator.

    Only the start raises it to its caller: a running store logs it and raises ResultsUnavailable.
    """
