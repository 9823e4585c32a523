"""Brings SAM 3's gated weights from the Hugging Face hub to the path where they are looked for.

`hf_hub_download` and hf-xet throw a broken download away, so only the hub's look-up and its plain HTTP
transfer are used: what was fetched stays beside the target, and any later start goes on there by Range.
Knows nothing of torch.
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

    from sam3_runner.checkpoint import HubSource

    OnProgress = Callable[[int, int], None]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

LOCK_NAME = ".download.lock"
FOLDER_FILES = ("config.json", "tokenizer.json", "model.safetensors")
"""The weights last: without them a folder does not look complete."""

TRIES = 5
FIRST_WAIT_S = 0.5
LOG_EVERY_S = 30.0
TOO_BUSY = (408, 429)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKSUM = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
"""The hub's ETags: the sha256 of a large file, git's own hash of a small one."""


@dataclass(frozen=True, slots=True)
class _Remote:
    """One file on the hub, at one commit, and where it goes."""

    name: str
    url: str
    commit: str
    size_bytes: int
    checksum: str
    path: Path

    @property
    def part(self) -> Path:
        """What was fetched so far; another content never goes on in it."""
        return self.path.with_name(f".{self.path.name}.{self.checksum[:16]}.part")

    @property
    def missing_bytes(self) -> int:
        """What is not in `part` yet."""
        return self.size_bytes - (self.part.stat().st_size if self.part.exists() else 0)


def files_for(target: Path) -> dict[str, Path]:
    """Names on the hub and the paths where they go, the weights last.

    Args:
        target: `.pt` and `.safetensors` are files, a path without a suffix is a transformers folder.

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
    """Fetch what `target` still lacks. Files that are there are kept, and nothing is asked for them.

    Each file appears at its path whole and with its checksum verified, or not at all. Processes that
    start at once wait for the first of them.

    Args:
        target: as `files_for` takes it.
        source: the repository; its files are all taken from one commit.
        on_progress: told bytes that are there and bytes in all, of the files that were missing.

    Raises:
        HubUnavailable: the hub or its store is away after five tries; what was fetched is kept.
        WeightsError: the sentence that says what to do; what was fetched is kept.
    """
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs URLs, and the store's are signed
    files = files_for(target)
    folder = next(iter(files.values())).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder / LOCK_NAME):
            missing = {name: path for name, path in files.items() if not path.is_file()}
            remotes = _look_up(missing, source)
            _check_room(folder, remotes)
            _fetch_all(remotes, source, on_progress or (lambda _done, _total: None))
    except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError, OSError) as error:
        kind = HubUnavailable if _may_pass(error) else WeightsError
        raise kind(_sentence(error, target, source)) from error


def _look_up(files: Mapping[str, Path], source: HubSource) -> list[_Remote]:
    """What the hub says of `files`; it sends none of them to who may not read them."""
    remotes: list[_Remote] = []
    for name, path in files.items():
        revision = remotes[0].commit if remotes else source.revision
        url = hf_hub_url(source.repo, name, revision=revision)
        told = _tried(partial(get_hf_file_metadata, url, token=source.token or False))
        checksum = told.etag or ""
        if told.commit_hash is None or told.size is None or not CHECKSUM.fullmatch(checksum):
            raise WeightsError(
                f"{constants.ENDPOINT} does not tell commit, size and checksum of {name} as a Hugging Face "
                "hub does: set HF_ENDPOINT to one that does, or unset it"
            )
        pinned = hf_hub_url(source.repo, name, revision=told.commit_hash)
        remotes.append(_Remote(name, pinned, told.commit_hash, told.size, checksum, path))
    return remotes


def _check_room(folder: Path, remotes: list[_Remote]) -> None:
    missing_bytes = sum(remote.missing_bytes for remote in remotes)
    if missing_bytes > shutil.disk_usage(folder).free:
        raise WeightsError(_no_room(folder, missing_bytes))


def _fetch_all(remotes: list[_Remote], source: HubSource, on_progress: OnProgress) -> None:
    headers = build_hf_headers(token=source.token or False)
    total_bytes = sum(remote.size_bytes for remote in remotes)
    done_bytes = 0
    for remote in remotes:

        def report(bytes_of_file: int, before: int = done_bytes) -> None:
            on_progress(before + bytes_of_file, total_bytes)

        _fetch(remote, headers, report)
        done_bytes += remote.size_bytes
        logger.info(
            "%s of %s, commit %s, lies at %s: %s, checksum %s verified",
            remote.name,
            source.repo,
            remote.commit,
            remote.path,
            _size(remote.size_bytes),
            remote.checksum,
        )


def _fetch(remote: _Remote, headers: dict[str, str], report: Callable[[int], None]) -> None:
    for other in remote.path.parent.glob(f".{remote.path.name}.*.part"):
        if other != remote.part:
            other.unlink()
    try:
        _tried(partial(_transfer, remote, headers, report))
    except OSError as error:
        if error.errno in NO_ROOM:
            why = _no_room(remote.part.parent, remote.missing_bytes)
            raise WeightsError(f"{why} ({error.strerror})") from error
        raise
    if _checksum(remote.part, remote.checksum) != remote.checksum:
        remote.part.unlink()
        raise WeightsError(
            f"{remote.name} came damaged: its checksum is not {remote.checksum}, which {constants.ENDPOINT} "
            "tells; it was deleted, so start again, and if that does not help look at the proxy or mirror"
        )
    remote.part.replace(remote.path)


