"""What can go wrong with images and masks; no message holds a key, a URL or a secret.

StorageError
    ImageUrlInvalid     400: not a key or URL that we can read
    ImageUrlForbidden   403: outside our store, or outside the user's uploads
    ObjectNotFound      404: nothing is stored there
    ObjectTooLarge      413: more than the caller's max_bytes
    StorageUnavailable  502: the store itself failed; trying again may help
    StorageMisconfigured  stops the start: trying again cannot help before someone mends something
"""


class StorageError(Exception):
    """Anything that an object store raises on purpose."""


class ImageUrlInvalid(StorageError):
    """The image_url is malformed."""


class ImageUrlForbidden(StorageError):
    """The image_url is well-formed, but points where this user may not read."""


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
    """The store refuses us as we are set up; the message is a sentence for the operator.

    Only start-up meets it: a store that is running logs it and raises StorageUnavailable.
    """
