"""Where images come from and masks go: an ObjectStore, its key rules and its errors."""

from storage.base import ObjectStore
from storage.errors import (
    ImageUrlForbidden,
    ImageUrlInvalid,
    ObjectNotFound,
    ObjectTooLarge,
    StorageError,
    StorageUnavailable,
)
from storage.keys import mask_key
from storage.local import LocalFolder
from storage.r2 import R2Bucket

__all__ = [
    "ImageUrlForbidden",
    "ImageUrlInvalid",
    "LocalFolder",
    "ObjectNotFound",
    "ObjectStore",
    "ObjectTooLarge",
    "R2Bucket",
    "StorageError",
    "StorageUnavailable",
    "mask_key",
]
