"""Errors between an image with a prompt and its instances.

SAM3Error
    WeightsError            the checkpoint is missing, unreadable or not a SAM 3
        HubUnavailable          the hub that it is downloaded from is unavailable
    DeviceUnavailable       the device is unavailable
        DeviceFull              its memory is full
    ModelNotLoaded          the weights are not loaded yet, or failed to load
    FeaturesNotHeld         the features of an image were asked for by its key, and are not held
    RunnerStopped           the model's process died during the request, or must end since its device failed
    UnsupportedImage        not a PNG, JPEG or WEBP, damaged, or over a limit
    DecoderFailed           the decoder processes cannot work, whatever the image
    PromptTooLong           more tokens than the text encoder reads
    BoxOutsideImage         an exemplar has no px of the image
    MasksTooLarge           the masks of the instances have too many bytes to leave the model's process
    DeadlineExceeded        the caller's deadline passed before the work began
    InferenceFailed         the model failed on this image
"""


class SAM3Error(Exception):
    """Base of every error of this package."""


class WeightsError(SAM3Error):
    """The checkpoint is missing, unreadable or not a SAM 3; the message says what to do."""


class HubUnavailable(WeightsError):
    """The hub or its store does not respond, or responds with an error; a retry may succeed."""


class DeviceUnavailable(SAM3Error):
    """The requested device does not exist, or its memory is full."""


class DeviceFull(DeviceUnavailable):
    """The device's memory is too full for the model; other processes may free theirs."""


class ModelNotLoaded(SAM3Error):
    """The weights are not loaded yet, or failed to load."""


class FeaturesNotHeld(SAM3Error):
    """An image has a key, but no pixels, and the features of that key are not held: send the pixels."""


class RunnerStopped(SAM3Error):
    """The model's process died during the request, or lost its device, and the request may be the cause."""


class UnsupportedImage(SAM3Error):
    """The bytes are no PNG, JPEG or WEBP, are damaged, or exceed a limit."""


class DecoderFailed(SAM3Error):
    """A decoder process exited by itself: it cannot start, or has a bug."""


class PromptTooLong(SAM3Error):
    """The prompt has more tokens than the text encoder reads."""


class BoxOutsideImage(SAM3Error):
    """A box of the prompt has no px of the image."""


class MasksTooLarge(SAM3Error):
    """The masks of a prompt's instances have more bytes than may leave the model's process."""


class DeadlineExceeded(SAM3Error):
    """The caller's deadline passed before the work began."""


class InferenceFailed(SAM3Error):
    """The model failed on this image; the other requests of the batch are not affected."""
