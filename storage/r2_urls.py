"""The URLs of one R2 bucket: the key that an image_url names, and the URL of a mask. No I/O.

A URL is compared as text with the configured origins, and never fetched. The text that is checked is the
text that is used: no parser comes between them.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

from storage.errors import ImageUrlForbidden
from storage.keys import percent_decoded

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_DEFAULT_PORTS: Final = {"https": ":443", "http": ":80"}
# Parameters of a presigned URL: the signature's, and the operation's name that the JavaScript SDK adds.
_SIGNATURE_NAME = re.compile(r"x-amz-[a-z0-9-]+|x-id", re.IGNORECASE)
_R2_DOMAIN: Final = ".r2.cloudflarestorage.com"


@dataclass(frozen=True, slots=True)
class _Base:
    """The part of a URL before the key: an origin, and a path without a trailing slash."""

    origin: str
    path: str
    may_be_signed: bool = False

    @property
    def text(self) -> str:
        return self.origin + self.path


class R2Urls:
    """The URLs of `bucket`.

    `endpoint` is the S3 API's URL. `public_base_url` and each of `image_url_bases` name the bucket: the rest
    of the path is the key. All must be https, except on this host. Raises ValueError with a sentence that
    begins with the variable's name.
    """

    def __init__(
        self, *, endpoint: str, bucket: str, public_base_url: str | None, image_url_bases: tuple[str, ...]
    ) -> None:
        if not _BUCKET.fullmatch(bucket):
            raise ValueError("R2_BUCKET must be 3 to 63 lower-case letters, digits, '-' or '.'")
        api = _base(endpoint, "R2_ENDPOINT")
        if api.path and api.origin.endswith(_R2_DOMAIN):
            raise ValueError("R2_ENDPOINT must end after the host: the bucket's name belongs in R2_BUCKET")
        public = [] if public_base_url is None else [_base(public_base_url, "R2_PUBLIC_BASE_URL")]
        in_api = _Base(api.origin, f"{api.path}/{bucket}", may_be_signed=True)
        bases = [
            *public,
            *(_base(text, "R2_IMAGE_URL_BASES") for text in image_url_bases),
            in_api,
            *_virtual_host(api, bucket),
            _Base(f"r2://{bucket}", ""),
            _Base(f"s3://{bucket}", ""),
        ]
        # Of two matching bases the longer one applies.
        self._bases = sorted(bases, key=lambda base: len(base.path), reverse=True)
        self._mask_base = public[0] if public else in_api
        self.masks_are_public = bool(public)
        """False when mask URLs are the S3 API's, which browsers cannot read."""
        self.api_origin = api.origin
        """Scheme, host and port of the S3 API, for the log."""

    def key_in_url(self, image_url: str) -> str:
        """The key that a URL names, not yet checked by the rules of keys.

        Raises ImageUrlForbidden for a URL outside this bucket, and ValueError for a malformed one.
        """
        scheme, _, rest = image_url.partition("://")
        # A '?' or '#' before the slash stays in the authority, which then matches no origin.
        authority, slash, target = rest.partition("/")
        if "@" in authority:
            raise ValueError("holds user information")
        if "#" in target:
            raise ValueError("has a fragment")
        path, question_mark, query = target.partition("?")
        path = slash + path
        base = self._base_of(_origin(scheme.lower(), authority), path)
        if question_mark and not (base.may_be_signed and _is_signature(query)):
            raise ValueError("has a query that is no signature")
        return percent_decoded(path.removeprefix(base.path + "/"))

    def mask_url(self, key: str) -> str:
        """The URL of the object at `key`."""
        return f"{self._mask_base.text}/{quote(key)}"

    def _base_of(self, origin: str, path: str) -> _Base:
        for base in self._bases:
            if base.origin == origin and path.startswith(base.path + "/"):
                return base
        raise ImageUrlForbidden("image_url is not in this server's bucket")


def _base(text: str, variable: str) -> _Base:
    """Parse a base from the operator's settings. Raises ValueError."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError(f"{variable} is not a URL") from None
    if not host or re.search(r"[^!-~]|[?#@\\]", text):
        raise ValueError(f"{variable} must be a plain URL: no user, query, fragment or space")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise ValueError(f"{variable} must start with https:// (http:// only for a server on this machine)")
    name = f"[{host}]" if ":" in host else host
    authority = name if port is None else f"{name}:{port}"
    return _Base(_origin(parts.scheme, authority), parts.path.rstrip("/"))


def _virtual_host(api: _Base, bucket: str) -> list[_Base]:
    """The base with the bucket in its host name; none for an endpoint with a path or over http."""
    scheme, _, authority = api.origin.partition("://")
    if api.path or scheme != "https":
        return []
    return [_Base(f"{scheme}://{bucket}.{authority}", "", may_be_signed=True)]


def _origin(scheme: str, authority: str) -> str:
    """The normalised origin. Host names are case-insensitive; the bucket in s3://bucket is not."""
    if scheme not in _DEFAULT_PORTS:
        return f"{scheme}://{authority}"
    # Only ASCII is lowered: the Kelvin sign would become a k.
    folded = authority.lower() if authority.isascii() else authority
    return f"{scheme}://{folded.removesuffix(_DEFAULT_PORTS[scheme])}"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_signature(query: str) -> bool:
    return all(_SIGNATURE_NAME.fullmatch(part.partition("=")[0]) for part in query.split("&"))
