"""Points boto3 of this process to one of the tests' S3 servers, as a user's environment does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bulk.objects import s3

if TYPE_CHECKING:
    import pytest

    from tests.services.objects import S3Service

_OF_THE_MACHINE = (
    *("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"),
    *(
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
)


def use_service(
    monkeypatch: pytest.MonkeyPatch, service: S3Service, *, endpoint: str | None = None, **changes: str
) -> None:
    """Set the environment for a server.

    Args:
        monkeypatch: restores the environment.
        service: the server.
        endpoint: of a proxy before it.
        changes: variables with other values; "" removes one.
    """
    no_environment(monkeypatch)
    values = {
        "AWS_ACCESS_KEY_ID": service.access_key_id,
        "AWS_SECRET_ACCESS_KEY": service.secret_access_key,
        "AWS_ENDPOINT_URL_S3": endpoint or service.endpoint,
    }
    for name, value in (values | changes).items():
        if value:
            monkeypatch.setenv(name, value)


def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what boto3 would find on this machine, and its clients."""
    for name in _OF_THE_MACHINE:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3._CLIENTS.forget()
