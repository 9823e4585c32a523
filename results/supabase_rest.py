"""Client of Supabase's REST API: credentials, retries, errors, and the database's clock."""

import asyncio
import base64
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Protocol

import httpx
import stamina
from postgrest import APIResponse, AsyncRequestBuilder, AsyncSelectRequestBuilder, CountMethod, ReturnMethod
from supabase import AsyncClient, AsyncClientOptions, AsyncSupabaseException

from results.errors import ResultsMisconfigured, ResultsUnavailable

TABLE: Final = "segmentation_results"

_MAX_TRIES: Final = 3
_CONNECT_TIMEOUT_S: Final = 3.0
_KEEPALIVE_S: Final = 30.0
# A Date header is truncated to seconds, and servers refresh it once a second.
_DATE_LAG_S: Final = 2.0
# The two clocks drift by far less than a second in this time.
_CLOCK_MAX_AGE_S: Final = 30.0
_NOW_FUNCTION: Final = "segmentation_results_now"
# Row level security hides all tasks from these roles: every task would look missing.
_ROLES_WITHOUT_ACCESS: Final = frozenset({"", "anon", "authenticated"})


class ColumnMissing(ResultsMisconfigured):
    """The table lacks a column that the request names."""

    def __init__(self, message: str) -> None:
        super().__init__(f"table {TABLE} lacks a column that it had, or the API's copy of the schema is old")
        self._message = message

    def names(self, column: str) -> bool:
        """Whether `column` is the missing one."""
        return re.search(rf"\b{re.escape(column)}\b", self._message) is not None


class InvalidUuid(ResultsMisconfigured):
    """PostgreSQL cannot parse an id of the request as a UUID."""


class _TransientError(ResultsUnavailable):
    """A failure of the database that may be over within a second."""


class Request(Protocol):
    """A query of supabase-py that is ready to be sent; it may be sent more than once."""

    async def execute(self) -> APIResponse:
        """Send it."""
        ...


