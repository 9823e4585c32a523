"""Opens the storage and the results that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from processes import identity
from results import OUTBOX_FILE, SqliteResults, open_outbox
from settings import Settings, SettingsError
from storage import LocalFolder
from version import VERSION

if TYPE_CHECKING:
    from pathlib import Path

    from results import Outbox, ResultStore
    from storage import ObjectStore


def storage_folder(settings: Settings) -> Path:
    """The folder of images and masks, where no R2 is set."""
    return settings.data_dir / "storage"


def outbox_path(settings: Settings) -> Path:
    """The file of attempts."""
    return settings.data_dir / OUTBOX_FILE


def open_storage(settings: Settings) -> ObjectStore:
    """The object store that the settings name. Raises `SettingsError`, `StorageError`."""
    if settings.r2_endpoint is None:
        return LocalFolder(storage_folder(settings), user_prefix_required=settings.user_prefix_required)
    from storage.r2 import R2Bucket  # noqa: PLC0415 - 22 MB a process, only where R2 is used

    assert settings.r2_access_key_id is not None
    assert settings.r2_secret_access_key is not None
    try:
        return R2Bucket(
            endpoint=settings.r2_endpoint,
            bucket=settings.r2_bucket,
            access_key_id=settings.r2_access_key_id.get_secret_value(),
            secret_access_key=settings.r2_secret_access_key.get_secret_value(),
            public_base_url=settings.r2_public_base_url,
            image_url_bases=settings.r2_image_url_bases,
            user_prefix_required=settings.user_prefix_required,
        )
    except ValueError as error:
        raise SettingsError(str(error)) from None


def open_results(settings: Settings) -> ResultStore:
    """The rows that the settings name. Raises `SettingsError`, `ResultsError`."""
    if settings.supabase_url is None:
        return SqliteResults(settings.data_dir / "results.sqlite", lease_s=settings.lease_s)
    from results.supabase import SupabaseResults  # noqa: PLC0415 - 20 MB a process, only where it is used

    assert settings.supabase_service_key is not None
    publishable_key = settings.supabase_publishable_key
    return SupabaseResults(
        settings.supabase_url,
        settings.supabase_service_key.get_secret_value(),
        lease_s=settings.lease_s,
        mask_column=settings.supabase_mask_column,
        publishable_key=publishable_key.get_secret_value() if publishable_key else None,
    )


def open_tasks(settings: Settings, rows: ResultStore) -> Outbox:
    """The rows, behind the file of attempts. Raises `ResultsError`."""
    return open_outbox(
        outbox_path(settings),
        rows,
        owner=identity.current(),
        is_alive=identity.is_alive,
        server_version=VERSION,
        lease_s=settings.lease_s,
        outage_limit_s=settings.outage_limit_s,
    )