def _transfer(remote: _Remote, headers: dict[str, str], report: Callable[[int], None]) -> None:
    with remote.part.open("ab") as part:
        if part.tell() > remote.size_bytes:  # more came than was told: nothing to go on from
            part.seek(0)
            part.truncate()
        http_get(
            remote.url,
            part,
            resume_size=part.tell(),
            # Compressed, it could not be resumed.
            headers=headers | {"Accept-Encoding": "identity"},
            expected_size=remote.size_bytes,
            displayed_filename=remote.name,
            tqdm_class=cast("type[tqdm[Any]]", partial(_Progress, report=report)),
        )
        part.flush()
        os.fsync(part.fileno())


def _tried(once: Callable[[], _T]) -> _T:
    """`http_get` tries again by itself, but not after a reset connection or an error of the server."""
    for attempt in stamina.retry_context(
        on=_may_pass, attempts=TRIES, timeout=None, wait_initial=FIRST_WAIT_S
    ):
        with attempt:
            return once()
    raise AssertionError("stamina tries at least once")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TOO_BUSY or error.response.status_code >= 500
    return isinstance(error, httpx2.NetworkError | httpx2.TimeoutException | httpx2.RemoteProtocolError)


class _Progress(tqdm):  # type: ignore[type-arg]
    """What `http_get` counts with: a bar on a terminal, lines in a log elsewhere."""

    def __init__(self, *, report: Callable[[int], None], **options: Any) -> None:
        super().__init__(**options, disable=None)  # None: where stderr is no terminal
        self._report = report
        self._name = options["desc"]
        self._begun_bytes = options["initial"]
        self._begun_s = self._said_s = time.monotonic()
        self._said_tenths = self._tenths

    def update(self, n: float | None = 1) -> bool | None:
        """Count `n` bytes more."""
        shown = super().update(n)
        if self.disable:
            self.n += n or 0
            self._say()
        self._report(int(self.n))
        return shown

    @property
    def _tenths(self) -> int:
        return int(self.n * 10 // (self.total or 1))

    def _say(self) -> None:
        now_s = time.monotonic()
        if self._tenths == self._said_tenths and now_s - self._said_s < LOG_EVERY_S:
            return
        self._said_tenths, self._said_s = self._tenths, now_s
        bytes_per_s = (self.n - self._begun_bytes) / max(now_s - self._begun_s, 1e-3)
        logger.info(
            "downloading %s: %d %% of %s, %s/s, %s left",
            self._name,
            self.n * 100 // (self.total or 1),
            _size(self.total or 0),
            _size(bytes_per_s),
            tqdm.format_interval(((self.total or 0) - self.n) / max(bytes_per_s, 1)),
        )


def _checksum(path: Path, like: str) -> str:
    """Of the kind that `like` is: sha256, or git's hash of a small file."""
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return git_hash(file.read())


def _sentence(error: Exception, target: Path, source: HubSource) -> str:
    by_hand = f"copy the files to {target} by hand"
    match error:
        case OfflineModeIsEnabled():
            return f"{target} is missing and HF_HUB_OFFLINE forbids to download it: unset it, or {by_hand}"
        case HFValidationError():
            return f"SAM3_HF_REPO={source.repo} is no repository's name, which is owner/name"
        case HfHubHTTPError():
            return _refusal(error, source)
        case httpx2.HTTPError() | httpx2.InvalidURL():
            return (
                f"the hub at {constants.ENDPOINT} or its store does not answer ({_reason(error)}): check "
                f"network, DNS, proxy and HF_ENDPOINT (what was fetched is kept), or {by_hand}"
            )
        case OSError(errno=int()):
            return f"{target} cannot be written ({_reason(error)}): set SAM3_WEIGHTS_PATH to where it can"
        case _:
            return f"{source.repo} sent another number of bytes than it told: start again, or {by_hand}"


def _refusal(error: HfHubHTTPError, source: HubSource) -> str:
    status, url = error.response.status_code, error.response.url
    page = f"{constants.ENDPOINT}/{source.repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"{page} has no revision {source.revision}: set SAM3_HF_REVISION to a commit, tag or branch"
    if isinstance(error, RemoteEntryNotFoundError):
        name = url.path.rpartition("/")[2]
        return f"{page} has no {name} at revision {source.revision}: check SAM3_HF_REPO"
    if status in (401, 403, 404) and str(url).startswith(f"{constants.ENDPOINT}/"):
        return _denial(error, page, has_token=source.token is not None)
    return f"{url.host} answers {status} to the download from {page}: later it may not"


def _denial(error: HfHubHTTPError, page: str, *, has_token: bool) -> str:
    if error.response.status_code == 401:
        fault = "does not accept HF_TOKEN, which is wrong or expired" if has_token else "needs HF_TOKEN"
        return f"{page} {fault}: make one at {constants.ENDPOINT}/settings/tokens"
    if isinstance(error, GatedRepoError):
        return (
            f"access to {page} is gated, and not given to HF_TOKEN's account: ask for it there (it is "
            "granted by hand), and let a fine-grained token read public gated repositories"
        )
    return f"there is no {page}, or HF_TOKEN may not read it: check SAM3_HF_REPO and the token's rights"


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def _no_room(folder: Path, missing_bytes: int) -> str:
    return (
        f"{folder} has no room for the weights: {_size(missing_bytes)} more are needed and "
        f"{_size(shutil.disk_usage(folder).free)} are free; make room or set SAM3_WEIGHTS_PATH elsewhere"
    )


def _size(number_of_bytes: float) -> str:
    return f"{tqdm.format_sizeof(number_of_bytes)}B"
