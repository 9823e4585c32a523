"""Supabase's REST API as a result store needs it: which key goes where, retries, errors, its clock."""

import asyncio
import base64
import json
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final, Protocol

import httpx
import stamina
from postgrest import APIResponse, AsyncRequestBuilder
from supabase import AsyncClient, AsyncClientOptions, AsyncSupabaseException

from results.errors import ResultsMisconfigured, ResultsUnavailable

TABLE: Final = "segmentation_results"

_TRIES: Final = 3
_CONNECT_TIMEOUT_S: Final = 3.0
_KEEPALIVE_S: Final = 30.0
# A Date is cut to the second, and servers make a new one only once a second.
_DATE_LAG: Final = timedelta(seconds=2)
# To these roles row level security shows no task, so that every task would look missing.
_BLIND_ROLES: Final = frozenset({None, "", "anon", "authenticated"})


class ColumnMissing(ResultsMisconfigured):
    """The table lacks a column that the request names."""

    def __init__(self, message: str) -> None:
        super().__init__(f"table {TABLE} lacks a column that was there, or the API has not seen it yet")
        self._message = message

    def names(self, column: str) -> bool:
        """Whether `column` is the one."""
        return re.search(rf"\b{re.escape(column)}\b", self._message) is not None


class NotUuid(ResultsMisconfigured):
    """PostgreSQL takes an id of the request for no UUID."""


class _Away(ResultsUnavailable):
    """The database failed in a way that may pass within a second."""


class Request(Protocol):
    """A query of supabase-py that is ready to be sent, more than once if need be."""

    async def execute(self) -> APIResponse:
        """Send it."""
        ...


class SupabaseRest:
    """The table over HTTP/1.1, for one process and one event loop; making it does no I/O.

    supabase-py's own client speaks HTTP/2, and loses updates when the server ends a connection.
    `timeout_s` bounds the wait for a connection, each write and each read; three times it, a whole `send`.
    `now` is our own clock. Raises ResultsMisconfigured for a URL or a key that cannot work.
    """

    def __init__(
        self,
        url: str,
        service_key: str,
        *,
        publishable_key: str | None,
        connections: int,
        timeout_s: float,
        now: Callable[[], datetime],
    ) -> None:
        self._credentials = credentials(service_key, publishable_key)
        self.host = _host(url)
        self._deadline_s = _TRIES * timeout_s
        self._now = now
        self._ahead = timedelta(0)
        self._slots = asyncio.Semaphore(connections)
        # At INFO it logs each URL, and ours hold the ids of users and tasks.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        self._http = httpx.AsyncClient(
            http2=False,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S)),
            limits=httpx.Limits(
                max_connections=connections,
                max_keepalive_connections=connections,
                keepalive_expiry=_KEEPALIVE_S,
            ),
            headers={"User-Agent": "sam3-backend"},
            event_hooks={"request": [self._prepare], "response": [self._hear]},
        )
        self._client = _client(url, self._credentials, self._http)

    @property
    def table(self) -> AsyncRequestBuilder:
        """Where a query on the table begins."""
        return self._client.table(TABLE)

    async def send(self, request: Request) -> APIResponse:
        """The answer, after at most three tries. Only for requests that do no harm when repeated.

        Raises ResultsUnavailable when there is none, and what `_refusal` makes of a refused request.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                async for attempt in stamina.retry_context(
                    on=_Away, attempts=_TRIES, timeout=None, wait_initial=0.1, wait_max=1, wait_jitter=0.2
                ):
                    with attempt:
                        return await self._ask(request)
        except TimeoutError:
            raise ResultsUnavailable("the results database did not answer in time") from None
        raise AssertionError("unreachable: the last attempt answers or raises")

    async def _ask(self, request: Request) -> APIResponse:
        # httpcore loses a connection for ever when a request is cancelled, or times out, that has just been
        # given one: so ours wait for a slot instead, and what was begun ends by its own timeouts.
        await self._slots.acquire()
        asking = asyncio.ensure_future(_answer(request))
        asking.add_done_callback(self._free_slot)
        return await asyncio.shield(asking)

    def _free_slot(self, asked: asyncio.Future[APIResponse]) -> None:
        self._slots.release()
        # Read here, or asyncio complains where nobody waits for it any more.
        if not asked.cancelled():
            asked.exception()

    def refuse_expired_key(self) -> None:
        """Raises ResultsMisconfigured when the key is a JWT whose time is over."""
        expires_at_s = self._credentials.expires_at_s
        if expires_at_s is not None and expires_at_s <= time.time():
            raise ResultsMisconfigured("SUPABASE_SERVICE_KEY has expired")

    def database_time(self) -> datetime:
        """The database's time as its answers tell it, to about two seconds; before the first, our own."""
        return self._now() + self._ahead

    async def close(self) -> None:
        """End all connections; closing twice is harmless."""
        await self._http.aclose()

    async def _prepare(self, request: httpx.Request) -> None:
        # supabase-py sends any key as a bearer too, but a secret key is no JWT, and is refused as one.
        if self._credentials.bearer is None:
            request.headers.pop("Authorization", None)
        request.extensions["sent_at"] = self._now()

    async def _hear(self, response: httpx.Response) -> None:
        if not response.is_success:
            # Read, so that the connection can be used again.
            await response.aread()
            raise _refusal(response)
        with suppress(ValueError, TypeError):
            told = parsedate_to_datetime(response.headers.get("Date", ""))
            # Between these two the database's clock must be ahead of ours; inside, nothing is learnt.
            least, most = told - self._now(), told + _DATE_LAG - response.request.extensions["sent_at"]
            self._ahead = min(max(self._ahead, least), most)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What goes out in `apikey` and, as a bearer, in `Authorization`; the latter may expire (Unix time)."""

    apikey: str
    bearer: str | None
    expires_at_s: float | None = None


def credentials(service_key: str, publishable_key: str | None = None) -> Credentials:
    """How to send `service_key`: sb_secret_..., or a JWT of service_role or of a role made for us.

    A role of our own goes out under the project's `publishable_key`, where there is one.
    Raises ResultsMisconfigured for a key that cannot work.
    """
    for name, key in (("SERVICE", service_key), ("PUBLISHABLE", publishable_key)):
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ResultsMisconfigured(f"SUPABASE_{name}_KEY is empty, or holds a character that no key has")
    if service_key.startswith("sb_secret_"):
        return Credentials(apikey=service_key, bearer=None)
    if service_key.startswith("sb_publishable_"):
        raise ResultsMisconfigured(
            "SUPABASE_SERVICE_KEY is a publishable key, to which every task looks missing; "
            "give a secret key (sb_secret_...)"
        )
    claims = _claims(service_key)
    role, expires_at_s = claims.get("role"), claims.get("exp")
    if role in _BLIND_ROLES:
        raise ResultsMisconfigured(
            "SUPABASE_SERVICE_KEY is a key for users, to whom every task looks missing; "
            "give a secret key (sb_secret_...) or the service_role key"
        )
    return Credentials(
        apikey=service_key if role == "service_role" else publishable_key or service_key,
        bearer=service_key,
        expires_at_s=expires_at_s if isinstance(expires_at_s, int | float) else None,
    )


def _claims(token: str) -> dict[str, object]:
    """What a JWT says. Nobody needs to trust it here: the database checks the signature."""
    parts = token.split(".")
    with suppress(ValueError):
        if len(parts) == 3:
            claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
            if isinstance(claims, dict):
                return claims
    raise ResultsMisconfigured("SUPABASE_SERVICE_KEY is neither a secret key (sb_secret_...) nor a JWT")


def _host(url: str) -> str:
    """The project's host. Raises ResultsMisconfigured for a URL that is not a project's."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host or parsed.path != "/" or parsed.query:
        raise ResultsMisconfigured(
            "SUPABASE_URL is not a project's URL, which looks like https://PROJECT.supabase.co"
        )
    return parsed.host


