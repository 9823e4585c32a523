"""Downloads SAM 3's gated weights from the Hugging Face hub to the path where the server reads them.

`hf_hub_download` and hf-xet delete the part of a file that arrived before an error. So only the hub's
look-up and its plain HTTP transfer are used: the part stays beside the target, and the next attempt resumes
it with a Range request. Does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import httpx2
import stamina
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined] # no __all__
from huggingface_hub.utils.sha import git_hash
from tqdm import tqdm

from sam3_runner.errors import HubUnavailable, WeightsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from sam3_runner.weights.checkpoint import HubSource

    OnProgress = Callable[[int, int], None]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

LOCK_NAME = ".download.lock"
FOLDER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
"""The weights last: a folder without them counts as missing."""

MAX_ATTEMPTS = 5
FIRST_RETRY_WAIT_S = 0.5
LOG_INTERVAL_S = 30.0
RETRYABLE_STATUSES = (408, 429)
"""Beside those from 500 on."""
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKSUM_PATTERN = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
"""The hub's ETags: the sha256 of a large file, git's own hash of a small one."""


@dataclass(frozen=True, slots=True)
class _RemoteFile:
    """One file on the hub, at one commit, and its target path."""

    name: str
    url: str
    commit: str
    size_bytes: int
    checksum: str
    path: Path

    @property
    def partial_path(self) -> Path:
        """The bytes that have arrived; the name holds the checksum, so no other content is resumed."""
        return self.path.with_name(f".{self.path.name}.{self.checksum[:16]}.part")

    @property
    def missing_bytes(self) -> int:
        """Bytes that have not arrived yet."""
        return self.size_bytes - (self.partial_path.stat().st_size if self.partial_path.exists() else 0)


def files_for(target: Path) -> dict[str, Path]:
    """Names on the hub and their target paths, the weights last.

    Args:
        target: a `.pt` or `.safetensors` file; without a suffix, a transformers folder.

    Raises:
        WeightsError: it has another suffix.
    """
    match target.suffix:
        case ".pt":
            return {"sam3.pt": target}
        case ".safetensors":
            return {"model.safetensors": target}
        case "":
            return {name: target / name for name in FOLDER_FILES}
        case other:
            raise WeightsError(
                f"{target} cannot be downloaded: SAM3_WEIGHTS_PATH ends in .pt, in .safetensors, or has no "
                f"suffix and is a folder; it ends in {other}"
            )


def download(target: Path, source: HubSource, on_progress: OnProgress | None = None) -> None:
    """Download the files of `target` that are missing. Without a missing file, no request is sent.

    A file appears at its path only when it is complete and its checksum is verified. Processes that start
    together wait for the first of them.

    Args:
        target: as for `files_for`.
        source: the repository; all files are taken from one commit.
        on_progress: called with the bytes that have arrived and the total bytes, of the missing files.

    Raises:
        HubUnavailable: the hub or its store is unavailable after five attempts; what arrived is kept.
        WeightsError: any other failure; the message says what to do, and what arrived is kept.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs URLs, and those of the store are signed
    files = files_for(target)
    folder = next(iter(files.values())).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / LOCK_NAME):
            missing = {name: path for name, path in files.items() if not path.is_file()}
            remotes = _look_up(missing, source)
            _check_disk_space(folder, remotes)
            _fetch_all(remotes, source, on_progress or (lambda _done, _total: None))
    except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError, OSError) as error:
        kind = HubUnavailable if _is_transient(error) else WeightsError
        raise kind(_message(error, target, source)) from error


def _look_up(files: Mapping[str, Path], source: HubSource) -> list[_RemoteFile]:
    """The hub's metadata of `files`; the hub refuses it to accounts without access."""
    remotes: list[_RemoteFile] = []
    for name, path in files.items():
        revision = remotes[0].commit if remotes else source.revision
        url = hf_hub_url(source.repo, name, revision=revision)
        metadata = _call_with_retries(partial(get_hf_file_metadata, url, token=source.token or False))
        commit, size_bytes, checksum = metadata.commit_hash, metadata.size, metadata.etag or ""
        if commit is None or size_bytes is None or not CHECKSUM_PATTERN.fullmatch(checksum):
            raise WeightsError(
                f"{constants.ENDPOINT} does not send commit, size and checksum of {name} as a Hugging Face "
                "hub does: set HF_ENDPOINT to one that does, or unset it"
            )
        pinned_url = hf_hub_url(source.repo, name, revision=commit)
        remotes.append(_RemoteFile(name, pinned_url, commit, size_bytes, checksum, path))
    return remotes


