"""What can go wrong on the way from an image and a prompt to instances.

SAM3Error
    WeightsError            the checkpoint is missing, unreadable or not a SAM 3
        HubUnavailable          the hub that it should come from is away
    DeviceUnavailable       the device is not there
        DeviceFull              its memory is taken by others
    ModelNotLoaded          asked before the weights were in, or after they failed to load
    RunnerStopped           the model's process died while it had the request
    UnsupportedImage        not a PNG, JPEG or WEBP, damaged, or over a limit
    DecoderFailed           the processes that decode cannot work, whatever the image
    PromptTooLong           more tokens than the text encoder reads
    DeadlineExceeded        the caller's deadline passed before the work began
    InferenceFailed         the model failed on this image
"""


class SAM3Error(Exception):
    """Base of every error of this package."""


class WeightsError(SAM3Error):
    """The checkpoint is missing, unreadable or not a SAM 3; the message says what to do."""


class HubUnavailable(WeightsError):
    """The hub or its store does not answer, or not well; it may do so later."""


class DeviceUnavailable(SAM3Error):
    """The device that was asked for is not there, or its memory is full."""


class DeviceFull(DeviceUnavailable):
    """The device's memory is too full for the model; others may give theirs back."""


class ModelNotLoaded(SAM3Error):
    """Asked before the weights were in, or after they failed to load."""


class RunnerStopped(SAM3Error):
    """The model's process died while it had the request, which may have been why."""


class UnsupportedImage(SAM3Error):
    """The bytes are no PNG, JPEG or WEBP, are damaged, or cost more than is allowed."""


class DecoderFailed(SAM3Error):
    """A process that decodes ended by itself: it cannot start, or has a bug."""


class PromptTooLong(SAM3Error):
    """The prompt has more tokens than the text encoder reads."""


class DeadlineExceeded(SAM3Error):
    """The caller's deadline passed before the work began."""


class InferenceFailed(SAM3Error):
    """The model failed on this image; its neighbours in the batch are not touched."""
