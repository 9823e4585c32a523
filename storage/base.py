"""The interface of the stores that hold images and masks."""

from typing import Protocol


class ObjectStore(Protocol):
    """Reads images and stores masks. One store serves all concurrent requests of a process."""

    def key_of(self, image_url: str, user_id: str) -> str:
        """The key that `image_url` names. Only parses: no request, no file access.

        Raises ImageUrlInvalid, or ImageUrlForbidden for an address outside the store or the user's uploads.
        """
        ...

    async def download_image(self, image_url: str, user_id: str, max_bytes: int) -> bytes:
        """The image's bytes, as stored.

        Raises the errors of `key_of`, ObjectNotFound, ObjectTooLarge (detected without reading all that lies
        beyond `max_bytes`) and StorageUnavailable.
        """
        ...

    async def upload_mask(self, mask: bytes, key: str) -> str:
        """Store a mask, or another file of a result, at `key` (see `mask_key`); returns its URL.

        The bytes are durable then. The content type follows from the key's suffix.

        Storing the same bytes at the same key again is harmless. Raises StorageUnavailable, and
        ValueError for a key that breaks the key rules.
        """
        ...

    async def download_answer(self, answer_url: str, user_id: str, task_id: str, max_bytes: int) -> bytes:
        """The bytes of a JSON file of this task's result.

        Raises ImageUrlForbidden for a URL of anything else, and the errors of `download_image`.
        """
        ...

    async def delete_mask(self, key: str) -> None:
        """Delete the mask at `key`; one that is not there is no error. Raises StorageUnavailable."""
        ...

    def holds_mask(self, mask_url: str, user_id: str, task_id: str) -> bool:
        """Whether `mask_url` is the URL of a file of this task's result in this store. Only parses."""
        ...

    async def check(self) -> list[str]:
        """Verify at the start that the store can be used; return warnings for the operator, a sentence each.

        A store that is temporarily unavailable is a warning. Raises StorageMisconfigured, which says what
        to change, when it refuses this server: wrong secrets, no such bucket, missing rights.
        """
        ...

    async def close(self) -> None:
        """Finish running calls and close the store; no other call may follow."""
        ...

    def describe(self) -> str:
        """One line for the start-up log, without secrets."""
        ...