class SupabaseRest:
    """The table over HTTP/1.1, for one process and one event loop; the constructor does no I/O.

    supabase-py's own client speaks HTTP/2, and loses updates when the server ends a connection.
    `timeout_s` limits the wait for a connection, each write and each read; a whole `send` takes at most
    three times as long. Raises ResultsMisconfigured for a URL or a key that cannot work.
    """

    def __init__(
        self,
        url: str,
        service_key: str,
        *,
        publishable_key: str | None,
        connections: int,
        timeout_s: float,
    ) -> None:
        self._credentials = credentials(service_key, publishable_key)
        self.host = _host(url)
        self._deadline_s = _MAX_TRIES * timeout_s
        # The database's time minus time.monotonic(), since the host's wall clock may be set at any time.
        self._clock_offset_s: float | None = None
        self._clock_read_s = -math.inf
        self._slots = asyncio.Semaphore(connections)
        # At INFO httpx logs each URL, which holds the ids of users and tasks.
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
            event_hooks={"request": [self._prepare_request], "response": [self._check_response]},
        )
        self._client = _client(url, self._credentials, self._http)

    @property
    def table(self) -> AsyncRequestBuilder:
        """The start of a query on the table."""
        return self._client.table(TABLE)

    def update(self, content: Mapping[str, object]) -> AsyncSelectRequestBuilder:
        """The start of an update; `count` sends it."""
        # An answer without the row needs no right to read all columns; the count shows whether a row matched.
        return self.table.update(content, count=CountMethod.exact, returning=ReturnMethod.minimal)

    async def count(self, update: AsyncSelectRequestBuilder) -> int:
        """The number of rows that the update has changed. Raises the errors of `send`."""
        count = (await self.send(update)).count
        if count is None:
            raise _not_postgrest()
        return count

    async def rows(self, query: AsyncSelectRequestBuilder) -> list[dict[str, Any]]:
        """The rows that the query finds. Raises the errors of `send`."""
        data: Any = (await self.send(query)).data
        if not isinstance(data, list):
            raise _not_postgrest()
        return data

    async def now(self) -> datetime:
        """The database's time, by a function that our migration creates."""
        data: object = (await self.send(self._client.rpc(_NOW_FUNCTION, {}, get=True))).data
        try:
            return datetime.fromisoformat(str(data)).astimezone(UTC)
        except ValueError:
            raise _not_postgrest() from None

    async def estimate_now(self) -> datetime:
        """The database's time, estimated from the Date headers of its answers; up to two seconds behind.

        For a project without our function. Sends a request when the last Date is too old.
        """
        if time.monotonic() - self._clock_read_s > _CLOCK_MAX_AGE_S:
            await self.send(self.table.select("id").limit(0))
        if self._clock_offset_s is None:
            raise _not_postgrest()
        return datetime.fromtimestamp(time.monotonic() + self._clock_offset_s, UTC)

    async def send(self, request: Request) -> APIResponse:
        """The answer, after at most three tries. Only for requests that may be repeated.

        Raises ResultsUnavailable when there is none, and the error of `_to_results_error` for a refusal.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                async for attempt in stamina.retry_context(
                    on=_TransientError,
                    attempts=_MAX_TRIES,
                    timeout=None,
                    wait_initial=0.1,
                    wait_max=1,
                    wait_jitter=0.2,
                ):
                    with attempt:
                        return await self._send_once(request)
        except TimeoutError:
            raise ResultsUnavailable("the results database did not answer in time") from None
        raise AssertionError("unreachable: the last try returns or raises")

    async def _send_once(self, request: Request) -> APIResponse:
        # httpcore never reuses a connection whose request is cancelled, or times out, just when it is
        # assigned. So requests wait for a slot of ours, and one that is sent ends by its own timeouts alone.
        await self._slots.acquire()
        sending = asyncio.ensure_future(_execute(request))
        sending.add_done_callback(self._free_slot)
        return await asyncio.shield(sending)

    def _free_slot(self, sent: asyncio.Future[APIResponse]) -> None:
        self._slots.release()
        # asyncio logs an exception that is never retrieved, and the caller may have been cancelled.
        if not sent.cancelled():
            sent.exception()

    def check_key_expiry(self) -> None:
        """Raises ResultsMisconfigured when the key is a JWT that has expired."""
        expires_at_s = self._credentials.expires_at_s
        if expires_at_s is not None and expires_at_s <= time.time():
            raise ResultsMisconfigured("SUPABASE_SERVICE_KEY has expired")

    async def close(self) -> None:
        """Close all connections; closing twice is harmless."""
        await self._http.aclose()

    async def _prepare_request(self, request: httpx.Request) -> None:
        # supabase-py also sends any key as a bearer token; a secret key is no JWT, and is refused as one.
        if self._credentials.bearer is None:
            request.headers.pop("Authorization", None)
        request.extensions["sent_s"] = time.monotonic()

    async def _check_response(self, response: httpx.Response) -> None:
        if not response.is_success:
            # A connection whose body is unread cannot be reused.
            await response.aread()
            raise _to_results_error(response, self._credentials.role)
        with suppress(ValueError, TypeError):
            date_s = parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
            self._update_clock(date_s, response.request.extensions["sent_s"])

    def _update_clock(self, date_s: float, sent_s: float) -> None:
        """Clamp the offset of the database's clock to the range that an answer allows.

        Args:
            date_s: of its Date header (Unix time).
            sent_s: when its request was sent (time.monotonic).
        """
        self._clock_read_s = time.monotonic()
        least_s, most_s = date_s - self._clock_read_s, date_s + _DATE_LAG_S - sent_s
        offset_s = least_s if self._clock_offset_s is None else self._clock_offset_s
        self._clock_offset_s = min(max(offset_s, least_s), most_s)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The values of the headers `apikey` and, as a bearer token, `Authorization`.

    Attributes:
        role: of this server in the database.
        expires_at_s: of the bearer token (Unix time).
    """

    apikey: str
    bearer: str | None
    role: str
    expires_at_s: float | None = None


def credentials(service_key: str, publishable_key: str | None = None) -> Credentials:
    """The credentials for `service_key`: sb_secret_..., or a JWT of service_role or of a custom role.

    The JWT of a custom role needs the project's `publishable_key` as `apikey`, where there is one.
    Raises ResultsMisconfigured for a key that cannot work.
    """
    for name, key in (("SERVICE", service_key), ("PUBLISHABLE", publishable_key)):
        if key is not None and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ResultsMisconfigured(f"SUPABASE_{name}_KEY is empty, or holds a character that no key has")
    if service_key.startswith("sb_secret_"):
        return Credentials(apikey=service_key, bearer=None, role="service_role")
    if service_key.startswith("sb_publishable_"):
        raise ResultsMisconfigured(
            "SUPABASE_SERVICE_KEY is a publishable key, to which every task looks missing; "
            "give a secret key (sb_secret_...)"
        )
    claims = _claims(service_key)
    role, expires_at_s = claims.get("role"), claims.get("exp")
    if not isinstance(role, str) or role in _ROLES_WITHOUT_ACCESS:
        raise ResultsMisconfigured(
            "SUPABASE_SERVICE_KEY is a key for users, to whom every task looks missing; "
            "give a secret key (sb_secret_...) or the service_role key"
        )
    return Credentials(
        apikey=service_key if role == "service_role" else publishable_key or service_key,
        bearer=service_key,
        role=role,
        expires_at_s=expires_at_s if isinstance(expires_at_s, int | float) else None,
    )


