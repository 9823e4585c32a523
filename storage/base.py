"""What the service asks of the place where images and masks are kept."""

from typing import Protocol


class ObjectStore(Protocol):
    """Images in, masks out. One store serves all requests of a process at once."""

    def key_of(self, image_url: str, user_id: str) -> str:
        """The key that `image_url` names. Only parses: it fetches nothing and touches no file.

        Raises ImageUrlInvalid, or ImageUrlForbidden for an address outside the store or the user's uploads.
        """
        ...

    async def download_image(self, image_url: str, user_id: str, max_bytes: int) -> bytes:
        """The image's bytes, as stored.

        Raises what `key_of` raises, ObjectNotFound, ObjectTooLarge (found without reading what is
        beyond `max_bytes`) and StorageUnavailable.
        """
        ...

    async def upload_mask(self, mask: bytes, key: str) -> str:
        """Keep the PNG `mask` at `key` (see `mask_key`); its URL, once the bytes are durable.

        Writing the same bytes to the same key again is harmless. Raises StorageUnavailable, and
        ValueError for a key that breaks the key rules.
        """
        ...

    async def delete_mask(self, key: str) -> None:
        """Delete the mask at `key`; one that is not there is no error. Raises StorageUnavailable."""
        ...

    def holds_mask(self, mask_url: str, user_id: str, task_id: str) -> bool:
        """Whether `mask_url` is the URL of a mask of this task in this store. Only parses."""
        ...

    async def check(self) -> list[str]:
        """Prove at the start that the store can be used; what an operator should know, a sentence each.

        A store that is only away for the moment is such a sentence. Raises StorageMisconfigured, which
        says what to mend, when it refuses us: wrong secrets, no such place, rights that are missing.
        """
        ...

    async def close(self) -> None:
        """Finish what was begun and let go of the store; nothing else may be called after."""
        ...

    def describe(self) -> str:
        """One line for the start-up log, without secrets."""
        ...