def _check_disk_space(folder: Path, remotes: list[_RemoteFile]) -> None:
    missing_bytes = sum(remote.missing_bytes for remote in remotes)
    if missing_bytes > shutil.disk_usage(folder).free:
        raise WeightsError(_disk_full_message(folder, missing_bytes))


def _fetch_all(remotes: list[_RemoteFile], source: HubSource, on_progress: OnProgress) -> None:
    headers = build_hf_headers(token=source.token or False)
    total_bytes = sum(remote.size_bytes for remote in remotes)
    done_bytes = 0
    for remote in remotes:

        def report(bytes_of_file: int, before: int = done_bytes) -> None:
            on_progress(before + bytes_of_file, total_bytes)

        _fetch(remote, headers, report)
        done_bytes += remote.size_bytes
        logger.info(
            "%s of %s, commit %s, is at %s: %s, checksum %s verified",
            remote.name,
            source.repo,
            remote.commit,
            remote.path,
            _format_size(remote.size_bytes),
            remote.checksum,
        )


def _fetch(remote: _RemoteFile, headers: dict[str, str], report: Callable[[int], None]) -> None:
    for other in remote.path.parent.glob(f".{remote.path.name}.*.part"):
        if other != remote.partial_path:
            other.unlink()
    try:
        _call_with_retries(partial(_transfer, remote, headers, report))
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            message = _disk_full_message(remote.path.parent, remote.missing_bytes)
            raise WeightsError(f"{message} ({error.strerror})") from error
        raise
    if _checksum(remote.partial_path, remote.checksum) != remote.checksum:
        remote.partial_path.unlink()
        raise WeightsError(
            f"{remote.name} arrived damaged: its checksum is not {remote.checksum}, as {constants.ENDPOINT} "
            "says; it was deleted, so start again, and if that does not help check the proxy or mirror"
        )
    remote.partial_path.replace(remote.path)


def _transfer(remote: _RemoteFile, headers: dict[str, str], report: Callable[[int], None]) -> None:
    with remote.partial_path.open("ab") as file:
        if file.tell() > remote.size_bytes:  # more bytes than the file has: it cannot be resumed
            file.seek(0)
            file.truncate()
        http_get(
            remote.url,
            file,
            resume_size=file.tell(),
            # A compressed transfer could not be resumed.
            headers=headers | {"Accept-Encoding": "identity"},
            expected_size=remote.size_bytes,
            displayed_filename=remote.name,
            tqdm_class=cast("type[tqdm[Any]]", partial(_Progress, report=report)),
        )
        file.flush()
        os.fsync(file.fileno())


def _call_with_retries(function: Callable[[], _T]) -> _T:
    """Call `function` up to five times. `http_get` itself retries neither a reset connection nor a 5xx."""
    for attempt in stamina.retry_context(
        on=_is_transient, attempts=MAX_ATTEMPTS, timeout=None, wait_initial=FIRST_RETRY_WAIT_S
    ):
        with attempt:
            return function()
    raise AssertionError("stamina makes at least one attempt")


