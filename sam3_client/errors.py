"""Everything that a call can raise; each message is a sentence that says what to do."""

from __future__ import annotations


class Sam3Error(Exception):
    """The parent of every error of this package.

    Args:
        message: one sentence; holds no key.
        code: the server's, as in its API contract, or one of this package where no server answered.
        request_id: the server's log has it; "" where no server answered.
        retry_after_s: after which the server asks to be tried again; None where it does not say.
    """

    def __init__(
        self, message: str, *, code: str = "", request_id: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadImage(Sam3Error):
    """What was passed as an image is none; nothing was sent."""


class ServerUnreachable(Sam3Error):
    """No answer came: nothing listens there, the connection broke, or the answer took too long."""


class Unauthorized(Sam3Error):
    """The key is missing or wrong."""


class DirectApiOff(Sam3Error):
    """The server does not serve direct requests."""


class InvalidRequest(Sam3Error):
    """A prompt, a box or an option breaks a rule; the message names it."""


class UnsupportedImage(Sam3Error):
    """The server cannot read the image, or the image exceeds one of its limits."""


class Overloaded(Sam3Error):
    """The server has too much to do, or did not reach this request before its deadline."""


class ModelLoading(Sam3Error):
    """The model is not loaded yet, or is being restarted."""


class ServerError(Sam3Error):
    """The server failed, or what answers there is no SAM3 server."""
