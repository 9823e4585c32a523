"""Where images come from and masks go: an ObjectStore, its key rules and its errors.

storage.r2 is imported by who uses it: boto3 takes 0.2 s and 22 MB a process.
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
