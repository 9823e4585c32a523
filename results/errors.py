"""What can go wrong with task rows; no message holds a prompt, a URL or a secret.

ResultsError
    TaskNotFound        404: no row with this id belongs to this user
    TaskInProgress      409: another attempt holds the row; carries retry_after_s
    AttemptLost         the row is no longer this attempt's: drop the work, settle nothing
        AlreadySettled  this very attempt has settled it, and its user has changed the row since
    MetadataInvalid     500: metadata or labels are not JSON (NaN, infinity, a tensor): our own bug
    ResultsUnavailable  502: the store itself failed; trying again may help
    ResultsMisconfigured  stops the start: trying again cannot help before someone mends something
"""


class ResultsError(Exception):
    """Anything that a result store raises on purpose."""


class TaskNotFound(ResultsError):
    """No row has this id, or it is another user's: the two look alike on purpose."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id}")


class TaskInProgress(ResultsError):
    """Another attempt holds the row; its lease runs out in `retry_after_s` seconds."""

    def __init__(self, task_id: str, retry_after_s: float) -> None:
        super().__init__(f"task {task_id} is being processed; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class AttemptLost(ResultsError):
    """The row was taken over or settled otherwise since this attempt claimed it."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"task {task_id} is no longer held by this attempt")


class AlreadySettled(AttemptLost):
    """The row stands settled under this very attempt, with other content: its user has changed it since."""


class MetadataInvalid(ResultsError):
    """The metadata or the labels cannot be written as JSON."""


class ResultsUnavailable(ResultsError):
    """The store could not be read or written."""


class ResultsMisconfigured(ResultsError):
    """The settings or the table cannot work as they are; the message is a sentence for the operator.

    Only start-up meets it: a store that is running logs it and raises ResultsUnavailable.
    """
