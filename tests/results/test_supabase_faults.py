"""The Supabase store over an unreliable network, and what its errors and logs hold."""

from __future__ import annotations

import asyncio
import logging
import ssl
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from results import AttemptLost, Claim, ResultsMisconfigured, ResultsUnavailable
from results.supabase import SupabaseResults
from tests.results.claims import MASK_URL, claimed, finish

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.results.supabase_project import Project
    from tests.services.faults import FaultProxy

pytestmark = pytest.mark.anyio

NO_CONNECTION = b'{"code":"PGRST001","message":"Database client error. Retrying the connection."}'
TRANSIENT: dict[str, Callable[[FaultProxy], None]] = {
    "500": lambda proxy: proxy.fail_next(2, status=500),
    "502 page": lambda proxy: proxy.fail_next(status=502, body=b"<html>Bad gateway</html>"),
    "503 of PostgREST": lambda proxy: proxy.fail_next(2, status=503, body=NO_CONNECTION),
    "404 of a schema being loaded": lambda proxy: proxy.fail_next(status=404, body=b"{}"),
    "520": lambda proxy: proxy.fail_next(status=520),
    "429": lambda proxy: proxy.fail_next(2, status=429, headers={"Retry-After": "1"}),
    "cut": lambda proxy: proxy.cut_next(2),
    "lost answer": lambda proxy: proxy.lose_answer_next(),
    "lost answers": lambda proxy: proxy.lose_answer_next(2),
    "hang": lambda proxy: proxy.hang_next(),
    # PostgREST's first answer after its database has died.
    "400 without a code": lambda proxy: proxy.fail_next(
        status=400, headers={"Content-Type": "application/json"}, body=b'{"code": "", "message": ""}'
    ),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT.keys())
async def test_transient_fault_is_retried(project: Project, fault: Callable[[FaultProxy], None]) -> None:
    """Claims and writes succeed after a transient fault, also when only the answer was lost."""
    store, task = project.open(timeout_s=2.0), project.new_task()
    await store.check()
    fault(project.proxy)
    claim = await claimed(store, task)
    fault(project.proxy)
    await finish(store, claim)
    fault(project.proxy)
    stored = await store.claim(task, str(uuid4()))
    assert not isinstance(stored, Claim)
    assert stored.mask_url == MASK_URL
    fault(project.proxy)
    with pytest.raises(AttemptLost):
        await store.update_status(task.task_id, "error", attempt_id=claim.attempt_id)


async def test_truncated_answer_is_retried(project: Project) -> None:
    """An answer whose body is truncated is requested again."""
    store, task = project.open(), project.new_task()
    await finish(store, await claimed(store, task))
    project.proxy.cut_next(after_bytes=20, when=lambda seen: seen.method == "GET")
    assert not isinstance(await store.claim(task, str(uuid4())), Claim)


async def test_three_failures_are_final(project: Project) -> None:
    """A request is tried three times; a later call may succeed."""
    store, task = project.open(), project.new_task()
    await store.check()
    before = len(project.proxy.requests)
    project.proxy.fail_next(3, status=503)
    with pytest.raises(ResultsUnavailable, match="HTTP 503"):
        await store.claim(task, str(uuid4()))
    assert len(project.proxy.requests) == before + 3
    await claimed(store, task)


async def test_hang_ends_in_bounded_time(project: Project) -> None:
    """A silent database costs three timeouts, and the pool keeps its connections."""
    store, task = project.open(timeout_s=1.5, connections=2), project.new_task()
    await store.check()
    project.proxy.hang_next(1000)
    failures = await asyncio.gather(
        *(store.claim(task, str(uuid4())) for _ in range(10)), return_exceptions=True
    )
    assert {type(failure) for failure in failures} == {ResultsUnavailable}
    project.proxy.heal()
    await asyncio.gather(*(claimed(store, project.new_task()) for _ in range(4)))


