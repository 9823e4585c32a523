"""What a person at Label Studio can do something about: each error is one sentence."""

from __future__ import annotations

from typing import ClassVar


class AdapterError(Exception):
    """The message is a sentence that says what to do."""

    status: ClassVar[int] = 500
    """Of the HTTP answer to Label Studio."""


class BadRequest(AdapterError):
    """Label Studio sent a body that this backend cannot read."""

    status = 400


class UnsupportedInterface(AdapterError):
    """The labelling interface has nothing that SAM 3 can fill."""

    status = 400


class UnsupportedPrompt(AdapterError):
    """What the annotator drew is no prompt for SAM 3."""

    status = 400


class ImageUnavailable(AdapterError):
    """The image of a task could not be fetched."""

    status = 422


class OutOfTime(AdapterError):
    """Label Studio does not wait any longer for this answer."""

    status = 503
