"""Supabase's REST API as a result store needs it: which key goes where, retries, errors, its clock."""

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

_TRIES: Final = 3
_CONNECT_TIMEOUT_S: Final = 3.0
_KEEPALIVE_S: Final = 30.0
# A Date is cut to the second, and servers make a new one only once a second.
_DATE_LAG_S: Final = 2.0
# The two clocks drift apart by far less than a second meanwhile.
_HEARD_LATELY_S: Final = 30.0
_CLOCK: Final = "segmentation_results_now"
# To these roles row level security shows no task, so that every task would look missing.
_BLIND_ROLES: Final = frozenset({"", "anon", "authenticated"})


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
    Raises ResultsMisconfigured for a URL or a key that cannot work.
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
        self._deadline_s = _TRIES * timeout_s
        # The database's time less that of time.monotonic: our wall clock may be set at any moment.
        self._ahead_s: float | None = None
        self._heard_s = -math.inf
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

    def update(self, content: Mapping[str, object]) -> AsyncSelectRequestBuilder:
        """Where an update begins; `count` sends it."""
        # Without the row in the answer a role needs no right to read all columns; the count tells a miss.
        return self.table.update(content, count=CountMethod.exact, returning=ReturnMethod.minimal)

    async def count(self, update: AsyncSelectRequestBuilder) -> int:
        """How many rows the update has changed. Raises what `send` raises."""
        count = (await self.send(update)).count
        if count is None:
            raise _not_rest()
        return count

    async def rows(self, query: AsyncSelectRequestBuilder) -> list[dict[str, Any]]:
        """The rows that the query finds. Raises what `send` raises."""
        data: Any = (await self.send(query)).data
        if not isinstance(data, list):
            raise _not_rest()
        return data

    async def now(self) -> datetime:
        """The database's time, asked for; a function of our migration tells it."""
        data: object = (await self.send(self._client.rpc(_CLOCK, {}, get=True))).data
        try:
            return datetime.fromisoformat(str(data)).astimezone(UTC)
        except ValueError:
            raise _not_rest() from None

    async def database_time(self) -> datetime:
        """The database's time as its answers tell it, to about two seconds; at most that much behind.

        For a project without our function. Asks when no answer has told it lately.
        """
        if time.monotonic() - self._heard_s > _HEARD_LATELY_S:
            await self.send(self.table.select("id").limit(0))
        if self._ahead_s is None:
            raise _not_rest()
        return datetime.fromtimestamp(time.monotonic() + self._ahead_s, UTC)

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

    async def close(self) -> None:
        """End all connections; closing twice is harmless."""
        await self._http.aclose()

    async def _prepare(self, request: httpx.Request) -> None:
        # supabase-py sends any key as a bearer too, but a secret key is no JWT, and is refused as one.
        if self._credentials.bearer is None:
            request.headers.pop("Authorization", None)
        request.extensions["sent_s"] = time.monotonic()

    async def _hear(self, response: httpx.Response) -> None:
        if not response.is_success:
            # Read, so that the connection can be used again.
            await response.aread()
            raise _refusal(response, self._credentials.role)
        with suppress(ValueError, TypeError):
            told_s = parsedate_to_datetime(response.headers.get("Date", "")).timestamp()
            self._heard_s = time.monotonic()
            # Between these two the database's clock must be ahead of ours; inside, nothing is learnt.
            least, most = told_s - self._heard_s, told_s + _DATE_LAG_S - response.request.extensions["sent_s"]
            self._ahead_s = least if self._ahead_s is None else min(max(self._ahead_s, least), most)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What goes out in `apikey` and, as a bearer, in `Authorization`; the latter may expire (Unix time).

    `role` is who we are in the database.
    """

    apikey: str
    bearer: str | None
    role: str
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
        return Credentials(apikey=service_key, bearer=None, role="service_role")
    if service_key.startswith("sb_publishable_"):
        raise ResultsMisconfigured(
            "SUPABASE_SERVICE_KEY is a publishable key, to which every task looks missing; "
            "give a secret key (sb_secret_...)"
        )
    claims = _claims(service_key)
    role, expires_at_s = claims.get("role"), claims.get("exp")
    if not isinstance(role, str) or role in _BLIND_ROLES:
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
    except httpx.InvalidURL:
        raise ResultsMisconfigured("a request to the results database does not fit into a URL") from None


def _refusal(response: httpx.Response, role: str) -> ResultsUnavailable | ResultsMisconfigured:
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
        sentence = _right_missing(message, role)
    elif code == "22023" and message.startswith("role "):
        sentence = f"the project has no role {role}, which SUPABASE_SERVICE_KEY names"
    elif status in (401, 403):
        sentence = f"SUPABASE_SERVICE_KEY is refused (HTTP {status})"
    elif code in ("42P01", "PGRST205"):
        sentence = f"there is no table {TABLE}: apply supabase/migrations to the project"
    elif code in ("42883", "PGRST202"):
        sentence = f"there is no function {_CLOCK}, or the API has not seen it yet: apply supabase/migrations"
    else:
        known = f", code {code}" if re.fullmatch(r"[A-Z0-9]{1,10}", code) else ""
        sentence = f"SUPABASE_URL refused a request (HTTP {status}{known})"
    return ResultsMisconfigured(sentence)


def _right_missing(message: str, role: str) -> str:
    """What PostgreSQL's refusal of a right asks the operator to run."""
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


def _not_rest() -> ResultsMisconfigured:
    return ResultsMisconfigured("SUPABASE_URL does not answer as Supabase's REST API does")


def _code_and_message(response: httpx.Response) -> tuple[str, str]:
    with suppress(ValueError):
        body = response.json()
        if isinstance(body, dict):
            return str(body.get("code")), str(body.get("message"))
    return "none", ""