def _is_transient(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in RETRYABLE_STATUSES or error.response.status_code >= 500
    return isinstance(error, httpx2.NetworkError | httpx2.TimeoutException | httpx2.RemoteProtocolError)


class _Progress(tqdm):  # type: ignore[type-arg]
    """The progress of `http_get`: a bar on a terminal, log lines elsewhere."""

    def __init__(self, *, report: Callable[[int], None], **options: Any) -> None:
        super().__init__(**options, disable=None)  # None: disabled where stderr is no terminal
        self._report = report
        self._name = options["desc"]
        self._initial_bytes = options["initial"]
        self._start_s = self._logged_s = time.monotonic()
        self._logged_tenths = self._tenths

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` bytes more."""
        displayed = super().update(n)
        if self.disable:
            self.n += n or 0
            self._log()
        self._report(int(self.n))
        return displayed

    @property
    def _tenths(self) -> int:
        return int(self.n * 10 // (self.total or 1))

    def _log(self) -> None:
        now_s = time.monotonic()
        if self._tenths == self._logged_tenths and now_s - self._logged_s < LOG_INTERVAL_S:
            return
        self._logged_tenths, self._logged_s = self._tenths, now_s
        bytes_per_s = (self.n - self._initial_bytes) / max(now_s - self._start_s, 1e-3)
        logger.info(
            "downloading %s: %d %% of %s, %s/s, %s left",
            self._name,
            self.n * 100 // (self.total or 1),
            _format_size(self.total or 0),
            _format_size(bytes_per_s),
            tqdm.format_interval(((self.total or 0) - self.n) / max(bytes_per_s, 1)),
        )


def _checksum(path: Path, expected: str) -> str:
    """The checksum of a file, of the same kind as `expected`: sha256, or git's hash of a small file."""
    with path.open("rb") as file:
        if len(expected) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return git_hash(file.read())


def _message(error: Exception, target: Path, source: HubSource) -> str:
    by_hand = f"copy the files to {target} by hand"
    match error:
        case OfflineModeIsEnabled():
            return f"{target} is missing and HF_HUB_OFFLINE forbids to download it: unset it, or {by_hand}"
        case HFValidationError():
            return f"SAM3_HF_REPO={source.repo} is not the name of a repository, which is owner/name"
        case HfHubHTTPError():
            return _http_error_message(error, source)
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return (
                f"the hub at {constants.ENDPOINT} or its store does not answer ({_reason(error)}): check "
                f"network, DNS, proxy and HF_ENDPOINT (what arrived is kept), or {by_hand}"
            )
        case OSError(errno=int()):
            return f"{target} cannot be written ({_reason(error)}): set SAM3_WEIGHTS_PATH to a writable path"
        case _:
            return f"{source.repo} sent another number of bytes than it announced: start again, or {by_hand}"


def _http_error_message(error: HfHubHTTPError, source: HubSource) -> str:
    status, url = error.response.status_code, error.response.url
    page = f"{constants.ENDPOINT}/{source.repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no revision {source.revision}: set SAM3_HF_REVISION to a commit, tag or branch"
    if isinstance(error, RemoteEntryNotFoundError):
        name = url.path.rpartition("/")[2]
        return f"{page} has no {name} at revision {source.revision}: check SAM3_HF_REPO"
    if status in (401, 403, 404) and str(url).startswith(f"{constants.ENDPOINT}/"):
        return _access_error_message(error, page, has_token=source.token is not None)
    return f"{url.host} answers {status} to the download from {page}: try again later"


def _access_error_message(error: HfHubHTTPError, page: str, *, has_token: bool) -> str:
    if error.response.status_code == 401:
        fault = "does not accept HF_TOKEN, which is wrong or expired" if has_token else "needs HF_TOKEN"
        return f"{page} {fault}: make one at {constants.ENDPOINT}/settings/tokens"
    if isinstance(error, GatedRepoError):
        return (
            f"access to {page} is gated, and not granted to HF_TOKEN's account: ask for it there (it is "
            "granted by hand), and let a fine-grained token read public gated repositories"
        )
    return f"there is no {page}, or HF_TOKEN may not read it: check SAM3_HF_REPO and the token's rights"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _disk_full_message(folder: Path, missing_bytes: int) -> str:
    return (
        f"{folder} has no room for the weights: {_format_size(missing_bytes)} more are needed and "
        f"{_format_size(shutil.disk_usage(folder).free)} are free; free some or set another SAM3_WEIGHTS_PATH"
    )


def _format_size(size_bytes: float) -> str:
    return f"{tqdm.format_sizeof(size_bytes)}B"
