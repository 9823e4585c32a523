"""The TypeScript client: its types are those of the server, and it works with the real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.services import node
from tests.services.faults import fault_proxy
from tests.tiers import need

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.edge import Edge
    from tests.services.faults import FaultProxy, Seen

pytestmark = pytest.mark.server

ROOT = Path(__file__).parent.parent
CLIENT = ROOT / "typescript_client"
TSC = str(CLIENT / "node_modules" / "typescript" / "bin" / "tsc")
PAGE = ROOT / "docs" / "typescript.md"
PICTURE = ROOT / "examples" / "sample.jpg"
PROMPT = "purple circle"
TIMEOUT_S = 120
RETRY_AFTER_MS = 1000
WRONG_KEY_ID = "wrong-key"
"""The request id of the call with a wrong key, in client.test.ts."""
BUSY = b'{"error": {"code": "OVERLOADED", "message": "too many requests"}, "request_id": "1"}'
LOADING = b'{"error": {"code": "MODEL_NOT_LOADED", "message": "the model is loading"}, "request_id": "1"}'


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    need(node.missing())
    if not Path(TSC).is_file():
        need("typescript_client/node_modules is missing (make test installs it with npm)")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the built package `sam3-client` is installed."""
    folder = tmp_path_factory.mktemp("typescript")
    installed = folder / "node_modules" / "sam3-client"
    installed.mkdir(parents=True)
    shutil.copy(CLIENT / "package.json", installed)
    run(TSC, "-p", "tsconfig.build.json", "--outDir", str(installed / "dist"))
    return folder


@pytest.fixture
def proxy(edge: Edge) -> Iterator[FaultProxy]:
    """A proxy before the server, with faults for some images, which the client's tests name."""
    for name in ("good", "flaky", "busy", "hanging", "waiting", "proxied"):
        edge.upload(PICTURE.read_bytes(), f"typescript-{name}")
    with fault_proxy(edge.server.url) as running:
        running.cut_next(when=about("flaky"))
        running.fail_next(
            when=about("flaky"), headers={"Retry-After": str(RETRY_AFTER_MS // 1000)}, body=LOADING
        )
        running.fail_next(when=about("busy"), status=429, headers={"Retry-After": "30"}, body=BUSY)
        running.fail_next(when=about("waiting"), headers={"Retry-After": "30"}, body=LOADING)
        running.hang_next(2, when=about("hanging"))
        running.fail_next(when=about("proxied"), status=502, body=b"<h1>Bad Gateway</h1>")
        yield running


def about(name: str) -> Callable[[Seen], bool]:
    """Matches the requests for one image."""
    return lambda seen: f"typescript-{name}".encode() in seen.body


def run(*command: str, folder: Path = CLIENT, stdin: str = "", setup: str = "") -> str:
    """Run a script with Node.js; returns its output, and fails with it unless the script exits with 0."""
    ended = subprocess.run(
        [str(node.node()), *command],
        cwd=folder,
        input=stdin,
        env=os.environ | {"SAM3_TEST": setup, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_types_are_those_of_the_description(edge: Edge) -> None:
    """The committed types are what `make types` writes for the description that the server shows."""
    types = run("generate.mjs", stdin=edge.http.get("/docs.json").text)
    assert types == (CLIENT / "src" / "schema.ts").read_text(), "run make types"


def test_type_check() -> None:
    """TypeScript in strict mode reports no error in the client and its tests, which hold wrong calls too."""
    run(TSC)


def test_client(edge: Edge, proxy: FaultProxy) -> None:
    """All of its own tests pass; failed calls were repeated as the contract says, and no others."""
    setup = {"url": proxy.url, "key": edge.server.api_key, "picture": str(PICTURE), "prompt": PROMPT}
    report = run("--test", "--test-reporter=tap", "test/client.test.ts", setup=json.dumps(setup))
    assert "\n# pass 11\n" in report, report

    def sent(name: str) -> list[Seen]:
        return [seen for seen in proxy.requests if about(name)(seen)]

    flaky = sent("flaky")
    assert [seen.status for seen in flaky] == [None, 503, 200]
    assert len({seen.body for seen in flaky}) == 1
    left_ms = [int(seen.headers["x-deadline-ms"]) for seen in flaky]
    assert 60_000 >= left_ms[0] > left_ms[1]
    assert left_ms[1] - left_ms[2] >= RETRY_AFTER_MS
    assert [len(sent(name)) for name in ("busy", "waiting", "proxied")] == [1, 1, 1]
    assert [seen.headers.get("x-request-id") for seen in proxy.requests].count(WRONG_KEY_ID) == 1


def test_documented_worker(edge: Edge, package: Path) -> None:
    """The Worker of docs/typescript.md compiles with the package's types, and answers as the page says."""
    [worker] = re.findall(r"^```ts\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (package / "worker.mts").write_text(worker)
    options = "--strict --exactOptionalPropertyTypes --module nodenext --target es2023 --lib ES2023,DOM"
    run(TSC, *options.split(), "worker.mts", folder=package)
    program = """
        import { readFile } from "node:fs/promises";
        import worker from "./worker.mjs";
        const { picture, ...env } = JSON.parse(process.env.SAM3_TEST);
        for (const body of [await readFile(picture), "no picture"]) {
          const request = new Request("https://worker/?prompt=purple+circle", { method: "POST", body });
          const answer = await worker.fetch(request, env);
          console.log(answer.status, await answer.text());
        }
    """
    server = {"SAM3_URL": f"{edge.server.url}/", "SAM3_API_KEY": edge.server.api_key}
    setup = json.dumps({**server, "picture": str(PICTURE)})
    found, refused = run("--input-type=module", "-e", program, folder=package, setup=setup).splitlines()
    [circle] = json.loads(found.removeprefix("200 "))
    assert len(circle["box"]) == 4
    assert refused.startswith('415 {"error":"')
