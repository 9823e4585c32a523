"""The errors of an object store; no message holds a key, a URL or a secret.

StorageError
    ImageUrlInvalid     400: not a key or URL of a known form
    ImageUrlForbidden   403: outside the store, or outside the user's uploads
    ObjectNotFound      404: no object has this key
    ObjectTooLarge      413: more than the caller's max_bytes
    StorageUnavailable  502: the store failed; a retry may succeed
    StorageMisconfigured  stops the start: no retry succeeds before the operator changes something
"""


class StorageError(Exception):
    """Base of the errors that an object store raises on purpose."""


class ImageUrlInvalid(StorageError):
    """The image_url is malformed."""


class ImageUrlForbidden(StorageError):
    """The image_url is well-formed, but this user may not read the object."""


class ObjectNotFound(StorageError):
    """No object has this key."""


class ObjectTooLarge(StorageError):
    """The object has more than `max_bytes` bytes."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"the image has more than {max_bytes} bytes")
        self.max_bytes = max_bytes


class StorageUnavailable(StorageError):
    """The store could not be read or written."""


class StorageMisconfigured(StorageError):
    """The store refuses this server's settings; the message is a sentence for the operator.

    Only the start raises it to its caller: a running store logs it and raises StorageUnavailable.
    """
