"""Fetches the image of a task from Label Studio."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin, urlsplit

import httpx

from adapters.label_studio.errors import ImageUnavailable

if TYPE_CHECKING:
    from collections.abc import Collection

CLOUD_SCHEMES = {"s3", "gs", "azure-blob"}
"""Label Studio signs addresses of these."""

MAX_REDIRECTS = 3


class ImageSource:
    """Label Studio's files.

    Its key is sent to Label Studio's own address alone. Images elsewhere are fetched only from the hosts that
    were named: who may write tasks must not make this machine call any address.

    Args:
        url: of Label Studio, without a path below it.
        key: an access token: a personal one (a JWT) or a legacy one.
        max_bytes: of a file.
        other_hosts: from which images are fetched too, without the key: `host` or `host:port`.
        timeout_s: of each step of a request.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        max_bytes: int,
        other_hosts: Collection[str] = (),
        timeout_s: float = 20.0,
    ) -> None:
        self._url = url.rstrip("/") + "/"
        self._key = key
        self._max_bytes = max_bytes
        self._other_hosts = {host.lower() for host in other_hosts}
        self._client = httpx.Client(timeout=timeout_s)

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def fetch(self, address: str, task_id: object) -> bytes:
        """The file at the address that a task's data names.

        Args:
            address: a path of Label Studio, a URL, or an address in cloud storage (`s3://...`).
            task_id: of the task, for which Label Studio signs addresses in cloud storage.

        Raises:
            ImageUnavailable: with what to do.
        """
        url = self._resolve(address, task_id)
        try:
            return self._follow(url)
        except httpx.HTTPError as error:
            host = urlsplit(url).netloc
            raise ImageUnavailable(
                f"The image of task {task_id} could not be fetched from {host} ({type(error).__name__}); "
                "check LABEL_STUDIO_URL, and that this machine can reach it."
            ) from error

    def _resolve(self, address: str, task_id: object) -> str:
        scheme = urlsplit(address).scheme.lower()
        if scheme in CLOUD_SCHEMES:
            encoded = quote(base64.b64encode(address.encode()).decode())
            return urljoin(self._url, f"tasks/{task_id}/presign/?fileuri={encoded}")
        url = urljoin(self._url, address)
        if urlsplit(url).scheme not in {"http", "https"}:
            raise ImageUnavailable(
                f"The image of task {task_id} has the address {scheme}:...; use http or https."
            )
        host = urlsplit(url).netloc.lower()
        if not self._is_label_studio(url) and host not in self._other_hosts:
            raise ImageUnavailable(
                f"The image of task {task_id} is on {host}, which is not Label Studio; "
                f"start this backend with --image-host {host} to allow it."
            )
        return url

    def _is_label_studio(self, url: str) -> bool:
        asked, own = urlsplit(url), urlsplit(self._url)
        return (asked.scheme, asked.netloc.lower()) == (own.scheme, own.netloc.lower())

    def _follow(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            headers = self._authorization() if self._is_label_studio(url) else {}
            with self._client.stream("GET", url, headers=headers) as response:
                if not response.has_redirect_location:
                    return self._read(response)
                url = urljoin(url, response.headers["location"])
        raise ImageUnavailable(
            "The address of the image leads from one redirect to another; check it in a browser."
        )

    def _read(self, response: httpx.Response) -> bytes:
        status = response.status_code
        if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise ImageUnavailable(
                f"{response.url.host} refused the image ({status}); "
                "check LABEL_STUDIO_API_KEY, and that its user may see the project."
            )
        if status != httpx.codes.OK:
            raise ImageUnavailable(
                f"{response.url.host} answered {status} for the image; check the task's data."
            )
        content = bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if len(content) > self._max_bytes:
                raise ImageUnavailable(
                    f"The image has more than {self._max_bytes / 1e6:.0f} MB; upload a smaller file."
                )
        return bytes(content)

    def _authorization(self) -> dict[str, str]:
        if self._key.count(".") != 2:
            return {"Authorization": f"Token {self._key}"}
        return {"Authorization": f"Bearer {self._short_lived_token()}"}

    def _short_lived_token(self) -> str:
        """A personal token is exchanged for one that lasts minutes, so each image asks for its own."""
        answer = self._client.post(urljoin(self._url, "api/token/refresh/"), json={"refresh": self._key})
        if answer.status_code != httpx.codes.OK:
            raise ImageUnavailable(
                f"Label Studio refused LABEL_STUDIO_API_KEY ({answer.status_code}); create a new token."
            )
        return str(answer.json()["access"])
