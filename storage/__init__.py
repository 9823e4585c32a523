"""The stores of images and masks: their interface, the embedded store, the rules of keys and the errors.

Only users of R2 import storage.r2: boto3 takes 0.2 s and 22 MB per process.
"""

from storage.base import ObjectStore
from storage.errors import (
    ImageUrlForbidden,
    ImageUrlInvalid,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageMisconfigured,
    StorageUnavailable,
)
from storage.keys import mask_key
from storage.local import LocalFolder

__all__ = [
    "ImageUrlForbidden",
    "ImageUrlInvalid",
    "LocalFolder",
    "ObjectNotFound",
    "ObjectStore",
    "ObjectTooLarge",
    "StorageError",
    "StorageMisconfigured",
    "StorageUnavailable",
    "mask_key",
]