def _claims(token: str) -> dict[str, object]:
    """The claims of a JWT, not verified: the database checks the signature."""
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
        raise ResultsMisconfigured("supabase-py does not accept SUPABASE_URL or the key") from None


async def _execute(request: Request) -> APIResponse:
    try:
        return await request.execute()
    except httpx.HTTPError as error:
        # The error's text may hold addresses; its type is enough.
        raise _TransientError(f"the results database was not reached ({type(error).__name__})") from None
    except httpx.InvalidURL:
        raise ResultsMisconfigured("a request to the results database does not fit into a URL") from None


def _to_results_error(response: httpx.Response, role: str) -> ResultsUnavailable | ResultsMisconfigured:
    """The error for an unsuccessful answer: the only place that knows PostgREST's codes.

    PostgREST's "details" may quote a whole row: the error holds neither them nor PostgREST's message.
    """
    status = response.status_code
    code, message = _code_and_message(response)
    # The 5xx include PGRST000 to PGRST003: PostgREST has no connection to the database. While PostgREST 12
    # loads a changed schema it may not know the table, and answers an update with 404 and {}. Just after it
    # has lost the database it answers with 400 and an empty code.
    if status in (408, 429) or status >= 500 or response.content == b"{}" or not code:
        return _TransientError(f"the results database failed (HTTP {status})")
    if code in ("PGRST204", "42703"):
        return ColumnMissing(message)
    if code == "22P02":
        return InvalidUuid("an id is not a UUID")
    if code == "42501":
        sentence = _missing_grant(message, role)
    elif code == "22023" and message.startswith("role "):
        sentence = f"the project has no role {role}, which SUPABASE_SERVICE_KEY names"
    elif status in (401, 403):
        sentence = f"SUPABASE_SERVICE_KEY is refused (HTTP {status})"
    elif code in ("42P01", "PGRST205"):
        sentence = f"there is no table {TABLE}: apply supabase/migrations to the project"
    elif code in ("42883", "PGRST202"):
        sentence = (
            f"there is no function {_NOW_FUNCTION}, or the API's copy of the schema is old: "
            "apply supabase/migrations"
        )
    else:
        known = f", code {code}" if re.fullmatch(r"[A-Z0-9]{1,10}", code) else ""
        sentence = f"SUPABASE_URL refused a request (HTTP {status}{known})"
    return ResultsMisconfigured(sentence)


def _missing_grant(message: str, role: str) -> str:
    """A sentence for the operator, with the SQL to run, for PostgreSQL's refusal of a right."""
    grantee = role if re.fullmatch("[a-z_][a-z0-9_]*", role) else '"' + role.replace('"', '""') + '"'
    apply = "run supabase/optional/sam3_worker.sql" if role == "sam3_worker" else "apply supabase/migrations"
    if "row-level security" in message:
        return f"a row level security policy keeps the role {role} from updating {TABLE}"
    if "to set role" in message:
        return f"the API may not take the role {role}: run: grant {grantee} to authenticator;"
    kind, name = (re.findall(r"^permission denied for (\w+) (\w+)", message) or [("", "")])[0]
    if kind == "schema":
        return (
            f"the role {role} may not use the schema {name}: run: grant usage on schema {name} to {grantee};"
        )
    if kind == "function":
        return (
            f"the role {role} may not call {name}: {apply}, "
            f"or run: grant execute on function public.{name}() to {grantee};"
        )
    if name == TABLE:
        return (
            f"the role {role} may not read and update {TABLE}: {apply}, "
            f"or run: grant select, update on public.{TABLE} to {grantee};"
        )
    return f"the role {role} lacks a right that {TABLE} needs" + (f", on {name}" if name else "")


def _not_postgrest() -> ResultsMisconfigured:
    return ResultsMisconfigured("SUPABASE_URL does not answer as Supabase's REST API does")


def _code_and_message(response: httpx.Response) -> tuple[str, str]:
    with suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return str(body.get("code")), str(body.get("message"))
    return "none", ""