def _client(url: str, keys: Credentials, http: httpx.AsyncClient) -> AsyncClient:
    options = AsyncClientOptions(
        httpx_client=http,
        auto_refresh_token=False,
        persist_session=False,
        # `send` retries, writes too.
        postgrest_client_retry=False,
    )
    if keys.bearer is not None:
        options.headers["Authorization"] = f"Bearer {keys.bearer}"
    try:
        return AsyncClient(url, keys.apikey, options)
    except AsyncSupabaseException:
        raise ResultsMisconfigured("supabase-py takes SUPABASE_URL or the key for no such thing") from None


async def _answer(request: Request) -> APIResponse:
    try:
        return await request.execute()
    except httpx.HTTPError as error:
        # The kind says enough; texts of the network may name addresses.
        raise _Away(f"the results database was not reached ({type(error).__name__})") from None


def _refusal(response: httpx.Response) -> ResultsUnavailable | ResultsMisconfigured:
    """What an answer other than success means: the only place that knows PostgREST's codes.

    PostgREST's "details" may quote a whole row; neither they nor its messages go any further.
    """
    status = response.status_code
    code, message = _code_and_message(response)
    # Among the 5xx are PGRST000 to PGRST003: PostgREST has no connection to the database. While it loads a
    # changed schema PostgREST 12 may not know the table, and answers an update with 404 and {}; when it has
    # just lost the database, with 400 and an empty code.
    if status in (408, 429) or status >= 500 or response.content == b"{}" or not code:
        return _Away(f"the results database failed (HTTP {status})")
    if code in ("PGRST204", "42703"):
        return ColumnMissing(message)
    if code == "22P02":
        return NotUuid("an id is no UUID")
    if code == "42501":
        sentence = f"SUPABASE_SERVICE_KEY's role may not read and update table {TABLE}"
    elif status in (401, 403):
        sentence = f"SUPABASE_SERVICE_KEY is refused (HTTP {status})"
    elif code in ("42P01", "PGRST205"):
        sentence = f"there is no table {TABLE}: apply supabase/migrations to the project"
    else:
        known = f", code {code}" if re.fullmatch(r"[A-Z0-9]{1,10}", code) else ""
        sentence = f"SUPABASE_URL refused a request (HTTP {status}{known})"
    return ResultsMisconfigured(sentence)


def _code_and_message(response: httpx.Response) -> tuple[str, str]:
    with suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return str(body.get("code")), str(body.get("message"))
    return "none", ""