async def test_start_succeeds_while_the_database_is_unavailable(project: Project) -> None:
    """An outage at the start is a warning; the columns are detected at the first task."""
    store, task = project.open(), project.new_task()
    project.proxy.fail_next(3, status=503)
    [sentence] = await store.check()
    assert "HTTP 503" in sentence
    await finish(store, await claimed(store, task))
    assert project.row(task)[0] == "done"


async def test_outage_and_return_of_the_database(spare: Project) -> None:
    """During an outage of PostgreSQL a write raises ResultsUnavailable; afterwards it settles the row."""
    store, task = spare.open(timeout_s=1.0), spare.new_task()
    claim = await claimed(store, task)
    spare.database.stop()
    try:
        with pytest.raises(ResultsUnavailable):
            await finish(store, claim)
    finally:
        spare.database.start()
    await finish(store, claim)
    assert spare.row(task)[0] == "done"


async def test_claim_with_a_lost_answer_holds(project: Project) -> None:
    """When all answers to a claim are lost, the same attempt can still claim the row later."""
    store, task, attempt_id = project.open(), project.new_task(), str(uuid4())
    await store.check()
    project.proxy.lose_answer_next(3)
    with pytest.raises(ResultsUnavailable):
        await store.claim(task, attempt_id)
    assert project.row(task)[0] == "processing"
    assert await store.claim(task, attempt_id) == Claim(task.task_id, attempt_id)


@pytest.mark.parametrize("status", [200, 302, 404])
async def test_server_that_is_not_supabase(project: Project, status: int) -> None:
    """An answer that is not PostgREST's stops the start, and raises ResultsUnavailable at run time."""
    store, task = project.open(), project.new_task()

    def welcome() -> None:
        headers = {"Location": "https://elsewhere.example/"}
        project.proxy.fail_next(status=status, body=b"<html>Welcome</html>", headers=headers)

    welcome()
    with pytest.raises(ResultsMisconfigured, match="SUPABASE_URL"):
        await store.check()
    await store.check()
    welcome()
    with pytest.raises(ResultsUnavailable):
        await store.claim(task, str(uuid4()))


async def test_log_and_errors_hold_no_secret(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    """No error or log record holds a key, a prompt, a user, an address or a row, at any log level."""
    caplog.set_level(logging.DEBUG)
    store, task = project.open(timeout_s=2.0), project.new_task()
    quoting = b'{"code":"23514","message":"violates","details":"Failing row contains (a secret prompt)"}'
    faults: list[Callable[[], None]] = [
        lambda: None,
        lambda: project.proxy.fail_next(3, status=500, body=quoting),
        lambda: project.proxy.fail_next(1, status=400, body=quoting),
        lambda: project.proxy.fail_next(1, status=401, body=quoting),
        lambda: project.proxy.cut_next(3),
        lambda: project.proxy.hang_next(3),
    ]
    texts = []
    for fault in faults:
        fault()
        try:
            await finish(store, await claimed(store, task))
        except ResultsUnavailable as error:
            texts.append(str(error))
            logging.getLogger("test").exception("with its traceback")
        project.proxy.heal()
        task = project.new_task()
    assert len(texts) == len(faults) - 1
    texts += [str(vars(record)) for record in caplog.records]
    address = project.proxy.url.removeprefix("http://")
    for secret in (project.database.secret_key, "a secret prompt", task.user_id, address, "Failing row"):
        assert not any(secret in line for line in texts)
    assert "code 23514" in caplog.text


def certificate(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key, in one file."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path


async def test_http_2_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP/1.1 is negotiated with a server that offers HTTP/2, over which supabase-py loses updates."""
    path = certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2", "http/1.1"])
    chosen = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        chosen.append(writer.get_extra_info("ssl_object").selected_alpn_protocol())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}"
        store = SupabaseResults(url, "sb_secret_0123456789", lease_s=120)
        with pytest.raises(ResultsMisconfigured, match="HTTP 404"):
            await store.check()
        await store.close()
    assert chosen == ["http/1.1"]
